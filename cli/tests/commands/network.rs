//! `dalgu network` and `dalgu security-group`: what they ask, what they say, and what they say no to.

use dalgu_proto::{reason, v1};
use tonic::Code;

use super::common::{Controller, ago};

fn network(etag: &str) -> v1::Network {
    v1::Network {
        name: "field".into(),
        etag: etag.into(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork { vni: 7 })),
        create_time: ago(10),
        ..Default::default()
    }
}

fn group(etag: &str, rules: &[&str]) -> v1::SecurityGroup {
    let read = dalgu::args::values::network::rule;
    v1::SecurityGroup {
        name: "ssh".into(),
        etag: etag.into(),
        rules: rules.iter().map(|rule| read(rule).unwrap()).collect(),
        create_time: ago(10),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_network_is_made_as_the_flags_say() {
    let controller = Controller::start();
    controller.fake.script().networks = [Ok(network("r1")), Ok(network("r1"))].into();
    let outcome = controller
        .run(&[
            "network",
            "create",
            "field",
            "--overlay",
            "--ipv4",
            "10.20.0.0/16",
            "--dns",
            "192.0.2.53",
        ])
        .await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "created field\n"));
    let args = [
        "network", "create", "field", "--bridge", "br0", "--vlan", "12", "--mtu", "9000", "-o", "name",
    ];
    let outcome = controller.run(&args).await;
    assert_eq!(
        (outcome.code, outcome.out.as_str()),
        (0, "field\n"),
        "{}",
        outcome.err
    );
    let seen = controller.fake.script().seen.clone();
    for (seen, wanted) in [
        (&seen[0], "Overlay(OverlayNetwork { vni: 0 })"),
        (&seen[0], "cidr: \"10.20.0.0/16\""),
        (&seen[0], "dns_servers: [\"192.0.2.53\"]"),
        (&seen[1], "Bridge(BridgeNetwork { bridge: \"br0\", vlan: 12 })"),
        (&seen[1], "mtu: 9000"),
    ] {
        assert!(seen.contains(wanted), "{seen}");
    }
}

#[tokio::test]
async fn a_network_must_be_of_one_kind_and_a_rule_must_be_one() {
    let controller = Controller::start();
    for bad in [
        &["network", "create", "field"][..],
        &["network", "create", "field", "--overlay", "--bridge", "br0"],
        &["network", "create", "field", "--bridge", "br0", "--vni", "7"],
        &["network", "create", "field", "--overlay", "--vlan", "7"],
        &["network", "create", "field", "--overlay", "--ipv4", "10.0.0.0"],
        &["network", "create", "field", "--overlay", "--dns", "dns.example"],
        &["network", "update", "field"],
        &["network", "update", "field", "--dns", "192.0.2.1", "--no-dns"],
        &["security-group", "create", "ssh", "--rule", "ingress,22"],
        &["security-group", "update", "ssh"],
        &[
            "security-group",
            "update",
            "ssh",
            "--rule",
            "ingress,any",
            "--add-rule",
            "egress,any",
        ],
    ] {
        let outcome = controller.run(bad).await;
        assert_eq!(outcome.code, 2, "{bad:?}: {}", outcome.err);
    }
    assert!(controller.fake.script().seen.is_empty());
}

#[tokio::test]
async fn a_change_is_tried_again_when_somebody_elses_came_before() {
    let controller = Controller::start();
    let overtaken = || reason::status(Code::Aborted, "ETAG_MISMATCH", "changed meanwhile");
    {
        let mut script = controller.fake.script();
        script.networks = [
            Ok(network("r1")),
            Err(overtaken()),
            Ok(network("r2")),
            Ok(network("r3")),
        ]
        .into();
        script.groups = [
            Ok(group(
                "r1",
                &[
                    "ingress,tcp,22,description=SSH",
                    "ingress,tcp,80,description=web",
                    "ingress,tcp,81,description=old",
                ],
            )),
            Ok(group("r2", &[])),
        ]
        .into();
    }
    let outcome = controller
        .run(&["network", "update", "field", "--no-dns", "--label", "a=b"])
        .await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "changed field\n"));
    let args = [
        "security-group",
        "update",
        "ssh",
        "--remove-rule",
        "ingress,tcp,22",
        "--add-rule",
        "ingress,tcp,443,description=TLS, to all",
        "--add-rule",
        "ingress,tcp,80",
        "--add-rule",
        "ingress,tcp,81,description=new",
    ];
    let outcome = controller.run(&args).await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "changed ssh\n"));
    let seen = controller.fake.script().seen.clone();
    let wanted = [
        "get_network field",
        "update_network r1 [\"labels\", \"dns_servers\"] []",
        "get_network field",
        "update_network r2 [\"labels\", \"dns_servers\"] []",
        "get_security_group ssh",
        "update_security_group r1 [\"rules\"] [80 web, 81 new, 443 TLS, to all]",
    ];
    assert_eq!(seen, wanted);
}

#[tokio::test]
async fn a_rule_is_known_however_its_addresses_are_spelled() {
    let controller = Controller::start();
    // As the controller keeps them.
    let kept = group(
        "r1",
        &[
            "ingress,tcp,22,from=10.0.0.7/32",
            "ingress,tcp,23,from=2001:db8::7/128",
            "ingress,tcp,24,from=10.0.0.8/32",
        ],
    );
    controller.fake.script().groups = [Ok(kept.clone()), Ok(group("r2", &[])), Ok(kept)].into();
    let args = [
        "security-group",
        "update",
        "ssh",
        "--remove-rule",
        "ingress,tcp,22,from=10.0.0.7",
        "--remove-rule",
        "ingress,tcp,23-23,from=2001:DB8:0:0::0:7",
        "--add-rule",
        "ingress,tcp,24,from=10.0.0.8",
        "--add-rule",
        "ingress,tcp,25,from=2001:db8:0::/48",
    ];
    let outcome = controller.run(&args).await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "changed ssh\n"));
    let seen = controller.fake.script().seen.clone();
    assert_eq!(
        seen[1],
        "update_security_group r1 [\"rules\"] [24 10.0.0.8/32, 25 2001:db8::/48]"
    );
    let outcome = controller
        .run(&[
            "security-group",
            "update",
            "ssh",
            "--remove-rule",
            "ingress,tcp,22,from=10.0.0.9",
        ])
        .await;
    assert_eq!(outcome.code, 2, "{}", outcome.err);
    assert!(
        outcome.err.contains("ingress tcp 22 10.0.0.9/32"),
        "{}",
        outcome.err
    );
    assert_eq!(controller.fake.script().seen.len(), 3, "nothing was changed");
}

#[tokio::test]
async fn what_is_in_use_is_said_with_the_next_step() {
    let controller = Controller::start();
    let refused = |why, message: &str| Err(reason::status(Code::FailedPrecondition, why, message));
    controller.fake.script().network_deletions = [
        refused(
            "NETWORK_IN_USE",
            "network field has 2 interfaces, web/eth0 among them",
        ),
        refused("SECURITY_GROUP_IN_USE", "rules of 1 groups name it"),
        Ok(()),
    ]
    .into();
    let outcome = controller.run(&["network", "delete", "field"]).await;
    assert_eq!(outcome.code, 5);
    assert!(outcome.err.contains("web/eth0") && outcome.err.contains("dalgu network interfaces"));
    let outcome = controller
        .run(&["security-group", "rm", "ssh", "--etag", "r1"])
        .await;
    assert_eq!(outcome.code, 5, "{}", outcome.err);
    let outcome = controller.run(&["network", "rm", "field"]).await;
    assert_eq!((outcome.code, outcome.err.as_str()), (0, "field is deleted\n"));
}

#[tokio::test]
async fn lists_are_read_to_their_ends() {
    let controller = Controller::start();
    let page = |name: &str, next: &str| {
        Ok(v1::ListNetworksResponse {
            networks: vec![v1::Network {
                name: name.into(),
                ..network("r1")
            }],
            next_page_token: next.into(),
            resource_version: 1,
        })
    };
    let interfaces = |vm: &str, next: &str| {
        Ok(v1::ListNetworkInterfacesResponse {
            interfaces: vec![v1::NetworkInterface {
                vm: vm.into(),
                nic: "eth0".into(),
                ..Default::default()
            }],
            next_page_token: next.into(),
        })
    };
    {
        let mut script = controller.fake.script();
        script.network_lists = [page("a", "x"), page("b", "")].into();
        script.interfaces = [interfaces("web", "y"), interfaces("worker", "")].into();
        script.group_lists = [Ok(v1::ListSecurityGroupsResponse {
            security_groups: vec![group("r1", &["ingress,any"])],
            ..Default::default()
        })]
        .into();
    }
    let outcome = controller.run(&["network", "ls", "-o", "name"]).await;
    assert_eq!(outcome.out, "a\nb\n", "{}", outcome.err);
    let outcome = controller
        .run(&["network", "interfaces", "field", "-o", "name"])
        .await;
    assert_eq!(outcome.out, "web/eth0\nworker/eth0\n", "{}", outcome.err);
    let outcome = controller.run(&["security-group", "list", "-o", "json"]).await;
    assert!(outcome.out.contains("\"DIRECTION_INGRESS\""), "{}", outcome.out);
    let seen = controller.fake.script().seen.clone();
    let wanted = [
        "list_networks",
        "list_networks x",
        "list_network_interfaces field",
        "list_network_interfaces field y",
        "list_security_groups",
    ];
    assert_eq!(seen, wanted);
}
