//! What is in a pool. Called on workers; may block for as long as a file system hangs.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use super::{Pool, Storage, failed};
use crate::hypervisor::{
    Error,
    files::{MOST, Of, PoolFile, of},
};

fn named(path: &Path) -> io::Result<Vec<(String, Metadata)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        match entry.metadata() {
            Ok(metadata) => found.push((entry.file_name().to_string_lossy().into_owned(), metadata)),
            // It has gone meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found)
}

/// What is in a directory; nothing where that has gone meanwhile.
fn inside(path: &Path) -> io::Result<Vec<(String, Metadata)>> {
    match named(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn file(path: String, (of, partial): (Of, bool), metadata: &Metadata) -> PoolFile {
    let is_file = metadata.is_file();
    PoolFile {
        path,
        of,
        partial,
        size_bytes: if is_file { metadata.len() } else { 0 },
        allocated_bytes: if is_file { metadata.blocks() * 512 } else { 0 },
    }
}

/// Adds what a folder of Dalgu's holds.
fn add(found: &mut Vec<PoolFile>, pool: &Path, folder: &str, own: &Metadata) -> io::Result<()> {
    let entries = inside(&pool.join(folder))?;
    // The folders of volumes and of backups stay when the last of them goes.
    if let Some(empty) = of(folder, "").filter(|(of, _)| entries.is_empty() && *of != Of::Unknown) {
        found.push(file(format!("{folder}/"), empty, own));
    }
    for (name, metadata) in entries {
        let Some(what) = of(folder, &name) else {
            return Ok(());
        };
        let path = format!("{folder}/{name}");
        if folder != "backups" || !metadata.is_dir() {
            found.push(file(path, what, &metadata));
            continue;
        }
        let parts = inside(&pool.join(&path))?;
        if parts.is_empty() {
            found.push(file(format!("{path}/"), what.clone(), &metadata));
        }
        for (part, metadata) in parts {
            found.push(file(format!("{path}/{part}"), what.clone(), &metadata));
        }
    }
    Ok(())
}

fn list(pool: &Pool) -> io::Result<Vec<PoolFile>> {
    let mut found = Vec::new();
    for (folder, metadata) in named(&pool.path)? {
        if metadata.is_dir() && found.len() <= MOST {
            add(&mut found, &pool.path, &folder, &metadata)?;
        }
    }
    Ok(found)
}

impl Storage {
    /// What a pool holds; see [`crate::hypervisor::Hypervisor::files`].
    pub(in super::super) fn files(&self, pool: &str) -> Result<Vec<PoolFile>, Error> {
        let pool = self.pool(pool)?;
        pool.is_there()?;
        let found = list(pool).map_err(|error| failed(pool, error))?;
        match found.len() > MOST {
            false => Ok(found),
            true => Err(failed(
                pool,
                format!("it holds more than {MOST} files, too many to be told"),
            )),
        }
    }
}
