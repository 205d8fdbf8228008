//! `bench-planner`: measures the planner by itself. Called by `make bench-planner`; all work is in `dalgu_tests::bench::planner`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use dalgu_tests::bench::planner::{self, consolidation, maintenance};
use dalgu_tests::bench::report::{self, Report};

/// Measures how good plans are, and how soon they are made.
#[derive(Parser)]
struct Arguments {
    /// Nodes of the sites that are evened out.
    #[arg(long, value_delimiter = ',', default_value = "50,5000")]
    nodes: Vec<usize>,
    /// Hosts of the site that is maintained, each with 20 VMs.
    #[arg(long, default_value_t = 1000)]
    maintained: usize,
    /// How often each is, for the median of the times.
    #[arg(long, default_value_t = 9)]
    runs: usize,
    /// Ganeti's balancer, to be run beside: the program `hbal` of the package `ganeti-htools`. It takes a minute and a half. Without it its recorded
    /// figures are shown.
    #[arg(long)]
    hbal: Option<PathBuf>,
    /// A day of PlanetLab traces to consolidate: a directory, or an archive that `tar` unpacks. Without it that part is left out, which the
    /// output says.
    #[arg(long)]
    planetlab: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-planner: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let file = report::place("planner")?;
    let mut report = Report::default();
    planner::run(
        &arguments.nodes,
        arguments.runs,
        arguments.hbal.as_deref(),
        &mut report,
    )?;
    maintenance::run(arguments.maintained, arguments.runs, &mut report);
    let outcome = match &arguments.planetlab {
        Some(day) => consolidation::run(day, &mut report),
        None => {
            println!("no traces were given: consolidation is not measured");
            Ok(())
        }
    };
    consolidation::recorded(&mut report);
    println!("\n{report}");
    // A file says that the run was whole.
    outcome?;
    report.write(&file)?;
    println!("written to {}", file.display());
    report.judge(&planner::AIMS)
}
