//! The guest image of the lab: built when its inputs changed, then given to each host when a lab goes up. And the
//! reading of what such a guest says on its serial line, for tests, the demonstration and benchmarks.

use std::fs;

use anyhow::Context as _;

use super::layout::{Host, Layout};
use super::run::run;

/// The kernel's file name among a host's images.
pub const KERNEL: &str = "dalgu-guest.kernel";
/// The initramfs's file name among a host's images.
pub const INITRD: &str = "dalgu-guest.initrd";
/// The kernel's command line. A kernel that finds its timer slow at boot gives up, and where the processor is emulated on a busy
/// machine it does: it is told not to look.
pub const CMDLINE: &str = "console=ttyS0 quiet no_timer_check";
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

/// What the guest says once, when its userland is up.
pub const READY: &str = "dalgu-guest ready";

/// The counts that the guest said, in order of appearance. A line cut off at the end of the text is not counted.
#[must_use]
pub fn ticks(serial: &[u8]) -> Vec<u64> {
    let text = String::from_utf8_lossy(serial);
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok())
        .collect()
}

/// The first count that is not the one before plus one, if any: then the guest lost a count, ran twice, or started anew.
#[must_use]
pub fn first_break(ticks: &[u64]) -> Option<(u64, u64)> {
    ticks
        .windows(2)
        .map(|pair| (pair[0], pair[1]))
        .find(|(before, after)| *after != before + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_between_other_lines_and_a_cut_line_is_not() {
        let serial = b"\x1bcnoise\r\ndalgu-guest ready\r\ntick 1\r\n[  1.0] kernel\r\ntick 2\r\ntick 1";
        assert_eq!(ticks(serial), [1, 2]);
        assert_eq!(ticks(b"tick 1"), Vec::<u64>::new());
    }

    #[test]
    fn a_lost_a_repeated_and_a_restarted_count_are_breaks() {
        assert_eq!(first_break(&[5, 6, 7]), None);
        assert_eq!(first_break(&[5, 7]), Some((5, 7)));
        assert_eq!(first_break(&[5, 5]), Some((5, 5)));
        assert_eq!(first_break(&[5, 1]), Some((5, 1)));
    }
}
