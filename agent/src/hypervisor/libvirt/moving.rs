//! A disk's move to another pool, one short piece at a time; see [`Change::MoveDisk`](crate::hypervisor::Change). Called by
//! [`super::Libvirt`] on workers.
//!
//! ```text
//!   runs:  empty file ──> QEMU copies and mirrors ──> whole: freeze, change over, definition, let go on
//!   off:   .partial, copied by `copies` ──> whole: its name, definition
//! ```
//!
//! Where a disk is, is what its domain says, running or else defined, and nothing else: until the change over all that there is of
//! the new file is worthless, afterwards the old one. The guest stands still from before QEMU changes over until the definition names the
//! new file: were host and guest to die in between, the next start would find in the old file all that the guest had written.
//! Which of the two is to go is the caller's to know, and to delete.

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
    time::Duration,
};

use dalgu_proto::{
    ids::{ClusterId, VmId},
    vm::{CloneMode, Disk},
};
use nix::sys::statvfs::statvfs;
use tokio::time::Instant;
use virt::connect::Connect;
use virt_sys as sys;

use super::{
    change::{CALL, look},
    copies::State,
    domain::{self, Ours},
    error::{is_invalid_argument, of},
    ffi,
    host::Host,
    leftover,
    read::{Device, Parts},
    snapshot::Tops,
    storage::{failed, folder, partial, remove},
};
use crate::hypervisor::{Attached, Definition, DiskCopy, DomainState, Error};

type Raw = virt::error::Error;

/// Time to make an empty file for a copy.
const MAKE: Duration = Duration::from_secs(60);

/// A disk that is to be elsewhere.
struct Move<'a> {
    host: &'a Host,
    connect: &'a Connect,
    cluster: ClusterId,
    definition: &'a Definition,
    /// As it is to be.
    disk: &'a Disk,
    /// As its domain has it.
    device: &'a Device,
    ours: &'a Ours,
    source: &'a Path,
    target: PathBuf,
}

/// The definition with each disk in the pool that its domain has it in, where there is a domain.
pub(super) fn placed(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
) -> Result<Definition, Error> {
    let mut placed = definition.clone();
    match look("define", connect, definition.id, cluster) {
        Ok((_, parts)) => place(host, &parts, &mut placed),
        // There is none, or none of ours, which is for others to judge.
        Err(Error::NotFound { .. } | Error::Foreign { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(placed)
}

/// Puts each disk into the pool that its domain has it in.
pub(super) fn place(host: &Host, parts: &Parts, definition: &mut Definition) {
    for disk in &mut definition.spec.disks {
        let device = parts.disks.iter().find(|device| device.name == disk.name);
        let file = device.and_then(|device| device.file.as_ref());
        if let Some(pool) = file.and_then(|(file, _)| host.storage.pool_of(file)) {
            disk.pool.clone_from(&pool.name);
        }
    }
}

/// What there is of a disk besides its limits. Reads its file.
pub(super) fn attached(
    host: &Host,
    ours: &Ours,
    device: &Device,
    attached: &mut Attached,
) -> Result<(), Error> {
    let id = ours.seen.id;
    let Some((file, format)) = &device.file else {
        return Ok(());
    };
    let pool = |file: &Path| host.storage.pool_of(file).map(|pool| pool.name.clone());
    attached.size_mib = host.storage.size_of(file, *format)? >> 20;
    attached.pool = pool(file);
    attached.copy = match (&device.mirror, host.copies.of(id, &device.name)) {
        (Some((mirror, whole)), _) => {
            let job = ffi::block_job(&ours.handle, &device.target);
            // One that has just ended shows at the next look.
            let (done, all) = job.ok().flatten().unwrap_or_default();
            let percent = match all {
                0 => 0,
                all => u8::try_from(done.saturating_mul(100) / all).unwrap_or(100),
            };
            Some(DiskCopy {
                pool: pool(mirror),
                percent: if *whole { 100 } else { percent.min(99) },
                ready: *whole,
            })
        }
        (None, Some((target, state))) => Some(DiskCopy {
            pool: pool(&target),
            percent: match state {
                State::Under(percent) => percent,
                State::Whole | State::Failed(_) => 100,
            },
            // Whoever goes on with one that failed is told so.
            ready: !matches!(state, State::Under(_)),
        }),
        (None, None) => None,
    };
    Ok(())
}

/// Ends the copy of a disk of a running domain, if one is being made.
pub(super) fn give_up(ours: &Ours, device: &Device) -> Result<(), Raw> {
    match device.mirror {
        Some(_) => ffi::end_block_job(&ours.handle, &device.target, 0),
        None => Ok(()),
    }
}

/// Goes on with a move. May make a file, which waits for `qemu-img` on `runtime`.
pub(super) fn go_on(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
    name: &str,
    runtime: &tokio::runtime::Handle,
) -> Result<(), Error> {
    let id = definition.id;
    let (ours, parts) = look(CALL, connect, id, cluster)?;
    let disk = definition.spec.disks.iter().find(|disk| disk.name == name);
    let device = parts.disks.iter().find(|device| device.name == name);
    let (Some(disk), Some(device)) = (disk, device) else {
        return Ok(());
    };
    let Some((source, _)) = &device.file else {
        return Err(ours.wrong_state(&format!("and its disk {name} is no file")));
    };
    // The others stay where they are.
    let mut wanted = definition.clone();
    place(host, &parts, &mut wanted);
    for other in &mut wanted.spec.disks {
        if other.name == name {
            other.pool.clone_from(&disk.pool);
        }
    }
    let it = Move {
        host,
        connect,
        cluster,
        definition: &wanted,
        disk,
        device,
        ours: &ours,
        source,
        target: host.storage.path(id, disk)?,
    };
    match ours.seen.state {
        DomainState::Running | DomainState::Paused => it.running(runtime),
        DomainState::Stopped => it.off(),
        DomainState::Incoming | DomainState::HandedOver => Err(ours.wrong_state("and its disks stay")),
    }
}

impl Move<'_> {
    fn id(&self) -> VmId {
        self.definition.id
    }

    fn done(&self, result: Result<(), Raw>) -> Result<(), Error> {
        result.map_err(|error| of(CALL, self.id(), &error))
    }

    fn failed(&self, detail: impl ToString) -> Error {
        Error::Storage {
            pool: self.disk.pool.clone(),
            detail: detail.to_string(),
        }
    }

    /// Removes what an earlier copy has left at the place of the new file.
    fn clear(&self) -> Result<(), Error> {
        let removed = remove(&partial(&self.target, self.disk.format)).and_then(|()| remove(&self.target));
        removed.map_err(|error| self.failed(error))
    }

    /// That the pool has room for what the disk takes now.
    fn check_room(&self) -> Result<(), Error> {
        use std::os::unix::fs::MetadataExt as _;
        let taken = std::fs::metadata(self.source).map_err(|error| self.failed(error))?;
        let needed = taken.blocks().saturating_mul(512);
        let pool = self.host.storage.pool(&self.disk.pool)?;
        let said = statvfs(&pool.path).map_err(|error| self.failed(error))?;
        let free = said.blocks_available().saturating_mul(said.fragment_size());
        if needed <= free {
            return Ok(());
        }
        let (name, needed, free) = (&self.disk.name, needed >> 20, free >> 20);
        Err(self.failed(format!("disk {name} takes {needed} MiB, and {free} MiB are free")))
    }

    fn running(&self, runtime: &tokio::runtime::Handle) -> Result<(), Error> {
        match &self.device.mirror {
            Some((mirror, _)) if *mirror != self.target => self.done(give_up(self.ours, self.device)),
            Some((_, false)) => Ok(()),
            Some((_, true)) => self.change_over(),
            None if self.source == self.target => Ok(()),
            None => self.begin(runtime),
        }
    }

    /// Has QEMU copy the disk, and write to both from then on.
    fn begin(&self, runtime: &tokio::runtime::Handle) -> Result<(), Error> {
        if self.device.forgotten {
            return Err(self.failed(format!(
                "libvirt was killed while disk {} changed over to another file, and takes it for being copied until the VM has been off: \
                 stop it and start it again",
                self.disk.name
            )));
        }
        self.host.copies.end(self.id(), Some(&self.disk.name));
        let run = self.ours.handle.id().unwrap_or_default();
        let begun = (self.id(), self.disk.name.clone());
        let before = self.host.copying().remove(&begun);
        // One that was given up has been deleted.
        let left = self.target.exists();
        self.clear()?;
        if left && before == Some((run, self.target.clone())) {
            let name = &self.disk.name;
            let detail =
                format!("the copy of disk {name} ended before it was whole, see libvirt's log of the domain");
            return Err(self.check_room().err().unwrap_or_else(|| self.failed(detail)));
        }
        self.check_room()?;
        let storage = &self.host.storage;
        let size = storage.size_of(self.source, self.disk.format)?;
        // Blank, or an overlay on the same image: it gets what differs.
        let empty = Disk {
            size_mib: size >> 20,
            ..self.disk.clone()
        };
        let pool = storage.pool(&self.disk.pool)?;
        let made = storage.create_one(pool, &empty, &self.target, true, Instant::now() + MAKE);
        runtime.block_on(made)?;
        let model = self.host.model(self.definition, &Tops::new())?;
        let xml = model
            .new_disk(&self.disk.name, 0)
            .transpose()?
            .unwrap_or_default();
        let shallow = match self.disk.clone_mode {
            CloneMode::Overlay if self.disk.digest.is_some() => sys::VIR_DOMAIN_BLOCK_COPY_SHALLOW,
            _ => 0,
        };
        let flags = sys::VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | sys::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB | shallow;
        let copy = |flags| ffi::block_copy(&self.ours.handle, &self.device.target, &xml, flags);
        // However fast the guest writes, it comes to an end.
        let both = sys::VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES;
        let copying = || match copy(flags | both) {
            // Before libvirt 8.0.
            Err(error) if is_invalid_argument(&error) => copy(flags),
            other => other,
        };
        let begins = copying().or_else(|error| {
            match leftover::end_copy(&self.ours.handle, &self.device.target, &self.target) {
                Ok(true) => copying(),
                Ok(false) => Err(error),
                Err(other) => {
                    tracing::warn!(vm = %self.id(), %other, "QEMU cannot be asked which copies it makes");
                    Err(error)
                }
            }
        });
        if let Err(error) = begins {
            self.clear()?;
            return self.done(Err(error));
        }
        self.host.copying().insert(begun, (run, self.target.clone()));
        Ok(())
    }

    /// Has the domain use the copy, which is whole.
    fn change_over(&self) -> Result<(), Error> {
        let handle = &self.ours.handle;
        let runs = self.ours.seen.state == DomainState::Running;
        let begun = Instant::now();
        if runs {
            self.done(handle.suspend())?;
        }
        let pivot = sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT;
        let changed = self.done(ffi::end_block_job(handle, &self.device.target, pivot));
        let defined = changed.and_then(|()| self.define());
        if runs {
            // Also after a failure: it has then not begun to use the other file, or both are the same up to here.
            self.done(handle.resume())?;
        }
        let stood_still = if runs { begun.elapsed() } else { Duration::ZERO };
        let (vm, disk, pool) = (self.id(), &self.disk.name, &self.disk.pool);
        tracing::info!(%vm, disk, pool, ?stood_still, done = defined.is_ok(), "a disk changed over to its copy");
        defined
    }

    /// Has the next start use the new file.
    fn define(&self) -> Result<(), Error> {
        let xml = self.host.model(self.definition, &Tops::new())?.to_xml()?;
        let name = self.definition.name.as_str();
        domain::define(self.connect, self.id(), name, &xml, self.cluster)
    }

    fn off(&self) -> Result<(), Error> {
        let (id, name, copies) = (self.id(), &self.disk.name, &self.host.copies);
        match copies.of(id, name) {
            Some((target, State::Under(_))) if target == self.target => Ok(()),
            Some((target, State::Whole)) if target == self.target => {
                let same = copies
                    .is_of(id, name, self.source)
                    .map_err(|error| self.failed(error))?;
                if !same {
                    copies.end(id, Some(name));
                    self.clear()?;
                    return Err(self.failed(format!("disk {name} was written to while it was copied")));
                }
                self.name_it()?;
                self.define()?;
                copies.end(id, Some(name));
                Ok(())
            }
            Some((target, State::Failed(why))) if target == self.target => {
                copies.end(id, Some(name));
                self.clear()?;
                Err(self.failed(why))
            }
            // In another pool, which it is not to go to any more.
            Some(_) => {
                copies.end(id, Some(name));
                Ok(())
            }
            None if self.source == self.target => Ok(()),
            None => {
                self.clear()?;
                self.check_room()?;
                let pool = self.host.storage.pool(&self.disk.pool)?;
                folder(pool, &self.target)?;
                let files = (self.source.to_owned(), partial(&self.target, self.disk.format));
                let begun = copies.begin(id, name, files, self.target.clone());
                begun.map_err(|error| self.failed(error))
            }
        }
    }

    /// Gives a copy that is whole to QEMU's user, and its name.
    fn name_it(&self) -> Result<(), Error> {
        let pool = self.host.storage.pool(&self.disk.pool)?;
        let dir = folder(pool, &self.target)?;
        let partial = partial(&self.target, self.disk.format);
        // Named before, by a call that did not come to its end.
        if !partial.exists() && self.target.exists() {
            return Ok(());
        }
        let file = OpenOptions::new().read(true).write(true).open(&partial);
        let file = file.map_err(|error| failed(pool, error))?;
        let named = self.host.storage.finish(dir, &file, &partial, &self.target);
        named.map_err(|error| failed(pool, error))
    }
}
