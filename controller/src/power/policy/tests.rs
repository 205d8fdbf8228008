//! The rules: tables of sites, and random ones under constant load.

use proptest::prelude::*;

use super::*;
use crate::{
    placement::properties::cases,
    planner::{Host, Load, Rule, Vm},
};

const MINUTE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(24 * 3600);
const RULES: Rules = Rules {
    settle: Duration::from_secs(15 * 60),
    min_on: Duration::from_secs(30 * 60),
    min_off: Duration::from_secs(10 * 60),
    per_hour: 10,
    reserve_hosts: 1,
};
const IDLE: Row = Row::On {
    idle: Some(LONG),
    on: LONG,
};
const BUSY: Row = Row::On { idle: None, on: LONG };
const OFF: Row = Row::Off { off: LONG };

fn host(open: bool) -> Host {
    Host {
        vcpus: 8,
        memory_mib: 8192,
        cpus: 8.0,
        core: 1.0,
        cost: 1.0,
        open,
        ..Host::default()
    }
}

fn vm(host: Slot, vcpus: u32, rule: Slot) -> Vm {
    Vm {
        host,
        vcpus,
        memory_mib: u64::from(vcpus) * 1024,
        load: Load::default(),
        rule,
        ..Vm::default()
    }
}

/// Hosts of 8 processors, VMs of one each by their hosts, which any host may have.
fn fleet(rows: &[Row], vms: &[Slot]) -> Fleet {
    let hosts = rows
        .iter()
        .map(|row| host(matches!(row, Row::On { .. })))
        .collect();
    let vms: Vec<_> = vms.iter().map(|slot| vm(*slot, 1, 0)).collect();
    Fleet {
        expected: vec![[0.0; 2]; vms.len()],
        site: Site::new(hosts, vms, vec![Rule::new(rows.len(), |_| true)]),
        rows: rows.to_vec(),
        switches: 0,
    }
}

/// The same, with this much expected of its VMs together.
fn expecting(mut fleet: Fleet, expected: f64) -> Fleet {
    #[expect(clippy::cast_precision_loss, reason = "a few VMs")]
    let each = expected / fleet.expected.len().max(1) as f64;
    fleet.expected.fill([0.0, each]);
    fleet
}

#[test]
fn hosts_that_are_idle_go_off_until_the_reserve_is_reached() {
    // Two hosts with a VM each: without h3 to h5 they have 14 processors free, and a quarter more than 8 is kept.
    let decided = decide(fleet(&[BUSY, BUSY, IDLE, IDLE, IDLE], &[0, 1]), &RULES);
    assert_eq!(decided, [Switch::Off(2), Switch::Off(3), Switch::Off(4)]);
    let more = Rules {
        reserve_hosts: 2,
        ..RULES
    };
    let decided = decide(fleet(&[BUSY, BUSY, IDLE, IDLE, IDLE], &[0, 1]), &more);
    assert_eq!(
        decided,
        [Switch::Off(2), Switch::Off(3)],
        "20 are kept, and 22 are left"
    );
}

#[test]
fn a_host_goes_off_only_when_it_has_rested_and_the_hour_has_room_for_its_waking() {
    let table = [
        (Some(RULES.settle), RULES.min_on, 0, true),
        (Some(RULES.settle - MINUTE), RULES.min_on, 0, false),
        (Some(RULES.settle), RULES.min_on - MINUTE, 0, false),
        (None, LONG, 0, false),
        (Some(LONG), LONG, 8, true),
        (Some(LONG), LONG, 9, false),
    ];
    for (idle, on, switches, goes) in table {
        let mut fleet = fleet(&[BUSY, BUSY, Row::On { idle, on }], &[0, 1]);
        fleet.switches = switches;
        let expected = if goes { vec![Switch::Off(2)] } else { vec![] };
        assert_eq!(decide(fleet, &RULES), expected, "{idle:?} {on:?} {switches}");
    }
}

#[test]
fn what_is_lacking_wakes_and_only_a_lost_spare_host_does_so_at_once() {
    let young = Row::Off {
        off: RULES.min_off - MINUTE,
    };
    // Two full hosts have no room for each other's VMs.
    let full: Vec<_> = [0; 8].into_iter().chain([1; 8]).collect();
    for off in [OFF, young] {
        let first = Switch::On(2, Why::Spare);
        for (switches, woken) in [(RULES.per_hour, Some(first)), (2 * RULES.per_hour, None)] {
            let mut lost = fleet(&[BUSY, BUSY, off, off, off], &full);
            lost.switches = switches;
            let rules = Rules {
                reserve_hosts: 0,
                ..RULES
            };
            let decided = decide(lost, &rules).first().copied();
            assert_eq!(decided, woken, "at once, as far as twice the hour goes");
        }
    }
    // A host is spare, and 20 of 32 processors are free where 24 are kept.
    let rules = Rules {
        reserve_hosts: 3,
        ..RULES
    };
    let of = |row: Row| {
        fleet(
            &[BUSY, BUSY, BUSY, BUSY, row],
            &[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
        )
    };
    assert_eq!(decide(of(OFF), &rules), [Switch::On(4, Why::Reserve)]);
    assert_eq!(decide(of(young), &rules), []);
    let spent = Fleet {
        switches: rules.per_hour,
        ..of(OFF)
    };
    assert_eq!(decide(spent, &rules), []);
    assert_eq!(decide(of(Row::Waking), &rules), [], "it comes already");
    // 16 processors bear 13.6 without waiting.
    for (expected, wakes) in [(13.5, false), (13.7, true)] {
        let busy = expecting(fleet(&[BUSY, BUSY, OFF], &[0, 1]), expected);
        let woken = if wakes {
            vec![Switch::On(2, Why::Expected)]
        } else {
            vec![]
        };
        assert_eq!(decide(busy, &RULES), woken);
    }
}

/// Rows of hosts, each with what is not as usual.
fn hosts(fleet: &mut Fleet, change: impl Fn(Slot, &mut Host), vms: Vec<Vm>, rules: Vec<Rule>) {
    let mut hosts = fleet.site.hosts().to_vec();
    hosts
        .iter_mut()
        .enumerate()
        .for_each(|(slot, host)| change(slot, host));
    fleet.expected = vec![[0.0; 2]; vms.len()];
    fleet.site = Site::new(hosts, vms, rules);
}

#[test]
fn what_is_woken_has_the_taints_of_what_is_short() {
    // A full host with a taint, and two others that stand in for each other.
    let mut fleet = fleet(&[BUSY, BUSY, BUSY, OFF, OFF], &[]);
    let vms = [0; 8]
        .into_iter()
        .chain([1, 2])
        .map(|slot| vm(slot, 1, 0))
        .collect();
    let tainted = |slot: Slot, host: &mut Host| match slot {
        0 | 4 => host.field = "gpu= ".into(),
        3 => (host.vcpus, host.memory_mib) = (64, 65_536),
        _ => {}
    };
    hosts(&mut fleet, tainted, vms, vec![Rule::new(5, |_| true)]);
    let rules = Rules {
        reserve_hosts: 0,
        ..RULES
    };
    assert_eq!(decide(fleet.clone(), &rules), [Switch::On(4, Why::Spare)]);
    // Room that is kept in reserve is kept among hosts that stand in for each other, where some are used.
    fleet.rows[4] = Row::Waking;
    assert_eq!(decide(fleet.clone(), &RULES), [Switch::On(3, Why::Reserve)]);
    let unused = vec![vm(1, 1, 0), vm(2, 1, 0)];
    fleet.rows = vec![BUSY, BUSY, BUSY, Row::Fixed, OFF];
    hosts(
        &mut fleet,
        |slot, host| {
            (host.vcpus, host.memory_mib) = (8, 8192);
            host.open = slot < 3;
        },
        unused,
        vec![Rule::new(5, |_| true)],
    );
    assert_eq!(decide(fleet, &RULES), [], "nobody uses them");
}

#[test]
fn what_is_woken_has_what_is_missing() {
    // Nine of 24 GiB are free, and 18 of 24 processors, where 16 of each are kept.
    let mut fleet = fleet(&[BUSY, BUSY, BUSY, OFF, OFF], &[]);
    let large = |slot| Vm {
        memory_mib: 2560,
        ..vm(slot, 1, 0)
    };
    let vms = [0, 0, 1, 1, 2, 2].map(large).to_vec();
    let sized = |slot: Slot, host: &mut Host| match slot {
        3 => (host.vcpus, host.memory_mib) = (16, 4096),
        4 => host.memory_mib = 16_384,
        _ => {}
    };
    hosts(&mut fleet, sized, vms, vec![Rule::new(5, |_| true)]);
    assert_eq!(decide(fleet, &RULES), [Switch::On(4, Why::Reserve)]);
}

#[test]
fn what_is_woken_may_have_the_vms_that_are_expected_to_need_more() {
    // Three hosts bear what all VMs need, but those of two labels are more than their two hosts do.
    for (expected, woken) in [(13.5, vec![]), (13.7, vec![Switch::On(4, Why::Expected)])] {
        let mut fleet = fleet(&[BUSY, BUSY, BUSY, OFF, OFF], &[]);
        let sized = |slot: Slot, host: &mut Host| {
            if slot == 3 {
                host.cpus = 64.0;
            }
        };
        let rules = vec![
            Rule::new(5, |_| true),
            Rule::new(5, |slot| ![2, 3].contains(&slot)),
            Rule::new(5, |slot| [0, 4].contains(&slot)),
        ];
        let vms = vec![vm(0, 1, 1), vm(0, 1, 2), vm(1, 1, 1), vm(2, 1, 0)];
        hosts(&mut fleet, sized, vms, rules);
        fleet.expected = [6.0, 1.0, expected - 7.0, 1.0].map(|cpus| [cpus, 0.0]).to_vec();
        assert_eq!(decide(fleet, &RULES), woken, "{expected} of 16");
    }
}

#[test]
fn the_largest_is_woken_and_a_fixed_one_is_left() {
    let mut fleet = fleet(
        &[BUSY, BUSY, Row::Fixed, OFF, OFF],
        &[[0; 3].as_slice(), &[1; 6]].concat(),
    );
    let mut hosts = fleet.site.hosts().to_vec();
    hosts[4].memory_mib *= 2;
    fleet.site = Site::new(hosts, fleet.site.vms().to_vec(), vec![Rule::new(5, |_| true)]);
    assert!(matches!(decide(fleet, &RULES)[..], [Switch::On(4, _)]));
}

#[test]
fn what_is_expected_within_the_hour_keeps_a_host_on() {
    for (expected, goes) in [(11.9, true), (12.1, false)] {
        let fleet = expecting(fleet(&[BUSY, BUSY, IDLE], &[0, 1]), expected);
        assert_eq!(!decide(fleet, &RULES).is_empty(), goes, "{expected} of 16");
    }
}

#[test]
fn a_host_stays_on_that_is_the_only_other_one_for_a_vm() {
    let site = |allowed: &'static [Slot]| {
        let hosts = vec![host(true), host(true), host(true)];
        let rules = vec![Rule::new(3, |slot| allowed.contains(&slot))];
        Site::new(hosts, vec![vm(0, 1, 0)], rules)
    };
    assert_eq!(only(&site(&[0, 2]), 2), Some(0));
    assert_eq!(only(&site(&[2]), 2), Some(0), "its own is not allowed any more");
    assert_eq!(only(&site(&[0, 1, 2]), 2), None);
    assert_eq!(only(&site(&[0, 1]), 2), None, "it could not come here anyhow");
    let mut needed = fleet(&[BUSY, BUSY, IDLE], &[0, 1]);
    needed.site = Site::new(
        needed.site.hosts().to_vec(),
        needed.site.vms().to_vec(),
        vec![Rule::new(3, |slot| slot != 1)],
    );
    assert_eq!(decide(needed, &RULES), []);
}

/// A site on which time goes on, and what is decided is done.
#[derive(Debug, Clone)]
struct Played {
    fleet: Fleet,
    history: Vec<(u32, Switch)>,
}

const STEP: Duration = Duration::from_secs(5 * 60);

impl Played {
    /// The host that would be woken next, were nothing to be waited for.
    fn lacking(&self) -> Option<(Slot, Why)> {
        let mut fleet = Fleet {
            switches: 0,
            ..self.fleet.clone()
        };
        let at_once = Rules {
            min_off: Duration::ZERO,
            ..RULES
        };
        let given = Given::of(&mut fleet);
        needed(&fleet, &at_once, &given)
    }

    fn step(&mut self, minute: u32) {
        let recent = |(then, _): &&(u32, Switch)| minute - then < 60;
        self.fleet.switches = self.history.iter().filter(recent).count();
        for switch in decide(self.fleet.clone(), &RULES) {
            self.history.push((minute, switch));
            match switch {
                Switch::On(slot, _) => {
                    self.fleet.rows[slot] = Row::On {
                        idle: Some(Duration::ZERO),
                        on: Duration::ZERO,
                    };
                    self.fleet.site.set_open(slot, true);
                }
                Switch::Off(slot) => {
                    assert!(self.fleet.site.here(slot).is_empty(), "it has VMs");
                    self.fleet.rows[slot] = Row::Off { off: Duration::ZERO };
                    self.fleet.site.set_open(slot, false);
                    assert_eq!(self.lacking(), None, "it is needed");
                    assert_eq!(only(&self.fleet.site, slot), None, "a VM needs it");
                }
            }
        }
        for row in &mut self.fleet.rows {
            match row {
                Row::On { idle, on } => {
                    *on += STEP;
                    *idle = idle.map(|idle| idle + STEP);
                }
                Row::Off { off } => *off += STEP,
                _ => {}
            }
        }
    }
}

fn any_fleet() -> impl Strategy<Value = Fleet> {
    let one = (1..=4_u32, 1..=4_u64, any::<bool>(), prop::bool::weighted(0.3));
    let placed = (any::<prop::sample::Index>(), 1..=8_u32, 1..=8_u64, 0..3_usize);
    (
        prop::collection::vec(one, 2..9),
        prop::collection::vec(placed, 0..24),
        prop::collection::vec(any::<u16>(), 3),
        0.0..60.0_f64,
    )
        .prop_map(|(hosts, vms, rules, expected)| {
            let rows: Vec<_> = hosts
                .iter()
                .map(|(vcpus, memory, open, tainted)| Host {
                    field: if *tainted { "gpu= ".into() } else { String::new() },
                    vcpus: vcpus * 8,
                    memory_mib: memory * 8192,
                    cpus: f64::from(vcpus * 8),
                    open: *open,
                    ..host(true)
                })
                .collect();
            let mut held = vec![(0, 0); rows.len()];
            let mut placed = Vec::new();
            for (at, vcpus, memory, rule) in vms {
                let slot = at.index(rows.len());
                let (memory_mib, sum) = (memory * 1024, held[slot]);
                let fits = sum.0 + vcpus <= rows[slot].vcpus && sum.1 + memory_mib <= rows[slot].memory_mib;
                if fits && rows[slot].open {
                    held[slot] = (sum.0 + vcpus, sum.1 + memory_mib);
                    placed.push(Vm {
                        memory_mib,
                        ..vm(slot, vcpus, rule)
                    });
                }
            }
            let power = rows
                .iter()
                .zip(&held)
                .map(|(row, held)| match (row.open, held.0) {
                    (true, 0) => IDLE,
                    (true, _) => BUSY,
                    (false, _) => OFF,
                });
            let rules = rules
                .iter()
                .map(|bits| Rule::new(rows.len(), |slot| bits >> slot & 1 == 1));
            let fleet = Fleet {
                rows: power.collect(),
                expected: vec![[0.0; 2]; placed.len()],
                site: Site::new(rows.clone(), placed, rules.collect()),
                switches: 0,
            };
            expecting(fleet, expected)
        })
}

proptest! {
    #![proptest_config(cases(5_000))]

    /// [`Played::step`] asserts that nothing is switched off that is needed.
    #[test]
    fn under_a_constant_load_it_comes_to_rest_and_the_hour_is_kept(fleet in any_fleet()) {
        let hosts = fleet.rows.len();
        let mut played = Played { fleet, history: Vec::new() };
        for step in 0..12 * 12 {
            played.step(step * 5);
            // All has rested long enough, and the hour is free: nothing is different at the next look.
            let last = played.history.iter().map(|(minute, _)| *minute).max().unwrap_or(0);
            if step * 5 > last + 100 {
                break;
            }
        }
        let last = played.history.iter().map(|(minute, _)| *minute).max().unwrap_or(0);
        prop_assert!(last < 8 * 60, "still switching after {last} min: {:?}", played.history);
        for host in 0..hosts {
            let times = played.history.iter().filter(|(_, switch)| matches!(switch, Switch::On(slot, _) | Switch::Off(slot) if *slot == host));
            prop_assert!(times.count() <= 2, "host {host} goes on and off: {:?}", played.history);
        }
        for (minute, _) in &played.history {
            let calm = |(then, switch): &&(u32, Switch)| *then <= *minute && minute - then < 60 && !matches!(switch, Switch::On(_, Why::Spare));
            prop_assert!(played.history.iter().filter(calm).count() <= RULES.per_hour);
            let within = |(then, _): &&(u32, Switch)| *then <= *minute && minute - then < 60;
            prop_assert!(played.history.iter().filter(within).count() <= 2 * RULES.per_hour);
        }
        // What is lacking in the end, no host could have brought.
        prop_assert_eq!(played.lacking(), None);
    }

    #[test]
    fn the_same_site_gets_the_same_answer_and_never_both_directions(fleet in any_fleet()) {
        let decided = decide(fleet.clone(), &RULES);
        prop_assert_eq!(&decided, &decide(fleet, &RULES));
        let on = decided.iter().filter(|switch| matches!(switch, Switch::On(..))).count();
        prop_assert!(on == 0 || on == decided.len(), "{decided:?}");
    }
}
