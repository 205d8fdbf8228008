//! What to do next about one VM. Pure: the same input gives the same step.
//!
//! Called by `runner` with a durable snapshot. The order is: end the operations that are over; drive a migration until
//! its owner is known; delete; tell the owner what it does not know yet; else wait for the next deadline.

use std::{sync::Arc, time::Duration};

use dalgu_proto::vm::{PowerReason, PowerState};
use jiff::Timestamp;

use crate::{
    migration,
    model::{
        Code, Fault, HostState, MigrationLive, MigrationRecord, Observation, OperationKind, OperationRecord,
        OperationState, Refusal, VmPhase, VmRecord,
    },
};

/// All that a step depends on.
#[derive(Debug, Clone)]
pub struct Input<'a> {
    /// The wall clock.
    pub now: Timestamp,
    /// The VM.
    pub vm: &'a VmRecord,
    /// What its owner last said, if it counts.
    pub observation: Option<&'a Observation>,
    /// The intent its owner refused last.
    pub refusal: Option<&'a Refusal>,
    /// Whether the owner is heard from.
    pub host: HostState,
    /// When the owner last reported.
    pub report_time: Option<Timestamp>,
    /// Its migration that has not ended.
    pub migration: Option<&'a MigrationRecord>,
    /// What is known of that.
    pub migration_live: MigrationLive,
    /// Whether both hosts of it have a place for one more transfer.
    pub turn: bool,
    /// Its operations that have not ended, oldest first.
    pub operations: &'a [Arc<OperationRecord>],
}

/// How an operation ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    /// Which.
    pub operation: dalgu_proto::ids::OperationId,
    /// How.
    pub state: OperationState,
    /// Why, when not as asked.
    pub error: Option<Fault>,
    /// What there is to say.
    pub message: String,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// End operations.
    End(Vec<Ending>),
    /// Go on with the migration.
    Migrate(migration::Step),
    /// Tell the owner that the VM should be gone.
    Delete,
    /// Tell the owner what should be.
    Ensure,
    /// Nothing, for so long at most.
    Wait(Option<Duration>),
}

/// See the module.
pub fn plan(input: &Input<'_>) -> Step {
    let endings: Vec<_> = input
        .operations
        .iter()
        .filter_map(|operation| ending(input, operation))
        .collect();
    if !endings.is_empty() {
        return Step::End(endings);
    }
    if let Some(migration) = input.migration {
        let step = migration::next(migration, &input.migration_live, input.turn, input.now);
        // The owner is sure of its part: what is asked of the VM need not wait for the other side to tidy up.
        let may_ensure = migration.phase.is_cleaning() && migration.owner_finished();
        if may_ensure && input.vm.delete_time.is_none() && wants_ensure(input) {
            return Step::Ensure;
        }
        return match step {
            migration::Step::Wait(time) => Step::Wait(Some(time)),
            step => Step::Migrate(step),
        };
    }
    // Silent since the controller's start: it registers, or is found unreachable, within a few seconds.
    if input.host != HostState::Initializing {
        if input.vm.delete_time.is_some() {
            return Step::Delete;
        }
        if wants_ensure(input) {
            return Step::Ensure;
        }
    }
    Step::Wait(next_deadline(input))
}

fn wants_ensure(input: &Input<'_>) -> bool {
    // No host has shown it since a restore: a command would make it anew, with empty disks.
    if input.vm.unconfirmed {
        return false;
    }
    let wanted = input.vm.intent.generation;
    let refused = input.refusal.is_some_and(|refusal| refusal.generation >= wanted);
    !refused
        && input
            .observation
            .is_none_or(|observation| observation.accepted < wanted)
}

fn next_deadline(input: &Input<'_>) -> Option<Duration> {
    let next = input
        .operations
        .iter()
        .filter_map(|operation| deadline(operation))
        .min()?;
    Some(Duration::try_from(next.duration_since(input.now)).unwrap_or(Duration::ZERO))
}

/// When an operation fails for having taken too long. A migration has limits of its own, phase by phase.
pub fn deadline(operation: &OperationRecord) -> Option<Timestamp> {
    const MINUTE: u64 = 60;
    let seconds = match operation.kind {
        OperationKind::Create => u64::from(operation.grace_period_seconds) + 15 * MINUTE,
        OperationKind::Start | OperationKind::Pause | OperationKind::Resume | OperationKind::Restart => {
            5 * MINUTE
        }
        OperationKind::Stop => u64::from(operation.grace_period_seconds) + 3 * MINUTE,
        OperationKind::Delete => 10 * MINUTE,
        OperationKind::CreateSnapshot | OperationKind::RevertSnapshot => 15 * MINUTE,
        // A merge copies what was written since, at the speed of a disk that guests use too.
        OperationKind::DeleteSnapshot => 24 * 60 * MINUTE,
        OperationKind::Migrate => return None,
    };
    Some(
        operation
            .create_time
            .saturating_add(Duration::from_secs(seconds))
            .unwrap_or(Timestamp::MAX),
    )
}

fn ending(input: &Input<'_>, operation: &OperationRecord) -> Option<Ending> {
    let end = |state, error, message| {
        Some(Ending {
            operation: operation.id,
            state,
            error,
            message,
        })
    };
    let judged = match operation.kind {
        // These end with their record.
        OperationKind::Migrate => return None,
        OperationKind::Delete => Verdict::Open,
        OperationKind::Create if input.vm.delete_time.is_some() => Verdict::Open,
        _ => carried_out(input, operation),
    };
    match judged {
        Verdict::Done(message) => return end(OperationState::Succeeded, None, message),
        Verdict::Failed(error) => {
            let message = error.message.clone();
            return end(OperationState::Failed, Some(error), message);
        }
        Verdict::Open => {}
    }
    if deadline(operation).is_some_and(|deadline| deadline <= input.now) {
        let message = format!(
            "not done in time: {}. The request stands and will be carried out when it can be",
            waiting_for(input, operation)
        );
        let error = Fault::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message.clone());
        return end(OperationState::Failed, Some(error), message);
    }
    None
}

enum Verdict {
    Open,
    Done(String),
    Failed(Fault),
}

fn carried_out(input: &Input<'_>, operation: &OperationRecord) -> Verdict {
    if let Some(refusal) = input
        .refusal
        .filter(|refusal| refusal.generation >= operation.generation)
    {
        return Verdict::Failed(refusal.fault.clone());
    }
    let Some(observation) = input.observation else {
        return Verdict::Open;
    };
    let failed = observation.phase == VmPhase::Failed && observation.accepted >= operation.generation;
    if let Some(fault) = observation
        .fault
        .as_ref()
        .filter(|fault| failed && !fault.retrying)
    {
        return Verdict::Failed(Fault::new(Code::Aborted, &fault.reason, fault.message.clone()));
    }
    if observation.observed < operation.generation {
        return Verdict::Open;
    }
    // A newer request may ask for something else; this one was carried out on the way there.
    let wanted = operation.power.filter(|power| *power == input.vm.intent.power);
    match (wanted, observation.power) {
        (None, _) => Verdict::Done(String::new()),
        (Some(wanted), Some(seen)) if wanted == seen => Verdict::Done(String::new()),
        (Some(PowerState::Stopped), None) if observation.is_absent() => Verdict::Done(String::new()),
        (Some(PowerState::Running), Some(PowerState::Stopped)) if observation.phase == VmPhase::Settled => {
            match observation.power_reason {
                PowerReason::GuestShutdown => {
                    Verdict::Done("the guest has shut itself down since".to_owned())
                }
                PowerReason::Crashed => Verdict::Failed(Fault::new(
                    Code::Aborted,
                    "VM_CRASHED",
                    "QEMU ended unexpectedly or the guest panicked: see the VM's console and the agent's log",
                )),
                _ => Verdict::Open,
            }
        }
        // What was to be paused has no memory any more; nobody starts it for that.
        (Some(PowerState::Paused), Some(PowerState::Stopped)) if observation.phase == VmPhase::Settled => {
            Verdict::Failed(Fault::new(
                Code::FailedPrecondition,
                "VM_NOT_RUNNING",
                "the VM was powered off before it could be paused: start it, then pause it",
            ))
        }
        _ => Verdict::Open,
    }
}

/// What an operation that has not ended waits for, for people.
pub fn waiting_for(input: &Input<'_>, operation: &OperationRecord) -> String {
    let host = &input.vm.owner;
    if operation.kind == OperationKind::Migrate {
        return migration_text(input);
    }
    if input
        .migration
        .is_some_and(|migration| !migration.owner_finished())
    {
        return "waiting for the migration to end".to_owned();
    }
    if input.host != HostState::Ready {
        return match input.report_time {
            Some(time) => {
                let seconds = input.now.duration_since(time).as_secs().max(0);
                format!("host {host} has not reported for {seconds} s")
            }
            None => format!("host {host} has not reported since the controller's start"),
        };
    }
    if let Some(fault) = input
        .observation
        .and_then(|observation| observation.fault.as_ref())
    {
        return format!("host {host} says: {} ({})", fault.message, fault.reason);
    }
    if input.vm.unconfirmed {
        return "no host has shown the VM since a backup was restored; see `dalgu site show`".to_owned();
    }
    match (operation.kind, input.observation) {
        (OperationKind::Delete, _) => format!("host {host} is removing it"),
        (_, None) => format!("host {host} has not answered yet"),
        (_, Some(seen)) if seen.accepted < operation.generation => {
            format!("host {host} has not been told yet")
        }
        (OperationKind::Create, _) => format!("host {host} is making and starting it"),
        (OperationKind::CreateSnapshot, _) => format!("host {host} makes the snapshot"),
        (OperationKind::DeleteSnapshot, _) => format!("host {host} merges what was written since"),
        (OperationKind::RevertSnapshot, _) => format!("host {host} goes back to the snapshot"),
        (OperationKind::Stop, _) => format!("host {host} waits for the guest to shut down"),
        (kind, _) => format!("host {host} carries out the {}", kind.as_str()),
    }
}

fn migration_text(input: &Input<'_>) -> String {
    let Some(migration) = input.migration else {
        return String::new();
    };
    if let Some(doubt) = &input.migration_live.doubt {
        return doubt.clone();
    }
    use crate::model::Phase;
    match migration.phase {
        Phase::Reserving => "waiting for a free place for one more transfer".to_owned(),
        Phase::PreparingDestination => format!("host {} makes room", migration.destination),
        Phase::Transferring => format!("copying from {} to {}", migration.source, migration.destination),
        Phase::CuttingOver => "asking both hosts where the VM is".to_owned(),
        Phase::CleaningSource => format!(
            "it is on {}; {} tidies up",
            migration.destination, migration.source
        ),
        Phase::CleaningDestination => format!(
            "it is on {}; {} tidies up",
            migration.source, migration.destination
        ),
        Phase::Done | Phase::Failed | Phase::Aborted => String::new(),
    }
}

#[cfg(test)]
mod tests;
