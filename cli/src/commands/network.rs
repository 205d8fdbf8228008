//! `dalgu network`, and in [`group`] `dalgu security-group`.

pub mod group;

use std::{collections::HashMap, time::Duration};

use dalgu_proto::v1;
use prost_types::FieldMask;
use tonic::{Response, Status};

use super::{
    PAGE, Session, host, map, matches, request_id,
    show::{Single, get, show},
};
use crate::{
    args::network::{CreateArgs, ListArgs, NetworkCommand, UpdateArgs},
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, Resource, human},
    watch::{Page, Snapshot, pages},
};

/// How often a change is tried again that somebody else's came before.
const ATTEMPTS: u32 = 4;

/// Does a command.
pub async fn run(command: NetworkCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        NetworkCommand::Create(args) => create(*args, session).await,
        NetworkCommand::List(args) => show_all(args, session).await,
        NetworkCommand::Get { name, watch } => show::<v1::Network>(&name, watch, session).await,
        NetworkCommand::Interfaces { name } => interfaces(name, session).await,
        NetworkCommand::Update(args) => update(args, session).await,
        NetworkCommand::Delete { name, etag, request } => {
            let request = v1::DeleteNetworkRequest {
                name,
                etag,
                request_id: request_id(request.request_id.as_ref()),
            };
            let delete = async |client: &Client| client.networks().delete_network(request.clone()).await;
            session.change(CALL_TIMEOUT, delete).await?;
            Ok(session
                .term
                .say(&format!("{} is deleted", human::clean(&request.name)))?)
        }
    }
}

/// Says what was done, or shows the object where a program reads.
pub(super) fn done<R: Resource>(word: &str, item: &R, session: &mut Session<'_>) -> Result<(), Error> {
    match session.format {
        Format::Table | Format::Wide => Ok(session
            .term
            .say(&format!("{word} {}", human::clean(&item.key())))?),
        format => output::one(session.term, format, item),
    }
}

async fn create(args: CreateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let kind = match args.bridge {
        Some(bridge) => v1::network::Kind::Bridge(v1::BridgeNetwork {
            bridge,
            vlan: args.vlan.unwrap_or_default(),
        }),
        None => v1::network::Kind::Overlay(v1::OverlayNetwork {
            vni: args.vni.unwrap_or_default(),
        }),
    };
    let network = v1::Network {
        name: args.name,
        kind: Some(kind),
        mtu: args.mtu.unwrap_or_default(),
        ipv4: args.ipv4,
        ipv6: args.ipv6,
        domain: args.domain.unwrap_or_default(),
        dns_servers: args.dns_servers.iter().map(ToString::to_string).collect(),
        labels: map(args.labels),
        description: args.description,
        ..Default::default()
    };
    let request = v1::CreateNetworkRequest {
        network: Some(network),
        request_id: request_id(args.request.request_id.as_ref()),
    };
    let create = async |client: &Client| client.networks().create_network(request.clone()).await;
    let network = session.change(CALL_TIMEOUT, create).await?;
    done("created", &network, session)
}

async fn list(client: &Client, selector: &HashMap<String, String>) -> Result<Snapshot<v1::Network>, Status> {
    let read = async |page_token| {
        let request = v1::ListNetworksRequest {
            page_size: PAGE,
            page_token,
            label_selector: selector.clone(),
        };
        let page = client
            .call(async |client| client.networks().list_networks(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.networks,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn show_all(args: ListArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let selector = map(args.selector);
    let wanted = |object: &v1::Network| matches(&object.labels, &selector);
    session
        .show_all(args.watch, &wanted, async |client| list(client, &selector).await)
        .await
}

async fn interfaces(network: String, session: &mut Session<'_>) -> Result<(), Error> {
    let mut request = v1::ListNetworkInterfacesRequest {
        network,
        page_size: PAGE,
        page_token: String::new(),
    };
    let mut interfaces = Vec::new();
    loop {
        let page = session
            .read(async |client| client.networks().list_network_interfaces(request.clone()).await)
            .await?;
        interfaces.extend(page.interfaces);
        if page.next_page_token.is_empty() {
            return output::list(session.term, session.format, &interfaces);
        }
        request.page_token = page.next_page_token;
    }
}

/// Reads an object and changes it; again, where somebody else's change came between. `own` says that the etag or the request_id
/// is the user's: that is not replaced behind his back.
pub(super) async fn changed<R: Single, Q>(
    session: &mut Session<'_>,
    name: &str,
    own: bool,
    request: impl Fn(&R) -> Result<Q, Error>,
    call: impl AsyncFn(&Client, &Q) -> Result<Response<R>, Status>,
) -> Result<R, Error> {
    let mut attempt = 1;
    loop {
        let old: R = get(&session.client, name).await?;
        let request = request(&old)?;
        let answer = session
            .change(CALL_TIMEOUT, async |client| call(client, &request).await)
            .await;
        match answer {
            Err(error) if !own && attempt < ATTEMPTS && host::overtaken(&error) => attempt += 1,
            outcome => return outcome,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn update(args: UpdateArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let own = args.etag.is_some() || args.request.request_id.is_some();
    let network = changed(
        session,
        &args.name,
        own,
        |old| Ok(change(&args, old)),
        async |client, request| client.networks().update_network(request.clone()).await,
    )
    .await?;
    done("changed", &network, session)
}

fn change(args: &UpdateArgs, old: &v1::Network) -> v1::UpdateNetworkRequest {
    let mut new = v1::Network {
        name: old.name.clone(),
        etag: args.etag.clone().unwrap_or_else(|| old.etag.clone()),
        ..Default::default()
    };
    let mut paths = Vec::new();
    if !args.labels.is_empty() {
        new.labels = host::changed(&old.labels, &args.labels);
        paths.push("labels".to_owned());
    }
    if let Some(description) = &args.description {
        new.description.clone_from(description);
        paths.push("description".to_owned());
    }
    if let Some(domain) = &args.domain {
        new.domain.clone_from(domain);
        paths.push("domain".to_owned());
    }
    if args.no_dns || !args.dns_servers.is_empty() {
        new.dns_servers = args.dns_servers.iter().map(ToString::to_string).collect();
        paths.push("dns_servers".to_owned());
    }
    v1::UpdateNetworkRequest {
        network: Some(new),
        update_mask: Some(FieldMask { paths }),
        request_id: request_id(args.request.request_id.as_ref()),
    }
}
