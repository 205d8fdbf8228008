//! The planner by itself: how good its plans are and how soon they are made. Called by the program `bench-planner`; everything is in this
//! process, and nothing waits.
//!
//! [`ganeti`] is the site that `hbal` was measured on, [`maintenance`] a whole site that is rolled, [`setting`] the study of consolidation whose figures others report; what is measured is
//! what the controller itself runs: `dalgu_controller::planner`. Figures of other programs are recorded ones, not of the same run, but for
//! [`threshold`], which is here to show that this setting is no easier than the original.

pub mod consolidation;
pub mod ganeti;
pub mod maintenance;
pub mod setting;
pub mod threshold;

use dalgu_controller::planner::{Rebalance, rebalance, score};
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

/// Evens out sites of so many nodes; the time is the median of so many runs.
pub fn run(nodes: &[usize], runs: usize, report: &mut Report) {
    for nodes in nodes {
        let site = ganeti::site(*nodes);
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
        report.add(beside(one(name("score after"), "thousandths", after), HBAL[0]));
        #[expect(clippy::cast_precision_loss, reason = "a count")]
        let moves = plan.moves().len() as f64;
        report.add(beside(one(name("moves"), "", moves), HBAL[1]));
        report.add(beside(Measure::of(name("time"), "ms", &times), HBAL[2]));
        if let (50, Some(time)) = (nodes, median(&times)) {
            report.add(one(name("times faster than hbal"), "", HBAL[2] / time));
        }
    }
}
