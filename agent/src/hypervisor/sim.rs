//! The simulated hypervisor: domains in memory, with a guest's habits and a hypervisor's faults.
//!
//! `dalgu-agent --hypervisor sim` serves demonstrations and fleets of thousands with it; tests drive it by the
//! methods of [`Sim`] in `control`: stepping, delays, faults per call, guests that crash, a hypervisor that restarts.
//! Two of them migrate guests to each other over the [`Lines`] that lead to the paths of [`Migrate`], in the order of a real
//! handover:
//!
//! ```text
//! source       Running ──────────── transfer ─────────► HandedOver ── destination says it runs ──► gone
//! destination  (none) ─ prepare ─► Incoming ─────────────────── finish ─► Running
//! ```
//!
//! It keeps to tokio's clock, so that tests can stop it, and must hold no lock while it waits. Nothing is kept on
//! disk but console logs: a simulated host that restarts has lost its guests.

mod arrival;
mod backup;
mod change;
mod config;
mod control;
mod faults;
mod files;
mod guest;
mod layers;
mod lines;
mod migration;
mod state;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use dalgu_proto::{
    host::{GuestFeature, VmUsage},
    ids::{BackupId, VmId, VolumeId},
    vm::{Disk, NumaPlace},
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, broadcast, watch},
};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use config::{Delays, SimConfig, Stepping};
pub use control::{SharedStorage, Written};
pub use faults::{Call, Fault, Phase};
pub use guest::Behaviour;
pub use lines::{Duplex, Lines, Listener, MemoryLines, Stream, UnixLines};

use super::{
    About, Change, Connection, Definition, Domain, Error, Hardware, Hint, Hypervisor, LayerChange, Layers,
    Migrate, Progress,
    backup::{Manifest, Order},
    files::PoolFile,
};
use faults::Faults;
use state::State;

/// A handle to a simulated hypervisor; clones share it. It ends with its last handle.
#[derive(Debug, Clone)]
pub struct Sim(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: SimConfig,
    control_socket: PathBuf,
    state: Mutex<State>,
    faults: Mutex<Faults>,
    steps: Semaphore,
    /// Where it was started: what goes on in it outlives its callers' runtimes, as QEMU outlives an agent.
    runtime: Handle,
    connection: watch::Sender<Connection>,
    hints: broadcast::Sender<Hint>,
    _background: DropGuard,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was held can only be a test's own; the state is still whole between statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hint(&self, hint: Hint) {
        // Nobody listens: then nobody needs to know.
        let _ = self.hints.send(hint);
    }

    /// Waits for the step that lets a change go on.
    async fn gate(&self) {
        if self.config.stepping == Stepping::ByHand {
            self.steps
                .acquire()
                .await
                .expect("the semaphore is never closed")
                .forget();
        }
    }

    fn reachable(&self) -> Result<CancellationToken, Error> {
        match &*self.connection.borrow() {
            Connection::Up => Ok(self.state().daemon.clone()),
            Connection::Down(detail) => Err(Error::Unavailable {
                detail: detail.clone(),
            }),
        }
    }

    /// One call: its fault, if one waits for it, its step, its delay, its effect, its deadline.
    async fn call<T>(
        &self,
        call: Call,
        delay: Duration,
        effect: impl FnOnce(&mut State, &SimConfig) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let daemon = self.reachable()?;
        let fault = self.faults().take(call);
        let work = async {
            match &fault {
                Some(Fault::Error(error)) => return Err(error.clone()),
                Some(Fault::Hang | Fault::Late(_)) => std::future::pending().await,
                Some(Fault::TakesEffect(_)) | None => {}
            }
            if call.changes() {
                self.gate().await;
            }
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let done = effect(&mut self.state(), &self.config)?;
            match fault {
                Some(Fault::TakesEffect(error)) => Err(error),
                _ => Ok(done),
            }
        };
        let after = call.deadline();
        tokio::select! {
            biased;
            () = daemon.cancelled() => Err(Error::Unavailable { detail: "the simulated hypervisor restarted".into() }),
            // Dropping the work is safe: its effect is one synchronous statement.
            result = tokio::time::timeout(after, work) => {
                result.unwrap_or(Err(Error::Timeout { call: call.name(), after }))
            }
        }
    }

    /// A call that changes one domain, and the hint of it.
    async fn change(
        self: &Arc<Self>,
        call: Call,
        id: VmId,
        delay: Duration,
        effect: impl FnOnce(&mut State, &SimConfig) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        let late = self.faults().take_late(call);
        let result = match late {
            Some(after) => self.late(call, id, after, effect).await,
            None => self.call(call, delay, effect).await,
        };
        // Also after an error: it may be one that took effect.
        self.hint(Hint::Domain(id));
        result
    }

    /// A call that has its effect after its caller has given it up.
    async fn late(
        self: &Arc<Self>,
        call: Call,
        id: VmId,
        after: Duration,
        effect: impl FnOnce(&mut State, &SimConfig) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        self.reachable()?;
        let deadline = call.deadline();
        *self.state().late.entry(id).or_default() += 1;
        guest::later(self, id, deadline + after, move |inner| {
            let mut state = inner.state();
            // Nobody is there any more to hear of an error.
            let _ = effect(&mut state, &inner.config);
            if let Some(count) = state.late.get_mut(&id) {
                *count -= 1;
            }
        });
        tokio::time::sleep(deadline).await;
        Err(Error::Timeout {
            call: call.name(),
            after: deadline,
        })
    }
}

impl Sim {
    /// Starts a simulated hypervisor; must be called on a tokio runtime.
    ///
    /// # Errors
    /// If the control socket cannot be listened to.
    pub fn new(config: SimConfig) -> io::Result<Self> {
        let background = CancellationToken::new();
        let control_socket = config
            .control_socket
            .clone()
            .unwrap_or_else(|| PathBuf::from("/nonexistent/control"));
        let listener = config
            .control_socket
            .as_deref()
            .map(|path| config.lines.listen(path))
            .transpose()?;
        let ticks = config.console_dir.is_some();
        let inner = Arc::new(Inner {
            config,
            control_socket,
            state: Mutex::new(State::default()),
            faults: Mutex::new(Faults::default()),
            steps: Semaphore::new(0),
            runtime: Handle::current(),
            connection: watch::Sender::new(Connection::Up),
            hints: broadcast::Sender::new(1024),
            _background: background.clone().drop_guard(),
        });
        if let Some(listener) = listener {
            tokio::spawn(arrival::serve(
                Arc::downgrade(&inner),
                listener,
                background.clone(),
            ));
        }
        if ticks {
            tokio::spawn(guest::count(Arc::downgrade(&inner), background));
        }
        Ok(Self(inner))
    }
}

#[async_trait]
impl Hypervisor for Sim {
    async fn about(&self) -> Result<About, Error> {
        let about = About {
            version: concat!("simulated hypervisor ", env!("CARGO_PKG_VERSION")).into(),
            accelerator: "sim".into(),
            accelerator_reason: "guests are simulated".into(),
            guest_features: vec![
                GuestFeature::FirstBoot,
                GuestFeature::Uefi,
                GuestFeature::UefiSecureBoot,
                GuestFeature::Tpm,
                GuestFeature::HotChange,
                GuestFeature::Volume,
                GuestFeature::DiskChange,
                GuestFeature::Snapshot,
                GuestFeature::Backup,
                GuestFeature::VolumeMove,
                GuestFeature::VolumeSnapshot,
                GuestFeature::Numa,
                GuestFeature::PciDevice,
            ],
        };
        self.0
            .call(Call::About, self.0.config.delays.look, |_, _| Ok(about))
            .await
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.0.connection.subscribe()
    }

    fn hints(&self) -> broadcast::Receiver<Hint> {
        self.0.hints.subscribe()
    }

    async fn list(&self) -> Result<Vec<Domain>, Error> {
        self.0
            .call(Call::List, self.0.config.delays.look, |state, config| {
                Ok(state.list(config))
            })
            .await
    }

    async fn get(&self, id: VmId) -> Result<Option<Domain>, Error> {
        self.0
            .call(Call::Get, self.0.config.delays.look, |state, config| {
                Ok(state.get(id, config))
            })
            .await
    }

    fn changing(&self, id: VmId) -> bool {
        self.0.state().late.get(&id).is_some_and(|count| *count > 0)
    }

    async fn create_volumes(&self, definition: &Definition, incoming: bool) -> Result<(), Error> {
        let delay = self.0.config.delays.volumes;
        self.0
            .call(Call::CreateVolumes, delay, |state, config| {
                state.create_volumes(definition, incoming, config)
            })
            .await
    }

    async fn hardware(&self, id: VmId) -> Result<Option<Hardware>, Error> {
        self.0
            .call(Call::Hardware, self.0.config.delays.look, |state, config| {
                Ok(state.hardware(id, config))
            })
            .await
    }

    async fn change_hardware(&self, definition: &Definition, change: &Change) -> Result<(), Error> {
        let delay = self.0.config.delays.look;
        let (id, definition, change) = (definition.id, definition.clone(), change.clone());
        self.0
            .change(Call::Change, id, delay, move |state, config| {
                state.change(&definition, &change, config)
            })
            .await
    }

    async fn layers(&self, definition: &Definition) -> Result<Layers, Error> {
        self.0
            .call(Call::Layers, self.0.config.delays.look, |state, config| {
                state.layers(definition, config)
            })
            .await
    }

    async fn change_layers(&self, definition: &Definition, change: &LayerChange) -> Result<bool, Error> {
        let delay = self.0.config.delays.volumes;
        let (id, definition, change) = (definition.id, definition.clone(), *change);
        let frozen = Arc::new(AtomicBool::new(false));
        let note = frozen.clone();
        self.0
            .change(Call::ChangeLayers, id, delay, move |state, config| {
                note.store(
                    state.change_layers(&definition, &change, config)?,
                    Ordering::Relaxed,
                );
                Ok(())
            })
            .await?;
        Ok(frozen.load(Ordering::Relaxed))
    }

    async fn delete_volume(&self, id: VmId, disk: &Disk) -> Result<(), Error> {
        let delay = self.0.config.delays.volumes;
        self.0
            .call(Call::DeleteVolume, delay, |state, config| {
                state.delete_volume(id, disk, config)
            })
            .await
    }

    async fn delete_volumes(&self, id: VmId, keep_shared: bool) -> Result<(), Error> {
        let delay = self.0.config.delays.volumes;
        self.0
            .call(Call::DeleteVolumes, delay, |state, config| {
                state.delete_volumes(id, keep_shared, config)
            })
            .await
    }

    async fn purge_volume(&self, pool: &str, volume: VolumeId, keep_shared: bool) -> Result<(), Error> {
        let delay = self.0.config.delays.volumes;
        self.0
            .call(Call::PurgeVolume, delay, |state, config| {
                state.purge_volume(pool, volume, keep_shared, config);
                Ok(())
            })
            .await
    }

    async fn define(&self, definition: &Definition) -> Result<(), Error> {
        let delay = self.0.config.delays.define;
        let definition = definition.clone();
        self.0
            .change(Call::Define, definition.id, delay, move |state, config| {
                state.define(&definition, config)
            })
            .await
    }

    async fn pin(&self, places: &BTreeMap<VmId, Vec<NumaPlace>>) -> Result<(), Error> {
        // Its guests need no processor; that it was told is kept for tests.
        self.0.state().places.clone_from(places);
        Ok(())
    }

    async fn start(&self, id: VmId) -> Result<(), Error> {
        let before = guest::run(&self.0, id);
        let result = self
            .0
            .change(
                Call::Start,
                id,
                self.0.config.delays.power,
                move |state, config| state.start(id, config),
            )
            .await;
        // Also after an error: it may be one that took effect.
        if guest::run(&self.0, id) != before {
            guest::booted(&self.0, id);
        }
        result
    }

    async fn shutdown(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Shutdown,
                id,
                self.0.config.delays.look,
                move |state, config| state.ask(id, config),
            )
            .await?;
        guest::asked_to_shut_down(&self.0, id);
        Ok(())
    }

    async fn destroy(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Destroy,
                id,
                self.0.config.delays.power,
                move |state, config| state.destroy(id, config),
            )
            .await
    }

    async fn reboot(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Reboot,
                id,
                self.0.config.delays.look,
                move |state, config| state.ask(id, config),
            )
            .await?;
        guest::asked_to_reboot(&self.0, id);
        Ok(())
    }

    async fn reset(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Reset,
                id,
                self.0.config.delays.look,
                move |state, config| state.reset(id, config),
            )
            .await
    }

    async fn pause(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Pause,
                id,
                self.0.config.delays.look,
                move |state, config| state.pause(id, config),
            )
            .await
    }

    async fn resume(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Resume,
                id,
                self.0.config.delays.look,
                move |state, config| state.resume(id, config),
            )
            .await
    }

    async fn undefine(&self, id: VmId) -> Result<(), Error> {
        self.0
            .change(
                Call::Undefine,
                id,
                self.0.config.delays.define,
                move |state, config| state.undefine(id, config),
            )
            .await
    }

    async fn usage(&self) -> Result<Vec<(VmId, VmUsage)>, Error> {
        self.0
            .call(Call::Usage, self.0.config.delays.look, |state, config| {
                Ok(state.usage(config))
            })
            .await
    }

    fn console_log(&self, id: VmId) -> Option<PathBuf> {
        guest::console_log(&self.0.config, id)
    }

    fn control_socket(&self) -> &Path {
        &self.0.control_socket
    }

    async fn migrate(&self, migrate: &Migrate) -> Result<Progress, Error> {
        migration::send(&self.0, migrate).await
    }

    async fn progress(&self, id: VmId) -> Result<Option<Progress>, Error> {
        self.0
            .call(Call::Progress, self.0.config.delays.look, |state, _| {
                Ok(state.progress(id))
            })
            .await
    }

    async fn abort_migration(&self, id: VmId) -> Result<(), Error> {
        self.0
            .call(Call::AbortMigration, self.0.config.delays.look, |state, _| {
                state.abort(id);
                Ok(())
            })
            .await
    }

    async fn back_up(&self, order: &Order) -> Result<Manifest, Error> {
        self.0
            .call(Call::BackUp, self.0.config.delays.volumes, |state, config| {
                state.back_up(order, config)
            })
            .await
    }

    async fn backup_progress(&self, _: VmId) -> Result<Option<(u64, u64)>, Error> {
        // Its copies are made in one piece.
        self.0
            .call(Call::BackupProgress, self.0.config.delays.look, |_, _| Ok(None))
            .await
    }

    async fn backup(&self, pool: &str, id: BackupId) -> Result<Option<Manifest>, Error> {
        self.0
            .call(Call::Backup, self.0.config.delays.look, |state, config| {
                Ok(state.backup(pool, id, config))
            })
            .await
    }

    async fn remove_backup(&self, vm: VmId, pool: &str, id: BackupId) -> Result<(), Error> {
        self.0
            .call(
                Call::RemoveBackup,
                self.0.config.delays.volumes,
                |state, config| {
                    state.remove_backup(vm, pool, id, config);
                    Ok(())
                },
            )
            .await
    }

    async fn files(&self, pool: &str) -> Result<Vec<PoolFile>, Error> {
        self.0
            .call(Call::Files, self.0.config.delays.look, |state, config| {
                Ok(state.files(pool, config))
            })
            .await
    }
}
