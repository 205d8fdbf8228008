//! Tells hosts to take and to remove backups, stores how these end, and begins those that are due.
//!
//! A task of the controller. It looks once a second as long as a backup is open, and every ten seconds at the schedules. A
//! command that is lost is given again, since the record says what is missing. Only hosts that are heard from are told anything,
//! and nobody while the controller only observes.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use dalgu_proto::ids::{BackupId, HostName};
use futures::{StreamExt as _, stream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{descendants, plan};
use crate::{
    agent_client::{self, Agents},
    hosts,
    model::{BackupKind, BackupMade, BackupRecord, BackupStanding, BackupState, Code, Fault, HostState},
    state::{Db, State, Tx},
    verbs,
    volumes::pool_of,
};

/// Time between two looks at what is open.
const LOOKS: Duration = Duration::from_secs(1);
/// Looks between two at the schedules.
const SCHEDULE_LOOKS: u32 = 10;
/// Commands under way at once.
const AT_ONCE: usize = 16;
/// A command that was not carried out is given again after this.
const PAUSE: Duration = Duration::from_secs(10);
/// Backups that are no longer kept are condemned so many at a time.
const EXPIRED_AT_ONCE: usize = 100;

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
}

/// What a host answered.
enum Answer {
    Stands(BackupStanding),
    Removed,
}

type Outcome = (BackupId, Result<Answer, agent_client::Error>);

impl Runner {
    /// Runs until `stop`. Commands under way are given up then: they are given again at the next start.
    pub async fn run(self, stop: CancellationToken) {
        let mut pauses = BTreeMap::new();
        let mut looks = 0_u32;
        let mut tick = tokio::time::interval(LOOKS);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Cancel safe: a tick that is lost comes again.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            looks = looks.wrapping_add(1);
            let state = self.db.snapshot();
            if state.meta.observing.is_some() || state.replaced_by.is_some() {
                continue;
            }
            if looks.is_multiple_of(SCHEDULE_LOOKS) {
                self.keep_schedules(&state).await;
            }
            let state = self.db.snapshot();
            if !state.open_backups.is_empty()
                && stop
                    .run_until_cancelled(self.look(state, &mut pauses))
                    .await
                    .is_none()
            {
                return;
            }
        }
    }

    /// Begins what is due, and condemns what is not kept.
    async fn keep_schedules(&self, state: &State) {
        let now = self.db.now();
        for due in plan::due(state, now) {
            let begun = self.db.transact(|tx| verbs::backup::scheduled(tx, &due)).await;
            if let Err(error) = begun {
                tracing::warn!(schedule = %due.schedule, vm = %due.vm, %error, "a backup that is due waits");
            }
        }
        if plan::expired(state, now).is_empty() {
            return;
        }
        self.db
            .change(|tx| {
                let expired = plan::expired(tx, tx.now());
                for id in expired.into_iter().take(EXPIRED_AT_ONCE) {
                    verbs::backup::condemn(tx, id, "no longer kept by its schedule");
                }
            })
            .await;
    }

    async fn look(&self, state: Arc<State>, pauses: &mut BTreeMap<BackupId, Instant>) {
        let now = Instant::now();
        pauses.retain(|_, until| *until > now);
        let open = state.open_backups.iter().filter_map(|id| state.backups.get(id));
        let due: Vec<_> = open
            .filter(|backup| !pauses.contains_key(&backup.id))
            .cloned()
            .collect();
        let asked = due.iter().filter_map(|backup| {
            let host = told(&state, backup)?;
            (hosts::state_of(&state, &host) == HostState::Ready).then_some((host, backup))
        });
        let calls = asked.map(|(host, backup)| self.ask(&state, host, backup));
        let answers: Vec<Outcome> = stream::iter(calls.collect::<Vec<_>>())
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        for (id, outcome) in answers {
            if let Err(error) = &outcome {
                tracing::warn!(backup = %id, %error, "a command about a backup was not carried out");
                pauses.insert(id, Instant::now() + PAUSE);
            }
            self.db.change(|tx| note(tx, id, outcome)).await;
        }
        self.db
            .change(|tx| {
                for backup in &due {
                    without_host(tx, backup.id);
                }
            })
            .await;
    }

    async fn ask(&self, state: &State, host: HostName, backup: &BackupRecord) -> Outcome {
        let agents = &self.agents;
        let answer = match backup.state {
            BackupState::Pending => agents.start_backup(state, &host, backup).await,
            BackupState::Deleting => {
                let removed = agents.remove_backup(state, &host, backup).await;
                return (backup.id, removed.map(|()| Answer::Removed));
            }
            _ => agents.backup(state, &host, backup).await,
        };
        (backup.id, answer.map(Answer::Stands))
    }
}

/// The host that is told something of a backup; `None` where nothing is to be said yet.
fn told(state: &State, backup: &BackupRecord) -> Option<HostName> {
    if backup.state != BackupState::Deleting {
        return Some(backup.host.clone());
    }
    // Those that need it go first.
    if !descendants(state, backup.id).is_empty() {
        return None;
    }
    let ready = |host: &HostName| hosts::state_of(state, host) == HostState::Ready;
    let there = state.hosts.contains_key(&backup.host);
    // Of one that is not whole, only its own host knows what is left.
    let whole = backup.complete_time.is_some() && backup.error.is_none();
    let others = backup.shared && (!there || whole);
    if there && (!others || ready(&backup.host)) {
        return Some(backup.host.clone());
    }
    let sees = |host: &&HostName| has_shared(state, host, &backup.pool) && ready(host);
    state.hosts.keys().filter(|_| others).find(sees).cloned()
}

/// Whether a host has a pool, and all see the same files in it.
fn has_shared(state: &State, host: &HostName, pool: &str) -> bool {
    pool_of(state, host, pool).is_some_and(|known| known.shared && known.error.is_none())
}

/// Ends what a host was to do that is no longer of the site.
fn without_host(tx: &mut Tx, id: BackupId) {
    let Some(backup) = tx.backups.get(&id).cloned() else {
        return;
    };
    if tx.hosts.contains_key(&backup.host) {
        return;
    }
    if backup.is_under_way() {
        let message = format!("host {} is no longer of the site", backup.host);
        failed(
            tx,
            (*backup).clone(),
            Fault::new(Code::FailedPrecondition, "HOST_NOT_FOUND", message),
        );
    } else if backup.state == BackupState::Deleting && !backup.shared && descendants(tx, id).is_empty() {
        let message = format!(
            "host {} is no longer of the site; what is there stays there",
            backup.host
        );
        tx.backup_event(&backup, "BackupDeleted", &message);
        tx.delete_backup(id);
    }
}

fn failed(tx: &mut Tx, backup: BackupRecord, fault: Fault) {
    let message = format!("{}: {}", fault.reason, fault.message);
    tx.backup_event(&backup, "BackupFailed", &message);
    tx.put_backup(BackupRecord {
        state: BackupState::Failed,
        parent: None,
        error: Some(fault),
        complete_time: Some(tx.now()),
        ..backup
    });
}

/// Stores what a host answered, unless it has been overtaken.
fn note(tx: &mut Tx, id: BackupId, outcome: Result<Answer, agent_client::Error>) {
    let Some(backup) = tx.backups.get(&id).map(|backup| (**backup).clone()) else {
        return;
    };
    match outcome {
        Err(error) => {
            if let Some(by) = error.replaced() {
                tx.set_replaced(by);
            }
            if let Some(fault) = error.refusal().filter(|_| backup.state == BackupState::Pending) {
                failed(tx, backup, fault);
            }
        }
        Ok(Answer::Removed) if backup.state == BackupState::Deleting => {
            tx.backup_event(&backup, "BackupDeleted", "its files are gone");
            tx.delete_backup(id);
        }
        Ok(Answer::Stands(standing)) if backup.is_under_way() => stands(tx, backup, standing),
        Ok(_) => {}
    }
}

fn stands(tx: &mut Tx, backup: BackupRecord, standing: BackupStanding) {
    match standing {
        BackupStanding::Waiting => {}
        BackupStanding::Unknown if backup.state == BackupState::Pending => {}
        BackupStanding::Unknown => {
            let message = format!("host {} knows nothing of it any more", backup.host);
            failed(tx, backup, Fault::new(Code::Aborted, "BACKUP_LOST", message));
        }
        BackupStanding::Failed(fault) => failed(tx, backup, fault),
        BackupStanding::Running(done, total) => {
            tx.note_backup_progress(backup.id, done, total);
            if backup.state == BackupState::Pending {
                tx.put_backup(BackupRecord {
                    state: BackupState::Running,
                    ..backup
                });
            }
        }
        BackupStanding::Ready(made) => ready(tx, backup, *made),
    }
}

fn ready(tx: &mut Tx, backup: BackupRecord, made: BackupMade) {
    let backup = BackupRecord {
        state: BackupState::Available,
        kind: match made.parent {
            Some(_) => BackupKind::Incremental,
            None => BackupKind::Full,
        },
        parent: made.parent,
        full_reason: made.full_reason,
        quiesced: made.quiesced,
        checkpoint: made.checkpoint,
        files: made.files,
        point_time: made.point_time,
        complete_time: Some(tx.now()),
        ..backup
    };
    let what = match (&backup.parent, backup.full_reason.as_str()) {
        (Some(parent), _) => format!("whole; holds what has changed since {parent}"),
        (None, "") => "whole".to_owned(),
        (None, why) => format!("whole; full, since {why}"),
    };
    tx.backup_event(&backup, "BackupAvailable", &what);
    tx.put_backup(backup);
}
