//! What operators ask for, as changes of the state: each verb is one transaction, with its operation and its events.
//!
//! Called by `api` inside [`crate::state::Db::transact`]. A verb checks, changes the intent, and returns at once; carrying
//! it out is for `reconcile`. [`once`] makes a repeated request harmless.

pub mod backup;
pub mod cancel;
pub mod create;
#[cfg(test)]
mod device_tests;
pub mod drain;
pub mod host;
pub mod host_power;
pub mod image;
pub mod migrate;
pub mod network;
#[cfg(test)]
mod numa_tests;
pub mod placement_group;
pub mod plan;
pub mod power;
mod reason;
pub mod refused;
pub mod snapshot;
pub mod update;
pub mod volume;

use std::collections::BTreeSet;

use dalgu_proto::{
    ids::{
        BackupId, GroupName, HostName, NetworkName, OperationId, PlacementGroupName, PlanId, ScheduleName,
        SnapshotName, VmName, VolumeName,
    },
    mutant::{self, Mutant},
    snapshot::MAX_SNAPSHOTS,
};

use crate::{
    images,
    model::{
        Code, EventKind, Fault, OperationKind, OperationRecord, OperationState, Outcome, Phase,
        RequestRecord, VmRecord,
    },
    networks,
    placement::Decision,
    power::look::{Need, Sleeper},
    reconcile::{plan::Ending, step},
    space::Space,
    state::{State, Tx},
    volumes,
};

/// Why a verb is refused; nothing has changed then.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No such VM.
    #[error("there is no VM named {0}; see `dalgu vm list`")]
    VmNotFound(String),
    /// No such host.
    #[error("there is no host named {0}; see `dalgu host list`")]
    HostNotFound(String),
    /// No such image, or not for this caller.
    #[error("there is no image {0}; see `dalgu image list`")]
    ImageNotFound(String),
    /// Name and version are taken.
    #[error("an image {0} exists already: choose another version, or delete it first")]
    ImageExists(String),
    /// It is not ready.
    #[error("image {image} is {is}: {next}")]
    ImageNotAvailable {
        /// The image.
        image: String,
        /// How far it is.
        is: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// VMs have disks that were made from it, or volumes start from it.
    #[error(
        "image {image} is in use by {users} {what}, {first} among them: delete them first, `dalgu vm list` and \
         `dalgu volume list` show them"
    )]
    ImageInUse {
        /// The image.
        image: String,
        /// How many.
        users: usize,
        /// Of what.
        what: &'static str,
        /// One of them.
        first: String,
    },
    /// It is going away.
    #[error("image {0} is being deleted: nothing else can be asked of it")]
    ImageDeleting(String),
    /// It takes no bytes.
    #[error("image {image} is {is} and takes no bytes: see `dalgu image get {image}`")]
    NotAwaitingUpload {
        /// The image.
        image: String,
        /// How far it is.
        is: &'static str,
    },
    /// No host can take it.
    #[error("{}", no_image_room(*wanted, best.as_ref()))]
    NoImageRoom {
        /// Bytes that are wanted.
        wanted: u64,
        /// The host with the most room, and that.
        best: Option<(HostName, u64)>,
    },
    /// No such operation.
    #[error("there is no operation {0}; ended ones are kept for a limited time")]
    OperationNotFound(String),
    /// The name is taken.
    #[error("a VM named {0} exists already: choose another name, or delete it first")]
    VmExists(VmName),
    /// Another interface has the address.
    #[error(
        "the MAC address {mac} is in use by {holder}: leave nics[].mac empty to get one that is free, or choose another"
    )]
    MacInUse {
        /// The address.
        mac: String,
        /// Who has it.
        holder: MacHolder,
    },
    /// The name is taken.
    #[error("a network named {0} exists already: choose another name, or delete it first")]
    NetworkExists(NetworkName),
    /// Another network has it.
    #[error("VNI {vni} is that of network {holder}: choose another, or leave it out to get one that is free")]
    VniInUse {
        /// The identifier.
        vni: u32,
        /// Who has it.
        holder: NetworkName,
    },
    /// VMs have interfaces in it.
    #[error(
        "network {network} has {interfaces} interfaces, {first} among them: delete their VMs first, \
         `dalgu network interfaces {network}` shows them"
    )]
    NetworkInUse {
        /// The network.
        network: NetworkName,
        /// How many.
        interfaces: usize,
        /// One of them.
        first: String,
    },
    /// The name is taken.
    #[error("a security group named {0} exists already: choose another name, or delete it first")]
    GroupExists(GroupName),
    /// Somebody needs it.
    #[error("security group {group} is in use: {user}. Take it out there first")]
    GroupInUse {
        /// The group.
        group: GroupName,
        /// Who.
        user: String,
    },
    /// No such placement group.
    #[error("there is no placement group named {0}; see `dalgu placement-group list`")]
    PlacementGroupNotFound(PlacementGroupName),
    /// The name is taken.
    #[error("a placement group named {0} exists already: choose another name, or delete it first")]
    PlacementGroupExists(PlacementGroupName),
    /// VMs are in it.
    #[error(
        "placement group {group} has {vms} VMs, {first} among them: take them out first (`dalgu vm update {first} --leave-group {group}`)"
    )]
    PlacementGroupInUse {
        /// The group.
        group: PlacementGroupName,
        /// How many.
        vms: usize,
        /// One of them.
        first: VmName,
    },
    /// Rules of where VMs may be exclude each other.
    #[error("{0}")]
    PlacementConflict(String),
    /// As many as a site may have.
    #[error("the site has {most} {what}, the most that it may have: delete some that nobody needs")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many it may have.
        most: usize,
    },
    /// The name is taken.
    #[error("a volume named {0} exists already: choose another name, or delete it first")]
    VolumeExists(VolumeName),
    /// What is beyond the new end would be lost.
    #[error("volume {volume} has {now} MiB and cannot shrink to {wanted} MiB: make a smaller one, and copy")]
    VolumeShrinks {
        /// The volume.
        volume: VolumeName,
        /// Its size.
        now: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// Too late.
    #[error("volume {0} is being removed for good: its deletion cannot be taken back any more")]
    VolumePurged(VolumeName),
    /// The pool of a volume or of a backup is full.
    #[error(
        "pool {pool} of host {host} has {free} MiB free, {wanted} or more are wanted: free some there, or enlarge the pool"
    )]
    NoPoolRoom {
        /// The pool.
        pool: String,
        /// The host.
        host: HostName,
        /// What was asked for.
        wanted: u64,
        /// What there is.
        free: u64,
    },
    /// A volume is not there, or cannot be had.
    #[error(transparent)]
    Volume(volumes::resolve::Error),
    /// A network or group is not there, or has no room.
    #[error(transparent)]
    Network(networks::resolve::Error),
    /// No such backup.
    #[error("there is no backup {0}; see `dalgu backup list`")]
    BackupNotFound(String),
    /// One of the VM is being taken.
    #[error(
        "backup {backup} of {vm} is being taken: wait for it, or give it up with `dalgu backup delete {backup}`"
    )]
    BackupInProgress {
        /// The VM.
        vm: VmName,
        /// The backup.
        backup: BackupId,
    },
    /// Others need it.
    #[error(
        "backup {backup} is needed by {}: delete them first, or all with --with-children",
        names(.children)
    )]
    BackupHasChildren {
        /// The backup.
        backup: BackupId,
        /// Those that need it.
        children: Vec<BackupId>,
    },
    /// A VM is made from it.
    #[error("{vm} is being made from backup {backup}: repeat when it is there, or delete it first")]
    BackupInUse {
        /// The backup.
        backup: BackupId,
        /// The VM.
        vm: VmName,
    },
    /// It is not whole.
    #[error("backup {backup} is {is}: only one that is available can be restored")]
    BackupNotAvailable {
        /// The backup.
        backup: BackupId,
        /// How far it is.
        is: &'static str,
    },
    /// Only one host has its files.
    #[error(
        "the files of backup {backup} are on host {host} alone, in a pool that is not shared: restore it there"
    )]
    BackupElsewhere {
        /// The backup.
        backup: BackupId,
        /// Who has them.
        host: HostName,
    },
    /// Nothing is there that an incremental one could begin from.
    #[error(
        "no earlier backup of {0} in this pool left a checkpoint: take a full one first, or leave the kind to Dalgu"
    )]
    NoCheckpoint(VmName),
    /// The host cannot keep it there.
    #[error("host {host}, where the VM is, has no pool {pool}; see `dalgu host show {host}`")]
    PoolNotFound {
        /// The host.
        host: HostName,
        /// The pool.
        pool: String,
    },
    /// No host keeps anything there.
    #[error("no host has a pool {pool}; there are: {}", listed(.known))]
    NoSuchPool {
        /// The pool.
        pool: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// No host's pool of that name is so large.
    #[error(
        "no pool {pool} takes {wanted} MiB: the largest of that name takes {most} MiB; choose another, or enlarge it"
    )]
    PoolTooSmall {
        /// The pool.
        pool: String,
        /// What was asked for.
        wanted: u64,
        /// What the largest can be promised.
        most: u64,
    },
    /// Nobody would see the volumes there any more.
    #[error(
        "volume {volume} is in the shared pool {pool}, which no other host has: register one that has it first, or delete the volumes there (`dalgu volume list`), whose files then stay with {host}"
    )]
    LastOfPool {
        /// The host.
        host: HostName,
        /// The pool.
        pool: String,
        /// A volume in it.
        volume: VolumeName,
    },
    /// The host's agent knows of no backups.
    #[error("the agent of host {0} does not offer backups: update it")]
    NoBackups(HostName),
    /// No such schedule.
    #[error("there is no backup schedule named {0}; see `dalgu backup schedule list`")]
    ScheduleNotFound(String),
    /// The name is taken.
    #[error("a backup schedule named {0} exists already: choose another name, or change that one")]
    ScheduleExists(ScheduleName),
    /// Somebody else changed the object.
    #[error(
        "the etag of {0} is not the current one, somebody changed it meanwhile: read it again and repeat"
    )]
    EtagMismatch(String),
    /// A backup was restored, and nobody has looked at what hosts have.
    #[error(
        "the controller was restored from a backup and only observes: see `dalgu site show`, then `dalgu site resume`"
    )]
    Observing,
    /// Another controller is in charge.
    #[error(
        "another controller is in charge of this site's hosts ({0}): make the change there, and stop this one"
    )]
    Replaced(String),
    /// After a restore, no host has shown the VM yet.
    #[error(
        "no host has shown VM {0} since the restore, so nothing but its deletion can be asked of it: see `dalgu site show`"
    )]
    Unconfirmed(VmName),
    /// The disk that the store is on is nearly full.
    #[error(
        "the controller's disk has {} MiB free and keeps {} MiB in reserve: nothing new is made until there is more room; free \
         some on the file system of its data_dir, then repeat",
        .0.free_bytes >> 20, .0.reserve_bytes >> 20
    )]
    LowSpace(Space),
    /// No host can take the VM.
    #[error("{}", no_capacity(decision, sleeper.as_ref(), *in_pieces))]
    NoCapacity {
        /// Every host's verdict.
        decision: Box<Decision>,
        /// A host that is not on and could.
        sleeper: Option<Sleeper>,
        /// Several hosts have the room together.
        in_pieces: bool,
    },
    /// No host can take the VM, and none would after a few moves.
    #[error("no {moves} moves of other VMs would make room for it; {}", decision.summary)]
    NoRoomToMake {
        /// Moves that were allowed.
        moves: usize,
        /// Why there is none as it is.
        decision: Box<Decision>,
    },
    /// It must run for that.
    #[error("{vm} is {is}: {next}")]
    NotRunning {
        /// The VM.
        vm: VmName,
        /// What it is.
        is: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// It must run for that, and is on its way there, or from there.
    #[error("{vm} is {is}: {next}")]
    PowerChanging {
        /// The VM.
        vm: VmName,
        /// Which way.
        is: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// It must not run for that.
    #[error("{0} is running: stop it first, or delete it with force")]
    Running(VmName),
    /// It is going away.
    #[error("{0} is being deleted: nothing else can be asked of it")]
    Deleting(VmName),
    /// Other hosts show it too: nobody can say which copy is meant.
    #[error(
        "{vm} belongs to {owner}, and is on {} too: remove it there by hand first (`virsh undefine {vm}`), or after a restore \
         resume the site; nothing was deleted",
        join(.hosts)
    )]
    SeveralHosts {
        /// The VM.
        vm: VmName,
        /// Its owner.
        owner: HostName,
        /// Others that show it.
        hosts: Vec<HostName>,
    },
    /// No such plan.
    #[error("there is no plan {0}; the last ones that have ended are kept, see `dalgu plan list`")]
    PlanNotFound(String),
    /// One is carried out.
    #[error(
        "plan {0} is being carried out: wait for its end (`dalgu plan show {0}`), or give it up (`dalgu plan cancel {0}`)"
    )]
    PlanInProgress(PlanId),
    /// It does not wait for approval.
    #[error("plan {plan} is {is}: only one that is proposed can be approved")]
    PlanNotProposed {
        /// The plan.
        plan: PlanId,
        /// How far it is.
        is: &'static str,
    },
    /// What was approved is something else.
    #[error(
        "that is not the hash of plan {0}: look at it again (`dalgu plan show {0}`) and approve what it says"
    )]
    PlanHash(PlanId),
    /// The site is another one by now.
    #[error("plan {0} was made more than an hour ago: make a new one")]
    PlanOutdated(PlanId),
    /// There is nothing to give up.
    #[error("plan {plan} is {is} already")]
    PlanEnded {
        /// The plan.
        plan: PlanId,
        /// How it ended.
        is: &'static str,
    },
    /// It is not where a plan expects it.
    #[error("{vm} is on {found} and no longer on {expected}: make a new plan")]
    VmMoved {
        /// The VM.
        vm: VmName,
        /// Where it was.
        expected: HostName,
        /// Where it is.
        found: HostName,
    },
    /// It is not what a plan was made for.
    #[error("{0} was changed since the plan was made: make a new plan")]
    VmChanged(VmName),
    /// It moves.
    #[error("{0} is migrating already: wait for that operation, or cancel it")]
    MigrationInProgress(VmName),
    /// What it is made of is being changed.
    #[error("{vm} is being changed: {next}")]
    ChangeInProgress {
        /// The VM.
        vm: VmName,
        /// What to do.
        next: &'static str,
    },
    /// It is fitted onto its host by its size.
    #[error(
        "{0} has dedicated processors, huge pages or a NUMA policy, so its size is fixed: make a new VM of the other size, for example from a backup of it"
    )]
    SizeFixed(VmName),
    /// It has devices of its host.
    #[error(
        "{0} has PCI devices of its host and cannot migrate: stop it while something is done to the host, or make a new VM elsewhere, for example from a backup of it"
    )]
    DevicesStay(VmName),
    /// It boots from that disk.
    #[error("{vm} boots from disk {disk}: it stays the first of its disks")]
    BootDisk {
        /// The VM.
        vm: VmName,
        /// The disk.
        disk: String,
    },
    /// A disk of that name is still there.
    #[error(
        "{vm} still has a disk {disk} that is being removed: repeat when it is gone, or choose another name (`dalgu vm show`)"
    )]
    DiskLeaving {
        /// The VM.
        vm: VmName,
        /// The disk.
        disk: String,
    },
    /// What is beyond the new end would be lost.
    #[error(
        "disk {disk} has {now} MiB and cannot shrink to {wanted} MiB: add a smaller one, copy, and remove this one"
    )]
    DiskShrinks {
        /// The disk.
        disk: String,
        /// Its size.
        now: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// Its agent would not do it.
    #[error(
        "the agent of host {0} does not offer changes of VMs: update it, or migrate the VM to a host whose agent does"
    )]
    HostTooOld(HostName),
    /// Its agent does not know what rules of the group say.
    #[error(
        "security group {group} has rules about types of ICMP, which the agent of host {host} does not know: update it, or move VMs with the group to a host whose agent does"
    )]
    NoIcmpTypes {
        /// The group.
        group: GroupName,
        /// The host.
        host: HostName,
    },
    /// It holds only what differs from its image, which each host has for itself.
    #[error(
        "disk {disk} is an overlay on its image and cannot be in the shared pool {pool}: choose a pool of the host's own, or make the \
         VM, or the volume, with clone=full"
    )]
    OverlayStays {
        /// The disk.
        disk: String,
        /// The pool.
        pool: String,
    },
    /// Its agent would make none.
    #[error(
        "the agent of host {0} makes no snapshots of such a VM: update it, or migrate the VM to a host whose agent does"
    )]
    NoSnapshotsThere(HostName),
    /// No such snapshot.
    #[error("{vm} has no snapshot {name}; see `dalgu snapshot list {vm}`")]
    SnapshotNotFound {
        /// The VM.
        vm: VmName,
        /// The name.
        name: SnapshotName,
    },
    /// The name is taken.
    #[error(
        "{vm} has a snapshot {name} already: choose another name, or delete it and wait until it is gone"
    )]
    SnapshotExists {
        /// The VM.
        vm: VmName,
        /// The name.
        name: SnapshotName,
    },
    /// As many as a VM may have.
    #[error("{0} has {MAX_SNAPSHOTS} snapshots, the most that a VM may have: delete some that nobody needs")]
    TooManySnapshots(VmName),
    /// There is nothing of it to go back to.
    #[error("snapshot {name} of {vm} is {is}: only one that is ready can be gone back to")]
    SnapshotNotReady {
        /// The VM.
        vm: VmName,
        /// The snapshot.
        name: SnapshotName,
        /// How far it is.
        is: &'static str,
    },
    /// They would be lost.
    #[error(
        "{vm} has snapshots that were made after {name}: {}. They would be deleted: say --discard-later, or delete them first",
        later.join(", ")
    )]
    SnapshotsLater {
        /// The VM.
        vm: VmName,
        /// The snapshot to go back to.
        name: SnapshotName,
        /// The later ones.
        later: Vec<String>,
    },
    /// It has snapshots.
    #[error(
        "{vm} has snapshots, {first} among them, and {cannot}: delete them first, `dalgu snapshot list {vm}` shows them"
    )]
    SnapshotsPresent {
        /// The VM.
        vm: VmName,
        /// One of them.
        first: SnapshotName,
        /// What cannot be done.
        cannot: &'static str,
    },
    /// It has no disk.
    #[error("{0} has no disk of which a snapshot could be made")]
    NoDisks(VmName),
    /// It must be off for that.
    #[error(
        "{0} may be running, or be started by its host: `dalgu vm stop {0}` first; what its disks hold cannot change under it"
    )]
    RunsAtRevert(VmName),
    /// It is there.
    #[error("{vm} is on {host} already: choose another host")]
    SameHost {
        /// The VM.
        vm: VmName,
        /// The host.
        host: HostName,
    },
    /// The controller has started a moment ago, and not every host has reported to it yet.
    #[error("the controller has just started and waits for its hosts to report: repeat in a few seconds")]
    Initializing,
    /// The host is not heard from.
    #[error("host {0} does not report: see its agent's log, then repeat")]
    HostUnreachable(HostName),
    /// Too late, or never possible.
    #[error("{0}")]
    NotCancellable(String),
    /// The id was used for something else.
    #[error("request_id {0} was used for another request: make a new one for each")]
    RequestReused(String),
    /// It is being emptied, or its VMs are being brought back.
    #[error(
        "host {host} is being {}: wait for that (`dalgu host show {host}`), or give it up with `dalgu host cancel-drain {host}`",
        if *back { "restored" } else { "drained" }
    )]
    DrainInProgress {
        /// The host.
        host: HostName,
        /// Its VMs are being brought back.
        back: bool,
    },
    /// Nobody has said how it is switched on and off.
    #[error("nobody has said how host {0} is switched on and off: `dalgu host power set {0} --redfish URL`")]
    PowerUnknown(HostName),
    /// It is on or off already, or on its way.
    #[error("host {host} is {is}: see `dalgu host power {host}`")]
    PowerChanges {
        /// The host.
        host: HostName,
        /// What it is.
        is: &'static str,
    },
    /// The site needs it.
    #[error("host {host} is needed: {need}. With --even-if-needed it is switched off all the same")]
    HostNeeded {
        /// The host.
        host: HostName,
        /// What for.
        need: Need,
    },
    /// VMs run on it or move.
    #[error("VM {vm} runs on host {host}, or is about to: `dalgu host drain {host}` first")]
    HostRuns {
        /// The host.
        host: HostName,
        /// One of them.
        vm: VmName,
    },
    /// Its management controller does not do what it should.
    #[error("the management controller of host {host} cannot be asked: {error}")]
    PowerFailed {
        /// The host.
        host: HostName,
        /// Why.
        error: crate::power::Error,
    },
    /// The VM's host is off.
    #[error("host {host} of VM {vm} is off: `dalgu host power on {host}` first")]
    HostOff {
        /// The VM.
        vm: VmName,
        /// Its host.
        host: HostName,
    },
    /// There is nothing to give up or to bring back.
    #[error("host {host} {is}: see `dalgu host show {host}`")]
    NotDrained {
        /// The host.
        host: HostName,
        /// What it is.
        is: &'static str,
    },
    /// VMs are on it.
    #[error("host {host} holds {vms} VMs: migrate or delete them first")]
    HostNotEmpty {
        /// The host.
        host: HostName,
        /// How many.
        vms: usize,
    },
    /// A field does not hold an allowed value.
    #[error("{field}: {message}")]
    Invalid {
        /// Path in the request.
        field: String,
        /// What is wrong.
        message: String,
    },
    /// The part of a device cannot be changed.
    #[error("{path} cannot be changed: leave it as it is, or take the device away and add another")]
    PartNotMutable {
        /// Below the VM.
        path: String,
    },
    /// The field cannot be changed.
    #[error("{path} cannot be changed: the update mask may name {allowed}")]
    FieldNotMutable {
        /// In the mask.
        path: String,
        /// What may be there.
        allowed: &'static str,
    },
}

/// Who has a MAC address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MacHolder {
    /// Another VM of the site; also one that is being deleted, until it is gone.
    Vm(VmName),
    /// Another interface of the same new VM.
    Nic(String),
}

impl std::fmt::Display for MacHolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vm(name) => write!(f, "VM {name}"),
            Self::Nic(name) => write!(f, "interface {name} of the same VM"),
        }
    }
}

fn names(ids: &[BackupId]) -> String {
    let names: Vec<_> = ids.iter().map(ToString::to_string).collect();
    names.join(", ")
}

fn listed(pools: &[String]) -> String {
    match pools {
        [] => "there are none".to_owned(),
        pools => pools.join(", "),
    }
}

fn no_capacity(decision: &Decision, sleeper: Option<&Sleeper>, in_pieces: bool) -> String {
    let summary = &decision.summary;
    let text = match (sleeper, &decision.hint) {
        (Some(sleeper), _) => return format!("{summary}. {sleeper}"),
        (None, Some(hint)) => format!("{summary}. {}", hint.text),
        (None, None) => summary.clone(),
    };
    match in_pieces {
        true => format!(
            "{text}. What is free is in pieces: `dalgu plan make-room` looks for a few moves after which a VM like this has room"
        ),
        false => text,
    }
}

fn no_image_room(wanted: u64, best: Option<&(HostName, u64)>) -> String {
    let wanted = wanted.div_ceil(1 << 20);
    match best {
        Some((host, room)) => format!(
            "no host has room to import it: {wanted} MiB are wanted, {host} has the most with {} MiB. Delete images that \
             nobody needs, or enlarge the file system of its images",
            room >> 20
        ),
        None => "no host is there that keeps images and takes new ones: see `dalgu host list`".to_owned(),
    }
}

impl From<images::resolve::Error> for Error {
    fn from(error: images::resolve::Error) -> Self {
        use images::resolve::Error as E;
        match error {
            E::NotFound(image) => Self::ImageNotFound(image),
            E::NotAvailable { image, is, next } => Self::ImageNotAvailable { image, is, next },
            E::Disk {
                index,
                field,
                message,
            } => Self::invalid(format!("vm.spec.disks[{index}].{field}"), message),
        }
    }
}

impl From<volumes::resolve::Error> for Error {
    fn from(error: volumes::resolve::Error) -> Self {
        use volumes::resolve::Error as E;
        match error {
            E::Disk {
                index,
                field,
                message,
            } => Self::invalid(format!("vm.spec.disks[{index}].{field}"), message),
            other => Self::Volume(other),
        }
    }
}

impl From<networks::resolve::Error> for Error {
    fn from(error: networks::resolve::Error) -> Self {
        use networks::resolve::Error as E;
        match error {
            E::Port {
                index,
                field,
                message,
            } => Self::invalid(format!("vm.spec.nics[{index}].{field}"), message),
            other => Self::Network(other),
        }
    }
}

impl Error {
    /// A field that does not hold an allowed value.
    pub fn invalid(field: impl Into<String>, message: impl ToString) -> Self {
        Self::Invalid {
            field: field.into(),
            message: message.to_string(),
        }
    }
}

/// Who asks, and how a repetition is recognised.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Name of the identity.
    pub principal: String,
    /// The caller's id for the request; empty when none was given.
    pub request_id: String,
    /// Hash of the request's content.
    pub body: String,
}

impl Caller {
    /// How the request is known; `None` where it bears no id.
    fn key(&self) -> Option<String> {
        (!self.request_id.is_empty()).then(|| format!("{}/{}", self.principal, self.request_id))
    }
}

/// Does what was asked, unless the same request has been done before, or was refused a moment ago: then its outcome.
pub fn once(
    tx: &mut Tx,
    caller: &Caller,
    change: impl FnOnce(&mut Tx) -> Result<Outcome, Error>,
) -> Result<Outcome, Error> {
    let outcome = once_also_observing(tx, caller, |tx| in_charge(tx).and_then(|()| change(tx)));
    // Who is told to come again may do so at once.
    if let Err(why) = &outcome
        && !matches!(why, Error::Initializing)
        && let Some(key) = caller.key()
    {
        tx.note_refused(key, caller.body.clone(), why.clone());
    }
    outcome
}

/// As [`once`], for what may also be asked of a controller that only observes.
pub fn once_also_observing<E: From<Error>>(
    tx: &mut Tx,
    caller: &Caller,
    change: impl FnOnce(&mut Tx) -> Result<Outcome, E>,
) -> Result<Outcome, E> {
    let Some(key) = caller.key().filter(|_| !mutant::on(Mutant::RequestNotRemembered)) else {
        return change(tx);
    };
    if let Some(why) = tx.why_refused(&key, &caller.body) {
        return Err(why.clone().into());
    }
    if let Some(known) = tx.requests.get(&key) {
        return if known.body == caller.body {
            Ok(known.outcome.clone())
        } else {
            Err(Error::RequestReused(caller.request_id.clone()).into())
        };
    }
    let outcome = change(tx)?;
    let time = tx.now();
    tx.put_request(RequestRecord {
        key,
        body: caller.body.clone(),
        outcome: outcome.clone(),
        time,
    });
    Ok(outcome)
}

fn join(hosts: &[HostName]) -> String {
    let names: Vec<_> = hosts.iter().map(HostName::as_str).collect();
    names.join(" and on ")
}

/// Refuses every change while the controller only observes, or when nobody obeys it.
fn in_charge(state: &State) -> Result<(), Error> {
    match (&state.meta.observing, &state.replaced_by) {
        (Some(_), _) => Err(Error::Observing),
        (None, Some(by)) => Err(Error::Replaced(by.clone())),
        (None, None) => Ok(()),
    }
}

/// Refuses a pool that no host has, before anything is entered that would wait for it for ever.
fn pool_is_known(state: &State, pool: &str) -> Result<(), Error> {
    let pools = || state.hosts.values().flat_map(|host| &host.inventory.pools);
    if pools().any(|known| known.name == pool) {
        return Ok(());
    }
    let known: BTreeSet<_> = pools().map(|known| known.name.clone()).collect();
    Err(Error::NoSuchPool {
        pool: pool.to_owned(),
        known: known.into_iter().collect(),
    })
}

/// Refuses what would be lost when a host shows the VM, whose word on it then counts.
fn confirmed(vm: &VmRecord) -> Result<(), Error> {
    if vm.unconfirmed {
        return Err(Error::Unconfirmed(vm.name.clone()));
    }
    Ok(())
}

/// Parses a VM's name and finds it.
fn find(tx: &Tx, name: &str) -> Result<VmRecord, Error> {
    let name: VmName = name.parse().map_err(|error| Error::invalid("name", error))?;
    let vm = tx
        .vm_by_name(&name)
        .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
    Ok((**vm).clone())
}

fn check_etag(given: &str, revision: u64, name: &str) -> Result<(), Error> {
    if given.is_empty() || given == etag(revision) {
        Ok(())
    } else {
        Err(Error::EtagMismatch(name.to_owned()))
    }
}

/// The etag of a record of that revision.
pub fn etag(revision: u64) -> String {
    format!("r{revision}")
}

fn new_operation(tx: &Tx, caller: &Caller, vm: &VmRecord, kind: OperationKind) -> OperationRecord {
    OperationRecord {
        id: OperationId::from_uuid(tx.new_id()),
        kind,
        state: OperationState::Active,
        vm: vm.id,
        vm_name: vm.name.clone(),
        generation: vm.intent.generation,
        power: None,
        grace_period_seconds: 0,
        migration: None,
        request_id: caller.request_id.clone(),
        principal: caller.principal.clone(),
        error: None,
        message: String::new(),
        create_time: tx.now(),
        end_time: None,
        cancel_requested: false,
    }
}

fn accept(tx: &mut Tx, operation: OperationRecord) -> Outcome {
    let id = operation.id;
    let message = format!(
        "{} accepted, asked for by {}",
        operation.kind.as_str(),
        operation.principal
    );
    tx.event(
        EventKind::Operation,
        "OperationStarted",
        &operation.vm_name,
        message,
        Some(id),
    );
    tx.put_operation(operation);
    Outcome::Operation(id)
}

/// Ends the operations of these kinds: a newer request replaces them.
fn supersede(tx: &mut Tx, vm: &VmRecord, by: OperationKind, replaced: impl Fn(OperationKind) -> bool) {
    for operation in tx.active_operations(vm.id) {
        if replaced(operation.kind) {
            let message = format!("replaced by a newer request to {}", by.as_str());
            let error = Some(Fault::new(Code::Cancelled, "SUPERSEDED", message.clone()));
            step::end(
                tx,
                Ending {
                    operation: operation.id,
                    state: OperationState::Cancelled,
                    error,
                    message,
                },
            );
        }
    }
}

/// Refuses what makes something new while there is little room for the store.
fn room(tx: &Tx) -> Result<(), Error> {
    match tx.space {
        Some(space) if space.low => Err(Error::LowSpace(space)),
        _ => Ok(()),
    }
}

/// Asks that a migration be given up, if it has not come to the point of no return. Whether it has not.
fn abort_migration(tx: &mut Tx, vm: &VmRecord) -> bool {
    let Some(record) = tx.active_migration(vm.id).cloned() else {
        return false;
    };
    if record.phase >= Phase::CuttingOver {
        return false;
    }
    if !record.abort_requested {
        let mut record = (*record).clone();
        record.abort_requested = true;
        tx.put_migration(record);
    }
    true
}
