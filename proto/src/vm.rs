//! What a VM is: the validated form of `dalgu.v1.VmSpec` and its parts.
//!
//! A [`Spec`] is made from the wire by [`Spec::try_from`], which fills in defaults and refuses what the .proto
//! forbids; after that nobody checks it again. It is also the form in which the controller's store and the agent's
//! ledger keep it, so fields may be added with a serde default but never change their meaning.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{ids, ids::VmId, v1};

/// Most virtual processors of a VM.
pub const MAX_VCPUS: u32 = 254;
/// Least and most memory of a VM, in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u64> = 32..=12_582_912;
/// Least and most size of a disk, in MiB.
pub const DISK_MIB: std::ops::RangeInclusive<u64> = 1..=67_108_864;
/// Most disks of a VM.
pub const MAX_DISKS: usize = 24;
/// Most network interfaces of a VM.
pub const MAX_NICS: usize = 16;
/// Most labels of an object.
pub const MAX_LABELS: usize = 64;
/// Pool used where none is named.
pub const DEFAULT_POOL: &str = "local";

/// A field that does not hold an allowed value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    /// Path of the field below the specification, for example `disks[0].size_mib`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

fn invalid(field: impl Into<String>, message: impl ToString) -> Invalid {
    Invalid {
        field: field.into(),
        message: message.to_string(),
    }
}

/// What a VM's processors do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerState {
    /// Executing.
    Running,
    /// Powered off.
    Stopped,
    /// Frozen with memory kept.
    Paused,
}

/// Why a VM is in the power state observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerReason {
    /// Nothing special is known.
    #[default]
    Unknown,
    /// It did what was asked.
    Requested,
    /// The guest shut itself down.
    GuestShutdown,
    /// QEMU ended unexpectedly or the guest panicked.
    Crashed,
    /// Arrived by live migration.
    Migrated,
    /// Paused because of an I/O error.
    IoError,
    /// Lost with a restart of the host.
    HostReboot,
    /// Changed outside Dalgu.
    External,
}

/// When an agent starts a VM again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// After a crash or a reboot of the host.
    #[default]
    OnFailure,
    /// Also when the guest shut itself down.
    Always,
    /// Never.
    Never,
}

/// How to restart a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartMode {
    /// The guest is asked.
    #[default]
    Reboot,
    /// As by the reset button.
    Reset,
}

/// Format of a disk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// QEMU's copy-on-write format.
    #[default]
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl DiskFormat {
    /// The name QEMU and libvirt use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Name within the VM.
    pub name: String,
    /// Capacity in MiB.
    pub size_mib: u64,
    /// Pool of the host that holds it.
    pub pool: String,
    /// File in the image directory to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// File format.
    #[serde(default)]
    pub format: DiskFormat,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name within the VM.
    pub name: String,
    /// Linux bridge on the host.
    pub bridge: String,
    /// MAC address, `52:54:00:…` unless the caller chose one. Empty only before [`Spec::fill_in`].
    pub mac: String,
}

/// Direct boot of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelBoot {
    /// File of the kernel in the image directory.
    pub kernel: String,
    /// File of the initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Command line.
    #[serde(default)]
    pub cmdline: String,
}

/// What a VM is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disks in boot order.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network interfaces.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Kernel to boot instead of the first disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_boot: Option<KernelBoot>,
    /// When its agent starts it again.
    #[serde(default)]
    pub restart_policy: RestartPolicy,
    /// Labels a host must bear.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host_selector: BTreeMap<String, String>,
}

impl Spec {
    /// Fills in what follows from the VM's identity: MAC addresses that were left to Dalgu.
    pub fn fill_in(&mut self, id: VmId) {
        for nic in &mut self.nics {
            if nic.mac.is_empty() {
                nic.mac = default_mac(id, &nic.name);
            }
        }
    }

    /// Memory that a host sets aside for the VM, in MiB: the guest's memory and what QEMU needs besides.
    ///
    /// The overhead is 64 MiB for the process, 1 MiB per virtual processor and 1/128 of the guest's memory for page
    /// tables and migration bitmaps: the shape of the KubeVirt project's published estimate, rounded up.
    pub fn reserved_memory_mib(&self) -> u64 {
        self.memory_mib + 64 + u64::from(self.vcpus) + self.memory_mib.div_ceil(128)
    }
}

/// A MAC address in QEMU's range, made from the VM and the interface's name by FNV-1a; the same input gives the same
/// address on every host.
fn default_mac(id: VmId, nic: &str) -> String {
    let hash = id
        .uuid()
        .as_bytes()
        .iter()
        .chain(nic.as_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let [.., a, b, c] = (hash ^ (hash >> 32)).to_be_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

fn check_mac(value: &str) -> Result<String, &'static str> {
    const RULE: &str = "must be six pairs of hexadecimal digits separated by ':', a unicast address";
    let octets: Vec<u8> = value
        .split(':')
        .map(|part| {
            if part.len() == 2 {
                u8::from_str_radix(part, 16).ok()
            } else {
                None
            }
        })
        .collect::<Option<_>>()
        .ok_or(RULE)?;
    let unicast = octets.first().is_some_and(|first| first & 1 == 0);
    if octets.len() == 6 && unicast && octets.iter().any(|octet| *octet != 0) {
        Ok(value.to_ascii_lowercase())
    } else {
        Err(RULE)
    }
}

/// Checks a set of labels or a selector.
pub fn check_labels<'a>(
    labels: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<BTreeMap<String, String>, String> {
    let mut checked = BTreeMap::new();
    for (key, value) in labels {
        ids::check_label(key, true).map_err(|error| error.to_string())?;
        ids::check_label(value, false).map_err(|error| error.to_string())?;
        checked.insert(key.clone(), value.clone());
    }
    if checked.len() > MAX_LABELS {
        return Err(format!(
            "at most {MAX_LABELS} labels are allowed, got {}",
            checked.len()
        ));
    }
    Ok(checked)
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
        Ok(Self {
            vcpus: wire.vcpus,
            memory_mib: wire.memory_mib,
            disks,
            nics,
            kernel_boot,
            restart_policy,
            host_selector,
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
    if !DISK_MIB.contains(&wire.size_mib) {
        let message = format!(
            "must be {} to {} MiB, got {}",
            DISK_MIB.start(),
            DISK_MIB.end(),
            wire.size_mib
        );
        return Err(invalid(at("size_mib"), message));
    }
    let pool = if wire.pool.is_empty() {
        DEFAULT_POOL.to_owned()
    } else {
        wire.pool
    };
    ids::check_device_name(&pool).map_err(|error| invalid(at("pool"), error))?;
    let image = Some(wire.image).filter(|image| !image.is_empty());
    if let Some(image) = &image {
        ids::check_file_name(image).map_err(|error| invalid(at("image"), error))?;
    }
    let format = match v1::DiskFormat::try_from(wire.format) {
        Ok(v1::DiskFormat::Raw) => DiskFormat::Raw,
        Ok(_) => DiskFormat::Qcow2,
        Err(_) => return Err(invalid(at("format"), "is not a value of DiskFormat")),
    };
    Ok(Disk {
        name: wire.name,
        size_mib: wire.size_mib,
        pool,
        image,
        format,
    })
}

fn check_nic(index: usize, wire: v1::Nic) -> Result<Nic, Invalid> {
    let at = |field: &str| format!("nics[{index}].{field}");
    ids::check_device_name(&wire.name).map_err(|error| invalid(at("name"), error))?;
    // A Linux interface name: 1 to 15 bytes; the stricter file-name rule keeps out what the kernel would allow.
    if wire.bridge.len() > 15 {
        return Err(invalid(at("bridge"), "must be at most 15 characters"));
    }
    ids::check_file_name(&wire.bridge).map_err(|error| invalid(at("bridge"), error))?;
    let mac = if wire.mac.is_empty() {
        String::new()
    } else {
        check_mac(&wire.mac).map_err(|rule| invalid(at("mac"), rule))?
    };
    Ok(Nic {
        name: wire.name,
        bridge: wire.bridge,
        mac,
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

impl From<Spec> for v1::VmSpec {
    fn from(spec: Spec) -> Self {
        let disk = |disk: Disk| v1::Disk {
            name: disk.name,
            size_mib: disk.size_mib,
            pool: disk.pool,
            image: disk.image.unwrap_or_default(),
            format: match disk.format {
                DiskFormat::Qcow2 => v1::DiskFormat::Qcow2,
                DiskFormat::Raw => v1::DiskFormat::Raw,
            }
            .into(),
        };
        Self {
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disks: spec.disks.into_iter().map(disk).collect(),
            nics: spec
                .nics
                .into_iter()
                .map(|nic| v1::Nic {
                    name: nic.name,
                    bridge: nic.bridge,
                    mac: nic.mac,
                })
                .collect(),
            kernel_boot: spec.kernel_boot.map(|boot| v1::KernelBoot {
                kernel: boot.kernel,
                initrd: boot.initrd.unwrap_or_default(),
                cmdline: boot.cmdline,
            }),
            restart_policy: v1::RestartPolicy::from(spec.restart_policy).into(),
            ha_tier: v1::HaTier::Local.into(),
            host_selector: spec.host_selector.into_iter().collect(),
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
                mac: String::new(),
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
            ("nics[0].bridge", |s| s.nics[0].bridge = "br0'/><x".into()),
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

    #[test]
    fn a_mac_address_depends_on_the_vm_and_the_interface_only() {
        let (a, b) = (
            VmId::from_uuid(uuid::Uuid::from_u128(1)),
            VmId::from_uuid(uuid::Uuid::from_u128(2)),
        );
        assert_eq!(default_mac(a, "eth0"), default_mac(a, "eth0"));
        assert_ne!(default_mac(a, "eth0"), default_mac(a, "eth1"));
        assert_ne!(default_mac(a, "eth0"), default_mac(b, "eth0"));
        assert_eq!(check_mac(&default_mac(a, "eth0")), Ok(default_mac(a, "eth0")));
    }
}
