//! Changes of a simulated domain's hardware. Called with the lock held, so nothing here may wait.
//!
//! A guest that ignores requests lets go of nothing that it has: no processor, no memory, no device.

use dalgu_proto::{ids::VmId, vm::Disk};
use tokio::time::Instant;

use super::{
    Behaviour, SimConfig,
    state::{Guest, State, key, site_volume},
};
use crate::hypervisor::{Attached, Change, Definition, DiskCopy, DomainState, Error, Hardware};

impl State {
    /// What a domain has; its disks with the sizes that they have by now.
    pub(super) fn hardware(&self, id: VmId, config: &SimConfig) -> Option<Hardware> {
        let guest = self.domains.get(&id)?;
        let mut hardware = guest.hardware.clone();
        for (disk, (pool, since)) in &guest.copies {
            if let Some(known) = hardware.disks.get_mut(disk) {
                known.copy = Some(copied(pool, *since, config));
            }
        }
        let defined = |name: &str| {
            let definition = guest.definition.as_ref()?;
            definition.spec.volumes().find(|disk| disk.name == name)
        };
        for (name, known) in &mut hardware.disks {
            let Some(pool) = &known.pool else { continue };
            let volume = match defined(name).and_then(Disk::volume_id) {
                Some(volume) => site_volume(pool, volume),
                None => (id, pool.clone(), name.clone()),
            };
            known.size_mib = self
                .file(&volume, config)
                .map_or(known.size_mib, |file| file.size_mib);
        }
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
        if let Change::MoveDisk(name) = change {
            return self.go_on_moving(definition, name, config);
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
        let guest = self.ours(id, config)?;
        if guest.job.is_some() {
            return Err(guest.wrong_state("being sent, and cannot be changed"));
        }
        let there = guest
            .hardware
            .disks
            .get(name)
            .and_then(|there| there.pool.clone());
        let Some(disk) = disk_of(definition, name) else {
            return Ok(());
        };
        let disk = Disk {
            pool: there.unwrap_or_else(|| disk.pool.clone()),
            ..disk.clone()
        };
        if let Some(mut file) = self.file(&key(id, &disk), config) {
            file.size_mib = file.size_mib.max(disk.size_mib);
            self.put_file(id, &disk, Some(file), config);
        }
        Ok(())
    }

    fn go_on_moving(&mut self, definition: &Definition, name: &str, config: &SimConfig) -> Result<(), Error> {
        let id = definition.id;
        let guest = self.ours(id, config)?;
        let moves = matches!(guest.state, DomainState::Incoming | DomainState::HandedOver);
        if guest.job.is_some() || moves {
            return Err(guest.wrong_state("and its disks stay"));
        }
        let (Some(disk), Some(there)) = (disk_of(definition, name), guest.hardware.disks.get_mut(name))
        else {
            return Ok(());
        };
        match guest.copies.get(name) {
            Some((pool, since)) if *pool == disk.pool => {
                if copied(pool, *since, config).ready {
                    let old = there.pool.replace(disk.pool.clone()).unwrap_or_default();
                    guest.copies.remove(name);
                    let defined = guest.definition.iter_mut().flat_map(|it| &mut it.spec.disks);
                    for defined in defined.filter(|other| other.name == name) {
                        defined.pool.clone_from(&disk.pool);
                    }
                    // What was written meanwhile is in both.
                    let from = Disk {
                        pool: old,
                        ..disk.clone()
                    };
                    let file = self.file(&key(id, &from), config);
                    self.put_file(id, disk, file, config);
                }
            }
            Some(_) => drop(guest.copies.remove(name)),
            None if there.pool.as_ref() == Some(&disk.pool) => {}
            None => {
                let pool = there.pool.clone().unwrap_or_default();
                let copy = (disk.pool.clone(), Instant::now());
                guest.copies.insert(name.to_owned(), copy);
                let from = Disk { pool, ..disk.clone() };
                let file = self.file(&key(id, &from), config);
                self.put_file(id, disk, file, config);
            }
        }
        Ok(())
    }

    pub(super) fn delete_volume(&mut self, id: VmId, disk: &Disk, config: &SimConfig) -> Result<(), Error> {
        if let Some(guest) = self.domains.get(&id)
            && let Some(there) = guest.hardware.disks.get(&disk.name)
            && (there.is_in(&disk.pool)
                || guest
                    .copies
                    .get(&disk.name)
                    .is_some_and(|(pool, _)| *pool == disk.pool))
        {
            return Err(guest.wrong_state("and still has the disk"));
        }
        self.put_file(id, disk, None, config);
        Ok(())
    }
}

/// How far a copy is.
fn copied(pool: &str, since: Instant, config: &SimConfig) -> DiskCopy {
    let (all, done) = (config.delays.copy.as_millis(), since.elapsed().as_millis());
    let percent = if done >= all { 100 } else { done * 100 / all };
    DiskCopy {
        pool: Some(pool.to_owned()),
        percent: u8::try_from(percent).unwrap_or(100),
        ready: done >= all,
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
                let disk = disk_of(definition, name);
                if let Some(volume) = disk.and_then(Disk::volume_id) {
                    self.attached.insert(name.clone(), volume);
                }
                let disk = disk.map(Attached::of).unwrap_or_default();
                hardware.disks.insert(name.clone(), disk);
            }
            Change::AttachNic(name) if !hardware.nics.contains(name) => {
                hardware.free_ports = hardware.free_ports.checked_sub(1).ok_or_else(full)?;
                hardware.nics.insert(name.clone());
            }
            Change::LimitDisk(name) => {
                let limits = disk_of(definition, name).map(|disk| disk.limits);
                if let (Some(limits), Some(there)) = (limits, hardware.disks.get_mut(name)) {
                    there.limits = limits;
                }
            }
            Change::DetachDisk(name) if !holds && hardware.disks.remove(name).is_some() => {
                self.copies.remove(name);
                hardware.free_ports += 1;
            }
            Change::DetachNic(name) if !holds && hardware.nics.remove(name) => hardware.free_ports += 1,
            _ => {}
        }
        Ok(())
    }
}
