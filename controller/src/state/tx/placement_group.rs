//! Changes of placement groups, and who is in them.

use std::sync::Arc;

use dalgu_proto::ids::PlacementGroupName;

use super::{Table, Tx, json};
use crate::model::{PlacementGroupRecord, VmRecord};

impl Tx {
    pub(in crate::state) fn index_placement_group(&mut self, group: Arc<PlacementGroupRecord>) {
        let name = group.group.name.clone();
        self.state.placement_groups.insert(name, group);
    }

    /// Puts a placement group.
    pub fn put_placement_group(&mut self, mut group: PlacementGroupRecord) {
        group.revision = self.revision();
        self.write(Table::PlacementGroups, &group.group.name, Some(json(&group)));
        self.index_placement_group(Arc::new(group));
    }

    /// Removes a placement group. No VM may be in it.
    pub fn delete_placement_group(&mut self, name: &PlacementGroupName) {
        if self.state.placement_groups.remove(name).is_some() {
            self.write(Table::PlacementGroups, name, None);
        }
    }

    /// Keeps right who is in which group, when a VM changes. `None` is before it is there, or when it is gone.
    pub(super) fn move_members(&mut self, old: Option<&VmRecord>, new: Option<&VmRecord>) {
        let groups = |vm: &VmRecord| {
            let id = vm.id;
            let names: Vec<_> = vm.placement_groups.iter().cloned().collect();
            names.into_iter().map(move |name| (id, name))
        };
        for (id, name) in old.into_iter().flat_map(groups) {
            let Some(members) = self.state.placement_members.get_mut(&name) else {
                continue;
            };
            members.remove(&id);
            if members.is_empty() {
                self.state.placement_members.remove(&name);
            }
        }
        for (id, name) in new.into_iter().flat_map(groups) {
            self.state.placement_members.entry(name).or_default().insert(id);
        }
    }
}
