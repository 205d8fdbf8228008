//! What a made-up host says of itself: as much as a server with two sockets and six network interfaces says, so that
//! reports have a real one's size.

use std::sync::Arc;
use std::time::Duration;

use dalgu_agent::metrics::Snapshot;
use dalgu_proto::host::{
    CpuTimes, FileSystem, Inventory, Memory, Nic, NicKind, NumaNode, Pool, Pressure, Stall, Usage,
};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// The sample of one host.
#[must_use]
pub fn host(number: u16) -> Snapshot {
    Snapshot {
        inventory: Arc::new(inventory()),
        usage: Some((Duration::from_secs(1), Arc::new(usage(number)))),
        vms_at: None,
        vms: Vec::new(),
    }
}

fn pools() -> Vec<Pool> {
    let pool = |name: &str, shared| Pool {
        name: name.to_owned(),
        path: format!("/var/lib/dalgu/{name}"),
        shared,
        capacity_bytes: 1024 * TIB,
        available_bytes: 1000 * TIB,
        used_bytes: 0,
        error: None,
    };
    vec![pool("local", false), pool("shared", true)]
}

fn inventory() -> Inventory {
    let node = |id: u32| NumaNode {
        id,
        cpus: (id * 32..id * 32 + 32).collect(),
        memory_bytes: 256 * GIB,
        distances: vec![10, 21],
        huge_pages: Vec::new(),
        // The threads of a core are half a node apart.
        cores: (id * 32..id * 32 + 32).map(|cpu| id * 32 + cpu % 16).collect(),
    };
    Inventory {
        cpu_model: "Simulated Processor with 32 threads @ 2.40GHz".to_owned(),
        cpus: 64,
        cores: 32,
        sockets: 2,
        memory_bytes: 512 * GIB,
        numa_nodes: vec![node(0), node(1)],
        huge_pages: Vec::new(),
        pools: pools(),
        bridges: vec!["br0".to_owned(), "br1".to_owned()],
        kernel: "6.12.0-scale".to_owned(),
        hypervisor: "simulated".to_owned(),
        accelerator: "sim".to_owned(),
        accelerator_reason: String::new(),
        architecture: "x86_64".to_owned(),
        guest_features: Vec::new(),
        overlay_address: None,
        uplinks: Vec::new(),
        pci_devices: Vec::new(),
    }
}

fn usage(number: u16) -> Usage {
    let stall = Some(Stall {
        avg10_percent: 0.1,
        avg60_percent: 0.2,
        avg300_percent: 0.2,
        stalled_seconds_total: 1234.5,
    });
    let nic = |index: u8, kind| Nic {
        name: format!("eth{index}"),
        kind,
        mac: format!("52:54:00:00:{:02x}:{index:02x}", number % 256),
        up: true,
        speed_bits_per_second: 10_000_000_000,
        rates_valid: true,
        ..Nic::default()
    };
    let file_system = |mount_point: &str| FileSystem {
        mount_point: mount_point.to_owned(),
        kind: "ext4".to_owned(),
        size_bytes: 10 * TIB,
        available_bytes: 9 * TIB,
        inodes: 1 << 28,
        inodes_free: 1 << 27,
    };
    Usage {
        interval: Some(Duration::from_secs(2)),
        cpu: CpuTimes {
            user: 1e5,
            system: 2e4,
            idle: 1e7,
            ..CpuTimes::default()
        },
        cpus_busy: 2.5,
        rates_valid: true,
        load: [2.0, 2.1, 2.2],
        pressure: Pressure {
            cpu_some: stall,
            memory_some: stall,
            memory_full: stall,
            io_some: stall,
            io_full: stall,
        },
        memory: Memory {
            total_bytes: 512 * GIB,
            free_bytes: 400 * GIB,
            available_bytes: 450 * GIB,
            ..Memory::default()
        },
        nics: (0..6)
            .map(|index| {
                nic(
                    index,
                    if index < 4 {
                        NicKind::Physical
                    } else {
                        NicKind::Bridge
                    },
                )
            })
            .collect(),
        file_systems: ["/", "/var", "/var/lib/dalgu"].map(file_system).to_vec(),
        pools: pools(),
        uptime_seconds: 1e6,
        ..Usage::default()
    }
}
