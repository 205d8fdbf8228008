//! A site for a test: identities, agents that outlive the controller, and controllers that can be killed.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use dalgu_controller::{
    Controller, Parts,
    config::{Config, Placement, Power},
    pki,
    placement::Protect,
    server::limits::Limits,
    store::memory::Disk,
};
use dalgu_proto::{
    agent::v1::{
        agent_backup_service_server::AgentBackupServiceServer,
        agent_image_service_server::AgentImageServiceServer,
        agent_network_service_server::AgentNetworkServiceServer, agent_service_server::AgentServiceServer,
        agent_volume_service_server::AgentVolumeServiceServer,
    },
    ids::HostName,
    time::Clock,
    tls::{self, Identity, server::Acceptor},
    v1::{
        self, backup_service_client::BackupServiceClient, event_service_client::EventServiceClient,
        host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
        network_service_client::NetworkServiceClient, operation_service_client::OperationServiceClient,
        placement_service_client::PlacementServiceClient, plan_service_client::PlanServiceClient,
        vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
    },
};
use jiff::{SignedDuration, Timestamp};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use uuid::Uuid;

use super::{
    agent::Agent,
    fabric::{Fabric, Host},
};

/// Longest wait for anything in a test.
pub const LIMIT: Duration = Duration::from_secs(30);

pub struct Site {
    pub dir: tempfile::TempDir,
    pub disk: Disk,
    pub fabric: Fabric,
    /// What the next controller's port bears.
    pub limits: Limits,
    /// How hosts are switched off and on.
    pub power: Power,
    /// Room that the store's disk must have.
    pub reserve_mib: u32,
    /// Domains that the next controller keeps room for.
    pub protect: Protect,
    /// So many seconds the controllers' clock is ahead.
    ahead_seconds: Arc<AtomicI64>,
    endpoint: watch::Sender<String>,
    running: Option<CancellationToken>,
    /// Rung when the store of the running controller has failed.
    pub crashed: CancellationToken,
}

/// The operator's clients.
#[derive(Clone)]
pub struct Clients {
    pub vms: VmServiceClient<Channel>,
    pub hosts: HostServiceClient<Channel>,
    pub operations: OperationServiceClient<Channel>,
    pub events: EventServiceClient<Channel>,
    pub placement: PlacementServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
    pub networks: NetworkServiceClient<Channel>,
    pub plans: PlanServiceClient<Channel>,
    pub volumes: VolumeServiceClient<Channel>,
    pub backups: BackupServiceClient<Channel>,
}

impl Clients {
    pub fn new(channel: &Channel) -> Self {
        Self {
            vms: VmServiceClient::new(channel.clone()),
            hosts: HostServiceClient::new(channel.clone()),
            operations: OperationServiceClient::new(channel.clone()),
            events: EventServiceClient::new(channel.clone()),
            placement: PlacementServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel.clone()),
            networks: NetworkServiceClient::new(channel.clone()),
            plans: PlanServiceClient::new(channel.clone()),
            volumes: VolumeServiceClient::new(channel.clone()),
            backups: BackupServiceClient::new(channel.clone()),
        }
    }

    /// Waits for an operation to end.
    pub async fn ended(&mut self, operation: v1::Operation) -> v1::Operation {
        let timeout = Some(prost_types::Duration {
            seconds: 30,
            nanos: 0,
        });
        let request = v1::WaitOperationRequest {
            id: operation.id.clone(),
            timeout,
        };
        let operation = self
            .operations
            .wait_operation(request)
            .await
            .unwrap()
            .into_inner();
        assert!(operation.end_time.is_some(), "still under way: {operation:?}");
        operation
    }

    /// Waits for an operation to end as asked.
    pub async fn succeeded(&mut self, operation: v1::Operation) -> v1::Operation {
        let operation = self.ended(operation).await;
        assert_eq!(operation.state(), v1::OperationState::Succeeded, "{operation:?}");
        operation
    }

    pub async fn create(&mut self, name: &str) -> v1::Operation {
        self.vms.create_vm(create(name)).await.unwrap().into_inner()
    }

    pub async fn vm(&mut self, name: &str) -> v1::Vm {
        self.vms
            .get_vm(v1::GetVmRequest { name: name.into() })
            .await
            .unwrap()
            .into_inner()
    }
}

pub fn request_id() -> String {
    Uuid::new_v4().to_string()
}

pub fn spec() -> v1::VmSpec {
    v1::VmSpec {
        vcpus: 1,
        memory_mib: 128,
        disks: vec![v1::Disk {
            name: "root".into(),
            size_mib: 100,
            ..Default::default()
        }],
        nics: vec![v1::Nic {
            name: "eth0".into(),
            bridge: "br0".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub fn create(name: &str) -> v1::CreateVmRequest {
    let vm = v1::Vm {
        name: name.into(),
        spec: Some(spec()),
        ..Default::default()
    };
    v1::CreateVmRequest {
        vm: Some(vm),
        ..Default::default()
    }
}

pub fn start(name: &str) -> v1::StartVmRequest {
    v1::StartVmRequest {
        name: name.into(),
        ..Default::default()
    }
}

pub fn stop(name: &str) -> v1::StopVmRequest {
    v1::StopVmRequest {
        name: name.into(),
        ..Default::default()
    }
}

pub fn delete(name: &str) -> v1::DeleteVmRequest {
    v1::DeleteVmRequest {
        name: name.into(),
        force: true,
        ..Default::default()
    }
}

pub fn migrate(name: &str) -> v1::MigrateVmRequest {
    v1::MigrateVmRequest {
        name: name.into(),
        ..Default::default()
    }
}

impl Site {
    /// A site with hosts h1 to hN; no controller yet.
    pub async fn new(hosts: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), "test", &["127.0.0.1".to_owned()]).unwrap();
        let fabric = Fabric::default();
        fabric.lock().transfer_steps = 4;
        tokio::spawn(fabric.clone().run());
        let (endpoint, controller) = watch::channel("https://127.0.0.1:1".to_owned());
        for number in 1..=hosts {
            agent(dir.path(), &fabric, &format!("h{number}"), controller.clone()).await;
        }
        let crashed = CancellationToken::new();
        Self {
            dir,
            disk: Disk::default(),
            fabric,
            limits: Limits::default(),
            power: Power::default(),
            reserve_mib: 1,
            protect: Protect::default(),
            ahead_seconds: Arc::default(),
            endpoint,
            running: None,
            crashed,
        }
    }

    pub fn config(&self) -> Config {
        Config {
            data_dir: self.dir.path().to_owned(),
            listen: ([127, 0, 0, 1], 0).into(),
            report_interval_ms: 500,
            limits: self.limits,
            power: self.power.clone(),
            store_reserve_mib: self.reserve_mib,
            placement: Placement {
                protect: self.protect.clone(),
                ..Placement::default()
            },
            ..Config::default()
        }
    }

    /// Starts a controller on the disk, and waits until every host reports that is not cut off.
    pub async fn start(&mut self) -> Clients {
        let clients = self.start_controller().await;
        let hosts = self
            .fabric
            .lock()
            .hosts
            .values()
            .filter(|host| !host.cut_off)
            .count();
        let ready = || async {
            let list = clients
                .clone()
                .hosts
                .list_hosts(v1::ListHostsRequest::default())
                .await;
            list.is_ok_and(|list| {
                list.get_ref()
                    .hosts
                    .iter()
                    .filter(|h| h.state() == v1::HostState::Ready)
                    .count()
                    >= hosts
            })
        };
        // A controller that is made to crash may do so now.
        eventually_or("hosts report", ready, &self.crashed).await;
        clients
    }

    pub async fn start_controller(&mut self) -> Clients {
        let stop = CancellationToken::new();
        let crashed = CancellationToken::new();
        let ring = crashed.clone();
        let ahead = self.ahead_seconds.clone();
        let parts = Parts {
            clock: Clock::from_fn(move || {
                Timestamp::now() + SignedDuration::from_secs(ahead.load(Ordering::Relaxed))
            }),
            ..Parts::new(self.disk.open(), move |_| ring.cancel())
        };
        let controller = Controller::start(self.config(), parts, stop.clone())
            .await
            .unwrap();
        let endpoint = format!("https://{}", controller.address());
        self.running = Some(stop);
        self.crashed = crashed;
        self.endpoint.send_replace(endpoint.clone());
        // On a machine that is busy otherwise a handshake may take longer than a client waits.
        let mut channel = self.channel(&endpoint, "admin").await;
        for _ in 0..5 {
            if channel.is_err() {
                channel = self.channel(&endpoint, "admin").await;
            }
        }
        Clients::new(&channel.unwrap())
    }

    /// Ends the controller without waiting for anything: what it had not stored is lost.
    pub fn kill(&mut self) {
        if let Some(stop) = self.running.take() {
            stop.cancel();
        }
    }

    pub async fn channel(&self, endpoint: &str, identity: &str) -> Result<Channel, tls::Error> {
        let identity = Identity::load_dir(self.dir.path(), identity).unwrap();
        tls::client::connect(endpoint, tls::CONTROLLER_NAME, &identity).await
    }

    /// Puts the controllers' clock on.
    pub fn pass(&self, time: Duration) {
        let seconds = i64::try_from(time.as_secs()).unwrap();
        self.ahead_seconds.fetch_add(seconds, Ordering::Relaxed);
    }

    /// Gives every host a pool that all of them see, with volumes and backups. Before a controller is started.
    pub fn share_storage(&self) {
        for host in self.fabric.lock().hosts.values_mut() {
            host.storage.offered = true;
        }
    }

    pub fn endpoint(&self) -> String {
        self.endpoint.borrow().clone()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn agent(dir: &Path, fabric: &Fabric, name: &str, controller: watch::Receiver<String>) {
    let host: HostName = name.parse().unwrap();
    let own = dir.join(name);
    pki::issue_agent(dir, &host, &["127.0.0.1".to_owned()], &own).unwrap();
    let identity = Identity::load_dir(&own, "agent").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    fabric.lock().hosts.insert(
        name.to_owned(),
        Host {
            address,
            ..Host::default()
        },
    );
    let agent = Agent {
        name: name.to_owned(),
        fabric: fabric.clone(),
    };
    let (acceptor, incoming) = Acceptor::new(identity.site().unwrap(), None);
    let tls = identity.server_config(&[tls::ALPN_H2]).unwrap();
    tokio::spawn(async move { acceptor.run(listener, tls, |_| {}).await });
    let server = tonic::transport::Server::builder()
        .add_service(AgentServiceServer::new(agent.clone()))
        .add_service(AgentImageServiceServer::new(agent.clone()))
        .add_service(AgentNetworkServiceServer::new(agent.clone()))
        .add_service(AgentVolumeServiceServer::new(agent.clone()))
        .add_service(AgentBackupServiceServer::new(agent.clone()));
    tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
    tokio::spawn(agent.report_for_ever(identity, controller));
}

/// Waits until something is so.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut so: impl FnMut() -> F) {
    let wait = async {
        while !so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait)
        .await
        .unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"));
}

/// As [`eventually`], but a crash ends the wait too.
pub async fn eventually_or<F: Future<Output = bool>>(
    what: &str,
    so: impl FnMut() -> F,
    crashed: &CancellationToken,
) {
    tokio::select! {
        () = eventually(what, so) => {}
        () = crashed.cancelled() => {}
    }
}

/// The stable reason of a refusal.
pub fn reason<T: std::fmt::Debug>(outcome: Result<T, tonic::Status>) -> String {
    let status = outcome.expect_err("was not refused");
    dalgu_proto::reason::of(&status).unwrap_or_else(|| panic!("no reason in {status:?}"))
}
