//! `bench-lifecycle`: measures Dalgu on a lab of its own and takes the lab down, also after a failure or Ctrl-C. Called by
//! `make bench-lifecycle`; all work is in `dalgu_tests::bench`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser;
use dalgu_tests::bench::report::Report;
use dalgu_tests::bench::{self, Settings};
use dalgu_tests::lab::layout::Layout;
use dalgu_tests::lab::{self, Lab};
use dalgu_tests::signals;

/// Measures the lives of VMs through Dalgu and through virsh.
#[derive(Parser)]
struct Arguments {
    /// Number of the lab to use, 0 to 9; not that of `make lab`, so that one brought up by hand is not in the way.
    #[arg(long, env = "DALGU_BENCH_LAB_ID", default_value_t = 8)]
    id: u8,
    /// Samples of each time.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// VMs on one host for the daemons' own figures.
    #[arg(long, default_value_t = 50)]
    vms: u16,
    /// Seconds for which the daemons' processor time is watched.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    window: u16,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-lifecycle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let layout = Layout::new(arguments.id)?;
    if Lab::current(layout.clone()).is_ok() {
        bail!(
            "lab {0} is up already: `lab --id {0} down` removes it",
            layout.id()
        );
    }
    let settings = Settings {
        rounds: usize::from(arguments.rounds),
        vms: usize::from(arguments.vms),
        window: Duration::from_secs(u64::from(arguments.window)),
    };
    let mut report = Report::default();
    // Cancel safe: whatever was begun, the lab is taken down below.
    let outcome = tokio::select! {
        outcome = bench::run(layout.clone(), &settings, &mut report) => outcome,
        error = signals::stop() => Err(error),
    };
    if outcome.is_err()
        && let Some(logs) = lab::keep_logs(&layout)
    {
        eprintln!("the lab's logs are in {}", logs.display());
    }
    let file = layout.tools_dir().with_file_name("bench").join("lifecycle.json");
    lab::down(layout).await.context("take the lab down")?;
    println!("\n{report}");
    // A file says that the run was whole.
    outcome?;
    report.write(&file)?;
    println!("written to {}", file.display());
    Ok(())
}
