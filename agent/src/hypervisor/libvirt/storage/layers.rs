//! The layers of disks: `{disk}.{number}.qcow2` beside a disk's base (of a volume of the site `{uuid}.{number}.qcow2`), each an
//! overlay on the one below it. Called on workers, with the file that a domain says is a disk's top.
//!
//! ```text
//!   root.qcow2 <── root.1.qcow2 <── root.4.qcow2      the top, to which the guest writes
//!                  since snapshot 1  since snapshot 4
//! ```
//!
//! What a file is on stands in its header, so the files from the top down tell which snapshots there are. A number is never given
//! twice. A layer's file is made, handed over and made durable before any domain hears of it; it goes when no domain has it.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use dalgu_proto::{
    ids::VmId,
    vm::{Disk, DiskFormat},
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use tokio::time::Instant;

use super::{BackingModel, Pool, QemuImg, Storage, failed, folder, new_file, of_disk, remove};
use crate::{
    hypervisor::{Error, files::layered},
    image::{self, Behind},
};

/// Most files of one disk: more than there may be snapshots, so that a ring of files ends.
const MOST: usize = 64;
/// QEMU's locks on a file of a disk are on bytes from 100 on, see its block/file-posix.c.
const LOCKS: (i64, i64) = (100, 200);

/// A file of a disk, from its base to its top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Link {
    pub(in super::super) path: PathBuf,
    pub(in super::super) format: DiskFormat,
    /// Its number; `None` for the base.
    pub(in super::super) layer: Option<u32>,
}

impl Storage {
    fn base(&self, id: VmId, disk: &Disk) -> Result<Link, Error> {
        Ok(Link {
            path: self.path(id, disk)?,
            format: disk.format,
            layer: None,
        })
    }

    /// A layer of a disk.
    fn layer(&self, id: VmId, disk: &Disk, number: u32) -> Result<Link, Error> {
        let name = format!("{}.{number}.qcow2", stem(disk));
        Ok(Link {
            path: self.path(id, disk)?.with_file_name(name),
            format: DiskFormat::Qcow2,
            layer: Some(number),
        })
    }

    /// The files of a disk, from its base to the one that is its top.
    pub(in super::super) fn chain(&self, id: VmId, disk: &Disk, top: &Path) -> Result<Vec<Link>, Error> {
        let pool = self.pool(&disk.pool)?;
        let base = self.base(id, disk)?;
        let strange = |path: &Path| {
            let detail = format!("{} is no file of disk {}", path.display(), disk.name);
            failed(pool, detail)
        };
        let (mut chain, mut at) = (Vec::new(), top.to_owned());
        while at != base.path {
            let number = number_of(&stem(disk), &at).ok_or_else(|| strange(&at))?;
            let link = self.layer(id, disk, number)?;
            if link.path != at || chain.len() == MOST {
                return Err(strange(&at));
            }
            let below = self.behind_file(pool, &at)?.and_then(|behind| behind.backing);
            let below = below.ok_or_else(|| strange(&at))?;
            chain.push(link);
            at = below;
        }
        chain.push(base);
        chain.reverse();
        Ok(chain)
    }

    fn behind_file(&self, pool: &Pool, path: &Path) -> Result<Option<Behind>, Error> {
        let file = File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing {
                what: "disk",
                path: path.to_owned(),
            },
            _ => failed(pool, format!("{}: {error}", path.display())),
        })?;
        image::behind(file).map_err(|error| failed(pool, format!("{}: {error}", path.display())))
    }

    /// The numbers of layers whose files are there.
    pub(in super::super) fn layer_files(&self, id: VmId, disk: &Disk) -> Result<BTreeSet<u32>, Error> {
        let pool = self.pool(&disk.pool)?;
        // Of what is not mounted nothing is known.
        pool.is_there()?;
        let base = self.path(id, disk)?;
        let dir = base.parent().unwrap_or(&pool.path);
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries.map_err(|error| failed(pool, error))?,
        };
        let (stem, mut found) = (stem(disk), BTreeSet::new());
        for entry in entries {
            let path = entry.map_err(|error| failed(pool, error))?.path();
            found.extend(number_of(&stem, &path));
        }
        Ok(found)
    }

    /// The top of a disk of which no domain says it: the newest layer, where that is one of `wanted`.
    pub(in super::super) fn likely_top(
        &self,
        id: VmId,
        disk: &Disk,
        wanted: &BTreeSet<u32>,
    ) -> Result<PathBuf, Error> {
        match self.layer_files(id, disk)?.last() {
            None => self.path(id, disk),
            Some(newest) if wanted.contains(newest) => Ok(self.layer(id, disk, *newest)?.path),
            Some(newest) if disk.volume.is_some() => {
                let base = self.path(id, disk)?;
                let detail = format!(
                    "the volume that is disk {} has a layer {newest}, left of the snapshots of a VM that is gone, and what was written \
                     last is in it: `qemu-img commit -d` the layers beside {}, the one with the highest number first, and remove them",
                    disk.name,
                    base.display()
                );
                Err(failed(self.pool(&disk.pool)?, detail))
            }
            Some(newest) => {
                // It may hold what the guest wrote last, or be left of a snapshot that was deleted.
                let detail = format!(
                    "the definition of the VM is lost, and disk {} has a layer {newest} of which nobody says whether it is \
                     the disk's newest: look at `qemu-img info --backing-chain`, and put the file away if it is not",
                    disk.name
                );
                Err(failed(self.pool(&disk.pool)?, detail))
            }
        }
    }

    /// What is behind the top of a chain, for a domain.
    pub(in super::super) fn behind_chain(&self, disk: &Disk, chain: &[Link]) -> Vec<BackingModel> {
        let below = chain.iter().rev().skip(1).map(|link| BackingModel {
            path: link.path.clone(),
            format: link.format,
            image: false,
        });
        let image = self.behind(disk).map(|path| BackingModel {
            path,
            format: DiskFormat::Qcow2,
            image: true,
        });
        below.chain(image).collect()
    }

    /// Makes a layer on a file of a disk, unless it is there. Answers where it is.
    pub(in super::super) async fn make_layer(
        &self,
        id: VmId,
        disk: &Disk,
        number: u32,
        below: &Link,
        deadline: Instant,
    ) -> Result<PathBuf, Error> {
        let pool = self.pool(&disk.pool)?;
        let link = self.layer(id, disk, number)?;
        let right = Behind {
            virtual_size_bytes: self.size_of(&below.path, below.format)?,
            backing: Some(below.path.clone()),
        };
        if link.path.exists() {
            if self.behind_file(pool, &link.path)?.as_ref() == Some(&right) {
                return Ok(link.path);
            }
            // Made for something else that was not done.
            self.remove_file(pool, &link.path)?;
        }
        let dir = folder(pool, &link.path)?;
        let partial = link.path.with_extension("qcow2.partial");
        let gone = remove(&partial);
        gone.map_err(|error| failed(pool, error))?;
        let file = new_file(&partial).map_err(|error| failed(pool, error))?;
        let size = right.virtual_size_bytes;
        let qemu_img = QemuImg::new(&file, size, deadline).map_err(|error| failed(pool, error))?;
        let made = qemu_img.create_overlay(&below.path, below.format, size).await;
        made.map_err(|error| of_disk(error, pool))?;
        match image::behind(&file).map_err(|error| failed(pool, error))? {
            Some(made) if made == right => {}
            made => {
                let detail = format!("layer {number} was made as {made:?}, not as {right:?}");
                return Err(failed(pool, detail));
            }
        }
        let finished = self.finish(dir, &file, &partial, &link.path);
        finished.map_err(|error| failed(pool, error))?;
        Ok(link.path)
    }

    /// Writes what is in one layer of a disk of a domain that is off to what is below it, and puts what is above it on that.
    pub(in super::super) async fn merge_layer(
        &self,
        disk: &Disk,
        chain: &[Link],
        number: u32,
        deadline: Instant,
    ) -> Result<(), Error> {
        let pool = self.pool(&disk.pool)?;
        let place = chain.iter().position(|link| link.layer == Some(number));
        let Some((place, below)) = place.and_then(|place| Some((place, chain.get(place.checked_sub(1)?)?)))
        else {
            return Ok(());
        };
        let wrong = |error: io::Error| failed(pool, error);
        let open = |link: &Link| OpenOptions::new().read(true).write(true).open(&link.path);
        let (layer, target) = (open(&chain[place]).map_err(wrong)?, open(below).map_err(wrong)?);
        let size = self.size_of(&below.path, below.format)?;
        let qemu_img = QemuImg::new(&target, size, deadline).map_err(wrong)?;
        let overlay = place > 1 || self.behind(disk).is_some();
        let merged = qemu_img.commit(&layer, below.format, overlay).await;
        // Their owner again, also after a failure.
        self.hand_over(&layer).map_err(wrong)?;
        self.hand_over(&target).map_err(wrong)?;
        merged.map_err(|error| of_disk(error, pool))?;
        let Some(above) = chain.get(place + 1) else {
            return Ok(());
        };
        let above = open(above).map_err(wrong)?;
        let qemu_img = QemuImg::new(&above, size, deadline).map_err(wrong)?;
        let moved = qemu_img.rebase(&below.path, below.format).await;
        self.hand_over(&above).map_err(wrong)?;
        moved.map_err(|error| of_disk(error, pool))
    }

    /// Removes the file of a layer that no domain has.
    pub(in super::super) fn remove_layer(&self, id: VmId, disk: &Disk, number: u32) -> Result<(), Error> {
        let path = self.layer(id, disk, number)?.path;
        let pool = self.pool(&disk.pool)?;
        pool.is_there()?;
        remove(&path.with_extension("qcow2.partial")).map_err(|error| failed(pool, error))?;
        self.remove_file(pool, &path)
    }

    /// Whether a QEMU has the file of a layer.
    pub(in super::super) fn layer_in_use(&self, id: VmId, disk: &Disk, number: u32) -> Result<bool, Error> {
        let path = self.layer(id, disk, number)?.path;
        in_use(&path).map_err(|error| Error::Storage {
            pool: disk.pool.clone(),
            detail: format!("{}: {error}", path.display()),
        })
    }

    fn remove_file(&self, pool: &Pool, path: &Path) -> Result<(), Error> {
        if in_use(path).map_err(|error| failed(pool, error))? {
            let detail = format!(
                "{} is in use by a QEMU, although no domain has it",
                path.display()
            );
            return Err(failed(pool, detail));
        }
        remove(path).map_err(|error| failed(pool, error))?;
        let dir = path.parent().unwrap_or(&pool.path);
        match File::open(dir).and_then(|dir| dir.sync_all()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(pool, error)),
            _ => Ok(()),
        }
    }

    /// Space that a file takes, in bytes.
    pub(in super::super) fn space_of(&self, link: &Link) -> u64 {
        // For people only.
        fs::metadata(&link.path).map_or(0, |metadata| metadata.blocks().saturating_mul(512))
    }
}

/// What the names of a disk's files begin with.
fn stem(disk: &Disk) -> Cow<'_, str> {
    match disk.volume_id() {
        Some(volume) => volume.to_string().into(),
        None => disk.name.as_str().into(),
    }
}

/// The number of a layer by the name of its file.
fn number_of(stem: &str, path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?.strip_suffix(".qcow2")?;
    let (disk, number) = layered(name);
    number.filter(|_| disk == stem)
}

/// Removes the files of all layers of a disk.
pub(super) fn remove_all(dir: &Path, stem: &str) -> io::Result<()> {
    let files = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        files => files?,
    };
    for file in files {
        let path = file?.path();
        let whole = match path.extension().is_some_and(|end| end == "partial") {
            true => path.with_extension(""),
            false => path.clone(),
        };
        if number_of(stem, &whole).is_some() {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Whether a QEMU has a file open, by the locks that it has on it.
fn in_use(path: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    let short = |number: i32| i16::try_from(number).unwrap_or_default();
    let mut lock = libc::flock {
        l_type: short(libc::F_WRLCK),
        l_whence: short(libc::SEEK_SET),
        l_start: LOCKS.0,
        l_len: LOCKS.1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != short(libc::F_UNLCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_file_tells_the_number_of_a_layer() {
        let number = |name: &str| number_of("root", &Path::new("/pool/vm").join(name));
        assert_eq!(number("root.1.qcow2"), Some(1));
        assert_eq!(number("root.4294967295.qcow2"), Some(u32::MAX));
        for other in [
            "root.qcow2",
            "root.0.qcow2",
            "root.01.qcow2",
            "root.+1.qcow2",
            "root.1.raw",
            "root.1.qcow2.partial",
            "root2.1.qcow2",
            "data.1.qcow2",
            "root.4294967296.qcow2",
        ] {
            assert_eq!(number(other), None, "{other}");
        }
    }
}
