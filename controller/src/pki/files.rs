//! Files of the authority: whole or absent, synced, keys private. Called by the parent module only.
//!
//! When root writes into a directory of another user (the service's, on a running system), that user gets the files:
//! the controller could not read its own key otherwise.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use super::{Error, certificate::Issued};

/// Mode of keys.
const PRIVATE: u32 = 0o600;
/// Mode of certificates and other files that hold no secret.
const PUBLIC: u32 = 0o644;

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { action, path, source }
}

/// Whether there is a file. Not being able to tell is an error, not a no.
pub(super) fn exists(path: &Path) -> Result<bool, Error> {
    path.try_exists().map_err(failed("look for", path))
}

/// Reads a text file.
pub(super) fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// Makes a directory for its owner only; one that exists stays as it is. Those above it are made as usual, so that
/// others may pass through to what is theirs.
pub(super) fn make_private_dir(dir: &Path) -> Result<(), Error> {
    let above = parent(dir);
    fs::create_dir_all(above).map_err(failed("make directory", above))?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        made => made.map_err(failed("make directory", dir)),
    }
}

/// Writes a file that everyone may read, in place of what is there.
pub(super) fn write_public(path: &Path, text: &str) -> Result<(), Error> {
    let temporary = write_temporary(path, text, PUBLIC)?;
    put_in_place(&temporary, path)
}

/// Writes a key that must not exist yet.
pub(super) fn write_new_private(path: &Path, text: &str) -> Result<(), Error> {
    let temporary = write_temporary(path, text, PRIVATE)?;
    // A link, unlike a rename, never replaces: of two that begin at once, one wins.
    let linked = fs::hard_link(&temporary, path).map_err(failed("make", path));
    fs::remove_file(&temporary).map_err(failed("remove", &temporary))?;
    linked?;
    sync_dir(path)
}

/// Writes `NAME.pem` and `NAME.key`, in place of what is there. Both are on disk before either is put in place.
pub(super) fn write_identity(dir: &Path, name: &str, issued: &Issued) -> Result<(), Error> {
    let (certificate, key) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
    let new_key = write_temporary(&key, &issued.key, PRIVATE)?;
    let new_certificate = write_temporary(&certificate, &issued.certificate, PUBLIC)?;
    put_in_place(&new_key, &key)?;
    put_in_place(&new_certificate, &certificate)
}

fn put_in_place(temporary: &Path, path: &Path) -> Result<(), Error> {
    fs::rename(temporary, path).map_err(failed("replace", path))?;
    sync_dir(path)
}

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."))
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    let dir = parent(path);
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync", dir))
}

/// Writes and syncs a file beside `path`, under a name of this process's own.
fn write_temporary(path: &Path, text: &str, mode: u32) -> Result<PathBuf, Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = parent(path).join(format!(".{name}.{}", uuid::Uuid::new_v4()));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(PRIVATE)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        // Not left to the umask, in either direction.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        give_to_owner_of_directory(&file, parent(path))?;
        file.sync_all()
    };
    match write() {
        Ok(()) => Ok(temporary),
        Err(source) => {
            // It may not be there; the error that counts is the one told.
            let _ = fs::remove_file(&temporary);
            Err(failed("write", path)(source))
        }
    }
}

fn give_to_owner_of_directory(file: &File, dir: &Path) -> io::Result<()> {
    let (own, owner) = (file.metadata()?, fs::metadata(dir)?);
    // Only root can give files away; anyone else who can write here owns what they write.
    if own.uid() == 0 && owner.uid() != 0 {
        fchown(file, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}
