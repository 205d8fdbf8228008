//! The domain XML of Dalgu's VMs: a typed model, and how it is written. Pure. `read` is its inverse.
//!
//! What the choices are for:
//! - `q35` with spare PCIe root ports, so that disks and interfaces can be plugged in later without a new board.
//! - Processor under KVM: `host-model`, the host's features by name. A VM then migrates to hosts that have them all,
//!   which placement must see to. Under TCG: `qemu64`, the same everywhere.
//! - Disk cache `none` where the pool's file system takes O_DIRECT: what the guest flushed is on disk, and a migration
//!   between hosts that share the pool sees no stale pages. `writeback` elsewhere, which also keeps every flush.
//! - The serial line goes to a file, appended: the log goes on after a migration or a restart.
//! - Firmware is chosen by libvirt, by what it must do and not by a path: hosts differ in where they keep it. Secure boot needs the
//!   machine's SMM, so that the guest cannot change what is trusted. NVRAM lies in libvirt's own directory, by the VM's id: by its
//!   name, as libvirt would call it, another VM of that name would be given it. What is left of it after a migration, `storage`
//!   removes; the TPM's state libvirt removes itself.
//! - Where more processors or memory are to be had without a restart, all but the first processor can be unplugged, and memory
//!   beyond what the guest starts with is a virtio-mem device's: the guest cannot use what it was not given, whether or not it has
//!   a driver for it, as it could with a balloon.
//! - A channel for an agent in the guest, which can freeze file systems for a snapshot; a guest without one has a device more.
//! - A crashed guest ends (`on_crash`) and says so (`panic` device): restarting it is the agent's business.

use std::path::{Path, PathBuf};

use dalgu_proto::vm::{DiskFormat, DiskLimits, Firmware, PciAddress, first_boot::MEDIUM};
use uuid::Uuid;

use super::{
    pins::Pinning,
    tree::{Element, XmlError},
};
use crate::hypervisor::{Mark, SPARE_PORTS};

/// Namespace of Dalgu's element in a domain's metadata; the number rises when its meaning changes.
pub const NAMESPACE: &str = "urn:dalgu:domain:1";
/// Prefix used for it.
pub const PREFIX: &str = "dalgu";
/// The device by which memory comes and goes while the guest runs.
pub const MEMORY_ALIAS: &str = "ua-memory";
/// What that device gives and takes at once, in MiB: a huge page.
pub const MEMORY_BLOCK_MIB: u64 = 2;
/// The channel of the agent in a guest, by the name that QEMU's own looks for.
pub const GUEST_AGENT: &str = "org.qemu.guest_agent.0";

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor's virtualisation.
    Kvm,
    /// QEMU's translation.
    Tcg,
    /// libvirt's test driver: nothing.
    Test,
}

impl Accelerator {
    /// Its name for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Test => "test",
        }
    }

    pub(super) const fn domain_type(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "qemu",
            Self::Test => "test",
        }
    }
}

/// How a disk's writes are cached on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Past the page cache.
    None,
    /// Through the page cache.
    Writeback,
}

impl Cache {
    /// libvirt's word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
        }
    }
}

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskModel {
    /// Name within the VM.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// The file's format.
    pub format: DiskFormat,
    /// How writes are cached.
    pub cache: Cache,
    /// How much the guest may read and write there.
    pub limits: DiskLimits,
    /// The files behind it, from the next one to the last.
    pub backing: Vec<BackingModel>,
}

/// A file behind a disk's own: an older layer of it, or an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingModel {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// It is an image, which other disks have too.
    pub image: bool,
}

/// A network interface of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicModel {
    /// Name within the VM.
    pub name: String,
    /// Bridge on the host.
    pub bridge: String,
    /// MAC address.
    pub mac: String,
    /// Its tap, where that has a name that others know; else it is made from its place.
    pub target: Option<String>,
    /// Largest packet, where the guest is told.
    pub mtu: Option<u32>,
}

/// A kernel to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelModel {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// Command line.
    pub cmdline: String,
}

/// A domain of Dalgu's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// UUID.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// What runs it.
    pub accelerator: Accelerator,
    /// Whose it is.
    pub mark: Mark,
    /// Virtual processors.
    pub vcpus: u32,
    /// Most virtual processors without a restart.
    pub max_vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Most memory without a restart, in MiB.
    pub max_memory_mib: u64,
    /// Disks in boot order; that of the first boot comes after them, and nothing boots from it.
    pub disks: Vec<DiskModel>,
    /// Network interfaces.
    pub nics: Vec<NicModel>,
    /// Kernel to boot instead of the first disk.
    pub kernel: Option<KernelModel>,
    /// Console log.
    pub console: PathBuf,
    /// What starts the guest.
    pub firmware: Firmware,
    /// The variables of its firmware; for UEFI.
    pub nvram: Option<PathBuf>,
    /// It has a TPM.
    pub tpm: bool,
    /// Where on the host it is, of one that is fitted onto NUMA nodes.
    pub pinning: Option<Pinning>,
    /// PCI devices of the host that are its own.
    pub devices: Vec<PciAddress>,
}

/// The attributes of Dalgu's element that are the mark.
pub fn mark_attributes(mark: &Mark) -> [(&'static str, String); 3] {
    [
        ("cluster", mark.cluster.to_string()),
        ("epoch", mark.epoch.to_string()),
        ("generation", mark.generation.to_string()),
    ]
}

/// Name of the guest's `index`-th disk: vda to vdz, and on with vdaa.
pub fn disk_target(index: usize) -> String {
    let letter = |index: usize| char::from(b'a' + u8::try_from(index % 26).unwrap_or(0));
    match index {
        0..26 => format!("vd{}", letter(index)),
        _ => format!("vd{}{}", letter(index / 26 - 1), letter(index)),
    }
}

/// Name of the tap device of the `index`-th interface: at most 14 of the kernel's 15 characters. The end of the UUID
/// is taken, which is random in every version in use; the beginning may be a time.
pub fn nic_target(id: Uuid, index: usize) -> String {
    let hex = id.simple().to_string();
    format!("dg{}{}", &hex[22..], index)
}

/// The user alias of a device, by which it is found again.
pub fn alias(kind: &str, name: &str) -> String {
    format!("ua-{kind}-{name}")
}

fn path_text(path: &Path) -> Result<&str, XmlError> {
    path.to_str().ok_or(XmlError::Unexpected {
        place: "a path that is not UTF-8",
    })
}

/// The files behind a disk's own. They are said, so that nobody reads them from the disk's header. An image keeps
/// its owner: libvirt would give it to QEMU's user, and other VMs have it too.
fn backing(files: &[BackingModel]) -> Result<Element, XmlError> {
    let Some((next, rest)) = files.split_first() else {
        return Ok(Element::new("backingStore"));
    };
    let owner = next.image.then(|| {
        Element::new("seclabel")
            .with("model", "dac")
            .with("relabel", "no")
    });
    let source = Element::new("source")
        .with("file", path_text(&next.path)?)
        .all(owner);
    Ok(Element::new("backingStore")
        .with("type", "file")
        .child(Element::new("format").with("type", next.format.as_str()))
        .child(source)
        .child(backing(rest)?))
}

/// Limits as libvirt names and counts them: operations, and bytes, per second; 0 for none.
pub fn io_tune(limits: &DiskLimits) -> [(&'static str, u64); 4] {
    let bytes = |mib: Option<u64>| mib.unwrap_or(0) << 20;
    [
        ("read_bytes_sec", bytes(limits.read_mib_per_second)),
        ("write_bytes_sec", bytes(limits.write_mib_per_second)),
        ("read_iops_sec", limits.read_iops.unwrap_or(0)),
        ("write_iops_sec", limits.write_iops.unwrap_or(0)),
    ]
}

fn leaf(name: &str, text: impl ToString) -> Element {
    Element::new(name).text(text)
}

fn limits(limits: &DiskLimits) -> Option<Element> {
    let set = io_tune(limits).into_iter().filter(|(_, most)| *most > 0);
    let tune = Element::new("iotune").all(set.map(|(name, most)| leaf(name, most)));
    (!limits.is_none()).then_some(tune)
}

fn mib(name: &str, mib: u64) -> Element {
    leaf(name, mib).with("unit", "MiB")
}

impl Model {
    /// The domain as libvirt wants it.
    ///
    /// # Errors
    /// If a string holds a character that XML cannot hold, or a path is not UTF-8.
    pub fn to_xml(&self) -> Result<String, XmlError> {
        let total = self.memory_mib + self.more_memory_mib();
        let power = |state: &str| Element::new(state).with("enabled", "no");
        Element::new("domain")
            .with("type", self.accelerator.domain_type())
            .child(leaf("name", &self.name))
            .child(leaf("uuid", self.id.as_hyphenated()))
            .child(Element::new("metadata").child(self.own_element()))
            .all((total > self.memory_mib).then(|| mib("maxMemory", total).with("slots", 1)))
            .child(mib("memory", total))
            .child(mib("currentMemory", self.memory_mib))
            .all(self.pinning.as_ref().and_then(Pinning::memory_backing))
            .all(self.processors())
            .all(
                self.pinning
                    .iter()
                    .flat_map(|pinning| [pinning.cpu_tune(), pinning.numa_tune()]),
            )
            .child(self.os()?)
            .child(self.features())
            .all(self.cpu())
            .child(Element::new("clock").with("offset", "utc"))
            .child(leaf("on_poweroff", "destroy"))
            .child(leaf("on_reboot", "restart"))
            .child(leaf("on_crash", "destroy"))
            .child(
                Element::new("pm")
                    .child(power("suspend-to-mem"))
                    .child(power("suspend-to-disk")),
            )
            .child(self.devices()?)
            .to_xml()
    }

    /// Memory that can be added without a restart; in whole blocks.
    fn more_memory_mib(&self) -> u64 {
        let more = self.max_memory_mib.saturating_sub(self.memory_mib);
        match self.accelerator {
            Accelerator::Test => 0,
            Accelerator::Kvm | Accelerator::Tcg => more - more % MEMORY_BLOCK_MIB,
        }
    }

    /// The processors. Without a maximum they are as they are.
    fn processors(&self) -> Vec<Element> {
        let count = leaf("vcpu", self.max_vcpus.max(self.vcpus)).with("placement", "static");
        if self.max_vcpus <= self.vcpus {
            return vec![count];
        }
        let word = |truth: bool| if truth { "yes" } else { "no" };
        let one = |id: u32| {
            Element::new("vcpu")
                .with("id", id)
                .with("enabled", word(id < self.vcpus))
                .with("hotpluggable", word(id > 0))
        };
        let each = Element::new("vcpus").all((0..self.max_vcpus).map(one));
        vec![count.with("current", self.vcpus), each]
    }

    /// Dalgu's element in the metadata: the mark, and the names of the devices in order, which libvirt can tell of a
    /// running domain without asking QEMU, as it cannot the rest of the definition.
    pub(super) fn own_element(&self) -> Element {
        let names = |names: &mut dyn Iterator<Item = &String>| names.cloned().collect::<Vec<_>>().join(" ");
        let mut element = Element::new(&format!("{PREFIX}:vm")).with(&format!("xmlns:{PREFIX}"), NAMESPACE);
        for (name, value) in mark_attributes(&self.mark) {
            element = element.with(name, value);
        }
        element
            .with("disks", names(&mut self.disks.iter().map(|disk| &disk.name)))
            .with("nics", names(&mut self.nics.iter().map(|nic| &nic.name)))
    }

    fn os(&self) -> Result<Element, XmlError> {
        let mut kind = leaf("type", "hvm").with("arch", "x86_64");
        if self.accelerator != Accelerator::Test {
            kind = kind.with("machine", "q35");
        }
        let mut os = Element::new("os");
        if self.firmware != Firmware::Bios {
            let secure = match self.firmware {
                Firmware::UefiSecureBoot => "yes",
                Firmware::Bios | Firmware::Uefi => "no",
            };
            let feature = |name: &str| Element::new("feature").with("enabled", secure).with("name", name);
            os = os.with("firmware", "efi").child(kind).child(
                Element::new("firmware")
                    .child(feature("secure-boot"))
                    .child(feature("enrolled-keys")),
            );
            if let Some(nvram) = &self.nvram {
                os = os.child(leaf("nvram", path_text(nvram)?));
            }
        } else {
            os = os.child(kind);
        }
        if let Some(boot) = &self.kernel {
            os = os.child(leaf("kernel", path_text(&boot.kernel)?));
            if let Some(initrd) = &boot.initrd {
                os = os.child(leaf("initrd", path_text(initrd)?));
            }
            if !boot.cmdline.is_empty() {
                os = os.child(leaf("cmdline", &boot.cmdline));
            }
        }
        Ok(os)
    }

    fn features(&self) -> Element {
        let smm = Element::new("smm").with("state", "on");
        Element::new("features")
            .child(Element::new("acpi"))
            .child(Element::new("apic"))
            .all((self.firmware == Firmware::UefiSecureBoot).then_some(smm))
    }

    fn cpu(&self) -> Option<Element> {
        let cpu = match self.accelerator {
            Accelerator::Kvm => Element::new("cpu")
                .with("mode", "host-model")
                .with("check", "partial"),
            Accelerator::Tcg => {
                let model = leaf("model", "qemu64").with("fallback", "forbid");
                Element::new("cpu")
                    .with("mode", "custom")
                    .with("match", "exact")
                    .with("check", "none")
                    .child(model)
            }
            Accelerator::Test => return None,
        };
        // Memory can be added to a node only.
        let node = (self.more_memory_mib() > 0).then(|| {
            let last = self.max_vcpus.max(self.vcpus) - 1;
            let cell = Element::new("cell")
                .with("id", 0)
                .with("cpus", format!("0-{last}"))
                .with("memory", self.memory_mib)
                .with("unit", "MiB");
            Element::new("numa").child(cell)
        });
        let pinning = self.pinning.as_ref();
        let nodes = pinning.and_then(|pinning| pinning.guest_nodes(self.vcpus, self.memory_mib));
        Some(cpu.all(node.or(nodes)))
    }

    /// The device for memory that can be added.
    fn memory_device(&self) -> Option<Element> {
        let more = self.more_memory_mib();
        let target = Element::new("target")
            .child(mib("size", more))
            .child(leaf("node", 0))
            .child(mib("block", MEMORY_BLOCK_MIB))
            .child(mib("requested", 0));
        (more > 0).then(|| {
            Element::new("memory")
                .with("model", "virtio-mem")
                .child(target)
                .child(Element::new("alias").with("name", MEMORY_ALIAS))
        })
    }

    fn devices(&self) -> Result<Element, XmlError> {
        // A port for each device on the bus: disks, interfaces, balloon, random numbers, channels, memory that can be added, and
        // those of the host.
        let memory = usize::from(self.more_memory_mib() > 0);
        let ports = self.disks.len() + self.nics.len() + self.devices.len() + 3 + memory + SPARE_PORTS;
        let controller = |index: usize, model: &str| {
            Element::new("controller")
                .with("type", "pci")
                .with("index", index)
                .with("model", model)
        };
        let disks = self
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| self.disk(index, disk, self.boots_from(disk)));
        let serial = Element::new("serial")
            .with("type", "file")
            .child(
                Element::new("source")
                    .with("path", path_text(&self.console)?)
                    .with("append", "on"),
            )
            .child(Element::new("target").with("port", 0));
        let balloon = Element::new("memballoon")
            .with("model", "virtio")
            .child(Element::new("stats").with("period", 10));
        let agent = Element::new("channel").with("type", "unix").child(
            Element::new("target")
                .with("type", "virtio")
                .with("name", GUEST_AGENT),
        );
        let tpm = Element::new("tpm").with("model", "tpm-crb").child(
            Element::new("backend")
                .with("type", "emulator")
                .with("version", "2.0"),
        );
        let random = Element::new("rng")
            .with("model", "virtio")
            .child(leaf("backend", "/dev/urandom").with("model", "random"));
        Ok(Element::new("devices")
            .child(controller(0, "pcie-root"))
            .all((1..=ports).map(|index| controller(index, "pcie-root-port")))
            .child(
                Element::new("controller")
                    .with("type", "usb")
                    .with("model", "none"),
            )
            .all(disks.collect::<Result<Vec<_>, _>>()?)
            .all(
                self.nics
                    .iter()
                    .enumerate()
                    .map(|(index, nic)| self.nic(index, nic)),
            )
            .all(self.devices.iter().map(Self::host_device))
            .child(serial)
            .all((self.accelerator != Accelerator::Test).then_some(agent))
            .all(self.tpm.then_some(tpm))
            .child(balloon)
            .all(self.memory_device())
            .child(random)
            .child(Element::new("panic").with("model", "pvpanic")))
    }

    fn boots_from(&self, disk: &DiskModel) -> bool {
        self.kernel.is_none() && disk.name != MEDIUM
    }

    /// A disk that is plugged in at this place.
    pub(super) fn new_disk(&self, name: &str, place: usize) -> Option<Result<String, XmlError>> {
        let disk = self.disks.iter().find(|disk| disk.name == name)?;
        Some(self.disk(place, disk, false).and_then(|disk| disk.to_xml()))
    }

    /// An interface that is plugged in at this place.
    pub(super) fn new_nic(&self, name: &str, place: usize) -> Option<Result<String, XmlError>> {
        let nic = self.nics.iter().find(|nic| nic.name == name)?;
        Some(self.nic(place, nic).to_xml())
    }

    fn disk(&self, index: usize, disk: &DiskModel, boots: bool) -> Result<Element, XmlError> {
        let driver = Element::new("driver")
            .with("name", "qemu")
            .with("type", disk.format.as_str())
            .with("cache", disk.cache.as_str())
            .with("discard", "unmap");
        let mut element = Element::new("disk")
            .with("type", "file")
            .with("device", "disk")
            .child(driver)
            .child(Element::new("source").with("file", path_text(&disk.path)?))
            .all(
                (!disk.backing.is_empty())
                    .then(|| backing(&disk.backing))
                    .transpose()?,
            )
            .child(
                Element::new("target")
                    .with("dev", disk_target(index))
                    .with("bus", "virtio"),
            )
            .all(limits(&disk.limits))
            .child(leaf("serial", &disk.name));
        if boots {
            element = element.child(Element::new("boot").with("order", index + 1));
        }
        Ok(element.child(Element::new("alias").with("name", alias("disk", &disk.name))))
    }

    /// A PCI device of the host. libvirt takes it from its driver there when the domain starts, and gives it back when that has ended.
    fn host_device(address: &PciAddress) -> Element {
        let PciAddress {
            domain,
            bus,
            slot,
            function,
        } = address;
        let address = Element::new("address")
            .with("domain", format!("{domain:#06x}"))
            .with("bus", format!("{bus:#04x}"))
            .with("slot", format!("{slot:#04x}"))
            .with("function", format!("{function:#x}"));
        Element::new("hostdev")
            .with("mode", "subsystem")
            .with("type", "pci")
            .with("managed", "yes")
            .child(Element::new("source").child(address))
    }

    fn target(&self, index: usize, nic: &NicModel) -> String {
        let own = nic.target.clone();
        own.unwrap_or_else(|| nic_target(self.id, index))
    }

    fn nic(&self, index: usize, nic: &NicModel) -> Element {
        Element::new("interface")
            .with("type", "bridge")
            .child(Element::new("mac").with("address", &nic.mac))
            .child(Element::new("source").with("bridge", &nic.bridge))
            .child(Element::new("target").with("dev", self.target(index, nic)))
            .child(Element::new("model").with("type", "virtio"))
            .all(nic.mtu.map(|mtu| Element::new("mtu").with("size", mtu)))
            .child(Element::new("alias").with("name", alias("nic", &nic.name)))
    }
}
