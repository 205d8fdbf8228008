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
        OperationKind::Create => 15 * MINUTE,
        OperationKind::Start | OperationKind::Pause | OperationKind::Resume | OperationKind::Restart => {
            5 * MINUTE
        }
        OperationKind::Stop => u64::from(operation.grace_period_seconds) + 3 * MINUTE,
        OperationKind::Delete => 10 * MINUTE,
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
        (Some(PowerState::Stopped), None) => Verdict::Done(String::new()),
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
    match (operation.kind, input.observation) {
        (OperationKind::Delete, _) => format!("host {host} is removing it"),
        (_, None) => format!("host {host} has not answered yet"),
        (_, Some(seen)) if seen.accepted < operation.generation => {
            format!("host {host} has not been told yet")
        }
        (OperationKind::Create, _) => format!("host {host} is making and starting it"),
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
mod tests {
    use dalgu_proto::ids::Generation;

    use super::*;
    use crate::{
        fixtures,
        model::{Phase, VmFault},
    };

    struct Case {
        vm: VmRecord,
        observation: Option<Observation>,
        refusal: Option<Refusal>,
        host: HostState,
        migration: Option<MigrationRecord>,
        operations: Vec<Arc<OperationRecord>>,
        now: Timestamp,
    }

    fn case() -> Case {
        let vm = fixtures::vm("web", "h1");
        Case {
            observation: Some(fixtures::observation(&vm)),
            vm,
            refusal: None,
            host: HostState::Ready,
            migration: None,
            operations: vec![],
            now: Timestamp::UNIX_EPOCH,
        }
    }

    impl Case {
        fn input(&self) -> Input<'_> {
            Input {
                now: self.now,
                vm: &self.vm,
                observation: self.observation.as_ref(),
                refusal: self.refusal.as_ref(),
                host: self.host,
                report_time: None,
                migration: self.migration.as_ref(),
                migration_live: MigrationLive {
                    started: true,
                    ..MigrationLive::default()
                },
                turn: true,
                operations: &self.operations,
            }
        }

        fn plan(&self) -> Step {
            plan(&self.input())
        }

        fn with(mut self, kind: OperationKind, power: Option<PowerState>) -> Self {
            self.operations
                .push(Arc::new(fixtures::operation(&self.vm, kind, power)));
            self
        }

        fn ended(&self) -> Option<(OperationState, Option<String>)> {
            match self.plan() {
                Step::End(endings) => Some((
                    endings[0].state,
                    endings[0].error.as_ref().map(|e| e.reason.clone()),
                )),
                _ => None,
            }
        }

        fn seen(mut self, change: impl FnOnce(&mut Observation)) -> Self {
            change(self.observation.as_mut().unwrap());
            self
        }
    }

    #[test]
    fn a_vm_that_is_as_it_should_be_is_left_alone() {
        assert_eq!(case().plan(), Step::Wait(None));
    }

    #[test]
    fn an_owner_that_does_not_know_the_intent_is_told() {
        assert_eq!(case().seen(|o| o.accepted = Generation(2)).plan(), Step::Ensure);
        for (host, expected) in [
            (HostState::Ready, Step::Ensure),
            (HostState::Unreachable, Step::Ensure),
            (HostState::Initializing, Step::Wait(None)),
        ] {
            assert_eq!(
                Case {
                    observation: None,
                    host,
                    ..case()
                }
                .plan(),
                expected,
                "{host:?}"
            );
        }
    }

    #[test]
    fn a_refused_intent_is_not_repeated_until_it_changes() {
        let fault = Fault::new(Code::FailedPrecondition, "IMAGE_NOT_FOUND", "x");
        let mut case = Case {
            observation: None,
            ..case()
        };
        case.refusal = Some(Refusal {
            generation: case.vm.intent.generation,
            fault,
        });
        assert_eq!(case.plan(), Step::Wait(None));
        case.vm.intent.generation = case.vm.intent.generation.next();
        assert_eq!(case.plan(), Step::Ensure);
    }

    #[test]
    fn operations_end_by_what_the_owner_reports() {
        use OperationKind::{Create, Pause, Restart, Start, Stop};
        use OperationState::{Failed, Succeeded};
        use PowerState::{Paused, Running, Stopped};
        for (kind, power, seen, expected) in [
            (Create, Some(Running), Some(Running), Some(Succeeded)),
            (Create, Some(Stopped), Some(Stopped), Some(Succeeded)),
            (Create, Some(Running), None, None),
            (Start, Some(Running), Some(Running), Some(Succeeded)),
            (Start, Some(Running), Some(Paused), None),
            (Stop, Some(Stopped), Some(Stopped), Some(Succeeded)),
            (Stop, Some(Stopped), None, Some(Succeeded)),
            (Stop, Some(Stopped), Some(Running), None),
            (Pause, Some(Paused), Some(Running), None),
            (Restart, None, Some(Running), Some(Succeeded)),
        ] {
            let mut case = case();
            case.vm.intent.power = power.unwrap_or(Running);
            let case = case.with(kind, power).seen(|o| o.power = seen);
            assert_eq!(case.ended().map(|e| e.0), expected, "{kind:?} {seen:?}");
            let behind = case.seen(|o| o.observed = Generation(2));
            assert_eq!(behind.ended(), None, "{kind:?} with an older generation");
        }
        let gone = |reason| {
            case().with(Start, Some(Running)).seen(|o| {
                o.power = Some(Stopped);
                o.power_reason = reason;
            })
        };
        assert_eq!(
            gone(PowerReason::GuestShutdown).ended().map(|e| e.0),
            Some(Succeeded)
        );
        assert_eq!(
            gone(PowerReason::Crashed).ended(),
            Some((Failed, Some("VM_CRASHED".into())))
        );
        assert_eq!(gone(PowerReason::HostReboot).ended(), None);
    }

    #[test]
    fn an_operation_fails_when_the_agent_gives_up_but_not_while_it_tries_again() {
        let failing = |retrying, accepted| {
            case()
                .with(OperationKind::Start, Some(PowerState::Running))
                .seen(|o| {
                    o.phase = VmPhase::Failed;
                    o.observed = Generation(0);
                    o.accepted = accepted;
                    o.fault = Some(VmFault {
                        reason: "START_FAILED".into(),
                        message: "x".into(),
                        retrying,
                        time: None,
                    });
                })
        };
        assert_eq!(
            failing(false, Generation(3)).ended(),
            Some((OperationState::Failed, Some("START_FAILED".into())))
        );
        assert_eq!(failing(true, Generation(3)).ended(), None);
        assert_eq!(
            failing(false, Generation(2)).ended(),
            None,
            "that was an older intent"
        );
    }

    #[test]
    fn an_operation_ends_at_its_deadline_and_says_what_it_waited_for() {
        use OperationKind::{Create, Delete, Migrate, Start, Stop};
        for (kind, minutes) in [(Create, 15), (Start, 5), (Stop, 3), (Delete, 10)] {
            let mut case = Case {
                observation: None,
                host: HostState::Unreachable,
                ..case()
            };
            case = case.with(kind, Some(PowerState::Running));
            case.now = Timestamp::from_second(minutes * 60 - 1).unwrap();
            assert_eq!(case.ended(), None, "{kind:?}");
            case.now = Timestamp::from_second(minutes * 60).unwrap();
            let Step::End(endings) = case.plan() else {
                panic!("{kind:?} goes on")
            };
            let error = endings[0].error.as_ref().unwrap();
            assert_eq!(error.reason, "DEADLINE_EXCEEDED");
            assert!(
                error.message.contains("host h1 has not reported"),
                "{}",
                error.message
            );
        }
        let mut case = case().with(Migrate, None);
        case.now = Timestamp::from_second(1_000_000).unwrap();
        assert_eq!(case.ended(), None, "a migration has limits of its own");
    }

    #[test]
    fn the_next_look_is_at_the_next_deadline() {
        let case = Case {
            host: HostState::Ready,
            ..case()
        }
        .with(OperationKind::Stop, Some(PowerState::Stopped))
        .with(OperationKind::Create, Some(PowerState::Running))
        .seen(|o| o.observed = Generation(1));
        assert_eq!(case.plan(), Step::Wait(Some(Duration::from_secs(180))));
    }

    #[test]
    fn a_migration_comes_before_everything_but_the_end_of_operations() {
        let mut case = Case {
            observation: None,
            ..case()
        };
        case.migration = Some(fixtures::migration(&case.vm, "h2"));
        case.vm.delete_time = Some(case.now);
        assert_eq!(case.plan(), Step::Migrate(migration::Step::Poll));
        let record = case.migration.as_mut().unwrap();
        record.phase = Phase::CleaningDestination;
        record.source_finished = true;
        let tidy = Step::Migrate(migration::Step::Finish(migration::Side::Destination));
        assert_eq!(case.plan(), tidy, "a deletion waits for both sides");
        case.vm.delete_time = None;
        assert_eq!(
            case.plan(),
            Step::Ensure,
            "the owner need not wait for the other side"
        );
        case.migration.as_mut().unwrap().source_finished = false;
        assert_eq!(
            case.plan(),
            Step::Migrate(migration::Step::Finish(migration::Side::Source))
        );
    }

    #[test]
    fn a_deleted_vm_is_never_told_to_be() {
        let mut case = Case {
            observation: None,
            ..case()
        };
        case.vm.delete_time = Some(case.now);
        assert_eq!(case.plan(), Step::Delete);
        let case = Case {
            host: HostState::Initializing,
            ..case
        };
        assert_eq!(case.plan(), Step::Wait(None));
    }

    #[test]
    fn a_create_that_was_given_up_waits_for_the_deletion() {
        let mut case = case().with(OperationKind::Create, Some(PowerState::Running));
        case.vm.delete_time = Some(case.now);
        assert_eq!(case.plan(), Step::Delete);
    }

    #[test]
    fn a_create_is_done_when_a_newer_request_has_another_aim() {
        let mut case = case().with(OperationKind::Create, Some(PowerState::Running));
        case.vm.intent.power = PowerState::Stopped;
        let case = case.seen(|o| o.power = Some(PowerState::Stopped));
        assert_eq!(case.ended().map(|e| e.0), Some(OperationState::Succeeded));
    }
}
