//! What to do next for one VM. Pure: the VM's task calls [`next`] with what the ledger says and what was just seen, and
//! carries out the one step it gets; then it looks again.
//!
//! ```text
//!   absent ──CreateVolumes──> absent, disks ready ──Define──> stopped ──Start──> running ⇄ paused
//!                                                               ^                  │
//!                                                               └─Shutdown/Destroy─┘
//!   deleting: running ─Destroy─> stopped ─Undefine─> absent ─DeleteVolumes─> Forget
//! ```
//!
//! A VM that is to have other snapshots or other hardware than it has goes on with [`snapshots`] and [`changes`] when nothing else
//! is to be done.
//!
//! A request for a power state is carried out once: afterwards a guest that shut itself down, or a colleague with
//! `virsh`, is not overruled. What the restart policy allows is done after a crash or a restart of the host.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::vm::{Disk, PowerReason, PowerState, RestartMode, RestartPolicy};

use crate::{
    hypervisor::{Change, Domain, DomainState, Hardware, LayerChange, Layers},
    ledger::{Disposition, Intent, Vm},
};

pub mod changes;
pub mod snapshots;

/// Restarts after a crash that are made within [`CRASH_WINDOW`] before the agent gives up: the figures of the
/// field's usual start limits (systemd's and vSphere's are of this order).
pub const MAX_RESTARTS: u32 = 5;
/// See [`MAX_RESTARTS`].
pub const CRASH_WINDOW: Duration = Duration::from_mins(10);

/// A guest is asked again to shut down or to reboot after this time, or after half the time it has, if that is shorter:
/// one that was still booting missed the first request.
pub const ASK_AGAIN: Duration = Duration::from_secs(10);

/// A guest that was let go on and stands again is let go on once more after this time.
pub const RESUME_AGAIN: Duration = Duration::from_secs(5);

/// A guest that has not rebooted after this time is not asked any more. The restart then counts as done: it was asked
/// for, and it is never forced.
pub const REBOOT_WAIT: Duration = Duration::from_mins(1);

/// A guest that shuts down so soon after it was asked to reboot does what it was asked. It is libvirt that turns the power button's
/// shutdown into a reboot, and it cannot while the VM migrates, nor at the destination.
pub const REBOOT_LATE: Duration = Duration::from_mins(5);

/// The guest was asked for something that it has not done yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// How long ago it was asked first.
    pub first: Duration,
    /// How long ago it was asked last.
    pub last: Duration,
}

/// What the VM's task knows besides the ledger; lost when the agent restarts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// The disks were made, or found: but for those that are added, never again false for a VM whose disks have been made once.
    /// A blank disk in the place of a lost one would look like an empty VM.
    pub volumes_ready: bool,
    /// The disks were deleted.
    pub volumes_gone: bool,
    /// The start for the present intent has succeeded since the agent's start.
    pub started: bool,
    /// The guest could not be let go on, for the present intent.
    pub resume_failed: bool,
    /// So long ago it was let go on, for the present intent.
    pub resumed: Option<Duration>,
    /// The guest was asked to shut down for the present intent.
    pub shutdown: Option<Asked>,
    /// It was asked to reboot for the present intent, and has not been seen to.
    pub reboot: Option<Asked>,
    /// It was asked to reboot not long ago, whatever the intent was then, and has not been reset since: if it shuts down, then to come up again.
    pub rebooting: bool,
    /// So long the guest may still follow a request to shut down that came before the present intent.
    pub leaving: Option<Duration>,
    /// A call about the domain was under way when it was looked at, one that did not answer in time: what was seen may
    /// change by itself.
    pub unfinished: bool,
    /// Automatic restarts within the last [`CRASH_WINDOW`].
    pub restarts: u32,
    /// How long to wait before the next automatic restart.
    pub restart_wait: Duration,
    /// What the domain has, if that was looked at.
    pub hardware: Option<Hardware>,
    /// Changes that were asked for under the present intent, each with the time since.
    pub tried: Vec<(Change, Duration)>,
    /// Disks whose move to another pool has failed under the present intent.
    pub failed_moves: BTreeMap<String, changes::FailedMove>,
    /// The layers of its disks, if they were looked at.
    pub layers: Option<Layers>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the disks that are missing.
    CreateVolumes,
    /// Define the domain.
    Define,
    /// Write down that the power request is begun, then start.
    Start,
    /// As Start, by the restart policy.
    Restart,
    /// Ask the guest to shut down.
    Shutdown,
    /// Power off.
    Destroy,
    /// Freeze.
    Pause,
    /// Let it go on.
    Resume,
    /// Write down that the restart is begun, then do it.
    RestartGuest(RestartMode),
    /// Ask the guest once more to reboot.
    RebootAgain,
    /// Forget the domain.
    Undefine,
    /// Look at the domain's hardware.
    Look,
    /// Change it.
    Change(Change),
    /// Change the layers of its disks.
    Layer(LayerChange),
    /// Write down that its snapshots are as they should be.
    LayersDone,
    /// Delete a disk that was left out.
    DeleteVolume(Box<Disk>),
    /// Write down that all changes have been carried out.
    ChangesDone,
    /// Delete the disks.
    DeleteVolumes,
    /// Nothing is left: remember only that it is gone.
    Forget,
    /// Write down that the power request has been carried out.
    PowerDone,
    /// Look again after this time.
    Wait(Duration),
    /// Look again when a call that did not answer in time has ended.
    Await,
    /// The intent is carried out.
    Settled,
    /// It cannot be: it crashes again and again.
    CrashLoop,
}

impl Step {
    /// Whether the ledger has it before it is done.
    pub const fn is_written(&self) -> bool {
        matches!(
            self,
            Self::Start
                | Self::Restart
                | Self::RestartGuest(_)
                | Self::PowerDone
                | Self::ChangesDone
                | Self::LayersDone
                | Self::Forget
        )
    }

    /// Whether it freezes the guest for a moment, which must be known to who finds it so.
    pub fn freezes(&self, hardware: Option<&Hardware>) -> bool {
        let Self::Change(Change::MoveDisk(name)) = self else {
            return false;
        };
        let disk = hardware.and_then(|hardware| hardware.disks.get(name));
        disk.and_then(|disk| disk.copy.as_ref())
            .is_some_and(|copy| copy.ready)
    }

    /// Whether its call gives way to a power-off when it hangs: all that QEMU must answer.
    pub const fn gives_way(&self) -> bool {
        matches!(
            self,
            Self::Start
                | Self::Change(_)
                | Self::Layer(_)
                | Self::Restart
                | Self::Shutdown
                | Self::Pause
                | Self::Resume
                | Self::RestartGuest(_)
                | Self::RebootAgain
        )
    }
}

/// Whether the VM is to be off at once, whatever its guest says: a forced stop that has not been carried out, or its
/// deletion.
pub fn off_at_once(vm: &Vm) -> bool {
    match (vm.disposition, &vm.intent) {
        (Disposition::Deleting, _) => true,
        (Disposition::Owned, Some(intent)) => {
            intent.power == PowerState::Stopped
                && intent.grace_period_seconds == 0
                && vm.done.power < intent.power_sequence
        }
        _ => false,
    }
}

/// The next step.
pub fn next(vm: &Vm, domain: Option<&Domain>, memory: &Memory) -> Step {
    let step = match (vm.disposition, &vm.intent) {
        (Disposition::Deleting, _) => delete(vm, domain, memory),
        (Disposition::Owned, Some(intent)) => own(vm, intent, domain, memory),
        // Without an intent, or while its owner is not known, nothing is done to a VM.
        _ => return Step::Settled,
    };
    match step {
        // Powering off gets through, and nothing may hold up what leads to it.
        Step::Shutdown | Step::Destroy | Step::Wait(_) | Step::CrashLoop => step,
        // A start that takes effect later would find its VM taken for stopped, or deleted.
        _ if memory.unfinished => Step::Await,
        _ => step,
    }
}

fn delete(vm: &Vm, domain: Option<&Domain>, memory: &Memory) -> Step {
    match domain.map(|domain| domain.state) {
        None if memory.volumes_gone => Step::Forget,
        None => Step::DeleteVolumes,
        Some(DomainState::Stopped) => snapshots::before_deletion(vm, memory).unwrap_or(Step::Undefine),
        Some(_) => Step::Destroy,
    }
}

fn own(vm: &Vm, intent: &Intent, domain: Option<&Domain>, memory: &Memory) -> Step {
    let Some(domain) = domain else {
        return if memory.volumes_ready {
            Step::Define
        } else {
            Step::CreateVolumes
        };
    };
    match domain.state {
        // Not by a migration of ours, which tidies up at its end: somebody else is at work, and the VM is about to leave or
        // to go on.
        DomainState::Incoming | DomainState::HandedOver => return Step::Settled,
        DomainState::Stopped if vm.done.defined != Some(intent.epoch) => {
            return if memory.volumes_ready {
                Step::Define
            } else {
                Step::CreateVolumes
            };
        }
        _ => {}
    }
    if domain.state == DomainState::Stopped
        && let Some(step) = snapshots::before_start(vm, intent, memory)
    {
        return step;
    }
    if vm.done.power < intent.power_sequence {
        return power(vm, intent, domain, memory);
    }
    if vm.done.restart < intent.restart_sequence && domain.state == DomainState::Running {
        return Step::RestartGuest(intent.restart_mode);
    }
    if domain.state == DomainState::Paused && vm.done.starting && intent.power == PowerState::Running {
        return let_go_on(vm, memory);
    }
    // It was frozen to be moved to another file, by an agent or a libvirt that died then.
    let frozen = vm.changes.frozen && domain.reason == PowerReason::External;
    if domain.state == DomainState::Paused && frozen && intent.power == PowerState::Running {
        return Step::Resume;
    }
    if domain.state == DomainState::Running
        && let Some(asked) = memory.reboot
        && let Some(step) = ask(Some(asked), REBOOT_WAIT, Step::RebootAgain)
    {
        return step;
    }
    match after_failure(vm, intent, domain, memory) {
        Step::Settled => snapshots::next(vm, intent, memory)
            .or_else(|| changes::next(vm, intent, domain, memory))
            .unwrap_or(Step::Settled),
        step => step,
    }
}

/// Carries out a power request that has not been carried out yet.
fn power(vm: &Vm, intent: &Intent, domain: &Domain, memory: &Memory) -> Step {
    if let Some(left) = memory.leaving
        && intent.power != PowerState::Stopped
        && domain.state == DomainState::Running
    {
        // It runs, and is about to stop: it is started again when it is off. One that has not heard runs on.
        return Step::Wait(left);
    }
    match (intent.power, domain.state) {
        (PowerState::Paused, DomainState::Paused) if vm.done.starting => let_go_on(vm, memory),
        (PowerState::Running, DomainState::Running)
        | (PowerState::Paused, DomainState::Paused)
        | (PowerState::Stopped, DomainState::Stopped) => Step::PowerDone,
        (PowerState::Running, DomainState::Paused) => let_go_on(vm, memory),
        (PowerState::Running | PowerState::Paused, DomainState::Stopped) => {
            // Begun before, and since then the guest shut itself down: it did run, and it wanted to stop. If that was
            // why it was off before, it says nothing: the start may have failed.
            let shut_down_since = domain.reason == PowerReason::GuestShutdown
                && vm.done.begun_after != PowerReason::GuestShutdown;
            let started = memory.started && intent.power == PowerState::Running;
            if vm.done.power_begun == intent.power_sequence && (started || shut_down_since) {
                return Step::PowerDone;
            }
            if memory.volumes_ready {
                Step::Start
            } else {
                Step::CreateVolumes
            }
        }
        (PowerState::Paused, DomainState::Running) => Step::Pause,
        (PowerState::Stopped, DomainState::Running | DomainState::Paused) => stop(intent, domain, memory),
        (_, DomainState::Incoming | DomainState::HandedOver) => Step::Settled,
    }
}

/// Lets a frozen guest go on. One whose start was cut short, as by libvirtd's death, and that does not go on has never run
/// and holds nothing: it is powered off, and started anew.
fn let_go_on(vm: &Vm, memory: &Memory) -> Step {
    match memory.resumed {
        _ if vm.done.starting && memory.resume_failed => Step::Destroy,
        // It stands again, as where its disk is still full.
        Some(since) if since < RESUME_AGAIN => Step::Wait(RESUME_AGAIN - since),
        _ => Step::Resume,
    }
}

fn stop(intent: &Intent, domain: &Domain, memory: &Memory) -> Step {
    let grace = Duration::from_secs(intent.grace_period_seconds.into());
    // A paused guest cannot hear the request.
    if grace.is_zero() || domain.state == DomainState::Paused {
        return Step::Destroy;
    }
    ask(memory.shutdown, grace, Step::Shutdown).unwrap_or(Step::Destroy)
}

/// Asks the guest for something, and again until it has had its time; `None` when that is over.
fn ask(asked: Option<Asked>, limit: Duration, request: Step) -> Option<Step> {
    let Some(asked) = asked else {
        return Some(request);
    };
    let again = ASK_AGAIN.min(limit / 2);
    if asked.first >= limit {
        None
    } else if asked.last >= again {
        Some(request)
    } else {
        Some(Step::Wait((limit - asked.first).min(again - asked.last)))
    }
}

/// What the restart policy asks for when a VM that should run is off.
fn after_failure(vm: &Vm, intent: &Intent, domain: &Domain, memory: &Memory) -> Step {
    if intent.power != PowerState::Running || domain.state != DomainState::Stopped {
        return Step::Settled;
    }
    let reason = vm.last_seen.map_or(domain.reason, |(_, reason)| reason);
    let cut_short = vm.done.starting && reason == PowerReason::External;
    let half_rebooted = memory.rebooting && reason == PowerReason::GuestShutdown;
    let failed = cut_short || matches!(reason, PowerReason::Crashed | PowerReason::HostReboot);
    let restart = match intent.spec.restart_policy {
        RestartPolicy::OnFailure => failed,
        RestartPolicy::Always => failed || reason == PowerReason::GuestShutdown,
        RestartPolicy::Never => false,
    };
    if !restart && !half_rebooted {
        Step::Settled
    } else if memory.restarts >= MAX_RESTARTS {
        Step::CrashLoop
    } else if !memory.restart_wait.is_zero() {
        Step::Wait(memory.restart_wait)
    } else if memory.volumes_ready {
        Step::Restart
    } else {
        Step::CreateVolumes
    }
}

#[cfg(test)]
pub(crate) mod tests;
