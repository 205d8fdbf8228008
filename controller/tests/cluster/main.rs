//! The controller as a whole, in process, over real TLS connections, with agents that only pretend to have VMs.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

mod agent;
mod api;
mod backup;
mod cancel;
mod crash;
mod drain;
mod fabric;
mod image;
mod images;
mod init;
mod lifecycle;
mod migration;
mod network;
mod networks;
mod placement;
mod plan;
mod power;
mod protection;
mod redfish;
mod restore;
mod site;
mod storage;
mod volume;
