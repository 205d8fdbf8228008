//! Target `telemetry`: what the agent reads from /proc and /sys, given a kernel that writes whatever it likes.
//!
//! Promises: a file of another form is an error or left out, never a panic; what comes out are numbers that the
//! wire carries unchanged, none of them negative or endless.

use std::{
    sync::{LazyLock, Mutex, PoisonError},
    time::Duration,
};

use dalgu_agent::host::{Root, Sampler, inventory, process};
use dalgu_proto::{
    host::{Inventory, Usage},
    v1,
};
use jiff::Timestamp;

use crate::{input::Input, scratch::Scratch};

/// The files that are read, with what a healthy kernel says.
pub const FILES: [(&str, &str); 21] = [
    (
        "proc/stat",
        "cpu  1200 30 400 90000 200 0 10 5 7 0\ncpu0 600 15 200 45000 100 0 5 2 3 0\ncpu1 600 15 200 45000 100 0 5 3 4 0\nintr 1\nctxt 5\nbtime 1700000000\nprocesses 9\nprocs_running 1\nprocs_blocked 0\n",
    ),
    (
        "proc/meminfo",
        "MemTotal:       24684084 kB\nMemFree:        23321128 kB\nMemAvailable:   24302616 kB\nBuffers:            3916 kB\nCached:          1136808 kB\nSwapCached:            0 kB\nActive:           419500 kB\nInactive:         762308 kB\nSwapTotal:       1048576 kB\nSwapFree:         524288 kB\nDirty:                12 kB\nWriteback:             0 kB\nMapped:            41864 kB\nSlab:              66240 kB\nCommitted_AS:     105556 kB\nVmallocTotal:   34359738367 kB\nVmallocUsed:        8360 kB\nVmallocChunk:          0 kB\n",
    ),
    ("proc/loadavg", "0.12 0.34 0.56 1/234 5678\n"),
    (
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: Some CPU\n\nprocessor\t: 1\nmodel name\t: Some CPU\n",
    ),
    (
        "proc/pressure/cpu",
        "some avg10=0.20 avg60=1.34 avg300=1.08 total=16567558\n",
    ),
    (
        "proc/pressure/memory",
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    ),
    (
        "proc/pressure/io",
        "some avg10=1.00 avg60=2.00 avg300=3.00 total=4000\nfull avg10=0.50 avg60=0.25 avg300=0.12 total=2000\n",
    ),
    (
        "proc/net/dev",
        "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo:  100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  eth0: 5000      50    0    1    0     0          0         0     7000      70    0    2    0     0       0          0\n",
    ),
    (
        "proc/self/mountinfo",
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n36 22 98:0 /root /mnt/a\\040b rw - xfs /dev/sdb rw\n",
    ),
    ("proc/sys/kernel/osrelease", "6.12.0\n"),
    ("sys/devices/system/cpu/online", "0-1\n"),
    (
        "sys/devices/system/cpu/cpu0/topology/thread_siblings_list",
        "0-1\n",
    ),
    ("sys/devices/system/cpu/cpu0/topology/physical_package_id", "0\n"),
    (
        "sys/devices/system/node/node0/meminfo",
        "Node 0 MemTotal:        5597388 kB\n",
    ),
    ("sys/devices/system/node/node0/cpulist", "0-1\n"),
    ("sys/devices/system/node/node0/distance", "10 20\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "4\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "1\n"),
    ("sys/class/net/eth0/speed", "1000\n"),
    ("proc/77/statm", "1000 200 30 4 0 500 0\n"),
    ("proc/77/task/78/schedstat", "100 200 3\n"),
];

/// Files that stay as they are.
const FIXED: [(&str, &str); 6] = [
    ("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n"),
    (
        "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
        "0\n",
    ),
    ("sys/class/net/eth0/operstate", "up\n"),
    ("sys/class/net/eth0/address", "52:54:00:12:34:56\n"),
    ("sys/class/net/br0/bridge/bridge_id", "8000\n"),
    ("proc/77/task/78/comm", "CPU 0/KVM\n"),
];

static TREE: LazyLock<Mutex<Scratch>> = LazyLock::new(|| {
    let tree = Scratch::new();
    for (path, text) in FILES.iter().chain(&FIXED) {
        tree.write(path, text);
    }
    Mutex::new(tree)
});

/// Takes one input: two samples, before each of which some files are given other contents.
pub fn run(data: &[u8]) {
    let tree = TREE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut input = Input::new(data);
    let mut sampler = Sampler::with_root(Root::at(tree.path()), Vec::new(), Vec::new());
    let mut changed = Vec::new();
    for at in [Duration::from_secs(10), Duration::from_millis(12_500)] {
        for _ in 0..input.byte() % 4 {
            let (path, _) = input.pick(&FILES);
            tree.write(path, input.block());
            changed.push(path);
        }
        if let Ok(usage) = sampler.sample_at(at, Timestamp::UNIX_EPOCH) {
            check_usage(&usage);
        }
    }
    if let Ok(inventory) = inventory::read(&Root::at(tree.path())) {
        check_inventory(&inventory);
    }
    let _ = process::sample(&Root::at(tree.path()), 77);
    for (path, text) in FILES.iter().filter(|(path, _)| changed.contains(path)) {
        tree.write(path, text);
    }
}

fn check_usage(usage: &Usage) {
    assert_eq!(&Usage::from(v1::HostUsage::from(usage.clone())), usage);
    assert!(usage.cpus_busy >= 0.0 && usage.cpus_busy.is_finite());
    for nic in &usage.nics {
        assert!(nic.receive_bytes_per_second >= 0.0 && nic.transmit_bytes_per_second >= 0.0);
    }
}

fn check_inventory(inventory: &Inventory) {
    assert!(
        !inventory.numa_nodes.is_empty(),
        "the agent reports at least one node"
    );
    assert_eq!(
        &Inventory::from(v1::HostInventory::from(inventory.clone())),
        inventory
    );
}
