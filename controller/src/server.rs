//! Puts the controller together and serves it: one port for operators, agents and scrapers, and a Unix socket.
//!
//! [`run`] is the whole life of the program; [`Controller::start`] gives tests the parts they need to look at and to
//! break. Who may call which service is decided here, by wrapping each with its rule from [`crate::api`].

use std::{io, net::SocketAddr, panic::AssertUnwindSafe, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    extract::State as Shared,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use dalgu_proto::{
    DESCRIPTORS,
    agent::v1::registrar_service_server::{self, RegistrarServiceServer},
    ids::ClusterId,
    size::MAX_REQUEST_BYTES,
    tls::{self, Identity, server::Acceptor},
    v1,
};
use futures::FutureExt;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::{Routes, interceptor::InterceptedService};
use uuid::Uuid;

use crate::{
    agent_client::Agents,
    api::{self, Services},
    config::Config,
    hosts, housekeeping,
    metrics::{Metrics, Page},
    pki,
    reconcile::{queue::Queue, runner::Runner},
    state::{self, Db, Hooks},
    store::{self, Store, sqlite::Sqlite},
};

mod connections;
mod front;
pub mod limits;

/// Longest wait at the end for calls and passes under way.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// The program's answer to a store that has failed: systemd starts it anew, and it reads what is on the disk.
const EXIT_STORE: i32 = 70;

/// Why the controller cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The identities are not there or not usable.
    #[error("the controller's identity cannot be used; `dalgu-controller init` makes one")]
    Pki(#[from] pki::Error),
    /// TLS refuses the identity.
    #[error("the controller's identity cannot be used; `dalgu-controller init` makes one")]
    Tls(#[from] tls::Error),
    /// The state cannot be made.
    #[error("the state cannot be read")]
    State(#[from] state::Error),
    /// The store cannot be opened.
    #[error("the store cannot be opened")]
    Store(#[from] store::Error),
    /// The address is taken or not ours.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address or path.
        address: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The descriptions of the API are broken.
    #[error("the API cannot describe itself")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A part without which the rest must not go on.
    #[error("the controller's {0} failed, which is a defect; see the log above")]
    Part(&'static str),
}

/// What a test may put in another's place.
pub struct Parts {
    /// Where records are kept.
    pub store: Box<dyn Store>,
    /// What follows from a failed commit.
    pub failed: Box<dyn Fn(&store::Error) + Send + Sync>,
}

/// A running controller.
pub struct Controller {
    address: SocketAddr,
    db: Db,
    stop: CancellationToken,
    tasks: TaskTracker,
    failed: mpsc::Receiver<&'static str>,
    server: JoinHandle<()>,
}

/// Runs a controller until `stop`. A store that fails ends the process.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), Error> {
    run_with(config, stop, |_| {}).await
}

/// As [`run`]; `ready` is told the address once the controller serves.
pub async fn run_with(
    config: Config,
    stop: CancellationToken,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), Error> {
    let store = Box::new(Sqlite::open(&config.data_dir.join("dalgu.db"))?);
    let failed = Box::new(|error: &store::Error| {
        tracing::error!(%error, source = ?std::error::Error::source(error), "the store failed; the controller ends");
        std::process::exit(EXIT_STORE);
    });
    let controller = Controller::start(config, Parts { store, failed }, stop).await?;
    ready(controller.address());
    controller.finished().await
}

impl Controller {
    /// Starts a controller; everything it needs from outside has been opened when this returns.
    pub async fn start(config: Config, parts: Parts, stop: CancellationToken) -> Result<Self, Error> {
        let cluster_id: ClusterId = pki::cluster_id(&config.data_dir)?;
        let identity = Identity::load_dir(config.tls_dir(), "controller")?;
        let tls = identity.server_config(&[tls::ALPN_H2, tls::ALPN_HTTP1])?;
        let listener = listen(config.listen).await?;
        let unix = config.unix_socket.as_ref().map(listen_unix).transpose()?;
        let address = listener.local_addr().map_err(|source| Error::Listen {
            address: config.listen.to_string(),
            source,
        })?;

        let metrics = Arc::new(Metrics::default());
        let queue = Arc::new(Queue::default());
        let hooks = Hooks {
            touched: Box::new({
                let queue = queue.clone();
                move |vms| vms.iter().for_each(|vm| queue.add(*vm))
            }),
            committed: Box::new({
                let metrics = metrics.clone();
                move |time| metrics.committed(time)
            }),
            failed: parts.failed,
            events_kept: usize::try_from(config.event_retention).unwrap_or(usize::MAX),
        };
        let db = Db::open(parts.store, cluster_id, hooks)?;
        let agents = Arc::new(Agents::new(identity));
        let config = Arc::new(config);
        let services = Services {
            db: db.clone(),
            agents: agents.clone(),
            config: config.clone(),
            stop: stop.clone(),
        };
        let limits = config.limits;
        let routes = routes(services, metrics.page(db.clone(), queue.clone()))?;

        let tasks = TaskTracker::new();
        let (fail, failed) = mpsc::channel(1);
        let (acceptor, incoming) = Acceptor::new(cluster_id, None);
        let acceptor = Arc::new(acceptor);
        let server = tokio::spawn(connections::serve(routes, limits, incoming, stop.clone()));
        tasks.spawn({
            let acceptor = acceptor.clone();
            async move {
                let refused = |error: &dyn std::error::Error| tracing::info!(error = %chain(error), "a caller was turned away");
                acceptor.run(listener, tls, refused).await;
            }
        });
        if let Some((listener, uid)) = unix {
            tasks.spawn(async move { acceptor.run_unix(listener, uid).await });
        }
        let heartbeat = hosts::heartbeat::run(db.clone(), config.unreachable_after(), stop.clone());
        tasks.spawn(vital("heartbeat", fail.clone(), heartbeat));
        let housekeeping = housekeeping::run(db.clone(), config.operation_retention(), stop.clone());
        tasks.spawn(vital("housekeeping", fail.clone(), housekeeping));
        let runner = Runner {
            db: db.clone(),
            agents,
            queue,
            metrics,
        };
        tasks.spawn(vital("reconciler", fail, runner.run(stop.clone())));
        tasks.close();
        let term = db.snapshot().meta.term;
        tracing::info!(%address, %cluster_id, %term, "serving");
        Ok(Self {
            address,
            db,
            stop,
            tasks,
            failed,
            server,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its state.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Waits until it was told to stop and has stopped, or until its server has failed.
    pub async fn finished(mut self) -> Result<(), Error> {
        let mut failed = None;
        let ended = tokio::select! {
            ended = &mut self.server => Some(ended),
            // Cancel safe: a message not received stays in its channel.
            Some(part) = self.failed.recv() => {
                failed = Some(part);
                None
            }
            // Cancel safe: the server is waited for again below.
            () = self.stop.cancelled() => tokio::time::timeout(STOP_TIMEOUT, &mut self.server).await.ok(),
        };
        self.stop.cancel();
        if tokio::time::timeout(STOP_TIMEOUT, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                "some work was still under way at the end; it is taken up again at the next start"
            );
        }
        if let Some(part) = failed {
            self.server.abort();
            return Err(Error::Part(part));
        }
        match ended {
            Some(Ok(())) => Ok(()),
            // A call that would not end, or a panic that has been logged.
            Some(Err(_)) | None => {
                self.server.abort();
                Ok(())
            }
        }
    }
}

/// Runs a part of the controller that nobody waits for, and tells when it fails: without it the rest would seem to work.
async fn vital(name: &'static str, failed: mpsc::Sender<&'static str>, part: impl Future<Output = ()>) {
    if AssertUnwindSafe(part).catch_unwind().await.is_err() {
        // Full: another part has failed already.
        let _ = failed.try_send(name);
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

async fn listen(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen {
        address: address.to_string(),
        source,
    })
}

/// The socket, and the uid of this process: the socket file is its own.
fn listen_unix(path: &PathBuf) -> Result<(UnixListener, u32), Error> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    let failed = |source| Error::Listen {
        address: path.display().to_string(),
        source,
    };
    // A socket that a killed run left behind; the store's lock says that no other run is alive.
    if std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let uid = std::fs::metadata(path).map_err(failed)?.uid();
    Ok((listener, uid))
}

/// A time, longer or shorter by up to one part in so many: what began at the same time does not end at the same time.
fn jittered(time: Duration, part: u32) -> Duration {
    let spread = time / part;
    let random = u32::try_from(Uuid::new_v4().as_u128() & 0xffff).unwrap_or_default();
    time - spread + spread * 2 * random / 0xffff
}

macro_rules! guarded {
    ($server:expr, $rule:path) => {
        InterceptedService::new(
            $server.max_decoding_message_size(MAX_REQUEST_BYTES),
            $rule as Rule,
        )
    };
}

#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
type Rule = fn(tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status>;

/// What reflection lists: the descriptions name the agents' service too, which is not served here.
const SERVED: [&str; 9] = [
    v1::vm_service_server::SERVICE_NAME,
    v1::host_service_server::SERVICE_NAME,
    v1::operation_service_server::SERVICE_NAME,
    v1::placement_service_server::SERVICE_NAME,
    v1::event_service_server::SERVICE_NAME,
    registrar_service_server::SERVICE_NAME,
    tonic_health::pb::health_server::SERVICE_NAME,
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Every service with its rule, and the metrics page.
fn routes(services: Services, page: Page) -> Result<axum::Router, Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    // The state has been read and the term is on disk: it serves.
    tokio::spawn(async move {
        health
            .set_service_status("", tonic_health::ServingStatus::Serving)
            .await
    });
    let reflection = || {
        SERVED
            .into_iter()
            .fold(tonic_reflection::server::Builder::configure(), |builder, name| {
                builder.with_service_name(name)
            })
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that a caller who knows the API by reflection only can read the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let s = &services;
    let routes = Routes::default()
        .add_service(guarded!(
            v1::vm_service_server::VmServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::host_service_server::HostServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::operation_service_server::OperationServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::placement_service_server::PlacementServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(
            v1::event_service_server::EventServiceServer::new(s.clone()),
            api::only_operators
        ))
        .add_service(guarded!(RegistrarServiceServer::new(s.clone()), api::only_agents))
        .add_service(InterceptedService::new(health_service, api::anybody as Rule))
        .add_service(InterceptedService::new(
            reflection().build_v1()?,
            api::anybody as Rule,
        ))
        .add_service(InterceptedService::new(
            reflection().build_v1alpha()?,
            api::anybody as Rule,
        ));
    // Only authenticated callers come this far, and any of them may scrape.
    Ok(routes
        .into_axum_router()
        .route("/metrics", get(metrics).with_state(page)))
}

async fn metrics(Shared(page): Shared<Page>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    match page.respond(accept) {
        Ok((content_type, text)) => ([(header::CONTENT_TYPE, content_type)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_fails_is_told_and_one_that_ends_is_not() {
        let (fail, mut failed) = mpsc::channel(1);
        vital("good", fail.clone(), async {}).await;
        vital("bad", fail, async { panic!("expected in this test") }).await;
        assert_eq!(failed.recv().await, Some("bad"));
        assert_eq!(failed.recv().await, None);
    }

    #[test]
    fn what_began_together_does_not_end_together() {
        let age = Duration::from_secs(1800);
        let ages: std::collections::BTreeSet<_> = (0..100).map(|_| jittered(age, 10)).collect();
        assert!(ages.len() > 50, "{ages:?}");
        assert!(*ages.first().unwrap() >= age * 9 / 10 && *ages.last().unwrap() <= age * 11 / 10);
    }
}
