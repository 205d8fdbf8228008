//! The volume that tells a guest what to be at its first boot, in the NoCloud form of cloud-init: a FAT file system with the
//! label CIDATA and the files `meta-data`, `user-data` and `network-config`. Pure: the same definition gives the same bytes.
//!
//! Called by the hypervisors when they make a VM's disks. `meta-data` and the usual `network-config` are JSON, which is YAML:
//! no name and no key can end its own string. Documents are files as they came.

use std::{
    collections::BTreeMap,
    io::{self, Cursor, Write as _},
    net::IpAddr,
};

use dalgu_proto::{
    network::{Kind, Network, Port},
    secret::Secret,
    vm::{
        FirstBoot, Nic,
        first_boot::{Documents, MEDIUM_MIB},
    },
};
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde::Serialize;

use crate::hypervisor::{Definition, Error};

/// By this label cloud-init finds it, whatever the device is called.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// See "NoCloud" in cloud-init's manual. cloud-init boots for the first time where the id is another than it knows.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData<'a> {
    instance_id: String,
    local_hostname: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    public_keys: &'a [String],
}

/// See "Networking config version 2" there.
#[derive(Serialize)]
struct NetworkConfig<'a> {
    version: u32,
    ethernets: BTreeMap<&'a str, Ethernet<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Ethernet<'a> {
    r#match: BTreeMap<&'static str, &'a str>,
    set_name: &'a str,
    #[serde(rename = "dhcp4")]
    dhcp: bool,
    /// Where it has an IPv6 address that hosts serve.
    #[serde(rename = "dhcp6", skip_serializing_if = "std::ops::Not::not")]
    dhcp_ipv6: bool,
    /// With their prefixes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<String>,
    /// Not as a route: Debian 12's cloud-init makes `::/64` of `::/0`, and knows no `default`.
    #[serde(rename = "gateway4", skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    #[serde(rename = "gateway6", skip_serializing_if = "Option::is_none")]
    gateway_ipv6: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nameservers: Option<Nameservers>,
}

#[derive(Serialize)]
struct Nameservers {
    addresses: Vec<IpAddr>,
}

/// The bytes of the volume of a VM that has one.
///
/// # Errors
/// If a document is not here: it was made once, and its documents have been forgotten since.
pub fn medium(definition: &Definition, first_boot: &FirstBoot) -> Result<Vec<u8>, Error> {
    let invalid = |error: dalgu_proto::vm::Invalid| Error::Invalid {
        detail: error.to_string(),
    };
    first_boot.check(&definition.documents).map_err(invalid)?;
    volume(definition, first_boot).map_err(|error| Error::Invalid {
        detail: format!("the volume of the first boot cannot be made: {error}"),
    })
}

fn volume(definition: &Definition, first_boot: &FirstBoot) -> io::Result<Vec<u8>> {
    let Documents {
        user_data,
        network_config,
    } = &definition.documents;
    let meta_data = json(&MetaData {
        instance_id: definition.id.to_string(),
        local_hostname: first_boot.hostname.as_deref().unwrap_or(definition.name.as_str()),
        public_keys: &first_boot.ssh_keys,
    })?;
    let network_config = match network_config {
        Some(given) => given.expose().to_owned(),
        None => json(&usual(&definition.spec.nics, &definition.networks))?,
    };
    let user_data = user_data.as_ref().map(Secret::expose).unwrap_or_default();
    let size = usize::try_from(MEDIUM_MIB << 20).map_err(io::Error::other)?;
    let mut bytes = vec![0; size];
    let [a, b, c, d, ..] = *definition.id.uuid().as_bytes();
    let options = FormatVolumeOptions::new()
        .volume_label(LABEL)
        .volume_id(u32::from_be_bytes([a, b, c, d]));
    fatfs::format_volume(Cursor::new(bytes.as_mut_slice()), options)?;
    let volume = FileSystem::new(Cursor::new(bytes.as_mut_slice()), FsOptions::new())?;
    for (name, content) in [
        ("meta-data", meta_data.as_str()),
        ("user-data", user_data),
        ("network-config", &network_config),
    ] {
        volume
            .root_dir()
            .create_file(name)?
            .write_all(content.as_bytes())?;
    }
    volume.unmount()?;
    Ok(bytes)
}

fn json(value: &impl Serialize) -> io::Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}

/// Each interface is found by its MAC address and called as in the specification. It has the addresses that the site gave it and that
/// no host serves; for the rest there is DHCP.
fn usual<'a>(nics: &'a [Nic], networks: &[Network]) -> NetworkConfig<'a> {
    let ethernets = nics
        .iter()
        .map(|nic| (nic.name.as_str(), ethernet(nic, networks)));
    NetworkConfig {
        version: 2,
        ethernets: ethernets.collect(),
    }
}

fn ethernet<'a>(nic: &'a Nic, networks: &[Network]) -> Ethernet<'a> {
    let mut ethernet = Ethernet {
        r#match: BTreeMap::from([("macaddress", nic.mac.as_str())]),
        set_name: &nic.name,
        dhcp: true,
        dhcp_ipv6: nic.port().is_some_and(|port| port.ipv6.is_some()),
        addresses: Vec::new(),
        gateway: None,
        gateway_ipv6: None,
        nameservers: None,
    };
    let plug = nic.port().and_then(|port| {
        let network = networks.iter().find(|network| network.name == port.network)?;
        Some((port, network))
    });
    if let Some((port, network)) = plug {
        ethernet.dhcp = somebody_gives_ipv4(network);
        fix(&mut ethernet, port, network);
    }
    ethernet
}

/// Whether a guest that asks for an IPv4 address can get one. One that asks in vain is long in coming up. In a network of the site's own
/// whose addresses Dalgu does not manage at all, the site may have a server for them.
const fn somebody_gives_ipv4(network: &Network) -> bool {
    let unmanaged = network.ipv4.is_none() && network.ipv6.is_none();
    network.ipv4.is_some() || (unmanaged && matches!(network.kind, Kind::Bridge { .. }))
}

/// Tells the addresses that no host serves.
fn fix(ethernet: &mut Ethernet<'_>, port: &Port, network: &Network) {
    for address in port.addresses() {
        let mut subnets = network.subnets();
        let Some(subnet) = subnets.find(|subnet| subnet.cidr.contains(&address) && !subnet.is_served())
        else {
            continue;
        };
        let (dhcp, gateway) = match address {
            IpAddr::V4(_) => (&mut ethernet.dhcp, &mut ethernet.gateway),
            IpAddr::V6(_) => (&mut ethernet.dhcp_ipv6, &mut ethernet.gateway_ipv6),
        };
        (*dhcp, *gateway) = (false, subnet.gateway);
        let prefix = subnet.cidr.prefix_len();
        ethernet.addresses.push(format!("{address}/{prefix}"));
    }
    // Otherwise DHCP says which servers there are.
    if !ethernet.addresses.is_empty() && ethernet.addresses.len() == port.addresses().count() {
        ethernet.nameservers = nameservers(network);
    }
}

/// Those of the hosts, where they serve names; else those that they would ask.
fn nameservers(network: &Network) -> Option<Nameservers> {
    let served = network.subnets().filter(|subnet| subnet.dhcp);
    let mut addresses: Vec<_> = served.map(|subnet| subnet.service).collect();
    if addresses.is_empty() {
        addresses.clone_from(&network.dns_servers);
    }
    (!addresses.is_empty()).then_some(Nameservers { addresses })
}

#[cfg(test)]
mod tests;
