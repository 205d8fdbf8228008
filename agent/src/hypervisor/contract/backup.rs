//! Rules of backups, and of disks that are made from them.

use dalgu_proto::{
    ids::BackupId,
    vm::{BackupRef, CloneMode, DiskFormat},
};
use uuid::Uuid;

use super::{Broken, Definition, Error, Fixture, Hypervisor, Kept, booted, done, must, refused};
use crate::hypervisor::{
    backup::{Kind, Manifest, Order, Wanted},
    files::{Of, PoolFile},
};

fn order(vm: &Definition, wanted: Wanted, parent: Option<BackupId>) -> Result<Order, Broken> {
    let first = vm.spec.disks.first().ok_or_else(|| Broken("no disk".into()))?;
    Ok(Order {
        id: BackupId::from_uuid(Uuid::new_v4()),
        vm: vm.id,
        name: vm.name.clone(),
        spec: vm.spec.clone(),
        pool: first.pool.clone(),
        wanted,
        parent,
    })
}

async fn taken(hypervisor: &dyn Hypervisor, order: &Order) -> Result<Manifest, Broken> {
    let taken = done("back_up", hypervisor.back_up(order).await)?;
    let kept = done("backup", hypervisor.backup(&order.pool, order.id).await)?;
    let there = done("files", hypervisor.files(&order.pool).await)?;
    for file in &taken.files {
        let path = format!("backups/{}/{}", order.id, file.file);
        let is_it = |one: &PoolFile| {
            (&one.path, &one.of, one.size_bytes) == (&path, &Of::Backup(order.id), file.size_bytes)
        };
        must(there.iter().any(is_it), || format!("{path} is not in {there:?}"))?;
    }
    must(kept.as_ref() == Some(&taken), || {
        format!("what was taken is {taken:?}, what is kept {kept:?}")
    })?;
    must(taken.files.len() == order.spec.disks.len(), || {
        format!("files: {:?}", taken.files)
    })?;
    Ok(taken)
}

/// A VM whose disks can all remember what has changed.
fn new_vm(fixture: &Fixture) -> Definition {
    let mut vm = fixture.new_vm();
    vm.spec.disks.retain(|disk| disk.format == DiskFormat::Qcow2);
    vm
}

/// The same VM anew, its disks made from a backup.
fn restored(fixture: &Fixture, of: &Order) -> Definition {
    let mut vm = new_vm(fixture);
    for disk in &mut vm.spec.disks {
        disk.image = None;
        disk.digest = None;
        disk.clone_mode = CloneMode::Any;
        disk.backup = Some(BackupRef {
            id: of.id,
            pool: of.pool.clone(),
            disk: disk.name.clone(),
        });
    }
    vm
}

/// A backup is everything, or what has changed since another; a VM can be made of it, as long as what it needs is there.
pub async fn a_backup_is_kept_and_a_vm_made_of_it(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = new_vm(fixture);
    if vm.spec.disks.is_empty() {
        return Ok(());
    }
    done("create_volumes", hypervisor.create_volumes(&vm, false).await)?;
    done("define", hypervisor.define(&vm).await)?;
    done("start", hypervisor.start(vm.id).await)?;
    booted(hypervisor, fixture, vm.id).await?;

    let nothing = |error: &Error| matches!(error, Error::NoCheckpoint { .. });
    let early = order(&vm, Wanted::Incremental, None)?;
    refused(
        "an incremental one of nothing",
        hypervisor.back_up(&early).await,
        nothing,
    )?;
    let first = order(&vm, Wanted::Auto, None)?;
    let full = taken(hypervisor, &first).await?;
    must(full.kind == Kind::Full && full.full_reason.is_some(), || {
        format!("the first: {full:?}")
    })?;
    must(full.checkpoint, || "the first has no checkpoint".to_owned())?;
    let second = order(&vm, Wanted::Incremental, Some(first.id))?;
    let next = taken(hypervisor, &second).await?;
    must(next.kind == Kind::Incremental { parent: first.id }, || {
        format!("the second: {next:?}")
    })?;
    // Only the newest is to be begun from.
    let old = order(&vm, Wanted::Incremental, Some(first.id))?;
    refused("one of what was dropped", hypervisor.back_up(&old).await, nothing)?;
    let progress = done("backup_progress", hypervisor.backup_progress(vm.id).await)?;
    must(progress.is_none(), || format!("it goes on: {progress:?}"))?;

    let copy = restored(fixture, &second);
    done(
        "create_volumes from a backup",
        hypervisor.create_volumes(&copy, false).await,
    )?;
    done("define", hypervisor.define(&copy).await)?;
    done("start", hypervisor.start(copy.id).await)?;
    booted(hypervisor, fixture, copy.id).await?;
    for vm in [&copy, &vm] {
        done("destroy", hypervisor.destroy(vm.id).await)?;
    }

    let off = order(&vm, Wanted::Auto, Some(second.id))?;
    let third = taken(hypervisor, &off).await?;
    let nobody_froze = third.kind == Kind::Full && !third.checkpoint && !third.quiesced;
    must(nobody_froze, || format!("of a VM that is off: {third:?}"))?;
    // Those that need others go first.
    for gone in [&early, &second, &first, &old, &off] {
        for _ in 0..2 {
            let removed = hypervisor.remove_backup(vm.id, &gone.pool, gone.id).await;
            done("remove_backup", removed)?;
        }
        let left = done("backup", hypervisor.backup(&gone.pool, gone.id).await)?;
        must(left.is_none(), || format!("it is still there: {left:?}"))?;
    }
    let late = restored(fixture, &second);
    refused(
        "a disk of a backup that is gone",
        hypervisor.create_volumes(&late, false).await,
        |error| matches!(error, Error::Missing { .. }),
    )?;
    for vm in [&copy, &vm, &late] {
        done("undefine", hypervisor.undefine(vm.id).await)?;
        done("delete_volumes", hypervisor.delete_volumes(vm.id, false).await)?;
    }
    Ok(())
}
