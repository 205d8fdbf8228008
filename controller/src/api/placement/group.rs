//! The calls of `dalgu.v1.PlacementService` about placement groups.

use std::{collections::BTreeSet, ops::Bound};

use dalgu_proto::{
    ids::PlacementGroupName,
    placement::Group,
    reason, time,
    v1::{self, DeletePlacementGroupResponse, ListPlacementGroupsResponse, PlacementGroup},
};
use tonic::{Request, Response, Status};

use crate::{
    api::{Services, page::Page, request},
    model::{Outcome, PlacementGroupRecord},
    placement_groups::of_group,
    state::State,
    verbs::{self, Error, placement_group},
};

const MAX_DESCRIPTION: usize = 1024;

type Answer = Result<Response<PlacementGroup>, Status>;

fn name_of(field: &str, value: &str) -> Result<PlacementGroupName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

fn wire(state: &State, record: &PlacementGroupRecord) -> PlacementGroup {
    let vms: BTreeSet<_> = of_group(state, &record.group).map(|vm| &vm.name).collect();
    PlacementGroup {
        description: record.description.clone(),
        vms: vms.into_iter().map(ToString::to_string).collect(),
        create_time: Some(time::to_wire(record.create_time)),
        ..record.group.clone().into()
    }
}

/// Reads one.
pub fn get(services: &Services, name: &str) -> Answer {
    let state = services.db.snapshot();
    let group = placement_group::find(&state, &name_of("name", name)?)?;
    Ok(Response::new(wire(&state, &group)))
}

/// Lists a page of them.
pub fn list(
    services: &Services,
    m: &v1::ListPlacementGroupsRequest,
) -> Result<Response<ListPlacementGroupsResponse>, Status> {
    let page = Page::of(m.page_size, &m.page_token, "placement groups")?;
    let from = match &page.after {
        Some(name) => Bound::Excluded(name_of("page_token", name)?),
        None => Bound::Unbounded,
    };
    let state = services.db.snapshot();
    let found = state.placement_groups.range((from, Bound::Unbounded));
    let (groups, next_page_token) = page.take(found.map(|(_, one)| one), |one| one.group.name.to_string());
    Ok(Response::new(ListPlacementGroupsResponse {
        placement_groups: groups.into_iter().map(|one| wire(&state, one)).collect(),
        next_page_token,
        resource_version: state.meta.revision,
    }))
}

/// Makes one.
pub async fn create(services: &Services, request: &Request<v1::CreatePlacementGroupRequest>) -> Answer {
    let m = request.get_ref();
    let given = m.placement_group.clone();
    let given = given.ok_or_else(|| reason::invalid("placement_group", "must be given"))?;
    if !given.vms.is_empty() || given.create_time.is_some() {
        let message = "is set by the controller: leave it empty; VMs name their groups";
        return Err(reason::invalid("placement_group.vms", message));
    }
    let text = given.description.clone();
    let description = request::text("placement_group.description", text, MAX_DESCRIPTION)?;
    let group = Group::try_from(given)
        .map_err(|invalid| reason::invalid(&format!("placement_group.{}", invalid.field), invalid.message))?;
    let content = format!("CreatePlacementGroup {group:?} {description:?}");
    let caller = request::caller(request, &m.request_id, &content)?;
    let name = group.name.clone();
    let outcome = services
        .db
        .transact(|tx| verbs::once(tx, &caller, |tx| placement_group::create(tx, group, description)))
        .await?;
    if outcome != Outcome::PlacementGroup(name.clone()) {
        return Err(Error::RequestReused(caller.request_id).into());
    }
    let state = services.db.snapshot();
    // A repeated request may find it gone.
    let group = placement_group::find(&state, &name)?;
    Ok(Response::new(wire(&state, &group)))
}

/// Deletes one.
pub async fn delete(
    services: &Services,
    request: &Request<v1::DeletePlacementGroupRequest>,
) -> Result<Response<DeletePlacementGroupResponse>, Status> {
    let m = request.get_ref();
    let name = name_of("name", &m.name)?;
    let caller = request::caller(request, &m.request_id, &format!("DeletePlacementGroup {name}"))?;
    services
        .db
        .transact(|tx| verbs::once(tx, &caller, |tx| placement_group::delete(tx, &name)))
        .await?;
    Ok(Response::new(DeletePlacementGroupResponse {}))
}
