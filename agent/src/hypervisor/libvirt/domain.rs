//! What is done to one domain, step by step, on a thread that may block. Called by [`super::Libvirt`] through its
//! workers. Everything that changes a domain checks first that it bears this site's mark.

use dalgu_proto::{
    ids::{ClusterId, VmId},
    vm::PowerReason,
};
use serde::Deserialize;
use serde_json::json;
use virt::{connect::Connect, domain::Domain as Handle};
use virt_sys as sys;

use super::{
    ended,
    error::{general, is_invalid_argument, is_no_domain, is_no_metadata, is_unsupported, is_wrong_state, of},
    ffi, process, qmp,
    read::{self, Names},
    xml::NAMESPACE,
};
use crate::hypervisor::{Domain, DomainState, Error, Mark};

type Raw = virt::error::Error;

fn id_of(handle: &Handle) -> Result<VmId, Raw> {
    handle.uuid().map(VmId::from_uuid)
}

/// The site's mark on a domain. The persistent definition counts, since `define` changes that alone while the domain
/// runs; a domain that has none yet, because it is just arriving, bears it in the running one.
fn mark_of(handle: &Handle, persistent: bool, cluster: ClusterId) -> Result<Option<Mark>, Raw> {
    let flags = if persistent {
        sys::VIR_DOMAIN_AFFECT_CONFIG
    } else {
        sys::VIR_DOMAIN_AFFECT_CURRENT
    };
    let mark = own_element(handle, flags)?.and_then(|xml| read::mark(&xml));
    Ok(mark.filter(|mark| mark.cluster == cluster))
}

/// Dalgu's element in a domain's metadata. Does not ask QEMU, as libvirt's whole definition of a running domain would.
fn own_element(handle: &Handle, flags: sys::virDomainModificationImpact) -> Result<Option<String>, Raw> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or_default();
    match handle.metadata(kind, Some(NAMESPACE), flags) {
        Err(error) if is_no_metadata(&error) => Ok(None),
        other => other.map(Some),
    }
}

/// libvirt's state and reason in the agent's words. Numbers are virDomainState and virDomain*Reason.
fn translate(state: i32, reason: i32, persistent: bool) -> (DomainState, PowerReason) {
    use DomainState::{HandedOver, Incoming, Paused, Running, Stopped};
    let state = u32::try_from(state).unwrap_or(u32::MAX);
    let reason = u32::try_from(reason).unwrap_or(u32::MAX);
    match (state, reason) {
        (sys::VIR_DOMAIN_RUNNING, sys::VIR_DOMAIN_RUNNING_MIGRATED | sys::VIR_DOMAIN_RUNNING_POSTCOPY) => {
            (Running, PowerReason::Migrated)
        }
        (sys::VIR_DOMAIN_RUNNING, sys::VIR_DOMAIN_RUNNING_CRASHED) => (Running, PowerReason::Crashed),
        (sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED | sys::VIR_DOMAIN_SHUTDOWN, _) => {
            (Running, PowerReason::Unknown)
        }
        // A domain that arrives becomes persistent at its very end; one that leaves has been so all along.
        (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_MIGRATION | sys::VIR_DOMAIN_PAUSED_STARTING_UP)
            if !persistent =>
        {
            (Incoming, PowerReason::Unknown)
        }
        (
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_MIGRATION
            | sys::VIR_DOMAIN_PAUSED_POSTCOPY
            | sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
        ) => (HandedOver, PowerReason::Unknown),
        (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_IOERROR) => (Paused, PowerReason::IoError),
        (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_CRASHED) => (Paused, PowerReason::Crashed),
        // Also one that its guest, its watchdog or another program has suspended.
        (
            sys::VIR_DOMAIN_PAUSED,
            sys::VIR_DOMAIN_PAUSED_USER
            | sys::VIR_DOMAIN_PAUSED_WATCHDOG
            | sys::VIR_DOMAIN_PAUSED_SAVE
            | sys::VIR_DOMAIN_PAUSED_DUMP
            | sys::VIR_DOMAIN_PAUSED_SNAPSHOT,
        )
        | (sys::VIR_DOMAIN_PMSUSPENDED, _) => (Paused, PowerReason::External),
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN) => (Stopped, PowerReason::GuestShutdown),
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => (Stopped, PowerReason::External),
        (
            sys::VIR_DOMAIN_SHUTOFF,
            sys::VIR_DOMAIN_SHUTOFF_CRASHED | sys::VIR_DOMAIN_SHUTOFF_FAILED | sys::VIR_DOMAIN_SHUTOFF_DAEMON,
        ) => (Stopped, PowerReason::Crashed),
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => (Stopped, PowerReason::Migrated),
        (sys::VIR_DOMAIN_CRASHED, _) => (Stopped, PowerReason::Crashed),
        (sys::VIR_DOMAIN_SHUTOFF, _) => (Stopped, PowerReason::Unknown),
        // For a reason of libvirt's own: its memory is whole, it does not run.
        _ => (Paused, PowerReason::Unknown),
    }
}

fn look_at(handle: &Handle, cluster: ClusterId) -> Result<Domain, Raw> {
    let persistent = handle.is_persistent()?;
    let (state, reason) = ffi::state(handle)?;
    let info = handle.info()?;
    let (state, mut reason) = translate(state, reason, persistent);
    let name = handle.name()?;
    let unsure = matches!(reason, PowerReason::Unknown | PowerReason::Crashed);
    if state == DomainState::Stopped && unsure && ended::migrated(&name) {
        reason = PowerReason::Migrated;
    }
    Ok(Domain {
        id: id_of(handle)?,
        name,
        mark: mark_of(handle, persistent, cluster)?,
        state,
        reason,
        persistent,
        vcpus: info.nr_virt_cpu,
        memory_mib: info.max_mem / 1024,
        // Only events tell.
        resets: 0,
    })
}

/// Whether the guest of a domain runs which libvirt takes for paused by an I/O error. QEMU tells of such errors once a second at most, so that
/// of one may be told when the guest goes on already; libvirt then has it paused for good, and neither pauses it nor lets it go on. QEMU
/// is stopped for a moment and continued, of which libvirt hears.
fn goes_on(handle: &Handle) -> Result<bool, Raw> {
    #[derive(Deserialize, Default)]
    struct Status {
        running: bool,
    }
    let status: Status = qmp::ask(handle, "query-status", &json!({}))?;
    if !status.running {
        return Ok(false);
    }
    tracing::warn!(
        domain = handle.name()?,
        "libvirt takes a guest for paused by an I/O error that runs; it is told better"
    );
    Ok(qmp::tell(handle, "stop", &json!({}))? && qmp::tell(handle, "cont", &json!({}))?)
}

/// Every domain. One that vanishes meanwhile is left out.
pub(super) fn list(connect: &Connect, cluster: ClusterId) -> Result<Vec<Domain>, Error> {
    let failed = |error: Raw| general("list", &error);
    let mut domains = Vec::new();
    for handle in connect.list_all_domains(0).map_err(failed)? {
        match look_at(&handle, cluster) {
            Ok(domain) => domains.push(domain),
            Err(error) if is_no_domain(&error) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(domains)
}

/// One domain.
pub(super) fn get(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<Option<Domain>, Error> {
    let look = || {
        let handle = connect.lookup_domain_by_uuid(id.uuid())?;
        let seen = look_at(&handle, cluster)?;
        let doubtful =
            seen.mark.is_some() && seen.state == DomainState::Paused && seen.reason == PowerReason::IoError;
        if doubtful && goes_on(&handle)? {
            return look_at(&handle, cluster);
        }
        Ok(seen)
    };
    match look() {
        Ok(domain) => Ok(Some(domain)),
        Err(error) if is_no_domain(&error) => Ok(None),
        Err(error) => Err(of("get", id, &error)),
    }
}

/// A domain of this site's, as it is now.
pub(super) struct Ours {
    pub(super) handle: Handle,
    pub(super) seen: Domain,
}

impl Ours {
    /// Finds it; refuses one that is not this site's.
    pub(super) fn find(
        call: &'static str,
        connect: &Connect,
        id: VmId,
        cluster: ClusterId,
    ) -> Result<Self, Error> {
        let failed = |error: Raw| of(call, id, &error);
        let handle = connect.lookup_domain_by_uuid(id.uuid()).map_err(failed)?;
        let seen = look_at(&handle, cluster).map_err(failed)?;
        if seen.mark.is_none() {
            return Err(Error::Foreign {
                id,
                detail: format!("{} bears no mark of this site", seen.name),
            });
        }
        Ok(Self { handle, seen })
    }

    /// As [`Ours::find`], with `None` for one that is not there.
    fn find_any(
        call: &'static str,
        connect: &Connect,
        id: VmId,
        cluster: ClusterId,
    ) -> Result<Option<Self>, Error> {
        match Self::find(call, connect, id, cluster) {
            Ok(ours) => Ok(Some(ours)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Names of the devices it has now.
    pub(super) fn names(&self) -> Result<Option<Names>, Error> {
        let id = self.seen.id;
        let own = own_element(&self.handle, sys::VIR_DOMAIN_AFFECT_CURRENT)
            .map_err(|error| of("usage", id, &error))?;
        Ok(own.and_then(|xml| read::names(&xml, id.uuid())))
    }

    pub(super) fn wrong_state(&self, wanted: &str) -> Error {
        Error::WrongState {
            id: self.seen.id,
            detail: format!("it is {:?}, {wanted}", self.seen.state),
        }
    }
}

/// Defines a domain, or defines it anew.
pub(super) fn define(
    connect: &Connect,
    id: VmId,
    name: &str,
    xml: &str,
    cluster: ClusterId,
) -> Result<(), Error> {
    let call = "define";
    if let Some(ours) = Ours::find_any(call, connect, id, cluster)? {
        if !ours.seen.persistent && ours.seen.state != DomainState::Stopped {
            return Err(ours.wrong_state("wait until it has arrived"));
        }
        if ours.seen.name != name {
            let detail = format!(
                "domain {id} is named {}; a name cannot be changed",
                ours.seen.name
            );
            return Err(Error::Invalid { detail });
        }
    }
    match connect.lookup_domain_by_name(name) {
        Ok(other) => {
            let other = id_of(&other).map_err(|error| of(call, id, &error))?;
            if other != id {
                return Err(Error::Foreign {
                    id,
                    detail: format!("{other} has the name {name}"),
                });
            }
        }
        Err(error) if is_no_domain(&error) => {}
        Err(error) => return Err(of(call, id, &error)),
    }
    let flags = sys::VIR_DOMAIN_DEFINE_VALIDATE;
    connect
        .define_domain_xml_flags(xml, flags)
        .map(drop)
        .map_err(|error| of(call, id, &error))
}

/// Starts a domain, after a look whether its files are there.
pub(super) fn start(connect: &Connect, id: VmId, cluster: ClusterId, check_files: bool) -> Result<(), Error> {
    let call = "start";
    let ours = Ours::find(call, connect, id, cluster)?;
    let failed = |error: Raw| of(call, id, &error);
    match ours.seen.state {
        DomainState::Running => return Ok(()),
        DomainState::Stopped => {}
        _ => return Err(ours.wrong_state("and cannot be started")),
    }
    if check_files {
        let xml = ours
            .handle
            .xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)
            .map_err(failed)?;
        for (what, path) in read::files(&xml)? {
            if !path.exists() {
                return Err(Error::Missing { what, path });
            }
        }
        // A libvirt that could not read its own notes forgets what runs.
        if let Ok(Some(process)) = process::running(id) {
            let detail = format!(
                "a QEMU of it runs as process {process}, and libvirt knows nothing of that: it may write to its disks; it starts \
                 when that process has ended (power the guest off from inside, or `kill {process}`)"
            );
            return Err(Error::WrongState { id, detail });
        }
    }
    match ours.handle.create() {
        // Somebody else was quicker.
        Err(error) if is_wrong_state(&error) && ours.handle.is_active().map_err(failed)? => Ok(()),
        other => other.map_err(failed),
    }
}

/// Asks the guest of a running domain for something.
pub(super) fn ask(
    call: &'static str,
    connect: &Connect,
    id: VmId,
    cluster: ClusterId,
    request: impl FnOnce(&Handle) -> Result<(), Raw>,
) -> Result<(), Error> {
    let ours = Ours::find(call, connect, id, cluster)?;
    if ours.seen.state != DomainState::Running {
        return Err(ours.wrong_state("and its guest cannot be asked"));
    }
    request(&ours.handle).map_err(|error| of(call, id, &error))
}

/// Powers a domain off.
pub(super) fn destroy(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<(), Error> {
    let Some(ours) = Ours::find_any("destroy", connect, id, cluster)? else {
        return Ok(());
    };
    if ours.seen.state == DomainState::Stopped {
        return Ok(());
    }
    match ours.handle.destroy() {
        // It went by itself meanwhile.
        Err(error) if is_no_domain(&error) || is_wrong_state(&error) => Ok(()),
        other => other.map_err(|error| of("destroy", id, &error)),
    }
}

/// Freezes a domain.
pub(super) fn pause(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<(), Error> {
    let ours = Ours::find("pause", connect, id, cluster)?;
    match ours.seen.state {
        DomainState::Paused => Ok(()),
        DomainState::Running => ours.handle.suspend().map_err(|error| of("pause", id, &error)),
        _ => Err(ours.wrong_state("and cannot be paused")),
    }
}

/// Lets a domain go on.
pub(super) fn resume(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<(), Error> {
    let ours = Ours::find("resume", connect, id, cluster)?;
    match ours.seen.state {
        DomainState::Running => Ok(()),
        DomainState::Paused => ours.handle.resume().map_err(|error| of("resume", id, &error)),
        _ => Err(ours.wrong_state("and cannot go on")),
    }
}

/// Forgets a domain that is off.
pub(super) fn undefine(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<(), Error> {
    let Some(ours) = Ours::find_any("undefine", connect, id, cluster)? else {
        return Ok(());
    };
    if ours.seen.state != DomainState::Stopped {
        return Err(ours.wrong_state("power it off first"));
    }
    let everything = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
    let undefined = match ours.handle.undefine_flags(everything) {
        // Drivers that have none of these.
        Err(error) if is_unsupported(&error) || is_invalid_argument(&error) => ours.handle.undefine(),
        other => other,
    };
    match undefined {
        Err(error) if is_no_domain(&error) => Ok(()),
        other => other.map_err(|error| of("undefine", id, &error)),
    }
}

/// That a VM's disks are not in use here.
pub(super) fn disks_are_free(connect: &Connect, id: VmId, cluster: ClusterId) -> Result<(), Error> {
    match Ours::find_any("delete_volumes", connect, id, cluster)? {
        Some(ours) if ours.seen.state != DomainState::Stopped => {
            Err(ours.wrong_state("and its disks are in use"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_told_apart_by_their_reasons() {
        use DomainState::*;
        let table = [
            ((1, 1), true, (Running, PowerReason::Unknown)),
            ((1, 2), true, (Running, PowerReason::Migrated)),
            ((1, 10), true, (Running, PowerReason::Migrated)),
            ((3, 1), true, (Paused, PowerReason::External)),
            ((3, 2), false, (Incoming, PowerReason::Unknown)),
            ((3, 11), false, (Incoming, PowerReason::Unknown)),
            ((3, 11), true, (Paused, PowerReason::Unknown)),
            ((3, 2), true, (HandedOver, PowerReason::Unknown)),
            ((3, 12), true, (HandedOver, PowerReason::Unknown)),
            ((3, 13), true, (HandedOver, PowerReason::Unknown)),
            ((3, 5), true, (Paused, PowerReason::IoError)),
            ((5, 0), true, (Stopped, PowerReason::Unknown)),
            ((5, 1), true, (Stopped, PowerReason::GuestShutdown)),
            ((5, 2), true, (Stopped, PowerReason::External)),
            ((5, 3), true, (Stopped, PowerReason::Crashed)),
            ((5, 4), true, (Stopped, PowerReason::Migrated)),
            ((5, 6), true, (Stopped, PowerReason::Crashed)),
            ((6, 1), true, (Stopped, PowerReason::Crashed)),
            ((-1, -1), true, (Paused, PowerReason::Unknown)),
        ];
        for ((state, reason), persistent, expected) in table {
            assert_eq!(
                translate(state, reason, persistent),
                expected,
                "state {state}, reason {reason}"
            );
        }
    }
}
