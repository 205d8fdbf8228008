//! The plan, case by case.

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
        (Pause, Some(Paused), Some(Stopped), Some(Failed)),
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
