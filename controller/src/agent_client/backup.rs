//! Commands about backups. Called by `backups::runner`.

use dalgu_proto::{
    agent::v1::{self as agent, agent_backup_service_client::AgentBackupServiceClient},
    ids::HostName,
    tls::client::Caller,
    v1,
};

use super::{Agents, Error, call};
use crate::{
    agent_wire::backup::standing,
    model::{BackupKind, BackupRecord, BackupStanding},
    state::State,
};

type Client = AgentBackupServiceClient<Caller>;

impl Agents {
    fn backups(
        &self,
        state: &State,
        host: &HostName,
    ) -> Result<(Client, Option<agent::CommandContext>), Error> {
        let (caller, context) = self.reach(state, host)?;
        Ok((Client::new(caller), context))
    }

    /// Tells a host to take a backup.
    pub async fn start_backup(
        &self,
        state: &State,
        host: &HostName,
        backup: &BackupRecord,
    ) -> Result<BackupStanding, Error> {
        let (mut client, context) = self.backups(state, host)?;
        let request = agent::StartBackupRequest {
            context,
            backup_uid: backup.id.to_string(),
            vm_uid: backup.vm.to_string(),
            vm_name: backup.vm_name.to_string(),
            spec: Some(backup.spec.clone().into()),
            pool: backup.pool.clone(),
            kind: match backup.kind {
                BackupKind::Auto => v1::BackupKind::Auto,
                BackupKind::Full => v1::BackupKind::Full,
                BackupKind::Incremental => v1::BackupKind::Incremental,
            }
            .into(),
            parent_uid: backup.parent.map(|parent| parent.to_string()).unwrap_or_default(),
        };
        let report = call(host, "StartBackup", client.start_backup(request)).await?;
        Ok(standing(report))
    }

    /// Asks a host how a backup stands.
    pub async fn backup(
        &self,
        state: &State,
        host: &HostName,
        backup: &BackupRecord,
    ) -> Result<BackupStanding, Error> {
        let (mut client, context) = self.backups(state, host)?;
        let request = agent::GetBackupRequest {
            context,
            backup_uid: backup.id.to_string(),
            pool: backup.pool.clone(),
        };
        let report = call(host, "GetBackup", client.get_backup(request)).await?;
        Ok(standing(report))
    }

    /// Tells a host to remove a backup.
    pub async fn remove_backup(
        &self,
        state: &State,
        host: &HostName,
        backup: &BackupRecord,
    ) -> Result<(), Error> {
        let (mut client, context) = self.backups(state, host)?;
        let request = agent::RemoveBackupRequest {
            context,
            backup_uid: backup.id.to_string(),
            pool: backup.pool.clone(),
            vm_uid: backup.vm.to_string(),
        };
        call(host, "RemoveBackup", client.remove_backup(request)).await?;
        Ok(())
    }
}
