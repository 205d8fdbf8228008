//! How a VM's task does the steps of the plan, and what it makes of their outcome.
//!
//! One piece of work is a look, or a step and a look after it; it is polled by the task ([`super::driver`]), which stays
//! free to take requests meanwhile. Decides when a failed step is tried again, never which step is next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dalgu_proto::{
    ids::{Epoch, Generation, VmId},
    image::Digest,
    mutant::{self, Mutant},
    vm::{Device, Disk, PowerReason, PowerState, RestartMode},
};
use futures::future::BoxFuture;
use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};

use super::{
    IMAGE_FETCHING, Shared,
    driver::Driver,
    plan::{self, Step},
    status::Failure,
};
use crate::{
    console,
    hypervisor::{self, Change, Definition, Domain, DomainState, Hardware, Hypervisor, LayerChange, Layers},
    images::{Awaited, Need},
    ledger::{self, Taken},
    network::{NotReady, plugged},
};

/// First wait before a failed step is tried again; doubles up to [`MAX_RETRY`].
pub(super) const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Longest wait before a failed step is tried again.
const MAX_RETRY: Duration = Duration::from_secs(30);

/// An ordinary call may hold up a power-off for so long; one that answers at all does so within it.
pub(super) const POWER_OFF_PATIENCE: Duration = Duration::from_secs(2);

/// An image that a disk is to be made from is waited for so long at a time; then the VM's status tells how far it is.
const IMAGE_PATIENCE: Duration = Duration::from_secs(1);

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The hypervisor failed.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// A disk is to be made from an image that is not here yet.
    #[error(transparent)]
    Image(#[from] Awaited),
    /// It has an interface in a network that is not here yet.
    #[error(transparent)]
    Network(#[from] NotReady),
}

/// A piece of work under way.
pub(super) struct Work {
    /// The step; `None` for a mere look.
    step: Option<Step>,
    since: Instant,
    asked: For,
    /// Nothing is waited for any more that the step needs: the hypervisor is asked to do it.
    begun: Arc<AtomicBool>,
    outcome: BoxFuture<'static, Outcome>,
}

impl Work {
    /// Whether it is a step of which the hypervisor knows nothing yet.
    fn waits(&self) -> bool {
        self.step.is_some() && !self.begun.load(Ordering::Relaxed)
    }
}

/// What a piece of work brought.
pub(super) struct Outcome {
    /// The step, if there was one, and whether it succeeded; then, whether the guest's file systems were frozen for it.
    pub(super) step: Option<(Step, Result<bool, Error>)>,
    /// What was seen after it.
    pub(super) seen: Result<Option<Domain>, hypervisor::Error>,
    /// The hardware that was seen with it, where that was looked at.
    pub(super) hardware: Option<Hardware>,
    /// The layers of its disks, where those were looked at.
    pub(super) layers: Option<Layers>,
    /// Whether a call about the domain was still under way before it was looked at.
    pub(super) unfinished: bool,
    /// What the step was done for; there may be a newer intent by now.
    pub(super) asked: For,
}

/// Of the intent for which a step is done.
#[derive(Debug, Clone, Copy)]
pub(super) struct For {
    /// Epoch that a definition is made with.
    epoch: Epoch,
    /// Generation, which says what there is to make.
    generation: Generation,
    /// The time a guest has to shut down.
    grace: Duration,
}

/// A step that failed. It counts for as long as the plan asks for that step.
pub(super) struct Stuck {
    pub(super) step: Step,
    pub(super) failure: Failure,
    pub(super) tries: u32,
    pub(super) retry_at: Option<Instant>,
}

/// The guest was asked to shut down, and may do so, whatever was asked since.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaving {
    until: Instant,
    /// [`Domain::resets`] before it was asked.
    resets: u64,
}

impl Leaving {
    /// How long it still may.
    pub(super) fn left(self, now: Instant) -> Option<Duration> {
        let left = self.until.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }
}

/// The guest was asked for something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    first: Instant,
    last: Instant,
    /// [`Domain::resets`] before it was asked first.
    resets: u64,
}

impl Asked {
    /// How long ago.
    pub(super) fn ago(self, now: Instant) -> plan::Asked {
        plan::Asked {
            first: now - self.first,
            last: now - self.last,
        }
    }
}

impl Driver {
    /// Generation of the intent.
    fn generation(&self) -> Generation {
        let intent = self.vm.as_ref().and_then(|vm| vm.intent.as_ref());
        intent.map(|intent| intent.generation).unwrap_or_default()
    }

    /// The guest has just been asked, for the first time or once more.
    fn asked(&self, before: Option<Asked>) -> Asked {
        let now = Instant::now();
        let resets = self.domain.as_ref().map_or(0, |domain| domain.resets);
        before.map_or(
            Asked {
                first: now,
                last: now,
                resets,
            },
            |asked| Asked { last: now, ..asked },
        )
    }

    /// The guest may shut down from now on.
    fn may_leave(&mut self, grace: Duration) {
        self.leaving = Some(Leaving {
            until: Instant::now() + grace,
            resets: self.domain.as_ref().map_or(0, |domain| domain.resets),
        });
    }

    /// The guest may reboot from now on.
    fn may_reboot(&mut self) {
        self.rebooting = Some(Leaving {
            until: Instant::now() + plan::REBOOT_LATE,
            resets: self.domain.as_ref().map_or(0, |domain| domain.resets),
        });
    }

    /// Forgets what the guest was asked for and has done.
    pub(super) fn note_reaction(&mut self) {
        let up = |domain: &&Domain| matches!(domain.state, DomainState::Running | DomainState::Paused);
        let resets = self.domain.as_ref().filter(up).map(|domain| domain.resets);
        // Off is no reboot, but nobody is there to be asked again.
        self.reboot = self.reboot.filter(|asked| resets == Some(asked.resets));
        self.leaving = self.leaving.filter(|leaving| resets == Some(leaving.resets));
        // One that is off has not rebooted, unless it had before.
        let ever = self.domain.as_ref().map(|domain| domain.resets);
        self.rebooting = self
            .rebooting
            .filter(|asked| ever.is_none_or(|ever| ever == asked.resets));
    }

    /// Begins a look, after a step if one is given.
    pub(super) fn begin(&mut self, step: Option<Step>) {
        let shared = self.shared.clone();
        let (id, definition) = (self.id, self.definition());
        let needs = self.needs();
        let volumes = self.volumes();
        let parts = Parts::of(self.vm.as_ref());
        let intent = self.vm.as_ref().and_then(|vm| vm.intent.as_ref());
        let asked = For {
            epoch: intent.map(|intent| intent.epoch).unwrap_or_default(),
            generation: self.generation(),
            grace: Duration::from_secs(intent.map_or(0, |intent| intent.grace_period_seconds.into())),
        };
        let kept = step.clone();
        let begun = Arc::new(AtomicBool::new(false));
        let begins = begun.clone();
        let outcome = Box::pin(async move {
            let step = match step {
                Some(step) => {
                    let made = match &step {
                        Step::CreateVolumes => create_volumes(&shared, volumes, id, &needs, &begins)
                            .await
                            .map(|()| false),
                        step => perform(&shared, id, definition.as_ref(), step, &begins).await,
                    };
                    Some((step, made))
                }
                None => None,
            };
            let hypervisor = &shared.hypervisor;
            // Before the look: what has ended by now shows in it.
            let unfinished = hypervisor.changing(id);
            let (seen, hardware, layers) = look(&**hypervisor, id, definition.as_ref(), parts).await;
            let (step, layers) = match (step, layers) {
                (step, Ok(layers)) => (step, layers),
                // They were what was to be seen.
                (Some((Step::Look, _)), Err(error)) => (Some((Step::Look, Err(error.into()))), None),
                (step, Err(error)) => {
                    tracing::debug!(%error, "the layers of its disks could not be looked at");
                    (step, None)
                }
            };
            Outcome {
                step,
                seen,
                hardware,
                layers,
                unfinished,
                asked,
            }
        });
        self.work = Some(Work {
            step: kept,
            since: Instant::now(),
            asked,
            begun,
            outcome,
        });
    }

    /// There is a new entry: a step that still waits for an image or a network was planned for the old one, and is not done. What
    /// follows from the new one is planned after a look.
    pub(super) fn drop_waiting(&mut self) {
        if let Some(work) = self.work.take_if(|work| work.waits())
            && work.step == Some(Step::Restart)
        {
            self.restarts.pop_back();
        }
    }

    /// The call under way holds up a power-off: it counts as one that did not answer in time. It may take effect later; the
    /// hypervisor says so until it has ended.
    pub(super) async fn give_up(&mut self) {
        let Some(work) = self.work.take() else { return };
        if let Some(step) = work.step {
            let error = hypervisor::Error::Timeout {
                call: "a call that holds up a power-off",
                after: work.since.elapsed(),
            };
            self.step_failed(step, &error, &work.asked).await;
        }
        self.begin(None);
    }

    /// Takes note of a step that succeeded.
    pub(super) async fn step_done(&mut self, step: Step, asked: &For, frozen: bool) {
        if step != Step::Look {
            tracing::info!(?step, "step done");
        }
        match step {
            // Disks may have come with a newer intent while these were made: all are looked for again.
            Step::CreateVolumes if self.generation() != asked.generation => {}
            Step::CreateVolumes => {
                self.volumes_ready = true;
                // Written down with what follows; until then they are looked for again.
                if let Some(vm) = &mut self.vm {
                    vm.done.volumes = true;
                    let added = !std::mem::take(&mut vm.changes.unmade).is_empty();
                    // Except what was to be kept no longer than this, and what may be written to from now on.
                    if !std::mem::take(&mut vm.documents).is_empty() || added {
                        self.save_vm().await;
                    }
                }
            }
            Step::Change(change) => {
                self.tried.retain(|(other, _)| *other != change);
                self.tried.push((change, Instant::now()));
            }
            // Kept if the next look finds it there.
            Step::Layer(LayerChange::Add(number)) => {
                if let Some(vm) = &mut self.vm {
                    vm.snapshots.there.retain(|taken| taken.number != number);
                    vm.snapshots.there.push(Taken {
                        number,
                        quiesced: Some(frozen),
                    });
                }
            }
            Step::DeleteVolume(disk) => {
                if let Some(vm) = &mut self.vm {
                    vm.changes.removed.retain(|other| *other != *disk);
                    self.save_vm().await;
                }
            }
            Step::DeleteVolumes => self.volumes_gone = true,
            Step::Start | Step::Restart => {
                self.started |= step == Step::Start;
                self.rebooting = None;
                // It ran, even if it is off again at the next look: why it was off before explains nothing any more.
                if let Some(vm) = &mut self.vm {
                    vm.last_seen = Some((PowerState::Running, PowerReason::Requested));
                    vm.done.starting = false;
                    self.save_vm().await;
                }
            }
            Step::Shutdown => {
                self.shutdown = Some(self.asked(self.shutdown));
                self.may_leave(asked.grace);
            }
            Step::Resume => self.resumed = Some(Instant::now()),
            Step::RestartGuest(RestartMode::Reboot) | Step::RebootAgain => {
                self.reboot = Some(self.asked(self.reboot));
                self.may_reboot();
            }
            // The domain is as an older intent says: the next start would bring back what is to be gone by now.
            Step::Define if self.generation() != asked.generation => {}
            Step::Define => {
                if let Some(vm) = &mut self.vm {
                    vm.done.defined = Some(asked.epoch);
                    self.save_vm().await;
                }
            }
            _ => {}
        }
    }

    /// Takes note of a step that failed, and decides when it is tried again.
    pub(super) async fn step_failed(&mut self, step: Step, error: &hypervisor::Error, asked: &For) {
        if step == Step::Shutdown && error.outcome_unknown() {
            self.may_leave(asked.grace);
            if matches!(error, hypervisor::Error::Timeout { .. }) {
                // It may have been heard. In any case the guest's time runs: one that hangs is powered off at its end.
                self.shutdown = Some(self.asked(self.shutdown));
            }
        }
        if let Step::Change(Change::MoveDisk(name)) = &step
            && !error.outcome_unknown()
        {
            // The VM goes on where it is, and nothing else waits for that.
            tracing::warn!(disk = name, %error, "a disk could not be moved to another pool");
            let times = self.failed_moves.get(name).map_or(0, |(.., times)| *times) + 1;
            let failed = (error.to_string(), Instant::now(), times);
            self.failed_moves.insert(name.clone(), failed);
            self.stuck = None;
            return;
        }
        self.resume_failed |= step == Step::Resume && !matches!(error, hypervisor::Error::Unavailable { .. });
        // It was written down as begun so that a dead agent's successor does not do it twice. It has not been done; only
        // where the call may yet take effect, it is left at that.
        if matches!(step, Step::RestartGuest(_))
            && !matches!(error, hypervisor::Error::Timeout { .. })
            && let Some(vm) = &mut self.vm
            && let Some(intent) = &vm.intent
        {
            vm.done.restart = intent.restart_sequence.saturating_sub(1);
            self.save_vm().await;
        }
        let tries = self.stuck.as_ref().map_or(0, |stuck| stuck.tries) + 1;
        let retrying = error.is_retryable();
        let wait = FIRST_RETRY.saturating_mul(1 << (tries - 1).min(6)).min(MAX_RETRY);
        let since = self
            .stuck
            .as_ref()
            .map_or_else(|| self.shared.clock.now(), |stuck| stuck.failure.since);
        let failure = Failure {
            reason: error.reason().to_owned(),
            message: error.to_string(),
            retrying,
            since,
        };
        tracing::warn!(?step, %error, tries, retrying, "step failed");
        self.stuck = Some(Stuck {
            step,
            failure,
            tries,
            retry_at: retrying.then(|| Instant::now() + wait),
        });
    }

    /// What the disks are to be made from that are to be made; `None` before the intent is known.
    fn volumes(&self) -> Option<Definition> {
        let (vm, mut definition) = (self.vm.as_ref()?, self.definition()?);
        definition.spec.disks = vm.to_make().cloned().collect();
        if vm.done.volumes {
            definition.spec.first_boot = None;
        }
        Some(definition)
    }

    /// The images that its disks are to be made from, with who has them as far as that was told.
    pub(super) fn needs(&self) -> Vec<Need> {
        let Some(vm) = &self.vm else { return Vec::new() };
        let need = |digest: Digest| {
            let told = vm.images.iter().find(|need| need.digest == digest);
            told.cloned().unwrap_or(Need {
                digest,
                size_bytes: 0,
                sources: Vec::new(),
            })
        };
        let coming = matches!(vm.disposition, ledger::Disposition::Incoming { .. });
        let made = |disk: &&Disk| coming || vm.to_make().any(|other| other.name == disk.name);
        let disks = vm
            .intent
            .iter()
            .flat_map(|intent| &intent.spec.disks)
            .filter(made);
        disks.filter_map(|disk| disk.digest.clone()).map(need).collect()
    }

    /// Takes note that an image is waited for.
    pub(super) fn await_image(&mut self, step: Step, awaited: &Awaited) {
        let since = self.stuck.as_ref().filter(|stuck| stuck.step == step);
        let since = since.map_or_else(|| self.shared.clock.now(), |stuck| stuck.failure.since);
        tracing::debug!(%awaited, "an image is waited for");
        self.stuck = Some(Stuck {
            step,
            failure: Failure {
                reason: IMAGE_FETCHING.to_owned(),
                message: awaited.to_string(),
                retrying: true,
                since,
            },
            tries: 0,
            // Where nobody is at work on it, asking is not waiting.
            retry_at: Some(match awaited.on_its_way {
                true => Instant::now(),
                false => Instant::now() + FIRST_RETRY * 4,
            }),
        });
    }

    /// Takes note that a network is waited for.
    pub(super) fn await_network(&mut self, step: Step, waiting: &NotReady) {
        let stuck = self.stuck.as_ref().filter(|stuck| stuck.step == step);
        let since = stuck.map_or_else(|| self.shared.clock.now(), |stuck| stuck.failure.since);
        let tries = stuck.map_or(0, |stuck| stuck.tries) + 1;
        match waiting {
            NotReady::Unknown(_) | NotReady::Making => tracing::debug!(%waiting, "a network is waited for"),
            NotReady::Failed(_) => tracing::warn!(%waiting, tries, "a network is waited for"),
        }
        self.stuck = Some(Stuck {
            step,
            failure: Failure {
                reason: waiting.reason().to_owned(),
                message: waiting.to_string(),
                retrying: true,
                since,
            },
            tries,
            // The controller tells of a network and of the VM at about the same time.
            retry_at: Some(Instant::now() + FIRST_RETRY),
        });
    }

    /// Takes note that a call which did not answer in time is waited for. `since` is when that was first seen.
    pub(super) fn await_call(&mut self, since: Option<Timestamp>, look_at: Instant) {
        let failure = Failure {
            reason: "HYPERVISOR_TIMEOUT".to_owned(),
            message:
                "a call that did not answer in time is still under way; nothing is concluded before it ends"
                    .to_owned(),
            retrying: true,
            since: since.unwrap_or_else(|| self.shared.clock.now()),
        };
        self.stuck = Some(Stuck {
            step: Step::Await,
            failure,
            tries: 0,
            retry_at: Some(look_at),
        });
    }

    /// Takes note that the guest is given up.
    pub(super) fn crash_loop(&mut self) {
        let message = format!(
            "ended {} times within {} min; look at its console, then start it again",
            plan::MAX_RESTARTS,
            plan::CRASH_WINDOW.as_secs() / 60
        );
        let failure = Failure {
            reason: "CRASH_LOOP".to_owned(),
            message,
            retrying: false,
            since: self.shared.clock.now(),
        };
        tracing::error!("the guest ends again and again; it is not restarted any more");
        self.stuck = Some(Stuck {
            step: Step::CrashLoop,
            failure,
            tries: 0,
            retry_at: None,
        });
    }
}

/// Goes on with the work, if there is any.
pub(super) async fn poll_work(work: &mut Option<Work>) -> Outcome {
    match work {
        Some(work) => (&mut work.outcome).await,
        None => std::future::pending().await,
    }
}

/// Returns when the call under way has held up a power-off for long enough; never when it does not. Cancel safe: a timer.
pub(super) fn until_given_up(
    vm: Option<&ledger::Vm>,
    work: Option<&Work>,
    off: bool,
) -> impl Future<Output = ()> + use<> {
    let held_up = vm.is_some_and(plan::off_at_once);
    // Files of a domain that is off are merged before it is deleted, for as long as that takes.
    let gives_way = |step: &Step| step.gives_way() && !(off && matches!(step, Step::Layer(_)));
    let since = work
        .filter(|work| held_up && work.step.as_ref().is_some_and(gives_way))
        .map(|work| work.since);
    async move {
        match since {
            Some(since) => sleep_until(since + POWER_OFF_PATIENCE).await,
            None => std::future::pending().await,
        }
    }
}

/// What is looked at of a domain besides itself.
#[derive(Debug, Clone, Copy)]
struct Parts {
    /// It is being changed: its hardware.
    hardware: bool,
    /// Its snapshots are: its disks' layers.
    layers: bool,
    /// It has snapshots: the same, for people.
    sizes: bool,
    /// It is to be off at once, which no look at files may hold up.
    off_first: bool,
}

impl Parts {
    fn of(vm: Option<&ledger::Vm>) -> Self {
        Self {
            hardware: vm.is_some_and(|vm| vm.changes.under_way),
            layers: vm.is_some_and(|vm| vm.snapshots.under_way || plan::snapshots::outlive(vm)),
            sizes: vm.is_some_and(|vm| !vm.snapshots.there.is_empty()),
            off_first: vm.is_some_and(plan::off_at_once),
        }
    }
}

type Seen = (
    Result<Option<Domain>, hypervisor::Error>,
    Option<Hardware>,
    Result<Option<Layers>, hypervisor::Error>,
);

/// Looks at a domain, and where it is being changed, at its parts. When its hardware cannot be seen, nothing was.
async fn look(hypervisor: &dyn Hypervisor, id: VmId, definition: Option<&Definition>, parts: Parts) -> Seen {
    let seen = hypervisor.get(id).await;
    let state = match &seen {
        Ok(Some(domain)) => domain.state,
        _ => return (seen, None, Ok(None)),
    };
    let hardware = match parts.hardware {
        true => hypervisor.hardware(id).await,
        false => Ok(None),
    };
    let hardware = match hardware {
        Ok(hardware) => hardware,
        Err(error) => return (Err(error), None, Ok(None)),
    };
    let here = match state {
        DomainState::Incoming | DomainState::HandedOver => false,
        DomainState::Running | DomainState::Paused => !parts.off_first,
        DomainState::Stopped => true,
    };
    let Some(definition) = definition.filter(|_| here && (parts.layers || parts.sizes)) else {
        return (seen, hardware, Ok(None));
    };
    (seen, hardware, hypervisor.layers(definition).await.map(Some))
}

/// Makes a VM's disks, once the images that they are made from are here.
async fn create_volumes(
    shared: &Shared,
    definition: Option<Definition>,
    id: VmId,
    needs: &[Need],
    begun: &AtomicBool,
) -> Result<(), Error> {
    let mut definition = definition.ok_or(hypervisor::Error::NotFound { id })?;
    let told = definition.spec.first_boot.as_ref();
    if told.is_some_and(|told| told.network_config.is_none()) {
        let ports: Vec<_> = plugged(id, &definition.spec).collect();
        definition.networks = shared.networks.known(&ports)?;
    }
    for need in needs.iter().filter(|_| !mutant::on(Mutant::ImageNotAwaited)) {
        shared.images.wait(need, IMAGE_PATIENCE).await?;
    }
    begun.store(true, Ordering::Relaxed);
    shared.hypervisor.create_volumes(&definition, false).await?;
    for need in needs {
        shared.images.used(&need.digest).await;
    }
    Ok(())
}

/// That at the address of each device of a VM's own there is what its operator has named so: addresses change where cards are added, and what is
/// there then may be the host's.
fn devices_are_there(shared: &Shared, definition: &Definition) -> Result<(), hypervisor::Error> {
    let known = shared.samples.borrow().inventory.clone();
    let is_there = |device: &&Device| {
        let mut named = known.pci_devices.iter().filter(|named| named.problem.is_none());
        named.any(|named| named.address == device.address && named.class == device.class)
    };
    match definition.devices.iter().find(|device| !is_there(device)) {
        None => Ok(()),
        // The agent has started a moment ago.
        Some(_) if known.cpus == 0 => Err(hypervisor::Error::Unavailable {
            detail: "the agent has not looked yet which PCI devices there are".to_owned(),
        }),
        Some(device) => Err(hypervisor::Error::Missing {
            what: "a PCI device that can be given, named in agent.toml for its class, at",
            path: device.address.to_string().into(),
        }),
    }
}

async fn perform(
    shared: &Shared,
    id: VmId,
    definition: Option<&Definition>,
    step: &Step,
    begun: &AtomicBool,
) -> Result<bool, Error> {
    let hypervisor = &shared.hypervisor;
    // The rules of an interface are there before it is, and its bridge before the domain names it.
    let plugs = matches!(
        step,
        Step::Define | Step::Start | Step::Restart | Step::Change(Change::AttachNic(_))
    );
    if plugs
        && !mutant::on(Mutant::RulesAfterRun)
        && let Some(definition) = definition
    {
        let ports: Vec<_> = plugged(id, &definition.spec).collect();
        shared.networks.ready(&ports).await?;
    }
    if let Some(definition) = definition.filter(|_| matches!(step, Step::Start | Step::Restart)) {
        devices_are_there(shared, definition)?;
    }
    begun.store(true, Ordering::Relaxed);
    let defined = || definition.ok_or(hypervisor::Error::NotFound { id });
    match step {
        Step::Define => hypervisor.define(defined()?).await,
        Step::Start | Step::Restart => hypervisor.start(id).await,
        Step::Shutdown => hypervisor.shutdown(id).await,
        Step::Destroy => hypervisor.destroy(id).await,
        Step::Pause => hypervisor.pause(id).await,
        Step::Resume => hypervisor.resume(id).await,
        Step::RestartGuest(RestartMode::Reboot) | Step::RebootAgain => hypervisor.reboot(id).await,
        Step::RestartGuest(RestartMode::Reset) => hypervisor.reset(id).await,
        Step::Undefine => hypervisor.undefine(id).await,
        Step::Change(change) => hypervisor.change_hardware(defined()?, change).await,
        // A volume of the site outlives the VM that had it; of one that has moved the old file goes.
        Step::DeleteVolume(disk)
            if disk.volume.is_some() && !plan::changes::moves(&defined()?.spec, disk) =>
        {
            Ok(())
        }
        Step::Layer(change) => return Ok(hypervisor.change_layers(defined()?, change).await?),
        Step::DeleteVolume(disk) => hypervisor.delete_volume(id, disk).await,
        Step::DeleteVolumes => {
            hypervisor.delete_volumes(id, false).await?;
            console::remove(hypervisor.console_log(id)).await;
            Ok(())
        }
        Step::CreateVolumes
        | Step::Look
        | Step::ChangesDone
        | Step::LayersDone
        | Step::Forget
        | Step::PowerDone
        | Step::Wait(_)
        | Step::Await
        | Step::Settled
        | Step::CrashLoop => Ok(()),
    }?;
    Ok(false)
}
