//! What tests and benchmarks of networks share: a network with VMs in it ([`site`]), and a machine beside the hosts ([`beside`]) that asks
//! guests ([`probe`], [`ask`]); what is heard there or on a host ([`heard`]), and what no guest's kernel would say ([`forged`]).

pub mod ask;
pub mod beside;
pub mod forged;
pub mod heard;
pub mod probe;
pub mod site;
