//! The faults that a test has ordered, and what each call may suffer. Pure; called by the simulated hypervisor.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use crate::hypervisor::Error;

/// A call of the trait, as the name under which a fault is ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the trait's method of the same name")]
pub enum Call {
    About,
    List,
    Get,
    Hardware,
    Layers,
    ChangeLayers,
    CreateVolumes,
    DeleteVolume,
    DeleteVolumes,
    PurgeVolume,
    Define,
    Change,
    Start,
    Shutdown,
    Destroy,
    Reboot,
    Reset,
    Pause,
    Resume,
    Undefine,
    Usage,
    Migrate,
    /// A migration's arrival, at the destination.
    Receive,
    Progress,
    AbortMigration,
    BackUp,
    BackupProgress,
    Backup,
    RemoveBackup,
    Files,
}

impl Call {
    /// The call's name in errors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::About => "about",
            Self::List => "list",
            Self::Get => "get",
            Self::Hardware => "hardware",
            Self::Layers => "layers",
            Self::ChangeLayers => "change_layers",
            Self::CreateVolumes => "create_volumes",
            Self::DeleteVolume => "delete_volume",
            Self::DeleteVolumes => "delete_volumes",
            Self::PurgeVolume => "purge_volume",
            Self::Define => "define",
            Self::Change => "change",
            Self::Start => "start",
            Self::Shutdown => "shutdown",
            Self::Destroy => "destroy",
            Self::Reboot => "reboot",
            Self::Reset => "reset",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Undefine => "undefine",
            Self::Usage => "usage",
            Self::Migrate => "migrate",
            Self::Receive => "receive",
            Self::Progress => "progress",
            Self::AbortMigration => "abort_migration",
            Self::BackUp => "back_up",
            Self::BackupProgress => "backup_progress",
            Self::Backup => "backup",
            Self::RemoveBackup => "remove_backup",
            Self::Files => "files",
        }
    }

    /// The deadline that the trait promises; a migration and a backup have none.
    pub(super) const fn deadline(self) -> Duration {
        let seconds = match self {
            Self::Progress | Self::BackupProgress => 5,
            Self::About
            | Self::List
            | Self::Get
            | Self::Hardware
            | Self::Layers
            | Self::Usage
            | Self::AbortMigration
            | Self::Backup
            | Self::Files => 10,
            Self::Define
            | Self::Shutdown
            | Self::Reboot
            | Self::Reset
            | Self::Pause
            | Self::Resume
            | Self::Undefine
            | Self::Receive => 30,
            Self::Destroy
            | Self::DeleteVolume
            | Self::DeleteVolumes
            | Self::PurgeVolume
            | Self::RemoveBackup => 60,
            Self::Start | Self::Change | Self::ChangeLayers => 120,
            Self::CreateVolumes => 600,
            Self::Migrate | Self::BackUp => u64::MAX / 4,
        };
        Duration::from_secs(seconds)
    }

    /// Whether the call waits for a step when stepping is by hand.
    pub(super) const fn changes(self) -> bool {
        !matches!(
            self,
            Self::About
                | Self::List
                | Self::Get
                | Self::Hardware
                | Self::Layers
                | Self::Usage
                | Self::Progress
                | Self::AbortMigration
                | Self::BackupProgress
                | Self::Backup
                | Self::Files
        )
    }
}

/// What happens to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It fails and has no effect.
    Error(Error),
    /// It never answers and has no effect; the caller gets [`Error::Timeout`] when its deadline is over.
    Hang,
    /// It has its effect and fails all the same.
    TakesEffect(Error),
    /// It does not answer in time, and has its effect so long after its caller got [`Error::Timeout`]; as `Hang` for
    /// calls that do not change one domain.
    Late(Duration),
}

/// A point of a migration at which its connection may break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The destination has just made its incoming domain: the source runs on, the destination removes its half.
    Prepare,
    /// Half of the data is over: as `Prepare`.
    Transfer,
    /// The source is stopped, the destination not yet told to go on: as `Prepare`.
    Handover,
    /// As `Handover`, but the other side still holds the locks of the disks: the source is refused them, and stands.
    Locked,
    /// The destination was told to go on and did; the source never learns and stays handed over.
    Finish,
    /// Everything is done; only the source's caller gets an error.
    Confirm,
}

/// Faults that wait for their call.
#[derive(Debug, Default)]
pub(super) struct Faults {
    calls: BTreeMap<Call, VecDeque<Fault>>,
    breaks: VecDeque<Phase>,
    panics: BTreeSet<Call>,
}

impl Faults {
    pub(super) fn order(&mut self, call: Call, fault: Fault) {
        self.calls.entry(call).or_default().push_back(fault);
    }

    pub(super) fn order_break(&mut self, phase: Phase) {
        self.breaks.push_back(phase);
    }

    pub(super) fn order_panic(&mut self, call: Call) {
        self.panics.insert(call);
    }

    pub(super) fn into_calls(self) -> Vec<(Call, Fault)> {
        let calls = self.calls.into_iter();
        calls
            .flat_map(|(call, faults)| faults.into_iter().map(move |fault| (call, fault)))
            .collect()
    }

    pub(super) fn take(&mut self, call: Call) -> Option<Fault> {
        assert!(!self.panics.remove(&call), "a test ordered this panic");
        self.calls.get_mut(&call)?.pop_front()
    }

    /// Takes the next fault of a call if it is a late effect.
    pub(super) fn take_late(&mut self, call: Call) -> Option<Duration> {
        let next = self.calls.get_mut(&call)?;
        match next.front() {
            Some(Fault::Late(after)) => {
                let after = *after;
                next.pop_front();
                Some(after)
            }
            _ => None,
        }
    }

    /// Takes the next ordered break if it is at this phase.
    pub(super) fn breaks(&mut self, phase: Phase) -> bool {
        self.breaks.pop_front_if(|next| *next == phase).is_some()
    }
}
