//! Where the ledger's files are. Used by the ledger only; knows nothing of what is in them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use dalgu_proto::mutant::{self, Mutant};

/// Folders of the ledger.
const FOLDERS: [&str; 3] = ["vms", "migrations", "backups"];

/// Small files that outlive the program and the host's power. A name is `host.json`, `networks.json`, `removed-backups.json`, or `vms/`,
/// `migrations/` or `backups/` and a name ending in `.json`.
#[async_trait]
pub trait Files: Send + Sync {
    /// Every file that is there, with its name, in the order of the names.
    ///
    /// # Errors
    /// If one of them cannot be read.
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>>;

    /// Replaces a file, or makes it. When it returns, the new content is there also after a loss of power; when it fails or
    /// is interrupted, the old or the new one is, and never a part.
    ///
    /// # Errors
    /// If the new content is not certain to be kept.
    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()>;

    /// Removes a file, for good when it returns; done when there is none.
    ///
    /// # Errors
    /// If it may still be there.
    async fn remove(&self, name: &str) -> io::Result<()>;
}

/// What the ledger needs of a file system. Of what is done here only what was synced outlives a loss of power: a file's
/// content with the file, its name with the directory that it is in.
pub trait FileSystem: Clone + Send + Sync + 'static {
    /// Makes a directory; done when it is there.
    ///
    /// # Errors
    /// If it cannot be made.
    fn make_dir(&self, path: &Path) -> io::Result<()>;

    /// Names of what is in a directory.
    ///
    /// # Errors
    /// If it cannot be read.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Writes a file from its beginning, made if need be.
    ///
    /// # Errors
    /// If it may be there in part.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Syncs a file or a directory.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    fn sync(&self, path: &Path) -> io::Result<()>;

    /// Gives a file the name of another, which goes.
    ///
    /// # Errors
    /// If the old name may still count.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// If it may still be there, or never was.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The host's file system.
#[derive(Debug, Clone, Copy)]
pub struct Local;

impl FileSystem for Local {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            outcome => outcome,
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(path, bytes)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

/// A directory. What blocks on the disk runs on threads of its own, and goes on to its end when nobody waits any more.
#[derive(Debug, Clone)]
pub struct Directory<F = Local> {
    disk: F,
    dir: PathBuf,
}

impl Directory {
    /// A directory with the ledger's folders, made if need be. Blocks.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::open_on(Local, dir)
    }
}

#[async_trait]
impl<F: FileSystem> Files for Directory<F> {
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let own = self.clone();
        on_disk(move || own.read()).await
    }

    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        let (own, name) = (self.clone(), name.to_owned());
        on_disk(move || own.write(&name, &bytes)).await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        let (own, name) = (self.clone(), name.to_owned());
        on_disk(move || own.erase(&name)).await
    }
}

/// What is done on the disk. All of it blocks.
impl<F: FileSystem> Directory<F> {
    /// As [`Directory::open`], on any file system.
    ///
    /// # Errors
    /// If the folders cannot be made.
    pub fn open_on(disk: F, dir: &Path) -> io::Result<Self> {
        let own = Self {
            disk,
            dir: dir.to_owned(),
        };
        own.make(dir)?;
        FOLDERS
            .iter()
            .try_for_each(|folder| own.make(&dir.join(folder)))?;
        Ok(own)
    }

    /// Makes a directory that outlives a loss of power, with those above it that are missing. One that is there may have
    /// been made by a run that was killed before it synced it.
    fn make(&self, dir: &Path) -> io::Result<()> {
        let made = match self.disk.make_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match dir.parent() {
                Some(parent) => self.make(parent).and_then(|()| self.disk.make_dir(dir)),
                None => Err(error),
            },
            made => made,
        };
        made.and_then(|()| self.sync_parent(dir))
            .map_err(|error| at(dir, error))
    }

    /// Every file, as [`Files::load`].
    ///
    /// # Errors
    /// If one of them cannot be read.
    pub fn read(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        for folder in [""].iter().chain(&FOLDERS) {
            let dir = self.dir.join(folder);
            // A run that was killed may have renamed and not synced. What is read is acted upon, and must be there after the
            // next loss of power too.
            self.disk.sync(&dir).map_err(|error| at(&dir, error))?;
            for name in self.disk.list(&dir)? {
                // What was being written when the program ended bears another ending.
                if name.ends_with(".json") {
                    let path = dir.join(&name);
                    let bytes = self.disk.read(&path).map_err(|error| at(&path, error))?;
                    let separator = if folder.is_empty() { "" } else { "/" };
                    found.push((format!("{folder}{separator}{name}"), bytes));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Replaces a file, as [`Files::replace`]: new file, fsync, rename, fsync of the directory.
    ///
    /// # Errors
    /// If the new content is not certain to be kept.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.dir.join(name);
        let unfinished = path.with_extension("tmp");
        let steps = || {
            self.disk.write(&unfinished, bytes)?;
            if !mutant::on(Mutant::LedgerNotSynced) {
                self.disk.sync(&unfinished)?;
            }
            self.disk.rename(&unfinished, &path)?;
            self.sync_parent(&path)
        };
        steps().map_err(|error| at(&path, error))
    }

    /// Removes a file, as [`Files::remove`].
    ///
    /// # Errors
    /// If it may still be there.
    pub fn erase(&self, name: &str) -> io::Result<()> {
        let path = self.dir.join(name);
        match self.disk.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path, error)),
            _ => self.sync_parent(&path).map_err(|error| at(&path, error)),
        }
    }

    fn sync_parent(&self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => self.disk.sync(Path::new(".")),
            Some(parent) => self.disk.sync(parent),
            None => Ok(()),
        }
    }
}

/// Runs a disk operation away from the runtime's threads.
pub(crate) async fn on_disk<T: Send + 'static>(
    operation: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(operation).await {
        Ok(outcome) => outcome,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and nothing was begun.
            Err(error) => Err(io::Error::other(error)),
        },
    }
}

/// Says which file an error is about.
fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
