//! Volumes in a pool that all hosts see, those that no host could have, and those that move to another pool.

use dalgu_controller::store::memory::Crash;
use dalgu_proto::v1::{self, VolumeState};
use futures::{StreamExt as _, stream};

use super::{
    site::{Clients, Site, create, delete, eventually, migrate, reason, request_id},
    storage::{FAST, SHARED, SHARED_MIB},
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
    assert!(refused.message().contains("fast, local, san"), "{refused}");
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

async fn pool(clients: &Clients) -> String {
    let request = v1::GetVolumeRequest {
        name: "ledger".into(),
    };
    let volume = clients.volumes.clone().get_volume(request).await;
    volume.map_or_else(|_| String::new(), |volume| volume.into_inner().pool)
}

/// The VM with its volume in that pool, or without it.
fn update(to: Option<&str>, request_id: &str) -> v1::UpdateVmRequest {
    let mut vm = with_volume("web", "").vm.unwrap();
    let disks = &mut vm.spec.as_mut().unwrap().disks;
    match to {
        Some(pool) => disks[1].pool = pool.into(),
        None => drop(disks.pop()),
    }
    v1::UpdateVmRequest {
        vm: Some(vm),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["spec.disks".into()],
        }),
        ignore_protection: false,
        request_id: request_id.into(),
    }
}

/// What is promised of a pool of h1; of all pools nothing where no controller answers.
async fn promised(clients: &Clients, pool: &str) -> u64 {
    let request = v1::GetHostRequest { name: "h1".into() };
    let host = clients.hosts.clone().get_host(request).await;
    let pools = host.map_or_else(|_| Vec::new(), |host| host.into_inner().allocation.unwrap().pools);
    pools
        .into_iter()
        .find(|known| known.name == pool)
        .map_or(0, |known| known.promised_mib)
}

/// A site of one host, and web on it with the volume in the pool "local".
async fn with_ledger() -> (Site, Clients) {
    let mut site = Site::new(1).await;
    site.share_storage();
    let mut clients = site.start().await;
    clients
        .volumes
        .create_volume(volume("ledger", "local", 50))
        .await
        .unwrap();
    let made = clients.vms.create_vm(with_volume("web", "h1")).await.unwrap();
    clients.succeeded(made.into_inner()).await;
    (site, clients)
}

fn copies_stay(site: &Site, stay: bool) {
    site.fabric
        .lock()
        .hosts
        .get_mut("h1")
        .unwrap()
        .storage
        .copies_stay = stay;
}

async fn until_pool(clients: &Clients, wanted: &str) {
    eventually(wanted, || async { pool(clients).await == wanted }).await;
}

#[tokio::test]
async fn a_volume_that_moves_is_in_its_old_pool_until_its_host_says_that_it_has_come() {
    let (mut site, mut clients) = with_ledger().await;
    copies_stay(&site, true);
    clients
        .vms
        .update_vm(update(Some(FAST), &request_id()))
        .await
        .unwrap();
    eventually("it is copied", || async {
        let vm = clients.clone().vm("web").await;
        !vm.status.unwrap().pending_changes.is_empty()
    })
    .await;
    // Whoever dies meanwhile, it is where it was, and has room in both.
    for _ in 0..2 {
        assert_eq!(pool(&clients).await, "local");
        assert_eq!(
            (promised(&clients, "local").await, promised(&clients, FAST).await),
            (150, 50)
        );
        site.kill();
        clients = site.start().await;
    }
    let refused = [
        reason(clients.vms.update_vm(update(None, &request_id())).await),
        reason(clients.vms.delete_vm(delete("web")).await),
        reason(clients.vms.migrate_vm(migrate("web")).await),
    ];
    assert_eq!(refused, ["CHANGE_IN_PROGRESS"; 3]);
    let gone = v1::DeleteVolumeRequest {
        name: "ledger".into(),
        ..Default::default()
    };
    assert_eq!(reason(clients.volumes.delete_volume(gone).await), "VOLUME_IN_USE");

    // Called back, and sent again.
    clients
        .vms
        .update_vm(update(Some("local"), &request_id()))
        .await
        .unwrap();
    eventually("its room there is given back", || async {
        promised(&clients, FAST).await == 0
    })
    .await;
    assert_eq!(pool(&clients).await, "local");
    clients
        .vms
        .update_vm(update(Some(FAST), &request_id()))
        .await
        .unwrap();
    copies_stay(&site, false);
    until_pool(&clients, FAST).await;
    assert_eq!(
        (promised(&clients, "local").await, promised(&clients, FAST).await),
        (100, 50)
    );

    // It stays there without a VM, and the next one finds it there.
    let gone = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(gone).await;
    until(&clients, VolumeState::Available).await;
    assert_eq!(
        (pool(&clients).await.as_str(), promised(&clients, FAST).await),
        (FAST, 50)
    );
    let made = clients.vms.create_vm(with_volume("shop", "")).await.unwrap();
    clients.succeeded(made.into_inner()).await;
    assert_eq!(clients.vm("shop").await.spec.unwrap().disks[1].pool, FAST);
}

/// The volume moves, and the controller dies at one of its writes. Whether that happened.
async fn moves(crash: Crash) -> bool {
    let (mut site, mut clients) = with_ledger().await;
    let base = site.disk.commits();
    let (at, number) = match crash {
        Crash::Before(number) => (Crash::Before(base + number), number),
        Crash::After(number) => (Crash::After(base + number), number),
    };
    site.disk.crash_at(Some(at));
    let id = request_id();
    let mut crashed = false;
    loop {
        let rung = site.crashed.clone();
        let attempt = async {
            // After a crash it may be there already: the same call brings it back to nothing else.
            let asked = clients.clone().vms.update_vm(update(Some(FAST), &id)).await;
            if asked.is_ok() {
                until_pool(&clients, FAST).await;
                let counted = || async {
                    promised(&clients, "local").await == 100 && promised(&clients, FAST).await == 50
                };
                eventually("its room is counted there alone", counted).await;
            }
            asked
        };
        let asked = tokio::select! {
            asked = attempt => Some(asked),
            () = rung.cancelled() => None,
        };
        match asked {
            Some(Ok(_)) => break,
            Some(Err(status)) if !rung.is_cancelled() => {
                // Its host has not reported to the new controller yet.
                assert_eq!(reason::<()>(Err(status)), "CHANGE_IN_PROGRESS", "{crash:?}");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Some(Err(_)) | None => {
                crashed = true;
                site.kill();
                site.disk.crash_at(None);
                clients = site.start().await;
            }
        }
    }
    let host = site.fabric.lock().hosts["h1"].clone();
    let web = host.vms.values().next().unwrap();
    assert_eq!(web.places["data"], FAST, "{crash:?}");
    crashed || site.disk.commits() > base + number
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_write_of_a_move_changes_nothing_about_where_the_volume_is_at_the_end() {
    let crashes = (0..8).flat_map(|number| [Crash::Before(number), Crash::After(number)]);
    let outcomes: Vec<_> = stream::iter(crashes)
        .map(|crash| tokio::spawn(moves(crash)))
        .buffer_unordered(8)
        .collect()
        .await;
    let happened = outcomes.into_iter().filter(|outcome| *outcome.as_ref().unwrap());
    assert!(happened.count() >= 4, "a move has two writes at least");
}
