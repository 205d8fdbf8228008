//! Room for the VMs of a failure domain that fails: one account, kept up to date with each change of a host, for placement, the
//! engine, and the planner.
//!
//! ```text
//!   hosts with the same hard taints ──> field ──> room of its hosts, by classes of VM
//!                                         └─────> domain ──> room of its own hosts, and what its VMs need, by the same classes
//! ```
//!
//! A domain *is kept* while its VMs, in whatever order those of one class come, find room on the other hosts of their field that take VMs. Let a VM's
//! share be the greater of its shares in processors and memory, and a host's room the lesser of what is free of the two. VMs of a class have shares up to
//! `L`, all of them more than `l`, and larger classes go first. If a VM finds no room, each other host with a room of `r ≥ L` has taken at least one VM, and more than
//! `r - L` in processors or in memory: shares that add up to more than `max(r - L, l)`. So all of them find room if, for each class that the domain has VMs of,
//! these sums over the other hosts are at least the shares of all of its VMs of that class and of larger ones, but for `l` of the VM itself.
//! That is enough, and more than is needed: where the account says no and the field is small, the VMs are packed, the largest first, each where the least is left.
//!
//! Pools, labels and bridges are not looked at: it is about processors and memory.

mod peaks;
mod protect;
mod share;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dalgu_proto::ids::HostName;

pub use self::protect::Protect;
use self::{
    peaks::{NONE, Peaks, exceeds},
    share::{CLASSES, Shares, as_size, more_than, of_room, of_vm},
};
use super::{
    Each, charged,
    score::Size,
    view::{HostView, Request},
};

/// Fields of so many hosts are small. The small sites of the tests have both.
const SMALL: usize = if cfg!(test) { 4 } else { 64 };

/// VMs of one size, and how many.
pub type Sized = (Size, u32);

/// A host as the account sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// What VMs may reserve.
    pub capacity: Size,
    /// What they do.
    pub reserved: Size,
    /// Whether it would take VMs of a host that fails.
    pub takes: bool,
    /// Hosts of one field stand in for each other.
    pub field: String,
    /// Protected domains that it is of.
    pub domains: Vec<String>,
    /// The VMs that need room elsewhere once it fails.
    pub vms: Vec<Sized>,
}

impl Row {
    /// What the account knows of a host.
    pub fn of(view: &HostView<'_>, protect: &Protect) -> Self {
        let hard = view.taints.iter().filter(|taint| !taint.soft);
        let mut field = String::new();
        for taint in hard {
            field.extend([&taint.key, "=", &taint.value, " "]);
        }
        // A lower ratio keeps new VMs off a host that is busy now. Were another to fail, its VMs would start there all the same: room that the operator has granted.
        let ratio = view.cpu_overcommit_ratio.max(view.own_cpu_overcommit_ratio);
        let dedicated = view.parts.taken.dedicated();
        let shared = view
            .vcpus_reserved
            .saturating_sub(charged(dedicated, view.cpu_overcommit_ratio));
        Self {
            capacity: Size {
                vcpus: view.vcpus_capacity_by(ratio),
                ..Size::capacity(view)
            },
            reserved: Size {
                vcpus: shared.saturating_add(charged(dedicated, ratio)),
                memory_mib: view.memory_mib_reserved,
            },
            // What relieves a host that its load has closed also opens it.
            takes: view.ready && !view.cordoned,
            field,
            domains: protect.domains(&view.name, &view.labels),
            vms: view.vm_sizes.clone(),
        }
    }

    fn free(&self) -> Size {
        free(self.takes, self.capacity, self.reserved)
    }

    /// Has a VM come.
    pub fn put(&mut self, vm: Size) {
        self.reserved.vcpus = self.reserved.vcpus.saturating_add(vm.vcpus);
        self.reserved.memory_mib = self.reserved.memory_mib.saturating_add(vm.memory_mib);
        match self.vms.iter_mut().find(|(size, _)| *size == vm) {
            Some((_, count)) => *count += 1,
            None => self.vms.push((vm, 1)),
        }
    }

    /// Has a VM gone.
    pub fn take(&mut self, vm: Size) {
        self.reserved.vcpus = self.reserved.vcpus.saturating_sub(vm.vcpus);
        self.reserved.memory_mib = self.reserved.memory_mib.saturating_sub(vm.memory_mib);
        if let Some((_, count)) = self.vms.iter_mut().find(|(size, _)| *size == vm) {
            *count -= 1;
        }
        self.vms.retain(|(_, count)| *count > 0);
    }
}

/// What would change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// A VM leaves a host.
    pub leaves: Option<(usize, Size)>,
    /// A VM comes to a host: the same one, or one that is as large as that one has become.
    pub comes: (usize, Size),
}

/// A domain whose VMs would not find room, and what they lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short<'a> {
    /// Its name, for example "rack r1".
    pub domain: &'a str,
    /// The first of its hosts.
    pub host: usize,
    /// What is lacking; where the field is large, as the account has it.
    pub lacking: Size,
}

/// Whether hosts keep room for protected domains, were a VM that is asked for to come to them.
#[derive(Debug)]
pub struct Kept {
    spare: Spare,
    /// In order, which is that of the account.
    names: Vec<HostName>,
    vm: Size,
    leaves: Option<(usize, Size)>,
}

impl Kept {
    /// `None` where nobody asks.
    pub(super) fn of(request: &Request, each: Each<'_>, protect: Option<&Protect>) -> Option<Self> {
        let protect = protect.filter(|protect| !protect.is_empty() && !request.ignore_protection)?;
        let mut rows = Vec::new();
        each(&mut |host| rows.push((host.name.clone(), Row::of(host, protect))));
        // Which of several domains is told does not depend on the order that they came in.
        rows.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let (names, rows): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let vm = Size::of(request);
        let source = request.exclude.as_ref();
        let source = source.and_then(|source| names.binary_search(source).ok());
        let spare = Spare::new(rows);
        if source.is_some_and(|source| spare.is_left(source)) {
            return None;
        }
        Some(Self {
            leaves: source.map(|source| (source, vm)),
            spare,
            names,
            vm,
        })
    }

    /// Whether this one does.
    pub(super) fn check(&self, host: &HostName) -> Result<(), Short<'_>> {
        let slot = self.names.binary_search(host);
        slot.map_or(Ok(()), |slot| {
            self.spare.check(Step {
                leaves: self.leaves,
                comes: (slot, self.vm),
            })
        })
    }
}

/// What some hosts hold, by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sums {
    /// Room.
    room: Shares,
    /// Shares of the VMs of a class, and of larger ones.
    need: Shares,
    /// VMs of a class.
    vms: [u32; CLASSES],
}

fn add(to: &mut Shares, by: &Shares) {
    to.iter_mut().zip(by).for_each(|(to, by)| *to += by);
}

impl Sums {
    fn add(&mut self, other: &Self) {
        for class in 0..CLASSES {
            self.room[class] += other.room[class];
            self.need[class] += other.need[class];
            self.vms[class] += other.vms[class];
        }
    }

    fn less(&mut self, other: &Self) {
        for class in 0..CLASSES {
            self.room[class] -= other.room[class];
            self.need[class] -= other.need[class];
            self.vms[class] -= other.vms[class];
        }
    }

    fn put(&mut self, vm: Size, count: u32, whole: Size) {
        let (share, of) = of_vm(vm, whole);
        self.vms[of] += count;
        self.need[of..]
            .iter_mut()
            .for_each(|need| *need += share * i64::from(count));
    }

    fn take(&mut self, vm: Size, whole: Size) {
        let (share, of) = of_vm(vm, whole);
        self.vms[of] -= 1;
        self.need[of..].iter_mut().for_each(|need| *need -= share);
    }

    /// What the room of the whole field must be for these to be kept.
    fn asked(&self) -> Shares {
        std::array::from_fn(|class| match self.vms[class] {
            0 => NONE,
            _ => self.room[class] + self.need[class] - more_than(class),
        })
    }
}

#[derive(Debug, Clone)]
struct Host {
    row: Row,
    field: usize,
    /// Places of its domains in the field.
    domains: Vec<usize>,
    sums: Sums,
}

#[derive(Debug, Clone, Default)]
struct Field {
    room: Shares,
    hosts: BTreeSet<usize>,
    names: HashMap<String, usize>,
    domains: Vec<Domain>,
    /// What each domain asks for.
    asked: Peaks,
}

#[derive(Debug, Clone, Default)]
struct Domain {
    name: String,
    hosts: BTreeSet<usize>,
    sums: Sums,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Spare {
    whole: Size,
    /// Capacities, and how many hosts have each.
    vcpus: BTreeMap<u32, usize>,
    memory_mib: BTreeMap<u64, usize>,
    hosts: Vec<Option<Host>>,
    fields: Vec<Field>,
    names: HashMap<String, usize>,
}

impl Spare {
    /// Of all hosts; each is known by its place among them.
    pub fn new(rows: impl IntoIterator<Item = Row>) -> Self {
        let mut spare = Self::default();
        for (slot, row) in rows.into_iter().enumerate() {
            spare.count(&row, true);
            spare.hosts.push(None);
            spare.whole = spare.largest();
            // Linked below, once it is known which is the largest.
            spare.hosts[slot] = Some(Host {
                row,
                field: 0,
                domains: Vec::new(),
                sums: Sums::default(),
            });
        }
        spare.rebuild();
        spare
    }

    /// Of hosts as placement sees them.
    pub fn of(views: &[HostView<'_>], protect: &Protect) -> Self {
        Self::new(views.iter().map(|view| Row::of(view, protect)))
    }

    /// What is true of a host now, known or new.
    pub fn set(&mut self, slot: usize, row: Row) {
        if self.hosts.len() <= slot {
            self.hosts.resize(slot + 1, None);
        }
        if let Some(old) = self.unlink(slot) {
            self.count(&old, false);
        }
        self.count(&row, true);
        self.link(slot, row);
        if self.whole != self.largest() {
            self.whole = self.largest();
            self.rebuild();
        }
    }

    /// Changes what is on a host.
    pub fn update(&mut self, slot: usize, change: impl FnOnce(&mut Row)) {
        if let Some(mut row) = self.unlink(slot) {
            change(&mut row);
            self.link(slot, row);
        }
    }

    /// Forgets a host; the last one has its place then.
    pub fn swap_remove(&mut self, slot: usize) {
        let Some(last) = self.hosts.len().checked_sub(1) else {
            return;
        };
        if let Some(old) = self.unlink(slot) {
            self.count(&old, false);
        }
        if last != slot
            && let Some(row) = self.unlink(last)
        {
            self.link(slot, row);
        }
        self.hosts.truncate(last);
        if self.whole != self.largest() {
            self.whole = self.largest();
            self.rebuild();
        }
    }

    fn count(&mut self, row: &Row, add: bool) {
        fn change<T: Ord>(counts: &mut BTreeMap<T, usize>, value: T, add: bool) {
            let count = counts.entry(value).or_default();
            *count = if add { *count + 1 } else { count.saturating_sub(1) };
        }
        change(&mut self.vcpus, row.capacity.vcpus, add);
        change(&mut self.memory_mib, row.capacity.memory_mib, add);
        if !add {
            self.vcpus.retain(|_, count| *count > 0);
            self.memory_mib.retain(|_, count| *count > 0);
        }
    }

    fn largest(&self) -> Size {
        Size {
            vcpus: self.vcpus.last_key_value().map_or(0, |(most, _)| *most),
            memory_mib: self.memory_mib.last_key_value().map_or(0, |(most, _)| *most),
        }
    }

    fn rebuild(&mut self) {
        self.fields.clear();
        self.names.clear();
        for slot in 0..self.hosts.len() {
            if let Some(host) = self.hosts[slot].take() {
                self.link(slot, host.row);
            }
        }
    }

    fn link(&mut self, slot: usize, row: Row) {
        let field = match self.names.get(&row.field) {
            Some(known) => *known,
            None => {
                self.names.insert(row.field.clone(), self.fields.len());
                self.fields.push(Field::default());
                self.fields.len() - 1
            }
        };
        let mut sums = Sums {
            room: of_room(row.free(), self.whole),
            ..Sums::default()
        };
        row.vms
            .iter()
            .for_each(|(vm, count)| sums.put(*vm, *count, self.whole));
        let into = &mut self.fields[field];
        into.hosts.insert(slot);
        add(&mut into.room, &sums.room);
        let mut domains = Vec::with_capacity(row.domains.len());
        for name in &row.domains {
            let at = match into.names.get(name) {
                Some(known) => *known,
                None => {
                    into.names.insert(name.clone(), into.domains.len());
                    into.domains.push(Domain {
                        name: name.clone(),
                        ..Domain::default()
                    });
                    into.domains.len() - 1
                }
            };
            let domain = &mut into.domains[at];
            domain.hosts.insert(slot);
            domain.sums.add(&sums);
            into.asked.set(at, domain.sums.asked());
            domains.push(at);
        }
        self.hosts[slot] = Some(Host {
            row,
            field,
            domains,
            sums,
        });
    }

    fn unlink(&mut self, slot: usize) -> Option<Row> {
        let Host {
            row,
            field,
            domains,
            sums,
        } = self.hosts.get_mut(slot)?.take()?;
        let from = &mut self.fields[field];
        from.hosts.remove(&slot);
        for class in 0..CLASSES {
            from.room[class] -= sums.room[class];
        }
        for at in domains {
            let domain = &mut from.domains[at];
            domain.hosts.remove(&slot);
            domain.sums.less(&sums);
            from.asked.set(at, domain.sums.asked());
        }
        Some(row)
    }

    /// Whether every domain is kept.
    pub fn keeps(&self) -> bool {
        self.short_domains().next().is_none()
    }

    /// Domains that are not kept, or not for certain, and what they lack.
    pub fn short_domains(&self) -> impl Iterator<Item = Short<'_>> {
        self.fields.iter().flat_map(move |field| {
            let mut short = Vec::new();
            field.asked.above(&field.room, |at| {
                if !self.is_kept(field, at) {
                    short.push(at);
                }
                true
            });
            short.into_iter().map(move |at| self.short(field, at, None))
        })
    }

    /// Protected domains, by name: of each field its own.
    pub fn domains(&self) -> usize {
        let domains = self.fields.iter().flat_map(|field| &field.domains);
        domains.filter(|domain| !domain.hosts.is_empty()).count()
    }

    /// Whether a host takes none of the VMs of one that fails: it is lost itself, or to be emptied. Its own may go wherever there is room, as
    /// room is kept for just that.
    pub fn is_left(&self, slot: usize) -> bool {
        self.host(slot).is_some_and(|host| !host.row.takes)
    }

    /// Whether all domains that are kept would still be, and no other would be further from it.
    pub fn allows(&self, step: Step) -> bool {
        self.lost(step).is_none()
    }

    /// The first domain for which that is not so.
    pub fn check(&self, step: Step) -> Result<(), Short<'_>> {
        match self.lost(step) {
            None => Ok(()),
            Some((field, at)) => {
                let after = After::new(self, field, step);
                Err(self.short(&self.fields[field], at, Some(&after)))
            }
        }
    }

    fn host(&self, slot: usize) -> Option<&Host> {
        self.hosts.get(slot)?.as_ref()
    }

    fn lost(&self, step: Step) -> Option<(usize, usize)> {
        let to = self.host(step.comes.0)?;
        let field = &self.fields[to.field];
        let after = After::new(self, to.field, step);
        let mut touched = Vec::new();
        for change in after.changes.iter().flatten() {
            let host = self.host(change.slot);
            touched.extend(host.into_iter().flat_map(|host| &host.domains).copied());
        }
        let mut lost = touched
            .iter()
            .copied()
            .find(|at| !self.passes(field, *at, &after));
        if lost.is_none() {
            field.asked.above(&after.room, |at| {
                if !touched.contains(&at) && !self.passes(field, at, &after) {
                    lost = Some(at);
                }
                lost.is_none()
            });
        }
        lost.map(|at| (to.field, at))
    }

    /// Whether a domain is kept after a change, or at least no further from it.
    fn passes(&self, field: &Field, at: usize, after: &After) -> bool {
        let asked = after.sums(self, field, at).asked();
        if !exceeds(&asked, &after.room) || self.packs(field, at, Some(after)) {
            return true;
        }
        if self.is_kept(field, at) {
            return false;
        }
        // What cannot be told may be so; only a move must be possible all the same.
        if after.adds && !self.is_hopeless(field, at) {
            return false;
        }
        if field.hosts.len() <= SMALL {
            let (before, then) = (
                self.unpacked(field, at, None),
                self.unpacked(field, at, Some(after)),
            );
            return before.checked_less(then).is_some();
        }
        let (before, then) = (self.hoped(field, at, None), self.hoped(field, at, Some(after)));
        (0..CLASSES).all(|class| {
            let margin = field.room[class].saturating_sub(before[class]);
            after.room[class].saturating_sub(then[class]) >= margin.min(0)
        })
    }

    /// What a domain asks for without the VMs that no other host has the room for now, whatever else is done.
    fn hoped(&self, field: &Field, at: usize, after: Option<&After>) -> Shares {
        let mut known = BTreeMap::new();
        let mut sums = Sums {
            room: match after {
                None => field.domains[at].sums.room,
                Some(after) => after.sums(self, field, at).room,
            },
            ..Sums::default()
        };
        for vm in self.vms(field, at, after) {
            if *known.entry(vm).or_insert_with(|| self.fits(field, at, vm)) {
                sums.put(vm, 1, self.whole);
            }
        }
        sums.asked()
    }

    /// Whether another host has room for a VM of a domain now.
    fn fits(&self, field: &Field, at: usize, vm: Size) -> bool {
        self.others(field, at, None)
            .any(|free| free.checked_less(vm).is_some())
    }

    fn is_kept(&self, field: &Field, at: usize) -> bool {
        !exceeds(&field.asked.get(at), &field.room) || self.packs(field, at, None)
    }

    /// Whether a domain's VMs can be packed on the other hosts of a small field.
    fn packs(&self, field: &Field, at: usize, after: Option<&After>) -> bool {
        field.hosts.len() <= SMALL && self.unpacked(field, at, after) == Size::default()
    }

    /// What is left of a domain's VMs when they are packed on the others, the largest first, each where the least is left.
    fn unpacked(&self, field: &Field, at: usize, after: Option<&After>) -> Size {
        let share = |size: &Size| {
            let part = |part: u64, whole: u64| (part << 20) / whole.max(1);
            (
                part(size.vcpus.into(), self.whole.vcpus.into()),
                part(size.memory_mib, self.whole.memory_mib),
            )
        };
        let mut vms = self.vms(field, at, after);
        vms.sort_unstable_by_key(|vm| {
            let (vcpus, memory) = share(vm);
            std::cmp::Reverse((vcpus.max(memory), *vm))
        });
        let mut free: Vec<_> = self.others(field, at, after).collect();
        free.sort_unstable();
        let mut left = Size::default();
        for vm in vms {
            let fitting = free
                .iter_mut()
                .filter_map(|free| Some((free.checked_less(vm)?, free)));
            match fitting.min_by_key(|(rest, _)| {
                let (vcpus, memory) = share(rest);
                (vcpus + memory, *rest)
            }) {
                Some((rest, free)) => *free = rest,
                None => {
                    left.vcpus = left.vcpus.saturating_add(vm.vcpus);
                    left.memory_mib = left.memory_mib.saturating_add(vm.memory_mib);
                }
            }
        }
        left
    }

    /// The VMs of a domain.
    fn vms(&self, field: &Field, at: usize, after: Option<&After>) -> Vec<Size> {
        let mut vms = Vec::new();
        for slot in &field.domains[at].hosts {
            let sized = self.host(*slot).into_iter().flat_map(|host| &host.row.vms);
            for (vm, count) in sized {
                vms.extend(std::iter::repeat_n(*vm, usize::try_from(*count).unwrap_or(0)));
            }
            let Some(change) = after.and_then(|after| after.of(*slot)) else {
                continue;
            };
            if let Some(gone) = change
                .leaves
                .and_then(|vm| vms.iter().rposition(|other| *other == vm))
            {
                vms.swap_remove(gone);
            }
            vms.extend(change.comes);
        }
        vms
    }

    /// What is free on the hosts of the field that are not of a domain.
    fn others<'s>(
        &'s self,
        field: &'s Field,
        at: usize,
        after: Option<&'s After>,
    ) -> impl Iterator<Item = Size> + 's {
        let hosts = field
            .hosts
            .iter()
            .filter_map(|slot| Some((slot, self.host(*slot)?)));
        let others = hosts.filter(move |(_, host)| host.row.takes && !host.domains.contains(&at));
        others.map(move |(slot, host)| {
            let changed = after.and_then(|after| after.of(*slot));
            changed.map_or_else(|| host.row.free(), |change| change.free)
        })
    }

    /// Whether a domain's VMs cannot find room now, however they are packed.
    fn is_hopeless(&self, field: &Field, at: usize) -> bool {
        let sized = |slot: &usize| self.host(*slot).into_iter().flat_map(|host| &host.row.vms);
        let vms = || field.domains[at].hosts.iter().flat_map(sized);
        let sum = |sizes: &mut dyn Iterator<Item = (Size, u32)>| {
            sizes.fold((0_u128, 0_u128), |(vcpus, memory), (size, count)| {
                let count = u128::from(count);
                (
                    vcpus + u128::from(size.vcpus) * count,
                    memory + u128::from(size.memory_mib) * count,
                )
            })
        };
        let need = sum(&mut vms().copied());
        let room = sum(&mut self.others(field, at, None).map(|free| (free, 1)));
        need.0 > room.0 || need.1 > room.1 || vms().any(|(vm, _)| !self.fits(field, at, *vm))
    }

    fn short<'s>(&'s self, field: &'s Field, at: usize, after: Option<&After>) -> Short<'s> {
        let domain = &field.domains[at];
        let lacking = if field.hosts.len() <= SMALL {
            self.unpacked(field, at, after)
        } else {
            let (asked, room) = match after {
                None => (field.asked.get(at), &field.room),
                Some(after) => (after.sums(self, field, at).asked(), &after.room),
            };
            let over = asked
                .iter()
                .zip(room)
                .map(|(asked, room)| asked.saturating_sub(*room));
            as_size(over.max().unwrap_or(0), self.whole)
        };
        Short {
            domain: &domain.name,
            host: domain.hosts.first().copied().unwrap_or_default(),
            lacking,
        }
    }
}

#[cfg(test)]
impl Spare {
    /// All that it knows, by names.
    pub(crate) fn image(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let mut image = BTreeMap::new();
        for (name, at) in &self.names {
            let field = &self.fields[*at];
            let domains = field.domains.iter().filter(|domain| !domain.hosts.is_empty());
            let domains: BTreeMap<_, _> = domains
                .map(|domain| (domain.name.clone(), (domain.hosts.len(), domain.sums)))
                .collect();
            if !field.hosts.is_empty() {
                image.insert(name.clone(), (field.room, domains));
            }
        }
        (self.whole, image)
    }
}

/// A host after a step.
#[derive(Debug, Clone, Copy)]
struct Change {
    slot: usize,
    leaves: Option<Size>,
    comes: Option<Size>,
    free: Size,
    before: Sums,
    sums: Sums,
}

/// What a step makes of the hosts of a field, and of its room.
#[derive(Debug)]
struct After {
    changes: [Option<Change>; 2],
    room: Shares,
    /// More is needed in all than before.
    adds: bool,
}

impl After {
    fn new(spare: &Spare, field: usize, step: Step) -> Self {
        let (to, comes) = step.comes;
        let change = |slot: usize, leaves: Option<Size>, comes: Option<Size>| {
            let host = spare.host(slot).filter(|host| host.field == field)?;
            Some(Change::new(host, slot, (leaves, comes), spare.whole))
        };
        let from = step.leaves.filter(|(slot, _)| *slot != to);
        let grows = step.leaves.filter(|(slot, _)| *slot == to);
        let changes = [
            change(to, grows.map(|(_, vm)| vm), Some(comes)),
            from.and_then(|(slot, vm)| change(slot, Some(vm), None)),
        ];
        let mut room = spare.fields[field].room;
        for change in changes.iter().flatten() {
            for (class, room) in room.iter_mut().enumerate() {
                *room += change.sums.room[class] - change.before.room[class];
            }
        }
        Self {
            changes,
            room,
            adds: from.is_none(),
        }
    }

    fn of(&self, slot: usize) -> Option<&Change> {
        self.changes.iter().flatten().find(|change| change.slot == slot)
    }

    /// What a domain's hosts hold then.
    fn sums(&self, spare: &Spare, field: &Field, at: usize) -> Sums {
        let is_of = |change: &&Change| {
            let host = spare.host(change.slot);
            host.is_some_and(|host| host.domains.contains(&at))
        };
        let mut sums = field.domains[at].sums;
        for change in self.changes.iter().flatten().filter(is_of) {
            sums.less(&change.before);
            sums.add(&change.sums);
        }
        sums
    }
}

impl Change {
    fn new(host: &Host, slot: usize, (leaves, comes): (Option<Size>, Option<Size>), whole: Size) -> Self {
        let leaves = leaves.filter(|vm| host.row.vms.iter().any(|(size, _)| size == vm));
        let (mut reserved, mut sums) = (host.row.reserved, host.sums);
        if let Some(vm) = leaves {
            reserved = reserved.checked_less(vm).unwrap_or_default();
            sums.take(vm, whole);
        }
        if let Some(vm) = comes {
            reserved.vcpus = reserved.vcpus.saturating_add(vm.vcpus);
            reserved.memory_mib = reserved.memory_mib.saturating_add(vm.memory_mib);
            sums.put(vm, 1, whole);
        }
        let free = free(host.row.takes, host.row.capacity, reserved);
        sums.room = of_room(free, whole);
        Self {
            slot,
            leaves,
            comes,
            free,
            before: host.sums,
            sums,
        }
    }
}

fn free(takes: bool, capacity: Size, reserved: Size) -> Size {
    if !takes {
        return Size::default();
    }
    Size {
        vcpus: capacity.vcpus.saturating_sub(reserved.vcpus),
        memory_mib: capacity.memory_mib.saturating_sub(reserved.memory_mib),
    }
}
