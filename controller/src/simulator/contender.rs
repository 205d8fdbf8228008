//! What a trace is replayed with: a name, what chooses hosts, and what moves VMs afterwards. Pure.

use super::{field::Chooser, peers::Rule};
use crate::placement::{Named, Policy};

/// A way to place VMs, and to move them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Contender {
    /// What the controller does where its configuration says nothing.
    Default,
    /// The controller's engine, by the policy `spread`.
    Spread,
    /// The controller's engine, by the policy `pack`.
    Pack,
    /// The controller's engine, by the policy `balanced`.
    Balanced,
    /// `pack`, and a consolidation by the controller's planner in each round.
    Consolidate,
    /// `pack`, and VMs move out of the way of one that finds no room, by the controller's planner.
    MakeRoom,
    /// `spread`, and contended hosts are relieved by the controller's planner in each round.
    Rebalance,
    /// The first host with room.
    FirstFit,
    /// The host with the least left.
    BestFit,
    /// OpenStack Nova's weighers.
    Nova,
    /// Proxmox VE's static cluster resource scheduler.
    Proxmox,
    /// Incus: the fewest instances.
    Incus,
    /// Ganeti's allocator.
    Hail,
    /// Ganeti's allocator, and its balancer in each round.
    Hbal,
}

/// What moves VMs in each round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mover {
    Nothing,
    Consolidate,
    MakeRoom,
    Rebalance,
    Hbal,
}

impl Contender {
    /// All but `default`, which is one of the others.
    pub const ALL: [Self; 13] = [
        Self::Spread,
        Self::Pack,
        Self::Balanced,
        Self::Consolidate,
        Self::MakeRoom,
        Self::Rebalance,
        Self::FirstFit,
        Self::BestFit,
        Self::Nova,
        Self::Proxmox,
        Self::Incus,
        Self::Hail,
        Self::Hbal,
    ];

    /// The same, with `default` as what it stands for.
    #[must_use]
    pub fn resolved(self) -> Self {
        match (self, Named::default()) {
            (Self::Default, Named::Spread) => Self::Spread,
            (Self::Default, Named::Pack) => Self::Pack,
            (Self::Default, Named::Balanced) => Self::Balanced,
            (other, _) => other,
        }
    }

    /// As the command line has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Spread => "spread",
            Self::Pack => "pack",
            Self::Balanced => "balanced",
            Self::Consolidate => "consolidate",
            Self::MakeRoom => "make-room",
            Self::Rebalance => "rebalance",
            Self::FirstFit => "first-fit",
            Self::BestFit => "best-fit",
            Self::Nova => "nova",
            Self::Proxmox => "proxmox",
            Self::Incus => "incus",
            Self::Hail => "hail",
            Self::Hbal => "hbal",
        }
    }

    /// What chooses hosts.
    pub fn chooser(self) -> Chooser {
        match self {
            Self::Default => Chooser::Engine(Policy::default()),
            Self::Spread | Self::Rebalance => Chooser::Engine(Policy::SPREAD),
            Self::Balanced => Chooser::Engine(Policy::BALANCED),
            Self::Pack | Self::Consolidate | Self::MakeRoom => Chooser::Engine(Policy::PACK),
            Self::FirstFit => Chooser::Peer(Rule::FirstFit),
            Self::BestFit => Chooser::Peer(Rule::BestFit),
            Self::Nova => Chooser::Peer(Rule::Nova),
            Self::Proxmox => Chooser::Peer(Rule::Proxmox),
            Self::Incus => Chooser::Peer(Rule::Incus),
            Self::Hail | Self::Hbal => Chooser::Peer(Rule::Hail),
        }
    }

    pub(super) const fn mover(self) -> Mover {
        match self {
            Self::Consolidate => Mover::Consolidate,
            Self::MakeRoom => Mover::MakeRoom,
            Self::Rebalance => Mover::Rebalance,
            Self::Hbal => Mover::Hbal,
            _ => Mover::Nothing,
        }
    }
}
