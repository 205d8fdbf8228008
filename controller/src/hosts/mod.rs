//! The site's hosts: how they enter, what they report, when they count as lost, and how placement sees them.
//!
//! [`registry`] changes the state from inside transactions; [`heartbeat`] is the task that notices silence; [`views`]
//! is for placement and the API.

pub mod heartbeat;
pub mod registry;

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::{
    ids::HostName,
    mutant::{self, Mutant},
};

use crate::{
    model::{HostLive, HostRecord, HostState},
    placement::{HostView, PoolView, UsageView},
    state::State,
};

const MIB: u64 = 1 << 20;

/// Every host as placement sees it.
pub fn views(state: &State) -> Vec<HostView> {
    state.hosts.values().map(|host| view(state, host)).collect()
}

/// A host as placement sees it.
pub fn view(state: &State, host: &HostRecord) -> HostView {
    let live = state.live.get(&host.name).map(AsRef::as_ref);
    let reserved = state.reserved.get(&host.name).cloned();
    let reserved = reserved
        .filter(|_| !mutant::on(Mutant::PromisesNotCounted))
        .unwrap_or_default();
    let heard = live.is_some_and(|live| live.state == HostState::Ready);
    let ready = heard && live.is_some_and(|live| live.hypervisor_error.is_none());
    let usage = live.filter(|_| heard).and_then(|live| live.usage.as_ref());
    let (unmanaged_vcpus, unmanaged_memory_mib) = foreign(state, &host.name);
    let pools = host.inventory.pools.iter().map(|known| {
        // The sample has the present room; the inventory is stored only when it changes in earnest.
        let pool = usage
            .and_then(|usage| usage.pools.iter().find(|p| p.name == known.name))
            .unwrap_or(known);
        let on_host = reserved.disks_mib.get(&known.name).copied().unwrap_or(0);
        let everywhere = state.pools_mib.get(&known.name).copied().unwrap_or(0);
        PoolView::of(pool, if known.shared { everywhere } else { on_host })
    });
    HostView {
        name: host.name.clone(),
        ready,
        state: describe(live),
        cordoned: host.cordon.is_some(),
        cordon_reason: host.cordon.clone().unwrap_or_default(),
        labels: host.labels.clone(),
        cpus: host.inventory.cpus,
        cpu_overcommit_ratio: host.cpu_overcommit_ratio,
        memory_mib: host.inventory.memory_bytes / MIB,
        reserved_memory_mib: host.reserved_memory_mib,
        vcpus_reserved: u32::try_from(reserved.vcpus).unwrap_or(u32::MAX),
        memory_mib_reserved: reserved.memory_mib,
        vms: reserved.vms,
        pools: pools.collect(),
        bridges: host.inventory.bridges.clone(),
        accelerator: host.inventory.accelerator.clone(),
        usage: usage.map(UsageView::of),
        unmanaged_vcpus,
        unmanaged_memory_mib,
    }
}

/// Virtual processors, and memory in MiB, of what runs on a host and has no reservation there: domains that Dalgu does not
/// touch, and VMs that are not this host's own, such as those that a restored store does not know.
pub fn foreign(state: &State, host: &HostName) -> (u32, u64) {
    let unmanaged = state.live.get(host).into_iter().flat_map(|live| &live.unmanaged);
    let unmanaged = unmanaged.filter(|domain| domain.running);
    let holds = |vm| state.host_vms.get(host).is_some_and(|vms| vms.contains(vm));
    let strays = state.strays.iter();
    let strays = strays.filter(|((at, vm), stray)| at == host && stray.reported.is_alive() && !holds(vm));
    unmanaged
        .map(|domain| (domain.vcpus, domain.memory_mib))
        .chain(strays.map(|(_, stray)| (stray.reported.vcpus, stray.reported.memory_mib)))
        .fold((0, 0), |(vcpus, memory): (u32, u64), (more, mib)| {
            (vcpus.saturating_add(more), memory.saturating_add(mib))
        })
}

/// How long ago each host was last heard; of one that has not been heard, how long ago the controller started.
pub fn silence(state: &State) -> BTreeMap<HostName, Duration> {
    let live = state.live.iter();
    live.map(|(host, live)| (host.clone(), live.heard.elapsed()))
        .collect()
}

fn describe(live: Option<&HostLive>) -> String {
    match live {
        None => "not heard from".to_owned(),
        Some(live) => match (live.state, &live.hypervisor_error) {
            (HostState::Ready, Some(error)) => format!("without a working hypervisor: {error}"),
            (HostState::Ready, None) => "ready".to_owned(),
            (HostState::Initializing, _) => "not heard from since the controller's start".to_owned(),
            (HostState::Unreachable, _) => format!("unreachable for {} s", live.heard.elapsed().as_secs()),
        },
    }
}

/// Whether a host is heard from.
pub fn state_of(state: &State, host: &HostName) -> HostState {
    state
        .live
        .get(host)
        .map_or(HostState::Unreachable, |live| live.state)
}
