//! How many more VMs of one size fit, and how many so that the site can still lose hosts. Called by the API.
//!
//! VMs of one size are slots: a host has so many free, and holds so many in what is there already. Disks are not counted, as pools that
//! hosts share would make the answer depend on the order of the creations.

use std::{collections::BTreeMap, sync::Arc};

use dalgu_proto::vm::CpuPolicy;

use super::{
    Engine, Policy, Protect, devices, filter, numa,
    score::Size,
    view::{HostView, Request},
};
use crate::model::matches;

/// How many more VMs of one size fit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capacity {
    /// In all.
    pub vms: u64,
    /// So many that what the fullest domains hold then has room in the others.
    pub keeping: u64,
    /// By domain; the name is empty for hosts without the label.
    pub domains: BTreeMap<String, DomainCapacity>,
}

/// How many more fit in one domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DomainCapacity {
    /// Hosts counted in it.
    pub hosts: u32,
    /// VMs that still fit.
    pub vms: u64,
    /// What it holds already, in VMs of that size, rounded up.
    pub held: u64,
}

impl Capacity {
    /// Counts the VMs of a request, whose disks do not count, on the hosts that its selector and tolerations allow. Hosts with the same value
    /// of `key` fail as one, each by itself without a key; room is kept for `keep` of these.
    pub fn of(request: &Request, hosts: &[HostView<'_>], key: Option<&str>, keep: usize) -> Self {
        let allowed = |host: &&HostView<'_>| {
            matches(&host.labels, &request.spec.host_selector)
                && request.rules.repelled(&host.taints, false).next().is_none()
        };
        let mut domains = BTreeMap::<String, DomainCapacity>::new();
        for host in hosts.iter().filter(allowed) {
            let name = match key {
                None => host.name.to_string(),
                Some(key) => host.labels.get(key).cloned().unwrap_or_default(),
            };
            let domain = domains.entry(name).or_default();
            domain.hosts = domain.hosts.saturating_add(1);
            domain.vms = domain.vms.saturating_add(fitting(request, host));
            domain.held = domain.held.saturating_add(held(request, host));
        }
        let vms = domains.values().map(|domain| domain.vms).sum();
        // All that the fullest domains can hold, and all that they hold, must find room elsewhere.
        let mut whole: Vec<u64> = domains.values().map(|domain| domain.vms + domain.held).collect();
        whole.sort_unstable_by(|a, b| b.cmp(a));
        let kept: u64 = whole.iter().take(keep).sum();
        Self {
            vms,
            keeping: u64::saturating_sub(vms, kept),
            domains,
        }
    }
}

/// Most VMs that [`protected`] counts.
const COUNTED: u64 = 10_000;

/// How many more VMs of a request, whose disks do not count, can be made one after the other so that room is kept for these domains.
pub fn protected(request: &Request, hosts: &[HostView<'_>], policy: Policy, protect: &Arc<Protect>) -> u64 {
    let mut engine = Engine::protecting(policy, protect);
    hosts.iter().for_each(|host| engine.set(host));
    let mut hosts: BTreeMap<_, _> = hosts
        .iter()
        .map(|host| (host.name.clone(), host.clone()))
        .collect();
    let vm = Size::of(request);
    for made in 0..COUNTED {
        let best = engine.choose(request, |name| hosts.get(name).cloned());
        let Some(host) = best.and_then(|name| hosts.get_mut(name)) else {
            return made;
        };
        let places = numa::fit(&request.spec, host);
        host.reserve(&request.spec, &places);
        host.vm_sizes.push((vm, 1));
        engine.set(host);
    }
    COUNTED
}

/// VMs that a host can still take.
fn fitting(request: &Request, host: &HostView<'_>) -> u64 {
    if !filter::lacks(request, host).is_empty() {
        return 0;
    }
    let (vm, free) = (Size::of(request), Size::free(host));
    let by_vcpus = u64::from(free.vcpus / vm.vcpus.max(1));
    let by_room = by_vcpus.min(free.memory_mib / vm.memory_mib.max(1));
    let places = host.vms_most.map_or(u64::MAX, |most| u64::from(most - host.vms));
    let most = by_room.min(places);
    match request.is_particular() {
        true => numa::times(request, host, most),
        false => most,
    }
}

/// What a host holds, in such VMs.
fn held(request: &Request, host: &HostView<'_>) -> u64 {
    let vm = Size::of(request);
    let each = match request.spec.fitting.cpus {
        CpuPolicy::Dedicated => numa::charged(vm.vcpus, host.cpu_overcommit_ratio),
        CpuPolicy::Shared => vm.vcpus,
    };
    let by_vcpus = u64::from(host.vcpus_reserved.div_ceil(each.max(1)));
    let by_vcpus = by_vcpus.max(devices::held(&request.spec, host));
    // What holds huge pages is not told by the ordinary memory that is reserved.
    match request.spec.fitting.pages {
        Some(_) => by_vcpus,
        None => by_vcpus.max(host.memory_mib_reserved.div_ceil(vm.memory_mib.max(1))),
    }
}

#[cfg(test)]
mod tests;
