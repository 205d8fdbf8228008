//! The filters of a host's interfaces in networks, as one transaction for `nft`. Pure. docs/adr/0015 has the reasons.
//!
//! ```text
//!   tap ─> bridge prerouting: the VM's own addresses only      (a tap without rules here passes nothing)
//!       ─> inet prerouting: the network's conntrack zone        (by br_netfilter, on our bridges alone)
//!       ─> bridge forward: mark = number of the tap it comes from, and of the one it goes to
//!       ─> inet forward: by the mark, the rules of both, on what conntrack says began the connection
//!   host's own stack <─╳─> bridge: nothing passes
//! ```
//!
//! Each packet is judged by what began its connection (`ct original`), so rules that have changed hold for connections that
//! exist, both ways, from the transaction on: nothing is remembered as allowed.
//!
//! Of a VM that has arrived, conntrack knows no connection here. The first packet of a TCP connection that was begun elsewhere may
//! come from either end, so for a while it is guessed which end began: the one that rules allow. A guess cannot begin a
//! connection, because what begins one is judged as it says itself.
//!
//! Names and addresses are of the validated types, which hold nothing that means anything to `nft`; free text is left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use dalgu_proto::{
    ids::{GroupName, NetworkName},
    network::{Direction, Group, IcmpType, Kind, Network, Protocol, Remote, Rule},
};
use ipnet::IpNet;

use super::{
    document::{HostNetwork, Kept, Plugged},
    names,
};

mod spoofing;

/// Port that VXLAN uses.
pub const VXLAN_PORT: u16 = 4789;
/// Mark of a packet from or to a network's DHCP and DNS; no tap has this number.
const SERVICE: u16 = u16::MAX;
/// Mark of a connection that was begun by the side which conntrack takes for the one that answers.
const TURNED: u32 = 1;
/// What a guest may ask a network's DHCP and DNS, besides ARP and neighbour discovery.
const ASKED: [&str; 7] = [
    "udp dport 67",
    "udp dport 547",
    "udp dport 53",
    "tcp dport 53",
    "icmp type echo-request",
    "icmpv6 type echo-request",
    "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-report, mld2-listener-report }",
];

/// What the rules are made from.
pub struct Facts<'a> {
    /// What this host was told.
    pub kept: &'a Kept,
    /// Interfaces that are here, each with a number that no other has had while packets of it were under way.
    pub ports: &'a [(Plugged, u16)],
    /// Taps of those that have arrived by a migration a while ago, or are about to.
    pub arrived: &'a BTreeSet<String>,
    /// Where other hosts' overlays reach this one.
    pub overlay_address: Option<IpAddr>,
}

/// The whole ruleset, which takes the place of the one before.
pub fn ruleset(facts: &Facts<'_>) -> String {
    let mut text = String::new();
    for family in ["bridge", "inet"] {
        // Made so that it can be deleted.
        let _ = writeln!(text, "table {family} dalgu\ndelete table {family} dalgu");
    }
    let known = known(facts);
    let mut bridge = Table::new("bridge");
    spoofing::chains(&mut bridge, &known);
    forwarding(&mut bridge, facts, &known);
    let mut inet = Table::new("inet");
    zones(&mut inet, facts.kept);
    overlays(&mut inet, facts);
    connections(&mut inet, facts, &known);
    text + &bridge.end() + &inet.end()
}

/// Interfaces whose network is known; the others pass nothing.
struct Known<'a> {
    plugged: &'a Plugged,
    number: u16,
    network: &'a Network,
}

fn known<'a>(facts: &'a Facts<'_>) -> Vec<Known<'a>> {
    let find = |plugged: &Plugged| {
        let mut networks = facts.kept.networks();
        networks.find(|known| known.network.name == plugged.port.network)
    };
    let ports = facts.ports.iter();
    let known = ports.filter_map(|(plugged, number)| {
        Some(Known {
            plugged,
            number: *number,
            network: &find(plugged)?.network,
        })
    });
    known.collect()
}

/// A table while it is written.
struct Table(String);

impl Table {
    fn new(family: &str) -> Self {
        Self(format!("table {family} dalgu {{\n"))
    }

    fn chain(&mut self, name: &str, hook: Option<(&str, &str)>, rules: &[String]) {
        let _ = writeln!(self.0, "  chain {name} {{");
        if let Some((hook, priority)) = hook {
            let _ = writeln!(
                self.0,
                "    type filter hook {hook} priority {priority}; policy accept;"
            );
        }
        for rule in rules {
            let _ = writeln!(self.0, "    {rule}");
        }
        self.0.push_str("  }\n");
    }

    fn end(mut self) -> String {
        self.0.push_str("}\n");
        self.0
    }
}

fn list(items: impl IntoIterator<Item = String>) -> String {
    items.into_iter().collect::<Vec<_>>().join(", ")
}

/// A rule that looks a key up; none where there is nothing to find.
fn verdicts(key: &str, items: impl IntoIterator<Item = String>) -> Option<String> {
    let items = list(items);
    (!items.is_empty()).then(|| format!("{key} vmap {{ {items} }}"))
}

/// Between the ports of a bridge: what never crosses hosts, and between whom a packet is to be judged.
fn forwarding(table: &mut Table, facts: &Facts<'_>, known: &[Known<'_>]) {
    for port in known {
        towards(table, port);
    }
    let mut from: Vec<_> = known
        .iter()
        .map(|port| format!("\"{}\" : jump sent-{}", port.plugged.tap, port.plugged.tap))
        .collect();
    let mut to: Vec<_> = known
        .iter()
        .map(|port| format!("\"{}\" : goto to-{}", port.plugged.tap, port.plugged.tap))
        .collect();
    let mut ports = Vec::new();
    for network in facts.kept.networks() {
        let service = names::device(names::SERVICE, &network.network.name);
        let uplink = names::uplink(&network.network);
        crossing(table, &network.network, &uplink);
        from.push(format!("\"{uplink}\" : jump came-{uplink}"));
        to.push(format!("\"{uplink}\" : goto leaves-{uplink}"));
        to.push(format!("\"{service}\" : goto asks"));
        ports.push(service);
    }
    let mut rules = Vec::new();
    // Nobody but the VMs here reaches what is served here.
    rules.extend(
        [names::VXLAN, names::UPLINK, names::VLAN]
            .iter()
            .flat_map(|uplink| {
                [
                    format!("iifname \"{uplink}*\" oifname \"{}*\" drop", names::SERVICE),
                    format!("iifname \"{}*\" oifname \"{uplink}*\" drop", names::SERVICE),
                ]
            }),
    );
    rules.push(format!(
        "iifname \"{}*\" meta mark set {:#x}",
        names::SERVICE,
        u32::from(SERVICE) << 16
    ));
    rules.extend(verdicts("iifname", from));
    rules.extend(verdicts("oifname", to));
    rules.push(format!("oifname \"{}*\" drop", names::TAP));
    table.chain("forward", Some(("forward", "-200")), &rules);
    let mut rules = vec![
        format!("meta mark set meta mark | {SERVICE:#x}"),
        "ether type arp accept".to_owned(),
    ];
    rules.extend(ASKED.iter().map(|asked| format!("{asked} accept")));
    rules.push("drop".into());
    table.chain("asks", None, &rules);
}

/// Bytes that a limited interface passes at once at least: some of the largest packets that a guest hands over.
const AT_ONCE: u64 = 262_144;

/// What goes to a VM, and what comes from it.
fn towards(table: &mut Table, port: &Known<'_>) {
    let Plugged { tap, mac, port: plug } = port.plugged;
    let limit = |mbit: Option<u32>| {
        mbit.map(|mbit| {
            let rate = u64::from(mbit) * 125_000;
            // The kernel lets through a second of the rate at once, and this besides.
            let burst = AT_ONCE.saturating_sub(rate).max(1);
            format!("limit rate over {rate} bytes/second burst {burst} bytes drop")
        })
    };
    let mut rules = vec![
        // What the bridge floods because it has not learnt where it belongs.
        format!("ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 ether daddr != {mac} drop"),
    ];
    rules.extend(limit(plug.receive_limit_mbit));
    rules.push(format!("meta mark set meta mark | {:#x}", port.number));
    table.chain(&format!("to-{tap}"), None, &rules);
    let mut rules = spoofing::never_said(port);
    rules.extend(limit(plug.send_limit_mbit));
    rules.push(format!("meta mark set {:#x}", u32::from(port.number) << 16));
    table.chain(&format!("sent-{tap}"), None, &rules);
}

/// What does not cross between this host's part of a network and the rest: the service address is each host's own, and its
/// DHCP and router advertisements are for its own VMs.
fn crossing(table: &mut Table, network: &Network, uplink: &str) {
    let mut came = vec!["meta mark set 0".to_owned()];
    let mut leaves = Vec::new();
    let site = matches!(network.kind, Kind::Bridge { .. });
    if let Some(subnet) = &network.ipv4 {
        let service = subnet.service;
        for rules in [&mut came, &mut leaves] {
            rules.push(format!("arp saddr ip {service} drop"));
            rules.push(format!("arp daddr ip {service} drop"));
            rules.push(format!("ip saddr {service} drop"));
            rules.push(format!("ip daddr {service} drop"));
        }
        leaves.push("udp dport 67 drop".into());
        came.push("udp sport 67 drop".into());
    }
    if let Some(subnet) = &network.ipv6 {
        let service = subnet.service;
        if let IpAddr::V6(address) = service {
            let about = format!("{:#034x}", u128::from(address));
            for rules in [&mut came, &mut leaves] {
                rules.push(format!(
                    "icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} @th,64,128 {about} drop"
                ));
                rules.push(format!("ip6 saddr {service} drop"));
                rules.push(format!("ip6 daddr {service} drop"));
            }
        }
        leaves.push("udp dport 547 drop".into());
        came.push("udp sport 547 drop".into());
        // The site's own router may say that it is there; an overlay has none.
        if !(site && subnet.gateway.is_some()) {
            leaves.push("icmpv6 type nd-router-solicit drop".into());
            came.push("icmpv6 type { nd-router-advert, nd-redirect } drop".into());
        }
    }
    table.chain(&format!("came-{uplink}"), None, &came);
    table.chain(&format!("leaves-{uplink}"), None, &leaves);
}

/// Each network has its own table of connections.
fn zones(table: &mut Table, kept: &Kept) {
    let zones = || {
        let zones = kept.zones.iter();
        list(zones.map(|(network, zone)| format!("\"{}\" : {zone}", names::bridge(network))))
    };
    let rules = match kept.zones.is_empty() {
        true => Vec::new(),
        false => vec![format!("ct zone set iifname map {{ {} }}", zones())],
    };
    table.chain("prerouting", Some(("prerouting", "raw")), &rules);
}

/// Only hosts that have VMs in an overlay may send into it.
fn overlays(table: &mut Table, facts: &Facts<'_>) {
    let mut rules = Vec::new();
    if let Some(own) = facts.overlay_address {
        let family = if own.is_ipv4() { "ip" } else { "ip6" };
        let to_us = format!("{family} daddr {own} udp dport {VXLAN_PORT}");
        let vnis = facts
            .kept
            .networks()
            .filter_map(|network| match network.network.kind {
                Kind::Overlay { vni } => Some((vni, peers(network, own))),
                Kind::Bridge { .. } => None,
            });
        for (vni, peers) in vnis {
            let known = match peers.is_empty() {
                true => String::new(),
                false => format!("{family} saddr != {{ {} }} ", list(peers)),
            };
            // The VNI is bytes 4 to 6 of the VXLAN header, which follows the eight of UDP.
            rules.push(format!("{to_us} @th,96,24 {vni:#x} {known}drop"));
        }
    }
    table.chain("input", Some(("input", "filter")), &rules);
    let notrack = format!("udp dport {VXLAN_PORT} notrack");
    table.chain("output", Some(("output", "raw")), &[notrack]);
}

/// Peers that this host can reach: of the family of its own address.
pub fn peers(network: &HostNetwork, own: IpAddr) -> BTreeSet<String> {
    let peers = network.peers.iter();
    let reachable = peers.filter(|peer| peer.is_ipv4() == own.is_ipv4() && **peer != own);
    reachable.map(IpAddr::to_string).collect()
}

/// What is let through between interfaces.
fn connections(table: &mut Table, facts: &Facts<'_>, known: &[Known<'_>]) {
    let groups: BTreeMap<_, _> = facts.kept.groups().map(|group| (&group.name, group)).collect();
    let mut named = BTreeSet::new();
    let mut chains = Vec::new();
    for port in known {
        for direction in [Direction::Egress, Direction::Ingress] {
            let (name, rules) = judged(port, &groups, direction, &mut named);
            let end = |end: &str| {
                rules
                    .iter()
                    .cloned()
                    .map(|rule| if rule == "drop" { end.to_owned() } else { rule })
                    .collect()
            };
            if facts.arrived.contains(&port.plugged.tap) {
                chains.push((format!("guess-{name}"), end(&format!("ct mark set {TURNED}"))));
            }
            let turned = rules.iter().map(|rule| rule.replace("ct original", "ct reply"));
            chains.push((format!("turned-{name}"), turned.collect()));
            chains.push((name, rules));
        }
    }
    for (network, group) in named {
        sets(table, facts.kept, network, group);
    }
    for (name, rules) in chains {
        table.chain(&name, None, &rules);
    }
    let arrived: Vec<_> = known
        .iter()
        .filter(|port| facts.arrived.contains(&port.plugged.tap))
        .collect();
    table.chain("guess", None, &ends(arrived, "guess-out", "guess-in"));
    for (turned, prefix) in [("", ""), ("turned-", "turned-")] {
        let ends = |sender: &str, receiver: &str| {
            ends(
                known,
                &format!("{prefix}{sender}"),
                &format!("{prefix}{receiver}"),
            )
        };
        table.chain(&format!("{turned}begun"), None, &ends("out", "in"));
        table.chain(&format!("{turned}answered"), None, &ends("in", "out"));
    }
    table.chain(
        "forward",
        Some(("forward", "filter")),
        &[
            format!("iifname != \"{}*\" accept", names::BRIDGE),
            format!("meta mark & 0xffff0000 == {:#x} accept", u32::from(SERVICE) << 16),
            format!("meta mark & 0x0000ffff == {SERVICE:#x} accept"),
            // Not of connections to conntrack: neighbours, routers, and who listens to which group.
            "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert, mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept".into(),
            // Of a network whose addresses are not ours to give, the site's own server, which is no VM here.
            "meta mark & 0xffff0000 == 0 udp sport { 67, 547 } udp dport { 68, 546 } accept".into(),
            "meta mark & 0x0000ffff == 0 udp sport { 68, 546 } udp dport { 67, 547 } accept".into(),
            "ct state related meta l4proto { icmp, ipv6-icmp } accept".into(),
            "ct state { invalid, untracked } drop".into(),
            "ct state new tcp flags & (syn | rst) == 0 jump guess".into(),
            // Who begins says so; a guess is for what was begun before.
            format!("ct mark {TURNED} tcp flags & (syn | ack) == syn drop"),
            format!("ct mark {TURNED} ct direction vmap {{ original : goto turned-answered, reply : goto turned-begun }}"),
            "ct direction vmap { original : jump begun, reply : jump answered }".into(),
        ],
    );
}

/// Asks the chains of both ends of a packet.
fn ends<'a>(
    known: impl IntoIterator<Item = &'a Known<'a>> + Clone,
    sender: &str,
    receiver: &str,
) -> Vec<String> {
    let from = known.clone().into_iter().map(|port| {
        let number = u32::from(port.number) << 16;
        format!("{number:#x} : jump {sender}-{}", port.plugged.tap)
    });
    let to = known
        .into_iter()
        .map(|port| format!("{:#x} : jump {receiver}-{}", port.number, port.plugged.tap));
    let mut rules = Vec::from_iter(verdicts("meta mark & 0xffff0000", from));
    rules.extend(verdicts("meta mark & 0x0000ffff", to));
    rules
}

/// The addresses of a group's interfaces in a network.
fn sets(table: &mut Table, kept: &Kept, network: &NetworkName, group: &GroupName) {
    let mut found = kept.networks();
    let interfaces = found
        .find(|known| known.network.name == *network)
        .into_iter()
        .flat_map(|known| &known.interfaces)
        .filter(|interface| interface.groups.contains(group));
    let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
    for interface in interfaces {
        ipv4.extend(interface.ipv4.map(|address| address.to_string()));
        ipv6.extend(interface.ipv6.map(|address| address.to_string()));
    }
    for (number, addresses) in [(4, ipv4), (6, ipv6)] {
        let _ = writeln!(table.0, "  set {} {{", set(number, network, group));
        let _ = writeln!(table.0, "    type ipv{number}_addr");
        if !addresses.is_empty() {
            let _ = writeln!(table.0, "    elements = {{ {} }}", list(addresses));
        }
        table.0.push_str("  }\n");
    }
}

fn set(number: u8, network: &NetworkName, group: &GroupName) -> String {
    format!("g{number}/{network}/{group}")
}

/// The chain of an interface for connections begun one way: a packet that no rule returns is dropped.
fn judged<'a>(
    port: &Known<'a>,
    groups: &BTreeMap<&GroupName, &'a Group>,
    direction: Direction,
    named: &mut BTreeSet<(&'a NetworkName, &'a GroupName)>,
) -> (String, Vec<String>) {
    let Plugged { tap, port: plug, .. } = port.plugged;
    let mut rules = Vec::new();
    // Of a group that is not known yet, nothing is known to be allowed.
    let mut restricted = plug.groups.iter().any(|group| !groups.contains_key(group));
    let own = plug.groups.iter().filter_map(|group| groups.get(group));
    for rule in own.flat_map(|group| &group.rules) {
        if rule.direction != direction {
            continue;
        }
        restricted = true;
        if let Remote::Group(group) = &rule.remote {
            named.insert((&port.plugged.port.network, group));
        }
        for rule in lines(rule, &plug.network) {
            if !rules.contains(&rule) {
                rules.push(rule);
            }
        }
    }
    let prefix = match direction {
        Direction::Ingress => "in",
        Direction::Egress => "out",
    };
    if direction == Direction::Ingress || restricted {
        rules.push("drop".to_owned());
    }
    (format!("{prefix}-{tap}"), rules)
}

/// A rule in `nft`'s words.
fn lines(rule: &Rule, network: &NetworkName) -> Vec<String> {
    // Of each family, where there is such a thing.
    let [ipv4, ipv6] = match &rule.protocol {
        Protocol::Any => both(String::new()),
        Protocol::Tcp(ports) => both(transport("tcp", *ports)),
        Protocol::Udp(ports) => both(transport("udp", *ports)),
        Protocol::Icmp => both("meta l4proto { icmp, ipv6-icmp } ".to_owned()),
        Protocol::IcmpType(kind) => begun_with(*kind),
    };
    let end = match rule.direction {
        Direction::Ingress => "saddr",
        Direction::Egress => "daddr",
    };
    let [whom4, whom6] = match &rule.remote {
        Remote::Any if ipv4 == ipv6 => [Some(String::new()), None],
        Remote::Any => both(String::new()),
        Remote::Cidr(IpNet::V4(cidr)) => [Some(format!("ct original ip {end} {cidr} ")), None],
        Remote::Cidr(IpNet::V6(cidr)) => [None, Some(format!("ct original ip6 {end} {cidr} "))],
        Remote::Group(group) => [(4, "ip"), (6, "ip6")].map(|(number, family)| {
            Some(format!(
                "ct original {family} {end} @{} ",
                set(number, network, group)
            ))
        }),
    };
    let families = [ipv4.zip(whom4), ipv6.zip(whom6)];
    let lines = families.into_iter().flatten();
    lines.map(|(what, whom)| format!("{what}{whom}return")).collect()
}

fn both(text: String) -> [Option<String>; 2] {
    [Some(text.clone()), Some(text)]
}

/// ICMP of one type. Where other protocols have a port, conntrack keeps type and code.
fn begun_with(kind: IcmpType) -> [Option<String>; 2] {
    [(kind.ipv4(), "icmp"), (kind.ipv6(), "ipv6-icmp")].map(|(number, protocol)| {
        let first = u16::from(number?) << 8;
        Some(transport(protocol, Some((first, first | 0xff))))
    })
}

fn transport(protocol: &str, ports: Option<(u16, u16)>) -> String {
    match ports {
        None => format!("meta l4proto {protocol} "),
        Some((first, last)) if first == last => {
            format!("meta l4proto {protocol} ct original proto-dst {first} ")
        }
        Some((first, last)) => format!("meta l4proto {protocol} ct original proto-dst {first}-{last} "),
    }
}
