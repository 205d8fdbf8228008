//! Plans: which VMs move where, in which order, and what that is good for. Pure decisions; carrying them out is `plans`' business.
//!
//! ```text
//!   views, forecasts ──> Site ──┬─> rebalance ───┐
//!                               ├─> consolidate ─┼──> Plan: moves in order, each checked on the site as it is by then
//!                               ├─> evacuate ────┤
//!                               ├─> make_room ───┘
//!                               └─> groups: hosts that can be empty at the same time
//! ```
//!
//! A VM moves once in a plan at most. A move may begin before those in front of it have ended, unless one of them leaves the host that it goes to:
//! with that rule, no host holds more at any time than after some prefix of the plan ([`Plan::waits_for`]).
//!
//! Pure: no runtime, store, clock, randomness or log; the same input gives the same plan.

mod consolidate;
mod forecast;
mod maintenance;
pub mod peak;
mod rebalance;
mod room;
mod site;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

pub use self::{
    consolidate::{Fill, Settings as Consolidation, consolidate, evacuate},
    forecast::Samples,
    maintenance::{Group, Held as HeldBy, Settings as Maintenance, groups},
    rebalance::{Dimension, Settings as Rebalance, rebalance, score},
    room::{Settings as Room, make_room},
    site::{Group as GroupRule, Held, Host, Load, Refusal, Rule, Site, Slot, Vm},
};

/// A VM moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The VM.
    pub vm: Slot,
    /// Where it is before.
    pub from: Slot,
    /// Where it goes.
    pub to: Slot,
}

/// What a site looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Hosts with VMs.
    pub on: usize,
    /// Hosts on which VMs wait.
    pub contended: usize,
    /// How uneven it is, by what counts for rebalancing.
    pub score: f64,
    /// The VMs of any one host would find room on the others.
    pub spare: bool,
}

/// Moves in order, and the site as it is after them.
#[derive(Debug, Clone)]
pub struct Plan {
    moves: Vec<Move>,
    site: Site,
}

impl Plan {
    /// A plan without moves.
    pub fn new(site: &Site) -> Self {
        Self {
            moves: Vec::new(),
            site: site.clone(),
        }
    }

    /// The moves.
    pub fn moves(&self) -> &[Move] {
        &self.moves
    }

    /// The site after them.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// What they copy, in MiB.
    pub fn transfer_mib(&self) -> u64 {
        self.site.transfer_mib(&self.moves)
    }

    /// Adds a move for which [`Site::check`] has said yes.
    fn push(&mut self, vm: Slot, to: Slot) {
        debug_assert_eq!(self.site.check(vm, to), Ok(()), "an unchecked move");
        self.push_fitting(vm, to);
    }

    /// Adds a move for which [`Site::fits`] has said yes, where there is no room for a host that fails to be kept.
    fn push_fitting(&mut self, vm: Slot, to: Slot) {
        let from = self.site.vms()[vm].host;
        debug_assert_eq!(self.site.fits(vm, to), Ok(()), "an unchecked move");
        self.site.apply(vm, to);
        self.moves.push(Move { vm, from, to });
    }

    /// Takes all moves back.
    fn undo(&mut self) {
        for step in std::mem::take(&mut self.moves).into_iter().rev() {
            self.site.apply(step.vm, step.from);
        }
    }

    /// As much of it from its beginning as these budgets allow: every beginning of a plan is one.
    #[must_use]
    pub fn within(&self, site: &Site, moves: usize, transfer_mib: u64) -> Self {
        let mut plan = Self::new(site);
        let mut left = transfer_mib;
        for step in self.moves.iter().take(moves) {
            let Some(rest) = left.checked_sub(site.vms()[step.vm].transfer_mib) else {
                break;
            };
            left = rest;
            plan.push(step.vm, step.to);
        }
        plan
    }

    /// What the site looks like after it. A host that measures pressure is taken to be relieved once a VM has left.
    pub fn figures(&self) -> Figures {
        let Rebalance {
            weights, contended, ..
        } = Rebalance::default();
        let site = &self.site;
        let hosts = || 0..site.hosts().len();
        let full = |host: &Slot| {
            contended.is_some_and(|fill| consolidate::filled(site, *host, fill, None) > fill.share)
        };
        let relieved = |host: &Slot| self.moves.iter().any(|step| step.from == *host);
        Figures {
            on: hosts().filter(|host| site.is_on(*host)).count(),
            contended: hosts()
                .filter(|host| full(host) || (site.hosts()[*host].contended && !relieved(host)))
                .count(),
            score: score(site, weights),
            spare: site.has_spare_room(),
        }
    }

    /// The moves in front of one that must have ended before it begins: those that leave the host that it goes to.
    pub fn waits_for(&self, step: usize) -> impl Iterator<Item = usize> {
        let to = self.moves[step].to;
        (0..step).filter(move |other| self.moves[*other].from == to)
    }
}
