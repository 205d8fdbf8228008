//! Which logical processors and NUMA nodes of the host a domain runs on: as its definition says, and of domains that run, as they are told.
//!
//! A VM with processors of its own has each virtual one pinned to its logical one; one that is only fitted onto nodes, to those of its
//! node that are nobody's own. QEMU's own threads, and domains that are not fitted at all, stay off the processors that are a VM's own: their
//! set changes as such VMs come and go, so that it is not in their definitions but is told to what runs ([`apply`]).
//!
//! Memory in huge pages is bound to the node strictly, as its pages are counted there. Ordinary memory is preferred there: VMs that are not
//! fitted use memory of any node, and a guest that finds none on its own must not end for that.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dalgu_proto::{
    ids::{ClusterId, VmId},
    vm::{NumaPlace, PageSize, Spec},
};
use virt::connect::Connect;
use virt_sys as sys;

use super::{
    backup::is_backup,
    domain,
    error::{is_no_domain, is_wrong_state, of},
    ffi,
    tree::{Element, Node, XmlError},
};
use crate::{
    host::{Root, node_cpus, number_list, online_cpus},
    hypervisor::{DomainState, Error},
};

/// Where a domain's parts are on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinning {
    /// Of each virtual processor, the logical ones that it may run on.
    pub vcpus: Vec<Vec<u32>>,
    /// The host's node of each of the guest's.
    pub nodes: Vec<u32>,
    /// The logical processors for QEMU's own threads; none for any.
    pub emulator: Vec<u32>,
    /// What its memory is made of; `None` for ordinary memory.
    pub pages: Option<PageSize>,
}

impl Pinning {
    /// Only the processors that are the VM's own at these places.
    pub(super) fn own(mut self, places: &[NumaPlace]) -> Self {
        self.emulator.clear();
        if places.iter().all(|place| place.cpus.is_empty()) {
            self.vcpus.iter_mut().for_each(Vec::clear);
        }
        self
    }
}

/// Fitted VMs, and where they are.
pub(super) type Places = BTreeMap<VmId, Vec<NumaPlace>>;

/// Logical processors that are a VM's own.
fn own(places: &Places) -> BTreeSet<u32> {
    let places = places.values().flatten();
    places.flat_map(|place| &place.cpus).copied().collect()
}

/// Without those that are a VM's own; all, where nothing would be left.
fn shared(cpus: Vec<u32>, own: &BTreeSet<u32>) -> Vec<u32> {
    let left: Vec<u32> = cpus.iter().filter(|cpu| !own.contains(cpu)).copied().collect();
    if left.is_empty() { cpus } else { left }
}

impl Pinning {
    /// Where a VM is to be that has these places; `known` are those of all VMs of the host.
    pub(super) fn of(spec: &Spec, places: &[NumaPlace], known: &Places, host: &Root) -> Option<Self> {
        if places.is_empty() {
            return None;
        }
        let own = own(known);
        let each = usize::try_from(spec.vcpus)
            .unwrap_or(usize::MAX)
            .div_ceil(places.len());
        let pins = |place: &NumaPlace| -> Vec<Vec<u32>> {
            match place.cpus.is_empty() {
                true => vec![shared(node_cpus(host, place.node), &own); each],
                false => place.cpus.iter().map(|cpu| vec![*cpu]).collect(),
            }
        };
        Some(Self {
            vcpus: places.iter().flat_map(pins).collect(),
            nodes: places.iter().map(|place| place.node).collect(),
            emulator: shared(online_cpus(host), &own),
            pages: spec.fitting.pages,
        })
    }

    const fn mode(&self) -> &'static str {
        match self.pages {
            Some(_) => "strict",
            None => "preferred",
        }
    }

    pub(super) fn memory_backing(&self) -> Option<Element> {
        let page = Element::new("page")
            .with("size", self.pages?.kib())
            .with("unit", "KiB");
        Some(Element::new("memoryBacking").child(Element::new("hugepages").child(page)))
    }

    pub(super) fn cpu_tune(&self) -> Element {
        let pin = |(vcpu, cpus): (usize, &Vec<u32>)| {
            Element::new("vcpupin")
                .with("vcpu", vcpu)
                .with("cpuset", listed(cpus))
        };
        let emulator = Element::new("emulatorpin").with("cpuset", listed(&self.emulator));
        Element::new("cputune")
            .all(
                self.vcpus
                    .iter()
                    .enumerate()
                    .filter(|(_, cpus)| !cpus.is_empty())
                    .map(pin),
            )
            .all((!self.emulator.is_empty()).then_some(emulator))
    }

    pub(super) fn numa_tune(&self) -> Element {
        let of = |name: &str, node: &u32| Element::new(name).with("mode", self.mode()).with("nodeset", node);
        let tune = Element::new("numatune");
        match self.nodes.as_slice() {
            [only] => tune.child(of("memory", only)),
            nodes => tune.all(
                nodes
                    .iter()
                    .enumerate()
                    .map(|(cell, node)| of("memnode", node).with("cellid", cell)),
            ),
        }
    }

    /// The nodes that the guest sees, where it sees more than one.
    pub(super) fn guest_nodes(&self, vcpus: u32, memory_mib: u64) -> Option<Element> {
        let nodes = u32::try_from(self.nodes.len()).ok().filter(|nodes| *nodes > 1)?;
        let each = vcpus.div_ceil(nodes);
        let cell = |id: u32| {
            Element::new("cell")
                .with("id", id)
                .with("cpus", format!("{}-{}", id * each, (id + 1) * each - 1))
                .with("memory", memory_mib / u64::from(nodes))
                .with("unit", "MiB")
        };
        Some(Element::new("numa").all((0..nodes).map(cell)))
    }

    /// Reads it from a domain that Dalgu made.
    pub(super) fn read(domain: &Element) -> Option<Self> {
        let tune = domain.at(&["numatune"])?;
        let node = |element: &Element| element.attribute("nodeset")?.parse().ok();
        let nodes: Vec<u32> = tune
            .each("memory")
            .chain(tune.each("memnode"))
            .filter_map(node)
            .collect();
        let cpus = |element: &Element| number_list(element.attribute("cpuset").unwrap_or_default());
        let pins = domain.at(&["cputune"])?;
        let size = domain.at(&["memoryBacking", "hugepages", "page"]);
        let size = size.and_then(|page| page.attribute("size"));
        let pages = [PageSize::Mib2, PageSize::Gib1];
        Some(Self {
            vcpus: pins.each("vcpupin").map(cpus).collect(),
            nodes,
            emulator: pins.at(&["emulatorpin"]).map(cpus).unwrap_or_default(),
            pages: pages
                .into_iter()
                .find(|pages| size == Some(&pages.kib().to_string())),
        })
    }
}

/// The kernel's way to write a set of numbers.
fn listed(numbers: &[u32]) -> String {
    let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    numbers.join(",")
}

/// The same domain at other places of another host; everything else stays as libvirt wrote it.
///
/// # Errors
/// If it is not well-formed.
pub fn with_pinning(xml: &str, pinning: Option<&Pinning>) -> Result<String, XmlError> {
    let mut domain = Element::parse(xml)?;
    let here = |child: &Node| match child {
        Node::Element(element) => matches!(element.name.as_str(), "cputune" | "numatune"),
        Node::Text(_) => false,
    };
    domain.children.retain(|child| !here(child));
    if let Some(vcpu) = domain.elements_mut().find(|element| element.name == "vcpu") {
        vcpu.attributes.retain(|(name, _)| name != "cpuset");
    }
    if let Some(pinning) = pinning {
        domain = domain.child(pinning.cpu_tune()).child(pinning.numa_tune());
    }
    domain.to_xml()
}

/// What running domains were told last: which run of them, and which processors.
pub(super) type Applied = HashMap<VmId, (u32, Vec<Vec<u32>>)>;

fn map(cpus: &[u32]) -> Vec<u8> {
    let mut map = vec![0_u8; cpus.iter().max().map_or(0, |most| *most as usize / 8 + 1)];
    for cpu in cpus {
        map[*cpu as usize / 8] |= 1 << (cpu % 8);
    }
    map
}

/// Keeps what runs off the processors that are a VM's own, where it is not that VM.
pub(super) fn apply(
    connect: &Connect,
    cluster: ClusterId,
    places: &Places,
    applied: &mut Applied,
    host: &Root,
) -> Result<(), Error> {
    let (own, all) = (own(places), online_cpus(host));
    let rest = shared(all, &own);
    let domains = domain::list(connect, cluster)?;
    applied.retain(|id, _| domains.iter().any(|domain| domain.id == *id));
    let ours = domains.iter().filter(|domain| domain.mark.is_some());
    let mut failed = Ok(());
    let up = ours.filter(|domain| matches!(domain.state, DomainState::Running | DomainState::Paused));
    for seen in up {
        let vcpus = usize::try_from(seen.vcpus).unwrap_or_default();
        let pins = match places.get(&seen.id) {
            None => vec![rest.clone(); vcpus],
            Some(places) => {
                let each = vcpus.div_ceil(places.len().max(1));
                let of = |place: &NumaPlace| match place.cpus.is_empty() {
                    true => vec![shared(node_cpus(host, place.node), &own); each],
                    false => place.cpus.iter().map(|cpu| vec![*cpu]).collect(),
                };
                places.iter().flat_map(of).collect()
            }
        };
        match tell(connect, seen.id, pins, &rest, applied) {
            // It ended meanwhile.
            Err(error) if is_no_domain(&error) || is_wrong_state(&error) => {}
            // The others are told all the same.
            Err(error) => failed = Err(of("pin", seen.id, &error)),
            Ok(()) => {}
        }
    }
    failed
}

fn tell(
    connect: &Connect,
    id: VmId,
    mut pins: Vec<Vec<u32>>,
    rest: &[u32],
    applied: &mut Applied,
) -> Result<(), virt::error::Error> {
    let handle = connect.lookup_domain_by_uuid(id.uuid())?;
    let run = handle.id().unwrap_or_default();
    pins.push(rest.to_vec());
    let told = (run, pins);
    // One that is being sent takes no orders until that has ended.
    if applied.get(&id) == Some(&told)
        || ffi::job_stats(&handle).is_ok_and(|(kind, params)| kind != 0 && !is_backup(&params))
    {
        return Ok(());
    }
    let live = sys::VIR_DOMAIN_AFFECT_LIVE;
    let (emulator, vcpus) = told.1.split_last().unwrap_or((&told.1[0], &[]));
    for (vcpu, cpus) in (0_u32..).zip(vcpus).filter(|(_, cpus)| !cpus.is_empty()) {
        handle.pin_vcpu_flags(vcpu, &map(cpus), live)?;
    }
    if !emulator.is_empty() {
        handle.pin_emulator(&map(emulator), live)?;
    }
    applied.insert(id, told);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_processors_has_a_bit_for_each() {
        assert_eq!(map(&[]), [0_u8; 0]);
        assert_eq!(map(&[0]), [1]);
        assert_eq!(map(&[1, 8, 15]), [2, 0x81]);
    }

    #[test]
    fn what_is_not_a_vms_own_is_for_all_others() {
        let places = Places::from([(
            VmId::from_uuid(uuid::Uuid::nil()),
            vec![NumaPlace {
                node: 0,
                cpus: vec![1, 2],
            }],
        )]);
        assert_eq!(shared(vec![0, 1, 2, 3], &own(&places)), [0, 3]);
        // A host whose processors have gone goes on as it can.
        assert_eq!(shared(vec![1, 2], &own(&places)), [1, 2]);
    }

    #[test]
    fn a_domain_that_moves_is_where_its_destination_has_room_and_no_more_where_it_was() {
        let live = "<domain type=\"kvm\"><vcpu placement=\"static\" cpuset=\"0-3\">2</vcpu><cputune><vcpupin vcpu=\"0\" cpuset=\"7\"/>\
                    </cputune><numatune><memory mode=\"strict\" nodeset=\"1\"/></numatune><name>a</name></domain>";
        assert_eq!(
            with_pinning(live, None).unwrap(),
            "<domain type=\"kvm\"><vcpu placement=\"static\">2</vcpu><name>a</name></domain>"
        );
        let pinning = Pinning {
            vcpus: vec![vec![2], vec![3]],
            nodes: vec![0],
            emulator: vec![0, 1],
            pages: Some(PageSize::Mib2),
        };
        let moved = with_pinning(live, Some(&pinning)).unwrap();
        assert!(!moved.contains("\"7\""), "{moved}");
        let read = Pinning::read(&Element::parse(&moved).unwrap()).unwrap();
        assert_eq!(
            (read.vcpus, read.nodes, read.emulator),
            (pinning.vcpus, pinning.nodes, pinning.emulator)
        );
    }
}
