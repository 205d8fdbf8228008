//! What was measured, as a table for people and as JSON for machines. Pure, but for writing the file.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::Serialize;

/// Where a benchmark of this name leaves its figures: below the build directory that this program is in.
///
/// # Errors
/// If the program is in no build directory.
pub fn place(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?;
    let target = program.parent().and_then(Path::parent);
    let target = target.context("the program is in no build directory")?;
    Ok(target.join("bench").join(name).with_extension("json"))
}

/// One figure, with the same thing done another way beside it where there is one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measure {
    /// What was measured.
    pub name: String,
    /// The median, or the figure itself where there is one only.
    pub value: f64,
    /// Unit of `value` and `baseline`.
    pub unit: &'static str,
    /// How many samples the median is of.
    pub samples: usize,
    /// Lowest sample.
    pub min: f64,
    /// Highest sample.
    pub max: f64,
    /// The same without Dalgu, in the same run on the same host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// `value` over `baseline`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

impl Measure {
    /// The median of some samples; `None` without any.
    #[must_use]
    pub fn of(name: impl Into<String>, unit: &'static str, samples: &[f64]) -> Option<Self> {
        let ends = |pick: fn(f64, f64) -> f64| samples.iter().copied().reduce(pick);
        Some(Self {
            name: name.into(),
            value: median(samples)?,
            unit,
            samples: samples.len(),
            min: ends(f64::min)?,
            max: ends(f64::max)?,
            baseline: None,
            ratio: None,
        })
    }

    /// Puts the median of other samples beside it.
    #[must_use]
    pub fn over(mut self, baseline: &[f64]) -> Self {
        self.baseline = median(baseline);
        self.ratio = self
            .baseline
            .filter(|other| *other > 0.0)
            .map(|other| self.value / other);
        self
    }
}

/// Whether a figure is to be at most or at least something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// At most.
    Most,
    /// At least.
    Least,
}

/// What a figure of this name is to reach.
pub type Aim = (&'static str, Bound, f64);

/// The middle of some samples; between the two middle ones where their number is even.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(sorted.len() / 2 - 1)?;
    Some(f64::midpoint(lower, upper))
}

/// All figures of a run.
#[derive(Debug, Default)]
pub struct Report(pub Vec<Measure>);

impl Report {
    /// Adds a figure, if there is one.
    pub fn add(&mut self, measure: Option<Measure>) {
        self.0.extend(measure);
    }

    /// Says of each aim whether it was reached.
    ///
    /// # Errors
    /// If one was missed, or none was measured. Of a part of a benchmark some are not.
    pub fn judge(&self, aims: &[Aim]) -> anyhow::Result<()> {
        let (mut measured, mut missed) = (0, 0);
        for (name, bound, limit) in aims {
            let Some(found) = self.0.iter().find(|measure| measure.name == *name) else {
                println!("aim not measured: {name}");
                continue;
            };
            let (reached, side) = match bound {
                Bound::Most => (found.value <= *limit, "at most"),
                Bound::Least => (found.value >= *limit, "at least"),
            };
            measured += 1;
            missed += usize::from(!reached);
            let word = if reached { "reached" } else { "MISSED" };
            println!(
                "aim {word}: {name}: {:.3} {}, {side} {limit}",
                found.value, found.unit
            );
        }
        ensure!(measured > 0, "no aim was measured");
        ensure!(missed == 0, "{missed} of {measured} aims were missed");
        Ok(())
    }

    /// Writes the figures as a JSON array.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        }
        let text = serde_json::to_string_pretty(&self.0).context("write JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|measure| measure.name.len()).max().unwrap_or(0);
        writeln!(
            f,
            "{:width$}  {:>10}  {:>23}  {:>3}  {:>10}  {:>6}",
            "", "median", "(min .. max)", "n", "baseline", "ratio"
        )?;
        for measure in &self.0 {
            let range = format!("({:.1} .. {:.1})", measure.min, measure.max);
            let or_dash = |value: Option<f64>, digits: usize| {
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
            };
            writeln!(
                f,
                "{:width$}  {:>10.1}  {range:>23}  {:>3}  {:>10}  {:>6}  {}",
                measure.name,
                measure.value,
                measure.samples,
                or_dash(measure.baseline, 1),
                or_dash(measure.ratio, 2),
                measure.unit,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn an_aim_that_is_missed_or_never_measured_is_no_success() {
        let report = Report(Vec::from_iter(Measure::of("start", "ms", &[10.0])));
        assert!(
            report
                .judge(&[("start", Bound::Most, 10.0), ("other", Bound::Most, 1.0)])
                .is_ok()
        );
        assert!(report.judge(&[("start", Bound::Most, 9.9)]).is_err());
        assert!(report.judge(&[("start", Bound::Least, 10.1)]).is_err());
        assert!(report.judge(&[("other", Bound::Most, 1.0)]).is_err());
    }

    #[test]
    fn a_figure_says_how_it_compares_and_one_without_baseline_says_nothing() {
        let measure = Measure::of("start", "ms", &[10.0, 30.0]).unwrap().over(&[10.0]);
        assert_eq!(
            (measure.value, measure.baseline, measure.ratio),
            (20.0, Some(10.0), Some(2.0))
        );
        let json = serde_json::to_string(&Measure::of("size", "bytes", &[7.0])).unwrap();
        assert!(!json.contains("ratio"), "{json}");
        assert_eq!(Measure::of("nothing", "ms", &[]), None);
    }
}
