//! Room for a VM that finds none, though all hosts together have it: a few others move out of its way.
//!
//! What is free lies in pieces, and one host lacks little. Its VMs that make up for what it lacks go to other hosts, each to where the least is left: memory
//! first, which comes in the larger pieces. So far as possible one VM is enough, and the smallest of those that are.
//!
//! Of the hosts that a VM could go to, one is taken that keeps the room for a host that fails. Where there is none any more on the site, which is where room has mostly to be made,
//! reservations alone count, unless the site says that the room is to be kept.

use super::{
    Plan,
    site::{Rule, Site, Slot, Vm},
};
use crate::placement::Size;

/// What may be done to make room.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Moves at most.
    pub moves: usize,
    /// What they copy at most, in MiB.
    pub transfer_mib: u64,
    /// No move may take room of which it is not certain that no host that fails needs it.
    pub moves_keep: bool,
    /// Nor may the VM that comes.
    pub vm_keeps: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            moves: MOVES,
            transfer_mib: u64::MAX,
            moves_keep: false,
            vm_keeps: false,
        }
    }
}

/// More moves than that are no way to make room for one VM.
const MOVES: usize = 8;
/// Hosts that are looked at, those that lack the least first.
const HOSTS: usize = 1024;

/// The moves, the fewest that were found, after which a host has room for a VM of that size that may be where a rule says; and that host. None
/// where there is room as it is, or where none is to be made.
pub fn make_room(site: &Site, size: Size, may: &Rule, settings: &Settings) -> Option<(Plan, Slot)> {
    let mut hosts: Vec<_> = (0..site.hosts().len())
        .filter(|host| may.allows(*host))
        .filter_map(|host| Some((lacking(site, size, host)?, host)))
        .collect();
    hosts.sort_unstable_by(|(a, first), (b, second)| a.share.total_cmp(&b.share).then(first.cmp(second)));
    let mut best: Option<(Plan, Slot)> = None;
    let mut tried = Plan::new(site);
    for (lacking, host) in hosts.into_iter().take(HOSTS) {
        let keeps = |plan: &Plan| !settings.vm_keeps || plan.site().keeps_room(size, host);
        if lacking.vcpus == 0 && lacking.memory_mib == 0 {
            match keeps(&tried) {
                true => return None,
                false => continue,
            }
        }
        let most = best
            .as_ref()
            .map_or(settings.moves, |(plan, _)| plan.moves().len() - 1);
        let settings = Settings {
            moves: most,
            ..*settings
        };
        if clear(&mut tried, host, lacking, settings) && keeps(&tried) {
            best = Some((tried.clone(), host));
        }
        tried.undo();
        if best.as_ref().is_some_and(|(plan, _)| plan.moves().len() == 1) {
            break;
        }
    }
    best
}

/// What a host lacks.
#[derive(Clone, Copy)]
struct Lacking {
    vcpus: u32,
    memory_mib: u64,
    /// The greater share of the host.
    share: f64,
}

impl Lacking {
    /// Whether a VM that leaves makes up for it.
    fn is_met_by(&self, vm: &Vm) -> bool {
        vm.vcpus >= self.vcpus && vm.memory_mib >= self.memory_mib
    }
}

/// What a host lacks for a VM; `None` where it would not have it even if it were empty.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
fn lacking(site: &Site, vm: Size, slot: Slot) -> Option<Lacking> {
    let (host, held) = (&site.hosts()[slot], site.held(slot));
    if !host.open || vm.vcpus > host.vcpus || vm.memory_mib > host.memory_mib {
        return None;
    }
    let vcpus = (held.vcpus + vm.vcpus).saturating_sub(host.vcpus);
    let memory_mib = (held.memory_mib + vm.memory_mib).saturating_sub(host.memory_mib);
    let of_memory = memory_mib as f64 / host.memory_mib as f64;
    Some(Lacking {
        vcpus,
        memory_mib,
        share: of_memory.max(f64::from(vcpus) / f64::from(host.vcpus)),
    })
}

/// Moves VMs off a host until it lacks nothing, and says whether that went.
fn clear(plan: &mut Plan, host: Slot, mut lacking: Lacking, settings: Settings) -> bool {
    let site = plan.site();
    let by_memory = lacking.memory_mib > 0;
    // The smallest of those that are enough, then those that have the most of what is short.
    let key = |slot: &Slot| {
        let vm = &site.vms()[*slot];
        let (memory, vcpus) = (vm.memory_mib, u64::from(vm.vcpus));
        let size = if by_memory {
            (memory, vcpus)
        } else {
            (vcpus, memory)
        };
        match lacking.is_met_by(vm) {
            true => (false, size, *slot),
            false => (true, (u64::MAX - size.0, size.1), *slot),
        }
    };
    let mut vms = site.here(host).to_vec();
    // Whether the VM that comes may be there can depend on the members of groups.
    vms.retain(|vm| site.vms()[*vm].groups.is_empty());
    vms.sort_unstable_by_key(key);
    for slot in vms {
        if plan.moves().len() >= settings.moves {
            return false;
        }
        let vm = &plan.site().vms()[slot];
        let size = (vm.vcpus, vm.memory_mib);
        if vm.transfer_mib > settings.transfer_mib.saturating_sub(plan.transfer_mib()) {
            continue;
        }
        let Some(to) = tightest(plan.site(), slot, host, settings.moves_keep) else {
            continue;
        };
        plan.push_fitting(slot, to);
        lacking.vcpus = lacking.vcpus.saturating_sub(size.0);
        lacking.memory_mib = lacking.memory_mib.saturating_sub(size.1);
        if lacking.vcpus == 0 && lacking.memory_mib == 0 {
            return true;
        }
    }
    false
}

/// The host, other than its own, that has the least left once the VM is there; one without VMs only where no other has room.
fn tightest(site: &Site, vm: Slot, but: Slot, keep: bool) -> Option<Slot> {
    let size = &site.vms()[vm];
    let others = (0..site.hosts().len()).filter(|host| *host != but);
    let fitting = others.filter(|host| site.fits(vm, *host).is_ok());
    let mut fitting: Vec<_> = fitting
        .map(|slot| {
            let (host, held) = (&site.hosts()[slot], site.held(slot));
            let memory_mib = host.memory_mib - held.memory_mib - size.memory_mib;
            let vcpus = host.vcpus - held.vcpus - size.vcpus;
            (!site.is_on(slot), memory_mib, vcpus, slot)
        })
        .collect();
    fitting.sort_unstable();
    let hosts = || fitting.iter().map(|(.., host)| *host);
    let any = || hosts().next().filter(|_| !keep && !site.has_spare_room());
    hosts().find(|host| site.check(vm, *host).is_ok()).or_else(any)
}
