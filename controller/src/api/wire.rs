//! From records to the messages of the operator API.

mod backup;
mod drain;
mod image;
mod network;
mod plan;
mod snapshot;
mod volume;

use std::collections::BTreeSet;

use dalgu_proto::{
    host::{NumaNode, PciDevice, Uplink},
    ids::{GroupName, HostName, NetworkName, OperationId, PlanId, VmName, VolumeName},
    image::Reference,
    time, v1,
    vm::PageSize,
};
use jiff::Timestamp;

pub use self::{
    backup::{backup, schedule, schedule_fields},
    drain::{drain, drain_mode},
    image::image,
    network::{interface, network, security_group},
    plan::{maintenance, plan},
    snapshot::snapshot,
    volume::volume,
};
use crate::{
    api::host::power,
    drains::advance,
    hosts,
    model::{
        EventKind, EventRecord, Fault, HostRecord, HostState, MigrationRecord, OperationKind,
        OperationRecord, OperationState, Pending, Phase, PowerPhase, RefusedPlacement, VmFault, VmPhase,
        VmRecord,
    },
    placement::{self, HostView, PoolView},
    reconcile::{plan as work, step},
    state::State,
    status::{self, VmState},
    verbs::etag,
};

fn vm_state(state: VmState) -> v1::VmState {
    match state {
        VmState::Pending => v1::VmState::Pending,
        VmState::Starting => v1::VmState::Starting,
        VmState::Running => v1::VmState::Running,
        VmState::Paused => v1::VmState::Paused,
        VmState::Stopping => v1::VmState::Stopping,
        VmState::Stopped => v1::VmState::Stopped,
        VmState::Migrating => v1::VmState::Migrating,
        VmState::Deleting => v1::VmState::Deleting,
        VmState::Failed => v1::VmState::Failed,
        VmState::Unreachable => v1::VmState::Unreachable,
        VmState::Resolving => v1::VmState::Resolving,
    }
}

/// Why an operation, or what a drain does with a VM, did not succeed.
pub(super) fn operation_error(fault: &Fault) -> v1::OperationError {
    v1::OperationError {
        code: fault.code,
        reason: fault.reason.clone(),
        message: fault.message.clone(),
    }
}

fn fault(fault: &VmFault) -> v1::VmError {
    v1::VmError {
        reason: fault.reason.clone(),
        message: fault.message.clone(),
        retrying: fault.retrying,
        time: fault.time.map(time::to_wire),
    }
}

fn pending(pending: &Pending) -> v1::PendingChange {
    v1::PendingChange {
        field: pending.field.clone(),
        current: pending.current.clone(),
        wanted: pending.wanted.clone(),
        message: pending.message.clone(),
    }
}

/// A VM.
pub fn vm(state: &State, vm: &VmRecord) -> v1::Vm {
    v1::Vm {
        name: vm.name.to_string(),
        uid: vm.id.to_string(),
        spec: Some(vm.spec.clone().into()),
        desired_power_state: v1::PowerState::from(vm.intent.power).into(),
        labels: vm.labels.clone().into_iter().collect(),
        description: vm.description.clone(),
        status: Some(vm_status(state, vm)),
        generation: vm.intent.generation.0,
        etag: etag(vm.revision),
        create_time: Some(time::to_wire(vm.create_time)),
        delete_time: vm.delete_time.map(time::to_wire),
        drain_mode: drain::mode(vm.drain_mode).into(),
        placement_groups: vm.placement_groups.iter().map(ToString::to_string).collect(),
        tolerations: vm.tolerations.iter().cloned().map(Into::into).collect(),
    }
}

fn vm_status(state: &State, vm: &VmRecord) -> v1::VmStatus {
    let seen = state.observation(vm);
    let refused = state.refusals.get(&vm.id).map(|refusal| v1::VmError {
        reason: refusal.fault.reason.clone(),
        message: refusal.fault.message.clone(),
        retrying: false,
        time: None,
    });
    v1::VmStatus {
        state: vm_state(status::of(state, vm)).into(),
        power_state: seen
            .and_then(|o| o.power)
            .map_or(v1::PowerState::Unspecified, Into::into)
            .into(),
        power_reason: v1::PowerReason::from(seen.map(|o| o.power_reason).unwrap_or_default()).into(),
        observe_time: seen.and_then(|o| o.observe_time).map(time::to_wire),
        host: vm.owner.to_string(),
        epoch: vm.epoch.0,
        observed_generation: seen.map_or(0, |o| o.observed.0),
        error: refused.or_else(|| seen.and_then(|o| o.fault.as_ref()).map(fault)),
        usage: seen.and_then(|o| o.usage.clone()).map(Into::into),
        migration_id: state
            .active_migrations
            .get(&vm.id)
            .map(ToString::to_string)
            .unwrap_or_default(),
        pending_changes: seen
            .into_iter()
            .flat_map(|seen| &seen.pending)
            .map(pending)
            .collect(),
        numa: vm.places(&vm.owner).iter().cloned().map(Into::into).collect(),
        devices: vm.devices(&vm.owner).iter().cloned().map(Into::into).collect(),
    }
}

fn pool_allocation(pool: &PoolView<'_>) -> v1::PoolAllocation {
    v1::PoolAllocation {
        name: pool.name.to_string(),
        capacity_mib: pool.promisable_mib(),
        promised_mib: pool.reserved_mib,
    }
}

fn host_state(state: &State, host: &HostRecord) -> v1::HostState {
    match (host.phase(), hosts::state_of(state, &host.name)) {
        (PowerPhase::PoweringOff, _) => v1::HostState::PoweringOff,
        (PowerPhase::Off, _) => v1::HostState::Off,
        (PowerPhase::PoweringOn, _) => v1::HostState::PoweringOn,
        (PowerPhase::On, HostState::Initializing) => v1::HostState::Initializing,
        (PowerPhase::On, HostState::Ready) => v1::HostState::Ready,
        (PowerPhase::On, HostState::Unreachable) => v1::HostState::Unreachable,
    }
}

fn node_allocation(view: &HostView<'_>, node: &NumaNode) -> v1::NodeAllocation {
    let taken = &view.parts.taken;
    let pages = |pages: PageSize| {
        let bytes = pages.kib() << 10;
        let known = node
            .huge_pages
            .iter()
            .find(|known| known.page_size_bytes == bytes)?;
        Some(v1::HugePageAllocation {
            page_size_kib: pages.kib(),
            capacity_mib: known.total.saturating_mul(pages.mib()),
            reserved_mib: taken.pages_mib(node.id, pages),
        })
    };
    v1::NodeAllocation {
        id: node.id,
        cpus_dedicated: u32::try_from(taken.cpus().filter(|cpu| node.cpus.contains(cpu)).count())
            .unwrap_or(u32::MAX),
        vcpus_reserved: u32::try_from(taken.vcpus(node.id)).unwrap_or(u32::MAX),
        memory_mib_reserved: taken.memory_mib(node.id),
        huge_pages: [PageSize::Mib2, PageSize::Gib1]
            .into_iter()
            .filter_map(pages)
            .collect(),
    }
}

fn uplink_allocation(view: &HostView<'_>, uplink: &Uplink) -> v1::UplinkAllocation {
    v1::UplinkAllocation {
        bridge: uplink.bridge.clone(),
        mbit_per_second: uplink.mbit_per_second,
        reserved_mbit_per_second: view.parts.taken.mbit(&uplink.bridge),
    }
}

fn device_allocations(view: &HostView<'_>) -> Vec<v1::DeviceAllocation> {
    let classes: BTreeSet<_> = view.parts.devices.iter().map(|device| &device.class).collect();
    let count = |devices: usize| u32::try_from(devices).unwrap_or(u32::MAX);
    let of = |class: &String| {
        let taken = |device: &&PciDevice| view.parts.taken.has_device(device.address);
        v1::DeviceAllocation {
            class: class.clone(),
            count: count(placement::of_class(view, class).count()),
            reserved: count(placement::of_class(view, class).filter(taken).count()),
        }
    };
    classes.into_iter().map(of).collect()
}

/// A host.
pub fn host(state: &State, host: &HostRecord) -> v1::Host {
    let view = hosts::view(state, host);
    let live = state.live.get(&host.name);
    let lately = live.and_then(|live| live.lately);
    let unmanaged = live
        .into_iter()
        .flat_map(|live| &live.unmanaged)
        .map(|domain| v1::UnmanagedDomain {
            uuid: domain.uuid.clone(),
            name: domain.name.clone(),
            running: domain.running,
            vcpus: domain.vcpus,
            memory_mib: domain.memory_mib,
            marked: domain.marked,
        });
    v1::Host {
        name: host.name.to_string(),
        state: host_state(state, host).into(),
        cordoned: host.cordon.is_some(),
        cordon_reason: host.cordon.clone().unwrap_or_default(),
        labels: host.labels.clone().into_iter().collect(),
        cpu_overcommit_ratio: host.cpu_overcommit_ratio,
        reserved_memory_mib: host.reserved_memory_mib,
        max_vms: host.vms_most.unwrap_or(0),
        inventory: Some(host.inventory.clone().into()),
        usage: live.and_then(|live| live.usage.clone()).map(Into::into),
        allocation: Some(v1::HostAllocation {
            vcpus_capacity: view.vcpus_capacity(),
            vcpus_reserved: view.vcpus_reserved,
            memory_mib_capacity: view.memory_mib_capacity(),
            memory_mib_reserved: view.memory_mib_reserved,
            vms: view.vms,
            pools: view.pools.iter().map(pool_allocation).collect(),
            dedicated_cpus: view.parts.taken.cpus().collect(),
            max_vms: view.vms_most.unwrap_or(0),
            nodes: view
                .parts
                .nodes
                .iter()
                .map(|node| node_allocation(&view, node))
                .collect(),
            uplinks: view
                .parts
                .uplinks
                .iter()
                .map(|uplink| uplink_allocation(&view, uplink))
                .collect(),
            devices: device_allocations(&view),
        }),
        address: host.address.clone(),
        boot_id: host.boot_id.clone(),
        session: host.session.0,
        agent_version: host.agent_version.clone(),
        report_time: live.and_then(|live| live.report_time).map(time::to_wire),
        unmanaged_domains: unmanaged.collect(),
        etag: etag(host.revision),
        create_time: Some(time::to_wire(host.create_time)),
        hypervisor_error: live
            .and_then(|live| live.hypervisor_error.clone())
            .unwrap_or_default(),
        machine_id: host.machine_id.clone(),
        taints: host.taints.iter().cloned().map(Into::into).collect(),
        drain: advance::seen(state, host).map(|seen| drain(&host.name, &seen)),
        pressed_time: live.and_then(|live| live.pressure.closed()).map(time::to_wire),
        cpus_expected: live.and_then(|live| live.cpus_expected),
        cpus_busy_p95: lately.map(|lately| lately.cpus_busy),
        cpus_stolen: lately.map(|lately| lately.cpus_stolen),
        power: host.power.as_ref().map(power::to_wire),
        adapted_cpu_overcommit_ratio: view.adapted.then_some(view.cpu_overcommit_ratio),
    }
}

/// A placement that was refused.
pub fn refused(refused: &RefusedPlacement) -> v1::RefusedPlacement {
    let decision = placement::to_wire(&refused.decision, Some(refused.time));
    v1::RefusedPlacement {
        kind: kind(refused.kind).into(),
        refuse_time: decision.decide_time,
        summary: decision.summary,
        verdicts: decision.verdicts,
        hint: decision.hint,
    }
}

fn kind(kind: OperationKind) -> v1::OperationKind {
    match kind {
        OperationKind::Create => v1::OperationKind::CreateVm,
        OperationKind::Start => v1::OperationKind::StartVm,
        OperationKind::Stop => v1::OperationKind::StopVm,
        OperationKind::Restart => v1::OperationKind::RestartVm,
        OperationKind::Pause => v1::OperationKind::PauseVm,
        OperationKind::Resume => v1::OperationKind::ResumeVm,
        OperationKind::Migrate => v1::OperationKind::MigrateVm,
        OperationKind::Delete => v1::OperationKind::DeleteVm,
        OperationKind::CreateSnapshot => v1::OperationKind::CreateSnapshot,
        OperationKind::DeleteSnapshot => v1::OperationKind::DeleteSnapshot,
        OperationKind::RevertSnapshot => v1::OperationKind::RevertSnapshot,
    }
}

/// An operation that was only checked: it is done, and nothing was stored.
pub fn checked(operation_kind: OperationKind, vm: &str, message: String, now: Timestamp) -> v1::Operation {
    v1::Operation {
        kind: kind(operation_kind).into(),
        state: v1::OperationState::Succeeded.into(),
        vm: vm.to_owned(),
        status_message: message,
        create_time: Some(time::to_wire(now)),
        end_time: Some(time::to_wire(now)),
        ..Default::default()
    }
}

/// An operation of that id, if it is kept.
pub fn operation_by_id(state: &State, id: OperationId, now: Timestamp) -> Option<v1::Operation> {
    state
        .operations
        .get(&id)
        .map(|record| operation(state, record, now))
}

/// An operation.
pub fn operation(state: &State, record: &OperationRecord, now: Timestamp) -> v1::Operation {
    let migration = record.migration.and_then(|id| state.migrations.get(&id));
    let (operation_state, text) = match record.state {
        OperationState::Active => active(state, record, migration.map(AsRef::as_ref), now),
        OperationState::Succeeded => (v1::OperationState::Succeeded, record.message.clone()),
        OperationState::Failed => (v1::OperationState::Failed, record.message.clone()),
        OperationState::Cancelled => (v1::OperationState::Cancelled, record.message.clone()),
    };
    v1::Operation {
        id: record.id.to_string(),
        kind: kind(record.kind).into(),
        state: operation_state.into(),
        vm: record.vm_name.to_string(),
        vm_uid: record.vm.to_string(),
        generation: record.generation.0,
        request_id: record.request_id.clone(),
        error: record.error.as_ref().map(operation_error),
        migration: migration.map(|migration| progress(state, migration)),
        status_message: text,
        create_time: Some(time::to_wire(record.create_time)),
        end_time: record.end_time.map(time::to_wire),
        principal: record.principal.clone(),
        cancel_requested: record.cancel_requested,
    }
}

/// Whether it has begun, which shows in what the owner says, and what it waits for.
fn active(
    state: &State,
    record: &OperationRecord,
    migration: Option<&MigrationRecord>,
    now: Timestamp,
) -> (v1::OperationState, String) {
    let Some(vm) = state.vms.get(&record.vm) else {
        return (v1::OperationState::Running, String::new());
    };
    let seen = state.observation(vm);
    let begun = match record.kind {
        OperationKind::Migrate => migration.is_some_and(|migration| migration.phase != Phase::Reserving),
        OperationKind::Delete => seen.is_some_and(|o| o.phase == VmPhase::Deleting),
        _ => seen.is_some_and(|o| o.accepted >= record.generation),
    };
    let of_vm = state.active_migration(vm.id).map(AsRef::as_ref);
    let input = step::input(state, vm, of_vm, &[], now);
    let text = work::waiting_for(&input, record);
    (
        if begun {
            v1::OperationState::Running
        } else {
            v1::OperationState::Pending
        },
        text,
    )
}

fn phase(phase: Phase) -> v1::MigrationPhase {
    match phase {
        Phase::Reserving => v1::MigrationPhase::Reserving,
        Phase::PreparingDestination => v1::MigrationPhase::PreparingDestination,
        Phase::Transferring => v1::MigrationPhase::Transferring,
        Phase::CuttingOver => v1::MigrationPhase::CuttingOver,
        Phase::CleaningSource => v1::MigrationPhase::CleaningSource,
        Phase::CleaningDestination => v1::MigrationPhase::CleaningDestination,
        Phase::Done => v1::MigrationPhase::Done,
        Phase::Failed => v1::MigrationPhase::Failed,
        Phase::Aborted => v1::MigrationPhase::Aborted,
    }
}

fn progress(state: &State, migration: &MigrationRecord) -> v1::MigrationProgress {
    let figures = migration
        .progress
        .or_else(|| state.migration_live(migration.id).progress)
        .unwrap_or_default();
    v1::MigrationProgress {
        migration_id: migration.id.to_string(),
        phase: phase(migration.phase).into(),
        source_host: migration.source.to_string(),
        destination_host: migration.destination.to_string(),
        memory_total_bytes: figures.memory_total_bytes,
        memory_processed_bytes: figures.memory_processed_bytes,
        memory_remaining_bytes: figures.memory_remaining_bytes,
        disk_total_bytes: figures.disk_total_bytes,
        disk_processed_bytes: figures.disk_processed_bytes,
        disk_remaining_bytes: figures.disk_remaining_bytes,
        rate_bytes_per_second: figures.rate_bytes_per_second,
        dirty_rate_bytes_per_second: figures.dirty_rate_bytes_per_second,
        expected_downtime_ms: figures.expected_downtime_ms,
        downtime_ms: figures.downtime_ms,
        iteration: figures.iteration,
        elapsed: Some(time::duration_to_wire(std::time::Duration::from_millis(
            figures.elapsed_ms,
        ))),
        network_blackout: migration
            .unreachable_ms()
            .map(|ms| time::duration_to_wire(std::time::Duration::from_millis(ms))),
    }
}

/// An event for somebody, with its object as it is now.
pub fn event(state: &State, event: &EventRecord, principal: &str, now: Timestamp) -> v1::Event {
    let object = match event.kind {
        EventKind::Vm => event.subject.parse().ok().and_then(|name: VmName| {
            state
                .vm_by_name(&name)
                .map(|record| v1::event::Object::Vm(vm(state, record)))
        }),
        EventKind::Host => event.subject.parse().ok().and_then(|name: HostName| {
            state
                .hosts
                .get(&name)
                .map(|record| v1::event::Object::Host(host(state, record)))
        }),
        EventKind::Operation => event
            .operation
            .and_then(|id| operation_by_id(state, id, now))
            .map(v1::event::Object::Operation),
        EventKind::Image => event.subject.parse().ok().and_then(|reference: Reference| {
            let version = reference.version?;
            let record = state.image_by_name(&reference.name, &version)?;
            // One of the same name may have come since that is there for its owner only, or this one may have got another.
            let told = record.is_visible_to(principal);
            told.then(|| v1::event::Object::Image(image(state, record)))
        }),
        EventKind::Network => event.subject.parse().ok().and_then(|name: NetworkName| {
            let record = state.networks.get(&name)?;
            Some(v1::event::Object::Network(network(state, record)))
        }),
        EventKind::SecurityGroup => event.subject.parse().ok().and_then(|name: GroupName| {
            let record = state.groups.get(&name)?;
            Some(v1::event::Object::SecurityGroup(security_group(state, record)))
        }),
        EventKind::Volume => event.subject.parse().ok().and_then(|name: VolumeName| {
            let record = state.volumes.get(&name)?;
            Some(v1::event::Object::Volume(volume(state, record)))
        }),
        EventKind::Plan => event.subject.parse().ok().and_then(|id: PlanId| {
            let record = state.plans.get(&id)?;
            Some(v1::event::Object::Plan(plan(state, record)))
        }),
    };
    v1::Event {
        resource_version: event.revision,
        time: Some(time::to_wire(event.time)),
        kind: event_kind(event.kind).into(),
        reason: event.reason.clone(),
        message: event.message.clone(),
        subject: event.subject.clone(),
        operation_id: event.operation.map(|id| id.to_string()).unwrap_or_default(),
        object,
    }
}

/// The kind of an event.
pub fn event_kind(kind: EventKind) -> v1::EventKind {
    match kind {
        EventKind::Vm => v1::EventKind::Vm,
        EventKind::Host => v1::EventKind::Host,
        EventKind::Operation => v1::EventKind::Operation,
        EventKind::Image => v1::EventKind::Image,
        EventKind::Network => v1::EventKind::Network,
        EventKind::SecurityGroup => v1::EventKind::SecurityGroup,
        EventKind::Volume => v1::EventKind::Volume,
        EventKind::Plan => v1::EventKind::Plan,
    }
}
