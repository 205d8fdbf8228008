//! The controller: holds what every virtual machine of a site should be, decides where each runs, and tells the
//! agents. [`run`] is the whole program but for arguments and signals; tests start it in process.
//!
//! Dependencies inside the crate point one way: `api` and `reconcile` use `state` and the pure modules (`placement`,
//! `reconcile::plan`, `migration::decide`, `status`, `doctor`); these use [`model`] only; `store` knows none of them.
#![forbid(unsafe_code)]

pub mod agent_client;
pub mod agent_wire;
pub mod api;
pub mod backup;
pub mod backups;
pub mod blocking;
pub mod config;
pub mod doctor;
pub mod drains;
pub mod hosts;
pub mod housekeeping;
pub mod images;
pub mod incarnation;
pub mod metrics;
pub mod migration;
pub mod model;
pub mod networks;
pub mod pki;
pub mod placement;
pub mod placement_groups;
pub mod planner;
pub mod plans;
pub mod power;
pub mod reconcile;
pub mod server;
pub mod simulator;
pub mod space;
pub mod state;
pub mod status;
pub mod store;
pub mod verbs;
pub mod volumes;

pub use server::{Controller, Core, Parts, run};

#[cfg(test)]
mod fixtures;
