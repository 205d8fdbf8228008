//! Threads for calls that block, with deadlines and bulkheads. Called by everything here that calls libvirt.
//!
//! A call that outlasts its deadline is given up by its caller, and its thread goes on until libvirt answers; that is
//! why threads are few. Each kind of call has its own: a domain that hangs can hold one thread of the changes, since
//! changes of one domain wait for each other; looking, statistics and powering off have others. Nothing here retries.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use dalgu_proto::ids::VmId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use crate::hypervisor::Error;

/// Calls that may be under way on one connection; libvirtd's default for `max_client_requests` is 5.
pub(super) const CALLS_PER_CONNECTION: usize = 4;
/// Connections for changes. Together 12 changes can hang before others must wait; libvirtd's own workers are 20.
pub(super) const CHANGE_CONNECTIONS: usize = 3;
/// Migrations under way at once, each with a thread and a connection of its own.
const MIGRATIONS: usize = 8;

/// Pieces of work on files at once: copies of images, and what hangs in a dead network file system.
const FILES: usize = 16;

/// What a call is, which decides what it may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Looks at domains; never waits for QEMU.
    Look,
    /// Collects statistics; may wait for QEMU.
    Stats,
    /// Changes a domain; may wait for QEMU.
    Change,
    /// Must get through whatever else hangs: powering off, migrations' progress and abort.
    Urgent,
    /// Sends a domain.
    Migrate,
    /// Works on files.
    Files,
}

const KINDS: usize = 6;

/// Limits of the threads.
#[derive(Debug)]
pub(super) struct Workers {
    slots: [Arc<Semaphore>; KINDS],
    free_changes: Arc<Mutex<Vec<usize>>>,
    domains: Mutex<HashMap<VmId, Weak<tokio::sync::Mutex<()>>>>,
    under_way: Arc<Mutex<HashMap<VmId, usize>>>,
}

/// Counts a call about a domain for as long as it is under way.
#[derive(Debug)]
struct UnderWay {
    id: VmId,
    counts: Arc<Mutex<HashMap<VmId, usize>>>,
}

impl UnderWay {
    fn new(id: VmId, counts: Arc<Mutex<HashMap<VmId, usize>>>) -> Self {
        *counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(id)
            .or_default() += 1;
        Self { id, counts }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}

/// The right to a thread; given back when the call has ended, not when its caller gave up.
#[derive(Debug)]
pub(super) struct Slot {
    /// Which of the connections for changes to use.
    pub(super) connection: usize,
    change: Option<(usize, Arc<Mutex<Vec<usize>>>)>,
    _permit: OwnedSemaphorePermit,
    _domain: Option<tokio::sync::OwnedMutexGuard<()>>,
    _under_way: Option<UnderWay>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some((number, free)) = self.change.take() {
            free.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        }
    }
}

impl Workers {
    pub(super) fn new() -> Self {
        let changes = CALLS_PER_CONNECTION * CHANGE_CONNECTIONS;
        let limit = |kind| match kind {
            Kind::Look | Kind::Stats | Kind::Urgent => CALLS_PER_CONNECTION,
            Kind::Files => FILES,
            Kind::Change => changes,
            Kind::Migrate => MIGRATIONS,
        };
        let kinds = [
            Kind::Look,
            Kind::Stats,
            Kind::Change,
            Kind::Urgent,
            Kind::Migrate,
            Kind::Files,
        ];
        Self {
            slots: kinds.map(|kind| Arc::new(Semaphore::new(limit(kind)))),
            free_changes: Arc::new(Mutex::new((0..changes).collect())),
            domains: Mutex::default(),
            under_way: Arc::default(),
        }
    }

    /// Whether a call about this domain is under way, also one that its caller has given up.
    pub(super) fn changing(&self, id: VmId) -> bool {
        let counts = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        counts.contains_key(&id)
    }

    fn domain(&self, id: VmId) -> Arc<tokio::sync::Mutex<()>> {
        let mut domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = domains.get(&id).and_then(Weak::upgrade) {
            return lock;
        }
        domains.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        domains.insert(id, Arc::downgrade(&lock));
        lock
    }

    async fn slot(&self, kind: Kind, about: Option<VmId>) -> Slot {
        // The domain first: whoever waits for a hung domain must not hold a thread meanwhile.
        let domain = match about {
            Some(id) if kind != Kind::Urgent => Some(self.domain(id).lock_owned().await),
            _ => None,
        };
        let permit = self.slots[kind as usize]
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let number = match kind {
            Kind::Change => self
                .free_changes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop(),
            _ => None,
        };
        Slot {
            connection: number.unwrap_or(0) % CHANGE_CONNECTIONS,
            change: number.map(|number| (number, self.free_changes.clone())),
            _permit: permit,
            _domain: domain,
            _under_way: about.map(|id| UnderWay::new(id, self.under_way.clone())),
        }
    }

    /// Runs a call on a thread of its own. `about` says which domain it changes: it waits for other such calls about the
    /// same domain, unless it is urgent. The deadline counts from now, waiting included.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        call: &'static str,
        kind: Kind,
        about: Option<VmId>,
        after: Duration,
        work: impl FnOnce(usize) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let answer = async {
            let slot = self.slot(kind, about).await;
            on_thread(call, slot, work).await
        };
        timeout(after, answer)
            .await
            .unwrap_or(Err(Error::Timeout { call, after }))
    }

    /// As [`Workers::run`] without a deadline.
    pub(super) async fn run_long<T: Send + 'static>(
        &self,
        call: &'static str,
        kind: Kind,
        work: impl FnOnce(usize) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let slot = self.slot(kind, None).await;
        on_thread(call, slot, work).await
    }
}

async fn on_thread<T: Send + 'static>(
    call: &'static str,
    slot: Slot,
    work: impl FnOnce(usize) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (send, receive) = oneshot::channel();
    let spawned = std::thread::Builder::new()
        .name(format!("libvirt-{call}"))
        .spawn(move || {
            let result = work(slot.connection);
            drop(slot);
            // The caller may have given up.
            let _ = send.send(result);
        });
    if let Err(error) = spawned {
        return Err(Error::Failed {
            call,
            code: 0,
            detail: format!("no thread for the call: {error}"),
        });
    }
    receive.await.unwrap_or_else(|_| {
        Err(Error::Failed {
            call,
            code: 0,
            detail: "the call panicked".into(),
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use uuid::Uuid;

    use super::*;

    const SOON: Duration = Duration::from_millis(100);
    const LATE: Duration = Duration::from_secs(20);

    fn id() -> VmId {
        VmId::from_uuid(Uuid::new_v4())
    }

    #[tokio::test]
    async fn a_hung_domain_delays_itself_alone() {
        let workers = Workers::new();
        let (hung, free) = (id(), id());
        let (release, wait) = mpsc::channel::<()>();
        let stuck = workers.run("pause", Kind::Change, Some(hung), SOON, move |_| {
            let _ = wait.recv();
            Ok(())
        });
        assert_eq!(
            stuck.await,
            Err(Error::Timeout {
                call: "pause",
                after: SOON
            })
        );
        let second = workers.run("resume", Kind::Change, Some(hung), SOON, |_| Ok(()));
        assert_eq!(
            second.await,
            Err(Error::Timeout {
                call: "resume",
                after: SOON
            })
        );
        assert_eq!(
            workers
                .run("pause", Kind::Change, Some(free), LATE, |_| Ok(()))
                .await,
            Ok(())
        );
        assert_eq!(
            workers.run("destroy", Kind::Urgent, None, LATE, |_| Ok(())).await,
            Ok(())
        );
        drop(release);
        assert_eq!(
            workers
                .run("pause", Kind::Change, Some(hung), LATE, |_| Ok(()))
                .await,
            Ok(())
        );
    }

    #[tokio::test]
    async fn a_call_that_its_caller_gave_up_is_under_way_until_it_ends() {
        let workers = Workers::new();
        let hung = id();
        for kind in [Kind::Change, Kind::Urgent] {
            let (release, wait) = mpsc::channel::<()>();
            let given_up = workers.run("start", kind, Some(hung), SOON, move |_| {
                let _ = wait.recv();
                Ok(())
            });
            given_up.await.unwrap_err();
            assert!(workers.changing(hung), "{kind:?}");
            assert!(!workers.changing(id()));
            drop(release);
            let ended = async {
                while workers.changing(hung) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(LATE, ended).await.expect("it ends with its thread");
        }
    }

    #[tokio::test]
    async fn hung_calls_never_share_a_connection_beyond_its_limit() {
        let workers = Workers::new();
        let limit = CALLS_PER_CONNECTION * CHANGE_CONNECTIONS;
        let (tell, told) = mpsc::channel();
        let (release, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for _ in 0..limit {
            let (tell, wait) = (tell.clone(), wait.clone());
            let stuck = workers.run("pause", Kind::Change, Some(id()), SOON, move |connection| {
                let _ = tell.send(connection);
                let _ = wait.lock().unwrap().recv();
                Ok(())
            });
            stuck.await.unwrap_err();
        }
        let used: Vec<usize> = told.try_iter().collect();
        for connection in 0..CHANGE_CONNECTIONS {
            assert_eq!(
                used.iter().filter(|used| **used == connection).count(),
                CALLS_PER_CONNECTION
            );
        }
        let one_more = workers.run("pause", Kind::Change, Some(id()), SOON, |_| Ok(()));
        assert!(
            matches!(one_more.await, Err(Error::Timeout { .. })),
            "no more threads than that"
        );
        assert_eq!(
            workers.run("list", Kind::Look, None, LATE, |_| Ok(())).await,
            Ok(())
        );
        drop(release);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_gives_its_thread_back() {
        let workers = Workers::new();
        for _ in 0..=CALLS_PER_CONNECTION {
            let failed = workers.run::<()>("list", Kind::Look, None, LATE, |_| {
                panic!("expected in this test")
            });
            assert!(matches!(failed.await, Err(Error::Failed { call: "list", .. })));
        }
    }
}
