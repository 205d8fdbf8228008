//! The placement engine beside the state: every host as it is in the pending state, ready for the next decision.
//!
//! [`Tx`](super::Tx) marks the hosts that it changes, where it keeps reservations; [`Fleet::settle`] and [`Fleet::decide`] take marked hosts over, before a
//! decision within a change and after each change; after one that was given up, once more as they were before. So nothing is reckoned twice: what a host has
//! free is what [`hosts::view`] says. Not stored, and in no snapshot: made when the first decision asks for it.

use std::collections::BTreeSet;

use dalgu_proto::ids::HostName;

use super::State;
use crate::{
    hosts,
    placement::{Decision, Engine, Policy, Request, Size},
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    engine: Option<Engine>,
    /// Hosts that have changed since they were taken over.
    stale: BTreeSet<HostName>,
    /// Hosts that were taken over within the change that is under way, for a decision.
    taken: BTreeSet<HostName>,
    /// The engine was made within it.
    made: bool,
}

impl Fleet {
    /// Notes that a host has changed, come or gone.
    pub(super) fn mark(&mut self, host: &HostName) {
        if self.engine.is_some() && !self.stale.contains(host) {
            self.stale.insert(host.clone());
        }
    }

    /// Notes that every host may have changed.
    pub(super) fn mark_all(&mut self) {
        *self = Self::default();
    }

    /// A change has come to its end, and this is the state after it. One that was given up is as if it had never been, also for what was
    /// decided on within it.
    pub(super) fn settle(&mut self, state: &State, given_up: bool) {
        if given_up {
            if self.made {
                self.mark_all();
            }
            self.stale.append(&mut self.taken);
        }
        self.follow(state);
        self.taken.clear();
        self.made = false;
    }

    /// Takes over what has changed.
    fn follow(&mut self, state: &State) {
        let Some(engine) = &mut self.engine else {
            return;
        };
        while let Some(host) = self.stale.pop_first() {
            match state.hosts.get(&host) {
                Some(record) => engine.set(&hosts::view(state, record)),
                None => engine.remove(&host),
            }
            self.taken.insert(host);
        }
        engine.promise(|pool| state.pools_mib.get(pool).copied().unwrap_or(0));
    }

    /// Decides on the state as it is, with every change that was marked.
    pub(super) fn decide(
        &mut self,
        state: &State,
        request: &Request,
        policy: Policy,
        kept: usize,
    ) -> Decision {
        let view = |host: &HostName| Some(hosts::view(state, state.hosts.get(host)?));
        self.engine(state, policy)
            .decide(request, kept, || hosts::each(state), view)
    }

    /// Whether a VM may become larger where it is, as far as protected domains go; else which one would lack how much.
    pub(super) fn may_grow(
        &mut self,
        state: &State,
        host: &HostName,
        (from, to): (Size, Size),
        policy: Policy,
    ) -> Result<(), (String, Size)> {
        let grown = self.engine(state, policy).may_grow(host, from, to);
        grown.map_err(|short| (short.domain.to_owned(), short.lacking))
    }

    /// The engine with every change that was marked.
    fn engine(&mut self, state: &State, policy: Policy) -> &Engine {
        self.follow(state);
        let fits = |engine: &Engine| engine.policy() == policy && engine.protects(&state.protect);
        if self.engine.as_ref().is_some_and(|engine| !fits(engine)) {
            self.mark_all();
        }
        self.engine.get_or_insert_with(|| {
            let mut engine = Engine::protecting(policy, &state.protect);
            hosts::views(state).iter().for_each(|view| engine.set(view));
            self.made = true;
            engine
        })
    }
}

#[cfg(test)]
impl Fleet {
    /// Whether the engine knows what it would know if it were made anew; nothing that changed is left out.
    pub(super) fn is_current(&self, state: &State) -> bool {
        self.stale.is_empty()
            && self.engine.as_ref().is_none_or(|engine| {
                let mut anew = engine.without_hosts();
                hosts::views(state).iter().for_each(|view| anew.set(view));
                engine.knows_as(&anew)
            })
    }
}

#[cfg(test)]
mod properties;
