//! `dalgu-controller simulate`: reads a trace, has it replayed, and shows and writes what came of it. Nothing is decided here.

use std::{
    fs,
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use flate2::read::MultiGzDecoder;
use serde::Serialize;

use super::{
    Contender, Outcome, Settings, chart,
    city::{self, Assumptions},
    field::Shape,
    forecast, overcommit, replay, table,
    trace::{self, Size, Trace},
};

/// Why a simulation cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The trace says something that cannot be.
    #[error("the trace {}", .path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// What.
        #[source]
        source: trace::Error,
    },
    /// A VM is larger than any host.
    #[error(
        "a VM of the trace has {} vCPUs and {} MiB, and a host no more than {} and {}: give --host-vcpus and --host-memory",
        .vm.vcpus, .vm.memory_mib, .host.vcpus, .host.memory_mib
    )]
    TooLarge {
        /// The VM.
        vm: Size,
        /// The largest that a host may have.
        host: Size,
    },
    /// The assumptions of the city cannot be understood.
    #[error("the assumptions {}", .path.display())]
    Assumptions {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: city::Error,
    },
    /// The two bills cannot be made.
    #[error("the city's figure")]
    City(#[from] city::Error),
    /// What over-commit would bring cannot be said.
    #[error("over-commit by forecast")]
    Overcommit(#[from] overcommit::Error),
    /// The chart cannot be drawn.
    #[error(transparent)]
    Chart(#[from] chart::Error),
    /// The outcome cannot be written as JSON.
    #[error("write JSON")]
    Json(#[from] serde_json::Error),
}

/// What to replay, on what, and what to make of it.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The trace: CSV, also compressed with gzip; - reads it from standard input. docs/operations/simulator.md has the columns.
    #[arg(long)]
    trace: PathBuf,
    /// Hosts. As many as the fullest moment needs, and a quarter more, where it is not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    hosts: Option<u32>,
    /// Logical processors of a host.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    host_vcpus: u32,
    /// Memory of a host for VMs, as 160GiB.
    #[arg(long, default_value = "160GiB", value_parser = memory_mib)]
    host_memory: u64,
    /// Virtual processors that may be reserved for each logical one.
    #[arg(long, default_value_t = 1.0, value_parser = ratio)]
    cpu_overcommit: f64,
    /// What places the VMs; several are compared. All, where it is not given.
    #[arg(long, value_delimiter = ',')]
    policy: Vec<Contender>,
    /// Time between two rounds of moves, for the policies that move VMs.
    #[arg(long, default_value = "1h", value_parser = seconds)]
    round: u64,
    /// Moves of a round at most.
    #[arg(long, default_value_t = 20)]
    moves: usize,
    /// Percent of its processors or memory in use from which on a host counts as contended.
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u8).range(1..=100))]
    contended_from: u8,
    /// Draws the outcome to this file, as SVG.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Writes the outcome to this file, as JSON, with a point for each 5 minutes.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Instead: what hosts, energy and money the trace's systems take each on servers of its own, and on the shared field.
    #[arg(long, conflicts_with_all = ["hosts", "host_vcpus", "host_memory", "cpu_overcommit", "policy", "round", "moves", "out"])]
    city: bool,
    /// Instead: how many more VMs a host could have if room were promised by what is expected of them, and what became of that.
    #[arg(long, conflicts_with_all = ["hosts", "cpu_overcommit", "policy", "round", "moves", "out", "city"])]
    overcommit: bool,
    /// Percent of its processors and memory that a host is filled to by --overcommit.
    #[arg(long, requires = "overcommit", default_value_t = 85, value_parser = clap::value_parser!(u8).range(1..=100))]
    fill: u8,
    /// Percent from which on a host gives VMs away by --overcommit; as the fill, where that is more.
    #[arg(long, requires = "overcommit", default_value_t = 90, value_parser = clap::value_parser!(u8).range(1..=100))]
    relieve: u8,
    /// What servers, energy and upkeep cost, as TOML; what is not in it is as --city prints it without.
    #[arg(long, requires = "city")]
    assumptions: Option<PathBuf>,
}

/// What is written as JSON.
#[derive(Serialize)]
struct Report<'a> {
    vms: usize,
    hosts: usize,
    host_vcpus: u32,
    host_memory_mib: u64,
    cpu_overcommit: f64,
    outcomes: &'a [Outcome],
}

/// What `--overcommit` writes as JSON.
#[derive(Serialize)]
struct OvercommitReport<'a> {
    overcommit: &'a overcommit::Outcome,
    forecast: &'a [forecast::Row],
}

/// Simulates; gives what is to be shown.
///
/// # Errors
/// If a file cannot be read or written, the trace or the assumptions cannot be understood, or a VM fits on no host.
pub fn run(arguments: &Arguments) -> Result<String, Error> {
    let trace = read(&arguments.trace)?;
    match (arguments.city, arguments.overcommit) {
        (true, _) => run_city(arguments, &trace),
        (false, true) => run_overcommit(arguments, &trace),
        (false, false) => run_replays(arguments, &trace),
    }
}

fn run_replays(arguments: &Arguments, trace: &Trace) -> Result<String, Error> {
    let shape = Shape {
        cpus: arguments.host_vcpus,
        memory_mib: arguments.host_memory,
        cpu_overcommit: arguments.cpu_overcommit,
    };
    let capacity = shape.capacity();
    let largest = shape.largest();
    if let Some(vm) = trace.larger_than(largest) {
        return Err(Error::TooLarge {
            vm: vm.size,
            host: largest,
        });
    }
    let hosts = arguments
        .hosts
        .map_or_else(|| ample(trace, capacity), |hosts| hosts as usize);
    let settings = Settings {
        hosts,
        shape,
        contended_from: f64::from(arguments.contended_from) / 100.0,
        round_s: arguments.round,
        moves: arguments.moves,
    };
    let outcomes: Vec<_> = contenders(&arguments.policy)
        .into_iter()
        .map(|contender| {
            tracing::info!(
                policy = contender.name(),
                vms = trace.vms.len(),
                hosts,
                "replaying"
            );
            replay(trace, &settings, contender)
        })
        .collect();
    let title = format!(
        "{} VMs on {hosts} hosts of {} processors{} and {} GiB",
        trace.vms.len(),
        shape.cpus,
        match shape.cpu_overcommit {
            1.0 => String::new(),
            ratio => format!(" (times {ratio})"),
        },
        shape.memory_mib / 1024
    );
    if let Some(path) = &arguments.out {
        write(path, &chart::draw(&title, &outcomes)?)?;
    }
    if let Some(path) = &arguments.json {
        let report = Report {
            vms: trace.vms.len(),
            hosts,
            host_vcpus: shape.cpus,
            host_memory_mib: shape.memory_mib,
            cpu_overcommit: shape.cpu_overcommit,
            outcomes: &outcomes,
        };
        write(path, &serde_json::to_string(&report)?)?;
    }
    Ok(format!("{title}\n\n{}", table::of(&outcomes)))
}

fn run_city(arguments: &Arguments, trace: &Trace) -> Result<String, Error> {
    let assumptions = match &arguments.assumptions {
        None => Assumptions::default(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?;
            Assumptions::parse(&text).map_err(|source| Error::Assumptions {
                path: path.clone(),
                source,
            })?
        }
    };
    let figure = city::figure(trace, &assumptions)?;
    if let Some(path) = &arguments.json {
        write(path, &serde_json::to_string(&figure)?)?;
    }
    Ok(city::show(&assumptions, &figure))
}

fn run_overcommit(arguments: &Arguments, trace: &Trace) -> Result<String, Error> {
    let settings = overcommit::Settings {
        shape: Shape {
            cpus: arguments.host_vcpus,
            memory_mib: arguments.host_memory,
            cpu_overcommit: 1.0,
        },
        place: f64::from(arguments.fill) / 100.0,
        relieve: f64::from(arguments.relieve.max(arguments.fill)) / 100.0,
        contended_from: f64::from(arguments.contended_from) / 100.0,
    };
    let outcome = overcommit::overcommit(trace, &settings)?;
    let rules = forecast::judge(trace);
    if let Some(path) = &arguments.json {
        let report = OvercommitReport {
            overcommit: &outcome,
            forecast: &rules,
        };
        write(path, &serde_json::to_string(&report)?)?;
    }
    let shown = overcommit::show(&settings, &outcome);
    Ok(match rules.as_slice() {
        [] => shown,
        rules => format!("{shown}\n{}", forecast::show(rules)),
    })
}

/// Reads a trace from a file; compressed where its name ends in .gz.
///
/// # Errors
/// If it cannot be read, or is none.
pub fn read(path: &Path) -> Result<Trace, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let from: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(io::stdin().lock()),
        _ => Box::new(BufReader::new(File::open(path).map_err(failed)?)),
    };
    let from: Box<dyn Read> = match path.extension().is_some_and(|extension| extension == "gz") {
        true => Box::new(BufReader::new(MultiGzDecoder::new(from))),
        false => from,
    };
    Trace::read(from).map_err(|source| Error::Trace {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

/// Each of them once, in the order asked for; all where none was.
fn contenders(asked: &[Contender]) -> Vec<Contender> {
    let mut contenders = Vec::new();
    let all: &[Contender] = if asked.is_empty() { &Contender::ALL } else { asked };
    for contender in all.iter().map(|contender| contender.resolved()) {
        if !contenders.contains(&contender) {
            contenders.push(contender);
        }
    }
    contenders
}

/// As many hosts as the most that is reserved at once needs, and a quarter more.
fn ample(trace: &Trace, host: Size) -> usize {
    let (vcpus, memory_mib) = trace.peak();
    let least = vcpus
        .div_ceil(u64::from(host.vcpus).max(1))
        .max(memory_mib.div_ceil(host.memory_mib.max(1)));
    usize::try_from((least * 5).div_ceil(4).max(1)).unwrap_or(usize::MAX)
}

fn memory_mib(text: &str) -> Result<u64, String> {
    let bad =
        || format!("{text:?} is not an amount of memory: write a whole number with MiB or GiB, as 160GiB");
    let (number, factor) = match (text.strip_suffix("GiB"), text.strip_suffix("MiB")) {
        (Some(number), _) => (number, 1024),
        (None, Some(number)) => (number, 1),
        (None, None) => return Err(bad()),
    };
    let number = number.trim().parse::<u64>().ok();
    let mib = number.and_then(|number| number.checked_mul(factor));
    mib.filter(|mib| (1..=1 << 40).contains(mib)).ok_or_else(bad)
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text
        .parse::<f64>()
        .ok()
        .filter(|ratio| (0.01..=100.0).contains(ratio));
    ratio.ok_or_else(|| format!("{text:?} is not a ratio from 0.01 to 100"))
}

fn seconds(text: &str) -> Result<u64, String> {
    let parsed = text.parse::<jiff::SignedDuration>().ok();
    let seconds = parsed.and_then(|duration| u64::try_from(duration.as_secs()).ok());
    let seconds = seconds.filter(|seconds| *seconds >= trace::STEP_S);
    seconds.ok_or_else(|| format!("{text:?} is not a time of at least 5 minutes, as 1h or 30m"))
}
