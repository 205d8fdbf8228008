//! What tests and benchmarks of networks share: a network with VMs in it ([`site`]), and a machine beside the hosts ([`beside`]) that asks
//! guests ([`probe`], [`ask`]); and what is heard there or on a host ([`heard`]).

pub mod ask;
pub mod beside;
pub mod heard;
pub mod probe;
pub mod site;
