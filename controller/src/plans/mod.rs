//! Plans of moves: made of the site, shown, approved by their hash, and carried out as migrations.
//!
//! ```text
//!   CreatePlan ──> Proposed ──ApprovePlan──> Running ──every move made──> Done
//!                     │                        ├──reality differs, a move fails, the deadline──> Stopped
//!                     └──given up, or another──┴──given up──> Cancelled
//! ```
//!
//! [`look`] turns the state into the rows that [`planner`](crate::planner) decides on; [`usage`] keeps what VMs have used in the last
//! hours; [`advance`] makes one pass over the plan that runs, and [`runner`] makes the passes; where the site is set to relieve contended hosts by itself it
//! plans and approves as far as [`automatic`] allows. A plan begins nothing of its own kind: it asks for
//! migrations by the same verb as an operator, each to the host that the plan names, so every test of placement is made once more. What it had
//! begun is in the store: after a restart of the controller it goes on.
//!
//! [`predict`] says how long a move is likely to take, and for how long its VM then stands still.
//!
//! [`maintenance`] makes no plan of its own: it says which hosts can be emptied at the same time, and drains do the rest.

pub mod advance;
pub mod automatic;
pub mod look;
pub mod maintenance;
mod predict;
pub mod runner;
pub mod usage;
