//! Hosts of two nodes, and what finds room there.

use std::borrow::Cow;

use dalgu_proto::{
    host::{GuestFeature, HugePages},
    vm::{CpuPolicy, Nic, NumaPolicy, Plug},
};

use super::*;
use crate::placement::{Constraint, Decision, Policy, decide, tests};

const SPREAD: Policy = Policy::SPREAD;

/// 16 processors and 64 GiB on two nodes, 16 GiB of each in huge pages of 1 GiB, and an uplink of 10 Gbit/s.
fn host(name: &str) -> HostView<'static> {
    let node = |id: u32| NumaNode {
        id,
        cpus: (id * 8..id * 8 + 8).collect(),
        memory_bytes: 32 << 30,
        huge_pages: vec![HugePages {
            page_size_bytes: 1 << 30,
            total: 16,
            free: 16,
        }],
        ..NumaNode::default()
    };
    HostView {
        cpus: 16,
        guest_features: vec![GuestFeature::Numa].into(),
        cpu_overcommit_ratio: 2.0,
        memory_mib: 32 << 10,
        reserved_memory_mib: 1024,
        parts: Parts {
            nodes: vec![node(0), node(1)].into(),
            uplinks: vec![Uplink {
                bridge: "br0".into(),
                mbit_per_second: 10_000,
            }]
            .into(),
            taken: Cow::default(),
            devices: Cow::default(),
        },
        ..tests::host(name)
    }
}

fn request(vcpus: u32, memory_mib: u64, fitting: Fitting) -> Request {
    Request::new(Spec {
        vcpus,
        memory_mib,
        fitting,
        disks: Vec::new(),
        ..tests::spec()
    })
}

const DEDICATED: Fitting = Fitting {
    cpus: CpuPolicy::Dedicated,
    pages: None,
    numa: NumaPolicy::None,
};
const HUGE: Fitting = Fitting {
    cpus: CpuPolicy::Shared,
    pages: Some(PageSize::Gib1),
    numa: NumaPolicy::None,
};

/// Puts it on the host, which must have room.
fn put(request: &Request, host: &mut HostView<'_>) -> Vec<NumaPlace> {
    assert!(super::super::filter::lacks(request, host).is_empty());
    let places = fit(&request.spec, host);
    host.reserve(&request.spec, &places);
    places
}

fn places(of: &[(u32, std::ops::Range<u32>)]) -> Vec<NumaPlace> {
    of.iter()
        .map(|(node, cpus)| NumaPlace {
            node: *node,
            cpus: cpus.clone().collect(),
        })
        .collect()
}

fn refused(request: &Request, host: &HostView<'_>) -> (Constraint, String, u64, u64) {
    let Decision { host, verdicts, .. } = decide(request, std::slice::from_ref(host), &SPREAD);
    assert_eq!(host, None);
    let shortfall = verdicts[0].shortfalls[0].clone();
    (
        shortfall.constraint,
        shortfall.message,
        shortfall.needed,
        shortfall.available,
    )
}

fn hint(request: &Request, host: &HostView<'_>) -> String {
    decide(request, std::slice::from_ref(host), &SPREAD)
        .hint
        .unwrap()
        .text
}

#[test]
fn dedicated_processors_are_given_once_and_leave_the_largest_room_whole() {
    let mut host = host("h1");
    let three = request(3, 1024, DEDICATED);
    assert_eq!(put(&three, &mut host), places(&[(0, 0..3)]));
    assert_eq!(put(&three, &mut host), places(&[(0, 3..6)]));
    // Two are left there; the next one goes where three are.
    assert_eq!(put(&three, &mut host), places(&[(1, 8..11)]));
    assert_eq!(put(&request(2, 1024, DEDICATED), &mut host), places(&[(0, 6..8)]));
    // Each takes the two virtual ones away that its logical one could have been.
    assert_eq!((host.vcpus_capacity(), host.vcpus_reserved), (32, 22));
}

#[test]
fn shared_processors_keep_what_they_have_beside_dedicated_ones() {
    let mut host = host("h1");
    put(&request(16, 1024, Fitting::default()), &mut host);
    put(&request(8, 1024, Fitting::default()), &mut host);
    // 32 virtual ones, 24 in use: four logical ones can be taken away.
    let (constraint, message, needed, available) = refused(&request(5, 1024, DEDICATED), &host);
    assert_eq!((constraint, needed, available), (Constraint::Cpu, 5, 4));
    assert_eq!(
        message,
        "needs 5 processors of its own on one NUMA node, has 4 that can be dedicated there"
    );
    put(&request(4, 1024, DEDICATED), &mut host);
    let (constraint, _, needed, available) = refused(&request(1, 1024, Fitting::default()), &host);
    assert_eq!((constraint, needed, available), (Constraint::Cpu, 1, 0));
}

#[test]
fn one_processor_is_left_to_the_host() {
    let mut host = host("h1");
    put(&request(8, 1024, DEDICATED), &mut host);
    assert_eq!(
        hint(&request(8, 1024, DEDICATED), &host),
        "ask for at most 7 vCPUs (h1 can take it then), or add a host with at least 9 processors and 1104 MiB for VMs"
            .split(", or add")
            .next()
            .unwrap()
    );
    put(&request(7, 1024, DEDICATED), &mut host);
    assert_eq!(refused(&request(1, 1024, DEDICATED), &host).3, 0);
}

#[test]
fn memory_in_huge_pages_is_that_of_one_node_and_no_ordinary_one() {
    let mut host = host("h1");
    let large = request(2, 12 << 10, HUGE);
    assert_eq!(put(&large, &mut host), places(&[(0, 0..0)]));
    assert_eq!(put(&large, &mut host), places(&[(1, 0..0)]));
    assert_eq!(host.memory_mib_reserved, 2 * (64 + 2 + 96));
    let (constraint, message, needed, available) = refused(&large, &host);
    assert_eq!(
        (constraint, needed, available),
        (Constraint::HugePages, 12 << 10, 4 << 10)
    );
    assert_eq!(
        message,
        "needs 12288 MiB in huge pages of 1 GiB on one NUMA node, has 4096 MiB of them free there"
    );
    assert_eq!(
        hint(&large, &host),
        "ask for at most 4096 MiB of memory (h1 can take it then), or set 8192 MiB more of huge pages of 1 GiB aside on each NUMA node of h1"
    );
    // There are none of the other size.
    let small = Fitting {
        pages: Some(PageSize::Mib2),
        ..HUGE
    };
    assert_eq!(refused(&request(1, 64, small), &host).3, 0);
}

#[test]
fn a_vm_that_is_packed_is_on_one_node_and_one_that_is_spread_on_as_many_as_it_says() {
    let mut host = host("h1");
    let packed = |vcpus, memory| {
        let fitting = Fitting {
            numa: NumaPolicy::Pack,
            ..Fitting::default()
        };
        request(vcpus, memory, fitting)
    };
    // Half of its memory is in huge pages, and the host keeps a part of each node.
    let (constraint, _, needed, available) = refused(&packed(2, 16 << 10), &host);
    assert_eq!(
        (constraint, needed, available),
        (Constraint::Numa, 16_384 + 66 + 128, 16_384 - 512)
    );
    assert_eq!(put(&packed(8, 12 << 10), &mut host), places(&[(0, 0..0)]));
    let spread = Fitting {
        cpus: CpuPolicy::Dedicated,
        numa: NumaPolicy::Spread(2),
        pages: None,
    };
    // The node's other processors go on to be enough for the eight that share them.
    let (constraint, _, needed, available) = refused(&request(10, 1024, spread), &host);
    assert_eq!((constraint, needed, available), (Constraint::Cpu, 10, 8));
    assert_eq!(
        put(&request(8, 1024, spread), &mut host),
        places(&[(0, 0..4), (1, 8..12)])
    );
    let more = Fitting {
        numa: NumaPolicy::Spread(4),
        ..spread
    };
    let (constraint, message, ..) = refused(&request(4, 1024, more), &host);
    assert_eq!(constraint, Constraint::Numa);
    assert_eq!(message, "needs 4 NUMA nodes, has 2");
}

#[test]
fn processors_on_one_node_and_memory_on_the_other_are_no_room() {
    let mut host = host("h1");
    put(&request(8, 1024, DEDICATED), &mut host);
    put(&request(1, 14 << 10, HUGE), &mut host);
    let both = Fitting {
        cpus: CpuPolicy::Dedicated,
        ..HUGE
    };
    // Node 0 has no processors, node 1 no pages: whichever the pages went to.
    let wanted = request(4, 12 << 10, both);
    let on = &host.parts.taken;
    let with_pages = (0..2).find(|node| on.pages_mib(*node, PageSize::Gib1) > 0);
    match with_pages {
        Some(1) => {
            let (constraint, message, needed, available) = refused(&wanted, &host);
            assert_eq!((constraint, needed, available), (Constraint::Numa, 1, 0));
            assert_eq!(
                message,
                "needs processors and memory on the same NUMA node, has none with room for both"
            );
            assert!(
                hint(&wanted, &host).contains("no NUMA policy"),
                "{}",
                hint(&wanted, &host)
            );
        }
        other => panic!("the pages went to {other:?}"),
    }
}

#[test]
fn a_host_takes_no_more_vms_than_it_may() {
    let mut host = host("h1");
    (host.vms, host.vms_most) = (3, Some(3));
    let plain = request(1, 128, Fitting::default());
    let (constraint, message, needed, available) = refused(&plain, &host);
    assert_eq!((constraint, needed, available), (Constraint::VmCount, 4, 3));
    assert_eq!(message, "has 3 VMs, takes at most 3");
    assert_eq!(
        hint(&plain, &host),
        "move or delete 1 VM of h1, or let it have more"
    );
    host.vms_most = Some(4);
    put(&plain, &mut host);
}

#[test]
fn bandwidth_is_what_the_uplink_carries_and_no_more() {
    let mut host = host("h1");
    let reserving = |mbit: u32| {
        let mut request = request(1, 128, Fitting::default());
        request.spec.nics = vec![Nic {
            name: "eth0".into(),
            plug: Plug::Bridge { bridge: "br0".into() },
            mac: String::new(),
            reserved_mbit: Some(mbit),
        }];
        request
    };
    put(&reserving(7000), &mut host);
    let (constraint, message, needed, available) = refused(&reserving(4000), &host);
    assert_eq!(
        (constraint, needed, available),
        (Constraint::Bandwidth, 4000, 3000)
    );
    assert_eq!(
        message,
        "needs 4000 Mbit/s on the uplink of bridge br0, has 3000 free of 10000"
    );
    assert_eq!(
        hint(&reserving(4000), &host),
        "free 1000 Mbit/s on bridge br0 of h1, or reserve at most 3000 Mbit/s on bridge br0 (h1 can take it then)"
    );
    put(&reserving(3000), &mut host);
    host.parts.uplinks = Cow::default();
    assert_eq!(
        refused(&reserving(1), &host).1,
        "nothing can be reserved on bridge br0: it has no uplink whose speed is known"
    );
}

#[test]
fn so_many_fit_one_after_the_other_as_are_counted() {
    let mut host = host("h1");
    put(&request(3, 1024, DEDICATED), &mut host);
    for wanted in [
        request(3, 1024, DEDICATED),
        request(1, 5 << 10, HUGE),
        request(
            2,
            2 << 10,
            Fitting {
                numa: NumaPolicy::Spread(2),
                ..DEDICATED
            },
        ),
    ] {
        let counted = times(&wanted, &host, u64::MAX);
        let (mut filled, mut vms) = (host.clone(), 0);
        while super::super::filter::lacks(&wanted, &filled).is_empty() {
            put(&wanted, &mut filled);
            vms += 1;
        }
        assert_eq!((counted, vms > 0), (vms, true));
    }
}

#[test]
fn what_is_given_back_is_as_if_it_had_never_been_there() {
    let mut host = host("h1");
    let before = host.parts.taken.clone();
    let wanted = request(
        4,
        4 << 10,
        Fitting {
            cpus: CpuPolicy::Dedicated,
            numa: NumaPolicy::Spread(2),
            ..HUGE
        },
    );
    let places = put(&wanted, &mut host);
    assert_eq!(host.parts.taken.cpus().collect::<Vec<_>>(), [0, 1, 8, 9]);
    host.parts.taken.to_mut().change(&wanted.spec, &places, false);
    assert_eq!(host.parts.taken, before);
}

#[test]
fn dedicated_processors_are_whole_cores_and_what_is_left_over_begins_as_few_as_can_be() {
    let node = NumaNode {
        cpus: (0..8).collect(),
        cores: vec![0, 1, 2, 3, 0, 1, 2, 3],
        ..NumaNode::default()
    };
    let cases: [(&[u32], usize, &[u32]); 6] = [
        (&[], 4, &[0, 1, 4, 5]),
        (&[], 3, &[0, 1, 4]),
        // The core that is begun is finished before another is.
        (&[0], 3, &[1, 4, 5]),
        (&[0], 2, &[1, 5]),
        (&[0, 1, 2], 4, &[3, 4, 5, 7]),
        (&[0, 1, 2, 3], 4, &[4, 5, 6, 7]),
    ];
    for (taken, count, expected) in cases {
        let chosen = choose_cpus(&node, |cpu| !taken.contains(&cpu), count);
        assert_eq!(chosen, expected, "{count} beside {taken:?}");
    }
    let untold = NumaNode {
        cores: Vec::new(),
        ..node
    };
    assert_eq!(choose_cpus(&untold, |_| true, 3), [0, 1, 2]);
}
