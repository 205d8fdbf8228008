//! A run for people: what was planned, what happened, what was violated.

use super::{Outcome, Settings};

/// Prints a run.
pub fn print(settings: &Settings, outcome: &Outcome) {
    if settings.plan.is_some() {
        println!("plan:");
        for (time, event) in &outcome.plan {
            println!("  {:>8.3} {event:?}", time.as_secs_f64());
        }
    }
    println!("history (time in s, #number of the point):");
    for line in &outcome.lines {
        println!("  {line}");
    }
    println!(
        "seed {}: {} requests, {} faults at {} points in {:.0} s, digest {:016x}",
        outcome.seed,
        outcome.requests,
        outcome.fault_count(),
        outcome.points,
        outcome.time.as_secs_f64(),
        outcome.digest
    );
    for (class, count) in &outcome.faults {
        println!("  {count:>6} {class}");
    }
    for (operation, count) in &outcome.operations {
        println!("  {count:>6} {operation}");
    }
    if outcome.violations.is_empty() {
        println!("nothing was violated");
    }
    for violation in &outcome.violations {
        println!("VIOLATED {}: {}", violation.invariant, violation.what);
    }
}
