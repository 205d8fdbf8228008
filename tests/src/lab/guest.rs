//! The guest image of the lab: built when its inputs changed, then given to each host. Called when a lab goes up.

use std::fs;

use anyhow::Context as _;

use super::layout::{Host, Layout};
use super::run::run;

/// The kernel's file name among a host's images.
pub const KERNEL: &str = "dalgu-guest.vmlinuz";
/// The initramfs's file name among a host's images.
pub const INITRD: &str = "dalgu-guest.initrd";
/// Where hosts keep images.
pub const IMAGES_DIR: &str = "/var/lib/dalgu/images";

/// Builds the guest image unless it is there.
///
/// # Errors
/// If the set-up step was not run, or a command fails.
pub async fn build(layout: &Layout) -> anyhow::Result<()> {
    let script = layout.repository().join("tests/lab/guest/build.sh");
    let kernel = layout.tools_dir().join("kernel/root");
    run(
        "bash",
        [script.as_path(), &kernel, &layout.tools_dir().join("guest")],
    )
    .await
    .context("build the guest image")
    .map(drop)
}

/// Copies the guest image into a host's images.
///
/// # Errors
/// If a file cannot be copied.
pub fn give(layout: &Layout, host: &Host) -> anyhow::Result<()> {
    for file in [KERNEL, INITRD] {
        let source = layout.tools_dir().join("guest").join(file);
        fs::copy(&source, host.outside(IMAGES_DIR).join(file))
            .with_context(|| format!("copy {} to {}", source.display(), host.name))?;
    }
    Ok(())
}
