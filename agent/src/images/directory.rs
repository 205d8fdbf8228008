//! The store of images in a directory of the host: the [`Files`] of the program.
//!
//! Everything that may block runs on threads of its own. What is there need not be secret from the host's users, and is
//! root's: `qemu-img` and QEMU run as others, who read it.

use std::{
    ffi::OsStr,
    fs::{self, File, FileTimes, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use dalgu_proto::{image::Digest, vm::DiskFormat};
use jiff::Timestamp;
use nix::{
    sys::statvfs::statvfs,
    unistd::{getegid, geteuid},
};
use tokio::time::Instant;
use tonic::codegen::Bytes;

use super::{
    RESERVE_BYTES,
    files::{
        Entry, Failed, Files, Hasher, Made, Order, Origin, Progress, check_source, copy_name, making_name,
        upload_name,
    },
};
use crate::{
    image::{self, Format, Inspected, Refusal},
    ledger::on_disk,
    qemu_img::{self, QemuImg},
};

/// Longest time of a conversion.
const CONVERT_TIME: Duration = Duration::from_hours(2);
/// Bytes that are read at a time to be hashed or copied.
const PIECE: usize = 4 << 20;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Directory {
    dir: PathBuf,
    images: PathBuf,
    pools: Vec<PathBuf>,
    converts: bool,
    space: Arc<Space>,
}

/// The last figure, and whether another is on its way: a file system that hangs takes one thread and no more.
#[derive(Debug, Default)]
struct Space {
    bytes: AtomicU64,
    asked: AtomicBool,
}

impl Directory {
    /// The store in `dir`, made if need be. `images` is the images directory, `pools` are where VMs' disks are. Where it does
    /// not convert, images are taken as they are. Blocks.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(dir: &Path, images: &Path, pools: Vec<PathBuf>, converts: bool) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        // QEMU's user passes through to the files, and nobody need list them.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
        Ok(Self {
            dir: dir.to_owned(),
            images: images.to_owned(),
            pools,
            converts,
            space: Arc::default(),
        })
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    async fn open_source(&self, order: &Order) -> Result<File, Failed> {
        let (own, order) = (self.clone(), order.clone());
        let opened = on_disk(move || {
            Ok(match &order.origin {
                Origin::Upload => Ok(File::open(own.dir.join(upload_name(order.id)))?),
                Origin::File(name) => image::open(&own.images, name),
            })
        });
        Ok(opened.await??)
    }

    /// Makes of the source what is to be kept.
    async fn make(
        &self,
        source: &Arc<File>,
        order: &Order,
        said: Inspected,
        file: &Arc<File>,
    ) -> Result<(), Failed> {
        if !self.converts {
            // A host with simulated guests.
            return match order.format {
                Format::Qcow2 | Format::Raw => copy(source, file).await,
                _ => Err(Failed::Here("this host has no qemu-img".to_owned())),
            };
        }
        let deadline = Instant::now() + CONVERT_TIME;
        let room = self.available_bytes().await?.saturating_sub(RESERVE_BYTES);
        let qemu_img = QemuImg::new(file, said.virtual_size_bytes.min(room), deadline)?;
        qemu_img.check_readable(source, "to be imported")?;
        match qemu_img.convert(source, order.format, DiskFormat::Qcow2).await {
            Ok(()) => Ok(()),
            // It was cut short where it would have taken the room of others.
            Err(qemu_img::Failure::Image(detail)) if room < said.virtual_size_bytes => {
                Err(Failed::Here(detail))
            }
            Err(qemu_img::Failure::Image(detail)) => Err(Refusal::Unconvertible { detail }.into()),
            Err(qemu_img::Failure::Here(detail)) => Err(Failed::Here(detail)),
            Err(qemu_img::Failure::Late(after)) => Err(Failed::Late(after)),
        }
    }

    fn inspect_file(&self, file: &File) -> Result<Inspected, Refusal> {
        match image::inspect(file, Format::Qcow2) {
            // What was taken as it is.
            Err(Refusal::NotSo { .. }) if !self.converts => image::inspect(file, Format::Raw),
            judged => judged,
        }
    }
}

#[async_trait]
impl Files for Directory {
    async fn list(&self) -> io::Result<Vec<Entry>> {
        let own = self.clone();
        on_disk(move || {
            // A run that was killed may have renamed and not synced.
            own.sync_names()?;
            let mut entries = Vec::new();
            for entry in fs::read_dir(&own.dir)? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                let time = Timestamp::try_from(metadata.modified()?).map_err(io::Error::other)?;
                if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                    entries.push(Entry {
                        name,
                        bytes: metadata.len(),
                        time,
                    });
                }
            }
            Ok(entries)
        })
        .await
    }

    async fn read(&self, name: &str, offset: u64, most: usize) -> io::Result<Bytes> {
        let path = self.dir.join(name);
        on_disk(move || {
            let file = File::open(path)?;
            let mut bytes = vec![0; most];
            let read = file.read_at(&mut bytes, offset)?;
            bytes.truncate(read);
            Ok(bytes.into())
        })
        .await
    }

    async fn write(&self, name: &str, offset: u64, bytes: Bytes) -> io::Result<()> {
        let path = self.dir.join(name);
        on_disk(move || {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(path)?;
            if offset == 0 {
                // Whatever the umask: qemu-img's user is to read it.
                file.set_permissions(fs::Permissions::from_mode(0o644))?;
            }
            file.write_all_at(&bytes, offset)
        })
        .await
    }

    async fn sync(&self, name: &str) -> io::Result<()> {
        let (own, path) = (self.clone(), self.dir.join(name));
        on_disk(move || {
            File::open(path)?.sync_all()?;
            own.sync_names()
        })
        .await
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (own, from, to) = (self.clone(), self.dir.join(from), self.dir.join(to));
        on_disk(move || {
            fs::rename(from, to)?;
            own.sync_names()
        })
        .await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        let (own, path) = (self.clone(), self.dir.join(name));
        on_disk(move || {
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
            own.sync_names()
        })
        .await
    }

    async fn mark(&self, name: &str, time: Timestamp) -> io::Result<()> {
        let path = self.dir.join(name);
        let times = FileTimes::new().set_modified(SystemTime::from(time));
        on_disk(move || File::open(path)?.set_times(times)).await
    }

    async fn available_bytes(&self) -> io::Result<u64> {
        if self.space.asked.swap(true, Ordering::AcqRel) {
            return Ok(self.space.bytes.load(Ordering::Acquire));
        }
        let own = self.clone();
        on_disk(move || {
            let found = statvfs(&own.dir);
            own.space.asked.store(false, Ordering::Release);
            let found = found?;
            let bytes = found.blocks_available().saturating_mul(found.fragment_size());
            own.space.bytes.store(bytes, Ordering::Release);
            Ok(bytes)
        })
        .await
    }

    async fn digest(&self, name: &str) -> io::Result<(Digest, u64)> {
        let path = self.dir.join(name);
        let file = Arc::new(on_disk(move || File::open(path)).await?);
        let digest = hash(&file, |_| ()).await?;
        Ok((digest, file.metadata()?.len()))
    }

    async fn inspect(&self, name: &str) -> Result<Inspected, Refusal> {
        let (own, path) = (self.clone(), self.dir.join(name));
        let judged = on_disk(move || Ok(own.inspect_file(&File::open(path)?))).await;
        judged.unwrap_or_else(|error| {
            Err(Refusal::Unreadable {
                at: 0,
                kind: error.kind(),
            })
        })
    }

    async fn import(&self, order: &Order, progress: &Progress) -> Result<Made, Failed> {
        let source = Arc::new(self.open_source(order).await?);
        let before = state(&source)?;
        let source_bytes = before.length;
        // One part for reading it, one for making and reading what is kept.
        progress.set_total(source_bytes);
        let read = |bytes: u64| progress.set(bytes / 2);
        let source_sha256 = hash(&source, read).await?;
        check_source(order, &source_sha256, source_bytes)?;
        let (judged, format) = (source.clone(), order.format);
        let said = on_disk(move || Ok(image::inspect(&*judged, format))).await??;
        let path = self.dir.join(making_name(order.id));
        let file = on_disk(move || {
            let _ = fs::remove_file(&path);
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
        });
        let file = Arc::new(file.await?);
        self.make(&source, order, said, &file).await?;
        // Whoever may write to it can change it after it was judged.
        if state(&source)? != before {
            return Err(Failed::Changed);
        }
        let (own, made) = (self.clone(), file.clone());
        let inspected = on_disk(move || {
            // Until now it was the user's who filled it.
            fchown(&*made, Some(geteuid().as_raw()), Some(getegid().as_raw()))?;
            made.set_permissions(fs::Permissions::from_mode(0o644))?;
            made.sync_all()?;
            own.sync_names()?;
            Ok(own.inspect_file(&made))
        });
        let inspected = inspected.await??;
        if inspected.virtual_size_bytes != said.virtual_size_bytes {
            return Err(Failed::Refused(Refusal::Ambiguous {
                said: said.virtual_size_bytes,
                made: inspected.virtual_size_bytes,
            }));
        }
        let bytes = file.metadata()?.len();
        let part = |read: u64| {
            let share = u128::from(source_bytes / 2) * u128::from(read) / u128::from(bytes.max(1));
            progress.set(source_bytes / 2 + u64::try_from(share).unwrap_or(0));
        };
        let digest = hash(&file, part).await?;
        Ok(Made {
            source_sha256,
            source_bytes,
            digest,
            bytes,
            virtual_size_bytes: inspected.virtual_size_bytes,
        })
    }

    async fn backs_a_disk(&self, digest: &Digest) -> io::Result<bool> {
        let (own, copy) = (self.clone(), self.dir.join(copy_name(digest)));
        on_disk(move || {
            for pool in &own.pools {
                if is_behind(pool, &copy)? {
                    return Ok(true);
                }
            }
            Ok(false)
        })
        .await
    }
}

/// Whether a disk in a pool, at `{pool}/{vm}/{disk}.qcow2`, has this file behind it.
fn is_behind(pool: &Path, copy: &Path) -> io::Result<bool> {
    let entries = |dir: &Path| match fs::read_dir(dir) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(Vec::new())
        }
        entries => entries?.collect::<io::Result<Vec<_>>>(),
    };
    for vm in entries(pool)? {
        if !vm.file_type()?.is_dir() {
            continue;
        }
        for disk in entries(&vm.path())? {
            let path = disk.path();
            if path.extension() != Some(OsStr::new("qcow2")) {
                continue;
            }
            let behind = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => image::behind(file?)?,
            };
            if behind.is_some_and(|disk| disk.backing.as_deref() == Some(copy)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// What tells that a file was written to, or is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileState {
    length: u64,
    changed: (i64, i64),
}

/// See [`FileState`].
///
/// # Errors
/// If the system does not say.
pub fn state(file: &File) -> io::Result<FileState> {
    let metadata = file.metadata()?;
    Ok(FileState {
        length: metadata.len(),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Reads a file to its end, piece by piece, each on a thread of its own: whoever gives it up waits for one piece at most.
async fn hash(file: &Arc<File>, read_so_far: impl Fn(u64)) -> io::Result<Digest> {
    let (mut hasher, mut offset) = (Hasher::new(), 0_u64);
    loop {
        let file = file.clone();
        let (read, after) = on_disk(move || {
            let mut bytes = vec![0; PIECE];
            let read = file.read_at(&mut bytes, offset)?;
            hasher.update(&bytes[..read]);
            Ok((read, hasher))
        })
        .await?;
        hasher = after;
        if read == 0 {
            return Ok(hasher.finish());
        }
        offset += read as u64;
        read_so_far(offset);
    }
}

async fn copy(from: &Arc<File>, to: &Arc<File>) -> Result<(), Failed> {
    let mut offset = 0_u64;
    loop {
        let (from, to) = (from.clone(), to.clone());
        let read = on_disk(move || {
            let mut bytes = vec![0; PIECE];
            let read = from.read_at(&mut bytes, offset)?;
            to.write_all_at(&bytes[..read], offset)?;
            Ok(read)
        });
        match read.await? {
            0 => return Ok(()),
            read => offset += read as u64,
        }
    }
}
