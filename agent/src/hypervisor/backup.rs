//! What is said of backups: what is asked for, and the manifest of one that is whole. Pure; used by the trait, by both
//! hypervisors, and by the host's own account of its backups.

use dalgu_proto::{
    ids::{BackupId, VmId, VmName},
    image::Digest,
    vm::Spec,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Version of the manifest that is written.
pub const MANIFEST_VERSION: u32 = 1;

/// What a backup is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// What has changed since its parent, where that is possible; else everything.
    Auto,
    /// Everything.
    Full,
    /// What has changed since its parent.
    Incremental,
}

/// A backup that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The backup; also the name of the VM's checkpoint.
    pub id: BackupId,
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// What it is made of.
    pub spec: Spec,
    /// Pool for the files.
    pub pool: String,
    /// What it is to hold.
    pub wanted: Wanted,
    /// The backup that it may begin from.
    pub parent: Option<BackupId>,
}

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Kind {
    /// Everything.
    Full,
    /// What has changed since another.
    Incremental {
        /// That other.
        parent: BackupId,
    },
}

/// A disk's file in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupFile {
    /// Name of the disk.
    pub disk: String,
    /// Name of the file; it ends in its format.
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

/// What a backup is, as it is kept beside its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this form: [`MANIFEST_VERSION`].
    pub version: u32,
    /// The backup.
    pub backup: BackupId,
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// What it was made of.
    pub spec: Spec,
    /// What the backup holds.
    pub kind: Kind,
    /// Why it is full although it need not have been.
    pub full_reason: Option<String>,
    /// The guest's file systems were frozen.
    pub quiesced: bool,
    /// The VM has a checkpoint for it.
    pub checkpoint: bool,
    /// The moment that it is of.
    pub point_time: Timestamp,
    /// Its files, in the order of the disks.
    pub files: Vec<BackupFile>,
}

impl Manifest {
    /// The file of a disk.
    pub fn file(&self, disk: &str) -> Option<&BackupFile> {
        self.files.iter().find(|file| file.disk == disk)
    }

    /// The backup that it needs.
    pub const fn parent(&self) -> Option<BackupId> {
        match self.kind {
            Kind::Full => None,
            Kind::Incremental { parent } => Some(parent),
        }
    }
}
