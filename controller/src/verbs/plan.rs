//! Making, approving and giving up plans of moves.

use std::{fmt::Write as _, time::Duration};

use dalgu_proto::ids::{HostName, PlanId};
use jiff::Timestamp;
use ring::digest;

use super::{Caller, Error, create, room};
use crate::{
    hosts,
    model::{EventKind, Outcome, PlanFigures, PlanKind, PlanRecord, PlanState, PlanStep},
    placement::{self, Policy, Request, Size},
    planner::{Consolidation, Plan, Rebalance, Room, Rule, consolidate, evacuate, make_room, rebalance},
    plans::{
        advance, automatic,
        look::{Look, figures},
        usage::Usage,
    },
    state::{State, Tx},
};

/// Plans that have ended and are kept.
const KEPT: usize = 32;
/// For so long a plan may be approved: later the site is another one.
const FRESH: Duration = Duration::from_secs(3600);

/// What moves are to bring about.
#[derive(Debug, Clone)]
pub enum Aim {
    /// No VM waits.
    Rebalance,
    /// Fewer hosts, with what is asked for bounding moves and bytes.
    Consolidate(Consolidation),
    /// These hosts are emptied.
    Evacuate(Vec<HostName>),
    /// A host has room for this VM.
    MakeRoom(Box<Request>),
}

impl Aim {
    const fn kind(&self) -> PlanKind {
        match self {
            Self::Rebalance => PlanKind::Rebalance,
            Self::Consolidate(_) => PlanKind::Consolidate,
            Self::Evacuate(_) => PlanKind::Evacuate,
            Self::MakeRoom(_) => PlanKind::MakeRoom,
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Create {
    /// What for.
    pub aim: Aim,
    /// Moves at most.
    pub moves: usize,
    /// What they copy at most, in MiB.
    pub copied_mib: u64,
}

/// The plan of that id.
pub fn find(state: &State, id: PlanId) -> Result<PlanRecord, Error> {
    let plan = state.plans.get(&id).map(|plan| (**plan).clone());
    plan.ok_or_else(|| Error::PlanNotFound(id.to_string()))
}

/// What a plan does, of a site as it was looked at.
#[derive(Debug)]
pub struct Draft {
    hosts: Vec<HostName>,
    steps: Vec<PlanStep>,
    predicted_seconds: f64,
    before: PlanFigures,
    predicted: PlanFigures,
}

impl Draft {
    /// Searches for the moves. It takes long on a large site: not inside a transaction.
    pub fn of(state: &State, usage: &Usage, now: Timestamp, ask: &Create) -> Result<Self, Error> {
        let look = Look::of(state, usage, now);
        // Every beginning of a plan is a plan, but for one that makes room.
        let within = |plan: Plan| plan.within(&look.site, ask.moves, ask.copied_mib);
        let (plan, hosts) = match &ask.aim {
            Aim::Rebalance => (within(rebalance(&look.site, &Rebalance::default())), Vec::new()),
            Aim::Consolidate(settings) => {
                let settings = Consolidation {
                    moves: ask.moves,
                    transfer_mib: ask.copied_mib,
                    ..*settings
                };
                // A cut could leave a host half empty.
                (consolidate(&look.site, &settings), Vec::new())
            }
            Aim::Evacuate(hosts) => {
                let slots = look.slots(hosts);
                let slots = slots.map_err(|name| Error::HostNotFound(name.to_string()))?;
                (within(evacuate(&look.site, &slots)), hosts.clone())
            }
            Aim::MakeRoom(request) => {
                let (plan, host) = room_for(state, &look, request, ask)?;
                (plan, vec![host])
            }
        };
        let (steps, predicted_seconds) = look.steps(state, plan.moves());
        Ok(Self {
            hosts,
            steps,
            predicted_seconds,
            before: look.figures(),
            predicted: figures(&plan.figures()),
        })
    }

    /// What the site looks like, and what it will.
    pub const fn figures(&self) -> (PlanFigures, PlanFigures) {
        (self.before, self.predicted)
    }

    /// Whether it moves nothing.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

/// The moves after which a host has room for a VM, and that host; none where one has it.
fn room_for(state: &State, look: &Look, request: &Request, ask: &Create) -> Result<(Plan, HostName), Error> {
    let views = hosts::views(state);
    let decision = placement::decide(request, &views, create::rule(state, Policy::default()));
    if let Some(host) = decision.host {
        return Ok((Plan::new(&look.site), host));
    }
    let may = Rule::new(views.len(), |host| {
        placement::lacks_size_alone(request, &views[host])
    });
    let protects = !state.protect.is_empty();
    let settings = Room {
        moves: ask.moves.min(Room::default().moves),
        transfer_mib: ask.copied_mib,
        moves_keep: protects,
        vm_keeps: protects && !request.ignore_protection,
    };
    let made = make_room(&look.site, Size::of(request), &may, &settings);
    let (plan, host) = made.ok_or_else(|| Error::NoRoomToMake {
        moves: settings.moves,
        decision: Box::new(decision),
    })?;
    Ok((plan, look.host(host).clone()))
}

/// Makes a plan. One without moves has ended already. The site may have changed since the draft: each step is checked again when its turn
/// comes.
pub fn create(tx: &mut Tx, caller: &Caller, ask: &Create, draft: Draft) -> Result<Outcome, Error> {
    room(tx)?;
    if let Some(running) = tx.plans.values().find(|plan| plan.state == PlanState::Running) {
        return Err(Error::PlanInProgress(running.id));
    }
    let mut record = make(tx, caller, ask, draft);
    let proposed: Vec<_> = tx
        .plans
        .values()
        .filter(|plan| plan.state == PlanState::Proposed)
        .cloned()
        .collect();
    for old in proposed {
        let mut old = (*old).clone();
        advance::end(
            tx,
            &mut old,
            PlanState::Cancelled,
            "PlanCancelled",
            "another was made",
            None,
        );
        tx.put_plan(old);
    }
    if record.steps.is_empty() {
        record.state = PlanState::Done;
        record.end_time = Some(tx.now());
    }
    let message = format!("{}: {}", record.kind.as_str(), record.message);
    tx.event(EventKind::Plan, "PlanMade", record.id, message, None);
    let id = record.id;
    tx.put_plan(record);
    forget(tx);
    Ok(Outcome::Plan(id))
}

fn make(tx: &Tx, caller: &Caller, ask: &Create, draft: Draft) -> PlanRecord {
    let mut record = PlanRecord {
        id: PlanId::from_uuid(tx.new_id()),
        kind: ask.aim.kind(),
        hosts: draft.hosts,
        state: PlanState::Proposed,
        hash: String::new(),
        steps: draft.steps,
        predicted_seconds: draft.predicted_seconds,
        before: draft.before,
        predicted: draft.predicted,
        realised: None,
        principal: caller.principal.clone(),
        create_time: tx.now(),
        approved_by: None,
        approve_time: None,
        deadline: None,
        end_time: None,
        message: String::new(),
    };
    record.hash = hash(&record);
    record.message = advance::summary(&record);
    record
}

/// SHA-256 of all that a plan does.
fn hash(plan: &PlanRecord) -> String {
    let mut text = format!("{} {}\n", plan.id, plan.kind.as_str());
    for step in &plan.steps {
        let (generation, bytes, stop) = (step.generation, step.copied_bytes, step.max_downtime_ms);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {} {} {generation} {bytes} {stop}",
            step.vm, step.source, step.destination
        );
    }
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn forget(tx: &mut Tx) {
    let now = tx.now();
    let over: Vec<_> = tx
        .plans
        .values()
        .filter(|plan| plan.state.is_over() && !automatic::counts(plan, now))
        .map(|plan| plan.id)
        .collect();
    for id in over.iter().take(over.len().saturating_sub(KEPT)) {
        tx.delete_plan(*id);
    }
}

/// Has a plan carried out.
pub fn approve(
    tx: &mut Tx,
    caller: &Caller,
    id: PlanId,
    hash: &str,
    within: Duration,
) -> Result<Outcome, Error> {
    room(tx)?;
    let mut plan = find(tx, id)?;
    if plan.state != PlanState::Proposed {
        return Err(Error::PlanNotProposed {
            plan: id,
            is: plan.state.as_str(),
        });
    }
    if plan.hash != hash {
        return Err(Error::PlanHash(id));
    }
    let now = tx.now();
    if plan
        .create_time
        .saturating_add(FRESH)
        .is_ok_and(|until| now > until)
    {
        return Err(Error::PlanOutdated(id));
    }
    plan.state = PlanState::Running;
    plan.approved_by = Some(caller.principal.clone());
    plan.approve_time = Some(now);
    plan.deadline = Some(now.saturating_add(within).unwrap_or(now));
    let message = format!("{}: approved by {}", plan.kind.as_str(), caller.principal);
    tx.event(EventKind::Plan, "PlanApproved", id, message, None);
    tx.put_plan(plan);
    Ok(Outcome::Plan(id))
}

/// Gives a plan up. `site` is how the site is now.
pub fn cancel(tx: &mut Tx, caller: &Caller, id: PlanId, site: PlanFigures) -> Result<Outcome, Error> {
    let mut plan = find(tx, id)?;
    if plan.state.is_over() {
        return Err(Error::PlanEnded {
            plan: id,
            is: plan.state.as_str(),
        });
    }
    let why = format!("given up by {}; what was begun goes on", caller.principal);
    advance::end(
        tx,
        &mut plan,
        PlanState::Cancelled,
        "PlanCancelled",
        &why,
        Some(site),
    );
    tx.put_plan(plan);
    Ok(Outcome::Plan(id))
}
