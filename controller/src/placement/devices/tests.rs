//! Hosts with devices for VMs, and what finds some there.

use std::borrow::Cow;

use dalgu_proto::host::GuestFeature;

use super::*;
use crate::placement::{Capacity, Constraint, Decision, Parts, Policy, Protect, decide, protected, tests};

const SPREAD: &Policy = &Policy::SPREAD;

/// Four devices of class gpu on two NUMA nodes, one that cannot be given, and one of another class.
fn host(name: &str) -> HostView<'static> {
    let device = |(class, bus, problem): (&str, u8, Option<&str>)| PciDevice {
        class: class.into(),
        address: format!("0000:{bus:02x}:00.0").parse().unwrap(),
        model: "10de:20b0".into(),
        numa_node: Some(u32::from(bus) % 2),
        iommu_group: problem.is_none().then_some(bus.into()),
        problem: problem.map(str::to_owned),
    };
    let devices = [
        ("gpu", 1, None),
        ("gpu", 2, None),
        ("gpu", 3, None),
        ("gpu", 4, None),
        ("gpu", 5, Some("is in no IOMMU group")),
        ("nic", 6, None),
    ];
    HostView {
        guest_features: vec![GuestFeature::PciDevice].into(),
        parts: Parts {
            devices: devices.into_iter().map(device).collect(),
            ..Parts::default()
        },
        ..tests::host(name)
    }
}

fn request(devices: &[(&str, u32)]) -> Request {
    let asked = devices.iter().map(|(class, count)| ((*class).to_owned(), *count));
    Request::new(Spec {
        devices: asked.collect(),
        disks: Vec::new(),
        vcpus: 1,
        memory_mib: 64,
        ..tests::spec()
    })
}

/// The host on which so many have been given.
fn after(gpus: u32) -> HostView<'static> {
    let mut host = host("h1");
    for _ in 0..gpus {
        host.reserve(&request(&[("gpu", 1)]).spec, &[]);
    }
    host
}

fn addresses(devices: &[Device]) -> Vec<String> {
    devices.iter().map(|device| device.address.to_string()).collect()
}

fn hint(decision: &Decision) -> &str {
    decision.hint.as_ref().map_or("", |hint| hint.text.as_str())
}

#[test]
fn devices_are_given_once_and_those_of_the_vms_nodes_first() {
    let at = |node| {
        [NumaPlace {
            node,
            cpus: Vec::new(),
        }]
    };
    let two = request(&[("gpu", 2), ("nic", 1)]).spec;
    let chosen = choose(&two, &[], &host("h1"));
    assert_eq!(
        addresses(&chosen),
        ["0000:01:00.0", "0000:02:00.0", "0000:06:00.0"]
    );
    assert_eq!(chosen[2].class, "nic");
    let near = choose(&two, &at(0), &host("h1"));
    assert_eq!(addresses(&near), ["0000:02:00.0", "0000:04:00.0", "0000:06:00.0"]);
    // Near is better, and far is enough.
    let three = request(&[("gpu", 3)]).spec;
    let far = choose(&three, &at(1), &host("h1"));
    assert_eq!(addresses(&far), ["0000:01:00.0", "0000:03:00.0", "0000:02:00.0"]);
    let rest = choose(&three, &[], &after(1));
    assert_eq!(addresses(&rest), ["0000:02:00.0", "0000:03:00.0", "0000:04:00.0"]);
    // All or none.
    assert!(choose(&three, &[], &after(2)).is_empty());
    assert!(choose(&request(&[]).spec, &[], &host("h1")).is_empty());
}

#[test]
fn a_refusal_says_what_is_free_and_what_would_help() {
    let cases = [
        (
            [("gpu", 2)],
            3,
            "needs 2 PCI devices of class gpu, has 1 free of 4 (1 more cannot be given, see `dalgu host show`)",
            "free 1 PCI devices of class gpu on h1",
        ),
        (
            [("gpu", 5)],
            0,
            "needs 5 PCI devices of class gpu, has 4 free of 4",
            "ask for at most 4 PCI devices of class gpu (h1 can take it then)",
        ),
        (
            [("fpga", 1)],
            0,
            "needs 1 PCI devices of class fpga, has 0 free of 0",
            "ask for no PCI device of class fpga",
        ),
    ];
    for (asked, given, message, help) in cases {
        let decision = decide(&request(&asked), &[after(given)], SPREAD);
        let [shortfall] = decision.verdicts[0].shortfalls.as_slice() else {
            panic!("{decision:?}")
        };
        assert_eq!(shortfall.constraint, Constraint::PciDevice);
        assert!(shortfall.message.starts_with(message), "{}", shortfall.message);
        assert_eq!(
            (shortfall.needed, shortfall.available),
            (
                asked[0].1.into(),
                u64::from(if asked[0].0 == "gpu" { 4 - given } else { 0 })
            )
        );
        assert!(hint(&decision).contains(help), "{}", hint(&decision));
        assert!(decision.summary.contains("PCI_DEVICE 1"), "{}", decision.summary);
    }
    let mut old = host("h1");
    old.guest_features = Cow::default();
    let decision = decide(&request(&[("gpu", 1)]), &[old], SPREAD);
    assert!(
        hint(&decision).contains("update its agent"),
        "{}",
        hint(&decision)
    );
    // Another host is found where there is one, and nobody minds who asks for none.
    let other = HostView {
        parts: Parts::default(),
        ..host("h0")
    };
    let decision = decide(&request(&[("gpu", 4)]), &[other.clone(), host("h1")], SPREAD);
    assert_eq!(decision.host.unwrap().as_str(), "h1");
    assert!(decide(&request(&[]), &[after(4)], SPREAD).host.is_some());
}

#[test]
fn capacity_is_how_often_the_devices_are_there() {
    let vms = |devices, host: HostView<'static>| {
        let capacity = Capacity::of(&request(devices), &[host], None, 0);
        let domain = capacity.domains["h1"];
        (capacity.vms, domain.held)
    };
    assert_eq!(vms(&[("gpu", 1)], host("h1")), (4, 0));
    assert_eq!(vms(&[("gpu", 1)], after(3)), (1, 3));
    assert_eq!(vms(&[("gpu", 2)], host("h1")).0, 2);
    assert_eq!(vms(&[("gpu", 1), ("nic", 1)], host("h1")).0, 1);
    assert_eq!(vms(&[("fpga", 1)], host("h1")).0, 0);
    // The engine finds the same, one after the other, over several hosts.
    let hosts = [host("h1"), host("h2")];
    let keep = std::sync::Arc::new(Protect::default());
    assert_eq!(protected(&request(&[("gpu", 3)]), &hosts, *SPREAD, &keep), 2);
}
