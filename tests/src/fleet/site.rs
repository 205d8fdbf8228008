//! The site of one run: its programs, what they run on, and everything outside them that they are handed.
//!
//! The programs are the real ones: a controller's core and agents, each started anew after each death on what the death
//! left. Everything here is driven by one clock and one seed.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io, mem,
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
    time::Duration,
};

use dalgu_agent::{
    Agent, AgentParts,
    hypervisor::{
        DomainState, Hypervisor,
        sim::{MemoryLines, Sim, SimConfig},
    },
    images::{self, Images},
    ledger::{self, Directory, Disposition, Ledger as AgentLedger},
    metrics::Snapshot,
    network::{Simulated, System},
};
use dalgu_controller::{
    api::Services,
    config::Config,
    doctor::View,
    hosts::{registry, silence},
    server::{Core, Parts, Writer},
    state::{BeforeCommit, Db, State},
    store::{Error as StoreError, Image, memory::Disk},
};
use dalgu_proto::{
    host::{Inventory, Pool, Usage},
    ids::{ClusterId, HostName, NewIds, OperationId, Term, VmId, VolumeId},
    image::Digest,
    time::Clock,
    tls::client::{Caller, caller_in_process},
};
use jiff::{SignedDuration, Timestamp};
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

use super::{
    LATE,
    checker::{Checker, Domains, Holdings},
    disk::{self, Ledger, Records},
    fate::{Fate, Fates, Kind, Point},
    life::Life,
    lock,
    machine::Machine,
    nature::Nature,
    net,
    objects::{
        self,
        shelf::Shelf,
        wires::{self, Kernel, Wires},
    },
    plan::Node,
    platter::{Platter, Until},
    streams::{self, Cables, Streams, Ways},
    trace::Trace,
};

/// Longest time that a program which died at a point is down, in ms.
const MOST_TIME_DOWN: u64 = 4_000;
/// After so long nothing is kept any more that was deleted, or that nothing leads to.
const OLD_SECONDS: i64 = 25 * 3600;
/// Longest time that a host is off whose power went at a point, in ms.
const MOST_TIME_OFF: u64 = 12_000;

fn boot_id(boot: u64) -> String {
    format!("boot-{boot}")
}

fn vm_file(id: VmId) -> String {
    format!("vms/{id}.json")
}

/// A program that runs, or none.
struct Running {
    life: Life,
    /// How it is reached from each program that calls it.
    servers: BTreeMap<Node, Caller>,
}

/// What a ledger's file holds, and the entry that it is, if it can be read.
type Parsed = (Vec<u8>, Option<ledger::Vm>);

struct HostState {
    sim: Sim,
    boot: u64,
    running: Option<Running>,
    files: Platter,
    /// As its agent opened it at its start.
    ledger: Option<Directory<Platter>>,
    /// What its kernel has of networks.
    kernel: Kernel,
    /// What its store of images holds. Everything in it counts as synced.
    images: images::Memory,
    /// Entries of VMs as they were last read.
    read: RefCell<BTreeMap<String, Parsed>>,
    /// Entries of VMs as their writer last knew them to be on disk.
    confirmed: BTreeMap<String, dalgu_agent::ledger::Vm>,
    confirmed_host: Option<ledger::Host>,
}

impl HostState {
    /// The entry of a VM in the ledger. One that is as it was is not parsed anew.
    fn vm_entry(&self, name: &str) -> Option<ledger::Vm> {
        let bytes = self.files.get(name)?;
        let mut read = self.read.borrow_mut();
        match read.get(name) {
            Some((known, vm)) if *known == bytes => vm.clone(),
            _ => {
                let vm: Option<ledger::Vm> = serde_json::from_slice(&bytes).ok();
                read.insert(name.to_owned(), (bytes, vm.clone()));
                vm
            }
        }
    }
}

struct ControllerState {
    disk: Disk,
    running: Option<Running>,
    services: Option<Services>,
}

struct Inner {
    hosts: Vec<HostState>,
    controllers: Vec<ControllerState>,
    blocked: Vec<(Node, Node, Instant)>,
    offsets: BTreeMap<Node, i64>,
    /// How much faster clocks go, in thousandths.
    rates: BTreeMap<Node, i64>,
    starting: BTreeSet<Node>,
    off: BTreeSet<VmId>,
    /// Moves that were accepted to empty a host by hand.
    emptying: u64,
    operations: BTreeMap<usize, OperationId>,
    backup: Option<Image>,
    /// How often the controller was restored.
    restores: u64,
    /// What the names of VMs end in whose own name is that of a VM which the store does not know any more.
    renamed: BTreeMap<usize, u64>,
    /// There is a second controller, or nobody has tidied up after it yet.
    second: bool,
    /// How many there have been.
    second_count: u64,
    /// Which controller each host's agent finds.
    faces: Vec<usize>,
    /// What guests wrote to their volumes last.
    stamp: u64,
    /// See [`Site::latest`].
    latest: Timestamp,
}

/// See the module.
pub struct Site {
    me: Weak<Site>,
    cluster: ClusterId,
    names: Vec<HostName>,
    harsh: bool,
    nature: Nature,
    begun: Instant,
    inner: Mutex<Inner>,
    fates: Mutex<Fates>,
    ways: Mutex<Ways>,
    trace: Mutex<Trace>,
    checker: Mutex<Checker>,
    ids: NewIds,
    samples: Vec<watch::Sender<Arc<Snapshot>>>,
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Site")
    }
}

/// Ids in the order in which they were asked for; those of another `kind` are others.
pub fn counting(kind: u64) -> NewIds {
    let next = std::sync::atomic::AtomicU64::new(1);
    NewIds::from_fn(move || {
        Uuid::from_u64_pair(kind, next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    })
}

impl Site {
    /// A site with `hosts` hosts, of which nothing runs yet.
    pub fn new(hosts: usize, harsh: bool, nature: Nature, fates: Fates, keep_all: bool) -> Arc<Self> {
        let cluster = ClusterId::from_uuid(Uuid::from_u64_pair(7, 7));
        let memory = MemoryLines::default();
        let cpus = if harsh { 1 } else { 2 };
        let samples = (0..hosts).map(|host| {
            let host = nature.objects.then_some(host);
            watch::Sender::new(Arc::new(sample(cpus, host)))
        });
        let samples: Vec<_> = samples.collect();
        Arc::new_cyclic(|me| {
            let cables = Arc::new(Cables {
                memory,
                site: me.clone(),
            });
            let host = |number: usize| {
                let mut config = SimConfig::new(cluster);
                config.control_socket = Some(streams::control(number));
                config.lines = cables.clone();
                config.clock = Clock::from_fn(|| Timestamp::UNIX_EPOCH);
                // A small guest takes about a second.
                config.rate_bytes_per_second = 64 << 20;
                // To another pool of its host.
                config.delays.copy = Duration::from_secs(3);
                HostState {
                    sim: Sim::new(config).expect("it listens in memory"),
                    boot: 1,
                    running: None,
                    files: Platter::default(),
                    ledger: None,
                    kernel: Kernel::default(),
                    images: images::Memory::new(1 << 40).with_images(match nature.objects {
                        true => objects::images(),
                        false => BTreeMap::new(),
                    }),
                    read: RefCell::default(),
                    confirmed: BTreeMap::new(),
                    confirmed_host: None,
                }
            };
            let controller = || ControllerState {
                disk: Disk::default(),
                running: None,
                services: None,
            };
            Self {
                me: me.clone(),
                cluster,
                names: (1..=hosts)
                    .map(|number| format!("h{number}").parse().expect("a name"))
                    .collect(),
                harsh,
                nature,
                begun: Instant::now(),
                inner: Mutex::new(Inner {
                    hosts: (0..hosts).map(host).collect(),
                    controllers: vec![controller(), controller()],
                    blocked: Vec::new(),
                    offsets: BTreeMap::new(),
                    rates: BTreeMap::new(),
                    starting: BTreeSet::new(),
                    off: BTreeSet::new(),
                    emptying: 0,
                    operations: BTreeMap::new(),
                    backup: None,
                    restores: 0,
                    renamed: BTreeMap::new(),
                    second: false,
                    second_count: 0,
                    faces: vec![0; hosts],
                    stamp: 0,
                    latest: Timestamp::MIN,
                }),
                fates: Mutex::new(fates),
                ways: Mutex::default(),
                trace: Mutex::new(Trace::new(keep_all)),
                checker: Mutex::default(),
                ids: counting(1),
                samples,
            }
        })
    }

    /// The site again, for tasks.
    pub fn me(&self) -> Arc<Self> {
        self.me.upgrade().expect("whoever calls has it")
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The streams between hosts.
    pub fn ways(&self) -> MutexGuard<'_, Ways> {
        lock(&self.ways)
    }

    /// What must hold.
    pub fn checker(&self) -> MutexGuard<'_, Checker> {
        lock(&self.checker)
    }

    /// What goes wrong.
    pub fn fates(&self) -> MutexGuard<'_, Fates> {
        lock(&self.fates)
    }

    /// What happened.
    pub fn trace(&self) -> MutexGuard<'_, Trace> {
        lock(&self.trace)
    }

    /// New ids for requests.
    pub fn ids(&self) -> &NewIds {
        &self.ids
    }

    /// A host's name.
    pub fn host_name(&self, host: usize) -> HostName {
        self.names[host].clone()
    }

    /// A host by name.
    pub fn host_number(&self, name: &HostName) -> Option<usize> {
        self.names.iter().position(|known| known == name)
    }

    /// How many hosts there are.
    pub fn hosts(&self) -> usize {
        self.names.len()
    }

    /// The site's id.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The name that clients give the VM of this number.
    pub fn vm_name(&self, vm: usize) -> String {
        match self.inner().renamed.get(&vm) {
            Some(number) => format!("vm-{vm}-{number}"),
            None => format!("vm-{vm}"),
        }
    }

    /// The controller was restored: a VM that is not known any more keeps its name, and clients choose another.
    pub fn rename(&self, old: &State, new: &State) {
        let numbers = old.vms.values().filter(|vm| !new.vms.contains_key(&vm.id));
        let numbers = numbers.filter_map(|vm| vm.name.as_str().split('-').nth(1)?.parse().ok());
        let numbers: Vec<usize> = numbers.collect();
        let mut inner = self.inner();
        inner.restores += 1;
        let number = inner.restores;
        inner.renamed.extend(numbers.into_iter().map(|vm| (vm, number)));
    }

    /// How often the controller was restored.
    pub fn restores(&self) -> u64 {
        self.inner().restores
    }

    /// The last backup.
    pub fn backup(&self) -> Option<Image> {
        self.inner().backup.clone()
    }

    /// Keeps a backup, and no other.
    pub fn keep_backup(&self, image: Image) {
        self.inner().backup = Some(image);
    }

    /// The disk of a controller's store.
    pub fn disk(&self, controller: usize) -> Disk {
        self.inner().controllers[controller].disk.clone()
    }

    /// Gives a controller that is not running yet, or is about to be stopped, another disk.
    pub fn put_disk(&self, controller: usize, disk: Disk) {
        self.inner().controllers[controller].disk = disk;
    }

    /// Whether there is a second controller, or nobody has tidied up after it yet.
    pub fn has_second(&self) -> bool {
        self.inner().second
    }

    /// See [`Site::has_second`]. Each agent finds one or the other; without a second all find the one.
    pub fn set_second(&self, second: bool) {
        let hosts = self.hosts();
        let faces = (0..hosts).map(|_| usize::from(second && self.below(2) == 1));
        let faces = faces.collect();
        let mut inner = self.inner();
        inner.second = second;
        inner.second_count += u64::from(second);
        inner.faces = faces;
    }

    /// How many second controllers there have been.
    pub fn second_count(&self) -> u64 {
        self.inner().second_count
    }

    /// Which controller a host's agent finds.
    pub fn face(&self, host: usize) -> usize {
        self.inner().faces[host]
    }

    /// It finds the other one.
    pub fn turn_face(&self, host: usize) {
        let mut inner = self.inner();
        inner.faces[host] = 1 - inner.faces[host];
    }

    /// What each hypervisor has.
    pub fn domains(&self) -> Vec<Domains> {
        self.inner().hosts.iter().map(|host| host.sim.domains()).collect()
    }

    /// What each agent has written down of the VMs that it has.
    fn entries(&self) -> Vec<Vec<ledger::Vm>> {
        let inner = self.inner();
        let of = |host: &HostState| {
            let names = host.files.names().into_iter();
            let names = names.filter(|name| name.starts_with("vms/"));
            let entries = names.filter_map(|name| host.vm_entry(&name));
            entries
                .filter(|vm| !matches!(vm.disposition, Disposition::Gone { .. }))
                .collect()
        };
        inner.hosts.iter().map(of).collect()
    }

    /// A line for each VM that the controller knows, and for each that a host has.
    pub fn describe(&self) -> Vec<String> {
        let state = self.services().map(|(_, services)| services.db.snapshot());
        let vms = state.iter().flat_map(|state| state.vms.values());
        let known = vms.map(|vm| {
            let flag = |is: bool, word| if is { word } else { "" };
            let (unconfirmed, deleted) = (
                flag(vm.unconfirmed, ", unconfirmed"),
                flag(vm.delete_time.is_some(), ", to be deleted"),
            );
            let (name, id, owner, epoch) = (&vm.name, vm.id, &vm.owner, vm.epoch);
            let seen = state.iter().find_map(|state| state.observation(vm));
            let seen = seen.map(|seen| (seen.observed, seen.phase, seen.power, seen.fault.clone()));
            let wanted = (vm.intent.generation, vm.intent.power);
            format!(
                "controller: {name} ({id}) on {owner}, {epoch:?}{unconfirmed}{deleted}, wants {wanted:?}, has seen {seen:?}"
            )
        });
        let (entries, domains) = (self.entries(), self.domains());
        let each = entries.into_iter().zip(domains).enumerate();
        let there = each.flat_map(|(host, (entries, domains))| {
            let host = Node::Host(host);
            let entries = entries.into_iter().map(move |vm| {
                let (name, id, what, epoch) = (vm.name, vm.id, vm.disposition, vm.epoch);
                let (done, changes) = (vm.done, vm.changes);
                format!("{host}: {name} ({id}) {what:?}, {epoch:?}, {done:?}, {changes:?}")
            });
            let domains = domains.into_iter();
            entries.chain(domains.map(move |domain| format!("{host}: domain {domain:?}")))
        });
        known.chain(there).collect()
    }

    /// Whether no host has anything of a VM.
    pub fn is_nowhere(&self, uid: &str) -> bool {
        let Ok(id) = uid.parse::<VmId>() else { return false };
        let domains = self.domains();
        let here = |state: DomainState| state != DomainState::HandedOver;
        let mut domains = domains.iter().flatten();
        let domain = domains.any(|(known, state, _)| *known == id && here(*state));
        // A host that was made ready for it, or has sent it, has nothing of it.
        let has = |vm: &ledger::Vm| vm.id == id && vm.disposition.migration().is_none();
        let entry = self.entries().iter().flatten().any(has);
        !domain && !entry
    }

    /// Whether no host has shown a domain of a VM since a restore although one has it. Who deletes a VM then says that it is gone, as
    /// docs/operations/backup.md asks, and nobody may say so of this one: it would stay, and its name with it.
    pub fn is_missed(&self, name: &str) -> bool {
        let state = self.services().map(|(_, services)| services.db.snapshot());
        let vm = state.as_ref().zip(name.parse().ok());
        let vm = vm.and_then(|(state, name)| Some((state, state.vm_by_name(&name)?)));
        vm.is_some_and(|(state, vm)| {
            let mut shown = state.sightings.get(&vm.id).into_iter().flatten();
            let shown = shown.any(|(_, said)| said.observation.power.is_some());
            vm.unconfirmed && !shown && !self.is_nowhere(&vm.id.to_string())
        })
    }

    /// Whether hosts have shown every VM that the store knows.
    pub fn is_confirmed(&self) -> bool {
        let state = self.services().map(|(_, services)| services.db.snapshot());
        state.is_some_and(|state| !state.vms.values().any(|vm| vm.unconfirmed))
    }

    /// What happens at a point; a line of the history, and a look at all hypervisors.
    pub fn at(&self, kind: Kind, name: &'static str, by: Node, to: Node) -> Fate {
        let point = Point { kind, name, by, to };
        let (fate, number) = {
            let mut fates = self.fates();
            (fates.at(point), fates.points())
        };
        match (kind, fate) {
            (Kind::Message, Fate::Pass) => self.trace().say(format_args!("#{number} {by} -> {to} {name}")),
            (Kind::Message, fate) => self
                .trace()
                .say(format_args!("#{number} {by} -> {to} {name}: {fate:?}")),
            (_, Fate::Pass) => self.trace().say(format_args!("#{number} {by} {kind:?} {name}")),
            (_, fate) => self
                .trace()
                .say(format_args!("#{number} {by} {kind:?} {name}: {fate:?}")),
        }
        self.census();
        fate
    }

    /// A number for what is not a fault.
    pub fn below(&self, most: u64) -> u64 {
        self.fates().below(most)
    }

    /// Looks at all hypervisors: nothing runs twice.
    pub fn census(&self) {
        let domains = self.domains();
        self.checker().census(domains);
        if self.nature.objects {
            self.write_disks();
            self.look_at_ports();
        }
    }

    /// Looks at the interfaces of guests that run, and at what disks are made from.
    fn look_at_ports(&self) {
        let inner = self.inner();
        let hosts = inner.hosts.iter();
        let hosts: Vec<_> = hosts.map(|host| (host.sim.ports(), &host.kernel)).collect();
        let mut checker = self.checker();
        checker.connected(&hosts);
        for (number, host) in inner.hosts.iter().enumerate() {
            let bases = host.sim.bases();
            if !bases.is_empty() {
                checker.backed(number, &bases, &host.images.names());
            }
        }
    }

    /// Images that files of a host hold the difference to.
    pub fn bases(&self, host: usize) -> Vec<Digest> {
        self.inner().hosts[host].sim.bases()
    }

    /// The backup that a client chooses by this number, of those that there are.
    pub fn some_backup(&self, number: usize) -> Option<String> {
        let (_, services) = self.services().filter(|_| self.nature.objects)?;
        let state = services.db.snapshot();
        let number = number % state.backups.len().max(1);
        state.backups.keys().nth(number).map(ToString::to_string)
    }

    /// An agent has made what it wants of networks.
    pub fn put_kernel(&self, host: usize, kernel: Kernel) {
        self.inner().hosts[host].kernel = kernel;
        self.census();
    }

    /// Guests write to their disks.
    fn write_disks(&self) {
        let (stamp, found, own) = {
            let mut inner = self.inner();
            inner.stamp += 1;
            let stamp = inner.stamp;
            let hosts = inner.hosts.iter().enumerate();
            let found = hosts.flat_map(|(host, machine)| {
                let written = machine.sim.write_volumes(stamp).into_iter();
                written.map(move |written| (host, written))
            });
            let found: Vec<_> = found.collect();
            let own = inner.hosts.iter().flat_map(|host| host.sim.write_disks(stamp));
            (stamp, found, own.collect::<Vec<_>>())
        };
        let mut checker = self.checker();
        checker.written(stamp, &found);
        checker.disks_written(stamp, &own);
    }

    /// The file of a volume is about to be removed.
    pub fn before_purge(&self, host: usize, volume: VolumeId) {
        if let Some((_, services)) = self.services() {
            let state = services.db.snapshot();
            self.checker().purges(&state, &self.names[host], volume);
        }
    }

    /// The latest time that the controller's clock has shown.
    fn latest(&self) -> Timestamp {
        let now = self.clock(Node::Controller(0)).now();
        let mut inner = self.inner();
        inner.latest = inner.latest.max(now);
        inner.latest
    }

    /// Looks at what has been stored.
    pub fn look(&self, state: &State) {
        let latest = self.nature.objects.then(|| self.latest());
        let mut checker = self.checker();
        checker.stored(state);
        checker.endings(state);
        if let Some(latest) = latest {
            checker.volumes_stored(state, latest);
            checker.leases_stored(state);
            checker.copies_stored(state);
        }
    }

    /// Looks at what one of the controllers has stored.
    fn look_of(&self, node: Node, state: &State) {
        if node == Node::Controller(0) {
            self.look(state);
        } else {
            self.checker().copy_stored(state);
        }
    }

    /// A host's list comes to the controller: what that knows before, and how many lists it has taken over.
    pub fn list_comes(&self, host: usize, complete: bool) -> Option<(Arc<State>, u64)> {
        let (_, services) = self.services()?;
        let state = services.db.snapshot();
        let mut checker = self.checker();
        let lists = checker.complete_lists(host, state.meta.term);
        if complete {
            checker.complete_list(host, state.meta.term, false);
            return Some((state, 0));
        }
        Some((state, lists?))
    }

    /// The list has been taken over.
    pub fn list_taken(&self, host: usize, complete: bool, (before, lists): (Arc<State>, u64)) {
        let term = before.meta.term;
        if complete {
            self.checker().complete_list(host, term, true);
            return;
        }
        let Some((_, services)) = self.services() else {
            return;
        };
        let after = services.db.snapshot();
        let mut checker = self.checker();
        if after.meta.term == term && checker.complete_lists(host, term) == Some(lists) {
            checker.incomplete_list(&self.names[host], &before, &after);
        }
    }

    /// Something is about to be done to a VM.
    pub fn before_change(&self, host: usize, call: &'static str, id: VmId) {
        let (state, entries, migration) = {
            let inner = self.inner();
            let machine = &inner.hosts[host];
            let domains = machine.sim.domains();
            let state = domains
                .iter()
                .find(|(known, ..)| *known == id)
                .map(|(_, state, _)| *state);
            let name = vm_file(id);
            // A write that was not confirmed may be there or not: its writer goes by what it knows.
            let known = machine.confirmed.get(&name).cloned();
            let written = machine.vm_entry(&name);
            let migration = |vm: &ledger::Vm| vm.disposition.migration();
            let sure = known.as_ref().filter(|_| known == written).and_then(migration);
            let file = sure.map(|migration| format!("migrations/{migration}.json"));
            let migration: Option<ledger::Migration> =
                file.and_then(|file| disk::entry(&machine.files, &file));
            (state, [known, written], migration)
        };
        self.checker()
            .change(host, call, id, state, &entries, migration.as_ref());
    }

    /// A ledger's file is written or removed, on a disk that works for so long. What its writer is not told of it may take
    /// back.
    pub fn write_ledger(
        &self,
        host: usize,
        name: &str,
        bytes: Option<&[u8]>,
        until: Until,
    ) -> io::Result<()> {
        let mut inner = self.inner();
        let machine = &mut inner.hosts[host];
        let ledger = match machine.ledger.take() {
            Some(ledger) => ledger,
            None => machine.files.open()?,
        };
        let ledger = machine.ledger.insert(ledger);
        machine.files.work(until, || match bytes {
            Some(bytes) => ledger.write(name, bytes),
            None => ledger.erase(name),
        })?;
        if matches!(until, Until::Calls(_)) {
            // The power goes before the writer is told.
            return Ok(());
        }
        if name.starts_with("vms/") {
            let new = machine.vm_entry(name);
            let old = match &new {
                Some(new) => machine.confirmed.insert(name.to_owned(), new.clone()),
                None => machine.confirmed.remove(name),
            };
            if let Some(new) = new {
                self.checker().ledger(host, old.as_ref(), &new);
            }
        } else if let Some(new) = disk::entry::<ledger::Host>(&machine.files, name) {
            let old = machine.confirmed_host.replace(new);
            self.checker().ledger_of_host(host, old, new);
        }
        Ok(())
    }

    /// A ledger's files, as an agent reads them that starts: it goes by them.
    pub fn read_ledger(&self, host: usize) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut inner = self.inner();
        let machine = &mut inner.hosts[host];
        let ledger = machine.ledger.insert(machine.files.open()?);
        let found = ledger.read()?;
        let entries = found.iter().filter(|(name, _)| name.starts_with("vms/"));
        let entries = entries.filter_map(|(name, _)| Some((name.clone(), machine.vm_entry(name)?)));
        machine.confirmed = entries.collect();
        machine.confirmed_host = disk::entry(&machine.files, "host.json").or(machine.confirmed_host);
        Ok(found)
    }

    /// Whether messages pass from one to the other.
    pub fn is_connected(&self, from: Node, to: Node) -> bool {
        let now = Instant::now();
        !self
            .inner()
            .blocked
            .iter()
            .any(|(a, b, until)| (*a, *b) == (from, to) && *until > now)
    }

    /// The network is cut from one to the other.
    pub fn block(&self, from: Node, to: Node, time: Duration) {
        let until = Instant::now() + time;
        let mut inner = self.inner();
        inner.blocked.retain(|(_, _, until)| *until > Instant::now());
        inner.blocked.push((from, to, until));
        drop(inner);
        if let (Node::Host(a), Node::Host(b)) = (from, to) {
            self.ways().cut(a, b);
        }
    }

    fn running<T>(&self, node: Node, look: impl FnOnce(&Running) -> T) -> Option<T> {
        let inner = self.inner();
        let running = match node {
            Node::Controller(number) => &inner.controllers.get(number)?.running,
            Node::Host(host) => &inner.hosts.get(host)?.running,
            Node::Client => return None,
        };
        running.as_ref().map(look)
    }

    /// The life of a program that runs.
    pub fn life(&self, node: Node) -> Option<Life> {
        self.running(node, |running| running.life.clone())
    }

    /// Where messages to a program that runs go.
    pub fn server(&self, from: Node, to: Node) -> Option<(Life, Caller)> {
        let found = |running: &Running| Some((running.life.clone(), running.servers.get(&from)?.clone()));
        self.running(to, found).flatten()
    }

    /// The API of a controller that runs.
    pub fn services(&self) -> Option<(Life, Services)> {
        self.services_of(0)
    }

    /// The term of the controller, if it runs and is the only one.
    pub fn term(&self) -> Option<Term> {
        let (_, services) = self.services().filter(|_| !self.has_second())?;
        Some(services.db.snapshot().meta.term)
    }

    /// The API of one of the controllers, if it runs.
    pub fn services_of(&self, number: usize) -> Option<(Life, Services)> {
        let inner = self.inner();
        let controller = inner.controllers.get(number)?;
        Some((
            controller.running.as_ref()?.life.clone(),
            controller.services.clone()?,
        ))
    }

    /// A program dies, and comes back after a while.
    pub fn kill(&self, node: Node) {
        let time = Duration::from_millis(self.below(MOST_TIME_DOWN));
        self.kill_for(node, time);
    }

    /// A program dies, and comes back after this time.
    pub fn kill_for(&self, node: Node, time: Duration) {
        let dead = {
            let mut inner = self.inner();
            match node {
                Node::Controller(number) => {
                    inner.controllers[number].services = None;
                    inner.controllers[number].running.take()
                }
                Node::Host(host) => inner.hosts[host].running.take(),
                Node::Client => None,
            }
        };
        let Some(dead) = dead else { return };
        dead.life.kill();
        self.trace().say(format_args!("{node} dies"));
        if node == Node::Controller(1) {
            // Whoever started the copy does not look after it: with another start it would have a higher term.
            return;
        }
        let site = self.me();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            site.start(node);
        });
    }

    /// Starts a program, unless it runs.
    pub fn start(&self, node: Node) {
        if self.life(node).is_some() || !self.inner().starting.insert(node) {
            return;
        }
        if node == Node::Controller(1) && !self.has_second() {
            self.inner().starting.remove(&node);
            return;
        }
        self.trace().say(format_args!("{node} starts"));
        match node {
            Node::Controller(number) => self.start_controller(number),
            Node::Host(host) => self.start_agent(host),
            Node::Client => {}
        }
    }

    /// A program's clock.
    pub fn clock(&self, node: Node) -> Clock {
        let (site, begun) = (self.me.clone(), self.begun);
        Clock::from_fn(move || {
            let of = |numbers: &BTreeMap<Node, i64>| numbers.get(&node).copied().unwrap_or(0);
            let (offset, rate) = site.upgrade().map_or((0, 0), |site| {
                let inner = site.inner();
                (of(&inner.offsets), of(&inner.rates))
            });
            let thousandths = u32::try_from(1_000 + rate).unwrap_or(1_000);
            let time = begun.elapsed() * thousandths / 1_000;
            let time = SignedDuration::try_from(time).unwrap_or_default();
            // 1 January 2026, so that a jump back is a time too.
            let start = Timestamp::from_second(1_767_225_600).expect("a time");
            start + time + SignedDuration::from_secs(offset)
        })
    }

    /// Somebody sets a clock.
    pub fn jump(&self, node: Node, seconds: i64) {
        self.latest();
        *self.inner().offsets.entry(node).or_default() += seconds;
    }

    /// Clocks go faster by so many thousandths.
    pub fn set_rates(&self, rates: &[(Node, i64)]) {
        for (node, rate) in rates.iter().filter(|(_, rate)| *rate != 0) {
            let class = match rate.abs() {
                100.. => "clock 10 % off",
                _ => "clock 2 % off",
            };
            self.fates().count(class);
            self.trace().say(format_args!("{node}: {class} ({rate}/1000)"));
            self.inner().rates.insert(*node, *rate);
        }
    }

    fn start_controller(&self, number: usize) {
        let (node, life) = (Node::Controller(number), Life::default());
        let next = disk::next();
        let seen: Arc<OnceLock<Db>> = Arc::default();
        let store = {
            let disk = self.inner().controllers[number].disk.clone();
            Records::new(&disk, self.me(), life.clone(), node, next.clone())
        };
        let parts = Parts {
            store: Box::new(store),
            writer: Writer::Task(self.before_commit(node, life.clone(), next, seen.clone())),
            failed: self.end_of_store(node, life.clone()),
            clock: self.clock(node),
            new_ids: self.ids.clone(),
            power: None,
        };
        let dial = Arc::new(net::Dialler {
            site: self.me(),
            life: life.clone(),
            node,
        });
        let config = Arc::new(Config {
            report_interval_ms: 5_000,
            unreachable_after_intervals: 2,
            // Few, since a controller that starts reads them all, and so that they are forgotten here too.
            event_retention: 100,
            volume_grace_minutes: Some(60),
            ..Config::default()
        });
        let site = self.me();
        tokio::spawn(async move {
            let core = Core::start(config, site.cluster, dial, parts, life.end.clone()).await;
            let core = match core {
                Ok(core) => core,
                Err(error) => {
                    site.trace().say(format_args!("{node} does not start: {error}"));
                    site.start_later(node);
                    return;
                }
            };
            if node == Node::Controller(1) && !site.has_second() {
                // It was ended before it had begun.
                life.kill();
                site.inner().starting.remove(&node);
                return;
            }
            let _ = seen.set(core.db().clone());
            site.look_of(node, &core.db().snapshot());
            let hosts = (0..site.hosts()).map(Node::Host);
            let servers = hosts
                .map(|host| (host, core.caller(net::identity(&site, host))))
                .collect();
            let mut inner = site.inner();
            inner.starting.remove(&node);
            inner.controllers[number].services = Some(core.services().clone());
            inner.controllers[number].running = Some(Running { life, servers });
        });
    }

    /// What follows from a failed commit: the controller ends, and is started anew.
    fn end_of_store(&self, node: Node, life: Life) -> Box<dyn Fn(&StoreError) + Send + Sync> {
        let site = self.me.clone();
        Box::new(move |_| {
            if let Some(site) = site.upgrade().filter(|_| !life.is_over()) {
                site.kill(node);
            }
        })
    }

    /// What is awaited before each commit: the look at what is stored so far, and the fate of the next.
    fn before_commit(
        &self,
        node: Node,
        life: Life,
        next: disk::Next,
        seen: Arc<OnceLock<Db>>,
    ) -> BeforeCommit {
        let site = self.me.clone();
        Box::new(move || {
            let (site, life, next, seen) = (site.clone(), life.clone(), next.clone(), seen.clone());
            Box::pin(async move {
                life.pass().await;
                let Some(site) = site.upgrade() else { return };
                if let Some(db) = seen.get() {
                    site.look_of(node, &db.snapshot());
                }
                let fate = site.at(Kind::Commit, "commit", node, node);
                if let Fate::Delay(time) = fate {
                    tokio::time::sleep(time).await;
                    life.pass().await;
                }
                *lock(&next) = fate;
            })
        })
    }

    /// What one life of a host's agent is handed.
    fn agent_parts(&self, host: usize, life: &Life, images: Images) -> AgentParts {
        let node = Node::Host(host);
        let (sim, boot) = {
            let inner = self.inner();
            let host = &inner.hosts[host];
            (host.sim.clone(), host.boot)
        };
        let machine = Machine {
            site: self.me(),
            host,
            life: life.clone(),
            sim,
        };
        let ledger = Ledger {
            site: self.me(),
            host,
            life: life.clone(),
        };
        let transport = Streams {
            site: self.me(),
            host,
            life: life.clone(),
        };
        let network: Arc<dyn System> = match self.nature.objects {
            true => Arc::new(Wires {
                site: self.me(),
                host,
                life: life.clone(),
            }),
            false => Arc::new(Simulated::default()),
        };
        AgentParts {
            host: self.host_name(host),
            site: self.cluster,
            address: format!("h{}:7443", host + 1),
            boot_id: boot_id(boot),
            machine: Some(Uuid::from_u128(host as u128 + 1)),
            hypervisor: Arc::new(machine) as Arc<dyn Hypervisor>,
            ledger: AgentLedger::on(Arc::new(ledger)),
            images,
            network,
            transport: Arc::new(transport),
            controller: net::to_controller(&self.me(), life, host),
            clock: self.clock(node),
            ids: self.ids.clone(),
            samples: self.samples[host].subscribe(),
        }
    }

    /// Opens a host's store of images for one life of its agent.
    async fn open_images(&self, host: usize, life: &Life) -> io::Result<Images> {
        let memory = self.inner().hosts[host].images.clone();
        let files: Arc<dyn images::Files> = match self.nature.objects {
            true => Arc::new(Shelf {
                site: self.me(),
                host,
                life: life.clone(),
                memory,
            }),
            false => Arc::new(memory),
        };
        Images::open(
            self.host_name(host),
            files,
            Arc::new(net::to_peers(&self.me(), life, host)),
            self.clock(Node::Host(host)),
            life.end.clone(),
        )
        .await
    }

    async fn begin_agent(&self, host: usize, life: &Life) -> anyhow::Result<Agent> {
        let images = self.open_images(host, life).await?;
        let parts = self.agent_parts(host, life, images);
        Ok(Agent::start(parts, life.end.clone()).await?)
    }

    fn start_agent(&self, host: usize) {
        let (node, life) = (Node::Host(host), Life::default());
        let site = self.me();
        tokio::spawn(async move {
            let agent = match site.begin_agent(host, &life).await {
                Ok(agent) => agent,
                Err(error) => {
                    site.trace().say(format_args!("{node} does not start: {error}"));
                    site.start_later(node);
                    return;
                }
            };
            let hosts = site.inner().hosts.len();
            let callers = (0..2).map(Node::Controller).chain((0..hosts).map(Node::Host));
            let servers = callers.map(|node| (node, caller_in_process(agent.server())));
            let servers = servers.collect();
            {
                let mut inner = site.inner();
                inner.starting.remove(&node);
                inner.hosts[host].running = Some(Running { life, servers });
            }
            if let Err(error) = agent.run(|| ()).await {
                site.trace().say(format_args!("{node} gives up: {error}"));
            }
        });
    }

    fn start_later(&self, node: Node) {
        let site = self.me();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            site.inner().starting.remove(&node);
            site.start(node);
        });
    }

    /// A program stands still.
    pub fn freeze(&self, node: Node, time: Duration) {
        if let Some(life) = self.life(node) {
            life.freeze();
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                life.thaw();
            });
        }
    }

    /// A host's hypervisor restarts; it is away for a while.
    pub fn daemon(&self, host: usize, time: Duration) {
        let sim = self.inner().hosts[host].sim.clone();
        sim.disconnect("the simulated hypervisor restarts");
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            sim.reconnect();
        });
    }

    /// A host loses power, and comes back.
    pub fn power_loss(&self, host: usize, time: Duration) {
        self.census();
        let sim = {
            let mut inner = self.inner();
            inner.hosts[host].boot += 1;
            let sim = inner.hosts[host].sim.clone();
            // What was paused has lost its memory, and nobody can give it back.
            let paused = sim
                .domains()
                .into_iter()
                .filter(|(_, state, _)| *state == DomainState::Paused);
            inner.off.extend(paused.map(|(id, ..)| id));
            sim
        };
        self.checker().power_lost(&sim.domains());
        self.kill_for(Node::Host(host), time);
        sim.reboot_host();
        self.inner().hosts[host].kernel = Kernel::default();
        if self.nature.power {
            self.forget_unsynced(host);
        }
    }

    /// The power goes in the middle of a write to the ledger.
    pub fn cut_amid_write(&self, host: usize) {
        let time = Duration::from_millis(self.below(MOST_TIME_OFF));
        self.power_loss(host, time);
        if !self.nature.power {
            self.forget_unsynced(host);
        }
    }

    /// What was not synced on a host's disk is lost, or some of it, or parts.
    fn forget_unsynced(&self, host: usize) {
        let drawn = self.below(u64::MAX);
        let inner = self.inner();
        let machine = &inner.hosts[host];
        machine.files.cut(drawn);
        let names = machine.files.names();
        let whole = names.into_iter().filter(|name| name.starts_with("vms/"));
        let found = whole.map(|name| (machine.vm_entry(&name), name));
        let found: Vec<(Option<ledger::Vm>, _)> = found.collect();
        self.checker()
            .ledger_after_power_cut(host, &machine.confirmed, &found);
        let entry: Option<ledger::Host> = disk::entry(&machine.files, "host.json");
        if let Some(confirmed) = machine.confirmed_host {
            let found = entry.unwrap_or_default();
            self.checker().ledger_of_host(host, Some(confirmed), found);
        }
    }

    /// A host is fenced by an operator, and the controller is told that what it was told before counts no more.
    pub fn fence(&self, host: usize, time: Duration) {
        self.power_loss(host, time);
        let Some((_, services)) = self.services() else {
            return;
        };
        let name = self.host_name(host);
        tokio::spawn(async move { services.db.change(|tx| registry::raise_session(tx, &name)).await });
    }

    /// A guest ends by itself.
    fn end_guest(&self, id: VmId, crash: bool) {
        self.census();
        let mut inner = self.inner();
        let runs = |host: &HostState| {
            host.sim
                .domains()
                .iter()
                .any(|(known, state, _)| *known == id && *state == DomainState::Running)
        };
        let found = inner.hosts.iter().find(|host| runs(host));
        // Where the host has been started anew since the agent last saw the guest, it takes that for the reason.
        let known = |host: &HostState| {
            let entry = host.vm_entry(&vm_file(id));
            entry.filter(|vm| vm.boot_id == boot_id(host.boot))
        };
        let found = found.map(|host| (host.sim.clone(), known(host)));
        let Some((sim, entry)) = found else { return };
        if !crash {
            inner.off.insert(id);
        }
        drop(inner);
        self.checker().guest_ended(id, crash, entry.as_ref());
        if crash {
            sim.crash_guest(id)
        } else {
            sim.power_off_guest(id)
        }
    }

    /// A guest has just been started: in harsh seeds some power themselves off at once.
    pub fn guest_started(&self, id: VmId) {
        self.inner().off.remove(&id);
        if self.harsh && !self.fates().over && self.below(8) == 0 {
            self.fates().count("guest powered itself off");
            self.end_guest(id, false);
        }
    }

    /// The guest of the VM that has this number ends by itself.
    pub fn end_guest_of(&self, vm: usize, crash: bool) {
        let Some((_, services)) = self.services() else {
            return;
        };
        let name = self.vm_name(vm).parse().expect("a name");
        let id = services.db.snapshot().vm_by_name(&name).map(|vm| vm.id);
        if let Some(id) = id {
            self.end_guest(id, crash);
        }
    }

    /// The operation that was last accepted for the VM of this number.
    pub fn note_operation(&self, vm: usize, operation: OperationId) {
        self.inner().operations.insert(vm, operation);
    }

    /// A move was accepted to empty a host by hand.
    pub fn note_emptying(&self) {
        self.inner().emptying += 1;
    }

    /// See [`Site::note_emptying`].
    pub fn emptying(&self) -> u64 {
        self.inner().emptying
    }

    /// See [`Site::note_operation`].
    pub fn operation_of(&self, vm: usize) -> Option<OperationId> {
        self.inner().operations.get(&vm).copied()
    }

    /// Nothing goes wrong any more: everything runs, and everything is connected.
    pub fn heal(&self) {
        self.fates().over = true;
        self.end_second();
        let nodes: Vec<Node> = {
            let mut inner = self.inner();
            inner.blocked.clear();
            for host in &inner.hosts {
                host.sim.forget_faults();
                host.sim.reconnect();
            }
            let hosts = (0..inner.hosts.len()).map(Node::Host);
            (0..inner.controllers.len())
                .map(Node::Controller)
                .chain(hosts)
                .collect()
        };
        for node in nodes {
            match self.life(node) {
                Some(life) => life.thaw(),
                None => self.start(node),
            }
        }
    }

    /// A day passes for whoever goes by the controller's clock, when the last late message has come: the grace of what was
    /// deleted is over, and what nothing leads to is old.
    pub async fn age(&self) {
        if self.nature.objects {
            tokio::time::sleep(LATE).await;
            self.jump(Node::Controller(0), OLD_SECONDS);
        }
    }

    /// The run is over. Programs have the site and the site has them: nothing would ever be freed.
    pub fn end(&self) {
        let (hosts, controllers) = {
            let mut inner = self.inner();
            (mem::take(&mut inner.hosts), mem::take(&mut inner.controllers))
        };
        drop((hosts, controllers));
    }

    /// What hosts have of the site's objects.
    fn holdings(&self) -> Vec<(HostName, Holdings)> {
        let inner = self.inner();
        let hosts = inner.hosts.iter().zip(&self.names);
        let holdings = hosts.map(|(host, name)| {
            let volumes = host.sim.site_volumes();
            let holdings = Holdings {
                volumes,
                kernel: host.kernel.clone(),
                layers: host.sim.layers_of_disks(),
                backups: host.sim.backup_ids(),
                images: host.images.names(),
            };
            (name.clone(), holdings)
        });
        holdings.collect()
    }

    /// Whether what is stored is what is, and nothing else.
    pub fn is_at_rest(&self) -> Result<(), super::checker::Violation> {
        let waiting = |what: &str| super::checker::Violation {
            invariant: "I14 it comes to rest",
            what: what.to_owned(),
        };
        let (_, services) = self.services().ok_or_else(|| waiting("no controller runs"))?;
        let state = services.db.snapshot();
        self.look(&state);
        let (hosts, off): (Vec<_>, _) = {
            let inner = self.inner();
            let hosts = inner.hosts.iter().zip(&self.names);
            let hosts = hosts.map(|(host, name)| {
                let disks = host.sim.local_volumes() - host.sim.site_volumes().len();
                (name.clone(), host.sim.domains(), disks)
            });
            (hosts.collect(), inner.off.clone())
        };
        let entries = self.entries();
        let view = View {
            state: &state,
            now: services.db.now(),
            silence: silence(&state),
            damage: None,
            files: Default::default(),
        };
        self.checker().at_rest(&view, &hosts, &entries, &off)?;
        if self.nature.objects {
            self.checker().objects_at_rest(&state, &self.holdings())?;
        }
        Ok(())
    }
}

/// A second pool.
fn fast(pool: &Pool) -> Pool {
    Pool {
        name: objects::FAST.to_owned(),
        ..pool.clone()
    }
}

/// What agents say of their hosts: always the same. With one processor not everything fits. `host` has what objects need.
fn sample(cpus: u32, host: Option<usize>) -> Snapshot {
    let pool = Pool {
        name: "local".to_owned(),
        capacity_bytes: 1 << 40,
        available_bytes: 1 << 40,
        ..Pool::default()
    };
    let inventory = Inventory {
        cpus,
        memory_bytes: 4 << 30,
        pools: host.map_or_else(|| vec![pool.clone()], |_| vec![pool.clone(), fast(&pool)]),
        hypervisor: "simulated".to_owned(),
        accelerator: "sim".to_owned(),
        guest_features: host.map_or_else(Vec::new, |_| objects::features()),
        overlay_address: host.map(wires::overlay_address),
        ..Inventory::default()
    };
    Snapshot {
        inventory: Arc::new(inventory),
        usage: Some((Duration::from_secs(1), Arc::new(Usage::default()))),
        vms_at: None,
        vms: Vec::new(),
    }
}
