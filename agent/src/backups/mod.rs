//! The backups that this host was told to take: one after the other, each written down before it is begun.
//!
//! ```text
//!   told ──ledger──> Waiting ──ledger──> Running ── whole ──> (the pool's manifest says so; the ledger forgets it)
//!                       └───────────────────┴─ not taken: what there is of it is removed ──> Failed
//! ```
//!
//! [`Backups`] is how the rest of the agent speaks to it: [`server`] for the controller, one task that does the work. A backup
//! that was under way when the agent died is ended and removed at the next start, unless it was whole; it is not begun again by
//! itself, since its moment has passed. What was removed is not taken any more, whenever the order for it comes. Decides nothing
//! about which backups there are to be.

pub mod server;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dalgu_proto::{ids::BackupId, time::Clock};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    hypervisor::{
        self, Hypervisor,
        backup::{Manifest, Order},
    },
    ledger::{self, Ledger},
    vm::status::Failure,
};

/// First wait before what is left of a backup is removed again; doubles up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(60);
/// What was removed is remembered so long, to refuse an order to take it that comes late.
const REMEMBER: SignedDuration = SignedDuration::from_hours(24);

/// Why a request about a backup failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The ledger failed; nothing was done.
    #[error("the request could not be written down")]
    Ledger(#[from] ledger::Error),
    /// The hypervisor failed.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// What is left of it is being removed.
    #[error("the backup is being given up: ask again")]
    Busy,
}

/// How far a backup is that is not whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Phase {
    /// Others are first.
    Waiting,
    /// It is taken, or what is left of it is removed.
    Running,
    /// It was not taken.
    Failed {
        /// Stable reason.
        reason: String,
        /// For people.
        message: String,
        /// When.
        since: Timestamp,
    },
}

/// A backup in the ledger: until it is whole, or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What was asked for.
    pub order: Order,
    /// How far it is.
    pub phase: Phase,
}

/// Backups that were removed here lately, and when.
pub type Removed = BTreeMap<BackupId, Timestamp>;

/// How a backup stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Standing {
    /// Nothing of it is here.
    Unknown,
    /// Others are first.
    Waiting,
    /// So many bytes are copied, of so many.
    Running(u64, u64),
    /// Whole.
    Ready(Box<Manifest>),
    /// Not taken.
    Failed(Failure),
}

struct Known {
    entry: Entry,
    /// Ends it.
    cut: CancellationToken,
}

struct Shared {
    hypervisor: Arc<dyn Hypervisor>,
    ledger: Ledger,
    clock: Clock,
    known: Mutex<BTreeMap<BackupId, Known>>,
    /// Held from a look at how far a backup is to the record of what follows: two orders about one may come at once.
    deciding: tokio::sync::Mutex<Removed>,
    told: Notify,
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Backups(Arc<Shared>);

impl Backups {
    /// With what the ledger has of them. Nothing is done before [`Backups::run`].
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        ledger: Ledger,
        clock: Clock,
        entries: Vec<Entry>,
        removed: Removed,
    ) -> Self {
        let known = entries.into_iter().map(|entry| {
            let cut = CancellationToken::new();
            (entry.order.id, Known { entry, cut })
        });
        Self(Arc::new(Shared {
            hypervisor,
            ledger,
            clock,
            known: Mutex::new(known.collect()),
            deciding: tokio::sync::Mutex::new(removed),
            told: Notify::new(),
        }))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<BackupId, Known>> {
        // What is changed under the lock is whole after each statement, so a panic elsewhere does not spoil it.
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, id: BackupId) -> Option<Entry> {
        self.known().get(&id).map(|known| known.entry.clone())
    }

    async fn put(&self, entry: Entry) -> Result<(), ledger::Error> {
        self.0.ledger.save_backup(&entry).await?;
        let mut known = self.known();
        let id = entry.order.id;
        match known.get_mut(&id) {
            Some(known) => known.entry = entry,
            None => {
                let cut = CancellationToken::new();
                known.insert(id, Known { entry, cut });
            }
        }
        Ok(())
    }

    async fn forget(&self, id: BackupId) -> Result<(), ledger::Error> {
        self.0.ledger.remove_backup(id).await?;
        self.known().remove(&id);
        Ok(())
    }

    /// Writes down that a backup is to be taken, unless it is known or there. One that was removed is not taken.
    ///
    /// # Errors
    /// If it is not certain to be known after a restart.
    pub async fn start(&self, order: Order) -> Result<Standing, Error> {
        let (id, pool) = (order.id, order.pool.clone());
        // A pool that hangs holds up nobody else.
        let standing = self.standing(id, &pool).await?;
        let removed = self.0.deciding.lock().await;
        if let Some(since) = removed.get(&id) {
            return Ok(Standing::Failed(Failure {
                reason: "BACKUP_REMOVED".to_owned(),
                message: "it was removed here before the order to take it came: take another".to_owned(),
                retrying: false,
                since: *since,
            }));
        }
        if standing != Standing::Unknown {
            return Ok(standing);
        }
        // The same order may have come twice.
        if self.entry(id).is_none() {
            self.put(Entry {
                order,
                phase: Phase::Waiting,
            })
            .await?;
            self.0.told.notify_one();
        }
        Ok(Standing::Waiting)
    }

    /// How a backup stands.
    ///
    /// # Errors
    /// If the pool cannot be read.
    pub async fn standing(&self, id: BackupId, pool: &str) -> Result<Standing, Error> {
        let Some(entry) = self.entry(id) else {
            let found = self.0.hypervisor.backup(pool, id).await?;
            return Ok(found.map_or(Standing::Unknown, |found| Standing::Ready(Box::new(found))));
        };
        Ok(match entry.phase {
            Phase::Waiting => Standing::Waiting,
            Phase::Running => {
                // How far it is matters to nobody so much that an answer should fail for it.
                let progress = self.0.hypervisor.backup_progress(entry.order.vm).await;
                let (done, total) = progress.ok().flatten().unwrap_or_default();
                Standing::Running(done, total)
            }
            Phase::Failed {
                reason,
                message,
                since,
            } => Standing::Failed(Failure {
                reason,
                message,
                retrying: false,
                since,
            }),
        })
    }

    /// Gives a backup up that is not whole.
    ///
    /// # Errors
    /// If it is not certain to be given up after a restart.
    pub async fn cancel(&self, id: BackupId) -> Result<(), Error> {
        let _deciding = self.0.deciding.lock().await;
        self.give_up(id).await
    }

    /// As [`Self::cancel`], by whoever decides.
    async fn give_up(&self, id: BackupId) -> Result<(), Error> {
        let Some(entry) = self.entry(id) else {
            return Ok(());
        };
        match entry.phase {
            Phase::Waiting => {
                let phase = self.failed("CANCELLED", "it was given up before it had begun".to_owned());
                self.put(Entry { phase, ..entry }).await?;
            }
            Phase::Running => {
                if let Some(known) = self.known().get(&id) {
                    known.cut.cancel();
                }
            }
            Phase::Failed { .. } => {}
        }
        Ok(())
    }

    /// Removes what is here of a backup.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is given up; otherwise if something may be left.
    pub async fn remove(&self, order: &Removal) -> Result<(), Error> {
        {
            let mut removed = self.0.deciding.lock().await;
            self.remember(&mut removed, order.id).await?;
            self.give_up(order.id).await?;
        }
        if matches!(self.entry(order.id), Some(entry) if entry.phase == Phase::Running) {
            return Err(Error::Busy);
        }
        let hypervisor = &self.0.hypervisor;
        hypervisor.remove_backup(order.vm, &order.pool, order.id).await?;
        Ok(self.forget(order.id).await?)
    }

    /// Writes down that a backup is removed, before anything of it is.
    async fn remember(&self, removed: &mut Removed, id: BackupId) -> Result<(), ledger::Error> {
        if removed.contains_key(&id) {
            return Ok(());
        }
        let now = self.0.clock.now();
        let mut next = removed.clone();
        next.retain(|_, since| now.duration_since(*since) <= REMEMBER);
        next.insert(id, now);
        self.0.ledger.save_removed_backups(&next).await?;
        *removed = next;
        Ok(())
    }

    fn failed(&self, reason: &str, message: String) -> Phase {
        Phase::Failed {
            reason: reason.to_owned(),
            message,
            since: self.0.clock.now(),
        }
    }

    /// Takes the backups, one after the other, until `stop`. What is under way then is undone at the next start.
    pub async fn run(&self, stop: CancellationToken) {
        let work = async {
            let broken_off = self.next(&Phase::Running);
            for entry in broken_off {
                let id = entry.order.id;
                let message = "the agent was restarted while it was taken: take it again".to_owned();
                self.ended(entry, Err(self.failed("AGENT_RESTARTED", message)))
                    .await;
                tracing::warn!(backup = %id, "a backup was broken off by the end of the agent");
            }
            loop {
                match self.next(&Phase::Waiting).into_iter().next() {
                    Some(entry) => self.take(entry).await,
                    None => self.0.told.notified().await,
                }
            }
        };
        stop.run_until_cancelled(Box::pin(work)).await;
    }

    fn next(&self, phase: &Phase) -> Vec<Entry> {
        let known = self.known();
        let entries = known.values().map(|known| &known.entry);
        entries.filter(|entry| entry.phase == *phase).cloned().collect()
    }

    /// Writes down that a backup is begun. Whether it is: it may have been given up.
    async fn begin(&self, entry: &Entry) -> Result<bool, ledger::Error> {
        let _deciding = self.0.deciding.lock().await;
        let waits = self
            .entry(entry.order.id)
            .is_some_and(|entry| entry.phase == Phase::Waiting);
        if waits {
            self.put(entry.clone()).await?;
        }
        Ok(waits)
    }

    async fn take(&self, entry: Entry) {
        let entry = Entry {
            phase: Phase::Running,
            ..entry
        };
        let id = entry.order.id;
        match self.begin(&entry).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::error!(backup = %id, %error, "a backup cannot be written down, and is not begun");
                sleep(FIRST_RETRY).await;
                return;
            }
        }
        let cut = self.known().get(&id).map(|known| known.cut.clone());
        let taking = self.0.hypervisor.back_up(&entry.order);
        let taken = match cut {
            Some(cut) => cut.run_until_cancelled(taking).await,
            None => return,
        };
        let outcome = match taken {
            Some(Ok(manifest)) => {
                tracing::info!(backup = %id, vm = %entry.order.vm, "a backup is whole");
                Ok(manifest)
            }
            Some(Err(error)) => {
                tracing::info!(backup = %id, vm = %entry.order.vm, %error, "a backup was not taken");
                Err(self.failed(error.reason(), error.to_string()))
            }
            None => Err(self.failed("CANCELLED", "it was given up".to_owned())),
        };
        self.ended(entry, outcome).await;
    }

    /// Undoes a backup that was not taken, and writes down how it ended, however long that takes.
    async fn ended(&self, entry: Entry, outcome: Result<Manifest, Phase>) {
        let mut retry = FIRST_RETRY;
        while let Err(error) = self.try_end(&entry, &outcome).await {
            tracing::warn!(
                backup = %entry.order.id, error = &error as &dyn std::error::Error,
                "what is left of a backup cannot be removed yet"
            );
            sleep(retry).await;
            retry = (retry * 2).min(MAX_RETRY);
        }
    }

    async fn try_end(&self, entry: &Entry, outcome: &Result<Manifest, Phase>) -> Result<(), Error> {
        let (hypervisor, order) = (&self.0.hypervisor, &entry.order);
        let Err(phase) = outcome else {
            return Ok(self.forget(order.id).await?);
        };
        // Its name is the last thing that it gets: the call may have failed after that.
        if hypervisor.backup(&order.pool, order.id).await?.is_some() {
            return Ok(self.forget(order.id).await?);
        }
        hypervisor.remove_backup(order.vm, &order.pool, order.id).await?;
        let phase = phase.clone();
        let order = order.clone();
        Ok(self.put(Entry { order, phase }).await?)
    }
}

/// A backup that is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The backup.
    pub id: BackupId,
    /// The VM.
    pub vm: dalgu_proto::ids::VmId,
    /// Pool of the files.
    pub pool: String,
}
