//! Changes that would let a VM fit: what they do, what they cost, how they read. Used by the search in `hint`; programs
//! find them in a stored decision.
//!
//! [`Change::apply`] is what a change means. A hint is only given after its changes have been applied to the same
//! request and hosts and all tests passed.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use dalgu_proto::{
    host::{GuestFeature, HugePages, NumaNode, PciDevice, Uplink},
    ids::HostName,
    placement::{Rule, Toleration},
    vm::{Disk, Fitting, Nic, PageSize, PciAddress, Spec},
};
use serde::{Deserialize, Serialize};

use super::{
    devices,
    numa::Parts,
    rules::Members,
    view::{HostView, PoolView, Request},
};

/// A change to a host, to the request or to the site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Change {
    /// Open a host again.
    Uncordon {
        /// The host.
        host: HostName,
    },
    /// Take load off a host.
    Relieve {
        /// The host.
        host: HostName,
    },
    /// Get a host to report, with a working hypervisor.
    MakeReady {
        /// The host.
        host: HostName,
        /// What its state is now, in words.
        state: String,
    },
    /// Give a host a label.
    SetLabel {
        /// The host.
        host: HostName,
        /// The label's key.
        key: String,
        /// The value it must have.
        value: String,
    },
    /// Stop reserving virtual processors on a host: delete or migrate VMs.
    FreeVcpus {
        /// The host.
        host: HostName,
        /// So many.
        vcpus: u32,
    },
    /// Stop reserving memory on a host: delete or migrate VMs.
    FreeMemory {
        /// The host.
        host: HostName,
        /// So much.
        mib: u64,
    },
    /// Make room in a host's pool.
    FreeStorage {
        /// The host.
        host: HostName,
        /// The pool.
        pool: String,
        /// So much.
        mib: u64,
    },
    /// Give a host a pool.
    AddPool {
        /// The host.
        host: HostName,
        /// The pool.
        pool: String,
        /// Room that it needs.
        mib: u64,
    },
    /// Make a host's pool usable again.
    RepairPool {
        /// The host.
        host: HostName,
        /// The pool.
        pool: String,
    },
    /// Give a host a bridge.
    AddBridge {
        /// The host.
        host: HostName,
        /// The bridge.
        bridge: String,
    },
    /// Give guests on a host what it does not offer.
    AddFeature {
        /// The host.
        host: HostName,
        /// What is missing.
        feature: GuestFeature,
    },
    /// Take a taint off a host.
    RemoveTaint {
        /// The host.
        host: HostName,
        /// The taint's key.
        key: String,
    },
    /// Delete or migrate VMs of a host, or let it take more.
    FreeVms {
        /// The host.
        host: HostName,
        /// So many.
        vms: u32,
    },
    /// Set more huge pages aside on a host.
    AddHugePages {
        /// The host.
        host: HostName,
        /// Their size.
        pages: PageSize,
        /// So much, in MiB, on each of its nodes.
        mib: u64,
    },
    /// Stop reserving bandwidth on a host's bridge: delete or migrate VMs.
    FreeBandwidth {
        /// The host.
        host: HostName,
        /// The bridge.
        bridge: String,
        /// So much.
        mbit: u64,
    },
    /// Take PCI devices from VMs of a host: delete some.
    FreeDevices {
        /// The host.
        host: HostName,
        /// Their class.
        class: String,
        /// So many.
        count: u32,
    },
    /// Leave the choice of the host open.
    AnyHost,
    /// Have the VM put up with a taint.
    Tolerate {
        /// The taint's key.
        key: String,
        /// Its value.
        value: String,
    },
    /// Do without a placement group.
    LeaveGroup {
        /// The group.
        group: String,
    },
    /// Do without a label in the selector.
    DropSelector {
        /// The label's key.
        key: String,
    },
    /// Ask for fewer virtual processors.
    AskVcpus {
        /// At most so many.
        at_most: u32,
    },
    /// Ask for less memory.
    AskMemory {
        /// At most so much.
        at_most_mib: u64,
    },
    /// Do without processors, huge pages and NUMA nodes of its own.
    AskNoNode,
    /// Reserve less bandwidth on a bridge.
    AskBandwidth {
        /// The bridge.
        bridge: String,
        /// At most so much, in Mbit per second.
        at_most_mbit: u64,
    },
    /// Ask for fewer PCI devices of a class.
    AskDevices {
        /// The class.
        class: String,
        /// At most so many.
        at_most: u32,
    },
    /// Ask for smaller disks in a pool.
    AskStorage {
        /// The pool.
        pool: String,
        /// At most so much in all.
        at_most_mib: u64,
    },
    /// Do without a volume.
    LeaveVolume {
        /// The volume.
        volume: String,
        /// Where it is.
        host: String,
    },
    /// Take the room that is kept for protected domains.
    IgnoreProtection,
    /// Register another host that has what the request names.
    AddHost {
        /// The one that was asked for but is not registered; `None` for any.
        name: Option<HostName>,
        /// Processors it needs at least.
        cpus: u32,
        /// Memory it needs at least beside its own reserve, in MiB.
        memory_mib: u64,
    },
}

impl Change {
    /// Carries the change out on a request and the hosts it is decided on.
    pub fn apply(&self, request: &mut Request, hosts: &mut Vec<HostView>) {
        match self {
            Self::AnyHost => request.host = None,
            Self::IgnoreProtection => request.ignore_protection = true,
            Self::DropSelector { key } => drop(request.spec.host_selector.remove(key)),
            Self::Tolerate { key, value } => {
                let (key, value) = (key.clone(), Some(value.clone()));
                request.rules.tolerations.insert(Toleration { key, value });
            }
            Self::LeaveGroup { group } => {
                let other = |members: &Members| members.group.name.as_str() != group;
                request.rules.groups.retain(other);
            }
            Self::LeaveVolume { volume, .. } => {
                let named = |disk: &Disk| {
                    disk.volume
                        .as_ref()
                        .is_some_and(|own| own.name.as_str() == volume)
                };
                request.spec.disks.retain(|disk| !named(disk));
                request
                    .needs
                    .volumes
                    .retain(|_, bound| bound.volume.as_str() != volume);
            }
            Self::AskVcpus { at_most } => request.spec.vcpus = request.spec.vcpus.min(*at_most),
            Self::AskMemory { at_most_mib } => {
                request.spec.memory_mib = request.spec.memory_mib.min(*at_most_mib)
            }
            Self::AskStorage { pool, at_most_mib } => shrink(&mut request.spec, pool, *at_most_mib),
            Self::AskNoNode => request.spec.fitting = Fitting::default(),
            Self::AskBandwidth { bridge, at_most_mbit } => {
                reserve_less(&mut request.spec, bridge, *at_most_mbit)
            }
            Self::AskDevices { class, at_most } => match at_most {
                0 => drop(request.spec.devices.remove(class)),
                most => {
                    if let Some(asked) = request.spec.devices.get_mut(class) {
                        *asked = (*asked).min(*most);
                    }
                }
            },
            Self::AddHost { name, .. } => {
                let used = |name: &HostName| hosts.iter().any(|host| host.name == *name);
                let name = name.clone().unwrap_or_else(|| unused_name(request, used));
                hosts.push(host_for(request, name));
            }
            Self::Uncordon { host }
            | Self::Relieve { host }
            | Self::MakeReady { host, .. }
            | Self::SetLabel { host, .. }
            | Self::FreeVcpus { host, .. }
            | Self::FreeMemory { host, .. }
            | Self::FreeStorage { host, .. }
            | Self::AddPool { host, .. }
            | Self::RepairPool { host, .. }
            | Self::AddBridge { host, .. }
            | Self::AddFeature { host, .. }
            | Self::RemoveTaint { host, .. }
            | Self::FreeVms { host, .. }
            | Self::AddHugePages { host, .. }
            | Self::FreeBandwidth { host, .. }
            | Self::FreeDevices { host, .. } => {
                if let Some(host) = hosts.iter_mut().find(|candidate| candidate.name == *host) {
                    self.apply_to(host);
                }
            }
        }
    }

    fn apply_to(&self, host: &mut HostView) {
        match self {
            Self::Uncordon { .. } => host.cordoned = false,
            Self::Relieve { .. } => host.pressed = false,
            Self::MakeReady { .. } => host.ready = true,
            Self::SetLabel { key, value, .. } => {
                drop(host.labels.to_mut().insert(key.clone(), value.clone()))
            }
            Self::FreeVcpus { vcpus, .. } => host.vcpus_reserved = host.vcpus_reserved.saturating_sub(*vcpus),
            Self::FreeMemory { mib, .. } => {
                host.memory_mib_reserved = host.memory_mib_reserved.saturating_sub(*mib)
            }
            Self::FreeStorage { pool, mib, .. } => {
                for pool in host.pools.iter_mut().filter(|candidate| candidate.name == *pool) {
                    pool.reserved_mib = pool.reserved_mib.saturating_sub(*mib);
                    pool.available_mib = pool.available_mib.saturating_add(*mib);
                    pool.used_mib = pool.used_mib.saturating_sub(*mib);
                }
            }
            Self::AddPool { pool, mib, .. } => host.pools.push(empty_pool(pool, *mib)),
            Self::RepairPool { pool, .. } => {
                for pool in host.pools.iter_mut().filter(|candidate| candidate.name == *pool) {
                    pool.error = None;
                }
            }
            Self::AddBridge { bridge, .. } => host.bridges.to_mut().push(bridge.clone()),
            Self::AddFeature { feature, .. } => host.guest_features.to_mut().push(*feature),
            Self::RemoveTaint { key, .. } => host.taints.to_mut().retain(|taint| taint.key != *key),
            Self::FreeVms { vms, .. } => host.vms = host.vms.saturating_sub(*vms),
            Self::AddHugePages { pages, mib, .. } => {
                for node in host.parts.nodes.to_mut() {
                    add_pages(node, *pages, *mib);
                }
            }
            Self::FreeBandwidth { bridge, mbit, .. } => host.parts.taken.to_mut().free_mbit(bridge, *mbit),
            Self::FreeDevices { class, count, .. } => {
                let all: Vec<_> = devices::of_class(host, class)
                    .map(|device| device.address)
                    .collect();
                let taken = host.parts.taken.to_mut();
                let own = all.into_iter().filter(|address| taken.has_device(*address));
                let own: Vec<_> = own.take(usize::try_from(*count).unwrap_or(usize::MAX)).collect();
                own.into_iter().for_each(|address| taken.free_device(address));
            }
            // The rest changes no host.
            _ => {}
        }
    }

    /// How great the change is: what kind of effort, then, where it has an amount, how much of what was asked for, in
    /// thousandths. An order of the project's own, from a word to the site's administrator up to buying a server.
    pub(super) fn cost(&self, request: &Request) -> (u32, u64) {
        let spec = &request.spec;
        match self {
            Self::Uncordon { .. } | Self::AnyHost => (1, 0),
            Self::FreeVcpus { vcpus, .. } => (2, thousandths(u64::from(*vcpus), spec.vcpus.into())),
            Self::FreeMemory { mib, .. } => (2, thousandths(*mib, spec.reserved_memory_mib())),
            Self::FreeStorage { pool, mib, .. } => (2, thousandths(*mib, asked(request, pool))),
            Self::AskVcpus { at_most } => (
                2,
                thousandths(spec.vcpus.saturating_sub(*at_most).into(), spec.vcpus.into()),
            ),
            Self::AskMemory { at_most_mib } => (
                2,
                thousandths(spec.memory_mib.saturating_sub(*at_most_mib), spec.memory_mib),
            ),
            Self::AskStorage { pool, at_most_mib } => {
                let all = asked(request, pool);
                (2, thousandths(all.saturating_sub(*at_most_mib), all))
            }
            Self::FreeVms { vms, .. } => (2, u64::from(*vms).saturating_mul(1000)),
            Self::FreeBandwidth { bridge, mbit, .. } => (2, thousandths(*mbit, reserved(request, bridge))),
            Self::AskBandwidth { bridge, at_most_mbit } => {
                let all = reserved(request, bridge);
                (2, thousandths(all.saturating_sub(*at_most_mbit), all))
            }
            Self::FreeDevices { count, .. } => (2, u64::from(*count).saturating_mul(1000)),
            Self::AskDevices { class, at_most } => {
                let all = spec.devices.get(class).copied().unwrap_or(0);
                (3, thousandths(all.saturating_sub(*at_most).into(), all.into()))
            }
            Self::AddHugePages { mib, .. } => (3, thousandths(*mib, spec.memory_mib)),
            Self::AskNoNode => (3, 0),
            Self::SetLabel { .. }
            | Self::DropSelector { .. }
            | Self::RemoveTaint { .. }
            | Self::Tolerate { .. } => (2, 1000),
            Self::MakeReady { .. } | Self::Relieve { .. } => (4, 0),
            Self::LeaveVolume { .. } | Self::LeaveGroup { .. } | Self::IgnoreProtection => (6, 0),
            Self::AddBridge { .. } | Self::RepairPool { .. } | Self::AddFeature { .. } => (5, 0),
            Self::AddPool { .. } => (8, 0),
            Self::AddHost { .. } => (100, 0),
        }
    }
}

/// What a request reserves on a bridge, in Mbit per second.
fn reserved(request: &Request, bridge: &str) -> u64 {
    request.bandwidth().get(bridge).copied().unwrap_or(0)
}

fn add_pages(node: &mut NumaNode, pages: PageSize, mib: u64) {
    let page_size_bytes = pages.kib() << 10;
    let more = mib.div_ceil(pages.mib());
    // What is set aside is ordinary memory no more; a hint is for a host that has it to spare.
    match node
        .huge_pages
        .iter_mut()
        .find(|known| known.page_size_bytes == page_size_bytes)
    {
        Some(known) => known.total = known.total.saturating_add(more),
        None => node.huge_pages.push(HugePages {
            page_size_bytes,
            total: more,
            free: more,
        }),
    }
}

/// Has the interfaces on a bridge reserve less, the last ones first, until their sum is at most `at_most`.
fn reserve_less(spec: &mut Spec, bridge: &str, at_most: u64) {
    let sum: u64 = spec
        .bandwidth()
        .filter(|(on, _)| *on == bridge)
        .map(|(_, mbit)| mbit)
        .sum();
    let mut excess = sum.saturating_sub(at_most);
    for nic in spec
        .nics
        .iter_mut()
        .rev()
        .filter(|nic| nic.bridge() == Some(bridge))
    {
        let had = nic.reserved_mbit.unwrap_or(0);
        let cut = u32::try_from(excess).unwrap_or(u32::MAX).min(had);
        excess -= u64::from(cut);
        nic.reserved_mbit = Some(had - cut).filter(|left| *left > 0);
    }
}

fn thousandths(part: u64, whole: u64) -> u64 {
    part.saturating_mul(1000) / whole.max(1)
}

/// The sum of the disks asked for in a pool, in MiB.
pub(super) fn asked(request: &Request, pool: &str) -> u64 {
    request
        .pools()
        .find(|(name, _)| *name == pool)
        .map_or(0, |(_, sum)| sum)
}

fn empty_pool(name: &str, mib: u64) -> PoolView<'static> {
    PoolView {
        name: name.to_owned().into(),
        capacity_mib: mib,
        available_mib: mib,
        ..PoolView::default()
    }
}

/// Makes the disks of a pool smaller, the last ones first, until their sum is at most `at_most_mib`; each keeps 1 MiB.
fn shrink(spec: &mut Spec, pool: &str, at_most_mib: u64) {
    let sum: u64 = spec
        .volumes()
        .filter(|disk| disk.pool == pool)
        .map(|disk| disk.size_mib)
        .sum();
    let mut excess = sum.saturating_sub(at_most_mib);
    for disk in spec.disks.iter_mut().rev().filter(|disk| disk.pool == pool) {
        let cut = excess.min(disk.size_mib.saturating_sub(1));
        disk.size_mib -= cut;
        excess -= cut;
    }
}

/// A host that has just what a request needs.
pub(super) fn host_for(request: &Request, name: HostName) -> HostView<'static> {
    let spec = &request.spec;
    HostView {
        name,
        ready: true,
        state: "".into(),
        cordoned: false,
        cordon_reason: "".into(),
        pressed: false,
        labels: Cow::Owned(labels_for(request)),
        taints: Cow::default(),
        cpus: cpus_for(request),
        cpu_overcommit_ratio: 1.0,
        own_cpu_overcommit_ratio: 1.0,
        adapted: false,
        memory_mib: spec.reserved_memory_mib(),
        reserved_memory_mib: 0,
        vcpus_reserved: 0,
        memory_mib_reserved: 0,
        vms: 0,
        vm_sizes: Vec::new(),
        pools: request.pools().map(|(pool, mib)| empty_pool(pool, mib)).collect(),
        bridges: spec
            .nics
            .iter()
            .filter_map(Nic::bridge)
            .map(str::to_owned)
            .collect(),
        accelerator: request.accelerator.clone().unwrap_or_default().into(),
        guest_features: spec.features().collect(),
        usage: None,
        unmanaged_vcpus: 0,
        unmanaged_memory_mib: 0,
        vms_most: None,
        parts: parts_for(request),
    }
}

/// Logical processors that a host needs for a request.
pub(super) fn cpus_for(request: &Request) -> u32 {
    // One is never dedicated.
    request.spec.vcpus + u32::from(request.spec.fitting.is_dedicated())
}

/// Memory that it needs, huge pages too.
pub(super) fn memory_for(request: &Request) -> u64 {
    let huge = request.spec.fitting.pages.map_or(0, |_| request.spec.memory_mib);
    request.spec.reserved_memory_mib().saturating_add(huge)
}

/// Nodes that have just what each part needs, and uplinks.
fn parts_for(request: &Request) -> Parts<'static> {
    let (spec, fitting) = (&request.spec, request.spec.fitting);
    if !request.is_particular() {
        return Parts::default();
    }
    let nodes = fitting.nodes();
    let each = spec.vcpus.div_ceil(nodes);
    let node = |id: u32| {
        let mut node = NumaNode {
            id,
            cpus: (id * each..(id + 1) * each).collect(),
            memory_bytes: memory_for(request).div_ceil(nodes.into()).saturating_mul(1 << 20),
            ..NumaNode::default()
        };
        if let Some(pages) = fitting.pages {
            add_pages(&mut node, pages, spec.memory_mib.div_ceil(nodes.into()));
        }
        node
    };
    let uplink = |(bridge, mbit): (&str, u64)| Uplink {
        bridge: bridge.to_owned(),
        mbit_per_second: mbit,
    };
    Parts {
        nodes: (0..nodes).map(node).collect(),
        uplinks: request.bandwidth().into_iter().map(uplink).collect(),
        devices: devices_for(spec),
        taken: Cow::default(),
    }
}

/// Just the devices that are asked for.
fn devices_for(spec: &Spec) -> Cow<'static, [PciDevice]> {
    let asked = spec.devices.iter();
    let classes = asked.flat_map(|(class, count)| (0..*count).map(move |_| class));
    let device = |(bus, class): (u8, &String)| PciDevice {
        class: class.clone(),
        address: PciAddress {
            domain: 0,
            bus,
            slot: 0,
            function: 0,
        },
        model: String::new(),
        numa_node: None,
        iommu_group: Some(bus.into()),
        problem: None,
    };
    (0..=u8::MAX).zip(classes).map(device).collect()
}

/// Labels that a selector asks for, and a domain for each group that goes by a label: that of the members, or a new one.
fn labels_for(request: &Request) -> BTreeMap<String, String> {
    let mut labels = request.spec.host_selector.clone();
    for members in request.rules.required() {
        let Some(key) = &members.group.topology_key else {
            continue;
        };
        let wanted = match members.group.rule {
            Rule::Affinity => members.domains.keys().next().cloned(),
            Rule::AntiAffinity => None,
        };
        let mut new = (1_u64..).map(|number| format!("new-{number}"));
        let unused = || new.find(|value| !members.domains.contains_key(value));
        if let Some(value) = wanted.or_else(unused) {
            labels.entry(key.clone()).or_insert(value);
        }
    }
    labels
}

/// A name that no host has.
pub(super) fn unused_name(request: &Request, used: impl Fn(&HostName) -> bool) -> HostName {
    let used = |name: &HostName| request.exclude.as_ref() == Some(name) || used(name);
    (1_u64..)
        .map(|number| {
            format!("new-host-{number}")
                .parse::<HostName>()
                .expect("the text is a name")
        })
        .find(|name| !used(name))
        .expect("there are more numbers than hosts")
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uncordon { host } => write!(f, "uncordon {host}"),
            Self::Relieve { host } => write!(
                f,
                "relieve {host} (dalgu plan rebalance) or wait until its load has gone"
            ),
            Self::MakeReady { host, state } if state.is_empty() => write!(f, "get {host} ready"),
            Self::MakeReady { host, state } => write!(f, "get {host} ready (it is {state})"),
            Self::SetLabel { host, key, value } => write!(f, "give {host} the label {key}={value}"),
            Self::FreeVcpus { host, vcpus: 1 } => write!(f, "free 1 vCPU on {host}"),
            Self::FreeVcpus { host, vcpus } => write!(f, "free {vcpus} vCPUs on {host}"),
            Self::FreeMemory { host, mib } => write!(f, "free {mib} MiB of memory on {host}"),
            Self::FreeStorage { host, pool, mib } => write!(f, "free {mib} MiB in pool {pool} of {host}"),
            Self::AddPool { host, pool, mib } => write!(f, "give {host} a pool {pool} with {mib} MiB free"),
            Self::RepairPool { host, pool } => write!(f, "repair pool {pool} of {host}"),
            Self::AddBridge { host, bridge } => write!(f, "give {host} a bridge {bridge}"),
            Self::AddFeature { host, feature } => {
                write!(f, "give {host} {} ({})", feature.as_str(), feature.remedy())
            }
            Self::AnyHost => f.write_str("name no host"),
            Self::IgnoreProtection => {
                f.write_str("ask with `--ignore-protection`, which takes room that is kept")
            }
            Self::DropSelector { key } => write!(f, "leave label {key} out of the host selector"),
            Self::RemoveTaint { host, key } => write!(f, "take the taint {key} off {host}"),
            Self::Tolerate { key, value } => write!(f, "have the VM tolerate the taint {key}={value}"),
            Self::LeaveGroup { group } => write!(f, "leave the VM out of group {group}"),
            Self::LeaveVolume { volume, host } => {
                write!(f, "leave out volume {volume}, which is on {host}")
            }
            Self::AskVcpus { at_most: 1 } => f.write_str("ask for 1 vCPU"),
            Self::AskVcpus { at_most } => write!(f, "ask for at most {at_most} vCPUs"),
            Self::AskMemory { at_most_mib } => write!(f, "ask for at most {at_most_mib} MiB of memory"),
            Self::FreeVms { host, vms: 1 } => write!(f, "move or delete 1 VM of {host}, or let it have more"),
            Self::FreeVms { host, vms } => {
                write!(f, "move or delete {vms} VMs of {host}, or let it have more")
            }
            Self::AddHugePages { host, pages, mib } => write!(
                f,
                "set {mib} MiB more of huge pages of {} aside on each NUMA node of {host}",
                pages.as_str()
            ),
            Self::FreeBandwidth { host, bridge, mbit } => {
                write!(f, "free {mbit} Mbit/s on bridge {bridge} of {host}")
            }
            Self::FreeDevices { host, class, count } => write!(
                f,
                "free {count} PCI devices of class {class} on {host} (VMs keep them also while they are off)"
            ),
            Self::AskDevices { class, at_most: 0 } => write!(f, "ask for no PCI device of class {class}"),
            Self::AskDevices { class, at_most } => {
                write!(f, "ask for at most {at_most} PCI devices of class {class}")
            }
            Self::AskNoNode => f.write_str("ask for shared processors, ordinary memory and no NUMA policy"),
            Self::AskBandwidth {
                bridge,
                at_most_mbit: 0,
            } => {
                write!(f, "reserve no bandwidth on bridge {bridge}")
            }
            Self::AskBandwidth { bridge, at_most_mbit } => {
                write!(f, "reserve at most {at_most_mbit} Mbit/s on bridge {bridge}")
            }
            Self::AskStorage { pool, at_most_mib } => {
                write!(f, "ask for at most {at_most_mib} MiB of disks in pool {pool}")
            }
            Self::AddHost {
                name: Some(name),
                cpus,
                memory_mib,
            } => {
                write!(
                    f,
                    "start an agent on {name} (it needs {cpus} processors and {memory_mib} MiB for VMs)"
                )
            }
            Self::AddHost {
                name: None,
                cpus,
                memory_mib,
            } => {
                write!(
                    f,
                    "add a host with at least {cpus} processors and {memory_mib} MiB for VMs"
                )
            }
        }
    }
}
