//! A controller's services in process, on a store in memory: what `rpc` sends requests to and `records` starts from stored
//! rows. No socket, no agent; time stands still but where everybody waits.

use std::sync::{Arc, LazyLock};

use dalgu_agent::wire as agent_side;
use dalgu_controller::{
    agent_client::Agents,
    agent_wire as controller_side,
    api::Services,
    config::Config,
    networks::plan,
    pki,
    plans::usage::Usage,
    state::{self, Db, Hooks, Reserved, State},
    store::{Store, memory::Disk},
};
use dalgu_proto::{
    agent::v1::HostNetworks,
    ids::{ClusterId, HostName},
    network::{Group, Interface, Network},
    tls::{Identity, Peer, Role},
    v1,
    vm::Spec,
};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime can be made")
});

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let path = dir.path().join("controller");
    pki::init(&path, "fuzz", &[]).expect("a site can be made");
    Identity::load_dir(&path, "controller").expect("what was just made can be read")
});

/// The site that every input works on.
pub const SITE: ClusterId = ClusterId::from_uuid(uuid::Uuid::from_u128(7));

/// Runs something to its end on the runtime of this process.
pub fn wait<T>(what: impl Future<Output = T>) -> T {
    RUNTIME.block_on(what)
}

/// A controller without its network.
pub struct Site {
    /// What answers requests.
    pub services: Services,
    /// What its store has on disk.
    pub disk: Disk,
}

impl Site {
    /// Starts on what is on `disk`.
    pub fn open(disk: Disk) -> Result<Self, state::Error> {
        let hooks = Hooks {
            events_kept: 64,
            failed: Box::new(|error| panic!("a store in memory failed: {error}")),
            ..Hooks::default()
        };
        let services = Services {
            db: Db::open(disk.open(), SITE, hooks)?,
            agents: Arc::new(Agents::new(Arc::new(IDENTITY.clone()))),
            config: Arc::new(Config::default()),
            metrics: Arc::default(),
            power: Config::default().power.redfish(),
            plan_usage: Usage::default(),
            stop: CancellationToken::new(),
        };
        Ok(Self { services, disk })
    }

    /// What is durable now.
    pub fn state(&self) -> Arc<State> {
        self.services.db.snapshot()
    }

    /// What is stored is what is known, and everything of it can be shown and sent.
    pub fn check(&self) {
        let state = self.state();
        let image = self.disk.open().load().expect("a store in memory can be read");
        let read = state::from_image(&image, SITE).expect("what was stored can be read back");
        assert_eq!(read.meta, state.meta);
        assert_eq!(read.vms, state.vms);
        assert_eq!(read.vm_names, state.vm_names);
        assert_eq!(read.hosts, state.hosts);
        assert_eq!(read.operations, state.operations);
        assert_eq!(read.migrations, state.migrations);
        assert_eq!(read.active_operations, state.active_operations);
        assert_eq!(read.active_migrations, state.active_migrations);
        assert_eq!(read.requests, state.requests);
        assert_eq!(read.events, state.events);
        assert_eq!(read.networks, state.networks);
        assert_eq!(read.groups, state.groups);
        assert_eq!(reserved(&read), reserved(&state));
        for vm in state.vms.values() {
            let wire = v1::VmSpec::from(vm.spec.clone());
            assert_eq!(Spec::try_from(wire).as_ref(), Ok(&vm.spec));
            let intent = controller_side::intent(vm, &vm.intent, vm.epoch, &vm.owner);
            let (id, told) = agent_side::intent(intent).expect("an agent takes what the controller stored");
            assert_eq!((id, &told.name, &told.intent.spec), (vm.id, &vm.name, &vm.spec));
            assert_eq!(told.intent.snapshots, vm.snapshots.set());
        }
        for host in state.hosts.keys() {
            let (now, again) = (networks(&state, host), networks(&read, host));
            assert_eq!(now, again, "what {host} must know follows from the store");
            for part in now.networks {
                let network = Network::try_from(part.network.unwrap_or_default());
                assert!(network.is_ok_and(|network| state.networks.contains_key(&network.name)));
                for interface in part.interfaces {
                    assert!(Interface::try_from(interface).is_ok());
                }
            }
            for group in now.security_groups {
                assert!(Group::try_from(group).is_ok());
            }
        }
    }
}

/// What a host must know of networks, but for its version.
fn networks(state: &State, host: &HostName) -> HostNetworks {
    HostNetworks {
        version: 0,
        ..controller_side::network::document(plan::document(state, host))
    }
}

/// What VMs hold, without the hosts where none holds anything.
fn reserved(state: &State) -> Vec<(HostName, Reserved)> {
    let mut all: Vec<_> = state
        .reserved
        .iter()
        .map(|(host, reserved)| (host.clone(), reserved.clone()))
        .collect();
    for (_, reserved) in &mut all {
        let held = reserved.disks_mib.iter().filter(|(_, mib)| **mib > 0);
        reserved.disks_mib = held.map(|(pool, mib)| (pool.clone(), *mib)).collect();
    }
    all.retain(|(_, reserved)| *reserved != Reserved::default());
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

/// A request as it comes from an operator.
pub fn operator<T>(message: T) -> Request<T> {
    from(message, Role::Operator, "fuzz")
}

/// A request as it comes from the agent of a host.
pub fn agent<T>(message: T, host: &str) -> Request<T> {
    let name = host.parse().expect("the hosts of the target have names");
    from(message, Role::Agent(name), host)
}

fn from<T>(message: T, role: Role, name: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(Peer {
        role,
        name: name.to_owned(),
    });
    request
}

/// Waits for an answer. A refusal must be one that the caller can understand. (A call that never ended would be a timeout of
/// libFuzzer's; none can be set here, as time jumps ahead whenever everybody waits for the store's thread.)
pub async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Option<T> {
    match call.await {
        Ok(answer) => Some(answer.into_inner()),
        Err(status) => {
            assert!(
                !matches!(status.code(), Code::Unknown | Code::Internal),
                "a refusal without a reason: {status:?}"
            );
            None
        }
    }
}
