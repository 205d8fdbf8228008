//! The gRPC service about volumes: who may call, what the wire means, and nothing else.

use std::sync::Arc;

use dalgu_proto::{
    agent::v1::{self as wire, agent_volume_service_server::AgentVolumeService},
    ids::VolumeId,
    mutant::{self, Mutant},
    reason,
};
use tonic::{Code, Request, Response, Status};

use super::Volumes;
use crate::{gate::Gate, hypervisor::Hypervisor, server::pass};

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// Judges commands.
    pub gate: Arc<Gate>,
    /// Who has which volume.
    pub volumes: Volumes,
    /// Deletes files.
    pub hypervisor: Arc<dyn Hypervisor>,
}

#[tonic::async_trait]
impl AgentVolumeService for Service {
    async fn delete_volume(
        &self,
        request: Request<wire::DeleteVolumeRequest>,
    ) -> Result<Response<wire::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        pass(&self.gate, request.context).await?;
        let volume: VolumeId = request
            .volume_uid
            .parse()
            .map_err(|error: dalgu_proto::ids::Error| reason::invalid("volume_uid", error.to_string()))?;
        let holder = self.volumes.holder(volume, None);
        if let Some(vm) = holder.filter(|_| !mutant::on(Mutant::VolumePurgedInUse)) {
            let message = format!("VM {vm} of this host has volume {volume}; it is not deleted");
            return Err(reason::status(Code::FailedPrecondition, "VOLUME_IN_USE", message));
        }
        let purged = self.hypervisor.purge_volume(&request.pool, volume, false).await;
        purged.map_err(|error| {
            let code = match error.is_retryable() {
                true => Code::Unavailable,
                false => Code::FailedPrecondition,
            };
            reason::status(code, error.reason(), error.to_string())
        })?;
        tracing::info!(%volume, pool = request.pool, "a volume was deleted");
        Ok(Response::new(wire::DeleteVolumeResponse {}))
    }
}
