//! Whether a history could have happened one call at a time: is there an order of its calls that keeps the order of those
//! that did not overlap, in which each call answers what the model answers? Pure; knows neither stores nor VMs.
//!
//! The search is that of Wing and Gong (1993), with Lowe's memory of what has been tried (2017). It is written here and
//! not taken from a crate: `stateright` has a tester of the same kind, but comes with a model checker, an actor system and a
//! web server, and knows no call whose outcome nobody learnt; porcupine is Go.

use std::{collections::HashSet, fmt::Debug, hash::Hash};

/// One call of a history. Times are any numbers that only rise.
#[derive(Debug, Clone)]
pub struct Call<O> {
    /// What was asked and, if known, answered.
    pub op: O,
    /// When it was made.
    pub begin: u64,
    /// When it was answered; or, without an answer, the moment after which it cannot take effect any more.
    pub end: u64,
    /// Without an answer it took effect before `end`, or never will.
    pub answered: bool,
}

/// Calls of a history that have been put into an order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Taken(Vec<u64>);

impl Taken {
    fn has(&self, number: usize) -> bool {
        self.0[number / 64] & (1 << (number % 64)) != 0
    }

    fn with(&self, number: usize) -> Self {
        let mut next = self.clone();
        next.0[number / 64] |= 1 << (number % 64);
        next
    }

    fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

/// A history that no order explains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unexplained {
    /// Calls that the longest order explains.
    pub explained: u32,
    /// Answered calls that it does not.
    pub left: Vec<usize>,
}

/// Judges a history. `step` gives the state after a call, or `None` where the call could not have been answered like that.
///
/// # Errors
/// If no order explains it.
pub fn check<S: Clone + Eq + Hash, O: Debug>(
    initial: S,
    calls: &[Call<O>],
    step: impl Fn(&S, &O) -> Option<S>,
) -> Result<(), Unexplained> {
    let first = Taken(vec![0; calls.len() / 64 + 1]);
    let mut longest = first.clone();
    let mut tried = HashSet::new();
    let mut open = vec![(first, initial)];
    while let Some((taken, state)) = open.pop() {
        if taken.count() > longest.count() {
            longest = taken.clone();
        }
        let waiting = |number: &usize| calls[*number].answered && !taken.has(*number);
        let Some(horizon) = (0..calls.len()).filter(waiting).map(|n| calls[n].end).min() else {
            return Ok(());
        };
        let latest = (0..calls.len())
            .filter(|n| taken.has(*n))
            .map(|n| calls[n].begin)
            .max();
        for (number, call) in calls.iter().enumerate().filter(|(n, _)| !taken.has(*n)) {
            // Somebody was answered before this was asked; or it is too late for it.
            let too_early = call.begin > horizon;
            let too_late = !call.answered && latest.is_some_and(|latest| latest > call.end);
            if too_early || too_late {
                continue;
            }
            if let Some(next) = step(&state, &call.op) {
                let taken = taken.with(number);
                if tried.insert((taken.clone(), next.clone())) {
                    open.push((taken, next));
                }
            }
        }
    }
    let left = (0..calls.len()).filter(|n| calls[*n].answered && !longest.has(*n));
    Err(Unexplained {
        explained: longest.count(),
        left: left.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone)]
    enum Op {
        Write(u8),
        Read(u8),
    }

    fn register(state: &u8, op: &Op) -> Option<u8> {
        match op {
            Op::Write(value) => Some(*value),
            Op::Read(seen) => (seen == state).then_some(*state),
        }
    }

    fn call(op: Op, begin: u64, end: u64) -> Call<Op> {
        Call {
            op,
            begin,
            end,
            answered: true,
        }
    }

    fn lost(op: Op, begin: u64, end: u64) -> Call<Op> {
        Call {
            answered: false,
            ..call(op, begin, end)
        }
    }

    fn is_linear(calls: &[Call<Op>]) -> bool {
        check(0, calls, register).is_ok()
    }

    #[test]
    fn calls_that_overlap_may_have_come_in_any_order() {
        for seen in [0, 1] {
            assert!(is_linear(&[call(Op::Write(1), 1, 4), call(Op::Read(seen), 2, 3)]));
        }
        assert!(is_linear(&[
            call(Op::Write(1), 1, 9),
            call(Op::Write(2), 2, 8),
            call(Op::Read(2), 3, 4),
            call(Op::Read(1), 5, 6),
        ]));
    }

    #[test]
    fn a_read_of_what_was_replaced_before_is_found() {
        assert!(!is_linear(&[call(Op::Write(1), 1, 2), call(Op::Read(0), 3, 4)]));
        // Once somebody has seen it, everybody does.
        assert!(!is_linear(&[
            call(Op::Write(1), 1, 9),
            call(Op::Read(1), 2, 3),
            call(Op::Read(0), 4, 5),
        ]));
        let unexplained = check(0, &[call(Op::Read(7), 1, 2)], register).unwrap_err();
        assert_eq!(unexplained.left, [0]);
    }

    #[test]
    fn a_call_without_an_answer_took_effect_or_not_but_not_after_its_end() {
        for seen in [0, 1] {
            assert!(is_linear(&[lost(Op::Write(1), 1, 3), call(Op::Read(seen), 4, 5)]));
        }
        assert!(!is_linear(&[
            lost(Op::Write(1), 1, 3),
            call(Op::Read(0), 4, 5),
            call(Op::Read(1), 6, 7),
        ]));
        assert!(!is_linear(&[
            lost(Op::Write(1), 1, 3),
            call(Op::Read(1), 4, 5),
            call(Op::Read(0), 6, 7),
        ]));
    }

    #[test]
    fn a_long_history_is_judged_without_trying_every_order() {
        let mut calls = Vec::new();
        for round in 0..40_u8 {
            let at = u64::from(round) * 100;
            calls.extend((0..5).map(|n| call(Op::Write(n), at + u64::from(n), at + 50)));
            calls.push(call(Op::Read(2), at + 60, at + 70));
        }
        assert!(is_linear(&calls));
        calls.push(call(Op::Read(99), 5000, 5001));
        assert!(!is_linear(&calls));
    }
}
