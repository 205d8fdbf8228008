//! What must hold at every moment and at rest, whatever went wrong: the invariants of docs/failure-modes.md.
//!
//! Looks at the stored state, at the hypervisors and at the ledgers, each from outside. Remembers what it saw before, so
//! that what may only rise is seen to rise. Decides nothing and changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use dalgu_agent::{
    hypervisor::DomainState,
    ledger::{self, Disposition, Intent},
};
use dalgu_controller::{
    doctor::{self, Finding, Invariant, Severity, View},
    model::{OperationKind, OperationRecord, OperationState, VmRecord},
    state::State,
};
use dalgu_proto::{
    ids::{Epoch, Generation, HostName, OperationId, Session, Term, VmId},
    vm::{PowerReason, PowerState},
};
use imbl::{OrdMap, ordmap::DiffItem};
use tokio::time::Instant;
use uuid::Uuid;

mod objects;

pub use objects::Holdings;

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

/// How new something is that was told of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Told {
    /// Number of the changes of what is wanted of it.
    pub generation: u64,
    /// Revision of its record, which changes with its labels too.
    pub revision: u64,
}

/// What a VM's record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// Desired power state.
    pub desired: i32,
    /// The request that has changed its labels last.
    pub touched: Option<Uuid>,
}

/// The newest that was told of each VM, by its UUID. A copy costs nothing.
pub type Known = OrdMap<String, Told>;

/// What a hypervisor has, seen without asking it.
pub type Domains = Vec<(VmId, DomainState, PowerReason)>;

/// A request that a client has sent.
#[derive(Debug, Clone)]
pub struct Sent {
    /// What it asked for.
    pub kind: OperationKind,
    /// The operation that was answered, once one was.
    pub operation: Option<OperationId>,
    /// Looks at all hypervisors that had been made by then.
    looks: u64,
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
    intents: BTreeMap<(VmId, Generation), Vec<PowerState>>,
    /// The operation of each request.
    operations: BTreeMap<String, OperationId>,
    last_operation: Option<OperationId>,
    /// Operations that drains and plans have made.
    of_hosts: BTreeSet<OperationId>,
    /// All operations, as they were when their endings were last looked at.
    looked_at: OrdMap<OperationId, Arc<OperationRecord>>,
    /// Operations that had ended, and how.
    ended: BTreeMap<OperationId, OperationState>,
    /// VMs that a client was told of.
    acknowledged: BTreeSet<VmId>,
    /// VMs that somebody asked to delete.
    deleted: BTreeSet<VmId>,
    /// Reads and acknowledged writes of each VM whose answer has come.
    known: Known,
    /// What was read of each VM under each generation, and under each revision.
    desires: BTreeMap<(String, u64), i32>,
    meanings: BTreeMap<(String, u64), Meaning>,
    /// Events that came to a watcher.
    watched: BTreeSet<u64>,
    /// Guests that shut themselves down, with the power request that they had run for.
    shut_down: BTreeMap<VmId, u64>,
    /// How often a look at all hypervisors showed something else than the one before.
    looks: u64,
    /// What the last one showed.
    domains: Vec<Domains>,
    /// The last look until which a VM ran on a host, by the host's number.
    ran: BTreeMap<(VmId, usize), u64>,
    /// Since which look a VM's memory is there and frozen.
    frozen: BTreeMap<(VmId, usize), u64>,
    /// The last of these looks that saw a VM in this power state, as its number.
    seen: BTreeMap<(VmId, u8), u64>,
    /// Power request for which a VM was last started.
    started: BTreeMap<VmId, u64>,
    /// Of each host and term: lists of what is there that the controller has begun to take over and has taken over.
    lists: BTreeMap<(usize, Term), (u64, u64)>,
    /// Highest session and term that each host's agent is known to know.
    heard: BTreeMap<usize, (Session, Term)>,
    /// The run of the controller that each host's agent obeys in a term.
    runs: BTreeMap<(usize, Term), String>,
    /// Since when a controller, in its term, has known that it is refused for another.
    refused: BTreeMap<(usize, Term), Instant>,
    /// Requests that were refused, and in which term.
    turned_away: BTreeMap<String, Term>,
    /// Operations that a restored controller does not know.
    forgotten: BTreeSet<OperationId>,
    /// VMs that a restored controller does not know.
    unknown: BTreeSet<VmId>,
    /// VMs that were on some host when the controller was restored.
    present: BTreeSet<VmId>,
    /// VMs that a restored controller has not taken over yet.
    unconfirmed: BTreeSet<VmId>,
    /// What is promised on hosts that had no room left for a VM which was taken over there: it is on them, and a VM that is
    /// gone may still be thought to be.
    taken_over: BTreeMap<HostName, (u64, u64)>,
    /// Of what is not a VM.
    objects: objects::Objects,
}

/// A controller that was refused ends what it had begun within this time: two calls with their deadlines.
const LAST_COMMANDS: Duration = Duration::from_secs(22);

/// Operations that drains and plans, which somebody asked for, have made. Each is there from the same change on.
fn of_hosts(state: &State) -> impl Iterator<Item = OperationId> {
    let drains = state.hosts.values().filter_map(|host| host.drain.as_ref());
    let drains = drains
        .flat_map(|drain| drain.vms.values())
        .filter_map(|vm| vm.operation);
    let plans = state.plans.values().flat_map(|plan| &plan.steps);
    drains.chain(plans.filter_map(|step| step.operation))
}

impl Checker {
    fn check(&mut self, invariant: &'static str, holds: bool, what: impl FnOnce() -> String) {
        *self.checks.entry(invariant).or_default() += 1;
        if !holds && self.violations.len() < 10 {
            let what = what();
            self.violations.push(Violation { invariant, what });
        }
    }

    /// I12: a controller is refused only for terms that another has reached.
    pub fn refused_again(&mut self, times: u64, behind: u64) {
        let fine = times <= behind;
        self.check("I12 who has the highest term is not refused", fine, || {
            format!("refused at its start {times}, although the other was {behind} ahead")
        });
    }

    /// I1: no VM runs on two hosts.
    pub fn census(&mut self, hosts: Vec<Domains>) {
        if hosts == self.domains {
            // What there is to say of it has been said.
            self.check("I1 one running copy", true, String::new);
            return;
        }
        self.looks += 1;
        for (id, state, _) in hosts.iter().flatten() {
            if let Some(power) = power(*state) {
                self.seen.insert((*id, power as u8), self.looks);
            }
        }
        let running = hosts.iter().enumerate().flat_map(|(host, domains)| {
            let alive = domains
                .iter()
                .filter(|(_, state, _)| *state == DomainState::Running);
            alive.map(move |(id, ..)| (*id, host))
        });
        let twice = doctor::twice(running)
            .map(|(vm, first, second)| format!("VM {vm} runs on h{} and on h{}", first + 1, second + 1));
        self.check("I1 one running copy", twice.is_none(), || {
            twice.unwrap_or_default()
        });
        self.memories(&hosts);
        self.domains = hosts;
    }

    /// I1: a memory that was frozen while another copy of the VM ran does not go on: the disks are newer.
    fn memories(&mut self, hosts: &[Domains]) {
        let looks = self.looks;
        for (host, domains) in self.domains.iter().enumerate() {
            let running = domains
                .iter()
                .filter(|(_, state, _)| *state == DomainState::Running);
            self.ran.extend(running.map(|(id, ..)| ((*id, host), looks)));
        }
        let mut frozen = BTreeMap::new();
        let mut overtaken = None;
        for (host, domains) in hosts.iter().enumerate() {
            for (id, state, _) in domains {
                let since = self.frozen.get(&(*id, host)).copied();
                match state {
                    DomainState::Paused => drop(frozen.insert((*id, host), since.unwrap_or(looks))),
                    DomainState::Running => {
                        let of_vm = self.ran.range((*id, 0)..=(*id, usize::MAX));
                        let mut others = of_vm.filter(|((_, other), _)| *other != host);
                        if let Some(since) = since
                            && let Some(((_, other), _)) = others.find(|(_, ran)| **ran > since)
                        {
                            overtaken = Some((*id, host, *other));
                        }
                    }
                    _ => {}
                }
            }
        }
        self.frozen = frozen;
        self.check(
            "I1 no older memory goes on",
            overtaken.is_none(),
            || match overtaken {
                Some((vm, host, other)) => format!(
                    "VM {vm} goes on, on h{}, with what was frozen there while it ran on h{}",
                    host + 1,
                    other + 1
                ),
                None => String::new(),
            },
        );
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
        let mut takes_over = false;
        for vm in state.vms.values().filter(|vm| vm.revision > since) {
            self.vm(vm);
            takes_over |= !vm.unconfirmed && self.unconfirmed.remove(&vm.id);
        }
        for host in state.hosts.values().filter(|host| host.revision > since) {
            let known = self.sessions.get(&host.name).copied().unwrap_or_default();
            self.check("I6 numbers only rise", host.session >= known, || {
                format!("session of {} from {known:?} to {:?}", host.name, host.session)
            });
            self.sessions.insert(host.name.clone(), host.session);
        }
        self.capacity(state, takes_over);
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
        self.wanted(vm);
    }

    fn wanted(&mut self, vm: &VmRecord) {
        let wanted = self.intents.entry((vm.id, vm.intent.generation)).or_default();
        if !wanted.contains(&vm.intent.power) {
            wanted.push(vm.intent.power);
        }
    }

    /// What a copy of the controller has stored: what its owner wanted there was wanted too.
    pub fn copy_stored(&mut self, state: &State) {
        state.vms.values().for_each(|vm| self.wanted(vm));
    }

    /// The controller is restored from a backup, and `new` is what it begins with; `there` is on some host. Its numbers are
    /// ahead of all that were given out. What was told after the backup it may not know; no VM may be lost for that.
    pub fn restored(&mut self, new: &State, there: &BTreeSet<VmId>) {
        let meta = &new.meta;
        let ahead = |id: &VmId, vm: &VmRecord| {
            let known = |(epoch, generation)| vm.epoch > epoch && vm.intent.generation > generation;
            self.epochs
                .get(id)
                .copied()
                .zip(self.generations.get(id).copied())
                .is_none_or(known)
        };
        let vms = new.vms.iter().all(|(id, vm)| ahead(id, vm));
        let hosts = new.hosts.values().all(|host| {
            let known = self.sessions.get(&host.name);
            known.is_none_or(|known| host.session > *known)
        });
        let site = meta.term > self.term && meta.revision > self.revision;
        self.check(
            "I6 a restored controller's numbers are ahead",
            site && vms && hosts,
            || format!("site: {site}, hosts: {hosts}, VMs: {vms}; term {:?}", meta.term),
        );
        // Records keep their revisions: all are looked at anew.
        self.revision = 0;
        self.unknown = self.epochs.keys().copied().collect();
        self.unknown.retain(|id| !new.vms.contains_key(id));
        self.unconfirmed = new.vms.keys().copied().collect();
        self.present.extend(there);
        let gone = |operation: &&OperationId| !new.operations.contains_key(*operation);
        self.forgotten.extend(self.operations.values().filter(gone));
        let forgotten = &self.forgotten;
        self.operations
            .retain(|_, operation| !forgotten.contains(operation));
        for sent in self.sent.values_mut() {
            sent.operation = sent.operation.filter(|operation| !forgotten.contains(operation));
        }
        let ended = new.operations.values().filter(|operation| !operation.is_active());
        self.ended = ended.map(|operation| (operation.id, operation.state)).collect();
    }

    /// I5: what is promised on a host is the sum of what holds a place there, and never more than there is. What a restored
    /// controller takes over is there, room or not; nothing is added to it then.
    fn capacity(&mut self, state: &State, takes_over: bool) {
        for room in doctor::rooms(state) {
            self.check(
                "I5 reservations are the sum of specifications",
                room.is_counted(),
                || format!("{room:?}"),
            );
            let promised = (room.vcpus, room.memory_mib);
            if room.suffices((0, 0)) {
                self.taken_over.remove(&room.host);
            } else if takes_over {
                self.taken_over.insert(room.host.clone(), promised);
            }
            let fits = match self.taken_over.get(&room.host) {
                Some(most) => promised.0 <= most.0 && promised.1 <= most.1,
                None => room.suffices((0, 0)),
            };
            self.check("I5 no host is over-committed", fits, || format!("{room:?}"));
        }
    }

    /// I8: one request, one effect. Operations end once. Each was asked for.
    fn requests(&mut self, state: &State) {
        self.of_hosts.extend(of_hosts(state));
        let first = self
            .last_operation
            .unwrap_or_else(|| OperationId::from_uuid(Uuid::nil()));
        for operation in state.operations.range(first..).map(|(_, operation)| operation) {
            self.last_operation = self.last_operation.max(Some(operation.id));
            if operation.principal == "restore" && operation.kind == OperationKind::Migrate {
                // A migration that was under way when the controller was set back, and is brought to its end.
                continue;
            }
            if operation.request_id.is_empty() && self.of_hosts.contains(&operation.id) {
                continue;
            }
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
            let refused = self.turned_away.get(&operation.request_id) == Some(&state.meta.term);
            self.check("I8 what was refused is not done", !refused, || {
                format!(
                    "request {} was refused, and made operation {}",
                    operation.request_id, operation.id
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

    /// A client was told in this term that its request is refused.
    pub fn turned_away(&mut self, request: &str, term: Term) {
        self.turned_away.insert(request.to_owned(), term);
    }

    /// A client was answered with an operation.
    pub fn answered(&mut self, request: &str, operation: OperationId) {
        if self.forgotten.contains(&operation) {
            return;
        }
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

    /// A client is about to make a request.
    pub fn send(&mut self, request: &str, kind: OperationKind) {
        let sent = Sent {
            kind,
            operation: None,
            looks: self.looks,
        };
        self.sent.insert(request.to_owned(), sent);
    }

    /// An agent has said which session it works in.
    pub fn works_in(&mut self, host: usize, session: Session) {
        let heard = self.heard.entry(host).or_default();
        heard.0 = heard.0.max(session);
    }

    /// What a host's agent is known to know before a command comes.
    pub fn heard(&self, host: usize) -> (Session, Term) {
        self.heard.get(&host).copied().unwrap_or_default()
    }

    /// I12: a command was obeyed, and what the agent knew when it came.
    pub fn obeyed(&mut self, host: usize, call: &str, given: (Session, Term), known: (Session, Term)) {
        let fine = given.0 >= known.0 && given.1 >= known.1;
        self.check("I12 nobody is obeyed who was replaced", fine, || {
            format!(
                "h{}: {call} was obeyed with {given:?}, {known:?} is known",
                host + 1
            )
        });
        let heard = self.heard.entry(host).or_default();
        *heard = (heard.0.max(given.0), heard.1.max(given.1));
    }

    /// I12: of the controllers that have a term, an agent obeys one.
    pub fn obeyed_run(&mut self, host: usize, term: Term, run: &str) {
        let first = self.runs.entry((host, term)).or_insert_with(|| run.to_owned());
        let same = *first == run;
        self.check("I12 one controller of a term is obeyed", same, || {
            format!("h{} obeys two controllers of term {term:?}", host + 1)
        });
    }

    /// I12: a controller gives a command, or hears from an agent, and knows whether it is refused.
    pub fn refused(&mut self, controller: usize, term: Term, refused: bool, command: Option<&str>) {
        if !refused {
            return;
        }
        let since = *self
            .refused
            .entry((controller, term))
            .or_insert_with(Instant::now);
        if let Some(command) = command {
            self.check(
                "I12 a refused controller is silent",
                since.elapsed() <= LAST_COMMANDS,
                || {
                    format!(
                        "controller {} gives the command {command} although it is refused",
                        controller + 1
                    )
                },
            );
        }
    }

    /// I1: a VM is sent; where it arrives it waits until its source has let go of it.
    pub fn sends(&mut self, host: usize, arrives_paused: bool) {
        self.check("I1 who arrives waits for the source", arrives_paused, || {
            format!("h{}: a VM is sent to run where it arrives", host + 1)
        });
    }

    /// A complete list comes to a controller, or has been taken over.
    pub fn complete_list(&mut self, host: usize, term: Term, taken: bool) {
        let (begun, ended) = self.lists.entry((host, term)).or_default();
        *if taken { ended } else { begun } += 1;
    }

    /// How many complete lists a controller has taken over; `None` while it is at one.
    pub fn complete_lists(&self, host: usize, term: Term) -> Option<u64> {
        let (begun, ended) = self.lists.get(&(host, term)).copied().unwrap_or_default();
        (begun == ended).then_some(begun)
    }

    /// I13: an incomplete list has been taken over; of what is not on it, nothing follows.
    pub fn incomplete_list(&mut self, host: &HostName, before: &State, after: &State) {
        for (id, seen) in &before.observations {
            let same = |vm: &&Arc<VmRecord>| {
                let was = before.vms.get(id);
                was.is_some_and(|was| (&was.owner, was.epoch) == (&vm.owner, vm.epoch)) && vm.owner == *host
            };
            let Some(vm) = after.vms.get(id).filter(same).filter(|_| seen.host == *host) else {
                continue;
            };
            let known = after.observations.contains_key(id);
            self.check("I13 nothing follows from an incomplete list", known, || {
                format!("what {host} had said of {} is forgotten", vm.name)
            });
        }
    }

    /// A guest has ended by itself; `entry` is what its agent had written down.
    pub fn guest_ended(&mut self, id: VmId, crash: bool, entry: Option<&ledger::Vm>) {
        self.shut_down.remove(&id);
        let Some(vm) = entry.filter(|_| !crash) else {
            return;
        };
        let Some(intent) = &vm.intent else { return };
        let begun =
            self.started.get(&id) == Some(&intent.power_sequence) && vm.done.power < intent.power_sequence;
        // Where it had been off for the same reason before, and the answer to the start is lost, nobody can tell whether it
        // has run since: libvirt keeps the state and its reason, no count of starts and no time, and replays no event. One
        // that does not know starts it: that was asked for, and may not have been done.
        if begun && vm.done.begun_after != PowerReason::GuestShutdown {
            self.shut_down.insert(id, intent.power_sequence);
        }
    }

    /// A host has lost power: its guests are off for that reason, whatever was before.
    pub fn power_lost(&mut self, domains: &Domains) {
        for (id, ..) in domains {
            self.shut_down.remove(id);
        }
    }

    /// What an agent writes of its host: numbers only rise.
    pub fn ledger_of_host(&mut self, host: usize, old: Option<ledger::Host>, new: ledger::Host) {
        let risen = old.is_none_or(|old| new.session >= old.session && new.term >= old.term);
        self.check("I6 numbers only rise", risen, || {
            format!("h{}: ledger of the host from {old:?} to {new:?}", host + 1)
        });
    }

    /// A host has lost power: what its agent knew to be in its ledger is there, or what it was writing, and nothing is there
    /// in part.
    pub fn ledger_after_power_cut(
        &mut self,
        host: usize,
        confirmed: &BTreeMap<String, ledger::Vm>,
        found: &[(Option<ledger::Vm>, String)],
    ) {
        let broken = found.iter().find(|(entry, _)| entry.is_none());
        self.check("I6 a ledger keeps what it confirmed", broken.is_none(), || {
            format!("h{}: {broken:?} is there in part", host + 1)
        });
        for (name, known) in confirmed {
            let entry = found.iter().find(|(_, found)| found == name);
            let entry = entry.and_then(|(entry, _)| entry.as_ref());
            let kept = entry.is_some_and(|vm| vm.epoch >= known.epoch && vm.generation >= known.generation);
            self.check("I6 a ledger keeps what it confirmed", kept, || {
                format!(
                    "h{}: after a loss of power {name} is {entry:?}, it was {known:?}",
                    host + 1
                )
            });
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
    pub fn read(&mut self, uid: &str, told: Told, least: Told) {
        let fresh = told.generation >= least.generation && told.revision >= least.revision;
        self.check("I9 reads are never stale", fresh, || {
            format!("VM {uid}: {told:?} was read after {least:?} had been answered")
        });
        let known = self.known.entry(uid.to_owned()).or_default();
        known.generation = known.generation.max(told.generation);
        known.revision = known.revision.max(told.revision);
    }

    /// I9: under one generation everybody reads the same desired state, and under one revision the same labels too. As both
    /// number the changes, this and [`Checker::read`] are what `crate::linear` would search for: an order of all changes and
    /// reads of a VM that keeps the order of those that did not overlap.
    pub fn means(&mut self, uid: &str, told: Told, meaning: Meaning) {
        let Told { generation, revision } = told;
        let desires = self.desires.entry((uid.to_owned(), generation));
        let first = *desires.or_insert(meaning.desired);
        self.check(
            "I9 a generation means one thing",
            first == meaning.desired,
            || {
                format!(
                    "VM {uid}: generation {generation} was read as power state {first} and as {}",
                    meaning.desired
                )
            },
        );
        let meanings = self.meanings.entry((uid.to_owned(), revision));
        let first = *meanings.or_insert(meaning);
        self.check("I9 a revision means one thing", first == meaning, || {
            format!("VM {uid}: revision {revision} was read as {first:?} and as {meaning:?}")
        });
    }

    /// I9: an event has come to somebody who watches, and resumes behind the last one whenever the stream ends.
    pub fn watched(&mut self, version: u64) {
        let last = self.watched.last().copied().unwrap_or(0);
        self.check("I9 a watch resumes where it was", version > last, || {
            format!("event {version} came after {last}")
        });
        self.watched.insert(version);
    }

    /// Whether everything that is kept since the first event that came has come. An error names what has not, or what came
    /// and never was.
    pub fn watched_all(&mut self, state: &State) -> Result<(), Violation> {
        let first = self.watched.first().copied().unwrap_or(0);
        let kept: BTreeSet<u64> = state.events.range(first..).map(|(version, _)| *version).collect();
        let since = kept.first().copied().unwrap_or(u64::MAX);
        let came: BTreeSet<u64> = self.watched.range(since..).copied().collect();
        let invariant = "I9 a watch resumes where it was";
        match kept.symmetric_difference(&came).next() {
            None => self.check(invariant, true, String::new),
            Some(version) => {
                let what = format!("event {version} was missed, or came and never was");
                return Err(Violation { invariant, what });
            }
        }
        Ok(())
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
            let wanted = self.intents.get(&(new.id, intent.generation)).cloned();
            // What has just been stored is looked at before the next commit only.
            self.check(
                "I7 nothing is done that nobody asked for",
                wanted
                    .as_ref()
                    .is_none_or(|wanted| wanted.contains(&intent.power)),
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
        migration: Option<&ledger::Migration>,
    ) {
        if matches!(call, "destroy" | "undefine" | "delete_volume" | "delete_volumes")
            && let Some(migration) = migration
        {
            self.check(
                "I7 nothing of a migrating VM goes before both hosts settle",
                migration.settled,
                || format!("h{}: {call} of {id} in migration {}", host + 1, migration.id),
            );
        }
        if call == "start"
            && let Some(intent) = entries.iter().flatten().find_map(|vm| vm.intent.as_ref())
        {
            self.started.insert(id, intent.power_sequence);
        }
        if call == "start"
            && let Some(before) = self.shut_down.get(&id).copied()
        {
            let intent = |entry: &Option<ledger::Vm>| entry.as_ref().and_then(|vm| vm.intent.clone());
            let same = |intent: Intent| intent.power_sequence == before;
            let all = entries.iter().all(|entry| intent(entry).is_some_and(same));
            let again = state == Some(DomainState::Stopped) && all;
            self.check("I7 a guest that shut itself down stays off", !again, || {
                format!("h{}: {id} is started again for power request {before}", host + 1)
            });
        }
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
        view: &View<'_>,
        hosts: &[(HostName, Domains, usize)],
        entries: &[Vec<ledger::Vm>],
        off: &BTreeSet<VmId>,
    ) -> Result<(), Violation> {
        let state = view.state;
        let wrong = |invariant, what: String| Err(Violation { invariant, what });
        self.unknown_at_rest(hosts, entries, off)?;
        if let Some(what) = doctor::open(state) {
            return wrong("I3 every operation ends", what);
        }
        for id in &self.acknowledged {
            let gone = state.vms.get(id).is_none();
            if gone && !self.deleted.contains(id) && !self.unknown.contains(id) {
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
            let leaving = vm.change.iter().flat_map(|change| &change.left_out);
            let own = vm.spec.disks.iter().chain(leaving);
            *owned.entry(&vm.owner).or_default() += own.filter(|disk| disk.volume.is_none()).count();
            placed(state, vm, hosts, off)?;
        }
        for ((host, domains, volumes), entries) in hosts.iter().zip(entries) {
            let unknown = entries.iter().filter(|vm| self.unknown.contains(&vm.id));
            let disks = |vm: &ledger::Vm| {
                let intent = vm.intent.as_ref().map_or(0, |intent| intent.spec.disks.len());
                intent + vm.changes.removed.len()
            };
            let unknown: usize = unknown.map(disks).sum();
            let mine = owned.get(host).copied().unwrap_or(0);
            for (id, domain, _) in domains.iter().filter(|(id, ..)| !self.unknown.contains(id)) {
                if state.vms.get(id).is_none_or(|vm| vm.owner != *host) {
                    return wrong(
                        "I4 nothing without an owner",
                        format!("{host} has a domain {id} ({domain:?}) that is not its own"),
                    );
                }
            }
            if !(mine..=mine + unknown).contains(volumes) {
                return wrong(
                    "I4 nothing without an owner",
                    format!("{host} has {volumes} disks, its VMs have {mine}"),
                );
            }
        }
        if !self.present.is_empty() {
            self.check("I2 nothing is lost by a restore", true, String::new);
        }
        // Last: where all is well, an operator is told so.
        let ill = doctor::examine(view).findings.into_iter();
        let mut ill = ill.filter(|finding| {
            finding.severity > Severity::Notice && !is_to_be(finding) && !self.is_unknown(finding, hosts)
        });
        if let Some(finding) = ill.next() {
            let about = entries.iter().flatten();
            let about: Vec<_> = about
                .filter(|vm| finding.seen.contains(&vm.id.to_string()))
                .collect();
            let what = format!("{finding:?}; what the ledgers say of it: {about:?}");
            return wrong("the doctor finds nothing at rest", what);
        }
        for check in [
            "I2 nothing acknowledged is lost",
            "I3 every operation ends",
            "I3 desired is actual",
            "I4 nothing without an owner",
            "I13 status is what is",
            "the doctor finds nothing at rest",
        ] {
            self.check(check, true, String::new);
        }
        Ok(())
    }

    /// Whether a finding is about a VM that a restore has made unknown, or about the room that it or one that was taken over
    /// takes: the doctor is right to tell of it.
    fn is_unknown(&self, finding: &Finding, hosts: &[(HostName, Domains, usize)]) -> bool {
        let named = |id: &VmId| finding.seen.contains(&id.to_string());
        let on = |host: &HostName| finding.subject == format!("host {host}");
        match (finding.invariant, finding.kind) {
            (Invariant::I4, _) => self.unknown.iter().any(named),
            (Invariant::I5, "CROWDED") => hosts.iter().any(|(host, domains, _)| {
                on(host) && domains.iter().any(|(id, ..)| self.unknown.contains(id))
            }),
            (Invariant::I5, "OVER_COMMITTED") => self.taken_over.keys().any(on),
            _ => false,
        }
    }

    /// At rest: a VM that a restored controller does not know is left alone, as its host was told last.
    fn unknown_at_rest(
        &self,
        hosts: &[(HostName, Domains, usize)],
        entries: &[Vec<ledger::Vm>],
        off: &BTreeSet<VmId>,
    ) -> Result<(), Violation> {
        let wrong = |invariant, what: String| Err(Violation { invariant, what });
        let there = |id: &VmId| {
            let mut domains = hosts.iter().flat_map(|(_, domains, _)| domains);
            domains.any(|(known, ..)| known == id)
        };
        let lost = self
            .present
            .iter()
            .find(|id| !self.deleted.contains(*id) && !there(id));
        if let Some(id) = lost {
            return wrong(
                "I2 nothing is lost by a restore",
                format!("VM {id} was there when the controller was restored, and is nowhere"),
            );
        }
        for ((host, domains, _), entries) in hosts.iter().zip(entries) {
            let unknown = entries.iter().filter(|vm| self.unknown.contains(&vm.id));
            for vm in unknown.filter(|vm| vm.disposition == Disposition::Owned) {
                let seen = domains
                    .iter()
                    .find(|(id, ..)| *id == vm.id)
                    .map(|(_, state, _)| *state);
                let wanted = vm.intent.as_ref().map(|intent| domain_state(intent.power));
                let by_itself = seen == Some(DomainState::Stopped) && off.contains(&vm.id);
                if wanted.is_some() && seen != wanted && !by_itself {
                    return wrong(
                        "I3 desired is actual",
                        format!(
                            "{} on {host}, which nobody knows, is {seen:?}, not {wanted:?}",
                            vm.name
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    /// I13: what an operation that succeeded was to reach has been so since it was asked for. A creation has succeeded
    /// when the VM is there, whatever was asked since.
    fn was_so(&mut self, operation: &OperationRecord) {
        let wanted = operation.power.filter(|_| operation.kind.is_power());
        let sent = self.sent.get(&operation.request_id);
        let (OperationState::Succeeded, Some(wanted), Some(sent)) = (operation.state, wanted, sent) else {
            return;
        };
        let seen = self.seen.get(&(operation.vm, wanted as u8)).copied();
        let fine = seen.is_some_and(|look| look >= sent.looks);
        self.check("I13 what succeeded was so", fine, || {
            let (kind, vm, id) = (operation.kind.as_str(), &operation.vm_name, operation.id);
            format!("{kind} of {vm} ({id}) has succeeded, and it was never {wanted:?} since it was asked for")
        });
    }

    /// I2, I3: operations that have ended stay as they ended.
    pub fn endings(&mut self, state: &State) {
        let before = std::mem::replace(&mut self.looked_at, state.operations.clone());
        for change in before.diff(&state.operations) {
            let (DiffItem::Add(_, operation)
            | DiffItem::Update {
                new: (_, operation), ..
            }) = change
            else {
                continue;
            };
            if operation.kind == OperationKind::Create && operation.cancel_requested {
                // Whoever cancels a creation wants the VM gone.
                self.deleted.insert(operation.vm);
            }
            if operation.is_active() {
                continue;
            }
            let (id, now) = (operation.id, operation.state);
            let first = self.ended.get(&id).copied();
            if first.is_none() {
                self.ended.insert(id, now);
                self.was_so(operation);
            }
            let same = first.is_none_or(|first| first == now);
            self.check("I3 an operation ends once", same, || {
                format!("operation {id} ended as {first:?}, and now as {now:?}")
            });
        }
    }
}

/// What is right to be told and is no fault: a guest that crashes again and again is given up, and stays so; one that was
/// paused when its host lost power is off. Whether a VM is as it may be, [`placed`] judges.
fn is_to_be(finding: &Finding) -> bool {
    matches!(finding.kind, "FAILED" | "NOT_AS_ASKED")
}

/// The power state of a domain that is a VM.
fn power(state: DomainState) -> Option<PowerState> {
    match state {
        DomainState::Running => Some(PowerState::Running),
        DomainState::Paused => Some(PowerState::Paused),
        DomainState::Stopped => Some(PowerState::Stopped),
        DomainState::Incoming | DomainState::HandedOver => None,
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

const fn domain_state(power: PowerState) -> DomainState {
    match power {
        PowerState::Running => DomainState::Running,
        PowerState::Paused => DomainState::Paused,
        PowerState::Stopped => DomainState::Stopped,
    }
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
        let said = state.sightings.get(&vm.id).into_iter().flatten();
        let said: Vec<_> = said
            .map(|(host, said)| {
                (
                    host,
                    said.observation.phase,
                    said.observation.power,
                    said.migration,
                )
            })
            .collect();
        return wrong(
            "I3 desired is actual",
            format!(
                "{} is not on its owner {}; since a restore hosts said of it: {said:?}",
                vm.name, vm.owner
            ),
        );
    };
    let wanted = domain_state(vm.intent.power);
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
