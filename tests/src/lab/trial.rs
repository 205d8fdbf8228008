//! Runs one end-to-end test on a lab of its own, and takes the lab down whatever becomes of the test.

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use futures::FutureExt as _;

use super::layout::Layout;
use super::{Lab, Options, down, keep_logs};

/// The lab that tests use, unless `DALGU_TEST_LAB_ID` says otherwise: a lab brought up by hand is not in the way. Those that run
/// at the same time use the ones below it.
const TEST_LAB: u8 = 9;

/// The number of this test's lab.
fn number() -> anyhow::Result<u8> {
    let last = env::var("DALGU_TEST_LAB_ID")
        .ok()
        .map_or(Ok(TEST_LAB), |id| id.parse())
        .context("DALGU_TEST_LAB_ID")?;
    // Set by nextest; there is none where the test was started by itself.
    let slot = env::var("NEXTEST_TEST_GROUP_SLOT").ok();
    let slot = slot.and_then(|slot| slot.parse().ok()).unwrap_or(0);
    last.checked_sub(slot)
        .with_context(|| format!("no lab {slot} below {last}: set DALGU_TEST_LAB_ID higher"))
}

/// Lines of each log that are printed.
const TOLD: usize = 40;

/// Prints the ends of the logs of what is ours: the machine that they are on may be gone when somebody reads of the failure.
fn tell(logs: &Path) {
    let entries = fs::read_dir(logs).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
    files.sort();
    let ours = |file: &&PathBuf| {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        stem.ends_with("agent") || stem.ends_with("controller")
    };
    for file in files.iter().filter(ours) {
        let text = fs::read_to_string(file).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(TOLD)..];
        eprintln!("== the end of {}\n{}", file.display(), last.join("\n"));
    }
    eprintln!("the lab's logs are in {}", logs.display());
}

/// Brings up a lab, runs the test on it, and takes it down, also after a failure or a panic; then the logs are
/// saved in `lab-logs` in the build directory.
///
/// # Errors
/// If the lab does not come up or go down, or what the test returned.
pub async fn with_lab<F>(options: &Options, test: F) -> anyhow::Result<()>
where
    F: AsyncFnOnce(&Lab) -> anyhow::Result<()>,
{
    let id = number()?;
    // A test that was killed could not do it itself.
    down(Layout::new(id)?)
        .await
        .context("remove what an earlier test left")?;
    let lab = Lab::up(Layout::new(id)?, options).await?;
    let outcome = AssertUnwindSafe(test(&lab)).catch_unwind().await;
    if !matches!(outcome, Ok(Ok(())))
        && let Some(logs) = keep_logs(lab.layout())
    {
        tell(&logs);
    }
    lab.down().await.context("take the lab down")?;
    match outcome {
        Ok(result) => result,
        Err(panic) => resume_unwind(panic),
    }
}
