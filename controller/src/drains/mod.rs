//! Drains: emptying a host for maintenance, and bringing its VMs back.
//!
//! ```text
//!   drain ──> Active ──every VM moved, stopped or left──> Done ────────┐
//!               ├──the deadline, or only people can help──> Blocked ───┼──restore──> Active (back) ──> ...
//!               └──given up──> Cancelled ──────────────────────────────┘
//! ```
//!
//! A drain is part of its host's record and begins nothing of its own kind: it asks for migrations and stops as an operator would,
//! by the same verbs and with the same checks, a few at a time. [`advance`] makes one pass inside a transaction: what has
//! become of each VM is read from the state, never remembered, so a VM that somebody moves, stops or deletes meanwhile is seen as
//! it is. [`runner`] makes the passes. A drain always ends, at its deadline at the latest, and says of every VM what holds it.

pub mod advance;
pub mod runner;
