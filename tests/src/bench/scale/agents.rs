//! Thousands of agents in this process: each the real one, with its own certificate, address, ledger, connection to the
//! controller and port for commands. What the controller cannot see is thinned out: hypervisors are simulated, the host's
//! samples are made up, and ledgers are on a file system in memory, as two thousand hosts have two thousand disks.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dalgu_agent::hypervisor::Hypervisor;
use dalgu_agent::hypervisor::sim::{Delays, Sim, SimConfig};
use dalgu_agent::images::{self, Images};
use dalgu_agent::ledger::Ledger;
use dalgu_agent::metrics::{self, Snapshot};
use dalgu_agent::migration::streams::Streams;
use dalgu_agent::{Agent, AgentParts};
use dalgu_controller::pki;
use dalgu_proto::host::VmUsage;
use dalgu_proto::ids::{HostName, NewIds, VmId};
use dalgu_proto::time::Clock;
use dalgu_proto::tls::{self, Identity, server::Acceptor};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use prometheus_client::metrics::gauge::Gauge;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::beats::{Beats, Host};
use super::sample;
use super::{Controller, Settings};

/// The first port; this process's own follows from its number.
const FIRST_PORT: u16 = 10_000;
/// Agents that are made at the same time.
const AT_ONCE: usize = 32;
/// Time in which the VMs of all hosts are sampled once.
const SAMPLING: Duration = Duration::from_secs(4);

/// The address of one program of this process: loopback has 16 million, so nobody else has it, and its port is not one
/// that the kernel gives to connections.
#[must_use]
pub fn address(program: u16) -> SocketAddr {
    let pid = std::process::id();
    let (site, port) = (pid % 250, pid / 250 % 20_000);
    let [a, b] = program.to_be_bytes();
    let ip = Ipv4Addr::new(127, u8::try_from(site + 2).unwrap_or(2), a, b);
    SocketAddr::from((ip, FIRST_PORT + u16::try_from(port).unwrap_or(0)))
}

struct Machine {
    sim: Sim,
    report_bytes: Gauge,
    samples: watch::Sender<Arc<Snapshot>>,
}

/// All agents. They end when this is dropped.
pub struct Agents {
    /// What they met when they called the controller.
    pub beats: Arc<Beats>,
    machines: Arc<Vec<Machine>>,
    tasks: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Agents {
    /// Starts all agents. They register by themselves.
    ///
    /// # Errors
    /// If one cannot be made.
    pub async fn start(settings: &Settings, controller: &Controller) -> anyhow::Result<Self> {
        let dir = scratch()?;
        let beats = Arc::new(Beats::new(settings.hosts, settings.report_interval));
        let hosts: Vec<_> = beats.hosts().cloned().enumerate().collect();
        let made = stream::iter(hosts).map(|(number, host)| {
            let (data, home) = (controller.data(), dir.path().to_owned());
            let (address, cluster) = (controller.address, controller.cluster);
            async move {
                let name = format!("h{:05}", number + 1);
                let home = home.join(&name);
                let to = (name, u16::try_from(number + 2)?);
                let identity = identity(&data, &to.0, &home).await?;
                one(to, &home, identity, (address, cluster), host).await
            }
        });
        let made: Vec<_> = made.buffer_unordered(AT_ONCE).try_collect().await?;
        let mut tasks = JoinSet::new();
        let mut machines = Vec::with_capacity(made.len());
        for (agent, listener, identity, machine) in made {
            tasks.spawn(serve(listener, identity, agent.server()));
            // It ends only when the controller is another site's, which the benchmark sees as a host that is not ready.
            tasks.spawn(async move { drop(agent.run(|| ()).await) });
            machines.push(machine);
        }
        let machines = Arc::new(machines);
        tasks.spawn(sample_all(machines.clone()));
        Ok(Self {
            beats,
            machines,
            tasks,
            _dir: dir,
        })
    }

    /// Domains of all hypervisors.
    #[must_use]
    pub fn domains(&self) -> usize {
        self.machines
            .iter()
            .map(|machine| machine.sim.domains().len())
            .sum()
    }

    /// Bytes of each host's last report.
    pub fn report_bytes(&self) -> impl Iterator<Item = f64> {
        let bytes = |machine: &Machine| u32::try_from(machine.report_bytes.get()).unwrap_or(u32::MAX);
        self.machines.iter().map(move |machine| bytes(machine).into())
    }

    /// Whether every agent's tasks go on.
    #[must_use]
    pub fn all_run(&self) -> bool {
        self.tasks.len() == self.machines.len() * 2 + 1
    }
}

/// A directory in memory, where there is one.
fn scratch() -> anyhow::Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(if memory.is_dir() {
        tempfile::tempdir_in(memory)?
    } else {
        tempfile::tempdir()?
    })
}

async fn identity(data: &Path, name: &str, home: &Path) -> anyhow::Result<Identity> {
    let (data, home) = (data.to_owned(), home.to_owned());
    let name: HostName = name.parse()?;
    let made = tokio::task::spawn_blocking(move || {
        pki::issue_agent(&data, &name, &[], &home)?;
        anyhow::Ok(Identity::load_dir(&home, "agent")?)
    });
    made.await?
}

async fn one(
    (name, program): (String, u16),
    home: &Path,
    identity: Identity,
    (controller, cluster): (SocketAddr, dalgu_proto::ids::ClusterId),
    host: Arc<Host>,
) -> anyhow::Result<(Agent, TcpListener, Identity, Machine)> {
    let listen = address(program);
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen at {listen}"))?;
    let sim = Sim::new(SimConfig {
        delays: Delays::LIFELIKE,
        // No console is read here, and nobody need count.
        console_interval: Duration::from_secs(86_400),
        ..SimConfig::new(cluster)
    })?;
    let endpoint = format!("https://{controller}");
    let channel = tls::client::connect_lazy(&endpoint, tls::CONTROLLER_NAME, &identity)?;
    let (samples, sampled) = watch::channel(Arc::new(sample::host(program)));
    let ledger = home.join("ledger");
    let parts = AgentParts {
        host: name.parse()?,
        site: cluster,
        address: listen.to_string(),
        boot_id: uuid::Uuid::new_v4().to_string(),
        machine: Some(uuid::Uuid::new_v4()),
        hypervisor: Arc::new(sim.clone()) as Arc<dyn Hypervisor>,
        ledger: tokio::task::spawn_blocking(move || Ledger::open(&ledger)).await??,
        images: Images::in_memory(
            name.parse()?,
            images::Memory::new(1 << 40),
            images::TlsPeers::new(identity.clone()),
            Clock::system(),
            CancellationToken::new(),
        ),
        network: Arc::new(dalgu_agent::network::Simulated::default()),
        transport: Arc::new(Streams::new(PathBuf::from(home), None, identity.clone())),
        controller: host.counted(tls::client::caller(channel)),
        clock: Clock::system(),
        ids: NewIds::random(),
        samples: sampled,
    };
    let agent = Agent::start(parts, CancellationToken::new()).await?;
    let machine = Machine {
        report_bytes: agent.report_bytes(),
        sim,
        samples,
    };
    Ok((agent, listener, identity, machine))
}

/// The agent's port for commands, as the program serves it.
async fn serve(listener: TcpListener, identity: Identity, commands: Routes) {
    let parts = (identity.server_config(&[tls::ALPN_H2]), identity.site());
    let (Ok(config), Ok(site)) = parts else { return };
    let (acceptor, connections) = Acceptor::new(site, None);
    let serving = tonic::transport::Server::builder()
        .add_routes(commands)
        .serve_with_incoming(ReceiverStream::new(connections));
    let accepting = acceptor.run(listener, config, |_| ());
    drop(futures::future::join(serving, accepting).await);
}

/// Samples one host after the other, so that reports bear the figures of their VMs.
async fn sample_all(machines: Arc<Vec<Machine>>) {
    let share = SAMPLING / u32::try_from(machines.len().max(1)).unwrap_or(u32::MAX);
    loop {
        for machine in machines.iter() {
            sleep(share).await;
            let Ok(usages) = machine.sim.usage().await else {
                continue;
            };
            let vms = usages.into_iter().map(|(id, usage)| on_page(id, usage)).collect();
            machine.samples.send_modify(|old| {
                let mut next = Snapshot::clone(old);
                next.vms = vms;
                *old = Arc::new(next);
            });
        }
    }
}

fn on_page(id: VmId, usage: VmUsage) -> metrics::Vm {
    metrics::Vm {
        id,
        // The reports do not use it.
        name: "vm".parse().expect("a name"),
        power: None,
        usage: Some(usage),
    }
}
