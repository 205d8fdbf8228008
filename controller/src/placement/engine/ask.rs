//! A request as the engine tests it on one host: the tests of `filter`, without words.
//!
//! What the order of the index has decided already (room for processors and memory, ready, not cordoned) is not tested again.

use dalgu_proto::{ids::HostName, vm::Nic};

use super::{
    Engine, Slot,
    host::{Host, Row, Traits},
};
use crate::placement::{Request, score::Size};

/// See the module.
#[derive(Debug)]
pub(super) struct Ask<'a> {
    request: &'a Request,
    pub(super) size: Size,
    /// The only host that can take it, where there is but one.
    pub(super) only: Option<&'a HostName>,
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
}

impl<'a> Ask<'a> {
    /// Prepares a request; `None` where no host at all can take it.
    pub(super) fn new(request: &'a Request, engine: &Engine) -> Option<Self> {
        let bound = request.needs.volumes.values();
        let mut named = request
            .host
            .iter()
            .chain(bound.filter_map(|volume| volume.host.as_ref()));
        let only = named.next();
        if named.any(|other| Some(other) != only) {
            return None;
        }
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
            || (only.is_some() && !request.spec.host_selector.is_empty());
        for bridge in bridges(request) {
            match engine.names.traits.bridge(bridge) {
                Some(bit) => traits |= bit,
                None => by_name = true,
            }
        }
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
        })
    }

    /// Whether a host passes the tests.
    pub(super) fn is_met_by(&self, slot: Slot, engine: &Engine) -> bool {
        let row = &engine.rows[slot as usize];
        self.traits & !row.traits == 0
            && self.size.vcpus <= row.cpus
            && self.exclude != Some(slot)
            && self.has_room(row, engine)
            && (!self.by_name || self.is_met_by_name(&engine.hosts[slot as usize]))
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
            && (request.spec.host_selector.iter()).all(|(key, value)| kind.labels.get(key) == Some(value))
            && bridges(request).all(bridged)
    }
}

fn bridges(request: &Request) -> impl Iterator<Item = &str> {
    let needed = request.needs.bridges.iter().map(String::as_str);
    request.spec.nics.iter().filter_map(Nic::bridge).chain(needed)
}
