//! The records the controller keeps: what is stored, as JSON, and what is only remembered while it runs.
//!
//! Used by every module of the crate; holds data and small readings of it, no decisions. Stored types
//! ([`VmRecord`], [`HostRecord`], [`OperationRecord`], [`MigrationRecord`], [`RequestRecord`], [`EventRecord`]) may
//! get new fields with a serde default, but a field never changes its meaning. [`Observation`], [`HostLive`] and
//! [`MigrationLive`] are relearnt from the agents after each start and are never stored.

use std::collections::BTreeMap;

use dalgu_proto::{
    host::{Inventory, Usage, VmUsage},
    ids::{Epoch, Generation, HostName, MigrationId, OperationId, Session, VmId, VmName},
    vm::{PowerReason, PowerState, RestartMode, Spec},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::placement::Decision;

/// The codes of google.rpc.Code that faults bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Given up or replaced.
    Cancelled = 1,
    /// Not known.
    Unknown = 2,
    /// Not done in time.
    DeadlineExceeded = 4,
    /// The state does not allow it.
    FailedPrecondition = 9,
    /// Broken off.
    Aborted = 10,
    /// A fault of the program.
    Internal = 13,
    /// Not reachable.
    Unavailable = 14,
}

/// A stable reason and a sentence: why something is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// google.rpc.Code as a number.
    pub code: i32,
    /// Stable reason in capitals.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Fault {
    /// Makes a fault.
    pub fn new(code: Code, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code: code as i32,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }
}

/// What a VM's processors should do, as the agent needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Rises with each change of what the agent is told.
    pub generation: Generation,
    /// Power state asked for last.
    pub power: PowerState,
    /// Rises when a power state is asked for anew.
    pub power_sequence: u64,
    /// Rises with each request to restart.
    pub restart_sequence: u64,
    /// How the last restart is to be done.
    pub restart_mode: RestartMode,
    /// Time a guest has to shut down; 0 powers it off at once.
    pub grace_period_seconds: u32,
}

/// A virtual machine as it should be, and who owns it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// What it is made of, MAC addresses filled in.
    pub spec: Spec,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// What its processors should do.
    pub intent: Intent,
    /// The only host that may run it.
    pub owner: HostName,
    /// Rises with each change of owner.
    pub epoch: Epoch,
    /// The decision that chose the owner.
    pub decision: Decision,
    /// When it was decided.
    pub decide_time: Timestamp,
    /// When the VM was created.
    pub create_time: Timestamp,
    /// When its deletion was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_time: Option<Timestamp>,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

/// A server with an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Its name.
    pub name: HostName,
    /// Where its agent listens.
    pub address: String,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Virtual processors that may be reserved per logical processor.
    pub cpu_overcommit_ratio: f64,
    /// Memory kept for the host itself.
    pub reserved_memory_mib: u64,
    /// Why it takes no new VMs; `None` when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cordon: Option<String>,
    /// Commands of another session are refused by the agent.
    pub session: Session,
    /// The kernel's boot id.
    pub boot_id: String,
    /// What it is made of.
    pub inventory: Inventory,
    /// Version of the agent.
    pub agent_version: String,
    /// When it first registered.
    pub create_time: Timestamp,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Create a VM.
    Create,
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Reboot or reset it.
    Restart,
    /// Freeze it.
    Pause,
    /// Let it go on.
    Resume,
    /// Move it.
    Migrate,
    /// Delete it.
    Delete,
}

impl OperationKind {
    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Migrate => "migrate",
            Self::Delete => "delete",
        }
    }

    /// Whether it asks for a power state, so that a newer such request replaces it.
    pub const fn is_power(self) -> bool {
        matches!(
            self,
            Self::Start | Self::Stop | Self::Restart | Self::Pause | Self::Resume
        )
    }
}

/// How far an operation is. Whether an active one is pending or running is derived from the observation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Not ended.
    Active,
    /// Ended as asked.
    Succeeded,
    /// Ended otherwise.
    Failed,
    /// Given up or replaced.
    Cancelled,
}

impl OperationState {
    /// Name in messages and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Work that goes on after its call has returned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// Its id; ids of later operations are greater.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// How far it is.
    pub state: OperationState,
    /// VM it works on.
    pub vm: VmId,
    /// That VM's name.
    pub vm_name: VmName,
    /// Generation it waits for.
    pub generation: Generation,
    /// Power state it waits for; `None` where it waits for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<PowerState>,
    /// For a stop: the guest's time to shut down, which is added to the deadline.
    #[serde(default)]
    pub grace_period_seconds: u32,
    /// For a migration: its record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// The caller's request id; empty when none was given.
    #[serde(default)]
    pub request_id: String,
    /// Who asked.
    pub principal: String,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
    /// What there is to say about its end.
    #[serde(default)]
    pub message: String,
    /// When it was accepted.
    pub create_time: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Timestamp>,
    /// Somebody asked to give it up.
    #[serde(default)]
    pub cancel_requested: bool,
}

impl OperationRecord {
    /// Whether it has not ended.
    pub fn is_active(&self) -> bool {
        self.state == OperationState::Active
    }
}

/// Phases of a live migration; the diagram is in [`crate::migration`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its room is reserved; it waits for its turn.
    Reserving,
    /// The destination makes room.
    PreparingDestination,
    /// Disks and memory are copied.
    Transferring,
    /// Both hosts are asked where the VM is: the point of no return.
    CuttingOver,
    /// The destination owns the VM; both hosts are told.
    CleaningSource,
    /// The source owns the VM; both hosts are told.
    CleaningDestination,
    /// Ended on the destination.
    Done,
    /// Ended on the source, because something failed.
    Failed,
    /// Ended on the source, because it was cancelled.
    Aborted,
}

impl Phase {
    /// Whether nothing more happens.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Aborted)
    }

    /// Whether the owner has been decided and only tidying up is left.
    pub const fn is_cleaning(self) -> bool {
        matches!(self, Self::CleaningSource | Self::CleaningDestination)
    }

    /// Whether it uses one of its hosts' places for transfers.
    pub const fn is_transfer(self) -> bool {
        matches!(
            self,
            Self::PreparingDestination | Self::Transferring | Self::CuttingOver
        )
    }

    /// Name in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserving => "Reserving",
            Self::PreparingDestination => "PreparingDestination",
            Self::Transferring => "Transferring",
            Self::CuttingOver => "CuttingOver",
            Self::CleaningSource => "CleaningSource",
            Self::CleaningDestination => "CleaningDestination",
            Self::Done => "Done",
            Self::Failed => "Failed",
            Self::Aborted => "Aborted",
        }
    }
}

/// What a settled host said is there of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    /// No domain.
    Absent,
    /// Defined, powered off.
    Stopped,
    /// Its processors run.
    Running,
    /// Paused with its memory whole.
    Paused,
    /// A QEMU that waits for incoming data.
    Incoming,
    /// A source QEMU whose memory must not be used again.
    HandedOver,
}

/// How a settled host says the transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transfer {
    /// It does not know, or it never began.
    Unknown,
    /// It ended well.
    Completed,
    /// It ended with an error.
    Failed,
}

/// A host's promise that nothing moves any more under a migration's id, and what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What is there of the VM.
    pub presence: Presence,
    /// How the transfer ended.
    pub transfer: Transfer,
}

/// How much has been copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Guest memory to copy.
    pub memory_total_bytes: u64,
    /// Memory copied so far.
    pub memory_processed_bytes: u64,
    /// Memory still to copy.
    pub memory_remaining_bytes: u64,
    /// Disk data to copy.
    pub disk_total_bytes: u64,
    /// Disk data copied so far.
    pub disk_processed_bytes: u64,
    /// Disk data still to copy.
    pub disk_remaining_bytes: u64,
    /// Present rate.
    pub rate_bytes_per_second: u64,
    /// What the guest writes.
    pub dirty_rate_bytes_per_second: u64,
    /// Expected stop.
    pub expected_downtime_ms: u64,
    /// Measured stop.
    pub downtime_ms: u64,
    /// Passes over the memory.
    pub iteration: u64,
    /// Time since the transfer began.
    pub elapsed_ms: u64,
}

/// A live migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// Its id, the same on both hosts.
    pub id: MigrationId,
    /// VM that moves.
    pub vm: VmId,
    /// Operation that asked for it.
    pub operation: OperationId,
    /// Host it leaves.
    pub source: HostName,
    /// Host it goes to.
    pub destination: HostName,
    /// Ownership number on the source at the start.
    pub source_epoch: Epoch,
    /// Ownership number on the destination, should it own the VM in the end.
    pub destination_epoch: Epoch,
    /// What the destination is told; fixed at the start so that a repeated call says the same.
    pub intent: Intent,
    /// Where it stands.
    pub phase: Phase,
    /// When it came there.
    pub phase_time: Timestamp,
    /// Somebody asked to give it up.
    #[serde(default)]
    pub abort_requested: bool,
    /// What went wrong first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
    /// Longest planned stop.
    pub max_downtime_ms: u32,
    /// Limit of the streams; 0 for none.
    pub bandwidth_mib_per_second: u32,
    /// The source's promise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_answer: Option<Answer>,
    /// The destination's promise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_answer: Option<Answer>,
    /// The source has tidied up.
    #[serde(default)]
    pub source_finished: bool,
    /// The destination has tidied up.
    #[serde(default)]
    pub destination_finished: bool,
    /// The last progress, known when the source has settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The decision that chose the destination.
    pub decision: Decision,
}

impl MigrationRecord {
    /// Whether the owner has confirmed that it keeps the VM.
    pub fn owner_finished(&self) -> bool {
        match self.phase {
            Phase::CleaningSource => self.destination_finished,
            Phase::CleaningDestination => self.source_finished,
            phase => phase.is_terminal(),
        }
    }
}

/// What a remembered request led to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// An operation.
    Operation(OperationId),
    /// A changed VM.
    Vm(VmName),
    /// A changed host.
    Host(HostName),
    /// A host was forgotten.
    HostDeleted,
}

/// A request that bore an id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Who asked, and the id.
    pub key: String,
    /// Hash of the request's content.
    pub body: String,
    /// What it led to.
    pub outcome: Outcome,
    /// When it was accepted.
    pub time: Timestamp,
}

/// What kind of thing an event tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A VM.
    Vm,
    /// A host.
    Host,
    /// An operation.
    Operation,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Position in the stream.
    pub revision: u64,
    /// When it was stored.
    pub time: Timestamp,
    /// What it tells of.
    pub kind: EventKind,
    /// Stable word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Name of the VM or host.
    pub subject: String,
    /// Operation it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
}

/// Whether an agent has done what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmPhase {
    /// Not said.
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
}

impl Observation {
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

/// A domain that is not Dalgu's.
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
    /// The agent has no working hypervisor.
    pub hypervisor_error: Option<String>,
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
            hypervisor_error: None,
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
}
