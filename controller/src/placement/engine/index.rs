//! Hosts in the order in which a policy would take them, as far as that does not depend on the request.

use std::collections::{BTreeMap, VecDeque};

use super::{
    Engine, Slot,
    ask::Ask,
    host::{Host, Place},
};
use crate::placement::{
    policy::{Busy, Fit, Lead, Steps},
    score::{Cost, Score, Size},
};

/// Hosts with the same load, the same capacity and as many free processors: sorted, one after the other in memory. What comes and goes is
/// mostly near an end.
type Line = VecDeque<Entry>;

/// A host in its row. In the order of the score: memory, as [`Index::key`] has it, fine load, and the name, which is looked up.
#[derive(Debug, Clone, Copy)]
struct Entry {
    memory: u64,
    busy: Busy,
    slot: Slot,
}

/// Hosts with the same load and the same capacity: the rows that are not empty, by free processors.
#[derive(Debug, Default)]
struct Group {
    vcpus: Vec<u32>,
    /// The most free memory in each row, and the least: most rows are passed over by a look at these.
    most: Vec<u64>,
    least: Vec<u64>,
    rows: Vec<Line>,
}

/// Hosts of which a look at each, one after the other in memory, is quicker than any order: those of a rack, say. The small sites of the tests
/// have both.
const FEW: usize = if cfg!(test) { 4 } else { 64 };

/// One of few hosts. In the order of what a VM of no size would cost, which is about that of any: mostly the first that fits is the best.
#[derive(Debug)]
struct Near {
    rough: (Steps, Cost),
    place: Place,
    slot: Slot,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    fit: Fit,
    /// All hosts, while there are few; or none, once they are in groups.
    few: Vec<Near>,
    /// By load, capacity, and what they have at most of features and bridges.
    groups: BTreeMap<(Steps, Size, u64), Group>,
    len: usize,
}

impl Index {
    pub(super) fn new(fit: Fit) -> Self {
        Self {
            fit,
            few: Vec::new(),
            groups: BTreeMap::new(),
            len: 0,
        }
    }

    /// Hosts in it.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Memory as the rows have it, and back: the best first, which is the most to spread and the least to pack.
    fn key(fit: Fit, memory_mib: u64) -> u64 {
        match fit {
            Fit::Spread => u64::MAX - memory_mib,
            Fit::Pack => memory_mib,
        }
    }

    /// Enters a host that is not in it.
    pub(super) fn insert(&mut self, place: &Place, slot: Slot, hosts: &[Host]) {
        self.len += 1;
        if self.groups.is_empty() {
            let near = Near::new(self.fit, *place, slot);
            let at = self.few.partition_point(|other| other.rough < near.rough);
            self.few.insert(at, near);
            if self.few.len() > FEW {
                for near in std::mem::take(&mut self.few) {
                    self.enter(&near.place, near.slot, hosts);
                }
            }
        } else {
            self.enter(place, slot, hosts);
        }
    }

    /// Takes a host out that is in it.
    pub(super) fn remove(&mut self, place: &Place, slot: Slot, hosts: &[Host]) {
        self.len -= 1;
        if self.groups.is_empty() {
            self.few.retain(|other| other.slot != slot);
            return;
        }
        self.leave(place, slot, hosts);
        // Not at once, so that a host that comes and goes does not turn everything over each time.
        if self.len <= FEW / 2 {
            let rows = self.groups.values().flat_map(|group| &group.rows);
            let near = |entry: &Entry| {
                let place = hosts[entry.slot as usize].place?;
                Some(Near::new(self.fit, place, entry.slot))
            };
            self.few = rows.flatten().filter_map(near).collect();
            self.few.sort_by_key(|near| near.rough);
            self.groups.clear();
        }
    }

    /// Enters a host into its group.
    fn enter(&mut self, place: &Place, slot: Slot, hosts: &[Host]) {
        let key = (place.steps, place.capacity, place.traits_at_most);
        let group = self.groups.entry(key).or_default();
        let row = group.vcpus.partition_point(|vcpus| *vcpus < place.free.vcpus);
        if group.vcpus.get(row) != Some(&place.free.vcpus) {
            group.vcpus.insert(row, place.free.vcpus);
            group.most.insert(row, 0);
            group.least.insert(row, u64::MAX);
            group.rows.insert(row, Line::new());
        }
        group.most[row] = group.most[row].max(place.free.memory_mib);
        group.least[row] = group.least[row].min(place.free.memory_mib);
        let entry = Entry::new(self.fit, place, slot);
        if let Err(at) = entry.find(&group.rows[row], hosts) {
            group.rows[row].insert(at, entry);
        }
    }

    /// Takes a host out of its group.
    fn leave(&mut self, place: &Place, slot: Slot, hosts: &[Host]) {
        let key = (place.steps, place.capacity, place.traits_at_most);
        let Some(group) = self.groups.get_mut(&key) else {
            return;
        };
        let Ok(row) = group.vcpus.binary_search(&place.free.vcpus) else {
            return;
        };
        let line = &mut group.rows[row];
        if let Ok(at) = Entry::new(self.fit, place, slot).find(line, hosts) {
            line.remove(at);
        }
        match line.front().zip(line.back()) {
            Some((first, last)) => {
                let (first, last) = (
                    Self::key(self.fit, first.memory),
                    Self::key(self.fit, last.memory),
                );
                group.most[row] = first.max(last);
                group.least[row] = first.min(last);
            }
            None => {
                group.vcpus.remove(row);
                group.most.remove(row);
                group.least.remove(row);
                group.rows.remove(row);
                if group.rows.is_empty() {
                    self.groups.remove(&key);
                }
            }
        }
    }

    /// Finds the best hosts that meet a request.
    pub(super) fn search<'a>(&'a self, ask: &Ask<'_>, engine: &'a Engine, best: &mut Best<'a>) {
        let order = &engine.policy.order;
        for Near { place, slot, .. } in &self.few {
            let lead = order.lead(place.steps, ask.floor);
            if best.is_beyond(lead, None) {
                return;
            }
            let Size { vcpus, memory_mib } = place.free;
            let fits = ask.size.vcpus <= vcpus && ask.size.memory_mib <= memory_mib;
            if fits && ask.may_be_met_by(place.traits_at_most) {
                let cost = Cost::at_least(self.fit, ask.size, place.free, place.capacity);
                best.consider(place, (lead, cost), *slot, ask, engine);
            }
        }
        for ((steps, capacity, traits_at_most), group) in &self.groups {
            let lead = order.lead(*steps, ask.floor);
            if best.is_beyond(lead, None) {
                return;
            }
            if !ask.may_be_met_by(*traits_at_most) {
                continue;
            }
            let mut search = Search {
                group,
                steps: *steps,
                lead,
                capacity: *capacity,
                traits_at_most: *traits_at_most,
                ask,
                engine,
                best: &mut *best,
            };
            match self.fit {
                Fit::Pack => search.pack(),
                Fit::Spread => search.spread(),
            }
        }
    }
}

impl Near {
    fn new(fit: Fit, place: Place, slot: Slot) -> Self {
        let cost = Cost::at_least(fit, Size::default(), place.free, place.capacity);
        Self {
            rough: (place.steps, cost),
            place,
            slot,
        }
    }
}

impl Entry {
    fn new(fit: Fit, place: &Place, slot: Slot) -> Self {
        Self {
            memory: Index::key(fit, place.free.memory_mib),
            busy: place.busy,
            slot,
        }
    }

    /// Where it is in a line, or belongs.
    fn find(&self, line: &Line, hosts: &[Host]) -> Result<usize, usize> {
        let name = |slot: Slot| &hosts[slot as usize].name;
        line.binary_search_by(|other| {
            let numbers = (other.memory, other.busy).cmp(&(self.memory, self.busy));
            numbers.then_with(|| name(other.slot).cmp(name(self.slot)))
        })
    }
}

/// A search within one group.
struct Search<'s, 'r, 'a> {
    group: &'a Group,
    steps: Steps,
    /// None of its hosts comes before that.
    lead: Lead,
    capacity: Size,
    traits_at_most: u64,
    ask: &'s Ask<'r>,
    engine: &'a Engine,
    best: &'s mut Best<'a>,
}

impl<'a> Search<'_, '_, 'a> {
    /// From the rows with the fewest processors on, until what is left of them is more than the best host has left in all. What is free at most
    /// is reckoned only when there is a better host: a group has dozens of rows, and few of them are looked into.
    fn pack(&mut self) {
        let needed = self.ask.size.memory_mib;
        let mut at_most = self.most_free();
        for row in self.first()..self.group.rows.len() {
            if self.group.vcpus[row] > at_most.vcpus {
                return;
            }
            // A later row may have less memory left.
            let least = self.group.least[row];
            if self.group.most[row] < needed || least > at_most.memory_mib {
                continue;
            }
            if self.is_beyond(row, least.max(needed)) {
                continue;
            }
            self.visit(row);
            at_most = self.most_free();
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
        self.best.is_beyond(self.lead, Some(bound))
    }

    fn at_least(&self, free: Size) -> Cost {
        Cost::at_least(self.engine.policy.fit, self.ask.size, free, self.capacity)
    }

    /// To spread: free memory with less of which a host is not among the best.
    fn least_memory(&self) -> u64 {
        let worst = self.best.worst();
        let worst = worst.filter(|worst| worst.lead == self.lead);
        let least = worst.map_or(0, |worst| worst.cost.least_free(self.capacity.memory_mib));
        self.ask.size.memory_mib.saturating_add(least)
    }

    /// To pack: free processors and memory with more of either of which a host is not among the best.
    fn most_free(&self) -> Size {
        let worst = self.best.worst();
        let worst = worst.filter(|worst| worst.lead == self.lead);
        let left = worst.map(|worst| worst.cost.most_left(self.capacity));
        let left = left.unwrap_or(Size {
            vcpus: u32::MAX,
            memory_mib: u64::MAX,
        });
        Size {
            vcpus: left.vcpus.saturating_add(self.ask.size.vcpus),
            memory_mib: left.memory_mib.saturating_add(self.ask.size.memory_mib),
        }
    }

    /// Looks through a row as far as it may have better hosts.
    fn visit(&mut self, row: usize) {
        let needed = self.ask.size.memory_mib;
        let (vcpus, fit) = (self.group.vcpus[row], self.engine.policy.fit);
        let line = &self.group.rows[row];
        let mut at = match fit {
            Fit::Spread => 0,
            Fit::Pack => line.partition_point(|entry| entry.memory < needed),
        };
        while let Some(entry) = line.get(at) {
            let memory_mib = Index::key(fit, entry.memory);
            if memory_mib < needed {
                return;
            }
            let place = Place {
                steps: self.steps,
                capacity: self.capacity,
                free: Size { vcpus, memory_mib },
                busy: entry.busy,
                traits_at_most: self.traits_at_most,
            };
            let cost = self.at_least(place.free);
            if self.best.is_beyond(self.lead, Some(cost)) {
                return;
            }
            let possible = self
                .best
                .consider(&place, (self.lead, cost), entry.slot, self.ask, self.engine);
            at += 1;
            // Later ones with as much memory cost the same, and are busier or come later by name.
            if !possible && line.get(at).is_some_and(|next| next.memory == entry.memory) {
                at = line.partition_point(|other| other.memory <= entry.memory);
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

    /// Whether hosts of which none comes before this lead, and from such a cost on where one is given, can only be worse.
    fn is_beyond(&self, lead: Lead, cost: Option<Cost>) -> bool {
        self.worst().is_some_and(|worst| match cost {
            None => lead > worst.lead,
            Some(cost) => (lead, cost) > (worst.lead, worst.cost),
        })
    }

    /// Takes a host that has the room, if it meets the request and is better than one of these; lead and cost are the least that they can be. Gives
    /// whether it could have been, had it met the request, gone as little against what is preferred as any, and had as many of its images.
    fn consider(
        &mut self,
        place: &Place,
        (lead, cost): (Lead, Cost),
        slot: Slot,
        ask: &Ask<'_>,
        engine: &'a Engine,
    ) -> bool {
        let cost = cost.with_worth(engine.rule(), ask.size, place.free, place.capacity);
        let order = &engine.policy.order;
        let busy = order.tail(place.busy, ask.images_missing);
        // Mostly that settles it, without a look at the host.
        let numbers = |worst: &Score<'_>| (worst.lead, worst.cost, worst.busy);
        if self
            .worst()
            .is_some_and(|worst| (lead, cost, busy) > numbers(worst))
        {
            return false;
        }
        let host = &*engine.hosts[slot as usize].name;
        let least = Score {
            lead,
            cost,
            busy,
            host,
        };
        if !self.would_take(&least) {
            return false;
        }
        // Those were looked at before.
        if ask.near.binary_search(&slot).is_err() && ask.is_met_by(slot, engine) {
            let score = Score {
                lead: order.lead(place.steps, ask.against(slot, engine)),
                busy: order.tail(place.busy, ask.images_missing(slot, engine)),
                ..least
            };
            if self.would_take(&score) {
                self.insert(score);
            }
        }
        true
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
    pub(super) fn places(&self, hosts: &[Host]) -> Vec<String> {
        let named = |place: &Place, slot: Slot| format!("{place:?} {:?}", hosts[slot as usize].name);
        let mut places: Vec<_> = self
            .few
            .iter()
            .map(|near| named(&near.place, near.slot))
            .collect();
        for ((steps, capacity, traits_at_most), group) in &self.groups {
            for (at, row) in group.rows.iter().enumerate() {
                let (vcpus, free) = (group.vcpus[at], |entry: &Entry| Self::key(self.fit, entry.memory));
                assert_eq!(row.iter().map(free).max(), Some(group.most[at]));
                assert_eq!(row.iter().map(free).min(), Some(group.least[at]));
                places.extend(row.iter().map(|entry| {
                    let place = Place {
                        steps: *steps,
                        capacity: *capacity,
                        free: Size {
                            vcpus,
                            memory_mib: free(entry),
                        },
                        busy: entry.busy,
                        traits_at_most: *traits_at_most,
                    };
                    named(&place, entry.slot)
                }));
            }
        }
        assert_eq!(places.len(), self.len);
        places.sort();
        places
    }
}
