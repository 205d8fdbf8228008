//! Changes of backups and their schedules: their records, and the indices by VM and of those that a host has to do with.

use std::sync::Arc;

use dalgu_proto::ids::{BackupId, ScheduleName};

use super::{Table, Tx, json};
use crate::model::{BackupRecord, EventKind, ScheduleRecord};

impl Tx {
    pub(in crate::state) fn index_backup(&mut self, backup: Arc<BackupRecord>) {
        let (id, open) = (backup.id, backup.state.is_open());
        if open {
            self.state.open_backups.insert(id);
        } else {
            self.state.open_backups.remove(&id);
            self.state.backup_progress.remove(&id);
        }
        self.state.vm_backups.entry(backup.vm).or_default().insert(id);
        self.state.backups.insert(id, backup);
    }

    /// Puts a backup.
    pub fn put_backup(&mut self, mut backup: BackupRecord) {
        backup.revision = self.revision();
        self.write(Table::Backups, backup.id, Some(json(&backup)));
        self.index_backup(Arc::new(backup));
    }

    /// Removes a backup of which nothing is left.
    pub fn delete_backup(&mut self, id: BackupId) {
        let Some(old) = self.state.backups.remove(&id) else {
            return;
        };
        self.state.open_backups.remove(&id);
        self.state.backup_progress.remove(&id);
        if let Some(backups) = self.state.vm_backups.get_mut(&old.vm) {
            backups.remove(&id);
            if backups.is_empty() {
                self.state.vm_backups.remove(&old.vm);
            }
        }
        self.write(Table::Backups, id, None);
    }

    /// Notes how far a backup is. Not stored.
    pub fn note_backup_progress(&mut self, id: BackupId, done: u64, total: u64) {
        self.state.backup_progress.insert(id, (done, total));
    }

    /// Tells of a change of a backup.
    pub fn backup_event(&mut self, backup: &BackupRecord, reason: &str, message: &str) {
        let message = format!("backup {}: {message}", backup.id);
        self.event(EventKind::Vm, reason, &backup.vm_name, message, None);
    }

    pub(in crate::state) fn index_schedule(&mut self, schedule: Arc<ScheduleRecord>) {
        self.state.schedules.insert(schedule.name.clone(), schedule);
    }

    /// Puts a schedule.
    pub fn put_schedule(&mut self, mut schedule: ScheduleRecord) {
        schedule.revision = self.revision();
        self.write(Table::BackupSchedules, &schedule.name, Some(json(&schedule)));
        self.index_schedule(Arc::new(schedule));
    }

    /// Removes a schedule.
    pub fn delete_schedule(&mut self, name: &ScheduleName) {
        self.state.schedules.remove(name);
        self.write(Table::BackupSchedules, name, None);
    }
}
