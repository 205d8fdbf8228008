//! The site's hosts: how they enter, what they report, when they count as lost, and how placement sees them.
//!
//! [`registry`] changes the state from inside transactions; [`heartbeat`] is the task that notices silence; [`views`]
//! is for placement and the API.

pub mod heartbeat;
pub mod overcommit;
pub mod pools;
pub mod registry;

use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use dalgu_proto::{
    ids::{HostName, VmId},
    mutant::{self, Mutant},
    vm::{Device, NumaPlace, Spec},
};
use uuid::Uuid;

use crate::{
    model::{HostLive, HostRecord, HostState, PowerPhase},
    placement::{self, HostView, Parts, PoolView, Taken, UsageView, charged},
    power,
    state::{Reserved, State, Stray},
};

const MIB: u64 = 1 << 20;

/// Every host as placement sees it, in the order of their names.
pub fn views(state: &State) -> Vec<HostView<'_>> {
    let mut views = Vec::with_capacity(state.hosts.len());
    views.extend(each(state));
    views
}

/// The same, one after the other. All three maps are in the order of the names, so none is searched.
pub fn each(state: &State) -> impl Iterator<Item = HostView<'_>> {
    let (mut live, mut reserved) = (state.live.iter().peekable(), state.reserved.iter().peekable());
    state.hosts.values().map(move |host| {
        while live.next_if(|(name, _)| **name < host.name).is_some() {}
        while reserved.next_if(|(name, _)| **name < host.name).is_some() {}
        let live = live.next_if(|(name, _)| **name == host.name);
        let held = reserved.next_if(|(name, _)| **name == host.name);
        look(
            state,
            host,
            live.map(|(_, live)| &**live),
            held.map(|(_, held)| held),
        )
    })
}

/// A host as placement sees it.
pub fn view<'a>(state: &'a State, host: &'a HostRecord) -> HostView<'a> {
    let live = state.live.get(&host.name).map(AsRef::as_ref);
    look(state, host, live, state.reserved.get(&host.name))
}

/// A host as placement would see it if it were on.
pub fn view_awake<'a>(state: &'a State, host: &'a HostRecord) -> HostView<'a> {
    HostView {
        ready: true,
        ..view(state, host)
    }
}

fn look<'a>(
    state: &'a State,
    host: &'a HostRecord,
    live: Option<&'a HostLive>,
    reserved: Option<&'a Reserved>,
) -> HostView<'a> {
    let reserved = reserved.filter(|_| !mutant::on(Mutant::PromisesNotCounted));
    let heard = live.is_some_and(|live| live.state == HostState::Ready);
    let ready = heard && !host.is_asleep() && live.is_some_and(|live| live.hypervisor_error.is_none());
    let usage = live.filter(|_| heard).and_then(|live| live.usage.as_ref());
    let (unmanaged_vcpus, unmanaged_memory_mib) = foreign(state, &host.name);
    let ratio = overcommit::ratio(state, host, live);
    let pools = host.inventory.pools.iter().map(|known| {
        // The sample has the present room; the inventory is stored only when it changes in earnest.
        let pool = usage
            .and_then(|usage| usage.pools.iter().find(|p| p.name == known.name))
            .unwrap_or(known);
        let promised = if known.shared {
            state.pools_mib.get(&known.name)
        } else {
            reserved.and_then(|reserved| reserved.disks_mib.get(&known.name))
        };
        PoolView::of(pool, promised.copied().unwrap_or(0), state.pool_policy)
    });
    HostView {
        name: host.name.clone(),
        ready,
        state: asleep(host).map_or_else(|| describe(live), Cow::Owned),
        cordoned: host.cordon.is_some(),
        cordon_reason: host.cordon.as_deref().unwrap_or_default().into(),
        pressed: live.is_some_and(|live| live.pressure.closed().is_some()),
        labels: Cow::Borrowed(&host.labels),
        taints: Cow::Borrowed(&host.taints),
        cpus: host.inventory.cpus,
        cpu_overcommit_ratio: ratio,
        own_cpu_overcommit_ratio: host.cpu_overcommit_ratio,
        adapted: ratio != host.cpu_overcommit_ratio,
        memory_mib: host.inventory.ordinary_memory_bytes() / MIB,
        reserved_memory_mib: host.reserved_memory_mib,
        vcpus_reserved: reserved.map_or(0, |held| {
            let own = charged(held.taken.dedicated(), ratio);
            u32::try_from(held.vcpus).unwrap_or(u32::MAX).saturating_add(own)
        }),
        memory_mib_reserved: reserved.map_or(0, |held| held.memory_mib),
        vms: reserved.map_or(0, |held| held.vms),
        vm_sizes: match reserved.filter(|_| !state.protect.is_empty()) {
            Some(held) => held.sizes.iter().map(|(size, vms)| (*size, *vms)).collect(),
            None => Vec::new(),
        },
        pools: pools.collect(),
        bridges: Cow::Borrowed(&host.inventory.bridges),
        accelerator: Cow::Borrowed(&host.inventory.accelerator),
        guest_features: Cow::Borrowed(&host.inventory.guest_features),
        usage: usage.map(|usage| UsageView {
            cpus_expected: live.and_then(|live| live.cpus_expected),
            lately: live.and_then(|live| live.lately),
            ..UsageView::of(usage)
        }),
        unmanaged_vcpus,
        unmanaged_memory_mib,
        vms_most: host.vms_most.or(state.vms_most),
        parts: Parts {
            nodes: Cow::Borrowed(&host.inventory.numa_nodes),
            uplinks: Cow::Borrowed(&host.inventory.uplinks),
            devices: Cow::Borrowed(&host.inventory.pci_devices),
            taken: taken(state, &host.name, reserved),
        },
    }
}

/// Where a VM that was just placed on a host is to be there; `None` for one that is not fitted onto nodes.
pub fn fit(state: &State, spec: &Spec, host: &HostName) -> Option<Vec<NumaPlace>> {
    let host = state.hosts.get(host)?;
    let places = placement::fit(spec, &view(state, host));
    (!places.is_empty()).then_some(places)
}

/// Which PCI devices a VM that was just placed on a host has there, where it is at these places.
pub fn devices(state: &State, spec: &Spec, places: &[NumaPlace], host: &HostName) -> Vec<Device> {
    match state.hosts.get(host) {
        Some(host) if !spec.devices.is_empty() => placement::choose(spec, places, &view(state, host)),
        _ => Vec::new(),
    }
}

/// Virtual processors, and memory in MiB, of what runs on a host and has no reservation there: domains that Dalgu does not
/// touch, and VMs that are not this host's own, such as those that a restored store does not know.
pub fn foreign(state: &State, host: &HostName) -> (u32, u64) {
    let unmanaged = state.live.get(host).into_iter().flat_map(|live| &live.unmanaged);
    let unmanaged = unmanaged.filter(|domain| domain.running);
    let strays = strays(state, host).filter(|stray| stray.reported.is_alive());
    unmanaged
        .map(|domain| (domain.vcpus, domain.memory_mib))
        .chain(strays.map(|stray| (stray.reported.vcpus, stray.reported.memory_mib)))
        .fold((0, 0), |(vcpus, memory): (u32, u64), (more, mib)| {
            (vcpus.saturating_add(more), memory.saturating_add(mib))
        })
}

/// VMs on a host that are not its own, as it says.
fn strays<'a>(state: &'a State, host: &'a HostName) -> impl Iterator<Item = &'a Stray> {
    let holds = |vm| state.host_vms.get(host).is_some_and(|vms| vms.contains(vm));
    let first = (host.clone(), VmId::from_uuid(Uuid::nil()));
    let strays = state
        .strays
        .range(first..)
        .take_while(move |((at, _), _)| at == host);
    strays
        .filter(move |((_, vm), _)| !holds(vm))
        .map(|(_, stray)| stray)
}

/// What of a host by name is VMs' own. What has no reservation there keeps its PCI devices, also while it is off: the host would give
/// them to nobody else.
fn taken<'a>(state: &State, host: &HostName, reserved: Option<&'a Reserved>) -> Cow<'a, Taken> {
    let mut taken = reserved.map_or_else(Cow::default, |held| Cow::Borrowed(&*held.taken));
    for stray in strays(state, host) {
        let told = stray.reported.told.iter().flat_map(|told| &told.devices);
        for device in told {
            taken.to_mut().change_devices(std::slice::from_ref(device), true);
        }
    }
    taken
}

/// How long ago each host was last heard; of one that has not been heard, how long ago the controller started.
pub fn silence(state: &State) -> BTreeMap<HostName, Duration> {
    let live = state.live.iter();
    live.map(|(host, live)| (host.clone(), live.heard.elapsed()))
        .collect()
}

/// What placement says of a host that is not on.
fn asleep(host: &HostRecord) -> Option<String> {
    let power = host.power.as_ref()?;
    let since = power.since.strftime("%FT%TZ");
    Some(match power.phase {
        PowerPhase::On => return None,
        PowerPhase::PoweringOff => "being switched off".to_owned(),
        PowerPhase::Off if power.principal == power::PRINCIPAL => {
            format!("off since {since}; it can be woken")
        }
        PowerPhase::Off => {
            let (by, name) = (&power.principal, &host.name);
            format!("off since {since}, by {by}; `dalgu host power on {name}` wakes it")
        }
        PowerPhase::PoweringOn => format!("being switched on since {since}"),
    })
}

fn describe(live: Option<&HostLive>) -> Cow<'_, str> {
    match live {
        None => "not heard from".into(),
        Some(live) => match (live.state, &live.hypervisor_error) {
            (HostState::Ready, Some(error)) => format!("without a working hypervisor: {error}").into(),
            (HostState::Ready, None) => "ready".into(),
            (HostState::Initializing, _) => "not heard from since the controller's start".into(),
            (HostState::Unreachable, _) => {
                format!("unreachable for {} s", live.heard.elapsed().as_secs()).into()
            }
        },
    }
}

/// Whether it is on, and if it is, whether it is heard from: in a word, as metrics have it.
pub fn word(state: &State, host: &HostRecord) -> &'static str {
    match host.phase() {
        PowerPhase::On => state_of(state, &host.name).as_str(),
        phase => phase.as_str(),
    }
}

/// Whether a host is heard from. One that was switched off is not.
pub fn state_of(state: &State, host: &HostName) -> HostState {
    state
        .live
        .get(host)
        .map_or(HostState::Unreachable, |live| live.state)
}
