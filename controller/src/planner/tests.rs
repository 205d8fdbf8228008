//! What plans do, by example.

use super::*;
use crate::placement::Size;

pub(super) fn host(cpus: f64) -> Host {
    Host {
        vcpus: 64,
        memory_mib: 65_536,
        cpus,
        core: 1.0,
        cost: 1.0,
        open: true,
        ..Host::default()
    }
}

pub(super) fn vm(host: Slot, cpus: f64) -> Vm {
    Vm {
        host,
        vcpus: 4,
        memory_mib: 2048,
        load: Load {
            mean: cpus,
            variance: 0.01,
            next: cpus,
        },
        transfer_mib: 2048,
        ..Vm::default()
    }
}

fn site(hosts: usize, vms: Vec<Vm>) -> Site {
    Site::new(vec![host(8.0); hosts], vms, vec![Rule::new(hosts, |_| true)])
}

fn moves(plan: &Plan) -> Vec<(Slot, Slot, Slot)> {
    plan.moves()
        .iter()
        .map(|step| (step.vm, step.from, step.to))
        .collect()
}

#[test]
fn a_site_without_contention_is_left_as_it_is_however_uneven() {
    let site = site(3, (0..6).map(|_| vm(0, 1.0)).collect());
    assert_eq!(moves(&rebalance(&site, &Rebalance::default())), []);
    let even = Rebalance {
        contended: None,
        ..Rebalance::default()
    };
    assert_eq!(rebalance(&site, &even).moves().len(), 4);
}

#[test]
fn a_contended_host_gives_away_no_more_than_it_has_to() {
    let site = site(3, (0..4).map(|_| vm(0, 2.0)).collect());
    let plan = rebalance(&site, &Rebalance::default());
    assert_eq!(plan.moves().len(), 1, "{:?}", moves(&plan));
    assert_eq!(plan.moves()[0].from, 0);
}

#[test]
fn a_host_that_measures_pressure_gives_a_vm_away_though_it_seems_to_have_room() {
    let mut hosts = vec![host(8.0); 2];
    hosts[0].contended = true;
    let vms = vec![vm(0, 1.0), vm(0, 1.5)];
    let site = Site::new(hosts, vms, vec![Rule::new(2, |_| true)]);
    assert_eq!(rebalance(&site, &Rebalance::default()).moves().len(), 1);
}

#[test]
fn a_host_that_its_load_has_closed_gives_a_vm_to_the_only_other_one() {
    let mut hosts = vec![host(8.0); 2];
    (hosts[0].contended, hosts[0].open) = (true, false);
    let moved = |hosts: &[Host]| {
        let vms = vec![vm(0, 1.0), vm(0, 1.5)];
        let site = Site::new(hosts.to_vec(), vms, vec![Rule::new(2, |_| true)]);
        rebalance(&site, &Rebalance::default()).moves().len()
    };
    assert_eq!(
        moved(&hosts),
        0,
        "cordoned: the VM would find no room were the other to fail"
    );
    hosts[0].pressed = true;
    assert_eq!(moved(&hosts), 1);
}

#[test]
fn a_move_that_gains_less_than_it_copies_is_not_made() {
    let site = site(3, (0..4).map(|_| vm(0, 2.0)).collect());
    let dear = Rebalance {
        gain_per_gib: 10.0,
        ..Rebalance::default()
    };
    assert_eq!(moves(&rebalance(&site, &dear)), []);
}

#[test]
fn a_budget_of_moves_and_of_bytes_is_kept() {
    let site = site(4, (0..12).map(|_| vm(0, 0.5)).collect());
    let even = Rebalance {
        contended: None,
        ..Rebalance::default()
    };
    assert_eq!(rebalance(&site, &Rebalance { moves: 3, ..even }).moves().len(), 3);
    let plan = rebalance(
        &site,
        &Rebalance {
            transfer_mib: 5000,
            ..even
        },
    );
    assert_eq!(plan.transfer_mib(), 4096);
}

#[test]
fn hosts_are_emptied_where_the_others_can_take_their_vms() {
    let site = site(3, vec![vm(0, 2.0), vm(1, 1.0), vm(2, 1.5)]);
    let plan = consolidate(&site, &Consolidation::default());
    let on = (0..3).filter(|host| plan.site().is_on(*host)).count();
    assert_eq!((on, plan.moves().len()), (1, 2), "{:?}", moves(&plan));
}

#[test]
fn a_budget_empties_whole_hosts_or_none() {
    let sized = |host, transfer_mib| Vm {
        transfer_mib,
        ..vm(host, 0.5)
    };
    // The first host copies 3 GiB, the second 5, the third 2 with two VMs.
    let vms = vec![
        sized(0, 3072),
        sized(1, 2048),
        sized(1, 3072),
        sized(2, 1024),
        sized(2, 1024),
    ];
    let site = site(4, vms);
    for (moves, gib, expected) in [
        (9, 5, vec![1]),
        (9, 4, vec![0, 1]),
        (1, 9, vec![1, 2]),
        (9, 1, vec![0, 1, 2]),
    ] {
        let settings = Consolidation {
            moves,
            transfer_mib: gib * 1024,
            ..Consolidation::default()
        };
        let plan = consolidate(&site, &settings);
        let on: Vec<_> = (0..4).filter(|host| plan.site().is_on(*host)).collect();
        assert_eq!(on, expected, "{moves} moves, {gib} GiB");
    }
}

#[test]
fn a_host_with_a_vm_that_does_not_move_is_not_emptied_of_the_others() {
    let mut pinned = vm(1, 0.5);
    pinned.pinned = "it has a volume of its host's own";
    let site = site(2, vec![vm(0, 3.0), vm(0, 3.0), vm(0, 1.0), vm(1, 0.5), pinned]);
    let plan = consolidate(&site, &Consolidation::default());
    assert!(plan.site().is_on(1), "{:?}", moves(&plan));
}

#[test]
fn a_host_that_is_too_full_is_relieved_of_what_costs_least_and_an_empty_one_is_used_if_need_be() {
    let mut light = vm(0, 1.0);
    light.transfer_mib = 512;
    let site = site(2, vec![vm(0, 4.0), vm(0, 3.2), light]);
    let plan = consolidate(&site, &Consolidation::default());
    assert_eq!(moves(&plan), [(2, 0, 1)]);
}

#[test]
fn a_vm_that_uses_all_its_processors_can_relieve_a_full_host() {
    let site = site(2, vec![vm(0, 4.0), vm(0, 4.0)]);
    let plan = consolidate(&site, &Consolidation::default());
    assert_eq!(moves(&plan), [(0, 0, 1)]);
}

#[test]
fn a_host_whose_vm_has_nowhere_to_go_keeps_no_other_on() {
    let sized = |host, cpus, transfer_mib| Vm {
        vcpus: 8,
        transfer_mib,
        ..vm(host, cpus)
    };
    let vms = vec![sized(0, 6.0, 512), sized(1, 2.5, 65_536), sized(2, 2.5, 65_536)];
    let plan = consolidate(&site(3, vms), &Consolidation::default());
    assert_eq!(moves(&plan), [(1, 1, 2)]);
}

#[test]
fn what_has_never_been_seen_counts_as_fully_busy() {
    let mut samples = Samples::default();
    assert_eq!(samples.load(4.0).mean, 4.0);
    for _ in 0..40 {
        samples.push(0.5);
    }
    let load = samples.load(4.0);
    assert!((load.mean - 0.5).abs() < 1e-6 && load.variance < 0.01, "{load:?}");
    samples.push(3.0);
    let burst = samples.load(4.0);
    assert!(
        burst.next > 2.0 && burst.mean < 1.2 && burst.variance > load.variance,
        "{burst:?}"
    );
}

#[test]
fn a_refusal_says_what_is_lacking() {
    let mut hosts = vec![host(8.0); 5];
    hosts[1].open = false;
    hosts[2].vcpus = 3;
    hosts[3].memory_mib = 1024;
    let mut only = vm(0, 1.0);
    only.disks = vec![(0, 10)];
    let site = Site::new(hosts, vec![only], vec![Rule::new(5, |_| true)]);
    let found: Vec<_> = (0..5).map(|host| site.check(0, host)).collect();
    let refused = [
        Refusal::SameHost,
        Refusal::Closed,
        Refusal::Vcpus,
        Refusal::Memory,
        Refusal::Pool,
    ];
    assert_eq!(found, refused.map(Err));
}

#[test]
fn evacuation_empties_the_named_hosts_and_leaves_what_finds_no_room() {
    let mut large = vm(0, 1.0);
    large.memory_mib = 70_000;
    let site = site(3, vec![vm(0, 1.0), large, vm(1, 7.0)]);
    let plan = evacuate(&site, &[0]);
    assert_eq!(moves(&plan), [(0, 0, 2)]);
}

fn grouped(site: &Site, hosts: &[Slot], settings: Maintenance) -> (Vec<Vec<Slot>>, Vec<(Slot, HeldBy)>) {
    let (groups, held) = groups(site, hosts, |_| true, settings);
    (groups.into_iter().map(|group| group.hosts).collect(), held)
}

#[test]
fn as_many_hosts_are_maintained_at_once_as_the_others_have_room_for_and_one_may_still_fail() {
    // Six hosts, each half full: three can be empty when nothing fails, two when a host may.
    let vms = || (0..48).map(|slot| vm(slot / 8, 1.0)).collect();
    let all: Vec<_> = (0..6).collect();
    let settings = |at_once, spare| Maintenance {
        at_once,
        groups: 9,
        spare,
    };
    for (at_once, spare, expected) in [
        (10, false, vec![vec![0, 1, 2], vec![3, 4, 5]]),
        (10, true, vec![vec![0, 1], vec![2, 3], vec![4, 5]]),
        (1, true, (0..6).map(|host| vec![host]).collect()),
    ] {
        let found = grouped(&site(6, vms()), &all, settings(at_once, spare));
        assert_eq!(
            found,
            (expected, vec![]),
            "{at_once} at once, room for a failure: {spare}"
        );
    }
}

#[test]
fn a_host_that_cannot_be_emptied_is_named_with_what_holds_it() {
    let mut vms = vec![vm(0, 1.0), vm(1, 1.0)];
    vms[1].rule = 1;
    let rules = vec![Rule::new(3, |_| true), Rule::new(3, |host| host == 1)];
    let site = Site::new(vec![host(8.0); 3], vms, rules);
    let settings = Maintenance {
        at_once: 1,
        groups: 9,
        spare: false,
    };
    let held = vec![(1, HeldBy::Vm(1))];
    assert_eq!(
        grouped(&site, &[0, 1, 2], settings),
        (vec![vec![0], vec![2]], held)
    );
    // One that stays through it holds nothing.
    let (groups, held) = groups(&site, &[1], |vm| vm != 1, settings);
    assert_eq!((groups[0].moves.len(), held), (0, vec![]));
}

#[test]
fn a_vm_that_had_come_to_a_host_of_its_group_goes_on_and_is_moved_once() {
    // The first two VMs go to the empty hosts 2 and 3, which are emptied too.
    let site = site(5, vec![vm(0, 1.0), vm(1, 1.0), vm(4, 1.0)]);
    let settings = Maintenance {
        at_once: 4,
        groups: 9,
        spare: false,
    };
    let (groups, held) = groups(&site, &[0, 1, 2, 3], |_| true, settings);
    let steps: Vec<_> = groups[0]
        .moves
        .iter()
        .map(|step| (step.vm, step.from, step.to))
        .collect();
    assert_eq!(groups[0].hosts, [0, 1, 2, 3]);
    assert_eq!((steps, held), (vec![(0, 0, 4), (1, 1, 4)], vec![]));
}

#[test]
fn who_asks_for_one_group_gets_the_first_and_no_word_of_the_hosts_behind_it() {
    let mut vms = vec![vm(0, 1.0), vm(1, 1.0), vm(3, 1.0)];
    vms[0].rule = 1;
    vms[2].rule = 1;
    let rules = vec![Rule::new(4, |_| true), Rule::new(4, |_| false)];
    let site = Site::new(vec![host(8.0); 4], vms, rules);
    let settings = |groups| Maintenance {
        at_once: 1,
        groups,
        spare: false,
    };
    let all = grouped(&site, &[0, 1, 2, 3], settings(9));
    let held = |hosts: &[(Slot, Slot)]| hosts.iter().map(|(host, vm)| (*host, HeldBy::Vm(*vm))).collect();
    assert_eq!(all, (vec![vec![1], vec![2]], held(&[(0, 0), (3, 2)])));
    let first = grouped(&site, &[0, 1, 2, 3], settings(1));
    assert_eq!(first, (vec![vec![1]], held(&[(0, 0)])));
}

#[test]
fn a_closed_host_can_fail_too_and_one_of_the_group_cannot() {
    let settings = Maintenance {
        at_once: 1,
        groups: 9,
        spare: true,
    };
    // With host 0 empty, two hosts have 120 processors free: not enough for a closed one with 124.
    let mut hosts = vec![host(8.0); 4];
    hosts[3] = Host {
        open: false,
        vcpus: 128,
        ..host(8.0)
    };
    for (closed, expected) in [
        (31, (vec![], vec![(0, HeldBy::SpareRoom)])),
        (30, (vec![vec![0]], vec![])),
    ] {
        let vms = [1, 2].into_iter().chain(std::iter::repeat_n(3, closed));
        let vms = vms.map(|host| vm(host, 1.0)).collect();
        let site = Site::new(hosts.clone(), vms, vec![Rule::new(4, |_| true)]);
        assert_eq!(grouped(&site, &[0], settings), expected, "{closed} VMs");
    }
    // What stays on a host through its maintenance is not looked for room for.
    let mut vms = vec![vm(0, 1.0), vm(1, 1.0), vm(2, 1.0)];
    vms[0].vcpus = 64;
    let (groups, held) = groups(&site(3, vms), &[0], |vm| vm != 0, settings);
    assert_eq!((groups.len(), held), (1, vec![]));
}

#[test]
fn a_site_that_cannot_lose_a_host_is_not_maintained_unless_that_is_allowed() {
    // Two hosts that can stand in for each other: while one is maintained, nothing stands in.
    let site = site(2, vec![vm(0, 1.0), vm(1, 1.0)]);
    for (spare, expected) in [
        (
            true,
            (vec![], vec![(0, HeldBy::SpareRoom), (1, HeldBy::SpareRoom)]),
        ),
        (false, (vec![vec![0], vec![1]], vec![])),
    ] {
        let settings = Maintenance {
            at_once: 9,
            groups: 9,
            spare,
        };
        assert_eq!(grouped(&site, &[0, 1], settings), expected);
    }
}

#[test]
fn an_empty_host_takes_what_is_in_the_way_where_no_other_has_room() {
    let site = site(2, vec![vm(0, 0.0), vm(0, 0.0)]);
    let labelled = Rule::new(2, |host| host == 0);
    let size = Size {
        vcpus: 60,
        memory_mib: 1,
    };
    let (plan, host) = make_room(&site, size, &labelled, &Room::default()).unwrap();
    assert_eq!((moves(&plan), host), (vec![(0, 0, 1)], 0));
}

#[test]
fn a_host_takes_no_more_vms_than_it_may() {
    let full = Host {
        vms_most: Some(1),
        ..host(8.0)
    };
    let vms = vec![vm(0, 0.1), vm(0, 0.1)];
    let site = Site::new(vec![host(8.0), full], vms, vec![Rule::new(2, |_| true)]);
    let plan = evacuate(&site, &[0]);
    assert_eq!(plan.moves().len(), 1);
    assert_eq!(plan.site().has_room(1, 1), Err(Refusal::VmCount));
}

/// What moves when the first host is evacuated.
fn evacuated(site: Site) -> Vec<(Slot, Slot, Slot)> {
    moves(&evacuate(&site, &[0]))
}

#[test]
fn members_of_a_group_stay_apart_and_count_where_they_were_until_the_plan_is_over() {
    // By rack: hosts 0 and 1, 2 and 3, and one that has none.
    let racks = vec![Some(0), Some(0), Some(1), Some(1), None];
    let group = |apart, also: &[Slot]| GroupRule {
        apart,
        domains: racks.clone().into(),
        also: also.to_vec(),
    };
    let member = |host| Vm {
        groups: vec![0],
        ..vm(host, 1.0)
    };
    // What else is there leaves the first choice to the host without a rack.
    let load = || [1, 2, 3].map(|host| vm(host, 3.0));
    for (vms, group, expected) in [
        (vec![member(0)], group(true, &[]), vec![(0, 0, 1)]),
        (vec![member(0), member(2)], group(true, &[]), vec![(0, 0, 1)]),
        (vec![member(0), member(2)], group(true, &[0]), vec![]),
        (vec![member(0), member(1)], group(true, &[]), vec![(0, 0, 2)]),
        (vec![member(0), member(1)], group(false, &[]), vec![(0, 0, 1)]),
        (vec![member(0), member(1)], group(false, &[1]), vec![]),
        // The first has left its rack when the second looks for another.
        (vec![member(0), member(0)], group(true, &[]), vec![(0, 0, 2)]),
    ] {
        let all = vms.iter().cloned().chain(load()).collect();
        let site = site(5, all).with_groups(vec![group.clone()]);
        assert_eq!(evacuated(site), expected, "{group:?} {}", vms.len());
    }
}

#[test]
fn bandwidth_of_an_uplink_is_kept() {
    let reserved = |mbit| Vm {
        uplinks: vec![(0, mbit)],
        ..vm(0, 0.5)
    };
    let mut hosts = vec![host(8.0); 3];
    (hosts[1].uplinks_mbit, hosts[2].uplinks_mbit) = (vec![1500], vec![400]);
    let vms = vec![reserved(1000), reserved(1000), reserved(400)];
    let site = Site::new(hosts, vms, vec![Rule::new(3, |_| true)]);
    let mut plan = evacuate(&site, &[0]);
    let to: Vec<_> = plan.moves().iter().map(|step| (step.vm, step.to)).collect();
    assert_eq!(to.len(), 2, "{to:?}");
    assert_eq!(to[0], (0, 1));
    assert_eq!(plan.site().fits(1, 1), Err(Refusal::Bandwidth));
    plan.undo();
    assert_eq!(plan.site().fits(1, 1), Ok(()));
}

#[test]
fn one_vm_with_processors_of_its_own_comes_to_a_host_in_a_plan() {
    let own = || Vm {
        fitted: Some(1),
        ..vm(0, 1.0)
    };
    let rules = vec![Rule::new(4, |_| true), Rule::new(4, |host| host != 1)];
    let site = Site::new(vec![host(8.0); 4], vec![own(), own(), own()], rules);
    assert_eq!(evacuated(site), [(0, 0, 2), (1, 0, 3)]);
}
