//! Rules of changes of a domain that is there.

use dalgu_proto::vm::{Disk, DiskLimits};

use super::{
    Broken, Definition, DomainState, Error, Fixture, Hypervisor, Kept, VmId, booted, done, eventually, is,
    must, refused, wrong_state,
};
use crate::hypervisor::{Change, Hardware};

/// Size of the disk that is added, in MiB.
const SIZE_MIB: u64 = 32;

async fn hardware(hypervisor: &dyn Hypervisor, id: VmId) -> Result<Hardware, Broken> {
    done("hardware", hypervisor.hardware(id).await)?.ok_or_else(|| Broken(format!("{id} has none")))
}

fn size(hardware: &Hardware, disk: &str) -> Option<u64> {
    hardware.disks.get(disk).map(|disk| disk.size_mib)
}

async fn change(hypervisor: &dyn Hypervisor, vm: &Definition, change: Change) -> Kept {
    let what = format!("{change:?}");
    done(&what, hypervisor.change_hardware(vm, &change).await)
}

/// The same VM with one disk more.
fn with_another_disk(vm: &Definition, size_mib: u64) -> Result<Definition, Broken> {
    let mut more = vm.clone();
    let first = vm.spec.disks.first().ok_or_else(|| Broken("no disk".into()))?;
    more.spec.disks.push(Disk {
        name: "added".into(),
        size_mib,
        ..first.clone()
    });
    Ok(more)
}

/// A running domain gets processors, a disk and its growth, each once however often it is asked for; a disk is deleted only
/// when the domain has let go of it.
pub async fn a_running_domain_is_changed(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let mut vm = fixture.new_vm();
    if vm.spec.disks.is_empty() {
        return Ok(());
    }
    vm.spec.max_vcpus = Some(vm.spec.vcpus + 1);
    done("create_volumes", hypervisor.create_volumes(&vm, false).await)?;
    done("define", hypervisor.define(&vm).await)?;
    done("start", hypervisor.start(vm.id).await)?;
    booted(hypervisor, fixture, vm.id).await?;
    let has = hardware(hypervisor, vm.id).await?;
    let expected = Hardware {
        // What can be taken away again, and what of memory, is the implementation's business.
        min_vcpus: has.min_vcpus,
        hot_memory: has.hot_memory,
        ..Hardware::of(&vm.spec)
    };
    must(has == expected, || {
        format!("it has {has:?}, should have {expected:?}")
    })?;

    change(hypervisor, &vm, Change::Vcpus(vm.spec.vcpus + 1)).await?;
    let has = hardware(hypervisor, vm.id).await?;
    must(has.vcpus == vm.spec.vcpus + 1, || format!("processors: {has:?}"))?;

    let more = with_another_disk(&vm, SIZE_MIB)?;
    let missing = |error: &Error| !error.outcome_unknown();
    let attach = Change::AttachDisk("added".into());
    refused(
        "a disk without its volume",
        hypervisor.change_hardware(&more, &attach).await,
        missing,
    )?;
    done("create_volumes", hypervisor.create_volumes(&more, false).await)?;
    for _ in 0..2 {
        change(hypervisor, &more, attach.clone()).await?;
    }
    let has = hardware(hypervisor, vm.id).await?;
    must(size(&has, "added") == Some(SIZE_MIB), || {
        format!("disks: {has:?}")
    })?;
    must(has.free_ports + 1 == expected.free_ports, || {
        format!("ports: {has:?}")
    })?;

    let larger = with_another_disk(&vm, SIZE_MIB * 2)?;
    for _ in 0..2 {
        change(hypervisor, &larger, Change::GrowDisk("added".into())).await?;
    }
    let has = hardware(hypervisor, vm.id).await?;
    must(size(&has, "added") == Some(SIZE_MIB * 2), || {
        format!("growth: {has:?}")
    })?;
    are_limited(hypervisor, &larger).await?;
    lets_go(hypervisor, fixture, &larger).await?;
    done("destroy", hypervisor.destroy(vm.id).await)?;
    refused(
        "a change of a domain that is off",
        hypervisor.change_hardware(&vm, &Change::Vcpus(1)).await,
        |error| matches!(error, Error::WrongState { .. }),
    )?;
    fixture.remove(hypervisor, vm.id).await
}

async fn lets_go(hypervisor: &dyn Hypervisor, fixture: &Fixture, vm: &Definition) -> Kept {
    let disk = vm.spec.disks.last().ok_or_else(|| Broken("no disk".into()))?;
    refused(
        "deletion of a disk in use",
        hypervisor.delete_volume(vm.id, disk).await,
        |error| matches!(error, Error::WrongState { .. }),
    )?;
    change(hypervisor, vm, Change::DetachDisk(disk.name.clone())).await?;
    eventually("the guest lets go of its disk", fixture.patience, async || {
        Ok(!hardware(hypervisor, vm.id).await?.disks.contains_key(&disk.name))
    })
    .await?;
    for _ in 0..2 {
        done("delete_volume", hypervisor.delete_volume(vm.id, disk).await)?;
    }
    Ok(())
}

/// The disks of a domain that is off grow as files.
pub async fn a_disk_grows_while_the_domain_is_off(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let vm = fixture.make(hypervisor).await?;
    let Some(disk) = vm.spec.disks.first() else {
        return fixture.remove(hypervisor, vm.id).await;
    };
    let (name, size_mib) = (disk.name.clone(), disk.size_mib + 8);
    let mut larger = vm.clone();
    larger.spec.disks[0].size_mib = size_mib;
    for _ in 0..2 {
        change(hypervisor, &larger, Change::GrowDisk(name.clone())).await?;
    }
    let has = hardware(hypervisor, vm.id).await?;
    must(size(&has, &name) == Some(size_mib), || format!("growth: {has:?}"))?;
    done("start", hypervisor.start(vm.id).await)?;
    fixture.remove(hypervisor, vm.id).await
}

/// A disk that is not in the pool that it is to be in, as after a move that has failed, grows where it is; what there is of it in the other
/// pool stays as it is.
pub async fn a_disk_grows_where_it_is(hypervisor: &dyn Hypervisor, fixture: &Fixture, pool: &str) -> Kept {
    let vm = fixture.new_vm();
    let mut there = vm.clone();
    there.spec.disks[0].pool = pool.to_owned();
    for places in [&vm, &there] {
        done("create_volumes", hypervisor.create_volumes(places, false).await)?;
    }
    done("define", hypervisor.define(&vm).await)?;
    let (name, size_mib) = (vm.spec.disks[0].name.clone(), vm.spec.disks[0].size_mib + 8);
    let mut larger = there.clone();
    larger.spec.disks[0].size_mib = size_mib;
    change(hypervisor, &larger, Change::GrowDisk(name.clone())).await?;
    let has = hardware(hypervisor, vm.id).await?;
    let grown = has.disks.get(&name).filter(|disk| disk.size_mib == size_mib);
    must(
        grown.is_some_and(|disk| disk.is_in(&vm.spec.disks[0].pool)),
        || format!("growth: {has:?}"),
    )?;
    done("undefine", hypervisor.undefine(vm.id).await)?;
    done("define", hypervisor.define(&there).await)?;
    let has = hardware(hypervisor, vm.id).await?;
    must(size(&has, &name) == Some(there.spec.disks[0].size_mib), || {
        format!("the other one: {has:?}")
    })?;
    fixture.remove(hypervisor, vm.id).await
}

/// Limits are set, and lifted, while it runs.
async fn are_limited(hypervisor: &dyn Hypervisor, vm: &Definition) -> Kept {
    let mut limited = vm.clone();
    let disk = limited.spec.disks.last_mut();
    let disk = disk.ok_or_else(|| Broken("no disk".into()))?;
    disk.limits = DiskLimits {
        read_iops: Some(500),
        write_mib_per_second: Some(20),
        ..DiskLimits::default()
    };
    let (name, limits) = (disk.name.clone(), disk.limits);
    for (vm, wanted) in [(&limited, limits), (vm, DiskLimits::default())] {
        change(hypervisor, vm, Change::LimitDisk(name.clone())).await?;
        let has = hardware(hypervisor, vm.id).await?;
        let found = has.disks.get(&name).map(|disk| disk.limits);
        must(found == Some(wanted), || format!("limits: {has:?}"))?;
    }
    Ok(())
}

/// A disk goes to another pool, while the domain runs and while it is off: until it is there the domain keeps it in the old one, however
/// often it is defined; afterwards the old file can be deleted, and no sooner. A copy that is not wanted any more ends.
pub async fn a_disk_moves_to_another_pool(
    hypervisor: &dyn Hypervisor,
    fixture: &Fixture,
    pool: &str,
    runs: bool,
) -> Kept {
    let vm = match runs {
        true => fixture.make_running(hypervisor).await?,
        false => fixture.make(hypervisor).await?,
    };
    let first = vm.spec.disks.first().ok_or_else(|| Broken("no disk".into()))?;
    let (name, move_it) = (first.name.clone(), Change::MoveDisk(first.name.clone()));
    let mut there = vm.clone();
    there.spec.disks[0].pool = pool.to_owned();
    done("define", hypervisor.define(&there).await)?;
    let attached = async || {
        let has = hardware(hypervisor, vm.id).await?;
        has.disks
            .get(&name)
            .cloned()
            .ok_or_else(|| Broken(format!("{name} is gone")))
    };
    let has = attached().await?;
    must(has.pool.as_ref() == Some(&first.pool), || {
        format!("a definition moved it: {has:?}")
    })?;
    // It is begun, given up, and begun again.
    change(hypervisor, &there, move_it.clone()).await?;
    must(attached().await?.copy.is_some(), || "nothing is copied".into())?;
    eventually("the copy is given up", fixture.patience, async || {
        change(hypervisor, &vm, move_it.clone()).await?;
        Ok(attached().await?.copy.is_none())
    })
    .await?;
    done(
        "delete_volume",
        hypervisor.delete_volume(vm.id, &there.spec.disks[0]).await,
    )?;
    change(hypervisor, &there, move_it.clone()).await?;
    refused(
        "deletion of a disk that is copied",
        hypervisor.delete_volume(vm.id, first).await,
        wrong_state,
    )?;
    eventually("the disk has moved", fixture.patience, async || {
        change(hypervisor, &there, move_it.clone()).await?;
        let has = attached().await?;
        Ok(has.pool.as_deref() == Some(pool) && has.copy.is_none())
    })
    .await?;
    done("define", hypervisor.define(&there).await)?;
    done("delete_volume", hypervisor.delete_volume(vm.id, first).await)?;
    let has = attached().await?;
    must(
        has.pool.as_deref() == Some(pool) && has.size_mib == first.size_mib,
        || format!("it has {has:?}"),
    )?;
    if runs {
        is(hypervisor, vm.id, DomainState::Running).await?;
        done("destroy", hypervisor.destroy(vm.id).await)?;
    }
    // It starts with what it has there.
    done("start", hypervisor.start(vm.id).await)?;
    fixture.remove(hypervisor, vm.id).await
}
