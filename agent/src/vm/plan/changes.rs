//! What is to be done next so that a domain gets the hardware that its intent says, and what it cannot get while it runs. Pure.
//!
//! ```text
//!   volumes of added disks ──> definition ──> live, one at a time: grow, limit, processors, memory, attach, detach, move ──> delete
//! ```
//!
//! A disk that is to be in another pool is copied by the hypervisor, which may take hours: a VM whose disks are only copied is settled, so
//! that nothing waits for that, and is looked at more often ([`copying`]). That a move failed is told, and tried again some time later.
//!
//! The definition says what the next start brings, so a domain that is off has its changes when it is defined; of one that
//! runs, that is what [`pending`] tells of. A disk's file goes when neither the domain nor its definition has the disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dalgu_proto::vm::{Disk, DiskLimits, Spec};

use super::{Memory, Step};
use crate::{
    hypervisor::{Attached, Change, Domain, DomainState, Hardware},
    ledger::{Intent, Vm},
};

/// A change that the guest has not gone along with is asked for again after this time.
pub const AGAIN: Duration = Duration::from_secs(20);
/// A move of a disk that failed more than once is tried again after this time: it reads and writes all of the disk.
pub const MOVE_AGAIN: Duration = Duration::from_mins(5);
/// A move that was begun shows as a copy, or has failed, after this time.
const MOVE_SHOWS: Duration = Duration::from_secs(1);
/// Memory is changed in pieces of this size, in MiB: a difference of less is none.
pub const GRAIN_MIB: u64 = 2;

/// A part of the specification that the running VM does not have yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Path below the specification.
    pub field: String,
    /// What the VM has.
    pub current: String,
    /// What it gets.
    pub wanted: String,
    /// What it waits for, for people.
    pub message: String,
}

/// A move of a disk that has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedMove {
    /// Why, for people.
    pub message: String,
    /// How long ago.
    pub ago: Duration,
    /// How often it has failed since the VM's host was told of it.
    pub times: u32,
}

impl FailedMove {
    /// After how long it is tried again. The first failure may be of what happened meanwhile: libvirt that died when it had just asked QEMU
    /// for a copy has lost account of that, and its next one fails by what was left.
    const fn again(&self) -> Duration {
        if self.times > 1 { MOVE_AGAIN } else { AGAIN }
    }
}

/// The next step of the changes under way; `None` when there is nothing to do now.
pub(super) fn next(vm: &Vm, intent: &Intent, domain: &Domain, memory: &Memory) -> Option<Step> {
    if !vm.changes.under_way {
        return None;
    }
    let Some(hardware) = &memory.hardware else {
        return Some(Step::Look);
    };
    if !memory.volumes_ready {
        return Some(Step::CreateVolumes);
    }
    if vm.done.defined != Some(intent.epoch) {
        return Some(Step::Define);
    }
    let tried = |change: &Change| {
        let mut tried = memory.tried.iter();
        let again = match change {
            Change::MoveDisk(_) => MOVE_SHOWS,
            _ => AGAIN,
        };
        tried.any(|(other, ago)| other == change && *ago < again)
    };
    let mut all = wanted(vm, &intent.spec, hardware, alive(domain));
    if let Some(change) = all.find(|change| !tried(change)) {
        return Some(Step::Change(change));
    }
    let mut copies = copies(&intent.spec, hardware, memory);
    if let Some(change) = copies.find(|change| !tried(change)) {
        return Some(Step::Change(change));
    }
    let gone = |disk: &&Disk| match hardware.disks.get(&disk.name) {
        Some(attached) => attached.pool.is_some() && !attached.is_in(&disk.pool),
        // Of a disk that moves the old file goes only when the domain is seen to have the new one.
        None => !intent.spec.disks.iter().any(|kept| kept.name == disk.name),
    };
    if let Some(disk) = vm.changes.removed.iter().find(gone) {
        return Some(Step::DeleteVolume(Box::new(disk.clone())));
    }
    let rest =
        !vm.changes.removed.is_empty() || !pending(vm, hardware, domain, &memory.failed_moves).is_empty();
    (!rest).then_some(Step::ChangesDone)
}

const fn alive(domain: &Domain) -> bool {
    matches!(domain.state, DomainState::Running | DomainState::Paused)
}

fn same_memory(one: u64, other: u64) -> bool {
    one.abs_diff(other) < GRAIN_MIB
}

fn attached<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a Disk> {
    let there = |disk: &&Disk| hardware.disks.contains_key(&disk.name);
    spec.disks.iter().filter(there)
}

fn limits_differ(disk: &Disk, hardware: &Hardware) -> bool {
    let attached = hardware.disks.get(&disk.name);
    attached.is_some_and(|attached| attached.limits != disk.limits)
}

fn missing_disks<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let names = spec.disks.iter().map(|disk| disk.name.as_str());
    names.filter(|name| !hardware.disks.contains_key(*name))
}

fn missing_nics<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let names = spec.nics.iter().map(|nic| nic.name.as_str());
    names.filter(|name| !hardware.nics.contains(*name))
}

/// Disks that are to go, and that the domain still has.
fn leaving_disks<'a>(vm: &'a Vm, spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let stays = |name: &str| spec.disks.iter().any(|disk| disk.name == name);
    let names: BTreeSet<_> = vm.changes.removed.iter().map(|disk| disk.name.as_str()).collect();
    names
        .into_iter()
        .filter(move |name| !stays(name) && hardware.disks.contains_key(*name))
}

/// Disks that are not where they are to be, or of which there is a copy.
fn astray<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = (&'a Disk, &'a Attached)> {
    let disks = spec.disks.iter();
    let disks = disks.filter_map(|disk| Some((disk, hardware.disks.get(&disk.name)?)));
    disks.filter(|(disk, attached)| {
        let elsewhere = |pool: &String| *pool != disk.pool;
        attached.copy.is_some() || attached.pool.as_ref().is_some_and(elsewhere)
    })
}

/// Whether a disk that was left out is a volume of the site that is to be in another pool: its old file is to go. One that was taken
/// away from the VM keeps its file.
pub fn moves(spec: &Spec, left_out: &Disk) -> bool {
    let id = left_out.volume_id();
    let mut disks = spec.disks.iter();
    id.is_some() && disks.any(|disk| disk.volume_id() == id && disk.pool != left_out.pool)
}

/// Moves of disks that can be gone on with now.
fn copies<'a>(spec: &'a Spec, hardware: &'a Hardware, memory: &'a Memory) -> impl Iterator<Item = Change> {
    let now = |(disk, attached): &(&Disk, &Attached)| match &attached.copy {
        Some(copy) => copy.ready || copy.pool.as_ref() != Some(&disk.pool),
        None => {
            let failed = memory.failed_moves.get(&disk.name);
            failed.is_none_or(|failed| failed.ago >= failed.again())
        }
    };
    let moves = astray(spec, hardware).filter(now);
    moves.map(|(disk, _)| Change::MoveDisk(disk.name.clone()))
}

/// Whether a disk is being copied, so that there is soon something to be seen.
pub fn copying(hardware: &Hardware) -> bool {
    hardware.disks.values().any(|attached| attached.copy.is_some())
}

fn leaving_nics<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let wanted = |name: &&str| !spec.nics.iter().any(|nic| nic.name == **name);
    hardware.nics.iter().map(String::as_str).filter(wanted)
}

/// Changes that can be asked for now, in the order in which that is done.
fn wanted<'a>(
    vm: &'a Vm,
    spec: &'a Spec,
    hardware: &'a Hardware,
    alive: bool,
) -> impl Iterator<Item = Change> {
    let small = |disk: &&Disk| {
        hardware
            .disks
            .get(&disk.name)
            .is_some_and(|attached| attached.size_mib < disk.size_mib && attached.copy.is_none())
    };
    let grow = attached(spec, hardware).filter(small);
    let grow = grow.map(|disk| Change::GrowDisk(disk.name.clone()));
    let limits = attached(spec, hardware).filter(|disk| limits_differ(disk, hardware));
    let limits = limits.map(|disk| Change::LimitDisk(disk.name.clone()));
    let reach = hardware.min_vcpus..=hardware.max_vcpus;
    let vcpus = hardware.vcpus != spec.vcpus && reach.contains(&spec.vcpus);
    let reach = hardware.min_memory_mib..=hardware.max_memory_mib;
    let memory = !same_memory(hardware.memory_mib, spec.memory_mib) && reach.contains(&spec.memory_mib);
    let size = [
        vcpus.then_some(Change::Vcpus(spec.vcpus)),
        memory.then_some(Change::MemoryMib(spec.memory_mib)),
    ];
    let disks = missing_disks(spec, hardware).map(|name| Change::AttachDisk(name.to_owned()));
    let nics = missing_nics(spec, hardware).map(|name| Change::AttachNic(name.to_owned()));
    let attach = disks.chain(nics).take(hardware.free_ports);
    let disks = leaving_disks(vm, spec, hardware).map(|name| Change::DetachDisk(name.to_owned()));
    let nics = leaving_nics(spec, hardware).map(|name| Change::DetachNic(name.to_owned()));
    let live = limits.chain(size.into_iter().flatten());
    let live = live.chain(attach).chain(disks).chain(nics);
    grow.chain(live.filter(move |_| alive))
}

/// Whether the domain lacks a disk, or has one that is to go: its files are not yet, or no more, what the specification says.
pub fn disks_differ(vm: &Vm, hardware: &Hardware) -> bool {
    let spec = vm.intent.as_ref().map(|intent| &intent.spec);
    let differ = |spec: &Spec| {
        missing_disks(spec, hardware).next().is_some() || astray(spec, hardware).next().is_some()
    };
    !vm.changes.removed.is_empty() || spec.is_some_and(differ)
}

/// What the domain, if it runs, does not have of its specification; and which disks are not in their pools yet.
pub fn pending(
    vm: &Vm,
    hardware: &Hardware,
    domain: &Domain,
    failed: &BTreeMap<String, FailedMove>,
) -> Vec<Pending> {
    let Some(spec) = vm.intent.as_ref().map(|intent| &intent.spec) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    if alive(domain) {
        pending_size(spec, hardware, &mut found);
        pending_devices(vm, spec, hardware, &mut found);
    }
    let moves = astray(spec, hardware).map(|(disk, attached)| pending_move(disk, attached, failed));
    found.extend(moves);
    // A volume may be taken away as soon as it has moved, and nobody would know then which of its files is the old one.
    let old = vm.changes.removed.iter().filter(|old| self::moves(spec, old));
    let old = old.filter(|old| !astray(spec, hardware).any(|(disk, _)| disk.name == old.name));
    found.extend(old.filter_map(|old| {
        let disk = spec.disks.iter().find(|disk| disk.name == old.name)?;
        let field = format!("disks[{}].pool", old.name);
        Some(told(&field, &old.pool, &disk.pool, OLD_FILE))
    }));
    found
}

const NEXT_START: &str = "it cannot be had without a restart: at the VM's next start";
const NOT_YET: &str =
    "the guest has not gone along yet; it is asked again, and the next start brings it in any case";
const NO_PORT: &str = "no port for another device is free: at the VM's next start";
const NIC_IN_USE: &str =
    "the guest has not let go of it; it is asked again, and it goes with the next stop in any case";
const DISK_IN_USE: &str = "DISK_IN_USE_BY_GUEST: the guest has not let go of it, unmount it there; it is asked again, and the \
     disk goes with the next stop in any case";
const OLD_FILE: &str = "its file in the old pool is about to be removed";
const COPIED: &str = "when the copy of the disk to another pool has ended";
const UNLIMITED: &str =
    "they could not be set yet; it is tried again, and the next start brings them in any case";

fn told(field: &str, current: impl ToString, wanted: impl ToString, message: &str) -> Pending {
    Pending {
        field: field.to_owned(),
        current: current.to_string(),
        wanted: wanted.to_string(),
        message: message.to_owned(),
    }
}

fn pending_size(spec: &Spec, hardware: &Hardware, found: &mut Vec<Pending>) {
    let within = |reachable: bool| if reachable { NOT_YET } else { NEXT_START };
    if hardware.vcpus != spec.vcpus {
        let reach = hardware.min_vcpus..=hardware.max_vcpus;
        let message = within(reach.contains(&spec.vcpus));
        found.push(told("vcpus", hardware.vcpus, spec.vcpus, message));
    }
    if spec.max_vcpus.is_some_and(|most| most != hardware.max_vcpus) {
        let (now, then) = (hardware.max_vcpus, spec.most_vcpus());
        found.push(told("max_vcpus", now, then, NEXT_START));
    }
    if !same_memory(hardware.memory_mib, spec.memory_mib) {
        let reach = hardware.min_memory_mib..=hardware.max_memory_mib;
        let message = within(reach.contains(&spec.memory_mib));
        found.push(told("memory_mib", hardware.memory_mib, spec.memory_mib, message));
    }
    let differs = |most: u64| hardware.hot_memory && !same_memory(most, hardware.max_memory_mib);
    if spec.max_memory_mib.is_some_and(differs) {
        let (now, then) = (hardware.max_memory_mib, spec.most_memory_mib());
        found.push(told("max_memory_mib", now, then, NEXT_START));
    }
}

fn pending_devices(vm: &Vm, spec: &Spec, hardware: &Hardware, found: &mut Vec<Pending>) {
    let (there, absent) = ("attached", "none");
    for disk in attached(spec, hardware) {
        let attached = hardware.disks.get(&disk.name).cloned().unwrap_or_default();
        if attached.size_mib < disk.size_mib {
            let message = if attached.copy.is_some() { COPIED } else { NOT_YET };
            let field = format!("disks[{}].size_mib", disk.name);
            found.push(told(&field, attached.size_mib, disk.size_mib, message));
        }
        if attached.limits != disk.limits {
            let (now, then) = (in_words(&attached.limits), in_words(&disk.limits));
            found.push(told(
                &format!("disks[{}].limits", disk.name),
                now,
                then,
                UNLIMITED,
            ));
        }
    }
    let came = if hardware.free_ports > 0 { NOT_YET } else { NO_PORT };
    for name in missing_disks(spec, hardware) {
        found.push(told(&format!("disks[{name}]"), absent, there, came));
    }
    for name in missing_nics(spec, hardware) {
        found.push(told(&format!("nics[{name}]"), absent, there, came));
    }
    for name in leaving_disks(vm, spec, hardware) {
        found.push(told(&format!("disks[{name}]"), there, absent, DISK_IN_USE));
    }
    for name in leaving_nics(spec, hardware) {
        found.push(told(&format!("nics[{name}]"), there, absent, NIC_IN_USE));
    }
}

fn pending_move(disk: &Disk, attached: &Attached, failed: &BTreeMap<String, FailedMove>) -> Pending {
    let message = match (&attached.copy, failed.get(&disk.name)) {
        (Some(copy), _) if copy.pool.as_ref() != Some(&disk.pool) => {
            "a copy in another pool is given up".to_owned()
        }
        (Some(copy), _) => format!(
            "{} % copied; until it has all, the VM goes on in the old pool",
            copy.percent
        ),
        (None, Some(failed)) => format!(
            "{}; the VM goes on in the old pool, and it is tried again after {} s",
            failed.message,
            failed.again().as_secs()
        ),
        (None, None) => "about to be copied".to_owned(),
    };
    let now = attached.pool.as_deref().unwrap_or("none of this host's");
    told(&format!("disks[{}].pool", disk.name), now, &disk.pool, &message)
}

/// Limits for people.
fn in_words(limits: &DiskLimits) -> String {
    let each = [
        ("reads/s", limits.read_iops),
        ("writes/s", limits.write_iops),
        ("MiB/s read", limits.read_mib_per_second),
        ("MiB/s written", limits.write_mib_per_second),
    ];
    let each = each
        .into_iter()
        .filter_map(|(unit, most)| most.map(|most| format!("{most} {unit}")));
    let words: Vec<_> = each.collect();
    if words.is_empty() {
        "no limits".to_owned()
    } else {
        words.join(", ")
    }
}

#[cfg(test)]
mod tests;
