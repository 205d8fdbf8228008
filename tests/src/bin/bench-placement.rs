//! `bench-placement`: measures placement by itself. Called by `make bench-placement`; all work is in
//! `dalgu_tests::bench::placement`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use dalgu_tests::bench::placement::{AIMS, durable, engine, packing, peers};
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
    /// Only this way to place, as the rows of the report begin (`pack`, or `pack, racks protected`); may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// Hosts of the site on which a whole controller accepts creations; 0 leaves that out.
    #[arg(long, default_value_t = 10_000)]
    durable_hosts: u16,
    /// VMs that it has before.
    #[arg(long, default_value_t = 20_000)]
    durable_vms: usize,
    /// Creations that are measured on it.
    #[arg(long, default_value_t = 10_000)]
    creations: usize,
    /// A program that measures Nova with Placement, to be run beside; see docs/operations/placement.md.
    #[arg(long)]
    nova: Option<PathBuf>,
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
        hosts: arguments.hosts.clone(),
        decisions: arguments.decisions,
        scans: arguments.scans,
        seed: arguments.seed,
        only: arguments.only.clone(),
    };
    let outcome = engine::run(&settings, &mut report)
        .and_then(|()| match &arguments.nova {
            Some(program) => peers::run(program, &arguments.hosts, &mut report),
            None => {
                println!("no program was given: Nova is not measured");
                Ok(())
            }
        })
        .and_then(|()| accept(&arguments, &file, &mut report))
        .and_then(|()| match &arguments.trace {
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

/// A whole controller on the machine's processors, its store beside the report.
fn accept(arguments: &Arguments, file: &Path, report: &mut Report) -> anyhow::Result<()> {
    if arguments.durable_hosts == 0 {
        println!("no site for a whole controller was given: what it accepts is not measured");
        return Ok(());
    }
    let settings = durable::Settings {
        hosts: arguments.durable_hosts,
        vms: arguments.durable_vms,
        creations: arguments.creations,
    };
    let place = file.parent().unwrap_or_else(|| Path::new("."));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(durable::run(&settings, place, report))
}
