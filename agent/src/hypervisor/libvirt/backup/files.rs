//! The files of backups: `{pool}/backups/{uid}/{disk}.{qcow2|raw}` and `manifest.json`, and disks that are made from them. Called
//! by the hypervisor on its own threads; may block for as long as a file system hangs.
//!
//! A backup is made in a directory whose name ends in `.partial`, verified, made durable, and renamed: what has its final name
//! is whole. An incremental file names its parent's by a relative path, for people and their tools; here the manifest is believed.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
};

use dalgu_proto::{
    ids::BackupId,
    image::Digest,
    vm::{BackupRef, Disk, DiskFormat},
};
use nix::{
    sys::statvfs::statvfs,
    unistd::{getegid, geteuid},
};
use ring::digest;
use tokio::time::Instant;

use super::{
    super::storage::{Pool, Storage, failed, new_file, of_disk},
    Source,
};
use crate::{
    hypervisor::{
        Error,
        backup::{BackupFile, MANIFEST_VERSION, Manifest, Order},
    },
    image::{
        self, Format,
        content::{self, Layer},
    },
    images,
    qemu_img::QemuImg,
};

const MANIFEST: &str = "manifest.json";
/// In the directory of a backup that another needs: a file with this and the other's id as its name.
const CHILD: &str = "child-";
/// Largest manifest that is read.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Longest chain that is followed, of backups and of the files of a disk.
const MAX_CHAIN: usize = 64;
/// Bytes that are left free in a pool.
const RESERVE_BYTES: u64 = 64 << 20;
/// Bytes that are hashed at a time.
const PIECE: usize = 1 << 20;

/// A file that a disk is copied to.
pub(in super::super) struct Target {
    disk: String,
    file: String,
    pub(super) path: PathBuf,
    virtual_size_bytes: u64,
}

#[cfg(test)]
impl Target {
    pub(super) fn of_test(disk: &str, path: &str) -> Self {
        Self {
            disk: disk.into(),
            file: String::new(),
            path: path.into(),
            virtual_size_bytes: 0,
        }
    }
}

fn home(pool: &Pool) -> PathBuf {
    pool.path.join("backups")
}

fn whole(pool: &Pool, id: BackupId) -> PathBuf {
    home(pool).join(id.to_string())
}

fn partial(pool: &Pool, id: BackupId) -> PathBuf {
    home(pool).join(super::partial_name(id))
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A backup that is there and needs this one.
fn child(pool: &Pool, id: BackupId) -> Option<BackupId> {
    let entries = fs::read_dir(whole(pool, id)).into_iter().flatten().flatten();
    let mut children = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix(CHILD)?.parse::<BackupId>().ok()
    });
    children.find(|child| whole(pool, *child).is_dir())
}

/// Makes the empty directory that a backup is made in. QEMU must be able to reach the files in it by their names.
fn prepare(pool: &Pool, id: BackupId) -> Result<PathBuf, Error> {
    pool.is_there()?;
    let dir = partial(pool, id);
    let make = || {
        remove_tree(&dir)?;
        DirBuilder::new().recursive(true).mode(0o711).create(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
        sync_dir(&home(pool))
    };
    make().map_err(|error| failed(pool, error))?;
    Ok(dir)
}

/// Refuses a backup that a pool has no room for.
fn check_room(pool: &Pool, needed: u64) -> Result<(), Error> {
    let room = statvfs(&pool.path).map_err(|error| failed(pool, error))?;
    let free = room.blocks_available().saturating_mul(room.fragment_size());
    if needed.saturating_add(RESERVE_BYTES) <= free {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let detail = format!(
        "the backup may take {} MiB, and {} MiB are free, of which {} stay so",
        mib(needed),
        mib(free),
        mib(RESERVE_BYTES)
    );
    Err(failed(pool, detail))
}

fn hash(file: &mut File) -> io::Result<Digest> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut piece = vec![0; PIECE];
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            break;
        }
        context.update(&piece[..read]);
    }
    let bytes = context.finish();
    let bytes = bytes.as_ref().first_chunk::<32>();
    bytes
        .map(Digest::from_bytes)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = new_file(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

impl Storage {
    /// A backup that is whole.
    pub(in super::super) fn manifest(&self, pool: &str, id: BackupId) -> Result<Option<Manifest>, Error> {
        let pool = self.pool(pool)?;
        pool.is_there()?;
        let path = whole(pool, id).join(MANIFEST);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|error| failed(pool, format!("{}: {error}", path.display())))?,
        };
        let manifest: Manifest = serde_json::from_slice(&bytes)
            .map_err(|error| failed(pool, format!("{}: {error}", path.display())))?;
        if manifest.version != MANIFEST_VERSION || manifest.backup != id {
            let detail = format!(
                "{}: not a manifest of this backup that this version knows",
                path.display()
            );
            return Err(failed(pool, detail));
        }
        Ok(Some(manifest))
    }

    /// Removes what is there of a backup. What is interrupted in it has no final name any more.
    pub(in super::super) fn discard(&self, pool: &str, id: BackupId) -> Result<(), Error> {
        let pool = self.pool(pool)?;
        pool.is_there()?;
        if let Some(child) = child(pool, id) {
            // A store that was restored may not know of it.
            let detail = format!("backup {id} is needed by backup {child}, and stays");
            return Err(failed(pool, detail));
        }
        let (whole, partial) = (whole(pool, id), partial(pool, id));
        let discard = || {
            remove_tree(&partial)?;
            match fs::rename(&whole, &partial) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
            sync_dir(&home(pool))?;
            remove_tree(&partial)
        };
        discard().map_err(|error| failed(pool, error))
    }

    /// Makes the empty files that QEMU copies to; over the parent's where there is one.
    pub(super) async fn targets(
        &self,
        order: &Order,
        sources: &[Source],
        parent: Option<&Manifest>,
        deadline: Instant,
    ) -> Result<Vec<Target>, Error> {
        let pool = self.pool(&order.pool)?;
        if parent.is_none() {
            check_room(pool, self.allocated(pool, sources)?)?;
        } else {
            check_room(pool, 0)?;
        }
        let dir = prepare(pool, order.id)?;
        let mut targets = Vec::new();
        for source in sources {
            let name = format!("{}.qcow2", source.name);
            let path = dir.join(&name);
            let file = new_file(&path).map_err(|error| failed(pool, error))?;
            let qemu_img = QemuImg::new(&file, source.size, deadline).map_err(|error| failed(pool, error))?;
            let before = parent.and_then(|parent| Some((parent.backup, &parent.file(&source.name)?.file)));
            let made = match before {
                Some((parent, before)) => {
                    let behind = PathBuf::from(format!("../{parent}/{before}"));
                    qemu_img
                        .create_overlay(&behind, DiskFormat::Qcow2, source.size)
                        .await
                }
                None => qemu_img.create(DiskFormat::Qcow2, source.size).await,
            };
            made.map_err(|error| of_disk(error, pool))?;
            self.hand_over(&file).map_err(|error| failed(pool, error))?;
            targets.push(Target {
                disk: source.name.clone(),
                file: name,
                path,
                virtual_size_bytes: source.size,
            });
        }
        Ok(targets)
    }

    /// Bytes that the files of disks take, with those behind them.
    fn allocated(&self, pool: &Pool, sources: &[Source]) -> Result<u64, Error> {
        let mut bytes = 0_u64;
        for source in sources {
            for (file, _) in self.files_of(pool, source)? {
                let metadata = file.metadata().map_err(|error| failed(pool, error))?;
                bytes = bytes.saturating_add(metadata.blocks() * 512);
            }
        }
        Ok(bytes)
    }

    /// The files of a disk, the top one first. What is behind it must be where Dalgu keeps such files.
    fn files_of(&self, pool: &Pool, source: &Source) -> Result<Vec<(File, DiskFormat)>, Error> {
        let mut files = Vec::new();
        let mut next = Some((source.file.clone(), source.format));
        while let Some((path, format)) = next.take() {
            let beside = path.parent() == source.file.parent() || path.parent() == Some(&*self.store);
            if !beside || files.len() == MAX_CHAIN {
                let detail = format!(
                    "{} is behind disk {}, and not Dalgu's",
                    path.display(),
                    source.name
                );
                return Err(failed(pool, detail));
            }
            let opened = File::open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::Missing {
                    what: "disk",
                    path: path.clone(),
                },
                _ => failed(pool, format!("{}: {error}", path.display())),
            })?;
            if format == DiskFormat::Qcow2 {
                let behind = crate::image::behind(&opened).map_err(|error| failed(pool, error))?;
                next = behind.and_then(|behind| behind.backing).map(|path| {
                    let raw = path.extension().is_some_and(|extension| extension == "raw");
                    (path, if raw { DiskFormat::Raw } else { DiskFormat::Qcow2 })
                });
            }
            files.push((opened, format));
        }
        Ok(files)
    }

    /// Copies what a guest would read of disks that nobody writes to.
    pub(super) fn copy_disks(&self, order: &Order, sources: &[Source]) -> Result<Vec<Target>, Error> {
        let pool = self.pool(&order.pool)?;
        check_room(pool, self.allocated(pool, sources)?)?;
        let dir = prepare(pool, order.id)?;
        let mut targets = Vec::new();
        for source in sources {
            let files = self.files_of(pool, source)?;
            let top = files.first().map(|(file, _)| file.try_clone()).transpose();
            let top = top.map_err(|error| failed(pool, error))?;
            let before = top.as_ref().map(images::state).transpose();
            let before = before.map_err(|error| failed(pool, error))?;
            let name = format!("{}.raw", source.name);
            let path = dir.join(&name);
            let target = new_file(&path).map_err(|error| failed(pool, error))?;
            let read = |error: io::Error| failed(pool, format!("disk {}: {error}", source.name));
            let layers = files.into_iter().map(|(file, format)| Layer::open(file, format));
            let mut layers = layers.collect::<io::Result<Vec<_>>>().map_err(read)?;
            let size = content::copy(&mut layers, &target, |_| {}).map_err(read)?;
            let after = top.as_ref().map(images::state).transpose();
            if after.map_err(|error| failed(pool, error))? != before {
                let detail = "it was started while its disks were copied: back it up again".to_owned();
                return Err(Error::WrongState { id: order.vm, detail });
            }
            targets.push(Target {
                disk: source.name.clone(),
                file: name,
                path,
                virtual_size_bytes: size,
            });
        }
        Ok(targets)
    }

    /// Makes what was copied durable, says what it is, and gives it its name.
    pub(super) fn publish(
        &self,
        pool: &str,
        mut manifest: Manifest,
        targets: &[Target],
    ) -> Result<Manifest, Error> {
        let pool = self.pool(pool)?;
        let id = manifest.backup;
        let dir = partial(pool, id);
        let take = |target: &Target| {
            let mut file = File::open(&target.path)?;
            fchown(&file, Some(geteuid().as_raw()), Some(getegid().as_raw()))?;
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            file.sync_all()?;
            let metadata = file.metadata()?;
            Ok(BackupFile {
                disk: target.disk.clone(),
                file: target.file.clone(),
                size_bytes: metadata.len(),
                stored_bytes: metadata.blocks() * 512,
                virtual_size_bytes: target.virtual_size_bytes,
                sha256: hash(&mut file)?,
            })
        };
        let mut publish = || {
            manifest.files = targets.iter().map(take).collect::<io::Result<_>>()?;
            let text = serde_json::to_vec_pretty(&manifest).map_err(io::Error::other)?;
            write_durably(&dir.join(MANIFEST), &text)?;
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
            sync_dir(&dir)?;
            if let Some(parent) = manifest.parent() {
                let parent = whole(pool, parent);
                File::create(parent.join(format!("{CHILD}{id}")))?;
                sync_dir(&parent)?;
            }
            fs::rename(&dir, whole(pool, id))?;
            sync_dir(&home(pool))
        };
        publish().map_err(|error: io::Error| failed(pool, error))?;
        Ok(manifest)
    }

    /// The files of a disk in a backup and in those that it needs, the top one first, each verified to be what was kept.
    fn verified(&self, pool: &Pool, backup: &BackupRef) -> Result<Vec<Layer>, Error> {
        let mut layers = Vec::new();
        let mut next = Some(backup.id);
        while let Some(id) = next.take() {
            let path = whole(pool, id);
            let manifest = self.manifest(&pool.name, id)?.ok_or_else(|| Error::Missing {
                what: "backup",
                path: path.clone(),
            })?;
            let Some(kept) = manifest.file(&backup.disk).filter(|_| layers.len() < MAX_CHAIN) else {
                let detail = format!("backup {id} has no disk {} that could be read", backup.disk);
                return Err(Error::Invalid { detail });
            };
            let mut file = image::open(&path, &kept.file)
                .map_err(|refusal| failed(pool, format!("{} of backup {id}: {refusal}", kept.file)))?;
            let path = path.join(&kept.file);
            let read = |error: io::Error| failed(pool, format!("{}: {error}", path.display()));
            if hash(&mut file).map_err(read)? != kept.sha256 {
                let detail = format!(
                    "{} is damaged: its SHA-256 is not the one in the manifest",
                    path.display()
                );
                return Err(Error::Invalid { detail });
            }
            let raw = path.extension().is_some_and(|extension| extension == "raw");
            let format = if raw { DiskFormat::Raw } else { DiskFormat::Qcow2 };
            layers.push(Layer::open(file, format).map_err(read)?);
            next = manifest.parent();
        }
        Ok(layers)
    }

    /// Fills a disk's empty file with what a backup has of it.
    pub(in super::super) async fn restore(
        &self,
        disk: &Disk,
        backup: &BackupRef,
        (partial, file): (&Path, &File),
        qemu_img: &QemuImg<'_>,
    ) -> Result<(), Error> {
        let (pool, from) = (self.pool(&disk.pool)?, self.pool(&backup.pool)?);
        let mut layers = self.verified(from, backup)?;
        let here = |error: io::Error| failed(pool, format!("disk {}: {error}", disk.name));
        if disk.format == DiskFormat::Raw {
            content::copy(&mut layers, file, |_| {}).map_err(here)?;
            return file.set_len(disk.size_mib << 20).map_err(here);
        }
        let plain = partial.with_extension("restoring");
        let _ = fs::remove_file(&plain);
        let raw = new_file(&plain).map_err(here)?;
        // It is read by its descriptor alone, and goes when that is closed.
        fs::remove_file(&plain).map_err(here)?;
        let size = content::copy(&mut layers, &raw, |_| {}).map_err(here)?;
        qemu_img.give(&raw).map_err(here)?;
        let converted = qemu_img.convert(&raw, Format::Raw, disk.format).await;
        converted.map_err(|error| of_disk(error, pool))?;
        if size < disk.size_mib << 20 {
            let grown = qemu_img.resize(disk.format, disk.size_mib << 20).await;
            grown.map_err(|error| of_disk(error, pool))?;
        }
        Ok(())
    }
}
