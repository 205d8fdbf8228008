//! What Dalgu is tested with as a whole: the lab (real libvirt hosts on one machine), and helpers of the
//! end-to-end tests and the benchmarks. Nothing here is part of the product.

pub mod lab;
