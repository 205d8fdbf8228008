//! The difference between what should be and what is there, as the programs are told.

use std::collections::BTreeMap;

use super::*;
use crate::network::{Kept, compile, compile::tests::told};

fn segments() -> Vec<Segment> {
    let kept = Kept::default().told(told(), &[]);
    compile::compile(&kept, &[], &BTreeSet::new(), Some([10, 0, 0, 1].into())).segments
}

fn link(name: &str, kind: &str, mtu: u32, master: Option<&str>, data: Data) -> Link {
    Link {
        ifname: name.to_owned(),
        mtu,
        master: master.map(str::to_owned),
        flags: vec!["UP".to_owned()],
        linkinfo: Info {
            info_kind: Some(kind.to_owned()),
            info_data: data,
        },
    }
}

fn filtered() -> Data {
    Data {
        nf_call_iptables: 1,
        nf_call_ip6tables: 1,
        ..Data::default()
    }
}

/// A host on which both networks are as they should be.
fn whole(segments: &[Segment]) -> Seen {
    let mut links = vec![link("br0", "bridge", 1500, None, Data::default())];
    let mut entries = Vec::new();
    for segment in segments {
        links.push(link(&segment.bridge, "bridge", segment.mtu, None, filtered()));
        let device = |prefix: &str| names::device(prefix, &segment.network);
        match &segment.uplink {
            Uplink::Vxlan { vni, local, peers } => {
                let data = Data {
                    id: Some(*vni),
                    local: Some(local.to_string()),
                    ..Data::default()
                };
                links.push(link(
                    &device(names::VXLAN),
                    "vxlan",
                    segment.mtu,
                    Some(&segment.bridge),
                    data,
                ));
                entries.extend(peers.iter().map(|peer| Entry {
                    mac: ALL.to_owned(),
                    ifname: device(names::VXLAN),
                    dst: Some(peer.clone()),
                }));
            }
            _ => {
                links.push(link(
                    &device(names::UPLINK),
                    "veth",
                    segment.mtu,
                    Some(&segment.bridge),
                    Data::default(),
                ));
                links.push(link(
                    &device(names::HOST_SIDE),
                    "veth",
                    segment.mtu,
                    Some("br0"),
                    Data::default(),
                ));
            }
        }
    }
    Seen::new(links, entries)
}

#[test]
fn everything_is_made_where_nothing_is() {
    let bare = Seen::new(
        vec![link("br0", "bridge", 1500, None, Data::default())],
        Vec::new(),
    );
    let scripts: BTreeMap<_, _> = segments()
        .iter()
        .map(|segment| (segment.network.to_string(), make(segment, &bare).unwrap()))
        .collect();
    insta::assert_debug_snapshot!(scripts);
}

#[test]
fn nothing_is_done_where_everything_is_right() {
    let segments = segments();
    let seen = whole(&segments);
    for segment in &segments {
        assert_eq!(make(segment, &seen), Ok(Script::default()));
    }
    assert_eq!(remove(&segments, &seen), Script::default());
}

#[test]
fn an_overlay_of_another_identifier_or_address_is_made_anew_and_peers_that_left_are_forgotten() {
    let segments = segments();
    let mut segment = segments[0].clone();
    let mut seen = whole(&segments);
    let name = names::device(names::VXLAN, &segment.network);
    let learnt = [
        ("52:54:00:00:00:07", "10.0.0.2"),
        ("52:54:00:00:00:09", "10.0.0.3"),
    ];
    let learnt = learnt.map(|(mac, peer)| (mac.to_owned(), peer.to_owned()));
    seen.learnt.insert(name.clone(), learnt.into());
    let Uplink::Vxlan { peers, .. } = &mut segment.uplink else {
        panic!()
    };
    peers.remove("10.0.0.3");
    peers.insert("10.0.0.4".to_owned());
    let script = make(&segment, &seen).unwrap();
    assert_eq!(
        script.bridge,
        [
            format!("fdb append {ALL} dev {name} dst 10.0.0.4"),
            format!("fdb del {ALL} dev {name} dst 10.0.0.3"),
        ]
    );
    assert_eq!(
        script.fading,
        [format!("fdb del 52:54:00:00:00:09 dev {name} dst 10.0.0.3")]
    );
    assert!(script.ip.is_empty());
    let Uplink::Vxlan { vni: other, .. } = &mut segment.uplink else {
        panic!()
    };
    *other = 43;
    let script = make(&segment, &seen).unwrap();
    assert_eq!(script.ip[0], format!("link del dev {name}"));
    assert!(script.ip[1].contains("id 43"), "{script:?}");
    assert_eq!(script.bridge.len(), 2, "the peers are told to the new one");
}

#[test]
fn a_network_on_a_bridge_that_the_host_has_not_says_so() {
    let segments = segments();
    let mut seen = whole(&segments);
    seen.links.remove("br0");
    assert_eq!(
        make(&segments[1], &seen),
        Err("the host has no bridge br0".to_owned())
    );
}

#[test]
fn only_what_is_ours_and_in_use_by_no_vm_is_removed() {
    let segments = segments();
    let mut seen = whole(&segments);
    for foreign in ["dgn", "dgnr0", "dgx-tunnel", "virbr0", "dgn00000000zz", "docker0"] {
        seen.links.insert(
            foreign.to_owned(),
            link(foreign, "bridge", 1500, None, Data::default()),
        );
    }
    let tap = "dgt00000000001".to_owned();
    seen.links.insert(
        tap.clone(),
        link(&tap, "tun", 1450, Some(&segments[0].bridge), Data::default()),
    );
    let script = remove(&[], &seen);
    let (near, bridge) = (
        names::device(names::UPLINK, &segments[1].network),
        &segments[1].bridge,
    );
    assert_eq!(
        script.ip,
        [format!("link del dev {near}"), format!("link del dev {bridge}")]
    );
}
