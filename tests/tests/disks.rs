//! Disks and volumes that are limited and moved while their guest writes, on real hosts: no write that the guest was told to be safe is lost, and
//! whoever dies on the way, there is one whole file at the end and nothing else.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::changes::{acknowledged, all_written, pending, said, update};
use dalgu_tests::e2e::words::{self, Vm, create, dalgu, number_at};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(120);
/// The disk that the guest writes to; so much of it is filled that a copy takes some time.
const DATA_MIB: u64 = 512;
const FILLED_MIB: u64 = 384;
/// The guest's lines are in front of what is filled.
const FILLED_AT: u64 = 8 << 20;
const POOLS: [&str; 2] = ["local", "fast"];

fn pool_dir(lab: &Lab, vm: &Vm, pool: &str) -> anyhow::Result<PathBuf> {
    let host = lab.layout().host(vm.host_number()?);
    Ok(host.outside(&format!("/var/lib/dalgu/{pool}")))
}

/// What a pool has of the VM's own, and of volumes, by the paths in it.
fn files(lab: &Lab, vm: &Vm, pool: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for folder in [&*vm.uid, "volumes"] {
        let Ok(entries) = fs::read_dir(pool_dir(lab, vm, pool)?.join(folder)) else {
            continue;
        };
        for entry in entries {
            found.insert(format!("{folder}/{}", entry?.file_name().to_string_lossy()));
        }
    }
    Ok(found)
}

/// The files of a VM's two disks in their pools: its data may be a volume.
async fn names(lab: &Lab, vm: &Vm) -> anyhow::Result<[(&'static str, String); 2]> {
    let disks = vm.all["spec"]["disks"].as_array().cloned().unwrap_or_default();
    let volume = disks.iter().find_map(|disk| disk["volume"].as_str());
    let data = match volume.filter(|name| !name.is_empty()) {
        None => format!("{}/data.raw", vm.uid),
        Some(name) => {
            let volume = words::json(lab, &["volume", "show", name]).await?;
            format!("volumes/{}.raw", volume["uid"].as_str().unwrap_or_default())
        }
    };
    Ok([("root", format!("{}/root.qcow2", vm.uid)), ("data", data)])
}

/// The file of its data.
async fn data(lab: &Lab, vm: &Vm) -> anyhow::Result<PathBuf> {
    let [_, (disk, file)] = names(lab, vm).await?;
    Ok(pool_dir(lab, vm, &pool_of(vm, disk))?.join(file))
}

fn pool_of(vm: &Vm, disk: &str) -> String {
    let disks = vm.all["spec"]["disks"].as_array().cloned().unwrap_or_default();
    let disk = disks.iter().find(|known| known["name"] == disk);
    disk.and_then(|disk| disk["pool"].as_str())
        .unwrap_or("local")
        .to_owned()
}

/// That each disk is one file in its pool, that the domain and its definition name it, and that there is nothing else.
async fn is_whole(lab: &Lab, name: &str) -> anyhow::Result<Vm> {
    let settled = async || {
        words::vm(lab, name).await.is_ok_and(|vm| {
            let done = number_at(&vm.all, "/status/observedGeneration") == number_at(&vm.all, "/generation");
            done && pending(&vm).is_empty()
        })
    };
    wait_for("a disk to arrive", LIMIT, settled).await?;
    // A libvirtd that dies in the moment of the change over may show the copy for as long as the domain runs.
    let known = lab.virsh(1, &["dumpxml", name]).await?;
    if known.contains("<mirror") {
        dalgu(lab, &["vm", "stop", name, "--force"]).await?;
        dalgu(lab, &["vm", "start", name]).await?;
    }
    let vm = words::vm(lab, name).await?;
    let disks = names(lab, &vm).await?;
    let is = async || -> anyhow::Result<Option<String>> {
        for pool in POOLS {
            let here = disks.iter().filter(|(disk, _)| pool_of(&vm, disk) == pool);
            let wanted: BTreeSet<_> = here.map(|(_, file)| file.clone()).collect();
            let found = files(lab, &vm, pool)?;
            if found != wanted {
                return Ok(Some(format!("pool {pool} has {found:?}, should have {wanted:?}")));
            }
        }
        for kind in [&["domblklist", name][..], &["domblklist", name, "--inactive"]] {
            let list = lab.virsh(vm.host_number()?, kind).await?;
            for (disk, file) in &disks {
                let path = format!("/var/lib/dalgu/{}/{file}", pool_of(&vm, disk));
                if !list.contains(&path) {
                    return Ok(Some(format!("{kind:?} does not say {path}: {list}")));
                }
            }
        }
        for volume in words::json(lab, &["volume", "list"])
            .await?
            .as_array()
            .into_iter()
            .flatten()
        {
            if volume["pool"].as_str() != Some(&*pool_of(&vm, "data")) {
                return Ok(Some(format!("the record of the volume is behind: {volume}")));
            }
        }
        Ok(None)
    };
    // The old file goes right after the word that the disk has arrived.
    let mut last = None;
    let found = wait_for("one file for each disk", Duration::from_secs(20), async || {
        last = is().await.unwrap_or_else(|error| Some(format!("{error:#}")));
        last.is_none()
    });
    found.await.with_context(|| format!("{last:?}"))?;
    Ok(vm)
}

/// Fills a part of the disk, while its VM is off.
async fn fill(lab: &Lab, vm: &Vm) -> anyhow::Result<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(7);
    let bytes: Vec<u8> = (0..FILLED_MIB << 17)
        .flat_map(|_| random.u64(..).to_le_bytes())
        .collect();
    let file = fs::OpenOptions::new().write(true).open(data(lab, vm).await?)?;
    file.write_all_at(&bytes, FILLED_AT)?;
    file.sync_all()?;
    Ok(bytes)
}

async fn writes_on(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let vm = words::vm(lab, name).await?;
    let before = said(lab, &vm)?.len();
    wait_for("more writes", LIMIT, async || {
        said(lab, &vm).is_ok_and(|text| acknowledged(&text[before.min(text.len())..]).len() > 5)
    })
    .await
}

async fn nothing_is_lost(lab: &Lab, vm: &Vm, filled: &[u8]) -> anyhow::Result<()> {
    // What is acknowledged is on the disk by then.
    let told = acknowledged(&said(lab, vm)?);
    ensure!(told.len() > 10, "too little was written: {}", told.len());
    let disk = fs::read(data(lab, vm).await?)?;
    ensure!(disk.len() as u64 == DATA_MIB << 20, "it has {} bytes", disk.len());
    all_written(&disk, &told)?;
    let at = usize::try_from(FILLED_AT)?;
    ensure!(
        disk[at..at + filled.len()] == *filled,
        "what was there before is not the same"
    );
    Ok(())
}

/// Makes the VM, with such a disk that takes some time to copy.
async fn shop(lab: &Lab, data: &str) -> anyhow::Result<Vec<u8>> {
    dalgu(lab, &create("shop", "root=8MiB", &["--disk", data])).await?;
    dalgu(lab, &["vm", "stop", "shop", "--force"]).await?;
    let filled = fill(lab, &words::vm(lab, "shop").await?).await?;
    dalgu(lab, &["vm", "start", "shop"]).await?;
    writes_on(lab, "shop").await?;
    Ok(filled)
}

fn other(pool: &str) -> &'static str {
    if pool == POOLS[0] { POOLS[1] } else { POOLS[0] }
}

/// Asks for a move of the data to the other pool, and does not wait.
async fn begin(lab: &Lab) -> anyhow::Result<Vm> {
    let vm = words::vm(lab, "shop").await?;
    let to = format!("data={}", other(&pool_of(&vm, "data")));
    dalgu(lab, &["vm", "update", "shop", "--move-disk", &to]).await?;
    words::vm(lab, "shop").await
}

async fn moves(lab: &Lab, filled: &[u8]) -> anyhow::Result<()> {
    // While it runs, both formats.
    update(
        lab,
        "shop",
        &["--move-disk", "data=fast", "--move-disk", "root=fast"],
    )
    .await?;
    let vm = is_whole(lab, "shop").await?;
    ensure!(
        vm.state == "RUNNING" && pool_of(&vm, "data") == "fast",
        "{}",
        vm.all
    );
    writes_on(lab, "shop").await?;
    nothing_is_lost(lab, &vm, filled).await?;
    // While it is off.
    dalgu(lab, &["vm", "stop", "shop", "--force"]).await?;
    update(
        lab,
        "shop",
        &["--move-disk", "data=local", "--move-disk", "root=local"],
    )
    .await?;
    let vm = is_whole(lab, "shop").await?;
    nothing_is_lost(lab, &vm, filled).await?;
    dalgu(lab, &["vm", "start", "shop"]).await?;
    writes_on(lab, "shop").await?;
    // A power-off and a start get through, and the copy is made after all.
    begin(lab).await?;
    dalgu(lab, &["vm", "stop", "shop", "--force"]).await?;
    dalgu(lab, &["vm", "start", "shop"]).await?;
    let vm = is_whole(lab, "shop").await?;
    writes_on(lab, "shop").await?;
    nothing_is_lost(lab, &vm, filled).await?;
    // It is called back.
    let vm = begin(lab).await?;
    let back = format!("data={}", other(&pool_of(&vm, "data")));
    dalgu(lab, &["vm", "update", "shop", "--move-disk", &back]).await?;
    is_whole(lab, "shop").await?;
    Ok(())
}

const AGENT_OR_LIBVIRTD: [fn(u8) -> Daemon; 2] = [Daemon::Agent, Daemon::Libvirtd];

/// One of these dies at about every point of a move.
async fn deaths(lab: &Lab, filled: &[u8], daemons: &[fn(u8) -> Daemon]) -> anyhow::Result<()> {
    for delay_ms in [0_u64, 100, 300, 600, 900, 1300, 1800, 2500] {
        for daemon in daemons {
            let vm = begin(lab).await?;
            let dies = daemon(vm.host_number()?);
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            lab.signal(dies, Signal::SIGKILL).await?;
            lab.start(dies).await?;
            let vm = is_whole(lab, "shop")
                .await
                .with_context(|| format!("{dies:?} died after {delay_ms} ms"))?;
            ensure!(
                vm.state == "RUNNING",
                "{dies:?} died after {delay_ms} ms: {}",
                vm.all
            );
            writes_on(lab, "shop").await?;
            nothing_is_lost(lab, &vm, filled).await?;
        }
    }
    Ok(())
}

/// Lines that the guest writes within some time.
async fn rate(lab: &Lab, vm: &Vm) -> anyhow::Result<usize> {
    // A guest that was started again counts from 1.
    let before = said(lab, vm)?.len();
    tokio::time::sleep(Duration::from_secs(20)).await;
    Ok(acknowledged(&said(lab, vm)?[before..]).len())
}

/// What QEMU holds the guest to on its data: reads and writes a second, bytes read and written a second. None in all else.
async fn held_to(lab: &Lab, vm: &Vm) -> anyhow::Result<[u64; 4]> {
    let told = lab
        .virsh(vm.host_number()?, &["blkdeviotune", "shop", "vdb"])
        .await?;
    let mut most = BTreeMap::new();
    for line in told.lines() {
        if let Some((name, value)) = line.split_once(':')
            && let Ok(value) = value.trim().parse::<u64>()
        {
            most.insert(name.trim(), value);
        }
    }
    let names = [
        "read_iops_sec",
        "write_iops_sec",
        "read_bytes_sec",
        "write_bytes_sec",
    ];
    let found = names.map(|name| most.remove(name));
    // The length of a burst is 1 s where there is none.
    let others = |(name, value): (&&str, &u64)| *value != 0 && !name.ends_with("_length");
    ensure!(
        found.iter().all(Option::is_some) && !most.iter().any(others),
        "{told}"
    );
    Ok(found.map(Option::unwrap_or_default))
}

async fn limits(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &create("shop", "root=8MiB", &["--disk", "data=64MiB"])).await?;
    writes_on(lab, "shop").await?;
    let vm = words::vm(lab, "shop").await?;
    let free = rate(lab, &vm).await?;
    update(lab, "shop", &["--limit-disk", "data,write-iops=1"]).await?;
    let limited = rate(lab, &vm).await?;
    let told = held_to(lab, &vm).await?;
    eprintln!("lines in 20 s: {free} without a limit, {limited} with one write a second");
    ensure!(
        free > 30 && limited <= 26 && told == [0, 1, 0, 0],
        "{free} lines without, {limited} with a limit: {told:?}"
    );
    // The others come beside it.
    let more = "data,read-iops=300,read-rate=5MiB,write-rate=7MiB";
    update(lab, "shop", &["--limit-disk", more]).await?;
    let all = [300, 1, 5 << 20, 7 << 20];
    let told = held_to(lab, &vm).await?;
    ensure!(told == all, "{told:?}");
    // They stay with the next start, and are lifted again: one, then all.
    dalgu(lab, &["vm", "stop", "shop", "--force"]).await?;
    dalgu(lab, &["vm", "start", "shop"]).await?;
    let told = held_to(lab, &vm).await?;
    ensure!(told == all, "{told:?} after a start");
    update(lab, "shop", &["--limit-disk", "data,read-rate=none"]).await?;
    let told = held_to(lab, &vm).await?;
    ensure!(told == [300, 1, 0, 7 << 20], "{told:?}");
    update(lab, "shop", &["--limit-disk", "data,none"]).await?;
    let told = held_to(lab, &vm).await?;
    ensure!(told == [0; 4], "{told:?}");
    writes_on(lab, "shop").await?;
    let lifted = rate(lab, &vm).await?;
    ensure!(lifted > 30, "{lifted} lines after it was lifted");
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_disk_moves_while_the_guest_writes_and_agents_and_libvirtd_die() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let filled = shop(lab, &format!("data={DATA_MIB}MiB,format=raw")).await?;
        moves(lab, &filled).await?;
        deaths(lab, &filled, &AGENT_OR_LIBVIRTD).await?;
        dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// That a command is refused for this reason.
async fn refused(lab: &Lab, words: &[&str], why: &str) -> anyhow::Result<()> {
    let ended = words::try_dalgu(lab, words).await?;
    let told = ended.code != 0 && ended.stderr.contains(why);
    ensure!(told, "`dalgu {}`: {ended:?}", words.join(" "));
    Ok(())
}

/// While it moves, nobody takes the volume from its VM, or the VM from it. Where it is at the end, it stays.
async fn stays_with_its_vm(lab: &Lab, filled: &[u8]) -> anyhow::Result<()> {
    let vm = begin(lab).await?;
    // It takes some seconds to copy; what is asked for in the first one comes in between.
    let take = ["vm", "update", "shop", "--remove-disk", "data"];
    refused(lab, &take, "CHANGE_IN_PROGRESS").await?;
    refused(lab, &["vm", "delete", "shop", "--force"], "CHANGE_IN_PROGRESS").await?;
    let record = words::json(lab, &["volume", "show", "ledger"]).await?;
    ensure!(record["pool"] == other(&pool_of(&vm, "data")), "{record}");
    let vm = is_whole(lab, "shop").await?;
    writes_on(lab, "shop").await?;
    nothing_is_lost(lab, &vm, filled).await?;
    let file = data(lab, &vm).await?;
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    let record = words::json(lab, &["volume", "show", "ledger"]).await?;
    let there = record["pool"] == *pool_of(&vm, "data") && file.exists();
    ensure!(there, "{} is not in the pool of {record}", file.display());
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_volume_moves_while_the_guest_writes_and_agents_libvirtd_and_the_controller_die()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let size = format!("{DATA_MIB}MiB");
        let make = ["volume", "create", "ledger", "--size", &size, "--format", "raw"];
        dalgu(lab, &make).await?;
        let filled = shop(lab, "data,volume=ledger").await?;
        moves(lab, &filled).await?;
        let all = [Daemon::Agent, Daemon::Libvirtd, |_| Daemon::Controller];
        deaths(lab, &filled, &all).await?;
        stays_with_its_vm(lab, &filled).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// libvirt's note of a running domain, in which it finds it again.
const NOTE: &str = "/run/libvirt/qemu/shop.xml";

/// A text without what is between these two, and them.
fn without(text: &str, begin: &str, end: &str) -> anyhow::Result<String> {
    let from = text.find(begin).with_context(|| format!("no {begin}"))?;
    let to = text[from..].find(end).with_context(|| format!("no {end}"))?;
    Ok([&text[..from], &text[from + to + end.len()..]].concat())
}

/// What QEMU says of its jobs.
async fn jobs(lab: &Lab) -> String {
    let question = r#"{"execute":"query-jobs"}"#;
    let jobs = lab.virsh(1, &["qemu-monitor-command", "shop", question]).await;
    jobs.unwrap_or_default()
}

/// libvirtd dies after QEMU was told to copy a disk, and before it has noted to which file, or that it does.
async fn half_begun(lab: &Lab, noted: bool) -> anyhow::Result<()> {
    begin(lab).await?;
    let copies = async || jobs(lab).await.contains("mirror");
    wait_for("QEMU to copy", LIMIT, copies).await?;
    for daemon in [Daemon::Agent(1), Daemon::Libvirtd(1)] {
        lab.signal(daemon, Signal::SIGKILL).await?;
    }
    let file = lab.layout().host(1).outside(NOTE);
    let note = without(&fs::read_to_string(&file)?, "<mirror", "</mirror>")?;
    let note = match noted {
        true => note,
        false => without(&note, "<blockjobs", "</blockjobs>")?,
    };
    fs::write(&file, note)?;
    lab.start(Daemon::Libvirtd(1)).await?;
    let known = lab.virsh(1, &["dumpxml", "shop"]).await?;
    ensure!(!known.contains("<mirror") && copies().await, "{known}");
    lab.start(Daemon::Agent(1)).await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_copy_that_libvirt_has_not_noted_is_ended_and_made_anew() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let filled = shop(lab, &format!("data={DATA_MIB}MiB,format=raw")).await?;
        for noted in [true, false] {
            half_begun(lab, noted).await?;
            let whole = is_whole(lab, "shop").await;
            let vm = whole.with_context(|| format!("the job was noted: {noted}"))?;
            writes_on(lab, "shop").await?;
            nothing_is_lost(lab, &vm, &filled).await?;
        }
        dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// libvirtd dies after QEMU has changed over to the copy and was told to forget the job, and before it has noted either.
async fn half_ended(lab: &Lab) -> anyhow::Result<()> {
    let vm = begin(lab).await?;
    wait_for("QEMU to copy", LIMIT, async || jobs(lab).await.contains("mirror")).await?;
    lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
    wait_for("the copy to be whole", LIMIT, async || {
        jobs(lab).await.contains(r#""status":"ready""#)
    })
    .await?;
    let file = lab.layout().host(1).outside(NOTE);
    let note = fs::read_to_string(&file)?;
    ensure!(note.contains("<mirror"), "{note}");
    let disks = lab.virsh(1, &["domblklist", "shop"]).await?;
    let disk = disks.lines().find(|line| line.contains("data"));
    let disk = disk.and_then(|line| line.split_whitespace().next());
    let disk = disk.with_context(|| format!("no disk of data: {disks}"))?;
    lab.virsh(1, &["blockjob", "shop", disk, "--pivot"]).await?;
    // What it writes now, it writes to the new file alone.
    writes_on(lab, "shop").await?;
    lab.signal(Daemon::Libvirtd(1), Signal::SIGKILL).await?;
    fs::write(&file, note)?;
    lab.start(Daemon::Libvirtd(1)).await?;
    let known = lab.virsh(1, &["dumpxml", "shop"]).await?;
    ensure!(
        known.contains("<mirror") && !jobs(lab).await.contains("mirror"),
        "{known}"
    );
    ensure!(vm.state == "RUNNING");
    lab.start(Daemon::Agent(1)).await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_change_over_that_libvirt_has_not_noted_loses_nothing_at_the_next_start() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let filled = shop(lab, &format!("data={DATA_MIB}MiB,format=raw")).await?;
        half_ended(lab).await?;
        // It is taken for what it is, and cannot move again while it runs.
        wait_for("the disk to be known where it is", LIMIT, async || {
            let list = lab.virsh(1, &["domblklist", "shop", "--inactive"]).await;
            let vm = words::vm(lab, "shop").await;
            list.is_ok_and(|list| list.contains("/fast/")) && vm.is_ok_and(|vm| pending(&vm).is_empty())
        })
        .await?;
        dalgu(lab, &["vm", "update", "shop", "--move-disk", "data=local"]).await?;
        wait_for("the reason why it cannot move", LIMIT, async || {
            let vm = words::vm(lab, "shop").await;
            vm.is_ok_and(|vm| vm.all.to_string().contains("stop it and start it again"))
        })
        .await?;
        dalgu(lab, &["vm", "stop", "shop", "--force"]).await?;
        dalgu(lab, &["vm", "start", "shop"]).await?;
        let vm = is_whole(lab, "shop").await?;
        ensure!(pool_of(&vm, "data") == "local", "{}", vm.all);
        writes_on(lab, "shop").await?;
        nothing_is_lost(lab, &vm, &filled).await?;
        dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_guest_writes_no_more_than_its_disk_is_limited_to() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        limits(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
