//! What hosts say of VMs becomes what the controller knows of them.
//!
//! The only way in for reports and for answers to commands; called inside a transaction. Only the owner speaks for a
//! VM, and only under the present ownership number; what is older than what is known is dropped. Of a VM that is not
//! there, nothing follows unless the list was complete.

use std::{collections::BTreeSet, sync::Arc};

use dalgu_proto::{
    ids::{HostName, MigrationId, VmId},
    mutant::{self, Mutant},
    vm::{PowerReason, PowerState},
};

use super::{let_go, step};
use crate::{
    agent_wire::Reported,
    incarnation,
    model::{EventKind, Observation, Phase, VmPhase, VmRecord},
    state::Tx,
    verbs::update,
    volumes,
};

/// How much a list of VMs says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Of a new run of the agent: complete, and its counting starts anew.
    NewRun,
    /// Of a new run of the agent that cannot tell everything yet: some VMs, and its counting starts anew.
    NewRunPartial,
    /// All VMs of the host.
    Complete,
    /// Some VMs.
    Partial,
}

/// Takes over what `host` says.
pub fn apply(tx: &mut Tx, host: &HostName, reports: Vec<Reported>, extent: Extent) {
    let new_run = matches!(extent, Extent::NewRun | Extent::NewRunPartial);
    let mut seen = BTreeSet::new();
    for reported in reports {
        seen.insert(reported.id);
        let known = tx.vms.get(&reported.id).cloned();
        // The first list after a restore may have been under way since before.
        if extent != Extent::NewRunPartial && known.as_ref().is_none_or(|vm| vm.unconfirmed) {
            tx.sight(host.clone(), reported.clone());
        }
        match known {
            Some(vm) if vm.owner == *host || mutant::on(Mutant::AnybodySpeaks) => {
                if reported.observation.epoch > vm.epoch && !vm.unconfirmed {
                    // The store is behind, which must never be: for the doctor.
                    tx.note_stray(host.clone(), reported.clone());
                }
                if reported.observation.epoch == vm.epoch || mutant::on(Mutant::AnybodySpeaks) {
                    tx.forget_stray(host, vm.id);
                    if reported
                        .transfer_over
                        .is_some_and(|id| transferring(tx, vm.id) == Some(id))
                    {
                        // Its source is asked at once, not at the next poll.
                        tx.touch(vm.id);
                    }
                    observe(tx, &vm, reported.observation, new_run);
                }
            }
            _ => stray(tx, host, reported),
        }
    }
    if extent == Extent::Partial {
        return;
    }
    let missing = tx
        .host_vms
        .get(host)
        .into_iter()
        .flatten()
        .filter(|id| !seen.contains(id));
    let missing: Vec<(VmId, Arc<Observation>)> = missing
        .filter_map(|id| Some((*id, tx.observations.get(id)?.clone())))
        .filter(|(_, observation)| observation.host == *host)
        .collect();
    if extent == Extent::NewRunPartial {
        for (id, observation) in missing {
            // What was known stands until the new run says otherwise, under whatever number.
            let status_generation = 0;
            tx.observe(
                id,
                Some(Observation {
                    status_generation,
                    ..(*observation).clone()
                }),
            );
        }
        return;
    }
    tx.forget_strays(host, &seen);
    tx.listed(host, &seen);
    incarnation::returned(tx, host);
    for (id, _) in missing {
        tx.observe(id, None);
        tx.touch(id);
    }
}

/// The VM's migration, while it is thought to be copying.
fn transferring(tx: &Tx, vm: VmId) -> Option<MigrationId> {
    let migration = tx.active_migration(vm)?;
    (migration.phase == Phase::Transferring).then_some(migration.id)
}

fn observe(tx: &mut Tx, vm: &VmRecord, new: Observation, new_run: bool) {
    let old = tx.observation(vm).cloned();
    if let Some(old) = &old {
        let newest = new_run || mutant::on(Mutant::OldReportsCount);
        if !newest && old.status_generation > new.status_generation {
            return;
        }
        if old.same_status(&new) {
            tx.observe(vm.id, Some(new));
            return;
        }
    }
    if tx
        .refusals
        .get(&vm.id)
        .is_some_and(|refusal| refusal.generation <= new.accepted)
    {
        tx.refuse(vm.id, None);
    }
    tell(tx, vm, old.as_deref(), &new);
    // Whatever becomes of the operation that waits for it: what was made from them is there.
    if !vm.documents.is_empty() && new.observed == vm.intent.generation {
        step::disks_are_made(tx, vm.id);
    }
    let left = update::settle(vm, &new);
    let made = !vm.new_volumes.is_empty() && volumes::resolve::settled(vm, &new);
    let snapshots = vm.snapshots.settle(&new);
    tx.observe(vm.id, Some(new));
    tx.touch(vm.id);
    if (left != vm.change || made || snapshots != vm.snapshots)
        && let Some(now) = tx.vms.get(&vm.id).cloned()
    {
        let mut now = VmRecord {
            change: left,
            snapshots,
            ..(*now).clone()
        };
        if made {
            now.new_volumes.clear();
        }
        tx.put_vm(now);
    }
}

/// Events are for what changed on the host. After a start of the controller nothing is known of before, and a VM that
/// is as it should be is no news.
fn tell(tx: &mut Tx, vm: &VmRecord, old: Option<&Observation>, new: &Observation) {
    let failed =
        |o: &Observation| o.phase == VmPhase::Failed && o.fault.as_ref().is_some_and(|f| !f.retrying);
    if failed(new) && !old.is_some_and(failed) {
        let text = new
            .fault
            .as_ref()
            .map(|f| format!("{}: {}", f.reason, f.message))
            .unwrap_or_default();
        tx.event(
            EventKind::Vm,
            "VmFailed",
            &vm.name,
            format!("on {}: {text}", new.host),
            None,
        );
    }
    // A new VM is defined before it starts: nobody stopped it.
    let defined = old.is_none_or(|old| old.power.is_none())
        && new.power == Some(PowerState::Stopped)
        && new.phase == VmPhase::Applying;
    let news = match old {
        _ if defined => false,
        Some(old) => old.power != new.power,
        None => new.power != Some(vm.intent.power) || tx.active_operations.contains_key(&vm.id),
    };
    let Some(power) = new.power.filter(|_| news) else {
        return;
    };
    let reason = match power {
        PowerState::Running => "VmRunning",
        PowerState::Stopped => "VmStopped",
        PowerState::Paused => "VmPaused",
    };
    let why = match new.power_reason {
        PowerReason::Unknown | PowerReason::Requested => "",
        PowerReason::GuestShutdown => ", the guest shut itself down",
        PowerReason::Crashed => ", QEMU ended unexpectedly or the guest panicked",
        PowerReason::Migrated => ", after a migration",
        PowerReason::IoError => ", because of an I/O error",
        PowerReason::HostReboot => ", the host was restarted",
        PowerReason::External => ", changed outside Dalgu",
    };
    let word = reason.trim_start_matches("Vm").to_lowercase();
    tx.event(
        EventKind::Vm,
        reason,
        &vm.name,
        format!("{word} on {}{why}", new.host),
        None,
    );
}

/// A VM that this host should not have. Told of once, at its second sight: a report that was under way while the VM
/// left is no news. Never touched.
fn stray(tx: &mut Tx, host: &HostName, reported: Reported) {
    let migrating = tx
        .active_migration(reported.id)
        .is_some_and(|m| m.source == *host || m.destination == *host);
    // After a restore the store is behind: what it does not know may be the only copy, and is shown as a difference.
    let behind = tx.meta.observing.is_some() || tx.vms.get(&reported.id).is_some_and(|vm| vm.unconfirmed);
    if migrating || behind || reported.observation.phase == VmPhase::Deleting {
        return;
    }
    let message = format!(
        "host {host} has a VM {} ({}) that is not its own; it is left alone. If nobody needs it, remove it there",
        reported.name, reported.id
    );
    let times = tx.note_stray(host.clone(), reported.clone());
    if times > 1 && let_go::remnant(tx, &reported).is_some() {
        tx.touch(reported.id);
        return;
    }
    let known = tx.vms.get(&reported.id).cloned();
    if times > 1 && known.is_some_and(|vm| incarnation::takes_part(tx, &vm, host, &reported)) {
        return;
    }
    if times == 2 {
        tx.event(EventKind::Host, "StrayVm", host, message, None);
    }
}
