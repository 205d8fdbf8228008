//! The tests that a host must pass. Called by [`super::decide`] for every host, and by the search for a hint.
//!
//! Reservations decide here, never measured usage: a VM that fits now still fits when all its neighbours wake up. All
//! failed tests are found, not only the first, so that an operator need not ask twice. What fails is kept as a
//! [`Lack`], which borrows; words are made from it only for the answer.

use std::collections::BTreeSet;

use dalgu_proto::{
    host::GuestFeature,
    vm::{Nic, PageSize},
};
use serde::{Deserialize, Serialize};

use super::{
    devices, numa,
    score::Size,
    view::{HostView, PoolView, Request},
};

/// A test that a host can fail. Named on the wire by [`Constraint::as_str`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Constraint {
    /// The request names another host.
    RequestedHost,
    /// A VM cannot migrate to the host it is on.
    SameHost,
    /// The host does not report in time.
    State,
    /// The host is cordoned.
    Cordon,
    /// The host's load has closed it for new VMs.
    Pressure,
    /// A label that the VM asks for is missing or has another value.
    Selector,
    /// Not enough virtual processors are left, or the host has fewer logical ones than the VM virtual ones.
    Cpu,
    /// Not enough memory is left.
    Memory,
    /// A pool is missing or broken.
    Pool,
    /// A pool has not enough room.
    Storage,
    /// A bridge is missing.
    Bridge,
    /// Guests run on another accelerator.
    Accelerator,
    /// The guest needs a part that is missing.
    Feature,
    /// A volume of it is on another host.
    Volume,
    /// The host has a taint that the VM does not put up with.
    Taint,
    /// A placement group keeps the VM away.
    Group,
    /// It has as many VMs as it takes.
    VmCount,
    /// No NUMA node, or too few, have room.
    Numa,
    /// Too few huge pages are free.
    HugePages,
    /// Too little of an uplink is free.
    Bandwidth,
    /// Too few PCI devices of a class are free.
    PciDevice,
    /// A protected domain that fails would find no room then.
    Protection,
}

impl Constraint {
    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RequestedHost => "REQUESTED_HOST",
            Self::SameHost => "SAME_HOST",
            Self::State => "STATE",
            Self::Cordon => "CORDON",
            Self::Pressure => "PRESSURE",
            Self::Selector => "SELECTOR",
            Self::Cpu => "CPU",
            Self::Memory => "MEMORY",
            Self::Pool => "POOL",
            Self::Storage => "STORAGE",
            Self::Bridge => "BRIDGE",
            Self::Accelerator => "ACCELERATOR",
            Self::Feature => "FEATURE",
            Self::Volume => "VOLUME",
            Self::Taint => "TAINT",
            Self::Group => "GROUP",
            Self::VmCount => "VM_COUNT",
            Self::Numa => "NUMA",
            Self::HugePages => "HUGE_PAGES",
            Self::Bandwidth => "BANDWIDTH",
            Self::PciDevice => "PCI_DEVICE",
            Self::Protection => "PROTECTION",
        }
    }
}

/// A failed test in words and numbers; kept with the decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortfall {
    /// Which test.
    pub constraint: Constraint,
    /// For people.
    pub message: String,
    /// What was needed (vCPUs, MiB); 0 where it is not a number.
    pub needed: u64,
    /// What there was, in the same unit.
    pub available: u64,
}

/// A failed test as the code sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Lack<'a> {
    RequestedHost {
        wanted: &'a str,
    },
    SameHost,
    State {
        state: &'a str,
    },
    Cordon {
        reason: &'a str,
    },
    Pressure,
    Selector {
        key: &'a str,
        value: &'a str,
        found: Option<&'a str>,
    },
    /// A single VM has more virtual processors than the host has logical ones.
    CpuCount {
        needed: u32,
        cpus: u32,
    },
    CpuFree {
        needed: u32,
        free: u32,
        capacity: u32,
        reserved: u32,
        /// The over-commit ratio, where it is what the host's load has made of it.
        adapted: Option<f64>,
    },
    Memory {
        needed: u64,
        guest: u64,
        free: u64,
        capacity: u64,
        reserved: u64,
    },
    PoolMissing {
        pool: &'a str,
    },
    PoolBroken {
        pool: &'a str,
        error: &'a str,
    },
    Storage {
        pool: &'a str,
        needed: u64,
        free: u64,
        /// What may be promised there.
        capacity: u64,
        reserved: u64,
        /// What must become free besides: for the disk itself, or for the pool to be no more full.
        short: u64,
        /// How full it is, in percent, where that is too much.
        full: Option<u64>,
    },
    Bridge {
        bridge: &'a str,
    },
    Accelerator {
        needed: &'a str,
        found: &'a str,
    },
    Feature {
        feature: GuestFeature,
    },
    Volume {
        volume: &'a str,
        host: &'a str,
    },
    Taint {
        key: &'a str,
        value: &'a str,
    },
    /// The host has no label that says which domain it is of.
    GroupDomain {
        group: &'a str,
        key: &'a str,
    },
    /// A member is in the host's domain.
    GroupApart {
        group: &'a str,
        vm: &'a str,
        key: Option<&'a str>,
        domain: &'a str,
    },
    /// Members are in another domain; `None` while they move.
    GroupTogether {
        group: &'a str,
        vm: &'a str,
        key: Option<&'a str>,
        domain: Option<&'a str>,
    },
    /// So much of a domain that fails would find no room, were the VM here. Found by [`super::decide`], on hosts that pass all other tests.
    Protection {
        domain: &'a str,
        lacking: Size,
    },
    VmCount {
        vms: u32,
        most: u32,
    },
    /// Enough of its nodes have no more virtual processors, or processors that could be a VM's own.
    NodeVcpus {
        dedicated: bool,
        nodes: u32,
        needed: u32,
        free: u32,
    },
    NodeMemory {
        nodes: u32,
        needed: u64,
        free: u64,
    },
    HugePages {
        pages: PageSize,
        nodes: u32,
        needed: u64,
        free: u64,
    },
    /// It has too few nodes, or too few that have all of what a part needs.
    Nodes {
        needed: u32,
        found: u32,
        all: bool,
    },
    Bandwidth {
        bridge: &'a str,
        needed: u64,
        free: u64,
        carries: u64,
    },
    Devices {
        class: &'a str,
        needed: u32,
        free: u32,
        /// Free ones and those that VMs have.
        all: u32,
        /// Those that cannot be given to any.
        unfit: u32,
    },
}

/// Finds all tests that the host fails, in the order of [`Constraint`].
pub(super) fn lacks<'a>(request: &'a Request, host: &'a HostView<'_>) -> Vec<Lack<'a>> {
    let mut found = Vec::new();
    find(request, host, &mut found);
    found
}

/// The same, added to what was found on other hosts. Does not allocate for a host that fits.
pub(super) fn find<'a>(request: &'a Request, host: &'a HostView<'_>, found: &mut Vec<Lack<'a>>) {
    if let Some(wanted) = request.host.as_ref().filter(|wanted| **wanted != host.name) {
        found.push(Lack::RequestedHost {
            wanted: wanted.as_str(),
        });
    }
    if request.exclude.as_ref() == Some(&host.name) {
        found.push(Lack::SameHost);
    }
    if !host.ready {
        found.push(Lack::State { state: &host.state });
    }
    if host.cordoned {
        found.push(Lack::Cordon {
            reason: &host.cordon_reason,
        });
    }
    if host.pressed {
        found.push(Lack::Pressure);
    }
    for (key, value) in &request.spec.host_selector {
        let label = host.labels.get(key).map(String::as_str);
        if label != Some(value) {
            found.push(Lack::Selector {
                key,
                value,
                found: label,
            });
        }
    }
    processors_and_memory(request, host, found);
    storage(request, host, found);
    let bridges = request.needs.bridges.iter().map(String::as_str);
    let bridges = request.spec.nics.iter().filter_map(Nic::bridge).chain(bridges);
    let lacking: BTreeSet<_> = bridges
        .filter(|bridge| !host.bridges.iter().any(|there| there == bridge))
        .collect();
    found.extend(lacking.into_iter().map(|bridge| Lack::Bridge { bridge }));
    if let Some(needed) = request
        .accelerator
        .as_deref()
        .filter(|needed| *needed != host.accelerator)
    {
        found.push(Lack::Accelerator {
            needed,
            found: &host.accelerator,
        });
    }
    let missing = request
        .spec
        .features()
        .chain(request.needs.features.iter().copied());
    let missing = missing.filter(|feature| !host.guest_features.contains(feature));
    found.extend(missing.map(|feature| Lack::Feature { feature }));
    let volumes = request.needs.volumes.values();
    let placed = volumes.filter_map(|bound| Some((bound.volume.as_str(), bound.host.as_ref()?)));
    let elsewhere = placed.filter(|(_, at)| **at != host.name);
    found.extend(elsewhere.map(|(volume, host)| Lack::Volume {
        volume,
        host: host.as_str(),
    }));
    found.extend(request.rules.lacks(host));
    if let Some(most) = host.vms_most.filter(|_| host.is_full()) {
        found.push(Lack::VmCount { vms: host.vms, most });
    }
    if request.is_particular() {
        particular(request, host, found);
    }
}

/// Tests of what few requests ask for, which the index of the engine knows nothing of.
pub(super) fn particular<'a>(request: &'a Request, host: &'a HostView<'_>, found: &mut Vec<Lack<'a>>) {
    if !request.spec.fitting.is_none() {
        numa::lacks(request, host, found);
    }
    for (bridge, needed) in request.bandwidth() {
        let (free, carries) = host.mbit_free(bridge);
        // Without the bridge there is nothing to say of its uplink.
        if needed > free && host.bridges.iter().any(|there| there == bridge) {
            found.push(Lack::Bandwidth {
                bridge,
                needed,
                free,
                carries,
            });
        }
    }
    devices::lacks(request, host, found);
}

fn processors_and_memory<'a>(request: &'a Request, host: &'a HostView<'_>, found: &mut Vec<Lack<'a>>) {
    let vcpus = request.spec.vcpus;
    // More virtual than logical processors in one VM never makes it faster: its own processors wait for each other.
    if vcpus > host.cpus {
        found.push(Lack::CpuCount {
            needed: vcpus,
            cpus: host.cpus,
        });
    }
    let (free, capacity) = (host.vcpus_free(), host.vcpus_capacity());
    // Dedicated ones take more than they are, and are tested by themselves.
    if vcpus > free && !request.spec.fitting.is_dedicated() {
        found.push(Lack::CpuFree {
            needed: vcpus,
            free,
            capacity,
            reserved: host.vcpus_reserved,
            adapted: host.adapted.then_some(host.cpu_overcommit_ratio),
        });
    }
    let (free, capacity) = (host.memory_mib_free(), host.memory_mib_capacity());
    let needed = request.spec.reserved_memory_mib();
    if needed > free {
        // That of a guest with huge pages is no ordinary memory.
        let guest = request.spec.fitting.pages.map_or(request.spec.memory_mib, |_| 0);
        let reserved = host.memory_mib_reserved;
        found.push(Lack::Memory {
            needed,
            guest,
            free,
            capacity,
            reserved,
        });
    }
}

fn storage<'a>(request: &'a Request, host: &'a HostView<'_>, found: &mut Vec<Lack<'a>>) {
    // POOL before STORAGE, so that the order of the tests is that of the constraints.
    let sources = request.needs.pools.iter().map(String::as_str);
    let sources = sources.filter(|source| !request.pools().any(|(name, _)| name == *source));
    for name in request.pools().map(|(name, _)| name).chain(sources) {
        match host.pool(name) {
            None => found.push(Lack::PoolMissing { pool: name }),
            Some(pool) => {
                if let Some(error) = &pool.error {
                    found.push(Lack::PoolBroken { pool: name, error });
                }
            }
        }
    }
    for (name, needed) in request.pools() {
        let Some(pool) = host.pool(name).filter(|pool| pool.error.is_none()) else {
            continue;
        };
        // The files of a VM that moves are there already where both hosts see them.
        let there_already = request.is_migration() && pool.shared;
        let free = pool.free_mib();
        if !there_already && needed > free {
            found.push(Lack::Storage {
                pool: name,
                needed,
                free,
                capacity: pool.promisable_mib(),
                reserved: pool.reserved_mib,
                short: short(pool, needed),
                full: pool.is_full().then(|| pool.used_percent()),
            });
        }
    }
}

/// What must become free in a pool for a disk, whatever is promised.
fn short(pool: &PoolView<'_>, needed: u64) -> u64 {
    let disk = match pool.is_overcommitted() {
        true => 0,
        false => needed.saturating_sub(pool.available_mib),
    };
    disk.max((pool.kept_mib() + 1).saturating_sub(pool.available_mib))
}

/// Of processors that are over-committed as their host's load allows: how much.
fn by_load(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| {
        format!(", over-committed {ratio} times as its load allows")
    })
}

impl Lack<'_> {
    /// Whether moves of VMs can change it: what is free. That a VM is on a host already is no lack of the host either.
    pub(super) fn is_room(&self) -> bool {
        match self {
            Self::SameHost
            | Self::CpuFree { .. }
            | Self::Memory { .. }
            | Self::Storage { .. }
            | Self::VmCount { .. }
            | Self::NodeVcpus { .. }
            | Self::NodeMemory { .. }
            | Self::HugePages { .. }
            | Self::Nodes { all: true, .. }
            | Self::Bandwidth { .. } => true,
            // What a host has none of, no move brings there.
            Self::Devices { needed, all, .. } => needed <= all,
            _ => false,
        }
    }

    /// Whether processors, nodes or huge pages of the VM's own are lacking.
    pub(super) fn is_fitting(&self) -> bool {
        matches!(
            self,
            Self::NodeVcpus { .. } | Self::NodeMemory { .. } | Self::HugePages { .. } | Self::Nodes { .. }
        )
    }

    /// Whether only processors or memory are lacking, which VMs that leave give back.
    pub(super) fn is_size(&self) -> bool {
        matches!(self, Self::CpuFree { .. } | Self::Memory { .. })
    }

    /// Which test it is.
    pub(super) fn constraint(&self) -> Constraint {
        match self {
            Self::RequestedHost { .. } => Constraint::RequestedHost,
            Self::SameHost => Constraint::SameHost,
            Self::State { .. } => Constraint::State,
            Self::Cordon { .. } => Constraint::Cordon,
            Self::Pressure => Constraint::Pressure,
            Self::Selector { .. } => Constraint::Selector,
            Self::CpuCount { .. } | Self::CpuFree { .. } => Constraint::Cpu,
            Self::Memory { .. } => Constraint::Memory,
            Self::PoolMissing { .. } | Self::PoolBroken { .. } => Constraint::Pool,
            Self::Storage { .. } => Constraint::Storage,
            Self::Bridge { .. } => Constraint::Bridge,
            Self::Accelerator { .. } => Constraint::Accelerator,
            Self::Feature { .. } => Constraint::Feature,
            Self::Volume { .. } => Constraint::Volume,
            Self::Taint { .. } => Constraint::Taint,
            Self::GroupDomain { .. } | Self::GroupApart { .. } | Self::GroupTogether { .. } => {
                Constraint::Group
            }
            Self::VmCount { .. } => Constraint::VmCount,
            Self::NodeVcpus { dedicated: true, .. } => Constraint::Cpu,
            Self::NodeVcpus { .. } | Self::NodeMemory { .. } | Self::Nodes { .. } => Constraint::Numa,
            Self::HugePages { .. } => Constraint::HugePages,
            Self::Bandwidth { .. } => Constraint::Bandwidth,
            Self::Devices { .. } => Constraint::PciDevice,
            Self::Protection { .. } => Constraint::Protection,
        }
    }

    /// The same in words.
    pub(super) fn shortfall(&self) -> Shortfall {
        let (needed, available) = self.numbers();
        Shortfall {
            constraint: self.constraint(),
            message: self.message(),
            needed,
            available,
        }
    }

    fn numbers(&self) -> (u64, u64) {
        match *self {
            Self::CpuCount { needed, cpus } => (needed.into(), cpus.into()),
            Self::CpuFree { needed, free, .. } => (needed.into(), free.into()),
            Self::NodeVcpus { needed, free, .. } => (needed.into(), free.into()),
            Self::Nodes { needed, found, .. } => (needed.into(), found.into()),
            Self::Devices { needed, free, .. } => (needed.into(), free.into()),
            Self::VmCount { vms, most } => (u64::from(vms) + 1, most.into()),
            Self::Memory { needed, free, .. }
            | Self::Storage { needed, free, .. }
            | Self::NodeMemory { needed, free, .. }
            | Self::HugePages { needed, free, .. }
            | Self::Bandwidth { needed, free, .. } => (needed, free),
            Self::Protection { lacking, .. } if lacking.memory_mib > 0 => (lacking.memory_mib, 0),
            Self::Protection { lacking, .. } => (lacking.vcpus.into(), 0),
            _ => (0, 0),
        }
    }

    fn message(&self) -> String {
        match *self {
            Self::RequestedHost { wanted } => format!("only host {wanted} was asked for"),
            Self::SameHost => "the VM is on this host already".to_owned(),
            Self::State { state: "" } => "not ready".to_owned(),
            Self::State { state } => format!("not ready: {state}"),
            Self::Cordon { reason: "" } => "cordoned".to_owned(),
            Self::Cordon { reason } => format!("cordoned: {reason}"),
            Self::Pressure => "closed by its load: its VMs are short of processors, memory or I/O".to_owned(),
            Self::Selector {
                key,
                value,
                found: None,
            } => format!("needs label {key}={value}, has no label {key}"),
            Self::Selector {
                key,
                value,
                found: Some(found),
            } => {
                format!("needs label {key}={value}, has {key}={found}")
            }
            Self::CpuCount { needed, cpus } => {
                format!("needs {needed} vCPUs in one VM, has {cpus} logical processors")
            }
            Self::CpuFree {
                needed,
                free,
                capacity,
                adapted,
                ..
            } => format!("needs {needed} vCPUs, has {free} free of {capacity}") + &by_load(adapted),
            Self::Memory {
                needed,
                guest,
                free,
                capacity,
                ..
            } => {
                let overhead = needed - guest;
                format!(
                    "needs {needed} MiB ({guest} for the guest, {overhead} for QEMU), has {free} MiB free of {capacity} MiB"
                )
            }
            Self::PoolMissing { pool } => format!("has no pool {pool}"),
            Self::PoolBroken { pool, error } => format!("its pool {pool} cannot be used: {error}"),
            Self::Storage {
                pool,
                needed,
                full: Some(percent),
                ..
            } => {
                format!("needs {needed} MiB in pool {pool}, which is {percent} % full and takes no new disks")
            }
            Self::Storage {
                pool,
                needed,
                free,
                capacity,
                ..
            } => {
                format!("needs {needed} MiB in pool {pool}, has {free} MiB free of {capacity} MiB")
            }
            Self::Bridge { bridge } => format!("has no bridge {bridge}"),
            Self::Accelerator { needed, found } => {
                format!("runs guests with {found}, the VM runs with {needed}")
            }
            Self::Feature { feature } => {
                format!("does not offer {}: {}", feature.as_str(), feature.remedy())
            }
            Self::Volume { volume, host } => format!("does not have volume {volume}, which is on {host}"),
            Self::Taint { key, value } => {
                format!("has the taint {key}={value}, which the VM does not tolerate")
            }
            Self::GroupDomain { group, key } => format!("has no label {key}, by which group {group} goes"),
            Self::GroupApart {
                group,
                vm,
                key: Some(key),
                domain,
            } => format!("VM {vm} of group {group} is on {key} {domain}"),
            Self::GroupApart { group, vm, .. } => format!("VM {vm} of group {group} is on this host"),
            Self::GroupTogether {
                group,
                vm,
                key,
                domain: Some(domain),
            } => format!(
                "VM {vm} of group {group} is on {} {domain}, and they stay together",
                key.unwrap_or("host")
            ),
            Self::GroupTogether { group, vm, .. } => {
                format!("VM {vm} of group {group}, with which it stays together, is moving")
            }
            Self::Protection { domain, lacking } => format!(
                "were {domain} to fail then, {} vCPUs and {} MiB of its VMs would find no room elsewhere",
                lacking.vcpus, lacking.memory_mib
            ),
            _ => self.message_of_few(),
        }
    }

    /// Of what few requests ask for.
    fn message_of_few(&self) -> String {
        let on = |nodes: u32| match nodes {
            1 => "one NUMA node".to_owned(),
            nodes => format!("{nodes} NUMA nodes in equal parts"),
        };
        match *self {
            Self::VmCount { vms, most } => format!("has {vms} VMs, takes at most {most}"),
            Self::NodeVcpus {
                dedicated: true,
                nodes,
                needed,
                free,
            } => format!(
                "needs {needed} processors of its own on {}, has {free} that can be dedicated there",
                on(nodes)
            ),
            Self::NodeVcpus {
                nodes, needed, free, ..
            } => format!("needs {needed} vCPUs on {}, has {free} free there", on(nodes)),
            Self::NodeMemory { nodes, needed, free } => {
                format!("needs {needed} MiB on {}, has {free} MiB free there", on(nodes))
            }
            Self::HugePages {
                pages,
                nodes,
                needed,
                free,
            } => format!(
                "needs {needed} MiB in huge pages of {} on {}, has {free} MiB of them free there",
                pages.as_str(),
                on(nodes)
            ),
            Self::Nodes {
                needed,
                found,
                all: false,
            } => format!("needs {needed} NUMA nodes, has {found}"),
            Self::Nodes { needed: 1, .. } => {
                "needs processors and memory on the same NUMA node, has none with room for both".to_owned()
            }
            Self::Nodes { needed, found, .. } => {
                format!(
                    "needs {needed} NUMA nodes with processors and memory for a part of it each, has {found}"
                )
            }
            Self::Bandwidth {
                bridge, carries: 0, ..
            } => format!("nothing can be reserved on bridge {bridge}: it has no uplink whose speed is known"),
            Self::Bandwidth {
                bridge,
                needed,
                free,
                carries,
            } => format!(
                "needs {needed} Mbit/s on the uplink of bridge {bridge}, has {free} free of {carries}"
            ),
            Self::Devices {
                class,
                needed,
                free,
                all,
                unfit,
            } => {
                let unfit = match unfit {
                    0 => String::new(),
                    unfit => format!(" ({unfit} more cannot be given, see `dalgu host show`)"),
                };
                format!("needs {needed} PCI devices of class {class}, has {free} free of {all}{unfit}")
            }
            // `message` has words for the rest.
            _ => String::new(),
        }
    }
}
