//! The records the controller keeps: what is stored, as JSON, and what is only remembered while it runs.
//!
//! Used by every module of the crate; holds data and small readings of it, no decisions. Stored types
//! ([`VmRecord`], [`HostRecord`], [`OperationRecord`], [`MigrationRecord`], [`ImageRecord`], [`NetworkRecord`], [`GroupRecord`],
//! [`PlacementGroupRecord`], [`VolumeRecord`], [`BackupRecord`], [`ScheduleRecord`], [`PlanRecord`], [`RefusedPlacement`], [`UsageRecord`], [`RequestRecord`], [`EventRecord`]) may get new fields with a serde default, but a field never changes its meaning. [`Observation`], [`HostLive`] and
//! [`MigrationLive`] are relearnt from the agents after each start and are never stored.

mod backup;
mod drain;
mod file;
mod image;
mod live;
mod migration;
mod network;
mod overcommit;
mod placement_group;
mod plan;
mod power;
mod pressure;
mod refused;
mod snapshot;
mod usage;
mod volume;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use dalgu_proto::{
    host::Inventory,
    ids::{
        BackupId, Epoch, Generation, GroupName, HostName, ImageId, MigrationId, NetworkName, OperationId,
        PlacementGroupName, PlanId, ScheduleName, Session, VmId, VmName, VolumeName,
    },
    placement::{Taint, Toleration},
    vm::{Device, Disk, NumaPlace, PowerState, RestartMode, Spec, first_boot::Documents},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::{
    backup::{
        BackupFile, BackupKind, BackupMade, BackupRecord, BackupStanding, BackupState, ScheduleRecord,
        VmTraits,
    },
    drain::{Direction, Drain, DrainMode, DrainState, DrainedVm, Stage},
    file::{FileOf, PoolFile},
    image::{
        Content, Held, HeldImage, ImagePhase, ImageRecord, ImageState, ImageStock, Replicas, Visibility,
    },
    live::{
        HostLive, HostState, MigrationLive, Observation, Pending, Refusal, Rival, SnapshotSeen, Unmanaged,
        VmFault, VmPhase,
    },
    migration::{Answer, MigrationRecord, Phase, Presence, Progress, Transfer},
    network::{GroupRecord, GroupUse, HostPlace, Members, NetworkRecord, Place},
    overcommit::{Bounds, Overcommit, Seen},
    placement_group::PlacementGroupRecord,
    plan::{PlanFigures, PlanKind, PlanRecord, PlanState, PlanStep, StepState},
    power::{HostPower, PowerPhase, Redfish},
    pressure::Pressure,
    refused::RefusedPlacement,
    snapshot::{SnapshotRecord, SnapshotState, Snapshots},
    usage::UsageRecord,
    volume::VolumeRecord,
};
use crate::placement::Decision;

/// Who sees and may change what others keep for themselves: the first operator, whom `dalgu-controller init` makes.
pub const ADMINISTRATOR: &str = "operator/admin";

/// Whether labels are all that a selector asks for.
pub fn matches(labels: &BTreeMap<String, String>, selector: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The codes of google.rpc.Code that faults bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Given up or replaced.
    Cancelled = 1,
    /// Not known.
    Unknown = 2,
    /// Not done in time.
    DeadlineExceeded = 4,
    /// There is no room.
    ResourceExhausted = 8,
    /// The state does not allow it.
    FailedPrecondition = 9,
    /// Broken off.
    Aborted = 10,
    /// A fault of the program.
    Internal = 13,
    /// Not reachable.
    Unavailable = 14,
}

/// A stable reason and a sentence: why something is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// google.rpc.Code as a number.
    pub code: i32,
    /// Stable reason in capitals.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Fault {
    /// Makes a fault.
    pub fn new(code: Code, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code: code as i32,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }
}

/// What a VM's processors should do, as the agent needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Rises with each change of what the agent is told.
    pub generation: Generation,
    /// Power state asked for last.
    pub power: PowerState,
    /// Rises when a power state is asked for anew.
    pub power_sequence: u64,
    /// Rises with each request to restart.
    pub restart_sequence: u64,
    /// How the last restart is to be done.
    pub restart_mode: RestartMode,
    /// Time a guest has to shut down; 0 powers it off at once.
    pub grace_period_seconds: u32,
}

/// A virtual machine as it should be, and who owns it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// What it is made of, MAC addresses filled in.
    pub spec: Spec,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// What becomes of it when its host is drained.
    #[serde(default, skip_serializing_if = "DrainMode::is_default")]
    pub drain_mode: DrainMode,
    /// Placement groups that it is in.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub placement_groups: BTreeSet<PlacementGroupName>,
    /// Taints of hosts that it puts up with.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub tolerations: BTreeSet<Toleration>,
    /// What its processors should do.
    pub intent: Intent,
    /// The only host that may run it.
    pub owner: HostName,
    /// Rises with each change of owner.
    pub epoch: Epoch,
    /// The decision that chose the owner.
    pub decision: Decision,
    /// When it was decided.
    pub decide_time: Timestamp,
    /// When the VM was created.
    pub create_time: Timestamp,
    /// When its deletion was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_time: Option<Timestamp>,
    /// Its place is not sure since a backup was restored: its host is told nothing of it until a host has shown it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unconfirmed: bool,
    /// Generation that the backup has of it, while its place is not sure: a host that was told it, or a newer one, knows
    /// better what its owner wants, and one that was not knows less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_generation: Option<Generation>,
    /// An operation on it has succeeded: its disks are there, or they are lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_made: bool,
    /// Documents of its first boot, until its disks are made.
    #[serde(default, skip_serializing_if = "Documents::is_empty")]
    pub documents: Documents,
    /// What its host may not have done yet of changes of what it is made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// Names of disks that are volumes whose files may not have been made yet.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub new_volumes: BTreeSet<String>,
    /// Its snapshots.
    #[serde(default, skip_serializing_if = "Snapshots::is_none")]
    pub snapshots: Snapshots,
    /// Where it is on its host, and on the other side of its migration, of one that is fitted onto NUMA nodes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub places: BTreeMap<HostName, Vec<NumaPlace>>,
    /// PCI devices of its host that are its own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<HostName, Vec<Device>>,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

/// Changes of what a VM is made of, until its host has carried them out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Generation of the last of them.
    pub generation: Generation,
    /// Most virtual processors that the VM may still have.
    pub vcpus: u32,
    /// Most memory that it may still have.
    pub memory_mib: u64,
    /// Disks that were left out and may still be there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<Disk>,
    /// Disks of the VM's own that were added after the others were made, and may not be made yet.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub added: BTreeSet<String>,
}

impl VmRecord {
    /// What its host may have of it: what it is made of, what that has no more since a change that is not carried out, and each
    /// disk once more for every snapshot. So much room is kept for it.
    pub fn held(&self) -> Cow<'_, Spec> {
        if self.change.is_none() && self.snapshots.all.is_empty() {
            return Cow::Borrowed(&self.spec);
        }
        let mut spec = self.spec.clone();
        if let Some(change) = &self.change {
            spec.vcpus = spec.vcpus.max(change.vcpus);
            spec.memory_mib = spec.memory_mib.max(change.memory_mib);
            spec.disks.extend(change.left_out.iter().cloned());
        }
        for _ in &self.snapshots.all {
            spec.disks.extend(self.spec.disks.iter().cloned());
        }
        Cow::Owned(spec)
    }

    /// Where it is on a host.
    pub fn places(&self, host: &HostName) -> &[NumaPlace] {
        self.places.get(host).map_or(&[], Vec::as_slice)
    }

    /// PCI devices that it has on a host.
    pub fn devices(&self, host: &HostName) -> &[Device] {
        self.devices.get(host).map_or(&[], Vec::as_slice)
    }

    /// Disks that may not have been made yet.
    pub fn unmade(&self) -> impl Iterator<Item = &Disk> {
        let added = |disk: &Disk| {
            let change = self.change.as_ref();
            change.is_some_and(|change| change.added.contains(&disk.name))
        };
        self.spec.disks.iter().filter(move |disk| match disk.volume {
            Some(_) => self.new_volumes.contains(&disk.name),
            None => !self.disks_made || added(disk),
        })
    }
}

/// A server with an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Its name.
    pub name: HostName,
    /// Where its agent listens.
    pub address: String,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What keeps VMs away that do not tolerate it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub taints: BTreeSet<Taint>,
    /// Virtual processors that may be reserved per logical processor.
    pub cpu_overcommit_ratio: f64,
    /// Memory kept for the host itself.
    pub reserved_memory_mib: u64,
    /// Most VMs that it takes; `None` for what the site says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vms_most: Option<u32>,
    /// Why it takes no new VMs; `None` when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cordon: Option<String>,
    /// How it was emptied last, or is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// How it is switched on and off; `None` where nobody has said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<HostPower>,
    /// Commands of another session are refused by the agent.
    pub session: Session,
    /// The kernel's boot id.
    pub boot_id: String,
    /// The machine's own id; empty where it has told none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    /// What it is made of.
    pub inventory: Inventory,
    /// Version of the agent.
    pub agent_version: String,
    /// When it first registered.
    pub create_time: Timestamp,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

impl HostRecord {
    /// Where its power is between on and off.
    pub fn phase(&self) -> PowerPhase {
        self.power.as_ref().map_or(PowerPhase::On, |power| power.phase)
    }

    /// Whether it is off, or on its way there or back, by the controller's own doing: nothing is placed on it, and no report is missed.
    pub fn is_asleep(&self) -> bool {
        self.phase() != PowerPhase::On
    }
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Create a VM.
    Create,
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Reboot or reset it.
    Restart,
    /// Freeze it.
    Pause,
    /// Let it go on.
    Resume,
    /// Move it.
    Migrate,
    /// Delete it.
    Delete,
    /// Make a snapshot of it.
    CreateSnapshot,
    /// Delete a snapshot of it.
    DeleteSnapshot,
    /// Go back to a snapshot of it.
    RevertSnapshot,
}

impl OperationKind {
    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Migrate => "migrate",
            Self::Delete => "delete",
            Self::CreateSnapshot => "create_snapshot",
            Self::DeleteSnapshot => "delete_snapshot",
            Self::RevertSnapshot => "revert_snapshot",
        }
    }

    /// Whether it asks for a power state, so that a newer such request replaces it.
    pub const fn is_power(self) -> bool {
        matches!(
            self,
            Self::Start | Self::Stop | Self::Restart | Self::Pause | Self::Resume
        )
    }
}

/// How far an operation is. Whether an active one is pending or running is derived from the observation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Not ended.
    Active,
    /// Ended as asked.
    Succeeded,
    /// Ended otherwise.
    Failed,
    /// Given up or replaced.
    Cancelled,
}

impl OperationState {
    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Work that goes on after its call has returned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// Its id; ids of later operations are greater.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// How far it is.
    pub state: OperationState,
    /// VM it works on.
    pub vm: VmId,
    /// That VM's name.
    pub vm_name: VmName,
    /// Generation it waits for.
    pub generation: Generation,
    /// Power state it waits for; `None` where it waits for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<PowerState>,
    /// What is added to the deadline: for a stop the guest's time to shut down, for a creation the time to fetch its images.
    #[serde(default)]
    pub grace_period_seconds: u32,
    /// For a migration: its record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// The caller's request id; empty when none was given.
    #[serde(default)]
    pub request_id: String,
    /// Who asked.
    pub principal: String,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
    /// What there is to say about its end.
    #[serde(default)]
    pub message: String,
    /// When it was accepted.
    pub create_time: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Timestamp>,
    /// Somebody asked to give it up.
    #[serde(default)]
    pub cancel_requested: bool,
}

impl OperationRecord {
    /// Whether it has not ended.
    pub fn is_active(&self) -> bool {
        self.state == OperationState::Active
    }
}

/// What a remembered request led to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// An operation.
    Operation(OperationId),
    /// A changed VM.
    Vm(VmName),
    /// A changed host.
    Host(HostName),
    /// A host was forgotten.
    HostDeleted,
    /// A changed site.
    Site,
    /// A new or changed image.
    Image(ImageId),
    /// An image's deletion was asked for.
    ImageDeleted,
    /// A new or changed network.
    Network(NetworkName),
    /// A network was deleted.
    NetworkDeleted,
    /// A new or changed security group.
    Group(GroupName),
    /// A security group was deleted.
    GroupDeleted,
    /// A new placement group.
    PlacementGroup(PlacementGroupName),
    /// A placement group was deleted.
    PlacementGroupDeleted,
    /// A new or changed volume.
    Volume(VolumeName),
    /// A new backup.
    Backup(BackupId),
    /// A backup's deletion was asked for.
    BackupDeleted,
    /// A new or changed schedule of backups.
    Schedule(ScheduleName),
    /// A schedule of backups was deleted.
    ScheduleDeleted,
    /// A new or changed plan.
    Plan(PlanId),
}

/// A request that bore an id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Who asked, and the id.
    pub key: String,
    /// Hash of the request's content.
    pub body: String,
    /// What it led to.
    pub outcome: Outcome,
    /// When it was accepted.
    pub time: Timestamp,
}

/// What kind of thing an event tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A VM.
    Vm,
    /// A host.
    Host,
    /// An operation.
    Operation,
    /// An image.
    Image,
    /// A network.
    Network,
    /// A security group.
    SecurityGroup,
    /// A volume.
    Volume,
    /// A plan of moves.
    Plan,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Position in the stream.
    pub revision: u64,
    /// When it was stored.
    pub time: Timestamp,
    /// What it tells of.
    pub kind: EventKind,
    /// Stable word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Name of the VM, host, network, group or volume, or an image's name and version.
    pub subject: String,
    /// Operation it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// Nobody else is told but the administrator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only_for: Option<String>,
}

impl EventRecord {
    /// Whether somebody is told.
    pub fn is_for(&self, principal: &str) -> bool {
        let only = self.only_for.as_deref();
        only.is_none_or(|only| only == principal || principal == ADMINISTRATOR)
    }
}
