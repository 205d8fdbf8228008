//! The host's part of the page: `dalgu_host_*`.

use std::fmt;

use dalgu_proto::host::{CpuTimes, Inventory, Memory, Nic, NicKind, Pressure, Usage};

use super::{MOST_NICS, Snapshot, family::Page};

pub(super) fn encode(page: &mut Page<'_>, snapshot: &Snapshot) -> fmt::Result {
    let Some((_, usage)) = &snapshot.usage else {
        return Ok(());
    };
    processors(page, &snapshot.inventory, usage)?;
    memory(page, &usage.memory)?;
    pressure(page, &usage.pressure)?;
    let nics: Vec<_> = usage
        .nics
        .iter()
        .filter(|nic| nic.kind != NicKind::Tap)
        .take(MOST_NICS)
        .collect();
    interfaces(page, &nics)?;
    storage(page, usage)
}

fn processors(page: &mut Page<'_>, inventory: &Inventory, usage: &Usage) -> fmt::Result {
    let CpuTimes {
        user,
        nice,
        system,
        idle,
        iowait,
        irq,
        softirq,
        steal,
        guest,
    } = usage.cpu;
    page.counters(
        "dalgu_host_cpu_seconds_total",
        "Time the host's processors spent in each mode, summed over all of them; user contains guest time",
        [
            ([("mode", "user")], user),
            ([("mode", "nice")], nice),
            ([("mode", "system")], system),
            ([("mode", "idle")], idle),
            ([("mode", "iowait")], iowait),
            ([("mode", "irq")], irq),
            ([("mode", "softirq")], softirq),
            ([("mode", "steal")], steal),
        ],
    )?;
    page.counters(
        "dalgu_host_cpu_guest_seconds_total",
        "Time the host's processors spent running guests; contained in mode user",
        [([], guest)],
    )?;
    page.gauge(
        "dalgu_host_cpus",
        "Logical processors that are online",
        inventory.cpus,
    )?;
    page.gauge(
        "dalgu_host_cpu_cores",
        "Physical processor cores",
        inventory.cores,
    )?;
    page.gauge("dalgu_host_cpu_sockets", "Processor packages", inventory.sockets)?;
    page.gauges(
        "dalgu_host_cpus_busy",
        "Processors busy between the last two samples",
        usage.rates_valid.then_some(([], usage.cpus_busy)),
    )?;
    let [one, five, fifteen] = usage.load;
    page.gauge("dalgu_host_load1", "Load average over one minute", one)?;
    page.gauge("dalgu_host_load5", "Load average over five minutes", five)?;
    page.gauge("dalgu_host_load15", "Load average over fifteen minutes", fifteen)?;
    page.gauge(
        "dalgu_host_uptime_seconds",
        "Time since the host's start",
        usage.uptime_seconds,
    )
}

fn memory(page: &mut Page<'_>, memory: &Memory) -> fmt::Result {
    let known = memory
        .free_bytes
        .saturating_add(memory.cached_bytes)
        .saturating_add(memory.buffers_bytes);
    page.gauges(
        "dalgu_host_memory_bytes",
        "Memory of the host by what it is used for; the sum is all of it",
        [
            ([("state", "used")], memory.total_bytes.saturating_sub(known)),
            ([("state", "cached")], memory.cached_bytes),
            ([("state", "buffers")], memory.buffers_bytes),
            ([("state", "free")], memory.free_bytes),
        ],
    )?;
    page.gauge(
        "dalgu_host_memory_available_bytes",
        "Memory a new process could get without swapping",
        memory.available_bytes,
    )?;
    page.gauges(
        "dalgu_host_swap_bytes",
        "Swap space by whether it is used",
        [
            (
                [("state", "used")],
                memory.swap_total_bytes.saturating_sub(memory.swap_free_bytes),
            ),
            ([("state", "free")], memory.swap_free_bytes),
        ],
    )?;
    let sizes: Vec<_> = memory
        .huge_pages
        .iter()
        .map(|pages| (pages.page_size_bytes.to_string(), pages))
        .collect();
    let series = sizes.iter().flat_map(|(size, pages)| {
        [
            (
                [("page_size", size.as_str()), ("state", "used")],
                pages.total.saturating_sub(pages.free),
            ),
            ([("page_size", size.as_str()), ("state", "free")], pages.free),
        ]
    });
    page.gauges(
        "dalgu_host_huge_pages",
        "Huge pages set aside, by their size in bytes and whether they are used",
        series,
    )
}

fn pressure(page: &mut Page<'_>, pressure: &Pressure) -> fmt::Result {
    let all = [
        ("cpu", "some", pressure.cpu_some),
        ("memory", "some", pressure.memory_some),
        ("memory", "full", pressure.memory_full),
        ("io", "some", pressure.io_some),
        ("io", "full", pressure.io_full),
    ];
    page.counters(
        "dalgu_host_pressure_stalled_seconds_total",
        "Time in which some, or all (full), tasks waited for a resource",
        all.into_iter().filter_map(|(resource, kind, stall)| {
            Some((
                [("resource", resource), ("kind", kind)],
                stall?.stalled_seconds_total,
            ))
        }),
    )
}

fn interfaces(page: &mut Page<'_>, nics: &[&Nic]) -> fmt::Result {
    page.infos(
        "dalgu_host_nic_info",
        "What a network interface is",
        nics.iter().map(|nic| {
            [
                ("device", nic.name.as_str()),
                ("kind", nic.kind.as_str()),
                ("mac", nic.mac.as_str()),
            ]
        }),
    )?;
    let mut count = |name: &str, help: &str, of: fn(&Nic) -> u64| {
        page.counters(
            name,
            help,
            nics.iter().map(|nic| ([("device", nic.name.as_str())], of(nic))),
        )
    };
    count("dalgu_host_nic_receive_bytes_total", "Bytes received", |nic| {
        nic.receive.bytes
    })?;
    count(
        "dalgu_host_nic_receive_packets_total",
        "Packets received",
        |nic| nic.receive.packets,
    )?;
    count("dalgu_host_nic_receive_errors_total", "Receive errors", |nic| {
        nic.receive.errors
    })?;
    count(
        "dalgu_host_nic_receive_drops_total",
        "Received packets dropped",
        |nic| nic.receive.drops,
    )?;
    count("dalgu_host_nic_transmit_bytes_total", "Bytes sent", |nic| {
        nic.transmit.bytes
    })?;
    count("dalgu_host_nic_transmit_packets_total", "Packets sent", |nic| {
        nic.transmit.packets
    })?;
    count("dalgu_host_nic_transmit_errors_total", "Send errors", |nic| {
        nic.transmit.errors
    })?;
    count(
        "dalgu_host_nic_transmit_drops_total",
        "Packets dropped while sending",
        |nic| nic.transmit.drops,
    )?;
    page.gauges(
        "dalgu_host_nic_up",
        "Whether the link is up",
        nics.iter()
            .map(|nic| ([("device", nic.name.as_str())], u32::from(nic.up))),
    )?;
    page.gauges(
        "dalgu_host_nic_speed_bytes_per_second",
        "Link speed, of the interfaces that say it",
        nics.iter()
            .filter(|nic| nic.speed_bits_per_second > 0)
            .map(|nic| ([("device", nic.name.as_str())], nic.speed_bits_per_second / 8)),
    )
}

fn storage(page: &mut Page<'_>, usage: &Usage) -> fmt::Result {
    let systems = &usage.file_systems;
    let mut file_system = |name: &str, help: &str, of: fn(&dalgu_proto::host::FileSystem) -> u64| {
        let series = systems.iter().map(|system| {
            (
                [
                    ("mount_point", system.mount_point.as_str()),
                    ("fstype", system.kind.as_str()),
                ],
                of(system),
            )
        });
        page.gauges(name, help, series)
    };
    file_system(
        "dalgu_host_filesystem_size_bytes",
        "Size of a file system",
        |fs| fs.size_bytes,
    )?;
    file_system(
        "dalgu_host_filesystem_available_bytes",
        "Room for ordinary users",
        |fs| fs.available_bytes,
    )?;
    file_system("dalgu_host_filesystem_inodes", "Inodes of a file system", |fs| {
        fs.inodes
    })?;
    file_system(
        "dalgu_host_filesystem_inodes_free",
        "Free inodes of a file system",
        |fs| fs.inodes_free,
    )?;
    let usable = usage.pools.iter().filter(|pool| pool.error.is_none());
    page.gauges(
        "dalgu_host_pool_capacity_bytes",
        "Size of the file system a storage pool is on; absent while the pool cannot be used",
        usable
            .clone()
            .map(|pool| ([("pool", pool.name.as_str())], pool.capacity_bytes)),
    )?;
    page.gauges(
        "dalgu_host_pool_available_bytes",
        "Room in a storage pool; absent while the pool cannot be used",
        usable.map(|pool| ([("pool", pool.name.as_str())], pool.available_bytes)),
    )?;
    page.gauges(
        "dalgu_host_pool_up",
        "Whether a storage pool can be used",
        usage
            .pools
            .iter()
            .map(|pool| ([("pool", pool.name.as_str())], u32::from(pool.error.is_none()))),
    )
}
