//! Takes VMs from the queue and makes a pass over each, many at once, one at a time for each VM.
//!
//! A task of the controller. A pass that fails comes again later, and later each time; every VM is looked at again
//! after a while even when nothing asks for it, so that a lost trigger costs time and nothing else.

use std::{sync::Arc, time::Duration};

use dalgu_proto::ids::{MigrationId, VmId};
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use super::{
    queue::Queue,
    step::{self, Next},
};
use crate::{agent_client::Agents, metrics::Metrics, model::Phase, state::Db};

/// Passes made at once.
const AT_ONCE: usize = 64;
/// Time in which every VM is looked at.
const RESYNC: Duration = Duration::from_secs(30);

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
    /// VMs that want a look.
    pub queue: Arc<Queue<VmId>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Runner {
    /// Runs until `stop`, then until the passes under way have ended.
    pub async fn run(self, stop: CancellationToken) {
        let passes = TaskTracker::new();
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let mut resync = tokio::time::interval(RESYNC);
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                break;
            };
            // Cancel safe: a key is taken only when it is returned; a tick that is lost comes again.
            let id = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = resync.tick() => {
                    self.add_all();
                    continue;
                }
                id = self.queue.next() => id,
            };
            let runner = self.clone();
            passes.spawn(async move {
                runner.pass(id).await;
                drop(place);
            });
        }
        passes.close();
        passes.wait().await;
    }

    /// Spreads all VMs over the time until the next round.
    fn add_all(&self) {
        let state = self.db.snapshot();
        let share = RESYNC / u32::try_from(state.vms.len().max(1)).unwrap_or(u32::MAX);
        let mut delay = Duration::ZERO;
        for id in state.vms.keys() {
            self.queue.add_after(*id, delay);
            delay += share;
        }
    }

    /// Counts a migration that this pass has brought to its end.
    fn count_move(&self, id: MigrationId) {
        let state = self.db.snapshot();
        let ended = state.migrations.get(&id);
        if let Some(ended) = ended.filter(|migration| migration.phase == Phase::Done) {
            self.metrics.moved(ended);
        }
    }

    async fn pass(&self, id: VmId) {
        let begin = Instant::now();
        let work = self.queue.work(id);
        let span = tracing::info_span!("reconcile", vm = %id);
        let moving = self.db.snapshot().active_migrations.get(&id).copied();
        let pass = step::pass(&self.db, &self.agents, id);
        let outcome = pass.instrument(span.clone()).await;
        if let Some(migration) = moving {
            self.count_move(migration);
        }
        self.metrics.pass(begin.elapsed(), outcome.is_ok());
        match outcome {
            Ok(Next::Now) => work.done(Some(Duration::ZERO)),
            Ok(Next::After(delay)) => work.done(Some(delay)),
            Ok(Next::Idle) => work.done(None),
            Err(error) => {
                if let Some(by) = error.replaced() {
                    self.db.change(|tx| tx.set_replaced(by)).await;
                }
                let delay = work.failed();
                let _entered = span.enter();
                if error.is_silence() {
                    tracing::info!(%error, again_in_ms = delay.as_millis(), "a host cannot be asked");
                } else {
                    tracing::warn!(%error, again_in_ms = delay.as_millis(), "a command was not carried out");
                }
            }
        }
    }
}
