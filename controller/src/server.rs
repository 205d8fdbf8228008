//! Puts the controller together and serves it: one port for operators, agents and scrapers, and a Unix socket.
//!
//! [`run`] is the whole life of the program; [`Controller::start`] gives tests the parts they need to look at and to
//! break; [`Core`] is all of it but for what it is reached by. Who may call which service is decided here, by wrapping
//! each with its rule from [`crate::api`].

mod core;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    extract::State as Shared,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use dalgu_proto::{
    DESCRIPTORS,
    agent::v1::registrar_service_server,
    ids::ClusterId,
    tls::{
        self, Identity,
        network::{Machine, Network},
        server::Acceptor,
    },
    v1,
};
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, interceptor::InterceptedService};
use uuid::Uuid;

use self::core::Rule;
pub use self::core::{Core, Parts, Writer};
use crate::{
    api, backup,
    config::Config,
    metrics::Page,
    pki, space,
    state::{self, Db},
    store::{self, sqlite::Sqlite},
};

mod answer;
mod connections;
mod front;
pub mod limits;
mod places;

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

/// A running controller.
pub struct Controller {
    address: SocketAddr,
    core: Core,
    stop: CancellationToken,
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
    let store = Sqlite::open(&config.data_dir.join(backup::DATABASE))?;
    let failed = |error: &store::Error| {
        tracing::error!(%error, source = ?std::error::Error::source(error), "the store failed; the controller ends");
        std::process::exit(EXIT_STORE);
    };
    let controller = Controller::start(config, Parts::new(store, failed), stop).await?;
    ready(controller.address());
    controller.finished().await
}

impl Controller {
    /// Starts a controller; everything it needs from outside has been opened when this returns.
    pub async fn start(config: Config, parts: Parts, stop: CancellationToken) -> Result<Self, Error> {
        Self::start_on(Arc::new(Machine), config, parts, stop).await
    }

    /// As [`Controller::start`], on a network that is handed in.
    pub async fn start_on(
        network: Arc<dyn Network>,
        config: Config,
        parts: Parts,
        stop: CancellationToken,
    ) -> Result<Self, Error> {
        let cluster_id: ClusterId = pki::cluster_id(&config.data_dir)?;
        let identity = Identity::load_dir(config.tls_dir(), "controller")?.on(network);
        let tls = identity.server_config(&[tls::ALPN_H2, tls::ALPN_HTTP1])?;
        let failed = |source| Error::Listen {
            address: config.listen.to_string(),
            source,
        };
        let listener = identity.listen(config.listen).await.map_err(failed)?;
        let unix = config.unix_socket.as_ref().map(listen_unix).transpose()?;
        let address = listener.address().map_err(failed)?;

        let (data_dir, reserve_bytes) = (config.data_dir.clone(), u64::from(config.store_reserve_mib) << 20);
        let config = Arc::new(config);
        let limits = config.limits;
        let core = Core::start(config, cluster_id, Arc::new(identity), parts, stop.clone()).await?;
        let routes = routes(core.routes(), core.page())?;
        let tasks = core.tasks();
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
        let space = space::source(data_dir);
        tasks.spawn(space::run(core.db().clone(), space, reserve_bytes, stop.clone()));
        let term = core.db().snapshot().meta.term;
        tracing::info!(%address, %cluster_id, %term, "serving");
        Ok(Self {
            address,
            core,
            stop,
            server,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its state.
    pub fn db(&self) -> &Db {
        self.core.db()
    }

    /// Waits until it was told to stop and has stopped, or until its server has failed.
    pub async fn finished(mut self) -> Result<(), Error> {
        let mut failed = None;
        let ended = tokio::select! {
            biased;
            // Cancel safe: a message not received stays in its channel.
            part = self.core.failed() => {
                failed = Some(part);
                None
            }
            ended = &mut self.server => Some(ended),
            // Cancel safe: the server is waited for again below.
            () = self.stop.cancelled() => tokio::time::timeout(STOP_TIMEOUT, &mut self.server).await.ok(),
        };
        self.stop.cancel();
        if tokio::time::timeout(STOP_TIMEOUT, self.core.stopped())
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

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
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

/// What reflection lists: the descriptions name the agents' service too, which is not served here.
const SERVED: [&str; 16] = [
    v1::vm_service_server::SERVICE_NAME,
    v1::host_service_server::SERVICE_NAME,
    v1::operation_service_server::SERVICE_NAME,
    v1::placement_service_server::SERVICE_NAME,
    v1::event_service_server::SERVICE_NAME,
    v1::site_service_server::SERVICE_NAME,
    v1::image_service_server::SERVICE_NAME,
    v1::network_service_server::SERVICE_NAME,
    v1::volume_service_server::SERVICE_NAME,
    v1::snapshot_service_server::SERVICE_NAME,
    v1::plan_service_server::SERVICE_NAME,
    v1::backup_service_server::SERVICE_NAME,
    registrar_service_server::SERVICE_NAME,
    tonic_health::pb::health_server::SERVICE_NAME,
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// The API's services, those beside them with their rules, and the metrics page.
fn routes(api: Routes, page: Page) -> Result<axum::Router, Error> {
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
    let routes = api
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

    #[test]
    fn what_began_together_does_not_end_together() {
        let age = Duration::from_secs(1800);
        let ages: std::collections::BTreeSet<_> = (0..100).map(|_| jittered(age, 10)).collect();
        assert!(ages.len() > 50, "{ages:?}");
        assert!(*ages.first().unwrap() >= age * 9 / 10 && *ages.last().unwrap() <= age * 11 / 10);
    }
}
