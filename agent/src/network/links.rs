//! The devices of a host's networks: what `ip` and `bridge` are told, from what should be and what is there. Pure.
//!
//! Only devices with names of ours are touched, and a bridge with an interface of a VM on it is never removed.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{
    compile::{Segment, Uplink},
    names,
    rules::VXLAN_PORT,
};

/// Everybody: where a VXLAN device sends what it has not learnt the place of.
const ALL: &str = "00:00:00:00:00:00";

/// A device, as `ip -json -details link` shows it; of its many fields those that matter here.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
#[serde(default)]
pub struct Link {
    ifname: String,
    mtu: u32,
    master: Option<String>,
    flags: Vec<String>,
    linkinfo: Info,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
#[serde(default)]
struct Info {
    info_kind: Option<String>,
    info_data: Data,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
#[serde(default)]
struct Data {
    id: Option<u32>,
    local: Option<String>,
    local6: Option<String>,
    nf_call_iptables: u8,
    nf_call_ip6tables: u8,
}

/// An entry of a forwarding table, as `bridge -json fdb` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
#[serde(default)]
pub struct Entry {
    mac: String,
    ifname: String,
    dst: Option<String>,
}

/// What is there.
#[derive(Debug, Default)]
pub struct Seen {
    /// Devices by name.
    pub links: BTreeMap<String, Link>,
    /// Of the overlays' devices: where they flood to.
    pub floods: BTreeMap<String, BTreeSet<String>>,
    /// Of the same: the MAC addresses that they send elsewhere, and where.
    pub learnt: BTreeMap<String, BTreeSet<(String, String)>>,
}

impl Seen {
    /// Sorts what the two programs show.
    pub fn new(links: Vec<Link>, entries: Vec<Entry>) -> Self {
        let mut floods: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut learnt: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
        for Entry { mac, ifname, dst } in entries {
            let Some(dst) = dst else { continue };
            if mac == ALL {
                floods.entry(ifname).or_default().insert(dst);
            } else {
                learnt.entry(ifname).or_default().insert((mac, dst));
            }
        }
        let links = links
            .into_iter()
            .map(|link| (link.ifname.clone(), link))
            .collect();
        Self {
            links,
            floods,
            learnt,
        }
    }

    /// Whether a device is there.
    pub fn has(&self, name: &str) -> bool {
        self.links.contains_key(name)
    }
}

/// Lines for `ip -batch` and, after that, for `bridge -batch`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Script {
    /// For `ip`.
    pub ip: Vec<String>,
    /// For `bridge`.
    pub bridge: Vec<String>,
    /// For `bridge` too, of what may have gone by itself by then.
    pub fading: Vec<String>,
}

impl Script {
    fn ip(&mut self, line: String) {
        self.ip.push(line);
    }

    /// Puts a port on a bridge, with this MTU, and up.
    fn port(&mut self, seen: &Seen, fresh: bool, name: &str, master: &str, mtu: u32) {
        let link = seen.links.get(name).filter(|_| !fresh);
        let right =
            link.is_some_and(|link| link.master.as_deref() == Some(master) && link.mtu == mtu && is_up(link));
        if !right {
            self.ip(format!("link set dev {name} mtu {mtu} master {master} up"));
        }
    }
}

fn is_up(link: &Link) -> bool {
    link.flags.iter().any(|flag| flag == "UP")
}

/// What is to be done for a network.
///
/// # Errors
/// Says what of the host is missing.
pub fn make(segment: &Segment, seen: &Seen) -> Result<Script, String> {
    let mut script = Script::default();
    bridge(&mut script, segment, seen);
    match &segment.uplink {
        Uplink::Vxlan { .. } => vxlan(&mut script, segment, seen),
        Uplink::Bridge(host) => {
            host_bridge(host, seen)?;
            let near = names::device(names::UPLINK, &segment.network);
            let far = names::device(names::HOST_SIDE, &segment.network);
            let fresh = !seen.has(&near);
            if fresh {
                script.ip(format!("link add dev {near} type veth peer name {far}"));
                script.ip(format!("link set dev {far} addrgenmode none"));
            }
            script.port(seen, fresh, &near, &segment.bridge, segment.mtu);
            script.port(seen, fresh, &far, host, segment.mtu);
        }
        Uplink::Vlan(host, vlan) => {
            host_bridge(host, seen)?;
            let name = names::device(names::VLAN, &segment.network);
            let known = seen.links.get(&name);
            let same = known.is_some_and(|link| link.linkinfo.info_data.id == Some((*vlan).into()));
            if known.is_some() && !same {
                script.ip(format!("link del dev {name}"));
            }
            if !same {
                script.ip(format!("link add link {host} name {name} type vlan id {vlan}"));
            }
            script.port(seen, !same, &name, &segment.bridge, segment.mtu);
        }
    }
    Ok(script)
}

fn host_bridge(name: &str, seen: &Seen) -> Result<(), String> {
    let link = seen.links.get(name);
    match link.and_then(|link| link.linkinfo.info_kind.as_deref()) {
        Some("bridge") => Ok(()),
        _ => Err(format!("the host has no bridge {name}")),
    }
}

fn bridge(script: &mut Script, segment: &Segment, seen: &Seen) {
    let Segment { bridge, mtu, .. } = segment;
    let filtered = "type bridge nf_call_iptables 1 nf_call_ip6tables 1";
    match seen.links.get(bridge) {
        None => {
            script.ip(format!(
                "link add dev {bridge} mtu {mtu} {filtered} mcast_snooping 0 forward_delay 0"
            ));
            script.ip(format!(
                "link set dev {bridge} addrgenmode none alias {}",
                segment.network
            ));
            script.ip(format!("link set dev {bridge} up"));
        }
        Some(link) => {
            let data = &link.linkinfo.info_data;
            if (data.nf_call_iptables, data.nf_call_ip6tables) != (1, 1) {
                script.ip(format!("link set dev {bridge} {filtered}"));
            }
            if link.mtu != *mtu || !is_up(link) {
                script.ip(format!("link set dev {bridge} mtu {mtu} up"));
            }
        }
    }
}

fn vxlan(script: &mut Script, segment: &Segment, seen: &Seen) {
    let Uplink::Vxlan { vni, local, peers } = &segment.uplink else {
        return;
    };
    let name = names::device(names::VXLAN, &segment.network);
    let known = seen.links.get(&name);
    let same = known.is_some_and(|link| {
        let data = &link.linkinfo.info_data;
        let address = data.local.as_ref().or(data.local6.as_ref());
        data.id == Some(*vni) && address == Some(&local.to_string())
    });
    if known.is_some() && !same {
        script.ip(format!("link del dev {name}"));
    }
    if !same {
        script.ip(format!(
            "link add dev {name} type vxlan id {vni} local {local} dstport {VXLAN_PORT}"
        ));
        script.ip(format!("link set dev {name} addrgenmode none"));
    }
    script.port(seen, !same, &name, &segment.bridge, segment.mtu);
    let none = BTreeSet::new();
    let before = seen.floods.get(&name).filter(|_| same).unwrap_or(&none);
    for peer in peers.difference(before) {
        script
            .bridge
            .push(format!("fdb append {ALL} dev {name} dst {peer}"));
    }
    for peer in before.difference(peers) {
        script.bridge.push(format!("fdb del {ALL} dev {name} dst {peer}"));
    }
    // What was learnt of a host that has left would send packets there for minutes.
    let learnt = seen.learnt.get(&name).filter(|_| same).into_iter().flatten();
    for (mac, peer) in learnt.filter(|(_, peer)| !peers.contains(peer)) {
        script.fading.push(format!("fdb del {mac} dev {name} dst {peer}"));
    }
}

/// What is there and belongs to no network that is wanted.
pub fn remove(segments: &[Segment], seen: &Seen) -> Script {
    let wanted: BTreeSet<_> = segments.iter().map(|segment| segment.bridge.as_str()).collect();
    let in_use: BTreeSet<_> = seen
        .links
        .values()
        .filter(|link| link.ifname.starts_with(names::TAP))
        .filter_map(|link| link.master.as_deref())
        .collect();
    // The other end of a veth goes with this one.
    let prefixes = [
        names::VXLAN,
        names::UPLINK,
        names::VLAN,
        names::SERVICE,
        names::BRIDGE,
    ];
    let own = prefixes.iter().flat_map(|prefix| {
        let named = seen.links.keys();
        named.filter_map(move |name| Some((name, ours(name, prefix)?)))
    });
    let mut script = Script::default();
    for (name, bridge) in own {
        if !wanted.contains(bridge.as_str()) && !in_use.contains(bridge.as_str()) {
            script.ip(format!("link del dev {name}"));
        }
    }
    script
}

/// The bridge that a device of ours belongs to.
fn ours(name: &str, prefix: &str) -> Option<String> {
    let rest = name.strip_prefix(prefix)?;
    let hex = rest.len() == 10 && rest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    hex.then(|| format!("{}{rest}", names::BRIDGE))
}

#[cfg(test)]
mod tests;
