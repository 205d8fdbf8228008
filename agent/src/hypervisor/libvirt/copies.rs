//! Copies of the disks of domains that are off, made in the background: a disk's file, as it is, to another pool.
//!
//! The bytes of a guest are copied and never looked at, so that an overlay stays one and no format is believed. A copy is made
//! under a passing name, and is nothing until [`super::moving`] gives it its own. It ends with the agent, and before the domain
//! starts: what is copied must not change. Called on workers only: all but [`Copies::of`] may block.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use dalgu_proto::ids::VmId;
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use crate::images::{FileState, state};

/// So much is copied at once; between two pieces it can be ended.
const PIECE_BYTES: usize = 1 << 20;

/// How far a copy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// So much of it is there, in percent.
    Under(u8),
    /// It is whole, and on stable storage.
    Whole,
    /// It cannot be made.
    Failed(String),
}

/// What the thread of a copy tells.
#[derive(Debug, Default)]
struct Told {
    stop: AtomicBool,
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    /// The disk's file before anything of it was read.
    before: Mutex<Option<FileState>>,
    ended: Mutex<Option<Result<(), String>>>,
}

#[derive(Debug)]
struct Copy {
    target: PathBuf,
    told: Arc<Told>,
    thread: JoinHandle<()>,
}

/// All copies on a host.
#[derive(Debug, Default)]
pub(super) struct Copies(Mutex<HashMap<(VmId, String), Copy>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    /// The copy of a disk: where it is to be, and how far it is.
    pub(super) fn of(&self, id: VmId, disk: &str) -> Option<(PathBuf, State)> {
        let copies = lock(&self.0);
        let copy = copies.get(&(id, disk.to_owned()))?;
        Some((copy.target.clone(), copy.told.state()))
    }

    /// Whether a disk's file is still as it was when its copy was begun: somebody may have started the domain by other means.
    pub(super) fn is_of(&self, id: VmId, disk: &str, source: &Path) -> io::Result<bool> {
        let told = lock(&self.0)
            .get(&(id, disk.to_owned()))
            .map(|copy| copy.told.clone());
        let now = state(&File::open(source)?)?;
        Ok(told.is_some_and(|told| lock(&told.before).as_ref() == Some(&now)))
    }

    /// Begins to copy a disk's file to an empty one, for a disk that is to be at `target`.
    pub(super) fn begin(
        &self,
        id: VmId,
        disk: &str,
        (source, partial): (PathBuf, PathBuf),
        target: PathBuf,
    ) -> io::Result<()> {
        self.end(id, Some(disk));
        let told = Arc::<Told>::default();
        let tells = told.clone();
        let thread = std::thread::Builder::new()
            .name("disk-copy".to_owned())
            .spawn(move || {
                let copied = copy(&source, &partial, &tells).map_err(|error| error.to_string());
                *lock(&tells.ended) = Some(copied);
            })?;
        let copy = Copy { target, told, thread };
        lock(&self.0).insert((id, disk.to_owned()), copy);
        Ok(())
    }

    /// Ends the copy of a disk, or of each disk of a domain, and forgets it. Nothing is written any more when this returns.
    pub(super) fn end(&self, id: VmId, disk: Option<&str>) {
        let ended: Vec<_> = {
            let mut copies = lock(&self.0);
            let meant = |(vm, name): &(VmId, String)| *vm == id && disk.is_none_or(|disk| disk == name);
            copies.extract_if(|key, _| meant(key)).collect()
        };
        for (_, copy) in ended {
            copy.told.stop.store(true, Ordering::Relaxed);
            // It tells of its own end; one that panicked has told nothing, and has ended too.
            let _ = copy.thread.join();
        }
    }
}

impl Told {
    fn state(&self) -> State {
        match &*lock(&self.ended) {
            Some(Ok(())) => State::Whole,
            Some(Err(error)) => State::Failed(error.clone()),
            None => {
                let total = self.total_bytes.load(Ordering::Relaxed).max(1);
                let percent = self.done_bytes.load(Ordering::Relaxed).saturating_mul(100) / total;
                State::Under(u8::try_from(percent.min(99)).unwrap_or(99))
            }
        }
    }
}

/// Copies what a file holds, and not its holes.
fn copy(source: &Path, partial: &Path, told: &Told) -> io::Result<()> {
    let source = File::open(source)?;
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(partial)?;
    *lock(&told.before) = Some(state(&source)?);
    let length = source.metadata()?.len();
    told.total_bytes.store(length, Ordering::Relaxed);
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while let Some((mut from, to)) = data(&source, at, length)? {
        while from < to {
            if told.stop.load(Ordering::Relaxed) {
                return Err(io::Error::other("it was ended"));
            }
            let most = usize::try_from(to - from).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let read = source.read_at(&mut piece[..most], from)?;
            if read == 0 {
                return Err(io::Error::other("the disk's file became shorter"));
            }
            target.write_all_at(&piece[..read], from)?;
            from += read as u64;
            told.done_bytes.store(from, Ordering::Relaxed);
        }
        at = to;
    }
    target.set_len(length)?;
    target.sync_all()
}

/// The next part of a file that holds something.
fn data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let offset = i64::try_from(at).map_err(io::Error::other)?;
    let seek = |offset, whence| match lseek(file.as_fd(), offset, whence) {
        Ok(at) => Ok(Some(at)),
        // There is nothing behind it.
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let Some(from) = seek(offset, Whence::SeekData)? else {
        return Ok(None);
    };
    let to = seek(from, Whence::SeekHole)?.and_then(|to| u64::try_from(to).ok());
    let from = u64::try_from(from).map_err(io::Error::other)?;
    Ok(Some((from, to.unwrap_or(length).min(length))))
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use uuid::Uuid;

    use super::*;

    fn id() -> VmId {
        VmId::from_uuid(Uuid::from_u128(7))
    }

    /// Waits until a copy has ended.
    async fn ended(copies: &Copies) -> State {
        let ends = async {
            loop {
                match copies.of(id(), "data").unwrap().1 {
                    State::Under(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    state => return state,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), ends).await.unwrap()
    }

    #[tokio::test]
    async fn a_copy_holds_the_same_bytes_and_no_more_room() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (source, partial) = (dir.path().join("a"), dir.path().join("a.partial"));
        let file = File::create(&source).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&vec![7; 3 << 20], 40 << 20).unwrap();
        file.set_len(64 << 20).unwrap();
        let copies = Copies::default();
        let target = dir.path().join("b");
        copies
            .begin(id(), "data", (source.clone(), partial.clone()), target.clone())
            .unwrap();
        assert_eq!(ended(&copies).await, State::Whole);
        assert_eq!(copies.of(id(), "data"), Some((target, State::Whole)));
        assert!(fs::read(&source).unwrap() == fs::read(&partial).unwrap());
        assert!(fs::metadata(&partial).unwrap().blocks() * 512 < 8 << 20);
        copies.end(id(), None);
        assert_eq!(copies.of(id(), "data"), None);
    }

    #[tokio::test]
    async fn a_copy_that_cannot_be_made_says_why_and_one_that_is_ended_writes_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let (source, partial) = (dir.path().join("a"), dir.path().join("a.partial"));
        let copies = Copies::default();
        let begin = || {
            let files = (source.clone(), partial.clone());
            copies.begin(id(), "data", files, dir.path().join("b"))
        };
        begin().unwrap();
        assert!(matches!(ended(&copies).await, State::Failed(_)));
        fs::write(&source, vec![1; 64 << 20]).unwrap();
        begin().unwrap();
        copies.end(id(), Some("data"));
        let size = fs::metadata(&partial).map_or(0, |file| file.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(fs::metadata(&partial).map_or(0, |file| file.len()), size);
    }
}
