//! A site in memory, on one thread and a clock that need not be waited for: the real controller's core, real agents on
//! simulated hypervisors, and a tap on each wire.
//!
//! Nothing goes wrong here by chance; the fleet is for that. Hypervisors, ledgers and the store's disk outlive the
//! programs, which can be started again by other rules: with another tap, or on another store.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use dalgu_agent::{
    Agent, AgentParts,
    hypervisor::sim::{MemoryLines, Sim, SimConfig},
    images::{self, Images},
    ledger::{Files, Ledger},
    metrics::Snapshot,
    migration::transport::{Peer as Host, Relay, Transport, Word},
};
use dalgu_controller::{
    agent_client::Dial,
    config::Config,
    server::{Core, Parts, Writer},
    store::{Store, memory::Disk},
};
use dalgu_proto::{
    host::{Inventory, Pool, Usage},
    ids::{ClusterId, HostName, MigrationId, NewIds},
    time::Clock,
    tls::{
        self, Peer, Role,
        client::{Caller, caller_in_process_as},
    },
    v1,
};
use jiff::Timestamp;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::ServiceExt;
use uuid::Uuid;

use super::{
    full,
    wire::{Tap, tapped},
};

/// The site of every sample.
pub const CLUSTER: ClusterId = ClusterId::from_uuid(Uuid::from_u128(0x7_0000_0000_4000_8000_0000_0000_0007));

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a program is reached; empty while it does not run.
type Slot = Arc<Mutex<Option<Caller>>>;

fn reach(slot: Slot) -> Caller {
    Caller::new(tower::service_fn(move |request| {
        let server = lock(&slot).clone();
        async move {
            match server {
                Some(server) => server.oneshot(request).await,
                None => Err(Status::unavailable("connection refused")),
            }
        }
    }))
}

/// A ledger's files.
#[derive(Debug, Clone, Default)]
pub struct Shelf(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Shelf {
    /// All files.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        lock(&self.0).clone()
    }

    /// Puts one there.
    pub fn put(&self, name: &str, content: Vec<u8>) {
        lock(&self.0).insert(name.to_owned(), content);
    }
}

#[async_trait]
impl Files for Shelf {
    async fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        Ok(self.files().into_iter().collect())
    }

    async fn replace(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        self.put(name, bytes);
        Ok(())
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        lock(&self.0).remove(name);
        Ok(())
    }
}

type Grants = Arc<Mutex<BTreeMap<(HostName, MigrationId), (HostName, Word)>>>;

/// The streams between hosts: whoever was let in reaches the other's hypervisor.
struct Roads {
    own: HostName,
    grants: Grants,
}

fn control(host: &str) -> PathBuf {
    PathBuf::from(format!("/{host}/hypervisor"))
}

#[async_trait]
impl Transport for Roads {
    async fn allow(&self, migration: MigrationId, source: HostName) -> io::Result<Word> {
        let grant = (source, Word::default());
        let mut grants = lock(&self.grants);
        Ok(grants
            .entry((self.own.clone(), migration))
            .or_insert(grant)
            .1
            .clone())
    }

    async fn revoke(&self, migration: MigrationId) {
        lock(&self.grants).remove(&(self.own.clone(), migration));
    }

    async fn open(&self, migration: MigrationId, peer: &Host) -> io::Result<Relay> {
        let grants = lock(&self.grants);
        let let_in = grants.get(&(peer.host.clone(), migration));
        let way = match let_in {
            Some((source, _)) if *source == self.own => control(peer.host.as_str()),
            _ => PathBuf::from("/nowhere"),
        };
        Ok(Relay::new(way, "unused".into(), "unused".into(), ()))
    }

    async fn tell_released(&self, migration: MigrationId, peer: &Host, _: Option<Instant>) -> io::Result<()> {
        match lock(&self.grants).get(&(peer.host.clone(), migration)) {
            Some((source, word)) if *source == self.own => word.say(),
            _ => return Err(io::ErrorKind::PermissionDenied.into()),
        }
        Ok(())
    }

    async fn remove(&self, _migration: MigrationId) -> io::Result<()> {
        Ok(())
    }
}

/// A server of the site.
pub struct Server {
    /// Its hypervisor.
    pub sim: Sim,
    /// Its agent's ledger.
    pub ledger: Shelf,
    /// Its store of images.
    pub images: images::Memory,
    /// Its samples.
    pub samples: watch::Sender<Arc<Snapshot>>,
    agent: Slot,
    controller: Slot,
    stop: CancellationToken,
}

/// See the module.
pub struct Site {
    /// The store's disk.
    pub disk: Disk,
    /// The servers by name.
    pub servers: BTreeMap<HostName, Server>,
    clock: Clock,
    ids: NewIds,
    grants: Grants,
    core: Option<(Core, CancellationToken)>,
}

/// Finds agents in the same process.
struct Directory(BTreeMap<HostName, Caller>);

impl Dial for Directory {
    fn dial(&self, host: &HostName, _address: &str) -> Result<Caller, tls::Error> {
        Ok(self
            .0
            .get(host)
            .cloned()
            .unwrap_or_else(|| reach(Slot::default())))
    }
}

fn inventory() -> Inventory {
    let every: v1::HostInventory = full::sample("dalgu.v1.HostInventory");
    Inventory {
        cpus: 8,
        memory_bytes: 16 << 30,
        pools: vec![Pool {
            name: "local".to_owned(),
            capacity_bytes: 1 << 40,
            available_bytes: 1 << 40,
            ..Pool::default()
        }],
        bridges: vec!["br0".to_owned()],
        ..Inventory::from(every)
    }
}

impl Site {
    /// A site with these hosts, of which nothing runs yet. Guests count into files below `consoles`.
    ///
    /// # Errors
    /// If a host's name is none.
    pub fn new(hosts: &[&str], consoles: Option<PathBuf>) -> Result<Self> {
        let (begun, lines) = (Instant::now(), MemoryLines::default());
        let start = Timestamp::from_second(1_767_225_600)?;
        let clock = Clock::from_fn(move || start + begun.elapsed());
        let next = std::sync::atomic::AtomicU64::new(1);
        let ids = NewIds::from_fn(move || {
            Uuid::from_u64_pair(0x4000, next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        });
        let server = |name: &&str| {
            let mut config = SimConfig::new(CLUSTER);
            config.control_socket = Some(control(name));
            config.lines = Arc::new(lines.clone());
            config.clock = clock.clone();
            config.console_dir = consoles.as_ref().map(|dir| dir.join(name));
            if let Some(dir) = &config.console_dir {
                std::fs::create_dir_all(dir)?;
            }
            // A small guest takes a few seconds.
            config.rate_bytes_per_second = 32 << 20;
            let usage: v1::HostUsage = full::sample("dalgu.v1.HostUsage");
            let snapshot = Snapshot {
                inventory: Arc::new(inventory()),
                usage: Some((Duration::from_secs(1), Arc::new(Usage::from(usage)))),
                ..Snapshot::default()
            };
            let server = Server {
                sim: Sim::new(config)?,
                ledger: Shelf::default(),
                images: images::Memory::new(1 << 40),
                samples: watch::Sender::new(Arc::new(snapshot)),
                agent: Slot::default(),
                controller: Slot::default(),
                stop: CancellationToken::new(),
            };
            Ok((name.parse()?, server))
        };
        Ok(Self {
            disk: Disk::default(),
            servers: hosts.iter().map(server).collect::<Result<_>>()?,
            clock,
            ids,
            grants: Grants::default(),
            core: None,
        })
    }

    /// Starts a controller on what the disk holds. `tap` sits between it and the agents it dials.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_controller(&mut self, tap: Arc<dyn Tap>) -> Result<()> {
        self.start_controller_on(self.disk.open(), |_| tap.clone()).await
    }

    /// Starts a controller on a store. `tap` says for each host who sits between the controller and its agent.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_controller_on(
        &mut self,
        store: impl Store,
        tap: impl Fn(&HostName) -> Arc<dyn Tap>,
    ) -> Result<()> {
        self.stop_controller();
        let parts = Parts {
            store: Box::new(store),
            writer: Writer::Task(Box::new(|| Box::pin(std::future::ready(())))),
            failed: Box::new(|error| panic!("a store in memory failed: {error}")),
            clock: self.clock.clone(),
            new_ids: self.ids.clone(),
            power: None,
        };
        let agents = self.servers.iter();
        let agents =
            agents.map(|(name, server)| (name.clone(), tapped(tap(name), reach(server.agent.clone()))));
        let dial = Arc::new(Directory(agents.collect()));
        let stop = CancellationToken::new();
        let core = Core::start(Arc::new(Config::default()), CLUSTER, dial, parts, stop.clone()).await?;
        for (name, server) in &self.servers {
            let peer = Peer {
                role: Role::Agent(name.clone()),
                name: name.to_string(),
            };
            *lock(&server.controller) = Some(core.caller(peer));
        }
        self.core = Some((core, stop));
        Ok(())
    }

    /// Ends the controller.
    pub fn stop_controller(&mut self) {
        if let Some((_, stop)) = self.core.take() {
            stop.cancel();
            for server in self.servers.values() {
                *lock(&server.controller) = None;
            }
        }
    }

    /// The controller.
    ///
    /// # Errors
    /// If none runs.
    pub fn core(&self) -> Result<&Core> {
        Ok(&self.core.as_ref().context("no controller runs")?.0)
    }

    /// Starts the agent of a host. `tap` sits between it and the controller.
    ///
    /// # Errors
    /// If its ledger cannot be read.
    pub async fn start_agent(&mut self, host: &HostName, tap: Arc<dyn Tap>) -> Result<()> {
        let server = self.servers.get_mut(host).context("no such host")?;
        server.stop.cancel();
        server.stop = CancellationToken::new();
        let parts = AgentParts {
            host: host.clone(),
            site: CLUSTER,
            address: format!("{host}:7444"),
            boot_id: format!("boot-of-{host}"),
            machine: None,
            hypervisor: Arc::new(server.sim.clone()),
            ledger: Ledger::on(Arc::new(server.ledger.clone())),
            images: Images::in_memory(
                host.clone(),
                server.images.clone(),
                |_: &images::Source| Err(tonic::Status::unavailable("no images are read here")),
                self.clock.clone(),
                server.stop.clone(),
            ),
            network: Arc::new(dalgu_agent::network::Simulated::default()),
            transport: Arc::new(Roads {
                own: host.clone(),
                grants: self.grants.clone(),
            }),
            controller: tapped(tap, reach(server.controller.clone())),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            samples: server.samples.subscribe(),
        };
        let agent = Agent::start(parts, server.stop.clone()).await?;
        let peer = Peer {
            role: Role::Controller,
            name: "controller".to_owned(),
        };
        *lock(&server.agent) = Some(caller_in_process_as(peer, agent.server()));
        tokio::spawn(agent.run(|| ()));
        Ok(())
    }

    /// Ends the agent of a host; its guests run on.
    pub fn stop_agent(&mut self, host: &HostName) {
        if let Some(server) = self.servers.get_mut(host) {
            server.stop.cancel();
            *lock(&server.agent) = None;
        }
    }

    /// The controller's API, as an operator calls it, past a tap.
    ///
    /// # Errors
    /// If no controller runs.
    pub fn operator(&self, tap: Arc<dyn Tap>) -> Result<Caller> {
        let peer = Peer {
            role: Role::Operator,
            name: "story".to_owned(),
        };
        Ok(tapped(tap, self.core()?.caller(peer)))
    }

    /// The controller's API, as the agent of a host calls it.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn registrar(&self, host: &HostName) -> Result<Caller> {
        let server = self.servers.get(host).context("no such host")?;
        Ok(reach(server.controller.clone()))
    }

    /// An agent's API, as the controller calls it, past a tap.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn agent(&self, host: &HostName, tap: Arc<dyn Tap>) -> Result<Caller> {
        let server = self.servers.get(host).context("no such host")?;
        Ok(tapped(tap, reach(server.agent.clone())))
    }
}
