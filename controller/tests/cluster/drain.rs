//! A host is emptied and gets its VMs back; what cannot be done is said, and nothing goes on for ever.

use dalgu_proto::v1::{self, DrainMode, DrainState, DrainedVmState, PowerState, VmState};

use super::site::{Clients, Site, create, eventually, reason, start, stop};

async fn host(clients: &Clients, name: &str) -> v1::Host {
    let request = v1::GetHostRequest { name: name.into() };
    let answer = clients.clone().hosts.get_host(request).await;
    answer.unwrap().into_inner()
}

async fn place(clients: &Clients, vm: &str) -> (String, VmState) {
    let status = clients.clone().vm(vm).await.status.unwrap();
    let state = status.state();
    (status.host, state)
}

pub fn drain(name: &str) -> v1::DrainHostRequest {
    v1::DrainHostRequest {
        name: name.into(),
        deadline_seconds: 60,
        ..Default::default()
    }
}

pub fn restore(name: &str) -> v1::RestoreHostRequest {
    v1::RestoreHostRequest {
        name: name.into(),
        ..Default::default()
    }
}

/// Makes running VMs on a host, with these modes.
async fn vms(clients: &mut Clients, on: &str, modes: &[(&str, DrainMode)]) {
    for (name, mode) in modes {
        let mut request = create(name);
        request.host = on.into();
        if let Some(vm) = &mut request.vm {
            vm.drain_mode = (*mode).into();
        }
        let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
        clients.succeeded(operation).await;
        let runs = || async { place(clients, name).await.1 == VmState::Running };
        eventually("it runs", runs).await;
    }
}

pub async fn over(clients: &Clients, name: &str) -> v1::HostDrain {
    let ended = || async { host(clients, name).await.drain.unwrap().end_time.is_some() };
    eventually("the drain ends", ended).await;
    host(clients, name).await.drain.unwrap()
}

fn states(drain: &v1::HostDrain) -> Vec<(&str, DrainedVmState)> {
    drain.vms.iter().map(|vm| (vm.vm.as_str(), vm.state())).collect()
}

#[tokio::test]
async fn a_drained_host_is_empty_and_gets_its_vms_back() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let modes = ["a", "b", "c"].map(|name| (name, DrainMode::Unspecified));
    vms(&mut clients, "h1", &modes).await;
    let answer = clients.hosts.drain_host(drain("h1")).await.unwrap().into_inner();
    assert!(answer.cordoned);
    assert_eq!(answer.drain.unwrap().state(), DrainState::Active);
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    let moved = ["a", "b", "c"].map(|name| (name, DrainedVmState::Moved));
    assert_eq!(states(&drained), moved);
    assert!(drained.vms.iter().all(|vm| vm.host == "h2"));
    assert_eq!(host(&clients, "h1").await.allocation.unwrap().vms, 0);
    for name in ["a", "b", "c"] {
        assert_eq!(place(&clients, name).await.0, "h2");
    }
    // Whoever moves one on wants it there: it stays.
    let operation = clients.vms.stop_vm(stop("c")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let answer = clients
        .hosts
        .restore_host(restore("h1"))
        .await
        .unwrap()
        .into_inner();
    assert!(!answer.cordoned);
    let restored = over(&clients, "h1").await;
    assert!(restored.restoring);
    assert_eq!(restored.state(), DrainState::Done, "{restored:?}");
    let back = [
        ("a", DrainedVmState::Moved),
        ("b", DrainedVmState::Moved),
        ("c", DrainedVmState::Left),
    ];
    assert_eq!(states(&restored), back);
    assert_eq!(place(&clients, "a").await.0, "h1");
    assert_eq!(place(&clients, "c").await, ("h2".to_owned(), VmState::Stopped));
}

#[tokio::test]
async fn each_vm_is_treated_as_its_mode_says_and_who_asks_is_told_of_at_once() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let modes = [
        ("asks", DrainMode::Ask),
        ("moves", DrainMode::LiveMigrate),
        ("stays", DrainMode::Leave),
        ("stops", DrainMode::Stop),
    ];
    vms(&mut clients, "h1", &modes).await;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Blocked, "long before its deadline");
    let seen = [
        ("asks", DrainedVmState::Blocked),
        ("moves", DrainedVmState::Moved),
        ("stays", DrainedVmState::Left),
        ("stops", DrainedVmState::Stopped),
    ];
    assert_eq!(states(&drained), seen);
    assert_eq!(drained.vms[0].error.as_ref().unwrap().reason, "ASKS");
    assert_eq!(
        drained.vms[0].options,
        [
            "dalgu vm migrate asks",
            "dalgu vm stop asks",
            "dalgu vm update asks --drain-mode leave"
        ]
    );
    assert_eq!(
        place(&clients, "stays").await,
        ("h1".to_owned(), VmState::Running)
    );
    assert_eq!(
        place(&clients, "stops").await,
        ("h1".to_owned(), VmState::Stopped)
    );
    // The answer is given, and the second drain comes to its end.
    let vm = v1::Vm {
        name: "asks".into(),
        drain_mode: DrainMode::Leave.into(),
        ..Default::default()
    };
    let update = v1::UpdateVmRequest {
        vm: Some(vm),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["drain_mode".into()],
        }),
        ..Default::default()
    };
    clients.vms.update_vm(update).await.unwrap();
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    // What the first one did is not forgotten.
    clients.hosts.restore_host(restore("h1")).await.unwrap();
    let restored = over(&clients, "h1").await;
    let back = [
        ("moves", DrainedVmState::Moved),
        ("stops", DrainedVmState::Started),
    ];
    assert_eq!(states(&restored), back, "{restored:?}");
    assert_eq!(place(&clients, "moves").await.0, "h1");
    assert_eq!(
        place(&clients, "stops").await,
        ("h1".to_owned(), VmState::Running)
    );
}

#[tokio::test]
async fn what_an_unfinished_restore_did_not_bring_back_outlives_the_next_drain() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let modes = [("moves", DrainMode::LiveMigrate), ("stops", DrainMode::Stop)];
    vms(&mut clients, "h1", &modes).await;
    let away = [
        ("moves", DrainedVmState::Moved),
        ("stops", DrainedVmState::Stopped),
    ];
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    assert_eq!(states(&over(&clients, "h1").await), away);
    site.fabric.lock().transfers_fail = true;
    clients.hosts.restore_host(restore("h1")).await.unwrap();
    let restored = over(&clients, "h1").await;
    let half = [
        ("moves", DrainedVmState::Blocked),
        ("stops", DrainedVmState::Started),
    ];
    assert_eq!(states(&restored), half, "{restored:?}");
    site.fabric.lock().transfers_fail = false;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(states(&drained), away, "{drained:?}");
    clients.hosts.restore_host(restore("h1")).await.unwrap();
    let back = [
        ("moves", DrainedVmState::Moved),
        ("stops", DrainedVmState::Started),
    ];
    assert_eq!(states(&over(&clients, "h1").await), back);
    assert_eq!(place(&clients, "moves").await.0, "h1");
}

#[tokio::test]
async fn what_somebody_moved_on_since_stays_there_also_after_another_drain() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    vms(&mut clients, "h1", &[("web", DrainMode::LiveMigrate)]).await;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    over(&clients, "h1").await;
    let there = place(&clients, "web").await.0;
    let on = if there == "h2" { "h3" } else { "h2" };
    let request = v1::MigrateVmRequest {
        name: "web".into(),
        destination_host: on.into(),
        ..Default::default()
    };
    clients.vms.migrate_vm(request).await.unwrap();
    let moved = || async { place(&clients, "web").await.0 == on };
    eventually("it is where it was moved to", moved).await;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    over(&clients, "h1").await;
    clients.hosts.restore_host(restore("h1")).await.unwrap();
    over(&clients, "h1").await;
    assert_eq!(place(&clients, "web").await.0, on);
}

#[tokio::test]
async fn a_drain_that_finds_no_room_ends_at_its_deadline_and_says_why() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    vms(&mut clients, "h1", &[("web", DrainMode::LiveMigrate)]).await;
    let cordon = v1::CordonHostRequest {
        name: "h2".into(),
        ..Default::default()
    };
    clients.hosts.cordon_host(cordon).await.unwrap();
    let request = v1::DrainHostRequest {
        deadline_seconds: 4,
        ..drain("h1")
    };
    clients.hosts.drain_host(request).await.unwrap();
    let held = || async {
        let drain = host(&clients, "h1").await.drain.unwrap();
        drain.vms.first().is_some_and(|vm| vm.tried_again)
    };
    eventually("it says what it waits for", held).await;
    assert!(host(&clients, "h1").await.drain.unwrap().end_time.is_none());
    let open = v1::UncordonHostRequest {
        name: "h1".into(),
        ..Default::default()
    };
    assert_eq!(
        reason(clients.hosts.uncordon_host(open).await),
        "DRAIN_IN_PROGRESS"
    );
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Blocked);
    assert_eq!(drained.vms[0].error.as_ref().unwrap().reason, "NO_CAPACITY");
    assert_eq!(place(&clients, "web").await, ("h1".to_owned(), VmState::Running));
}

#[tokio::test]
async fn a_drain_waits_for_what_starts_and_for_what_stops_and_says_so() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let both = ["starts", "stops"].map(|name| (name, DrainMode::LiveMigrate));
    vms(&mut clients, "h1", &both).await;
    let operation = clients.vms.stop_vm(stop("starts")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let idle = |is| site.fabric.lock().hosts.get_mut("h1").unwrap().idle = is;
    idle(true);
    clients.vms.start_vm(start("starts")).await.unwrap();
    clients.vms.stop_vm(stop("stops")).await.unwrap();
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let seen = || async {
        let drain = host(&clients, "h1").await.drain.unwrap();
        assert_eq!(drain.state(), DrainState::Active, "{drain:?}");
        let said = |vm: &v1::DrainedVm| {
            let error = vm.error.as_ref()?;
            Some((vm.tried_again, error.reason.clone(), error.message.clone()))
        };
        let of = |is: &str, vm: &str| {
            let message = format!("{vm} is {is}: only a running VM can migrate");
            Some((true, "VM_NOT_RUNNING".to_owned(), message))
        };
        let expected = [of("starting", "starts"), of("stopping", "stops")];
        drain.vms.iter().map(said).eq(expected)
    };
    eventually("it says what it waits for", seen).await;
    idle(false);
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    let seen = [("starts", DrainedVmState::Moved), ("stops", DrainedVmState::Left)];
    assert_eq!(states(&drained), seen);
}

#[tokio::test]
async fn a_guest_that_has_shut_down_by_itself_is_off_and_holds_no_drain() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    vms(&mut clients, "h1", &[("web", DrainMode::LiveMigrate)]).await;
    for vm in site.fabric.lock().hosts.get_mut("h1").unwrap().vms.values_mut() {
        vm.power = PowerState::Stopped;
        vm.status += 1;
    }
    site.fabric.changed.notify_waiters();
    let off = || async { place(&clients, "web").await.1 == VmState::Stopped };
    eventually("it is off", off).await;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    assert_eq!(states(&drained), [("web", DrainedVmState::Left)]);
}

#[tokio::test]
async fn a_drain_goes_on_where_it_was_when_the_controller_starts_again() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let names = ["a", "b", "c", "d", "e", "f"];
    vms(
        &mut clients,
        "h1",
        &names.map(|name| (name, DrainMode::LiveMigrate)),
    )
    .await;
    site.fabric.lock().transfer_steps = 40;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let moving = || async {
        let drain = host(&clients, "h1").await.drain.unwrap();
        drain.vms.iter().any(|vm| vm.state() == DrainedVmState::Moving)
    };
    eventually("one moves", moving).await;
    site.kill();
    let clients = site.start().await;
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    assert_eq!(states(&drained), names.map(|name| (name, DrainedVmState::Moved)));
}

#[tokio::test]
async fn a_drain_can_be_seen_before_it_is_begun_and_given_up_after() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    vms(
        &mut clients,
        "h1",
        &[("asks", DrainMode::Ask), ("web", DrainMode::LiveMigrate)],
    )
    .await;
    let before = host(&clients, "h1").await;
    let request = v1::DrainHostRequest {
        validate_only: true,
        ..drain("h1")
    };
    let seen = clients.hosts.drain_host(request).await.unwrap().into_inner();
    let would = seen.drain.unwrap();
    let expected = [("asks", DrainedVmState::Blocked), ("web", DrainedVmState::Moving)];
    assert_eq!(states(&would), expected);
    assert_eq!(would.vms[1].host, "h2");
    let after = host(&clients, "h1").await;
    assert_eq!(
        (after.etag, after.cordoned, after.drain),
        (before.etag, false, None)
    );
    let active = v1::ListOperationsRequest {
        active_only: true,
        ..Default::default()
    };
    let active = clients
        .operations
        .list_operations(active)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(active.operations, []);

    let cancel = || v1::CancelHostDrainRequest {
        name: "h1".into(),
        ..Default::default()
    };
    assert_eq!(
        reason(clients.hosts.cancel_host_drain(cancel()).await),
        "HOST_NOT_DRAINED"
    );
    assert_eq!(
        reason(clients.hosts.restore_host(restore("h1")).await),
        "HOST_NOT_DRAINED"
    );
    assert_eq!(
        reason(clients.hosts.drain_host(drain("h9")).await),
        "HOST_NOT_FOUND"
    );
    let long = v1::DrainHostRequest {
        deadline_seconds: 604_801,
        ..drain("h1")
    };
    assert_eq!(reason(clients.hosts.drain_host(long).await), "INVALID_FIELD");
    let strange = v1::DrainHostRequest {
        mode: 77,
        ..drain("h1")
    };
    assert_eq!(reason(clients.hosts.drain_host(strange).await), "INVALID_FIELD");

    site.fabric.lock().transfer_steps = 40;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    assert_eq!(
        reason(clients.hosts.drain_host(drain("h1")).await),
        "DRAIN_IN_PROGRESS"
    );
    assert_eq!(
        reason(clients.hosts.restore_host(restore("h1")).await),
        "DRAIN_IN_PROGRESS"
    );
    let moving = || async { place(&clients, "web").await.1 == VmState::Migrating };
    eventually("it moves", moving).await;
    let answer = clients
        .hosts
        .cancel_host_drain(cancel())
        .await
        .unwrap()
        .into_inner();
    assert!(answer.cordoned, "what was begun goes on");
    assert_eq!(answer.drain.unwrap().state(), DrainState::Cancelled);
    let moved = || async {
        let drain = host(&clients, "h1").await.drain.unwrap();
        drain.vms.iter().any(|vm| vm.state() == DrainedVmState::Moved)
    };
    eventually("what was begun is shown as it ended", moved).await;
    assert_eq!(place(&clients, "web").await.0, "h2");
}

#[tokio::test]
async fn hosts_to_be_maintained_are_sorted_into_groups_that_can_be_emptied_at_once() {
    let mut site = Site::new(4).await;
    let mut clients = site.start().await;
    for (host, vm, mode) in [
        ("h1", "a", DrainMode::LiveMigrate),
        ("h2", "b", DrainMode::Ask),
        ("h3", "c", DrainMode::LiveMigrate),
        ("h3", "d", DrainMode::Stop),
    ] {
        vms(&mut clients, host, &[(vm, mode)]).await;
    }
    let ask = |hosts: &[&str], max_hosts, without_spare_host| v1::PlanMaintenanceRequest {
        hosts: hosts.iter().map(ToString::to_string).collect(),
        max_hosts,
        without_spare_host,
        max_groups: 0,
    };
    for (max_hosts, without_spare_host, expected) in [
        // With h2 alone left, nothing would stand in for it.
        (0, false, vec![(vec!["h1", "h3"], 2), (vec!["h4"], 0)]),
        (0, true, vec![(vec!["h1", "h3", "h4"], 2)]),
        (1, false, vec![(vec!["h1"], 1), (vec!["h3"], 1), (vec!["h4"], 0)]),
    ] {
        let request = ask(&["h1", "h2", "h3", "h4", "h1"], max_hosts, without_spare_host);
        let plan = clients
            .plans
            .plan_maintenance(request)
            .await
            .unwrap()
            .into_inner();
        let groups: Vec<_> = plan
            .groups
            .iter()
            .map(|group| (group.hosts.clone(), group.moves))
            .collect();
        let expected: Vec<_> = expected
            .into_iter()
            .map(|(hosts, moves)| (hosts.into_iter().map(str::to_owned).collect(), moves))
            .collect();
        assert_eq!(groups, expected);
        let held = &plan.held[0];
        assert_eq!((held.host.as_str(), held.vm.as_str()), ("h2", "b"));
        assert_eq!(held.error.as_ref().unwrap().reason, "ASKS");
    }
    // Who asks anew after each group is told of one.
    let first = v1::PlanMaintenanceRequest {
        max_groups: 1,
        ..ask(&["h4", "h1", "h3"], 1, false)
    };
    let plan = clients.plans.plan_maintenance(first).await.unwrap().into_inner();
    assert_eq!((plan.groups.len(), plan.groups[0].hosts[0].as_str()), (1, "h4"));
    assert_eq!(plan.held, []);
    // What is said to go at once does.
    for name in ["h1", "h3"] {
        clients.hosts.drain_host(drain(name)).await.unwrap();
    }
    for name in ["h1", "h3"] {
        assert_eq!(over(&clients, name).await.state(), DrainState::Done);
    }

    let many = v1::PlanMaintenanceRequest {
        max_groups: 1001,
        ..ask(&["h1"], 0, false)
    };
    for (request, field) in [
        (ask(&[], 0, false), "hosts"),
        (ask(&["h1"], 1001, false), "max_hosts"),
        (many, "max_groups"),
        (ask(&["No Name"], 0, false), "hosts"),
    ] {
        let error = clients.plans.plan_maintenance(request).await.unwrap_err();
        assert!(error.message().contains(field), "{error:?}");
    }
    let unknown = clients.plans.plan_maintenance(ask(&["h9"], 0, false)).await;
    assert_eq!(reason(unknown), "HOST_NOT_FOUND");
}

#[tokio::test]
async fn a_vm_with_a_device_of_its_host_is_not_moved_and_a_drain_says_what_can_be_done() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let mut request = create("web");
    request.host = "h1".into();
    if let Some(spec) = request.vm.as_mut().and_then(|vm| vm.spec.as_mut()) {
        spec.devices = vec![v1::DeviceRequest {
            class: "gpu".into(),
            count: 1,
        }];
    }
    let operation = clients.vms.create_vm(request.clone()).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let runs = || async { place(&clients, "web").await.1 == VmState::Running };
    eventually("it runs", runs).await;
    let seen = clients.vm("web").await.status.unwrap().devices;
    assert_eq!(seen[0].address, "0000:3b:00.0");
    // Its host has no other.
    request.vm.as_mut().unwrap().name = "other".into();
    assert_eq!(reason(clients.vms.create_vm(request).await), "NO_CAPACITY");
    let room = host(&clients, "h1").await.allocation.unwrap().devices;
    assert_eq!((room[0].count, room[0].reserved), (1, 1));

    let migrate = v1::MigrateVmRequest {
        name: "web".into(),
        ..Default::default()
    };
    assert_eq!(reason(clients.vms.migrate_vm(migrate).await), "DEVICES_STAY");
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Blocked, "long before its deadline");
    assert_eq!(drained.vms[0].error.as_ref().unwrap().reason, "DEVICES_STAY");
    assert_eq!(
        drained.vms[0].options,
        ["dalgu vm stop web", "dalgu vm update web --drain-mode leave"]
    );
    let operation = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    // It is its own while it is off.
    let room = host(&clients, "h1").await.allocation.unwrap().devices;
    assert_eq!((room[0].count, room[0].reserved), (1, 1));
}
