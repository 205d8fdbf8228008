//! `dalgu host`.

use std::collections::HashMap;

use dalgu_proto::v1;

use super::common::Controller;

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

fn drained(state: v1::DrainState, vms: Vec<v1::DrainedVm>) -> v1::Host {
    v1::Host {
        name: "h1".into(),
        drain: Some(v1::HostDrain {
            state: state.into(),
            begin_time: Some(prost_types::Timestamp::default()),
            summary: format!("VMs: {}", vms.len()),
            vms,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn drained_vm(name: &str, state: v1::DrainedVmState, to: &str) -> v1::DrainedVm {
    v1::DrainedVm {
        vm: name.into(),
        mode: v1::DrainMode::LiveMigrate.into(),
        state: state.into(),
        host: to.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_drain_is_followed_to_its_end_and_each_change_is_told_once() {
    use v1::{DrainState, DrainedVmState as State};
    let controller = Controller::start();
    let moving = vec![drained_vm("web", State::Moving, "h2")];
    let moved = vec![drained_vm("web", State::Moved, "h2")];
    for host in [
        drained(DrainState::Active, moving.clone()),
        drained(DrainState::Active, moving),
        drained(DrainState::Done, moved),
    ] {
        controller.fake.script().hosts.push_back(Ok(host));
    }
    let outcome = controller
        .run(&["host", "drain", "h1", "--deadline", "90s", "--mode", "stop"])
        .await;
    assert_eq!(
        (outcome.code, outcome.err.as_str()),
        (0, "web: moving to h2\nweb: moved to h2\nh1 is drained; VMs: 1\n")
    );
    let seen = controller.fake.script().seen.clone();
    assert_eq!(
        seen,
        [
            "drain_host h1 90 DRAIN_MODE_STOP false",
            "get_host h1",
            "get_host h1"
        ]
    );
}

#[tokio::test]
async fn a_drain_that_is_blocked_says_what_can_be_done_and_fails() {
    use v1::{DrainState, DrainedVmState as State};
    let controller = Controller::start();
    let blocked = v1::DrainedVm {
        error: Some(v1::OperationError {
            code: 9,
            reason: "ASKS".into(),
            message: "web is not to be moved".into(),
        }),
        options: vec!["dalgu vm stop web".into(), "dalgu vm migrate web".into()],
        ..drained_vm("web", State::Blocked, "")
    };
    let host = drained(DrainState::Blocked, vec![blocked]);
    controller.fake.script().hosts.push_back(Ok(host.clone()));
    let outcome = controller.run(&["host", "drain", "h1"]).await;
    assert_eq!(outcome.code, 8);
    assert_eq!(
        outcome.err,
        "web: blocked: web is not to be moved (ASKS)\nerror: h1 is not drained; VMs: 1\n  web: dalgu vm stop web, or dalgu vm \
         migrate web\n"
    );
    controller.fake.script().hosts.push_back(Ok(host));
    let outcome = controller.run(&["host", "drain", "h1", "--dry-run"]).await;
    assert_eq!(outcome.code, 0);
    assert!(outcome.out.contains("web is not to be moved"), "{}", outcome.out);
    assert_eq!(outcome.err, "nothing was changed; h1 would have VMs: 1\n");
}
