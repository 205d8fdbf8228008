//! The agent's metrics page, made from the last samples alone.
//!
//! Whoever samples puts a [`Snapshot`] into a `watch`; the /metrics handler calls [`respond`] with the [`registry`]
//! over it. A scrape reads memory only: it never asks the kernel, a pool or the hypervisor, and says how old the samples
//! are. The number of series is bounded: at most [`MOST_NICS`] interfaces of the host (the ends of VMs are not
//! among them, each VM has its own), and the series of a VM go with the VM.

mod family;
mod host;
mod vm;

use std::{fmt, sync::Arc, time::Duration};

pub use dalgu_proto::metrics::{Format, respond};
use dalgu_proto::{
    host::{Inventory, Usage, VmUsage},
    ids::{VmId, VmName},
    vm::PowerState,
};
use prometheus_client::{
    collector::Collector, encoding::DescriptorEncoder, metrics::info::Info, registry::Registry,
};
use tokio::sync::watch;

use family::Page;

/// Most host interfaces on the page.
pub const MOST_NICS: usize = 64;

/// The last samples of everything. Times are since boot, as of [`crate::host::process::clock`].
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// What the host is made of.
    pub inventory: Arc<Inventory>,
    /// The last sample of the host and when it was taken; `None` before the first.
    pub usage: Option<(Duration, Arc<Usage>)>,
    /// When the VMs were last listed with success; `None` before that.
    pub vms_at: Option<Duration>,
    /// The VMs of Dalgu's as of then.
    pub vms: Vec<Vm>,
}

/// A VM on the page.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// What its processors do; `None` while that is not known.
    pub power: Option<PowerState>,
    /// The last sample; `None` when it does not run.
    pub usage: Option<VmUsage>,
}

/// Puts the page of a snapshot together at each scrape.
struct Samples {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    clock: fn() -> Duration,
}

impl fmt::Debug for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Samples")
    }
}

impl Collector for Samples {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // A clone of the Arc, so that a slow scrape does not hold up whoever samples.
        let snapshot = Arc::clone(&self.snapshot.borrow());
        let mut page = Page::new(encoder);
        ages(&mut page, &snapshot, (self.clock)())?;
        host::encode(&mut page, &snapshot)?;
        vm::encode(&mut page, &snapshot.vms)
    }
}

fn ages(page: &mut Page<'_>, snapshot: &Snapshot, now: Duration) -> fmt::Result {
    let age = |at: Duration| now.saturating_sub(at).as_secs_f64();
    let host = snapshot
        .usage
        .as_ref()
        .map(|(at, _)| ([("sample", "host")], age(*at)));
    let vms = snapshot.vms_at.map(|at| ([("sample", "vms")], age(at)));
    page.gauges(
        "dalgu_sample_age_seconds",
        "Age of the samples on this page, of the host and of its VMs",
        host.into_iter().chain(vms),
    )
}

/// A registry with the agent's build and the samples in it; other parts may add their own metrics. `clock` tells the time
/// since boot.
pub fn registry(
    version: &str,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    clock: fn() -> Duration,
) -> Registry {
    let mut registry = Registry::default();
    let build = Info::new([("version", version.to_owned())]);
    registry.register("dalgu_agent_build", "Version of the agent", build);
    registry.register_collector(Box::new(Samples { snapshot, clock }));
    registry
}

#[cfg(test)]
mod tests;
