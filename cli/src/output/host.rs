//! What a host looks like in tables and on its own page. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human};

fn state_cell(host: &v1::Host) -> Cell {
    let mut text = human::value::<v1::HostState>(host.state);
    let drain = host.drain.as_ref();
    let asleep = matches!(
        host.state(),
        v1::HostState::PoweringOff | v1::HostState::Off | v1::HostState::PoweringOn
    );
    match drain.filter(|drain| drain.state() == v1::DrainState::Active) {
        Some(drain) if drain.restoring => text += ", restoring",
        Some(_) => text += ", draining",
        None if host.cordoned => text += ", cordoned",
        None if host.pressed_time.is_some() && !asleep => text += ", pressed",
        None => {}
    }
    if !host.hypervisor_error.is_empty() {
        text += ", no hypervisor";
    }
    let style = match host.state() {
        v1::HostState::Unreachable => BAD,
        _ if !host.hypervisor_error.is_empty() => BAD,
        _ if host.power.as_ref().is_some_and(|power| power.overdue) => BAD,
        v1::HostState::Ready if !host.cordoned && host.pressed_time.is_none() => GOOD,
        _ => WARN,
    };
    Cell::painted(text, style)
}

/// Receive and send rates of the interfaces that lead out of the host: its physical ones, or, on a host that has
/// none (a virtual one), those that are neither bridges nor VMs' own.
fn nic_rates(usage: &v1::HostUsage) -> Option<(f64, f64)> {
    let physical = usage.nics.iter().any(|nic| nic.kind == "physical");
    let leads_out = |nic: &&v1::NicUsage| {
        if physical {
            nic.kind == "physical"
        } else {
            nic.kind == "virtual"
        }
    };
    let known: Vec<_> = usage
        .nics
        .iter()
        .filter(leads_out)
        .filter(|nic| nic.rates_valid)
        .collect();
    let sum = |pick: fn(&v1::NicUsage) -> f64| known.iter().map(|nic| pick(nic)).sum::<f64>();
    (!known.is_empty()).then(|| {
        (
            sum(|nic| nic.receive_bytes_per_second),
            sum(|nic| nic.transmit_bytes_per_second),
        )
    })
}

fn memory(usage: &v1::HostUsage) -> Option<String> {
    let memory = usage.memory.as_ref()?;
    Some(human::share(
        memory.total_bytes.saturating_sub(memory.available_bytes),
        memory.total_bytes,
    ))
}

fn pressure(usage: &v1::HostUsage) -> String {
    let Some(pressure) = &usage.pressure else {
        return "-".to_owned();
    };
    let one = |stall: &Option<v1::PressureStall>| {
        stall
            .as_ref()
            .map_or_else(|| "-".to_owned(), |stall| format!("{:.0}", stall.avg10_percent))
    };
    format!(
        "{}/{}/{}",
        one(&pressure.cpu_some),
        one(&pressure.memory_some),
        one(&pressure.io_some)
    )
}

fn reserved_memory(room: &v1::HostAllocation) -> String {
    human::share(room.memory_mib_reserved << 20, room.memory_mib_capacity << 20)
}

impl Resource for v1::Host {
    const MESSAGE: &'static str = "dalgu.v1.Host";
    const PLURAL: &'static str = "hosts";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "NAME",
            "STATE",
            "CPUS",
            "BUSY%",
            "LOAD",
            "MEM USED/TOTAL",
            "NIC RX/TX B/S",
            "VMS",
            "VCPUS RESERVED",
            "MEM RESERVED",
            "REPORT",
            "PSI CPU/MEM/IO",
            "KERNEL",
            "HYPERVISOR",
            "ACCEL",
            "ADDRESS",
            "SESSION",
        ];
        if wide { ALL } else { &ALL[..10] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let dash = || "-".to_owned();
        let (made, room) = (
            self.inventory.clone().unwrap_or_default(),
            self.allocation.clone().unwrap_or_default(),
        );
        let usage = self.usage.as_ref();
        let busy = usage.filter(|usage| usage.rates_valid);
        let rates = usage.and_then(nic_rates);
        let mut row = vec![Cell::plain(&self.name), state_cell(self)];
        let mut add = |text: String| row.push(Cell::plain(text));
        add(made.cpus.to_string());
        add(busy.map_or_else(dash, |usage| {
            human::percent(usage.cpus_busy, f64::from(made.cpus))
        }));
        add(usage.map_or_else(dash, |usage| format!("{:.2}", usage.load1)));
        add(usage.and_then(memory).unwrap_or_else(dash));
        add(rates.map_or_else(dash, |(rx, tx)| {
            format!("{}/{}", human::short(rx), human::short(tx))
        }));
        add(room.vms.to_string());
        add(format!("{}/{}", room.vcpus_reserved, room.vcpus_capacity));
        add(reserved_memory(&room));
        if wide {
            add(human::age(self.report_time.as_ref(), now));
            add(usage.map_or_else(dash, pressure));
            add(human::or_dash(&made.kernel));
            add(human::or_dash(&made.hypervisor));
            add(human::or_dash(&made.accelerator));
            add(human::or_dash(&self.address));
            add(self.session.to_string());
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let (made, room) = (
            self.inventory.clone().unwrap_or_default(),
            self.allocation.clone().unwrap_or_default(),
        );
        let mut page = human::Page::default();
        page.line("Name", &self.name).painted("State", &state_cell(self));
        if self.cordoned {
            page.line("Cordoned because", human::or_dash(&self.cordon_reason));
        }
        if self.pressed_time.is_some() {
            page.line(
                "Closed by its load",
                human::clock_and_age(self.pressed_time.as_ref(), now),
            );
        }
        if !self.hypervisor_error.is_empty() {
            page.painted("Hypervisor error", &Cell::painted(&self.hypervisor_error, BAD));
        }
        if let Some(power) = &self.power {
            powered(&mut page, power, now);
        }
        if !self.taints.is_empty() {
            page.line("Taints", human::taints(&self.taints));
        }
        page.line("Labels", human::labels(&self.labels))
            .line("Address", human::or_dash(&self.address));
        page.line(
            "Last report",
            human::clock_and_age(self.report_time.as_ref(), now),
        );
        page.line("Registered", human::clock_and_age(self.create_time.as_ref(), now));
        page.line("Agent", human::or_dash(&self.agent_version))
            .line("Session", self.session.to_string());
        page.line("Boot id", human::or_dash(&self.boot_id))
            .line("ETag", human::or_dash(&self.etag));
        hardware(&mut page, &made);
        let vms = match room.max_vms {
            0 => room.vms.to_string(),
            most => format!("{} of {most}", room.vms),
        };
        page.section("Reservations").line("VMs", vms);
        page.line(
            "vCPUs",
            format!(
                "{} of {} (over-commit {})",
                room.vcpus_reserved,
                room.vcpus_capacity,
                match self.adapted_cpu_overcommit_ratio {
                    Some(now) => format!("{now} by its load, {} of its own", self.cpu_overcommit_ratio),
                    None => self.cpu_overcommit_ratio.to_string(),
                }
            ),
        );
        page.line(
            "Memory",
            format!(
                "{} ({} kept for the host)",
                reserved_memory(&room),
                human::mib(self.reserved_memory_mib)
            ),
        );
        fitted(&mut page, &room);
        if let Some(drain) = &self.drain {
            drained(&mut page, drain, now);
        }
        if let Some(usage) = &self.usage {
            load(&mut page, usage, made.cpus, now);
            if let (Some(busy), Some(stolen)) = (self.cpus_busy_p95, self.cpus_stolen) {
                let share = |cpus| human::percent(cpus, f64::from(made.cpus));
                page.line(
                    "Last hour",
                    format!(
                        "{busy:.2} of {} CPUs busy at the 95th percentile ({}), {stolen:.2} waited for now ({})",
                        made.cpus,
                        share(busy),
                        share(stolen)
                    ),
                );
            }
            if let Some(expected) = self.cpus_expected {
                let share = human::percent(expected, f64::from(made.cpus));
                page.line(
                    "Expected at most",
                    format!("{expected:.2} of {} CPUs ({share})", made.cpus),
                );
            }
        }
        devices(&mut page, self, &made);
        page
    }
}

const DRAIN_COLUMNS: &[&str] = &["VM", "MODE", "STATE", "HOST", "WHY"];

fn drain_rows(drain: &v1::HostDrain) -> Vec<Vec<Cell>> {
    let row = |vm: &v1::DrainedVm| {
        let state = human::value::<v1::DrainedVmState>(vm.state);
        let style = match vm.state() {
            v1::DrainedVmState::Blocked if !vm.tried_again => BAD,
            v1::DrainedVmState::Blocked => WARN,
            _ => GOOD,
        };
        let why = vm
            .error
            .as_ref()
            .map(|error| error.message.clone())
            .unwrap_or_default();
        vec![
            Cell::plain(&vm.vm),
            Cell::plain(human::value::<v1::DrainMode>(vm.mode)),
            Cell::painted(state, style),
            Cell::plain(human::or_dash(&vm.host)),
            Cell::plain(human::or_dash(&why)),
        ]
    };
    drain.vms.iter().map(row).collect()
}

/// The VMs of a drain as a table.
pub fn drain_table(drain: &v1::HostDrain) -> String {
    super::table::layout(DRAIN_COLUMNS, drain_rows(drain), &super::table::Style::plain())
}

/// How a host is switched on and off.
pub fn powered(page: &mut human::Page, power: &v1::HostPower, now: Timestamp) {
    let redfish = power.redfish.clone().unwrap_or_default();
    let system = match redfish.system.as_str() {
        "" => "the only system",
        system => system,
    };
    page.line(
        "Power by",
        format!("{} ({system}, credentials {})", redfish.url, redfish.credentials),
    );
    page.line_if("Fingerprint", &redfish.fingerprint);
    let since = human::clock_and_age(power.since.as_ref(), now);
    page.line(
        "Power since",
        format!("{since}, by {}", human::or_dash(&power.principal)),
    );
    if !power.fault.is_empty() {
        page.painted("Power fault", &Cell::painted(&power.fault, BAD));
    }
}

fn drained(page: &mut human::Page, drain: &v1::HostDrain, now: Timestamp) {
    let what = if drain.restoring { "Restoration" } else { "Drain" };
    page.section(what)
        .line("State", human::value::<v1::DrainState>(drain.state))
        .line("Summary", &drain.summary)
        .line("Asked for by", human::or_dash(&drain.principal));
    if drain.mode != 0 {
        page.line("Mode of all", human::value::<v1::DrainMode>(drain.mode));
    }
    page.line("Begun", human::clock_and_age(drain.begin_time.as_ref(), now))
        .line("Deadline", human::clock(drain.deadline.as_ref()));
    if drain.end_time.is_some() {
        page.line("Ended", human::clock_and_age(drain.end_time.as_ref(), now));
    }
    page.table("VMs of it", DRAIN_COLUMNS, drain_rows(drain));
}

/// What VMs have of processors, nodes and uplinks by name.
fn fitted(page: &mut human::Page, room: &v1::HostAllocation) {
    let cpus: Vec<_> = room.dedicated_cpus.iter().map(ToString::to_string).collect();
    page.line_if("Dedicated CPUs", &cpus.join(","));
    for node in &room.nodes {
        let pages = node.huge_pages.iter().filter(|pages| pages.capacity_mib > 0);
        let pages = pages.map(|pages| {
            format!(
                "{} of {} in pages of {}",
                human::mib(pages.reserved_mib),
                human::mib(pages.capacity_mib),
                human::mib(pages.page_size_kib / 1024)
            )
        });
        let used = (node.cpus_dedicated, node.vcpus_reserved, node.memory_mib_reserved) != (0, 0, 0);
        let used = used.then(|| {
            format!(
                "{} CPUs dedicated, {} vCPUs and {} fitted",
                node.cpus_dedicated,
                node.vcpus_reserved,
                human::mib(node.memory_mib_reserved)
            )
        });
        let all: Vec<_> = used.into_iter().chain(pages).collect();
        page.line_if(&format!("NUMA node {}", node.id), &all.join("; "));
    }
    for uplink in &room.uplinks {
        let text = format!(
            "{} of {} Mbit/s reserved",
            uplink.reserved_mbit_per_second, uplink.mbit_per_second
        );
        page.line(&format!("Uplink of {}", uplink.bridge), text);
    }
    for devices in &room.devices {
        let text = format!("{} of {} reserved", devices.reserved, devices.count);
        page.line(&format!("PCI devices {}", devices.class), text);
    }
}

const DEVICE_COLUMNS: &[&str] = &["CLASS", "ADDRESS", "MODEL", "NUMA", "GROUP", "FOR VMS"];

/// PCI devices that are named for VMs, and why one cannot be given.
fn device_rows(made: &v1::HostInventory) -> Vec<Vec<Cell>> {
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let row = |device: &v1::PciDevice| {
        vec![
            Cell::plain(&device.class),
            Cell::plain(&device.address),
            Cell::plain(human::or_dash(&device.model)),
            Cell::plain(number(device.numa_node)),
            Cell::plain(number(device.iommu_group)),
            match device.problem.is_empty() {
                true => Cell::painted("yes", GOOD),
                false => Cell::painted(format!("no: {}", device.problem), BAD),
            },
        ]
    };
    made.pci_devices.iter().map(row).collect()
}

fn hardware(page: &mut human::Page, made: &v1::HostInventory) {
    page.section("Hardware")
        .line("Processor", human::or_dash(&made.cpu_model));
    let nodes = made.numa_nodes.len();
    page.line(
        "CPUs",
        format!(
            "{} (cores: {}, sockets: {}, NUMA nodes: {nodes})",
            made.cpus, made.cores, made.sockets
        ),
    );
    page.line("Memory", human::bytes(made.memory_bytes))
        .line("Architecture", human::or_dash(&made.architecture));
    page.line("Kernel", human::or_dash(&made.kernel))
        .line("Hypervisor", human::or_dash(&made.hypervisor));
    let why = if made.accelerator_reason.is_empty() {
        String::new()
    } else {
        format!(" ({})", made.accelerator_reason)
    };
    page.line("Accelerator", human::or_dash(&made.accelerator) + &why);
    page.line("Bridges", human::or_dash(&made.bridges.join(", ")));
    let features = made.guest_features.iter();
    let features: Vec<_> = features
        .map(|feature| human::value::<v1::GuestFeature>(*feature))
        .collect();
    page.line_if("For guests", &features.join(", "));
    page.table("PCI devices for VMs", DEVICE_COLUMNS, device_rows(made));
}

fn load(page: &mut human::Page, usage: &v1::HostUsage, cpus: u32, now: Timestamp) {
    page.section("Use");
    if usage.rates_valid {
        page.line(
            "Busy",
            format!(
                "{:.2} of {cpus} CPUs ({})",
                usage.cpus_busy,
                human::percent(usage.cpus_busy, f64::from(cpus))
            ),
        );
    }
    page.line(
        "Load",
        format!("{:.2} {:.2} {:.2}", usage.load1, usage.load5, usage.load15),
    );
    page.line("Memory", memory(usage).unwrap_or_else(|| "-".to_owned()));
    if let Some(memory) = &usage.memory {
        page.line(
            "Swap",
            human::share(
                memory.swap_total_bytes.saturating_sub(memory.swap_free_bytes),
                memory.swap_total_bytes,
            ),
        );
    }
    page.line(
        "Pressure",
        format!("{} % of the last 10 s (CPU/memory/IO)", pressure(usage)),
    );
    page.line("Sampled", human::clock_and_age(usage.sample_time.as_ref(), now));
}

fn devices(page: &mut human::Page, host: &v1::Host, made: &v1::HostInventory) {
    let usage = host.usage.clone().unwrap_or_default();
    let rate = |valid: bool, rate: f64| if valid { human::rate(rate) } else { "-".to_owned() };
    let nics = usage.nics.iter().map(|nic| {
        let speed = nic.speed_bits_per_second / 1_000_000;
        let speed = if speed == 0 {
            "-".to_owned()
        } else {
            format!("{speed} Mbit/s")
        };
        let texts = [
            nic.name.clone(),
            human::or_dash(&nic.kind),
            if nic.up { "up" } else { "down" }.to_owned(),
            speed,
            rate(nic.rates_valid, nic.receive_bytes_per_second),
            rate(nic.rates_valid, nic.transmit_bytes_per_second),
            (nic.receive_errors_total + nic.transmit_errors_total).to_string(),
            (nic.receive_drops_total + nic.transmit_drops_total).to_string(),
        ];
        texts.map(Cell::plain).to_vec()
    });
    page.table(
        "Network interfaces",
        &[
            "NAME", "KIND", "LINK", "SPEED", "RECEIVE", "SEND", "ERRORS", "DROPS",
        ],
        nics.collect(),
    );
    // The latest sample knows the present room; the inventory serves until there is one.
    let pools = if usage.pools.is_empty() {
        &made.pools
    } else {
        &usage.pools
    };
    let pools = pools.iter().map(|pool| {
        // As `df` counts: what is kept for root, or by a quota, is nobody's room.
        let used = match pool.used_bytes {
            0 => pool.capacity_bytes.saturating_sub(pool.available_bytes),
            used => used,
        };
        let used = human::share(used, used + pool.available_bytes);
        let texts = [
            pool.name.clone(),
            pool.path.clone(),
            if pool.shared { "yes" } else { "no" }.to_owned(),
            used,
            promised(host, &pool.name),
            human::or_dash(&pool.error),
        ];
        texts.map(Cell::plain).to_vec()
    });
    page.table(
        "Storage pools",
        &["NAME", "PATH", "SHARED", "USED/TOTAL", "PROMISED", "ERROR"],
        pools.collect(),
    );
    let others = host.unmanaged_domains.iter().map(|domain| {
        let state = if domain.running { "running" } else { "off" };
        let mark = if domain.marked { ", with Dalgu's mark" } else { "" };
        let running = format!("{state}{mark}");
        [
            domain.name.clone(),
            domain.uuid.clone(),
            running,
            domain.vcpus.to_string(),
            human::mib(domain.memory_mib),
        ]
        .map(Cell::plain)
        .to_vec()
    });
    page.table(
        "Domains that are not Dalgu's",
        &["NAME", "UUID", "STATE", "VCPUS", "MEMORY"],
        others.collect(),
    );
}

/// What disks in a pool may take when they are written in full, of what may be promised.
fn promised(host: &v1::Host, pool: &str) -> String {
    let mut pools = host.allocation.iter().flat_map(|allocation| &allocation.pools);
    let known = pools.find(|known| known.name == pool);
    known.map_or_else(
        || "-".to_owned(),
        |known| human::share(known.promised_mib << 20, known.capacity_mib << 20),
    )
}
