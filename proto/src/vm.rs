//! What a VM is: the validated form of `dalgu.v1.VmSpec` and its parts.
//!
//! A [`Spec`] is made from the wire by [`Spec::try_from`], which fills in defaults and refuses what the .proto
//! forbids; after that nobody checks it again. It is also the form in which the controller's store and the agent's
//! ledger keep it, so fields may be added with a serde default but never change their meaning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    host::GuestFeature,
    ids,
    ids::{BackupId, VmId, VolumeId, VolumeName},
    image::Digest,
    network::Port,
};

mod device;
pub mod first_boot;
mod numa;
mod wire;

pub use device::{Device, Devices, PciAddress};
pub use first_boot::FirstBoot;
pub use numa::{CpuPolicy, Fitting, NumaPlace, NumaPolicy, PageSize};

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
/// Most operations per second that a disk can be limited to.
pub const MAX_DISK_IOPS: u64 = 10_000_000;
/// Most MiB per second that a disk can be limited to.
pub const MAX_DISK_MIB_PER_SECOND: u64 = 1_000_000;
/// Most Mbit per second that an interface can reserve.
pub const MAX_RESERVED_MBIT: u32 = 1_000_000;
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

/// How a disk is made from an image of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CloneMode {
    /// As an overlay where that is possible, else as a copy; never in a VM that has been created.
    #[default]
    Any,
    /// Holds only what differs from the image.
    Overlay,
    /// The image is copied.
    Full,
}

impl CloneMode {
    fn is_any(&self) -> bool {
        *self == Self::Any
    }
}

/// The volume of the site that a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRef {
    /// Its name.
    pub name: VolumeName,
    /// Its id; `None` only before the controller has looked it up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<VolumeId>,
    /// The format that was said beside its name, for the controller to compare when it looks it up. Said nowhere else: a disk's own
    /// cannot tell what was said from what is taken where nothing is.
    #[serde(skip)]
    pub format: Option<DiskFormat>,
}

/// How much a guest may read and write on a disk; `None` for as much as it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskLimits {
    /// Reads per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_iops: Option<u64>,
    /// Writes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_iops: Option<u64>,
    /// Reads in MiB per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_mib_per_second: Option<u64>,
    /// Writes in MiB per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_mib_per_second: Option<u64>,
}

impl DiskLimits {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// The part of a backup that a disk is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRef {
    /// The backup.
    pub id: BackupId,
    /// Pool that its files are in.
    pub pool: String,
    /// Name of the disk in it.
    pub disk: String,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Name within the VM.
    pub name: String,
    /// Capacity in MiB. 0 only with an image of the catalogue, or of a volume, before the controller has looked it up: its own.
    pub size_mib: u64,
    /// Pool of the host that holds it. Empty only of a volume before the controller has looked it up.
    pub pool: String,
    /// What it starts from: a file in the image directory, or an image of the catalogue, see
    /// [`crate::image::Reference::is_meant`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// File format.
    #[serde(default)]
    pub format: DiskFormat,
    /// Digest of the catalogue's image; filled in when the VM is created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// How it is made from that.
    #[serde(default, skip_serializing_if = "CloneMode::is_any")]
    pub clone_mode: CloneMode,
    /// The volume of the site that it is; `None` for a disk that is the VM's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeRef>,
    /// How much the guest may read and write there.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
    /// The backup that it is made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupRef>,
}

impl Disk {
    /// The volume of the site that it is.
    pub fn volume_id(&self) -> Option<VolumeId> {
        self.volume.as_ref()?.id
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name within the VM.
    pub name: String,
    /// What it plugs into.
    #[serde(flatten)]
    pub plug: Plug,
    /// MAC address, `52:54:00:…` unless the caller chose one. Empty only before [`Spec::fill_in`].
    pub mac: String,
    /// Bandwidth that it has for itself on the uplink of its bridge, in Mbit per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved_mbit: Option<u32>,
}

/// What a network interface plugs into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Plug {
    /// A bridge of the host, as it is.
    Bridge {
        /// Its name.
        bridge: String,
    },
    /// A network of the site.
    Network(Port),
}

impl Nic {
    /// How it plugs into a network of the site, if it does.
    pub const fn port(&self) -> Option<&Port> {
        match &self.plug {
            Plug::Network(port) => Some(port),
            Plug::Bridge { .. } => None,
        }
    }

    /// The host's bridge that it plugs into, if it does.
    pub fn bridge(&self) -> Option<&str> {
        match &self.plug {
            Plug::Bridge { bridge } => Some(bridge),
            Plug::Network(_) => None,
        }
    }
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

/// What starts a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// UEFI that starts what it is given.
    Uefi,
    /// UEFI that starts what is signed.
    UefiSecureBoot,
}

impl Firmware {
    /// Whether it is what a VM has where nothing is said.
    pub fn is_bios(&self) -> bool {
        *self == Self::Bios
    }
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
    /// What its guest is told at the first boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_boot: Option<FirstBoot>,
    /// What starts it.
    #[serde(default, skip_serializing_if = "Firmware::is_bios")]
    pub firmware: Firmware,
    /// It has a TPM in software.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tpm: bool,
    /// Most virtual processors without a restart; `None`: what it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// Most memory without a restart, in MiB; `None`: what it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u64>,
    /// What it asks of its host's processors, huge pages and NUMA nodes.
    #[serde(default, skip_serializing_if = "Fitting::is_none")]
    pub fitting: Fitting,
    /// PCI devices of its host that it asks for: how many of each class.
    #[serde(default, skip_serializing_if = "Devices::is_empty")]
    pub devices: Devices,
}

impl Spec {
    /// Most virtual processors without a restart.
    pub fn most_vcpus(&self) -> u32 {
        self.max_vcpus.unwrap_or(self.vcpus)
    }

    /// Most memory without a restart, in MiB.
    pub fn most_memory_mib(&self) -> u64 {
        self.max_memory_mib.unwrap_or(self.memory_mib)
    }

    /// Bandwidth that it reserves, in Mbit per second, with the bridge on which it does.
    pub fn bandwidth(&self) -> impl Iterator<Item = (&str, u64)> {
        let nics = self.nics.iter();
        nics.filter_map(|nic| Some((nic.bridge()?, u64::from(nic.reserved_mbit?))))
    }

    /// Whether a domain of it would be made of the same parts; a host's own rules for it aside.
    pub fn same_hardware(&self, other: &Self) -> bool {
        let bare = |spec: &Self| Self {
            restart_policy: RestartPolicy::default(),
            host_selector: BTreeMap::new(),
            ..spec.clone()
        };
        bare(self) == bare(other)
    }

    /// Everything that a host keeps for it: its disks, and after them the volume of its first boot.
    pub fn volumes(&self) -> impl Iterator<Item = &Disk> + Clone {
        let medium = self.first_boot.as_ref().map(|first_boot| &first_boot.medium);
        self.disks.iter().chain(medium)
    }

    /// What its host must have besides room.
    pub fn features(&self) -> impl Iterator<Item = GuestFeature> {
        let firmware = match self.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(GuestFeature::Uefi),
            Firmware::UefiSecureBoot => Some(GuestFeature::UefiSecureBoot),
        };
        let first_boot = self.first_boot.as_ref().map(|_| GuestFeature::FirstBoot);
        let tpm = self.tpm.then_some(GuestFeature::Tpm);
        let network = self.nics.iter().any(|nic| nic.port().is_some());
        let network = network.then_some(GuestFeature::Network);
        let hot =
            (self.max_vcpus.is_some() || self.max_memory_mib.is_some()).then_some(GuestFeature::HotChange);
        let disks = || self.disks.iter();
        let volume = disks()
            .any(|disk| disk.volume.is_some())
            .then_some(GuestFeature::Volume);
        let limits = disks()
            .any(|disk| !disk.limits.is_none())
            .then_some(GuestFeature::DiskChange);
        let backup = disks()
            .any(|disk| disk.backup.is_some())
            .then_some(GuestFeature::Backup);
        let numa = (!self.fitting.is_none()).then_some(GuestFeature::Numa);
        let devices = (!self.devices.is_empty()).then_some(GuestFeature::PciDevice);
        [
            first_boot, firmware, tpm, network, hot, volume, limits, backup, numa, devices,
        ]
        .into_iter()
        .flatten()
    }

    /// Fills in what follows from the VM's identity: MAC addresses that were left to Dalgu.
    pub fn fill_in(&mut self, id: VmId) {
        self.fill_in_again(id, 0);
    }

    /// The same with other addresses for each number of `attempt`, where those before are taken; 0 is the first.
    pub fn fill_in_again(&mut self, id: VmId, attempt: u8) {
        for nic in &mut self.nics {
            if nic.mac.is_empty() {
                nic.mac = default_mac(id, &nic.name, attempt);
            }
        }
    }

    /// Ordinary memory that a host sets aside for the VM, in MiB: the guest's memory, where that is not made of huge pages, and what
    /// QEMU needs besides.
    ///
    /// The overhead is 64 MiB for the process, 1 MiB per virtual processor and 1/128 of the guest's memory for page
    /// tables and migration bitmaps: the shape of the KubeVirt project's published estimate, rounded up.
    pub fn reserved_memory_mib(&self) -> u64 {
        let overhead = 64 + u64::from(self.vcpus) + self.memory_mib.div_ceil(128);
        match self.fitting.pages {
            None => self.memory_mib.saturating_add(overhead),
            Some(_) => overhead,
        }
    }
}

/// A MAC address in QEMU's range, made from the VM, the interface's name and the attempt by FNV-1a; the same input gives the same
/// address on every host.
fn default_mac(id: VmId, nic: &str, attempt: u8) -> String {
    // No name ends with such a byte.
    let attempt = (attempt > 0).then_some(&attempt);
    let hash = id
        .uuid()
        .as_bytes()
        .iter()
        .chain(nic.as_bytes())
        .chain(attempt)
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let [.., a, b, c] = (hash ^ (hash >> 32)).to_be_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

pub(crate) fn check_mac(value: &str) -> Result<String, &'static str> {
    const RULE: &str = "must be six pairs of hexadecimal digits separated by ':', a unicast address";
    let octets: Vec<u8> = value
        .split(':')
        .map(|part| {
            // A sign is not a digit.
            if part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_depends_on_the_vm_the_interface_and_the_attempt_only() {
        let (a, b) = (
            VmId::from_uuid(uuid::Uuid::from_u128(1)),
            VmId::from_uuid(uuid::Uuid::from_u128(2)),
        );
        assert_eq!(default_mac(a, "eth0", 0), default_mac(a, "eth0", 0));
        assert_ne!(default_mac(a, "eth0", 0), default_mac(a, "eth1", 0));
        assert_ne!(default_mac(a, "eth0", 0), default_mac(b, "eth0", 0));
        assert_ne!(default_mac(a, "eth0", 0), default_mac(a, "eth0", 1));
        // What was given before there were attempts.
        assert_eq!(default_mac(a, "eth0", 0), "52:54:00:ca:26:45");
        assert_eq!(
            check_mac(&default_mac(a, "eth0", 0)),
            Ok(default_mac(a, "eth0", 0))
        );
    }

    #[test]
    fn a_mac_address_is_made_of_digits_alone() {
        for wrong in [
            "+2:54:00:00:00:01",
            "52:54:00:00:00:+1",
            "5:54:00:00:00:01",
            "03:00:00:00:00:01",
        ] {
            assert!(check_mac(wrong).is_err(), "{wrong}");
        }
    }
}
