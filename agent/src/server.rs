//! The agent's gRPC service: who may call, what the wire means, and nothing else.
//!
//! Only the site's controller may command. Each command passes the [`Gate`], becomes a request to one VM's task, and is
//! answered as soon as that has written it down.

use std::sync::Arc;

use dalgu_proto::{
    agent::v1::{self as wire, agent_service_server::AgentService},
    ids::{Epoch, Generation, MigrationId, Session, Term, VmId},
    reason,
    tls::{Peer, Role},
};
use futures::stream::BoxStream;
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use crate::{
    console,
    gate::{self, Context, Gate},
    hypervisor,
    metrics::Snapshot,
    vm::{self, Handle, Vms, policy::Denied, status::Phase},
    wire as convert,
};

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// Judges commands.
    pub gate: Arc<Gate>,
    /// The VMs.
    pub vms: Vms,
    /// The samples.
    pub samples: watch::Receiver<Arc<Snapshot>>,
    /// The kernel's boot id.
    pub boot_id: String,
}

/// Lets only the controller in.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn only_controller(request: Request<()>) -> Result<Request<()>, Status> {
    match request.extensions().get::<Peer>() {
        Some(Peer {
            role: Role::Controller,
            ..
        }) => Ok(request),
        Some(peer) => {
            let message = format!("{peer} may not command an agent; use the controller's API");
            Err(reason::status(Code::PermissionDenied, "NOT_CONTROLLER", message))
        }
        None => Err(reason::status(
            Code::Unauthenticated,
            "NO_IDENTITY",
            "the connection has no identity",
        )),
    }
}

fn from_gate(error: &gate::Error) -> Status {
    let code = match error {
        gate::Error::Recovering | gate::Error::Unregistered | gate::Error::Ledger(_) => Code::Unavailable,
        _ => Code::FailedPrecondition,
    };
    reason::status(code, error.reason(), error.to_string())
}

fn from_vm(error: &vm::Error) -> Status {
    let (code, why) = match error {
        vm::Error::Denied(denied @ Denied::NotHere(_)) => (Code::NotFound, denied.reason()),
        vm::Error::Denied(denied @ Denied::Busy) => (Code::Unavailable, denied.reason()),
        vm::Error::Denied(denied) => (Code::FailedPrecondition, denied.reason()),
        vm::Error::Ledger(_) => (Code::Unavailable, "LEDGER_FAILED"),
        // Only a migration's destination makes disks while its caller waits: the VM is better left where it is than held up
        // until somebody has mended the pool.
        vm::Error::Hypervisor(error @ hypervisor::Error::Storage { .. }) => {
            (Code::FailedPrecondition, error.reason())
        }
        vm::Error::Hypervisor(error) if error.is_retryable() => (Code::Unavailable, error.reason()),
        vm::Error::Hypervisor(error) => (Code::FailedPrecondition, error.reason()),
        vm::Error::Unreadable { .. } => (Code::FailedPrecondition, vm::UNREADABLE),
        vm::Error::Network(waiting) => (Code::Unavailable, waiting.reason()),
        vm::Error::Image(_) => (Code::Unavailable, vm::IMAGE_FETCHING),
        vm::Error::Sockets(_) => (Code::Unavailable, "SOCKETS_FAILED"),
        vm::Error::Full(_) => (Code::ResourceExhausted, "VM_QUEUE_FULL"),
        vm::Error::Stopping => (Code::Unavailable, "AGENT_STOPPING"),
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    reason::status(code, why, message)
}

fn invalid(field: &str) -> impl Fn(dalgu_proto::ids::Error) -> Status {
    move |error| reason::invalid(field, error.to_string())
}

/// The controller's run; empty from an older version.
#[allow(clippy::result_large_err, reason = "tonic's error is what a service returns")]
fn run(id: &str) -> Result<Option<Uuid>, Status> {
    match id {
        "" => Ok(None),
        id => Uuid::try_parse(id)
            .map(Some)
            .map_err(|_| reason::invalid("context.controller_run_id", "must be a UUID")),
    }
}

/// Judges the context of a command.
///
/// # Errors
/// If it is not obeyed.
pub async fn pass(gate: &Gate, context: Option<wire::CommandContext>) -> Result<(), Status> {
    let context = context.ok_or_else(|| reason::invalid("context", "must be given"))?;
    let cluster = context
        .cluster_id
        .parse()
        .map_err(invalid("context.cluster_id"))?;
    let given = Context {
        cluster,
        term: Term(context.term),
        session: Session(context.session),
        host: &context.host,
        run: run(&context.controller_run_id)?,
    };
    gate.pass(given).await.map_err(|error| from_gate(&error))
}

impl Service {
    async fn pass(&self, context: Option<wire::CommandContext>) -> Result<(), Status> {
        pass(&self.gate, context).await
    }

    fn known(&self, uid: &str) -> Result<Handle, Status> {
        let id: VmId = uid.parse().map_err(invalid("vm_uid"))?;
        self.vms
            .get(id)
            .ok_or_else(|| from_vm(&Denied::NotHere(id).into()))
    }

    fn migration_report(&self, id: MigrationId) -> wire::MigrationReport {
        let unknown = || wire::MigrationReport {
            migration_id: id.to_string(),
            ..Default::default()
        };
        self.vms.migration(id).map_or_else(unknown, convert::migration)
    }
}

#[tonic::async_trait]
impl AgentService for Service {
    async fn ensure_vm(
        &self,
        request: Request<wire::EnsureVmRequest>,
    ) -> Result<Response<wire::EnsureVmResponse>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let vm = request.vm.ok_or_else(|| reason::invalid("vm", "must be given"))?;
        let (id, told) = convert::intent(vm)?;
        let status = self
            .vms
            .get_or_start(id)
            .ensure(told)
            .await
            .map_err(|error| from_vm(&error))?;
        Ok(Response::new(wire::EnsureVmResponse {
            vm: Some(convert::report(status, None)),
        }))
    }

    async fn delete_vm(
        &self,
        request: Request<wire::DeleteVmRequest>,
    ) -> Result<Response<wire::DeleteVmResponse>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let id: VmId = request.uid.parse().map_err(invalid("uid"))?;
        let (generation, epoch) = (Generation(request.generation), Epoch(request.epoch));
        // Also a VM that was never here: the command to make it may be on its way yet.
        let status = self
            .vms
            .get_or_start(id)
            .delete(generation, epoch)
            .await
            .map_err(|error| from_vm(&error))?;
        let gone = status.phase == Phase::Gone;
        let vm = (!gone).then(|| convert::report(status, None));
        Ok(Response::new(wire::DeleteVmResponse { gone, vm }))
    }

    async fn prepare_migration(
        &self,
        request: Request<wire::PrepareMigrationRequest>,
    ) -> Result<Response<wire::PrepareMigrationResponse>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let migration = request.migration_id.parse().map_err(invalid("migration_id"))?;
        let source = request.source_host.parse().map_err(invalid("source_host"))?;
        let vm = request.vm.ok_or_else(|| reason::invalid("vm", "must be given"))?;
        let (id, told) = convert::intent(vm)?;
        let prepare = vm::Prepare {
            migration,
            name: told.name,
            intent: told.intent,
            source,
            images: told.images,
        };
        self.vms
            .get_or_start(id)
            .prepare(prepare)
            .await
            .map_err(|error| from_vm(&error))?;
        Ok(Response::new(wire::PrepareMigrationResponse {}))
    }

    async fn start_migration(
        &self,
        request: Request<wire::StartMigrationRequest>,
    ) -> Result<Response<wire::StartMigrationResponse>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let send = vm::Send {
            migration: request.migration_id.parse().map_err(invalid("migration_id"))?,
            epoch: Epoch(request.epoch),
            destination: request
                .destination_host
                .parse()
                .map_err(invalid("destination_host"))?,
            address: request.destination_address,
            max_downtime_ms: request.max_downtime_ms,
            bandwidth_mib_per_second: request.bandwidth_mib_per_second,
            places: convert::places(request.numa),
        };
        self.known(&request.vm_uid)?
            .send(send)
            .await
            .map_err(|error| from_vm(&error))?;
        Ok(Response::new(wire::StartMigrationResponse {}))
    }

    async fn get_migration(
        &self,
        request: Request<wire::GetMigrationRequest>,
    ) -> Result<Response<wire::MigrationReport>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let id = request.migration_id.parse().map_err(invalid("migration_id"))?;
        Ok(Response::new(self.migration_report(id)))
    }

    async fn settle_migration(
        &self,
        request: Request<wire::SettleMigrationRequest>,
    ) -> Result<Response<wire::MigrationReport>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let id: MigrationId = request.migration_id.parse().map_err(invalid("migration_id"))?;
        let vm: VmId = request.vm_uid.parse().map_err(invalid("vm_uid"))?;
        let status = self
            .vms
            .get_or_start(vm)
            .settle(id)
            .await
            .map_err(|error| from_vm(&error))?;
        let migration = status.migration.filter(|migration| migration.id == id);
        let none = || {
            reason::status(
                Code::Internal,
                "MIGRATION_LOST",
                "the settled migration is not in the status",
            )
        };
        Ok(Response::new(convert::migration(migration.ok_or_else(none)?)))
    }

    async fn finish_migration(
        &self,
        request: Request<wire::FinishMigrationRequest>,
    ) -> Result<Response<wire::FinishMigrationResponse>, Status> {
        let request = request.into_inner();
        self.pass(request.context).await?;
        let migration = request.migration_id.parse().map_err(invalid("migration_id"))?;
        let vm: VmId = request.vm_uid.parse().map_err(invalid("vm_uid"))?;
        self.vms
            .get_or_start(vm)
            .finish(migration, request.owner, Epoch(request.epoch))
            .await
            .map_err(|error| from_vm(&error))?;
        Ok(Response::new(wire::FinishMigrationResponse { done: true }))
    }

    async fn list_vms(
        &self,
        _request: Request<wire::ListVmsRequest>,
    ) -> Result<Response<wire::ListVmsResponse>, Status> {
        if !self.gate.is_open() {
            return Err(from_gate(&gate::Error::Recovering));
        }
        let mut known = self.vms.present();
        let domains = self
            .vms
            .hypervisor()
            .list()
            .await
            .map_err(|error| from_vm(&error.into()))?;
        known.extend(self.vms.present());
        let usages = self
            .samples
            .borrow()
            .vms
            .iter()
            .filter_map(|vm| Some((vm.id, vm.usage.clone()?)))
            .collect();
        Ok(Response::new(wire::ListVmsResponse {
            vms: convert::reports(self.vms.statuses(), &usages),
            unmanaged_domains: convert::unmanaged(&domains, &known),
        }))
    }

    async fn list_files(
        &self,
        request: Request<wire::ListFilesRequest>,
    ) -> Result<Response<wire::ListFilesResponse>, Status> {
        let files = self.vms.hypervisor().files(&request.get_ref().pool).await;
        let files = files.map_err(|error| from_vm(&error.into()))?;
        let files = files.into_iter().map(convert::pool_file).collect();
        Ok(Response::new(wire::ListFilesResponse { files }))
    }

    async fn get_host(
        &self,
        _request: Request<wire::GetHostRequest>,
    ) -> Result<Response<wire::GetHostResponse>, Status> {
        let snapshot = self.samples.borrow().clone();
        Ok(Response::new(wire::GetHostResponse {
            host: self.gate.own().to_string(),
            inventory: Some((*snapshot.inventory).clone().into()),
            usage: snapshot.usage.as_ref().map(|(_, usage)| (**usage).clone().into()),
            boot_id: self.boot_id.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    type ReadConsoleStream = BoxStream<'static, Result<wire::ReadConsoleResponse, Status>>;

    async fn read_console(
        &self,
        request: Request<wire::ReadConsoleRequest>,
    ) -> Result<Response<Self::ReadConsoleStream>, Status> {
        let request = request.into_inner();
        self.known(&request.uid)?;
        let id: VmId = request.uid.parse().map_err(invalid("uid"))?;
        let path = self.vms.hypervisor().console_log(id).ok_or_else(|| {
            let message = "this host keeps no console logs";
            reason::status(Code::FailedPrecondition, "NO_CONSOLE_LOG", message)
        })?;
        let stream = console::read(path, request.tail_bytes, request.follow);
        Ok(Response::new(Box::pin(stream)))
    }
}
