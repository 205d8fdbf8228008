//! The stack level of the fleet in short: the real programs with their real network stack and files under turmoil.
//! `make fleet` runs more seeds of it.

use dalgu_proto::mutant::{self, Mutant};
use dalgu_tests::stack;

#[test]
fn with_the_real_stack_nothing_is_violated_whatever_goes_wrong() -> anyhow::Result<()> {
    for seed in 1..=6 {
        let outcome = stack::run(seed)?;
        assert_eq!(outcome.violations, [], "seed {seed}");
        assert!(!outcome.faults.is_empty(), "seed {seed}");
    }
    Ok(())
}

/// The first of the seeds that shows that a rule is needed, with what it violates.
fn caught(rule: Mutant, seeds: impl IntoIterator<Item = u64>) -> anyhow::Result<Option<(u64, String)>> {
    let _off = mutant::turn_on(rule);
    for seed in seeds {
        let outcome = stack::run(seed)?;
        if let Some(violation) = outcome.violations.first() {
            return Ok(Some((
                seed,
                format!("{}: {}", violation.invariant, violation.what),
            )));
        }
    }
    Ok(None)
}

#[test]
fn the_stack_shows_that_a_rule_is_needed() -> anyhow::Result<()> {
    for rule in [Mutant::RequestNotRemembered, Mutant::ArrivesRunning] {
        let caught = caught(rule, 1..=20)?;
        println!("{rule:?}: {caught:?}");
        assert!(caught.is_some(), "{rule:?} lives");
    }
    Ok(())
}
