//! What this host was told, on disk: written and synced before the hypervisor is called.
//!
//! One JSON file for each VM, each migration and each backup that is not whole, one for the host itself; each is replaced as a whole, so that a crash
//! leaves the old or the new content and never a part. Where the files are is [`Files`]' business: a directory in the
//! program. Used by the VM tasks, the gate and recovery. Knows nothing of what the entries mean.

use std::{collections::BTreeSet, io, path::Path, sync::Arc};

use dalgu_proto::{
    ids::{
        BackupId, ClusterId, Epoch, Generation, HostName, MigrationId, Session, Term, VmId, VmName, VolumeId,
    },
    image::Digest,
    snapshot,
    vm::{Device, Disk, NumaPlace, PowerReason, PowerState, RestartMode, Spec, first_boot::Documents},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    backups,
    images::Need,
    network::{Kept, Plugged, plugged},
};

mod files;

pub(crate) use files::on_disk;
pub use files::{Directory, FileSystem, Files, Local};

/// Why the ledger cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("the ledger file {file} cannot be {verb}")]
    Io {
        /// "read", "written" or "removed".
        verb: &'static str,
        /// The file.
        file: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A file's content makes no sense.
    #[error("the ledger file {file} is damaged")]
    Damaged {
        /// The file.
        file: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
}

impl Error {
    /// The file that it is about.
    pub fn file(&self) -> &str {
        match self {
            Self::Io { file, .. } | Self::Damaged { file, .. } => file,
        }
    }
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
    /// Run of the controller that has that term; `None` when it was an older version's, which does not say.
    #[serde(default)]
    pub run: Option<Uuid>,
    /// The machine that registered first with this ledger; on another one it is a copy, and nothing of it is acted upon.
    #[serde(default)]
    pub machine: Option<Uuid>,
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
    /// Its snapshots; `None` where nothing was told of any, so that they stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<snapshot::Set>,
    /// Where it is on this host, of one that is fitted onto NUMA nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<NumaPlace>,
    /// PCI devices of this host that are its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
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

impl Disposition {
    /// The migration that the VM takes part in here.
    pub const fn migration(self) -> Option<MigrationId> {
        match self {
            Self::Incoming { migration } | Self::Outgoing { migration } => Some(migration),
            Self::Owned | Self::Deleting | Self::Gone { .. } => None,
        }
    }
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
    /// A start was begun, and the guest has not been seen to run since: what is there may be half a start.
    #[serde(default)]
    pub starting: bool,
    /// Power request that was carried out last.
    pub power: u64,
    /// Restart request that was begun last; each is begun once only, unless it is known to have failed.
    pub restart: u64,
}

/// What is to be changed of a VM that was made, until all of it is done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Changes {
    /// Its domain may have other hardware than the intent says.
    #[serde(default)]
    pub under_way: bool,
    /// The intent is not the one that the VM was created with.
    #[serde(default)]
    pub ever: bool,
    /// Disks of the intent that have not been made, although [`Done::volumes`] is true; volumes of the site, whatever that is.
    #[serde(default)]
    pub unmade: BTreeSet<String>,
    /// Disks that the intent has no more, or has in another pool, and that may still be there.
    #[serde(default)]
    pub removed: Vec<Disk>,
    /// The guest may be frozen for the moment in which a disk of it is changed for its copy, and has not been seen to run since.
    #[serde(default)]
    pub frozen: bool,
}

impl Changes {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A snapshot that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Number of its layer.
    pub number: u32,
    /// Whether the guest's file systems were frozen; `None` when this host died before it could write that down.
    pub quiesced: Option<bool>,
}

/// How far this host is with a VM's snapshots. Which there are, files tell; this is what they do not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshots {
    /// The layers of its disks may be others than the intent says.
    #[serde(default)]
    pub under_way: bool,
    /// Those that were there at the last look.
    #[serde(default)]
    pub there: Vec<Taken>,
    /// Highest number of a layer that was seen on a disk; `None` where this host has not always watched. A spare layer beyond it
    /// may hold what a guest wrote.
    #[serde(default)]
    pub seen: Option<u32>,
}

impl Snapshots {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }
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
    /// Images that its disks are made from, and who has them, as it was told last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<Need>,
    /// Documents of its first boot, until its disks are made. No part of the intent: what a generation means stays the same
    /// when they are forgotten.
    #[serde(default, skip_serializing_if = "Documents::is_empty")]
    pub documents: Documents,
    /// What is to be changed of it.
    #[serde(default, skip_serializing_if = "Changes::is_none")]
    pub changes: Changes,
    /// How far its snapshots are.
    #[serde(default, skip_serializing_if = "Snapshots::is_none")]
    pub snapshots: Snapshots,
}

impl Vm {
    /// Its disks, those that are to go too, as long as anything of it is here.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        let gone = matches!(self.disposition, Disposition::Gone { .. });
        let intent = self.intent.as_ref().filter(|_| !gone);
        let disks = intent.into_iter().flat_map(|intent| &intent.spec.disks);
        disks.chain(self.changes.removed.iter().filter(move |_| !gone))
    }

    /// Images that disks of it here were made from, or will be.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        self.disks().filter_map(|disk| disk.digest.clone())
    }

    /// Volumes of the site that it has.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> {
        self.disks().filter_map(Disk::volume_id)
    }

    /// Its interfaces in networks of the site, as long as anything of it is here.
    pub fn plugged(&self) -> Vec<Plugged> {
        let gone = matches!(self.disposition, Disposition::Gone { .. });
        let intent = self.intent.as_ref().filter(|_| !gone);
        let ports = intent.map(|intent| plugged(self.id, &intent.spec));
        ports.into_iter().flatten().collect()
    }

    /// Where it is on this host, as long as anything of it is here.
    pub fn places(&self) -> &[NumaPlace] {
        let gone = matches!(self.disposition, Disposition::Gone { .. });
        let intent = self.intent.as_ref().filter(|_| !gone);
        intent.map_or(&[], |intent| &intent.places)
    }

    /// PCI devices of this host that it has, as long as anything of it is here.
    pub fn devices(&self) -> &[Device] {
        let gone = matches!(self.disposition, Disposition::Gone { .. });
        let intent = self.intent.as_ref().filter(|_| !gone);
        intent.map_or(&[], |intent| &intent.devices)
    }

    /// Disks that are to be made: all, before they have been made once, then those that were added; volumes of the site only where
    /// the controller says that they are new.
    pub fn to_make(&self) -> impl Iterator<Item = &Disk> {
        let disks = self.intent.iter().flat_map(|intent| &intent.spec.disks);
        disks.filter(|disk| {
            let own = disk.volume.is_none() && !self.done.volumes;
            own || self.changes.unmade.contains(&disk.name)
        })
    }
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
    /// The site's networks, as far as this host was told of them.
    pub networks: Option<Kept>,
    /// VMs.
    pub vms: Vec<Vm>,
    /// Migrations.
    pub migrations: Vec<Migration>,
    /// Backups that are not whole.
    pub backups: Vec<backups::Entry>,
    /// Backups that were removed lately.
    pub removed_backups: backups::Removed,
    /// Files that could not be understood; they are left where they are.
    pub damaged: Vec<Damaged>,
}

/// A file that could not be understood: by a bad disk, or because a newer version wrote it.
#[derive(Debug)]
pub struct Damaged {
    /// The VM that it is about, as far as that can be told.
    pub vm: Option<VmId>,
    /// What is wrong with it.
    pub error: Error,
}

/// The ledger, over its files. Cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<dyn Files>);

/// Name of the host's file.
const HOST: &str = "host.json";
/// Name of the file of networks.
const NETWORKS: &str = "networks.json";
/// Name of the file of backups that were removed.
const REMOVED_BACKUPS: &str = "removed-backups.json";

fn vm_file(id: VmId) -> String {
    format!("vms/{id}.json")
}

fn backup_file(id: BackupId) -> String {
    format!("backups/{id}.json")
}

fn migration_file(id: MigrationId) -> String {
    format!("migrations/{id}.json")
}

impl Ledger {
    /// The ledger in these files.
    pub fn on(files: Arc<dyn Files>) -> Self {
        Self(files)
    }

    /// Opens the ledger in a directory, making it if need be. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let directory = Directory::open(dir).map_err(|source| Error::Io {
            verb: "written",
            file: dir.display().to_string(),
            source,
        })?;
        Ok(Self::on(Arc::new(directory)))
    }

    /// Reads everything. A damaged host file is an error, a damaged VM or migration is listed as such.
    ///
    /// # Errors
    /// If the files cannot be read, or the host's is damaged.
    pub async fn load(&self) -> Result<Contents, Error> {
        let mut contents = Contents::default();
        let found = self.0.load().await.map_err(|source| Error::Io {
            verb: "read",
            file: "(all)".to_owned(),
            source,
        })?;
        for (file, bytes) in found {
            let folder = file.split_once('/').map(|(folder, _)| folder);
            match folder {
                None if file == HOST => contents.host = parse(file, &bytes)?,
                None if file == NETWORKS => match parse(file, &bytes) {
                    Ok(networks) => contents.networks = Some(networks),
                    // The controller tells them again; until then what is in the kernel stays.
                    Err(error) => contents.damaged.push(Damaged { vm: None, error }),
                },
                None if file == REMOVED_BACKUPS => match parse(file, &bytes) {
                    Ok(removed) => contents.removed_backups = removed,
                    // It refuses late orders only.
                    Err(error) => contents.damaged.push(Damaged { vm: None, error }),
                },
                Some("vms") => {
                    let vm = named_by(&file);
                    keep(parse(file, &bytes), vm, &mut contents.vms, &mut contents.damaged);
                }
                Some("migrations") => {
                    let vm = named_in(&bytes);
                    keep(
                        parse(file, &bytes),
                        vm,
                        &mut contents.migrations,
                        &mut contents.damaged,
                    );
                }
                Some("backups") => {
                    let entry = parse(file, &bytes);
                    keep(entry, None, &mut contents.backups, &mut contents.damaged);
                }
                _ => {}
            }
        }
        Ok(contents)
    }

    /// Writes the host's entry.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn save_host(&self, host: &Host) -> Result<(), Error> {
        self.write(HOST.to_owned(), host).await
    }

    /// Writes what is known of networks.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn save_networks(&self, networks: &Kept) -> Result<(), Error> {
        self.write(NETWORKS.to_owned(), networks).await
    }

    /// Writes a VM's entry.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn save_vm(&self, vm: &Vm) -> Result<(), Error> {
        self.write(vm_file(vm.id), vm).await
    }

    /// Writes a migration's entry.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn save_migration(&self, migration: &Migration) -> Result<(), Error> {
        self.write(migration_file(migration.id), migration).await
    }

    /// Writes a backup's entry.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn save_backup(&self, backup: &backups::Entry) -> Result<(), Error> {
        self.write(backup_file(backup.order.id), backup).await
    }

    /// Writes which backups were removed.
    ///
    /// # Errors
    /// If it is not certain to be kept.
    pub async fn save_removed_backups(&self, removed: &backups::Removed) -> Result<(), Error> {
        self.write(REMOVED_BACKUPS.to_owned(), removed).await
    }

    /// Forgets a backup.
    ///
    /// # Errors
    /// If it may still be there.
    pub async fn remove_backup(&self, id: BackupId) -> Result<(), Error> {
        self.remove(backup_file(id)).await
    }

    /// Forgets a VM.
    ///
    /// # Errors
    /// If it may still be there.
    pub async fn remove_vm(&self, id: VmId) -> Result<(), Error> {
        self.remove(vm_file(id)).await
    }

    /// Forgets a migration.
    ///
    /// # Errors
    /// If it may still be there.
    pub async fn remove_migration(&self, id: MigrationId) -> Result<(), Error> {
        self.remove(migration_file(id)).await
    }

    async fn write(&self, file: String, entry: &(impl Serialize + Sync)) -> Result<(), Error> {
        let written = match serde_json::to_vec(entry) {
            Ok(bytes) => self.0.replace(&file, bytes).await,
            Err(error) => Err(error.into()),
        };
        written.map_err(|source| Error::Io {
            verb: "written",
            file,
            source,
        })
    }

    async fn remove(&self, file: String) -> Result<(), Error> {
        self.0.remove(&file).await.map_err(|source| Error::Io {
            verb: "removed",
            file,
            source,
        })
    }
}

fn parse<T: DeserializeOwned>(file: String, bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|source| Error::Damaged { file, source })
}

fn keep<T>(entry: Result<T, Error>, vm: Option<VmId>, found: &mut Vec<T>, damaged: &mut Vec<Damaged>) {
    match entry {
        Ok(entry) => found.push(entry),
        Err(error) => damaged.push(Damaged { vm, error }),
    }
}

/// The VM in the name of its file.
fn named_by(file: &str) -> Option<VmId> {
    file.strip_prefix("vms/")?.strip_suffix(".json")?.parse().ok()
}

/// The VM in a migration's entry, whatever else is in it.
fn named_in(bytes: &[u8]) -> Option<VmId> {
    #[derive(Deserialize)]
    struct Of {
        vm: VmId,
    }
    serde_json::from_slice::<Of>(bytes).ok().map(|of| of.vm)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
            images: Vec::new(),
            documents: Default::default(),
            changes: Default::default(),
            snapshots: Default::default(),
        }
    }

    #[tokio::test]
    async fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_vm(&vm(1)).await.unwrap();
        ledger.save_vm(&vm(2)).await.unwrap();
        ledger.remove_vm(vm(2).id).await.unwrap();
        ledger
            .save_host(&Host {
                session: Session(3),
                ..Host::default()
            })
            .await
            .unwrap();
        let contents = Ledger::open(dir.path()).unwrap().load().await.unwrap();
        assert_eq!(contents.vms, [vm(1)]);
        assert_eq!(contents.host.session, Session(3));
    }

    #[tokio::test]
    async fn a_write_cut_short_leaves_the_old_entry() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_vm(&vm(1)).await.unwrap();
        fs::write(
            dir.path().join("vms").join(format!("{}.tmp", vm(1).id)),
            "{\"id\":",
        )
        .unwrap();
        assert_eq!(ledger.load().await.unwrap().vms, [vm(1)]);
    }

    #[tokio::test]
    async fn a_damaged_entry_of_the_host_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_host(&Host::default()).await.unwrap();
        std::fs::write(dir.path().join(HOST), "{\"session\": ").unwrap();
        let error = ledger.load().await.unwrap_err().to_string();
        assert!(error.contains(HOST), "{error}");
    }

    #[tokio::test]
    async fn a_damaged_entry_is_told_and_does_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.save_vm(&vm(1)).await.unwrap();
        fs::write(dir.path().join("vms/x.json"), "nonsense").unwrap();
        let contents = ledger.load().await.unwrap();
        assert_eq!(contents.vms.len(), 1);
        assert!(matches!(contents.damaged[..], [Damaged { vm: None, .. }]));
    }
}
