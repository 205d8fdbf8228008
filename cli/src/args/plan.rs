//! What can be typed after `dalgu plan`.

use clap::{Args, Subcommand};

use super::{
    host::{DrainTime, RequestArgs},
    values,
    vm::{PlacementArgs, SpecArgs},
};
use crate::complete;

const HELP: &str = "\
  dalgu plan rebalance
  dalgu plan approve 3f0c... --hash 9b1e...
  dalgu plan evacuate r2h1 r2h2 r2h3
  dalgu plan make-room --vcpus 16 --memory 64GiB --disk root,image=debian:12";

/// Plans.
#[derive(Debug, Subcommand)]
#[command(after_help = HELP)]
pub enum PlanCommand {
    /// Proposes moves away from hosts on which VMs wait for processors, memory or storage. Moves nothing yet.
    Rebalance(BudgetArgs),
    /// Proposes moves after which fewer hosts have VMs. Moves nothing yet.
    Consolidate(BudgetArgs),
    /// Proposes moves after which these hosts have no running VM. Moves nothing yet.
    Evacuate {
        /// Names of the hosts.
        #[arg(required = true, add = complete::hosts())]
        hosts: Vec<String>,
        /// What it may cost.
        #[command(flatten)]
        budget: BudgetArgs,
    },
    /// Proposes a few moves after which a host has room for a VM that finds none now. Moves nothing yet.
    MakeRoom(Box<RoomArgs>),
    /// Lists plans, the newest first.
    #[command(visible_alias = "ls")]
    List,
    /// Shows one plan with all its moves.
    #[command(visible_alias = "get")]
    Show {
        /// Id of the plan.
        id: String,
    },
    /// Has a plan carried out, and waits for its end.
    Approve {
        /// Id of the plan.
        id: String,
        /// Its hash, as `dalgu plan show` says it: what is approved is what was seen.
        #[arg(long)]
        hash: String,
        /// How long.
        #[command(flatten)]
        time: DrainTime,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Gives a plan up: moves under way go on, no other begins.
    Cancel {
        /// Id of the plan.
        id: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

/// What room is made for.
#[derive(Debug, Args)]
pub struct RoomArgs {
    /// Make it on this host.
    #[arg(long, value_name = "HOST", add = complete::hosts())]
    pub host: Option<String>,
    /// The VM may take the room that is kept for protected failure domains; the moves do not.
    #[arg(long)]
    pub ignore_protection: bool,
    /// What it will be together with or apart from, and put up with.
    #[command(flatten)]
    pub placement: PlacementArgs,
    /// What it will be made of.
    #[command(flatten)]
    pub spec: SpecArgs,
    /// What it may cost.
    #[command(flatten)]
    pub budget: BudgetArgs,
}

/// What a plan may cost.
#[derive(Debug, Args)]
pub struct BudgetArgs {
    /// Moves at most, up to 1000.
    #[arg(long, value_name = "COUNT", default_value_t = 0, hide_default_value = true)]
    pub max_moves: u32,
    /// What all moves together copy at most, for example 200GiB.
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE")]
    pub max_copied: Option<u64>,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}
