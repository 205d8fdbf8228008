//! Moving a running VM.

use dalgu_proto::{
    host::GuestFeature,
    ids::{HostName, MigrationId},
    vm::PowerState,
};

use super::{
    Caller, Error, accept, backup, check_etag, confirmed,
    create::{VERDICTS_KEPT, place},
    find, new_operation, room,
};
use crate::{
    hosts, images,
    model::{EventKind, HostState, MigrationRecord, Observation, OperationKind, Outcome, Phase, VmRecord},
    networks,
    placement::{Policy, Request},
    placement_groups,
    state::{State, Tx},
    status::{self, VmState},
};

/// Longest planned stop of a move of which nobody says more.
pub const DEFAULT_DOWNTIME_MS: u32 = 100;

/// A move.
#[derive(Debug, Clone)]
pub struct Migrate {
    /// Where to; `None` lets placement choose.
    pub destination: Option<HostName>,
    /// Longest planned stop.
    pub max_downtime_ms: u32,
    /// Limit of the streams; 0 for none.
    pub bandwidth_mib_per_second: u32,
    /// It may take the room that is kept for protected domains.
    pub ignore_protection: bool,
    /// Which host is best.
    pub policy: Policy,
}

/// What placement is asked for a VM that leaves its host.
pub fn request(state: &State, vm: &VmRecord, destination: Option<HostName>) -> Request {
    let accelerator = state
        .hosts
        .get(&vm.owner)
        .map(|host| host.inventory.accelerator.clone())
        .unwrap_or_default();
    let mut needs = networks::resolve::needs(state, &vm.spec);
    if vm.snapshots.last > 0 {
        // Another agent would start it from the base of its disks.
        needs.features.insert(GuestFeature::Snapshot);
    }
    if !vm.snapshots.all.is_empty() && vm.spec.disks.iter().any(|disk| disk.volume.is_some()) {
        needs.features.insert(GuestFeature::VolumeSnapshot);
    }
    needs.images = images::at(state, images::needed(vm));
    Request::migration(vm.held().into_owned(), vm.owner.clone(), &accelerator)
        .with_needs(needs)
        .with_rules(placement_groups::of_vm(state, vm, destination.as_ref()))
        .on(destination)
}

/// What to do about a change of the VM that its host has not carried out as far as both hosts of a migration must agree: the disks
/// above all. What waits for the next start moves with the VM.
pub(super) fn changing(state: &State, vm: &VmRecord) -> Option<&'static str> {
    let change = vm.change.as_ref()?;
    let seen = state.observation(vm);
    if seen.is_none_or(|seen| seen.observed < change.generation) {
        return Some("repeat when its host has carried that out");
    }
    let disks = !change.left_out.is_empty() || seen.is_some_and(|seen| seen.is_pending("disks["));
    disks.then_some(
        "a disk is still to come or to go, see `dalgu vm show`: let the guest unmount it, or stop the VM",
    )
}

/// Refuses what would lose a VM's snapshots, or move it while they are being changed: a copy of a disk has no layers.
fn keeps_snapshots(state: &State, vm: &VmRecord) -> Result<(), Error> {
    let Some(first) = vm.snapshots.all.first() else {
        return Ok(());
    };
    let pools = state.hosts.get(&vm.owner).map(|host| &host.inventory.pools);
    let shared =
        |name: &str| pools.is_some_and(|pools| pools.iter().any(|pool| pool.shared && pool.name == name));
    if !vm.spec.volumes().all(|disk| shared(&disk.pool)) {
        return Err(Error::SnapshotsPresent {
            vm: vm.name.clone(),
            first: first.name.clone(),
            cannot: "cannot move from pools of its host's own",
        });
    }
    snapshots_settled(state, vm)
}

/// Refuses what must not be done while a snapshot is made, deleted or gone back to.
pub(super) fn snapshots_settled(state: &State, vm: &VmRecord) -> Result<(), Error> {
    let settled = |seen: &Observation| seen.observed >= vm.snapshots.generation;
    if vm.snapshots.all.is_empty() || state.observation(vm).is_some_and(|seen| settled(seen)) {
        return Ok(());
    }
    Err(Error::ChangeInProgress {
        vm: vm.name.clone(),
        next: "repeat when its host has done with its snapshots",
    })
}

/// Refuses what cannot move now, wherever to.
pub fn possible(state: &State, vm: &VmRecord) -> Result<(), Error> {
    if vm.delete_time.is_some() {
        return Err(Error::Deleting(vm.name.clone()));
    }
    confirmed(vm)?;
    if !vm.spec.devices.is_empty() {
        return Err(Error::DevicesStay(vm.name.clone()));
    }
    if state.active_migrations.contains_key(&vm.id) {
        return Err(Error::MigrationInProgress(vm.name.clone()));
    }
    backup::none_under_way(state, vm)?;
    match hosts::state_of(state, &vm.owner) {
        HostState::Ready => {}
        HostState::Initializing => return Err(Error::Initializing),
        HostState::Unreachable => return Err(Error::HostUnreachable(vm.owner.clone())),
    }
    if let Some(next) = changing(state, vm) {
        return Err(Error::ChangeInProgress {
            vm: vm.name.clone(),
            next,
        });
    }
    keeps_snapshots(state, vm)?;
    let seen = state.observation(vm).and_then(|observation| observation.power);
    let wanted = vm.intent.power;
    if seen == Some(PowerState::Running) && wanted == PowerState::Running {
        return Ok(());
    }
    let vm_name = vm.name.clone();
    let next = "only a running VM can migrate";
    let is = match status::of(state, vm) {
        state @ (VmState::Pending | VmState::Starting | VmState::Stopping) => {
            let is = state.as_str();
            return Err(Error::PowerChanging {
                vm: vm_name,
                is,
                next,
            });
        }
        _ if wanted == PowerState::Paused || seen == Some(PowerState::Paused) => "paused",
        _ => "not running",
    };
    Err(Error::NotRunning {
        vm: vm_name,
        is,
        next,
    })
}

/// Begins a migration.
pub fn migrate(tx: &mut Tx, caller: &Caller, name: &str, etag: &str, ask: Migrate) -> Result<Outcome, Error> {
    room(tx)?;
    let vm = find(tx, name)?;
    check_etag(etag, vm.revision, name)?;
    if ask.destination.as_ref() == Some(&vm.owner) {
        return Err(Error::SameHost {
            vm: vm.name,
            host: vm.owner,
        });
    }
    possible(tx, &vm)?;
    let asked = request(tx, &vm, ask.destination).ignoring_protection(ask.ignore_protection);
    let (destination, decision) = place(tx, &asked, |request| {
        tx.decide(request, ask.policy, VERDICTS_KEPT)
    })?;
    if let Some(places) = hosts::fit(tx, &vm.held(), &destination) {
        let mut vm = vm.clone();
        vm.places.retain(|host, _| *host == vm.owner);
        vm.places.insert(destination.clone(), places);
        tx.put_vm(vm);
    }
    tx.forget_refused_placement(&vm.name);
    let mut operation = new_operation(tx, caller, &vm, OperationKind::Migrate);
    let record = MigrationRecord {
        id: MigrationId::from_uuid(tx.new_id()),
        vm: vm.id,
        operation: operation.id,
        source: vm.owner.clone(),
        destination,
        source_epoch: vm.epoch,
        destination_epoch: vm.epoch.next(),
        intent: vm.intent.clone(),
        phase: Phase::Reserving,
        phase_time: tx.now(),
        source_told: false,
        abort_requested: false,
        error: None,
        max_downtime_ms: ask.max_downtime_ms,
        bandwidth_mib_per_second: ask.bandwidth_mib_per_second,
        source_answer: None,
        destination_answer: None,
        source_finished: false,
        destination_finished: false,
        progress: None,
        network_delay_ms: None,
        network_blackout_ms: None,
        decision,
    };
    operation.migration = Some(record.id);
    let message = format!(
        "from {} to {}: {}",
        record.source, record.destination, record.decision.summary
    );
    tx.event(
        EventKind::Vm,
        "VmMigrating",
        &vm.name,
        message,
        Some(operation.id),
    );
    tx.put_migration(record);
    Ok(accept(tx, operation))
}
