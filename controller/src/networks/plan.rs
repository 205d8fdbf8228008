//! What each host must know of networks, and which hosts do not know it yet. Pure.
//!
//! Called by [`super::runner`] with a durable state. A host's document follows from the store alone; its version is the revision
//! of the last change that it shows, so it rises with each, and a restored backup, whose revision jumps ahead, is believed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use dalgu_proto::{
    host::GuestFeature,
    ids::{GroupName, HostName, NetworkName},
    network::{Interface, Kind},
};

use super::resolve;
use crate::{
    hosts,
    model::{GroupRecord, HostState, MigrationRecord, NetworkRecord, VmRecord},
    state::State,
};

/// All that a host must know of networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// See [`version`].
    pub version: u64,
    /// Its networks, in the order of their names.
    pub networks: Vec<Part>,
    /// Groups that an interface in one of them has, and those that rules of these lead to; but for those whose rules its agent does not
    /// know: of a group that it is not told of, it lets nothing through.
    pub groups: Vec<Arc<GroupRecord>>,
}

/// One of its networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The network.
    pub network: Arc<NetworkRecord>,
    /// Of an overlay: where the other hosts are reached that have it.
    pub peers: Vec<IpAddr>,
    /// Every interface in it, in the order of VM and name.
    pub interfaces: Vec<Arc<Interface>>,
}

/// Revision of the last change that a host must know.
pub fn version(state: &State, host: &HostName) -> u64 {
    let Some(place) = state.places.get(host) else {
        return state.networks_since;
    };
    let networks = place.networks.iter().filter_map(|name| state.members.get(name));
    let newest = networks.map(|members| members.changed).max().unwrap_or(0);
    newest.max(place.changed).max(state.networks_since)
}

/// Hosts that are heard from and were not told, in this run of their agents, what they must know; with the version.
pub fn due(state: &State) -> Vec<(HostName, u64)> {
    let due = state.hosts.values().filter_map(|host| {
        let live = state.live.get(&host.name)?;
        if live.state != HostState::Ready || live.run_id.is_empty() {
            return None;
        }
        let version = version(state, &host.name);
        let able = host.inventory.guest_features.contains(&GuestFeature::Network);
        let asked = state
            .places
            .get(&host.name)
            .is_some_and(|place| !place.networks.is_empty());
        (live.networks < version && (able || asked)).then(|| (host.name.clone(), version))
    });
    due.collect()
}

/// What a host must know.
pub fn document(state: &State, host: &HostName) -> Document {
    let place = state.places.get(host).cloned().unwrap_or_default();
    let parts = place.networks.iter().filter_map(|name| part(state, host, name));
    let networks: Vec<_> = parts.collect();
    let mut groups = groups(state, &networks);
    if !resolve::knows_icmp_types(state, host) {
        groups.retain(|group| !group.group.has_icmp_types());
    }
    Document {
        version: version(state, host),
        groups,
        networks,
    }
}

fn part(state: &State, host: &HostName, name: &NetworkName) -> Option<Part> {
    let network = state.networks.get(name)?.clone();
    let members = state.members.get(name)?;
    let overlay = matches!(network.network.kind, Kind::Overlay { .. });
    let others = members.hosts.keys().filter(|other| overlay && *other != host);
    let peers: BTreeSet<_> = others
        .filter_map(|other| state.hosts.get(other)?.inventory.overlay_address)
        .collect();
    Some(Part {
        network,
        peers: peers.into_iter().collect(),
        interfaces: members.interfaces.values().cloned().collect(),
    })
}

/// The groups of interfaces, and all that their rules lead to.
fn groups(state: &State, networks: &[Part]) -> Vec<Arc<GroupRecord>> {
    let interfaces = networks.iter().flat_map(|part| &part.interfaces);
    let mut open: Vec<&GroupName> = interfaces.flat_map(|interface| &interface.groups).collect();
    let mut found = BTreeMap::<&GroupName, &Arc<GroupRecord>>::new();
    while let Some(name) = open.pop() {
        let Some(group) = state.groups.get(name).filter(|_| !found.contains_key(name)) else {
            continue;
        };
        found.insert(name, group);
        open.extend(group.group.named());
    }
    found.into_values().cloned().collect()
}

/// Hosts that a migration must wait for before anything is sent: the destination must know the VM's networks, and those that
/// are heard from and have an overlay of them must know that the destination has it too, or the VM could not be reached there.
/// One that has been told nothing yet since its agent's start is told all at once and holds nobody up.
pub fn unaware<'a>(state: &'a State, vm: &'a VmRecord, migration: &'a MigrationRecord) -> Vec<&'a HostName> {
    let mut unaware = BTreeSet::new();
    for port in vm.spec.nics.iter().filter_map(|nic| nic.port()) {
        let overlay = state
            .networks
            .get(&port.network)
            .is_some_and(|network| matches!(network.network.kind, Kind::Overlay { .. }));
        let Some(members) = state.members.get(&port.network) else {
            continue;
        };
        let Some(place) = members.hosts.get(&migration.destination) else {
            continue;
        };
        let concerned = members
            .hosts
            .keys()
            .filter(|host| overlay || **host == migration.destination);
        unaware.extend(concerned.filter(|host| {
            let taken = state.live.get(*host).map_or(0, |live| live.networks);
            let heard = hosts::state_of(state, host) == HostState::Ready;
            heard && taken > 0 && taken < place.since
        }));
    }
    unaware.into_iter().collect()
}
