//! One change of the state: puts and deletes of records, events, and what only memory holds.
//!
//! Made by [`super::Db`] for the length of one closure. Every method keeps indices and reservations right, so that
//! callers cannot forget them. A `Tx` writes nothing itself; what it recorded goes to the store as one batch.

mod backup;
mod image;
mod network;
mod placement_group;
mod plan;
mod refused;
mod usage;
mod volume;

use std::{cell::RefCell, collections::BTreeSet, ops::Deref, sync::Arc};

use dalgu_proto::{
    ids::{HostName, MigrationId, NewIds, OperationId, VmId},
    mutant::{self, Mutant},
};
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

pub use self::refused::REFUSED_KEPT;
use super::{Observing, State, Stray, fleet::Fleet, refused::Refused};
use crate::{
    agent_wire::Reported,
    hosts::pools::Level,
    model::{
        Bounds, EventKind, EventRecord, HostLive, HostRecord, MigrationLive, MigrationRecord, Observation,
        OperationRecord, Overcommit, Phase, Refusal, RequestRecord, VmRecord,
    },
    placement::{Decision, Lately, Policy, PoolPolicy, Protect, Request, Size},
    space::Space,
    store::{Batch, Table, Write},
    verbs::{self, create::VERDICTS_KEPT},
};

/// Events that are kept.
pub const EVENTS_KEPT: usize = 20_000;

/// See the module. Reads go through to the state as it is so far.
pub struct Tx {
    state: State,
    refused: Refused,
    /// In a cell, as a decision changes nothing that anybody sees.
    fleet: RefCell<Fleet>,
    writes: Vec<Write>,
    events: Vec<(u64, String)>,
    forget_events_to: u64,
    erases: bool,
    touched: BTreeSet<VmId>,
    base_revision: u64,
    now: Timestamp,
    new_ids: NewIds,
    events_kept: usize,
}

impl Deref for Tx {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("records have text keys and finite numbers")
}

/// Hosts on which a VM holds room: its owner, and both sides of its migration until that has ended.
fn holders(vm: &VmRecord, migration: Option<&MigrationRecord>) -> BTreeSet<HostName> {
    let mut hosts = BTreeSet::from([vm.owner.clone()]);
    if let Some(migration) = migration.filter(|m| !m.phase.is_terminal()) {
        hosts.insert(migration.source.clone());
        let early = mutant::on(Mutant::EarlyReservationRelease) && migration.phase >= Phase::CuttingOver;
        if !early {
            hosts.insert(migration.destination.clone());
        }
    }
    hosts
}

impl Tx {
    pub(super) fn new(
        state: State,
        mut refused: Refused,
        fleet: Fleet,
        now: Timestamp,
        new_ids: NewIds,
        events_kept: usize,
    ) -> Self {
        let base_revision = state.meta.revision;
        refused.forget(Instant::now());
        Self {
            state,
            refused,
            fleet: RefCell::new(fleet),
            writes: Vec::new(),
            events: Vec::new(),
            forget_events_to: 0,
            erases: false,
            touched: BTreeSet::new(),
            base_revision,
            now,
            new_ids,
            events_kept,
        }
    }

    /// The time of this change, by the wall clock.
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// An id that nothing has yet.
    pub fn new_id(&self) -> Uuid {
        self.new_ids.next()
    }

    /// Decides where a VM goes, on the state as it is so far; `kept` as in [`placement::decide_keeping`](crate::placement::decide_keeping).
    pub fn decide(&self, request: &Request, policy: Policy, kept: usize) -> Decision {
        self.fleet.borrow_mut().decide(&self.state, request, policy, kept)
    }

    /// Whether room is kept for protected domains when a VM of a host becomes larger; else which one would lack how much.
    pub fn may_grow(
        &self,
        host: &HostName,
        from: Size,
        to: Size,
        policy: Policy,
    ) -> Result<(), (String, Size)> {
        self.fleet
            .borrow_mut()
            .may_grow(&self.state, host, (from, to), policy)
    }

    /// Whether the engine knew, when this change began, what was true then.
    #[cfg(test)]
    pub(crate) fn fleet_is_current(&self) -> bool {
        self.fleet.borrow().is_current(&self.state)
    }

    /// What the records of this change get as their revision: the next one, of which each event takes one more.
    fn revision(&self) -> u64 {
        self.base_revision + 1
    }

    fn write(&mut self, table: Table, key: impl ToString, value: Option<String>) {
        self.writes.push(Write {
            table,
            key: key.to_string(),
            value,
        });
        self.state.meta.revision = self.state.meta.revision.max(self.revision());
    }

    /// Asks for another look at a VM once this change is durable.
    pub fn touch(&mut self, vm: VmId) {
        self.touched.insert(vm);
    }

    /// Asks for another look at every VM that holds room on a host.
    pub fn touch_host(&mut self, host: &HostName) {
        let vms: Vec<_> = self
            .state
            .host_vms
            .get(host)
            .into_iter()
            .flatten()
            .copied()
            .collect();
        self.touched.extend(vms);
    }

    fn hold(&mut self, vm: &VmRecord, hosts: BTreeSet<HostName>, add: bool) {
        let change = |value: &mut u64, by: u64| {
            // Stored rows are read without their numbers being judged; sums of nonsense must not end the program.
            *value = if add {
                value.saturating_add(by)
            } else {
                value.saturating_sub(by)
            }
        };
        let spec = vm.held();
        for host in hosts {
            self.fleet.get_mut().mark(&host);
            let reserved = self.state.reserved.entry(host.clone()).or_default();
            let places = vm.places(&host);
            if places.iter().all(|place| place.cpus.is_empty()) {
                change(&mut reserved.vcpus, spec.vcpus.into());
            }
            if !places.is_empty() || spec.bandwidth().next().is_some() {
                Arc::make_mut(&mut reserved.taken).change(&spec, places, add);
            }
            let devices = vm.devices(&host);
            if !devices.is_empty() {
                Arc::make_mut(&mut reserved.taken).change_devices(devices, add);
            }
            change(&mut reserved.memory_mib, spec.reserved_memory_mib());
            reserved.vms = if add {
                reserved.vms.saturating_add(1)
            } else {
                reserved.vms.saturating_sub(1)
            };
            let size = Size {
                vcpus: spec.vcpus,
                memory_mib: spec.reserved_memory_mib(),
            };
            let alike = reserved.sizes.get(&size).copied().unwrap_or(0);
            match if add {
                alike.saturating_add(1)
            } else {
                alike.saturating_sub(1)
            } {
                0 => reserved.sizes.remove(&size),
                alike => reserved.sizes.insert(size, alike),
            };
            for disk in spec.volumes() {
                change(
                    reserved.disks_mib.entry(disk.pool.clone()).or_insert(0),
                    disk.size_mib,
                );
            }
            let vms = self.state.host_vms.entry(host).or_default();
            if add {
                vms.insert(vm.id)
            } else {
                vms.remove(&vm.id)
            };
        }
    }

    fn hold_pools(&mut self, vm: &VmRecord, add: bool) {
        for disk in vm.held().volumes() {
            let sum = self.state.pools_mib.entry(disk.pool.clone()).or_insert(0);
            *sum = if add {
                sum.saturating_add(disk.size_mib)
            } else {
                sum.saturating_sub(disk.size_mib)
            };
        }
    }

    /// Takes over which MAC addresses VMs have.
    fn move_macs(&mut self, before: Option<&VmRecord>, after: Option<&VmRecord>) {
        if before.map(|vm| &vm.spec.nics) == after.map(|vm| &vm.spec.nics) {
            return;
        }
        let of = |vm: &VmRecord| {
            let id = vm.id;
            let nics = vm.spec.nics.clone().into_iter();
            nics.map(move |nic| (nic.mac, id))
        };
        for mac in before.into_iter().flat_map(of) {
            self.state.macs.remove(&mac);
        }
        self.state.macs.extend(after.into_iter().flat_map(of));
    }

    pub(super) fn index_vm(&mut self, vm: Arc<VmRecord>) {
        let migration = self.state.active_migration(vm.id).cloned();
        let old = self.state.vms.get(&vm.id).cloned();
        let old = old.map(|old| (holders(&old, migration.as_deref()), old));
        let hosts = holders(&vm, migration.as_deref());
        let before = old.as_ref().map(|(hosts, old)| (&**old, hosts));
        self.move_ports(before, Some((&vm, &hosts)));
        self.move_volumes(before.map(|(old, _)| old), Some(&vm));
        self.move_members(before.map(|(old, _)| old), Some(&vm));
        self.move_macs(before.map(|(old, _)| old), Some(&vm));
        if let Some((hosts, old)) = old {
            self.hold(&old, hosts, false);
            self.hold_pools(&old, false);
            self.forget_image_vm(&old);
        }
        self.hold(&vm, hosts, true);
        self.hold_pools(&vm, true);
        self.note_image_vm(&vm);
        self.state.vm_names.insert(vm.name.clone(), vm.id);
        self.state.vms.insert(vm.id, vm);
    }

    /// Puts a VM.
    pub fn put_vm(&mut self, mut vm: VmRecord) {
        vm.revision = self.revision();
        let before = self.state.vms.get(&vm.id).cloned();
        // A VM that has come to another host has found one, whatever was refused before.
        if before.as_ref().is_none_or(|before| before.owner != vm.owner) {
            self.forget_refused_placement(&vm.name);
        }
        self.erases |= before
            .as_ref()
            .is_some_and(|before| before.documents != vm.documents);
        self.write(Table::Vms, vm.id, Some(json(&vm)));
        self.touch(vm.id);
        let vm = Arc::new(vm);
        self.index_vm(vm.clone());
        self.follow_vm(before.as_deref(), &vm);
    }

    /// Removes a VM and all that is known of it.
    pub fn delete_vm(&mut self, id: VmId) {
        let Some(old) = self.state.vms.get(&id).cloned() else {
            return;
        };
        let migration = self.state.active_migration(id).cloned();
        let hosts = holders(&old, migration.as_deref());
        self.move_ports(Some((&old, &hosts)), None);
        self.move_volumes(Some(&old), None);
        self.move_members(Some(&old), None);
        self.move_macs(Some(&old), None);
        self.leave_volumes(&old);
        self.hold(&old, hosts, false);
        self.hold_pools(&old, false);
        self.forget_image_vm(&old);
        self.state.vms.remove(&id);
        self.state.vm_names.remove(&old.name);
        self.state.observations.remove(&id);
        self.state.refusals.remove(&id);
        self.write(Table::Vms, id, None);
        self.forget_refused_placement(&old.name);
        if self.state.usage.remove(&id).is_some() {
            self.write(Table::Usage, id, None);
        }
    }

    /// Puts a host.
    pub fn put_host(&mut self, mut host: HostRecord) {
        host.revision = self.revision();
        self.write(Table::Hosts, &host.name, Some(json(&host)));
        self.index_host(Arc::new(host));
    }

    pub(super) fn index_host(&mut self, host: Arc<HostRecord>) {
        self.note_overlay_address(&host);
        self.fleet.get_mut().mark(&host.name);
        self.state.hosts.insert(host.name.clone(), host);
    }

    /// Removes a host and all that is known of it.
    pub fn delete_host(&mut self, name: &HostName) {
        if let Some(host) = self.state.hosts.remove(name) {
            let meta = &mut self.state.meta;
            meta.forgotten_session = meta.forgotten_session.max(host.session);
        }
        self.forget_stock(name);
        self.fleet.get_mut().mark(name);
        self.state.live.remove(name);
        self.write(Table::Hosts, name, None);
    }

    pub(super) fn index_operation(&mut self, operation: Arc<OperationRecord>) {
        let active = self.state.active_operations.entry(operation.vm).or_default();
        if operation.is_active() {
            active.insert(operation.id)
        } else {
            active.remove(&operation.id)
        };
        if active.is_empty() {
            self.state.active_operations.remove(&operation.vm);
        }
        self.state.operations.insert(operation.id, operation);
    }

    /// Puts an operation.
    pub fn put_operation(&mut self, operation: OperationRecord) {
        self.write(Table::Operations, operation.id, Some(json(&operation)));
        self.touch(operation.vm);
        self.index_operation(Arc::new(operation));
    }

    /// Forgets an operation that has ended.
    pub fn forget_operation(&mut self, id: OperationId) {
        self.state.operations.remove(&id);
        self.write(Table::Operations, id, None);
    }

    pub(super) fn index_migration(&mut self, migration: Arc<MigrationRecord>) {
        let active = self.state.active_migrations.get(&migration.vm);
        if migration.phase.is_terminal() && active.is_some_and(|active| *active != migration.id) {
            // It holds nothing any more: an older one that hosts still take part in has been taken up since, after a restore.
            self.state.migrations.insert(migration.id, migration);
            return;
        }
        let vm = self.state.vms.get(&migration.vm).cloned();
        if let Some(vm) = &vm {
            let old = self.state.active_migration(vm.id).cloned();
            let (before, after) = (holders(vm, old.as_deref()), holders(vm, Some(&migration)));
            self.move_ports(Some((vm, &before)), Some((vm, &after)));
            self.hold(vm, before, false);
            self.hold(vm, after, true);
        }
        if migration.phase.is_terminal() {
            if self.state.active_migrations.get(&migration.vm) == Some(&migration.id) {
                self.state.active_migrations.remove(&migration.vm);
            }
        } else {
            self.state.active_migrations.insert(migration.vm, migration.id);
        }
        self.state.migrations.insert(migration.id, migration);
    }

    /// Puts a migration. Its VM's record must be there, except for one that has ended.
    pub fn put_migration(&mut self, migration: MigrationRecord) {
        self.write(Table::Migrations, migration.id, Some(json(&migration)));
        self.touch(migration.vm);
        if migration.phase.is_terminal() {
            self.state.migration_live.remove(&migration.id);
        }
        self.index_migration(Arc::new(migration));
    }

    /// Forgets a migration that has ended.
    pub fn forget_migration(&mut self, id: MigrationId) {
        self.state.migrations.remove(&id);
        self.write(Table::Migrations, id, None);
    }

    /// Remembers a request.
    pub fn put_request(&mut self, request: RequestRecord) {
        self.write(Table::Requests, &request.key, Some(json(&request)));
        self.index_request(Arc::new(request));
    }

    pub(super) fn index_request(&mut self, request: Arc<RequestRecord>) {
        self.state.requests.insert(request.key.clone(), request);
    }

    /// Why a request of that content was refused a moment ago.
    pub fn why_refused(&self, key: &str, body: &str) -> Option<&verbs::Error> {
        self.refused.why(key, body)
    }

    /// Notes that a request is refused; also where nothing else is changed. Not stored.
    pub fn note_refused(&mut self, key: String, body: String, mut why: verbs::Error) {
        // Thousands may be kept, each with a verdict for every host of a large site.
        if let verbs::Error::NoCapacity { decision, .. } = &mut why {
            decision.shorten(VERDICTS_KEPT);
        }
        self.refused.note(Instant::now(), key, body, why);
    }

    /// Gives the change up: only what was refused is kept, and which hosts were marked.
    pub(super) fn give_up(self) -> (Refused, Fleet) {
        (self.refused, self.fleet.into_inner())
    }

    /// Forgets a request.
    pub fn forget_request(&mut self, key: &str) {
        self.state.requests.remove(key);
        self.write(Table::Requests, key, None);
    }

    /// Tells of a change.
    pub fn event(
        &mut self,
        kind: EventKind,
        reason: &str,
        subject: impl ToString,
        message: impl Into<String>,
        operation: Option<OperationId>,
    ) {
        self.tell(kind, reason, subject.to_string(), message.into(), operation, None);
    }

    fn tell(
        &mut self,
        kind: EventKind,
        reason: &str,
        subject: String,
        message: String,
        operation: Option<OperationId>,
        only_for: Option<String>,
    ) {
        // The first event takes the revision of the records, each further one the next.
        let revision = self.base_revision + 1 + self.events.len() as u64;
        let event = EventRecord {
            revision,
            time: self.now,
            kind,
            reason: reason.to_owned(),
            message,
            subject,
            operation,
            only_for,
        };
        self.events.push((revision, json(&event)));
        self.state.events.insert(revision, Arc::new(event));
        self.state.meta.revision = self.state.meta.revision.max(revision);
        while self.state.events.len() > self.events_kept {
            let Some(oldest) = self.state.events.get_min().map(|(revision, _)| *revision) else {
                break;
            };
            self.state.events.remove(&oldest);
            self.forget_events_to = oldest;
            self.state.meta.forgotten = self.state.meta.forgotten.max(oldest);
        }
    }

    /// Notes what a VM's owner said. Not stored.
    pub fn observe(&mut self, vm: VmId, observation: Option<Observation>) {
        match observation {
            Some(observation) => self.state.observations.insert(vm, Arc::new(observation)),
            None => self.state.observations.remove(&vm),
        };
    }

    /// Notes that an agent refused an intent. Not stored.
    pub fn refuse(&mut self, vm: VmId, refusal: Option<Refusal>) {
        match refusal {
            Some(refusal) => self.state.refusals.insert(vm, Arc::new(refusal)),
            None => self.state.refusals.remove(&vm),
        };
    }

    /// Notes what is known of a host. Not stored.
    pub fn set_live(&mut self, host: HostName, live: HostLive) {
        self.note_stock(&host, &live);
        self.note_hearing(&host, &live);
        self.fleet.get_mut().mark(&host);
        self.state.live.insert(host, Arc::new(live));
    }

    /// Notes how many processors a host's VMs are expected to use, and how busy it has been. Not stored.
    pub fn set_expected(&mut self, host: &HostName, cpus_expected: Option<f64>, lately: Option<Lately>) {
        let Some(live) = self.state.live.get(host) else {
            return;
        };
        if (live.cpus_expected, live.lately) != (cpus_expected, lately) {
            self.fleet.get_mut().mark(host);
            let live = HostLive {
                cpus_expected,
                lately,
                ..(**live).clone()
            };
            self.state.live.insert(host.clone(), Arc::new(live));
        }
    }

    /// Notes what a host's load has made of its over-commit ratio. Not stored.
    pub fn set_overcommit(&mut self, host: &HostName, overcommit: Overcommit) {
        let Some(live) = self.state.live.get(host) else {
            return;
        };
        if live.overcommit != overcommit {
            self.fleet.get_mut().mark(host);
            let live = HostLive {
                overcommit,
                ..(**live).clone()
            };
            self.state.live.insert(host.clone(), Arc::new(live));
        }
    }

    /// Notes what is known of a migration. Not stored.
    pub fn set_migration_live(&mut self, id: MigrationId, live: MigrationLive) {
        self.state.migration_live.insert(id, Arc::new(live));
    }

    /// Notes a VM that was found where it should not be; how often it has been. Not stored.
    pub fn note_stray(&mut self, host: HostName, reported: Reported) -> u32 {
        self.fleet.get_mut().mark(&host);
        let key = (host, reported.id);
        let before = self.state.strays.get(&key).map_or(0, |stray| stray.times);
        let times = before.saturating_add(1);
        let reported = Arc::new(reported);
        self.state.strays.insert(key, Stray { times, reported });
        times
    }

    /// Forgets that a VM was found where it is its host's own again.
    pub fn forget_stray(&mut self, host: &HostName, vm: VmId) {
        if !self.state.strays.is_empty() {
            self.fleet.get_mut().mark(host);
            self.state.strays.remove(&(host.clone(), vm));
        }
    }

    /// Forgets the strays of a host that are no longer there.
    pub fn forget_strays(&mut self, host: &HostName, there: &BTreeSet<VmId>) {
        let first = (host.clone(), VmId::from_uuid(Uuid::nil()));
        let of_host = self.state.strays.range(first..).map(|(key, _)| key);
        let gone: Vec<_> = of_host
            .take_while(|(at, _)| at == host)
            .filter(|(_, vm)| !there.contains(vm))
            .cloned()
            .collect();
        for key in gone {
            self.fleet.get_mut().mark(host);
            self.state.strays.remove(&key);
        }
    }

    /// Begins, changes or ends the observing after a restore. Stored with the next record or event of this change.
    pub fn set_observing(&mut self, observing: Option<Observing>) {
        self.state.meta.observing = observing;
        self.touch_images();
        self.touch_networks();
    }

    /// Notes what a host says of a VM whose place is not sure. Not stored.
    pub fn sight(&mut self, host: HostName, reported: Reported) {
        self.state
            .sighted
            .entry(host.clone())
            .or_default()
            .insert(reported.id);
        let hosts = self.state.sightings.entry(reported.id).or_default();
        hosts.insert(host, Arc::new(reported));
    }

    /// Forgets what hosts said of a VM.
    pub fn forget_sightings(&mut self, vm: VmId) {
        for host in self.state.sightings.remove(&vm).into_iter().flatten() {
            self.unsight(&host.0, vm);
        }
    }

    fn unsight(&mut self, host: &HostName, vm: VmId) {
        if let Some(vms) = self.state.sighted.get_mut(host) {
            vms.remove(&vm);
            if vms.is_empty() {
                self.state.sighted.remove(host);
            }
        }
    }

    /// Notes that a host has told all it has, and forgets what is no longer there. Not stored.
    pub fn listed(&mut self, host: &HostName, there: &BTreeSet<VmId>) {
        if !self.state.listed.contains(host) {
            self.state.listed.insert(host.clone());
        }
        let sighted = self.state.sighted.get(host).into_iter().flatten();
        let gone: Vec<_> = sighted.filter(|vm| !there.contains(vm)).copied().collect();
        for vm in gone {
            self.unsight(host, vm);
            if let Some(hosts) = self.state.sightings.get_mut(&vm) {
                hosts.remove(host);
                if hosts.is_empty() {
                    self.state.sightings.remove(&vm);
                }
            }
        }
    }

    /// Notes how much room the store has. Not stored.
    pub fn set_space(&mut self, space: Space) {
        self.state.space = Some(space);
    }

    /// How far pools are filled, by the configuration. Not stored.
    pub fn set_pool_policy(&mut self, policy: PoolPolicy) {
        self.fleet.get_mut().mark_all();
        self.state.pool_policy = policy;
    }

    /// Most VMs that a host takes of which nothing else is said, by the configuration. Not stored.
    pub fn set_vms_most(&mut self, most: Option<u32>) {
        self.fleet.get_mut().mark_all();
        self.state.vms_most = most;
    }

    /// Between which ratios the over-commit of a host's processors follows its load, by the configuration. Not stored.
    pub fn set_cpu_bounds(&mut self, bounds: Bounds) {
        self.fleet.get_mut().mark_all();
        self.state.cpu_bounds = bounds;
    }

    /// Whether hosts are closed for new VMs by their load, by the configuration. Not stored.
    pub fn set_close_pressed(&mut self, close: bool) {
        self.state.close_pressed = close;
    }

    /// Whether hosts that are off are woken for what finds no room, by the configuration. Not stored.
    pub fn set_wakes_hosts(&mut self, wakes: bool) {
        self.state.wakes_hosts = wakes;
    }

    /// The domains that room is kept for, by the configuration. Not stored.
    pub fn set_protect(&mut self, protect: Arc<Protect>) {
        self.fleet.get_mut().mark_all();
        self.state.protect = protect;
    }

    /// Notes how full a pool is; `None` for the host of a shared one. Not stored.
    pub fn set_pool_level(&mut self, pool: (Option<HostName>, String), level: Level) {
        self.state.pool_levels.insert(pool, level);
    }

    /// Agents obey another controller with this site's credentials. From now on this one only listens. Not stored; the same
    /// until it ends.
    pub fn set_replaced(&mut self, by: String) {
        if self.state.replaced_by.is_some() {
            return;
        }
        tracing::error!(
            said = by,
            "agents obey another controller with this site's credentials: this one gives no more commands. Stop one of the \
             two, and start the other anew"
        );
        self.event(EventKind::Host, "ControllerReplaced", "site", by.clone(), None);
        self.state.replaced_by = Some(by);
    }

    /// Raises the term, which every later command bears.
    pub(super) fn raise_term(&mut self) {
        self.state.meta.term = self.state.meta.term.next();
        self.state.run_id = self.new_id();
        // Written with the rest of the site's numbers, see `finish`; the revision makes it a change.
        self.write(Table::Meta, super::load::META_KEY, Some(String::new()));
    }

    /// What the store is to write, what the state is then, and which VMs want a look.
    pub(super) fn finish(self) -> (State, Batch, Vec<VmId>, (Refused, Fleet)) {
        let mut batch = Batch {
            writes: self.writes,
            events: self.events,
            forget_events_to: self.forget_events_to,
            erases: self.erases,
        };
        if !batch.is_empty() {
            let value = Some(json(&self.state.meta));
            batch.writes.push(Write {
                table: Table::Meta,
                key: super::load::META_KEY.to_owned(),
                value,
            });
        }
        (
            self.state,
            batch,
            self.touched.into_iter().collect(),
            (self.refused, self.fleet.into_inner()),
        )
    }
}
