//! Sending a domain to another host's libvirt, and watching it go. Called by [`super::Libvirt`] on workers.
//!
//! The transfer is peer to peer: once begun it is a matter between the two libvirts, so it goes on when the agent
//! ends, and the agent finds it again by its job. It is live, ends with the domain persistent there and undefined
//! here, and uses three Unix sockets that the agents carry: libvirt's own connection, the memory, the copied disks.

use std::path::Path;

use dalgu_proto::ids::{ClusterId, VmId};
use virt::connect::Connect;
use virt_sys as sys;

use super::{
    backup,
    connection::open_one,
    domain::Ours,
    error::{is_no_domain, is_unsupported_here, is_wrong_state, of},
    ffi::{self, Params, Value},
    pins::{Pinning, with_pinning},
    read::{self, Device},
};
use crate::hypervisor::{DomainState, Error, Mark, Progress};

/// One transfer, ready to go.
pub(super) struct Order {
    pub(super) uri: String,
    pub(super) cluster: ClusterId,
    pub(super) id: VmId,
    pub(super) mark: Mark,
    /// Where it will be at the destination.
    pub(super) pinning: Option<Pinning>,
    /// What the destination is to define for good.
    pub(super) persistent_xml: String,
    /// URI of the destination's libvirt.
    pub(super) destination: String,
    pub(super) memory: String,
    pub(super) disks: String,
    /// Names of the disks to copy.
    pub(super) copied: Vec<String>,
    /// Whether one of them is an overlay on an image, which the destination has.
    pub(super) copies_differences: bool,
    /// Whether some disk stays where it is.
    pub(super) shares_disks: bool,
    pub(super) max_downtime_ms: u32,
    pub(super) bandwidth_mib_per_second: u32,
    pub(super) arrives_paused: bool,
}

/// The URI by which one libvirt reaches another through a socket.
///
/// # Errors
/// If the path cannot be said in a URI.
pub(super) fn destination_uri(socket: &Path) -> Result<String, Error> {
    Ok(format!("qemu+unix:///system?socket={}", plain(socket)?))
}

/// The URI of a socket for a stream.
///
/// # Errors
/// If the path cannot be said in a URI.
pub(super) fn stream_uri(socket: &Path) -> Result<String, Error> {
    Ok(format!("unix://{}", plain(socket)?))
}

/// A path that needs no escaping anywhere in a URI. The agents choose these paths, so nothing else is needed.
fn plain(path: &Path) -> Result<&str, Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'_');
    path.to_str()
        .filter(|text| text.starts_with('/') && text.bytes().all(allowed))
        .ok_or_else(|| Error::Invalid {
            detail: format!("{}: not a plain absolute path", path.display()),
        })
}

/// Sends a domain; blocks until that has ended.
pub(super) fn send(order: &Order) -> Result<(), Error> {
    let call = "migrate";
    let id = order.id;
    let failed = |error: virt::error::Error| of(call, id, &error);
    // A connection of its own: the call may last for hours.
    let connect = open_one(&order.uri)?;
    let ours = Ours::find(call, &connect, id, order.cluster)?;
    if !matches!(ours.seen.state, DomainState::Running | DomainState::Paused) {
        return Err(ours.wrong_state("and cannot be sent"));
    }
    let flags = sys::VIR_DOMAIN_XML_MIGRATABLE | sys::VIR_DOMAIN_XML_SECURE;
    let live = ours.handle.xml_desc(flags).map_err(failed)?;
    let live = read::with_mark(&live, &order.mark)?;
    let live = with_pinning(&live, order.pinning.as_ref())?;
    // It holds for the domain's next migrations too, each of which sets its own.
    if let Err(error) = ours
        .handle
        .migrate_set_max_downtime(order.max_downtime_ms.max(1).into(), 0)
    {
        tracing::warn!(vm = %id, error = error.message(), "the longest stop cannot be set; libvirt's default holds");
    }
    let disks = read::parts(&live)?.disks;
    // They do not move along: what the disks keep for them would be of no use there. The next backup copies everything.
    backup::drop_checkpoints(&ours.handle, None).map_err(failed)?;
    ffi::migrate(
        &ours.handle,
        &order.destination,
        &order.parameters(live, &disks),
        order.flags(),
    )
    .map_err(failed)
}

impl Order {
    fn flags(&self) -> u32 {
        let mut flags = sys::VIR_MIGRATE_LIVE
            | sys::VIR_MIGRATE_PEER2PEER
            | sys::VIR_MIGRATE_PERSIST_DEST
            | sys::VIR_MIGRATE_UNDEFINE_SOURCE;
        if self.arrives_paused {
            flags |= sys::VIR_MIGRATE_PAUSED;
        }
        // Of a disk without an image behind it the difference is all of it.
        match (self.copied.is_empty(), self.copies_differences) {
            (true, _) => {}
            (false, true) => flags |= sys::VIR_MIGRATE_NON_SHARED_INC,
            (false, false) => flags |= sys::VIR_MIGRATE_NON_SHARED_DISK,
        }
        // libvirt believes a directory shared only where it is of a file system it knows to be; the operator has said
        // that this one is. Disks that are copied need no such word.
        if self.shares_disks {
            flags |= sys::VIR_MIGRATE_UNSAFE;
        }
        flags
    }

    fn parameters(&self, live: String, disks: &[Device]) -> Vec<(&'static str, Value)> {
        let mut parameters = vec![
            ("migrate_uri", Value::Text(self.memory.clone())),
            ("destination_xml", Value::Text(live)),
            ("persistent_xml", Value::Text(self.persistent_xml.clone())),
        ];
        if self.bandwidth_mib_per_second > 0 {
            parameters.push(("bandwidth", Value::Unsigned(self.bandwidth_mib_per_second.into())));
        }
        if !self.copied.is_empty() {
            parameters.push(("disks_uri", Value::Text(self.disks.clone())));
        }
        let copied = disks.iter().filter(|disk| self.copied.contains(&disk.name));
        parameters.extend(copied.map(|disk| ("migrate_disks", Value::Text(disk.target.clone()))));
        parameters
    }
}

fn migrating_from_here(params: &Params) -> bool {
    params.count("operation") == Some(sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT.into())
}

/// The job of a domain that is being sent.
fn job(
    call: &'static str,
    connect: &Connect,
    id: VmId,
) -> Result<Option<(virt::domain::Domain, Params)>, Error> {
    let found = connect.lookup_domain_by_uuid(id.uuid()).and_then(|handle| {
        let (kind, params) = ffi::job_stats(&handle)?;
        Ok((kind != 0 && migrating_from_here(&params)).then_some((handle, params)))
    });
    match found {
        // Not there, not running, or on its way in: nothing is being sent from here.
        Err(error) if is_no_domain(&error) || is_wrong_state(&error) || is_unsupported_here(&error) => {
            Ok(None)
        }
        other => other.map_err(|error| of(call, id, &error)),
    }
}

/// Progress of the transfer under way.
pub(super) fn progress(connect: &Connect, id: VmId) -> Result<Option<Progress>, Error> {
    Ok(job("progress", connect, id)?.map(|(_, params)| figures(&params, false)))
}

/// Ends the transfer under way.
pub(super) fn abort(connect: &Connect, id: VmId) -> Result<(), Error> {
    let Some((handle, _)) = job("abort_migration", connect, id)? else {
        return Ok(());
    };
    match ffi::abort_job(&handle) {
        // It has ended meanwhile.
        Err(error) if is_no_domain(&error) || is_wrong_state(&error) => Ok(()),
        other => other.map_err(|error| of("abort_migration", id, &error)),
    }
}

/// A job's figures, while it runs or when it has ended. Names of parameters: virDomainGetJobStats.
pub(super) fn figures(params: &Params, ended: bool) -> Progress {
    let count = |name: &str| params.count(name).unwrap_or(0);
    // While it runs libvirt's "downtime" is what it expects, at the end what it measured.
    let downtime = count("downtime");
    Progress {
        memory_total_bytes: count("memory_total"),
        memory_processed_bytes: count("memory_processed"),
        memory_remaining_bytes: count("memory_remaining"),
        disk_total_bytes: count("disk_total"),
        disk_processed_bytes: count("disk_processed"),
        disk_remaining_bytes: count("disk_remaining"),
        rate_bytes_per_second: count("memory_bps").saturating_add(count("disk_bps")),
        dirty_rate_bytes_per_second: count("memory_dirty_rate")
            .saturating_mul(count("memory_page_size").max(4096)),
        expected_downtime_ms: if ended { 0 } else { downtime },
        downtime_ms: if ended { downtime } else { 0 },
        iteration: count("memory_iteration"),
        elapsed_ms: count("time_elapsed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_that_would_change_a_uri_are_refused() {
        assert_eq!(
            stream_uri(Path::new("/run/dalgu/m-1/memory")).as_deref(),
            Ok("unix:///run/dalgu/m-1/memory")
        );
        let uri = destination_uri(Path::new("/run/dalgu/m-1/control"));
        assert_eq!(
            uri.as_deref(),
            Ok("qemu+unix:///system?socket=/run/dalgu/m-1/control")
        );
        for bad in [
            "run/x",
            "/run/a&no_verify=1",
            "/run/a b",
            "/run/a#b",
            "/run/a?b",
            "/run/%41",
        ] {
            assert!(stream_uri(Path::new(bad)).is_err(), "{bad} was accepted");
        }
    }
}
