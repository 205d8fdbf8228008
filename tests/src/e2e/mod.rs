//! What the end-to-end tests of Dalgu share: the operator's words and Dalgu's answers ([`words`]), the
//! independent view of the hosts ([`census`]), a guest's whole story across hosts ([`story`]), changes and what a guest writes
//! meanwhile ([`changes`]), networks of the site as they are seen from beside the hosts ([`network`]), moments at which
//! somebody dies ([`moments`]), a disk that UEFI starts from ([`efi`]), and `grpcurl` ([`grpcurl`]).
//! Used by `tests/tests/*.rs` and by benchmarks.
//!
//! What Dalgu says is never taken as proof of what Dalgu did: [`census`] asks `virsh`, `/proc` and the file systems.

pub mod census;
pub mod changes;
pub mod efi;
pub mod grpcurl;
pub mod moments;
pub mod network;
pub mod story;
pub mod words;

use std::fs;
use std::time::Duration;

use anyhow::ensure;
use nix::sys::signal::Signal;

use crate::lab::{Daemon, Lab, Options};

/// A guest under emulation boots in seconds; on a machine that does something else besides, in tens of them.
pub const BOOT_LIMIT: Duration = Duration::from_mins(4);

/// How long the site may take to come to rest after a disturbance: longer than a host takes to be missed, and than
/// the longest pause between two attempts.
pub const REST_LIMIT: Duration = Duration::from_mins(2);

/// A lab of so many hosts with Dalgu on them.
#[must_use]
pub fn hosts(hosts: u8) -> Options {
    Options {
        hosts,
        ..Options::default()
    }
}

/// Starts the controller anew with a setting as a site has it, where the lab has set it for all its tests' sake.
///
/// # Errors
/// If the lab has no such line, or the controller does not start.
pub async fn set_as_at_a_site(lab: &Lab, lines: &[(&str, &str)]) -> anyhow::Result<()> {
    let config = lab.layout().dir().join("controller.toml");
    let mut settings = fs::read_to_string(&config)?;
    for (of_the_lab, of_a_site) in lines {
        ensure!(settings.contains(of_the_lab), "no {of_the_lab} in {settings}");
        settings = settings.replace(of_the_lab, of_a_site);
    }
    fs::write(&config, settings)?;
    lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
    lab.start(Daemon::Controller).await
}
