//! Whether hosts' pools hold what they should of disks, volumes and backups, and nothing else. Of pools that were asked.
//!
//! A file is told of only where nothing is under way for what it belongs to: what comes and goes is no finding.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    host::GuestFeature,
    ids::{HostName, VmId, VolumeId},
};

use super::{Finding, Invariant, Look, Severity, View};
use crate::{
    model::{
        BackupRecord, BackupState, FileOf, HostRecord, HostState, PoolFile, VmPhase, VmRecord, VolumeRecord,
    },
    state::State,
    volumes::{holder, is_shared},
};

/// What pools hold, by their hosts and names, or why that is not known.
pub type Files = BTreeMap<(HostName, String), Result<Vec<PoolFile>, String>>;

/// The pools to ask, each that hosts share once.
pub fn to_ask(state: &State) -> Vec<(HostName, String)> {
    let mut shared = BTreeSet::new();
    let ready = state.hosts.values().filter(|host| {
        let live = state.live.get(&host.name);
        live.is_some_and(|live| live.state == HostState::Ready)
    });
    // Agents of an earlier version do not know a layer of a volume from a file that is nobody's.
    let knows = |host: &HostRecord| {
        host.inventory
            .guest_features
            .contains(&GuestFeature::VolumeSnapshot)
    };
    let (newer, older): (Vec<_>, Vec<_>) = ready.partition(|host| knows(host));
    let mut asked = Vec::new();
    for host in newer.into_iter().chain(older) {
        for pool in &host.inventory.pools {
            if !pool.shared || shared.insert(&pool.name) {
                asked.push((host.name.clone(), pool.name.clone()));
            }
        }
    }
    asked
}

/// The files of a pool, by what they belong to.
type Belongings<'a> = BTreeMap<&'a FileOf, Vec<&'a PoolFile>>;

/// What is where, of pools that were asked.
struct Contents<'a> {
    state: &'a State,
    at: BTreeMap<(&'a HostName, &'a str), Belongings<'a>>,
    /// The host that was asked for a pool that hosts share.
    shared: BTreeMap<&'a str, &'a HostName>,
}

impl<'a> Contents<'a> {
    fn of(view: &'a View<'a>) -> Self {
        let (mut at, mut shared) = (BTreeMap::new(), BTreeMap::new());
        for ((host, pool), files) in &view.files {
            let Ok(files) = files else { continue };
            let mut belongings = Belongings::new();
            for file in files {
                belongings.entry(&file.of).or_default().push(file);
            }
            at.insert((host, pool.as_str()), belongings);
            if is_shared(view.state, host, pool) {
                shared.insert(pool.as_str(), host);
            }
        }
        let state = view.state;
        Self { state, at, shared }
    }

    /// What a pool holds that a host sees, where that is known.
    fn seen_by(&self, host: &'a HostName, pool: &'a str) -> Option<&Belongings<'a>> {
        let own = self.at.get(&(host, pool));
        own.or_else(|| {
            let other = self.shared.get(pool);
            let other = other.filter(|_| is_shared(self.state, host, pool))?;
            self.at.get(&(*other, pool))
        })
    }
}

/// What is known of all pools.
struct Pools<'a> {
    view: &'a View<'a>,
    volumes: BTreeMap<VolumeId, &'a VolumeRecord>,
}

impl<'a> Pools<'a> {
    fn of(view: &'a View<'a>) -> Self {
        let volumes = view.state.volumes.values();
        Self {
            view,
            volumes: volumes.map(|volume| (volume.id, &**volume)).collect(),
        }
    }

    /// Whether nothing is under way by which files of a VM come and go.
    fn rests(&self, vm: &VmRecord) -> bool {
        let seen = self.view.state.observation(vm);
        let settled = seen.is_some_and(|seen| {
            seen.phase == VmPhase::Settled && seen.observed >= vm.intent.generation && seen.pending.is_empty()
        });
        self.view.rests(vm) && settled && vm.change.is_none() && vm.delete_time.is_none()
    }

    /// Why a file should not be there, if so.
    fn surplus(&self, (host, pool): &(HostName, String), file: &PoolFile) -> Option<String> {
        let shared = is_shared(self.view.state, host, pool);
        match &file.of {
            FileOf::Unknown => Some("it is none of a VM, of a volume or of a backup".to_owned()),
            FileOf::Volume { id, layer } => match self.volumes.get(id) {
                None => Some("there is no volume of that id".to_owned()),
                Some(volume) => self.surplus_of_volume(volume, *layer, (host, pool, shared), file.partial),
            },
            FileOf::Backup(id) => match self.view.state.backups.get(id) {
                None => Some("there is no backup of that id".to_owned()),
                Some(backup) => surplus_of_backup(backup, (host, pool, shared), file),
            },
            FileOf::Disk { vm, disk, layer } => match self.view.state.vms.get(vm) {
                _ if self.is_told_of(host, *vm) => None,
                None => Some("there is no VM of that id".to_owned()),
                Some(vm) if !self.rests(vm) => None,
                Some(vm) if vm.owner != *host && !shared => {
                    Some(format!("VM {} is on host {}", vm.name, vm.owner))
                }
                Some(vm) => surplus_of_vm(vm, pool, (disk, *layer), file.partial),
            },
        }
    }

    /// A VM or a domain that the host has and should not have is told of as that: its files are in use.
    fn is_told_of(&self, host: &HostName, vm: VmId) -> bool {
        let state = self.view.state;
        let sighted = state.sightings.get(&vm);
        let sighted = sighted.is_some_and(|hosts| hosts.contains_key(host) && !state.vms.contains_key(&vm));
        let mut domains = state.live.get(host).into_iter().flat_map(|live| &live.unmanaged);
        sighted
            || state.strays.contains_key(&(host.clone(), vm))
            || domains.any(|domain| domain.uuid.parse().is_ok_and(|id: VmId| id == vm))
    }

    fn surplus_of_volume(
        &self,
        volume: &VolumeRecord,
        layer: u32,
        (host, pool, shared): (&HostName, &str, bool),
        partial: bool,
    ) -> Option<String> {
        let name = &volume.name;
        let holder = holder(self.view.state, volume.id);
        if holder.is_some_and(|vm| !self.rests(vm)) || volume.purging {
            return None;
        }
        match &volume.host {
            _ if volume.pool != pool => Some(format!("volume {name} is in pool {}", volume.pool)),
            None => Some(format!("volume {name} is not made yet")),
            Some(at) if at != host && !shared => Some(format!("volume {name} is on host {at}")),
            Some(_) if partial => Some(format!("volume {name} is whole, and this is not")),
            Some(_) if layer > 0 && !holder.is_some_and(|vm| has_layer(vm, layer)) => Some(format!(
                "no VM that has volume {name} has a snapshot with layer {layer}, and what was written last may be in it (see \
                 operations/snapshots.md)"
            )),
            Some(_) => None,
        }
    }
}

fn surplus_of_backup(
    backup: &BackupRecord,
    (host, pool, shared): (&HostName, &str, bool),
    file: &PoolFile,
) -> Option<String> {
    match backup.state {
        _ if backup.pool != pool => Some(format!("backup {} is in pool {}", backup.id, backup.pool)),
        _ if backup.host != *host && !shared => {
            Some(format!("backup {} is on host {}", backup.id, backup.host))
        }
        BackupState::Available if file.partial => Some("the backup is whole, and this is not".to_owned()),
        BackupState::Failed => Some("the backup has failed".to_owned()),
        _ => None,
    }
}

fn has_layer(vm: &VmRecord, layer: u32) -> bool {
    vm.snapshots.all.iter().any(|snapshot| snapshot.layer == layer)
}

fn surplus_of_vm(vm: &VmRecord, pool: &str, (disk, layer): (&str, u32), partial: bool) -> Option<String> {
    let name = &vm.name;
    let is_it = |own: &&dalgu_proto::vm::Disk| own.name == disk && own.volume.is_none() && own.pool == pool;
    if !vm.spec.volumes().any(|own| is_it(&own)) {
        return Some(format!("VM {name} has no disk of that name in this pool"));
    }
    if partial {
        return Some(format!("the disks of VM {name} are whole, and this is not"));
    }
    (layer > 0 && !has_layer(vm, layer)).then(|| format!("VM {name} has no snapshot with layer {layer}"))
}

/// The path that is told: of a backup its directory, of others the file.
fn told(file: &PoolFile) -> &str {
    match &file.of {
        FileOf::Backup(_) => {
            let end = file.path.match_indices('/').nth(1);
            end.map_or(&file.path, |(end, _)| file.path.split_at(end).0)
        }
        _ => &file.path,
    }
}

/// Adds files that are nobody's to a look at what is there.
pub(super) fn have_owners(view: &View<'_>, look: &mut Look) {
    let pools = Pools::of(view);
    for (place, files) in &view.files {
        let (host, pool) = place;
        let files = match files {
            Ok(files) => files,
            Err(why) => {
                look.unchecked += 1;
                look.findings.push(Finding {
                    invariant: Invariant::I4,
                    severity: Severity::Notice,
                    kind: "FILES_NOT_SEEN",
                    subject: format!("pool {pool} of host {host}"),
                    seen: format!("what it holds is not known: {why}"),
                    next_step: "mend the pool, or update the host's agent".to_owned(),
                });
                continue;
            }
        };
        look.checked += files.len();
        let mut left = BTreeMap::<&str, (String, u64)>::new();
        for file in files {
            if let Some(why) = pools.surplus(place, file) {
                left.entry(told(file)).or_insert((why, 0)).1 += file.allocated_bytes;
            }
        }
        let inventory = view.state.hosts.get(host).map(|host| &host.inventory);
        let dir = inventory.and_then(|inventory| inventory.pool(pool));
        let dir = dir.map_or("", |pool| pool.path.as_str());
        look.findings.extend(left.into_iter().map(|(path, (why, bytes))| Finding {
            invariant: Invariant::I4,
            severity: Severity::Warning,
            kind: "LEFTOVER_FILE",
            subject: format!("file {dir}/{path} on host {host}"),
            seen: format!("{why}; it takes {} MiB of pool {pool}", bytes.div_ceil(1 << 20)),
            next_step: format!(
                "look at what it is, then move it away or remove it there: Dalgu keeps files that it does not know ({dir}/{path})"
            ),
        }));
    }
}

/// Adds volumes and backups whose files are gone to a look at what is there.
pub(super) fn are_there(view: &View<'_>, look: &mut Look) {
    let pools = Pools::of(view);
    let contents = Contents::of(view);
    for volume in view.state.volumes.values() {
        let moving = holder(view.state, volume.id).is_some_and(|vm| !pools.rests(vm));
        let host = volume
            .host
            .as_ref()
            .filter(|_| volume.made && !volume.purging && !moving);
        let Some(files) = host.and_then(|host| contents.seen_by(host, &volume.pool)) else {
            continue;
        };
        let base = FileOf::Volume {
            id: volume.id,
            layer: 0,
        };
        let mut own = files.get(&base).into_iter().flatten();
        if own.all(|file| file.partial) {
            look.findings.push(Finding {
                invariant: Invariant::I2,
                severity: Severity::Critical,
                kind: "VOLUME_FILE_MISSING",
                subject: format!("volume {}", volume.name),
                seen: format!(
                    "pool {} of host {} does not hold its file, volumes/{}",
                    volume.pool,
                    host.map(ToString::to_string).unwrap_or_default(),
                    volume.id
                ),
                next_step: "put the file back, or what a backup has of it: no blank one takes its place"
                    .to_owned(),
            });
        }
    }
    let whole = |backup: &&std::sync::Arc<BackupRecord>| backup.state == BackupState::Available;
    for backup in view.state.backups.values().filter(whole) {
        let Some(files) = contents.seen_by(&backup.host, &backup.pool) else {
            continue;
        };
        let own = files.get(&FileOf::Backup(backup.id));
        let own = own.map(Vec::as_slice).unwrap_or_default();
        look.findings.extend(missing(backup, own));
    }
}

/// What is not as it should be of the files of a backup that are there.
fn missing(backup: &BackupRecord, files: &[&PoolFile]) -> Option<Finding> {
    let there: BTreeMap<_, _> = files
        .iter()
        .map(|file| (file.path.as_str(), file.size_bytes))
        .collect();
    let wrong = backup.files.iter().find_map(|file| {
        let path = format!("backups/{}/{}", backup.id, file.file);
        match there.get(&*path) {
            None => Some(format!("does not hold {path}")),
            Some(size) if *size != file.size_bytes => Some(format!(
                "holds {path} with {size} bytes, which had {}",
                file.size_bytes
            )),
            Some(_) => None,
        }
    })?;
    Some(Finding {
        invariant: Invariant::I2,
        severity: Severity::Warning,
        kind: "BACKUP_FILE_MISSING",
        subject: format!("backup {}", backup.id),
        seen: format!("pool {} of host {} {wrong}", backup.pool, backup.host),
        next_step: format!(
            "put the file back; or delete the backup (`dalgu backup delete {} --with-children`), and take another of {}",
            backup.id, backup.vm_name
        ),
    })
}
