//! A controller that was set back.

use std::path::Path;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{domains, pids_of};
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, LOCAL, SHARED, create, dalgu, json, number_at, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{self, Daemon, Lab, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::counting;

fn controller(lab: &Lab) -> String {
    text(&lab.layout().bin_dir().join("dalgu-controller"))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Names of the VMs that differ, with the kind of difference.
fn differences(site: &Value) -> Vec<(String, String)> {
    let all = site["differences"].as_array().cloned().unwrap_or_default();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let kind = |value: &Value| word(value).replace("SITE_DIFFERENCE_KIND_", "");
    let mut found: Vec<_> = all
        .iter()
        .map(|one| (word(&one["vm"]), kind(&one["kind"])))
        .collect();
    found.sort();
    found
}

/// All this the backup does not know.
async fn change_everything(lab: &Lab) -> anyhow::Result<()> {
    dalgu(lab, &create("unknown", LOCAL, &["--host", "h2"])).await?;
    dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
    dalgu(lab, &["vm", "stop", "stopped", "--force"]).await?;
    dalgu(lab, &["vm", "delete", "deleted", "--force"])
        .await
        .map(drop)
}

/// The hosts that are there have shown what they have; h3 will not come.
async fn until_it_observes(lab: &Lab) -> anyhow::Result<()> {
    let mut site = Value::Null;
    wait_for("the hosts that are there", REST_LIMIT, async || {
        site = json(lab, &["site", "show"]).await.unwrap_or_default();
        site["waitingHosts"] == serde_json::json!(["h3"])
    })
    .await
    .with_context(|| site.to_string())?;
    ensure!(
        site["observing"] == true && number_at(&site, "/incarnation") == 2,
        "{site}"
    );
    Ok(())
}

/// What the controller says is obeyed again.
async fn in_charge(lab: &Lab, story: &mut Story) -> anyhow::Result<()> {
    dalgu(lab, &["vm", "start", "stopped"]).await?;
    dalgu(lab, &["vm", "migrate", "moving", "--host", "h1"]).await?;
    let vm = words::vm(lab, "moving").await?;
    ensure!(vm.host == "h1" && pids_of(lab, &vm.uid)?.len() == 1, "{}", vm.all);
    story.more(lab, &vm, 3).await?;
    story.is_whole()
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_42_a_restored_backup_destroys_nothing_and_lists_what_it_does_not_know() -> anyhow::Result<()>
{
    with_lab(&e2e::hosts(3), async |lab| {
        let (moving, mut story) = counting(lab, SHARED).await?;
        for name in ["stopped", "deleted"] {
            dalgu(lab, &create(name, LOCAL, &["--host", "h1"])).await?;
        }
        let data = text(&lab.layout().controller_data());
        let backup = text(&lab.layout().dir().join("backup.db"));
        let program = controller(lab);
        lab::run(&program, ["backup", "--data-dir", &data, "--to", &backup]).await?;

        change_everything(lab).await?;
        let unknown = words::vm(lab, "unknown").await?;
        let before = (
            domains(lab).await?,
            pids_of(lab, &moving.uid)?,
            pids_of(lab, &unknown.uid)?,
        );
        ensure!(before.1.len() == 1 && before.2.len() == 1, "{before:?}");
        let as_before = async || {
            let now = (
                domains(lab).await?,
                pids_of(lab, &moving.uid)?,
                pids_of(lab, &unknown.uid)?,
            );
            ensure!(now == before, "{now:?}, before: {before:?}");
            anyhow::Ok(())
        };
        lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
        // A host that will not come.
        lab.signal(Daemon::Agent(3), Signal::SIGKILL).await?;
        lab::run(&program, ["restore", "--data-dir", &data, "--from", &backup]).await?;
        lab.start(Daemon::Controller).await?;

        until_it_observes(lab).await?;
        let refused = try_dalgu(lab, &["vm", "start", "stopped"]).await?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("SITE_OBSERVING"),
            "{refused:?}"
        );
        let resumed = try_dalgu(lab, &["site", "resume", "--accept-differences"]).await?;
        ensure!(
            resumed.code != 0,
            "h3 has neither spoken nor been waived: {resumed:?}"
        );
        dalgu(lab, &["site", "waive", "h3"]).await?;
        let site = json(lab, &["site", "show"]).await?;
        let found = differences(&site);
        let expected = [
            ("deleted", "MISSING_VM"),
            ("moving", "OTHER_OWNER"),
            ("stopped", "POWER_STATE"),
            ("unknown", "UNKNOWN_VM"),
        ];
        ensure!(
            found
                .iter()
                .map(|(vm, kind)| (vm.as_str(), kind.as_str()))
                .eq(expected),
            "{found:?}"
        );
        as_before().await.context("while it observes")?;
        let unseen = try_dalgu(lab, &["site", "resume"]).await?;
        ensure!(
            unseen.code != 0,
            "resumed without a look at the differences: {unseen:?}"
        );
        dalgu(lab, &["site", "resume", "--accept-differences"]).await?;

        wait_for("the owner to be taken over", REST_LIMIT, async || {
            let vm = words::vm(lab, "moving").await;
            vm.is_ok_and(|vm| vm.host == "h2" && vm.state == "RUNNING")
        })
        .await?;
        let epoch = number_at(&words::vm(lab, "moving").await?.all, "/status/epoch");
        ensure!(
            epoch > 1_000_000,
            "epoch {epoch} is not ahead of all that was told before"
        );
        as_before().await.context("after resuming")?;
        let site = json(lab, &["site", "show"]).await?;
        ensure!(
            differences(&site).contains(&("unknown".into(), "UNKNOWN_VM".into())),
            "what is not known is no longer listed: {site}"
        );
        story.more(lab, &words::vm(lab, "moving").await?, 3).await?;
        story.is_whole()?;
        in_charge(lab, &mut story).await?;
        ensure!(
            pids_of(lab, &unknown.uid)? == before.2,
            "the unknown VM was touched"
        );
        Ok(())
    })
    .await
}
