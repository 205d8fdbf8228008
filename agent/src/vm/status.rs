//! What a VM's task publishes about it, in the agent's own words; [`crate::wire`] turns it into reports.

use std::time::Duration;

use dalgu_proto::{
    ids::{Epoch, Generation, MigrationId, VmId},
    snapshot::Set,
    vm::{Device, NumaPlace, PowerReason, PowerState, RestartMode, RestartPolicy, Spec},
};
use jiff::Timestamp;

use crate::{
    hypervisor::{DomainState, Progress},
    ledger::{Intent, Role, Transfer},
    vm::plan::changes::Pending,
};

/// Whether the intent is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Work is under way.
    Applying,
    /// Carried out in full.
    Settled,
    /// Cannot be carried out.
    Failed,
    /// Being removed.
    Deleting,
    /// May arrive by migration.
    Incoming,
    /// On its way out.
    Outgoing,
    /// Nothing is here; not reported.
    Gone,
}

/// A snapshot that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotSeen {
    /// Number of its layer.
    pub number: u32,
    /// Whether the guest's file systems were frozen for it, if that is known.
    pub quiesced: Option<bool>,
    /// Space that the layer takes, in bytes; 0 where that was not looked at.
    pub written_bytes: u64,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Stable reason.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether the agent tries again by itself.
    pub retrying: bool,
    /// When it was first seen.
    pub since: Timestamp,
}

/// What is here of a VM that migrates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Could not be found out.
    Unknown,
    /// No domain.
    Absent,
    /// A domain in this state.
    Is(DomainState),
}

/// A host's part in a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// The migration.
    pub id: MigrationId,
    /// Which part; `None` when it was settled here before it began.
    pub role: Option<Role>,
    /// How far.
    pub transfer: Transfer,
    /// Nothing moves under this id any more.
    pub settled: bool,
    /// Owner known, everything tidied up.
    pub finished: bool,
    /// The VM is this host's own, by what it was told.
    pub owner: bool,
    /// What is here of the VM.
    pub presence: Presence,
    /// Progress; source only.
    pub progress: Progress,
    /// Destination only: the VM's first packet here; absent where it was not seen.
    pub arrival: Option<Arrival>,
}

/// The first packet that one of a VM's interfaces in networks of the site sent where it has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Time from the source's word that the VM may go on here.
    pub delay: Duration,
    /// Time since the VM had stopped at the source; absent where that does not say so.
    pub blackout: Option<Duration>,
}

/// What this host was told last that an owner can change, besides the generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// What its processors should do.
    pub power: PowerState,
    /// Its power request.
    pub power_sequence: u64,
    /// Its restart request.
    pub restart_sequence: u64,
    /// How that restart is to be done.
    pub restart_mode: RestartMode,
    /// Seconds a guest has to shut down.
    pub grace_period_seconds: u32,
    /// When the agent starts it again.
    pub restart_policy: RestartPolicy,
}

impl From<&Intent> for Asked {
    fn from(intent: &Intent) -> Self {
        Self {
            power: intent.power,
            power_sequence: intent.power_sequence,
            restart_sequence: intent.restart_sequence,
            restart_mode: intent.restart_mode,
            grace_period_seconds: intent.grace_period_seconds,
            restart_policy: intent.spec.restart_policy,
        }
    }
}

/// Everything a VM's task knows, for others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// UUID of the VM.
    pub id: VmId,
    /// Its name; empty while nothing but a settled migration is known.
    pub name: String,
    /// Last generation accepted.
    pub accepted_generation: Generation,
    /// Last generation carried out in full.
    pub observed_generation: Generation,
    /// Ownership number.
    pub epoch: Epoch,
    /// What was asked for in the intent accepted last.
    pub asked: Option<Asked>,
    /// What it is made of by that, where it is not what it was created with.
    pub changed_spec: Option<Spec>,
    /// Where it is on this host.
    pub places: Vec<NumaPlace>,
    /// PCI devices of this host that are its own.
    pub devices: Vec<Device>,
    /// What the running VM does not have yet of its specification.
    pub pending: Vec<Pending>,
    /// Its snapshots by the intent accepted last, if it was told of any.
    pub snapshots_told: Option<Set>,
    /// Those that are there, oldest first.
    pub snapshots: Vec<SnapshotSeen>,
    /// Rises with each change.
    pub status_generation: u64,
    /// Whether the intent is carried out.
    pub phase: Phase,
    /// Power state seen; `None` where there is no domain or it could not be seen.
    pub power: Option<PowerState>,
    /// Why.
    pub reason: PowerReason,
    /// When it was seen.
    pub observed_at: Option<Timestamp>,
    /// What is wrong.
    pub failure: Option<Failure>,
    /// Latest migration.
    pub migration: Option<Migration>,
    /// Found in the hypervisor, not in the ledger.
    pub adopted: bool,
    /// Virtual processors and memory in MiB that its domain may use; 0 where there is none.
    pub size: (u32, u64),
}

impl Status {
    /// The status of a VM of which nothing is known yet.
    pub fn unknown(id: VmId) -> Self {
        Self {
            id,
            name: String::new(),
            accepted_generation: Generation(0),
            observed_generation: Generation(0),
            epoch: Epoch(0),
            asked: None,
            changed_spec: None,
            places: Vec::new(),
            devices: Vec::new(),
            pending: Vec::new(),
            snapshots_told: None,
            snapshots: Vec::new(),
            status_generation: 0,
            phase: Phase::Gone,
            power: None,
            reason: PowerReason::Unknown,
            observed_at: None,
            failure: None,
            migration: None,
            adopted: false,
            size: (0, 0),
        }
    }

    /// Whether two statuses say the same, times and counters aside.
    pub fn same_content(&self, other: &Self) -> bool {
        let plain = |status: &Self| Self {
            status_generation: 0,
            observed_at: None,
            migration: status.migration.clone().map(|migration| Migration {
                progress: Progress::default(),
                ..migration
            }),
            ..status.clone()
        };
        plain(self) == plain(other)
    }
}
