//! `dalgu-controller backup` and `restore`: the store as one file that can be carried away, and back.
//!
//! Called by `main` only. A backup is taken while the controller runs, in one read transaction; it is a SQLite file with one
//! more table that says what it is, with a digest of every record. A restore needs the controller stopped; what was there is
//! kept aside, and the restored store begins a new incarnation (see [`crate::incarnation`]). Identities and keys are
//! not in it: they do not change, and are copied once.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use dalgu_proto::ids::ClusterId;
use jiff::Timestamp;
use ring::digest::{Context, SHA256};
use rusqlite::{Connection, OpenFlags, params};

use crate::{
    incarnation::{self, Past, RenewError},
    state::Meta,
    store::{
        self, Batch, Image, Write,
        schema::{self, beside},
        sqlite,
    },
};

/// Name of the database in the data directory.
pub const DATABASE: &str = "dalgu.db";
/// Longest wait for a lock that SQLite takes for a moment.
const BUSY: Duration = Duration::from_secs(10);
/// Version of the table that says what a backup is.
const FORMAT: &str = "1";

/// Why there is no backup, or nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store cannot be used.
    #[error("the store cannot be used")]
    Store(#[from] store::Error),
    /// SQLite failed.
    #[error("the database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// There is no store.
    #[error("there is no store at {0}: name the controller's data directory with --data-dir")]
    NoStore(PathBuf),
    /// The file is there.
    #[error("{0} is there already: name a new file")]
    Exists(PathBuf),
    /// A file operation failed.
    #[error("{path} cannot be {verb}")]
    File {
        /// The file.
        path: PathBuf,
        /// "read", "written" and so on.
        verb: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{0} is not a backup of a controller")]
    NotABackup(PathBuf),
    /// It has changed since.
    #[error("{path} is damaged: its digest is {found}, it was made with {expected}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it was made with.
        expected: String,
        /// What it has.
        found: String,
    },
    /// It belongs elsewhere.
    #[error("the backup is of site {found}, this is site {expected}")]
    OtherSite {
        /// In the backup.
        found: ClusterId,
        /// In the data directory.
        expected: ClusterId,
    },
    /// A record makes no sense.
    #[error("a record of the backup cannot be used")]
    Record(#[from] RenewError),
}

fn failed(path: &Path, verb: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, verb, source }
}

/// What a backup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The site.
    pub cluster_id: ClusterId,
    /// Its store's incarnation.
    pub incarnation: u64,
    /// Last change in it.
    pub revision: u64,
    /// SHA-256 over all records and events.
    pub sha256: String,
    /// VMs in it.
    pub vms: usize,
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What was restored.
    pub backup: Summary,
    /// The numbers of the new incarnation.
    pub meta: Meta,
    /// Where the old database is, if there was one.
    pub kept: Option<PathBuf>,
}

fn digest(image: &Image) -> String {
    let mut context = Context::new(&SHA256);
    // Lengths first, so that no two images look alike.
    let mut part = |bytes: &[u8]| {
        context.update(&(bytes.len() as u64).to_be_bytes());
        context.update(bytes);
    };
    for (table, key, value) in &image.records {
        part(table.as_str().as_bytes());
        part(key.as_bytes());
        part(value.as_bytes());
    }
    for (revision, value) in &image.events {
        part(&revision.to_be_bytes());
        part(value.as_bytes());
    }
    let bytes = context.finish();
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn summary(image: &Image) -> Result<Summary, Error> {
    let meta = incarnation::past(image)?;
    Ok(Summary {
        cluster_id: meta.cluster_id,
        incarnation: meta.incarnation,
        revision: meta.revision,
        sha256: digest(image),
        vms: image
            .records
            .iter()
            .filter(|(table, ..)| *table == store::Table::Vms)
            .count(),
    })
}

/// Copies the store of `data_dir` to a new file, as it is at one moment. The controller may run.
pub fn backup(data_dir: &Path, to: &Path, now: Timestamp) -> Result<Summary, Error> {
    let database = data_dir.join(DATABASE);
    if !database.exists() {
        return Err(Error::NoStore(database));
    }
    if to.exists() {
        return Err(Error::Exists(to.to_owned()));
    }
    let source = Connection::open_with_flags(&database, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    source.busy_timeout(BUSY)?;
    schema::check(&source, &database)?;
    let mut partial = OsString::from(to);
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    schema::copy(&source, &partial)?;
    let copy = Connection::open_with_flags(&partial, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    let summary = summary(&sqlite::read(&copy)?)?;
    copy.execute_batch(
        "CREATE TABLE backup (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
    )?;
    for (key, value) in [
        ("format", FORMAT.to_owned()),
        ("cluster_id", summary.cluster_id.to_string()),
        ("incarnation", summary.incarnation.to_string()),
        ("revision", summary.revision.to_string()),
        ("sha256", summary.sha256.clone()),
        ("time", now.to_string()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
    ] {
        copy.execute("INSERT INTO backup VALUES (?1, ?2)", params![key, value])?;
    }
    copy.close().map_err(|(_, error)| error)?;
    schema::sync(&partial).map_err(failed(&partial, "written"))?;
    fs::rename(&partial, to).map_err(failed(to, "written"))?;
    schema::sync(to).map_err(failed(to, "written"))?;
    Ok(summary)
}

/// Reads a backup and checks its digest.
pub fn verify(from: &Path) -> Result<(Image, Summary), Error> {
    if !from.exists() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        return Err(failed(from, "read")(missing));
    }
    let file = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let said = |key: &str| {
        file.query_row("SELECT value FROM backup WHERE key = ?1", [key], |row| {
            row.get::<_, String>(0)
        })
    };
    let format = said("format").map_err(|_| Error::NotABackup(from.to_owned()))?;
    if format != FORMAT {
        return Err(Error::NotABackup(from.to_owned()));
    }
    schema::check(&file, from)?;
    let expected = said("sha256")?;
    let image = sqlite::read(&file)?;
    let found = digest(&image);
    if found != expected {
        return Err(Error::Damaged {
            path: from.to_owned(),
            expected,
            found,
        });
    }
    let summary = summary(&image)?;
    Ok((image, summary))
}

/// Puts a backup in the place of the store of `data_dir`, whose controller must be stopped. `incarnation`: the new one is at
/// least this; for a site whose earlier stores are lost.
pub fn restore(
    data_dir: &Path,
    from: &Path,
    cluster_id: ClusterId,
    incarnation: Option<u64>,
    now: Timestamp,
) -> Result<Restored, Error> {
    let database = data_dir.join(DATABASE);
    let _lock = sqlite::lock(&database)?;
    let (image, backup) = verify(from)?;
    if backup.cluster_id != cluster_id {
        return Err(Error::OtherSite {
            found: backup.cluster_id,
            expected: cluster_id,
        });
    }
    let mut before = history(data_dir, &database)?;
    before.incarnation = before.incarnation.max(incarnation.unwrap_or(0).saturating_sub(1));
    let (image, meta) = incarnation::renew(image, before, now)?;
    // From here on, and until it has its place, the controller does not start.
    let new = sqlite::restoring(&database);
    make(&new, image)?;
    let owner = fs::metadata(data_dir).map_err(failed(data_dir, "read"))?;
    for path in [&new, &database.with_extension("lock")] {
        chown(path, Some(owner.uid()), Some(owner.gid()))
            .map_err(failed(path, "given to the controller's user"))?;
    }
    let kept = aside(&database, now)?;
    fs::rename(&new, &database).map_err(failed(&database, "written"))?;
    schema::sync(&database).map_err(failed(&database, "written"))?;
    Ok(Restored { backup, meta, kept })
}

/// How far the stores in the data directory have come: the present one, and those that earlier restores kept.
fn history(data_dir: &Path, database: &Path) -> Result<Past, Error> {
    let mut past = Past::default();
    let entries = fs::read_dir(data_dir).map_err(failed(data_dir, "read"))?;
    let mut files = vec![database.to_owned()];
    for entry in entries {
        let path = entry.map_err(failed(data_dir, "read"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("dalgu-before-restore-") && name.ends_with(".db") {
            files.push(path);
        }
    }
    for file in files.iter().filter(|file| file.exists()) {
        let read = || -> Result<Meta, Error> {
            let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
            Ok(incarnation::past(&sqlite::read(&connection)?)?)
        };
        match read() {
            Ok(meta) => {
                past.incarnation = past.incarnation.max(meta.incarnation);
                past.term = past.term.max(meta.term.0);
                past.revision = past.revision.max(meta.revision);
            }
            Err(error) => tracing::warn!(
                file = %file.display(),
                error = &error as &dyn std::error::Error,
                "an earlier store cannot be read; if another backup was restored before, say --incarnation"
            ),
        }
    }
    Ok(past)
}

fn make(path: &Path, image: Image) -> Result<(), Error> {
    for suffix in ["", "-journal"] {
        let mut name = OsString::from(path);
        name.push(suffix);
        match fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(Path::new(&name), "removed")(error));
            }
            _ => {}
        }
    }
    let mut connection = Connection::open(path)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    schema::bring_up(&mut connection, path)?;
    let put = |(table, key, value)| Write {
        table,
        key,
        value: Some(value),
    };
    let batch = Batch {
        writes: image.records.into_iter().map(put).collect(),
        events: image.events,
        forget_events_to: 0,
        erases: false,
    };
    sqlite::write(&mut connection, &[batch])?;
    connection.close().map_err(|(_, error)| error)?;
    schema::sync(path).map_err(failed(path, "written"))
}

/// Moves the present database out of the way, with its log if that cannot be carried into it.
fn aside(database: &Path, now: Timestamp) -> Result<Option<PathBuf>, Error> {
    let with = |path: &Path, suffix: &str| {
        let mut name = OsString::from(path);
        name.push(suffix);
        PathBuf::from(name)
    };
    let kept = beside(database, "before-restore", now);
    let mut moved = false;
    // The log last: as long as it is there without its database, it is no use to anybody, and the new one has another name.
    for suffix in ["", "-wal"] {
        let (from, to) = (with(database, suffix), with(&kept, suffix));
        match fs::rename(&from, &to) {
            Ok(()) => moved = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&from, "kept aside")(error)),
        }
    }
    // Only the log's index, which is made anew from the log.
    match fs::remove_file(with(database, "-shm")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(database, "kept aside")(error));
        }
        _ => {}
    }
    Ok(moved.then_some(kept))
}

#[cfg(test)]
mod tests;
