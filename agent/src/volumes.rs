//! Which volumes of the site VMs of this host have, and the service that deletes one which none has.
//!
//! A VM's task notes its volumes here before they are written to the ledger, and forgets them after; [`server`] asks before
//! a file goes. The controller asks for a deletion only of a volume that no VM may have any more, and never takes that back; here it
//! is checked against what this host was told, in case the controller's store is an old one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dalgu_proto::ids::{VmId, VolumeId};

pub mod server;

#[cfg(test)]
mod tests;

type Held = BTreeMap<VmId, BTreeSet<VolumeId>>;

/// See the module's documentation. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Volumes(Arc<Mutex<Held>>);

impl Volumes {
    fn held(&self) -> MutexGuard<'_, Held> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM has these volumes, or will; no others, when that is written down in `full`.
    pub fn hold(&self, vm: VmId, volumes: impl IntoIterator<Item = VolumeId>, full: bool) {
        let mut all = self.held();
        let held = all.entry(vm).or_default();
        if full {
            held.clear();
        }
        held.extend(volumes);
        if held.is_empty() {
            all.remove(&vm);
        }
    }

    /// A VM other than `but` that has a volume.
    pub fn holder(&self, volume: VolumeId, but: Option<VmId>) -> Option<VmId> {
        let held = self.held();
        let mut holders = held
            .iter()
            .filter(|(vm, held)| Some(**vm) != but && held.contains(&volume));
        holders.next().map(|(vm, _)| *vm)
    }
}
