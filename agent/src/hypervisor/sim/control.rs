//! What a test or a demonstration can do to a simulated hypervisor besides calling it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use dalgu_proto::{
    ids::{BackupId, VmId, VolumeId},
    image::Digest,
    vm::{NumaPlace, PowerReason, Spec},
};
use tokio_util::sync::CancellationToken;

use super::{
    Behaviour, Call, Fault, Phase, Sim,
    backup::Kept,
    layers::Chain,
    state::{File, Guest, Volume, key, nobody, site_volume},
};
use crate::{
    hypervisor::{Connection, Definition, DomainState, Hint},
    network::{self, Plugged},
};

/// The disks on pools that several simulated hosts share; clones are the same storage.
#[derive(Debug, Clone, Default)]
pub struct SharedStorage(
    Arc<Mutex<BTreeMap<Volume, File>>>,
    Arc<Mutex<BTreeMap<VmId, Chain>>>,
    Arc<Mutex<Kept>>,
);

/// What a guest did with a volume of the site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its VM.
    pub vm: VmId,
    /// The volume.
    pub volume: VolumeId,
    /// Numbers of the layers that the VM has.
    pub layers: Vec<u32>,
    /// What was there before; `None` where there was no file.
    pub before: Option<u64>,
}

impl SharedStorage {
    pub(super) fn with_chains<T>(&self, look: impl FnOnce(&mut BTreeMap<VmId, Chain>) -> T) -> T {
        look(&mut self.1.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn with<T>(&self, look: impl FnOnce(&mut BTreeMap<Volume, File>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn backups<T>(&self, look: impl FnOnce(&mut Kept) -> T) -> T {
        look(&mut self.2.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many disks there are.
    pub fn count(&self) -> usize {
        self.with(|volumes| volumes.len())
    }
}

impl Sim {
    /// Where it was told that fitted VMs are.
    pub fn places(&self) -> BTreeMap<VmId, Vec<NumaPlace>> {
        self.0.state().places.clone()
    }

    /// Lets so many waiting or coming changes go on, if stepping is by hand.
    pub fn step(&self, count: usize) {
        self.0.steps.add_permits(count);
    }

    /// Orders a fault for the next call of this kind; several are served in order.
    pub fn fail_next(&self, call: Call, fault: Fault) {
        self.0.faults().order(call, fault);
    }

    /// Orders that the next call of this kind panics in its caller, as a defect there would.
    pub fn panic_next(&self, call: Call) {
        self.0.faults().order_panic(call);
    }

    /// Orders that the next migration sent from here breaks at this point; several are served in order.
    pub fn break_migration_at(&self, phase: Phase) {
        self.0.faults().order_break(phase);
    }

    /// Says what a guest does from its next start or request on.
    pub fn set_behaviour(&self, id: VmId, behaviour: Behaviour) {
        if let Some(guest) = self.0.state().domains.get_mut(&id) {
            guest.behaviour = behaviour;
        }
    }

    /// A guest writes to a disk: it holds something else from now on.
    pub fn write_disk(&self, id: VmId, disk: &str) -> u64 {
        let content = self.disk_content(id, disk) + 1;
        if let Some(volume) = self.file_of(id, disk) {
            self.0.state().write_file(&volume, content, &self.0.config);
        }
        content
    }

    /// What a disk of a domain holds.
    pub fn disk_content(&self, id: VmId, disk: &str) -> u64 {
        let volume = self.file_of(id, disk);
        let file = volume.and_then(|volume| self.0.state().file(&volume, &self.0.config));
        file.map_or(0, |file| file.content)
    }

    fn file_of(&self, id: VmId, disk: &str) -> Option<Volume> {
        let definition = self.definition(id)?;
        let disk = definition.spec.disks.iter().find(|known| known.name == disk)?;
        Some(key(id, disk))
    }

    /// Every guest that runs writes this to the volumes of the site that it has.
    pub fn write_volumes(&self, content: u64) -> Vec<Written> {
        let mut state = self.0.state();
        let running = state
            .domains
            .values()
            .filter(|guest| guest.state == DomainState::Running);
        let has = running.flat_map(|guest| {
            let attached = guest.attached.iter();
            attached.filter_map(|(disk, volume)| {
                let pool = guest.hardware.disks.get(disk)?.pool.as_ref()?;
                let definition = guest.definition.clone()?;
                Some((definition, *volume, site_volume(pool, *volume)))
            })
        });
        let has: Vec<_> = has.collect();
        let config = &self.0.config;
        let write = has.into_iter().map(|(definition, volume, file)| Written {
            vm: definition.id,
            volume,
            layers: state.with_chain(&definition, config, |chain| chain.numbers()),
            before: state.write_file(&file, content, config),
        });
        write.collect()
    }

    /// Interfaces of the guests that run which plug into networks.
    pub fn ports(&self) -> Vec<(VmId, Plugged)> {
        let state = self.0.state();
        let running = state
            .domains
            .values()
            .filter(|guest| guest.state == DomainState::Running);
        let ports = running.flat_map(|guest| {
            let has = |port: &Plugged, spec: &Spec| {
                let mut nics = spec.nics.iter().filter(|nic| nic.mac == port.mac);
                nics.any(|nic| guest.hardware.nics.contains(&nic.name))
            };
            let spec = guest.definition.as_ref().map(|definition| &definition.spec);
            let plugged = spec
                .into_iter()
                .flat_map(move |spec| network::plugged(guest.id, spec).filter(move |port| has(port, spec)));
            plugged.map(|port| (guest.id, port))
        });
        ports.collect()
    }

    /// Every guest that runs writes this to its own disks. Who did, the numbers of the layers that they have, and what was there
    /// before.
    pub fn write_disks(&self, content: u64) -> Vec<(VmId, Vec<u32>, u64)> {
        let mut state = self.0.state();
        let running = state
            .domains
            .values()
            .filter(|guest| guest.state == DomainState::Running);
        let running = running.filter_map(|guest| guest.definition.clone());
        let running: Vec<_> = running.collect();
        let config = &self.0.config;
        let write = running.into_iter().map(|definition| {
            let own = definition.spec.disks.iter().filter(|disk| disk.volume.is_none());
            for disk in own {
                state.write_file(&key(definition.id, disk), content, config);
            }
            state.with_chain(&definition, config, |chain| {
                let before = (definition.id, chain.numbers(), chain.content());
                chain.write(content);
                before
            })
        });
        write.collect()
    }

    /// The numbers of the layers that disks of VMs have on this host's own pools, and of how many layers files are left.
    pub fn layers_of_disks(&self) -> Vec<(VmId, Vec<u32>, usize)> {
        let state = self.0.state();
        let chains = state.chains.iter();
        chains
            .map(|(id, chain)| (*id, chain.numbers(), chain.spare()))
            .collect()
    }

    /// Backups in pools of this host alone.
    pub fn backup_ids(&self) -> Vec<BackupId> {
        self.0.state().backups.keys().map(|(_, id)| *id).collect()
    }

    /// Volumes of the site whose files are on the pools of this host alone, with these pools.
    pub fn site_volumes(&self) -> Vec<(VolumeId, String)> {
        let state = self.0.state();
        let nobodys = state.volumes.keys().filter(|file| file.0 == nobody());
        nobodys
            .filter_map(|(_, pool, id)| Some((id.parse().ok()?, pool.clone())))
            .collect()
    }

    /// Images that files of this host's own pools hold the difference to.
    pub fn bases(&self) -> Vec<Digest> {
        let state = self.0.state();
        state
            .volumes
            .values()
            .filter_map(|file| file.base.clone())
            .collect()
    }

    /// How many backups there are in pools of this host alone.
    pub fn backups(&self) -> usize {
        self.0.state().backups.len()
    }

    /// How often a guest was started.
    pub fn run(&self, id: VmId) -> Option<u64> {
        self.0.state().domains.get(&id).map(|guest| guest.run)
    }

    /// How often a guest was reset.
    pub fn resets(&self, id: VmId) -> Option<u64> {
        self.0.state().domains.get(&id).map(|guest| guest.resets)
    }

    /// The guest crashes now, as if its QEMU had been killed.
    pub fn crash_guest(&self, id: VmId) {
        self.end_guest(id, PowerReason::Crashed);
    }

    /// The guest powers itself off now.
    pub fn power_off_guest(&self, id: VmId) {
        self.end_guest(id, PowerReason::GuestShutdown);
    }

    /// The guest stops for want of disk space.
    pub fn io_error(&self, id: VmId) {
        if let Some(guest) = self.0.state().domains.get_mut(&id)
            && guest.state == DomainState::Running
        {
            guest.to(DomainState::Paused, PowerReason::IoError);
        }
        self.0.hint(Hint::Domain(id));
    }

    fn end_guest(&self, id: VmId, reason: PowerReason) {
        self.0.state().end(id, None, reason);
        self.0.hint(Hint::Domain(id));
    }

    /// The hypervisor is gone: calls under way and to come fail, guests run on.
    pub fn disconnect(&self, why: &str) {
        self.0.connection.send_replace(Connection::Down(why.to_owned()));
        let old = {
            let mut state = self.0.state();
            state.daemon_ended();
            std::mem::replace(&mut state.daemon, CancellationToken::new())
        };
        old.cancel();
        self.0.hint(Hint::All);
    }

    /// The hypervisor is back.
    pub fn reconnect(&self) {
        self.0.connection.send_replace(Connection::Up);
        self.0.hint(Hint::All);
    }

    /// The hypervisor dies and comes back at once: calls under way fail, transfers end, guests run on.
    pub fn restart(&self) {
        self.disconnect("the simulated hypervisor restarts");
        self.reconnect();
    }

    /// The host loses power and comes back: every guest is off, every incoming one gone.
    pub fn reboot_host(&self) {
        self.disconnect("the simulated host restarts");
        self.0.state().power_cut();
        self.reconnect();
    }

    /// What is here now, without a call that could fail or take time.
    pub fn domains(&self) -> Vec<(VmId, DomainState, PowerReason)> {
        let state = self.0.state();
        let seen = state
            .domains
            .values()
            .map(|guest| (guest.id, guest.state, guest.reason));
        seen.collect()
    }

    /// Takes back every fault that was ordered and has not come; answers those of calls.
    pub fn forget_faults(&self) -> Vec<(Call, Fault)> {
        std::mem::take(&mut *self.0.faults()).into_calls()
    }

    /// Puts a running domain here that is not Dalgu's.
    pub fn add_foreign(&self, id: VmId, name: &str) {
        self.0.state().domains.insert(id, Guest::foreign(id, name));
        self.0.hint(Hint::Domain(id));
    }

    /// How often the guest has counted; a guest that runs twice counts twice.
    pub fn ticks(&self, id: VmId) -> Option<u64> {
        self.0.state().domains.get(&id).map(|guest| guest.ticks)
    }

    /// How many disks there are on the pools of this host alone.
    pub fn local_volumes(&self) -> usize {
        self.0.state().volumes.len()
    }

    /// What a guest's disks hold; 0 before anything was written. `None` where there is no such domain.
    pub fn content(&self, id: VmId) -> Option<u64> {
        let definition = self.definition(id)?;
        let mut state = self.0.state();
        Some(state.with_chain(&definition, &self.0.config, |chain| chain.content()))
    }

    /// The guest writes this to its disks.
    pub fn write(&self, id: VmId, content: u64) {
        if let Some(definition) = self.definition(id) {
            let mut state = self.0.state();
            state.with_chain(&definition, &self.0.config, |chain| chain.write(content));
        }
    }

    /// The disks of a VM on this host's own pools are lost.
    pub fn lose_volumes(&self, id: VmId) {
        self.0.state().volumes.retain(|volume, _| volume.0 != id);
    }

    /// The definition under which a domain of Dalgu's is known here.
    pub fn definition(&self, id: VmId) -> Option<Definition> {
        self.0
            .state()
            .domains
            .get(&id)
            .and_then(|guest| guest.definition.clone())
    }
}
