//! Snapshots on real hosts: made and deleted while the guest writes, gone back to, and with agents and libvirts that die meanwhile.
//! No write that the guest was told to be safe is lost, and nothing is left of what was deleted.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story;
use dalgu_tests::e2e::words::{self, Vm, create_with, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::guest::CMDLINE;
use dalgu_tests::lab::layout::SHARED_DIR;
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use nix::sys::signal::Signal;

/// A guest needs so long at most for some writes; its processors are emulated.
const LIMIT: Duration = Duration::from_secs(90);
const NAME: &str = "shop";
const LOCAL: [&str; 2] = ["root=8MiB", "data=64MiB"];
const SHARED: [&str; 2] = ["root=8MiB,pool=shared", "data=64MiB,pool=shared"];

/// What the guest has said since its console began to be kept, by boot.
fn said(lab: &Lab, vm: &Vm) -> anyhow::Result<String> {
    let bytes = fs::read(story::file(lab, vm.host_number()?, &vm.uid))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What it was told to be on stable storage, in its last boot.
fn acknowledged(lab: &Lab, vm: &Vm) -> anyhow::Result<BTreeSet<u64>> {
    let text = said(lab, vm)?;
    let boot = text.rsplit_once("dalgu-guest ready").map_or("", |(_, boot)| boot);
    let whole = boot.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let counts = whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("written "));
    Ok(counts.filter_map(|count| count.parse().ok()).collect())
}

/// Waits until the guest has written more.
async fn more(lab: &Lab, vm: &Vm, count: usize) -> anyhow::Result<BTreeSet<u64>> {
    let before = acknowledged(lab, vm)?.len();
    wait_for("more writes", LIMIT, async || {
        acknowledged(lab, vm).is_ok_and(|now| now.len() >= before + count)
    })
    .await?;
    acknowledged(lab, vm)
}

fn is_shared(vm: &Vm) -> bool {
    vm.disks.iter().any(|(pool, _)| pool == "shared")
}

/// Where its host has its disks.
fn inside(vm: &Vm) -> PathBuf {
    let pool = match is_shared(vm) {
        true => SHARED_DIR,
        false => "/var/lib/dalgu/local",
    };
    PathBuf::from(pool).join(&vm.uid)
}

/// The same from outside.
fn folder(lab: &Lab, vm: &Vm) -> anyhow::Result<PathBuf> {
    if is_shared(vm) {
        return Ok(lab.layout().shared().join(&vm.uid));
    }
    let host = lab.layout().host(vm.host_number()?);
    Ok(host.outside("/var/lib/dalgu/local").join(&vm.uid))
}

/// The names of the files of the disk that the guest writes to: below the pool, without numbers and format. Either it is the VM's
/// own, or it is the only volume of the site.
fn data(lab: &Lab, vm: &Vm) -> anyhow::Result<String> {
    if folder(lab, vm)?.join("data.qcow2").exists() {
        return Ok(format!("{}/data", vm.uid));
    }
    let volumes = fs::read_dir(folder(lab, vm)?.with_file_name("volumes"))?;
    let names = volumes.map(|file| Ok(file?.file_name().to_string_lossy().into_owned()));
    let names: Vec<_> = names.collect::<anyhow::Result<_>>()?;
    let stems: BTreeSet<_> = names.iter().filter_map(|name| name.split('.').next()).collect();
    ensure!(stems.len() == 1, "the volumes are {names:?}");
    Ok(format!(
        "volumes/{}",
        stems.into_iter().next().unwrap_or_default()
    ))
}

/// The numbers of the layers of the disk that the guest writes to; and that the other disk has the same.
fn layers(lab: &Lab, vm: &Vm) -> anyhow::Result<Vec<u32>> {
    let mut found = [BTreeSet::new(), BTreeSet::new()];
    let (pool, data) = (folder(lab, vm)?, data(lab, vm)?);
    let data = pool.with_file_name(&data);
    let (volumes, data) = (
        data.parent().context("a folder")?,
        data.file_name().context("a name")?,
    );
    let folders = BTreeSet::from([pool.as_path(), volumes]);
    for entry in folders
        .into_iter()
        .map(fs::read_dir)
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
    {
        let name = entry?.file_name().to_string_lossy().into_owned();
        match name.split('.').collect::<Vec<_>>()[..] {
            ["root", number, "qcow2"] => _ = found[0].insert(number.parse::<u32>()?),
            [disk, number, "qcow2"] if *disk == *data => _ = found[1].insert(number.parse::<u32>()?),
            ["root", "qcow2"] => {}
            [disk, "qcow2"] if *disk == *data => {}
            _ => anyhow::bail!("{name} was left"),
        }
    }
    ensure!(found[0] == found[1], "the disks differ: {found:?}");
    Ok(found[0].iter().copied().collect())
}

/// The files that are there are these and no more, soon: what is deleted goes in the background.
async fn has_layers(lab: &Lab, vm: &Vm, expected: &[u32]) -> anyhow::Result<()> {
    let mut last = None;
    let found = wait_for("the layers", LIMIT, async || {
        let seen = layers(lab, vm);
        let right = seen.as_ref().is_ok_and(|seen| seen == expected);
        last = Some(seen);
        right
    })
    .await;
    found.with_context(|| format!("expected {expected:?}, last seen {last:?}"))
}

/// What is on the disk that the guest writes to: the counts whose sectors hold their lines.
async fn held(lab: &Lab, vm: &Vm) -> anyhow::Result<BTreeSet<u64>> {
    let data = data(lab, vm)?;
    let top = match layers(lab, vm)?.last() {
        Some(number) => format!("{data}.{number}.qcow2"),
        None => format!("{data}.qcow2"),
    };
    // The paths in the layers are those that the host sees.
    let (inside, outside) = (inside(vm), folder(lab, vm)?);
    let (file, raw) = (inside.with_file_name(top), inside.join("held.raw"));
    let (file, raw) = (file.to_string_lossy(), raw.to_string_lossy());
    let convert = ["qemu-img", "convert", "-U", "-O", "raw", &*file, &*raw];
    lab.exec(vm.host_number()?, &convert).await?;
    let bytes = fs::read(outside.join("held.raw"))?;
    fs::remove_file(outside.join("held.raw"))?;
    let line = |at: usize| {
        let text = String::from_utf8_lossy(bytes.get(at * 512..at * 512 + 64)?).into_owned();
        let count: u64 = text.trim_end().strip_prefix("dalgu-write ")?.parse().ok()?;
        (count == at as u64).then_some(count)
    };
    Ok((0..bytes.len() / 512).filter_map(line).collect())
}

async fn nothing_is_lost(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    let told = acknowledged(lab, vm)?;
    ensure!(told.len() > 10, "too little was written: {}", told.len());
    let held = held(lab, vm).await?;
    let lost: Vec<_> = told.difference(&held).collect();
    ensure!(lost.is_empty(), "lost: {lost:?}");
    Ok(())
}

async fn snapshots(lab: &Lab) -> anyhow::Result<Vec<(String, String)>> {
    let list = json(lab, &["snapshot", "list", NAME]).await?;
    let text = |one: &serde_json::Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    let list = list.as_array().cloned().unwrap_or_default();
    let one = |one: &serde_json::Value| {
        (
            text(one, "name"),
            text(one, "state").replace("SNAPSHOT_STATE_", ""),
        )
    };
    Ok(list.iter().map(one).collect())
}

async fn ready(lab: &Lab, names: &[&str]) -> anyhow::Result<()> {
    let found = snapshots(lab).await?;
    let right = found
        .iter()
        .map(|(name, _)| name.as_str())
        .eq(names.iter().copied())
        && found.iter().all(|(_, state)| state == "READY");
    ensure!(right, "{found:?}, should be {names:?}");
    Ok(())
}

async fn no_job(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    for target in ["vda", "vdb"] {
        let info = lab
            .virsh(vm.host_number()?, &["blockjob", NAME, target, "--info"])
            .await?;
        ensure!(!info.contains("ommit"), "a job was left: {info}");
    }
    Ok(())
}

async fn begin(lab: &Lab, disks: [&str; 2]) -> anyhow::Result<Vm> {
    let words = create_with(NAME, disks[0], CMDLINE, &["--disk", disks[1]]);
    dalgu(lab, &words).await?;
    let vm = words::vm(lab, NAME).await?;
    wait_for("the first writes", LIMIT, async || {
        acknowledged(lab, &vm).is_ok_and(|told| told.len() > 10)
    })
    .await?;
    Ok(vm)
}

async fn refused(lab: &Lab, words: &[&str], reason: &str) -> anyhow::Result<()> {
    let ended = try_dalgu(lab, words).await?;
    let said = format!("{ended:?}");
    ensure!(ended.code != 0 && said.contains(reason), "{words:?}: {said}");
    Ok(())
}

/// Made, deleted in the middle and at the top, gone back to.
async fn life(lab: &Lab) -> anyhow::Result<()> {
    let vm = begin(lab, LOCAL).await?;
    for name in ["one", "two", "three"] {
        dalgu(lab, &["snapshot", "create", NAME, name]).await?;
        more(lab, &vm, 20).await?;
    }
    ready(lab, &["one", "two", "three"]).await?;
    has_layers(lab, &vm, &[1, 2, 3]).await?;
    refused(
        lab,
        &["snapshot", "create", NAME, "two"],
        "SNAPSHOT_ALREADY_EXISTS",
    )
    .await?;
    refused(lab, &["snapshot", "revert", NAME, "two"], "VM_RUNNING").await?;
    refused(
        lab,
        &["vm", "update", NAME, "--grow-disk", "data=96MiB"],
        "SNAPSHOTS_PRESENT",
    )
    .await?;
    refused(lab, &["vm", "migrate", NAME], "SNAPSHOTS_PRESENT").await?;
    dalgu(lab, &["snapshot", "delete", NAME, "two"]).await?;
    has_layers(lab, &vm, &[1, 3]).await?;
    dalgu(lab, &["snapshot", "delete", NAME, "three"]).await?;
    has_layers(lab, &vm, &[1]).await?;
    no_job(lab, &vm).await?;
    more(lab, &vm, 10).await?;
    nothing_is_lost(lab, &vm).await?;

    let before = acknowledged(lab, &vm)?;
    dalgu(lab, &["snapshot", "create", NAME, "four"]).await?;
    let after = acknowledged(lab, &vm)?;
    dalgu(lab, &["snapshot", "create", NAME, "five"]).await?;
    let late = more(lab, &vm, 40).await?;
    dalgu(lab, &["vm", "stop", NAME, "--force"]).await?;
    nothing_is_lost(lab, &vm).await?;
    refused(lab, &["snapshot", "revert", NAME, "four"], "SNAPSHOTS_LATER").await?;
    dalgu(lab, &["snapshot", "revert", NAME, "four", "--discard-later"]).await?;
    ready(lab, &["one", "four"]).await?;
    has_layers(lab, &vm, &[1, 6]).await?;
    let held = held(lab, &vm).await?;
    let newest = after.last().copied().unwrap_or(0);
    // One more may have been on its way.
    ensure!(
        before.is_subset(&held),
        "going back lost {:?}",
        before.difference(&held)
    );
    ensure!(
        held.last().copied() <= Some(newest + 2) && late.last() > Some(&(newest + 20)),
        "it holds what was written later: {held:?}, {newest}"
    );
    // Off, a layer in the middle and the newest are merged as files.
    dalgu(lab, &["snapshot", "create", NAME, "off"]).await?;
    dalgu(lab, &["snapshot", "delete", NAME, "one"]).await?;
    has_layers(lab, &vm, &[6, 7]).await?;
    dalgu(lab, &["snapshot", "delete", NAME, "off"]).await?;
    has_layers(lab, &vm, &[6]).await?;
    let left = self::held(lab, &vm).await?;
    ensure!(left == held, "merged files hold {left:?}, not {held:?}");
    dalgu(lab, &["vm", "start", NAME]).await?;
    more(lab, &vm, 15).await?;
    dalgu(lab, &["snapshot", "delete", NAME, "four"]).await?;
    has_layers(lab, &vm, &[]).await?;
    nothing_is_lost(lab, &vm).await?;
    dalgu(lab, &["vm", "delete", NAME, "--force"]).await?;
    Ok(())
}

/// A volume of the site has the layers of its VM's snapshots, and stays with the VM as long.
async fn with_a_volume(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &["volume", "create", "ledger", "--size", "64MiB"]).await?;
    let vm = begin(lab, [LOCAL[0], "data,volume=ledger"]).await?;
    for name in ["one", "two", "three"] {
        dalgu(lab, &["snapshot", "create", NAME, name]).await?;
        more(lab, &vm, 20).await?;
    }
    has_layers(lab, &vm, &[1, 2, 3]).await?;
    for words in [
        &["vm", "update", NAME, "--remove-disk", "data"][..],
        &["vm", "update", NAME, "--move-disk", "data=shared"],
        &["volume", "update", "ledger", "--size", "96MiB"],
    ] {
        refused(lab, words, "SNAPSHOTS_PRESENT").await?;
    }
    let ill = try_dalgu(lab, &["doctor"]).await?;
    ensure!(!ill.stdout.contains("LEFTOVER"), "{ill:?}");
    dalgu(lab, &["snapshot", "delete", NAME, "two"]).await?;
    has_layers(lab, &vm, &[1, 3]).await?;
    nothing_is_lost(lab, &vm).await?;
    let backup = json(lab, &["backup", "create", NAME, "--pool", "shared", "--wait"]).await?;

    let then = acknowledged(lab, &vm)?;
    dalgu(lab, &["snapshot", "create", NAME, "four"]).await?;
    let late = more(lab, &vm, 40).await?;
    dalgu(lab, &["vm", "stop", NAME, "--force"]).await?;
    nothing_is_lost(lab, &vm).await?;
    dalgu(lab, &["snapshot", "revert", NAME, "four"]).await?;
    let held = held(lab, &vm).await?;
    ensure!(then.is_subset(&held), "lost {:?}", then.difference(&held));
    ensure!(!late.is_subset(&held), "it holds what was written later");
    dalgu(lab, &["snapshot", "delete", NAME, "one"]).await?;
    dalgu(lab, &["vm", "start", NAME]).await?;
    more(lab, &vm, 15).await?;
    nothing_is_lost(lab, &vm).await?;
    let before = acknowledged(lab, &vm)?;
    // The VM goes with its snapshots, and what the next one finds on the volume is what this one wrote, whoever dies meanwhile.
    let deleting = words::begin(lab, &["vm", "delete", NAME, "--force"]).await?;
    tokio::time::sleep(Duration::from_millis(400)).await;
    lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
    lab.start(Daemon::Agent(1)).await?;
    let ended = words::end_of(lab, &deleting, LIMIT * 2).await?;
    ensure!(words::state_of(&ended).ends_with("SUCCEEDED"), "{ended}");
    let next = begin(lab, [LOCAL[0], "data,volume=ledger"]).await?;
    let found = self::held(lab, &next).await?;
    ensure!(before.is_subset(&found), "lost {:?}", before.difference(&found));
    dalgu(lab, &["vm", "delete", NAME, "--force"]).await?;
    dalgu(lab, &["volume", "delete", "ledger"]).await?;
    let uid = backup["uid"].as_str().context("a backup has a uid")?;
    dalgu(lab, &["backup", "delete", uid]).await?;
    Ok(())
}

/// On disks that all hosts see, a VM moves with its snapshots.
async fn moving(lab: &Lab) -> anyhow::Result<()> {
    let vm = begin(lab, SHARED).await?;
    dalgu(lab, &["snapshot", "create", NAME, "one"]).await?;
    let before = more(lab, &vm, 20).await?;
    dalgu(lab, &["vm", "migrate", NAME]).await?;
    let moved = words::vm(lab, NAME).await?;
    ensure!(moved.host != vm.host, "it did not move");
    dalgu(lab, &["snapshot", "create", NAME, "two"]).await?;
    dalgu(lab, &["snapshot", "delete", NAME, "one"]).await?;
    has_layers(lab, &moved, &[2]).await?;
    ready(lab, &["two"]).await?;
    dalgu(lab, &["vm", "stop", NAME, "--force"]).await?;
    let held = held(lab, &moved).await?;
    ensure!(before.is_subset(&held), "lost {:?}", before.difference(&held));
    dalgu(lab, &["vm", "delete", NAME, "--force"]).await?;
    Ok(())
}

/// Waits for the end of an operation; where libvirt has lost account of a merge, does what the VM's error says.
async fn until_ended_or_lost(lab: &Lab, operation: &str) -> anyhow::Result<()> {
    let mut lost = false;
    wait_for("an end, or a word", LIMIT, async || {
        let ended = words::operation(lab, operation).await;
        let error = words::vm(lab, NAME)
            .await
            .map(|vm| vm.all["status"]["error"].to_string());
        lost = error.is_ok_and(|error| error.contains("lost account") || error.contains("does not know"));
        lost || ended.is_ok_and(|ended| ended["endTime"].is_string())
    })
    .await?;
    if lost {
        dalgu(lab, &["vm", "stop", NAME, "--force"]).await?;
        dalgu(lab, &["vm", "start", NAME]).await?;
    }
    Ok(())
}

/// A daemon dies at about every point of a creation and of a deletion.
async fn deaths(lab: &Lab, daemon: Daemon) -> anyhow::Result<()> {
    let vm = begin(lab, LOCAL).await?;
    for (number, delay_ms) in [0_u64, 30, 80, 150, 250, 400].into_iter().enumerate() {
        let name = format!("s{number}");
        for words in [["create", NAME, &name], ["delete", NAME, &name]] {
            let all: Vec<_> = ["snapshot"].into_iter().chain(words).collect();
            let operation = words::begin(lab, &all).await?;
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            lab.signal(daemon, Signal::SIGKILL).await?;
            lab.start(daemon).await?;
            until_ended_or_lost(lab, &operation).await?;
            let ended = words::end_of(lab, &operation, LIMIT * 2).await?;
            ensure!(
                words::state_of(&ended).ends_with("SUCCEEDED"),
                "{words:?} after {delay_ms} ms: {ended}"
            );
            more(lab, &vm, 5).await?;
        }
        has_layers(lab, &vm, &[]).await?;
        no_job(lab, &vm).await?;
        nothing_is_lost(lab, &vm).await?;
    }
    dalgu(lab, &["vm", "delete", NAME, "--force"]).await?;
    Ok(())
}

/// Waits until the guest was frozen so often, where its agent freezes it at all, and has been let go on each time.
async fn goes_on(lab: &Lab, vm: &Vm, agent: &str, times: usize) -> anyhow::Result<()> {
    let frozen = if agent.ends_with("mute") { 0 } else { times };
    wait_for("the guest to be let go on", LIMIT, async || {
        let text = said(lab, vm).unwrap_or_default();
        let mut heard = text
            .lines()
            .map(str::trim)
            .filter(|line| ["frozen", "thawed"].contains(line));
        let count = heard.clone().filter(|line| *line == "frozen").count();
        count == frozen && heard.next_back().is_none_or(|last| last == "thawed")
    })
    .await
}

/// A guest whose agent freezes its file systems, one whose agent does so too late, and one whose agent is there and does not answer.
async fn freezing(lab: &Lab) -> anyhow::Result<()> {
    for (parameter, frozen) in [
        ("dalgu.agent", true),
        ("dalgu.agent=late", false),
        ("dalgu.agent=mute", false),
    ] {
        let cmdline = format!("{CMDLINE} {parameter}");
        dalgu(lab, &create_with(NAME, LOCAL[0], &cmdline, &["--disk", LOCAL[1]])).await?;
        let vm = words::vm(lab, NAME).await?;
        wait_for("the agent in the guest", LIMIT, async || {
            let xml = lab.virsh(1, &["dumpxml", NAME]).await.unwrap_or_default();
            xml.contains("state='connected'") && acknowledged(lab, &vm).is_ok_and(|told| told.len() > 10)
        })
        .await?;
        dalgu(lab, &["snapshot", "create", NAME, "one"]).await?;
        let list = json(lab, &["snapshot", "list", NAME]).await?;
        let quiesced = list[0]["quiesced"].as_bool().unwrap_or(false);
        ensure!(quiesced == frozen, "{parameter}: {list}");
        goes_on(lab, &vm, parameter, 1).await?;
        more(lab, &vm, 5).await?;
        dalgu(lab, &["snapshot", "delete", NAME, "one"]).await?;
        let backup = json(lab, &["backup", "create", NAME, "--pool", "shared", "--wait"]).await?;
        ensure!(
            backup["quiesced"].as_bool().unwrap_or(false) == frozen,
            "{parameter}: {backup}"
        );
        goes_on(lab, &vm, parameter, 2).await?;
        dalgu(
            lab,
            &[
                "backup",
                "delete",
                backup["uid"].as_str().context("a backup has a uid")?,
            ],
        )
        .await?;
        nothing_is_lost(lab, &vm).await?;
        dalgu(lab, &["vm", "delete", NAME, "--force"]).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn file_systems_are_frozen_where_the_guests_agent_answers() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        freezing(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn snapshots_come_and_go_while_the_guest_writes_and_it_goes_back_to_one() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        life(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_volume_has_the_layers_of_its_vms_snapshots_and_stays_with_it_as_long() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        with_a_volume(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_vm_on_disks_that_all_hosts_see_moves_with_its_snapshots() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        moving(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn no_write_is_lost_and_nothing_is_left_when_daemons_die_amid_a_snapshot() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        deaths(lab, Daemon::Agent(1)).await?;
        deaths(lab, Daemon::Libvirtd(1)).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
