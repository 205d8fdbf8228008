//! What is wanted of a host, from what it was told, is read as text; and no value that is allowed breaks it.

use dalgu_proto::{
    agent::v1 as wire,
    ids::VmId,
    v1,
    vm::{Nic, Plug},
};
use proptest::prelude::*;

use super::*;
use crate::network::{Document, server::document};

fn cidr(remote: &str) -> Option<v1::security_rule::Remote> {
    Some(v1::security_rule::Remote::Cidr(remote.to_owned()))
}

fn rule(direction: v1::Direction, protocol: v1::Protocol, ports: (u32, u32)) -> v1::SecurityRule {
    v1::SecurityRule {
        direction: direction.into(),
        protocol: protocol.into(),
        first_port: ports.0,
        last_port: ports.1,
        ..Default::default()
    }
}

fn group(name: &str, rules: Vec<v1::SecurityRule>) -> v1::SecurityGroup {
    v1::SecurityGroup {
        name: name.to_owned(),
        rules,
        ..Default::default()
    }
}

fn interface(vm: &str, last: u8, groups: &[&str]) -> v1::NetworkInterface {
    v1::NetworkInterface {
        vm: vm.to_owned(),
        nic: "eth0".to_owned(),
        mac: format!("52:54:00:00:00:{last:02x}"),
        ipv4_address: format!("10.20.0.{last}"),
        ipv6_address: format!("fd00:20::{last:x}"),
        security_groups: groups.iter().map(ToString::to_string).collect(),
        host: String::new(),
    }
}

fn overlay(name: &str, vni: u32) -> v1::Network {
    let subnet = |cidr: &str, gateway: &str| {
        Some(v1::Subnet {
            cidr: cidr.to_owned(),
            gateway: gateway.to_owned(),
            ..Default::default()
        })
    };
    v1::Network {
        name: name.to_owned(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork { vni })),
        ipv4: subnet("10.20.0.0/24", "10.20.0.1"),
        ipv6: subnet("fd00:20::/64", ""),
        dns_servers: vec!["192.0.2.53".to_owned()],
        ..Default::default()
    }
}

fn site(name: &str, vlan: u32) -> v1::Network {
    v1::Network {
        name: name.to_owned(),
        kind: Some(v1::network::Kind::Bridge(v1::BridgeNetwork {
            bridge: "br0".to_owned(),
            vlan,
        })),
        ..Default::default()
    }
}

/// Two networks: an overlay with web servers and an operator's machine, and the site's own.
pub(crate) fn told() -> Document {
    use v1::{Direction::*, Protocol::*};
    let ssh = v1::SecurityRule {
        remote: Some(v1::security_rule::Remote::Group("ops".to_owned())),
        ..rule(Ingress, Tcp, (22, 0))
    };
    let out = v1::SecurityRule {
        remote: cidr("192.0.2.0/24"),
        ..rule(Egress, Tcp, (443, 0))
    };
    let from = v1::SecurityRule {
        remote: cidr("2001:db8::/32"),
        description: "} ; drop \" ' \\".to_owned(),
        ..rule(Ingress, Udp, (5000, 5010))
    };
    let pinged = v1::SecurityRule {
        remote: Some(v1::security_rule::Remote::Group("ops".to_owned())),
        ..rule(Ingress, IcmpEchoRequest, (0, 0))
    };
    let timed = v1::SecurityRule {
        remote: cidr("192.0.2.0/24"),
        ..rule(Ingress, IcmpTimestampRequest, (0, 0))
    };
    let web = vec![
        rule(Ingress, Tcp, (80, 0)),
        ssh,
        rule(Ingress, Icmp, (0, 0)),
        rule(Ingress, IcmpEchoRequest, (0, 0)),
        pinged,
        timed,
        from,
    ];
    document(wire::HostNetworks {
        version: 3,
        networks: vec![
            wire::HostNetwork {
                network: Some(overlay("app", 42)),
                peers: vec!["10.0.0.2".into(), "10.0.0.3".into(), "2001:db8::7".into()],
                interfaces: vec![
                    interface("desk", 30, &["ops"]),
                    interface("web-1", 10, &["web"]),
                    interface("web-2", 11, &["web"]),
                ],
            },
            wire::HostNetwork {
                network: Some(site("site", 0)),
                peers: Vec::new(),
                interfaces: vec![v1::NetworkInterface {
                    ipv4_address: String::new(),
                    ipv6_address: String::new(),
                    ..interface("web-1", 110, &[])
                }],
            },
        ],
        security_groups: vec![group("ops", vec![out]), group("web", web)],
    })
    .unwrap()
}

/// The interfaces that a VM of that document has.
pub(crate) fn plugged(told: &Document, vm: &str) -> Vec<Plugged> {
    let id = VmId::from_uuid(uuid::Uuid::from_u128(vm.len() as u128));
    let networks = told.networks.iter();
    let ports = networks.flat_map(|network| {
        let own = network
            .interfaces
            .iter()
            .filter(|interface| interface.vm.as_str() == vm);
        own.map(|interface| Plugged {
            tap: names::tap(id, &format!("{}-{}", interface.nic, network.network.name)),
            mac: interface.mac.clone(),
            port: dalgu_proto::network::Port {
                network: network.network.name.clone(),
                ipv4: interface.ipv4,
                ipv6: interface.ipv6,
                groups: interface.groups.clone(),
                receive_limit_mbit: None,
                send_limit_mbit: Some(100),
            },
        })
    });
    ports.collect()
}

fn wanted(told: Document, vms: &[&str]) -> Wanted {
    let here: Vec<_> = vms.iter().flat_map(|vm| plugged(&told, vm)).collect();
    let kept = Kept::default().told(told, &here);
    let ports = number(&BTreeMap::new(), here);
    let arrived = BTreeSet::from([ports[0].0.tap.clone()]);
    compile(&kept, &ports, &arrived, Some([10, 0, 0, 1].into()))
}

#[test]
fn the_filters_are_these() {
    insta::assert_snapshot!(wanted(told(), &["web-1", "desk"]).rules);
}

#[test]
fn the_networks_are_these() {
    let segments = wanted(told(), &["web-1", "desk"]).segments;
    let text: Vec<_> = segments
        .iter()
        .map(|segment| {
            let service = segment.service.as_ref();
            let service = service.map(|service| {
                format!(
                    "{} {:?}\n--- configuration\n{}--- hosts\n{}--- leases\n{}",
                    service.mac, service.addresses, service.config, service.hosts, service.leases
                )
            });
            format!(
                "=== {} {} {} {:?}\n{}",
                segment.network,
                segment.bridge,
                segment.mtu,
                segment.uplink,
                service.unwrap_or_default()
            )
        })
        .collect();
    insta::assert_snapshot!(text.join("\n"));
}

#[test]
fn nothing_that_people_write_reaches_the_filters() {
    let rules = wanted(told(), &["web-1", "desk"]).rules;
    assert!(
        !rules.contains('\\') && !rules.contains('\''),
        "a description is in the rules"
    );
}

#[test]
fn names_and_addresses_that_could_mean_something_to_nft_are_refused_before_they_come_here() {
    let hostile = [
        "a;drop",
        "a\nflush ruleset",
        "a{",
        "a}",
        "a\"b",
        "$x",
        "@set",
        "a b",
        "../a",
        "-a",
        "a/b",
        "A",
        "",
        "ü",
        "a\0",
    ];
    for bad in hostile {
        let mut network = overlay("app", 42);
        network.name = bad.to_owned();
        let named = |network: v1::Network, interface: v1::NetworkInterface, group: v1::SecurityGroup| {
            wire::HostNetworks {
                version: 1,
                networks: vec![wire::HostNetwork {
                    network: Some(network),
                    peers: Vec::new(),
                    interfaces: vec![interface],
                }],
                security_groups: vec![group],
            }
        };
        let good = || {
            (
                overlay("app", 42),
                interface("web", 10, &["web"]),
                group("web", Vec::new()),
            )
        };
        let (_, i, g) = good();
        assert!(document(named(network, i, g)).is_err(), "network {bad:?}");
        for change in [
            (|i: &mut v1::NetworkInterface, bad| i.vm = bad) as fn(&mut v1::NetworkInterface, String),
            |i, bad| i.nic = bad,
            |i, bad| i.mac = bad,
            |i, bad| i.security_groups = vec![bad],
            |i, bad| i.ipv4_address = format!("10.20.0.1{bad}x"),
            |i, bad| i.ipv6_address = format!("fd00::1{bad}x"),
        ] {
            let (n, mut i, g) = good();
            change(&mut i, bad.to_owned());
            assert!(document(named(n, i.clone(), g)).is_err(), "{i:?}");
        }
        let (n, i, mut g) = good();
        g.name = bad.to_owned();
        assert!(document(named(n, i, g)).is_err(), "group {bad:?}");
        if !bad.is_empty() {
            let (mut n, i, g) = good();
            n.domain = bad.to_owned();
            // A single letter is a domain.
            assert!(document(named(n, i, g)).is_err(), "domain {bad:?}");
            let (mut n, i, g) = good();
            n.kind = Some(v1::network::Kind::Bridge(v1::BridgeNetwork {
                bridge: format!("{bad} "),
                vlan: 0,
            }));
            assert!(document(named(n, i, g)).is_err(), "bridge {bad:?}");
        }
    }
}

#[test]
fn an_overlay_on_a_host_without_an_address_is_not_made_and_its_filters_are() {
    let told = told();
    let here = plugged(&told, "web-1");
    let kept = Kept::default().told(told, &here);
    let ports = number(&BTreeMap::new(), here);
    let wanted = compile(&kept, &ports, &BTreeSet::new(), None);
    assert_eq!(wanted.segments.len(), 1);
    assert!(
        wanted
            .impossible
            .values()
            .next()
            .unwrap()
            .contains("overlay_address")
    );
    assert!(wanted.rules.contains(&format!("from-{}", ports[0].0.tap)));
}

fn nic(index: usize) -> Plugged {
    let id = VmId::from_uuid(uuid::Uuid::from_u128(9));
    let nic = Nic {
        name: format!("n{index}"),
        plug: Plug::Bridge { bridge: "br0".into() },
        mac: "52:54:00:00:00:01".into(),
        reserved_mbit: None,
    };
    Plugged {
        tap: names::tap(id, &nic.name),
        mac: nic.mac,
        port: dalgu_proto::network::Port {
            network: "app".parse().unwrap(),
            ipv4: None,
            ipv6: None,
            groups: BTreeSet::new(),
            receive_limit_mbit: None,
            send_limit_mbit: None,
        },
    }
}

proptest! {
    /// Comings and goings of interfaces.
    #[test]
    fn an_interface_keeps_its_number_and_no_two_have_the_same(rounds in prop::collection::vec(prop::collection::btree_set(0..20_usize, 0..8), 1..8)) {
        let mut before: BTreeMap<String, u16> = BTreeMap::new();
        for here in rounds {
            let numbered = number(&before, here.iter().map(|index| nic(*index)));
            prop_assert_eq!(numbered.len(), here.len());
            let after: BTreeMap<String, u16> = numbered.iter().map(|(plugged, number)| (plugged.tap.clone(), *number)).collect();
            let distinct: BTreeSet<u16> = after.values().copied().collect();
            prop_assert_eq!(distinct.len(), after.len());
            for (tap, number) in &after {
                prop_assert!(*number > 0 && *number < u16::MAX);
                if let Some(known) = before.get(tap) {
                    prop_assert_eq!(known, number);
                }
            }
            before = after;
        }
    }
}
