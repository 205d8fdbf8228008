//! `dalgu security-group`.

use std::collections::HashMap;

use dalgu_proto::{
    network::{Group, Rule},
    v1,
};
use prost_types::FieldMask;
use tonic::Status;

use super::{changed, done};
use crate::{
    args::network::{CreateGroupArgs, GroupCommand, ListArgs, UpdateGroupArgs},
    client::{CALL_TIMEOUT, Client},
    commands::{PAGE, Session, host, map, matches, request_id, show::show},
    exit::Error,
    output::{self, human},
    watch::{Page, Snapshot, pages},
};

/// Does a command.
pub async fn run(command: GroupCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        GroupCommand::Create(args) => create(args, session).await,
        GroupCommand::List(args) => show_all(args, session).await,
        GroupCommand::Get { name, watch } => show::<v1::SecurityGroup>(&name, watch, session).await,
        GroupCommand::Update(args) => update(args, session).await,
        GroupCommand::Delete { name, etag, request } => {
            let request = v1::DeleteSecurityGroupRequest {
                name,
                etag,
                request_id: request_id(request.request_id.as_ref()),
            };
            let delete =
                async |client: &Client| client.networks().delete_security_group(request.clone()).await;
            session.change(CALL_TIMEOUT, delete).await?;
            Ok(session
                .term
                .say(&format!("{} is deleted", human::clean(&request.name)))?)
        }
    }
}

async fn create(args: CreateGroupArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let group = v1::SecurityGroup {
        name: args.name,
        rules: args.rules,
        labels: map(args.labels),
        description: args.description,
        ..Default::default()
    };
    let request = v1::CreateSecurityGroupRequest {
        security_group: Some(group),
        request_id: request_id(args.request.request_id.as_ref()),
    };
    let create = async |client: &Client| client.networks().create_security_group(request.clone()).await;
    let group = session.change(CALL_TIMEOUT, create).await?;
    done("created", &group, session)
}

async fn list(
    client: &Client,
    selector: &HashMap<String, String>,
) -> Result<Snapshot<v1::SecurityGroup>, Status> {
    let read = async |page_token| {
        let request = v1::ListSecurityGroupsRequest {
            page_size: PAGE,
            page_token,
            label_selector: selector.clone(),
        };
        let page = client
            .call(async |client| client.networks().list_security_groups(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.security_groups,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn show_all(args: ListArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let selector = map(args.selector);
    let wanted = |object: &v1::SecurityGroup| matches(&object.labels, &selector);
    session
        .show_all(args.watch, &wanted, async |client| list(client, &selector).await)
        .await
}

async fn update(args: UpdateGroupArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let own = args.etag.is_some() || args.request.request_id.is_some();
    let group = changed(
        session,
        &args.name,
        own,
        |old| change(&args, old),
        async |client, request| client.networks().update_security_group(request.clone()).await,
    )
    .await?;
    done("changed", &group, session)
}

/// Rules as the controller keeps them, however they are spelled.
fn parsed(name: &str, rules: &[v1::SecurityRule]) -> Result<Vec<Rule>, Error> {
    let group = v1::SecurityGroup {
        name: name.to_owned(),
        rules: rules.to_vec(),
        ..Default::default()
    };
    let group = Group::try_from(group)
        .map_err(|error| Error::Usage(human::clean(&format!("a rule of {name}: {}", error.message))))?;
    Ok(group.rules)
}

/// The rules that it has then. A rule is known by what it lets through, whatever its description says: one that is added again gets
/// the description that it is given then, and one that is to go must be there.
fn rules(args: &UpdateGroupArgs, old: &v1::SecurityGroup) -> Result<Option<Vec<v1::SecurityRule>>, Error> {
    if !args.rules.is_empty() {
        return Ok(Some(args.rules.clone()));
    }
    if args.add.is_empty() && args.remove.is_empty() {
        return Ok(None);
    }
    let same =
        |a: &Rule, b: &Rule| (a.direction, &a.protocol, &a.remote) == (b.direction, &b.protocol, &b.remote);
    let mut rules = parsed(&old.name, &old.rules)?;
    for gone in parsed(&old.name, &args.remove)? {
        let before = rules.len();
        rules.retain(|rule| !same(rule, &gone));
        if rules.len() == before {
            return Err(none(&old.name, &gone));
        }
    }
    for rule in parsed(&old.name, &args.add)? {
        match rules.iter_mut().find(|there| same(there, &rule)) {
            Some(_) if rule.description.is_empty() => {}
            Some(there) => there.description = rule.description,
            None => rules.push(rule),
        }
    }
    Ok(Some(rules.into_iter().map(Into::into).collect()))
}

fn none(name: &str, rule: &Rule) -> Error {
    let rule = output::network::rule_words(&rule.clone().into()).join(" ");
    let text = format!("{name} has no rule {rule}: see `dalgu security-group show {name}`");
    Error::Usage(human::clean(&text))
}

fn change(args: &UpdateGroupArgs, old: &v1::SecurityGroup) -> Result<v1::UpdateSecurityGroupRequest, Error> {
    let mut new = v1::SecurityGroup {
        name: old.name.clone(),
        etag: args.etag.clone().unwrap_or_else(|| old.etag.clone()),
        ..Default::default()
    };
    let mut paths = Vec::new();
    if let Some(rules) = rules(args, old)? {
        new.rules = rules;
        paths.push("rules".to_owned());
    }
    if !args.labels.is_empty() {
        new.labels = host::changed(&old.labels, &args.labels);
        paths.push("labels".to_owned());
    }
    if let Some(description) = &args.description {
        new.description.clone_from(description);
        paths.push("description".to_owned());
    }
    Ok(v1::UpdateSecurityGroupRequest {
        security_group: Some(new),
        update_mask: Some(FieldMask { paths }),
        request_id: request_id(args.request.request_id.as_ref()),
    })
}
