//! The part of [`super`] that is about VMs.

use super::*;

impl From<v1::VmBlockUsage> for VmBlock {
    fn from(wire: v1::VmBlockUsage) -> Self {
        Self {
            name: wire.name,
            read_bytes_total: wire.read_bytes_total,
            write_bytes_total: wire.write_bytes_total,
            read_requests_total: wire.read_requests_total,
            write_requests_total: wire.write_requests_total,
            allocation_bytes: wire.allocation_bytes,
            capacity_bytes: wire.capacity_bytes,
        }
    }
}

impl From<VmBlock> for v1::VmBlockUsage {
    fn from(own: VmBlock) -> Self {
        Self {
            name: own.name,
            read_bytes_total: own.read_bytes_total,
            write_bytes_total: own.write_bytes_total,
            read_requests_total: own.read_requests_total,
            write_requests_total: own.write_requests_total,
            allocation_bytes: own.allocation_bytes,
            capacity_bytes: own.capacity_bytes,
        }
    }
}

impl From<v1::VmNicUsage> for VmNic {
    fn from(wire: v1::VmNicUsage) -> Self {
        Self {
            name: wire.name,
            receive_bytes_total: wire.receive_bytes_total,
            transmit_bytes_total: wire.transmit_bytes_total,
            receive_packets_total: wire.receive_packets_total,
            transmit_packets_total: wire.transmit_packets_total,
            errors_total: wire.errors_total,
            drops_total: wire.drops_total,
        }
    }
}

impl From<VmNic> for v1::VmNicUsage {
    fn from(own: VmNic) -> Self {
        Self {
            name: own.name,
            receive_bytes_total: own.receive_bytes_total,
            transmit_bytes_total: own.transmit_bytes_total,
            receive_packets_total: own.receive_packets_total,
            transmit_packets_total: own.transmit_packets_total,
            errors_total: own.errors_total,
            drops_total: own.drops_total,
        }
    }
}

impl From<v1::VmUsage> for VmUsage {
    fn from(wire: v1::VmUsage) -> Self {
        Self {
            sample_time: sample_time(wire.sample_time),
            cpu_seconds_total: clean(wire.cpu_seconds_total),
            cpu_wait_seconds_total: clean(wire.cpu_wait_seconds_total),
            cpus_busy: clean(wire.cpus_busy),
            rates_valid: wire.rates_valid,
            memory_resident_bytes: wire.memory_resident_bytes,
            memory_balloon_bytes: wire.memory_balloon_bytes,
            memory_unused_bytes: wire.memory_unused_bytes,
            blocks: each(wire.blocks),
            nics: each(wire.nics),
        }
    }
}

impl From<VmUsage> for v1::VmUsage {
    fn from(own: VmUsage) -> Self {
        Self {
            sample_time: Some(time::to_wire(own.sample_time)),
            cpu_seconds_total: own.cpu_seconds_total,
            cpu_wait_seconds_total: own.cpu_wait_seconds_total,
            cpus_busy: own.cpus_busy,
            rates_valid: own.rates_valid,
            memory_resident_bytes: own.memory_resident_bytes,
            memory_balloon_bytes: own.memory_balloon_bytes,
            memory_unused_bytes: own.memory_unused_bytes,
            blocks: each(own.blocks),
            nics: each(own.nics),
        }
    }
}
