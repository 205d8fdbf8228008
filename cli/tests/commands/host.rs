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

fn maintenance(groups: &[&[&str]]) -> v1::MaintenancePlan {
    let group = |hosts: &&[&str]| v1::MaintenanceGroup {
        hosts: hosts.iter().map(ToString::to_string).collect(),
        moves: 1,
        predicted_seconds: 3.0,
        ..Default::default()
    };
    v1::MaintenancePlan {
        groups: groups.iter().map(group).collect(),
        ..Default::default()
    }
}

/// The VMs of a host: each with its name, what its owner wants and what is seen.
fn list(vms: &[(&str, v1::PowerState, v1::PowerState)]) -> v1::ListVmsResponse {
    let vm = |(name, wanted, seen): &(&str, v1::PowerState, v1::PowerState)| v1::Vm {
        name: (*name).into(),
        desired_power_state: (*wanted).into(),
        status: Some(v1::VmStatus {
            power_state: (*seen).into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    v1::ListVmsResponse {
        vms: vms.iter().map(vm).collect(),
        ..Default::default()
    }
}

fn ready(name: &str, boot_id: &str) -> v1::Host {
    v1::Host {
        name: name.into(),
        state: v1::HostState::Ready.into(),
        boot_id: boot_id.into(),
        cordoned: true,
        ..drained(v1::DrainState::Done, vec![])
    }
}

#[tokio::test]
async fn hosts_are_maintained_group_by_group_and_each_is_empty_while_its_command_runs() {
    let controller = Controller::start();
    let answers = [
        // Closed, drained, empty still, not back yet, back with another start, restored; and the second.
        ready("h1", "1"),
        ready("h1", "1"),
        ready("h1", "1"),
        ready("h1", "1"),
        ready("h1", "2"),
        ready("h1", "2"),
        ready("h2", "1"),
        ready("h2", "1"),
        ready("h2", "1"),
        ready("h2", "2"),
        ready("h2", "2"),
    ];
    for groups in [[["h1"].as_slice(), &["h2"]].as_slice(), &[&["h2"]]] {
        controller
            .fake
            .script()
            .maintenance
            .push_back(Ok(maintenance(groups)));
    }
    controller.fake.script().hosts.extend(answers.map(Ok));
    let off = list(&[("spare", v1::PowerState::Stopped, v1::PowerState::Stopped)]);
    controller.fake.script().lists.extend([Ok(off), Ok(list(&[]))]);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let exec = format!("echo \"$DALGU_HOST\" >> {}", log.display());
    let outcome = controller
        .run(&[
            "host",
            "roll",
            "h1",
            "h2",
            "--exec",
            &exec,
            "--reboots",
            "--max-hosts",
            "1",
        ])
        .await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert_eq!(std::fs::read_to_string(log).unwrap(), "h1\nh2\n");
    let expected = [
        r#"plan_maintenance ["h1", "h2"] 1 false 1"#,
        "cordon_host h1 maintained with others",
        "drain_host h1 0 DRAIN_MODE_UNSPECIFIED false",
        "get_host h1",
        r#"list_vms "" of h1"#,
        "get_host h1",
        "get_host h1",
        "restore_host h1 0",
        r#"plan_maintenance ["h2"] 1 false 1"#,
        "cordon_host h2 maintained with others",
        "drain_host h2 0 DRAIN_MODE_UNSPECIFIED false",
        "get_host h2",
        r#"list_vms "" of h2"#,
        "get_host h2",
        "restore_host h2 0",
    ];
    let seen = controller.fake.script().seen.clone();
    let without_id = seen.iter().map(|call| match call.starts_with("cordon") {
        true => call.rsplit_once(' ').unwrap().0,
        false => call,
    });
    assert_eq!(without_id.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn no_command_runs_on_a_host_that_somebody_opened_meanwhile() {
    let controller = Controller::start();
    let plan = maintenance(&[&["h1"]]);
    controller.fake.script().maintenance.push_back(Ok(plan));
    let opened = v1::Host {
        cordoned: false,
        ..ready("h1", "1")
    };
    for host in [ready("h1", "1"), ready("h1", "1"), opened, ready("h1", "1")] {
        controller.fake.script().hosts.push_back(Ok(host));
    }
    let outcome = controller.run(&["host", "roll", "h1", "--exec", "false"]).await;
    assert_eq!(outcome.code, 8);
    assert!(outcome.err.contains("opened or drained anew"), "{}", outcome.err);
    assert!(!outcome.err.contains("the command"), "{}", outcome.err);
}

#[tokio::test]
async fn no_command_runs_on_a_host_with_a_vm_that_is_wanted_or_seen_to_run_and_was_not_to_stay() {
    use v1::PowerState::{Running, Stopped, Unspecified};
    let mut stays = ready("h1", "1");
    stays.drain.as_mut().unwrap().vms = vec![v1::DrainedVm {
        mode: v1::DrainMode::Leave.into(),
        ..drained_vm("web", v1::DrainedVmState::Left, "")
    }];
    for (host, wanted, seen, empty) in [
        (ready("h1", "1"), Running, Stopped, false),
        (ready("h1", "1"), Stopped, Running, false),
        (ready("h1", "1"), Stopped, Stopped, true),
        (ready("h1", "1"), Stopped, Unspecified, true),
        (stays, Running, Running, true),
    ] {
        let controller = Controller::start();
        let plan = maintenance(&[&["h1"]]);
        controller.fake.script().maintenance.push_back(Ok(plan));
        let vms = list(&[("web", wanted, seen)]);
        controller.fake.script().lists.push_back(Ok(vms));
        let hosts = vec![Ok(host); 5];
        controller.fake.script().hosts.extend(hosts);
        let outcome = controller.run(&["host", "roll", "h1", "--exec", "true"]).await;
        assert_eq!(outcome.code == 0, empty, "{}", outcome.err);
        let told = outcome
            .err
            .contains("VMs run on h1 that were not to stay there: web");
        assert_eq!(told, !empty, "{}", outcome.err);
        let asked = controller.fake.script().seen.clone();
        assert_eq!(asked.last().unwrap(), "restore_host h1 0");
    }
}

#[tokio::test]
async fn an_error_before_anything_is_begun_is_told_as_it_is_and_a_later_one_with_what_is_left() {
    let controller = Controller::start();
    let unknown = || Err(tonic::Status::not_found("there is no host h9"));
    controller.fake.script().maintenance.push_back(unknown());
    let words = ["host", "roll", "h1", "h9", "--exec", "true"];
    let outcome = controller.run(&words).await;
    assert_eq!(outcome.code, 3, "{}", outcome.err);
    assert!(outcome.err.contains("there is no host h9"), "{}", outcome.err);
    assert!(!outcome.err.contains("not maintained"), "{}", outcome.err);

    let plans = [Ok(maintenance(&[&["h1"]])), unknown()];
    controller.fake.script().maintenance.extend(plans);
    let hosts = vec![Ok(ready("h1", "1")); 5];
    controller.fake.script().hosts.extend(hosts);
    controller.fake.script().lists.push_back(Ok(list(&[])));
    let outcome = controller.run(&words).await;
    assert_eq!(outcome.code, 8, "{}", outcome.err);
    for expected in ["there is no host h9", "not maintained: h9"] {
        assert!(outcome.err.contains(expected), "{}", outcome.err);
    }
}

#[tokio::test]
async fn maintenance_stops_where_a_command_fails_and_says_which_hosts_are_left() {
    let controller = Controller::start();
    let plan = maintenance(&[&["h1"], &["h2"]]);
    controller.fake.script().maintenance.push_back(Ok(plan));
    let closed = [ready("h1", "1"), ready("h1", "1"), ready("h1", "1")];
    controller.fake.script().hosts.extend(closed.map(Ok));
    controller.fake.script().lists.push_back(Ok(list(&[])));
    let outcome = controller
        .run(&["host", "roll", "h1", "h2", "--exec", "exit 3"])
        .await;
    assert_eq!(outcome.code, 8);
    for expected in [
        "h1: the command ended with exit status: 3",
        "dalgu host restore",
        "not maintained: h1 h2",
    ] {
        assert!(outcome.err.contains(expected), "{}", outcome.err);
    }
    let asked = controller.fake.script().seen.clone();
    assert!(!asked.iter().any(|call| call.starts_with("restore")), "{asked:?}");
}

#[tokio::test]
async fn what_was_moved_is_brought_back_where_a_group_cannot_be_emptied() {
    let controller = Controller::start();
    controller
        .fake
        .script()
        .maintenance
        .push_back(Ok(maintenance(&[&["h1"]])));
    let blocked = vec![drained_vm("web", v1::DrainedVmState::Blocked, "")];
    let drain = drained(v1::DrainState::Blocked, blocked);
    for host in [ready("h1", "1"), drain.clone(), drain, ready("h1", "1")] {
        controller.fake.script().hosts.push_back(Ok(host));
    }
    let outcome = controller.run(&["host", "roll", "h1", "--exec", "false"]).await;
    assert_eq!(outcome.code, 8);
    assert!(outcome.err.contains("could be emptied"), "{}", outcome.err);
    assert!(!outcome.err.contains("the command"), "{}", outcome.err);
    let asked = controller.fake.script().seen.clone();
    assert_eq!(asked.last().unwrap(), "restore_host h1 0");
}

#[tokio::test]
async fn hosts_that_cannot_be_maintained_are_shown_with_what_holds_them() {
    let controller = Controller::start();
    let plan = v1::MaintenancePlan {
        held: vec![v1::HeldHost {
            host: "h1".into(),
            vm: "web".into(),
            error: Some(v1::OperationError {
                code: 9,
                reason: "ASKS".into(),
                message: "web is not to be moved".into(),
            }),
        }],
        ..Default::default()
    };
    controller
        .fake
        .script()
        .maintenance
        .extend([Ok(plan.clone()), Ok(plan)]);
    let outcome = controller.run(&["host", "roll", "h1", "--dry-run"]).await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(outcome.out.contains("web is not to be moved"), "{}", outcome.out);
    let outcome = controller.run(&["host", "roll", "h1", "--exec", "true"]).await;
    assert_eq!(outcome.code, 8);
    assert!(outcome.out.contains("ASKS") && outcome.err.contains("not maintained: h1"));
    // Without a command there is nothing to do.
    assert_eq!(controller.run(&["host", "roll", "h1"]).await.code, 2);
}

#[tokio::test]
async fn power_is_set_read_and_switched() {
    let controller = Controller::start();
    let off = v1::Host {
        name: "h1".into(),
        state: v1::HostState::Off.into(),
        power: Some(v1::HostPower {
            redfish: Some(v1::RedfishService {
                url: "https://10.1.0.1".into(),
                credentials: "bmc".into(),
                ..Default::default()
            }),
            principal: "controller/power".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    for _ in 0..6 {
        controller.fake.script().hosts.push_back(Ok(off.clone()));
    }
    let run = async |words: &str| {
        let words: Vec<_> = words.split(' ').collect();
        let outcome = controller.run(&words).await;
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        outcome
    };
    run("host power set h1 --redfish https://10.1.0.1 --fingerprint AA:BB --system 1 --credentials rack3")
        .await;
    run("host power unset h1").await;
    run("host power off h1").await;
    run("host power off h1 --force --even-if-needed").await;
    let on = run("host power on h1").await;
    assert_eq!(
        on.err,
        "h1 is being switched on; `dalgu host list` shows when it reports\n"
    );
    let shown = run("host power h1").await;
    for wanted in [
        "State",
        "https://10.1.0.1 (the only system, credentials bmc)",
        "by controller/power",
        "Machine",
        "On, ForceOff",
    ] {
        assert!(shown.out.contains(wanted), "{wanted}: {}", shown.out);
    }
    let seen = controller.fake.script().seen.clone();
    assert_eq!(
        seen,
        [
            "set_host_power h1 https://10.1.0.1 [1] [AA:BB] rack3",
            "set_host_power h1 ",
            "power_off_host h1 (false, false)",
            "power_off_host h1 (true, true)",
            "power_on_host h1",
            "get_host h1",
            "read_host_power h1",
        ]
    );
}
