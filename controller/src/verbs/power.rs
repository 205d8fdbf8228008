//! Start, stop, restart, pause, resume, and delete.
//!
//! A verb changes the intent and its sequence numbers and is done: while a VM migrates, the intent waits for the end of
//! that. Only force, in a stop or a deletion, also asks the migration to end. Also what was seen to be so is asked for: it
//! was so when its host last looked, and only the host can say that it still is.

use dalgu_proto::vm::{PowerState, RestartMode, first_boot::Documents};

use super::{
    Caller, Error, abort_migration, accept, backup, check_etag, confirmed, find, new_operation, supersede,
    update,
};
use crate::{
    incarnation,
    model::{EventKind, OperationKind, Outcome, PowerPhase, VmRecord},
    state::{State, Tx},
};

/// What is asked of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Start it.
    Start,
    /// Shut it down within so many seconds, then power it off; 0 powers it off at once.
    Stop {
        /// Seconds.
        grace_period_seconds: u32,
    },
    /// Restart the guest.
    Restart(RestartMode),
    /// Freeze it.
    Pause,
    /// Let it go on.
    Resume,
}

impl Power {
    const fn kind(self) -> OperationKind {
        match self {
            Self::Start => OperationKind::Start,
            Self::Stop { .. } => OperationKind::Stop,
            Self::Restart(_) => OperationKind::Restart,
            Self::Pause => OperationKind::Pause,
            Self::Resume => OperationKind::Resume,
        }
    }

    const fn wanted(self) -> Option<PowerState> {
        match self {
            Self::Start | Self::Resume => Some(PowerState::Running),
            Self::Stop { .. } => Some(PowerState::Stopped),
            Self::Pause => Some(PowerState::Paused),
            Self::Restart(_) => None,
        }
    }

    const fn event(self) -> &'static str {
        match self {
            Self::Start => "VmStarting",
            Self::Stop { .. } => "VmStopping",
            Self::Restart(_) => "VmRestarting",
            Self::Pause => "VmPausing",
            Self::Resume => "VmResuming",
        }
    }
}

/// Power state that was seen, or where nothing was, the one asked for.
fn power_of(state: &State, vm: &VmRecord) -> PowerState {
    state
        .observation(vm)
        .and_then(|observation| observation.power)
        .unwrap_or(vm.intent.power)
}

/// Asks for a power state or a restart.
pub fn power(tx: &mut Tx, caller: &Caller, name: &str, etag: &str, ask: Power) -> Result<Outcome, Error> {
    let mut vm = find(tx, name)?;
    check_etag(etag, vm.revision, name)?;
    if vm.delete_time.is_some() {
        return Err(Error::Deleting(vm.name));
    }
    confirmed(&vm)?;
    needs_running(tx, &vm, ask)?;
    let host = tx.hosts.get(&vm.owner);
    let off = host.is_some_and(|host| matches!(host.phase(), PowerPhase::Off | PowerPhase::PoweringOff));
    if off && matches!(ask, Power::Start) {
        return Err(Error::HostOff {
            vm: vm.name,
            host: vm.owner,
        });
    }
    let mut operation = new_operation(tx, caller, &vm, ask.kind());
    operation.power = ask.wanted();
    if !matches!(ask, Power::Restart(_)) {
        supersede(tx, &vm, ask.kind(), OperationKind::is_power);
    }
    let intent = &mut vm.intent;
    intent.generation = intent.generation.next();
    match ask {
        Power::Restart(mode) => {
            intent.restart_sequence = intent.restart_sequence.saturating_add(1);
            intent.restart_mode = mode;
        }
        _ => intent.power_sequence = intent.power_sequence.saturating_add(1),
    }
    intent.power = ask.wanted().unwrap_or(intent.power);
    if let Power::Stop { grace_period_seconds } = ask {
        intent.grace_period_seconds = grace_period_seconds;
        operation.grace_period_seconds = grace_period_seconds;
        if grace_period_seconds == 0 {
            abort_migration(tx, &vm);
        }
    }
    operation.generation = vm.intent.generation;
    tx.event(
        EventKind::Vm,
        ask.event(),
        &vm.name,
        format!("asked for by {}", caller.principal),
        Some(operation.id),
    );
    tx.put_vm(vm);
    Ok(accept(tx, operation))
}

fn needs_running(tx: &Tx, vm: &VmRecord, ask: Power) -> Result<(), Error> {
    let not_running = |is, next| {
        Err(Error::NotRunning {
            vm: vm.name.clone(),
            is,
            next,
        })
    };
    match (ask, vm.intent.power, power_of(tx, vm)) {
        (Power::Start | Power::Stop { .. }, ..) => Ok(()),
        (_, PowerState::Stopped, _) | (.., PowerState::Stopped) => {
            not_running("not running", "start it first")
        }
        (Power::Restart(_), PowerState::Paused, _) | (Power::Restart(_), _, PowerState::Paused) => {
            not_running("paused", "resume it first")
        }
        _ => Ok(()),
    }
}

/// Deletes a VM and its disks.
pub fn delete(tx: &mut Tx, caller: &Caller, name: &str, etag: &str, force: bool) -> Result<Outcome, Error> {
    let vm = find(tx, name)?;
    check_etag(etag, vm.revision, name)?;
    if vm.delete_time.is_some() {
        return Err(Error::Deleting(vm.name));
    }
    let hosts = incarnation::elsewhere(tx, &vm);
    if !hosts.is_empty() {
        // Its owner would delete disks that both may use, and the other copy would run on.
        let (vm, owner) = (vm.name, vm.owner);
        return Err(Error::SeveralHosts { vm, owner, hosts });
    }
    if !force && may_run(tx, &vm) {
        return Err(Error::Running(vm.name));
    }
    backup::none_under_way(tx, &vm)?;
    for disk in &vm.spec.disks {
        update::stays_put(tx, &vm, disk)?;
    }
    supersede(tx, &vm, OperationKind::Delete, |kind| {
        kind.is_power() || kind == OperationKind::Create
    });
    let vm = condemn(tx, vm, caller);
    let operation = new_operation(tx, caller, &vm, OperationKind::Delete);
    Ok(accept(tx, operation))
}

/// Marks a VM for deletion.
pub(super) fn condemn(tx: &mut Tx, mut vm: VmRecord, caller: &Caller) -> VmRecord {
    abort_migration(tx, &vm);
    vm.delete_time = Some(tx.now());
    // Who says so of a VM that no host has shown since a restore knows that it is gone.
    vm.backup_generation = None;
    vm.intent.generation = vm.intent.generation.next();
    vm.documents = Documents::default();
    tx.event(
        EventKind::Vm,
        "VmDeleting",
        &vm.name,
        format!("asked for by {}", caller.principal),
        None,
    );
    tx.put_vm(vm.clone());
    vm
}

/// Seen alive; or not seen, and meant to be.
pub(super) fn may_run(state: &State, vm: &VmRecord) -> bool {
    match state.observation(vm) {
        Some(observation) => !observation.is_off(),
        None => vm.intent.power != PowerState::Stopped && !state.refusals.contains_key(&vm.id),
    }
}
