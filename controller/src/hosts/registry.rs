//! Registration and reports of hosts, as changes of the state. Called by `api::registrar` inside transactions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use dalgu_proto::{
    host::{Inventory, Usage},
    ids::{ClusterId, HostName, Session, Term},
    mutant::{self, Mutant},
};
use tokio::time::Instant;
use uuid::Uuid;

use super::pools;
use crate::{
    agent_wire::Reported,
    incarnation,
    model::{EventKind, HostLive, HostRecord, HostState, ImageStock, Pressure, Rival, Unmanaged},
    placement::{Strain, UsageView, default_reserved_memory_mib},
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
    /// The machine's own id; empty where it has none.
    pub machine_id: String,
    /// The machine whose agent has written the state that this one found; empty for new state.
    pub state_machine_id: String,
    /// The controller that it obeys: term, and run where it knows it.
    pub controller: (Term, Option<Uuid>),
    /// Number among the registrations and reports of its run; absent from older agents.
    pub sequence: Option<u64>,
    /// What is there of images, if it is known.
    pub images: Option<ImageStock>,
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
    /// Number among the registrations and reports of its run; with older agents, since the last registration.
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
    /// What is there of images, when that has changed.
    pub images: Option<ImageStock>,
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
    /// The host is another machine, or the agent's state is another machine's.
    #[error(
        "host {host} is machine {known}, this is machine {given}: one of them has the other's certificate or data directory. \
         Give each machine a name, a certificate and an empty data directory of its own; a machine that was set up anew gets its \
         old /etc/machine-id back"
    )]
    OtherMachine {
        /// The host.
        host: HostName,
        /// The machine that it is.
        known: String,
        /// The one that was refused.
        given: String,
    },
    /// The host is heard from under another boot. It is taken up when that has fallen silent, as after a reboot it has.
    #[error(
        "host {host} is heard from under another boot, {known}: this one, {given}, is taken up once that has been silent for a \
         while. If it is not silent, two machines have one identity"
    )]
    OtherBoot {
        /// The host.
        host: HostName,
        /// The boot that is heard.
        known: String,
        /// The one that was refused.
        given: String,
    },
}

impl Error {
    /// Stable reason for programs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::OtherSite { .. } => "WRONG_CLUSTER",
            Self::OtherMachine { .. } => "OTHER_MACHINE",
            Self::OtherBoot { .. } => "OTHER_BOOT",
        }
    }
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

/// Takes a host in, or takes it up again. Returns its session. Where it refuses, what it has changed is only what is
/// remembered of the refusal.
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
    if let Err(error) = one_machine(old.as_deref(), tx.live.get(&new.host).map(AsRef::as_ref), &new) {
        note_rival(tx, &new, &error);
        return Err(error);
    }
    if let (Some(old), Some(live)) = (&old, tx.live.get(&new.host))
        && live.run_id == new.run_id
        && new.sequence.is_some_and(|sequence| sequence <= live.sequence)
    {
        // It was held up on its way: the run has told more since, and does not wait for the answer.
        return Ok(old.session);
    }
    if let Some(said) = other_controller(tx, &new) {
        tx.set_replaced(said);
    }
    let first = old.is_none();
    let mut record = old
        .as_ref()
        .map_or_else(|| blank(&new, tx), |old| (**old).clone());
    // Of a host that has not heard the session which a restored controller began with, the list may be from before: its
    // reports bear the session, and tell all again.
    let heard = tx.meta.restores() == 0 || new.session == record.session;
    // An agent that remembers a later session has seen a controller whose store was lost since.
    record.session = record.session.max(new.session);
    record.address.clone_from(&new.address);
    record.boot_id.clone_from(&new.boot_id);
    if !new.machine_id.is_empty() {
        record.machine_id.clone_from(&new.machine_id);
    }
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
    let known_images = old_live.as_ref().and_then(|live| live.images.clone());
    let same_run = old_live.as_ref().filter(|live| live.run_id == new.run_id);
    let sampled = new.usage.as_ref().map(|usage| usage.pools.clone());
    let pressure = pressed(tx, &new.host, new.usage.as_ref());
    let live = HostLive {
        state: HostState::Ready,
        networks: same_run.map_or(0, |live| live.networks),
        cpus_expected: old_live.as_ref().and_then(|live| live.cpus_expected),
        lately: old_live.as_ref().and_then(|live| live.lately),
        overcommit: old_live.as_ref().map(|live| live.overcommit).unwrap_or_default(),
        run_id: new.run_id,
        sequence: new.sequence.unwrap_or(0),
        report_time: Some(tx.now()),
        heard: Instant::now(),
        usage: new.usage,
        unmanaged: match old_live {
            Some(live) if !new.complete => live.unmanaged.clone(),
            _ => new.unmanaged,
        },
        complete: new.complete,
        hypervisor_error: new.hypervisor_error,
        rival: None,
        images: new.images.map(Arc::new).or(known_images),
        pressure,
    };
    tx.set_live(new.host.clone(), live);
    pools::note(tx, &new.host, &sampled.unwrap_or_default());
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
    let extent = if new.complete && heard {
        Extent::NewRun
    } else {
        Extent::NewRunPartial
    };
    apply::apply(tx, &new.host, new.vms, extent);
    tx.touch_host(&new.host);
    Ok(session)
}

/// The other controller with this site's credentials that a host obeys, if it does. It does so also when this is heard late:
/// the terms that it has heard of only rise, and each is one run's.
fn other_controller(tx: &Tx, new: &Registration) -> Option<String> {
    let (host, (theirs, run), ours) = (&new.host, new.controller, tx.meta.term);
    if theirs > ours {
        return Some(format!(
            "host {host} obeys a controller of term {theirs}, the term of this one, {ours}, is older than that"
        ));
    }
    let run = run.filter(|run| theirs == ours && *run != tx.run_id)?;
    Some(format!(
        "host {host} obeys run {run} of a controller of term {ours}, this is run {}: two controllers are running",
        tx.run_id
    ))
}

/// Whether who speaks is the machine, and the boot, that the host is. Two machines with one identity would both be told to
/// run its VMs, and the list of one would say of the other's that they are gone.
fn one_machine(old: Option<&HostRecord>, live: Option<&HostLive>, new: &Registration) -> Result<(), Error> {
    let known = old.map_or("", |old| &old.machine_id);
    for known in [known, &new.state_machine_id] {
        if !known.is_empty() && !new.machine_id.is_empty() && known != new.machine_id {
            return Err(Error::OtherMachine {
                host: new.host.clone(),
                known: known.to_owned(),
                given: new.machine_id.clone(),
            });
        }
    }
    match (old, live) {
        (Some(old), Some(live)) if old.boot_id != new.boot_id && live.state != HostState::Unreachable => {
            Err(Error::OtherBoot {
                host: new.host.clone(),
                known: old.boot_id.clone(),
                given: new.boot_id.clone(),
            })
        }
        _ => Ok(()),
    }
}

/// Remembers who was refused. Of another machine the operator is told at once; of another boot when the first speaks again,
/// since a host that has just been rebooted looks the same until then.
fn note_rival(tx: &mut Tx, new: &Registration, error: &Error) {
    let rival = Rival {
        machine_id: new.machine_id.clone(),
        boot_id: new.boot_id.clone(),
        address: new.address.clone(),
        told: matches!(error, Error::OtherMachine { .. }),
    };
    let live = tx.live.get(&new.host).cloned();
    if live.as_ref().is_some_and(|live| {
        let known = live.rival.as_ref();
        known.is_some_and(|known| (&known.machine_id, &known.boot_id) == (&rival.machine_id, &rival.boot_id))
    }) {
        return;
    }
    if rival.told {
        tell_of_rival(tx, &new.host, &rival);
    }
    if let Some(live) = live {
        tx.set_live(
            new.host.clone(),
            HostLive {
                rival: Some(rival),
                ..(*live).clone()
            },
        );
    }
}

fn tell_of_rival(tx: &mut Tx, host: &HostName, rival: &Rival) {
    let message = format!(
        "a second machine at {} has this host's identity and is refused (machine {}, boot {})",
        rival.address, rival.machine_id, rival.boot_id
    );
    tracing::error!(%host, address = rival.address, machine = rival.machine_id, boot = rival.boot_id,
        "a second machine has the identity of a host and is refused");
    tx.event(EventKind::Host, "HostIdentityCopied", host, message, None);
}

fn blank(new: &Registration, tx: &Tx) -> HostRecord {
    HostRecord {
        name: new.host.clone(),
        address: new.address.clone(),
        labels: BTreeMap::new(),
        taints: BTreeSet::new(),
        cpu_overcommit_ratio: DEFAULT_OVERCOMMIT,
        reserved_memory_mib: default_reserved_memory_mib(new.inventory.memory_bytes >> 20),
        vms_most: None,
        cordon: None,
        drain: None,
        power: None,
        // The site may have known the host before, and forgotten it or been restored: ahead of all sessions that it gave then.
        session: Session(
            tx.meta
                .restores()
                .saturating_mul(incarnation::JUMP)
                .max(tx.meta.forgotten_session.0)
                .saturating_add(1),
        ),
        boot_id: new.boot_id.clone(),
        machine_id: new.machine_id.clone(),
        inventory: new.inventory.clone(),
        agent_version: new.agent_version.clone(),
        create_time: tx.now(),
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
        new.guest_features.clone_from(&old.guest_features);
    }
    let bare = |inventory: &Inventory| {
        let mut bare = inventory.clone();
        for pool in &mut bare.pools {
            (pool.available_bytes, pool.used_bytes) = (0, 0);
        }
        bare
    };
    if bare(old) == bare(&new) {
        return old.clone();
    }
    new
}

/// Whether a host's load has closed it for new VMs, after a sample where there is one; the operator is told of a change.
fn pressed(tx: &mut Tx, host: &HostName, usage: Option<&Usage>) -> Pressure {
    let before = tx.live.get(host).map(|live| live.pressure).unwrap_or_default();
    let (Some(usage), Some(record)) = (usage, tx.hosts.get(host)) else {
        return before;
    };
    if !tx.close_pressed {
        return Pressure::default();
    }
    let memory_mib = record.inventory.ordinary_memory_bytes() >> 20;
    let usage = UsageView {
        lately: tx.live.get(host).and_then(|live| live.lately),
        ..UsageView::of(usage)
    };
    let strain = Strain::of(&usage, record.inventory.cpus, memory_mib);
    let after = before.after(strain, Instant::now(), tx.now());
    match (before.closed(), after.closed()) {
        (None, Some(_)) => {
            let message =
                "closed for new VMs: its VMs have been short of processors, memory or I/O for a minute";
            tx.event(EventKind::Host, "HostPressed", host, message, None);
        }
        (Some(_), None) => {
            let message = "open for new VMs again: its VMs have had what they need for five minutes";
            tx.event(EventKind::Host, "HostRelieved", host, message, None);
        }
        _ => {}
    }
    after
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
    let rival = live.rival.clone().map(|rival| {
        if !rival.told {
            tell_of_rival(tx, &new.host, &rival);
        }
        Rival { told: true, ..rival }
    });
    let unmanaged = if new.complete {
        new.unmanaged
    } else {
        live.unmanaged.clone()
    };
    let sampled = new.usage.as_ref().map(|usage| usage.pools.clone());
    let pressure = pressed(tx, &new.host, new.usage.as_ref());
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
        rival,
        images: new.images.map(Arc::new).or_else(|| live.images.clone()),
        networks: live.networks,
        pressure,
        overcommit: live.overcommit,
        cpus_expected: live.cpus_expected,
        lately: live.lately,
    };
    tx.set_live(new.host.clone(), next);
    pools::note(tx, &new.host, &sampled.unwrap_or_default());
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
        if tx.hosts.get(name).is_none_or(|host| !host.is_asleep()) {
            tx.event(EventKind::Host, "HostUnreachable", name, message, None);
        }
        tx.touch_host(name);
    }
}

#[cfg(test)]
mod tests;
