//! What can be typed after `dalgu placement-group` and `dalgu capacity`.

use clap::{Args, Subcommand, ValueEnum};
use dalgu_proto::v1;

use super::{host::RequestArgs, values, vm::FittingArgs};
use crate::complete;

/// Placement groups.
#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// Makes a placement group; VMs join it when they are created, or with `dalgu vm update --join-group`.
    Create(CreateArgs),
    /// Lists placement groups.
    #[command(visible_alias = "ls")]
    List,
    /// Shows one placement group in full.
    #[command(visible_alias = "show")]
    Get {
        /// Name of the group.
        #[arg(add = complete::placement_groups())]
        name: String,
    },
    /// Deletes a placement group that no VM is in.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name of the group.
        #[arg(add = complete::placement_groups())]
        name: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

const CREATE_HELP: &str = "\
  dalgu placement-group create web-apart --rule anti-affinity --by rack   each member in a rack of its own
  dalgu placement-group create web-spread --rule anti-affinity --preferred
  dalgu placement-group create shop --rule affinity                       all members on one host";

/// A placement group to be made.
#[derive(Debug, Args)]
#[command(after_help = CREATE_HELP)]
pub struct CreateArgs {
    /// Name of the group.
    pub name: String,
    /// What it does.
    #[arg(long, value_enum, value_name = "RULE")]
    pub rule: Rule,
    /// The rule only makes hosts better or worse, and refuses none.
    #[arg(long)]
    pub preferred: bool,
    /// Label of hosts by which it goes, for example rack [default: each host by itself].
    #[arg(
        long = "by",
        value_name = "LABEL",
        default_value = "",
        hide_default_value = true
    )]
    pub topology_key: String,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// What a placement group does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rule {
    /// Keeps its members together.
    Affinity,
    /// Keeps them apart.
    AntiAffinity,
}

impl From<Rule> for v1::PlacementRule {
    fn from(rule: Rule) -> Self {
        match rule {
            Rule::Affinity => Self::Affinity,
            Rule::AntiAffinity => Self::AntiAffinity,
        }
    }
}

const CAPACITY_HELP: &str = "\
  dalgu capacity --vcpus 4 --memory 16GiB               how many more, and how many so that any host can be lost
  dalgu capacity --vcpus 4 --memory 16GiB --domain rack so that any rack can
  dalgu capacity --vcpus 4 --memory 16GiB --keep 2      so that any two hosts can";

/// The size that is asked about.
#[derive(Debug, Args)]
#[command(after_help = CAPACITY_HELP)]
pub struct CapacityArgs {
    /// Virtual processors of each VM.
    #[arg(long, value_name = "N")]
    pub vcpus: u32,
    /// Memory of each VM, for example 4GiB.
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE")]
    pub memory: u64,
    /// What each asks of its host's processors, huge pages and NUMA nodes.
    #[command(flatten)]
    pub fitting: FittingArgs,
    /// Keep room for what the fullest so many hosts hold, or racks with --domain.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub keep: u32,
    /// Label of hosts that fail as one, for example rack [default: each host by itself].
    #[arg(long, value_name = "LABEL", default_value = "", hide_default_value = true)]
    pub domain: String,
    /// Label a host must bear to be counted; may be given again.
    #[arg(long = "host-selector", value_parser = values::label, value_name = "KEY=VALUE")]
    pub host_selector: Vec<(String, String)>,
    /// Taint of hosts that they put up with: KEY=VALUE, or KEY for any value; may be given again.
    #[arg(long = "tolerate", value_parser = values::toleration, value_name = "TAINT")]
    pub tolerations: Vec<v1::Toleration>,
}
