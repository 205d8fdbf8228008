//! Makes what is into what should be: one VM at a time, one step at a time.
//!
//! ```text
//! changes, reports, timers ─► queue ─► runner ─► plan (pure) ─► step: one call to an agent, or one change of the state
//!                               ▲                                   │
//!                               └───────────── again ◄──────────────┘
//! ```
//!
//! There is no memory but the state: a pass that was lost with the controller is simply made again. What agents answer
//! and report enters through `apply` alone.

pub mod apply;
mod let_go;
mod migrate;
pub mod plan;
pub mod queue;
pub mod runner;
pub mod step;
