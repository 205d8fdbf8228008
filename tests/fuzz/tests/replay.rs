//! Gives every input that is kept to its target, in the ordinary build: what the fuzzer once found stays mended, and the
//! targets themselves stay alive.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dalgu_fuzz::{corpus, target};

/// Runs a target on all its inputs; fails with the names of those it does not take.
#[track_caller]
fn replay(name: &str) {
    let target = target(name).expect("the target exists");
    let seeds = corpus::seeds(name).expect("the seeds can be read");
    let found = corpus::found(name).expect("the archive can be read");
    assert!(!seeds.is_empty(), "{name} has no seeds");
    let found = found
        .into_iter()
        .enumerate()
        .map(|(number, input)| (format!("number {number} of corpus/{name}.bin"), input));
    let mut refused = Vec::new();
    for (name, input) in seeds.into_iter().chain(found) {
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
            refused.push(name);
        }
    }
    assert!(refused.is_empty(), "{name} fails on {refused:#?}");
}

#[test]
fn requests_that_were_found_do_no_harm() {
    replay("rpc");
}

#[test]
fn what_agents_and_controllers_said_to_each_other_does_no_harm() {
    replay("agents");
}

#[test]
fn records_that_were_found_are_read_or_refused() {
    replay("records");
}

#[test]
fn domains_that_were_found_are_read_or_refused() {
    replay("xml");
}

#[test]
fn a_kernel_that_says_nonsense_does_no_harm() {
    replay("telemetry");
}

#[test]
fn images_that_were_found_are_taken_or_refused() {
    replay("images");
}

#[test]
fn configurations_that_were_found_are_read_or_refused() {
    replay("config");
}
