//! What holds for every request and every set of hosts, however odd.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use dalgu_proto::{
    host::{GuestFeature, HugePages, NumaNode, PciDevice, Uplink},
    ids::VmName,
    placement::{self as wanted, Group, Taint, Toleration},
    vm::{CpuPolicy, Device, Fitting, Nic, NumaPlace, NumaPolicy, PageSize, Plug, Spec},
};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{select, subsequence},
};

use super::{tests::disk, *};

pub(super) fn request() -> impl Strategy<Value = Request> {
    let vm = (
        1..12_u32,
        32..6000_u64,
        vec((0..3_usize, 1..4000_u64), 0..4),
        vec(0..3_usize, 0..3),
        any::<bool>(),
    );
    let host = || option::weighted(0.2, (1..9_u32).prop_map(host_name));
    let particular = (
        option::weighted(0.3, fitting()),
        option::weighted(0.2, 1..2000_u32),
        option::weighted(0.2, 1..4_u32),
    );
    (vm, host(), host(), any::<bool>(), rules(), particular).prop_map(
        |((vcpus, memory_mib, disks, nics, picky), host, exclude, kvm, rules, (fitting, mbit, gpus))| {
            // Other ones are no specifications.
            let fitting = fitting.unwrap_or_default();
            let parts = fitting.nodes().max(1);
            let whole = u64::from(parts) * fitting.pages.map_or(1, PageSize::mib);
            let mut spec = Spec {
                vcpus: vcpus.next_multiple_of(parts),
                memory_mib: memory_mib.next_multiple_of(whole),
                fitting,
                devices: gpus.map(|gpus| ("gpu".to_owned(), gpus)).into_iter().collect(),
                ..tests::spec()
            };
            spec.disks = disks
                .iter()
                .enumerate()
                .map(|(index, (pool, size))| disk(&format!("d{index}"), POOLS[*pool], *size))
                .collect();
            let nic = |bridge: &usize| Nic {
                name: "n".into(),
                plug: Plug::Bridge {
                    bridge: BRIDGES[*bridge].into(),
                },
                mac: String::new(),
                reserved_mbit: mbit,
            };
            spec.nics = nics.iter().map(nic).collect();
            if picky {
                spec.host_selector.insert("rack".into(), "a".into());
            }
            let accelerator = exclude
                .is_some()
                .then(|| if kvm { "kvm" } else { "tcg" }.to_owned());
            Request {
                spec,
                host,
                exclude,
                accelerator,
                needs: Needs::default(),
                rules,
                ignore_protection: false,
            }
        },
    )
}

/// What a VM asks of processors, pages and nodes; sizes are any, as the placement of odd ones must be right too.
pub(super) fn fitting() -> impl Strategy<Value = Fitting> {
    let pages = option::weighted(0.3, select(vec![PageSize::Mib2, PageSize::Gib1]));
    let numa = select(vec![NumaPolicy::None, NumaPolicy::Pack, NumaPolicy::Spread(2)]);
    (any::<bool>(), pages, numa).prop_map(|(dedicated, pages, numa)| Fitting {
        cpus: if dedicated {
            CpuPolicy::Dedicated
        } else {
            CpuPolicy::Shared
        },
        pages,
        numa,
    })
}

/// Nodes of equal parts, of which so much is in huge pages of either size; some processors and of three devices are taken, and a bridge has
/// an uplink.
pub(super) fn parts(
    cpus: u32,
    memory_mib: u64,
    nodes: u32,
    huge_mib: u64,
    taken: u32,
    mbit: u64,
) -> Parts<'static> {
    let each = cpus / nodes;
    let pages = |pages: PageSize| HugePages {
        page_size_bytes: pages.kib() << 10,
        total: huge_mib / u64::from(nodes) / pages.mib(),
        free: 0,
    };
    let node = |id: u32| NumaNode {
        id,
        cpus: (id * each..(id + 1) * each).collect(),
        memory_bytes: (memory_mib / u64::from(nodes)) << 20,
        huge_pages: vec![pages(PageSize::Mib2), pages(PageSize::Gib1)],
        ..NumaNode::default()
    };
    let mut held = Taken::default();
    let own = Spec {
        fitting: Fitting {
            cpus: CpuPolicy::Dedicated,
            pages: Some(PageSize::Mib2),
            numa: NumaPolicy::None,
        },
        memory_mib: 0,
        ..tests::spec()
    };
    let place = NumaPlace {
        node: 0,
        cpus: (0..each.min(taken)).collect(),
    };
    if !place.cpus.is_empty() {
        held.change(&own, &[place], true);
    }
    let device = |bus: u32| PciDevice {
        class: "gpu".into(),
        address: format!("0000:{bus:02x}:00.0").parse().unwrap(),
        model: String::new(),
        numa_node: Some(bus % 2),
        iommu_group: None,
        problem: (bus == 3).then(String::new),
    };
    let gpu = |bus: u32| Device {
        class: "gpu".into(),
        address: device(bus).address,
    };
    let given: Vec<_> = (0..taken % 4).map(gpu).collect();
    held.change_devices(&given, true);
    Parts {
        devices: (0..4).map(device).collect(),
        nodes: (0..nodes).map(node).collect(),
        uplinks: vec![Uplink {
            bridge: "br0".into(),
            mbit_per_second: mbit,
        }]
        .into(),
        taken: Cow::Owned(held),
    }
}

/// Groups with members in racks and on hosts, and tolerations; of most requests none.
pub(super) fn rules() -> impl Strategy<Value = Rules> {
    let domains = || {
        let domain = || (0..4_usize, 1..3_u32);
        vec(domain(), 0..4)
    };
    let group = (any::<bool>(), any::<bool>(), any::<bool>(), domains(), 0..2_u32);
    let members = |(index, (apart, preferred, by_rack, domains, more)): (usize, GroupNumbers)| {
        let vm: VmName = format!("vm{index}").parse().unwrap();
        let named = |(number, vms): &(usize, u32)| {
            let domain = match by_rack {
                true => ["a", "b", "c", "d"][*number].to_owned(),
                false => format!("h{}", number * 2 + 1),
            };
            (
                domain,
                Held {
                    vms: *vms,
                    first: vm.clone(),
                },
            )
        };
        let domains: BTreeMap<_, _> = domains.iter().map(named).collect();
        let others = domains.values().map(|held| held.vms).sum::<u32>() + more;
        Members {
            group: Group {
                name: format!("g{index}").parse().unwrap(),
                rule: if apart {
                    wanted::Rule::AntiAffinity
                } else {
                    wanted::Rule::Affinity
                },
                preferred,
                topology_key: by_rack.then(|| "rack".to_owned()),
            },
            first: (others > 0).then(|| vm.clone()),
            domains,
            others,
        }
    };
    let tolerated = option::weighted(0.3, option::of(select(vec!["db".to_owned(), "web".to_owned()])));
    let some = (vec(group, 0..3), tolerated).prop_map(move |(groups, tolerated)| Rules {
        groups: groups.into_iter().enumerate().map(members).collect(),
        tolerations: tolerated
            .map(|value| Toleration {
                key: "use".into(),
                value,
            })
            .into_iter()
            .collect(),
    });
    option::weighted(0.4, some).prop_map(Option::unwrap_or_default)
}

/// Whether a group keeps apart, whether it is preferred, whether it goes by racks, its members, and how many more there are elsewhere.
type GroupNumbers = (bool, bool, bool, Vec<(usize, u32)>, u32);

/// Taints of a host: of most none.
pub(super) fn taints() -> impl Strategy<Value = BTreeSet<Taint>> {
    let taint = (any::<bool>(), any::<bool>()).prop_map(|(soft, db)| Taint {
        key: "use".into(),
        value: if db { "db" } else { "web" }.into(),
        soft,
    });
    option::weighted(0.15, taint).prop_map(|taint| taint.into_iter().collect())
}

const POOLS: [&str; 3] = ["local", "fast", "nfs"];
const BRIDGES: [&str; 3] = ["br0", "br1", "br2"];

pub(super) fn host_name(number: u32) -> HostName {
    format!("h{number}").parse().unwrap()
}

/// Size, room, what is promised, whether it is broken, and how far it is filled.
type Numbers = (u64, u64, u64, bool, (u64, u64));

pub(super) fn pools() -> impl Strategy<Value = Vec<PoolView<'static>>> {
    let policy = (80..=100_u64, prop::sample::select(vec![100_u64, 100, 150]));
    let pool = (
        0..6000_u64,
        0..6000_u64,
        0..6000_u64,
        prop::bool::weighted(0.1),
        policy,
    );
    vec(pool, 0..4).prop_map(|pools| {
        let view = |(name, numbers): (&&str, &Numbers)| {
            let (capacity_mib, available_mib, reserved_mib, broken, (full, overcommit)) = numbers;
            PoolView {
                name: (*name).to_owned().into(),
                shared: *name == "nfs",
                error: broken.then(|| "stale handle".into()),
                capacity_mib: *capacity_mib,
                available_mib: *available_mib,
                used_mib: capacity_mib.saturating_sub(*available_mib),
                reserved_mib: *reserved_mib,
                policy: PoolPolicy {
                    full_percent: *full,
                    overcommit_percent: *overcommit,
                    ..PoolPolicy::default()
                },
            }
        };
        POOLS.iter().zip(&pools).map(view).collect()
    })
}

fn usage() -> impl Strategy<Value = Option<UsageView>> {
    let values = (
        (
            option::of(0.0..16.0),
            option::of(0.0..16.0),
            option::of((0.0..16.0, 0.0..4.0)),
        ),
        0.0..20.0,
        0..8_u64 << 30,
        0.0..100.0,
        0.0..30.0,
        0.0..1.0,
    );
    option::of(values.prop_map(
        |(
            (cpus_busy, cpus_expected, hour),
            load1,
            memory_available_bytes,
            cpu,
            memory,
            network_utilisation,
        )| {
            let stall = |avg10_percent: f64| StallView {
                avg10_percent,
                avg60_percent: avg10_percent / 2.0,
            };
            UsageView {
                cpus_busy,
                cpus_expected,
                lately: hour.map(|(cpus_busy, cpus_stolen)| Lately {
                    cpus_busy,
                    cpus_stolen,
                }),
                load1,
                memory_available_bytes,
                cpu_stall: stall(cpu),
                memory_stall: stall(memory),
                io_stall: StallView::default(),
                network_utilisation,
            }
        },
    ))
}

pub(super) fn hosts() -> impl Strategy<Value = Vec<HostView<'static>>> {
    let flags = (
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
        0..3_usize,
        prop::bool::weighted(0.8),
        0..4_usize,
    );
    let sizes = (
        0..16_u32,
        select(vec![0.1, 0.5, 1.0, 4.0]),
        0..12_000_u64,
        0..2000_u64,
    );
    let used = (0..24_u32, 0..10_000_u64, 0..9_u32, 0..3_u32, 0..2000_u64);
    let few = (
        1..4_u32,
        0..8192_u64,
        0..6_u32,
        0..3000_u64,
        option::weighted(0.2, 0..12_u32),
    );
    vec((flags, sizes, used, pools(), usage(), taints(), few), 0..6).prop_map(|hosts| {
        hosts
            .into_iter()
            .zip(1..)
            .map(
                |((flags, sizes, used, pools, usage, taints, few), number)| HostView {
                    parts: parts(sizes.0, sizes.2, few.0, few.1, few.2, few.3),
                    vms_most: few.4,
                    name: host_name(number),
                    ready: flags.0,
                    cordoned: flags.1,
                    pressed: used.3 == 2,
                    labels: Cow::Owned(
                        ["a", "b"]
                            .get(flags.2)
                            .map(|rack| ("rack".to_owned(), (*rack).to_owned()))
                            .into_iter()
                            .collect(),
                    ),
                    taints: Cow::Owned(taints),
                    accelerator: if flags.3 { "kvm" } else { "tcg" }.into(),
                    guest_features: [GuestFeature::Numa, GuestFeature::PciDevice]
                        .into_iter()
                        .filter(|_| flags.4 != 3)
                        .collect(),
                    bridges: BRIDGES
                        .iter()
                        .take(flags.4)
                        .map(|name| (*name).to_owned())
                        .collect(),
                    cpus: sizes.0,
                    cpu_overcommit_ratio: sizes.1,
                    own_cpu_overcommit_ratio: sizes.1,
                    adapted: used.2 % 2 == 1,
                    memory_mib: sizes.2,
                    reserved_memory_mib: sizes.3,
                    vcpus_reserved: used.0,
                    memory_mib_reserved: used.1,
                    vms: used.2,
                    unmanaged_vcpus: used.3,
                    unmanaged_memory_mib: used.4,
                    pools,
                    usage,
                    ..tests::host("h1")
                },
            )
            .map(peopled)
            .collect()
    })
}

pub(super) fn policy() -> impl Strategy<Value = Policy> {
    let named = select(vec![Policy::SPREAD, Policy::PACK, Policy::BALANCED]);
    let own = (select(vec![Fit::Spread, Fit::Pack]), order());
    prop_oneof![named, own.prop_map(|(fit, order)| Policy { fit, order })]
}

/// Any order that a configuration may have.
fn order() -> impl Strategy<Value = Order> {
    let some = subsequence(Term::ALL.to_vec(), 0..=Term::ALL.len()).prop_shuffle();
    (some, any::<prop::sample::Index>()).prop_map(|(mut terms, at)| {
        let place = |terms: &[Term], wanted| terms.iter().position(|term| *term == wanted);
        let reserved = place(&terms, Term::Reserved).unwrap_or_else(|| {
            let at = at.index(terms.len() + 1);
            terms.insert(at, Term::Reserved);
            at
        });
        if let Some(against) = place(&terms, Term::AgainstPreferences).filter(|at| *at > reserved) {
            terms.swap(against, reserved);
        }
        if let Some(at) = place(&terms, Term::ImagesMissing) {
            let images = terms.remove(at);
            terms.push(images);
        }
        Order::try_from(terms).unwrap()
    })
}

/// So many cases, or as many as `PROPTEST_CASES` says: `make properties` tries 100,000.
pub(crate) fn cases(usual: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(usual),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// What is protected: nothing, hosts, racks.
pub(super) fn protect() -> impl Strategy<Value = Protect> {
    let marks: [&[&str]; 5] = [&[], &["host"], &["rack"], &["host", "rack"], &["rack=a"]];
    select(marks.to_vec()).prop_map(|marks| {
        let marks: Vec<_> = marks.iter().map(|mark| (*mark).to_owned()).collect();
        Protect::try_from(marks).unwrap()
    })
}

/// A host on which two VMs hold what is reserved.
pub(super) fn peopled(mut host: HostView<'static>) -> HostView<'static> {
    let (vcpus, memory_mib) = (host.vcpus_reserved / 3, host.memory_mib_reserved / 2);
    let first = Size { vcpus, memory_mib };
    let second = Size {
        vcpus: host.vcpus_reserved - vcpus,
        memory_mib: host.memory_mib_reserved - memory_mib,
    };
    host.vm_sizes = vec![(first, 1), (second, 1)];
    host.vm_sizes.retain(|(size, _)| *size != Size::default());
    host
}

/// Whether a host holds no more than it has, reckoned without the code under test. What was there before the first VM
/// may already be too much: a host is only judged when something was put on it.
fn holds(host: &HostView) -> bool {
    let vcpus = f64::from(host.vcpus_reserved) + f64::from(host.unmanaged_vcpus);
    let memory = host.memory_mib_reserved + host.unmanaged_memory_mib + host.reserved_memory_mib;
    vcpus <= f64::from(host.cpus) * host.cpu_overcommit_ratio + 1e-6 && memory <= host.memory_mib
}

/// Whether what is fitted has what it asks for, on nodes that have it, and nobody else has the same: reckoned from the places alone.
fn is_fitted(spec: &Spec, places: &[NumaPlace], before: &HostView) -> bool {
    let (fitting, nodes) = (spec.fitting, &before.parts.nodes);
    if fitting.is_none() {
        return places.is_empty();
    }
    let cpus: Vec<u32> = places.iter().flat_map(|place| place.cpus.clone()).collect();
    let distinct: BTreeSet<_> = cpus.iter().collect();
    let on_node = |place: &NumaPlace| {
        let node = nodes.iter().find(|node| node.id == place.node);
        node.is_some_and(|node| place.cpus.iter().all(|cpu| node.cpus.contains(cpu)))
    };
    let asked = usize::try_from(fitting.nodes()).unwrap();
    let ids: BTreeSet<_> = places.iter().map(|place| place.node).collect();
    let each = spec.vcpus.div_ceil(fitting.nodes());
    places.len() == asked
        && ids.len() == asked
        && places.iter().all(on_node)
        && distinct.len() == cpus.len()
        && !before.parts.taken.cpus().any(|cpu| cpus.contains(&cpu))
        && match fitting.is_dedicated() {
            true => places
                .iter()
                .all(|place| place.cpus.len() == usize::try_from(each).unwrap()),
            false => cpus.is_empty(),
        }
}

/// Whether what is promised on each node is there; what is not fitted onto nodes aside.
fn nodes_hold(host: &HostView) -> bool {
    let taken = &host.parts.taken;
    host.parts.nodes.iter().all(|node| {
        let own = taken.cpus().filter(|cpu| node.cpus.contains(cpu)).count();
        let shared = f64::from(u32::try_from(node.cpus.len() - own).unwrap()) * host.cpu_overcommit_ratio;
        let pages = |pages: PageSize| {
            let bytes = pages.kib() << 10;
            let known = node
                .huge_pages
                .iter()
                .find(|known| known.page_size_bytes == bytes);
            taken.pages_mib(node.id, pages) <= known.map_or(0, |known| known.total * pages.mib())
        };
        f64::from(u32::try_from(taken.vcpus(node.id)).unwrap()) <= shared + 1e-6
            && taken.memory_mib(node.id) <= node.memory_bytes >> 20
            && pages(PageSize::Mib2)
            && pages(PageSize::Gib1)
    })
}

fn reserve(request: &Request, host: &mut HostView) {
    let before = host.clone();
    let places = fit(&request.spec, host);
    assert!(
        is_fitted(&request.spec, &places, &before),
        "{places:?} on {before:?}"
    );
    let devices = choose(&request.spec, &places, host);
    let distinct: BTreeSet<_> = devices.iter().map(|device| device.address).collect();
    assert_eq!(distinct.len(), devices.len());
    for device in &devices {
        let named = before.parts.devices.iter();
        let mut named = named.filter(|known| known.class == device.class && known.problem.is_none());
        assert!(named.any(|known| known.address == device.address));
        assert!(!before.parts.taken.has_device(device.address));
    }
    let asked: u32 = request.spec.devices.values().sum();
    assert_eq!(devices.len(), usize::try_from(asked).unwrap());
    host.reserve(&request.spec, &places);
    let held = |device: &Device| host.parts.taken.has_device(device.address);
    assert!(devices.iter().all(held));
    assert!(nodes_hold(host), "{host:?}");
    assert!(!request.spec.fitting.is_dedicated() || host.parts.taken.dedicated() < host.cpus);
    assert!(host.vms_most.is_none_or(|most| host.vms <= most));
    for (bridge, _) in request.spec.bandwidth() {
        let uplink = host
            .parts
            .uplinks
            .iter()
            .find(|uplink| uplink.bridge == bridge)
            .unwrap();
        assert!(host.parts.taken.mbit(bridge) <= uplink.mbit_per_second);
    }
    for disk in &request.spec.disks {
        let pool = host
            .pools
            .iter_mut()
            .find(|pool| pool.name == disk.pool)
            .expect("the pool was there");
        if !(request.is_migration() && pool.shared) {
            pool.reserved_mib += disk.size_mib;
        }
    }
}

proptest! {
    #![proptest_config(cases(10_000))]

    #[test]
    fn no_host_is_ever_overcommitted(requests in vec(request(), 1..12), mut hosts in hosts(), policy in policy()) {
        for request in requests {
            let decision = decide(&request, &hosts, &policy);
            let Some(chosen) = decision.host else { continue };
            prop_assert!(request.host.as_ref().is_none_or(|wanted| *wanted == chosen));
            prop_assert_ne!(request.exclude.as_ref(), Some(&chosen));
            let host = hosts.iter_mut().find(|host| host.name == chosen).unwrap();
            prop_assert!(host.ready && !host.cordoned && !host.pressed && request.spec.vcpus <= host.cpus);
            reserve(&request, host);
            prop_assert!(holds(host), "over-committed: {host:?}");
            for pool in &host.pools {
                let used = request.spec.disks.iter().any(|disk| disk.pool == pool.name);
                let stays = request.is_migration() && pool.shared;
                prop_assert!(!used || stays || pool.reserved_mib <= pool.promisable_mib());
            }
        }
    }

    #[test]
    fn the_order_of_the_hosts_does_not_matter(request in request(), hosts in hosts(), policy in policy(), protect in protect(), turn in 0..6_usize) {
        let mut turned = hosts.clone();
        let by = turn % turned.len().max(1);
        turned.rotate_left(by);
        turned.reverse();
        prop_assert_eq!(decide(&request, &hosts, Rule { protect: Some(&protect), ..Rule::from(&policy) }), decide(&request, &turned, Rule { protect: Some(&protect), ..Rule::from(&policy) }));
    }

    #[test]
    fn every_host_gets_exactly_one_verdict_and_ranks_have_no_gaps(request in request(), hosts in hosts(), policy in policy(), protect in protect()) {
        let decision = decide(&request, &hosts, Rule { protect: Some(&protect), ..Rule::from(&policy) });
        let named: BTreeSet<_> = decision.verdicts.iter().map(|verdict| &verdict.host).collect();
        prop_assert_eq!(decision.verdicts.len(), hosts.len());
        prop_assert_eq!(named.len(), hosts.len());
        let fitting = decision.verdicts.iter().take_while(|verdict| verdict.fits).count();
        for (index, verdict) in decision.verdicts.iter().enumerate() {
            let rank = if index < fitting { u32::try_from(index).unwrap() + 1 } else { 0 };
            prop_assert_eq!(verdict.rank, rank);
            prop_assert_eq!(verdict.fits, verdict.shortfalls.is_empty());
            prop_assert_eq!(verdict.fits, !verdict.score.is_empty());
        }
        prop_assert_eq!(decision.host.as_ref(), decision.verdicts.iter().find(|verdict| verdict.rank == 1).map(|v| &v.host));
        prop_assert_eq!(decision.host.is_none(), decision.hint.is_some());
    }

    #[test]
    fn doing_what_the_hint_says_makes_it_fit(request in request(), hosts in hosts(), policy in policy(), protect in protect()) {
        let Some(hint) = decide(&request, &hosts, Rule { protect: Some(&protect), ..Rule::from(&policy) }).hint else { return Ok(()) };
        for changes in [&hint.changes, &hint.alternative] {
            if changes.is_empty() {
                continue;
            }
            let (mut changed, mut there) = (request.clone(), hosts.clone());
            for change in changes {
                change.apply(&mut changed, &mut there);
            }
            let after = decide(&changed, &there, Rule { protect: Some(&protect), ..Rule::from(&policy) });
            prop_assert!(after.host.is_some(), "{} did not help: {}", hint.text, after.summary);
            prop_assert!(changed.spec.vcpus > 0 && changed.spec.memory_mib >= 32);
        }
        prop_assert!(!hint.changes.is_empty() && !hint.text.is_empty());
    }

    #[test]
    fn no_smaller_amount_than_the_hint_says_would_do(request in request(), hosts in hosts(), policy in policy(), protect in protect()) {
        let decision = decide(&request, &hosts, Rule { protect: Some(&protect), ..Rule::from(&policy) });
        let Some(hint) = decision.hint else { return Ok(()) };
        // Of a host that only what is kept for others holds back no smaller VM is looked for.
        let is_kept = |verdict: &&Verdict| verdict.shortfalls.iter().all(|lack| lack.constraint == Constraint::Protection);
        let kept: Vec<_> = decision.verdicts.iter().filter(is_kept).map(|verdict| &verdict.host).collect();
        for changes in [&hint.changes, &hint.alternative] {
            let [change] = changes.as_slice() else { continue };
            let asks_less = matches!(change, Change::AskVcpus { .. } | Change::AskMemory { .. } | Change::AskStorage { .. } | Change::AskBandwidth { .. });
            let Some(less) = a_little_less(change) else { continue };
            let (mut changed, mut there) = (request.clone(), hosts.clone());
            less.apply(&mut changed, &mut there);
            let found = decide(&changed, &there, Rule { protect: Some(&protect), ..Rule::from(&policy) }).host;
            let is_known = found.as_ref().is_none_or(|host| asks_less && kept.contains(&host));
            prop_assert!(is_known, "{} was more than needed: {found:?}", hint.text);
        }
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn parts_of_a_score_are_compared_in_their_order_and_no_order_changes_their_values(
        request in request(), hosts in hosts(), policy in policy(),
    ) {
        // It has all parts.
        let all = decide(&request, &hosts, &Policy { order: Policy::BALANCED.order, ..policy });
        let decision = decide(&request, &hosts, &policy);
        let mut before: Option<(Vec<f64>, &HostName)> = None;
        for verdict in decision.verdicts.iter().filter(|verdict| verdict.fits) {
            let known = all.verdicts.iter().find(|known| known.host == verdict.host).unwrap();
            let wanted = policy.order.terms().flat_map(|term| {
                let names = match (term, policy.fit) {
                    (Term::Reserved, Fit::Spread) => vec!["reserved_percent", "reserved_of_other_percent"],
                    (Term::Reserved, Fit::Pack) => vec!["waste_percent", "worth_lost_percent"],
                    (term, _) => vec![term.as_str()],
                };
                names.into_iter().map(|name| known.score.iter().find(|part| part.name == name).unwrap().clone())
            });
            prop_assert_eq!(&verdict.score, &wanted.collect::<Vec<_>>());
            let score = (verdict.score.iter().map(|part| part.value).collect(), &verdict.host);
            prop_assert!(before.is_none_or(|before| before < score));
            before = Some(score);
        }
    }
}

/// The same change by one unit less, where it has an amount.
fn a_little_less(change: &Change) -> Option<Change> {
    let mut less = change.clone();
    match &mut less {
        Change::FreeVcpus { vcpus, .. } => *vcpus -= 1,
        Change::FreeMemory { mib, .. } | Change::FreeStorage { mib, .. } => *mib -= 1,
        Change::FreeVms { vms, .. } => *vms -= 1,
        Change::FreeBandwidth { mbit, .. } => *mbit -= 1,
        Change::AskBandwidth { at_most_mbit, .. } => *at_most_mbit += 1,
        Change::AskVcpus { at_most } => *at_most += 1,
        Change::AskMemory { at_most_mib } | Change::AskStorage { at_most_mib, .. } => *at_most_mib += 1,
        _ => return None,
    }
    Some(less)
}
