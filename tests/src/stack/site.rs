//! The site of one run: what its programs are made of, what outlives them, and who looks at them.
//!
//! Each `async fn` here is the whole of one program, run by turmoil as a host of its own and dropped with everything in
//! it where it dies. Directories and hypervisors stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use dalgu_agent::hypervisor::{
    self, DomainState,
    sim::{self, Call, Sim, SimConfig},
};
use dalgu_controller::{
    Controller, Parts, backup,
    config::Config,
    doctor::View,
    pki,
    server::Writer,
    state::{BeforeCommit, Db},
    store::{Batch, Error, Image, Store, sqlite::Sqlite},
};
use dalgu_proto::{
    ids::{ClusterId, HostName, NewIds, OperationId, VmId},
    time::Clock,
    tls::Identity,
};
use tokio_util::sync::CancellationToken;

use super::{
    network::{Port, Wires},
    plan::CallFault,
};
use crate::fleet::{
    checker::{Checker, Domains, Violation},
    counting, lock,
    plan::Node,
};

/// Name of the turmoil host on which the hypervisors run.
pub const MACHINES: &str = "machines";
/// Where the controller is reached.
pub const CONTROLLER: &str = "https://controller:7443";
const AGENT_PORT: u16 = 7444;
/// A commit waits so long for its disk. The disk's real time counts nothing here: the writer is a task, and blocks all.
const COMMIT: Duration = Duration::from_millis(5);
/// How often hypervisors look at what befalls them.
const MOMENT: Duration = Duration::from_millis(10);

/// What happens at the controller's next commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// It dies before it.
    Before,
    /// It dies when it is on disk, and before anybody is told.
    After,
}

/// What befalls a hypervisor; where it runs, at its own next moment.
#[derive(Debug, Clone, Copy)]
pub enum Blow {
    /// A guest ends.
    Guest(usize, VmId, bool),
    /// The daemon of this host is gone.
    Away(usize),
    /// It is back.
    Back(usize),
    /// The next call of this kind does something else than it should.
    Call(usize, Call, CallFault),
}

/// See the module.
pub struct Site {
    /// What it keeps on disk; goes with the site.
    dir: tempfile::TempDir,
    cluster: ClusterId,
    names: Vec<HostName>,
    /// Connections.
    pub wires: Arc<Wires>,
    sims: OnceLock<Vec<Sim>>,
    blows: Mutex<Vec<Blow>>,
    /// VMs whose guests have powered themselves off and have not been started since.
    off: Mutex<BTreeSet<VmId>>,
    db: Mutex<Option<Db>>,
    seen_revision: AtomicU64,
    checker: Mutex<Checker>,
    death: Mutex<Option<Death>>,
    dying: Mutex<Vec<(Node, Death)>>,
    operations: Mutex<BTreeMap<usize, OperationId>>,
    /// Ids of requests.
    pub ids: NewIds,
    new_ids: NewIds,
    /// Watches that were taken up again.
    pub resumed: AtomicU64,
    /// Requests that were sent, retries too.
    pub sent: AtomicU64,
    now_ms: AtomicU64,
    lines: Mutex<Vec<String>>,
}

impl Site {
    /// A site whose authority, identities and directories are made, and of which nothing runs yet.
    pub fn new(hosts: usize) -> Result<Arc<Self>> {
        let dir = tempfile::tempdir()?;
        let data = dir.path().join("controller");
        let cluster = pki::init(&data, "stack", &["controller".to_owned()])?;
        let names = (1..=hosts).map(|number| format!("h{number}").parse());
        let names: Vec<HostName> = names.collect::<Result<_, _>>()?;
        for name in &names {
            let home = dir.path().join(name.as_str());
            pki::issue_agent(&data, name, &[name.to_string()], &home)?;
        }
        Ok(Arc::new(Self {
            dir,
            cluster,
            names,
            wires: Arc::default(),
            sims: OnceLock::new(),
            blows: Mutex::default(),
            off: Mutex::default(),
            db: Mutex::default(),
            seen_revision: AtomicU64::new(0),
            checker: Mutex::default(),
            death: Mutex::default(),
            dying: Mutex::default(),
            operations: Mutex::default(),
            ids: counting(2),
            new_ids: counting(1),
            resumed: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            now_ms: AtomicU64::new(0),
            lines: Mutex::default(),
        }))
    }

    fn home(&self, node: Node) -> PathBuf {
        self.dir.path().join(node.to_string())
    }

    /// The network as a program sees it.
    pub fn port(&self, node: Node) -> Arc<Port> {
        Arc::new(Port {
            wires: self.wires.clone(),
            node,
        })
    }

    /// What must hold.
    pub fn checker(&self) -> MutexGuard<'_, Checker> {
        lock(&self.checker)
    }

    /// Sets the time that lines of the history bear.
    pub fn set_time(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.now_ms.store(ms, Ordering::Relaxed);
    }

    /// A line of the history.
    pub fn say(&self, line: std::fmt::Arguments<'_>) {
        let ms = self.now_ms.load(Ordering::Relaxed);
        lock(&self.lines).push(format!("{:>4}.{:03} {line}", ms / 1000, ms % 1000));
    }

    /// The history.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.lines).clone()
    }

    /// An operation that a later request may cancel.
    pub fn note_operation(&self, vm: usize, operation: OperationId) {
        lock(&self.operations).insert(vm, operation);
    }

    /// See [`Site::note_operation`].
    pub fn operation_of(&self, vm: usize) -> Option<OperationId> {
        lock(&self.operations).get(&vm).copied()
    }

    /// The operator's identity, on its network.
    pub fn operator(&self) -> Result<Identity> {
        let identity = Identity::load_dir(&self.home(Node::Controller(0)), "admin")?;
        Ok(identity.on(self.port(Node::Client)))
    }

    /// The controller is to die at its next commit.
    pub fn die_at_commit(&self, death: Death) {
        *lock(&self.death) = Some(death);
    }

    /// Whether the controller meets this death now; it has died then.
    fn dies(&self, death: Death) -> bool {
        let dies = lock(&self.death).take_if(|planned| *planned == death).is_some();
        if dies {
            lock(&self.dying).push((Node::Controller(0), death));
        }
        dies
    }

    /// The controller is not to die at its next commit after all.
    pub fn spare(&self) {
        *lock(&self.death) = None;
    }

    /// Programs that have met their death since this was last asked.
    pub fn dying(&self) -> Vec<(Node, Death)> {
        std::mem::take(&mut lock(&self.dying))
    }

    fn is_dying(&self, node: Node) -> bool {
        lock(&self.dying).iter().any(|(dying, _)| *dying == node)
    }

    /// A program has been killed: what it held in memory is gone.
    pub fn killed(&self, node: Node) {
        if matches!(node, Node::Controller(_)) {
            *lock(&self.db) = None;
        }
    }

    /// The state of the controller that runs.
    pub fn db(&self) -> Option<Db> {
        lock(&self.db).clone()
    }

    /// Something befalls a hypervisor.
    pub fn strike(&self, blow: Blow) {
        lock(&self.blows).push(blow);
    }

    /// The guest of the VM of this number ends by itself; returns whether it runs.
    pub fn end_guest(&self, vm: usize, crash: bool) -> bool {
        let name = format!("vm-{vm}").parse().expect("a name");
        let found = self.db().and_then(|db| Some(db.snapshot().vm_by_name(&name)?.id));
        let sims = self.sims.get().map(Vec::as_slice).unwrap_or_default();
        let runs = |sim: &Sim, id| {
            let mut domains = sim.domains().into_iter();
            domains.any(|(known, state, _)| known == id && state == DomainState::Running)
        };
        let place = found.and_then(|id| Some((sims.iter().position(|sim| runs(sim, id))?, id)));
        let Some((host, id)) = place else { return false };
        self.checker().guest_ended(id, crash, None);
        self.strike(Blow::Guest(host, id, crash));
        true
    }

    /// No fault is to come any more; answers what was ordered of calls and has not come.
    pub fn call_off(&self) -> Vec<CallFault> {
        let blows = std::mem::take(&mut *lock(&self.blows));
        let (calls, others): (Vec<_>, Vec<_>) =
            blows.into_iter().partition(|blow| matches!(blow, Blow::Call(..)));
        *lock(&self.blows) = others;
        let sims = self.sims.get().into_iter().flatten();
        let ordered = sims.flat_map(Sim::forget_faults).map(|(_, fault)| fault);
        let ordered = ordered.map(|fault| match fault {
            sim::Fault::Error(_) => CallFault::Fails,
            sim::Fault::TakesEffect(_) => CallFault::Lies,
            sim::Fault::Hang => CallFault::Hangs,
            sim::Fault::Late(time) => CallFault::Late(time),
        });
        let waiting = calls.into_iter().filter_map(|blow| match blow {
            Blow::Call(_, _, fault) => Some(fault),
            _ => None,
        });
        ordered.chain(waiting).collect()
    }

    fn befall(&self, sims: &[Sim], blow: Blow) {
        match blow {
            Blow::Guest(host, id, true) => sims[host].crash_guest(id),
            Blow::Guest(host, id, false) => {
                lock(&self.off).insert(id);
                sims[host].power_off_guest(id);
            }
            Blow::Away(host) => sims[host].disconnect("the simulated hypervisor restarts"),
            Blow::Back(host) => sims[host].reconnect(),
            Blow::Call(host, call, fault) => {
                let failed = || hypervisor::Error::Unavailable {
                    detail: "a fault of the simulation".to_owned(),
                };
                let fault = match fault {
                    CallFault::Fails => sim::Fault::Error(failed()),
                    CallFault::Lies => sim::Fault::TakesEffect(failed()),
                    CallFault::Hangs => sim::Fault::Hang,
                    CallFault::Late(time) => sim::Fault::Late(time),
                };
                sims[host].fail_next(call, fault);
            }
        }
    }

    /// Looks at what runs and at what is stored.
    pub fn look(&self) {
        let sims = self.sims.get().map(Vec::as_slice).unwrap_or_default();
        let domains: Vec<Domains> = sims.iter().map(Sim::domains).collect();
        let running = domains.iter().flatten();
        let running = running.filter(|(_, state, _)| *state == DomainState::Running);
        running.for_each(|(id, ..)| {
            lock(&self.off).remove(id);
        });
        let mut checker = self.checker();
        checker.census(domains);
        let Some(db) = self.db() else { return };
        let state = db.snapshot();
        let revision = state.meta.revision;
        if self.seen_revision.swap(revision, Ordering::Relaxed) != revision {
            checker.stored(&state);
            checker.endings(&state);
        }
    }

    /// Whether what is stored is what is, and nothing else.
    pub fn is_at_rest(&self) -> Result<(), Violation> {
        let not = |what: &str| Violation {
            invariant: "I14 it comes to rest",
            what: what.to_owned(),
        };
        let db = self.db().ok_or_else(|| not("no controller runs"))?;
        let sims = self.sims.get().ok_or_else(|| not("the hypervisors do not run"))?;
        let hosts = self.names.iter().zip(sims);
        let hosts: Vec<_> = hosts
            .map(|(name, sim)| (name.clone(), sim.domains(), sim.local_volumes()))
            .collect();
        let state = db.snapshot();
        let mut checker = self.checker();
        // Nobody is silent: time is looked at from outside the programs here.
        let view = View {
            state: &state,
            now: db.now(),
            silence: BTreeMap::new(),
            damage: None,
            files: Default::default(),
        };
        // No VM is unknown here, as nothing is restored: there are no entries to compare.
        let unjudged: Vec<_> = hosts.iter().map(|_| Vec::new()).collect();
        checker.at_rest(&view, &hosts, &unjudged, &lock(&self.off))?;
        checker.watched_all(&state)?;
        for name in &self.names {
            let left = entries(&self.dir.path().join(name.as_str()).join("migration"));
            if left > 0 {
                return Err(Violation {
                    invariant: "I4 nothing without an owner",
                    what: format!("{name} has the sockets of {left} migrations"),
                });
            }
        }
        Ok(())
    }
}

/// How much is in a directory; one that is not there is empty.
fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

/// All interfaces of a host of the simulation.
fn any(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
}

/// The hypervisors: they and what they send to each other outlive every agent.
pub async fn machines(site: Arc<Site>) -> Result<()> {
    let sim = |name: &HostName| -> io::Result<Sim> {
        let mut config = SimConfig::new(site.cluster);
        config.control_socket = Some(site.dir.path().join(name.as_str()).join("sim.sock"));
        // A small guest takes about a second.
        config.rate_bytes_per_second = 64 << 20;
        Sim::new(config)
    };
    let sims: Vec<_> = site.names.iter().map(sim).collect::<Result<_, _>>()?;
    drop(site.sims.set(sims.clone()));
    loop {
        tokio::time::sleep(MOMENT).await;
        let blows = std::mem::take(&mut *lock(&site.blows));
        blows.into_iter().for_each(|blow| site.befall(&sims, blow));
    }
}

/// The controller, on its SQLite file.
pub async fn controller(site: Arc<Site>) -> Result<()> {
    let node = Node::Controller(0);
    let config = Config {
        data_dir: site.home(node),
        listen: any(7443),
        report_interval_ms: 1_000,
        // The files are real; how full the machine's disk is besides is nothing of the site's.
        pool_warn_percent: 100,
        pool_full_percent: 100,
        ..Config::default()
    };
    let records = Records {
        sqlite: Sqlite::open(&config.data_dir.join(backup::DATABASE))?,
        site: site.clone(),
    };
    let parts = Parts {
        store: Box::new(records),
        writer: Writer::Task(before_commit(site.clone())),
        failed: Box::new(|_| {}),
        clock: Clock::system(),
        new_ids: site.new_ids.clone(),
        power: None,
    };
    let started = Controller::start_on(site.port(node), config, parts, CancellationToken::new()).await;
    if site.is_dying(node) {
        return std::future::pending().await;
    }
    let controller = started?;
    *lock(&site.db) = Some(controller.db().clone());
    drop(site);
    controller.finished().await?;
    anyhow::bail!("the controller has ended by itself")
}

/// A host's agent, on its directory and its hypervisor.
pub async fn agent(site: Arc<Site>, host: usize) -> Result<()> {
    let node = Node::Host(host);
    let home = site.home(node);
    let config = toml::from_str(&format!(
        "host = \"{node}\"\nlisten = \"{}\"\nadvertise = \"{node}:{AGENT_PORT}\"\ncontroller = \"{CONTROLLER}\"\n\
         data_dir = {home:?}\nrun_dir = {home:?}\nimage_store_dir = {home:?}\ntls_dir = {home:?}\nhypervisor = \"sim\"\nusage_interval_ms = 5000\n\
         [[pools]]\nname = \"local\"\npath = {home:?}\n",
        any(AGENT_PORT)
    ))?;
    let sims = site.sims.get().context("the hypervisors start first")?;
    let (port, sim) = (site.port(node), Arc::new(sims[host].clone()));
    drop(site);
    dalgu_agent::run_on(port, config, sim, CancellationToken::new(), || ()).await?;
    anyhow::bail!("the agent has ended by itself")
}

fn before_commit(site: Arc<Site>) -> BeforeCommit {
    Box::new(move || {
        let site = site.clone();
        Box::pin(async move {
            tokio::time::sleep(COMMIT).await;
            if site.dies(Death::Before) {
                std::future::pending().await
            }
        })
    })
}

/// The SQLite store, and the controller's death between a commit and everybody who waits for it.
struct Records {
    sqlite: Sqlite,
    site: Arc<Site>,
}

impl Store for Records {
    fn load(&mut self) -> Result<Image, Error> {
        self.sqlite.load()
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        self.sqlite.commit(batches)?;
        if self.site.dies(Death::After) {
            return Err(Error::Injected("after the commit"));
        }
        Ok(())
    }
}
