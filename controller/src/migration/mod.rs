//! Live migration as the controller drives it: a stored record, and the next step that follows from it.
//!
//! ```text
//! Reserving ─► PreparingDestination ─► Transferring ─► CuttingOver ─┬─► CleaningSource ──────► Done
//!     │                 │                    │        (both hosts   └─► CleaningDestination ─► Failed, Aborted
//!     └─► Aborted       └────── refused, failed, cancelled ──► settle)
//! ```
//!
//! Called by `reconcile::plan`. Pure. From the first call to an agent on there is only one way out: both hosts are
//! asked to settle, which is their promise that nothing moves any more, and [`decide`] reads the owner from what they
//! found. The outcome of the transfer itself decides nothing while the VM is alive anywhere.

pub mod decide;

use std::time::Duration;

use dalgu_proto::mutant::{self, Mutant};
use jiff::Timestamp;

use crate::model::{Answer, Code, Fault, MigrationLive, MigrationRecord, Phase, Presence, Transfer};

/// Time between two looks at a transfer.
pub const POLL: Duration = Duration::from_millis(500);
/// Time after which a migration that has no turn looks again.
pub const TURN: Duration = Duration::from_secs(1);
/// Longest wait for a destination to take its part, or to get on with fetching images, and for a source to begin.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for other hosts to hear where the VM goes, before it is sent.
pub const NETWORK_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait, once the owner is settled, for the destination to say when the VM's first packet left.
pub const DELAY_LIMIT: Duration = Duration::from_secs(2);
/// Transfers a host sends at once, and receives at once.
pub const TRANSFERS_PER_HOST: usize = 2;

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The VM leaves it.
    Source,
    /// The VM comes to it.
    Destination,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing for so long.
    Wait(Duration),
    /// Store the next phase.
    Advance(Phase, Option<Fault>),
    /// Tell the destination.
    Prepare,
    /// Tell the source.
    Start,
    /// Ask the source how far it is.
    Poll,
    /// Ask these hosts to settle.
    Settle {
        /// The source too.
        source: bool,
        /// The destination too.
        destination: bool,
    },
    /// Store the owner.
    Decide,
    /// Tell a host who owns the VM.
    Finish(Side),
}

/// The next step of a migration. `turn` says whether both hosts have a place for one more transfer.
pub fn next(record: &MigrationRecord, live: &MigrationLive, turn: bool, now: Timestamp) -> Step {
    match record.phase {
        Phase::Reserving if record.abort_requested => Step::Advance(Phase::Aborted, None),
        Phase::Reserving if turn => Step::Advance(Phase::PreparingDestination, None),
        Phase::Reserving => Step::Wait(TURN),
        Phase::PreparingDestination | Phase::Transferring if record.abort_requested => {
            Step::Advance(Phase::CuttingOver, None)
        }
        Phase::PreparingDestination => in_time(record, now, Step::Prepare, record.destination.as_str()),
        Phase::Transferring if live.started => Step::Poll,
        Phase::Transferring => in_time(record, now, Step::Start, record.source.as_str()),
        Phase::CuttingOver => cut_over(record),
        Phase::CleaningSource => clean(record, Side::Destination, Phase::Done),
        Phase::CleaningDestination => clean(record, Side::Source, ended_on_source(record)),
        Phase::Done | Phase::Failed | Phase::Aborted => Step::Wait(Duration::MAX),
    }
}

/// When the wait of a phase is over.
pub fn limit(record: &MigrationRecord) -> Timestamp {
    record
        .phase_time
        .saturating_add(ANSWER_LIMIT)
        .unwrap_or(Timestamp::MAX)
}

fn in_time(record: &MigrationRecord, now: Timestamp, step: Step, host: &str) -> Step {
    if now < limit(record) {
        return step;
    }
    let message = format!(
        "host {host} did not take its part within {} s: see its agent's log, then migrate again",
        ANSWER_LIMIT.as_secs()
    );
    Step::Advance(
        Phase::CuttingOver,
        Some(Fault::new(Code::Unavailable, "HOST_UNREACHABLE", message)),
    )
}

/// What both hosts promised and found. A destination that waits for a source that was never told to send has nothing,
/// whether it answers or not; but a source whose answer says that it did send is believed over a store that does not know
/// of it, as an old copy of the store does not.
pub fn answers(record: &MigrationRecord) -> (Option<Answer>, Option<Answer>) {
    let nothing = Answer {
        presence: Presence::Absent,
        transfer: Transfer::Unknown,
        owner: false,
    };
    let told = record.source_told || record.source_answer.is_some_and(has_sent);
    let destination = if told && !mutant::on(Mutant::RevocationNotAwaited) {
        record.destination_answer
    } else {
        Some(nothing)
    };
    (record.source_answer, destination)
}

/// Whether a source's answer is that of one which was told to send: the transfer has ended, or the VM is not there any more.
fn has_sent(source: Answer) -> bool {
    let there = matches!(
        source.presence,
        Presence::Running | Presence::Paused | Presence::Stopped
    );
    source.transfer != Transfer::Unknown || !there
}

fn cut_over(record: &MigrationRecord) -> Step {
    match answers(record) {
        (Some(source), Some(destination)) => match decide::decide(source, destination) {
            decide::Decision::Owner { .. } => Step::Decide,
            // Somebody must act on a host; what they did shows when the hosts are asked again.
            decide::Decision::Conflict { .. } => Step::Settle {
                source: true,
                destination: true,
            },
        },
        // The source first: it ends the transfer in order. Cutting the destination's streams while the source is handing
        // over could make libvirt resume the source although the destination runs.
        (None, _) => Step::Settle {
            source: true,
            destination: false,
        },
        (Some(_), None) => Step::Settle {
            source: false,
            destination: true,
        },
    }
}

fn clean(record: &MigrationRecord, owner: Side, end: Phase) -> Step {
    let finished = |side| match side {
        Side::Source => record.source_finished,
        Side::Destination => record.destination_finished,
    };
    let other = if owner == Side::Source {
        Side::Destination
    } else {
        Side::Source
    };
    if !finished(owner) {
        Step::Finish(owner)
    } else if !finished(other) {
        Step::Finish(other)
    } else {
        Step::Advance(end, None)
    }
}

/// Cancelled, unless something had gone wrong before.
fn ended_on_source(record: &MigrationRecord) -> Phase {
    if record.abort_requested && record.error.is_none() {
        Phase::Aborted
    } else {
        Phase::Failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn record(phase: Phase) -> MigrationRecord {
        MigrationRecord {
            phase,
            ..fixtures::migration(&fixtures::vm("web", "h1"), "h2")
        }
    }

    fn step(record: &MigrationRecord) -> Step {
        next(
            record,
            &MigrationLive {
                started: true,
                ..MigrationLive::default()
            },
            true,
            Timestamp::UNIX_EPOCH,
        )
    }

    #[test]
    fn each_phase_has_its_step() {
        assert_eq!(
            step(&record(Phase::Reserving)),
            Step::Advance(Phase::PreparingDestination, None)
        );
        assert_eq!(step(&record(Phase::PreparingDestination)), Step::Prepare);
        assert_eq!(step(&record(Phase::Transferring)), Step::Poll);
        assert_eq!(
            step(&record(Phase::CuttingOver)),
            Step::Settle {
                source: true,
                destination: false
            }
        );
        assert_eq!(
            step(&record(Phase::CleaningSource)),
            Step::Finish(Side::Destination)
        );
        assert_eq!(
            step(&record(Phase::CleaningDestination)),
            Step::Finish(Side::Source)
        );
        let unstarted = record(Phase::Transferring);
        let live = MigrationLive::default();
        assert_eq!(next(&unstarted, &live, true, Timestamp::UNIX_EPOCH), Step::Start);
        assert_eq!(
            next(&record(Phase::Reserving), &live, false, Timestamp::UNIX_EPOCH),
            Step::Wait(TURN)
        );
    }

    #[test]
    fn a_cancelled_migration_that_told_an_agent_asks_both_hosts_before_it_ends() {
        let cancelled = |phase| MigrationRecord {
            abort_requested: true,
            ..record(phase)
        };
        assert_eq!(
            step(&cancelled(Phase::Reserving)),
            Step::Advance(Phase::Aborted, None)
        );
        for phase in [Phase::PreparingDestination, Phase::Transferring] {
            assert_eq!(step(&cancelled(phase)), Step::Advance(Phase::CuttingOver, None));
        }
        assert_eq!(
            step(&cancelled(Phase::CleaningSource)),
            Step::Finish(Side::Destination),
            "it lost the race"
        );
    }

    #[test]
    fn an_answer_once_given_is_not_asked_for_again() {
        let answer = |presence| {
            Some(Answer {
                presence,
                transfer: Transfer::Unknown,
                owner: false,
            })
        };
        let mut record = record(Phase::CuttingOver);
        record.source_answer = answer(Presence::Running);
        assert_eq!(
            step(&record),
            Step::Settle {
                source: false,
                destination: true
            }
        );
        record.destination_answer = answer(Presence::Absent);
        assert_eq!(step(&record), Step::Decide);
        record.destination_answer = answer(Presence::Running);
        assert_eq!(
            step(&record),
            Step::Settle {
                source: true,
                destination: true
            },
            "both run: ask until somebody acted"
        );
    }

    #[test]
    fn a_destination_need_not_be_asked_while_the_source_was_never_told_to_send() {
        let mut record = MigrationRecord {
            source_told: false,
            ..record(Phase::CuttingOver)
        };
        let source_only = Step::Settle {
            source: true,
            destination: false,
        };
        assert_eq!(step(&record), source_only);
        record.source_answer = Some(Answer {
            presence: Presence::Running,
            transfer: Transfer::Unknown,
            owner: false,
        });
        assert_eq!(step(&record), Step::Decide);
    }

    #[test]
    fn a_source_that_did_send_is_believed_over_a_store_that_does_not_know_of_it() {
        let record = |presence, transfer| MigrationRecord {
            source_told: false,
            source_answer: Some(Answer {
                presence,
                transfer,
                owner: false,
            }),
            ..record(Phase::CuttingOver)
        };
        let ask_destination = Step::Settle {
            source: false,
            destination: true,
        };
        for (presence, transfer) in [
            (Presence::Absent, Transfer::Completed),
            (Presence::Absent, Transfer::Unknown),
            (Presence::HandedOver, Transfer::Unknown),
            (Presence::Stopped, Transfer::Completed),
            (Presence::Paused, Transfer::Failed),
        ] {
            assert_eq!(step(&record(presence, transfer)), ask_destination, "{presence:?}");
        }
    }

    #[test]
    fn both_hosts_tidy_up_before_the_end_and_the_end_is_named_rightly() {
        for (phase, abort, failed, end) in [
            (Phase::CleaningSource, true, true, Phase::Done),
            (Phase::CleaningDestination, true, false, Phase::Aborted),
            (Phase::CleaningDestination, true, true, Phase::Failed),
            (Phase::CleaningDestination, false, false, Phase::Failed),
        ] {
            let mut record = record(phase);
            record.abort_requested = abort;
            record.error = failed.then(|| Fault::new(Code::Internal, "X", "x"));
            let owner = if phase == Phase::CleaningSource {
                Side::Destination
            } else {
                Side::Source
            };
            if owner == Side::Source {
                record.source_finished = true
            } else {
                record.destination_finished = true
            }
            let other = if owner == Side::Source {
                Side::Destination
            } else {
                Side::Source
            };
            assert_eq!(step(&record), Step::Finish(other));
            record.source_finished = true;
            record.destination_finished = true;
            assert_eq!(step(&record), Step::Advance(end, None));
        }
    }

    #[test]
    fn a_host_that_never_answers_ends_the_attempt_but_not_a_running_transfer() {
        let late = limit(&record(Phase::Transferring));
        for phase in [Phase::PreparingDestination, Phase::Transferring] {
            let step = next(&record(phase), &MigrationLive::default(), true, late);
            assert!(
                matches!(step, Step::Advance(Phase::CuttingOver, Some(_))),
                "{step:?}"
            );
        }
        let started = MigrationLive {
            started: true,
            ..MigrationLive::default()
        };
        assert_eq!(
            next(&record(Phase::Transferring), &started, true, late),
            Step::Poll
        );
    }
}
