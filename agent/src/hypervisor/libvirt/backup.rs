//! Backups of domains: begun, watched and undone. Called by [`super::Libvirt`], each part on a worker; the files are [`files`]'.
//!
//! ```text
//!   running: files ── begin, with a checkpoint of the same moment ── job copies ──┐
//!   off:     copy what a guest would read ────────────────────────────────────────┴─ verify, name ── drop older checkpoints
//! ```
//!
//! An incremental backup begins from the checkpoint that bears its parent's id. Where there is none, or it is no good (a QEMU
//! that was killed leaves its bitmaps inconsistent), everything is copied. One checkpoint is kept, the newest whole backup's:
//! a failed backup's is merged into the one before it, so that nothing is lost for the next.

mod files;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use dalgu_proto::{
    ids::{BackupId, ClusterId, VmId},
    time::Clock,
    vm::DiskFormat,
};
use jiff::Timestamp;
use tokio::{runtime::Handle, time::Instant};
use virt::{connect::Connect, domain::Domain};
use virt_sys as sys;

use self::files::Target;
use super::{
    domain::Ours,
    error::{is_absent, is_agent_silent, of},
    ffi::{self, Checkpoints, Params},
    host::Host,
    leftover, quiesce,
    read::{self, Device},
    snapshot::agent_answers,
    tree::Element,
};
use crate::hypervisor::{
    DomainState, Error,
    backup::{Kind, MANIFEST_VERSION, Manifest, Order, Wanted},
};

const CALL: &str = "back_up";

type Raw = virt::error::Error;

/// A disk as the domain has it.
pub(super) struct Source {
    name: String,
    target: String,
    file: PathBuf,
    format: DiskFormat,
    size: u64,
}

/// A backup whose moment has been.
pub(super) struct Begun {
    order: Order,
    targets: Vec<Target>,
    kind: Kind,
    full_reason: Option<String>,
    quiesced: bool,
    checkpoint: bool,
    point_time: Timestamp,
}

/// What is to be done next.
pub(super) enum Next {
    /// The domain's job copies.
    Wait(Box<Begun>),
    /// The domain is off: its files are copied here.
    Copy(Vec<Source>),
}

fn sources(host: &Host, order: &Order, xml: &str) -> Result<Vec<Source>, Error> {
    let mut devices = read::parts(xml)?.disks;
    let found = order.spec.disks.iter().map(|disk| {
        let place = devices.iter().position(|device| device.name == disk.name);
        let Device { target, file, .. } = match place {
            Some(place) => devices.swap_remove(place),
            None => {
                let detail = format!("the domain has no disk {}", disk.name);
                return Err(Error::WrongState { id: order.vm, detail });
            }
        };
        let (file, format) = file.unwrap_or_default();
        Ok(Source {
            name: disk.name.clone(),
            target,
            size: host.storage.size_of(&file, format)?,
            file,
            format,
        })
    });
    found.collect()
}

/// Begins a backup of a domain that runs; says what to copy of one that is off.
pub(super) fn begin(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    order: &Order,
    (runtime, deadline): (&Handle, Instant),
) -> Result<Next, Error> {
    let ours = Ours::find(CALL, connect, order.vm, cluster)?;
    let failed = |error: Raw| of(CALL, order.vm, &error);
    let off = match ours.seen.state {
        DomainState::Running | DomainState::Paused => false,
        DomainState::Stopped => true,
        _ => return Err(ours.wrong_state("and cannot be backed up")),
    };
    let flags = if off { sys::VIR_DOMAIN_XML_INACTIVE } else { 0 };
    let sources = sources(host, order, &ours.handle.xml_desc(flags).map_err(failed)?)?;
    if off {
        if order.wanted == Wanted::Incremental {
            return Err(no_checkpoint(order, "it is off".to_owned()));
        }
        return Ok(Next::Copy(sources));
    }
    let known = Checkpoints::of(&ours.handle).map_err(failed)?;
    let mut full_reason = None;
    if order.wanted != Wanted::Full {
        let tried = match parent(host, order, &sources, &known.names()) {
            Ok(parent) => attempt(
                host,
                &ours.handle,
                order,
                &sources,
                Some(&parent),
                (runtime, deadline),
            ),
            Err(why) => Err(no_checkpoint(order, why)),
        };
        match tried {
            Ok(begun) => return Ok(Next::Wait(Box::new(begun))),
            Err(error) if order.wanted == Wanted::Incremental || !is_about_checkpoint(&error) => {
                return Err(error);
            }
            Err(Error::NoCheckpoint { detail, .. }) => full_reason = Some(detail),
            Err(error) => full_reason = Some(error.to_string()),
        }
    }
    let begun = match attempt(host, &ours.handle, order, &sources, None, (runtime, deadline)) {
        Err(error) if !known.names().is_empty() && is_about_checkpoint(&error) => {
            tracing::warn!(vm = %order.vm, %error, "a backup cannot be begun beside the VM's checkpoints; they are dropped");
            for name in known.names() {
                known.delete(&name).map_err(failed)?;
            }
            attempt(host, &ours.handle, order, &sources, None, (runtime, deadline))?
        }
        begun => begun?,
    };
    Ok(Next::Wait(Box::new(Begun { full_reason, ..begun })))
}

fn no_checkpoint(order: &Order, detail: String) -> Error {
    Error::NoCheckpoint { id: order.vm, detail }
}

/// Whether a full backup may succeed where this was the end of an incremental one.
const fn is_about_checkpoint(error: &Error) -> bool {
    matches!(
        error,
        Error::NoCheckpoint { .. } | Error::Invalid { .. } | Error::Failed { .. } | Error::WrongState { .. }
    )
}

/// The manifest of the backup that an incremental one can begin from, or why there is none.
fn parent(
    host: &Host,
    order: &Order,
    sources: &[Source],
    checkpoints: &[String],
) -> Result<Manifest, String> {
    let Some(id) = order.parent else {
        return Err("there is no earlier backup of it in this pool to begin from".to_owned());
    };
    if let Some(raw) = sources.iter().find(|source| source.format == DiskFormat::Raw) {
        return Err(format!(
            "disk {} is raw, and only qcow2 remembers what has changed",
            raw.name
        ));
    }
    if !checkpoints.contains(&id.to_string()) {
        return Err(format!(
            "it has no checkpoint of backup {id}: it has moved, or was made anew, since then"
        ));
    }
    let manifest = host.storage.manifest(&order.pool, id);
    let manifest = manifest.map_err(|error| error.to_string())?;
    let manifest = manifest.ok_or_else(|| format!("the files of backup {id} are not in this pool"))?;
    let same = manifest.files.len() == sources.len()
        && sources.iter().all(|source| {
            let before = manifest.file(&source.name);
            before.is_some_and(|file| file.virtual_size_bytes == source.size)
        });
    match same {
        true => Ok(manifest),
        false => Err(format!("its disks are not those of backup {id}")),
    }
}

fn attempt(
    host: &Host,
    domain: &Domain,
    order: &Order,
    sources: &[Source],
    parent: Option<&Manifest>,
    (runtime, deadline): (&Handle, Instant),
) -> Result<Begun, Error> {
    let failed = |error: Raw| of(CALL, order.vm, &error);
    let targets = runtime.block_on(host.storage.targets(order, sources, parent, deadline))?;
    let checkpoint = sources.iter().all(|source| source.format == DiskFormat::Qcow2);
    let backup = backup_xml(sources, &targets, parent.map(|parent| parent.backup)).to_xml()?;
    let checkpoint_xml = checkpoint.then(|| checkpoint_xml(order.id, sources).to_xml());
    let checkpoint_xml = checkpoint_xml.transpose()?;
    let asked = agent_answers(&domain.xml_desc(0).map_err(failed)?)?;
    let frozen = asked.then(|| ffi::freeze(domain));
    if let Some(Err(error)) = &frozen {
        tracing::info!(vm = %order.vm, error = error.message(), "the guest's file systems are not frozen for its backup");
    }
    let begun = ffi::begin_backup(domain, &backup, checkpoint_xml.as_deref());
    let point_time = Clock::system().now();
    match &frozen {
        Some(Ok(())) => quiesce::thaw(domain, order.vm, runtime),
        Some(Err(error)) if is_agent_silent(error) => quiesce::thaw_later(domain, order.vm, runtime),
        _ => {}
    }
    begun.map_err(failed)?;
    Ok(Begun {
        order: order.clone(),
        targets,
        kind: match parent {
            Some(parent) => Kind::Incremental {
                parent: parent.backup,
            },
            None => Kind::Full,
        },
        full_reason: None,
        quiesced: matches!(frozen, Some(Ok(()))),
        checkpoint,
        point_time,
    })
}

fn backup_xml(sources: &[Source], targets: &[Target], parent: Option<BackupId>) -> Element {
    let disks = sources.iter().zip(targets).map(|(source, target)| {
        Element::new("disk")
            .with("name", &source.target)
            .with("backup", "yes")
            .with("type", "file")
            .child(Element::new("driver").with("type", "qcow2"))
            .child(Element::new("target").with("file", target.path.display()))
    });
    Element::new("domainbackup")
        .with("mode", "push")
        .all(parent.map(|parent| Element::new("incremental").text(parent)))
        .child(Element::new("disks").all(disks))
}

fn checkpoint_xml(id: BackupId, sources: &[Source]) -> Element {
    let disk = |source: &Source| {
        Element::new("disk")
            .with("name", &source.target)
            .with("checkpoint", "bitmap")
    };
    Element::new("domaincheckpoint")
        .child(Element::new("name").text(id))
        .child(Element::new("disks").all(sources.iter().map(disk)))
}

/// How far a domain's job is.
pub(super) enum Job {
    /// It copies: so many bytes, of so many.
    Copies(u64, u64),
    /// It has ended well.
    Done,
    /// It has ended otherwise.
    Failed(String),
    /// There is none, and nothing is known of one that has ended.
    None,
}

pub(super) fn is_backup(params: &Params) -> bool {
    params.count("operation") == Some(sys::VIR_DOMAIN_JOB_OPERATION_BACKUP.into())
}

fn under_way(params: &Params) -> (u64, u64) {
    let count = |name| params.count(name).unwrap_or(0);
    (count("disk_processed"), count("disk_total"))
}

/// How far the backup of a domain is; with `ended` also how it ended, which libvirt tells once.
pub(super) fn job(connect: &Connect, id: VmId, ended: bool) -> Result<Job, Error> {
    let look = || {
        let domain = connect.lookup_domain_by_uuid(id.uuid())?;
        let (kind, params) = ffi::job_stats(&domain)?;
        if kind != 0 && is_backup(&params) {
            let (done, total) = under_way(&params);
            return Ok(Job::Copies(done, total));
        }
        if !ended {
            return Ok(Job::None);
        }
        let (kind, params) = ffi::ended_job(&domain)?;
        if !is_backup(&params) {
            return Ok(Job::None);
        }
        let well = u32::try_from(kind) == Ok(sys::VIR_DOMAIN_JOB_COMPLETED)
            && params.count("success").is_none_or(|success| success == 1);
        let said = params.text("errmsg").unwrap_or("libvirt does not say why");
        Ok(match well {
            true => Job::Done,
            false => Job::Failed(said.to_owned()),
        })
    };
    match look() {
        Err(error) if is_absent(&error) => Ok(Job::None),
        other => other.map_err(|error: Raw| of("backup_progress", id, &error)),
    }
}

/// Verifies what a job has copied, and gives it its name.
pub(super) fn finish(host: &Host, begun: Begun) -> Result<Manifest, Error> {
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        backup: begun.order.id,
        vm: begun.order.vm,
        name: begun.order.name,
        spec: begun.order.spec,
        kind: begun.kind,
        full_reason: begun.full_reason,
        quiesced: begun.quiesced,
        checkpoint: begun.checkpoint,
        point_time: begun.point_time,
        files: Vec::new(),
    };
    host.storage.publish(&begun.order.pool, manifest, &begun.targets)
}

/// Copies the disks of a domain that is off. It may be started meanwhile: then what was copied is of no moment.
pub(super) fn copy(host: &Host, order: &Order, sources: &[Source]) -> Result<Manifest, Error> {
    let full_reason = (order.wanted == Wanted::Auto).then(|| "it is off".to_owned());
    let point_time = Clock::system().now();
    let targets = host.storage.copy_disks(order, sources)?;
    finish(
        host,
        Begun {
            order: order.clone(),
            targets,
            kind: Kind::Full,
            full_reason,
            // Nobody froze anything: what its guest left may be tidy, or what it had when it was cut off.
            quiesced: false,
            checkpoint: false,
            point_time,
        },
    )
}

/// Drops a domain's checkpoints, all but one.
pub(super) fn drop_checkpoints(domain: &Domain, but: Option<BackupId>) -> Result<(), Raw> {
    let known = match Checkpoints::of(domain) {
        Err(error) if is_absent(&error) => return Ok(()),
        known => known?,
    };
    let kept = but.map(|id| id.to_string());
    for name in known.names().iter().filter(|name| kept.as_ref() != Some(name)) {
        known.delete(name)?;
    }
    Ok(())
}

/// As [`drop_checkpoints`], of a domain that may be gone by now.
pub(super) fn drop_older(
    connect: &Connect,
    cluster: ClusterId,
    vm: VmId,
    newest: BackupId,
) -> Result<(), Error> {
    let ours = Ours::find(CALL, connect, vm, cluster)?;
    drop_checkpoints(&ours.handle, Some(newest)).map_err(|error| of(CALL, vm, &error))
}

/// Ends the job of a domain, lets its guest go on, and drops the checkpoint of that backup.
pub(super) fn undo(connect: &Connect, cluster: ClusterId, vm: VmId, id: BackupId) -> Result<(), Error> {
    const CALL: &str = "remove_backup";
    let failed = |error: Raw| of(CALL, vm, &error);
    let ours = match Ours::find(CALL, connect, vm, cluster) {
        Err(Error::NotFound { .. } | Error::Foreign { .. }) => return Ok(()),
        ours => ours?,
    };
    let domain = &ours.handle;
    let known = match Checkpoints::of(domain) {
        Err(error) if is_absent(&error) => return Ok(()),
        known => known.map_err(failed)?,
    };
    // It was frozen for a moment only; an agent that died in it has left it so, whether or not the job had begun or goes on. One
    // without an agent of its own says so.
    let _ = ffi::thaw(domain);
    if is_job_of(domain, id) {
        match ffi::abort_job(domain) {
            Err(error) if !is_absent(&error) => return Err(failed(error)),
            _ => {}
        }
    } else if ffi::backup_xml(domain).is_err() {
        leftover::end_backup(domain, id, &partial_name(id)).map_err(failed)?;
    }
    known.delete(&id.to_string()).map_err(failed)
}

/// Name of the directory in which a backup is made.
fn partial_name(id: BackupId) -> String {
    format!("{id}.partial")
}

fn is_job_of(domain: &Domain, id: BackupId) -> bool {
    // An error: no backup is under way, or the domain is off.
    ffi::backup_xml(domain).is_ok_and(|xml| xml.contains(&partial_name(id)))
}
