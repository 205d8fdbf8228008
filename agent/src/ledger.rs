//! What this host was told, on disk: written and synced before the hypervisor is called.
//!
//! One JSON file for each VM and each migration, one for the host itself; each is replaced as a whole (new file, fsync,
//! rename, fsync of the directory), so that a crash leaves the old or the new content and never a part. Used by the
//! VM tasks, the gate and recovery. Knows nothing of what the entries mean.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use dalgu_proto::{
    ids::{ClusterId, Epoch, Generation, HostName, MigrationId, Session, Term, VmId, VmName},
    vm::{PowerReason, PowerState, RestartMode, Spec},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Why the ledger cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("the ledger file {path} cannot be {verb}")]
    Io {
        /// "read", "written" or "removed".
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A file's content makes no sense.
    #[error("the ledger file {path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
}

/// To whom this host belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Host {
    /// The site; `None` until the first registration. Afterwards an identity of another site is refused.
    pub cluster: Option<ClusterId>,
    /// Session the controller gave at the last registration.
    pub session: Session,
    /// Highest term seen in a command or a registration.
    pub term: Term,
}

/// What a VM of this host should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Generation of the intent.
    pub generation: Generation,
    /// Ownership number.
    pub epoch: Epoch,
    /// What it is made of.
    pub spec: Spec,
    /// What its processors should do.
    pub power: PowerState,
    /// Rises when the power state is asked for anew.
    pub power_sequence: u64,
    /// Rises with each request to restart.
    pub restart_sequence: u64,
    /// How the last of them is to be done.
    #[serde(default)]
    pub restart_mode: RestartMode,
    /// Seconds a guest has to shut down; 0 powers it off at once.
    pub grace_period_seconds: u32,
}

/// Whose a VM's entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Disposition {
    /// This host has the VM.
    Owned,
    /// It may arrive by this migration.
    Incoming {
        /// The migration.
        migration: MigrationId,
    },
    /// It is on its way out; nothing is done to it until its owner is known.
    Outgoing {
        /// The migration.
        migration: MigrationId,
    },
    /// It is being deleted with its disks.
    Deleting,
    /// Nothing of it is here; kept so that a late command for it is refused.
    Gone {
        /// Since when.
        since: Timestamp,
    },
}

/// What of the intent has been carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Done {
    /// Ownership number the domain was last defined with; `None` when its definition is out of date.
    pub defined: Option<Epoch>,
    /// The disks were made, or arrived. From then on one that is missing is lost, or its pool is not mounted: it is never
    /// made anew.
    #[serde(default)]
    pub volumes: bool,
    /// Power request that was begun last; written before the hypervisor is called.
    pub power_begun: u64,
    /// Why the domain was off when that was begun.
    #[serde(default)]
    pub begun_after: PowerReason,
    /// Power request that was carried out last.
    pub power: u64,
    /// Restart request that was begun last; each is begun once only, unless it is known to have failed.
    pub restart: u64,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// UUID of the VM.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// What it should be; `None` for a VM found in the hypervisor and not in the ledger, until the controller says.
    pub intent: Option<Intent>,
    /// Lowest ownership number that is still obeyed.
    pub epoch: Epoch,
    /// Highest generation accepted.
    pub generation: Generation,
    /// Whose it is.
    pub disposition: Disposition,
    /// What has been carried out.
    #[serde(default)]
    pub done: Done,
    /// Power state seen last, and why; libvirt forgets reasons when it restarts.
    #[serde(default)]
    pub last_seen: Option<(PowerState, PowerReason)>,
    /// Boot of the host in which it was seen last.
    #[serde(default)]
    pub boot_id: String,
}

/// A host's part in a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The VM leaves this host.
    Source,
    /// The VM comes to this host.
    Destination,
}

/// How far a host is with its part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Transfer {
    /// Ready to send or to receive.
    Ready,
    /// Copying.
    Active,
    /// Ended; the hypervisor said that it went well.
    Completed,
    /// Ended with an error.
    Failed {
        /// Stable reason.
        reason: String,
        /// For people.
        message: String,
    },
}

/// One migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// UUID of the migration.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// This host's part; `None` when it was settled before anything of it had begun here.
    pub role: Option<Role>,
    /// The other host, as far as it is known.
    pub peer: Option<HostName>,
    /// How far.
    pub transfer: Transfer,
    /// Nothing may move under this id any more.
    pub settled: bool,
    /// Its owner is known and everything is tidied up, since then.
    pub finished: Option<Timestamp>,
}

/// Everything in the ledger.
#[derive(Debug, Default)]
pub struct Contents {
    /// The host.
    pub host: Host,
    /// VMs.
    pub vms: Vec<Vm>,
    /// Migrations.
    pub migrations: Vec<Migration>,
    /// Files that could not be understood; they are left where they are.
    pub damaged: Vec<Error>,
}

/// The directory. Cheap to clone; every call blocks on the disk.
#[derive(Debug, Clone)]
pub struct Ledger {
    dir: PathBuf,
}

impl Ledger {
    /// Opens the ledger in `dir`, making it if need be.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        for sub in ["vms", "migrations"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(|source| Error::Io {
                verb: "written",
                path,
                source,
            })?;
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// Reads everything. A damaged host file is an error, a damaged VM or migration is listed as such.
    pub fn load(&self) -> Result<Contents, Error> {
        let host = match read(&self.dir.join("host.json")) {
            Ok(host) => host,
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Host::default(),
            Err(error) => return Err(error),
        };
        let mut contents = Contents {
            host,
            ..Contents::default()
        };
        contents.vms = self.read_all("vms", &mut contents.damaged)?;
        contents.migrations = self.read_all("migrations", &mut contents.damaged)?;
        Ok(contents)
    }

    fn read_all<T: DeserializeOwned>(&self, sub: &str, damaged: &mut Vec<Error>) -> Result<Vec<T>, Error> {
        let dir = self.dir.join(sub);
        let failed = |source| Error::Io {
            verb: "read",
            path: dir.clone(),
            source,
        };
        let mut found = Vec::new();
        for file in fs::read_dir(&dir).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(entry) => found.push(entry),
                Err(error @ Error::Damaged { .. }) => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Writes the host's entry.
    pub fn save_host(&self, host: &Host) -> Result<(), Error> {
        write(&self.dir.join("host.json"), host)
    }

    /// Writes a VM's entry.
    pub fn save_vm(&self, vm: &Vm) -> Result<(), Error> {
        write(&self.dir.join("vms").join(format!("{}.json", vm.id)), vm)
    }

    /// Writes a migration's entry.
    pub fn save_migration(&self, migration: &Migration) -> Result<(), Error> {
        write(
            &self.dir.join("migrations").join(format!("{}.json", migration.id)),
            migration,
        )
    }

    /// Forgets a VM.
    pub fn remove_vm(&self, id: VmId) -> Result<(), Error> {
        remove(&self.dir.join("vms").join(format!("{id}.json")))
    }

    /// Forgets a migration.
    pub fn remove_migration(&self, id: MigrationId) -> Result<(), Error> {
        remove(&self.dir.join("migrations").join(format!("{id}.json")))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Io {
        verb: "read",
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Damaged {
        path: path.to_owned(),
        source,
    })
}

fn write<T: Serialize>(path: &Path, entry: &T) -> Result<(), Error> {
    let failed = |source| Error::Io {
        verb: "written",
        path: path.to_owned(),
        source,
    };
    let bytes = serde_json::to_vec(entry).map_err(|error| failed(error.into()))?;
    let unfinished = path.with_extension("tmp");
    let mut file = File::create(&unfinished).map_err(failed)?;
    file.write_all(&bytes).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    fs::rename(&unfinished, path).map_err(failed)?;
    sync_parent(path).map_err(failed)
}

fn remove(path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io {
        verb: "removed",
        path: path.to_owned(),
        source,
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => sync_parent(path).map_err(failed),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(id: u128) -> Vm {
        Vm {
            id: VmId::from_uuid(uuid::Uuid::from_u128(id)),
            name: "web".parse().unwrap(),
            intent: None,
            epoch: Epoch(1),
            generation: Generation(1),
            disposition: Disposition::Owned,
            done: Done::default(),
            last_seen: Some((PowerState::Running, PowerReason::Requested)),
            boot_id: "b".into(),
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_vm(&vm(1)).unwrap();
        ledger.save_vm(&vm(2)).unwrap();
        ledger.remove_vm(vm(2).id).unwrap();
        ledger
            .save_host(&Host {
                session: Session(3),
                ..Host::default()
            })
            .unwrap();
        let contents = Ledger::open(dir.path()).unwrap().load().unwrap();
        assert_eq!(contents.vms, [vm(1)]);
        assert_eq!(contents.host.session, Session(3));
    }

    #[test]
    fn a_write_cut_short_leaves_the_old_entry() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_vm(&vm(1)).unwrap();
        fs::write(
            dir.path().join("vms").join(format!("{}.tmp", vm(1).id)),
            "{\"id\":",
        )
        .unwrap();
        assert_eq!(ledger.load().unwrap().vms, [vm(1)]);
    }

    #[test]
    fn a_damaged_entry_is_told_and_does_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_vm(&vm(1)).unwrap();
        fs::write(dir.path().join("vms/x.json"), "nonsense").unwrap();
        let contents = ledger.load().unwrap();
        assert_eq!(contents.vms.len(), 1);
        assert!(matches!(contents.damaged[..], [Error::Damaged { .. }]));
    }
}
