//! What a chaos run keeps book of: what was asked for and answered, what was broken, what was seen. The clients and the
//! faults write here, the eye reads here what may be expected. Plain data: it knows nothing of Dalgu's code.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

/// What was asked for last of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// That it runs.
    Running,
    /// That it is off.
    Off,
    /// That it is frozen.
    Paused,
    /// That it is gone.
    Gone,
}

/// One VM.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// What was asked for last.
    pub want: Want,
    /// That has been answered as done, and nothing else was asked since.
    pub settled: Option<Instant>,
    /// Its creation was acknowledged: from then on it must be there until its deletion is asked for.
    pub acknowledged: bool,
    /// Its agent may start it again when its QEMU died.
    pub restarts: bool,
    /// Its own QEMU was killed by a fault, and it has not been seen to run since.
    pub victim: Option<Instant>,
    /// So many boots of the guest have been asked for, or are due after a fault, and not yet been seen.
    pub boots_due: u32,
    /// When its QEMU was killed.
    pub deaths: Vec<Instant>,
}

/// Something that must never be.
#[derive(Debug, Clone, Serialize)]
pub struct Violation {
    /// Seconds since the run began.
    pub at_seconds: f64,
    /// Which rule.
    pub rule: String,
    /// What was seen.
    pub evidence: String,
}

/// How often something was done, seen or looked at.
pub type Counts = BTreeMap<String, u64>;

/// The books of one run.
#[derive(Debug)]
pub struct Books {
    began: Instant,
    /// VMs by their UUIDs.
    pub subjects: BTreeMap<String, Subject>,
    /// Faults by class.
    pub faults: Counts,
    /// Operations by kind and outcome.
    pub operations: Counts,
    /// Requests that were refused, by reason.
    pub refusals: Counts,
    /// What was checked, and how often.
    pub checks: Counts,
    /// What must never be.
    pub violations: Vec<Violation>,
    /// Operations that were acknowledged and have not been seen to end.
    pub open: BTreeMap<String, String>,
    /// Hosts that are without power, or were a moment ago.
    pub dark: BTreeMap<u8, Instant>,
    /// When a daemon that carries migrations, a libvirtd or an agent, was last killed, by host.
    pub carriers_killed: BTreeMap<u8, Instant>,
    /// When a disk was last full.
    pub full: Option<Instant>,
    timeline: String,
}

impl Default for Books {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            subjects: BTreeMap::new(),
            faults: Counts::new(),
            operations: Counts::new(),
            refusals: Counts::new(),
            checks: Counts::new(),
            violations: Vec::new(),
            open: BTreeMap::new(),
            dark: BTreeMap::new(),
            carriers_killed: BTreeMap::new(),
            full: None,
            timeline: String::new(),
        }
    }
}

impl Books {
    /// Seconds since the run began.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Writes a line into the timeline.
    pub fn tell(&mut self, line: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.timeline, "{:9.3} {line}", self.seconds());
    }

    /// Everything that happened, a line each.
    #[must_use]
    pub fn timeline(&self) -> &str {
        &self.timeline
    }

    /// Notes a violation; one that was noted already with the same words is not noted again.
    pub fn violation(&mut self, rule: &str, evidence: String) {
        if self
            .violations
            .iter()
            .any(|known| known.rule == rule && known.evidence == evidence)
        {
            return;
        }
        self.tell(&format!("VIOLATION {rule}: {evidence}"));
        eprintln!("{:9.3} VIOLATION {rule}: {evidence}", self.seconds());
        self.violations.push(Violation {
            at_seconds: self.seconds(),
            rule: rule.to_owned(),
            evidence,
        });
    }

    /// Counts a check.
    pub fn checked(&mut self, what: &str) {
        count(&mut self.checks, what);
    }

    /// A VM by its name; of several, one after the other, the one that is not gone.
    pub fn named(&mut self, name: &str) -> Option<&mut Subject> {
        let mut found = self.subjects.values_mut().filter(|subject| subject.name == name);
        found.find(|subject| subject.want != Want::Gone)
    }

    /// Notes that a VM's own QEMU is dead by a fault.
    pub fn killed(&mut self, uid: &str) {
        if let Some(subject) = self.subjects.get_mut(uid) {
            let now = Instant::now();
            subject.victim = Some(now);
            subject.deaths.push(now);
            if subject.restarts {
                subject.boots_due += 1;
            }
        }
    }

    /// Whether a VM's QEMU may be killed once more: an agent rightly gives a guest up that dies again and again.
    #[must_use]
    pub fn may_die(&self, uid: &str) -> bool {
        self.subjects.get(uid).is_some_and(|subject| {
            let lately = subject.deaths.iter().filter(|death| death.elapsed() < PATIENCE);
            lately.count() < MOST_DEATHS
        })
    }
}

/// A guest that ends five times in ten minutes is not started again by its agent; that is its documented right.
const MOST_DEATHS: usize = 4;
const PATIENCE: Duration = Duration::from_mins(11);

/// Adds one to what is counted.
pub fn count(counts: &mut Counts, what: &str) {
    *counts.entry(what.to_owned()).or_default() += 1;
}

#[cfg(test)]
impl Subject {
    /// A VM that runs.
    pub fn example() -> Self {
        Self {
            name: "c1".to_owned(),
            want: Want::Running,
            settled: None,
            acknowledged: true,
            restarts: true,
            victim: None,
            boots_due: 0,
            deaths: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vm_is_not_killed_so_often_that_its_agent_gives_it_up() {
        let mut books = Books::default();
        books.subjects.insert("u".to_owned(), Subject::example());
        for _ in 0..MOST_DEATHS {
            assert!(books.may_die("u"));
            books.killed("u");
        }
        assert!(!books.may_die("u"));
        assert!(!books.may_die("another"));
    }

    #[tokio::test]
    async fn the_same_violation_is_noted_once() {
        let mut books = Books::default();
        books.violation("rule", "seen".to_owned());
        books.violation("rule", "seen".to_owned());
        books.violation("rule", "seen elsewhere".to_owned());
        assert_eq!(books.violations.len(), 2);
        assert_eq!(books.timeline().lines().count(), 2);
    }
}
