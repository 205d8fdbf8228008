//! What every implementation of [`Hypervisor`] must do: one suite, run on the simulated one and on libvirt's test
//! driver by the unit tests, and on real hosts by the lab.
//!
//! Each function is one rule; it makes VMs of its own, leaves none behind when it succeeds, and returns [`Broken`]
//! with what it found otherwise. Waits are for a fact, with a limit.

mod backup;
pub mod change;
mod pair;
mod snapshot;

use std::{collections::BTreeSet, fmt, future::Future, time::Duration};

use dalgu_proto::{
    ids::{ClusterId, Epoch, Generation, VmId},
    image::Digest,
    vm::{
        CloneMode, Disk, DiskFormat, PowerReason, Spec,
        first_boot::{Documents, MEDIUM},
    },
};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

pub use pair::Pair;

use super::{Connection, Definition, Domain, DomainState, Error, Hint, Hypervisor, Mark, files::Of};

/// A rule that an implementation does not keep.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(String);

/// Result of a rule.
pub type Kept = Result<(), Broken>;

impl Broken {
    /// Says what was found instead of what the rule asks.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

fn must(truth: bool, what: impl FnOnce() -> String) -> Kept {
    if truth { Ok(()) } else { Err(Broken(what())) }
}

/// Unwraps a call that must succeed.
fn done<T>(what: &str, result: Result<T, Error>) -> Result<T, Broken> {
    result.map_err(|error| Broken(format!("{what} failed: {error}")))
}

/// What the implementation under test can do, and the VMs to try it with.
#[derive(Debug, Clone)]
pub struct Fixture {
    /// The site the hypervisor works for.
    pub cluster: ClusterId,
    /// What VMs are made of.
    pub spec: Spec,
    /// Documents of its first boot.
    pub documents: Documents,
    /// Whether guests obey a request to shut down.
    pub guests_obey: bool,
    /// Whether disks are real, so that a VM without them cannot start.
    pub has_volumes: bool,
    /// An image that is here, no larger than the first disk, and that disks can be made from.
    pub image: Option<Digest>,
    /// Another pool, that disks can move to.
    pub other_pool: Option<String>,
    /// Whether they can move there while the domain runs.
    pub moves_running: bool,
    /// Whether usage is reported.
    pub has_usage: bool,
    /// Whether a guest runs before it can be asked to shut down; its console log must then contain this.
    pub booted_line: Option<String>,
    /// How long to wait for something that takes a guest's time.
    pub patience: Duration,
}

impl Fixture {
    /// A definition of a new VM.
    pub fn new_vm(&self) -> Definition {
        let id = VmId::from_uuid(Uuid::new_v4());
        let mut spec = self.spec.clone();
        spec.fill_in(id);
        let short = id.uuid().simple().to_string();
        let name = format!("contract-{}", &short[..12])
            .parse()
            .expect("letters, digits and '-'");
        let mark = Mark {
            cluster: self.cluster,
            epoch: Epoch(1),
            generation: Generation(1),
        };
        Definition {
            id,
            name,
            mark,
            spec,
            documents: self.documents.clone(),
            networks: Vec::new(),
            layers: BTreeSet::new(),
            places: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// The suite for one hypervisor, each rule with its name; runs all and returns the broken ones.
    pub async fn check(&self, hypervisor: &dyn Hypervisor) -> Vec<(&'static str, Broken)> {
        let mut broken = Vec::new();
        let mut note = |rule: &'static str, kept: Kept| {
            if let Err(what) = kept {
                broken.push((rule, what));
            }
        };
        note("tells_what_it_is", tells_what_it_is(hypervisor).await);
        note(
            "a_domain_that_is_not_there",
            a_domain_that_is_not_there(hypervisor).await,
        );
        note(
            "a_definition_is_kept_and_renewed",
            a_definition_is_kept_and_renewed(hypervisor, self).await,
        );
        note(
            "a_life_from_start_to_undefine",
            a_life_from_start_to_undefine(hypervisor, self).await,
        );
        note(
            "a_power_off_gets_through_a_call_that_was_given_up",
            a_power_off_gets_through_a_call_that_was_given_up(hypervisor, self).await,
        );
        note(
            "wrong_states_are_refused",
            wrong_states_are_refused(hypervisor, self).await,
        );
        note(
            "another_sites_mark_is_refused",
            another_sites_mark_is_refused(hypervisor, self).await,
        );
        note(
            "a_name_is_given_once",
            a_name_is_given_once(hypervisor, self).await,
        );
        note(
            "a_start_is_hinted_at",
            a_start_is_hinted_at(hypervisor, self).await,
        );
        if self.guests_obey {
            note(
                "an_obedient_guest_shuts_down",
                an_obedient_guest_shuts_down(hypervisor, self).await,
            );
        }
        if self.has_volumes {
            note(
                "disks_are_made_once_and_deleted",
                disks_are_made_once_and_deleted(hypervisor, self).await,
            );
            note(
                "a_running_domain_is_changed",
                change::a_running_domain_is_changed(hypervisor, self).await,
            );
            note(
                "a_disk_grows_while_the_domain_is_off",
                change::a_disk_grows_while_the_domain_is_off(hypervisor, self).await,
            );
            note(
                "layers_come_and_go_while_it_runs",
                snapshot::layers_come_and_go_while_it_runs(hypervisor, self).await,
            );
            note(
                "layers_come_and_go_while_it_is_off",
                snapshot::layers_come_and_go_while_it_is_off(hypervisor, self).await,
            );
            note(
                "a_backup_is_kept_and_a_vm_made_of_it",
                backup::a_backup_is_kept_and_a_vm_made_of_it(hypervisor, self).await,
            );
        }
        for (rule, kept) in self.check_moves(hypervisor).await {
            note(rule, kept);
        }
        if let Some(image) = &self.image {
            note(
                "disks_are_made_from_an_image",
                disks_are_made_from_an_image(hypervisor, self, image).await,
            );
        }
        if self.has_usage {
            note(
                "usage_covers_what_runs",
                usage_covers_what_runs(hypervisor, self).await,
            );
        }
        broken
    }

    /// The rules of disks that move, where there is another pool.
    async fn check_moves(&self, hypervisor: &dyn Hypervisor) -> Vec<(&'static str, Kept)> {
        let Some(pool) = &self.other_pool else {
            return Vec::new();
        };
        let mut rules = vec![
            (
                "a_disk_moves_to_another_pool",
                change::a_disk_moves_to_another_pool(hypervisor, self, pool, false).await,
            ),
            (
                "a_disk_grows_where_it_is",
                change::a_disk_grows_where_it_is(hypervisor, self, pool).await,
            ),
        ];
        if self.moves_running {
            rules.push((
                "a_disk_moves_to_another_pool_while_the_domain_runs",
                change::a_disk_moves_to_another_pool(hypervisor, self, pool, true).await,
            ));
        }
        rules
    }

    async fn make(&self, hypervisor: &dyn Hypervisor) -> Result<Definition, Broken> {
        let vm = self.new_vm();
        if self.has_volumes {
            done("create_volumes", hypervisor.create_volumes(&vm, false).await)?;
        }
        done("define", hypervisor.define(&vm).await)?;
        Ok(vm)
    }

    async fn make_running(&self, hypervisor: &dyn Hypervisor) -> Result<Definition, Broken> {
        let vm = self.make(hypervisor).await?;
        done("start", hypervisor.start(vm.id).await)?;
        Ok(vm)
    }

    async fn remove(&self, hypervisor: &dyn Hypervisor, id: VmId) -> Kept {
        done("destroy", hypervisor.destroy(id).await)?;
        done("undefine", hypervisor.undefine(id).await)?;
        if self.has_volumes {
            done("delete_volumes", hypervisor.delete_volumes(id, false).await)?;
        }
        must(get(hypervisor, id).await?.is_none(), || {
            format!("{id} is still there after undefine")
        })
    }
}

async fn get(hypervisor: &dyn Hypervisor, id: VmId) -> Result<Option<Domain>, Broken> {
    done("get", hypervisor.get(id).await)
}

async fn present(hypervisor: &dyn Hypervisor, id: VmId) -> Result<Domain, Broken> {
    get(hypervisor, id)
        .await?
        .ok_or_else(|| Broken(format!("{id} is not there")))
}

/// That pools hold the files of a VM's disks with these layers, or nothing of it, and that these are what they are told to be.
async fn has_files(hypervisor: &dyn Hypervisor, vm: &Definition, layers: &[u32], there: bool) -> Kept {
    let pools: BTreeSet<_> = vm.spec.volumes().map(|disk| disk.pool.as_str()).collect();
    for pool in pools {
        let files = done("files", hypervisor.files(pool).await)?;
        let mine = files.into_iter().filter_map(|file| match file.of {
            Of::Disk { vm: of, disk, layer } if of == vm.id => Some((disk, layer, file.partial)),
            _ => None,
        });
        let found: BTreeSet<_> = mine.collect();
        let here = vm.spec.volumes().filter(|disk| there && disk.pool == pool);
        let numbers = || [None].into_iter().chain(layers.iter().copied().map(Some));
        // The volume of the first boot has no layers.
        let parts = |disk: &Disk| numbers().take(if disk.name == MEDIUM { 1 } else { usize::MAX });
        let wanted: BTreeSet<_> = here
            .flat_map(|disk| parts(disk).map(|layer| (disk.name.clone(), layer, false)))
            .collect();
        must(found == wanted, || {
            format!("pool {pool} is told to hold {found:?}, should hold {wanted:?}")
        })?;
    }
    Ok(())
}

/// Waits until a fact is so.
pub async fn eventually<F, W>(what: &str, limit: Duration, mut fact: F) -> Kept
where
    F: FnMut() -> W,
    W: Future<Output = Result<bool, Broken>>,
{
    let deadline = Instant::now() + limit;
    while !fact().await? {
        must(Instant::now() < deadline, || {
            format!("{what}: not so after {limit:?}")
        })?;
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn is(hypervisor: &dyn Hypervisor, id: VmId, state: DomainState) -> Kept {
    let found = present(hypervisor, id).await?.state;
    must(found == state, || {
        format!("{id} is {found:?}, should be {state:?}")
    })
}

fn refused<T: fmt::Debug>(what: &str, result: Result<T, Error>, expected: fn(&Error) -> bool) -> Kept {
    match result {
        Err(error) if expected(&error) => Ok(()),
        other => Err(Broken(format!("{what}: {other:?}"))),
    }
}

fn not_found(error: &Error) -> bool {
    matches!(error, Error::NotFound { .. })
}

fn wrong_state(error: &Error) -> bool {
    matches!(error, Error::WrongState { .. })
}

fn foreign(error: &Error) -> bool {
    matches!(error, Error::Foreign { .. })
}

/// It answers, says that it does, and has a name.
pub async fn tells_what_it_is(hypervisor: &dyn Hypervisor) -> Kept {
    let about = done("about", hypervisor.about().await)?;
    must(
        !about.version.is_empty() && !about.accelerator_reason.is_empty(),
        || format!("says too little: {about:?}"),
    )?;
    let connection = hypervisor.connection().borrow().clone();
    must(connection == Connection::Up, || {
        format!("it answers and says {connection:?}")
    })
}

/// Calls about a domain that is not there say so; those whose aim is reached by that are done.
pub async fn a_domain_that_is_not_there(hypervisor: &dyn Hypervisor) -> Kept {
    let id = VmId::from_uuid(Uuid::new_v4());
    must(get(hypervisor, id).await?.is_none(), || {
        "get invents a domain".into()
    })?;
    refused("start", hypervisor.start(id).await, not_found)?;
    refused("shutdown", hypervisor.shutdown(id).await, not_found)?;
    refused("reboot", hypervisor.reboot(id).await, not_found)?;
    refused("reset", hypervisor.reset(id).await, not_found)?;
    refused("pause", hypervisor.pause(id).await, not_found)?;
    refused("resume", hypervisor.resume(id).await, not_found)?;
    done("destroy", hypervisor.destroy(id).await)?;
    done("undefine", hypervisor.undefine(id).await)?;
    done("delete_volumes", hypervisor.delete_volumes(id, false).await)?;
    done("abort_migration", hypervisor.abort_migration(id).await)?;
    let progress = done("progress", hypervisor.progress(id).await)?;
    must(progress.is_none(), || {
        format!("progress of nothing: {progress:?}")
    })
}

/// A definition is there with its mark, off, in the list too; a newer one takes its place, off or running.
pub async fn a_definition_is_kept_and_renewed(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let mut vm = fixture.make(hypervisor).await?;
    let domain = present(hypervisor, vm.id).await?;
    must(
        domain.mark == Some(vm.mark) && domain.name == vm.name.as_str(),
        || format!("defined {vm:?}, found {domain:?}"),
    )?;
    must(domain.state == DomainState::Stopped && domain.persistent, || {
        format!("a new domain is {domain:?}")
    })?;
    let size = (domain.vcpus, domain.memory_mib);
    must(size == (vm.spec.vcpus, vm.spec.memory_mib), || {
        format!("it has {size:?} processors and MiB")
    })?;
    let listed = done("list", hypervisor.list().await)?;
    must(
        listed.iter().filter(|other| **other == domain).count() == 1,
        || "the list does not hold it once".into(),
    )?;
    vm.mark.generation = vm.mark.generation.next();
    done("define again", hypervisor.define(&vm).await)?;
    let found = present(hypervisor, vm.id).await?.mark;
    must(found == Some(vm.mark), || {
        format!("defined anew with {:?}, found {found:?}", vm.mark)
    })?;
    done("start", hypervisor.start(vm.id).await)?;
    vm.mark.epoch = vm.mark.epoch.next();
    done("define while it runs", hypervisor.define(&vm).await)?;
    let domain = present(hypervisor, vm.id).await?;
    must(domain.mark == Some(vm.mark), || {
        format!(
            "defined while running with {:?}, found {:?}",
            vm.mark, domain.mark
        )
    })?;
    must(domain.state == DomainState::Running, || {
        format!("defining it anew left it {:?}", domain.state)
    })?;
    fixture.remove(hypervisor, vm.id).await
}

/// Start, pause, resume, reset, destroy, each twice: the second is done already.
pub async fn a_life_from_start_to_undefine(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = fixture.make(hypervisor).await?;
    for _ in 0..2 {
        done("start", hypervisor.start(vm.id).await)?;
        is(hypervisor, vm.id, DomainState::Running).await?;
    }
    for _ in 0..2 {
        done("pause", hypervisor.pause(vm.id).await)?;
        is(hypervisor, vm.id, DomainState::Paused).await?;
    }
    for _ in 0..2 {
        done("resume", hypervisor.resume(vm.id).await)?;
        is(hypervisor, vm.id, DomainState::Running).await?;
    }
    done("reset", hypervisor.reset(vm.id).await)?;
    done("reboot", hypervisor.reboot(vm.id).await)?;
    eventually("running after a reboot", fixture.patience, async || {
        Ok(present(hypervisor, vm.id).await?.state == DomainState::Running)
    })
    .await?;
    for _ in 0..2 {
        done("destroy", hypervisor.destroy(vm.id).await)?;
        is(hypervisor, vm.id, DomainState::Stopped).await?;
    }
    let reason = present(hypervisor, vm.id).await?.reason;
    must(reason == PowerReason::External, || {
        format!("powered off, and the reason is {reason:?}")
    })?;
    fixture.remove(hypervisor, vm.id).await?;
    done("undefine again", hypervisor.undefine(vm.id).await)
}

/// A caller may give a call up by dropping it. Powering off gets through all the same, and what is left of the call is at its
/// end when [`Hypervisor::changing`] says so.
pub async fn a_power_off_gets_through_a_call_that_was_given_up(
    hypervisor: &dyn Hypervisor,
    fixture: &Fixture,
) -> Kept {
    let vm = fixture.make_running(hypervisor).await?;
    let ended = async || {
        eventually("the end of what was given up", fixture.patience, async || {
            Ok(!hypervisor.changing(vm.id))
        })
        .await
    };
    // Begun, and dropped at once; it may have ended by then.
    let _ = timeout(Duration::ZERO, hypervisor.pause(vm.id)).await;
    done("destroy", hypervisor.destroy(vm.id).await)?;
    ended().await?;
    is(hypervisor, vm.id, DomainState::Stopped).await?;
    let _ = timeout(Duration::ZERO, hypervisor.start(vm.id)).await;
    done("destroy while it starts", hypervisor.destroy(vm.id).await)?;
    ended().await?;
    // The start may have taken effect after that; now nothing is left that could.
    done("destroy", hypervisor.destroy(vm.id).await)?;
    is(hypervisor, vm.id, DomainState::Stopped).await?;
    fixture.remove(hypervisor, vm.id).await
}

/// What makes no sense in a state is refused and changes nothing.
pub async fn wrong_states_are_refused(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = fixture.make(hypervisor).await?;
    refused("pause while off", hypervisor.pause(vm.id).await, wrong_state)?;
    refused("resume while off", hypervisor.resume(vm.id).await, wrong_state)?;
    refused(
        "shutdown while off",
        hypervisor.shutdown(vm.id).await,
        wrong_state,
    )?;
    refused("reboot while off", hypervisor.reboot(vm.id).await, wrong_state)?;
    refused("reset while off", hypervisor.reset(vm.id).await, wrong_state)?;
    done("start", hypervisor.start(vm.id).await)?;
    refused(
        "undefine while it runs",
        hypervisor.undefine(vm.id).await,
        wrong_state,
    )?;
    is(hypervisor, vm.id, DomainState::Running).await?;
    done("pause", hypervisor.pause(vm.id).await)?;
    refused("start while paused", hypervisor.start(vm.id).await, wrong_state)?;
    is(hypervisor, vm.id, DomainState::Paused).await?;
    fixture.remove(hypervisor, vm.id).await
}

/// A definition that bears another site's mark is refused.
pub async fn another_sites_mark_is_refused(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let mut vm = fixture.new_vm();
    vm.mark.cluster = ClusterId::from_uuid(Uuid::new_v4());
    refused(
        "define with another site's mark",
        hypervisor.define(&vm).await,
        |error| matches!(error, Error::Foreign { .. } | Error::Invalid { .. }),
    )?;
    must(get(hypervisor, vm.id).await?.is_none(), || {
        "a refused definition left a domain".into()
    })
}

/// A domain that somebody else made is listed, and every call that would change it is refused.
pub async fn a_foreign_domain_is_not_touched(
    hypervisor: &dyn Hypervisor,
    fixture: &Fixture,
    id: VmId,
) -> Kept {
    let before = present(hypervisor, id).await?;
    must(before.mark.is_none(), || {
        format!("a foreign domain has the mark {:?}", before.mark)
    })?;
    let mut vm = fixture.new_vm();
    vm.id = id;
    refused("define", hypervisor.define(&vm).await, foreign)?;
    refused("start", hypervisor.start(id).await, foreign)?;
    refused("shutdown", hypervisor.shutdown(id).await, foreign)?;
    refused("destroy", hypervisor.destroy(id).await, foreign)?;
    refused("reboot", hypervisor.reboot(id).await, foreign)?;
    refused("reset", hypervisor.reset(id).await, foreign)?;
    refused("pause", hypervisor.pause(id).await, foreign)?;
    refused("resume", hypervisor.resume(id).await, foreign)?;
    refused("undefine", hypervisor.undefine(id).await, foreign)?;
    let usage = done("usage", hypervisor.usage().await)?;
    must(usage.iter().all(|(other, _)| *other != id), || {
        "a foreign domain's usage is reported".into()
    })?;
    let after = present(hypervisor, id).await?;
    must(after == before, || format!("it was {before:?} and is {after:?}"))
}

/// A second domain of the same name is refused, and the first stays.
pub async fn a_name_is_given_once(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let first = fixture.make(hypervisor).await?;
    let mut second = fixture.new_vm();
    second.name = first.name.clone();
    refused(
        "define with a taken name",
        hypervisor.define(&second).await,
        foreign,
    )?;
    must(get(hypervisor, second.id).await?.is_none(), || {
        "a refused definition left a domain".into()
    })?;
    fixture.remove(hypervisor, first.id).await
}

/// Whoever listens is told to look.
pub async fn a_start_is_hinted_at(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = fixture.make(hypervisor).await?;
    let mut hints = hypervisor.hints();
    done("start", hypervisor.start(vm.id).await)?;
    let heard = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            match hints.recv().await {
                Ok(Hint::Domain(id)) if id != vm.id => {}
                other => return other.is_ok(),
            }
        }
    })
    .await;
    must(heard == Ok(true), || "no hint within 5 s".into())?;
    fixture.remove(hypervisor, vm.id).await
}

/// A guest that obeys is off soon after it was asked, and says that it did it itself.
pub async fn an_obedient_guest_shuts_down(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = fixture.make_running(hypervisor).await?;
    booted(hypervisor, fixture, vm.id).await?;
    done("shutdown", hypervisor.shutdown(vm.id).await)?;
    eventually("off after a request", fixture.patience, async || {
        Ok(present(hypervisor, vm.id).await?.state == DomainState::Stopped)
    })
    .await?;
    let reason = present(hypervisor, vm.id).await?.reason;
    must(reason == PowerReason::GuestShutdown, || {
        format!("it shut down by itself, and the reason is {reason:?}")
    })?;
    fixture.remove(hypervisor, vm.id).await
}

/// Waits until a guest is up, where that can be seen.
pub async fn booted(hypervisor: &dyn Hypervisor, fixture: &Fixture, id: VmId) -> Kept {
    let Some(line) = &fixture.booted_line else {
        return Ok(());
    };
    let log = hypervisor
        .console_log(id)
        .ok_or_else(|| Broken("there is no console log to see it in".into()))?;
    eventually("the guest's first line", fixture.patience, async || {
        Ok(tokio::fs::read(&log)
            .await
            .is_ok_and(|text| String::from_utf8_lossy(&text).contains(line.as_str())))
    })
    .await
}

/// Disks are made once, needed to start, and gone when deleted.
pub async fn disks_are_made_once_and_deleted(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = fixture.new_vm();
    if vm.spec.disks.is_empty() {
        return Ok(());
    }
    done("define without disks", hypervisor.define(&vm).await)?;
    let missing = |error: &Error| matches!(error, Error::Missing { .. });
    refused("start without disks", hypervisor.start(vm.id).await, missing)?;
    for _ in 0..2 {
        done("create_volumes", hypervisor.create_volumes(&vm, false).await)?;
    }
    has_files(hypervisor, &vm, &[], true).await?;
    done("start with disks", hypervisor.start(vm.id).await)?;
    done("destroy", hypervisor.destroy(vm.id).await)?;
    for _ in 0..2 {
        done("delete_volumes", hypervisor.delete_volumes(vm.id, false).await)?;
    }
    has_files(hypervisor, &vm, &[], false).await?;
    refused(
        "start after they are deleted",
        hypervisor.start(vm.id).await,
        missing,
    )?;
    fixture.remove(hypervisor, vm.id).await
}

/// Disks that are overlays on an image, and copies of it, are made once, and start; those of a VM that comes are made too.
pub async fn disks_are_made_from_an_image(
    hypervisor: &dyn Hypervisor,
    fixture: &Fixture,
    image: &Digest,
) -> Kept {
    let (mut vm, mut coming) = (fixture.new_vm(), fixture.new_vm());
    let Some(first) = vm.spec.disks.first().cloned() else {
        return Ok(());
    };
    let from = |name: &str, format, clone_mode| Disk {
        name: name.to_owned(),
        format,
        image: Some("contract:1".to_owned()),
        digest: Some(image.clone()),
        clone_mode,
        volume: None,
        limits: Default::default(),
        backup: None,
        ..first.clone()
    };
    let disks = vec![
        from("overlay", DiskFormat::Qcow2, CloneMode::Overlay),
        from("copy", DiskFormat::Raw, CloneMode::Full),
    ];
    vm.spec.disks.clone_from(&disks);
    coming.spec.disks = disks;
    for _ in 0..2 {
        done("create_volumes", hypervisor.create_volumes(&vm, false).await)?;
        done("create_volumes", hypervisor.create_volumes(&coming, true).await)?;
    }
    done("define", hypervisor.define(&vm).await)?;
    done("start", hypervisor.start(vm.id).await)?;
    is(hypervisor, vm.id, DomainState::Running).await?;
    done(
        "delete_volumes",
        hypervisor.delete_volumes(coming.id, false).await,
    )?;
    fixture.remove(hypervisor, vm.id).await
}

/// Usage is of what runs, named as in the specification, and its counters do not go back.
pub async fn usage_covers_what_runs(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let off = fixture.make(hypervisor).await?;
    let vm = fixture.make_running(hypervisor).await?;
    sleep(Duration::from_millis(500)).await;
    let first = done("usage", hypervisor.usage().await)?;
    must(first.iter().all(|(id, _)| *id != off.id), || {
        "a stopped domain's usage is reported".into()
    })?;
    let of = |usage: &[(VmId, dalgu_proto::host::VmUsage)]| {
        usage
            .iter()
            .find(|(id, _)| *id == vm.id)
            .map(|(_, usage)| usage.clone())
    };
    let first = of(&first).ok_or_else(|| Broken("a running domain's usage is not reported".into()))?;
    let disks: Vec<_> = first.blocks.iter().map(|block| block.name.as_str()).collect();
    must(
        disks
            == vm
                .spec
                .volumes()
                .map(|disk| disk.name.as_str())
                .collect::<Vec<_>>(),
        || format!("disks {disks:?}"),
    )?;
    let nics: Vec<_> = first.nics.iter().map(|nic| nic.name.as_str()).collect();
    must(
        nics == vm
            .spec
            .nics
            .iter()
            .map(|nic| nic.name.as_str())
            .collect::<Vec<_>>(),
        || format!("interfaces {nics:?}"),
    )?;
    sleep(Duration::from_millis(500)).await;
    let second = of(&done("usage", hypervisor.usage().await)?);
    let second = second.ok_or_else(|| Broken("the second usage lacks it".into()))?;
    must(second.cpu_seconds_total > first.cpu_seconds_total, || {
        format!(
            "processor time went from {} to {}",
            first.cpu_seconds_total, second.cpu_seconds_total
        )
    })?;
    must(second.memory_resident_bytes > 0, || "it takes no memory".into())?;
    fixture.remove(hypervisor, vm.id).await?;
    fixture.remove(hypervisor, off.id).await
}
