//! A VM's migrations, as its task sees them: the source's part, the destination's part, and how they end.
//!
//! ```text
//!  source:       Owned ──send──> Outgoing ──settle──> (nothing moves any more) ──finish──> Owned or Gone
//!  destination:  Gone ──prepare──> Incoming ──settle──> (nothing moves any more) ──finish──> Owned or Gone
//! ```
//!
//! What the hypervisor's call returns decides nothing. Once both sides have settled, the controller concludes from what
//! is really there, and tells both by `finish` who owns the VM. Until then nothing is started, stopped or removed here.

use std::time::Duration;

use dalgu_proto::{
    ids::{Epoch, MigrationId, VmId},
    mutant::{self, Mutant},
    vm::{CloneMode, Disk, PowerReason, PowerState},
};
use futures::future::BoxFuture;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Error, Prepare, Send, Shared,
    driver::Driver,
    plan,
    policy::{self, Denied},
    status::Arrival,
    transfers::Ended,
};
use crate::{
    console,
    hypervisor::{self, Definition, Domain, DomainState, Migrate, Progress},
    images::Awaited,
    ledger::{self, Changes, Disposition, Role, Snapshots, Transfer},
    migration::transport::{self, Word},
    network::Plugged,
};

/// Progress of a transfer is read so often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// The first packet of a VM that has arrived is awaited so long.
const PACKET_LIMIT: Duration = Duration::from_secs(10);
/// After that packet, the source's note of when the VM stood still is awaited so long: an older agent tells none.
const NOTE_LIMIT: Duration = Duration::from_secs(1);
/// A request to settle waits so long for a transfer to end; after that its caller asks again.
const SETTLE_WAIT: Duration = Duration::from_secs(6);
/// A QEMU that still waits for data so long after its streams were cut is powered off: it holds no VM.
const INCOMING_LIMIT: Duration = Duration::from_secs(30);

impl Driver {
    /// After a restart of the agent: its streams are gone, so whatever was being sent cannot succeed by them.
    pub(super) async fn recover_transfers(&mut self) {
        let cut: Vec<_> = self
            .transfers
            .entries
            .values()
            .filter(|entry| entry.transfer == Transfer::Active)
            .cloned()
            .collect();
        for entry in cut {
            let transfer = Transfer::Failed {
                reason: "AGENT_RESTARTED".to_owned(),
                message: "the agent was restarted while it sent the VM".to_owned(),
            };
            let entry = ledger::Migration { transfer, ..entry };
            self.transfers.write_if_possible(&self.shared.ledger, entry).await;
        }
    }

    fn may_begin(&self, migration: MigrationId) -> Result<(), Denied> {
        match self.transfers.entries.get(&migration) {
            Some(entry) if entry.settled && !mutant::on(Mutant::SettledMayBegin) => {
                Err(Denied::MigrationOver(migration))
            }
            _ => Ok(()),
        }
    }

    /// Destination: makes room.
    pub(super) async fn prepare(&mut self, prepare: Prepare) -> Result<(), Error> {
        self.may_begin(prepare.migration)?;
        let again = policy::prepare(self.vm.as_ref(), prepare.migration, &prepare.intent)?;
        if again {
            self.told_sources(prepare.images).await?;
        } else {
            self.claim(&prepare.intent)?;
            tracing::info!(migration = %prepare.migration, source = %prepare.source, "preparing for an incoming migration");
            let entry = ledger::Migration {
                id: prepare.migration,
                vm: self.id,
                role: Some(Role::Destination),
                peer: Some(prepare.source.clone()),
                transfer: Transfer::Ready,
                settled: false,
                finished: None,
            };
            self.transfers.write(&self.shared.ledger, entry).await?;
            let vm = ledger::Vm {
                id: self.id,
                name: prepare.name,
                epoch: prepare.intent.epoch,
                generation: prepare.intent.generation,
                disposition: Disposition::Incoming {
                    migration: prepare.migration,
                },
                done: ledger::Done::default(),
                last_seen: None,
                boot_id: self.shared.boot_id.clone(),
                documents: Default::default(),
                intent: Some(prepare.intent),
                images: prepare.images,
                changes: Changes {
                    ever: true,
                    ..Changes::default()
                },
                snapshots: Snapshots::default(),
            };
            self.replace(vm).await?;
            self.start_afresh();
            self.transfers.first_word = None;
        }
        let definition = self.definition().ok_or(Denied::NotHere(self.id))?;
        self.check_images(&definition)?;
        let ports = self.plugged();
        self.shared.networks.expect(&ports);
        self.shared.networks.ready(&ports).await?;
        self.shared.hypervisor.create_volumes(&definition, true).await?;
        let transport = &self.shared.transport;
        let word = transport.allow(prepare.migration, prepare.source).await;
        let word = word.map_err(Error::Sockets)?;
        self.transfers.handed_over = Some(word);
        Ok(())
    }

    /// Destination: that the images are here which the disks have behind them; else they are fetched, and it is asked again.
    fn check_images(&self, definition: &Definition) -> Result<(), Awaited> {
        let overlays = definition.spec.disks.iter();
        let overlays = overlays.filter(|disk| disk.clone_mode == CloneMode::Overlay);
        let behind: Vec<_> = overlays.filter_map(|disk| disk.digest.as_ref()).collect();
        let needs = self.needs();
        let mut needs = needs.iter().filter(|need| behind.contains(&&need.digest));
        needs.try_for_each(|need| self.shared.images.need(need))
    }

    /// Destination: the source has let go of the VM for good; here it goes on at once. Where that fails it goes on when
    /// the migration is finished.
    pub(super) async fn go_on(&mut self) {
        let word = self.transfers.handed_over.take().unwrap_or_default();
        let wanted = self.vm.as_ref().and_then(|vm| vm.intent.as_ref());
        if wanted.is_none_or(|intent| intent.power != PowerState::Running) {
            return;
        }
        let (told, ports) = (Instant::now(), self.plugged());
        let networks = self.shared.networks.clone();
        let listening = self.transfers.first_word.take();
        let first = async {
            match listening {
                Some(first) => Some(first),
                // Better late than not at all.
                None => networks.first_word(&ports).await,
            }
        };
        let going_on = self.shared.hypervisor.resume(self.id);
        let (going_on, (), first) = futures::future::join3(going_on, networks.arrived(&ports), first).await;
        match going_on {
            Err(error) => tracing::warn!(%error, "the VM has arrived and does not go on yet"),
            Ok(()) => {
                self.measuring = first.map(|first| Box::pin(arrival(first, told, word)) as BoxFuture<_>);
            }
        }
    }

    /// Destination: begins to listen for the VM that comes, as soon as its interfaces are there: once it is to go on, there is no
    /// time for that.
    pub(super) async fn listen(&mut self) {
        let comes = self
            .domain
            .as_ref()
            .is_some_and(|domain| domain.state == DomainState::Incoming);
        if comes && self.transfers.handed_over.is_some() && self.transfers.first_word.is_none() {
            self.transfers.first_word = self.shared.networks.first_word(&self.plugged()).await;
        }
    }

    /// Takes note of how long it took until the VM that has arrived was heard of in its networks.
    pub(super) fn note_arrival(&mut self, arrival: Option<Arrival>) {
        let migration = self.vm.as_ref().and_then(|vm| vm.disposition.migration());
        let migration = migration.or(self.transfers.latest);
        self.transfers.arrival = migration.zip(arrival);
        tracing::info!(?arrival, "the VM's first packet here");
    }

    /// Its interfaces in networks of the site.
    fn plugged(&self) -> Vec<Plugged> {
        self.vm.as_ref().map(ledger::Vm::plugged).unwrap_or_default()
    }

    /// Source: begins to send.
    pub(super) async fn send(&mut self, send: Send) -> Result<(), Error> {
        self.may_begin(send.migration)?;
        if policy::send(self.vm.as_ref(), self.id, send.migration, send.epoch)? {
            return Ok(());
        }
        if self.busy() || self.disks_differ() {
            return Err(Denied::Busy.into());
        }
        let running = self
            .domain
            .as_ref()
            .is_some_and(|domain| domain.state == DomainState::Running);
        let (Some(vm), Some(mut definition), true) = (self.vm.clone(), self.definition(), running) else {
            return Err(Denied::NotRunning.into());
        };
        // The destination's domain bears the ownership number that it will have there.
        definition.mark.epoch = send.epoch.next();
        definition.places.clone_from(&send.places);
        let entry = ledger::Migration {
            id: send.migration,
            vm: self.id,
            role: Some(Role::Source),
            peer: Some(send.destination.clone()),
            transfer: Transfer::Active,
            settled: false,
            finished: None,
        };
        self.transfers.write(&self.shared.ledger, entry).await?;
        self.replace(ledger::Vm {
            disposition: Disposition::Outgoing {
                migration: send.migration,
            },
            ..vm
        })
        .await?;
        tracing::info!(migration = %send.migration, destination = %send.destination, "sending the VM");
        self.transfers.progress.send_replace(Progress::default());
        let (shared, progress) = (self.shared.clone(), self.transfers.progress.clone());
        self.transfers.running = Some(Box::pin(transfer(shared, self.id, send, definition, progress)));
        Ok(())
    }

    /// Source: whether a disk of it is still to come or to go: what the two sides would copy is not the same.
    fn disks_differ(&self) -> bool {
        let (Some(vm), Some(hardware)) = (&self.vm, &self.hardware) else {
            return false;
        };
        plan::changes::disks_differ(vm, hardware)
    }

    /// Writes down how a transfer ended. It says nothing yet of where the VM is.
    pub(super) async fn transfer_ended(&mut self, ended: Ended) {
        if ended.outcome.is_ok() && mutant::on(Mutant::SourceTidiesByItself) {
            let epoch = self.vm.as_ref().map(|vm| vm.epoch).unwrap_or_default();
            let _ = self.tidy_up(epoch).await;
        }
        let transfer = match ended.outcome {
            Ok(progress) => {
                tracing::info!(migration = %ended.migration, downtime_ms = progress.downtime_ms, "the transfer has ended");
                self.transfers.progress.send_replace(progress);
                Transfer::Completed
            }
            Err(error) => {
                tracing::warn!(migration = %ended.migration, %error, "the transfer has failed");
                Transfer::Failed {
                    reason: error.reason().to_owned(),
                    message: error.to_string(),
                }
            }
        };
        let Some(entry) = self.transfers.entries.get(&ended.migration).cloned() else {
            return;
        };
        let entry = ledger::Migration { transfer, ..entry };
        self.transfers.write_if_possible(&self.shared.ledger, entry).await;
    }

    /// This host's part in a migration, also where its entry is lost.
    fn part(&self, migration: MigrationId) -> ledger::Migration {
        let role = match self.vm.as_ref().map(|vm| vm.disposition) {
            Some(Disposition::Outgoing { migration: own }) if own == migration => Some(Role::Source),
            Some(Disposition::Incoming { migration: own }) if own == migration => Some(Role::Destination),
            _ => None,
        };
        let unknown = || ledger::Migration {
            id: migration,
            vm: self.id,
            role,
            peer: None,
            transfer: Transfer::Ready,
            settled: false,
            finished: None,
        };
        let known = self.transfers.entries.get(&migration).cloned();
        known.unwrap_or_else(unknown)
    }

    /// Either side: promises that nothing will move under this id any more, and looks at what is here.
    pub(super) async fn settle(&mut self, migration: MigrationId) -> Result<(), Error> {
        policy::settle(self.vm.as_ref(), migration)?;
        let entry = self.part(migration);
        if !entry.settled {
            self.transfers.settled_at = Some(Instant::now());
        }
        let role = entry.role;
        self.transfers
            .write(
                &self.shared.ledger,
                ledger::Migration {
                    settled: true,
                    ..entry
                },
            )
            .await?;
        match role {
            Some(Role::Source) => self.end_sending().await?,
            Some(Role::Destination) => {
                self.shared.transport.revoke(migration).await;
                self.end_receiving().await?;
            }
            None => {}
        }
        self.domain = self.shared.hypervisor.get(self.id).await?;
        self.seen = Some(self.shared.clock.now());
        Ok(())
    }

    async fn end_sending(&mut self) -> Result<(), Error> {
        let hypervisor = self.shared.hypervisor.clone();
        if self.transfers.running.is_some() {
            hypervisor.abort_migration(self.id).await?;
            if let Ok(ended) = tokio::time::timeout(SETTLE_WAIT, self.transfers.ended()).await {
                self.transfer_ended(ended).await;
            }
        } else if hypervisor.progress(self.id).await?.is_some() {
            // Begun by an earlier run of this agent.
            hypervisor.abort_migration(self.id).await?;
            return Err(Denied::Busy.into());
        }
        Ok(())
    }

    async fn end_receiving(&mut self) -> Result<(), Error> {
        let hypervisor = self.shared.hypervisor.clone();
        let until = Instant::now() + SETTLE_WAIT;
        while hypervisor
            .get(self.id)
            .await?
            .is_some_and(|domain| domain.state == DomainState::Incoming)
        {
            if self
                .transfers
                .settled_at
                .is_none_or(|at| at.elapsed() > INCOMING_LIMIT)
            {
                tracing::warn!("a QEMU still waits for a migration that is over; powering it off");
                hypervisor.destroy(self.id).await?;
            } else if Instant::now() > until {
                return Err(Denied::Busy.into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Either side: the owner is known.
    pub(super) async fn finish(
        &mut self,
        migration: MigrationId,
        owner: bool,
        epoch: Epoch,
    ) -> Result<(), Error> {
        let mut entry = self.part(migration);
        let nothing_here = entry.role.is_none() && !self.transfers.entries.contains_key(&migration);
        let gave_it_up = self
            .vm
            .as_ref()
            .is_some_and(|vm| matches!(vm.disposition, Disposition::Gone { .. }) && epoch > vm.epoch);
        if entry.finished.is_some() && owner && gave_it_up {
            // It was told that another host owns the VM, or to delete it: whoever says otherwise now has an old store.
            return Err(Denied::MigrationOver(migration).into());
        }
        if entry.finished.is_some() || (nothing_here && owner) {
            // It has been finished, perhaps so long ago that it has been forgotten.
            return Ok(());
        }
        if entry.role != Some(Role::Source) && !owner && !entry.settled {
            // The source was never told to send, so nobody asked. A request to prepare that is late must find it over.
            match self.settle(migration).await {
                // What another migration has here is not of this one.
                Err(Error::Denied(Denied::Migrating(_))) if nothing_here => entry.settled = true,
                settled => {
                    settled?;
                    entry = self.part(migration);
                }
            }
        }
        if !entry.settled || self.transfers.running.is_some() {
            return Err(Denied::Busy.into());
        }
        tracing::info!(%migration, owner, %epoch, "the migration's owner is known");
        self.transfers.first_word = None;
        // A settlement of something that never began leaves what is here as it is.
        if entry.role.is_some() {
            if owner {
                self.keep(epoch, entry.role).await?
            } else {
                self.tidy_up(epoch).await?
            }
            let transport = &self.shared.transport;
            transport.remove(migration).await.map_err(Error::Sockets)?;
        }
        self.transfers
            .write(
                &self.shared.ledger,
                ledger::Migration {
                    finished: Some(self.shared.clock.now()),
                    ..entry
                },
            )
            .await?;
        Ok(())
    }

    async fn keep(&mut self, epoch: Epoch, role: Option<Role>) -> Result<(), Error> {
        let Some(mut vm) = self.vm.clone() else {
            return Ok(());
        };
        // What the transfer left here of a VM that is alive nowhere: it cannot go on, and would be in the way of a start.
        let hypervisor = self.shared.hypervisor.clone();
        let domain = hypervisor.get(self.id).await?;
        let left = domain.as_ref().map(|domain| domain.state);
        if matches!(left, Some(DomainState::HandedOver | DomainState::Incoming)) {
            tracing::warn!(state = ?left, "what a migration left of the VM holds nothing that could go on; it is powered off");
            hypervisor.destroy(self.id).await?;
        }
        vm.epoch = epoch;
        vm.disposition = Disposition::Owned;
        if let Some(intent) = &mut vm.intent {
            intent.epoch = epoch;
            if role == Some(Role::Destination) {
                vm.last_seen = Some((intent.power, PowerReason::Migrated));
                // What it could not have without a restart it has not got by moving.
                vm.changes.under_way = true;
                vm.snapshots.under_way = intent
                    .snapshots
                    .as_ref()
                    .is_some_and(|set| !set.layers.is_empty());
                // It runs since it was begun on the source; whether it was let go on here the next look shows. One that has
                // ended here meanwhile is started again, or not, by its restart policy.
                let ended = left == Some(DomainState::Stopped);
                vm.done = ledger::Done {
                    defined: Some(epoch),
                    volumes: true,
                    power_begun: intent.power_sequence,
                    power: if ended { intent.power_sequence } else { 0 },
                    restart: intent.restart_sequence,
                    ..ledger::Done::default()
                };
            } else if intent.power == PowerState::Running && stands(domain.as_ref()) {
                vm.done.power = 0;
            }
        }
        self.replace(vm).await?;
        self.start_afresh();
        Ok(())
    }

    /// Removes what a migration left of a VM that lives elsewhere.
    async fn tidy_up(&mut self, epoch: Epoch) -> Result<(), Error> {
        let hypervisor = self.shared.hypervisor.clone();
        match hypervisor.get(self.id).await?.map(|domain| domain.state) {
            // The controller concluded from another picture than this one. A person must look.
            Some(DomainState::Running) => {
                tracing::error!(
                    "the VM is said to be owned by the other host, but it runs here; nothing is removed"
                );
                return Err(
                    Denied::Unusable("the VM runs on this host; it is not removed".to_owned()).into(),
                );
            }
            Some(_) => {
                hypervisor.destroy(self.id).await?;
                hypervisor.undefine(self.id).await?;
            }
            None => {}
        }
        hypervisor.delete_volumes(self.id, true).await?;
        self.purge_copies().await?;
        console::remove(hypervisor.console_log(self.id)).await;
        self.domain = None;
        self.let_go(epoch).await
    }

    /// Removes this host's copies of volumes of the site, which the VM has taken along, or never had here.
    async fn purge_copies(&mut self) -> Result<(), Error> {
        let of_disk = |disk: &Disk| Some((disk.pool.clone(), disk.volume_id()?));
        let disks = self.vm.iter().flat_map(ledger::Vm::disks);
        let copies: Vec<_> = disks.filter_map(of_disk).collect();
        let shared = self.shared.clone();
        for (pool, volume) in copies {
            // Another VM's: nothing that a migration brought.
            if shared.volumes.holder(volume, Some(self.id)).is_none() {
                shared.hypervisor.purge_volume(&pool, volume, true).await?;
            }
        }
        Ok(())
    }
}

/// Whether the hypervisor stopped a guest to hand it over and could not let it go on again, as where the other side still held the
/// locks of its disks. Who stopped it otherwise is known, and it stays as it is.
fn stands(domain: Option<&Domain>) -> bool {
    domain.is_some_and(|domain| domain.state == DomainState::Paused && domain.reason == PowerReason::Unknown)
}

/// Returns when the first packet of a VM that has arrived was seen, or was waited for in vain; never when none is awaited.
/// Cancel safe: what watches stays.
pub(super) async fn measured(measuring: &mut Option<BoxFuture<'static, Option<Arrival>>>) -> Option<Arrival> {
    match measuring {
        Some(watching) => {
            let arrival = watching.await;
            *measuring = None;
            arrival
        }
        None => std::future::pending().await,
    }
}

/// Waits until the guest has first spoken here; `told` is when the source's word came.
async fn arrival(first: BoxFuture<'static, Instant>, told: Instant, word: Word) -> Option<Arrival> {
    let first = timeout(PACKET_LIMIT, first).await.ok()?;
    let since = |then| first.saturating_duration_since(then);
    let stopped_at = timeout(NOTE_LIMIT, word.stopped_at()).await;
    Some(Arrival {
        delay: since(told),
        blackout: stopped_at.ok().map(since),
    })
}

/// The whole of a transfer, on the source.
async fn transfer(
    shared: std::sync::Arc<Shared>,
    id: VmId,
    send: Send,
    definition: hypervisor::Definition,
    progress: watch::Sender<Progress>,
) -> Ended {
    let migration = send.migration;
    let outcome = carry(&shared, id, send, definition, progress).await;
    Ended { migration, outcome }
}

async fn carry(
    shared: &Shared,
    id: VmId,
    send: Send,
    definition: hypervisor::Definition,
    progress: watch::Sender<Progress>,
) -> Result<Progress, hypervisor::Error> {
    let peer = transport::Peer {
        host: send.destination,
        address: send.address,
    };
    let relay = shared.transport.open(send.migration, &peer).await;
    let relay = relay.map_err(|error| hypervisor::Error::Failed {
        call: "migrate",
        code: 0,
        detail: format!("sockets: {error}"),
    })?;
    let migrate = Migrate {
        migration: send.migration,
        definition,
        control: relay.control.clone(),
        memory: relay.memory.clone(),
        disks: relay.disks.clone(),
        max_downtime_ms: send.max_downtime_ms,
        bandwidth_mib_per_second: send.bandwidth_mib_per_second,
        arrives_paused: !mutant::on(Mutant::ArrivesRunning),
        stopped: Default::default(),
        released: CancellationToken::new(),
    };
    let given_up = CancellationToken::new();
    let sending = async {
        let outcome = shared.hypervisor.migrate(&migrate).await;
        if outcome.is_ok() {
            migrate.released.cancel();
        }
        given_up.cancel();
        outcome
    };
    let telling = async {
        // Both are tokens; what was cancelled stays so.
        tokio::select! {
            biased;
            () = migrate.released.cancelled() => tell_released(shared, send.migration, &peer, migrate.stopped.get().copied()).await,
            () = given_up.cancelled() => {}
        }
    };
    let watching = async {
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Ok(Some(now)) = shared.hypervisor.progress(id).await {
                progress.send_replace(now);
            }
        }
    };
    // Dropping the watching loses a figure at most.
    tokio::select! {
        biased;
        (outcome, ()) = futures::future::join(sending, telling) => outcome,
        () = watching => unreachable!("it watches until it is dropped"),
    }
}

/// Tells the destination that the VM may go on there.
async fn tell_released(
    shared: &Shared,
    migration: MigrationId,
    peer: &transport::Peer,
    stopped: Option<Instant>,
) {
    if let Err(error) = shared.transport.tell_released(migration, peer, stopped).await {
        tracing::warn!(%error, "the destination was not told to go on; it will be when the migration is finished");
    }
}
