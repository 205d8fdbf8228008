//! What the engine keeps of a host: what most searches test, close together ([`Row`]); and the rest, of which what many have in common is
//! kept once ([`Kind`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use dalgu_proto::{host::GuestFeature, ids::HostName, placement::Taint};

use crate::placement::{
    HostView, PoolView,
    policy::{Busy, Order, Steps},
    score::{Load, Size},
};

/// What hosts are like, whatever runs there. Few of a site differ in it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) taints: BTreeSet<Taint>,
    pub(super) bridges: Vec<String>,
    pub(super) accelerator: String,
}

impl Kind {
    /// Whether it has taints that only make it worse.
    pub(super) fn is_softly_tainted(&self) -> bool {
        self.taints.iter().any(|taint| taint.soft)
    }

    pub(super) fn of(view: &HostView<'_>) -> Self {
        Self {
            labels: view.labels.clone().into_owned(),
            taints: view.taints.clone().into_owned(),
            bridges: view.bridges.clone().into_owned(),
            accelerator: view.accelerator.clone().into_owned(),
        }
    }

    /// Whether a host is of this kind.
    pub(super) fn is_of(&self, view: &HostView<'_>) -> bool {
        self.labels == *view.labels
            && self.taints == *view.taints
            && self.bridges == *view.bridges
            && self.accelerator == view.accelerator
    }
}

/// What the score and the order of the index follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) steps: Steps,
    pub(super) capacity: Size,
    pub(super) free: Size,
    pub(super) busy: Busy,
    /// Features and bridges that it has; all there are, where [`Traits::class`] does not tell hosts like it from others.
    pub(super) traits_at_most: u64,
}

/// A host: what an update compares, and few searches look at.
#[derive(Debug, PartialEq)]
pub(super) struct Host {
    pub(super) name: Arc<HostName>,
    pub(super) kind: Arc<Kind>,
    /// `None` where it is closed: not ready, cordoned, by its load, or as it has as many VMs as it takes.
    pub(super) place: Option<Place>,
}

impl Host {
    pub(super) fn new(
        name: Arc<HostName>,
        kind: Arc<Kind>,
        view: &HostView<'_>,
        order: &Order,
        traits_at_most: u64,
    ) -> Self {
        let open = view.ready && !view.cordoned && !view.pressed && !view.is_full();
        let place = open.then(|| {
            let Load { steps, busy } = Load::of(order, view);
            Place {
                steps,
                capacity: Size::capacity(view),
                free: Size::free(view),
                busy,
                traits_at_most,
            }
        });
        Self { name, kind, place }
    }

    /// Whether the other one has the same places in the indices.
    pub(super) fn is_indexed_as(&self, other: &Self) -> bool {
        self.place == other.place && Arc::ptr_eq(&self.kind, &other.kind)
    }
}

/// What nearly every search tests of a host: one line of the processor's cache, where it has no more than [`NEAR`] pools.
#[derive(Debug, PartialEq)]
#[repr(align(64))]
pub(super) struct Row {
    /// Features and bridges that it has, see [`Traits`].
    pub(super) traits: u64,
    pub(super) cpus: u32,
    /// It has taints that refuse VMs.
    pub(super) tainted: bool,
    near: [Pool; NEAR],
    far: Option<Box<[Pool]>>,
}

/// Pools in a row itself.
const NEAR: usize = 1;

impl Row {
    pub(super) fn new(view: &HostView<'_>, names: &mut Names) -> Self {
        let mut pools = view.pools.iter().map(|pool| names.pools.of(pool));
        let near = std::array::from_fn(|_| pools.next().unwrap_or_default());
        let far: Box<[Pool]> = pools.collect();
        Self {
            traits: names.traits.of(view),
            cpus: view.cpus,
            tainted: view.taints.iter().any(|taint| !taint.soft),
            near,
            far: (!far.is_empty()).then_some(far),
        }
    }

    /// Its pool of that number.
    pub(super) fn pool(&self, id: u32) -> Option<&Pool> {
        let far = self.far.iter().flatten();
        self.near.iter().chain(far).find(|pool| pool.id == id)
    }
}

/// Names that hosts and requests have, as numbers.
#[derive(Debug, Default, Clone)]
pub(super) struct Names {
    pub(super) pools: Pools,
    pub(super) traits: Traits,
}

/// Features and bridges as one bit each. A site has few bridges; those that find no bit any more are tested by their names.
#[derive(Debug, Default, Clone)]
pub(super) struct Traits {
    bridges: HashMap<String, u32>,
    /// Sets of them that the index keeps apart.
    classes: Vec<u64>,
}

/// So many sets are kept apart: each is looked at for each decision. The small sites of the tests have more.
const CLASSES: usize = if cfg!(test) { 2 } else { 16 };

/// Bits of features; the others are of bridges.
const FEATURES: u32 = 32;

impl Traits {
    fn of(&mut self, view: &HostView<'_>) -> u64 {
        let features = view.guest_features.iter().map(|feature| Self::feature(*feature));
        let mut bits = features.fold(0, |bits, bit| bits | bit);
        for bridge in view.bridges.iter() {
            if !self.bridges.contains_key(bridge) {
                let number = FEATURES + u32::try_from(self.bridges.len()).unwrap_or(u32::MAX - FEATURES);
                self.bridges.insert(bridge.clone(), number);
            }
            bits |= self.bridge(bridge).unwrap_or(0);
        }
        bits
    }

    /// The set, if it is one of those that the index keeps apart, so that nobody looks at hosts that lack what is asked for; and for all
    /// others what any of them may have.
    pub(super) fn class(&mut self, traits: u64) -> u64 {
        if self.classes.contains(&traits) {
            return traits;
        }
        if self.classes.len() < CLASSES {
            self.classes.push(traits);
            return traits;
        }
        u64::MAX
    }

    /// The bit of a feature.
    pub(super) fn feature(feature: GuestFeature) -> u64 {
        1 << feature as u32
    }

    /// The bit of a bridge; `None` where it has none.
    pub(super) fn bridge(&self, name: &str) -> Option<u64> {
        1_u64.checked_shl(*self.bridges.get(name)?)
    }
}

/// A pool of a host.
#[derive(Debug, PartialEq, Clone, Copy)]
pub(super) struct Pool {
    /// [`NO_POOL`] where there is none.
    id: u32,
    pub(super) shared: bool,
    pub(super) broken: bool,
    /// What may be promised there; of a pool of the host's own, still.
    promisable_mib: u64,
    /// What bounds it besides: what is free now.
    at_most_mib: u64,
}

/// The number of no pool.
const NO_POOL: u32 = u32::MAX;

impl Default for Pool {
    fn default() -> Self {
        Self {
            id: NO_POOL,
            shared: false,
            broken: true,
            promisable_mib: 0,
            at_most_mib: 0,
        }
    }
}

impl Pool {
    /// Room for a new disk, as [`PoolView::free_mib`] says.
    pub(super) fn free_mib(&self, pools: &Pools) -> u64 {
        let promised = match self.shared {
            true => pools.shared[self.id as usize].unwrap_or(0),
            false => 0,
        };
        self.promisable_mib.saturating_sub(promised).min(self.at_most_mib)
    }
}

/// Names of pools as numbers, and what is promised in those that hosts share. There are few names on a site; none is forgotten.
#[derive(Debug, Default, Clone)]
pub(super) struct Pools {
    ids: HashMap<String, u32>,
    names: Vec<String>,
    /// Promised in MiB; `None` where no host has shared it.
    shared: Vec<Option<u64>>,
}

impl Pools {
    /// The number of a pool's name, if a host has or had such a pool.
    pub(super) fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    /// A pool of a host.
    fn of(&mut self, view: &PoolView<'_>) -> Pool {
        let id = self.number(&view.name);
        let own = match view.shared {
            true => {
                self.shared[id as usize] = Some(view.reserved_mib);
                0
            }
            false => view.reserved_mib,
        };
        let at_most_mib = match (view.is_full(), view.is_overcommitted()) {
            (true, _) => 0,
            (false, true) => u64::MAX,
            (false, false) => view.available_mib,
        };
        Pool {
            id,
            shared: view.shared,
            broken: view.error.is_some(),
            promisable_mib: view.promisable_mib().saturating_sub(own),
            at_most_mib,
        }
    }

    fn number(&mut self, name: &str) -> u32 {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        let id = u32::try_from(self.names.len()).expect("fewer pools than 2^32");
        self.ids.insert(name.to_owned(), id);
        self.names.push(name.to_owned());
        self.shared.push(None);
        id
    }

    pub(super) fn promise(&mut self, promised: impl Fn(&str) -> u64) {
        for (name, shared) in self.names.iter().zip(&mut self.shared) {
            if let Some(mib) = shared {
                *mib = promised(name);
            }
        }
    }
}
