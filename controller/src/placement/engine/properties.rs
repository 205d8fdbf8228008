//! The engine answers as the scan does, whatever is asked of whatever site, and however that came about.

use std::{borrow::Cow, collections::BTreeMap};

use dalgu_proto::{host::GuestFeature, ids::VolumeId, vm::Spec};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::placement::{
    Bound, Fit, Needs, UsageView, decide,
    properties::{cases, fitting, host_name, hosts, parts, peopled, policy, protect, request, rules, taints},
    tests,
};

/// A host of a site whose hosts are much alike: few sizes, few loads, three racks, few sets of bridges; so most comparisons are close.
fn alike() -> impl Strategy<Value = HostView<'static>> {
    let numbers = (0..2_usize, 0..5_u32, 0..5_u64, 0..9_u32, 0..4_usize);
    let flags = (
        prop::bool::weighted(0.95),
        prop::bool::weighted(0.05),
        0..4_usize,
        taints(),
    );
    let pool = (select(vec![0_u64, 2000, 6000, 90_000]), any::<bool>());
    let bridges: [&[&str]; 4] = [&["br0"], &["br0", "br1"], &["br1"], &["br0", "br2"]];
    let bridges = prop_oneof![5 => Just(bridges[0]), 5 => select(bridges.to_vec())];
    (numbers, flags, pool, bridges).prop_map(
        |((size, vcpus, memory, odd_memory, load), flags, pool, bridges)| {
            let mut host = tests::host("h1");
            (host.cpus, host.memory_mib) = [(8, 16_384), (16, 32_768)][size];
            (host.cpu_overcommit_ratio, host.own_cpu_overcommit_ratio) = (1.0, 1.0);
            host.vcpus_reserved = vcpus * 2;
            host.memory_mib_reserved = memory * 2048 + u64::from(odd_memory / 8);
            (host.ready, host.cordoned) = (flags.0, flags.1);
            host.pressed = odd_memory % 8 == 5;
            host.usage = [Some(0.0), Some(0.0), Some(7.0), None][load].map(|busy| UsageView {
                cpus_busy: Some(busy),
                ..UsageView::default()
            });
            let rack = ["a", "b", "c"].get(flags.2);
            host.labels = Cow::Owned(
                rack.map(|rack| ("rack".into(), (*rack).into()))
                    .into_iter()
                    .collect(),
            );
            host.taints = Cow::Owned(flags.3);
            host.pools[0].reserved_mib = pool.0;
            host.pools[0].shared = pool.1;
            host.bridges = bridges.iter().map(|name| (*name).to_owned()).collect();
            host.vms_most = (load == 8).then_some(0);
            host.guest_features = Cow::Owned(vec![GuestFeature::Numa, GuestFeature::PciDevice]);
            let nodes = [2, 1][size % 2];
            host.parts = parts(
                host.cpus,
                host.memory_mib,
                nodes,
                [0, 4096][size],
                vcpus,
                1000 * memory,
            );
            peopled(host)
        },
    )
}

fn site() -> impl Strategy<Value = Vec<HostView<'static>>> {
    let named = |mut hosts: Vec<HostView<'static>>| {
        for (host, number) in hosts.iter_mut().zip(1..) {
            host.name = host_name(number);
        }
        agreed(hosts)
    };
    prop_oneof![hosts().prop_map(agreed), vec(alike(), 0..24).prop_map(named)]
}

/// What is promised in a shared pool is one number, whichever host is asked.
fn agreed(mut hosts: Vec<HostView<'static>>) -> Vec<HostView<'static>> {
    let mut promised = BTreeMap::new();
    for pool in hosts
        .iter_mut()
        .flat_map(|host| &mut host.pools)
        .filter(|pool| pool.shared)
    {
        pool.reserved_mib = *promised.entry(pool.name.clone()).or_insert(pool.reserved_mib);
    }
    hosts
}

/// Requests of every kind, and such as most of [`alike`] can take.
fn ask() -> impl Strategy<Value = Request> {
    let fitting = prop::option::weighted(0.3, fitting());
    let common = (1..5_u32, 1..5_u64, 0..4_usize, 0..2000_u64, rules(), fitting);
    let common = common.prop_map(|(vcpus, memory, rack, disk, rules, fitting)| {
        let mut spec = Spec {
            vcpus,
            memory_mib: memory * 1024,
            fitting: fitting.unwrap_or_default(),
            disks: vec![tests::disk("root", "local", disk + 1)],
            ..tests::spec()
        };
        if let Some(rack) = ["a", "b"].get(rack) {
            spec.host_selector.insert("rack".into(), (*rack).into());
        }
        Request::new(spec).with_rules(rules)
    });
    let volume = prop::option::weighted(0.05, (1..9_u32).prop_map(host_name));
    let image = vec((1..24_u32).prop_map(host_name), 0..6)
        .prop_map(|hosts| hosts.into_iter().collect::<imbl::OrdSet<HostName>>());
    let images = prop_oneof![2 => Just(Vec::new()), 1 => vec(image, 0..3)];
    (prop_oneof![request(), common], volume, images).prop_map(|(request, volume, images)| {
        let needs = volume.map_or_else(Needs::default, |host| Needs {
            volumes: BTreeMap::from([(
                VolumeId::from_uuid(uuid::Uuid::nil()),
                Bound {
                    volume: "ledger".parse().unwrap(),
                    host: Some(host),
                },
            )]),
            ..Needs::default()
        });
        request.with_needs(Needs { images, ..needs })
    })
}

fn engine(policy: Policy, hosts: &[HostView<'_>]) -> Engine {
    protecting(policy, &Protect::default(), hosts)
}

fn protecting(policy: Policy, protect: &Protect, hosts: &[HostView<'_>]) -> Engine {
    let mut engine = Engine::protecting(policy, &Arc::new(protect.clone()));
    hosts.iter().for_each(|host| engine.set(host));
    engine
}

/// The engine's answers to some requests are those of the scan.
fn agrees(engine: &Engine, hosts: &[HostView<'_>], requests: &[Request]) -> Result<(), TestCaseError> {
    prop_assert_eq!(engine.len(), hosts.len());
    let view = |name: &HostName| hosts.iter().find(|host| host.name == *name).cloned();
    let mut views = hosts.to_vec();
    views.sort_by(|a, b| a.name.cmp(&b.name));
    for request in requests {
        let expected = decide(request, hosts, engine.rule());
        prop_assert_eq!(
            engine.choose(request, view),
            expected.host.as_ref(),
            "{}",
            expected.summary
        );
        for kept in [2, 5, 100] {
            let expected = decide_keeping(request, hosts, engine.rule(), kept);
            prop_assert_eq!(
                engine.decide(request, kept, || views.iter().cloned(), view),
                expected
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn the_engine_answers_as_the_scan_does(hosts in site(), requests in vec(ask(), 1..4), policy in policy()) {
        agrees(&engine(policy, &hosts), &hosts, &requests)?;
    }
}

proptest! {
    #![proptest_config(cases(1500))]

    #[test]
    fn the_engine_answers_as_the_scan_does_where_room_is_kept(
        hosts in site(), requests in vec(ask(), 1..4), policy in policy(), protect in protect(), ignoring in any::<bool>(),
    ) {
        let ignoring = requests.iter().map(|request| request.clone().ignoring_protection(ignoring));
        let requests: Vec<_> = requests.iter().cloned().chain(ignoring).collect();
        agrees(&protecting(policy, &protect, &hosts), &hosts, &requests)?;
    }
}

proptest! {
    #![proptest_config(cases(1500))]

    #[test]
    fn it_does_not_matter_how_a_site_came_about(
        before in site(), after in site(), requests in vec(ask(), 1..4), policy in policy(), promised in 0..6000_u64, protect in protect(),
    ) {
        let mut engine = protecting(policy, &protect, &before);
        for host in &after {
            engine.set(host);
        }
        for host in before.iter().skip(after.len()) {
            engine.remove(&host.name);
            engine.remove(&host.name);
        }
        let mut after = after;
        let shared = after.iter_mut().flat_map(|host| &mut host.pools).filter(|pool| pool.shared);
        shared.for_each(|pool| pool.reserved_mib = promised);
        engine.promise(|_| promised);
        agrees(&engine, &after, &requests)?;
    }
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn it_answers_as_the_scan_does_by_prices_too(hosts in site(), requests in vec(ask(), 1..6), policy in policy()) {
        let mut engine = engine(Policy { fit: Fit::Pack, ..policy }, &hosts);
        let sizes = requests.iter().map(|request| ((request.spec.vcpus, request.spec.reserved_memory_mib()), 1));
        let capacities = hosts.iter().map(|host| ((host.vcpus_capacity(), host.memory_mib_capacity()), 1));
        let worth = Worth::learn(sizes, capacities).map(Arc::new);
        engine.price(worth.as_ref());
        agrees(&engine, &hosts, &requests)?;
    }
}
