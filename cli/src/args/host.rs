//! What can be typed after `dalgu host`.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use dalgu_proto::v1;

use super::values;
use crate::complete;

/// Hosts.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Lists hosts with their load and room.
    #[command(visible_alias = "ls")]
    List {
        /// Only hosts with this label; may be given again.
        #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE")]
        selector: Vec<(String, String)>,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Shows one host in full.
    #[command(visible_alias = "get")]
    Show {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Closes a host for new VMs and incoming migrations; its VMs run on.
    Cordon {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// Why, for colleagues.
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Opens a host for new VMs again.
    Uncordon {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Empties a host for maintenance: closes it, and moves, stops or leaves each of its VMs as that VM's drain mode says. Ends at the
    /// deadline at the latest, and says of every VM that is still there why.
    Drain(DrainArgs),
    /// Gives a drain or a restoration up where it is: what it began goes on.
    CancelDrain {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Opens a host that was drained, moves back what was moved away, and starts what was stopped.
    Restore {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// How long.
        #[command(flatten)]
        time: DrainTime,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Maintains hosts group by group: empties a group, runs a command for each of its hosts, brings the VMs back, and goes on with the next. A
    /// group is never so large that the VMs of a host that fails meanwhile would find no room.
    Roll(RollArgs),
    /// Shows whether a host's machine is on, and by what it is switched; switches it on and off.
    Power(PowerArgs),
    /// Forgets a host that has no VM.
    Delete {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Taints a host: no VM comes that does not tolerate it, and with `:prefer` only where there is no other. VMs that are there stay.
    Taint {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// KEY=VALUE, or KEY=VALUE:prefer.
        #[arg(required = true, value_parser = values::taint, value_name = "TAINT")]
        taints: Vec<v1::Taint>,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Takes taints off a host.
    Untaint {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// Keys of the taints.
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Limits how many VMs a host takes; those that are there stay.
    Limit {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// Most VMs; 0 for what the site says.
        #[arg(long, value_name = "N")]
        max_vms: u32,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Sets labels (KEY=VALUE) and removes them (KEY-).
    Label {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// KEY=VALUE to set, KEY- to remove.
        #[arg(required = true, value_parser = values::label_change, value_name = "CHANGE")]
        changes: Vec<values::LabelChange>,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

/// Power of a host.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct PowerArgs {
    /// Name of the host.
    #[arg(add = complete::hosts(), required = true)]
    pub name: Option<String>,
    /// What is done.
    #[command(subcommand)]
    pub command: Option<PowerCommand>,
}

/// What is done with a host's power.
#[derive(Debug, Subcommand)]
pub enum PowerCommand {
    /// Switches a host on; `dalgu host list` shows how far it is.
    On {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Switches a host off on which no VM runs: closes it, and has its operating system shut down.
    Off {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// Cut it off at once, without its operating system.
        #[arg(long)]
        force: bool,
        /// Also where the site needs it: for the VMs of a host that fails, or for what is nowhere else.
        #[arg(long)]
        even_if_needed: bool,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Says by what a host is switched on and off.
    Set {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// Redfish service of its management controller: https://ADDRESS or https://ADDRESS:PORT.
        #[arg(long, value_name = "URL")]
        redfish: String,
        /// Id of its computer system there [default: the only one].
        #[arg(long, default_value = "", hide_default_value = true, value_name = "ID")]
        system: String,
        /// SHA-256 of the service's certificate, in hexadecimal [default: the controller's authority has signed it].
        #[arg(long, default_value = "", hide_default_value = true, value_name = "SHA256")]
        fingerprint: String,
        /// Name of the file with user and password on the controller's machine.
        #[arg(long, default_value = "bmc", value_name = "NAME")]
        credentials: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Forgets by what a host is switched on and off.
    Unset {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

/// A drain.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Name of the host.
    #[arg(add = complete::hosts())]
    pub name: String,
    /// What becomes of all its VMs [default: each has its own mode].
    #[arg(long, value_enum, value_name = "MODE")]
    pub mode: Option<DrainMode>,
    /// Change nothing; show where each VM would go, and what holds those that cannot.
    #[arg(long)]
    pub dry_run: bool,
    /// How long.
    #[command(flatten)]
    pub time: DrainTime,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// Rolling maintenance.
#[derive(Debug, Args)]
pub struct RollArgs {
    /// Names of the hosts.
    #[arg(add = complete::hosts(), required_unless_present = "selector", value_name = "HOST")]
    pub hosts: Vec<String>,
    /// The hosts with this label; may be given again.
    #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE", conflicts_with = "hosts")]
    pub selector: Vec<(String, String)>,
    /// What is done with an empty host: a shell command here, with the host's name in DALGU_HOST. All goes on when it ends with 0.
    #[arg(long, value_name = "COMMAND", required_unless_present = "dry_run")]
    pub exec: Option<String>,
    /// The command restarts the host: wait for its agent to report from a new start.
    #[arg(long)]
    pub reboots: bool,
    /// Hosts that are empty at once, at most 1000 [default: as many as there is room for].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "COUNT")]
    pub max_hosts: u32,
    /// Go on where the VMs of a host that fails meanwhile would find no room.
    #[arg(long)]
    pub without_spare_host: bool,
    /// Time that emptying a group may take, and bringing its VMs back, for example 10m or 2h [default: 1h].
    #[arg(long, value_parser = values::duration, value_name = "TIME")]
    pub deadline: Option<Duration>,
    /// Time that a host may take to report again after the command.
    #[arg(long, value_parser = values::duration, default_value = "15m", value_name = "TIME")]
    pub back_within: Duration,
    /// Change nothing; show the groups, and what holds hosts that cannot be emptied.
    #[arg(long)]
    pub dry_run: bool,
}

/// How long a drain may take, and whether to wait for its end.
#[derive(Debug, Clone, Args)]
pub struct DrainTime {
    /// Time after which it ends, for example 10m or 2h [default: 1h].
    #[arg(long, value_parser = values::duration, value_name = "TIME")]
    pub deadline: Option<Duration>,
    /// Return as soon as it has begun.
    #[arg(long)]
    pub no_wait: bool,
}

/// What becomes of a VM whose host is drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DrainMode {
    /// It moves to another host while it runs.
    LiveMigrate,
    /// It is shut down.
    Stop,
    /// It stays and runs on.
    Leave,
    /// Nothing is done with it before somebody says what.
    Ask,
}

impl From<DrainMode> for v1::DrainMode {
    fn from(mode: DrainMode) -> Self {
        match mode {
            DrainMode::LiveMigrate => Self::LiveMigrate,
            DrainMode::Stop => Self::Stop,
            DrainMode::Leave => Self::Leave,
            DrainMode::Ask => Self::Ask,
        }
    }
}

/// How to make a request that is done at once.
#[derive(Debug, Clone, Args)]
pub struct RequestArgs {
    /// UUID of the request: repeating a command with the same one does the work once only [default: a new one].
    #[arg(long, value_parser = values::uuid, value_name = "UUID")]
    pub request_id: Option<String>,
}
