//! Images on real hosts: imported once, fetched by those who need them, behind the disks of VMs that move.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{at_rest, pids_of};
use dalgu_tests::e2e::moments::{Moments, death};
use dalgu_tests::e2e::story::{self, Story};
use dalgu_tests::e2e::words::{self, Ended, NOT_FOUND, UNREACHABLE, Vm, create, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use serde_json::Value;

/// Where hosts keep copies.
const STORE: &str = "/var/lib/dalgu/image-store";
/// What the guest reads from the first sector of its disk: a count that it never made itself.
const MARK: u64 = 4_711;
/// Of the image's disk, in MiB; a part of it is noise, so that fetching it takes a while.
const SIZE_MIB: usize = 32;
/// About so long an import takes from the command's start until both hosts have the image,
const IMPORT: Duration = Duration::from_millis(1_500);
/// and a fetch.
const FETCH: Duration = Duration::from_millis(400);

/// A raw image whose first sector says what the guest looks for.
fn image(lab: &Lab, name: &str) -> anyhow::Result<PathBuf> {
    let path = lab.layout().dir().join(name);
    let mut bytes = vec![0; SIZE_MIB << 20];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for word in bytes[1 << 20..9 << 20].chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    let mark = format!("{:<511}\n", format!("dalgu-tick {MARK}"));
    bytes[..512].copy_from_slice(mark.as_bytes());
    fs::write(&path, bytes)?;
    Ok(path)
}

async fn shown(lab: &Lab, image: &str) -> anyhow::Result<Value> {
    json(lab, &["image", "get", image]).await
}

/// Hosts that say they have it, whole.
fn copies(image: &Value) -> Vec<String> {
    let copies = image["status"]["copies"].as_array().cloned().unwrap_or_default();
    let ready = copies.iter().filter(|copy| copy["ready"] == true);
    ready
        .filter_map(|copy| Some(copy["host"].as_str()?.to_owned()))
        .collect()
}

/// What is in a host's store.
fn stored(lab: &Lab, host: u8) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(lab.layout().host(host).outside(STORE))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// The guest has found on its disk what the image holds.
async fn began_with_the_image(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    let file = story::file(lab, vm.host_number()?, &vm.uid);
    let found = format!("disk holds {MARK}");
    wait_for("what the disk holds", BOOT_LIMIT, async || {
        fs::read_to_string(&file).is_ok_and(|said| said.contains(&found))
    })
    .await
}

/// It moves to a host that has never seen its image.
async fn moves_with_its_overlay_alone(lab: &Lab, name: &str, to: &str) -> anyhow::Result<()> {
    let vm = words::vm(lab, name).await?;
    let mut story = Story::default();
    story.more(lab, &vm, 25).await?;
    dalgu(lab, &["vm", "migrate", name, "--host", to]).await?;
    let vm = words::vm(lab, name).await?;
    ensure!(vm.host == to && pids_of(lab, &vm.uid)?.len() == 1, "{}", vm.all);
    story.more(lab, &vm, 25).await?;
    story.is_whole()?;
    let pool = lab
        .layout()
        .host(vm.host_number()?)
        .outside("/var/lib/dalgu/local");
    let bytes = fs::metadata(pool.join(&vm.uid).join("root.qcow2"))?.len();
    ensure!(bytes < 4 << 20, "the image was copied along: {bytes} bytes");
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn an_image_is_imported_once_and_vms_on_every_host_are_made_from_it_and_move() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(3), async |lab| {
        let file = image(lab, "tiny.raw")?;
        let file = file.to_string_lossy();
        dalgu(
            lab,
            &["image", "import", &file, "--version", "1.0", "--replicas", "1"],
        )
        .await?;
        let imported = shown(lab, "tiny:1.0").await?;
        ensure!(
            imported["status"]["state"] == "IMAGE_STATE_AVAILABLE",
            "{imported}"
        );
        let digest = imported["status"]["digest"]
            .as_str()
            .context("no digest")?
            .to_owned();
        let first = copies(&imported);
        ensure!(first.len() == 1, "{imported}");
        let home = first[0].clone();
        let other = if home == "h1" { "h2" } else { "h1" };

        // Beside the image, and where it must be fetched first.
        dalgu(lab, &create("near", "root,image=tiny", &["--host", &home])).await?;
        dalgu(
            lab,
            &create("far", "root=64MiB,image=tiny:1.0", &["--host", other]),
        )
        .await?;
        let fetched = || {
            let store = lab.layout().host(other[1..].parse()?).outside(STORE);
            // One that is fetched again is another file.
            anyhow::Ok(fs::metadata(store.join(format!("{digest}.qcow2")))?.ino())
        };
        let once = fetched()?;
        dalgu(
            lab,
            &create("whole", "root,image=tiny,clone=full", &["--host", other]),
        )
        .await?;
        ensure!(fetched()? == once, "{other} fetched the image twice");
        for name in ["near", "far", "whole"] {
            began_with_the_image(lab, &words::vm(lab, name).await?).await?;
        }
        let mut now = copies(&shown(lab, "tiny").await?);
        now.sort();
        let mut both = vec![home.clone(), other.to_owned()];
        both.sort();
        ensure!(now == both, "copies on {now:?}");
        for host in &both {
            let number = host[1..].parse()?;
            let path = lab
                .layout()
                .host(number)
                .outside(STORE)
                .join(format!("{digest}.qcow2"));
            let sum = run("sha256sum", [&path]).await?;
            ensure!(sum.starts_with(&digest), "{host} keeps something else: {sum}");
        }

        let third = ["h1", "h2", "h3"]
            .into_iter()
            .find(|host| !both.iter().any(|b| b == host));
        moves_with_its_overlay_alone(lab, "near", third.context("a third host")?).await?;

        // In use it stays; with its VMs gone it goes, everywhere.
        let refused = try_dalgu(lab, &["image", "delete", "tiny:1.0"]).await?;
        ensure!(
            refused.code == 5 && refused.stderr.contains("near"),
            "{refused:?}"
        );
        for name in ["near", "far", "whole"] {
            dalgu(lab, &["vm", "delete", name, "--force"]).await?;
        }
        dalgu(lab, &["image", "delete", "tiny:1.0"]).await?;
        wait_for("the image to be gone", REST_LIMIT, async || {
            try_dalgu(lab, &["image", "get", "tiny:1.0"])
                .await
                .is_ok_and(|ended| ended.code != 0)
        })
        .await?;
        for host in 1..=3 {
            ensure!(
                stored(lab, host)?.is_empty(),
                "h{host} still has {:?}",
                stored(lab, host)?
            );
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// The same image with other content: the copies of the last one would do else.
fn change(file: &Path, round: usize) -> anyhow::Result<()> {
    let offset = u64::try_from(round)? + (16 << 20);
    let open = fs::OpenOptions::new().write(true).open(file)?;
    Ok(open.write_all_at(b"another", offset)?)
}

/// Whether a command may have ended so because somebody was dead: then it is given again.
fn is_passing(ended: &Ended) -> bool {
    let reasons = ["HOSTS_INITIALIZING", "HOST_UNREACHABLE"];
    ended.code == UNREACHABLE || reasons.iter().any(|reason| ended.stderr.contains(reason))
}

/// Gives a command again until it is answered.
async fn answered(lab: &Lab, words: &[&str]) -> anyhow::Result<Ended> {
    let mut last = None;
    let found = wait_for("an answer that counts", BOOT_LIMIT, async || {
        last = try_dalgu(lab, words).await.ok();
        last.as_ref().is_some_and(|ended| !is_passing(ended))
    });
    found.await.with_context(|| format!("{last:?}"))?;
    last.context("no answer")
}

/// Somebody dies amid an import. The command goes through, or was not heard.
async fn dies_amid_import(
    lab: &Lab,
    import: &[&str],
    daemon: Daemon,
    moment: Duration,
) -> anyhow::Result<()> {
    let words = [import, &["--no-wait"]].concat();
    let (attempt, died) = tokio::join!(try_dalgu(lab, &words), death(lab, daemon, moment));
    died?;
    let attempt = attempt?;
    println!("the command ended with {}", attempt.code);
    ensure!(attempt.code == 0 || is_passing(&attempt), "{attempt:?}");
    Ok(())
}

/// Why a host's store is not as it should be: nothing lies there but copies that are what their names say and, of an import that
/// has ended, its record.
async fn fault(lab: &Lab, host: u8, records: bool) -> anyhow::Result<Option<String>> {
    for name in stored(lab, host)? {
        match name.split_once('.') {
            Some((_, "json")) if records => {}
            Some((digest, "qcow2")) => {
                let path = lab.layout().host(host).outside(STORE).join(&name);
                let sum = run("sha256sum", [&path]).await?;
                if !sum.starts_with(digest) {
                    return Ok(Some(format!("h{host} keeps {sum}")));
                }
            }
            _ => return Ok(Some(format!("h{host} has {name}"))),
        }
    }
    Ok(None)
}

/// Waits until both stores are as they should be.
async fn stores_are_tidy(lab: &Lab, records: bool) -> anyhow::Result<()> {
    let mut last = None;
    let tidy = wait_for("the stores to be tidy", REST_LIMIT, async || {
        let mut faults = Vec::new();
        for host in [1, 2] {
            // What goes meanwhile is looked for again.
            let found = fault(lab, host, records).await;
            faults.extend(found.unwrap_or_else(|error| Some(format!("{error:#}"))));
        }
        let tidy = faults.is_empty();
        last = Some(faults);
        tidy
    });
    tidy.await.with_context(|| format!("{last:?}"))
}

/// Both hosts have the image, whole, with the content of its file. Answers the name of their copies.
async fn is_whole(lab: &Lab, name: &str, file: &str) -> anyhow::Result<String> {
    let image = shown(lab, name).await?;
    ensure!(image["status"]["state"] == "IMAGE_STATE_AVAILABLE", "{image}");
    let digest = image["status"]["digest"].as_str().context("no digest")?;
    let copy = format!("{digest}.qcow2");
    wait_for("both hosts to have it", REST_LIMIT, async || {
        let image = shown(lab, name).await;
        image.is_ok_and(|image| copies(&image).len() == 2)
    })
    .await?;
    stores_are_tidy(lab, true).await?;
    for host in [1, 2] {
        let path = lab.layout().host(host).outside(STORE).join(&copy);
        let path = path.to_string_lossy();
        run("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", file, &*path]).await?;
    }
    Ok(copy)
}

/// The image is deleted, however far its import is, and nothing is left of it but, where the import ended in that moment, a copy that
/// is whole.
async fn is_given_up(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let ended = answered(lab, &["image", "delete", name]).await?;
    ensure!([0, NOT_FOUND].contains(&ended.code), "{ended:?}");
    wait_for("the image to be gone", REST_LIMIT, async || {
        let shown = try_dalgu(lab, &["image", "get", name]).await;
        shown.is_ok_and(|ended| ended.code == NOT_FOUND)
    })
    .await?;
    stores_are_tidy(lab, false).await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_amid_an_import_it_ends_whole_or_with_nothing_left() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let path = image(lab, "tiny.raw")?;
        let file = path.to_string_lossy();
        let mut moments = Moments::new()?;
        // One host takes the upload, the other fetches from it.
        let mortals = [
            Daemon::Agent(1),
            Daemon::Agent(2),
            Daemon::Libvirtd(1),
            Daemon::Controller,
        ];
        let rounds = mortals
            .iter()
            .flat_map(|daemon| [(*daemon, false), (*daemon, true)]);
        let last = mortals.len() * 2 - 1;
        for (round, (daemon, goes_on)) in rounds.enumerate() {
            change(&path, round)?;
            let version = format!("1.{round}");
            let name = format!("tiny:{version}");
            let import = [
                "image",
                "import",
                &file,
                "--version",
                &version,
                "--replicas",
                "all",
            ];
            let ended = async {
                dies_amid_import(lab, &import, daemon, moments.next(IMPORT)).await?;
                if !goes_on {
                    return is_given_up(lab, &name).await;
                }
                let again = answered(lab, &import).await?;
                ensure!(again.code == 0, "{again:?}");
                let copy = is_whole(lab, &name, &file).await?;
                if round < last {
                    is_given_up(lab, &name).await?;
                    let left = [stored(lab, 1)?, stored(lab, 2)?];
                    ensure!(!left.iter().flatten().any(|name| *name == copy), "{left:?}");
                }
                Ok(())
            };
            ended
                .await
                .with_context(|| format!("{daemon:?}, goes on: {goes_on}"))?;
        }
        dalgu(lab, &create("made", "root,image=tiny", &[])).await?;
        began_with_the_image(lab, &words::vm(lab, "made").await?).await?;
        dalgu(lab, &["vm", "delete", "made", "--force"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_vm_is_made_whose_host_fetches_its_image_while_somebody_dies() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let path = image(lab, "tiny.raw")?;
        let file = path.to_string_lossy();
        let mut moments = Moments::new()?;
        for round in 0..4 {
            change(&path, round)?;
            let version = format!("1.{round}");
            let import = ["image", "import", &file, "--version", &version, "--replicas", "1"];
            dalgu(lab, &import).await?;
            let name = format!("tiny:{version}");
            let home = copies(&shown(lab, &name).await?).pop().context("no copy")?;
            let (from, to) = if home == "h1" { (1, 2) } else { (2, 1) };
            let daemon = [
                Daemon::Agent(to),
                Daemon::Agent(from),
                Daemon::Libvirtd(to),
                Daemon::Controller,
            ][round];
            let (disk, host) = (format!("root,image={name}"), format!("h{to}"));
            let operation = words::begin(lab, &create("far", &disk, &["--host", &host])).await?;
            death(lab, daemon, moments.next(FETCH)).await?;
            let ended = words::end_of(lab, &operation, BOOT_LIMIT).await?;
            ensure!(words::state_of(&ended) == "SUCCEEDED", "{daemon:?} died: {ended}");
            began_with_the_image(lab, &words::vm(lab, "far").await?).await?;
            dalgu(lab, &["vm", "delete", "far", "--force"]).await?;
            dalgu(lab, &["image", "delete", &name]).await?;
        }
        wait_for("the stores to be empty", REST_LIMIT, async || {
            [1, 2]
                .iter()
                .all(|host| stored(lab, *host).is_ok_and(|left| left.is_empty()))
        })
        .await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
