//! What agents meet when they call the controller: which reports were taken, which were not, and how long a host went
//! without one. Counted between the real agent and its real connection.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dalgu_proto::tls::client::Caller;
use tokio::time::Instant;
use tonic::{Code, Status};
use tower::ServiceExt as _;

/// Counts of all hosts.
#[derive(Debug, Default)]
struct Counts {
    registered: AtomicU64,
    taken: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
}

/// One host's.
#[derive(Debug)]
pub struct Host {
    all: Arc<Counts>,
    last: Mutex<Gap>,
}

#[derive(Debug)]
struct Gap {
    since: Instant,
    longest: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Beats {
    all: Arc<Counts>,
    hosts: Vec<Arc<Host>>,
    interval: Duration,
}

/// What was counted in a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Registrations that were answered.
    pub registered: u64,
    /// Reports that were taken.
    pub taken: u64,
    /// Calls that the controller refused.
    pub refused: u64,
    /// Calls that were not answered: the connection broke, or the agent's deadline passed.
    pub broken: u64,
}

impl Beats {
    /// Nothing was counted yet.
    #[must_use]
    pub fn new(hosts: usize, interval: Duration) -> Self {
        let all = Arc::new(Counts::default());
        let host = |_| {
            Arc::new(Host {
                all: all.clone(),
                last: Mutex::new(Gap {
                    since: Instant::now(),
                    longest: Duration::ZERO,
                }),
            })
        };
        Self {
            hosts: (0..hosts).map(host).collect(),
            all,
            interval,
        }
    }

    /// Each host's counter.
    pub fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.hosts.iter()
    }

    /// All so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Tally {
            registered: read(&self.all.registered),
            taken: read(&self.all.taken),
            refused: read(&self.all.refused),
            broken: read(&self.all.broken),
        }
    }

    /// Begins to watch for missed heartbeats.
    pub fn begin(&self) {
        for host in &self.hosts {
            host.gap().longest = Duration::ZERO;
        }
    }

    /// Heartbeats missed since [`Beats::begin`]: for each host, the whole intervals that passed without a report taken
    /// after the one in which it was due. With the longest time between two reports of one host.
    #[must_use]
    pub fn missed(&self) -> (u64, Duration) {
        let gaps = self.hosts.iter().map(|host| {
            let gap = host.gap();
            gap.longest.max(gap.since.elapsed())
        });
        gaps.fold((0, Duration::ZERO), |(missed, longest), gap| {
            let late = gap.saturating_sub(self.interval);
            let whole = u64::try_from(late.as_nanos() / self.interval.as_nanos().max(1)).unwrap_or(u64::MAX);
            (missed + whole, longest.max(gap))
        })
    }
}

impl Tally {
    /// What came since an earlier one.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            registered: self.registered - earlier.registered,
            taken: self.taken - earlier.taken,
            refused: self.refused - earlier.refused,
            broken: self.broken - earlier.broken,
        }
    }
}

impl Host {
    fn gap(&self) -> std::sync::MutexGuard<'_, Gap> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what is called through it.
    pub fn counted(self: Arc<Self>, inner: Caller) -> Caller {
        Caller::new(tower::service_fn(
            move |request: http::Request<tonic::body::Body>| {
                let (inner, mut call) = (inner.clone(), Call::of(self.clone(), &request));
                async move {
                    let answer = inner.oneshot(request).await;
                    call.ended(&answer);
                    answer
                }
            },
        ))
    }
}

/// A call under way; one that is dropped was given up by the agent.
struct Call {
    host: Arc<Host>,
    report: bool,
    over: bool,
}

impl Call {
    fn of(host: Arc<Host>, request: &http::Request<tonic::body::Body>) -> Self {
        Self {
            host,
            report: request.uri().path().ends_with("/Report"),
            over: false,
        }
    }

    fn ended(&mut self, answer: &Result<http::Response<tonic::body::Body>, Status>) {
        self.over = true;
        let all = &self.host.all;
        // An error has its status among the headers, an answer behind its body.
        let refusal = answer
            .as_ref()
            .map(|answer| answer.headers().get("grpc-status").is_some());
        let count = match refusal {
            Err(status) if status.code() == Code::ResourceExhausted => &all.refused,
            Err(_) => &all.broken,
            Ok(true) => &all.refused,
            Ok(false) if self.report => {
                let mut gap = self.host.gap();
                gap.longest = gap.longest.max(gap.since.elapsed());
                gap.since = Instant::now();
                &all.taken
            }
            Ok(false) => &all.registered,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.over {
            self.host.all.broken.fetch_add(1, Ordering::Relaxed);
        }
    }
}
