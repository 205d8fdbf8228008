//! Records what this version says and stores, for the tests of later versions: `record-samples NAME` writes
//! `tests/samples/NAME`. At a release, NAME is its version.

use anyhow::{Result, ensure};
use clap::Parser;
use dalgu_tests::versions::{record, samples};

/// Records this version's samples.
#[derive(Parser)]
struct Arguments {
    /// Folder below tests/samples
    #[arg(default_value = env!("CARGO_PKG_VERSION"))]
    name: String,
}

fn main() -> Result<()> {
    let Arguments { name } = Arguments::parse();
    ensure!(!name.contains('/'), "{name} is no name of a folder");
    let dir = samples::folder().join(&name);
    // Nobody waits for the story's pauses.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()?
        .block_on(record::record(&dir))?;
    println!("wrote {}", dir.display());
    Ok(())
}
