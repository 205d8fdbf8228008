//! A whole site in one process: the real controller and real agents over real TLS, on simulated hypervisors and a store
//! in memory, each of which can be killed and started again at will.
//!
//! Used by `tests/cluster.rs`. Hypervisors and the store's disk outlive what runs on them, as QEMU and a disk outlive
//! an agent and a controller.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use dalgu_agent::hypervisor::{
    Attached, DomainState, Hypervisor,
    sim::{SharedStorage, Sim, SimConfig},
};
use dalgu_controller::{
    Controller, Parts,
    config::Config,
    incarnation, pki,
    store::{
        Batch, Image, Store as _, Write,
        memory::{Crash, Disk},
    },
};
use dalgu_proto::{
    ids::ClusterId,
    tls::{self, Identity},
    v1::{
        self, backup_service_client::BackupServiceClient, host_service_client::HostServiceClient,
        network_service_client::NetworkServiceClient, operation_service_client::OperationServiceClient,
        placement_service_client::PlacementServiceClient, site_service_client::SiteServiceClient,
        snapshot_service_client::SnapshotServiceClient, vm_service_client::VmServiceClient,
        volume_service_client::VolumeServiceClient,
    },
    vm::Spec,
};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// The first site's port; each further one has the next.
const FIRST_PORT: u16 = 10_000;
/// Sites made in this process.
static SITES: AtomicU16 = AtomicU16::new(0);
/// Everything must have come to rest after this time.
const LIMIT: Duration = Duration::from_secs(60);

/// A host: its hypervisor outlives its agent.
pub struct Host {
    /// The simulated hypervisor.
    pub sim: Sim,
    config: dalgu_agent::config::Config,
    agent: Option<Program>,
}

/// What would be a process of its own: killed as by SIGKILL when it is dropped.
struct Program(Option<Runtime>);

impl Program {
    fn new() -> Result<Self> {
        Ok(Self(Some(
            Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()?,
        )))
    }

    fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        let runtime = self.0.as_ref().expect("it is taken only when it is dropped");
        runtime.spawn(work)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A site. Dropping it ends all of it.
pub struct Cluster {
    dir: tempfile::TempDir,
    /// The store's disk.
    pub disk: Disk,
    /// The hosts by name.
    pub hosts: BTreeMap<String, Host>,
    address: SocketAddr,
    controller: Option<(Program, CancellationToken)>,
    admin: Identity,
}

/// The address of one program of one site: loopback has 16 million, so nobody else has it, and its port is not one that
/// the kernel gives to connections.
fn address_of(site: u16, program: u8) -> SocketAddr {
    let [_, _, a, b] = std::process::id().to_be_bytes();
    SocketAddr::from((
        [127, a, b, program.saturating_add(2)],
        FIRST_PORT.saturating_add(site),
    ))
}

impl Cluster {
    /// A site with `hosts` hosts; everything runs, and every host is ready.
    pub async fn start(hosts: usize) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let data = dir.path().join("c");
        let cluster = pki::init(&data, "test", &["127.0.0.1".to_owned()])?;
        let admin = Identity::load_dir(&data, "admin")?;
        let site = SITES.fetch_add(1, Ordering::Relaxed);
        let address = address_of(site, 0);
        let shared = SharedStorage::default();
        let mut cluster = Self {
            hosts: (1..=u8::try_from(hosts)?)
                .map(|number| Host::new(&dir, &data, cluster, (site, number), address, shared.clone()))
                .collect::<Result<_>>()?,
            dir,
            disk: Disk::default(),
            address,
            controller: None,
            admin,
        };
        cluster.start_controller().await?;
        for name in cluster.hosts.keys().cloned().collect::<Vec<_>>() {
            cluster.start_agent(&name).await?;
        }
        cluster.until_ready().await?;
        Ok(cluster)
    }

    /// Where everything on disk is.
    pub fn path(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// Starts the controller; it dies by itself where its store was told to crash.
    pub async fn start_controller(&mut self) -> Result<()> {
        self.disk.crash_at(None);
        let config = Config {
            data_dir: self.dir.path().join("c"),
            listen: self.address,
            report_interval_ms: 500,
            volume_grace_minutes: Some(0),
            ..Config::default()
        };
        let crashed = CancellationToken::new();
        let died = crashed.clone();
        let parts = Parts::new(self.disk.open(), move |_| died.cancel());
        let program = Program::new()?;
        let started = program.spawn(async move {
            let controller = Controller::start(config, parts, CancellationToken::new()).await?;
            tokio::spawn(controller.finished());
            anyhow::Ok(())
        });
        started.await?.context("the controller")?;
        self.controller = Some((program, crashed));
        Ok(())
    }

    /// Kills the controller.
    pub async fn kill_controller(&mut self) {
        self.controller = None;
        until_free(self.address).await;
    }

    /// Returns when the controller has died of its store.
    pub async fn crashed(&self) {
        if let Some((_, crashed)) = &self.controller {
            crashed.cancelled().await;
        }
    }

    /// Whether the controller has died of its store.
    pub fn is_crashed(&self) -> bool {
        self.controller
            .as_ref()
            .is_none_or(|(_, crashed)| crashed.is_cancelled())
    }

    /// Plans the death of the controller.
    pub fn crash_at(&self, crash: Crash) {
        self.disk.crash_at(Some(crash));
    }

    /// Starts a host's agent.
    pub async fn start_agent(&mut self, host: &str) -> Result<()> {
        let host = self.hosts.get_mut(host).context("no such host")?;
        let sim: Arc<dyn Hypervisor> = Arc::new(host.sim.clone());
        let program = Program::new()?;
        program.spawn(dalgu_agent::run(
            host.config.clone(),
            sim,
            CancellationToken::new(),
            || (),
        ));
        host.agent = Some(program);
        Ok(())
    }

    /// Kills a host's agent; its guests run on.
    pub async fn kill_agent(&mut self, host: &str) {
        if let Some(host) = self.hosts.get_mut(host) {
            host.agent = None;
            until_free(host.config.listen).await;
        }
    }

    async fn channel(&self) -> Result<Channel> {
        let endpoint = format!("https://{}", self.address);
        Ok(tls::client::connect(&endpoint, tls::CONTROLLER_NAME, &self.admin).await?)
    }

    /// A client for VMs.
    pub async fn vms(&self) -> Result<VmServiceClient<Channel>> {
        Ok(VmServiceClient::new(self.channel().await?))
    }

    /// A client for snapshots.
    pub async fn snapshots(&self) -> Result<SnapshotServiceClient<Channel>> {
        Ok(SnapshotServiceClient::new(self.channel().await?))
    }

    /// A client for backups.
    pub async fn backups(&self) -> Result<BackupServiceClient<Channel>> {
        Ok(BackupServiceClient::new(self.channel().await?))
    }

    /// A client for networks and security groups.
    pub async fn networks(&self) -> Result<NetworkServiceClient<Channel>> {
        Ok(NetworkServiceClient::new(self.channel().await?))
    }

    /// A client for placement groups.
    pub async fn placement(&self) -> Result<PlacementServiceClient<Channel>> {
        Ok(PlacementServiceClient::new(self.channel().await?))
    }

    /// A client for the site.
    pub async fn site(&self) -> Result<SiteServiceClient<Channel>> {
        Ok(SiteServiceClient::new(self.channel().await?))
    }

    /// A client for volumes.
    pub async fn volumes(&self) -> Result<VolumeServiceClient<Channel>> {
        Ok(VolumeServiceClient::new(self.channel().await?))
    }

    /// Every volume.
    pub async fn list_volumes(&self) -> Result<Vec<v1::Volume>> {
        let request = v1::ListVolumesRequest {
            page_size: 1000,
            ..Default::default()
        };
        Ok(self
            .volumes()
            .await?
            .list_volumes(request)
            .await?
            .into_inner()
            .volumes)
    }

    /// A client for operations.
    pub async fn operations(&self) -> Result<OperationServiceClient<Channel>> {
        Ok(OperationServiceClient::new(self.channel().await?))
    }

    /// All hosts as the controller sees them.
    pub async fn list_hosts(&self) -> Result<Vec<v1::Host>> {
        let request = v1::ListHostsRequest::default();
        Ok(HostServiceClient::new(self.channel().await?)
            .list_hosts(request)
            .await?
            .into_inner()
            .hosts)
    }

    /// All VMs as the controller sees them.
    pub async fn list_vms(&self) -> Result<Vec<v1::Vm>> {
        let request = v1::ListVmsRequest {
            page_size: 1000,
            ..Default::default()
        };
        Ok(self.vms().await?.list_vms(request).await?.into_inner().vms)
    }

    /// All operations.
    pub async fn list_operations(&self) -> Result<Vec<v1::Operation>> {
        let request = v1::ListOperationsRequest {
            page_size: 1000,
            ..Default::default()
        };
        Ok(self
            .operations()
            .await?
            .list_operations(request)
            .await?
            .into_inner()
            .operations)
    }

    /// Waits until every host reports.
    pub async fn until_ready(&self) -> Result<()> {
        let ready = async || {
            let hosts = self.list_hosts().await?;
            ensure!(hosts.len() == self.hosts.len(), "{} hosts", hosts.len());
            ensure!(
                hosts.iter().all(|host| host.state() == v1::HostState::Ready),
                "not all ready"
            );
            Ok(())
        };
        until("every host ready", ready).await
    }

    /// Waits until every operation has ended; returns them.
    pub async fn until_at_rest(&self) -> Result<Vec<v1::Operation>> {
        let ended = async || {
            for operation in self.list_operations().await? {
                let open = matches!(
                    operation.state(),
                    v1::OperationState::Pending | v1::OperationState::Running
                );
                ensure!(!open, "{operation:?}");
            }
            Ok(())
        };
        until("every operation ended", ended).await?;
        self.list_operations().await
    }

    /// Checks, once everything is at rest, that what the controller says is what the hypervisors have: each VM on its
    /// owner and nowhere else, in the power state that was asked for; no other domain, disk or reservation.
    pub async fn check(&self) -> Result<()> {
        until("controller and hypervisors agree", async || self.compare().await).await
    }

    async fn compare(&self) -> Result<()> {
        let vms = self.list_vms().await?;
        let volumes = self.list_volumes().await?;
        let states: Vec<_> = volumes
            .iter()
            .filter_map(|volume| volume.status.clone())
            .collect();
        for (name, host) in &self.hosts {
            let domains = host.sim.list().await?;
            let (mut expected, mut disks) = (0, 0);
            for vm in vms
                .iter()
                .filter(|vm| vm.status.as_ref().is_some_and(|status| status.host == *name))
            {
                expected += 1;
                let domain = domains.iter().find(|domain| domain.id.to_string() == vm.uid);
                let domain = domain.with_context(|| format!("{} is not on its owner {name}", vm.name))?;
                let wanted = match vm.desired_power_state() {
                    v1::PowerState::Stopped => DomainState::Stopped,
                    v1::PowerState::Paused => DomainState::Paused,
                    _ => DomainState::Running,
                };
                ensure!(
                    domain.state == wanted,
                    "{} on {name} is {:?}, not {wanted:?}",
                    vm.name,
                    domain.state
                );
                let seen = vm.status.as_ref().map(v1::VmStatus::power_state);
                ensure!(
                    seen == Some(vm.desired_power_state()),
                    "{} is shown as {seen:?}",
                    vm.name
                );
                let carried_out = vm.status.as_ref().map(|status| status.observed_generation);
                ensure!(carried_out == Some(vm.generation), "{} is being changed", vm.name);
                let spec: Spec = vm.spec.clone().unwrap_or_default().try_into()?;
                disks += spec.disks.len();
                let has = host.sim.hardware(domain.id).await?.unwrap_or_default();
                let sizes = spec
                    .disks
                    .iter()
                    .all(|disk| has.disks.get(&disk.name) == Some(&Attached::of(disk)));
                let size = (has.vcpus, has.memory_mib) == (spec.vcpus, spec.memory_mib);
                ensure!(
                    size && sizes && has.disks.len() == spec.disks.len(),
                    "{} has {has:?}, not {spec:?}",
                    vm.name
                );
            }
            ensure!(
                domains.len() == expected,
                "{name} has {} domains, owns {expected}: {domains:?}",
                domains.len()
            );
            // Files of volumes that no VM has.
            let free = states
                .iter()
                .filter(|volume| volume.host == *name && volume.vm.is_empty());
            disks += free.count();
            let volumes = host.sim.local_volumes();
            ensure!(
                volumes == disks,
                "{name} has {volumes} local disks, its VMs have {disks}"
            );
        }
        for host in self.list_hosts().await? {
            let owned = vms
                .iter()
                .filter(|vm| vm.status.as_ref().is_some_and(|status| status.host == host.name));
            let promised: u32 = owned.filter_map(|vm| Some(vm.spec.as_ref()?.vcpus)).sum();
            let allocation = host.allocation.unwrap_or_default();
            ensure!(
                allocation.vcpus_reserved == promised,
                "{}: {allocation:?}, VMs have {promised}",
                host.name
            );
        }
        Ok(())
    }

    /// At every moment: no VM runs on two hosts.
    pub async fn ensure_nothing_runs_twice(&self) -> Result<()> {
        let mut running = BTreeMap::new();
        for (name, host) in &self.hosts {
            for domain in host.sim.list().await.unwrap_or_default() {
                if domain.state == DomainState::Running
                    && let Some(other) = running.insert(domain.id, name)
                {
                    bail!("{} runs on {other} and on {name}", domain.id);
                }
            }
        }
        Ok(())
    }
}

impl Host {
    fn new(
        dir: &tempfile::TempDir,
        data: &std::path::Path,
        cluster: ClusterId,
        (site, number): (u16, u8),
        controller: SocketAddr,
        shared: SharedStorage,
    ) -> Result<(String, Self)> {
        let name = format!("h{number}");
        let home: PathBuf = dir.path().join(&name);
        pki::issue_agent(data, &name.parse()?, &["127.0.0.1".to_owned()], &home)?;
        let mut sim = SimConfig::new(cluster);
        sim.control_socket = Some(home.join("sim.sock"));
        sim.shared_storage = shared;
        // A guest's 64 MiB take a quarter of a second: long enough to be killed in.
        sim.rate_bytes_per_second = 256 << 20;
        let config = toml::from_str(&format!(
            "host = {name:?}\nlisten = \"{}\"\ncontroller = \"https://{controller}\"\ndata_dir = {home:?}\nrun_dir = {home:?}\nimage_store_dir = {home:?}\n\
             tls_dir = {home:?}\nhypervisor = \"sim\"\nusage_interval_ms = 500\n[[pools]]\nname = \"local\"\npath = {home:?}\n\
             [[pci]]\nclass = \"gpu\"\nmatch = \"3b:00.0\"\n[[pci]]\nclass = \"gpu\"\nmatch = \"5e:00.0\"\n",
            address_of(site, number)
        ))?;
        Ok((
            name,
            Self {
                sim: Sim::new(sim)?,
                config,
                agent: None,
            },
        ))
    }
}

/// A killed program's tasks end a moment later; its address is free when the last one has.
async fn until_free(address: SocketAddr) {
    while TcpListener::bind(address).is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A disk on which this backup of a store was restored.
///
/// # Errors
/// If the backup is of no store that can be renewed.
pub fn restored(image: Image) -> Result<Disk> {
    let (image, _) = incarnation::renew(image, incarnation::Past::default(), jiff::Timestamp::now())?;
    let put = |(table, key, value)| Write {
        table,
        key,
        value: Some(value),
    };
    let disk = Disk::default();
    disk.open().commit(&[Batch {
        writes: image.records.into_iter().map(put).collect(),
        events: image.events,
        forget_events_to: 0,
        erases: false,
    }])?;
    Ok(disk)
}

/// Waits until `check` succeeds; its last complaint is the error.
pub async fn until(what: &str, check: impl AsyncFn() -> Result<()>) -> Result<()> {
    let begun = tokio::time::Instant::now();
    loop {
        match check().await {
            Ok(()) => return Ok(()),
            Err(error) if begun.elapsed() > LIMIT => {
                return Err(error.context(format!("{what}: not after {LIMIT:?}")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A small VM with one local disk.
pub fn vm(name: &str) -> v1::Vm {
    let disk = v1::Disk {
        name: "root".into(),
        size_mib: 8,
        ..Default::default()
    };
    let spec = v1::VmSpec {
        vcpus: 1,
        memory_mib: 64,
        disks: vec![disk],
        ..Default::default()
    };
    v1::Vm {
        name: name.into(),
        spec: Some(spec),
        ..Default::default()
    }
}
