//! The deterministic fleet: thousands of seeds with faults, the step matrix, the mutation gate, and one seed to read.
//!
//! Then the stack level: the same programs with their real network stack and files. `make fleet` runs both at length,
//! `make test` shortly. Exits with 1 where an invariant was violated or a mutant lived.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use dalgu_proto::mutant::{self, Mutant};
use dalgu_tests::fleet::{
    Settings,
    campaign::{self, Campaign},
    explain, minimise, run,
};
use dalgu_tests::stack;

/// A run makes and drops millions of small things; this takes a fifth off its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs simulated fleets with faults and checks what must hold
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    one: One,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Level {
    Core,
    Stack,
}

#[derive(Args)]
struct One {
    /// The seed to run
    #[arg(long)]
    seed: Option<u64>,
    /// Whether it is run on one clock in memory, or with the real network stack and files
    #[arg(long, value_enum, default_value_t = Level::Core)]
    level: Level,
    /// Go on until there have been so many faults (core level)
    #[arg(long, default_value_t = 1000)]
    faults: u64,
    /// Show the whole history
    #[arg(long)]
    explain: bool,
    /// Turn this rule of safety off (stack level)
    #[arg(long, value_name = "RULE", value_parser = rule)]
    without: Option<Mutant>,
    /// Cut a failing seed down to few steps first, for at most so many seconds (core level)
    #[arg(long, value_name = "SECONDS")]
    minimise: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Run many seeds, the step matrix and the mutation gate
    Campaign {
        /// How many seeds
        #[arg(long, default_value_t = 10_000)]
        seeds: u64,
        /// The first of them
        #[arg(long, default_value_t = 1)]
        first: u64,
        /// Least faults of each
        #[arg(long, default_value_t = 1000)]
        faults: u64,
        /// End after so many seconds, whatever has been reached
        #[arg(long, value_name = "SECONDS")]
        limit: Option<u64>,
        /// Run each cell of the step matrix (1), or every N-th only; 0 for none
        #[arg(long, default_value_t = 1)]
        matrix: usize,
        /// Seeds that each mutant may take to be caught; 0 for no mutants
        #[arg(long, default_value_t = 600)]
        mutants: u64,
        /// How many seeds of the stack level follow; 0 for none
        #[arg(long, default_value_t = 300)]
        stack: u64,
        /// Only seeds that are about this: power, clocks, restore or second
        #[arg(long)]
        about: Option<String>,
        /// Where the report goes
        #[arg(long, default_value = "target/fleet/report.json")]
        report: PathBuf,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let fine = match (cli.command, cli.one.seed) {
        (
            Some(Command::Campaign {
                seeds,
                first,
                faults,
                limit,
                matrix,
                mutants,
                stack,
                about,
                report,
            }),
            _,
        ) => {
            let campaign = Campaign {
                seeds: first..first + seeds,
                faults,
                limit: limit.map(Duration::from_secs),
                matrix,
                mutants,
                stack,
                about,
            };
            let found = campaign::run(&campaign)?;
            campaign::print(&found);
            campaign::write(&found, &report)?;
            found.is_fine()
        }
        (None, Some(seed)) if cli.one.level == Level::Stack => one_stack(seed, &cli.one)?,
        (None, Some(seed)) => one(seed, &cli.one),
        (None, None) => anyhow::bail!("give --seed N, or `campaign`; see --help"),
    };
    Ok(if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn one(seed: u64, how: &One) -> bool {
    let mut settings = Settings::seed(seed, how.faults);
    let mut outcome = run(&settings);
    if let (Some(seconds), false) = (how.minimise, outcome.violations.is_empty()) {
        let minimal = minimise::minimise(&settings, outcome, Duration::from_secs(seconds));
        println!("cut down in {} runs", minimal.runs);
        settings = minimal.settings;
        outcome = minimal.outcome;
    }
    if how.explain {
        settings.explain = true;
        outcome = run(&settings);
    }
    explain::print(&settings, &outcome);
    outcome.violations.is_empty()
}

fn rule(name: &str) -> Result<Mutant, String> {
    let found = Mutant::ALL.into_iter().find(|rule| format!("{rule:?}") == name);
    found.ok_or_else(|| format!("the rules are {:?}", Mutant::ALL))
}

fn one_stack(seed: u64, how: &One) -> anyhow::Result<bool> {
    let _off = how.without.map(mutant::turn_on);
    if how.explain && std::env::var_os("DALGU_LOG").is_some() {
        dalgu_proto::daemon::init_logs(false);
    }
    let outcome = stack::run(seed)?;
    if how.explain {
        outcome.lines.iter().for_each(|line| println!("{line}"));
    }
    println!(
        "seed {seed}, stack level: {} requests in {} calls, {} watches resumed, {:.0} simulated seconds; the plan is the \
         seed's, the history this run's",
        outcome.requests,
        outcome.calls,
        outcome.resumed,
        outcome.time.as_secs_f64()
    );
    println!("faults: {:?}", outcome.faults);
    println!("operations: {:?}", outcome.operations);
    for violation in &outcome.violations {
        println!("VIOLATED {}: {}", violation.invariant, violation.what);
    }
    Ok(outcome.violations.is_empty())
}
