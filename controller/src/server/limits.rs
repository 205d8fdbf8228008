//! How much the port bears, each limit with its reason. None is in the configuration file: they protect the controller
//! and are not what a site tunes; tests set smaller ones.
//!
//! The size of a request is [`dalgu_proto::size::MAX_REQUEST_BYTES`], handshakes are limited in `dalgu_proto::tls`, pages
//! in `api::page`.

use std::time::Duration;

use dalgu_proto::tls::{Peer, Role};

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
    /// Calls, waits and streams that operators together may begin in a second, beyond what each has for itself; more are
    /// shed. This is the rated load: what two processors bear beside 2,000 agents, shown by `make bench-scale`.
    pub calls_per_second: u32,
    /// The same that each operator may begin in a second whatever the others do: a person at work, not a storm.
    pub calls_per_second_of_one: u32,
    /// Operators' calls at once on the whole port, beyond what each has for itself; more are shed. A call takes milliseconds: so many are a storm.
    pub calls: usize,
    /// Those of one operator: half, so that one caller never has all.
    pub calls_of_one: usize,
    /// Operators' streams and waits at once. Each costs a task and, for events, a queue of 64.
    pub streams: usize,
    /// Those of one operator.
    pub streams_of_one: usize,
    /// Calls that each operator may have under way although all places are taken, and as many streams or waits, and probes: a person
    /// at work, not a storm. Identities are few, so that they add little to what the port bears.
    pub kept_for_one: usize,
    /// Agents' calls at once: their own, so that no operator's load delays a heartbeat. A fleet of 10,000 that reports
    /// every 3 s has about 30 under way; what comes at once after a start of the controller waits its turn.
    pub agent_calls: usize,
    /// Those of one agent, which makes one after the other; those it has given up may still be under way.
    pub agent_calls_of_one: usize,
    /// Scrapes and health checks at once: a few monitors.
    pub probes: usize,
    /// Those of one caller.
    pub probes_of_one: usize,
    /// Longest time of a call: many times the slowest, which waits for an agent.
    pub call_time: Duration,
    /// Longest time of `WaitOperation`: what the API allows, and a little.
    pub wait_time: Duration,
    /// Longest time in which a caller takes nothing of an answer that waits for it: longer than a bad network's pauses. Then
    /// the answer loses its place and ends with READER_TOO_SLOW; a watch is to be taken up where it stands.
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
            calls_per_second: 1000,
            calls_per_second_of_one: 20,
            calls: 256,
            calls_of_one: 128,
            streams: 1024,
            streams_of_one: 256,
            kept_for_one: 2,
            agent_calls: 512,
            agent_calls_of_one: 4,
            probes: 16,
            probes_of_one: 4,
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
            | "/dalgu.v1.ImageService/UploadImage"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_agents_call_is_an_agents_call_whatever_it_is_and_nobody_elses_is() {
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
            (&operator, "/dalgu.v1.ImageService/UploadImage", Class::Stream),
            (&operator, "/metrics", Class::Probe),
            (&agent, "/grpc.health.v1.Health/Check", Class::Probe),
        ] {
            assert_eq!(Class::of(peer, path), expected, "{path}");
        }
    }

    #[test]
    fn the_limits_fit_each_other() {
        let limits = Limits::default();
        assert!(limits.call_time < limits.wait_time);
        assert!(limits.wait_time < limits.connection_grace, "no wait is cut off");
        let (of_one, all) = (limits.agent_calls_of_one, limits.agent_calls);
        assert!(of_one * 100 <= all, "a hundred agents together do not take all");
    }
}
