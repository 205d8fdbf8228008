//! `dalgu.v1.BackupService`. What is peculiar to schedules is in [`schedule`].

mod schedule;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
};

use dalgu_proto::{
    ids::{self, BackupId, HostName, NetworkName, ScheduleName, VmName},
    reason,
    v1::{self, backup_service_server::BackupService},
};
use tonic::{Request, Response, Status};

use super::{Services, page::Page, request, wire};
use crate::{
    model::{BackupKind, BackupRecord, Outcome},
    verbs::{
        self, Caller, Error,
        backup::{self, CreateBackup, Restore},
    },
};

const MAX_DESCRIPTION: usize = 1024;

fn parsed<T: std::str::FromStr<Err = ids::Error>>(field: &str, value: &str) -> Result<T, Status> {
    value
        .parse()
        .map_err(|error: ids::Error| reason::invalid(field, error.to_string()))
}

fn optional<T: std::str::FromStr<Err = ids::Error>>(field: &str, value: &str) -> Result<Option<T>, Status> {
    match value {
        "" => Ok(None),
        value => parsed(field, value).map(Some),
    }
}

fn pool(field: &str, value: &str) -> Result<String, Status> {
    ids::check_device_name(value).map_err(|error| reason::invalid(field, error.to_string()))?;
    Ok(value.to_owned())
}

fn pools(wire: &HashMap<String, String>) -> Result<BTreeMap<String, String>, Status> {
    let pools = wire
        .iter()
        .map(|(disk, name)| Ok((disk.clone(), pool("pools", name)?)));
    pools.collect()
}

fn networks(wire: &HashMap<String, String>) -> Result<BTreeMap<String, Option<NetworkName>>, Status> {
    let networks = wire
        .iter()
        .map(|(nic, name)| Ok((nic.clone(), optional("networks", name)?)));
    networks.collect()
}

fn create(m: &v1::CreateBackupRequest) -> Result<CreateBackup, Status> {
    let kind = match v1::BackupKind::try_from(m.kind) {
        Ok(v1::BackupKind::Unspecified | v1::BackupKind::Auto) => BackupKind::Auto,
        Ok(v1::BackupKind::Full) => BackupKind::Full,
        Ok(v1::BackupKind::Incremental) => BackupKind::Incremental,
        Err(_) => return Err(reason::invalid("kind", "is not a value of BackupKind")),
    };
    Ok(CreateBackup {
        pool: pool("pool", &m.pool)?,
        kind,
        labels: request::labels("labels", &m.labels)?,
        description: request::text("description", m.description.clone(), MAX_DESCRIPTION)?,
        schedule: None,
    })
}

impl Services {
    /// Does a verb once, and answers with its backup.
    async fn backup(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut crate::state::Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Result<Response<v1::Backup>, Status> {
        let outcome = self
            .db
            .transact(|tx| verbs::once(tx, &caller, |tx| change(tx, &caller)))
            .await?;
        let Outcome::Backup(id) = outcome else {
            return Err(Error::RequestReused(caller.request_id).into());
        };
        let state = self.db.snapshot();
        // A repeated request may find it gone.
        Ok(Response::new(wire::backup(&state, &backup::get(&state, id)?)))
    }
}

#[tonic::async_trait]
impl BackupService for Services {
    async fn get_backup(
        &self,
        request: Request<v1::GetBackupRequest>,
    ) -> Result<Response<v1::Backup>, Status> {
        let id: BackupId = parsed("uid", &request.get_ref().uid)?;
        let state = self.db.snapshot();
        Ok(Response::new(wire::backup(&state, &backup::get(&state, id)?)))
    }

    async fn list_backups(
        &self,
        request: Request<v1::ListBackupsRequest>,
    ) -> Result<Response<v1::ListBackupsResponse>, Status> {
        let m = request.into_inner();
        let selector = request::labels("label_selector", &m.label_selector)?;
        let vm: Option<VmName> = optional("vm", &m.vm)?;
        let schedule: Option<ScheduleName> = optional("schedule", &m.schedule)?;
        let list = format!("backups {vm:?} {schedule:?} {selector:?}");
        let page = Page::of(m.page_size, &m.page_token, &list)?;
        let from = match &page.after {
            Some(id) => Bound::Excluded(parsed::<BackupId>("page_token", id)?),
            None => Bound::Unbounded,
        };
        let state = self.db.snapshot();
        let found = state
            .backups
            .range((from, Bound::Unbounded))
            .map(|(_, one)| one.as_ref());
        let wanted = |one: &&BackupRecord| {
            vm.as_ref().is_none_or(|vm| one.vm_name == *vm)
                && (schedule.is_none() || one.schedule == schedule)
                && crate::model::matches(&one.labels, &selector)
        };
        let (backups, next_page_token) = page.take(found.filter(wanted), |one| one.id.to_string());
        Ok(Response::new(v1::ListBackupsResponse {
            backups: backups.into_iter().map(|one| wire::backup(&state, one)).collect(),
            next_page_token,
            resource_version: state.meta.revision,
        }))
    }

    async fn create_backup(
        &self,
        request: Request<v1::CreateBackupRequest>,
    ) -> Result<Response<v1::Backup>, Status> {
        let m = request.get_ref();
        let vm: VmName = parsed("vm", &m.vm)?;
        let new = create(m)?;
        let caller = request::caller(&request, &m.request_id, &format!("CreateBackup {vm} {new:?}"))?;
        self.backup(caller, |tx, caller| backup::create(tx, caller, vm.as_str(), new))
            .await
    }

    async fn delete_backup(
        &self,
        request: Request<v1::DeleteBackupRequest>,
    ) -> Result<Response<v1::DeleteBackupResponse>, Status> {
        let m = request.get_ref();
        let id: BackupId = parsed("uid", &m.uid)?;
        let content = format!("DeleteBackup {id} {:?} {}", m.etag, m.with_children);
        let caller = request::caller(&request, &m.request_id, &content)?;
        self.db
            .transact(|tx| {
                verbs::once(tx, &caller, |tx| {
                    backup::delete(tx, &caller, id, &m.etag, m.with_children)
                })
            })
            .await?;
        Ok(Response::new(v1::DeleteBackupResponse {}))
    }

    async fn restore_backup(
        &self,
        request: Request<v1::RestoreBackupRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let m = request.get_ref();
        let id: BackupId = parsed("uid", &m.uid)?;
        let host: Option<HostName> = optional("host", &m.host)?;
        let ask = Restore {
            name: parsed("name", &m.name)?,
            host,
            stopped: m.stopped,
            keep_addresses: m.keep_addresses,
            labels: request::labels("labels", &m.labels)?,
            without_placement_groups: m.without_placement_groups,
            pools: pools(&m.pools)?,
            networks: networks(&m.networks)?,
            ignore_protection: m.ignore_protection,
            policy: self.config.placement.policy(),
        };
        let caller = request::caller(&request, &m.request_id, &format!("RestoreBackup {id} {ask:?}"))?;
        self.operation(caller, |tx, caller| backup::restore(tx, caller, id, ask))
            .await
    }

    async fn get_backup_schedule(
        &self,
        request: Request<v1::GetBackupScheduleRequest>,
    ) -> Result<Response<v1::BackupSchedule>, Status> {
        schedule::get(self, &request.get_ref().name)
    }

    async fn list_backup_schedules(
        &self,
        request: Request<v1::ListBackupSchedulesRequest>,
    ) -> Result<Response<v1::ListBackupSchedulesResponse>, Status> {
        schedule::list(self, &request.into_inner())
    }

    async fn create_backup_schedule(
        &self,
        request: Request<v1::CreateBackupScheduleRequest>,
    ) -> Result<Response<v1::BackupSchedule>, Status> {
        schedule::create(self, &request).await
    }

    async fn update_backup_schedule(
        &self,
        request: Request<v1::UpdateBackupScheduleRequest>,
    ) -> Result<Response<v1::BackupSchedule>, Status> {
        schedule::update(self, &request).await
    }

    async fn delete_backup_schedule(
        &self,
        request: Request<v1::DeleteBackupScheduleRequest>,
    ) -> Result<Response<v1::DeleteBackupScheduleResponse>, Status> {
        schedule::delete(self, &request).await
    }
}
