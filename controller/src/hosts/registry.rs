//! Registration and reports of hosts, as changes of the state. Called by `api::registrar` inside transactions.

use std::collections::BTreeMap;

use dalgu_proto::{
    host::{Inventory, Usage},
    ids::{ClusterId, HostName, Session},
    mutant::{self, Mutant},
};
use tokio::time::Instant;

use crate::{
    agent_wire::Reported,
    model::{EventKind, HostLive, HostRecord, HostState, Unmanaged},
    placement::default_reserved_memory_mib,
    reconcile::apply::{self, Extent},
    state::Tx,
};

/// Virtual processors per logical one where the operator does not say.
pub const DEFAULT_OVERCOMMIT: f64 = 4.0;

/// An agent introduces itself.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The host.
    pub host: HostName,
    /// Where the agent listens.
    pub address: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// This run of the agent.
    pub run_id: String,
    /// Its version.
    pub agent_version: String,
    /// What the host is made of.
    pub inventory: Inventory,
    /// First sample.
    pub usage: Option<Usage>,
    /// VMs there.
    pub vms: Vec<Reported>,
    /// Whether both lists are complete.
    pub complete: bool,
    /// Other domains there.
    pub unmanaged: Vec<Unmanaged>,
    /// It has no working hypervisor.
    pub hypervisor_error: Option<String>,
    /// Session it last worked in.
    pub session: Session,
    /// Site it last worked for.
    pub cluster_id: Option<ClusterId>,
}

/// An agent reports.
#[derive(Debug, Clone)]
pub struct Report {
    /// The host.
    pub host: HostName,
    /// Session it works in.
    pub session: Session,
    /// The kernel's boot id.
    pub boot_id: String,
    /// This run of the agent.
    pub run_id: String,
    /// Number of the report.
    pub sequence: u64,
    /// Sample.
    pub usage: Option<Usage>,
    /// VMs there.
    pub vms: Vec<Reported>,
    /// Whether both lists are complete.
    pub complete: bool,
    /// Other domains there.
    pub unmanaged: Vec<Unmanaged>,
    /// It has no working hypervisor.
    pub hypervisor_error: Option<String>,
    /// What the host is made of, when that has changed.
    pub inventory: Option<Inventory>,
}

/// Why an agent is turned away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It belongs to another site.
    #[error(
        "host {host} belongs to site {theirs}, this is site {ours}: set up the agent anew to move it here"
    )]
    OtherSite {
        /// The host.
        host: HostName,
        /// Its site.
        theirs: ClusterId,
        /// This site.
        ours: ClusterId,
    },
}

/// What follows from a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// It was taken over.
    Taken,
    /// It was older than what is known.
    Old,
    /// The agent must register first.
    Unknown,
}

/// Takes a host in, or takes it up again. Returns its session.
pub fn register(tx: &mut Tx, new: Registration) -> Result<Session, Error> {
    let ours = tx.meta.cluster_id;
    if let Some(theirs) = new.cluster_id.filter(|theirs| *theirs != ours) {
        return Err(Error::OtherSite {
            host: new.host,
            theirs,
            ours,
        });
    }
    let old = tx.hosts.get(&new.host).cloned();
    let first = old.is_none();
    let mut record = old
        .as_ref()
        .map_or_else(|| blank(&new, tx.now()), |old| (**old).clone());
    // An agent that remembers a later session has seen a controller whose store was lost since.
    record.session = record.session.max(new.session);
    record.address.clone_from(&new.address);
    record.boot_id.clone_from(&new.boot_id);
    record.agent_version.clone_from(&new.agent_version);
    record.inventory = keep(&record.inventory, new.inventory);
    let session = record.session;
    if old.as_deref() != Some(&record) {
        tx.put_host(record);
    }
    let old_live = tx.live.get(&new.host).cloned();
    let before = old_live.as_ref().map(|live| live.state);
    if first {
        tx.event(
            EventKind::Host,
            "HostRegistered",
            &new.host,
            format!("registered from {}", new.address),
            None,
        );
    }
    if before != Some(HostState::Ready) {
        tx.event(EventKind::Host, "HostReady", &new.host, "reports in time", None);
    }
    let live = HostLive {
        state: HostState::Ready,
        run_id: new.run_id,
        sequence: 0,
        report_time: Some(tx.now()),
        heard: Instant::now(),
        usage: new.usage,
        unmanaged: match old_live {
            Some(live) if !new.complete => live.unmanaged.clone(),
            _ => new.unmanaged,
        },
        complete: new.complete,
        hypervisor_error: new.hypervisor_error,
    };
    tx.set_live(new.host.clone(), live);
    let refused: Vec<_> = tx
        .host_vms
        .get(&new.host)
        .into_iter()
        .flatten()
        .copied()
        .collect();
    for vm in refused {
        tx.refuse(vm, None);
    }
    let extent = if new.complete {
        Extent::NewRun
    } else {
        Extent::NewRunPartial
    };
    apply::apply(tx, &new.host, new.vms, extent);
    tx.touch_host(&new.host);
    Ok(session)
}

fn blank(new: &Registration, now: jiff::Timestamp) -> HostRecord {
    HostRecord {
        name: new.host.clone(),
        address: new.address.clone(),
        labels: BTreeMap::new(),
        cpu_overcommit_ratio: DEFAULT_OVERCOMMIT,
        reserved_memory_mib: default_reserved_memory_mib(new.inventory.memory_bytes >> 20),
        cordon: None,
        session: Session(1),
        boot_id: new.boot_id.clone(),
        inventory: new.inventory.clone(),
        agent_version: new.agent_version.clone(),
        create_time: now,
        revision: 0,
    }
}

/// The new inventory, or the old one where only the free room of pools differs: that changes all the time, is in every
/// sample, and is not worth a write. What the hypervisor said of itself is kept while it says nothing.
fn keep(old: &Inventory, mut new: Inventory) -> Inventory {
    if new.hypervisor.is_empty() {
        new.hypervisor.clone_from(&old.hypervisor);
        new.accelerator.clone_from(&old.accelerator);
        new.accelerator_reason.clone_from(&old.accelerator_reason);
    }
    let mut bare = old.clone();
    for pool in bare.pools.iter_mut().chain(&mut new.pools) {
        pool.available_bytes = 0;
    }
    if bare == new {
        return old.clone();
    }
    new
}

/// Takes a report over.
pub fn report(tx: &mut Tx, new: Report) -> Receipt {
    let (Some(record), Some(live)) = (tx.hosts.get(&new.host).cloned(), tx.live.get(&new.host).cloned())
    else {
        return Receipt::Unknown;
    };
    if record.session != new.session || live.run_id != new.run_id || record.boot_id != new.boot_id {
        return Receipt::Unknown;
    }
    if new.sequence <= live.sequence && !mutant::on(Mutant::OldReportsCount) {
        return Receipt::Old;
    }
    if let Some(inventory) = new.inventory {
        let inventory = keep(&record.inventory, inventory);
        if inventory != record.inventory {
            tx.put_host(HostRecord {
                inventory,
                ..(*record).clone()
            });
        }
    }
    let back = live.state != HostState::Ready;
    if back {
        tx.event(
            EventKind::Host,
            "HostReady",
            &new.host,
            "reports in time again",
            None,
        );
    }
    let unmanaged = if new.complete {
        new.unmanaged
    } else {
        live.unmanaged.clone()
    };
    let next = HostLive {
        state: HostState::Ready,
        run_id: new.run_id,
        sequence: new.sequence,
        report_time: Some(tx.now()),
        heard: Instant::now(),
        usage: new.usage.or_else(|| live.usage.clone()),
        unmanaged,
        complete: new.complete,
        hypervisor_error: new.hypervisor_error,
    };
    tx.set_live(new.host.clone(), next);
    apply::apply(
        tx,
        &new.host,
        new.vms,
        if new.complete {
            Extent::Complete
        } else {
            Extent::Partial
        },
    );
    if back {
        tx.touch_host(&new.host);
    }
    Receipt::Taken
}

/// Declares that nothing a host was told so far is valid any more: its agent must register again before it obeys. To be
/// called when a host has been fenced, in the transaction that gives its VMs to others.
pub fn raise_session(tx: &mut Tx, host: &HostName) -> Option<Session> {
    let mut record = (**tx.hosts.get(host)?).clone();
    record.session = record.session.next();
    let session = record.session;
    tx.put_host(record);
    Some(session)
}

/// Marks hosts that have been silent for too long. Nothing else follows: their VMs probably run.
pub fn mark_silent(tx: &mut Tx, hosts: &[HostName], limit: std::time::Duration) {
    for name in hosts {
        let Some(live) = tx.live.get(name).cloned() else {
            continue;
        };
        if live.state == HostState::Unreachable || live.heard.elapsed() < limit {
            continue;
        }
        let message = format!(
            "no report for {} s; its VMs probably run on",
            live.heard.elapsed().as_secs()
        );
        tx.set_live(
            name.clone(),
            HostLive {
                state: HostState::Unreachable,
                ..(*live).clone()
            },
        );
        tx.event(EventKind::Host, "HostUnreachable", name, message, None);
        tx.touch_host(name);
    }
}

#[cfg(test)]
mod tests;
