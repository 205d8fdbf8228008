//! Volumes of the site that VMs have: made only where the controller says that they are new, never deleted with a VM, and moved
//! with it.

use std::collections::BTreeSet;

use dalgu_proto::{
    ids::{SnapshotId, VolumeId},
    snapshot::{Layer, Set},
    vm::{Disk, VolumeRef},
};

use super::*;

const VOLUME: VolumeId = VolumeId::from_uuid(uuid::Uuid::from_u128(99));

/// The volume as a disk of that size.
fn ledger(size_mib: u64) -> Disk {
    Disk {
        name: "data".into(),
        size_mib,
        volume: Some(VolumeRef {
            name: "ledger".parse().unwrap(),
            id: Some(VOLUME),
            format: None,
        }),
        ..intent(1, PowerState::Running).spec.disks[0].clone()
    }
}

/// A VM with the volume from its creation on.
fn with_ledger(generation: u64, size_mib: u64) -> Intent {
    let mut with = intent(generation, PowerState::Running);
    with.spec.disks.push(ledger(size_mib));
    with
}

async fn tell(host: &Host, id: VmId, intent: Intent, new: bool) {
    let new_disks = if new { vec!["data".to_owned()] } else { Vec::new() };
    let told = Told {
        new_disks: BTreeSet::from_iter(new_disks),
        ..told(id, intent)
    };
    host.vms.get_or_start(id).ensure(told).await.unwrap();
}

async fn gone(host: &Host, id: VmId, generation: u64) {
    let handle = host.vms.get(id).unwrap();
    handle.delete(Generation(generation), Epoch(1)).await.unwrap();
    host.until(id, "gone", |status| status.phase == Phase::Gone).await;
}

#[tokio::test(start_paused = true)]
async fn a_volume_is_made_once_outlives_its_vm_and_grows_with_the_next_one() {
    let host = one_host().await;
    tell(&host, vm(1), with_ledger(1, 8), true).await;
    host.until_settled(vm(1), 1).await;
    assert_eq!(host.sim.local_volumes(), 2);
    gone(&host, vm(1), 2).await;
    assert_eq!(host.sim.local_volumes(), 1, "the volume stays");
    tell(&host, vm(2), with_ledger(1, 16), false).await;
    host.until_settled(vm(2), 1).await;
    host.until(vm(2), "its size", |status| status.pending.is_empty())
        .await;
    let has = host.sim.hardware(vm(2)).await.unwrap().unwrap();
    assert_eq!((has.disks["data"].size_mib, host.sim.local_volumes()), (16, 2));
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_not_new_and_not_there_is_lost_and_never_made() {
    let host = one_host().await;
    tell(&host, vm(1), with_ledger(1, 8), false).await;
    host.until(vm(1), "that it is missing", |status| {
        status
            .failure
            .as_ref()
            .is_some_and(|failure| failure.reason == "FILE_NOT_FOUND")
    })
    .await;
    assert_eq!(host.sim.local_volumes(), 1, "its own disk alone");
}

#[tokio::test(start_paused = true)]
async fn a_volume_is_attached_and_detached_while_the_vm_runs_and_its_file_stays() {
    let host = one_host().await;
    tell(&host, vm(1), intent(1, PowerState::Running), false).await;
    host.until_settled(vm(1), 1).await;
    let with = Intent {
        power_sequence: 1,
        ..with_ledger(2, 8)
    };
    tell(&host, vm(1), with.clone(), true).await;
    host.until_settled(vm(1), 2).await;
    assert_eq!((host.sim.local_volumes(), host.sim.run(vm(1))), (2, Some(1)));
    let mut without = with;
    without.generation = Generation(3);
    without.spec.disks.truncate(1);
    tell(&host, vm(1), without, false).await;
    host.until_settled(vm(1), 3).await;
    let has = host.sim.hardware(vm(1)).await.unwrap().unwrap();
    assert!(!has.disks.contains_key("data"));
    assert_eq!(host.sim.local_volumes(), 2, "it is the site's");
}

#[tokio::test]
async fn a_volume_moves_with_its_vm_and_the_source_keeps_no_copy() {
    let pair = Pair::new().await;
    let with = Intent {
        power_sequence: 1,
        ..with_ledger(2, 8)
    };
    tell(&pair.source, vm(1), with.clone(), true).await;
    pair.source.until_settled(vm(1), 2).await;
    let prepare = Prepare {
        migration: pair.migration,
        name: name(vm(1)),
        intent: Intent {
            epoch: pair.epoch.next(),
            ..with
        },
        source: pair.source.name.parse().unwrap(),
        images: Vec::new(),
    };
    pair.destination
        .vms
        .get_or_start(vm(1))
        .prepare(prepare)
        .await
        .unwrap();
    assert_eq!(pair.destination.sim.local_volumes(), 2);
    pair.send().await.unwrap();
    pair.transfer_over().await;
    pair.settle().await;
    pair.finish(true, 2).await;
    let left = (
        pair.source.sim.local_volumes(),
        pair.destination.sim.local_volumes(),
    );
    assert_eq!(left, (0, 2));
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_comes_while_the_first_disks_are_made_is_made_too() {
    // The disks are made, and the look after that is still under way.
    let host = Host::with_looks(&Authority::new(), "h1", Duration::from_secs(1)).await;
    tell(&host, vm(1), intent(1, PowerState::Running), false).await;
    while host.sim.local_volumes() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let with = Intent {
        power_sequence: 1,
        ..with_ledger(2, 8)
    };
    tell(&host, vm(1), with, true).await;
    host.until_settled(vm(1), 2).await;
    assert_eq!(host.sim.local_volumes(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_definition_made_for_an_older_intent_does_not_bring_back_a_volume_at_the_next_start() {
    // The domain is defined with the volume, and the look after that is still under way.
    let host = Host::with_looks(&Authority::new(), "h1", Duration::from_secs(1)).await;
    tell(&host, vm(1), intent(1, PowerState::Running), false).await;
    host.until_settled(vm(1), 1).await;
    let mut latest = Intent {
        power_sequence: 1,
        ..with_ledger(2, 8)
    };
    tell(&host, vm(1), latest.clone(), true).await;
    let disks = || host.sim.definition(vm(1)).unwrap().spec.disks.len();
    while disks() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    latest.generation = Generation(3);
    latest.spec.disks.truncate(1);
    tell(&host, vm(1), latest, false).await;
    host.until_settled(vm(1), 3).await;
    assert_eq!(disks(), 1, "another VM may have it by now");
    host.sim.crash_guest(vm(1));
    host.until(vm(1), "its restart", |_| host.sim.run(vm(1)) == Some(2))
        .await;
    let has = host.sim.hardware(vm(1)).await.unwrap().unwrap();
    assert!(!has.disks.contains_key("data"), "{has:?}");
}

/// The pools that the volume's file is in.
fn pools(host: &Host) -> Vec<String> {
    let files = host.sim.site_volumes().into_iter();
    files
        .map(|(id, pool)| if id == VOLUME { pool } else { id.to_string() })
        .collect()
}

async fn until_pools(host: &Host, wanted: &[&str]) {
    let there = async {
        while pools(host) != wanted {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), there).await;
    assert!(waited.is_ok(), "{:?}, not {wanted:?}", pools(host));
}

/// The VM with its volume in that pool.
fn ledger_in(generation: u64, pool: &str) -> Intent {
    let mut with = with_ledger(generation, 8);
    with.spec.disks[1].pool = pool.to_owned();
    with
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_moves_leaves_no_file_behind_and_says_so_until_it_has_gone() {
    let mut host = one_host().await;
    tell(&host, vm(1), ledger_in(1, "local"), true).await;
    host.until_settled(vm(1), 1).await;
    let content = host.sim.write_disk(vm(1), "data");
    // The old file cannot be deleted at first: the move is not over, and whoever wants the volume waits.
    let away = HypervisorError::Storage {
        pool: "local".into(),
        detail: "nothing is mounted".into(),
    };
    host.sim.fail_next(Call::DeleteVolume, Fault::Error(away));
    tell(&host, vm(1), ledger_in(2, "fast"), false).await;
    let both = host.until(vm(1), "its old file stays", |status| {
        let told = status.pending.first();
        told.is_some_and(|told| {
            told.field == "disks[data].pool" && told.message.contains("old pool is about")
        })
    });
    both.await;
    assert_eq!(pools(&host), ["fast", "local"]);
    host.restart_agent("boot-1").await;
    host.until(vm(1), "moved", |status| {
        status.pending.is_empty() && status.phase == Phase::Settled
    })
    .await;
    assert_eq!(pools(&host), ["fast"]);
    assert_eq!(host.sim.disk_content(vm(1), "data"), content);
    assert_eq!(host.sim.run(vm(1)), Some(1));
    // Taken away, its file stays where it is.
    tell(&host, vm(1), intent(3, PowerState::Running), false).await;
    host.until(vm(1), "detached", |status| {
        status.pending.is_empty() && status.phase == Phase::Settled
    })
    .await;
    assert_eq!(pools(&host), ["fast"]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_called_back_or_sent_on_is_one_file_at_the_end() {
    let host = one_host().await;
    tell(&host, vm(1), ledger_in(1, "local"), true).await;
    host.until_settled(vm(1), 1).await;
    for (generation, pool) in [(2, "fast"), (3, "local"), (4, "fast"), (5, "slow")] {
        tell(&host, vm(1), ledger_in(generation, pool), false).await;
        host.until_settled(vm(1), generation).await;
    }
    until_pools(&host, &["slow"]).await;
    let mut off = ledger_in(6, "local");
    (off.power, off.power_sequence) = (PowerState::Stopped, 2);
    tell(&host, vm(1), off, false).await;
    until_pools(&host, &["local"]).await;
    gone(&host, vm(1), 7).await;
    assert_eq!(pools(&host), ["local"], "the volume stays");
}

/// A host on which the VM runs with its volume.
async fn running_with_ledger() -> Host {
    let host = one_host().await;
    let with = Intent {
        power_sequence: 1,
        ..with_ledger(1, 8)
    };
    tell(&host, vm(1), with, true).await;
    host.until_settled(vm(1), 1).await;
    host
}

/// The VM with its volume, and one snapshot.
fn with_snapshot(generation: u64) -> Intent {
    let layer = Layer {
        number: 1,
        id: SnapshotId::from_uuid(uuid::Uuid::from_u128(1)),
        name: "one".parse().unwrap(),
    };
    Intent {
        power_sequence: 1,
        snapshots: Some(Set {
            layers: vec![layer],
            last: 1,
            revert: None,
        }),
        ..with_ledger(generation, 8)
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_deleted_with_a_snapshot_leaves_its_volume_as_it_was_written_last() {
    let host = running_with_ledger().await;
    host.sim.write_disk(vm(1), "data");
    tell(&host, vm(1), with_snapshot(2), false).await;
    host.until_settled(vm(1), 2).await;
    let last = host.sim.write_disk(vm(1), "data");
    host.vms
        .get_or_start(vm(1))
        .delete(Generation(3), Epoch(1))
        .await
        .unwrap();
    host.until(vm(1), "that it is gone", |status| status.phase == Phase::Gone)
        .await;
    tell(&host, vm(2), with_ledger(1, 8), false).await;
    host.until_settled(vm(2), 1).await;
    assert_eq!(host.sim.disk_content(vm(2), "data"), last);
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_cannot_be_seen_holds_up_no_power_off() {
    let host = running_with_ledger().await;
    let lost = HypervisorError::Storage {
        pool: "local".into(),
        detail: "no layer".into(),
    };
    for _ in 0..100 {
        host.sim.fail_next(Call::Layers, Fault::Error(lost.clone()));
    }
    tell(&host, vm(1), with_snapshot(2), false).await;
    host.until(vm(1), "why it waits", |status| {
        let failure = status.failure.as_ref();
        failure.is_some_and(|failure| failure.message.contains("no layer"))
    })
    .await;
    let mut stop = with_snapshot(3);
    (stop.power, stop.power_sequence) = (PowerState::Stopped, 2);
    tell(&host, vm(1), stop, false).await;
    host.until(vm(1), "that it is off", |status| {
        status.power == Some(PowerState::Stopped)
    })
    .await;
}
