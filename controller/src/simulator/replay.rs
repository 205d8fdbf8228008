//! A trace replayed on a field of hosts: VMs come, are placed or refused, are moved, and go; and what is to be seen of it.
//!
//! ```text
//!   events of one step ──> totals move on ──> a point of the series, what is used is told ──> perhaps a round of moves ──> next step
//! ```
//!
//! A step is [`STEP_S`]. What is refused is gone: nothing is asked for again. What is used of a host is known once its step is over, as a
//! report would tell it, so that nothing decides by what is yet to come. Moves take no time. Pure: the same trace and settings give the same outcome.

use serde::Serialize;

use super::{
    contender::{Contender, Mover},
    field::{Field, Shape},
    peers,
    trace::{Event, STEP_S, Size, Trace},
};
use crate::placement;
use crate::planner::{
    self, Consolidation, Fill, Load, Rebalance, Room, Samples, Site, consolidate, make_room, rebalance,
};

/// Hosts that one round of consolidation empties at most.
const EMPTIED: usize = 8;
/// Sizes of VMs that fragmentation is reckoned with: the most common ones.
const SIZES: usize = 32;

/// On what a trace is replayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Hosts.
    pub hosts: usize,
    /// What each is.
    pub shape: Shape,
    /// Share of its processors or memory from which on a host in use counts as contended.
    pub contended_from: f64,
    /// Seconds between two rounds of moves.
    pub round_s: u64,
    /// Moves of a round at most.
    pub moves: usize,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// What placed the VMs.
    pub policy: &'static str,
    /// VMs that found a host.
    pub accepted: u64,
    /// VMs that found none.
    pub refused: u64,
    /// The most hosts that had VMs at once.
    pub peak_hosts: usize,
    /// Processors reserved of those of hosts in use, over time.
    pub cpu_percent: f64,
    /// Memory reserved of that of hosts in use, over time.
    pub memory_percent: f64,
    /// Mean of the points' fragmentation.
    pub fragmentation_percent: f64,
    /// Moves.
    pub moves: u64,
    /// Memory of the VMs that moved.
    pub moved_gib: f64,
    /// Hours of hosts in use.
    pub host_hours: f64,
    /// Hosts in use that were contended, of all steps of all hosts in use; `None` where the trace does not say what is used.
    pub contended_percent: Option<f64>,
    /// A point for each step.
    pub series: Vec<Point>,
}

/// The field at the end of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// Hours since the trace began.
    pub at_h: f64,
    /// Hosts with VMs.
    pub hosts: usize,
    /// Processors reserved of theirs.
    pub cpu_percent: f64,
    /// Memory reserved of theirs.
    pub memory_percent: f64,
    /// Free room that is of no use to the next VM, of all free room.
    pub fragmentation_percent: f64,
    /// VMs refused so far.
    pub refused: u64,
    /// Moves so far.
    pub moves: u64,
    /// Of the hosts with VMs, those that are contended.
    pub contended_percent: Option<f64>,
}

/// Replays a trace.
pub fn replay(trace: &Trace, settings: &Settings, contender: Contender) -> Outcome {
    let contender = contender.resolved();
    let mut replay = Replay::new(trace, settings, contender);
    let mut events = trace.events().into_iter().peekable();
    let (mut at_s, mut round_s) = (trace.start_s, trace.start_s + settings.round_s);
    while at_s < trace.end_s {
        let next_s = (at_s + STEP_S).min(trace.end_s);
        while let Some(event) = events.next_if(|event| event.at_s < next_s) {
            replay.happens(event);
        }
        replay.advance(next_s);
        replay.measure(at_s);
        if next_s >= round_s {
            replay.round();
            round_s = next_s + settings.round_s;
        }
        replay.point();
        at_s = next_s;
    }
    replay.outcome(contender)
}

#[derive(Default)]
struct Totals {
    accepted: u64,
    refused: u64,
    peak_hosts: usize,
    moves: u64,
    moved_mib: u64,
    /// Seconds times hosts, processors, MiB.
    hosts_s: u128,
    vcpus_s: u128,
    memory_mib_s: u128,
    /// Steps of hosts in use; of those, contended ones.
    steps: u64,
    contended: u64,
}

struct Replay<'a> {
    trace: &'a Trace,
    settings: &'a Settings,
    mover: Mover,
    capacity: Size,
    field: Field,
    /// Where each VM is.
    placed: Vec<Option<usize>>,
    /// The VMs of each host.
    here: Vec<Vec<usize>>,
    /// Reserved in all.
    reserved: (u64, u64),
    /// The most common sizes, with their shares of the arrivals.
    sizes: Vec<(Size, f64)>,
    has_usage: bool,
    /// What each VM has used; kept only where it is asked for.
    used: Vec<Samples>,
    contended: Vec<bool>,
    now_s: u64,
    /// Moves that may still be made before the next round, to make room.
    moves_left: usize,
    totals: Totals,
    series: Vec<Point>,
}

impl<'a> Replay<'a> {
    fn new(trace: &'a Trace, settings: &'a Settings, contender: Contender) -> Self {
        let mover = contender.mover();
        let has_usage = trace.has_usage();
        let plans = has_usage && matches!(mover, Mover::Consolidate | Mover::Rebalance);
        Self {
            trace,
            settings,
            mover,
            capacity: settings.shape.capacity(),
            field: Field::new(settings.hosts, &settings.shape, contender.chooser()),
            placed: vec![None; trace.vms.len()],
            here: vec![Vec::new(); settings.hosts],
            reserved: (0, 0),
            sizes: common(trace),
            has_usage,
            used: vec![Samples::default(); if plans { trace.vms.len() } else { 0 }],
            contended: vec![false; settings.hosts],
            now_s: trace.start_s,
            moves_left: settings.moves,
            totals: Totals::default(),
            series: Vec::new(),
        }
    }

    /// Time goes by with everything as it is.
    fn advance(&mut self, to_s: u64) {
        let seconds = u128::from(to_s.saturating_sub(self.now_s));
        self.totals.hosts_s += seconds * self.field.on() as u128;
        self.totals.vcpus_s += seconds * u128::from(self.reserved.0);
        self.totals.memory_mib_s += seconds * u128::from(self.reserved.1);
        self.now_s = to_s;
    }

    fn happens(&mut self, event: Event) {
        self.advance(event.at_s);
        let size = self.trace.vms[event.vm].size;
        if !event.comes {
            if let Some(host) = self.placed[event.vm].take() {
                self.take(event.vm, host);
                self.reserved.0 -= u64::from(size.vcpus);
                self.reserved.1 -= size.memory_mib;
            }
            return;
        }
        let Some(host) = self.field.choose(size).or_else(|| self.make_room(size)) else {
            self.totals.refused += 1;
            return;
        };
        self.put(event.vm, host);
        self.reserved.0 += u64::from(size.vcpus);
        self.reserved.1 += size.memory_mib;
        self.totals.accepted += 1;
        self.totals.peak_hosts = self.totals.peak_hosts.max(self.field.on());
    }

    fn put(&mut self, vm: usize, host: usize) {
        self.field.put(host, self.trace.vms[vm].size);
        self.here[host].push(vm);
        self.placed[vm] = Some(host);
    }

    fn take(&mut self, vm: usize, host: usize) {
        self.field.take(host, self.trace.vms[vm].size);
        self.here[host].retain(|other| *other != vm);
    }

    /// What was used in the step that began then.
    fn measure(&mut self, began_s: u64) {
        if !self.has_usage {
            return;
        }
        let shape = &self.settings.shape;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
        let memory_mib = shape.memory_mib as f64;
        let full = self.settings.contended_from;
        for host in 0..self.here.len() {
            let (mut cpus, mut used_mib) = (0.0, 0.0);
            for slot in &self.here[host] {
                let vm = &self.trace.vms[*slot];
                let busy = vm.cpus_used(began_s);
                cpus += busy;
                used_mib += vm.memory_mib_used(began_s);
                if let Some(samples) = self.used.get_mut(*slot) {
                    #[expect(clippy::cast_possible_truncation, reason = "a few digits are enough")]
                    samples.push(busy as f32);
                }
            }
            self.contended[host] = cpus > full * f64::from(shape.cpus) || used_mib > full * memory_mib;
            self.totals.contended += u64::from(self.contended[host]);
            self.totals.steps += u64::from(!self.here[host].is_empty());
            self.field.measured(host, cpus, used_mib);
        }
    }

    /// Moves others away so that a VM finds room, if that is what this is about; gives the host.
    fn make_room(&mut self, size: Size) -> Option<usize> {
        if self.mover != Mover::MakeRoom || self.moves_left == 0 {
            return None;
        }
        let (slots, site) = self.site();
        let settings = Room {
            moves: Room::default().moves.min(self.moves_left),
            ..Room::default()
        };
        let of_host = placement::Size {
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
        };
        let (plan, _) = make_room(&site, of_host, site.rule(0), &settings)?;
        self.moves_left -= plan.moves().len();
        for step in plan.moves() {
            self.moved(slots[step.vm], step.from, step.to);
        }
        self.field.choose(size)
    }

    fn round(&mut self) {
        self.moves_left = self.settings.moves;
        match self.mover {
            Mover::Nothing | Mover::MakeRoom => {}
            Mover::Hbal => {
                for _ in 0..self.settings.moves {
                    let slots: Vec<_> = self.here.iter().flatten().copied().collect();
                    let vms = slots
                        .iter()
                        .filter_map(|vm| Some((self.trace.vms[*vm].size, self.placed[*vm]?)));
                    let vms: Vec<_> = vms.collect();
                    let Some((vm, to)) = peers::hbal(&vms, self.field.hosts(), self.capacity) else {
                        return;
                    };
                    self.moved(slots[vm], vms[vm].1, to);
                }
            }
            // Without what is used, no host is known to be contended.
            Mover::Rebalance if !self.has_usage => {}
            Mover::Rebalance | Mover::Consolidate => {
                let (slots, site) = self.site();
                let plan = match self.mover {
                    Mover::Rebalance => rebalance(&site, &Rebalance::default()),
                    _ => consolidate(&site, &self.consolidation()),
                };
                for step in plan.within(&site, self.settings.moves, u64::MAX).moves() {
                    self.moved(slots[step.vm], step.from, step.to);
                }
            }
        }
    }

    fn moved(&mut self, vm: usize, from: usize, to: usize) {
        self.take(vm, from);
        self.put(vm, to);
        self.totals.moves += 1;
        self.totals.moved_mib += self.trace.vms[vm].size.memory_mib;
        self.totals.peak_hosts = self.totals.peak_hosts.max(self.field.on());
    }

    fn consolidation(&self) -> Consolidation {
        let settings = Consolidation {
            hosts: EMPTIED,
            moves: self.settings.moves,
            ..Consolidation::default()
        };
        if self.has_usage {
            return settings;
        }
        // A VM counts as using what it reserves then, which fits: nothing is to be relieved.
        let full = Fill {
            deviations: 0.0,
            share: 1.0 + 1e-9,
        };
        Consolidation {
            relieve: full,
            until: full,
            empty: full,
            ..settings
        }
    }

    /// The field as the planner sees it, and which VM of the trace each of its VMs is.
    fn site(&self) -> (Vec<usize>, Site) {
        let slots: Vec<_> = self.here.iter().flatten().copied().collect();
        let cpus = match self.has_usage {
            true => self.settings.shape.cpus,
            false => self.capacity.vcpus,
        };
        let host = |contended: &bool| planner::Host {
            vcpus: self.capacity.vcpus,
            memory_mib: self.capacity.memory_mib,
            cpus: cpus.into(),
            core: 1.0,
            cost: 1.0,
            open: true,
            contended: *contended,
            ..planner::Host::default()
        };
        let vm = |slot: &usize| {
            let size = self.trace.vms[*slot].size;
            let whole = f64::from(size.vcpus);
            let reserved = Load {
                mean: whole,
                variance: 0.0,
                next: whole,
            };
            planner::Vm {
                host: self.placed[*slot].unwrap_or_default(),
                vcpus: size.vcpus,
                memory_mib: size.memory_mib,
                load: self
                    .used
                    .get(*slot)
                    .map_or(reserved, |samples| samples.load(whole)),
                transfer_mib: size.memory_mib,
                ..planner::Vm::default()
            }
        };
        let vms = slots.iter().map(vm).collect();
        let hosts: Vec<_> = self.contended.iter().map(host).collect();
        let rule = planner::Rule::new(hosts.len(), |_| true);
        (slots, Site::new(hosts, vms, vec![rule]))
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    fn point(&mut self) {
        let on = self.field.on();
        let of = |reserved: u64, capacity: u64| percent(reserved as f64, capacity as f64 * on as f64);
        let contended = self.contended.iter().filter(|contended| **contended).count();
        self.series.push(Point {
            at_h: (self.now_s - self.trace.start_s) as f64 / 3600.0,
            hosts: on,
            cpu_percent: of(self.reserved.0, self.capacity.vcpus.into()),
            memory_percent: of(self.reserved.1, self.capacity.memory_mib),
            fragmentation_percent: fragmentation_percent(&self.field, self.capacity, &self.sizes),
            refused: self.totals.refused,
            moves: self.totals.moves,
            contended_percent: self.has_usage.then(|| percent(contended as f64, on as f64)),
        });
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "sums far below 2^53 in any unit that is shown"
    )]
    fn outcome(self, contender: Contender) -> Outcome {
        let totals = &self.totals;
        let of = |sum: u128, capacity: u64| percent(sum as f64, totals.hosts_s as f64 * capacity as f64);
        let fragmented: f64 = self.series.iter().map(|point| point.fragmentation_percent).sum();
        Outcome {
            policy: contender.name(),
            accepted: totals.accepted,
            refused: totals.refused,
            peak_hosts: totals.peak_hosts,
            cpu_percent: of(totals.vcpus_s, self.capacity.vcpus.into()),
            memory_percent: of(totals.memory_mib_s, self.capacity.memory_mib),
            fragmentation_percent: fragmented / (self.series.len() as f64).max(1.0),
            moves: totals.moves,
            moved_gib: totals.moved_mib as f64 / 1024.0,
            host_hours: totals.hosts_s as f64 / 3600.0,
            contended_percent: self
                .has_usage
                .then(|| percent(totals.contended as f64, totals.steps as f64)),
            series: self.series,
        }
    }
}

/// A part in percent of a whole; 0 of nothing.
fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole * 100.0 } else { 0.0 }
}

/// The most common sizes of a trace, with their shares of these.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
fn common(trace: &Trace) -> Vec<(Size, f64)> {
    let mut counts = std::collections::BTreeMap::<Size, u64>::new();
    for vm in &trace.vms {
        *counts.entry(vm.size).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts.truncate(SIZES);
    let all: u64 = counts.iter().map(|(_, count)| count).sum();
    counts
        .into_iter()
        .map(|(size, count)| (size, count as f64 / all as f64))
        .collect()
}

/// The share of the free room that is on hosts where the next VM has no room, as to be expected over the sizes that come:
///
/// ```text
///   Σ over sizes s   p(s) · Σ free(h) over hosts h without room for s   /   Σ free(h) over all hosts
/// ```
///
/// with `free(h)` the mean of the free shares of a host's processors and memory. It is the measure of Weng et al., "Beware of Fragmentation" (USENIX ATC
/// 2023), with processors and memory in the place of GPUs. 0 where nothing is free.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
fn fragmentation_percent(field: &Field, capacity: Size, sizes: &[(Size, f64)]) -> f64 {
    let (mut unusable, mut all) = (0.0, 0.0);
    for host in field.hosts() {
        let vcpus = f64::from(capacity.vcpus - host.vcpus) / f64::from(capacity.vcpus);
        let memory = (capacity.memory_mib - host.memory_mib) as f64 / capacity.memory_mib as f64;
        let free = f64::midpoint(vcpus, memory);
        let without = sizes.iter().filter(|(size, _)| !host.has_room(*size, capacity));
        unusable += free * without.map(|(_, share)| share).sum::<f64>();
        all += free;
    }
    percent(unusable, all)
}
