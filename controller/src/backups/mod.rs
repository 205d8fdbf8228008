//! Backups of VMs: which there are, which are due, and which need not be kept.
//!
//! ```text
//!   Pending ──told──> Running ──its host says so──> Available ──asked for, or no longer kept──> Deleting ──> gone
//!      └────── refused ──┴──────── not taken ──────> Failed ───────────────────────────────────────┘
//! ```
//!
//! [`plan`] reads from a state which backups are due and which are not to be kept (pure), [`runner`] tells hosts. Hosts are asked
//! for nothing that the store does not know: a backup that a restored store has forgotten stays where it is.

pub mod plan;
pub mod runner;

#[cfg(test)]
mod properties;
#[cfg(test)]
pub(crate) mod tests;

use std::{collections::BTreeSet, sync::Arc};

use dalgu_proto::ids::{BackupId, VmId};

use crate::{
    model::{BackupRecord, BackupState},
    state::State,
};

/// Backups of one VM.
pub const MAX_OF_VM: usize = 400;
/// Backups of a site.
pub const MAX_BACKUPS: usize = 10_000;
/// Schedules of a site.
pub const MAX_SCHEDULES: usize = 1000;
/// Backups in a chain; then everything is copied again.
pub const MAX_CHAIN: usize = 32;

/// Backups of a VM, oldest first.
pub fn of_vm(state: &State, vm: VmId) -> impl DoubleEndedIterator<Item = &Arc<BackupRecord>> {
    let ids = state.vm_backups.get(&vm).into_iter().flatten();
    let found: Vec<_> = ids.filter_map(|id| state.backups.get(id)).collect();
    found.into_iter()
}

/// The backup of a VM that is being taken, or is to be.
pub fn under_way(state: &State, vm: VmId) -> Option<&Arc<BackupRecord>> {
    of_vm(state, vm).find(|backup| backup.is_under_way())
}

/// A backup and those that it needs, itself first.
pub fn chain(state: &State, id: BackupId) -> Vec<BackupId> {
    let (mut found, mut next) = (Vec::new(), Some(id));
    while let Some(id) = next.take().filter(|id| !found.contains(id)) {
        found.push(id);
        next = state.backups.get(&id).and_then(|backup| backup.parent);
    }
    found
}

/// Those that need a backup, at whatever distance; those that may come to need it among them.
pub fn descendants(state: &State, id: BackupId) -> BTreeSet<BackupId> {
    let Some(backup) = state.backups.get(&id) else {
        return BTreeSet::new();
    };
    let others = of_vm(state, backup.vm).filter(|other| other.id != id && other.state != BackupState::Failed);
    let needing = others.filter(|other| chain(state, other.id).contains(&id));
    needing.map(|other| other.id).collect()
}

/// The backup that a new one of a VM may begin from: the newest that left a checkpoint, in the same pool.
pub fn parent(state: &State, vm: VmId, pool: &str) -> Option<BackupId> {
    let newest = of_vm(state, vm)
        .rev()
        .find(|backup| backup.state == BackupState::Available && backup.checkpoint)?;
    let fits = newest.pool == pool && chain(state, newest.id).len() < MAX_CHAIN;
    fits.then_some(newest.id)
}
