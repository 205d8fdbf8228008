//! What Dalgu needs to know of a domain's XML: its mark, its files, the names of its devices. Pure; the inverse of
//! `xml` for domains that Dalgu made.

use std::path::PathBuf;

use dalgu_proto::{
    host::GuestFeature,
    ids::{Epoch, Generation, VmId},
    vm::{DiskFormat, Firmware},
};
use uuid::Uuid;

use super::{
    tree::{Element, Node, XmlError},
    xml::{
        Accelerator, Cache, DiskModel, KernelModel, Model, NAMESPACE, NicModel, disk_target, mark_attributes,
        nic_target,
    },
};
use crate::{
    hypervisor::Mark,
    network::names::{TAP, tap},
};

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
        files.extend(image(disk).map(|image| ("image", image)));
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
    let memory = domain
        .at(&["memory"])
        .filter(|memory| memory.attribute("unit") == Some("MiB"));
    let console = devices
        .at(&["serial", "source"])
        .and_then(|source| source.attribute("path"));
    Ok(Model {
        id: text(&["uuid"], "uuid")?.parse().map_err(|_| unexpected("uuid"))?,
        name: text(&["name"], "name")?,
        accelerator,
        mark: mark_in(&domain).ok_or(unexpected("metadata"))?,
        vcpus: text(&["vcpu"], "vcpu")?.parse().map_err(|_| unexpected("vcpu"))?,
        memory_mib: memory
            .and_then(|memory| memory.own_text().parse().ok())
            .ok_or(unexpected("memory"))?,
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
    })
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

/// The image behind a disk.
fn image(disk: &Element) -> Option<PathBuf> {
    let source = disk.at(&["backingStore", "source"])?;
    source.attribute("file").map(PathBuf::from)
}

fn disk(disk: &Element) -> Option<DiskModel> {
    let driver = disk.at(&["driver"])?;
    Some(DiskModel {
        name: device_name(disk, "ua-disk-")?,
        path: disk.at(&["source"])?.attribute("file")?.into(),
        format: match driver.attribute("type")? {
            "qcow2" => DiskFormat::Qcow2,
            "raw" => DiskFormat::Raw,
            _ => return None,
        },
        cache: match driver.attribute("cache")? {
            "none" => Cache::None,
            "writeback" => Cache::Writeback,
            _ => return None,
        },
        backing: image(disk),
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
