//! Real guests: the hypervisor on libvirt's `qemu:///system` (and its test driver, for the contract).
//!
//! The only place that names `virt`. [`Libvirt`] turns each call of the trait into a piece of blocking work for
//! `worker`, on a connection that `connection` keeps; `domain`, `stats` and `migrate` are that work, `xml` and `read`
//! turn definitions into domains and back, `storage` keeps the disks, `accel` proves KVM. Foreign domains are listed
//! and never touched.

mod accel;
mod backup;
mod change;
mod connection;
mod copies;
mod cut_jobs;
mod domain;
mod ended;
mod error;
mod ffi;
mod host;
mod leftover;
mod migrate;
mod moving;
pub mod pins;
pub mod pool;
mod process;
mod qmp;
mod quiesce;
pub mod read;
mod snapshot;
mod stats;
mod storage;
#[cfg(test)]
mod tests;
pub mod tree;
mod worker;
pub mod xml;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use dalgu_proto::{
    host::VmUsage,
    ids::{BackupId, ClusterId, VmId, VolumeId},
    vm::{CloneMode, Disk, NumaPlace},
};
use tokio::{
    runtime::Handle,
    sync::{broadcast, watch},
    time::{Instant, sleep},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use virt::connect::Connect;
use virt_sys as sys;

pub use accel::Accel;
pub use cut_jobs::clear as clear_cut_jobs;
pub use host::LibvirtConfig;
pub use storage::Pool;
pub use xml::Accelerator;

use super::{
    About, Change, Connection, Definition, Domain, Error, Hardware, Hint, Hypervisor, LayerChange, Layers,
    Migrate, Progress,
    backup::{Manifest, Order},
    files::PoolFile,
};
use connection::{Links, Supervisor};
use copies::Copies;
use host::Host;
use storage::Storage;
use worker::{Kind, Workers};

/// Time between two looks at a backup.
const BACKUP_LOOKS: Duration = Duration::from_millis(500);
/// libvirt may be away for so long while it copies.
const BACKUP_PATIENCE: Duration = Duration::from_secs(60);
/// A copying that has not moved for so long has ended: a libvirtd that came back as it did may not know.
const BACKUP_STALL: Duration = Duration::from_secs(120);
/// Time for the disks of a VM.
const VOLUMES_TIME: Duration = Duration::from_secs(600);
/// As [`VOLUMES_TIME`], where their data is copied, of a backup or of an image.
const COPIES_TIME: Duration = Duration::from_secs(24 * 3600);
/// How long to wait, after a transfer, for libvirt's account of it.
const ACCOUNT_WAIT: Duration = Duration::from_millis(500);

/// The hypervisor on libvirt. It ends with its last handle.
pub struct Libvirt {
    host: Arc<Host>,
    accelerator_reason: String,
    control_socket: PathBuf,
    supervisor: Arc<Supervisor>,
    workers: Workers,
    known: Arc<Mutex<stats::Known>>,
    _background: DropGuard,
}

impl Libvirt {
    /// Decides the accelerator and starts to connect; must be called on a tokio runtime. Does not wait for libvirt:
    /// see [`Hypervisor::connection`].
    ///
    /// # Errors
    /// If the directories for console logs and run-time files cannot be made.
    pub async fn start(config: LibvirtConfig) -> io::Result<Self> {
        std::fs::create_dir_all(&config.console_dir)?;
        std::fs::create_dir_all(&config.run_dir)?;
        let (accelerator, accelerator_reason) = match config.uri.starts_with("test:") {
            true => (Accelerator::Test, "libvirt's test driver runs nothing".into()),
            false => accel::decide(config.accel, &config.run_dir).await,
        };
        let storage = Storage::new(
            config.pools.clone(),
            config.images_dir.clone(),
            config.image_store_dir.clone(),
            config.qemu_user.clone(),
        );
        let supervisor = Arc::new(Supervisor::new(&config.uri));
        let stop = CancellationToken::new();
        tokio::spawn(supervisor.clone().run(stop.clone()));
        Ok(Self {
            accelerator_reason,
            control_socket: control_socket(&config.uri),
            supervisor,
            workers: Workers::new(),
            known: Arc::default(),
            host: Arc::new(Host {
                config,
                accelerator,
                storage,
                copies: Copies::default(),
                copying: Mutex::default(),
                places: Mutex::default(),
                applied: Mutex::default(),
            }),
            _background: stop.drop_guard(),
        })
    }

    /// One call on a connection of its kind.
    async fn on<T: Send + 'static>(
        &self,
        call: &'static str,
        kind: Kind,
        about: Option<VmId>,
        seconds: u64,
        work: impl FnOnce(&Connect, ClusterId) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let links = self.supervisor.links()?;
        let cluster = self.host.config.cluster;
        let after = Duration::from_secs(seconds);
        let work = move |number: usize| work(pick(&links, kind, number), cluster);
        self.workers.run(call, kind, about, after, work).await
    }

    /// A change of one domain; changes of the same domain wait for each other.
    async fn change(
        &self,
        call: &'static str,
        id: VmId,
        seconds: u64,
        work: impl FnOnce(&Connect, ClusterId) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        self.on(call, Kind::Change, Some(id), seconds, work).await
    }

    /// Waits for the job of a backup to end.
    async fn copied(&self, id: VmId) -> Result<(), Error> {
        let mut heard = Instant::now();
        let mut moved = (heard, 0);
        loop {
            let looked = self.on("backup_progress", Kind::Urgent, None, 5, move |connect, _| {
                backup::job(connect, id, true)
            });
            match looked.await {
                Ok(backup::Job::Copies(done, _)) => {
                    heard = Instant::now();
                    if done != moved.1 {
                        moved = (heard, done);
                    } else if moved.0.elapsed() > BACKUP_STALL {
                        let detail = format!("its copying has stood still for {BACKUP_STALL:?}");
                        return Err(Error::WrongState { id, detail });
                    }
                }
                Ok(backup::Job::Done) => return Ok(()),
                Ok(backup::Job::Failed(detail)) => {
                    let detail = format!("its disks could not be copied: {detail}");
                    return Err(Error::WrongState { id, detail });
                }
                Ok(backup::Job::None) => {
                    let detail = "it was powered off, or libvirt was restarted, while its disks were copied";
                    return Err(Error::WrongState {
                        id,
                        detail: detail.to_owned(),
                    });
                }
                Err(error) if !error.outcome_unknown() || heard.elapsed() > BACKUP_PATIENCE => {
                    return Err(error);
                }
                Err(_) => {}
            }
            sleep(BACKUP_LOOKS).await;
        }
    }

    /// libvirt's account of a transfer that has just ended.
    async fn account(&self, id: VmId) -> Option<Progress> {
        let deadline = Instant::now() + ACCOUNT_WAIT;
        loop {
            let found = {
                let mut completed = self
                    .supervisor
                    .completed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                let place = completed.iter().position(|(other, _)| *other == id);
                place.map(|place| completed.remove(place).1)
            };
            if found.is_some() || Instant::now() >= deadline {
                return found.map(|params| migrate::figures(&params, true));
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn pick(links: &Links, kind: Kind, number: usize) -> &Connect {
    match kind {
        Kind::Change => links.changes.get(number).unwrap_or(&links.urgent),
        Kind::Stats => &links.stats,
        Kind::Urgent => &links.urgent,
        Kind::Look | Kind::Files | Kind::Migrate => &links.look,
    }
}

/// The socket of the libvirt at a URI: the one it names, or the one of the daemon in use. Daemons per driver take
/// precedence, as in libvirt itself.
fn control_socket(uri: &str) -> PathBuf {
    if let Some((_, named)) = uri.split_once("socket=") {
        return named.split('&').next().unwrap_or(named).into();
    }
    let modular = Path::new("/run/libvirt/virtqemud-sock");
    if modular.exists() {
        modular.into()
    } else {
        "/run/libvirt/libvirt-sock".into()
    }
}

fn version_text(name: &str, version: u64) -> String {
    format!(
        "{name} {}.{}.{}",
        version / 1_000_000,
        version / 1000 % 1000,
        version % 1000
    )
}

#[async_trait]
impl Hypervisor for Libvirt {
    async fn about(&self) -> Result<About, Error> {
        let accelerator = self.host.accelerator;
        let ask = move |connect: &Connect, _| {
            let failed = |error: virt::error::Error| error::general("about", &error);
            Ok((
                connect.hyp_version().map_err(failed)?,
                connect.lib_version().map_err(failed)?,
                host::guest_features(connect, accelerator)?,
            ))
        };
        let (qemu, libvirt, guest_features) = self.on("about", Kind::Look, None, 10, ask).await?;
        Ok(About {
            version: format!(
                "{}, {}",
                version_text("QEMU", qemu.into()),
                version_text("libvirt", libvirt.into())
            ),
            accelerator: self.host.accelerator.as_str().into(),
            accelerator_reason: self.accelerator_reason.clone(),
            guest_features,
        })
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.supervisor.connection.subscribe()
    }

    fn hints(&self) -> broadcast::Receiver<Hint> {
        self.supervisor.hints.subscribe()
    }

    async fn list(&self) -> Result<Vec<Domain>, Error> {
        let mut domains = self.on("list", Kind::Look, None, 10, domain::list).await?;
        let resets = self.supervisor.resets();
        for domain in &mut domains {
            domain.resets = resets.of(domain.id);
        }
        Ok(domains)
    }

    async fn get(&self, id: VmId) -> Result<Option<Domain>, Error> {
        let found = self
            .on("get", Kind::Look, None, 10, move |connect, cluster| {
                domain::get(connect, id, cluster)
            })
            .await?;
        Ok(found.map(|domain| Domain {
            resets: self.supervisor.resets().of(id),
            ..domain
        }))
    }

    fn changing(&self, id: VmId) -> bool {
        self.workers.changing(id)
    }

    async fn create_volumes(&self, definition: &Definition, incoming: bool) -> Result<(), Error> {
        let copied = |disk: &Disk| {
            let of_image = disk.digest.is_some() && disk.clone_mode == CloneMode::Full;
            disk.backup.is_some() || of_image
        };
        let copies = definition.spec.disks.iter().any(copied);
        let after = if copies && !incoming {
            COPIES_TIME
        } else {
            VOLUMES_TIME
        };
        let (host, definition, runtime) = (self.host.clone(), definition.clone(), Handle::current());
        let only = Some(definition.id);
        // On a thread of its own although it waits for qemu-img: a dead network file system blocks the rest of it.
        let work =
            move |_| runtime.block_on(host.storage.create(&definition, incoming, Instant::now() + after));
        self.workers
            .run("create_volumes", Kind::Files, only, after, work)
            .await
    }

    async fn hardware(&self, id: VmId) -> Result<Option<Hardware>, Error> {
        let host = self.host.clone();
        // It reads the files of disks, which may hang; libvirt itself is only asked what it knows.
        self.on("hardware", Kind::Files, None, 10, move |connect, cluster| {
            change::hardware(&host, connect, id, cluster)
        })
        .await
    }

    async fn change_hardware(&self, definition: &Definition, order: &Change) -> Result<(), Error> {
        const CALL: &str = "change_hardware";
        let (id, host) = (definition.id, self.host.clone());
        if let Change::GrowDisk(name) = order {
            let (looking, wanted) = (host.clone(), definition.clone());
            let off = self.on(CALL, Kind::Look, None, 10, move |connect, cluster| {
                change::off(&looking, connect, cluster, &wanted)
            });
            if let Some(off) = off.await? {
                let after = Duration::from_secs(100);
                let (name, runtime) = (name.clone(), Handle::current());
                let work = move |_| match off.spec.disks.iter().find(|disk| disk.name == name) {
                    Some(disk) => runtime.block_on(host.storage.grow(id, disk, Instant::now() + after)),
                    None => Ok(()),
                };
                return self.workers.run(CALL, Kind::Files, Some(id), after, work).await;
            }
        }
        let (definition, order) = (definition.clone(), order.clone());
        if let Change::MoveDisk(name) = order {
            let runtime = Handle::current();
            let go_on = move |connect: &Connect, cluster| {
                moving::go_on(&host, connect, cluster, &definition, &name, &runtime)
            };
            return self.change(CALL, id, 120, go_on).await;
        }
        self.change(CALL, id, 120, move |connect, cluster| {
            change::change(&host, connect, cluster, &definition, &order)
        })
        .await
    }

    async fn layers(&self, definition: &Definition) -> Result<Layers, Error> {
        let (host, definition) = (self.host.clone(), definition.clone());
        // As `hardware`.
        self.on("layers", Kind::Files, None, 10, move |connect, cluster| {
            snapshot::layers(&host, connect, cluster, &definition)
        })
        .await
    }

    async fn change_layers(&self, definition: &Definition, order: &LayerChange) -> Result<bool, Error> {
        const CALL: &str = "change_layers";
        let (id, host) = (definition.id, self.host.clone());
        let (definition, order) = (Arc::new(definition.clone()), *order);
        let looking = (host.clone(), definition.clone());
        let prepared = self
            .on(CALL, Kind::Files, None, 10, move |connect, cluster| {
                snapshot::prepare(&looking.0, connect, cluster, &looking.1, &order)
            })
            .await?;
        let after = Duration::from_secs(match order {
            LayerChange::Merge(_) => 3600,
            _ => 60,
        });
        let (runtime, filling) = (Handle::current(), (host.clone(), definition.clone()));
        let files = move |_| {
            let deadline = Instant::now() + after;
            let changing = snapshot::change_files(&filling.0, &filling.1, &prepared, &order, deadline);
            runtime.block_on(changing)
        };
        let tops = self
            .workers
            .run(CALL, Kind::Files, Some(id), after, files)
            .await?;
        let runtime = Handle::current();
        self.on(CALL, Kind::Change, Some(id), 120, move |connect, cluster| {
            snapshot::change(&host, connect, cluster, &definition, &order, &tops, &runtime)
        })
        .await
    }

    async fn delete_volume(&self, id: VmId, disk: &Disk) -> Result<(), Error> {
        const CALL: &str = "delete_volume";
        let (host, disk) = (self.host.clone(), disk.clone());
        self.on(CALL, Kind::Files, Some(id), 60, move |connect, cluster| {
            if change::has_disk(&host, connect, id, cluster, &disk)? {
                let detail = format!("it still has the disk {}", disk.name);
                return Err(Error::WrongState { id, detail });
            }
            let path = host.storage.path(id, &disk)?;
            if host
                .copies
                .of(id, &disk.name)
                .is_some_and(|(target, _)| target == path)
            {
                host.copies.end(id, Some(&disk.name));
            }
            host.storage.delete_one(id, &disk)
        })
        .await
    }

    async fn delete_volumes(&self, id: VmId, keep_shared: bool) -> Result<(), Error> {
        self.on("delete_volumes", Kind::Look, None, 10, move |connect, cluster| {
            domain::disks_are_free(connect, id, cluster)
        })
        .await?;
        let host = self.host.clone();
        let after = Duration::from_secs(50);
        self.workers
            .run("delete_volumes", Kind::Files, Some(id), after, move |_| {
                host.copies.end(id, None);
                host.storage.delete(id, keep_shared)
            })
            .await
    }

    async fn purge_volume(&self, pool: &str, volume: VolumeId, keep_shared: bool) -> Result<(), Error> {
        let (host, pool) = (self.host.clone(), pool.to_owned());
        let after = Duration::from_secs(50);
        self.workers
            .run("purge_volume", Kind::Files, None, after, move |_| {
                host.storage.purge(&pool, volume, keep_shared)
            })
            .await
    }

    async fn define(&self, definition: &Definition) -> Result<(), Error> {
        let (id, host, definition) = (definition.id, self.host.clone(), definition.clone());
        if definition.mark.cluster != self.host.config.cluster {
            return Err(Error::Foreign {
                id,
                detail: "the definition bears another site's mark".into(),
            });
        }
        self.change("define", id, 30, move |connect, cluster| {
            let definition = moving::placed(&host, connect, cluster, &definition)?;
            let tops = snapshot::tops(connect, id, cluster)?;
            let xml = host.model(&definition, &tops)?.to_xml()?;
            domain::define(connect, id, definition.name.as_str(), &xml, cluster)
        })
        .await
    }

    async fn start(&self, id: VmId) -> Result<(), Error> {
        let (host, check_files) = (self.host.clone(), self.host.accelerator != Accelerator::Test);
        self.change("start", id, 120, move |connect, cluster| {
            // Its disks are written to from now on. QEMU copies them again.
            host.copies.end(id, None);
            domain::start(connect, id, cluster, check_files)?;
            host.pin(connect, cluster);
            Ok(())
        })
        .await
    }

    async fn pin(&self, places: &BTreeMap<VmId, Vec<NumaPlace>>) -> Result<(), Error> {
        self.host.set_places(places.clone());
        let host = self.host.clone();
        self.on("pin", Kind::Look, None, 30, move |connect, cluster| {
            host.apply_pins(connect, cluster)
        })
        .await
    }

    async fn shutdown(&self, id: VmId) -> Result<(), Error> {
        let acpi = |handle: &virt::domain::Domain| match handle
            .shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        {
            Err(error) if error::is_unsupported(&error) || error::is_invalid_argument(&error) => {
                handle.shutdown()
            }
            other => other,
        };
        self.change("shutdown", id, 30, move |connect, cluster| {
            domain::ask("shutdown", connect, id, cluster, acpi)
        })
        .await
    }

    async fn destroy(&self, id: VmId) -> Result<(), Error> {
        // Not a change like others: it must get through while another call about this domain hangs.
        self.on("destroy", Kind::Urgent, Some(id), 60, move |connect, cluster| {
            domain::destroy(connect, id, cluster)
        })
        .await
    }

    async fn reboot(&self, id: VmId) -> Result<(), Error> {
        let ask = |handle: &virt::domain::Domain| handle.reboot(0);
        self.change("reboot", id, 30, move |connect, cluster| {
            domain::ask("reboot", connect, id, cluster, ask)
        })
        .await
    }

    async fn reset(&self, id: VmId) -> Result<(), Error> {
        self.change("reset", id, 30, move |connect, cluster| {
            domain::ask("reset", connect, id, cluster, virt::domain::Domain::reset)
        })
        .await
    }

    async fn pause(&self, id: VmId) -> Result<(), Error> {
        self.change("pause", id, 30, move |connect, cluster| {
            domain::pause(connect, id, cluster)
        })
        .await
    }

    async fn resume(&self, id: VmId) -> Result<(), Error> {
        self.change("resume", id, 30, move |connect, cluster| {
            domain::resume(connect, id, cluster)
        })
        .await
    }

    async fn undefine(&self, id: VmId) -> Result<(), Error> {
        self.change("undefine", id, 30, move |connect, cluster| {
            domain::undefine(connect, id, cluster)
        })
        .await?;
        self.supervisor.resets().forget(id);
        Ok(())
    }

    async fn usage(&self) -> Result<Vec<(VmId, VmUsage)>, Error> {
        let known = self.known.clone();
        self.on("usage", Kind::Stats, None, 10, move |connect, cluster| {
            let before = known.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (usage, renewed) = stats::collect(connect, cluster, &before)?;
            *known.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
            Ok(usage)
        })
        .await
    }

    fn console_log(&self, id: VmId) -> Option<PathBuf> {
        Some(self.host.console_log(id))
    }

    fn control_socket(&self) -> &Path {
        &self.control_socket
    }

    async fn migrate(&self, migrate: &Migrate) -> Result<Progress, Error> {
        // Fails at once while libvirt is away, and forgets the account of an earlier transfer.
        self.supervisor.links()?;
        let id = migrate.definition.id;
        self.supervisor
            .completed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(other, _)| *other != id);
        let stop = self.supervisor.watch_stop(id);
        let (host, order) = (self.host.clone(), migrate.clone());
        let sending = self.workers.run_long("migrate", Kind::Migrate, move |_| {
            migrate::send(&host.order(&order)?)
        });
        // libvirt ends the source's QEMU when the destination has everything, and takes 200 ms more to say so. One that ends for another reason has let
        // go of nothing: its VM may have gone on after what has arrived.
        let watching = async {
            let name = migrate.definition.name.clone();
            process::ended(name.as_str(), id).await;
            let migrated = tokio::task::spawn_blocking(move || ended::migrated(name.as_str()));
            if migrated.await.unwrap_or(false) {
                if let Some(stopped) = stop.at() {
                    // Set once in a transfer.
                    let _ = migrate.stopped.set(stopped);
                }
                migrate.released.cancel();
            }
            std::future::pending::<std::convert::Infallible>().await
        };
        tokio::select! {
            sent = sending => sent?,
            never = watching => match never {},
        }
        Ok(self.account(id).await.unwrap_or_default())
    }

    async fn progress(&self, id: VmId) -> Result<Option<Progress>, Error> {
        self.on("progress", Kind::Urgent, None, 5, move |connect, _| {
            migrate::progress(connect, id)
        })
        .await
    }

    async fn abort_migration(&self, id: VmId) -> Result<(), Error> {
        self.on("abort_migration", Kind::Urgent, None, 10, move |connect, _| {
            migrate::abort(connect, id)
        })
        .await
    }

    async fn back_up(&self, order: &Order) -> Result<Manifest, Error> {
        const CALL: &str = "back_up";
        let (id, after) = (order.vm, Duration::from_secs(120));
        let until = (Handle::current(), Instant::now() + after);
        let (host, given) = (self.host.clone(), order.clone());
        let begun = self.on(
            CALL,
            Kind::Change,
            Some(id),
            after.as_secs(),
            move |connect, cluster| backup::begin(&host, connect, cluster, &given, (&until.0, until.1)),
        );
        let (host, given) = (self.host.clone(), order.clone());
        let manifest = match begun.await? {
            backup::Next::Wait(begun) => {
                self.copied(id).await?;
                let verify = move |_| backup::finish(&host, *begun);
                self.workers.run_long(CALL, Kind::Files, verify).await?
            }
            backup::Next::Copy(sources) => {
                let copy = move |_| backup::copy(&host, &given, &sources);
                self.workers.run_long(CALL, Kind::Files, copy).await?
            }
        };
        if !manifest.checkpoint {
            // The one before it is as good as it was.
            return Ok(manifest);
        }
        let newest = order.id;
        let dropped = self.change(CALL, id, 60, move |connect, cluster| {
            backup::drop_older(connect, cluster, id, newest)
        });
        if let Err(error) = dropped.await {
            // They cost the guest a little; the next backup drops them.
            tracing::warn!(vm = %id, %error, "older checkpoints could not be dropped");
        }
        Ok(manifest)
    }

    async fn backup_progress(&self, id: VmId) -> Result<Option<(u64, u64)>, Error> {
        let job = self.on("backup_progress", Kind::Urgent, None, 5, move |connect, _| {
            backup::job(connect, id, false)
        });
        Ok(match job.await? {
            backup::Job::Copies(done, total) => Some((done, total)),
            _ => None,
        })
    }

    async fn backup(&self, pool: &str, id: BackupId) -> Result<Option<Manifest>, Error> {
        let (host, pool) = (self.host.clone(), pool.to_owned());
        let after = Duration::from_secs(10);
        let read = move |_| host.storage.manifest(&pool, id);
        self.workers.run("backup", Kind::Files, None, after, read).await
    }

    async fn remove_backup(&self, vm: VmId, pool: &str, id: BackupId) -> Result<(), Error> {
        const CALL: &str = "remove_backup";
        self.change(CALL, vm, 30, move |connect, cluster| {
            backup::undo(connect, cluster, vm, id)
        })
        .await?;
        let (host, pool) = (self.host.clone(), pool.to_owned());
        let after = Duration::from_secs(30);
        let discard = move |_| host.storage.discard(&pool, id);
        self.workers.run(CALL, Kind::Files, None, after, discard).await
    }

    async fn files(&self, pool: &str) -> Result<Vec<PoolFile>, Error> {
        let (host, pool) = (self.host.clone(), pool.to_owned());
        let after = Duration::from_secs(10);
        let list = move |_| host.storage.files(&pool);
        self.workers.run("files", Kind::Files, None, after, list).await
    }
}
