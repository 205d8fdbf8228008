//! The agent: on each server it carries out what the controller intends, through libvirt, and reports what is.
pub mod host;
pub mod hypervisor;
pub mod metrics;
