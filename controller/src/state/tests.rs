//! What [`Db`] promises: changes one after the other, all or nothing, and nothing seen before it is on disk.

use std::{
    sync::{Arc, atomic::AtomicUsize, atomic::Ordering, mpsc},
    time::Duration,
};

use dalgu_proto::ids::{MigrationId, Term};

use super::*;
use crate::{
    fixtures,
    model::{EventKind, MigrationRecord, Phase},
    store::{
        self, Batch, Image, Store,
        memory::{Crash, Disk},
    },
};

fn open(disk: &Disk) -> Db {
    Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap()
}

/// Commits only when it is let.
struct Held {
    disk: store::memory::Memory,
    gate: mpsc::Receiver<()>,
    batches: Arc<AtomicUsize>,
}

impl Store for Held {
    fn load(&mut self) -> Result<Image, store::Error> {
        self.disk.load()
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), store::Error> {
        self.gate.recv().unwrap();
        self.batches.store(batches.len(), Ordering::SeqCst);
        self.disk.commit(batches)
    }
}

#[tokio::test]
async fn nobody_sees_a_change_before_it_is_on_disk_and_one_write_serves_all_who_wait() {
    let (open_gate, gate) = mpsc::channel();
    let batches = Arc::new(AtomicUsize::new(0));
    open_gate.send(()).unwrap(); // for the term
    let store = Held {
        disk: Disk::default().open(),
        gate,
        batches: batches.clone(),
    };
    let db = Db::open(store, fixtures::cluster_id(), Hooks::default()).unwrap();
    let put = |name: &str| {
        let (db, vm) = (db.clone(), fixtures::vm(name, "h1"));
        tokio::spawn(async move { db.change(|tx| tx.put_vm(vm)).await })
    };
    let first = put("first");
    tokio::time::sleep(Duration::from_millis(20)).await;
    let rest: Vec<_> = ["a", "b", "c"].into_iter().map(put).collect();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!first.is_finished());
    assert!(db.snapshot().vms.is_empty(), "it is not on disk yet");
    // The next change builds on what is under way all the same; when it is refused for that, it is told so later.
    let refused = tokio::spawn({
        let db = db.clone();
        async move { db.transact(|tx| Err::<(), _>(tx.vms.len())).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    open_gate.send(()).unwrap();
    first.await.unwrap();
    assert_eq!(db.snapshot().vms.len(), 1);
    assert!(
        !refused.is_finished(),
        "it was refused for what is not on disk yet"
    );
    open_gate.send(()).unwrap();
    for one in rest {
        one.await.unwrap();
    }
    assert_eq!(refused.await.unwrap(), Err(4));
    assert_eq!((db.snapshot().vms.len(), batches.load(Ordering::SeqCst)), (4, 3));
}

#[tokio::test]
async fn a_change_that_is_refused_leaves_nothing() {
    let db = open(&Disk::default());
    let before = db.snapshot().meta.revision;
    let outcome = db.transact(|tx| {
        tx.put_vm(fixtures::vm("web", "h1"));
        tx.event(EventKind::Vm, "VmCreated", "web", "", None);
        Err::<(), _>("no")
    });
    assert_eq!(outcome.await, Err("no"));
    db.change(|_| ()).await;
    let state = db.snapshot();
    assert!(state.vms.is_empty() && state.events.is_empty() && state.reserved.is_empty());
    assert_eq!(state.meta.revision, before);
}

#[tokio::test]
async fn a_failed_commit_answers_nobody_and_nothing_follows_it() {
    let disk = Disk::default();
    let failed = Arc::new(AtomicUsize::new(0));
    let hooks = Hooks {
        failed: Box::new({
            let failed = failed.clone();
            move |_| {
                failed.fetch_add(1, Ordering::SeqCst);
            }
        }),
        ..Hooks::default()
    };
    let db = Db::open(disk.open(), fixtures::cluster_id(), hooks).unwrap();
    disk.crash_at(Some(Crash::After(1)));
    for name in ["a", "b"] {
        let vm = fixtures::vm(name, "h1");
        let answer = tokio::time::timeout(Duration::from_millis(100), db.change(|tx| tx.put_vm(vm)));
        assert!(answer.await.is_err(), "{name} was answered");
    }
    assert!(db.snapshot().vms.is_empty());
    assert_eq!((failed.load(Ordering::SeqCst), disk.commits()), (1, 2));
    disk.crash_at(None);
    assert_eq!(
        open(&disk).snapshot().vms.len(),
        1,
        "what was written is found at the next start"
    );
}

#[tokio::test]
async fn each_start_has_a_higher_term_and_finds_what_was_there() {
    let disk = Disk::default();
    let first = open(&disk);
    assert_eq!(first.snapshot().meta.term, Term(1));
    let vm = fixtures::vm("web", "h1");
    let (id, migration) = (vm.id, fixtures::migration(&vm, "h2"));
    let operation = fixtures::operation(&vm, crate::model::OperationKind::Migrate, None);
    first
        .change(|tx| {
            tx.put_vm(vm);
            tx.put_operation(operation);
            tx.put_migration(migration);
            tx.event(EventKind::Vm, "VmCreated", "web", "", None);
        })
        .await;
    let (before, second) = (first.snapshot(), open(&disk));
    let after = second.snapshot();
    assert_eq!(after.meta.term, Term(2));
    assert!(after.meta.revision > before.meta.revision);
    assert_eq!(after.vms[&id], before.vms[&id]);
    assert_eq!(after.reserved, before.reserved);
    assert_eq!(after.active_migrations, before.active_migrations);
    assert_eq!(after.active_operations, before.active_operations);
    assert_eq!(after.events, before.events);
}

#[tokio::test]
async fn a_store_of_another_site_is_refused() {
    let disk = Disk::default();
    drop(open(&disk));
    let other = "3f2b5e0c-0000-4000-8000-000000000000".parse().unwrap();
    assert!(matches!(
        Db::open(disk.open(), other, Hooks::default()),
        Err(Error::Site { .. })
    ));
}

#[tokio::test]
async fn room_is_held_by_the_owner_and_by_both_sides_of_a_migration_until_it_ends() {
    let db = open(&Disk::default());
    let vm = fixtures::vm("web", "h1");
    let (id, need) = (vm.id, vm.spec.reserved_memory_mib());
    let migration = fixtures::migration(&vm, "h2");
    let held = |state: &State| {
        ["h1", "h2"].map(|host| {
            state
                .reserved
                .get(&fixtures::host_name(host))
                .map_or(0, |r| r.memory_mib / need)
        })
    };
    let stored = vm.clone();
    db.change(|tx| tx.put_vm(stored)).await;
    assert_eq!(held(&db.snapshot()), [1, 0]);
    let begun = migration.clone();
    db.change(|tx| tx.put_migration(begun)).await;
    assert_eq!(held(&db.snapshot()), [1, 1]);
    db.change(|tx| {
        let mut vm = (*tx.vms[&id]).clone();
        vm.owner = fixtures::host_name("h2");
        tx.put_vm(vm);
    })
    .await;
    assert_eq!(
        held(&db.snapshot()),
        [1, 1],
        "the source is not tidied up yet, the destination counts once"
    );
    db.change(|tx| {
        tx.put_migration(MigrationRecord {
            phase: Phase::Done,
            ..migration
        })
    })
    .await;
    assert_eq!(held(&db.snapshot()), [0, 1]);
    db.change(|tx| tx.delete_vm(id)).await;
    assert_eq!(held(&db.snapshot()), [0, 0]);
}

#[tokio::test]
async fn old_events_are_forgotten_on_disk_too() {
    let disk = Disk::default();
    let hooks = Hooks {
        events_kept: 3,
        ..Hooks::default()
    };
    let db = Db::open(disk.open(), fixtures::cluster_id(), hooks).unwrap();
    for number in 0..5 {
        db.change(|tx| {
            for _ in 0..2 {
                tx.event(EventKind::Host, "HostReady", format!("h{number}"), "", None);
            }
        })
        .await;
    }
    let state = db.snapshot();
    assert_eq!(state.events.len(), 3);
    assert_eq!(state.events.keys().copied().max(), Some(state.meta.revision));
    assert_eq!(state.meta.forgotten + 1, state.oldest_event());
    let image = disk.open().load().unwrap();
    assert_eq!(
        image.events.iter().map(|e| e.0).collect::<Vec<_>>(),
        state.events.keys().copied().collect::<Vec<_>>()
    );
}

proptest::proptest! {
    /// A ratio that changes in the store would show as a change that nobody made.
    #[test]
    fn a_ratio_is_read_back_from_the_store_to_the_last_digit(ratio in 0.1_f64..64.0) {
        let mut host = fixtures::host("h1");
        host.cpu_overcommit_ratio = ratio;
        let row = serde_json::to_string(&host).unwrap();
        let read: crate::model::HostRecord = serde_json::from_str(&row).unwrap();
        proptest::prop_assert_eq!(read.cpu_overcommit_ratio.to_bits(), ratio.to_bits());
    }
}

#[tokio::test]
async fn a_newer_migration_that_has_ended_leaves_an_older_one_its_place_when_the_store_is_read() {
    let disk = Disk::default();
    let vm = fixtures::vm("web", "h1");
    let older = fixtures::migration(&vm, "h2");
    let newer = MigrationRecord {
        id: MigrationId::from_uuid(uuid::Uuid::max()),
        phase: Phase::Failed,
        ..fixtures::migration(&vm, "h3")
    };
    let db = open(&disk);
    let stored = (vm.clone(), newer, older.clone());
    db.change(|tx| {
        let (vm, newer, older) = stored;
        tx.put_vm(vm);
        tx.put_migration(newer);
        tx.put_migration(older);
    })
    .await;
    drop(db);
    let state = open(&disk).snapshot();
    assert_eq!(state.active_migration(vm.id).map(|m| m.id), Some(older.id));
    assert_eq!(state.reserved[&fixtures::host_name("h2")].vms, 1);
}
