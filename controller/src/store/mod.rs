//! Where the records are kept: a trait with two implementations, and one contract suite over both.
//!
//! Called by `state`'s writer thread only. A store knows tables, keys and JSON text, nothing of their meaning, and
//! decides nothing. [`Store::commit`] has put everything on stable storage when it returns; when it fails, nobody
//! knows what was written, and the process must end (a failed fsync cannot be tried again).

pub mod memory;
pub(crate) mod schema;
pub mod sqlite;

#[cfg(test)]
mod contract;

use std::path::PathBuf;

/// A table of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// Numbers and ids of the site as a whole.
    Meta,
    /// Virtual machines by id.
    Vms,
    /// Hosts by name.
    Hosts,
    /// Operations by id.
    Operations,
    /// Migrations by id.
    Migrations,
    /// Remembered requests by principal and id.
    Requests,
    /// Images of the catalogue by id.
    Images,
    /// Networks by name.
    Networks,
    /// Security groups by name.
    Groups,
    /// Volumes by name.
    Volumes,
    /// Backups of VMs by id.
    Backups,
    /// Schedules of backups by name.
    BackupSchedules,
    /// Placement groups by name.
    PlacementGroups,
    /// Plans of moves by id.
    Plans,
    /// Placements that were refused, by the VM's name.
    RefusedPlacements,
    /// What VMs have used, by their ids.
    Usage,
}

impl Table {
    /// Every table.
    pub const ALL: [Self; 16] = [
        Self::Meta,
        Self::Vms,
        Self::Hosts,
        Self::Operations,
        Self::Migrations,
        Self::Requests,
        Self::Images,
        Self::Networks,
        Self::Groups,
        Self::Volumes,
        Self::Backups,
        Self::BackupSchedules,
        Self::PlacementGroups,
        Self::Plans,
        Self::RefusedPlacements,
        Self::Usage,
    ];

    /// Its name in the database.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Vms => "vms",
            Self::Hosts => "hosts",
            Self::Operations => "operations",
            Self::Migrations => "migrations",
            Self::Requests => "requests",
            Self::Images => "images",
            Self::Networks => "networks",
            Self::Groups => "security_groups",
            Self::Volumes => "volumes",
            Self::Backups => "backups",
            Self::BackupSchedules => "backup_schedules",
            Self::PlacementGroups => "placement_groups",
            Self::Plans => "plans",
            Self::RefusedPlacements => "refused_placements",
            Self::Usage => "usage",
        }
    }

    /// The first schema that has it.
    pub(crate) const fn since(self) -> i64 {
        match self {
            Self::Meta | Self::Vms | Self::Hosts | Self::Operations | Self::Migrations | Self::Requests => 1,
            Self::Images => 2,
            Self::Networks | Self::Groups => 3,
            Self::Volumes | Self::Backups | Self::BackupSchedules => 4,
            Self::PlacementGroups | Self::Plans => 5,
            Self::RefusedPlacements | Self::Usage => 6,
        }
    }
}

/// One record put or deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub table: Table,
    /// Under which key.
    pub key: String,
    /// JSON text; `None` deletes.
    pub value: Option<String>,
}

/// What one transaction writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Records, in order.
    pub writes: Vec<Write>,
    /// Events by revision, as JSON text.
    pub events: Vec<(u64, String)>,
    /// Events up to this revision are no longer kept.
    pub forget_events_to: u64,
    /// A record loses what is to be kept no longer: after the commit it is in no file of the store.
    pub erases: bool,
}

impl Batch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.events.is_empty()
    }
}

/// All that a store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// Table, key and JSON text of each record, in the order of table and key.
    pub records: Vec<(Table, String, String)>,
    /// Events, oldest first.
    pub events: Vec<(u64, String)>,
}

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another controller has it open.
    #[error("{path} is in use by another controller: stop that one first")]
    InUse {
        /// The lock file.
        path: PathBuf,
    },
    /// Made by a newer version.
    #[error("{path} has schema {found}, this version has {known}: use a version that has that schema")]
    Schema {
        /// The database.
        path: PathBuf,
        /// What it has.
        found: i64,
        /// What we know.
        known: i64,
    },
    /// A restore was broken off.
    #[error("{path} is left of a restore that did not end: run `dalgu-controller restore` again")]
    RestoreUnfinished {
        /// What it was preparing.
        path: PathBuf,
    },
    /// Somebody holds the database in a way that keeps readers out.
    #[error("the database is busy and could not be copied to {path}: try again")]
    Busy {
        /// Where to.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// SQLite failed.
    #[error("the database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// A test asked for it.
    #[error("failed on purpose, {0}")]
    Injected(&'static str),
}

/// A place that keeps records.
pub trait Store: Send + 'static {
    /// Reads everything.
    fn load(&mut self) -> Result<Image, Error>;

    /// Writes the batches, in order and all or none of them, and returns when they are on stable storage.
    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error>;

    /// Looks for damage where records are kept; tells what it finds. Nothing can be committed meanwhile. A store that has
    /// no means of its own finds none.
    fn damage(&mut self) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }
}

impl Store for Box<dyn Store> {
    fn load(&mut self) -> Result<Image, Error> {
        (**self).load()
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        (**self).commit(batches)
    }

    fn damage(&mut self) -> Result<Vec<String>, Error> {
        (**self).damage()
    }
}
