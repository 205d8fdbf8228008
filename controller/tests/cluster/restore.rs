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
    site::{Site, eventually, request_id},
};

/// A host is ready for a VM that it is never sent.
fn make_ready(site: &Site, host: &str) -> (String, String) {
    let (id, vm) = (request_id(), request_id());
    let incoming = agent::VmIntent {
        uid: vm.clone(),
        name: "gone".into(),
        epoch: 3,
        generation: 1,
        ..Default::default()
    };
    let transfer = Transfer {
        vm: vm.clone(),
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
    (id, vm)
}

fn told(site: &Site, host: &str, command: &str) -> u32 {
    let world = site.fabric.lock();
    world.hosts[host].commands.get(command).copied().unwrap_or(0)
}

#[tokio::test]
async fn a_host_that_was_made_ready_for_a_vm_which_the_restored_store_does_not_know_lets_go_of_it() {
    let mut site = Site::new(2).await;
    site.start().await;
    site.kill();
    let (id, vm) = make_ready(&site, "h2");
    let backup = site.disk.open().load().unwrap();
    let (restored, _) = incarnation::renew(backup, Past::default(), Timestamp::UNIX_EPOCH).unwrap();
    site.disk = Disk::of(restored);
    site.start().await;

    let channel = site.channel(&site.endpoint(), "admin").await.unwrap();
    let operator = SiteServiceClient::new(channel);
    let get = || async {
        let mut operator = operator.clone();
        operator.get_site(v1::GetSiteRequest::default()).await
    };
    eventually("both hosts are heard, and the difference shows", || async {
        let seen = get().await.unwrap().into_inner();
        seen.waiting_hosts.is_empty() && seen.differences.len() == 1
    })
    .await;
    assert_eq!(told(&site, "h2", "SettleMigration"), 0, "it observes");

    let etag = get().await.unwrap().into_inner().etag;
    let resume = v1::ResumeSiteRequest {
        accept_differences: true,
        etag,
        request_id: request_id(),
    };
    operator.clone().resume_site(resume).await.unwrap();
    eventually("h2 has let go", || async {
        let world = site.fabric.lock();
        let host = &world.hosts["h2"];
        host.refused.contains_key(&vm) && !host.transfers.contains_key(&id)
    })
    .await;
    assert_eq!(told(&site, "h1", "FinishMigration"), 0, "only its host is told");
}
