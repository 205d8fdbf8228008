//! Backups of the controller's store, and the operator who restores one: as `dalgu-controller restore` does it, and then by
//! `dalgu site show`, `waive`, `resume` and `dalgu vm delete`, while everything else goes on.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use dalgu_controller::{
    api::Services,
    incarnation::{self, Past},
    model::OperationKind,
    state,
    store::{Image, Store, memory::Disk},
};
use dalgu_proto::{
    ids::VmId,
    v1::{self, site_service_server::SiteService, vm_service_server::VmService},
};
use futures::future::BoxFuture;
use tokio::time::Instant;
use tonic::{Response, Status};

use super::{
    clients::{PATIENCE, with_peer},
    life::Life,
    plan::Node,
    site::Site,
};

/// The controller of the site.
const CONTROLLER: Node = Node::Controller(0);
/// The operator looks again after this time.
const AGAIN: Duration = Duration::from_secs(2);

impl Site {
    /// What the controller's store holds.
    pub fn image(&self) -> Image {
        self.image_of(0)
    }

    /// What a controller's store holds.
    pub fn image_of(&self, controller: usize) -> Image {
        let mut store = self.disk(controller).open();
        store.load().expect("memory can be read")
    }

    /// A backup is taken, at this moment and while the controller runs.
    pub fn back_up(&self) {
        self.trace().say(format_args!("a backup is taken"));
        self.keep_backup(self.image());
    }

    /// The controller is stopped, restored from the last backup, and started again.
    pub fn restore(&self, time: Duration, patience: Duration, lost: bool) {
        let Some(backup) = self.backup() else { return };
        // Whoever restores waits until what was starting has started, or has been stopped.
        if self.life(CONTROLLER).is_none() {
            return;
        }
        let present = self.image();
        let past = incarnation::past(&present).expect("it has started once");
        let before = Past {
            // Said with --incarnation, where the store is lost.
            incarnation: past.incarnation,
            term: if lost { 0 } else { past.term.0 },
            revision: if lost { 0 } else { past.revision },
        };
        let Ok((restored, _)) = incarnation::renew(backup, before, self.clock(CONTROLLER).now()) else {
            // Of a store that had never been started.
            return;
        };
        let read = |image| {
            state::from_image(image, self.cluster()).expect("a store that was written by the controller")
        };
        let (old, new) = (read(&present), read(&restored));
        self.look(&old);
        let there: BTreeSet<VmId> = self.domains().into_iter().flatten().map(|(id, ..)| id).collect();
        self.checker().restored(&new, &there);
        self.fates().count("controller restored from a backup");
        self.trace().say(format_args!(
            "the controller is restored: revision {} of a backup, it had come to {}",
            new.meta.revision, old.meta.revision
        ));
        self.rename(&old, &new);
        self.put_disk(0, Disk::of(restored));
        self.kill_for(CONTROLLER, time);
        tokio::spawn(operate(self.me(), self.restores(), patience));
    }
}

/// What the operator does after restore number `number`.
async fn operate(site: Arc<Site>, number: u64, patience: Duration) {
    let begun = Instant::now();
    while site.restores() == number {
        tokio::time::sleep(AGAIN).await;
        let get = |services: Services| -> Call<v1::Site> {
            Box::pin(async move { services.get_site(with_peer(v1::GetSiteRequest {})).await })
        };
        let Some(seen) = ask(&site, "GetSite", get).await else {
            continue;
        };
        if !seen.observing && site.is_confirmed() {
            return;
        }
        if seen.observing && !seen.waiting_hosts.is_empty() {
            if begun.elapsed() > patience {
                for host in seen.waiting_hosts {
                    waive(&site, host).await;
                }
            }
            continue;
        }
        resume(&site, seen.etag.clone()).await;
        for difference in seen.differences {
            let missing = difference.kind() == v1::SiteDifferenceKind::MissingVm;
            // Known to be gone: the operator has looked on every host.
            if missing && !seen.observing && site.is_nowhere(&difference.vm_uid) {
                delete(&site, difference.vm).await;
            }
        }
    }
}

type Call<T> = BoxFuture<'static, Result<Response<T>, Status>>;

/// Asks the controller as an operator; nothing where no answer or a refusal comes.
async fn ask<T: Send + 'static>(
    site: &Arc<Site>,
    name: &'static str,
    call: impl Fn(Services) -> Call<T> + Send + Sync + 'static,
) -> Option<T> {
    let (life, here) = (Life::default(), site.clone());
    let carry = move || -> BoxFuture<'static, Result<Response<T>, Status>> {
        let Some((there, services)) = here.services() else {
            return Box::pin(async { Err(Status::unavailable("connection refused")) });
        };
        let work = call(services);
        Box::pin(async move {
            there.pass().await;
            work.await
        })
    };
    let sent = site.message(&life, Node::Client, CONTROLLER, name, carry);
    let answer = tokio::time::timeout(PATIENCE, sent).await.ok()??;
    answer.ok().map(Response::into_inner)
}

async fn waive(site: &Arc<Site>, host: String) {
    let request_id = site.ids().next().to_string();
    let call = move |services: Services| -> Call<v1::Site> {
        let (host, request_id) = (host.clone(), request_id.clone());
        let message = v1::WaiveHostRequest { host, request_id };
        Box::pin(async move { services.waive_host(with_peer(message)).await })
    };
    ask(site, "WaiveHost", call).await;
}

async fn resume(site: &Arc<Site>, etag: String) {
    let request_id = site.ids().next().to_string();
    let call = move |services: Services| -> Call<v1::Site> {
        let message = v1::ResumeSiteRequest {
            accept_differences: true,
            etag: etag.clone(),
            request_id: request_id.clone(),
        };
        Box::pin(async move { services.resume_site(with_peer(message)).await })
    };
    ask(site, "ResumeSite", call).await;
}

async fn delete(site: &Arc<Site>, name: String) {
    let request_id = site.ids().next().to_string();
    site.checker().send(&request_id, OperationKind::Delete);
    let call = move |services: Services| -> Call<v1::Operation> {
        let message = v1::DeleteVmRequest {
            name: name.clone(),
            request_id: request_id.clone(),
            force: true,
            ..Default::default()
        };
        Box::pin(async move { services.delete_vm(with_peer(message)).await })
    };
    ask(site, "DeleteVm", call).await;
}
