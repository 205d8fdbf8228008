//! The contract between the command line, the controller and the agents: the generated gRPC modules, and the
//! validated domain types that the rest of Dalgu works with.
//!
//! Generated types stop at the edge of each program; what lies behind it uses the types of [`vm`], [`host`] and
//! [`ids`], which cannot hold a value that the documentation forbids. Beside them is what the programs share of their
//! work: mutual TLS in [`tls`], metrics in [`metrics`], a daemon's life in [`daemon`]; and the switches of the tests of the
//! rules of safety, [`mutant`].
#![forbid(unsafe_code)]

/// Generated from `dalgu/v1/*.proto`: the operator API.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::too_many_lines)]
pub mod v1 {
    tonic::include_proto!("dalgu.v1");
}

/// Generated from `dalgu/agent/v1/*.proto`: the API between controller and agents.
pub mod agent {
    /// Version 1.
    #[allow(missing_docs, clippy::all, clippy::too_many_lines)]
    pub mod v1 {
        tonic::include_proto!("dalgu.agent.v1");
    }
}

/// Every .proto file as an encoded `google.protobuf.FileDescriptorSet`, for reflection and JSON.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dalgu.descriptors.bin"));

pub mod daemon;
pub mod host;
pub mod ids;
pub mod image;
pub mod metrics;
pub mod mutant;
pub mod network;
pub mod placement;
pub mod reason;
pub mod secret;
pub mod size;
pub mod snapshot;
pub mod time;
pub mod tls;
pub mod vm;
