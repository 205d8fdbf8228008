//! What QEMU has that libvirt knows nothing of. A libvirtd that is killed between telling QEMU and noting it leaves it: of a backup, the
//! copying jobs and the files that they write, beside which no other backup begins; of a disk's move, the same, beside which no other copy
//! of that disk begins, or of a copy that has ended, the word that it is being made; of a device that was being plugged in, the device and what is behind it, for which QEMU refuses to plug it in again.

use std::{collections::BTreeSet, iter, path::Path, thread, time::Duration};

use dalgu_proto::ids::BackupId;
use serde::Deserialize;
use serde_json::json;
use virt::domain::Domain;

use super::{
    ffi,
    qmp::{ask, tell},
    read::{self, Device, Parts},
    tree::{Element, Node as Child},
};

type Raw = virt::error::Error;

/// A job or a device that is told to go does so within this, or is looked at again with the next try.
const LOOKS: u32 = 50;
const LOOK: Duration = Duration::from_millis(100);

/// What the names begin with that Dalgu gives to devices.
const DEVICES: &str = "ua-";

#[derive(Deserialize)]
struct Job {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: String,
    #[serde(default)]
    file: String,
}

impl Node {
    /// What the nodes of one file have in common.
    fn stem(&self) -> &str {
        self.node_name
            .rsplit_once('-')
            .map_or(&self.node_name, |(stem, _)| stem)
    }
}

/// A drive of the guest, and what is in it.
#[derive(Deserialize)]
struct Drive {
    inserted: Option<Node>,
}

/// Something in QEMU's tree of objects.
#[derive(Deserialize)]
struct Object {
    name: String,
}

/// Ends the copying jobs of a domain of which libvirt knows no backup, and closes the files in the directory of this backup.
pub(super) fn end_backup(domain: &Domain, id: BackupId, directory: &str) -> Result<(), Raw> {
    end_jobs(domain, |job| job.kind == "backup")?;
    let below = format!("{directory}/");
    let left = close(domain, |file| file.contains(&below))?.left;
    if left > 0 {
        tracing::warn!(%id, left, "QEMU does not close the files of a backup");
    }
    Ok(())
}

/// Ends the copies of a disk that libvirt does not show, and closes the file that the next one is to be written to. Returns whether
/// anything has gone.
pub(super) fn end_copy(domain: &Domain, disk: &str, target: &Path) -> Result<bool, Raw> {
    let name = format!("copy-{disk}-");
    let is_of_it = |job: &Job| job.kind == "mirror" && job.id.starts_with(&name);
    let ended = !jobs(domain, is_of_it)?.is_empty();
    if ended {
        // libvirt may have noted that there is a job, and not yet to which file.
        let _ = ffi::end_block_job(domain, disk, 0);
        end_jobs(domain, is_of_it)?;
    }
    let closed = close(domain, |file| Path::new(file) == target)?.closed;
    Ok(ended || closed)
}

/// Corrects what libvirt says of copies that QEMU has ended: a libvirtd that is killed between having QEMU forget such a job and noting it shows the
/// copy for as long as the domain runs, and the file that the guest used before. Which one it uses now, QEMU says.
pub(super) fn forgotten_copies(domain: &Domain, parts: &mut Parts) -> Result<(), Raw> {
    let is_made = |jobs: &[Job], device: &Device| {
        let name = format!("copy-{}-", device.target);
        jobs.iter().any(|job| job.id.starts_with(&name))
    };
    let mirrors = || jobs(domain, |job| job.kind == "mirror");
    let before = mirrors()?;
    let is_lost = |jobs: &[Job], device: &Device| device.mirror.is_some() && !is_made(jobs, device);
    if !parts.disks.iter().any(|device| is_lost(&before, device)) {
        return Ok(());
    }
    // libvirt has QEMU asked when it is done with what a job that has ended brings: what it shows after that, it shows for good. Unless the copy
    // began meanwhile.
    let Ok(again) = read::parts(&domain.xml_desc(0)?) else {
        return Ok(());
    };
    *parts = again;
    let after = mirrors()?;
    for device in &mut parts.disks {
        let lost = is_lost(&before, device) && is_lost(&after, device);
        let Some((target, _)) = device.mirror.take_if(|_| lost) else {
            continue;
        };
        device.forgotten = true;
        let Some((source, _)) = &mut device.file else {
            continue;
        };
        let (uses_target, uses_source) = (is_used(domain, &target)?, is_used(domain, source)?);
        tracing::debug!(
            disk = device.name,
            uses_target,
            uses_source,
            "libvirt shows a copy that has ended"
        );
        match (uses_target, uses_source) {
            (true, false) => *source = target,
            (false, true) => {}
            // Nothing is to be done by a guess.
            _ => device.mirror = Some((target, false)),
        }
    }
    Ok(())
}

/// Whether the guest has a drive in which this file is.
fn is_used(domain: &Domain, file: &Path) -> Result<bool, Raw> {
    let drives: Vec<Drive> = ask(domain, "query-block", &json!({}))?;
    let inserted: Vec<_> = drives.into_iter().filter_map(|drive| drive.inserted).collect();
    let nodes = nodes(domain, |other| Path::new(other) == file)?;
    Ok(nodes
        .iter()
        .any(|node| inserted.iter().any(|drive| drive.stem() == node.stem())))
}

fn jobs(domain: &Domain, is_of_it: impl Fn(&Job) -> bool) -> Result<Vec<Job>, Raw> {
    let mut jobs: Vec<Job> = ask(domain, "query-jobs", &json!({}))?;
    jobs.retain(is_of_it);
    Ok(jobs)
}

/// Ends jobs of a kind that libvirt knows nothing of.
fn end_jobs(domain: &Domain, is_of_it: impl Fn(&Job) -> bool) -> Result<(), Raw> {
    let mut left = jobs(domain, &is_of_it)?;
    for job in left.iter().filter(|job| job.status != "concluded") {
        tell(domain, "job-cancel", &json!({ "id": job.id }))?;
    }
    for _ in 0..LOOKS {
        if left.iter().all(|job| job.status == "concluded") {
            break;
        }
        thread::park_timeout(LOOK);
        left = jobs(domain, &is_of_it)?;
    }
    for job in &left {
        tracing::warn!(
            job = job.id,
            kind = job.kind,
            "QEMU had a job that libvirt knows nothing of; it is ended"
        );
        tell(domain, "job-dismiss", &json!({ "id": job.id }))?;
    }
    Ok(())
}

/// Takes out of QEMU the devices that libvirt does not know of, and closes their files and those of the device that it could not plug
/// in, as this is its XML. A guest may hold one: then it stays, and goes with a later try. Returns whether anything has gone.
pub(super) fn unplug(domain: &Domain, device: &Element) -> Result<bool, Raw> {
    let Ok(known) = Element::parse(&domain.xml_desc(0)?) else {
        return Ok(false);
    };
    let known = known
        .at(&["devices"])
        .map_or(&[][..], |devices| &devices.children);
    let known: Vec<_> = known
        .iter()
        .filter_map(|child| match child {
            Child::Element(device) => Some(device),
            Child::Text(_) => None,
        })
        .collect();
    let aliases: BTreeSet<_> = known.iter().filter_map(|device| alias(device)).collect();
    let left = plugged(domain, &aliases)?;
    for alias in &left {
        tracing::warn!(
            alias,
            "QEMU has a device that libvirt knows nothing of; it is taken out"
        );
        tell(domain, "device_del", &json!({ "id": alias }))?;
    }
    let mut looks = 0..LOOKS;
    let mut still = left.clone();
    while !still.is_empty() && looks.next().is_some() {
        thread::park_timeout(LOOK);
        still = plugged(domain, &aliases)?;
    }
    let mut gone = still.len() < left.len();
    for alias in left.iter().map(String::as_str).chain(alias(device)) {
        gone |= tell(domain, "netdev_del", &json!({ "id": format!("host{alias}") }))?;
    }
    // Where a job is under way, its files are not the devices'.
    if ask::<Vec<Job>>(domain, "query-jobs", &json!({}))?.is_empty() {
        let known: BTreeSet<_> = known.iter().flat_map(|device| files_of(device)).collect();
        let own = files_of(device);
        gone |= close(domain, |file| own.contains(file) || !known.contains(file))?.closed;
    }
    Ok(gone)
}

/// What a device is called in QEMU.
fn alias(device: &Element) -> Option<&str> {
    device.at(&["alias"])?.attribute("name")
}

/// Devices of Dalgu's that QEMU has, besides those that are known.
fn plugged(domain: &Domain, known: &BTreeSet<&str>) -> Result<Vec<String>, Raw> {
    let place = json!({ "path": "/machine/peripheral" });
    let all: Vec<Object> = ask(domain, "qom-list", &place)?;
    let all = all.into_iter().map(|object| object.name);
    Ok(all
        .filter(|name| name.starts_with(DEVICES) && !known.contains(name.as_str()))
        .collect())
}

/// The files of a disk, its own and those behind it.
fn files_of(disk: &Element) -> BTreeSet<&str> {
    let layers = iter::successors(Some(disk), |layer| layer.at(&["backingStore"]));
    layers
        .filter_map(|layer| layer.at(&["source"])?.attribute("file"))
        .collect()
}

/// The block nodes whose file is of a kind.
fn nodes(domain: &Domain, is_of_it: impl Fn(&str) -> bool) -> Result<Vec<Node>, Raw> {
    let mut nodes: Vec<Node> = ask(domain, "query-named-block-nodes", &json!({ "flat": true }))?;
    // Not what the guest's firmware is in, nor what QEMU itself has made.
    let is_disks = |name: &str| {
        name.strip_prefix("libvirt-")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    nodes.retain(|node| is_disks(&node.node_name) && is_of_it(&node.file));
    Ok(nodes)
}

/// What came of closing files.
struct Closing {
    /// Some were closed.
    closed: bool,
    /// So many were not: something is done with them.
    left: usize,
}

/// Closes the block nodes whose file is of a kind: those on top first, which is as often as a file has nodes.
fn close(domain: &Domain, is_of_it: impl Fn(&str) -> bool) -> Result<Closing, Raw> {
    let mut closed = false;
    loop {
        let open = nodes(domain, &is_of_it)?;
        let mut some = false;
        for node in &open {
            // One that another stands on is refused; it is the next round's.
            some |= tell(domain, "blockdev-del", &json!({ "node-name": node.node_name }))?;
        }
        closed |= some;
        if !some {
            let left = open.len();
            return Ok(Closing { closed, left });
        }
    }
}
