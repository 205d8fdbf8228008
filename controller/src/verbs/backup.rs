//! What operators do with backups and their schedules. Hosts are told by `backups::runner`.

use std::collections::BTreeMap;

use dalgu_proto::{
    host::GuestFeature,
    ids::{BackupId, HostName, NetworkName, ScheduleName, VmName},
    mutant::{self, Mutant},
    network::Port,
    vm::{BackupRef, CloneMode, FirstBoot, Plug, Spec, check_labels},
};

use super::{
    Caller, Error, check_etag, confirmed,
    create::{self, Create},
    find, migrate, pool_is_known, room,
};
use crate::{
    backups::{self, MAX_BACKUPS, MAX_OF_VM, MAX_SCHEDULES, plan::Due},
    hosts,
    model::{BackupKind, BackupRecord, BackupState, HostState, Outcome, ScheduleRecord, VmRecord},
    placement::Policy,
    state::{State, Tx},
};

/// What a host leaves free in a pool, in MiB: it begins no backup there with less.
const LEAST_FREE_MIB: u64 = 64;
/// Longest description of a VM that is made from a backup, in bytes; all of it is of ASCII.
const MAX_DESCRIPTION: usize = 1024;
/// What a site may have too many of.
const SITES: &str = "backups";

/// A new backup.
#[derive(Debug, Clone)]
pub struct CreateBackup {
    /// Pool of the files.
    pub pool: String,
    /// What it is to hold.
    pub kind: BackupKind,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Description.
    pub description: String,
    /// The schedule that it is taken by.
    pub schedule: Option<ScheduleName>,
}

/// A VM that is to be made from a backup.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Its name.
    pub name: VmName,
    /// Only this host.
    pub host: Option<HostName>,
    /// Leave it powered off.
    pub stopped: bool,
    /// With the addresses that the VM had.
    pub keep_addresses: bool,
    /// Its labels, over those that the VM had.
    pub labels: BTreeMap<String, String>,
    /// In none of the placement groups that the VM was in.
    pub without_placement_groups: bool,
    /// Pools of disks, in place of those that they were in.
    pub pools: BTreeMap<String, String>,
    /// Networks of interfaces, in place of what they were plugged into; `None` leaves one out.
    pub networks: BTreeMap<String, Option<NetworkName>>,
    /// It may take the room that is kept for protected domains.
    pub ignore_protection: bool,
    /// Which host is best.
    pub policy: Policy,
}

/// The backup of that id.
pub fn get(state: &State, id: BackupId) -> Result<BackupRecord, Error> {
    let backup = state.backups.get(&id);
    backup
        .map(|backup| (**backup).clone())
        .ok_or_else(|| Error::BackupNotFound(id.to_string()))
}

/// Refuses what a backup of the VM does not go along with.
pub fn none_under_way(state: &State, vm: &VmRecord) -> Result<(), Error> {
    let under_way = backups::under_way(state, vm.id);
    match under_way.filter(|_| !mutant::on(Mutant::BackupNotExcluded)) {
        Some(backup) => Err(Error::BackupInProgress {
            vm: vm.name.clone(),
            backup: backup.id,
        }),
        None => Ok(()),
    }
}

/// Begins a backup of the VM of that name.
pub fn create(tx: &mut Tx, caller: &Caller, vm: &str, new: CreateBackup) -> Result<Outcome, Error> {
    let vm = find(tx, vm)?;
    has_room(tx, &vm.owner, &new.pool)?;
    let message = format!("asked for by {}", caller.principal);
    begin(tx, &vm, new, &message)
}

/// Refuses what cannot fit, whatever the disks hold. One that is due is begun all the same: that it fails is what shows there.
fn has_room(state: &State, host: &HostName, pool: &str) -> Result<(), Error> {
    let view = state.hosts.get(host).map(|host| hosts::view(state, host));
    let free = view.and_then(|view| Some(view.pool(pool)?.available_mib));
    match free {
        Some(free) if free < LEAST_FREE_MIB => Err(Error::NoPoolRoom {
            pool: pool.to_owned(),
            host: host.clone(),
            wanted: LEAST_FREE_MIB,
            free,
        }),
        _ => Ok(()),
    }
}

/// Begins a backup that is due. One that cannot be begun has failed, for everybody to see, and is tried again as any other; what stands in
/// its way for a moment is waited for.
///
/// # Errors
/// Where it is waited for.
pub fn scheduled(tx: &mut Tx, due: &Due) -> Result<Outcome, Error> {
    let found = tx.vms.get(&due.vm).cloned();
    let vm = found.ok_or_else(|| Error::VmNotFound(due.vm.to_string()))?;
    let schedule = get_schedule(tx, &due.schedule)?;
    let new = CreateBackup {
        pool: schedule.pool,
        kind: due.kind,
        labels: BTreeMap::new(),
        description: String::new(),
        schedule: Some(schedule.name),
    };
    let message = format!("due by schedule {}", due.schedule);
    match begin(tx, &vm, new.clone(), &message) {
        Err(error) if passes(&error) && !due.is_late(tx.now()) => Err(error),
        // No room for more of them.
        Err(error @ (Error::LowSpace(_) | Error::TooMany { what: SITES, .. })) => Err(error),
        Err(error) => Ok(not_begun(tx, &vm, new, &error)),
        begun => begun,
    }
}

/// Whether what refuses a backup is over by itself soon.
const fn passes(error: &Error) -> bool {
    matches!(
        error,
        Error::Initializing
            | Error::BackupInProgress { .. }
            | Error::MigrationInProgress(_)
            | Error::ChangeInProgress { .. }
    )
}

/// Writes down that a backup was due and could not be begun.
fn not_begun(tx: &mut Tx, vm: &VmRecord, new: CreateBackup, error: &Error) -> Outcome {
    let backup = BackupRecord {
        state: BackupState::Failed,
        unbegun: true,
        complete_time: Some(tx.now()),
        error: Some(error.fault()),
        ..record(tx, vm, new)
    };
    let (id, (_, reason)) = (backup.id, error.reason());
    tx.backup_event(&backup, "BackupFailed", &format!("{reason}: {error}"));
    tx.put_backup(backup);
    Outcome::Backup(id)
}

fn begin(tx: &mut Tx, vm: &VmRecord, new: CreateBackup, message: &str) -> Result<Outcome, Error> {
    room(tx)?;
    may_begin(tx, vm)?;
    let shared = check_host(tx, vm, &new.pool)?;
    let too_many = |what, most| Err(Error::TooMany { what, most });
    if tx.backups.len() >= MAX_BACKUPS {
        return too_many(SITES, MAX_BACKUPS);
    }
    if backups::of_vm(tx, vm.id).count() >= MAX_OF_VM {
        return too_many("backups of this VM", MAX_OF_VM);
    }
    let parent = match new.kind {
        BackupKind::Full => None,
        BackupKind::Auto | BackupKind::Incremental => backups::parent(tx, vm.id, &new.pool),
    };
    if new.kind == BackupKind::Incremental && parent.is_none() {
        return Err(Error::NoCheckpoint(vm.name.clone()));
    }
    let backup = BackupRecord {
        shared,
        parent,
        ..record(tx, vm, new)
    };
    let id = backup.id;
    tx.backup_event(&backup, "BackupCreated", message);
    tx.put_backup(backup);
    Ok(Outcome::Backup(id))
}

/// A backup that nobody has been told of yet.
fn record(tx: &Tx, vm: &VmRecord, new: CreateBackup) -> BackupRecord {
    BackupRecord {
        id: BackupId::from_uuid(tx.new_id()),
        vm: vm.id,
        vm_name: vm.name.clone(),
        spec: vm.spec.clone(),
        traits: vm.into(),
        pool: new.pool,
        shared: false,
        host: vm.owner.clone(),
        kind: new.kind,
        parent: None,
        state: BackupState::Pending,
        quiesced: false,
        checkpoint: false,
        files: Vec::new(),
        full_reason: String::new(),
        unbegun: false,
        create_time: tx.now(),
        point_time: None,
        complete_time: None,
        labels: new.labels,
        description: new.description,
        schedule: new.schedule,
        error: None,
        revision: 0,
    }
}

/// Refuses a backup of a VM that is not at rest as far as its disks are concerned.
fn may_begin(tx: &Tx, vm: &VmRecord) -> Result<(), Error> {
    if vm.delete_time.is_some() {
        return Err(Error::Deleting(vm.name.clone()));
    }
    confirmed(vm)?;
    none_under_way(tx, vm)?;
    if tx.active_migrations.contains_key(&vm.id) {
        return Err(Error::MigrationInProgress(vm.name.clone()));
    }
    let next = match vm.disks_made {
        true => migrate::changing(tx, vm),
        false => Some("repeat when it has been created"),
    };
    if let Some(next) = next {
        let vm = vm.name.clone();
        return Err(Error::ChangeInProgress { vm, next });
    }
    migrate::snapshots_settled(tx, vm)?;
    if vm.spec.disks.is_empty() {
        return Err(Error::invalid("vm", "has no disks: there is nothing to back up"));
    }
    Ok(())
}

/// Whether other hosts see the pool too, on a host that can take backups there.
fn check_host(tx: &Tx, vm: &VmRecord, pool: &str) -> Result<bool, Error> {
    let host = &vm.owner;
    match hosts::state_of(tx, host) {
        HostState::Ready => {}
        HostState::Initializing => return Err(Error::Initializing),
        HostState::Unreachable => return Err(Error::HostUnreachable(host.clone())),
    }
    let record = tx.hosts.get(host);
    let inventory = &record
        .ok_or_else(|| Error::HostNotFound(host.to_string()))?
        .inventory;
    if !inventory.guest_features.contains(&GuestFeature::Backup) {
        return Err(Error::NoBackups(host.clone()));
    }
    match inventory.pool(pool) {
        Some(pool) => Ok(pool.shared),
        None => Err(Error::PoolNotFound {
            host: host.clone(),
            pool: pool.to_owned(),
        }),
    }
}

/// Asks for a backup to be deleted.
pub fn delete(
    tx: &mut Tx,
    caller: &Caller,
    id: BackupId,
    etag: &str,
    with_children: bool,
) -> Result<Outcome, Error> {
    let backup = get(tx, id)?;
    check_etag(etag, backup.revision, &id.to_string())?;
    let mut all = backups::descendants(tx, id);
    all.retain(|id| {
        tx.backups
            .get(id)
            .is_some_and(|other| other.state != BackupState::Deleting)
    });
    if !with_children && !all.is_empty() {
        return Err(Error::BackupHasChildren {
            backup: id,
            children: all.into_iter().collect(),
        });
    }
    all.insert(id);
    let restoring = tx.vms.values().find(|vm| {
        let mut from = vm.unmade().filter_map(|disk| disk.backup.as_ref());
        vm.delete_time.is_none() && from.any(|from| all.contains(&from.id))
    });
    if let Some(vm) = restoring {
        let vm = vm.name.clone();
        return Err(Error::BackupInUse { backup: id, vm });
    }
    let message = format!("asked for by {}", caller.principal);
    for id in all {
        condemn(tx, id, &message);
    }
    Ok(Outcome::BackupDeleted)
}

/// Marks a backup for deletion.
pub fn condemn(tx: &mut Tx, id: BackupId, message: &str) {
    let Some(backup) = tx.backups.get(&id).cloned() else {
        return;
    };
    if backup.unbegun {
        tx.backup_event(&backup, "BackupDeleted", message);
        tx.delete_backup(id);
    } else if backup.state != BackupState::Deleting {
        tx.backup_event(&backup, "BackupDeleting", message);
        tx.put_backup(BackupRecord {
            state: BackupState::Deleting,
            ..(*backup).clone()
        });
    }
}

/// Puts disks in other pools than they were in.
fn pools(spec: &mut Spec, pools: &BTreeMap<String, String>) -> Result<(), Error> {
    for (name, pool) in pools {
        let medium = spec.first_boot.as_mut().map(|told| &mut told.medium);
        let mut disks = spec.disks.iter_mut().chain(medium);
        let disk = disks.find(|disk| disk.name == *name);
        let unknown = || {
            Error::invalid(
                "pools",
                format!("the VM had no disk {name}: see `dalgu backup show`"),
            )
        };
        disk.ok_or_else(unknown)?.pool.clone_from(pool);
    }
    Ok(())
}

/// Plugs interfaces into other networks than they were in, or leaves them out.
fn networks(spec: &mut Spec, networks: &BTreeMap<String, Option<NetworkName>>) -> Result<(), Error> {
    for (name, network) in networks {
        let Some(at) = spec.nics.iter().position(|nic| nic.name == *name) else {
            let message = format!("the VM had no interface {name}: see `dalgu backup show`");
            return Err(Error::invalid("networks", message));
        };
        let Some(network) = network.clone() else {
            spec.nics.remove(at);
            continue;
        };
        let plug = &mut spec.nics[at].plug;
        *plug = Plug::Network(match plug {
            Plug::Network(port) => Port {
                network,
                ipv4: None,
                ipv6: None,
                ..port.clone()
            },
            Plug::Bridge { .. } => Port::new(network),
        });
    }
    Ok(())
}

/// What a VM is made of that is made from a backup, and what of that has to be left out.
fn restored(state: &State, backup: &BackupRecord, ask: &Restore) -> Result<(Spec, Vec<String>), Error> {
    let keep_addresses = ask.keep_addresses;
    let mut spec = backup.spec.clone();
    let mut left_out = Vec::new();
    networks(&mut spec, &ask.networks)?;
    pools(&mut spec, &ask.pools)?;
    for disk in &mut spec.disks {
        disk.image = None;
        disk.digest = None;
        disk.clone_mode = CloneMode::Any;
        disk.volume = None;
        disk.backup = Some(BackupRef {
            id: backup.id,
            pool: backup.pool.clone(),
            disk: disk.name.clone(),
        });
    }
    for nic in &mut spec.nics {
        if !keep_addresses {
            nic.mac = String::new();
        }
        if let Plug::Network(port) = &mut nic.plug {
            if !keep_addresses {
                port.ipv4 = None;
                port.ipv6 = None;
            }
            let gone = port
                .groups
                .extract_if(.., |group| !state.groups.contains_key(group));
            left_out.extend(gone.map(|group| format!("security group {group} of {} (gone)", nic.name)));
        }
    }
    if keep_addresses {
        // It finds its network as it left it: a new first boot would have it set up anew.
        spec.first_boot = None;
    } else if let Some(told) = &mut spec.first_boot {
        told_anew(told, &mut left_out);
    }
    Ok((spec, left_out))
}

/// What a guest is told that gets new addresses, so that it looks for these and not for those that it was told of first. Documents are
/// kept no longer than until disks are made.
fn told_anew(told: &mut FirstBoot, left_out: &mut Vec<String>) {
    if told.user_data.take().is_some() {
        left_out.push("user data (not kept)".to_owned());
    }
    if told.network_config.take().is_some() {
        left_out.push("network configuration (not kept: its interfaces have the usual one)".to_owned());
    }
}

/// The labels of a VM that is made from a backup.
fn labels(backup: &BackupRecord, given: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Error> {
    let mut labels = backup.traits.labels.clone();
    labels.extend(given);
    check_labels(&labels).map_err(|message| Error::invalid("labels", message))
}

/// Makes a VM from a backup, on a host that sees its files.
pub fn restore(tx: &mut Tx, caller: &Caller, id: BackupId, ask: Restore) -> Result<Outcome, Error> {
    let backup = get(tx, id)?;
    if backup.state != BackupState::Available {
        return Err(Error::BackupNotAvailable {
            backup: id,
            is: backup.state.as_str(),
        });
    }
    let host = match (backup.shared, ask.host.clone()) {
        (true, host) => host,
        (false, Some(host)) if host != backup.host => {
            return Err(Error::BackupElsewhere {
                backup: id,
                host: backup.host,
            });
        }
        (false, _) => Some(backup.host.clone()),
    };
    let (spec, mut left_out) = restored(tx, &backup, &ask)?;
    let mut placement_groups = backup.traits.placement_groups.clone();
    if ask.without_placement_groups {
        placement_groups.clear();
    }
    let gone = placement_groups.extract_if(.., |group| !tx.placement_groups.contains_key(group));
    left_out.extend(gone.map(|group| format!("placement group {group} (gone)")));
    let left_out = match left_out.as_slice() {
        [] => String::new(),
        all => format!("; left out: {}", all.join(", ")),
    };
    let mut description = format!("restored from backup {id} of {}{left_out}", backup.vm_name);
    description.truncate(MAX_DESCRIPTION);
    let new = Create {
        name: ask.name,
        spec,
        firmware_given: true,
        documents: Default::default(),
        labels: labels(&backup, ask.labels)?,
        drain_mode: backup.traits.drain_mode,
        placement_groups,
        tolerations: backup.traits.tolerations.clone(),
        description,
        stopped: ask.stopped,
        host,
        ignore_protection: ask.ignore_protection,
        policy: ask.policy,
    };
    tx.backup_event(&backup, "BackupRestoring", &format!("as {}{left_out}", new.name));
    create::create(tx, caller, new)
}

/// The schedule of that name.
pub fn get_schedule(state: &State, name: &ScheduleName) -> Result<ScheduleRecord, Error> {
    let schedule = state.schedules.get(name);
    schedule
        .map(|schedule| (**schedule).clone())
        .ok_or_else(|| Error::ScheduleNotFound(name.to_string()))
}

/// Enters a schedule.
pub fn create_schedule(tx: &mut Tx, new: ScheduleRecord) -> Result<Outcome, Error> {
    room(tx)?;
    if tx.schedules.contains_key(&new.name) {
        return Err(Error::ScheduleExists(new.name));
    }
    if tx.schedules.len() >= MAX_SCHEDULES {
        return Err(Error::TooMany {
            what: "backup schedules",
            most: MAX_SCHEDULES,
        });
    }
    fits(&new)?;
    pool_is_known(tx, &new.pool)?;
    let name = new.name.clone();
    let create_time = tx.now();
    tx.put_schedule(ScheduleRecord { create_time, ..new });
    Ok(Outcome::Schedule(name))
}

/// Refuses a schedule that would come to have more backups of a VM than there may be.
fn fits(schedule: &ScheduleRecord) -> Result<(), Error> {
    let most = backups::plan::most(schedule);
    if most <= MAX_OF_VM as u64 {
        return Ok(());
    }
    Err(Error::invalid(
        "backup_schedule.keep_days",
        format!(
            "keeps up to {most} backups of a VM at once, and there may be {MAX_OF_VM}: keep fewer days, or take them less often"
        ),
    ))
}

/// Changes a schedule.
pub fn update_schedule(
    tx: &mut Tx,
    name: &ScheduleName,
    etag: &str,
    change: impl FnOnce(&mut ScheduleRecord),
) -> Result<Outcome, Error> {
    room(tx)?;
    let old = get_schedule(tx, name)?;
    check_etag(etag, old.revision, name.as_str())?;
    let mut new = old.clone();
    change(&mut new);
    if new != old {
        fits(&new)?;
        if new.pool != old.pool {
            pool_is_known(tx, &new.pool)?;
        }
        tx.put_schedule(new);
    }
    Ok(Outcome::Schedule(name.clone()))
}

/// Deletes a schedule.
pub fn delete_schedule(tx: &mut Tx, name: &ScheduleName, etag: &str) -> Result<Outcome, Error> {
    let schedule = get_schedule(tx, name)?;
    check_etag(etag, schedule.revision, name.as_str())?;
    tx.delete_schedule(name);
    Ok(Outcome::ScheduleDeleted)
}
