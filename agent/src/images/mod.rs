//! The host's store of images: copies by their digest, whole, verified and never written again.
//!
//! ```text
//!   upload ──> <uid>.upload ─┐
//!   images directory ────────┴─ import: verify, judge, convert ──> <uid>.making ─┐
//!   other hosts ── fetch ──> <digest>.fetch ── verify ───────────────────────────┴─ rename ──> <digest>.qcow2
//! ```
//!
//! [`Images`] is how the rest of the agent speaks to it: [`server`] for the controller and for other hosts, VM tasks for what
//! their disks are made from. Its state is behind one lock, which also decides between a VM that comes and the removal of what it
//! needs: a VM [holds](Images::hold) its images before it is written down, and what is held is not removed. What must outlive a
//! restart is read from the names in the directory and from the imports' small records. It decides nothing about which image
//! is to be where.

mod directory;
mod fetch;
mod files;
mod import;
mod memory;
mod peers;
mod record;
mod remove;
mod report;
pub mod server;
#[cfg(test)]
mod tests;
mod upload;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dalgu_proto::{
    ids::{HostName, ImageId, VmId},
    image::Digest,
    time::Clock,
};
use futures::FutureExt as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::vm::status::Failure;
use record::Record;

pub use directory::{Directory, FileState, state};
pub use fetch::Awaited;
pub use files::{Entry, Failed, Files, Made, Order, Origin, Progress, copy_name};
pub use memory::Memory;
pub use peers::{Peers, TlsPeers};
pub use upload::Upload;

/// Bytes that are left free where images are kept: VMs' disks are often on the same file system.
const RESERVE_BYTES: u64 = 1 << 30;
/// Other hosts that may read from here at once.
const MAX_READERS: usize = 4;

/// A host that has an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The host.
    pub host: HostName,
    /// Where its agent listens, "address:port".
    pub address: String,
}

/// An image that is needed here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    /// Its digest.
    pub digest: Digest,
    /// Its size; 0 where that is not known, and then it cannot be fetched.
    pub size_bytes: u64,
    /// Who has it, the best first.
    pub sources: Vec<Source>,
}

/// Why something is not done with an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another call brings the same image.
    #[error("another call brings the same image")]
    Uploading,
    /// It is not where the next bytes belong.
    #[error("the bytes are for offset {given}, and {next} is the next")]
    Offset {
        /// In the request.
        given: u64,
        /// Where they belong.
        next: u64,
    },
    /// More bytes than were said.
    #[error("more bytes come than the {size} that were said")]
    TooMuch {
        /// So many were said.
        size: u64,
    },
    /// Another size than was said before.
    #[error("{before} bytes were said before, and now {now}")]
    OtherSize {
        /// Before.
        before: u64,
        /// Now.
        now: u64,
    },
    /// It has been refused, or is a copy already.
    #[error("the image does not wait for bytes")]
    NotAwaited,
    /// It does not fit.
    #[error(
        "with what is under way {needed} bytes are to come, and {available} are free where images are kept, of which \
         {RESERVE_BYTES} stay so"
    )]
    NoRoom {
        /// So many are to come, for this and what else is under way.
        needed: u64,
        /// So many are free.
        available: u64,
    },
    /// Its bytes have not all come.
    #[error("the image's bytes have not all come")]
    Incomplete,
    /// A VM has a disk that was made from it, or an import that just ended led to it.
    #[error("a disk of this host was made from image {0}, or it was imported this moment")]
    InUse(Digest),
    /// It is being removed, or cannot be interrupted.
    #[error("what is here of the image is being removed; try again")]
    Busy,
    /// It is not here.
    #[error("image {0} is not here")]
    NotHere(Digest),
    /// Others read already.
    #[error("{MAX_READERS} others read from this host already")]
    TooManyReaders,
    /// A file cannot be read or written.
    #[error("the store of images cannot be read or written: {0}")]
    Io(#[from] io::Error),
}

/// What is whole.
#[derive(Debug, Clone, Copy)]
struct Whole {
    bytes: u64,
    virtual_size_bytes: u64,
    last_use: Timestamp,
}

/// What is known of an import.
#[derive(Debug)]
struct Import {
    record: Record,
    /// Somebody brings its bytes.
    uploading: bool,
    /// It is verified and converted.
    running: Option<Progress>,
    /// Why it failed last, if trying again may help.
    trouble: Option<Failure>,
    /// It is to be forgotten: nothing new begins.
    leaving: bool,
    /// Ends what is under way.
    cut: CancellationToken,
}

impl Import {
    fn new(record: Record) -> Self {
        Self {
            record,
            uploading: false,
            running: None,
            trouble: None,
            leaving: false,
            cut: CancellationToken::new(),
        }
    }

    const fn is_at_work(&self) -> bool {
        self.uploading || self.running.is_some()
    }
}

/// What is known of a fetch that has not ended.
#[derive(Debug)]
struct Fetch {
    need: Need,
    progress: Progress,
    running: bool,
    trouble: Option<Failure>,
    cut: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    copies: BTreeMap<Digest, Whole>,
    imports: BTreeMap<ImageId, Import>,
    fetches: BTreeMap<Digest, Fetch>,
    /// Copies that are being removed.
    removing: BTreeSet<Digest>,
    /// What each VM's disks were made from, or will be.
    held: BTreeMap<VmId, BTreeSet<Digest>>,
    available_bytes: u64,
}

impl State {
    fn is_held(&self, digest: &Digest) -> bool {
        self.held.values().any(|held| held.contains(digest))
    }

    /// Whether an import that stays has led to it: the controller may not know that yet.
    fn led_to(&self, digest: &Digest) -> bool {
        let mut stay = self.imports.values().filter(|import| !import.leaving);
        stay.any(|import| matches!(&import.record, Record::Ready { digest: led_to, .. } if led_to == digest))
    }

    /// Bytes that uploads and fetches under way have still to bring.
    fn promised_bytes(&self) -> u64 {
        let uploads = self.imports.values().filter(|import| import.uploading);
        let uploads = uploads.map(|import| import.record.missing_bytes());
        let fetches = self.fetches.values().filter(|fetch| fetch.running);
        let fetches = fetches.map(|fetch| fetch.need.size_bytes.saturating_sub(fetch.progress.get().0));
        uploads.chain(fetches).fold(0, u64::saturating_add)
    }
}

struct Shared {
    own: HostName,
    files: Arc<dyn Files>,
    peers: Arc<dyn Peers>,
    clock: Clock,
    state: Mutex<State>,
    /// Counts what others may want to hear of at once.
    changes: watch::Sender<u64>,
    /// One import at a time.
    importing: Semaphore,
    readers: Arc<Semaphore>,
    /// Held while a copy comes or goes.
    moving: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Images(Arc<Shared>);

impl Images {
    /// Opens the store of a host: finds what is whole, what of uploads and fetches can go on, and removes what is neither.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub async fn open(
        own: HostName,
        files: Arc<dyn Files>,
        peers: Arc<dyn Peers>,
        clock: Clock,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let state = record::find(&*files, clock.now()).await?;
        Ok(Self(Arc::new(Shared {
            own,
            files,
            peers,
            clock,
            state: Mutex::new(state),
            changes: watch::Sender::default(),
            importing: Semaphore::new(1),
            readers: Arc::new(Semaphore::new(MAX_READERS)),
            moving: tokio::sync::Mutex::default(),
            tasks: TaskTracker::new(),
            stop,
        })))
    }

    /// A store in memory, as [`Images::open`].
    ///
    /// # Panics
    /// Never: nothing in memory is waited for.
    pub fn in_memory(
        own: HostName,
        memory: Memory,
        peers: impl Peers + 'static,
        clock: Clock,
        stop: CancellationToken,
    ) -> Self {
        Self::open(own, Arc::new(memory), Arc::new(peers), clock, stop)
            .now_or_never()
            .and_then(Result::ok)
            .expect("what is in memory is there at once")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is changed under the lock is whole after each statement, so a panic elsewhere does not spoil it.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that something began or ended.
    fn changed(&self) {
        self.0.changes.send_modify(|count| *count += 1);
    }

    /// Counts what began and ended.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.0.stop.clone();
        self.0.tasks.spawn(async move {
            // What is cut off by the end of the agent goes on at the next start, as after a crash.
            stop.run_until_cancelled(work).await;
        });
    }

    fn trouble(&self, reason: &str, message: String, retrying: bool) -> Failure {
        Failure {
            reason: reason.to_owned(),
            message,
            retrying,
            since: self.0.clock.now(),
        }
    }

    /// A VM's disks are made from these images, or will be; nothing else of its is, when it is written down in `full`.
    pub fn hold(&self, vm: VmId, digests: impl IntoIterator<Item = Digest>, full: bool) {
        let mut state = self.state();
        let held = state.held.entry(vm).or_default();
        if full {
            held.clear();
        }
        held.extend(digests);
        if held.is_empty() {
            state.held.remove(&vm);
        }
    }

    /// A disk was made from a copy.
    pub async fn used(&self, digest: &Digest) {
        let now = self.0.clock.now();
        match self.state().copies.get_mut(digest) {
            Some(copy) => copy.last_use = now,
            None => return,
        }
        if let Err(error) = self.0.files.mark(&copy_name(digest), now).await {
            // It may be removed earlier than it should be.
            tracing::warn!(%digest, %error, "the time of an image's last use cannot be kept");
        }
    }

    /// Finds out how much room there is.
    pub async fn look_at_room(&self) {
        if let Ok(bytes) = self.0.files.available_bytes().await {
            self.state().available_bytes = bytes;
        }
    }

    /// Whether everything that is under way fits.
    async fn check_room(&self) -> Result<(), Error> {
        self.look_at_room().await;
        let state = self.state();
        let (needed, available) = (state.promised_bytes(), state.available_bytes);
        match needed <= available.saturating_sub(RESERVE_BYTES) {
            true => Ok(()),
            false => Err(Error::NoRoom { needed, available }),
        }
    }

    /// Gives what is whole and verified, under its passing name and on stable storage, the name of a copy.
    async fn publish(&self, passing: &str, digest: &Digest, bytes: u64, disk_bytes: u64) -> io::Result<()> {
        let _moving = self.0.moving.lock().await;
        let here = self.state().copies.contains_key(digest);
        if here {
            return self.0.files.remove(passing).await;
        }
        let now = self.0.clock.now();
        self.0.files.mark(passing, now).await?;
        self.0.files.rename(passing, &copy_name(digest)).await?;
        let copy = Whole {
            bytes,
            virtual_size_bytes: disk_bytes,
            last_use: now,
        };
        self.state().copies.insert(digest.clone(), copy);
        tracing::info!(%digest, bytes, "an image is here");
        Ok(())
    }

    /// Waits for everything to end, after the token that it was given has been cancelled.
    pub async fn stopped(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}
