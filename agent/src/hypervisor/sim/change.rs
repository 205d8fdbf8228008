//! Changes of a simulated domain's hardware. Called with the lock held, so nothing here may wait.
//!
//! A guest that ignores requests lets go of nothing that it has: no processor, no memory, no device.

use std::collections::BTreeMap;

use dalgu_proto::{ids::VmId, vm::Disk};

use super::{
    Behaviour, SimConfig,
    state::{Guest, State, Volume},
};
use crate::hypervisor::{Change, Definition, DomainState, Error, Hardware};

impl State {
    /// What a domain has; its disks with the sizes that they have by now.
    pub(super) fn hardware(&self, id: VmId, config: &SimConfig) -> Option<Hardware> {
        let mut hardware = self.domains.get(&id)?.hardware.clone();
        let mut note = |volumes: &BTreeMap<Volume, u64>| {
            for ((vm, _, disk), size) in volumes {
                if let Some(known) = hardware.disks.get_mut(disk).filter(|_| *vm == id) {
                    *known = *size;
                }
            }
        };
        note(&self.volumes);
        config.shared_storage.with(|shared| note(shared));
        Some(hardware)
    }

    pub(super) fn change(
        &mut self,
        definition: &Definition,
        change: &Change,
        config: &SimConfig,
    ) -> Result<(), Error> {
        let id = definition.id;
        if let Change::GrowDisk(name) = change {
            return self.grow(definition, name, config);
        }
        if let Change::AttachDisk(name) = change
            && let Some(disk) = disk_of(definition, name)
            && self.volume_size(id, disk, config).is_none()
        {
            return Err(Error::Missing {
                what: "disk",
                path: format!("{}/{id}/{name}", disk.pool).into(),
            });
        }
        let guest = self.ours(id, config)?;
        if !matches!(guest.state, DomainState::Running | DomainState::Paused) || guest.job.is_some() {
            return Err(guest.wrong_state("and cannot be changed"));
        }
        guest.change(definition, change)
    }

    fn grow(&mut self, definition: &Definition, name: &str, config: &SimConfig) -> Result<(), Error> {
        let id = definition.id;
        if self.ours(id, config)?.job.is_some() {
            return Err(self
                .ours(id, config)?
                .wrong_state("being sent, and cannot be changed"));
        }
        if let Some(disk) = disk_of(definition, name)
            && let Some(size) = self.volume_size(id, disk, config)
        {
            self.put_volume(id, disk, Some(size.max(disk.size_mib)), config);
        }
        Ok(())
    }

    pub(super) fn delete_volume(&mut self, id: VmId, disk: &Disk, config: &SimConfig) -> Result<(), Error> {
        if let Some(guest) = self.domains.get(&id)
            && guest.hardware.disks.contains_key(&disk.name)
        {
            return Err(guest.wrong_state("and still has the disk"));
        }
        self.put_volume(id, disk, None, config);
        Ok(())
    }
}

fn disk_of<'a>(definition: &'a Definition, name: &str) -> Option<&'a Disk> {
    definition.spec.disks.iter().find(|disk| disk.name == name)
}

impl Guest {
    fn change(&mut self, definition: &Definition, change: &Change) -> Result<(), Error> {
        let full = || Error::Failed {
            call: "change",
            code: 0,
            detail: "no port is free".into(),
        };
        let holds = self.behaviour == Behaviour::Ignores || self.state == DomainState::Paused;
        let hardware = &mut self.hardware;
        match change {
            Change::Vcpus(vcpus) if *vcpus > hardware.max_vcpus => {
                return Err(self.wrong_state("and has a maximum of fewer processors"));
            }
            Change::Vcpus(vcpus) if *vcpus > hardware.vcpus || !holds => hardware.vcpus = *vcpus,
            Change::MemoryMib(mib) if !(hardware.min_memory_mib..=hardware.max_memory_mib).contains(mib) => {
                return Err(self.wrong_state("and has a maximum of less memory"));
            }
            Change::MemoryMib(mib) if *mib > hardware.memory_mib || !holds => hardware.memory_mib = *mib,
            Change::AttachDisk(name) if !hardware.disks.contains_key(name) => {
                hardware.free_ports = hardware.free_ports.checked_sub(1).ok_or_else(full)?;
                let size = disk_of(definition, name).map_or(0, |disk| disk.size_mib);
                hardware.disks.insert(name.clone(), size);
            }
            Change::AttachNic(name) if !hardware.nics.contains(name) => {
                hardware.free_ports = hardware.free_ports.checked_sub(1).ok_or_else(full)?;
                hardware.nics.insert(name.clone());
            }
            Change::DetachDisk(name) if !holds && hardware.disks.remove(name).is_some() => {
                hardware.free_ports += 1;
            }
            Change::DetachNic(name) if !holds && hardware.nics.remove(name) => hardware.free_ports += 1,
            _ => {}
        }
        Ok(())
    }
}
