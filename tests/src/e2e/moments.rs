//! The moments at which daemons die amid what was asked for: drawn from a seed, which is printed, so that each run tries others and one that
//! failed can be repeated.

use std::env;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::lab::{Daemon, Lab};

/// See the module.
pub struct Moments(fastrand::Rng);

impl Moments {
    /// From the seed in `DALGU_TEST_SEED`, or from one of its own.
    ///
    /// # Errors
    /// If that is no number.
    pub fn new() -> anyhow::Result<Self> {
        let seed = env::var("DALGU_TEST_SEED").ok().map(|seed| seed.parse());
        let seed = seed.transpose().context("DALGU_TEST_SEED")?;
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        println!("DALGU_TEST_SEED={seed} draws the moments that follow again");
        Ok(Self(fastrand::Rng::with_seed(seed)))
    }

    /// Kills a daemon within this time, and starts it again. Answers when it was.
    ///
    /// # Errors
    /// If it does not run, or does not come up.
    pub async fn strike(&mut self, lab: &Lab, daemon: Daemon, within: Duration) -> anyhow::Result<Duration> {
        let most = u64::try_from(within.as_millis())?;
        let moment = Duration::from_millis(self.0.u64(..=most));
        // The moment is what is varied here; nothing is waited for.
        tokio::time::sleep(moment).await;
        lab.signal(daemon, Signal::SIGKILL).await?;
        lab.start(daemon).await?;
        println!("{daemon:?} died after {moment:?}");
        Ok(moment)
    }
}
