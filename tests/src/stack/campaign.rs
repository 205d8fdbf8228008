//! Many seeds of the stack on all processors, and what came of them: a part of the fleet's report.

use std::{collections::BTreeMap, sync::Mutex};

use anyhow::Context as _;
use dalgu_proto::mutant::{self, Mutant};
use serde::Serialize;

use super::Outcome;
use crate::fleet::{
    campaign::{Failed, Gate, each, now, print_gate, sum, table},
    lock,
};

/// What came of it.
#[derive(Debug, Default, Serialize)]
pub struct Found {
    /// What a seed decides at this level.
    pub seed_decides: &'static str,
    /// Seeds that were run.
    pub seeds: u64,
    /// Requests of clients.
    pub requests: u64,
    /// Calls that were made for them, retries too.
    pub calls: u64,
    /// Faults in all.
    pub fault_count: u64,
    /// Faults by class.
    pub faults: BTreeMap<&'static str, u64>,
    /// Watches that were taken up again.
    pub watches_resumed: u64,
    /// Operations by kind and how they ended.
    pub operations: BTreeMap<String, u64>,
    /// How often each invariant was checked.
    pub checks: BTreeMap<&'static str, u64>,
    /// Simulated time in hours.
    pub simulated_hours: f64,
    /// Real time in seconds.
    pub seconds: f64,
    /// Rules that were turned off, to see that this level sees it.
    pub mutants: Vec<Gate>,
    /// What failed.
    pub failures: Vec<Failed>,
}

/// Rules whose lack this level is known to show. The core level shows all of them.
pub const SHOWN: [Mutant; 2] = [Mutant::RequestNotRemembered, Mutant::RevocationNotAwaited];
/// Seeds that it may take: the same seed need not be the same history.
const HUNTED: u64 = 20;

impl Found {
    /// Whether nothing was violated and each rule that was turned off was missed.
    pub fn is_fine(&self) -> bool {
        self.failures.is_empty() && self.mutants.iter().all(|gate| gate.caught_by.is_some())
    }

    fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.requests += outcome.requests;
        self.calls += outcome.calls;
        self.fault_count += outcome.faults.values().sum::<u64>();
        self.watches_resumed += outcome.resumed;
        self.simulated_hours += outcome.time.as_secs_f64() / 3600.0;
        sum(&mut self.faults, &outcome.faults);
        sum(&mut self.checks, &outcome.checks);
        sum(&mut self.operations, &outcome.operations);
        if !outcome.violations.is_empty() {
            let what = format!("stack, seed {}", outcome.seed);
            self.failures
                .push(Failed::new(outcome.seed, what, &outcome.violations));
        }
    }
}

/// Runs the seeds from 1 to `seeds`.
///
/// # Errors
/// If a site could not be made.
pub fn run(seeds: u64) -> anyhow::Result<Found> {
    let begun = now();
    let found = Mutex::new(Found {
        seed_decides: "the plan of requests and faults, not the history",
        ..Found::default()
    });
    let broken = Mutex::new(None);
    each(1..seeds + 1, |seed| match super::run(seed) {
        Ok(outcome) => {
            lock(&found).add(&outcome);
            true
        }
        Err(error) => {
            *lock(&broken) = Some(error.context(format!("stack, seed {seed}")));
            false
        }
    });
    if let Some(error) = lock(&broken).take() {
        return Err(error).context("a run could not be made");
    }
    lock(&found).seconds = begun.elapsed().as_secs_f64();
    for rule in SHOWN {
        let gate = hunt(rule)?;
        lock(&found).mutants.push(gate);
    }
    Ok(found
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// Looks for a seed that violates something when the rule is turned off.
///
/// # Errors
/// If a site could not be made.
pub fn hunt(rule: Mutant) -> anyhow::Result<Gate> {
    let _off = mutant::turn_on(rule);
    let mut caught = None;
    for seed in 1..=HUNTED {
        let violated = super::run(seed)?.violations;
        if let Some(violation) = violated.first() {
            caught = Some((seed, format!("{}: {}", violation.invariant, violation.what)));
            break;
        }
    }
    let (caught_by, violation) = caught.unzip();
    Ok(Gate {
        mutant: format!("{rule:?}"),
        caught_by,
        violation,
        directed: None,
    })
}

/// Prints what was found.
pub fn print(found: &Found) {
    println!(
        "stack: {} seeds in {:.0} s: {} requests in {} calls, {} faults, {} watches resumed, {:.1} simulated hours; the seed \
         decides {}",
        found.seeds,
        found.seconds,
        found.requests,
        found.calls,
        found.fault_count,
        found.watches_resumed,
        found.simulated_hours,
        found.seed_decides
    );
    table("stack, faults", &found.faults);
    table("stack, operations", &found.operations);
    table("stack, checks", &found.checks);
    found.mutants.iter().for_each(print_gate);
}
