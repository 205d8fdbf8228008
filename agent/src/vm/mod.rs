//! The VMs of this host: one task for each, and the register of them.
//!
//! A [`Handle`] is how the rest of the agent speaks to a VM's task: requests go in, a [`status::Status`] comes out. The
//! task ([`driver`]) is the only one that changes the VM or its ledger entry. [`policy`] decides whether a request is
//! obeyed and [`plan`] what is done next; both are pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use dalgu_proto::{
    ids::{ClusterId, Epoch, Generation, HostName, MigrationId, VmId, VmName},
    time::Clock,
    vm::{NumaPlace, first_boot::Documents},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    devices::Devices,
    hypervisor::{self, Domain, Hypervisor},
    images::{Awaited, Images, Need},
    ledger::{self, Intent, Ledger},
    metrics::Snapshot,
    migration::transport::Transport,
    network::{Networks, NotReady},
    pins::{self, Pins},
    volumes::Volumes,
};

mod describe;
mod driver;
mod held;
pub mod plan;
pub mod policy;
mod reason;
mod requests;
pub mod status;
mod steps;
mod tend;
mod transfer;
mod transfers;

/// Requests that wait for one VM's task. Each is a command of the controller, which has few under way for one VM.
const QUEUE_DEPTH: usize = 8;

/// Stable reason of what is wrong with a VM whose ledger entry cannot be read.
pub const UNREADABLE: &str = "LEDGER_UNREADABLE";

/// Stable reason of a VM that waits for an image which is brought from other hosts.
pub const IMAGE_FETCHING: &str = "IMAGE_FETCHING";

/// Why a request to a VM's task failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not obeyed.
    #[error(transparent)]
    Denied(#[from] policy::Denied),
    /// The ledger failed; nothing was done.
    #[error("the request could not be written down")]
    Ledger(#[from] ledger::Error),
    /// The hypervisor failed.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// An image is not here yet.
    #[error(transparent)]
    Image(#[from] Awaited),
    /// A network is not here yet.
    #[error(transparent)]
    Network(#[from] NotReady),
    /// A socket or its directory could not be made.
    #[error("the migration's sockets could not be made")]
    Sockets(#[source] std::io::Error),
    /// What this host was told of it cannot be read.
    #[error("the ledger file {file} cannot be read by this version; nothing is done to the VM")]
    Unreadable {
        /// The file.
        file: String,
    },
    /// Too many requests wait for this VM.
    #[error("too many requests wait for VM {0}")]
    Full(VmId),
    /// The agent is going down.
    #[error("the agent is going down")]
    Stopping,
}

/// A VM that may come by migration.
#[derive(Debug, Clone)]
pub struct Prepare {
    /// The migration.
    pub migration: MigrationId,
    /// Name of the VM.
    pub name: VmName,
    /// What it will be here, with its new epoch.
    pub intent: Intent,
    /// Where it comes from.
    pub source: HostName,
    /// Images that its disks here have behind them, and who has them.
    pub images: Vec<Need>,
}

/// A VM that is to leave.
#[derive(Debug, Clone)]
pub struct Send {
    /// The migration.
    pub migration: MigrationId,
    /// Ownership number under which this host has it.
    pub epoch: Epoch,
    /// Where it goes.
    pub destination: HostName,
    /// Where that host's agent listens.
    pub address: String,
    /// Longest planned stop, in ms.
    pub max_downtime_ms: u32,
    /// Limit of the streams in MiB per second; 0 means none.
    pub bandwidth_mib_per_second: u32,
    /// Where it will be there.
    pub places: Vec<NumaPlace>,
}

/// What the controller says of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Its name.
    pub name: VmName,
    /// What it should be.
    pub intent: Intent,
    /// Its disks have been made once, here or elsewhere: one that is missing is never made anew.
    pub disks_made: bool,
    /// Disks that are to be made where they are missing: those that were added since, and volumes of the site that have not been
    /// made; other volumes are never made.
    pub new_disks: BTreeSet<String>,
    /// Images that its disks are made from, and who has them.
    pub images: Vec<Need>,
    /// Documents of its first boot; empty once its disks are made.
    pub documents: Documents,
}

/// What a VM's task can be asked.
#[derive(Debug)]
enum Request {
    Ensure(Told),
    Delete(Generation, Epoch),
    Prepare(Prepare),
    Send(Send),
    Settle(MigrationId),
    Finish {
        migration: MigrationId,
        owner: bool,
        epoch: Epoch,
    },
}

type Reply = oneshot::Sender<Result<status::Status, Error>>;

/// How the rest of the agent speaks to a VM's task.
#[derive(Clone)]
pub struct Handle {
    id: VmId,
    requests: mpsc::Sender<(Request, Reply)>,
    status: watch::Receiver<status::Status>,
}

impl Handle {
    /// What the task last published.
    pub fn status(&self) -> status::Status {
        self.status.borrow().clone()
    }

    async fn ask(&self, request: Request) -> Result<status::Status, Error> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .try_send((request, reply))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => Error::Full(self.id),
                mpsc::error::TrySendError::Closed(_) => Error::Stopping,
            })?;
        answer.await.unwrap_or(Err(Error::Stopping))
    }

    /// Says what the VM should be.
    pub async fn ensure(&self, told: Told) -> Result<status::Status, Error> {
        self.ask(Request::Ensure(told)).await
    }

    /// Says that it should be gone; it is when the phase is `Gone`.
    pub async fn delete(&self, generation: Generation, epoch: Epoch) -> Result<status::Status, Error> {
        self.ask(Request::Delete(generation, epoch)).await
    }

    /// Destination: makes room.
    pub async fn prepare(&self, prepare: Prepare) -> Result<status::Status, Error> {
        self.ask(Request::Prepare(prepare)).await
    }

    /// Source: begins to send.
    pub async fn send(&self, send: Send) -> Result<status::Status, Error> {
        self.ask(Request::Send(send)).await
    }

    /// Either side: gives the transfer up and looks.
    pub async fn settle(&self, migration: MigrationId) -> Result<status::Status, Error> {
        self.ask(Request::Settle(migration)).await
    }

    /// Either side: the owner is known.
    pub async fn finish(
        &self,
        migration: MigrationId,
        owner: bool,
        epoch: Epoch,
    ) -> Result<status::Status, Error> {
        self.ask(Request::Finish {
            migration,
            owner,
            epoch,
        })
        .await
    }
}

/// What all VM tasks share.
pub struct Shared {
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The ledger.
    pub ledger: Ledger,
    /// The store of images.
    pub images: Images,
    /// The networks.
    pub networks: Networks,
    /// Which VM has which volume of the site.
    pub volumes: Volumes,
    /// Which VM has which processors.
    pub pins: Pins,
    /// Which VM has which PCI devices.
    pub devices: Devices,
    /// What this host is made of.
    pub samples: watch::Receiver<Arc<Snapshot>>,
    /// Leads to other hosts during migrations.
    pub transport: Arc<dyn Transport>,
    /// The wall clock.
    pub clock: Clock,
    /// The kernel's boot id.
    pub boot_id: String,
    /// The site.
    pub cluster: ClusterId,
    /// Counts the changes of all VMs' statuses.
    pub changes: watch::Sender<u64>,
}

/// The register of this host's VMs. Cheap to clone.
#[derive(Clone)]
pub struct Vms {
    shared: Arc<Shared>,
    handles: Arc<Mutex<BTreeMap<VmId, Handle>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What is known of a VM when its task begins.
#[derive(Default)]
pub struct Known {
    /// Ledger entry.
    pub vm: Option<ledger::Vm>,
    /// Ledger entries of its migrations.
    pub migrations: Vec<ledger::Migration>,
    /// A domain with Dalgu's mark that is not in the ledger.
    pub adopted: Option<Domain>,
}

impl Vms {
    /// An empty register.
    pub fn new(shared: Shared, stop: CancellationToken) -> Self {
        let tasks = TaskTracker::new();
        let (pins, hypervisor) = (shared.pins.clone(), shared.hypervisor.clone());
        tasks.spawn(pins::keep(pins, hypervisor, stop.clone()));
        Self {
            shared: Arc::new(shared),
            handles: Arc::default(),
            tasks,
            stop,
        }
    }

    fn map(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, Handle>> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The hypervisor.
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.shared.hypervisor
    }

    /// The networks.
    pub fn networks(&self) -> &Networks {
        &self.shared.networks
    }

    /// A VM that is known here.
    pub fn get(&self, id: VmId) -> Option<Handle> {
        self.map()
            .get(&id)
            .filter(|handle| !handle.requests.is_closed())
            .cloned()
    }

    /// A VM, with a new task for it if there is none.
    pub fn get_or_start(&self, id: VmId) -> Handle {
        self.start(id, Known::default())
    }

    /// Starts the task of a VM that recovery found; if it has one already, that one stays.
    pub fn start(&self, id: VmId, known: Known) -> Handle {
        self.enter(id, |queue, status| {
            let driver = driver::Driver::new(self.shared.clone(), id, known, status.clone());
            // On the heap: it is large, and would be moved at each of its steps into the runtime.
            self.tasks
                .spawn(Box::pin(self.clone().tend(driver, queue, id, status)));
        })
    }

    /// Enters a VM with the task that `begin` starts for it; if it has one already, that one stays.
    fn enter(
        &self,
        id: VmId,
        begin: impl FnOnce(mpsc::Receiver<(Request, Reply)>, watch::Sender<status::Status>),
    ) -> Handle {
        let mut map = self.map();
        if let Some(handle) = map.get(&id).filter(|handle| !handle.requests.is_closed()) {
            return handle.clone();
        }
        let (requests, queue) = mpsc::channel(QUEUE_DEPTH);
        let status = watch::Sender::new(status::Status::unknown(id));
        let handle = Handle {
            id,
            requests,
            status: status.subscribe(),
        };
        begin(queue, status);
        map.insert(id, handle.clone());
        handle
    }

    /// Tells that some VM's status has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Statuses of all VMs of which something is here.
    pub fn statuses(&self) -> Vec<status::Status> {
        self.of_those_here(status::Status::clone)
    }

    /// VMs of which something is here. A domain of Dalgu's that is listed between two calls of this, and is in neither
    /// answer, is one that this host was never told of.
    pub fn present(&self) -> BTreeSet<VmId> {
        self.of_those_here(|status| status.id)
    }

    /// Something of each VM's status, in the order of the ids.
    fn of_those_here<T, C: FromIterator<T>>(&self, look: impl Fn(&status::Status) -> T) -> C {
        let map = self.map();
        let here = map.values().filter_map(|handle| {
            let status = handle.status.borrow();
            (status.phase != status::Phase::Gone).then(|| look(&status))
        });
        here.collect()
    }

    /// The latest migration of this id.
    pub fn migration(&self, id: MigrationId) -> Option<status::Migration> {
        self.map().values().find_map(|handle| {
            let status = handle.status.borrow();
            status
                .migration
                .as_ref()
                .filter(|migration| migration.id == id)
                .cloned()
        })
    }

    /// Waits for all tasks to end, after the token they were given has been cancelled.
    pub async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

#[cfg(test)]
pub(crate) mod tests;
