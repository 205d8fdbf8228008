//! A plan on real hosts: guests move in its order and count on, and what is no longer as it was stops it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use anyhow::ensure;
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, create, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Lab, with_lab};
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
