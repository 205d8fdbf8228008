//! Backups that are whole, and restores that are new incarnations.

use dalgu_proto::ids::{Epoch, Generation, Session};

use super::*;
use crate::{
    fixtures,
    model::{OperationKind, OperationState},
    state::{Db, Hooks},
    store::{Store, sqlite::Sqlite},
};

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

async fn site(dir: &Path) -> Db {
    let store = Sqlite::open(&dir.join(DATABASE)).unwrap();
    let db = Db::open(store, fixtures::cluster_id(), Hooks::default()).unwrap();
    let vm = fixtures::vm("web", "h1");
    db.change(|tx| {
        tx.put_host(fixtures::host("h1"));
        tx.put_operation(fixtures::operation(&vm, OperationKind::Start, None));
        tx.put_vm(vm.clone());
    })
    .await;
    db
}

/// The lock goes with the writer's thread, soon after the last handle.
async fn free(dir: &Path) {
    while sqlite::lock(&dir.join(DATABASE)).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn load(dir: &Path) -> Image {
    Sqlite::open(&dir.join(DATABASE)).unwrap().load().unwrap()
}

#[tokio::test]
async fn a_backup_is_taken_while_the_controller_writes_and_is_of_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let db = site(dir.path()).await;
    let writing = tokio::spawn({
        let db = db.clone();
        async move {
            for number in 0_u64.. {
                db.change(|tx| {
                    // Always the same number in both.
                    for name in ["a", "b"] {
                        let mut host = fixtures::host(name);
                        host.reserved_memory_mib = number;
                        tx.put_host(host);
                    }
                })
                .await;
            }
        }
    });
    for number in 0..10 {
        let to = dir.path().join(format!("{number}.backup"));
        let made = tokio::task::spawn_blocking({
            let (dir, to) = (dir.path().to_owned(), to.clone());
            move || backup(&dir, &to, NOW).unwrap()
        })
        .await
        .unwrap();
        let (image, read) = verify(&to).unwrap();
        assert_eq!(read, made);
        let numbers: Vec<_> = image
            .records
            .iter()
            .filter(|(table, key, _)| *table == store::Table::Hosts && key.len() == 1)
            .map(|(_, _, value)| {
                serde_json::from_str::<serde_json::Value>(value).unwrap()["reserved_memory_mib"].clone()
            })
            .collect();
        assert!(
            numbers.is_empty() || numbers.len() == 2 && numbers[0] == numbers[1],
            "{numbers:?}"
        );
    }
    writing.abort();
    let refused = backup(dir.path(), &dir.path().join("1.backup"), NOW);
    assert!(matches!(refused, Err(Error::Exists(_))));
}

#[tokio::test]
async fn what_agents_were_told_before_a_restore_is_older_than_all_that_comes_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let db = site(dir.path()).await;
    let file = dir.path().join("b");
    backup(dir.path(), &file, NOW).unwrap();
    let before = db.snapshot();
    // It goes on after the backup: this is lost, and agents have heard of it.
    db.change(|tx| {
        let mut vm = (**tx.vms.values().next().unwrap()).clone();
        vm.epoch = Epoch(40);
        vm.intent.generation = Generation(90);
        tx.put_vm(vm);
    })
    .await;
    let known = db.snapshot().meta.clone();
    let running = restore(dir.path(), &file, fixtures::cluster_id(), None, NOW);
    assert!(
        matches!(running, Err(Error::Store(store::Error::InUse { .. }))),
        "the controller runs"
    );
    drop(db);
    free(dir.path()).await;

    let mut last = (1, known.term.0, known.revision, 40, 90);
    for round in 1..=3 {
        let now = Timestamp::from_second(round).unwrap();
        let done = restore(dir.path(), &file, fixtures::cluster_id(), None, now).unwrap();
        assert!(done.kept.unwrap().exists());
        let store = Sqlite::open(&dir.path().join(DATABASE)).unwrap();
        let db = Db::open(store, fixtures::cluster_id(), Hooks::default()).unwrap();
        let state = db.snapshot();
        let vm = state.vms.values().next().unwrap();
        assert!(vm.unconfirmed && state.meta.observing.is_some());
        let jump = incarnation::JUMP * u64::try_from(round).unwrap();
        assert_eq!(vm.epoch, Epoch(before.vms[&vm.id].epoch.0 + jump));
        assert_eq!(state.hosts.values().next().unwrap().session, Session(1 + jump));
        let operation = state.operations.values().next().unwrap();
        assert_eq!(operation.state, OperationState::Cancelled);
        let meta = &state.meta;
        let next = (
            meta.incarnation,
            meta.term.0,
            meta.revision,
            vm.epoch.0,
            vm.intent.generation.0,
        );
        assert!(
            next.0 > last.0 && next.1 > last.1 && next.2 > last.2 && next.3 > last.3 && next.4 > last.4,
            "{next:?} after {last:?}"
        );
        assert!(meta.forgotten >= known.revision, "watchers must list again");
        last = next;
        drop((state, db));
        free(dir.path()).await;
    }
}

#[tokio::test]
async fn a_file_that_is_damaged_or_another_sites_or_no_backup_restores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    drop(site(dir.path()).await);
    free(dir.path()).await;
    let file = dir.path().join("b");
    backup(dir.path(), &file, NOW).unwrap();
    let before = load(dir.path());
    let try_it = |cluster| restore(dir.path(), &file, cluster, None, NOW);
    let other = ClusterId::from_uuid(uuid::Uuid::from_u128(77));
    assert!(matches!(try_it(other), Err(Error::OtherSite { .. })));
    Connection::open(&file)
        .unwrap()
        .execute("UPDATE vms SET value = replace(value, 'web', 'wob')", [])
        .unwrap();
    assert!(matches!(
        try_it(fixtures::cluster_id()),
        Err(Error::Damaged { .. })
    ));
    fs::copy(dir.path().join(DATABASE), dir.path().join("c")).unwrap();
    assert!(matches!(verify(&dir.path().join("c")), Err(Error::NotABackup(_))));
    assert_eq!(load(dir.path()), before);
}

#[tokio::test]
async fn a_restore_that_was_broken_off_keeps_the_controller_from_starting_and_can_be_run_again() {
    let dir = tempfile::tempdir().unwrap();
    drop(site(dir.path()).await);
    free(dir.path()).await;
    let file = dir.path().join("b");
    backup(dir.path(), &file, NOW).unwrap();
    let database = dir.path().join(DATABASE);
    fs::write(sqlite::restoring(&database), "half").unwrap();
    fs::rename(&database, dir.path().join("dalgu-before-restore-1.db")).unwrap();
    assert!(matches!(
        Sqlite::open(&database),
        Err(store::Error::RestoreUnfinished { .. })
    ));
    let done = restore(dir.path(), &file, fixtures::cluster_id(), None, NOW).unwrap();
    assert_eq!((done.kept, done.meta.incarnation), (None, 2));
    assert!(!load(dir.path()).records.is_empty());
}

#[tokio::test]
async fn a_migration_under_way_in_a_backup_has_ended_when_it_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    let db = site(dir.path()).await;
    db.change(|tx| {
        let vm = tx.vms.values().next().unwrap().clone();
        tx.put_migration(fixtures::migration(&vm, "h2"));
    })
    .await;
    let file = dir.path().join("b");
    backup(dir.path(), &file, NOW).unwrap();
    drop(db);
    free(dir.path()).await;
    restore(dir.path(), &file, fixtures::cluster_id(), None, NOW).unwrap();
    let store = Sqlite::open(&dir.path().join(DATABASE)).unwrap();
    let db = Db::open(store, fixtures::cluster_id(), Hooks::default()).unwrap();
    assert!(db.snapshot().active_migrations.is_empty());
}

#[tokio::test]
async fn a_backup_that_an_earlier_version_made_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    let earlier = include_str!("../state/samples/schema-1.sql");
    Connection::open(dir.path().join(DATABASE))
        .unwrap()
        .execute_batch(earlier)
        .unwrap();
    let to = dir.path().join("earlier.backup");
    let made = backup(dir.path(), &to, NOW).unwrap();
    let (image, read) = verify(&to).unwrap();
    assert_eq!((read, image.records.is_empty()), (made, false));
    restore(dir.path(), &to, fixtures::cluster_id(), None, NOW).unwrap();
    let records = load(dir.path()).records;
    let vms = records.iter().filter(|(table, ..)| *table == store::Table::Vms);
    assert_eq!(vms.count(), 1);
}
