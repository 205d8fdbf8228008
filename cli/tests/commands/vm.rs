//! `dalgu vm`: what creates, changes and shows VMs.

use std::collections::HashMap;

use dalgu_proto::{reason, v1};
use tonic::Code;
use v1::MigrationPhase as Phase;

use super::{ID, Kind, State, common::Controller, operation, page, vm};

#[tokio::test]
async fn create_waits_and_says_where_the_vm_is() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::CreateVm, State::Pending)));
        let mut running = operation(Kind::CreateVm, State::Running);
        running.status_message = "making disks".into();
        script.waits = [Ok(running), Ok(operation(Kind::CreateVm, State::Succeeded))].into();
        script.vms.push_back(Ok(vm("web", "h2")));
    }
    let outcome = controller
        .run(&["vm", "create", "web", "--disk", "root=1GiB"])
        .await;
    assert_eq!((outcome.code, outcome.out.as_str()), (0, ""));
    insta::assert_snapshot!(outcome.err, @r"
    creating web: accepted
    creating web: making disks
    created web on h2 in 2.0 s
    ");
}

#[tokio::test]
async fn creating_a_copy_says_which_mac_addresses_are_not_copied() {
    let controller = Controller::start();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.yaml");
    let shown = "name: old\nspec: {vcpus: 1, memoryMib: '256', nics: [{name: eth0, bridge: br0, mac: '52:54:00:00:00:01'}]}";
    std::fs::write(&path, shown).unwrap();
    let pending = || Ok(operation(Kind::CreateVm, State::Pending));
    controller.fake.script().changes = [pending(), pending()].into();
    let file = path.to_str().unwrap();
    let copy = controller
        .run(&["vm", "create", "web", "-f", file, "--no-wait"])
        .await;
    assert_eq!((copy.code, copy.out), (0, format!("{ID}\n")));
    let note = "new addresses are given in place of those of old: eth0 52:54:00:00:00:01\n";
    assert!(copy.err.starts_with(note), "{}", copy.err);
    let same = controller.run(&["vm", "create", "-f", file, "--no-wait"]).await;
    assert!(same.code == 0 && !same.err.contains("MAC"), "{}", same.err);
}

#[tokio::test]
async fn a_list_is_put_together_from_all_its_pages() {
    let controller = Controller::start();
    let first = v1::ListVmsResponse {
        vms: vec![vm("a", "h1")],
        next_page_token: "t".into(),
        resource_version: 3,
    };
    controller.fake.script().lists = [Ok(first), page(vec![vm("b", "h2")], 4)].into();
    let outcome = controller.run(&["vm", "list", "-o", "name"]).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (0, "a\nb\n"));
    assert_eq!(
        controller.fake.script().seen,
        [r#"list_vms """#, r#"list_vms "t""#]
    );
}

#[tokio::test]
async fn an_update_keeps_other_labels_and_tries_again_when_it_was_overtaken() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let labelled = |etag: &str, labels: &[&str]| {
            let labels = labels
                .iter()
                .map(|key| ((*key).to_owned(), "1".to_owned()))
                .collect();
            Ok(v1::Vm {
                etag: etag.into(),
                labels,
                ..vm("web", "h1")
            })
        };
        script.vms = [labelled("e1", &["a", "b"]), labelled("e2", &["a", "b", "c"])].into();
        let overtaken = reason::status(Code::Aborted, "ETAG_MISMATCH", "changed");
        script.updates = [Err(overtaken), Ok(vm("web", "h1"))].into();
    }
    let outcome = controller
        .run(&["vm", "update", "web", "--label", "a=2", "--label", "b-"])
        .await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "changed web\n"));
    let seen = &controller.fake.script().seen;
    assert_eq!(
        seen,
        &[
            r#"update_vm e1 ["labels"] ["a=2"]"#,
            r#"update_vm e2 ["labels"] ["a=2", "c=1"]"#
        ]
    );
}

#[tokio::test]
async fn a_migration_shows_its_phases_and_how_long_the_guest_stood_still() {
    let controller = Controller::start();
    let at = |phase: Phase, state: State| {
        let mut operation = operation(Kind::MigrateVm, state);
        operation.migration = Some(v1::MigrationProgress {
            phase: phase.into(),
            source_host: "h1".into(),
            destination_host: "h2".into(),
            downtime_ms: if state == State::Succeeded { 84 } else { 0 },
            ..Default::default()
        });
        operation
    };
    {
        let mut script = controller.fake.script();
        script.changes.push_back(Ok(at(Phase::Reserving, State::Pending)));
        script.waits = [
            Ok(at(Phase::PreparingDestination, State::Running)),
            Ok(at(Phase::CuttingOver, State::Running)),
            Ok(at(Phase::Done, State::Succeeded)),
        ]
        .into();
    }
    let outcome = controller.run(&["vm", "migrate", "web", "--to", "h2"]).await;
    assert_eq!(outcome.code, 0);
    insta::assert_snapshot!(outcome.err, @r"
    migrating web: reserving, h1 -> h2
    migrating web: preparing destination, h1 -> h2
    migrating web: cutting over, h1 -> h2
    migrated web in 2.0 s: h1 -> h2, guest stopped for 84 ms
    ");
}

#[tokio::test]
async fn no_capacity_shows_what_each_host_lacks() {
    let controller = Controller::start();
    let facts = [
        ("h2", "CPU: needs 4, has 1 free of 8"),
        (
            "h1",
            "MEMORY: needs 4096 MiB, has 1024 MiB free of 8192 MiB; CORDON: closed for VMs",
        ),
        ("hint", "free 3072 MiB on h1"),
    ];
    let facts: HashMap<_, _> = facts
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let status = reason::status_with(
        Code::ResourceExhausted,
        "NO_CAPACITY",
        "no host can take web",
        facts,
    );
    controller.fake.script().changes.push_back(Err(status));
    let outcome = controller
        .run(&["vm", "create", "web", "--memory", "4GiB", "--disk", "root=1GiB"])
        .await;
    assert_eq!(outcome.code, 5);
    insta::assert_snapshot!(outcome.err, @r"
    error: no host can take web (NO_CAPACITY)
      HOST   WHY NOT
      h1     MEMORY: needs 4096 MiB, has 1024 MiB free of 8192 MiB; CORDON: closed for VMs
      h2     CPU: needs 4, has 1 free of 8
    hint: free 3072 MiB on h1; `dalgu explain` with the same flags (of a move: `dalgu explain NAME --move`) shows each host's numbers
    ");
}

#[tokio::test]
async fn the_console_is_copied_as_it_is() {
    let controller = Controller::start();
    controller.fake.script().console = vec![b"tick 1\r\n", b"\x1b[0mtick 2\r\n"];
    let outcome = controller
        .run(&["vm", "console", "web", "--follow", "--tail", "4KiB"])
        .await;
    assert_eq!(
        (outcome.code, outcome.out.as_str()),
        (0, "tick 1\r\n\x1b[0mtick 2\r\n")
    );
    assert_eq!(outcome.err, "the console has ended\n");
    assert_eq!(controller.fake.script().seen, ["read_console web 4096 true"]);
}

#[tokio::test]
async fn many_of_one_description_are_created_at_once_and_each_refusal_is_told() {
    let controller = Controller::start();
    let pending = || Ok(operation(Kind::CreateVm, State::Pending));
    let none = || {
        Err(reason::status(
            Code::ResourceExhausted,
            "NO_CAPACITY",
            "no host has room",
        ))
    };
    controller.fake.script().changes = [pending(), pending(), none()].into();
    let many = ["vm", "create", "web", "--count", "3", "--no-wait"];
    let outcome = controller.run(&many).await;
    assert_eq!((outcome.code, outcome.out), (5, format!("{ID}\n{ID}\n")));
    assert!(
        outcome.err.contains("web-3: no host has room\n")
            && outcome.err.contains("1 of 3 VMs were not created"),
        "{}",
        outcome.err
    );
    let seen = controller.fake.script().seen.clone();
    let names = ["web-1", "web-2", "web-3"].map(|name| format!("batch_create_vms {name} "));
    assert_eq!(seen, names);
    let alone = controller.run(&["vm", "create", "web", "--all-or-nothing"]).await;
    assert_eq!(alone.code, 2, "{}", alone.err);
}
