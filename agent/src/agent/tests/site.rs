//! What agents in one process are handed, and how tests speak with them.

use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    task,
};

use async_trait::async_trait;
use dalgu_proto::{
    agent::v1::{
        self as wire,
        agent_image_service_client::AgentImageServiceClient,
        agent_service_client::AgentServiceClient,
        registrar_service_server::{RegistrarService, RegistrarServiceServer},
    },
    host::Usage,
    ids::MigrationId,
    tls::{
        Peer as Identity, Role,
        client::{caller_in_process, caller_in_process_as},
    },
    v1,
};
use tokio::time::{Instant, sleep};
use tonic::{Request, Response, Status, codegen::Service as TowerService};
use uuid::Uuid;

use super::super::*;
use crate::{
    hypervisor::{
        DomainState,
        sim::{Delays, MemoryLines, Sim, SimConfig},
    },
    images::{Memory, Peers, Source},
    ledger::Files,
    migration::transport::{Peer, Relay, Word},
};

pub const SITE: &str = "6f1c6c5e-5d8b-4c39-9f0e-0a4a7a6c1c55";
pub const RUN: &str = "0f0e0d0c-0000-4000-8000-00000000000a";
pub const VM: &str = "00000000-0000-4000-8000-000000000001";
pub const MIGRATION: &str = "00000000-0000-4000-8000-000000000077";

/// What happens, in order, with its time.
#[derive(Clone)]
pub struct History {
    pub began: Instant,
    pub lines: Arc<Mutex<Vec<String>>>,
}

pub fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl History {
    pub fn say(&self, what: String) {
        let line = format!("{:>9?} {what}", self.began.elapsed());
        lock(&self.lines).push(line);
    }
}

pub type Folder = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// A ledger's files, which outlive the agent.
#[derive(Clone)]
pub struct Shelf {
    pub host: String,
    pub history: History,
    pub files: Folder,
}

#[async_trait]
impl Files for Shelf {
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        Ok(lock(&self.files).clone().into_iter().collect())
    }

    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        sleep(Duration::from_millis(3)).await;
        let text = String::from_utf8_lossy(&bytes);
        self.history.say(format!("{} writes {name} {text}", self.host));
        lock(&self.files).insert(name.to_owned(), bytes);
        Ok(())
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        lock(&self.files).remove(name);
        Ok(())
    }
}

type Grants = Arc<Mutex<BTreeMap<(String, MigrationId), (HostName, Word)>>>;

/// The streams between the hosts: every hypervisor's path can be reached from everywhere, by who was let in.
pub struct Roads {
    pub own: HostName,
    pub grants: Grants,
}

pub fn control(host: &str) -> String {
    format!("/{host}/control")
}

#[async_trait]
impl Transport for Roads {
    async fn allow(&self, migration: MigrationId, source: HostName) -> io::Result<Word> {
        let mut grants = lock(&self.grants);
        let grant = grants
            .entry((self.own.to_string(), migration))
            .or_insert_with(|| (source, Word::default()));
        Ok(grant.1.clone())
    }

    async fn revoke(&self, migration: MigrationId) {
        lock(&self.grants).remove(&(self.own.to_string(), migration));
    }

    async fn open(&self, migration: MigrationId, peer: &Peer) -> io::Result<Relay> {
        let let_in = lock(&self.grants)
            .get(&(peer.host.to_string(), migration))
            .is_some_and(|(source, _)| *source == self.own);
        let leads_to = if let_in {
            control(peer.host.as_str())
        } else {
            "/nowhere".to_owned()
        };
        Ok(Relay::new(leads_to.into(), "unused".into(), "unused".into(), ()))
    }

    async fn tell_released(&self, migration: MigrationId, peer: &Peer, _: Option<Instant>) -> io::Result<()> {
        match lock(&self.grants).get(&(peer.host.to_string(), migration)) {
            Some((source, word)) if *source == self.own => word.say(),
            _ => return Err(io::ErrorKind::PermissionDenied.into()),
        }
        Ok(())
    }

    async fn remove(&self, _: MigrationId) -> io::Result<()> {
        Ok(())
    }
}

/// A controller that takes down what it is told.
#[derive(Clone)]
pub struct Registrar {
    pub history: History,
    /// The site it says it is of.
    pub cluster: Arc<Mutex<String>>,
    pub registered: Arc<Mutex<Vec<wire::RegisterRequest>>>,
    pub reports: Arc<Mutex<Vec<wire::ReportRequest>>>,
}

#[tonic::async_trait]
impl RegistrarService for Registrar {
    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterResponse>, Status> {
        let request = request.into_inner();
        self.history.say(format!("{request:?}"));
        lock(&self.registered).push(request);
        Ok(Response::new(wire::RegisterResponse {
            controller_run_id: RUN.to_owned(),
            session: 1,
            term: 1,
            cluster_id: lock(&self.cluster).clone(),
            report_interval: None,
        }))
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::ReportResponse>, Status> {
        let request = request.into_inner();
        self.history.say(format!("{request:?}"));
        lock(&self.reports).push(request);
        Ok(Response::new(wire::ReportResponse::default()))
    }
}

/// Every call comes from the controller, as its certificate would say.
#[derive(Clone)]
pub struct FromController<S>(S);

impl<B, S: TowerService<http::Request<B>>> TowerService<http::Request<B>> for FromController<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> task::Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> S::Future {
        request.extensions_mut().insert(Identity {
            role: Role::Controller,
            name: "controller".to_owned(),
        });
        self.0.call(request)
    }
}

/// Everything outside of a site's agents.
pub struct Site {
    pub history: History,
    pub registrar: Registrar,
    pub lines: MemoryLines,
    pub grants: Grants,
    pub clock: Clock,
    pub ids: NewIds,
    pub samples: watch::Sender<Arc<Snapshot>>,
    /// Agents that run, as other agents call them.
    pub hosts: Arc<Mutex<BTreeMap<String, Caller>>>,
    /// What is in every host's images directory.
    pub images_dir: BTreeMap<String, Vec<u8>>,
}

/// A host with its agent.
pub struct Host {
    pub sim: Sim,
    pub files: Folder,
    pub images: Memory,
    pub stop: CancellationToken,
    pub client: AgentServiceClient<Caller>,
    pub image_client: AgentImageServiceClient<Caller>,
    pub name: String,
    pub ended: tokio::task::JoinHandle<Result<(), reporter::Error>>,
}

impl Site {
    pub fn new() -> Self {
        let history = History {
            began: Instant::now(),
            lines: Arc::default(),
        };
        let began = history.began;
        let count = Arc::new(Mutex::new(0));
        let mut snapshot = Snapshot {
            usage: Some((Duration::ZERO, Arc::new(Usage::default()))),
            ..Snapshot::default()
        };
        Arc::make_mut(&mut snapshot.inventory).hypervisor = "simulated".to_owned();
        Self {
            registrar: Registrar {
                history: history.clone(),
                cluster: Arc::new(Mutex::new(SITE.to_owned())),
                registered: Arc::default(),
                reports: Arc::default(),
            },
            history,
            lines: MemoryLines::default(),
            grants: Grants::default(),
            clock: Clock::from_fn(move || {
                let since = jiff::SignedDuration::try_from(began.elapsed()).unwrap();
                jiff::Timestamp::UNIX_EPOCH + since
            }),
            ids: NewIds::from_fn(move || {
                *lock(&count) += 1;
                Uuid::from_u128(*lock(&count))
            }),
            samples: watch::Sender::new(Arc::new(snapshot)),
            hosts: Arc::default(),
            images_dir: BTreeMap::new(),
        }
    }

    pub fn sim(&self, name: &str) -> Sim {
        let config = SimConfig {
            control_socket: Some(control(name).into()),
            lines: Arc::new(self.lines.clone()),
            clock: self.clock.clone(),
            delays: Delays::LIFELIKE,
            ..SimConfig::new(SITE.parse().unwrap())
        };
        Sim::new(config).unwrap()
    }

    pub async fn start(&self, name: &str, sim: Sim, files: Folder) -> Host {
        self.start_on(1, name, sim, files).await
    }

    /// Host h1, on which the VM runs.
    pub async fn with_a_vm(&self) -> Host {
        let mut host = self.start("h1", self.sim("h1"), Folder::default()).await;
        self.until("a host", |report| report.host == "h1").await;
        host.ensure().await.unwrap();
        self.until("running", settled("h1")).await;
        host
    }

    /// How hosts read images of each other.
    fn reach(&self) -> impl Peers + use<> {
        let hosts = self.hosts.clone();
        move |source: &Source| {
            let there = lock(&hosts).get(source.host.as_str()).cloned();
            there.ok_or_else(|| Status::unavailable("nobody is there"))
        }
    }

    /// What an agent on a machine needs of the world.
    pub fn parts(
        &self,
        machine: u128,
        name: &str,
        (sim, files, images): (&Sim, &Folder, &Memory),
        stop: &CancellationToken,
    ) -> AgentParts {
        AgentParts {
            host: name.parse().unwrap(),
            site: SITE.parse().unwrap(),
            address: format!("{name}:7443"),
            boot_id: "boot".to_owned(),
            machine: Some(Uuid::from_u128(machine)),
            hypervisor: Arc::new(sim.clone()),
            ledger: Ledger::on(Arc::new(Shelf {
                host: name.to_owned(),
                history: self.history.clone(),
                files: files.clone(),
            })),
            images: Images::in_memory(
                name.parse().unwrap(),
                images.clone(),
                self.reach(),
                self.clock.clone(),
                stop.clone(),
            ),
            network: Arc::new(crate::network::Simulated::default()),
            transport: Arc::new(Roads {
                own: name.parse().unwrap(),
                grants: self.grants.clone(),
            }),
            controller: caller_in_process(RegistrarServiceServer::new(self.registrar.clone())),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            samples: self.samples.subscribe(),
        }
    }

    pub async fn start_on(&self, machine: u128, name: &str, sim: Sim, files: Folder) -> Host {
        let images = Memory::new(1 << 40).with_images(self.images_dir.clone());
        self.start_with(machine, name, sim, files, images).await
    }

    pub async fn start_with(
        &self,
        machine: u128,
        name: &str,
        sim: Sim,
        files: Folder,
        images: Memory,
    ) -> Host {
        let stop = CancellationToken::new();
        let parts = self.parts(machine, name, (&sim, &files, &images), &stop);
        let agent = Agent::start(parts, stop.clone()).await.unwrap();
        let client = AgentServiceClient::new(caller_in_process(FromController(agent.server())));
        let image_client = AgentImageServiceClient::new(caller_in_process(FromController(agent.server())));
        let other = Identity {
            role: Role::Agent("another".parse().unwrap()),
            name: "another".to_owned(),
        };
        let as_peers_see_it = caller_in_process_as(other, agent.server());
        lock(&self.hosts).insert(name.to_owned(), as_peers_see_it);
        let ended = tokio::spawn(agent.run(|| ()));
        Host {
            sim,
            files,
            images,
            stop,
            client,
            image_client,
            name: name.to_owned(),
            ended,
        }
    }

    /// Waits for a report of which something is true.
    pub async fn until(&self, what: &str, is: impl Fn(&wire::ReportRequest) -> bool) {
        let found = async {
            while !lock(&self.registrar.reports).iter().any(&is) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_mins(5), found).await;
        assert!(waited.is_ok(), "never {what}: {:#?}", lock(&self.history.lines));
    }
}

pub fn vm_intent(epoch: u64) -> Option<wire::VmIntent> {
    Some(wire::VmIntent {
        uid: VM.to_owned(),
        name: "web".to_owned(),
        spec: Some(v1::VmSpec {
            vcpus: 1,
            memory_mib: 64,
            disks: vec![v1::Disk {
                name: "root".to_owned(),
                size_mib: 8,
                pool: "local".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        generation: 1,
        epoch,
        power_state: v1::PowerState::Running.into(),
        power_sequence: 1,
        ..Default::default()
    })
}

impl Host {
    pub fn context(&self) -> Option<wire::CommandContext> {
        Some(wire::CommandContext {
            controller_run_id: RUN.to_owned(),
            cluster_id: SITE.to_owned(),
            term: 1,
            session: 1,
            host: self.name.clone(),
            order: 0,
        })
    }

    pub async fn ensure(&mut self) -> Result<(), Status> {
        let request = wire::EnsureVmRequest {
            context: self.context(),
            vm: vm_intent(1),
        };
        self.client.ensure_vm(request).await.map(drop)
    }

    pub async fn settle(&mut self) -> wire::MigrationReport {
        let request = wire::SettleMigrationRequest {
            context: self.context(),
            migration_id: MIGRATION.to_owned(),
            vm_uid: VM.to_owned(),
        };
        self.client.settle_migration(request).await.unwrap().into_inner()
    }

    pub async fn finish(&mut self, owner: bool) {
        let request = wire::FinishMigrationRequest {
            context: self.context(),
            migration_id: MIGRATION.to_owned(),
            vm_uid: VM.to_owned(),
            owner,
            epoch: 2,
        };
        self.client.finish_migration(request).await.unwrap();
    }

    pub async fn state(&self) -> Option<DomainState> {
        let domains = self.sim.list().await.unwrap();
        domains.first().map(|domain| domain.state)
    }
}

pub fn settled(host: &str) -> impl Fn(&wire::ReportRequest) -> bool {
    move |report| {
        let settled =
            |vm: &wire::VmReport| vm.phase() == wire::VmPhase::Settled && vm.observed_generation == 1;
        report.host == host && report.vms.iter().any(settled)
    }
}
