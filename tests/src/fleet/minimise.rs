//! Cuts a failing run down to what it needs: fewer requests, fewer faults, the same violation.

use std::{ops::Range, time::Instant};

use super::{Outcome, Settings, fate::Source, plan::Plan, run};

/// A failing run that was cut down.
#[derive(Debug)]
pub struct Minimal {
    /// What it is made from now.
    pub settings: Settings,
    /// What comes of it.
    pub outcome: Outcome,
    /// Runs that it took.
    pub runs: u32,
}

/// Cuts a failing run down for at most `limit`. The run must fail.
pub fn minimise(settings: &Settings, first: Outcome, limit: std::time::Duration) -> Minimal {
    let invariant = first.violations.first().map(|violation| violation.invariant);
    let mut search = Search {
        invariant,
        best: Settings {
            plan: Some(first.plan.clone()),
            ..settings.clone()
        },
        outcome: first,
        runs: 0,
        #[allow(
            clippy::disallowed_methods,
            reason = "a limit on real time, outside of any runtime"
        )]
        until: Instant::now() + limit,
    };
    search.plan();
    search.points();
    // What is left of the plan may have become superfluous with the points, and the other way round.
    search.plan();
    Minimal {
        settings: search.best,
        outcome: search.outcome,
        runs: search.runs,
    }
}

struct Search {
    invariant: Option<&'static str>,
    best: Settings,
    outcome: Outcome,
    runs: u32,
    until: Instant,
}

impl Search {
    /// Takes over what fails in the same way.
    fn attempt(&mut self, settings: Settings) -> bool {
        self.runs += 1;
        let outcome = run(&settings);
        let same = outcome.violations.first().map(|violation| violation.invariant) == self.invariant;
        if same {
            (self.best, self.outcome) = (settings, outcome);
        }
        same
    }

    fn is_over(&self) -> bool {
        #[allow(
            clippy::disallowed_methods,
            reason = "a limit on real time, outside of any runtime"
        )]
        let now = Instant::now();
        now >= self.until
    }

    /// Leaves out parts of the plan: halves, then quarters, down to single events.
    fn plan(&mut self) {
        let mut part = self.events().len().div_ceil(2);
        while part > 0 && !self.is_over() {
            let mut at = 0;
            while at < self.events().len() && !self.is_over() {
                let mut plan = self.events().clone();
                plan.drain(at..(at + part).min(plan.len()));
                let settings = Settings {
                    plan: Some(plan),
                    ..self.best.clone()
                };
                if !self.attempt(settings) {
                    at += part;
                }
            }
            part = if part == 1 { 0 } else { part.div_ceil(2) };
        }
    }

    fn events(&self) -> &Plan {
        self.best.plan.as_ref().expect("it was made at the beginning")
    }

    /// Leaves out faults at points, in the same manner.
    fn points(&mut self) {
        let Source::Seed { .. } = self.best.faults else {
            return;
        };
        let mut part = self.outcome.hit.len().div_ceil(2);
        while part > 0 && !self.is_over() {
            let mut at = 0;
            while at < self.outcome.hit.len() && !self.is_over() {
                let hit = &self.outcome.hit[at..(at + part).min(self.outcome.hit.len())];
                let more: Vec<Range<u64>> = hit.iter().map(|number| *number..number + 1).collect();
                let Source::Seed { without } = &self.best.faults else {
                    return;
                };
                let without = without.iter().cloned().chain(more).collect();
                let settings = Settings {
                    faults: Source::Seed { without },
                    ..self.best.clone()
                };
                if !self.attempt(settings) {
                    at += part;
                }
            }
            part = if part == 1 { 0 } else { part.div_ceil(2) };
        }
    }
}
