//! Whole agents in one process on one stopped clock, with everything outside handed in.

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
        agent_service_client::AgentServiceClient,
        registrar_service_server::{RegistrarService, RegistrarServiceServer},
    },
    host::Usage,
    ids::{MigrationId, VmId},
    tls::{Peer as Identity, Role, client::caller_in_process},
    v1,
};
use tokio::time::{Instant, sleep};
use tonic::{Code, Request, Response, Status, codegen::Service as TowerService};
use uuid::Uuid;

use super::*;
use crate::{
    hypervisor::{
        Connection, Definition, DomainState,
        sim::{Call, Delays, Fault, MemoryLines, Sim, SimConfig},
    },
    ledger::Files,
    migration::transport::{Peer, Relay},
};

const SITE: &str = "6f1c6c5e-5d8b-4c39-9f0e-0a4a7a6c1c55";
const VM: &str = "00000000-0000-4000-8000-000000000001";
const MIGRATION: &str = "00000000-0000-4000-8000-000000000077";

/// What happens, in order, with its time.
#[derive(Clone)]
struct History {
    began: Instant,
    lines: Arc<Mutex<Vec<String>>>,
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl History {
    fn say(&self, what: String) {
        let line = format!("{:>9?} {what}", self.began.elapsed());
        lock(&self.lines).push(line);
    }
}

type Folder = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// A ledger's files, which outlive the agent.
#[derive(Clone)]
struct Shelf {
    host: String,
    history: History,
    files: Folder,
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

type Grants = Arc<Mutex<BTreeMap<(String, MigrationId), (HostName, CancellationToken)>>>;

/// The streams between the hosts: every hypervisor's path can be reached from everywhere, by who was let in.
struct Roads {
    own: HostName,
    grants: Grants,
}

fn control(host: &str) -> String {
    format!("/{host}/control")
}

#[async_trait]
impl Transport for Roads {
    async fn allow(&self, migration: MigrationId, source: HostName) -> io::Result<CancellationToken> {
        let mut grants = lock(&self.grants);
        let grant = grants
            .entry((self.own.to_string(), migration))
            .or_insert_with(|| (source, CancellationToken::new()));
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

    async fn tell_released(&self, migration: MigrationId, peer: &Peer) -> io::Result<()> {
        match lock(&self.grants).get(&(peer.host.to_string(), migration)) {
            Some((source, word)) if *source == self.own => word.cancel(),
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
struct Registrar {
    history: History,
    registered: Arc<Mutex<Vec<wire::RegisterRequest>>>,
    reports: Arc<Mutex<Vec<wire::ReportRequest>>>,
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
            controller_run_id: String::new(),
            session: 1,
            term: 1,
            cluster_id: SITE.to_owned(),
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
struct FromController<S>(S);

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
struct Site {
    history: History,
    registrar: Registrar,
    lines: MemoryLines,
    grants: Grants,
    clock: Clock,
    ids: NewIds,
    samples: watch::Sender<Arc<Snapshot>>,
}

/// A host with its agent.
struct Host {
    sim: Sim,
    files: Folder,
    stop: CancellationToken,
    client: AgentServiceClient<Caller>,
    name: String,
    ended: tokio::task::JoinHandle<Result<(), reporter::Error>>,
}

impl Site {
    fn new() -> Self {
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
        }
    }

    fn sim(&self, name: &str) -> Sim {
        let config = SimConfig {
            control_socket: Some(control(name).into()),
            lines: Arc::new(self.lines.clone()),
            clock: self.clock.clone(),
            delays: Delays::LIFELIKE,
            ..SimConfig::new(SITE.parse().unwrap())
        };
        Sim::new(config).unwrap()
    }

    async fn start(&self, name: &str, sim: Sim, files: Folder) -> Host {
        self.start_on(1, name, sim, files).await
    }

    /// Host h1, on which the VM runs.
    async fn with_a_vm(&self) -> Host {
        let mut host = self.start("h1", self.sim("h1"), Folder::default()).await;
        self.until("a host", |report| report.host == "h1").await;
        host.ensure().await.unwrap();
        self.until("running", settled("h1")).await;
        host
    }

    async fn start_on(&self, machine: u128, name: &str, sim: Sim, files: Folder) -> Host {
        let stop = CancellationToken::new();
        let parts = AgentParts {
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
            transport: Arc::new(Roads {
                own: name.parse().unwrap(),
                grants: self.grants.clone(),
            }),
            controller: caller_in_process(RegistrarServiceServer::new(self.registrar.clone())),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            samples: self.samples.subscribe(),
        };
        let agent = Agent::start(parts, stop.clone()).await.unwrap();
        let client = AgentServiceClient::new(caller_in_process(FromController(agent.server())));
        let ended = tokio::spawn(agent.run(|| ()));
        Host {
            sim,
            files,
            stop,
            client,
            name: name.to_owned(),
            ended,
        }
    }

    /// Waits for a report of which something is true.
    async fn until(&self, what: &str, is: impl Fn(&wire::ReportRequest) -> bool) {
        let found = async {
            while !lock(&self.registrar.reports).iter().any(&is) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_mins(5), found).await;
        assert!(waited.is_ok(), "never {what}: {:#?}", lock(&self.history.lines));
    }
}

fn vm_intent(epoch: u64) -> Option<wire::VmIntent> {
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
    fn context(&self) -> Option<wire::CommandContext> {
        Some(wire::CommandContext {
            controller_run_id: String::new(),
            cluster_id: SITE.to_owned(),
            term: 1,
            session: 1,
            host: self.name.clone(),
        })
    }

    async fn ensure(&mut self) -> Result<(), Status> {
        let request = wire::EnsureVmRequest {
            context: self.context(),
            vm: vm_intent(1),
        };
        self.client.ensure_vm(request).await.map(drop)
    }

    async fn settle(&mut self) -> wire::MigrationReport {
        let request = wire::SettleMigrationRequest {
            context: self.context(),
            migration_id: MIGRATION.to_owned(),
            vm_uid: VM.to_owned(),
        };
        self.client.settle_migration(request).await.unwrap().into_inner()
    }

    async fn finish(&mut self, owner: bool) {
        let request = wire::FinishMigrationRequest {
            context: self.context(),
            migration_id: MIGRATION.to_owned(),
            vm_uid: VM.to_owned(),
            owner,
            epoch: 2,
        };
        self.client.finish_migration(request).await.unwrap();
    }

    async fn state(&self) -> Option<DomainState> {
        let domains = self.sim.list().await.unwrap();
        domains.first().map(|domain| domain.state)
    }
}

fn settled(host: &str) -> impl Fn(&wire::ReportRequest) -> bool {
    move |report| {
        let settled =
            |vm: &wire::VmReport| vm.phase() == wire::VmPhase::Settled && vm.observed_generation == 1;
        report.host == host && report.vms.iter().any(settled)
    }
}

/// A VM is made on one host and moves to another; returns what happened.
async fn a_move() -> Vec<String> {
    let site = Site::new();
    let mut source = site.start("h1", site.sim("h1"), Folder::default()).await;
    let mut destination = site.start("h2", site.sim("h2"), Folder::default()).await;
    site.until("two hosts", |report| report.host == "h2").await;
    source.ensure().await.unwrap();
    site.until("running on h1", settled("h1")).await;
    let prepare = wire::PrepareMigrationRequest {
        context: destination.context(),
        migration_id: MIGRATION.to_owned(),
        vm: vm_intent(2),
        source_host: "h1".to_owned(),
    };
    destination.client.prepare_migration(prepare).await.unwrap();
    let send = wire::StartMigrationRequest {
        context: source.context(),
        migration_id: MIGRATION.to_owned(),
        vm_uid: VM.to_owned(),
        epoch: 1,
        destination_host: "h2".to_owned(),
        destination_address: "h2:7443".to_owned(),
        max_downtime_ms: 100,
        bandwidth_mib_per_second: 0,
    };
    source.client.start_migration(send).await.unwrap();
    let sent = |report: &wire::ReportRequest| {
        let over = |m: &wire::MigrationReport| m.transfer() == wire::TransferState::Completed;
        report
            .vms
            .iter()
            .any(|vm| vm.migration.as_ref().is_some_and(over))
    };
    site.until("sent", sent).await;
    assert!(source.settle().await.settled && destination.settle().await.settled);
    source.finish(false).await;
    destination.finish(true).await;
    site.until("running on h2", settled("h2")).await;
    assert_eq!(source.state().await, None);
    assert_eq!(destination.state().await, Some(DomainState::Running));
    lock(&site.history.lines).clone()
}

#[test]
fn a_vm_moves_between_agents_in_memory_and_the_same_again_is_the_same_to_the_byte() {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(a_move())
    };
    let first = run();
    assert!(first.len() > 20, "{first:#?}");
    for _ in 0..5 {
        let again = run();
        for (first, again) in first.iter().zip(&again) {
            assert_eq!(first, again);
        }
        assert_eq!(first.len(), again.len());
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_whose_hypervisor_does_not_answer_registers_and_says_nothing_of_its_vms() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    let sim = before.sim.clone();

    sim.disconnect("libvirt is not there");
    assert!(matches!(*sim.connection().borrow(), Connection::Down(_)));
    lock(&site.registrar.registered).clear();
    lock(&site.registrar.reports).clear();
    before.stop.cancel();
    let mut agent = site.start("h1", sim.clone(), before.files.clone()).await;
    let registered = async {
        while lock(&site.registrar.registered).is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HYPERVISOR_WAIT * 2, registered)
        .await
        .expect("it registers all the same");
    let told = lock(&site.registrar.registered)[0].clone();
    assert!(!told.inventory_complete && told.vms.is_empty());
    assert!(told.hypervisor_error.contains("libvirt is not there"), "{told:?}");
    let refused = agent.ensure().await.unwrap_err();
    assert_eq!(
        refused.code(),
        Code::Unavailable,
        "it does not know yet what is here: {refused:?}"
    );

    let run = told.agent_run_id;
    sleep(Duration::from_secs(10)).await;
    let of_this_run: Vec<_> = lock(&site.registrar.reports)
        .iter()
        .filter(|report| report.agent_run_id == run)
        .cloned()
        .collect();
    assert!(!of_this_run.is_empty(), "the heartbeat goes on");
    assert!(
        of_this_run
            .iter()
            .all(|report| !report.inventory_complete && !report.hypervisor_error.is_empty())
    );
    sim.reconnect();
    site.until("everything is told", |report| {
        report.agent_run_id == run
            && report.inventory_complete
            && report.hypervisor_error.is_empty()
            && report.vms.len() == 1
    })
    .await;
    let early = lock(&site.registrar.reports)
        .iter()
        .any(|report| report.agent_run_id == run && report.inventory_complete && report.vms.is_empty());
    assert!(!early, "a list from before recovery was called complete");
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_told_as_it_was_left_until_a_restarted_agent_has_looked_at_it() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    let sim = before.sim.clone();
    lock(&site.registrar.registered).clear();
    lock(&site.registrar.reports).clear();
    before.stop.cancel();
    let _after = site.start("h1", sim, before.files.clone()).await;
    site.until("settled again", settled("h1")).await;
    let registered = lock(&site.registrar.registered)[0].clone();
    assert!(
        registered.vms[0].observe_time.is_none(),
        "it has looked: the test shows nothing"
    );
    let reports = lock(&site.registrar.reports).clone();
    let told = registered
        .vms
        .iter()
        .chain(reports.iter().flat_map(|report| &report.vms));
    for vm in told {
        assert_eq!(vm.power_state(), v1::PowerState::Running, "{vm:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn incident_11_a_destination_whose_pool_cannot_take_the_disks_refuses_and_need_not_be_asked_again() {
    let site = Site::new();
    let mut host = site.start("h2", site.sim("h2"), Folder::default()).await;
    site.until("a host", |report| report.host == "h2").await;
    host.sim.fail_next(
        Call::CreateVolumes,
        Fault::Error(crate::hypervisor::Error::Storage {
            pool: "local".to_owned(),
            detail: "a file is in the way".to_owned(),
        }),
    );
    let prepare = wire::PrepareMigrationRequest {
        context: host.context(),
        migration_id: MIGRATION.to_owned(),
        vm: vm_intent(2),
        source_host: "h1".to_owned(),
    };
    let refused = host.client.prepare_migration(prepare).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert_eq!(dalgu_proto::reason::of(&refused).as_deref(), Some("STORAGE"));
}

#[tokio::test(start_paused = true)]
async fn a_domain_with_dalgus_mark_that_comes_behind_its_back_is_reported_and_never_touched() {
    let site = Site::new();
    let mut host = site.start("h1", site.sim("h1"), Folder::default()).await;
    site.until("a host", |report| report.host == "h1").await;
    host.ensure().await.unwrap();
    site.until("running", settled("h1")).await;
    let own: VmId = VM.parse().unwrap();
    let definition = host.sim.definition(own).unwrap();
    let by_hand = async |definition: &Definition| {
        host.sim.create_volumes(definition, false).await.unwrap();
        host.sim.define(definition).await.unwrap();
        host.sim.start(definition.id).await.unwrap();
    };
    let shown = |id: VmId| {
        move |report: &wire::ReportRequest| {
            let is_it = |domain: &v1::UnmanagedDomain| {
                domain.uuid == id.to_string() && domain.marked && domain.running && domain.memory_mib == 64
            };
            report.inventory_complete && report.unmanaged_domains.iter().any(is_it)
        }
    };

    let mut theirs = definition.clone();
    theirs.id = VmId::from_uuid(Uuid::from_u128(99));
    theirs.name = "theirs".parse().unwrap();
    by_hand(&theirs).await;
    site.until("one that nobody told it of", shown(theirs.id)).await;
    let sized =
        |report: &wire::ReportRequest| report.vms.iter().any(|vm| vm.memory_mib == 64 && vm.vcpus == 1);
    site.until("the size of its own", sized).await;

    let mistaken = || lock(&site.registrar.reports).iter().any(shown(own));
    assert!(!mistaken(), "its own was taken for one that it was not told of");
    lock(&site.registrar.reports).clear();
    let delete = wire::DeleteVmRequest {
        context: host.context(),
        uid: VM.to_owned(),
        generation: 2,
        epoch: 1,
    };
    host.client.clone().delete_vm(delete).await.unwrap();
    site.until("its own is gone", |report| {
        report.inventory_complete && report.vms.is_empty()
    })
    .await;
    assert!(
        !mistaken(),
        "while it was deleted it was taken for one that it was not told of"
    );
    by_hand(&definition).await;
    site.until("the deleted one that is back", shown(own)).await;

    sleep(Duration::from_mins(5)).await;
    let domains = host.sim.list().await.unwrap();
    assert_eq!(domains.len(), 2);
    assert!(
        domains.iter().all(|domain| domain.state == DomainState::Running),
        "{domains:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn incident_50_a_copied_ledger_is_not_acted_upon_on_another_machine() {
    let site = Site::new();
    let mut first = site.start("h1", site.sim("h1"), Folder::default()).await;
    site.until("a host", |report| report.host == "h1").await;
    first.ensure().await.unwrap();
    site.until("running", settled("h1")).await;
    let state = lock(&first.files).clone();
    assert!(state.len() > 1, "host and VM: {state:?}");

    // The second machine has booted since, so that its agent would start what ran before.
    let sim = site.sim("elsewhere");
    let mut second = site
        .start_on(2, "h1", sim.clone(), Arc::new(Mutex::new(state.clone())))
        .await;
    let refused = second.ensure().await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let ended = second.ended.await.unwrap();
    assert!(matches!(ended, Err(reporter::Error::Copied { .. })), "{ended:?}");
    assert!(sim.domains().is_empty() && sim.local_volumes() == 0);
    assert_eq!(*lock(&second.files), state, "nor is it changed");
    let told = lock(&site.registrar.registered).last().cloned().unwrap();
    assert_ne!(told.machine_id, told.state_machine_id);
    assert!(told.vms.is_empty() && !told.inventory_complete);
    // On its own machine it goes on.
    first.stop.cancel();
    first.ended.await.unwrap().unwrap();
    lock(&site.registrar.reports).clear();
    let _again = site.start("h1", first.sim.clone(), first.files.clone()).await;
    site.until("running again", settled("h1")).await;
}
