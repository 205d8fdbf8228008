//! What can be typed after `dalgu site`.

use clap::Subcommand;

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
