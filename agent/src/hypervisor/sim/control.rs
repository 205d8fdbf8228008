//! What a test or a demonstration can do to a simulated hypervisor besides calling it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use dalgu_proto::{ids::VmId, vm::PowerReason};
use tokio_util::sync::CancellationToken;

use super::{
    Behaviour, Call, Fault, Phase, Sim,
    backup::Kept,
    layers::Chain,
    state::{Guest, Volume},
};
use crate::hypervisor::{Connection, Definition, DomainState, Hint};

/// The disks on pools that several simulated hosts share; clones are the same storage.
#[derive(Debug, Clone, Default)]
pub struct SharedStorage(
    Arc<Mutex<BTreeMap<Volume, u64>>>,
    Arc<Mutex<BTreeMap<VmId, Chain>>>,
    Arc<Mutex<Kept>>,
);

impl SharedStorage {
    pub(super) fn with_chains<T>(&self, look: impl FnOnce(&mut BTreeMap<VmId, Chain>) -> T) -> T {
        look(&mut self.1.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn with<T>(&self, look: impl FnOnce(&mut BTreeMap<Volume, u64>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn backups<T>(&self, look: impl FnOnce(&mut Kept) -> T) -> T {
        look(&mut self.2.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many disks there are.
    pub fn count(&self) -> usize {
        self.with(|volumes| volumes.len())
    }
}

impl Sim {
    /// Lets so many waiting or coming changes go on, if stepping is by hand.
    pub fn step(&self, count: usize) {
        self.0.steps.add_permits(count);
    }

    /// Orders a fault for the next call of this kind; several are served in order.
    pub fn fail_next(&self, call: Call, fault: Fault) {
        self.0.faults().order(call, fault);
    }

    /// Orders that the next call of this kind panics in its caller, as a defect there would.
    pub fn panic_next(&self, call: Call) {
        self.0.faults().order_panic(call);
    }

    /// Orders that the next migration sent from here breaks at this point; several are served in order.
    pub fn break_migration_at(&self, phase: Phase) {
        self.0.faults().order_break(phase);
    }

    /// Says what a guest does from its next start or request on.
    pub fn set_behaviour(&self, id: VmId, behaviour: Behaviour) {
        if let Some(guest) = self.0.state().domains.get_mut(&id) {
            guest.behaviour = behaviour;
        }
    }

    /// A guest writes to a disk: it holds something else from now on. What it holds stays behind when its VM moves.
    pub fn write_disk(&self, id: VmId, disk: &str) -> u64 {
        let mut state = self.0.state();
        let content = state.contents.entry((id, disk.to_owned())).or_default();
        *content += 1;
        *content
    }

    /// What a disk holds.
    pub fn disk_content(&self, id: VmId, disk: &str) -> u64 {
        self.0.state().content(id, disk)
    }

    /// How many backups there are in pools of this host alone.
    pub fn backups(&self) -> usize {
        self.0.state().backups.len()
    }

    /// How often a guest was started.
    pub fn run(&self, id: VmId) -> Option<u64> {
        self.0.state().domains.get(&id).map(|guest| guest.run)
    }

    /// How often a guest was reset.
    pub fn resets(&self, id: VmId) -> Option<u64> {
        self.0.state().domains.get(&id).map(|guest| guest.resets)
    }

    /// The guest crashes now, as if its QEMU had been killed.
    pub fn crash_guest(&self, id: VmId) {
        self.end_guest(id, PowerReason::Crashed);
    }

    /// The guest powers itself off now.
    pub fn power_off_guest(&self, id: VmId) {
        self.end_guest(id, PowerReason::GuestShutdown);
    }

    /// The guest stops for want of disk space.
    pub fn io_error(&self, id: VmId) {
        if let Some(guest) = self.0.state().domains.get_mut(&id)
            && guest.state == DomainState::Running
        {
            guest.to(DomainState::Paused, PowerReason::IoError);
        }
        self.0.hint(Hint::Domain(id));
    }

    fn end_guest(&self, id: VmId, reason: PowerReason) {
        self.0.state().end(id, None, reason);
        self.0.hint(Hint::Domain(id));
    }

    /// The hypervisor is gone: calls under way and to come fail, guests run on.
    pub fn disconnect(&self, why: &str) {
        self.0.connection.send_replace(Connection::Down(why.to_owned()));
        let old = {
            let mut state = self.0.state();
            state.daemon_ended();
            std::mem::replace(&mut state.daemon, CancellationToken::new())
        };
        old.cancel();
        self.0.hint(Hint::All);
    }

    /// The hypervisor is back.
    pub fn reconnect(&self) {
        self.0.connection.send_replace(Connection::Up);
        self.0.hint(Hint::All);
    }

    /// The hypervisor dies and comes back at once: calls under way fail, transfers end, guests run on.
    pub fn restart(&self) {
        self.disconnect("the simulated hypervisor restarts");
        self.reconnect();
    }

    /// The host loses power and comes back: every guest is off, every incoming one gone.
    pub fn reboot_host(&self) {
        self.disconnect("the simulated host restarts");
        self.0.state().power_cut();
        self.reconnect();
    }

    /// What is here now, without a call that could fail or take time.
    pub fn domains(&self) -> Vec<(VmId, DomainState, PowerReason)> {
        let state = self.0.state();
        let seen = state
            .domains
            .values()
            .map(|guest| (guest.id, guest.state, guest.reason));
        seen.collect()
    }

    /// Takes back every fault that was ordered and has not come; answers those of calls.
    pub fn forget_faults(&self) -> Vec<(Call, Fault)> {
        std::mem::take(&mut *self.0.faults()).into_calls()
    }

    /// Puts a running domain here that is not Dalgu's.
    pub fn add_foreign(&self, id: VmId, name: &str) {
        self.0.state().domains.insert(id, Guest::foreign(id, name));
        self.0.hint(Hint::Domain(id));
    }

    /// How often the guest has counted; a guest that runs twice counts twice.
    pub fn ticks(&self, id: VmId) -> Option<u64> {
        self.0.state().domains.get(&id).map(|guest| guest.ticks)
    }

    /// How many disks there are on the pools of this host alone.
    pub fn local_volumes(&self) -> usize {
        self.0.state().volumes.len()
    }

    /// What a guest's disks hold; 0 before anything was written. `None` where there is no such domain.
    pub fn content(&self, id: VmId) -> Option<u64> {
        let definition = self.definition(id)?;
        let mut state = self.0.state();
        Some(state.with_chain(&definition, &self.0.config, |chain| chain.content()))
    }

    /// The guest writes this to its disks.
    pub fn write(&self, id: VmId, content: u64) {
        if let Some(definition) = self.definition(id) {
            let mut state = self.0.state();
            state.with_chain(&definition, &self.0.config, |chain| chain.write(content));
        }
    }

    /// The disks of a VM on this host's own pools are lost.
    pub fn lose_volumes(&self, id: VmId) {
        self.0.state().volumes.retain(|volume, _| volume.0 != id);
    }

    /// The definition under which a domain of Dalgu's is known here.
    pub fn definition(&self, id: VmId) -> Option<Definition> {
        self.0
            .state()
            .domains
            .get(&id)
            .and_then(|guest| guest.definition.clone())
    }
}
