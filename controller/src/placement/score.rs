//! Which of the hosts that fit is best. Called by [`super::decide`] for each of them.
//!
//! A [`Score`] is compared field by field in the order they are written, lower first, and ends in the host's name: no
//! two scores are equal, and the same input gives the same answer. Measured load comes first, but only in coarse
//! steps, so that noise does not decide; between hosts of the same step the reservations do, which are exact.
//!
//! The limits below are this project's own judgement of where guests begin to notice, not figures from a paper.

use std::borrow::Cow;

use dalgu_proto::ids::HostName;
use serde::{Deserialize, Serialize};

use super::{
    Policy,
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
const WHOLE: u32 = 1_000_000;
/// Percent of time stalled for a processor or for I/O at which the next step of pressure begins.
const STALL_STEPS: [f64; 3] = [10.0, 25.0, 50.0];
/// The same for memory, where any stall means that the host reclaims pages in use.
const MEMORY_STALL_STEPS: [f64; 3] = [1.0, 5.0, 20.0];
/// Percent of the processors busy.
const BUSY_STEPS: [f64; 3] = [50.0, 75.0, 90.0];
/// Percent of the memory that is used up, by what the kernel says is available.
const MEMORY_USED_STEPS: [f64; 3] = [85.0, 92.0, 97.0];
/// Percent of the busiest network interface in use.
const NETWORK_STEPS: [f64; 4] = [20.0, 40.0, 60.0, 80.0];

/// A host's score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score<'a> {
    /// 1 where nothing is known of the host's load.
    no_telemetry: u32,
    /// Step of the worst of pressure (PSI), busy processors and used memory, 0 to 3.
    pressure: u32,
    /// Step of the busiest network interface, 0 to 4.
    network: u32,
    /// Share reserved once the VM is there, in tenths; turned round to pack.
    reserved: u32,
    /// Busy processors, in steps of 5 %.
    cpu_busy: u32,
    /// Use of the busiest network interface, in steps of 5 %.
    network_busy: u32,
    /// Share reserved, in millionths; turned round to pack.
    reserved_exact: u32,
    /// VMs; turned round to pack.
    vms: i64,
    host: &'a HostName,
}

impl<'a> Score<'a> {
    /// The score of a host that passed all tests.
    pub(super) fn of(request: &Request, host: &'a HostView<'_>, policy: Policy) -> Self {
        let share = reserved_share(request, host);
        let (reserved_exact, vms) = match policy {
            Policy::Spread => (share, i64::from(host.vms)),
            Policy::Pack => (WHOLE - share, -i64::from(host.vms)),
        };
        let busy = host.usage.as_ref().and_then(|usage| busy_percent(usage, host));
        let network = host.usage.map_or(0.0, |usage| usage.network_utilisation * 100.0);
        Self {
            no_telemetry: host.usage.is_none().into(),
            pressure: host.usage.as_ref().map_or(0, |usage| pressure(usage, host)),
            network: step(network, &NETWORK_STEPS),
            reserved: reserved_exact / (WHOLE / 10),
            cpu_busy: fives(busy.unwrap_or(0.0)),
            network_busy: fives(network),
            reserved_exact,
            vms,
            host: &host.name,
        }
    }

    /// The parts in the order in which they are compared; the host's name, which comes last, is left out.
    pub(super) fn parts(&self, policy: Policy) -> Vec<Part> {
        let (share, exact) = match policy {
            Policy::Spread => ("reserved_tenths", "reserved_percent"),
            Policy::Pack => ("unreserved_tenths", "unreserved_percent"),
        };
        let part = |name, value| Part {
            name: Cow::Borrowed(name),
            value,
        };
        #[expect(clippy::cast_precision_loss, reason = "a count of VMs is far below 2^53")]
        let vms = self.vms as f64;
        vec![
            part("no_telemetry", self.no_telemetry.into()),
            part("pressure", self.pressure.into()),
            part("network", self.network.into()),
            part(share, self.reserved.into()),
            part("cpu_busy_percent", f64::from(self.cpu_busy) * 5.0),
            part("network_busy_percent", f64::from(self.network_busy) * 5.0),
            part(exact, f64::from(self.reserved_exact) / (f64::from(WHOLE) / 100.0)),
            part("vms", vms),
        ]
    }
}

/// The greater of the shares of virtual processors and memory reserved once the VM is there, in millionths.
fn reserved_share(request: &Request, host: &HostView) -> u32 {
    let share = |used: u64, capacity: u64| {
        let millionths = u128::from(used) * u128::from(WHOLE) / u128::from(capacity.max(1));
        u32::try_from(millionths).unwrap_or(WHOLE).min(WHOLE)
    };
    let vcpus = u64::from(host.vcpus_reserved) + u64::from(request.spec.vcpus);
    let memory = host
        .memory_mib_reserved
        .saturating_add(request.spec.reserved_memory_mib());
    share(vcpus, host.vcpus_capacity().into()).max(share(memory, host.memory_mib_capacity()))
}

fn pressure(usage: &UsageView, host: &HostView) -> u32 {
    [
        step(stall(usage.cpu_stall), &STALL_STEPS),
        step(stall(usage.io_stall), &STALL_STEPS),
        step(stall(usage.memory_stall), &MEMORY_STALL_STEPS),
        step(busy_percent(usage, host).unwrap_or(0.0), &BUSY_STEPS),
        step(memory_used_percent(usage, host), &MEMORY_USED_STEPS),
    ]
    .into_iter()
    .fold(0, u32::max)
}

/// The worse of the two averages: a load that begins is seen within seconds, and one that comes and goes is
/// remembered for a minute.
fn stall(stall: StallView) -> f64 {
    stall.avg10_percent.max(stall.avg60_percent)
}

/// Busy processors. Where the agent has no rate yet, the load average stands in: it counts waiting tasks too.
fn busy_percent(usage: &UsageView, host: &HostView) -> Option<f64> {
    let cpus = f64::from(host.cpus);
    (host.cpus > 0).then(|| usage.cpus_busy.unwrap_or_else(|| usage.load1.min(cpus)) / cpus * 100.0)
}

#[expect(clippy::cast_precision_loss, reason = "only the step it falls into matters")]
fn memory_used_percent(usage: &UsageView, host: &HostView) -> f64 {
    // A sample without memory figures says 0 of 0, which is no reason to shun the host.
    if usage.memory_available_bytes == 0 || host.memory_mib == 0 {
        return 0.0;
    }
    100.0 - usage.memory_available_bytes as f64 / (host.memory_mib as f64 * 1024.0 * 1024.0) * 100.0
}

/// How many of the limits a value has reached.
fn step(value: f64, limits: &[f64]) -> u32 {
    limits.iter().map(|limit| u32::from(value >= *limit)).sum()
}

/// A percentage in steps of 5.
fn fives(percent: f64) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0 to 20"
    )]
    let fives = (percent / 5.0).clamp(0.0, 20.0) as u32;
    fives
}
