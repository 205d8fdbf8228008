//! Daemons that die in the middle of what is done to disks, volumes, snapshots and backups, on real hosts: each is carried out all the
//! same, once, and nothing is left over. Deaths that other files make (of what moves, and of backups as they are taken) are not made here.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::changes::{acknowledged, pending, said};
use dalgu_tests::e2e::words::{self, LOCAL, create, dalgu, json, number_at};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A guest needs so long at most to go along with a change; its processors are emulated.
const LIMIT: Duration = Duration::from_secs(120);
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

/// A volume comes, grows and goes, and a disk of the VM's own comes, moves and goes.
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
    let moved = [&update[..], &["--move-disk", "extra=fast"]].concat();
    let vm = death.amid_change(&moved).await?;
    let there = format!("/var/lib/dalgu/fast/{}/extra.qcow2", vm.uid);
    ensure!(files(lab).await?.contains(&there), "{}", files(lab).await?);
    let gone = ["--remove-disk", "vol", "--remove-disk", "extra"];
    death.amid_change(&[&update[..], &gone].concat()).await?;
    let left = files(lab).await?;
    ensure!(!left.contains("extra") && !left.contains(&uid), "{left}");
    wait_for("the volume to be nobody's", LIMIT, async || {
        let now = volume(lab, name).await.unwrap_or_default();
        now["status"]["state"] == "VOLUME_STATE_AVAILABLE"
    })
    .await?;
    // Without a grace period it goes at once.
    dalgu(lab, &["volume", "delete", name]).await?;
    death.comes().await?;
    wait_for("the volume to be gone", LIMIT, async || {
        let left = json(lab, &["volume", "list"]).await;
        left.is_ok_and(|left| left.as_array().is_some_and(Vec::is_empty)) && !outside.exists()
    })
    .await
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
    dalgu(lab, &create("shop", LOCAL, &["--disk", "data=16MiB"])).await?;
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
        snapshots(&mut death).await?;
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
    dalgu(lab, &["backup", "delete", &backup]).await?;
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_amid_a_change_of_disks_it_is_carried_out_and_nothing_is_left() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        lives(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
