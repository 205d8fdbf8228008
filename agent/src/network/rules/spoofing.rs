//! What no VM says: in another's name, or as a router or DHCP server. Called by [`super::ruleset`] and the chains of each tap. Pure.

use std::net::{IpAddr, Ipv6Addr};

use super::{Known, Table, list, verdicts};
use crate::network::{document::Plugged, names};

/// What a VM sends must bear its own addresses.
pub(super) fn chains(table: &mut Table, known: &[Known<'_>]) {
    for port in known {
        from(table, port);
    }
    let jumps = known.iter().map(|port| {
        let tap = &port.plugged.tap;
        format!("\"{tap}\" : goto from-{tap}")
    });
    let mut rules: Vec<_> = verdicts("iifname", jumps).into_iter().collect();
    rules.push(format!("iifname \"{}*\" drop", names::TAP));
    table.chain("prerouting", Some(("prerouting", "-300")), &rules);
    // The host itself has no part in these networks: their DHCP and DNS are in a namespace of their own.
    let closed = |name: &str| {
        let ports = [
            names::TAP,
            names::VXLAN,
            names::UPLINK,
            names::VLAN,
            names::SERVICE,
        ];
        ports.map(|prefix| format!("{name} \"{prefix}*\" drop"))
    };
    table.chain("input", Some(("input", "-200")), &closed("iifname"));
    table.chain("output", Some(("output", "-200")), &closed("oifname"));
}

fn from(table: &mut Table, port: &Known<'_>) {
    let Plugged { tap, mac, port: plug } = port.plugged;
    let ipv4 = own(plug.addresses(), true);
    table.chain(
        &format!("from-{tap}"),
        None,
        &[
            format!("ether saddr != {mac} drop"),
            // 0x8035 is RARP: QEMU announces with it where the VM is now.
            format!("ether type vmap {{ arp : goto arp-{tap}, ip : goto ip-{tap}, ip6 : goto ip6-{tap}, 0x8035 : accept }}"),
            "drop".into(),
        ],
    );
    let arp = format!("arp htype 1 arp ptype ip arp saddr ether {mac}");
    let mut rules = Vec::new();
    match port.network.ipv4 {
        None => rules.push(format!("{arp} accept")),
        Some(_) => rules.extend(ipv4.iter().flat_map(|own| {
            // Whoever asks who has another's address, before it has one itself, keeps that one from having it (RFC 5227, 2.1.1).
            let asks = format!("arp saddr ip 0.0.0.0 arp daddr ip {own}");
            [
                format!("{arp} arp saddr ip {own} accept"),
                format!("{arp} {asks} accept"),
            ]
        })),
    }
    rules.push("drop".into());
    table.chain(&format!("arp-{tap}"), None, &rules);
    let mut rules = Vec::new();
    if port.network.ipv4.is_some() {
        rules.push("ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept".into());
        rules.extend(ipv4.iter().map(|address| format!("ip saddr {address} accept")));
        rules.push("drop".into());
    }
    table.chain(&format!("ip-{tap}"), None, &rules);
    let mut rules = Vec::new();
    if port.network.ipv6.is_some() {
        let addresses = own(plug.addresses().chain(link_local(mac).map(IpAddr::V6)), false);
        let own = targets(port);
        rules.push(format!("ip6 saddr {{ {} }} accept", list(addresses)));
        // Before it has an address a guest asks whether another has it, and for routers. Whoever asks so about another's keeps that
        // one from having it (RFC 4862, 5.4.3).
        rules.push(format!(
            "ip6 saddr :: icmpv6 type nd-neighbor-solicit @th,64,128 {{ {own} }} accept"
        ));
        rules.push("ip6 saddr :: icmpv6 type { nd-router-solicit, mld2-listener-report } accept".into());
        rules.push("drop".into());
    }
    table.chain(&format!("ip6-{tap}"), None, &rules);
}

/// A VM's own IPv6 addresses, as neighbour discovery says whom it is about: 8 bytes behind the head of ICMPv6.
fn targets(port: &Known<'_>) -> String {
    let Plugged { mac, port: plug, .. } = port.plugged;
    let own = plug.addresses().chain(link_local(mac).map(IpAddr::V6));
    list(own.filter_map(|address| match address {
        IpAddr::V6(address) => Some(format!("{:#034x}", u128::from(address))),
        IpAddr::V4(_) => None,
    }))
}

/// What no VM says. It is looked for here because packets are whole here, also those that came in pieces.
pub(super) fn never_said(port: &Known<'_>) -> Vec<String> {
    let client = port.plugged.mac.replace(':', "");
    let mut rules = vec![
        // A VM is no router, and no DHCP server, whatever port it speaks from.
        "icmpv6 type { nd-router-advert, nd-redirect } drop".to_owned(),
        "udp sport { 67, 547 } drop".to_owned(),
        "udp dport { 68, 546 } drop".to_owned(),
        // Nor does it ask for another's address, or give it back: chaddr is 28 bytes behind the head of UDP (RFC 2131).
        format!("udp dport 67 @th,288,48 != 0x{client} drop"),
    ];
    if port.network.ipv6.is_some() {
        let own = targets(port);
        rules.push(format!(
            "icmpv6 type nd-neighbor-advert @th,64,128 != {{ {own} }} drop"
        ));
    }
    rules
}

fn own(addresses: impl IntoIterator<Item = IpAddr>, ipv4: bool) -> Vec<String> {
    let own = addresses.into_iter().filter(|address| address.is_ipv4() == ipv4);
    own.map(|address| address.to_string()).collect()
}

/// The link-local address that follows from a MAC address: RFC 4291, appendix A.
fn link_local(mac: &str) -> Option<Ipv6Addr> {
    let octets: Vec<u8> = mac
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).ok())
        .collect::<Option<_>>()?;
    let &[a, b, c, d, e, f] = octets.as_slice() else {
        return None;
    };
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Some(Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        pair(a ^ 2, b),
        pair(c, 0xff),
        pair(0xfe, d),
        pair(e, f),
    ))
}
