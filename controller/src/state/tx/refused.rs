//! Placements that were refused.

use std::sync::Arc;

use dalgu_proto::ids::VmName;

use super::{Table, Tx, json};
use crate::model::RefusedPlacement;

/// Most of them that are kept, the latest: what names are asked for is up to the callers.
pub const REFUSED_KEPT: usize = 1000;

impl Tx {
    pub(in crate::state) fn index_refused_placement(&mut self, refused: Arc<RefusedPlacement>) {
        self.state.refused_placements.insert(refused.vm.clone(), refused);
    }

    /// Keeps why a placement was refused, in the place of what was kept under that name.
    pub fn put_refused_placement(&mut self, refused: RefusedPlacement) {
        self.write(Table::RefusedPlacements, &refused.vm, Some(json(&refused)));
        self.index_refused_placement(Arc::new(refused));
        while self.state.refused_placements.len() > REFUSED_KEPT {
            let all = self.state.refused_placements.values();
            let Some(oldest) = all.min_by_key(|known| known.time).map(|known| known.vm.clone()) else {
                return;
            };
            self.forget_refused_placement(&oldest);
        }
    }

    /// Forgets it: one has succeeded, or the VM is gone.
    pub fn forget_refused_placement(&mut self, vm: &VmName) {
        if self.state.refused_placements.remove(vm).is_some() {
            self.write(Table::RefusedPlacements, vm, None);
        }
    }
}
