//! What operators do with volumes. Attaching and detaching are changes of VMs: see `verbs::update`.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::{
    ids::{HostName, VolumeId, VolumeName},
    vm::Disk,
};

use super::{
    Caller, Error, check_etag, pool_is_known, room,
    update::{self, Update as UpdateVm},
};
use crate::{
    hosts, images,
    model::{Outcome, VolumeRecord},
    placement::{Policy, PoolView},
    state::{State, Tx},
    volumes::{MAX_VOLUMES, holder, is_shared, pinned_to, pool_of, resolve},
};

/// A new volume.
#[derive(Debug, Clone)]
pub struct Create {
    /// Name.
    pub name: VolumeName,
    /// What every disk that is this volume is made of; its name there aside.
    pub disk: Disk,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Description.
    pub description: String,
}

/// New values of mutable fields; `None` leaves one as it is.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Description.
    pub description: Option<String>,
    /// Capacity.
    pub size_mib: Option<u64>,
    /// Which host is best; for the hint where the VM's own has no room.
    pub policy: Policy,
}

/// The volume of that name.
pub fn find(state: &State, name: &VolumeName) -> Result<VolumeRecord, Error> {
    Ok(resolve::find(state, name)?.clone())
}

/// Makes a volume: its file is made when it is first attached.
pub fn create(tx: &mut Tx, caller: &Caller, new: Create) -> Result<Outcome, Error> {
    room(tx)?;
    match tx.volumes.get(&new.name) {
        Some(known) if known.delete_time.is_some() => {
            return Err(Error::Volume(resolve::Error::Deleted(new.name)));
        }
        Some(_) => return Err(Error::VolumeExists(new.name)),
        None if tx.volumes.len() >= MAX_VOLUMES => {
            return Err(Error::TooMany {
                what: "volumes",
                most: MAX_VOLUMES,
            });
        }
        None => {}
    }
    let mut disk = new.disk;
    images::resolve::image(tx, 0, &mut disk, &caller.principal).map_err(|error| match error {
        images::resolve::Error::Disk { field, message, .. } => {
            Error::invalid(format!("volume.{field}"), message)
        }
        other => other.into(),
    })?;
    can_hold(tx, &disk.pool, disk.size_mib)?;
    tx.volume_event(
        &new.name,
        "VolumeCreated",
        format!("made by {}", caller.principal),
    );
    let firmware = images::resolve::firmware_of_disk(tx, &disk, &caller.principal);
    let volume = VolumeRecord {
        id: VolumeId::from_uuid(tx.new_id()),
        name: new.name.clone(),
        size_mib: disk.size_mib,
        pool: disk.pool,
        format: disk.format,
        image: disk.image,
        digest: disk.digest,
        clone_mode: disk.clone_mode,
        firmware: firmware.unwrap_or_default(),
        labels: new.labels,
        description: new.description,
        host: None,
        made: false,
        create_time: tx.now(),
        delete_time: None,
        purge_time: None,
        purging: false,
        revision: 0,
    };
    tx.put_volume(volume);
    Ok(Outcome::Volume(new.name))
}

/// Changes a volume.
pub fn update(
    tx: &mut Tx,
    caller: &Caller,
    name: &VolumeName,
    etag: &str,
    update: Update,
) -> Result<Outcome, Error> {
    room(tx)?;
    let old = find(tx, name)?;
    check_etag(etag, old.revision, name.as_str())?;
    if old.delete_time.is_some() {
        return Err(Error::Volume(resolve::Error::Deleted(old.name)));
    }
    if let Some(size_mib) = update.size_mib {
        grow(tx, caller, &old, size_mib, update.policy)?;
    }
    let grown = find(tx, name)?;
    let new = VolumeRecord {
        labels: update.labels.unwrap_or_else(|| grown.labels.clone()),
        description: update.description.unwrap_or_else(|| grown.description.clone()),
        ..grown.clone()
    };
    if new != grown {
        tx.put_volume(new.clone());
    }
    if new != old {
        tx.volume_event(name, "VolumeUpdated", "changed");
    }
    Ok(Outcome::Volume(name.clone()))
}

/// Enlarges a volume, where its host has the room.
fn grow(
    tx: &mut Tx,
    caller: &Caller,
    volume: &VolumeRecord,
    size_mib: u64,
    policy: Policy,
) -> Result<(), Error> {
    if size_mib < volume.size_mib {
        return Err(Error::VolumeShrinks {
            volume: volume.name.clone(),
            now: volume.size_mib,
            wanted: size_mib,
        });
    }
    if size_mib == volume.size_mib {
        return Ok(());
    }
    let Some(vm) = holder(tx, volume.id) else {
        has_room(tx, volume, size_mib - volume.size_mib)?;
        tx.put_volume(VolumeRecord {
            size_mib,
            ..volume.clone()
        });
        return Ok(());
    };
    let is_it = |disk: &Disk| disk.volume_id() == Some(volume.id);
    let (vm, mut disks) = (vm.name.clone(), vm.spec.disks.clone());
    let Some(disk) = disks.iter_mut().find(|disk| is_it(disk)) else {
        let volume = volume.name.clone();
        return Err(Error::Volume(resolve::Error::InUse { volume, vm }));
    };
    disk.size_mib = size_mib;
    // The VM's record brings the volume's along.
    let change = UpdateVm {
        disks: Some(disks),
        policy,
        ..UpdateVm::default()
    };
    update::update(tx, caller, vm.as_str(), "", change).map(drop)
}

/// Refuses a volume that no host could ever have. Whether there is room now shows when it is attached.
fn can_hold(state: &State, pool: &str, size_mib: u64) -> Result<(), Error> {
    pool_is_known(state, pool)?;
    let pools = state.hosts.values().filter_map(|host| host.inventory.pool(pool));
    // Of one that cannot be read the size is not known.
    let most = pools.map(|known| match known.error {
        Some(_) => u64::MAX,
        None => PoolView::of(known, 0, state.pool_policy).promisable_mib(),
    });
    match most.max() {
        Some(most) if most < size_mib => Err(Error::PoolTooSmall {
            pool: pool.to_owned(),
            wanted: size_mib,
            most,
        }),
        _ => Ok(()),
    }
}

/// Refuses what the pool of a volume that no VM has, has no room for.
fn has_room(state: &State, volume: &VolumeRecord, more_mib: u64) -> Result<(), Error> {
    let host = volume.host.as_ref().and_then(|host| state.hosts.get(host));
    let Some(host) = host else {
        return can_hold(state, &volume.pool, volume.size_mib.saturating_add(more_mib));
    };
    let view = hosts::view(state, host);
    match view.pool(&volume.pool) {
        Some(pool) if pool.free_mib() < more_mib => Err(Error::NoPoolRoom {
            pool: volume.pool.clone(),
            host: host.name.clone(),
            wanted: more_mib,
            free: pool.free_mib(),
        }),
        _ => Ok(()),
    }
}

/// Deletes a volume that no VM has; it can be had back for so long.
pub fn delete(
    tx: &mut Tx,
    caller: &Caller,
    name: &VolumeName,
    etag: &str,
    grace: Duration,
) -> Result<Outcome, Error> {
    let volume = find(tx, name)?;
    check_etag(etag, volume.revision, name.as_str())?;
    if let Some(vm) = holder(tx, volume.id) {
        let vm = vm.name.clone();
        return Err(Error::Volume(resolve::Error::InUse {
            volume: volume.name,
            vm,
        }));
    }
    if volume.delete_time.is_none() {
        let now = tx.now();
        tx.volume_event(
            name,
            "VolumeDeleted",
            format!("asked for by {}", caller.principal),
        );
        tx.put_volume(VolumeRecord {
            delete_time: Some(now),
            purge_time: Some(now.saturating_add(grace).unwrap_or(jiff::Timestamp::MAX)),
            ..volume
        });
    }
    Ok(Outcome::Volume(name.clone()))
}

/// Takes a deletion back.
pub fn undelete(tx: &mut Tx, caller: &Caller, name: &VolumeName, etag: &str) -> Result<Outcome, Error> {
    room(tx)?;
    let volume = find(tx, name)?;
    check_etag(etag, volume.revision, name.as_str())?;
    if volume.purging {
        return Err(Error::VolumePurged(volume.name));
    }
    if volume.delete_time.is_some() {
        tx.volume_event(
            name,
            "VolumeUndeleted",
            format!("asked for by {}", caller.principal),
        );
        tx.put_volume(VolumeRecord {
            delete_time: None,
            purge_time: None,
            ..volume
        });
    }
    Ok(Outcome::Volume(name.clone()))
}

/// Whether a pool is one of the host alone. Of a pool that it does not have any more others know.
fn is_own(state: &State, host: &HostName, pool: &str) -> bool {
    pool_of(state, host, pool).is_some_and(|known| !known.shared)
}

/// Has other hosts answer for the volumes in shared pools of a host that is to be forgotten: which pools are shared is known from hosts.
/// How many they were.
///
/// # Errors
/// Where no other host shows such a pool. Volumes that are deleted already stand in nobody's way.
pub fn hand_over(tx: &mut Tx, host: &HostName) -> Result<usize, Error> {
    let volumes = tx
        .volumes
        .values()
        .filter(|volume| volume.host.as_ref() == Some(host) && !is_own(tx, host, &volume.pool));
    let volumes: Vec<_> = volumes.cloned().collect();
    let mut handed = Vec::new();
    for volume in volumes {
        let mut others = tx.hosts.keys().filter(|other| *other != host);
        match others.find(|other| is_shared(tx, other, &volume.pool)) {
            Some(other) => handed.push(VolumeRecord {
                host: Some(other.clone()),
                ..(*volume).clone()
            }),
            None if volume.delete_time.is_some() || !is_shared(tx, host, &volume.pool) => {}
            None => {
                return Err(Error::LastOfPool {
                    host: host.clone(),
                    pool: volume.pool.clone(),
                    volume: volume.name.clone(),
                });
            }
        }
    }
    let count = handed.len();
    handed.into_iter().for_each(|volume| tx.put_volume(volume));
    Ok(count)
}

/// Volumes that stay on a host which is forgotten.
pub fn left_on(state: &State, host: &HostName) -> usize {
    let volumes = state.volumes.values();
    volumes
        .filter(|volume| pinned_to(state, volume) == Some(host))
        .count()
}
