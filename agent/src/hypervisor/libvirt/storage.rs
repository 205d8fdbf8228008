//! The disks of VMs: files in directory pools, at `{pool}/{vm uuid}/{disk}.{qcow2|raw}`. Called by the hypervisor on
//! its own threads.
//!
//! A disk is made under a name that ends in `.partial`, made durable, and renamed: what has its final name is whole.
//! Formats are always said, never guessed: a guest that writes another format's header into its raw disk must not
//! have that believed. An image that refers to other files is refused for the same reason. `qemu-img` runs with a
//! deadline and with limits on memory and file size, since images come from people.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use dalgu_proto::{
    ids::VmId,
    vm::{Disk, DiskFormat},
};
use nix::{fcntl::OFlag, unistd::User};
use tokio::{process::Command, time::Instant};

use super::xml::Cache;
use crate::hypervisor::{Definition, Error};

/// Address space that `qemu-img` may take, in bytes; it needs some 100 MiB.
const ADDRESS_SPACE: u64 = 4 << 30;

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
}

/// The pools and images of a host. Everything here may block for as long as a file system hangs.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) pools: Vec<Pool>,
    pub(super) images: PathBuf,
    /// User that QEMU runs as, to whom disks are given.
    pub(super) owner: Option<String>,
    /// How each pool's disks are cached, as far as it was found out.
    caches: Mutex<HashMap<String, Cache>>,
}

fn failed(pool: &Pool, detail: impl ToString) -> Error {
    Error::Storage {
        pool: pool.name.clone(),
        detail: detail.to_string(),
    }
}

impl Storage {
    pub(super) fn new(pools: Vec<Pool>, images: PathBuf, owner: Option<String>) -> Self {
        Self {
            pools,
            images,
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
        let file = format!("{}.{}", disk.name, disk.format.as_str());
        Ok(self.pool(&disk.pool)?.path.join(id.to_string()).join(file))
    }

    /// How the writes of a pool's disks are cached: past the page cache where its file system allows that.
    pub(super) fn cache(&self, pool: &str) -> Result<Cache, Error> {
        let known = self
            .caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(pool)
            .copied();
        if let Some(cache) = known {
            return Ok(cache);
        }
        let cache = probe_cache(self.pool(pool)?)?;
        self.caches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pool.to_owned(), cache);
        Ok(cache)
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
        Ok(())
    }

    async fn create_one(
        &self,
        pool: &Pool,
        disk: &Disk,
        path: &Path,
        incoming: bool,
        deadline: Instant,
    ) -> Result<(), Error> {
        let dir = path
            .parent()
            .ok_or_else(|| failed(pool, "a disk without a directory"))?;
        if !pool.path.is_dir() {
            return Err(failed(
                pool,
                format!("{} is not a directory", pool.path.display()),
            ));
        }
        fs::create_dir_all(dir).map_err(|error| failed(pool, error))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).map_err(|error| failed(pool, error))?;
        let partial = path.with_extension(format!("{}.partial", disk.format.as_str()));
        remove(&partial).map_err(|error| failed(pool, error))?;
        let made = match disk.image.as_ref().filter(|_| !incoming) {
            Some(image) => self.copy_image(pool, disk, image, &partial, deadline).await,
            None => make_blank(pool, disk, &partial, deadline).await,
        };
        let finished = made.and_then(|()| {
            self.finish(dir, &partial, path)
                .map_err(|error| failed(pool, error))
        });
        if finished.is_err() {
            // The error says enough; what is left is made again next time.
            let _ = remove(&partial);
        }
        finished
    }

    async fn copy_image(
        &self,
        pool: &Pool,
        disk: &Disk,
        image: &str,
        partial: &Path,
        deadline: Instant,
    ) -> Result<(), Error> {
        let source = self.images.join(image);
        if !source.is_file() {
            return Err(Error::Missing {
                what: "image",
                path: source,
            });
        }
        let format = image_format(&source)?;
        let size = image_size(pool, &source, format, deadline).await?;
        let wanted = disk.size_mib << 20;
        if size > wanted {
            let detail = format!(
                "disk {} has {} MiB, and its image {image} needs {} MiB",
                disk.name,
                disk.size_mib,
                size.div_ceil(1 << 20)
            );
            return Err(Error::Invalid { detail });
        }
        let to = disk.format.as_str();
        qemu_img(
            pool,
            &["convert", "-f", format.as_str(), "-O", to],
            &[&source, partial],
            None,
            deadline,
        )
        .await?;
        if size < wanted {
            qemu_img(
                pool,
                &["resize", "-q", "-f", to],
                &[partial],
                Some(wanted),
                deadline,
            )
            .await?;
        }
        Ok(())
    }

    fn finish(&self, dir: &Path, partial: &Path, path: &Path) -> io::Result<()> {
        if let Some(owner) = &self.owner {
            let user = User::from_name(owner)?
                .ok_or_else(|| io::Error::other(format!("there is no user {owner}")))?;
            std::os::unix::fs::chown(partial, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        fs::set_permissions(partial, fs::Permissions::from_mode(0o600))?;
        File::open(partial)?.sync_all()?;
        fs::rename(partial, path)?;
        File::open(dir)?.sync_all()
    }

    /// Deletes a VM's disks; see [`crate::hypervisor::Hypervisor::delete_volumes`].
    pub(super) fn delete(&self, id: VmId, keep_shared: bool) -> Result<(), Error> {
        for pool in self.pools.iter().filter(|pool| !(keep_shared && pool.shared)) {
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
        Ok(())
    }
}

fn probe_cache(pool: &Pool) -> Result<Cache, Error> {
    let probe = pool.path.join(format!(".dalgu-o-direct-{}", std::process::id()));
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
        Err(error) => Err(failed(pool, format!("{}: {error}", pool.path.display()))),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The format that a file's name says.
fn image_format(image: &Path) -> Result<DiskFormat, Error> {
    match image.extension().and_then(|extension| extension.to_str()) {
        Some("qcow2") => Ok(DiskFormat::Qcow2),
        Some("raw" | "img") => Ok(DiskFormat::Raw),
        _ => Err(Error::Invalid {
            detail: format!(
                "{}: an image's name must end in .qcow2, .raw or .img",
                image.display()
            ),
        }),
    }
}

async fn make_blank(pool: &Pool, disk: &Disk, path: &Path, deadline: Instant) -> Result<(), Error> {
    qemu_img(
        pool,
        &["create", "-q", "-f", disk.format.as_str()],
        &[path],
        Some(disk.size_mib << 20),
        deadline,
    )
    .await
    .map(drop)
}

/// Size that a guest sees, in bytes; refuses images that refer to other files.
async fn image_size(pool: &Pool, image: &Path, format: DiskFormat, deadline: Instant) -> Result<u64, Error> {
    let text = qemu_img(
        pool,
        &["info", "--output=json", "-f", format.as_str()],
        &[image],
        None,
        deadline,
    )
    .await?;
    let info: serde_json::Value = serde_json::from_str(&text).map_err(|error| failed(pool, error))?;
    let refers =
        info.get("backing-filename").is_some() || info.pointer("/format-specific/data/data-file").is_some();
    if refers {
        let detail = format!(
            "image {} refers to another file; flatten it with qemu-img convert",
            image.display()
        );
        return Err(Error::Invalid { detail });
    }
    let size = info.get("virtual-size").and_then(serde_json::Value::as_u64);
    size.ok_or_else(|| {
        failed(
            pool,
            format!("qemu-img does not say the size of {}", image.display()),
        )
    })
}

async fn qemu_img(
    pool: &Pool,
    words: &[&str],
    files: &[&Path],
    size: Option<u64>,
    deadline: Instant,
) -> Result<String, Error> {
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--as={ADDRESS_SPACE}"))
        .arg("--core=0")
        .args(["--", "qemu-img"])
        .args(words)
        .args(files);
    if let Some(size) = size {
        command.arg(size.to_string());
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    let after = deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1));
    let output = match tokio::time::timeout(after, command.output()).await {
        Err(_) => {
            return Err(Error::Timeout {
                call: "qemu-img",
                after,
            });
        }
        Ok(Err(error)) => return Err(failed(pool, format!("cannot run prlimit and qemu-img: {error}"))),
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let what = words.first().copied().unwrap_or_default();
    Err(failed(pool, format!("qemu-img {what}: {}", complaint.trim())))
}
