//! Tells hosts what they must know of networks.
//!
//! A task of the controller. It wakes when something has changed that a host must know ([`Db::network_changes`]), and makes
//! documents for those hosts alone. One command at a time to each host, each with a deadline, and a pause after one that was
//! not carried out. Only hosts that are heard from are told anything, and nobody while the controller only observes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use dalgu_proto::ids::HostName;
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use super::plan;
use crate::{
    agent_client::{self, Agents},
    model::HostState,
    state::{Db, State},
};

/// Least time between two looks: what changes together is told together.
const PAUSE: Duration = Duration::from_millis(20);
/// A host that could not do as it was told is told again after this; the pause doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Hosts that are told at once: a change of a network that all have is told to all.
const AT_ONCE: usize = 64;

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
}

/// When a host may be told again.
struct Pause {
    until: Instant,
    length: Duration,
}

/// What a host was told: which one, the run of its agent, and the version.
struct Told {
    host: HostName,
    run_id: String,
    version: u64,
    outcome: Result<(), agent_client::Error>,
}

impl Runner {
    /// Runs until `stop`. Commands under way are given up then: they are given again at the next start.
    pub async fn run(self, stop: CancellationToken) {
        let mut changes = self.db.network_changes();
        changes.mark_changed();
        let mut calls: JoinSet<Told> = JoinSet::new();
        let mut busy = BTreeSet::<HostName>::new();
        let mut pauses = BTreeMap::<HostName, Pause>::new();
        let mut next = Instant::now();
        loop {
            let again = pauses.values().map(|pause| pause.until).min();
            // Cancel safe: an answer is taken whole or stays in the set; a change that was not looked at is still one.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(ended) = calls.join_next(), if !calls.is_empty() => {
                    let told = match ended {
                        Ok(told) => told,
                        Err(error) => std::panic::resume_unwind(error.into_panic()),
                    };
                    busy.remove(&told.host);
                    self.ended(told, &mut pauses).await;
                    continue;
                }
                going_on = due(&mut changes, next, again) => if !going_on {
                    break;
                },
            }
            next = Instant::now() + PAUSE;
            let state = self.db.snapshot();
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_some() || state.replaced_by.is_some() {
                pauses.clear();
                continue;
            }
            self.tell(&state, &mut calls, &mut busy, &mut pauses);
        }
        calls.shutdown().await;
    }

    /// Tells those who must know something new, as far as there are places.
    fn tell(
        &self,
        state: &Arc<State>,
        calls: &mut JoinSet<Told>,
        busy: &mut BTreeSet<HostName>,
        pauses: &mut BTreeMap<HostName, Pause>,
    ) {
        let due = plan::due(state);
        let wanted: BTreeSet<_> = due.iter().map(|(host, _)| host).collect();
        // Whoever falls silent is told when it is heard again, which is a change.
        pauses.retain(|host, _| wanted.contains(host));
        let now = Instant::now();
        for (host, _) in due {
            let paused = pauses.get(&host).is_some_and(|pause| pause.until > now);
            if paused || busy.contains(&host) || busy.len() >= AT_ONCE {
                // Looked at again after the pause, or when an answer has come, which is a change.
                continue;
            }
            let Some(run_id) = run_of(state, &host) else {
                continue;
            };
            busy.insert(host.clone());
            let (agents, state) = (self.agents.clone(), state.clone());
            calls.spawn(async move {
                let document = plan::document(&state, &host);
                let version = document.version;
                let outcome = agents.apply_networks(&state, &host, document).await;
                Told {
                    host,
                    run_id,
                    version,
                    outcome,
                }
            });
        }
    }

    async fn ended(&self, told: Told, pauses: &mut BTreeMap<HostName, Pause>) {
        let Told {
            host,
            run_id,
            version,
            outcome,
        } = told;
        let Err(error) = outcome else {
            pauses.remove(&host);
            return self
                .db
                .change(|tx| tx.networks_taken(&host, &run_id, version))
                .await;
        };
        let length = pauses.get(&host).map_or(FIRST_PAUSE, |pause| pause.length * 2);
        let length = length.min(MAX_PAUSE);
        tracing::warn!(%host, %error, again_in_ms = length.as_millis(), "a host was not told of its networks");
        let until = Instant::now() + length;
        pauses.insert(host, Pause { until, length });
        self.db
            .change(|tx| {
                if let Some(by) = error.replaced() {
                    tx.set_replaced(by);
                }
                // Another host may have waited for the place.
                tx.touch_networks();
            })
            .await;
    }
}

/// The run of an agent that is heard from.
fn run_of(state: &State, host: &HostName) -> Option<String> {
    let live = state.live.get(host)?;
    (live.state == HostState::Ready).then(|| live.run_id.clone())
}

/// Waits for a change, or, where somebody is to be told again, until then; not before `from`. Whether the state still changes:
/// it does not when its store has failed.
async fn due(changes: &mut watch::Receiver<u64>, from: Instant, again: Option<Instant>) -> bool {
    tokio::time::sleep_until(from).await;
    match again {
        Some(again) => {
            let changed = tokio::time::timeout_at(again, changes.changed()).await;
            !matches!(changed, Ok(Err(_)))
        }
        None => changes.changed().await.is_ok(),
    }
}
