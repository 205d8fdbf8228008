//! Rolling maintenance: which hosts can be emptied at the same time, group after group. Pure.
//!
//! A group's VMs are brought back before the next group is emptied, so each group is judged on the site as it is. Where the VMs go in the end
//! is placement's decision, one drain after the other; what is found here is that there is a way.

use std::collections::BTreeMap;

use super::{Move, Site, Slot};

/// A group to which so many hosts in a row could not be added is taken to be full.
const TRIES: usize = 16;

/// What groups must keep to.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Hosts of a group at most.
    pub at_once: usize,
    /// Groups at most: hosts that are left then are not looked at.
    pub groups: usize,
    /// The VMs of any one of the other hosts find room while a group is empty.
    pub spare: bool,
}

/// Hosts that can be empty at the same time, and where their VMs would find room.
#[derive(Debug)]
pub struct Group {
    /// The hosts, in the order in which they were asked for.
    pub hosts: Vec<Slot>,
    /// Their VMs' moves.
    pub moves: Vec<Move>,
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
    let mut draft = Draft::new(site);
    while groups.len() < settings.groups && !left.is_empty() {
        let first = left.remove(0);
        if let Err(why) = draft.add(first, &leaves, settings.spare) {
            held.push((first, why));
            continue;
        }
        let mut refused = 0;
        left.retain(|host| {
            if draft.hosts.len() >= settings.at_once || refused >= TRIES {
                return true;
            }
            let added = draft.add(*host, &leaves, settings.spare).is_ok();
            refused = if added { 0 } else { refused + 1 };
            !added
        });
        groups.push(draft.take());
    }
    (groups, held)
}

/// A group as far as it has come, on one copy of the site: what does not go is taken back, so that each host costs its own VMs' search and no more.
struct Draft<'a> {
    before: &'a Site,
    site: Site,
    hosts: Vec<Slot>,
    /// What was applied, in order: a VM, and the host that it left.
    journal: Vec<(Slot, Slot)>,
}

impl<'a> Draft<'a> {
    fn new(before: &'a Site) -> Self {
        Self {
            before,
            site: before.clone(),
            hosts: Vec::new(),
            journal: Vec::new(),
        }
    }

    /// Empties one more host. What could not be is as it was before.
    fn add(&mut self, host: Slot, leaves: impl Fn(Slot) -> bool, spare: bool) -> Result<(), Held> {
        let mark = self.journal.len();
        self.hosts.push(host);
        self.site.set_open(host, false);
        let emptied = self.empty(host, leaves);
        let added = emptied.and_then(|()| match spare && !can_lose_any(&self.site, &self.hosts) {
            true => Err(Held::SpareRoom),
            false => Ok(()),
        });
        if added.is_err() {
            self.take_back(mark);
            self.hosts.pop();
            self.open(host);
        }
        added
    }

    /// Moves the VMs of a host to the others, also those of the group that had come to it: the largest first, each to where the most is left free.
    fn empty(&mut self, host: Slot, leaves: impl Fn(Slot) -> bool) -> Result<(), Held> {
        let site = &mut self.site;
        let here = site.here(host).iter().copied();
        for vm in largest_first(site, here.filter(|vm| leaves(*vm)).collect()) {
            let fitting = (0..site.hosts().len()).filter(|to| site.has_room(vm, *to).is_ok());
            let to = fitting.max_by(|a, b| free(site, *a).total_cmp(&free(site, *b)).then(b.cmp(a)));
            site.apply(vm, to.ok_or(Held::Vm(vm))?);
            self.journal.push((vm, host));
        }
        Ok(())
    }

    /// The group; the next one begins with the site as it is.
    fn take(&mut self) -> Group {
        let (before, after) = (self.before, &self.site);
        // A VM that has gone on from a host which came to the group later is in the journal once for each.
        let journal = self.journal.iter();
        let first = journal.filter(|(vm, from)| before.vms()[*vm].host == *from);
        let moves = first.map(|(vm, from)| Move {
            vm: *vm,
            from: *from,
            to: after.vms()[*vm].host,
        });
        let moves = moves.collect();
        self.take_back(0);
        let hosts = std::mem::take(&mut self.hosts);
        hosts.iter().for_each(|host| self.open(*host));
        Group { hosts, moves }
    }

    fn take_back(&mut self, mark: usize) {
        for (vm, from) in self.journal.drain(mark..).rev() {
            self.site.apply(vm, from);
        }
    }

    fn open(&mut self, host: Slot) {
        self.site.set_open(host, self.before.hosts()[host].open);
    }
}

fn largest_first(site: &Site, mut vms: Vec<Slot>) -> Vec<Slot> {
    let size = |vm: &Slot| (site.vms()[*vm].memory_mib, site.vms()[*vm].vcpus);
    vms.sort_unstable_by(|a, b| size(b).cmp(&size(a)).then(a.cmp(b)));
    vms
}

/// The lesser share of a host's processors and memory that is free.
fn free(site: &Site, host: Slot) -> f64 {
    let (row, held) = (&site.hosts()[host], site.held(host));
    let share = |held: f64, whole: f64| 1.0 - held / whole.max(1.0);
    #[expect(clippy::cast_precision_loss, reason = "shares to compare")]
    let memory = share(held.memory_mib as f64, row.memory_mib as f64);
    share(held.vcpus.into(), row.vcpus.into()).min(memory)
}

/// Whether the VMs of any one host but the empty ones find room on the open ones: also of a host that takes no VMs, as it can fail too. [`Site::has_spare_room`]
/// knows at once where there is plenty; on a small or full site its account is too careful, and each host's VMs are placed.
fn can_lose_any(site: &Site, empty: &[Slot]) -> bool {
    if site.has_spare_room() {
        return true;
    }
    let hosts = || 0..site.hosts().len();
    // Where the most is free a VM is soon placed.
    let mut others: Vec<_> = hosts()
        .filter(|host| site.hosts()[*host].open)
        .map(|host| (free(site, host), host))
        .collect();
    others.sort_unstable_by(|(a, x), (b, y)| b.total_cmp(a).then(x.cmp(y)));
    let others: Vec<_> = others.into_iter().map(|(_, host)| host).collect();
    let mut lost = hosts().filter(|host| site.is_on(*host) && !empty.contains(host));
    lost.all(|lost| can_lose(site, lost, &others))
}

fn can_lose(site: &Site, lost: Slot, others: &[Slot]) -> bool {
    let mut come = BTreeMap::<Slot, (u32, u64)>::new();
    let vms = largest_first(site, site.here(lost).to_vec());
    vms.into_iter().all(|slot| {
        let vm = &site.vms()[slot];
        let to = others.iter().copied().find(|to| {
            let (row, held) = (&site.hosts()[*to], site.held(*to));
            let (vcpus, memory_mib) = come.get(to).copied().unwrap_or_default();
            site.has_room(slot, *to).is_ok()
                && held.vcpus + vcpus + vm.vcpus <= row.vcpus
                && held.memory_mib + memory_mib + vm.memory_mib <= row.memory_mib
        });
        let Some(to) = to else { return false };
        let (vcpus, memory_mib) = come.entry(to).or_default();
        *vcpus += vm.vcpus;
        *memory_mib += vm.memory_mib;
        true
    })
}
