//! A site for the engine, as many would be: racks and rooms, three models of host, local and shared pools, interfaces with a bandwidth, loads of
//! every step; and requests for it, a fifth of which are bound by labels, and a fifth of groups that are kept apart. Where it is
//! [fitted](Kind::Fitted), three in ten of them also ask for NUMA nodes, processors of their own or huge pages.

use std::borrow::Cow;
use std::collections::BTreeMap;

use dalgu_controller::placement::{
    Held, HostView, Members, Parts, PoolPolicy, PoolView, Request, Rules, Size, UsageView, charged,
};
use dalgu_proto::host::{HugePages, NumaNode, Uplink};
use dalgu_proto::placement::{Group, Rule};
use dalgu_proto::vm::{
    CloneMode, CpuPolicy, Disk, DiskFormat, Fitting, Nic, NumaPlace, NumaPolicy, PageSize, Plug,
    RestartPolicy, Spec,
};
use fastrand::Rng;

/// Hosts in a rack.
const RACK: usize = 40;
/// Rooms.
const ROOMS: usize = 4;
/// Processors and memory in GiB of each model.
const MODELS: [(u32, u64); 3] = [(64, 256), (48, 384), (32, 128)];
/// Virtual processors and memory in GiB, as flavours have them.
const FLAVOURS: [(u32, u64); 8] = [
    (1, 2),
    (2, 4),
    (2, 8),
    (4, 8),
    (4, 16),
    (8, 16),
    (8, 32),
    (16, 64),
];

/// Mbit per second of each bridge's uplink, and what a VM may have reserved of it.
const UPLINK_MBIT: u64 = 25_000;
const RESERVED_MBIT: [u32; 4] = [50, 100, 200, 400];
/// NUMA nodes of a host, and how many GiB of each are 2 MiB pages.
const NODES: u32 = 2;
const HUGE_GIB: u64 = 16;

/// What VMs of a site ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Room, wherever on a host it is.
    Plain,
    /// Some also processors and memory of one node or two.
    Fitted,
}

/// Host of that number.
pub(super) fn host(number: usize, rng: &mut Rng) -> HostView<'static> {
    let (cpus, gib) = MODELS[number % MODELS.len()];
    let pool = |name: &'static str, shared, capacity_mib: u64| PoolView {
        name: name.into(),
        shared,
        error: None,
        capacity_mib,
        available_mib: capacity_mib,
        used_mib: 0,
        reserved_mib: 0,
        policy: PoolPolicy::default(),
    };
    let bridges = ["br0", "storage", "backup"];
    let with = 1 + rng.usize(1..=bridges.len() - 1);
    HostView {
        name: format!("host-{number:06}").parse().expect("a name"),
        ready: rng.usize(0..200) > 0,
        state: "ready".into(),
        cordoned: rng.usize(0..100) == 0,
        cordon_reason: "".into(),
        pressed: false,
        labels: Cow::Owned(BTreeMap::from([
            ("rack".to_owned(), format!("r{}", number / RACK)),
            ("room".to_owned(), format!("m{}", number / RACK % ROOMS)),
        ])),
        taints: Cow::default(),
        cpus,
        cpu_overcommit_ratio: 2.0,
        own_cpu_overcommit_ratio: 2.0,
        adapted: false,
        memory_mib: gib << 10,
        reserved_memory_mib: 1024,
        vcpus_reserved: 0,
        memory_mib_reserved: 0,
        vms: 0,
        vm_sizes: Vec::new(),
        pools: vec![pool("local", false, 2 << 20), pool("shared", true, 1 << 40)],
        bridges: bridges.iter().take(with).map(|name| (*name).to_owned()).collect(),
        accelerator: "kvm".into(),
        guest_features: Cow::default(),
        usage: Some(usage(cpus, rng)),
        unmanaged_vcpus: 0,
        unmanaged_memory_mib: 0,
        vms_most: None,
        parts: Parts {
            nodes: Cow::Owned(
                (0..NODES)
                    .map(|id| node(id, cpus / NODES, gib / u64::from(NODES)))
                    .collect(),
            ),
            uplinks: Cow::Owned(bridges.iter().take(with).map(|name| uplink(name)).collect()),
            ..Parts::default()
        },
    }
}

fn node(id: u32, cpus: u32, gib: u64) -> NumaNode {
    NumaNode {
        id,
        cpus: (id * cpus..(id + 1) * cpus).collect(),
        memory_bytes: gib << 30,
        distances: (0..NODES)
            .map(|other| if other == id { 10 } else { 21 })
            .collect(),
        huge_pages: vec![HugePages {
            page_size_bytes: 2 << 20,
            total: HUGE_GIB << 9,
            free: HUGE_GIB << 9,
        }],
        cores: (0..cpus).map(|cpu| id * cpus + cpu / 2 * 2).collect(),
    }
}

fn uplink(bridge: &str) -> Uplink {
    Uplink {
        bridge: bridge.to_owned(),
        mbit_per_second: UPLINK_MBIT,
    }
}

/// Most hosts are little loaded; some are under pressure.
fn usage(cpus: u32, rng: &mut Rng) -> UsageView {
    let busy = match rng.usize(0..10) {
        0 => 0.8,
        _ => rng.f64() * 0.45,
    };
    UsageView {
        cpus_busy: Some(f64::from(cpus) * busy),
        network_utilisation: rng.f64() * 0.19,
        ..UsageView::default()
    }
}

/// A request: CPU, memory, one or two disks, an interface, one in ten with a bandwidth; one in ten only for a room, one in ten only for a rack;
/// see [`rules`] and [`fitting`].
pub(super) fn request(hosts: usize, kind: Kind, rng: &mut Rng) -> Request {
    let (vcpus, gib) = FLAVOURS[rng.usize(0..FLAVOURS.len())];
    let disk = |name: &str, pool: &str, size_mib| Disk {
        name: name.into(),
        size_mib,
        pool: pool.into(),
        image: None,
        format: DiskFormat::Qcow2,
        digest: None,
        clone_mode: CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    };
    let mut disks = vec![disk("root", "local", 20 << 10)];
    if rng.bool() {
        disks.push(disk("data", "shared", 100 << 10));
    }
    let bridge = ["br0", "br0", "storage", "backup"][rng.usize(0..4)];
    let rack = rng.usize(0..hosts) / RACK;
    let bound = match rng.usize(0..10) {
        0 => Some(("room".to_owned(), format!("m{}", rack % ROOMS))),
        1 => Some(("rack".to_owned(), format!("r{rack}"))),
        _ => None,
    };
    Request::new(Spec {
        vcpus,
        memory_mib: gib << 10,
        disks,
        nics: vec![Nic {
            name: "eth0".into(),
            plug: Plug::Bridge {
                bridge: bridge.into(),
            },
            mac: String::new(),
            reserved_mbit: (rng.u8(..10) == 0).then(|| RESERVED_MBIT[rng.usize(0..RESERVED_MBIT.len())]),
        }],
        kernel_boot: None,
        restart_policy: RestartPolicy::default(),
        host_selector: bound.into_iter().collect(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: match kind {
            Kind::Plain => Fitting::default(),
            Kind::Fitted => fitting(vcpus, rng),
        },
        devices: Default::default(),
    })
    .with_rules(rules(hosts, rng))
}

/// In three of ten requests: one node, two, processors of its own on one, or huge pages on one.
fn fitting(vcpus: u32, rng: &mut Rng) -> Fitting {
    let packed = Fitting {
        numa: NumaPolicy::Pack,
        ..Fitting::default()
    };
    match rng.usize(0..40) {
        0..4 => packed,
        4..7 if vcpus >= NODES && vcpus.is_multiple_of(NODES) => Fitting {
            numa: NumaPolicy::Spread(NODES),
            ..packed
        },
        7..10 => Fitting {
            cpus: CpuPolicy::Dedicated,
            ..packed
        },
        10..12 => Fitting {
            pages: Some(PageSize::Mib2),
            ..packed
        },
        _ => Fitting::default(),
    }
}

/// In one of five requests a group that is kept apart by racks and has members in some, half of them only as far as that can be.
fn rules(hosts: usize, rng: &mut Rng) -> Rules {
    if rng.usize(0..5) > 0 {
        return Rules::default();
    }
    let first = "member-1".parse::<dalgu_proto::ids::VmName>().expect("a name");
    let domains: BTreeMap<_, _> = (0..rng.usize(1..9))
        .map(|_| {
            let held = Held {
                vms: 1,
                first: first.clone(),
            };
            (format!("r{}", rng.usize(0..hosts) / RACK), held)
        })
        .collect();
    let members = Members {
        group: Group {
            name: "apart".parse().expect("a name"),
            rule: Rule::AntiAffinity,
            preferred: rng.bool(),
            topology_key: Some("rack".to_owned()),
        },
        others: u32::try_from(domains.len()).expect("some"),
        first: Some(first),
        domains,
    };
    Rules {
        groups: vec![members],
        ..Rules::default()
    }
}

/// Reserves what a request needs on a host, at these nodes of it, or gives it back.
pub(super) fn reserve(host: &mut HostView<'_>, request: &Request, places: &[NumaPlace], add: bool) {
    let change = |value: &mut u64, by: u64| *value = if add { *value + by } else { *value - by };
    let own = charged(host.parts.taken.dedicated(), host.cpu_overcommit_ratio);
    host.parts.taken.to_mut().change(&request.spec, places, add);
    let own_now = charged(host.parts.taken.dedicated(), host.cpu_overcommit_ratio);
    let mut vcpus = host.vcpus_reserved.into();
    match request.spec.fitting.is_dedicated() {
        true => change(&mut vcpus, own.abs_diff(own_now).into()),
        false => change(&mut vcpus, request.spec.vcpus.into()),
    }
    host.vcpus_reserved = u32::try_from(vcpus).expect("fewer than a host may have");
    change(&mut host.memory_mib_reserved, request.spec.reserved_memory_mib());
    let size = Size {
        vcpus: request.spec.vcpus,
        memory_mib: request.spec.reserved_memory_mib(),
    };
    match host.vm_sizes.iter_mut().find(|(other, _)| *other == size) {
        Some((_, vms)) => *vms = if add { *vms + 1 } else { *vms - 1 },
        None => host.vm_sizes.push((size, 1)),
    }
    host.vm_sizes.retain(|(_, vms)| *vms > 0);
    for (name, mib) in request.pools() {
        let own = host
            .pools
            .iter_mut()
            .find(|pool| pool.name == name && !pool.shared);
        own.into_iter()
            .for_each(|pool| change(&mut pool.reserved_mib, mib));
    }
}

/// The host as the controller would give it to placement: with nothing copied that need not be.
pub(super) fn seen<'a>(host: &'a HostView<'_>) -> HostView<'a> {
    let pool = |pool: &'a PoolView<'_>| PoolView {
        name: Cow::Borrowed(&pool.name),
        error: pool.error.as_deref().map(Cow::Borrowed),
        ..*pool
    };
    HostView {
        name: host.name.clone(),
        state: Cow::Borrowed(&host.state),
        cordon_reason: Cow::Borrowed(&host.cordon_reason),
        pressed: host.pressed,
        labels: Cow::Borrowed(&host.labels),
        taints: Cow::Borrowed(&host.taints),
        // Left out where nothing is protected.
        vm_sizes: Vec::new(),
        pools: host.pools.iter().map(pool).collect(),
        bridges: Cow::Borrowed(&host.bridges),
        accelerator: Cow::Borrowed(&host.accelerator),
        guest_features: Cow::Borrowed(&host.guest_features),
        parts: Parts {
            nodes: Cow::Borrowed(&host.parts.nodes),
            uplinks: Cow::Borrowed(&host.parts.uplinks),
            devices: Cow::Borrowed(&host.parts.devices),
            taken: Cow::Borrowed(&host.parts.taken),
        },
        ..*host
    }
}
