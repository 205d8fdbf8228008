//! What can be typed after `dalgu host`.

use clap::{Args, Subcommand};

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
    /// Forgets a host that has no VM.
    Delete {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        name: String,
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

/// How to make a request that is done at once.
#[derive(Debug, Clone, Args)]
pub struct RequestArgs {
    /// UUID of the request: repeating a command with the same one does the work once only [default: a new one].
    #[arg(long, value_parser = values::uuid, value_name = "UUID")]
    pub request_id: Option<String>,
}
