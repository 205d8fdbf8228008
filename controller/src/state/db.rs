//! The one way to change the state: closures, one after the other, each durable before anybody sees it.
//!
//! ```text
//! transact(closure) ── pending state ──► queue ──► writer: commit many at once ──► published snapshot
//!     (serial, under a short lock)     (bounded)     (one fsync)                          (what readers see)
//! ```
//!
//! A closure runs against the pending state, which may be ahead of the disk; the published snapshot never is. So
//! nothing that could be lost is ever shown or acted upon, and one fsync serves all who wait. A failed commit ends
//! everything: its outcome is unknown, so no later one may follow, and those who wait are never answered.
//!
//! The writer has a thread of its own in the program ([`Db::open`]); where a test holds the time, it is a task
//! ([`Db::open_as_task`]).

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use dalgu_proto::{
    ids::{ClusterId, NewIds, VmId},
    mutant::{self, Mutant},
    time::Clock,
};
use futures::future::BoxFuture;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use super::{Error, State, Tx, fleet::Fleet, load, refused::Refused, tx::EVENTS_KEPT};
use crate::store::{self, Batch, Image, Store};

/// Changes that may wait for the writer.
const QUEUE: usize = 1024;
/// Most changes written with one fsync.
const GROUP: usize = 256;

/// Is told which VMs want a look.
type Touched = Box<dyn Fn(&[VmId]) + Send + Sync>;

/// Is awaited before each commit of a writer that is a task, as a disk may let one wait.
pub type BeforeCommit = Box<dyn FnMut() -> BoxFuture<'static, ()> + Send>;

/// A writer, to be run as a task. Ends when the last [`Db`] is gone, or a commit has failed.
pub type Writing = BoxFuture<'static, ()>;

/// What the state works with, and who is told of what the writer does.
pub struct Hooks {
    /// VMs that want a look, after the change is durable.
    pub touched: Touched,
    /// How long a commit took.
    pub committed: Box<dyn Fn(Duration) + Send + Sync>,
    /// A commit failed: nothing may go on. In the program this ends the process.
    pub failed: Box<dyn Fn(&store::Error) + Send + Sync>,
    /// Events to keep; older ones are forgotten.
    pub events_kept: usize,
    /// The wall clock.
    pub clock: Clock,
    /// Where new ids come from.
    pub new_ids: NewIds,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            touched: Box::new(|_| {}),
            committed: Box::new(|_| {}),
            failed: Box::new(|_| {}),
            events_kept: EVENTS_KEPT,
            clock: Clock::system(),
            new_ids: NewIds::random(),
        }
    }
}

struct Commit {
    state: State,
    batch: Batch,
    touched: Vec<VmId>,
    done: oneshot::Sender<()>,
    /// Somebody wants the store looked through once this is durable.
    look: Option<oneshot::Sender<Vec<String>>>,
}

/// What the next change begins with.
struct Pending {
    state: State,
    refused: Refused,
    fleet: Fleet,
}

struct Inner {
    pending: Mutex<Pending>,
    queue: mpsc::Sender<Commit>,
    published: watch::Receiver<Arc<State>>,
    image_changes: watch::Receiver<u64>,
    network_changes: watch::Receiver<u64>,
    events_kept: usize,
    clock: Clock,
    new_ids: NewIds,
}

/// Handle to the state; see the module.
#[derive(Clone)]
pub struct Db(Arc<Inner>);

impl Db {
    /// Reads the store, raises the term, and starts the writer's thread. Nothing is served before the new term is on disk.
    pub fn open(mut store: impl Store, cluster_id: ClusterId, hooks: Hooks) -> Result<Self, Error> {
        let (state, term) = read(&mut store, cluster_id, &hooks)?;
        store.commit(&[term])?;
        let (db, writer) = Self::new(store, state, hooks);
        thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                // Without the writer every change would wait for ever, and nobody would see why.
                if catch_unwind(AssertUnwindSafe(|| writer.run())).is_err() {
                    tracing::error!("the store's thread failed, which is a defect; the controller ends");
                    std::process::abort();
                }
            })
            .map_err(Error::Thread)?;
        Ok(db)
    }

    /// As [`Db::open`], but the writer is a future for the caller to run beside the rest, and every commit, the term's
    /// too, waits for `before_commit` first. For stores that answer at once.
    pub async fn open_as_task(
        mut store: impl Store,
        cluster_id: ClusterId,
        hooks: Hooks,
        mut before_commit: BeforeCommit,
    ) -> Result<(Self, Writing), Error> {
        let (state, term) = read(&mut store, cluster_id, &hooks)?;
        before_commit().await;
        store.commit(&[term])?;
        let (db, writer) = Self::new(store, state, hooks);
        Ok((db, Box::pin(writer.run_as_task(before_commit))))
    }

    fn new<S: Store>(store: S, state: State, hooks: Hooks) -> (Self, Writer<S>) {
        let (publish, published) = watch::channel(Arc::new(state.clone()));
        let (publish_images, image_changes) = watch::channel(state.image_changes);
        let (publish_networks, network_changes) = watch::channel(state.network_changes);
        let (queue, commits) = mpsc::channel(QUEUE);
        let db = Self(Arc::new(Inner {
            pending: Mutex::new(Pending {
                state,
                refused: Refused::default(),
                fleet: Fleet::default(),
            }),
            queue,
            published,
            image_changes,
            network_changes,
            events_kept: hooks.events_kept,
            clock: hooks.clock.clone(),
            new_ids: hooks.new_ids.clone(),
        }));
        let writer = Writer {
            store,
            commits,
            publish,
            publish_images,
            publish_networks,
            hooks,
        };
        (db, writer)
    }

    /// The time by the wall clock.
    pub fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// The last durable state.
    pub fn snapshot(&self) -> Arc<State> {
        self.0.published.borrow().clone()
    }

    /// Follows the durable state. Tells of what was stored; what only memory holds is there, but no reason to wake.
    pub fn watch(&self) -> watch::Receiver<Arc<State>> {
        self.0.published.clone()
    }

    /// Follows [`State::image_changes`] of the durable state.
    pub fn image_changes(&self) -> watch::Receiver<u64> {
        self.0.image_changes.clone()
    }

    /// Follows [`State::network_changes`] of the durable state.
    pub fn network_changes(&self) -> watch::Receiver<u64> {
        self.0.network_changes.clone()
    }

    /// Changes the state: all that the closure did, or, when it returns an error, nothing. Returns when the change is
    /// durable and published; an error, when all is that the closure saw. Never returns when the store has failed: nobody
    /// knows the outcome then.
    ///
    /// The closure runs under a lock: it must not wait for anything.
    pub async fn transact<T, E>(&self, change: impl FnOnce(&mut Tx) -> Result<T, E>) -> Result<T, E> {
        let Ok(permit) = self.0.queue.reserve().await else {
            return std::future::pending().await;
        };
        let (done, durable) = oneshot::channel();
        let outcome = {
            // A panic in an earlier closure left the pending state as it was before it.
            let mut pending = self.0.pending.lock().unwrap_or_else(PoisonError::into_inner);
            let mut tx = Tx::new(
                pending.state.clone(),
                std::mem::take(&mut pending.refused),
                std::mem::take(&mut pending.fleet),
                self.now(),
                self.0.new_ids.clone(),
                self.0.events_kept,
            );
            let outcome = change(&mut tx);
            let (state, batch, touched, (refused, mut fleet)) = match outcome {
                Ok(_) => tx.finish(),
                // Nothing changes; but the reason may be a change that is not on disk yet, and may never be.
                Err(_) => (pending.state.clone(), Batch::default(), Vec::new(), tx.give_up()),
            };
            fleet.settle(&state, outcome.is_err());
            *pending = Pending {
                state: state.clone(),
                refused,
                fleet,
            };
            // Sent under the lock, so that the queue has the order of the changes.
            permit.send(Commit {
                state,
                batch,
                touched,
                done,
                look: None,
            });
            outcome
        };
        if mutant::on(Mutant::AnswerBeforeCommit) {
            return outcome;
        }
        match durable.await {
            Ok(()) => outcome,
            Err(_) => std::future::pending().await,
        }
    }

    /// Looks the store through: what is damaged there, and where its records are not those that the controller works with.
    /// Changes wait meanwhile. Never returns when the store has failed.
    pub async fn damage(&self) -> Vec<String> {
        let Ok(permit) = self.0.queue.reserve().await else {
            return std::future::pending().await;
        };
        let (done, _) = oneshot::channel();
        let (look, found) = oneshot::channel();
        {
            let pending = self.0.pending.lock().unwrap_or_else(PoisonError::into_inner);
            permit.send(Commit {
                state: pending.state.clone(),
                batch: Batch::default(),
                touched: Vec::new(),
                done,
                look: Some(look),
            });
        }
        match found.await {
            Ok(found) => found,
            Err(_) => std::future::pending().await,
        }
    }

    /// As [`Db::transact`], for a change that cannot fail.
    pub async fn change<T>(&self, change: impl FnOnce(&mut Tx) -> T) -> T {
        let outcome = self
            .transact(|tx| Ok::<_, std::convert::Infallible>(change(tx)))
            .await;
        match outcome {
            Ok(value) => value,
            Err(never) => match never {},
        }
    }
}

/// The state that the store holds, under a new term, and what makes that term durable.
fn read(store: &mut impl Store, cluster_id: ClusterId, hooks: &Hooks) -> Result<(State, Batch), Error> {
    let image = store.load()?;
    let loaded = load::state(&image, cluster_id)?;
    let mut tx = Tx::new(
        loaded,
        Refused::default(),
        Fleet::default(),
        hooks.clock.now(),
        hooks.new_ids.clone(),
        hooks.events_kept,
    );
    tx.raise_term();
    let (state, batch, ..) = tx.finish();
    Ok((state, batch))
}

struct Writer<S> {
    store: S,
    commits: mpsc::Receiver<Commit>,
    publish: watch::Sender<Arc<State>>,
    publish_images: watch::Sender<u64>,
    publish_networks: watch::Sender<u64>,
    hooks: Hooks,
}

impl<S: Store> Writer<S> {
    /// Until the last [`Db`] is gone, or a commit has failed.
    fn run(mut self) {
        let mut group = Vec::with_capacity(GROUP);
        while self.commits.blocking_recv_many(&mut group, GROUP) > 0 {
            if let Err(error) = self.commit(&mut group) {
                (self.hooks.failed)(&error);
                return;
            }
        }
    }

    /// As [`Writer::run`], giving way to other tasks where the thread would block.
    async fn run_as_task(mut self, mut before_commit: BeforeCommit) {
        let mut group = Vec::with_capacity(GROUP);
        while self.commits.recv_many(&mut group, GROUP).await > 0 {
            if group.iter().any(|commit| !commit.batch.is_empty()) {
                before_commit().await;
            }
            if let Err(error) = self.commit(&mut group) {
                (self.hooks.failed)(&error);
                return;
            }
        }
    }

    fn commit(&mut self, group: &mut Vec<Commit>) -> Result<(), store::Error> {
        let batches: Vec<_> = group
            .iter_mut()
            .map(|c| std::mem::take(&mut c.batch))
            .filter(|b| !b.is_empty())
            .collect();
        if !batches.is_empty() {
            let begin = Instant::now();
            self.store.commit(&batches)?;
            (self.hooks.committed)(begin.elapsed());
        }
        let mut touched = Vec::new();
        let mut waiting = Vec::with_capacity(group.len());
        let mut looks = Vec::new();
        let mut last = None;
        for commit in group.drain(..) {
            touched.extend(commit.touched);
            waiting.push(commit.done);
            looks.extend(commit.look);
            last = Some(commit.state);
        }
        if let Some(state) = last {
            let (images, networks) = (state.image_changes, state.network_changes);
            // Hundreds of heartbeats a second are nothing to wake all for who wait for a change.
            self.publish.send_if_modified(|published| {
                let stored = state.meta.revision != published.meta.revision;
                *published = Arc::new(state);
                stored
            });
            for (publish, number) in [(&self.publish_images, images), (&self.publish_networks, networks)] {
                publish.send_if_modified(|published| {
                    let before = std::mem::replace(published, number);
                    before != number
                });
            }
        }
        (self.hooks.touched)(&touched);
        for done in waiting {
            // Who no longer waits has gone away; the change stands.
            let _ = done.send(());
        }
        if !looks.is_empty() {
            let found = self.damage();
            for look in looks {
                // As above.
                let _ = look.send(found.clone());
            }
        }
        Ok(())
    }

    /// What is wrong with the store, which holds what was published last.
    fn damage(&mut self) -> Vec<String> {
        let damage = self.store.damage();
        let image = self.store.load();
        match (damage, image) {
            (Ok(mut found), Ok(image)) => {
                found.extend(differences(&image, &self.publish.borrow()));
                found
            }
            (Err(error), _) | (_, Err(error)) => vec![format!("it cannot be read: {error}")],
        }
    }
}

/// Where the records on disk are not those in memory.
fn differences(image: &Image, state: &State) -> Vec<String> {
    let disk = match load::state(image, state.meta.cluster_id) {
        Ok(disk) => disk,
        Err(error) => return vec![error.to_string()],
    };
    let differ = [
        ("VMs", disk.vms != state.vms),
        ("hosts", disk.hosts != state.hosts),
        ("operations", disk.operations != state.operations),
        ("migrations", disk.migrations != state.migrations),
        ("requests", disk.requests != state.requests),
        ("images", disk.images != state.images),
        ("networks", disk.networks != state.networks),
        ("security groups", disk.groups != state.groups),
        ("volumes", disk.volumes != state.volumes),
        ("backups", disk.backups != state.backups),
        ("backup schedules", disk.schedules != state.schedules),
        (
            "refused placements",
            disk.refused_placements != state.refused_placements,
        ),
        ("what VMs have used", disk.usage != state.usage),
        ("events", disk.events != state.events),
    ];
    let differ = differ.into_iter().filter(|(_, differs)| *differs);
    differ
        .map(|(what, _)| {
            format!("the records of {what} on disk are not those that the controller works with")
        })
        .collect()
}
