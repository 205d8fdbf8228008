//! Backups of VMs and their schedules as they are stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dalgu_proto::{
    ids::{BackupId, HostName, PlacementGroupName, ScheduleName, VmId, VmName},
    image::Digest,
    placement::Toleration,
    time::TimeOfDay,
    vm::Spec,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{DrainMode, Fault, VmRecord};

/// What a backup is to hold, or holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupKind {
    /// What has changed since another, where that is possible; else everything.
    Auto,
    /// Everything.
    Full,
    /// What has changed since another.
    Incremental,
}

/// How far a backup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupState {
    /// Its host has not begun it.
    Pending,
    /// It is taken.
    Running,
    /// It is whole.
    Available,
    /// It was not taken.
    Failed,
    /// It is being deleted.
    Deleting,
}

impl BackupState {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Running,
        Self::Available,
        Self::Failed,
        Self::Deleting,
    ];

    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Available => "available",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
        }
    }

    /// Whether its host has something to do for it.
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Pending | Self::Running | Self::Deleting)
    }
}

/// A disk's file in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupFile {
    /// Name of the disk.
    pub disk: String,
    /// Name of the file.
    pub file: String,
    /// Size of the file.
    pub size_bytes: u64,
    /// Bytes of it that take room.
    pub stored_bytes: u64,
    /// Size of the disk.
    pub virtual_size_bytes: u64,
    /// SHA-256 of the file.
    pub sha256: Digest,
}

/// What a VM was besides what it was made of, for the one that is made of its backup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmTraits {
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What became of it when its host was drained.
    #[serde(default)]
    pub drain_mode: DrainMode,
    /// Placement groups that it was in.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub placement_groups: BTreeSet<PlacementGroupName>,
    /// Taints of hosts that it put up with.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub tolerations: BTreeSet<Toleration>,
}

impl From<&VmRecord> for VmTraits {
    fn from(vm: &VmRecord) -> Self {
        Self {
            labels: vm.labels.clone(),
            drain_mode: vm.drain_mode,
            placement_groups: vm.placement_groups.clone(),
            tolerations: vm.tolerations.clone(),
        }
    }
}

/// A backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Its id; ids of later ones are greater.
    pub id: BackupId,
    /// The VM.
    pub vm: VmId,
    /// That VM's name.
    pub vm_name: VmName,
    /// What the VM was made of.
    pub spec: Spec,
    /// What the VM was besides; nothing in what an older controller has written.
    #[serde(default)]
    pub traits: VmTraits,
    /// Pool of the files.
    pub pool: String,
    /// Whether other hosts see the pool too.
    pub shared: bool,
    /// Host that takes it.
    pub host: HostName,
    /// What was asked for, then what it is.
    pub kind: BackupKind,
    /// The one that it may begin from, then the one that it needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// How far it is.
    pub state: BackupState,
    /// The guest's file systems were frozen.
    #[serde(default)]
    pub quiesced: bool,
    /// The VM had a checkpoint for it when it was taken.
    #[serde(default)]
    pub checkpoint: bool,
    /// Its files.
    #[serde(default)]
    pub files: Vec<BackupFile>,
    /// Why it is full although it need not have been.
    #[serde(default)]
    pub full_reason: String,
    /// It was due and could not be begun: no host was told of it, and nothing of it is anywhere.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unbegun: bool,
    /// When it was asked for.
    pub create_time: Timestamp,
    /// The moment that it is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point_time: Option<Timestamp>,
    /// When it was whole, or had failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete_time: Option<Timestamp>,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// The schedule that it was taken by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleName>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

impl BackupRecord {
    /// Room that its files take.
    pub fn stored_bytes(&self) -> u64 {
        let stored = self.files.iter().map(|file| file.stored_bytes);
        stored.fold(0, u64::saturating_add)
    }

    /// Whether it is being taken, or is to be.
    pub const fn is_under_way(&self) -> bool {
        matches!(self.state, BackupState::Pending | BackupState::Running)
    }
}

/// What a host says of a backup.
#[derive(Debug, Clone, PartialEq)]
pub enum BackupStanding {
    /// Nothing of it is there, or what is said is in a newer version's words.
    Unknown,
    /// Others are first.
    Waiting,
    /// So many bytes are copied, of so many.
    Running(u64, u64),
    /// It is whole.
    Ready(Box<BackupMade>),
    /// It was not taken.
    Failed(Fault),
}

/// What a backup that is whole has come to be.
#[derive(Debug, Clone, PartialEq)]
pub struct BackupMade {
    /// The one that it needs; `None` for a full one.
    pub parent: Option<BackupId>,
    /// Why it is full although it need not have been.
    pub full_reason: String,
    /// The guest's file systems were frozen.
    pub quiesced: bool,
    /// The VM has a checkpoint for it.
    pub checkpoint: bool,
    /// Its files.
    pub files: Vec<BackupFile>,
    /// The moment that it is of.
    pub point_time: Option<Timestamp>,
}

/// A schedule of backups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleRecord {
    /// Its name.
    pub name: ScheduleName,
    /// VMs that bear all these labels.
    pub selector: BTreeMap<String, String>,
    /// Pool of the files.
    pub pool: String,
    /// Time between two backups of a VM.
    pub every_seconds: u64,
    /// Time of day that this is counted from; `None` counts from each VM's last backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<TimeOfDay>,
    /// Incremental ones after each full one.
    pub incrementals: u32,
    /// So many of the newest are kept.
    pub keep_last: u32,
    /// Younger ones than so many days are kept too.
    pub keep_days: u32,
    /// Nothing is taken and nothing deleted.
    #[serde(default)]
    pub paused: bool,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// When it was created.
    pub create_time: Timestamp,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

impl ScheduleRecord {
    /// Time between two backups of a VM.
    pub const fn every(&self) -> Duration {
        Duration::from_secs(self.every_seconds)
    }

    /// Whether it is for a VM with these labels.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        super::matches(labels, &self.selector)
    }
}
