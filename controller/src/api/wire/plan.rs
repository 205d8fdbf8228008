//! Plans of moves on the wire.

use dalgu_proto::{time, v1};

use crate::{
    model::{PlanFigures, PlanKind, PlanRecord, PlanState, PlanStep, StepState},
    plans::{
        advance,
        maintenance::{Group, Held},
    },
    state::State,
};

const fn kind(kind: PlanKind) -> v1::PlanKind {
    match kind {
        PlanKind::Rebalance => v1::PlanKind::Rebalance,
        PlanKind::Consolidate => v1::PlanKind::Consolidate,
        PlanKind::Evacuate => v1::PlanKind::Evacuate,
        PlanKind::MakeRoom => v1::PlanKind::MakeRoom,
    }
}

const fn state(state: PlanState) -> v1::PlanState {
    match state {
        PlanState::Proposed => v1::PlanState::Proposed,
        PlanState::Running => v1::PlanState::Running,
        PlanState::Done => v1::PlanState::Done,
        PlanState::Stopped => v1::PlanState::Stopped,
        PlanState::Cancelled => v1::PlanState::Cancelled,
    }
}

const fn step_state(state: StepState) -> v1::PlanStepState {
    match state {
        StepState::Waiting => v1::PlanStepState::Waiting,
        StepState::Moving => v1::PlanStepState::Moving,
        StepState::Moved => v1::PlanStepState::Moved,
        StepState::Failed => v1::PlanStepState::Failed,
    }
}

fn figures(figures: &PlanFigures) -> v1::PlanFigures {
    v1::PlanFigures {
        hosts_on: figures.hosts_on,
        hosts_contended: figures.hosts_contended,
        unevenness_percent: figures.unevenness_percent,
        spare_host: figures.spare_host,
    }
}

fn step(step: &PlanStep, after_steps: Vec<u32>) -> v1::PlanStep {
    v1::PlanStep {
        vm: step.name.to_string(),
        source: step.source.to_string(),
        destination: step.destination.to_string(),
        generation: step.generation.0,
        copied_bytes: step.copied_bytes,
        predicted_seconds: step.predicted_seconds,
        predicted_downtime_ms: step.predicted_downtime_ms.unwrap_or_default(),
        max_downtime_ms: step.max_downtime_ms,
        after_steps,
        state: step_state(step.state).into(),
        operation: step.operation.map(|id| id.to_string()).unwrap_or_default(),
        error: step.fault.as_ref().map(super::operation_error),
    }
}

/// A plan, with its moves as they are now.
pub fn plan(now: &State, plan: &PlanRecord) -> v1::Plan {
    let mut plan = plan.clone();
    advance::follow(now, &mut plan);
    let after = |index| {
        plan.waits_for(index)
            .filter_map(|before| u32::try_from(before).ok())
            .collect()
    };
    let steps = plan
        .steps
        .iter()
        .enumerate()
        .map(|(index, one)| step(one, after(index)));
    v1::Plan {
        id: plan.id.to_string(),
        kind: kind(plan.kind).into(),
        hosts: plan.hosts.iter().map(ToString::to_string).collect(),
        state: state(plan.state).into(),
        hash: plan.hash.clone(),
        steps: steps.collect(),
        copied_bytes: plan
            .steps
            .iter()
            .fold(0, |sum, step| sum.saturating_add(step.copied_bytes)),
        predicted_seconds: plan.predicted_seconds,
        before: Some(figures(&plan.before)),
        predicted: Some(figures(&plan.predicted)),
        realised: plan.realised.as_ref().map(figures),
        principal: plan.principal.clone(),
        create_time: Some(time::to_wire(plan.create_time)),
        approved_by: plan.approved_by.clone().unwrap_or_default(),
        approve_time: plan.approve_time.map(time::to_wire),
        deadline: plan.deadline.map(time::to_wire),
        end_time: plan.end_time.map(time::to_wire),
        message: plan.message.clone(),
    }
}

/// Hosts in groups.
pub fn maintenance(groups: &[Group], held: &[Held]) -> v1::MaintenancePlan {
    let group = |group: &Group| v1::MaintenanceGroup {
        hosts: group.hosts.iter().map(ToString::to_string).collect(),
        moves: u32::try_from(group.moves).unwrap_or(u32::MAX),
        copied_bytes: group.copied_mib.saturating_mul(1 << 20),
        predicted_seconds: group.predicted_seconds,
    };
    let held_host = |held: &Held| v1::HeldHost {
        host: held.host.to_string(),
        vm: held.vm.as_ref().map(ToString::to_string).unwrap_or_default(),
        error: Some(super::operation_error(&held.fault)),
    };
    v1::MaintenancePlan {
        groups: groups.iter().map(group).collect(),
        held: held.iter().map(held_host).collect(),
    }
}
