//! The one word that sums up a VM for a person.
//!
//! Called by the API and the metrics for every VM they show. Pure. It never says more than is known: a VM on a silent
//! host is Unreachable, never Stopped; after a broken migration it is Resolving until both hosts have answered.

use dalgu_proto::vm::PowerState;

use crate::model::{
    HostState, MigrationLive, MigrationRecord, Observation, OperationKind, Phase, VmPhase, VmRecord,
};
use crate::state::State;

/// Summary of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VmState {
    /// Accepted and placed; its host has not answered yet.
    Pending,
    /// Being defined or started.
    Starting,
    /// Observed running.
    Running,
    /// Observed paused.
    Paused,
    /// Being shut down.
    Stopping,
    /// Observed powered off.
    Stopped,
    /// Moving.
    Migrating,
    /// Being deleted.
    Deleting,
    /// The host could not do what was asked.
    Failed,
    /// Its host has not reported for a while.
    Unreachable,
    /// Both hosts of a broken migration are being asked.
    Resolving,
}

impl VmState {
    /// Every state.
    pub const ALL: [Self; 11] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Migrating,
        Self::Deleting,
        Self::Failed,
        Self::Unreachable,
        Self::Resolving,
    ];

    /// Name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Migrating => "migrating",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
            Self::Unreachable => "unreachable",
            Self::Resolving => "resolving",
        }
    }
}

/// What the word is made from.
#[derive(Debug, Clone)]
pub struct View<'a> {
    /// The VM.
    pub vm: &'a VmRecord,
    /// What its owner last said, if it counts.
    pub observation: Option<&'a Observation>,
    /// Whether the owner is heard from.
    pub host: HostState,
    /// Its migration that has not ended.
    pub migration: Option<(&'a MigrationRecord, MigrationLive)>,
    /// Its creation has not ended.
    pub creating: bool,
    /// The owner refused the present intent.
    pub refused: bool,
}

/// The state of a VM as a whole state shows it.
pub fn of(state: &State, vm: &VmRecord) -> VmState {
    let creating = state
        .active_operations(vm.id)
        .iter()
        .any(|op| op.kind == OperationKind::Create);
    let migration = state.active_migration(vm.id);
    derive(&View {
        vm,
        observation: state.observation(vm).map(AsRef::as_ref),
        host: state
            .live
            .get(&vm.owner)
            .map_or(HostState::Unreachable, |live| live.state),
        migration: migration.map(|m| (&**m, state.migration_live(m.id))),
        creating,
        refused: state
            .refusals
            .get(&vm.id)
            .is_some_and(|r| r.generation >= vm.intent.generation),
    })
}

/// See the module.
pub fn derive(view: &View<'_>) -> VmState {
    if view.vm.delete_time.is_some() {
        return VmState::Deleting;
    }
    if let Some((migration, live)) = &view.migration {
        if migration.phase == Phase::CuttingOver && live.doubt.is_some() {
            return VmState::Resolving;
        }
        if !migration.owner_finished() {
            return VmState::Migrating;
        }
    }
    if view.host == HostState::Unreachable {
        return VmState::Unreachable;
    }
    if view.refused {
        return VmState::Failed;
    }
    match view.observation {
        Some(observation) => observed(view.vm, observation),
        None if view.creating || view.host == HostState::Ready => VmState::Pending,
        // After a start of the controller: the host has not been heard yet.
        None => VmState::Unreachable,
    }
}

fn observed(vm: &VmRecord, observation: &Observation) -> VmState {
    let accepted = observation.accepted >= vm.intent.generation;
    let done = observation.observed >= vm.intent.generation;
    let gave_up = observation.fault.as_ref().is_some_and(|fault| !fault.retrying);
    if accepted && observation.phase == VmPhase::Failed && gave_up {
        return VmState::Failed;
    }
    match (vm.intent.power, observation.power) {
        // Neither a power state nor the lack of a domain: its agent is newer.
        (_, None) if !observation.is_absent() => VmState::Resolving,
        (PowerState::Running | PowerState::Paused, Some(PowerState::Running)) => VmState::Running,
        (PowerState::Running | PowerState::Paused, Some(PowerState::Paused)) => VmState::Paused,
        (PowerState::Running | PowerState::Paused, Some(PowerState::Stopped) | None) if done => {
            VmState::Stopped
        }
        (PowerState::Running | PowerState::Paused, _) => VmState::Starting,
        (PowerState::Stopped, Some(PowerState::Stopped)) => VmState::Stopped,
        (PowerState::Stopped, None) if done => VmState::Stopped,
        (PowerState::Stopped, None) => VmState::Starting,
        (PowerState::Stopped, Some(PowerState::Running)) if done => VmState::Running,
        (PowerState::Stopped, Some(PowerState::Paused)) if done => VmState::Paused,
        (PowerState::Stopped, Some(_)) => VmState::Stopping,
    }
}

#[cfg(test)]
mod tests {
    use dalgu_proto::ids::Generation;

    use super::*;
    use crate::fixtures;
    use crate::model::VmFault;

    fn view<'a>(vm: &'a VmRecord, observation: Option<&'a Observation>) -> View<'a> {
        View {
            vm,
            observation,
            host: HostState::Ready,
            migration: None,
            creating: false,
            refused: false,
        }
    }

    #[test]
    fn what_is_wanted_and_what_is_seen_make_the_word() {
        use PowerState::{Paused, Running, Stopped};
        for (wanted, seen, done, expected) in [
            (Running, Some(Running), true, VmState::Running),
            (Running, Some(Running), false, VmState::Running),
            (Running, Some(Stopped), false, VmState::Starting),
            (Running, Some(Stopped), true, VmState::Stopped),
            (Running, Some(Paused), true, VmState::Paused),
            (Running, None, false, VmState::Starting),
            (Stopped, Some(Running), false, VmState::Stopping),
            (Stopped, Some(Running), true, VmState::Running),
            (Stopped, Some(Paused), false, VmState::Stopping),
            (Stopped, Some(Stopped), true, VmState::Stopped),
            (Stopped, None, false, VmState::Starting),
            (Paused, Some(Paused), true, VmState::Paused),
            (Paused, Some(Running), false, VmState::Running),
        ] {
            let mut vm = fixtures::vm("web", "h1");
            vm.intent.power = wanted;
            let mut observation = fixtures::observation(&vm);
            observation.power = seen;
            observation.observed = if done { vm.intent.generation } else { Generation(0) };
            assert_eq!(
                derive(&view(&vm, Some(&observation))),
                expected,
                "{wanted:?} {seen:?} {done}"
            );
        }
    }

    #[test]
    fn a_silent_host_makes_a_vm_unreachable_never_stopped() {
        let mut vm = fixtures::vm("web", "h1");
        for wanted in [PowerState::Running, PowerState::Stopped] {
            vm.intent.power = wanted;
            let mut observation = fixtures::observation(&vm);
            observation.power = Some(PowerState::Stopped);
            for seen in [Some(&observation), None] {
                let silent = View {
                    host: HostState::Unreachable,
                    ..view(&vm, seen)
                };
                assert_eq!(derive(&silent), VmState::Unreachable);
            }
        }
        let starting = View {
            host: HostState::Initializing,
            ..view(&vm, None)
        };
        assert_eq!(
            derive(&starting),
            VmState::Unreachable,
            "nothing has been heard since the start"
        );
    }

    #[test]
    fn a_failure_counts_only_for_the_present_intent_and_when_the_agent_has_given_up() {
        let mut vm = fixtures::vm("web", "h1");
        let mut observation = fixtures::observation(&vm);
        observation.phase = VmPhase::Failed;
        observation.power = Some(PowerState::Stopped);
        observation.observed = Generation(0);
        let fault = |retrying| {
            Some(VmFault {
                reason: "X".into(),
                message: "x".into(),
                retrying,
                time: None,
            })
        };
        observation.fault = fault(false);
        assert_eq!(derive(&view(&vm, Some(&observation))), VmState::Failed);
        observation.fault = fault(true);
        assert_eq!(derive(&view(&vm, Some(&observation))), VmState::Starting);
        observation.fault = fault(false);
        vm.intent.generation = vm.intent.generation.next();
        assert_eq!(derive(&view(&vm, Some(&observation))), VmState::Starting);
        assert_eq!(
            derive(&View {
                refused: true,
                ..view(&vm, None)
            }),
            VmState::Failed
        );
    }

    #[test]
    fn deletion_and_migration_come_first() {
        let mut vm = fixtures::vm("web", "h1");
        let mut migration = fixtures::migration(&vm, "h2");
        let doubt = MigrationLive {
            doubt: Some("h2 is silent".into()),
            ..MigrationLive::default()
        };
        let with = |migration: &MigrationRecord, live: &MigrationLive, vm: &VmRecord| {
            derive(&View {
                migration: Some((migration, live.clone())),
                host: HostState::Unreachable,
                ..view(vm, None)
            })
        };
        assert_eq!(with(&migration, &doubt, &vm), VmState::Migrating);
        migration.phase = Phase::CuttingOver;
        assert_eq!(with(&migration, &doubt, &vm), VmState::Resolving);
        assert_eq!(
            with(&migration, &MigrationLive::default(), &vm),
            VmState::Migrating
        );
        migration.phase = Phase::CleaningSource;
        assert_eq!(with(&migration, &doubt, &vm), VmState::Migrating);
        migration.destination_finished = true;
        assert_eq!(
            with(&migration, &doubt, &vm),
            VmState::Unreachable,
            "only the other side is left to tidy up"
        );
        vm.delete_time = Some(vm.create_time);
        assert_eq!(with(&migration, &doubt, &vm), VmState::Deleting);
    }

    #[test]
    fn before_the_first_answer_a_vm_is_pending() {
        let vm = fixtures::vm("web", "h1");
        assert_eq!(derive(&view(&vm, None)), VmState::Pending);
        let created = View {
            creating: true,
            host: HostState::Initializing,
            ..view(&vm, None)
        };
        assert_eq!(derive(&created), VmState::Pending);
    }
}
