//! `--watch`, of every noun.

use dalgu_proto::{reason, v1};
use tonic::{Code, Status};

use super::{ID, Kind, State, common::Controller, event, operation, page, vm};

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
async fn watching_one_host_starts_at_the_version_of_its_list_and_ends_with_it() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let host = || v1::Host {
            name: "h1".into(),
            ..Default::default()
        };
        script.hosts = [Ok(host()), Ok(host())].into();
        script.host_lists.push_back(Ok(v1::ListHostsResponse {
            resource_version: 10,
            ..Default::default()
        }));
        let gone = v1::Event {
            resource_version: 11,
            kind: v1::EventKind::Host.into(),
            subject: "h1".into(),
            ..Default::default()
        };
        script.streams.push_back(Ok(vec![Ok(gone)]));
    }
    let outcome = controller
        .run(&["host", "show", "h1", "--watch", "-o", "name"])
        .await;
    assert_eq!(
        (outcome.code, outcome.out.as_str(), outcome.err.as_str()),
        (0, "h1\n", "h1 is gone\n")
    );
    assert_eq!(
        controller.fake.script().seen,
        ["get_host h1", "get_host h1", r#"watch_events 10 "h1""#]
    );
}

#[tokio::test]
async fn watching_one_operation_follows_all_operations_and_shows_its_own() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        let running = || Ok(operation(Kind::StopVm, State::Running));
        script.waits = [running(), running()].into();
        script.operation_lists.push_back(Ok(v1::ListOperationsResponse {
            resource_version: 10,
            ..Default::default()
        }));
        let changed = |resource_version: u64, id: &str, state: State| {
            let operation = v1::Operation {
                id: id.into(),
                ..operation(Kind::StopVm, state)
            };
            Ok(v1::Event {
                resource_version,
                kind: v1::EventKind::Operation.into(),
                operation_id: id.into(),
                object: Some(v1::event::Object::Operation(operation)),
                ..Default::default()
            })
        };
        script.streams.push_back(Ok(vec![
            changed(11, "another", State::Failed),
            changed(12, ID, State::Succeeded),
            Err(reason::status(Code::PermissionDenied, "NOT_ALLOWED", "enough")),
        ]));
    }
    let outcome = controller.run(&["op", "show", ID, "--watch", "-o", "json"]).await;
    let lines: Vec<serde_json::Value> = outcome
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let states: Vec<_> = lines.iter().map(|line| line["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["OPERATION_STATE_RUNNING", "OPERATION_STATE_SUCCEEDED"]);
    assert_eq!(controller.fake.script().seen, [r#"watch_events 10 """#]);
}
