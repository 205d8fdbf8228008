//! What a host has by name, and which of it VMs have: logical processors, NUMA nodes, huge pages, uplinks, PCI devices. How a VM that asks for
//! processors, huge pages or nodes of its own is fitted onto a host's nodes.
//!
//! A VM has one or more equal parts, each on a node of its own. So it fits where enough nodes have the room of one part, and
//! those with the least left are taken, so that large parts go on to find room. [`fit`] says which, with the numbers of the
//! processors; the caller keeps that with the VM in the transaction that decided, so that no processor is given twice.
//!
//! VMs that ask for nothing are not counted on nodes: nobody knows where the kernel has them. They are counted on the host, from whose
//! processors each dedicated one is taken away with all the over-commit that it stands for.

use std::{
    borrow::Cow,
    collections::{BTreeMap, btree_map::Entry},
};

use dalgu_proto::{
    host::{NumaNode, PciDevice, Uplink},
    vm::{Device, Fitting, NumaPlace, PageSize, PciAddress, Spec},
};

use super::{
    filter::Lack,
    view::{HostView, Request},
};

/// Bytes in a MiB.
const MIB: u64 = 1 << 20;
/// Ratios are meant in decimals: 100 * 0.29 is 28.999…96 in binary.
const ROUNDING: f64 = 1e-9;
/// Logical processors that are never dedicated, for the host itself and QEMU's own threads.
const KEPT_CPUS: u32 = 1;

/// What a host has by name.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parts<'a> {
    /// NUMA nodes.
    pub nodes: Cow<'a, [NumaNode]>,
    /// Uplinks of bridges.
    pub uplinks: Cow<'a, [Uplink]>,
    /// PCI devices that are named for VMs.
    pub devices: Cow<'a, [PciDevice]>,
    /// What VMs have of it.
    pub taken: Cow<'a, Taken>,
}

/// What VMs have of a host's parts, incoming ones too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Taken {
    /// Logical processors that are a VM's own; of how many, which is one unless a restored store is behind.
    cpus: BTreeMap<u32, u64>,
    nodes: BTreeMap<u32, OnNode>,
    /// Mbit per second on the uplink of each bridge.
    mbit: BTreeMap<String, u64>,
    /// PCI devices; of how many VMs, which is one as with processors.
    devices: BTreeMap<PciAddress, u64>,
}

/// What VMs that are fitted have on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct OnNode {
    /// Virtual processors that share the node's.
    vcpus: u64,
    memory_mib: u64,
    mib2_mib: u64,
    gib1_mib: u64,
}

impl OnNode {
    fn pages_mib(&mut self, pages: PageSize) -> &mut u64 {
        match pages {
            PageSize::Mib2 => &mut self.mib2_mib,
            PageSize::Gib1 => &mut self.gib1_mib,
        }
    }
}

/// Adds to what is kept under a key, or takes away; what is nothing is not kept.
fn change<K: Ord, V: Default + PartialEq>(of: &mut BTreeMap<K, V>, key: K, by: impl FnOnce(&mut V)) {
    let mut entry = match of.entry(key) {
        Entry::Occupied(entry) => entry,
        Entry::Vacant(entry) => entry.insert_entry(V::default()),
    };
    by(entry.get_mut());
    if *entry.get() == V::default() {
        entry.remove();
    }
}

impl Taken {
    /// Notes what a VM has at these places, or that it has it no more.
    pub fn change(&mut self, spec: &Spec, places: &[NumaPlace], add: bool) {
        let apply = |value: &mut u64, by: u64| {
            *value = match add {
                true => value.saturating_add(by),
                false => value.saturating_sub(by),
            }
        };
        let part = Part::of(spec);
        for place in places {
            for cpu in &place.cpus {
                change(&mut self.cpus, *cpu, |vms| apply(vms, 1));
            }
            change(&mut self.nodes, place.node, |node| {
                if place.cpus.is_empty() {
                    apply(&mut node.vcpus, part.vcpus.into());
                }
                match part.pages {
                    Some(pages) => apply(node.pages_mib(pages), part.pages_mib),
                    None => apply(&mut node.memory_mib, part.memory_mib),
                }
            });
        }
        for (bridge, mbit) in spec.bandwidth() {
            change(&mut self.mbit, bridge.to_owned(), |sum| apply(sum, mbit));
        }
    }

    /// Notes which PCI devices a VM has, or that it has them no more.
    pub fn change_devices(&mut self, devices: &[Device], add: bool) {
        for device in devices {
            change(&mut self.devices, device.address, |vms| {
                *vms = match add {
                    true => vms.saturating_add(1),
                    false => vms.saturating_sub(1),
                }
            });
        }
    }

    /// Whether a PCI device is a VM's.
    pub fn has_device(&self, address: PciAddress) -> bool {
        self.devices.contains_key(&address)
    }

    /// Takes a PCI device from whoever has it.
    pub(super) fn free_device(&mut self, address: PciAddress) {
        self.devices.remove(&address);
    }

    /// Logical processors that are VMs' own.
    pub fn dedicated(&self) -> u32 {
        u32::try_from(self.cpus.len()).unwrap_or(u32::MAX)
    }

    /// These processors, ascending.
    pub fn cpus(&self) -> impl Iterator<Item = u32> {
        self.cpus.keys().copied()
    }

    /// Virtual processors of VMs that are fitted onto a node and share its processors.
    pub fn vcpus(&self, node: u32) -> u64 {
        self.nodes.get(&node).map_or(0, |node| node.vcpus)
    }

    /// Ordinary memory of VMs that are fitted onto a node.
    pub fn memory_mib(&self, node: u32) -> u64 {
        self.nodes.get(&node).map_or(0, |node| node.memory_mib)
    }

    /// Memory in huge pages of a size on a node.
    pub fn pages_mib(&self, node: u32, pages: PageSize) -> u64 {
        self.nodes
            .get(&node)
            .map_or(0, |node| *node.clone().pages_mib(pages))
    }

    /// What is reserved on the uplink of a bridge, in Mbit per second.
    pub fn mbit(&self, bridge: &str) -> u64 {
        self.mbit.get(bridge).copied().unwrap_or(0)
    }

    /// Gives back what is reserved on the uplink of a bridge.
    pub(super) fn free_mbit(&mut self, bridge: &str, mbit: u64) {
        change(&mut self.mbit, bridge.to_owned(), |sum| {
            *sum = sum.saturating_sub(mbit);
        });
    }
}

/// Virtual processors that dedicated ones are counted as, where each logical processor could have had so many; never fewer than they are.
pub fn charged(dedicated: u32, ratio: f64) -> u32 {
    rounded((f64::from(dedicated) * ratio.max(1.0) - ROUNDING).ceil())
}

fn rounded(value: f64) -> u32 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to the range of u32"
    )]
    let rounded = value.clamp(0.0, f64::from(u32::MAX)) as u32;
    rounded
}

/// One of the equal parts of a VM.
struct Part {
    vcpus: u32,
    memory_mib: u64,
    pages: Option<PageSize>,
    pages_mib: u64,
}

impl Part {
    fn of(spec: &Spec) -> Self {
        let nodes = spec.fitting.nodes().max(1);
        Self {
            vcpus: spec.vcpus.div_ceil(nodes),
            memory_mib: spec.reserved_memory_mib().div_ceil(nodes.into()),
            pages: spec.fitting.pages,
            pages_mib: match spec.fitting.pages {
                Some(_) => spec.memory_mib.div_ceil(nodes.into()),
                None => 0,
            },
        }
    }

    fn fits(&self, room: &Room) -> bool {
        self.vcpus <= room.vcpus
            && match self.pages {
                Some(_) => self.pages_mib <= room.pages_mib,
                None => self.memory_mib <= room.memory_mib,
            }
    }
}

/// What a node still has for a part.
#[derive(Debug, Clone, Copy)]
struct Room<'a> {
    node: &'a NumaNode,
    vcpus: u32,
    memory_mib: u64,
    pages_mib: u64,
}

impl<'a> Room<'a> {
    fn of(node: &'a NumaNode, host: &HostView<'_>, fitting: Fitting, all_mib: u64) -> Self {
        let taken = &host.parts.taken;
        let mut on = taken.nodes.get(&node.id).copied().unwrap_or_default();
        let free = node.cpus.iter().filter(|cpu| !taken.cpus.contains_key(cpu));
        let free = u32::try_from(free.count()).unwrap_or(u32::MAX);
        let ratio = host.cpu_overcommit_ratio;
        let vcpus = match fitting.is_dedicated() {
            // Those that share the node must go on to have enough of it.
            true => {
                let shared = f64::from(u32::try_from(on.vcpus).unwrap_or(u32::MAX));
                free.saturating_sub(rounded((shared / ratio - ROUNDING).ceil()))
            }
            false => {
                let most = rounded((f64::from(free) * ratio + ROUNDING).floor());
                let shared = u32::try_from(on.vcpus).unwrap_or(u32::MAX);
                most.saturating_sub(shared).min(free)
            }
        };
        let memory_mib = node.memory_bytes / MIB;
        let huge: u64 = node
            .huge_pages
            .iter()
            .map(|pages| pages.total.saturating_mul(pages.page_size_bytes) / MIB)
            .sum();
        // The host keeps its own share of each node.
        let kept = u128::from(host.reserved_memory_mib) * u128::from(memory_mib);
        let kept = u64::try_from(kept.div_ceil(u128::from(all_mib.max(1)))).unwrap_or(u64::MAX);
        let pages_mib = fitting.pages.map_or(0, |pages| {
            let bytes = pages.kib() << 10;
            let there = node
                .huge_pages
                .iter()
                .find(|known| known.page_size_bytes == bytes);
            let set_aside = there.map_or(0, |known| known.total.saturating_mul(pages.mib()));
            set_aside.saturating_sub(*on.pages_mib(pages))
        });
        Self {
            node,
            vcpus,
            memory_mib: memory_mib
                .saturating_sub(huge)
                .saturating_sub(kept)
                .saturating_sub(on.memory_mib),
            pages_mib,
        }
    }
}

fn rooms<'a>(host: &'a HostView<'_>, fitting: Fitting) -> Vec<Room<'a>> {
    let nodes = &host.parts.nodes;
    let all_mib = nodes.iter().map(|node| node.memory_bytes / MIB).sum();
    nodes
        .iter()
        .map(|node| Room::of(node, host, fitting, all_mib))
        .collect()
}

/// Processors that can still be dedicated on a host, wherever they are.
fn dedicable(host: &HostView<'_>) -> u32 {
    let taken = host.parts.taken.dedicated();
    let most = host.cpus.saturating_sub(KEPT_CPUS).saturating_sub(taken);
    // Those that share the host must go on to have enough of it.
    let ratio = host.cpu_overcommit_ratio;
    let free = host.vcpus_free().saturating_add(charged(taken, ratio));
    let by_ratio = rounded((f64::from(free) / ratio.max(1.0) + ROUNDING).floor());
    most.min(by_ratio.saturating_sub(taken))
}

/// What enough nodes have each, times their number: parts of that size find room.
fn of_the_best<V: Ord + Copy + Default>(
    rooms: &[Room<'_>],
    nodes: usize,
    value: impl Fn(&Room<'_>) -> V,
) -> V {
    let mut values: Vec<V> = rooms.iter().map(value).collect();
    values.sort_unstable_by(|a, b| b.cmp(a));
    values.get(nodes.saturating_sub(1)).copied().unwrap_or_default()
}

/// Finds what a host lacks for a VM that is fitted onto nodes.
pub(super) fn lacks<'a>(request: &'a Request, host: &'a HostView<'_>, found: &mut Vec<Lack<'a>>) {
    let (spec, fitting) = (&request.spec, request.spec.fitting);
    let nodes = fitting.nodes();
    let count = usize::try_from(nodes).unwrap_or(usize::MAX);
    let rooms = rooms(host, fitting);
    if rooms.len() < count {
        return found.push(Lack::Nodes {
            needed: nodes,
            found: u32::try_from(rooms.len()).unwrap_or(u32::MAX),
            all: false,
        });
    }
    let before = found.len();
    let dedicated = fitting.is_dedicated();
    let mut free = of_the_best(&rooms, count, |room| room.vcpus).saturating_mul(nodes);
    if dedicated {
        free = free.min(dedicable(host));
    }
    if spec.vcpus > free {
        found.push(Lack::NodeVcpus {
            dedicated,
            nodes,
            needed: spec.vcpus,
            free,
        });
    }
    match fitting.pages {
        Some(pages) => {
            let free = of_the_best(&rooms, count, |room| room.pages_mib).saturating_mul(nodes.into());
            if spec.memory_mib > free {
                found.push(Lack::HugePages {
                    pages,
                    nodes,
                    needed: spec.memory_mib,
                    free,
                });
            }
        }
        None => {
            let free = of_the_best(&rooms, count, |room| room.memory_mib).saturating_mul(nodes.into());
            let needed = spec.reserved_memory_mib();
            if needed > free {
                found.push(Lack::NodeMemory { nodes, needed, free });
            }
        }
    }
    if found.len() == before {
        let part = Part::of(spec);
        let fitting = rooms.iter().filter(|room| part.fits(room)).count();
        if fitting < count {
            found.push(Lack::Nodes {
                needed: nodes,
                found: u32::try_from(fitting).unwrap_or(u32::MAX),
                all: true,
            });
        }
    }
}

/// Where on a host a VM is to be: nowhere in particular, where it does not ask for that, or the host has no room for it.
pub fn fit(spec: &Spec, host: &HostView<'_>) -> Vec<NumaPlace> {
    let fitting = spec.fitting;
    let count = usize::try_from(fitting.nodes()).unwrap_or(usize::MAX);
    if fitting.is_none() {
        return Vec::new();
    }
    let part = Part::of(spec);
    let mut rooms = rooms(host, fitting);
    rooms.retain(|room| part.fits(room));
    if rooms.len() < count {
        return Vec::new();
    }
    rooms.sort_by_key(|room| (room.vcpus, room.pages_mib, room.memory_mib, room.node.id));
    rooms.truncate(count);
    rooms.sort_by_key(|room| room.node.id);
    let taken = &host.parts.taken.cpus;
    let own = |node: &NumaNode| match fitting.is_dedicated() {
        false => Vec::new(),
        true => choose_cpus(
            node,
            |cpu| !taken.contains_key(&cpu),
            usize::try_from(part.vcpus).unwrap_or(usize::MAX),
        ),
    };
    let place = |room: &Room<'_>| NumaPlace {
        node: room.node.id,
        cpus: own(room.node),
    };
    rooms.iter().map(place).collect()
}

/// So many processors of those that are free, ascending: whole cores first, the lowest; what is left over goes to a core that is begun, so that
/// others stay whole. Where cores are not known each processor is one.
fn choose_cpus(node: &NumaNode, is_free: impl Fn(u32) -> bool, count: usize) -> Vec<u32> {
    let mut cores: BTreeMap<u32, (usize, Vec<u32>)> = BTreeMap::new();
    for (index, cpu) in node.cpus.iter().enumerate() {
        let core = node.cores.get(index).unwrap_or(cpu);
        let (threads, free) = cores.entry(*core).or_default();
        *threads += 1;
        free.extend(Some(*cpu).filter(|cpu| is_free(*cpu)));
    }
    let (whole, begun): (Vec<_>, Vec<_>) = cores
        .into_values()
        .partition(|(threads, free)| free.len() == *threads);
    let (mut chosen, mut split) = (Vec::new(), Vec::new());
    for (_, free) in whole {
        match chosen.len() + free.len() <= count {
            true => chosen.extend(free),
            false => split.extend(free),
        }
    }
    let rest = begun.into_iter().flat_map(|(_, free)| free).chain(split);
    chosen.extend(rest.take(count - chosen.len()));
    chosen.sort_unstable();
    chosen
}

/// How often a VM of one size fits on a host, up to so many times: each takes its parts from what is left.
pub(super) fn times(request: &Request, host: &HostView<'_>, most: u64) -> u64 {
    let mut host = host.clone();
    let mut vms = 0;
    while vms < most && super::filter::lacks(request, &host).is_empty() {
        let places = fit(&request.spec, &host);
        host.reserve(&request.spec, &places);
        vms += 1;
    }
    vms
}

#[cfg(test)]
mod tests;
