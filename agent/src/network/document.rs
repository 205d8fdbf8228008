//! What this host was told of networks, and what it keeps of it. Pure.
//!
//! The controller tells all that its VMs need, present and coming. A network that is left out stays here as it was while a VM has
//! an interface in it: the VM may be about to leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dalgu_proto::{
    ids::{GroupName, NetworkName, VmId},
    network::{Group, Interface, Network, Port},
    vm::Spec,
};
use serde::{Deserialize, Serialize};

use super::names;

/// First conntrack zone that is given to a network. Others who use zones begin at 1.
const FIRST_ZONE: u16 = 0xd000;

/// A network, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNetwork {
    /// The network.
    pub network: Network,
    /// Of an overlay: the other hosts that have VMs in it.
    #[serde(default)]
    pub peers: Vec<IpAddr>,
    /// Every interface in it on the site.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
}

/// What this host was told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Document {
    /// Rises with each change.
    pub version: u64,
    /// The networks.
    pub networks: Vec<HostNetwork>,
    /// The security groups.
    pub groups: Vec<Group>,
}

/// An interface of a VM of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    /// Its tap.
    pub tap: String,
    /// Its MAC address.
    pub mac: String,
    /// How it plugs in.
    pub port: Port,
}

/// The interfaces of a VM that plug into networks.
pub fn plugged(vm: VmId, spec: &Spec) -> impl Iterator<Item = Plugged> {
    spec.nics.iter().filter_map(move |nic| {
        Some(Plugged {
            tap: names::tap(vm, &nic.name),
            mac: nic.mac.clone(),
            port: nic.port()?.clone(),
        })
    })
}

/// What this host keeps across restarts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Kept {
    /// As it was told last.
    pub told: Document,
    /// What was left out of that, and is needed by interfaces that are here.
    #[serde(default)]
    pub left_out: Document,
    /// The conntrack zone of each network: two may have the same addresses, and what is known of connections outlives the agent.
    #[serde(default)]
    pub zones: BTreeMap<NetworkName, u16>,
}

impl Kept {
    /// What follows from being told something new, where these interfaces are here.
    pub fn told(&self, told: Document, here: &[Plugged]) -> Self {
        let used: BTreeSet<_> = here.iter().map(|plugged| &plugged.port.network).collect();
        let left_out: Vec<_> = self
            .networks()
            .filter(|known| used.contains(&known.network.name))
            .filter(|known| {
                told.networks
                    .iter()
                    .all(|new| new.network.name != known.network.name)
            })
            .cloned()
            .collect();
        // A group goes with the last interface that has it, or that may be met by one of its rules.
        let groups = self
            .groups()
            .filter(|_| !left_out.is_empty())
            .filter(|known| told.groups.iter().all(|new| new.name != known.name))
            .cloned()
            .collect();
        let left_out = Document {
            version: 0,
            networks: left_out,
            groups,
        };
        let mut kept = Self {
            told,
            left_out,
            zones: BTreeMap::new(),
        };
        kept.zones = self.zones_of(&kept);
        kept
    }

    fn zones_of(&self, next: &Self) -> BTreeMap<NetworkName, u16> {
        let names: Vec<_> = next.networks().map(|known| known.network.name.clone()).collect();
        let mut zones: BTreeMap<_, _> = self.zones.clone();
        zones.retain(|name, _| names.contains(name));
        for name in names {
            let taken: BTreeSet<_> = zones.values().copied().collect();
            let free = (FIRST_ZONE..u16::MAX).find(|zone| !taken.contains(zone));
            zones.entry(name).or_insert_with(|| free.unwrap_or(FIRST_ZONE));
        }
        zones
    }

    /// Every network that is known.
    pub fn networks(&self) -> impl Iterator<Item = &HostNetwork> {
        self.told.networks.iter().chain(&self.left_out.networks)
    }

    /// Every security group that is known.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.told.groups.iter().chain(&self.left_out.groups)
    }

    /// What an interface needs that is not known here yet.
    pub fn missing(&self, plugged: &Plugged) -> Option<String> {
        let name = &plugged.port.network;
        let Some(network) = self.networks().find(|known| known.network.name == *name) else {
            return Some(format!("network {name}"));
        };
        let unknown = |group: &&GroupName| self.groups().all(|known| known.name != **group);
        if let Some(group) = plugged.port.groups.iter().find(unknown) {
            return Some(format!("security group {group}"));
        }
        let own = |other: &Interface| other.mac == plugged.mac;
        (!network.interfaces.iter().any(own)).then(|| format!("the VM's own interface in network {name}"))
    }
}

#[cfg(test)]
mod tests;
