//! Power cuts at every moment of what a recorded program did to a directory. Used by `tests/store.rs` and
//! `tests/ledger.rs`.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::{Context, Result, ensure};

use super::{
    Random,
    power::{Disk, Fate},
    trace::{self, Call},
};

/// A directory in memory where there is one: nothing here depends on the disk being one.
pub fn scratch() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    Ok(made?)
}

/// Runs a program under strace; the calls it made.
pub fn record(dir: &Path, program: &Command) -> Result<Vec<Call>> {
    let to = dir.join("trace");
    let mut command = trace::recorder(&to);
    command.arg(program.get_program()).args(program.get_args());
    let status = command
        .stdout(Stdio::null())
        .status()
        .context("strace cannot be run; tests/lab/setup.sh installs it")?;
    ensure!(status.success(), "{status}");
    trace::read(&fs::read_to_string(to)?)
}

/// The number on a line that was acknowledged, if the call is one.
fn acknowledged(call: &Call) -> Option<u64> {
    match call {
        Call::Write { fd: 1, bytes, .. } => std::str::from_utf8(bytes).ok()?.trim().parse().ok(),
        _ => None,
    }
}

/// A moment at which the power can go: the disk, and the last number acknowledged.
#[derive(Debug)]
pub struct Moment {
    /// The disk.
    pub disk: Disk,
    /// The last number acknowledged.
    pub acknowledged: u64,
}

/// The moments of a record.
pub fn moments(root: &Path, calls: &[Call]) -> Vec<Moment> {
    let mut disk = Disk::new(root);
    let mut last = 0;
    let mut moments = Vec::new();
    for call in calls {
        let number = acknowledged(call);
        last = number.unwrap_or(last);
        if disk.take(call) || number.is_some() {
            moments.push(Moment {
                disk: disk.clone(),
                acknowledged: last,
            });
        }
    }
    moments
}

/// Cuts the power at every moment, in several ways, and has each outcome judged. How many were.
pub fn cut(moments: &[Moment], torn: u64, judge: impl Fn(&Path, u64) -> Result<()> + Sync) -> Result<usize> {
    let done = AtomicUsize::new(0);
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let scratch = scratch()?;
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(moment) = moments.get(at) else {
                return Ok(());
            };
            let seeds = (0..torn).map(|seed| Fate::Torn(Random::new(at as u64 * torn + seed)));
            for (number, fate) in [Fate::Lost, Fate::Kept].into_iter().chain(seeds).enumerate() {
                let dir = scratch.path().join(format!("{at}-{number}"));
                fs::create_dir(&dir)?;
                moment.disk.leave(&fate, &dir)?;
                judge(&dir, moment.acknowledged)
                    .with_context(|| format!("power cut at moment {at}, {fate:?}"))?;
                fs::remove_dir_all(&dir)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(done.into_inner())
}
