//! Plans are shown, approved by what they do, and carried out; where reality differs they stop and say why.

use dalgu_proto::v1::{self, PlanKind, PlanState, PlanStepState, VmState};

use prost_types::FieldMask;

use super::site::{Clients, Site, create, eventually, reason, request_id, spec, stop};

async fn plan(clients: &Clients, id: &str) -> v1::Plan {
    let request = v1::GetPlanRequest { id: id.into() };
    clients
        .clone()
        .plans
        .get_plan(request)
        .await
        .unwrap()
        .into_inner()
}

pub async fn propose(clients: &mut Clients, kind: PlanKind, hosts: &[&str]) -> v1::Plan {
    let request = v1::CreatePlanRequest {
        kind: kind.into(),
        hosts: hosts.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    clients.plans.create_plan(request).await.unwrap().into_inner()
}

pub fn approval(plan: &v1::Plan) -> v1::ApprovePlanRequest {
    v1::ApprovePlanRequest {
        id: plan.id.clone(),
        hash: plan.hash.clone(),
        deadline_seconds: 60,
        ..Default::default()
    }
}

pub async fn over(clients: &Clients, id: &str) -> v1::Plan {
    let ended = || async { plan(clients, id).await.end_time.is_some() };
    eventually("the plan ends", ended).await;
    plan(clients, id).await
}

async fn place(clients: &Clients, vm: &str) -> String {
    clients.clone().vm(vm).await.status.unwrap().host
}

/// Puts a hard taint on a host.
async fn taint(clients: &Clients, host: &str) {
    let request = v1::UpdateHostRequest {
        host: Some(v1::Host {
            name: host.into(),
            taints: vec![v1::Taint {
                key: "licence".into(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["taints".into()],
        }),
        request_id: request_id(),
    };
    clients.clone().hosts.update_host(request).await.unwrap();
}

/// Makes running VMs, each on its host.
pub async fn vms(clients: &mut Clients, placed: &[(&str, &str)]) {
    for (name, on) in placed {
        let mut request = create(name);
        request.host = (*on).into();
        let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
        clients.succeeded(operation).await;
        let runs = || async { clients.clone().vm(name).await.status.unwrap().state() == VmState::Running };
        eventually("it runs", runs).await;
    }
}

#[tokio::test]
async fn a_consolidation_is_shown_first_and_carried_out_once_it_is_approved() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    vms(&mut clients, &[("a", "h1"), ("b", "h2"), ("c", "h3")]).await;
    let proposed = propose(&mut clients, PlanKind::Consolidate, &[]).await;
    assert_eq!(proposed.state(), PlanState::Proposed, "{proposed:?}");
    assert_eq!(proposed.steps.len(), 2, "{proposed:?}");
    assert_eq!(proposed.before.unwrap().hosts_on, 3);
    assert_eq!(proposed.predicted.unwrap().hosts_on, 1);
    assert!(
        proposed
            .steps
            .iter()
            .all(|step| step.copied_bytes > 0 && step.predicted_seconds > 0.0)
    );
    for (vm, host) in [("a", "h1"), ("b", "h2"), ("c", "h3")] {
        assert_eq!(place(&clients, vm).await, host, "nothing moves before");
    }

    let wrong = v1::ApprovePlanRequest {
        hash: "0".repeat(64),
        ..approval(&proposed)
    };
    assert_eq!(reason(clients.plans.approve_plan(wrong).await), "PLAN_CHANGED");
    let running = clients
        .plans
        .approve_plan(approval(&proposed))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(running.state(), PlanState::Running);
    let again = clients.plans.approve_plan(approval(&proposed)).await;
    assert_eq!(reason(again), "PLAN_NOT_PROPOSED");

    let done = over(&clients, &proposed.id).await;
    assert_eq!(done.state(), PlanState::Done, "{done:?}");
    assert!(done.steps.iter().all(|step| step.state() == PlanStepState::Moved));
    for step in &done.steps {
        assert_eq!(place(&clients, &step.vm).await, step.destination);
    }
    assert_eq!(
        done.realised.unwrap().hosts_on,
        1,
        "what came of it is what was predicted"
    );
    let again = propose(&mut clients, PlanKind::Consolidate, &[]).await;
    assert_eq!(
        (again.state(), again.steps.len()),
        (PlanState::Done, 0),
        "nothing is left to do"
    );
}

#[tokio::test]
async fn a_consolidation_keeps_to_groups_and_taints() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    let group = v1::CreatePlacementGroupRequest {
        placement_group: Some(v1::PlacementGroup {
            name: "apart".into(),
            rule: v1::PlacementRule::AntiAffinity.into(),
            ..Default::default()
        }),
        request_id: request_id(),
    };
    clients.placement.create_placement_group(group).await.unwrap();
    for (name, on, groups) in [
        ("a", "h1", vec!["apart"]),
        ("b", "h2", vec!["apart"]),
        ("c", "h3", vec![]),
    ] {
        let mut request = create(name);
        request.host = on.into();
        request.vm.as_mut().unwrap().placement_groups = groups.into_iter().map(Into::into).collect();
        let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
        clients.succeeded(operation).await;
        let runs = || async { clients.clone().vm(name).await.status.unwrap().state() == VmState::Running };
        eventually("it runs", runs).await;
    }
    taint(&clients, "h1").await;
    let proposed = propose(&mut clients, PlanKind::Consolidate, &[]).await;
    let moves: Vec<_> = proposed
        .steps
        .iter()
        .map(|step| (step.vm.as_str(), step.source.as_str(), step.destination.as_str()))
        .collect();
    // The tainted host is emptied. A member goes where no other is, nor has been.
    assert_eq!(moves, [("a", "h1", "h3")], "{proposed:?}");
    clients.plans.approve_plan(approval(&proposed)).await.unwrap();
    let done = over(&clients, &proposed.id).await;
    assert_eq!(done.state(), PlanState::Done, "{done:?}");
    let evacuated = propose(&mut clients, PlanKind::Evacuate, &["h3"]).await;
    let moves: Vec<_> = evacuated.steps.iter().map(|step| step.vm.as_str()).collect();
    assert_eq!(moves, ["c"], "the only other host has a member: {evacuated:?}");
}

#[tokio::test]
async fn a_plan_whose_vm_has_changed_stops_and_says_so() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    vms(&mut clients, &[("a", "h1")]).await;
    let proposed = propose(&mut clients, PlanKind::Evacuate, &["h1"]).await;
    assert_eq!(proposed.steps.len(), 1);
    let operation = clients.vms.stop_vm(stop("a")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    clients.plans.approve_plan(approval(&proposed)).await.unwrap();
    let stopped = over(&clients, &proposed.id).await;
    assert_eq!(stopped.state(), PlanState::Stopped, "{stopped:?}");
    assert_eq!(stopped.steps[0].error.clone().unwrap().reason, "VM_CHANGED");
    assert!(stopped.message.contains("make a new plan"), "{}", stopped.message);
    assert_eq!(place(&clients, "a").await, "h1");
}

#[tokio::test]
async fn a_plan_whose_destination_was_cordoned_stops_before_anything_moves() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    vms(&mut clients, &[("a", "h1")]).await;
    let proposed = propose(&mut clients, PlanKind::Evacuate, &["h1"]).await;
    let cordon = v1::CordonHostRequest {
        name: "h2".into(),
        ..Default::default()
    };
    clients.hosts.cordon_host(cordon).await.unwrap();
    clients.plans.approve_plan(approval(&proposed)).await.unwrap();
    let stopped = over(&clients, &proposed.id).await;
    assert_eq!(stopped.state(), PlanState::Stopped);
    assert_eq!(stopped.steps[0].error.clone().unwrap().reason, "NO_CAPACITY");
    assert_eq!(place(&clients, "a").await, "h1");
}

#[tokio::test]
async fn a_plan_goes_on_after_a_restart_of_the_controller() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let placed = ["a", "b", "c", "d", "e", "f"].map(|name| (name, "h1"));
    vms(&mut clients, &placed).await;
    let proposed = propose(&mut clients, PlanKind::Evacuate, &["h1"]).await;
    assert_eq!(proposed.steps.len(), 6);
    clients.plans.approve_plan(approval(&proposed)).await.unwrap();
    site.kill();
    let clients = site.start().await;
    let done = over(&clients, &proposed.id).await;
    assert_eq!(done.state(), PlanState::Done, "{done:?}");
    for (name, _) in placed {
        assert_eq!(place(&clients, name).await, "h2");
    }
}

#[tokio::test]
async fn a_new_plan_takes_the_place_of_one_that_waits_and_a_cancelled_one_begins_nothing() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    vms(&mut clients, &[("a", "h1"), ("b", "h2")]).await;
    let first = propose(&mut clients, PlanKind::Consolidate, &[]).await;
    let second = propose(&mut clients, PlanKind::Evacuate, &["h2"]).await;
    assert_eq!(plan(&clients, &first.id).await.state(), PlanState::Cancelled);
    let cancel = v1::CancelPlanRequest {
        id: second.id.clone(),
        ..Default::default()
    };
    let cancelled = clients
        .plans
        .cancel_plan(cancel.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(cancelled.state(), PlanState::Cancelled);
    assert_eq!(reason(clients.plans.cancel_plan(cancel).await), "PLAN_ENDED");
    assert_eq!(
        reason(clients.plans.approve_plan(approval(&second)).await),
        "PLAN_NOT_PROPOSED"
    );
    let listed = clients
        .plans
        .list_plans(v1::ListPlansRequest {})
        .await
        .unwrap()
        .into_inner();
    let ids: Vec<_> = listed.plans.iter().map(|plan| plan.id.clone()).collect();
    assert_eq!(ids, [second.id, first.id], "the newest first");
}

#[tokio::test]
async fn what_no_plan_can_be_made_of_is_refused_by_name() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let refused = [
        (v1::CreatePlanRequest::default(), "kind"),
        (
            v1::CreatePlanRequest {
                kind: PlanKind::Evacuate.into(),
                ..Default::default()
            },
            "hosts",
        ),
        (
            v1::CreatePlanRequest {
                kind: PlanKind::Rebalance.into(),
                hosts: vec!["h1".into()],
                ..Default::default()
            },
            "hosts",
        ),
        (
            v1::CreatePlanRequest {
                kind: PlanKind::Rebalance.into(),
                max_moves: 1001,
                ..Default::default()
            },
            "max_moves",
        ),
        (
            v1::CreatePlanRequest {
                kind: PlanKind::MakeRoom.into(),
                ..Default::default()
            },
            "room_for",
        ),
        (
            v1::CreatePlanRequest {
                kind: PlanKind::Rebalance.into(),
                room_for: Some(v1::RoomFor::default()),
                ..Default::default()
            },
            "room_for",
        ),
        (
            room_for(v1::VmSpec {
                cpu_policy: v1::CpuPolicy::Dedicated.into(),
                ..sized(128)
            }),
            "room_for.spec",
        ),
    ];
    for (request, field) in refused {
        let error = clients.plans.create_plan(request).await.unwrap_err();
        assert!(error.message().contains(field), "{error:?}");
    }
    let unknown = v1::CreatePlanRequest {
        kind: PlanKind::Evacuate.into(),
        hosts: vec!["h9".into()],
        ..Default::default()
    };
    assert_eq!(reason(clients.plans.create_plan(unknown).await), "HOST_NOT_FOUND");
    let rebalanced = propose(&mut clients, PlanKind::Rebalance, &[]).await;
    assert_eq!(rebalanced.state(), PlanState::Done);
    assert!(
        rebalanced.message.contains("nothing to do"),
        "{}",
        rebalanced.message
    );
}

fn sized(memory_mib: u64) -> v1::VmSpec {
    v1::VmSpec { memory_mib, ..spec() }
}

fn room_for(spec: v1::VmSpec) -> v1::CreatePlanRequest {
    v1::CreatePlanRequest {
        kind: PlanKind::MakeRoom.into(),
        room_for: Some(v1::RoomFor {
            spec: Some(spec),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn new(name: &str, host: &str, memory_mib: u64) -> v1::CreateVmRequest {
    let mut request = create(name);
    request.vm.as_mut().unwrap().spec = Some(sized(memory_mib));
    request.host = host.into();
    request
}

#[tokio::test]
async fn others_move_out_of_the_way_of_a_vm_that_finds_no_room_and_it_can_be_made_then() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    // Four of these fill a host.
    for number in 0..6 {
        let host = ["h1", "h2"][number % 2];
        let request = new(&format!("vm{number}"), host, 1600);
        let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
        clients.succeeded(operation).await;
    }
    for number in 0..6 {
        let name = format!("vm{number}");
        let runs = || async { clients.clone().vm(&name).await.status.unwrap().state() == VmState::Running };
        eventually("it runs", runs).await;
    }
    let refused = clients.vms.create_vm(new("large", "", 3000)).await.unwrap_err();
    assert!(refused.message().contains("dalgu plan make-room"), "{refused:?}");
    assert_eq!(reason(Err::<(), _>(refused)), "NO_CAPACITY");
    let refused = clients.vms.create_vm(new("larger", "", 7000)).await.unwrap_err();
    assert!(
        !refused.message().contains("make-room"),
        "all that is free is less: {refused:?}"
    );
    let there = clients.plans.create_plan(room_for(sized(1600))).await;
    let there = there.unwrap().into_inner();
    assert_eq!((there.state(), there.steps.len()), (PlanState::Done, 0));
    assert_eq!(
        there.message,
        format!("nothing to do: {} has the room", there.hosts[0])
    );

    let mut budget = room_for(sized(3000));
    budget.max_copied_bytes = 1 << 30;
    let error = clients.plans.create_plan(budget).await.unwrap_err();
    assert!(error.message().contains("would make room for it"), "{error:?}");
    assert_eq!(reason(Err::<(), _>(error)), "NO_CAPACITY");
    let refused = clients.plans.create_plan(room_for(sized(5000))).await;
    assert_eq!(
        reason(refused),
        "NO_CAPACITY",
        "two would have to leave, and one finds room"
    );

    let mut ask = room_for(sized(3000));
    ask.room_for.as_mut().unwrap().host = "h2".into();
    let plan = clients.plans.create_plan(ask).await.unwrap().into_inner();
    assert_eq!(plan.hosts, ["h2"]);
    assert_eq!(plan.steps.len(), 1, "{plan:?}");
    assert_eq!(
        (&*plan.steps[0].source, &*plan.steps[0].destination),
        ("h2", "h1")
    );
    assert_eq!(plan.message, "1 VM moves; then h2 has the room");
    clients.plans.approve_plan(approval(&plan)).await.unwrap();
    let done = over(&clients, &plan.id).await;
    assert_eq!(done.state(), PlanState::Done, "{done:?}");
    let made = clients.vms.create_vm(new("large", "", 3000)).await.unwrap();
    clients.succeeded(made.into_inner()).await;
    assert_eq!(place(&clients, "large").await, "h2");
}
