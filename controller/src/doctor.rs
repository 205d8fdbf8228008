//! What is wrong on the site, as far as the store and the hosts' reports show: `dalgu doctor`. Pure.
//!
//! Called by `api::site` with a durable snapshot, and by the simulated fleet's checker, which knows more than any
//! controller can and asks that this finds nothing where it finds nothing. One function for each invariant of
//! docs/failure-modes.md; each says what it looked at, what it found, and what it cannot see. Nothing is changed, and nothing is
//! asked of anybody here: what hosts' pools hold, which they are asked for, comes with the [`View`].

mod backups;
mod copies;
mod files;
mod images;
mod networks;
mod numbers;
mod requests;
mod rest;
mod room;
mod sight;
mod store;
mod volumes;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dalgu_proto::ids::HostName;
use jiff::Timestamp;

pub use self::{
    copies::twice,
    files::{Files, to_ask},
    rest::open,
    room::rooms,
};
use crate::{
    model::{HostState, VmRecord},
    state::State,
};

/// Hosts that a finding names at most: each image may be on thousands.
const SHOWN: usize = 8;

/// An invariant of docs/failure-modes.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Invariant {
    /// One running copy.
    I1,
    /// Nothing acknowledged is lost.
    I2,
    /// Operations end, and VMs are as they were asked to be.
    I3,
    /// Nothing without an owner.
    I4,
    /// Promises and room.
    I5,
    /// Numbers only rise.
    I6,
    /// Nothing is done that nobody asked for.
    I7,
    /// One request, one effect.
    I8,
    /// Reads are never stale.
    I9,
    /// Projects are kept apart.
    I10,
    /// Every change is accounted for.
    I11,
    /// Nobody is obeyed who was replaced.
    I12,
    /// Status is what is.
    I13,
    /// It comes to rest.
    I14,
    /// Not one of them: the controller's own store.
    Store,
}

impl Invariant {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::I1 => "I1",
            Self::I2 => "I2",
            Self::I3 => "I3",
            Self::I4 => "I4",
            Self::I5 => "I5",
            Self::I6 => "I6",
            Self::I7 => "I7",
            Self::I8 => "I8",
            Self::I9 => "I9",
            Self::I10 => "I10",
            Self::I11 => "I11",
            Self::I12 => "I12",
            Self::I13 => "I13",
            Self::I14 => "I14",
            Self::Store => "STORE",
        }
    }
}

/// How bad a finding is; the worst is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Notice,
    /// Somebody should look.
    Warning,
    /// Data, or the trust in what is shown, is in danger.
    Critical,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which invariant.
    pub invariant: Invariant,
    /// How bad.
    pub severity: Severity,
    /// Stable word.
    pub kind: &'static str,
    /// What it is about.
    pub subject: String,
    /// What is seen.
    pub seen: String,
    /// What to do next.
    pub next_step: String,
}

impl Finding {
    /// What it tells of, in whatever numbers.
    fn topic(&self) -> (&'static str, &str) {
        (self.kind, &self.subject)
    }
}

/// What was looked at for one invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Which.
    pub invariant: Invariant,
    /// What must hold.
    pub title: &'static str,
    /// How many things were looked at.
    pub checked: usize,
    /// What they are.
    pub subjects: &'static str,
    /// How many of them could not be judged by anything recent.
    pub unchecked: usize,
    /// What cannot be seen at all.
    pub limits: &'static str,
}

/// A host of which something is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The host.
    pub host: HostName,
    /// Why.
    pub reason: String,
    /// VMs that it owns.
    pub vms: usize,
}

/// The whole of an examination.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Diagnosis {
    /// What is wrong, the worst first.
    pub findings: Vec<Finding>,
    /// What was looked at.
    pub checks: Vec<Check>,
    /// Of which hosts something is not known.
    pub gaps: Vec<Gap>,
}

/// What is examined.
#[derive(Debug, Clone)]
pub struct View<'a> {
    /// What the store holds and what hosts have reported, at one moment.
    pub state: &'a State,
    /// That moment, by the controller's wall clock.
    pub now: Timestamp,
    /// How long ago each host was heard then.
    pub silence: BTreeMap<HostName, Duration>,
    /// What a look through the store found, if there was one.
    pub damage: Option<Vec<String>>,
    /// What pools hold, of those that were asked.
    pub files: Files,
}

impl View<'_> {
    /// Why what a host last said of its VMs may be out of date or is not all; `None` when it is recent and complete.
    fn unseen(&self, host: &HostName) -> Option<String> {
        let ago = self.silence.get(host).copied().unwrap_or_default().as_secs();
        if self.is_asleep(host) {
            return Some("it is switched off, or on its way there or back".to_owned());
        }
        match self.state.live.get(host) {
            None => Some("not heard from".to_owned()),
            Some(live) => match (live.state, &live.hypervisor_error) {
                (HostState::Initializing, _) => {
                    Some(format!("not heard from since the controller's start {ago} s ago"))
                }
                (HostState::Unreachable, _) => Some(format!("silent for {ago} s")),
                (HostState::Ready, Some(error)) => Some(format!("its hypervisor cannot be asked: {error}")),
                (HostState::Ready, None) if !live.complete => {
                    Some("its last report was not complete".to_owned())
                }
                (HostState::Ready, None) => None,
            },
        }
    }

    fn is_asleep(&self, host: &HostName) -> bool {
        self.state.hosts.get(host).is_some_and(|host| host.is_asleep())
    }

    /// How many VMs hosts own.
    fn owned(&self) -> BTreeMap<&HostName, usize> {
        let mut owned = BTreeMap::new();
        for vm in self.state.vms.values() {
            *owned.entry(&vm.owner).or_default() += 1;
        }
        owned
    }

    /// VMs whose owner does not say now what they are.
    fn unseen_vms(&self) -> usize {
        let unseen = self
            .owned()
            .into_iter()
            .filter(|(host, _)| self.unseen(host).is_some());
        unseen.map(|(_, vms)| vms).sum()
    }

    /// How long ago something was, never less than nothing.
    fn since(&self, then: Timestamp) -> Duration {
        Duration::try_from(self.now.duration_since(then)).unwrap_or_default()
    }

    /// Nothing is under way for the VM, and its present owner's word is known and counts: it is at rest.
    fn rests(&self, vm: &VmRecord) -> bool {
        !vm.unconfirmed
            && !self.state.active_operations.contains_key(&vm.id)
            && self.state.active_migration(vm.id).is_none()
            && self.unseen(&vm.owner).is_none()
    }
}

/// What the function of one invariant gives back.
#[derive(Debug, Default)]
struct Look {
    checked: usize,
    subjects: &'static str,
    unchecked: usize,
    limits: &'static str,
    findings: Vec<Finding>,
}

impl Look {
    /// Nothing to look at yet.
    fn at(subjects: &'static str, checked: usize) -> Self {
        Self {
            checked,
            subjects,
            ..Self::default()
        }
    }
}

/// Hosts for people: some of many.
fn some(hosts: &[&str]) -> String {
    match hosts.split_at_checked(SHOWN) {
        Some((first, rest)) if !rest.is_empty() => format!("{} and {} more", first.join(", "), rest.len()),
        _ => hosts.join(", "),
    }
}

type Examine = fn(&View<'_>) -> Look;

/// What is examined, in the order in which it is told.
const CHECKS: [(Invariant, &str, Examine); 15] = [
    (Invariant::I1, "no VM runs on two hosts", copies::one_running),
    (
        Invariant::I2,
        "nothing acknowledged is lost",
        sight::all_are_there,
    ),
    (
        Invariant::I3,
        "operations end, and VMs are as they were asked to be",
        rest::as_asked,
    ),
    (
        Invariant::I4,
        "nothing is on a host that is not its own",
        copies::all_owned,
    ),
    (
        Invariant::I5,
        "no host has promised more than it has",
        room::not_over_committed,
    ),
    (
        Invariant::I6,
        "no host knows higher numbers than the store",
        numbers::store_is_ahead,
    ),
    (
        Invariant::I7,
        "nothing is started or stopped outside Dalgu",
        rest::nobody_else,
    ),
    (Invariant::I8, "one request has one effect", requests::one_effect),
    (Invariant::I9, "reads are never stale", |_| {
        unseen("a single look cannot show it")
    }),
    (Invariant::I10, "projects are kept apart", |_| {
        unseen("there are no projects yet")
    }),
    (Invariant::I11, "every change is accounted for", |_| {
        unseen("there is no audit log yet; events name who asked")
    }),
    (
        Invariant::I12,
        "hosts obey this controller and no other",
        numbers::in_charge,
    ),
    (
        Invariant::I13,
        "what is shown was seen lately",
        sight::seen_lately,
    ),
    (Invariant::I14, "everything comes to rest", rest::comes_to_rest),
    (Invariant::Store, "the store is sound and has room", store::sound),
];

fn unseen(limits: &'static str) -> Look {
    Look {
        limits,
        ..Look::default()
    }
}

/// See the module.
pub fn examine(view: &View<'_>) -> Diagnosis {
    let mut diagnosis = Diagnosis::default();
    for (invariant, title, examine) in CHECKS {
        let look = examine(view);
        diagnosis.checks.push(Check {
            invariant,
            title,
            checked: look.checked,
            subjects: look.subjects,
            unchecked: look.unchecked,
            limits: look.limits,
        });
        diagnosis.findings.extend(look.findings);
    }
    // Stable: within a severity the order of the invariants stays.
    diagnosis
        .findings
        .sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    let owned = view.owned();
    let gap = |host: &HostName| {
        let vms = owned.get(host).copied().unwrap_or(0);
        // Of one that is off and has none nothing is missed.
        let missed = vms > 0 || !view.is_asleep(host);
        Some(Gap {
            reason: view.unseen(host).filter(|_| missed)?,
            vms,
            host: host.clone(),
        })
    };
    diagnosis.gaps = view.state.hosts.keys().filter_map(gap).collect();
    diagnosis
}

impl Diagnosis {
    /// The findings of this examination that an earlier one had too: what is wrong only for a moment is none.
    #[must_use]
    pub fn lasting(mut self, before: &Self) -> Self {
        let known: BTreeSet<_> = before.findings.iter().map(Finding::topic).collect();
        self.findings.retain(|finding| known.contains(&finding.topic()));
        self
    }
}
