//! The task of one VM: takes requests, looks at the domain, does the next step, publishes what it knows.
//!
//! ```text
//!          requests ─┐                        ┌─> ledger (before any step)
//!    hints, timers ──┼─> look ─> plan ─> step ┼─> hypervisor
//!  end of transfer ──┘     ^               │  └─> status
//!                          └───────────────┘
//! ```
//!
//! One piece of work (a look, or a step and a look) is under way at a time; requests are taken meanwhile, and what they
//! change is seen by the next plan. A call that hangs is given up early where the VM is to be off at once. Started by
//! [`super::Vms`]; nobody else touches this VM.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use dalgu_proto::{
    ids::VmId,
    mutant::{self, Mutant},
    snapshot::Set,
    vm::PowerState,
};
use futures::future::BoxFuture;
use jiff::Timestamp;
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Known, Reply, Request, Shared,
    plan::{self, Memory, Step, changes::FailedMove},
    reason,
    status::{Arrival, Status},
    steps::{self, Asked, FIRST_RETRY, Leaving, Outcome, Stuck, Work, poll_work, until_given_up},
    transfer::measured,
    transfers::Transfers,
};
use crate::{
    hypervisor::{Change, Definition, Domain, DomainState, Hardware, Hint, Layers, Mark},
    ledger::{self, Disposition, Done, Taken},
};

/// A VM at rest is looked at so often, in case a hint was lost.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);
/// A guest that was asked to shut down or to reboot, or one that a late call may change, is looked at so often.
const SHUTDOWN_LOOK: Duration = Duration::from_secs(2);
/// A VM whose disk is copied to another pool is looked at so often.
const COPY_LOOK: Duration = Duration::from_secs(1);
/// What is gone, or finished, is remembered so long, to refuse late commands for it.
pub(super) const REMEMBER: jiff::SignedDuration = jiff::SignedDuration::from_hours(24);

/// See the module's documentation.
pub(super) struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) id: VmId,
    pub(super) vm: Option<ledger::Vm>,
    pub(super) transfers: Transfers,
    pub(super) domain: Option<Domain>,
    /// Whether `domain` is what was seen last; false before the first look and after a failed one.
    pub(super) seen: Option<Timestamp>,
    /// Whether it was seen in this run of the agent at all.
    pub(super) looked: bool,
    pub(super) volumes_ready: bool,
    pub(super) volumes_gone: bool,
    pub(super) started: bool,
    pub(super) resume_failed: bool,
    pub(super) resumed: Option<Instant>,
    pub(super) shutdown: Option<Asked>,
    pub(super) reboot: Option<Asked>,
    /// Outlives the intent under which it was asked.
    pub(super) leaving: Option<Leaving>,
    pub(super) rebooting: Option<Leaving>,
    /// What the domain has, if that was looked at with it.
    pub(super) hardware: Option<Hardware>,
    /// The layers of its disks, if they were looked at with it.
    pub(super) layers: Option<Layers>,
    /// Changes of it that were asked for under the present intent.
    pub(super) tried: Vec<(Change, Instant)>,
    /// Disks whose move has failed under the present intent, with why, when, and how often.
    pub(super) failed_moves: BTreeMap<String, (String, Instant, u32)>,
    unfinished: bool,
    pub(super) restarts: VecDeque<Instant>,
    pub(super) stuck: Option<Stuck>,
    pub(super) adopted: bool,
    pub(super) work: Option<Work>,
    /// Watches for the first packet of the VM that has arrived.
    pub(super) measuring: Option<BoxFuture<'static, Option<Arrival>>>,
    look_again: bool,
    wake: Instant,
    pub(super) status: watch::Sender<Status>,
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>, id: VmId, known: Known, status: watch::Sender<Status>) -> Self {
        let mut vm = known.vm;
        let adopted = known.adopted.is_some();
        if let (None, Some(domain)) = (&vm, &known.adopted) {
            vm = adopt(domain);
        }
        if let Some(vm) = &vm {
            shared.images.hold(id, vm.digests(), false);
            shared.networks.hold(id, vm.plugged(), false);
            shared.volumes.hold(id, vm.volumes(), false);
            shared.pins.hold(id, vm.places());
            shared.devices.hold(id, vm.devices());
            if matches!(vm.disposition, Disposition::Incoming { .. }) {
                shared.networks.expect(&vm.plugged());
            }
        }
        let mut driver = Self {
            transfers: Transfers::new(known.migrations),
            shared,
            id,
            vm,
            domain: known.adopted,
            seen: None,
            looked: false,
            volumes_ready: false,
            volumes_gone: false,
            started: false,
            resume_failed: false,
            resumed: None,
            shutdown: None,
            reboot: None,
            leaving: None,
            rebooting: None,
            hardware: None,
            layers: None,
            tried: Vec::new(),
            failed_moves: BTreeMap::new(),
            unfinished: false,
            restarts: VecDeque::new(),
            stuck: None,
            adopted,
            work: None,
            measuring: None,
            look_again: false,
            wake: Instant::now(),
            status,
        };
        // A VM that is known is reported from the first moment on.
        driver.publish();
        driver
    }

    /// Runs until the agent stops, or until there is nothing left to remember of the VM.
    #[tracing::instrument(name = "vm", skip_all, fields(vm = %self.id))]
    pub(super) async fn run(
        mut self,
        requests: &mut mpsc::Receiver<(Request, Reply)>,
        stop: CancellationToken,
    ) {
        let mut hints = self.shared.hypervisor.hints();
        let mut progress = self.transfers.progress();
        self.recover_transfers().await;
        self.look();
        loop {
            self.publish();
            let handed_over = self.transfers.handed_over();
            let given_up = until_given_up(self.vm.as_ref(), self.work.as_ref(), self.is_off());
            // Every arm is cancel safe: receivers and timers lose nothing when dropped, and `work` and the transfer are
            // polled in place and stay where they are.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                // Before requests: a step that was planned is begun while the intent is the one that it was planned for.
                outcome = poll_work(&mut self.work) => {
                    self.work = None;
                    self.apply(outcome).await;
                    if std::mem::take(&mut self.look_again) && self.work.is_none() {
                        // What was done is told before the next look makes the VM busy again.
                        self.publish();
                        self.look();
                    }
                }
                request = requests.recv() => match request {
                    Some((request, reply)) => self.serve(request, reply).await,
                    None => return,
                },
                ended = self.transfers.ended() => {
                    self.transfer_ended(ended).await;
                    self.look();
                }
                () = given_up => self.give_up().await,
                arrival = measured(&mut self.measuring) => self.note_arrival(arrival),
                () = handed_over => {
                    self.go_on().await;
                    self.look();
                }
                hint = hints.recv() => if self.concerns(hint) { self.look() },
                // The loop's next turn publishes it.
                Ok(()) = progress.changed() => {}
                () = sleep_until(self.wake) => {
                    if self.forgotten().await {
                        return;
                    }
                    self.look();
                }
            }
        }
    }

    fn concerns(&self, hint: Result<Hint, broadcast::error::RecvError>) -> bool {
        match hint {
            Ok(Hint::Domain(id)) => id == self.id,
            Ok(Hint::All) | Err(broadcast::error::RecvError::Lagged(_)) => true,
            Err(broadcast::error::RecvError::Closed) => false,
        }
    }

    async fn serve(&mut self, request: Request, reply: Reply) {
        let outcome = self.request(request).await;
        if let Err(error) = &outcome {
            tracing::info!(error = error as &dyn std::error::Error, "a request was refused");
        }
        self.publish();
        // The caller may have gone; what it asked for stands.
        let _ = reply.send(outcome.map(|()| self.status.borrow().clone()));
        self.look();
    }

    /// Begins to look at the domain, unless work is under way: that ends with a look.
    fn look(&mut self) {
        // A VM that is gone has no domain to look at.
        let relevant = self
            .vm
            .as_ref()
            .is_some_and(|vm| !matches!(vm.disposition, Disposition::Gone { .. }));
        self.wake = Instant::now() + LOOK_INTERVAL;
        if self.work.is_some() {
            // What is under way may have looked just before the change that this call is about.
            self.look_again = true;
        } else if relevant {
            self.begin(None);
        }
    }

    /// What the domain is to be; `None` before the intent is known.
    pub(super) fn definition(&self) -> Option<Definition> {
        let vm = self.vm.as_ref()?;
        let intent = vm.intent.as_ref()?;
        let mark = Mark {
            cluster: self.shared.cluster,
            epoch: intent.epoch,
            generation: intent.generation,
        };
        let mut spec = intent.spec.clone();
        if vm.disposition == Disposition::Deleting {
            // The others go, whatever they hold.
            spec.disks.retain(|disk| disk.volume.is_some());
        }
        if self.domain.is_none() {
            // No domain says where a disk is whose move has not ended.
            for disk in &mut spec.disks {
                let mut left = vm.changes.removed.iter();
                if let Some(left) = left.find(|left| left.name == disk.name) {
                    disk.pool.clone_from(&left.pool);
                }
            }
        }
        Some(Definition {
            id: self.id,
            name: vm.name.clone(),
            mark,
            spec,
            documents: vm.documents.clone(),
            networks: Vec::new(),
            layers: intent.snapshots.iter().flat_map(Set::numbers).collect(),
            places: intent.places.clone(),
            devices: intent.devices.clone(),
        })
    }

    async fn apply(&mut self, outcome: Outcome) {
        let restart_failed = matches!(&outcome.step, Some((Step::Restart, Err(_))));
        match outcome.step {
            Some((step, Ok(frozen))) => {
                self.stuck = None;
                self.step_done(step, &outcome.asked, frozen).await;
            }
            Some((step, Err(steps::Error::Hypervisor(error)))) => {
                self.step_failed(step, &error, &outcome.asked).await;
            }
            Some((step, Err(steps::Error::Image(awaited)))) => self.await_image(step, &awaited),
            Some((step, Err(steps::Error::Network(waiting)))) => self.await_network(step, &waiting),
            None => {}
        }
        match outcome.seen {
            Ok(domain) => {
                self.domain = domain;
                self.hardware = outcome.hardware;
                self.layers = outcome.layers;
                if restart_failed && self.is_off() {
                    // It says nothing of the guest: its pool may come later than the host.
                    self.restarts.pop_back();
                }
                self.unfinished = outcome.unfinished;
                self.seen = Some(self.shared.clock.now());
                self.looked = true;
                self.listen().await;
                self.note_reaction();
                self.note_power().await;
                self.note_layers().await;
                self.plan().await;
            }
            Err(error) => {
                // Nothing may be concluded from not seeing.
                tracing::debug!(%error, "the domain could not be looked at");
                self.seen = None;
                self.wake = Instant::now() + FIRST_RETRY * 4;
            }
        }
    }

    fn is_off(&self) -> bool {
        let domain = self.domain.as_ref();
        domain.is_some_and(|domain| domain.state == DomainState::Stopped)
    }

    /// Forgets failures and what was tried: there is a new intent.
    pub(super) fn start_afresh(&mut self) {
        self.stuck = None;
        self.volumes_ready = false;
        self.volumes_gone = false;
        self.started = false;
        self.resume_failed = false;
        self.resumed = None;
        self.shutdown = None;
        self.reboot = None;
        self.tried.clear();
        self.failed_moves.clear();
        self.restarts.clear();
        self.adopted = false;
    }

    /// What the plan needs to know besides the ledger.
    pub(super) fn memory(&mut self) -> Memory {
        let now = Instant::now();
        while self
            .restarts
            .front()
            .is_some_and(|at| now - *at > plan::CRASH_WINDOW)
        {
            self.restarts.pop_front();
        }
        let count = u32::try_from(self.restarts.len()).unwrap_or(u32::MAX);
        // 1, 2, 4, 8 s after the last restart; the first is at once.
        let restart_wait = self.restarts.back().map_or(Duration::ZERO, |last| {
            Duration::from_secs(1 << (count - 1).min(6)).saturating_sub(now - *last)
        });
        // What has been given up stays so until somebody asks for something.
        let given_up = self
            .stuck
            .as_ref()
            .is_some_and(|stuck| stuck.step == Step::CrashLoop);
        Memory {
            volumes_ready: self.volumes_ready || self.vm.as_ref().is_some_and(made),
            volumes_gone: self.volumes_gone,
            started: self.started,
            resume_failed: self.resume_failed,
            resumed: self.resumed.map(|at| at.elapsed()),
            shutdown: self.shutdown.map(|asked| asked.ago(now)),
            reboot: self.reboot.map(|asked| asked.ago(now)),
            leaving: self.leaving.and_then(|leaving| leaving.left(now)),
            rebooting: self.rebooting.is_some_and(|asked| asked.left(now).is_some()),
            unfinished: self.unfinished,
            restarts: if given_up { plan::MAX_RESTARTS } else { count },
            restart_wait,
            hardware: self.hardware.clone(),
            layers: self.layers.clone(),
            tried: self
                .tried
                .iter()
                .map(|(change, at)| (change.clone(), now - *at))
                .collect(),
            failed_moves: self.failed_moves(now),
        }
    }

    fn failed_moves(&self, now: Instant) -> BTreeMap<String, FailedMove> {
        let failed = self.failed_moves.iter().map(|(disk, (message, at, times))| {
            let failed = FailedMove {
                message: message.clone(),
                ago: now - *at,
                times: *times,
            };
            (disk.clone(), failed)
        });
        failed.collect()
    }

    /// Whether a disk is being copied, or was just asked to be.
    fn copying(&self, now: Instant) -> bool {
        let just = |(change, at): &(Change, Instant)| {
            matches!(change, Change::MoveDisk(_)) && now - *at < COPY_LOOK * 5
        };
        self.hardware.as_ref().is_some_and(plan::changes::copying) || self.tried.iter().any(just)
    }

    /// Chooses the next step from what was just seen, and begins it.
    async fn plan(&mut self) {
        let now = Instant::now();
        self.wake = now + LOOK_INTERVAL;
        let memory = self.memory();
        let Some(vm) = &mut self.vm else { return };
        let step = plan::next(vm, self.domain.as_ref(), &memory);
        let since = self.stuck.as_ref().map(|stuck| stuck.failure.since);
        match &self.stuck {
            // A call can fail and take effect all the same, or things have changed otherwise.
            Some(stuck) if stuck.step != step => self.stuck = None,
            Some(Stuck { retry_at: None, .. }) => return,
            Some(Stuck {
                retry_at: Some(at), ..
            }) if *at > now => {
                self.wake = *at;
                return;
            }
            _ => {}
        }
        let freezes = step.freezes(memory.hardware.as_ref());
        let before = (freezes || step.is_written()).then(|| vm.clone());
        let (power, restart) = vm
            .intent
            .as_ref()
            .map_or((0, 0), |intent| (intent.power_sequence, intent.restart_sequence));
        if matches!(step, Step::Start | Step::Restart) {
            vm.done.starting = true;
            self.resume_failed = false;
            self.resumed = None;
        }
        if freezes {
            vm.changes.frozen = true;
            // Whoever finds it half done makes sure that the next start has the disk where it is then.
            vm.done.defined = None;
        }
        match &step {
            Step::Settled => {
                if self.reboot.take().is_some() {
                    tracing::warn!("the guest was asked to reboot and did not");
                }
                if self.copying(now) {
                    self.wake = now + COPY_LOOK;
                }
                return;
            }
            Step::Wait(time) => {
                self.wake = now + (*time).min(SHUTDOWN_LOOK);
                return;
            }
            Step::Await => {
                self.wake = now + SHUTDOWN_LOOK;
                self.await_call(since, self.wake);
                return;
            }
            Step::CrashLoop => {
                self.crash_loop();
                return;
            }
            Step::Start if vm.done.power_begun != power && !mutant::on(Mutant::StartRepeated) => {
                vm.done.power_begun = power;
                vm.done.begun_after = self.domain.as_ref().map(|d| d.reason).unwrap_or_default();
            }
            Step::RestartGuest(_) => vm.done.restart = restart,
            Step::PowerDone => {
                vm.done.power = power;
                vm.done.power_begun = power;
                self.shutdown = None;
            }
            Step::ChangesDone => vm.changes.under_way = false,
            Step::LayersDone => vm.snapshots.under_way = false,
            Step::Forget => {
                vm.disposition = Disposition::Gone {
                    since: self.shared.clock.now(),
                }
            }
            _ => {}
        }
        if before.is_some() && !mutant::on(Mutant::LedgerAfterHypervisor) && !self.save_vm().await {
            // Nothing is done that is not written down, and nothing counts as done.
            self.vm = before;
            self.wake = now + FIRST_RETRY;
            return;
        }
        match step {
            Step::PowerDone | Step::ChangesDone | Step::LayersDone => self.wake = now,
            Step::Forget => tracing::info!("the VM is gone"),
            step => {
                if step == Step::Restart {
                    self.restarts.push_back(now);
                }
                self.begin(Some(step));
            }
        }
    }

    /// Writes down the power state and its reason when they have changed.
    async fn note_power(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        let now = self
            .domain
            .as_ref()
            .and_then(|domain| reason::explain(vm, domain, &self.shared.boot_id));
        let running = matches!(now, Some((PowerState::Running, _)));
        let changed = now != vm.last_seen || vm.boot_id != self.shared.boot_id;
        if changed || (running && (vm.done.starting || vm.changes.frozen)) {
            // A domain that is not there says nothing of why the last one ended.
            if now.is_some() {
                vm.done.starting &= !running;
                vm.changes.frozen &= !running;
                vm.last_seen = now;
                vm.boot_id.clone_from(&self.shared.boot_id);
                self.save_vm().await;
            }
        }
    }

    /// Writes down which snapshots are there, when that has changed.
    async fn note_layers(&mut self) {
        let (Some(vm), Some(layers)) = (&mut self.vm, &self.layers) else {
            return;
        };
        let known = |number: u32| vm.snapshots.there.iter().find(|taken| taken.number == number);
        let whole = layers.there.iter().filter(|(_, layer)| layer.whole);
        let there = whole.map(|(number, _)| Taken {
            number: *number,
            quiesced: known(*number).and_then(|taken| taken.quiesced),
        });
        let now = ledger::Snapshots {
            there: there.collect(),
            seen: vm.snapshots.seen.map(|seen| seen.max(layers.top())),
            ..vm.snapshots
        };
        if now != vm.snapshots {
            vm.snapshots = now;
            self.save_vm().await;
        }
    }

    /// Writes the VM's entry; false when that failed.
    pub(super) async fn save_vm(&mut self) -> bool {
        match self.try_save_vm().await {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the ledger cannot be written"
                );
                false
            }
        }
    }

    pub(super) async fn try_save_vm(&mut self) -> Result<(), ledger::Error> {
        let Some(vm) = &self.vm else { return Ok(()) };
        // Before it is written: from then on it counts. After a failure either entry may be on disk.
        self.shared.images.hold(self.id, vm.digests(), false);
        self.shared.networks.hold(self.id, vm.plugged(), false);
        self.shared.volumes.hold(self.id, vm.volumes(), false);
        self.shared.ledger.save_vm(vm).await?;
        self.shared.images.hold(self.id, vm.digests(), true);
        self.shared.networks.hold(self.id, vm.plugged(), true);
        self.shared.volumes.hold(self.id, vm.volumes(), true);
        self.shared.pins.hold(self.id, vm.places());
        self.shared.devices.hold(self.id, vm.devices());
        Ok(())
    }

    /// Whether the VM has been gone long enough to be forgotten.
    async fn forgotten(&mut self) -> bool {
        let now = self.shared.clock.now();
        self.transfers.forget_old(&self.shared.ledger, now).await;
        let gone = match self.vm.as_ref().map(|vm| vm.disposition) {
            Some(Disposition::Gone { since }) => {
                now.duration_since(since) > REMEMBER || mutant::on(Mutant::GoneForgotten)
            }
            Some(_) => false,
            None => true,
        };
        if !gone || !self.transfers.is_empty() {
            return false;
        }
        self.shared.ledger.remove_vm(self.id).await.is_ok()
    }
}

/// Whether all its disks have been made once.
fn made(vm: &ledger::Vm) -> bool {
    vm.done.volumes && vm.changes.unmade.is_empty()
}

/// A ledger entry for a domain that bears Dalgu's mark but is not in the ledger.
fn adopt(domain: &Domain) -> Option<ledger::Vm> {
    let mark = domain.mark?;
    Some(ledger::Vm {
        id: domain.id,
        name: domain.name.parse().ok()?,
        intent: None,
        epoch: mark.epoch,
        generation: mark.generation,
        disposition: Disposition::Owned,
        done: Done {
            defined: Some(mark.epoch),
            volumes: true,
            ..Done::default()
        },
        last_seen: None,
        boot_id: String::new(),
        images: Vec::new(),
        documents: Default::default(),
        changes: Default::default(),
        snapshots: Default::default(),
    })
}
