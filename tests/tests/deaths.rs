//! Daemons that die in the middle of what is done to disks, volumes, processors, interfaces, snapshots and backups, on real hosts: each is carried out all the
//! same, once, and nothing is left over. Deaths that other files make (of what moves, and of backups as they are taken) are not made here.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::changes::{self, acknowledged, pending, said};
use dalgu_tests::e2e::words::{self, LOCAL, create, dalgu, json, number_at};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A guest needs so long at most to go along with a change; its processors are emulated.
const LIMIT: Duration = Duration::from_secs(120);
/// Of the image, in MiB.
const BULK_MIB: usize = 96;
const DAEMONS: [Daemon; 3] = [Daemon::Agent(1), Daemon::Libvirtd(1), Daemon::Controller];

/// Who dies, and after which time next.
struct Death<'a> {
    lab: &'a Lab,
    daemon: Daemon,
    turn: u64,
}

impl Death<'_> {
    /// Kills the daemon some time after what has just been asked for, and starts it again.
    async fn comes(&mut self) -> anyhow::Result<()> {
        // The moment is what is varied here; nothing is waited for.
        tokio::time::sleep(Duration::from_millis(self.turn * 70 % 330)).await;
        self.turn += 1;
        self.lab.signal(self.daemon, Signal::SIGKILL).await?;
        self.lab.start(self.daemon).await
    }

    /// Asks for a change of the VM, and waits until its host has carried it out.
    async fn amid_change(&mut self, words: &[&str]) -> anyhow::Result<words::Vm> {
        let lab = self.lab;
        dalgu(lab, words).await?;
        self.comes().await?;
        let mut last = Value::Null;
        let settled = wait_for("the change", LIMIT, async || {
            let Ok(vm) = words::vm(lab, "shop").await else {
                return false;
            };
            last = vm.all.clone();
            let at = |pointer: &str| number_at(&vm.all, pointer);
            at("/status/observedGeneration") == at("/generation") && pending(&vm).is_empty()
        });
        settled
            .await
            .with_context(|| format!("{:?} died amid {words:?}: {last}", self.daemon))?;
        words::vm(lab, "shop").await
    }

    /// Begins an operation; it succeeds.
    async fn amid_operation(&mut self, words: &[&str]) -> anyhow::Result<()> {
        let operation = words::begin(self.lab, words).await?;
        self.comes().await?;
        let ended = words::end_of(self.lab, &operation, LIMIT).await?;
        ensure!(
            words::state_of(&ended) == "SUCCEEDED",
            "{:?} died amid {words:?}: {ended}",
            self.daemon
        );
        Ok(())
    }
}

async fn volume(lab: &Lab, name: &str) -> anyhow::Result<Value> {
    json(lab, &["volume", "show", name]).await
}

/// Files of the VM's domain, as it runs.
async fn files(lab: &Lab) -> anyhow::Result<String> {
    lab.virsh(1, &["domblklist", "shop"]).await
}

/// A volume comes, grows, moves and goes, and so does a disk of the VM's own.
async fn devices(death: &mut Death<'_>, name: &str) -> anyhow::Result<()> {
    let lab = death.lab;
    dalgu(lab, &["volume", "create", name, "--size", "32MiB"]).await?;
    let disk = format!("vol,volume={name}");
    let update = ["vm", "update", "shop"];
    death
        .amid_change(&[&update[..], &["--add-disk", &disk]].concat())
        .await?;
    let uid = volume(lab, name).await?["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let file = format!("/var/lib/dalgu/local/volumes/{uid}.qcow2");
    ensure!(
        files(lab).await?.matches(&file).count() == 1,
        "{}",
        files(lab).await?
    );
    death
        .amid_change(&["volume", "update", name, "--size", "48MiB"])
        .await?;
    let outside = lab.layout().host(1).outside("/var/lib/dalgu/local");
    let outside = outside.join(format!("volumes/{uid}.qcow2"));
    let info = run("qemu-img", ["info", "-U", &outside.to_string_lossy()]).await?;
    ensure!(info.contains("48 MiB"), "{info}");
    death
        .amid_change(&[&update[..], &["--add-disk", "extra=16MiB"]].concat())
        .await?;
    let to_fast = ["--move-disk", "extra=fast", "--move-disk", "vol=fast"];
    let vm = death.amid_change(&[&update[..], &to_fast].concat()).await?;
    for there in [format!("{}/extra", vm.uid), format!("volumes/{uid}")] {
        let there = format!("/var/lib/dalgu/fast/{there}.qcow2");
        ensure!(files(lab).await?.contains(&there), "{}", files(lab).await?);
    }
    ensure!(!outside.exists(), "the volume has left its file behind");
    let outside = lab.layout().host(1).outside("/var/lib/dalgu/fast");
    let outside = outside.join(format!("volumes/{uid}.qcow2"));
    let gone = ["--remove-disk", "vol", "--remove-disk", "extra"];
    death.amid_change(&[&update[..], &gone].concat()).await?;
    let left = files(lab).await?;
    ensure!(!left.contains("extra") && !left.contains(&uid), "{left}");
    wait_for("the volume to be nobody's", LIMIT, async || {
        let now = volume(lab, name).await.unwrap_or_default();
        now["status"]["state"] == "VOLUME_STATE_AVAILABLE"
    })
    .await?;
    ensure!(outside.exists(), "the volume is not where it has moved to");
    // Without a grace period it goes at once.
    dalgu(lab, &["volume", "delete", name]).await?;
    death.comes().await?;
    wait_for("the volume to be gone", LIMIT, async || {
        let left = json(lab, &["volume", "list"]).await;
        left.is_ok_and(|left| left.as_array().is_some_and(Vec::is_empty)) && !outside.exists()
    })
    .await
}

/// A processor comes, and goes with the next start; an interface comes and goes.
async fn hardware(death: &mut Death<'_>) -> anyhow::Result<()> {
    let lab = death.lab;
    let update = ["vm", "update", "shop"];
    death
        .amid_change(&[&update[..], &["--vcpus", "2"]].concat())
        .await?;
    let counted = lab.virsh(1, &["vcpucount", "shop", "--live", "--active"]).await?;
    ensure!(counted.trim() == "2", "{counted}");
    for (change, nics) in [(["--add-nic", "more=br0"], 2), (["--remove-nic", "more"], 1)] {
        death.amid_change(&[&update[..], &change].concat()).await?;
        let there = lab.virsh(1, &["domiflist", "shop"]).await?;
        ensure!(there.matches("br0").count() == nics, "{there}");
    }
    changes::update(lab, "shop", &["--vcpus", "1"]).await?;
    Ok(())
}

/// A VM is made whose disk is a copy of an image; killed amid that, nobody leaves a part of one.
async fn copies(death: &mut Death<'_>) -> anyhow::Result<()> {
    let lab = death.lab;
    let disk = ["--disk", "root,image=bulk,clone=full"];
    let words = ["vm", "create", "copy", "--memory", "64MiB", "--stopped"];
    death.amid_operation(&[&words[..], &disk].concat()).await?;
    let vm = words::vm(lab, "copy").await?;
    let file = format!("/var/lib/dalgu/local/{}/root.qcow2", vm.uid);
    let file = lab.layout().host(1).outside(&file);
    let differs = run("qemu-img", ["compare", "-U", &file.to_string_lossy(), &bulk(lab)]).await?;
    ensure!(differs.contains("identical"), "{differs}");
    dalgu(lab, &["vm", "delete", "copy"]).await?;
    Ok(())
}

/// The file of an image, large enough that copying it takes a while.
fn bulk(lab: &Lab) -> String {
    lab.layout().dir().join("bulk.raw").to_string_lossy().into_owned()
}

/// A VM goes back to a snapshot. That libvirtd and agents die as snapshots come and go is in snapshots.rs.
async fn snapshots(death: &mut Death<'_>) -> anyhow::Result<()> {
    let lab = death.lab;
    let words = |verb: &'static str| ["snapshot", verb, "shop", "one"];
    let controller = death.daemon == Daemon::Controller;
    match controller {
        true => death.amid_operation(&words("create")).await?,
        false => _ = dalgu(lab, &words("create")).await?,
    }
    dalgu(lab, &["vm", "stop", "shop", "--force"]).await?;
    death.amid_operation(&words("revert")).await?;
    dalgu(lab, &["vm", "start", "shop"]).await?;
    match controller {
        true => death.amid_operation(&words("delete")).await?,
        false => _ = dalgu(lab, &words("delete")).await?,
    }
    writes(lab).await
}

async fn writes(lab: &Lab) -> anyhow::Result<()> {
    let vm = words::vm(lab, "shop").await?;
    let before = said(lab, &vm)?.len();
    wait_for("more writes", LIMIT, async || {
        said(lab, &vm).is_ok_and(|text| acknowledged(&text[before.min(text.len())..]).len() > 3)
    })
    .await
}

/// No job is under way, of a disk or of the domain.
async fn no_job(lab: &Lab) -> anyhow::Result<()> {
    let job = lab.virsh(1, &["domjobinfo", "shop"]).await?;
    ensure!(job.contains("None"), "a job goes on: {job}");
    for line in files(lab).await?.lines() {
        let target = line.split_whitespace().next().unwrap_or_default();
        if target.starts_with("vd") {
            let info = lab.virsh(1, &["blockjob", "shop", target, "--info"]).await?;
            ensure!(!info.contains('%'), "a job was left: {info}");
        }
    }
    Ok(())
}

async fn lives(lab: &Lab) -> anyhow::Result<()> {
    let config = lab.layout().dir().join("controller.toml");
    let mut config = fs::OpenOptions::new().append(true).open(config)?;
    writeln!(config, "volume_grace_hours = 0")?;
    lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
    lab.start(Daemon::Controller).await?;
    let mut bytes = vec![0; BULK_MIB << 20];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    fs::write(bulk(lab), bytes)?;
    dalgu(lab, &["image", "import", &bulk(lab), "--version", "1"]).await?;
    let roomy = ["--disk", "data=16MiB", "--vcpus", "1", "--max-vcpus", "2"];
    dalgu(lab, &create("shop", LOCAL, &roomy)).await?;
    writes(lab).await?;
    let backup = ["backup", "create", "shop", "--pool", "shared", "--wait"];
    let backup = json(lab, &backup).await?;
    let backup = backup["uid"].as_str().context("no backup")?.to_owned();
    for (round, daemon) in DAEMONS.into_iter().enumerate() {
        let mut death = Death {
            lab,
            daemon,
            turn: round as u64,
        };
        let begun = tokio::time::Instant::now();
        devices(&mut death, &format!("v{round}")).await?;
        hardware(&mut death).await?;
        snapshots(&mut death).await?;
        copies(&mut death).await?;
        let restore = ["backup", "restore", &backup, "again", "--stopped"];
        death.amid_operation(&restore).await?;
        dalgu(lab, &["vm", "delete", "again"]).await?;
        no_job(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        println!(
            "{daemon:?} died {} times in {:?}",
            death.turn - round as u64,
            begun.elapsed()
        );
    }
    dalgu(lab, &["image", "delete", "bulk:1"]).await?;
    dalgu(lab, &["backup", "delete", &backup]).await?;
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_amid_a_change_of_a_vms_hardware_it_is_carried_out_and_nothing_is_left()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        lives(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// libvirt's note of a running domain, in which it finds it again.
const NOTE: &str = "/run/libvirt/qemu/shop.xml";

/// The same note without the device that bears this alias: what it was while QEMU was being told of it.
fn without(note: &str, element: &str, alias: &str) -> anyhow::Result<String> {
    let alias = note
        .find(&format!("<alias name='{alias}'/>"))
        .context("no such device")?;
    let begin = note[..alias].rfind(&format!("<{element} ")).context("no begin")?;
    let end = format!("</{element}>");
    let end = alias + note[alias..].find(&end).context("no end")? + end.len();
    Ok([&note[..begin], &note[end..]].concat())
}

/// libvirtd dies after QEMU has been told of two disks and an interface, and before it has noted them; of one disk, QEMU has the
/// files only.
async fn half_plugged(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &create("shop", LOCAL, &["--disk", "data=16MiB"])).await?;
    writes(lab).await?;
    dalgu(lab, &["volume", "create", "v", "--size", "32MiB"]).await?;
    let more = ["--add-disk", "vol,volume=v", "--add-disk", "extra=16MiB"];
    let update = ["vm", "update", "shop", "--add-nic", "more=br0"];
    dalgu(lab, &[&update[..], &more].concat()).await?;
    let is_whole = async |all: usize| {
        let is_done = words::vm(lab, "shop").await.is_ok_and(|vm| {
            let at = |pointer: &str| number_at(&vm.all, pointer);
            at("/status/observedGeneration") == at("/generation") && pending(&vm).is_empty()
        });
        let nics = lab.virsh(1, &["domiflist", "shop"]).await.unwrap_or_default();
        let disks = files(lab).await.unwrap_or_default();
        let disks = disks.lines().filter(|line| line.trim_start().starts_with("vd"));
        is_done && disks.count() == all && nics.lines().filter(|line| line.contains("br0")).count() == 2
    };
    wait_for("the devices", LIMIT, async || is_whole(4).await).await?;
    for daemon in [Daemon::Agent(1), Daemon::Libvirtd(1)] {
        lab.signal(daemon, Signal::SIGKILL).await?;
    }
    let file = lab.layout().host(1).outside(NOTE);
    let mut note = fs::read_to_string(&file)?;
    for (element, alias) in [
        ("disk", "ua-disk-vol"),
        ("disk", "ua-disk-extra"),
        ("interface", "ua-nic-more"),
    ] {
        note = without(&note, element, alias)?;
    }
    fs::write(file, note)?;
    lab.start(Daemon::Libvirtd(1)).await?;
    let out = r#"{"execute":"device_del","arguments":{"id":"ua-disk-extra"}}"#;
    lab.virsh(1, &["qemu-monitor-command", "shop", out]).await?;
    let plugged = r#"{"execute":"qom-list","arguments":{"path":"/machine/peripheral"}}"#;
    wait_for("the device to be out", LIMIT, async || {
        let left = lab.virsh(1, &["qemu-monitor-command", "shop", plugged]).await;
        left.is_ok_and(|left| left.contains("ua-disk-vol") && !left.contains("ua-disk-extra"))
    })
    .await?;
    let known = [files(lab).await?, lab.virsh(1, &["domiflist", "shop"]).await?].concat();
    ensure!(
        known.matches("vd").count() == 2 && known.matches("br0").count() == 1,
        "{known}"
    );
    lab.start(Daemon::Agent(1)).await?;
    // The agent had seen it all carried out, and looks again with the next change.
    dalgu(lab, &["vm", "update", "shop", "--add-disk", "last=8MiB"]).await?;
    wait_for("the devices again", LIMIT, async || is_whole(5).await).await?;
    writes(lab).await?;
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    dalgu(lab, &["volume", "delete", "v"]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn what_qemu_has_of_a_device_that_libvirt_has_not_noted_is_taken_out_and_plugged_in_anew()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        half_plugged(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
