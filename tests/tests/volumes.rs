//! Volumes on real hosts: attached to a guest that writes, grown, moved, taken away and given to another VM with all that was
//! written, also from host to host in a pool that both see, kept when VMs go, and removed when they are to go themselves.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::words::{self, LOCAL, Vm, create, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT, story};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use jiff::{Timestamp, ToSpan as _};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A guest needs so long at most to go along with a change; its processors are emulated.
const LIMIT: Duration = Duration::from_secs(120);

fn said(lab: &Lab, vm: &Vm) -> anyhow::Result<String> {
    let bytes = fs::read(story::file(lab, vm.host_number()?, &vm.uid))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits until the guest sees the disk with that size, or none where it is `None`.
async fn sees(lab: &Lab, name: &str, size_mib: Option<u64>) -> anyhow::Result<()> {
    let mut last = String::new();
    let found = wait_for("what the guest sees of the volume", BOOT_LIMIT, async || {
        let Ok(vm) = words::vm(lab, name).await else {
            return false;
        };
        let text = said(lab, &vm).unwrap_or_default();
        let line = text.lines().rev().find(|line| line.starts_with("hardware cpus "));
        last = line.unwrap_or_default().to_owned();
        match size_mib {
            Some(mib) => last.contains(&format!("data:{}", mib * 2048)),
            None => !last.is_empty() && !last.contains("data:"),
        }
    })
    .await;
    found.with_context(|| format!("the guest last had {last:?}"))
}

/// What the guest was told to be on stable storage.
fn acknowledged(text: &str) -> BTreeSet<u64> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let written = whole
        .lines()
        .filter_map(|line| line.trim().strip_prefix("written "));
    written.filter_map(|count| count.parse().ok()).collect()
}

async fn writes(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    writes_after(lab, vm, 0).await
}

/// As [`writes`], behind so many bytes of what the guest has said.
async fn writes_after(lab: &Lab, vm: &Vm, before: usize) -> anyhow::Result<()> {
    let written = wait_for("some writes", LIMIT, async || {
        said(lab, vm).is_ok_and(|text| acknowledged(&text[before.min(text.len())..]).len() > 10)
    });
    written.await.with_context(|| {
        let text = said(lab, vm).unwrap_or_default();
        let lines = text.lines().filter(|line| !line.starts_with("tick "));
        format!("{} said {:?}", vm.name, lines.collect::<Vec<_>>())
    })
}

/// The volume as Dalgu tells of it.
async fn volume(lab: &Lab, name: &str) -> anyhow::Result<Value> {
    json(lab, &["volume", "show", name]).await
}

async fn until_state(lab: &Lab, name: &str, state: &str) -> anyhow::Result<Value> {
    let mut last = Value::Null;
    let found = wait_for(&format!("that {name} is {state}"), LIMIT, async || {
        last = volume(lab, name).await.unwrap_or_default();
        last["status"]["state"] == format!("VOLUME_STATE_{state}")
    })
    .await;
    found.with_context(|| format!("it was last {last}"))?;
    Ok(last)
}

fn file(lab: &Lab, host: u8, volume: &Value) -> PathBuf {
    let pool = lab.layout().host(host).outside("/var/lib/dalgu/local");
    let uid = volume["uid"].as_str().unwrap_or_default();
    pool.join(format!("volumes/{uid}.qcow2"))
}

/// Hosts on which the volume's file is.
fn on_hosts(lab: &Lab, volume: &Value) -> Vec<u8> {
    let all = lab.hosts();
    let hosts = all.iter().map(|host| host.number);
    hosts.filter(|host| file(lab, *host, volume).exists()).collect()
}

/// Every line that was acknowledged is in its sector.
async fn nothing_is_lost(lab: &Lab, file: &Path, all: &BTreeSet<u64>) -> anyhow::Result<()> {
    ensure!(all.len() > 20, "too little was written: {}", all.len());
    let raw = lab.layout().dir().join("ledger.raw");
    let (file, raw_text) = (file.to_string_lossy(), raw.to_string_lossy());
    run("qemu-img", ["convert", "-U", "-O", "raw", &*file, &*raw_text]).await?;
    let bytes = fs::read(&raw)?;
    for count in all {
        let at = usize::try_from(*count)? * 512;
        let wanted = format!("dalgu-write {count}");
        let found = String::from_utf8_lossy(&bytes[at..at + 64]).trim_end().to_owned();
        ensure!(found == wanted, "sector {count} holds {found:?}");
    }
    Ok(())
}

async fn refused(lab: &Lab, words: &[&str], why: &str) -> anyhow::Result<()> {
    let ended = try_dalgu(lab, words).await?;
    let told = ended.code != 0 && ended.stderr.contains(why);
    ensure!(told, "`dalgu {}`: {ended:?}", words.join(" "));
    Ok(())
}

/// Attached to a guest that writes, grown, moved, and taken away while an agent dies. Answers what was written.
async fn used(lab: &Lab) -> anyhow::Result<BTreeSet<u64>> {
    dalgu(lab, &["volume", "create", "ledger", "--size", "64MiB"]).await?;
    ensure!(volume(lab, "ledger").await?["status"]["state"] == "VOLUME_STATE_NEW");
    dalgu(lab, &create("shop", LOCAL, &["--host", "h1"])).await?;
    sees(lab, "shop", None).await?;
    let add = [
        "vm",
        "update",
        "shop",
        "--wait",
        "--add-disk",
        "data,volume=ledger",
    ];
    dalgu(lab, &add).await?;
    sees(lab, "shop", Some(64)).await?;
    let shop = words::vm(lab, "shop").await?;
    writes(lab, &shop).await?;
    refused(lab, &["volume", "delete", "ledger"], "VOLUME_IN_USE").await?;
    refused(lab, &create("other", "data,volume=ledger", &[]), "VOLUME_IN_USE").await?;
    dalgu(lab, &["volume", "update", "ledger", "--size", "96MiB"]).await?;
    sees(lab, "shop", Some(96)).await?;
    let before = said(lab, &shop)?;
    dalgu(lab, &["vm", "migrate", "shop", "--host", "h2"]).await?;
    let ledger = volume(lab, "ledger").await?;
    ensure!(
        on_hosts(lab, &ledger) == [2] && ledger["status"]["host"] == "h2",
        "{ledger}"
    );
    let moved = words::vm(lab, "shop").await?;
    writes(lab, &moved).await?;
    let mut all = acknowledged(&before);
    all.extend(acknowledged(&said(lab, &moved)?));
    dalgu(lab, &["vm", "update", "shop", "--remove-disk", "data"]).await?;
    lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
    lab.start(Daemon::Agent(2)).await?;
    until_state(lab, "ledger", "AVAILABLE").await?;
    sees(lab, "shop", None).await?;
    nothing_is_lost(lab, &file(lab, 2, &ledger), &all).await?;
    Ok(all)
}

/// The next VM is made where the volume is, with all that the first one wrote; the volume stays when both are gone.
async fn given_on(lab: &Lab, all: &BTreeSet<u64>) -> anyhow::Result<()> {
    let next = |host: &'static str| create("next", LOCAL, &["--disk", "data,volume=ledger", "--host", host]);
    refused(lab, &next("h1"), "ledger").await?;
    dalgu(lab, &["vm", "delete", "shop", "--force"]).await?;
    dalgu(lab, &create("next", LOCAL, &["--disk", "data,volume=ledger"])).await?;
    sees(lab, "next", Some(96)).await?;
    let next = words::vm(lab, "next").await?;
    ensure!(next.host == "h2", "{}", next.all);
    let ledger = until_state(lab, "ledger", "IN_USE").await?;
    nothing_is_lost(lab, &file(lab, 2, &ledger), all).await?;
    dalgu(lab, &["vm", "delete", "next", "--force"]).await?;
    let ledger = until_state(lab, "ledger", "AVAILABLE").await?;
    ensure!(on_hosts(lab, &ledger) == [2], "{ledger}");
    nothing_is_lost(lab, &file(lab, 2, &ledger), all).await
}

/// The file of a volume in the pool that all hosts see.
fn shared_file(lab: &Lab, volume: &Value) -> PathBuf {
    let uid = volume["uid"].as_str().unwrap_or_default();
    lab.layout().shared().join(format!("volumes/{uid}.qcow2"))
}

/// Takes a volume from one VM that runs, and gives it to another, which finds all that was written.
async fn passes(lab: &Lab, from: &str, to: &str, file: &Path, all: &BTreeSet<u64>) -> anyhow::Result<()> {
    dalgu(lab, &["vm", "update", from, "--remove-disk", "data", "--wait"]).await?;
    let common = until_state(lab, "common", "AVAILABLE").await?;
    sees(lab, from, None).await?;
    nothing_is_lost(lab, file, all).await?;
    let vm = words::vm(lab, to).await?;
    let before = said(lab, &vm)?.len();
    let add = ["vm", "update", to, "--add-disk", "data,volume=common", "--wait"];
    dalgu(lab, &add).await?;
    sees(lab, to, Some(32)).await?;
    // It writes the same lines to the same sectors, from the first on; those behind are there still.
    writes_after(lab, &vm, before).await?;
    nothing_is_lost(lab, file, all).await?;
    let now = until_state(lab, "common", "IN_USE").await?;
    ensure!(
        now["uid"] == common["uid"] && on_hosts(lab, &now).is_empty(),
        "{now}"
    );
    Ok(())
}

/// In a pool that all hosts see a volume stays where it is while its VM moves, and VMs on two hosts have it in turn.
async fn in_a_shared_pool(lab: &Lab) -> anyhow::Result<()> {
    let create_it = [
        "volume", "create", "common", "--size", "32MiB", "--pool", "shared",
    ];
    dalgu(lab, &create_it).await?;
    let disk = ["--disk", "data,volume=common"];
    dalgu(
        lab,
        &create("one", LOCAL, &[&disk[..], &["--host", "h1"]].concat()),
    )
    .await?;
    dalgu(lab, &create("two", LOCAL, &["--host", "h1"])).await?;
    sees(lab, "one", Some(32)).await?;
    let one = words::vm(lab, "one").await?;
    writes(lab, &one).await?;
    let common = volume(lab, "common").await?;
    let file = shared_file(lab, &common);
    let inode = fs::metadata(&file)?.ino();
    let other = create("other", LOCAL, &[&disk[..], &["--host", "h2"]].concat());
    refused(lab, &other, "VOLUME_IN_USE").await?;
    let mut all = acknowledged(&said(lab, &one)?);
    dalgu(lab, &["vm", "migrate", "one", "--host", "h2"]).await?;
    let one = words::vm(lab, "one").await?;
    wait_for("more writes", LIMIT, async || {
        said(lab, &one).is_ok_and(|text| acknowledged(&text).len() > 15)
    })
    .await?;
    all.extend(acknowledged(&said(lab, &one)?));
    nothing_is_lost(lab, &file, &all).await?;
    sees(lab, "two", None).await?;
    passes(lab, "one", "two", &file, &all).await?;
    passes(lab, "two", "one", &file, &all).await?;
    ensure!(fs::metadata(&file)?.ino() == inode, "it is another file");
    for name in ["one", "two"] {
        dalgu(lab, &["vm", "delete", name, "--force"]).await?;
    }
    until_state(lab, "common", "AVAILABLE").await?;
    nothing_is_lost(lab, &file, &all).await
}

/// Has the grace period of a deleted volume end soon, in the store of a controller that does not run. Answers when.
fn shorten_grace(lab: &Lab, name: &str) -> anyhow::Result<Timestamp> {
    let store = rusqlite::Connection::open(lab.layout().controller_data().join("dalgu.db"))?;
    let read = "SELECT value FROM volumes WHERE key = ?1";
    let text: String = store.query_row(read, [name], |row| row.get(0))?;
    let mut record: Value = serde_json::from_str(&text)?;
    let end = Timestamp::now() + 5.seconds();
    let before = record["purge_time"]
        .as_str()
        .unwrap_or_default()
        .parse::<Timestamp>();
    ensure!(
        before.is_ok_and(|before| before > end),
        "it was to be kept longer: {text}"
    );
    record["purge_time"] = end.to_string().into();
    store.execute(
        "UPDATE volumes SET value = ?2 WHERE key = ?1",
        (name, record.to_string()),
    )?;
    Ok(end)
}

/// Deleted, had back, and at last removed.
async fn removed(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &["volume", "delete", "common"]).await?;
    let common = until_state(lab, "common", "DELETED").await?;
    dalgu(lab, &["volume", "delete", "ledger"]).await?;
    let ledger = until_state(lab, "ledger", "DELETED").await?;
    refused(lab, &create("late", "data,volume=ledger", &[]), "VOLUME_DELETED").await?;
    refused(
        lab,
        &["volume", "create", "ledger", "--size", "1MiB"],
        "VOLUME_DELETED",
    )
    .await?;
    dalgu(lab, &["volume", "undelete", "ledger"]).await?;
    until_state(lab, "ledger", "AVAILABLE").await?;
    ensure!(on_hosts(lab, &ledger) == [2]);
    // Without a grace period it goes at once; also where its host comes back later.
    let config = lab.layout().dir().join("controller.toml");
    let mut config = fs::OpenOptions::new().append(true).open(config)?;
    writeln!(config, "volume_grace_hours = 0")?;
    lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
    lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
    // The other's grace period ends by itself, and not before.
    ensure!(shared_file(lab, &common).exists());
    let end = shorten_grace(lab, "common")?;
    lab.start(Daemon::Controller).await?;
    wait_for("the shared file to go", LIMIT, async || {
        !shared_file(lab, &common).exists()
    })
    .await?;
    ensure!(Timestamp::now() >= end, "it went before {end}");
    dalgu(lab, &["volume", "delete", "ledger"]).await?;
    ensure!(on_hosts(lab, &ledger) == [2]);
    lab.start(Daemon::Agent(2)).await?;
    wait_for("the file to go", LIMIT, async || {
        on_hosts(lab, &ledger).is_empty()
    })
    .await?;
    wait_for("the record to go", LIMIT, async || {
        json(lab, &["volume", "list"])
            .await
            .is_ok_and(|all| all == Value::Array(Vec::new()))
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_volume_is_attached_grows_moves_goes_to_another_vm_and_is_removed_with_nothing_lost()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let all = used(lab).await?;
        given_on(lab, &all).await?;
        in_a_shared_pool(lab).await?;
        removed(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// What the guest reads from the first sector of its disk: a count that it never made itself.
const MARK: u64 = 4_711;

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_volume_of_an_image_boots_one_vm_after_the_other_and_keeps_its_image() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let path = lab.layout().dir().join("tiny.raw");
        let mut bytes = vec![0; 8 << 20];
        let mark = format!("{:<511}\n", format!("dalgu-tick {MARK}"));
        bytes[..512].copy_from_slice(mark.as_bytes());
        fs::write(&path, bytes)?;
        let path = path.to_string_lossy();
        dalgu(lab, &["image", "import", &path, "--version", "1.0"]).await?;
        dalgu(lab, &["volume", "create", "home", "--image", "tiny"]).await?;
        for name in ["one", "two"] {
            dalgu(lab, &create(name, "root,volume=home", &[])).await?;
            let vm = words::vm(lab, name).await?;
            let found = format!("disk holds {MARK}");
            wait_for("what the disk holds", BOOT_LIMIT, async || {
                said(lab, &vm).is_ok_and(|text| text.contains("disk holds"))
            })
            .await?;
            // The first VM counts on in the volume; the second finds what it left.
            let text = said(lab, &vm)?;
            ensure!(text.contains(&found) == (name == "one"), "{text}");
            wait_for("counts on the disk", LIMIT, async || {
                said(lab, &vm).is_ok_and(|text| text.contains("tick 50\r") || text.contains("tick 50\n"))
            })
            .await?;
            refused(lab, &["image", "delete", "tiny:1.0"], "IMAGE_IN_USE").await?;
            dalgu(lab, &["vm", "delete", name, "--force"]).await?;
        }
        refused(lab, &["image", "delete", "tiny:1.0"], "IMAGE_IN_USE").await?;
        let home = volume(lab, "home").await?;
        ensure!(home["cloneMode"] == "CLONE_MODE_OVERLAY", "{home}");
        Ok(())
    })
    .await
}
