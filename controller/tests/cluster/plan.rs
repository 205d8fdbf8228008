//! Plans are shown, approved by what they do, and carried out; where reality differs they stop and say why.

use dalgu_proto::v1::{self, PlanKind, PlanState, PlanStepState, VmState};

use prost_types::FieldMask;

use super::site::{Clients, Site, create, eventually, reason, request_id, stop};

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
    assert_eq!(moves, [("c", "h3", "h2")], "{proposed:?}");
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
