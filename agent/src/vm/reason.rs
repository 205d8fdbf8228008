//! Why a VM is in the power state seen. Pure: the VM's task calls [`explain`] after each look and writes the answer
//! down, since libvirt forgets reasons when it restarts and never knew what this host did itself.

use dalgu_proto::vm::{PowerReason, PowerState};

use crate::{hypervisor::Domain, ledger};

/// The power state of a domain and why it is so, from what the hypervisor says and what this host did itself.
pub(super) fn explain(vm: &ledger::Vm, domain: &Domain, boot_id: &str) -> Option<(PowerState, PowerReason)> {
    let power = domain.state.power()?;
    let wanted = vm.intent.as_ref().is_some_and(|intent| intent.power == power);
    let before = vm
        .last_seen
        .filter(|(seen, _)| *seen == power)
        .map(|(_, reason)| reason);
    let ran = vm.last_seen.is_some_and(|(seen, _)| seen != PowerState::Stopped);
    let reason = match (power, domain.reason) {
        (_, PowerReason::Migrated) if power == PowerState::Running => PowerReason::Migrated,
        (PowerState::Paused, PowerReason::IoError) => PowerReason::IoError,
        (PowerState::Stopped, _) if ran && vm.boot_id != boot_id => PowerReason::HostReboot,
        (PowerState::Stopped, _) if wanted => PowerReason::Requested,
        (PowerState::Stopped, PowerReason::Unknown) if ran => PowerReason::Crashed,
        (PowerState::Stopped, PowerReason::Unknown) => before.unwrap_or_default(),
        // Also after a restart of the host: libvirt knew none then, so it has run since.
        (PowerState::Stopped, reason) => reason,
        (PowerState::Running | PowerState::Paused, _) if wanted => before.unwrap_or(PowerReason::Requested),
        (PowerState::Running | PowerState::Paused, _) => PowerReason::External,
    };
    Some((power, reason))
}

#[cfg(test)]
mod tests {
    use dalgu_proto::ids::{Epoch, Generation, VmId};

    use super::*;
    use crate::{
        hypervisor::DomainState,
        ledger::{Disposition, Done},
    };

    fn vm(last_seen: Option<(PowerState, PowerReason)>) -> ledger::Vm {
        ledger::Vm {
            id: VmId::from_uuid(uuid::Uuid::from_u128(1)),
            name: "web".parse().unwrap(),
            intent: None,
            epoch: Epoch(1),
            generation: Generation(1),
            disposition: Disposition::Owned,
            done: Done::default(),
            last_seen,
            boot_id: "boot-1".into(),
            images: Vec::new(),
            documents: Default::default(),
            changes: Default::default(),
            snapshots: Default::default(),
        }
    }

    fn off(reason: PowerReason) -> Domain {
        Domain {
            id: VmId::from_uuid(uuid::Uuid::from_u128(1)),
            name: "web".into(),
            mark: None,
            state: DomainState::Stopped,
            reason,
            persistent: true,
            vcpus: 1,
            memory_mib: 64,
            resets: 0,
        }
    }

    #[test]
    fn the_reason_for_being_off_survives_a_forgetful_hypervisor() {
        let running = Some((PowerState::Running, PowerReason::Requested));
        let crashed = Some((PowerState::Stopped, PowerReason::Crashed));
        let rebooted = Some((PowerState::Stopped, PowerReason::HostReboot));
        let cases = [
            (running, PowerReason::Crashed, "boot-1", PowerReason::Crashed),
            (running, PowerReason::Unknown, "boot-1", PowerReason::Crashed),
            (
                running,
                PowerReason::GuestShutdown,
                "boot-1",
                PowerReason::GuestShutdown,
            ),
            (running, PowerReason::External, "boot-1", PowerReason::External),
            (running, PowerReason::Unknown, "boot-2", PowerReason::HostReboot),
            (running, PowerReason::Crashed, "boot-2", PowerReason::HostReboot),
            (crashed, PowerReason::Unknown, "boot-1", PowerReason::Crashed),
            (crashed, PowerReason::Unknown, "boot-2", PowerReason::Crashed),
            (rebooted, PowerReason::Unknown, "boot-1", PowerReason::HostReboot),
            (
                rebooted,
                PowerReason::GuestShutdown,
                "boot-1",
                PowerReason::GuestShutdown,
            ),
            (None, PowerReason::Unknown, "boot-1", PowerReason::Unknown),
        ];
        for (before, said, boot, expected) in cases {
            let found = explain(&vm(before), &off(said), boot);
            assert_eq!(
                found,
                Some((PowerState::Stopped, expected)),
                "{before:?} {said:?} {boot}"
            );
        }
    }
}
