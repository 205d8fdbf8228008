//! Moments at which a test lets somebody die. They are drawn, so that each run tries others, from a seed that is printed; a run with
//! `DALGU_TEST_SEED=N` draws the same ones again.

use std::env;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use tokio::time::sleep;

use crate::lab::{Daemon, Lab};

/// Draws moments.
#[derive(Debug)]
pub struct Moments(fastrand::Rng);

impl Moments {
    /// Begins to draw, and prints the seed.
    ///
    /// # Errors
    /// If the seed that was given is no number.
    pub fn new() -> anyhow::Result<Self> {
        let given = env::var("DALGU_TEST_SEED").ok();
        let seed = given.map_or_else(|| Ok(fastrand::u64(..)), |text| text.parse());
        let seed = seed.context("DALGU_TEST_SEED")?;
        println!("moments are drawn with DALGU_TEST_SEED={seed}");
        Ok(Self(fastrand::Rng::with_seed(seed)))
    }

    /// The next one, some time below this from now.
    pub fn next(&mut self, below: Duration) -> Duration {
        let millis = u64::try_from(below.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.0.u64(..millis.max(1)))
    }
}

/// Kills a daemon at its moment, and starts it again.
///
/// # Errors
/// If it does not run then, or does not come up.
pub async fn death(lab: &Lab, daemon: Daemon, moment: Duration) -> anyhow::Result<()> {
    // The moment is what is varied; nothing is waited for.
    sleep(moment).await;
    println!("{daemon:?} dies after {moment:?}");
    lab.signal(daemon, Signal::SIGKILL).await?;
    lab.start(daemon).await
}
