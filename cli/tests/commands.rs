//! Whole commands against a controller that answers from a script: what they ask, what they show, how they end.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::{collections::HashMap, time::Duration};

use common::{Controller, ago};
use dalgu_proto::{reason, v1};
use tonic::{Code, Status};
use v1::{MigrationPhase as Phase, OperationKind as Kind, OperationState as State};

const ID: &str = "6f2c3c5e-0000-4000-8000-000000000001";

fn operation(kind: Kind, state: State) -> v1::Operation {
    let ended = matches!(state, State::Succeeded | State::Failed | State::Cancelled);
    v1::Operation {
        id: ID.into(),
        kind: kind.into(),
        state: state.into(),
        vm: "web".into(),
        create_time: ago(10),
        end_time: if ended { ago(8) } else { None },
        ..Default::default()
    }
}

fn vm(name: &str, host: &str) -> v1::Vm {
    let status = v1::VmStatus {
        state: v1::VmState::Running.into(),
        host: host.into(),
        ..Default::default()
    };
    let spec = v1::VmSpec {
        vcpus: 1,
        memory_mib: 256,
        ..Default::default()
    };
    v1::Vm {
        name: name.into(),
        spec: Some(spec),
        status: Some(status),
        create_time: ago(200),
        ..Default::default()
    }
}

fn page(vms: Vec<v1::Vm>, resource_version: u64) -> Result<v1::ListVmsResponse, Status> {
    Ok(v1::ListVmsResponse {
        vms,
        next_page_token: String::new(),
        resource_version,
    })
}

fn event(resource_version: u64, subject: &str, vm: Option<v1::Vm>) -> Result<v1::Event, Status> {
    Ok(v1::Event {
        resource_version,
        time: ago(1),
        kind: v1::EventKind::Vm.into(),
        reason: "VmChanged".into(),
        subject: subject.into(),
        object: vm.map(v1::event::Object::Vm),
        ..Default::default()
    })
}

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
    let note = "new MAC addresses are made in place of those of old: eth0 52:54:00:00:00:01\n";
    assert!(copy.err.starts_with(note), "{}", copy.err);
    let same = controller.run(&["vm", "create", "-f", file, "--no-wait"]).await;
    assert!(same.code == 0 && !same.err.contains("MAC"), "{}", same.err);
}

#[tokio::test]
async fn a_request_is_repeated_with_its_id_while_the_controller_is_away() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.changes = [
            Err(Status::unavailable("starting")),
            Err(Status::unavailable("starting")),
            Ok(operation(Kind::StartVm, State::Pending)),
        ]
        .into();
    }
    let outcome = controller.run(&["vm", "start", "web", "--no-wait"]).await;
    assert_eq!((outcome.code, outcome.out), (0, format!("{ID}\n")));
    let seen = &controller.fake.script().seen;
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|call| *call == seen[0]), "{seen:?}");
    assert_eq!(
        seen[0].split(' ').nth(2).unwrap().len(),
        36,
        "no request id in {seen:?}"
    );
}

#[tokio::test]
async fn an_error_that_is_no_lost_connection_is_not_repeated() {
    let controller = Controller::start();
    controller
        .fake
        .script()
        .changes
        .push_back(Err(reason::status(Code::Internal, "STORE", "disk full")));
    let outcome = controller.run(&["vm", "start", "web"]).await;
    assert_eq!(
        (outcome.code, outcome.err.as_str()),
        (1, "error: disk full (STORE)\n")
    );
    assert_eq!(controller.fake.script().seen.len(), 1);
}

#[tokio::test]
async fn waiting_outlives_a_controller_that_is_killed_and_comes_back() {
    let mut controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::StopVm, State::Pending)));
        script.hang = true;
    }
    let fake = controller.fake.clone();
    let command = controller.command(&["vm", "stop", "web"]);
    let restart = async {
        let asked = || fake.script().seen.iter().any(|call| call == "wait_operation");
        while !asked() {
            tokio::task::yield_now().await;
        }
        controller.kill();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut script = fake.script();
        script.hang = false;
        script
            .waits
            .push_back(Ok(operation(Kind::StopVm, State::Succeeded)));
        drop(script);
        controller.serve();
    };
    let (outcome, ()) = tokio::join!(command, restart);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    insta::assert_snapshot!(outcome.err, @r"
    stopping web: accepted
    the connection to the controller was lost; trying again
    connected again
    stopped web in 2.0 s
    ");
}

#[tokio::test]
async fn giving_up_waiting_says_how_to_go_on() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::StopVm, State::Running)));
        script
            .waits
            .push_back(Ok(operation(Kind::StopVm, State::Running)));
    }
    let outcome = controller.run(&["vm", "stop", "web", "--timeout", "200ms"]).await;
    assert_eq!(outcome.code, 7);
    insta::assert_snapshot!(outcome.err, @r"
    stopping web
    error: operation 6f2c3c5e-0000-4000-8000-000000000001 has not ended within 200 ms; it goes on
    hint: wait for it with `dalgu op wait 6f2c3c5e-0000-4000-8000-000000000001`, or give it up with `dalgu op cancel 6f2c3c5e-0000-4000-8000-000000000001`
    ");
}

#[tokio::test]
async fn an_interruption_leaves_the_operation_alone_and_says_so() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script
            .changes
            .push_back(Ok(operation(Kind::MigrateVm, State::Running)));
        script
            .waits
            .push_back(Ok(operation(Kind::MigrateVm, State::Running)));
    }
    let interrupt = |term: &mut dalgu::output::Term| {
        term.interrupt = || Box::pin(tokio::time::sleep(Duration::from_millis(100)));
    };
    let outcome = controller.run_on(&["vm", "migrate", "web"], interrupt).await;
    assert_eq!(outcome.code, 130);
    assert!(
        outcome.err.contains(&format!(
            "error: interrupted; operation {ID} goes on\nhint: wait for it with `dalgu op wait {ID}`"
        )),
        "{}",
        outcome.err
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
async fn an_operation_that_fails_fails_the_command() {
    let controller = Controller::start();
    let mut failed = operation(Kind::StartVm, State::Failed);
    let error = v1::OperationError {
        code: 13,
        reason: "START_FAILED".into(),
        message: "no such bridge br7".into(),
    };
    failed.error = Some(error);
    controller.fake.script().changes.push_back(Ok(failed));
    let outcome = controller.run(&["vm", "start", "web", "-o", "json"]).await;
    assert_eq!(outcome.code, 8);
    assert!(
        outcome.out.contains("\"OPERATION_STATE_FAILED\""),
        "{}",
        outcome.out
    );
    insta::assert_snapshot!(outcome.err, @r"
    error: starting web failed: no such bridge br7 (START_FAILED)
    hint: `dalgu vm events web` shows what happened
    ");
}

#[tokio::test]
async fn an_operation_that_has_ended_is_told_and_not_waited_for() {
    let controller = Controller::start();
    controller.fake.script().waits = [
        Ok(operation(Kind::StopVm, State::Succeeded)),
        Ok(operation(Kind::StopVm, State::Failed)),
    ]
    .into();
    let on_a_screen = |term: &mut dalgu::output::Term| {
        term.err_screen = true;
        // Asked for where waiting begins, together with the bar.
        term.interrupt = || panic!("it waits");
    };
    let done = controller.run_on(&["op", "wait", ID], on_a_screen).await;
    assert_eq!((done.code, done.err.as_str()), (0, "stopped web in 2.0 s\n"));
    let failed = controller.run_on(&["op", "wait", ID], on_a_screen).await;
    assert_eq!(failed.code, 8, "{}", failed.err);
    assert!(
        failed.err.starts_with("error: stopping web failed"),
        "{}",
        failed.err
    );
    assert!(controller.fake.script().seen.is_empty());
}

#[tokio::test]
async fn cancelling_succeeds_when_the_operation_ends_cancelled() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let ended = || Ok(operation(Kind::MigrateVm, State::Succeeded));
        script.cancels = [Ok(operation(Kind::MigrateVm, State::Cancelled)), ended()].into();
    }
    assert_eq!(controller.run(&["op", "cancel", ID]).await.code, 0);
    let late = controller.run(&["op", "cancel", ID]).await;
    assert_eq!(late.code, 5, "{}", late.err);
}

#[tokio::test]
async fn cancelling_what_has_ended_is_an_error_unless_it_ended_cancelled() {
    let refused = |why: &str| Err(reason::status(Code::FailedPrecondition, "NOT_CANCELLABLE", why));
    let controller = Controller::start();
    let states = [
        State::Cancelled,
        State::Cancelled,
        State::Succeeded,
        State::Failed,
    ];
    {
        let mut script = controller.fake.script();
        script.cancels = states.map(|_| refused("operation has ended already")).into();
        script.waits = states.map(|state| Ok(operation(Kind::MigrateVm, state))).into();
    }
    let cancel = ["op", "cancel", ID];
    let again = controller.run(&cancel).await;
    assert_eq!(
        (again.code, again.out.as_str(), again.err),
        (0, "", format!("{ID} was already cancelled\n"))
    );
    let again = controller
        .run(&["op", "cancel", ID, "--no-wait", "-o", "json"])
        .await;
    assert_eq!(again.code, 0, "{}", again.err);
    assert!(
        again.out.contains("\"OPERATION_STATE_CANCELLED\""),
        "{}",
        again.out
    );
    for end in ["succeeded", "failed"] {
        let late = controller.run(&cancel).await;
        let wanted = format!("error: operation {ID} had {end} before it could be cancelled\n");
        assert_eq!((late.code, late.err), (5, wanted));
    }
}

#[tokio::test]
async fn an_operation_that_goes_on_and_cannot_be_cancelled_is_refused_with_the_reason() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let why = "the migration has cut over and cannot be cancelled";
        let refused = || Err(reason::status(Code::FailedPrecondition, "NOT_CANCELLABLE", why));
        script.cancels = [refused(), refused()].into();
        script
            .waits
            .push_back(Ok(operation(Kind::MigrateVm, State::Running)));
        script.waits.push_back(Err(Status::internal("unreadable")));
    }
    for _ in 0..2 {
        let outcome = controller.run(&["op", "cancel", ID]).await;
        assert_eq!(outcome.code, 5);
        assert!(
            outcome.err.starts_with(
                "error: the migration has cut over and cannot be cancelled (NOT_CANCELLABLE)\nhint: "
            ),
            "{}",
            outcome.err
        );
    }
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
async fn every_kind_of_refusal_has_its_exit_code_and_a_next_step() {
    let cases = [
        (Code::NotFound, "VM_NOT_FOUND", 3, "dalgu vm list"),
        (Code::AlreadyExists, "VM_ALREADY_EXISTS", 4, "another name"),
        (Code::AlreadyExists, "REQUEST_ID_REUSED", 4, "--request-id"),
        (Code::AlreadyExists, "MAC_IN_USE", 4, "leave `mac` out"),
        (Code::FailedPrecondition, "MAC_IN_USE", 5, "leave `mac` out"),
        (Code::Aborted, "ETAG_MISMATCH", 4, "dalgu vm show"),
        (Code::FailedPrecondition, "VM_RUNNING", 5, "--force"),
        (Code::FailedPrecondition, "VM_NOT_RUNNING", 5, "dalgu vm resume"),
        (Code::FailedPrecondition, "SAME_HOST", 5, "--to"),
        (
            Code::FailedPrecondition,
            "MIGRATION_IN_PROGRESS",
            5,
            "dalgu op list --active",
        ),
        (Code::ResourceExhausted, "BUSY", 5, "try again"),
        (Code::PermissionDenied, "NOT_ALLOWED", 6, "dalgu context show"),
        (Code::Unauthenticated, "NO_CERTIFICATE", 6, "dalgu context show"),
    ];
    let controller = Controller::start();
    for (code, why, exit, step) in cases {
        controller
            .fake
            .script()
            .changes
            .push_back(Err(reason::status(code, why, "no")));
        let outcome = controller.run(&["vm", "delete", "web"]).await;
        assert_eq!(outcome.code, exit, "{why}: {}", outcome.err);
        let hint = outcome.err.lines().nth(1).unwrap_or_default();
        assert!(
            hint.starts_with("hint: ") && hint.contains(step),
            "{why}: {}",
            outcome.err
        );
    }
    controller
        .fake
        .script()
        .changes
        .push_back(Err(reason::invalid("vm.spec.vcpus", "must be 1 to 254, got 0")));
    let outcome = controller.run(&["vm", "create", "web", "--vcpus", "0"]).await;
    assert_eq!(
        (outcome.code, outcome.err.as_str()),
        (
            2,
            "error: vm.spec.vcpus: must be 1 to 254, got 0 (INVALID_FIELD)\n"
        )
    );
}

#[tokio::test]
async fn a_controller_that_is_not_there_is_named_with_a_next_step() {
    let mut controller = Controller::start();
    controller.kill();
    let outcome = controller.run(&["vm", "list"]).await;
    assert_eq!(outcome.code, 6);
    assert!(
        outcome
            .err
            .starts_with("error: cannot reach the controller at unix:/"),
        "{}",
        outcome.err
    );
    assert!(
        outcome.err.contains("hint: there is no such socket") && outcome.err.contains("dalgu context show"),
        "{}",
        outcome.err
    );
}

#[tokio::test]
async fn a_missing_configuration_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    let outcome = common::run(&config, &["--context", "lab"], &["vm", "list"], |_| {}).await;
    assert_eq!(outcome.code, 2);
    let shown = outcome.err.replace(dir.path().to_str().unwrap(), "DIR");
    insta::assert_snapshot!(shown, @r"
    error: no configuration: DIR/config.toml does not exist
    hint: write DIR/config.toml (`dalgu context --help` shows an example), or name a controller with --endpoint
    ");
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
async fn a_watch_goes_on_where_it_broke_and_lists_again_when_that_is_too_long_ago() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.lists = [
            page(vec![vm("a", "h1"), vm("b", "h1")], 10),
            page(vec![vm("a", "h2"), vm("c", "h1")], 20),
        ]
        .into();
        let lost = || Err(Status::unavailable("going down"));
        let expired = reason::status(Code::OutOfRange, "RESOURCE_VERSION_EXPIRED", "list again");
        script.streams = [
            Ok(vec![event(11, "a", Some(vm("a", "h2"))), lost()]),
            Ok(vec![Err(expired)]),
            Ok(vec![
                event(21, "c", None),
                Err(reason::status(Code::PermissionDenied, "NOT_ALLOWED", "enough")),
            ]),
        ]
        .into();
    }
    let outcome = controller.run(&["vm", "list", "--watch"]).await;
    assert_eq!(outcome.code, 6, "{}", outcome.err);
    let script = controller.fake.script();
    let calls: Vec<_> = script.seen.iter().map(String::as_str).collect();
    assert_eq!(
        calls,
        [
            r#"list_vms """#,
            r#"watch_events 10 """#,
            r#"watch_events 11 """#,
            r#"list_vms """#,
            r#"watch_events 20 """#
        ]
    );
    insta::assert_snapshot!(outcome.out, @r"
    NAME   STATE     HOST   VCPUS   MEMORY    CPU%   AGE
    a      Running   h1     1       256 MiB   -      3m20s
    b      Running   h1     1       256 MiB   -      3m20s
    a      Running   h2     1       256 MiB   -      3m20s
    c      Running   h1     1       256 MiB   -      3m20s
    ");
    insta::assert_snapshot!(outcome.err, @r"
    the connection to the controller was lost; trying again
    b is gone
    c is gone
    error: enough (NOT_ALLOWED)
    hint: `dalgu context show` says which certificate is used
    ");
}

#[tokio::test]
async fn watching_one_vm_gives_json_lines_and_ends_with_it() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.vms = [Ok(vm("a", "h1")), Ok(vm("a", "h1"))].into();
        script
            .lists
            .push_back(page(vec![vm("a", "h1"), vm("b", "h1")], 10));
        script.streams.push_back(Ok(vec![
            event(11, "b", Some(vm("b", "h9"))),
            event(12, "a", Some(vm("a", "h1"))),
            event(13, "a", Some(vm("a", "h2"))),
            event(14, "a", None),
        ]));
    }
    let outcome = controller
        .run(&["vm", "show", "a", "--watch", "-o", "json"])
        .await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let lines: Vec<serde_json::Value> = outcome
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let hosts: Vec<_> = lines.iter().map(|line| line["status"]["host"].as_str()).collect();
    assert_eq!(hosts, [Some("h1"), Some("h2"), None]);
    assert_eq!(lines[2], serde_json::json!({ "name": "a", "deleted": true }));
}

#[tokio::test]
async fn a_screen_is_redrawn_instead_of_added_to() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.lists.push_back(page(vec![vm("a", "h1")], 10));
        let end = reason::status(Code::PermissionDenied, "NOT_ALLOWED", "enough");
        script
            .streams
            .push_back(Ok(vec![event(11, "a", Some(vm("a", "h2"))), Err(end)]));
    }
    let outcome = controller
        .run_on(&["vm", "list", "--watch"], |term| term.out_screen = true)
        .await;
    let pictures: Vec<_> = outcome.out.split("\x1b[H").skip(1).collect();
    assert_eq!(pictures.len(), 2, "{:?}", outcome.out);
    assert!(
        pictures[1].contains("h2") && !pictures[1].contains("h1"),
        "{pictures:?}"
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
async fn events_are_listed_oldest_first_and_followed_from_the_newest() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let events = vec![event(8, "web", None).unwrap(), event(5, "web", None).unwrap()];
        script.events.push_back(Ok(v1::ListEventsResponse {
            events,
            next_page_token: String::new(),
        }));
        let end = reason::status(Code::PermissionDenied, "NOT_ALLOWED", "enough");
        script
            .streams
            .push_back(Ok(vec![event(9, "web", None), Err(end)]));
    }
    let outcome = controller
        .run(&["vm", "events", "web", "--follow", "-o", "json"])
        .await;
    let versions: Vec<_> = outcome
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["resourceVersion"].clone())
        .collect();
    assert_eq!(versions, ["5", "8", "9"]);
    assert_eq!(controller.fake.script().seen, [r#"watch_events 8 "web""#]);
}

#[tokio::test]
async fn wrong_usage_is_told_before_anything_is_asked() {
    let controller = Controller::start();
    for args in [
        &["vm", "create", "web", "--memory", "256"][..],
        &["vm", "create", "web", "--disk", "root"],
        &["vm", "create"],
        &["vm", "create", "web", "--initrd", "i"],
        &["vm", "create", "-f", "x.yaml", "--vcpus", "2"],
        &["vm", "stop", "web", "--force", "--grace", "5s"],
        &["vm", "stop", "web", "--grace", "0s"],
        &["vm", "migrate", "web", "--max-downtime", "0ms"],
        &["vm", "start", "web", "--request-id", "x"],
        &["vm", "update", "web"],
        &["explain", "web", "--vcpus", "2"],
        &["host", "label", "h1"],
        &["explain"],
        &["explain", "--memory", "8GiB"],
        &["vm", "create", "web", "--memory", "-5"],
    ] {
        assert_eq!(controller.run(args).await.code, 2, "{args:?}");
    }
    assert!(controller.fake.script().seen.is_empty());
}

#[tokio::test]
async fn watching_one_vm_ends_when_it_is_gone_before_its_end_could_be_told() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let missing = reason::status(Code::NotFound, "VM_NOT_FOUND", "no VM named a");
        script.vms = [Ok(vm("a", "h1")), Ok(vm("a", "h1")), Err(missing)].into();
        script.lists = [page(vec![vm("a", "h1")], 10), page(vec![], 20)].into();
        script.streams.push_back(Err(reason::status(
            Code::OutOfRange,
            "RESOURCE_VERSION_EXPIRED",
            "list again",
        )));
    }
    let outcome = controller.run(&["vm", "show", "a", "--watch"]).await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "a is gone\n"));
}

#[tokio::test]
async fn a_host_is_cordoned_with_a_reason_and_a_request_id() {
    let controller = Controller::start();
    let host = || {
        Ok(v1::Host {
            name: "h1".into(),
            cordoned: true,
            labels: HashMap::from([("rack".into(), "a".into())]),
            etag: "e1".into(),
            ..Default::default()
        })
    };
    controller.fake.script().hosts = (0..4).map(|_| host()).collect();
    let id = "6f2c3c5e-0000-4000-8000-00000000000a";
    let outcome = controller
        .run(&[
            "host",
            "cordon",
            "h1",
            "--reason",
            "new disks",
            "--request-id",
            id,
        ])
        .await;
    assert_eq!((outcome.code, outcome.out.as_str()), (0, ""));
    assert_eq!(
        outcome.err,
        "h1 is cordoned; its VMs run on, and it takes no new ones\n"
    );
    let outcome = controller
        .run(&["host", "uncordon", "h1", "-o", "json", "--request-id", id])
        .await;
    assert!(outcome.out.contains("\"cordoned\": true"), "{}", outcome.out);
    let outcome = controller
        .run(&["host", "label", "h1", "rack-", "zone=b", "--request-id", id])
        .await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let wanted = [
        format!("cordon_host h1 new disks {id}"),
        format!("uncordon_host h1 {id}"),
        "get_host h1".to_owned(),
        format!(r#"update_host h1 e1 ["labels"] {{"zone": "b"}} {id}"#),
    ];
    assert_eq!(controller.fake.script().seen, wanted);
}

#[tokio::test]
async fn explain_asks_about_the_past_the_present_and_the_imagined() {
    let controller = Controller::start();
    let decision = || {
        Ok(v1::Placement {
            host: "h1".into(),
            summary: "only host".into(),
            ..Default::default()
        })
    };
    controller.fake.script().placements = (0..4).map(|_| decision()).collect();
    let outcome = controller.run(&["explain", "web"]).await;
    assert!(
        outcome.out.starts_with("web is on h1: only host\n"),
        "{}",
        outcome.out
    );
    let outcome = controller.run(&["explain", "web", "--host", "h1"]).await;
    assert!(
        outcome.out.starts_with("web would migrate to h1"),
        "{}",
        outcome.out
    );
    assert_eq!(
        controller
            .run(&["explain", "web", "--move", "-o", "name"])
            .await
            .out,
        "h1\n"
    );
    let outcome = controller
        .run(&[
            "explain",
            "--spec",
            "--vcpus",
            "4",
            "--memory",
            "8GiB",
            "--disk",
            "root=1GiB",
            "--host",
            "h2",
        ])
        .await;
    assert!(
        outcome.out.starts_with("a new VM would go to h1"),
        "{}",
        outcome.out
    );
    let wanted = [
        "get_placement web",
        "explain_placement vm web h1",
        "explain_placement vm web ",
        "explain_placement spec 4 8192 h2",
    ];
    assert_eq!(controller.fake.script().seen, wanted);
}
