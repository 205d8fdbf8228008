//! What hosts' pools hold, as they say when they are asked. Never stored.

use dalgu_proto::ids::{BackupId, VmId, VolumeId};

/// A file of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFile {
    /// Where it is below the pool's directory; ends in `/` for a directory that holds nothing.
    pub path: String,
    /// What it belongs to, by where it is.
    pub of: FileOf,
    /// It is not whole.
    pub partial: bool,
    /// Its size.
    pub size_bytes: u64,
    /// Room that it takes.
    pub allocated_bytes: u64,
}

/// What a file of a pool belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileOf {
    /// It is a part of a volume.
    Volume {
        /// The volume.
        id: VolumeId,
        /// Number of the layer; 0 for the base.
        layer: u32,
    },
    /// It is a part of a backup.
    Backup(BackupId),
    /// It is in the folder of a VM.
    Disk {
        /// The VM.
        vm: VmId,
        /// Name of the disk; empty where it is none.
        disk: String,
        /// Number of the layer; 0 for the base.
        layer: u32,
    },
    /// It is in a folder of Dalgu's, and none of these.
    Unknown,
}
