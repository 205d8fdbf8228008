//! Placement groups, taints and capacity on real hosts: what is apart stays apart, and what is together moves together and counts on.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use anyhow::ensure;
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, create, dalgu, json, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Lab, with_lab};

/// Makes a running VM in a group and tells its host.
async fn member(lab: &Lab, name: &str, group: &str) -> anyhow::Result<String> {
    let words = create(name, "root=8MiB", &["--placement-group", group]);
    dalgu(lab, &words).await?;
    Ok(words::vm(lab, name).await?.host)
}

async fn refused(lab: &Lab, words: &[&str], said: &str) -> anyhow::Result<()> {
    let ended = try_dalgu(lab, words).await?;
    ensure!(ended.code == 5 && ended.stderr.contains(said), "{ended:?}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn members_are_kept_apart_and_together_and_a_drain_takes_those_along() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        for (host, rack) in [("h1", "rack=a"), ("h2", "rack=b")] {
            dalgu(lab, &["host", "label", host, rack]).await?;
        }
        let apart = [
            "placement-group",
            "create",
            "apart",
            "--rule",
            "anti-affinity",
            "--by",
            "rack",
        ];
        dalgu(lab, &apart).await?;
        let first = member(lab, "web1", "apart").await?;
        let second = member(lab, "web2", "apart").await?;
        ensure!(first != second, "both on {first}");
        let third = create("web3", "root=8MiB", &["--placement-group", "apart"]);
        refused(lab, &third, "more members than there are domains").await?;
        refused(lab, &["vm", "migrate", "web1"], "group apart").await?;
        refused(lab, &["placement-group", "delete", "apart"], "web1 among them").await?;

        // From here on web1 is with web3, and both leave their host together.
        dalgu(lab, &["placement-group", "create", "near", "--rule", "affinity"]).await?;
        let change = [
            "vm",
            "update",
            "web1",
            "--leave-group",
            "apart",
            "--join-group",
            "near",
        ];
        dalgu(lab, &change).await?;
        ensure!(member(lab, "web3", "near").await? == first);
        refused(lab, &["vm", "migrate", "web3"], "keeps it together with VM web1").await?;
        let mut story = Story::default();
        story.more(lab, &words::vm(lab, "web1").await?, 3).await?;
        dalgu(lab, &["host", "drain", &first, "--deadline", "3m"]).await?;
        for name in ["web1", "web3"] {
            let vm = words::vm(lab, name).await?;
            ensure!(
                vm.host == second && vm.state == "RUNNING",
                "{name} is on {}",
                vm.host
            );
        }
        story.more(lab, &words::vm(lab, "web1").await?, 3).await?;
        dalgu(lab, &["host", "restore", &first, "--deadline", "3m"]).await?;
        for name in ["web1", "web3"] {
            ensure!(
                words::vm(lab, name).await?.host == first,
                "{name} did not come back"
            );
        }
        story.more(lab, &words::vm(lab, "web1").await?, 3).await?;
        story.is_whole()?;

        let ask = ["capacity", "--vcpus", "1", "--memory", "64MiB"];
        let both = json(lab, &ask).await?;
        dalgu(lab, &["host", "taint", &first, "use=db"]).await?;
        let one = json(lab, &ask).await?;
        let fit = |value| words::number_at(value, "/vms");
        ensure!(fit(&one) > 0 && fit(&one) < fit(&both), "{one} {both}");
        let vm = create("web4", "root=8MiB", &[]);
        dalgu(lab, &vm).await?;
        ensure!(
            words::vm(lab, "web4").await?.host == second,
            "it came to a tainted host"
        );
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
