//! How good the forecast of a host's peak is: the planner's, beside simple rules, on groups of VMs that stay together for the whole trace.
//!
//! Every [`VMS`]th VM is in the same group, and a group stands for a host. At each full hour, from the second week on, each rule says how many processors the group is going to
//! use at most in the next hour, from what is seen by then. A rule is worth something if it is exceeded seldom and reserves little; either alone is easy. Called by the
//! command. Pure.

use serde::Serialize;

use super::{
    table,
    trace::{STEP_S, Trace},
};
use crate::planner::peak::{self, HOURS, Peaks, Week};

/// VMs of a group, at least.
const VMS: usize = 20;
/// Steps of an hour.
const STEPS: usize = 12;

/// What is expected of a group in an hour.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    /// The planner's: the fullest hour of a week, by the VMs' peaks of the same hour.
    Peaks,
    /// What it comes to: no rule can be better.
    Oracle,
    /// The highest of so many hours.
    Highest(usize),
    /// Mean and so many standard deviations of a day.
    Deviations(u8),
}

const RULES: [(&str, Rule); 8] = [
    ("the planner's (peaks of the same hour, a week)", Rule::Peaks),
    ("highest of the last hour", Rule::Highest(1)),
    ("highest of a day", Rule::Highest(24)),
    ("highest of a week", Rule::Highest(HOURS)),
    ("mean and 2 deviations of a day", Rule::Deviations(2)),
    ("mean and 3 deviations of a day", Rule::Deviations(3)),
    ("mean and 5 deviations of a day", Rule::Deviations(5)),
    ("what it comes to", Rule::Oracle),
];

/// How a rule did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The rule.
    pub rule: &'static str,
    /// Hours of groups in which more was used, of all.
    pub exceeded: f64,
    /// What was expected, of the processors that the VMs have, over time.
    pub expected_of_limit: f64,
}

/// A group: what it used in each step, and what each VM used at most in each hour.
struct Group {
    limit: f64,
    steps: Vec<f64>,
    /// The most of each hour.
    most: Vec<f64>,
    vms: Vec<(f64, Vec<f32>)>,
}

impl Group {
    fn of(trace: &Trace, vms: impl Iterator<Item = usize>, hours: usize) -> Self {
        let mut group = Self {
            limit: 0.0,
            steps: vec![0.0; hours * STEPS],
            most: Vec::new(),
            vms: Vec::new(),
        };
        for vm in vms.map(|vm| &trace.vms[vm]) {
            let mut peaks = vec![0.0_f32; hours];
            let times = (trace.start_s..).step_by(300);
            for ((step, sum), at_s) in group.steps.iter_mut().enumerate().zip(times) {
                if vm.arrive_s <= at_s && vm.leave_s.is_none_or(|leave_s| leave_s > at_s) {
                    let used = vm.cpus_used(at_s);
                    *sum += used;
                    #[expect(clippy::cast_possible_truncation, reason = "a few digits are enough")]
                    let used = used as f32;
                    peaks[step / STEPS] = peaks[step / STEPS].max(used);
                }
            }
            group.limit += f64::from(vm.size.vcpus);
            group.vms.push((vm.size.vcpus.into(), peaks));
        }
        let most = |hour: &[f64]| hour.iter().copied().fold(0.0, f64::max);
        group.most = group.steps.chunks(STEPS).map(most).collect();
        group
    }

    /// What a rule that sees all before an hour says of it, for each hour from the second week on.
    fn expected(&self, rule: Rule) -> Vec<f64> {
        let hours = HOURS..self.most.len();
        match rule {
            Rule::Oracle => self.most[HOURS..].to_vec(),
            Rule::Highest(past) => hours
                .map(|hour| self.most[hour - past..hour].iter().copied().fold(0.0, f64::max))
                .collect(),
            Rule::Deviations(count) => hours
                .map(|hour| {
                    let day = &self.steps[(hour - 24) * STEPS..hour * STEPS];
                    #[expect(clippy::cast_precision_loss, reason = "288")]
                    let len = day.len() as f64;
                    let mean = day.iter().sum::<f64>() / len;
                    let variance = day.iter().map(|used| (used - mean).powi(2)).sum::<f64>() / len;
                    (mean + f64::from(count) * variance.sqrt()).min(self.limit)
                })
                .collect(),
            Rule::Peaks => self.by_peaks(),
        }
    }

    fn by_peaks(&self) -> Vec<f64> {
        let mut seen = vec![Peaks::default(); self.vms.len()];
        let mut expected = Vec::new();
        for hour in 0..self.most.len() {
            if hour >= HOURS {
                let mut week: Week = [0.0; HOURS];
                for (peaks, (size, _)) in seen.iter().zip(&self.vms) {
                    peak::add(&mut week, &peaks.week(*size), 1.0);
                }
                expected.push(week[peak::fullest(&week)]);
            }
            for (peaks, (_, used)) in seen.iter_mut().zip(&self.vms) {
                peaks.push(hour as u64, used[hour]);
            }
        }
        expected
    }
}

/// Judges all rules on a trace; nothing where it is not longer than a week, or has too few VMs for a group.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
pub fn judge(trace: &Trace) -> Vec<Row> {
    let steps = (trace.end_s - trace.start_s) / STEP_S;
    let hours = usize::try_from(steps).unwrap_or(0) / STEPS;
    let count = trace.vms.len() / VMS;
    if hours <= HOURS || count == 0 {
        return Vec::new();
    }
    let groups: Vec<_> = (0..count)
        .map(|group| Group::of(trace, (group..trace.vms.len()).step_by(count), hours))
        .collect();
    let row = |(name, rule): (&'static str, Rule)| {
        let (mut exceeded, mut share, mut all) = (0_u64, 0.0, 0_u64);
        for group in &groups {
            for (expected, most) in group.expected(rule).iter().zip(&group.most[HOURS..]) {
                // Peaks are kept in single precision.
                exceeded += u64::from(*most > expected + 1e-4);
                share += expected / group.limit;
                all += 1;
            }
        }
        Row {
            rule: name,
            exceeded: exceeded as f64 / all as f64,
            expected_of_limit: share / all as f64,
        }
    };
    RULES.into_iter().map(row).collect()
}

/// The rows for people.
pub(super) fn show(rows: &[Row]) -> String {
    let line = |row: &Row| {
        vec![
            row.rule.to_owned(),
            format!("{:.4}", row.exceeded),
            format!("{:.3}", row.expected_of_limit),
        ]
    };
    table::layout(
        &["FORECAST OF A GROUP'S PEAK", "EXCEEDED", "EXPECTED/LIMIT"],
        &rows.iter().map(line).collect::<Vec<_>>(),
    )
}
