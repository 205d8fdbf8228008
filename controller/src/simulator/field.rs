//! Hosts of one shape, and what puts VMs on them: the controller's engine, or a peer's rule.
//!
//! Both are asked for the same hosts with the same room, so that they differ in what they choose and in nothing else. Whatever a rule
//! would do about room in the peer itself, here a host without room for a VM is not chosen.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use dalgu_proto::{
    ids::HostName,
    vm::{RestartPolicy, Spec},
};

use super::{
    peers::Rule,
    trace::{Event, Size, Trace, Vm},
};
use crate::placement::{Engine, HostView, Policy, Request, UsageView, Worth};

/// What every host is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Logical processors.
    pub cpus: u32,
    /// Memory for VMs, in MiB.
    pub memory_mib: u64,
    /// Virtual processors that may be reserved per logical one.
    pub cpu_overcommit: f64,
}

impl Shape {
    /// The largest VM that a host may have: no more virtual processors than it has logical ones, however many may be reserved.
    pub fn largest(&self) -> Size {
        let Size { vcpus, memory_mib } = self.capacity();
        Size {
            vcpus: vcpus.min(self.cpus),
            memory_mib,
        }
    }

    /// What VMs may reserve on a host.
    pub fn capacity(&self) -> Size {
        let view = view(0, self);
        Size {
            vcpus: view.vcpus_capacity(),
            memory_mib: view.memory_mib_capacity(),
        }
    }
}

/// What is reserved on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Host {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// VMs.
    pub vms: u32,
}

impl Host {
    /// Whether there is room for one more.
    pub fn has_room(&self, vm: Size, capacity: Size) -> bool {
        self.vcpus + vm.vcpus <= capacity.vcpus && self.memory_mib + vm.memory_mib <= capacity.memory_mib
    }
}

/// What chooses hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chooser {
    /// The controller's engine.
    Engine(Policy),
    /// A peer's rule.
    Peer(Rule),
}

/// Hosts with VMs on them.
#[derive(Debug)]
pub struct Field {
    capacity: Size,
    largest: Size,
    hosts: Vec<Host>,
    /// How many have VMs.
    on: usize,
    chooser: Inner,
}

#[derive(Debug)]
enum Inner {
    Engine(Box<Site>),
    Peer(Rule),
}

/// What the engine is told.
#[derive(Debug)]
struct Site {
    engine: Engine,
    views: Vec<HostView<'static>>,
    numbers: HashMap<HostName, usize>,
    requests: HashMap<Size, Request>,
}

impl Field {
    /// So many empty hosts.
    pub fn new(count: usize, shape: &Shape, chooser: Chooser) -> Self {
        let chooser = match chooser {
            Chooser::Peer(rule) => Inner::Peer(rule),
            Chooser::Engine(policy) => {
                let mut engine = Engine::new(policy);
                let views: Vec<_> = (0..count).map(|number| view(number, shape)).collect();
                views.iter().for_each(|view| engine.set(view));
                let names = views.iter().map(|view| view.name.clone());
                Inner::Engine(Box::new(Site {
                    numbers: names.zip(0..).collect(),
                    engine,
                    views,
                    requests: HashMap::new(),
                }))
            }
        };
        Self {
            capacity: shape.capacity(),
            largest: shape.largest(),
            hosts: vec![Host::default(); count],
            on: 0,
            chooser,
        }
    }

    /// What is reserved on each host.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// How many hosts have VMs.
    pub fn on(&self) -> usize {
        self.on
    }

    /// The host for a VM; `None` where none has room.
    pub fn choose(&mut self, vm: Size) -> Option<usize> {
        match &mut self.chooser {
            Inner::Peer(_) if vm.vcpus > self.largest.vcpus => None,
            Inner::Peer(rule) => rule.choose(vm, &self.hosts, self.capacity),
            Inner::Engine(site) => {
                let request = site.requests.entry(vm).or_insert_with(|| request(vm));
                let name = site.engine.choose(request, |_| None)?;
                site.numbers.get(name).copied()
            }
        }
    }

    /// A VM is on a host from now on.
    pub fn put(&mut self, host: usize, vm: Size) {
        self.on += usize::from(self.hosts[host].vms == 0);
        let held = &mut self.hosts[host];
        held.vcpus += vm.vcpus;
        held.memory_mib += vm.memory_mib;
        held.vms += 1;
        self.tell(host);
    }

    /// It is there no more.
    pub fn take(&mut self, host: usize, vm: Size) {
        let held = &mut self.hosts[host];
        held.vcpus -= vm.vcpus;
        held.memory_mib -= vm.memory_mib;
        held.vms -= 1;
        self.on -= usize::from(self.hosts[host].vms == 0);
        self.tell(host);
    }

    /// Tells the engine what is used of a host now: processors, and memory in MiB.
    pub fn measured(&mut self, host: usize, cpus_busy: f64, memory_mib_used: f64) {
        let Inner::Engine(site) = &mut self.chooser else {
            return;
        };
        let view = &mut site.views[host];
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
        let left = (view.memory_mib as f64 - memory_mib_used).max(0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to the memory of a host"
        )]
        let left_mib = left as u64;
        view.usage = Some(UsageView {
            cpus_busy: Some(cpus_busy.min(view.cpus.into())),
            // Nothing left is not the same as nothing known, which is 0.
            memory_available_bytes: (left_mib << 20).max(1),
            ..UsageView::default()
        });
        site.engine.set(view);
    }

    /// From now on the engine goes by these prices of room.
    fn price(&mut self, worth: &Arc<Worth>) {
        if let Inner::Engine(site) = &mut self.chooser {
            site.engine.price(Some(worth));
        }
    }

    fn tell(&mut self, host: usize) {
        if let Inner::Engine(site) = &mut self.chooser {
            let (held, view) = (&self.hosts[host], &mut site.views[host]);
            view.vcpus_reserved = held.vcpus;
            view.memory_mib_reserved = held.memory_mib;
            view.vms = held.vms;
            site.engine.set(view);
        }
    }
}

/// Seconds of hosts with VMs, all together, until the trace ends, if all its VMs find a place on a field, where none ever moves. The engine goes by each of
/// these prices from so many seconds on.
pub fn holds(
    vms: &[Vm],
    events: &[Event],
    end_s: u64,
    field: &mut Field,
    prices: &[(u64, Arc<Worth>)],
) -> Option<u64> {
    let mut placed = vec![None; vms.len()];
    let mut prices = prices.iter().peekable();
    let (mut now_s, mut hosts_s) = (events.first().map_or(0, |event| event.at_s), 0);
    for event in events {
        let next_s = event.at_s.min(end_s);
        hosts_s += next_s.saturating_sub(now_s) * field.on() as u64;
        now_s = next_s.max(now_s);
        if let Some((_, worth)) = prices.next_if(|(from_s, _)| *from_s <= event.at_s) {
            field.price(worth);
        }
        let size = vms[event.vm].size;
        match (event.comes, placed[event.vm].take()) {
            (false, Some(host)) => field.take(host, size),
            (false, None) => {}
            (true, _) => {
                let host = field.choose(size)?;
                field.put(host, size);
                placed[event.vm] = Some(host);
            }
        }
    }
    Some(hosts_s)
}

/// The least count from `least` on for which this holds, taking it that it holds for every greater one too.
pub fn fewest(least: usize, mut holds: impl FnMut(usize) -> bool) -> usize {
    let mut enough = least.max(1);
    let mut few = enough - 1;
    // Doubling the step first: a replay that fails is short.
    let mut step = (enough / 50).max(1);
    while !holds(enough) {
        few = enough;
        enough += step;
        step *= 2;
    }
    while enough - few > 1 {
        let middle = few + (enough - few) / 2;
        match holds(middle) {
            true => enough = middle,
            false => few = middle,
        }
    }
    enough
}

/// The fewest hosts on which all VMs of a trace find a place; `None` where one fits on none.
pub fn needed(trace: &Trace, shape: &Shape, chooser: Chooser) -> Option<usize> {
    if trace.larger_than(shape.largest()).is_some() {
        return None;
    }
    let capacity = shape.capacity();
    let events = trace.events();
    let (vcpus, memory_mib) = trace.peak();
    let least = vcpus
        .div_ceil(capacity.vcpus.into())
        .max(memory_mib.div_ceil(capacity.memory_mib));
    let least = usize::try_from(least).unwrap_or(usize::MAX);
    Some(fewest(least, |count| {
        let mut field = Field::new(count, shape, chooser);
        holds(&trace.vms, &events, trace.end_s, &mut field, &[]).is_some()
    }))
}

/// An empty host as placement sees it; names are in the order of the numbers.
fn view(number: usize, shape: &Shape) -> HostView<'static> {
    HostView {
        name: format!("host-{number:06}").parse().expect("a host's name"),
        ready: true,
        state: "ready".into(),
        cordoned: false,
        cordon_reason: "".into(),
        pressed: false,
        labels: Cow::default(),
        taints: Cow::default(),
        cpus: shape.cpus,
        cpu_overcommit_ratio: shape.cpu_overcommit,
        own_cpu_overcommit_ratio: shape.cpu_overcommit,
        adapted: false,
        memory_mib: shape.memory_mib,
        reserved_memory_mib: 0,
        vcpus_reserved: 0,
        memory_mib_reserved: 0,
        vms: 0,
        vm_sizes: Vec::new(),
        pools: Vec::new(),
        bridges: Cow::default(),
        accelerator: "kvm".into(),
        guest_features: Cow::default(),
        usage: Some(UsageView::default()),
        unmanaged_vcpus: 0,
        unmanaged_memory_mib: 0,
        vms_most: None,
        parts: Default::default(),
    }
}

/// A request that reserves exactly so much, or up to a MiB less: QEMU's overhead is taken off, which a trace does not have.
fn request(size: Size) -> Request {
    let spec = |memory_mib| Spec {
        vcpus: size.vcpus,
        memory_mib,
        disks: Vec::new(),
        nics: Vec::new(),
        kernel_boot: None,
        restart_policy: RestartPolicy::default(),
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
        fitting: Default::default(),
        devices: Default::default(),
    };
    // What is reserved grows by one or two MiB with each, so that the greatest that does not exceed it is found by halving.
    let (mut low, mut high) = (0, size.memory_mib + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match spec(middle).reserved_memory_mib() <= size.memory_mib {
            true => low = middle,
            false => high = middle,
        }
    }
    Request::new(spec(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reserves_what_the_trace_says() {
        for (vcpus, memory_mib) in [(1, 768), (2, 3584), (16, 112 << 10)] {
            let reserved = request(Size { vcpus, memory_mib }).spec.reserved_memory_mib();
            assert!(
                (memory_mib - 1..=memory_mib).contains(&reserved),
                "{memory_mib}: {reserved}"
            );
        }
    }

    #[test]
    fn the_fewest_is_found_from_below_and_from_far_below() {
        for least in [0, 1, 70, 100] {
            assert_eq!(fewest(least, |count| count >= 100), 100, "{least}");
        }
    }
}
