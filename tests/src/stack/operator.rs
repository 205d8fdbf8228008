//! The operator's programs: clients who try again when no answer comes, and one who watches events and resumes.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Result;
use dalgu_proto::{
    tls::{self, client::connect_lazy},
    v1::{
        self, event_service_client::EventServiceClient, host_service_client::HostServiceClient,
        operation_service_client::OperationServiceClient, vm_service_client::VmServiceClient,
    },
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::{Status, transport::Channel};

use super::site::{CONTROLLER, Site};
use crate::fleet::{
    plan::Request,
    request::{Answer, Message, is_final},
};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A watcher to whom nothing came for so long asks again: its connection may be dead.
const SILENCE: Duration = Duration::from_secs(15);

/// Makes every request at its time, and watches.
pub async fn operator(site: Arc<Site>, requests: Vec<(Duration, Request)>) -> Result<()> {
    let begun = Instant::now();
    let channel = connect_lazy(CONTROLLER, tls::CONTROLLER_NAME, &site.operator()?)?;
    tokio::spawn(watch(site.clone(), channel.clone()));
    for (time, request) in requests {
        sleep_until(begun + time).await;
        tokio::spawn(ask(site.clone(), channel.clone(), request));
    }
    drop(site);
    std::future::pending().await
}

/// Makes a request, again and again where the plan says so.
async fn ask(site: Arc<Site>, channel: Channel, request: Request) {
    let id = site.ids.next().to_string();
    if let Some(kind) = request.verb.kind() {
        site.checker().send(&id, kind);
    }
    let vm = format!("vm-{}", request.object);
    let Some(message) = request.message(vm, id.clone(), site.operation_of(request.object), None) else {
        return;
    };
    let name = format!("{:?} {}", request.verb, request.object);
    let mut again = request.again;
    let first = site.checker().known();
    for attempt in 0..=request.retries {
        let before = site.checker().known();
        site.sent.fetch_add(1, Ordering::Relaxed);
        let called = timeout(PATIENCE, call(channel.clone(), message.clone())).await;
        match called.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(answer) => {
                site.say(format_args!("{name}: {answer:?}"));
                answer.tell(&mut site.checker(), &id, [&first, &before]);
                if let Answer::Operation { id, .. } = answer {
                    site.note_operation(request.object, id);
                }
                if !std::mem::take(&mut again) {
                    return;
                }
            }
            Err(status) => {
                site.say(format_args!("{name}: {:?} {}", status.code(), status.message()));
                if is_final(&status) {
                    return;
                }
            }
        }
        sleep(Duration::from_millis(200 << attempt.min(4))).await;
    }
}

async fn call(channel: Channel, message: Message) -> Result<Answer, Status> {
    let mut vms = VmServiceClient::new(channel.clone());
    match message {
        Message::Create(message) => Answer::accepted(vms.create_vm(message).await?),
        Message::Start(message) => Answer::accepted(vms.start_vm(message).await?),
        Message::Stop(message) => Answer::accepted(vms.stop_vm(message).await?),
        Message::Restart(message) => Answer::accepted(vms.restart_vm(message).await?),
        Message::Pause(message) => Answer::accepted(vms.pause_vm(message).await?),
        Message::Resume(message) => Answer::accepted(vms.resume_vm(message).await?),
        Message::Migrate(message) => Answer::accepted(vms.migrate_vm(message).await?),
        Message::Delete(message) => Answer::accepted(vms.delete_vm(message).await?),
        Message::Update(message) => Ok(Answer::read(vec![vms.update_vm(message).await?.into_inner()])),
        Message::Get(message) => Ok(Answer::read(vec![vms.get_vm(message).await?.into_inner()])),
        Message::List(message) => Ok(Answer::read(vms.list_vms(message).await?.into_inner().vms)),
        Message::Cancel(message) => {
            let mut operations = OperationServiceClient::new(channel);
            operations.cancel_operation(message).await.map(|_| Answer::Done)
        }
        Message::Cordon(message) => {
            let mut hosts = HostServiceClient::new(channel);
            hosts.cordon_host(message).await.map(|_| Answer::Done)
        }
        Message::Uncordon(message) => {
            let mut hosts = HostServiceClient::new(channel);
            hosts.uncordon_host(message).await.map(|_| Answer::Done)
        }
        Message::RelabelHost(message) => {
            let mut hosts = HostServiceClient::new(channel);
            hosts.update_host(*message).await.map(|_| Answer::Done)
        }
        Message::ForgetHost(message) => {
            let mut hosts = HostServiceClient::new(channel);
            hosts.delete_host(message).await.map(|_| Answer::Done)
        }
        Message::Thing(_) => Err(Status::unimplemented(
            "operators of the stack ask for VMs and hosts",
        )),
    }
}

/// Watches all events, from the first on, and goes on behind the last one that came whenever the stream ends.
async fn watch(site: Arc<Site>, channel: Channel) {
    let mut last = 0;
    loop {
        let ended = follow(&site, channel.clone(), &mut last).await;
        site.say(format_args!("the watch ends at {last}: {}", ended.message()));
        sleep(Duration::from_millis(200)).await;
    }
}

async fn follow(site: &Site, channel: Channel, last: &mut u64) -> Status {
    let request = v1::WatchEventsRequest {
        after_resource_version: *last,
        ..Default::default()
    };
    let mut client = EventServiceClient::new(channel);
    let late = || Status::deadline_exceeded("nothing came");
    let mut events = match timeout(PATIENCE, client.watch_events(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return status,
        Err(_) => return late(),
    };
    if *last > 0 {
        site.resumed.fetch_add(1, Ordering::Relaxed);
    }
    loop {
        match timeout(SILENCE, events.message()).await {
            Ok(Ok(Some(event))) => {
                site.checker().watched(event.resource_version);
                *last = event.resource_version;
            }
            Ok(Ok(None)) => return Status::unavailable("the end"),
            Ok(Err(status)) => return status,
            Err(_) => return late(),
        }
    }
}
