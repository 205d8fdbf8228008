//! Changes of volumes: their records, who has them, and the room of those that nobody has.
//!
//! What a VM has takes room with the VM, on each host that holds it. A volume that was made and that no VM has keeps its room where its
//! file is. A VM's record decides where its volumes are, and how large: [`Tx::put_vm`] brings their records along.

use std::{collections::BTreeMap, sync::Arc};

use dalgu_proto::{
    ids::{VolumeId, VolumeName},
    vm::{Disk, VolumeRef},
};

use super::{Table, Tx, json};
use crate::{
    model::{EventKind, VmRecord, VolumeRecord},
    volumes::left_in,
};

/// The volumes that a VM has, or has not let go of yet.
fn volumes(vm: Option<&VmRecord>) -> BTreeMap<VolumeId, (VolumeName, String)> {
    let Some(vm) = vm else { return BTreeMap::new() };
    let left_out = vm.change.iter().flat_map(|change| &change.left_out);
    let of_disk = |disk: &Disk| {
        let VolumeRef { name, id, .. } = disk.volume.clone()?;
        Some((id?, (name, disk.name.clone())))
    };
    vm.spec.disks.iter().chain(left_out).filter_map(of_disk).collect()
}

impl Tx {
    pub(in crate::state) fn index_volume(&mut self, volume: Arc<VolumeRecord>) {
        self.unindex_volume(&volume.name);
        self.hold_volume(&volume, true);
        if let Some(digest) = &volume.digest {
            let named = self.state.image_volumes.entry(digest.clone()).or_default();
            named.insert(volume.name.clone());
        }
        if volume.delete_time.is_some() {
            self.state.deleted_volumes.insert(volume.name.clone());
        }
        self.state.volumes.insert(volume.name.clone(), volume);
    }

    fn unindex_volume(&mut self, name: &VolumeName) {
        let Some(old) = self.state.volumes.remove(name) else {
            return;
        };
        self.hold_volume(&old, false);
        self.state.deleted_volumes.remove(name);
        if let Some(digest) = &old.digest
            && let Some(named) = self.state.image_volumes.get_mut(digest)
        {
            named.remove(name);
            if named.is_empty() {
                self.state.image_volumes.remove(digest);
            }
        }
    }

    /// Puts a volume.
    pub fn put_volume(&mut self, mut volume: VolumeRecord) {
        volume.revision = self.revision();
        self.write(Table::Volumes, &volume.name, Some(json(&volume)));
        self.index_volume(Arc::new(volume));
    }

    /// Forgets a volume. No VM may have it.
    pub fn delete_volume(&mut self, name: &VolumeName) {
        if self.state.volumes.contains_key(name) {
            self.unindex_volume(name);
            self.write(Table::Volumes, name, None);
            // An image may have waited for it.
            self.touch_images();
        }
    }

    /// Tells of a change of a volume.
    pub fn volume_event(&mut self, volume: &VolumeName, reason: &str, message: impl Into<String>) {
        self.event(EventKind::Volume, reason, volume, message, None);
    }

    /// Counts the room of a volume that no VM has where its file is, or no more.
    fn hold_volume(&mut self, volume: &VolumeRecord, add: bool) {
        let Some(host) = volume
            .host
            .clone()
            .filter(|_| !self.state.volume_vms.contains_key(&volume.id))
        else {
            return;
        };
        self.fleet.get_mut().mark(&host);
        let reserved = self.state.reserved.entry(host).or_default();
        let sums = [
            reserved.disks_mib.entry(volume.pool.clone()).or_insert(0),
            self.state.pools_mib.entry(volume.pool.clone()).or_insert(0),
        ];
        for sum in sums {
            *sum = match add {
                true => sum.saturating_add(volume.size_mib),
                false => sum.saturating_sub(volume.size_mib),
            };
        }
    }

    /// Keeps right who has which volume, when a VM changes. `None` is before it is there, or when it is gone.
    pub(super) fn move_volumes(&mut self, old: Option<&VmRecord>, new: Option<&VmRecord>) {
        let (before, after) = (volumes(old), volumes(new));
        if before.is_empty() && after.is_empty() {
            return;
        }
        let vm = new.or(old).map(|vm| vm.id);
        for (id, (name, _)) in &after {
            let first = !self.state.volume_vms.contains_key(id);
            self.recount(*id, name, first, false);
            self.state.volume_vms.entry(*id).or_default().extend(vm);
        }
        for (id, (name, _)) in before.iter().filter(|(id, _)| !after.contains_key(id)) {
            let Some(holders) = self.state.volume_vms.get_mut(id) else {
                continue;
            };
            vm.map(|vm| holders.remove(&vm));
            let last = holders.is_empty();
            if last {
                self.state.volume_vms.remove(id);
            }
            self.recount(*id, name, last, true);
        }
    }

    fn recount(&mut self, id: VolumeId, name: &VolumeName, changes: bool, add: bool) {
        let known = self
            .state
            .volumes
            .get(name)
            .filter(|known| known.id == id && changes);
        if let Some(known) = known.cloned() {
            self.hold_volume(&known, add);
        }
    }

    /// Brings the records of a VM's volumes along: where they are, how large, whether they are made; and tells of those that came and
    /// went. One that the store does not know was made since a backup was taken: it is taken over as the VM has it.
    pub(super) fn follow_vm(&mut self, old: Option<&VmRecord>, new: &VmRecord) {
        for disk in new.spec.disks.iter().filter(|disk| disk.volume.is_some()) {
            self.follow_disk(new, disk);
        }
        let (before, after) = (volumes(old), volumes(Some(new)));
        let came = after.iter().filter(|(id, _)| !before.contains_key(id));
        for (_, (name, disk)) in came {
            let message = format!("attached to VM {} as {disk}, on {}", new.name, new.owner);
            self.volume_event(name, "VolumeAttached", message);
        }
        let went = before.iter().filter(|(id, _)| !after.contains_key(id));
        for (_, (name, _)) in went {
            let message = format!("VM {} has let go of it", new.name);
            self.volume_event(name, "VolumeDetached", message);
        }
    }

    /// Tells of the volumes that a VM leaves behind.
    pub(super) fn leave_volumes(&mut self, vm: &VmRecord) {
        for (name, _) in volumes(Some(vm)).into_values() {
            let message = format!("VM {} is gone; it stays on {}", vm.name, vm.owner);
            self.volume_event(&name, "VolumeDetached", message);
        }
    }

    fn follow_disk(&mut self, vm: &VmRecord, disk: &Disk) {
        let Some(VolumeRef {
            name, id: Some(id), ..
        }) = disk.volume.clone()
        else {
            return;
        };
        let made = !vm.new_volumes.contains(&disk.name);
        let may_be_in = |pool: &str| left_in(vm, disk).any(|old| old == pool);
        let known = self.state.volumes.get(&name).cloned();
        let Some(known) = known else {
            self.volume_event(&name, "VolumeTakenOver", format!("as VM {} has it", vm.name));
            return self.put_volume(VolumeRecord {
                id,
                name,
                size_mib: disk.size_mib,
                pool: left_in(vm, disk).next().unwrap_or(&disk.pool).to_owned(),
                format: disk.format,
                image: disk.image.clone(),
                digest: disk.digest.clone(),
                clone_mode: disk.clone_mode,
                firmware: match vm.spec.disks.first() {
                    Some(first) if first.name == disk.name => vm.spec.firmware,
                    _ => Default::default(),
                },
                labels: BTreeMap::new(),
                description: String::new(),
                host: Some(vm.owner.clone()),
                made,
                create_time: self.now(),
                delete_time: None,
                purge_time: None,
                purging: false,
                revision: 0,
            });
        };
        let now = VolumeRecord {
            size_mib: known.size_mib.max(disk.size_mib),
            // Until its host says that it has moved, it is where it was.
            pool: match may_be_in(&known.pool) {
                true => known.pool.clone(),
                false => disk.pool.clone(),
            },
            clone_mode: disk.clone_mode,
            host: Some(vm.owner.clone()),
            made: known.made || made,
            // After a restore it may have been taken back, and attached.
            delete_time: None,
            purge_time: None,
            purging: false,
            ..(*known).clone()
        };
        if known.id == id && now != *known {
            if now.pool != known.pool {
                let message = format!("from pool {} to {}, on {}", known.pool, now.pool, vm.owner);
                self.volume_event(&name, "VolumeMoved", message);
            }
            self.put_volume(now);
        }
    }
}
