//! The site as the planner sees it: numbers in rows, one for each host and one for each VM.
//!
//! Filled in by [`crate::plans::look`] from what placement sees, and by benchmarks. Every move of every plan passes [`Site::check`] on the site as it
//! is after the moves before it, and only then [`Site::apply`]: so no prefix of a plan breaks what holds for the whole.
//!
//! Where the members of a placement group are changes with every move. One that moves counts on both of its hosts for the rest of a plan, as it does while it
//! migrates: so moves may run at once in any order. What is given by number on a host (processors, NUMA nodes, huge pages) is looked at as it is before
//! the plan, and so one VM that has such comes to a host in a plan at most: what leaves only makes that easier.
//!
//! Room is what VMs reserve, never what they use. Besides, a host may fail, or a domain that the site protects: the site *has spare room* while the VMs of
//! any one find room on the others, by the account that placement goes by ([`Spare`]). A plan does not take that away, nor makes it less where it is lacking.

use std::{fmt, sync::Arc};

use super::Move;
use crate::placement::{
    Size, Spare,
    spare::{Row, Short, Step},
};

/// Place of a host or of a VM in its row.
pub type Slot = usize;

/// How much a VM uses of the processors: what is expected until the next look, and how far that varies.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Expected in the long run, in processors.
    pub mean: f64,
    /// Its variance.
    pub variance: f64,
    /// Expected next, in processors: closer to what it uses now.
    pub next: f64,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Vm {
    /// Where it is.
    pub host: Slot,
    /// Virtual processors it reserves.
    pub vcpus: u32,
    /// Memory it reserves.
    pub memory_mib: u64,
    /// What it uses.
    pub load: Load,
    /// What a move copies: memory, and disks that are not shared.
    pub transfer_mib: u64,
    /// Which hosts may have it: a row of [`Site::rules`].
    pub rule: Slot,
    /// Why it cannot move now; empty when it can.
    pub pinned: &'static str,
    /// Room that its disks need in pools of the destination's own, by the pool's place.
    pub disks: Vec<(Slot, u64)>,
    /// Bandwidth that it reserves on uplinks, by the uplink's place.
    pub uplinks: Vec<(Slot, u64)>,
    /// Its placement groups that refuse hosts: rows of [`Site::with_groups`].
    pub groups: Vec<Slot>,
    /// For one with processors, nodes or huge pages of its own, the hosts that have them now: a row of [`Site::rules`].
    pub fitted: Option<Slot>,
}

impl Vm {
    const fn size(&self) -> Size {
        Size {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
        }
    }
}

/// A host.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Host {
    /// Virtual processors that VMs may reserve.
    pub vcpus: u32,
    /// Memory that VMs may reserve.
    pub memory_mib: u64,
    /// What its processors can do together, in the unit of the VMs' loads.
    pub cpus: f64,
    /// What one of them can do: more a VM with one virtual processor never gets.
    pub core: f64,
    /// What a fully used processor costs, in any unit that is the same for all hosts: the dearer ones are emptied first.
    pub cost: f64,
    /// Whether it takes VMs.
    pub open: bool,
    /// Only its load has closed it. Its room counts for the VMs of a host that fails: what relieves it also opens it.
    pub pressed: bool,
    /// Measured pressure says that its VMs wait for it.
    pub contended: bool,
    /// It has had VMs moved to it or from it so lately that it is not to be emptied.
    pub resting: bool,
    /// Free room of its pools, by the pool's place; a pool that it has not got has none.
    pub pools_mib: Vec<u64>,
    /// Free bandwidth of its uplinks, by the uplink's place, in Mbit per second.
    pub uplinks_mbit: Vec<u64>,
    /// VMs that it may have at most, of those that plans move.
    pub vms_most: Option<usize>,
    /// Hosts of one field stand in for each other.
    pub field: String,
    /// Domains that may fail, which it is of; none: it fails by itself.
    pub domains: Vec<String>,
}

impl Host {
    fn row(&self, slot: Slot) -> Row {
        Row {
            capacity: Size {
                vcpus: self.vcpus,
                memory_mib: self.memory_mib,
            },
            takes: self.open || self.pressed,
            field: self.field.clone(),
            domains: self.fails_with(slot),
            ..Row::default()
        }
    }

    /// The domains that may fail, by name, of which the host of that place is.
    pub fn fails_with(&self, slot: Slot) -> Vec<String> {
        match self.domains.is_empty() {
            true => vec![slot.to_string()],
            false => self.domains.clone(),
        }
    }
}

/// Which hosts may have a VM: one bit for each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule(Vec<u64>);

impl Rule {
    /// The hosts for which this is true.
    pub fn new(hosts: usize, may: impl Fn(Slot) -> bool) -> Self {
        let mut bits = vec![0; hosts.div_ceil(64)];
        for host in (0..hosts).filter(|host| may(*host)) {
            bits[host / 64] |= 1 << (host % 64);
        }
        Self(bits)
    }

    /// Whether a host may have it.
    pub fn allows(&self, host: Slot) -> bool {
        self.0[host / 64] >> (host % 64) & 1 == 1
    }

    /// Whether it allows no host that another does not.
    pub fn is_within(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(own, other)| own & !other == 0)
    }
}

/// A placement group that refuses hosts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Group {
    /// Its members are each in a domain of their own; else all are in one.
    pub apart: bool,
    /// The domain of each host; `None` where it is in none.
    pub domains: Arc<[Option<Slot>]>,
    /// Domains where a member is besides: it is on its way there.
    pub also: Vec<Slot>,
}

/// What is on a host.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Held {
    /// Virtual processors that are reserved.
    pub vcpus: u32,
    /// Memory that is reserved.
    pub memory_mib: u64,
    /// Sum of what is expected of the VMs in the long run.
    pub mean: f64,
    /// Sum of the variances.
    pub variance: f64,
    /// Sum of what is expected next.
    pub next: f64,
}

/// Why a VM may not move to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is there.
    SameHost,
    /// It does not move.
    Pinned(&'static str),
    /// The host takes none.
    Closed,
    /// A rule says no: a label, a bridge, a pool, a feature.
    Rule,
    /// Virtual processors are lacking.
    Vcpus,
    /// Memory is lacking.
    Memory,
    /// It has as many VMs as it takes.
    VmCount,
    /// Room in a pool is lacking.
    Pool,
    /// Bandwidth is lacking on an uplink.
    Bandwidth,
    /// A placement group says no.
    Group,
    /// Processors, nodes or huge pages of its own are lacking, or were given to another that came.
    Fitting,
    /// Were a host to fail then, its VMs might find no room.
    SpareRoom,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameHost => "it is there already",
            Self::Pinned(why) => why,
            Self::Closed => "the host takes no VMs",
            Self::Rule => "the host lacks what the VM needs",
            Self::Vcpus => "too few virtual processors are free",
            Self::Memory => "too little memory is free",
            Self::VmCount => "the host has as many VMs as it takes",
            Self::Pool => "too little room is free in a pool",
            Self::Bandwidth => "too little bandwidth is free on an uplink",
            Self::Group => "a placement group keeps it from there",
            Self::Fitting => {
                "the host has no processors, NUMA nodes or huge pages for it, or gives them to another"
            }
            Self::SpareRoom => "the VMs of a host that fails might find no room then",
        })
    }
}

/// The site.
#[derive(Debug, Clone)]
pub struct Site {
    hosts: Vec<Host>,
    vms: Vec<Vm>,
    rules: Vec<Rule>,
    groups: Vec<Group>,
    /// The members of each.
    members: Vec<Vec<Slot>>,
    /// Where each VM was at first.
    origins: Vec<Slot>,
    here: Vec<Vec<Slot>>,
    held: Vec<Held>,
    spare: Spare,
}

impl Site {
    /// Hosts and VMs, and the rules that the VMs name.
    pub fn new(hosts: Vec<Host>, vms: Vec<Vm>, rules: Vec<Rule>) -> Self {
        let mut here = vec![Vec::new(); hosts.len()];
        let mut held = vec![Held::default(); hosts.len()];
        for (slot, vm) in vms.iter().enumerate() {
            here[vm.host].push(slot);
            held[vm.host].put(vm);
        }
        let mut rows: Vec<_> = hosts
            .iter()
            .enumerate()
            .map(|(slot, host)| host.row(slot))
            .collect();
        vms.iter().for_each(|vm| rows[vm.host].put(vm.size()));
        let spare = Spare::new(rows);
        Self {
            origins: vms.iter().map(|vm| vm.host).collect(),
            groups: Vec::new(),
            members: Vec::new(),
            hosts,
            vms,
            rules,
            here,
            held,
            spare,
        }
    }

    /// The same with the groups that VMs name.
    #[must_use]
    pub fn with_groups(self, groups: Vec<Group>) -> Self {
        let mut members = vec![Vec::new(); groups.len()];
        for (slot, vm) in self.vms.iter().enumerate() {
            vm.groups.iter().for_each(|group| members[*group].push(slot));
        }
        Self {
            groups,
            members,
            ..self
        }
    }

    /// The groups.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The VMs.
    pub fn vms(&self) -> &[Vm] {
        &self.vms
    }

    /// A rule.
    pub fn rule(&self, rule: Slot) -> &Rule {
        &self.rules[rule]
    }

    /// The VMs of a host.
    pub fn here(&self, host: Slot) -> &[Slot] {
        &self.here[host]
    }

    /// What is on a host.
    pub fn held(&self, host: Slot) -> &Held {
        &self.held[host]
    }

    /// Whether a host has VMs.
    pub fn is_on(&self, host: Slot) -> bool {
        !self.here[host].is_empty()
    }

    /// Whether the VMs of any one host or protected domain would find room on the others.
    pub fn has_spare_room(&self) -> bool {
        self.spare.keeps()
    }

    /// How many domains there are, hosts or protected ones, whose VMs might find no room on the others.
    pub fn short(&self) -> usize {
        self.short_domains().count()
    }

    /// Those domains, and what is lacking.
    pub fn short_domains(&self) -> impl Iterator<Item = Short<'_>> {
        self.spare.short_domains()
    }

    /// What moves copy, in MiB.
    pub fn transfer_mib(&self, moves: &[Move]) -> u64 {
        let sizes = moves.iter().map(|step| self.vms[step.vm].transfer_mib);
        sizes.fold(0, u64::saturating_add)
    }

    /// Whether a VM may move to a host now.
    pub fn check(&self, vm: Slot, to: Slot) -> Result<(), Refusal> {
        self.fits(vm, to)?;
        let (from, size) = (self.vms[vm].host, self.vms[vm].size());
        let step = Step {
            leaves: Some((from, size)),
            comes: (to, size),
        };
        match self.spare.allows(step) {
            true => Ok(()),
            false => Err(Refusal::SpareRoom),
        }
    }

    /// The part of [`Site::check`] that looks at the VM and the destination alone.
    pub fn fits(&self, slot: Slot, to: Slot) -> Result<(), Refusal> {
        let vm = &self.vms[slot];
        if !vm.pinned.is_empty() {
            return Err(Refusal::Pinned(vm.pinned));
        }
        match vm.fitted {
            Some(rule) if !self.rules[rule].allows(to) || self.took_fitted(to) => Err(Refusal::Fitting),
            _ => self.has_room(slot, to),
        }
    }

    /// Whether a host has room for a VM, and may have it, were it to move; whatever is given there by number.
    pub fn has_room(&self, slot: Slot, to: Slot) -> Result<(), Refusal> {
        let (vm, host, held) = (&self.vms[slot], &self.hosts[to], &self.held[to]);
        let refused = [
            (vm.host == to, Refusal::SameHost),
            (!host.open, Refusal::Closed),
            (held.vcpus + vm.vcpus > host.vcpus, Refusal::Vcpus),
            (held.memory_mib + vm.memory_mib > host.memory_mib, Refusal::Memory),
            (
                host.vms_most.is_some_and(|most| self.here[to].len() >= most),
                Refusal::VmCount,
            ),
        ];
        if let Some((_, refusal)) = refused.into_iter().find(|(refused, _)| *refused) {
            return Err(refusal);
        }
        if !self.rules[vm.rule].allows(to) {
            return Err(Refusal::Rule);
        }
        let has = |free: &[u64], needed: &[(Slot, u64)]| {
            let mut needed = needed.iter();
            needed.all(|(place, needed)| free.get(*place).is_some_and(|free| free >= needed))
        };
        if !has(&host.pools_mib, &vm.disks) {
            return Err(Refusal::Pool);
        }
        if !has(&host.uplinks_mbit, &vm.uplinks) {
            return Err(Refusal::Bandwidth);
        }
        match self.joins(slot, to) {
            true => Ok(()),
            false => Err(Refusal::Group),
        }
    }

    /// Whether a host may have a VM, but for what is free there.
    pub fn may_have(&self, vm: Slot, host: Slot) -> bool {
        self.rules[self.vms[vm].rule].allows(host) && self.joins(vm, host)
    }

    /// Whether the groups of a VM let it go to a host.
    fn joins(&self, vm: Slot, to: Slot) -> bool {
        self.vms[vm].groups.iter().all(|slot| {
            let group = &self.groups[*slot];
            let Some(domain) = group.domains[to] else {
                return false;
            };
            let others = self.members[*slot].iter().filter(|other| **other != vm);
            let hosts = others.flat_map(|other| [self.vms[*other].host, self.origins[*other]]);
            let places = hosts.map(|host| group.domains[host]);
            let mut places = places.chain(group.also.iter().copied().map(Some));
            match group.apart {
                true => places.all(|place| place != Some(domain)),
                false => places.all(|place| place == Some(domain)),
            }
        })
    }

    /// Whether a VM with something of its own has come to a host.
    fn took_fitted(&self, host: Slot) -> bool {
        let mut here = self.here[host].iter();
        here.any(|vm| self.vms[*vm].fitted.is_some() && self.origins[*vm] != host)
    }

    /// Whether a VM that comes leaves the VMs of hosts and domains that fail the room that they have.
    pub fn keeps_room(&self, size: Size, to: Slot) -> bool {
        self.spare.allows(Step {
            leaves: None,
            comes: (to, size),
        })
    }

    /// Has a host take VMs, or none.
    pub fn set_open(&mut self, host: Slot, open: bool) {
        self.hosts[host].open = open;
        let takes = open || self.hosts[host].pressed;
        self.spare.update(host, |row| row.takes = takes);
    }

    /// Moves a VM for which [`Site::check`] has said yes, or [`Site::has_room`] where room for a host that fails is looked at in the end.
    pub fn apply(&mut self, vm: Slot, to: Slot) {
        let from = self.vms[vm].host;
        self.here[from].retain(|other| *other != vm);
        self.here[to].push(vm);
        let moved = &mut self.vms[vm];
        moved.host = to;
        self.held[from].take(moved);
        self.held[to].put(moved);
        for (host, comes) in [(from, false), (to, true)] {
            let host = &mut self.hosts[host];
            for (all, needed) in [
                (&mut host.pools_mib, &moved.disks),
                (&mut host.uplinks_mbit, &moved.uplinks),
            ] {
                for (place, needed) in needed {
                    if let Some(free) = all.get_mut(*place) {
                        *free = match comes {
                            true => free.saturating_sub(*needed),
                            false => free.saturating_add(*needed),
                        };
                    }
                }
            }
        }
        let size = moved.size();
        self.spare.update(from, |row| row.take(size));
        self.spare.update(to, |row| row.put(size));
    }
}

impl Held {
    fn put(&mut self, vm: &Vm) {
        self.vcpus += vm.vcpus;
        self.memory_mib += vm.memory_mib;
        self.mean += vm.load.mean;
        self.variance += vm.load.variance;
        self.next += vm.load.next;
    }

    fn take(&mut self, vm: &Vm) {
        self.vcpus -= vm.vcpus;
        self.memory_mib -= vm.memory_mib;
        self.mean = (self.mean - vm.load.mean).max(0.0);
        self.variance = (self.variance - vm.load.variance).max(0.0);
        self.next = (self.next - vm.load.next).max(0.0);
    }
}
