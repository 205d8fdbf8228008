//! A request as the engine tests it on one host: the tests of `filter`, without words.
//!
//! What the order of the index has decided already (room for processors and memory, ready, not cordoned, not pressed, not full) is not tested again.

use std::collections::HashMap;

use dalgu_proto::{
    ids::HostName,
    placement::{Group, Rule},
    vm::Nic,
};
use imbl::OrdSet;

use super::{
    Engine, Slot,
    host::{Host, Row, Traits},
    index::Index,
};
use crate::{
    model::matches,
    placement::{Members, Request, score::Size, spare::Step, view::images_told_apart},
};

/// Whether a host passes the tests that only the host itself tells.
pub(super) type Look<'a> = &'a dyn Fn(&HostName) -> bool;

/// See the module.
pub(super) struct Ask<'a> {
    request: &'a Request,
    pub(super) size: Size,
    /// The only hosts that can take it, where there are but few.
    pub(super) only: Option<Vec<Slot>>,
    /// Features and bridges that it needs.
    traits: u64,
    /// Numbers of the pools that its disks are on, and the room they need there.
    pools: Vec<(u32, u64)>,
    /// Numbers of the pools that they are made from.
    sources: Vec<u32>,
    /// The host that it leaves.
    exclude: Option<Slot>,
    /// It asks for what no row has: an accelerator, several labels, or a bridge without a bit.
    by_name: bool,
    /// It asks for what is tested on the host itself.
    look: Option<Look<'a>>,
    /// A group refuses hosts.
    grouped: bool,
    /// Hosts may go against what is only preferred.
    prefers: bool,
    /// None goes less against it than that.
    pub(super) floor: u32,
    /// Hosts that have one of its images, where they are few: they are looked at first, and by themselves.
    pub(super) near: Vec<Slot>,
    /// None of the others has to fetch fewer of them.
    pub(super) images_missing: u8,
}

impl<'a> Ask<'a> {
    /// Prepares a request; `None` where no host at all can take it.
    pub(super) fn new(request: &'a Request, engine: &Engine, look: Look<'a>) -> Option<Self> {
        let bound = request.needs.volumes.values();
        let mut named = request
            .host
            .iter()
            .chain(bound.filter_map(|volume| volume.host.as_ref()));
        let only = named.next();
        if named.any(|other| Some(other) != only) {
            return None;
        }
        let only = match only {
            Some(host) => Some(vec![*engine.slots.get(host)?]),
            None => together(request, engine),
        };
        let number = |name: &str| engine.names.pools.id(name);
        let disks = request.pools().map(|(name, mib)| Some((number(name)?, mib)));
        let sources = request.needs.pools.iter().map(|name| number(name));
        let features = request
            .spec
            .features()
            .chain(request.needs.features.iter().copied());
        let mut traits = features.fold(0, |bits, feature| bits | Traits::feature(feature));
        // One label is tested by the choice of the index, unless there is but one host.
        let mut by_name = request.accelerator.is_some()
            || request.spec.host_selector.len() > 1
            || ((only.is_some() || pins(request).next().is_some()) && !request.spec.host_selector.is_empty());
        for bridge in bridges(request) {
            match engine.names.traits.bridge(bridge) {
                Some(bit) => traits |= bit,
                None => by_name = true,
            }
        }
        let (near, images_missing) = holders(request, engine);
        Some(Self {
            request,
            size: Size::of(request),
            only,
            traits,
            pools: disks.collect::<Option<_>>()?,
            sources: sources.collect::<Option<_>>()?,
            exclude: request
                .exclude
                .as_ref()
                .and_then(|host| engine.slots.get(host).copied()),
            by_name,
            look: request.is_particular().then_some(look),
            grouped: request.rules.required().next().is_some(),
            prefers: engine.softly_tainted > 0 || request.rules.preferred().next().is_some(),
            floor: floor(request, engine),
            near,
            images_missing,
        })
    }

    /// Whether hosts that have no more than these features and bridges may pass.
    pub(super) fn may_be_met_by(&self, traits_at_most: u64) -> bool {
        self.traits & !traits_at_most == 0
    }

    /// Whether a host passes the tests.
    pub(super) fn is_met_by(&self, slot: Slot, engine: &Engine) -> bool {
        let row = &engine.rows[slot as usize];
        self.traits & !row.traits == 0
            && self.size.vcpus <= row.cpus
            && self.exclude != Some(slot)
            && self.has_room(row, engine)
            && (!self.by_name || self.is_met_by_name(&engine.hosts[slot as usize]))
            && (!(self.grouped || row.tainted) || self.is_let_in(&engine.hosts[slot as usize]))
            && self
                .look
                .is_none_or(|look| look(&engine.hosts[slot as usize].name))
            && self.keeps_room(slot, engine)
    }

    /// Whether room is kept for protected domains when it comes there.
    fn keeps_room(&self, slot: Slot, engine: &Engine) -> bool {
        let kept = engine.kept.as_ref().filter(|_| !self.request.ignore_protection);
        let source = self.exclude.map(|source| source as usize);
        kept.is_none_or(|(_, spare)| {
            source.is_some_and(|source| spare.is_left(source))
                || spare.allows(Step {
                    leaves: source.map(|source| (source, self.size)),
                    comes: (slot as usize, self.size),
                })
        })
    }

    /// How many of its images a host would have to fetch.
    pub(super) fn images_missing(&self, slot: Slot, engine: &Engine) -> u8 {
        self.request.images_missing(&engine.hosts[slot as usize].name)
    }

    /// Whether a host has the labels by which the index is chosen, which is no other test.
    pub(super) fn is_labelled(&self, slot: Slot, engine: &Engine) -> bool {
        let labels = &engine.hosts[slot as usize].kind.labels;
        matches(labels, &self.request.spec.host_selector)
    }

    /// How much a host goes against what is only preferred.
    pub(super) fn against(&self, slot: Slot, engine: &Engine) -> u32 {
        if !self.prefers {
            return 0;
        }
        let Host { name, kind, .. } = &engine.hosts[slot as usize];
        self.request.rules.against(name, &kind.labels, &kind.taints)
    }

    /// Whether neither a group nor a taint keeps it away.
    fn is_let_in(&self, host: &Host) -> bool {
        let (rules, kind) = (&self.request.rules, &*host.kind);
        rules.repelled(&kind.taints, false).next().is_none()
            && rules
                .required()
                .all(|members| members.holds(&host.name, &kind.labels))
    }

    fn has_room(&self, row: &Row, engine: &Engine) -> bool {
        let works = |id: &u32| row.pool(*id).is_some_and(|pool| !pool.broken);
        let has_room = |(id, needed): &(u32, u64)| {
            row.pool(*id).is_some_and(|pool| {
                // The files of a VM that moves are there already where both hosts see them.
                let there_already = self.request.is_migration() && pool.shared;
                !pool.broken && (there_already || *needed <= pool.free_mib(&engine.names.pools))
            })
        };
        self.pools.iter().all(has_room) && self.sources.iter().all(works)
    }

    fn is_met_by_name(&self, host: &Host) -> bool {
        let (request, kind) = (self.request, &*host.kind);
        let accelerator = request.accelerator.as_ref();
        let bridged = |bridge| kind.bridges.iter().any(|there| there == bridge);
        accelerator.is_none_or(|needed| *needed == kind.accelerator)
            && matches(&kind.labels, &request.spec.host_selector)
            && bridges(request).all(bridged)
    }
}

/// The hosts that have members with which it stays on one host; `None` where no group says so.
fn together(request: &Request, engine: &Engine) -> Option<Vec<Slot>> {
    let groups = request.rules.required();
    let mut bound = groups.filter(|members| {
        let Group {
            rule, topology_key, ..
        } = &members.group;
        *rule == Rule::Affinity && topology_key.is_none() && members.others > 0
    });
    let hosts = bound.next()?.domains.keys();
    let slot = |host: &String| engine.slots.get(&host.parse::<HostName>().ok()?).copied();
    Some(hosts.filter_map(slot).collect())
}

/// Labels that a host must have because members with which it stays in one domain are there.
pub(super) fn pins(request: &Request) -> impl Iterator<Item = (&String, &String)> {
    let affinity = |members: &&Members| members.group.rule == Rule::Affinity;
    let groups = request.rules.required().filter(affinity);
    groups.filter_map(|members| {
        let mut domains = members.domains.keys();
        let pin = (members.group.topology_key.as_ref()?, domains.next()?);
        domains.next().is_none().then_some(pin)
    })
}

/// So many hosts with the images are looked at by themselves, a microsecond or so each. Where there are more, one of them is soon met if they are like the other hosts;
/// if they are all fuller than these, as they may be under `spread`, every host that is as good as the best one is looked at, at worst the whole site.
const HOLDERS: usize = if cfg!(test) { 3 } else { 512 };

/// Hosts that have some of a VM's images, in the order of their slots, where they are few; and how many images all others have to fetch at least. Were they
/// looked for among hosts that are as good otherwise, all of these would be looked at where none of them has one.
fn holders(request: &Request, engine: &Engine) -> (Vec<Slot>, u8) {
    let images = &request.needs.images;
    if images.iter().map(OrdSet::len).sum::<usize>() > HOLDERS {
        return (Vec::new(), 0);
    }
    let there = images.iter().flatten();
    let mut near: Vec<_> = there.filter_map(|host| engine.slots.get(host).copied()).collect();
    near.sort_unstable();
    near.dedup();
    (near, images_told_apart(images.len()))
}

/// No host goes less against what is only preferred.
fn floor(request: &Request, engine: &Engine) -> u32 {
    let least = |members: &Members| match &members.group.topology_key {
        // Where nobody is, an anti-affinity holds; most sites have more hosts than groups have members.
        None => {
            let domains = members.domains.keys();
            let there = domains.map(|domain| members.against_in(domain)).min();
            match members.group.rule {
                Rule::Affinity => there.unwrap_or(members.others),
                Rule::AntiAffinity => 0,
            }
        }
        Some(key) => engine
            .labels
            .get(key)
            .map_or(members.others, |values| least_of(members, values)),
    };
    request.rules.preferred().map(least).fold(0, u32::saturating_add)
}

/// No domain among those that hosts are of goes less against a group. A site may have thousands of them: looks at no more than have members.
fn least_of(members: &Members, values: &HashMap<String, Index>) -> u32 {
    let held = &members.domains;
    let least = match members.group.rule {
        // In one of them nobody is.
        Rule::AntiAffinity if values.len() > held.len() => Some(0),
        Rule::AntiAffinity => values.keys().map(|domain| members.against_in(domain)).min(),
        Rule::Affinity => {
            let there = held.keys().filter(|domain| values.contains_key(*domain));
            there.map(|domain| members.against_in(domain)).min()
        }
    };
    least.unwrap_or(members.others)
}

fn bridges(request: &Request) -> impl Iterator<Item = &str> {
    let needed = request.needs.bridges.iter().map(String::as_str);
    request.spec.nics.iter().filter_map(Nic::bridge).chain(needed)
}
