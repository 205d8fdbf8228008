//! What is taken of networks and rules, and what is refused, field by field.

use super::*;

fn subnet(cidr: &str) -> v1::Subnet {
    v1::Subnet {
        cidr: cidr.into(),
        ..v1::Subnet::default()
    }
}

fn network() -> v1::Network {
    v1::Network {
        name: "field".into(),
        kind: Some(network::Kind::Overlay(v1::OverlayNetwork { vni: 7 })),
        ipv4: Some(subnet("10.20.0.0/24")),
        ipv6: Some(subnet("fd00:20::/64")),
        ..v1::Network::default()
    }
}

fn rule() -> v1::SecurityRule {
    v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::Tcp.into(),
        first_port: 22,
        ..v1::SecurityRule::default()
    }
}

fn group(rule: v1::SecurityRule) -> v1::SecurityGroup {
    v1::SecurityGroup {
        name: "ssh".into(),
        rules: vec![rule],
        ..v1::SecurityGroup::default()
    }
}

#[test]
fn a_minimal_network_gets_the_documented_defaults() {
    let network = Network::try_from(network()).unwrap();
    assert_eq!((network.mtu, network.domain.as_str()), (1450, "field.internal"));
    let [ipv4, ipv6] = [network.ipv4.unwrap(), network.ipv6.unwrap()];
    let shown =
        |subnet: &Subnet| [subnet.first, subnet.last, subnet.service].map(|address| address.to_string());
    assert_eq!(shown(&ipv4), ["10.20.0.1", "10.20.0.254", "10.20.0.254"]);
    assert_eq!(
        shown(&ipv6),
        [
            "fd00:20::1",
            "fd00:20::ffff:ffff:ffff:ffff",
            "fd00:20::ffff:ffff:ffff:ffff"
        ]
    );
    assert!(ipv4.dhcp && ipv4.offers("10.20.0.1".parse().unwrap()));
    for taken in [
        "10.20.0.0",
        "10.20.0.254",
        "10.20.0.255",
        "10.20.1.1",
        "fd00:20::1",
    ] {
        assert!(!ipv4.offers(taken.parse().unwrap()), "{taken}");
    }
}

#[test]
fn networks_and_groups_survive_the_wire_and_the_store_unchanged() {
    let mut bridge = network();
    bridge.kind = Some(network::Kind::Bridge(v1::BridgeNetwork {
        bridge: "br0".into(),
        vlan: 42,
    }));
    bridge.dns_servers = vec!["192.0.2.53".into(), "2001:db8::53".into()];
    bridge.ipv4.as_mut().unwrap().gateway = "10.20.0.1".into();
    bridge.ipv6.as_mut().unwrap().no_dhcp = true;
    for wire in [network(), bridge] {
        let network = Network::try_from(wire).unwrap();
        assert_eq!(
            Network::try_from(v1::Network::from(network.clone())).unwrap(),
            network
        );
        let stored = serde_json::to_string(&network).unwrap();
        assert_eq!(serde_json::from_str::<Network>(&stored).unwrap(), network);
    }
    let remotes = [
        None,
        Some(security_rule::Remote::Cidr("192.0.2.7".into())),
        Some(security_rule::Remote::Group("web".into())),
    ];
    for remote in remotes {
        let own = Group::try_from(group(v1::SecurityRule { remote, ..rule() })).unwrap();
        assert_eq!(
            Group::try_from(v1::SecurityGroup::from(own.clone())).unwrap(),
            own
        );
        let stored = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<Group>(&stored).unwrap(), own);
    }
}

#[test]
fn each_bad_field_of_a_network_is_refused_by_its_name() {
    type Change = fn(&mut v1::Network);
    fn ipv4(network: &mut v1::Network) -> &mut v1::Subnet {
        network.ipv4.as_mut().unwrap()
    }
    let cases: &[(&str, Change)] = &[
        ("name", |n| n.name = "../x".into()),
        ("name", |n| n.name = String::new()),
        ("kind", |n| n.kind = None),
        ("overlay.vni", |n| {
            n.kind = Some(network::Kind::Overlay(v1::OverlayNetwork { vni: 1 << 24 }));
        }),
        ("bridge.bridge", |n| {
            n.kind = Some(network::Kind::Bridge(v1::BridgeNetwork {
                bridge: "br0;reboot".into(),
                vlan: 0,
            }));
        }),
        ("bridge.bridge", |n| {
            n.kind = Some(network::Kind::Bridge(v1::BridgeNetwork::default()))
        }),
        ("bridge.vlan", |n| {
            n.kind = Some(network::Kind::Bridge(v1::BridgeNetwork {
                bridge: "br0".into(),
                vlan: 4095,
            }));
        }),
        ("mtu", |n| n.mtu = 1279),
        ("mtu", |n| n.mtu = 9001),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("10.0.0.0")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("10.0.0.1/24")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("10.0.0.0/31")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("0.0.0.0/8")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("224.0.0.0/8")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("127.0.0.0/8")),
        ("ipv4.cidr", |n| *ipv4(n) = subnet("169.254.0.0/16")),
        ("ipv4.cidr", |n| {
            *ipv4(n) = subnet("10.0.0.0/24\n dhcp-script=/bin/sh")
        }),
        ("ipv6.cidr", |n| n.ipv6 = Some(subnet("fe80::/64"))),
        ("ipv6.cidr", |n| n.ipv6 = Some(subnet("fd00::/47"))),
        ("ipv6.cidr", |n| n.ipv6 = Some(subnet("10.0.0.0/48"))),
        ("ipv4.cidr", |n| n.ipv4 = Some(subnet("fd00::/24"))),
        ("ipv4.gateway", |n| ipv4(n).gateway = "10.20.1.1".into()),
        ("ipv4.gateway", |n| ipv4(n).gateway = "10.20.0.0".into()),
        ("ipv4.gateway", |n| ipv4(n).gateway = "10.20.0.255".into()),
        ("ipv4.gateway", |n| ipv4(n).gateway = "router".into()),
        ("ipv4.service_address", |n| ipv4(n).gateway = "10.20.0.254".into()),
        ("ipv4.first", |n| ipv4(n).first = "10.21.0.1".into()),
        ("ipv4.last", |n| {
            ipv4(n).first = "10.20.0.9".into();
            ipv4(n).last = "10.20.0.8".into();
        }),
        ("domain", |n| n.domain = "a..b".into()),
        ("domain", |n| n.domain = "a/b\naddress=/#/1.2.3.4".into()),
        ("domain", |n| n.domain = "-a.b".into()),
        ("domain", |n| n.domain = format!("{}.b", "a".repeat(64))),
        ("dns_servers", |n| n.dns_servers = vec!["192.0.2.1".into(); 5]),
        ("dns_servers[0]", |n| n.dns_servers = vec![String::new()]),
        ("dns_servers[0]", |n| n.dns_servers = vec!["0.0.0.0".into()]),
        ("dns_servers[0]", |n| n.dns_servers = vec!["/etc/passwd".into()]),
    ];
    for (field, change) in cases {
        let mut wire = network();
        change(&mut wire);
        let error = Network::try_from(wire).expect_err(field);
        assert_eq!(&error.field, field, "{error}");
    }
}

#[test]
fn each_bad_field_of_a_rule_is_refused_by_its_name() {
    type Change = fn(&mut v1::SecurityRule);
    fn cidr(rule: &mut v1::SecurityRule, cidr: &str) {
        rule.remote = Some(security_rule::Remote::Cidr(cidr.into()));
    }
    let cases: &[(&str, Change)] = &[
        ("direction", |r| r.direction = 0),
        ("direction", |r| r.direction = 9),
        ("protocol", |r| (r.protocol, r.first_port) = (9, 0)),
        ("first_port", |r| r.protocol = v1::Protocol::Icmp.into()),
        ("first_port", |r| {
            r.protocol = v1::Protocol::IcmpEchoRequest.into()
        }),
        ("first_port", |r| r.protocol = 0),
        ("first_port", |r| r.first_port = 65_536),
        ("first_port", |r| r.last_port = 21),
        ("first_port", |r| (r.first_port, r.last_port) = (0, 22)),
        ("cidr", |r| cidr(r, "")),
        ("cidr", |r| cidr(r, "10.0.0.1/8")),
        ("cidr", |r| cidr(r, "10.0.0.0/33")),
        ("cidr", |r| cidr(r, "10.0.0.0/8 accept; }")),
        ("cidr", |r| {
            (r.protocol, r.first_port) = (v1::Protocol::IcmpTimestampRequest.into(), 0);
            cidr(r, "2001:db8::/32");
        }),
        ("cidr", |r| {
            (r.protocol, r.first_port) = (v1::Protocol::IcmpNodeInformationQuery.into(), 0);
            cidr(r, "10.0.0.0/8");
        }),
        ("group", |r| {
            r.remote = Some(security_rule::Remote::Group("@all".into()))
        }),
        ("description", |r| r.description = "a\nb".into()),
        ("description", |r| r.description = "a".repeat(256)),
    ];
    for (field, change) in cases {
        let mut wire = rule();
        change(&mut wire);
        let error = Group::try_from(group(wire)).expect_err(field);
        assert_eq!(error.field, format!("rules[0].{field}"), "{error}");
    }
    let mut many = group(rule());
    many.rules = vec![rule(); 257];
    assert_eq!(Group::try_from(many).unwrap_err().field, "rules");
}

#[test]
fn types_of_icmp_survive_the_wire_and_the_store_and_older_records_mean_all_of_it() {
    for kind in IcmpType::ALL {
        let wire = v1::SecurityRule {
            protocol: v1::Protocol::from(kind).into(),
            first_port: 0,
            ..rule()
        };
        let own = Group::try_from(group(wire)).unwrap();
        assert_eq!(own.rules[0].protocol, Protocol::IcmpType(kind));
        assert!(own.has_icmp_types());
        assert_eq!(
            Group::try_from(v1::SecurityGroup::from(own.clone())).unwrap(),
            own
        );
        let stored = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<Group>(&stored).unwrap(), own);
    }
    let before = r#"{"direction":"ingress","protocol":"icmp","remote":"any"}"#;
    assert_eq!(
        serde_json::from_str::<Rule>(before).unwrap().protocol,
        Protocol::Icmp
    );
}
