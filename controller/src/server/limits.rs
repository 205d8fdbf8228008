//! How much the port bears, each limit with its reason. None is in the configuration file: they protect the controller
//! and are not what a site tunes; tests set smaller ones.
//!
//! The size of a request is [`dalgu_proto::size::MAX_REQUEST_BYTES`], handshakes are limited in `dalgu_proto::tls`, pages
//! in `api::page`.

use std::{sync::Arc, time::Duration};

use dalgu_proto::tls::{Peer, Role};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Calls at once on one connection: gRPC's customary number; a caller with more opens another connection.
    pub streams_per_connection: u32,
    /// Bytes of a call's headers: as much as most HTTP servers take; ours and those of the usual clients have under 1 kB.
    pub header_bytes: u32,
    /// Streams that a caller has reset before they were looked at; more end the connection (CVE-2023-44487). hyper's own
    /// number.
    pub pending_resets: usize,
    /// Streams that we have reset for the caller's errors; more end the connection (CVE-2025-8671).
    pub local_resets: usize,
    /// An idle connection is probed so often, and closed when a probe is not answered in the same time.
    pub keepalive: Duration,
    /// Operators' calls at once on the whole port; more are shed. A call takes milliseconds: so many are a storm.
    pub calls: usize,
    /// Operators' streams and waits at once. Each costs a task and, for events, a queue of 64.
    pub streams: usize,
    /// Agents' calls at once: their own, so that no operator's load delays a heartbeat. A fleet of 10,000 that reports
    /// every 3 s has about 30 under way.
    pub agent_calls: usize,
    /// Scrapes and health checks at once: a few monitors.
    pub probes: usize,
    /// Longest time of a call: many times the slowest, which waits for an agent.
    pub call_time: Duration,
    /// Longest time of `WaitOperation`: what the API allows, and a little.
    pub wait_time: Duration,
    /// Longest time in which a watcher takes nothing of its full queue: longer than a bad network's pauses. Then its
    /// stream ends with READER_TOO_SLOW, to be taken up where it stands.
    pub slow_reader: Duration,
    /// Age at which a connection is asked to go, give or take a tenth, so that callers spread anew and do not all come
    /// at once. Its streams end then with STREAM_ENDED, to be taken up on a new connection.
    pub connection_age: Duration,
    /// Time for the calls of a connection of that age to end: the longest wait, and a little.
    pub connection_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams_per_connection: 100,
            header_bytes: 16 << 10,
            pending_resets: 20,
            local_resets: 100,
            keepalive: Duration::from_secs(20),
            calls: 256,
            streams: 1024,
            agent_calls: 512,
            probes: 16,
            call_time: Duration::from_secs(30),
            wait_time: Duration::from_secs(310),
            slow_reader: Duration::from_secs(30),
            connection_age: Duration::from_secs(1800),
            connection_grace: Duration::from_secs(320),
        }
    }
}

/// What a call counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// An operator's, answered at once.
    Call,
    /// An operator's wait for an operation.
    Wait,
    /// A stream, also of reflection.
    Stream,
    /// An agent's.
    Agent,
    /// A scrape or a health check.
    Probe,
}

impl Class {
    /// By who calls before what is called: an operator who calls the agents' service uses up nothing of theirs.
    pub(super) fn of(peer: &Peer, path: &str) -> Self {
        match path {
            "/metrics" | "/grpc.health.v1.Health/Check" => Self::Probe,
            "/dalgu.v1.EventService/WatchEvents"
            | "/dalgu.v1.VmService/ReadConsole"
            | "/grpc.health.v1.Health/Watch"
            | "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
            | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => Self::Stream,
            "/dalgu.v1.OperationService/WaitOperation" => Self::Wait,
            _ if matches!(peer.role, Role::Agent(_)) => Self::Agent,
            _ => Self::Call,
        }
    }
}

impl Limits {
    /// Longest time until a call of that class answers; for a stream, until it begins.
    pub(super) fn time(&self, class: Class) -> Duration {
        match class {
            Class::Wait => self.wait_time,
            Class::Call | Class::Stream | Class::Agent | Class::Probe => self.call_time,
        }
    }
}

/// The places for calls under way.
#[derive(Debug, Clone)]
pub(super) struct Places {
    calls: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    agents: Arc<Semaphore>,
    probes: Arc<Semaphore>,
}

impl Places {
    pub(super) fn new(limits: &Limits) -> Self {
        let places = |number| Arc::new(Semaphore::new(number));
        Self {
            calls: places(limits.calls),
            streams: places(limits.streams),
            agents: places(limits.agent_calls),
            probes: places(limits.probes),
        }
    }

    /// Takes a place, or says at once that there is none: a queue would only make callers wait for their deadlines.
    pub(super) fn take(&self, class: Class) -> Option<OwnedSemaphorePermit> {
        let places = match class {
            Class::Call => &self.calls,
            Class::Wait | Class::Stream => &self.streams,
            Class::Agent => &self.agents,
            Class::Probe => &self.probes,
        };
        places.clone().try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_places_are_for_agents_only() {
        let peer = |role| Peer {
            role,
            name: "x".to_owned(),
        };
        let operator = peer(Role::Operator);
        let agent = peer(Role::Agent("h1".parse().unwrap()));
        let report = "/dalgu.agent.v1.RegistrarService/Report";
        for (peer, path, expected) in [
            (&agent, report, Class::Agent),
            (&operator, report, Class::Call),
            (&agent, "/dalgu.v1.VmService/GetVm", Class::Agent),
            (&operator, "/dalgu.v1.VmService/GetVm", Class::Call),
            (&operator, "/dalgu.v1.OperationService/WaitOperation", Class::Wait),
            (&agent, "/dalgu.v1.EventService/WatchEvents", Class::Stream),
            (&operator, "/dalgu.v1.VmService/ReadConsole", Class::Stream),
            (&operator, "/metrics", Class::Probe),
            (&agent, "/grpc.health.v1.Health/Check", Class::Probe),
        ] {
            assert_eq!(Class::of(peer, path), expected, "{path}");
        }
        let places = Places::new(&Limits {
            calls: 1,
            ..Limits::default()
        });
        let taken = places.take(Class::Call);
        assert!(taken.is_some() && places.take(Class::Call).is_none());
        assert!(places.take(Class::Agent).is_some() && places.take(Class::Wait).is_some());
        drop(taken);
        assert!(places.take(Class::Call).is_some());
    }

    #[test]
    fn the_limits_fit_each_other() {
        let limits = Limits::default();
        assert!(limits.call_time < limits.wait_time);
        assert!(limits.wait_time < limits.connection_grace, "no wait is cut off");
    }
}
