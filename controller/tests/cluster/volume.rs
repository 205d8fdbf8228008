//! Volumes in a pool that all hosts see, and those that no host could have.

use dalgu_proto::v1::{self, VolumeState};

use super::{
    site::{Clients, Site, create, delete, eventually, reason},
    storage::{SHARED, SHARED_MIB},
};

fn volume(name: &str, pool: &str, size_mib: u64) -> v1::CreateVolumeRequest {
    let volume = v1::Volume {
        name: name.into(),
        pool: pool.into(),
        size_mib,
        ..Default::default()
    };
    v1::CreateVolumeRequest {
        volume: Some(volume),
        ..Default::default()
    }
}

/// A VM that has the volume, on that host or any.
fn with_volume(vm: &str, host: &str) -> v1::CreateVmRequest {
    let mut request = create(vm);
    request.host = host.into();
    let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.disks.push(v1::Disk {
        name: "data".into(),
        volume: "ledger".into(),
        ..Default::default()
    });
    request
}

async fn state(clients: &Clients) -> VolumeState {
    let request = v1::GetVolumeRequest {
        name: "ledger".into(),
    };
    let volume = clients.volumes.clone().get_volume(request).await.unwrap();
    volume.into_inner().status.unwrap().state()
}

async fn until(clients: &Clients, wanted: VolumeState) {
    let there = || async { state(clients).await == wanted };
    eventually(wanted.as_str_name(), there).await;
}

/// Gives the volume to a VM there for a while.
async fn use_it(clients: &mut Clients, vm: &str, host: &str) -> String {
    let made = clients.vms.create_vm(with_volume(vm, host)).await.unwrap();
    clients.succeeded(made.into_inner()).await;
    let used = clients.vm(vm).await.status.unwrap().host;
    let gone = clients.vms.delete_vm(delete(vm)).await.unwrap().into_inner();
    clients.succeeded(gone).await;
    until(clients, VolumeState::Available).await;
    used
}

fn forget(host: &str) -> v1::DeleteHostRequest {
    v1::DeleteHostRequest {
        name: host.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_volume_in_a_shared_pool_outlives_the_host_that_it_was_used_on_last() {
    let mut site = Site::new(2).await;
    site.share_storage();
    let mut clients = site.start().await;
    clients
        .volumes
        .create_volume(volume("ledger", SHARED, 100))
        .await
        .unwrap();
    assert_eq!(use_it(&mut clients, "web", "h1").await, "h1");

    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    clients.hosts.delete_host(forget("h1")).await.unwrap();
    assert_eq!(state(&clients).await, VolumeState::Available);
    assert_eq!(use_it(&mut clients, "shop", "").await, "h2");

    // Nobody would see it any more.
    site.fabric.lock().hosts.get_mut("h2").unwrap().cut_off = true;
    let refused = clients.hosts.delete_host(forget("h2")).await.unwrap_err();
    assert!(
        refused.message().contains("ledger") && refused.message().contains(SHARED),
        "{refused}"
    );
    assert_eq!(reason::<()>(Err(refused)), "LAST_HOST_OF_POOL");
    let gone = v1::DeleteVolumeRequest {
        name: "ledger".into(),
        ..Default::default()
    };
    clients.volumes.delete_volume(gone).await.unwrap();
    clients.hosts.delete_host(forget("h2")).await.unwrap();
}

#[tokio::test]
async fn a_volume_or_a_schedule_that_no_host_could_have_is_refused() {
    let mut site = Site::new(1).await;
    site.share_storage();
    let mut clients = site.start().await;
    let refused = clients.volumes.create_volume(volume("ledger", "nvme", 100)).await;
    let refused = refused.unwrap_err();
    assert!(refused.message().contains("local, san"), "{refused}");
    assert_eq!(reason::<()>(Err(refused)), "POOL_NOT_FOUND");
    let large = volume("ledger", SHARED, SHARED_MIB + 1);
    assert_eq!(
        reason(clients.volumes.create_volume(large).await),
        "POOL_TOO_SMALL"
    );
    let request = v1::CreateVolumeRequest {
        request_id: super::site::request_id(),
        ..volume("ledger", SHARED, SHARED_MIB)
    };
    let made = clients.volumes.create_volume(request.clone()).await.unwrap();
    let again = clients.volumes.create_volume(request).await.unwrap();
    assert_eq!(made.into_inner().uid, again.into_inner().uid);
    let grown = v1::UpdateVolumeRequest {
        volume: Some(v1::Volume {
            name: "ledger".into(),
            size_mib: SHARED_MIB + 1,
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["size_mib".into()],
        }),
        ..Default::default()
    };
    assert_eq!(
        reason(clients.volumes.update_volume(grown).await),
        "POOL_TOO_SMALL"
    );

    let schedule = super::backup::schedule("nvme");
    assert_eq!(
        reason(clients.backups.create_backup_schedule(schedule).await),
        "POOL_NOT_FOUND"
    );
}
