//! The gRPC service about backups: who may call, what the wire means, and nothing else.

use std::sync::Arc;

use dalgu_proto::{
    agent::v1::{self as wire, agent_backup_service_server::AgentBackupService},
    ids::{self, BackupId},
    reason,
    time::to_wire,
    v1,
    vm::Spec,
};
use tonic::{Code, Request, Response, Status};

use super::{Backups, Error, Removal, Standing};
use crate::{
    gate::Gate,
    hypervisor::{
        self,
        backup::{Kind, Manifest, Order, Wanted},
    },
    server::pass,
    vm::Vms,
    wire::failure,
};

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// Judges commands.
    pub gate: Arc<Gate>,
    /// The VMs.
    pub vms: Vms,
    /// The backups.
    pub backups: Backups,
}

fn status(error: &Error) -> Status {
    let (code, why) = match error {
        Error::Ledger(_) => (Code::Unavailable, "LEDGER_FAILED"),
        Error::Busy => (Code::Unavailable, "BUSY"),
        // The pool's word about a pool that this host does not have comes in the answer of StartBackup.
        Error::Hypervisor(error @ hypervisor::Error::Storage { .. }) => {
            (Code::FailedPrecondition, error.reason())
        }
        Error::Hypervisor(error) => (Code::Unavailable, error.reason()),
    };
    reason::status(code, why, error.to_string())
}

fn invalid(field: &'static str) -> impl Fn(ids::Error) -> Status {
    move |error| reason::invalid(field, error.to_string())
}

#[allow(clippy::result_large_err, reason = "tonic's error is what a service returns")]
fn order(request: wire::StartBackupRequest) -> Result<Order, Status> {
    let spec = request
        .spec
        .ok_or_else(|| reason::invalid("spec", "must be given"))?;
    let spec = Spec::try_from(spec)
        .map_err(|error| reason::invalid(&format!("spec.{}", error.field), error.message))?;
    ids::check_device_name(&request.pool).map_err(invalid("pool"))?;
    let wanted = match v1::BackupKind::try_from(request.kind) {
        Ok(v1::BackupKind::Unspecified | v1::BackupKind::Auto) => Wanted::Auto,
        Ok(v1::BackupKind::Full) => Wanted::Full,
        Ok(v1::BackupKind::Incremental) => Wanted::Incremental,
        Err(_) => return Err(reason::invalid("kind", "is not a value of BackupKind")),
    };
    let parent = Some(request.parent_uid).filter(|uid| !uid.is_empty());
    let parent = parent.map(|uid| uid.parse()).transpose();
    Ok(Order {
        id: request.backup_uid.parse().map_err(invalid("backup_uid"))?,
        vm: request.vm_uid.parse().map_err(invalid("vm_uid"))?,
        name: request.vm_name.parse().map_err(invalid("vm_name"))?,
        spec,
        pool: request.pool,
        wanted,
        parent: parent.map_err(invalid("parent_uid"))?,
    })
}

fn ready(manifest: Manifest) -> wire::BackupReport {
    let parent_uid = manifest.parent().map(|parent| parent.to_string());
    let file = |file: hypervisor::backup::BackupFile| v1::BackupFile {
        disk: file.disk,
        file: file.file,
        size_bytes: file.size_bytes,
        stored_bytes: file.stored_bytes,
        virtual_size_bytes: file.virtual_size_bytes,
        sha256: file.sha256.into(),
    };
    wire::BackupReport {
        phase: wire::BackupPhase::Ready.into(),
        kind: match manifest.kind {
            Kind::Full => v1::BackupKind::Full,
            Kind::Incremental { .. } => v1::BackupKind::Incremental,
        }
        .into(),
        parent_uid: parent_uid.unwrap_or_default(),
        full_reason: manifest.full_reason.unwrap_or_default(),
        quiesced: manifest.quiesced,
        checkpoint: manifest.checkpoint,
        files: manifest.files.into_iter().map(file).collect(),
        point_time: Some(to_wire(manifest.point_time)),
        ..Default::default()
    }
}

fn report(id: BackupId, standing: Standing) -> Response<wire::BackupReport> {
    let phase = |phase: wire::BackupPhase| wire::BackupReport {
        phase: phase.into(),
        ..Default::default()
    };
    let report = match standing {
        Standing::Unknown => phase(wire::BackupPhase::Unspecified),
        Standing::Waiting => phase(wire::BackupPhase::Waiting),
        Standing::Running(bytes_done, bytes_total) => wire::BackupReport {
            bytes_done,
            bytes_total,
            ..phase(wire::BackupPhase::Running)
        },
        Standing::Ready(manifest) => ready(*manifest),
        Standing::Failed(error) => wire::BackupReport {
            error: Some(failure(error)),
            ..phase(wire::BackupPhase::Failed)
        },
    };
    Response::new(wire::BackupReport {
        backup_uid: id.to_string(),
        ..report
    })
}

#[tonic::async_trait]
impl AgentBackupService for Service {
    async fn start_backup(
        &self,
        request: Request<wire::StartBackupRequest>,
    ) -> Result<Response<wire::BackupReport>, Status> {
        let request = request.into_inner();
        pass(&self.gate, request.context.clone()).await?;
        let order = order(request)?;
        if !self.vms.present().contains(&order.vm) {
            let message = format!("VM {} is not on this host", order.vm);
            return Err(reason::status(Code::FailedPrecondition, "VM_NOT_HERE", message));
        }
        let id = order.id;
        let standing = self.backups.start(order).await;
        Ok(report(id, standing.map_err(|error| status(&error))?))
    }

    async fn get_backup(
        &self,
        request: Request<wire::GetBackupRequest>,
    ) -> Result<Response<wire::BackupReport>, Status> {
        let request = request.into_inner();
        pass(&self.gate, request.context).await?;
        let id = request.backup_uid.parse().map_err(invalid("backup_uid"))?;
        let standing = self.backups.standing(id, &request.pool).await;
        Ok(report(id, standing.map_err(|error| status(&error))?))
    }

    async fn cancel_backup(
        &self,
        request: Request<wire::CancelBackupRequest>,
    ) -> Result<Response<wire::BackupReport>, Status> {
        let request = request.into_inner();
        pass(&self.gate, request.context).await?;
        let id = request.backup_uid.parse().map_err(invalid("backup_uid"))?;
        self.backups.cancel(id).await.map_err(|error| status(&error))?;
        let standing = self.backups.standing(id, &request.pool).await;
        Ok(report(id, standing.map_err(|error| status(&error))?))
    }

    async fn remove_backup(
        &self,
        request: Request<wire::RemoveBackupRequest>,
    ) -> Result<Response<wire::RemoveBackupResponse>, Status> {
        let request = request.into_inner();
        pass(&self.gate, request.context).await?;
        let removal = Removal {
            id: request.backup_uid.parse().map_err(invalid("backup_uid"))?,
            vm: request.vm_uid.parse().map_err(invalid("vm_uid"))?,
            pool: request.pool,
        };
        self.backups
            .remove(&removal)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(wire::RemoveBackupResponse {}))
    }
}
