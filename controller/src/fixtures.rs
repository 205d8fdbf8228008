//! Records for unit tests.

use std::collections::BTreeMap;

use dalgu_proto::{
    host::{Inventory, Pool, Usage},
    ids::{
        ClusterId, Epoch, Generation, GroupId, HostName, ImageId, MigrationId, NetworkId, OperationId,
        PlanId, Session, VmId, VolumeId,
    },
    image::{Digest, Format},
    network::Port,
    placement::{Group, Rule},
    v1,
    vm::{
        CloneMode, Disk, DiskFormat, KernelBoot, Nic, Plug, PowerReason, PowerState, RestartMode,
        RestartPolicy, Spec,
    },
};
use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{agent_wire::Reported, model::*, placement::Decision, verbs::Caller};

pub(crate) fn host_name(name: &str) -> HostName {
    name.parse().unwrap()
}

pub(crate) fn spec() -> Spec {
    Spec {
        vcpus: 1,
        memory_mib: 128,
        disks: vec![],
        nics: vec![],
        kernel_boot: Some(KernelBoot {
            kernel: "k".into(),
            initrd: None,
            cmdline: String::new(),
        }),
        restart_policy: RestartPolicy::OnFailure,
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    }
}

pub(crate) fn decision(host: &str) -> Decision {
    Decision {
        host: Some(host_name(host)),
        verdicts: vec![],
        hint: None,
        summary: String::new(),
        omitted: 0,
        ignored_protection: false,
    }
}

pub(crate) fn intent() -> Intent {
    Intent {
        generation: Generation(3),
        power: PowerState::Running,
        power_sequence: 1,
        restart_sequence: 0,
        restart_mode: RestartMode::Reboot,
        grace_period_seconds: 60,
    }
}

pub(crate) fn vm(name: &str, owner: &str) -> VmRecord {
    VmRecord {
        id: VmId::from_uuid(Uuid::now_v7()),
        name: name.parse().unwrap(),
        spec: spec(),
        labels: BTreeMap::new(),
        description: String::new(),
        drain_mode: Default::default(),
        placement_groups: Default::default(),
        tolerations: Default::default(),
        intent: intent(),
        owner: host_name(owner),
        epoch: Epoch(1),
        decision: decision(owner),
        decide_time: Timestamp::UNIX_EPOCH,
        create_time: Timestamp::UNIX_EPOCH,
        delete_time: None,
        unconfirmed: false,
        backup_generation: None,
        disks_made: false,
        documents: Default::default(),
        change: None,
        new_volumes: Default::default(),
        snapshots: Default::default(),
        places: Default::default(),
        devices: Default::default(),
        revision: 1,
    }
}

pub(crate) fn host(name: &str) -> HostRecord {
    HostRecord {
        name: host_name(name),
        address: "127.0.0.1:1".into(),
        labels: BTreeMap::new(),
        taints: Default::default(),
        cpu_overcommit_ratio: 4.0,
        reserved_memory_mib: 512,
        vms_most: None,
        cordon: None,
        drain: None,
        power: None,
        session: Session(1),
        boot_id: "b".into(),
        machine_id: String::new(),
        inventory: inventory(),
        agent_version: String::new(),
        create_time: Timestamp::UNIX_EPOCH,
        revision: 0,
    }
}

/// What a VM has used in one hour.
pub(crate) fn usage(vm: VmId) -> UsageRecord {
    UsageRecord {
        vm,
        hour: 3,
        hours: vec![None, None, None, Some(25)],
        samples: vec![25, 20],
    }
}

/// A creation that was refused.
pub(crate) fn refused(name: &str) -> RefusedPlacement {
    RefusedPlacement {
        vm: name.parse().unwrap(),
        kind: OperationKind::Create,
        decision: Decision {
            host: None,
            summary: "no host has registered yet".into(),
            ..decision("h1")
        },
        time: Timestamp::UNIX_EPOCH,
    }
}

/// A host that has just reported.
pub(crate) fn live(now: Timestamp) -> HostLive {
    HostLive {
        state: HostState::Ready,
        report_time: Some(now),
        complete: true,
        usage: Some(Usage {
            sample_time: now,
            ..Usage::default()
        }),
        ..HostLive::silent(Instant::now())
    }
}

pub(crate) fn observation(vm: &VmRecord) -> Observation {
    Observation {
        host: vm.owner.clone(),
        epoch: vm.epoch,
        accepted: vm.intent.generation,
        observed: vm.intent.generation,
        status_generation: 1,
        phase: VmPhase::Settled,
        power: Some(vm.intent.power),
        power_reason: PowerReason::Requested,
        observe_time: None,
        fault: None,
        usage: None,
        pending: Vec::new(),
        snapshots: Vec::new(),
    }
}

pub(crate) fn reported(vm: &VmRecord, observation: Observation) -> Reported {
    Reported {
        id: vm.id,
        name: vm.name.to_string(),
        observation,
        transfer_over: None,
        migration: None,
        power_sequence: None,
        restart_sequence: None,
        told: None,
        vcpus: vm.spec.vcpus,
        memory_mib: vm.spec.memory_mib,
    }
}

pub(crate) fn caller() -> Caller {
    Caller {
        principal: "operator/test".to_owned(),
        request_id: String::new(),
        body: String::new(),
    }
}

pub(crate) fn operation(vm: &VmRecord, kind: OperationKind, power: Option<PowerState>) -> OperationRecord {
    OperationRecord {
        id: OperationId::from_uuid(Uuid::now_v7()),
        kind,
        state: OperationState::Active,
        vm: vm.id,
        vm_name: vm.name.clone(),
        generation: vm.intent.generation,
        power,
        grace_period_seconds: 0,
        migration: None,
        request_id: String::new(),
        principal: "operator/test".into(),
        error: None,
        message: String::new(),
        create_time: Timestamp::UNIX_EPOCH,
        end_time: None,
        cancel_requested: false,
    }
}

/// A plan that runs and moves this VM.
pub(crate) fn plan(vm: &VmRecord, destination: &str) -> PlanRecord {
    let figures = PlanFigures {
        hosts_on: 2,
        ..PlanFigures::default()
    };
    let step = PlanStep {
        vm: vm.id,
        name: vm.name.clone(),
        source: vm.owner.clone(),
        destination: host_name(destination),
        generation: vm.intent.generation,
        copied_bytes: 128 << 20,
        predicted_seconds: 1.5,
        predicted_downtime_ms: None,
        max_downtime_ms: 100,
        state: StepState::Waiting,
        operation: None,
        fault: None,
    };
    PlanRecord {
        id: PlanId::from_uuid(Uuid::now_v7()),
        kind: PlanKind::Evacuate,
        hosts: vec![vm.owner.clone()],
        state: PlanState::Running,
        hash: "ab".into(),
        steps: vec![step],
        predicted_seconds: 1.5,
        before: figures,
        predicted: figures,
        realised: None,
        principal: "operator/x".into(),
        create_time: Timestamp::UNIX_EPOCH,
        approved_by: Some("operator/x".into()),
        approve_time: Some(Timestamp::UNIX_EPOCH),
        deadline: None,
        end_time: None,
        message: "1 VM moves".into(),
    }
}

pub(crate) fn migration(vm: &VmRecord, destination: &str) -> MigrationRecord {
    MigrationRecord {
        id: MigrationId::from_uuid(Uuid::now_v7()),
        vm: vm.id,
        operation: OperationId::from_uuid(Uuid::now_v7()),
        source: vm.owner.clone(),
        destination: host_name(destination),
        source_epoch: vm.epoch,
        destination_epoch: vm.epoch.next(),
        intent: vm.intent.clone(),
        phase: Phase::Transferring,
        phase_time: Timestamp::UNIX_EPOCH,
        source_told: true,
        abort_requested: false,
        error: None,
        max_downtime_ms: 100,
        bandwidth_mib_per_second: 0,
        source_answer: None,
        destination_answer: None,
        source_finished: false,
        destination_finished: false,
        progress: None,
        network_delay_ms: None,
        network_blackout_ms: None,
        decision: decision(destination),
    }
}

pub(crate) fn inventory() -> Inventory {
    const GIB: u64 = 1 << 30;
    let pool = Pool {
        name: "local".into(),
        path: "/pool".into(),
        capacity_bytes: 100 * GIB,
        available_bytes: 100 * GIB,
        ..Pool::default()
    };
    Inventory {
        cpus: 4,
        memory_bytes: 8 * GIB,
        pools: vec![pool],
        bridges: vec!["br0".into()],
        accelerator: "tcg".into(),
        ..Inventory::default()
    }
}

/// A required group, by a label or by hosts.
pub(crate) fn placement_group(name: &str, rule: Rule, key: Option<&str>) -> PlacementGroupRecord {
    PlacementGroupRecord {
        group: Group {
            name: name.parse().unwrap(),
            rule,
            preferred: false,
            topology_key: key.map(str::to_owned),
        },
        description: String::new(),
        create_time: Timestamp::UNIX_EPOCH,
        revision: 0,
    }
}

pub(crate) fn digest(number: u8) -> Digest {
    Digest::from_bytes(&[number; 32])
}

/// An image that is available, with a digest of that number and 1 GiB.
pub(crate) fn image(version: &str, number: u8) -> ImageRecord {
    ImageRecord {
        id: ImageId::from_uuid(Uuid::now_v7()),
        name: "debian".parse().unwrap(),
        version: version.to_owned(),
        format: Format::Qcow2,
        size_bytes: 1 << 30,
        sha256: Some(digest(number)),
        os: String::new(),
        firmware: Default::default(),
        labels: BTreeMap::new(),
        description: String::new(),
        owner: "operator/test".to_owned(),
        visibility: Visibility::Public,
        replicas: Replicas::Count(2),
        state: ImageState::Available,
        import_host: None,
        file: None,
        upload_time: None,
        content: Some(Content {
            digest: digest(number),
            stored_bytes: 1 << 30,
            virtual_size_bytes: 2 << 30,
        }),
        error: None,
        create_time: Timestamp::UNIX_EPOCH,
        delete_time: None,
        revision: 0,
    }
}

pub(crate) fn held(phase: ImagePhase) -> Held {
    Held {
        phase,
        bytes_done: 0,
        bytes_total: 1 << 30,
        content: None,
        source_sha256: None,
        source_bytes: 0,
        last_use: None,
        in_use: false,
        fault: None,
    }
}

/// A blank disk.
pub(crate) fn disk(name: &str, size_mib: u64) -> Disk {
    Disk {
        name: name.into(),
        size_mib,
        pool: "local".into(),
        image: None,
        format: Default::default(),
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    }
}

/// A VM whose disk is made from an image.
pub(crate) fn vm_of(image: &ImageRecord, name: &str, owner: &str) -> VmRecord {
    let mut vm = vm(name, owner);
    vm.spec.disks.push(Disk {
        name: "root".to_owned(),
        size_mib: 2048,
        pool: "local".to_owned(),
        image: Some(image.reference()),
        format: DiskFormat::Qcow2,
        digest: image.digest().cloned(),
        clone_mode: CloneMode::Overlay,
        volume: None,
        limits: Default::default(),
        backup: None,
    });
    vm
}

/// A network of that kind with the addresses 10.20.0.0/28, whose gateway is 10.20.0.1 and whose service 10.20.0.14, and
/// fd00:20::/64.
pub(crate) fn network(name: &str, kind: v1::network::Kind) -> NetworkRecord {
    let subnet = |cidr: &str, gateway: &str| v1::Subnet {
        cidr: cidr.into(),
        gateway: gateway.into(),
        ..Default::default()
    };
    let network = v1::Network {
        name: name.into(),
        kind: Some(kind),
        ipv4: Some(subnet("10.20.0.0/28", "10.20.0.1")),
        ipv6: Some(subnet("fd00:20::/64", "")),
        ..Default::default()
    };
    NetworkRecord {
        id: NetworkId::from_uuid(Uuid::now_v7()),
        network: network.try_into().unwrap(),
        labels: BTreeMap::new(),
        description: String::new(),
        create_time: Timestamp::UNIX_EPOCH,
        revision: 0,
    }
}

pub(crate) fn overlay(name: &str, vni: u32) -> NetworkRecord {
    network(name, v1::network::Kind::Overlay(v1::OverlayNetwork { vni }))
}

pub(crate) fn bridged(name: &str, bridge: &str, vlan: u32) -> NetworkRecord {
    let bridge = bridge.into();
    network(
        name,
        v1::network::Kind::Bridge(v1::BridgeNetwork { bridge, vlan }),
    )
}

/// A group whose rules let in what comes from these groups.
pub(crate) fn group(name: &str, named: &[&str]) -> GroupRecord {
    let rules = named.iter().map(|group| v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        remote: Some(v1::security_rule::Remote::Group((*group).into())),
        ..Default::default()
    });
    let group = v1::SecurityGroup {
        name: name.into(),
        rules: rules.collect(),
        ..Default::default()
    };
    GroupRecord {
        id: GroupId::from_uuid(Uuid::now_v7()),
        group: group.try_into().unwrap(),
        labels: BTreeMap::new(),
        description: String::new(),
        create_time: Timestamp::UNIX_EPOCH,
        revision: 0,
    }
}

/// A group that lets `ping` in, by a rule about a type of ICMP.
pub(crate) fn pinged(name: &str) -> GroupRecord {
    let mut record = group(name, &[]);
    let rule = v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::IcmpEchoRequest.into(),
        ..Default::default()
    };
    let wire = v1::SecurityGroup {
        name: name.into(),
        rules: vec![rule],
        ..Default::default()
    };
    record.group = wire.try_into().unwrap();
    record
}

/// A volume of 1 GiB that was made there, or that is new.
pub(crate) fn volume(name: &str, host: Option<&str>) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::from_uuid(Uuid::now_v7()),
        name: name.parse().unwrap(),
        size_mib: 1024,
        pool: "local".to_owned(),
        format: DiskFormat::Qcow2,
        image: None,
        digest: None,
        clone_mode: CloneMode::Any,
        firmware: Default::default(),
        labels: BTreeMap::new(),
        description: String::new(),
        host: host.map(host_name),
        made: host.is_some(),
        create_time: Timestamp::UNIX_EPOCH,
        delete_time: None,
        purge_time: None,
        purging: false,
        revision: 0,
    }
}

/// What a VM has in a network, without addresses.
pub(crate) fn nic(name: &str, network: &str, groups: &[&str]) -> Nic {
    Nic {
        name: name.into(),
        plug: Plug::Network(Port {
            network: network.parse().unwrap(),
            ipv4: None,
            ipv6: None,
            groups: groups.iter().map(|group| group.parse().unwrap()).collect(),
            receive_limit_mbit: None,
            send_limit_mbit: None,
        }),
        mac: String::new(),
        reserved_mbit: None,
    }
}

/// A VM with an interface eth0 in a network.
pub(crate) fn vm_in(network: &str, groups: &[&str], name: &str, owner: &str) -> VmRecord {
    let mut vm = vm(name, owner);
    vm.spec.nics.push(nic("eth0", network, groups));
    vm.spec.fill_in(vm.id);
    vm
}

/// A host that offers networks of every kind, heard from by that run of its agent.
pub(crate) fn networked(tx: &mut crate::state::Tx, name: &str, address: &str, run: &str) {
    use dalgu_proto::host::GuestFeature as F;
    let mut record = host(name);
    record.inventory.guest_features = vec![F::Network, F::Overlay, F::Vlan];
    record.inventory.overlay_address = Some(address.parse().unwrap());
    tx.put_host(record);
    let live = HostLive {
        state: HostState::Ready,
        run_id: run.to_owned(),
        ..HostLive::silent(tokio::time::Instant::now())
    };
    tx.set_live(host_name(name), live);
}

pub(crate) fn cluster_id() -> ClusterId {
    ClusterId::from_uuid(Uuid::from_u128(7))
}
