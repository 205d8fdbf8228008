//! The independent view: what `virsh`, `/proc` and the file systems of the hosts say is there, and whether that is
//! what Dalgu says. Nothing here asks an agent, and nothing changes anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::words::{self, Vm, number_at};
use crate::lab::Lab;

/// A domain that `virsh` lists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Domain {
    /// Number of the host.
    pub host: u8,
    /// Its name.
    pub name: String,
    /// In virsh's words: `running`, `paused`, `shut off`, ...
    pub state: String,
}

/// A QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Number of the host whose network namespace it is in.
    pub host: u8,
    /// UUID of its VM, by its command line.
    pub uid: String,
    /// Process id.
    pub pid: u32,
}

/// Every domain on every host.
///
/// # Errors
/// If some libvirtd does not answer.
pub async fn domains(lab: &Lab) -> anyhow::Result<Vec<Domain>> {
    let mut found = Vec::new();
    for host in lab.hosts() {
        let list = lab.virsh(host.number, &["list", "--all"]).await?;
        for line in list.lines().filter(|line| !line.trim().is_empty()) {
            let mut words = line.split_whitespace();
            let (_, Some(name)) = (words.next(), words.next()) else {
                bail!("virsh printed {line:?}");
            };
            let state = words.collect::<Vec<_>>().join(" ");
            found.push(Domain {
                host: host.number,
                name: name.to_owned(),
                state,
            });
        }
    }
    Ok(found)
}

/// Every QEMU process in the network namespaces of the lab's hosts.
///
/// # Errors
/// If a namespace is not there.
pub fn processes(lab: &Lab) -> anyhow::Result<Vec<Process>> {
    let mut spaces = BTreeMap::new();
    for host in lab.hosts() {
        let meta = fs::metadata(format!("/run/netns/{}", host.namespace)).context("look at a namespace")?;
        spaces.insert((meta.dev(), meta.ino()), host.number);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while it is looked at; an ended one that waits for its parent has no command line.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let Ok(meta) = fs::metadata(entry.path().join("ns/net")) else {
            continue;
        };
        let words: Vec<_> = line
            .split(|byte| *byte == 0)
            .map(String::from_utf8_lossy)
            .collect();
        let is_qemu = words.first().is_some_and(|word| word.contains("qemu-system"));
        let uid = words
            .iter()
            .position(|word| word == "-uuid")
            .and_then(|at| words.get(at + 1));
        if let (true, Some(uid), Some(host)) = (is_qemu, uid, spaces.get(&(meta.dev(), meta.ino()))) {
            found.push(Process {
                host: *host,
                uid: uid.clone().into_owned(),
                pid,
            });
        }
    }
    Ok(found)
}

/// Process ids of the QEMUs of a VM, on whichever host.
///
/// # Errors
/// If the hosts are not there.
pub fn pids_of(lab: &Lab, uid: &str) -> anyhow::Result<Vec<u32>> {
    let all = processes(lab)?;
    Ok(all
        .into_iter()
        .filter(|process| process.uid == uid)
        .map(|process| process.pid)
        .collect())
}

/// Every file below a directory, by its path in it; folders that hold nothing end in `/`.
fn files(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let Ok(entries) = fs::read_dir(dir) else {
        return found;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let inner = files(&entry.path());
            if inner.is_empty() {
                found.insert(format!("{name}/"));
            }
            found.extend(inner.into_iter().map(|path| format!("{name}/{path}")));
        } else {
            found.insert(name);
        }
    }
    found
}

/// What is in a pool; the directory of its backups stays when they are gone.
fn pool_files(pool: &Path) -> BTreeSet<String> {
    let mut found = files(pool);
    found.remove("backups/");
    found
}

/// Memory that is set aside for a VM, by the published formula: the guest's, 64 MiB for QEMU, 1 MiB a processor,
/// and 1/128 of the guest's, rounded up.
fn reserved_mib(vm: &Vm) -> u64 {
    vm.memory_mib + 64 + vm.vcpus + vm.memory_mib.div_ceil(128)
}

/// A difference between two views; empty where there is none.
fn difference<T: Ord + std::fmt::Debug>(
    what: &str,
    found: &BTreeSet<T>,
    wanted: &BTreeSet<T>,
) -> Option<String> {
    let surplus: Vec<_> = found.difference(wanted).collect();
    let missing: Vec<_> = wanted.difference(found).collect();
    (!surplus.is_empty() || !missing.is_empty())
        .then(|| format!("{what}: surplus {surplus:?}, missing {missing:?}"))
}

/// Everything in which the site is not at rest, or the hosts are not as Dalgu says. `foreign` are the names of
/// domains that the test made by hand.
///
/// # Errors
/// If the controller or a libvirtd does not answer.
pub async fn disagreements(lab: &Lab, foreign: &[&str]) -> anyhow::Result<Vec<String>> {
    let vms: Vec<_> = words::vms(lab).await?.into_values().collect();
    let mut found = Vec::new();
    let active = words::json(lab, &["op", "list", "--active"]).await?;
    found.extend(
        active
            .as_array()
            .into_iter()
            .flatten()
            .map(|operation| format!("still going on: {operation}")),
    );

    let mut wanted = BTreeSet::new();
    let mut running = BTreeSet::new();
    for vm in &vms {
        let state = match vm.state.as_str() {
            "RUNNING" => "running",
            "PAUSED" => "paused",
            "STOPPED" => "shut off",
            _ => {
                found.push(format!("{} is {}: {}", vm.name, vm.state, vm.all["status"]));
                continue;
            }
        };
        let host = vm.host_number()?;
        if state != "shut off" {
            running.insert((host, vm.uid.clone()));
        }
        wanted.insert(Domain {
            host,
            name: vm.name.clone(),
            state: state.to_owned(),
        });
    }
    let domains = domains(lab)
        .await?
        .into_iter()
        .filter(|domain| !foreign.contains(&domain.name.as_str()));
    found.extend(difference("domains", &domains.collect(), &wanted));
    found.extend(wrong_processes(lab, &running)?);
    found.extend(wrong_files(lab, &vms));
    found.extend(wrong_reservations(lab, &vms).await?);
    Ok(found)
}

/// QEMU processes twice, where none should be, or missing. Those of VMs that Dalgu does not know are looked at too,
/// unless no Dalgu UUID is among them: foreign domains have names, not Dalgu's UUIDs.
fn wrong_processes(lab: &Lab, running: &BTreeSet<(u8, String)>) -> anyhow::Result<Vec<String>> {
    let processes: Vec<_> = processes(lab)?
        .into_iter()
        .filter(|process| !process.uid.starts_with(FOREIGN_UUID))
        .collect();
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for process in &processes {
        if !seen.insert(&process.uid) {
            found.push(format!("{} runs twice: {processes:?}", process.uid));
        }
    }
    let places = processes
        .iter()
        .map(|process| (process.host, process.uid.clone()))
        .collect();
    found.extend(difference("QEMU processes", &places, running));
    Ok(found)
}

/// Domains that tests make by hand have UUIDs that begin so.
pub const FOREIGN_UUID: &str = "f0e1f0e1-";

fn wrong_files(lab: &Lab, vms: &[Vm]) -> Vec<String> {
    let mut found = Vec::new();
    let in_pool = |vm: &Vm, pool: &str| {
        let disks = vm.disks.iter().filter(|(of, _)| of == pool);
        disks
            .map(|(_, file)| format!("{}/{file}", vm.uid))
            .collect::<Vec<_>>()
    };
    let shared = vms.iter().flat_map(|vm| in_pool(vm, "shared")).collect();
    found.extend(difference(
        "shared disks",
        &pool_files(&lab.layout().shared()),
        &shared,
    ));
    for host in lab.hosts() {
        let here = || vms.iter().filter(|vm| vm.host == host.name);
        for pool in ["local", "fast"] {
            let wanted = here().flat_map(|vm| in_pool(vm, pool)).collect();
            let mut disks = pool_files(&host.outside(&format!("/var/lib/dalgu/{pool}")));
            // The folder of volumes stays when the last of them goes.
            disks.remove("volumes/");
            found.extend(difference(
                &format!("pool {pool} of {}", host.name),
                &disks,
                &wanted,
            ));
        }
        let sockets = files(&host.outside("/run/dalgu/migration"));
        found.extend(difference(
            &format!("migration sockets of {}", host.name),
            &sockets,
            &BTreeSet::new(),
        ));
        let known: BTreeSet<_> = here().map(|vm| format!("{}.log", vm.uid)).collect();
        let consoles = files(&host.outside(super::story::CONSOLE_DIR));
        let surplus: Vec<_> = consoles.difference(&known).collect();
        if !surplus.is_empty() {
            found.push(format!("consoles of {}: surplus {surplus:?}", host.name));
        }
    }
    found
}

async fn wrong_reservations(lab: &Lab, vms: &[Vm]) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let hosts = words::json(lab, &["host", "list"]).await?;
    for host in hosts.as_array().context("the list of hosts is no list")? {
        let name = host["name"].as_str().unwrap_or_default();
        if host["state"] != "HOST_STATE_READY" {
            found.push(format!("{name} is {}", host["state"]));
        }
        let here: Vec<_> = vms.iter().filter(|vm| vm.host == name).collect();
        let wanted = (
            here.len() as u64,
            here.iter().map(|vm| vm.vcpus).sum::<u64>(),
            here.iter().map(|vm| reserved_mib(vm)).sum::<u64>(),
        );
        let held = reserved(host);
        if held != wanted {
            found.push(format!(
                "{name} holds (VMs, vCPUs, MiB) {held:?} and should hold {wanted:?}"
            ));
        }
    }
    Ok(found)
}

/// VMs, virtual processors and MiB that a host holds reserved.
#[must_use]
pub fn reserved(host: &Value) -> (u64, u64, u64) {
    let at = |key: &str| number_at(host, &format!("/allocation/{key}"));
    (at("vms"), at("vcpusReserved"), at("memoryMibReserved"))
}

/// Waits until the site is at rest and every view of it agrees.
///
/// # Errors
/// If it does not come to rest in time; the error holds what is wrong at the end.
pub async fn at_rest(lab: &Lab, foreign: &[&str], limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let wrong = match disagreements(lab, foreign).await {
            Ok(wrong) => wrong,
            Err(error) => vec![format!("{error:#}")],
        };
        if wrong.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "after {} s the site is not at rest:\n  {}",
                limit.as_secs(),
                wrong.join("\n  ")
            );
        }
        sleep(Duration::from_millis(250)).await;
    }
}
