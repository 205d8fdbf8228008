//! Placement by itself: how fast the engine decides, and how many hosts a policy needs. Called by the program
//! `bench-placement`; everything is in this process, and nothing waits.
//!
//! [`engine`] measures decisions on sites of growing size, each beside the plain scan of the same hosts in the same run; [`packing`]
//! replays a trace. All that is
//! measured is what the controller itself runs: `dalgu_controller::placement`.

pub mod engine;
pub mod packing;
mod site;

use super::report::{Measure, Report};

/// Whether a figure is to be at most or at least something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// At most.
    Most,
    /// At least.
    Least,
}

/// What is to be reached on one processor that nothing else takes.
pub const AIMS: [(&str, Bound, f64); 7] = [
    ("pack, 10000 hosts: decisions a second", Bound::Least, 1e6),
    ("pack, 10000 hosts: p99", Bound::Most, 1000.0),
    ("pack, 100000 hosts: p99", Bound::Most, 2000.0),
    ("pack, 100000 hosts: p99.9", Bound::Most, 10_000.0),
    ("spread, 10000 hosts: p99", Bound::Most, 1000.0),
    ("spread, 100000 hosts: p99", Bound::Most, 2000.0),
    (
        "10000 hosts: a refusal with its whole explanation",
        Bound::Most,
        5.0,
    ),
];

/// Each aim that was measured, in words, and whether it was reached.
#[must_use]
pub fn judge(report: &Report, aims: &[(&str, Bound, f64)]) -> Vec<(String, bool)> {
    let judged = aims.iter().filter_map(|(name, bound, limit)| {
        let found = report.0.iter().find(|measure| measure.name == *name)?;
        let (reached, side) = match bound {
            Bound::Most => (found.value <= *limit, "at most"),
            Bound::Least => (found.value >= *limit, "at least"),
        };
        let word = if reached { "reached" } else { "MISSED" };
        let line = format!(
            "aim {word}: {name}: {:.3} {}, {side} {limit}",
            found.value, found.unit
        );
        Some((line, reached))
    });
    judged.collect()
}

/// A figure that was taken once.
#[must_use]
pub fn one(name: String, unit: &'static str, value: f64) -> Option<Measure> {
    Measure::of(name, unit, &[value])
}
