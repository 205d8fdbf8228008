//! What the pretended hosts do in a pool that all of them see: remove volumes, and take and remove backups, by the contract.

use std::collections::BTreeSet;

use dalgu_proto::{
    agent::v1::{
        self as agent, BackupPhase, agent_backup_service_server::AgentBackupService,
        agent_volume_service_server::AgentVolumeService,
    },
    v1::{BackupKind, GuestFeature, HostInventory, StoragePool},
};
use tonic::{Request, Response, Status};

use super::agent::Agent;

/// The pool that all hosts see.
pub const SHARED: &str = "san";
/// Its size.
pub const SHARED_MIB: u64 = 50 << 10;

#[derive(Debug, Clone, Default)]
pub struct Storage {
    /// The host has the shared pool, and offers volumes and backups.
    pub offered: bool,
    /// Backups that it has taken and that are there yet.
    pub backups: BTreeSet<String>,
}

impl Agent {
    pub fn stored(&self, mut inventory: HostInventory) -> HostInventory {
        if self.fabric.lock().hosts[&self.name].storage.offered {
            let offered = [GuestFeature::Volume, GuestFeature::Backup];
            inventory.guest_features.extend(offered.map(i32::from));
            inventory.pools.push(StoragePool {
                name: SHARED.into(),
                path: "/san".into(),
                shared: true,
                capacity_bytes: SHARED_MIB << 20,
                available_bytes: SHARED_MIB << 20,
                ..Default::default()
            });
        }
        inventory
    }

    fn backup(&self, uid: String) -> agent::BackupReport {
        let there = self.fabric.lock().hosts[&self.name]
            .storage
            .backups
            .contains(&uid);
        agent::BackupReport {
            backup_uid: uid,
            phase: match there {
                true => BackupPhase::Ready,
                false => BackupPhase::Unspecified,
            }
            .into(),
            kind: BackupKind::Full.into(),
            ..Default::default()
        }
    }
}

#[tonic::async_trait]
impl AgentVolumeService for Agent {
    async fn delete_volume(
        &self,
        request: Request<agent::DeleteVolumeRequest>,
    ) -> Result<Response<agent::DeleteVolumeResponse>, Status> {
        let context = request.into_inner().context;
        self.command("DeleteVolume", context, |_| Ok(agent::DeleteVolumeResponse {}))
    }
}

#[tonic::async_trait]
impl AgentBackupService for Agent {
    async fn start_backup(
        &self,
        request: Request<agent::StartBackupRequest>,
    ) -> Result<Response<agent::BackupReport>, Status> {
        let request = request.into_inner();
        self.command("StartBackup", request.context, |host| {
            host.storage.backups.insert(request.backup_uid.clone());
            Ok(())
        })?;
        Ok(Response::new(self.backup(request.backup_uid)))
    }

    async fn get_backup(
        &self,
        request: Request<agent::GetBackupRequest>,
    ) -> Result<Response<agent::BackupReport>, Status> {
        let request = request.into_inner();
        self.command("GetBackup", request.context, |_| Ok(()))?;
        Ok(Response::new(self.backup(request.backup_uid)))
    }

    async fn cancel_backup(
        &self,
        _: Request<agent::CancelBackupRequest>,
    ) -> Result<Response<agent::BackupReport>, Status> {
        Err(Status::unimplemented("not used by the controller"))
    }

    async fn remove_backup(
        &self,
        request: Request<agent::RemoveBackupRequest>,
    ) -> Result<Response<agent::RemoveBackupResponse>, Status> {
        let request = request.into_inner();
        self.command("RemoveBackup", request.context, |_| Ok(()))?;
        // All hosts see its files.
        for host in self.fabric.lock().hosts.values_mut() {
            host.storage.backups.remove(&request.backup_uid);
        }
        Ok(Response::new(agent::RemoveBackupResponse {}))
    }
}
