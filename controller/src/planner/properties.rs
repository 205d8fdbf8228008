//! What holds for every plan of every site, by an account kept here.

use proptest::{collection::vec, prelude::*};

use super::{
    tests::{host, vm},
    *,
};
use crate::placement::Size;

/// Small sites, some of them overfull, with closed hosts, rules, pools, uplinks, groups, VMs with something of their own and VMs that do not move.
fn sites() -> impl Strategy<Value = Site> {
    let hosts = vec(
        (
            0..3_usize,
            prop::bool::weighted(0.85),
            prop::bool::weighted(0.2),
            0..20_u64,
        ),
        2..7,
    );
    let vms = vec(
        (
            0..64_usize,
            1..9_u32,
            1..9_u64,
            0.0..4.0_f64,
            0..12_usize,
            0..9_u64,
        ),
        0..20,
    );
    let groups = vec(
        (any::<bool>(), 1..4_usize, prop::option::weighted(0.2, 0..3_usize)),
        2,
    );
    (hosts, vms, groups).prop_map(|(hosts, vms, groups)| {
        let count = hosts.len();
        let rows: Vec<_> = hosts
            .iter()
            .map(|(size, open, contended, pool)| Host {
                vcpus: [16, 24, 48][*size],
                memory_mib: [16, 24, 64][*size],
                open: *open,
                contended: *contended,
                pools_mib: vec![*pool],
                uplinks_mbit: vec![*pool],
                ..host([4.0, 8.0, 16.0][*size])
            })
            .collect();
        let vms = vms
            .into_iter()
            .map(|(at, vcpus, memory_mib, cpus, kind, disk)| Vm {
                vcpus,
                memory_mib,
                rule: usize::from(kind == 0),
                pinned: if kind == 1 { "it does not move" } else { "" },
                disks: if kind == 2 { vec![(0, disk)] } else { Vec::new() },
                uplinks: if kind == 3 { vec![(0, disk)] } else { Vec::new() },
                fitted: (kind == 4).then_some(2),
                groups: match kind {
                    5 => vec![0],
                    6 => vec![1],
                    7 => vec![0, 1],
                    _ => Vec::new(),
                },
                ..vm(at % count, cpus)
            });
        let rules = vec![
            Rule::new(count, |_| true),
            Rule::new(count, |host| host % 2 == 0),
            Rule::new(count, |host| host % 3 != 1),
        ];
        // Some hosts are in no domain, and some domains have several.
        let groups = groups.into_iter().map(|(apart, size, also)| GroupRule {
            apart,
            domains: (0..count)
                .map(|host| (host != 4).then_some(host / size))
                .collect(),
            also: also.into_iter().collect(),
        });
        Site::new(rows, vms.collect(), rules).with_groups(groups.collect())
    })
}

/// Every planner's plan.
fn plans(site: &Site) -> Vec<Plan> {
    let even = Rebalance {
        contended: None,
        gain_per_gib: 0.0,
        ..Rebalance::default()
    };
    let mut plans = vec![
        rebalance(site, &Rebalance::default()),
        rebalance(site, &even),
        consolidate(site, &Consolidation::default()),
        consolidate(
            site,
            &Consolidation {
                transfer_mib: 6 * 2048,
                ..Consolidation::default()
            },
        ),
        evacuate(site, &[0]),
    ];
    plans.extend(room_for_large(site, false).map(|(plan, _)| plan));
    plans.extend(room_for_large(site, true).map(|(plan, _)| plan));
    plans
}

/// One for which there is often no room.
const LARGE: Size = Size {
    vcpus: 10,
    memory_mib: 12,
};

fn room_for_large(site: &Site, keep: bool) -> Option<(Plan, Slot)> {
    let settings = Room {
        moves_keep: keep,
        vm_keeps: keep,
        ..Room::default()
    };
    make_room(site, LARGE, site.rule(0), &settings)
}

/// Reserved on each host: processors, memory, and what came to its pool.
fn account(site: &Site, at: &[Slot], host: Slot) -> (u32, u64, u64) {
    let here = || site.vms().iter().zip(at).filter(move |(_, at)| **at == host);
    let disks = here()
        .filter(|(vm, _)| vm.host != host)
        .flat_map(|(vm, _)| &vm.disks);
    (
        here().map(|(vm, _)| vm.vcpus).sum(),
        here().map(|(vm, _)| vm.memory_mib).sum(),
        disks.map(|(_, mib)| mib).sum(),
    )
}

fn room_after(site: &Site, at: &[Slot], to: Slot) -> Result<(), TestCaseError> {
    let (vcpus, memory, disk) = account(site, at, to);
    let host = &site.hosts()[to];
    prop_assert!(
        vcpus <= host.vcpus && memory <= host.memory_mib,
        "host {to} is overfull"
    );
    let left: u64 = site
        .vms()
        .iter()
        .zip(at)
        .filter(|(vm, at)| vm.host == to && **at != to)
        .flat_map(|(vm, _)| &vm.disks)
        .map(|(_, mib)| mib)
        .sum();
    prop_assert!(
        disk <= host.pools_mib[0] + left,
        "the pool of host {to} is overfull"
    );
    let mbit = |comes: bool| -> u64 {
        let moved = site.vms().iter().zip(at).filter(|(vm, at)| match comes {
            true => vm.host != to && **at == to,
            false => vm.host == to && **at != to,
        });
        moved.flat_map(|(vm, _)| &vm.uplinks).map(|(_, mbit)| mbit).sum()
    };
    prop_assert!(
        mbit(true) <= host.uplinks_mbit[0] + mbit(false),
        "the uplink of host {to} is overfull"
    );
    Ok(())
}

/// What groups ask of a move: members that have moved count where they were, too.
fn groups_after(site: &Site, at: &[Slot], moved: Slot, to: Slot) -> Result<(), TestCaseError> {
    let vm = &site.vms()[moved];
    for slot in &vm.groups {
        let group = &site.groups()[*slot];
        let others =
            (0..at.len()).filter(|other| *other != moved && site.vms()[*other].groups.contains(slot));
        let hosts = others.flat_map(|other| [at[other], site.vms()[other].host]);
        let places = hosts
            .map(|host| group.domains[host])
            .chain(group.also.iter().copied().map(Some));
        for place in places {
            let together = place == group.domains[to];
            prop_assert!(
                group.domains[to].is_some() && together != group.apart,
                "group {slot} is broken"
            );
        }
    }
    Ok(())
}

/// What a VM with something of its own asks of a move.
fn fitted_after(site: &Site, at: &[Slot], moved: Slot, to: Slot) -> Result<(), TestCaseError> {
    if let Some(rule) = site.vms()[moved].fitted {
        prop_assert!(site.rule(rule).allows(to));
        let came = (0..at.len()).filter(|other| at[*other] == to && site.vms()[*other].host != to);
        let fitted = came.filter(|other| site.vms()[*other].fitted.is_some());
        prop_assert!(fitted.count() <= 1, "what is given by number was looked at once");
    }
    Ok(())
}

/// What hosts that take VMs have free, but for one that fails.
fn free(site: &Site, lost: Slot) -> Vec<(u32, u64)> {
    let others = (0..site.hosts().len()).filter(|host| *host != lost && site.hosts()[*host].open);
    let left = others.map(|host| {
        let (row, held) = (&site.hosts()[host], site.held(host));
        (
            row.vcpus.saturating_sub(held.vcpus),
            row.memory_mib.saturating_sub(held.memory_mib),
        )
    });
    left.collect()
}

/// What the VMs of a host need.
fn needed(site: &Site, host: Slot) -> Vec<(u32, u64)> {
    let vms = site.here(host).iter().map(|vm| &site.vms()[*vm]);
    vms.map(|vm| (vm.vcpus, vm.memory_mib)).collect()
}

/// Whether the VMs of a host that fails find room on the others.
fn fits_elsewhere(site: &Site, lost: Slot) -> bool {
    let (mut others, mut vms) = (free(site, lost), needed(site, lost));
    others.sort_by_key(|free| std::cmp::Reverse(*free));
    vms.sort_by_key(|(vcpus, memory)| std::cmp::Reverse((*memory, *vcpus)));
    fit(&mut others, &vms)
}

/// Whether there is any way to place them.
fn fit(free: &mut [(u32, u64)], vms: &[(u32, u64)]) -> bool {
    let Some(((vcpus, memory), rest)) = vms.split_first() else {
        return true;
    };
    (0..free.len()).any(|host| {
        let before = free[host];
        if before.0 < *vcpus || before.1 < *memory {
            return false;
        }
        free[host] = (before.0 - vcpus, before.1 - memory);
        let found = fit(free, rest);
        free[host] = before;
        found
    })
}

proptest! {
    #[test]
    fn no_prefix_of_a_plan_breaks_room_a_rule_or_what_may_not_move(site in sites()) {
        for plan in plans(&site) {
            let mut at: Vec<_> = site.vms().iter().map(|vm| vm.host).collect();
            let mut seen = vec![false; at.len()];
            for step in plan.moves() {
                let vm = &site.vms()[step.vm];
                prop_assert_eq!(at[step.vm], step.from);
                prop_assert!(!std::mem::replace(&mut seen[step.vm], true), "a VM moves twice");
                prop_assert!(vm.pinned.is_empty() && site.hosts()[step.to].open);
                prop_assert!(site.rule(vm.rule).allows(step.to));
                at[step.vm] = step.to;
                room_after(&site, &at, step.to)?;
                groups_after(&site, &at, step.vm, step.to)?;
                fitted_after(&site, &at, step.vm, step.to)?;
            }
        }
    }

    #[test]
    fn no_prefix_of_a_plan_takes_away_the_room_for_a_host_that_fails(site in sites()) {
        if !site.has_spare_room() {
            return Ok(());
        }
        for plan in plans(&site) {
            let mut now = site.clone();
            for step in plan.moves() {
                now.apply(step.vm, step.to);
                let anew = Site::new(now.hosts().to_vec(), now.vms().to_vec(), vec![]);
                prop_assert!(now.has_spare_room() && anew.has_spare_room());
            }
        }
    }

    #[test]
    fn where_there_is_said_to_be_room_for_any_host_that_fails_there_is(site in sites()) {
        let lossless = (0..site.hosts().len()).all(|host| fits_elsewhere(&site, host));
        prop_assert!(lossless || !site.has_spare_room());
    }

    #[test]
    fn a_group_of_hosts_is_emptied_within_the_room_of_the_others_and_any_one_of_those_may_fail(site in sites(), at_once in 1..4_usize) {
        let hosts: Vec<_> = (0..site.hosts().len()).collect();
        let (groups, held) = groups(&site, &hosts, |_| true, Maintenance { at_once, groups: hosts.len(), spare: true });
        let mut told: Vec<_> = groups.iter().flat_map(|group| &group.hosts).chain(held.iter().map(|(host, _)| host)).collect();
        told.sort_unstable();
        prop_assert!(told.into_iter().eq(&hosts), "each host is in one group, or held");
        for group in groups {
            let mut at: Vec<_> = site.vms().iter().map(|vm| vm.host).collect();
            for step in &group.moves {
                prop_assert_eq!(at[step.vm], step.from, "a VM moves twice");
                at[step.vm] = step.to;
                prop_assert!(site.hosts()[step.to].open && !group.hosts.contains(&step.to));
                prop_assert!(site.rule(site.vms()[step.vm].rule).allows(step.to));
                room_after(&site, &at, step.to)?;
                groups_after(&site, &at, step.vm, step.to)?;
            }
            prop_assert!(group.hosts.len() <= at_once && at.iter().all(|host| !group.hosts.contains(host)), "it is empty");
            let mut after = site.clone();
            group.hosts.iter().for_each(|host| after.set_open(*host, false));
            group.moves.iter().for_each(|step| after.apply(step.vm, step.to));
            for lost in hosts.iter().filter(|host| !group.hosts.contains(host)) {
                prop_assert!(fits_elsewhere(&after, *lost), "{lost} may not fail");
            }
        }
    }

    #[test]
    fn moves_that_run_at_the_same_time_never_hold_more_than_there_is(site in sites(), order in vec(0..64_usize, 64)) {
        for plan in plans(&site) {
            // A VM that moves is on both hosts; which of the possible things comes next is drawn.
            let mut stage = vec![0_u8; plan.moves().len()];
            for pick in order.iter().chain(std::iter::repeat_n(&0, 128)) {
                let ended = |step: usize, stage: &[u8]| plan.waits_for(step).all(|other| stage[other] == 2);
                let possible: Vec<_> = (0..stage.len()).filter(|step| stage[*step] == 1 || (stage[*step] == 0 && ended(*step, &stage))).collect();
                let Some(step) = possible.get(pick % possible.len().max(1)) else { break };
                stage[*step] += 1;
                let to = plan.moves()[*step].to;
                let mut held = (0, 0);
                for (slot, vm) in site.vms().iter().enumerate() {
                    let moved = plan.moves().iter().position(|step| step.vm == slot);
                    let here = match moved.map(|step| (stage[step], plan.moves()[step])) {
                        None | Some((0, _)) => vm.host == to,
                        Some((1, step)) => step.from == to || step.to == to,
                        Some((_, step)) => step.to == to,
                    };
                    if here {
                        held = (held.0 + vm.vcpus, held.1 + vm.memory_mib);
                    }
                }
                let host = &site.hosts()[to];
                prop_assert!(held.0 <= host.vcpus && held.1 <= host.memory_mib, "host {to} is overfull");
            }
            prop_assert!(stage.iter().all(|stage| *stage == 2), "a move never came to its turn");
        }
    }

    #[test]
    fn where_room_is_made_there_was_none_and_there_is_some_after(site in sites(), keep in any::<bool>(), copies in 0..200_u64) {
        let settings = Room { transfer_mib: copies, moves_keep: keep, vm_keeps: keep, ..Room::default() };
        let Some((plan, host)) = make_room(&site, LARGE, site.rule(0), &settings) else { return Ok(()) };
        let has_room = |site: &Site, slot: Slot| {
            let (host, held) = (&site.hosts()[slot], site.held(slot));
            let room = held.vcpus + LARGE.vcpus <= host.vcpus && held.memory_mib + LARGE.memory_mib <= host.memory_mib;
            host.open && site.rule(0).allows(slot) && room && (!keep || site.keeps_room(LARGE, slot))
        };
        prop_assert!((0..site.hosts().len()).all(|slot| !has_room(&site, slot)));
        prop_assert!(!plan.moves().is_empty() && has_room(plan.site(), host));
        prop_assert!(plan.transfer_mib() <= copies);
    }

    #[test]
    fn the_same_site_gives_the_same_plan(site in sites()) {
        let rules = [0, 1, 2].map(|rule| site.rule(rule).clone()).to_vec();
        let again = Site::new(site.hosts().to_vec(), site.vms().to_vec(), rules).with_groups(site.groups().to_vec());
        for (first, second) in plans(&site).iter().zip(plans(&again)) {
            prop_assert_eq!(first.moves(), second.moves());
        }
    }

    #[test]
    fn a_consolidation_with_a_budget_keeps_to_it_and_leaves_no_host_half_empty(site in sites(), copies in 0..20_u64, moves in 0..12_usize) {
        let settings = Consolidation { moves, transfer_mib: copies * 1024, ..Consolidation::default() };
        let plan = consolidate(&site, &settings);
        prop_assert!(plan.transfer_mib() <= settings.transfer_mib && plan.moves().len() <= moves);
        for step in plan.moves() {
            let was_full = site.held(step.from).next / site.hosts()[step.from].cpus > settings.relieve.share;
            prop_assert!(was_full || !plan.site().is_on(step.from), "host {} is half empty", step.from);
        }
    }

    #[test]
    fn under_constant_load_no_plan_undoes_the_one_before(site in sites()) {
        let settings = Consolidation::default();
        let first = consolidate(&site, &settings);
        let second = consolidate(first.site(), &settings);
        for step in second.moves() {
            // A host that took VMs is not full now, and one that was emptied is not needed again.
            let took = first.moves().iter().any(|before| before.to == step.from);
            let emptied = site.is_on(step.to) && !first.site().is_on(step.to);
            prop_assert!(!emptied, "host {} was emptied and is filled again", step.to);
            prop_assert!(!took || !second.site().is_on(step.from), "host {} took VMs and is relieved", step.from);
        }
    }

    #[test]
    fn a_rebalanced_site_is_more_even_and_has_no_more_contended_hosts(site in sites()) {
        let settings = Rebalance::default();
        let plan = rebalance(&site, &settings);
        prop_assert!(score(plan.site(), settings.weights) <= score(&site, settings.weights) + 1e-9);
        let again = rebalance(plan.site(), &settings);
        let took = |host: Slot| plan.moves().iter().any(|step| step.to == host);
        prop_assert!(again.moves().iter().all(|step| !took(step.from)), "a host that took VMs gives some away");
    }
}
