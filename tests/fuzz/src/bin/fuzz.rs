//! libFuzzer's side: one program for all targets; `DALGU_FUZZ_TARGET` says which. Built and called by `run.sh`, which gives the
//! compiler its coverage flags; does nothing else.
#![no_main]

use std::sync::LazyLock;

use dalgu_fuzz::{TARGETS, Target, target};

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("DALGU_FUZZ_TARGET").unwrap_or_default();
    target(&name).unwrap_or_else(|| {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("DALGU_FUZZ_TARGET must be one of: {}", names.join(" "));
        std::process::exit(2);
    })
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| (CHOSEN.run)(data));
