//! The layout of the database and its versions: a new one is made, an older one is copied and then brought up step by
//! step, a newer one is refused.
//!
//! Called by `sqlite` and by `backup` with a connection of their own. The version is SQLite's `user_version`; 0 is an
//! empty file. What a record's JSON looks like is not the schema's business: fields are added with a default (see
//! [`crate::model`]).

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use dalgu_proto::time::Clock;
use jiff::Timestamp;
use rusqlite::{Connection, backup::Backup};

use super::{Error, Table};

/// Steps from each version to the next: the first leads from 1 to 2. A step that has been released is never changed.
const STEPS: &[&str] = &[
    "CREATE TABLE images (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
    "CREATE TABLE networks (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
     CREATE TABLE security_groups (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
    "CREATE TABLE volumes (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
     CREATE TABLE backups (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
     CREATE TABLE backup_schedules (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
    "CREATE TABLE placement_groups (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
     CREATE TABLE plans (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
    "CREATE TABLE refused_placements (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
     CREATE TABLE usage (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
];

/// Makes the tables, or brings them up to this version.
pub(crate) fn bring_up(connection: &mut Connection, path: &Path) -> Result<(), Error> {
    bring_up_by(connection, path, STEPS, Clock::system().now())
}

fn bring_up_by(
    connection: &mut Connection,
    path: &Path,
    steps: &[&str],
    now: Timestamp,
) -> Result<(), Error> {
    let known = i64::try_from(steps.len()).unwrap_or(i64::MAX).saturating_add(1);
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found > known {
        return Err(Error::Schema {
            path: path.to_owned(),
            found,
            known,
        });
    }
    if found == 0 {
        create(connection)?;
        // There is nothing in it that a copy could keep.
        return climb(connection, steps, 1);
    }
    if found == known {
        return Ok(());
    }
    let kept = beside(path, &format!("schema-{found}"), now);
    copy(connection, &kept)?;
    tracing::info!(from = found, to = known, kept = %kept.display(), "the database is upgraded; the old one is kept");
    climb(connection, steps, found)
}

/// Takes all steps that lead on from a version.
fn climb(connection: &mut Connection, steps: &[&str], from: i64) -> Result<(), Error> {
    let transaction = connection.transaction()?;
    let mut version = from;
    for step in steps.iter().skip(usize::try_from(from - 1).unwrap_or(usize::MAX)) {
        transaction.execute_batch(step)?;
        version += 1;
    }
    transaction.pragma_update(None, "user_version", version)?;
    Ok(transaction.commit()?)
}

/// Refuses a file that this version cannot read: one of a later version, or one that is no database of ours.
pub(crate) fn check(connection: &Connection, path: &Path) -> Result<(), Error> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = i64::try_from(STEPS.len()).unwrap_or(i64::MAX).saturating_add(1);
    if (1..=known).contains(&found) {
        return Ok(());
    }
    Err(Error::Schema {
        path: path.to_owned(),
        found,
        known,
    })
}

/// The first version's tables.
fn create(connection: &Connection) -> Result<(), Error> {
    let mut script =
        "BEGIN; CREATE TABLE events (revision INTEGER PRIMARY KEY, value TEXT NOT NULL) STRICT;".to_owned();
    for table in Table::ALL.into_iter().filter(|table| table.since() == 1) {
        script += &format!(
            " CREATE TABLE {} (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;",
            table.as_str()
        );
    }
    script += " PRAGMA user_version = 1; COMMIT;";
    Ok(connection.execute_batch(&script)?)
}

/// A file beside the database, named with what it is and the time: `dalgu-schema-1-20261123T120000Z.db`.
pub(crate) fn beside(database: &Path, what: &str, now: Timestamp) -> PathBuf {
    let stem = database
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    database.with_file_name(format!("{stem}-{what}-{}.db", now.strftime("%Y%m%dT%H%M%SZ")))
}

/// Copies the database as it is at one moment, while others may write to it, into a file that stands alone, and syncs
/// it. What was at `to` is lost.
pub(crate) fn copy(connection: &Connection, to: &Path) -> Result<(), Error> {
    let opened = |source| Error::Open {
        path: to.to_owned(),
        source,
    };
    // Nobody else may read what is in it.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(to).map_err(opened)?;
    let mut target = Connection::open(to)?;
    // All pages in one step, in one read transaction: no writer can make it begin again.
    match Backup::new(connection, &mut target)?.step(-1)? {
        rusqlite::backup::StepResult::Done => {}
        _ => return Err(Error::Busy { path: to.to_owned() }),
    }
    target.pragma_update(None, "journal_mode", "DELETE")?;
    target.close().map_err(|(_, error)| error)?;
    sync(to).map_err(opened)
}

/// Syncs a file and the directory that names it.
pub(crate) fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: &[&str] = &[
        "ALTER TABLE vms ADD COLUMN site TEXT NOT NULL DEFAULT 'here'",
        "CREATE TABLE systems (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    ];

    fn version(connection: &Connection) -> i64 {
        connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap()
    }

    fn old(dir: &Path) -> (PathBuf, Connection) {
        let path = dir.join("dalgu.db");
        let mut connection = Connection::open(&path).unwrap();
        crate::store::sqlite::prepare(&connection).unwrap();
        bring_up_by(&mut connection, &path, &[], Timestamp::UNIX_EPOCH).unwrap();
        connection
            .execute("INSERT INTO vms VALUES ('a', '1')", [])
            .unwrap();
        (path, connection)
    }

    #[test]
    fn an_older_database_is_copied_and_brought_up_over_every_version_between() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut connection) = old(dir.path());
        bring_up_by(&mut connection, &path, NEXT, Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(version(&connection), 3);
        let row: (String, String) = connection
            .query_row("SELECT value, site FROM vms WHERE key = 'a'", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .unwrap();
        assert_eq!(row, ("1".to_owned(), "here".to_owned()));

        let kept = dir.path().join("dalgu-schema-1-19700101T000000Z.db");
        let kept = Connection::open(kept).unwrap();
        assert_eq!(version(&kept), 1);
        let value: String = kept
            .query_row("SELECT value FROM vms WHERE key = 'a'", [], |row| row.get(0))
            .unwrap();
        assert_eq!(value, "1");
        // A second start has nothing to do and copies nothing.
        bring_up_by(&mut connection, &path, NEXT, Timestamp::MAX).unwrap();
        assert!(!beside(&path, "schema-3", Timestamp::MAX).exists());
    }

    #[test]
    fn a_new_database_has_every_table_and_leaves_no_copy_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        let mut connection = Connection::open(&path).unwrap();
        bring_up(&mut connection, &path).unwrap();
        for table in Table::ALL {
            connection
                .prepare(&format!("SELECT key FROM {}", table.as_str()))
                .unwrap();
        }
        assert!(
            Table::ALL
                .iter()
                .all(|table| table.since() <= version(&connection))
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_step_that_fails_leaves_the_old_version_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut connection) = old(dir.path());
        let broken = &[NEXT[0], "CREATE TABLE vms (key TEXT)"];
        bring_up_by(&mut connection, &path, broken, Timestamp::UNIX_EPOCH).unwrap_err();
        assert_eq!(version(&connection), 1);
        assert!(connection.prepare("SELECT site FROM vms").is_err());
    }

    #[test]
    fn without_room_for_the_copy_nothing_is_upgraded() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut connection) = old(dir.path());
        std::fs::create_dir(beside(&path, "schema-1", Timestamp::UNIX_EPOCH)).unwrap();
        bring_up_by(&mut connection, &path, NEXT, Timestamp::UNIX_EPOCH).unwrap_err();
        assert_eq!(version(&connection), 1);
    }
}
