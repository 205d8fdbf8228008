//! Conversions between [`crate::vm`] and the generated messages. From the wire they check and fill in defaults, and
//! name the field that does not hold; to the wire they are total.

use std::collections::BTreeSet;

use super::*;
use crate::{image::Reference, network::wire as network, v1};

fn invalid(field: impl Into<String>, message: impl ToString) -> Invalid {
    Invalid {
        field: field.into(),
        message: message.to_string(),
    }
}

impl TryFrom<v1::VmSpec> for Spec {
    type Error = Invalid;

    fn try_from(wire: v1::VmSpec) -> Result<Self, Invalid> {
        if !(1..=MAX_VCPUS).contains(&wire.vcpus) {
            return Err(invalid(
                "vcpus",
                format!("must be 1 to {MAX_VCPUS}, got {}", wire.vcpus),
            ));
        }
        if !MEMORY_MIB.contains(&wire.memory_mib) {
            let message = format!(
                "must be {} to {} MiB, got {}",
                MEMORY_MIB.start(),
                MEMORY_MIB.end(),
                wire.memory_mib
            );
            return Err(invalid("memory_mib", message));
        }
        let max_vcpus = Some(wire.max_vcpus).filter(|most| *most != 0);
        if max_vcpus.is_some_and(|most| !(wire.vcpus..=MAX_VCPUS).contains(&most)) {
            let message = format!("must be `vcpus` to {MAX_VCPUS}, got {}", wire.max_vcpus);
            return Err(invalid("max_vcpus", message));
        }
        let max_memory_mib = Some(wire.max_memory_mib).filter(|most| *most != 0);
        if max_memory_mib.is_some_and(|most| !(wire.memory_mib..=*MEMORY_MIB.end()).contains(&most)) {
            let most = MEMORY_MIB.end();
            let message = format!("must be `memory_mib` to {most} MiB, got {}", wire.max_memory_mib);
            return Err(invalid("max_memory_mib", message));
        }
        if wire.disks.len() > MAX_DISKS {
            return Err(invalid(
                "disks",
                format!("at most {MAX_DISKS} are allowed, got {}", wire.disks.len()),
            ));
        }
        if wire.nics.len() > MAX_NICS {
            return Err(invalid(
                "nics",
                format!("at most {MAX_NICS} are allowed, got {}", wire.nics.len()),
            ));
        }
        let restart_policy = match v1::RestartPolicy::try_from(wire.restart_policy) {
            Ok(policy) => policy.into(),
            Err(_) => return Err(invalid("restart_policy", "is not a value of RestartPolicy")),
        };
        if v1::HaTier::try_from(wire.ha_tier).is_err() {
            return Err(invalid("ha_tier", "is not a value of HaTier"));
        }
        let fitting = numa::check(&wire)?;
        let devices = device::check(&wire.devices)?;
        let disks = wire
            .disks
            .into_iter()
            .enumerate()
            .map(|(index, disk)| check_disk(index, disk))
            .collect::<Result<Vec<_>, _>>()?;
        let nics = wire
            .nics
            .into_iter()
            .enumerate()
            .map(|(index, nic)| check_nic(index, nic))
            .collect::<Result<Vec<_>, _>>()?;
        unique("disks", disks.iter().map(|disk| disk.name.as_str()))?;
        unique("nics", nics.iter().map(|nic| nic.name.as_str()))?;
        let kernel_boot = wire.kernel_boot.map(check_kernel).transpose()?;
        if kernel_boot.is_none() && disks.is_empty() {
            return Err(invalid("disks", "a VM needs a disk or kernel_boot to boot from"));
        }
        let host_selector =
            check_labels(&wire.host_selector).map_err(|message| invalid("host_selector", message))?;
        let first_boot = wire.first_boot.as_ref();
        let first_boot = first_boot
            .map(|first_boot| first_boot::check::first_boot(first_boot, &disks))
            .transpose()?;
        let firmware = match v1::Firmware::try_from(wire.firmware) {
            Ok(firmware) => firmware.into(),
            Err(_) => return Err(invalid("firmware", "is not a value of Firmware")),
        };
        Ok(Self {
            vcpus: wire.vcpus,
            memory_mib: wire.memory_mib,
            disks,
            nics,
            kernel_boot,
            restart_policy,
            host_selector,
            first_boot,
            firmware,
            tpm: wire.tpm,
            max_vcpus,
            max_memory_mib,
            fitting,
            devices,
        })
    }
}

fn unique<'a>(field: &str, names: impl Iterator<Item = &'a str>) -> Result<(), Invalid> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(invalid(field, format!("the name {name:?} is used twice")));
        }
    }
    Ok(())
}

fn check_disk(index: usize, wire: v1::Disk) -> Result<Disk, Invalid> {
    let at = |field: &str| format!("disks[{index}].{field}");
    ids::check_device_name(&wire.name).map_err(|error| invalid(at("name"), error))?;
    let mut volume = check_volume(&at, &wire)?;
    let limits = check_limits(&at, wire.limits.as_ref())?;
    let backup = wire.backup.as_ref().map(|backup| check_backup(&at, backup));
    let backup = backup.transpose()?;
    let image = Some(wire.image).filter(|image| !image.is_empty());
    let listed = image.as_deref().is_some_and(Reference::is_meant);
    let from_image = (listed || volume.is_some()) && wire.size_mib == 0;
    if !DISK_MIB.contains(&wire.size_mib) && !from_image {
        let message = format!(
            "must be {} to {} MiB, got {}",
            DISK_MIB.start(),
            DISK_MIB.end(),
            wire.size_mib
        );
        return Err(invalid(at("size_mib"), message));
    }
    let pool = match wire.pool.as_str() {
        "" if volume.is_some() => String::new(),
        "" => DEFAULT_POOL.to_owned(),
        named => named.to_owned(),
    };
    if !pool.is_empty() {
        ids::check_device_name(&pool).map_err(|error| invalid(at("pool"), error))?;
    }
    if let Some(image) = &image {
        let checked = if listed {
            image.parse::<Reference>().map(drop)
        } else {
            ids::check_file_name(image)
        };
        checked.map_err(|error| invalid(at("image"), error))?;
    }
    let digest = match wire.image_digest.as_str() {
        "" => None,
        digest if listed => Some(
            digest
                .parse()
                .map_err(|error: ids::Error| invalid(at("image_digest"), error))?,
        ),
        _ => return Err(invalid(at("image_digest"), "is for images of the catalogue only")),
    };
    let clone_mode = check_clone(&at("clone_mode"), wire.clone_mode, listed)?;
    let format = match v1::DiskFormat::try_from(wire.format) {
        Ok(v1::DiskFormat::Raw) => DiskFormat::Raw,
        Ok(_) => DiskFormat::Qcow2,
        Err(_) => return Err(invalid(at("format"), "is not a value of DiskFormat")),
    };
    let said = wire.format != i32::from(v1::DiskFormat::Unspecified);
    if let Some(volume) = volume.as_mut().filter(|volume| said && volume.id.is_none()) {
        volume.format = Some(format);
    }
    Ok(Disk {
        name: wire.name,
        size_mib: wire.size_mib,
        pool,
        image,
        format,
        digest,
        clone_mode,
        volume,
        limits,
        backup,
    })
}

impl TryFrom<&v1::Volume> for Disk {
    type Error = Invalid;

    /// What every disk that is this volume has in common; its name there aside.
    fn try_from(volume: &v1::Volume) -> Result<Self, Invalid> {
        let wire = v1::Disk {
            name: "volume".to_owned(),
            size_mib: volume.size_mib,
            pool: volume.pool.clone(),
            image: volume.image.clone(),
            format: volume.format,
            clone_mode: volume.clone_mode,
            ..Default::default()
        };
        if !wire.image.is_empty() && !Reference::is_meant(&wire.image) {
            return Err(invalid(
                "image",
                "must be an image of the catalogue, \"NAME\" or \"NAME:VERSION\"",
            ));
        }
        check_disk(0, wire).map_err(|error| Invalid {
            field: error.field.trim_start_matches("disks[0].").to_owned(),
            ..error
        })
    }
}

fn check_volume(at: &impl Fn(&str) -> String, wire: &v1::Disk) -> Result<Option<VolumeRef>, Invalid> {
    let parsed = |field: &str, error: ids::Error| invalid(at(field), error);
    if wire.volume.is_empty() {
        return match wire.volume_uid.as_str() {
            "" => Ok(None),
            _ => Err(invalid(at("volume_uid"), "is for volumes only")),
        };
    }
    let name = wire.volume.parse().map_err(|error| parsed("volume", error))?;
    let id = Some(&wire.volume_uid).filter(|uid| !uid.is_empty());
    let id = id.map(|uid| uid.parse()).transpose();
    Ok(Some(VolumeRef {
        name,
        id: id.map_err(|error| parsed("volume_uid", error))?,
        format: None,
    }))
}

fn check_backup(at: &impl Fn(&str) -> String, wire: &v1::DiskBackup) -> Result<BackupRef, Invalid> {
    let refused = |field: &str, error: ids::Error| invalid(at(&format!("backup.{field}")), error);
    ids::check_device_name(&wire.pool).map_err(|error| refused("pool", error))?;
    ids::check_device_name(&wire.disk).map_err(|error| refused("disk", error))?;
    Ok(BackupRef {
        id: wire.uid.parse().map_err(|error| refused("uid", error))?,
        pool: wire.pool.clone(),
        disk: wire.disk.clone(),
    })
}

fn check_limits(at: &impl Fn(&str) -> String, wire: Option<&v1::DiskLimits>) -> Result<DiskLimits, Invalid> {
    let Some(wire) = wire else {
        return Ok(DiskLimits::default());
    };
    let check = |field: &str, value: u64, most: u64| match value {
        0 => Ok(None),
        value if value <= most => Ok(Some(value)),
        value => {
            let message = format!("must be 0 (no limit) to {most}, got {value}");
            Err(invalid(at(&format!("limits.{field}")), message))
        }
    };
    let iops = |field, value| check(field, value, MAX_DISK_IOPS);
    let rate = |field, value| check(field, value, MAX_DISK_MIB_PER_SECOND);
    Ok(DiskLimits {
        read_iops: iops("read_operations_per_second", wire.read_operations_per_second)?,
        write_iops: iops("write_operations_per_second", wire.write_operations_per_second)?,
        read_mib_per_second: rate("read_mib_per_second", wire.read_mib_per_second)?,
        write_mib_per_second: rate("write_mib_per_second", wire.write_mib_per_second)?,
    })
}

impl From<DiskLimits> for v1::DiskLimits {
    fn from(limits: DiskLimits) -> Self {
        Self {
            read_operations_per_second: limits.read_iops.unwrap_or(0),
            write_operations_per_second: limits.write_iops.unwrap_or(0),
            read_mib_per_second: limits.read_mib_per_second.unwrap_or(0),
            write_mib_per_second: limits.write_mib_per_second.unwrap_or(0),
        }
    }
}

fn check_clone(field: &str, wire: i32, listed: bool) -> Result<CloneMode, Invalid> {
    let clone = match v1::CloneMode::try_from(wire) {
        Ok(v1::CloneMode::Unspecified) => CloneMode::Any,
        Ok(v1::CloneMode::Overlay) => CloneMode::Overlay,
        Ok(v1::CloneMode::Full) => CloneMode::Full,
        Err(_) => return Err(invalid(field, "is not a value of CloneMode")),
    };
    if clone != CloneMode::Any && !listed {
        return Err(invalid(field, "is for images of the catalogue only"));
    }
    Ok(clone)
}

fn check_nic(index: usize, wire: v1::Nic) -> Result<Nic, Invalid> {
    let at = |field: &str| format!("nics[{index}].{field}");
    ids::check_device_name(&wire.name).map_err(|error| invalid(at("name"), error))?;
    let plug = match network::check_port(&at, &wire)? {
        Some(_) if !wire.bridge.is_empty() => {
            return Err(invalid(at("bridge"), "must be empty with `network`"));
        }
        Some(port) => Plug::Network(port),
        None => {
            network::check_bridge(&wire.bridge).map_err(|error| invalid(at("bridge"), error))?;
            Plug::Bridge { bridge: wire.bridge }
        }
    };
    let mac = if wire.mac.is_empty() {
        String::new()
    } else {
        check_mac(&wire.mac).map_err(|rule| invalid(at("mac"), rule))?
    };
    let reserved_mbit = match wire.reserved_mbit_per_second {
        0 => None,
        _ if matches!(plug, Plug::Network(_)) => {
            let message = "is for interfaces with a `bridge`: that of a network has no uplink of its own to reserve it on";
            return Err(invalid(at("reserved_mbit_per_second"), message));
        }
        mbit if mbit <= MAX_RESERVED_MBIT => Some(mbit),
        mbit => {
            let message = format!("must be 0 (none) to {MAX_RESERVED_MBIT}, got {mbit}");
            return Err(invalid(at("reserved_mbit_per_second"), message));
        }
    };
    Ok(Nic {
        name: wire.name,
        plug,
        mac,
        reserved_mbit,
    })
}

fn check_kernel(wire: v1::KernelBoot) -> Result<KernelBoot, Invalid> {
    ids::check_file_name(&wire.kernel).map_err(|error| invalid("kernel_boot.kernel", error))?;
    let initrd = Some(wire.initrd).filter(|initrd| !initrd.is_empty());
    if let Some(initrd) = &initrd {
        ids::check_file_name(initrd).map_err(|error| invalid("kernel_boot.initrd", error))?;
    }
    let printable = wire.cmdline.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if wire.cmdline.len() > 2048 || !printable {
        return Err(invalid(
            "kernel_boot.cmdline",
            "must be at most 2048 printable ASCII characters",
        ));
    }
    Ok(KernelBoot {
        kernel: wire.kernel,
        initrd,
        cmdline: wire.cmdline,
    })
}

impl From<Disk> for v1::Disk {
    fn from(disk: Disk) -> Self {
        Self {
            name: disk.name,
            size_mib: disk.size_mib,
            pool: disk.pool,
            image: disk.image.unwrap_or_default(),
            format: match disk.format {
                DiskFormat::Qcow2 => v1::DiskFormat::Qcow2,
                DiskFormat::Raw => v1::DiskFormat::Raw,
            }
            .into(),
            image_digest: disk.digest.map(String::from).unwrap_or_default(),
            clone_mode: match disk.clone_mode {
                CloneMode::Any => v1::CloneMode::Unspecified,
                CloneMode::Overlay => v1::CloneMode::Overlay,
                CloneMode::Full => v1::CloneMode::Full,
            }
            .into(),
            volume: disk
                .volume
                .as_ref()
                .map(|volume| volume.name.to_string())
                .unwrap_or_default(),
            volume_uid: disk
                .volume
                .and_then(|volume| volume.id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            limits: (!disk.limits.is_none()).then(|| disk.limits.into()),
            backup: disk.backup.map(|backup| v1::DiskBackup {
                uid: backup.id.to_string(),
                pool: backup.pool,
                disk: backup.disk,
            }),
        }
    }
}

impl From<Spec> for v1::VmSpec {
    fn from(spec: Spec) -> Self {
        let Fitting { cpus, pages, numa } = spec.fitting;
        Self {
            cpu_policy: v1::CpuPolicy::from(cpus).into(),
            huge_page_kib: pages.map_or(0, PageSize::kib),
            numa_policy: v1::NumaPolicy::from(numa).into(),
            numa_nodes: numa.nodes_named(),
            devices: device::to_wire(spec.devices),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disks: spec.disks.into_iter().map(Into::into).collect(),
            nics: spec.nics.into_iter().map(Into::into).collect(),
            kernel_boot: spec.kernel_boot.map(|boot| v1::KernelBoot {
                kernel: boot.kernel,
                initrd: boot.initrd.unwrap_or_default(),
                cmdline: boot.cmdline,
            }),
            restart_policy: v1::RestartPolicy::from(spec.restart_policy).into(),
            ha_tier: v1::HaTier::Local.into(),
            host_selector: spec.host_selector.into_iter().collect(),
            first_boot: spec.first_boot.map(Into::into),
            firmware: v1::Firmware::from(spec.firmware).into(),
            tpm: spec.tpm,
            max_vcpus: spec.max_vcpus.unwrap_or_default(),
            max_memory_mib: spec.max_memory_mib.unwrap_or_default(),
        }
    }
}

impl From<Nic> for v1::Nic {
    fn from(nic: Nic) -> Self {
        let mut wire = Self {
            name: nic.name,
            mac: nic.mac,
            reserved_mbit_per_second: nic.reserved_mbit.unwrap_or_default(),
            ..Self::default()
        };
        match nic.plug {
            Plug::Bridge { bridge } => wire.bridge = bridge,
            Plug::Network(port) => network::port_to_wire(port, &mut wire),
        }
        wire
    }
}

impl From<v1::Firmware> for Firmware {
    fn from(wire: v1::Firmware) -> Self {
        match wire {
            v1::Firmware::Unspecified | v1::Firmware::Bios => Self::Bios,
            v1::Firmware::Uefi => Self::Uefi,
            v1::Firmware::UefiSecureBoot => Self::UefiSecureBoot,
        }
    }
}

impl From<Firmware> for v1::Firmware {
    fn from(firmware: Firmware) -> Self {
        match firmware {
            // In words: what is said of a VM may be sent again, where nothing said means what its image has.
            Firmware::Bios => Self::Bios,
            Firmware::Uefi => Self::Uefi,
            Firmware::UefiSecureBoot => Self::UefiSecureBoot,
        }
    }
}

impl From<v1::RestartPolicy> for RestartPolicy {
    fn from(wire: v1::RestartPolicy) -> Self {
        match wire {
            v1::RestartPolicy::Unspecified | v1::RestartPolicy::OnFailure => Self::OnFailure,
            v1::RestartPolicy::Always => Self::Always,
            v1::RestartPolicy::Never => Self::Never,
        }
    }
}

impl From<RestartPolicy> for v1::RestartPolicy {
    fn from(policy: RestartPolicy) -> Self {
        match policy {
            RestartPolicy::OnFailure => Self::OnFailure,
            RestartPolicy::Always => Self::Always,
            RestartPolicy::Never => Self::Never,
        }
    }
}

impl From<PowerState> for v1::PowerState {
    fn from(state: PowerState) -> Self {
        match state {
            PowerState::Running => Self::Running,
            PowerState::Stopped => Self::Stopped,
            PowerState::Paused => Self::Paused,
        }
    }
}

impl TryFrom<v1::PowerState> for PowerState {
    type Error = Invalid;

    fn try_from(wire: v1::PowerState) -> Result<Self, Invalid> {
        match wire {
            v1::PowerState::Running => Ok(Self::Running),
            v1::PowerState::Stopped => Ok(Self::Stopped),
            v1::PowerState::Paused => Ok(Self::Paused),
            v1::PowerState::Unspecified => Err(invalid("power_state", "must be given")),
        }
    }
}

impl From<PowerReason> for v1::PowerReason {
    fn from(reason: PowerReason) -> Self {
        match reason {
            PowerReason::Unknown => Self::Unspecified,
            PowerReason::Requested => Self::Requested,
            PowerReason::GuestShutdown => Self::GuestShutdown,
            PowerReason::Crashed => Self::Crashed,
            PowerReason::Migrated => Self::Migrated,
            PowerReason::IoError => Self::IoError,
            PowerReason::HostReboot => Self::HostReboot,
            PowerReason::External => Self::External,
        }
    }
}

impl From<v1::PowerReason> for PowerReason {
    fn from(wire: v1::PowerReason) -> Self {
        match wire {
            v1::PowerReason::Unspecified => Self::Unknown,
            v1::PowerReason::Requested => Self::Requested,
            v1::PowerReason::GuestShutdown => Self::GuestShutdown,
            v1::PowerReason::Crashed => Self::Crashed,
            v1::PowerReason::Migrated => Self::Migrated,
            v1::PowerReason::IoError => Self::IoError,
            v1::PowerReason::HostReboot => Self::HostReboot,
            v1::PowerReason::External => Self::External,
        }
    }
}

impl From<v1::RestartMode> for RestartMode {
    fn from(wire: v1::RestartMode) -> Self {
        match wire {
            v1::RestartMode::Unspecified | v1::RestartMode::Reboot => Self::Reboot,
            v1::RestartMode::Reset => Self::Reset,
        }
    }
}

impl From<RestartMode> for v1::RestartMode {
    fn from(mode: RestartMode) -> Self {
        match mode {
            RestartMode::Reboot => Self::Reboot,
            RestartMode::Reset => Self::Reset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> v1::VmSpec {
        v1::VmSpec {
            vcpus: 2,
            memory_mib: 512,
            disks: vec![v1::Disk {
                name: "root".into(),
                size_mib: 1024,
                ..Default::default()
            }],
            nics: vec![v1::Nic {
                name: "eth0".into(),
                bridge: "br0".into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_minimal_spec_gets_the_documented_defaults() {
        let spec = Spec::try_from(wire()).unwrap();
        assert_eq!(spec.disks[0].pool, "local");
        assert_eq!(spec.disks[0].format, DiskFormat::Qcow2);
        assert_eq!(spec.restart_policy, RestartPolicy::OnFailure);
    }

    #[test]
    fn a_spec_survives_the_wire_unchanged() {
        let mut spec = Spec::try_from(wire()).unwrap();
        spec.fill_in(VmId::from_uuid(uuid::Uuid::from_u128(7)));
        assert_eq!(Spec::try_from(v1::VmSpec::from(spec.clone())).unwrap(), spec);
    }

    #[test]
    fn an_interface_in_a_network_survives_the_wire_and_the_store_unchanged() {
        let mut spec = wire();
        spec.nics.push(v1::Nic {
            name: "eth1".into(),
            network: "field".into(),
            ipv4_address: "10.20.0.7".into(),
            security_groups: vec!["ssh".into()],
            send_limit_mbit_per_second: 100,
            mac: "52:54:00:00:00:01".into(),
            ..Default::default()
        });
        spec.max_vcpus = 8;
        spec.nics[0].reserved_mbit_per_second = 500;
        let spec = Spec::try_from(spec).unwrap();
        assert!(spec.features().any(|feature| feature == GuestFeature::Network));
        assert_eq!(Spec::try_from(v1::VmSpec::from(spec.clone())).unwrap(), spec);
        let stored = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&stored).unwrap(), spec, "{stored}");
    }

    #[test]
    fn a_disk_from_the_catalogue_may_leave_its_size_to_the_image() {
        let mut spec = wire();
        spec.disks[0].image = "debian:12".into();
        spec.disks[0].size_mib = 0;
        spec.disks[0].image_digest = "ab".repeat(32);
        spec.disks[0].clone_mode = v1::CloneMode::Overlay.into();
        let spec = Spec::try_from(spec).unwrap();
        assert_eq!(Spec::try_from(v1::VmSpec::from(spec.clone())).unwrap(), spec);
    }

    #[test]
    fn each_bad_field_is_refused_by_its_name() {
        type Change = fn(&mut v1::VmSpec);
        let cases: &[(&str, Change)] = &[
            ("vcpus", |s| s.vcpus = 0),
            ("vcpus", |s| s.vcpus = 255),
            ("memory_mib", |s| s.memory_mib = 31),
            ("memory_mib", |s| s.memory_mib = u64::MAX),
            ("disks", |s| s.disks = vec![]),
            ("disks", |s| {
                s.disks = vec![s.disks[0].clone(), s.disks[0].clone()]
            }),
            ("disks", |s| s.disks = vec![s.disks[0].clone(); 25]),
            ("disks[0].name", |s| s.disks[0].name = "a/b".into()),
            ("disks[0].size_mib", |s| s.disks[0].size_mib = 0),
            ("disks[0].pool", |s| s.disks[0].pool = "../x".into()),
            ("disks[0].image", |s| s.disks[0].image = "../../etc/shadow".into()),
            ("disks[0].format", |s| s.disks[0].format = 99),
            ("disks[0].image", |s| s.disks[0].image = "debian:../x".into()),
            ("disks[0].clone_mode", |s| s.disks[0].clone_mode = 99),
            ("disks[0].clone_mode", |s| {
                s.disks[0].clone_mode = v1::CloneMode::Full.into()
            }),
            ("disks[0].image_digest", |s| {
                s.disks[0].image_digest = "ab".repeat(32)
            }),
            ("disks[0].image_digest", |s| {
                s.disks[0].image = "debian".into();
                s.disks[0].image_digest = "../x".into();
            }),
            ("nics[0].bridge", |s| s.nics[0].bridge = "br0'/><x".into()),
            ("nics[0].bridge", |s| s.nics[0].network = "field".into()),
            ("nics[0].ipv4_address", |s| {
                s.nics[0].ipv4_address = "10.0.0.1".into()
            }),
            ("nics[0].network", |s| s.nics[0].network = "../field".into()),
            ("nics[0].ipv6_address", |s| {
                s.nics[0].network = "field".into();
                s.nics[0].ipv6_address = "10.0.0.1".into();
            }),
            ("nics[0].security_groups", |s| {
                s.nics[0].network = "field".into();
                s.nics[0].security_groups = vec!["a;b".into()];
            }),
            ("nics[0].send_limit_mbit_per_second", |s| {
                s.nics[0].network = "field".into();
                s.nics[0].send_limit_mbit_per_second = 1_000_001;
            }),
            ("nics[0].reserved_mbit_per_second", |s| {
                s.nics[0].reserved_mbit_per_second = 1_000_001;
            }),
            ("nics[0].reserved_mbit_per_second", |s| {
                (s.nics[0].bridge, s.nics[0].network) = (String::new(), "field".into());
                s.nics[0].reserved_mbit_per_second = 10;
            }),
            ("max_vcpus", |s| s.max_vcpus = 1),
            ("max_vcpus", |s| s.max_vcpus = 255),
            ("max_memory_mib", |s| s.max_memory_mib = 511),
            ("nics[0].mac", |s| s.nics[0].mac = "ff:ff:ff:ff:ff:ff".into()),
            ("nics[0].mac", |s| s.nics[0].mac = "00:00:00:00:00:00".into()),
            ("nics[0].mac", |s| s.nics[0].mac = "52:54:00:1:2:3".into()),
            ("kernel_boot.kernel", |s| {
                s.kernel_boot = Some(v1::KernelBoot {
                    kernel: "/boot/vmlinuz".into(),
                    ..Default::default()
                })
            }),
            ("kernel_boot.cmdline", |s| {
                s.kernel_boot = Some(v1::KernelBoot {
                    kernel: "k".into(),
                    cmdline: "a\nb".into(),
                    ..Default::default()
                });
            }),
            ("restart_policy", |s| s.restart_policy = 77),
            ("ha_tier", |s| s.ha_tier = 77),
            ("firmware", |s| s.firmware = 77),
            ("host_selector", |s| {
                s.host_selector.insert("a b".into(), String::new());
            }),
        ];
        for (field, change) in cases {
            let mut spec = wire();
            change(&mut spec);
            let error = Spec::try_from(spec).expect_err(field);
            assert_eq!(&error.field, field);
        }
    }
}
