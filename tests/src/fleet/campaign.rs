//! Many runs: seeds on all processors, the step matrix, the mutation gate; and the report of it all.

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use dalgu_proto::mutant::{self, Mutant};
use serde::Serialize;

use super::{Outcome, Settings, checker::Violation, lock, matrix, nature::Nature};
use crate::stack::campaign as stack;

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// Seeds.
    pub seeds: Range<u64>,
    /// Least faults of each.
    pub faults: u64,
    /// Real time after which no further seed is begun.
    pub limit: Option<Duration>,
    /// Every so many cells of the step matrix; 0 for none.
    pub matrix: usize,
    /// Seeds that a mutant may take; 0 for no mutants.
    pub mutants: u64,
    /// Seeds of the stack level; 0 for none.
    pub stack: u64,
    /// Only seeds that are about this; see [`Nature::is_about`].
    pub about: Option<String>,
}

/// A seed that failed.
#[derive(Debug, Serialize)]
pub struct Failed {
    /// The seed; for the step matrix, the point.
    pub seed: u64,
    /// What failed.
    pub what: String,
    /// Invariant and what was seen.
    pub violations: Vec<String>,
}

impl Failed {
    /// A failure; it is told at once.
    pub(crate) fn new(seed: u64, what: String, violations: &[Violation]) -> Self {
        let violations = violations.iter().map(|v| format!("{}: {}", v.invariant, v.what));
        let violations: Vec<_> = violations.collect();
        eprintln!("{what}: {}", violations.first().map_or("", String::as_str));
        Self {
            seed,
            what,
            violations,
        }
    }
}

/// A rule that was turned off.
#[derive(Debug, Serialize)]
pub struct Gate {
    /// The rule.
    pub mutant: String,
    /// The seed that showed that it is needed.
    pub caught_by: Option<u64>,
    /// What was violated then.
    pub violation: Option<String>,
    /// Where it is caught when no seed does: a directed test.
    pub directed: Option<&'static str>,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
pub struct Found {
    /// Seeds that were run.
    pub seeds: u64,
    /// Least and most faults of a seed.
    pub faults_per_seed: (u64, u64),
    /// Faults in all.
    pub fault_count: u64,
    /// Faults by class.
    pub faults: BTreeMap<&'static str, u64>,
    /// Requests of clients.
    pub requests: u64,
    /// Operations by kind and how they ended.
    pub operations: BTreeMap<String, u64>,
    /// How often each invariant was checked.
    pub checks: BTreeMap<&'static str, u64>,
    /// Points at which something could have gone wrong.
    pub points: u64,
    /// Simulated time in hours.
    pub simulated_hours: f64,
    /// Real time of the seeds in seconds.
    pub seconds: f64,
    /// Cells of the step matrix by operation.
    pub matrix: BTreeMap<&'static str, BTreeMap<&'static str, u64>>,
    /// The mutation gate.
    pub mutants: Vec<Gate>,
    /// What failed.
    pub failures: Vec<Failed>,
    /// The stack level.
    pub stack: stack::Found,
}

impl Found {
    /// Whether nothing was violated and no mutant lived.
    pub fn is_fine(&self) -> bool {
        let lived = |gate: &Gate| gate.caught_by.is_none() && gate.directed.is_none();
        self.failures.is_empty() && self.stack.is_fine() && !self.mutants.iter().any(lived)
    }

    fn add(&mut self, outcome: &Outcome) {
        let faults = outcome.fault_count();
        let (least, most) = self.faults_per_seed;
        self.faults_per_seed = (
            if self.seeds == 0 {
                faults
            } else {
                least.min(faults)
            },
            most.max(faults),
        );
        self.seeds += 1;
        self.fault_count += faults;
        self.requests += outcome.requests;
        self.points += outcome.points;
        self.simulated_hours += outcome.time.as_secs_f64() / 3600.0;
        sum(&mut self.faults, &outcome.faults);
        sum(&mut self.checks, &outcome.checks);
        sum(&mut self.operations, &outcome.operations);
        if !outcome.violations.is_empty() {
            self.fail(outcome.seed, format!("seed {}", outcome.seed), outcome);
        }
    }

    fn fail(&mut self, seed: u64, what: String, outcome: &Outcome) {
        self.failures.push(Failed::new(seed, what, &outcome.violations));
    }
}

/// Adds counts up.
pub(crate) fn sum<K: Ord + Clone>(all: &mut BTreeMap<K, u64>, more: &BTreeMap<K, u64>) {
    for (key, count) in more {
        *all.entry(key.clone()).or_default() += count;
    }
}

#[allow(clippy::disallowed_methods, reason = "real time, outside of any runtime")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Calls `work` with each number, on all processors, until it says that it is enough.
pub(crate) fn each(numbers: Range<u64>, work: impl Fn(u64) -> bool + Sync) {
    let next = AtomicU64::new(numbers.start);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= numbers.end || !work(number) {
                        return;
                    }
                }
            });
        }
    });
}

/// Of so many seeds one is run twice, for the same history.
const RUN_AGAIN: u64 = 10;

/// Runs a campaign.
///
/// # Errors
/// If a site of the stack level could not be made.
pub fn run(campaign: &Campaign) -> anyhow::Result<Found> {
    let begun = now();
    let found = Mutex::new(Found::default());
    each(campaign.seeds.clone(), |seed| {
        let about = campaign.about.as_deref();
        if about.is_some_and(|about| !Nature::of(seed).is_about(about)) {
            return true;
        }
        let settings = Settings::seed(seed, campaign.faults);
        let outcome = super::run(&settings);
        let again = seed.is_multiple_of(RUN_AGAIN).then(|| super::run(&settings));
        let mut found = lock(&found);
        found.add(&outcome);
        if again.is_some_and(|again| again.digest != outcome.digest) {
            found.fail(
                seed,
                format!("seed {seed}: two runs of it are two histories"),
                &outcome,
            );
        }
        if found.seeds.is_multiple_of(500) {
            eprintln!(
                "{} seeds, {} faults, {} failed, {:.0} s",
                found.seeds,
                found.fault_count,
                found.failures.len(),
                begun.elapsed().as_secs_f64()
            );
        }
        campaign.limit.is_none_or(|limit| begun.elapsed() < limit)
    });
    lock(&found).seconds = begun.elapsed().as_secs_f64();
    if campaign.matrix > 0 {
        each(0..matrix::ROWS.len() as u64, |number| {
            let row = &matrix::ROWS[usize::try_from(number).unwrap_or(0)];
            let result = matrix::row(row, campaign.matrix);
            let mut found = lock(&found);
            for failure in &result.failures {
                let what = format!(
                    "{}: point {} ({:?} {}), {:?}",
                    failure.row, failure.number, failure.point.kind, failure.point.name, failure.fate
                );
                found.fail(failure.number, what, &failure.outcome);
            }
            found.matrix.insert(row.name, result.cells);
            true
        });
    }
    if campaign.mutants > 0 {
        each(0..Mutant::ALL.len() as u64, |number| {
            let gate = hunt(
                Mutant::ALL[usize::try_from(number).unwrap_or(0)],
                campaign.mutants,
            );
            lock(&found).mutants.push(gate);
            true
        });
    }
    let mut found = found
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    found.mutants.sort_by(|a, b| a.mutant.cmp(&b.mutant));
    if campaign.stack > 0 {
        found.stack = stack::run(campaign.stack)?;
    }
    Ok(found)
}

/// Faults of a seed that is to show a mutant: many short runs show more than few long ones.
const FAULTS_FOR_A_MUTANT: u64 = 300;

/// A seed that shows a rule.
fn short(seed: u64) -> Settings {
    Settings::seed(seed, FAULTS_FOR_A_MUTANT)
}

/// What a seed violates with a rule turned off and not with it.
pub fn shows(mutant: Mutant, seed: u64) -> Option<Violation> {
    let without = {
        let _off = mutant::turn_on(mutant);
        super::run(&short(seed))
    };
    let violation = without.violations.into_iter().next()?;
    super::run(&short(seed))
        .violations
        .is_empty()
        .then_some(violation)
}

/// Looks for a seed that shows that the rule is needed: the recorded one first.
pub fn hunt(mutant: Mutant, seeds: u64) -> Gate {
    if let Some(directed) = directed(mutant) {
        return Gate {
            mutant: format!("{mutant:?}"),
            caught_by: None,
            violation: None,
            directed: Some(directed),
        };
    }
    let known = recorded(mutant);
    let shown = |seed: &u64| about(mutant).is_none_or(|about| Nature::of(*seed).is_about(about));
    let others = (1..).filter(shown).zip(0..seeds).map(|(seed, _)| seed);
    let caught = known.into_iter().chain(others).find_map(|seed| {
        let violation = shows(mutant, seed)?;
        Some((seed, format!("{}: {}", violation.invariant, violation.what)))
    });
    let (caught_by, violation) = caught.unzip();
    Gate {
        mutant: format!("{mutant:?}"),
        caught_by,
        violation,
        directed: None,
    }
}

/// What seeds are about that can show a rule; `None` where any may.
fn about(mutant: Mutant) -> Option<&'static str> {
    match mutant {
        Mutant::LedgerNotSynced => Some("power"),
        Mutant::RestoreKeepsNumbers | Mutant::RestoreDoesNotObserve => Some("restore"),
        Mutant::RefusedGoesOn | Mutant::RunNotCompared => Some("second"),
        Mutant::LeaseFreedEarly
        | Mutant::RulesAfterRun
        | Mutant::ImageNotAwaited
        | Mutant::BackupNotExcluded
        | Mutant::VolumeGivenTwice => Some("objects"),
        _ => None,
    }
}

/// The seed that is known to show a rule. When programs or fleet change it may be another one: `fleet campaign --seeds 0
/// --matrix 0` finds it.
pub fn recorded(mutant: Mutant) -> Option<u64> {
    Some(match mutant {
        Mutant::LedgerNotSynced => 2,
        Mutant::GenerationNotCompared => 4,
        Mutant::LeaseFreedEarly => 5,
        Mutant::RulesAfterRun => 10,
        Mutant::RestoreKeepsNumbers => 12,
        Mutant::StartRepeated => 14,
        Mutant::MigrationJudgedByReturnCode => 17,
        Mutant::PromisesNotCounted => 19,
        Mutant::RefusedGoesOn => 32,
        Mutant::GoneForgotten => 42,
        Mutant::RunNotCompared => 72,
        Mutant::EpochNotCompared => 109,
        Mutant::RestoreDoesNotObserve => 132,
        Mutant::VolumeGivenTwice => 210,
        Mutant::SessionNotChecked => 243,
        Mutant::SettledMayBegin => 299,
        Mutant::OlderCopyChosen => 788,
        Mutant::AnswerBeforeCommit
        | Mutant::AnybodySpeaks
        | Mutant::OldReportsCount
        | Mutant::VolumePurgedInUse
        | Mutant::VolumeNotMerged => return None,
        _ => 1,
    })
}

/// The test that catches a mutant which the fleet cannot reach.
pub fn directed(mutant: Mutant) -> Option<&'static str> {
    match mutant {
        // The API reads what it answers from what is stored, and so does not answer either.
        Mutant::AnswerBeforeCommit => Some("a_change_that_is_not_on_disk_is_not_answered"),
        // What was taken over wrongly is put right by the next report, and nothing follows from it before.
        Mutant::AnybodySpeaks => Some("only_its_owner_speaks_for_a_vm"),
        Mutant::OldReportsCount => Some("an_older_report_does_not_replace_a_newer_one"),
        // The controller asks for it only where no VM may have it any more.
        Mutant::VolumePurgedInUse => Some("the_file_of_a_volume_that_a_vm_here_has_stays_whoever_asks"),
        // One seed in thousands deletes such a VM, and has what its guest wrote last looked at afterwards.
        Mutant::VolumeNotMerged => Some("a_vm_is_deleted_when_its_volumes_have_no_layers_any_more"),
        _ => None,
    }
}

/// Prints what was found.
pub fn print(found: &Found) {
    println!(
        "{} seeds in {:.0} s: {} requests, {} faults ({} to {} a seed), {} points, {:.0} simulated hours",
        found.seeds,
        found.seconds,
        found.requests,
        found.fault_count,
        found.faults_per_seed.0,
        found.faults_per_seed.1,
        found.points,
        found.simulated_hours
    );
    table("faults", &found.faults);
    table("operations", &found.operations);
    table("checks", &found.checks);
    for (row, cells) in &found.matrix {
        println!("step matrix, {row}: {} cells", cells.values().sum::<u64>());
    }
    found.mutants.iter().for_each(print_gate);
    if found.stack.seeds > 0 {
        stack::print(&found.stack);
    }
    let failures = found.failures.iter().chain(&found.stack.failures);
    for failure in failures.clone() {
        println!("FAILED {}", failure.what);
        failure
            .violations
            .iter()
            .for_each(|violation| println!("  {violation}"));
    }
    println!("{} failures", failures.count());
}

/// Prints what came of a rule that was turned off.
pub(crate) fn print_gate(gate: &Gate) {
    match (&gate.caught_by, &gate.violation, gate.directed) {
        (Some(seed), Some(violation), _) => {
            println!("mutant {}: caught by seed {seed} ({violation})", gate.mutant);
        }
        (_, _, Some(test)) => println!("mutant {}: caught by {test}", gate.mutant),
        _ => println!("mutant {}: LIVES", gate.mutant),
    }
}

/// Prints counts.
pub(crate) fn table<K: std::fmt::Display>(name: &str, counts: &BTreeMap<K, u64>) {
    println!("{name}:");
    for (key, count) in counts {
        println!("{count:>12} {key}");
    }
}

/// Writes the report.
pub fn write(found: &Found, path: &Path) -> anyhow::Result<()> {
    let failed = || format!("cannot write {}", path.display());
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(failed)?;
    }
    fs::write(path, serde_json::to_vec_pretty(found)?).with_context(failed)
}
