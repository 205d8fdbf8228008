//! Taking the bytes of an image that is to be imported. Each image has one writer at a time; what is acknowledged is on stable
//! storage, and what comes late, twice or too much is judged by its offset.

use dalgu_proto::{ids::ImageId, image::MAX_PIECE_BYTES};
use tokio_util::sync::CancellationToken;
use tonic::codegen::Bytes;

use super::{Error, Images, Import, files::upload_name, record::Record};

/// What has come is brought to stable storage after so many bytes.
const SYNC_BYTES: u64 = 4 << 20;

/// An upload under way. Dropping it leaves what was acknowledged for the next.
pub struct Upload {
    images: Images,
    id: ImageId,
    size: u64,
    written: u64,
    received: u64,
    cut: CancellationToken,
}

impl Images {
    /// Begins to take an image's bytes, or goes on where an upload before was broken off.
    ///
    /// # Errors
    /// If another call does so, if it does not fit, or if no bytes are awaited.
    pub async fn upload(&self, id: ImageId, size: u64) -> Result<Upload, Error> {
        let (received, cut) = self.claim(id, size)?;
        let mut upload = Upload {
            images: self.clone(),
            id,
            size,
            written: received,
            received,
            cut,
        };
        if let Err(error) = self.check_room().await {
            if received == 0 {
                self.state().imports.remove(&id);
            }
            return Err(error);
        }
        if received == 0 {
            upload.sync(false).await?;
        }
        self.changed();
        Ok(upload)
    }

    /// The only writer from now on; answers what is here.
    fn claim(&self, id: ImageId, size: u64) -> Result<(u64, CancellationToken), Error> {
        let mut state = self.state();
        let fresh = Record::Receiving {
            size_bytes: size,
            received_bytes: 0,
        };
        let import = state.imports.entry(id).or_insert_with(|| Import::new(fresh));
        if import.leaving {
            return Err(Error::Busy);
        }
        if import.uploading {
            return Err(Error::Uploading);
        }
        match import.record {
            Record::Receiving { size_bytes, .. } if size_bytes != size => Err(Error::OtherSize {
                before: size_bytes,
                now: size,
            }),
            Record::Receiving { received_bytes, .. } => {
                import.uploading = true;
                Ok((received_bytes, import.cut.clone()))
            }
            Record::Named | Record::Ready { .. } | Record::Refused { .. } => Err(Error::NotAwaited),
        }
    }
}

impl Upload {
    /// So many bytes from the beginning are on stable storage.
    pub const fn received(&self) -> u64 {
        self.received
    }

    /// All of it is here.
    pub const fn is_whole(&self) -> bool {
        self.received == self.size
    }

    /// Cancelled when it is to end, because its image is forgotten.
    pub const fn cut(&self) -> &CancellationToken {
        &self.cut
    }

    /// Takes the next bytes; true when more is on stable storage than before.
    ///
    /// # Errors
    /// If they are not the next ones, or cannot be written.
    pub async fn take(&mut self, offset: u64, bytes: Bytes) -> Result<bool, Error> {
        let length = bytes.len() as u64;
        if offset != self.written {
            return Err(Error::Offset {
                given: offset,
                next: self.written,
            });
        }
        if bytes.len() > MAX_PIECE_BYTES || length > self.size - self.written {
            return Err(Error::TooMuch { size: self.size });
        }
        if self.cut.is_cancelled() {
            return Err(Error::Busy);
        }
        if length > 0 {
            let name = upload_name(self.id);
            self.images.0.files.write(&name, offset, bytes).await?;
            self.written += length;
        }
        if self.written - self.received < SYNC_BYTES && self.written < self.size {
            return Ok(false);
        }
        self.keep().await
    }

    /// Brings what has come to stable storage; true when that is more than before.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn keep(&mut self) -> Result<bool, Error> {
        if self.written == self.received {
            return Ok(false);
        }
        self.sync(true).await?;
        Ok(true)
    }

    async fn sync(&mut self, content: bool) -> Result<(), Error> {
        if content {
            self.images.0.files.sync(&upload_name(self.id)).await?;
        }
        let record = Record::Receiving {
            size_bytes: self.size,
            received_bytes: self.written,
        };
        self.images.record(self.id, record).await?;
        self.received = self.written;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(import) = self.images.state().imports.get_mut(&self.id) {
            import.uploading = false;
        }
        self.images.changed();
    }
}
