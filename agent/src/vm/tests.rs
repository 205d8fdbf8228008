//! VM tasks against the simulated hypervisor: whole lives, faults, restarts of the agent; and what the tests below share: one
//! host, and two with a VM that can move between them over real TLS.

use std::{net::SocketAddr, time::Duration};

use dalgu_proto::{
    host::{Inventory, PciDevice},
    tls::{self, Identity, server::Acceptor},
    vm::{PowerReason, PowerState, RestartMode, RestartPolicy, Spec},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};

use super::{
    status::{Phase, Presence, Status},
    *,
};
use crate::{
    hypervisor::{
        DomainState, Error as HypervisorError,
        sim::{Behaviour, Call, Fault, Phase as Break, Sim, SimConfig},
    },
    images,
    migration::streams::Streams,
    recovery,
};

mod asking;
mod changes;
mod defects;
mod devices;
mod documents;
mod late;
mod moving;
mod pins;
mod tombstones;
mod unreadable;
mod volumes;

const SITE: &str = "6f1c6c5e-5d8b-4c39-9f0e-0a4a7a6c1c55";

/// A site's authority, for identities.
pub(crate) struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    pub(crate) fn agent(&self, host: &str) -> Identity {
        let mut params = CertificateParams::new(vec![tls::agent_name(&host.parse().unwrap())]).unwrap();
        let uri = format!("spiffe://{SITE}/agent/{host}");
        params
            .subject_alt_names
            .push(SanType::URI(uri.try_into().unwrap()));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.dir.path().join("a.pem"), certificate.pem()).unwrap();
        std::fs::write(self.dir.path().join("a.key"), key.serialize_pem()).unwrap();
        Identity::load_dir(self.dir.path(), "a").unwrap()
    }
}

/// One host: a simulated hypervisor, and an agent's VM tasks that can be killed and started again.
struct Host {
    name: &'static str,
    sim: Sim,
    dir: tempfile::TempDir,
    boot_id: String,
    streams: Streams,
    vms: Vms,
    stop: CancellationToken,
    address: SocketAddr,
}

impl Host {
    async fn new(authority: &Authority, name: &'static str) -> Self {
        Self::with_looks(authority, name, Duration::ZERO).await
    }

    /// One whose hypervisor takes so long for each look.
    async fn with_looks(authority: &Authority, name: &'static str, look: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = SimConfig::new(SITE.parse().unwrap());
        config.control_socket = Some(dir.path().join("sim.sock"));
        config.rate_bytes_per_second = 256 << 20;
        config.delays.copy = Duration::from_secs(3);
        config.delays.look = look;
        let sim = Sim::new(config).unwrap();
        let identity = authority.agent(name);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (streams, incoming) = mpsc::channel(4);
        let (acceptor, connections) = Acceptor::new(identity.site().unwrap(), Some(streams));
        let server = identity.server_config(&[tls::ALPN_STREAM]).unwrap();
        tokio::spawn(async move { acceptor.run(listener, server, |_| ()).await });
        // The acceptor ends when nobody takes its connections.
        std::mem::forget(connections);
        let own = Streams::new(dir.path().to_owned(), None, identity);
        tokio::spawn(own.clone().serve(incoming, sim.control_socket().to_owned()));
        let stop = CancellationToken::new();
        let vms = Vms::new(shared(&dir, &sim, &own, "boot-1"), stop.clone());
        Self {
            name,
            sim,
            dir,
            boot_id: "boot-1".into(),
            streams: own,
            vms,
            stop,
            address,
        }
    }

    /// The agent is killed and started again; with another boot id, the whole host was.
    async fn restart_agent(&mut self, boot_id: &str) {
        self.stop.cancel();
        self.vms.stopped().await;
        self.stop = CancellationToken::new();
        self.boot_id = boot_id.to_owned();
        let shared = shared(&self.dir, &self.sim, &self.streams, boot_id);
        let contents = shared.ledger.load().await.unwrap();
        self.vms = Vms::new(shared, self.stop.clone());
        recovery::recover(&self.vms, contents).await;
    }

    async fn create(&self, id: VmId, intent: Intent) {
        self.vms.get_or_start(id).ensure(told(id, intent)).await.unwrap();
    }

    async fn until(&self, id: VmId, what: &str, is: impl Fn(&Status) -> bool) -> Status {
        let handle = self.vms.get(id).expect("the VM has a task");
        let mut status = handle.status.clone();
        let found =
            tokio::time::timeout(Duration::from_secs(200), status.wait_for(|status| is(status))).await;
        match found {
            Ok(Ok(status)) => status.clone(),
            _ => panic!("{}: never {what}: {:?}", self.name, handle.status()),
        }
    }

    async fn until_settled(&self, id: VmId, generation: u64) -> Status {
        let settled =
            |s: &Status| s.phase == Phase::Settled && s.observed_generation == Generation(generation);
        self.until(id, "settled", settled).await
    }
}

fn told(id: VmId, intent: Intent) -> Told {
    Told {
        name: name(id),
        intent,
        disks_made: false,
        new_disks: Default::default(),
        images: Vec::new(),
        documents: Default::default(),
    }
}

fn shared(dir: &tempfile::TempDir, sim: &Sim, streams: &Streams, boot_id: &str) -> Shared {
    Shared {
        hypervisor: Arc::new(sim.clone()),
        ledger: Ledger::open(&dir.path().join("ledger")).unwrap(),
        images: images::Images::in_memory(
            "h1".parse().unwrap(),
            images::Memory::new(1 << 40),
            |_: &images::Source| Err(tonic::Status::unavailable("nobody is there")),
            Clock::system(),
            CancellationToken::new(),
        ),
        networks: crate::network::Networks::new(
            Arc::new(crate::network::Simulated::default()),
            Ledger::open(&dir.path().join("ledger")).unwrap(),
            None,
        ),
        volumes: Default::default(),
        pins: Default::default(),
        devices: Default::default(),
        samples: samples(boot_id),
        transport: Arc::new(streams.clone()),
        clock: Clock::system(),
        boot_id: boot_id.to_owned(),
        cluster: SITE.parse().unwrap(),
        changes: watch::Sender::default(),
    }
}

/// A start of the host after which something else is at the address of its first device.
const MOVED: &str = "boot-with-another-card";

/// What the host is made of: two devices for VMs, and one that cannot be given.
fn samples(boot_id: &str) -> watch::Receiver<Arc<Snapshot>> {
    let device = |(address, problem): (&str, Option<&str>)| PciDevice {
        class: match (boot_id, address) {
            (MOVED, "3b:00.0") => "disk".into(),
            _ => "gpu".into(),
        },
        address: address.parse().unwrap(),
        model: "10de:20b0".into(),
        numa_node: None,
        iommu_group: Some(1),
        problem: problem.map(str::to_owned),
    };
    let named = [
        ("3b:00.0", None),
        ("5e:00.0", None),
        ("86:00.0", Some("is in no IOMMU group")),
    ];
    let inventory = Inventory {
        cpus: 1,
        pci_devices: named.into_iter().map(device).collect(),
        ..Inventory::default()
    };
    watch::channel(Arc::new(Snapshot {
        inventory: Arc::new(inventory),
        ..Snapshot::default()
    }))
    .1
}

fn vm(id: u128) -> VmId {
    VmId::from_uuid(uuid::Uuid::from_u128(id))
}

fn name(id: VmId) -> VmName {
    format!("vm{}", id.uuid().as_u128()).parse().unwrap()
}

fn intent(generation: u64, power: PowerState) -> Intent {
    let disk = dalgu_proto::vm::Disk {
        name: "root".into(),
        size_mib: 8,
        pool: "local".into(),
        image: None,
        format: Default::default(),
        digest: None,
        clone_mode: dalgu_proto::vm::CloneMode::Any,
        volume: None,
        limits: Default::default(),
        backup: None,
    };
    Intent {
        generation: Generation(generation),
        epoch: Epoch(1),
        spec: Spec {
            vcpus: 1,
            memory_mib: 64,
            disks: vec![disk],
            nics: vec![],
            kernel_boot: None,
            restart_policy: Default::default(),
            host_selector: Default::default(),
            first_boot: None,
            firmware: Default::default(),
            tpm: false,
            max_vcpus: None,
            max_memory_mib: None,
            fitting: Default::default(),
            devices: Default::default(),
        },
        power,
        power_sequence: generation,
        restart_sequence: 0,
        restart_mode: RestartMode::Reboot,
        grace_period_seconds: 5,
        snapshots: None,
        places: Vec::new(),
        devices: Vec::new(),
    }
}

async fn one_host() -> Host {
    Host::new(&Authority::new(), "h1").await
}

#[tokio::test]
async fn a_vm_lives_from_creation_to_deletion() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    let status = host.until_settled(id, 1).await;
    assert_eq!(
        (status.power, status.reason),
        (Some(PowerState::Running), PowerReason::Requested)
    );
    for (generation, power) in [
        (2, PowerState::Paused),
        (3, PowerState::Running),
        (4, PowerState::Stopped),
        (5, PowerState::Running),
    ] {
        host.create(id, intent(generation, power)).await;
        assert_eq!(host.until_settled(id, generation).await.power, Some(power));
    }
    host.vms
        .get(id)
        .unwrap()
        .delete(Generation(6), Epoch(1))
        .await
        .unwrap();
    host.until(id, "gone", |status| status.phase == Phase::Gone).await;
    assert_eq!(host.sim.list().await.unwrap(), []);
    assert_eq!(host.sim.local_volumes(), 0);
    let late = host
        .vms
        .get(id)
        .unwrap()
        .ensure(told(vm(1), intent(7, PowerState::Running)))
        .await;
    assert!(
        matches!(late, Err(Error::Denied(policy::Denied::StaleEpoch { .. }))),
        "a late command revived it: {late:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_the_request_is_powered_off_after_its_grace_period() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    host.sim.set_behaviour(id, Behaviour::Ignores);
    let asked = tokio::time::Instant::now();
    host.create(id, intent(2, PowerState::Stopped)).await;
    assert_eq!(host.until_settled(id, 2).await.power, Some(PowerState::Stopped));
    let took = asked.elapsed();
    assert!(
        took >= Duration::from_secs(5) && took < Duration::from_secs(10),
        "{took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_crashed_guest_is_restarted_and_one_that_shut_itself_down_is_not() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    host.until_settled(id, 1).await;
    host.sim.crash_guest(id);
    host.until(id, "seen off", |status| status.power == Some(PowerState::Stopped))
        .await;
    host.until(id, "restarted", |status| {
        status.power == Some(PowerState::Running)
    })
    .await;
    host.sim.power_off_guest(id);
    let off = host
        .until(id, "off", |status| {
            status.power == Some(PowerState::Stopped) && status.phase == Phase::Settled
        })
        .await;
    assert_eq!(off.reason, PowerReason::GuestShutdown);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(
        host.vms.get(id).unwrap().status().power,
        Some(PowerState::Stopped)
    );
    host.create(id, intent(2, PowerState::Running)).await;
    assert_eq!(host.until_settled(id, 2).await.power, Some(PowerState::Running));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_crashes_again_and_again_is_given_up_and_says_so() {
    let host = one_host().await;
    let id = vm(1);
    host.create(id, intent(1, PowerState::Running)).await;
    for _ in 0..=plan::MAX_RESTARTS {
        host.until(id, "running", |status| status.power == Some(PowerState::Running))
            .await;
        host.sim.crash_guest(id);
        host.until(id, "off", |status| status.power == Some(PowerState::Stopped))
            .await;
    }
    let status = host
        .until(id, "given up", |status| status.phase == Phase::Failed)
        .await;
    assert_eq!(status.failure.unwrap().reason, "CRASH_LOOP");
}

#[tokio::test(start_paused = true)]
async fn a_step_that_fails_is_tried_again_and_one_that_can_never_succeed_is_told() {
    let host = one_host().await;
    let broken = HypervisorError::Failed {
        call: "start",
        code: 1,
        detail: "no".into(),
    };
    host.sim.fail_next(Call::Start, Fault::Error(broken));
    host.create(vm(1), intent(1, PowerState::Running)).await;
    host.until(vm(1), "failing", |status| {
        status.failure.as_ref().is_some_and(|failure| failure.retrying)
    })
    .await;
    host.until_settled(vm(1), 1).await;
    let hopeless = [
        (
            Call::Define,
            HypervisorError::Invalid { detail: "no".into() },
            "REFUSED_BY_HYPERVISOR",
        ),
        (
            Call::CreateVolumes,
            HypervisorError::ImageRefused {
                image: "evil.qcow2".into(),
                refusal: crate::image::Refusal::Encrypted,
            },
            "IMAGE_REFUSED",
        ),
    ];
    for (number, (call, error, reason)) in (2..).zip(hopeless) {
        let text = error.to_string();
        host.sim.fail_next(call, Fault::Error(error));
        host.create(vm(number), intent(1, PowerState::Running)).await;
        let status = host
            .until(vm(number), "failed", |status| status.phase == Phase::Failed)
            .await;
        let failure = status.failure.unwrap();
        assert_eq!((failure.reason.as_str(), failure.message), (reason, text));
        assert!(!failure.retrying);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_took_effect_and_failed_is_not_repeated() {
    let host = one_host().await;
    let lost = HypervisorError::Unavailable {
        detail: "connection reset".into(),
    };
    host.sim.fail_next(Call::Start, Fault::TakesEffect(lost));
    host.create(vm(1), intent(1, PowerState::Running)).await;
    let status = host.until_settled(vm(1), 1).await;
    assert_eq!(status.power, Some(PowerState::Running));
}

#[tokio::test]
async fn what_cannot_be_written_down_is_not_done() {
    let host = one_host().await;
    let ledger = host.dir.path().join("ledger/vms");
    std::fs::remove_dir_all(&ledger).unwrap();
    let refused = host
        .vms
        .get_or_start(vm(1))
        .ensure(told(vm(1), intent(1, PowerState::Running)))
        .await;
    assert!(matches!(refused, Err(Error::Ledger(_))));
    assert_eq!(host.sim.list().await.unwrap(), []);
    std::fs::create_dir(&ledger).unwrap();
    host.create(vm(1), intent(1, PowerState::Running)).await;
    host.until_settled(vm(1), 1).await;
}

#[tokio::test]
async fn an_agent_killed_at_any_moment_finishes_what_was_accepted() {
    let authority = Authority::new();
    for calls in 0..6 {
        let mut host = Host::new(&authority, "h1").await;
        host.create(vm(1), intent(1, PowerState::Running)).await;
        // Lets the agent get so many turns before it dies.
        for _ in 0..calls * 3 {
            tokio::task::yield_now().await;
        }
        host.restart_agent("boot-1").await;
        assert_eq!(
            host.until_settled(vm(1), 1).await.power,
            Some(PowerState::Running),
            "killed after {calls}"
        );
        host.vms
            .get(vm(1))
            .unwrap()
            .delete(Generation(2), Epoch(1))
            .await
            .unwrap();
        for _ in 0..calls * 3 {
            tokio::task::yield_now().await;
        }
        host.restart_agent("boot-1").await;
        host.until(vm(1), "gone", |status| status.phase == Phase::Gone)
            .await;
        assert_eq!(host.sim.list().await.unwrap(), []);
    }
}

#[tokio::test]
async fn after_a_reboot_of_the_host_its_vms_are_started_again() {
    let mut host = one_host().await;
    host.create(vm(1), intent(1, PowerState::Running)).await;
    host.until_settled(vm(1), 1).await;
    host.create(vm(2), intent(1, PowerState::Running)).await;
    host.until_settled(vm(2), 1).await;
    host.create(vm(2), intent(2, PowerState::Stopped)).await;
    host.until_settled(vm(2), 2).await;
    host.sim.reboot_host();
    host.restart_agent("boot-2").await;
    assert_eq!(
        host.until_settled(vm(1), 1).await.power,
        Some(PowerState::Running)
    );
    assert_eq!(
        host.until_settled(vm(2), 2).await.power,
        Some(PowerState::Stopped),
        "it was off before"
    );
}

#[tokio::test]
async fn a_lost_ledger_does_not_lose_the_vms() {
    let mut host = one_host().await;
    host.create(vm(1), intent(1, PowerState::Running)).await;
    host.until_settled(vm(1), 1).await;
    let ticks = host.sim.ticks(vm(1));
    std::fs::remove_dir_all(host.dir.path().join("ledger")).unwrap();
    host.restart_agent("boot-1").await;
    let adopted = host
        .until(vm(1), "seen", |status| status.power == Some(PowerState::Running))
        .await;
    assert!(adopted.adopted);
    host.create(vm(1), intent(1, PowerState::Running)).await;
    let status = host.until_settled(vm(1), 1).await;
    assert!(!status.adopted);
    assert!(host.sim.ticks(vm(1)) >= ticks, "it was not restarted");
}

/// Two hosts, and a VM that runs on the first.
struct Pair {
    source: Host,
    destination: Host,
    migration: MigrationId,
    /// Under which the source has it.
    epoch: Epoch,
}

const MIGRATION: MigrationId = MigrationId::from_uuid(uuid::Uuid::from_u128(77));

impl Pair {
    async fn new() -> Self {
        let authority = Authority::new();
        let (source, destination) = (
            Host::new(&authority, "h1").await,
            Host::new(&authority, "h2").await,
        );
        source.create(vm(1), intent(1, PowerState::Running)).await;
        source.until_settled(vm(1), 1).await;
        Self {
            source,
            destination,
            migration: MIGRATION,
            epoch: Epoch(1),
        }
    }

    async fn prepare(&self) -> Result<Status, Error> {
        self.prepare_with(RestartPolicy::default()).await
    }

    async fn prepare_with(&self, restart_policy: RestartPolicy) -> Result<Status, Error> {
        let mut intent = Intent {
            epoch: self.epoch.next(),
            ..intent(1, PowerState::Running)
        };
        intent.spec.restart_policy = restart_policy;
        let source = self.source.name.parse().unwrap();
        self.destination
            .vms
            .get_or_start(vm(1))
            .prepare(Prepare {
                migration: self.migration,
                name: name(vm(1)),
                intent,
                source,
                images: Vec::new(),
            })
            .await
    }

    async fn send(&self) -> Result<Status, Error> {
        self.send_at(0).await
    }

    async fn send_at(&self, bandwidth_mib_per_second: u32) -> Result<Status, Error> {
        let send = Send {
            migration: self.migration,
            epoch: self.epoch,
            destination: self.destination.name.parse().unwrap(),
            address: self.destination.address.to_string(),
            max_downtime_ms: 100,
            bandwidth_mib_per_second,
            places: Vec::new(),
        };
        self.source.vms.get(vm(1)).unwrap().send(send).await
    }

    /// Asks both to settle until both have, the source first; returns what is on each.
    async fn settle(&self) -> (Presence, Presence) {
        let mut found = Vec::new();
        for host in [&self.source, &self.destination] {
            found.push(loop {
                if let Ok(status) = host.vms.get_or_start(vm(1)).settle(self.migration).await
                    && let Some(migration) = status.migration.filter(|migration| migration.settled)
                {
                    break migration.presence;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            });
        }
        (found[0], found[1])
    }

    async fn finish(&self, destination_owns: bool, epoch: u64) {
        for (host, owner) in [
            (&self.source, !destination_owns),
            (&self.destination, destination_owns),
        ] {
            host.vms
                .get(vm(1))
                .unwrap()
                .finish(self.migration, owner, Epoch(epoch))
                .await
                .unwrap();
        }
    }

    async fn transfer_over(&self) {
        let over = |s: &Status| {
            let transfer = s.migration.as_ref().map(|migration| &migration.transfer);
            matches!(
                transfer,
                Some(ledger::Transfer::Completed | ledger::Transfer::Failed { .. })
            )
        };
        self.source.until(vm(1), "sent", over).await;
    }

    fn census(&self) -> (Option<DomainState>, Option<DomainState>) {
        let state = |host: &Host| {
            futures::executor::block_on(host.sim.get(vm(1)))
                .unwrap()
                .map(|domain| domain.state)
        };
        (state(&self.source), state(&self.destination))
    }
}

const RUNNING: Presence = Presence::Is(DomainState::Running);
