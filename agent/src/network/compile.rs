//! What should be on this host, from what it was told and the interfaces that are here. Pure: [`super::System`] makes it so.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dalgu_proto::{ids::NetworkName, network::Kind};

use super::{
    document::{HostNetwork, Kept, Plugged},
    names,
    rules::{self, Facts},
    service::{self, Service},
};

/// How a network's bridge here leads to the rest of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uplink {
    /// To other hosts.
    Vxlan {
        /// The overlay's identifier.
        vni: u32,
        /// This host's address.
        local: IpAddr,
        /// Those of the other hosts.
        peers: BTreeSet<String>,
    },
    /// To the host's bridge.
    Bridge(String),
    /// To a VLAN on it.
    Vlan(String, u16),
}

/// A network on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The network.
    pub network: NetworkName,
    /// Its bridge here.
    pub bridge: String,
    /// Largest packet.
    pub mtu: u32,
    /// The way out.
    pub uplink: Uplink,
    /// DHCP and DNS, where the network has them.
    pub service: Option<Service>,
}

/// What should be on this host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// The filters.
    pub rules: String,
    /// The networks.
    pub segments: Vec<Segment>,
    /// What cannot be made, of these networks.
    pub impossible: BTreeMap<NetworkName, String>,
}

/// See [`Wanted`]. `ports` are the interfaces that are here, with their numbers; `arrived` are taps, see [`Facts::arrived`].
pub fn compile(
    kept: &Kept,
    ports: &[(Plugged, u16)],
    arrived: &BTreeSet<String>,
    overlay_address: Option<IpAddr>,
) -> Wanted {
    let rules = rules::ruleset(&Facts {
        kept,
        ports,
        arrived,
        overlay_address,
    });
    let mut wanted = Wanted {
        rules,
        ..Wanted::default()
    };
    let mut bridges = BTreeSet::new();
    for network in kept.networks() {
        let name = network.network.name.clone();
        let segment = match bridges.insert(names::bridge(&name)) {
            true => segment(network, ports, overlay_address),
            false => Err("another network's devices have the same names; give it another name".to_owned()),
        };
        match segment {
            Ok(segment) => wanted.segments.push(segment),
            Err(why) => {
                wanted.impossible.insert(name, why);
            }
        }
    }
    wanted
}

fn segment(
    network: &HostNetwork,
    ports: &[(Plugged, u16)],
    overlay_address: Option<IpAddr>,
) -> Result<Segment, String> {
    let name = &network.network.name;
    let uplink = match &network.network.kind {
        Kind::Bridge { bridge, vlan: None } => Uplink::Bridge(bridge.clone()),
        Kind::Bridge {
            bridge,
            vlan: Some(vlan),
        } => Uplink::Vlan(bridge.clone(), *vlan),
        Kind::Overlay { vni } => {
            let local = overlay_address.ok_or(
                "the host has no overlay_address: set it in agent.toml to an IP address of the host",
            )?;
            Uplink::Vxlan {
                vni: *vni,
                local,
                peers: rules::peers(network, local),
            }
        }
    };
    let here = ports.iter().map(|(plugged, _)| plugged);
    let here: Vec<_> = here.filter(|plugged| plugged.port.network == *name).collect();
    Ok(Segment {
        network: name.clone(),
        bridge: names::bridge(name),
        mtu: network.network.mtu,
        uplink,
        service: service::service(network, &here),
    })
}

/// Gives each interface a number that it keeps while it is here: a packet may be between the two chains that a change of rules
/// replaces, and must not be taken for another interface's.
pub fn number(
    before: &BTreeMap<String, u16>,
    here: impl IntoIterator<Item = Plugged>,
) -> Vec<(Plugged, u16)> {
    let here: Vec<_> = here.into_iter().collect();
    let known = |plugged: &Plugged| before.get(&plugged.tap).copied();
    let taken: BTreeSet<u16> = here.iter().filter_map(known).collect();
    // One that has just become free is the last to be given again.
    let highest = before.values().copied().max().unwrap_or(0);
    let above = highest.saturating_add(1)..u16::MAX;
    let mut free = above
        .chain(1..=highest.min(u16::MAX - 1))
        .filter(|number| !taken.contains(number));
    let numbered = here.into_iter().filter_map(|plugged| {
        let number = known(&plugged).or_else(|| free.next())?;
        Some((plugged, number))
    });
    numbered.collect()
}

#[cfg(test)]
pub(crate) mod tests;
