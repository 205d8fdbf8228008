//! The part of the contract that takes two hypervisors: migration. Run like the rest of it.

use std::path::PathBuf;

use dalgu_proto::{
    ids::{MigrationId, VmId},
    vm::PowerReason,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Broken, Fixture, Kept, booted, done, eventually, get, is, must, not_found, present, refused, wrong_state,
};
use crate::hypervisor::{Definition, DomainState, Error, Hypervisor, Migrate, Progress};

/// Two hypervisors and the sockets between them; whoever makes it carries `control` to the destination's
/// [`Hypervisor::control_socket`], and `memory` and `disks` to the same path at the destination.
pub struct Pair<'a> {
    /// Where VMs are made.
    pub source: &'a dyn Hypervisor,
    /// Where they go.
    pub destination: &'a dyn Hypervisor,
    /// Leads to the destination's control socket.
    pub control: PathBuf,
    /// For the memory.
    pub memory: PathBuf,
    /// For disks that are copied.
    pub disks: PathBuf,
    /// What VMs are made of.
    pub fixture: &'a Fixture,
    /// Speed of a transfer slow enough to be interrupted, in MiB per second.
    pub slow_mib_per_second: u32,
}

impl Pair<'_> {
    /// The order to send a VM.
    pub fn order(&self, vm: &Definition) -> Migrate {
        let mut definition = vm.clone();
        definition.mark.epoch = definition.mark.epoch.next();
        Migrate {
            migration: MigrationId::from_uuid(Uuid::new_v4()),
            definition,
            control: self.control.clone(),
            memory: self.memory.clone(),
            disks: self.disks.clone(),
            max_downtime_ms: 100,
            bandwidth_mib_per_second: 0,
            arrives_paused: false,
            stopped: Default::default(),
            released: CancellationToken::new(),
        }
    }

    /// Makes a VM that runs at the source, with room for it at the destination.
    pub async fn make(&self) -> Result<Definition, Broken> {
        let vm = self.fixture.make_running(self.source).await?;
        done(
            "create_volumes at the destination",
            self.destination.create_volumes(&vm, true).await,
        )?;
        booted(self.source, self.fixture, vm.id).await?;
        Ok(vm)
    }

    /// Removes a VM from both.
    pub async fn remove(&self, id: VmId) -> Kept {
        self.fixture.remove(self.source, id).await?;
        self.fixture.remove(self.destination, id).await
    }

    /// The suite for two hypervisors; runs all and returns the broken ones.
    pub async fn check(&self) -> Vec<(&'static str, Broken)> {
        let mut broken = Vec::new();
        let mut note = |rule: &'static str, kept: Kept| {
            if let Err(what) = kept {
                broken.push((rule, what));
            }
        };
        note(
            "a_migrated_vm_runs_at_the_destination_alone",
            self.a_migrated_vm_runs_at_the_destination_alone().await,
        );
        note(
            "a_vm_arrives_paused_when_asked",
            self.a_vm_arrives_paused_when_asked().await,
        );
        note(
            "a_paused_vm_arrives_paused",
            self.a_paused_vm_arrives_paused().await,
        );
        note(
            "a_cancelled_migration_leaves_the_vm",
            self.a_cancelled_migration_leaves_the_vm().await,
        );
        note(
            "a_lost_destination_leaves_the_vm",
            self.a_lost_destination_leaves_the_vm().await,
        );
        note(
            "what_cannot_be_sent_is_refused",
            self.what_cannot_be_sent_is_refused().await,
        );
        broken
    }

    /// It runs there under the new mark, persistent, and is gone here.
    pub async fn a_migrated_vm_runs_at_the_destination_alone(&self) -> Kept {
        let vm = self.make().await?;
        let order = self.order(&vm);
        let result = done("migrate", self.source.migrate(&order).await)?;
        must(result.memory_total_bytes > 0 || result.elapsed_ms > 0, || {
            format!("the result is empty: {result:?}")
        })?;
        must(get(self.source, vm.id).await?.is_none(), || {
            "it is still at the source".into()
        })?;
        let there = present(self.destination, vm.id).await?;
        must(there.state == DomainState::Running && there.persistent, || {
            format!("at the destination: {there:?}")
        })?;
        must(there.reason == PowerReason::Migrated, || {
            format!("it came by {:?}", there.reason)
        })?;
        must(there.mark == Some(order.definition.mark), || {
            format!("it arrived with {:?}", there.mark)
        })?;
        self.remove(vm.id).await
    }

    /// A VM that is to arrive frozen runs nowhere until it is let go on.
    pub async fn a_vm_arrives_paused_when_asked(&self) -> Kept {
        let vm = self.make().await?;
        let mut order = self.order(&vm);
        order.arrives_paused = true;
        done("migrate", self.source.migrate(&order).await)?;
        must(get(self.source, vm.id).await?.is_none(), || {
            "it is still at the source".into()
        })?;
        is(self.destination, vm.id, DomainState::Paused).await?;
        done("resume", self.destination.resume(vm.id).await)?;
        is(self.destination, vm.id, DomainState::Running).await?;
        self.remove(vm.id).await
    }

    /// A frozen VM is not thawed by moving.
    pub async fn a_paused_vm_arrives_paused(&self) -> Kept {
        let vm = self.make().await?;
        done("pause", self.source.pause(vm.id).await)?;
        done("migrate", self.source.migrate(&self.order(&vm)).await)?;
        is(self.destination, vm.id, DomainState::Paused).await?;
        done("resume", self.destination.resume(vm.id).await)?;
        is(self.destination, vm.id, DomainState::Running).await?;
        self.remove(vm.id).await
    }

    /// Starts a slow transfer and does something to it when it is under way; the source must run on by itself and the
    /// destination be clean.
    async fn interrupted(
        &self,
        what: &str,
        act: impl AsyncFnOnce(VmId) -> Kept,
    ) -> Result<Result<Progress, Error>, Broken> {
        let vm = self.make().await?;
        let mut order = self.order(&vm);
        order.bandwidth_mib_per_second = self.slow_mib_per_second;
        let interrupt = async {
            eventually("a transfer under way", self.fixture.patience, async || {
                let there = get(self.destination, vm.id).await?;
                let progress = done("progress", self.source.progress(vm.id).await)?;
                Ok(progress
                    .is_some_and(|progress| progress.memory_total_bytes > 0 || progress.disk_total_bytes > 0)
                    && there.is_some_and(|domain| domain.state == DomainState::Incoming))
            })
            .await?;
            act(vm.id).await
        };
        let (result, interrupted) = tokio::join!(self.source.migrate(&order), interrupt);
        interrupted.map_err(|broken| Broken(format!("{what}: {broken}; migrate said {result:?}")))?;
        eventually("running at the source", self.fixture.patience, async || {
            Ok(present(self.source, vm.id).await?.state == DomainState::Running)
        })
        .await?;
        eventually("nothing at the destination", self.fixture.patience, async || {
            Ok(get(self.destination, vm.id).await?.is_none())
        })
        .await?;
        let progress = done("progress", self.source.progress(vm.id).await)?;
        must(progress.is_none(), || {
            format!("{what}: progress of an ended transfer: {progress:?}")
        })?;
        self.remove(vm.id).await?;
        Ok(result)
    }

    /// After an abort it runs where it was. What the transfer ends with is the abort, or the first stream that it breaks.
    pub async fn a_cancelled_migration_leaves_the_vm(&self) -> Kept {
        let abort = async |id| done("abort_migration", self.source.abort_migration(id).await);
        let result = self.interrupted("abort", abort).await?;
        must(result.is_err(), || {
            format!("it was given up, and migrate says {result:?}")
        })
    }

    /// When the destination's half ends it runs where it was.
    pub async fn a_lost_destination_leaves_the_vm(&self) -> Kept {
        let end = async |id| done("destroy at the destination", self.destination.destroy(id).await);
        let result = self.interrupted("destination's end", end).await?;
        must(result.is_err(), || {
            format!("it never arrived, and migrate says {result:?}")
        })
    }

    /// A VM that is not there, or off, or whose name is taken at the destination.
    pub async fn what_cannot_be_sent_is_refused(&self) -> Kept {
        let nothing = self.fixture.new_vm();
        refused(
            "migrate nothing",
            self.source.migrate(&self.order(&nothing)).await,
            not_found,
        )?;
        let off = self.fixture.make(self.source).await?;
        refused(
            "migrate a stopped VM",
            self.source.migrate(&self.order(&off)).await,
            wrong_state,
        )?;
        let mut other = self.fixture.new_vm();
        other.name = off.name.clone();
        done("define at the destination", self.destination.define(&other).await)?;
        done("start", self.source.start(off.id).await)?;
        done(
            "create_volumes at the destination",
            self.destination.create_volumes(&off, true).await,
        )?;
        let result = self.source.migrate(&self.order(&off)).await;
        must(result.is_err(), || "it arrived beside another of its name".into())?;
        is(self.source, off.id, DomainState::Running).await?;
        done("undefine", self.destination.undefine(other.id).await)?;
        self.remove(off.id).await
    }
}
