//! What operators change about hosts.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{ids::HostName, placement::Taint};

use super::{Error, check_etag, drain, placement_group, volume};
use crate::{
    model::{EventKind, HostRecord, Outcome},
    state::Tx,
};

/// New values of mutable fields; `None` leaves one as it is.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Taints, all of them.
    pub taints: Option<BTreeSet<Taint>>,
    /// Virtual processors per logical one.
    pub cpu_overcommit_ratio: Option<f64>,
    /// Memory kept for the host.
    pub reserved_memory_mib: Option<u64>,
    /// Most VMs that it takes; `Some(None)` for what the site says.
    pub vms_most: Option<Option<u32>>,
}

pub(super) fn find(tx: &Tx, name: &str) -> Result<HostRecord, Error> {
    let name: HostName = name.parse().map_err(|error| Error::invalid("name", error))?;
    let host = tx
        .hosts
        .get(&name)
        .ok_or_else(|| Error::HostNotFound(name.to_string()))?;
    Ok((**host).clone())
}

/// Changes a host.
pub fn update(tx: &mut Tx, name: &str, etag: &str, update: Update) -> Result<Outcome, Error> {
    let old = find(tx, name)?;
    check_etag(etag, old.revision, name)?;
    let total = old.inventory.memory_bytes >> 20;
    if update.reserved_memory_mib.is_some_and(|mib| mib > total) {
        let message = format!("must be at most the host's {total} MiB");
        return Err(Error::invalid("host.reserved_memory_mib", message));
    }
    let mut host = old.clone();
    host.labels = update.labels.unwrap_or(host.labels);
    host.taints = update.taints.unwrap_or(host.taints);
    placement_group::keeps_rules(tx, &old, &host)?;
    host.cpu_overcommit_ratio = update.cpu_overcommit_ratio.unwrap_or(host.cpu_overcommit_ratio);
    host.reserved_memory_mib = update.reserved_memory_mib.unwrap_or(host.reserved_memory_mib);
    host.vms_most = update.vms_most.unwrap_or(host.vms_most);
    if host != old {
        tx.event(EventKind::Host, "HostUpdated", &host.name, "changed", None);
        tx.put_host(host);
    }
    Ok(Outcome::Host(old.name))
}

/// Closes a host for new VMs, or opens it again (`None`).
pub fn cordon(tx: &mut Tx, name: &str, reason: Option<String>) -> Result<Outcome, Error> {
    let mut host = find(tx, name)?;
    if reason.is_none() {
        drain::none_under_way(&host)?;
    }
    let name = host.name.clone();
    if host.cordon != reason {
        let (event, message) = match &reason {
            Some(reason) if reason.is_empty() => ("HostCordoned", "closed for new VMs".to_owned()),
            Some(reason) => ("HostCordoned", format!("closed for new VMs: {reason}")),
            None => ("HostUncordoned", "open for new VMs".to_owned()),
        };
        tx.event(EventKind::Host, event, &name, message, None);
        host.cordon = reason;
        tx.put_host(host);
    }
    Ok(Outcome::Host(name))
}

/// Forgets a host that holds no VM.
pub fn delete(tx: &mut Tx, name: &str) -> Result<Outcome, Error> {
    let host = find(tx, name)?;
    let vms = tx.host_vms.get(&host.name).map_or(0, imbl::OrdSet::len);
    if vms > 0 {
        return Err(Error::HostNotEmpty { host: host.name, vms });
    }
    let handed = volume::hand_over(tx, &host.name)?;
    let mut message = match volume::left_on(tx, &host.name) {
        0 => "forgotten".to_owned(),
        left => format!("forgotten, with {left} volumes that are nowhere else"),
    };
    if handed > 0 {
        message = format!("{message}; {handed} volumes in shared pools stay with other hosts");
    }
    tx.event(EventKind::Host, "HostDeleted", &host.name, message, None);
    tx.delete_host(&host.name);
    Ok(Outcome::HostDeleted)
}
