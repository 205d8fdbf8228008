//! The disks of VMs: files in directory pools, at `{pool}/{vm uuid}/{disk}.{qcow2|raw}`, and on them their [`layers`]; and those that
//! are volumes of the site at `{pool}/volumes/{volume uuid}.{qcow2|raw}`, where no deletion of a VM reaches them. Called by the
//! hypervisor on its own threads.
//!
//! A disk is made under a name that ends in `.partial`, made durable, and renamed: what has its final name is whole.
//! Formats are always said, never guessed: a guest that writes another format's header into its raw disk must not
//! have that believed. A disk is made blank, from a file of the images directory, or from a copy that [`crate::images`] keeps: as
//! a copy of that, or as an overlay which refers to it by its path. Files of the images directory come from people: [`crate::image`] judges one before any other program opens it, `qemu_img`
//! reads the very descriptor that was judged, and what it wrote is checked to be the disk that the image promised. A name is
//! looked up once only.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use dalgu_proto::{
    ids::{VmId, VolumeId},
    image::Digest,
    vm::{CloneMode, Disk, DiskFormat, FirstBoot},
};
use nix::{
    fcntl::OFlag,
    unistd::{User, getegid, geteuid},
};
use tokio::time::Instant;

use super::xml::{BackingModel, Cache};
use crate::{
    first_boot,
    host::storage::check_mounted,
    hypervisor::{Definition, Error},
    image::{self, Behind, Format, Inspected, Refusal},
    images,
    qemu_img::{Failure, QemuImg},
};

/// libvirt's directory for the variables of firmware, made by itself with the rights that QEMU needs.
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";

mod layers;
mod listing;

pub(super) use layers::Link;

/// A directory that holds disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Name that specifications use.
    pub name: String,
    /// The directory.
    pub path: PathBuf,
    /// Whether other hosts see the same directory, at the same path. The operator says so, and that the file system
    /// keeps caches coherent between hosts: libvirt cannot tell for a directory, and a migration then asks it not to.
    pub shared: bool,
    /// Whether it is there only while a file system is mounted at it.
    pub mounted: bool,
}

impl Pool {
    /// That it is there.
    fn check(&self) -> Result<(), Error> {
        match self.mounted {
            true => check_mounted(&self.path).map_err(|error| failed(self, error)),
            false => Ok(()),
        }
    }

    /// That its directory is there, and mounted where it is to be: what is not seen is not gone.
    pub(super) fn is_there(&self) -> Result<(), Error> {
        self.check()?;
        match self.path.is_dir() {
            true => Ok(()),
            false => {
                let detail = format!("{} is not a directory", self.path.display());
                Err(failed(self, detail))
            }
        }
    }
}

/// The pools and images of a host. Everything here may block for as long as a file system hangs.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) pools: Vec<Pool>,
    pub(super) images: PathBuf,
    /// Where the copies of the catalogue's images are.
    pub(super) store: PathBuf,
    /// Where libvirt keeps the variables of firmware.
    pub(super) nvram: PathBuf,
    /// User that QEMU runs as, to whom disks are given.
    pub(super) owner: Option<String>,
    /// How files in a directory are cached, as far as it was found out.
    caches: Mutex<HashMap<PathBuf, Cache>>,
}

/// As the error of a disk in a pool.
pub(super) fn of_disk(failure: Failure, pool: &Pool) -> Error {
    match failure {
        Failure::Here(detail) | Failure::Image(detail) => failed(pool, detail),
        Failure::Late(after) => Error::Timeout {
            call: "qemu-img",
            after,
        },
    }
}

/// As the error of an image that a disk was to be made from.
fn of_image(failure: Failure, pool: &Pool, image: &str) -> Error {
    match failure {
        Failure::Image(detail) => Error::ImageRefused {
            image: image.to_owned(),
            refusal: Refusal::Unconvertible { detail },
        },
        other => of_disk(other, pool),
    }
}

pub(super) fn failed(pool: &Pool, detail: impl ToString) -> Error {
    Error::Storage {
        pool: pool.name.clone(),
        detail: detail.to_string(),
    }
}

impl Storage {
    pub(super) fn new(pools: Vec<Pool>, images: PathBuf, store: PathBuf, owner: Option<String>) -> Self {
        Self {
            pools,
            images,
            store,
            nvram: NVRAM.into(),
            owner,
            caches: Mutex::default(),
        }
    }

    /// The pool of a disk.
    pub(super) fn pool(&self, name: &str) -> Result<&Pool, Error> {
        self.pools
            .iter()
            .find(|pool| pool.name == name)
            .ok_or_else(|| Error::Storage {
                pool: name.to_owned(),
                detail: "this host has no such pool".into(),
            })
    }

    /// The file of a disk.
    pub(super) fn path(&self, id: VmId, disk: &Disk) -> Result<PathBuf, Error> {
        let pool = &self.pool(&disk.pool)?.path;
        let Some(volume) = &disk.volume else {
            let file = format!("{}.{}", disk.name, disk.format.as_str());
            return Ok(pool.join(id.to_string()).join(file));
        };
        let id = volume.id.ok_or_else(|| Error::Invalid {
            detail: format!("disk {} is a volume without an id", disk.name),
        })?;
        Ok(volume_path(pool, id, disk.format))
    }

    /// The pool that a file is in.
    pub(super) fn pool_of(&self, file: &Path) -> Option<&Pool> {
        let holds = |pool: &&Pool| file.starts_with(&pool.path);
        let pools = self.pools.iter().filter(holds);
        pools.max_by_key(|pool| pool.path.components().count())
    }

    /// The variables of a VM's firmware.
    pub(super) fn nvram(&self, id: VmId) -> PathBuf {
        self.nvram.join(format!("{id}_VARS.fd"))
    }

    /// How a disk's writes are cached: past the page cache where the file systems of the disk and of what is behind it allow that.
    pub(super) fn cache(&self, disk: &Disk) -> Result<Cache, Error> {
        let pool = self.pool(&disk.pool)?;
        match (self.cache_in(pool, &pool.path)?, self.behind(disk)) {
            (Cache::None, Some(_)) => self.cache_in(pool, &self.store),
            (cache, _) => Ok(cache),
        }
    }

    fn cache_in(&self, pool: &Pool, dir: &Path) -> Result<Cache, Error> {
        let caches = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let known = caches().get(dir).copied();
        if let Some(cache) = known {
            return Ok(cache);
        }
        let cache = probe_cache(pool, dir)?;
        caches().insert(dir.to_owned(), cache);
        Ok(cache)
    }

    fn copy_of(&self, digest: &Digest) -> PathBuf {
        self.store.join(images::copy_name(digest))
    }

    /// The image that a disk is an overlay on.
    pub(super) fn behind(&self, disk: &Disk) -> Option<PathBuf> {
        let digest = disk.digest.as_ref()?;
        (disk.clone_mode == CloneMode::Overlay).then(|| self.copy_of(digest))
    }

    /// Makes the disks that are not there; see [`crate::hypervisor::Hypervisor::create_volumes`].
    pub(super) async fn create(
        &self,
        definition: &Definition,
        incoming: bool,
        deadline: Instant,
    ) -> Result<(), Error> {
        for disk in &definition.spec.disks {
            let pool = self.pool(&disk.pool)?;
            if incoming && pool.shared {
                continue;
            }
            let path = self.path(definition.id, disk)?;
            if !path.exists() {
                self.create_one(pool, disk, &path, incoming, deadline).await?;
            }
        }
        match &definition.spec.first_boot {
            Some(first_boot) => self.create_medium(definition, first_boot, incoming),
            None => Ok(()),
        }
    }

    /// Makes the volume of the first boot, unless it is there; blank for a migration to fill.
    fn create_medium(
        &self,
        definition: &Definition,
        first_boot: &FirstBoot,
        incoming: bool,
    ) -> Result<(), Error> {
        let medium = &first_boot.medium;
        let pool = self.pool(&medium.pool)?;
        let path = self.path(definition.id, medium)?;
        if path.exists() || (incoming && pool.shared) {
            return Ok(());
        }
        let bytes = match incoming {
            true => Vec::new(),
            false => first_boot::medium(definition, first_boot)?,
        };
        let dir = folder(pool, &path)?;
        let partial = partial(&path, medium.format);
        let made = || {
            remove(&partial)?;
            let mut file = new_file(&partial)?;
            file.write_all(&bytes)?;
            file.set_len(medium.size_mib << 20)?;
            self.finish(dir, &file, &partial, &path)
        };
        made().map_err(|error| {
            // It may hold passwords, and is made again.
            let _ = remove(&partial);
            failed(pool, error)
        })
    }

    pub(super) async fn create_one(
        &self,
        pool: &Pool,
        disk: &Disk,
        path: &Path,
        incoming: bool,
        deadline: Instant,
    ) -> Result<(), Error> {
        let dir = folder(pool, path)?;
        let partial = partial(path, disk.format);
        remove(&partial).map_err(|error| failed(pool, error))?;
        let made = self.fill(pool, disk, &partial, incoming, deadline).await;
        let finished = made.and_then(|file| {
            self.finish(dir, &file, &partial, path)
                .map_err(|error| failed(pool, error))
        });
        if finished.is_err() {
            // The error says enough; what is left is made again next time.
            let _ = remove(&partial);
        }
        finished
    }

    /// Makes the file of a disk under its passing name, and what is in it.
    async fn fill(
        &self,
        pool: &Pool,
        disk: &Disk,
        partial: &Path,
        incoming: bool,
        deadline: Instant,
    ) -> Result<File, Error> {
        let file = new_file(partial).map_err(|error| failed(pool, error))?;
        let wanted = disk.size_mib << 20;
        let qemu_img = QemuImg::new(&file, wanted, deadline).map_err(|error| failed(pool, error))?;
        match (&disk.digest, &disk.image) {
            // What a migration brings is the difference.
            (Some(digest), _) if disk.clone_mode == CloneMode::Overlay => {
                self.overlay(pool, disk, digest, &qemu_img, &file).await?;
                return Ok(file);
            }
            (_, _) if incoming => blank(pool, disk, &qemu_img).await?,
            (_, _) if let Some(backup) = &disk.backup => {
                self.restore(disk, backup, (partial, &file), &qemu_img).await?;
            }
            (Some(digest), _) => {
                let copy = self.open_copy(pool, digest)?;
                self.copy_image(
                    pool,
                    disk,
                    (digest.as_str(), &copy, Format::Qcow2),
                    &qemu_img,
                    &file,
                )
                .await?;
            }
            (None, Some(image)) => {
                let refused = |refusal| self.refused(pool, image, refusal);
                let format = Format::of_name(image).ok_or_else(|| refused(Refusal::Name))?;
                let source = image::open(&self.images, image).map_err(refused)?;
                self.copy_image(pool, disk, (image, &source, format), &qemu_img, &file)
                    .await?;
            }
            (None, None) => blank(pool, disk, &qemu_img).await?,
        }
        let made = virtual_size(pool, &file, disk.format)?;
        if made != wanted {
            let detail = format!("disk {} was made with {made} bytes, not {wanted}", disk.name);
            return Err(failed(pool, detail));
        }
        Ok(file)
    }

    fn open_copy(&self, pool: &Pool, digest: &Digest) -> Result<File, Error> {
        let path = self.copy_of(digest);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing { what: "image", path },
            _ => failed(pool, format!("{}: {error}", path.display())),
        })
    }

    /// Makes a disk that holds only what differs from an image.
    async fn overlay(
        &self,
        pool: &Pool,
        disk: &Disk,
        digest: &Digest,
        qemu_img: &QemuImg<'_>,
        file: &File,
    ) -> Result<(), Error> {
        let path = self.copy_of(digest);
        let inspected = image::inspect(self.open_copy(pool, digest)?, Format::Qcow2)
            .map_err(|refusal| self.refused(pool, digest.as_str(), refusal))?;
        check_fits(disk, digest.as_str(), inspected)?;
        let wanted = disk.size_mib << 20;
        qemu_img
            .create_overlay(&path, DiskFormat::Qcow2, wanted)
            .await
            .map_err(|error| of_disk(error, pool))?;
        let made = image::behind(file).map_err(|error| failed(pool, error))?;
        let right = Behind {
            virtual_size_bytes: wanted,
            backing: Some(path),
        };
        match made {
            Some(made) if made == right => Ok(()),
            made => Err(failed(
                pool,
                format!("disk {} was made as {made:?}, not as {right:?}", disk.name),
            )),
        }
    }

    async fn copy_image(
        &self,
        pool: &Pool,
        disk: &Disk,
        (image, source, format): (&str, &File, Format),
        qemu_img: &QemuImg<'_>,
        file: &File,
    ) -> Result<(), Error> {
        let refused = |refusal| self.refused(pool, image, refusal);
        let before = images::state(source).map_err(|error| failed(pool, error))?;
        let inspected = image::inspect(source, format).map_err(refused)?;
        check_fits(disk, image, inspected)?;
        qemu_img
            .check_readable(source, image)
            .map_err(|error| failed(pool, error))?;
        let converted = qemu_img.convert(source, format, disk.format).await;
        // Whoever may write to it can change it after it was judged, and a copy that is still under way changes it too.
        if images::state(source).map_err(|error| failed(pool, error))? != before {
            return Err(failed(
                pool,
                format!("image {image} was written to while it was read"),
            ));
        }
        converted.map_err(|error| of_image(error, pool, image))?;
        let said = inspected.virtual_size_bytes;
        let made = virtual_size(pool, file, disk.format)?;
        if made != said {
            return Err(refused(Refusal::Ambiguous { said, made }));
        }
        let wanted = disk.size_mib << 20;
        if said < wanted {
            qemu_img
                .resize(disk.format, wanted)
                .await
                .map_err(|error| of_disk(error, pool))?;
        }
        Ok(())
    }

    fn refused(&self, pool: &Pool, image: &str, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Unreadable {
                kind: io::ErrorKind::NotFound,
                ..
            } => Error::Missing {
                what: "image",
                path: self.images.join(image),
            },
            // A disk that fails, or a network file system that is away: it may be there again later.
            Refusal::Unreadable { .. } => failed(pool, format!("image {image}: {refusal}")),
            refusal => Error::ImageRefused {
                image: image.to_owned(),
                refusal,
            },
        }
    }

    pub(super) fn finish(&self, dir: &Path, file: &File, partial: &Path, path: &Path) -> io::Result<()> {
        // Until now it was the user's who filled it.
        self.hand_over(file)?;
        fs::rename(partial, path)?;
        File::open(dir)?.sync_all()
    }

    /// Gives a disk's file to the user that QEMU runs as, and makes it durable.
    pub(super) fn hand_over(&self, file: &File) -> io::Result<()> {
        let (uid, gid) = match &self.owner {
            Some(owner) => {
                let user = User::from_name(owner)?
                    .ok_or_else(|| io::Error::other(format!("there is no user {owner}")))?;
                (user.uid, user.gid)
            }
            None => (geteuid(), getegid()),
        };
        fchown(file, Some(uid.as_raw()), Some(gid.as_raw()))?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.sync_all()
    }

    /// The size that a guest sees of a disk's file, in bytes.
    pub(super) fn size_of(&self, path: &Path, format: DiskFormat) -> Result<u64, Error> {
        let unreadable = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Error::Missing {
                what: "disk",
                path: path.to_owned(),
            },
            _ => Error::Failed {
                call: "hardware",
                code: 0,
                detail: format!("{}: {error}", path.display()),
            },
        };
        let file = File::open(path).map_err(unreadable)?;
        let behind = match format {
            DiskFormat::Raw => None,
            DiskFormat::Qcow2 => image::behind(&file).map_err(unreadable)?,
        };
        match behind {
            Some(behind) => Ok(behind.virtual_size_bytes),
            None => file.metadata().map(|metadata| metadata.len()).map_err(unreadable),
        }
    }

    /// Enlarges the file of a disk of a domain that is off.
    pub(super) async fn grow(&self, id: VmId, disk: &Disk, deadline: Instant) -> Result<(), Error> {
        let pool = self.pool(&disk.pool)?;
        let path = self.path(id, disk)?;
        let wanted = disk.size_mib << 20;
        if self.size_of(&path, disk.format)? >= wanted {
            return Ok(());
        }
        let open = OpenOptions::new().read(true).write(true).open(&path);
        let file = open.map_err(|error| failed(pool, error))?;
        let qemu_img = QemuImg::new(&file, wanted, deadline).map_err(|error| failed(pool, error))?;
        let grown = qemu_img.grow(disk.format, wanted).await;
        // Its owner again, also after a failure.
        self.hand_over(&file).map_err(|error| failed(pool, error))?;
        grown.map_err(|error| of_disk(error, pool))
    }

    /// Deletes one disk; see [`crate::hypervisor::Hypervisor::delete_volume`].
    pub(super) fn delete_one(&self, id: VmId, disk: &Disk) -> Result<(), Error> {
        let pool = self.pool(&disk.pool)?;
        let path = self.path(id, disk)?;
        // Where it is not mounted, that nothing is there says nothing.
        pool.check()?;
        remove(&partial(&path, disk.format)).map_err(|error| failed(pool, error))?;
        remove(&path).map_err(|error| failed(pool, error))?;
        // The VM's folder with its last disk; it is left where there are others, or none was there. That of volumes stays.
        if let Some(folder) = path.parent().filter(|_| disk.volume.is_none()) {
            let _ = fs::remove_dir(folder);
        }
        Ok(())
    }

    /// Deletes a volume of the site; see [`crate::hypervisor::Hypervisor::purge_volume`].
    pub(super) fn purge(&self, pool: &str, volume: VolumeId, keep_shared: bool) -> Result<(), Error> {
        let pool = self.pool(pool)?;
        if keep_shared && pool.shared {
            return Ok(());
        }
        pool.is_there()?;
        // First what may have been left of the snapshots of a VM: alone it means nothing.
        layers::remove_all(&pool.path.join("volumes"), &volume.to_string())
            .map_err(|error| failed(pool, error))?;
        for format in [DiskFormat::Qcow2, DiskFormat::Raw] {
            let path = volume_path(&pool.path, volume, format);
            for path in [partial(&path, format), path] {
                remove(&path).map_err(|error| failed(pool, error))?;
            }
        }
        Ok(())
    }

    /// Deletes a VM's disks; see [`crate::hypervisor::Hypervisor::delete_volumes`].
    pub(super) fn delete(&self, id: VmId, keep_shared: bool) -> Result<(), Error> {
        for pool in self.pools.iter().filter(|pool| !(keep_shared && pool.shared)) {
            pool.check()?;
            match fs::remove_dir_all(pool.path.join(id.to_string())) {
                // A file in the place of the folder is not Dalgu's: there are no disks.
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) =>
                {
                    return Err(failed(pool, error));
                }
                _ => {}
            }
        }
        // libvirt forgets it when it undefines the domain, and leaves it when the VM has moved away.
        let nvram = self.nvram(id);
        remove(&nvram).map_err(|error| Error::Failed {
            call: "delete_volumes",
            code: 0,
            detail: format!("{}: {error}", nvram.display()),
        })
    }
}

async fn blank(pool: &Pool, disk: &Disk, qemu_img: &QemuImg<'_>) -> Result<(), Error> {
    let made = qemu_img.create(disk.format, disk.size_mib << 20).await;
    made.map_err(|error| of_disk(error, pool))
}

/// Makes the folder of a VM's disks in a pool that is there.
pub(super) fn folder<'a>(pool: &Pool, path: &'a Path) -> Result<&'a Path, Error> {
    let dir = path
        .parent()
        .ok_or_else(|| failed(pool, "a disk without a directory"))?;
    pool.is_there()?;
    let make = || {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
        // What it holds outlives the host's power, and so must its name.
        dir.parent().map_or(Ok(()), |above| File::open(above)?.sync_all())
    };
    make().map_err(|error| failed(pool, error))?;
    Ok(dir)
}

/// The file of a volume of the site.
fn volume_path(pool: &Path, id: VolumeId, format: DiskFormat) -> PathBuf {
    pool.join("volumes").join(format!("{id}.{}", format.as_str()))
}

/// The name of a disk until it is whole.
pub(super) fn partial(path: &Path, format: DiskFormat) -> PathBuf {
    path.with_extension(format!("{}.partial", format.as_str()))
}

pub(super) fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn probe_cache(pool: &Pool, dir: &Path) -> Result<Cache, Error> {
    let probe = dir.join(format!(".dalgu-o-direct-{}", std::process::id()));
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(&probe);
    // It may not have been made at all.
    let _ = fs::remove_file(&probe);
    match opened {
        Ok(_) => Ok(Cache::None),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(Cache::Writeback),
        Err(error) => Err(failed(pool, format!("{}: {error}", dir.display()))),
    }
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn check_fits(disk: &Disk, image: &str, inspected: Inspected) -> Result<(), Error> {
    if inspected.virtual_size_bytes <= disk.size_mib << 20 {
        return Ok(());
    }
    let detail = format!(
        "disk {} has {} MiB, and its image {image} needs {} MiB",
        disk.name,
        disk.size_mib,
        inspected.virtual_size_bytes.div_ceil(1 << 20)
    );
    Err(Error::Invalid { detail })
}

/// The size that a guest sees of a disk that was made here.
fn virtual_size(pool: &Pool, file: &File, format: DiskFormat) -> Result<u64, Error> {
    match format {
        // Whatever it begins with: nobody guesses the format of a VM's disk.
        DiskFormat::Raw => file
            .metadata()
            .map(|metadata| metadata.len())
            .map_err(|error| failed(pool, error)),
        DiskFormat::Qcow2 => image::inspect(file, Format::Qcow2)
            .map(|inspected| inspected.virtual_size_bytes)
            .map_err(|refusal| failed(pool, format!("the disk that qemu-img made: {refusal}"))),
    }
}
