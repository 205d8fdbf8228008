//! What can be typed after `dalgu site` and `dalgu doctor`.

use clap::{Args, Subcommand};

use super::host::RequestArgs;
use crate::complete;

/// The site as a whole.
#[derive(Debug, Subcommand)]
pub enum SiteCommand {
    /// Shows how the site stands, and where hosts and a restored store differ.
    Show,
    /// No longer waits for a host that will not report.
    Waive {
        /// Name of the host.
        #[arg(add = complete::hosts())]
        host: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
    /// Ends the observing after a restore; what hosts have is taken over as it is.
    Resume {
        /// Accepts the differences that `dalgu site show` shows.
        #[arg(long)]
        accept_differences: bool,
        /// The ETag that `dalgu site show` showed [default: that of the differences as they are now].
        #[arg(long, default_value = "", hide_default_value = true, value_name = "ETAG")]
        etag: String,
        /// The request.
        #[command(flatten)]
        request: RequestArgs,
    },
}

const DOCTOR_HELP: &str = "\
The controller compares what its store holds with what hosts have reported; nobody is asked for it, and nothing is
changed. What is wrong only for a moment is not told: it is looked at twice, one report interval apart.

The exit code is 0 when nothing is wrong on hosts that were all seen, and 9 otherwise. docs/operations/doctor.md explains
every finding.";

/// How to examine the site.
#[derive(Debug, Args)]
#[command(after_help = DOCTOR_HELP)]
pub struct DoctorArgs {
    /// Look through the controller's database too; changes wait meanwhile, the longer the larger it is.
    #[arg(long)]
    pub deep: bool,
}
