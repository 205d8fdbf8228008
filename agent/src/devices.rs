//! Which PCI devices of this host are which VM's: what the ledger says, kept by the VMs' tasks.
//!
//! The controller chooses them and gives none twice; here it is checked against what this host was told, in case the controller's store is
//! an old one: a VM whose device is another's is refused ([`Devices::claim`]).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dalgu_proto::{
    ids::VmId,
    vm::{Device, PciAddress},
};

type Held = BTreeMap<VmId, Vec<Device>>;

/// See the module's documentation. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Devices(Arc<Mutex<Held>>);

/// A device that is another VM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The device.
    pub device: PciAddress,
    /// Whose it is.
    pub vm: VmId,
}

fn set(held: &mut Held, vm: VmId, devices: &[Device]) {
    match devices.is_empty() {
        true => held.remove(&vm),
        false => held.insert(vm, devices.to_vec()),
    };
}

impl Devices {
    fn held(&self) -> MutexGuard<'_, Held> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM has these devices, and no others.
    pub fn hold(&self, vm: VmId, devices: &[Device]) {
        set(&mut self.held(), vm, devices);
    }

    /// The same for a VM that is to come, unless a device is another's.
    ///
    /// # Errors
    /// Whose it is.
    pub fn claim(&self, vm: VmId, devices: &[Device]) -> Result<(), Taken> {
        let mut all = self.held();
        let wanted = |device: &&Device| devices.iter().any(|own| own.address == device.address);
        let taken = all.iter().filter(|(other, _)| **other != vm);
        let mut taken = taken.filter_map(|(other, theirs)| {
            let device = theirs.iter().find(wanted)?.address;
            Some(Taken { device, vm: *other })
        });
        if let Some(taken) = taken.next() {
            return Err(taken);
        }
        set(&mut all, vm, devices);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(number: u128) -> VmId {
        VmId::from_uuid(uuid::Uuid::from_u128(number))
    }

    fn devices(addresses: &[&str]) -> Vec<Device> {
        let device = |address: &&str| Device {
            class: "gpu".into(),
            address: address.parse().unwrap(),
        };
        addresses.iter().map(device).collect()
    }

    #[test]
    fn no_device_is_two_vms_own() {
        let all = Devices::default();
        all.claim(vm(1), &devices(&["3b:00.0", "5e:00.0"])).unwrap();
        let taken = Taken {
            device: "5e:00.0".parse().unwrap(),
            vm: vm(1),
        };
        assert_eq!(all.claim(vm(2), &devices(&["86:00.0", "5e:00.0"])), Err(taken));
        // What was refused is not held; the same again is no conflict with itself.
        all.claim(vm(3), &devices(&["86:00.0"])).unwrap();
        all.claim(vm(1), &devices(&["3b:00.0", "5e:00.0"])).unwrap();
        all.hold(vm(1), &[]);
        all.claim(vm(2), &devices(&["5e:00.0"])).unwrap();
    }
}
