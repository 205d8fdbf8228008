//! Conversions between [`crate::host`] and the generated messages, both ways and total.

mod vm;

use super::*;
use crate::{time, v1};

/// What the store can hold: finite and not negative, else 0.
fn clean(value: f64) -> f64 {
    if value.is_finite() && value > 0.0 {
        value
    } else {
        0.0
    }
}

fn each<A, B: From<A>>(items: Vec<A>) -> Vec<B> {
    items.into_iter().map(B::from).collect()
}

fn sample_time(wire: Option<prost_types::Timestamp>) -> Timestamp {
    wire.as_ref().and_then(time::from_wire).unwrap_or_default()
}

impl From<v1::NumaNode> for NumaNode {
    fn from(wire: v1::NumaNode) -> Self {
        Self {
            id: wire.id,
            cpus: wire.cpus,
            memory_bytes: wire.memory_bytes,
            distances: wire.distances,
            huge_pages: each(wire.huge_pages),
            cores: wire.cores,
        }
    }
}

impl From<NumaNode> for v1::NumaNode {
    fn from(own: NumaNode) -> Self {
        Self {
            id: own.id,
            cpus: own.cpus,
            memory_bytes: own.memory_bytes,
            distances: own.distances,
            huge_pages: each(own.huge_pages),
            cores: own.cores,
        }
    }
}

impl From<v1::HugePages> for HugePages {
    fn from(wire: v1::HugePages) -> Self {
        Self {
            page_size_bytes: wire.page_size_bytes,
            total: wire.total,
            free: wire.free,
        }
    }
}

impl From<HugePages> for v1::HugePages {
    fn from(own: HugePages) -> Self {
        Self {
            page_size_bytes: own.page_size_bytes,
            total: own.total,
            free: own.free,
        }
    }
}

impl From<v1::StoragePool> for Pool {
    fn from(wire: v1::StoragePool) -> Self {
        Self {
            name: wire.name,
            path: wire.path,
            shared: wire.shared,
            capacity_bytes: wire.capacity_bytes,
            available_bytes: wire.available_bytes,
            used_bytes: wire.used_bytes,
            error: Some(wire.error).filter(|text| !text.is_empty()),
        }
    }
}

impl From<Pool> for v1::StoragePool {
    fn from(own: Pool) -> Self {
        Self {
            name: own.name,
            path: own.path,
            shared: own.shared,
            capacity_bytes: own.capacity_bytes,
            available_bytes: own.available_bytes,
            used_bytes: own.used_bytes,
            error: own.error.unwrap_or_default(),
        }
    }
}

impl From<v1::BridgeUplink> for Uplink {
    fn from(wire: v1::BridgeUplink) -> Self {
        Self {
            bridge: wire.bridge,
            mbit_per_second: wire.mbit_per_second,
        }
    }
}

impl From<Uplink> for v1::BridgeUplink {
    fn from(own: Uplink) -> Self {
        Self {
            bridge: own.bridge,
            mbit_per_second: own.mbit_per_second,
        }
    }
}

/// A device; `None` without an address that could be one.
fn pci_device(wire: v1::PciDevice) -> Option<PciDevice> {
    Some(PciDevice {
        class: wire.class,
        address: wire.address.parse().ok()?,
        model: wire.model,
        numa_node: wire.numa_node,
        iommu_group: wire.iommu_group,
        problem: Some(wire.problem).filter(|problem| !problem.is_empty()),
    })
}

impl From<PciDevice> for v1::PciDevice {
    fn from(own: PciDevice) -> Self {
        Self {
            class: own.class,
            address: own.address.to_string(),
            model: own.model,
            numa_node: own.numa_node,
            iommu_group: own.iommu_group,
            problem: own.problem.unwrap_or_default(),
        }
    }
}

impl From<v1::HostInventory> for Inventory {
    fn from(wire: v1::HostInventory) -> Self {
        Self {
            cpu_model: wire.cpu_model,
            cpus: wire.cpus,
            cores: wire.cores,
            sockets: wire.sockets,
            memory_bytes: wire.memory_bytes,
            numa_nodes: each(wire.numa_nodes),
            huge_pages: each(wire.huge_pages),
            pools: each(wire.pools),
            bridges: wire.bridges,
            kernel: wire.kernel,
            hypervisor: wire.hypervisor,
            accelerator: wire.accelerator,
            accelerator_reason: wire.accelerator_reason,
            architecture: wire.architecture,
            guest_features: wire.guest_features.into_iter().filter_map(feature).collect(),
            overlay_address: wire.overlay_address.parse().ok(),
            uplinks: each(wire.uplinks),
            pci_devices: wire.pci_devices.into_iter().filter_map(pci_device).collect(),
        }
    }
}

impl From<Inventory> for v1::HostInventory {
    fn from(own: Inventory) -> Self {
        Self {
            cpu_model: own.cpu_model,
            cpus: own.cpus,
            cores: own.cores,
            sockets: own.sockets,
            memory_bytes: own.memory_bytes,
            numa_nodes: each(own.numa_nodes),
            huge_pages: each(own.huge_pages),
            pools: each(own.pools),
            bridges: own.bridges,
            kernel: own.kernel,
            hypervisor: own.hypervisor,
            accelerator: own.accelerator,
            accelerator_reason: own.accelerator_reason,
            architecture: own.architecture,
            guest_features: own
                .guest_features
                .into_iter()
                .map(|feature| v1::GuestFeature::from(feature).into())
                .collect(),
            overlay_address: own
                .overlay_address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            uplinks: each(own.uplinks),
            pci_devices: each(own.pci_devices),
        }
    }
}

/// A feature; `None` for one that only a newer agent knows.
fn feature(wire: i32) -> Option<GuestFeature> {
    Some(match v1::GuestFeature::try_from(wire).ok()? {
        v1::GuestFeature::Unspecified => return None,
        v1::GuestFeature::FirstBoot => GuestFeature::FirstBoot,
        v1::GuestFeature::Uefi => GuestFeature::Uefi,
        v1::GuestFeature::UefiSecureBoot => GuestFeature::UefiSecureBoot,
        v1::GuestFeature::Tpm => GuestFeature::Tpm,
        v1::GuestFeature::Network => GuestFeature::Network,
        v1::GuestFeature::Overlay => GuestFeature::Overlay,
        v1::GuestFeature::Vlan => GuestFeature::Vlan,
        v1::GuestFeature::HotChange => GuestFeature::HotChange,
        v1::GuestFeature::Volume => GuestFeature::Volume,
        v1::GuestFeature::DiskChange => GuestFeature::DiskChange,
        v1::GuestFeature::Snapshot => GuestFeature::Snapshot,
        v1::GuestFeature::Backup => GuestFeature::Backup,
        v1::GuestFeature::IcmpType => GuestFeature::IcmpType,
        v1::GuestFeature::VolumeMove => GuestFeature::VolumeMove,
        v1::GuestFeature::VolumeSnapshot => GuestFeature::VolumeSnapshot,
        v1::GuestFeature::Numa => GuestFeature::Numa,
        v1::GuestFeature::PciDevice => GuestFeature::PciDevice,
    })
}

impl From<GuestFeature> for v1::GuestFeature {
    fn from(own: GuestFeature) -> Self {
        match own {
            GuestFeature::FirstBoot => Self::FirstBoot,
            GuestFeature::Uefi => Self::Uefi,
            GuestFeature::UefiSecureBoot => Self::UefiSecureBoot,
            GuestFeature::Tpm => Self::Tpm,
            GuestFeature::Network => Self::Network,
            GuestFeature::Overlay => Self::Overlay,
            GuestFeature::Vlan => Self::Vlan,
            GuestFeature::HotChange => Self::HotChange,
            GuestFeature::Volume => Self::Volume,
            GuestFeature::DiskChange => Self::DiskChange,
            GuestFeature::Snapshot => Self::Snapshot,
            GuestFeature::Backup => Self::Backup,
            GuestFeature::IcmpType => Self::IcmpType,
            GuestFeature::VolumeMove => Self::VolumeMove,
            GuestFeature::VolumeSnapshot => Self::VolumeSnapshot,
            GuestFeature::Numa => Self::Numa,
            GuestFeature::PciDevice => Self::PciDevice,
        }
    }
}

impl From<v1::CpuTimes> for CpuTimes {
    fn from(wire: v1::CpuTimes) -> Self {
        Self {
            user: clean(wire.user_seconds_total),
            nice: clean(wire.nice_seconds_total),
            system: clean(wire.system_seconds_total),
            idle: clean(wire.idle_seconds_total),
            iowait: clean(wire.iowait_seconds_total),
            irq: clean(wire.irq_seconds_total),
            softirq: clean(wire.softirq_seconds_total),
            steal: clean(wire.steal_seconds_total),
            guest: clean(wire.guest_seconds_total),
        }
    }
}

impl From<CpuTimes> for v1::CpuTimes {
    fn from(own: CpuTimes) -> Self {
        Self {
            user_seconds_total: own.user,
            nice_seconds_total: own.nice,
            system_seconds_total: own.system,
            idle_seconds_total: own.idle,
            iowait_seconds_total: own.iowait,
            irq_seconds_total: own.irq,
            softirq_seconds_total: own.softirq,
            steal_seconds_total: own.steal,
            guest_seconds_total: own.guest,
        }
    }
}

impl From<v1::PressureStall> for Stall {
    fn from(wire: v1::PressureStall) -> Self {
        Self {
            avg10_percent: clean(wire.avg10_percent),
            avg60_percent: clean(wire.avg60_percent),
            avg300_percent: clean(wire.avg300_percent),
            stalled_seconds_total: clean(wire.stalled_seconds_total),
        }
    }
}

impl From<Stall> for v1::PressureStall {
    fn from(own: Stall) -> Self {
        Self {
            avg10_percent: own.avg10_percent,
            avg60_percent: own.avg60_percent,
            avg300_percent: own.avg300_percent,
            stalled_seconds_total: own.stalled_seconds_total,
        }
    }
}

impl From<v1::Pressure> for Pressure {
    fn from(wire: v1::Pressure) -> Self {
        Self {
            cpu_some: wire.cpu_some.map(Into::into),
            memory_some: wire.memory_some.map(Into::into),
            memory_full: wire.memory_full.map(Into::into),
            io_some: wire.io_some.map(Into::into),
            io_full: wire.io_full.map(Into::into),
        }
    }
}

impl From<Pressure> for v1::Pressure {
    fn from(own: Pressure) -> Self {
        Self {
            cpu_some: own.cpu_some.map(Into::into),
            memory_some: own.memory_some.map(Into::into),
            memory_full: own.memory_full.map(Into::into),
            io_some: own.io_some.map(Into::into),
            io_full: own.io_full.map(Into::into),
        }
    }
}

impl From<v1::MemoryUsage> for Memory {
    fn from(wire: v1::MemoryUsage) -> Self {
        Self {
            total_bytes: wire.total_bytes,
            free_bytes: wire.free_bytes,
            available_bytes: wire.available_bytes,
            cached_bytes: wire.cached_bytes,
            buffers_bytes: wire.buffers_bytes,
            swap_total_bytes: wire.swap_total_bytes,
            swap_free_bytes: wire.swap_free_bytes,
            huge_pages: each(wire.huge_pages),
        }
    }
}

impl From<Memory> for v1::MemoryUsage {
    fn from(own: Memory) -> Self {
        Self {
            total_bytes: own.total_bytes,
            free_bytes: own.free_bytes,
            available_bytes: own.available_bytes,
            cached_bytes: own.cached_bytes,
            buffers_bytes: own.buffers_bytes,
            swap_total_bytes: own.swap_total_bytes,
            swap_free_bytes: own.swap_free_bytes,
            huge_pages: each(own.huge_pages),
        }
    }
}

impl From<&str> for NicKind {
    fn from(name: &str) -> Self {
        match name {
            "physical" => Self::Physical,
            "bridge" => Self::Bridge,
            "vlan" => Self::Vlan,
            "bond" => Self::Bond,
            "tap" => Self::Tap,
            _ => Self::Virtual,
        }
    }
}

impl From<v1::NicUsage> for Nic {
    fn from(wire: v1::NicUsage) -> Self {
        Self {
            kind: wire.kind.as_str().into(),
            name: wire.name,
            mac: wire.mac,
            up: wire.up,
            speed_bits_per_second: wire.speed_bits_per_second,
            receive: NicCounters {
                bytes: wire.receive_bytes_total,
                packets: wire.receive_packets_total,
                errors: wire.receive_errors_total,
                drops: wire.receive_drops_total,
            },
            transmit: NicCounters {
                bytes: wire.transmit_bytes_total,
                packets: wire.transmit_packets_total,
                errors: wire.transmit_errors_total,
                drops: wire.transmit_drops_total,
            },
            receive_bytes_per_second: clean(wire.receive_bytes_per_second),
            transmit_bytes_per_second: clean(wire.transmit_bytes_per_second),
            rates_valid: wire.rates_valid,
        }
    }
}

impl From<Nic> for v1::NicUsage {
    fn from(own: Nic) -> Self {
        Self {
            name: own.name,
            receive_bytes_total: own.receive.bytes,
            transmit_bytes_total: own.transmit.bytes,
            receive_packets_total: own.receive.packets,
            transmit_packets_total: own.transmit.packets,
            receive_errors_total: own.receive.errors,
            transmit_errors_total: own.transmit.errors,
            receive_drops_total: own.receive.drops,
            transmit_drops_total: own.transmit.drops,
            speed_bits_per_second: own.speed_bits_per_second,
            up: own.up,
            receive_bytes_per_second: own.receive_bytes_per_second,
            transmit_bytes_per_second: own.transmit_bytes_per_second,
            rates_valid: own.rates_valid,
            mac: own.mac,
            kind: own.kind.as_str().to_owned(),
        }
    }
}

impl From<v1::FileSystemUsage> for FileSystem {
    fn from(wire: v1::FileSystemUsage) -> Self {
        Self {
            mount_point: wire.mount_point,
            kind: wire.r#type,
            size_bytes: wire.size_bytes,
            available_bytes: wire.available_bytes,
            inodes: wire.inodes,
            inodes_free: wire.inodes_free,
        }
    }
}

impl From<FileSystem> for v1::FileSystemUsage {
    fn from(own: FileSystem) -> Self {
        Self {
            mount_point: own.mount_point,
            r#type: own.kind,
            size_bytes: own.size_bytes,
            available_bytes: own.available_bytes,
            inodes: own.inodes,
            inodes_free: own.inodes_free,
        }
    }
}

impl From<v1::HostUsage> for Usage {
    fn from(wire: v1::HostUsage) -> Self {
        Self {
            sample_time: sample_time(wire.sample_time),
            interval: wire.interval.as_ref().and_then(time::duration_from_wire),
            cpu: wire.cpu.map(Into::into).unwrap_or_default(),
            cpus_busy: clean(wire.cpus_busy),
            rates_valid: wire.rates_valid,
            load: [clean(wire.load1), clean(wire.load5), clean(wire.load15)],
            pressure: wire.pressure.map(Into::into).unwrap_or_default(),
            memory: wire.memory.map(Into::into).unwrap_or_default(),
            nics: each(wire.nics),
            file_systems: each(wire.file_systems),
            pools: each(wire.pools),
            uptime_seconds: clean(wire.uptime_seconds),
        }
    }
}

impl From<Usage> for v1::HostUsage {
    fn from(own: Usage) -> Self {
        Self {
            sample_time: Some(time::to_wire(own.sample_time)),
            interval: own.interval.map(time::duration_to_wire),
            cpu: Some(own.cpu.into()),
            cpus_busy: own.cpus_busy,
            rates_valid: own.rates_valid,
            load1: own.load[0],
            load5: own.load[1],
            load15: own.load[2],
            pressure: Some(own.pressure.into()),
            memory: Some(own.memory.into()),
            nics: each(own.nics),
            file_systems: each(own.file_systems),
            pools: each(own.pools),
            uptime_seconds: own.uptime_seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage() -> Usage {
        Usage {
            sample_time: Timestamp::new(1_700_000_000, 5).unwrap(),
            interval: Some(Duration::from_millis(2_001)),
            cpu: CpuTimes {
                user: 1.5,
                guest: 0.5,
                idle: 7.0,
                ..Default::default()
            },
            cpus_busy: 0.75,
            rates_valid: true,
            load: [0.5, 0.25, 0.125],
            pressure: Pressure {
                io_full: Some(Stall {
                    avg10_percent: 3.0,
                    ..Default::default()
                }),
                ..Default::default()
            },
            memory: Memory {
                total_bytes: 8 << 30,
                huge_pages: vec![HugePages {
                    page_size_bytes: 2 << 20,
                    total: 4,
                    free: 1,
                }],
                ..Default::default()
            },
            nics: vec![Nic {
                name: "eno1".into(),
                kind: NicKind::Bond,
                receive: NicCounters {
                    bytes: 1,
                    packets: 2,
                    errors: 3,
                    drops: 4,
                },
                transmit: NicCounters {
                    bytes: 5,
                    packets: 6,
                    errors: 7,
                    drops: 8,
                },
                receive_bytes_per_second: 9.0,
                rates_valid: true,
                ..Default::default()
            }],
            file_systems: vec![FileSystem {
                mount_point: "/".into(),
                kind: "ext4".into(),
                size_bytes: 9,
                ..Default::default()
            }],
            pools: vec![Pool {
                name: "local".into(),
                error: Some("gone".into()),
                ..Default::default()
            }],
            uptime_seconds: 12.5,
        }
    }

    #[test]
    fn a_sample_survives_the_wire_unchanged() {
        assert_eq!(Usage::from(v1::HostUsage::from(usage())), usage());
        let vm = VmUsage {
            cpu_seconds_total: 2.5,
            blocks: vec![VmBlock {
                name: "root".into(),
                read_bytes_total: 7,
                ..Default::default()
            }],
            nics: vec![VmNic {
                name: "eth0".into(),
                drops_total: 3,
                ..Default::default()
            }],
            ..Default::default()
        };
        assert_eq!(VmUsage::from(v1::VmUsage::from(vm.clone())), vm);
    }

    #[test]
    fn every_kind_of_interface_survives_the_wire() {
        use NicKind::*;
        for kind in [Physical, Bridge, Vlan, Bond, Tap, Virtual] {
            assert_eq!(NicKind::from(kind.as_str()), kind);
        }
        assert_eq!(NicKind::from("something new"), Virtual);
    }

    #[test]
    fn an_empty_message_becomes_defaults() {
        assert_eq!(Usage::from(v1::HostUsage::default()), Usage::default());
        assert_eq!(
            Inventory::from(v1::HostInventory::default()),
            Inventory::default()
        );
        assert_eq!(VmUsage::from(v1::VmUsage::default()), VmUsage::default());
    }

    #[test]
    fn numbers_that_the_store_cannot_hold_become_zero() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
            let wire = v1::HostUsage {
                cpus_busy: bad,
                load15: bad,
                uptime_seconds: bad,
                ..Default::default()
            };
            assert_eq!(Usage::from(wire), Usage::default());
        }
    }
}
