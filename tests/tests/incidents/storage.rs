//! Disks that must not be touched, disks in the way, disks half made, and storage that hangs.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, ensure};
use dalgu_tests::chaos::cable::{self, Way};
use dalgu_tests::e2e::census::{at_rest, pids_of, processes};
use dalgu_tests::e2e::story::{self, Story};
use dalgu_tests::e2e::words::{
    self, LOCAL, Vm, begin, create, dalgu, end_of, number_at, operation, state_of, try_dalgu,
};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Each disk that a guest never touches: the first half is noise, the second empty.
const DATA_BYTES: usize = 16 << 20;

/// Bytes that no two places share.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend_from_slice(&(state >> 16).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What betrays that somebody wrote to a file, be it the same bytes.
#[derive(Debug, PartialEq, Eq)]
struct Trace {
    sha256: String,
    inode: u64,
    written: SystemTime,
}

async fn trace(path: &Path) -> anyhow::Result<Trace> {
    let sum = run("sha256sum", [path]).await?;
    let meta = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok(Trace {
        sha256: sum.split_whitespace().next().unwrap_or_default().to_owned(),
        inode: meta.ino(),
        written: meta.modified()?,
    })
}

/// A VM's folder in a host's local pool.
fn local(lab: &Lab, host: u8, vm: &Vm) -> PathBuf {
    let pool = lab.layout().host(host).outside("/var/lib/dalgu/local");
    pool.join(&vm.uid)
}

/// Its disk in the pool that all hosts see.
fn shared(lab: &Lab, vm: &Vm) -> PathBuf {
    lab.layout().shared().join(&vm.uid).join("shared.raw")
}

/// A VM that counts on h1, with a disk in each of these pools that its guest leaves alone, named as its pool.
async fn with_data(lab: &Lab, pools: &[&str]) -> anyhow::Result<(Vm, Story)> {
    let disks: Vec<_> = pools
        .iter()
        .map(|pool| format!("{pool}=16MiB,pool={pool},format=raw"))
        .collect();
    let mut more = vec!["--host", "h1", "--stopped"];
    more.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    dalgu(lab, &create("moving", LOCAL, &more)).await?;
    let vm = words::vm(lab, "moving").await?;
    for pool in pools {
        let file = match *pool {
            "shared" => shared(lab, &vm),
            _ => local(lab, 1, &vm).join("local.raw"),
        };
        // In place: its owner and its mode are the host's business.
        let open = fs::OpenOptions::new().write(true).open(file)?;
        open.write_all_at(&noise(DATA_BYTES / 2), 0)?;
        open.sync_all()?;
    }
    dalgu(lab, &["vm", "start", "moving"]).await?;
    let vm = words::vm(lab, "moving").await?;
    let mut story = Story::default();
    story.more(lab, &vm, 3).await?;
    Ok((vm, story))
}

/// It runs on this host alone, and has said every count once.
async fn whole_on(lab: &Lab, host: &str, story: &mut Story) -> anyhow::Result<()> {
    let vm = words::vm(lab, "moving").await?;
    ensure!(
        vm.host == host && vm.state == "RUNNING" && pids_of(lab, &vm.uid)?.len() == 1,
        "{}",
        vm.all
    );
    story.more(lab, &vm, 2).await?;
    story.is_whole()
}

/// Begins to move it to h2 and waits until a part of its disks has gone.
async fn copying_to_h2(lab: &Lab) -> anyhow::Result<String> {
    let id = begin(
        lab,
        &["vm", "migrate", "moving", "--host", "h2", "--bandwidth", "4MiB"],
    )
    .await?;
    wait_for("the copying of disks", REST_LIMIT, async || {
        let now = operation(lab, &id).await;
        now.is_ok_and(|now| number_at(&now, "/migration/diskProcessedBytes") > 0)
    })
    .await?;
    Ok(id)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_04_and_15_shared_disks_stay_and_copied_ones_hang_nowhere_and_arrive_whole()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = with_data(lab, &["local", "shared"]).await?;
        let (here, there) = (
            local(lab, 1, &vm).join("local.raw"),
            local(lab, 2, &vm).join("local.raw"),
        );
        let before = (trace(&here).await?, trace(&shared(lab, &vm)).await?);

        // 15: the way to the other host is cut while disks are copied, and stays so.
        let id = copying_to_h2(lab).await?;
        cable::cut(lab, 1, Some(2), Way::Both).await?;
        dalgu(lab, &["op", "cancel", &id, "--no-wait"]).await?;
        let ended = end_of(lab, &id, REST_LIMIT)
            .await
            .context("15: it hangs although it was cancelled")?;
        ensure!(state_of(&ended) == "CANCELLED", "{ended}");
        whole_on(lab, "h1", &mut story).await?;
        let after = (trace(&here).await?, trace(&shared(lab, &vm)).await?);
        ensure!(
            after == before,
            "15: a disk was written to: {after:?}, before: {before:?}"
        );
        cable::mend(lab, 1, Some(2)).await?;
        at_rest(lab, &[], REST_LIMIT).await?;

        // 4: there and back.
        for (host, copy) in [("h2", &there), ("h1", &here)] {
            let id = begin(lab, &["vm", "migrate", "moving", "--host", host]).await?;
            let ended = end_of(lab, &id, REST_LIMIT).await?;
            ensure!(state_of(&ended) == "SUCCEEDED", "{ended}");
            let copied = number_at(&ended, "/migration/diskTotalBytes");
            ensure!(
                (DATA_BYTES as u64..2 * DATA_BYTES as u64).contains(&copied),
                "4: {copied} bytes of disks were copied: {ended}"
            );
            whole_on(lab, host, &mut story).await?;
            ensure!(
                trace(&shared(lab, &vm)).await? == before.1,
                "4: the shared disk was written to"
            );
            ensure!(
                trace(copy).await?.sha256 == before.0.sha256,
                "the copy is not the disk"
            );
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Puts something in the place of a VM's folder.
type Put = fn(&Path) -> io::Result<()>;

/// What is in the way at the destination, and why the migration then fails.
const IN_THE_WAY: [(&str, Put, &str); 3] = [
    (
        "a file for the folder",
        |folder| fs::write(folder, "x"),
        "STORAGE",
    ),
    (
        "a disk of this name that is too short",
        |folder| {
            fs::create_dir_all(folder)?;
            fs::write(folder.join("local.raw"), "too short to take the copy")
        },
        "",
    ),
    (
        "a folder for the disk",
        |folder| fs::create_dir_all(folder.join("root.qcow2/x")),
        "",
    ),
];

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_11_a_file_in_the_way_at_the_destination_leaves_the_sources_disks_alone()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = with_data(lab, &["local"]).await?;
        let before = trace(&local(lab, 1, &vm).join("local.raw")).await?;
        let pids = pids_of(lab, &vm.uid)?;
        let folder = local(lab, 2, &vm);
        for (what, put, why) in IN_THE_WAY {
            put(&folder).with_context(|| format!("put {what} there"))?;
            let id = begin(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
            let ended = end_of(lab, &id, BOOT_LIMIT).await?;
            let reason = ended["error"]["reason"].as_str().unwrap_or_default();
            ensure!(
                state_of(&ended) == "FAILED" && (why.is_empty() || reason == why),
                "{what}: {ended}"
            );
            whole_on(lab, "h1", &mut story)
                .await
                .with_context(|| format!("{what}: {ended}"))?;
            let after = trace(&local(lab, 1, &vm).join("local.raw")).await?;
            ensure!(after == before, "{what}: the source's disk was written to");
            ensure!(pids_of(lab, &vm.uid)? == pids, "{what}: another process");
            // Dalgu takes away what is in the folder of its VM, and nothing else.
            if folder.is_file() {
                fs::remove_file(&folder)?;
            }
            ensure!(!folder.exists(), "{what} was left by a migration that failed");
        }
        // One of the right size that has something else in it, also where the source's has nothing.
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("local.raw"), noise(DATA_BYTES))?;
        dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
        whole_on(lab, "h2", &mut story).await?;
        let arrived = trace(&folder.join("local.raw")).await?;
        ensure!(arrived.sha256 == before.sha256, "the copy is not the disk");
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Process ids of the `qemu-img` that fill a disk of this VM, which is their standard output.
fn copying(uid: &str) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let look = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        let disk = fs::read_link(entry.path().join("fd/1")).ok()?;
        (line.starts_with("qemu-img") && disk.to_string_lossy().contains(uid)).then(|| Pid::from_raw(pid))
    };
    entries.flatten().filter_map(look).collect()
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_48_a_crash_amid_the_copying_of_an_image_leaves_no_half_disk_that_is_used()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let images = lab.layout().host(1).outside("/var/lib/dalgu/images");
        fs::write(images.join("noise.raw"), noise(512 << 20))?;
        let disk = "root=512MiB,image=noise.raw,format=raw";
        let id = begin(lab, &create("copied", disk, &["--stopped"])).await?;
        let uid = words::vm(lab, "copied").await?.uid;
        let folder = lab.layout().host(1).outside("/var/lib/dalgu/local").join(&uid);
        wait_for("a part of the copy", REST_LIMIT, async || {
            fs::metadata(folder.join("root.raw.partial")).is_ok_and(|meta| meta.blocks() > 0)
        })
        .await?;
        // The agent first, or it would tidy up; then what works for it, as a power cut would.
        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        for pid in copying(&uid) {
            // It may just have ended with its agent.
            let _ = kill(pid, Signal::SIGKILL);
        }
        wait_for("the end of the copying", REST_LIMIT, async || {
            copying(&uid).is_empty()
        })
        .await?;
        ensure!(
            !folder.join("root.raw").exists() && folder.join("root.raw.partial").exists(),
            "the copy was not cut short: the test shows nothing"
        );
        lab.start(Daemon::Agent(1)).await?;
        let ended = end_of(lab, &id, REST_LIMIT).await?;
        ensure!(state_of(&ended) == "SUCCEEDED", "{ended}");
        let (copy, image) = (
            fs::read(folder.join("root.raw"))?,
            fs::read(images.join("noise.raw"))?,
        );
        ensure!(copy == image, "the disk is not the image");
        ensure!(!folder.join("root.raw.partial").exists());
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn an_image_that_names_another_file_fails_its_vm_and_a_good_one_in_its_place_mends_it()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let image = "/var/lib/dalgu/images/shared.qcow2";
        let overlay = [
            "qemu-img",
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            "/etc/shadow",
            image,
            "8M",
        ];
        lab.exec(1, &overlay).await?;
        let id = begin(lab, &create("victim", "root=8MiB,image=shared.qcow2", &[])).await?;
        let ended = end_of(lab, &id, REST_LIMIT).await?;
        let refused = state_of(&ended) == "FAILED" && ended.to_string().contains("IMAGE_REFUSED");
        ensure!(refused, "{ended}");
        let shown = words::json(lab, &["vm", "show", "victim"]).await?.to_string();
        ensure!(
            shown.contains("refers to another image (backing file)"),
            "{shown}"
        );
        ensure!(!shown.contains("\"retrying\":true"), "it is tried again: {shown}");
        let uid = words::vm(lab, "victim").await?.uid;
        let folder = lab.layout().host(1).outside("/var/lib/dalgu/local").join(&uid);
        ensure!(fs::read_dir(&folder)?.next().is_none(), "something was left");
        lab.exec(1, &["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"])
            .await?;
        dalgu(lab, &["vm", "start", "victim"]).await?;
        let vm = words::vm(lab, "victim").await?;
        Story::default().more(lab, &vm, 3).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Where the second pool of the host is.
const SLOW_POOL: &str = "/var/lib/dalgu/slow";
/// Lets the pool go on.
const THAW: &str = "/run/dalgu/thaw";

/// Gives h1 a second pool, on a file system of its own.
async fn add_pool(lab: &Lab) -> anyhow::Result<()> {
    let host = lab.layout().host(1);
    let image = host.outside("/var/lib/dalgu/slow.img");
    fs::File::create(&image)?.set_len(64 << 20)?;
    let steps = format!(
        "mkfs.ext4 -q -F /var/lib/dalgu/slow.img && mkdir {SLOW_POOL} && mount -o loop /var/lib/dalgu/slow.img {SLOW_POOL} \
         && rmdir {SLOW_POOL}/lost+found"
    );
    lab.exec(1, &["sh", "-c", &steps]).await?;
    let config = host.outside("/etc/dalgu/agent.toml");
    let text = fs::read_to_string(&config)?;
    fs::write(
        &config,
        format!("{text}\n[[pools]]\nname = \"slow\"\npath = \"{SLOW_POOL}\"\nshared = false\n"),
    )?;
    lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
    lab.start(Daemon::Agent(1)).await?;
    wait_for("the second pool", REST_LIMIT, async || {
        let host = words::json(lab, &["host", "show", "h1"]).await;
        host.is_ok_and(|host| host["inventory"].to_string().contains(SLOW_POOL))
    })
    .await
}

/// From now on whatever writes to the pool waits until [`THAW`] is there, at most three minutes. What lets it go on is in the
/// host's mount namespace only, so that nothing which ends the lab ends it too and leaves a frozen file system behind.
async fn hang_the_pool(lab: &Lab) -> anyhow::Result<()> {
    let layout = lab.layout();
    let anchor = fs::read_to_string(layout.pid_file(&layout.host(1).anchor()))?;
    let steps = format!(
        "fsfreeze -f {SLOW_POOL} && touch {THAW}.hangs; for i in $(seq 900); do [ -e {THAW} ] && break; sleep 0.2; done; \
         fsfreeze -u {SLOW_POOL}; rm {THAW}.hangs"
    );
    let detached = format!("setsid sh -c '{steps}' </dev/null >/dev/null 2>&1 &");
    let words = ["--target", anchor.trim(), "--mount", "--", "sh", "-c", &detached];
    run("nsenter", words).await.map(drop)
}

/// Lets it go on, and waits until it does.
async fn thaw_the_pool(lab: &Lab) -> anyhow::Result<()> {
    let outside = |file: &str| lab.layout().host(1).outside(file);
    fs::write(outside(THAW), "")?;
    let hangs = outside(&format!("{THAW}.hangs"));
    wait_for("the pool to go on", REST_LIMIT, async || !hangs.exists()).await
}

/// What others do while the pool hangs. `there` has its disk on it.
async fn meanwhile(lab: &Lab, here: &Vm, story: &mut Story) -> anyhow::Result<String> {
    let hangs = lab.layout().host(1).outside(&format!("{THAW}.hangs"));
    wait_for("the pool to hang", REST_LIMIT, async || hangs.exists()).await?;
    // Somebody waits for it already: a new VM there, and the deletion of one.
    let late = begin(lab, &create("late", "root=8MiB,pool=slow", &[])).await?;
    let gone = begin(lab, &["vm", "delete", "gone", "--force"]).await?;
    dalgu(lab, &["vm", "pause", "here"]).await?;
    dalgu(lab, &["vm", "resume", "here"]).await?;
    dalgu(lab, &create("new", LOCAL, &[])).await?;
    dalgu(lab, &["vm", "stop", "new", "--force"]).await?;
    dalgu(lab, &["vm", "delete", "new"]).await?;
    story.more(lab, here, 5).await?;
    let host = words::json(lab, &["host", "show", "h1"]).await?;
    ensure!(host["state"] == "HOST_STATE_READY", "{host}");
    ensure!(
        host["hypervisorError"].as_str().unwrap_or_default().is_empty(),
        "{host}"
    );
    for id in [&late, &gone] {
        let waits = operation(lab, id).await?;
        ensure!(
            !["SUCCEEDED", "FAILED"].contains(&state_of(&waits)),
            "the pool did not hang: {waits}"
        );
    }
    // What is on the pool runs, or stands: nobody ends it.
    ensure!(pids_of(lab, &words::vm(lab, "there").await?.uid)?.len() == 1);
    ensure!(
        hangs.exists(),
        "it hung for too short a time: the test shows nothing"
    );
    Ok(late)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_23_a_hung_pool_holds_up_only_the_vms_on_it() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        add_pool(lab).await?;
        dalgu(lab, &create("here", LOCAL, &[])).await?;
        for name in ["there", "gone"] {
            dalgu(lab, &create(name, "root=8MiB,pool=slow", &[])).await?;
        }
        let (here, there) = (words::vm(lab, "here").await?, words::vm(lab, "there").await?);
        let (mut story, mut other) = (Story::default(), Story::default());
        story.more(lab, &here, 3).await?;
        other.more(lab, &there, 3).await?;
        let before = processes(lab)?;
        hang_the_pool(lab).await?;
        let late = meanwhile(lab, &here, &mut story).await;
        thaw_the_pool(lab).await?;
        let ended = end_of(lab, &late?, REST_LIMIT).await?;
        ensure!(state_of(&ended) == "SUCCEEDED", "{ended}");
        at_rest(lab, &[], REST_LIMIT).await?;
        other.more(lab, &there, 3).await?;
        story.is_whole()?;
        other.is_whole()?;
        let gone = try_dalgu(lab, &["vm", "show", "gone"]).await?;
        ensure!(gone.code != 0, "its deletion was forgotten: {gone:?}");
        let after = processes(lab)?;
        for vm in [&here, &there] {
            let of = |all: &[_]| pids(all, &vm.uid);
            ensure!(of(&before) == of(&after), "{} has another process", vm.name);
        }
        Ok(())
    })
    .await
}

fn pids(all: &[dalgu_tests::e2e::census::Process], uid: &str) -> Vec<u32> {
    let of = all.iter().filter(|process| process.uid == uid);
    of.map(|process| process.pid).collect()
}

/// Waits until this event is the last that tells how full the second pool is, and the doctor finds that of it.
async fn is_told(lab: &Lab, event: &str, finding: Option<&str>) -> anyhow::Result<()> {
    let about = "pool slow is ";
    let word = |of: &Value, key: &str| of[key].as_str().unwrap_or_default().to_owned();
    let told = async || -> anyhow::Result<(Option<String>, Vec<String>)> {
        let events = words::json(lab, &["events", "--kind", "host"]).await?;
        let events = events.as_array().context("no events")?;
        let last = events
            .iter()
            .rfind(|event| word(event, "message").starts_with(about));
        let found = try_dalgu(lab, &["doctor", "-o", "json"]).await?;
        let found: Value = serde_json::from_str(&found.stdout)?;
        let found = found["findings"].as_array().into_iter().flatten();
        let found = found.filter(|found| word(found, "seen").starts_with(about));
        Ok((
            last.map(|event| word(event, "reason")),
            found.map(|found| word(found, "kind")).collect(),
        ))
    };
    let findings: Vec<_> = finding.map(str::to_owned).into_iter().collect();
    let wanted = (Some(event.to_owned()), findings);
    let mut last = None;
    wait_for("how full the pool is", REST_LIMIT, async || {
        last = Some(told().await);
        matches!(&last, Some(Ok(told)) if *told == wanted)
    })
    .await
    .with_context(|| format!("{last:?}, not {wanted:?}"))
}

/// Fills so much of the room that is left in the second pool.
async fn fill(lab: &Lab, file: &str, percent: u8) -> anyhow::Result<()> {
    let steps = format!(
        "room=$(df --output=avail -B 1 {SLOW_POOL} | tail -n 1) && fallocate -l $((room * {percent} / 100)) {file}"
    );
    lab.exec(1, &["sh", "-c", &steps]).await.map(drop)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_pool_that_fills_up_is_told_of_and_a_vm_that_stands_there_goes_on_when_there_is_room()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        add_pool(lab).await?;
        let marks = [
            ("pool_warn_percent = 100", "pool_warn_percent = 80"),
            ("pool_full_percent = 100", "pool_full_percent = 95"),
        ];
        e2e::set_as_at_a_site(lab, &marks).await?;
        dalgu(lab, &create("full", "root=8MiB,pool=slow", &["--stopped"])).await?;
        let nearly = format!("{SLOW_POOL}/.nearly");
        fill(lab, &nearly, 85).await?;
        is_told(lab, "PoolNearlyFull", Some("POOL_NEARLY_FULL")).await?;
        let filler = format!("{SLOW_POOL}/.full");
        let fill = format!("! dd if=/dev/zero of={filler} bs=4k 2>/dev/null && sync {filler}");
        lab.exec(1, &["sh", "-c", &fill]).await?;
        is_told(lab, "PoolFull", Some("POOL_FULL")).await?;
        let more = create("more", "root=1MiB,pool=slow", &["--stopped"]);
        let refused = try_dalgu(lab, &more).await?;
        ensure!(
            refused.code == 5 && refused.stderr.contains("takes no new disks"),
            "{refused:?}"
        );

        // Its guest comes up and writes its first count.
        dalgu(lab, &["vm", "start", "full"]).await?;
        wait_for("the VM to stand", BOOT_LIMIT, async || {
            let now = words::vm(lab, "full").await;
            now.is_ok_and(|now| now.state == "PAUSED")
        })
        .await?;
        let vm = words::vm(lab, "full").await?;
        ensure!(
            vm.all["status"]["powerReason"] == "POWER_REASON_IO_ERROR",
            "{}",
            vm.all
        );
        let events = words::json(lab, &["events"]).await?.to_string();
        ensure!(events.contains("because of an I/O error"), "{events}");
        let before = pids_of(lab, &vm.uid)?;

        // QEMU tells of errors once a second at most: of the second one when there is room and the guest goes on. libvirt then takes
        // it for paused.
        let again = "virsh -q -c qemu:///system resume full";
        let late = format!("{again} && sleep 0.1 && {again} && sleep 0.1 && rm {filler} {nearly} && {again}");
        lab.exec(1, &["sh", "-c", &late]).await?;
        let mut story = Story::default();
        story.more(lab, &vm, 10).await?;
        wait_for("libvirt to know that it runs", BOOT_LIMIT, async || {
            let state = lab.virsh(1, &["domstate", "full"]).await;
            let now = words::vm(lab, "full").await;
            state.is_ok_and(|state| state.trim() == "running") && now.is_ok_and(|now| now.state == "RUNNING")
        })
        .await?;
        dalgu(lab, &["vm", "pause", "full"]).await?;
        let status = r#"{"execute":"query-status"}"#;
        let status = lab.virsh(1, &["qemu-monitor-command", "full", status]).await?;
        ensure!(status.contains("\"running\":false"), "it is not paused: {status}");
        dalgu(lab, &["vm", "resume", "full"]).await?;
        story.more(lab, &vm, 30).await?;
        story.is_whole()?;
        ensure!(pids_of(lab, &vm.uid)? == before, "it has another process");

        // What it wrote after the pause is on its disk.
        dalgu(lab, &["vm", "restart", "full", "--reset"]).await?;
        wait_for("what the disk holds", BOOT_LIMIT, async || {
            let said = fs::read_to_string(story::file(lab, 1, &vm.uid));
            said.is_ok_and(|said| said.contains("disk holds "))
        })
        .await?;
        is_told(lab, "PoolHasRoom", None).await
    })
    .await
}
