//! What a domain has, and changes of it while it is defined. Called by [`super::Libvirt`] on workers.
//!
//! Only the running domain is changed here: what the next start brings is for `define` to say. A device keeps the place it was
//! plugged into, so that a running domain may have holes where the specification has none; its own element in the running
//! domain's metadata says which device has which place.

use dalgu_proto::{
    ids::{ClusterId, VmId},
    vm::Disk,
};
use virt::connect::Connect;
use virt_sys as sys;

use super::{
    domain::Ours,
    error::{is_guests_fault, of},
    ffi::{self, Value},
    host::Host,
    leftover, moving,
    read::{self, Device, HOLE, Parts},
    snapshot,
    tree::{Element, XmlError},
    xml::{self, NAMESPACE, PREFIX},
};
use crate::hypervisor::{Change, Definition, DomainState, Error, Hardware, SPARE_PORTS};

pub(super) const CALL: &str = "change_hardware";

type Raw = virt::error::Error;

/// A domain, and what it has.
pub(super) fn look(
    call: &'static str,
    connect: &Connect,
    id: VmId,
    cluster: ClusterId,
) -> Result<(Ours, Parts), Error> {
    let ours = Ours::find(call, connect, id, cluster)?;
    let flags = match is_alive(&ours) {
        true => 0,
        false => sys::VIR_DOMAIN_XML_INACTIVE,
    };
    let parts = parts_of(call, &ours, flags)?;
    Ok((ours, parts))
}

/// What a domain has as it is defined, or as it runs, where QEMU is asked about what libvirt has forgotten.
pub(super) fn parts_of(call: &'static str, ours: &Ours, flags: u32) -> Result<Parts, Error> {
    let failed = |error| of(call, ours.seen.id, &error);
    let xml = ours.handle.xml_desc(flags).map_err(failed)?;
    let mut parts = read::parts(&xml)?;
    let runs = flags == 0 && is_alive(ours);
    if runs && parts.disks.iter().any(|disk| disk.mirror.is_some()) {
        leftover::forgotten_copies(&ours.handle, &mut parts).map_err(failed)?;
    }
    Ok(parts)
}

const fn is_alive(ours: &Ours) -> bool {
    matches!(ours.seen.state, DomainState::Running | DomainState::Paused)
}

/// What a domain has; see [`crate::hypervisor::Hypervisor::hardware`]. Reads files.
pub(super) fn hardware(
    host: &Host,
    connect: &Connect,
    id: VmId,
    cluster: ClusterId,
) -> Result<Option<Hardware>, Error> {
    let (ours, mut parts) = match look("hardware", connect, id, cluster) {
        Err(Error::NotFound { .. }) => return Ok(None),
        looked => looked?,
    };
    for device in &parts.disks {
        if let Some(attached) = parts.hardware.disks.get_mut(&device.name) {
            moving::attached(host, &ours, device, attached)?;
        }
    }
    Ok(Some(parts.hardware))
}

/// Whether a domain has a disk in its pool, as it runs or as it is defined, or copies it there.
pub(super) fn has_disk(
    host: &Host,
    connect: &Connect,
    id: VmId,
    cluster: ClusterId,
    disk: &Disk,
) -> Result<bool, Error> {
    let call = "delete_volume";
    let ours = match Ours::find(call, connect, id, cluster) {
        Err(Error::NotFound { .. }) => return Ok(false),
        ours => ours?,
    };
    let mut kinds = vec![sys::VIR_DOMAIN_XML_INACTIVE];
    if ours.seen.state != DomainState::Stopped {
        kinds.push(0);
    }
    for flags in kinds {
        let parts = parts_of(call, &ours, flags)?;
        let mut same = parts.disks.iter().filter(|device| device.name == disk.name);
        let path = host.storage.path(id, disk)?;
        let uses = |device: &Device| {
            let file = device.file.as_ref().map(|(file, _)| file);
            let mirror = device.mirror.as_ref().map(|(file, _)| file);
            // What is in none of the pools is not known to be another.
            let elsewhere = file.is_some_and(|file| host.storage.pool_of(file).is_some() && *file != path);
            !elsewhere || mirror == Some(&path)
        };
        if same.any(uses) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The definition of a domain that is off, whose disks are enlarged as files, with each in the pool that the domain has it in.
pub(super) fn off(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
) -> Result<Option<Definition>, Error> {
    let (ours, parts) = look(CALL, connect, definition.id, cluster)?;
    let off = ours.seen.state == DomainState::Stopped;
    Ok(off.then(|| {
        let mut placed = definition.clone();
        moving::place(host, &parts, &mut placed);
        placed
    }))
}

/// Changes a running domain; see [`crate::hypervisor::Hypervisor::change_hardware`].
pub(super) fn change(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
    change: &Change,
) -> Result<(), Error> {
    let id = definition.id;
    let (ours, parts) = look(CALL, connect, id, cluster)?;
    if !is_alive(&ours) {
        return Err(ours.wrong_state("and cannot be changed"));
    }
    let live = Live { ours, parts, id };
    match change {
        Change::Vcpus(vcpus) => {
            let set = live
                .ours
                .handle
                .set_vcpus_flags(*vcpus, sys::VIR_DOMAIN_AFFECT_LIVE);
            live.asked(set)
        }
        Change::MemoryMib(mib) => live.set_memory(*mib),
        Change::GrowDisk(name) => live.grow(definition, name),
        Change::LimitDisk(name) => live.limit(definition, name),
        // Not here: it is done to a domain that is off, too.
        Change::MoveDisk(_) => Ok(()),
        Change::AttachDisk(name) => {
            let model = host.model(definition, &snapshot::tops_of(&live.parts.disks))?;
            live.attach(
                &live.parts.disks,
                name,
                |place| model.new_disk(name, place),
                xml::disk_target,
            )
        }
        Change::AttachNic(name) => {
            let model = host.model(definition, &snapshot::tops_of(&live.parts.disks))?;
            let target = |place| xml::nic_target(id.uuid(), place);
            live.attach(&live.parts.nics, name, |place| model.new_nic(name, place), target)
        }
        Change::DetachDisk(name) => live.detach(&live.parts.disks, name),
        Change::DetachNic(name) => live.detach(&live.parts.nics, name),
    }
}

/// A running domain.
struct Live {
    ours: Ours,
    parts: Parts,
    id: VmId,
}

impl Live {
    fn done(&self, result: Result<(), Raw>) -> Result<(), Error> {
        result.map_err(|error| of(CALL, self.id, &error))
    }

    /// The guest was asked; that it does not go along is not a failure of the call, and shows at the next look.
    fn asked(&self, result: Result<(), Raw>) -> Result<(), Error> {
        match result {
            Err(error) if is_guests_fault(&error) => {
                tracing::info!(vm = %self.id, error = error.message(), "the guest does not go along yet");
                Ok(())
            }
            other => self.done(other),
        }
    }

    fn set_memory(&self, mib: u64) -> Result<(), Error> {
        let (Some(device), least) = (self.parts.memory.clone(), self.parts.hardware.min_memory_mib) else {
            return Err(self.ours.wrong_state("and has no memory that can be changed"));
        };
        let wanted = mib.saturating_sub(least);
        let xml = read::with_requested(device, wanted - wanted % xml::MEMORY_BLOCK_MIB)?;
        let set = self
            .ours
            .handle
            .update_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE);
        self.asked(set)
    }

    fn grow(&self, definition: &Definition, name: &str) -> Result<(), Error> {
        let disk = definition.spec.disks.iter().find(|disk| disk.name == name);
        let there = self.parts.disks.iter().find(|disk| disk.name == name);
        let (Some(disk), Some(there)) = (disk, there) else {
            return Ok(());
        };
        let flags = sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES;
        self.done(
            self.ours
                .handle
                .block_resize(&there.target, disk.size_mib << 20, flags),
        )
    }

    fn limit(&self, definition: &Definition, name: &str) -> Result<(), Error> {
        let disk = definition.spec.disks.iter().find(|disk| disk.name == name);
        let there = self.parts.disks.iter().find(|disk| disk.name == name);
        let (Some(disk), Some(there)) = (disk, there) else {
            return Ok(());
        };
        let values = xml::io_tune(&disk.limits).map(|(name, most)| (name, Value::Unsigned(most)));
        self.done(ffi::set_block_io_tune(&self.ours.handle, &there.target, &values))
    }

    /// Plugs a device into the first place that is free, unless it is there.
    fn attach(
        &self,
        all: &[Device],
        name: &str,
        make: impl Fn(usize) -> Option<Result<String, XmlError>>,
        target: impl Fn(usize) -> String,
    ) -> Result<(), Error> {
        if all.iter().any(|device| device.name == name) {
            return Ok(());
        }
        let free = |place: &usize| !all.iter().any(|device| device.target == target(*place));
        let place = (0..=all.len()).find(free).unwrap_or(all.len());
        let Some(xml) = make(place) else { return Ok(()) };
        let target = target(place);
        self.name_places(Some((name, &target)))?;
        let xml = xml?;
        let domain = &self.ours.handle;
        let attach = || domain.attach_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE);
        let attached = attach().or_else(|error| {
            let device = Element::parse(&xml).ok();
            match device.map_or(Ok(false), |device| leftover::unplug(domain, &device)) {
                Ok(true) => attach(),
                Ok(false) => Err(error),
                Err(other) => {
                    tracing::warn!(vm = %self.id, %other, "QEMU cannot be asked what it has of a device");
                    Err(error)
                }
            }
        });
        self.done(attached)
    }

    /// Asks the guest to let go of a device; libvirt waits some seconds for that.
    fn detach(&self, all: &[Device], name: &str) -> Result<(), Error> {
        let Some(device) = all.iter().find(|device| device.name == name) else {
            return Ok(());
        };
        self.done(moving::give_up(&self.ours, device))?;
        let detached = self
            .ours
            .handle
            .detach_device_flags(&device.xml, sys::VIR_DOMAIN_AFFECT_LIVE);
        self.asked(detached)
    }

    /// Says in the running domain which device has which place, with one that is about to come.
    fn name_places(&self, coming: Option<(&str, &str)>) -> Result<(), Error> {
        let failed = |error: Raw| of(CALL, self.id, &error);
        let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or_default();
        let live = sys::VIR_DOMAIN_AFFECT_LIVE;
        let handle = &self.ours.handle;
        let own = handle.metadata(kind, Some(NAMESPACE), live).map_err(failed)?;
        let uuid = self.id.uuid();
        let disks = places(&self.parts.disks, coming, xml::disk_target);
        let nics = places(&self.parts.nics, coming, |place| xml::nic_target(uuid, place));
        let renewed = read::with_names(&own, &disks, &nics)?;
        handle
            .set_metadata(kind, Some(&renewed), Some(PREFIX), Some(NAMESPACE), live)
            .map_err(failed)
    }
}

/// The names of devices by their places, with holes where there is none.
fn places(all: &[Device], coming: Option<(&str, &str)>, target: impl Fn(usize) -> String) -> String {
    let known = all
        .iter()
        .map(|device| (device.name.as_str(), device.target.as_str()));
    let known: Vec<_> = known.chain(coming).collect();
    let at = |place: usize| {
        let target = target(place);
        let found = known.iter().find(|(_, other)| *other == target);
        found.map(|(name, _)| *name)
    };
    // A place beyond all that are named is not reached: devices are plugged into the first one that is free.
    let most = known.len() + SPARE_PORTS;
    let mut named: Vec<_> = (0..most).map(at).collect();
    // An interface in a network is found by its name and has no place of its own: it is told of where none is.
    let unplaced = known.iter().map(|(name, _)| *name);
    let unplaced: Vec<_> = unplaced.filter(|name| !named.contains(&Some(*name))).collect();
    for (free, name) in named.iter_mut().filter(|place| place.is_none()).zip(unplaced) {
        *free = Some(name);
    }
    let end = named.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
    let names: Vec<_> = named[..end].iter().map(|name| name.unwrap_or(HOLE)).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, target: &str) -> Device {
        Device {
            name: name.to_owned(),
            target: target.to_owned(),
            file: None,
            mirror: None,
            forgotten: false,
            behind: Vec::new(),
            xml: String::new(),
        }
    }

    #[test]
    fn each_device_is_told_of_whether_or_not_it_has_a_place() {
        let target = |place: usize| format!("t{place}");
        let all = [device("eth0", "dgt1"), device("eth1", "t1"), device("eth2", "t3")];
        assert_eq!(places(&all, None, target), "eth0 eth1 - eth2");
        assert_eq!(places(&all, Some(("eth3", "t0")), target), "eth3 eth1 eth0 eth2");
        assert_eq!(places(&all[1..], None, target), "- eth1 - eth2");
        assert_eq!(places(&[], Some(("eth0", "t0")), target), "eth0");
    }
}
