//! A pretended world: hosts with domains, and transfers between them, by the rules of the agents' contract.
//!
//! One lock over all hosts, so that a switch-over is one moment. [`Fabric::run`] lets the world go on; it panics when a VM
//! runs on two hosts.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use dalgu_proto::{
    agent::v1::{self as agent, DomainPresence, TransferState},
    v1::{PowerReason, PowerState},
};
use tokio::sync::Notify;

use super::{images::Images, networks::Networks, storage::Storage};

/// One step of the pretended world.
const TICK: Duration = Duration::from_millis(5);

#[derive(Debug, Clone)]
pub struct Vm {
    pub intent: agent::VmIntent,
    pub observed: u64,
    pub power: PowerState,
    pub status: u64,
    /// This domain's memory must not be used again.
    pub handed_over: bool,
    /// The guest shuts itself down right after its start.
    pub short_lived: bool,
    /// Pools that its disks are in.
    pub places: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
pub struct Transfer {
    pub vm: String,
    pub source: bool,
    pub peer: String,
    pub state: TransferState,
    pub settled: bool,
    pub steps: u32,
    /// What will be here, on the destination.
    pub incoming: Option<agent::VmIntent>,
}

#[derive(Debug, Clone, Default)]
pub struct Host {
    pub address: String,
    pub session: u64,
    pub term: u64,
    pub cluster_id: String,
    pub vms: BTreeMap<String, Vm>,
    pub transfers: BTreeMap<String, Transfer>,
    /// Ownership numbers up to which a VM is refused here.
    pub refused: BTreeMap<String, u64>,
    /// Answers nothing and reports nothing.
    pub cut_off: bool,
    /// Another controller has had it delete what it had.
    pub gave_up: bool,
    /// Refuses to start anything.
    pub broken: bool,
    /// Takes what it is told, and does nothing of it.
    pub idle: bool,
    /// A source whose transfer has ended knows nothing of how far it came, as after a restart of its agent.
    pub progress_lost: bool,
    /// Commands taken, by name.
    pub commands: BTreeMap<&'static str, u32>,
    /// What is here of images.
    pub images: Images,
    /// What is here of networks.
    pub networks: Networks,
    /// Offers volumes of the site.
    pub offers_volumes: bool,
    /// What is here in the pool that all hosts see.
    pub storage: Storage,
}

#[derive(Debug, Default)]
pub struct World {
    pub hosts: BTreeMap<String, Host>,
    /// Steps a transfer takes.
    pub transfer_steps: u32,
    /// Transfers fail when they would have ended.
    pub transfers_fail: bool,
    /// What arrives dies at once.
    pub arrivals_die: bool,
}

#[derive(Clone, Default)]
pub struct Fabric {
    world: Arc<Mutex<World>>,
    pub changed: Arc<Notify>,
}

impl Fabric {
    pub fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub async fn run(self) {
        loop {
            tokio::time::sleep(TICK).await;
            let changed = {
                let mut world = self.lock();
                let changed = world.step();
                world.check();
                changed
            };
            if changed {
                self.changed.notify_waiters();
            }
        }
    }

    /// Hosts on which a VM runs or is paused.
    pub fn alive_on(&self, uid: &str) -> Vec<String> {
        let world = self.lock();
        let alive = world
            .hosts
            .iter()
            .filter(|(_, host)| host.vms.get(uid).is_some_and(Vm::is_alive));
        alive.map(|(name, _)| name.clone()).collect()
    }

    /// Names of all hosts that have anything of any VM.
    pub fn leftovers(&self) -> Vec<String> {
        let world = self.lock();
        world
            .hosts
            .iter()
            .filter(|(_, host)| !host.vms.is_empty())
            .map(|(name, _)| name.clone())
            .collect()
    }
}

impl Vm {
    pub fn new(intent: agent::VmIntent) -> Self {
        Self {
            intent,
            observed: 0,
            power: PowerState::Unspecified,
            status: 1,
            handed_over: false,
            short_lived: false,
            places: BTreeMap::new(),
        }
    }

    fn is_alive(&self) -> bool {
        !self.handed_over && matches!(self.power, PowerState::Running | PowerState::Paused)
    }

    pub fn presence(&self) -> DomainPresence {
        match (self.handed_over, self.power) {
            (true, _) => DomainPresence::HandedOver,
            (_, PowerState::Running) => DomainPresence::Running,
            (_, PowerState::Paused) => DomainPresence::Paused,
            (_, PowerState::Stopped) => DomainPresence::Stopped,
            _ => DomainPresence::Absent,
        }
    }

    pub fn report(&self, broken: bool) -> agent::VmReport {
        let settled = self.observed == self.intent.generation;
        let failed = broken && !settled;
        let phase = if failed {
            agent::VmPhase::Failed
        } else if settled {
            agent::VmPhase::Settled
        } else {
            agent::VmPhase::Applying
        };
        let error = failed.then(|| dalgu_proto::v1::VmError {
            reason: "START_FAILED".into(),
            message: "no luck".into(),
            retrying: false,
            time: None,
        });
        agent::VmReport {
            uid: self.intent.uid.clone(),
            name: self.intent.name.clone(),
            accepted_generation: self.intent.generation,
            observed_generation: self.observed,
            epoch: self.intent.epoch,
            status_generation: self.status + u64::from(failed),
            phase: phase.into(),
            power_state: self.power.into(),
            power_reason: if self.short_lived && self.power == PowerState::Stopped {
                PowerReason::GuestShutdown
            } else {
                PowerReason::Requested
            }
            .into(),
            error,
            pending_changes: self.moving(),
            ..Default::default()
        }
    }
}

impl World {
    fn step(&mut self) -> bool {
        let mut changed = false;
        for host in self.hosts.values_mut() {
            let outgoing: Vec<_> = host
                .transfers
                .values()
                .filter(|t| t.source && !t.settled)
                .map(|t| t.vm.clone())
                .collect();
            for (uid, vm) in &mut host.vms {
                let busy = vm.handed_over || outgoing.contains(uid);
                let made = host.images.has_all(&vm.intent.images) && host.networks.has_all(&vm.intent);
                // Before it tells that it has heard: a move shows in its reports at least once.
                if !busy && vm.move_disks(host.storage.copies_stay) {
                    vm.status += 1;
                    changed = true;
                }
                if vm.observed < vm.intent.generation && !busy && !host.broken && !host.idle && made {
                    vm.observed = vm.intent.generation;
                    vm.power = vm.intent.power_state();
                    if vm.short_lived && vm.power == PowerState::Running {
                        vm.power = PowerState::Stopped;
                    }
                    vm.status += 1;
                    changed = true;
                }
            }
        }
        self.transfer();
        changed | Images::step(self)
    }

    fn transfer(&mut self) {
        let active: Vec<(String, String, Transfer)> = self
            .hosts
            .iter()
            .flat_map(|(name, host)| {
                host.transfers
                    .iter()
                    .map(move |(id, t)| (name.clone(), id.clone(), t.clone()))
            })
            .filter(|(_, _, t)| t.source && t.state == TransferState::Active && !t.settled)
            .collect();
        for (source, id, transfer) in active {
            let ready = self
                .hosts
                .get(&transfer.peer)
                .and_then(|host| host.transfers.get(&id));
            let ready = ready.filter(|t| !t.settled).and_then(|t| t.incoming.clone());
            let fails = self.transfers_fail || ready.is_none();
            let steps = self.transfer_steps;
            let own = self
                .hosts
                .get_mut(&source)
                .unwrap()
                .transfers
                .get_mut(&id)
                .unwrap();
            own.steps += 1;
            if own.steps < steps {
                continue;
            }
            if fails {
                own.state = TransferState::Failed;
                continue;
            }
            own.state = TransferState::Completed;
            let from = self
                .hosts
                .get_mut(&source)
                .unwrap()
                .vms
                .get_mut(&transfer.vm)
                .unwrap();
            from.handed_over = true;
            from.status += 1;
            let (power, observed) = (from.power, from.observed);
            let to = self.hosts.get_mut(&transfer.peer).unwrap();
            to.transfers.get_mut(&id).unwrap().state = TransferState::Completed;
            if self.arrivals_die {
                continue;
            }
            let arrived = Vm {
                power,
                observed,
                ..Vm::new(ready.unwrap())
            };
            to.vms.insert(transfer.vm.clone(), arrived);
        }
    }

    fn check(&self) {
        let mut alive = BTreeMap::<&str, Vec<&str>>::new();
        for (name, host) in &self.hosts {
            for (uid, _) in host.vms.iter().filter(|(_, vm)| vm.is_alive()) {
                alive.entry(uid).or_default().push(name);
            }
        }
        for (uid, hosts) in alive {
            assert!(hosts.len() < 2, "VM {uid} is alive on {hosts:?}");
        }
    }
}
