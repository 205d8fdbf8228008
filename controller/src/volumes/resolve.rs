//! Finds the volumes that disks of a VM name, and what follows for the disks and for where the VM can be. Pure.
//!
//! Called by `verbs::create` and `verbs::update`, in the transaction that stores the VM.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    ids::{HostName, VmName, VolumeId, VolumeName},
    mutant::{self, Mutant},
    vm::{CloneMode, Disk, DiskFormat, Spec, VolumeRef},
};

use super::{holder, pinned_to};
use crate::{
    model::{Observation, VmRecord, VolumeRecord},
    placement::Bound,
    state::State,
};

/// Why a disk cannot be a volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is none of that name.
    #[error("there is no volume named {0}; see `dalgu volume list`")]
    NotFound(VolumeName),
    /// It is deleted.
    #[error("volume {0} is deleted: take that back with `dalgu volume undelete {0}`, or choose another")]
    Deleted(VolumeName),
    /// A VM has it.
    #[error(
        "volume {volume} is in use by VM {vm}: take it away there first, `dalgu vm update {vm} --remove-disk DISK`, and wait until the \
         guest has let go of it"
    )]
    InUse {
        /// The volume.
        volume: VolumeName,
        /// The VM.
        vm: VmName,
    },
    /// Its file is on another host than the VM.
    #[error("volume {volume} is on host {host}, VM {vm} is not: `dalgu vm migrate {vm} --host {host}` first")]
    Elsewhere {
        /// The volume.
        volume: VolumeName,
        /// Where it is.
        host: HostName,
        /// The VM.
        vm: VmName,
    },
    /// A field of a disk is not as the volume has it.
    #[error("disks[{index}].{field}: {message}")]
    Disk {
        /// Which disk.
        index: usize,
        /// Which field.
        field: &'static str,
        /// What is wrong.
        message: String,
    },
}

/// The volume of that name.
pub fn find<'a>(state: &'a State, name: &VolumeName) -> Result<&'a VolumeRecord, Error> {
    let volume = state.volumes.get(name);
    volume
        .map(AsRef::as_ref)
        .ok_or_else(|| Error::NotFound(name.clone()))
}

/// The volume that a disk is.
pub fn of_disk<'a>(state: &'a State, disk: &Disk) -> Option<&'a VolumeRecord> {
    let volume = disk.volume.as_ref()?;
    let known = state.volumes.get(&volume.name)?;
    (Some(known.id) == volume.id).then_some(&**known)
}

/// Fills in what the volumes say of the disks that name them; `known` are disks that the VM has already, which are left alone.
pub fn volumes(state: &State, disks: &mut [Disk], known: &[Disk]) -> Result<(), Error> {
    let mut named = BTreeSet::new();
    for (index, disk) in disks.iter_mut().enumerate() {
        let Some(VolumeRef { name, .. }) = disk.volume.clone() else {
            continue;
        };
        if !named.insert(name.clone()) {
            let message = format!("volume {name} is named by two disks");
            return Err(invalid(index, "volume", message));
        }
        let has = |known: &Disk| {
            known.name == disk.name && known.volume.as_ref().is_some_and(|own| own.name == name)
        };
        if known.iter().any(has) {
            continue;
        }
        let volume = find(state, &name)?;
        if volume.delete_time.is_some() {
            return Err(Error::Deleted(name));
        }
        if let Some(vm) = holder(state, volume.id).filter(|_| !mutant::on(Mutant::VolumeGivenTwice)) {
            let vm = vm.name.clone();
            return Err(Error::InUse { volume: name, vm });
        }
        same(index, disk, volume)?;
        *disk = volume.as_disk(disk);
    }
    Ok(())
}

fn invalid(index: usize, field: &'static str, message: String) -> Error {
    Error::Disk {
        index,
        field,
        message,
    }
}

/// Whether a disk that names a volume says no other format than that.
pub fn says_format(disk: &Disk, format: DiskFormat) -> bool {
    let said = disk.volume.as_ref().and_then(|volume| volume.format);
    said.unwrap_or(disk.format) == format || (said.is_none() && disk.format == DiskFormat::default())
}

/// That a disk says nothing else than its volume.
fn same(index: usize, disk: &Disk, volume: &VolumeRecord) -> Result<(), Error> {
    let not_said = [
        ("size_mib", disk.size_mib == 0 || disk.size_mib == volume.size_mib),
        ("pool", disk.pool.is_empty() || disk.pool == volume.pool),
        ("image", disk.image.is_none() || disk.image == volume.image),
        ("format", says_format(disk, volume.format)),
        (
            "clone_mode",
            disk.clone_mode == CloneMode::Any || disk.clone_mode == volume.clone_mode,
        ),
    ];
    match not_said.iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((field, _)) => {
            let message = format!("is not that of volume {}: leave it empty", volume.name);
            Err(invalid(index, field, message))
        }
    }
}

/// Refuses a volume whose file is on another host than a VM.
pub fn reachable(state: &State, vm: &VmRecord, disk: &Disk) -> Result<(), Error> {
    let Some(volume) = of_disk(state, disk) else {
        return Ok(());
    };
    match pinned_to(state, volume) {
        Some(host) if *host != vm.owner => Err(Error::Elsewhere {
            volume: volume.name.clone(),
            host: host.clone(),
            vm: vm.name.clone(),
        }),
        _ => Ok(()),
    }
}

/// Of a new VM, its volumes that have a place already: their room is taken, and where they are it must be.
pub fn bound(state: &State, spec: &Spec) -> BTreeMap<VolumeId, Bound> {
    let volumes = spec.disks.iter().filter_map(|disk| of_disk(state, disk));
    let placed = volumes.filter(|volume| volume.host.is_some());
    let bound = placed.map(|volume| {
        let bound = Bound {
            volume: volume.name.clone(),
            host: pinned_to(state, volume).cloned(),
        };
        (volume.id, bound)
    });
    bound.collect()
}

/// Names of disks that are volumes which may not have been made yet.
pub fn unmade(state: &State, disks: &[Disk]) -> BTreeSet<String> {
    let new = |disk: &&Disk| of_disk(state, disk).is_some_and(|volume| !volume.made);
    disks.iter().filter(new).map(|disk| disk.name.clone()).collect()
}

/// Whether a host has made the volumes of a VM that were new, by what it says.
pub fn settled(vm: &VmRecord, seen: &Observation) -> bool {
    let brought = vm.change.as_ref().map(|change| change.generation);
    match brought {
        Some(generation) => seen.observed >= generation,
        // They came with the VM.
        None => seen.observed.0 > 0,
    }
}
