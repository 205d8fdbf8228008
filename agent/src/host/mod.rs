//! What this host is made of and how it is used, read from /proc and /sys.
//!
//! The agent owns one [`Sampler`] and calls it on a timer, off the async runtime's threads (it reads files, and
//! waits for a short while on storage). Rates come from two samples on the clock since boot, never from wall
//! time. Nothing here talks to the hypervisor; [`process`] and [`rates`] help the part that does.
//!
//! ```text
//! inventory   what there is        cpu memory nic pressure storage   the parts of a sample
//! usage       one sample of it     rates                             counters to rates, pure
//! process     a QEMU process       root                              where /proc and /sys are
//! pci         devices for VMs
//! ```

pub mod inventory;
pub mod pci;
pub mod process;
pub mod rates;
pub mod storage;
pub mod usage;

mod cpu;
mod memory;
mod nic;
mod pressure;
mod root;

pub use inventory::{node_cpus, online as online_cpus};
pub use rates::VmRates;
pub use root::{Error, Root, number_list};
pub use storage::PoolConfig;
pub use usage::Sampler;
