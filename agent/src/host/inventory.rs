//! What the host is made of: processors, memory, NUMA nodes, huge pages, bridges, kernel.
//!
//! Read at the agent's start and now and then after it; processors, memory and bridges can come and go.

use std::collections::BTreeSet;

use dalgu_proto::host::{Inventory, NumaNode};

use super::{
    Error, Root,
    memory::{huge_pages, pages_in, total_bytes},
    nic::{bridges, uplinks},
    root::number_list,
};

/// Where the kernel tells of NUMA nodes.
const NODES: &str = "sys/devices/system/node";

/// The inventory without pools and without what only the hypervisor knows.
///
/// # Errors
/// When /proc cannot be read or is of another form than documented.
pub fn read(root: &Root) -> Result<Inventory, Error> {
    let cpuinfo = root.text("proc/cpuinfo")?;
    let memory_bytes = total_bytes(root)?;
    let online = online_cpus(root, &cpuinfo);
    let (cores, sockets) = topology(root, &online);
    Ok(Inventory {
        cpu_model: cpu_model(&cpuinfo),
        cpus: count(online.len()),
        cores: count(cores),
        sockets: count(sockets),
        memory_bytes,
        numa_nodes: numa_nodes(root, &online, memory_bytes),
        huge_pages: huge_pages(root),
        bridges: bridges(root),
        uplinks: uplinks(root),
        kernel: root.word("proc/sys/kernel/osrelease").unwrap_or_default(),
        architecture: std::env::consts::ARCH.to_owned(),
        ..Inventory::default()
    })
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Values of a key in /proc/cpuinfo, one for each processor that has it.
fn cpuinfo_values<'a>(cpuinfo: &'a str, key: &str) -> impl Iterator<Item = &'a str> {
    cpuinfo.lines().filter_map(move |line| {
        let (name, value) = line.split_once(':')?;
        (name.trim_end() == key).then(|| value.trim())
    })
}

/// x86 names its model. Arm has numbers only: the maker and the part.
fn cpu_model(cpuinfo: &str) -> String {
    let first = |key| cpuinfo_values(cpuinfo, key).find(|value| !value.is_empty());
    if let Some(model) = ["model name", "cpu model", "cpu"].into_iter().find_map(first) {
        return model.to_owned();
    }
    match (first("CPU implementer"), first("CPU part")) {
        (Some(maker), Some(part)) => format!("implementer {maker} part {part}"),
        _ => std::env::consts::ARCH.to_owned(),
    }
}

/// Numbers of the processors that are online.
fn online_cpus(root: &Root, cpuinfo: &str) -> Vec<u32> {
    let online = number_list(&root.word("sys/devices/system/cpu/online").unwrap_or_default());
    if online.is_empty() {
        return cpuinfo_values(cpuinfo, "processor")
            .filter_map(|number| number.parse().ok())
            .collect();
    }
    online
}

/// Physical cores and packages. A kernel that does not tell has every processor as its own core in one package.
fn topology(root: &Root, online: &[u32]) -> (usize, usize) {
    let (mut cores, mut sockets) = (BTreeSet::new(), BTreeSet::new());
    for cpu in online {
        let topology = format!("sys/devices/system/cpu/cpu{cpu}/topology");
        cores.insert(core(root, *cpu));
        // -1: not told.
        let package: i64 = root
            .number(format!("{topology}/physical_package_id"))
            .unwrap_or(0);
        sockets.insert(package.max(0));
    }
    (cores.len(), sockets.len())
}

/// The lowest thread of a processor's core. The threads of a core list the same siblings. (core_id alone repeats in every package, and on
/// some processors in every die.)
fn core(root: &Root, cpu: u32) -> u32 {
    let siblings = root.word(format!(
        "sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    ));
    let siblings = siblings.map(|list| number_list(&list)).unwrap_or_default();
    siblings.into_iter().min().unwrap_or(cpu)
}

/// The logical processors of a node, ascending; of one that the kernel does not know, all that are online.
pub fn node_cpus(root: &Root, node: u32) -> Vec<u32> {
    let online = online(root);
    let cpus = root
        .word(format!("{NODES}/node{node}/cpulist"))
        .unwrap_or_default();
    let cpus: Vec<u32> = number_list(&cpus)
        .into_iter()
        .filter(|cpu| online.contains(cpu))
        .collect();
    if cpus.is_empty() { online } else { cpus }
}

/// The logical processors that are online, ascending.
pub fn online(root: &Root) -> Vec<u32> {
    online_cpus(root, &root.text("proc/cpuinfo").unwrap_or_default())
}

/// NUMA nodes by number; one that holds everything where the kernel knows of none.
fn numa_nodes(root: &Root, online: &[u32], memory_bytes: u64) -> Vec<NumaNode> {
    let mut nodes: Vec<_> = root
        .names(NODES)
        .iter()
        .filter_map(|name| {
            let id = name.strip_prefix("node")?.parse().ok()?;
            let read = |file: &str| root.word(format!("{NODES}/{name}/{file}")).unwrap_or_default();
            let mut cpus = number_list(&read("cpulist"));
            cpus.retain(|cpu| online.contains(cpu));
            Some(NumaNode {
                huge_pages: pages_in(root, &format!("{NODES}/{name}/hugepages")),
                id,
                cores: cpus.iter().map(|cpu| core(root, *cpu)).collect(),
                cpus,
                memory_bytes: node_memory_bytes(&read("meminfo")).unwrap_or(0),
                distances: read("distance")
                    .split_ascii_whitespace()
                    .filter_map(|number| number.parse().ok())
                    .collect(),
            })
        })
        .collect();
    nodes.sort_by_key(|node| node.id);
    match nodes.as_mut_slice() {
        [] => nodes.push(NumaNode {
            id: 0,
            cpus: online.to_vec(),
            cores: online.iter().map(|cpu| core(root, *cpu)).collect(),
            memory_bytes,
            distances: vec![10],
            huge_pages: huge_pages(root),
        }),
        // A single node has all the memory, also the part that was plugged in later and that the node's own count
        // can miss.
        [only] => only.memory_bytes = memory_bytes,
        _ => {}
    }
    nodes
}

/// `Node 0 MemTotal:        5597388 kB`
fn node_memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.contains(" MemTotal:"))?;
    let kib: u64 = line
        .split_once("MemTotal:")?
        .1
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::{
        super::root::fake::{MEMINFO, Tree},
        *,
    };

    /// Two packages of two cores of two threads, a node each, and a node of memory only.
    fn server() -> Tree {
        let tree = Tree::new();
        tree.write("proc/meminfo", MEMINFO)
            .write(
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: Big CPU @ 3: GHz\n\nprocessor\t: 1\nmodel name\t: other\n",
            )
            .write("proc/sys/kernel/osrelease", "6.1.0-17-amd64\n")
            .write("sys/devices/system/cpu/online", "0-7\n")
            .write("sys/class/net/br0/bridge/bridge_id", "8000")
            .write("sys/class/net/br1/bridge/bridge_id", "8000")
            .write("sys/class/net/eno1/speed", "1000");
        for cpu in 0..8 {
            let topology = format!("sys/devices/system/cpu/cpu{cpu}/topology");
            let core = cpu % 4;
            tree.write(
                &format!("{topology}/thread_siblings_list"),
                &format!("{core},{}\n", core + 4),
            )
            .write(&format!("{topology}/core_id"), &format!("{}\n", core % 2))
            .write(
                &format!("{topology}/physical_package_id"),
                &format!("{}\n", core / 2),
            );
        }
        for (node, cpus, kib, distances) in [
            (0, "0-1,4-5", 1024, "10 21 30"),
            (1, "2-3,6-7", 2048, "21 10 30"),
            (10, "", 4096, "30 30 10"),
        ] {
            let directory = format!("sys/devices/system/node/node{node}");
            tree.write(&format!("{directory}/cpulist"), &format!("{cpus}\n"))
                .write(
                    &format!("{directory}/meminfo"),
                    &format!("Node {node} MemTotal:   {kib} kB\nNode {node} MemFree: 1 kB\n"),
                )
                .write(&format!("{directory}/distance"), &format!("{distances}\n"));
        }
        tree
    }

    #[test]
    fn a_server_with_two_packages_and_three_nodes_is_read() {
        let inventory = read(&server().root()).unwrap();
        assert_eq!(inventory.cpu_model, "Big CPU @ 3: GHz");
        assert_eq!((inventory.cpus, inventory.cores, inventory.sockets), (8, 4, 2));
        assert_eq!(inventory.memory_bytes, 24_684_084 * 1024);
        assert_eq!(inventory.bridges, ["br0", "br1"]);
        assert_eq!(inventory.kernel, "6.1.0-17-amd64");
        assert_eq!(
            inventory.numa_nodes,
            [
                NumaNode {
                    id: 0,
                    cpus: vec![0, 1, 4, 5],
                    cores: vec![0, 1, 0, 1],
                    memory_bytes: 1 << 20,
                    distances: vec![10, 21, 30],
                    ..NumaNode::default()
                },
                NumaNode {
                    id: 1,
                    cpus: vec![2, 3, 6, 7],
                    cores: vec![2, 3, 2, 3],
                    memory_bytes: 2 << 20,
                    distances: vec![21, 10, 30],
                    ..NumaNode::default()
                },
                NumaNode {
                    id: 10,
                    cpus: vec![],
                    memory_bytes: 4 << 20,
                    distances: vec![30, 30, 10],
                    ..NumaNode::default()
                },
            ]
        );
    }

    #[test]
    fn huge_pages_are_told_of_each_node() {
        let tree = server();
        for (node, total) in [(0, 3), (1, 5)] {
            let directory = format!("{NODES}/node{node}/hugepages/hugepages-2048kB");
            tree.write(&format!("{directory}/nr_hugepages"), &format!("{total}\n"))
                .write(&format!("{directory}/free_hugepages"), "1\n");
        }
        let inventory = read(&tree.root()).unwrap();
        let of = |node: usize| {
            inventory.numa_nodes[node]
                .huge_pages
                .first()
                .map(|pages| pages.total)
        };
        assert_eq!((of(0), of(1), of(2)), (Some(3), Some(5), None));
        assert_eq!(node_cpus(&tree.root(), 1), [2, 3, 6, 7]);
        assert_eq!(node_cpus(&tree.root(), 7), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn processors_switched_off_are_in_no_count_and_no_node() {
        let tree = server();
        tree.write("sys/devices/system/cpu/online", "0-2\n");
        let inventory = read(&tree.root()).unwrap();
        assert_eq!((inventory.cpus, inventory.cores, inventory.sockets), (3, 3, 2));
        assert_eq!(inventory.numa_nodes[1].cpus, [2]);
    }

    #[test]
    fn a_kernel_without_topology_has_one_node_with_everything() {
        let tree = Tree::new();
        tree.write("proc/meminfo", MEMINFO).write(
            "proc/cpuinfo",
            "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0c\n\nprocessor : 1\n",
        );
        let inventory = read(&tree.root()).unwrap();
        assert_eq!((inventory.cpus, inventory.cores, inventory.sockets), (2, 2, 1));
        assert_eq!(inventory.cpu_model, "implementer 0x41 part 0xd0c");
        let everything = NumaNode {
            id: 0,
            cpus: vec![0, 1],
            cores: vec![0, 1],
            memory_bytes: inventory.memory_bytes,
            distances: vec![10],
            ..NumaNode::default()
        };
        assert_eq!(inventory.numa_nodes, [everything]);
        assert!(inventory.bridges.is_empty());
    }

    #[test]
    fn a_single_node_has_all_the_memory() {
        let tree = server();
        tree.remove("sys/devices/system/node/node1")
            .remove("sys/devices/system/node/node10");
        let inventory = read(&tree.root()).unwrap();
        assert_eq!(inventory.numa_nodes.len(), 1);
        assert_eq!(inventory.numa_nodes[0].memory_bytes, inventory.memory_bytes);
    }
}
