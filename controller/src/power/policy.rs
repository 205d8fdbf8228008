//! Which host nobody needs, and which one is needed. Pure; [`runner`](super::runner) carries it out.
//!
//! Room is lacking when the VMs of a host that fails might find none, when less is free than is kept in reserve, or when VMs are
//! expected to use more within the hour than the processors of the hosts that may have them do without waiting. The first two are looked at for each
//! field of hosts, those with the same hard taints, and the third for the VMs that may be on the same hosts. What lacks room wakes a host that counts there, the one that
//! has the most of what is missing. A host is switched off only where, without
//! it, no room would be lacking there *by a margin*: so what was switched off is not woken under the same load, and what was
//! woken is not switched off again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::planner::{Host, Rule, Site, Slot};

/// Share of the processors that VMs are expected to use before they wait for each other: that of a contended host.
const FULL: f64 = 0.85;
/// The same for what is left when a host is switched off.
const FULL_AFTER: f64 = 0.75;
/// What is left in reserve then, more than is kept.
const MARGIN: f64 = 1.25;
/// So many hosts are looked at, one after the other, of which each is needed.
const TRIED: usize = 8;

/// How the operator wants it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// So long a host has nothing before it is switched off.
    pub settle: Duration,
    /// So long it stays on.
    pub min_on: Duration,
    /// So long it stays off, unless a host that fails would not be made good.
    pub min_off: Duration,
    /// Switches in an hour. To switch off takes two of them: its own, and that of waking again. A host that fails and would not be made good may
    /// take as many again.
    pub per_hour: usize,
    /// So much is kept free in each field: the room of this many of its largest host.
    pub reserve_hosts: u32,
}

/// Where a host is between on and off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// It is on, and can be switched off.
    On {
        /// So long it has nothing that is needed.
        idle: Option<Duration>,
        /// So long it is on.
        on: Duration,
    },
    /// It is off, and can be woken.
    Off {
        /// So long.
        off: Duration,
    },
    /// It comes: its room counts.
    Waking,
    /// It is left as it is.
    Fixed,
}

/// The site.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// Hosts and VMs.
    pub site: Site,
    /// Where each host is between on and off.
    pub rows: Vec<Row>,
    /// Processors that each VM is expected to use at most in this hour and in the next.
    pub expected: Vec<[f64; 2]>,
    /// Switches of the last hour.
    pub switches: usize,
}

/// Why room is lacking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The VMs of a host that fails might find none.
    Spare,
    /// Less is free than is kept in reserve.
    Reserve,
    /// The VMs are expected to need more within the hour.
    Expected,
}

impl Why {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Spare => "were a host to fail, its VMs might find no room",
            Self::Reserve => "less room is free than is kept in reserve",
            Self::Expected => "its VMs are expected to need more processors within the hour",
        }
    }
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// A host is woken.
    On(Slot, Why),
    /// A host is switched off.
    Off(Slot),
}

/// What is lacking, and where.
struct Lack {
    why: Why,
    /// Hosts whose room counts.
    of: Rule,
    /// How much: virtual processors and memory in MiB that may be reserved, processors that may be used.
    missing: [f64; 3],
}

impl Lack {
    /// The share of what is missing that a host has, of that of which it is the least.
    fn share(&self, host: &Host) -> f64 {
        let has = [f64::from(host.vcpus), mib(host.memory_mib), host.cpus];
        let missing = self.missing.iter().zip(has);
        let shares = missing.filter(|(missing, _)| **missing > 0.0);
        shares.map(|(missing, has)| has / missing).fold(1.0, f64::min)
    }
}

#[expect(clippy::cast_precision_loss, reason = "MiB of a host stay far below 2^53")]
const fn mib(mib: u64) -> f64 {
    mib as f64
}

/// What no switch changes.
struct Given {
    /// Domains that would be short though every host were on that can be woken, each with its first host: one that is larger than all others,
    /// or alone with its taint.
    hopeless: BTreeSet<(Slot, String)>,
    /// Hosts, and what the VMs that may be on no others are expected to use.
    expected: Vec<(Rule, f64)>,
}

impl Given {
    fn of(fleet: &mut Fleet) -> Self {
        let off = |row: &Row| matches!(row, Row::Off { .. });
        let off: Vec<_> = (0..fleet.rows.len())
            .filter(|host| off(&fleet.rows[*host]))
            .collect();
        off.iter().for_each(|host| fleet.site.set_open(*host, true));
        let short = fleet.site.short_domains();
        let hopeless = short.map(|short| (short.host, short.domain.to_owned())).collect();
        off.iter().for_each(|host| fleet.site.set_open(*host, false));
        let site = &fleet.site;
        let mut groups = BTreeMap::<Rule, [f64; 2]>::new();
        groups.insert(Rule::new(fleet.rows.len(), |_| true), [0.0; 2]);
        for (vm, expected) in site.vms().iter().zip(&fleet.expected) {
            let sum = groups.entry(site.rule(vm.rule).clone()).or_default();
            (sum[0], sum[1]) = (sum[0] + expected[0], sum[1] + expected[1]);
        }
        let within = |of: &Rule| {
            let parts = groups.iter().filter(|(other, _)| other.is_within(of));
            let sum = parts.fold([0.0; 2], |sum, (_, part)| [sum[0] + part[0], sum[1] + part[1]]);
            sum[0].max(sum[1])
        };
        Self {
            hopeless,
            expected: groups.keys().map(|of| (of.clone(), within(of))).collect(),
        }
    }
}

/// What is to be done now. Hosts are woken, or they are switched off, never both.
pub fn decide(mut fleet: Fleet, rules: &Rules) -> Vec<Switch> {
    for host in 0..fleet.rows.len() {
        if fleet.rows[host] == Row::Waking {
            fleet.site.set_open(host, true);
        }
    }
    let given = Given::of(&mut fleet);
    let mut switches = Vec::new();
    while let Some((host, why)) = needed(&fleet, rules, &given) {
        fleet.site.set_open(host, true);
        fleet.rows[host] = Row::Waking;
        fleet.switches += 1;
        switches.push(Switch::On(host, why));
    }
    match switches.is_empty() {
        true => rest(&mut fleet, rules, &given),
        false => switches,
    }
}

/// The host to be woken next: of those that count where room is lacking, the one with the most of what is missing; of equals the largest, so that few are woken, and then the
/// first, so that it is the same each time.
fn needed(fleet: &Fleet, rules: &Rules, given: &Given) -> Option<(Slot, Why)> {
    lacks(fleet, rules, given, false).into_iter().find_map(|lack| {
        let urgent = lack.why == Why::Spare;
        let most = if urgent {
            2 * rules.per_hour
        } else {
            rules.per_hour
        };
        let may = |row: &Row| matches!(row, Row::Off { off } if urgent || *off >= rules.min_off);
        let hosts = 0..fleet.rows.len();
        let hosts = hosts.filter(|host| may(&fleet.rows[*host]) && lack.of.allows(*host));
        let size = |host: &Slot| {
            let host = &fleet.site.hosts()[*host];
            (host.vcpus, host.memory_mib)
        };
        let share = |host: &Slot| lack.share(&fleet.site.hosts()[*host]);
        let best = hosts
            .rev()
            .max_by(|a, b| share(a).total_cmp(&share(b)).then(size(a).cmp(&size(b))));
        best.filter(|_| fleet.switches < most)
            .map(|host| (host, lack.why))
    })
}

fn rest(fleet: &mut Fleet, rules: &Rules, given: &Given) -> Vec<Switch> {
    let mut idle: Vec<_> = fleet
        .rows
        .iter()
        .enumerate()
        .filter_map(|(host, row)| match row {
            Row::On { idle: Some(idle), on } if *idle >= rules.settle && *on >= rules.min_on => {
                Some((*idle, host))
            }
            _ => None,
        })
        .collect();
    idle.sort_by_key(|(idle, host)| (std::cmp::Reverse(*idle), *host));
    let (mut switches, mut needed) = (Vec::new(), 0);
    for (_, host) in idle {
        if fleet.switches + 2 > rules.per_hour || needed == TRIED {
            break;
        }
        fleet.site.set_open(host, false);
        let lacks = lacks(fleet, rules, given, true);
        let missed = |lack: &Lack| lack.why == Why::Spare || lack.of.allows(host);
        if !lacks.iter().any(missed) && only(&fleet.site, host).is_none() {
            fleet.rows[host] = Row::Fixed;
            fleet.switches += 2;
            switches.push(Switch::Off(host));
        } else {
            fleet.site.set_open(host, true);
            needed += 1;
        }
    }
    switches
}

/// What the hosts that are on have too little of; with a margin where a host is to go.
fn lacks(fleet: &Fleet, rules: &Rules, given: &Given, margin: bool) -> Vec<Lack> {
    let (more, full) = if margin { (MARGIN, FULL_AFTER) } else { (1.0, FULL) };
    let reserve = f64::from(rules.reserve_hosts) * more;
    let site = &fleet.site;
    // One at a time: what is woken for it counts for the next.
    let mut found: Vec<_> = spare(site, &given.hopeless).into_iter().collect();
    found.extend(fields(site).into_iter().filter_map(|(name, field)| {
        let missing =
            |dimension: usize| (field.largest[dimension] * reserve - field.free[dimension]).max(0.0);
        let missing = [missing(0), missing(1), 0.0];
        // Whom nobody uses waits for somebody to ask.
        let kept = name.is_empty() || field.is_used;
        (kept && missing != [0.0; 3]).then(|| Lack {
            why: Why::Reserve,
            of: Rule::new(site.hosts().len(), |slot| site.hosts()[slot].field == name),
            missing,
        })
    }));
    found.extend(given.expected.iter().filter_map(|(of, expected)| {
        let open = site.hosts().iter().enumerate();
        let open = open.filter(|(slot, host)| host.open && of.allows(*slot));
        let missing = expected / full - open.map(|(_, host)| host.cpus).sum::<f64>();
        (missing > 0.0).then(|| Lack {
            why: Why::Expected,
            of: of.clone(),
            missing: [0.0, 0.0, missing],
        })
    }));
    found
}

/// The first domain that is short and need not be. Hosts of its own fail with it.
fn spare(site: &Site, hopeless: &BTreeSet<(Slot, String)>) -> Option<Lack> {
    let mut short = site.short_domains();
    let short = short.find(|short| !hopeless.contains(&(short.host, short.domain.to_owned())))?;
    let hosts = site.hosts();
    let field = &hosts[short.host].field;
    let fails = |slot: Slot| {
        let mut domains = hosts[slot].fails_with(slot).into_iter();
        domains.any(|domain| domain == short.domain)
    };
    Some(Lack {
        why: Why::Spare,
        of: Rule::new(hosts.len(), |slot| hosts[slot].field == *field && !fails(slot)),
        missing: [short.lacking.vcpus.into(), mib(short.lacking.memory_mib), 0.0],
    })
}

/// Hosts that stand in for each other.
#[derive(Default)]
struct Field {
    /// What is free on those that are open: virtual processors and memory in MiB.
    free: [f64; 2],
    /// The most that one of them has of each.
    largest: [f64; 2],
    /// Some have VMs.
    is_used: bool,
}

fn fields(site: &Site) -> BTreeMap<&str, Field> {
    let mut fields = BTreeMap::<_, Field>::new();
    for (slot, host) in site.hosts().iter().enumerate() {
        let field = fields.entry(host.field.as_str()).or_default();
        let held = site.held(slot);
        let (room, held) = (
            [f64::from(host.vcpus), mib(host.memory_mib)],
            [f64::from(held.vcpus), mib(held.memory_mib)],
        );
        for dimension in [0, 1] {
            field.largest[dimension] = field.largest[dimension].max(room[dimension]);
            if host.open {
                field.free[dimension] += room[dimension] - held[dimension];
            }
        }
        field.is_used |= site.is_on(slot);
    }
    fields
}

/// A VM that could be on no other host but its own and this one, which is closed: were its own to fail, this one is needed.
pub fn only(site: &Site, host: Slot) -> Option<Slot> {
    let open = |rule: Slot| {
        let rule = site.rule(rule);
        let hosts = site.hosts().iter().enumerate();
        let others = hosts.filter(|(slot, other)| *slot != host && other.open && rule.allows(*slot));
        // With two others, a VM that is on one of them has the other.
        others.map(|(slot, _)| slot).take(2).collect::<Vec<_>>()
    };
    let mut known = BTreeMap::new();
    (0..site.vms().len()).find(|slot| {
        let vm = &site.vms()[*slot];
        if vm.host == host || !site.may_have(*slot, host) {
            return false;
        }
        // Where the members of its groups are is another matter for each.
        if !vm.groups.is_empty() {
            let mut others = (0..site.hosts().len()).filter(|other| ![host, vm.host].contains(other));
            return !others.any(|other| site.hosts()[other].open && site.may_have(*slot, other));
        }
        let others = known.entry(vm.rule).or_insert_with(|| open(vm.rule));
        others.iter().all(|other| *other == vm.host)
    })
}

#[cfg(test)]
mod tests;
