//! A volume as it is stored.

use std::collections::BTreeMap;

use dalgu_proto::{
    ids::{HostName, VolumeId, VolumeName},
    image::Digest,
    vm::{CloneMode, Disk, DiskFormat, Firmware, VolumeRef},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A volume. Who has it follows from the VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Capacity.
    pub size_mib: u64,
    /// Pool of hosts that holds it.
    pub pool: String,
    /// File format.
    #[serde(default)]
    pub format: DiskFormat,
    /// Image of the catalogue that it starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Digest of that image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// How it is made from that; decided when it is first attached.
    #[serde(default)]
    pub clone_mode: CloneMode,
    /// What starts the operating system of that image; kept here, since a full copy outlives the image.
    #[serde(default, skip_serializing_if = "Firmware::is_bios")]
    pub firmware: Firmware,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// Host of the VM that has it, or had it last; from the first one on its file is there, or is about to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// A host has said that its file is there: from now on one that is missing is lost, and never made anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub made: bool,
    /// When it was created.
    pub create_time: Timestamp,
    /// When its deletion was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_time: Option<Timestamp>,
    /// From when on its file is removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purge_time: Option<Timestamp>,
    /// A host may have been told to remove its file: there is no way back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub purging: bool,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

impl VolumeRecord {
    /// A VM's disk that is this volume, with what the VM says of it besides.
    pub fn as_disk(&self, given: &Disk) -> Disk {
        Disk {
            name: given.name.clone(),
            size_mib: self.size_mib,
            pool: self.pool.clone(),
            image: self.image.clone(),
            format: self.format,
            digest: self.digest.clone(),
            clone_mode: self.clone_mode,
            volume: Some(VolumeRef {
                name: self.name.clone(),
                id: Some(self.id),
                format: None,
            }),
            limits: given.limits,
            backup: None,
        }
    }
}
