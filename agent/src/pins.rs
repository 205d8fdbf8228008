//! Which logical processors and NUMA nodes of this host are which VM's: what the ledger says, kept by the VMs' tasks.
//!
//! The controller chooses them and gives none twice; here it is checked against what this host was told, in case the controller's
//! store is an old one: a VM whose processors are another's is refused ([`Pins::claim`]). What is not a VM's own is for all
//! others: [`keep`] tells the hypervisor whenever that changes, and of domains that were started or have arrived since.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use dalgu_proto::{ids::VmId, vm::NumaPlace};
use tokio::{
    sync::{broadcast::error::RecvError, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::hypervisor::{Hint, Hypervisor};

/// The hypervisor is told again after so long, whatever was heard.
const INTERVAL: Duration = Duration::from_secs(30);

/// Fitted VMs, and where they are.
pub type Places = BTreeMap<VmId, Vec<NumaPlace>>;

/// See the module's documentation. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Pins(Arc<watch::Sender<Places>>);

/// A logical processor that is another VM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The processor.
    pub cpu: u32,
    /// Whose it is.
    pub vm: VmId,
}

impl Pins {
    /// A VM is at these places, and at no others.
    pub fn hold(&self, vm: VmId, places: &[NumaPlace]) {
        self.0.send_if_modified(|held| {
            if held.get(&vm).map_or(&[][..], Vec::as_slice) == places {
                return false;
            }
            match places.is_empty() {
                true => held.remove(&vm),
                false => held.insert(vm, places.to_vec()),
            };
            true
        });
    }

    /// The same for a VM that is to come, unless a processor is another's.
    ///
    /// # Errors
    /// Whose it is.
    pub fn claim(&self, vm: VmId, places: &[NumaPlace]) -> Result<(), Taken> {
        if let Some(taken) = taken(&self.0.borrow(), vm, places) {
            return Err(taken);
        }
        // Of two that claim at the same time, one finds the other.
        let before = self.0.borrow().get(&vm).cloned().unwrap_or_default();
        self.hold(vm, places);
        let now = taken(&self.0.borrow(), vm, places);
        match now {
            None => Ok(()),
            Some(taken) => {
                self.hold(vm, &before);
                Err(taken)
            }
        }
    }

    /// Where all of them are, from now on.
    pub fn watch(&self) -> watch::Receiver<Places> {
        self.0.subscribe()
    }
}

fn taken(held: &Places, vm: VmId, places: &[NumaPlace]) -> Option<Taken> {
    let others = held.iter().filter(|(other, _)| **other != vm);
    others.into_iter().find_map(|(other, theirs)| {
        let mut theirs = theirs.iter().flat_map(|place| &place.cpus);
        let cpu = theirs.find(|cpu| places.iter().any(|place| place.cpus.contains(cpu)))?;
        Some(Taken {
            cpu: *cpu,
            vm: *other,
        })
    })
}

/// Tells the hypervisor which processors are whose until it is stopped. Does nothing on a host where no VM is fitted, once the last has gone.
pub async fn keep(pins: Pins, hypervisor: Arc<dyn Hypervisor>, stop: CancellationToken) {
    let (mut places, mut hints) = (pins.watch(), hypervisor.hints());
    let mut told = false;
    loop {
        let now = places.borrow_and_update().clone();
        let idle = now.is_empty() && !told;
        if !idle {
            match hypervisor.pin(&now).await {
                Ok(()) => told = !now.is_empty(),
                Err(error) => {
                    tracing::debug!(%error, "which processors are whose could not be told; it is repeated")
                }
            }
        }
        // Cancel safe, each of them: nothing is lost but a hint, and the next look sees all.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = places.changed() => if changed.is_err() { return },
            hint = hints.recv(), if !idle => match hint {
                Ok(Hint::Domain(_) | Hint::All) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            () = sleep(INTERVAL), if !idle => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(number: u128) -> VmId {
        VmId::from_uuid(uuid::Uuid::from_u128(number))
    }

    fn places(cpus: &[u32]) -> Vec<NumaPlace> {
        vec![NumaPlace {
            node: 0,
            cpus: cpus.to_vec(),
        }]
    }

    #[test]
    fn no_processor_is_two_vms_own() {
        let pins = Pins::default();
        pins.claim(vm(1), &places(&[0, 1])).unwrap();
        assert_eq!(
            pins.claim(vm(2), &places(&[1, 2])),
            Err(Taken { cpu: 1, vm: vm(1) })
        );
        // What was refused is not held.
        pins.claim(vm(3), &places(&[2])).unwrap();
        // The same again is no conflict with itself; what shares a node has none either.
        pins.claim(vm(1), &places(&[0, 1])).unwrap();
        pins.claim(vm(4), &places(&[])).unwrap();
        pins.hold(vm(1), &[]);
        pins.claim(vm(2), &places(&[1])).unwrap();
        assert_eq!(pins.watch().borrow().len(), 3);
    }
}
