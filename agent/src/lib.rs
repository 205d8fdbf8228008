//! The agent: on each server it carries out what the controller intends, through libvirt, and reports what is.
//!
//! ```text
//!   controller ──commands──> server ──> gate ──> vm (one task each) ──> ledger, then hypervisor
//!   controller <──reports─── reporter <─────────── status, samples <──── telemetry
//!   peer agent <══streams══> migration::streams <── libvirt, QEMU
//!   ApplyNetworks ─────────> network <── which interfaces are here
//!   peer agent ──images────> images <── what VMs' disks are made from
//! ```
//!
//! [`run`] makes the real parts and starts an [`Agent`] on them; `main` only reads arguments. The tests run many agents in
//! one process.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use dalgu_proto::{
    agent::v1::{
        agent_backup_service_server::AgentBackupServiceServer,
        agent_image_service_server::AgentImageServiceServer,
        agent_network_service_server::AgentNetworkServiceServer, agent_service_server::AgentServiceServer,
        agent_volume_service_server::AgentVolumeServiceServer, peer_service_server::PeerServiceServer,
    },
    ids::NewIds,
    time::Clock,
    tls::{
        self, Identity, Role,
        network::{Listener, Machine, Network},
        server::Acceptor,
    },
};
use prometheus_client::{
    metrics::gauge::Gauge,
    registry::{Registry, Unit},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use uuid::Uuid;

use crate::{
    config::Config, host::usage::Sampler, hypervisor::Hypervisor, ledger::Ledger, metrics::Snapshot,
    migration::streams::Streams, telemetry::Telemetry,
};

pub use agent::{Agent, AgentParts};

mod agent;
pub mod backups;
pub mod config;
mod console;
pub mod devices;
pub mod first_boot;
pub mod gate;
pub mod host;
pub mod hypervisor;
pub mod image;
pub mod images;
pub mod ledger;
pub mod metrics;
pub mod migration;
pub mod network;
pub mod pins;
mod qemu_img;
mod recovery;
pub mod reporter;
pub mod server;
mod telemetry;
pub mod vm;
pub mod volumes;
pub mod wire;

/// Longest time a stopping agent takes.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of one connection that are served at once.
const MAX_STREAMS: u32 = 256;
/// Largest header list of a request.
const MAX_HEADERS_BYTES: u32 = 16 * 1024;
/// Streams that a caller has reset before they were looked at; more end the connection (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
/// Streams that were reset here for the caller's errors; more end the connection (CVE-2025-8671).
const MAX_LOCAL_RESETS: usize = 100;
/// Longest time of a call: many times what the controller waits for one, so that nothing stays for ever.
const CALL_TIME: Duration = Duration::from_mins(2);
/// Migration streams that wait to be taken; the taker never waits for anything.
const WAITING_STREAMS: usize = 16;

/// Runs an agent until `stop` is cancelled. `ready` is called once it listens and knows what is true on its host.
pub async fn run(
    config: Config,
    hypervisor: Arc<dyn Hypervisor>,
    stop: CancellationToken,
    ready: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    run_on(Arc::new(Machine), config, hypervisor, stop, ready).await
}

/// As [`run`], on a network that is handed in.
pub async fn run_on(
    network: Arc<dyn Network>,
    config: Config,
    hypervisor: Arc<dyn Hypervisor>,
    stop: CancellationToken,
    ready: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let identity = Identity::load_dir(&config.tls_dir, "agent").context("the agent's identity")?;
    let identity = identity.on(network);
    check_identity(&config, &identity)?;
    if let Err(problem) = host::pci::check_on(&host::Root::default(), &config.pci) {
        anyhow::bail!("the configuration's pci: {problem}");
    }
    let listener = listen(&identity, config.listen)
        .await
        .with_context(|| format!("cannot listen at {}", config.listen))?;
    let boot_id =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("the kernel's boot id")?;
    let streams = Streams::new(config.run_dir.clone(), qemu_owner(&config)?, identity.clone());
    let channel = tls::client::connect_lazy(&config.controller, tls::CONTROLLER_NAME, &identity)?;
    let (out, samples) = watch::channel(Arc::default());
    let parts = AgentParts {
        host: config.host.clone(),
        site: identity.site()?,
        address: config.address(),
        boot_id: boot_id.trim().to_owned(),
        machine: machine(),
        hypervisor: hypervisor.clone(),
        ledger: Ledger::open(&config.data_dir.join("ledger"))?,
        images: images(&config, &identity, stop.clone()).await?,
        network: network_system(&config),
        transport: Arc::new(streams.clone()),
        controller: tls::client::caller(channel),
        clock: Clock::system(),
        ids: NewIds::random(),
        samples: samples.clone(),
    };
    let agent = Agent::start(parts, stop.clone()).await?;
    let sampler = Sampler::new(config.pool_configs(), vec![config.data_dir.clone()]);
    let simulated = config.hypervisor == config::Hypervisor::Sim;
    let sampler = sampler.naming(config.pci.clone(), simulated);
    let telemetry = Telemetry::new(sampler, agent.vms().clone(), out);

    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let (incoming, incoming_streams) = mpsc::channel(WAITING_STREAMS);
    let control_socket = hypervisor.control_socket().to_owned();
    tasks.spawn(async move {
        streams.serve(incoming_streams, control_socket).await;
        Ok(())
    });
    tasks.spawn(serve(
        listener,
        identity,
        incoming,
        agent.server(),
        registry(samples, agent.report_bytes()),
        stop.clone(),
    ));
    let (period, telemetry_stop) = (config.usage_interval(), stop.clone());
    tasks.spawn(async move {
        telemetry.run(period, telemetry_stop).await;
        Ok(())
    });
    let vms = agent.vms().clone();
    tasks.spawn(async move { Ok(agent.run(ready).await?) });

    let outcome = first_failure(&mut tasks, &stop).await;
    stop.cancel();
    vms.stopped().await;
    tasks.shutdown().await;
    outcome
}

/// What makes networks on this host.
fn network_system(config: &Config) -> Arc<dyn network::System> {
    let overlay_address = config.overlay_address();
    match config.hypervisor {
        config::Hypervisor::Libvirt => Arc::new(network::Linux::new(&config.run_dir, overlay_address)),
        config::Hypervisor::Sim => Arc::new(network::Simulated { overlay_address }),
    }
}

/// The store of images, in its directory.
async fn images(
    config: &Config,
    identity: &Identity,
    stop: CancellationToken,
) -> anyhow::Result<images::Images> {
    let directories = config.pools.iter().filter(|pool| pool.kind.is_directory());
    let converts = config.hypervisor == config::Hypervisor::Libvirt;
    let pools = directories.map(|pool| pool.path.clone()).collect();
    let dir = &config.image_store_dir;
    let unusable = || format!("the store of images in {}", dir.display());
    let files = images::Directory::open(dir, &config.images_dir, pools, converts).with_context(unusable)?;
    let peers = Arc::new(images::TlsPeers::new(identity.clone()));
    images::Images::open(config.host.clone(), Arc::new(files), peers, Clock::system(), stop)
        .await
        .with_context(unusable)
}

/// The machine's own id, which a copy of the data directory does not bring along.
fn machine() -> Option<Uuid> {
    let text = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let machine = text.trim().parse().ok().filter(|id: &Uuid| !id.is_nil());
    if machine.is_none() {
        tracing::warn!(
            "/etc/machine-id holds no id: a second machine with this host's identity cannot be told from it"
        );
    }
    machine
}

/// Waits for the agent to be stopped, or for a part of it to fail.
async fn first_failure(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    loop {
        // Cancel safe: an ended task that was not joined is joined the next time.
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            ended = tasks.join_next() => match ended {
                Some(outcome) => outcome??,
                None => return Ok(()),
            },
        }
    }
}

/// So long it is waited for the address.
const ADDRESS_IN_USE: Duration = Duration::from_secs(10);

/// Listens. A process that the agent before had just begun has its sockets until it runs its own program, also when that agent was killed.
async fn listen(identity: &Identity, address: SocketAddr) -> io::Result<Box<dyn Listener>> {
    let end = Instant::now() + ADDRESS_IN_USE;
    loop {
        match identity.listen(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                sleep(Duration::from_millis(100)).await;
            }
            listener => return listener,
        }
    }
}

fn check_identity(config: &Config, identity: &Identity) -> anyhow::Result<()> {
    match identity.peer().context("the agent's certificate")?.role {
        Role::Agent(host) if host == config.host => Ok(()),
        _ => anyhow::bail!(
            "{} is not the certificate of host {}; issue one with `dalgu-controller issue-agent --host {}`",
            config.tls_dir.join("agent.pem").display(),
            config.host,
            config.host,
        ),
    }
}

fn qemu_owner(config: &Config) -> anyhow::Result<Option<(u32, u32)>> {
    let Some(name) = &config.qemu_user else {
        return Ok(None);
    };
    let user =
        nix::unistd::User::from_name(name)?.with_context(|| format!("qemu_user: there is no user {name}"))?;
    Ok(Some((user.uid.as_raw(), user.gid.as_raw())))
}

async fn serve(
    listener: Box<dyn Listener>,
    identity: Identity,
    streams: mpsc::Sender<tls::server::MigrationStream>,
    commands: Routes,
    registry: Registry,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let config = identity.server_config(&[tls::ALPN_H2, tls::ALPN_HTTP1, tls::ALPN_STREAM])?;
    let (acceptor, connections) = Acceptor::new(identity.site()?, Some(streams));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<AgentServiceServer<server::Service>>().await;
    health
        .set_serving::<AgentImageServiceServer<images::server::Service>>()
        .await;
    health
        .set_serving::<AgentNetworkServiceServer<network::server::Service>>()
        .await;
    health
        .set_serving::<AgentBackupServiceServer<backups::server::Service>>()
        .await;
    health
        .set_serving::<PeerServiceServer<images::server::Service>>()
        .await;
    health
        .set_serving::<AgentVolumeServiceServer<volumes::server::Service>>()
        .await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(dalgu_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let registry = Arc::new(registry);
    let routes = commands
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        // What grpcurl before 1.8.8 asks for.
        .add_service(reflection().build_v1alpha()?)
        .into_axum_router()
        .route(
            "/metrics",
            axum::routing::get(move |headers| metrics_page(registry.clone(), headers)),
        );
    let refused = |error: &dyn std::error::Error| tracing::info!(%error, "a caller was turned away");
    let accepting = acceptor.run(listener, config, refused);
    let serving = tonic::transport::Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(MAX_LOCAL_RESETS))
        .timeout(CALL_TIME)
        .http2_keepalive_interval(Some(tls::client::KEEPALIVE))
        .http2_keepalive_timeout(Some(tls::client::KEEPALIVE))
        .layer(dalgu_proto::size::Limit)
        .add_routes(routes.into())
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.cancelled_owned());
    // Both end together: the listener is closed when this returns.
    tokio::select! {
        biased;
        served = serving => Ok(served?),
        () = accepting => Ok(()),
    }
}

/// What the metrics page shows.
fn registry(samples: watch::Receiver<Arc<Snapshot>>, report_bytes: Gauge) -> Registry {
    let clock = || host::process::clock().unwrap_or_default();
    let mut registry = metrics::registry(env!("CARGO_PKG_VERSION"), samples, clock);
    registry.register_with_unit(
        "dalgu_agent_report",
        "Size of the last report to the controller, on the wire",
        Unit::Bytes,
        report_bytes,
    );
    registry
}

async fn metrics_page(registry: Arc<Registry>, headers: http::HeaderMap) -> axum::response::Response {
    use axum::response::IntoResponse;
    let accept = headers
        .get(http::header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    match metrics::respond(accept, &registry) {
        Ok((content_type, body)) => ([(http::header::CONTENT_TYPE, content_type)], body).into_response(),
        Err(_) => http::StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Makes the hypervisor that the configuration names.
pub async fn hypervisor(
    config: &Config,
    site: dalgu_proto::ids::ClusterId,
) -> anyhow::Result<Arc<dyn Hypervisor>> {
    make_dir(&config.run_dir)?;
    make_dir(&config.console_dir)?;
    match config.hypervisor {
        config::Hypervisor::Sim => {
            let mut sim = hypervisor::sim::SimConfig::new(site);
            sim.control_socket = Some(config.run_dir.join("sim.sock"));
            sim.console_dir = Some(config.console_dir.clone());
            sim.shared_pools = config
                .pools
                .iter()
                .filter(|pool| pool.is_shared())
                .map(|pool| pool.name.clone())
                .collect();
            sim.delays = hypervisor::sim::Delays::LIFELIKE;
            Ok(Arc::new(hypervisor::sim::Sim::new(sim)?))
        }
        #[cfg(feature = "libvirt")]
        config::Hypervisor::Libvirt => libvirt(config, site).await,
        #[cfg(not(feature = "libvirt"))]
        config::Hypervisor::Libvirt => {
            anyhow::bail!("this agent was built without libvirt; use hypervisor = \"sim\"")
        }
    }
}

fn make_dir(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the directory {}", path.display()))
}

#[cfg(feature = "libvirt")]
async fn libvirt(config: &Config, site: dalgu_proto::ids::ClusterId) -> anyhow::Result<Arc<dyn Hypervisor>> {
    use hypervisor::libvirt::{Accel, Libvirt, LibvirtConfig, Pool};
    let pool = |pool: &config::Pool| Pool {
        name: pool.name.clone(),
        path: pool.path.clone(),
        shared: pool.is_shared(),
        mounted: pool.kind == config::PoolType::Nfs,
    };
    let directories = config.pools.iter().filter(|pool| pool.kind.is_directory());
    let libvirt = LibvirtConfig {
        cluster: site,
        uri: config.libvirt_uri.clone(),
        pools: directories.map(pool).collect(),
        images_dir: config.images_dir.clone(),
        image_store_dir: config.image_store_dir.clone(),
        console_dir: config.console_dir.clone(),
        accel: match config.accel {
            config::Accelerator::Auto => Accel::Auto,
            config::Accelerator::Kvm => Accel::Kvm,
            config::Accelerator::Tcg => Accel::Tcg,
        },
        run_dir: config.run_dir.clone(),
        qemu_user: config.qemu_user.clone(),
    };
    Ok(Arc::new(Libvirt::start(libvirt).await?))
}
