//! The controller as a whole, in process, over real TLS connections, with agents that only pretend to have VMs.

mod agent;
mod api;
mod crash;
mod fabric;
mod lifecycle;
mod migration;
mod site;
