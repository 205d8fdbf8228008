//! A store that was restored from a backup begins a new life: an incarnation. What hosts have goes on as it is; what the
//! backup says of them may be long out of date.
//!
//! ```text
//!   backup ──restore: renew──> observing ──every host heard or waived, differences accepted──> resumed
//!                             (no command)                                              (VMs taken over as they are)
//! ```
//!
//! [`renew`] is for `backup`: every number that agents remember jumps so far ahead that nothing said before is valid any more.
//! The rest is called inside transactions by `api::site` and `reconcile::apply`. The rule: hosts are right. A VM is taken
//! over where it is and in the power state it is in; one that no host has is never made again, and one that the store does
//! not know is never touched.

mod differences;
mod renew;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use dalgu_proto::{
    ids::{Epoch, Generation, HostName, MigrationId, OperationId, VmId},
    snapshot::Set,
    vm::{Disk, Spec},
};

pub use self::{
    differences::{Difference, Kind, differences, differences_of, etag, waiting},
    renew::{Error as RenewError, JUMP, Past, past, renew},
};
use crate::{
    agent_wire::Reported,
    model::{
        Change, EventKind, Intent, MigrationRecord, OperationKind, OperationRecord, OperationState, Phase,
        VmPhase, VmRecord,
    },
    state::{State, Tx},
};

/// Why an operator's call is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such host.
    #[error("there is no host named {0}; see `dalgu host list`")]
    UnknownHost(HostName),
    /// No backup was restored.
    #[error("the controller does not observe: there is nothing to wait for")]
    NotObserving,
    /// Hosts are waited for.
    #[error("not heard from yet: {}; wait for them, or waive those that will not come (`dalgu site waive HOST`)", names(.0))]
    Waiting(Vec<HostName>),
    /// There are differences.
    #[error(
        "hosts and store differ in {0} points: look at them (`dalgu site show`), then resume with --accept-differences"
    )]
    Differences(usize),
    /// They are others than were looked at.
    #[error("the differences have changed since they were looked at: look again, then repeat")]
    Changed,
}

fn names(hosts: &[HostName]) -> String {
    let names: Vec<_> = hosts.iter().map(HostName::as_str).collect();
    names.join(", ")
}

/// Where a VM is, as hosts show it.
#[derive(Debug, Clone)]
enum Place {
    Nowhere,
    On(Seen),
    Migrating {
        source: Seen,
        destination: Seen,
        id: MigrationId,
    },
    Unclear(Vec<HostName>),
}

type Seen = (HostName, Arc<Reported>);

/// Hosts other than its owner that have a VM or a domain of its id, by all that they say: none that deletes it, none that
/// takes part in its migration, and a VM only when it has been said twice.
pub fn elsewhere(state: &State, vm: &VmRecord) -> Vec<HostName> {
    let mut hosts = match place(state, vm.id) {
        _ if !vm.unconfirmed => Vec::new(),
        Place::Nowhere => Vec::new(),
        Place::On((host, _)) => vec![host],
        Place::Migrating {
            source, destination, ..
        } => {
            let shown = state.sightings.get(&vm.id);
            let shows = |host: &HostName| shown.is_some_and(|shown| shown.contains_key(host));
            [source.0, destination.0].into_iter().filter(shows).collect()
        }
        Place::Unclear(hosts) => hosts,
    };
    let strays = state.strays.iter();
    let strays = strays.filter(|((_, id), stray)| *id == vm.id && stray.times > 1);
    hosts.extend(strays.map(|((host, _), _)| host.clone()));
    let uuid = vm.id.to_string();
    let copies = state.live.iter();
    let copies = copies.filter(|(_, live)| live.unmanaged.iter().any(|domain| domain.uuid == uuid));
    hosts.extend(copies.map(|(host, _)| host.clone()));
    hosts.sort_unstable();
    hosts.dedup();
    hosts.retain(|host| *host != vm.owner);
    hosts
}

fn place(state: &State, vm: VmId) -> Place {
    let (mut solid, mut leaving, mut coming) = (Vec::new(), Vec::new(), Vec::new());
    let shown = || state.sightings.get(&vm).into_iter().flatten();
    let newest = shown().map(|(_, reported)| reported.observation.epoch).max();
    for (host, reported) in shown() {
        let seen = (host.clone(), reported.clone());
        let said = &reported.observation;
        match said.phase {
            // Of an older migration, and nothing of the VM is there: it has had another owner since.
            phase if phase.is_migrating() && said.power.is_none() && Some(said.epoch.next()) < newest => {}
            // It goes by itself.
            VmPhase::Deleting => {}
            VmPhase::Incoming => coming.push(seen),
            VmPhase::Outgoing => leaving.push(seen),
            _ => solid.push(seen),
        }
    }
    let hosts = || {
        let all = solid.iter().chain(&leaving).chain(&coming);
        all.map(|(host, _)| host.clone()).collect()
    };
    let mut lone = None;
    let (source, destination) = match (&solid[..], &leaving[..], &coming[..]) {
        ([], [], []) => return Place::Nowhere,
        ([only], [], []) => return Place::On(only.clone()),
        // Made ready for a VM that nobody sends any more; left of one that arrived elsewhere, and is not there any more.
        ([], [only], []) | ([], [], [only]) if only.1.observation.power.is_none() => return Place::Nowhere,
        // On its way; made ready and never begun; arrived, and the source has not been told.
        ([], [source], [destination]) | ([source], [], [destination]) | ([destination], [source], []) => {
            (source, destination)
        }
        // Every host has told what it has: the other side has nothing.
        ([], [source], []) => match silent_side(state, vm, source) {
            Some(destination) => (source, &*lone.insert(destination)),
            None => return Place::Unclear(hosts()),
        },
        ([], [], [destination]) => match silent_side(state, vm, destination) {
            Some(source) => (&*lone.insert(source), destination),
            None => return Place::Unclear(hosts()),
        },
        _ => return Place::Unclear(hosts()),
    };
    // Whoever has the VM for good tells of any migration that it remembers.
    let part = |seen: &Seen| {
        let part = seen.1.observation.phase.is_migrating();
        seen.1.migration.filter(|_| part)
    };
    let (theirs, ours) = (part(destination), part(source));
    match theirs.or(ours) {
        Some(id) if theirs.is_none_or(|theirs| ours.is_none_or(|ours| ours == theirs)) => Place::Migrating {
            source: source.clone(),
            destination: destination.clone(),
            id,
        },
        _ => Place::Unclear(hosts()),
    }
}

/// Whether every host has told what it has since this start, also those that were not waited for.
fn all_listed(state: &State) -> bool {
    state.hosts.keys().all(|host| state.listed.contains(host))
}

/// Whether no host has a VM, by the word of each.
pub fn is_nowhere(state: &State, vm: VmId) -> bool {
    all_listed(state) && matches!(place(state, vm), Place::Nowhere)
}

/// A host to be asked beside the only one that shows a VM, and shows it as one that is on its way: who should have it, or
/// any. Only when no host can have it that has not said so.
fn silent_side(state: &State, vm: VmId, only: &Seen) -> Option<Seen> {
    if !all_listed(state) {
        return None;
    }
    let owner = state.vms.get(&vm).map(|vm| &vm.owner);
    let mut others = owner.into_iter().chain(state.hosts.keys());
    let other = others.find(|host| **host != only.0)?;
    Some((other.clone(), only.1.clone()))
}

/// No longer waits for a host.
pub fn waive(tx: &mut Tx, host: &HostName, principal: &str) -> Result<(), Error> {
    let Some(mut observing) = tx.meta.observing.clone() else {
        return Err(Error::NotObserving);
    };
    if !tx.hosts.contains_key(host) {
        return Err(Error::UnknownHost(host.clone()));
    }
    if observing.waived.insert(host.clone()) {
        tx.set_observing(Some(observing));
        let message = format!("not waited for after the restore; said by {principal}");
        tx.event(EventKind::Host, "HostWaived", host, message, None);
    }
    Ok(())
}

/// Ends the observing, and takes over what hosts have. Harmless when repeated; later it takes over what has shown since.
pub fn resume(tx: &mut Tx, accept: bool, seen_etag: &str, principal: &str) -> Result<(), Error> {
    let found = differences(tx);
    let observing = tx.meta.observing.is_some();
    if observing {
        let waiting = waiting(tx);
        if !waiting.is_empty() {
            return Err(Error::Waiting(waiting));
        }
        if !found.is_empty() && !accept {
            return Err(Error::Differences(found.len()));
        }
    }
    if accept && !found.is_empty() {
        if etag(&found) != seen_etag {
            return Err(Error::Changed);
        }
    } else if !observing {
        return Ok(());
    }
    let unconfirmed: Vec<_> = tx.vms.values().filter(|vm| vm.unconfirmed).cloned().collect();
    for vm in unconfirmed {
        match place(tx, vm.id) {
            Place::On(own) => take_over(tx, &vm, &own),
            Place::Migrating {
                source,
                destination,
                id,
            } => settle(tx, &vm, &source, &destination, id),
            Place::Nowhere | Place::Unclear(_) => tx.touch(vm.id),
        }
    }
    if observing {
        tx.set_observing(None);
        let message = format!("{} differences accepted; said by {principal}", found.len());
        tx.event(EventKind::Host, "SiteResumed", "site", message, None);
    }
    Ok(())
}

/// A host that was not waited for is back: what it has of its own is taken over. Called after each complete list.
pub fn returned(tx: &mut Tx, host: &HostName) {
    if tx.meta.observing.is_some() {
        return;
    }
    let its_own = |id: &VmId| {
        let vm = tx.vms.get(id).filter(|vm| vm.unconfirmed && vm.owner == *host)?;
        match place(tx, *id) {
            Place::On(own) if own.0 == *host => Some((vm.clone(), own)),
            _ => None,
        }
    };
    let sighted = tx.sighted.get(host).into_iter().flatten();
    let found: Vec<_> = sighted.filter_map(its_own).collect();
    for (vm, own) in found {
        take_over(tx, &vm, &own);
    }
}

/// What its owner wants of a VM: as the host says that was told last, unless the backup has a request that had not come to
/// it. A guest that is off because its host lost power, or paused for a moment, was not stopped by its owner.
fn wanted(vm: &VmRecord, reported: &Reported) -> (Intent, Spec) {
    let seen = &reported.observation;
    if vm.backup_generation > Some(seen.accepted) {
        return (vm.intent.clone(), vm.spec.clone());
    }
    if let Some(told) = &reported.told {
        // Also what it is made of: a disk that the backup does not know was added since, and is full of data.
        let spec = told.spec.as_ref().unwrap_or(&vm.spec).clone();
        let restart_policy = told.restart_policy;
        return (
            told.intent.clone(),
            Spec {
                restart_policy,
                ..spec
            },
        );
    }
    // It was never told, or does not say: what it is must do. What was asked of it before counts as asked: neither is a
    // guest rebooted again, nor is the next reboot lost.
    let intent = Intent {
        power: seen.power.unwrap_or(vm.intent.power),
        power_sequence: reported.power_sequence.unwrap_or(vm.intent.power_sequence),
        restart_sequence: reported.restart_sequence.unwrap_or(vm.intent.restart_sequence),
        ..vm.intent.clone()
    };
    (intent, vm.spec.clone())
}

/// The snapshots that a host was told of, where it was told later than the backup was taken: a layer that was merged since is there
/// no more, and one that was made since must not be merged.
fn told_snapshots<'a>(vm: &VmRecord, reported: &'a Reported) -> Option<&'a Set> {
    let newer = vm.backup_generation <= Some(reported.observation.accepted);
    reported.told.as_ref().filter(|_| newer)?.snapshots.as_ref()
}

/// A record as its owner wants it, with numbers ahead of all that the hosts which have the VM remember.
fn ahead(vm: &VmRecord, seen: &[&Reported]) -> VmRecord {
    let mut ahead = vm.clone();
    for reported in seen {
        let Epoch(epoch) = reported.observation.epoch;
        let Generation(generation) = reported.observation.accepted;
        ahead.epoch = ahead.epoch.max(Epoch(epoch.saturating_add(1)));
        let generation = Generation(generation.saturating_add(1));
        ahead.intent.generation = ahead.intent.generation.max(generation);
    }
    if let Some(newest) = seen.iter().max_by_key(|reported| reported.observation.accepted) {
        let (intent, spec) = wanted(vm, newest);
        let generation = ahead.intent.generation;
        ahead.intent = Intent { generation, ..intent };
        if !spec.same_hardware(&ahead.spec) {
            // What was to be done of changes, its host knows.
            ahead.change = None;
        }
        ahead.spec = spec;
        if let Some(set) = told_snapshots(vm, newest) {
            ahead.snapshots = vm.snapshots.told(set, vm.create_time);
        }
    }
    let same = Intent {
        generation: vm.intent.generation,
        ..ahead.intent.clone()
    };
    if same != vm.intent || ahead.spec != vm.spec || ahead.snapshots.set() != vm.snapshots.set() {
        // Another intent than the one that the backup has under this number.
        ahead.intent.generation = ahead.intent.generation.next();
    }
    if !ahead.snapshots.is_none() {
        // Its host is told them anew, and answers what is there.
        ahead.snapshots.generation = ahead.intent.generation;
    }
    ahead.unconfirmed = false;
    ahead.backup_generation = None;
    ahead
}

/// Moves of disks that the backup does not know and that are under way: both pools have room for them, and a volume is where it was.
fn moving(state: &State, host: &HostName, vm: &VmRecord, reported: &Reported) -> Option<Change> {
    let host = state.hosts.get(host)?;
    let old = |disk: &Disk| {
        let field = format!("disks[{}].pool", disk.name);
        let mut pending = reported.observation.pending.iter();
        let pool = &pending.find(|pending| pending.field == field)?.current;
        let pool = pool.clone();
        (pool != disk.pool && host.inventory.pool(&pool).is_some()).then(|| Disk { pool, ..disk.clone() })
    };
    let left_out: Vec<_> = vm.spec.disks.iter().filter_map(old).collect();
    (!left_out.is_empty()).then(|| Change {
        generation: vm.intent.generation,
        vcpus: vm.spec.vcpus,
        memory_mib: vm.spec.memory_mib,
        left_out,
        added: Default::default(),
    })
}

/// Where it is on a host, as the host was told: processors and PCI devices that another VM must not be given.
fn placed(vm: &mut VmRecord, host: &HostName, reported: &Reported) {
    // The word of one host says nothing of another.
    if reported.observation.host != *host {
        return;
    }
    let told = reported.told.iter();
    let places = told.map(|told| &told.places).find(|places| !places.is_empty());
    if let Some(places) = places {
        vm.places.insert(host.clone(), places.clone());
    }
    let told = reported.told.iter();
    let devices = told.map(|told| &told.devices).find(|devices| !devices.is_empty());
    if let Some(devices) = devices {
        vm.devices.insert(host.clone(), devices.clone());
    }
}

fn take_over(tx: &mut Tx, vm: &VmRecord, (host, reported): &Seen) {
    let mut taken = ahead(vm, &[reported]);
    taken.owner = host.clone();
    placed(&mut taken, host, reported);
    taken.change = taken.change.take().or_else(|| moving(tx, host, &taken, reported));
    let message = format!("taken over as it is on {host}");
    tx.event(EventKind::Vm, "VmTakenOver", &vm.name, message, None);
    tx.observe(vm.id, None);
    tx.forget_sightings(vm.id);
    tx.put_vm(taken);
}

/// Both hosts are asked where the VM is, as after any migration that was cut short.
fn settle(tx: &mut Tx, vm: &VmRecord, source: &Seen, destination: &Seen, id: MigrationId) {
    let mut taken = ahead(vm, &[&destination.1, &source.1]);
    taken.owner = source.0.clone();
    for (host, reported) in [source, destination] {
        placed(&mut taken, host, reported);
    }
    tx.observe(vm.id, None);
    tx.forget_sightings(vm.id);
    ask_both(tx, taken, &source.0, &destination.0, id);
}

/// A host that is not the owner says that it takes part in a migration of a VM. Where a restored store knows of none, because
/// it had not waited for this host, both are asked, and the one that does not have the VM tidies up. Whether that was begun,
/// or is still to be. A store that was never restored is ignorant only where it is an old copy beside the site's own: it
/// would give the VM a number of ownership that the other does not know.
pub fn takes_part(tx: &mut Tx, vm: &VmRecord, host: &HostName, reported: &Reported) -> bool {
    let (source, destination) = match reported.observation.phase {
        VmPhase::Outgoing => (host, &vm.owner),
        VmPhase::Incoming => (&vm.owner, host),
        _ => return false,
    };
    let Some(id) = reported.migration.filter(|_| tx.meta.restores() > 0) else {
        return false;
    };
    if vm.delete_time.is_none() && !vm.unconfirmed && tx.active_migration(vm.id).is_none() {
        let epoch = vm.epoch.max(reported.observation.epoch.next());
        if epoch != vm.epoch {
            tx.observe(vm.id, None);
        }
        let mut vm = VmRecord { epoch, ..vm.clone() };
        placed(&mut vm, host, reported);
        ask_both(tx, vm, source, destination, id);
    }
    true
}

/// Stores a migration that hosts know of as one whose end both are asked for.
fn ask_both(tx: &mut Tx, vm: VmRecord, source: &HostName, destination: &HostName, id: MigrationId) {
    let operation = OperationRecord {
        id: OperationId::from_uuid(tx.new_id()),
        kind: OperationKind::Migrate,
        state: OperationState::Active,
        vm: vm.id,
        vm_name: vm.name.clone(),
        generation: vm.intent.generation,
        power: None,
        grace_period_seconds: 0,
        migration: Some(id),
        request_id: String::new(),
        principal: "restore".to_owned(),
        error: None,
        message: String::new(),
        create_time: tx.now(),
        end_time: None,
        cancel_requested: false,
    };
    let record = MigrationRecord {
        id,
        vm: vm.id,
        operation: operation.id,
        source: source.clone(),
        destination: destination.clone(),
        source_epoch: vm.epoch,
        destination_epoch: vm.epoch.next(),
        intent: vm.intent.clone(),
        phase: Phase::CuttingOver,
        phase_time: tx.now(),
        source_told: true,
        abort_requested: false,
        error: None,
        max_downtime_ms: 0,
        bandwidth_mib_per_second: 0,
        source_answer: None,
        destination_answer: None,
        source_finished: false,
        destination_finished: false,
        progress: None,
        network_delay_ms: None,
        network_blackout_ms: None,
        decision: vm.decision.clone(),
    };
    let message = format!("was migrating from {source} to {destination}: both are asked");
    tx.event(
        EventKind::Vm,
        "VmTakenOver",
        &vm.name,
        message,
        Some(operation.id),
    );
    tx.put_vm(vm);
    tx.put_operation(operation);
    tx.put_migration(record);
}
