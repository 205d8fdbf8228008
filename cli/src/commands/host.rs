//! `dalgu host`.

pub mod drain;
mod power;
mod roll;

use std::{collections::HashMap, time::Duration};

use dalgu_proto::v1;
use prost_types::FieldMask;
use tonic::Status;

use super::{
    PAGE, Session, map, matches, request_id,
    show::{get, show},
};
use crate::{
    args::{
        host::{HostCommand, RequestArgs},
        values::LabelChange,
    },
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, human},
    watch::{Page, Snapshot, pages},
};

/// How often a change is tried again that somebody else's came before.
const ATTEMPTS: u32 = 4;

/// Does a command.
pub async fn run(command: HostCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        HostCommand::List { selector, watch } => show_all(map(selector), watch, session).await,
        HostCommand::Show { name, watch } => show::<v1::Host>(&name, watch, session).await,
        HostCommand::Cordon {
            name,
            reason,
            request,
        } => {
            let request = v1::CordonHostRequest {
                name,
                reason,
                request_id: id(&request),
            };
            let host = change(session, async |client| {
                client.hosts().cordon_host(request.clone()).await
            })
            .await?;
            done(
                session,
                &host,
                "cordoned; its VMs run on, and it takes no new ones",
            )
        }
        HostCommand::Uncordon { name, request } => {
            let request = v1::UncordonHostRequest {
                name,
                request_id: id(&request),
            };
            let host = change(session, async |client| {
                client.hosts().uncordon_host(request.clone()).await
            })
            .await?;
            done(session, &host, "open for VMs")
        }
        HostCommand::Power(args) => Box::pin(power::run(args, session)).await,
        HostCommand::Drain(args) => drain::drain(args, session).await,
        HostCommand::Roll(args) => Box::pin(roll::roll(args, session)).await,
        HostCommand::CancelDrain { name, request } => {
            let request = v1::CancelHostDrainRequest {
                name,
                request_id: id(&request),
            };
            let host = change(session, async |client| {
                client.hosts().cancel_host_drain(request.clone()).await
            })
            .await?;
            done(session, &host, "not drained any further; what was begun goes on")
        }
        HostCommand::Restore { name, time, request } => drain::restore(name, &time, &request, session).await,
        HostCommand::Delete { name, request } => {
            let request = v1::DeleteHostRequest {
                name,
                request_id: id(&request),
            };
            change(session, async |client| {
                client.hosts().delete_host(request.clone()).await
            })
            .await?;
            Ok(session
                .term
                .say(&format!("{} is forgotten", human::clean(&request.name)))?)
        }
        HostCommand::Label {
            name,
            changes,
            request,
        } => {
            let labels = |host: &v1::Host| v1::Host {
                labels: changed(&host.labels, &changes),
                ..Default::default()
            };
            let host = Box::pin(update(&name, "labels", labels, &request, session)).await?;
            let labels = human::labels(&host.labels);
            done(session, &host, &format!("labelled {labels}"))
        }
        HostCommand::Limit {
            name,
            max_vms,
            request,
        } => limit(&name, max_vms, &request, session).await,
        HostCommand::Taint {
            name,
            taints,
            request,
        } => {
            let keys: Vec<_> = taints.iter().map(|taint| taint.key.clone()).collect();
            taint(&name, &keys, &taints, &request, session).await
        }
        HostCommand::Untaint { name, keys, request } => taint(&name, &keys, &[], &request, session).await,
    }
}

/// Says how many VMs a host takes.
async fn limit(
    name: &str,
    max_vms: u32,
    request: &RequestArgs,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let limit = |_: &v1::Host| v1::Host {
        max_vms,
        ..Default::default()
    };
    let host = Box::pin(update(name, "max_vms", limit, request, session)).await?;
    let room = host.allocation.clone().unwrap_or_default();
    let text = match room.max_vms {
        0 => "takes as many VMs as have room".to_owned(),
        most => format!("takes at most {most} VMs, has {}", room.vms),
    };
    done(session, &host, &text)
}

/// Takes taints of some keys off a host, and puts others on it.
async fn taint(
    name: &str,
    off: &[String],
    on: &[v1::Taint],
    args: &RequestArgs,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let taints = |host: &v1::Host| {
        let mut taints = host.taints.clone();
        taints.retain(|taint| !off.contains(&taint.key));
        taints.extend_from_slice(on);
        v1::Host {
            taints,
            ..Default::default()
        }
    };
    let host = Box::pin(update(name, "taints", taints, args, session)).await?;
    let text = match human::taints(&host.taints) {
        text if text == "-" => "without taints".to_owned(),
        text => format!("tainted {text}; its VMs run on"),
    };
    done(session, &host, &text)
}

/// The id of a request.
pub fn id(request: &RequestArgs) -> String {
    request_id(request.request_id.as_ref())
}

async fn change<T>(
    session: &mut Session<'_>,
    call: impl AsyncFn(&Client) -> Result<tonic::Response<T>, Status>,
) -> Result<T, Error> {
    session.change(CALL_TIMEOUT, call).await
}

/// A changed host: a sentence for people, the host for programs.
fn done(session: &mut Session<'_>, host: &v1::Host, what: &str) -> Result<(), Error> {
    match session.format {
        Format::Table | Format::Wide => Ok(session
            .term
            .say(&format!("{} is {what}", human::clean(&host.name)))?),
        format => output::one(session.term, format, host),
    }
}

async fn list(client: &Client, selector: &HashMap<String, String>) -> Result<Snapshot<v1::Host>, Status> {
    let read = async |page_token| {
        let request = v1::ListHostsRequest {
            page_size: PAGE,
            page_token,
            label_selector: selector.clone(),
        };
        let page = client
            .call(async |client| client.hosts().list_hosts(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.hosts,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(usize::MAX, read).await
}

async fn show_all(
    selector: HashMap<String, String>,
    watch: bool,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let wanted = |host: &v1::Host| matches(&host.labels, &selector);
    session
        .show_all(watch, &wanted, async |client| list(client, &selector).await)
        .await
}

/// Labels with the changes made.
pub fn changed(labels: &HashMap<String, String>, changes: &[LabelChange]) -> HashMap<String, String> {
    let mut labels = labels.clone();
    for change in changes {
        match change {
            LabelChange::Set(key, value) => labels.insert(key.clone(), value.clone()),
            LabelChange::Remove(key) => labels.remove(key),
        };
    }
    labels
}

/// Whether a change came after somebody else's, and may be tried again on what is there now.
pub fn overtaken(error: &Error) -> bool {
    error.has_reason("ETAG_MISMATCH")
}

/// Changes one field of a host; `new` gives its value, in a host of which nothing else counts.
async fn update(
    name: &str,
    path: &str,
    new: impl Fn(&v1::Host) -> v1::Host,
    args: &RequestArgs,
    session: &mut Session<'_>,
) -> Result<v1::Host, Error> {
    let mut attempt = 1;
    loop {
        let host: v1::Host = get(&session.client, name).await?;
        let new = v1::Host {
            name: name.to_owned(),
            etag: host.etag.clone(),
            ..new(&host)
        };
        let request = v1::UpdateHostRequest {
            host: Some(new),
            update_mask: Some(FieldMask {
                paths: vec![path.to_owned()],
            }),
            request_id: id(args),
        };
        match change(session, async |client| {
            client.hosts().update_host(request.clone()).await
        })
        .await
        {
            Err(error) if overtaken(&error) && attempt < ATTEMPTS && args.request_id.is_none() => {
                attempt += 1
            }
            outcome => return outcome,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
