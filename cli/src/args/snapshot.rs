//! What can be typed after `dalgu snapshot`.

use clap::{Args, Subcommand};

use super::{WaitArgs, values};
use crate::complete;

/// Snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keeps what all disks of a VM hold at this moment, whether it runs or not.
    Create(Box<CreateArgs>),
    /// Lists the snapshots of a VM, oldest first.
    #[command(visible_alias = "ls")]
    List {
        /// Name of the VM.
        #[arg(add = complete::vms())]
        vm: String,
    },
    /// Shows one snapshot in full.
    #[command(visible_alias = "show")]
    Get {
        /// Name of the VM.
        #[arg(add = complete::vms())]
        vm: String,
        /// Name of the snapshot.
        name: String,
    },
    /// Deletes a snapshot; what the VM's disks hold, and other snapshots, stay as they are.
    #[command(visible_alias = "rm")]
    Delete(WhichArgs),
    /// Makes the disks of a VM that is off what they were at a snapshot: what was written since is lost.
    Revert {
        /// Which.
        #[command(flatten)]
        which: WhichArgs,
        /// Delete snapshots that were made later.
        #[arg(long)]
        discard_later: bool,
    },
}

/// A snapshot to be made.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the VM.
    #[arg(add = complete::vms())]
    pub vm: String,
    /// Name of the snapshot, unique within the VM.
    pub name: String,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// A label; may be given again.
    #[arg(short = 'l', long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// A snapshot, and how to wait for what is done with it.
#[derive(Debug, Args)]
pub struct WhichArgs {
    /// Name of the VM.
    #[arg(add = complete::vms())]
    pub vm: String,
    /// Name of the snapshot.
    pub name: String,
    /// Refuse unless the snapshot is still as it was with this etag.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub etag: String,
    /// How to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}
