//! The stack level of the fleet in short: the real programs with their real network stack and files under turmoil.
//! `make fleet` runs more seeds of it.

use dalgu_tests::stack::{self, campaign};

#[test]
fn with_the_real_stack_nothing_is_violated_whatever_goes_wrong() -> anyhow::Result<()> {
    for seed in 1..=5 {
        let outcome = stack::run(seed)?;
        assert_eq!(outcome.violations, [], "seed {seed}");
        assert!(
            !outcome.faults.is_empty() && outcome.resumed > 0,
            "seed {seed}: {outcome:?}"
        );
    }
    Ok(())
}

#[test]
fn with_the_real_stack_too_a_rule_that_is_turned_off_is_missed() -> anyhow::Result<()> {
    for rule in campaign::SHOWN {
        let gate = campaign::hunt(rule)?;
        assert!(gate.caught_by.is_some(), "{rule:?} lives");
    }
    Ok(())
}
