//! Switches that turn off one rule of safety each, for the tests that show that every rule is needed.
//!
//! Without the feature `mutants` (the packages are built without it) [`on`] is always false and costs nothing. With it, a
//! test turns one on for its own thread with `turn_on`; a rule asks where it is applied.

/// A rule that can be turned off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The agent obeys commands of another session.
    SessionNotChecked,
    /// The agent obeys a controller that has been replaced.
    TermNotChecked,
    /// The agent obeys an older ownership number.
    EpochNotCompared,
    /// The agent obeys an older generation.
    GenerationNotCompared,
    /// The agent writes its ledger after it has called the hypervisor.
    LedgerAfterHypervisor,
    /// The controller believes an incomplete list of VMs to be complete.
    IncompleteInventoryAccepted,
    /// The owner after a migration is the one whose call said so.
    MigrationJudgedByReturnCode,
    /// The copy that has arrived goes on although its source may have gone on after it.
    OlderCopyChosen,
    /// The owner is decided before both hosts have settled.
    RevocationNotAwaited,
    /// The destination's place is given away while the migration is not resolved.
    EarlyReservationRelease,
    /// The agent does not write down that a start was begun, and starts again after a restart.
    StartRepeated,
    /// A VM that arrives by a migration runs before its source has let go of it.
    ArrivesRunning,
    /// A host that has settled still lets a late order to send or to prepare begin.
    SettledMayBegin,
    /// What is gone is forgotten at once, so that a late command makes it again.
    GoneForgotten,
    /// A repeated request is carried out again.
    RequestNotRemembered,
    /// The answer to a request goes out before its change is on disk.
    AnswerBeforeCommit,
    /// A place is given without counting what has been promised on the host.
    PromisesNotCounted,
    /// Anybody's report of a VM counts, not only its owner's.
    AnybodySpeaks,
    /// An older report replaces a newer one.
    OldReportsCount,
    /// The source of a migration removes its copy without being told.
    SourceTidiesByItself,
    /// The agent does not sync what it writes into its ledger.
    LedgerNotSynced,
    /// A restored controller gives its hosts and VMs the numbers that the backup has.
    RestoreKeepsNumbers,
    /// A restored controller commands before an operator has looked.
    RestoreDoesNotObserve,
    /// A controller that was refused for another one goes on commanding.
    RefusedGoesOn,
    /// The agent obeys every controller of its term, not only the first that it heard.
    RunNotCompared,
    /// A VM that is being deleted holds no addresses any more.
    LeaseFreedEarly,
    /// The agent starts a guest before the rules of its interfaces are there.
    RulesAfterRun,
    /// The agent makes disks from an image without waiting until it is here.
    ImageNotAwaited,
    /// A VM may be moved while a backup of it is taken.
    BackupNotExcluded,
    /// A volume that a VM has may be given to another.
    VolumeGivenTwice,
    /// The agent removes the file of a volume that a VM here still has.
    VolumePurgedInUse,
    /// The agent deletes a VM whose volumes have layers without merging them.
    VolumeNotMerged,
}

impl Mutant {
    /// Every one.
    pub const ALL: [Self; 32] = [
        Self::SessionNotChecked,
        Self::TermNotChecked,
        Self::EpochNotCompared,
        Self::GenerationNotCompared,
        Self::LedgerAfterHypervisor,
        Self::IncompleteInventoryAccepted,
        Self::MigrationJudgedByReturnCode,
        Self::OlderCopyChosen,
        Self::RevocationNotAwaited,
        Self::EarlyReservationRelease,
        Self::StartRepeated,
        Self::ArrivesRunning,
        Self::SettledMayBegin,
        Self::GoneForgotten,
        Self::RequestNotRemembered,
        Self::AnswerBeforeCommit,
        Self::PromisesNotCounted,
        Self::AnybodySpeaks,
        Self::OldReportsCount,
        Self::SourceTidiesByItself,
        Self::LedgerNotSynced,
        Self::RestoreKeepsNumbers,
        Self::RestoreDoesNotObserve,
        Self::RefusedGoesOn,
        Self::RunNotCompared,
        Self::LeaseFreedEarly,
        Self::RulesAfterRun,
        Self::ImageNotAwaited,
        Self::BackupNotExcluded,
        Self::VolumeGivenTwice,
        Self::VolumePurgedInUse,
        Self::VolumeNotMerged,
    ];
}

/// Whether the rule is turned off: never, in the programs.
#[cfg(not(feature = "mutants"))]
pub const fn on(_mutant: Mutant) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub use enabled::{Guard, on, turn_on};

#[cfg(feature = "mutants")]
mod enabled {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether the rule is turned off in this thread.
    pub fn on(mutant: Mutant) -> bool {
        ON.get() == Some(mutant)
    }

    /// Turns a rule off in this thread until the guard is dropped.
    pub fn turn_on(mutant: Mutant) -> Guard {
        ON.set(Some(mutant));
        Guard(())
    }

    /// See [`turn_on`].
    #[derive(Debug)]
    pub struct Guard(());

    impl Drop for Guard {
        fn drop(&mut self) {
            ON.set(None);
        }
    }
}
