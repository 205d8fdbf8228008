//! Which of the hosts that fit is best. Called by [`super::decide`] for each of them, and by the engine for those that it looks at.
//!
//! A [`Score`] is compared field by field in the order they are written, lower first, and ends in the host's name: no
//! two scores are equal, and the same input gives the same answer. Which parts there are, and in which order, the policy says. By the named ones,
//! what was asked for but not required comes before what was measured. Measured load comes first of the rest, but only in coarse
//! steps, so that noise does not decide; between hosts of the same step the reservations do, which are exact; between equally
//! reserved ones the finer steps of the load.
//!
//! Beside what is only preferred and which images are missing, only [`Cost`] depends on the request, and it does so through what is free and what there is: the engine relies on that, and
//! on [`Cost::at_least`].
//!
//! The limits below are this project's own judgement of where guests begin to notice, not figures from a paper.

use std::borrow::Cow;

use dalgu_proto::ids::HostName;
use serde::{Deserialize, Serialize};

use super::{
    Policy, Protect, Worth,
    policy::{Busy, Fit, Lead, Order, Steps, Term},
    view::{HostView, Request, StallView, UsageView},
};

/// One part of a score; lower is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Stable name.
    pub name: Cow<'static, str>,
    /// Value.
    pub value: f64,
}

/// Shares are compared in millionths.
const WHOLE: u64 = 1_000_000;
/// To pack: how much more a share of memory that is left counts than one of the processors. VMs take memory in larger pieces, of which fewer fit into what is left, and it is not
/// over-committed.
const MEMORY: u32 = 16;
/// To pack: how much more what is lost of a host's worth counts, of what is left by that account.
const LOST: u32 = 15 * (MEMORY + 1);
/// Percent of time stalled for a processor or for I/O at which the next step of pressure begins.
const STALL_STEPS: [f64; 3] = [10.0, 25.0, 50.0];
/// The same for memory, where any stall means that the host reclaims pages in use.
const MEMORY_STALL_STEPS: [f64; 3] = [1.0, 5.0, 20.0];
/// Percent of the processors busy.
const BUSY_STEPS: [f64; 3] = [50.0, 75.0, 90.0];
/// Percent of the processors that VMs waited for.
const STOLEN_STEPS: [f64; 3] = [5.0, 10.0, 20.0];
/// Percent of the memory that is used up, by what the kernel says is available.
const MEMORY_USED_STEPS: [f64; 3] = [85.0, 92.0, 97.0];
/// Millionths of the processors or the memory that are reserved.
const RESERVED_STEPS: [u32; 1] = [800_000];
/// Percent of the busiest network interface in use.
const NETWORK_STEPS: [f64; 4] = [20.0, 40.0, 60.0, 80.0];

/// How loaded a host is, whatever is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// What comes before the reservations.
    pub(super) steps: Steps,
    /// What comes after them.
    pub(super) busy: Busy,
}

impl Load {
    /// What is known of a host's load, in this order.
    pub(super) fn of(order: &Order, host: &HostView<'_>) -> Self {
        let usage = host.usage.as_ref();
        let network = usage.map_or(0.0, |usage| usage.network_utilisation * 100.0);
        let expected = usage.and_then(|usage| usage.cpus_expected);
        let lately = usage.and_then(|usage| usage.lately);
        // The last seconds say little of what a VM that stays for months will find; they count until more is known.
        let busy = match lately {
            Some(lately) => Some(percent_of(lately.cpus_busy, host.cpus)),
            None => usage.and_then(|usage| busy_percent(usage, host.cpus)),
        };
        // An hour that is known to come counts as if it were here.
        let cpu = busy
            .unwrap_or(0.0)
            .max(expected.map_or(0.0, |cpus| percent_of(cpus, host.cpus)));
        let pressure = usage.map_or(0, |usage| {
            stalled(usage, host.memory_mib)
                .max(step(cpu, &BUSY_STEPS))
                .max(waited(usage, host.cpus))
        });
        let (steps, busy) = order.load([
            (Term::NoTelemetry, usage.is_none().into()),
            (Term::Pressure, pressure),
            (Term::Network, step(network, &NETWORK_STEPS)),
            (Term::ReservedStep, reserved_step(host)),
            (Term::CpuBusyPercent, fives(cpu)),
            (Term::NetworkBusyPercent, fives(network)),
        ]);
        Self { steps, busy }
    }
}

/// Step of how short processors are on a host with so many, 0 to 3, and the same with what its VMs are expected to use; `None` where nothing of
/// its last hour is known. The worst of what was busy in that hour, of what its VMs waited for, and of the time for which tasks waited.
pub fn processors(usage: &UsageView, cpus: u32) -> Option<(u8, u8)> {
    let lately = usage.lately?;
    let now = step(percent_of(lately.cpus_busy, cpus), &BUSY_STEPS)
        .max(waited(usage, cpus))
        .max(step(stall(usage.cpu_stall), &STALL_STEPS));
    let expected = usage.cpus_expected.unwrap_or(0.0);
    Some((now, now.max(step(percent_of(expected, cpus), &BUSY_STEPS))))
}

/// How many of the limits the greater share of what is reserved of processors and memory has reached.
fn reserved_step(host: &HostView<'_>) -> u8 {
    let capacity = Size::capacity(host);
    let (vcpus, memory) = capacity.less(Size::free(host)).shares(capacity);
    let share = vcpus.max(memory);
    RESERVED_STEPS.iter().map(|limit| u8::from(share >= *limit)).sum()
}

/// Virtual processors, and memory in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB, for a VM with QEMU's overhead.
    pub memory_mib: u64,
}

impl Size {
    /// What a VM reserves.
    pub fn of(request: &Request) -> Self {
        Self {
            vcpus: request.spec.vcpus,
            memory_mib: request.spec.reserved_memory_mib(),
        }
    }

    /// What VMs may reserve on a host.
    pub(super) fn capacity(host: &HostView<'_>) -> Self {
        Self {
            vcpus: host.vcpus_capacity(),
            memory_mib: host.memory_mib_capacity(),
        }
    }

    /// What is not reserved there.
    pub(super) fn free(host: &HostView<'_>) -> Self {
        Self {
            vcpus: host.vcpus_free(),
            memory_mib: host.memory_mib_free(),
        }
    }

    /// What is left of it once something is taken; `None` where it is not there.
    pub(super) fn checked_less(self, taken: Self) -> Option<Self> {
        Some(Self {
            vcpus: self.vcpus.checked_sub(taken.vcpus)?,
            memory_mib: self.memory_mib.checked_sub(taken.memory_mib)?,
        })
    }

    /// What is left of it once something is taken.
    fn less(self, taken: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(taken.vcpus),
            memory_mib: self.memory_mib.saturating_sub(taken.memory_mib),
        }
    }

    /// Its shares of a capacity, in millionths.
    pub(super) fn shares(self, capacity: Self) -> (u32, u32) {
        let share = |part: u64, whole: u64| {
            let millionths = part.saturating_mul(WHOLE) / whole.max(1);
            u32::try_from(millionths.min(WHOLE)).unwrap_or(u32::MAX)
        };
        (
            share(self.vcpus.into(), capacity.vcpus.into()),
            share(self.memory_mib, capacity.memory_mib),
        )
    }
}

/// A policy, with what it goes by.
#[derive(Debug, Clone, Copy)]
pub struct Rule<'a> {
    /// What makes a host better among those with the same load.
    pub policy: Policy,
    /// What room is worth, for [`Fit::Pack`]; without it, it is best fit alone.
    pub worth: Option<&'a Worth>,
    /// The domains that room is kept for.
    pub protect: Option<&'a Protect>,
}

impl From<&Policy> for Rule<'_> {
    fn from(policy: &Policy) -> Self {
        Self {
            policy: *policy,
            worth: None,
            protect: None,
        }
    }
}

/// What it costs, by a policy, to put a VM on a host, in millionths of the host; lower is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cost(u32, u32);

impl Cost {
    /// The cost of a VM where so much of a capacity is free.
    ///
    /// - spread: the greater of the shares of processors and memory reserved once the VM is there, then the lesser one.
    /// - pack: what is left (best fit over both), the share of memory counting [`MEMORY`] times, and [`LOST`] times what is lost of the host's
    ///   worth ([`Worth`]); then that loss.
    pub(super) fn of(rule: Rule<'_>, vm: Size, free: Size, capacity: Size) -> Self {
        Self::at_least(rule.policy.fit, vm, free, capacity).with_worth(rule, vm, free, capacity)
    }

    /// From the least that it can be to what it is.
    pub(super) fn with_worth(self, rule: Rule<'_>, vm: Size, free: Size, capacity: Size) -> Self {
        match rule.worth.filter(|_| rule.policy.fit == Fit::Pack) {
            Some(worth) => {
                let lost = worth.lost(vm, free, free.less(vm), capacity);
                Self(self.0 + LOST * lost, lost)
            }
            None => self,
        }
    }

    /// To spread: so much of a resource must be left on a host that costs no more.
    pub(super) fn least_free(self, capacity: u64) -> u64 {
        // A share is rounded down: one millionth more is taken for as good.
        let reserved = u128::from(capacity) * u128::from(self.0 + 1) / u128::from(WHOLE);
        capacity
            .saturating_sub(u64::try_from(reserved).unwrap_or(u64::MAX))
            .saturating_sub(1)
    }

    /// To pack: no more than that is left of either resource on a host that costs no more.
    pub(super) fn most_left(self, capacity: Size) -> Size {
        // A share is rounded down: one millionth more is taken for as good.
        let most = |share: u32, whole: u64| {
            let left = u128::from(whole.max(1)) * (u128::from(share) + 1) / u128::from(WHOLE);
            u64::try_from(left).unwrap_or(u64::MAX)
        };
        Size {
            vcpus: u32::try_from(most(self.0, capacity.vcpus.into())).unwrap_or(u32::MAX),
            memory_mib: most(self.0 / MEMORY, capacity.memory_mib),
        }
    }

    /// No cost is lower there. Never falls: for spread as less is free, for pack as more is.
    pub(super) fn at_least(fit: Fit, vm: Size, free: Size, capacity: Size) -> Self {
        let left = free.less(vm);
        match fit {
            Fit::Spread => {
                let (vcpus, memory) = capacity.less(left).shares(capacity);
                Self(vcpus.max(memory), vcpus.min(memory))
            }
            Fit::Pack => {
                let (vcpus, memory) = left.shares(capacity);
                Self(vcpus + MEMORY * memory, 0)
            }
        }
    }
}

/// A host's score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score<'a> {
    pub(super) lead: Lead,
    pub(super) cost: Cost,
    pub(super) busy: Busy,
    pub(super) host: &'a HostName,
}

impl<'a> Score<'a> {
    /// The score of a host that passed all tests.
    pub(super) fn of(request: &Request, host: &'a HostView<'_>, rule: Rule<'_>) -> Self {
        let order = &rule.policy.order;
        let Load { steps, busy } = Load::of(order, host);
        let against = request.rules.against(&host.name, &host.labels, &host.taints);
        let cost = Cost::of(rule, Size::of(request), Size::free(host), Size::capacity(host));
        Self {
            lead: order.lead(steps, against),
            cost,
            busy: order.tail(busy, request.images_missing(&host.name)),
            host: &host.name,
        }
    }

    /// The parts in the order in which they are compared; the host's name, which comes last, is left out.
    pub(super) fn parts(&self, policy: Policy) -> Vec<Part> {
        let part = |name, value| Part {
            name: Cow::Borrowed(name),
            value,
        };
        let percent = |millionths: u32| f64::from(millionths) / 10_000.0;
        let Cost(first, second) = self.cost;
        let Policy { fit, order } = policy;
        let mut parts = Vec::new();
        for term in order.terms() {
            let value = f64::from(order.value(term, self.lead, self.busy));
            match (term, fit) {
                (Term::Reserved, Fit::Spread) => parts.extend([
                    part("reserved_percent", percent(first)),
                    part("reserved_of_other_percent", percent(second)),
                ]),
                (Term::Reserved, Fit::Pack) => parts.extend([
                    part("waste_percent", percent(first) / f64::from(MEMORY + 1)),
                    part("worth_lost_percent", percent(second)),
                ]),
                (Term::CpuBusyPercent | Term::NetworkBusyPercent, _) => {
                    parts.push(part(term.as_str(), value * 5.0));
                }
                _ => parts.push(part(term.as_str(), value)),
            }
        }
        parts
    }
}

/// What the load of a host is to its guests, by what is measured there now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strain {
    /// They do not notice it.
    Well,
    /// They may notice it.
    Some,
    /// They are short of processors, memory or I/O.
    Short,
}

impl Strain {
    /// Of a host with so many logical processors and so much memory.
    pub fn of(usage: &UsageView, cpus: u32, memory_mib: u64) -> Self {
        match pressure(usage, cpus, memory_mib) {
            0 | 1 => Self::Well,
            2 => Self::Some,
            _ => Self::Short,
        }
    }
}

/// What is measured now; of what VMs wait for, the last five minutes.
fn pressure(usage: &UsageView, cpus: u32, memory_mib: u64) -> u8 {
    let busy = step(busy_percent(usage, cpus).unwrap_or(0.0), &BUSY_STEPS);
    stalled(usage, memory_mib).max(busy).max(waited(usage, cpus))
}

/// Processors that VMs were ready to use and waited for.
fn waited(usage: &UsageView, cpus: u32) -> u8 {
    let stolen = usage
        .lately
        .map_or(0.0, |lately| percent_of(lately.cpus_stolen, cpus));
    step(stolen, &STOLEN_STEPS)
}

/// The same, busy processors aside: time for which tasks waited, and used memory.
fn stalled(usage: &UsageView, memory_mib: u64) -> u8 {
    [
        step(stall(usage.cpu_stall), &STALL_STEPS),
        step(stall(usage.io_stall), &STALL_STEPS),
        step(stall(usage.memory_stall), &MEMORY_STALL_STEPS),
        step(memory_used_percent(usage, memory_mib), &MEMORY_USED_STEPS),
    ]
    .into_iter()
    .fold(0, u8::max)
}

/// The worse of the two averages: a load that begins is seen within seconds, and one that comes and goes is
/// remembered for a minute.
fn stall(stall: StallView) -> f64 {
    stall.avg10_percent.max(stall.avg60_percent)
}

/// Busy processors. Where the agent has no rate yet, the load average stands in: it counts waiting tasks too.
fn busy_percent(usage: &UsageView, cpus: u32) -> Option<f64> {
    let most = f64::from(cpus);
    (cpus > 0).then(|| percent_of(usage.cpus_busy.unwrap_or_else(|| usage.load1.min(most)), cpus))
}

/// So many processors, of those that there are.
fn percent_of(busy: f64, cpus: u32) -> f64 {
    match cpus {
        0 => 0.0,
        _ => busy / f64::from(cpus) * 100.0,
    }
}

#[expect(clippy::cast_precision_loss, reason = "only the step it falls into matters")]
fn memory_used_percent(usage: &UsageView, memory_mib: u64) -> f64 {
    // A sample without memory figures says 0 of 0, which is no reason to shun the host.
    if usage.memory_available_bytes == 0 || memory_mib == 0 {
        return 0.0;
    }
    100.0 - usage.memory_available_bytes as f64 / (memory_mib as f64 * 1024.0 * 1024.0) * 100.0
}

/// How many of the limits a value has reached.
fn step(value: f64, limits: &[f64]) -> u8 {
    limits.iter().map(|limit| u8::from(value >= *limit)).sum()
}

/// A percentage in steps of 5.
fn fives(percent: f64) -> u8 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0 to 20"
    )]
    let fives = (percent / 5.0).clamp(0.0, 20.0) as u8;
    fives
}
