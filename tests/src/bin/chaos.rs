//! `chaos`: random operations and faults on a lab of its own, judged by an independent eye; takes the lab down at the end,
//! also after a failure or Ctrl-C. Called by `make chaos`; all work is in `dalgu_tests::chaos`.
//!
//! Exit code 1: something was violated, or the run broke off. Then the lab's logs are kept beside the report.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser;
use dalgu_tests::chaos::{self, Settings};
use dalgu_tests::lab::layout::Layout;
use dalgu_tests::lab::{self, Lab, Options};
use dalgu_tests::signals;

/// Random operations and faults on real libvirt hosts.
#[derive(Parser)]
struct Arguments {
    /// Number of the lab to use, 0 to 9; not that of `make lab`, so that one brought up by hand is not in the way.
    #[arg(long, env = "DALGU_CHAOS_LAB_ID", default_value_t = 7)]
    lab_id: u8,
    /// How long things are asked for and broken.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// Decides every choice; by default another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// VMs at a time.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..))]
    vms: u8,
    /// Hosts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..))]
    hosts: u8,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match Box::pin(run(Arguments::parse())).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<bool> {
    let layout = Layout::new(arguments.lab_id)?;
    if Lab::current(layout.clone()).is_ok() {
        bail!(
            "lab {0} is up already: `lab --id {0} down` removes it",
            layout.id()
        );
    }
    let settings = Settings {
        seed: match arguments.seed {
            Some(seed) => seed,
            None => random_seed()?,
        },
        lasts: Duration::from_secs(arguments.minutes * 60),
        vms: arguments.vms,
    };
    println!(
        "seed {}, {} minutes, lab {}",
        settings.seed,
        arguments.minutes,
        layout.id()
    );
    let options = Options {
        hosts: arguments.hosts,
        ..Options::default()
    };
    let folder = layout.tools_dir().with_file_name("chaos");
    let _ = fs::remove_dir_all(&folder);
    let work = async {
        let lab = Lab::up(layout.clone(), &options).await?;
        chaos::run(&lab, &settings).await
    };
    // Cancel safe: whatever was begun, the lab is taken down below.
    let outcome = tokio::select! {
        outcome = work => outcome,
        error = signals::stop() => Err(error),
    };
    let clean = outcome.as_ref().is_ok_and(|(report, _)| report.is_clean());
    if !clean && lab::copy_logs(&layout, &folder.join("logs")).is_some() {
        eprintln!("the lab's logs are in {}", folder.join("logs").display());
    }
    lab::down(layout).await.context("take the lab down")?;
    let (report, timeline) = outcome?;
    report.write(&folder, &timeline)?;
    println!("{report}");
    println!("written to {}", folder.join("report.json").display());
    Ok(clean)
}

fn random_seed() -> anyhow::Result<u64> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("read a random number")?;
    u64::from_str_radix(&uuid[..8], 16).context("read a random number")
}
