//! A plan on real hosts: guests move in its order and count on, and what is no longer as it was stops it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, create, create_with, dalgu, json, number_at, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Lab, guest, processor_to_fill, wait_for, with_lab};
use serde_json::Value;

fn text(plan: &Value, key: &str) -> String {
    plan[key].as_str().unwrap_or_default().to_owned()
}

async fn on(lab: &Lab, name: &str) -> anyhow::Result<String> {
    Ok(words::vm(lab, name).await?.host)
}

/// Approves a plan, which is then carried out to its end.
async fn carry_out(lab: &Lab, plan: &Value) -> anyhow::Result<()> {
    let (id, hash) = (text(plan, "id"), text(plan, "hash"));
    dalgu(
        lab,
        &["plan", "approve", &id, "--hash", &hash, "--deadline", "3m"],
    )
    .await?;
    let done = json(lab, &["plan", "show", &id]).await?;
    ensure!(text(&done, "state") == "PLAN_STATE_DONE", "{done}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_host_is_emptied_by_a_plan_and_a_plan_whose_vm_was_stopped_ends() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        for name in ["first", "second"] {
            dalgu(lab, &create(name, "root=8MiB", &["--host", "h1"])).await?;
        }
        let vm = words::vm(lab, "first").await?;
        let mut story = Story::default();
        story.more(lab, &vm, 3).await?;
        let plan = json(lab, &["plan", "evacuate", "h1"]).await?;
        ensure!(plan["steps"].as_array().map(Vec::len) == Some(2), "{plan}");
        ensure!(
            on(lab, "first").await? == "h1",
            "a plan that nobody approved moved a VM"
        );

        carry_out(lab, &plan).await?;
        ensure!(on(lab, "first").await? == "h2" && on(lab, "second").await? == "h2");
        let vm = words::vm(lab, "first").await?;
        story.more(lab, &vm, 3).await?;
        story.is_whole()?;

        let plan = json(lab, &["plan", "evacuate", "h2"]).await?;
        dalgu(lab, &["vm", "stop", "first", "--force"]).await?;
        dalgu(lab, &["vm", "stop", "second", "--force"]).await?;
        let (id, hash) = (text(&plan, "id"), text(&plan, "hash"));
        let ended = try_dalgu(lab, &["plan", "approve", &id, "--hash", &hash]).await?;
        ensure!(ended.code == 8, "{ended:?}");
        let stopped = json(lab, &["plan", "show", &id]).await?;
        ensure!(text(&stopped, "state") == "PLAN_STATE_STOPPED", "{stopped}");
        ensure!(
            stopped["steps"][0]["error"]["reason"] == "VM_CHANGED",
            "{stopped}"
        );
        ensure!(on(lab, "first").await? == "h2");
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Holds a guest of h1 on one processor.
async fn hold(lab: &Lab, name: &str, cpu: usize) -> anyhow::Result<()> {
    let file = lab
        .layout()
        .host(1)
        .outside(&format!("/run/libvirt/qemu/{name}.pid"));
    let pid = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let words = [
        "taskset",
        "--all-tasks",
        "--cpu-list",
        "--pid",
        &cpu.to_string(),
        pid.trim(),
    ];
    lab.exec(1, &words).await.map(drop)
}

/// Asks for a host until it is as it should be.
async fn wait_for_host(
    lab: &Lab,
    name: &str,
    limit: Duration,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> anyhow::Result<()> {
    let mut last = Ok(Value::Null);
    let waited = wait_for(&format!("{name} {what}"), limit, async || {
        last = json(lab, &["host", "show", name]).await;
        // A word that is wrong is not waited for.
        last.as_ref().map_or(true, &wanted)
    })
    .await;
    let last = last?;
    waited.with_context(|| format!("it was last {last}"))
}

/// What share of the last ten seconds some guest of a host has waited for a processor, in percent.
fn stall(host: &Value) -> f64 {
    host.pointer("/usage/pressure/cpuSome/avg10Percent")
        .and_then(Value::as_f64)
        .unwrap_or_default()
}

fn closed(host: &Value) -> bool {
    host["pressedTime"].is_string()
}

/// A plan that moves something. A calm host has just had a guest boot, and may not be seen to be calm at once.
async fn relief(lab: &Lab) -> anyhow::Result<Value> {
    let mut last = Ok(Value::Null);
    let waited = wait_for("a plan with a move", Duration::from_mins(1), async || {
        last = json(lab, &["plan", "rebalance"]).await;
        let moves = |plan: &Value| plan["steps"].as_array().is_some_and(|steps| !steps.is_empty());
        last.as_ref().map_or(true, moves)
    })
    .await;
    let last = last?;
    waited.with_context(|| format!("the last one was {last}"))?;
    Ok(last)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_host_under_real_pressure_takes_no_new_vm_and_is_relieved_by_a_plan() -> anyhow::Result<()> {
    // `make test` asks the same, and leaves this test out.
    let cpu = processor_to_fill().context("IGNORED: nothing was tested")?;
    with_lab(&e2e::hosts(2), async |lab| {
        let pressed = ("close_pressed_hosts = false", "close_pressed_hosts = true");
        e2e::set_as_at_a_site(lab, &[pressed]).await?;
        // Each would keep a processor busy, and they have one between them.
        let busy = format!("{} dalgu.dirty=1", guest::CMDLINE);
        let names = ["busy1", "busy2"];
        for name in names {
            dalgu(lab, &create_with(name, "root=8MiB", &busy, &["--host", "h1"])).await?;
            hold(lab, name, cpu).await?;
        }
        let mut stories = [Story::default(), Story::default()];
        for (story, name) in stories.iter_mut().zip(names) {
            story.more(lab, &words::vm(lab, name).await?, 3).await?;
        }
        wait_for_host(lab, "h1", Duration::from_mins(2), "to close", closed).await?;
        let calm = json(lab, &["host", "show", "h2"]).await?;
        ensure!(!closed(&calm), "h2 closed too: {calm}");

        let refused = try_dalgu(lab, &create("next", "root=8MiB", &["--host", "h1"])).await?;
        ensure!(
            refused.code == 5 && refused.stderr.contains("closed by its load"),
            "{refused:?}"
        );
        let why = dalgu(lab, &["explain", "--disk", "root=8MiB", "-o", "json"]).await?;
        ensure!(why.contains("\"PRESSURE\""), "{why}");
        dalgu(lab, &create("next", "root=8MiB", &[])).await?;
        ensure!(on(lab, "next").await? == "h2");
        // A guest that has only begun counts as busy, which h2 could not take beside another.
        dalgu(lab, &["vm", "delete", "next", "--force"]).await?;

        let crowded = json(lab, &["host", "show", "h1"]).await?;
        let plan = relief(lab).await?;
        let step = &plan["steps"][0];
        ensure!(
            number_at(&plan, "/before/hostsContended") == 1
                && number_at(&plan, "/predicted/hostsContended") == 0,
            "{plan}"
        );
        ensure!(
            plan["steps"].as_array().map(Vec::len) == Some(1) && text(step, "source") == "h1",
            "{plan}"
        );
        let moved = text(step, "vm");
        carry_out(lab, &plan).await?;
        for (story, name) in stories.iter_mut().zip(names) {
            let vm = words::vm(lab, name).await?;
            ensure!(
                vm.host == if name == moved { "h2" } else { "h1" },
                "{name} is on {}",
                vm.host
            );
            story.more(lab, &vm, 3).await?;
            story.is_whole()?;
        }
        let before = stall(&crowded);
        wait_for_host(lab, "h1", Duration::from_mins(1), "to wait less", |host| {
            stall(host) < before * 0.75
        })
        .await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

/// Takes processors of a host without running anything.
async fn fill(lab: &Lab, host: &str, mut vcpus: u64, most: u64) -> anyhow::Result<()> {
    while vcpus > 0 {
        let part = vcpus.min(most);
        let (name, count) = (format!("off-{host}-{vcpus}"), part.to_string());
        dalgu(
            lab,
            &create(
                &name,
                "root=8MiB",
                &["--host", host, "--vcpus", &count, "--stopped"],
            ),
        )
        .await?;
        vcpus -= part;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_guest_moves_out_of_the_way_of_a_vm_that_finds_no_room() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let host = json(lab, &["host", "show", "h1"]).await?;
        let cpus = host["inventory"]["cpus"].as_u64().context("no cpus")?;
        let vcpus = host["allocation"]["vcpusCapacity"]
            .as_u64()
            .context("no capacity")?;
        ensure!(cpus >= 2, "a VM of two processors does not fit on {host}");
        dalgu(
            lab,
            &create("mover", "root=8MiB", &["--host", "h1", "--vcpus", "1"]),
        )
        .await?;
        fill(lab, "h1", vcpus - 2, cpus).await?;
        fill(lab, "h2", vcpus - 1, cpus).await?;
        let mut story = Story::default();
        story.more(lab, &words::vm(lab, "mover").await?, 3).await?;

        let large = ["--vcpus", "2"];
        let refused = try_dalgu(lab, &create("large", "root=8MiB", &large)).await?;
        ensure!(
            refused.code == 5 && refused.stderr.contains("plan make-room"),
            "{refused:?}"
        );
        let plan = json(
            lab,
            &[
                "plan",
                "make-room",
                "--vcpus",
                "2",
                "--memory",
                "96MiB",
                "--disk",
                "root=8MiB",
                "--nic",
                "eth0=br0",
            ],
        )
        .await?;
        ensure!(plan["message"] == "1 VM moves; then h1 has the room", "{plan}");
        ensure!(on(lab, "mover").await? == "h1", "it moved before it was approved");
        carry_out(lab, &plan).await?;
        ensure!(on(lab, "mover").await? == "h2");
        dalgu(lab, &create("large", "root=8MiB", &large)).await?;
        ensure!(on(lab, "large").await? == "h1");
        story.more(lab, &words::vm(lab, "mover").await?, 3).await?;
        story.is_whole()?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
