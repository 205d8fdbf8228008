//! A database of each schema, as it was recorded: every later version must go on reading them.
//!
//! `UPDATE_STORE_SAMPLE=1 cargo nextest run -p dalgu-controller sample` records the present one; one of a released version
//! is never recorded again.

use std::{fmt::Write as _, path::PathBuf};

use dalgu_proto::placement::Rule;

use super::{Db, Hooks};
use crate::{
    backups::tests,
    fixtures,
    model::{BackupState, OperationKind, Outcome, RequestRecord},
    store::{Image, Store, Table, memory::Disk, sqlite::Sqlite},
};

/// Each with the images, the networks and groups, the volumes, backups and schedules, and the placement groups and plans in it.
const SAMPLES: [(&str, usize, usize, usize, usize); 6] = [
    (include_str!("samples/schema-1.sql"), 0, 0, 0, 0),
    (include_str!("samples/schema-2.sql"), 1, 0, 0, 0),
    (include_str!("samples/schema-3.sql"), 1, 1, 0, 0),
    (include_str!("samples/schema-4.sql"), 1, 1, 1, 0),
    (include_str!("samples/schema-5.sql"), 1, 1, 1, 1),
    (include_str!("samples/schema-6.sql"), 1, 1, 1, 1),
];

/// The site that the sample is of: one record of each kind.
async fn site() -> Image {
    let disk = Disk::default();
    let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
    let mut vm = fixtures::vm_in("field", &["ssh"], "web", "h1");
    vm.placement_groups.insert("apart".parse().unwrap());
    let migration = fixtures::migration(&vm, "h2");
    let backup = tests::backup(&vm, 1, 0, BackupState::Available, None);
    let plan = fixtures::plan(&vm, "h2");
    db.change(|tx| {
        tx.put_plan(plan);
        tx.put_host(fixtures::host("h1"));
        tx.put_host(fixtures::host("h2"));
        tx.put_operation(fixtures::operation(&vm, OperationKind::Migrate, None));
        let usage = fixtures::usage(vm.id);
        tx.put_vm(vm);
        tx.put_usage(usage);
        tx.put_migration(migration);
        tx.put_image(fixtures::image("12", 1));
        tx.put_network(fixtures::overlay("field", 7));
        tx.put_group(fixtures::group("ssh", &["ssh"]));
        tx.put_volume(fixtures::volume("ledger", Some("h1")));
        tx.put_backup(backup);
        tx.put_schedule(tests::schedule("nightly"));
        tx.put_placement_group(fixtures::placement_group(
            "apart",
            Rule::AntiAffinity,
            Some("rack"),
        ));
        tx.put_refused_placement(fixtures::refused("late"));
        tx.put_request(RequestRecord {
            key: "operator/x/1".into(),
            body: "b".into(),
            outcome: Outcome::HostDeleted,
            time: tx.now(),
        });
        tx.event(crate::model::EventKind::Vm, "VmCreated", "web", "it's made", None);
    })
    .await;
    disk.open().load().unwrap()
}

fn sql(image: &Image) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let mut text =
        "CREATE TABLE events (revision INTEGER PRIMARY KEY, value TEXT NOT NULL) STRICT;\n".to_owned();
    for table in Table::ALL {
        let table = table.as_str();
        writeln!(
            text,
            "CREATE TABLE {table} (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;"
        )
        .unwrap();
    }
    for (table, key, value) in &image.records {
        let table = table.as_str();
        writeln!(
            text,
            "INSERT INTO {table} VALUES ({}, {});",
            quoted(key),
            quoted(value)
        )
        .unwrap();
    }
    for (revision, value) in &image.events {
        writeln!(text, "INSERT INTO events VALUES ({revision}, {});", quoted(value)).unwrap();
    }
    text + "PRAGMA user_version = 6;\n"
}

#[tokio::test]
async fn a_database_that_an_earlier_version_wrote_is_read_whole() {
    if std::env::var_os("UPDATE_STORE_SAMPLE").is_some() {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/state/samples/schema-6.sql");
        std::fs::write(path, sql(&site().await)).unwrap();
        return;
    }
    for (sample, images, networks, stored, placed) in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        rusqlite::Connection::open(&path)
            .unwrap()
            .execute_batch(sample)
            .unwrap();
        let store = Sqlite::open(&path).unwrap();
        let db = Db::open(store, fixtures::cluster_id(), Hooks::default()).unwrap();
        let state = db.snapshot();
        let count = [
            state.vms.len(),
            state.hosts.len(),
            state.operations.len(),
            state.active_migrations.len(),
            state.requests.len(),
            state.events.len(),
            state.images.len(),
            state.networks.len(),
            state.groups.len(),
            state.volumes.len(),
            state.backups.len(),
            state.schedules.len(),
            state.placement_groups.len(),
            state.placement_members.len(),
            state.plans.len(),
        ];
        assert_eq!(
            count,
            [
                1, 2, 1, 1, 1, 1, images, networks, networks, stored, stored, stored, placed, placed, placed
            ]
        );
        let vm = state.vms.values().next().unwrap();
        assert_eq!((vm.name.as_str(), vm.owner.as_str()), ("web", "h1"));
        assert_eq!(state.reserved[&vm.owner].vms, 1);
        assert_eq!(state.members.len(), networks);
        let refused = usize::from(sample.contains("INTO refused_placements"));
        assert_eq!(
            (state.refused_placements.len(), state.usage.len()),
            (refused, refused)
        );
        assert_eq!(state.meta.term.0, 2, "the recorded one's next");
    }
}
