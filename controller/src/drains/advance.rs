//! One pass over a drain: what became of its VMs, what is begun next, and whether it has ended.
//!
//! Called by `runner`, and by the API to show what a drain would do. Everything happens inside a transaction.

use std::collections::BTreeSet;

use dalgu_proto::{
    ids::{HostName, OperationId, VmId, VmName},
    vm::PowerState,
};

use crate::{
    model::{
        Code, Direction, Drain, DrainMode, DrainState, DrainedVm, EventKind, Fault, HostRecord,
        OperationState, Outcome, Stage, VmPhase, VmRecord,
    },
    placement::Policy,
    state::{State, Tx},
    verbs::{
        Caller, Error,
        migrate::{self, DEFAULT_DOWNTIME_MS, Migrate},
        power::{self, Power},
    },
};

/// A VM whose migration, stop or start failed so often is for people to look at.
const MOST_FAILURES: u32 = 3;

/// How much one pass may begin.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// VMs of the host that may be under way.
    pub under_way: usize,
    /// Refusals after which no other VM is tried: each may be a look at every host of the site.
    pub refusals: usize,
}

/// Makes a pass over the drain of a host. VMs that are `resting` are not tried again. Returns those that were refused.
pub fn advance(
    tx: &mut Tx,
    host: &HostName,
    policy: Policy,
    limits: Limits,
    resting: &BTreeSet<VmId>,
) -> Vec<VmId> {
    let Some(old) = active(tx, host) else {
        return Vec::new();
    };
    let mut drain = old.clone();
    follow(tx, host, &mut drain);
    let mut refused = Vec::new();
    if tx.now() < drain.deadline {
        refused = begin(tx, host, &mut drain, policy, limits, resting);
    }
    conclude(tx, host, &mut drain);
    if drain != old {
        store(tx, host, drain);
    }
    refused
}

fn active(state: &State, host: &HostName) -> Option<Drain> {
    let drain = state.hosts.get(host)?.drain.as_ref()?;
    drain.is_active().then(|| drain.clone())
}

fn store(tx: &mut Tx, host: &HostName, drain: Drain) {
    let Some(record) = tx.hosts.get(host) else { return };
    let mut record = (**record).clone();
    let (event, message) = match (drain.state, drain.direction) {
        (DrainState::Active, _) => (None, String::new()),
        (DrainState::Done, Direction::Out) => (Some("HostDrained"), summary(&drain)),
        (DrainState::Done, Direction::Back) => (Some("HostRestored"), summary(&drain)),
        (DrainState::Blocked, _) => (Some("HostDrainBlocked"), summary(&drain)),
        (DrainState::Cancelled, _) => (Some("HostDrainCancelled"), summary(&drain)),
    };
    if let Some(event) = event {
        tx.event(EventKind::Host, event, host, message, None);
    }
    record.drain = Some(drain);
    tx.put_host(record);
}

/// What became of its VMs, in one sentence.
pub fn summary(drain: &Drain) -> String {
    let words = [
        (Stage::Moved, "moved"),
        (Stage::Stopped, "stopped"),
        (Stage::Started, "started"),
        (Stage::Left, "left"),
        (Stage::Moving, "moving"),
        (Stage::Stopping, "stopping"),
        (Stage::Starting, "starting"),
        (Stage::Waiting, "waiting"),
        (Stage::Blocked, "blocked"),
    ];
    let counts = words
        .map(|(stage, word)| (drain.count(|other| other == stage), word))
        .into_iter()
        .filter(|(count, _)| *count > 0);
    let counts: Vec<_> = counts.map(|(count, word)| format!("{count} {word}")).collect();
    match counts.as_slice() {
        [] => "no VMs".to_owned(),
        counts => format!("VMs: {}", counts.join(", ")),
    }
}

/// Reads from the state what has become of each VM.
fn follow(state: &State, host: &HostName, drain: &mut Drain) {
    if drain.direction == Direction::Out {
        let here = state.host_vms.get(host).into_iter().flatten();
        let here = here
            .filter_map(|id| state.vms.get(id))
            .filter(|vm| vm.owner == *host);
        for vm in here {
            let mode = drain.mode.unwrap_or(vm.drain_mode);
            let fresh = || DrainedVm::new(vm.id, mode);
            let known = drain.vms.entry(vm.name.clone()).or_insert_with(fresh);
            if known.vm != vm.id {
                *known = fresh();
            }
            if !known.stage.is_under_way() {
                known.mode = mode;
            }
        }
    }
    drain.vms.retain(|_, drained| state.vms.contains_key(&drained.vm));
    for drained in drain.vms.values_mut() {
        let was_under_way = drained.stage.is_under_way();
        follow_one(state, host, drain.direction, drained);
        // What an earlier drain had begun with it has ended: from now on it is as this one says.
        if was_under_way
            && !drained.stage.is_over()
            && drain.direction == Direction::Out
            && let Some(vm) = state.vms.get(&drained.vm)
        {
            drained.mode = drain.mode.unwrap_or(vm.drain_mode);
        }
    }
}

fn follow_one(state: &State, host: &HostName, direction: Direction, drained: &mut DrainedVm) {
    let Some(vm) = state.vms.get(&drained.vm) else {
        return;
    };
    match direction {
        _ if follow_operation(state, vm, drained) => {}
        Direction::Out => follow_out(state, host, vm, drained),
        Direction::Back => follow_back(state, host, vm, drained),
    }
}

/// A host's drain as it is now: what it had begun when it ended may have come to its own end since, and what was to come back may be wanted
/// elsewhere.
pub fn seen(state: &State, host: &HostRecord) -> Option<Drain> {
    let mut drain = host.drain.clone()?;
    let back = drain.direction == Direction::Back;
    let open = |vm: &&mut DrainedVm| vm.stage.is_under_way() || (back && !vm.stage.is_over());
    for drained in drain.vms.values_mut().filter(open) {
        follow_one(state, &host.name, drain.direction, drained);
    }
    Some(drain)
}

fn follow_out(state: &State, host: &HostName, vm: &VmRecord, drained: &mut DrainedVm) {
    let off = is_off(state, vm);
    let stage = match drained.stage {
        // Whoever moved it on later wants it there.
        Stage::Moved if vm.owner != *host && drained.host.is_some() => Stage::Moved,
        _ if vm.owner != *host => {
            drained.host = Some(vm.owner.clone());
            Stage::Moved
        }
        Stage::Stopping | Stage::Stopped if off => Stage::Stopped,
        _ if off => Stage::Left,
        Stage::Blocked => Stage::Blocked,
        Stage::Left if drained.mode == DrainMode::Leave => Stage::Left,
        _ => Stage::Waiting,
    };
    if stage != Stage::Blocked {
        settle(drained, stage);
    }
}

fn follow_back(state: &State, host: &HostName, vm: &VmRecord, drained: &mut DrainedVm) {
    let stops = drained.mode == DrainMode::Stop;
    let off = is_off(state, vm);
    let runs = state.observation(vm).is_some_and(|seen| !seen.is_off());
    let stage = match drained.stage {
        _ if vm.delete_time.is_some() => Stage::Left,
        _ if stops && runs => Stage::Started,
        _ if !stops && vm.owner == *host => Stage::Moved,
        // Whoever stopped it, or moved it on, wants it there.
        _ if !stops && (off || drained.host.as_ref() != Some(&vm.owner)) => Stage::Left,
        Stage::Blocked => Stage::Blocked,
        _ => Stage::Waiting,
    };
    if stage != Stage::Blocked {
        settle(drained, stage);
    }
}

fn settle(drained: &mut DrainedVm, stage: Stage) {
    drained.stage = stage;
    drained.operation = None;
    drained.fault = None;
    drained.passes = false;
}

/// Follows what is being done with a VM: by the drain, or, where it migrates, by anybody. Whether it goes on.
fn follow_operation(state: &State, vm: &VmRecord, drained: &mut DrainedVm) -> bool {
    let is_away = drained.stage == Stage::Moved;
    if let Some(migration) = state.active_migration(vm.id).filter(|_| !is_away) {
        drained.stage = Stage::Moving;
        drained.operation = Some(migration.operation);
        drained.fault = None;
        return true;
    }
    let Some(operation) = drained.operation.and_then(|id| state.operations.get(&id)) else {
        return false;
    };
    if operation.is_active() {
        return true;
    }
    if operation.state != OperationState::Succeeded {
        drained.failures = drained.failures.saturating_add(1);
        let fault = operation.error.clone();
        let fault = fault
            .unwrap_or_else(|| Fault::new(Code::Cancelled, "OPERATION_CANCELLED", operation.message.clone()));
        block(drained, fault, drained.failures < MOST_FAILURES);
    }
    drained.operation = None;
    false
}

fn block(drained: &mut DrainedVm, fault: Fault, passes: bool) {
    drained.stage = Stage::Blocked;
    drained.operation = None;
    drained.fault = Some(fault);
    drained.passes = passes;
}

/// Whether a VM is off, and stays so: it is to be, or its guest has shut down by itself.
pub fn is_off(state: &State, vm: &VmRecord) -> bool {
    let Some(seen) = state.observation(vm).filter(|seen| seen.is_off()) else {
        return false;
    };
    let done = seen.phase == VmPhase::Settled && seen.observed >= vm.intent.generation;
    vm.intent.power == PowerState::Stopped || done
}

/// Begins what can be begun, the largest VMs first: they are the hardest to place.
fn begin(
    tx: &mut Tx,
    host: &HostName,
    drain: &mut Drain,
    policy: Policy,
    limits: Limits,
    resting: &BTreeSet<VmId>,
) -> Vec<VmId> {
    let memory = |drained: &DrainedVm| tx.vms.get(&drained.vm).map_or(0, |vm| vm.spec.memory_mib);
    let mut open: Vec<_> = drain
        .vms
        .iter()
        .filter(|(_, drained)| matches!(drained.stage, Stage::Waiting | Stage::Blocked))
        .filter(|(_, drained)| !resting.contains(&drained.vm))
        .map(|(name, drained)| (std::cmp::Reverse(memory(drained)), name.clone()))
        .collect();
    open.sort_unstable();
    let caller = Caller {
        principal: drain.principal.clone(),
        request_id: String::new(),
        body: String::new(),
    };
    let direction = drain.direction;
    let mut under_way = drain.count(Stage::is_under_way);
    let mut refused = Vec::new();
    for (_, name) in open {
        let Some(drained) = drain.vms.get_mut(&name) else {
            continue;
        };
        let act = match (direction, drained.mode) {
            (Direction::Out, DrainMode::Leave) => {
                settle(drained, Stage::Left);
                continue;
            }
            (Direction::Out, DrainMode::Ask) => {
                block(drained, asks(&name), false);
                continue;
            }
            (Direction::Out, DrainMode::LiveMigrate) => Act::Move(None),
            (Direction::Out, DrainMode::Stop) => Act::Stop,
            (Direction::Back, DrainMode::Stop) => Act::Start,
            (Direction::Back, _) => Act::Move(Some(host.clone())),
        };
        let enough = under_way >= limits.under_way || refused.len() >= limits.refusals;
        if enough || drained.failures >= MOST_FAILURES {
            continue;
        }
        match act.begin(tx, &caller, &name, policy) {
            Ok((operation, destination)) => {
                under_way += 1;
                settle(drained, act.stage());
                drained.operation = Some(operation);
                if direction == Direction::Out {
                    drained.host = destination;
                }
            }
            Err(error) => {
                // That costs no look at the hosts, and is over in a moment.
                if !matches!(error, Error::PowerChanging { .. }) {
                    refused.push(drained.vm);
                }
                block(drained, error.fault(), passes(&error));
            }
        }
    }
    refused
}

/// What is done with a VM.
enum Act {
    Move(Option<HostName>),
    Stop,
    Start,
}

impl Act {
    const fn stage(&self) -> Stage {
        match self {
            Self::Move(_) => Stage::Moving,
            Self::Stop => Stage::Stopping,
            Self::Start => Stage::Starting,
        }
    }

    /// The operation, and where the VM goes.
    fn begin(
        &self,
        tx: &mut Tx,
        caller: &Caller,
        vm: &VmName,
        policy: Policy,
    ) -> Result<(OperationId, Option<HostName>), Error> {
        let power = |tx: &mut Tx, ask| power::power(tx, caller, vm.as_str(), "", ask);
        let outcome = match self {
            Self::Move(destination) => {
                let ask = Migrate {
                    destination: destination.clone(),
                    max_downtime_ms: DEFAULT_DOWNTIME_MS,
                    bandwidth_mib_per_second: 0,
                    ignore_protection: false,
                    policy,
                };
                migrate::migrate(tx, caller, vm.as_str(), "", ask)?
            }
            Self::Stop => {
                let record = tx.vm_by_name(vm);
                let grace_period_seconds = record.map_or(0, |vm| vm.intent.grace_period_seconds);
                power(tx, Power::Stop { grace_period_seconds })?
            }
            Self::Start => power(tx, Power::Start)?,
        };
        let Outcome::Operation(id) = outcome else {
            return Err(Error::VmNotFound(vm.to_string()));
        };
        let migration = tx.operations.get(&id).and_then(|operation| operation.migration);
        let migration = migration.and_then(|id| tx.migrations.get(&id));
        Ok((id, migration.map(|migration| migration.destination.clone())))
    }
}

/// What a VM is told of whose mode says that people decide.
pub fn asks(name: &VmName) -> Fault {
    let message = format!("{name} is not to be moved or stopped before somebody says so");
    Fault::new(Code::FailedPrecondition, "ASKS", message)
}

/// Whether a refusal may pass without anybody's help.
pub const fn passes(error: &Error) -> bool {
    matches!(
        error,
        Error::Initializing
            | Error::HostUnreachable(_)
            | Error::MigrationInProgress(_)
            | Error::PowerChanging { .. }
            | Error::ChangeInProgress { .. }
            | Error::BackupInProgress { .. }
            | Error::NoCapacity { .. }
            | Error::PlacementConflict(_)
            | Error::LowSpace(_)
            | Error::Deleting(_)
    )
}

/// Ends a drain that has nothing more to do, or no time.
fn conclude(tx: &Tx, host: &HostName, drain: &mut Drain) {
    // One that was on its way here when the host was closed has to leave again.
    let comes = |vm| {
        let migration = tx.active_migration(vm);
        migration.is_some_and(|migration| migration.destination == *host)
    };
    let awaited = drain.direction == Direction::Out && tx.active_migrations.keys().any(|vm| comes(*vm));
    let open = || drain.vms.values().filter(|drained| !drained.stage.is_over());
    let stuck = |drained: &DrainedVm| drained.stage == Stage::Blocked && !drained.passes;
    let state = if open().next().is_none() && !awaited {
        DrainState::Done
    } else if tx.now() >= drain.deadline || (open().all(stuck) && !awaited) {
        DrainState::Blocked
    } else {
        return;
    };
    drain.state = state;
    drain.end_time = Some(tx.now());
}
