//! Records of live migrations.

use dalgu_proto::ids::{Epoch, HostName, MigrationId, OperationId, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Fault, Intent};
use crate::placement::Decision;

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

    /// Name in messages: the one in the API without its prefix, as the command line writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserving => "reserving",
            Self::PreparingDestination => "preparing destination",
            Self::Transferring => "transferring",
            Self::CuttingOver => "cutting over",
            Self::CleaningSource => "cleaning source",
            Self::CleaningDestination => "cleaning destination",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Aborted => "aborted",
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
    /// It was told before that the VM is its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owner: bool,
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
    /// The source may have been told to send: stored before it is. Until then the VM cannot have left it.
    #[serde(default)]
    pub source_told: bool,
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
    /// Time on the destination from the VM's going on to its first packet, in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_delay_ms: Option<u64>,
    /// Time from the VM's stop at the source to that packet, in ms, where the source has told when that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_blackout_ms: Option<u64>,
    /// The decision that chose the destination.
    pub decision: Decision,
}

impl MigrationRecord {
    /// Time in which the VM could not be reached over its networks, in ms. Where the hosts have not measured all of it: QEMU's
    /// stop, and what passed from the VM's going on until its first packet on the destination.
    pub fn unreachable_ms(&self) -> Option<u64> {
        let sum = || Some(self.progress?.downtime_ms.saturating_add(self.network_delay_ms?));
        self.network_blackout_ms.or_else(sum)
    }

    /// Whether the owner has confirmed that it keeps the VM.
    pub fn owner_finished(&self) -> bool {
        match self.phase {
            Phase::CleaningSource => self.destination_finished,
            Phase::CleaningDestination => self.source_finished,
            phase => phase.is_terminal(),
        }
    }
}
