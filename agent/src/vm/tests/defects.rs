//! What must not be lost when the agent itself, its disk or a message fails.

use dalgu_proto::vm::{Nic, Plug};

use super::*;
use crate::{
    network::compile::tests::{plugged as ports_of, told as told_of_networks},
    vm::tend::BEGIN_ANEW,
};

#[tokio::test(start_paused = true)]
async fn a_vms_task_that_fails_begins_anew_and_forgets_nothing() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    let before = host.until_settled(id, 1).await;
    host.sim.panic_next(Call::Get);
    host.create(id, intent(2, PowerState::Paused)).await;
    // The task has failed by now, and has not begun anew: nobody may conclude that there is no such VM.
    tokio::time::sleep(BEGIN_ANEW.0 / 2).await;
    assert!(host.vms.get(id).is_some(), "the VM counts as unknown");
    assert_eq!(host.vms.statuses().len(), 1);
    let after = host.until_settled(id, 2).await;
    assert_eq!(after.power, Some(PowerState::Paused));
    assert!(
        after.status_generation > before.status_generation,
        "an older number would be dropped by the controller"
    );
    let stale = Intent {
        epoch: Epoch(0),
        ..intent(3, PowerState::Running)
    };
    let refused = host.vms.get(id).unwrap().ensure(told(id, stale)).await;
    assert!(matches!(
        refused,
        Err(Error::Denied(policy::Denied::StaleEpoch { .. }))
    ));
}

#[tokio::test]
async fn a_destination_that_was_never_asked_to_settle_tidies_up_at_the_end() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    let destination = pair.destination.vms.get(vm(1)).unwrap();
    destination.finish(MIGRATION, false, Epoch(3)).await.unwrap();
    destination.finish(MIGRATION, false, Epoch(3)).await.unwrap();
    assert_eq!(pair.destination.sim.local_volumes(), 0);
    assert_eq!(destination.status().phase, Phase::Gone);
    assert!(matches!(
        pair.prepare().await,
        Err(Error::Denied(policy::Denied::MigrationOver(_)))
    ));
}

#[tokio::test]
async fn a_request_to_prepare_that_comes_after_the_end_is_refused() {
    let pair = Pair::new().await;
    let destination = pair.destination.vms.get_or_start(vm(1));
    destination.finish(MIGRATION, false, Epoch(3)).await.unwrap();
    assert!(matches!(
        pair.prepare().await,
        Err(Error::Denied(policy::Denied::MigrationOver(_)))
    ));
    assert_eq!(pair.destination.sim.local_volumes(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_lost_disk_is_never_replaced_by_a_blank_one() {
    let mut host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    host.create(id, intent(2, PowerState::Stopped)).await;
    host.until_settled(id, 2).await;
    host.sim.delete_volumes(id, false).await.unwrap();
    host.restart_agent("boot-1").await;
    host.create(id, intent(3, PowerState::Running)).await;
    let status = host.until(id, "failing", |status| status.failure.is_some()).await;
    assert_eq!(status.failure.unwrap().reason, "FILE_NOT_FOUND");
    assert_eq!(host.sim.local_volumes(), 0, "a blank disk was made");
}

#[tokio::test(start_paused = true)]
async fn disks_that_were_made_once_are_not_made_anew_by_a_host_that_has_lost_everything() {
    let host = one_host().await;
    let id = vm(1);
    let again = Told {
        disks_made: true,
        new_disks: Default::default(),
        ..told(id, intent(1, PowerState::Running))
    };
    host.vms.get_or_start(id).ensure(again.clone()).await.unwrap();
    let status = host.until(id, "failing", |status| status.failure.is_some()).await;
    assert_eq!(status.failure.unwrap().reason, "FILE_NOT_FOUND");
    assert_eq!(host.sim.local_volumes(), 0, "a blank disk was made");
    // Said without it, as by an older controller, it is the same intent.
    let told = told(id, intent(1, PowerState::Running));
    host.vms.get(id).unwrap().ensure(told).await.unwrap();
    assert_eq!(host.sim.local_volumes(), 0, "a blank disk was made");
}

#[tokio::test(start_paused = true)]
async fn a_restart_that_cannot_be_written_down_is_done_later_and_not_forgotten() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    let (silent, refuses) = (
        HypervisorError::Unavailable { detail: "no".into() },
        HypervisorError::Invalid { detail: "no".into() },
    );
    host.sim.fail_next(Call::Get, Fault::Error(silent));
    host.sim.fail_next(Call::Reset, Fault::Error(refuses));
    let restart = Intent {
        restart_sequence: 1,
        restart_mode: RestartMode::Reset,
        power_sequence: 1,
        ..intent(2, PowerState::Running)
    };
    host.create(id, restart).await;
    let (ledger, aside) = (host.dir.path().join("ledger/vms"), host.dir.path().join("aside"));
    std::fs::rename(&ledger, &aside).unwrap();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_ne!(
        host.vms.get(id).unwrap().status().observed_generation,
        Generation(2)
    );
    std::fs::rename(&aside, &ledger).unwrap();
    let status = host.until(id, "reset", |status| status.failure.is_some()).await;
    assert_ne!(
        status.observed_generation,
        Generation(2),
        "it failed, and counts as done"
    );
}

#[tokio::test(start_paused = true)]
async fn a_restart_that_fails_is_tried_again() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    let failed = HypervisorError::Failed {
        call: "reset",
        code: 1,
        detail: "no".into(),
    };
    host.sim.fail_next(Call::Reset, Fault::Error(failed.clone()));
    // Only the second call sees this one.
    host.sim
        .fail_next(Call::Reset, Fault::TakesEffect(failed.clone()));
    host.sim.fail_next(
        Call::Reset,
        Fault::Error(HypervisorError::Invalid {
            detail: "third".into(),
        }),
    );
    let restart = Intent {
        restart_sequence: 1,
        restart_mode: RestartMode::Reset,
        power_sequence: 1,
        ..intent(2, PowerState::Running)
    };
    host.create(id, restart).await;
    let third = |status: &Status| status.failure.as_ref().is_some_and(|failure| !failure.retrying);
    host.until(id, "tried three times", third).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_given_up_is_not_restarted_until_somebody_asks() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    for _ in 0..=plan::MAX_RESTARTS {
        host.until(id, "running", |status| status.power == Some(PowerState::Running))
            .await;
        host.sim.crash_guest(id);
        host.until(id, "off", |status| status.power == Some(PowerState::Stopped))
            .await;
    }
    host.until(id, "given up", |status| status.phase == Phase::Failed)
        .await;
    tokio::time::sleep(plan::CRASH_WINDOW * 3).await;
    let status = host.vms.get(id).unwrap().status();
    assert_eq!(
        (status.phase, status.power),
        (Phase::Failed, Some(PowerState::Stopped))
    );
    host.create(id, intent(2, PowerState::Running)).await;
    assert_eq!(host.until_settled(id, 2).await.power, Some(PowerState::Running));
}

#[tokio::test]
async fn a_transfer_that_ended_is_told_as_ended_although_the_disk_is_full() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.send().await.unwrap();
    // Stands for a disk without room: nothing can be written where the migrations are.
    let migrations = pair.source.dir.path().join("ledger/migrations");
    std::fs::rename(&migrations, migrations.with_extension("away")).unwrap();
    std::fs::write(&migrations, b"").unwrap();
    // Fails after its limit where the source says for ever that it is copying.
    pair.transfer_over().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_itself_off_right_after_a_restart_stays_off() {
    for answer_is_lost in [false, true] {
        let mut host = one_host().await;
        let id = vm(1);
        host.create(id, intent(1, PowerState::Running)).await;
        host.until_settled(id, 1).await;
        host.stop.cancel();
        host.vms.stopped().await;
        host.sim.reboot_host();
        // Off again before anybody has seen it run.
        host.sim.set_behaviour(id, Behaviour::PowersOff(Duration::ZERO));
        if answer_is_lost {
            let lost = HypervisorError::Unavailable { detail: "no".into() };
            host.sim.fail_next(Call::Start, Fault::TakesEffect(lost));
        }
        host.restart_agent("boot-2").await;
        let off = |s: &Status| s.reason == PowerReason::GuestShutdown;
        host.until(id, "off by itself", off).await;
        let runs = host.sim.run(id);
        sleep(Duration::from_mins(2)).await;
        assert_eq!(host.sim.run(id), runs, "it was started again");
    }
}

#[tokio::test]
async fn a_late_request_to_settle_an_older_migration_leaves_the_present_one_alone() {
    let mut pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.settle().await;
    pair.finish(false, 3).await;
    // It forgets how long ago that was, and would no longer wait for what arrives.
    pair.destination.restart_agent("boot-1").await;
    pair.migration = MigrationId::from_uuid(uuid::Uuid::from_u128(78));
    pair.epoch = Epoch(3);
    let renewed = Intent {
        epoch: pair.epoch,
        ..intent(2, PowerState::Running)
    };
    pair.source.create(vm(1), renewed).await;
    pair.source.until_settled(vm(1), 2).await;
    pair.prepare().await.unwrap();
    pair.send_at(16).await.unwrap();
    let begun = async {
        while pair.census().1 != Some(DomainState::Incoming) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), begun)
        .await
        .expect("it is on its way");
    for host in [&pair.source, &pair.destination] {
        let late = host.vms.get(vm(1)).unwrap().settle(MIGRATION).await;
        let denied =
            matches!(late, Err(Error::Denied(policy::Denied::Migrating(by))) if by == pair.migration);
        assert!(denied, "{}: {late:?}", host.name);
    }
    pair.transfer_over().await;
    assert_eq!(pair.settle().await, (Presence::Absent, RUNNING));
}

#[tokio::test]
async fn a_vm_that_was_to_come_and_did_not_is_forgotten_although_its_entry_was_written_and_said_not_to_be() {
    let mut pair = Pair::new().await;
    let entries = pair.destination.dir.path().join("ledger/vms");
    std::fs::remove_dir_all(&entries).unwrap();
    assert!(matches!(pair.prepare().await, Err(Error::Ledger(_))));
    // It is on disk after all: the entry that a preparation writes, as another one's was written.
    std::fs::create_dir(&entries).unwrap();
    let ledger = ledger::Ledger::open(&pair.destination.dir.path().join("ledger")).unwrap();
    let written = ledger::Vm {
        id: vm(1),
        name: name(vm(1)),
        intent: Some(intent(1, PowerState::Running)),
        epoch: Epoch(2),
        generation: Generation(1),
        disposition: ledger::Disposition::Incoming { migration: MIGRATION },
        done: ledger::Done::default(),
        last_seen: None,
        boot_id: "boot-1".to_owned(),
        images: Vec::new(),
        documents: Default::default(),
        changes: Default::default(),
        snapshots: Default::default(),
    };
    ledger.save_vm(&written).await.unwrap();
    pair.settle().await;
    pair.finish(false, 3).await;
    pair.destination.restart_agent("boot-1").await;
    let status = pair.destination.vms.get(vm(1)).unwrap().status();
    assert_eq!(status.phase, Phase::Gone, "it still waits for it: {status:?}");
}

#[tokio::test]
async fn a_newer_intent_that_counts_less_than_was_done_is_done_all_the_same() {
    let host = one_host().await;
    host.create(vm(1), intent(1, PowerState::Running)).await;
    host.create(vm(1), intent(5, PowerState::Stopped)).await;
    host.until_settled(vm(1), 5).await;
    // A controller that was restored, and was told what this host knew before.
    let restored = Intent {
        power_sequence: 4,
        ..intent(9, PowerState::Running)
    };
    host.create(vm(1), restored).await;
    let running = |status: &Status| status.power == Some(PowerState::Running);
    host.until(vm(1), "runs", running).await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_whose_restart_cannot_be_done_for_a_while_is_not_given_up() {
    let host = one_host().await;
    host.create(vm(1), intent(1, PowerState::Running)).await;
    host.until_settled(vm(1), 1).await;
    // Its host was restarted, and the pool comes later.
    for _ in 0..=plan::MAX_RESTARTS {
        let missing = HypervisorError::Storage {
            pool: "local".into(),
            detail: "not mounted".into(),
        };
        host.sim.fail_next(Call::Start, Fault::Error(missing));
    }
    host.sim.crash_guest(vm(1));
    host.until(vm(1), "failed", |status| status.failure.is_some())
        .await;
    let running = |status: &Status| status.power == Some(PowerState::Running) && status.failure.is_none();
    host.until(vm(1), "runs again", running).await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_waits_for_a_network_is_not_done_once_the_vm_is_to_be_off() {
    let host = one_host().await;
    let networks = host.vms.networks().clone();
    let make = |stop: &CancellationToken| {
        let (networks, stop) = (networks.clone(), stop.clone());
        tokio::spawn(async move { networks.run(stop).await })
    };
    let stop = CancellationToken::new();
    let made = make(&stop);
    let mut document = told_of_networks();
    document
        .networks
        .retain(|told| told.network.name.as_str() == "site");
    networks.tell(document.clone()).await.unwrap();
    let mut with = intent(1, PowerState::Running);
    let ports = ports_of(&document, "web-1").into_iter();
    let nics = ports.map(|port| Nic {
        name: format!("to-{}", port.port.network),
        plug: Plug::Network(port.port),
        mac: port.mac,
        reserved_mbit: None,
    });
    with.spec.nics = nics.collect();
    let mut off = with.clone();
    (off.generation, off.power, off.power_sequence) = (Generation(2), PowerState::Stopped, 2);
    host.create(vm(1), with).await;
    host.until_settled(vm(1), 1).await;
    // From here on there is something to make, and nobody who makes it.
    stop.cancel();
    made.await.unwrap();
    networks.expect(&ports_of(&document, "web-1"));
    host.sim.crash_guest(vm(1));
    sleep(Duration::from_secs(1)).await;
    host.create(vm(1), off).await;
    make(&CancellationToken::new());
    let status = host.until_settled(vm(1), 2).await;
    assert_eq!(status.power, Some(PowerState::Stopped));
    assert_eq!(host.sim.run(vm(1)), Some(1), "it was started for what is over");
}
