//! Fuzz targets: everything of Dalgu that reads what others wrote, each as a function of bytes that panics when a promise
//! is broken.
//!
//! Called by `bin/fuzz.rs` under libFuzzer with coverage (`make fuzz`), and by `tests/replay.rs` with the inputs that are kept
//! in `seeds/` and `corpus/`, in an ordinary build. A target is deterministic as far as its code under test is, keeps
//! nothing between two calls, and touches no file outside a directory of its own.
#![forbid(unsafe_code)]

pub mod agents;
pub mod config;
pub mod corpus;
pub mod images;
pub mod input;
pub mod records;
pub mod rpc;
pub mod scratch;
pub mod site;
pub mod telemetry;
pub mod xml;

/// One target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, also of its folder of seeds and of its corpus.
    pub name: &'static str,
    /// Takes one input.
    pub run: fn(&[u8]),
}

/// Every target.
pub const TARGETS: [Target; 7] = [
    Target {
        name: "rpc",
        run: rpc::run,
    },
    Target {
        name: "agents",
        run: agents::run,
    },
    Target {
        name: "records",
        run: records::run,
    },
    Target {
        name: "xml",
        run: xml::run,
    },
    Target {
        name: "telemetry",
        run: telemetry::run,
    },
    Target {
        name: "images",
        run: images::run,
    },
    Target {
        name: "config",
        run: config::run,
    },
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}
