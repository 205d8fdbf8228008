//! What hosts show, and how lately: silent hosts, lists that are not complete, clocks, VMs that nobody shows.

use std::time::Duration;

use dalgu_proto::ids::HostName;

use super::{Finding, Invariant, Look, Severity, View, files, images, volumes};
use crate::{
    incarnation,
    model::{HostLive, HostState, PowerPhase, VmPhase, VmRecord},
};

/// A host's clock may be so far ahead of the controller's, or behind it with the age of its samples; certificates, the
/// memory of what was deleted and times in events bear that well.
const SKEW: Duration = Duration::from_mins(1);
/// An agent looks at each of its VMs at least twice a minute; what it has not seen for so long it cannot see.
const SIGHT: Duration = Duration::from_mins(2);

/// I2: each VM is shown by its owner, and its owner is known.
pub(super) fn all_are_there(view: &View<'_>) -> Look {
    let state = view.state;
    let mut look = Look::at("VMs, images and volumes", state.vms.len());
    look.unchecked = view.unseen_vms();
    look.limits = "disks are not read: that a file is there and whole is its host's word";
    let mut find = |kind, vm: &VmRecord, seen: String, next: &str| {
        look.findings.push(Finding {
            invariant: Invariant::I2,
            severity: Severity::Warning,
            kind,
            subject: format!("vm {}", vm.name),
            seen,
            next_step: next.to_owned(),
        });
    };
    for vm in state.vms.values() {
        if vm.unconfirmed {
            let seen = match incarnation::differences_of(state, vm).first() {
                Some(found) => format!("not taken over since the restore: {}", found.on_hosts),
                None => format!(
                    "no host has shown it since the restore; the store has it on {}",
                    vm.owner
                ),
            };
            find(
                "UNCONFIRMED",
                vm,
                seen,
                "`dalgu site show`, then docs/operations/backup.md",
            );
        } else if view.rests(vm) && state.observation(vm).is_none() && !state.refusals.contains_key(&vm.id) {
            let seen = format!("{} owns it and does not show it", vm.owner);
            find(
                "NOT_SHOWN",
                vm,
                seen,
                "look at the agent's log on that host; it is told again what it should have",
            );
        }
    }
    images::have_copies(view, &mut look);
    volumes::have_hosts(view, &mut look);
    files::are_there(view, &mut look);
    look
}

/// I13: every host was heard lately and told all, and what it tells is of now.
pub(super) fn seen_lately(view: &View<'_>) -> Look {
    let state = view.state;
    let mut look = Look::at("hosts and VMs", state.hosts.len() + state.vms.len());
    look.unchecked = view.unseen_vms();
    look.limits = "a clock is compared by the age of a host's last sample, to a minute";
    let owned = view.owned();
    for host in state.hosts.keys() {
        let vms = owned.get(host).copied().unwrap_or(0);
        look.findings.extend(unheard(view, host, vms));
        look.findings
            .extend(state.live.get(host).and_then(|live| skewed(view, host, live)));
    }
    look.findings
        .extend(state.vms.values().filter_map(|vm| old(view, vm)));
    look
}

fn warning(kind: &'static str, subject: String, seen: String, next: impl Into<String>) -> Finding {
    Finding {
        invariant: Invariant::I13,
        severity: Severity::Warning,
        kind,
        subject,
        seen,
        next_step: next.into(),
    }
}

fn unheard(view: &View<'_>, host: &HostName, vms: usize) -> Option<Finding> {
    let reason = view.unseen(host)?;
    let power = view.state.hosts.get(host).and_then(|host| host.power.as_ref());
    if let Some(power) = power.filter(|power| power.phase != PowerPhase::On) {
        return power.overdue.then(|| {
            let seen = format!("switched on at {} and not heard from since", power.since.strftime("%FT%TZ"));
            let next = format!(
                "`dalgu host power {host}` says whether the machine is on; look at its console, its network and its agent"
            );
            warning("HOST_NOT_BACK", format!("host {host}"), seen, next)
        });
    }
    let live = view.state.live.get(host);
    let (kind, next) = match live {
        Some(live) if live.state == HostState::Ready && live.hypervisor_error.is_some() => (
            "HYPERVISOR_DOWN",
            "look at libvirtd on it: `systemctl status libvirtd`",
        ),
        Some(live) if live.state == HostState::Ready => (
            "INCOMPLETE_INVENTORY",
            "its hypervisor is slow or its agent is still finding out what is there; look at the agent's log if it lasts",
        ),
        _ => (
            "HOST_SILENT",
            "look at the host, its network and its agent; its VMs probably run on",
        ),
    };
    Some(warning(
        kind,
        format!("host {host}"),
        format!("{reason}; it owns {vms} VMs"),
        next,
    ))
}

/// The host's clock is not the controller's.
fn skewed(view: &View<'_>, host: &HostName, live: &HostLive) -> Option<Finding> {
    let heard = live.report_time.filter(|_| view.unseen(host).is_none())?;
    let sampled = live.usage.as_ref()?.sample_time;
    if sampled.as_second() == 0 {
        return None;
    }
    let age = heard.duration_since(sampled).as_secs_f64();
    (age.abs() > SKEW.as_secs_f64()).then(|| {
        let seen = if age > 0.0 {
            format!("its last sample is {age:.0} s older than its report: its clock is behind, or it does not sample")
        } else {
            format!("its clock is {:.0} s ahead of the controller's", -age)
        };
        warning("CLOCK_SKEW", format!("host {host}"), seen, "set both clocks by one source, for example with chrony")
    })
}

/// Reports come, and what they say of a VM is old: its host cannot look at it.
fn old(view: &View<'_>, vm: &VmRecord) -> Option<Finding> {
    let seen = view.state.observation(vm).filter(|_| view.rests(vm))?;
    let sampled = view.state.live.get(&vm.owner)?.usage.as_ref()?.sample_time;
    let settled = matches!(seen.phase, VmPhase::Settled | VmPhase::Failed);
    if !settled || sampled.as_second() == 0 {
        return None;
    }
    let text = match seen.observe_time {
        None => format!("{} reports it and cannot look at it", vm.owner),
        // Both by the host's own clock.
        Some(at) => {
            let age = Duration::try_from(sampled.duration_since(at)).unwrap_or_default();
            if age <= SIGHT {
                return None;
            }
            format!(
                "{} reports it and has not seen it for {} s",
                vm.owner,
                age.as_secs()
            )
        }
    };
    let next = format!(
        "its hypervisor does not answer for it: `virsh domstate {}` on {}",
        vm.name, vm.owner
    );
    Some(warning("STATUS_OLD", format!("vm {}", vm.name), text, next))
}
