//! Files of pools, as agents tell them.

use dalgu_proto::agent::v1 as wire;

use crate::model::{FileOf, PoolFile};

/// Reads a file; `None` for one of which a newer agent says what is not known here.
pub fn read(file: wire::PoolFile) -> Option<PoolFile> {
    let of = match (&*file.volume_uid, &*file.backup_uid, &*file.vm_uid) {
        ("", "", "") => FileOf::Unknown,
        (volume, "", "") => FileOf::Volume {
            id: volume.parse().ok()?,
            layer: file.layer,
        },
        ("", backup, "") => FileOf::Backup(backup.parse().ok()?),
        ("", "", vm) => FileOf::Disk {
            vm: vm.parse().ok()?,
            disk: file.disk,
            layer: file.layer,
        },
        _ => return None,
    };
    Some(PoolFile {
        path: file.path,
        of,
        partial: file.partial,
        size_bytes: file.size_bytes,
        allocated_bytes: file.allocated_bytes,
    })
}
