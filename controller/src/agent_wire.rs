//! Between the records and what agents send and get. Used by `agent_client` and `api::registrar` only.

pub mod backup;
pub mod file;
pub mod image;
pub mod network;

use dalgu_proto::{
    agent::v1 as agent,
    ids::{Epoch, Generation, HostName, MigrationId, VmId},
    snapshot::Set,
    time, v1,
    vm::{Device, NumaPlace, PowerState, RestartPolicy, Spec},
};

use crate::model::{
    Intent, Observation, Pending, Presence, Progress, SnapshotSeen, Transfer, Unmanaged, VmFault, VmPhase,
    VmRecord,
};

/// What a host says of one VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Reported {
    /// The VM.
    pub id: VmId,
    /// Name the host knows it by.
    pub name: String,
    /// What is seen.
    pub observation: Observation,
    /// A migration that it was sent by, whose transfer has ended.
    pub transfer_over: Option<MigrationId>,
    /// A migration that it takes part in.
    pub migration: Option<MigrationId>,
    /// Power request that the host accepted last, if it says.
    pub power_sequence: Option<u64>,
    /// Restart request that the host accepted last, if it says.
    pub restart_sequence: Option<u64>,
    /// What the host was told last, if it says: the owner's will as far as it has come there.
    pub told: Option<Told>,
    /// Virtual processors that its domain may use; 0 where there is none.
    pub vcpus: u32,
    /// Memory that its domain may use; 0 where there is none.
    pub memory_mib: u64,
}

impl Reported {
    /// Whether it has a memory: it runs, or is paused.
    pub fn is_alive(&self) -> bool {
        matches!(
            self.observation.power,
            Some(PowerState::Running | PowerState::Paused)
        )
    }
}

/// The part of what a host was told that an owner can change.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// What its processors should do.
    pub intent: Intent,
    /// When its agent starts it again.
    pub restart_policy: RestartPolicy,
    /// What it is made of, where that is not what it was created with.
    pub spec: Option<Spec>,
    /// Its snapshots; `None` where it was told of none.
    pub snapshots: Option<Set>,
    /// Where it is on the host.
    pub places: Vec<NumaPlace>,
    /// PCI devices of the host that are its own.
    pub devices: Vec<Device>,
}

/// A host's part in a migration, as it says.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// It knows the migration.
    pub known: bool,
    /// It has promised that nothing moves any more.
    pub settled: bool,
    /// It was told that the VM is its own, and takes no part in its migration any more.
    pub owner: bool,
    /// The transfer has ended, and how.
    pub transfer: Transfer,
    /// What is there; `None` when it could not be found out.
    pub presence: Option<Presence>,
    /// Why the transfer failed.
    pub fault: Option<VmFault>,
    /// How much has been copied.
    pub progress: Option<Progress>,
    /// Of a destination: time from the VM's going on to its first packet, in ms.
    pub network_delay_ms: Option<u64>,
    /// Of a destination: time from the VM's stop at the source to that packet, in ms.
    pub network_blackout_ms: Option<u64>,
}

/// Where a VM is on a host, for that host's agent.
pub fn places(vm: &VmRecord, host: &HostName) -> Vec<v1::NumaPlace> {
    vm.places(host).iter().cloned().map(Into::into).collect()
}

/// What the agent of a host is told a VM should be there; of the images that its disks are made from, nothing.
pub fn intent(vm: &VmRecord, intent: &Intent, epoch: Epoch, host: &HostName) -> agent::VmIntent {
    agent::VmIntent {
        uid: vm.id.to_string(),
        name: vm.name.to_string(),
        spec: Some(vm.spec.clone().into()),
        generation: intent.generation.0,
        epoch: epoch.0,
        power_state: v1::PowerState::from(intent.power).into(),
        power_sequence: intent.power_sequence,
        restart_sequence: intent.restart_sequence,
        restart_mode: v1::RestartMode::from(intent.restart_mode).into(),
        grace_period_seconds: intent.grace_period_seconds,
        disks_made: vm.disks_made,
        images: Vec::new(),
        first_boot: None,
        snapshots: vm.snapshots.set().map(Into::into),
        numa: places(vm, host),
        devices: vm.devices(host).iter().cloned().map(Into::into).collect(),
        new_disks: vm
            .change
            .iter()
            .flat_map(|change| &change.added)
            .chain(&vm.new_volumes)
            .cloned()
            .collect(),
    }
}

fn snapshot(wire: &agent::SnapshotReport) -> SnapshotSeen {
    SnapshotSeen {
        layer: wire.number,
        quiesced: wire.quiesced.unwrap_or(false),
        written_bytes: wire.written_bytes,
    }
}

fn pending(wire: v1::PendingChange) -> Pending {
    Pending {
        field: wire.field,
        current: wire.current,
        wanted: wire.wanted,
        message: wire.message,
    }
}

/// The documents that an agent needs to make a VM's disks.
pub fn documents(vm: &VmRecord) -> Option<agent::FirstBootDocuments> {
    (!vm.documents.is_empty()).then(|| (&vm.documents).into())
}

/// A VM as `host` reports it; `None` when its id is no UUID.
pub fn reported(host: &HostName, wire: agent::VmReport) -> Option<Reported> {
    let power = v1::PowerState::try_from(wire.power_state);
    let phase = match wire.phase() {
        // Unspecified means that there is no domain; a newer agent's word means that there is one.
        _ if power.is_err() => VmPhase::Unknown,
        agent::VmPhase::Unspecified => VmPhase::Unknown,
        agent::VmPhase::Applying => VmPhase::Applying,
        agent::VmPhase::Settled => VmPhase::Settled,
        agent::VmPhase::Failed => VmPhase::Failed,
        agent::VmPhase::Deleting => VmPhase::Deleting,
        agent::VmPhase::Incoming => VmPhase::Incoming,
        agent::VmPhase::Outgoing => VmPhase::Outgoing,
    };
    let transfer_over = wire.migration.as_ref().and_then(over);
    Some(Reported {
        id: wire.uid.parse().ok()?,
        transfer_over,
        migration: wire.migration.as_ref().and_then(|m| m.migration_id.parse().ok()),
        power_sequence: wire.power_sequence,
        restart_sequence: wire.restart_sequence,
        told: told(&wire),
        vcpus: wire.vcpus,
        memory_mib: wire.memory_mib,
        observation: Observation {
            host: host.clone(),
            epoch: Epoch(wire.epoch),
            accepted: Generation(wire.accepted_generation),
            observed: Generation(wire.observed_generation),
            status_generation: wire.status_generation,
            phase,
            power: power.ok().and_then(|power| PowerState::try_from(power).ok()),
            power_reason: wire.power_reason().into(),
            observe_time: wire.observe_time.as_ref().and_then(time::from_wire),
            fault: wire.error.map(fault),
            usage: wire.usage.map(Into::into),
            pending: wire.pending_changes.into_iter().map(pending).collect(),
            snapshots: wire.snapshots.iter().map(snapshot).collect(),
        },
        name: wire.name,
    })
}

/// What the host was told; nothing where it says what this version does not know.
fn told(wire: &agent::VmReport) -> Option<Told> {
    let told = wire.told.as_ref()?;
    let power = v1::PowerState::try_from(told.power_state).ok()?;
    Some(Told {
        intent: Intent {
            generation: Generation(wire.accepted_generation),
            power: PowerState::try_from(power).ok()?,
            power_sequence: wire.power_sequence?,
            restart_sequence: wire.restart_sequence?,
            restart_mode: v1::RestartMode::try_from(told.restart_mode).ok()?.into(),
            grace_period_seconds: told.grace_period_seconds,
        },
        restart_policy: v1::RestartPolicy::try_from(told.restart_policy).ok()?.into(),
        spec: told.spec.clone().map(Spec::try_from).transpose().ok()?,
        snapshots: told.snapshots.clone().map(Set::try_from).transpose().ok()?,
        places: told.numa.iter().cloned().map(Into::into).collect(),
        devices: told
            .devices
            .iter()
            .cloned()
            .filter_map(|device| device.try_into().ok())
            .collect(),
    })
}

/// The migration, if its transfer has ended.
fn over(wire: &agent::MigrationReport) -> Option<MigrationId> {
    let over = matches!(
        wire.transfer(),
        agent::TransferState::Completed | agent::TransferState::Failed
    );
    wire.migration_id.parse().ok().filter(|_| over)
}

fn fault(wire: v1::VmError) -> VmFault {
    VmFault {
        time: wire.time.as_ref().and_then(time::from_wire),
        reason: wire.reason,
        message: wire.message,
        retrying: wire.retrying,
    }
}

/// A host's part in a migration.
pub fn part(wire: agent::MigrationReport) -> Part {
    let presence = match wire.presence() {
        agent::DomainPresence::Unspecified => None,
        agent::DomainPresence::Absent => Some(Presence::Absent),
        agent::DomainPresence::Stopped => Some(Presence::Stopped),
        agent::DomainPresence::Running => Some(Presence::Running),
        agent::DomainPresence::Paused => Some(Presence::Paused),
        agent::DomainPresence::Incoming => Some(Presence::Incoming),
        agent::DomainPresence::HandedOver => Some(Presence::HandedOver),
    };
    let transfer = match wire.transfer() {
        agent::TransferState::Completed => Transfer::Completed,
        agent::TransferState::Failed => Transfer::Failed,
        agent::TransferState::Unspecified | agent::TransferState::Ready | agent::TransferState::Active => {
            Transfer::Unknown
        }
    };
    let ms = |wire: &Option<prost_types::Duration>| {
        let time = wire.as_ref().and_then(time::duration_from_wire)?;
        Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
    };
    Part {
        // A part that only a newer version knows is a part.
        known: wire.role != i32::from(agent::MigrationRole::Unspecified),
        settled: wire.settled,
        owner: wire.owner,
        transfer,
        presence,
        fault: wire.error.map(fault),
        network_delay_ms: ms(&wire.network_delay),
        network_blackout_ms: ms(&wire.network_blackout),
        // An agent that was restarted knows nothing of it any more; that is no progress of 0.
        progress: wire
            .progress
            .as_ref()
            .map(progress)
            .filter(|progress| *progress != Progress::default()),
    }
}

fn progress(wire: &v1::MigrationProgress) -> Progress {
    let elapsed = wire
        .elapsed
        .as_ref()
        .and_then(time::duration_from_wire)
        .unwrap_or_default();
    Progress {
        memory_total_bytes: wire.memory_total_bytes,
        memory_processed_bytes: wire.memory_processed_bytes,
        memory_remaining_bytes: wire.memory_remaining_bytes,
        disk_total_bytes: wire.disk_total_bytes,
        disk_processed_bytes: wire.disk_processed_bytes,
        disk_remaining_bytes: wire.disk_remaining_bytes,
        rate_bytes_per_second: wire.rate_bytes_per_second,
        dirty_rate_bytes_per_second: wire.dirty_rate_bytes_per_second,
        expected_downtime_ms: wire.expected_downtime_ms,
        downtime_ms: wire.downtime_ms,
        iteration: wire.iteration,
        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
    }
}

/// A domain that is not Dalgu's.
pub fn unmanaged(wire: v1::UnmanagedDomain) -> Unmanaged {
    Unmanaged {
        uuid: wire.uuid,
        name: wire.name,
        running: wire.running,
        vcpus: wire.vcpus,
        memory_mib: wire.memory_mib,
        marked: wire.marked,
    }
}
