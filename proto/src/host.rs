//! What a host is made of and how it is used: the domain form of `dalgu.v1.HostInventory`, `HostUsage`, `VmUsage`.
//!
//! Made by the agent's samplers, kept in the controller's store, read by placement. An agent is trusted for the
//! form of what it sends, so the conversions are total: a missing part becomes its default, and a number that is
//! negative or not finite becomes 0 (JSON, and with it the store, has no such numbers). Fields may be added with a
//! serde default but never change their meaning; units and meaning are those of `telemetry.proto`.

mod wire;

use std::{net::IpAddr, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};

use crate::vm::PciAddress;

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NumaNode {
    /// Number the kernel gives it.
    pub id: u32,
    /// Logical processors on it, ascending.
    pub cpus: Vec<u32>,
    /// Memory on it.
    pub memory_bytes: u64,
    /// Distance to each node in the order of their numbers; 10 is itself.
    pub distances: Vec<u32>,
    /// Huge pages on it by size; none where that is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub huge_pages: Vec<HugePages>,
    /// The physical core of each of `cpus`, by the lowest of its threads; none where that is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cores: Vec<u32>,
}

/// Huge pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HugePages {
    /// Size of a page.
    pub page_size_bytes: u64,
    /// Pages set aside.
    pub total: u64,
    /// Pages not in use.
    pub free: u64,
}

/// A place where disks of VMs are kept.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pool {
    /// Name, the same on each host that has it.
    pub name: String,
    /// Directory on the host.
    pub path: String,
    /// Whether every host of the site sees the same files there.
    #[serde(default)]
    pub shared: bool,
    /// Size of its file system.
    pub capacity_bytes: u64,
    /// Free for the agent's user.
    pub available_bytes: u64,
    /// In use; 0 where that is not known. With what is free it may be less than the size.
    #[serde(default)]
    pub used_bytes: u64,
    /// Why it cannot be used now, where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a VM may need of its host's agent and hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestFeature {
    /// The volume of a first boot.
    FirstBoot,
    /// UEFI.
    Uefi,
    /// UEFI with secure boot.
    UefiSecureBoot,
    /// A TPM in software.
    Tpm,
    /// Interfaces in networks of the site.
    Network,
    /// Overlays.
    Overlay,
    /// VLANs.
    Vlan,
    /// Changes while a VM runs.
    HotChange,
    /// Volumes of the site.
    Volume,
    /// Limits of disks, and disks that move to another pool.
    DiskChange,
    /// Snapshots.
    Snapshot,
    /// Backups, and VMs made from them.
    Backup,
    /// Security groups with rules about types of ICMP.
    IcmpType,
    /// Volumes of the site that move to another pool.
    VolumeMove,
    /// Snapshots of VMs that have volumes of the site.
    VolumeSnapshot,
    /// Dedicated processors, huge pages and NUMA policies.
    Numa,
    /// PCI devices of the host.
    PciDevice,
}

/// The features of a list that are known: a later version may have stored others.
fn known<'de, D: Deserializer<'de>>(list: D) -> Result<Vec<GuestFeature>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stored {
        Known(GuestFeature),
        Later(IgnoredAny),
    }
    let stored = Vec::deserialize(list)?;
    let known = stored.into_iter().filter_map(|stored| match stored {
        Stored::Known(feature) => Some(feature),
        Stored::Later(IgnoredAny) => None,
    });
    Ok(known.collect())
}

impl GuestFeature {
    /// What it is, for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FirstBoot => "first-boot data",
            Self::Uefi => "UEFI firmware",
            Self::UefiSecureBoot => "UEFI firmware with secure boot",
            Self::Tpm => "a TPM for guests",
            Self::Network => "networks of the site",
            Self::Overlay => "overlay networks",
            Self::Vlan => "VLANs",
            Self::HotChange => "changes of running VMs",
            Self::Volume => "volumes",
            Self::DiskChange => "limits of disks, and their moves to other pools",
            Self::Snapshot => "snapshots",
            Self::Backup => "backups",
            Self::IcmpType => "rules about types of ICMP",
            Self::VolumeMove => "moves of volumes to other pools",
            Self::VolumeSnapshot => "snapshots of VMs with volumes",
            Self::Numa => "dedicated processors, huge pages and NUMA nodes",
            Self::PciDevice => "PCI devices for VMs",
        }
    }

    /// How a host comes to have it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::FirstBoot
            | Self::HotChange
            | Self::Volume
            | Self::DiskChange
            | Self::Snapshot
            | Self::Backup
            | Self::IcmpType
            | Self::VolumeMove
            | Self::VolumeSnapshot
            | Self::Numa
            | Self::PciDevice => "update its agent",
            Self::Uefi | Self::UefiSecureBoot => "install the package ovmf",
            Self::Tpm => "install the packages swtpm and swtpm-tools",
            Self::Network => {
                "install the packages nftables and dnsmasq-base, and load the module br_netfilter"
            }
            Self::Overlay => "load the kernel's module vxlan",
            Self::Vlan => "load the kernel's module 8021q",
        }
    }
}

/// By what a bridge leads out of its host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Uplink {
    /// The bridge.
    pub bridge: String,
    /// What it carries in each direction.
    pub mbit_per_second: u64,
}

/// A PCI device that is named for VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDevice {
    /// The class that it is named with.
    pub class: String,
    /// Where it is.
    pub address: PciAddress,
    /// Its vendor and device; empty where it is not there.
    #[serde(default)]
    pub model: String,
    /// NUMA node that it is on, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Its IOMMU group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<u32>,
    /// Why it cannot be given to a VM, where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What a host is made of; changes seldom.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Inventory {
    /// Processor model as the kernel names it.
    pub cpu_model: String,
    /// Logical processors that are online.
    pub cpus: u32,
    /// Physical cores.
    pub cores: u32,
    /// Processor packages.
    pub sockets: u32,
    /// Memory (MemTotal of /proc/meminfo).
    pub memory_bytes: u64,
    /// NUMA nodes; the agent reports at least one.
    pub numa_nodes: Vec<NumaNode>,
    /// Huge pages by size.
    #[serde(default)]
    pub huge_pages: Vec<HugePages>,
    /// Storage pools.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// Linux bridges a VM can plug into.
    #[serde(default)]
    pub bridges: Vec<String>,
    /// Kernel release.
    pub kernel: String,
    /// Hypervisor and its version.
    pub hypervisor: String,
    /// How guests run here: "kvm" or "tcg".
    pub accelerator: String,
    /// Why that accelerator was chosen.
    pub accelerator_reason: String,
    /// Processor architecture.
    pub architecture: String,
    /// What guests can have here, ascending.
    #[serde(default, deserialize_with = "known", skip_serializing_if = "Vec::is_empty")]
    pub guest_features: Vec<GuestFeature>,
    /// Where other hosts' overlays reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_address: Option<IpAddr>,
    /// Uplinks of bridges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uplinks: Vec<Uplink>,
    /// PCI devices that are named for VMs, in the order of their addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pci_devices: Vec<PciDevice>,
}

impl Inventory {
    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }

    /// Memory that is not set aside for huge pages.
    pub fn ordinary_memory_bytes(&self) -> u64 {
        let huge = self.huge_pages.iter();
        let huge = huge.map(|pages| pages.total.saturating_mul(pages.page_size_bytes));
        self.memory_bytes
            .saturating_sub(huge.fold(0, u64::saturating_add))
    }

    /// Whether both say the same, but for what changes all the time: the room in pools and the free huge pages.
    /// The agent sends its inventory again when they do not.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let lasting = |inventory: &Self| {
            let mut inventory = inventory.clone();
            inventory
                .pools
                .iter_mut()
                .for_each(|pool| pool.available_bytes = 0);
            let nodes = inventory
                .numa_nodes
                .iter_mut()
                .flat_map(|node| &mut node.huge_pages);
            nodes
                .chain(&mut inventory.huge_pages)
                .for_each(|pages| pages.free = 0);
            inventory
        };
        lasting(self) == lasting(other)
    }
}

/// Time the processors spent, in seconds since the host's start, summed over all of them.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct CpuTimes {
    /// In user space; contains `guest`.
    pub user: f64,
    /// In user space at low priority.
    pub nice: f64,
    /// In the kernel.
    pub system: f64,
    /// Idle.
    pub idle: f64,
    /// Idle with I/O outstanding.
    pub iowait: f64,
    /// Serving interrupts.
    pub irq: f64,
    /// Serving soft interrupts.
    pub softirq: f64,
    /// Taken by a hypervisor under this host.
    pub steal: f64,
    /// Running guests.
    pub guest: f64,
}

impl CpuTimes {
    /// Seconds in which processors were not available for more work: all but idle and iowait. (Guest time is in
    /// user time; stolen time counts, as nobody here can have it.)
    pub fn busy(&self) -> f64 {
        self.user + self.nice + self.system + self.irq + self.softirq + self.steal
    }
}

/// Stall of one kind (PSI).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Stall {
    /// Percent over the last 10 s, 0 to 100.
    pub avg10_percent: f64,
    /// Percent over the last 60 s.
    pub avg60_percent: f64,
    /// Percent over the last 300 s.
    pub avg300_percent: f64,
    /// Stalled time in seconds since the host's start.
    pub stalled_seconds_total: f64,
}

/// Pressure on the host; `None` where the kernel does not offer it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Pressure {
    /// Some task waited for a processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_some: Option<Stall>,
    /// Some task waited for memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_some: Option<Stall>,
    /// All tasks waited for memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_full: Option<Stall>,
    /// Some task waited for I/O.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_some: Option<Stall>,
    /// All tasks waited for I/O.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_full: Option<Stall>,
}

/// Memory of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Memory {
    /// All of it.
    pub total_bytes: u64,
    /// Not used for anything.
    pub free_bytes: u64,
    /// What a new process could get without swapping.
    pub available_bytes: u64,
    /// File cache.
    pub cached_bytes: u64,
    /// Buffers.
    pub buffers_bytes: u64,
    /// Swap space.
    pub swap_total_bytes: u64,
    /// Swap space not used.
    pub swap_free_bytes: u64,
    /// Huge pages by size.
    #[serde(default)]
    pub huge_pages: Vec<HugePages>,
}

/// What kind of device a network interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicKind {
    /// With hardware under it.
    Physical,
    /// Linux bridge.
    Bridge,
    /// 802.1Q VLAN on another interface.
    Vlan,
    /// Several as one.
    Bond,
    /// A VM's end on the host.
    Tap,
    /// Any other.
    #[default]
    Virtual,
}

impl NicKind {
    /// The name on the wire and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Physical => "physical",
            Self::Bridge => "bridge",
            Self::Vlan => "vlan",
            Self::Bond => "bond",
            Self::Tap => "tap",
            Self::Virtual => "virtual",
        }
    }
}

/// A network interface of the host.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Nic {
    /// Name, for example "eno1".
    pub name: String,
    /// What it is.
    pub kind: NicKind,
    /// MAC address; empty where it has none.
    pub mac: String,
    /// Whether the link is up.
    pub up: bool,
    /// Link speed; 0 where the device does not say.
    pub speed_bits_per_second: u64,
    /// What it received.
    pub receive: NicCounters,
    /// What it sent.
    pub transmit: NicCounters,
    /// Bytes received per second since the last sample.
    pub receive_bytes_per_second: f64,
    /// Bytes sent per second since the last sample.
    pub transmit_bytes_per_second: f64,
    /// Whether the two rates are known.
    pub rates_valid: bool,
}

/// Counters of one direction of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NicCounters {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Errors.
    pub errors: u64,
    /// Packets dropped.
    pub drops: u64,
}

/// A mounted file system that holds data of the agent or of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileSystem {
    /// Where it is mounted.
    pub mount_point: String,
    /// Type, for example "ext4".
    pub kind: String,
    /// Size.
    pub size_bytes: u64,
    /// Free for ordinary users.
    pub available_bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// How a host is used; one sample.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// When it was taken, by the host's clock.
    pub sample_time: Timestamp,
    /// Time between this sample and the one before; `None` for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// Time per state.
    pub cpu: CpuTimes,
    /// Processors busy since the last sample, 0 to the number of processors.
    pub cpus_busy: f64,
    /// Whether `cpus_busy` is known.
    pub rates_valid: bool,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Pressure stall information.
    #[serde(default)]
    pub pressure: Pressure,
    /// Memory.
    pub memory: Memory,
    /// Network interfaces in the order of their names, without loopback.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// File systems.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// Storage pools with their present room.
    #[serde(default)]
    pub pools: Vec<Pool>,
    /// Seconds since the host's start.
    pub uptime_seconds: f64,
}

/// One block device of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmBlock {
    /// Name of the disk in the VM's specification.
    pub name: String,
    /// Bytes read.
    pub read_bytes_total: u64,
    /// Bytes written.
    pub write_bytes_total: u64,
    /// Read requests.
    pub read_requests_total: u64,
    /// Write requests.
    pub write_requests_total: u64,
    /// Space taken on the host.
    pub allocation_bytes: u64,
    /// Capacity.
    pub capacity_bytes: u64,
}

/// One network interface of a VM, as the guest sees the directions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmNic {
    /// Name of the interface in the VM's specification.
    pub name: String,
    /// Bytes received by the guest.
    pub receive_bytes_total: u64,
    /// Bytes sent by the guest.
    pub transmit_bytes_total: u64,
    /// Packets received by the guest.
    pub receive_packets_total: u64,
    /// Packets sent by the guest.
    pub transmit_packets_total: u64,
    /// Errors in both directions.
    pub errors_total: u64,
    /// Drops in both directions.
    pub drops_total: u64,
}

/// How a running VM uses its host; one sample. Counters start with the QEMU process.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct VmUsage {
    /// When it was taken, by the host's clock.
    pub sample_time: Timestamp,
    /// Processor time of the whole QEMU process.
    pub cpu_seconds_total: f64,
    /// Time the VM's processors were ready but waited for a host processor.
    pub cpu_wait_seconds_total: f64,
    /// Processors used since the last sample.
    pub cpus_busy: f64,
    /// Whether `cpus_busy` is known.
    pub rates_valid: bool,
    /// Resident memory of the QEMU process.
    pub memory_resident_bytes: u64,
    /// Memory the balloon leaves to the guest.
    pub memory_balloon_bytes: u64,
    /// Memory the guest says it does not use; 0 where its driver does not say.
    pub memory_unused_bytes: u64,
    /// Block devices in the order of the specification.
    #[serde(default)]
    pub blocks: Vec<VmBlock>,
    /// Network interfaces in the order of the specification.
    #[serde(default)]
    pub nics: Vec<VmNic>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inventory_is_the_same_while_only_room_changes() {
        let pool = Pool {
            name: "local".into(),
            capacity_bytes: 9,
            available_bytes: 5,
            ..Default::default()
        };
        let before = Inventory {
            pools: vec![pool],
            ..Default::default()
        };
        let mut after = before.clone();
        after.pools[0].available_bytes = 1;
        assert!(before.is_same_as(&after));
        after.pools[0].error = Some("gone".into());
        assert!(!before.is_same_as(&after));
    }

    #[test]
    fn features_that_a_later_version_stored_are_passed_over() {
        let mut inventory = Inventory {
            guest_features: vec![GuestFeature::Uefi, GuestFeature::Snapshot],
            ..Inventory::default()
        };
        let mut stored = serde_json::to_value(&inventory).unwrap();
        stored["guest_features"][0] = "teleport".into();
        inventory.guest_features.remove(0);
        let read: Inventory = serde_json::from_value(stored).unwrap();
        assert_eq!(read, inventory);
    }
}
