//! The same answer as the plain scan, without looking at every host.
//!
//! [`Engine`] is told of each host that has changed, and keeps what decides in dense rows and in an order in which the best
//! host comes early. A request goes along that order, tests those that it meets in full, and stops where no later one can be
//! better. Who it serves is the controller's one writer (`state::fleet` keeps it up to date) and the benchmark.
//!
//! ```text
//!   labels ─┐                                    one Index of all hosts, and one of the hosts with each label
//!           ├─> Index ─> group ─> row ─> entry
//!   all ────┘            │        │      └ free memory, fine load, name: in order of the cost
//!                        │        └ free virtual processors
//!                        └ steps of the load, capacity, features and bridges
//! ```
//!
//! But for what is only preferred, a score begins with the steps of the load that the policy has there, and goes on with a cost that follows from what is
//! free of which capacity; so groups come in the order of the score, and rows and entries of one group in the order of the cost. What else a host must
//! have (pools, bridges, features, groups, ...) is tested at the entries, in [`ask`]; what few requests ask for (processors, nodes
//! and huge pages of their own, bandwidth), on the host itself. What is only preferred comes before the cost and is
//! in no index: a search goes on until what it has goes as little against that as any host can. Which images a host has comes last of
//! all; where few have one, these are looked at first. The plain scan ([`super::decide`]) stays: it is the oracle of the property tests,
//! and what explains a refusal.
//!
//! Must not: read a clock, or differ from the scan in any answer.

mod ask;
mod host;
mod index;

#[cfg(test)]
mod properties;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use dalgu_proto::ids::HostName;

use self::{
    ask::Ask,
    host::{Host, Kind, Names, Place, Row},
    index::{Best, Index},
};
use super::{
    Decision, HostView, Policy, Protect, Request, Rule, Size, Spare, Worth, chosen, decide_keeping, filter,
    refusal,
    score::{Cost, Score},
    spare::{self, Short, Step},
};

/// Place of a host in the rows.
type Slot = u32;

/// Hosts, ready for decisions by one policy.
#[derive(Debug)]
pub struct Engine {
    policy: Policy,
    worth: Option<Arc<Worth>>,
    slots: HashMap<HostName, Slot>,
    hosts: Vec<Host>,
    /// By slot too.
    rows: Vec<Row>,
    /// Kinds that hosts have, or had not long ago.
    kinds: BTreeSet<Arc<Kind>>,
    names: Names,
    all: Index,
    labels: HashMap<String, HashMap<String, Index>>,
    /// Hosts with taints that only make them worse.
    softly_tainted: usize,
    /// What is protected, and the room that is kept for it, by slot.
    kept: Option<(Arc<Protect>, Spare)>,
}

impl Engine {
    /// Without hosts.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            worth: None,
            slots: HashMap::new(),
            hosts: Vec::new(),
            rows: Vec::new(),
            kinds: BTreeSet::new(),
            names: Names::default(),
            all: Index::new(policy.fit),
            labels: HashMap::new(),
            softly_tainted: 0,
            kept: None,
        }
    }

    /// Without hosts, keeping room for these domains.
    pub fn protecting(policy: Policy, protect: &Arc<Protect>) -> Self {
        Self {
            kept: (!protect.is_empty()).then(|| (protect.clone(), Spare::default())),
            ..Self::new(policy)
        }
    }

    /// Whether it keeps room for these.
    pub fn protects(&self, protect: &Protect) -> bool {
        let kept = self.kept.as_ref().map(|(kept, _)| &**kept);
        kept.map_or(protect.is_empty(), |kept| kept == protect)
    }

    /// Whether room is kept when a VM of a host becomes larger.
    pub fn may_grow(&self, host: &HostName, from: Size, to: Size) -> Result<(), Short<'_>> {
        match (&self.kept, self.slots.get(host)) {
            (Some((_, spare)), Some(slot)) => spare.check(Step {
                leaves: Some((*slot as usize, from)),
                comes: (*slot as usize, to),
            }),
            _ => Ok(()),
        }
    }

    /// How it decides.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// From now on, goes by these prices, or by none.
    pub fn price(&mut self, worth: Option<&Arc<Worth>>) {
        self.worth = worth.cloned();
    }

    fn rule(&self) -> Rule<'_> {
        Rule {
            policy: self.policy,
            worth: self.worth.as_deref(),
            protect: self.kept.as_ref().map(|(protect, _)| &**protect),
        }
    }

    /// Hosts it knows.
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Takes over what is now true of a host, known or new.
    pub fn set(&mut self, view: &HostView<'_>) {
        let row = Row::new(view, &mut self.names);
        let traits_at_most = self.names.traits.class(row.traits);
        let Some(slot) = self.slots.get(&view.name).copied() else {
            let host = Host::new(
                Arc::new(view.name.clone()),
                self.kind(view),
                view,
                &self.policy.order,
                traits_at_most,
            );
            let slot = Slot::try_from(self.hosts.len()).expect("fewer hosts than 2^32");
            self.softly_tainted += usize::from(host.kind.is_softly_tainted());
            self.hosts.push(host);
            self.rows.push(row);
            self.slots.insert(view.name.clone(), slot);
            self.reindex(slot, true);
            self.keep(slot, view);
            return;
        };
        let before = &self.hosts[slot as usize];
        let (name, before_kind) = (before.name.clone(), before.kind.clone());
        let kind = match before_kind.is_of(view) {
            true => before_kind.clone(),
            false => self.kind(view),
        };
        self.softly_tainted += usize::from(kind.is_softly_tainted());
        self.softly_tainted -= usize::from(before_kind.is_softly_tainted());
        let host = Host::new(name, kind, view, &self.policy.order, traits_at_most);
        if !self.hosts[slot as usize].is_indexed_as(&host) {
            self.reindex(slot, false);
            self.hosts[slot as usize] = host;
            self.reindex(slot, true);
        }
        self.rows[slot as usize] = row;
        self.keep(slot, view);
    }

    fn keep(&mut self, slot: Slot, view: &HostView<'_>) {
        if let Some((protect, spare)) = &mut self.kept {
            spare.set(slot as usize, spare::Row::of(view, protect));
        }
    }

    /// Forgets a host.
    pub fn remove(&mut self, name: &HostName) {
        let Some(slot) = self.slots.remove(name) else {
            return;
        };
        self.reindex(slot, false);
        self.softly_tainted -= usize::from(self.hosts[slot as usize].kind.is_softly_tainted());
        let last = Slot::try_from(self.hosts.len() - 1).expect("as many as have slots");
        if last != slot {
            self.reindex(last, false);
        }
        self.hosts.swap_remove(slot as usize);
        self.rows.swap_remove(slot as usize);
        if let Some((_, spare)) = &mut self.kept {
            spare.swap_remove(slot as usize);
        }
        if last != slot {
            let moved = HostName::clone(&self.hosts[slot as usize].name);
            self.slots.insert(moved, slot);
            self.reindex(slot, true);
        }
    }

    /// Takes over what is promised in each shared pool that hosts have, which is the same for all of them.
    pub fn promise(&mut self, promised: impl Fn(&str) -> u64) {
        self.names.pools.promise(promised);
    }

    /// The host that is best for a request; `None` where none can take it. As [`super::decide`] would choose. `view` gives a host as it is
    /// now, for what few requests ask for.
    pub fn choose<'v>(
        &self,
        request: &Request,
        view: impl Fn(&HostName) -> Option<HostView<'v>>,
    ) -> Option<&HostName> {
        self.best(request, 1, view).first().map(|score| score.host)
    }

    /// As [`decide_keeping`] decides over `views`, which are asked for, in the order of the names, only where every host is to be explained: on a
    /// site of few hosts, and for a refusal. `view` as in [`Engine::choose`].
    pub fn decide<'v, I: Iterator<Item = HostView<'v>>>(
        &self,
        request: &Request,
        kept: usize,
        views: impl Fn() -> I,
        view: impl Fn(&HostName) -> Option<HostView<'v>>,
    ) -> Decision {
        let kept = kept.max(2);
        if self.len() <= kept {
            return decide_keeping(request, &views().collect::<Vec<_>>(), self.rule(), kept);
        }
        let best = self.best(request, kept, &view);
        if best.is_empty() {
            let each = |look: &mut dyn FnMut(&HostView<'_>)| views().for_each(|view| look(&view));
            return refusal(request, &each, &view, self.rule().protect);
        }
        chosen(request, &best, self.policy, None, self.len())
    }

    /// The best few hosts for a request, best first.
    fn best<'v>(
        &self,
        request: &Request,
        few: usize,
        view: impl Fn(&HostName) -> Option<HostView<'v>>,
    ) -> Vec<Score<'_>> {
        let mut best = Best::new(few);
        let look = |host: &HostName| {
            view(host).is_some_and(|view| {
                let mut lacks = Vec::new();
                filter::particular(request, &view, &mut lacks);
                lacks.is_empty()
            })
        };
        if let Some(ask) = Ask::new(request, self, &look) {
            match &ask.only {
                Some(slots) => best.extend(slots.iter().filter_map(|slot| self.score(*slot, &ask))),
                None => {
                    let near = ask.near.iter().filter(|slot| ask.is_labelled(**slot, self));
                    best.extend(near.filter_map(|slot| self.score(*slot, &ask)));
                    if let Some(index) = self.smallest(request) {
                        index.search(&ask, self, &mut best);
                    }
                }
            }
        }
        best.into_scores()
    }

    /// The score of one host, if it can take the VM.
    fn score(&self, slot: Slot, ask: &Ask<'_>) -> Option<Score<'_>> {
        let host = &self.hosts[slot as usize];
        let Place {
            steps,
            capacity,
            free,
            busy,
            traits_at_most: _,
        } = host.place?;
        let fits = ask.size.vcpus <= free.vcpus && ask.size.memory_mib <= free.memory_mib;
        (fits && ask.is_met_by(slot, self)).then(|| Score {
            lead: self.policy.order.lead(steps, ask.against(slot, self)),
            cost: Cost::of(self.rule(), ask.size, free, capacity),
            busy: self.policy.order.tail(busy, ask.images_missing(slot, self)),
            host: &host.name,
        })
    }

    /// The index with the fewest hosts that has all those that a request's labels allow; `None` where no host has one of these.
    fn smallest(&self, request: &Request) -> Option<&Index> {
        let mut smallest = &self.all;
        for (key, value) in request.spec.host_selector.iter().chain(ask::pins(request)) {
            let index = self.labels.get(key)?.get(value)?;
            if index.len() < smallest.len() {
                smallest = index;
            }
        }
        Some(smallest)
    }

    /// The kind of a host, shared by all that are alike.
    fn kind(&mut self, view: &HostView<'_>) -> Arc<Kind> {
        let kind = Kind::of(view);
        if let Some(known) = self.kinds.get(&kind) {
            return known.clone();
        }
        // New kinds come when hosts are changed, which is seldom: a good time to forget those that no host is of any more.
        self.kinds.retain(|kind| Arc::strong_count(kind) > 1);
        let kind = Arc::new(kind);
        self.kinds.insert(kind.clone());
        kind
    }

    /// Enters a host into the indices that it belongs to, or takes it out of them.
    fn reindex(&mut self, slot: Slot, add: bool) {
        let host = &self.hosts[slot as usize];
        let Some(place) = &host.place else {
            return;
        };
        match add {
            true => self.all.insert(place, slot, &self.hosts),
            false => self.all.remove(place, slot, &self.hosts),
        }
        for (key, value) in &host.kind.labels {
            if add && !self.labels.contains_key(key) {
                self.labels.insert(key.clone(), HashMap::new());
            }
            let Some(values) = self.labels.get_mut(key) else {
                continue;
            };
            if add && !values.contains_key(value) {
                values.insert(value.clone(), Index::new(self.policy.fit));
            }
            let Some(index) = values.get_mut(value) else {
                continue;
            };
            match add {
                true => index.insert(place, slot, &self.hosts),
                false => index.remove(place, slot, &self.hosts),
            }
            if index.len() == 0 {
                values.remove(value);
                if values.is_empty() {
                    self.labels.remove(key);
                }
            }
        }
    }
}

#[cfg(test)]
impl Engine {
    /// An engine that gives names the same numbers, and knows no host yet.
    pub(crate) fn without_hosts(&self) -> Self {
        Self {
            names: self.names.clone(),
            kept: self
                .kept
                .as_ref()
                .map(|(protect, _)| (protect.clone(), Spare::default())),
            ..Self::new(self.policy)
        }
    }

    /// Whether both know the same of the same hosts, and have them at the same places.
    pub(crate) fn knows_as(&self, other: &Self) -> bool {
        let known = |engine: &Self, name: &HostName| {
            let slot = engine.slots.get(name).map(|slot| *slot as usize);
            slot.map(|slot| format!("{:?} {:?}", engine.hosts[slot], engine.rows[slot]))
        };
        let places = |engine: &Self| {
            let labels = engine.labels.iter().flat_map(|(key, values)| {
                values
                    .iter()
                    .map(move |(value, index)| ((key.clone(), value.clone()), index.places(&engine.hosts)))
            });
            (
                engine.all.places(&engine.hosts),
                labels.collect::<std::collections::BTreeMap<_, _>>(),
            )
        };
        let kept = |engine: &Self| engine.kept.as_ref().map(|(_, spare)| spare.image());
        self.len() == other.len()
            && kept(self) == kept(other)
            && self
                .slots
                .keys()
                .all(|name| known(self, name) == known(other, name))
            && places(self) == places(other)
    }
}
