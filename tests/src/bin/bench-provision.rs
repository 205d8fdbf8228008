//! `bench-provision`: measures how soon VMs made from images speak, on a lab of its own. Called by `make bench-provision`;
//! all work is in `dalgu_tests::bench::provision`.

use std::process::ExitCode;

use clap::Parser;
use dalgu_tests::bench::{
    self,
    provision::{self, AIMS, Settings},
};

/// Measures VMs made from images through Dalgu and by hand.
#[derive(Parser)]
struct Arguments {
    /// Number of the lab to use, 0 to 9; not that of `make lab`, so that one brought up by hand is not in the way.
    #[arg(long, env = "DALGU_BENCH_LAB_ID", default_value_t = 8)]
    id: u8,
    /// Samples of each time.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// VMs made at once.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    vms: u16,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-provision: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let settings = Settings {
        rounds: usize::from(arguments.rounds),
        vms: usize::from(arguments.vms),
    };
    let report = bench::on_own_lab(arguments.id, "provision", async |layout, report| {
        provision::run(layout, &settings, report).await
    })
    .await?;
    report.judge(&AIMS)
}
