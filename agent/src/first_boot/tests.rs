//! The volume as others read it: byte by byte as cloud-init's finder does, and with mtools.

use std::{collections::BTreeMap, process::Command};

use dalgu_proto::{
    ids::{ClusterId, Epoch, Generation, VmId},
    v1,
    vm::{
        Plug, Spec,
        first_boot::{MAX_DOCUMENT_BYTES, MAX_KEY_BYTES, MAX_KEYS},
    },
};
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::hypervisor::Mark;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ2FmRUUD/Zl3Xv5ASCkMSMZDpKpUVyNYmHnHcmyMJmM";

fn definition(first_boot: v1::FirstBoot, nics: &[&str]) -> Definition {
    let id = VmId::from_uuid(Uuid::from_u128(0x0123_4567_89ab_4cde_8f01_2345_6789_abcd));
    let documents = Documents::from(&first_boot);
    let nic = |name: &&str| v1::Nic {
        name: (*name).into(),
        bridge: "br0".into(),
        ..Default::default()
    };
    let wire = v1::VmSpec {
        vcpus: 1,
        memory_mib: 64,
        kernel_boot: Some(v1::KernelBoot {
            kernel: "k".into(),
            ..Default::default()
        }),
        nics: nics.iter().map(nic).collect(),
        first_boot: Some(first_boot),
        ..Default::default()
    };
    let mut spec = Spec::try_from(wire).unwrap();
    spec.fill_in(id);
    Definition {
        id,
        name: "web".parse().unwrap(),
        mark: Mark {
            cluster: ClusterId::from_uuid(Uuid::nil()),
            epoch: Epoch(1),
            generation: Generation(1),
        },
        spec,
        documents,
        networks: Vec::new(),
        layers: Default::default(),
        places: Vec::new(),
        devices: Vec::new(),
    }
}

fn made(definition: &Definition) -> Vec<u8> {
    medium(definition, definition.spec.first_boot.as_ref().unwrap()).unwrap()
}

/// What another program finds on the volume: its label, and its files.
fn read(bytes: &[u8]) -> (String, BTreeMap<String, String>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("medium");
    std::fs::write(&file, bytes).unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).arg("-i").arg(&file).args(args).output();
        let output = output.unwrap_or_else(|error| panic!("{program}, of the package mtools: {error}"));
        assert!(
            output.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let names = run("mdir", &["-b", "::/"]);
    let content = |line: &str| {
        let name = line.trim_start_matches("::/").to_owned();
        let text = run("mtype", &[line]);
        (name, text)
    };
    (run("mlabel", &["-s", "::"]), names.lines().map(content).collect())
}

#[test]
fn mtools_find_the_label_and_the_documents_as_they_were_given() {
    let user_data = "#cloud-config\r\npassword: \"'}], 비밀\"\n";
    let definition = definition(
        v1::FirstBoot {
            user_data: user_data.into(),
            network_config: "version: 2\n".into(),
            ssh_authorized_keys: vec![format!("{KEY} it's \"me\", {{김}}: \\n")],
            hostname: "shop.example".into(),
            ..Default::default()
        },
        &["eth0"],
    );
    let (label, files) = read(&made(&definition));
    assert_eq!(label.trim(), "Volume label is CIDATA");
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        ["meta-data", "network-config", "user-data"]
    );
    assert_eq!(files["user-data"], user_data);
    assert_eq!(files["network-config"], "version: 2\n");
    let meta: serde_json::Value = serde_json::from_str(&files["meta-data"]).unwrap();
    let expected = serde_json::json!({
        "instance-id": "01234567-89ab-4cde-8f01-23456789abcd",
        "local-hostname": "shop.example",
        "public-keys": [format!("{KEY} it's \"me\", {{김}}: \\n")],
    });
    assert_eq!(meta, expected);
    assert_eq!(files["meta-data"].lines().count(), 1, "{}", files["meta-data"]);
}

#[test]
fn without_documents_a_guest_has_its_vms_name_and_dhcp_on_each_interface() {
    let (_, files) = read(&made(&definition(v1::FirstBoot::default(), &["eth1", "eth0"])));
    assert_eq!(files["user-data"], "");
    let meta = r#"{"instance-id":"01234567-89ab-4cde-8f01-23456789abcd","local-hostname":"web"}"#;
    assert_eq!(files["meta-data"].trim(), meta);
    let network = r#"{"version":2,"ethernets":{"eth0":{"match":{"macaddress":"52:54:00:97:07:bc"},"set-name":"eth0","dhcp4":true},"eth1":{"match":{"macaddress":"52:54:00:97:02:43"},"set-name":"eth1","dhcp4":true}}}"#;
    assert_eq!(files["network-config"].trim(), network);
}

/// The part of one interface, which plugs into a network of these subnets and DNS servers with these addresses.
fn told(subnets: [Option<v1::Subnet>; 2], dns: &[&str], addresses: [&str; 2]) -> serde_json::Value {
    let [ipv4, ipv6] = subnets;
    let network = v1::Network {
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork { vni: 7 })),
        ipv4,
        ipv6,
        dns_servers: dns.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    told_in(network, addresses)
}

/// The same in that network.
fn told_in(network: v1::Network, addresses: [&str; 2]) -> serde_json::Value {
    let network = v1::Network {
        name: "field".into(),
        ..network
    };
    let mut definition = definition(v1::FirstBoot::default(), &["eth0", "eth1"]);
    definition.networks = vec![Network::try_from(network).unwrap()];
    let [ipv4, ipv6] = addresses;
    definition.spec.nics[0].plug = Plug::Network(Port {
        ipv4: ipv4.parse().ok(),
        ipv6: ipv6.parse().ok(),
        ..Port::new("field".parse().unwrap())
    });
    let (_, files) = read(&made(&definition));
    let mut config: serde_json::Value = serde_json::from_str(&files["network-config"]).unwrap();
    let other = &config["ethernets"]["eth1"];
    assert_eq!(
        other["dhcp4"], true,
        "an interface in a bridge of the host: {other}"
    );
    assert_eq!(other["addresses"], serde_json::Value::Null);
    let mut own = config["ethernets"]["eth0"].take();
    assert_eq!(own["match"]["macaddress"], "52:54:00:97:07:bc");
    let own = own.as_object_mut().unwrap();
    own.retain(|key, _| !["match", "set-name"].contains(&key.as_str()));
    own.clone().into()
}

#[test]
fn a_guest_is_told_the_addresses_that_no_host_serves_and_asks_for_the_others() {
    let subnet = |cidr: &str, gateway: &str, no_dhcp| {
        Some(v1::Subnet {
            cidr: cidr.into(),
            gateway: gateway.into(),
            no_dhcp,
            ..Default::default()
        })
    };
    let four = |no_dhcp| subnet("10.20.0.0/16", "10.20.0.1", no_dhcp);
    let six = |no_dhcp| subnet("fd00:20::/64", "fd00:20::1", no_dhcp);
    let both = ["10.20.0.7", "fd00:20::7"];
    let only_four = ["10.20.0.7", ""];
    for (subnets, dns, addresses, expected) in [
        (
            [four(false), None],
            &["192.0.2.53"][..],
            only_four,
            json!({"dhcp4": true}),
        ),
        (
            [four(false), six(false)],
            &[],
            both,
            json!({"dhcp4": true, "dhcp6": true}),
        ),
        (
            [four(true), None],
            &["192.0.2.53", "2001:db8::53"],
            only_four,
            json!({
                "dhcp4": false, "addresses": ["10.20.0.7/16"], "gateway4": "10.20.0.1",
                "nameservers": {"addresses": ["192.0.2.53", "2001:db8::53"]},
            }),
        ),
        // No way out, and nobody to ask for names.
        (
            [subnet("10.20.0.0/16", "", true), None],
            &[],
            only_four,
            json!({"dhcp4": false, "addresses": ["10.20.0.7/16"]}),
        ),
        (
            [four(true), six(true)],
            &["192.0.2.53"],
            both,
            json!({
                "dhcp4": false, "addresses": ["10.20.0.7/16", "fd00:20::7/64"],
                "gateway4": "10.20.0.1", "gateway6": "fd00:20::1",
                "nameservers": {"addresses": ["192.0.2.53"]},
            }),
        ),
        // Who serves one family tells of the servers by it.
        (
            [four(false), six(true)],
            &["192.0.2.53"],
            both,
            json!({"dhcp4": true, "addresses": ["fd00:20::7/64"], "gateway6": "fd00:20::1"}),
        ),
        // Too wide to be served; names are.
        (
            [None, subnet("fd00:20::/48", "", false)],
            &["192.0.2.53"],
            ["", "fd00:20::7"],
            json!({
                "dhcp4": false, "addresses": ["fd00:20::7/48"],
                "nameservers": {"addresses": ["fd00:20:0:ffff:ffff:ffff:ffff:ffff"]},
            }),
        ),
        (
            [None, six(false)],
            &[],
            ["", "fd00:20::7"],
            json!({"dhcp4": false, "dhcp6": true}),
        ),
        // Nobody gives addresses in an overlay but hosts.
        ([None, None], &["192.0.2.53"], ["", ""], json!({"dhcp4": false})),
    ] {
        let text = format!("{subnets:?}");
        assert_eq!(told(subnets, dns, addresses), expected, "{text}");
    }
}

#[test]
fn in_a_network_of_the_sites_own_a_guest_asks_for_ipv4_where_dalgu_gives_it_or_gives_nothing() {
    let bridge = v1::BridgeNetwork {
        bridge: "br0".into(),
        vlan: 12,
    };
    let network = |ipv6| v1::Network {
        kind: Some(v1::network::Kind::Bridge(bridge.clone())),
        ipv6,
        ..Default::default()
    };
    assert_eq!(told_in(network(None), ["", ""]), json!({"dhcp4": true}));
    let six = v1::Subnet {
        cidr: "fd00:20::/64".into(),
        ..Default::default()
    };
    assert_eq!(
        told_in(network(Some(six)), ["", "fd00:20::7"]),
        json!({"dhcp4": false, "dhcp6": true})
    );
}

#[test]
fn the_volume_is_what_cloud_init_looks_for_and_the_same_each_time() {
    let definition = definition(v1::FirstBoot::default(), &["eth0"]);
    let bytes = made(&definition);
    assert_eq!(bytes, made(&definition));
    assert_eq!(bytes.len(), 1 << 20);
    // Microsoft's "FAT: General Overview of On-Disk Format": boot sector of FAT12, then the label's entry in the root directory.
    assert_eq!(bytes[510..512], [0x55, 0xaa]);
    assert_eq!(&bytes[43..62], b"CIDATA     FAT12   ");
    assert_eq!(
        bytes[39..43],
        0x0123_4567_u32.to_le_bytes(),
        "the volume's number is the VM's"
    );
    let word = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let (sector, reserved, fats, fat_sectors) = (word(11), word(14), usize::from(bytes[16]), word(22));
    let root = (reserved + fats * fat_sectors) * sector;
    assert_eq!(&bytes[root..root + 12], b"CIDATA     \x08");
}

#[test]
fn the_largest_documents_and_keys_fit() {
    let key = format!("{KEY} {}", "\"".repeat(MAX_KEY_BYTES - KEY.len() - 1));
    let definition = definition(
        v1::FirstBoot {
            user_data: format!("#!{}", "x".repeat(MAX_DOCUMENT_BYTES - 2)),
            network_config: format!("version: 2 #{}", "x".repeat(MAX_DOCUMENT_BYTES - 12)),
            ssh_authorized_keys: vec![key; MAX_KEYS],
            ..Default::default()
        },
        &[],
    );
    let (_, files) = read(&made(&definition));
    assert_eq!(files["user-data"].len(), MAX_DOCUMENT_BYTES);
    assert!(files["meta-data"].len() > MAX_KEYS * MAX_KEY_BYTES);
}

#[test]
fn a_volume_whose_documents_were_forgotten_is_not_made_without_them() {
    let first_boot = v1::FirstBoot {
        user_data: "#!marker".into(),
        ..Default::default()
    };
    let mut definition = definition(first_boot, &[]);
    definition.documents = Documents::default();
    let refused = medium(&definition, definition.spec.first_boot.as_ref().unwrap()).unwrap_err();
    assert!(
        matches!(&refused, Error::Invalid { detail } if detail.contains("user_data")),
        "{refused}"
    );
    assert!(!refused.is_retryable());
}
