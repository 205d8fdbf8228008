//! `bench-scale`: measures a controller with thousands of hosts, all on this machine. Called by `make bench-scale`; all
//! work is in `dalgu_tests::bench::scale`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use dalgu_controller::config::Config;
use dalgu_controller::server::{self, limits::Limits};
use dalgu_tests::bench::report::Report;
use dalgu_tests::bench::scale::{self, Settings};
use dalgu_tests::signals;
use tokio_util::sync::CancellationToken;

/// Measures the controller's return after a kill, and ten times its rated load, with many hosts.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    other: Option<Other>,
    /// Hosts.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u16).range(1..=9999))]
    hosts: u16,
    /// VMs.
    #[arg(long, default_value_t = 20_000)]
    vms: usize,
    /// Times that the controller is killed.
    #[arg(long, default_value_t = 5)]
    restarts: usize,
    /// Seconds for which the site is watched at rest.
    #[arg(long, default_value_t = 30)]
    window: u16,
    /// Seconds that each load lasts.
    #[arg(long, default_value_t = 20)]
    load: u16,
    /// Requests a second that count as the rated load.
    #[arg(long)]
    rated: Option<u32>,
    /// Where the controller's store is; on a disk, not in memory.
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// What the benchmark's test needs beside it.
#[derive(Subcommand)]
enum Other {
    /// A controller with a smaller rated load: a program built for tests cannot bear the real one's.
    Controller {
        /// Requests a second.
        #[arg(long)]
        rated: u32,
        /// Its configuration.
        config: PathBuf,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let outcome = match arguments.other.take() {
        Some(Other::Controller { rated, config }) => control(rated, &config).await,
        None => run(arguments).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn control(rated: u32, config: &Path) -> anyhow::Result<()> {
    dalgu_proto::daemon::init_logs(false);
    let mut config = Config::load(config)?;
    config.limits.calls_per_second = rated;
    Ok(server::run(config, CancellationToken::new()).await?)
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let program = scale::beside("dalgu-controller")?;
    let target = program.parent().and_then(Path::parent);
    let out = target
        .context("the program is in no build directory")?
        .join("bench");
    std::fs::create_dir_all(&out)?;
    let dir = tempfile::tempdir_in(arguments.dir.as_ref().unwrap_or(&out))?;
    let settings = Settings {
        hosts: usize::from(arguments.hosts),
        vms: arguments.vms,
        report_interval: Duration::from_secs(3),
        restarts: arguments.restarts,
        window: Duration::from_secs(arguments.window.into()),
        rated: arguments
            .rated
            .unwrap_or_else(|| Limits::default().calls_per_second),
        load: Duration::from_secs(arguments.load.into()),
        connections: 32,
        program,
        arguments: ["run", "--config"].map(str::to_owned).to_vec(),
        dir: dir.path().to_owned(),
    };
    let mut report = Report::default();
    // Cancel safe: the controller ends with this process.
    let outcome = tokio::select! {
        outcome = scale::run(&settings, &mut report) => outcome,
        error = signals::stop() => Err(error),
    };
    println!("\n{report}");
    if outcome.is_err() {
        let kept = out.join("scale-controller.log");
        std::fs::copy(dir.path().join("controller.log"), &kept)?;
        eprintln!("the controller's log is {}", kept.display());
    }
    // A file says that the run was whole.
    outcome?;
    let file = out.join("scale.json");
    report.write(&file)?;
    println!("written to {}", file.display());
    report.judge(&scale::AIMS)
}
