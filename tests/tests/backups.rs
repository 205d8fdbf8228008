//! Backups on real hosts: what a guest was told to be on stable storage before the moment of a backup is in it, whole; an
//! incremental one is small; and whoever dies in the middle leaves nothing behind.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::words::{self, LOCAL, Vm, create_with, dalgu, try_dalgu};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT, efi, story};
use dalgu_tests::lab::{Daemon, Lab, guest, run, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Longer than a backup may stand still.
const LIMIT: Duration = Duration::from_secs(200);
/// What a disk holds besides what the guest writes, in MiB: random, so that it takes room.
const BULK_MIB: usize = 32;
/// As much that a backup is not over before somebody has died.
const MUCH_MIB: usize = 256;

/// What the guest has said on its console.
fn said(lab: &Lab, vm: &Vm) -> anyhow::Result<String> {
    let said = fs::read(story::file(lab, vm.host_number()?, &vm.uid))?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

fn acknowledged(lab: &Lab, vm: &Vm) -> anyhow::Result<u64> {
    let said = said(lab, vm)?;
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let counts = whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("written "));
    Ok(counts.filter_map(|count| count.parse().ok()).max().unwrap_or(0))
}

async fn more_writes(lab: &Lab, vm: &Vm, least: u64) -> anyhow::Result<()> {
    wait_for("more writes", LIMIT, async || {
        acknowledged(lab, vm).is_ok_and(|count| count >= least)
    })
    .await
}

/// Writes each guest finds in its images directory.
fn give_bulk(lab: &Lab, mib: usize) -> anyhow::Result<()> {
    let mut bytes = vec![0; mib << 20];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    for host in lab.hosts() {
        fs::write(host.outside("/var/lib/dalgu/images").join("bulk.raw"), &bytes)?;
    }
    Ok(())
}

async fn take(lab: &Lab, vm: &str, more: &[&str]) -> anyhow::Result<Value> {
    let words = ["backup", "create", vm, "--pool", "shared", "--wait"];
    let words: Vec<_> = words.iter().chain(more).copied().collect();
    words::json(lab, &words).await
}

fn uid(backup: &Value) -> &str {
    backup["uid"].as_str().unwrap()
}

fn stored(backup: &Value) -> u64 {
    words::number_at(backup, "/storedBytes")
}

/// A disk's file as a guest would read it.
async fn content(lab: &Lab, vm: &Vm, disk: &str) -> anyhow::Result<Vec<u8>> {
    let pool = lab
        .layout()
        .host(vm.host_number()?)
        .outside("/var/lib/dalgu/local");
    let file = pool.join(&vm.uid).join(format!("{disk}.qcow2"));
    let raw = lab.layout().dir().join("content.raw");
    let (file, raw_text) = (file.to_string_lossy(), raw.to_string_lossy());
    run("qemu-img", ["convert", "-U", "-O", "raw", &*file, &*raw_text]).await?;
    Ok(fs::read(&raw)?)
}

/// How many lines the guest had written; they are there from the first on, and behind them is nothing.
fn lines(bytes: &[u8]) -> anyhow::Result<u64> {
    let mut count = 0;
    for (number, sector) in bytes.chunks(512).enumerate().skip(1) {
        let line = format!("{:<511}\n", format!("dalgu-write {number}"));
        if sector == line.as_bytes() {
            ensure!(count + 1 == number as u64, "a hole before line {number}");
            count += 1;
        } else {
            ensure!(
                sector.iter().all(|byte| *byte == 0),
                "sector {number} holds {:?}",
                String::from_utf8_lossy(&sector[..32])
            );
        }
    }
    Ok(count)
}

/// Makes a VM of a backup and looks at what it holds: everything from before the backup was asked for, and nothing from after
/// it was whole.
async fn restored(lab: &Lab, backup: &Value, name: &str, (before, after): (u64, u64)) -> anyhow::Result<()> {
    dalgu(lab, &["backup", "restore", uid(backup), name, "--stopped"]).await?;
    let vm = words::vm(lab, name).await?;
    let count = lines(&content(lab, &vm, "data").await?)?;
    ensure!(
        (before..=after + 1).contains(&count),
        "{name} holds {count} lines; {before} were acknowledged before and {after} after"
    );
    let bulk = content(lab, &vm, "bulk").await?;
    let given = fs::read(
        lab.layout()
            .host(1)
            .outside("/var/lib/dalgu/images")
            .join("bulk.raw"),
    )?;
    ensure!(bulk == given, "the bulk is not what it was");
    Ok(())
}

/// It is what it was, and its guest is told of the address that it has now.
fn is_like_web(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    let (labels, mode) = (&vm.all["labels"], &vm.all["drainMode"]);
    ensure!(
        labels["tier"] == "gold" && mode == "DRAIN_MODE_STOP",
        "{}",
        vm.all
    );
    let pool = lab
        .layout()
        .host(vm.host_number()?)
        .outside("/var/lib/dalgu/local");
    let medium = fs::read(pool.join(&vm.uid).join("first_boot.raw"))?;
    let medium = String::from_utf8_lossy(&medium);
    let mac = vm.all["spec"]["nics"][0]["mac"].as_str().unwrap();
    for word in ["shop-1", mac, vm.uid.as_str()] {
        ensure!(medium.contains(word), "its guest is not told of {word}");
    }
    Ok(())
}

fn backups_dir(lab: &Lab) -> PathBuf {
    lab.layout().shared().join("backups")
}

fn listed(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

async fn show(lab: &Lab, uid: &str) -> anyhow::Result<Value> {
    words::json(lab, &["backup", "show", uid]).await
}

fn state(backup: &Value) -> &str {
    backup["state"].as_str().unwrap_or_default()
}

async fn ended(lab: &Lab, uid: &str) -> anyhow::Result<Value> {
    let mut last = Value::Null;
    wait_for("the end of a backup", LIMIT, async || {
        last = show(lab, uid).await.unwrap_or_default();
        ["BACKUP_STATE_AVAILABLE", "BACKUP_STATE_FAILED"].contains(&state(&last))
    })
    .await
    .with_context(|| format!("{last}"))?;
    Ok(last)
}

/// Nothing is there but backups that are whole, and no job is under way.
async fn nothing_left(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    let all = words::json(lab, &["backup", "list"]).await?;
    let whole: BTreeSet<_> = all
        .as_array()
        .into_iter()
        .flatten()
        .filter(|backup| state(backup) == "BACKUP_STATE_AVAILABLE")
        .map(|backup| uid(backup).to_owned())
        .collect();
    let there = listed(&backups_dir(lab));
    ensure!(there == whole, "there are {there:?}, and should be {whole:?}");
    let job = lab.virsh(vm.host_number()?, &["domjobinfo", &vm.uid]).await?;
    ensure!(job.contains("None"), "a job goes on: {job}");
    let checkpoints = lab
        .virsh(vm.host_number()?, &["checkpoint-list", &vm.uid, "--name"])
        .await?;
    let surplus: Vec<_> = checkpoints
        .split_whitespace()
        .filter(|name| !whole.contains(*name))
        .collect();
    ensure!(surplus.is_empty(), "checkpoints of nothing: {surplus:?}");
    Ok(())
}

/// The guest's agent answers, and says when it freezes and thaws.
async fn begun(lab: &Lab, mib: usize) -> anyhow::Result<Vm> {
    give_bulk(lab, mib)?;
    let bulk = format!("bulk={mib}MiB,image=bulk.raw");
    let cmdline = format!("{} dalgu.agent", guest::CMDLINE);
    let mut more = vec!["--disk", "data=64MiB", "--disk", &bulk];
    more.extend([
        "--hostname",
        "shop-1",
        "--label",
        "tier=gold",
        "--drain-mode",
        "stop",
    ]);
    dalgu(lab, &create_with("web", LOCAL, &cmdline, &more)).await?;
    let vm = words::vm(lab, "web").await?;
    more_writes(lab, &vm, 10).await?;
    Ok(vm)
}

async fn moments(lab: &Lab) -> anyhow::Result<()> {
    let vm = begun(lab, BULK_MIB).await?;
    let before = acknowledged(lab, &vm)?;
    let full = take(lab, "web", &["--full"]).await?;
    let first = (before, acknowledged(lab, &vm)?);
    more_writes(lab, &vm, first.1 + 20).await?;
    let before = acknowledged(lab, &vm)?;
    let next = take(lab, "web", &["--incremental"]).await?;
    let second = (before, acknowledged(lab, &vm)?);
    ensure!(next["parent"] == full["uid"], "{next}");
    ensure!(full["quiesced"] == true, "the guest's agent freezes: {full}");
    println!(
        "full {} bytes, incremental {} bytes",
        stored(&full),
        stored(&next)
    );
    ensure!(stored(&full) > (BULK_MIB << 20) as u64, "{full}");
    ensure!(stored(&next) * 8 < stored(&full), "{next}");
    restored(lab, &full, "one", first).await?;
    restored(lab, &next, "two", second).await?;
    nothing_left(lab, &vm).await?;

    // A restored VM lives: it counts on from what its disk holds.
    dalgu(lab, &["vm", "start", "two"]).await?;
    let two = words::vm(lab, "two").await?;
    is_like_web(lab, &two)?;
    more_writes(lab, &two, 3).await?;

    // It moves in spite of its checkpoints, and the next one begins anew.
    dalgu(lab, &["vm", "migrate", "web"]).await?;
    let moved = words::vm(lab, "web").await?;
    ensure!(moved.host != vm.host, "{}", moved.all);
    let anew = take(lab, "web", &[]).await?;
    ensure!(
        anew["kind"] == "BACKUP_KIND_FULL" && anew["fullReason"] != "",
        "{anew}"
    );
    let on = take(lab, "web", &[]).await?;
    ensure!(on["kind"] == "BACKUP_KIND_INCREMENTAL", "{on}");

    // Off, all is known to be written.
    dalgu(lab, &["vm", "stop", "web", "--force"]).await?;
    let count = lines(&content(lab, &moved, "data").await?)?;
    let off = take(lab, "web", &[]).await?;
    ensure!(off["kind"] == "BACKUP_KIND_FULL", "{off}");
    ensure!(off["quiesced"] != true, "nobody froze anything: {off}");
    restored(lab, &off, "three", (count, count)).await?;
    // Its QEMU ended in order, so the checkpoint is good.
    dalgu(lab, &["vm", "start", "web"]).await?;
    let again = take(lab, "web", &[]).await?;
    ensure!(again["kind"] == "BACKUP_KIND_INCREMENTAL", "{again}");

    let refused = try_dalgu(lab, &["backup", "delete", uid(&full)]).await?;
    ensure!(
        refused.stderr.contains("BACKUP_HAS_CHILDREN"),
        "{}",
        refused.stderr
    );
    for name in ["one", "two", "three", "web"] {
        dalgu(lab, &["vm", "delete", name, "--force"]).await?;
    }
    // They outlive their VM.
    let late = [
        "backup",
        "restore",
        uid(&next),
        "late",
        "--stopped",
        "--label",
        "tier=none",
    ];
    dalgu(lab, &late).await?;
    let late = words::vm(lab, "late").await?;
    ensure!(late.all["labels"]["tier"] == "none", "{}", late.all);
    dalgu(lab, &["vm", "delete", "late"]).await?;
    gone(lab).await
}

/// Its firmware has started what is on its disk, and keeps variables of the VM's own.
async fn starts_by_uefi(lab: &Lab, name: &str) -> anyhow::Result<PathBuf> {
    let vm = words::vm(lab, name).await?;
    ensure!(vm.all["spec"]["firmware"] == "FIRMWARE_UEFI", "{}", vm.all);
    wait_for("its disk to be started from", BOOT_LIMIT, async || {
        said(lab, &vm).is_ok_and(|said| said.contains(efi::SAYS))
    })
    .await
    .with_context(|| format!("{name} says {:?}", said(lab, &vm)))?;
    let nvram = format!("/var/lib/libvirt/qemu/nvram/{}_VARS.fd", vm.uid);
    let nvram = lab.layout().host(vm.host_number()?).outside(&nvram);
    ensure!(nvram.exists(), "{name} has no firmware variables");
    Ok(nvram)
}

/// Firmware variables are in no backup: a VM that is restored has fresh ones, and starts from its disk all the same. With secure boot it
/// does not start from a disk that nobody has signed.
async fn firmware(lab: &Lab) -> anyhow::Result<()> {
    let disk = lab.layout().dir().join("desk.raw");
    efi::write_disk(&disk).await?;
    let disk = disk.to_string_lossy();
    dalgu(lab, &["image", "import", &disk, "--firmware", "uefi"]).await?;
    let desk = [
        "vm",
        "create",
        "desk",
        "--memory",
        "128MiB",
        "--disk",
        "root,image=desk",
    ];
    dalgu(lab, &desk).await?;
    let first = starts_by_uefi(lab, "desk").await?;
    let backup = take(lab, "desk", &[]).await?;
    dalgu(lab, &["vm", "delete", "desk", "--force"]).await?;
    ensure!(!first.exists(), "its firmware variables were left");
    dalgu(lab, &["backup", "restore", uid(&backup), "again"]).await?;
    let second = starts_by_uefi(lab, "again").await?;
    ensure!(first != second, "it has the variables of the VM that is gone");
    dalgu(lab, &["vm", "delete", "again", "--force"]).await?;
    gone(lab).await?;
    // Nobody has signed it.
    dalgu(lab, &[&desk[..], &["--firmware", "uefi-secure"]].concat()).await?;
    let vm = words::vm(lab, "desk").await?;
    wait_for("the firmware to refuse it", BOOT_LIMIT, async || {
        said(lab, &vm).is_ok_and(|said| said.contains("Access Denied") || said.contains(efi::SAYS))
    })
    .await
    .with_context(|| format!("it says {:?}", said(lab, &vm)))?;
    let said = said(lab, &vm)?;
    ensure!(!said.contains(efi::SAYS), "secure boot has started it: {said}");
    dalgu(lab, &["vm", "delete", "desk", "--force"]).await?;
    dalgu(lab, &["image", "delete", "desk:1"]).await.map(drop)
}

/// Deletes every backup, with those that need it.
async fn gone(lab: &Lab) -> anyhow::Result<()> {
    let all = words::json(lab, &["backup", "list"]).await?;
    for backup in all.as_array().into_iter().flatten() {
        if backup["parent"].as_str().unwrap_or_default().is_empty() {
            dalgu(lab, &["backup", "delete", uid(backup), "--with-children"]).await?;
        }
    }
    wait_for("no backup", LIMIT, async || {
        let left = words::json(lab, &["backup", "list"]).await;
        left.is_ok_and(|left| left.as_array().is_some_and(Vec::is_empty))
    })
    .await?;
    let there = listed(&backups_dir(lab));
    ensure!(there.is_empty(), "left: {there:?}");
    Ok(())
}

/// Asks for a full backup, and returns when its files are being made.
async fn under_way(lab: &Lab) -> anyhow::Result<String> {
    let words = ["backup", "create", "web", "--pool", "shared", "--full"];
    let backup = dalgu(lab, &words).await?.trim().to_owned();
    let half = format!("{backup}.partial");
    let made = async {
        while !listed(&backups_dir(lab)).contains(&half) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, made)
        .await
        .context("it is not begun")?;
    Ok(backup)
}

/// Somebody dies at about every point of a backup.
async fn deaths(lab: &Lab) -> anyhow::Result<()> {
    let vm = begun(lab, MUCH_MIB).await?;
    let host = vm.host_number()?;
    let mut failed = 0;
    let daemons = [Daemon::Agent(host), Daemon::Libvirtd(host), Daemon::Controller];
    for daemon in daemons {
        let libvirtd = matches!(daemon, Daemon::Libvirtd(_));
        let more: &[u64] = if libvirtd { &[200, 250] } else { &[] };
        for &delay_ms in [0, 150, 600].iter().chain(more) {
            let backup = under_way(lab).await?;
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            lab.signal(daemon, Signal::SIGKILL).await?;
            lab.start(daemon).await?;
            let end = ended(lab, &backup).await?;
            failed += u32::from(state(&end) == "BACKUP_STATE_FAILED");
            println!(
                "{daemon:?} killed {delay_ms} ms on: {} {}",
                state(&end),
                end["error"]["reason"]
            );
            let left = wait_for("nothing to be left", LIMIT, async || {
                nothing_left(lab, &vm).await.is_ok()
            });
            if left.await.is_err() {
                nothing_left(lab, &vm).await?;
            }
            let thawed = wait_for("the guest to be thawed", LIMIT, async || {
                said(lab, &vm).is_ok_and(|said| said.rfind("thawed") >= said.rfind("frozen"))
            });
            thawed
                .await
                .with_context(|| format!("{daemon:?} killed {delay_ms} ms on"))?;
            // What is whole is deleted at once: it would fill the disk.
            gone(lab).await?;
        }
    }
    ensure!(failed > 0, "nobody died amid a backup");
    ensure!(said(lab, &vm)?.contains("frozen"), "it was never frozen");
    // Power off gets through.
    let backup = under_way(lab).await?;
    dalgu(lab, &["vm", "stop", "web", "--force"]).await?;
    println!(
        "powered off in the middle: {}",
        state(&ended(lab, &backup).await?)
    );
    dalgu(lab, &["vm", "start", "web"]).await?;
    let count = acknowledged(lab, &vm)?;
    more_writes(lab, &vm, count.max(3)).await?;
    let last = take(lab, "web", &[]).await?;
    nothing_left(lab, &vm).await?;
    dalgu(lab, &["backup", "restore", uid(&last), "one", "--stopped"]).await?;
    for name in ["one", "web"] {
        dalgu(lab, &["vm", "delete", name, "--force"]).await?;
    }
    gone(lab).await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_backup_holds_what_was_acknowledged_before_its_moment_and_becomes_a_vm() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        moments(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_during_a_backup_leaves_nothing_of_it() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        deaths(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_vm_that_starts_by_uefi_is_restored_without_its_variables_and_secure_boot_refuses_it()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        firmware(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
