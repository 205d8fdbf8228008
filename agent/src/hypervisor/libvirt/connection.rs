//! Keeps the connections to libvirt: opens them, hears when they end, opens them again. One task; everything else
//! here takes [`Links`] from it and gets [`Error::Unavailable`] while there are none.
//!
//! ```text
//! Down ── open, keepalive, subscribe ──► Up(generation) ── closed or silent ──► Down ── wait, longer each time ──┐
//!   ▲                                                                                                            │
//!   └────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! libvirt replays no events, so each way up or down is a [`Hint::All`]. Opening a connection to a daemon that hangs
//! has no bound, so it happens on a thread of its own, given up after a while; a late result is dropped.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use dalgu_proto::ids::VmId;
use tokio::{
    sync::{Semaphore, broadcast, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use virt::connect::Connect;

use super::{
    error::{general, is_unsupported},
    ffi::{Event, Params, Sink, Subscription},
    worker::CHANGE_CONNECTIONS,
};
use crate::hypervisor::{Connection, Error, Hint};

/// A peer that is silent for four of these is taken for dead, and its calls fail.
const KEEPALIVE: (i32, u32) = (5, 3);
/// Longest time to wait for the connections.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Attempts that may hang at once.
const OPENERS: usize = 3;
/// Pauses between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Ended jobs whose figures are kept until somebody takes them.
const KEPT_JOBS: usize = 64;

/// The open connections, one or more for each kind of call so that none waits for another.
pub(super) struct Links {
    /// Rises with each time the connections were opened.
    pub(super) generation: u64,
    pub(super) look: Connect,
    pub(super) stats: Connect,
    pub(super) changes: Vec<Connect>,
    pub(super) urgent: Connect,
    _subscriptions: Vec<Subscription>,
}

/// Figures of jobs that have ended, until taken.
pub(super) type Completed = Arc<Mutex<Vec<(VmId, Params)>>>;

/// How often guests were reset. Where it cannot be known, since nobody listened for a while, all of them count as one
/// more: a guest that may have rebooted is not asked to again.
#[derive(Debug, Default)]
pub(super) struct Resets {
    unknown: u64,
    seen: HashMap<VmId, u64>,
}

impl Resets {
    pub(super) fn of(&self, id: VmId) -> u64 {
        self.unknown + self.seen.get(&id).copied().unwrap_or_default()
    }

    /// The domain is gone; it need not be remembered.
    pub(super) fn forget(&mut self, id: VmId) {
        self.seen.remove(&id);
    }
}

/// What the supervisor shares with the rest.
pub(super) struct Supervisor {
    pub(super) uri: String,
    links: watch::Sender<Option<Arc<Links>>>,
    pub(super) connection: watch::Sender<Connection>,
    pub(super) hints: broadcast::Sender<Hint>,
    pub(super) completed: Completed,
    resets: Arc<Mutex<Resets>>,
    stops: Stops,
}

/// No event comes so late.
const LATEST: Duration = Duration::from_secs(10);

/// When domains that are watched for it stopped last.
type Stops = Arc<Mutex<HashMap<VmId, Option<Instant>>>>;

/// A domain is watched for its stop.
pub(super) struct StopWatch {
    id: VmId,
    stops: Stops,
}

impl StopWatch {
    /// When it stopped last, if it did since it is watched.
    pub(super) fn at(&self) -> Option<Instant> {
        let stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        stops.get(&self.id).copied().flatten()
    }
}

impl Drop for StopWatch {
    fn drop(&mut self) {
        let mut stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        stops.remove(&self.id);
    }
}

impl Supervisor {
    pub(super) fn new(uri: &str) -> Self {
        Self {
            uri: uri.to_owned(),
            links: watch::Sender::new(None),
            connection: watch::Sender::new(Connection::Down("not connected yet".into())),
            hints: broadcast::Sender::new(1024),
            completed: Completed::default(),
            resets: Arc::default(),
            stops: Arc::default(),
        }
    }

    /// Watches a domain for its stop from now on.
    pub(super) fn watch_stop(&self, id: VmId) -> StopWatch {
        let mut stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        stops.insert(id, None);
        StopWatch {
            id,
            stops: self.stops.clone(),
        }
    }

    /// How often guests were reset.
    pub(super) fn resets(&self) -> MutexGuard<'_, Resets> {
        // Whole after every statement, so a panic elsewhere does not spoil it.
        self.resets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connections, if there are any now.
    pub(super) fn links(&self) -> Result<Arc<Links>, Error> {
        self.links
            .borrow()
            .clone()
            .ok_or_else(|| match &*self.connection.borrow() {
                Connection::Down(detail) => Error::Unavailable {
                    detail: detail.clone(),
                },
                Connection::Up => Error::Unavailable {
                    detail: "the connection has just been lost".into(),
                },
            })
    }

    /// Keeps the connections until told to stop.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let openers = Arc::new(Semaphore::new(OPENERS));
        let mut backoff = BACKOFF.0;
        let mut generation = 0;
        while !stop.is_cancelled() {
            generation += 1;
            let (closed, mut is_closed) = mpsc::channel(1);
            match self.open(generation, &openers, closed).await {
                Ok(links) => {
                    backoff = BACKOFF.0;
                    let why = self.serve(links, &mut is_closed, &stop).await;
                    tracing::warn!(why, generation, "the connection to libvirt is lost");
                    self.down(why);
                }
                Err(error) => self.down(error.to_string()),
            }
            tokio::select! {
                // Nothing is lost when either is dropped.
                () = sleep(backoff) => {}
                () = stop.cancelled() => {}
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    async fn serve(
        &self,
        links: Links,
        closed: &mut mpsc::Receiver<String>,
        stop: &CancellationToken,
    ) -> String {
        tracing::info!(
            uri = self.uri,
            generation = links.generation,
            "connected to libvirt"
        );
        self.resets().unknown += 1;
        self.links.send_replace(Some(Arc::new(links)));
        self.connection.send_replace(Connection::Up);
        self.hint(Hint::All);
        let why = tokio::select! {
            // A message not yet received stays in its channel.
            why = closed.recv() => why.unwrap_or_default(),
            () = stop.cancelled() => "the agent stops".to_owned(),
        };
        let old = self.links.send_replace(None);
        // Closing calls libvirt, which may hang.
        std::thread::spawn(move || drop(old));
        why
    }

    fn down(&self, why: String) {
        let changed = self.connection.send_if_modified(|connection| {
            let down = Connection::Down(why);
            let changed = *connection != down;
            *connection = down;
            changed
        });
        if changed {
            self.hint(Hint::All);
        }
    }

    fn hint(&self, hint: Hint) {
        // Nobody listens: then nobody needs to know.
        let _ = self.hints.send(hint);
    }

    async fn open(
        &self,
        generation: u64,
        openers: &Arc<Semaphore>,
        closed: mpsc::Sender<String>,
    ) -> Result<Links, Error> {
        let call = "connect";
        let sinks = (self.domain_sink(), close_sink(closed));
        let uri = self.uri.clone();
        let attempt = async {
            let permit = openers
                .clone()
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            let (send, receive) = oneshot::channel();
            std::thread::spawn(move || {
                let result = open_all(&uri, generation, &sinks.0, &sinks.1);
                drop(permit);
                // Too late: the connections are closed as they are dropped, here where that may block.
                drop(send.send(result));
            });
            receive.await.unwrap_or_else(|_| {
                Err(Error::Unavailable {
                    detail: "connecting panicked".into(),
                })
            })
        };
        timeout(OPEN_LIMIT, attempt).await.unwrap_or(Err(Error::Timeout {
            call,
            after: OPEN_LIMIT,
        }))
    }

    fn domain_sink(&self) -> Sink {
        let (hints, completed, resets) = (self.hints.clone(), self.completed.clone(), self.resets.clone());
        let stops = self.stops.clone();
        Arc::new(move |event| {
            let id = match event {
                Event::Domain(id) => VmId::from_uuid(id),
                Event::Stopped(id, ago) => {
                    let id = VmId::from_uuid(id);
                    // The clock that it was told by may have been set since.
                    let at = Instant::now().checked_sub(ago.min(LATEST));
                    let mut stops = stops.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(stop) = stops.get_mut(&id) {
                        *stop = at;
                    }
                    id
                }
                Event::Reset(id) => {
                    let id = VmId::from_uuid(id);
                    let mut resets = resets.lock().unwrap_or_else(PoisonError::into_inner);
                    *resets.seen.entry(id).or_default() += 1;
                    id
                }
                Event::JobCompleted(id, params) => {
                    let id = VmId::from_uuid(id);
                    let mut completed = completed.lock().unwrap_or_else(PoisonError::into_inner);
                    completed.retain(|(other, _)| *other != id);
                    if completed.len() >= KEPT_JOBS {
                        completed.remove(0);
                    }
                    completed.push((id, params));
                    id
                }
                Event::Closed(_) => return,
            };
            let _ = hints.send(Hint::Domain(id));
        })
    }
}

fn close_sink(closed: mpsc::Sender<String>) -> Sink {
    Arc::new(move |event| {
        if let Event::Closed(reason) = event {
            let why = match reason {
                0 => "an error on the connection",
                1 => "libvirt closed the connection",
                2 => "libvirt does not answer",
                _ => "closed by the agent",
            };
            // Full: somebody has said so already.
            let _ = closed.try_send(why.to_owned());
        }
    })
}

/// Opens one connection, with keepalive where the driver has it.
pub(super) fn open_one(uri: &str) -> Result<Connect, Error> {
    run_event_loop()?;
    let failed = |error: virt::error::Error| Error::Unavailable {
        detail: error.message().to_owned(),
    };
    let connect = Connect::open(Some(uri)).map_err(failed)?;
    match connect.set_keep_alive(KEEPALIVE.0, KEEPALIVE.1) {
        Err(error) if !is_unsupported(&error) => Err(general("set_keep_alive", &error)),
        _ => Ok(connect),
    }
}

fn open_all(uri: &str, generation: u64, domains: &Sink, closed: &Sink) -> Result<Links, Error> {
    let look = open_one(uri)?;
    let mut subscriptions =
        vec![Subscription::domains(&look, domains).map_err(|error| general("subscribe to events", &error))?];
    let stats = open_one(uri)?;
    let urgent = open_one(uri)?;
    let changes = (0..CHANGE_CONNECTIONS)
        .map(|_| open_one(uri))
        .collect::<Result<Vec<_>, _>>()?;
    for connect in [&look, &stats, &urgent].into_iter().chain(&changes) {
        match Subscription::close(connect, closed) {
            Ok(subscription) => subscriptions.push(subscription),
            Err(error) if is_unsupported(&error) => {}
            Err(error) => return Err(general("subscribe to the connection's end", &error)),
        }
    }
    Ok(Links {
        generation,
        look,
        stats,
        changes,
        urgent,
        _subscriptions: subscriptions,
    })
}

/// libvirt's event loop: one thread for the whole process, there before the first connection is opened. It carries
/// the keepalive of all of them, so nothing on it may block.
fn run_event_loop() -> Result<(), Error> {
    static LOOP: OnceLock<Result<(), Error>> = OnceLock::new();
    LOOP.get_or_init(|| {
        // Errors are read from each call; libvirt need not print them as well.
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl()
            .map_err(|error| general("register the event loop", &error))?;
        let spawned = std::thread::Builder::new()
            .name("libvirt-events".into())
            .spawn(|| {
                loop {
                    if let Err(error) = virt::event::event_run_default_impl() {
                        tracing::error!(error = error.message(), "libvirt's event loop failed");
                        std::thread::park_timeout(Duration::from_secs(1));
                    }
                }
            });
        spawned.map(drop).map_err(|error| Error::Unavailable {
            detail: format!("no thread for events: {error}"),
        })
    })
    .clone()
}
