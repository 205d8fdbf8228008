//! What makes up for one lack: a change to the host, or one to the request. Called by the search in `hint`.

use dalgu_proto::vm::{MEMORY_MIB, RestartPolicy, Spec};

use super::{
    filter::Lack,
    remedy::{Change, asked},
    view::{HostView, Request},
};

/// What would have to change on the host to make up for a lack; `None` where nothing there can.
pub(super) fn on_host(lack: &Lack<'_>, host: &HostView, request: &Request) -> Option<Change> {
    let name = || host.name.clone();
    Some(match *lack {
        Lack::RequestedHost { .. }
        | Lack::SameHost
        | Lack::CpuCount { .. }
        | Lack::Accelerator { .. }
        | Lack::Volume { .. }
        | Lack::GroupDomain { .. }
        | Lack::GroupApart { .. }
        | Lack::GroupTogether { .. }
        | Lack::Protection { .. }
        | Lack::NodeVcpus { .. }
        | Lack::NodeMemory { .. }
        | Lack::Nodes { .. } => return None,
        Lack::VmCount { .. } | Lack::HugePages { .. } | Lack::Bandwidth { .. } | Lack::Devices { .. } => {
            return on_host_of_few(lack, host);
        }
        Lack::State { state } => Change::MakeReady {
            host: name(),
            state: state.to_owned(),
        },
        Lack::Cordon { .. } => Change::Uncordon { host: name() },
        Lack::Pressure => Change::Relieve { host: name() },
        Lack::Selector { key, value, .. } => Change::SetLabel {
            host: name(),
            key: key.to_owned(),
            value: value.to_owned(),
        },
        // Only what VMs of Dalgu's have reserved can be freed.
        Lack::CpuFree {
            needed,
            capacity,
            reserved,
            ..
        } if needed <= capacity => Change::FreeVcpus {
            host: name(),
            vcpus: reserved - (capacity - needed),
        },
        Lack::Memory {
            needed,
            capacity,
            reserved,
            ..
        } if needed <= capacity => Change::FreeMemory {
            host: name(),
            mib: reserved - (capacity - needed),
        },
        Lack::Storage {
            pool,
            needed,
            capacity,
            reserved,
            short,
            ..
        } if needed <= capacity => {
            let promised = reserved.saturating_sub(capacity - needed);
            Change::FreeStorage {
                host: name(),
                pool: pool.to_owned(),
                mib: promised.max(short),
            }
        }
        Lack::CpuFree { .. } | Lack::Memory { .. } | Lack::Storage { .. } => return None,
        Lack::PoolMissing { pool } => Change::AddPool {
            host: name(),
            pool: pool.to_owned(),
            mib: asked(request, pool),
        },
        Lack::PoolBroken { pool, .. } => Change::RepairPool {
            host: name(),
            pool: pool.to_owned(),
        },
        Lack::Bridge { bridge } => Change::AddBridge {
            host: name(),
            bridge: bridge.to_owned(),
        },
        Lack::Feature { feature } => Change::AddFeature {
            host: name(),
            feature,
        },
        Lack::Taint { key, .. } => Change::RemoveTaint {
            host: name(),
            key: key.to_owned(),
        },
    })
}

/// The same of what few requests or hosts have.
fn on_host_of_few(lack: &Lack<'_>, host: &HostView) -> Option<Change> {
    let name = || host.name.clone();
    Some(match *lack {
        Lack::VmCount { vms, most } => Change::FreeVms {
            host: name(),
            vms: vms - most + 1,
        },
        // The more there is on each node, the more there is on the best; what is lacking there is enough.
        Lack::HugePages {
            pages,
            nodes,
            needed,
            free,
        } => Change::AddHugePages {
            host: name(),
            pages,
            mib: (needed - free)
                .div_ceil(nodes.into())
                .next_multiple_of(pages.mib()),
        },
        Lack::Bandwidth {
            bridge,
            needed,
            free,
            carries,
        } => {
            let reserved = host.parts.taken.mbit(bridge);
            if needed > carries {
                return None;
            }
            Change::FreeBandwidth {
                host: name(),
                bridge: bridge.to_owned(),
                mbit: (reserved + needed - carries).max(needed - free),
            }
        }
        Lack::Devices {
            class,
            needed,
            free,
            all,
            ..
        } if needed <= all => Change::FreeDevices {
            host: name(),
            class: class.to_owned(),
            count: needed - free,
        },
        _ => return None,
    })
}

/// What would have to change in the request to make up for a lack; `None` where nothing there can. What a running VM
/// is made of cannot be changed by asking for its migration otherwise; its groups and tolerations can.
pub(super) fn in_request(lack: &Lack<'_>, request: &Request) -> Option<Change> {
    let change = match *lack {
        Lack::RequestedHost { .. } => return Some(Change::AnyHost),
        Lack::Taint { key, value } => {
            return Some(Change::Tolerate {
                key: key.to_owned(),
                value: value.to_owned(),
            });
        }
        Lack::GroupDomain { group, .. }
        | Lack::GroupApart { group, .. }
        | Lack::GroupTogether { group, .. } => {
            return Some(Change::LeaveGroup {
                group: group.to_owned(),
            });
        }
        Lack::Protection { .. } => return Some(Change::IgnoreProtection),
        Lack::Selector { key, .. } => Change::DropSelector { key: key.to_owned() },
        Lack::Volume { volume, host } => Change::LeaveVolume {
            volume: volume.to_owned(),
            host: host.to_owned(),
        },
        Lack::CpuCount { cpus: at_most, .. } | Lack::CpuFree { free: at_most, .. } if at_most > 0 => {
            Change::AskVcpus { at_most }
        }
        Lack::NodeVcpus {
            nodes: 1,
            free: at_most,
            ..
        } if at_most > 0 => Change::AskVcpus { at_most },
        Lack::HugePages { nodes: 1, free, .. } if free >= *MEMORY_MIB.start() => {
            Change::AskMemory { at_most_mib: free }
        }
        Lack::NodeMemory { nodes: 1, free, .. } => Change::AskMemory {
            at_most_mib: most_memory(free, request.spec.vcpus)?,
        },
        Lack::NodeVcpus { .. } | Lack::HugePages { .. } | Lack::NodeMemory { .. } | Lack::Nodes { .. } => {
            Change::AskNoNode
        }
        Lack::Devices { class, free, .. } => Change::AskDevices {
            class: class.to_owned(),
            at_most: free,
        },
        Lack::Bandwidth { bridge, free, .. } => Change::AskBandwidth {
            bridge: bridge.to_owned(),
            at_most_mbit: free,
        },
        // With huge pages it is QEMU's own that is lacking.
        Lack::Memory { .. } if request.spec.fitting.pages.is_some() => return None,
        Lack::Memory { free, .. } => Change::AskMemory {
            at_most_mib: most_memory(free, request.spec.vcpus)?,
        },
        Lack::Storage { pool, free, .. } if free >= disks_in(request, pool) => Change::AskStorage {
            pool: pool.to_owned(),
            at_most_mib: free,
        },
        _ => return None,
    };
    (!request.is_migration()).then_some(change)
}

fn disks_in(request: &Request, pool: &str) -> u64 {
    request
        .spec
        .volumes()
        .filter(|disk| disk.pool == pool)
        .map(|_| 1)
        .sum()
}

/// The most memory a guest can have where `free` MiB are left for it and QEMU's overhead.
fn most_memory(free: u64, vcpus: u32) -> Option<u64> {
    let mut spec = Spec {
        vcpus,
        ..empty_spec()
    };
    let mut reserve = |memory_mib| {
        spec.memory_mib = memory_mib;
        spec.reserved_memory_mib()
    };
    let least = *MEMORY_MIB.start();
    if least > free || reserve(least) > free {
        return None;
    }
    // The overhead rises with the memory too: what is left beside that of a guest of `free` fits, and what is left beside the overhead of
    // such a guest bounds it.
    let mut beside = |memory_mib| free.saturating_sub(reserve(memory_mib).saturating_sub(memory_mib));
    let mut low = beside(free).max(least);
    let mut high = beside(low);
    // The reserve rises with the memory: `low` always fits, what lies above `high` never does.
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if reserve(middle) <= free {
            low = middle
        } else {
            high = middle - 1
        }
    }
    Some(low)
}

fn empty_spec() -> Spec {
    Spec {
        vcpus: 1,
        memory_mib: 0,
        disks: Vec::new(),
        nics: Vec::new(),
        kernel_boot: None,
        restart_policy: RestartPolicy::default(),
        host_selector: std::collections::BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    }
}
