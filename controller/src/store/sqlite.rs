//! The embedded store: one SQLite file, write-ahead log, `synchronous = FULL`.
//!
//! One table a kind of record, `key` and `value` (JSON text), so that `sqlite3` shows what is there. A lock file next
//! to the database keeps a second controller out; the lock ends with the process.

use std::{
    fs::{File, OpenOptions, TryLockError},
    path::{Path, PathBuf},
};

use rusqlite::{Connection, params};

use super::{Batch, Error, Image, Store, Table};

/// Version of the tables' layout.
const SCHEMA: i64 = 1;

/// An open database.
#[derive(Debug)]
pub struct Sqlite {
    connection: Connection,
    _lock: File,
}

impl Sqlite {
    /// Opens the database, and makes it where there is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let lock = lock(path.with_extension("lock"))?;
        let connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found > SCHEMA {
            return Err(Error::Schema {
                path: path.to_owned(),
                found,
                known: SCHEMA,
            });
        }
        if found == 0 {
            create(&connection)?;
        }
        Ok(Self {
            connection,
            _lock: lock,
        })
    }
}

fn lock(path: PathBuf) -> Result<File, Error> {
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

fn create(connection: &Connection) -> Result<(), Error> {
    let mut script =
        "BEGIN; CREATE TABLE events (revision INTEGER PRIMARY KEY, value TEXT NOT NULL) STRICT;".to_owned();
    for table in Table::ALL {
        script += &format!(
            " CREATE TABLE {} (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
            table.as_str()
        );
    }
    script += &format!(" PRAGMA user_version = {SCHEMA}; COMMIT;");
    Ok(connection.execute_batch(&script)?)
}

/// SQLite's integers are signed; revisions never come near the limit.
fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

impl Store for Sqlite {
    fn load(&mut self) -> Result<Image, Error> {
        let mut image = Image::default();
        for table in Table::ALL {
            let query = format!("SELECT key, value FROM {} ORDER BY key", table.as_str());
            let mut statement = self.connection.prepare(&query)?;
            let rows = statement.query_map([], |row| Ok((table, row.get(0)?, row.get(1)?)))?;
            for row in rows {
                image.records.push(row?);
            }
        }
        let mut statement = self
            .connection
            .prepare("SELECT revision, value FROM events ORDER BY revision")?;
        let rows = statement.query_map([], |row| Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?)))?;
        for row in rows {
            image.events.push(row?);
        }
        Ok(image)
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        let transaction = self.connection.transaction()?;
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
}
