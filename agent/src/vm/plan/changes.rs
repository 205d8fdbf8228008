//! What is to be done next so that a domain gets the hardware that its intent says, and what it cannot get while it runs. Pure.
//!
//! ```text
//!   volumes of added disks ──> definition ──> live, one at a time: grow, processors, memory, attach, detach ──> delete
//! ```
//!
//! The definition says what the next start brings, so a domain that is off has its changes when it is defined; of one that
//! runs, that is what [`pending`] tells of. A disk's file goes when neither the domain nor its definition has the disk.

use std::time::Duration;

use dalgu_proto::vm::{Disk, Spec};

use super::{Memory, Step};
use crate::{
    hypervisor::{Change, Domain, DomainState, Hardware},
    ledger::{Intent, Vm},
};

/// A change that the guest has not gone along with is asked for again after this time.
pub const AGAIN: Duration = Duration::from_secs(20);
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
        tried.any(|(other, ago)| other == change && *ago < AGAIN)
    };
    let mut all = wanted(vm, &intent.spec, hardware, alive(domain));
    if let Some(change) = all.find(|change| !tried(change)) {
        return Some(Step::Change(change));
    }
    let gone = |disk: &&Disk| !hardware.disks.contains_key(&disk.name);
    if let Some(disk) = vm.changes.removed.iter().find(gone) {
        return Some(Step::DeleteVolume(disk.clone()));
    }
    let rest = !vm.changes.removed.is_empty() || !pending(vm, hardware, domain).is_empty();
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

fn missing_disks<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let names = spec.disks.iter().map(|disk| disk.name.as_str());
    names.filter(|name| !hardware.disks.contains_key(*name))
}

fn missing_nics<'a>(spec: &'a Spec, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let names = spec.nics.iter().map(|nic| nic.name.as_str());
    names.filter(|name| !hardware.nics.contains(*name))
}

/// Disks that are to go, and that the domain still has.
fn leaving_disks<'a>(vm: &'a Vm, hardware: &'a Hardware) -> impl Iterator<Item = &'a str> {
    let names = vm.changes.removed.iter().map(|disk| disk.name.as_str());
    names.filter(|name| hardware.disks.contains_key(*name))
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
            .is_some_and(|size| *size < disk.size_mib)
    };
    let grow = attached(spec, hardware).filter(small);
    let grow = grow.map(|disk| Change::GrowDisk(disk.name.clone()));
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
    let disks = leaving_disks(vm, hardware).map(|name| Change::DetachDisk(name.to_owned()));
    let nics = leaving_nics(spec, hardware).map(|name| Change::DetachNic(name.to_owned()));
    let live = size.into_iter().flatten().chain(attach).chain(disks).chain(nics);
    grow.chain(live.filter(move |_| alive))
}

/// Whether the domain lacks a disk, or has one that is to go: its files are not yet, or no more, what the specification says.
pub fn disks_differ(vm: &Vm, hardware: &Hardware) -> bool {
    let spec = vm.intent.as_ref().map(|intent| &intent.spec);
    !vm.changes.removed.is_empty() || spec.is_some_and(|spec| missing_disks(spec, hardware).next().is_some())
}

/// What the domain, if it runs, does not have of its specification.
pub fn pending(vm: &Vm, hardware: &Hardware, domain: &Domain) -> Vec<Pending> {
    const NEXT_START: &str = "it cannot be had without a restart: at the VM's next start";
    const NOT_YET: &str =
        "the guest has not gone along yet; it is asked again, and the next start brings it in any case";
    const NO_PORT: &str = "no port for another device is free: at the VM's next start";
    const NIC_IN_USE: &str =
        "the guest has not let go of it; it is asked again, and it goes with the next stop in any case";
    const DISK_IN_USE: &str = "DISK_IN_USE_BY_GUEST: the guest has not let go of it, unmount it there; it is asked again, and the \
         disk goes with the next stop in any case";
    let Some(spec) = vm
        .intent
        .as_ref()
        .map(|intent| &intent.spec)
        .filter(|_| alive(domain))
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut tell = |field: String, current: String, wanted: String, message: &str| {
        found.push(Pending {
            field,
            current,
            wanted,
            message: message.to_owned(),
        });
    };
    let told = |reachable: bool| if reachable { NOT_YET } else { NEXT_START };
    if hardware.vcpus != spec.vcpus {
        let reach = hardware.min_vcpus..=hardware.max_vcpus;
        let message = told(reach.contains(&spec.vcpus));
        tell(
            "vcpus".into(),
            hardware.vcpus.to_string(),
            spec.vcpus.to_string(),
            message,
        );
    }
    if spec.max_vcpus.is_some_and(|most| most != hardware.max_vcpus) {
        let (now, then) = (hardware.max_vcpus, spec.most_vcpus());
        tell("max_vcpus".into(), now.to_string(), then.to_string(), NEXT_START);
    }
    if !same_memory(hardware.memory_mib, spec.memory_mib) {
        let reach = hardware.min_memory_mib..=hardware.max_memory_mib;
        let message = told(reach.contains(&spec.memory_mib));
        let (now, then) = (hardware.memory_mib, spec.memory_mib);
        tell("memory_mib".into(), now.to_string(), then.to_string(), message);
    }
    if spec
        .max_memory_mib
        .is_some_and(|most| hardware.hot_memory && !same_memory(most, hardware.max_memory_mib))
    {
        let (now, then) = (hardware.max_memory_mib, spec.most_memory_mib());
        tell(
            "max_memory_mib".into(),
            now.to_string(),
            then.to_string(),
            NEXT_START,
        );
    }
    let (there, absent) = ("attached", "none");
    for disk in attached(spec, hardware) {
        let size = hardware.disks.get(&disk.name).copied().unwrap_or(0);
        if size < disk.size_mib {
            let field = format!("disks[{}].size_mib", disk.name);
            tell(field, size.to_string(), disk.size_mib.to_string(), NOT_YET);
        }
    }
    let came = |taken: bool| if taken { NOT_YET } else { NO_PORT };
    for name in missing_disks(spec, hardware) {
        let message = came(hardware.free_ports > 0);
        tell(format!("disks[{name}]"), absent.into(), there.into(), message);
    }
    for name in missing_nics(spec, hardware) {
        let message = came(hardware.free_ports > 0);
        tell(format!("nics[{name}]"), absent.into(), there.into(), message);
    }
    for name in leaving_disks(vm, hardware) {
        tell(format!("disks[{name}]"), there.into(), absent.into(), DISK_IN_USE);
    }
    for name in leaving_nics(spec, hardware) {
        tell(format!("nics[{name}]"), there.into(), absent.into(), NIC_IN_USE);
    }
    found
}

#[cfg(test)]
mod tests;
