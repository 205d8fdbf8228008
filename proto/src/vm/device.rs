//! What PCI devices a VM asks of its host ([`Devices`]), and which it got there ([`Device`]).

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::Invalid;
use crate::{ids, v1};

/// Most classes that a VM asks for.
const MAX_CLASSES: usize = 8;
/// Fewest and most devices of one class.
const COUNT: std::ops::RangeInclusive<u32> = 1..=16;

/// How many devices of each class.
pub type Devices = BTreeMap<String, u32>;

/// Where a PCI device is on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    /// PCI domain.
    pub domain: u16,
    /// Bus.
    pub bus: u8,
    /// Slot on the bus, 0 to 31.
    pub slot: u8,
    /// Function of what is in the slot, 0 to 7.
    pub function: u8,
}

/// Not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the address of a PCI device: write it as `lspci -D` does, for example 0000:3b:00.0")]
pub struct NoAddress(pub String);

impl FromStr for PciAddress {
    type Err = NoAddress;

    /// `domain:bus:slot.function` in hexadecimal digits; the domain may be left out where it is 0.
    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let part = |text: &str, digits: usize| {
            let hex = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            hex.then(|| u16::from_str_radix(text, 16).ok()).flatten()
        };
        let byte = |text: &str, digits: usize, most: u8| {
            let value = u8::try_from(part(text, digits)?).ok()?;
            (value <= most).then_some(value)
        };
        let read = || {
            let (rest, function) = text.split_once('.')?;
            let (rest, slot) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.split_once(':').unwrap_or(("0000", rest));
            Some(Self {
                domain: part(domain, 4)?,
                bus: byte(bus, 2, u8::MAX)?,
                slot: byte(slot, 2, 31)?,
                function: byte(function, 1, 7)?,
            })
        };
        read().ok_or_else(|| NoAddress(text.to_owned()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            slot,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")
    }
}

impl TryFrom<String> for PciAddress {
    type Error = NoAddress;

    fn try_from(text: String) -> Result<Self, NoAddress> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

/// A device that is a VM's own on its host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Device {
    /// The class that it was asked for by.
    pub class: String,
    /// Where it is.
    pub address: PciAddress,
}

impl TryFrom<v1::Device> for Device {
    type Error = NoAddress;

    fn try_from(wire: v1::Device) -> Result<Self, NoAddress> {
        let v1::Device { class, address } = wire;
        let address = address.parse()?;
        Ok(Self { class, address })
    }
}

impl From<Device> for v1::Device {
    fn from(device: Device) -> Self {
        let Device { class, address } = device;
        Self {
            class,
            address: address.to_string(),
        }
    }
}

/// Reads what a specification asks for.
pub(super) fn check(wire: &[v1::DeviceRequest]) -> Result<Devices, Invalid> {
    let invalid = |field: String, message: String| Invalid { field, message };
    if wire.len() > MAX_CLASSES {
        let message = format!("at most {MAX_CLASSES} classes are allowed, got {}", wire.len());
        return Err(invalid("devices".to_owned(), message));
    }
    let mut devices = Devices::new();
    for (index, asked) in wire.iter().enumerate() {
        let at = |field: &str| format!("devices[{index}].{field}");
        ids::check_device_name(&asked.class).map_err(|error| invalid(at("class"), error.to_string()))?;
        if !COUNT.contains(&asked.count) {
            let (least, most) = (COUNT.start(), COUNT.end());
            let message = format!("must be {least} to {most}, got {}", asked.count);
            return Err(invalid(at("count"), message));
        }
        if devices.insert(asked.class.clone(), asked.count).is_some() {
            let message = format!("{:?} is named twice: add the counts up", asked.class);
            return Err(invalid(at("class"), message));
        }
    }
    Ok(devices)
}

/// The same for the wire, in the order of the classes.
pub(super) fn to_wire(devices: Devices) -> Vec<v1::DeviceRequest> {
    let each = devices.into_iter();
    each.map(|(class, count)| v1::DeviceRequest { class, count })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{host::GuestFeature, vm::Spec};

    fn wire(devices: &[(&str, u32)]) -> v1::VmSpec {
        let asked = devices.iter().map(|(class, count)| v1::DeviceRequest {
            class: (*class).to_owned(),
            count: *count,
        });
        v1::VmSpec {
            vcpus: 1,
            memory_mib: 512,
            kernel_boot: Some(v1::KernelBoot {
                kernel: "k".into(),
                ..Default::default()
            }),
            devices: asked.collect(),
            ..Default::default()
        }
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for (text, expected) in [
            ("0000:3b:00.0", Some("0000:3b:00.0")),
            ("3b:1f.7", Some("0000:3b:1f.7")),
            ("10DE:FF:00.1", Some("10de:ff:00.1")),
            ("", None),
            ("10de:20b0", None),
            ("0000:3b:20.0", None),
            ("0000:3b:00.8", None),
            ("000:3b:00.0", None),
            ("0000:3b:00", None),
            ("0000:3b:00.0.0", None),
            ("0000:0000:3b:00.0", None),
            ("0000:+b:00.0", None),
        ] {
            let read = text.parse::<PciAddress>().map(String::from);
            assert_eq!(read.as_deref().ok(), expected, "{text}");
        }
    }

    #[test]
    fn what_a_vm_asks_for_survives_the_wire_and_the_store() {
        let spec = Spec::try_from(wire(&[("nic", 16), ("gpu", 2)])).unwrap();
        assert_eq!(
            spec.devices,
            Devices::from([("gpu".into(), 2), ("nic".into(), 16)])
        );
        assert_eq!(Spec::try_from(v1::VmSpec::from(spec.clone())).unwrap(), spec);
        let stored = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&stored).unwrap(), spec, "{stored}");
        assert!(spec.features().any(|feature| feature == GuestFeature::PciDevice));
        // One that asks for none is stored as ever.
        let plain = Spec::try_from(wire(&[])).unwrap();
        assert!(plain.features().next().is_none());
        assert!(!serde_json::to_string(&plain).unwrap().contains("devices"));
        let device = Device {
            class: "gpu".into(),
            address: "3b:00.0".parse().unwrap(),
        };
        assert_eq!(
            Device::try_from(v1::Device::from(device.clone())),
            Ok(device.clone())
        );
        let stored = serde_json::to_string(&device).unwrap();
        assert_eq!(stored, r#"{"class":"gpu","address":"0000:3b:00.0"}"#);
        assert_eq!(serde_json::from_str::<Device>(&stored).unwrap(), device);
    }

    #[test]
    fn what_cannot_be_asked_for_is_refused_by_its_field() {
        let many: Vec<String> = (0..9).map(|number| format!("class{number}")).collect();
        let many: Vec<_> = many.iter().map(|class| (class.as_str(), 1)).collect();
        for (field, devices) in [
            ("devices[0].class", vec![("GPU", 1)]),
            ("devices[0].class", vec![("", 1)]),
            ("devices[0].count", vec![("gpu", 0)]),
            ("devices[1].count", vec![("gpu", 1), ("nic", 17)]),
            ("devices[1].class", vec![("gpu", 1), ("gpu", 1)]),
            ("devices", many),
        ] {
            let error = Spec::try_from(wire(&devices)).expect_err(field);
            assert_eq!(error.field, field, "{error}");
        }
    }
}
