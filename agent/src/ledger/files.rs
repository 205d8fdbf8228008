//! Where the ledger's files are. Used by the ledger only; knows nothing of what is in them.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use async_trait::async_trait;

/// Folders of the ledger.
const FOLDERS: [&str; 2] = ["vms", "migrations"];

/// Small files that outlive the program and the host's power. A name is `host.json`, or `vms/` or `migrations/` and a
/// name ending in `.json`.
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

/// A directory. What blocks on the disk runs on threads of its own, and goes on to its end when nobody waits any more.
#[derive(Debug, Clone)]
pub struct Directory {
    dir: PathBuf,
}

impl Directory {
    /// A directory with the ledger's folders, made if need be. Blocks.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn open(dir: &Path) -> io::Result<Self> {
        for folder in FOLDERS {
            fs::create_dir_all(dir.join(folder))?;
        }
        Ok(Self { dir: dir.to_owned() })
    }
}

#[async_trait]
impl Files for Directory {
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let dir = self.dir.clone();
        on_disk(move || read_all(&dir)).await
    }

    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        let path = self.dir.join(name);
        on_disk(move || write(&path, &bytes).map_err(|error| at(&path, error))).await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.dir.join(name);
        on_disk(move || remove(&path).map_err(|error| at(&path, error))).await
    }
}

/// Runs a disk operation away from the runtime's threads.
async fn on_disk<T: Send + 'static>(
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

fn read_all(dir: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    for folder in ["", FOLDERS[0], FOLDERS[1]] {
        for entry in fs::read_dir(dir.join(folder))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            // What was being written when the program ended bears another ending.
            if name.ends_with(".json") {
                let bytes = fs::read(entry.path()).map_err(|error| at(&entry.path(), error))?;
                let separator = if folder.is_empty() { "" } else { "/" };
                found.push((format!("{folder}{separator}{name}"), bytes));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Says which file an error is about.
fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// New file, fsync, rename, fsync of the directory.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("tmp");
    let mut file = File::create(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    sync_parent(path)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_parent(path),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
