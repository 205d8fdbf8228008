//! The numbers against what creations do.

use std::borrow::Cow;

use dalgu_proto::{placement::Taint, vm::Spec};
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::placement::{
    Policy, decide,
    properties::{cases, host_name, hosts, policy},
    tests,
};

const VM_MIB: u64 = 1024;

fn request(vcpus: u32, memory_mib: u64) -> Request {
    Request::new(Spec {
        vcpus,
        memory_mib,
        disks: Vec::new(),
        nics: Vec::new(),
        ..tests::spec()
    })
}

/// Makes a VM if a host takes it.
fn create(request: &Request, hosts: &mut [HostView<'_>], policy: Policy) -> Option<usize> {
    let host = decide(request, hosts, &policy).host?;
    let at = hosts.iter().position(|one| one.name == host)?;
    hosts[at].vcpus_reserved += request.spec.vcpus;
    hosts[at].memory_mib_reserved += request.spec.reserved_memory_mib();
    hosts[at].vms += 1;
    Some(at)
}

#[test]
fn a_site_is_counted_by_host_and_by_rack() {
    // 32 vCPUs and 15360 MiB each; a VM of 2 vCPUs reserves some more than 1024 MiB.
    let request = request(2, VM_MIB);
    let slots = 15_360 / request.spec.reserved_memory_mib();
    let mut hosts: Vec<_> = ["h1", "h2", "h3"].map(tests::host).into();
    for (host, rack) in hosts.iter_mut().zip(["a", "a", "b"]) {
        host.labels = Cow::Owned(BTreeMap::from([("rack".to_owned(), rack.to_owned())]));
    }
    hosts[0].memory_mib_reserved = 3 * request.spec.reserved_memory_mib();
    hosts[1].cordoned = true;
    let by_host = Capacity::of(&request, &hosts, None, 1);
    assert_eq!((by_host.vms, by_host.domains.len()), (2 * slots - 3, 3));
    assert_eq!(by_host.domains["h1"].held, 3);
    assert_eq!(by_host.domains["h2"].vms, 0);
    assert_eq!(by_host.keeping, slots - 3);
    let by_rack = Capacity::of(&request, &hosts, Some("rack"), 1);
    assert_eq!(
        (by_rack.domains["a"].hosts, by_rack.domains["a"].vms),
        (2, slots - 3)
    );
    assert_eq!(by_rack.keeping, slots - 3, "either rack is as large");
    assert_eq!(
        Capacity::of(&request, &hosts, Some("rack"), 0).keeping,
        by_rack.vms
    );
    assert_eq!(Capacity::of(&request, &hosts, Some("rack"), 2).keeping, 0);
    // A host that the VM does not tolerate is no part of the site for it.
    hosts[2].taints.to_mut().insert(Taint {
        key: "use".into(),
        value: "db".into(),
        soft: false,
    });
    assert_eq!(Capacity::of(&request, &hosts, None, 0).domains.len(), 2);
}

/// Hosts with VMs of the one size alone, in racks.
fn uniform() -> impl Strategy<Value = Vec<HostView<'static>>> {
    let size = request(1, VM_MIB).spec.reserved_memory_mib();
    vec((1..9_u64, 0..5_u64), 3..9).prop_map(move |hosts| {
        let host = |(index, (slots, held)): (usize, (u64, u64))| {
            let held = held.min(slots);
            let mut host = tests::host("h1");
            host.name = host_name(u32::try_from(index).unwrap() + 1);
            host.memory_mib = 1024 + slots * size + size / 2;
            host.memory_mib_reserved = held * size;
            host.vcpus_reserved = u32::try_from(held).unwrap();
            host.labels = Cow::Owned(BTreeMap::from([("rack".to_owned(), format!("r{}", index % 3))]));
            host
        };
        hosts.into_iter().enumerate().map(host).collect()
    })
}

/// Whether all that the hosts of one rack hold finds room on the others.
fn survives(request: &Request, hosts: &[HostView<'static>], rack: &str) -> bool {
    let (lost, mut left): (Vec<_>, Vec<_>) = hosts
        .iter()
        .cloned()
        .partition(|host| host.labels.get("rack").is_some_and(|own| own == rack));
    let vms: u32 = lost.iter().map(|host| host.vcpus_reserved).sum();
    (0..vms).all(|_| create(request, &mut left, Policy::SPREAD).is_some())
}

proptest! {
    #![proptest_config(cases(500))]

    #[test]
    fn so_many_creations_succeed_and_the_next_is_refused(
        mut hosts in hosts(), vcpus in 1..4_u32, memory_mib in 200..3000_u64, policy in policy(),
    ) {
        let request = request(vcpus, memory_mib);
        let capacity = Capacity::of(&request, &hosts, None, 1);
        for _ in 0..capacity.vms {
            prop_assert!(create(&request, &mut hosts, policy).is_some());
        }
        prop_assert!(create(&request, &mut hosts, policy).is_none());
        prop_assert!(capacity.keeping <= capacity.vms);
    }

    #[test]
    fn with_so_many_any_rack_can_be_lost_and_with_one_more_some_rack_cannot(mut hosts in uniform(), policy in policy()) {
        let request = request(1, VM_MIB);
        let capacity = Capacity::of(&request, &hosts, Some("rack"), 1);
        let fullest = capacity.domains.values().map(|rack| rack.vms + rack.held).max().unwrap();
        // Where there is no room for that now, there is none for more either.
        if capacity.vms < fullest {
            prop_assert_eq!(capacity.keeping, 0);
            return Ok(());
        }
        for _ in 0..capacity.keeping {
            prop_assert!(create(&request, &mut hosts, policy).is_some());
        }
        for rack in capacity.domains.keys() {
            prop_assert!(survives(&request, &hosts, rack), "{rack}");
        }
        if create(&request, &mut hosts, policy).is_some() {
            prop_assert!(capacity.domains.keys().any(|rack| !survives(&request, &hosts, rack)));
        }
    }
}
