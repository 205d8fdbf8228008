//! The layers of simulated disks, and what they hold: one number for all of a VM's own disks, so that a snapshot can be told from
//! another, and what each volume of the site held then. Called with the lock held, so nothing here may wait.

use std::collections::BTreeSet;

use dalgu_proto::ids::VmId;
use serde::{Deserialize, Serialize};

use super::{
    Behaviour, SimConfig,
    state::{State, Volume, key},
};
use crate::hypervisor::{Definition, DomainState, Error, LayerChange, LayerSeen, Layers};

/// The disks of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chain {
    /// What the base holds.
    base: u64,
    layers: Vec<Layer>,
    spare: BTreeSet<u32>,
    merging: Option<u32>,
}

/// A layer of all disks of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Layer {
    number: u32,
    /// What the VM's own disks hold up to it.
    content: u64,
    /// What is below it of the VM's volumes of the site.
    volumes: Vec<(Volume, u64)>,
}

impl Chain {
    /// What the guest reads.
    pub(super) fn content(&self) -> u64 {
        self.layers.last().map_or(self.base, |layer| layer.content)
    }

    /// Numbers of the layers.
    pub(super) fn numbers(&self) -> Vec<u32> {
        self.layers.iter().map(|layer| layer.number).collect()
    }

    /// Files that no disk has any more.
    pub(super) fn spare(&self) -> usize {
        self.spare.len()
    }

    /// The guest writes.
    pub(super) fn write(&mut self, content: u64) {
        let top = self.layers.last_mut().map(|layer| &mut layer.content);
        *top.unwrap_or(&mut self.base) = content;
    }

    /// The numbers of those that are there, whether disks have them or not.
    pub(super) fn every_number(&self) -> impl Iterator<Item = u32> {
        let layers = self.layers.iter().map(|layer| layer.number);
        layers.chain(self.spare.iter().copied())
    }

    fn place(&self, number: u32) -> Option<usize> {
        self.layers.iter().position(|layer| layer.number == number)
    }

    fn below(&mut self, place: usize) -> &mut u64 {
        match place.checked_sub(1) {
            None => &mut self.base,
            Some(below) => &mut self.layers[below].content,
        }
    }

    /// Changes the layers; `volumes` is what the VM's volumes of the site hold. Answers what they are to hold from now on.
    fn change(
        &mut self,
        change: &LayerChange,
        alive: bool,
        volumes: Vec<(Volume, u64)>,
    ) -> Result<Vec<(Volume, u64)>, String> {
        match change {
            LayerChange::Add(number) if self.place(*number).is_none() => {
                self.layers.push(Layer {
                    number: *number,
                    content: self.content(),
                    volumes,
                });
                self.spare.remove(number);
            }
            LayerChange::Revert { number, replaces } if self.place(*number).is_none() => {
                let lost = || format!("there is no layer {replaces} to go back to");
                let place = self.place(*replaces).ok_or_else(lost)?;
                let content = *self.below(place);
                let left = self.layers.split_off(place);
                self.spare.extend(left.iter().map(|layer| layer.number));
                let volumes = left.into_iter().next().map(|layer| layer.volumes);
                let volumes = volumes.unwrap_or_default();
                self.layers.push(Layer {
                    number: *number,
                    content,
                    volumes: volumes.clone(),
                });
                return Ok(volumes);
            }
            LayerChange::Merge(number) => {
                let Some(place) = self.place(*number) else {
                    return Ok(Vec::new());
                };
                // A guest that runs goes on below when all is there.
                if alive && self.merging.replace(*number) != Some(*number) {
                    return Ok(Vec::new());
                }
                *self.below(place) = self.layers[place].content;
                self.layers.remove(place);
                self.spare.insert(*number);
                self.merging = None;
            }
            LayerChange::Remove(number) if self.place(*number).is_some() => {
                return Err(format!("its disks still have layer {number}"));
            }
            LayerChange::Remove(number) => {
                self.spare.remove(number);
            }
            LayerChange::Add(_) | LayerChange::Revert { .. } => {}
        }
        Ok(Vec::new())
    }
}

impl State {
    /// The disks of a VM, where they are.
    pub(super) fn with_chain<T>(
        &mut self,
        definition: &Definition,
        config: &SimConfig,
        look: impl FnOnce(&mut Chain) -> T,
    ) -> T {
        let id = definition.id;
        let mut disks = definition.spec.disks.iter();
        match disks.any(|disk| config.shared_pools.contains(&disk.pool)) {
            true => config
                .shared_storage
                .with_chains(|chains| look(chains.entry(id).or_default())),
            false => look(self.chains.entry(id).or_default()),
        }
    }

    pub(super) fn forget_chain(&mut self, id: VmId, keep_shared: bool, config: &SimConfig) {
        let mut gone: Vec<_> = self.chains.remove(&id).into_iter().collect();
        if !keep_shared {
            gone.extend(config.shared_storage.with_chains(|chains| chains.remove(&id)));
        }
        // A volume of the site stays, with what is below all layers.
        for chain in gone {
            let lowest = chain.layers.into_iter().next();
            for (volume, content) in lowest.into_iter().flat_map(|layer| layer.volumes) {
                self.write_file(&volume, content, config);
            }
        }
    }

    pub(super) fn layers(&mut self, definition: &Definition, config: &SimConfig) -> Result<Layers, Error> {
        self.ours(definition.id, config)?;
        let chain = self.with_chain(definition, config, |chain| chain.clone());
        let seen = LayerSeen {
            whole: true,
            written_bytes: 1 << 20,
        };
        Ok(Layers {
            there: chain.layers.iter().map(|layer| (layer.number, seen)).collect(),
            spare: chain.spare,
            merging: false,
            ready: chain.merging.is_some(),
            outdated: false,
        })
    }

    pub(super) fn change_layers(
        &mut self,
        definition: &Definition,
        change: &LayerChange,
        config: &SimConfig,
    ) -> Result<bool, Error> {
        let id = definition.id;
        let guest = self.ours(id, config)?;
        let alive = match guest.state {
            DomainState::Running | DomainState::Paused => true,
            DomainState::Stopped => false,
            _ => return Err(guest.wrong_state("and its disks cannot be changed")),
        };
        if guest.job.is_some() || (alive && matches!(change, LayerChange::Revert { .. })) {
            return Err(guest.wrong_state("and must be off to go back to a snapshot"));
        }
        let obeys = guest.state == DomainState::Running && guest.behaviour != Behaviour::Ignores;
        let volumes = definition.spec.disks.iter().filter(|disk| disk.volume.is_some());
        let hold = volumes.filter_map(|disk| {
            let file = self.file(&key(id, disk), config)?;
            Some((key(id, disk), file.content))
        });
        let hold = hold.collect();
        let changed = self.with_chain(definition, config, |chain| chain.change(change, alive, hold));
        for (volume, content) in changed.map_err(|detail| Error::WrongState { id, detail })? {
            self.write_file(&volume, content, config);
        }
        Ok(obeys && matches!(change, LayerChange::Add(_)))
    }
}
