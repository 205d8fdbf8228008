//! The VMs' part of the page: `dalgu_vm_*`.

use std::fmt;

use dalgu_proto::{
    host::{VmBlock, VmNic, VmUsage},
    vm::PowerState,
};

use super::{Vm, family::Page};

/// Labels of a VM.
type Two<'a> = [(&'static str, &'a str); 2];
/// Labels of a device of a VM.
type Three<'a> = [(&'static str, &'a str); 3];

pub(super) fn encode(page: &mut Page<'_>, vms: &[Vm]) -> fmt::Result {
    let vms: Vec<_> = vms.iter().map(|vm| (vm, vm.id.to_string())).collect();
    power(page, &vms)?;
    let running: Vec<(Two<'_>, &VmUsage)> = vms
        .iter()
        .filter_map(|(vm, uid)| {
            Some((
                [("vm", vm.name.as_str()), ("uid", uid.as_str())],
                vm.usage.as_ref()?,
            ))
        })
        .collect();
    processors_and_memory(page, &running)?;
    blocks(page, &running)?;
    nics(page, &running)
}

fn power(page: &mut Page<'_>, vms: &[(&Vm, String)]) -> fmt::Result {
    const STATES: [(PowerState, &str); 3] = [
        (PowerState::Running, "running"),
        (PowerState::Stopped, "stopped"),
        (PowerState::Paused, "paused"),
    ];
    let series = vms.iter().flat_map(|(vm, uid)| {
        STATES.map(|(state, name)| {
            (
                [("vm", vm.name.as_str()), ("uid", uid.as_str()), ("state", name)],
                u32::from(vm.power == Some(state)),
            )
        })
    });
    page.gauges(
        "dalgu_vm_power_state",
        "1 for the power state a VM is in; 0 for all while it is not known",
        series,
    )
}

fn processors_and_memory(page: &mut Page<'_>, vms: &[(Two<'_>, &VmUsage)]) -> fmt::Result {
    page.counters(
        "dalgu_vm_cpu_seconds_total",
        "Processor time of a VM's process since it began",
        vms.iter()
            .map(|(labels, usage)| (*labels, usage.cpu_seconds_total)),
    )?;
    page.counters(
        "dalgu_vm_cpu_wait_seconds_total",
        "Time a VM's processors were ready but waited for a host processor (steal, seen from the guest)",
        vms.iter()
            .map(|(labels, usage)| (*labels, usage.cpu_wait_seconds_total)),
    )?;
    page.gauges(
        "dalgu_vm_cpus_busy",
        "Processors a VM used between the last two samples",
        vms.iter()
            .filter(|(_, usage)| usage.rates_valid)
            .map(|(labels, usage)| (*labels, usage.cpus_busy)),
    )?;
    page.gauges(
        "dalgu_vm_memory_resident_bytes",
        "Resident memory of a VM's process",
        vms.iter()
            .map(|(labels, usage)| (*labels, usage.memory_resident_bytes)),
    )?;
    page.gauges(
        "dalgu_vm_memory_balloon_bytes",
        "Memory the balloon leaves to a guest",
        vms.iter()
            .map(|(labels, usage)| (*labels, usage.memory_balloon_bytes)),
    )?;
    page.gauges(
        "dalgu_vm_memory_unused_bytes",
        "Memory a guest says it does not use; absent where its driver does not say",
        vms.iter()
            .filter(|(_, usage)| usage.memory_unused_bytes > 0)
            .map(|(labels, usage)| (*labels, usage.memory_unused_bytes)),
    )
}

fn blocks(page: &mut Page<'_>, vms: &[(Two<'_>, &VmUsage)]) -> fmt::Result {
    let blocks: Vec<(Three<'_>, &VmBlock)> = vms
        .iter()
        .flat_map(|([vm, uid], usage)| {
            usage
                .blocks
                .iter()
                .map(|block| ([*vm, *uid, ("disk", block.name.as_str())], block))
        })
        .collect();
    let mut count = |name: &str, help: &str, of: fn(&VmBlock) -> u64| {
        page.counters(
            name,
            help,
            blocks.iter().map(|(labels, block)| (*labels, of(block))),
        )
    };
    count(
        "dalgu_vm_block_read_bytes_total",
        "Bytes a VM read from a disk",
        |block| block.read_bytes_total,
    )?;
    count(
        "dalgu_vm_block_write_bytes_total",
        "Bytes a VM wrote to a disk",
        |block| block.write_bytes_total,
    )?;
    count(
        "dalgu_vm_block_read_requests_total",
        "Read requests of a VM to a disk",
        |block| block.read_requests_total,
    )?;
    count(
        "dalgu_vm_block_write_requests_total",
        "Write requests of a VM to a disk",
        |block| block.write_requests_total,
    )?;
    page.gauges(
        "dalgu_vm_block_allocation_bytes",
        "Space a disk takes on the host",
        blocks
            .iter()
            .map(|(labels, block)| (*labels, block.allocation_bytes)),
    )?;
    page.gauges(
        "dalgu_vm_block_capacity_bytes",
        "Capacity of a disk",
        blocks
            .iter()
            .map(|(labels, block)| (*labels, block.capacity_bytes)),
    )
}

fn nics(page: &mut Page<'_>, vms: &[(Two<'_>, &VmUsage)]) -> fmt::Result {
    let nics: Vec<(Three<'_>, &VmNic)> = vms
        .iter()
        .flat_map(|([vm, uid], usage)| {
            usage
                .nics
                .iter()
                .map(|nic| ([*vm, *uid, ("nic", nic.name.as_str())], nic))
        })
        .collect();
    let mut count = |name: &str, help: &str, of: fn(&VmNic) -> u64| {
        page.counters(name, help, nics.iter().map(|(labels, nic)| (*labels, of(nic))))
    };
    count(
        "dalgu_vm_nic_receive_bytes_total",
        "Bytes a guest received",
        |nic| nic.receive_bytes_total,
    )?;
    count("dalgu_vm_nic_transmit_bytes_total", "Bytes a guest sent", |nic| {
        nic.transmit_bytes_total
    })?;
    count(
        "dalgu_vm_nic_receive_packets_total",
        "Packets a guest received",
        |nic| nic.receive_packets_total,
    )?;
    count(
        "dalgu_vm_nic_transmit_packets_total",
        "Packets a guest sent",
        |nic| nic.transmit_packets_total,
    )?;
    count(
        "dalgu_vm_nic_errors_total",
        "Errors of a guest's interface in both directions",
        |nic| nic.errors_total,
    )?;
    count(
        "dalgu_vm_nic_drops_total",
        "Packets of a guest's interface dropped in both directions",
        |nic| nic.drops_total,
    )
}
