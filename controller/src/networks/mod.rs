//! Networks of the site: the addresses that VMs get in them, and what hosts are told of them.
//!
//! [`resolve`] looks up the networks and groups that a VM asks for and gives it its addresses (pure), [`plan`] says what each
//! host must know (pure), [`runner`] tells it. What a host is told follows from the store alone, so nothing of it is stored; how
//! far each has been told is known of its agent's present run only.

pub mod plan;
pub mod resolve;
pub mod runner;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

/// Most networks of a site.
pub const MAX_NETWORKS: usize = 4096;
/// Most security groups of a site.
pub const MAX_GROUPS: usize = 4096;
/// Most interfaces in a network: each host that has one knows of all.
pub const MAX_INTERFACES: usize = 4096;
