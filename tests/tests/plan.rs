//! A plan on real hosts: guests move in its order and count on, and what is no longer as it was stops it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::time::Duration;

use anyhow::ensure;
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, create, create_with, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, guest, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;

fn text(plan: &Value, key: &str) -> String {
    plan[key].as_str().unwrap_or_default().to_owned()
}

async fn on(lab: &Lab, name: &str) -> anyhow::Result<String> {
    Ok(words::vm(lab, name).await?.host)
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

        let (id, hash) = (text(&plan, "id"), text(&plan, "hash"));
        dalgu(
            lab,
            &["plan", "approve", &id, "--hash", &hash, "--deadline", "3m"],
        )
        .await?;
        let done = json(lab, &["plan", "show", &id]).await?;
        ensure!(text(&done, "state") == "PLAN_STATE_DONE", "{done}");
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

/// A host that is said to be idle: all hosts of a lab share one kernel, which has one account of the load on all of them.
async fn idle(lab: &Lab, host: u8) -> anyhow::Result<()> {
    let place = lab.layout().host(host);
    for (file, text) in [
        ("stat", fs::read_to_string("/proc/stat")?),
        ("loadavg", "0.00 0.00 0.00 1/100 1\n".to_owned()),
        (
            "pressure/cpu",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n".to_owned(),
        ),
        (
            "pressure/io",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n".to_owned(),
        ),
    ] {
        let path = format!("/var/lib/dalgu/{}", file.replace('/', "-"));
        fs::write(place.outside(&path), text)?;
        lab.exec(host, &["mount", "--bind", &path, &format!("/proc/{file}")])
            .await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_host_under_real_pressure_takes_no_new_vm_and_is_relieved_by_a_plan() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let config = lab.layout().dir().join("controller.toml");
        let settings = fs::read_to_string(&config)?;
        fs::write(
            &config,
            settings.replace("close_pressed_hosts = false", "close_pressed_hosts = true"),
        )?;
        lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
        lab.start(Daemon::Controller).await?;
        idle(lab, 2).await?;
        // Each keeps a processor busy; the machine has fewer.
        let busy = format!("{} dalgu.dirty=1", guest::CMDLINE);
        let names: Vec<_> = (0..2 + std::thread::available_parallelism()?.get())
            .map(|number| format!("busy{number}"))
            .collect();
        for name in &names {
            dalgu(lab, &create_with(name, "root=8MiB", &busy, &["--host", "h1"])).await?;
        }
        let vm = words::vm(lab, &names[0]).await?;
        let mut story = Story::default();
        story.more(lab, &vm, 3).await?;
        wait_for("h1 to close", Duration::from_secs(240), async || {
            let host = json(lab, &["host", "get", "h1"]).await;
            host.is_ok_and(|host| host["pressedTime"].is_string())
        })
        .await?;
        let refused = try_dalgu(lab, &create("next", "root=8MiB", &["--host", "h1"])).await?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("closed by its load"),
            "{refused:?}"
        );
        dalgu(lab, &create("next", "root=8MiB", &[])).await?;
        ensure!(on(lab, "next").await? == "h2");

        let plan = json(lab, &["plan", "rebalance"]).await?;
        let (id, hash) = (text(&plan, "id"), text(&plan, "hash"));
        dalgu(
            lab,
            &["plan", "approve", &id, "--hash", &hash, "--deadline", "4m"],
        )
        .await?;
        let mut moved = 0;
        for name in &names {
            moved += usize::from(on(lab, name).await? == "h2");
        }
        ensure!(moved > 0, "nothing was moved: {plan}");
        story.more(lab, &words::vm(lab, &names[0]).await?, 3).await?;
        story.is_whole()?;
        for name in &names {
            dalgu(lab, &["vm", "stop", name, "--force"]).await?;
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
