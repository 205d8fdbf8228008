//! What can be typed after `dalgu volume`.

use clap::{Args, Subcommand, ValueEnum};

use super::{host::RequestArgs, network::ListArgs, values};
use crate::complete;

/// Volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Makes a volume; its file is made when it is first attached to a VM.
    Create(Box<CreateArgs>),
    /// Lists volumes.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Shows one volume in full.
    #[command(visible_alias = "get")]
    Show {
        /// Name of the volume.
        #[arg(add = complete::volumes())]
        name: String,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Changes labels, description and size, also while a VM has it.
    Update(UpdateArgs),
    /// Deletes a volume that no VM has; it can be had back for a time.
    #[command(visible_alias = "rm")]
    Delete(NamedArgs),
    /// Takes the deletion of a volume back.
    Undelete(NamedArgs),
}

/// A volume to do something with.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// Name of the volume.
    #[arg(add = complete::volumes())]
    pub name: String,
    /// Refuse unless the volume is still as it was with this etag.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub etag: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// File formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiskFormat {
    /// Takes space as it is written.
    Qcow2,
    /// Plain bytes, sparse.
    Raw,
}

/// Ways to make a volume from an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Clone {
    /// Holds only what differs from the image.
    Overlay,
    /// The image is copied.
    Full,
}

const CREATE_HELP: &str = "\
  dalgu volume create ledger --size 20GiB
  dalgu vm update shop --add-disk data,volume=ledger --wait
  dalgu volume create shop-root --image debian:12 --size 10GiB
  dalgu vm create shop --disk root,volume=shop-root";

/// A volume to be made.
#[derive(Debug, Args)]
#[command(after_help = CREATE_HELP)]
pub struct CreateArgs {
    /// Name of the volume.
    pub name: String,
    /// Size, for example 20GiB [default: the image's].
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE", required_unless_present = "image")]
    pub size: Option<u64>,
    /// Image of the catalogue that it starts from [default: none, it is blank].
    #[arg(long, value_name = "IMAGE", add = complete::images())]
    pub image: Option<String>,
    /// Storage pool of hosts that holds it [default: local].
    #[arg(long, value_name = "POOL")]
    pub pool: Option<String>,
    /// File format [default: qcow2].
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<DiskFormat>,
    /// How it is made from the image [default: overlay where that is possible].
    #[arg(long, value_enum, value_name = "HOW", requires = "image")]
    pub clone: Option<Clone>,
    /// Label of the volume; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// A change of a volume.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateArgs {
    /// Name of the volume.
    #[arg(add = complete::volumes())]
    pub name: String,
    /// New size, for example 40GiB; it only rises.
    #[arg(long, value_parser = values::size_mib, value_name = "SIZE", group = "change")]
    pub size: Option<u64>,
    /// Set a label (KEY=VALUE) or remove it (KEY-); may be given again.
    #[arg(long = "label", value_parser = values::label_change, value_name = "CHANGE", group = "change")]
    pub labels: Vec<values::LabelChange>,
    /// New description.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub description: Option<String>,
    /// Refuse unless the volume is still as it was with this etag.
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}
