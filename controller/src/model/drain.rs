//! The emptying of a host, and the bringing back of what that moved or stopped.

use std::collections::BTreeMap;

use dalgu_proto::ids::{HostName, OperationId, VmId, VmName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Fault;

/// What becomes of a VM whose host is drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainMode {
    /// It moves to another host while it runs.
    #[default]
    LiveMigrate,
    /// It is shut down.
    Stop,
    /// It stays and runs on.
    Leave,
    /// Somebody has to say.
    Ask,
}

impl DrainMode {
    /// Whether it is what a VM has for which nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Which way VMs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Away from the host.
    Out,
    /// Back to it.
    Back,
}

/// How far a drain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// It goes on.
    Active,
    /// Every VM is where it should be, or was to be left.
    Done,
    /// Some are not, and time is over or only people can help.
    Blocked,
    /// Somebody gave it up.
    Cancelled,
}

/// How far a VM is in a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Its turn has not come.
    Waiting,
    /// It moves.
    Moving,
    /// It is where it should be.
    Moved,
    /// It shuts down.
    Stopping,
    /// It is off, and was not before.
    Stopped,
    /// It starts.
    Starting,
    /// It runs again.
    Started,
    /// It stays as it is: it was off, it is to be left, or somebody has done otherwise with it since.
    Left,
    /// What should be done cannot be; its fault says why.
    Blocked,
}

impl Stage {
    /// Whether something is being done with it.
    pub const fn is_under_way(self) -> bool {
        matches!(self, Self::Moving | Self::Stopping | Self::Starting)
    }

    /// Whether nothing more is to be done with it.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Moved | Self::Stopped | Self::Started | Self::Left)
    }
}

/// A VM in a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainedVm {
    /// The VM.
    pub vm: VmId,
    /// What becomes of it; when VMs are brought back, what became of it.
    pub mode: DrainMode,
    /// How far it is.
    pub stage: Stage,
    /// Where it moves or has moved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// The operation that does it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// Why it is blocked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// That may pass without anybody's help.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passes: bool,
    /// How often it was tried and failed.
    #[serde(default)]
    pub failures: u32,
}

impl DrainedVm {
    /// One whose turn has not come.
    pub const fn new(vm: VmId, mode: DrainMode) -> Self {
        Self {
            vm,
            mode,
            stage: Stage::Waiting,
            host: None,
            operation: None,
            fault: None,
            passes: false,
            failures: 0,
        }
    }
}

/// See the module. A host keeps its last one, so that its VMs can be brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Which way.
    pub direction: Direction,
    /// How far it is.
    pub state: DrainState,
    /// Who asked for it.
    pub principal: String,
    /// What becomes of all VMs, whatever they say themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<DrainMode>,
    /// When it was asked for.
    pub begin_time: Timestamp,
    /// When it ends at the latest.
    pub deadline: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Timestamp>,
    /// The VMs, by name.
    #[serde(default)]
    pub vms: BTreeMap<VmName, DrainedVm>,
}

impl Drain {
    /// Whether it has not ended.
    pub fn is_active(&self) -> bool {
        self.state == DrainState::Active
    }

    /// VMs that are in this stage.
    pub fn count(&self, stage: impl Fn(Stage) -> bool) -> usize {
        self.vms.values().filter(|vm| stage(vm.stage)).count()
    }
}
