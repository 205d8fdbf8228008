//! What must hold of the objects of the site beside its VMs: volumes, what VMs have of networks, images,
//! snapshots and backups.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_agent::{
    hypervisor::sim::Written,
    images::copy_name,
    network::{Plugged, names, plugged},
};
use dalgu_controller::{
    backups,
    model::{BackupState, VolumeRecord},
    state::State,
    volumes::{holder, pinned_to},
};
use dalgu_proto::{
    ids::{BackupId, HostName, VmId, VolumeId},
    image::Digest,
    network::{Direction, Protocol, Rule},
    snapshot::Revert,
    vm::Disk,
};
use jiff::Timestamp;

use super::{Checker, Violation};
use crate::fleet::objects::wires::Kernel;

/// What a host has of the site's objects, seen without asking it.
#[derive(Debug, Clone, Default)]
pub struct Holdings {
    /// Files of volumes, with their pools.
    pub volumes: Vec<(VolumeId, String)>,
    /// What its kernel has of networks.
    pub kernel: Kernel,
    /// Layers of disks, and of how many files are left.
    pub layers: Vec<(VmId, Vec<u32>, usize)>,
    /// Backups.
    pub backups: Vec<BackupId>,
    /// Files of its store of images.
    pub images: Vec<String>,
}

/// What was seen of them so far.
#[derive(Debug, Default)]
pub struct Objects {
    /// Records of volumes as they were last.
    volumes: BTreeMap<VolumeId, VolumeRecord>,
    /// Volumes that have ever been stored.
    stored: BTreeSet<VolumeId>,
    /// Volumes that a client was told of.
    acknowledged: BTreeSet<VolumeId>,
    /// Volumes by name that somebody asked to delete.
    deleted: BTreeSet<String>,
    /// Volumes whose hosts were forgotten, and their files with them.
    left: BTreeSet<VolumeId>,
    /// Backups whose hosts were forgotten: what is there stays there, as the event says.
    left_backups: BTreeSet<BackupId>,
    /// What was seen of the contents of each.
    contents: BTreeMap<VolumeId, Contents>,
    /// What was last seen of each VM's disks.
    disks: BTreeMap<VmId, Disks>,
}

/// What was seen of a volume.
#[derive(Debug, Default)]
struct Contents {
    disk: Disks,
    /// When it was last written to.
    stamp: Option<u64>,
    /// The VM that has it, whose layers it has.
    vm: Option<VmId>,
}

impl Contents {
    /// A VM has it. What another did with layers of it is over.
    fn is_of(&mut self, vm: VmId, back: Option<Revert>) {
        if self.vm.replace(vm) != Some(vm) {
            self.disk.layers.clear();
            self.disk.hold.append(&mut self.disk.held);
            self.disk.back = back;
        }
    }
}

/// What was seen of a VM's disks, or follows from what was asked while it was off.
#[derive(Debug)]
struct Disks {
    /// What they may hold.
    hold: BTreeSet<u64>,
    /// What they may have held before they were last asked to go back, until its guest runs again.
    held: BTreeSet<u64>,
    /// Their layers, and what each may have begun on.
    layers: BTreeMap<u32, BTreeSet<u64>>,
    /// The last going back, as it is stored.
    back: Option<Revert>,
}

impl Default for Disks {
    /// They begin with what they are made from, and nobody has written to that.
    fn default() -> Self {
        Self {
            hold: BTreeSet::from([0]),
            held: BTreeSet::new(),
            layers: BTreeMap::new(),
            back: None,
        }
    }
}

impl Disks {
    /// What was stored of going back. It is asked of VMs that are off, and done before they run again, unless it is given up
    /// with its snapshot; that layer may have been merged when the guest is seen again.
    fn stored(&mut self, back: Option<Revert>) {
        if self.back == back {
            return;
        }
        self.back = back;
        let Some(back) = back else {
            self.hold.append(&mut self.held);
            return;
        };
        // A layer that no guest was seen with was made on what the disks hold now.
        let begin = self.layers.get(&back.replaces).unwrap_or(&self.hold).clone();
        self.held = std::mem::replace(&mut self.hold, begin.clone());
        self.layers.insert(back.number, begin);
    }

    /// Its guest has found this, and written something else.
    fn written(&mut self, layers: &[u32], found: u64, stamp: u64) {
        for number in layers {
            let begin = || BTreeSet::from([found]);
            self.layers.entry(*number).or_insert_with(begin);
        }
        self.hold = BTreeSet::from([stamp]);
        self.held.clear();
    }
}

/// Interfaces of the guests that run on a host.
pub type Ports = Vec<(VmId, Plugged)>;

impl Checker {
    /// A client is about to ask for the deletion of a volume.
    pub fn deletes_volume(&mut self, name: String) {
        self.objects.deleted.insert(name);
    }

    /// A client was told of a volume.
    pub fn acknowledge_volume(&mut self, volume: VolumeId) {
        self.objects.acknowledged.insert(volume);
    }

    /// What was stored of volumes; `latest` is the latest time that the controller's clock has shown.
    pub fn volumes_stored(&mut self, state: &State, latest: Timestamp) {
        let now: BTreeMap<_, _> = state
            .volumes
            .values()
            .map(|volume| (volume.id, (**volume).clone()))
            .collect();
        if now == self.objects.volumes {
            return;
        }
        self.objects.stored.extend(now.keys());
        let before = std::mem::replace(&mut self.objects.volumes, now);
        for volume in state.volumes.values() {
            self.volume(state, before.get(&volume.id), volume, latest);
        }
        for old in before.values() {
            if self.objects.volumes.contains_key(&old.id) {
                continue;
            }
            self.check("I2 no volume is lost", old.delete_time.is_some(), || {
                format!("volume {} is forgotten, and was not deleted", old.name)
            });
            if !old.purging && old.host.is_some() {
                self.objects.left.insert(old.id);
            }
        }
    }

    fn volume(
        &mut self,
        state: &State,
        before: Option<&VolumeRecord>,
        volume: &VolumeRecord,
        latest: Timestamp,
    ) {
        let was = |what: fn(&VolumeRecord) -> bool| before.is_some_and(what);
        let kept = !was(|old| old.made) || volume.made;
        self.check("I2 no volume is lost", kept, || {
            format!("volume {} was made, and may be made anew", volume.name)
        });
        if volume.delete_time.is_some() && !was(|old| old.delete_time.is_some()) {
            let asked = self.objects.deleted.contains(volume.name.as_str());
            self.check("I7 nothing is done that nobody asked for", asked, || {
                format!("volume {} is deleted, and nobody asked for that", volume.name)
            });
        }
        if volume.purging {
            let over = volume.purge_time.is_some_and(|time| time <= latest);
            let free = holder(state, volume.id).is_none();
            self.check("I2 a deleted volume has its grace", over && free, || {
                format!("volume {} is removed at {latest}: {volume:?}", volume.name)
            });
        }
        let stays = volume.purging || !was(|old| old.purging);
        self.check("I2 a deleted volume has its grace", stays, || {
            format!("the removal of volume {} was taken back", volume.name)
        });
    }

    /// The file of a volume is about to be removed from a host.
    pub fn purges(&mut self, state: &State, host: &HostName, id: VolumeId) {
        let known = state.volumes.values().find(|volume| volume.id == id);
        let stays = known.is_some_and(|volume| {
            !volume.purging && volume.made && pinned_to(state, volume).is_some_and(|own| own == host)
        });
        self.check("I2 no volume is lost", !stays, || {
            format!("{host} removes the file of volume {known:?}")
        });
    }

    /// I1, I2: guests have written to their volumes; who on which host found what there.
    pub fn written(&mut self, stamp: u64, found: &[(usize, Written)]) {
        for (host, written) in found {
            let (vm, volume) = (written.vm, written.volume);
            let known = self.objects.contents.entry(volume).or_default();
            if known.stamp.replace(stamp) == Some(stamp) {
                self.check("I1 one writer of a volume", false, || {
                    format!("volume {volume} has VM {vm} on h{} besides another", host + 1)
                });
                continue;
            }
            let fine = written
                .before
                .is_some_and(|before| known.disk.hold.contains(&before));
            let said = (!fine).then(|| format!("{known:?}"));
            known
                .disk
                .written(&written.layers, written.before.unwrap_or(0), stamp);
            self.check("I1 one writer of a volume", true, String::new);
            self.check("I2 a volume holds what was written", fine, || {
                format!(
                    "VM {vm} on h{} finds {written:?}, and it was {}",
                    host + 1,
                    said.unwrap_or_default()
                )
            });
        }
    }

    /// I2, I16: guests have written to their own disks, which have these layers; what they found there.
    pub fn disks_written(&mut self, stamp: u64, found: &[(VmId, Vec<u32>, u64)]) {
        for (vm, layers, before) in found {
            let known = self.objects.disks.entry(*vm).or_default();
            let fine = known.hold.contains(before);
            let said = (!fine).then(|| format!("{known:?}"));
            known.written(layers, *before, stamp);
            self.check("I16 disks hold what was written", fine, || {
                format!(
                    "the disks of VM {vm} hold {before} with the layers {layers:?}, and were {}",
                    said.unwrap_or_default()
                )
            });
        }
    }

    /// I4: the images that files of a host hold the difference to are in its store, whole.
    pub fn backed(&mut self, host: usize, bases: &[Digest], images: &[String]) {
        for base in bases {
            self.check(
                "I16 no image goes that a disk needs",
                images.contains(&copy_name(base)),
                || {
                    format!(
                        "h{} has a disk made from {base}, and of images {images:?}",
                        host + 1
                    )
                },
            );
        }
    }

    /// What was stored of snapshots and backups: a VM that is backed up stays where it is, and keeps its layers.
    pub fn copies_stored(&mut self, state: &State) {
        let backups = state.backups.values();
        let left = backups.filter(|backup| !state.hosts.contains_key(&backup.host));
        self.objects.left_backups.extend(left.map(|backup| backup.id));
        for vm in state.vms.values() {
            let disks = self.objects.disks.entry(vm.id).or_default();
            disks.stored(vm.snapshots.revert);
            let volumes = vm.spec.disks.iter().filter_map(Disk::volume_id);
            for volume in volumes {
                let known = self.objects.contents.entry(volume).or_default();
                known.is_of(vm.id, vm.snapshots.revert);
                known.disk.stored(vm.snapshots.revert);
            }
            let backed_up = backups::under_way(state, vm.id).is_some();
            let moves = state.active_migration(vm.id).is_some();
            let layered = vm.snapshots.all.iter().any(|one| one.deleting || !one.taken);
            let alone = usize::from(backed_up) + usize::from(moves) + usize::from(layered) <= 1;
            self.check("I16 copies and moves exclude each other", alone, || {
                format!(
                    "{}: backed up: {backed_up}, moved: {moves}, snapshots under way: {layered}",
                    vm.name
                )
            });
        }
    }

    /// At rest: each VM has the layers of its snapshots, each backup that is whole is there, and nothing else is.
    fn copies_at_rest(&self, state: &State, hosts: &[(HostName, Holdings)]) -> Result<(), Violation> {
        let wrong = |invariant, what: String| Err(Violation { invariant, what });
        for (host, holdings) in hosts {
            for (id, layers, spare) in &holdings.layers {
                let owned = state.vms.get(id).filter(|vm| vm.owner == *host);
                let wanted = owned.map_or_else(Vec::new, |vm| {
                    vm.snapshots.all.iter().map(|one| one.layer).collect()
                });
                if *layers != wanted || *spare > 0 {
                    return wrong(
                        "I16 no half snapshot",
                        format!("{host}: VM {id} has layers {layers:?} and {spare} left, of {wanted:?}"),
                    );
                }
            }
            for id in &holdings.backups {
                let known = state.backups.get(id);
                let whole = known.is_some_and(|backup| backup.state == BackupState::Available);
                if !whole && !self.objects.left_backups.contains(id) {
                    return wrong(
                        "I4 nothing without an owner",
                        format!("{host} has backup {id}, which is {known:?}"),
                    );
                }
            }
            let whole: BTreeSet<_> = state
                .images
                .values()
                .filter_map(|image| Some(copy_name(&image.content.as_ref()?.digest)))
                .collect();
            if let Some(file) = holdings.images.iter().find(|file| !whole.contains(*file)) {
                return wrong(
                    "I4 nothing without an owner",
                    format!("{host} has {file} among its images"),
                );
            }
        }
        for backup in state.backups.values() {
            let there = hosts
                .iter()
                .any(|(host, holdings)| *host == backup.host && holdings.backups.contains(&backup.id));
            let fine = match backup.state {
                BackupState::Available => there,
                BackupState::Failed => !there,
                _ => false,
            };
            if !fine {
                return wrong("I16 no half backup", format!("there: {there}; {backup:?}"));
            }
        }
        Ok(())
    }

    /// I15: the rules of each interface of a guest that runs are there, and no other guest has its address.
    pub fn connected(&mut self, hosts: &[(Ports, &Kernel)]) {
        let mut addresses = BTreeMap::new();
        for (number, (ports, kernel)) in hosts.iter().enumerate() {
            for (vm, plugged) in ports {
                let bridge = names::bridge(&plugged.port.network);
                let made = kernel.bridges.contains(&bridge) && kernel.taps.contains(&plugged.tap);
                let own = plugged.port.addresses();
                let own: Vec<_> = own.map(|address| address.to_string()).collect();
                let shown = own.iter().all(|address| kernel.rules.contains(address.as_str()));
                self.check("I15 rules before the guest runs", made && shown, || {
                    format!(
                        "VM {vm} runs on h{} with {plugged:?}, and the kernel has {:?} and {:?}",
                        number + 1,
                        kernel.bridges,
                        kernel.taps
                    )
                });
                for address in own {
                    let place = (plugged.port.network.clone(), address);
                    let other = addresses.insert(place.clone(), *vm).filter(|other| other != vm);
                    self.check("I15 one holder of an address", other.is_none(), || {
                        format!("VM {vm} and VM {other:?} run with {place:?}")
                    });
                }
            }
        }
    }

    /// What was stored of addresses: each is given once, and what is counted is what VMs have.
    pub fn leases_stored(&mut self, state: &State) {
        let mut given = BTreeMap::new();
        for vm in state.vms.values() {
            for port in vm.spec.nics.iter().filter_map(|nic| nic.port()) {
                for address in port.addresses() {
                    let place = (port.network.clone(), address);
                    let other = given.insert(place.clone(), vm.name.clone());
                    self.check("I15 one holder of an address", other.is_none(), || {
                        format!("VM {} and VM {other:?} are given {place:?}", vm.name)
                    });
                }
            }
        }
        let members = state.members.iter();
        let held: usize = members.map(|(_, members)| members.addresses.len()).sum();
        self.check("I15 one holder of an address", held == given.len(), || {
            format!("{held} addresses are held, and VMs have {}", given.len())
        });
    }

    /// At rest: a host's kernel has the interfaces of its VMs and no others, with the rules that their groups have now.
    fn kernel_at_rest(state: &State, host: &HostName, kernel: &Kernel) -> Result<(), Violation> {
        let mine = state.vms.values().filter(|vm| vm.owner == *host);
        let ports = mine.flat_map(|vm| plugged(vm.id, &vm.spec).collect::<Vec<_>>());
        let ports: Vec<_> = ports.collect();
        let taps: BTreeSet<_> = ports.iter().map(|plugged| plugged.tap.clone()).collect();
        let bridges: BTreeSet<_> = ports
            .iter()
            .map(|plugged| names::bridge(&plugged.port.network))
            .collect();
        if (&taps, &bridges) != (&kernel.taps, &kernel.bridges) {
            return Err(Violation {
                invariant: "I4 nothing without an owner",
                what: format!(
                    "{host} has rules for {:?} on {:?}, its VMs have {taps:?} on {bridges:?}",
                    kernel.taps, kernel.bridges
                ),
            });
        }
        let wrong = |what| {
            let invariant = "I3 desired is actual";
            Err(Violation { invariant, what })
        };
        for plugged in &ports {
            let groups = plugged
                .port
                .groups
                .iter()
                .filter_map(|group| state.groups.get(group));
            let rules = groups.flat_map(|group| &group.group.rules);
            let wanted: BTreeSet<_> = rules.filter_map(first_port).collect();
            let open = kernel.open.get(&plugged.tap).cloned().unwrap_or_default();
            if wanted != open {
                return wrong(format!(
                    "{host} lets {open:?} in at {plugged:?}, its groups say {wanted:?}"
                ));
            }
        }
        let served = |plugged: &&Plugged| {
            let network = state.networks.get(&plugged.port.network);
            network.is_some_and(|network| network.network.subnets().any(|subnet| subnet.dhcp))
        };
        let macs = ports.iter().filter(served).map(|plugged| plugged.mac.as_str());
        let macs: BTreeSet<_> = macs.collect();
        let leases = &kernel.leases;
        let leased: BTreeSet<_> = leases.iter().filter_map(|line| line.split(',').next()).collect();
        if macs != leased {
            return wrong(format!("{host} serves {leases:?}, its VMs have {macs:?}"));
        }
        let addresses = ports
            .iter()
            .filter(served)
            .flat_map(|plugged| plugged.port.addresses());
        let mut unserved = addresses.filter(|address| {
            let address = address.to_string();
            !leases.iter().any(|line| line.contains(&address))
        });
        match unserved.next() {
            Some(address) => wrong(format!("{host} serves {leases:?}, and not {address}")),
            None => Ok(()),
        }
    }

    /// At rest: each volume's file is where its record says, and there is no other.
    ///
    /// # Errors
    /// Says what is not so.
    pub fn objects_at_rest(
        &mut self,
        state: &State,
        hosts: &[(HostName, Holdings)],
    ) -> Result<(), Violation> {
        let wrong = |invariant, what: String| Err(Violation { invariant, what });
        self.check("I4 nothing without an owner", true, String::new);
        let objects = &self.objects;
        let there = |id: VolumeId| {
            let has = hosts.iter().flat_map(|(host, holdings)| {
                let files = holdings.volumes.iter().filter(move |(file, _)| *file == id);
                files.map(move |(_, pool)| (host.clone(), pool.clone()))
            });
            has.collect::<Vec<_>>()
        };
        for volume in state.volumes.values() {
            let there = there(volume.id);
            let place = |host: &HostName| (host.clone(), volume.pool.clone());
            let wanted: Vec<_> = volume.host.iter().map(place).collect();
            let fine = match volume.made {
                true => there == wanted,
                false => there.is_empty() || there == wanted,
            };
            if !fine {
                let invariant = if there.is_empty() {
                    "I2 no volume is lost"
                } else {
                    "I4 nothing without an owner"
                };
                return wrong(invariant, format!("{volume:?} has its file on {there:?}"));
            }
        }
        let known = |id: &VolumeId| state.volumes.values().any(|volume| volume.id == *id);
        let mut files = hosts
            .iter()
            .flat_map(|(host, holdings)| holdings.volumes.iter().map(move |(id, _)| (host, id)));
        if let Some((host, id)) = files.find(|(_, id)| !known(id) && !objects.left.contains(id)) {
            return wrong(
                "I4 nothing without an owner",
                format!("{host} has a file of volume {id}, which nobody knows"),
            );
        }
        let lost = objects
            .acknowledged
            .iter()
            .find(|id| !objects.stored.contains(id));
        if let Some(id) = lost {
            return wrong("I2 no volume is lost", format!("volume {id} was never there"));
        }
        hosts
            .iter()
            .try_for_each(|(host, holdings)| Self::kernel_at_rest(state, host, &holdings.kernel))?;
        self.copies_at_rest(state, hosts)
    }
}

/// The first TCP port that a rule lets in.
fn first_port(rule: &Rule) -> Option<u16> {
    match rule.protocol {
        Protocol::Tcp(Some((first, _))) if rule.direction == Direction::Ingress => Some(first),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid(number: u128) -> uuid::Uuid {
        uuid::Uuid::from_u128(number)
    }

    fn back(number: u32, replaces: u32) -> Option<Revert> {
        Some(Revert { number, replaces })
    }

    /// A guest that wrote 7, had a snapshot made, and wrote 9.
    fn disks() -> Disks {
        let mut disks = Disks::default();
        disks.written(&[], 0, 7);
        disks.written(&[1], 7, 9);
        disks
    }

    #[test]
    fn disks_that_went_back_hold_what_their_snapshot_held_although_its_layer_is_merged_already() {
        let mut disks = disks();
        disks.stored(back(2, 1));
        assert_eq!(disks.hold, BTreeSet::from([7]), "it goes back before it runs");
        // Once more, to a snapshot that no guest was seen with.
        disks.stored(back(3, 2));
        disks.stored(back(5, 4));
        assert_eq!(disks.hold, BTreeSet::from([7]));
        disks.written(&[], 7, 11);
        disks.stored(None);
        assert_eq!(disks.hold, BTreeSet::from([11]), "what was is over");
    }

    #[test]
    fn a_volume_of_another_vm_has_no_layers_of_the_one_before() {
        let mut volume = Contents::default();
        let (one, other) = (VmId::from_uuid(uuid(1)), VmId::from_uuid(uuid(2)));
        volume.is_of(one, None);
        volume.disk.written(&[1], 0, 5);
        volume.is_of(other, back(2, 1));
        volume.disk.stored(back(2, 1));
        assert_eq!(volume.disk.hold, BTreeSet::from([5]), "that was before it came");
        volume.disk.written(&[], 5, 6);
        volume.disk.stored(back(3, 1));
        assert_eq!(volume.disk.hold, BTreeSet::from([6]));
    }

    #[test]
    fn of_going_back_that_is_given_up_nobody_knows_whether_it_was_done() {
        let mut disks = disks();
        disks.stored(back(2, 1));
        disks.stored(None);
        assert_eq!(disks.hold, BTreeSet::from([7, 9]));
    }
}
