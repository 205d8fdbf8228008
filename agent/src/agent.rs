//! An agent without its sockets: everything outside is handed in as [`AgentParts`].
//!
//! [`crate::run`] makes the real parts, and puts the server and the samples around it; tests that run a whole site on one
//! clock hand in their own. What it does to the outside it does through its parts alone, so a test can stop it at any
//! of them as a crash would.

use std::{sync::Arc, time::Duration};

use dalgu_proto::{
    agent::v1::{
        agent_backup_service_server::AgentBackupServiceServer,
        agent_image_service_server::AgentImageServiceServer,
        agent_network_service_server::AgentNetworkServiceServer, agent_service_server::AgentServiceServer,
        agent_volume_service_server::AgentVolumeServiceServer, peer_service_server::PeerServiceServer,
        registrar_service_client::RegistrarServiceClient,
    },
    ids::{ClusterId, HostName, NewIds},
    size::MAX_REQUEST_BYTES,
    time::Clock,
    tls::client::Caller,
};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, interceptor::InterceptedService};
use uuid::Uuid;

use crate::{
    backups::{self, Backups},
    devices::Devices,
    gate::Gate,
    hypervisor::Hypervisor,
    images::{self, Images},
    ledger::{self, Contents, Ledger},
    metrics::Snapshot,
    migration::transport::Transport,
    network::{self, Networks},
    pins::Pins,
    recovery, reporter,
    reporter::Reporter,
    server::{self, Service},
    vm::{Shared, Vms},
    volumes::{self, Volumes},
};

/// The controller is told of the host after this time even when the hypervisor cannot be asked yet what is here: else a
/// host whose hypervisor is out of order would look like one that is off.
const HYPERVISOR_WAIT: Duration = Duration::from_secs(5);

/// What an agent needs of the world.
pub struct AgentParts {
    /// This host.
    pub host: HostName,
    /// The site.
    pub site: ClusterId,
    /// Where controller and peers reach this agent, "address:port".
    pub address: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// The machine's own id; `None` where it has none, and then a copied ledger is not noticed.
    pub machine: Option<Uuid>,
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The ledger.
    pub ledger: Ledger,
    /// The store of images. It is to end by the token that the agent is given.
    pub images: Images,
    /// What makes networks here.
    pub network: Arc<dyn network::System>,
    /// Leads to other hosts during migrations.
    pub transport: Arc<dyn Transport>,
    /// Leads to the controller.
    pub controller: Caller,
    /// The wall clock.
    pub clock: Clock,
    /// Where the id of this run comes from.
    pub ids: NewIds,
    /// The samples; nothing is told to the controller before the first with usage.
    pub samples: watch::Receiver<Arc<Snapshot>>,
}

/// See the module's documentation.
pub struct Agent {
    vms: Vms,
    service: Service,
    images: images::server::Service,
    networks: network::server::Service,
    volumes: volumes::server::Service,
    backups: backups::server::Service,
    reporter: Reporter,
    contents: Contents,
    stop: CancellationToken,
}

impl Agent {
    /// Reads the ledger. Nothing is obeyed, done or told before [`Agent::run`].
    ///
    /// # Errors
    /// If the ledger cannot be read.
    pub async fn start(parts: AgentParts, stop: CancellationToken) -> Result<Self, ledger::Error> {
        let mut contents = parts.ledger.load().await?;
        let networks = Networks::new(parts.network, parts.ledger.clone(), contents.networks.take());
        let gate = Arc::new(Gate::new(
            parts.site,
            parts.host,
            parts.machine,
            parts.ledger.clone(),
            contents.host,
        ));
        let volumes = volumes::server::Service {
            gate: gate.clone(),
            volumes: Volumes::default(),
            hypervisor: parts.hypervisor.clone(),
        };
        let backups = Backups::new(
            parts.hypervisor.clone(),
            parts.ledger.clone(),
            parts.clock.clone(),
            std::mem::take(&mut contents.backups),
            std::mem::take(&mut contents.removed_backups),
        );
        let shared = Shared {
            hypervisor: parts.hypervisor,
            ledger: parts.ledger,
            images: parts.images.clone(),
            networks: networks.clone(),
            volumes: volumes.volumes.clone(),
            pins: Pins::default(),
            devices: Devices::default(),
            samples: parts.samples.clone(),
            transport: parts.transport,
            clock: parts.clock,
            boot_id: parts.boot_id.clone(),
            cluster: parts.site,
            changes: watch::Sender::default(),
        };
        let vms = Vms::new(shared, stop.clone());
        let images = images::server::Service {
            latest: Arc::default(),
            gate: gate.clone(),
            images: parts.images,
        };
        let networks = network::server::Service {
            gate: gate.clone(),
            networks,
        };
        let backups = backups::server::Service {
            gate: gate.clone(),
            vms: vms.clone(),
            backups,
        };
        let service = Service {
            gate: gate.clone(),
            vms: vms.clone(),
            samples: parts.samples.clone(),
            boot_id: parts.boot_id.clone(),
        };
        let client = RegistrarServiceClient::new(parts.controller);
        let reporter = Reporter {
            client: client.max_encoding_message_size(MAX_REQUEST_BYTES),
            address: parts.address,
            boot_id: parts.boot_id,
            run_id: parts.ids.next().to_string(),
            gate,
            vms: vms.clone(),
            images: images.images.clone(),
            samples: parts.samples,
            report_bytes: Gauge::default(),
            sequence: 0,
        };
        Ok(Self {
            vms,
            service,
            images,
            networks,
            volumes,
            backups,
            reporter,
            contents,
            stop,
        })
    }

    /// The agent's gRPC services: commands are for the controller only, and reading images for agents. Each request must bear a
    /// [`dalgu_proto::tls::Peer`] in its extensions. They refuse commands until recovery is over.
    pub fn server(&self) -> Routes {
        let commands = AgentServiceServer::new(self.service.clone())
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        let images = AgentImageServiceServer::new(self.images.clone())
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        let networks = AgentNetworkServiceServer::new(self.networks.clone())
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        let volumes = AgentVolumeServiceServer::new(self.volumes.clone())
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        let backups = AgentBackupServiceServer::new(self.backups.clone())
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        let peers = PeerServiceServer::new(self.images.clone())
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_REQUEST_BYTES);
        Routes::new(InterceptedService::new(commands, server::only_controller))
            .add_service(InterceptedService::new(images, server::only_controller))
            .add_service(InterceptedService::new(networks, server::only_controller))
            .add_service(InterceptedService::new(volumes, server::only_controller))
            .add_service(InterceptedService::new(backups, server::only_controller))
            .add_service(InterceptedService::new(peers, images::server::only_agents))
    }

    /// The VMs, for whoever samples them.
    pub fn vms(&self) -> &Vms {
        &self.vms
    }

    /// Size of the last report on the wire, for the metrics page.
    pub fn report_bytes(&self) -> Gauge {
        self.reporter.report_bytes.clone()
    }

    /// Finds out what is true on the host, then obeys; tells the controller of it. Returns when the agent was stopped, with
    /// every VM's task ended, or when it cannot go on. `ready` is called once it knows what is true, or at least that the
    /// hypervisor does not say. On a copy of another machine's ledger it does nothing but tell the controller so.
    ///
    /// # Errors
    /// If the controller is not this host's, or the ledger is another machine's.
    pub async fn run(self, ready: impl FnOnce()) -> Result<(), reporter::Error> {
        let Self {
            vms,
            images,
            networks,
            backups,
            reporter,
            contents,
            stop,
            ..
        } = self;
        let gate = reporter.gate.clone();
        if gate.copied_from().await.is_some() {
            return reporter.disown(stop).await;
        }
        let finding_out = find_out(
            vms.clone(),
            networks.networks,
            backups.backups,
            contents,
            gate.clone(),
            stop.clone(),
        );
        let telling = tell(reporter, gate, ready, stop.clone());
        // A controller that is not this host's ends it at once, also while the hypervisor is still asked.
        let outcome = futures::future::try_join(finding_out, telling).await;
        stop.cancel();
        vms.stopped().await;
        images.images.stopped().await;
        outcome.map(drop)
    }
}

/// Finds out what is true on the host, then lets commands in, keeps the networks of the VMs that it knows by then, and takes backups.
async fn find_out(
    vms: Vms,
    networks: Networks,
    backups: Backups,
    contents: Contents,
    gate: Arc<Gate>,
    stop: CancellationToken,
) -> Result<(), reporter::Error> {
    // Cancel safe: recovery only reads and starts tasks, which end by the same token.
    tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        () = recovery::recover(&vms, contents) => gate.open(),
    }
    // Both end by the same token.
    tokio::join!(networks.run(stop.clone()), backups.run(stop));
    Ok(())
}

/// Tells the controller, from the time on at which there is something to tell.
async fn tell(
    reporter: Reporter,
    gate: Arc<Gate>,
    ready: impl FnOnce(),
    stop: CancellationToken,
) -> Result<(), reporter::Error> {
    // Both are only waited for.
    tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        _ = timeout(HYPERVISOR_WAIT, gate.opened()) => {}
    }
    ready();
    reporter.run(stop).await
}

#[cfg(test)]
mod tests;
