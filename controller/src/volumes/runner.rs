//! Has the files of deleted volumes removed once their grace period is over.
//!
//! A task of the controller. It looks once a second while there is a deleted volume, and sleeps otherwise. Before a host is told
//! anything the record says so: from then on the deletion is not taken back, since a command may be late. A host is told again and
//! again until it has done it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use dalgu_proto::ids::{HostName, VolumeName};
use futures::StreamExt as _;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{holder, is_shared, pinned_to};
use crate::{
    agent_client::{self, Agents},
    hosts,
    model::{HostState, VolumeRecord},
    state::{Db, State, Tx},
};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A host that could not do as it was told is told again after this; the pause doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Hosts that are told at once.
const AT_ONCE: usize = 16;

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
}

/// What is to be done about a volume whose time is over.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Nothing of it can be anywhere that is reached.
    Forget(&'static str),
    /// This host removes its file.
    Tell(HostName),
    /// Its host is not heard from.
    Wait,
}

impl Runner {
    /// Runs until `stop`. Commands under way are given up then: they are given again at the next start.
    pub async fn run(self, stop: CancellationToken) {
        // Cancel safe: what was stored is stored, and a host is told again.
        stop.run_until_cancelled(self.work()).await;
    }

    async fn work(self) {
        let mut changes = self.db.watch();
        let mut pauses = BTreeMap::<VolumeName, (Instant, Duration)>::new();
        loop {
            let state = changes.borrow_and_update().clone();
            if state.deleted_volumes.is_empty() {
                pauses.clear();
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_none() && state.replaced_by.is_none() {
                self.purge(&state, &mut pauses).await;
            }
            drop(state);
            sleep(LOOK).await;
        }
    }

    async fn purge(&self, state: &State, pauses: &mut BTreeMap<VolumeName, (Instant, Duration)>) {
        pauses.retain(|name, _| state.deleted_volumes.contains(name));
        let paused = |name: &VolumeName| pauses.get(name).is_some_and(|(until, _)| *until > Instant::now());
        let due = due(state, self.db.now()).filter(|volume| !paused(&volume.name));
        let due: Vec<_> = due.map(|volume| (**volume).clone()).collect();
        let ended = futures::stream::iter(due)
            .map(|volume| async {
                let outcome = self.purge_one(state, &volume).await;
                (volume.name, outcome)
            })
            .buffer_unordered(AT_ONCE);
        let ended: Vec<_> = ended.collect().await;
        for (name, outcome) in ended {
            let Err(error) = outcome else {
                pauses.remove(&name);
                continue;
            };
            let length = pauses.get(&name).map_or(FIRST_PAUSE, |(_, length)| *length * 2);
            let length = length.min(MAX_PAUSE);
            tracing::warn!(volume = %name, %error, again_in_ms = length.as_millis(), "a volume's file was not removed yet");
            if let Some(by) = error.replaced() {
                self.db.change(|tx| tx.set_replaced(by)).await;
            }
            pauses.insert(name, (Instant::now() + length, length));
        }
    }

    async fn purge_one(&self, state: &State, volume: &VolumeRecord) -> Result<(), agent_client::Error> {
        let why = match step(state, volume) {
            Step::Wait => return Ok(()),
            Step::Forget(why) => why,
            Step::Tell(host) => {
                if !self.db.change(|tx| begin(tx, volume)).await {
                    return Ok(());
                }
                self.agents
                    .delete_volume(state, &host, volume.id, &volume.pool)
                    .await?;
                "its file is removed"
            }
        };
        self.db.change(|tx| forget(tx, volume, why)).await;
        Ok(())
    }
}

/// Deleted volumes whose time is over.
fn due(state: &State, now: Timestamp) -> impl Iterator<Item = &Arc<VolumeRecord>> {
    let deleted = state
        .deleted_volumes
        .iter()
        .filter_map(|name| state.volumes.get(name));
    deleted.filter(move |volume| volume.purging || volume.purge_time.is_none_or(|time| time <= now))
}

fn step(state: &State, volume: &VolumeRecord) -> Step {
    let ready = |host: &HostName| hosts::state_of(state, host) == HostState::Ready;
    let Some(host) = &volume.host else {
        return Step::Forget("its file was never made");
    };
    if pinned_to(state, volume).is_some() {
        return match state.hosts.contains_key(host) {
            false => Step::Forget("its host is not of this site any more, and its file is left there"),
            true if ready(host) => Step::Tell(host.clone()),
            true => Step::Wait,
        };
    }
    let mut all = [host].into_iter().chain(state.hosts.keys());
    let other = all.find(|host| is_shared(state, host, &volume.pool) && ready(host));
    other.map_or(Step::Wait, |host| Step::Tell(host.clone()))
}

/// The volume as it is now, if its deletion still stands.
fn still(tx: &Tx, volume: &VolumeRecord) -> Option<VolumeRecord> {
    let now = tx.volumes.get(&volume.name)?;
    let stands = now.id == volume.id && now.delete_time.is_some() && holder(tx, now.id).is_none();
    stands.then(|| (**now).clone())
}

/// Stores that a host is told. Whether it may be.
fn begin(tx: &mut Tx, volume: &VolumeRecord) -> bool {
    let Some(now) = still(tx, volume) else {
        return false;
    };
    if now.host != volume.host {
        return false;
    }
    if !now.purging {
        tx.put_volume(VolumeRecord { purging: true, ..now });
    }
    true
}

fn forget(tx: &mut Tx, volume: &VolumeRecord, why: &str) {
    if let Some(now) = still(tx, volume) {
        tx.volume_event(&now.name, "VolumePurged", why);
        tx.delete_volume(&now.name);
    }
}
