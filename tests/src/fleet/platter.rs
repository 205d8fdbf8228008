//! The disk under a host's ledger: it forgets what was not synced when the host loses power, and it can fail after any of
//! the calls that make up a write. The ledger's own way of writing runs on it as in the program.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use dalgu_agent::ledger::{Directory, FileSystem};

use crate::store::{
    Random,
    power::{Disk, Fate},
    trace::Call,
};

use super::lock;

/// Calls that change or sync the disk: a directory, a file, or its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// All work.
    End,
    /// So many work; the rest fails.
    Calls(u8),
    /// The sync of a directory fails, all else works.
    Name,
}

#[derive(Debug)]
struct Inner {
    disk: Disk,
    until: Until,
}

/// See the module. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct Platter(Arc<Mutex<Inner>>);

/// Where the ledger is on its disk.
fn root() -> &'static Path {
    Path::new("/host/ledger")
}

/// What is above it was there before Dalgu.
fn host() -> &'static Path {
    Path::new("/host")
}

impl Default for Platter {
    fn default() -> Self {
        let inner = Inner {
            disk: Disk::new(host()),
            until: Until::End,
        };
        Self(Arc::new(Mutex::new(inner)))
    }
}

impl Platter {
    /// The ledger's directory, made if need be.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(&self) -> io::Result<Directory<Self>> {
        Directory::open_on(self.clone(), root())
    }

    /// Does something to the ledger while the disk works as long as it says.
    ///
    /// # Errors
    /// If a call failed.
    pub fn work(&self, until: Until, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        lock(&self.0).until = until;
        let outcome = work();
        lock(&self.0).until = Until::End;
        outcome
    }

    /// What a file of the ledger has now.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        lock(&self.0).disk.read(&root().join(name))
    }

    /// Names of the ledger's files, without what is being written.
    pub fn names(&self) -> Vec<String> {
        let inner = lock(&self.0);
        let inside = inner
            .disk
            .names()
            .filter_map(|path| path.strip_prefix(root()).ok());
        let names = inside.filter_map(|path| path.to_str());
        names
            .filter(|name| name.ends_with(".json"))
            .map(str::to_owned)
            .collect()
    }

    /// The host loses power; `drawn` says what becomes of that which was not synced.
    pub fn cut(&self, drawn: u64) {
        let fate = match drawn % 4 {
            0 => Fate::Lost,
            1 => Fate::Kept,
            _ => Fate::Torn(Random::new(drawn)),
        };
        let mut inner = lock(&self.0);
        let left = inner.disk.left(&fate);
        inner.disk = Disk::new(host());
        for (path, bytes) in left {
            let path = host().join(path);
            let above = path.parent().unwrap_or_else(|| host());
            inner.make(above);
            inner.write(&path, &bytes);
            inner.sync(&path);
            inner.sync(above);
        }
    }
}

/// A descriptor that each call takes and leaves.
const FD: i32 = 3;

impl Inner {
    fn open(&mut self, path: &Path, create: bool) {
        self.disk.take(&Call::Open {
            fd: FD,
            path: path.to_owned(),
            create,
            truncate: create,
        });
    }

    fn write(&mut self, path: &Path, bytes: &[u8]) {
        self.open(path, true);
        self.disk.take(&Call::Write {
            fd: FD,
            at: None,
            bytes: bytes.to_vec(),
        });
    }

    fn sync(&mut self, path: &Path) {
        self.open(path, false);
        self.disk.take(&Call::Sync { fd: FD });
    }

    /// A directory that has survived, with those above it.
    fn make(&mut self, dir: &Path) {
        let mut above: Vec<PathBuf> = dir.ancestors().map(Path::to_owned).collect();
        above.retain(|dir| dir.starts_with(host()) && dir != host());
        for dir in above.into_iter().rev() {
            self.disk.take(&Call::MakeDir { path: dir.clone() });
            self.sync(dir.parent().unwrap_or_else(|| host()));
        }
    }

    /// A call that changes something or syncs.
    fn begin(&mut self, syncs_name: bool) -> io::Result<()> {
        let works = match &mut self.until {
            Until::End => true,
            Until::Calls(0) => false,
            Until::Calls(left) => {
                *left -= 1;
                true
            }
            Until::Name => !syncs_name,
        };
        if works {
            Ok(())
        } else {
            Err(io::Error::other("the disk did not confirm"))
        }
    }
}

impl FileSystem for Platter {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = lock(&self.0);
        inner.begin(false)?;
        inner.disk.take(&Call::MakeDir {
            path: path.to_owned(),
        });
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let inner = lock(&self.0);
        let inside = inner.disk.names().filter(|path| path.parent() == Some(dir));
        let names = inside.filter_map(|path| path.file_name()?.to_str().map(str::to_owned));
        Ok(names.collect())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let found = lock(&self.0).disk.read(path);
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut inner = lock(&self.0);
        inner.begin(false)?;
        inner.write(path, bytes);
        Ok(())
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        let mut inner = lock(&self.0);
        inner.begin(path.extension().is_none())?;
        inner.sync(path);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = lock(&self.0);
        inner.begin(false)?;
        inner.disk.take(&Call::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = lock(&self.0);
        inner.begin(false)?;
        let there = inner.disk.take(&Call::Unlink {
            path: path.to_owned(),
        });
        if there {
            Ok(())
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}
