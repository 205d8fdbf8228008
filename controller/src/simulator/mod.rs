//! The simulator: a trace of VMs replayed through the very engine that places them on a real site, beside the rules of others.
//!
//! ```text
//!   file ─> command ─> Trace ─┬─> replay(Contender) ─> Outcome ─┬─> table, JSON, SVG
//!                             ├─> city ─> two bills ────────────┤
//!                             └─> overcommit, forecast ─────────┘
//! ```
//!
//! What places, plans and moves is [`crate::placement`] and [`crate::planner`] as the controller runs them, and nothing of them is rebuilt here; only
//! the hosts are numbers. [`peers`] are the rules that the engine is compared with. Called by `dalgu-controller simulate` and by the benchmarks.
//!
//! Pure but for [`command`], which reads and writes files: no runtime, store, clock, randomness or log; the same trace and the same settings
//! give the same outcome, to the last digit.

mod chart;
pub mod city;
pub mod command;
mod contender;
pub mod field;
pub mod forecast;
pub mod overcommit;
pub mod peers;
mod replay;
mod table;
pub mod trace;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

pub use self::{
    contender::Contender,
    replay::{Outcome, Point, Settings, replay},
};
