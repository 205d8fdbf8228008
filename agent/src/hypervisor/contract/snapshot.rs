//! Rules of the layers of a domain's disks.

use std::collections::BTreeSet;

use super::{
    Broken, Definition, DomainState, Error, Fixture, Hypervisor, Kept, booted, done, eventually, has_files,
    is, must, refused,
};
use crate::hypervisor::{LayerChange, Layers};

async fn layers(hypervisor: &dyn Hypervisor, vm: &Definition) -> Result<Layers, Broken> {
    done("layers", hypervisor.layers(vm).await)
}

/// Changes them, twice: once is enough.
async fn change(hypervisor: &dyn Hypervisor, vm: &Definition, change: LayerChange) -> Result<bool, Broken> {
    let what = format!("{change:?}");
    let frozen = done(&what, hypervisor.change_layers(vm, &change).await)?;
    done(&what, hypervisor.change_layers(vm, &change).await)?;
    Ok(frozen)
}

async fn has(hypervisor: &dyn Hypervisor, vm: &Definition, there: &[u32], spare: &[u32]) -> Kept {
    let seen = layers(hypervisor, vm).await?;
    let whole: Vec<_> = seen
        .there
        .keys()
        .copied()
        .filter(|number| seen.has(*number))
        .collect();
    let expected: BTreeSet<_> = spare.iter().copied().collect();
    let right = whole == there && seen.there.len() == there.len() && seen.spare == expected;
    must(right, || {
        format!("layers are {seen:?}, should be {there:?} and spare {spare:?}")
    })
}

/// Merges a layer as far as it takes, and removes its files.
async fn merge(hypervisor: &dyn Hypervisor, fixture: &Fixture, vm: &Definition, number: u32) -> Kept {
    eventually("the end of a merge", fixture.patience, async || {
        if !layers(hypervisor, vm).await?.there.contains_key(&number) {
            return Ok(true);
        }
        done(
            "merge",
            hypervisor.change_layers(vm, &LayerChange::Merge(number)).await,
        )?;
        Ok(false)
    })
    .await?;
    change(hypervisor, vm, LayerChange::Remove(number))
        .await
        .map(drop)
}

/// Layers are added to a domain that runs, at one moment on all disks, and merged in any order; it goes on, and a new definition
/// keeps them.
pub async fn layers_come_and_go_while_it_runs(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let mut vm = fixture.make_running(hypervisor).await?;
    if vm.spec.disks.is_empty() {
        return fixture.remove(hypervisor, vm.id).await;
    }
    booted(hypervisor, fixture, vm.id).await?;
    has(hypervisor, &vm, &[], &[]).await?;
    for number in [1, 2, 5] {
        vm.layers.insert(number);
        change(hypervisor, &vm, LayerChange::Add(number)).await?;
    }
    has(hypervisor, &vm, &[1, 2, 5], &[]).await?;
    has_files(hypervisor, &vm, &[1, 2, 5], true).await?;
    refused(
        "removal of a layer in use",
        hypervisor.change_layers(&vm, &LayerChange::Remove(2)).await,
        |error| matches!(error, Error::WrongState { .. }),
    )?;
    let back = LayerChange::Revert {
        number: 6,
        replaces: 1,
    };
    refused(
        "going back while it runs",
        hypervisor.change_layers(&vm, &back).await,
        |error| matches!(error, Error::WrongState { .. }),
    )?;
    done("define", hypervisor.define(&vm).await)?;
    let seen = layers(hypervisor, &vm).await?;
    must(!seen.outdated, || {
        format!("outdated after a definition: {seen:?}")
    })?;
    has(hypervisor, &vm, &[1, 2, 5], &[]).await?;
    // One in the middle, the newest, the last.
    for (number, left) in [(2, &[1, 5][..]), (5, &[1]), (1, &[])] {
        vm.layers.remove(&number);
        merge(hypervisor, fixture, &vm, number).await?;
        has(hypervisor, &vm, left, &[]).await?;
        is(hypervisor, vm.id, DomainState::Running).await?;
    }
    done("destroy", hypervisor.destroy(vm.id).await)?;
    done("start", hypervisor.start(vm.id).await)?;
    fixture.remove(hypervisor, vm.id).await
}

/// The same of a domain that is off, which can also go back; it starts with what it has then.
pub async fn layers_come_and_go_while_it_is_off(hypervisor: &dyn Hypervisor, fixture: &Fixture) -> Kept {
    let mut vm = fixture.make(hypervisor).await?;
    if vm.spec.disks.is_empty() {
        return fixture.remove(hypervisor, vm.id).await;
    }
    for number in [1, 2, 3] {
        vm.layers.insert(number);
        change(hypervisor, &vm, LayerChange::Add(number)).await?;
    }
    has(hypervisor, &vm, &[1, 2, 3], &[]).await?;
    merge(hypervisor, fixture, &vm, 1).await?;
    has(hypervisor, &vm, &[2, 3], &[]).await?;
    let back = LayerChange::Revert {
        number: 4,
        replaces: 2,
    };
    change(hypervisor, &vm, back).await?;
    has(hypervisor, &vm, &[4], &[2, 3]).await?;
    for number in [2, 3] {
        change(hypervisor, &vm, LayerChange::Remove(number)).await?;
    }
    vm.layers = BTreeSet::from([4]);
    done("start", hypervisor.start(vm.id).await)?;
    has(hypervisor, &vm, &[4], &[]).await?;
    done("destroy", hypervisor.destroy(vm.id).await)?;
    let lost = LayerChange::Revert {
        number: 7,
        replaces: 2,
    };
    refused(
        "going back to a layer that is not there",
        hypervisor.change_layers(&vm, &lost).await,
        |error| !error.outcome_unknown(),
    )?;
    merge(hypervisor, fixture, &vm, 4).await?;
    has(hypervisor, &vm, &[], &[]).await?;
    done("start", hypervisor.start(vm.id).await)?;
    fixture.remove(hypervisor, vm.id).await
}
