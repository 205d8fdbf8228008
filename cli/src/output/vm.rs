//! What a VM looks like in tables and on its own page. Pure.

use std::borrow::Cow;

use dalgu_proto::v1;
use jiff::Timestamp;

use super::{BAD, Cell, GOOD, Resource, WARN, human, network::addresses};

fn state_word(vm: &v1::Vm) -> String {
    let status = vm.status.clone().unwrap_or_default();
    let word = human::value::<v1::VmState>(status.state);
    match status.error {
        Some(error) if !error.reason.is_empty() => format!("{word} ({})", error.reason),
        _ => word,
    }
}

fn state_cell(vm: &v1::Vm) -> Cell {
    use v1::VmState as S;
    let style = match vm.status.as_ref().map(v1::VmStatus::state).unwrap_or_default() {
        S::Running => GOOD,
        S::Failed | S::Unreachable | S::Resolving => BAD,
        S::Stopped | S::Unspecified => return Cell::plain(state_word(vm)),
        _ => WARN,
    };
    Cell::painted(state_word(vm), style)
}

fn cpu(vm: &v1::Vm) -> String {
    match vm.status.as_ref().and_then(|status| status.usage.as_ref()) {
        Some(usage) if usage.rates_valid => human::percent(usage.cpus_busy, 1.0),
        _ => "-".to_owned(),
    }
}

/// What it asks of its host's processors, huge pages and nodes, and what it got.
fn fitting(page: &mut human::Page, spec: &v1::VmSpec, status: &v1::VmStatus) {
    match v1::CpuPolicy::try_from(spec.cpu_policy) {
        Ok(v1::CpuPolicy::Unspecified | v1::CpuPolicy::Shared) => {}
        _ => _ = page.line("CPU policy", human::value::<v1::CpuPolicy>(spec.cpu_policy)),
    }
    if spec.huge_page_kib > 0 {
        page.line("Huge pages", human::mib(spec.huge_page_kib / 1024));
    }
    match v1::NumaPolicy::try_from(spec.numa_policy) {
        Ok(v1::NumaPolicy::Unspecified | v1::NumaPolicy::None) => {}
        Ok(v1::NumaPolicy::Spread) => {
            _ = page.line("NUMA policy", format!("SPREAD over {} nodes", spec.numa_nodes))
        }
        _ => _ = page.line("NUMA policy", human::value::<v1::NumaPolicy>(spec.numa_policy)),
    }
    let place = |place: &v1::NumaPlace| {
        let cpus: Vec<_> = place.cpus.iter().map(ToString::to_string).collect();
        match cpus.is_empty() {
            true => format!("node {}", place.node),
            false => format!("node {} (CPUs {})", place.node, cpus.join(",")),
        }
    };
    let places: Vec<_> = status.numa.iter().map(place).collect();
    page.line_if("On host's", &places.join(", "));
    let asked = spec
        .devices
        .iter()
        .map(|asked| format!("{} {}", asked.count, asked.class));
    page.line_if("PCI devices", &asked.collect::<Vec<_>>().join(", "));
    let has = status
        .devices
        .iter()
        .map(|device| format!("{} {}", device.class, device.address));
    page.line_if("Has devices", &has.collect::<Vec<_>>().join(", "));
}

/// What it boots with, where that is not the usual.
fn boot(page: &mut human::Page, spec: &v1::VmSpec) {
    match v1::Firmware::try_from(spec.firmware) {
        Ok(v1::Firmware::Unspecified | v1::Firmware::Bios) => {}
        _ => _ = page.line("Firmware", human::value::<v1::Firmware>(spec.firmware)),
    }
    if spec.tpm {
        page.line("TPM", "2.0");
    }
    let Some(first_boot) = &spec.first_boot else {
        return;
    };
    let digest = |digest: &Option<v1::DocumentDigest>| {
        let known = digest.as_ref();
        known
            .map(|known| format!("{} bytes, SHA-256 {}", known.size_bytes, known.sha256))
            .unwrap_or_default()
    };
    page.line_if("Host name", &first_boot.hostname)
        .line_if("User data", &digest(&first_boot.user_data_digest))
        .line_if(
            "Network configuration",
            &digest(&first_boot.network_config_digest),
        )
        .line("First-boot pool", human::or_dash(&first_boot.pool));
    for key in &first_boot.ssh_authorized_keys {
        page.line("SSH key", key);
    }
}

impl Resource for v1::Vm {
    const MESSAGE: &'static str = "dalgu.v1.Vm";
    const PLURAL: &'static str = "VMs";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "NAME",
            "STATE",
            "HOST",
            "VCPUS",
            "MEMORY",
            "CPU%",
            "AGE",
            "UID",
            "EPOCH",
            "GENERATION",
            "POWER REASON",
            "LABELS",
        ];
        if wide { ALL } else { &ALL[..7] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let (spec, status) = (
            self.spec.clone().unwrap_or_default(),
            self.status.clone().unwrap_or_default(),
        );
        let mut row = vec![
            Cell::plain(&self.name),
            state_cell(self),
            Cell::plain(human::or_dash(&status.host)),
            Cell::plain(spec.vcpus.to_string()),
            Cell::plain(human::mib(spec.memory_mib)),
            Cell::plain(cpu(self)),
            Cell::plain(human::age(self.create_time.as_ref(), now)),
        ];
        if wide {
            row.push(Cell::plain(human::or_dash(&self.uid)));
            row.push(Cell::plain(status.epoch.to_string()));
            row.push(Cell::plain(generation(self)));
            row.push(Cell::plain(reason(&status)));
            row.push(Cell::plain(human::labels(&self.labels)));
        }
        row
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let (spec, status) = (
            self.spec.clone().unwrap_or_default(),
            self.status.clone().unwrap_or_default(),
        );
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .painted("State", &state_cell(self))
            .line("Host", human::or_dash(&status.host));
        if let Some(error) = &status.error {
            let again = if error.retrying {
                " (its host tries again)"
            } else {
                ""
            };
            page.painted("Error", &Cell::painted(format!("{}{again}", error.message), BAD));
        }
        let most_vcpus = (spec.max_vcpus > spec.vcpus).then(|| spec.max_vcpus.to_string());
        let most_memory = (spec.max_memory_mib > spec.memory_mib).then(|| human::mib(spec.max_memory_mib));
        page.line("vCPUs", up_to(spec.vcpus.to_string(), most_vcpus))
            .line("Memory", up_to(human::mib(spec.memory_mib), most_memory));
        fitting(&mut page, &spec, &status);
        page.line_if("Description", &self.description)
            .line("Labels", human::labels(&self.labels));
        if let Some(boot) = &spec.kernel_boot {
            page.line("Kernel", &boot.kernel)
                .line_if("Initrd", &boot.initrd)
                .line_if("Command line", &boot.cmdline);
        }
        boot(&mut page, &spec);
        page.line("Restart policy", restart_policy(&spec));
        // An older controller says nothing of it.
        if self.drain_mode != 0 {
            page.line("At a drain", human::value::<v1::DrainMode>(self.drain_mode));
        }
        if !spec.host_selector.is_empty() {
            page.line("Host selector", human::labels(&spec.host_selector));
        }
        page.line_if("Placement groups", &self.placement_groups.join(","));
        if !self.tolerations.is_empty() {
            page.line("Tolerates", human::tolerations(&self.tolerations));
        }
        page.line("UID", human::or_dash(&self.uid))
            .line("Generation", generation(self));
        page.line("Epoch", status.epoch.to_string())
            .line("ETag", human::or_dash(&self.etag));
        page.line("Created", human::clock_and_age(self.create_time.as_ref(), now));
        if self.delete_time.is_some() {
            page.line(
                "Deletion asked for",
                human::clock_and_age(self.delete_time.as_ref(), now),
            );
        }
        observed(&mut page, self, &status, now);
        if !status.pending_changes.is_empty() {
            let rows = status.pending_changes.iter().map(pending_row).collect();
            page.table("Pending changes", &["FIELD", "NOW", "WANTED", "WAITS FOR"], rows);
        }
        let disks = spec.disks.iter().map(|disk| disk_row(disk, &status)).collect();
        page.table(
            "Disks",
            &[
                "NAME", "SIZE", "ON HOST", "POOL", "IMAGE", "FORMAT", "READ", "WRITTEN",
            ],
            disks,
        );
        let limited: Vec<_> = spec.disks.iter().filter_map(limits_row).collect();
        if !limited.is_empty() {
            page.table(
                "Limits of disks",
                &["NAME", "READS", "WRITES", "READ", "WRITTEN"],
                limited,
            );
        }
        let nics = spec.nics.iter().map(|nic| nic_row(nic, &status)).collect();
        page.table(
            "Network interfaces",
            &[
                "NAME",
                "NETWORK",
                "ADDRESSES",
                "GROUPS",
                "LIMITS",
                "MAC",
                "RECEIVED",
                "SENT",
            ],
            nics,
        );
        page
    }
}

fn pending_row(pending: &v1::PendingChange) -> Vec<Cell> {
    let words = [
        &pending.field,
        &pending.current,
        &pending.wanted,
        &pending.message,
    ];
    words.map(Cell::plain).to_vec()
}

/// A number that can rise without a restart, and how far.
fn up_to(now: String, most: Option<String>) -> String {
    match most {
        Some(most) => format!("{now} (up to {most} without a restart)"),
        None => now,
    }
}

fn restart_policy(spec: &v1::VmSpec) -> String {
    // The default has no value of its own in words.
    let policy = match spec.restart_policy {
        0 => v1::RestartPolicy::OnFailure.into(),
        policy => policy,
    };
    human::value::<v1::RestartPolicy>(policy)
}

fn observed(page: &mut human::Page, vm: &v1::Vm, status: &v1::VmStatus, now: Timestamp) {
    page.section("Observed");
    page.line("Wanted", human::value::<v1::PowerState>(vm.desired_power_state));
    page.line("Power", human::value::<v1::PowerState>(status.power_state))
        .line("Reason", reason(status));
    page.line("Seen", human::clock_and_age(status.observe_time.as_ref(), now))
        .line_if("Migration", &status.migration_id);
    if let Some(usage) = &status.usage {
        page.line(
            "CPU",
            format!(
                "{} of a processor, {:.1} s in all",
                cpu(vm),
                usage.cpu_seconds_total
            ),
        );
        page.line(
            "Waited for CPU",
            format!("{:.1} s in all", usage.cpu_wait_seconds_total),
        );
        page.line("Resident memory", human::bytes(usage.memory_resident_bytes));
        page.line("Balloon", human::bytes(usage.memory_balloon_bytes));
        if usage.memory_unused_bytes > 0 {
            page.line("Unused by guest", human::bytes(usage.memory_unused_bytes));
        }
    }
}

/// What a disk was made from, and how.
fn image(disk: &v1::Disk) -> String {
    match v1::CloneMode::try_from(disk.clone_mode) {
        Ok(v1::CloneMode::Unspecified) => human::or_dash(&disk.image),
        Ok(v1::CloneMode::Overlay) => format!("{} (overlay)", disk.image),
        Ok(v1::CloneMode::Full) => format!("{} (copy)", disk.image),
        Err(_) => format!("{} (unknown ({}))", disk.image, disk.clone_mode),
    }
}

fn disk_row(disk: &v1::Disk, status: &v1::VmStatus) -> Vec<Cell> {
    let blocks = status
        .usage
        .as_ref()
        .map(|usage| usage.blocks.as_slice())
        .unwrap_or_default();
    let used = blocks.iter().find(|block| block.name == disk.name);
    let of = |pick: fn(&v1::VmBlockUsage) -> u64| {
        used.map_or_else(|| "-".to_owned(), |block| human::bytes(pick(block)))
    };
    let format = match v1::DiskFormat::try_from(disk.format) {
        Ok(v1::DiskFormat::Raw) => "raw".to_owned(),
        Ok(_) => "qcow2".to_owned(),
        Err(_) => format!("unknown ({})", disk.format),
    };
    let name = match disk.volume.as_str() {
        "" => disk.name.clone(),
        volume => format!("{} (volume {volume})", disk.name),
    };
    [
        name,
        human::mib(disk.size_mib),
        of(|block| block.allocation_bytes),
        human::or_dash(&disk.pool),
        image(disk),
        format,
        of(|block| block.read_bytes_total),
        of(|block| block.write_bytes_total),
    ]
    .map(Cell::plain)
    .to_vec()
}

/// The limits of a disk that has some.
fn limits_row(disk: &v1::Disk) -> Option<Vec<Cell>> {
    let limits = disk.limits.as_ref()?;
    let most = |most: u64, unit: &str| match most {
        0 => "-".to_owned(),
        most => format!("{most}{unit}"),
    };
    let words = [
        disk.name.clone(),
        most(limits.read_operations_per_second, "/s"),
        most(limits.write_operations_per_second, "/s"),
        most(limits.read_mib_per_second, " MiB/s"),
        most(limits.write_mib_per_second, " MiB/s"),
    ];
    Some(words.map(Cell::plain).to_vec())
}

/// What an interface plugs into.
fn network(nic: &v1::Nic) -> String {
    if nic.network.is_empty() {
        return format!("bridge {}", nic.bridge);
    }
    nic.network.clone()
}

/// What it may receive and send.
fn limits(nic: &v1::Nic) -> String {
    let limit = |word: &str, mbit: u32| (mbit > 0).then(|| format!("{word} {mbit} Mbit/s"));
    let receive = limit("receive", nic.receive_limit_mbit_per_second);
    let send = limit("send", nic.send_limit_mbit_per_second);
    let reserved = limit("reserves", nic.reserved_mbit_per_second);
    let limits: Vec<_> = receive.into_iter().chain(send).chain(reserved).collect();
    human::or_dash(&limits.join(", "))
}

fn nic_row(nic: &v1::Nic, status: &v1::VmStatus) -> Vec<Cell> {
    let nics = status
        .usage
        .as_ref()
        .map(|usage| usage.nics.as_slice())
        .unwrap_or_default();
    let used = nics.iter().find(|used| used.name == nic.name);
    let of =
        |pick: fn(&v1::VmNicUsage) -> u64| used.map_or_else(|| "-".to_owned(), |nic| human::bytes(pick(nic)));
    [
        nic.name.clone(),
        network(nic),
        human::or_dash(&addresses(&nic.ipv4_address, &nic.ipv6_address)),
        human::or_dash(&nic.security_groups.join(",")),
        limits(nic),
        human::or_dash(&nic.mac),
        of(|used| used.receive_bytes_total),
        of(|used| used.transmit_bytes_total),
    ]
    .map(Cell::plain)
    .to_vec()
}

/// The intent's generation, and how far its host has come where it lags.
fn generation(vm: &v1::Vm) -> String {
    match vm.status.as_ref().map_or(0, |status| status.observed_generation) {
        done if done == vm.generation => vm.generation.to_string(),
        done => format!("{} (host: {done})", vm.generation),
    }
}

fn reason(status: &v1::VmStatus) -> String {
    match status.power_reason {
        0 => "-".to_owned(),
        reason => human::value::<v1::PowerReason>(reason),
    }
}
