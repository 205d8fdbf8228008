//! What the files of a pool are, by where they are. Pure; used by the trait and by both hypervisors.
//!
//! ```text
//!   {vm uuid}/{disk}.{qcow2|raw}      {vm uuid}/{disk}.{layer}.qcow2      the disks of a VM, and their layers
//!   volumes/{volume uuid}.{qcow2|raw}     volumes/{volume uuid}.{layer}.qcow2   volumes of the site, and their layers
//!   backups/{backup uuid}/...                                             backups
//! ```
//!
//! What ends in `.partial`, or is in a directory that does, is being made or was left half-made. Whatever else is in a pool is
//! somebody else's.

use dalgu_proto::ids::{BackupId, VmId, VolumeId};

/// Most files that are told of one pool.
pub const MOST: usize = 10_000;

const PARTIAL: &str = ".partial";

/// A file of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFile {
    /// Where it is below the pool's directory; ends in `/` for a directory that holds nothing.
    pub path: String,
    /// What it belongs to.
    pub of: Of,
    /// It is not whole.
    pub partial: bool,
    /// Its size.
    pub size_bytes: u64,
    /// Room that it takes.
    pub allocated_bytes: u64,
}

/// What a file belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Of {
    /// It is a part of a volume of the site.
    Volume {
        /// The volume.
        id: VolumeId,
        /// Number of the layer; `None` for the base.
        layer: Option<u32>,
    },
    /// It is a part of a backup.
    Backup(BackupId),
    /// It is in the folder of a VM.
    Disk {
        /// The VM.
        vm: VmId,
        /// Name of the disk; empty where it is none.
        disk: String,
        /// Number of the layer; `None` for the base.
        layer: Option<u32>,
    },
    /// It is where Dalgu keeps such things, and is none.
    Unknown,
}

/// The part of a file's name before its format.
fn stem(name: &str) -> Option<&str> {
    name.strip_suffix(".qcow2").or_else(|| name.strip_suffix(".raw"))
}

/// A disk, and the number of the layer, by the part of a file's name before its format.
pub(super) fn layered(base: &str) -> (&str, Option<u32>) {
    let layered = base.rsplit_once('.').and_then(|(disk, digits)| {
        let number: u32 = digits.parse().ok()?;
        (number > 0 && digits == number.to_string()).then_some((disk, number))
    });
    match layered {
        Some((disk, number)) => (disk, Some(number)),
        None => (base, None),
    }
}

fn disk(vm: VmId, name: &str) -> Of {
    let (disk, layer) = layered(stem(name).unwrap_or_default());
    Of::Disk {
        vm,
        disk: disk.to_owned(),
        layer,
    }
}

/// What the file `name` of the folder `folder` is, and whether it is whole; `None` where the folder is not Dalgu's.
pub fn of(folder: &str, name: &str) -> Option<(Of, bool)> {
    let whole = name.strip_suffix(PARTIAL);
    let partial = whole.is_some();
    let name = whole.unwrap_or(name);
    match folder {
        "volumes" => {
            let (id, layer) = layered(stem(name).unwrap_or_default());
            let of = id.parse().map_or(Of::Unknown, |id| Of::Volume { id, layer });
            Some((of, partial))
        }
        "backups" => Some((name.parse().map_or(Of::Unknown, Of::Backup), partial)),
        other => Some((disk(other.parse().ok()?, name), partial)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0195d3c8-0000-7000-8000-000000000001";

    #[test]
    fn each_file_is_what_its_place_says_and_others_are_nobodys() {
        let vm = |disk: &str, layer| Of::Disk {
            vm: ID.parse().unwrap(),
            disk: disk.to_owned(),
            layer,
        };
        let volume = |layer| Of::Volume {
            id: ID.parse().unwrap(),
            layer,
        };
        let backup = Of::Backup(ID.parse().unwrap());
        for (folder, name, wanted) in [
            ("volumes", format!("{ID}.qcow2"), (volume(None), false)),
            ("volumes", format!("{ID}.3.qcow2"), (volume(Some(3)), false)),
            (
                "volumes",
                format!("{ID}.3.qcow2.partial"),
                (volume(Some(3)), true),
            ),
            ("volumes", format!("{ID}.raw.partial"), (volume(None), true)),
            ("volumes", "mine.qcow2".to_owned(), (Of::Unknown, false)),
            ("volumes", ID.to_owned(), (Of::Unknown, false)),
            ("backups", ID.to_owned(), (backup.clone(), false)),
            ("backups", format!("{ID}.partial"), (backup, true)),
            ("backups", "old".to_owned(), (Of::Unknown, false)),
            (ID, "root.qcow2".to_owned(), (vm("root", None), false)),
            (ID, "root.raw".to_owned(), (vm("root", None), false)),
            (ID, "root.12.qcow2".to_owned(), (vm("root", Some(12)), false)),
            (ID, "root.qcow2.partial".to_owned(), (vm("root", None), true)),
            (ID, "root.012.qcow2".to_owned(), (vm("root.012", None), false)),
            (ID, "notes.txt".to_owned(), (vm("", None), false)),
        ] {
            assert_eq!(of(folder, &name), Some(wanted), "{folder}/{name}");
        }
        assert_eq!(of("lost+found", "x"), None);
    }
}
