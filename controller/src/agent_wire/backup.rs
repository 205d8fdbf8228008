//! What agents say of backups.

use dalgu_proto::{agent::v1 as agent, time, v1};

use crate::model::{BackupFile, BackupMade, BackupStanding, Code, Fault};

fn file(wire: v1::BackupFile) -> Option<BackupFile> {
    Some(BackupFile {
        disk: wire.disk,
        file: wire.file,
        size_bytes: wire.size_bytes,
        stored_bytes: wire.stored_bytes,
        virtual_size_bytes: wire.virtual_size_bytes,
        sha256: wire.sha256.parse().ok()?,
    })
}

/// How a backup stands on its host. What makes no sense says nothing.
pub fn standing(wire: agent::BackupReport) -> BackupStanding {
    match wire.phase() {
        agent::BackupPhase::Unspecified => BackupStanding::Unknown,
        agent::BackupPhase::Waiting => BackupStanding::Waiting,
        agent::BackupPhase::Running => BackupStanding::Running(wire.bytes_done, wire.bytes_total),
        agent::BackupPhase::Ready => {
            let parent = Some(wire.parent_uid).filter(|uid| !uid.is_empty());
            let parent = parent.map(|uid| uid.parse()).transpose();
            let files: Option<Vec<_>> = wire.files.into_iter().map(file).collect();
            let (Ok(parent), Some(files)) = (parent, files) else {
                return BackupStanding::Waiting;
            };
            BackupStanding::Ready(Box::new(BackupMade {
                parent,
                full_reason: wire.full_reason,
                quiesced: wire.quiesced,
                checkpoint: wire.checkpoint,
                files,
                point_time: wire.point_time.as_ref().and_then(time::from_wire),
            }))
        }
        agent::BackupPhase::Failed => {
            let error = wire.error.unwrap_or_default();
            BackupStanding::Failed(Fault::new(Code::Aborted, &error.reason, error.message))
        }
    }
}
