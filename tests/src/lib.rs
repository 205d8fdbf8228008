//! What Dalgu is tested with as a whole: the lab (real libvirt hosts on one machine), and helpers of the
//! end-to-end tests, the demonstration and the benchmarks. Nothing here is part of the product.

pub mod bench;
pub mod chaos;
pub mod cluster;
pub mod demo;
pub mod e2e;
pub mod fleet;
pub mod lab;
pub mod linear;
pub mod operator;
pub mod serial;
pub mod signals;
pub mod stack;
pub mod store;
pub mod versions;
