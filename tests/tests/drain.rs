//! Drains on real hosts: guests move and count on, others stop or stay as they say, what cannot be done is told with its reason
//! at the deadline, and all come back.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::time::Duration;

use anyhow::ensure;
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, create, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Lab, with_lab};
use serde_json::Value;
use tokio::time::Instant;

async fn make(lab: &Lab, name: &str, mode: &str) -> anyhow::Result<()> {
    let words = create(name, "root=8MiB", &["--host", "h1", "--drain-mode", mode]);
    dalgu(lab, &words).await.map(drop)
}

/// Each VM of the drain of h1, with its state.
async fn drained(lab: &Lab) -> anyhow::Result<Vec<(String, String)>> {
    let host = json(lab, &["host", "show", "h1"]).await?;
    let text = |vm: &Value, key: &str| vm[key].as_str().unwrap_or_default().to_owned();
    let vms = host["drain"]["vms"].as_array().cloned().unwrap_or_default();
    let state = |vm: &Value| text(vm, "state").replace("DRAINED_VM_STATE_", "");
    Ok(vms.iter().map(|vm| (text(vm, "vm"), state(vm))).collect())
}

fn are(seen: &[(String, String)], wanted: &[(&str, &str)]) -> anyhow::Result<()> {
    let seen: Vec<_> = seen
        .iter()
        .map(|(vm, state)| (vm.as_str(), state.as_str()))
        .collect();
    ensure!(seen == wanted, "{seen:?} instead of {wanted:?}");
    Ok(())
}

async fn state(lab: &Lab, name: &str) -> anyhow::Result<(String, String)> {
    let vm = words::vm(lab, name).await?;
    Ok((vm.host, vm.state))
}

/// Both hosts, one after the other, as nothing stands in for one of two. The command sees where the VM is that moves.
async fn every_host_is_maintained(lab: &Lab) -> anyhow::Result<()> {
    let held = json(lab, &["host", "roll", "h1", "h2", "--dry-run"]).await?;
    ensure!(held["held"][0]["error"]["reason"] == "NO_SPARE_HOST", "{held}");
    let unknown = try_dalgu(lab, &["host", "roll", "h1", "h9", "--exec", "true"]).await?;
    ensure!(unknown.code == 3, "{unknown:?}");
    let log = lab.layout().dir().join("maintained");
    let dalgu_itself = lab.layout().bin_dir().join("dalgu");
    let place = r#"grep -m1 -o '"host": *"h[0-9]' | grep -o 'h[0-9]$'"#;
    let exec = format!(
        "echo $DALGU_HOST $({} vm show moves -o json | {place}) >> {}",
        dalgu_itself.display(),
        log.display()
    );
    let words = [
        "host",
        "roll",
        "h1",
        "h2",
        "--without-spare-host",
        "--max-hosts",
        "1",
        "--exec",
    ];
    dalgu(lab, &[words.as_slice(), &[&exec]].concat()).await?;
    let told = std::fs::read_to_string(&log)?;
    let lines: Vec<_> = told.lines().collect();
    ensure!(lines == ["h1 h2", "h2 h1"], "{told}");
    ensure!(state(lab, "moves").await? == ("h1".into(), "RUNNING".into()));
    ensure!(state(lab, "stops").await? == ("h1".into(), "RUNNING".into()));
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_host_is_drained_for_maintenance_and_gets_its_vms_back() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        for (name, mode) in [("moves", "live-migrate"), ("stays", "leave"), ("stops", "stop")] {
            make(lab, name, mode).await?;
        }
        let vm = words::vm(lab, "moves").await?;
        let mut story = Story::default();
        story.more(lab, &vm, 3).await?;
        let seen = json(lab, &["host", "drain", "h1", "--dry-run"]).await?;
        ensure!(seen["drain"]["vms"][0]["host"] == "h2", "{seen}");
        ensure!(
            state(lab, "moves").await?.0 == "h1",
            "a preview changed something"
        );

        dalgu(lab, &["host", "drain", "h1", "--deadline", "3m"]).await?;
        let wanted = [("moves", "MOVED"), ("stays", "LEFT"), ("stops", "STOPPED")];
        are(&drained(lab).await?, &wanted)?;
        ensure!(state(lab, "stays").await? == ("h1".into(), "RUNNING".into()));
        ensure!(state(lab, "stops").await? == ("h1".into(), "STOPPED".into()));
        let vm = words::vm(lab, "moves").await?;
        ensure!((vm.host.as_str(), vm.state.as_str()) == ("h2", "RUNNING"));
        story.more(lab, &vm, 3).await?;
        at_rest(lab, &[], REST_LIMIT).await?;

        dalgu(lab, &["host", "restore", "h1", "--deadline", "3m"]).await?;
        are(&drained(lab).await?, &[("moves", "MOVED"), ("stops", "STARTED")])?;
        let vm = words::vm(lab, "moves").await?;
        ensure!((vm.host.as_str(), vm.state.as_str()) == ("h1", "RUNNING"));
        story.more(lab, &vm, 3).await?;
        ensure!(state(lab, "stops").await? == ("h1".into(), "RUNNING".into()));
        story.is_whole()?;
        at_rest(lab, &[], REST_LIMIT).await?;
        every_host_is_maintained(lab).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_drain_with_a_blocked_vm_says_why_and_ends_at_its_deadline() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        make(lab, "moves", "live-migrate").await?;
        make(lab, "asks", "ask").await?;
        dalgu(lab, &["host", "cordon", "h2"]).await?;
        let begun = Instant::now();
        let ended = try_dalgu(lab, &["host", "drain", "h1", "--deadline", "8s"]).await?;
        ensure!(ended.code == 8, "{ended:?}");
        ensure!(
            begun.elapsed() >= Duration::from_secs(8),
            "not before: room may have come"
        );
        for said in ["(NO_CAPACITY)", "uncordon h2", "(ASKS)", "dalgu vm stop asks"] {
            ensure!(ended.stderr.contains(said), "no {said:?} in {}", ended.stderr);
        }
        are(&drained(lab).await?, &[("asks", "BLOCKED"), ("moves", "BLOCKED")])?;

        // What it said is done, and a new drain comes to its end.
        dalgu(lab, &["host", "uncordon", "h2"]).await?;
        dalgu(lab, &["vm", "migrate", "asks"]).await?;
        dalgu(lab, &["host", "drain", "h1"]).await?;
        ensure!(state(lab, "moves").await? == ("h2".into(), "RUNNING".into()));
        let host = json(lab, &["host", "show", "h1"]).await?;
        ensure!(words::number_at(&host, "/allocation/vms") == 0, "{host}");
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
