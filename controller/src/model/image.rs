//! An image of the catalogue as it is stored, and what hosts say that they have of images.

use std::{collections::BTreeMap, sync::Arc};

use dalgu_proto::{
    ids::{HostName, ImageId, ImageName},
    image::{Digest, Format},
    vm::Firmware,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ADMINISTRATOR, Fault};

/// How far an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// Its bytes have not all come yet.
    AwaitingUpload,
    /// Its host verifies and converts it.
    Importing,
    /// VMs can be made from it.
    Available,
    /// Refused.
    Failed,
    /// Being deleted.
    Deleting,
}

impl ImageState {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::AwaitingUpload,
        Self::Importing,
        Self::Available,
        Self::Failed,
        Self::Deleting,
    ];

    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AwaitingUpload => "awaiting_upload",
            Self::Importing => "importing",
            Self::Available => "available",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
        }
    }
}

/// Who may use an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// Every operator.
    Public,
    /// Its owner.
    Private,
}

/// Hosts that are to have an image ahead of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replicas {
    /// So many, or all where there are fewer.
    Count(u32),
    /// Every host.
    All,
}

/// An image as hosts keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// SHA-256 of it.
    pub digest: Digest,
    /// Size of it.
    pub stored_bytes: u64,
    /// Size of the disk it holds.
    pub virtual_size_bytes: u64,
}

/// An image of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: ImageName,
    /// Its version.
    pub version: String,
    /// Format of the file it is imported from.
    pub format: Format,
    /// Size of that file; 0 until it is known.
    pub size_bytes: u64,
    /// SHA-256 of that file; `None` until it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// Kind of operating system.
    #[serde(default)]
    pub os: String,
    /// What starts it.
    #[serde(default)]
    pub firmware: Firmware,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// Who entered it, or was given it since.
    pub owner: String,
    /// Who may use it.
    pub visibility: Visibility,
    /// Hosts that are to have it.
    pub replicas: Replicas,
    /// How far it is.
    pub state: ImageState,
    /// Host that takes, verifies and converts it; `None` for one that needed none of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_host: Option<HostName>,
    /// File of that host it is imported from; `None` for an upload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// When somebody last began to bring its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_time: Option<Timestamp>,
    /// What hosts keep of it, once it was imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
    /// When it was created.
    pub create_time: Timestamp,
    /// When its deletion was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_time: Option<Timestamp>,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

impl ImageRecord {
    /// As VMs name it: `debian:12`.
    pub fn reference(&self) -> String {
        format!("{}:{}", self.name, self.version)
    }

    /// The digest of what hosts keep of it.
    pub fn digest(&self) -> Option<&Digest> {
        self.content.as_ref().map(|content| &content.digest)
    }

    /// Whether the image is there for somebody, who may then change it.
    pub fn is_visible_to(&self, principal: &str) -> bool {
        self.is_usable_by(principal) || principal == ADMINISTRATOR
    }

    /// Whether somebody may make disks from it. An administrator who sees it may not, or a name without a version would mean to him
    /// what others keep for themselves: he gives it to himself first.
    pub fn is_usable_by(&self, principal: &str) -> bool {
        self.visibility == Visibility::Public || self.owner == principal
    }
}

/// What a host does with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImagePhase {
    /// Not said, or in a newer version's words: nothing follows from it.
    Unknown,
    /// An upload has begun.
    Receiving,
    /// All of an upload is there.
    Received,
    /// It is verified and converted.
    Importing,
    /// It is fetched.
    Fetching,
    /// It is there, whole and verified.
    Ready,
    /// Refused, or it cannot go on.
    Failed,
}

/// What is on a host of one import or one copy.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// What is done with it.
    pub phase: ImagePhase,
    /// Bytes that are there, or are verified and converted.
    pub bytes_done: u64,
    /// All the bytes.
    pub bytes_total: u64,
    /// Of an import that is ready: what hosts keep of it.
    pub content: Option<Content>,
    /// Of an import that is ready: SHA-256 of what was imported.
    pub source_sha256: Option<Digest>,
    /// Of an import that is ready: size of what was imported.
    pub source_bytes: u64,
    /// When a disk was last made from it there, or it came.
    pub last_use: Option<Timestamp>,
    /// The host says that a VM of its own has a disk made from it.
    pub in_use: bool,
    /// What is wrong.
    pub fault: Option<Fault>,
}

/// What is on a host of one image: which import or which copy, and how far.
#[derive(Debug, Clone, PartialEq)]
pub enum HeldImage {
    /// An import.
    Import(ImageId, Held),
    /// A copy.
    Copy(Digest, Held),
}

/// What is on a host of images, as it said last. Cheap to copy.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ImageStock {
    /// Imports by image.
    pub imports: BTreeMap<ImageId, Arc<Held>>,
    /// Copies by digest.
    pub copies: BTreeMap<Digest, Arc<Held>>,
    /// Bytes that they take.
    pub used_bytes: u64,
    /// Bytes that are free where they are kept.
    pub available_bytes: u64,
}

impl ImageStock {
    /// Takes over what is said of one.
    pub fn put(&mut self, image: HeldImage) {
        match image {
            HeldImage::Import(id, held) => drop(self.imports.insert(id, Arc::new(held))),
            HeldImage::Copy(digest, held) => drop(self.copies.insert(digest, Arc::new(held))),
        }
    }

    /// Whether a copy is there, whole and verified.
    pub fn has(&self, digest: &Digest) -> bool {
        self.copies
            .get(digest)
            .is_some_and(|held| held.phase == ImagePhase::Ready)
    }
}
