//! Snapshots: to make one, to delete one, to go back to one. Each changes what the VM's host is told it is to have; the host's word
//! that it has settled that ends the operation.

use std::collections::BTreeMap;

use dalgu_proto::{
    host::GuestFeature,
    ids::{SnapshotId, SnapshotName},
    snapshot::{MAX_SNAPSHOTS, Revert},
    vm::{Firmware, PowerState, Spec},
};

use super::{Caller, Error, accept, backup, confirmed, find, migrate, new_operation, power, room, supersede};
use crate::{
    hosts,
    model::{EventKind, OperationKind, Outcome, SnapshotRecord, SnapshotState, VmRecord},
    placement::{self, Policy, Request},
    state::{State, Tx},
    volumes,
};

/// A new snapshot.
#[derive(Debug, Clone)]
pub struct Create {
    /// Its name.
    pub name: SnapshotName,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Description.
    pub description: String,
    /// Which host is best; for the verdict on a host without room.
    pub policy: Policy,
}

/// The etag of a snapshot.
pub fn etag(snapshot: &SnapshotRecord) -> String {
    format!("g{}", snapshot.generation)
}

/// The place of a snapshot of a VM.
pub fn place(vm: &VmRecord, name: &SnapshotName) -> Result<usize, Error> {
    let found = vm.snapshots.place(name);
    found.ok_or_else(|| Error::SnapshotNotFound {
        vm: vm.name.clone(),
        name: name.clone(),
    })
}

/// A VM whose snapshots may be changed.
fn changeable(tx: &Tx, name: &str) -> Result<VmRecord, Error> {
    let vm = find(tx, name)?;
    if vm.delete_time.is_some() {
        return Err(Error::Deleting(vm.name));
    }
    confirmed(&vm)?;
    if tx.active_migrations.contains_key(&vm.id) {
        return Err(Error::MigrationInProgress(vm.name));
    }
    backup::none_under_way(tx, &vm)?;
    let host = tx.hosts.get(&vm.owner);
    if !host.is_some_and(|host| host.inventory.guest_features.contains(&GuestFeature::Snapshot)) {
        return Err(Error::NoSnapshotsThere(vm.owner));
    }
    Ok(vm)
}

fn check_etag(given: &str, snapshot: &SnapshotRecord) -> Result<(), Error> {
    if given.is_empty() || given == etag(snapshot) {
        return Ok(());
    }
    Err(Error::EtagMismatch(format!("snapshot {}", snapshot.name)))
}

/// Stores a change of snapshots, and what it waits for.
fn begin(
    tx: &mut Tx,
    caller: &Caller,
    mut vm: VmRecord,
    kind: OperationKind,
    (reason, name): (&str, &SnapshotName),
    change: impl FnOnce(&mut VmRecord),
) -> Outcome {
    vm.intent.generation = vm.intent.generation.next();
    vm.snapshots.generation = vm.intent.generation;
    change(&mut vm);
    let operation = new_operation(tx, caller, &vm, kind);
    let message = format!("{name}, asked for by {}", caller.principal);
    tx.event(EventKind::Vm, reason, &vm.name, message, Some(operation.id));
    tx.put_vm(vm);
    accept(tx, operation)
}

/// Makes a snapshot.
pub fn create(tx: &mut Tx, caller: &Caller, vm: &str, new: Create) -> Result<Outcome, Error> {
    room(tx)?;
    let vm = changeable(tx, vm)?;
    if vm.snapshots.all.iter().any(|known| known.name == new.name) {
        return Err(Error::SnapshotExists {
            vm: vm.name,
            name: new.name,
        });
    }
    if vm.snapshots.all.len() >= MAX_SNAPSHOTS {
        return Err(Error::TooManySnapshots(vm.name));
    }
    if vm.spec.disks.is_empty() {
        return Err(Error::NoDisks(vm.name));
    }
    with_volumes(tx, &vm)?;
    if tx.observation(&vm).is_some_and(|seen| seen.is_pending("disks[")) {
        return Err(Error::ChangeInProgress {
            vm: vm.name,
            next: "a disk is still to come or to go, see `dalgu vm show`: repeat when that is done, or at its next start",
        });
    }
    if let Some(next) = migrate::changing(tx, &vm) {
        return Err(Error::ChangeInProgress { vm: vm.name, next });
    }
    has_room(tx, &vm, new.policy)?;
    let id = SnapshotId::from_uuid(tx.new_id());
    let (name, create_time) = (new.name.clone(), tx.now());
    let about = ("SnapshotCreating", &name);
    Ok(begin(
        tx,
        caller,
        vm,
        OperationKind::CreateSnapshot,
        about,
        |vm| {
            vm.snapshots.last = vm.snapshots.last.saturating_add(1);
            vm.snapshots.all.push(SnapshotRecord {
                id,
                name: new.name,
                layer: vm.snapshots.last,
                labels: new.labels,
                description: new.description,
                create_time,
                generation: vm.intent.generation,
                taken: false,
                quiesced: false,
                deleting: false,
            });
        },
    ))
}

/// Refuses a snapshot of volumes of which the VM's host has not said that they are there, or that its agent cannot make.
fn with_volumes(state: &State, vm: &VmRecord) -> Result<(), Error> {
    if vm.spec.disks.iter().all(|disk| disk.volume.is_none()) {
        return Ok(());
    }
    let host = state.hosts.get(&vm.owner);
    if !host.is_some_and(|host| {
        host.inventory
            .guest_features
            .contains(&GuestFeature::VolumeSnapshot)
    }) {
        return Err(Error::NoSnapshotsThere(vm.owner.clone()));
    }
    let there = |seen| vm.new_volumes.is_empty() && volumes::resolve::settled(vm, seen);
    match state.observation(vm).is_some_and(|seen| there(seen)) {
        true => Ok(()),
        false => Err(Error::ChangeInProgress {
            vm: vm.name.clone(),
            next: "repeat when its host has made its volumes ready, see `dalgu vm show`",
        }),
    }
}

/// Refuses one more layer of each disk where the VM's host has no room for it.
fn has_room(state: &State, vm: &VmRecord, policy: Policy) -> Result<(), Error> {
    let Some(host) = state.hosts.get(&vm.owner) else {
        return Ok(());
    };
    // Only disks are judged: the rest it has.
    let mut view = hosts::view(state, host);
    view.keep();
    (view.vcpus_reserved, view.memory_mib_reserved) = (0, 0);
    (view.reserved_memory_mib, view.unmanaged_memory_mib) = (0, 0);
    let layers = Spec {
        vcpus: 0,
        memory_mib: 0,
        disks: vm.spec.disks.clone(),
        nics: Vec::new(),
        kernel_boot: None,
        restart_policy: vm.spec.restart_policy,
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Firmware::Bios,
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    };
    let request = Request::new(layers).on(Some(vm.owner.clone()));
    let decision = placement::decide(&request, &[view], &policy);
    match decision.host {
        Some(_) => Ok(()),
        None => Err(Error::NoCapacity {
            decision: Box::new(decision),
            sleeper: None,
            in_pieces: false,
        }),
    }
}

/// Deletes a snapshot.
pub fn delete(
    tx: &mut Tx,
    caller: &Caller,
    vm: &str,
    name: &SnapshotName,
    etag: &str,
) -> Result<Outcome, Error> {
    let vm = changeable(tx, vm)?;
    let place = place(&vm, name)?;
    check_etag(etag, &vm.snapshots.all[place])?;
    let layer = vm.snapshots.all[place].layer;
    let begins = vm.snapshots.revert.filter(|revert| revert.number == layer);
    let there = tx
        .observation(&vm)
        .is_some_and(|seen| seen.snapshot(layer).is_some());
    if begins.is_some() && !there {
        // Its host may hear of the deletion only, and has not gone back then.
        let by = OperationKind::DeleteSnapshot;
        supersede(tx, &vm, by, |kind| kind == OperationKind::RevertSnapshot);
    }
    let about = ("SnapshotDeleting", name);
    Ok(begin(
        tx,
        caller,
        vm,
        OperationKind::DeleteSnapshot,
        about,
        |vm| {
            let generation = vm.intent.generation;
            let snapshot = &mut vm.snapshots.all[place];
            (snapshot.deleting, snapshot.generation) = (true, generation);
            if begins.is_some() {
                vm.snapshots.revert = None;
            }
        },
    ))
}

/// Goes back to a snapshot.
pub fn revert(
    tx: &mut Tx,
    caller: &Caller,
    vm: &str,
    name: &SnapshotName,
    etag: &str,
    discard_later: bool,
) -> Result<Outcome, Error> {
    room(tx)?;
    let vm = changeable(tx, vm)?;
    let place = place(&vm, name)?;
    let snapshot = &vm.snapshots.all[place];
    check_etag(etag, snapshot)?;
    // Seen off is not enough: its host starts what is to run, or does so for a request that is still on its way there.
    if vm.intent.power != PowerState::Stopped || power::may_run(tx, &vm) {
        return Err(Error::RunsAtRevert(vm.name));
    }
    let is = snapshot.state(tx.observation(&vm).map(AsRef::as_ref));
    if is != SnapshotState::Ready {
        return Err(Error::SnapshotNotReady {
            vm: vm.name.clone(),
            name: name.clone(),
            is: is.as_str(),
        });
    }
    // Else it may run there, under an earlier request, when its host hears of this one and of a later start at once; and what
    // is to be replaced may not be there yet, where the VM is going back already.
    let seen = tx.observation(&vm);
    if seen.is_none_or(|seen| seen.observed < vm.intent.generation) {
        return Err(Error::ChangeInProgress {
            vm: vm.name.clone(),
            next: "repeat when its host has carried out what was asked before",
        });
    }
    let later = vm.snapshots.all[place + 1..].iter().filter(|one| !one.deleting);
    let later: Vec<_> = later.map(|one| one.name.to_string()).collect();
    if !later.is_empty() && !discard_later {
        return Err(Error::SnapshotsLater {
            vm: vm.name,
            name: name.clone(),
            later,
        });
    }
    let about = ("VmReverting", name);
    Ok(begin(
        tx,
        caller,
        vm,
        OperationKind::RevertSnapshot,
        about,
        |vm| {
            let generation = vm.intent.generation;
            let snapshots = &mut vm.snapshots;
            snapshots.last = snapshots.last.saturating_add(1);
            for later in &mut snapshots.all[place + 1..] {
                (later.deleting, later.generation) = (true, generation);
            }
            let snapshot = &mut snapshots.all[place];
            snapshots.revert = Some(Revert {
                number: snapshots.last,
                replaces: snapshot.layer,
            });
            (snapshot.layer, snapshot.generation) = (snapshots.last, generation);
        },
    ))
}

#[cfg(test)]
mod tests;
