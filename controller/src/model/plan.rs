//! Plans of moves: what is proposed, what was approved, and how far it is.

use dalgu_proto::ids::{Generation, HostName, OperationId, PlanId, VmId, VmName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Fault;

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanKind {
    /// No VM waits.
    Rebalance,
    /// Fewer hosts.
    Consolidate,
    /// These hosts are emptied.
    Evacuate,
    /// A host gets room for a VM.
    MakeRoom,
}

impl PlanKind {
    /// Name in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rebalance => "rebalance",
            Self::Consolidate => "consolidate",
            Self::Evacuate => "evacuate",
            Self::MakeRoom => "make-room",
        }
    }
}

/// How far a plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanState {
    /// It waits for approval.
    Proposed,
    /// Its moves are made.
    Running,
    /// All were made.
    Done,
    /// Something was not as expected.
    Stopped,
    /// Somebody gave it up.
    Cancelled,
}

impl PlanState {
    /// Whether nothing more begins.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Stopped | Self::Cancelled)
    }

    /// Name in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Proposed => "proposed",
            Self::Running => "running",
            Self::Done => "done",
            Self::Stopped => "stopped",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How far a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Its turn has not come.
    Waiting,
    /// The VM moves.
    Moving,
    /// It has moved.
    Moved,
    /// It cannot, or it failed.
    Failed,
}

/// A VM moves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanStep {
    /// The VM.
    pub vm: VmId,
    /// Its name when the plan was made.
    pub name: VmName,
    /// Where it is.
    pub source: HostName,
    /// Where it goes.
    pub destination: HostName,
    /// Generation that it must have still.
    pub generation: Generation,
    /// What is copied.
    pub copied_bytes: u64,
    /// How long that is likely to take.
    pub predicted_seconds: f64,
    /// For how long the VM is likely to stand still then, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_ms: Option<u64>,
    /// Longest planned stop.
    pub max_downtime_ms: u32,
    /// How far it is.
    pub state: StepState,
    /// The operation that does it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// Why it cannot be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

/// What a site looks like to the planner.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PlanFigures {
    /// Hosts that have VMs.
    pub hosts_on: u32,
    /// Hosts on which VMs wait.
    pub hosts_contended: u32,
    /// How uneven hosts are used and reserved.
    pub unevenness_percent: f64,
    /// The VMs of any one host would find room on the others.
    pub spare_host: bool,
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanRecord {
    /// Its id; plans come in the order of their ids.
    pub id: PlanId,
    /// What it is for.
    pub kind: PlanKind,
    /// Hosts that are emptied; the one that has room then.
    #[serde(default)]
    pub hosts: Vec<HostName>,
    /// How far it is.
    pub state: PlanState,
    /// Of what it does.
    pub hash: String,
    /// The moves, in order.
    pub steps: Vec<PlanStep>,
    /// How long it is likely to take.
    pub predicted_seconds: f64,
    /// The site when it was made.
    pub before: PlanFigures,
    /// What is expected.
    pub predicted: PlanFigures,
    /// What came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub realised: Option<PlanFigures>,
    /// Who asked for it.
    pub principal: String,
    /// When it was made.
    pub create_time: Timestamp,
    /// Who approved it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_by: Option<String>,
    /// When.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approve_time: Option<Timestamp>,
    /// When it ends at the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Timestamp>,
    /// In a sentence.
    pub message: String,
}

impl PlanRecord {
    /// Steps in front of one that must have ended before it begins: those that leave the host that it goes to.
    pub fn waits_for(&self, step: usize) -> impl Iterator<Item = usize> {
        let to = self.steps.get(step).map(|step| &step.destination);
        let before = self.steps.iter().take(step).enumerate();
        before
            .filter(move |(_, other)| Some(&other.source) == to)
            .map(|(index, _)| index)
    }

    /// Steps in that state.
    pub fn count(&self, state: StepState) -> usize {
        self.steps.iter().filter(|step| step.state == state).count()
    }
}
