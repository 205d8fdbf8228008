//! VMs that are changed while they run, on real hosts: the guest sees what it is given and gives what it is asked for, and no
//! write that it was told to be safe is lost.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::changes::{acknowledged, all_written, pending, said, update};
use dalgu_tests::e2e::words::{self, LOCAL, Vm, create, dalgu, number_at, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use nix::sys::signal::Signal;

/// A guest needs so long at most to go along with a change; its processors are emulated.
const LIMIT: Duration = Duration::from_secs(90);

/// What the guest has said last of its hardware: the words after each label.
#[derive(Debug, Clone, Default)]
struct Seen {
    cpus: u32,
    memory_kib: u64,
    disks: Vec<(String, u64)>,
    nics: usize,
}

impl Seen {
    fn disk_mib(&self, name: &str) -> Option<u64> {
        let found = self.disks.iter().find(|(other, _)| other == name);
        found.map(|(_, sectors)| sectors / 2048)
    }
}

/// "0-2,5" are four.
fn count_of(list: &str) -> u32 {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()? - first.parse::<u32>().ok()? + 1)
    });
    ranges.sum()
}

fn seen(text: &str) -> Option<Seen> {
    let line = text
        .lines()
        .rev()
        .find(|line| line.starts_with("hardware cpus "))?;
    let mut seen = Seen::default();
    let mut label = "";
    for word in line.split_whitespace().skip(1) {
        match word {
            "cpus" | "memory" | "disks" | "nics" => label = word,
            _ => match label {
                "cpus" => seen.cpus = count_of(word),
                "memory" => seen.memory_kib = word.parse().ok()?,
                "disks" => {
                    let (name, sectors) = word.split_once(':')?;
                    seen.disks.push((name.to_owned(), sectors.parse().ok()?));
                }
                _ => seen.nics += 1,
            },
        }
    }
    Some(seen)
}

async fn until(lab: &Lab, name: &str, what: &str, is: impl Fn(&Seen) -> bool) -> anyhow::Result<Seen> {
    let mut last = None;
    let found = wait_for(what, LIMIT, async || {
        let Ok(vm) = words::vm(lab, name).await else {
            return false;
        };
        last = said(lab, &vm).ok().as_deref().and_then(seen);
        last.as_ref().is_some_and(&is)
    })
    .await;
    found.with_context(|| format!("the guest last had {last:?}"))?;
    last.context("nothing")
}

fn disk_file(lab: &Lab, vm: &Vm, disk: &str) -> anyhow::Result<PathBuf> {
    let pool = lab
        .layout()
        .host(vm.host_number()?)
        .outside("/var/lib/dalgu/local");
    Ok(pool.join(&vm.uid).join(format!("{disk}.qcow2")))
}

/// Every line that was acknowledged is in its sector.
async fn nothing_is_lost(lab: &Lab, vm: &Vm, acknowledged: &BTreeSet<u64>) -> anyhow::Result<()> {
    ensure!(
        acknowledged.len() > 10,
        "too little was written: {}",
        acknowledged.len()
    );
    let (file, raw) = (disk_file(lab, vm, "data")?, lab.layout().dir().join("data.raw"));
    let (file, raw_text) = (file.to_string_lossy(), raw.to_string_lossy());
    run("qemu-img", ["convert", "-U", "-O", "raw", &*file, &*raw_text]).await?;
    all_written(&fs::read(&raw)?, acknowledged)
}

async fn sizes(lab: &Lab) -> anyhow::Result<()> {
    let roomy = [
        "--vcpus",
        "1",
        "--max-vcpus",
        "2",
        "--memory",
        "192MiB",
        "--max-memory",
        "512MiB",
    ];
    dalgu(lab, &create("web", LOCAL, &roomy)).await?;
    let first = until(lab, "web", "the guest's first look", |_| true).await?;
    ensure!(first.cpus == 1, "{first:?}");
    // Without KVM memory waits for the next start, and moves along until then.
    let vm = update(lab, "web", &["--memory", "448MiB"]).await?;
    ensure!(pending(&vm) == ["memory_mib"], "{}", vm.all);
    dalgu(lab, &["vm", "migrate", "web"]).await?;
    update(lab, "web", &["--vcpus", "2"]).await?;
    until(lab, "web", "two processors elsewhere", |seen| seen.cpus == 2).await?;
    dalgu(lab, &["vm", "migrate", "web"]).await?;
    // What it cannot have or give without a restart waits for one.
    let vm = update(lab, "web", &["--vcpus", "1", "--max-vcpus", "0"]).await?;
    ensure!(pending(&vm).iter().any(|field| field == "vcpus"), "{}", vm.all);
    dalgu(lab, &["vm", "stop", "web", "--force"]).await?;
    dalgu(lab, &["vm", "start", "web"]).await?;
    until(lab, "web", "one processor and more memory", |seen| {
        seen.cpus == 1 && seen.memory_kib > first.memory_kib + (200 << 10)
    })
    .await?;
    let vm = words::vm(lab, "web").await?;
    ensure!(pending(&vm).is_empty(), "{}", vm.all);
    dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
    Ok(())
}

async fn devices(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &create("shop", LOCAL, &[])).await?;
    let first = until(lab, "shop", "the guest's first look", |_| true).await?;
    update(
        lab,
        "shop",
        &["--add-disk", "data=64MiB", "--add-nic", "more=br0"],
    )
    .await?;
    until(lab, "shop", "the disk and the interface", |seen| {
        seen.disk_mib("data") == Some(64) && seen.nics == first.nics + 1
    })
    .await?;
    let vm = words::vm(lab, "shop").await?;
    wait_for("some writes", LIMIT, async || {
        said(lab, &vm).is_ok_and(|text| acknowledged(&text).len() > 10)
    })
    .await?;
    update(lab, "shop", &["--grow-disk", "data=96MiB"]).await?;
    until(lab, "shop", "the larger disk", |seen| {
        seen.disk_mib("data") == Some(96)
    })
    .await?;
    let before = said(lab, &vm)?;
    dalgu(lab, &["vm", "migrate", "shop"]).await?;
    let moved = words::vm(lab, "shop").await?;
    ensure!(moved.host != vm.host, "{}", moved.all);
    wait_for("writes after the migration", LIMIT, async || {
        said(lab, &moved).is_ok_and(|text| acknowledged(&text).len() > 10)
    })
    .await?;
    let mut all = acknowledged(&before);
    all.extend(acknowledged(&said(lab, &moved)?));
    nothing_is_lost(lab, &moved, &all).await?;
    // Paused, it cannot let go; then it does.
    dalgu(lab, &["vm", "pause", "shop"]).await?;
    let held = update(lab, "shop", &["--remove-disk", "data", "--remove-nic", "more"]).await?;
    ensure!(pending(&held) == ["disks[data]", "nics[more]"], "{}", held.all);
    ensure!(
        disk_file(lab, &held, "data")?.exists(),
        "it went while the guest had it"
    );
    let refused = try_dalgu(lab, &["vm", "migrate", "shop"]).await?;
    ensure!(refused.code != 0, "it moved");
    dalgu(lab, &["vm", "resume", "shop"]).await?;
    wait_for("the disk to go", LIMIT, async || {
        words::vm(lab, "shop")
            .await
            .is_ok_and(|vm| pending(&vm).is_empty())
            && disk_file(lab, &held, "data").is_ok_and(|file| !file.exists())
    })
    .await?;
    until(lab, "shop", "what it began with", |seen| {
        seen.disk_mib("data").is_none() && seen.nics == first.nics
    })
    .await?;
    Ok(())
}

/// The agent dies at about every point of an attachment; each time the disk is there once, and whole.
async fn deaths(lab: &Lab) -> anyhow::Result<()> {
    for (number, delay_ms) in [0_u64, 40, 120, 300].into_iter().enumerate() {
        let vm = words::vm(lab, "shop").await?;
        let name = format!("d{number}");
        let disk = format!("{name}=32MiB");
        dalgu(lab, &["vm", "update", "shop", "--add-disk", &disk]).await?;
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        let agent = Daemon::Agent(vm.host_number()?);
        lab.signal(agent, Signal::SIGKILL).await?;
        lab.start(agent).await?;
        until(lab, "shop", &name, |seen| seen.disk_mib(&name) == Some(32)).await?;
    }
    wait_for("the host's word", LIMIT, async || {
        words::vm(lab, "shop").await.is_ok_and(|vm| {
            number_at(&vm.all, "/status/observedGeneration") == number_at(&vm.all, "/generation")
        })
    })
    .await?;
    let vm = words::vm(lab, "shop").await?;
    let files = fs::read_dir(disk_file(lab, &vm, "root")?.parent().unwrap())?;
    let files: BTreeSet<_> = files.map(|file| file.unwrap().file_name()).collect();
    ensure!(files.len() == 5, "{files:?}");
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_running_guest_gets_processors_and_what_it_cannot_have_comes_with_the_next_start()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        sizes(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_disk_comes_grows_moves_and_goes_while_the_guest_writes_and_agents_die() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        devices(lab).await?;
        deaths(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
