//! Hosts in the order in which a policy would take them, as far as that does not depend on the request.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use dalgu_proto::ids::HostName;

use super::{Engine, Slot, ask::Ask, host::Place};
use crate::placement::{
    Policy,
    score::{Busy, Cost, Score, Size, Steps},
};

/// Hosts with the same load, the same capacity and as many free processors.
type Line = BTreeSet<Entry>;

/// A host in its row. In the order of the score, as memory goes first and comes as [`Index::key`] says.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    memory: u64,
    busy: Busy,
    /// `None` only for the bound of a search.
    name: Option<Arc<HostName>>,
    slot: Slot,
}

/// Hosts with the same load and the same capacity: the rows that are not empty, by free processors.
#[derive(Debug, Default)]
struct Group {
    vcpus: Vec<u32>,
    /// The most free memory in each row: most rows are passed over by a look at it.
    most: Vec<u64>,
    rows: Vec<Line>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    policy: Policy,
    groups: BTreeMap<(Steps, Size), Group>,
    len: usize,
}

impl Index {
    pub(super) fn new(policy: Policy) -> Self {
        Self {
            policy,
            groups: BTreeMap::new(),
            len: 0,
        }
    }

    /// Hosts in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Memory as the rows have it, and back: the best first, which is the most for one policy and the least for the other.
    fn key(policy: Policy, memory_mib: u64) -> u64 {
        match policy {
            Policy::Spread => u64::MAX - memory_mib,
            Policy::Pack => memory_mib,
        }
    }

    /// Enters a host.
    pub(super) fn insert(&mut self, place: &Place, name: &Arc<HostName>, slot: Slot) {
        let group = self.groups.entry((place.steps, place.capacity)).or_default();
        let row = group.vcpus.partition_point(|vcpus| *vcpus < place.free.vcpus);
        if group.vcpus.get(row) != Some(&place.free.vcpus) {
            group.vcpus.insert(row, place.free.vcpus);
            group.most.insert(row, 0);
            group.rows.insert(row, Line::new());
        }
        group.most[row] = group.most[row].max(place.free.memory_mib);
        self.len += usize::from(group.rows[row].insert(Entry::new(self.policy, place, name, slot)));
    }

    /// Takes a host out.
    pub(super) fn remove(&mut self, place: &Place, name: &Arc<HostName>, slot: Slot) {
        let key = (place.steps, place.capacity);
        let Some(group) = self.groups.get_mut(&key) else {
            return;
        };
        let Ok(row) = group.vcpus.binary_search(&place.free.vcpus) else {
            return;
        };
        let entries = &mut group.rows[row];
        self.len -= usize::from(entries.remove(&Entry::new(self.policy, place, name, slot)));
        let most = match self.policy {
            Policy::Spread => entries.first(),
            Policy::Pack => entries.last(),
        };
        match most {
            Some(entry) => group.most[row] = Self::key(self.policy, entry.memory),
            None => {
                group.vcpus.remove(row);
                group.most.remove(row);
                group.rows.remove(row);
                if group.rows.is_empty() {
                    self.groups.remove(&key);
                }
            }
        }
    }

    /// Finds the best hosts that meet a request.
    pub(super) fn search<'a>(&'a self, ask: &Ask<'_>, engine: &'a Engine, best: &mut Best<'a>) {
        for ((steps, capacity), group) in &self.groups {
            if best.is_beyond(*steps, None, ask.floor) {
                return;
            }
            let mut search = Search {
                group,
                steps: *steps,
                capacity: *capacity,
                ask,
                engine,
                best: &mut *best,
            };
            match self.policy {
                Policy::Pack => search.pack(),
                Policy::Spread => search.spread(),
            }
        }
    }
}

impl Entry {
    fn new(policy: Policy, place: &Place, name: &Arc<HostName>, slot: Slot) -> Self {
        Self {
            memory: Index::key(policy, place.free.memory_mib),
            busy: place.busy,
            name: Some(name.clone()),
            slot,
        }
    }
}

/// A search within one group.
struct Search<'s, 'r, 'a> {
    group: &'a Group,
    steps: Steps,
    capacity: Size,
    ask: &'s Ask<'r>,
    engine: &'a Engine,
    best: &'s mut Best<'a>,
}

impl<'a> Search<'_, '_, 'a> {
    /// From the rows with the fewest processors on, until what is left of them is more than the best host has left in all.
    fn pack(&mut self) {
        let needed = self.ask.size.memory_mib;
        for row in self.first()..self.group.rows.len() {
            if self.group.most[row] < needed {
                continue;
            }
            if self.is_beyond(row, needed) {
                return;
            }
            self.visit(row);
        }
    }

    /// From the rows with the most processors on, until what is reserved of them is more than the best host has reserved of either. The
    /// row with the most memory goes first: where memory is what is short, it tells at once which others need not be looked at.
    fn spread(&mut self) {
        let first = self.first();
        let most = |row: &usize| self.group.most[*row];
        let Some(peak) = (first..self.group.rows.len()).max_by_key(most) else {
            return;
        };
        let peak_mib = most(&peak);
        if peak_mib < self.ask.size.memory_mib {
            return;
        }
        self.visit(peak);
        let mut least = self.least_memory();
        for row in (first..self.group.rows.len()).rev() {
            if row == peak || self.group.most[row] < least {
                continue;
            }
            if self.is_beyond(row, peak_mib) {
                return;
            }
            self.visit(row);
            least = self.least_memory();
        }
    }

    /// The first row with enough processors.
    fn first(&self) -> usize {
        let needed = self.ask.size.vcpus;
        self.group.vcpus.partition_point(|vcpus| *vcpus < needed)
    }

    /// Whether no host of a row, with so much memory, can be among the best.
    fn is_beyond(&self, row: usize, memory_mib: u64) -> bool {
        let vcpus = self.group.vcpus[row];
        let bound = self.at_least(Size { vcpus, memory_mib });
        self.best.is_beyond(self.steps, Some(bound), self.ask.floor)
    }

    fn at_least(&self, free: Size) -> Cost {
        Cost::at_least(self.engine.policy, self.ask.size, free, self.capacity)
    }

    /// To spread: free memory with less of which a host is not among the best.
    fn least_memory(&self) -> u64 {
        let floor = self.ask.floor;
        let worst = self.best.worst();
        let worst = worst.filter(|worst| worst.steps == self.steps && worst.against <= floor);
        let least = worst.map_or(0, |worst| worst.cost.least_free(self.capacity.memory_mib));
        self.ask.size.memory_mib.saturating_add(least)
    }

    /// Looks through a row as far as it may have better hosts.
    fn visit(&mut self, row: usize) {
        let needed = self.ask.size.memory_mib;
        let (vcpus, policy) = (self.group.vcpus[row], self.engine.policy);
        let from = Entry {
            memory: match policy {
                Policy::Spread => 0,
                Policy::Pack => Index::key(policy, needed),
            },
            busy: Busy::default(),
            name: None,
            slot: 0,
        };
        let group: &'a Group = self.group;
        for entry in group.rows[row].range(from..) {
            let memory_mib = Index::key(policy, entry.memory);
            if memory_mib < needed {
                return;
            }
            let free = Size { vcpus, memory_mib };
            let cost = self.at_least(free);
            if self.best.is_beyond(self.steps, Some(cost), self.ask.floor) {
                return;
            }
            let Some(name) = &entry.name else {
                continue;
            };
            let score = Score {
                against: self.ask.against(entry.slot, self.engine),
                steps: self.steps,
                cost: cost.with_worth(self.engine.rule(), self.ask.size, free, self.capacity),
                busy: entry.busy,
                host: name,
            };
            if self.best.would_take(&score) && self.ask.is_met_by(entry.slot, self.engine) {
                self.best.insert(score);
            }
        }
    }
}

/// The best hosts found so far.
#[derive(Debug)]
pub(super) struct Best<'a> {
    scores: Vec<Score<'a>>,
    few: usize,
}

impl<'a> Best<'a> {
    pub(super) fn new(few: usize) -> Self {
        Self {
            scores: Vec::with_capacity(few + 1),
            few,
        }
    }

    /// The worst of them, once there are enough.
    fn worst(&self) -> Option<&Score<'a>> {
        self.scores.get(self.few - 1)
    }

    /// Whether hosts of such steps, and from such a cost on where one is given, can only be worse; none goes less than `floor` against what
    /// is preferred.
    fn is_beyond(&self, steps: Steps, cost: Option<Cost>, floor: u32) -> bool {
        let worst = self.worst().filter(|worst| worst.against <= floor);
        worst.is_some_and(|worst| match cost {
            None => steps > worst.steps,
            Some(cost) => (steps, cost) > (worst.steps, worst.cost),
        })
    }

    fn would_take(&self, score: &Score<'_>) -> bool {
        self.worst().is_none_or(|worst| score < worst)
    }

    fn insert(&mut self, score: Score<'a>) {
        let at = self.scores.partition_point(|other| *other < score);
        self.scores.insert(at, score);
        self.scores.truncate(self.few);
    }

    pub(super) fn extend(&mut self, scores: impl IntoIterator<Item = Score<'a>>) {
        for score in scores {
            self.insert(score);
        }
    }

    /// Best first.
    pub(super) fn into_scores(self) -> Vec<Score<'a>> {
        self.scores
    }
}

#[cfg(test)]
impl Index {
    /// Where each host is, in words.
    pub(super) fn places(&self) -> Vec<String> {
        let mut places = Vec::new();
        for (key, group) in &self.groups {
            for ((vcpus, most), row) in group.vcpus.iter().zip(&group.most).zip(&group.rows) {
                let named = |entry: &Entry| {
                    format!(
                        "{key:?} {vcpus} {most} {} {:?} {:?}",
                        entry.memory, entry.busy, entry.name
                    )
                };
                places.extend(row.iter().map(named));
            }
        }
        places
    }
}
