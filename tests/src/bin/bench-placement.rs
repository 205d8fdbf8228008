//! `bench-placement`: measures placement by itself. Called by `make bench-placement`; all work is in
//! `dalgu_tests::bench::placement`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use dalgu_tests::bench::placement::{AIMS, engine, packing};
use dalgu_tests::bench::report::{self, Report};

/// Measures how fast placement decides.
#[derive(Parser)]
struct Arguments {
    /// Hosts of the sites that are measured.
    #[arg(long, value_delimiter = ',', default_value = "100,1000,10000,100000")]
    hosts: Vec<usize>,
    /// Decisions timed on each site.
    #[arg(long, default_value_t = 200_000)]
    decisions: usize,
    /// Decisions of the plain scan timed on each site, at most.
    #[arg(long, default_value_t = 1000)]
    scans: usize,
    /// What the random numbers begin with.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A trace of VMs to pack: CSV, also compressed by gzip. Without it that part is left out, which the output says.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Processors and GiB of the hosts that the trace is packed on, as 64x160.
    #[arg(long, value_delimiter = ',', default_value = "64x160", value_parser = shape)]
    shapes: Vec<(u32, u64)>,
}

fn shape(text: &str) -> Result<(u32, u64), String> {
    let parsed = text
        .split_once('x')
        .and_then(|(vcpus, gib)| Some((vcpus.parse().ok()?, gib.parse().ok()?)));
    parsed.ok_or_else(|| format!("{text} is not like 64x160"))
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-placement: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let file = report::place("placement")?;
    let mut report = Report::default();
    let settings = engine::Settings {
        hosts: arguments.hosts,
        decisions: arguments.decisions,
        scans: arguments.scans,
        seed: arguments.seed,
    };
    let outcome = engine::run(&settings, &mut report).and_then(|()| match &arguments.trace {
        Some(trace) => packing::run(trace, &arguments.shapes, &mut report),
        None => {
            println!("no trace was given: packing is not measured");
            Ok(())
        }
    });
    println!("\n{report}");
    // A file says that the run was whole.
    outcome?;
    report.write(&file)?;
    println!("written to {}", file.display());
    report.judge(&AIMS)
}
