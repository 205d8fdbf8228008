//! What is only remembered while the controller runs, and relearnt from the agents after each start.

use std::sync::Arc;

use dalgu_proto::{
    host::{Usage, VmUsage},
    ids::{Epoch, Generation, HostName},
    vm::{PowerReason, PowerState},
};
use jiff::Timestamp;
use tokio::time::Instant;

use super::{Fault, ImageStock, Overcommit, Pressure, Progress};
use crate::placement::Lately;

/// Whether an agent has done what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmPhase {
    /// Not said, or in a newer version's words: nothing follows from it.
    Unknown,
    /// Working towards the intent.
    Applying,
    /// Carried out in full.
    Settled,
    /// Cannot carry it out.
    Failed,
    /// Being removed.
    Deleting,
    /// Incoming migration.
    Incoming,
    /// Outgoing migration.
    Outgoing,
}

impl VmPhase {
    /// Whether the host is one side of a migration.
    pub const fn is_migrating(self) -> bool {
        matches!(self, Self::Incoming | Self::Outgoing)
    }
}

/// What a host says is wrong with a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmFault {
    /// Stable reason.
    pub reason: String,
    /// For people.
    pub message: String,
    /// The agent tries again by itself.
    pub retrying: bool,
    /// When it was first seen.
    pub time: Option<Timestamp>,
}

/// A part of its specification that a running VM does not have yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Path below the specification.
    pub field: String,
    /// What it has.
    pub current: String,
    /// What it gets.
    pub wanted: String,
    /// What it waits for.
    pub message: String,
}

/// A snapshot that its host says is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotSeen {
    /// Number of its layer.
    pub layer: u32,
    /// The guest's file systems were frozen for it, as far as the host knows.
    pub quiesced: bool,
    /// Space that the layer takes.
    pub written_bytes: u64,
}

/// What the owner last said of a VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// Host that said it.
    pub host: HostName,
    /// Ownership number under which it has the VM.
    pub epoch: Epoch,
    /// Last generation it accepted.
    pub accepted: Generation,
    /// Last generation it carried out.
    pub observed: Generation,
    /// Rises with each change of the report.
    pub status_generation: u64,
    /// How far it is.
    pub phase: VmPhase,
    /// Power state seen.
    pub power: Option<PowerState>,
    /// Why.
    pub power_reason: PowerReason,
    /// When it was seen, by the host's clock.
    pub observe_time: Option<Timestamp>,
    /// What is wrong.
    pub fault: Option<VmFault>,
    /// Last sample.
    pub usage: Option<VmUsage>,
    /// What the running VM does not have yet of its specification.
    pub pending: Vec<Pending>,
    /// The snapshots that are there.
    pub snapshots: Vec<SnapshotSeen>,
}

impl Observation {
    /// The snapshot of that layer, if it is there.
    pub fn snapshot(&self, layer: u32) -> Option<&SnapshotSeen> {
        self.snapshots.iter().find(|seen| seen.layer == layer)
    }

    /// Whether the host says that it has no domain of the VM. One that says so in a newer version's words says nothing.
    pub fn is_absent(&self) -> bool {
        self.power.is_none() && self.phase != VmPhase::Unknown
    }

    /// Whether the host says that the VM's processors do nothing.
    pub fn is_off(&self) -> bool {
        self.power == Some(PowerState::Stopped) || self.is_absent()
    }

    /// Whether a part of the specification, or one below it, is pending.
    pub fn is_pending(&self, field: &str) -> bool {
        self.pending
            .iter()
            .any(|pending| pending.field.starts_with(field))
    }

    /// Whether it says the same but for the usage sample.
    pub fn same_status(&self, other: &Self) -> bool {
        let bare = |o: &Self| Self {
            usage: None,
            ..o.clone()
        };
        bare(self) == bare(other)
    }
}

/// Why an agent refused an intent, for as long as that generation is the current one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Generation that was refused.
    pub generation: Generation,
    /// Why.
    pub fault: Fault,
}

/// Whether the controller hears from a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostState {
    /// Has not registered since the controller's start.
    Initializing,
    /// Reports in time.
    Ready,
    /// Has not reported for a while.
    Unreachable,
}

impl HostState {
    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "initializing",
            Self::Ready => "ready",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A domain that Dalgu does not touch: it did not make it, or its host was never told to have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmanaged {
    /// UUID of the domain.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub running: bool,
    /// Virtual processors it may use.
    pub vcpus: u32,
    /// Memory it may use.
    pub memory_mib: u64,
    /// It bears Dalgu's mark all the same: made by hand, or by a restored backup of libvirt.
    pub marked: bool,
}

/// Another machine, or another boot, that speaks for a host and was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    /// Its machine id.
    pub machine_id: String,
    /// Its boot id.
    pub boot_id: String,
    /// Where its agent listens.
    pub address: String,
    /// The operator has been told of it.
    pub told: bool,
}

/// What is known of a host while the controller runs.
#[derive(Debug, Clone)]
pub struct HostLive {
    /// Whether it is heard from.
    pub state: HostState,
    /// Run of the agent that registered; empty before.
    pub run_id: String,
    /// Last report's number.
    pub sequence: u64,
    /// When the last report came, by the wall clock; `None` before the first.
    pub report_time: Option<Timestamp>,
    /// The same by the monotonic clock; before the first report, the controller's start.
    pub heard: Instant,
    /// Last sample.
    pub usage: Option<Usage>,
    /// Domains that are not Dalgu's.
    pub unmanaged: Vec<Unmanaged>,
    /// The last report told of every VM and domain there.
    pub complete: bool,
    /// The agent has no working hypervisor.
    pub hypervisor_error: Option<String>,
    /// The last that was refused because this host is another machine, or runs.
    pub rival: Option<Rival>,
    /// What is there of images; `None` until it is told, and from agents that keep none.
    pub images: Option<Arc<ImageStock>>,
    /// Version of the document of its networks that this run of its agent has taken; 0 for none.
    pub networks: u64,
    /// Whether its load has closed it for new VMs.
    pub pressure: Pressure,
    /// What its load has made of its over-commit ratio.
    pub overcommit: Overcommit,
    /// Processors that its VMs together are expected to use at most; `None` until that is known.
    pub cpus_expected: Option<f64>,
    /// How busy it has been; `None` until that is known.
    pub lately: Option<Lately>,
}

impl HostLive {
    /// What is known at the controller's start: nothing.
    pub fn silent(now: Instant) -> Self {
        Self {
            state: HostState::Initializing,
            run_id: String::new(),
            sequence: 0,
            report_time: None,
            heard: now,
            usage: None,
            unmanaged: Vec::new(),
            complete: false,
            hypervisor_error: None,
            rival: None,
            images: None,
            networks: 0,
            pressure: Pressure::default(),
            overcommit: Overcommit::default(),
            cpus_expected: None,
            lately: None,
        }
    }
}

/// What is known of a migration while the controller runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MigrationLive {
    /// The source has accepted the order to send.
    pub started: bool,
    /// Last progress.
    pub progress: Option<Progress>,
    /// Why it cannot be said yet where the VM is.
    pub doubt: Option<String>,
    /// Bytes of its images that the destination had when it last said that it fetches them.
    pub fetched_bytes: Option<u64>,
}
