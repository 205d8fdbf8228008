//! The layers of a domain's disks, as it has them and while it is defined. Called by [`super::Libvirt`] on workers.
//!
//! The domain says which file is the top of each disk, and the files' headers say the rest: nothing else is remembered. One that
//! runs is changed by libvirt, which is handed files that were made here; of one that is off the files are changed, and then it
//! is defined anew, by which all its disks change at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use dalgu_proto::{
    ids::{ClusterId, VmId},
    vm::Disk,
};
use tokio::{runtime::Handle, time::Instant};
use virt::connect::Connect;
use virt_sys as sys;

use super::{
    change::parts_of,
    domain::{self, Ours},
    error::{self, of},
    ffi,
    host::Host,
    quiesce,
    read::{self, Device},
    storage::Link,
    tree::{Element, XmlError},
    xml::GUEST_AGENT,
};
use crate::hypervisor::{Definition, DomainState, Error, LayerChange, LayerSeen, Layers};

const CALL: &str = "change_layers";

/// The files that are the tops of disks, by the disks' names.
pub(super) type Tops = BTreeMap<String, PathBuf>;

/// What is to be done on files before the domain can be changed.
pub(super) struct Prepared {
    alive: bool,
    chains: Vec<(Disk, Vec<Link>)>,
}

/// The tops of a domain's disks as it runs, or else as it is defined; empty where there is none.
pub(super) fn tops(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<Tops, Error> {
    match Ours::find(CALL, connect, id, cluster) {
        Err(Error::NotFound { .. }) => Ok(Tops::new()),
        ours => seen_tops(&ours?, false),
    }
}

pub(super) fn tops_of(disks: &[Device]) -> Tops {
    let file = |disk: &Device| Some((disk.name.clone(), disk.file.clone()?.0));
    disks.iter().filter_map(file).collect()
}

const fn is_alive(ours: &Ours) -> bool {
    matches!(ours.seen.state, DomainState::Running | DomainState::Paused)
}

/// Which of its descriptions: as it runs, or else as it is defined.
fn flags(ours: &Ours, defined: bool) -> u32 {
    match defined || !is_alive(ours) {
        true => sys::VIR_DOMAIN_XML_INACTIVE,
        false => 0,
    }
}

fn xml(ours: &Ours, defined: bool) -> Result<String, Error> {
    let xml = ours.handle.xml_desc(flags(ours, defined));
    xml.map_err(|error| of(CALL, ours.seen.id, &error))
}

fn seen_tops(ours: &Ours, defined: bool) -> Result<Tops, Error> {
    Ok(tops_of(&parts_of(CALL, ours, flags(ours, defined))?.disks))
}

/// Its own disks that the domain has, each with its files. One that has not come yet has no layers.
fn chains(host: &Host, definition: &Definition, tops: &Tops) -> Result<Vec<(Disk, Vec<Link>)>, Error> {
    let own = definition
        .spec
        .disks
        .iter()
        .filter_map(|disk| Some((disk, tops.get(&disk.name)?)));
    own.map(|(disk, top)| Ok((disk.clone(), host.storage.chain(definition.id, disk, top)?)))
        .collect()
}

/// The layers of a domain's disks; see [`crate::hypervisor::Hypervisor::layers`]. Reads files.
pub(super) fn layers(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
) -> Result<Layers, Error> {
    let id = definition.id;
    let ours = Ours::find("layers", connect, id, cluster)?;
    let parts = read::parts(&xml(&ours, false)?)?;
    let tops = tops_of(&parts.disks);
    let chains = chains(host, definition, &tops)?;
    let defined = match is_alive(&ours) && ours.seen.persistent {
        true => read::parts(&xml(&ours, true)?)?.disks,
        false => parts.disks.clone(),
    };
    let mut found = Layers {
        outdated: chains
            .iter()
            .any(|(disk, chain)| is_outdated(host, disk, chain, &defined)),
        ..Layers::default()
    };
    let mut files = BTreeSet::new();
    for (disk, chain) in &chains {
        for link in chain {
            if let Some(number) = link.layer {
                let seen = found.there.entry(number).or_default();
                seen.written_bytes += host.storage.space_of(link);
            }
        }
        files.extend(host.storage.layer_files(id, disk)?);
    }
    for (number, seen) in &mut found.there {
        let has = |(_, chain): &(Disk, Vec<Link>)| chain.iter().any(|link| link.layer == Some(*number));
        *seen = LayerSeen {
            whole: chains.iter().all(has),
            ..*seen
        };
    }
    found.spare = files
        .into_iter()
        .filter(|number| !found.there.contains_key(number))
        .collect();
    if is_alive(&ours) {
        for device in &parts.disks {
            let job = ffi::commit_job(&ours.handle, &device.target);
            match job.map_err(|error| of("layers", id, &error))? {
                None => {}
                Some(job) => match job_state(job, device)? {
                    JobState::UnderWay => found.merging = true,
                    JobState::Ready | JobState::Lost => found.ready = true,
                },
            }
        }
    }
    Ok(found)
}

/// Whether the definition has other files for a disk than it has.
fn is_outdated(host: &Host, disk: &Disk, chain: &[Link], defined: &[Device]) -> bool {
    let Some(device) = defined.iter().find(|device| device.name == disk.name) else {
        return false;
    };
    let behind = host.storage.behind_chain(disk, chain);
    let same = device.behind.iter().eq(behind.iter().map(|file| &file.path));
    device.file.as_ref().map(|(top, _)| top) != chain.last().map(|link| &link.path) || !same
}

/// How far a merge is.
enum JobState {
    UnderWay,
    /// The disk can go on below.
    Ready,
    /// libvirt died when it had begun, and has lost account of it.
    Lost,
}

fn job_state(job: ffi::Commit, device: &Device) -> Result<JobState, XmlError> {
    let disk = Element::parse(&device.xml)?;
    let mirror = disk.at(&["mirror"]);
    Ok(match (job, mirror) {
        (ffi::Commit::Below, _) => JobState::UnderWay,
        (ffi::Commit::Newest, None) => JobState::Lost,
        (ffi::Commit::Newest, Some(mirror)) if mirror.attribute("ready") == Some("yes") => JobState::Ready,
        (ffi::Commit::Newest, Some(_)) => JobState::UnderWay,
    })
}

/// Looks at a domain before its layers are changed.
pub(super) fn prepare(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
    change: &LayerChange,
) -> Result<Prepared, Error> {
    let ours = Ours::find(CALL, connect, definition.id, cluster)?;
    let alive = match ours.seen.state {
        DomainState::Running | DomainState::Paused => true,
        DomainState::Stopped => false,
        _ => return Err(ours.wrong_state("and its disks cannot be changed")),
    };
    if alive && matches!(change, LayerChange::Revert { .. }) {
        return Err(ours.wrong_state("and must be off to go back to a snapshot: stop it"));
    }
    let tops = seen_tops(&ours, false)?;
    Ok(Prepared {
        alive,
        chains: chains(host, definition, &tops)?,
    })
}

/// Does on files what must be done before the domain can be changed. Answers the tops that it is to have then.
pub(super) async fn change_files(
    host: &Host,
    definition: &Definition,
    prepared: &Prepared,
    change: &LayerChange,
    deadline: Instant,
) -> Result<Tops, Error> {
    let storage = &host.storage;
    let mut tops = Tops::new();
    for (disk, chain) in &prepared.chains {
        let place = |number: u32| chain.iter().position(|link| link.layer == Some(number));
        let lost = |number: u32| Error::Storage {
            pool: disk.pool.clone(),
            detail: format!("disk {} has no layer {number} to go back to", disk.name),
        };
        let (number, below) = match change {
            LayerChange::Add(number) => (*number, chain.last()),
            LayerChange::Revert { number, replaces } => {
                let below = place(*replaces).and_then(|place| chain.get(place.checked_sub(1)?));
                match place(*number) {
                    Some(_) => (*number, None),
                    None => (*number, Some(below.ok_or_else(|| lost(*replaces))?)),
                }
            }
            LayerChange::Merge(number) if prepared.alive => (*number, None),
            LayerChange::Merge(number) => {
                storage.merge_layer(disk, chain, *number, deadline).await?;
                let newest = place(*number).filter(|place| place + 1 == chain.len());
                let below = newest.and_then(|place| chain.get(place.checked_sub(1)?));
                tops.extend(below.map(|below| (disk.name.clone(), below.path.clone())));
                continue;
            }
            LayerChange::Remove(number) => (*number, None),
        };
        if place(number).is_none()
            && let Some(below) = below
        {
            let made = storage.make_layer(definition.id, disk, number, below, deadline);
            tops.insert(disk.name.clone(), made.await?);
        }
    }
    Ok(tops)
}

/// Changes the domain, whose files are ready; see [`crate::hypervisor::Hypervisor::change_layers`].
pub(super) fn change(
    host: &Host,
    connect: &Connect,
    cluster: ClusterId,
    definition: &Definition,
    change: &LayerChange,
    coming: &Tops,
    runtime: &Handle,
) -> Result<bool, Error> {
    let id = definition.id;
    let ours = Ours::find(CALL, connect, id, cluster)?;
    let live = is_alive(&ours);
    match change {
        LayerChange::Add(_) if live && !coming.is_empty() => take(host, &ours, definition, coming, runtime),
        LayerChange::Merge(number) if live => merge(host, &ours, definition, *number).map(|()| false),
        LayerChange::Remove(number) => remove(host, &ours, definition, *number).map(|()| false),
        _ if coming.is_empty() => Ok(false),
        _ if live => Err(ours.wrong_state("and was off when its disks were made ready")),
        _ => {
            let mut tops = seen_tops(&ours, false)?;
            tops.extend(coming.clone());
            let xml = host.model(definition, &tops)?.to_xml()?;
            domain::define(connect, id, definition.name.as_str(), &xml, cluster)?;
            Ok(false)
        }
    }
}

/// Takes a snapshot of a domain that is not off. With the guest's agent, if that answers.
fn take(
    host: &Host,
    ours: &Ours,
    definition: &Definition,
    coming: &Tops,
    runtime: &Handle,
) -> Result<bool, Error> {
    let id = ours.seen.id;
    let live = xml(ours, false)?;
    for disk in &definition.spec.disks {
        for number in host.storage.layer_files(id, disk)? {
            // A libvirt that died between QEMU's change and its own account of it knows an older top than the guest has.
            let known = read::parts(&live)?
                .disks
                .iter()
                .any(|device| device.name == disk.name && has_layer(host, id, disk, device, number));
            if !known && host.storage.layer_in_use(id, disk, number)? {
                let detail = format!(
                    "QEMU has layer {number} of disk {}, which libvirt does not know: stop the VM, and it goes on",
                    disk.name
                );
                return Err(Error::WrongState { id, detail });
            }
        }
    }
    let order = snapshot_xml(&live, coming)?;
    let plain = sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | sys::VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT;
    if ours.seen.state == DomainState::Running && agent_answers(&live)? {
        ffi::limit_agent(&ours.handle);
        let quiesced = plain | sys::VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE;
        match ours.handle.create_snapshot_xml(&order, quiesced) {
            Ok(_) => return Ok(true),
            Err(error) if error::is_agents_fault(&error) => {
                tracing::warn!(vm = %id, error = error.message(), "the guest's agent does not freeze its file systems");
                if error::is_agent_silent(&error) {
                    quiesce::thaw_later(&ours.handle, id, runtime);
                }
            }
            Err(error) => return Err(of(CALL, id, &error)),
        }
    }
    let taken = ours.handle.create_snapshot_xml(&order, plain);
    taken.map(|_| false).map_err(|error| of(CALL, id, &error))
}

fn has_layer(host: &Host, id: VmId, disk: &Disk, device: &Device, number: u32) -> bool {
    let chain = device
        .file
        .as_ref()
        .and_then(|(top, _)| host.storage.chain(id, disk, top).ok());
    chain.is_some_and(|chain| chain.iter().any(|link| link.layer == Some(number)))
}

/// Whether an agent in the guest has opened its channel.
pub(super) fn agent_answers(live: &str) -> Result<bool, XmlError> {
    let domain = Element::parse(live)?;
    let devices = domain.at(&["devices"]);
    let mut channels = devices.into_iter().flat_map(|devices| devices.each("channel"));
    Ok(channels.any(|channel| {
        channel.at(&["target"]).is_some_and(|target| {
            target.attribute("name") == Some(GUEST_AGENT) && target.attribute("state") == Some("connected")
        })
    }))
}

/// The order for libvirt: each disk with a new top, and no other one.
fn snapshot_xml(live: &str, coming: &Tops) -> Result<String, XmlError> {
    let domain = Element::parse(live)?;
    let targets = domain
        .at(&["devices"])
        .into_iter()
        .flat_map(|devices| devices.each("disk"))
        .filter_map(|disk| disk.at(&["target"])?.attribute("dev"));
    let named = read::parts(live)?.disks;
    let disk = |target: &str| {
        let name = named.iter().find(|device| device.target == target);
        let top = name.and_then(|device| coming.get(&device.name));
        let disk = Element::new("disk").with("name", target);
        let Some(top) = top else {
            return Ok(disk.with("snapshot", "no"));
        };
        let file = top.to_str().ok_or(XmlError::Unexpected {
            place: "a path that is not UTF-8",
        })?;
        Ok(disk
            .with("snapshot", "external")
            .with("type", "file")
            .child(Element::new("driver").with("type", "qcow2"))
            .child(Element::new("source").with("file", file)))
    };
    let disks = targets.map(disk).collect::<Result<Vec<_>, XmlError>>()?;
    Element::new("domainsnapshot")
        .child(Element::new("disks").all(disks))
        .to_xml()
}

/// Does the next thing in merging a layer of a domain that is not off: begins, or lets the disk go on below.
fn merge(host: &Host, ours: &Ours, definition: &Definition, number: u32) -> Result<(), Error> {
    let id = ours.seen.id;
    let devices = read::parts(&xml(ours, false)?)?.disks;
    let failed = |error: virt::error::Error| of(CALL, id, &error);
    for (disk, chain) in chains(host, definition, &tops_of(&devices))? {
        let Some(device) = devices.iter().find(|device| device.name == disk.name) else {
            continue;
        };
        if let Some(job) = ffi::commit_job(&ours.handle, &device.target).map_err(failed)? {
            match job_state(job, device)? {
                JobState::UnderWay => {}
                JobState::Ready => ffi::end_commit(&ours.handle, &device.target).map_err(failed)?,
                // libvirt 11.3 ends with a segmentation fault when it is told to end one of which it has lost account.
                JobState::Lost => return Err(lost(id, &disk)),
            }
            continue;
        }
        let place = chain.iter().position(|link| link.layer == Some(number));
        let Some((place, below)) = place.and_then(|place| Some((place, chain.get(place.checked_sub(1)?)?)))
        else {
            continue;
        };
        let newest = place + 1 == chain.len();
        let (top, below) = (text(&chain[place].path)?, text(&below.path)?);
        match ffi::commit(&ours.handle, &device.target, below, top, newest) {
            // Although it says itself that there is none.
            Err(error) if error::is_job_active(&error) => return Err(lost(id, &disk)),
            begun => begun.map_err(failed)?,
        }
    }
    Ok(())
}

/// libvirt died when a merge was about to begin, or had just begun.
fn lost(id: VmId, disk: &Disk) -> Error {
    let detail = format!(
        "libvirt has lost account of the merge of disk {}: stop the VM and start it, and it goes on",
        disk.name
    );
    Error::WrongState { id, detail }
}

fn text(path: &Path) -> Result<&str, XmlError> {
    path.to_str().ok_or(XmlError::Unexpected {
        place: "a path that is not UTF-8",
    })
}

/// Removes the files of a layer that the domain has on no disk, as it runs and as it is defined.
fn remove(host: &Host, ours: &Ours, definition: &Definition, number: u32) -> Result<(), Error> {
    let id = ours.seen.id;
    for defined in [false, true] {
        for (disk, chain) in chains(host, definition, &seen_tops(ours, defined)?)? {
            if chain.iter().any(|link| link.layer == Some(number)) {
                return Err(ours.wrong_state(&format!("and disk {} still has layer {number}", disk.name)));
            }
        }
    }
    for disk in &definition.spec.disks {
        host.storage.remove_layer(id, disk, number)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(state: &str) -> String {
        format!(
            "<domain type='qemu'><memory>65536</memory><vcpu>1</vcpu><devices>\
             <disk><target dev='vda'/><alias name='ua-disk-root'/></disk>\
             <disk><target dev='vdb'/><alias name='ua-disk-first_boot'/></disk>\
             <disk><target dev='sda'/></disk>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' {state}/></channel>\
             </devices></domain>"
        )
    }

    #[test]
    fn the_guest_is_frozen_where_its_agent_has_opened_the_channel() {
        assert_eq!(agent_answers(&live("state='connected'")), Ok(true));
        assert_eq!(agent_answers(&live("state='disconnected'")), Ok(false));
        assert_eq!(agent_answers(&live("")), Ok(false));
        assert_eq!(agent_answers("<domain><devices/></domain>"), Ok(false));
    }

    #[test]
    fn a_snapshot_is_of_the_vms_own_disks_alone() {
        let tops = Tops::from([("root".to_owned(), PathBuf::from("/pool/it's/root.3.qcow2"))]);
        let order = snapshot_xml(&live(""), &tops).unwrap();
        let expected = "<domainsnapshot><disks>\
             <disk name=\"vda\" snapshot=\"external\" type=\"file\"><driver type=\"qcow2\"/>\
             <source file=\"/pool/it&apos;s/root.3.qcow2\"/></disk>\
             <disk name=\"vdb\" snapshot=\"no\"/><disk name=\"sda\" snapshot=\"no\"/>\
             </disks></domainsnapshot>";
        assert_eq!(order, expected);
    }
}
