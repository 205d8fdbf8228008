//! The domains and disks of a simulated host and how calls change them. Pure but for tokio's clock; called with
//! the lock held, so nothing here may wait.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::{
    host::VmUsage,
    ids::{BackupId, VmId, VolumeId},
    image::Digest,
    vm::{CloneMode, Disk, NumaPlace, PciAddress, PowerReason},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Behaviour, SimConfig, backup::Kept, guest, layers::Chain};
use crate::{
    first_boot,
    hypervisor::{Definition, Domain, DomainState, Error, Hardware, Mark, Progress},
};

/// A disk: its VM, pool and name. One that is a volume of the site is nobody's, see [`key`].
pub(super) type Volume = (VmId, String, String);

/// Under which a disk of a VM is kept.
pub(super) fn key(id: VmId, disk: &Disk) -> Volume {
    match disk.volume_id() {
        Some(volume) => site_volume(&disk.pool, volume),
        None => (id, disk.pool.clone(), disk.name.clone()),
    }
}

/// Who the files of volumes of the site are kept under.
pub(super) fn nobody() -> VmId {
    VmId::from_uuid(Uuid::nil())
}

pub(super) fn site_volume(pool: &str, volume: VolumeId) -> Volume {
    (nobody(), pool.to_owned(), volume.to_string())
}

/// The file of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct File {
    pub(super) size_mib: u64,
    /// What its guest has written; 0 where none has.
    pub(super) content: u64,
    /// The image that it holds the difference to.
    pub(super) base: Option<Digest>,
}

/// Everything a simulated host holds.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) domains: BTreeMap<VmId, Guest>,
    pub(super) volumes: BTreeMap<Volume, File>,
    /// What the disks of VMs hold.
    pub(super) chains: BTreeMap<VmId, Chain>,
    /// Backups in pools of this host alone.
    pub(super) backups: Kept,
    /// Calls whose callers have given up, by domain.
    pub(super) late: BTreeMap<VmId, usize>,
    /// Where it was told that fitted VMs are.
    pub(super) places: BTreeMap<VmId, Vec<NumaPlace>>,
    /// Cancelled when the hypervisor's daemon ends; there is a new one for the next.
    pub(super) daemon: CancellationToken,
}

/// A transfer from here.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) progress: Progress,
    pub(super) abort: CancellationToken,
}

/// A domain with its guest.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) id: VmId,
    pub(super) name: String,
    /// `None` for a foreign domain.
    pub(super) definition: Option<Definition>,
    pub(super) state: DomainState,
    pub(super) reason: PowerReason,
    pub(super) persistent: bool,
    /// What it runs with; a new definition counts from the next start.
    pub(super) hardware: Hardware,
    pub(super) behaviour: Behaviour,
    /// Rises with each start, so that a timer of an earlier run does nothing.
    pub(super) run: u64,
    pub(super) ticks: u64,
    /// How often it was reset since it was made here.
    pub(super) resets: u64,
    pub(super) job: Option<Job>,
    /// Disks that are copied, each to which pool, and since when.
    pub(super) copies: BTreeMap<String, (String, Instant)>,
    /// The backup that an incremental one can begin from. It does not move along.
    pub(super) checkpoint: Option<BackupId>,
    /// Volumes of the site by the name of the disk that they were attached as; it has those of which it has the disk.
    pub(super) attached: BTreeMap<String, VolumeId>,
    ran: Duration,
    since: Option<Instant>,
}

impl Guest {
    pub(super) fn new(definition: &Definition, behaviour: Behaviour, state: DomainState) -> Self {
        Self {
            id: definition.id,
            name: definition.name.to_string(),
            definition: Some(definition.clone()),
            state,
            reason: PowerReason::Unknown,
            persistent: state != DomainState::Incoming,
            hardware: Hardware::of(&definition.spec),
            behaviour,
            run: 0,
            ticks: 0,
            resets: 0,
            job: None,
            copies: BTreeMap::new(),
            checkpoint: None,
            attached: attached(&definition.spec.disks),
            ran: Duration::ZERO,
            since: None,
        }
    }

    /// PCI devices of the host that it has.
    fn devices(&self) -> impl Iterator<Item = &PciAddress> {
        let definition = self.definition.iter();
        definition.flat_map(|definition| definition.devices.iter().map(|device| &device.address))
    }

    pub(super) fn foreign(id: VmId, name: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            definition: None,
            state: DomainState::Running,
            reason: PowerReason::Unknown,
            persistent: true,
            hardware: Hardware {
                vcpus: 1,
                memory_mib: 512,
                ..Hardware::default()
            },
            behaviour: Behaviour::default(),
            run: 1,
            ticks: 0,
            resets: 0,
            job: None,
            copies: BTreeMap::new(),
            checkpoint: None,
            attached: BTreeMap::new(),
            ran: Duration::ZERO,
            since: Some(Instant::now()),
        }
    }

    fn mark(&self, config: &SimConfig) -> Option<Mark> {
        self.definition
            .as_ref()
            .map(|definition| definition.mark)
            .filter(|mark| mark.cluster == config.cluster)
    }

    fn seen(&self, config: &SimConfig) -> Domain {
        Domain {
            id: self.id,
            name: self.name.clone(),
            mark: self.mark(config),
            state: self.state,
            reason: self.reason,
            persistent: self.persistent,
            vcpus: self.hardware.vcpus,
            memory_mib: self.hardware.memory_mib,
            resets: self.resets,
        }
    }

    /// Enters a state, keeping the account of the time it ran.
    pub(super) fn to(&mut self, state: DomainState, reason: PowerReason) {
        if let Some(since) = self.since.take() {
            self.ran += since.elapsed();
        }
        if state == DomainState::Running {
            self.since = Some(Instant::now());
        }
        self.state = state;
        self.reason = reason;
    }

    /// Is off: what it has from now on is what the next start brings.
    fn off(&mut self, reason: PowerReason) {
        self.copies.clear();
        if let Some(definition) = &self.definition {
            self.hardware = Hardware::of(&definition.spec);
        }
        self.to(DomainState::Stopped, reason);
    }

    /// How long its processors have run in all.
    pub(super) fn ran(&self) -> Duration {
        self.ran + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub(super) fn wrong_state(&self, wanted: &str) -> Error {
        Error::WrongState {
            id: self.id,
            detail: format!("it is {:?}, {wanted}", self.state),
        }
    }
}

impl State {
    pub(super) fn list(&self, config: &SimConfig) -> Vec<Domain> {
        self.domains.values().map(|guest| guest.seen(config)).collect()
    }

    pub(super) fn get(&self, id: VmId, config: &SimConfig) -> Option<Domain> {
        self.domains.get(&id).map(|guest| guest.seen(config))
    }

    /// A domain of Dalgu's, or the reason why it must not be touched.
    pub(super) fn ours(&mut self, id: VmId, config: &SimConfig) -> Result<&mut Guest, Error> {
        let guest = self.domains.get_mut(&id).ok_or(Error::NotFound { id })?;
        if guest.mark(config).is_none() {
            return Err(Error::Foreign {
                id,
                detail: format!("{} bears no mark of this site", guest.name),
            });
        }
        Ok(guest)
    }

    /// As [`State::ours`], with `None` for a domain that is not there.
    fn ours_if_any(&mut self, id: VmId, config: &SimConfig) -> Result<Option<&mut Guest>, Error> {
        match self.ours(id, config) {
            Ok(guest) => Ok(Some(guest)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// That no other domain has this name.
    pub(super) fn name_is_free(&self, id: VmId, name: &str) -> Result<(), Error> {
        match self
            .domains
            .values()
            .find(|guest| guest.id != id && guest.name == name)
        {
            Some(other) => Err(Error::Foreign {
                id,
                detail: format!("{} has the name {name}", other.id),
            }),
            None => Ok(()),
        }
    }

    fn has_volume(&self, id: VmId, disk: &Disk, config: &SimConfig) -> bool {
        self.volume_size(id, disk, config).is_some()
    }

    /// The size of a disk that is there, in MiB.
    pub(super) fn volume_size(&self, id: VmId, disk: &Disk, config: &SimConfig) -> Option<u64> {
        self.file(&key(id, disk), config).map(|file| file.size_mib)
    }

    pub(super) fn file(&self, volume: &Volume, config: &SimConfig) -> Option<File> {
        match config.shared_pools.contains(&volume.1) {
            true => config.shared_storage.with(|shared| shared.get(volume).cloned()),
            false => self.volumes.get(volume).cloned(),
        }
    }

    /// Keeps the file of a disk, or `None`: not any more.
    pub(super) fn put_file(&mut self, id: VmId, disk: &Disk, file: Option<File>, config: &SimConfig) {
        let volume = key(id, disk);
        let put = |volumes: &mut BTreeMap<Volume, File>| match file {
            Some(file) => volumes.insert(volume, file),
            None => volumes.remove(&volume),
        };
        match config.shared_pools.contains(&disk.pool) {
            true => config.shared_storage.with(put),
            false => put(&mut self.volumes),
        };
    }

    /// A guest writes to a disk whose file is there; what was there before.
    pub(super) fn write_file(&mut self, volume: &Volume, content: u64, config: &SimConfig) -> Option<u64> {
        let write = |volumes: &mut BTreeMap<Volume, File>| {
            let file = volumes.get_mut(volume)?;
            Some(std::mem::replace(&mut file.content, content))
        };
        match config.shared_pools.contains(&volume.1) {
            true => config.shared_storage.with(write),
            false => write(&mut self.volumes),
        }
    }

    pub(super) fn create_volumes(
        &mut self,
        definition: &Definition,
        incoming: bool,
        config: &SimConfig,
    ) -> Result<(), Error> {
        for disk in definition.spec.volumes() {
            let shared = config.shared_pools.contains(&disk.pool);
            if self.has_volume(definition.id, disk, config) || (incoming && shared) {
                continue;
            }
            if let Some(first_boot) = definition.spec.first_boot.as_ref().filter(|_| !incoming)
                && first_boot.medium == *disk
            {
                // Nobody reads it; that it can be made is shown.
                first_boot::medium(definition, first_boot)?;
            }
            // An image of the catalogue is the agent's business.
            let file = disk.image.as_ref().filter(|_| disk.digest.is_none() && !incoming);
            if let Some(image) = file {
                file_exists("image", image, config)?;
            }
            let content = match disk.backup.as_ref().filter(|_| !incoming) {
                Some(backup) => self.restore(backup, config)?,
                None => 0,
            };
            let file = File {
                size_mib: disk.size_mib,
                content,
                base: disk
                    .digest
                    .clone()
                    .filter(|_| disk.clone_mode == CloneMode::Overlay),
            };
            self.put_file(definition.id, disk, Some(file), config);
        }
        Ok(())
    }

    pub(super) fn delete_volumes(
        &mut self,
        id: VmId,
        keep_shared: bool,
        config: &SimConfig,
    ) -> Result<(), Error> {
        if let Some(guest) = self.domains.get(&id)
            && guest.state != DomainState::Stopped
        {
            return Err(guest.wrong_state("and its disks are in use"));
        }
        self.volumes.retain(|volume, _| volume.0 != id);
        self.forget_chain(id, keep_shared, config);
        if !keep_shared {
            let mine = |volume: &Volume| volume.0 == id && config.shared_pools.contains(&volume.1);
            config
                .shared_storage
                .with(|shared| shared.retain(|volume, _| !mine(volume)));
        }
        Ok(())
    }

    pub(super) fn purge_volume(
        &mut self,
        pool: &str,
        volume: VolumeId,
        keep_shared: bool,
        config: &SimConfig,
    ) {
        let key = site_volume(pool, volume);
        match config.shared_pools.contains(pool) {
            true if keep_shared => {}
            true => config.shared_storage.with(|shared| {
                shared.remove(&key);
            }),
            false => {
                self.volumes.remove(&key);
            }
        }
    }

    pub(super) fn define(&mut self, definition: &Definition, config: &SimConfig) -> Result<(), Error> {
        let id = definition.id;
        if definition.mark.cluster != config.cluster {
            return Err(Error::Foreign {
                id,
                detail: "the definition bears another site's mark".into(),
            });
        }
        self.name_is_free(id, definition.name.as_str())?;
        match self.ours_if_any(id, config)? {
            Some(guest) if guest.state == DomainState::Incoming => {
                Err(guest.wrong_state("wait until it has arrived"))
            }
            Some(guest) if guest.name != definition.name.as_str() => Err(Error::Invalid {
                detail: format!("domain {id} is named {}; a name cannot be changed", guest.name),
            }),
            Some(guest) => {
                let mut definition = definition.clone();
                // They stay where they are until they have been moved.
                for disk in &mut definition.spec.disks {
                    let there = guest.hardware.disks.get(&disk.name);
                    if let Some(pool) = there.and_then(|there| there.pool.as_ref()) {
                        disk.pool.clone_from(pool);
                    }
                }
                if guest.state == DomainState::Stopped {
                    guest.hardware = Hardware::of(&definition.spec);
                }
                guest.definition = Some(definition);
                Ok(())
            }
            None => {
                self.domains
                    .insert(id, Guest::new(definition, config.behaviour, DomainState::Stopped));
                Ok(())
            }
        }
    }

    pub(super) fn start(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        let guest = self.ours(id, config)?;
        match guest.state {
            DomainState::Running => return Ok(()),
            DomainState::Stopped => {}
            _ => return Err(guest.wrong_state("and cannot be started")),
        }
        let spec = guest
            .definition
            .as_ref()
            .map(|definition| definition.spec.clone())
            .ok_or(Error::NotFound { id })?;
        if let Some(disk) = spec.volumes().find(|disk| !self.has_volume(id, disk, config)) {
            return Err(Error::Missing {
                what: "disk",
                path: format!("{}/{id}/{}", disk.pool, disk.name).into(),
            });
        }
        for file in spec
            .kernel_boot
            .iter()
            .flat_map(|boot| std::iter::once(&boot.kernel).chain(&boot.initrd))
        {
            file_exists("kernel", file, config)?;
        }
        let devices = self.domains.get(&id).into_iter().flat_map(Guest::devices);
        let devices: Vec<_> = devices.copied().collect();
        let others = self.domains.values();
        let others = others.filter(|other| other.id != id && other.state != DomainState::Stopped);
        let mut taken = others.flat_map(|other| other.devices().map(move |device| (device, other.id)));
        let twice = taken.find(|(device, _)| devices.contains(device));
        let twice = twice.map(|(device, other)| format!("PCI device {device} is in use by domain {other}"));
        drop(taken);
        if let Some(detail) = twice {
            return Err(Error::WrongState { id, detail });
        }
        let guest = self.ours(id, config)?;
        guest.run += 1;
        guest.copies.clear();
        guest.ran = Duration::ZERO;
        guest.ticks = 0;
        guest.hardware = Hardware::of(&spec);
        guest.attached = attached(&spec.disks);
        guest.to(DomainState::Running, PowerReason::Unknown);
        Ok(())
    }

    /// That a guest can be asked something.
    pub(super) fn ask(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        let guest = self.ours(id, config)?;
        match guest.state {
            DomainState::Running => Ok(()),
            _ => Err(guest.wrong_state("and its guest cannot be asked")),
        }
    }

    pub(super) fn reset(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        self.ask(id, config)?;
        self.begin_anew(id, None);
        Ok(())
    }

    /// The guest boots again, unless that run of it is over.
    pub(super) fn begin_anew(&mut self, id: VmId, run: Option<u64>) {
        if let Some(guest) = self.domains.get_mut(&id)
            && guest.state == DomainState::Running
            && run.is_none_or(|run| run == guest.run)
        {
            guest.ticks = 0;
            guest.resets += 1;
        }
    }

    pub(super) fn destroy(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        if self.ours_if_any(id, config)?.is_some() {
            self.end(id, None, PowerReason::External);
        }
        Ok(())
    }

    pub(super) fn pause(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        let guest = self.ours(id, config)?;
        match guest.state {
            DomainState::Running => guest.to(DomainState::Paused, PowerReason::External),
            DomainState::Paused => {}
            _ => return Err(guest.wrong_state("and cannot be paused")),
        }
        Ok(())
    }

    pub(super) fn resume(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        let guest = self.ours(id, config)?;
        match guest.state {
            DomainState::Paused => guest.to(DomainState::Running, PowerReason::Unknown),
            DomainState::Running => {}
            _ => return Err(guest.wrong_state("and cannot go on")),
        }
        Ok(())
    }

    pub(super) fn undefine(&mut self, id: VmId, config: &SimConfig) -> Result<(), Error> {
        match self.ours_if_any(id, config)? {
            Some(guest) if guest.state != DomainState::Stopped => {
                Err(guest.wrong_state("power it off first"))
            }
            Some(_) => {
                self.domains.remove(&id);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The guest's QEMU ends, unless it is another run's already.
    pub(super) fn end(&mut self, id: VmId, run: Option<u64>, reason: PowerReason) {
        let Some(guest) = self.domains.get_mut(&id) else {
            return;
        };
        if guest.state == DomainState::Stopped || run.is_some_and(|run| run != guest.run) {
            return;
        }
        if let Some(job) = &guest.job {
            job.abort.cancel();
        }
        guest.off(reason);
        if !guest.persistent {
            self.domains.remove(&id);
        }
    }

    /// What a real libvirtd does about transfers when it starts again: incoming ones are removed.
    pub(super) fn daemon_ended(&mut self) {
        self.domains
            .retain(|_, guest| guest.state != DomainState::Incoming);
    }

    pub(super) fn power_cut(&mut self) {
        self.domains.retain(|_, guest| guest.persistent);
        // Also those that were off: why is nowhere on disk.
        for guest in self.domains.values_mut() {
            guest.off(PowerReason::Unknown);
        }
    }

    pub(super) fn usage(&self, config: &SimConfig) -> Vec<(VmId, VmUsage)> {
        let now = config.clock.now();
        self.domains
            .values()
            .filter(|guest| guest.state == DomainState::Running && guest.mark(config).is_some())
            .map(|guest| (guest.id, guest::usage(guest, now)))
            .collect()
    }

    pub(super) fn progress(&self, id: VmId) -> Option<Progress> {
        self.domains.get(&id)?.job.as_ref().map(|job| job.progress)
    }

    pub(super) fn abort(&self, id: VmId) {
        if let Some(job) = self.domains.get(&id).and_then(|guest| guest.job.as_ref()) {
            job.abort.cancel();
        }
    }
}

/// The volumes of the site among disks, by their names.
fn attached(disks: &[Disk]) -> BTreeMap<String, VolumeId> {
    let volume = |disk: &Disk| Some((disk.name.clone(), disk.volume_id()?));
    disks.iter().filter_map(volume).collect()
}

fn file_exists(what: &'static str, name: &str, config: &SimConfig) -> Result<(), Error> {
    match &config.images {
        Some(images) if !images.contains(name) => Err(Error::Missing {
            what,
            path: name.into(),
        }),
        _ => Ok(()),
    }
}
