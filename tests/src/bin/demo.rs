//! `demo`: shows Dalgu on a lab of three real libvirt hosts, checks every claim, and takes the lab down again, also
//! after a failure or Ctrl-C. Called by `make demo`; all work is in `dalgu_tests::demo`.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Parser;
use dalgu_tests::lab::layout::Layout;
use dalgu_tests::lab::{self, Lab, Options};
use dalgu_tests::{demo, signals};

/// Dalgu on real guests, in about a minute.
#[derive(Parser)]
struct Arguments {
    /// Number of the lab to use, 0 to 9.
    #[arg(long, env = "DALGU_LAB_ID", default_value_t = 0)]
    id: u8,
    /// How many hosts, 2 or more.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=20))]
    hosts: u8,
    /// Leave the lab up at the end.
    #[arg(long)]
    keep: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let layout = Layout::new(arguments.id)?;
    if Lab::current(layout.clone()).is_ok() {
        bail!("lab {} is up already: `make lab-down` removes it", layout.id());
    }
    let options = Options {
        hosts: arguments.hosts,
        ..Options::default()
    };
    // Cancel safe: whatever was begun, the lab is taken down below.
    let outcome = tokio::select! {
        outcome = demo::run(layout.clone(), &options) => outcome,
        error = signals::stop() => Err(error),
    };
    if arguments.keep && Lab::current(layout.clone()).is_ok() {
        println!("\nThe lab is still up. To go on by hand:\n");
        println!("  eval \"$(make -s lab-env)\"\n  dalgu host list\n  make lab-down        # at the end");
        return outcome;
    }
    if outcome.is_err()
        && let Some(logs) = lab::keep_logs(&layout)
    {
        eprintln!("\nthe lab's logs are in {}", logs.display());
    }
    lab::down(layout).await.context("take the lab down")?;
    if outcome.is_ok() {
        println!("The lab is gone again, every trace of it.");
    }
    outcome
}
