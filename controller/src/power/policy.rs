//! Which host nobody needs, and which one is needed. Pure; [`runner`](super::runner) carries it out.
//!
//! A site lacks room when the VMs of a host that fails might find none, when less is free than is kept in reserve, or when the VMs are
//! expected to use more within the hour than its processors do without waiting. What lacks room wakes hosts. A host is switched off only where, without
//! it, the site would not lack room *by a margin*: so what was switched off is not woken under the same load, and what was
//! woken is not switched off again.

use std::time::Duration;

use crate::planner::{Site, Slot};

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
    /// Switches in an hour. To switch off takes two of them: its own, and that of waking again.
    pub per_hour: usize,
    /// So much is kept free: the room of this many of the largest host.
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
    /// Processors that the VMs together are expected to use at most within the hour.
    pub expected: f64,
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

/// What is to be done now. Hosts are woken, or they are switched off, never both.
pub fn decide(mut fleet: Fleet, rules: &Rules) -> Vec<Switch> {
    for host in 0..fleet.rows.len() {
        if fleet.rows[host] == Row::Waking {
            fleet.site.set_open(host, true);
        }
    }
    let hopeless = hopeless(&fleet);
    let woken = wake(&mut fleet, rules, hopeless);
    match lack(&fleet, rules, hopeless, false) {
        None if woken.is_empty() => rest(&mut fleet, rules, hopeless),
        _ => woken,
    }
}

/// Domains that would be short though every host were on that can be woken: one that is larger than all others, or alone with its taint.
fn hopeless(fleet: &Fleet) -> usize {
    let mut site = fleet.site.clone();
    for (host, row) in fleet.rows.iter().enumerate() {
        if matches!(row, Row::Off { .. }) {
            site.set_open(host, true);
        }
    }
    site.short()
}

fn wake(fleet: &mut Fleet, rules: &Rules, hopeless: usize) -> Vec<Switch> {
    let mut switches = Vec::new();
    while let Some(why) = lack(fleet, rules, hopeless, false) {
        let urgent = why == Why::Spare;
        let may = |row: &Row| matches!(row, Row::Off { off } if urgent || *off >= rules.min_off);
        let hosts = || (0..fleet.rows.len()).filter(|host| may(&fleet.rows[*host]));
        let held = !urgent && fleet.switches >= rules.per_hour;
        // The largest first, so that few are woken; of equals the first, so that it is the same each time.
        let size = |host: &Slot| {
            let host = &fleet.site.hosts()[*host];
            (host.vcpus, host.memory_mib)
        };
        let Some(host) = hosts().rev().max_by_key(size).filter(|_| !held) else {
            break;
        };
        fleet.site.set_open(host, true);
        fleet.rows[host] = Row::Waking;
        fleet.switches += 1;
        switches.push(Switch::On(host, why));
    }
    switches
}

fn rest(fleet: &mut Fleet, rules: &Rules, hopeless: usize) -> Vec<Switch> {
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
        if lack(fleet, rules, hopeless, true).is_none() && only(&fleet.site, host).is_none() {
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

/// Why the hosts that are on have too little room, if they have; with a margin where a host is to go.
fn lack(fleet: &Fleet, rules: &Rules, hopeless: usize, margin: bool) -> Option<Why> {
    let site = &fleet.site;
    if site.short() > hopeless {
        return Some(Why::Spare);
    }
    let (more, full) = if margin { (MARGIN, FULL_AFTER) } else { (1.0, FULL) };
    let (mut free, mut largest, mut cpus) = ((0.0, 0.0), (0.0_f64, 0.0_f64), 0.0);
    #[expect(clippy::cast_precision_loss, reason = "MiB of a host stay far below 2^53")]
    for (slot, host) in site.hosts().iter().enumerate() {
        let room = (f64::from(host.vcpus), host.memory_mib as f64);
        largest = (largest.0.max(room.0), largest.1.max(room.1));
        if host.open {
            let held = site.held(slot);
            free.0 += room.0 - f64::from(held.vcpus);
            free.1 += room.1 - held.memory_mib as f64;
            cpus += host.cpus;
        }
    }
    let reserve = f64::from(rules.reserve_hosts) * more;
    if free.0 < largest.0 * reserve || free.1 < largest.1 * reserve {
        return Some(Why::Reserve);
    }
    (fleet.expected > cpus * full).then_some(Why::Expected)
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
    let mut known = std::collections::BTreeMap::new();
    (0..site.vms().len()).find(|vm| {
        let vm = &site.vms()[*vm];
        let mut others = || {
            known
                .entry(vm.rule)
                .or_insert_with(|| open(vm.rule))
                .iter()
                .all(|other| *other == vm.host)
        };
        vm.host != host && site.rule(vm.rule).allows(host) && others()
    })
}

#[cfg(test)]
mod tests;
