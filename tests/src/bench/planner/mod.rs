//! The planner by itself: how good its plans are and how soon they are made. Called by the program `bench-planner`; everything is in this
//! process, and nothing waits.
//!
//! [`ganeti`] is the site that `hbal` was measured on, [`maintenance`] a whole site that is rolled, [`setting`] the study of consolidation whose figures others report; what is measured is
//! what the controller itself runs: `dalgu_controller::planner`. Figures of other programs are recorded ones, not of the same run, but for
//! `hbal` where it is given, and for [`threshold`], which is here to show that this setting is no easier than the original.

pub mod consolidation;
pub mod ganeti;
pub mod maintenance;
pub mod setting;
pub mod threshold;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use dalgu_controller::planner::{Rebalance, Site, rebalance, score};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use tokio::time::Instant;

use super::placement::one;
use super::report::{Aim, Bound, Measure, Report, median};

/// Recorded of `hbal` 3.0.2 on the site of 50 nodes: the score times a thousand, moves, milliseconds of processor time.
const HBAL: [f64; 3] = [184.0, 98.0, 89_000.0];

/// What is to be reached on one processor that nothing else takes.
pub const AIMS: [Aim; 9] = [
    ("rebalance 50 nodes: score after", Bound::Most, 184.0),
    ("rebalance 50 nodes: moves", Bound::Most, 98.0),
    ("rebalance 50 nodes: time", Bound::Most, 8.9),
    ("rebalance 5000 nodes: time", Bound::Most, 10_000.0),
    // Before each group an operator waits for it.
    ("maintain 1000 hosts, the first group: time", Bound::Most, 5000.0),
    // What the best recorded policy needed, all three at once.
    ("consolidate, no VM is lost: energy", Bound::Most, 141.55),
    ("consolidate, no VM is lost: migrations", Bound::Most, 4518.0),
    ("consolidate, no VM is lost: SLAV", Bound::Most, 3.8),
    // Of LR-MMT as shipped: whoever moves nothing violates nothing by SLAV, however full the hosts are.
    (
        "consolidate, no VM is lost: hosts' time short (SLATAH)",
        Bound::Most,
        6.1,
    ),
];

/// What Ganeti's balancer itself makes of a site: the score times a thousand, moves, milliseconds of processor time.
fn hbal(program: &Path, site: &Site) -> anyhow::Result<[f64; 3]> {
    let file = tempfile::NamedTempFile::new().context("make a file for hbal")?;
    fs::write(&file, ganeti::text(site)).context("write a file for hbal")?;
    let before = getrusage(UsageWho::RUSAGE_CHILDREN)?.user_time();
    let output = Command::new(program)
        .arg("-t")
        .arg(file.path())
        .args(["-G", "g1"])
        .output();
    let output = output.with_context(|| format!("run {}", program.display()))?;
    let taken = getrusage(UsageWho::RUSAGE_CHILDREN)?.user_time() - before;
    let said = String::from_utf8_lossy(&output.stdout);
    let after = |words: &str| -> Option<f64> {
        let rest = said.lines().find_map(|line| line.strip_prefix(words))?;
        rest.rsplit(' ').next()?.parse().ok()
    };
    let figures = after("Cluster score improved from ").zip(after("Solution length="));
    let (score, moves) = figures.with_context(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        format!("{} said no score: {said}{error}", program.display())
    })?;
    #[expect(clippy::cast_precision_loss, reason = "milliseconds")]
    Ok([score * 1000.0, moves, taken.num_milliseconds() as f64])
}

/// Evens out sites of so many nodes; the time is the median of so many runs. Where a program `hbal` is given, it does the same with the site of
/// 50 nodes; else its recorded figures are beside ours.
///
/// # Errors
/// If that program does not do it.
pub fn run(nodes: &[usize], runs: usize, program: Option<&Path>, report: &mut Report) -> anyhow::Result<()> {
    for nodes in nodes {
        let site = ganeti::site(*nodes);
        let theirs = match (nodes, program) {
            (50, Some(program)) => hbal(program, &site)?,
            _ => HBAL,
        };
        let settings = Rebalance {
            weights: ganeti::WEIGHTS,
            contended: None,
            gain_per_gib: 0.0,
            ..Rebalance::default()
        };
        let mut times = Vec::with_capacity(runs);
        let mut plan = None;
        for _ in 0..runs.max(1) {
            let begin = Instant::now();
            plan = Some(rebalance(&site, &settings));
            times.push(begin.elapsed().as_secs_f64() * 1000.0);
        }
        let Some(plan) = plan else { continue };
        let name = |what: &str| format!("rebalance {nodes} nodes: {what}");
        let beside = |row: Option<Measure>, figure: f64| match nodes {
            50 => row.map(|row| row.over(&[figure])),
            _ => row,
        };
        let thousandths = |score: f64| score * 1000.0;
        report.add(one(
            name("score before"),
            "thousandths",
            thousandths(score(&site, ganeti::WEIGHTS)),
        ));
        let after = thousandths(score(plan.site(), ganeti::WEIGHTS));
        report.add(beside(one(name("score after"), "thousandths", after), theirs[0]));
        #[expect(clippy::cast_precision_loss, reason = "a count")]
        let moves = plan.moves().len() as f64;
        report.add(beside(one(name("moves"), "", moves), theirs[1]));
        report.add(beside(Measure::of(name("time"), "ms", &times), theirs[2]));
        if let (50, Some(time)) = (nodes, median(&times)) {
            report.add(one(name("times faster than hbal"), "", theirs[2] / time));
        }
    }
    Ok(())
}
