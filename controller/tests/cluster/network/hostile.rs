//! What nobody should be able to enter: each input is refused by the name of its field, and no host hears of it.

use tonic::Code;

use super::*;

/// What is at fault, and what makes it so.
type Fault<T> = (&'static str, fn(&mut T));

/// Inputs to CreateNetwork, with the field that is at fault.
const NETWORKS: &[Fault<Network>] = &[
    ("network.name", |network| network.name = String::new()),
    ("network.name", |network| network.name = "../../etc".into()),
    ("network.name", |network| network.name = "-j DROP".into()),
    ("network.name", |network| {
        network.name = "field; flush ruleset".into()
    }),
    ("network.name", |network| network.name = "field\n".into()),
    ("network.name", |network| network.name = "f\0".into()),
    ("network.name", |network| network.name = "fïeld".into()),
    ("network.name", |network| network.name = "a".repeat(1 << 16)),
    ("network.kind", |network| network.kind = None),
    ("network.bridge.bridge", |network| network.kind = bridge("", 0)),
    ("network.bridge.bridge", |network| {
        network.kind = bridge("br0 type vxlan", 0)
    }),
    ("network.bridge.bridge", |network| {
        network.kind = bridge("../br0", 0)
    }),
    ("network.bridge.bridge", |network| {
        network.kind = bridge("a-name-of-16-byt", 0)
    }),
    ("network.bridge.vlan", |network| {
        network.kind = bridge("br0", 4095)
    }),
    ("network.bridge.vlan", |network| {
        network.kind = bridge("br0", u32::MAX)
    }),
    ("network.overlay.vni", |network| network.kind = vni(1 << 24)),
    ("network.mtu", |network| network.mtu = 68),
    ("network.mtu", |network| network.mtu = u32::MAX),
    ("network.ipv4.cidr", |network| network.ipv4 = subnet("", "")),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("0.0.0.0/0", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("10.20.0.0/31", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("10.20.0.1/24", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("127.0.0.0/8", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("224.0.0.0/8", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("169.254.0.0/16", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("10.20.0.0/24; drop", "")
    }),
    ("network.ipv4.cidr", |network| {
        network.ipv4 = subnet("fd00::/64", "")
    }),
    ("network.ipv4.gateway", |network| {
        network.ipv4 = subnet("10.20.0.0/24", "10.21.0.1")
    }),
    ("network.ipv4.gateway", |network| {
        network.ipv4 = subnet("10.20.0.0/24", "10.20.0.255")
    }),
    ("network.ipv4.gateway", |network| {
        network.ipv4 = subnet("10.20.0.0/24", "example")
    }),
    ("network.ipv6.cidr", |network| {
        network.ipv6 = subnet("fe80::/64", "")
    }),
    ("network.ipv6.cidr", |network| {
        network.ipv6 = subnet("fd00::/32", "")
    }),
    ("network.domain", |network| network.domain = "Example".into()),
    ("network.domain", |network| network.domain = "a..b".into()),
    ("network.domain", |network| {
        network.domain = "x\nserver=/#/192.0.2.9".into()
    }),
    ("network.domain", |network| network.domain = "a.".repeat(200)),
    ("network.dns_servers[0]", |network| {
        network.dns_servers = vec!["dns.example".into()]
    }),
    ("network.dns_servers[0]", |network| {
        network.dns_servers = vec!["0.0.0.0".into()]
    }),
    ("network.dns_servers", |network| {
        network.dns_servers = vec!["192.0.2.1".into(); 5]
    }),
    ("network.labels", |network| {
        drop(network.labels.insert(String::new(), "x".into()))
    }),
    ("network.description", |network| {
        network.description = "x".repeat(1025)
    }),
    ("network.uid", |network| network.uid = "x".into()),
    ("network.interfaces", |network| network.interfaces = 1),
    ("network.etag", |network| network.etag = "r1".into()),
];

/// Inputs to CreateSecurityGroup.
const GROUPS: &[Fault<SecurityGroup>] = &[
    ("security_group.name", |group| group.name = String::new()),
    ("security_group.name", |group| group.name = "@ssh".into()),
    ("security_group.name", |group| {
        group.name = "ssh } ; flush ruleset".into()
    }),
    ("security_group.name", |group| group.name = "a".repeat(64)),
    ("security_group.rules", |group| group.rules = vec![ssh(); 257]),
    ("security_group.rules[0].direction", |group| {
        group.rules[0].direction = 0
    }),
    ("security_group.rules[0].direction", |group| {
        group.rules[0].direction = 9
    }),
    ("security_group.rules[0].protocol", |group| {
        group.rules[0].protocol = 132
    }),
    ("security_group.rules[0].first_port", |group| {
        group.rules[0].first_port = 65_536
    }),
    ("security_group.rules[0].first_port", |group| {
        group.rules[0].last_port = 21
    }),
    ("security_group.rules[0].first_port", |group| {
        group.rules[0].protocol = 3
    }),
    ("security_group.rules[0].cidr", |group| {
        group.rules[0].remote = cidr("")
    }),
    ("security_group.rules[0].cidr", |group| {
        group.rules[0].remote = cidr("10.0.0.0/33")
    }),
    ("security_group.rules[0].cidr", |group| {
        group.rules[0].remote = cidr("10.0.0.1/8")
    }),
    ("security_group.rules[0].cidr", |group| {
        group.rules[0].remote = cidr("10.0.0.0/8 accept")
    }),
    ("security_group.rules[0].group", |group| {
        group.rules[0].remote = Some(v1::security_rule::Remote::Group("../x".into()));
    }),
    ("security_group.rules[0].description", |group| {
        group.rules[0].description = "x".repeat(256)
    }),
    ("security_group.rules[0].description", |group| {
        group.rules[0].description = "a\"\n}".into()
    }),
    ("security_group.labels", |group| {
        drop(group.labels.insert(" ".into(), "x".into()))
    }),
    ("security_group.description", |group| {
        group.description = "x".repeat(1025)
    }),
    ("security_group.uid", |group| group.uid = "x".into()),
    ("security_group.etag", |group| group.etag = "r1".into()),
];

/// Interfaces of a VM, with the field that is at fault.
const NICS: &[Fault<v1::Nic>] = &[
    ("network", |nic| nic.network = "../field".into()),
    ("network", |nic| nic.network = "Field".into()),
    ("bridge", |nic| nic.bridge = "br0".into()),
    ("ipv4_address", |nic| nic.ipv4_address = "10.20.0".into()),
    ("ipv4_address", |nic| nic.ipv4_address = "fd00:20::7".into()),
    ("ipv4_address", |nic| nic.ipv4_address = "10.20.0.0".into()),
    ("ipv4_address", |nic| nic.ipv4_address = "10.20.0.255".into()),
    ("ipv4_address", |nic| nic.ipv4_address = "10.20.0.254".into()),
    ("ipv4_address", |nic| nic.ipv4_address = "192.0.2.7".into()),
    ("ipv6_address", |nic| nic.ipv6_address = "10.20.0.7".into()),
    ("ipv6_address", |nic| nic.ipv6_address = "fd00:21::7".into()),
    ("ipv6_address", |nic| nic.ipv6_address = "fd00:20::".into()),
    ("ipv6_address", |nic| nic.ipv6_address = "fe80::1%eth0".into()),
    ("security_groups", |nic| nic.security_groups = vec!["a b".into()]),
    ("security_groups", |nic| {
        nic.security_groups = vec!["ssh".into(); 17]
    }),
    ("receive_limit_mbit_per_second", |nic| {
        nic.receive_limit_mbit_per_second = 1_000_001
    }),
    ("send_limit_mbit_per_second", |nic| {
        nic.send_limit_mbit_per_second = u32::MAX
    }),
    ("mac", |nic| nic.mac = "01:00:5e:00:00:01".into()),
    ("ipv4_address", |nic| {
        (nic.network, nic.bridge, nic.ipv4_address) = (String::new(), "br0".into(), "10.20.0.7".into());
    }),
    ("security_groups", |nic| {
        (nic.network, nic.bridge, nic.security_groups) = (String::new(), "br0".into(), vec!["ssh".into()]);
    }),
];

fn bridge(bridge: &str, vlan: u32) -> Option<v1::network::Kind> {
    let bridge = bridge.into();
    Some(v1::network::Kind::Bridge(v1::BridgeNetwork { bridge, vlan }))
}

fn vni(vni: u32) -> Option<v1::network::Kind> {
    Some(v1::network::Kind::Overlay(v1::OverlayNetwork { vni }))
}

fn subnet(cidr: &str, gateway: &str) -> Option<v1::Subnet> {
    Some(v1::Subnet {
        cidr: cidr.into(),
        gateway: gateway.into(),
        ..Default::default()
    })
}

fn cidr(cidr: &str) -> Option<v1::security_rule::Remote> {
    Some(v1::security_rule::Remote::Cidr(cidr.into()))
}

fn is_refused<T: std::fmt::Debug>(outcome: Result<T, tonic::Status>, field: &str) {
    let status = outcome.expect_err(field);
    assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
    assert!(status.message().starts_with(field), "{field}: {status}");
    assert!(
        status.message().len() < 400,
        "{field}: it repeats what it was given"
    );
}

#[tokio::test]
async fn what_is_not_allowed_is_refused_by_its_field_and_reaches_no_host() {
    let inputs = NETWORKS.len() + GROUPS.len() + NICS.len();
    assert!(inputs >= 40, "{inputs} inputs");
    let (site, mut clients) = site(1).await;
    for (field, change) in NETWORKS {
        let mut network = Network {
            name: "other".into(),
            ..super::field()
        };
        change(&mut network);
        is_refused(clients.networks.create_network(new(network)).await, field);
    }
    for (field, change) in GROUPS {
        let mut group = group("other");
        change(&mut group);
        is_refused(
            clients.networks.create_security_group(new_group(group)).await,
            field,
        );
    }
    for (field, change) in NICS {
        let mut nic = plug("field", &["ssh"]);
        change(&mut nic);
        let outcome = clients.vms.create_vm(with("web", "", nic)).await;
        is_refused(outcome, &format!("vm.spec.nics[0].{field}"));
    }
    for (name, change) in [
        ("network.domain", mask(&["domain"])),
        ("network.dns_servers[0]", mask(&["dns_servers"])),
        ("network.description", mask(&["description"])),
        ("network.labels", mask(&["labels"])),
    ] {
        let network = Network {
            name: "field".into(),
            domain: "A B".into(),
            dns_servers: vec!["x".into()],
            description: "x".repeat(1025),
            labels: [(String::new(), String::new())].into(),
            ..Default::default()
        };
        let request = v1::UpdateNetworkRequest {
            network: Some(network),
            update_mask: change,
            ..Default::default()
        };
        is_refused(clients.networks.update_network(request).await, name);
    }
    let listed = clients
        .networks
        .list_networks(v1::ListNetworksRequest::default())
        .await;
    assert_eq!(listed.unwrap().into_inner().networks.len(), 1);
    let world = site.fabric.lock();
    let told = world.hosts["h1"].networks.told.clone().unwrap_or_default();
    assert!(told.networks.is_empty() && world.hosts["h1"].vms.is_empty());
}
