//! Placement by itself: how fast the engine decides, and how many hosts a policy needs. Called by the program
//! `bench-placement`; everything is in this process, and nothing waits.
//!
//! [`engine`] measures decisions on sites of growing size, each beside the plain scan of the same hosts in the same run; [`packing`]
//! replays a trace; [`durable`] asks a whole controller for VMs; [`peers`] runs another scheduler beside. All that is
//! measured of ours is what the controller itself runs: `dalgu_controller::placement`.

pub mod durable;
pub mod engine;
pub mod packing;
pub mod peers;
mod site;

use super::report::{Aim, Bound, Measure};

/// What is to be reached on one processor that nothing else takes.
pub const AIMS: [Aim; 11] = [
    ("pack, 10000 hosts: decisions a second", Bound::Least, 1e6),
    ("pack, 10000 hosts: p99", Bound::Most, 1000.0),
    ("pack, 100000 hosts: p99", Bound::Most, 2000.0),
    ("pack, 100000 hosts: p99.9", Bound::Most, 10_000.0),
    ("pack, a third fitted, 10000 hosts: p99", Bound::Most, 3000.0),
    ("pack, a third fitted, 100000 hosts: p99", Bound::Most, 6000.0),
    ("spread, 10000 hosts: p99", Bound::Most, 1000.0),
    ("spread, 100000 hosts: p99", Bound::Most, 2000.0),
    (
        "10000 hosts: a refusal with its whole explanation",
        Bound::Most,
        5.0,
    ),
    (
        "10000 hosts, durable: creations a second, 8 at once",
        Bound::Least,
        1000.0,
    ),
    (
        "10000 hosts, durable: a creation, 1000 a second: p99",
        Bound::Most,
        10.0,
    ),
];

/// A figure that was taken once.
#[must_use]
pub fn one(name: String, unit: &'static str, value: f64) -> Option<Measure> {
    Measure::of(name, unit, &[value])
}
