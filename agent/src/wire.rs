//! Between the agent's own words and the wire. Used by the server and the reporter only.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    agent::v1 as wire,
    host::VmUsage,
    ids::{Epoch, Generation, VmId},
    reason,
    snapshot::Set,
    time::{duration_to_wire, to_wire},
    v1,
    vm::{Device, NumaPlace, PowerState, Spec, first_boot::Documents},
};
use tonic::Status as Refusal;

use crate::{
    hypervisor::{
        Domain, DomainState,
        files::{Of, PoolFile},
    },
    images,
    ledger::{Intent, Role, Transfer},
    vm::status::{Asked, Failure, Migration, Phase, Presence, SnapshotSeen, Status},
    vm::{Told, plan::changes::Pending},
};

/// Reads an intent.
#[allow(clippy::result_large_err, reason = "tonic's error is what the server returns")]
pub fn intent(wire: wire::VmIntent) -> Result<(VmId, Told), Refusal> {
    let id = wire
        .uid
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid("vm.uid", error.to_string()))?;
    let name = wire
        .name
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid("vm.name", error.to_string()))?;
    // What a newer controller means by a value that is not known here cannot be guessed.
    let power = v1::PowerState::try_from(wire.power_state)
        .map_err(|_| reason::invalid("vm.power_state", "is not a value of PowerState"))?;
    let power =
        PowerState::try_from(power).map_err(|error| reason::invalid("vm.power_state", error.message))?;
    let restart_mode = v1::RestartMode::try_from(wire.restart_mode)
        .map_err(|_| reason::invalid("vm.restart_mode", "is not a value of RestartMode"))?
        .into();
    let spec = wire
        .spec
        .ok_or_else(|| reason::invalid("vm.spec", "must be given"))?;
    let spec = Spec::try_from(spec)
        .map_err(|error| reason::invalid(&format!("vm.spec.{}", error.field), error.message))?;
    if let Some(nic) = spec.nics.iter().find(|nic| nic.mac.is_empty()) {
        return Err(reason::invalid(
            "vm.spec.nics",
            format!("{} has no MAC address", nic.name),
        ));
    }
    let snapshots = wire.snapshots.map(Set::try_from).transpose();
    let snapshots =
        snapshots.map_err(|error| reason::invalid(&format!("vm.{}", error.field), error.message))?;
    let images = wire.images.into_iter().map(images::server::need);
    let images = images.collect::<Result<_, Refusal>>()?;
    let devices = wire.devices.into_iter().map(Device::try_from);
    let devices = devices
        .collect::<Result<_, _>>()
        .map_err(|error| reason::invalid("vm.devices", error.to_string()))?;
    let intent = Intent {
        generation: Generation(wire.generation),
        epoch: Epoch(wire.epoch),
        spec,
        power,
        power_sequence: wire.power_sequence,
        restart_sequence: wire.restart_sequence,
        restart_mode,
        grace_period_seconds: wire.grace_period_seconds,
        snapshots,
        places: places(wire.numa),
        devices,
    };
    let told = Told {
        name,
        intent,
        disks_made: wire.disks_made,
        new_disks: wire.new_disks.into_iter().collect(),
        images,
        documents: wire.first_boot.as_ref().map(Documents::from).unwrap_or_default(),
    };
    Ok((id, told))
}

/// A VM's report.
pub fn report(status: Status, usage: Option<&VmUsage>) -> wire::VmReport {
    let phase = match status.phase {
        Phase::Applying | Phase::Gone => wire::VmPhase::Applying,
        Phase::Settled => wire::VmPhase::Settled,
        Phase::Failed => wire::VmPhase::Failed,
        Phase::Deleting => wire::VmPhase::Deleting,
        Phase::Incoming => wire::VmPhase::Incoming,
        Phase::Outgoing => wire::VmPhase::Outgoing,
    };
    let power = status.power.map_or(v1::PowerState::Unspecified, Into::into);
    wire::VmReport {
        uid: status.id.to_string(),
        name: status.name,
        accepted_generation: status.accepted_generation.0,
        observed_generation: status.observed_generation.0,
        epoch: status.epoch.0,
        status_generation: status.status_generation,
        phase: phase.into(),
        power_state: power.into(),
        power_reason: v1::PowerReason::from(status.reason).into(),
        observe_time: status.observed_at.map(to_wire),
        error: status.failure.map(failure),
        usage: usage.cloned().map(Into::into),
        migration: status
            .migration
            .filter(|migration| !migration.finished)
            .map(migration),
        adopted: status.adopted,
        power_sequence: Some(status.asked.map_or(0, |asked| asked.power_sequence)),
        restart_sequence: Some(status.asked.map_or(0, |asked| asked.restart_sequence)),
        vcpus: status.size.0,
        memory_mib: status.size.1,
        told: status.asked.map(|asked| wire::VmTold {
            numa: status.places.into_iter().map(Into::into).collect(),
            devices: status.devices.into_iter().map(Into::into).collect(),
            ..told(asked, status.changed_spec, status.snapshots_told)
        }),
        snapshots: status.snapshots.into_iter().map(snapshot).collect(),
        pending_changes: status.pending.into_iter().map(pending).collect(),
    }
}

fn pending(pending: Pending) -> v1::PendingChange {
    v1::PendingChange {
        field: pending.field,
        current: pending.current,
        wanted: pending.wanted,
        message: pending.message,
    }
}

fn snapshot(seen: SnapshotSeen) -> wire::SnapshotReport {
    wire::SnapshotReport {
        number: seen.number,
        quiesced: seen.quiesced,
        written_bytes: seen.written_bytes,
    }
}

/// Where a VM is on a host.
pub fn places(wire: Vec<v1::NumaPlace>) -> Vec<NumaPlace> {
    wire.into_iter().map(Into::into).collect()
}

fn told(asked: Asked, spec: Option<Spec>, snapshots: Option<Set>) -> wire::VmTold {
    wire::VmTold {
        snapshots: snapshots.map(Into::into),
        spec: spec.map(Into::into),
        power_state: v1::PowerState::from(asked.power).into(),
        restart_mode: v1::RestartMode::from(asked.restart_mode).into(),
        grace_period_seconds: asked.grace_period_seconds,
        restart_policy: v1::RestartPolicy::from(asked.restart_policy).into(),
        ..wire::VmTold::default()
    }
}

/// What is wrong.
pub fn failure(failure: Failure) -> v1::VmError {
    let Failure {
        reason,
        message,
        retrying,
        since,
    } = failure;
    v1::VmError {
        reason,
        message,
        retrying,
        time: Some(to_wire(since)),
    }
}

/// A host's part in a migration.
pub fn migration(migration: Migration) -> wire::MigrationReport {
    let role = match migration.role {
        None => wire::MigrationRole::Unspecified,
        Some(Role::Source) => wire::MigrationRole::Source,
        Some(Role::Destination) => wire::MigrationRole::Destination,
    };
    let (transfer, error) = match migration.transfer {
        Transfer::Ready => (wire::TransferState::Ready, None),
        Transfer::Active => (wire::TransferState::Active, None),
        Transfer::Completed => (wire::TransferState::Completed, None),
        Transfer::Failed { reason, message } => {
            let error = v1::VmError {
                reason,
                message,
                retrying: false,
                time: None,
            };
            (wire::TransferState::Failed, Some(error))
        }
    };
    let presence = match migration.presence {
        Presence::Unknown => wire::DomainPresence::Unspecified,
        Presence::Absent => wire::DomainPresence::Absent,
        Presence::Is(DomainState::Stopped) => wire::DomainPresence::Stopped,
        Presence::Is(DomainState::Running) => wire::DomainPresence::Running,
        Presence::Is(DomainState::Paused) => wire::DomainPresence::Paused,
        Presence::Is(DomainState::Incoming) => wire::DomainPresence::Incoming,
        Presence::Is(DomainState::HandedOver) => wire::DomainPresence::HandedOver,
    };
    let p = migration.progress;
    let progress = (migration.role == Some(Role::Source)).then(|| v1::MigrationProgress {
        migration_id: migration.id.to_string(),
        memory_total_bytes: p.memory_total_bytes,
        memory_processed_bytes: p.memory_processed_bytes,
        memory_remaining_bytes: p.memory_remaining_bytes,
        disk_total_bytes: p.disk_total_bytes,
        disk_processed_bytes: p.disk_processed_bytes,
        disk_remaining_bytes: p.disk_remaining_bytes,
        rate_bytes_per_second: p.rate_bytes_per_second,
        dirty_rate_bytes_per_second: p.dirty_rate_bytes_per_second,
        expected_downtime_ms: p.expected_downtime_ms,
        downtime_ms: p.downtime_ms,
        iteration: p.iteration,
        elapsed: Some(duration_to_wire(std::time::Duration::from_millis(p.elapsed_ms))),
        ..Default::default()
    });
    wire::MigrationReport {
        migration_id: migration.id.to_string(),
        role: role.into(),
        transfer: transfer.into(),
        settled: migration.settled,
        owner: migration.owner,
        presence: presence.into(),
        error,
        progress,
        network_delay: migration.arrival.map(|arrival| duration_to_wire(arrival.delay)),
        network_blackout: migration
            .arrival
            .and_then(|arrival| arrival.blackout)
            .map(duration_to_wire),
    }
}

/// The domains that Dalgu does not touch, for reports: they are not its own, or this host was never told of them, whatever
/// mark they bear. `known` are the VMs of which something is here.
pub fn unmanaged(domains: &[Domain], known: &BTreeSet<VmId>) -> Vec<v1::UnmanagedDomain> {
    let foreign = |domain: &Domain| v1::UnmanagedDomain {
        uuid: domain.id.to_string(),
        name: domain.name.clone(),
        running: domain.state != DomainState::Stopped,
        vcpus: domain.vcpus,
        memory_mib: domain.memory_mib,
        marked: domain.mark.is_some(),
    };
    domains
        .iter()
        .filter(|domain| domain.mark.is_none() || !known.contains(&domain.id))
        .map(foreign)
        .collect()
}

/// Reports of all VMs, each with its usage.
pub fn reports(statuses: Vec<Status>, usage: &BTreeMap<VmId, VmUsage>) -> Vec<wire::VmReport> {
    statuses
        .into_iter()
        .map(|status| {
            let usage = usage.get(&status.id);
            report(status, usage)
        })
        .collect()
}

/// A file of a pool.
pub fn pool_file(file: PoolFile) -> wire::PoolFile {
    let wire = wire::PoolFile {
        path: file.path,
        partial: file.partial,
        size_bytes: file.size_bytes,
        allocated_bytes: file.allocated_bytes,
        ..Default::default()
    };
    match file.of {
        Of::Unknown => wire,
        Of::Volume { id, layer } => wire::PoolFile {
            volume_uid: id.to_string(),
            layer: layer.unwrap_or(0),
            ..wire
        },
        Of::Backup(backup) => wire::PoolFile {
            backup_uid: backup.to_string(),
            ..wire
        },
        Of::Disk { vm, disk, layer } => wire::PoolFile {
            vm_uid: vm.to_string(),
            disk,
            layer: layer.unwrap_or(0),
            ..wire
        },
    }
}
