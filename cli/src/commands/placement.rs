//! `dalgu placement-group` and `dalgu capacity`.

use dalgu_proto::v1;

use super::{PAGE, Session, map, request_id, spec::fitted};
use crate::{
    args::placement::{CapacityArgs, CreateArgs, GroupCommand},
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, human, json, placement},
};

/// Does a command on placement groups.
pub async fn run(command: GroupCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        GroupCommand::Create(args) => create(args, session).await,
        GroupCommand::List => list(session).await,
        GroupCommand::Get { name } => {
            let request = v1::GetPlacementGroupRequest { name };
            let group = session
                .read(async |client| client.placement().get_placement_group(request.clone()).await)
                .await?;
            output::one(session.term, session.format, &group)
        }
        GroupCommand::Delete { name, request } => {
            let request = v1::DeletePlacementGroupRequest {
                name,
                request_id: request_id(request.request_id.as_ref()),
            };
            let delete =
                async |client: &Client| client.placement().delete_placement_group(request.clone()).await;
            session.change(CALL_TIMEOUT, delete).await?;
            Ok(session
                .term
                .say(&format!("{} is deleted", human::clean(&request.name)))?)
        }
    }
}

async fn create(args: CreateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let group = v1::PlacementGroup {
        name: args.name,
        rule: v1::PlacementRule::from(args.rule).into(),
        preferred: args.preferred,
        topology_key: args.topology_key,
        description: args.description,
        ..Default::default()
    };
    let request = v1::CreatePlacementGroupRequest {
        placement_group: Some(group),
        request_id: request_id(args.request.request_id.as_ref()),
    };
    let create = async |client: &Client| client.placement().create_placement_group(request.clone()).await;
    let group = session.change(CALL_TIMEOUT, create).await?;
    match session.format {
        Format::Table | Format::Wide => Ok(session
            .term
            .say(&format!("created {}", human::clean(&group.name)))?),
        format => output::one(session.term, format, &group),
    }
}

async fn list(session: &mut Session<'_>) -> Result<(), Error> {
    let mut groups = Vec::new();
    let mut request = v1::ListPlacementGroupsRequest {
        page_size: PAGE,
        ..Default::default()
    };
    loop {
        let page = session
            .read(async |client| client.placement().list_placement_groups(request.clone()).await)
            .await?;
        groups.extend(page.placement_groups);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return output::list(session.term, session.format, &groups);
        }
    }
}

/// Refuses groups that are not there before a VM is made: a controller that knows of none would leave them out of what it makes.
pub async fn are_there(groups: &[String], session: &Session<'_>) -> Result<(), Error> {
    for name in groups {
        let request = v1::GetPlacementGroupRequest { name: name.clone() };
        session
            .read(async |client| client.placement().get_placement_group(request.clone()).await)
            .await?;
    }
    Ok(())
}

/// Says how many more VMs fit.
pub async fn capacity(args: CapacityArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let fitted = fitted(v1::VmSpec::default(), &args.fitting);
    let request = v1::EstimateCapacityRequest {
        cpu_policy: fitted.cpu_policy,
        huge_page_kib: fitted.huge_page_kib,
        numa_policy: fitted.numa_policy,
        numa_nodes: fitted.numa_nodes,
        devices: fitted.devices,
        vcpus: args.vcpus,
        memory_mib: args.memory,
        host_selector: map(args.host_selector),
        tolerations: args.tolerations,
        topology_key: args.domain,
        keep_domains: args.keep,
    };
    let capacity = session
        .read(async |client| client.placement().estimate_capacity(request.clone()).await)
        .await?;
    let text = match session.format {
        Format::Json => json::object(&capacity)?,
        Format::Yaml => json::yaml(&capacity)?,
        Format::Name => format!("{}\n", capacity.vms),
        Format::Table | Format::Wide => placement::capacity(&request, &capacity, session.term.color),
    };
    Ok(session.term.print(&text)?)
}
