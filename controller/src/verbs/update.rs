//! Changes of a VM's mutable fields: what is only said of it, and what it is made of.
//!
//! A VM that grows must have room on its own host, by placement's own tests, in the same transaction: then the room is its own.
//! What shrinks is given back when its host has carried that out ([`settle`]).

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use dalgu_proto::{
    host::GuestFeature,
    ids::GroupName,
    vm::{CloneMode, Disk, Firmware, Nic, Plug, RestartPolicy, Spec, first_boot::MEDIUM},
};

use super::{Caller, Error, backup, check_etag, confirmed, create, find, placement_group, room};
use crate::{
    hosts, images,
    model::{Change, DrainMode, EventKind, Observation, Outcome, VmRecord, VolumeRecord},
    networks,
    placement::{self, Policy, Request, Size},
    state::{State, Tx},
    verbs::migrate,
    volumes,
};

/// Addresses that are tried for an interface whose first one is taken.
const MACS_TRIED: u8 = 32;

/// New values of mutable fields; `None` leaves one as it is.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Description.
    pub description: Option<String>,
    /// What becomes of it when its host is drained.
    pub drain_mode: Option<DrainMode>,
    /// Placement groups and tolerations.
    pub placement: placement_group::Update,
    /// When its agent starts it again.
    pub restart_policy: Option<RestartPolicy>,
    /// Virtual processors.
    pub vcpus: Option<u32>,
    /// Memory.
    pub memory_mib: Option<u64>,
    /// Most virtual processors without a restart.
    pub max_vcpus: Option<Option<u32>>,
    /// Most memory without a restart.
    pub max_memory_mib: Option<Option<u64>>,
    /// Disks, all of them.
    pub disks: Option<Vec<Disk>>,
    /// Names of those that were given without a pool: one that is there stays in its own.
    pub poolless: BTreeSet<String>,
    /// Network interfaces, all of them.
    pub nics: Option<Vec<Nic>>,
    /// It may take the room that is kept for protected domains.
    pub ignore_protection: bool,
    /// Which host is best; for the hint where its own has no room.
    pub policy: Policy,
}

/// Changes a VM.
pub fn update(
    tx: &mut Tx,
    caller: &Caller,
    name: &str,
    etag: &str,
    update: Update,
) -> Result<Outcome, Error> {
    room(tx)?;
    let old = find(tx, name)?;
    check_etag(etag, old.revision, name)?;
    if old.delete_time.is_some() {
        return Err(Error::Deleting(old.name));
    }
    confirmed(&old)?;
    let mut vm = old.clone();
    vm.spec = specification(tx, caller, &old, &update)?;
    vm.labels = update.labels.unwrap_or(vm.labels);
    vm.description = update.description.unwrap_or(vm.description);
    vm.drain_mode = update.drain_mode.unwrap_or(vm.drain_mode);
    placement_group::update(tx, &mut vm, update.placement)?;
    if vm.spec != old.spec {
        vm.intent.generation = vm.intent.generation.next();
    }
    if !vm.spec.same_hardware(&old.spec) {
        may_change(tx, &old, &vm.spec)?;
        keeps_snapshots(&old, &vm.spec)?;
        vm.change = Some(changed(&old, &vm));
        vm.new_volumes = volumes::resolve::unmade(tx, &vm.spec.disks);
        fits(tx, &old, &vm, update.policy)?;
        if !update.ignore_protection {
            leaves_room(tx, &old, &vm, update.policy)?;
        }
    }
    if vm != old {
        tx.event(EventKind::Vm, "VmUpdated", &vm.name, "changed", None);
        tx.put_vm(vm);
    }
    Ok(Outcome::Vm(old.name))
}

/// What the VM is to be made of.
fn specification(state: &State, caller: &Caller, old: &VmRecord, update: &Update) -> Result<Spec, Error> {
    let mut spec = old.spec.clone();
    spec.restart_policy = update.restart_policy.unwrap_or(spec.restart_policy);
    spec.vcpus = update.vcpus.unwrap_or(spec.vcpus);
    spec.memory_mib = update.memory_mib.unwrap_or(spec.memory_mib);
    spec.max_vcpus = update.max_vcpus.unwrap_or(spec.max_vcpus);
    spec.max_memory_mib = update.max_memory_mib.unwrap_or(spec.max_memory_mib);
    let size = |spec: &Spec| (spec.vcpus, spec.memory_mib, spec.max_vcpus, spec.max_memory_mib);
    if !spec.fitting.is_none() && size(&spec) != size(&old.spec) {
        return Err(Error::SizeFixed(old.name.clone()));
    }
    let invalid = |field: &str, message: String| Error::invalid(format!("vm.spec.{field}"), message);
    if spec.most_vcpus() < spec.vcpus {
        let message = format!("must be at least the {} of `vcpus`, or 0", spec.vcpus);
        return Err(invalid("max_vcpus", message));
    }
    if spec.most_memory_mib() < spec.memory_mib {
        let message = format!("must be at least the {} of `memory_mib`, or 0", spec.memory_mib);
        return Err(invalid("max_memory_mib", message));
    }
    if let Some(disks) = &update.disks {
        let known = |disk: &Disk| old.spec.disks.iter().find(|before| before.name == disk.name);
        if let Some(index) = disks
            .iter()
            .position(|disk| disk.backup.is_some() && known(disk).is_none())
        {
            let message = "is set by RestoreBackup: leave it empty".to_owned();
            return Err(invalid(&format!("disks[{index}].backup"), message));
        }
        let mut given = disks.clone();
        for disk in given
            .iter_mut()
            .filter(|disk| update.poolless.contains(&disk.name))
        {
            disk.pool = known(disk).map_or_else(|| disk.pool.clone(), |known| known.pool.clone());
        }
        spec.disks = changed_disks(state, caller, old, &given)?;
    }
    if let Some(nics) = &update.nics {
        spec.nics = changed_nics(&old.spec, nics)?;
        fill_in(state, &mut spec, old)?;
        networks::resolve::ports(state, &mut spec, Some(old))?;
    }
    Ok(spec)
}

/// MAC addresses that were left to Dalgu. The VM's id is fixed, so an address that is taken is made anew.
fn fill_in(state: &State, spec: &mut Spec, old: &VmRecord) -> Result<(), Error> {
    let free = |spec: &Spec| create::free_macs(state, spec, Some(old.id));
    free(spec)?;
    let mut attempt = 0;
    loop {
        let mut filled = spec.clone();
        filled.fill_in_again(old.id, attempt);
        match free(&filled) {
            Err(error) if attempt == MACS_TRIED => return Err(error),
            Err(_) => attempt += 1,
            Ok(()) => {
                *spec = filled;
                return Ok(());
            }
        }
    }
}

fn immutable(path: String) -> Error {
    Error::PartNotMutable { path }
}

/// The disks that were given, each as it is but for its size, and new ones with what they are made from.
fn changed_disks(state: &State, caller: &Caller, old: &VmRecord, given: &[Disk]) -> Result<Vec<Disk>, Error> {
    let before = &old.spec.disks;
    let boot = before.first().filter(|_| old.spec.kernel_boot.is_none());
    if let Some(boot) = boot.filter(|boot| given.first().map(|disk| &disk.name) != Some(&boot.name)) {
        return Err(Error::BootDisk {
            vm: old.name.clone(),
            disk: boot.name.clone(),
        });
    }
    if old.spec.first_boot.is_some() && given.iter().any(|disk| disk.name == MEDIUM) {
        return Err(Error::invalid(
            "vm.spec.disks",
            format!("the name {MEDIUM:?} is taken"),
        ));
    }
    let leaving = old.change.iter().flat_map(|change| &change.left_out);
    let leaving: BTreeSet<_> = leaving.map(|disk| disk.name.as_str()).collect();
    let mut disks = Vec::with_capacity(given.len());
    for disk in given {
        let known = before.iter().find(|known| known.name == disk.name);
        match known {
            Some(known) => {
                may_move(state, old, known, &disk.pool)?;
                disks.push(same_disk(known, disk)?);
            }
            None if leaving.contains(disk.name.as_str()) => {
                return Err(Error::DiskLeaving {
                    vm: old.name.clone(),
                    disk: disk.name.clone(),
                });
            }
            None => disks.push(new_disk(state, caller, old, disk)?),
        }
    }
    volumes::resolve::volumes(state, &mut disks, before)?;
    let gone = before
        .iter()
        .filter(|disk| !given.iter().any(|other| other.name == disk.name));
    for disk in gone {
        stays_put(state, old, disk)?;
    }
    let fresh = |disk: &&mut Disk| !before.iter().any(|known| known.name == disk.name);
    for disk in disks
        .iter_mut()
        .filter(fresh)
        .filter(|disk| disk.volume.is_some())
    {
        attachable(state, old, disk)?;
    }
    Ok(disks)
}

/// Refuses to move a disk to where it cannot be.
fn may_move(state: &State, vm: &VmRecord, disk: &Disk, pool: &str) -> Result<(), Error> {
    let volume = volumes::resolve::of_disk(state, disk);
    // One that is called back to where it is goes nowhere.
    if disk.pool == pool || volume.is_some_and(|volume| pool.is_empty() || volume.pool == pool) {
        return Ok(());
    }
    let field = format!("disks[{}]", disk.name);
    let seen = state.observation(vm);
    let awaited = seen.is_some_and(|seen| seen.pending.iter().any(|pending| pending.field == field));
    let change = vm.change.as_ref();
    let added = change.is_some_and(|change| change.added.contains(&disk.name));
    // Its file is full of data: it is moved where its host has said that the VM has it, and not before.
    let unsure = volume
        .is_some_and(|volume| !volume.made || !seen.is_some_and(|seen| volumes::resolve::settled(vm, seen)));
    if awaited || added || unsure {
        return Err(Error::ChangeInProgress {
            vm: vm.name.clone(),
            next: "its host has not said that the disk is there, see `dalgu vm show`: move it when it has come",
        });
    }
    if volumes::is_shared(state, &vm.owner, pool)
        && disk.digest.is_some()
        && disk.clone_mode == CloneMode::Overlay
    {
        return Err(Error::OverlayStays {
            disk: disk.name.clone(),
            pool: pool.to_owned(),
        });
    }
    Ok(())
}

/// Refuses to take a volume from a VM, or the VM from a volume, while nobody can say which of two pools has it.
pub(super) fn stays_put(state: &State, vm: &VmRecord, disk: &Disk) -> Result<(), Error> {
    match volumes::is_moving(state, vm, disk) {
        false => Ok(()),
        true => Err(Error::ChangeInProgress {
            vm: vm.name.clone(),
            next: "a volume of it is on its way to another pool: repeat when it is there, see `dalgu vm show`, or call it back first \
                   (`dalgu vm update VM --move-disk DISK=POOL`)",
        }),
    }
}

/// A disk that is there, with its new size, pool and limits.
fn same_disk(known: &Disk, given: &Disk) -> Result<Disk, Error> {
    let at = |field: &str| format!("spec.disks[{}].{field}", known.name);
    let name = |disk: &Disk| disk.volume.as_ref().map(|volume| volume.name.clone());
    // A volume says these for itself.
    let volume = known.volume.is_some();
    let fixed = [
        ("volume", name(known) == name(given)),
        (
            "image",
            known.image == given.image || (volume && given.image.is_none()),
        ),
        (
            "format",
            match volume {
                true => volumes::resolve::says_format(given, known.format),
                false => known.format == given.format,
            },
        ),
        (
            "clone_mode",
            given.clone_mode == CloneMode::Any || known.clone_mode == given.clone_mode,
        ),
    ];
    if let Some((field, _)) = fixed.iter().find(|(_, same)| !same) {
        return Err(immutable(at(field)));
    }
    let size_mib = match given.size_mib {
        0 => known.size_mib,
        size if size < known.size_mib => {
            return Err(Error::DiskShrinks {
                disk: known.name.clone(),
                now: known.size_mib,
                wanted: size,
            });
        }
        size => size,
    };
    Ok(Disk {
        size_mib,
        pool: match given.pool.is_empty() {
            true => known.pool.clone(),
            false => given.pool.clone(),
        },
        limits: given.limits,
        ..known.clone()
    })
}

/// A disk that is added, with the image that it is made from; of a volume, as it was given.
fn new_disk(state: &State, caller: &Caller, vm: &VmRecord, given: &Disk) -> Result<Disk, Error> {
    if given.volume.is_some() {
        return Ok(given.clone());
    }
    let mut alone = Spec {
        disks: vec![given.clone()],
        ..vm.spec.clone()
    };
    images::resolve::images(state, &mut alone, &caller.principal)?;
    if let Some(host) = state.hosts.get(&vm.owner) {
        images::resolve::clone_modes(&mut alone, host)?;
    }
    Ok(alone.disks.remove(0))
}

/// That the VM's host can have a volume, and how it is made there, if it is new.
fn attachable(state: &State, vm: &VmRecord, disk: &mut Disk) -> Result<(), Error> {
    volumes::resolve::reachable(state, vm, disk)?;
    let host = state.hosts.get(&vm.owner);
    let able = host.filter(|host| host.inventory.guest_features.contains(&GuestFeature::Volume));
    let Some(host) = able else {
        return Err(Error::HostTooOld(vm.owner.clone()));
    };
    let mut alone = Spec {
        disks: vec![disk.clone()],
        ..vm.spec.clone()
    };
    images::resolve::clone_modes(&mut alone, host)?;
    *disk = alone.disks.remove(0);
    Ok(())
}

/// The interfaces that were given, each as it is but for what its port lets through.
fn changed_nics(old: &Spec, given: &[Nic]) -> Result<Vec<Nic>, Error> {
    let same = |nic: &Nic| {
        let Some(known) = old.nics.iter().find(|known| known.name == nic.name) else {
            return Ok(nic.clone());
        };
        let at = |field: &str| immutable(format!("spec.nics[{}].{field}", nic.name));
        if !nic.mac.is_empty() && nic.mac != known.mac {
            return Err(at("mac"));
        }
        if nic.reserved_mbit != known.reserved_mbit {
            return Err(at("reserved_mbit_per_second"));
        }
        let plug = match (&known.plug, &nic.plug) {
            (Plug::Bridge { bridge }, Plug::Bridge { bridge: other }) if bridge == other => {
                known.plug.clone()
            }
            (Plug::Network(known), Plug::Network(port)) if known.network == port.network => {
                let mut port = port.clone();
                port.ipv4 = port.ipv4.or(known.ipv4);
                port.ipv6 = port.ipv6.or(known.ipv6);
                if port.ipv4 != known.ipv4 {
                    return Err(at("ipv4_address"));
                }
                if port.ipv6 != known.ipv6 {
                    return Err(at("ipv6_address"));
                }
                Plug::Network(port)
            }
            (Plug::Bridge { .. }, _) => return Err(at("bridge")),
            (Plug::Network(_), _) => return Err(at("network")),
        };
        Ok(Nic {
            plug,
            ..known.clone()
        })
    };
    given.iter().map(same).collect()
}

/// Refuses a change of a VM that moves, or whose host's agent knows of no such changes.
fn may_change(state: &State, vm: &VmRecord, wanted: &Spec) -> Result<(), Error> {
    if state.active_migrations.contains_key(&vm.id) {
        return Err(Error::MigrationInProgress(vm.name.clone()));
    }
    backup::none_under_way(state, vm)?;
    let host = state.hosts.get(&vm.owner);
    let offers = |feature| host.is_some_and(|host| host.inventory.guest_features.contains(&feature));
    let otherwise = |disk: &Disk| {
        let known = vm.spec.disks.iter().find(|known| known.name == disk.name);
        match known {
            Some(known) => (&disk.pool, disk.limits) != (&known.pool, known.limits),
            None => !disk.limits.is_none(),
        }
    };
    let able = !wanted.disks.iter().any(otherwise) || offers(GuestFeature::DiskChange);
    // One of an earlier version would leave the old file behind.
    let moves = |disk: &Disk| {
        let mut known = vm.spec.disks.iter();
        disk.volume.is_some() && known.any(|known| known.name == disk.name && known.pool != disk.pool)
    };
    let able = able && (!wanted.disks.iter().any(moves) || offers(GuestFeature::VolumeMove));
    if !able || !offers(GuestFeature::HotChange) {
        return Err(Error::HostTooOld(vm.owner.clone()));
    }
    new_groups_are_known(state, vm, wanted)
}

/// Refuses a group that an interface is given, where the VM's host does not know what its rules say.
fn new_groups_are_known(state: &State, vm: &VmRecord, wanted: &Spec) -> Result<(), Error> {
    if networks::resolve::knows_icmp_types(state, &vm.owner) {
        return Ok(());
    }
    let has = |nic: &Nic, group: &GroupName| nic.port().is_some_and(|port| port.groups.contains(group));
    let had = |nic: &Nic, group| {
        vm.spec
            .nics
            .iter()
            .any(|known| known.name == nic.name && has(known, group))
    };
    for nic in &wanted.nics {
        if let Some(group) = networks::resolve::told_apart(state, nic).find(|group| !had(nic, group)) {
            return Err(Error::NoIcmpTypes {
                group: group.clone(),
                host: vm.owner.clone(),
            });
        }
    }
    Ok(())
}

/// Refuses other disks, or larger ones, while there are snapshots: going back to one would have to bring them back too.
fn keeps_snapshots(old: &VmRecord, new: &Spec) -> Result<(), Error> {
    let Some(first) = old.snapshots.all.first() else {
        return Ok(());
    };
    let of = |spec: &Spec| {
        let disks = spec.disks.iter();
        disks
            .map(|disk| (disk.name.clone(), disk.size_mib, disk.pool.clone()))
            .collect::<Vec<_>>()
    };
    if of(&old.spec) == of(new) {
        return Ok(());
    }
    Err(Error::SnapshotsPresent {
        vm: old.name.clone(),
        first: first.name.clone(),
        cannot: "its disks can neither come, go, move nor grow",
    })
}

/// The disk of that name in the same pool.
fn same_place<'a>(disks: &'a [Disk], disk: &Disk) -> Option<&'a Disk> {
    let same = |other: &&Disk| other.name == disk.name && other.pool == disk.pool;
    disks.iter().find(same)
}

/// What is to be remembered until the host has carried the change out.
fn changed(old: &VmRecord, new: &VmRecord) -> Change {
    let held = old.held();
    let has = |disks: &[Disk], name: &str| disks.iter().any(|disk| disk.name == name);
    // Also those that are to be in another pool.
    let left_out = held
        .disks
        .iter()
        .filter(|disk| same_place(&new.spec.disks, disk).is_none());
    let mut added = old
        .change
        .as_ref()
        .map(|change| change.added.clone())
        .unwrap_or_default();
    let fresh = new
        .spec
        .disks
        .iter()
        .filter(|disk| disk.volume.is_none() && !has(&old.spec.disks, &disk.name));
    added.extend(fresh.map(|disk| disk.name.clone()));
    added.retain(|name| has(&new.spec.disks, name));
    Change {
        generation: new.intent.generation,
        vcpus: held.vcpus,
        memory_mib: held.memory_mib,
        left_out: left_out.cloned().collect(),
        added,
    }
}

/// Refuses what the VM's own host has no room for. Only what is added is judged: what it has, it keeps.
fn fits(state: &State, old: &VmRecord, new: &VmRecord, policy: Policy) -> Result<(), Error> {
    let Some(host) = state.hosts.get(&new.owner) else {
        return Ok(());
    };
    let (before, after) = (old.held(), new.held());
    let mut view = hosts::view(state, host);
    // It stays where it is, whether or not its host takes new ones.
    view.keep();
    view.taints = Cow::default();
    view.vcpus_reserved = view.vcpus_reserved.saturating_sub(before.vcpus);
    view.memory_mib_reserved = view
        .memory_mib_reserved
        .saturating_sub(before.reserved_memory_mib());
    let more_vcpus = after.vcpus > before.vcpus;
    let more_memory = after.reserved_memory_mib() > before.reserved_memory_mib();
    if !more_memory {
        view.memory_mib_reserved = 0;
        view.reserved_memory_mib = 0;
        view.unmanaged_memory_mib = 0;
    }
    let grown = |disk: &Disk| {
        let known = same_place(&before.disks, disk);
        // A volume that was attached before has its room where it is, and none where it moves to.
        let has_room = |volume: &&VolumeRecord| volume.host.is_some() && volume.pool == disk.pool;
        let placed = volumes::resolve::of_disk(state, disk).filter(has_room);
        let had = known
            .map(|known| known.size_mib)
            .or_else(|| placed.map(|volume| volume.size_mib));
        let size_mib = disk.size_mib.saturating_sub(had.unwrap_or(0));
        (size_mib > 0).then(|| Disk {
            size_mib,
            ..disk.clone()
        })
    };
    let new_nic = |nic: &&Nic| !old.spec.nics.iter().any(|known| known.name == nic.name);
    let added = Spec {
        vcpus: if more_vcpus { after.vcpus } else { 0 },
        memory_mib: if more_memory { after.memory_mib } else { 0 },
        disks: new.spec.disks.iter().filter_map(grown).collect(),
        nics: new.spec.nics.iter().filter(new_nic).cloned().collect(),
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Firmware::Bios,
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
        ..new.spec.clone()
    };
    let needs = networks::resolve::needs(state, &added);
    let request = Request::new(added).with_needs(needs).on(Some(new.owner.clone()));
    let mut decision = placement::decide(&request, &[view], &policy);
    if decision.host.is_some() {
        return Ok(());
    }
    // Where it would have the room that it asks for.
    let elsewhere = migrate::request(state, new, None);
    let best = placement::decide_keeping(&elsewhere, &hosts::views(state), create::rule(state, policy), 2);
    if let Some(hint) = &mut decision.hint {
        let other = match best.host {
            Some(host) => format!(
                "{host} has the room: `dalgu vm migrate {} --host {host}` first",
                new.name
            ),
            None => "no other host has the room either".to_owned(),
        };
        hint.text = format!("{other}; or {}", hint.text);
    }
    Err(Error::NoCapacity {
        decision: Box::new(decision),
        sleeper: None,
        in_pieces: false,
    })
}

/// Refuses what takes the room that is kept for protected domains.
fn leaves_room(tx: &Tx, old: &VmRecord, new: &VmRecord, policy: Policy) -> Result<(), Error> {
    let size = |vm: &VmRecord| {
        let held = vm.held();
        Size {
            vcpus: held.vcpus,
            memory_mib: held.reserved_memory_mib(),
        }
    };
    let (before, after) = (size(old), size(new));
    if after.vcpus <= before.vcpus && after.memory_mib <= before.memory_mib {
        return Ok(());
    }
    let grown = tx.may_grow(&new.owner, before, after, policy);
    grown.map_err(|(domain, lacking)| Error::NoCapacity {
        decision: Box::new(placement::unprotected(&new.owner, &domain, lacking)),
        sleeper: None,
        in_pieces: false,
    })
}

/// What is left of a change after what the VM's host says of it; called for each word of its owner. Room is given back
/// only here.
pub fn settle(vm: &VmRecord, seen: &Observation) -> Option<Change> {
    let mut change = vm.change.clone()?;
    if seen.observed < change.generation {
        return Some(change);
    }
    change.added.clear();
    if !seen.is_pending("vcpus") {
        change.vcpus = vm.spec.vcpus;
    }
    if !seen.is_pending("memory_mib") {
        change.memory_mib = vm.spec.memory_mib;
    }
    change.left_out.retain(|disk| {
        let moves = vm.spec.disks.iter().any(|other| other.name == disk.name);
        let field = if moves { ".pool" } else { "" };
        seen.is_pending(&format!("disks[{}]{field}", disk.name))
    });
    let small = change.vcpus <= vm.spec.vcpus && change.memory_mib <= vm.spec.memory_mib;
    (!small || !change.left_out.is_empty()).then_some(change)
}

#[cfg(test)]
mod tests;
