//! Volumes: disks that outlive the VMs that have them.
//!
//! ```text
//!   New ──first attached──> InUse ⇄ Available ──asked for──> Deleted ──after the grace period──> Purging ──> gone
//!                                       ^──────taken back───────┘
//! ```
//!
//! A record says what a volume is and where its file is; who has it follows from the VMs, whose disks name it. A VM's record says
//! which of its volumes may not have been made yet ([`crate::model::VmRecord::new_volumes`]): its host makes those and no others, so that a
//! volume that was lost is never replaced by a blank one. [`resolve`] fills in the disks that name volumes (pure), [`runner`] has the
//! files of deleted ones removed.

pub mod resolve;
pub mod runner;

#[cfg(test)]
mod properties;

use dalgu_proto::{
    host::Pool,
    ids::{HostName, VolumeId},
    vm::Disk,
};

use crate::{
    model::{VmRecord, VolumeRecord},
    state::State,
};

/// Most volumes of a site.
pub const MAX_VOLUMES: usize = 65_536;

/// How far a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum VolumeState {
    /// Its file is not made yet.
    New,
    /// No VM has it.
    Available,
    /// A VM has it.
    InUse,
    /// Deleted, and to be had back.
    Deleted,
    /// Its file is being removed.
    Purging,
    /// Its host is not of the site any more.
    HostGone,
}

impl VolumeState {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::New,
        Self::Available,
        Self::InUse,
        Self::Deleted,
        Self::Purging,
        Self::HostGone,
    ];

    /// Name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Available => "available",
            Self::InUse => "in_use",
            Self::Deleted => "deleted",
            Self::Purging => "purging",
            Self::HostGone => "host_gone",
        }
    }
}

/// How far a volume is.
pub fn state_of(state: &State, volume: &VolumeRecord) -> VolumeState {
    let gone = pinned_to(state, volume).is_some_and(|host| !state.hosts.contains_key(host));
    match volume.delete_time {
        Some(_) if volume.purging => VolumeState::Purging,
        Some(_) => VolumeState::Deleted,
        None if holder(state, volume.id).is_some() => VolumeState::InUse,
        None if gone => VolumeState::HostGone,
        None if !volume.made => VolumeState::New,
        None => VolumeState::Available,
    }
}

/// The VM that has a volume, or has not let go of it yet.
pub fn holder(state: &State, volume: VolumeId) -> Option<&VmRecord> {
    let holders = state.volume_vms.get(&volume)?;
    holders.iter().find_map(|vm| state.vms.get(vm)).map(AsRef::as_ref)
}

/// Whether every host sees the same files in a pool, as a host of the site says.
pub fn is_shared(state: &State, host: &HostName, pool: &str) -> bool {
    pool_of(state, host, pool).is_some_and(|known| known.shared)
}

/// A pool, as the host told of it last.
pub fn pool_of<'a>(state: &'a State, host: &HostName, pool: &str) -> Option<&'a Pool> {
    let pools = &state.hosts.get(host)?.inventory.pools;
    pools.iter().find(|known| known.name == pool)
}

/// The only host that can have a volume, because its file is there.
pub fn pinned_to<'a>(state: &State, volume: &'a VolumeRecord) -> Option<&'a HostName> {
    let host = volume.host.as_ref()?;
    (!is_shared(state, host, &volume.pool)).then_some(host)
}

/// Whether a disk is a volume of which the VM's host has not said yet in which of two pools it is.
pub fn is_moving(state: &State, vm: &VmRecord, disk: &Disk) -> bool {
    let field = format!("disks[{}].pool", disk.name);
    let pending = || state.observation(vm).is_some_and(|seen| seen.is_pending(&field));
    disk.volume.is_some() && (left_in(vm, disk).next().is_some() || pending())
}

/// Pools in which a VM's volume may still be besides its own.
pub fn left_in<'a>(vm: &'a VmRecord, disk: &'a Disk) -> impl Iterator<Item = &'a str> {
    let id = disk.volume_id();
    let left_out = vm.change.iter().flat_map(|change| &change.left_out);
    let same = left_out.filter(move |old| id.is_some() && old.volume_id() == id);
    same.map(|old| old.pool.as_str())
}
