//! The account against a judge that tries every way to place the VMs of a domain that fails.

use std::{borrow::Cow, collections::BTreeSet};

use dalgu_proto::{placement::Taint, vm::Spec};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::placement::{
    Decision, Policy, Rule, decide,
    properties::{cases, host_name, policy},
    tests,
};

fn size(vcpus: u32, memory_mib: u64) -> Size {
    Size { vcpus, memory_mib }
}

/// Whether there is any way to place VMs where so much is free.
fn fit(free: &mut Vec<Size>, vms: &[Size]) -> bool {
    let Some((vm, rest)) = vms.split_first() else {
        return true;
    };
    let mut tried = BTreeSet::new();
    (0..free.len()).any(|host| {
        let before = free[host];
        let Some(after) = before.checked_less(*vm).filter(|_| tried.insert(before)) else {
            return false;
        };
        free[host] = after;
        let found = fit(free, rest);
        free[host] = before;
        found
    })
}

/// Whether a domain's VMs of one field find room, by trying.
fn can_fail(rows: &[Row], field: &str, domain: &str) -> bool {
    let of = |row: &&Row| row.domains.iter().any(|other| other == domain);
    let here = || rows.iter().filter(|row| row.field == field);
    let mut free: Vec<_> = here().filter(|row| !of(row)).map(Row::free).collect();
    let sized = here().filter(of).flat_map(|row| &row.vms);
    let mut vms: Vec<_> = sized
        .flat_map(|(vm, count)| std::iter::repeat_n(*vm, *count as usize))
        .collect();
    vms.sort_unstable_by_key(|vm| std::cmp::Reverse((vm.memory_mib, vm.vcpus)));
    fit(&mut free, &vms)
}

/// Every field and domain.
fn domains(rows: &[Row]) -> BTreeSet<(String, String)> {
    let domains = rows.iter().flat_map(|row| {
        row.domains
            .iter()
            .map(|domain| (row.field.clone(), domain.clone()))
    });
    domains.collect()
}

/// Those that can fail, by trying.
fn sound(rows: &[Row]) -> BTreeSet<(String, String)> {
    let all = domains(rows).into_iter();
    all.filter(|(field, domain)| can_fail(rows, field, domain))
        .collect()
}

fn row(vms: &[(Size, u32)], takes: bool, tainted: bool, rack: usize, host: usize) -> Row {
    let mut row = Row {
        capacity: [size(8, 16), size(16, 16), size(8, 40)][host % 3],
        takes,
        field: if tainted { "use=db " } else { "" }.to_owned(),
        domains: vec![format!("host {host}"), format!("rack {rack}")],
        ..Row::default()
    };
    for (vm, count) in vms {
        (0..*count).for_each(|_| row.put(*vm));
    }
    row
}

fn vm() -> impl Strategy<Value = Size> {
    let small = (1..4_u32, 1..6_u64);
    let any = (1..10_u32, 1..20_u64);
    prop_oneof![4 => small, 1 => any].prop_map(|(vcpus, memory)| size(vcpus, memory))
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    let host = (
        vec((vm(), 1..3_u32), 0..3),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.15),
        0..3_usize,
    );
    vec(host, 1..7).prop_map(|hosts| {
        let hosts = hosts.iter().enumerate();
        hosts
            .map(|(host, (vms, takes, tainted, rack))| row(vms, *takes, *tainted, *rack, host))
            .collect()
    })
}

/// A VM that comes, grows or moves.
fn step(rows: &[Row], (kind, vm, from, to): (u32, Size, usize, usize)) -> Option<Step> {
    let to = to % rows.len();
    let leaves = match kind {
        0 | 1 => None,
        2 => Some(to),
        _ => Some(from % rows.len()),
    };
    let leaves = match leaves {
        None => None,
        Some(slot) => Some((slot, rows[slot].vms.first()?.0)),
    };
    let comes = match leaves {
        Some((slot, left)) if slot == to => size(left.vcpus + vm.vcpus, left.memory_mib + vm.memory_mib),
        Some((_, left)) => left,
        None => vm,
    };
    Some(Step {
        leaves,
        comes: (to, comes),
    })
}

fn after(rows: &[Row], step: Step) -> Vec<Row> {
    let mut rows = rows.to_vec();
    if let Some((slot, vm)) = step.leaves {
        rows[slot].take(vm);
    }
    rows[step.comes.0].put(step.comes.1);
    rows
}

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn a_domain_that_is_said_to_be_kept_can_fail(rows in rows()) {
        let spare = Spare::new(rows.clone());
        let short: Vec<_> = spare.short_domains().map(|short| short.domain.to_owned()).collect();
        let sound = sound(&rows);
        for (field, domain) in domains(&rows) {
            prop_assert!(short.contains(&domain) || sound.contains(&(field, domain.clone())), "{domain}");
        }
        prop_assert_eq!(spare.keeps(), short.is_empty());
        prop_assert!(spare.short_domains().all(|short| short.lacking != Size::default()));
    }

    #[test]
    fn no_step_that_is_allowed_makes_a_domain_unable_to_fail(
        rows in rows(), asked in (0..4_u32, vm(), 0..6_usize, 0..6_usize),
    ) {
        let Some(step) = step(&rows, asked) else { return Ok(()) };
        let spare = Spare::new(rows.clone());
        let moves = step.leaves.filter(|(slot, _)| *slot != step.comes.0);
        let fits = rows[step.comes.0].takes && after(&rows, step)[step.comes.0].reserved <= rows[step.comes.0].capacity;
        if !fits || !spare.allows(step) {
            return Ok(());
        }
        let then = sound(&after(&rows, step));
        let short: Vec<_> = spare.short_domains().map(|short| short.domain.to_owned()).collect();
        for (field, domain) in sound(&rows) {
            let told = moves.is_none() || !short.contains(&domain);
            prop_assert!(!told || then.contains(&(field, domain.clone())), "{domain} after {step:?}");
        }
    }

    #[test]
    fn it_does_not_matter_how_the_account_came_about(
        before in rows(), after in rows(), asked in (0..4_u32, vm(), 0..6_usize, 0..6_usize),
    ) {
        let mut spare = Spare::new(before.clone());
        for (slot, row) in after.iter().enumerate() {
            let (vms, mut empty) = (row.vms.clone(), row.clone());
            (empty.vms, empty.reserved) = Default::default();
            spare.set(slot, empty);
            spare.update(slot, |row| vms.iter().for_each(|(vm, count)| (0..*count).for_each(|_| row.put(*vm))));
        }
        (after.len()..before.len()).rev().for_each(|slot| spare.swap_remove(slot));
        let anew = Spare::new(after.clone());
        prop_assert_eq!(spare.image(), anew.image());
        if let Some(step) = step(&after, asked) {
            prop_assert_eq!(spare.allows(step), anew.allows(step));
            prop_assert_eq!(anew.allows(step), anew.check(step).is_ok());
        }
    }
}

/// Placement on small sites, step by step from the empty one.
mod sites {
    use super::*;
    use crate::placement::HostView;

    fn site() -> impl Strategy<Value = Vec<HostView<'static>>> {
        let host = (0..3_usize, 0..3_usize, prop::bool::weighted(0.1));
        vec(host, 2..6).prop_map(|hosts| {
            let view = |(number, (size, rack, tainted)): (u32, (usize, usize, bool))| {
                let mut host = tests::host("h1");
                host.name = host_name(number);
                (host.cpus, host.memory_mib) = [(4, 9_000), (8, 9_000), (4, 17_000)][size];
                (host.cpu_overcommit_ratio, host.own_cpu_overcommit_ratio) = (1.0, 1.0);
                host.labels = Cow::Owned(BTreeMap::from([("rack".into(), ["a", "b", "c"][rack].into())]));
                let taint = tainted.then(|| Taint {
                    key: "use".into(),
                    value: "db".into(),
                    soft: false,
                });
                host.taints = Cow::Owned(taint.into_iter().collect());
                host
            };
            (1..).zip(hosts).map(view).collect()
        })
    }

    pub(super) fn put(host: &mut HostView<'_>, vm: Size) {
        host.vcpus_reserved += vm.vcpus;
        host.memory_mib_reserved += vm.memory_mib;
        host.vm_sizes.push((vm, 1));
    }

    fn take(host: &mut HostView<'_>, vm: Size) {
        host.vcpus_reserved -= vm.vcpus;
        host.memory_mib_reserved -= vm.memory_mib;
        let at = host.vm_sizes.iter().position(|(size, _)| *size == vm).unwrap();
        host.vm_sizes.swap_remove(at);
    }

    fn request(vcpus: u32, gib: u64) -> Request {
        let spec = Spec {
            vcpus,
            memory_mib: gib * 1024,
            ..tests::spec()
        };
        Request::new(spec)
    }

    /// What is asked, and the host that it is about.
    type Asked = (u32, u32, u64, usize);

    fn asked(hosts: &[HostView<'_>], (kind, vcpus, gib, at): Asked) -> Option<Request> {
        let source = &hosts[at % hosts.len()];
        match kind {
            0..6 => Some(request(vcpus, gib)),
            _ => {
                // Its memory is said with QEMU's overhead on top.
                let (vm, _) = *source.vm_sizes.first()?;
                let fitting = |gib: &u64| Size::of(&request(vm.vcpus, *gib)) == vm;
                let gib = (1..8).find(fitting)?;
                let spec = request(vm.vcpus, gib).spec;
                Some(Request::migration(spec, source.name.clone(), "kvm"))
            }
        }
    }

    fn check(hosts: &[HostView<'_>], protect: &Protect) -> Result<(), TestCaseError> {
        let rows: Vec<_> = hosts.iter().map(|host| Row::of(host, protect)).collect();
        for (field, domain) in domains(&rows) {
            prop_assert!(
                can_fail(&rows, &field, &domain),
                "{domain} may not fail: {rows:?}"
            );
        }
        Ok(())
    }

    fn decided(request: &Request, hosts: &[HostView<'_>], policy: Policy, protect: &Protect) -> Decision {
        let rule = Rule {
            protect: Some(protect),
            ..Rule::from(&policy)
        };
        decide(request, hosts, rule)
    }

    proptest! {
        #![proptest_config(cases(2000))]

        #[test]
        fn whatever_is_accepted_any_one_protected_domain_can_fail(
            mut hosts in site(),
            events in vec((0..8_u32, 1..4_u32, 1..5_u64, 0..6_usize), 1..14),
            marks in select(vec![vec!["host"], vec!["rack"], vec!["host", "rack"], vec!["rack=a"]]),
            policy in policy(),
        ) {
            let protect = Protect::try_from(marks.into_iter().map(str::to_owned).collect::<Vec<_>>()).unwrap();
            for event in events {
                let Some(request) = asked(&hosts, event) else { continue };
                let vm = Size::of(&request);
                let decision = decided(&request, &hosts, policy, &protect);
                prop_assert_eq!(&decision, &decided(&request, &hosts, policy, &protect), "same input, same output");
                let Some(chosen) = decision.host else {
                    let lacks = decision.verdicts.iter().flat_map(|verdict| &verdict.shortfalls);
                    let kept = lacks.clone().any(|lack| lack.constraint.as_str() == "PROTECTION");
                    prop_assert!(lacks.clone().all(|lack| lack.constraint.as_str() != "PROTECTION" || lack.needed > 0));
                    let free = decided(&request.clone().ignoring_protection(true), &hosts, policy, &protect);
                    prop_assert_eq!(kept, free.host.is_some(), "{}", decision.summary);
                    continue;
                };
                if let Some(source) = &request.exclude {
                    take(hosts.iter_mut().find(|host| host.name == *source).unwrap(), vm);
                }
                put(hosts.iter_mut().find(|host| host.name == chosen).unwrap(), vm);
                check(&hosts, &protect)?;
            }
        }
    }
}

#[test]
fn a_ratio_that_load_has_lowered_takes_no_kept_room_away_and_a_raised_one_adds_some() {
    let mut hosts = ["h1", "h2"].map(tests::host);
    for host in &mut hosts {
        sites::put(host, size(16, 1024));
    }
    let keeps = |hosts: &[HostView<'_>]| Spare::of(hosts, &Protect::hosts()).keeps();
    assert!(keeps(&hosts), "32 processors each");
    for host in &mut hosts {
        (host.cpu_overcommit_ratio, host.adapted) = (2.0, true);
    }
    assert_eq!(hosts[0].vcpus_free(), 0);
    assert!(keeps(&hosts), "lowered");
    for host in &mut hosts {
        sites::put(host, size(1, 128));
    }
    assert!(!keeps(&hosts), "nor more than the operator's");
    for host in &mut hosts {
        host.cpu_overcommit_ratio = 5.0;
    }
    assert!(keeps(&hosts), "raised");
}

#[test]
fn three_hosts_for_four_vms_each_take_eight_and_the_ninth_is_told_what_is_lacking() {
    let spec = Spec {
        vcpus: 2,
        memory_mib: 1024,
        ..tests::spec()
    };
    let request = crate::placement::Request::new(spec);
    let mut hosts: Vec<_> = ["h1", "h2", "h3"].map(tests::host).into();
    for host in &mut hosts {
        (host.cpu_overcommit_ratio, host.own_cpu_overcommit_ratio) = (1.0, 1.0);
    }
    for policy in [Policy::SPREAD, Policy::PACK] {
        let mut hosts = hosts.clone();
        let protect = Protect::hosts();
        let rule = Rule {
            protect: Some(&protect),
            ..Rule::from(&policy)
        };
        for _ in 0..8 {
            let chosen = decide(&request, &hosts, rule).host.expect("there is room");
            let host = hosts.iter_mut().find(|host| host.name == chosen).unwrap();
            sites::put(host, Size::of(&request));
        }
        let refused = decide(&request, &hosts, rule);
        assert_eq!(refused.host, None);
        let lacks: Vec<_> = refused
            .verdicts
            .iter()
            .flat_map(|verdict| &verdict.shortfalls)
            .collect();
        let told = lacks
            .iter()
            .filter(|lack| lack.constraint.as_str() == "PROTECTION");
        assert!(told.clone().count() > 0, "{policy:?}: {}", refused.summary);
        let mib = Size::of(&request).memory_mib;
        for lack in told {
            let expected =
                format!("to fail then, 2 vCPUs and {mib} MiB of its VMs would find no room elsewhere");
            assert!(
                lack.message.starts_with("were host h") && lack.message.ends_with(&expected),
                "{}",
                lack.message
            );
        }
        assert!(
            refused.hint.unwrap().text.contains("--ignore-protection"),
            "{policy:?}"
        );
    }
}

#[test]
fn a_vm_as_large_as_its_host_is_kept_by_an_empty_one_and_holds_nobody_up() {
    let giant = row(&[(size(8, 16), 1)], true, false, 0, 0);
    let empty = |host| row(&[], true, false, host, host * 3);
    let kept = Spare::new([giant.clone(), empty(1)]);
    assert!(kept.keeps());
    // Without one, nobody can be kept from coming for its sake, as long as the others are kept.
    let small = |host| row(&[(size(1, 2), 4)], true, false, host, host * 3);
    let spare = Spare::new([giant, small(1), small(2), small(3)]);
    let short: Vec<_> = spare.short_domains().map(|short| short.domain).collect();
    assert_eq!(short, ["host 0", "rack 0"]);
    let comes = |slot| Step {
        leaves: None,
        comes: (slot, size(1, 1)),
    };
    assert!(spare.allows(comes(1)));
}

#[test]
fn large_fields_go_by_the_account_and_it_leaves_little_unused() {
    // 1,000 hosts for 16 VMs each in 25 racks: 24 of 25 parts may be used.
    let vm = size(4, 16);
    let mut spare = Spare::new((0..1000).map(|host: usize| Row {
        capacity: size(64, 256),
        takes: true,
        domains: vec![format!("rack {}", host / 40)],
        ..Row::default()
    }));
    let mut made = 0;
    for slot in (0..1000).cycle() {
        let step = Step {
            leaves: None,
            comes: (slot, vm),
        };
        if !spare.allows(step) {
            break;
        }
        spare.update(slot, |row| row.put(vm));
        made += 1;
    }
    assert!((14_000..=15_360).contains(&made), "{made}");
}

#[test]
fn marks_name_hosts_labels_and_single_domains() {
    let protect =
        |marks: &[&str]| Protect::try_from(marks.iter().map(|mark| (*mark).to_owned()).collect::<Vec<_>>());
    let labels = BTreeMap::from([("rack".to_owned(), "r1".to_owned())]);
    let domains = |marks: &[&str]| protect(marks).unwrap().domains(&host_name(1), &labels);
    assert_eq!(domains(&["host", "rack"]), ["host h1", "rack r1"]);
    assert_eq!(domains(&["rack=r1", "rack=r2"]), ["rack r1"]);
    assert_eq!(
        domains(&["room", "host"]),
        ["host h1"],
        "one without the label fails by itself"
    );
    assert!(domains(&[]).is_empty());
    for bad in ["", "=", "rack=", "=r1", "a b", "a=b=c"] {
        let refused = protect(&[bad]).unwrap_err();
        assert!(refused.contains("must be \"host\""), "{bad}: {refused}");
    }
    let text = protect(&["rack=r1", "room", "host"]).unwrap().to_string();
    assert_eq!(text, "each host, each room, rack r1");
}
