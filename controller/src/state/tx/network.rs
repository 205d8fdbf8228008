//! Changes of networks and security groups: their records, and the indices over who is in them and on which hosts.
//!
//! Each change notes which hosts must know of it, as the revision from which on what they were told is out of date: that of a
//! network for all hosts that have it, that of a host for what comes to it or goes. A change that a host's document does not
//! show must not touch it: documents of large networks are large.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use dalgu_proto::{
    ids::{GroupName, HostName, NetworkName},
    mutant::{self, Mutant},
    network::{Interface, Kind, Port},
    vm::Nic,
};

use super::{Table, Tx, json};
use crate::model::{EventKind, GroupRecord, HostLive, HostRecord, NetworkRecord, VmRecord};

/// A VM, and the hosts that have it or to which it comes.
type Placed<'a> = (&'a VmRecord, &'a BTreeSet<HostName>);

fn ports(vm: &VmRecord) -> impl Iterator<Item = (&Nic, &Port)> {
    let freed = vm.delete_time.is_some() && mutant::on(Mutant::LeaseFreedEarly);
    let nics = vm.spec.nics.iter().filter(move |_| !freed);
    nics.filter_map(|nic| Some((nic, nic.port()?)))
}

/// How many interfaces a VM has in each network.
fn counts<'a>(placed: Option<Placed<'a>>) -> BTreeMap<&'a NetworkName, u32> {
    let mut counts = BTreeMap::new();
    for (_, port) in placed.into_iter().flat_map(|(vm, _)| ports(vm)) {
        *counts.entry(&port.network).or_default() += 1;
    }
    counts
}

impl Tx {
    /// Asks for another look at what hosts know of networks.
    pub fn touch_networks(&mut self) {
        self.state.network_changes += 1;
    }

    /// All hosts of a network must know of this change.
    fn touch_network(&mut self, name: &NetworkName) {
        let revision = self.revision();
        if let Some(members) = self.state.members.get_mut(name) {
            members.changed = revision;
        }
        self.touch_networks();
    }

    pub(in crate::state) fn index_network(&mut self, network: Arc<NetworkRecord>) {
        let name = network.network.name.clone();
        let old = self.state.networks.insert(name.clone(), network.clone());
        // Labels and descriptions are nothing to hosts.
        if old.is_none_or(|old| old.network != network.network) {
            self.touch_network(&name);
        }
    }

    /// Puts a network.
    pub fn put_network(&mut self, mut network: NetworkRecord) {
        network.revision = self.revision();
        self.write(Table::Networks, &network.network.name, Some(json(&network)));
        self.index_network(Arc::new(network));
    }

    /// Removes a network. No interface may be in it.
    pub fn delete_network(&mut self, name: &NetworkName) {
        if self.state.networks.remove(name).is_some() {
            self.write(Table::Networks, name, None);
        }
    }

    /// Tells of a change of a network.
    pub fn network_event(&mut self, network: &NetworkName, reason: &str, message: impl Into<String>) {
        self.event(EventKind::Network, reason, network, message, None);
    }

    pub(in crate::state) fn index_group(&mut self, group: Arc<GroupRecord>) {
        let name = group.group.name.clone();
        let old = self.state.groups.insert(name.clone(), group.clone());
        if old.as_ref().is_some_and(|old| old.group == group.group) {
            return;
        }
        self.note_named(old.as_deref(), false);
        self.note_named(Some(&group), true);
        self.touch_group(&name);
    }

    /// Puts a security group.
    pub fn put_group(&mut self, mut group: GroupRecord) {
        group.revision = self.revision();
        self.write(Table::Groups, &group.group.name, Some(json(&group)));
        self.index_group(Arc::new(group));
    }

    /// Removes a security group. Nothing may use it but its own rules.
    pub fn delete_group(&mut self, name: &GroupName) {
        if let Some(old) = self.state.groups.remove(name) {
            self.note_named(Some(&old), false);
            self.write(Table::Groups, name, None);
        }
    }

    /// Tells of a change of a security group.
    pub fn group_event(&mut self, group: &GroupName, reason: &str, message: impl Into<String>) {
        self.event(EventKind::SecurityGroup, reason, group, message, None);
    }

    fn note_named(&mut self, group: Option<&GroupRecord>, add: bool) {
        let Some(group) = group.map(|group| &group.group) else {
            return;
        };
        for named in group.named() {
            let uses = self.state.group_uses.entry(named.clone()).or_default();
            if add {
                uses.named_by.insert(group.name.clone());
            } else {
                uses.named_by.remove(&group.name);
            }
            self.forget_unused(named);
        }
    }

    fn forget_unused(&mut self, group: &GroupName) {
        let uses = self.state.group_uses.get(group);
        if uses.is_some_and(|uses| uses.interfaces.is_empty() && uses.named_by.is_empty()) {
            self.state.group_uses.remove(group);
        }
    }

    /// All hosts whose documents have a group must know of this change: those with interfaces that have it, or a group whose
    /// rules lead to it.
    fn touch_group(&mut self, group: &GroupName) {
        let mut seen = BTreeSet::from([group.clone()]);
        let mut open = vec![group.clone()];
        let mut networks = BTreeSet::new();
        while let Some(group) = open.pop() {
            let Some(uses) = self.state.group_uses.get(&group) else {
                continue;
            };
            networks.extend(uses.interfaces.keys().cloned());
            let more = uses.named_by.iter().filter(|by| seen.insert((*by).clone()));
            open.extend(more.cloned());
        }
        for network in networks {
            self.touch_network(&network);
        }
    }

    /// Keeps the indices right when the ports of a VM change, or the hosts that have it. `None` is before it is there, or
    /// when it is gone.
    pub(super) fn move_ports(&mut self, old: Option<Placed<'_>>, new: Option<Placed<'_>>) {
        let (before, after) = (counts(old), counts(new));
        if before.is_empty() && after.is_empty() {
            return;
        }
        let named = |placed: Option<Placed<'_>>| placed.map(|(vm, _)| vm.name.clone());
        let nics = |placed: Option<Placed<'_>>| {
            let vm = placed.map(|(vm, _)| vm);
            vm.into_iter()
                .flat_map(ports)
                .map(|(nic, _)| nic.clone())
                .collect::<Vec<_>>()
        };
        let same = named(old) == named(new) && nics(old) == nics(new);
        if !same {
            old.into_iter()
                .for_each(|(vm, _)| self.note_interfaces(vm, false));
            new.into_iter().for_each(|(vm, _)| self.note_interfaces(vm, true));
        }
        for (placed, counts, add) in [(old, &before, false), (new, &after, true)] {
            let hosts = placed.into_iter().flat_map(|(_, hosts)| hosts);
            for host in hosts {
                for (network, count) in counts {
                    self.count(network, host, *count, add);
                }
            }
        }
        let hosts = |placed: Option<Placed<'_>>| placed.map(|(_, hosts)| hosts.clone()).unwrap_or_default();
        let hosts: BTreeSet<_> = hosts(old).union(&hosts(new)).cloned().collect();
        let networks: BTreeSet<_> = before.keys().chain(after.keys()).copied().collect();
        for network in networks {
            let moved = self.settle_places(network, &hosts);
            if !same || (moved && self.has_peers(network)) {
                self.touch_network(network);
            }
            self.forget_empty(network);
        }
    }

    /// Whether hosts of the network must know of each other.
    fn has_peers(&self, network: &NetworkName) -> bool {
        let network = self.state.networks.get(network);
        // While the store is read, its record may come later.
        network.is_none_or(|network| matches!(network.network.kind, Kind::Overlay { .. }))
    }

    fn note_interfaces(&mut self, vm: &VmRecord, add: bool) {
        for (nic, port) in ports(vm) {
            let key = (vm.name.clone(), nic.name.clone());
            let members = self.state.members.entry(port.network.clone()).or_default();
            for address in port.addresses() {
                if add {
                    members.addresses.insert(address, key.clone());
                } else if members.addresses.get(&address) == Some(&key) {
                    members.addresses.remove(&address);
                }
            }
            if add {
                members.interfaces.insert(key, Arc::new(interface(vm, nic, port)));
            } else {
                members.interfaces.remove(&key);
            }
            for group in &port.groups {
                self.note_group(group, &port.network, add);
            }
        }
    }

    fn note_group(&mut self, group: &GroupName, network: &NetworkName, add: bool) {
        let uses = self.state.group_uses.entry(group.clone()).or_default();
        let count = uses.interfaces.entry(network.clone()).or_insert(0);
        *count = if add {
            count.saturating_add(1)
        } else {
            count.saturating_sub(1)
        };
        if *count == 0 {
            uses.interfaces.remove(network);
            self.forget_unused(group);
        }
    }

    fn count(&mut self, network: &NetworkName, host: &HostName, interfaces: u32, add: bool) {
        let members = self.state.members.entry(network.clone()).or_default();
        let place = members.hosts.entry(host.clone()).or_default();
        place.interfaces = if add {
            place.interfaces.saturating_add(interfaces)
        } else {
            place.interfaces.saturating_sub(interfaces)
        };
    }

    /// Notes for which of these hosts the network came or went. Whether it did for one.
    fn settle_places(&mut self, network: &NetworkName, hosts: &BTreeSet<HostName>) -> bool {
        let revision = self.revision();
        let mut moved = false;
        for host in hosts {
            let Some(members) = self.state.members.get_mut(network) else {
                continue;
            };
            let there = members.hosts.get(host).is_some_and(|place| place.interfaces > 0);
            if !there {
                members.hosts.remove(host);
            }
            let place = self.state.places.entry(host.clone()).or_default();
            if there == place.networks.contains(network) {
                continue;
            }
            moved = true;
            place.changed = revision;
            if there {
                place.networks.insert(network.clone());
                if let Some(place) = members.hosts.get_mut(host) {
                    place.since = revision;
                }
            } else {
                place.networks.remove(network);
            }
        }
        if moved {
            self.touch_networks();
        }
        moved
    }

    fn forget_empty(&mut self, network: &NetworkName) {
        let members = self.state.members.get(network);
        if members.is_some_and(|members| members.interfaces.is_empty() && members.hosts.is_empty()) {
            self.state.members.remove(network);
        }
    }

    /// Other hosts reach a host's overlays at another address.
    pub(super) fn note_overlay_address(&mut self, host: &HostRecord) {
        let old = self.state.hosts.get(&host.name);
        if old.is_some_and(|old| old.inventory.overlay_address == host.inventory.overlay_address) {
            return;
        }
        let place = self.state.places.get(&host.name).cloned().unwrap_or_default();
        for network in &place.networks {
            if self.has_peers(network) {
                self.touch_network(network);
            }
        }
    }

    /// A host is heard from anew, or by another run of its agent: it may have to be told.
    pub(super) fn note_hearing(&mut self, host: &HostName, new: &HostLive) {
        let old = self.state.live.get(host);
        if old.is_none_or(|old| old.state != new.state || old.run_id != new.run_id) {
            self.touch_networks();
        }
    }

    /// Notes that this run of a host's agent has taken the document of that version. Not stored.
    pub fn networks_taken(&mut self, host: &HostName, run_id: &str, version: u64) {
        // Another change may have come meanwhile, or another run of the agent, which nobody told while the call was under way.
        self.touch_networks();
        let Some(live) = self.state.live.get(host).filter(|live| live.run_id == run_id) else {
            return;
        };
        let networks = live.networks.max(version);
        let live = HostLive {
            networks,
            ..(**live).clone()
        };
        self.set_live(host.clone(), live);
    }
}

fn interface(vm: &VmRecord, nic: &Nic, port: &Port) -> Interface {
    Interface {
        vm: vm.name.clone(),
        nic: nic.name.clone(),
        mac: nic.mac.clone(),
        ipv4: port.ipv4,
        ipv6: port.ipv6,
        groups: port.groups.clone(),
    }
}
