//! What the pretended hosts do in a pool that all of them see: remove volumes, and take and remove backups, by the contract.

use std::collections::BTreeSet;

use dalgu_proto::{
    agent::v1::{
        self as agent, BackupPhase, agent_backup_service_server::AgentBackupService,
        agent_volume_service_server::AgentVolumeService,
    },
    v1::{BackupKind, GuestFeature, HostInventory, PendingChange, StoragePool},
};
use tonic::{Request, Response, Status};

use super::{agent::Agent, fabric::Vm};

/// The pool that all hosts see.
pub const SHARED: &str = "san";
/// Its size.
pub const SHARED_MIB: u64 = 50 << 10;

/// A second pool of each host's own.
pub const FAST: &str = "fast";

#[derive(Debug, Clone, Default)]
pub struct Storage {
    /// The host has the shared pool, and offers volumes and backups.
    pub offered: bool,
    /// Disks that are to be in another pool are copied, and do not come to an end.
    pub copies_stay: bool,
    /// Backups that it has taken and that are there yet.
    pub backups: BTreeSet<String>,
}

/// The pools that a VM's disks are to be in, by their names.
fn wanted(intent: &agent::VmIntent) -> impl Iterator<Item = (&str, &str)> {
    let disks = intent.spec.iter().flat_map(|spec| &spec.disks);
    disks.map(|disk| (disk.name.as_str(), disk.pool.as_str()))
}

impl Vm {
    /// Has new disks where they are to be, and others too unless copies stay: when its host has said that they move. Whether
    /// anything has come or gone.
    pub fn move_disks(&mut self, copies_stay: bool) -> bool {
        let before = self.places.clone();
        let told = self.observed == self.intent.generation;
        self.places = wanted(&self.intent)
            .map(|(disk, pool)| {
                let there = before.get(disk).filter(|_| copies_stay || !told);
                (disk.to_owned(), there.map_or(pool, String::as_str).to_owned())
            })
            .collect();
        self.places != before
    }

    /// Disks that are still copied.
    pub fn moving(&self) -> Vec<PendingChange> {
        let astray = wanted(&self.intent).filter_map(|(disk, pool)| {
            let there = self.places.get(disk).filter(|there| *there != pool)?;
            Some(PendingChange {
                field: format!("disks[{disk}].pool"),
                current: there.clone(),
                wanted: pool.to_owned(),
                message: String::new(),
            })
        });
        astray.collect()
    }
}

impl Agent {
    pub fn stored(&self, mut inventory: HostInventory) -> HostInventory {
        if self.fabric.lock().hosts[&self.name].storage.offered {
            use GuestFeature::{Backup, DiskChange, HotChange, Volume, VolumeMove};
            let offered = [Volume, Backup, HotChange, DiskChange, VolumeMove];
            inventory.guest_features.extend(offered.map(i32::from));
            let own = inventory.pools.first().cloned();
            inventory.pools.extend(own.map(|own| StoragePool {
                name: FAST.into(),
                path: "/fast".into(),
                ..own
            }));
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
