//! What is to be done next so that the disks of a VM have the layers of its snapshots, no more and no fewer. Pure.
//!
//! ```text
//!   add what is missing, oldest first ──> remove files that no disk has ──> merge what is not wanted ──> done
//!   (back to a snapshot: off)            (before any start)                (while it runs, if it does)
//! ```
//!
//! Of a VM that is deleted all layers of its volumes of the site are merged, when it is off.
//!
//! Nothing is remembered of how far it was: the files tell. A merge under way goes on by itself, also while the agent is away.

use std::time::Duration;

use dalgu_proto::{
    mutant::{self, Mutant},
    snapshot::Set,
};

use super::Step;
use crate::{
    hypervisor::{LayerChange, Layers},
    ledger::{Disposition, Intent, Vm},
    vm::plan::Memory,
};

/// A merge that goes on by itself is looked at so often.
pub const MERGE_LOOK: Duration = Duration::from_secs(1);

/// Whether layers must be merged before a VM is deleted: its volumes of the site stay, with what was written to them last.
pub fn outlive(vm: &Vm) -> bool {
    let disks = vm.intent.iter().flat_map(|intent| &intent.spec.disks);
    vm.disposition == Disposition::Deleting
        && disks.into_iter().any(|disk| disk.volume.is_some())
        && !mutant::on(Mutant::VolumeNotMerged)
}

/// What must be done of a domain that is off before its VM is deleted. The layers are those of its volumes only.
pub(super) fn before_deletion(vm: &Vm, memory: &Memory) -> Option<Step> {
    if !outlive(vm) {
        return None;
    }
    let Some(layers) = &memory.layers else {
        return Some(Step::Look);
    };
    let merge = layers.there.keys().map(|number| LayerChange::Merge(*number));
    let remove = layers.spare.iter().map(|number| LayerChange::Remove(*number));
    merge.chain(remove).next().map(Step::Layer)
}

/// What must be done of a domain that is off before anything else, since it may be started next: `None` when there is nothing.
pub(super) fn before_start(vm: &Vm, intent: &Intent, memory: &Memory) -> Option<Step> {
    let (set, layers) = match under_way(vm, intent, memory)? {
        Ok(known) => known,
        Err(step) => return Some(step),
    };
    if layers.outdated {
        return Some(Step::Define);
    }
    missing(set, layers)
        .or_else(|| leftover(vm, set, layers))
        .map(Step::Layer)
}

/// The next step of what is under way.
pub(super) fn next(vm: &Vm, intent: &Intent, memory: &Memory) -> Option<Step> {
    let (set, layers) = match under_way(vm, intent, memory)? {
        Ok(known) => known,
        Err(step) => return Some(step),
    };
    if layers.merging {
        return Some(Step::Wait(MERGE_LOOK));
    }
    if layers.outdated {
        return Some(Step::Define);
    }
    let unwanted = layers.there.keys().find(|number| !set.has(**number));
    let merge = || unwanted.map(|number| LayerChange::Merge(*number));
    // Nothing else can be done to a disk before.
    let end = merge().filter(|_| layers.ready);
    let step = end
        .or_else(|| missing(set, layers))
        .or_else(|| leftover(vm, set, layers))
        .or_else(merge);
    Some(step.map_or(Step::LayersDone, Step::Layer))
}

type Known<'a> = (&'a Set, &'a Layers);

/// What is wanted and what is there; or what must be done to know it. `None` when nothing is under way.
fn under_way<'a>(vm: &Vm, intent: &'a Intent, memory: &'a Memory) -> Option<Result<Known<'a>, Step>> {
    let set = intent.snapshots.as_ref().filter(|_| vm.snapshots.under_way)?;
    Some(
        memory
            .layers
            .as_ref()
            .map(|layers| (set, layers))
            .ok_or(Step::Look),
    )
}

/// The oldest snapshot that is not there and can be made.
fn missing(set: &Set, layers: &Layers) -> Option<LayerChange> {
    let number = set
        .numbers()
        .find(|number| !layers.has(*number) && *number > layers.top())?;
    let revert = set.revert.filter(|revert| revert.number == number);
    Some(match revert {
        Some(revert) => LayerChange::Revert {
            number,
            replaces: revert.replaces,
        },
        None => LayerChange::Add(number),
    })
}

/// A layer that no disk has, and that is not about to be used. One that was never seen in use may be in use all the same, by a
/// QEMU of which libvirt lost account: it is added, and merged like any other.
fn leftover(vm: &Vm, set: &Set, layers: &Layers) -> Option<LayerChange> {
    let number = *layers.spare.iter().find(|number| !set.has(**number))?;
    let unseen = vm.snapshots.seen.is_some_and(|seen| number > seen) && number > layers.top();
    let given_up = set.revert.is_some_and(|revert| revert.number == number);
    Some(match unseen && !given_up {
        true => LayerChange::Add(number),
        false => LayerChange::Remove(number),
    })
}

#[cfg(test)]
mod tests;
