//! A store of images without files, for tests that run many hosts on one clock. It keeps what it is given, computes the same
//! digests and judges by the same rules; it has no `qemu-img`, and takes qcow2 and raw images as they are.

use std::{
    collections::BTreeMap,
    io::{self, Cursor},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use dalgu_proto::image::Digest;
use jiff::Timestamp;
use tonic::codegen::Bytes;

use super::files::{
    Entry, Failed, Files, Hasher, Made, Order, Origin, Progress, check_source, making_name, upload_name,
};
use crate::image::{self, Format, Inspected, Refusal};

#[derive(Debug, Clone)]
struct Content {
    bytes: Vec<u8>,
    time: Timestamp,
}

/// See the module's documentation. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Memory {
    files: Arc<Mutex<BTreeMap<String, Content>>>,
    images: Arc<BTreeMap<String, Vec<u8>>>,
    room_bytes: u64,
}

impl Memory {
    /// An empty store with room for so many bytes.
    pub fn new(room_bytes: u64) -> Self {
        Self {
            files: Arc::default(),
            images: Arc::default(),
            room_bytes,
        }
    }

    /// With files in the images directory.
    #[must_use]
    pub fn with_images(mut self, images: BTreeMap<String, Vec<u8>>) -> Self {
        self.images = Arc::new(images);
        self
    }

    /// Names of all that is kept.
    pub fn names(&self) -> Vec<String> {
        self.files().keys().cloned().collect()
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Content>> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn content(&self, name: &str) -> io::Result<Vec<u8>> {
        let found = self.files().get(name).map(|content| content.bytes.clone());
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn judge(bytes: &[u8]) -> Result<Inspected, Refusal> {
    match image::inspect(Cursor::new(bytes), Format::Qcow2) {
        Err(Refusal::NotSo { .. }) => image::inspect(Cursor::new(bytes), Format::Raw),
        judged => judged,
    }
}

fn digest(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

#[async_trait]
impl Files for Memory {
    async fn list(&self) -> io::Result<Vec<Entry>> {
        let entry = |(name, content): (&String, &Content)| Entry {
            name: name.clone(),
            bytes: content.bytes.len() as u64,
            time: content.time,
        };
        Ok(self.files().iter().map(entry).collect())
    }

    async fn read(&self, name: &str, offset: u64, most: usize) -> io::Result<Bytes> {
        let content = self.content(name)?;
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let end = begin.saturating_add(most).min(content.len());
        Ok(Bytes::copy_from_slice(&content[begin..end]))
    }

    async fn write(&self, name: &str, offset: u64, bytes: Bytes) -> io::Result<()> {
        let begin = usize::try_from(offset).map_err(io::Error::other)?;
        let end = begin + bytes.len();
        let mut files = self.files();
        let used: usize = files.values().map(|content| content.bytes.len()).sum();
        let content = files.entry(name.to_owned()).or_insert(Content {
            bytes: Vec::new(),
            time: Timestamp::UNIX_EPOCH,
        });
        let more = end.saturating_sub(content.bytes.len());
        if (used + more) as u64 > self.room_bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        content.bytes.resize(content.bytes.len().max(end), 0);
        content.bytes[begin..end].copy_from_slice(&bytes);
        Ok(())
    }

    async fn sync(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files();
        let content = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), content);
        Ok(())
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        self.files().remove(name);
        Ok(())
    }

    async fn mark(&self, name: &str, time: Timestamp) -> io::Result<()> {
        match self.files().get_mut(name) {
            Some(content) => content.time = time,
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    async fn available_bytes(&self) -> io::Result<u64> {
        let used: usize = self.files().values().map(|content| content.bytes.len()).sum();
        Ok(self.room_bytes.saturating_sub(used as u64))
    }

    async fn digest(&self, name: &str) -> io::Result<(Digest, u64)> {
        let content = self.content(name)?;
        Ok((digest(&content), content.len() as u64))
    }

    async fn inspect(&self, name: &str) -> Result<Inspected, Refusal> {
        let content = self.content(name);
        judge(&content.map_err(|error| Refusal::Unreadable {
            at: 0,
            kind: error.kind(),
        })?)
    }

    async fn import(&self, order: &Order, progress: &Progress) -> Result<Made, Failed> {
        let bytes = match &order.origin {
            Origin::Upload => self.content(&upload_name(order.id))?,
            Origin::File(name) => {
                let missing = || io::Error::from(io::ErrorKind::NotFound);
                self.images.get(name).cloned().ok_or_else(missing)?
            }
        };
        let length = bytes.len() as u64;
        progress.set_total(length);
        let source_sha256 = digest(&bytes);
        check_source(order, &source_sha256, length)?;
        let inspected = image::inspect(Cursor::new(&bytes), order.format)?;
        if !matches!(order.format, Format::Qcow2 | Format::Raw) {
            return Err(Failed::Here("this host has no qemu-img".to_owned()));
        }
        let name = making_name(order.id);
        self.write(&name, 0, bytes.into()).await?;
        progress.set(length);
        Ok(Made {
            digest: source_sha256.clone(),
            source_sha256,
            source_bytes: length,
            bytes: length,
            virtual_size_bytes: inspected.virtual_size_bytes,
        })
    }

    async fn backs_a_disk(&self, _: &Digest) -> io::Result<bool> {
        Ok(false)
    }
}
