//! Makes the passes over the plan that runs, and takes the samples of what VMs use.
//!
//! A task of the controller. It looks every second while a plan runs, and every five minutes otherwise.

use std::time::Duration;

use dalgu_proto::ids::PlanId;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    advance::{Pass, advance},
    look::measure,
    usage::{SAMPLE, Usage},
};
use crate::{
    model::PlanState,
    placement::Policy,
    state::{Db, State},
};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// Which host is best.
    pub policy: Policy,
    /// What VMs have used.
    pub usage: Usage,
}

impl Runner {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        // Cancel safe: what was stored is stored.
        stop.run_until_cancelled(futures::future::join(self.watch(), self.work()))
            .await;
    }

    async fn watch(&self) {
        let mut tick = interval(SAMPLE);
        loop {
            tick.tick().await;
            self.usage.sample(&self.db.snapshot());
        }
    }

    async fn work(&self) {
        let mut changes = self.db.watch();
        loop {
            let state = changes.borrow_and_update().clone();
            let Some(plan) = running(&state) else {
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            };
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_none() && state.replaced_by.is_none() {
                let pass = self.db.change(|tx| advance(tx, plan, self.policy, None)).await;
                if pass == Pass::Last {
                    let site = measure(&self.db, &self.usage).await;
                    self.db
                        .change(|tx| advance(tx, plan, self.policy, Some(site)))
                        .await;
                }
            }
            drop(state);
            sleep(LOOK).await;
        }
    }
}

fn running(state: &State) -> Option<PlanId> {
    let plans = state.plans.values().rev();
    let mut running = plans.filter(|plan| plan.state == PlanState::Running);
    running.next().map(|plan| plan.id)
}
