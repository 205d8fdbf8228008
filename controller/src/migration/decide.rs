//! Where a VM is after a migration, from what both hosts promised and found. Pure.
//!
//! Called when both hosts have settled: neither will move the VM any more, so what they said stays true. The rule is
//! about what executes, or could: never about what a call returned.
//!
//! | source \ destination | Running        | Paused      | Stopped     | Absent, Incoming, HandedOver |
//! |----------------------|----------------|-------------|-------------|------------------------------|
//! | Running              | conflict       | source      | source      | source                       |
//! | Paused               | destination    | source      | source      | source                       |
//! | Stopped              | destination    | source      | newer disks | source                       |
//! | Absent, HandedOver, Incoming | destination | destination | destination | lost: newer disks       |
//!
//! What has arrived and is paused has not run there. A source that was not told that it arrived goes on by itself, and may be paused or end after
//! that: its disks are then newer than the memory at the destination, which must not go on with them. So that memory counts only where the
//! source says that it has handed over.
//!
//! A host that was told before that the VM is its own, and is asked again by a controller that was restored from a backup,
//! keeps it, whatever state it is in by now: since then it has the newer disks.
//!
//! "Newer disks": nothing is alive, so the side with the last writes keeps the VM: the destination if either host says
//! that the transfer ended well (the guest ran there), else the source.

use dalgu_proto::mutant::{self, Mutant};

use crate::model::{Answer, Presence, Transfer};

use super::Side;

/// Who owns the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// One side does.
    Owner {
        /// Which.
        side: Side,
        /// Its memory is gone: it must be started anew if it should run.
        lost: bool,
        /// Why.
        reason: &'static str,
    },
    /// It cannot be said; nothing may be started or removed.
    Conflict {
        /// Why.
        reason: &'static str,
    },
}

/// See the module.
pub fn decide(source: Answer, destination: Answer) -> Decision {
    use Presence::{Absent, HandedOver, Incoming, Paused, Running, Stopped};
    let owner = |side, reason| Decision::Owner {
        side,
        lost: false,
        reason,
    };
    if mutant::on(Mutant::MigrationJudgedByReturnCode) {
        return owner(newer(source, destination), "its transfer said so");
    }
    match (source.owner, destination.owner) {
        (true, false) => return owner(Side::Source, "it was told so before"),
        (false, true) => return owner(Side::Destination, "it was told so before"),
        _ => {}
    }
    match (source.presence, destination.presence) {
        (Running, Running) => Decision::Conflict {
            reason: "it runs on both hosts",
        },
        (Running, Paused) => owner(
            Side::Source,
            "it runs on the source; the copy on the destination is paused",
        ),
        (Running | Paused, Stopped | Absent | Incoming | HandedOver) => {
            owner(Side::Source, "it is alive on the source only")
        }
        (Paused | Stopped, Paused) if mutant::on(Mutant::OlderCopyChosen) => owner(
            Side::Destination,
            "its memory arrived, and the source does not run it",
        ),
        (Paused, Paused) => owner(
            Side::Source,
            "its memory is whole on the source; the copy on the destination has not run",
        ),
        (Stopped, Paused) => owner(
            Side::Source,
            "it ended on the source; the copy on the destination may be older than that",
        ),
        (Paused | Stopped, Running) | (Absent | Incoming | HandedOver, Running | Paused) => {
            owner(Side::Destination, "it is alive on the destination only")
        }
        (Stopped, Absent | Incoming | HandedOver) => owner(Side::Source, "it was powered off on the source"),
        (Stopped, Stopped) => owner(
            newer(source, destination),
            "it is powered off; the newer disks decide",
        ),
        (Absent | Incoming | HandedOver, Stopped) => {
            owner(Side::Destination, "it was powered off on the destination")
        }
        (Absent | Incoming | HandedOver, Absent | Incoming | HandedOver) => Decision::Owner {
            side: newer(source, destination),
            lost: true,
            reason: "its memory was lost between the hosts; the newer disks decide",
        },
    }
}

/// The side with the last writes to the disks.
fn newer(source: Answer, destination: Answer) -> Side {
    if [source, destination]
        .iter()
        .any(|answer| answer.transfer == Transfer::Completed)
    {
        Side::Destination
    } else {
        Side::Source
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Presence; 6] = [
        Presence::Absent,
        Presence::Stopped,
        Presence::Running,
        Presence::Paused,
        Presence::Incoming,
        Presence::HandedOver,
    ];
    const TRANSFERS: [Transfer; 3] = [Transfer::Unknown, Transfer::Completed, Transfer::Failed];

    fn answer(presence: Presence, transfer: Transfer) -> Answer {
        Answer {
            presence,
            transfer,
            owner: false,
        }
    }

    fn every(mut check: impl FnMut(Answer, Answer)) {
        for (source, destination) in ALL.iter().flat_map(|s| ALL.iter().map(move |d| (*s, *d))) {
            for (a, b) in TRANSFERS
                .iter()
                .flat_map(|a| TRANSFERS.iter().map(move |b| (*a, *b)))
            {
                check(answer(source, a), answer(destination, b));
            }
        }
    }

    #[test]
    fn the_whole_table_is_as_documented() {
        // Rows and columns in the order of ALL; S, D: owner. X: conflict. N: newer disks. L: lost, newer disks.
        let table = ["LDDDLL", "SNDSSS", "SSXSSS", "SSDSSS", "LDDDLL", "LDDDLL"];
        for (row, source) in table.iter().zip(ALL) {
            for (cell, destination) in row.chars().zip(ALL) {
                for transfer in TRANSFERS {
                    let found = decide(answer(source, transfer), answer(destination, Transfer::Unknown));
                    let newer = if transfer == Transfer::Completed {
                        Side::Destination
                    } else {
                        Side::Source
                    };
                    let expected = match cell {
                        'S' => Some((Side::Source, false)),
                        'D' => Some((Side::Destination, false)),
                        'N' => Some((newer, false)),
                        'L' => Some((newer, true)),
                        _ => None,
                    };
                    let found = match found {
                        Decision::Owner { side, lost, .. } => Some((side, lost)),
                        Decision::Conflict { .. } => None,
                    };
                    assert_eq!(found, expected, "{source:?} {destination:?} {transfer:?}");
                }
            }
        }
    }

    #[test]
    fn a_side_that_executes_always_owns_unless_both_do() {
        every(|source, destination| {
            let running = (
                source.presence == Presence::Running,
                destination.presence == Presence::Running,
            );
            match (running, decide(source, destination)) {
                ((true, true), Decision::Conflict { .. }) | ((false, false), Decision::Owner { .. }) => {}
                (
                    (true, false),
                    Decision::Owner {
                        side: Side::Source,
                        lost: false,
                        ..
                    },
                )
                | (
                    (false, true),
                    Decision::Owner {
                        side: Side::Destination,
                        lost: false,
                        ..
                    },
                ) => {}
                other => panic!("{source:?} {destination:?}: {other:?}"),
            }
        });
    }

    #[test]
    fn a_memory_that_must_not_be_used_is_never_chosen_over_one_that_is_whole() {
        every(|source, destination| {
            if let Decision::Owner { side, lost, .. } = decide(source, destination) {
                let (chosen, other) = if side == Side::Source {
                    (source, destination)
                } else {
                    (destination, source)
                };
                let whole = |a: Answer| matches!(a.presence, Presence::Running | Presence::Paused);
                let older = destination.presence == Presence::Paused && source.presence == Presence::Stopped;
                assert!(
                    whole(chosen) || !whole(other) || older,
                    "{source:?} {destination:?}"
                );
                let gone = |a: Answer| {
                    matches!(
                        a.presence,
                        Presence::Absent | Presence::Incoming | Presence::HandedOver
                    )
                };
                assert_eq!(lost, gone(source) && gone(destination));
            }
        });
    }

    #[test]
    fn a_host_that_was_told_before_that_the_vm_is_its_own_keeps_it() {
        every(|source, destination| {
            for side in [Side::Source, Side::Destination] {
                let is = |own| side == own;
                let source = Answer {
                    owner: is(Side::Source),
                    ..source
                };
                let destination = Answer {
                    owner: is(Side::Destination),
                    ..destination
                };
                let decided = decide(source, destination);
                assert!(
                    matches!(decided, Decision::Owner { side: kept, lost: false, .. } if kept == side),
                    "{source:?} {destination:?}: {decided:?}"
                );
            }
        });
    }
}
