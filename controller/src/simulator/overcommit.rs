//! What over-commit by forecast would bring on a trace that says what VMs use: processors and memory promised by what is expected of VMs ([`Peaks`]), not by what
//! they reserve, and hosts relieved before they are full.
//!
//! ```text
//!   first week: seen only ──> placed by best fit, largest first ──> each hour: what was used is seen ─> hosts over `relieve` give VMs away ─> measured
//! ```
//!
//! A host may be filled to a share of its processors and of its memory (`place`), by the fullest hour that is expected; one for which more than
//! another share (`relieve`) is expected gives VMs away. A VM that finds no host gets a new one. The controller does not over-commit memory: this says
//! what that would be worth. Called by the command. Pure.

use serde::Serialize;

use super::{
    Contender,
    field::{Shape, needed},
    table,
    trace::{STEP_S, Size, Trace},
};
use crate::planner::peak::{self, HOURS, Peaks, Week};

/// Seconds of an hour.
const HOUR_S: u64 = 3600;
/// Its steps.
const STEPS: u64 = HOUR_S / STEP_S;
/// How much a move that copies a host's whole memory has to be better than one that copies none, beside 1.
const COPYING: f64 = 4.0;

/// Why it cannot be said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is known of what VMs use.
    #[error("the trace does not say what VMs use: it needs cpu_percent or memory_percent")]
    NoUsage,
    /// A week is needed to learn from.
    #[error(
        "the trace is {hours} hours long: over-commit by forecast looks at a week, 168 hours, before it begins"
    )]
    TooShort {
        /// Its length.
        hours: u64,
    },
    /// A VM fits on no host.
    #[error("a VM fits on no host: give --host-vcpus and --host-memory")]
    TooLarge,
}

/// How hosts are filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// What each host is; its ratio of over-commit is not looked at.
    pub shape: Shape,
    /// Share that is filled at most.
    pub place: f64,
    /// Share from which on a host is relieved.
    pub relieve: f64,
    /// Share from which on a host counts as contended.
    pub contended_from: f64,
}

/// What came of it, after the first week.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// VMs of the trace.
    pub vms: usize,
    /// Hosts without over-commit: the fewest on which all find a place by what they reserve.
    pub hosts_reserved: usize,
    /// Hosts in use, over time.
    pub hosts_mean: f64,
    /// The most hosts in use at once.
    pub hosts_peak: usize,
    /// VMs for each host, as a multiple of those without over-commit: over time, and by the most hosts.
    pub times: (f64, f64),
    /// Intervals of 5 minutes in which a host uses more than it may.
    pub contended_percent: f64,
    /// Intervals in which it is asked for more than it has.
    pub over_percent: f64,
    /// Moves, and how many these are of the VMs a day.
    pub moves: u64,
    /// The same in percent of the VMs a day.
    pub moves_percent_a_day: f64,
    /// Hours of hosts in which they used more processors than was expected.
    pub exceeded_percent: f64,
    /// What was expected, of the processors that their VMs have.
    pub expected_of_limit: f64,
}

/// What a VM or a host is expected to use: shares of a host.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Expected {
    cpu: Week,
    memory: Week,
}

impl Expected {
    const NOTHING: Self = Self {
        cpu: [0.0; HOURS],
        memory: [0.0; HOURS],
    };

    fn add(&mut self, other: &Self, sign: f64) {
        peak::add(&mut self.cpu, &other.cpu, sign);
        peak::add(&mut self.memory, &other.memory, sign);
    }

    /// The shares expected in the fullest hours, with another's use too.
    fn with(&self, other: &Self) -> (f64, f64) {
        (
            peak::together(&self.cpu, &other.cpu),
            peak::together(&self.memory, &other.memory),
        )
    }

    fn fullest(&self) -> f64 {
        let (cpu, memory) = self.with(&Self::NOTHING);
        cpu.max(memory)
    }
}

#[derive(Default)]
struct Totals {
    hours: u64,
    host_hours: u64,
    hosts_peak: usize,
    contended: u64,
    over: u64,
    moves: u64,
    exceeded: u64,
    expected_of_limit: f64,
}

struct Run<'a> {
    trace: &'a Trace,
    settings: &'a Settings,
    /// What was seen of each VM: processors, MiB.
    seen: Vec<(Peaks, Peaks)>,
    expected: Vec<Expected>,
    placed: Vec<Option<usize>>,
    here: Vec<Vec<usize>>,
    held: Vec<Expected>,
    totals: Totals,
}

/// Runs a trace.
///
/// # Errors
/// If it does not say what VMs use, or is not longer than a week.
pub fn overcommit(trace: &Trace, settings: &Settings) -> Result<Outcome, Error> {
    if !trace.has_usage() {
        return Err(Error::NoUsage);
    }
    let hours = (trace.end_s - trace.start_s) / HOUR_S;
    let week = HOURS as u64;
    if hours <= week {
        return Err(Error::TooShort { hours });
    }
    let reserving = Shape {
        cpu_overcommit: 1.0,
        ..settings.shape
    };
    let hosts_reserved = needed(trace, &reserving, Contender::Pack.chooser()).ok_or(Error::TooLarge)?;
    let mut run = Run {
        trace,
        settings,
        seen: vec![Default::default(); trace.vms.len()],
        expected: vec![Expected::NOTHING; trace.vms.len()],
        placed: vec![None; trace.vms.len()],
        here: Vec::new(),
        held: Vec::new(),
        totals: Totals::default(),
    };
    for hour in 0..hours {
        if hour >= week {
            run.come_and_go(hour);
            run.relieve();
            run.measure(hour);
        }
        run.look(hour);
    }
    Ok(run.outcome(hosts_reserved))
}

impl Run<'_> {
    fn start_s(&self, hour: u64) -> u64 {
        self.trace.start_s + hour * HOUR_S
    }

    fn is_live(&self, vm: usize, at_s: u64) -> bool {
        let vm = &self.trace.vms[vm];
        vm.arrive_s <= at_s && vm.leave_s.is_none_or(|leave_s| leave_s > at_s)
    }

    /// What each VM used in an hour is seen when it is over.
    fn look(&mut self, hour: u64) {
        let from_s = self.start_s(hour);
        for (vm, (cpus, memory)) in self.trace.vms.iter().zip(&mut self.seen) {
            for at_s in (0..STEPS).map(|step| from_s + step * STEP_S) {
                if vm.arrive_s <= at_s && vm.leave_s.is_none_or(|leave_s| leave_s > at_s) {
                    #[expect(clippy::cast_possible_truncation, reason = "a few digits are enough")]
                    let (used, used_mib) = (vm.cpus_used(at_s) as f32, vm.memory_mib_used(at_s) as f32);
                    cpus.push(hour, used);
                    memory.push(hour, used_mib);
                }
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
    fn come_and_go(&mut self, hour: u64) {
        let at_s = self.start_s(hour);
        let shape = &self.settings.shape;
        for (slot, vm) in self.trace.vms.iter().enumerate() {
            let (cpus, memory) = &self.seen[slot];
            let memory_mib = vm.size.memory_mib as f64;
            self.expected[slot] = Expected {
                cpu: cpus
                    .week(vm.size.vcpus.into())
                    .map(|used| used / f64::from(shape.cpus)),
                memory: memory.week(memory_mib).map(|used| used / shape.memory_mib as f64),
            };
        }
        let mut come: Vec<_> = (0..self.placed.len())
            .filter(|vm| self.is_live(*vm, at_s))
            .collect();
        for vm in 0..self.placed.len() {
            if let Some(host) = self.placed[vm].filter(|_| !self.is_live(vm, at_s)) {
                self.here[host].retain(|other| *other != vm);
                self.placed[vm] = None;
            }
        }
        for (held, here) in self.held.iter_mut().zip(&self.here) {
            *held = Expected::NOTHING;
            here.iter().for_each(|vm| held.add(&self.expected[*vm], 1.0));
        }
        come.retain(|vm| self.placed[*vm].is_none());
        let size = |vm: &usize| {
            let Size { vcpus, memory_mib } = self.trace.vms[*vm].size;
            f64::from(vcpus) / f64::from(shape.cpus) + memory_mib as f64 / shape.memory_mib as f64
        };
        come.sort_by(|a, b| size(b).total_cmp(&size(a)).then(a.cmp(b)));
        for vm in come {
            let host = self.receiver(vm);
            self.put(vm, host);
        }
    }

    /// The host that has the least left with the VM; a new one where none may have it.
    fn receiver(&mut self, vm: usize) -> usize {
        let expected = &self.expected[vm];
        let most = self.settings.place;
        let left = |host: usize| {
            let (cpu, memory) = self.held[host].with(expected);
            (cpu <= most && memory <= most).then_some((2.0 - cpu - memory, host))
        };
        let on = (0..self.held.len())
            .filter(|host| !self.here[*host].is_empty() && self.placed[vm] != Some(*host));
        let best = on
            .filter_map(left)
            .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        if let Some((_, host)) = best {
            return host;
        }
        let empty = self.here.iter().position(Vec::is_empty);
        empty.unwrap_or_else(|| {
            self.here.push(Vec::new());
            self.held.push(Expected::NOTHING);
            self.here.len() - 1
        })
    }

    fn put(&mut self, vm: usize, host: usize) {
        self.here[host].push(vm);
        self.held[host].add(&self.expected[vm], 1.0);
        self.placed[vm] = Some(host);
    }

    fn relieve(&mut self) {
        for host in 0..self.held.len() {
            while self.here[host].len() > 1 && self.held[host].fullest() > self.settings.relieve {
                let Some(vm) = self.to_relieve(host) else { break };
                let to = self.receiver(vm);
                self.here[host].retain(|other| *other != vm);
                let expected = self.expected[vm];
                self.held[host].add(&expected, -1.0);
                self.put(vm, to);
                self.totals.moves += 1;
            }
        }
    }

    /// The VM that takes the most in the fullest hour, for what it copies.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
    fn to_relieve(&self, host: usize) -> Option<usize> {
        let held = &self.held[host];
        let (cpu, memory) = (peak::fullest(&held.cpu), peak::fullest(&held.memory));
        let by_cpu = held.cpu[cpu] >= held.memory[memory];
        let worth = |vm: &usize| {
            let expected = &self.expected[*vm];
            let taken = if by_cpu {
                expected.cpu[cpu]
            } else {
                expected.memory[memory]
            };
            let copied = self.trace.vms[*vm].size.memory_mib as f64 / self.settings.shape.memory_mib as f64;
            taken / (1.0 + COPYING * copied)
        };
        let here = self.here[host].iter().copied();
        here.max_by(|a, b| worth(a).total_cmp(&worth(b)).then(b.cmp(a)))
    }

    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 MiB")]
    fn measure(&mut self, hour: u64) {
        let from_s = self.start_s(hour);
        let shape = &self.settings.shape;
        let on: Vec<_> = (0..self.here.len())
            .filter(|host| !self.here[*host].is_empty())
            .collect();
        self.totals.hours += 1;
        self.totals.host_hours += on.len() as u64;
        self.totals.hosts_peak = self.totals.hosts_peak.max(on.len());
        for host in on {
            let vms = || self.here[host].iter().map(|vm| &self.trace.vms[*vm]);
            let mut most = 0.0_f64;
            for at_s in (0..STEPS).map(|step| from_s + step * STEP_S) {
                let cpu = vms().map(|vm| vm.cpus_used(at_s)).sum::<f64>() / f64::from(shape.cpus);
                let memory = vms().map(|vm| vm.memory_mib_used(at_s)).sum::<f64>() / shape.memory_mib as f64;
                self.totals.contended += u64::from(cpu.max(memory) > self.settings.contended_from);
                self.totals.over += u64::from(cpu.max(memory) > 1.0);
                most = most.max(cpu);
            }
            let expected = self.held[host].cpu[peak::fullest(&self.held[host].cpu)];
            let limit: f64 = vms().map(|vm| f64::from(vm.size.vcpus)).sum::<f64>() / f64::from(shape.cpus);
            // Equal but for what adding and taking away leaves of a sum.
            self.totals.exceeded += u64::from(most > expected + 1e-9);
            self.totals.expected_of_limit += expected / limit;
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    fn outcome(self, hosts_reserved: usize) -> Outcome {
        let totals = &self.totals;
        let host_hours = (totals.host_hours as f64).max(1.0);
        let intervals = host_hours * STEPS as f64;
        let days = totals.hours as f64 / 24.0;
        let hosts_mean = host_hours / (totals.hours as f64).max(1.0);
        Outcome {
            vms: self.trace.vms.len(),
            hosts_reserved,
            hosts_mean,
            hosts_peak: totals.hosts_peak,
            times: (
                hosts_reserved as f64 / hosts_mean,
                hosts_reserved as f64 / (totals.hosts_peak as f64).max(1.0),
            ),
            contended_percent: totals.contended as f64 / intervals * 100.0,
            over_percent: totals.over as f64 / intervals * 100.0,
            moves: totals.moves,
            moves_percent_a_day: totals.moves as f64 / days / self.trace.vms.len() as f64 * 100.0,
            exceeded_percent: totals.exceeded as f64 / host_hours * 100.0,
            expected_of_limit: totals.expected_of_limit / host_hours,
        }
    }
}

/// The outcome for people.
pub(super) fn show(settings: &Settings, outcome: &Outcome) -> String {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let rows = [
        ("VMs", outcome.vms.to_string()),
        ("hosts without over-commit", outcome.hosts_reserved.to_string()),
        ("hosts with it, over time", format!("{:.2}", outcome.hosts_mean)),
        ("hosts with it, at most", outcome.hosts_peak.to_string()),
        (
            "VMs a host, times as many, over time",
            format!("{:.2}", outcome.times.0),
        ),
        (
            "VMs a host, times as many, by the most hosts",
            format!("{:.2}", outcome.times.1),
        ),
        (
            "host-intervals over the cap, %",
            format!("{:.3}", outcome.contended_percent),
        ),
        (
            "host-intervals over 100 %, %",
            format!("{:.3}", outcome.over_percent),
        ),
        ("moves", outcome.moves.to_string()),
        (
            "moves, % of the VMs a day",
            format!("{:.2}", outcome.moves_percent_a_day),
        ),
        (
            "host-hours above the peak that was expected, %",
            format!("{:.3}", outcome.exceeded_percent),
        ),
        (
            "expected peak / processors of the VMs",
            format!("{:.3}", outcome.expected_of_limit),
        ),
    ];
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect();
    format!(
        "Over-commit by forecast, after the first week: filled to {}, relieved from {}, cap {}\n{}",
        percent(settings.place),
        percent(settings.relieve),
        percent(settings.contended_from),
        table::layout(&["", ""], &rows)
    )
}
