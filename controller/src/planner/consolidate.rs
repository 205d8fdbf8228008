//! Fewer hosts for the same VMs: hosts that are too full are relieved, and what the others can take over is emptied.
//!
//! What a host may hold is a percentile of what its VMs together use, taken for a normal distribution: the sum of the means and so many
//! standard deviations of the sum stay below a share of its processors. Between the hosts that are on, VMs are spread, not stacked: power
//! rises nearly in proportion to use, so only the *number* of hosts costs, and evenly filled ones are too full least often. So a host that is
//! emptied is full of VMs, and is emptied only when all of them fit elsewhere with more to spare than relief asks for: one plan does not
//! undo the one before.
//!
//! What relief moves is what costs the VMs least: one that is enough by itself, with the least product of what it uses and what is copied. But one for which a host that
//! is on has room goes before another for which a host would have to be woken. Hosts are emptied in the order of the same product, over all their VMs.

use super::{
    Plan,
    site::{Load, Site, Slot, Vm},
};

/// How full a host may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fill {
    /// Standard deviations that are kept free.
    pub deviations: f64,
    /// Share of the processors that counts as full.
    pub share: f64,
}

/// How much is asked of a plan, and what it may cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// A host that is fuller is relieved, by what is expected next.
    pub relieve: Fill,
    /// Until it is no fuller than this.
    pub until: Fill,
    /// What emptying may fill the others to, by what is expected in the long run. They must besides not come to be relieved next.
    pub empty: Fill,
    /// Hosts that one plan empties at most.
    pub hosts: usize,
    /// Moves of one plan at most.
    pub moves: usize,
    /// What a plan copies at most, in MiB. A host is emptied within that, or left.
    pub transfer_mib: u64,
}

impl Settings {
    /// What is left for a plan: moves, and MiB.
    fn left(&self, plan: &Plan) -> (usize, u64) {
        (
            self.moves.saturating_sub(plan.moves().len()),
            self.transfer_mib.saturating_sub(plan.transfer_mib()),
        )
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            relieve: Fill {
                deviations: 0.0,
                share: 0.98,
            },
            until: Fill {
                deviations: 0.0,
                share: 0.98,
            },
            empty: Fill {
                deviations: 1.1,
                share: 0.98,
            },
            hosts: usize::MAX,
            moves: usize::MAX,
            transfer_mib: u64::MAX,
        }
    }
}

/// What hosts are filled to by VMs that have to leave others, as long as that goes.
const COMFORTABLE: Fill = Fill {
    deviations: 1.0,
    share: 0.85,
};
/// What hosts are filled to by a VM that relieves another, by what is expected in the long run: less certain than emptying, for no host is woken then.
const RELIEVING: Fill = Fill {
    deviations: 0.6,
    share: 1.0,
};
/// Hosts that are tried as the first to be emptied.
const PASSED_OVER: usize = 16;
/// Reservations alone count.
const ANY: Fill = Fill {
    deviations: 0.0,
    share: f64::INFINITY,
};

/// Which of the two things that are expected.
#[derive(Clone, Copy)]
enum By {
    Mean,
    Next,
}

impl By {
    const fn of(self, load: &Load) -> f64 {
        match self {
            Self::Mean => load.mean,
            Self::Next => load.next,
        }
    }
}

/// How full a host is in units of its processors, with another VM or without one.
fn level(site: &Site, host: Slot, by: By, deviations: f64, change: Option<(f64, &Load)>) -> f64 {
    let held = site.held(host);
    let sum = match by {
        By::Mean => held.mean,
        By::Next => held.next,
    };
    let (more, variance) = change.map_or((0.0, 0.0), |(sign, load)| {
        (sign * by.of(load), sign * load.variance)
    });
    (sum + more + deviations * (held.variance + variance).max(0.0).sqrt()) / site.hosts()[host].cpus
}

/// How full a host is, with another VM too or as it is, by what is expected in the long run.
pub(super) fn filled(site: &Site, host: Slot, fill: Fill, more: Option<&Load>) -> f64 {
    level(
        site,
        host,
        By::Mean,
        fill.deviations,
        more.map(|load| (1.0, load)),
    )
}

/// Whether one processor of the host is enough for each of the VM's.
pub(super) fn runs_on(site: &Site, vm: Slot, host: Slot, fill: Fill) -> bool {
    let vm = &site.vms()[vm];
    let most = vm.load.mean.max(vm.load.next) + 0.5 * fill.deviations * vm.load.variance.sqrt();
    most <= site.hosts()[host].core * f64::from(vm.vcpus)
}

/// Where VMs may go.
#[derive(Clone, Copy)]
struct Receivers<'a> {
    by: By,
    /// How full they may become.
    fill: Fill,
    /// How sure it is to be that one processor is enough for each of the VM's.
    runs: Fill,
    /// From where on they would have to be relieved.
    relieve: Fill,
    shut: &'a [bool],
}

impl Receivers<'_> {
    fn takes(&self, site: &Site, vm: Slot, host: Slot) -> bool {
        let more = Some((1.0, &site.vms()[vm].load));
        !self.shut[host]
            && level(site, host, By::Next, self.relieve.deviations, more) <= self.relieve.share
            && runs_on(site, vm, host, self.runs)
    }

    /// The host with the most room of those that are on.
    fn of(&self, site: &Site, vm: Slot) -> Option<Slot> {
        let load = &site.vms()[vm].load;
        let on = (0..site.hosts().len()).filter(|host| site.is_on(*host) && self.takes(site, vm, *host));
        let level = |host| level(site, host, self.by, self.fill.deviations, Some((1.0, load)));
        let mut fitting: Vec<_> = on
            .map(|host| (level(host), host))
            .filter(|(level, host)| *level <= self.fill.share && site.fits(vm, *host).is_ok())
            .collect();
        fitting.sort_unstable_by(|(a, first), (b, second)| a.total_cmp(b).then(first.cmp(second)));
        let mut hosts = fitting.into_iter().map(|(_, host)| host);
        hosts.find(|host| site.check(vm, *host).is_ok())
    }

    /// A host that is empty, the cheapest first.
    fn empty(&self, site: &Site, vm: Slot) -> Option<Slot> {
        let off = (0..site.hosts().len()).filter(|host| !site.is_on(*host) && self.takes(site, vm, *host));
        let fitting = off.filter(|host| site.check(vm, *host).is_ok());
        let cost = |host: &Slot| site.hosts()[*host].cost;
        fitting.min_by(|a, b| cost(a).total_cmp(&cost(b)).then(a.cmp(b)))
    }
}

/// Makes a plan.
pub fn consolidate(site: &Site, settings: &Settings) -> Plan {
    let mut plan = Plan::new(site);
    let full = |site: &Site, host: Slot| {
        level(site, host, By::Next, settings.relieve.deviations, None) > settings.relieve.share
    };
    let over: Vec<_> = (0..site.hosts().len()).filter(|host| full(site, *host)).collect();
    let mut shut = vec![false; site.hosts().len()];
    over.iter().for_each(|host| shut[*host] = true);
    for host in &over {
        relieve(&mut plan, *host, settings, &shut);
    }
    // While a host cannot be relieved, none is to be emptied.
    if !over.iter().any(|host| full(plan.site(), *host)) {
        plan.moves().iter().for_each(|step| shut[step.to] = true);
        empty(&mut plan, settings, &shut);
    }
    plan
}

fn relieve(plan: &mut Plan, host: Slot, settings: &Settings, shut: &[bool]) {
    let until = settings.until;
    let receivers = Receivers {
        by: By::Mean,
        fill: RELIEVING,
        // A VM that uses all its processors has nowhere to go where that is better.
        runs: settings.relieve,
        relieve: settings.relieve,
        shut,
    };
    while plan.site().here(host).len() > 1
        && level(plan.site(), host, By::Next, until.deviations, None) > until.share
    {
        let site = plan.site();
        let (moves, mib) = settings.left(plan);
        let mut vms = to_relieve(site, host, until);
        vms.retain(|vm| moves > 0 && site.vms()[*vm].transfer_mib <= mib);
        let on = vms.iter().find_map(|vm| Some((*vm, receivers.of(site, *vm)?)));
        let woken = || {
            let vm = *vms.first()?;
            Some((vm, receivers.empty(site, vm)?))
        };
        match on.or_else(woken) {
            Some((vm, to)) => plan.push(vm, to),
            None => return,
        }
    }
}

/// The VMs that a full host may give away, the best first. One that does next to nothing would not help.
fn to_relieve(site: &Site, host: Slot, until: Fill) -> Vec<Slot> {
    let least = site.hosts()[host].cpus / 250.0;
    let vms = site.here(host).iter().map(|vm| (*vm, &site.vms()[*vm]));
    let vms = vms.filter(|(_, vm)| vm.pinned.is_empty() && vm.load.next > least);
    let ranked = vms.map(|(slot, vm)| {
        let short = level(site, host, By::Next, until.deviations, Some((-1.0, &vm.load))) > until.share;
        // Enough, with the least of its work held up for the least time; else the most relief for what is copied.
        let cost = if short {
            -vm.load.next / copied(vm)
        } else {
            held_up(vm)
        };
        (short, cost, slot)
    });
    let mut ranked: Vec<_> = ranked.collect();
    ranked.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
    ranked.into_iter().map(|(.., slot)| slot).collect()
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
fn copied(vm: &Vm) -> f64 {
    vm.transfer_mib.max(1) as f64
}

/// How much of a VM's work a move holds up.
fn held_up(vm: &Vm) -> f64 {
    vm.load.next * copied(vm)
}

/// Empties as many hosts as the others can take over, the dearest first, and those whose VMs are held up the least.
fn empty(plan: &mut Plan, settings: &Settings, shut: &[bool]) {
    let site = plan.site();
    let movable = |host: &Slot| {
        site.here(*host)
            .iter()
            .all(|vm| site.vms()[*vm].pinned.is_empty())
    };
    let resting = |host: &Slot| site.hosts()[*host].resting;
    let mut on: Vec<_> = (0..site.hosts().len())
        .filter(|host| site.is_on(*host) && !shut[*host] && !resting(host) && movable(host))
        .map(|host| {
            let vms = site.here(host).iter().map(|vm| held_up(&site.vms()[*vm]));
            (site.hosts()[host].cost, vms.sum::<f64>(), host)
        })
        .collect();
    on.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
    let on: Vec<_> = on.into_iter().map(|(.., host)| host).collect();
    // One whose VMs have nowhere to go would keep all others on.
    let found = (0..on.len().min(PASSED_OVER)).find_map(|first| {
        let hosts = affordable(plan, &on[first..], settings);
        halved(plan, &hosts, settings, shut)
    });
    if let Some(found) = found {
        *plan = found;
    }
}

/// Those of the hosts, in their order, that can be emptied within what is left: one that is too large is passed over.
fn affordable(plan: &Plan, hosts: &[Slot], settings: &Settings) -> Vec<Slot> {
    let site = plan.site();
    let (mut moves, mut mib) = settings.left(plan);
    let mut affords = |host: &Slot| {
        let vms = site.here(*host);
        let copied = vms.iter().map(|vm| site.vms()[*vm].transfer_mib);
        let copied = copied.fold(0, u64::saturating_add);
        let left = moves.checked_sub(vms.len()).zip(mib.checked_sub(copied));
        (moves, mib) = left.unwrap_or((moves, mib));
        left.is_some()
    };
    hosts.iter().copied().filter(|host| affords(host)).collect()
}

/// The plan with as many of these hosts emptied too as can be, in their order. The more hosts, the harder: the most are found by halving.
fn halved(plan: &Plan, on: &[Slot], settings: &Settings, shut: &[bool]) -> Option<Plan> {
    let (mut most, mut low, mut high) = (None, 0, on.len().min(settings.hosts));
    while low < high {
        let hosts = (low + high).div_ceil(2);
        match emptied(plan, &on[..hosts], settings, shut) {
            Some(found) => (most, low) = (Some(found), hosts),
            None => high = hosts - 1,
        }
    }
    most
}

/// The plan with these hosts emptied too, where the others can take all.
fn emptied(plan: &Plan, hosts: &[Slot], settings: &Settings, shut: &[bool]) -> Option<Plan> {
    let mut plan = plan.clone();
    let mut shut = shut.to_vec();
    hosts.iter().for_each(|host| shut[*host] = true);
    let mut vms: Vec<_> = hosts
        .iter()
        .flat_map(|host| plan.site().here(*host))
        .copied()
        .collect();
    let size = |vm: &Slot| {
        let load = &plan.site().vms()[*vm].load;
        load.mean + load.variance.sqrt()
    };
    vms.sort_unstable_by(|a, b| size(b).total_cmp(&size(a)).then(a.cmp(b)));
    let receivers = Receivers {
        by: By::Mean,
        fill: settings.empty,
        runs: settings.empty,
        relieve: settings.relieve,
        shut: &shut,
    };
    for vm in vms {
        let to = receivers.of(plan.site(), vm)?;
        plan.push(vm, to);
    }
    Some(plan)
}

/// Empties these hosts, as far as the others have room for their VMs: what finds none stays, and is told of.
pub fn evacuate(site: &Site, hosts: &[Slot]) -> Plan {
    let mut plan = Plan::new(site);
    let mut shut = vec![false; site.hosts().len()];
    hosts.iter().for_each(|host| shut[*host] = true);
    let mut vms: Vec<_> = hosts.iter().flat_map(|host| site.here(*host)).copied().collect();
    let size = |vm: &Slot| (site.vms()[*vm].memory_mib, site.vms()[*vm].vcpus);
    vms.sort_unstable_by(|a, b| size(b).cmp(&size(a)).then(a.cmp(b)));
    // Hosts that are on and stay comfortable, else empty ones, else whatever has room.
    let comfortable = Receivers {
        by: By::Mean,
        fill: COMFORTABLE,
        runs: COMFORTABLE,
        relieve: COMFORTABLE,
        shut: &shut,
    };
    let any = Receivers {
        fill: ANY,
        runs: ANY,
        relieve: ANY,
        ..comfortable
    };
    for vm in vms {
        let site = plan.site();
        let to = comfortable
            .of(site, vm)
            .or_else(|| any.empty(site, vm))
            .or_else(|| any.of(site, vm));
        if let Some(to) = to {
            plan.push(vm, to);
        }
    }
    plan
}
