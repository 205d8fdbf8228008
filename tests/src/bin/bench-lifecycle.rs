//! `bench-lifecycle`: measures the lives of VMs on a lab of its own. Called by `make bench-lifecycle`; all work is in
//! `dalgu_tests::bench`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use dalgu_tests::bench::{self, Settings, lifecycle::AIMS};

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
    let settings = Settings {
        rounds: usize::from(arguments.rounds),
        vms: usize::from(arguments.vms),
        window: Duration::from_secs(u64::from(arguments.window)),
    };
    let report = bench::on_own_lab(arguments.id, "lifecycle", async |layout, report| {
        bench::run(layout, &settings, report).await
    })
    .await?;
    report.judge(&AIMS)
}
