//! What the agent needs of a hypervisor, in the agent's own words.
//!
//! [`Hypervisor`] is implemented by `libvirt` (real guests) and by `sim` (simulated ones, shipped for demonstrations
//! and large fleets); `contract` is the suite that both must pass. Called by the VM tasks, by recovery, by the
//! migration roles and by the reporter. Nothing here decides what should happen to a VM, and nothing here knows of
//! protobuf or of XML.
//!
//! Every call returns within the deadline its documentation names, with [`Error::Timeout`] if need be; one hung
//! domain or pool delays no call about another. After an error of which [`Error::outcome_unknown`] is true, the
//! caller must look again before it acts, and must not take what it sees for the end of the matter while
//! [`Hypervisor::changing`] is true. The same holds where the caller gives a call up by dropping it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use dalgu_proto::{
    host::{GuestFeature, VmUsage},
    ids::{BackupId, ClusterId, Epoch, Generation, MigrationId, VmId, VmName, VolumeId},
    network::Network,
    vm::{Device, Disk, DiskLimits, NumaPlace, PowerReason, PowerState, Spec, first_boot::Documents},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{broadcast, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::image::Refusal;

pub mod backup;
pub mod contract;
pub mod files;
#[cfg(feature = "libvirt")]
pub mod libvirt;
pub mod sim;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No connection to the hypervisor now; it is being sought again.
    #[error("the hypervisor cannot be reached: {detail}")]
    Unavailable {
        /// What the connection said.
        detail: String,
    },
    /// No answer within the deadline; the call may still take effect.
    #[error("{call} did not answer within {after:?}")]
    Timeout {
        /// Name of the call.
        call: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// There is no such domain.
    #[error("there is no domain {id}")]
    NotFound {
        /// The domain.
        id: VmId,
    },
    /// Another domain has this name, or a domain of this UUID is not Dalgu's.
    #[error("domain {id} clashes with one that Dalgu did not make: {detail}")]
    Foreign {
        /// The domain.
        id: VmId,
        /// What clashes.
        detail: String,
    },
    /// The domain is not in a state in which this can be done.
    #[error("domain {id}: {detail}")]
    WrongState {
        /// The domain.
        id: VmId,
        /// What the hypervisor said.
        detail: String,
    },
    /// A file that the VM needs is not there: an image, a kernel, a disk.
    #[error("{what} {path} is not there; put it in place and try again")]
    Missing {
        /// What it is, for example "image".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A pool cannot take a disk.
    #[error("pool {pool}: {detail}")]
    Storage {
        /// The pool.
        pool: String,
        /// What is wrong.
        detail: String,
    },
    /// An image is not what a disk may be made from; trying again does not help.
    #[error("image {image} is refused: {refusal}")]
    ImageRefused {
        /// Its file name.
        image: String,
        /// Why.
        refusal: Refusal,
    },
    /// The hypervisor refuses the definition; trying again does not help.
    #[error("the hypervisor refuses this VM: {detail}")]
    Invalid {
        /// What it said.
        detail: String,
    },
    /// The migration was given up because somebody asked for it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// There is nothing that an incremental backup could begin from.
    #[error("there is nothing to begin an incremental backup of {id} from: {detail}")]
    NoCheckpoint {
        /// The VM.
        id: VmId,
        /// Why.
        detail: String,
    },
    /// Anything else it said.
    #[error("{call}: {detail} (libvirt code {code})")]
    Failed {
        /// Name of the call.
        call: &'static str,
        /// The hypervisor's number for it; 0 where it has none.
        code: u32,
        /// What it said.
        detail: String,
    },
}

impl Error {
    /// Whether the call may have taken effect all the same.
    pub const fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Timeout { .. })
    }

    /// Whether the same call may succeed later without anybody changing the VM's specification.
    pub const fn is_retryable(&self) -> bool {
        !matches!(
            self,
            Self::Invalid { .. }
                | Self::ImageRefused { .. }
                | Self::Foreign { .. }
                | Self::Cancelled
                | Self::NoCheckpoint { .. }
        )
    }

    /// Stable reason for programs; see `VmError.reason`.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "HYPERVISOR_UNAVAILABLE",
            Self::Timeout { .. } => "HYPERVISOR_TIMEOUT",
            Self::NotFound { .. } => "DOMAIN_NOT_FOUND",
            Self::Foreign { .. } => "DOMAIN_NOT_OURS",
            Self::WrongState { .. } => "DOMAIN_STATE",
            Self::Missing { .. } => "FILE_NOT_FOUND",
            Self::Storage { .. } => "STORAGE",
            Self::ImageRefused { .. } => "IMAGE_REFUSED",
            Self::Invalid { .. } => "REFUSED_BY_HYPERVISOR",
            Self::Cancelled => "CANCELLED",
            Self::NoCheckpoint { .. } => "NO_CHECKPOINT",
            Self::Failed { .. } => "HYPERVISOR_ERROR",
        }
    }
}

/// Whose a domain is; kept in the domain's own metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The site.
    pub cluster: ClusterId,
    /// Ownership number under which it was defined here.
    pub epoch: Epoch,
    /// Generation of the intent it was defined from.
    pub generation: Generation,
}

/// What a domain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// Its processors run.
    Running,
    /// Frozen; its memory is whole.
    Paused,
    /// Powered off.
    Stopped,
    /// Waits for incoming migration data: there is no VM here yet.
    Incoming,
    /// Has handed over to a migration's destination; its memory must not be used again.
    HandedOver,
}

impl DomainState {
    /// The power state of the VM; `None` while a migration has it, so that there is none here.
    pub const fn power(self) -> Option<PowerState> {
        match self {
            Self::Running => Some(PowerState::Running),
            Self::Paused => Some(PowerState::Paused),
            Self::Stopped => Some(PowerState::Stopped),
            Self::Incoming | Self::HandedOver => None,
        }
    }
}

/// A domain as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// UUID of the domain.
    pub id: VmId,
    /// Its name; free text for domains that are not Dalgu's.
    pub name: String,
    /// Dalgu's mark; `None` for domains that are not Dalgu's.
    pub mark: Option<Mark>,
    /// What it does.
    pub state: DomainState,
    /// Why, as far as the hypervisor knows.
    pub reason: PowerReason,
    /// Whether it outlives its QEMU process.
    pub persistent: bool,
    /// Virtual processors it may use.
    pub vcpus: u32,
    /// Memory it may use, in MiB.
    pub memory_mib: u64,
    /// Changes when the guest is reset, as at the end of a reboot. Also after a time in which that could not be seen.
    pub resets: u64,
}

/// Devices that can be plugged into a running domain besides those that it was started with.
pub const SPARE_PORTS: usize = 8;

/// What a domain has at this moment of what can be changed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hardware {
    /// Virtual processors that its guest can use.
    pub vcpus: u32,
    /// Fewest of them without a restart.
    pub min_vcpus: u32,
    /// Most of them without a restart.
    pub max_vcpus: u32,
    /// Memory that its guest can use, in MiB.
    pub memory_mib: u64,
    /// Least of it without a restart, in MiB.
    pub min_memory_mib: u64,
    /// Most of it without a restart, in MiB.
    pub max_memory_mib: u64,
    /// Whether it can have a maximum of memory that is more than what it starts with.
    pub hot_memory: bool,
    /// Disks, and the volume of the first boot, by name.
    pub disks: BTreeMap<String, Attached>,
    /// Network interfaces by name.
    pub nics: BTreeSet<String>,
    /// Devices that can still be plugged in without a restart.
    pub free_ports: usize,
}

/// A disk as a domain has it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Attached {
    /// Its size in MiB.
    pub size_mib: u64,
    /// The pool that its file is in; `None` where that is none of this host's.
    pub pool: Option<String>,
    /// How much the guest may read and write there.
    #[serde(default)]
    pub limits: DiskLimits,
    /// Its copy in another pool, if one is being made.
    #[serde(default)]
    pub copy: Option<DiskCopy>,
}

impl Attached {
    /// A disk that is as the specification says.
    pub fn of(disk: &Disk) -> Self {
        Self {
            size_mib: disk.size_mib,
            pool: Some(disk.pool.clone()),
            limits: disk.limits,
            copy: None,
        }
    }

    /// Whether its file, or a copy of it, is in this pool.
    pub fn is_in(&self, pool: &str) -> bool {
        let copy = self.copy.as_ref().and_then(|copy| copy.pool.as_deref());
        self.pool.as_deref() == Some(pool) || copy == Some(pool)
    }
}

/// How far a disk has been copied to another pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCopy {
    /// That pool; `None` where it is none of this host's.
    pub pool: Option<String>,
    /// How much of it is there.
    pub percent: u8,
    /// The copy is as the disk is, and stays so: the disk can be moved there.
    pub ready: bool,
}

impl Hardware {
    /// What a domain has that was just started with this specification.
    pub fn of(spec: &Spec) -> Self {
        Self {
            vcpus: spec.vcpus,
            min_vcpus: 1,
            max_vcpus: spec.most_vcpus(),
            memory_mib: spec.memory_mib,
            min_memory_mib: spec.memory_mib,
            max_memory_mib: spec.most_memory_mib(),
            hot_memory: true,
            disks: spec
                .volumes()
                .map(|disk| (disk.name.clone(), Attached::of(disk)))
                .collect(),
            nics: spec.nics.iter().map(|nic| nic.name.clone()).collect(),
            free_ports: SPARE_PORTS,
        }
    }
}

/// A change of a domain's hardware while it is defined. Devices by their names in the specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// So many virtual processors; while it runs.
    Vcpus(u32),
    /// So much memory, in MiB; while it runs.
    MemoryMib(u64),
    /// Enlarge a disk to what the specification says, whether it runs or not.
    GrowDisk(String),
    /// Limit what the guest may read and write on a disk to what the specification says; while it runs.
    LimitDisk(String),
    /// Go on with the move of a disk to the pool that the specification says, whether it runs or not: begin to copy it there, end a
    /// copy in another pool, or, once the copy is whole, have the domain and its definition use it. Returns soon; how far the copy is
    /// shows in [`Attached::copy`]. The old file stays.
    MoveDisk(String),
    /// Plug in a disk, whose volume is there; while it runs.
    AttachDisk(String),
    /// Ask the guest to let go of a disk; while it runs.
    DetachDisk(String),
    /// Plug in an interface; while it runs.
    AttachNic(String),
    /// Ask the guest to let go of an interface; while it runs.
    DetachNic(String),
}

/// A layer of a VM's disks: what was written to them since a snapshot was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerSeen {
    /// Whether all of its disks have it, so that the snapshot is there.
    pub whole: bool,
    /// Space that it takes, in bytes.
    pub written_bytes: u64,
}

/// The layers of a VM's disks. What is there tells what was done: a layer keeps its number for ever, and the numbers rise from the
/// base of a disk to its top.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layers {
    /// Those that disks of the domain have.
    pub there: BTreeMap<u32, LayerSeen>,
    /// Those whose files are there, and that no disk of the domain has.
    pub spare: BTreeSet<u32>,
    /// A merge is under way by itself.
    pub merging: bool,
    /// A merge has come so far that its disk can go on below: it waits for another [`LayerChange::Merge`].
    pub ready: bool,
    /// The definition of the domain is out of date: the next start would bring other layers.
    pub outdated: bool,
}

impl Layers {
    /// Whether all disks have a layer.
    pub fn has(&self, number: u32) -> bool {
        self.there.get(&number).is_some_and(|layer| layer.whole)
    }

    /// The number of the newest that a disk has; 0 where none has any.
    pub fn top(&self) -> u32 {
        self.there.keys().next_back().copied().unwrap_or(0)
    }
}

/// A change of the layers of all disks of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerChange {
    /// A new layer on the newest, at one moment on all disks.
    Add(u32),
    /// A new layer on what is below another one, in whose place it is from then on; of a domain that is off.
    Revert {
        /// The new one.
        number: u32,
        /// The other.
        replaces: u32,
    },
    /// What is in a layer goes down into what is below it. A domain that runs goes on: that this succeeds says that it was begun,
    /// or ended, whichever was next.
    Merge(u32),
    /// The files of one that no disk has.
    Remove(u32),
}

/// Everything that is needed to define a VM here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// UUID of the VM.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// Mark to leave in the domain.
    pub mark: Mark,
    /// What it is made of, MAC addresses filled in.
    pub spec: Spec,
    /// Documents of its first boot; empty once its disks are made.
    pub documents: Documents,
    /// Networks that its interfaces plug into, where its first boot is to tell of them.
    pub networks: Vec<Network>,
    /// Numbers of the layers that its snapshots have.
    pub layers: BTreeSet<u32>,
    /// Where it is on the host, of one that is fitted onto NUMA nodes.
    pub places: Vec<NumaPlace>,
    /// PCI devices of the host that are its own.
    pub devices: Vec<Device>,
}

/// How to send a VM to another host.
#[derive(Debug, Clone)]
pub struct Migrate {
    /// The migration.
    pub migration: MigrationId,
    /// The VM as it will be defined at the destination.
    pub definition: Definition,
    /// Unix socket that leads to the destination's [`Hypervisor::control_socket`].
    pub control: PathBuf,
    /// Unix socket for the memory; at the destination QEMU listens at the same path.
    pub memory: PathBuf,
    /// Unix socket for the disks that are copied; at the destination QEMU listens at the same path.
    pub disks: PathBuf,
    /// Longest planned stop, in ms.
    pub max_downtime_ms: u32,
    /// Limit of the streams in MiB per second; 0 means none.
    pub bandwidth_mib_per_second: u32,
    /// It arrives frozen, and runs nowhere until somebody lets it go on. libvirt's source lets its own copy go on when the
    /// destination's last answer is lost, although the destination may have begun: then both would run.
    pub arrives_paused: bool,
    /// When the guest's processors stopped here to go on there; set by the hypervisor before `released`, where it is known.
    pub stopped: Arc<OnceLock<Instant>>,
    /// Cancelled by the hypervisor as soon as the source's copy can never run again, which may be long before the call
    /// ends; not cancelled where that cannot be told earlier.
    pub released: CancellationToken,
}

/// Progress of a transfer, as the source's hypervisor tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Memory to copy, in bytes.
    pub memory_total_bytes: u64,
    /// Memory copied, in bytes.
    pub memory_processed_bytes: u64,
    /// Memory left, in bytes.
    pub memory_remaining_bytes: u64,
    /// Disk data to copy, in bytes.
    pub disk_total_bytes: u64,
    /// Disk data copied, in bytes.
    pub disk_processed_bytes: u64,
    /// Disk data left, in bytes.
    pub disk_remaining_bytes: u64,
    /// Transfer rate, in bytes per second.
    pub rate_bytes_per_second: u64,
    /// Memory the guest writes, in bytes per second; 0 until measured.
    pub dirty_rate_bytes_per_second: u64,
    /// Expected stop, in ms; 0 until known.
    pub expected_downtime_ms: u64,
    /// Measured stop, in ms; known at the end.
    pub downtime_ms: u64,
    /// Passes over the memory.
    pub iteration: u64,
    /// Time since the transfer began, in ms.
    pub elapsed_ms: u64,
}

/// A hint that something changed. Hints may be lost or doubled; whoever gets one looks for himself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// Look at this domain.
    Domain(VmId),
    /// Look at everything: the connection was lost or regained.
    All,
}

/// State of the connection to the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// It answers.
    Up,
    /// It does not; says why.
    Down(String),
}

/// What kind of hypervisor this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Names and versions, for example "QEMU 10.0.2, libvirt 11.3.0".
    pub version: String,
    /// "kvm", "tcg" or "sim".
    pub accelerator: String,
    /// Why that accelerator.
    pub accelerator_reason: String,
    /// What guests can have here, ascending.
    pub guest_features: Vec<GuestFeature>,
}

/// See the module's documentation.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// What it is. 10 s.
    async fn about(&self) -> Result<About, Error>;

    /// Whether it answers at present.
    fn connection(&self) -> watch::Receiver<Connection>;

    /// Hints of changes from now on. A receiver that lags must treat it as [`Hint::All`].
    fn hints(&self) -> broadcast::Receiver<Hint>;

    /// Every domain, Dalgu's or not: complete, or an error. 10 s.
    async fn list(&self) -> Result<Vec<Domain>, Error>;

    /// One domain. 10 s.
    async fn get(&self, id: VmId) -> Result<Option<Domain>, Error>;

    /// Whether a call that changes this domain or its disks is under way in this process, also one whose caller was
    /// given [`Error::Timeout`]: what is seen meanwhile may change without any further call. Never waits.
    fn changing(&self, id: VmId) -> bool;

    /// Makes the disks that are not there yet, the volume of the first boot with them; never touches one that is, except to finish one that an earlier call
    /// left half-made. `incoming` makes them blank for a migration to fill, those on shared pools left alone. 10 min.
    async fn create_volumes(&self, definition: &Definition, incoming: bool) -> Result<(), Error>;

    /// What a domain has of what can be changed, as it runs, or else as it is defined; `None` where there is none. 10 s.
    async fn hardware(&self, id: VmId) -> Result<Option<Hardware>, Error>;

    /// Changes the hardware of a domain towards a definition; its persistent definition is [`Hypervisor::define`]'s. That it
    /// succeeds says that the guest was asked: whether it went along shows in [`Hypervisor::hardware`]. 120 s.
    async fn change_hardware(&self, definition: &Definition, change: &Change) -> Result<(), Error>;

    /// The layers of a domain's disks. 10 s.
    async fn layers(&self, definition: &Definition) -> Result<Layers, Error>;

    /// Changes the layers of a domain's disks, whether it runs or not; done when it is so. Whether the guest's file systems were
    /// written out and frozen meanwhile. 120 s; for a merge of a domain that is off an hour.
    async fn change_layers(&self, definition: &Definition, change: &LayerChange) -> Result<bool, Error>;

    /// Deletes one disk, of which the domain has nothing any more; done when there is nothing to delete. 60 s.
    async fn delete_volume(&self, id: VmId, disk: &Disk) -> Result<(), Error>;

    /// Deletes the VM's disks; `keep_shared` leaves those on shared pools (the VM lives on elsewhere). Done when there
    /// is nothing to delete. 60 s.
    async fn delete_volumes(&self, id: VmId, keep_shared: bool) -> Result<(), Error>;

    /// Deletes the file of a volume of the site, which no domain here has; `keep_shared` leaves one on a shared pool (another host goes
    /// on with it). Done when there is nothing to delete. 60 s.
    async fn purge_volume(&self, pool: &str, volume: VolumeId, keep_shared: bool) -> Result<(), Error>;

    /// Defines the domain, or defines it anew with other content; it stays as it is if it runs, and its disks stay in the pools
    /// that it has them in. Refuses to touch a domain without Dalgu's mark. 30 s.
    async fn define(&self, definition: &Definition) -> Result<(), Error>;

    /// From now on these VMs have these processors and nodes of the host, and what runs besides keeps off the processors that are their own.
    /// Definitions and starts that come later go by it too. 30 s.
    async fn pin(&self, places: &BTreeMap<VmId, Vec<NumaPlace>>) -> Result<(), Error>;

    /// Starts a defined domain; done when it runs already. 120 s.
    async fn start(&self, id: VmId) -> Result<(), Error>;

    /// Asks the guest to shut down; returns when it has been asked. 30 s.
    async fn shutdown(&self, id: VmId) -> Result<(), Error>;

    /// Powers off; done when it is off or gone. 60 s.
    async fn destroy(&self, id: VmId) -> Result<(), Error>;

    /// Asks the guest to reboot. 30 s.
    async fn reboot(&self, id: VmId) -> Result<(), Error>;

    /// Resets, as by the button. 30 s.
    async fn reset(&self, id: VmId) -> Result<(), Error>;

    /// Freezes; done when it is paused. 30 s.
    async fn pause(&self, id: VmId) -> Result<(), Error>;

    /// Lets it go on; done when it runs. 30 s.
    async fn resume(&self, id: VmId) -> Result<(), Error>;

    /// Forgets a domain that is off, with its NVRAM and the like; done when there is none. 30 s.
    async fn undefine(&self, id: VmId) -> Result<(), Error>;

    /// Usage of every running domain of Dalgu's; a domain that does not answer is left out. 10 s.
    async fn usage(&self) -> Result<Vec<(VmId, VmUsage)>, Error>;

    /// Where the VM's console log is; it may not exist yet. `None` where none is ever kept.
    fn console_log(&self, id: VmId) -> Option<PathBuf>;

    /// Unix socket through which a source's hypervisor reaches this one during a migration.
    fn control_socket(&self) -> &Path;

    /// Sends a VM; returns when the hypervisor says that the transfer has ended, which may be hours later, and has no
    /// deadline. Its result is a hint only: where the VM is, is found out by looking at both hosts.
    async fn migrate(&self, migrate: &Migrate) -> Result<Progress, Error>;

    /// Progress of the transfer under way, `None` when there is none. 5 s.
    async fn progress(&self, id: VmId) -> Result<Option<Progress>, Error>;

    /// Ends the transfer under way; done when there is none. 10 s.
    async fn abort_migration(&self, id: VmId) -> Result<(), Error>;

    /// Backs up a VM's disks as they are at one moment, while it runs or when it is off; returns when the files are whole, on
    /// stable storage and under their name, and has no deadline. After an error, or where it is given up, what is left is for
    /// [`Hypervisor::remove_backup`].
    async fn back_up(&self, order: &backup::Order) -> Result<backup::Manifest, Error>;

    /// How far the backup under way is: bytes copied, and all of them. `None` when none is under way. 5 s.
    async fn backup_progress(&self, id: VmId) -> Result<Option<(u64, u64)>, Error>;

    /// A backup that is whole; `None` when there is none. 10 s.
    async fn backup(&self, pool: &str, id: BackupId) -> Result<Option<backup::Manifest>, Error>;

    /// Ends a backup where it is under way, and removes its files, whole or not, and the VM's checkpoint for it; done when there
    /// is nothing. 60 s.
    async fn remove_backup(&self, vm: VmId, pool: &str, id: BackupId) -> Result<(), Error>;

    /// What a pool holds of disks, volumes and backups, in the order of the paths. 10 s.
    async fn files(&self, pool: &str) -> Result<Vec<files::PoolFile>, Error>;
}
