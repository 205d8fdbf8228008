//! What Dalgu needs to know of a domain's XML: its mark, its files, the names of its devices. Pure; the inverse of
//! `xml` for domains that Dalgu made.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use dalgu_proto::{
    host::GuestFeature,
    ids::{Epoch, Generation, VmId},
    vm::{DiskFormat, DiskLimits, Firmware, PciAddress},
};
use uuid::Uuid;

use super::{
    pins::Pinning,
    tree::{Element, Node, XmlError},
    xml::{
        Accelerator, BackingModel, Cache, DiskModel, KernelModel, Model, NAMESPACE, NicModel, disk_target,
        mark_attributes, nic_target,
    },
};
use crate::{
    hypervisor::{Attached, Hardware, Mark},
    network::names::{TAP, tap},
};

/// Stands for the name of a device where there is none any more.
pub const HOLE: &str = "-";

/// Names of a domain's devices by what libvirt calls them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Disks: target ("vda") and name in the specification, in its order.
    pub disks: Vec<(String, String)>,
    /// Interfaces: tap device and name in the specification, in its order; each with both names that its tap may have.
    pub nics: Vec<(String, String)>,
}

const fn unexpected(place: &'static str) -> XmlError {
    XmlError::Unexpected { place }
}

/// Reads the element that libvirt found in Dalgu's namespace; it hands it out without the namespace. `None` when it
/// is not as Dalgu writes it.
pub fn mark(xml: &str) -> Option<Mark> {
    contents(&Element::parse(xml).ok()?)
}

/// Reads an element among others.
fn mark_of(element: &Element) -> Option<Mark> {
    let ours = element
        .attributes
        .iter()
        .any(|(name, value)| name.starts_with("xmlns") && value == NAMESPACE);
    if ours { contents(element) } else { None }
}

/// Dalgu's mark in a domain, if it bears one.
pub fn mark_in(domain: &Element) -> Option<Mark> {
    let metadata = domain.at(&["metadata"])?;
    metadata.children.iter().find_map(|child| match child {
        Node::Element(element) => mark_of(element),
        Node::Text(_) => None,
    })
}

fn contents(element: &Element) -> Option<Mark> {
    let local = element
        .name
        .rsplit_once(':')
        .map_or(element.name.as_str(), |(_, local)| local);
    if local != "vm" {
        return None;
    }
    Some(Mark {
        cluster: element.attribute("cluster")?.parse().ok()?,
        epoch: Epoch(element.attribute("epoch")?.parse().ok()?),
        generation: Generation(element.attribute("generation")?.parse().ok()?),
    })
}

/// The same domain with another mark; everything else stays as libvirt wrote it.
///
/// # Errors
/// If it is not well-formed, or bears no mark.
pub fn with_mark(xml: &str, mark: &Mark) -> Result<String, XmlError> {
    let mut domain = Element::parse(xml)?;
    let metadata = domain.elements_mut().find(|element| element.name == "metadata");
    let own =
        metadata.and_then(|metadata| metadata.elements_mut().find(|element| mark_of(element).is_some()));
    let own = own.ok_or(unexpected("metadata"))?;
    for (name, value) in mark_attributes(mark) {
        let attribute = own.attributes.iter_mut().find(|(other, _)| other == name);
        attribute.ok_or(unexpected("metadata"))?.1 = value;
    }
    domain.to_xml()
}

/// Names of the devices of the domain with this id, from the element that libvirt found in Dalgu's namespace.
pub fn names(xml: &str, id: Uuid) -> Option<Names> {
    let own = Element::parse(xml).ok()?;
    let words = |attribute: &str| {
        let text = own.attribute(attribute).unwrap_or_default();
        text.split(' ')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .enumerate()
            // A place that is free in the running domain.
            .filter(|(_, name)| name != HOLE)
            .collect::<Vec<_>>()
    };
    contents(&own)?;
    Some(Names {
        disks: words("disks")
            .into_iter()
            .map(|(index, name)| (disk_target(index), name))
            .collect(),
        // One in a network has its tap's name from its own.
        nics: words("nics")
            .into_iter()
            .flat_map(|(index, name)| {
                let tap = tap(VmId::from_uuid(id), &name);
                [(nic_target(id, index), name.clone()), (tap, name)]
            })
            .collect(),
    })
}

/// Files that must be there for a domain to start, each with what it is.
///
/// # Errors
/// If it is not well-formed.
pub fn files(xml: &str) -> Result<Vec<(&'static str, PathBuf)>, XmlError> {
    let domain = Element::parse(xml)?;
    let mut files = Vec::new();
    for (name, what) in [("kernel", "kernel"), ("initrd", "initial RAM disk")] {
        files.extend(
            domain
                .at(&["os", name])
                .map(|file| (what, PathBuf::from(file.own_text()))),
        );
    }
    let devices = domain.at(&["devices"]);
    for disk in devices.into_iter().flat_map(|devices| devices.each("disk")) {
        let source = disk.at(&["source"]).and_then(|source| source.attribute("file"));
        files.extend(source.map(|file| ("disk", PathBuf::from(file))));
        // What libvirt says otherwise than Dalgu does, it finds by itself.
        let behind = backing(disk).unwrap_or_default();
        files.extend(behind.into_iter().map(|file| match file.image {
            true => ("image", file.path),
            false => ("disk", file.path),
        }));
    }
    Ok(files)
}

/// Reads a domain that Dalgu made.
///
/// # Errors
/// If it is not one.
pub fn model(xml: &str) -> Result<Model, XmlError> {
    let domain = Element::parse(xml)?;
    let text = |path: &[&str], place| {
        domain
            .at(path)
            .map(Element::own_text)
            .ok_or_else(|| unexpected(place))
    };
    let devices = domain.at(&["devices"]).ok_or(unexpected("devices"))?;
    let accelerator = match domain.attribute("type") {
        Some("kvm") => Accelerator::Kvm,
        Some("qemu") => Accelerator::Tcg,
        Some("test") => Accelerator::Test,
        _ => return Err(unexpected("domain/@type")),
    };
    let console = devices
        .at(&["serial", "source"])
        .and_then(|source| source.attribute("path"));
    Ok(Model {
        id: text(&["uuid"], "uuid")?.parse().map_err(|_| unexpected("uuid"))?,
        name: text(&["name"], "name")?,
        accelerator,
        mark: mark_in(&domain).ok_or(unexpected("metadata"))?,
        vcpus: current_vcpus(&domain).ok_or(unexpected("vcpu"))?,
        max_vcpus: text(&["vcpu"], "vcpu")?.parse().map_err(|_| unexpected("vcpu"))?,
        memory_mib: mib_at(&domain, "currentMemory").ok_or(unexpected("currentMemory"))?,
        max_memory_mib: mib_at(&domain, "memory").ok_or(unexpected("memory"))?,
        disks: devices
            .each("disk")
            .map(disk)
            .collect::<Option<_>>()
            .ok_or(unexpected("disk"))?,
        nics: devices
            .each("interface")
            .map(nic)
            .collect::<Option<_>>()
            .ok_or(unexpected("interface"))?,
        kernel: domain.at(&["os", "kernel"]).map(|kernel| KernelModel {
            kernel: kernel.own_text().into(),
            initrd: domain
                .at(&["os", "initrd"])
                .map(|initrd| initrd.own_text().into()),
            cmdline: domain
                .at(&["os", "cmdline"])
                .map(Element::own_text)
                .unwrap_or_default(),
        }),
        console: console.ok_or(unexpected("serial/source"))?.into(),
        firmware: firmware(&domain).ok_or(unexpected("os/firmware"))?,
        nvram: domain.at(&["os", "nvram"]).map(|nvram| nvram.own_text().into()),
        tpm: devices.each("tpm").next().is_some(),
        pinning: Pinning::read(&domain),
        devices: host_devices(&domain)?,
    })
}

/// So much memory, in MiB, in whatever unit it is said.
fn mib(element: &Element) -> Option<u64> {
    let amount: u64 = element.own_text().trim().parse().ok()?;
    match element.attribute("unit").unwrap_or("KiB") {
        "KiB" => Some(amount / 1024),
        "MiB" => Some(amount),
        "GiB" => amount.checked_mul(1024),
        _ => None,
    }
}

fn mib_at(domain: &Element, name: &str) -> Option<u64> {
    mib(domain.at(&[name])?)
}

fn current_vcpus(domain: &Element) -> Option<u32> {
    let count = domain.at(&["vcpu"])?;
    let current = count.attribute("current").map(str::to_owned);
    current.unwrap_or_else(|| count.own_text()).trim().parse().ok()
}

/// A disk or an interface as it is plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name in the specification.
    pub name: String,
    /// What libvirt calls it.
    pub target: String,
    /// A disk's file and its format.
    pub file: Option<(PathBuf, DiskFormat)>,
    /// The file that a disk is being copied to, and whether that is whole.
    pub mirror: Option<(PathBuf, bool)>,
    /// libvirt takes it for being copied as long as its domain runs, and QEMU does not copy it: see [`super::leftover`].
    pub forgotten: bool,
    /// The files that are said to be behind a disk's, from the next one on.
    pub behind: Vec<PathBuf>,
    /// All that libvirt says of it.
    pub xml: String,
}

/// What a domain has, as far as its definition says; sizes of disks, and their pools, are not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// Its hardware.
    pub hardware: Hardware,
    /// Its disks.
    pub disks: Vec<Device>,
    /// Its interfaces.
    pub nics: Vec<Device>,
    /// The device for memory that comes and goes, if it has one.
    pub memory: Option<Element>,
}

/// Reads what a domain of Dalgu's has. Devices that somebody else gave it are left out.
///
/// # Errors
/// If it is not well-formed, or lacks what each domain has.
pub fn parts(xml: &str) -> Result<Parts, XmlError> {
    let domain = Element::parse(xml)?;
    let devices = domain.at(&["devices"]).ok_or(unexpected("devices"))?;
    let (mut disks, mut nics) = (Vec::new(), Vec::new());
    let mut attached = BTreeMap::new();
    for disk in devices.each("disk") {
        let Some(device) = device(disk, "ua-disk-", "dev")? else {
            continue;
        };
        let limits = limits(disk);
        attached.insert(
            device.name.clone(),
            Attached {
                limits,
                ..Attached::default()
            },
        );
        disks.push(device);
    }
    for nic in devices.each("interface") {
        nics.extend(device(nic, "ua-nic-", "dev")?);
    }
    let total = mib_at(&domain, "memory").ok_or(unexpected("memory"))?;
    let memory = devices.each("memory").find(|memory| {
        let model = memory.attribute("model");
        model == Some("virtio-mem")
    });
    let of_memory = |name: &str| memory.and_then(|memory| mib(memory.at(&["target", name])?));
    let more = of_memory("size").unwrap_or(0);
    let most = domain
        .at(&["vcpu"])
        .and_then(|vcpu| vcpu.own_text().trim().parse().ok());
    let vcpus = current_vcpus(&domain).ok_or(unexpected("vcpu"))?;
    // An emulated processor that is unplugged stays behind in QEMU 10.0 without its thread: no migration begins any more.
    let emulated = domain.attribute("type") == Some(Accelerator::Tcg.domain_type());
    Ok(Parts {
        hardware: Hardware {
            vcpus,
            min_vcpus: if emulated { vcpus } else { 1 },
            max_vcpus: most.ok_or(unexpected("vcpu"))?,
            memory_mib: total.saturating_sub(more)
                + of_memory("current")
                    .or_else(|| of_memory("requested"))
                    .unwrap_or(0),
            min_memory_mib: total.saturating_sub(more),
            max_memory_mib: total,
            hot_memory: !emulated,
            disks: attached,
            nics: nics.iter().map(|nic: &Device| nic.name.clone()).collect(),
            free_ports: free_ports(devices),
        },
        disks,
        nics,
        memory: memory.cloned(),
    })
}

fn device(element: &Element, prefix: &str, attribute: &str) -> Result<Option<Device>, XmlError> {
    let Some(name) = device_name(element, prefix) else {
        return Ok(None);
    };
    let target = element
        .at(&["target"])
        .and_then(|target| target.attribute(attribute));
    let format = element
        .at(&["driver"])
        .and_then(|driver| driver.attribute("type"));
    let format = match format {
        Some("raw") => DiskFormat::Raw,
        _ => DiskFormat::Qcow2,
    };
    let file_of = |element: &Element| {
        let source = element.at(&["source"])?;
        source.attribute("file").map(PathBuf::from)
    };
    // Other jobs of QEMU's show in the same way, and are others' business.
    let copy = element.at(&["mirror"]);
    let copy = copy.filter(|mirror| mirror.attribute("job").is_none_or(|job| job == "copy"));
    let mirror = copy.and_then(|mirror| {
        let whole = mirror.attribute("ready") == Some("yes");
        Some((file_of(mirror)?, whole))
    });
    Ok(Some(Device {
        name,
        target: target.unwrap_or_default().to_owned(),
        file: file_of(element).map(|file| (file, format)),
        mirror,
        forgotten: false,
        behind: backing(element)
            .unwrap_or_default()
            .into_iter()
            .map(|file| file.path)
            .collect(),
        xml: element.to_xml()?,
    }))
}

/// Root ports into which nothing is plugged.
fn free_ports(devices: &Element) -> usize {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let ports = devices
        .each("controller")
        .filter(|controller| controller.attribute("model") == Some("pcie-root-port"));
    let mut free: BTreeSet<u32> = ports
        .filter_map(|port| number(port.attribute("index")?))
        .collect();
    for child in &devices.children {
        if let Node::Element(device) = child
            && let Some(bus) = device
                .at(&["address"])
                .and_then(|address| address.attribute("bus"))
            && let Some(bus) = number(bus)
        {
            free.remove(&bus);
        }
    }
    free.len()
}

/// The device for memory that is asked to give its guest so much. What the guest has is for libvirt to say.
///
/// # Errors
/// If a text in it cannot be written.
pub fn with_requested(mut device: Element, mib: u64) -> Result<String, XmlError> {
    for target in device.elements_mut().filter(|child| child.name == "target") {
        let keep = |child: &Node| !matches!(child, Node::Element(leaf) if ["requested", "current"].contains(&&*leaf.name));
        target.children.retain(keep);
        let requested = Element::new("requested").with("unit", "MiB").text(mib);
        target.children.push(Node::Element(requested));
    }
    device.to_xml()
}

/// Dalgu's element with other names of devices; it is handed out without its namespace, and taken so.
///
/// # Errors
/// If it is not well-formed.
pub fn with_names(own: &str, disks: &str, nics: &str) -> Result<String, XmlError> {
    let mut element = Element::parse(own)?;
    let local = element.name.rsplit_once(':').map(|(_, local)| local.to_owned());
    element.name = local.unwrap_or(element.name);
    element.attributes.retain(|(name, _)| !name.starts_with("xmlns"));
    for (name, value) in [("disks", disks), ("nics", nics)] {
        element.attributes.retain(|(other, _)| other != name);
        element = element.with(name, value);
    }
    element.to_xml()
}

fn firmware(domain: &Element) -> Option<Firmware> {
    match domain.at(&["os"])?.attribute("firmware") {
        None => return Some(Firmware::Bios),
        Some("efi") => {}
        Some(_) => return None,
    }
    let features = domain.at(&["os", "firmware"])?;
    let secure = features
        .each("feature")
        .find(|feature| feature.attribute("name") == Some("secure-boot"))?;
    match secure.attribute("enabled")? {
        "yes" => Some(Firmware::UefiSecureBoot),
        "no" => Some(Firmware::Uefi),
        _ => None,
    }
}

/// PCI devices of the host that a domain has.
fn host_devices(domain: &Element) -> Result<Vec<PciAddress>, XmlError> {
    let devices = domain
        .at(&["devices"])
        .into_iter()
        .flat_map(|all| all.each("hostdev"));
    let number = |address: &Element, part: &str| {
        let text = address.attribute(part)?.strip_prefix("0x")?;
        u16::from_str_radix(text, 16).ok()
    };
    let read = |device: &Element| {
        let address = device.at(&["source", "address"])?;
        let byte = |part: &str| u8::try_from(number(address, part)?).ok();
        Some(PciAddress {
            domain: number(address, "domain")?,
            bus: byte("bus")?,
            slot: byte("slot")?,
            function: byte("function")?,
        })
    };
    devices
        .map(|device| read(device).ok_or(unexpected("hostdev")))
        .collect()
}

/// What guests can have besides the usual, by libvirt's account of the domains that it can run.
///
/// # Errors
/// If it is not well-formed.
pub fn guest_features(capabilities: &str) -> Result<Vec<GuestFeature>, XmlError> {
    let capabilities = Element::parse(capabilities)?;
    let offers = |path: &[&str], name: &str, wanted: &str| {
        let enums = capabilities.at(path).into_iter().flat_map(|at| at.each("enum"));
        enums
            .filter(|list| list.attribute("name") == Some(name))
            .flat_map(|list| list.each("value"))
            .any(|value| value.own_text() == wanted)
    };
    let uefi = offers(&["os"], "firmware", "efi");
    let secure = uefi && offers(&["os", "loader"], "secure", "yes");
    let emulated = offers(&["devices", "tpm"], "backendModel", "emulator");
    let tpm = emulated && offers(&["devices", "tpm"], "model", "tpm-crb");
    let found = [
        (true, GuestFeature::FirstBoot),
        (uefi, GuestFeature::Uefi),
        (secure, GuestFeature::UefiSecureBoot),
        (tpm, GuestFeature::Tpm),
        (true, GuestFeature::HotChange),
        (true, GuestFeature::Volume),
        (true, GuestFeature::DiskChange),
        (true, GuestFeature::Snapshot),
        (true, GuestFeature::Backup),
        (true, GuestFeature::VolumeMove),
        (true, GuestFeature::VolumeSnapshot),
        (true, GuestFeature::Numa),
        (true, GuestFeature::PciDevice),
    ];
    Ok(found
        .into_iter()
        .filter_map(|(there, feature)| there.then_some(feature))
        .collect())
}

fn device_name(device: &Element, prefix: &str) -> Option<String> {
    Some(
        device
            .at(&["alias"])?
            .attribute("name")?
            .strip_prefix(prefix)?
            .to_owned(),
    )
}

/// The files behind a disk's own, from the next one on; `None` where they are not as Dalgu says them.
fn backing(disk: &Element) -> Option<Vec<BackingModel>> {
    let mut files = Vec::new();
    let mut at = disk.at(&["backingStore"]);
    while let Some(store) = at
        && let Some(source) = store.at(&["source"])
    {
        let format = store.at(&["format"])?.attribute("type")?;
        let label = source.at(&["seclabel"]);
        files.push(BackingModel {
            path: source.attribute("file")?.into(),
            format: format_of(format)?,
            image: label.is_some_and(|label| label.attribute("relabel") == Some("no")),
        });
        at = store.at(&["backingStore"]);
    }
    Some(files)
}

fn format_of(word: &str) -> Option<DiskFormat> {
    match word {
        "qcow2" => Some(DiskFormat::Qcow2),
        "raw" => Some(DiskFormat::Raw),
        _ => None,
    }
}

/// The limits of a disk.
fn limits(disk: &Element) -> DiskLimits {
    let most = |name: &str| {
        let text = disk.at(&["iotune", name])?.own_text();
        text.trim().parse::<u64>().ok().filter(|most| *most > 0)
    };
    let mib = |name: &str| most(name).map(|bytes| bytes >> 20);
    DiskLimits {
        read_iops: most("read_iops_sec"),
        write_iops: most("write_iops_sec"),
        read_mib_per_second: mib("read_bytes_sec"),
        write_mib_per_second: mib("write_bytes_sec"),
    }
}

fn disk(disk: &Element) -> Option<DiskModel> {
    let driver = disk.at(&["driver"])?;
    Some(DiskModel {
        name: device_name(disk, "ua-disk-")?,
        path: disk.at(&["source"])?.attribute("file")?.into(),
        format: format_of(driver.attribute("type")?)?,
        cache: match driver.attribute("cache")? {
            "none" => Cache::None,
            "writeback" => Cache::Writeback,
            _ => return None,
        },
        backing: backing(disk)?,
        limits: limits(disk),
    })
}

fn nic(nic: &Element) -> Option<NicModel> {
    let target = nic.at(&["target"])?.attribute("dev")?;
    let mtu = nic.at(&["mtu"]).and_then(|mtu| mtu.attribute("size"));
    Some(NicModel {
        name: device_name(nic, "ua-nic-")?,
        bridge: nic.at(&["source"])?.attribute("bridge")?.to_owned(),
        mac: nic.at(&["mac"])?.attribute("address")?.to_owned(),
        target: target.starts_with(TAP).then(|| target.to_owned()),
        mtu: mtu.and_then(|size| size.parse().ok()),
    })
}
