//! The directory of the host's store of images, as the rest of the store sees it: [`super::Directory`] in the program,
//! [`super::Memory`] where a test has no files.
//!
//! Names are `<digest>.qcow2` for a copy, `<digest>.fetch` for what has come of one, `<uid>.upload` for what was uploaded,
//! `<uid>.making` for what an import makes, `<uid>.json` for what is known of an import.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use dalgu_proto::{
    ids::ImageId,
    image::{Digest, Format},
};
use jiff::Timestamp;
use ring::digest;
use tonic::codegen::Bytes;

use crate::image::{Inspected, Refusal};

/// Name of a copy.
pub fn copy_name(digest: &Digest) -> String {
    format!("{digest}.qcow2")
}

/// Name of what has come of a copy that is fetched.
pub(super) fn fetch_name(digest: &Digest) -> String {
    format!("{digest}.fetch")
}

/// Name of what was uploaded.
pub(super) fn upload_name(id: ImageId) -> String {
    format!("{id}.upload")
}

/// Name of what an import makes.
pub(super) fn making_name(id: ImageId) -> String {
    format!("{id}.making")
}

/// A file that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// When it was written or marked last.
    pub time: Timestamp,
}

/// What an import is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// What was uploaded.
    Upload,
    /// A file of the images directory.
    File(String),
}

/// An import.
#[derive(Debug, Clone)]
pub struct Order {
    /// The image.
    pub id: ImageId,
    /// Where its bytes are.
    pub origin: Origin,
    /// Format that they must have.
    pub format: Format,
    /// Size that they must have, if any is asked for.
    pub size_bytes: Option<u64>,
    /// SHA-256 that they must have, if any is asked for.
    pub sha256: Option<Digest>,
}

/// What an import has made, under its passing name and on stable storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// SHA-256 of what was imported.
    pub source_sha256: Digest,
    /// Size of what was imported.
    pub source_bytes: u64,
    /// SHA-256 of what was made.
    pub digest: Digest,
    /// Size of what was made.
    pub bytes: u64,
    /// Size of the disk in it.
    pub virtual_size_bytes: u64,
}

/// Why an import has made nothing.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// It is not what an image may be.
    #[error("the image is refused: {0}")]
    Refused(#[from] Refusal),
    /// It is not what was said.
    #[error("its SHA-256 is {found}, and {said} was said; copy it again, or say the right one")]
    Checksum {
        /// What was said.
        said: Digest,
        /// What it is.
        found: Digest,
    },
    /// It is not as long as was said.
    #[error("it has {found} bytes, and {said} were said; copy it again, whole")]
    Size {
        /// What was said.
        said: u64,
        /// What it has.
        found: u64,
    },
    /// Somebody wrote to it meanwhile.
    #[error("the file was written to while it was read")]
    Changed,
    /// It took too long.
    #[error("it took longer than {0:?}")]
    Late(std::time::Duration),
    /// It could not be done here.
    #[error("it cannot be converted here: {0}")]
    Here(String),
    /// A file could not be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Failed {
    /// Whether the same import may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(refusal) => matches!(refusal, Refusal::Unreadable { .. }),
            Self::Checksum { .. } | Self::Size { .. } => false,
            Self::Changed | Self::Late(_) | Self::Here(_) | Self::Io(_) => true,
        }
    }

    /// Stable reason for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused(Refusal::Unreadable {
                kind: io::ErrorKind::NotFound,
                ..
            }) => "FILE_NOT_FOUND",
            Self::Refused(refusal) if !matches!(refusal, Refusal::Unreadable { .. }) => "IMAGE_REFUSED",
            Self::Checksum { .. } => "CHECKSUM_MISMATCH",
            Self::Size { .. } => "SIZE_MISMATCH",
            Self::Late(_) => "IMPORT_TIMEOUT",
            Self::Refused(_) | Self::Changed | Self::Here(_) | Self::Io(_) => "STORAGE",
        }
    }
}

/// How far something is, for whoever looks on. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<(AtomicU64, AtomicU64)>);

impl Progress {
    /// Bytes that are done, of all.
    pub fn get(&self) -> (u64, u64) {
        let (done, total) = &*self.0;
        (done.load(Ordering::Relaxed), total.load(Ordering::Relaxed))
    }

    /// All the bytes are known.
    pub fn set_total(&self, bytes: u64) {
        self.0.1.store(bytes, Ordering::Relaxed);
    }

    /// So many bytes are done.
    pub fn set(&self, bytes: u64) {
        self.0.0.store(bytes, Ordering::Relaxed);
    }
}

/// See the module's documentation. What changes a name is on stable storage when it returns; content is after
/// [`Files::sync`].
#[async_trait]
pub trait Files: Send + Sync {
    /// Every file that is there.
    ///
    /// # Errors
    /// If that cannot be found out.
    async fn list(&self) -> io::Result<Vec<Entry>>;

    /// Reads at most so many bytes from a place on; none only at the end.
    ///
    /// # Errors
    /// If it cannot be read.
    async fn read(&self, name: &str, offset: u64, most: usize) -> io::Result<Bytes>;

    /// Writes bytes to a place; makes the file if need be.
    ///
    /// # Errors
    /// If they may not all have been written.
    async fn write(&self, name: &str, offset: u64, bytes: Bytes) -> io::Result<()>;

    /// Brings a file's content to stable storage.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    async fn sync(&self, name: &str) -> io::Result<()>;

    /// Gives a file the name of another, which goes.
    ///
    /// # Errors
    /// If the old name may still count.
    async fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file; done when there is none.
    ///
    /// # Errors
    /// If it may still be there.
    async fn remove(&self, name: &str) -> io::Result<()>;

    /// Sets a file's time. Not worth a sync.
    ///
    /// # Errors
    /// If it cannot be set.
    async fn mark(&self, name: &str, time: Timestamp) -> io::Result<()>;

    /// Bytes that are free there.
    ///
    /// # Errors
    /// If that cannot be found out.
    async fn available_bytes(&self) -> io::Result<u64>;

    /// Digest and length of a file, as it is on disk.
    ///
    /// # Errors
    /// If it cannot be read.
    async fn digest(&self, name: &str) -> io::Result<(Digest, u64)>;

    /// Judges a copy.
    ///
    /// # Errors
    /// If it is none.
    async fn inspect(&self, name: &str) -> Result<Inspected, Refusal>;

    /// Verifies an image and makes of it, under its passing name, what is to be kept. Ends early when it is dropped.
    ///
    /// # Errors
    /// See [`Failed`]; something may be left under the passing name.
    async fn import(&self, order: &Order, progress: &Progress) -> Result<Made, Failed>;

    /// Whether a VM's disk here has the copy behind it.
    ///
    /// # Errors
    /// If that cannot be found out.
    async fn backs_a_disk(&self, digest: &Digest) -> io::Result<bool>;
}

/// Computes a SHA-256.
#[derive(Clone)]
pub(super) struct Hasher(digest::Context);

impl Hasher {
    pub(super) fn new() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(self) -> Digest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        Digest::from_bytes(&bytes)
    }
}

/// Whether an import's source is what was said.
pub(super) fn check_source(order: &Order, found: &Digest, bytes: u64) -> Result<(), Failed> {
    if let Some(said) = order.size_bytes.filter(|said| *said != bytes) {
        return Err(Failed::Size { said, found: bytes });
    }
    match order.sha256.as_ref().filter(|said| *said != found) {
        Some(said) => Err(Failed::Checksum {
            said: said.clone(),
            found: found.clone(),
        }),
        None => Ok(()),
    }
}
