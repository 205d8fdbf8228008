//! One pass over a plan that runs: what became of its moves, what is begun next, and whether it has ended. Everything happens inside a
//! transaction; what has become of a move is read from the state.

use dalgu_proto::ids::{HostName, PlanId};

use super::automatic;
use crate::{
    hosts,
    model::{
        Code, EventKind, Fault, HostState, OperationState, Outcome, PlanFigures, PlanKind, PlanRecord,
        PlanState, PlanStep, StepState,
    },
    placement::Policy,
    state::{State, Tx},
    verbs::{
        Caller, Error,
        migrate::{self, Migrate},
    },
};

/// Moves of a plan that are under way at the same time.
const UNDER_WAY: usize = 4;

/// Whether a pass has left anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// There is more to come, or the plan has ended.
    Made,
    /// The plan has nothing more to do, and ends in a pass that is told how the site is now.
    Last,
}

/// Makes a pass. `site` is how the site was just before, where that has been looked at.
pub fn advance(tx: &mut Tx, id: PlanId, policy: Policy, site: Option<PlanFigures>) -> Pass {
    let Some(old) = tx
        .plans
        .get(&id)
        .filter(|plan| plan.state == PlanState::Running)
        .cloned()
    else {
        return Pass::Made;
    };
    let mut plan = (*old).clone();
    follow(tx, &mut plan);
    if plan.count(StepState::Failed) == 0 && plan.deadline.is_none_or(|deadline| tx.now() < deadline) {
        begin(tx, &mut plan, policy);
    }
    let pass = conclude(tx, &mut plan, site);
    if plan != *old {
        tx.put_plan(plan);
    }
    pass
}

/// Reads what has become of the moves that were begun; of a plan that has ended, too: they go on.
pub fn follow(state: &State, plan: &mut PlanRecord) {
    for step in plan
        .steps
        .iter_mut()
        .filter(|step| step.state == StepState::Moving)
    {
        let operation = step.operation.and_then(|id| state.operations.get(&id));
        let moved = state
            .vms
            .get(&step.vm)
            .is_some_and(|vm| vm.owner == step.destination);
        match operation {
            Some(operation) if operation.is_active() => {}
            // An operation that is no longer kept ended long ago.
            Some(operation) if operation.state == OperationState::Succeeded => step.state = StepState::Moved,
            None if moved => step.state = StepState::Moved,
            Some(operation) => {
                let fault = operation.error.clone();
                let cancelled =
                    || Fault::new(Code::Cancelled, "OPERATION_CANCELLED", operation.message.clone());
                fail(step, fault.unwrap_or_else(cancelled));
            }
            None => fail(
                step,
                Fault::new(
                    Code::Unknown,
                    "OPERATION_NOT_FOUND",
                    "what became of it is not known",
                ),
            ),
        }
    }
}

fn fail(step: &mut PlanStep, fault: Fault) {
    step.state = StepState::Failed;
    step.fault = Some(fault);
}

/// Begins the moves whose turn has come.
fn begin(tx: &mut Tx, plan: &mut PlanRecord, policy: Policy) {
    let caller = Caller {
        principal: plan.approved_by.clone().unwrap_or_default(),
        request_id: String::new(),
        body: String::new(),
    };
    for index in 0..plan.steps.len() {
        if plan.count(StepState::Moving) >= UNDER_WAY {
            return;
        }
        let moving = plan.count(StepState::Moving) > 0;
        let free = plan
            .waits_for(index)
            .all(|before| plan.steps[before].state == StepState::Moved);
        let step = &mut plan.steps[index];
        if step.state != StepState::Waiting || !free {
            continue;
        }
        match start(tx, &caller, step, policy) {
            Ok(Outcome::Operation(operation)) => {
                step.state = StepState::Moving;
                step.operation = Some(operation);
            }
            // The host registers within moments, or the deadline passes.
            Err(Error::Initializing) => {}
            // A VM that moves has room on both its hosts: there may be enough when those under way have come.
            Err(Error::NoCapacity { .. } | Error::PlacementConflict(_)) if moving => {}
            Ok(_) => fail(
                step,
                Fault::new(Code::Unknown, "UNKNOWN", "no migration was begun"),
            ),
            Err(error) => {
                fail(step, error.fault());
                return;
            }
        }
    }
}

/// Checks that reality is as the plan expects, and begins a move.
fn start(tx: &mut Tx, caller: &Caller, step: &PlanStep, policy: Policy) -> Result<Outcome, Error> {
    let vm = tx.vms.get(&step.vm).cloned();
    let vm = vm.ok_or_else(|| Error::VmNotFound(step.name.to_string()))?;
    if vm.owner != step.source {
        return Err(Error::VmMoved {
            vm: vm.name.clone(),
            expected: step.source.clone(),
            found: vm.owner.clone(),
        });
    }
    if vm.intent.generation != step.generation {
        return Err(Error::VmChanged(vm.name.clone()));
    }
    reachable(tx, &step.destination)?;
    let ask = Migrate {
        destination: Some(step.destination.clone()),
        max_downtime_ms: step.max_downtime_ms,
        bandwidth_mib_per_second: 0,
        ignore_protection: false,
        policy,
    };
    migrate::migrate(tx, caller, vm.name.as_str(), "", ask)
}

/// After a start of the controller its hosts come one after the other: that is waited for.
fn reachable(state: &State, host: &HostName) -> Result<(), Error> {
    match hosts::state_of(state, host) {
        HostState::Initializing if state.hosts.contains_key(host) => Err(Error::Initializing),
        _ => Ok(()),
    }
}

/// Ends a plan that has nothing more to do, or may not go on. What is under way goes on to its end before that is told.
fn conclude(tx: &mut Tx, plan: &mut PlanRecord, site: Option<PlanFigures>) -> Pass {
    if plan.count(StepState::Moving) > 0 {
        return Pass::Made;
    }
    let failed = plan.steps.iter().find(|step| step.state == StepState::Failed);
    let late = plan.deadline.is_some_and(|deadline| tx.now() >= deadline);
    let (state, event, message) = match failed {
        Some(step) => {
            let why = step
                .fault
                .as_ref()
                .map(|fault| fault.message.as_str())
                .unwrap_or_default();
            let message = format!("stopped at {}: {why}", step.name);
            (PlanState::Stopped, "PlanStopped", message)
        }
        None if plan.count(StepState::Waiting) == 0 => (PlanState::Done, "PlanDone", String::new()),
        None if late => (
            PlanState::Stopped,
            "PlanStopped",
            "its deadline has passed".to_owned(),
        ),
        None => return Pass::Made,
    };
    let Some(site) = site else { return Pass::Last };
    end(tx, plan, state, event, &message, Some(site));
    Pass::Made
}

/// Ends a plan, and notes what came of it: `site` is how it is now, for a plan that was approved.
pub fn end(
    tx: &mut Tx,
    plan: &mut PlanRecord,
    state: PlanState,
    event: &str,
    why: &str,
    site: Option<PlanFigures>,
) {
    plan.state = state;
    plan.end_time = Some(tx.now());
    if plan.approve_time.is_some() {
        plan.realised = site;
    }
    let (moved, all) = (plan.count(StepState::Moved), plan.steps.len());
    let separator = if why.is_empty() { "" } else { "; " };
    plan.message = format!("{moved} of {all} VMs moved{separator}{why}");
    let message = format!("{}: {}", plan.kind.as_str(), plan.message);
    tx.event(EventKind::Plan, event, plan.id, message, None);
    if automatic::is_automatic(plan) && automatic::is_wrong(plan) {
        let told = |figures: PlanFigures| match plan.kind {
            PlanKind::Consolidate => format!(
                "{} hosts with VMs and {} contended",
                figures.hosts_on, figures.hosts_contended
            ),
            _ => format!("{} contended hosts", figures.hosts_contended),
        };
        let message = format!(
            "{} before, {} expected, {} now; after two such of three no such plan is approved without an operator for a day",
            told(plan.before),
            told(plan.predicted),
            plan.realised.map_or_else(|| "unknown".to_owned(), told)
        );
        tx.event(EventKind::Plan, "PlanPredictionWrong", plan.id, message, None);
    }
}

/// What a new plan does, in a sentence.
pub fn summary(plan: &PlanRecord) -> String {
    let (before, after) = (plan.before, plan.predicted);
    let moves = match plan.steps.len() {
        0 => return nothing(plan),
        1 => "1 VM moves".to_owned(),
        moves => format!("{moves} VMs move"),
    };
    match plan.kind {
        PlanKind::Rebalance => format!(
            "{moves}; contended hosts: {} before, {} after",
            before.hosts_contended, after.hosts_contended
        ),
        PlanKind::Consolidate | PlanKind::Evacuate => {
            format!(
                "{moves}; hosts with VMs: {} before, {} after",
                before.hosts_on, after.hosts_on
            )
        }
        PlanKind::MakeRoom => format!("{moves}; then {} has the room", hosts(plan)),
    }
}

fn hosts(plan: &PlanRecord) -> String {
    plan.hosts
        .iter()
        .map(HostName::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

fn nothing(plan: &PlanRecord) -> String {
    let why = match plan.kind {
        PlanKind::Rebalance => {
            "nothing to do: no VM that can move is on a contended host that another can relieve"
        }
        PlanKind::Consolidate => {
            "nothing to do: no host can be emptied whole into the others, by as many moves and bytes as are allowed"
        }
        PlanKind::Evacuate => "nothing to do: no VM there can move",
        PlanKind::MakeRoom => return format!("nothing to do: {} has the room", hosts(plan)),
    };
    why.to_owned()
}
