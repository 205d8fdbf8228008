//! What must hold at every moment and at rest, whatever went wrong: the invariants of docs/failure-modes.md.
//!
//! Looks at the stored state, at the hypervisors and at the ledgers, each from outside. Remembers what it saw before, so
//! that what may only rise is seen to rise. Decides nothing and changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use dalgu_agent::{
    hypervisor::DomainState,
    ledger::{self, Disposition},
};
use dalgu_controller::{
    model::{HostRecord, MigrationRecord, OperationKind, OperationRecord, OperationState, VmRecord},
    state::State,
};
use dalgu_proto::{
    ids::{Epoch, Generation, HostName, OperationId, Session, Term, VmId},
    vm::{PowerReason, PowerState},
};

/// Something that must never be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Number of the invariant, for example "I1".
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
}

/// Names of the invariants that are checked, with how often each was.
pub type Checks = BTreeMap<&'static str, u64>;

/// The newest generation that was told of each VM, by its UUID.
pub type Known = BTreeMap<String, u64>;

/// What a hypervisor has, seen without asking it.
pub type Domains = Vec<(VmId, DomainState, PowerReason)>;

/// A request that a client has sent.
#[derive(Debug, Clone)]
pub struct Sent {
    /// What it asked for.
    pub kind: OperationKind,
    /// The operation that was answered, once one was.
    pub operation: Option<OperationId>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Checker {
    /// What was violated.
    pub violations: Vec<Violation>,
    /// How often what was checked.
    pub checks: Checks,
    /// Requests by their id.
    pub sent: BTreeMap<String, Sent>,
    term: Term,
    revision: u64,
    epochs: BTreeMap<VmId, Epoch>,
    generations: BTreeMap<VmId, Generation>,
    sessions: BTreeMap<HostName, Session>,
    /// What the owner wanted, by generation: an agent may be behind, but never follow what was never wanted.
    intents: BTreeMap<(VmId, Generation), PowerState>,
    /// The operation of each request.
    operations: BTreeMap<String, OperationId>,
    last_operation: Option<OperationId>,
    /// Operations that had ended, and how.
    ended: BTreeMap<OperationId, OperationState>,
    /// VMs that a client was told of.
    acknowledged: BTreeSet<VmId>,
    /// VMs that somebody asked to delete.
    deleted: BTreeSet<VmId>,
    /// Reads and acknowledged writes of each VM by when their answer came, with the generation they told of.
    known: Known,
}

impl Checker {
    fn check(&mut self, invariant: &'static str, holds: bool, what: impl FnOnce() -> String) {
        *self.checks.entry(invariant).or_default() += 1;
        if !holds && self.violations.len() < 10 {
            let what = what();
            self.violations.push(Violation { invariant, what });
        }
    }

    /// I1: no VM runs on two hosts.
    pub fn census(&mut self, hosts: &[Domains]) {
        let mut running: Vec<(VmId, usize)> = Vec::new();
        for (host, domains) in hosts.iter().enumerate() {
            let alive = domains
                .iter()
                .filter(|(_, state, _)| *state == DomainState::Running);
            running.extend(alive.map(|(id, ..)| (*id, host)));
        }
        running.sort_unstable();
        let twice = running
            .windows(2)
            .find(|pair| pair[0].0 == pair[1].0)
            .map(|pair| {
                let (first, second) = (pair[0].1 + 1, pair[1].1 + 1);
                format!("VM {} runs on h{first} and on h{second}", pair[0].0)
            });
        self.check("I1 one running copy", twice.is_none(), || {
            twice.unwrap_or_default()
        });
    }

    /// What was stored: numbers only rise, nothing is promised twice, nothing is done that nobody asked for.
    pub fn stored(&mut self, state: &State) {
        let meta = &state.meta;
        let risen = meta.term >= self.term && meta.revision >= self.revision;
        let (term, revision) = (self.term, self.revision);
        self.check("I6 numbers only rise", risen, || {
            format!(
                "term {term:?} to {:?}, revision {revision} to {}",
                meta.term, meta.revision
            )
        });
        if meta.revision == self.revision && meta.term == self.term {
            return;
        }
        self.term = meta.term;
        let since = std::mem::replace(&mut self.revision, meta.revision);
        for vm in state.vms.values().filter(|vm| vm.revision > since) {
            self.vm(vm);
        }
        for host in state.hosts.values().filter(|host| host.revision > since) {
            let known = self.sessions.get(&host.name).copied().unwrap_or_default();
            self.check("I6 numbers only rise", host.session >= known, || {
                format!("session of {} from {known:?} to {:?}", host.name, host.session)
            });
            self.sessions.insert(host.name.clone(), host.session);
        }
        self.capacity(state);
        self.requests(state);
    }

    fn vm(&mut self, vm: &VmRecord) {
        let epoch = self.epochs.get(&vm.id).copied().unwrap_or_default();
        let generation = self.generations.get(&vm.id).copied().unwrap_or_default();
        let risen = vm.epoch >= epoch && vm.intent.generation >= generation;
        self.check("I6 numbers only rise", risen, || {
            format!(
                "VM {}: epoch {epoch:?} to {:?}, generation {generation:?} to {:?}",
                vm.name, vm.epoch, vm.intent.generation
            )
        });
        self.epochs.insert(vm.id, vm.epoch);
        self.generations.insert(vm.id, vm.intent.generation);
        self.intents
            .insert((vm.id, vm.intent.generation), vm.intent.power);
    }

    /// I5: what is promised on a host is the sum of what holds a place there, and never more than there is.
    fn capacity(&mut self, state: &State) {
        let mut promised: BTreeMap<&HostName, (u64, u64)> = BTreeMap::new();
        for vm in state.vms.values() {
            for host in holders(vm, state.active_migration(vm.id)) {
                let sum = promised.entry(host).or_default();
                sum.0 += u64::from(vm.spec.vcpus);
                sum.1 += vm.spec.memory_mib;
            }
        }
        for host in state.hosts.values() {
            let (vcpus, memory) = promised.get(&host.name).copied().unwrap_or_default();
            let counted = state
                .reserved
                .get(&host.name)
                .map_or(0, |reserved| reserved.vcpus);
            self.check(
                "I5 reservations are the sum of specifications",
                counted == vcpus,
                || format!("{}: {counted} vCPUs counted, VMs have {vcpus}", host.name),
            );
            let (most_vcpus, most_memory) = limits(host);
            self.check(
                "I5 no host is over-committed",
                vcpus <= most_vcpus && memory <= most_memory,
                || {
                    format!(
                        "{}: {vcpus} of {most_vcpus} vCPUs, {memory} of {most_memory} MiB",
                        host.name
                    )
                },
            );
        }
    }

    /// I8: one request, one effect. Operations end once. Each was asked for.
    fn requests(&mut self, state: &State) {
        let new: Vec<_> = match self.last_operation {
            None => state.operations.values().cloned().collect(),
            Some(last) => state
                .operations
                .range(last..)
                .map(|(_, operation)| operation.clone())
                .collect(),
        };
        for operation in new {
            self.last_operation = self.last_operation.max(Some(operation.id));
            let asked = self
                .sent
                .get(&operation.request_id)
                .is_some_and(|sent| sent.kind == operation.kind);
            self.check("I7 nothing is done that nobody asked for", asked, || {
                format!(
                    "operation {} ({}) of {} has no request",
                    operation.id,
                    operation.kind.as_str(),
                    operation.vm_name
                )
            });
            if operation.kind == OperationKind::Delete {
                self.deleted.insert(operation.vm);
            }
            let first = *self
                .operations
                .entry(operation.request_id.clone())
                .or_insert(operation.id);
            self.check("I8 one request, one effect", first == operation.id, || {
                format!(
                    "request {} made operations {first} and {}",
                    operation.request_id, operation.id
                )
            });
        }
    }

    /// A client was answered with an operation.
    pub fn answered(&mut self, request: &str, operation: OperationId) {
        let known = self.sent.get(request).and_then(|sent| sent.operation);
        self.check(
            "I8 one request, one effect",
            known.is_none_or(|known| known == operation),
            || format!("request {request} was answered with {known:?} and with {operation}"),
        );
        if let Some(sent) = self.sent.get_mut(request) {
            sent.operation = Some(operation);
        }
    }

    /// A VM that a client was told exists.
    pub fn acknowledge(&mut self, vm: VmId) {
        self.acknowledged.insert(vm);
    }

    /// What answers have told of so far, before a request is made.
    pub fn known(&self) -> Known {
        self.known.clone()
    }

    /// I9: the answer to a read or to a write of a VM has come; `least` is what was known when it was asked for, and no
    /// answer may be older than that.
    pub fn read(&mut self, uid: &str, generation: u64, least: u64) {
        self.check("I9 reads are never stale", generation >= least, || {
            format!("VM {uid}: generation {generation} was read after {least} had been answered")
        });
        let known = self.known.entry(uid.to_owned()).or_default();
        *known = generation.max(*known);
    }

    /// What an agent writes into its ledger: numbers only rise, and its intents were the owner's.
    pub fn ledger(&mut self, host: usize, old: Option<&ledger::Vm>, new: &ledger::Vm) {
        let risen = old.is_none_or(|old| new.epoch >= old.epoch && new.generation >= old.generation);
        self.check("I6 numbers only rise", risen, || {
            let old = old.map(|old| (old.epoch, old.generation));
            format!(
                "h{}: ledger of {} from {old:?} to {:?}",
                host + 1,
                new.name,
                (new.epoch, new.generation)
            )
        });
        if let Some(intent) = &new.intent {
            let wanted = self.intents.get(&(new.id, intent.generation)).copied();
            // What has just been stored is looked at before the next commit only.
            self.check(
                "I7 nothing is done that nobody asked for",
                wanted.is_none_or(|wanted| wanted == intent.power),
                || {
                    format!(
                        "h{}: {} is told {:?} in generation {:?}, its owner wanted {wanted:?}",
                        host + 1,
                        new.name,
                        intent.power,
                        intent.generation
                    )
                },
            );
        }
    }

    /// I7: what is about to be done to a VM is what the ledger says; `entries` are what may be in it.
    pub fn change(
        &mut self,
        host: usize,
        call: &str,
        id: VmId,
        state: Option<DomainState>,
        entries: &[Option<ledger::Vm>],
    ) {
        let fine = entries.iter().any(|entry| allows(call, state, entry.as_ref()));
        self.check(
            "I7 no VM is started or stopped against its owner's will",
            fine,
            || {
                let says = entries.iter().flatten();
                let says: Vec<_> = says
                    .map(|vm| (vm.disposition, vm.intent.as_ref().map(|intent| intent.power)))
                    .collect();
                format!(
                    "h{}: {call} of {id} ({state:?}), the ledger says {says:?}",
                    host + 1
                )
            },
        );
    }

    /// At rest: what was asked for is what is, and nothing else is there. An error says what is not so yet.
    pub fn at_rest(
        &mut self,
        state: &State,
        hosts: &[(HostName, Domains, usize)],
        off: &BTreeSet<VmId>,
    ) -> Result<(), Violation> {
        let wrong = |invariant, what: String| Err(Violation { invariant, what });
        for operation in state.operations.values() {
            if operation.is_active() {
                return wrong(
                    "I3 every operation ends",
                    format!(
                        "{} of {} ({}) is active",
                        operation.kind.as_str(),
                        operation.vm_name,
                        operation.id
                    ),
                );
            }
        }
        if let Some(id) = state.active_migrations.values().next() {
            return wrong("I3 every operation ends", format!("migration {id} has not ended"));
        }
        for id in &self.acknowledged {
            let gone = state.vms.get(id).is_none();
            if gone && !self.deleted.contains(id) {
                return wrong(
                    "I2 nothing acknowledged is lost",
                    format!("VM {id} is gone, and nobody asked for that"),
                );
            }
        }
        for (request, sent) in &self.sent {
            if let Some(operation) = sent.operation
                && !state.operations.contains_key(&operation)
            {
                return wrong(
                    "I2 nothing acknowledged is lost",
                    format!("operation {operation} of request {request} is gone"),
                );
            }
        }
        let mut owned = BTreeMap::<&HostName, usize>::new();
        for vm in state.vms.values() {
            if vm.delete_time.is_some() {
                return wrong(
                    "I3 desired is actual",
                    format!("{} is still being deleted", vm.name),
                );
            }
            *owned.entry(&vm.owner).or_default() += 1;
            placed(state, vm, hosts, off)?;
        }
        for (host, domains, volumes) in hosts {
            let mine = owned.get(host).copied().unwrap_or(0);
            for (id, domain, _) in domains {
                if state.vms.get(id).is_none_or(|vm| vm.owner != *host) {
                    return wrong(
                        "I4 nothing without an owner",
                        format!("{host} has a domain {id} ({domain:?}) that is not its own"),
                    );
                }
            }
            if *volumes != mine {
                return wrong(
                    "I4 nothing without an owner",
                    format!("{host} has {volumes} disks for {mine} VMs"),
                );
            }
        }
        for check in [
            "I2 nothing acknowledged is lost",
            "I3 every operation ends",
            "I3 desired is actual",
            "I4 nothing without an owner",
            "I13 status is what is",
        ] {
            self.check(check, true, String::new);
        }
        Ok(())
    }

    /// I2, I3: operations that have ended stay as they ended.
    pub fn endings(&mut self, state: &State) {
        // Whoever cancels a creation wants the VM gone.
        let cancelled = |operation: &&Arc<OperationRecord>| {
            operation.kind == OperationKind::Create && operation.cancel_requested
        };
        self.deleted.extend(
            state
                .operations
                .values()
                .filter(cancelled)
                .map(|operation| operation.vm),
        );

        for operation in state
            .operations
            .values()
            .filter(|operation| !operation.is_active())
        {
            let before = *self.ended.entry(operation.id).or_insert(operation.state);
            let same = before == operation.state;
            let (id, now) = (operation.id, operation.state);
            self.check("I3 an operation ends once", same, || {
                format!("operation {id} ended as {before:?}, and now as {now:?}")
            });
        }
    }
}

/// Whether a ledger's entry asks for a call: journalled before it is done, and never for a VM that is another host's.
fn allows(call: &str, state: Option<DomainState>, entry: Option<&ledger::Vm>) -> bool {
    let wanted = entry.and_then(|vm| vm.intent.as_ref()).map(|intent| intent.power);
    let disposition = entry.map(|vm| vm.disposition);
    let owned = disposition == Some(Disposition::Owned);
    match call {
        "start" | "reset" | "reboot" => {
            owned && matches!(wanted, Some(PowerState::Running | PowerState::Paused))
        }
        "destroy" | "shutdown" if state == Some(DomainState::Running) => {
            disposition == Some(Disposition::Deleting) || (owned && wanted == Some(PowerState::Stopped))
        }
        "pause" => owned && wanted == Some(PowerState::Paused),
        "undefine" => !owned || wanted.is_none(),
        _ => true,
    }
}

/// Where a VM holds a place.
fn holders<'a>(vm: &'a VmRecord, migration: Option<&'a Arc<MigrationRecord>>) -> BTreeSet<&'a HostName> {
    let mut holders = BTreeSet::from([&vm.owner]);
    holders.extend(
        migration
            .into_iter()
            .flat_map(|migration| [&migration.source, &migration.destination]),
    );
    holders
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "small numbers"
)]
fn limits(host: &HostRecord) -> (u64, u64) {
    let vcpus = (f64::from(host.inventory.cpus) * host.cpu_overcommit_ratio) as u64;
    let memory = (host.inventory.memory_bytes >> 20).saturating_sub(host.reserved_memory_mib);
    (vcpus, memory)
}

/// The VM is on its owner, as it should be, and shown as it is.
fn placed(
    state: &State,
    vm: &VmRecord,
    hosts: &[(HostName, Domains, usize)],
    off: &BTreeSet<VmId>,
) -> Result<(), Violation> {
    let wrong = |invariant, what: String| Err(Violation { invariant, what });
    let domains = hosts
        .iter()
        .find(|(name, ..)| *name == vm.owner)
        .map(|(_, domains, _)| domains);
    let domain = domains.and_then(|domains| domains.iter().find(|(id, ..)| *id == vm.id));
    let Some((_, seen, reason)) = domain else {
        return wrong(
            "I3 desired is actual",
            format!("{} is not on its owner {}", vm.name, vm.owner),
        );
    };
    let wanted = match vm.intent.power {
        PowerState::Running => DomainState::Running,
        PowerState::Paused => DomainState::Paused,
        PowerState::Stopped => DomainState::Stopped,
    };
    // A guest that powered itself off stays off, and one that crashes again and again is given up.
    let by_itself = *seen == DomainState::Stopped && off.contains(&vm.id);
    if *seen != wanted && !by_itself {
        return wrong(
            "I3 desired is actual",
            format!(
                "{} on {} is {seen:?} ({reason:?}), not {wanted:?}",
                vm.name, vm.owner
            ),
        );
    }
    let shown = state.observation(vm).and_then(|observation| observation.power);
    let same = matches!(
        (shown, seen),
        (Some(PowerState::Running), DomainState::Running)
            | (Some(PowerState::Paused), DomainState::Paused)
            | (Some(PowerState::Stopped), DomainState::Stopped)
    );
    if !same {
        return wrong(
            "I13 status is what is",
            format!("{} is {seen:?} and is shown as {shown:?}", vm.name),
        );
    }
    Ok(())
}
