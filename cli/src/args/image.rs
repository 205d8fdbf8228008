//! What can be typed after `dalgu image`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use dalgu_proto::{image::Reference, v1};

use super::{host::RequestArgs, values, vm::Firmware};
use crate::complete;

/// Images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Lists images.
    #[command(visible_alias = "ls")]
    List {
        /// Only versions of this name.
        #[arg(value_name = "NAME")]
        name: Option<String>,
        /// Only images with this label; may be given again.
        #[arg(short = 'l', long = "selector", value_parser = values::label, value_name = "KEY=VALUE")]
        selector: Vec<(String, String)>,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Shows one image in full.
    #[command(visible_alias = "show")]
    Get {
        /// Name and version of the image; without a version the newest that is available.
        #[arg(value_parser = values::image, value_name = "NAME[:VERSION]", add = complete::images())]
        image: Reference,
        /// Go on and show changes as they come.
        #[arg(short, long)]
        watch: bool,
    },
    /// Brings an image into the catalogue: a file of this machine, or one that a host has.
    Import(Box<ImportArgs>),
    /// Changes labels, description, visibility, owner, firmware, kind of operating system and the number of hosts that have it.
    Update(UpdateArgs),
    /// Deletes an image, and its copies on hosts.
    #[command(visible_alias = "rm")]
    Delete {
        /// Name and version of the image.
        #[arg(value_parser = values::image_version, value_name = "NAME:VERSION", add = complete::images())]
        image: Reference,
        /// Refuse unless the image is still as it was with this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

const IMPORT_HELP: &str = "\
  dalgu image import debian-12.qcow2 --name debian --version 12
  dalgu image import --from-host h1:debian-12.qcow2 --name debian --version 12

What was broken off goes on where it stands when the same command is given again.";

/// An image to be imported.
#[derive(Debug, Args)]
#[command(after_help = IMPORT_HELP)]
pub struct ImportArgs {
    /// The file.
    #[arg(
        value_name = "FILE",
        required_unless_present = "from_host",
        conflicts_with = "from_host"
    )]
    pub file: Option<PathBuf>,
    /// A file in the images directory of a host instead.
    #[arg(long, value_parser = values::host_file, value_name = "HOST:FILE")]
    pub from_host: Option<v1::ImageFile>,
    /// Name of the image [default: the file's name without its ending].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Version of the image.
    #[arg(long, default_value = dalgu_proto::image::DEFAULT_VERSION, value_name = "VERSION")]
    pub version: String,
    /// SHA-256 that the file must have [default: what it has].
    #[arg(long, value_name = "DIGITS")]
    pub sha256: Option<String>,
    /// Format of the file [default: what its name says].
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Kind of operating system, for example debian-12.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub os: String,
    /// What starts it: VMs made from it have that where they do not say [default: bios].
    #[arg(long, value_enum, value_name = "FIRMWARE")]
    pub firmware: Option<Firmware>,
    /// Label of the image; may be given again.
    #[arg(long = "label", value_parser = values::label, value_name = "KEY=VALUE")]
    pub labels: Vec<(String, String)>,
    /// Free text.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    pub description: String,
    /// For this operator only.
    #[arg(long)]
    pub private: bool,
    /// Hosts that are to have it ahead of use, or `all` [default: 2].
    #[arg(long, value_parser = values::replicas, value_name = "N")]
    pub replicas: Option<i32>,
    /// Return when all its bytes are there, before it is verified and converted.
    #[arg(long, help_heading = "Waiting")]
    pub no_wait: bool,
    /// Longest time in which nothing gets on, for example 90s, 5m or 1h [default: 5m].
    #[arg(long, value_parser = values::duration, value_name = "TIME", help_heading = "Waiting")]
    pub timeout: Option<Duration>,
    /// UUID of the request: repeating a command with the same one does the work once only [default: a new one].
    #[arg(long, value_parser = values::uuid, value_name = "UUID", help_heading = "Waiting")]
    pub request_id: Option<String>,
}

/// A change of an image.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateArgs {
    /// Name and version of the image.
    #[arg(value_parser = values::image_version, value_name = "NAME:VERSION", add = complete::images())]
    pub image: Reference,
    /// Set a label (KEY=VALUE) or remove it (KEY-); may be given again.
    #[arg(long = "label", value_parser = values::label_change, value_name = "CHANGE", group = "change")]
    pub labels: Vec<values::LabelChange>,
    /// New description.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub description: Option<String>,
    /// Kind of operating system, for example debian-12.
    #[arg(long, value_name = "TEXT", group = "change")]
    pub os: Option<String>,
    /// What starts it: VMs made from it later have that where they do not say.
    #[arg(long, value_enum, value_name = "FIRMWARE", group = "change")]
    pub firmware: Option<Firmware>,
    /// Who may use it.
    #[arg(long, value_enum, value_name = "WHO", group = "change")]
    pub visibility: Option<Visibility>,
    /// Give it to another operator, by the name in the certificate.
    #[arg(long, value_parser = values::operator, value_name = "OPERATOR", group = "change")]
    pub owner: Option<String>,
    /// Hosts that are to have it ahead of use, or `all`.
    #[arg(long, value_parser = values::replicas, value_name = "N", group = "change")]
    pub replicas: Option<i32>,
    /// Refuse unless the image is still as it was with this etag.
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
    /// The request.
    #[command(flatten)]
    pub request: RequestArgs,
}

/// Formats of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// QEMU's own.
    Qcow2,
    /// The disk's bytes as they are.
    Raw,
    /// VMware's.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Hyper-V's.
    Vhdx,
}

impl From<Format> for v1::ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => Self::Qcow2,
            Format::Raw => Self::Raw,
            Format::Vmdk => Self::Vmdk,
            Format::Vdi => Self::Vdi,
            Format::Vhdx => Self::Vhdx,
        }
    }
}

/// Who may use an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Visibility {
    /// Every operator.
    Public,
    /// Its owner, and the administrator.
    Private,
}

impl From<Visibility> for v1::ImageVisibility {
    fn from(visibility: Visibility) -> Self {
        match visibility {
            Visibility::Public => Self::Public,
            Visibility::Private => Self::Private,
        }
    }
}
