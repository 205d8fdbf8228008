//! PCI devices of hosts that VMs have for themselves: which are free, and which of them a VM is given.
//!
//! As with processors ([`numa`](super::numa)): the caller keeps what [`choose`] says with the VM in the transaction that decided, so that no
//! device is given twice.

use dalgu_proto::{
    host::PciDevice,
    vm::{Device, NumaPlace, Spec},
};

use super::{
    filter::Lack,
    view::{HostView, Request},
};

/// Devices of a class that can be given to VMs, and may have been.
pub fn of_class<'a>(host: &'a HostView<'_>, class: &str) -> impl Iterator<Item = &'a PciDevice> {
    let named = host.parts.devices.iter();
    named.filter(move |device| device.class == class && device.problem.is_none())
}

fn free<'a>(host: &'a HostView<'_>, class: &str) -> impl Iterator<Item = &'a PciDevice> {
    of_class(host, class).filter(|device| !host.parts.taken.has_device(device.address))
}

fn count(devices: impl Iterator) -> u32 {
    u32::try_from(devices.count()).unwrap_or(u32::MAX)
}

/// Finds what a host lacks of the devices that a VM asks for.
pub(super) fn lacks<'a>(request: &'a Request, host: &HostView<'_>, found: &mut Vec<Lack<'a>>) {
    for (class, needed) in &request.spec.devices {
        let free = count(free(host, class));
        if *needed > free {
            let named = host.parts.devices.iter();
            found.push(Lack::Devices {
                class,
                needed: *needed,
                free,
                all: count(of_class(host, class)),
                unfit: count(named.filter(|device| device.class == *class && device.problem.is_some())),
            });
        }
    }
}

/// Which devices of a host a VM that is at these places is given: of those that are free the ones on its NUMA nodes first, then by their
/// addresses. None, where it asks for none, or the host has not all of them.
pub fn choose(spec: &Spec, places: &[NumaPlace], host: &HostView<'_>) -> Vec<Device> {
    let far = |device: &PciDevice| !places.iter().any(|place| device.numa_node == Some(place.node));
    let mut chosen = Vec::new();
    for (class, needed) in &spec.devices {
        let mut free: Vec<_> = free(host, class).collect();
        let needed = usize::try_from(*needed).unwrap_or(usize::MAX);
        if free.len() < needed {
            return Vec::new();
        }
        free.sort_by_key(|device| (far(device), device.address));
        chosen.extend(free.into_iter().take(needed).map(|device| Device {
            class: class.clone(),
            address: device.address,
        }));
    }
    chosen
}

/// VMs that ask for these devices of which a host holds so many already.
pub(super) fn held(spec: &Spec, host: &HostView<'_>) -> u64 {
    let each = spec.devices.iter().map(|(class, needed)| {
        let taken = of_class(host, class).filter(|device| host.parts.taken.has_device(device.address));
        u64::from(count(taken).div_ceil((*needed).max(1)))
    });
    each.max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
