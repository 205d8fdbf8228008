//! What a VM's task does when it is told what the VM should be, or that it should be gone.
//!
//! Each request is judged by [`policy`], written to the ledger, and only then kept in mind; the work follows by the
//! plan. When the ledger cannot be written the request has not happened. Requests about migrations are in
//! [`super::transfer`].

use std::collections::BTreeSet;

use dalgu_proto::{
    ids::{Epoch, Generation},
    mutant::{self, Mutant},
    vm::{Device, Disk, Spec, first_boot::Documents},
};

use super::{
    Error, Request, Told,
    driver::Driver,
    policy::{self, Accepted, Denied},
};
use crate::{
    devices,
    images::Need,
    ledger::{self, Changes, Disposition, Done, Intent, Snapshots},
    pins::Taken,
};

/// What is to be changed of a VM that is told what it is made of. Of disks that were added since its disks were made, this
/// host knows by itself which it has made, unless it has lost its ledger. A volume of the site is made only where the controller says
/// that it is new: this host cannot know whether another one has made it before.
fn changes(known: Option<&ledger::Vm>, spec: &Spec, made: bool, new_disks: BTreeSet<String>) -> Changes {
    let may_be_made = |name: &String| {
        let disk = spec.disks.iter().find(|disk| disk.name == *name);
        disk.is_some_and(|disk| made || disk.volume.is_some())
    };
    let Some((vm, before)) = known.and_then(|vm| Some((vm, &vm.intent.as_ref()?.spec))) else {
        let adopted = known.is_some();
        let mut unmade = new_disks;
        unmade.retain(may_be_made);
        let added = made && !unmade.is_empty();
        // One that is there may have been asked to grow while no VM had it.
        let attached = spec.disks.iter().any(|disk| disk.volume.is_some());
        return Changes {
            under_way: adopted || added || attached,
            ever: added,
            unmade,
            removed: Vec::new(),
            frozen: false,
        };
    };
    let has = |disks: &[Disk], name: &str| disks.iter().any(|disk| disk.name == name);
    let mut changes = vm.changes.clone();
    if !before.same_hardware(spec) {
        changes.under_way = true;
        changes.ever = true;
    }
    let added = spec.disks.iter().filter(|disk| !has(&before.disks, &disk.name));
    let added = added.filter(|disk| disk.volume.is_none() || new_disks.contains(&disk.name));
    changes.unmade.extend(added.map(|disk| disk.name.clone()));
    changes.unmade.retain(may_be_made);
    // One that moves to another pool leaves its file behind; one that comes back has it again.
    let stays = |disk: &Disk| {
        let mut disks = spec.disks.iter();
        disks.any(|other| other.name == disk.name && other.pool == disk.pool)
    };
    changes.removed.extend(before.disks.iter().cloned());
    changes.removed.retain(|disk| !stays(disk));
    changes
}

/// An intent of a controller that knows of no snapshots leaves them as they are.
fn with_snapshots(known: Option<&ledger::Vm>, intent: Intent) -> Intent {
    let before = known.and_then(|vm| vm.intent.as_ref()?.snapshots.clone());
    Intent {
        snapshots: intent.snapshots.or(before),
        ..intent
    }
}

/// How far a VM's snapshots are when it is told which it is to have. Of a VM that is made here, every layer is seen.
fn snapshots(known: Option<&ledger::Vm>, intent: &Intent, made: bool) -> Snapshots {
    let before = known.and_then(|vm| vm.intent.as_ref()?.snapshots.as_ref());
    let differ = match (&intent.snapshots, before) {
        (Some(set), Some(before)) => set.layers != before.layers,
        // Also of one that was found here, without a word of what was told before: a merge may have been under way.
        (Some(_), None) => true,
        (None, _) => false,
    };
    let known = known.map(|vm| vm.snapshots.clone()).unwrap_or_else(|| Snapshots {
        seen: (!made).then_some(0),
        ..Snapshots::default()
    });
    Snapshots {
        under_way: known.under_way || differ,
        ..known
    }
}

impl Driver {
    /// Carries out one request; what it brought is in the status.
    pub(super) async fn request(&mut self, request: Request) -> Result<(), Error> {
        match request {
            Request::Ensure(told) => self.ensure(told).await,
            Request::Delete(generation, epoch) => self.delete(generation, epoch).await,
            Request::Prepare(prepare) => self.prepare(prepare).await,
            Request::Send(send) => self.send(send).await,
            Request::Settle(migration) => self.settle(migration).await,
            Request::Finish {
                migration,
                owner,
                epoch,
            } => self.finish(migration, owner, epoch).await,
        }
    }

    async fn ensure(&mut self, told: Told) -> Result<(), Error> {
        let Told {
            name,
            intent,
            disks_made,
            new_disks,
            images,
            documents,
        } = told;
        let intent = with_snapshots(self.vm.as_ref(), intent);
        match policy::ensure(self.vm.as_ref(), &intent)? {
            Accepted::Known => return self.told_sources(images).await,
            Accepted::New => {}
        }
        self.claim(&intent)?;
        tracing::info!(generation = %intent.generation, epoch = %intent.epoch, power = ?intent.power, "intent accepted");
        let known = self
            .vm
            .clone()
            .filter(|vm| !matches!(vm.disposition, Disposition::Gone { .. }));
        let done = known.as_ref().map_or_else(Done::default, |vm| vm.done);
        let volumes = done.volumes || disks_made;
        let changes = changes(known.as_ref(), &intent.spec, volumes, new_disks);
        let snapshots = snapshots(known.as_ref(), &intent, volumes);
        let documents = match known.as_ref() {
            _ if volumes => Documents::default(),
            Some(vm) if documents.is_empty() => vm.documents.clone(),
            _ => documents,
        };
        let redefine = known
            .as_ref()
            .and_then(|vm| vm.intent.as_ref())
            .is_some_and(|before| before.spec != intent.spec);
        // A restored controller may count from what this host remembered before a write that failed as it seemed: what was
        // done by that write is to be done over.
        let undone = intent.power_sequence.saturating_sub(1);
        let counts_back = intent.power_sequence < done.power;
        let counted = |sequence| if counts_back { undone } else { sequence };
        let vm = ledger::Vm {
            id: self.id,
            name,
            epoch: intent.epoch,
            generation: intent.generation,
            disposition: Disposition::Owned,
            done: Done {
                defined: done.defined.filter(|_| !redefine),
                volumes,
                power: counted(done.power),
                power_begun: counted(done.power_begun),
                ..done
            },
            last_seen: known.as_ref().and_then(|vm| vm.last_seen),
            boot_id: self.shared.boot_id.clone(),
            documents,
            intent: Some(intent),
            images,
            changes,
            snapshots,
        };
        self.replace(vm).await?;
        self.start_afresh();
        Ok(())
    }

    /// Refuses an intent whose processors or PCI devices are another VM's here. What is claimed counts before it is written down.
    pub(super) fn claim(&self, intent: &Intent) -> Result<(), Denied> {
        let own = self.vm.as_ref().map_or(&[][..], ledger::Vm::devices);
        let mut new = intent.devices.iter().filter(|device| !own.contains(device));
        // No word of a controller gives away what the operator of this host has not named.
        let known = self.shared.samples.borrow().inventory.clone();
        let named = |device: &Device| {
            let mut named = known.pci_devices.iter();
            named.any(|named| named.address == device.address && named.problem.is_none())
        };
        if let Some(device) = new.find(|device| !named(device)) {
            return Err(match known.cpus {
                // The agent has started a moment ago, and has not looked yet.
                0 => Denied::Busy,
                _ => Denied::DeviceNotNamed(device.address),
            });
        }
        let claimed = self.shared.devices.claim(self.id, &intent.devices);
        claimed.map_err(|devices::Taken { device, vm }| Denied::DeviceTaken { device, vm })?;
        let claimed = self.shared.pins.claim(self.id, &intent.places);
        claimed.map_err(|Taken { cpu, vm }| {
            // What was refused is not held.
            self.shared.devices.hold(self.id, own);
            Denied::CpuTaken { cpu, vm }
        })
    }

    /// The same intent again, perhaps with other hosts that have its images.
    pub(super) async fn told_sources(&mut self, images: Vec<Need>) -> Result<(), Error> {
        match self.vm.clone() {
            Some(vm) if !images.is_empty() && vm.images != images => {
                self.replace(ledger::Vm { images, ..vm }).await
            }
            _ => Ok(()),
        }
    }

    async fn delete(&mut self, generation: Generation, epoch: Epoch) -> Result<(), Error> {
        let nothing_here = policy::delete(self.vm.as_ref(), generation, epoch)?;
        let vm = match self.vm.clone() {
            Some(vm) if !nothing_here => vm,
            known => return self.never_again(known, generation, epoch).await,
        };
        if vm.disposition != Disposition::Deleting {
            tracing::info!(%generation, %epoch, "deletion accepted");
            self.replace(ledger::Vm {
                disposition: Disposition::Deleting,
                documents: Documents::default(),
                generation,
                epoch,
                ..vm
            })
            .await?;
            self.start_afresh();
        }
        Ok(())
    }

    /// Remembers that a VM of which nothing is here was deleted, so that a command to make it which comes late is refused.
    async fn never_again(
        &mut self,
        known: Option<ledger::Vm>,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<(), Error> {
        if known.as_ref().is_some_and(|vm| vm.epoch >= epoch) {
            return Ok(());
        }
        tracing::info!(%generation, %epoch, "deletion accepted of a VM that is not here");
        let name = match known {
            Some(vm) => vm.name,
            // It was never told, and nobody reads it.
            None => format!("vm-{}", self.id)
                .parse()
                .expect("a letter, then hexadecimal digits and dashes"),
        };
        self.replace(ledger::Vm {
            id: self.id,
            name,
            intent: None,
            epoch,
            generation,
            disposition: Disposition::Gone {
                since: self.shared.clock.now(),
            },
            done: Done::default(),
            last_seen: None,
            boot_id: self.shared.boot_id.clone(),
            images: Vec::new(),
            documents: Default::default(),
            changes: Default::default(),
            snapshots: Default::default(),
        })
        .await
    }

    /// Writes a new entry; the old one stays in force when that fails.
    pub(super) async fn replace(&mut self, vm: ledger::Vm) -> Result<(), Error> {
        let before = self.vm.replace(vm);
        if mutant::on(Mutant::LedgerAfterHypervisor) {
            return Ok(());
        }
        if let Err(error) = self.try_save_vm().await {
            self.vm = before;
            return Err(error.into());
        }
        self.drop_waiting();
        Ok(())
    }

    /// Remembers only that nothing of the VM is here, under this ownership number.
    pub(super) async fn let_go(&mut self, epoch: Epoch) -> Result<(), Error> {
        let Some(vm) = self.vm.clone() else {
            // What could not be written down when it was to come may be on disk all the same.
            return self.never_again(None, Generation(0), epoch).await;
        };
        let disposition = Disposition::Gone {
            since: self.shared.clock.now(),
        };
        self.replace(ledger::Vm {
            disposition,
            epoch: epoch.max(vm.epoch),
            intent: None,
            last_seen: None,
            done: Done::default(),
            images: Vec::new(),
            documents: Documents::default(),
            changes: Default::default(),
            snapshots: Default::default(),
            ..vm
        })
        .await?;
        self.start_afresh();
        Ok(())
    }
}
