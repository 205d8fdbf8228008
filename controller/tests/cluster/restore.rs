//! A controller whose store was restored from a backup.

use dalgu_controller::{
    incarnation::{self, Past},
    store::{Store as _, memory::Disk},
};
use dalgu_proto::{
    agent::v1::{self as agent, TransferState},
    v1::{self, site_service_client::SiteServiceClient},
};
use jiff::Timestamp;

use super::{
    fabric::Transfer,
    site::{Clients, Site, create, delete, eventually, request_id},
};

/// A host is ready for a VM that it is never sent.
fn make_ready(site: &Site, host: &str, vm: &str) -> String {
    let id = request_id();
    let incoming = agent::VmIntent {
        uid: vm.to_owned(),
        name: "gone".into(),
        epoch: 3,
        generation: 1,
        ..Default::default()
    };
    let transfer = Transfer {
        vm: vm.to_owned(),
        source: false,
        peer: "h1".into(),
        state: TransferState::Ready,
        settled: false,
        steps: 0,
        incoming: Some(incoming),
    };
    let mut world = site.fabric.lock();
    let transfers = &mut world.hosts.get_mut(host).unwrap().transfers;
    transfers.insert(id.clone(), transfer);
    id
}

fn told(site: &Site, host: &str, command: &str) -> u32 {
    let world = site.fabric.lock();
    world.hosts[host].commands.get(command).copied().unwrap_or(0)
}

/// The store becomes a backup of itself that was restored, and its controller is started.
async fn restored(site: &mut Site) -> Clients {
    let backup = site.disk.open().load().unwrap();
    let (restored, _) = incarnation::renew(backup, Past::default(), Timestamp::UNIX_EPOCH).unwrap();
    site.disk = Disk::of(restored);
    site.start().await
}

/// All hosts are heard, and their one difference from the store is accepted.
async fn resumed(site: &Site) {
    let channel = site.channel(&site.endpoint(), "admin").await.unwrap();
    let operator = SiteServiceClient::new(channel);
    let get = || async {
        let mut operator = operator.clone();
        operator.get_site(v1::GetSiteRequest::default()).await
    };
    eventually("all hosts are heard, and the difference shows", || async {
        let seen = get().await.unwrap().into_inner();
        seen.waiting_hosts.is_empty() && seen.differences.len() == 1
    })
    .await;
    assert_eq!(told(site, "h2", "SettleMigration"), 0, "it observes");
    let etag = get().await.unwrap().into_inner().etag;
    let resume = v1::ResumeSiteRequest {
        accept_differences: true,
        etag,
        request_id: request_id(),
    };
    operator.clone().resume_site(resume).await.unwrap();
}

#[tokio::test]
async fn a_host_that_was_made_ready_for_a_vm_which_the_restored_store_does_not_know_lets_go_of_it() {
    let mut site = Site::new(2).await;
    site.start().await;
    site.kill();
    let vm = request_id();
    let id = make_ready(&site, "h2", &vm);
    restored(&mut site).await;
    resumed(&site).await;
    eventually("h2 has let go", || async {
        let world = site.fabric.lock();
        let host = &world.hosts["h2"];
        host.refused.contains_key(&vm) && !host.transfers.contains_key(&id)
    })
    .await;
    assert_eq!(told(&site, "h1", "FinishMigration"), 0, "only its host is told");
}

#[tokio::test]
async fn a_vm_of_which_its_owner_has_only_what_a_migration_left_can_be_deleted_after_a_restore() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let vm = clients.vm("web").await;
    site.kill();
    let owner = vm.status.unwrap().host;
    site.fabric.lock().hosts.get_mut(&owner).unwrap().vms.clear();
    let id = make_ready(&site, &owner, &vm.uid);
    let mut clients = restored(&mut site).await;
    resumed(&site).await;
    let operation = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    assert!(!site.fabric.lock().hosts[&owner].transfers.contains_key(&id));
}

#[tokio::test]
async fn documents_in_a_restored_backup_are_forgotten_when_the_host_shows_what_was_made_of_them() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let mut request = create("web");
    let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.first_boot = Some(v1::FirstBoot {
        user_data: "#!marker".into(),
        ..Default::default()
    });
    let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
    let backup = site.disk.open().load().unwrap();
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    clients.succeeded(operation).await;
    site.kill();

    let (restored, _) = incarnation::renew(backup, Past::default(), Timestamp::UNIX_EPOCH).unwrap();
    site.disk = Disk::of(restored);
    site.start().await;
    let stored = || format!("{:?}", site.disk.open().load().unwrap()).contains("marker");
    assert!(stored(), "the backup has them");
    let channel = site.channel(&site.endpoint(), "admin").await.unwrap();
    let mut operator = SiteServiceClient::new(channel);
    eventually("the host is heard", || async {
        let mut operator = operator.clone();
        let seen = operator.get_site(v1::GetSiteRequest::default()).await;
        seen.unwrap().into_inner().waiting_hosts.is_empty()
    })
    .await;
    let seen = operator.get_site(v1::GetSiteRequest::default()).await;
    let resume = v1::ResumeSiteRequest {
        accept_differences: true,
        etag: seen.unwrap().into_inner().etag,
        request_id: request_id(),
    };
    operator.resume_site(resume).await.unwrap();
    eventually("they are forgotten", || async { !stored() }).await;
}
