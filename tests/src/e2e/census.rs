//! The independent view: what `virsh`, `/proc`, the kernel's networks and the file systems of the hosts say is there, and whether that is
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

mod filters;
mod networks;

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

/// What is in a pool. The directories of backups and of volumes stay when they are gone, and a backup says which others need it.
fn pool_files(pool: &Path) -> BTreeSet<String> {
    let mut found = files(pool);
    found.retain(|path| {
        let stays = path == "backups/" || path == "volumes/";
        let marks = path.starts_with("backups/") && path.contains("/child-");
        !(stays || marks)
    });
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
    found.extend(wrong_files(lab, &vms).await?);
    found.extend(wrong_reservations(lab, &vms).await?);
    found.extend(networks::wrong(lab, &vms, foreign.is_empty()).await?);
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

/// Where hosts keep copies of images.
const IMAGE_STORE: &str = "/var/lib/dalgu/image-store";

/// The files that there should be, by host (empty for those that hosts share) and pool.
type Wanted = BTreeMap<(String, String), BTreeSet<String>>;

fn text(value: &Value, pointer: &str) -> String {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}

fn place(pool: &str, host: &str) -> (String, String) {
    let host = if pool == "shared" { "" } else { host };
    (host.to_owned(), pool.to_owned())
}

async fn listed(lab: &Lab, words: &[&str]) -> anyhow::Result<Vec<Value>> {
    let all = words::json(lab, words).await?;
    Ok(all.as_array().cloned().unwrap_or_default())
}

/// The layers that the disks of a VM should have; nobody is asked where there are none.
async fn layers(lab: &Lab, vm: &Vm) -> anyhow::Result<Vec<u64>> {
    let host = lab.layout().host(vm.host_number()?);
    let own = ["local", "fast"].map(|pool| host.outside(&format!("/var/lib/dalgu/{pool}")));
    let pools = own.into_iter().chain([lab.layout().shared()]);
    let mut all = pools.flat_map(|pool| files(&pool.join(&vm.uid)));
    if !all.any(|file| file.split('.').count() > 2) {
        return Ok(Vec::new());
    }
    let all = listed(lab, &["snapshot", "list", &vm.name]).await?;
    Ok(all.iter().map(|snapshot| number_at(snapshot, "/layer")).collect())
}

/// What volumes, backups, and the disks of VMs with their snapshots should be in pools.
async fn wanted_files(lab: &Lab, vms: &[Vm]) -> anyhow::Result<Wanted> {
    let (mut wanted, mut layered) = (Wanted::new(), BTreeMap::new());
    for vm in vms {
        let layers = layers(lab, vm).await?;
        for (pool, file) in &vm.disks {
            let here = wanted.entry(place(pool, &vm.host)).or_default();
            let path = format!("{}/{file}", vm.uid);
            let disk = path.trim_end_matches(".qcow2");
            here.extend(layers.iter().map(|number| format!("{disk}.{number}.qcow2")));
            here.insert(path);
        }
        layered.insert(&vm.name, layers);
    }
    for volume in listed(lab, &["volume", "list"]).await? {
        if text(&volume, "/status/state") == "VOLUME_STATE_NEW" {
            continue;
        }
        let raw = text(&volume, "/format") == "DISK_FORMAT_RAW";
        let suffix = if raw { "raw" } else { "qcow2" };
        let at = place(&text(&volume, "/pool"), &text(&volume, "/status/host"));
        let (here, disk) = (
            wanted.entry(at).or_default(),
            format!("volumes/{}", text(&volume, "/uid")),
        );
        let layers = layered.get(&text(&volume, "/status/vm")).into_iter().flatten();
        here.extend(layers.map(|number| format!("{disk}.{number}.qcow2")));
        here.insert(format!("{disk}.{suffix}"));
    }
    for backup in listed(lab, &["backup", "list"]).await? {
        if text(&backup, "/state") != "BACKUP_STATE_AVAILABLE" {
            continue;
        }
        let at = place(&text(&backup, "/pool"), &text(&backup, "/host"));
        let here = wanted.entry(at).or_default();
        let files = backup["files"].as_array().into_iter().flatten();
        let names = files
            .map(|file| text(file, "/file"))
            .chain(["manifest.json".to_owned()]);
        here.extend(names.map(|name| format!("backups/{}/{name}", text(&backup, "/uid"))));
    }
    Ok(wanted)
}

async fn wrong_files(lab: &Lab, vms: &[Vm]) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let wanted = wanted_files(lab, vms).await?;
    let nothing = BTreeSet::new();
    let should = |pool: &str, host: &str| wanted.get(&place(pool, host)).unwrap_or(&nothing);
    found.extend(difference(
        "shared files",
        &pool_files(&lab.layout().shared()),
        should("shared", ""),
    ));
    let images = listed(lab, &["image", "list"]).await?;
    let copies = images
        .iter()
        .map(|image| format!("{}.qcow2", text(image, "/status/digest")));
    let copies: BTreeSet<_> = copies.collect();
    for host in lab.hosts() {
        let store = files(&host.outside(IMAGE_STORE));
        let surplus: Vec<_> = store.difference(&copies).collect();
        if !surplus.is_empty() {
            found.push(format!("image store of {}: surplus {surplus:?}", host.name));
        }
        for pool in ["local", "fast"] {
            found.extend(difference(
                &format!("pool {pool} of {}", host.name),
                &pool_files(&host.outside(&format!("/var/lib/dalgu/{pool}"))),
                should(pool, &host.name),
            ));
        }
        let sockets = files(&host.outside("/run/dalgu/migration"));
        found.extend(difference(
            &format!("migration sockets of {}", host.name),
            &sockets,
            &BTreeSet::new(),
        ));
        let here = vms.iter().filter(|vm| vm.host == host.name);
        let known: BTreeSet<_> = here.map(|vm| format!("{}.log", vm.uid)).collect();
        let consoles = files(&host.outside(super::story::CONSOLE_DIR));
        let surplus: Vec<_> = consoles.difference(&known).collect();
        if !surplus.is_empty() {
            found.push(format!("consoles of {}: surplus {surplus:?}", host.name));
        }
    }
    Ok(found)
}

/// What `dalgu doctor` finds of files.
async fn doctored(lab: &Lab) -> anyhow::Result<Vec<String>> {
    // It ends with an error where it has found something.
    let ended = words::try_dalgu(lab, &["doctor", "-o", "json"]).await?;
    let diagnosis: Value = serde_json::from_str(&ended.stdout)
        .with_context(|| format!("the doctor printed no JSON: {} {}", ended.stdout, ended.stderr))?;
    let findings = diagnosis["findings"].as_array().into_iter().flatten();
    let of_files = findings.filter(|finding| text(finding, "/kind").contains("FILE"));
    Ok(of_files
        .map(|finding| format!("the doctor finds {finding}"))
        .collect())
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
        let seen = match disagreements(lab, foreign).await {
            Ok(wrong) if wrong.is_empty() => doctored(lab).await,
            other => other,
        };
        let wrong = seen.unwrap_or_else(|error| vec![format!("{error:#}")]);
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
