//! The embedded store: one SQLite file, write-ahead log, `synchronous = FULL`.
//!
//! One table a kind of record, `key` and `value` (JSON text), so that `sqlite3` shows what is there. A lock file next
//! to the database keeps a second controller out; the lock ends with the process. The log is carried into the database
//! here and not by SQLite, which would keep a failure of that to itself.

use std::{
    fs::{File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
};

use rusqlite::{Connection, params};

use super::{Batch, Error, Image, Store, Table, schema};

/// So much is committed before the log is carried into the database: a few MiB, read in milliseconds at the next start.
const CHECKPOINT_BYTES: usize = 2 << 20;
/// Room that a record takes beside its key and value, with its share of a page.
const RECORD_BYTES: usize = 512;

/// An open database.
#[derive(Debug)]
pub struct Sqlite {
    connection: Connection,
    /// Committed since the log was carried into the database.
    in_log: usize,
    checkpoint_bytes: usize,
    _lock: File,
}

impl Sqlite {
    /// Opens the database, and makes it where there is none. One of an older version is copied first, then upgraded.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let lock = lock(path)?;
        let unfinished = restoring(path);
        if unfinished.exists() {
            return Err(Error::RestoreUnfinished { path: unfinished });
        }
        let mut connection = Connection::open(path)?;
        prepare(&connection)?;
        schema::bring_up(&mut connection, path)?;
        Ok(Self {
            connection,
            in_log: 0,
            checkpoint_bytes: CHECKPOINT_BYTES,
            _lock: lock,
        })
    }

    /// Carries the log into the database after each so many bytes committed, for tests: with the usual figure few
    /// would see it happen.
    pub fn checkpoint_every(&mut self, bytes: usize) {
        self.checkpoint_bytes = bytes;
    }

    /// Carries the log into the database. A failure is one of the disk: nothing can be relied upon then.
    fn checkpoint(&mut self, mode: &str) -> Result<(), Error> {
        self.in_log = 0;
        let pragma = format!("PRAGMA wal_checkpoint({mode})");
        Ok(self.connection.query_row(&pragma, [], |_| Ok(()))?)
    }
}

/// Sets what holds for a connection, and the log, which holds for the file.
pub(crate) fn prepare(connection: &Connection) -> Result<(), Error> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    // What a record no longer holds is overwritten, not only given free.
    connection.query_row("PRAGMA secure_delete = ON", [], |_| Ok(()))?;
    Ok(())
}

/// Takes the lock of a database: nobody else has it open as long as the file lives.
pub(crate) fn lock(database: &Path) -> Result<File, Error> {
    let path = database.with_extension("lock");
    let opened = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = opened.map_err(|source| Error::Open {
        path: path.clone(),
        source,
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path }),
        Err(TryLockError::Error(source)) => Err(Error::Open { path, source }),
    }
}

/// Where a restore prepares the new database; as long as it is there, the restore has not ended.
pub(crate) fn restoring(database: &Path) -> PathBuf {
    database.with_extension("restoring")
}

/// Reads everything, from whichever connection; of a file of an earlier version the tables that it has.
pub(crate) fn read(connection: &Connection) -> Result<Image, Error> {
    let mut image = Image::default();
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for table in Table::ALL.into_iter().filter(|table| table.since() <= version) {
        let query = format!("SELECT key, value FROM {} ORDER BY key", table.as_str());
        let mut statement = connection.prepare(&query)?;
        let rows = statement.query_map([], |row| Ok((table, row.get(0)?, row.get(1)?)))?;
        for row in rows {
            image.records.push(row?);
        }
    }
    let mut statement = connection.prepare("SELECT revision, value FROM events ORDER BY revision")?;
    let rows = statement.query_map([], |row| Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?)))?;
    for row in rows {
        image.events.push(row?);
    }
    Ok(image)
}

/// SQLite's integers are signed; revisions never come near the limit.
fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

impl Store for Sqlite {
    fn load(&mut self) -> Result<Image, Error> {
        read(&self.connection)
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        write(&mut self.connection, batches)?;
        self.in_log += batches.iter().map(size).sum::<usize>();
        if batches.iter().any(|batch| batch.erases) {
            // What was erased is overwritten in the database, and the log that still has it is emptied.
            self.checkpoint("TRUNCATE")?;
        } else if self.in_log >= self.checkpoint_bytes {
            self.checkpoint("PASSIVE")?;
        }
        Ok(())
    }

    /// SQLite's own check of every page, row and index.
    fn damage(&mut self) -> Result<Vec<String>, Error> {
        let mut statement = self.connection.prepare("PRAGMA integrity_check")?;
        let lines = statement.query_map([], |row| row.get::<_, String>(0))?;
        let lines = lines.collect::<Result<Vec<_>, _>>()?;
        Ok(lines.into_iter().filter(|line| line != "ok").collect())
    }
}

/// About what a batch takes in the log.
fn size(batch: &Batch) -> usize {
    let records = batch
        .writes
        .iter()
        .map(|write| write.key.len() + write.value.as_ref().map_or(0, String::len));
    let events = batch.events.iter().map(|(_, value)| value.len());
    records.chain(events).map(|bytes| bytes + RECORD_BYTES).sum()
}

/// One transaction.
pub(crate) fn write(connection: &mut Connection, batches: &[Batch]) -> Result<(), Error> {
    let transaction = connection.transaction()?;
    for batch in batches {
        for write in &batch.writes {
            let table = write.table.as_str();
            match &write.value {
                Some(value) => transaction
                    .prepare_cached(&format!(
                        "INSERT OR REPLACE INTO {table} (key, value) VALUES (?1, ?2)"
                    ))?
                    .execute(params![write.key, value])?,
                None => transaction
                    .prepare_cached(&format!("DELETE FROM {table} WHERE key = ?1"))?
                    .execute(params![write.key])?,
            };
        }
        for (revision, value) in &batch.events {
            transaction
                .prepare_cached("INSERT INTO events (revision, value) VALUES (?1, ?2)")?
                .execute(params![signed(*revision), value])?;
        }
        if batch.forget_events_to > 0 {
            transaction
                .prepare_cached("DELETE FROM events WHERE revision <= ?1")?
                .execute(params![signed(batch.forget_events_to)])?;
        }
    }
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_controller_is_kept_out_until_the_first_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        let first = Sqlite::open(&path).unwrap();
        assert!(matches!(Sqlite::open(&path), Err(Error::InUse { .. })));
        drop(first);
        Sqlite::open(&path).unwrap();
    }

    #[test]
    fn incident_39_a_controller_that_starts_while_another_works_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        let event = |revision| Batch {
            events: vec![(revision, "{}".to_owned())],
            ..Batch::default()
        };
        let mut first = Sqlite::open(&path).unwrap();
        first.commit(&[event(1)]).unwrap();
        let files = || -> std::collections::BTreeMap<_, _> {
            let entries = std::fs::read_dir(dir.path()).unwrap().flatten();
            entries
                .map(|entry| (entry.path(), std::fs::read(entry.path()).unwrap()))
                .collect()
        };
        let before = files();
        for _ in 0..3 {
            assert!(matches!(Sqlite::open(&path), Err(Error::InUse { .. })));
        }
        assert!(files() == before, "the second has written");
        first.commit(&[event(2)]).unwrap();
        assert!(files() != before, "the first goes on");
    }

    #[test]
    fn a_database_of_a_newer_version_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        Sqlite::open(&path)
            .unwrap()
            .connection
            .pragma_update(None, "user_version", 99)
            .unwrap();
        assert!(matches!(
            Sqlite::open(&path),
            Err(Error::Schema { found: 99, .. })
        ));
    }

    #[test]
    fn a_damaged_page_is_found_by_a_store_that_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        let mut store = Sqlite::open(&path).unwrap();
        store.commit(&[Batch::default()]).unwrap();
        assert_eq!(store.damage().unwrap(), Vec::<String>::new());
        // An index that does not have its row: what a lost write of one page leaves.
        let connection = &store.connection;
        connection
            .execute_batch("CREATE TABLE t (a); CREATE INDEX i ON t (a); INSERT INTO t VALUES (1)")
            .unwrap();
        connection
            .execute_batch(
                "PRAGMA writable_schema = 1; DELETE FROM sqlite_schema WHERE name = 'i'; PRAGMA writable_schema = RESET",
            )
            .unwrap();
        let found = store.damage().unwrap();
        assert!(!found.is_empty(), "a page that nothing leads to");
    }

    #[test]
    fn writes_wait_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let store = Sqlite::open(&dir.path().join("dalgu.db")).unwrap();
        let read = |name| {
            store
                .connection
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0))
                .unwrap()
        };
        assert_eq!(read("synchronous"), 2);
        let mode: String = store
            .connection
            .pragma_query_value(None, "journal_mode", |row| row.get(0))
            .unwrap();
        assert_eq!(mode, "wal");
    }

    #[test]
    fn what_a_record_no_longer_holds_is_in_no_file_of_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Sqlite::open(&dir.path().join("dalgu.db")).unwrap();
        let put = |key: &str, value: String, erases| Batch {
            writes: vec![super::super::Write {
                table: Table::Vms,
                key: key.to_owned(),
                value: Some(value),
            }],
            erases,
            ..Batch::default()
        };
        let holds = |marker: &str| {
            let mut files = std::fs::read_dir(dir.path()).unwrap().flatten();
            files.any(|file| {
                let bytes = std::fs::read(file.path()).unwrap();
                bytes.windows(marker.len()).any(|part| part == marker.as_bytes())
            })
        };
        // One within a page, one over many.
        for (key, length) in [("a", 10), ("b", 100_000)] {
            store
                .commit(&[put(key, format!("{}{key}-marker", "x".repeat(length)), false)])
                .unwrap();
        }
        // From the log they come into the database, as with time they do.
        store.checkpoint("PASSIVE").unwrap();
        for key in ["a", "b"] {
            assert!(holds(&format!("{key}-marker")), "{key} is stored");
        }
        store
            .commit(&[put("a", "{}".into(), false), put("b", "{}".into(), true)])
            .unwrap();
        for key in ["a", "b"] {
            assert!(!holds(&format!("{key}-marker")), "{key} is left");
        }
    }
}
