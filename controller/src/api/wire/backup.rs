//! Backups and their schedules for operators.

use dalgu_proto::{time, v1};

use super::{drain, etag};
use crate::{
    backups::plan,
    model::{BackupFile, BackupKind, BackupRecord, BackupState, ScheduleRecord},
    state::State,
};

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// A backup.
pub fn backup(state: &State, backup: &BackupRecord) -> v1::Backup {
    let (bytes_done, bytes_total) = state.backup_progress.get(&backup.id).copied().unwrap_or((0, 0));
    let file = |file: &BackupFile| v1::BackupFile {
        disk: file.disk.clone(),
        file: file.file.clone(),
        size_bytes: file.size_bytes,
        stored_bytes: file.stored_bytes,
        virtual_size_bytes: file.virtual_size_bytes,
        sha256: file.sha256.to_string(),
    };
    v1::Backup {
        uid: backup.id.to_string(),
        vm: backup.vm_name.to_string(),
        vm_uid: backup.vm.to_string(),
        spec: Some(backup.spec.clone().into()),
        pool: backup.pool.clone(),
        host: backup.host.to_string(),
        kind: match backup.kind {
            BackupKind::Auto => v1::BackupKind::Auto,
            BackupKind::Full => v1::BackupKind::Full,
            BackupKind::Incremental => v1::BackupKind::Incremental,
        }
        .into(),
        parent: text(backup.parent),
        state: match backup.state {
            BackupState::Pending => v1::BackupState::Pending,
            BackupState::Running => v1::BackupState::Running,
            BackupState::Available => v1::BackupState::Available,
            BackupState::Failed => v1::BackupState::Failed,
            BackupState::Deleting => v1::BackupState::Deleting,
        }
        .into(),
        quiesced: backup.quiesced,
        stored_bytes: backup.stored_bytes(),
        files: backup.files.iter().map(file).collect(),
        full_reason: backup.full_reason.clone(),
        bytes_done,
        bytes_total,
        create_time: Some(time::to_wire(backup.create_time)),
        point_time: backup.point_time.map(time::to_wire),
        complete_time: backup.complete_time.map(time::to_wire),
        labels: backup.labels.clone().into_iter().collect(),
        description: backup.description.clone(),
        schedule: text(backup.schedule.as_ref()),
        error: backup.error.as_ref().map(|fault| v1::VmError {
            reason: fault.reason.clone(),
            message: fault.message.clone(),
            retrying: false,
            time: backup.complete_time.map(time::to_wire),
        }),
        etag: etag(backup.revision),
        vm_labels: backup.traits.labels.clone().into_iter().collect(),
        vm_drain_mode: drain::mode(backup.traits.drain_mode).into(),
        vm_placement_groups: backup
            .traits
            .placement_groups
            .iter()
            .map(ToString::to_string)
            .collect(),
        vm_tolerations: backup
            .traits
            .tolerations
            .iter()
            .cloned()
            .map(Into::into)
            .collect(),
    }
}

/// A schedule, without what follows from the VMs and their backups.
pub fn schedule_fields(schedule: &ScheduleRecord) -> v1::BackupSchedule {
    v1::BackupSchedule {
        name: schedule.name.to_string(),
        label_selector: schedule.selector.clone().into_iter().collect(),
        pool: schedule.pool.clone(),
        every: Some(time::duration_to_wire(schedule.every())),
        at: text(schedule.at),
        incrementals: schedule.incrementals,
        keep_last: schedule.keep_last,
        keep_days: schedule.keep_days,
        paused: schedule.paused,
        description: schedule.description.clone(),
        etag: etag(schedule.revision),
        create_time: Some(time::to_wire(schedule.create_time)),
        ..Default::default()
    }
}

/// A schedule.
pub fn schedule(state: &State, schedule: &ScheduleRecord) -> v1::BackupSchedule {
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let taken = state
        .backups
        .values()
        .filter(|backup| backup.schedule.as_ref() == Some(&schedule.name));
    let next = plan::selected(state, schedule).map(|vm| plan::next_time(state, schedule, vm));
    v1::BackupSchedule {
        last_time: taken.map(|backup| backup.create_time).max().map(time::to_wire),
        next_time: next.filter(|_| !schedule.paused).min().map(time::to_wire),
        vms: number(plan::selected(state, schedule).count()),
        failures: number(plan::failures(state, schedule)),
        ..schedule_fields(schedule)
    }
}
