//! The calls of `dalgu.v1.NetworkService` about security groups.

use std::ops::Bound;

use dalgu_proto::{
    ids::GroupName,
    network::Group,
    reason,
    v1::{self, DeleteSecurityGroupResponse, ListSecurityGroupsResponse, SecurityGroup},
};
use tonic::{Request, Response, Status};

use super::{MAX_DESCRIPTION, invalid, output_only};
use crate::{
    api::{Services, page::Page, request, wire},
    model::Outcome,
    state::Tx,
    verbs::{
        self, Caller, Error,
        network::{self, Notes, UpdateGroup},
    },
};

const OBJECT: &str = "security_group";
const MUTABLE: [&str; 3] = ["rules", "labels", "description"];
const MUTABLE_TEXT: &str = "rules, labels, description";

type Answer = Result<Response<SecurityGroup>, Status>;

fn name_of(field: &str, value: &str) -> Result<GroupName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

fn given(group: Option<&SecurityGroup>) -> Result<&SecurityGroup, Status> {
    group.ok_or_else(|| reason::invalid(OBJECT, "must be given"))
}

fn notes(group: &SecurityGroup) -> Result<Notes, Status> {
    let description = group.description.clone();
    Ok(Notes {
        labels: request::labels("security_group.labels", &group.labels)?,
        description: request::text("security_group.description", description, MAX_DESCRIPTION)?,
    })
}

/// Reads one.
pub fn get(services: &Services, name: &str) -> Answer {
    let name = name_of("name", name)?;
    let state = services.db.snapshot();
    let group = network::find_group(&state, &name)?;
    Ok(Response::new(wire::security_group(&state, &group)))
}

/// Lists a page of them.
pub fn list(
    services: &Services,
    m: &v1::ListSecurityGroupsRequest,
) -> Result<Response<ListSecurityGroupsResponse>, Status> {
    let selector = request::labels("label_selector", &m.label_selector)?;
    let page = Page::of(m.page_size, &m.page_token, &format!("groups {selector:?}"))?;
    let from = match &page.after {
        Some(name) => Bound::Excluded(name_of("page_token", name)?),
        None => Bound::Unbounded,
    };
    let state = services.db.snapshot();
    let found = state.groups.range((from, Bound::Unbounded)).map(|(_, one)| one);
    let found = found.filter(|one| crate::model::matches(&one.labels, &selector));
    let (groups, next_page_token) = page.take(found, |one| one.group.name.to_string());
    let groups = groups.into_iter().map(|one| wire::security_group(&state, one));
    Ok(Response::new(ListSecurityGroupsResponse {
        security_groups: groups.collect(),
        next_page_token,
        resource_version: state.meta.revision,
    }))
}

/// Does a verb once, and answers with its group.
async fn change(
    services: &Services,
    caller: Caller,
    change: impl FnOnce(&mut Tx, &Caller) -> Result<Outcome, Error>,
) -> Answer {
    let outcome = services
        .db
        .transact(|tx| verbs::once(tx, &caller, |tx| change(tx, &caller)))
        .await?;
    let Outcome::Group(name) = outcome else {
        return Err(Error::RequestReused(caller.request_id).into());
    };
    let state = services.db.snapshot();
    // A repeated request may find it gone.
    let group = network::find_group(&state, &name)?;
    Ok(Response::new(wire::security_group(&state, &group)))
}

/// Makes one.
pub async fn create(services: &Services, request: &Request<v1::CreateSecurityGroupRequest>) -> Answer {
    let m = request.get_ref();
    let group = given(m.security_group.as_ref())?;
    output_only(&[
        ("security_group.uid", !group.uid.is_empty()),
        ("security_group.interfaces", group.interfaces != 0),
        ("security_group.etag", !group.etag.is_empty()),
        ("security_group.create_time", group.create_time.is_some()),
    ])?;
    let notes = notes(group)?;
    let new = Group::try_from(group.clone()).map_err(invalid(OBJECT))?;
    let content = format!("CreateSecurityGroup {new:?} {notes:?}");
    let caller = request::caller(request, &m.request_id, &content)?;
    change(services, caller, |tx, caller| {
        network::create_group(tx, caller, new, notes)
    })
    .await
}

/// Changes one.
pub async fn update(services: &Services, request: &Request<v1::UpdateSecurityGroupRequest>) -> Answer {
    let m = request.get_ref();
    let group = given(m.security_group.as_ref())?;
    let paths = request::mask(m.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)?;
    let named = |path: &str| paths.iter().any(|named| named == path);
    let name = name_of("security_group.name", &group.name)?;
    let mut update = UpdateGroup::default();
    if named("labels") || named("description") {
        let notes = notes(group)?;
        update.labels = named("labels").then_some(notes.labels);
        update.description = named("description").then_some(notes.description);
    }
    if named("rules") {
        let whole = Group::try_from(group.clone()).map_err(invalid(OBJECT))?;
        update.rules = Some(whole.rules);
    }
    let content = format!("UpdateSecurityGroup {name} {:?} {update:?}", group.etag);
    let caller = request::caller(request, &m.request_id, &content)?;
    let etag = group.etag.clone();
    change(services, caller, |tx, _| {
        network::update_group(tx, &name, &etag, update)
    })
    .await
}

/// Deletes one.
pub async fn delete(
    services: &Services,
    request: &Request<v1::DeleteSecurityGroupRequest>,
) -> Result<Response<DeleteSecurityGroupResponse>, Status> {
    let m = request.get_ref();
    let name = name_of("name", &m.name)?;
    let content = format!("DeleteSecurityGroup {name} {:?}", m.etag);
    let caller = request::caller(request, &m.request_id, &content)?;
    services
        .db
        .transact(|tx| {
            verbs::once(tx, &caller, |tx| {
                network::delete_group(tx, &caller, &name, &m.etag)
            })
        })
        .await?;
    Ok(Response::new(DeleteSecurityGroupResponse {}))
}
