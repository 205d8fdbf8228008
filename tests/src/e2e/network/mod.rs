//! What tests and benchmarks of networks share: a network with VMs in it ([`site`]), and a machine beside the hosts ([`beside`]) that asks
//! guests and listens ([`probe`]).

pub mod beside;
pub mod probe;
pub mod site;
