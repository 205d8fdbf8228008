//! The network of a fleet: messages between programs, with the real encoding of gRPC and everything that can happen to a
//! message on its way.
//!
//! What was sent arrives, whether or not its sender still waits: a command can be carried out 90 seconds after its
//! caller gave up on it.

use std::{sync::Arc, time::Duration};

use dalgu_agent::images::{Peers, Source};
use dalgu_controller::agent_client::Dial;
use dalgu_proto::{
    ids::{HostName, MigrationId},
    tls::{self, Peer, Role, client::Caller},
};
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::sync::oneshot;
use tonic::{Status, body::Body};
use tower::ServiceExt;

use super::{
    fate::{Fate, Kind},
    life::Life,
    plan::Node,
    site::Site,
    streams, wire,
};

/// Most that a message takes when nothing is wrong.
const LATENCY_MICROS: u64 = 3_000;

/// What carries messages of one life of a program to another program.
fn caller(site: Arc<Site>, life: Life, from: Node, to: Node) -> Caller {
    Caller::new(tower::service_fn(move |request| {
        let (site, life) = (site.clone(), life.clone());
        async move { send(site, life, from, to, request).await }
    }))
}

async fn send(
    site: Arc<Site>,
    life: Life,
    from: Node,
    to: Node,
    mut request: Request<Body>,
) -> Result<Response<Body>, Status> {
    life.pass().await;
    let to = site.led(from, to);
    request.extensions_mut().insert(identity(&site, from));
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let name = call_name(parts.uri.path());
    let given = match (from, to) {
        (Node::Controller(_), Node::Host(host)) => wire::command(&body).map(|given| (host, given)),
        _ => None,
    };
    if let (Node::Host(host), "Report") = (from, name)
        && let Some(session) = wire::reported_session(&body)
    {
        site.checker().works_in(host, session);
    }
    // Of two controllers the checker knows what the one has taken over.
    let list = match (from, name) {
        _ if to == Node::Controller(1) => None,
        (Node::Host(host), "Report") => Some((host, wire::is_complete_report(&body))),
        (Node::Host(host), "Register") => Some((host, wire::is_complete_registration(&body))),
        _ => None,
    };
    let run = given.and_then(|_| wire::run(&body)).unwrap_or_default();
    match (from, to) {
        (Node::Controller(number), _) => site.knows(number, Some(name)),
        (_, Node::Controller(number)) => site.knows(number, None),
        _ => {}
    }
    let make = move || {
        let body = Body::new(Full::new(body.clone()));
        Request::from_parts(parts.clone(), body)
    };
    let carry = {
        let site = site.clone();
        move || -> BoxFuture<'static, Result<Response<Body>, Status>> {
            let (site, request, run) = (site.clone(), make(), run.clone());
            Box::pin(async move {
                let Some((there, server)) = site.server(from, to) else {
                    return Err(Status::unavailable("connection refused"));
                };
                there.pass().await;
                let known = given.map(|(host, _)| site.checker().heard(host));
                let before = list.and_then(|(host, complete)| site.list_comes(host, complete));
                let answer = server.oneshot(request).await;
                if let (Some((host, complete)), Some(before)) = (list, before) {
                    site.list_taken(host, complete, before);
                }
                if let (Some((host, given)), Some(known)) = (given, known)
                    && answer.as_ref().is_ok_and(wire::is_ok)
                {
                    site.checker().obeyed(host, name, given, known);
                    site.checker().obeyed_run(host, given.1, &run);
                }
                answer
            })
        }
    };
    let answer = site.message(&life, from, to, name, carry).await;
    answer.unwrap_or_else(|| Err(Status::unavailable("connection reset")))
}

/// Names in the history are those of the calls.
fn call_name(path: &str) -> &'static str {
    const NAMES: &[&str] = &[
        "Register",
        "Report",
        "EnsureVm",
        "DeleteVm",
        "PrepareMigration",
        "StartMigration",
        "GetMigration",
        "SettleMigration",
        "FinishMigration",
        "DeleteVolume",
        "ApplyNetworks",
        "CancelBackup",
        "FetchImage",
        "GetBackup",
        "GetHost",
        "ImportImage",
        "ListFiles",
        "ListVms",
        "ReadConsole",
        "ReadImage",
        "RemoveBackup",
        "RemoveImage",
        "StartBackup",
        "UploadImage",
    ];
    let last = path.rsplit('/').next().unwrap_or_default();
    NAMES
        .iter()
        .find(|name| **name == last)
        .copied()
        .unwrap_or("other")
}

/// Who a program is, by its certificate.
pub fn identity(site: &Site, node: Node) -> Peer {
    match node {
        Node::Controller(_) => Peer {
            role: Role::Controller,
            name: "controller".to_owned(),
        },
        Node::Host(host) => Peer {
            role: Role::Agent(site.host_name(host)),
            name: site.host_name(host).to_string(),
        },
        Node::Client => Peer {
            role: Role::Operator,
            name: "fleet".to_owned(),
        },
    }
}

/// How one life of a controller dials agents.
pub struct Dialler {
    /// The site.
    pub site: Arc<Site>,
    /// The controller.
    pub life: Life,
    /// Which.
    pub node: Node,
}

impl Dial for Dialler {
    fn dial(&self, host: &HostName, _address: &str) -> Result<Caller, tls::Error> {
        let number = self.site.host_number(host).unwrap_or(usize::MAX);
        Ok(caller(
            self.site.clone(),
            self.life.clone(),
            self.node,
            Node::Host(number),
        ))
    }
}

/// How one life of an agent dials the controller.
pub fn to_controller(site: &Arc<Site>, life: &Life, host: usize) -> Caller {
    caller(site.clone(), life.clone(), Node::Host(host), Node::Controller(0))
}

/// How one life of an agent reads images of other hosts.
pub fn to_peers(site: &Arc<Site>, life: &Life, host: usize) -> impl Peers + use<> {
    let (site, life) = (site.clone(), life.clone());
    move |source: &Source| {
        let number = site.host_number(&source.host).unwrap_or(usize::MAX);
        let to = Node::Host(number);
        Ok(caller(site.clone(), life.clone(), Node::Host(host), to))
    }
}

impl Site {
    /// Carries a message and its answer. `None` when the connection broke; never returns when either was lost. `carry` is
    /// called once for each time that the message arrives.
    pub async fn message<T: Send + 'static>(
        self: &Arc<Self>,
        life: &Life,
        from: Node,
        to: Node,
        name: &'static str,
        carry: impl Fn() -> BoxFuture<'static, T> + Send + Sync + 'static,
    ) -> Option<T> {
        let fate = self.at(Kind::Message, name, from, to);
        let wait = Duration::from_micros(self.below(LATENCY_MICROS));
        let wait = match fate {
            Fate::Fail => return None,
            Fate::Lose => return std::future::pending().await,
            Fate::Delay(time) => wait + time,
            _ => wait,
        };
        let (tell, told) = oneshot::channel();
        let site = self.clone();
        tokio::spawn(async move {
            let first = site.arrive(from, to, wait, fate, &carry).await;
            let back = Duration::from_micros(site.below(LATENCY_MICROS));
            let mut tell = Some(tell);
            if fate != Fate::LoseReply
                && let Some(answer) = first
            {
                tokio::time::sleep(back).await;
                if site.is_connected(to, from)
                    && let Some(tell) = tell.take()
                {
                    let _ = tell.send(answer);
                }
            }
            if let Fate::Repeat(later) = fate {
                site.arrive(from, to, later, fate, &carry).await;
            }
            if tell.is_some() {
                // Who waits must wait until its own deadline: nobody says that nothing will come.
                std::future::pending::<()>().await;
            }
        });
        let answer = told.await.ok();
        life.pass().await;
        answer
    }

    /// The message arrives, if the network lets it.
    async fn arrive<T>(
        &self,
        from: Node,
        to: Node,
        wait: Duration,
        fate: Fate,
        carry: &impl Fn() -> BoxFuture<'static, T>,
    ) -> Option<T> {
        tokio::time::sleep(wait).await;
        if !self.is_connected(from, to) {
            return None;
        }
        match fate {
            Fate::CrashBefore => {
                self.kill(to);
                None
            }
            Fate::CrashAfter => {
                // Whoever has died does not answer.
                let (end, work) = (self.life(to), carry());
                tokio::select! {
                    biased;
                    _ = work => self.kill(to),
                    () = gone(end) => {}
                }
                None
            }
            _ => {
                let (end, work) = (self.life(to), carry());
                tokio::select! {
                    biased;
                    answer = work => Some(answer),
                    () = gone(end) => None,
                }
            }
        }
    }

    /// The source's word that a VM has left it for good.
    pub async fn hand_over(
        self: &Arc<Self>,
        from: usize,
        to: usize,
        migration: MigrationId,
        life: &Life,
    ) -> std::io::Result<()> {
        let source = self.host_name(from);
        let site = self.clone();
        let carry = move || -> BoxFuture<'static, std::io::Result<()>> {
            let (site, source) = (site.clone(), source.clone());
            Box::pin(async move { streams::word(&site.ways(), to, migration, &source) })
        };
        let told = self.message(life, Node::Host(from), Node::Host(to), "HandOver", carry);
        // As the program's own limit for opening a stream.
        match tokio::time::timeout(Duration::from_secs(10), told).await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err(std::io::ErrorKind::ConnectionReset.into()),
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }
}

async fn gone(life: Option<Life>) {
    match life {
        Some(life) => life.end.cancelled().await,
        None => std::future::pending().await,
    }
}
