//! DHCP and DNS of a network on this host: what `dnsmasq` is told. Pure.
//!
//! It serves this host's own VMs only, with addresses that the controller gave, and names of the whole network. It runs in a
//! network namespace of its own, with one port on the network's bridge: two networks may have the same addresses, and no guest
//! reaches anything of the host.

use std::{collections::BTreeMap, fmt::Write as _, net::IpAddr};

use dalgu_proto::network::{Network, Subnet};

use super::{
    document::{HostNetwork, Plugged},
    names,
};

/// Its interface in its namespace.
pub const DEVICE: &str = "eth0";
/// Where it asks for names that are not the network's; the agent carries that to the host's own network.
pub const RELAY_PORT: u16 = 5300;
/// For how long a guest may use an address before it asks again.
const LEASE: &str = "12h";

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// MAC address of its interface.
    pub mac: String,
    /// Addresses of it, with their prefixes.
    pub addresses: Vec<String>,
    /// Its configuration; a change needs a new process. `{dir}` stands for its directory.
    pub config: String,
    /// Names, as in /etc/hosts; read again on SIGHUP.
    pub hosts: String,
    /// Addresses of interfaces that are here; in the same way.
    pub leases: String,
    /// MAC addresses of the interfaces that have the addresses.
    pub holders: Holders,
    /// Servers that other names are asked of.
    pub servers: Vec<IpAddr>,
}

/// Which interface has an address, by its MAC address.
pub type Holders = BTreeMap<IpAddr, String>;

/// Addresses that another interface has had. `dnsmasq` gives an address to nobody else before its lease is over.
pub fn taken_over(former: &Holders, holders: &Holders) -> Vec<IpAddr> {
    let others = |address: &IpAddr, mac: &String| former.get(address).is_some_and(|former| former != mac);
    let taken = holders.iter().filter(|(address, mac)| others(address, mac));
    taken.map(|(address, _)| *address).collect()
}

/// The leases that `dnsmasq` keeps, without those of some addresses. A line has when it ends, whose it is, and the address.
pub fn without(given: &str, addresses: &[IpAddr]) -> String {
    let address = |line: &str| line.split(' ').nth(2)?.parse().ok();
    let stays = |line: &&str| address(line).is_none_or(|address| !addresses.contains(&address));
    given.split_inclusive('\n').filter(stays).collect()
}

/// What is served of a network, if anything is.
pub fn service(network: &HostNetwork, here: &[&Plugged]) -> Option<Service> {
    let served: Vec<&Subnet> = network.network.subnets().filter(|subnet| subnet.dhcp).collect();
    if served.is_empty() {
        return None;
    }
    let prefixed = |subnet: &&Subnet| format!("{}/{}", subnet.service, subnet.cidr.prefix_len());
    Some(Service {
        mac: names::service_mac(&network.network.name),
        addresses: served.iter().map(prefixed).collect(),
        config: config(&network.network, &served),
        hosts: hosts(network),
        leases: leases(network, here),
        holders: here
            .iter()
            .flat_map(|plugged| {
                plugged
                    .port
                    .addresses()
                    .map(|address| (address, plugged.mac.clone()))
            })
            .collect(),
        servers: network.network.dns_servers.clone(),
    })
}

fn config(network: &Network, served: &[&Subnet]) -> String {
    let Network { domain, mtu, .. } = network;
    let mut text = format!(
        "# Network {}. Made by dalgu-agent.\n\
         interface={DEVICE}\nbind-interfaces\nno-resolv\nno-hosts\nno-ping\nlog-facility=-\nquiet-dhcp\nquiet-dhcp6\nquiet-ra\n\
         pid-file={{dir}}/pid\naddn-hosts={{dir}}/hosts\ndhcp-hostsfile={{dir}}/leases\ndhcp-leasefile={{dir}}/given\n\
         domain={domain}\nlocal=/{domain}/\ndhcp-authoritative\ndhcp-ignore-names\n",
        network.name
    );
    for subnet in served {
        range(&mut text, subnet, *mtu);
    }
    for index in 0..network.dns_servers.len() {
        let port = usize::from(RELAY_PORT) + index;
        let _ = writeln!(text, "server=127.0.0.1#{port}");
    }
    text
}

fn range(text: &mut String, subnet: &Subnet, mtu: u32) {
    let (first, prefix) = (subnet.cidr.network(), subnet.cidr.prefix_len());
    if !subnet.is_served() {
        return;
    }
    if subnet.cidr.addr().is_ipv4() {
        let _ = writeln!(
            text,
            "dhcp-range={first},static,{},{LEASE}",
            subnet.cidr.netmask()
        );
        // Without a value it is not told at all: by itself dnsmasq would name its own address.
        let gateway = subnet
            .gateway
            .map(|gateway| format!(",{gateway}"))
            .unwrap_or_default();
        let _ = writeln!(
            text,
            "dhcp-option=option:router{gateway}\ndhcp-option=option:mtu,{mtu}"
        );
    } else {
        // It is no router: lifetime 0.
        let _ = writeln!(
            text,
            "dhcp-range={first},static,{prefix},{LEASE}\nenable-ra\nra-param={DEVICE},mtu:{mtu},60,0"
        );
    }
}

fn hosts(network: &HostNetwork) -> String {
    let mut text = String::new();
    for interface in &network.interfaces {
        let addresses = [interface.ipv4.map(IpAddr::V4), interface.ipv6.map(IpAddr::V6)];
        for address in addresses.into_iter().flatten() {
            let _ = writeln!(text, "{address} {}.{}", interface.vm, network.network.domain);
        }
    }
    text
}

fn leases(network: &HostNetwork, here: &[&Plugged]) -> String {
    let mut text = String::new();
    for plugged in here {
        let known = network.interfaces.iter().find(|known| known.mac == plugged.mac);
        let _ = write!(text, "{}", plugged.mac);
        for address in plugged.port.addresses() {
            let _ = match address {
                IpAddr::V4(address) => write!(text, ",{address}"),
                IpAddr::V6(address) => write!(text, ",[{address}]"),
            };
        }
        if let Some(known) = known {
            let _ = write!(text, ",{}", known.vm);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holders(held: &[(&str, &str)]) -> Holders {
        let held = held.iter();
        held.map(|(address, mac)| (address.parse().unwrap(), (*mac).to_owned()))
            .collect()
    }

    #[test]
    fn an_address_that_another_interface_has_had_is_taken_from_its_lease() {
        let former = holders(&[
            ("10.20.0.10", "a"),
            ("10.20.0.11", "b"),
            ("fd20::10", "a"),
            ("fd20::11", "b"),
        ]);
        let now = holders(&[
            ("10.20.0.10", "c"),
            ("fd20::10", "c"),
            ("10.20.0.11", "b"),
            ("10.20.0.12", "d"),
        ]);
        let taken = taken_over(&former, &now);
        assert_eq!(
            taken,
            ["10.20.0.10", "fd20::10"].map(|address| address.parse::<IpAddr>().unwrap())
        );

        let of_a = "1793000000 52:54:00:00:20:0a 10.20.0.10 web 01:52:54:00:00:20:0a\n";
        let of_b = "1793000000 52:54:00:00:20:0b 10.20.0.11 * *\n";
        let server = "duid 00:01:00:01:2e:4b\n";
        let of_a6 = "1793000000 1048586 fd20::10 web 00:02:00:00:ab:11\n";
        let given = [of_a, of_b, server, of_a6].concat();
        assert_eq!(without(&given, &taken), [of_b, server].concat());
        assert_eq!(without(&given, &[]), given);
    }
}
