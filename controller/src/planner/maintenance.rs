//! Rolling maintenance: which hosts can be emptied at the same time, group after group. Pure.
//!
//! A group's VMs are brought back before the next group is emptied, so each group is judged on the site as it is. Where the VMs go in the end
//! is placement's decision, one drain after the other; what is found here is that there is a way.

use super::{Move, Plan, Site, Slot};

/// A group to which so many hosts in a row could not be added is taken to be full.
const TRIES: usize = 16;

/// What a group must keep to.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Hosts of a group at most.
    pub at_once: usize,
    /// The VMs of any one of the other hosts find room while a group is empty.
    pub spare: bool,
}

/// Hosts that can be empty at the same time, and where their VMs would find room.
#[derive(Debug)]
pub struct Group {
    /// The hosts, in the order in which they were asked for.
    pub hosts: Vec<Slot>,
    /// Their VMs' moves.
    pub plan: Plan,
}

/// Why a host cannot be emptied, even alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// This VM finds no room elsewhere.
    Vm(Slot),
    /// Were another host to fail meanwhile, its VMs might find no room.
    SpareRoom,
}

/// Sorts hosts into groups, as few and as early as their order allows. `leaves` says which VMs must leave; the others stay through it.
pub fn groups(
    site: &Site,
    hosts: &[Slot],
    leaves: impl Fn(Slot) -> bool,
    settings: Settings,
) -> (Vec<Group>, Vec<(Slot, Held)>) {
    let (mut groups, mut held) = (Vec::new(), Vec::new());
    let mut left = hosts.to_vec();
    while !left.is_empty() {
        let first = left.remove(0);
        let mut plan = match empty(site, &[first], &leaves, settings.spare) {
            Ok(plan) => plan,
            Err(why) => {
                held.push((first, why));
                continue;
            }
        };
        let (mut group, mut refused) = (vec![first], 0);
        left.retain(|host| {
            if group.len() >= settings.at_once || refused >= TRIES {
                return true;
            }
            group.push(*host);
            match empty(site, &group, &leaves, settings.spare) {
                Ok(larger) => {
                    plan = larger;
                    refused = 0;
                    false
                }
                Err(_) => {
                    group.pop();
                    refused += 1;
                    true
                }
            }
        });
        groups.push(Group { hosts: group, plan });
    }
    (groups, held)
}

/// Empties hosts onto the others, the largest VMs first, each to where the most is left free.
fn empty(site: &Site, hosts: &[Slot], leaves: impl Fn(Slot) -> bool, spare: bool) -> Result<Plan, Held> {
    let mut plan = Plan::new(site);
    plan.site.close(hosts);
    let here = hosts.iter().flat_map(|host| site.here(*host)).copied();
    let mut vms: Vec<_> = here.filter(|vm| leaves(*vm)).collect();
    let size = |vm: &Slot| (site.vms()[*vm].memory_mib, site.vms()[*vm].vcpus);
    vms.sort_unstable_by(|a, b| size(b).cmp(&size(a)).then(a.cmp(b)));
    for vm in vms {
        let now = &plan.site;
        let fitting = (0..now.hosts().len()).filter(|to| now.has_room(vm, *to).is_ok());
        let to = fitting.max_by(|a, b| free(now, *a).total_cmp(&free(now, *b)).then(b.cmp(a)));
        let to = to.ok_or(Held::Vm(vm))?;
        let from = now.vms()[vm].host;
        plan.site.apply(vm, to);
        plan.moves.push(Move { vm, from, to });
    }
    match spare && !can_lose_any(&plan.site) {
        true => Err(Held::SpareRoom),
        false => Ok(plan),
    }
}

/// The lesser share of a host's processors and memory that is free.
fn free(site: &Site, host: Slot) -> f64 {
    let (row, held) = (&site.hosts()[host], site.held(host));
    let share = |held: f64, whole: f64| 1.0 - held / whole.max(1.0);
    #[expect(clippy::cast_precision_loss, reason = "shares to compare")]
    let memory = share(held.memory_mib as f64, row.memory_mib as f64);
    share(held.vcpus.into(), row.vcpus.into()).min(memory)
}

/// Whether the VMs of any one open host find room on the others. [`Site::has_spare_room`] knows at once where there is plenty; on a small or full
/// site its account is too careful, and each host's VMs are placed.
fn can_lose_any(site: &Site) -> bool {
    let open = || (0..site.hosts().len()).filter(|host| site.hosts()[*host].open);
    site.has_spare_room() || open().all(|lost| can_lose(site, lost))
}

fn can_lose(site: &Site, lost: Slot) -> bool {
    let mut come = vec![(0, 0); site.hosts().len()];
    let mut vms = site.here(lost).to_vec();
    let size = |vm: &Slot| (site.vms()[*vm].memory_mib, site.vms()[*vm].vcpus);
    vms.sort_unstable_by(|a, b| size(b).cmp(&size(a)).then(a.cmp(b)));
    vms.into_iter().all(|slot| {
        let vm = &site.vms()[slot];
        let to = (0..come.len()).find(|to| {
            let (row, held, (vcpus, memory_mib)) = (&site.hosts()[*to], site.held(*to), come[*to]);
            site.has_room(slot, *to).is_ok()
                && held.vcpus + vcpus + vm.vcpus <= row.vcpus
                && held.memory_mib + memory_mib + vm.memory_mib <= row.memory_mib
        });
        to.map(|to| {
            come[to].0 += vm.vcpus;
            come[to].1 += vm.memory_mib;
        })
        .is_some()
    })
}
