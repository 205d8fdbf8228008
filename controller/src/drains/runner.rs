//! Makes the passes over the drains of the site.
//!
//! A task of the controller. It looks every second while a host is being drained, and sleeps otherwise. What it has done is in the
//! store; only the pauses of VMs that were refused are its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dalgu_proto::ids::{HostName, VmId};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::advance::{self, Limits};
use crate::{
    placement::Policy,
    state::{Db, State},
};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A VM that was refused is tried again after this.
const PAUSE: Duration = Duration::from_secs(10);
/// What one pass begins: a few moves at a time, so that what is placed later knows of the load that came by the first.
const LIMITS: Limits = Limits {
    under_way: 4,
    refusals: 4,
};

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// Which host is best.
    pub policy: Policy,
}

impl Runner {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        // Cancel safe: what was stored is stored.
        stop.run_until_cancelled(self.work()).await;
    }

    async fn work(self) {
        let mut changes = self.db.watch();
        let mut pauses = BTreeMap::<VmId, Instant>::new();
        loop {
            let state = changes.borrow_and_update().clone();
            let hosts = active(&state);
            if hosts.is_empty() {
                pauses.clear();
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_none() && state.replaced_by.is_none() {
                for host in hosts {
                    self.pass(&host, &mut pauses).await;
                }
            }
            drop(state);
            sleep(LOOK).await;
        }
    }

    async fn pass(&self, host: &HostName, pauses: &mut BTreeMap<VmId, Instant>) {
        let now = Instant::now();
        pauses.retain(|_, until| *until > now);
        let resting: BTreeSet<_> = pauses.keys().copied().collect();
        let refused = self
            .db
            .change(|tx| advance::advance(tx, host, self.policy, LIMITS, &resting))
            .await;
        pauses.extend(refused.into_iter().map(|vm| (vm, now + PAUSE)));
    }
}

fn active(state: &State) -> Vec<HostName> {
    let hosts = state.hosts.values();
    let active = hosts.filter(|host| host.drain.as_ref().is_some_and(|drain| drain.is_active()));
    active.map(|host| host.name.clone()).collect()
}
