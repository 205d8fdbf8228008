//! What a chaos run has shown: a table for people, and JSON for machines. Written by the `chaos` program.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use super::books::{Books, Counts, Violation};
use super::rest::Rest;

/// The report of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The seed of all choices.
    pub seed: u64,
    /// How long things were asked for and broken, in seconds.
    pub seconds: f64,
    /// Sum of the faults.
    pub faults_total: u64,
    /// Sum of the migrations that were begun.
    pub migrations_total: u64,
    /// Faults by class.
    pub faults: Counts,
    /// Operations by kind and outcome.
    pub operations: Counts,
    /// Refused requests by kind and reason.
    pub refusals: Counts,
    /// Checks made.
    pub checks: Counts,
    /// The end of the run; absent where the run broke off.
    pub rest: Option<Rest>,
    /// What must never be.
    pub violations: Vec<Violation>,
    /// Why the run itself broke off, if it did.
    pub broken_off: Option<String>,
}

impl Report {
    /// Sums the books up.
    #[must_use]
    pub fn of(books: &Books, seed: u64, seconds: f64) -> Self {
        let migrations = books
            .operations
            .iter()
            .filter(|(what, _)| what.starts_with("Migrate"));
        Self {
            seed,
            seconds,
            faults_total: books.faults.values().sum(),
            migrations_total: migrations.map(|(_, times)| times).sum(),
            faults: books.faults.clone(),
            operations: books.operations.clone(),
            refusals: books.refusals.clone(),
            checks: books.checks.clone(),
            rest: None,
            violations: books.violations.clone(),
            broken_off: None,
        }
    }

    /// Whether the run was whole and nothing was violated.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty() && self.broken_off.is_none() && self.rest.is_some()
    }

    /// Of the timeline, the faults and what befell the VMs that were violated.
    #[must_use]
    pub fn tale(&self, timeline: &str) -> String {
        let names = self.violations.iter();
        let names: BTreeSet<_> = names
            .filter_map(|violation| violation.evidence.split([':', ' ']).next())
            .collect();
        let mut tale = String::new();
        for line in timeline.lines() {
            let mut words = line.split([' ', ':']);
            if words.any(|word| matches!(word, "fault" | "healed") || names.contains(word)) {
                tale += line;
                tale.push('\n');
            }
        }
        tale
    }

    /// Writes the report and the timeline into a folder.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path, timeline: &str) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let text = serde_json::to_string_pretty(self).context("write the report as JSON")?;
        fs::write(folder.join("report.json"), text + "\n").context("write the report")?;
        fs::write(folder.join("timeline.txt"), timeline).context("write the timeline")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tables = [
            ("FAULTS", &self.faults),
            ("OPERATIONS", &self.operations),
            ("REFUSED", &self.refusals),
            ("CHECKS", &self.checks),
        ];
        for (title, counts) in tables {
            writeln!(out, "{title}")?;
            for (what, times) in counts {
                writeln!(out, "  {times:>8}  {what}")?;
            }
        }
        writeln!(
            out,
            "\nseed {}: {} faults, {} migrations in {:.0} s",
            self.seed, self.faults_total, self.migrations_total, self.seconds
        )?;
        match &self.rest {
            Some(rest) => writeln!(
                out,
                "at rest {:.1} s after the last fault, with {} VMs",
                rest.seconds, rest.vms
            )?,
            None => writeln!(out, "the run did not come to its end")?,
        }
        if let Some(why) = &self.broken_off {
            writeln!(out, "broken off: {why}")?;
        }
        writeln!(out, "{} violations", self.violations.len())?;
        for violation in &self.violations {
            writeln!(
                out,
                "  {:9.3} s  {}: {}",
                violation.at_seconds, violation.rule, violation.evidence
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tale_is_of_faults_and_of_what_was_violated() {
        let mut books = Books::default();
        books.violation("rule", "c02 is paused".to_owned());
        let report = Report::of(&books, 1, 1.0);
        let timeline =
            "1.0 c01: Create\n2.0 c02: Create\n3.0 eye: QEMU of c02 (01) came\n4.0 fault: Full(2)\n";
        assert_eq!(
            report.tale(timeline),
            "2.0 c02: Create\n3.0 eye: QEMU of c02 (01) came\n4.0 fault: Full(2)\n"
        );
    }
}
