//! PCI devices that the operator names for VMs, as the kernel tells of them, and why one cannot be given to a VM.
//!
//! A VM gets a device by way of the IOMMU, and with it all that is in the device's IOMMU group: nothing else of the group but bridges may be in use
//! by the host (<https://docs.kernel.org/driver-api/vfio.html>). What cannot be given is told with the reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use dalgu_proto::{host::PciDevice, ids::check_device_name, vm::PciAddress};
use serde::Deserialize;

use super::Root;

/// Where the kernel tells of PCI devices.
const DEVICES: &str = "sys/bus/pci/devices";
/// Drivers of a device that is kept for guests.
const FOR_GUESTS: [&str; 2] = ["vfio-pci", "pci-stub"];
/// The classes of controllers of disks and of networks: <https://pci-ids.ucw.cz/read/PD/01>.
const OF_HOSTS: [&str; 2] = ["0x01", "0x02"];
/// The class of bridges: <https://pci-ids.ucw.cz/read/PD/06>.
const BRIDGE: &str = "0x06";

/// A class of devices for VMs, and which devices are of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Name of the class, the same on each host that has such devices.
    pub class: String,
    /// Which devices.
    #[serde(rename = "match")]
    pub pattern: Pattern,
}

/// Which devices are meant.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Pattern {
    /// All of a vendor and model, in hexadecimal digits as in `10de:20b0`.
    Model(String),
    /// The one at an address.
    Address(PciAddress),
}

/// Neither of both.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "match = {0:?} names no PCI device: write VENDOR:DEVICE as `lspci -n` does, for example \"10de:20b0\", or an address as `lspci -D` does, for \
     example \"0000:3b:00.0\""
)]
pub struct NoPattern(String);

impl TryFrom<String> for Pattern {
    type Error = NoPattern;

    fn try_from(text: String) -> Result<Self, NoPattern> {
        let digits = |part: &str| part.len() == 4 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        match text.split_once(':') {
            Some((vendor, device)) if digits(vendor) && digits(device) => {
                Ok(Self::Model(text.to_ascii_lowercase()))
            }
            _ => Err(NoPattern(text)),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(model) => f.write_str(model),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// What is wrong with these names by themselves.
pub fn check(named: &[Named]) -> Result<(), String> {
    for (index, one) in named.iter().enumerate() {
        check_device_name(&one.class).map_err(|error| format!("class: {error}"))?;
        let twin = named[..index].iter().find(|other| other.pattern == one.pattern);
        if let Some(twin) = twin {
            let (first, second, pattern) = (&twin.class, &one.class, &one.pattern);
            return Err(format!(
                "names {pattern} twice, for {first:?} and {second:?}: leave one out"
            ));
        }
    }
    Ok(())
}

/// What is wrong with them on this host: a device is of one class.
pub fn check_on(root: &Root, named: &[Named]) -> Result<(), String> {
    for (address, classes) in matched(root, named) {
        let mut classes = classes.into_iter();
        if let (Some(first), Some(second)) = (classes.next(), classes.next()) {
            return Err(format!(
                "{address} ({}) is named for two classes, {first:?} and {second:?}: name it by its address for one of them, and its like too",
                model(root, address)
            ));
        }
    }
    Ok(())
}

fn dir(address: PciAddress) -> String {
    format!("{DEVICES}/{address}")
}

/// Vendor and device; empty where there is no such device.
fn model(root: &Root, address: PciAddress) -> String {
    let word = |file: &str| {
        let word = root.word(format!("{}/{file}", dir(address)))?;
        Some(word.strip_prefix("0x")?.to_ascii_lowercase())
    };
    let (vendor, device) = (word("vendor"), word("device"));
    vendor
        .zip(device)
        .map_or_else(String::new, |(vendor, device)| format!("{vendor}:{device}"))
}

/// Devices that are named, those that are not there too, with the classes that they are named for.
fn matched<'a>(root: &Root, named: &'a [Named]) -> BTreeMap<PciAddress, BTreeSet<&'a str>> {
    let mut found = BTreeMap::<_, BTreeSet<_>>::new();
    if named.is_empty() {
        return found;
    }
    let there: Vec<(PciAddress, String)> = root
        .names(DEVICES)
        .iter()
        .filter_map(|name| name.parse().ok())
        .map(|address| (address, model(root, address)))
        .collect();
    for one in named {
        let mut add = |address: PciAddress| {
            found.entry(address).or_default().insert(one.class.as_str());
        };
        match &one.pattern {
            Pattern::Address(address) => add(*address),
            Pattern::Model(wanted) => {
                let alike = there.iter().filter(|(_, model)| model == wanted);
                alike.for_each(|(address, _)| add(*address));
            }
        }
    }
    found
}

/// The devices that are named for VMs, in the order of their addresses.
pub fn read(root: &Root, named: &[Named]) -> Vec<PciDevice> {
    let all = matched(root, named);
    let addresses: BTreeSet<_> = all.keys().copied().collect();
    let chosen = |address: PciAddress| {
        let this = Pattern::Address(address);
        named.iter().any(|one| one.pattern == this)
    };
    let device = |(address, classes): (PciAddress, BTreeSet<&str>)| {
        let iommu_group = group(root, address);
        PciDevice {
            class: classes.first().copied().unwrap_or_default().to_owned(),
            address,
            model: model(root, address),
            // -1: not told.
            numa_node: root.number(format!("{}/numa_node", dir(address))),
            iommu_group,
            problem: problem(root, address, iommu_group, &addresses)
                .or_else(|| used(root, address).filter(|_| !chosen(address))),
        }
    };
    all.into_iter().map(device).collect()
}

/// Where guests are simulated: every device that is named by its address is there.
pub fn simulated(named: &[Named]) -> Vec<PciDevice> {
    let device = |one: &Named| match &one.pattern {
        Pattern::Model(_) => None,
        Pattern::Address(address) => Some(PciDevice {
            class: one.class.clone(),
            address: *address,
            model: String::new(),
            numa_node: None,
            iommu_group: None,
            problem: None,
        }),
    };
    named.iter().filter_map(device).collect()
}

fn group(root: &Root, address: PciAddress) -> Option<u32> {
    root.link(format!("{}/iommu_group", dir(address)))?.parse().ok()
}

fn is_bridge(root: &Root, address: PciAddress) -> bool {
    root.word(format!("{}/class", dir(address)))
        .is_some_and(|class| class.starts_with(BRIDGE))
}

/// Why a device that is named by its model alone is not given: the host may have its disks or its network on one of that model.
fn used(root: &Root, address: PciAddress) -> Option<String> {
    let class = root.word(format!("{}/class", dir(address)))?;
    // Virtual functions are made for guests.
    if root.link(format!("{}/physfn", dir(address))).is_some() {
        return None;
    }
    let driver = root.link(format!("{}/driver", dir(address)))?;
    let is_hosts =
        OF_HOSTS.iter().any(|kind| class.starts_with(kind)) && !FOR_GUESTS.contains(&driver.as_str());
    is_hosts.then(|| {
        format!(
            "may be used by the host (driver {driver}): name it by its address, or bind it to vfio-pci at the start, for example with \
             `driverctl set-override {address} vfio-pci`"
        )
    })
}

/// Why a device cannot be given to a VM, and what to do about that.
fn problem(
    root: &Root,
    address: PciAddress,
    group: Option<u32>,
    named: &BTreeSet<PciAddress>,
) -> Option<String> {
    if !root.has(dir(address)) {
        return Some("is not there: look for it with `lspci -D`".to_owned());
    }
    if is_bridge(root, address) {
        return Some("is a bridge, which no VM can have: name what is behind it".to_owned());
    }
    if root.link(format!("{}/virtfn0", dir(address))).is_some() {
        let text = "has virtual functions, which go when a VM gets it: name those, or have none (0 in its sriov_numvfs)";
        return Some(text.to_owned());
    }
    let Some(group) = group else {
        let text = "is in no IOMMU group: switch the IOMMU on in the host's firmware and for its kernel (intel_iommu=on, or amd_iommu=on)";
        return Some(text.to_owned());
    };
    let members = root.names(format!("{}/iommu_group/devices", dir(address)));
    let members = members.iter().filter_map(|name| name.parse().ok());
    let others = members.filter(|other: &PciAddress| *other != address && !is_bridge(root, *other));
    for other in others {
        if named.contains(&other) {
            return Some(format!(
                "shares its IOMMU group {group} with {other}, which is named too: only one VM can have both, so name one of them"
            ));
        }
        let driver = root.link(format!("{}/driver", dir(other)));
        if let Some(driver) = driver.filter(|driver| !FOR_GUESTS.contains(&driver.as_str())) {
            return Some(format!(
                "shares its IOMMU group {group} with {other}, which the host uses (driver {driver}): bind that to vfio-pci at the start, for \
                 example with `driverctl set-override {other} vfio-pci`"
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{super::root::fake::Tree, *};

    fn named(class: &str, pattern: &str) -> Named {
        Named {
            class: class.into(),
            pattern: Pattern::try_from(pattern.to_owned()).unwrap(),
        }
    }

    /// A device of a model, in an IOMMU group and with a driver where one is said.
    fn put(tree: &Tree, address: &str, model: &str, class: &str, group: Option<u32>, driver: Option<&str>) {
        let (vendor, device) = model.split_once(':').unwrap();
        let dir = format!("{DEVICES}/{address}");
        tree.write(&format!("{dir}/vendor"), &format!("0x{vendor}\n"))
            .write(&format!("{dir}/device"), &format!("0x{device}\n"))
            .write(&format!("{dir}/class"), &format!("{class}\n"))
            .write(&format!("{dir}/numa_node"), "1\n");
        if let Some(group) = group {
            let groups = format!("sys/kernel/iommu_groups/{group}");
            tree.write(&format!("{groups}/devices/{address}"), "")
                .link(&format!("{dir}/iommu_group"), &groups);
        }
        if let Some(driver) = driver {
            let drivers = format!("sys/bus/pci/drivers/{driver}");
            tree.write(&format!("{drivers}/bind"), "")
                .link(&format!("{dir}/driver"), &drivers);
        }
    }

    const GPU: &str = "10de:20b0";
    const DISPLAY: &str = "0x030200";

    #[test]
    fn devices_are_named_by_model_or_by_address_and_others_are_not_told() {
        let tree = Tree::new();
        put(&tree, "0000:3b:00.0", GPU, DISPLAY, Some(14), Some("nouveau"));
        put(&tree, "0000:5e:00.0", GPU, DISPLAY, Some(15), None);
        put(
            &tree,
            "0000:86:00.1",
            "8086:154c",
            "0x020000",
            Some(16),
            Some("iavf"),
        );
        put(
            &tree,
            "0000:86:00.2",
            "8086:154c",
            "0x020000",
            Some(17),
            Some("iavf"),
        );
        tree.write(&format!("{DEVICES}/0000:5e:00.0/numa_node"), "-1\n");
        let found = read(
            &tree.root(),
            &[named("nic", "86:00.1"), named("gpu", "10DE:20B0")],
        );
        let shown: Vec<_> = found
            .iter()
            .map(|device| {
                (
                    device.class.as_str(),
                    device.address.to_string(),
                    device.numa_node,
                    device.iommu_group,
                    device.problem.as_deref(),
                )
            })
            .collect();
        assert_eq!(
            shown,
            [
                ("gpu", "0000:3b:00.0".to_owned(), Some(1), Some(14), None),
                ("gpu", "0000:5e:00.0".to_owned(), None, Some(15), None),
                ("nic", "0000:86:00.1".to_owned(), Some(1), Some(16), None),
            ]
        );
        assert_eq!(found[2].model, "8086:154c");
        assert!(read(&tree.root(), &[]).is_empty());
    }

    #[test]
    fn what_cannot_be_given_is_told_with_the_reason() {
        let tree = Tree::new();
        // Its own driver is taken from it by libvirt; bridges above it stay the host's.
        put(&tree, "0000:3b:00.0", GPU, DISPLAY, Some(14), Some("nvidia"));
        put(
            &tree,
            "0000:3a:00.0",
            "8086:2030",
            "0x060400",
            Some(14),
            Some("pcieport"),
        );
        put(&tree, "0000:5e:00.0", GPU, DISPLAY, Some(15), None);
        put(
            &tree,
            "0000:5e:00.1",
            "10de:1aef",
            "0x040300",
            Some(15),
            Some("snd_hda_intel"),
        );
        put(&tree, "0000:86:00.0", GPU, DISPLAY, None, None);
        put(&tree, "0000:af:00.0", GPU, DISPLAY, Some(16), None);
        put(&tree, "0000:af:00.1", GPU, DISPLAY, Some(16), None);
        let problems = || {
            let found = read(
                &tree.root(),
                &[
                    named("gpu", GPU),
                    named("port", "3a:00.0"),
                    named("gpu", "d8:00.0"),
                ],
            );
            let problem =
                |device: PciDevice| (device.address.to_string(), device.problem.unwrap_or_default());
            found.into_iter().map(problem).collect::<Vec<_>>()
        };
        for ((address, problem), (expected, part)) in problems().iter().zip([
            ("0000:3a:00.0", "is a bridge"),
            ("0000:3b:00.0", ""),
            (
                "0000:5e:00.0",
                "5e:00.1, which the host uses (driver snd_hda_intel)",
            ),
            ("0000:86:00.0", "no IOMMU group"),
            ("0000:af:00.0", "with 0000:af:00.1, which is named too"),
            ("0000:af:00.1", "with 0000:af:00.0, which is named too"),
            ("0000:d8:00.0", "is not there"),
        ]) {
            assert_eq!(address, expected);
            assert!(
                problem.contains(part) && problem.is_empty() == part.is_empty(),
                "{address}: {problem}"
            );
        }
        // What is kept for guests is in nobody's way.
        let driver = format!("{DEVICES}/0000:5e:00.1/driver");
        tree.remove(&driver)
            .write("sys/bus/pci/drivers/vfio-pci/bind", "")
            .link(&driver, "sys/bus/pci/drivers/vfio-pci");
        assert_eq!(problems()[2].1, "");
    }

    #[test]
    fn what_the_host_may_have_its_disks_or_network_on_is_given_by_its_address_alone() {
        let (tree, model) = (Tree::new(), "8086:1572");
        put(&tree, "0000:18:00.0", model, "0x020000", Some(1), Some("i40e"));
        put(&tree, "0000:18:00.1", model, "0x020000", Some(2), Some("i40e"));
        put(
            &tree,
            "0000:18:00.2",
            model,
            "0x020000",
            Some(3),
            Some("vfio-pci"),
        );
        let all = [named("nic", model), named("nic", "18:00.1")];
        let problems = |named: &[Named]| -> Vec<_> {
            let found = read(&tree.root(), named).into_iter();
            found.map(|device| device.problem.unwrap_or_default()).collect()
        };
        let found = problems(&all);
        assert!(
            found[0].contains("may be used by the host (driver i40e)"),
            "{}",
            found[0]
        );
        assert_eq!(found[1..], ["", ""]);
        // A port and its virtual functions are not two devices.
        for (from, to) in [("18:00.1", "18:02.0"), ("18:00.2", "18:0a.0")] {
            let (port, function) = (format!("{DEVICES}/0000:{from}"), format!("{DEVICES}/0000:{to}"));
            put(
                &tree,
                &format!("0000:{to}"),
                "8086:154c",
                "0x020000",
                Some(9),
                Some("iavf"),
            );
            tree.link(&format!("{port}/virtfn0"), &function)
                .link(&format!("{function}/physfn"), &port);
        }
        let found = problems(&all);
        assert!(
            found[1..]
                .iter()
                .all(|problem| problem.contains("virtual functions")),
            "{found:?}"
        );
        assert_eq!(problems(&[named("nic", "18:02.0")]).len(), 1);
        tree.remove("sys/kernel/iommu_groups/9/devices/0000:18:0a.0");
        assert_eq!(problems(&[named("nic", "8086:154c")])[0], "");
    }

    #[test]
    fn names_that_cannot_hold_are_refused_with_what_to_do() {
        for text in ["", "gpu", "10de", "10de:20b", "0000:3b:00", "10de:20b0:1"] {
            let error = Pattern::try_from(text.to_owned()).unwrap_err().to_string();
            assert!(error.contains("lspci"), "{error}");
        }
        let same = check(&[named("gpu", "3b:00.0"), named("nic", "0000:3b:00.0")]).unwrap_err();
        assert!(same.contains("twice"), "{same}");
        assert!(
            check(&[named("GPU", GPU)])
                .unwrap_err()
                .contains("1 to 15 characters")
        );
        let tree = Tree::new();
        put(&tree, "0000:3b:00.0", GPU, DISPLAY, Some(14), None);
        let both = [named("gpu", GPU), named("nic", "3b:00.0")];
        assert_eq!(check(&both), Ok(()));
        let error = check_on(&tree.root(), &both).unwrap_err();
        assert!(error.contains("two classes, \"gpu\" and \"nic\""), "{error}");
        assert_eq!(check_on(&tree.root(), &both[..1]), Ok(()));
    }
}
