//! Migrations between two hosts over real TLS: the whole way, broken at each phase, cancelled, and agents killed amid them.

use super::*;

#[tokio::test]
async fn a_vm_moves_and_nothing_of_it_stays_behind() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.send().await.unwrap();
    pair.send().await.expect("the same command again is done");
    pair.transfer_over().await;
    assert_eq!(pair.settle().await, (Presence::Absent, RUNNING));
    pair.finish(true, 2).await;
    pair.finish(true, 2).await;
    let status = pair.destination.until_settled(vm(1), 1).await;
    assert_eq!(
        (status.epoch, status.power, status.reason),
        (Epoch(2), Some(PowerState::Running), PowerReason::Migrated)
    );
    assert_eq!(pair.census(), (None, Some(DomainState::Running)));
    assert_eq!(
        (
            pair.source.sim.local_volumes(),
            pair.destination.sim.local_volumes()
        ),
        (0, 1)
    );
    let late = pair
        .source
        .vms
        .get(vm(1))
        .unwrap()
        .ensure(told(vm(1), intent(9, PowerState::Running)))
        .await;
    assert!(
        matches!(late, Err(Error::Denied(policy::Denied::StaleEpoch { .. }))),
        "{late:?}"
    );
}

#[tokio::test]
async fn who_gave_a_vm_up_at_the_end_of_a_migration_is_not_made_its_owner_by_an_old_store() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.send().await.unwrap();
    pair.transfer_over().await;
    pair.settle().await;
    pair.finish(true, 2).await;
    // A copy of the controller that knows nothing of that end comes to another one.
    let source = pair.source.vms.get(vm(1)).unwrap();
    let otherwise = source.finish(MIGRATION, true, Epoch(3)).await;
    assert!(
        matches!(otherwise, Err(Error::Denied(policy::Denied::MigrationOver(_)))),
        "{otherwise:?}"
    );
    assert_eq!(pair.census(), (None, Some(DomainState::Running)));
}

#[tokio::test]
async fn wherever_a_migration_breaks_one_copy_runs_and_nothing_is_left() {
    // Where it breaks, whether the VM has arrived, and whether its source has let go of it. One that was not told that it has arrived goes on.
    for (at, arrived, destination_owns) in [
        (Break::Prepare, false, false),
        (Break::Transfer, false, false),
        (Break::Handover, false, false),
        (Break::Locked, false, false),
        (Break::Finish, true, false),
        (Break::Confirm, true, true),
    ] {
        let pair = Pair::new().await;
        pair.source.sim.break_migration_at(at);
        pair.prepare().await.unwrap();
        pair.send().await.unwrap();
        pair.transfer_over().await;
        let (source, destination) = pair.settle().await;
        // Where the source never said that it had let go, nothing may run there yet.
        assert!(
            destination != RUNNING || at == Break::Confirm,
            "{at:?}: {source:?}"
        );
        assert_eq!(
            destination == RUNNING || destination == Presence::Is(DomainState::Paused),
            arrived,
            "{at:?}: {source:?} {destination:?}"
        );
        assert_eq!(
            source == RUNNING,
            !destination_owns && at != Break::Locked,
            "{at:?}: {source:?} {destination:?}"
        );
        pair.finish(destination_owns, if destination_owns { 2 } else { 3 })
            .await;
        let (owner, other) = if destination_owns {
            (&pair.destination, &pair.source)
        } else {
            (&pair.source, &pair.destination)
        };
        assert_eq!(
            owner.until_settled(vm(1), 1).await.power,
            Some(PowerState::Running),
            "{at:?}"
        );
        assert_eq!(other.sim.list().await.unwrap(), [], "{at:?}");
        assert_eq!(other.sim.local_volumes(), 0, "{at:?}");
        assert_eq!(owner.sim.local_volumes(), 1, "{at:?}");
    }
}

#[tokio::test]
async fn a_guest_that_went_on_at_its_source_and_died_there_has_not_handed_over() {
    let pair = Pair::new().await;
    pair.source.sim.break_migration_at(Break::Finish);
    pair.prepare().await.unwrap();
    pair.send().await.unwrap();
    pair.transfer_over().await;
    assert_eq!(
        pair.census(),
        (Some(DomainState::Running), Some(DomainState::Paused))
    );
    pair.source.sim.crash_guest(vm(1));
    let settled = pair.settle().await;
    assert_eq!(
        settled,
        (
            Presence::Is(DomainState::Stopped),
            Presence::Is(DomainState::Paused)
        )
    );
    // As the controller then decides.
    pair.finish(false, 3).await;
    let status = pair.source.until_settled(vm(1), 1).await;
    assert_eq!(status.power, Some(PowerState::Running), "it is started anew");
    assert_eq!(pair.census(), (Some(DomainState::Running), None));
}

#[tokio::test]
async fn a_vm_that_has_arrived_goes_on_at_the_sources_word_without_the_controller() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.send().await.unwrap();
    pair.transfer_over().await;
    let goes_on = async {
        while pair.census() != (None, Some(DomainState::Running)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), goes_on)
        .await
        .expect("it runs there, and only there");
}

#[tokio::test]
async fn a_guest_that_dies_where_it_has_arrived_is_started_again_by_its_restart_policy_alone() {
    for (policy, expected) in [
        (RestartPolicy::Never, PowerState::Stopped),
        (RestartPolicy::OnFailure, PowerState::Running),
    ] {
        let pair = Pair::new().await;
        pair.prepare_with(policy).await.unwrap();
        pair.send().await.unwrap();
        pair.transfer_over().await;
        pair.settle().await;
        pair.destination.sim.crash_guest(vm(1));
        pair.finish(true, 2).await;
        let status = pair.destination.until_settled(vm(1), 1).await;
        assert_eq!(status.power, Some(expected), "{policy:?}");
    }
}

#[tokio::test]
async fn progress_is_seen_while_the_transfer_goes_on() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.send_at(8).await.unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let looking = async {
        while seen.len() < 3 {
            let status = pair.source.vms.get(vm(1)).unwrap().status();
            let migration = status.migration.expect("it is moving");
            assert_eq!(
                migration.transfer,
                ledger::Transfer::Active,
                "it ended too early: {seen:?}"
            );
            if migration.progress.memory_processed_bytes > 0 {
                seen.insert(migration.progress.memory_processed_bytes);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), looking)
        .await
        .expect("progress is shown");
    pair.settle().await;
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_vm_where_it_was() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    pair.send().await.unwrap();
    assert_eq!(pair.settle().await.0, RUNNING);
    pair.finish(false, 3).await;
    pair.source
        .create(
            vm(1),
            Intent {
                epoch: Epoch(3),
                ..intent(2, PowerState::Stopped)
            },
        )
        .await;
    assert_eq!(
        pair.source.until_settled(vm(1), 2).await.power,
        Some(PowerState::Stopped)
    );
    assert_eq!(pair.destination.sim.list().await.unwrap(), []);
}

#[tokio::test]
async fn what_was_settled_never_begins() {
    let pair = Pair::new().await;
    pair.settle().await;
    assert!(matches!(
        pair.prepare().await,
        Err(Error::Denied(policy::Denied::MigrationOver(_)))
    ));
    assert!(matches!(
        pair.send().await,
        Err(Error::Denied(policy::Denied::MigrationOver(_)))
    ));
    pair.finish(false, 3).await;
    assert_eq!(pair.census(), (Some(DomainState::Running), None));
}

#[tokio::test]
async fn a_destination_lets_in_only_the_source_that_was_named() {
    let pair = Pair::new().await;
    let intruder = Authority::new();
    // Nothing was prepared: the stream is refused and the VM stays.
    pair.send().await.unwrap();
    pair.transfer_over().await;
    assert_eq!(pair.census().0, Some(DomainState::Running));
    // Another site's certificate does not even get through the handshake.
    let (address, peer) = (
        pair.destination.address.to_string(),
        tls::agent_name(&"h2".parse().unwrap()),
    );
    assert!(
        tls::client::open_stream(&address, &peer, &intruder.agent("h1"), tls::ALPN_STREAM)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn agents_killed_during_a_migration_still_come_to_one_copy() {
    for (kill_source, kill_destination) in [(true, false), (false, true), (true, true)] {
        let mut pair = Pair::new().await;
        pair.prepare().await.unwrap();
        pair.send().await.unwrap();
        if kill_source {
            pair.source.restart_agent("boot-1").await;
        }
        if kill_destination {
            pair.destination.restart_agent("boot-1").await;
        }
        let (source, destination) = pair.settle().await;
        let case = format!("{kill_source} {kill_destination}: {source:?} {destination:?}");
        assert_ne!(source == RUNNING, destination == RUNNING, "{case}");
        let moved = destination == RUNNING;
        pair.finish(moved, if moved { 2 } else { 3 }).await;
        let owner = if moved { &pair.destination } else { &pair.source };
        assert_eq!(
            owner.until_settled(vm(1), 1).await.power,
            Some(PowerState::Running),
            "{case}"
        );
        let other = if moved { &pair.source } else { &pair.destination };
        assert_eq!(other.sim.list().await.unwrap(), [], "{case}");
    }
}

#[tokio::test]
async fn a_migration_that_was_never_finished_does_not_hide_the_present_one_after_a_restart() {
    let mut pair = Pair::new().await;
    pair.prepare().await.unwrap();
    // The controller that would have finished it was restored from an older backup.
    let older = ledger::Migration {
        id: MigrationId::from_uuid(uuid::Uuid::from_u128(1)),
        vm: vm(1),
        role: Some(ledger::Role::Source),
        peer: None,
        transfer: ledger::Transfer::Completed,
        settled: true,
        finished: None,
    };
    let ledger = Ledger::open(&pair.destination.dir.path().join("ledger")).unwrap();
    ledger.save_migration(&older).await.unwrap();
    pair.destination.restart_agent("boot-1").await;
    let ready = |status: &Status| status.phase == Phase::Incoming;
    let status = pair.destination.until(vm(1), "ready", ready).await;
    assert_eq!(status.migration.map(|migration| migration.id), Some(MIGRATION));
}

#[tokio::test]
async fn a_migration_that_never_came_here_is_finished_beside_the_present_one() {
    let pair = Pair::new().await;
    pair.prepare().await.unwrap();
    let destination = pair.destination.vms.get(vm(1)).unwrap();
    let other = MigrationId::from_uuid(uuid::Uuid::from_u128(1));
    destination.finish(other, false, Epoch(3)).await.unwrap();
    pair.send().await.unwrap();
    pair.transfer_over().await;
    assert_eq!(pair.settle().await, (Presence::Absent, RUNNING));
}
