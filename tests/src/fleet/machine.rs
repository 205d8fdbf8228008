//! A host's hypervisor as its agent sees it: the simulated one, with faults around every call, and with a look at what
//! is done to whom.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use dalgu_agent::hypervisor::{
    About, Change, Connection, Definition, Domain, Error, Hardware, Hint, Hypervisor, LayerChange, Layers,
    Migrate, Progress,
    backup::{Manifest, Order},
    files::PoolFile,
    sim::{Call, Fault, Phase, Sim},
};
use dalgu_proto::{
    host::VmUsage,
    ids::{BackupId, VmId, VolumeId},
    vm::{Disk, NumaPlace},
};
use tokio::sync::{broadcast, watch};

use super::{
    fate::{Fate, Kind},
    life::Life,
    plan::Node,
    site::Site,
};

/// The hypervisor of a host in one life of its agent.
pub struct Machine {
    /// The site.
    pub site: Arc<Site>,
    /// Which host's.
    pub host: usize,
    /// The agent that calls.
    pub life: Life,
    /// What outlives it.
    pub sim: Sim,
}

/// Phases in which a transfer can break, by number.
const PHASES: [Phase; 5] = [
    Phase::Prepare,
    Phase::Transfer,
    Phase::Handover,
    Phase::Finish,
    Phase::Confirm,
];

fn unavailable() -> Error {
    Error::Unavailable {
        detail: "the simulated hypervisor is busy".to_owned(),
    }
}

impl Machine {
    fn node(&self) -> Node {
        Node::Host(self.host)
    }

    async fn call<T>(
        &self,
        kind: Kind,
        name: &'static str,
        id: Option<VmId>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.life.pass().await;
        // When it is asked for, not when it is done: the owner may change its mind meanwhile.
        if let Some(id) = id.filter(|_| kind == Kind::Change) {
            self.site.before_change(self.host, name, id);
        }
        let fate = self.site.at(kind, name, self.node(), self.node());
        match fate {
            Fate::Delay(time) => tokio::time::sleep(time).await,
            Fate::Fail => return Err(unavailable()),
            Fate::CrashBefore => {
                self.site.kill(self.node());
                return self.life.stop_here().await;
            }
            _ => {}
        }
        self.life.pass().await;
        let result = work.await;
        match fate {
            Fate::CrashAfter => {
                self.site.kill(self.node());
                self.life.stop_here().await
            }
            Fate::Lie => result.and(Err(Error::Timeout {
                call: name,
                after: Duration::from_secs(30),
            })),
            _ => {
                self.life.pass().await;
                result
            }
        }
    }

    async fn look<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.call(Kind::Look, name, None, work).await
    }

    async fn change<T>(
        &self,
        name: &'static str,
        id: VmId,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.call(Kind::Change, name, Some(id), work).await
    }
}

#[async_trait]
impl Hypervisor for Machine {
    async fn about(&self) -> Result<About, Error> {
        self.look("about", self.sim.about()).await
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.sim.connection()
    }

    fn hints(&self) -> broadcast::Receiver<Hint> {
        self.sim.hints()
    }

    async fn list(&self) -> Result<Vec<Domain>, Error> {
        self.look("list", self.sim.list()).await
    }

    async fn get(&self, id: VmId) -> Result<Option<Domain>, Error> {
        self.look("get", self.sim.get(id)).await
    }

    async fn create_volumes(&self, definition: &Definition, incoming: bool) -> Result<(), Error> {
        let work = self.sim.create_volumes(definition, incoming);
        self.change("create_volumes", definition.id, work).await
    }

    async fn hardware(&self, id: VmId) -> Result<Option<Hardware>, Error> {
        self.look("hardware", self.sim.hardware(id)).await
    }

    async fn change_hardware(&self, definition: &Definition, change: &Change) -> Result<(), Error> {
        let work = self.sim.change_hardware(definition, change);
        self.change("change_hardware", definition.id, work).await
    }

    async fn layers(&self, definition: &Definition) -> Result<Layers, Error> {
        self.look("layers", self.sim.layers(definition)).await
    }

    async fn change_layers(&self, definition: &Definition, change: &LayerChange) -> Result<bool, Error> {
        let work = self.sim.change_layers(definition, change);
        self.change("change_layers", definition.id, work).await
    }

    async fn delete_volume(&self, id: VmId, disk: &Disk) -> Result<(), Error> {
        self.change("delete_volume", id, self.sim.delete_volume(id, disk))
            .await
    }

    async fn delete_volumes(&self, id: VmId, keep_shared: bool) -> Result<(), Error> {
        self.change("delete_volumes", id, self.sim.delete_volumes(id, keep_shared))
            .await
    }

    async fn purge_volume(&self, pool: &str, volume: VolumeId, keep_shared: bool) -> Result<(), Error> {
        self.site.before_purge(self.host, volume);
        let work = self.sim.purge_volume(pool, volume, keep_shared);
        self.call(Kind::Change, "purge_volume", None, work).await
    }

    async fn define(&self, definition: &Definition) -> Result<(), Error> {
        self.change("define", definition.id, self.sim.define(definition))
            .await
    }

    async fn pin(&self, places: &BTreeMap<VmId, Vec<NumaPlace>>) -> Result<(), Error> {
        self.sim.pin(places).await
    }

    async fn start(&self, id: VmId) -> Result<(), Error> {
        let work = async {
            let started = self.sim.start(id).await;
            if started.is_ok() {
                self.site.guest_started(id);
            }
            started
        };
        self.change("start", id, work).await
    }

    async fn shutdown(&self, id: VmId) -> Result<(), Error> {
        self.change("shutdown", id, self.sim.shutdown(id)).await
    }

    async fn destroy(&self, id: VmId) -> Result<(), Error> {
        self.change("destroy", id, self.sim.destroy(id)).await
    }

    async fn reboot(&self, id: VmId) -> Result<(), Error> {
        self.change("reboot", id, self.sim.reboot(id)).await
    }

    async fn reset(&self, id: VmId) -> Result<(), Error> {
        self.change("reset", id, self.sim.reset(id)).await
    }

    async fn pause(&self, id: VmId) -> Result<(), Error> {
        self.change("pause", id, self.sim.pause(id)).await
    }

    async fn resume(&self, id: VmId) -> Result<(), Error> {
        self.change("resume", id, self.sim.resume(id)).await
    }

    async fn undefine(&self, id: VmId) -> Result<(), Error> {
        self.change("undefine", id, self.sim.undefine(id)).await
    }

    async fn usage(&self) -> Result<Vec<(VmId, VmUsage)>, Error> {
        self.look("usage", self.sim.usage()).await
    }

    fn changing(&self, id: VmId) -> bool {
        self.sim.changing(id)
    }

    fn console_log(&self, id: VmId) -> Option<PathBuf> {
        self.sim.console_log(id)
    }

    fn control_socket(&self) -> &Path {
        self.sim.control_socket()
    }

    async fn migrate(&self, migrate: &Migrate) -> Result<Progress, Error> {
        self.life.pass().await;
        self.site.checker().sends(self.host, migrate.arrives_paused);
        let fate = self.site.at(Kind::Transfer, "migrate", self.node(), self.node());
        match fate {
            Fate::Break(phase) => {
                let phase = match PHASES[usize::from(phase) % PHASES.len()] {
                    // At half of them, by number, the other side still holds the locks of the disks.
                    Phase::Handover if migrate.migration.uuid().as_u128() % 2 == 1 => Phase::Locked,
                    phase => phase,
                };
                self.sim.break_migration_at(phase);
            }
            Fate::Lie => {
                let error = Error::Timeout {
                    call: "migrate",
                    after: Duration::ZERO,
                };
                self.sim.fail_next(Call::Migrate, Fault::TakesEffect(error));
            }
            _ => {}
        }
        let result = self.sim.migrate(migrate).await;
        self.site.census();
        self.life.pass().await;
        result
    }

    async fn progress(&self, id: VmId) -> Result<Option<Progress>, Error> {
        self.look("progress", self.sim.progress(id)).await
    }

    async fn abort_migration(&self, id: VmId) -> Result<(), Error> {
        self.change("abort_migration", id, self.sim.abort_migration(id))
            .await
    }

    async fn back_up(&self, order: &Order) -> Result<Manifest, Error> {
        self.look("back_up", self.sim.back_up(order)).await
    }

    async fn backup_progress(&self, id: VmId) -> Result<Option<(u64, u64)>, Error> {
        self.look("backup_progress", self.sim.backup_progress(id)).await
    }

    async fn backup(&self, pool: &str, id: BackupId) -> Result<Option<Manifest>, Error> {
        self.look("backup", self.sim.backup(pool, id)).await
    }

    async fn remove_backup(&self, vm: VmId, pool: &str, id: BackupId) -> Result<(), Error> {
        self.look("remove_backup", self.sim.remove_backup(vm, pool, id))
            .await
    }

    async fn files(&self, pool: &str) -> Result<Vec<PoolFile>, Error> {
        self.look("files", self.sim.files(pool)).await
    }
}
