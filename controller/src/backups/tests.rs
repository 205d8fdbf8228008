//! What is due, and what is kept, case by case.

use std::{slice::from_ref, sync::Arc, time::Duration};

use dalgu_proto::{
    host::GuestFeature,
    ids::{BackupId, Session, Term},
    vm::Disk,
};
use jiff::Timestamp;
use uuid::Uuid;

use super::{plan::Due, *};
use crate::{
    fixtures,
    model::{BackupKind, HostLive, HostState, ScheduleRecord, VmRecord},
    state::{Db, Hooks, Meta, State},
    store::memory,
    verbs::{self, backup::CreateBackup},
};

pub(crate) fn at(hours: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + hours * 3600).unwrap()
}

pub(crate) fn schedule(name: &str) -> ScheduleRecord {
    ScheduleRecord {
        name: name.parse().unwrap(),
        selector: [("tier".to_owned(), "gold".to_owned())].into(),
        pool: "local".into(),
        every_seconds: 24 * 3600,
        at: None,
        incrementals: 2,
        keep_last: 2,
        keep_days: 0,
        paused: false,
        description: String::new(),
        create_time: at(0),
        revision: 0,
    }
}

pub(crate) fn gold(name: &str) -> VmRecord {
    let mut vm = fixtures::vm(name, "h1");
    vm.labels.insert("tier".into(), "gold".into());
    vm.disks_made = true;
    vm.spec.disks = vec![disk()];
    vm
}

fn disk() -> Disk {
    Disk {
        name: "root".into(),
        size_mib: 64,
        pool: "local".into(),
        image: None,
        format: Default::default(),
        digest: None,
        clone_mode: Default::default(),
        volume: None,
        limits: Default::default(),
        backup: None,
    }
}

pub(crate) fn backup(
    vm: &VmRecord,
    number: u128,
    hours: i64,
    state: BackupState,
    parent: Option<u128>,
) -> BackupRecord {
    let id = |number| BackupId::from_uuid(Uuid::from_u128(number));
    BackupRecord {
        id: id(number),
        vm: vm.id,
        vm_name: vm.name.clone(),
        spec: vm.spec.clone(),
        traits: vm.into(),
        pool: "local".into(),
        shared: false,
        host: vm.owner.clone(),
        kind: match parent {
            Some(_) => BackupKind::Incremental,
            None => BackupKind::Full,
        },
        parent: parent.map(id),
        state,
        quiesced: false,
        checkpoint: state == BackupState::Available,
        files: Vec::new(),
        full_reason: String::new(),
        unbegun: false,
        create_time: at(hours),
        point_time: Some(at(hours)),
        complete_time: None,
        labels: Default::default(),
        description: String::new(),
        schedule: Some("nightly".parse().unwrap()),
        error: None,
        revision: 0,
    }
}

/// A state with these.
pub(crate) fn state(vms: &[VmRecord], schedules: &[ScheduleRecord], backups: &[BackupRecord]) -> State {
    let mut state = State::empty(Meta {
        cluster_id: fixtures::cluster_id(),
        term: Term(1),
        incarnation: 1,
        revision: 1,
        forgotten: 0,
        forgotten_session: Session(0),
        observing: None,
    });
    for vm in vms {
        state.vms.insert(vm.id, Arc::new(vm.clone()));
    }
    for schedule in schedules {
        state
            .schedules
            .insert(schedule.name.clone(), Arc::new(schedule.clone()));
    }
    for backup in backups {
        state.backups.insert(backup.id, Arc::new(backup.clone()));
        state.vm_backups.entry(backup.vm).or_default().insert(backup.id);
        if backup.state.is_open() {
            state.open_backups.insert(backup.id);
        }
    }
    state
}

fn kinds(state: &State, hours: i64) -> Vec<BackupKind> {
    plan::due(state, at(hours))
        .into_iter()
        .map(|due| due.kind)
        .collect()
}

#[test]
fn the_first_is_due_soon_and_each_next_one_after_its_time() {
    use BackupState::Available;
    let (vm, nightly) = (gold("web"), schedule("nightly"));
    let other = fixtures::vm("other", "h1");
    let none = state(&[vm.clone(), other], from_ref(&nightly), &[]);
    assert!(kinds(&none, -1).is_empty());
    assert_eq!(kinds(&none, 1), [BackupKind::Auto]);
    let one = backup(&vm, 1, 1, Available, None);
    let after = |backups: &[BackupRecord]| state(from_ref(&vm), from_ref(&nightly), backups);
    assert!(kinds(&after(from_ref(&one)), 24).is_empty());
    assert_eq!(kinds(&after(from_ref(&one)), 25), [BackupKind::Auto]);
    // Ten days were missed: one is taken.
    assert_eq!(kinds(&after(from_ref(&one)), 240), [BackupKind::Auto]);
    let chain = [
        one,
        backup(&vm, 2, 25, Available, Some(1)),
        backup(&vm, 3, 49, Available, Some(2)),
    ];
    assert_eq!(kinds(&after(&chain), 73), [BackupKind::Full]);
}

#[test]
fn a_time_of_day_is_kept_whenever_the_last_one_was_taken_and_a_missed_one_is_taken_once() {
    use BackupState::{Available, Failed};
    // The schedule is of 08:00 UTC; times in hours since.
    assert_eq!(at(0).to_string(), "2027-01-15T08:00:00Z");
    let vm = gold("web");
    for (every, time, taken, expected) in [
        // The first one is due at the first such time.
        (24, "10:00", None, 2),
        (24, "19:00+09:00", None, 2),
        (24, "07:00", None, 23),
        // It began late, or an hour and a half was waited for it: the next one is no later for it.
        (24, "10:00", Some((2, Available)), 26),
        (24, "10:00", Some((3, Available)), 26),
        // Days were missed, and one was taken for them.
        (24, "10:00", Some((240, Available)), 242),
        // In between, and days apart: counted from the first such time after the schedule was created.
        (6, "10:00", None, 2),
        (6, "10:00", Some((2, Available)), 8),
        (6, "07:00", None, 5),
        (24 * 7, "10:00", Some((2, Available)), 2 + 24 * 7),
        (24 * 7, "10:00", Some((50, Available)), 2 + 24 * 7),
        // A failed one is tried again soon, as ever.
        (24, "10:00", Some((2, Failed)), 3),
    ] {
        let nightly = ScheduleRecord {
            every_seconds: every * 3600,
            at: Some(time.parse().unwrap()),
            ..schedule("nightly")
        };
        let taken: Vec<_> = taken
            .into_iter()
            .map(|(hours, state)| backup(&vm, 1, hours, state, None))
            .collect();
        let state = state(from_ref(&vm), from_ref(&nightly), &taken);
        let next = plan::next_time(&state, &nightly, &vm);
        assert_eq!(next, at(expected), "every {every} h at {time} after {taken:?}");
        assert!(kinds(&state, expected - 1).is_empty());
        assert_eq!(kinds(&state, expected), [BackupKind::Auto]);
    }
    // A VM that is younger than the schedule.
    let nightly = ScheduleRecord {
        at: Some("10:00".parse().unwrap()),
        ..schedule("nightly")
    };
    let younger = VmRecord {
        create_time: at(30),
        ..vm
    };
    let state = state(from_ref(&younger), from_ref(&nightly), &[]);
    assert_eq!(plan::next_time(&state, &nightly, &younger), at(50));
}

#[test]
fn none_is_due_while_one_is_taken_or_the_schedule_is_paused_and_a_failed_one_is_tried_again() {
    let (vm, nightly) = (gold("web"), schedule("nightly"));
    let with = |nightly: ScheduleRecord, state_of| {
        let last = backup(&vm, 1, 1, state_of, None);
        state(from_ref(&vm), &[nightly], &[last])
    };
    assert!(kinds(&with(nightly.clone(), BackupState::Running), 100).is_empty());
    assert!(kinds(&with(nightly.clone(), BackupState::Pending), 100).is_empty());
    assert!(kinds(&with(nightly.clone(), BackupState::Failed), 1).is_empty());
    assert_eq!(
        kinds(&with(nightly.clone(), BackupState::Failed), 2),
        [BackupKind::Auto]
    );
    let paused = ScheduleRecord {
        paused: true,
        ..nightly
    };
    assert!(kinds(&with(paused, BackupState::Available), 100).is_empty());
}

#[test]
fn a_host_is_not_given_all_of_its_vms_at_once_nor_a_vm_twice() {
    let vms: Vec<_> = (0..10).map(|number| gold(&format!("vm{number}"))).collect();
    let schedules = [schedule("nightly"), schedule("weekly")];
    let state = state(&vms, &schedules, &[]);
    let due = plan::due(&state, at(100));
    assert_eq!(due.len(), 2, "{due:?}");
    assert_ne!(due[0].vm, due[1].vm);
}

fn expired(state: &State, hours: i64) -> Vec<u128> {
    let expired = plan::expired(state, at(hours));
    expired.into_iter().map(|id| id.uuid().as_u128()).collect()
}

#[test]
fn what_is_kept_keeps_what_it_needs() {
    use BackupState::{Available, Failed};
    let vm = gold("web");
    let chain = [
        backup(&vm, 1, 0, Available, None),
        backup(&vm, 2, 24, Available, Some(1)),
        backup(&vm, 3, 48, Available, Some(2)),
        backup(&vm, 4, 72, Available, None),
    ];
    let nightly = schedule("nightly");
    let with = |backups: &[BackupRecord]| state(from_ref(&vm), from_ref(&nightly), backups);
    // 3 and 4 are the newest two, and 3 needs 2, which needs 1.
    assert!(expired(&with(&chain), 100).is_empty());
    let more: Vec<_> = chain
        .iter()
        .cloned()
        .chain([backup(&vm, 5, 96, Available, Some(4))])
        .collect();
    assert_eq!(expired(&with(&more), 100), [1, 2, 3]);
    // One by hand needs 2.
    let mut by_hand = backup(&vm, 6, 97, Available, Some(2));
    by_hand.schedule = None;
    let held: Vec<_> = more.iter().cloned().chain([by_hand]).collect();
    assert_eq!(expired(&with(&held), 100), [3]);
    // A VM that is gone keeps its last ones.
    assert_eq!(expired(&state(&[], from_ref(&nightly), &more), 100), [1, 2, 3]);
    // Nothing goes by a schedule that is gone or paused.
    assert!(expired(&state(from_ref(&vm), &[], &more), 100).is_empty());
    let failed: Vec<_> = (10..16).map(|n| backup(&vm, n, 100, Failed, None)).collect();
    let all: Vec<_> = chain.iter().cloned().chain(failed).collect();
    assert_eq!(expired(&with(&all), 100), [10, 11, 12]);
}

#[test]
fn young_ones_are_kept_however_many_they_are() {
    let vm = gold("web");
    let hourly = ScheduleRecord {
        every_seconds: 3600,
        keep_days: 2,
        ..schedule("nightly")
    };
    let backups: Vec<_> = (0..100_u128)
        .map(|n| {
            backup(
                &vm,
                n + 1,
                i64::try_from(n).unwrap(),
                BackupState::Available,
                None,
            )
        })
        .collect();
    let state = state(&[vm], &[hourly], &backups);
    let gone = expired(&state, 99);
    assert_eq!((gone.len(), gone.last()), (51, Some(&51)));
}

#[test]
fn failures_are_counted_since_the_last_good_one() {
    use BackupState::{Available, Failed};
    let (vm, nightly) = (gold("web"), schedule("nightly"));
    let backups = [
        backup(&vm, 1, 0, Failed, None),
        backup(&vm, 2, 1, Available, None),
        backup(&vm, 3, 2, Failed, None),
        backup(&vm, 4, 3, Failed, None),
    ];
    let state = state(&[vm], from_ref(&nightly), &backups);
    assert_eq!(plan::failures(&state, &nightly), 2);
}

#[test]
fn a_vm_is_overdue_once_it_has_gone_without_a_good_backup_for_twice_the_interval() {
    use BackupState::{Available, Failed, Running};
    let (vm, nightly) = (gold("web"), schedule("nightly"));
    let overdue = |vm: &VmRecord, nightly: &ScheduleRecord, backups: &[BackupRecord], hours| {
        let state = state(from_ref(vm), from_ref(nightly), backups);
        let found = plan::overdue(&state, nightly, at(hours));
        let mut found = found.map(|one| (one.last_good, one.since(), one.failed.map(|failed| failed.id)));
        found.next()
    };
    // It counts from the later of both beginnings.
    assert_eq!(overdue(&vm, &nightly, &[], 48), None);
    assert_eq!(overdue(&vm, &nightly, &[], 49), Some((None, at(0), None)));
    let younger = VmRecord {
        create_time: at(10),
        ..vm.clone()
    };
    assert_eq!(overdue(&younger, &nightly, &[], 58), None);
    assert_eq!(overdue(&younger, &nightly, &[], 59), Some((None, at(10), None)));
    let backups = [
        backup(&vm, 1, 1, Available, None),
        backup(&vm, 2, 25, Failed, None),
        backup(&vm, 3, 26, Running, None),
    ];
    assert_eq!(overdue(&vm, &nightly, &backups, 49), None);
    let told = Some((Some(at(1)), at(1), Some(backups[1].id)));
    assert_eq!(overdue(&vm, &nightly, &backups, 50), told);
    // What was taken by hand, or by another schedule, is not what this one promises.
    let mut by_hand = backup(&vm, 4, 40, Available, None);
    by_hand.schedule = None;
    let all = [backups[0].clone(), by_hand];
    assert_eq!(overdue(&vm, &nightly, &all, 50), Some((Some(at(1)), at(1), None)));
    let paused = ScheduleRecord {
        paused: true,
        ..nightly.clone()
    };
    assert_eq!(overdue(&vm, &paused, &backups, 50), None);
    for unable in [
        VmRecord {
            disks_made: false,
            ..vm.clone()
        },
        VmRecord {
            unconfirmed: true,
            ..vm.clone()
        },
        VmRecord {
            delete_time: Some(at(2)),
            ..vm.clone()
        },
    ] {
        assert_eq!(overdue(&unable, &nightly, &backups, 50), None);
    }
}

#[tokio::test]
async fn a_backup_is_refused_before_it_is_begun_where_its_pool_is_full_and_one_that_is_due_fails_in_sight() {
    let db = Db::open(
        memory::Disk::default().open(),
        fixtures::cluster_id(),
        Hooks::default(),
    )
    .unwrap();
    let (vm, nightly) = (gold("web"), schedule("nightly"));
    let free = async |mib: u64| {
        db.change(|tx| {
            let mut host = fixtures::host("h1");
            host.inventory.guest_features.push(GuestFeature::Backup);
            host.inventory.pools[0].available_bytes = mib << 20;
            tx.put_host(host);
            let live = HostLive {
                state: HostState::Ready,
                ..HostLive::silent(tokio::time::Instant::now())
            };
            tx.set_live(vm.owner.clone(), live);
        })
        .await;
    };
    free(63).await;
    db.change(|tx| {
        tx.put_vm(vm.clone());
        tx.put_schedule(nightly.clone());
    })
    .await;
    let create = async || {
        let new = CreateBackup {
            pool: "local".into(),
            kind: BackupKind::Auto,
            labels: Default::default(),
            description: String::new(),
            schedule: None,
        };
        db.transact(|tx| verbs::backup::create(tx, &fixtures::caller(), "web", new))
            .await
    };
    let refused = create().await;
    let full = matches!(refused, Err(verbs::Error::NoPoolRoom { free: 63, .. }));
    assert!(full, "{refused:?}");
    let due = Due {
        schedule: nightly.name.clone(),
        vm: vm.id,
        kind: BackupKind::Auto,
        time: db.now(),
    };
    db.transact(|tx| verbs::backup::scheduled(tx, &due))
        .await
        .unwrap();
    let begun = *db.snapshot().backups.keys().next().unwrap();
    db.change(|tx| verbs::backup::condemn(tx, begun, "")).await;
    free(64).await;
    create().await.unwrap();
}

#[test]
fn a_schedule_knows_how_many_backups_of_a_vm_it_may_come_to() {
    let of = |every_hours: u64, incrementals, keep_last, keep_days| {
        plan::most(&ScheduleRecord {
            every_seconds: every_hours * 3600,
            incrementals,
            keep_last,
            keep_days,
            ..schedule("nightly")
        })
    };
    assert_eq!(of(24, 6, 14, 30), 30 + 6 + 4);
    assert_eq!(of(24, 0, 60, 1), 60 + 4);
    assert_eq!(of(7, 0, 1, 1), 4 + 4);
}

/// A VM on host h1, heard from, and a schedule for it by which a backup is due.
async fn due_one(pool: &str) -> (Db, Due) {
    let db = Db::open(
        memory::Disk::default().open(),
        fixtures::cluster_id(),
        Hooks::default(),
    )
    .unwrap();
    let (vm, nightly) = (gold("web"), schedule("nightly"));
    let due = Due {
        schedule: nightly.name.clone(),
        vm: vm.id,
        kind: BackupKind::Auto,
        time: db.now(),
    };
    db.change(|tx| {
        let mut host = fixtures::host("h1");
        host.inventory.guest_features.push(GuestFeature::Backup);
        tx.put_host(host);
        tx.set_live(fixtures::host_name("h1"), fixtures::live(tx.now()));
        tx.observe(vm.id, Some(fixtures::observation(&vm)));
        tx.put_vm(vm);
        tx.put_schedule(ScheduleRecord {
            pool: pool.to_owned(),
            ..nightly
        });
    })
    .await;
    (db, due)
}

#[tokio::test]
async fn one_that_is_due_and_cannot_be_begun_has_failed_for_all_to_see_and_goes_without_a_host() {
    let (db, due) = due_one("vault").await;
    db.transact(|tx| verbs::backup::scheduled(tx, &due))
        .await
        .unwrap();
    let state = db.snapshot();
    let failed = state.backups.values().next().unwrap().clone();
    let fault = failed.error.clone().unwrap();
    assert_eq!(
        (failed.state, &*fault.reason),
        (BackupState::Failed, "POOL_NOT_FOUND")
    );
    let nightly = state.schedules.values().next().unwrap();
    assert_eq!(plan::failures(&state, nightly), 1);
    let vm = state.vms.values().next().unwrap();
    assert!(
        plan::next_time(&state, nightly, vm) > failed.create_time,
        "it is tried again later"
    );
    db.change(|tx| verbs::backup::condemn(tx, failed.id, "")).await;
    assert!(db.snapshot().backups.is_empty(), "no host has anything of it");
}

#[tokio::test]
async fn what_stands_in_its_way_for_a_moment_is_waited_for_and_no_longer() {
    let (db, due) = due_one("local").await;
    db.change(|tx| {
        let vm = tx.vms.values().next().unwrap().clone();
        tx.put_migration(fixtures::migration(&vm, "h2"));
    })
    .await;
    let waits = db.transact(|tx| verbs::backup::scheduled(tx, &due)).await;
    assert!(
        matches!(waits, Err(verbs::Error::MigrationInProgress(_))),
        "{waits:?}"
    );
    assert!(db.snapshot().backups.is_empty());
    let late = Due {
        time: db.now() - Duration::from_secs(901),
        ..due
    };
    db.transact(|tx| verbs::backup::scheduled(tx, &late))
        .await
        .unwrap();
    let state = db.snapshot();
    let failed = state.backups.values().next().unwrap();
    assert_eq!(failed.error.as_ref().unwrap().reason, "MIGRATION_IN_PROGRESS");
}
