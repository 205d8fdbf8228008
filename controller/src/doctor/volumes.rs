//! Whether volumes are where they should be, once, and go when they should.

use std::time::Duration;

use super::{Finding, Invariant, Look, Severity, View};
use crate::volumes::{VolumeState, state_of};

/// Data that are to go and have not gone after so long wait for a host.
const PURGE: Duration = Duration::from_mins(10);

/// Adds volumes whose host is not of the site any more to a look at what is there.
pub(super) fn have_hosts(view: &View<'_>, look: &mut Look) {
    look.checked += view.state.volumes.len();
    let volumes = view.state.volumes.values();
    let lost = volumes.filter(|volume| state_of(view.state, volume) == VolumeState::HostGone);
    look.findings.extend(lost.map(|volume| {
        let host = volume.host.as_ref().map(ToString::to_string).unwrap_or_default();
        Finding {
            invariant: Invariant::I2,
            severity: Severity::Warning,
            kind: "VOLUME_HOST_GONE",
            subject: format!("volume {}", volume.name),
            seen: format!("its file is on host {host}, which was deleted"),
            next_step: format!(
                "register {host} again with the disks that it had, or delete the volume (`dalgu volume delete {}`)",
                volume.name
            ),
        }
    }));
}

/// Adds volumes that several VMs have.
pub(super) fn have_one_vm(view: &View<'_>, look: &mut Look) {
    let shared = view.state.volumes.values().filter_map(|volume| {
        let vms = view.state.volume_vms.get(&volume.id)?;
        (vms.len() > 1).then_some((volume, vms))
    });
    look.findings.extend(shared.map(|(volume, vms)| {
        let names = vms
            .iter()
            .filter_map(|vm| Some(view.state.vms.get(vm)?.name.to_string()));
        let names: Vec<_> = names.collect();
        Finding {
            invariant: Invariant::I4,
            severity: Severity::Critical,
            kind: "VOLUME_IN_SEVERAL_VMS",
            subject: format!("volume {}", volume.name),
            seen: format!("VMs {} have it, as a restored store says", names.join(", ")),
            next_step: "stop all of them but one before they write to it, and take it away from the others \
                        (`dalgu vm update VM --remove-disk DISK`)"
                .to_owned(),
        }
    }));
}

/// Adds data that are to go and do not.
pub(super) fn purges_end(view: &View<'_>, look: &mut Look) {
    let deleted = view
        .state
        .deleted_volumes
        .iter()
        .filter_map(|name| view.state.volumes.get(name));
    for volume in deleted {
        let waits = volume.purge_time.map(|time| view.since(time)).unwrap_or_default();
        if waits <= PURGE {
            continue;
        }
        let host = volume.host.as_ref().map(ToString::to_string).unwrap_or_default();
        look.findings.push(Finding {
            invariant: Invariant::I14,
            severity: Severity::Warning,
            kind: "VOLUME_PURGE_PENDING",
            subject: format!("volume {}", volume.name),
            seen: format!(
                "its data were to be removed from host {host} {} s ago, and have not been",
                waits.as_secs()
            ),
            next_step: format!("bring {host} back, and see the log of its agent; or delete that host"),
        });
    }
}
