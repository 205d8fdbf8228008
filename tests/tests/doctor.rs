//! `dalgu doctor` on real libvirt hosts: content after work, and not when somebody was at work with `virsh`. Run by
//! `make test`; needs root and the set-up step.

use std::fs;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::words::{self, LOCAL, create, dalgu, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::layout::SHARED_DIR;
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Exit code of `dalgu doctor` that has found something.
const FOUND: i32 = 9;

/// What the doctor finds, kind and subject; its exit code says whether that is anything.
async fn findings(lab: &Lab) -> anyhow::Result<Vec<String>> {
    let ended = try_dalgu(lab, &["doctor", "--deep", "-o", "json"]).await?;
    let diagnosis: Value = serde_json::from_str(&ended.stdout)
        .with_context(|| format!("the doctor printed no JSON: {} {}", ended.stdout, ended.stderr))?;
    let found = diagnosis["findings"].as_array().into_iter().flatten();
    let word = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let found: Vec<_> = found
        .map(|finding| format!("{} {}", word(finding, "kind"), word(finding, "subject")))
        .collect();
    let well = found.is_empty() && diagnosis["gaps"].as_array().is_none_or(Vec::is_empty);
    let expected = if well { 0 } else { FOUND };
    ensure!(
        ended.code == expected,
        "exit code {} with {diagnosis}",
        ended.code
    );
    Ok(found)
}

async fn until_found(lab: &Lab, wanted: &[String]) -> anyhow::Result<()> {
    let mut last = None;
    wait_for("what the doctor should find", REST_LIMIT, async || {
        last = Some(findings(lab).await);
        matches!(&last, Some(Ok(found)) if found == wanted)
    })
    .await
    .with_context(|| format!("it found {last:?}, not {wanted:?}"))
}

/// The definition of a VM's domain under another name and id.
async fn copy(lab: &Lab, of: &words::Vm, name: &str, uid: &str) -> anyhow::Result<String> {
    let xml = lab
        .virsh(of.host_number()?, &["dumpxml", "--inactive", &of.name])
        .await?;
    let xml = xml.replace(
        &format!("<name>{}</name>", of.name),
        &format!("<name>{name}</name>"),
    );
    // Neither the other's disk nor its address.
    let without = |xml: String, from: &str, to: &str| match (xml.find(from), xml.find(to)) {
        (Some(begin), Some(end)) => format!("{}{}", &xml[..begin], &xml[end + to.len()..]),
        _ => xml,
    };
    let xml = without(xml, "<disk ", "</disk>");
    let xml = without(xml, "<interface ", "</interface>");
    let xml = without(xml, "<serial ", "</serial>");
    let xml = without(xml, "<console ", "</console>");
    Ok(xml.replace(&of.uid, uid))
}

/// Defines a domain on host 2 and starts it.
async fn run_by_hand(lab: &Lab, xml: &str, name: &str) -> anyhow::Result<()> {
    fs::write(lab.layout().host(2).outside("/etc/dalgu/by-hand.xml"), xml)?;
    lab.virsh(2, &["define", "/etc/dalgu/by-hand.xml"]).await?;
    lab.virsh(2, &["start", name]).await?;
    Ok(())
}

async fn remove_by_hand(lab: &Lab, name: &str) -> anyhow::Result<()> {
    lab.virsh(2, &["destroy", name]).await?;
    lab.virsh(2, &["undefine", name]).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn the_doctor_is_content_after_work_and_finds_what_was_done_behind_dalgus_back() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        for name in ["web", "db"] {
            dalgu(lab, &create(name, LOCAL, &["--host", "h2"])).await?;
        }
        dalgu(lab, &["vm", "migrate", "web", "--to", "h1"]).await?;
        dalgu(lab, &["vm", "stop", "db", "--force"]).await?;
        dalgu(lab, &["vm", "restart", "web", "--reset"]).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        until_found(lab, &[]).await?;

        // Stopped and forgotten by somebody: its agent defines it again, and does not overrule who stopped it.
        lab.virsh(1, &["destroy", "web"]).await?;
        // One that is forgotten before anybody has seen it off has crashed for all that its agent can know.
        wait_for("the VM to be seen off", REST_LIMIT, async || {
            words::vm(lab, "web").await.is_ok_and(|vm| vm.state == "STOPPED")
        })
        .await?;
        lab.virsh(1, &["undefine", "web"]).await?;
        lab.virsh(2, &["start", "db"]).await?;
        let (web, db) = (
            "CHANGED_OUTSIDE vm web".to_owned(),
            "CHANGED_OUTSIDE vm db".to_owned(),
        );
        let mut both = vec![
            (words::vm(lab, "web").await?.uid, web),
            (words::vm(lab, "db").await?.uid, db),
        ];
        both.sort();
        let both: Vec<_> = both.into_iter().map(|(_, found)| found).collect();
        until_found(lab, &both).await?;
        dalgu(lab, &["vm", "start", "web"]).await?;
        dalgu(lab, &["vm", "stop", "db", "--force"]).await?;
        until_found(lab, &[]).await?;

        // A copy with Dalgu's mark and the VM's own id runs on the other host.
        let vm = words::vm(lab, "web").await?;
        let twin = copy(lab, &vm, "web", &vm.uid).await?;
        run_by_hand(lab, &twin, "web").await?;
        let left = format!("LEFTOVER_DOMAIN domain {}", vm.uid);
        until_found(lab, &["TWO_COPIES vm web".to_owned(), left]).await?;
        let refused = try_dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        ensure!(refused.code == 5 && refused.stderr.contains("h2"), "{refused:?}");
        ensure!(
            lab.virsh(2, &["domstate", "web"]).await?.contains("running"),
            "it was touched"
        );
        remove_by_hand(lab, "web").await?;
        until_found(lab, &[]).await?;

        // One that nobody knows.
        let uid = "f0e1f0e1-0000-4000-8000-000000000002";
        run_by_hand(lab, &copy(lab, &vm, "theirs", uid).await?, "theirs").await?;
        until_found(lab, &[format!("LEFTOVER_DOMAIN domain {uid}")]).await?;
        remove_by_hand(lab, "theirs").await?;
        until_found(lab, &[]).await?;

        lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
        until_found(lab, &["HOST_SILENT host h2".to_owned()]).await?;
        lab.start(Daemon::Agent(2)).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        until_found(lab, &[]).await
    })
    .await
}

async fn until_files_found(lab: &Lab, mut wanted: Vec<String>) -> anyhow::Result<()> {
    wanted.sort();
    let mut last = None;
    wait_for("what the doctor should find of files", REST_LIMIT, async || {
        let found = findings(lab).await.map(|mut found| {
            found.sort();
            found
        });
        last = Some(found);
        matches!(&last, Some(Ok(found)) if *found == wanted)
    })
    .await
    .with_context(|| format!("it found {last:?}, not {wanted:?}"))
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn the_doctor_finds_files_that_nobody_knows_and_what_is_gone() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        dalgu(lab, &["volume", "create", "ledger", "--size", "16MiB"]).await?;
        dalgu(lab, &create("web", LOCAL, &["--disk", "data,volume=ledger"])).await?;
        dalgu(lab, &["vm", "update", "web", "--remove-disk", "data", "--wait"]).await?;
        dalgu(lab, &["vm", "stop", "web", "--force"]).await?;
        dalgu(lab, &["snapshot", "create", "web", "one"]).await?;
        let backup = ["backup", "create", "web", "--pool", "shared", "--wait"];
        let backup = words::json(lab, &backup).await?["uid"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        at_rest(lab, &[], REST_LIMIT).await?;
        until_found(lab, &[]).await?;

        let (local, shared) = (
            lab.layout().host(1).outside("/var/lib/dalgu/local"),
            lab.layout().shared(),
        );
        let web = words::vm(lab, "web").await?.uid;
        let ledger = words::json(lab, &["volume", "show", "ledger"]).await?;
        let ledger = local.join(format!(
            "volumes/{}.qcow2",
            ledger["uid"].as_str().unwrap_or_default()
        ));
        let stranger = "f0e1f0e1-0000-7000-8000-000000000003";
        let left = [
            (&local, format!("volumes/{stranger}.qcow2")),
            (&local, format!("{web}/root.9.qcow2")),
            (&local, format!("{stranger}/root.raw.partial")),
            (&shared, format!("backups/{stranger}/manifest.json")),
        ];
        for (pool, path) in &left {
            let file = pool.join(path);
            fs::create_dir_all(file.parent().context("no folder")?)?;
            fs::write(file, "left")?;
        }
        let told = left.iter().map(|(pool, path)| {
            let pool = if *pool == &local {
                "/var/lib/dalgu/local"
            } else {
                SHARED_DIR
            };
            format!(
                "LEFTOVER_FILE file {pool}/{} on host h1",
                path.trim_end_matches("/manifest.json")
            )
        });
        until_files_found(lab, told.collect()).await?;
        for (pool, path) in &left {
            fs::remove_file(pool.join(path))?;
        }
        fs::remove_dir(local.join(stranger))?;
        fs::remove_dir(shared.join("backups").join(stranger))?;

        let away = ledger.with_extension("away");
        fs::rename(&ledger, &away)?;
        let kept = shared.join("backups").join(&backup).join("root.raw");
        let size = fs::metadata(&kept)?.len();
        fs::OpenOptions::new()
            .write(true)
            .open(&kept)?
            .set_len(size - 512)?;
        let told = [
            "VOLUME_FILE_MISSING volume ledger".to_owned(),
            format!("BACKUP_FILE_MISSING backup {backup}"),
            format!(
                "LEFTOVER_FILE file /var/lib/dalgu/local/volumes/{} on host h1",
                away.file_name().unwrap_or_default().to_string_lossy()
            ),
        ];
        until_files_found(lab, told.into()).await?;
        fs::rename(&away, &ledger)?;
        fs::OpenOptions::new().write(true).open(&kept)?.set_len(size)?;
        until_found(lab, &[]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
