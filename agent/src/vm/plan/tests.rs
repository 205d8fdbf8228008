//! Every state and request, and the step that follows.

use dalgu_proto::{
    ids::{Epoch, Generation, VmId},
    vm::Spec,
};

use super::*;
use crate::ledger::Done;

pub(super) fn vm(power: PowerState) -> Vm {
    let spec = Spec {
        vcpus: 1,
        memory_mib: 64,
        disks: vec![],
        nics: vec![],
        kernel_boot: None,
        restart_policy: RestartPolicy::OnFailure,
        host_selector: Default::default(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    };
    let intent = Intent {
        generation: Generation(3),
        epoch: Epoch(1),
        spec,
        power,
        power_sequence: 3,
        restart_sequence: 0,
        restart_mode: RestartMode::Reboot,
        grace_period_seconds: 60,
        snapshots: None,
        places: Vec::new(),
        devices: Vec::new(),
    };
    Vm {
        id: VmId::from_uuid(uuid::Uuid::from_u128(1)),
        name: "web".parse().unwrap(),
        intent: Some(intent),
        epoch: Epoch(1),
        generation: Generation(3),
        disposition: Disposition::Owned,
        done: Done {
            defined: Some(Epoch(1)),
            volumes: false,
            power_begun: 2,
            begun_after: PowerReason::Unknown,
            starting: false,
            power: 2,
            restart: 0,
        },
        last_seen: None,
        boot_id: String::new(),
        images: Vec::new(),
        documents: Default::default(),
        changes: Default::default(),
        snapshots: Default::default(),
    }
}

pub(super) fn domain(state: DomainState, reason: PowerReason) -> Domain {
    let id = VmId::from_uuid(uuid::Uuid::from_u128(1));
    Domain {
        id,
        name: "web".into(),
        mark: None,
        state,
        reason,
        persistent: true,
        vcpus: 1,
        memory_mib: 64,
        resets: 0,
    }
}

fn asked(first: u64, last: u64) -> Asked {
    Asked {
        first: Duration::from_secs(first),
        last: Duration::from_secs(last),
    }
}

pub(super) const READY: Memory = Memory {
    volumes_ready: true,
    volumes_gone: false,
    started: false,
    resume_failed: false,
    resumed: None,
    shutdown: None,
    reboot: None,
    leaving: None,
    rebooting: false,
    unfinished: false,
    restarts: 0,
    restart_wait: Duration::ZERO,
    hardware: None,
    tried: Vec::new(),
    failed_moves: BTreeMap::new(),
    layers: None,
};

#[test]
fn each_power_request_leads_to_its_step() {
    use DomainState as D;
    use PowerState as P;
    let cases = [
        (P::Running, D::Stopped, Step::Start),
        (P::Running, D::Paused, Step::Resume),
        (P::Running, D::Running, Step::PowerDone),
        (P::Paused, D::Running, Step::Pause),
        (P::Paused, D::Paused, Step::PowerDone),
        (P::Stopped, D::Running, Step::Shutdown),
        (P::Stopped, D::Paused, Step::Destroy),
        (P::Stopped, D::Stopped, Step::PowerDone),
        (P::Running, D::Incoming, Step::Settled),
        (P::Stopped, D::HandedOver, Step::Settled),
    ];
    for (power, state, expected) in cases {
        let step = next(&vm(power), Some(&domain(state, PowerReason::Unknown)), &READY);
        assert_eq!(step, expected, "{power:?} while {state:?}");
    }
}

#[test]
fn a_guest_that_stands_again_after_it_was_let_go_on_is_let_go_on_once_more_after_a_time() {
    let stands = domain(DomainState::Paused, PowerReason::IoError);
    let after = |seconds| {
        let memory = Memory {
            resumed: Some(Duration::from_secs(seconds)),
            ..READY
        };
        next(&vm(PowerState::Running), Some(&stands), &memory)
    };
    assert_eq!(after(1), Step::Wait(RESUME_AGAIN - Duration::from_secs(1)));
    assert_eq!(after(5), Step::Resume);
}

#[test]
fn a_new_vm_gets_its_disks_then_its_domain_then_runs() {
    let mut new = vm(PowerState::Running);
    new.done = Done::default();
    assert_eq!(next(&new, None, &Memory::default()), Step::CreateVolumes);
    assert_eq!(next(&new, None, &READY), Step::Define);
    let defined = domain(DomainState::Stopped, PowerReason::Unknown);
    assert_eq!(
        next(&new, Some(&defined), &READY),
        Step::Define,
        "a stale definition is made anew"
    );
    new.done.defined = Some(Epoch(1));
    assert_eq!(next(&new, Some(&defined), &READY), Step::Start);
}

#[test]
fn a_stop_waits_for_the_guest_and_then_does_not() {
    let running = domain(DomainState::Running, PowerReason::Requested);
    let mut vm = vm(PowerState::Stopped);
    let mut step = |grace, first, last| {
        if let Some(intent) = &mut vm.intent {
            intent.grace_period_seconds = grace;
        }
        let memory = Memory {
            shutdown: Some(asked(first, last)),
            ..READY
        };
        next(&vm, Some(&running), &memory)
    };
    let wait = |seconds| Step::Wait(Duration::from_secs(seconds));
    let cases = [
        ((60, 4, 4), wait(6)),
        // A guest that was booting is asked again.
        ((60, 10, 10), Step::Shutdown),
        ((60, 57, 7), wait(3)),
        ((60, 60, 0), Step::Destroy),
        // One with little time is asked again when half of it is over.
        ((8, 3, 3), wait(1)),
        ((8, 4, 4), Step::Shutdown),
        ((8, 7, 3), wait(1)),
        ((8, 8, 4), Step::Destroy),
    ];
    for ((grace, first, last), expected) in cases {
        let found = step(grace, first, last);
        assert_eq!(
            found, expected,
            "{grace} s of grace, asked {first} s and {last} s ago"
        );
    }
}

#[test]
fn a_guest_that_is_shutting_down_does_not_count_as_started() {
    use DomainState as D;
    use PowerState as P;
    let left = Duration::from_secs(20);
    let cases = [
        (P::Running, D::Running, Some(left), Step::Wait(left)),
        (P::Paused, D::Running, Some(left), Step::Wait(left)),
        (P::Running, D::Paused, Some(left), Step::Resume),
        (P::Running, D::Stopped, Some(left), Step::Start),
        (P::Running, D::Running, None, Step::PowerDone),
        (P::Stopped, D::Running, Some(left), Step::Shutdown),
    ];
    for (power, state, leaving, expected) in cases {
        let memory = Memory { leaving, ..READY };
        let seen = domain(state, PowerReason::GuestShutdown);
        assert_eq!(
            next(&vm(power), Some(&seen), &memory),
            expected,
            "{power:?} while {state:?}, {leaving:?}"
        );
    }
}

#[test]
fn nothing_is_concluded_while_a_call_may_still_take_effect() {
    use DomainState as D;
    use PowerState as P;
    let unfinished = Memory {
        unfinished: true,
        ..READY
    };
    let cases = [
        (P::Stopped, D::Stopped, Step::Await),
        (P::Running, D::Running, Step::Await),
        (P::Running, D::Stopped, Step::Await),
        (P::Stopped, D::Running, Step::Shutdown),
        (P::Stopped, D::Paused, Step::Destroy),
    ];
    for (power, state, expected) in cases {
        let seen = domain(state, PowerReason::Unknown);
        assert_eq!(
            next(&vm(power), Some(&seen), &unfinished),
            expected,
            "{power:?} while {state:?}"
        );
    }
    let mut deleted = vm(P::Running);
    deleted.disposition = Disposition::Deleting;
    let all_gone = Memory {
        volumes_gone: true,
        ..unfinished
    };
    assert_eq!(next(&deleted, None, &all_gone), Step::Await);
}

#[test]
fn a_reboot_is_asked_for_again_until_the_guest_has_had_its_time_and_is_never_forced() {
    let mut vm = vm(PowerState::Running);
    vm.done.power = 3;
    vm.done.restart = 1;
    if let Some(intent) = &mut vm.intent {
        intent.restart_sequence = 1;
    }
    let cases = [
        (DomainState::Running, Some((0, 0)), Step::Wait(ASK_AGAIN)),
        (DomainState::Running, Some((10, 10)), Step::RebootAgain),
        (
            DomainState::Running,
            Some((59, 9)),
            Step::Wait(Duration::from_secs(1)),
        ),
        (DomainState::Running, Some((60, 10)), Step::Settled),
        (DomainState::Running, None, Step::Settled),
        (DomainState::Paused, Some((10, 10)), Step::Settled),
        (DomainState::Stopped, Some((10, 10)), Step::Settled),
    ];
    for (state, asked_ago, expected) in cases {
        let memory = Memory {
            reboot: asked_ago.map(|(first, last)| asked(first, last)),
            ..READY
        };
        let seen = domain(state, PowerReason::GuestShutdown);
        assert_eq!(
            next(&vm, Some(&seen), &memory),
            expected,
            "{state:?}, asked {asked_ago:?} ago"
        );
    }
}

#[test]
fn a_guest_that_shut_itself_down_stays_off_even_if_the_start_is_replayed() {
    let off = domain(DomainState::Stopped, PowerReason::GuestShutdown);
    let mut vm = vm(PowerState::Running);
    vm.done.power_begun = 3;
    assert_eq!(
        next(&vm, Some(&off), &READY),
        Step::PowerDone,
        "crash between start and its record"
    );
    vm.done.power = 3;
    assert_eq!(next(&vm, Some(&off), &READY), Step::Settled);
    vm.done.power_begun = 2;
    vm.done.power = 2;
    assert_eq!(
        next(&vm, Some(&off), &READY),
        Step::Start,
        "asked anew, it starts"
    );
}

#[test]
fn a_start_that_failed_is_not_taken_for_a_guest_that_ran() {
    let off = domain(DomainState::Stopped, PowerReason::GuestShutdown);
    let mut vm = vm(PowerState::Running);
    vm.done.power_begun = 3;
    vm.done.begun_after = PowerReason::GuestShutdown;
    assert_eq!(next(&vm, Some(&off), &READY), Step::Start);
}

#[test]
fn a_guest_that_ends_as_soon_as_it_starts_is_left_to_the_restart_policy() {
    let off = domain(DomainState::Stopped, PowerReason::Crashed);
    let mut vm = vm(PowerState::Running);
    vm.done.power_begun = 3;
    let started = Memory {
        started: true,
        ..READY
    };
    assert_eq!(
        next(&vm, Some(&off), &READY),
        Step::Start,
        "the start may have failed"
    );
    assert_eq!(
        next(&vm, Some(&off), &started),
        Step::PowerDone,
        "else it would be started without end"
    );
}

#[test]
fn the_restart_policy_decides_after_a_crash() {
    let off = |reason| domain(DomainState::Stopped, reason);
    let with = |policy| {
        let mut vm = vm(PowerState::Running);
        vm.done.power = 3;
        if let Some(intent) = &mut vm.intent {
            intent.spec.restart_policy = policy;
        }
        vm
    };
    let cases = [
        (RestartPolicy::OnFailure, PowerReason::Crashed, Step::Restart),
        (RestartPolicy::OnFailure, PowerReason::HostReboot, Step::Restart),
        (
            RestartPolicy::OnFailure,
            PowerReason::GuestShutdown,
            Step::Settled,
        ),
        (RestartPolicy::OnFailure, PowerReason::External, Step::Settled),
        (RestartPolicy::Always, PowerReason::GuestShutdown, Step::Restart),
        (RestartPolicy::Always, PowerReason::External, Step::Settled),
        (RestartPolicy::Never, PowerReason::Crashed, Step::Settled),
    ];
    for (policy, reason, expected) in cases {
        assert_eq!(
            next(&with(policy), Some(&off(reason)), &READY),
            expected,
            "{policy:?} {reason:?}"
        );
    }
    let crashed = off(PowerReason::Crashed);
    let often = Memory {
        restarts: MAX_RESTARTS,
        ..READY
    };
    assert_eq!(
        next(&with(RestartPolicy::OnFailure), Some(&crashed), &often),
        Step::CrashLoop
    );
    let soon = Memory {
        restart_wait: Duration::from_secs(4),
        ..READY
    };
    assert_eq!(
        next(&with(RestartPolicy::OnFailure), Some(&crashed), &soon),
        Step::Wait(Duration::from_secs(4))
    );
}

#[test]
fn a_restart_is_done_to_a_running_guest_only() {
    let mut vm = vm(PowerState::Running);
    vm.done.power = 3;
    if let Some(intent) = &mut vm.intent {
        intent.restart_sequence = 1;
        intent.restart_mode = RestartMode::Reset;
    }
    let running = domain(DomainState::Running, PowerReason::Requested);
    assert_eq!(
        next(&vm, Some(&running), &READY),
        Step::RestartGuest(RestartMode::Reset)
    );
    let off = domain(DomainState::Stopped, PowerReason::GuestShutdown);
    assert_eq!(next(&vm, Some(&off), &READY), Step::Settled);
}

#[test]
fn deletion_goes_down_to_the_disks() {
    let mut vm = vm(PowerState::Running);
    vm.disposition = Disposition::Deleting;
    let at = |state| domain(state, PowerReason::Unknown);
    assert_eq!(next(&vm, Some(&at(DomainState::Running)), &READY), Step::Destroy);
    assert_eq!(next(&vm, Some(&at(DomainState::Stopped)), &READY), Step::Undefine);
    assert_eq!(next(&vm, None, &READY), Step::DeleteVolumes);
    assert_eq!(
        next(
            &vm,
            None,
            &Memory {
                volumes_gone: true,
                ..READY
            }
        ),
        Step::Forget
    );
}

#[test]
fn nothing_is_done_while_the_owner_is_not_known() {
    let migration = dalgu_proto::ids::MigrationId::from_uuid(uuid::Uuid::from_u128(9));
    for disposition in [
        Disposition::Incoming { migration },
        Disposition::Outgoing { migration },
    ] {
        let mut vm = vm(PowerState::Stopped);
        vm.disposition = disposition;
        for state in [
            DomainState::Running,
            DomainState::Paused,
            DomainState::Stopped,
            DomainState::HandedOver,
        ] {
            assert_eq!(
                next(&vm, Some(&domain(state, PowerReason::Unknown)), &READY),
                Step::Settled
            );
        }
        assert_eq!(next(&vm, None, &READY), Step::Settled);
    }
}
