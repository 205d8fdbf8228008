//! A controller that was set back, and two at once.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{at_rest, domains, pids_of};
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{
    self, Ended, LOCAL, SHARED, attempt, create, dalgu, json, number_at, try_dalgu,
};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{self, Daemon, Lab, MARK, wait_for, with_lab};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::process::{Child, Command};

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

/// A controller on a copy of the data directory, at a port of its own.
struct Second<'a> {
    lab: &'a Lab,
    dir: PathBuf,
    running: Option<Child>,
}

impl<'a> Second<'a> {
    /// Copies what the first has; it must not run meanwhile.
    fn copy(lab: &'a Lab) -> anyhow::Result<Self> {
        let dir = lab.layout().dir().join("second");
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(lab.layout().controller_data())?.flatten() {
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), dir.join(entry.file_name()))?;
            }
        }
        let address = Self::address(lab);
        let config = format!(
            "data_dir = {:?}\nlisten = {address:?}\nreport_interval_ms = 1000\n",
            text(&dir)
        );
        fs::write(dir.join("controller.toml"), config)?;
        let cli = fs::read_to_string(lab.layout().cli_config())?;
        let cli = cli.replace(&lab.layout().controller_address(), &address);
        fs::write(dir.join("cli.toml"), cli)?;
        Ok(Self {
            lab,
            dir,
            running: None,
        })
    }

    fn address(lab: &Lab) -> String {
        lab.layout().controller_address().replace(":7443", ":7543")
    }

    /// Starts it, the old run killed first; each start is a higher term.
    async fn start(&mut self) -> anyhow::Result<()> {
        self.end().await?;
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.lab.layout().log("second-controller"))?;
        let mut command = Command::new(controller(self.lab));
        command
            .arg("run")
            .arg("--config")
            .arg(self.dir.join("controller.toml"))
            .env(MARK, self.lab.layout().dir())
            .stderr(log.try_clone()?)
            .stdout(log)
            .kill_on_drop(true);
        self.running = Some(command.spawn().context("start the second controller")?);
        wait_for("the second controller", REST_LIMIT, async || {
            self.site().await.is_ok()
        })
        .await
    }

    async fn end(&mut self) -> anyhow::Result<()> {
        match self.running.take() {
            Some(mut child) => Ok(child.kill().await?),
            None => Ok(()),
        }
    }

    /// Asks this one.
    async fn ask(&self, words: &[&str]) -> anyhow::Result<Ended> {
        let mut command = Command::new(self.lab.layout().bin_dir().join("dalgu"));
        command.env("DALGU_CONFIG", self.dir.join("cli.toml")).args(words);
        attempt(&mut command).await
    }

    async fn site(&self) -> anyhow::Result<Value> {
        let ended = self.ask(&["site", "show", "-o", "json"]).await?;
        ensure!(ended.code == 0, "{ended:?}");
        Ok(serde_json::from_str(&ended.stdout)?)
    }

    /// The agent of h2 reports to this one from now on, or to the first again.
    async fn lure(&self, away: bool) -> anyhow::Result<()> {
        let config = self.lab.layout().host(2).outside("/etc/dalgu/agent.toml");
        let (first, second) = (self.lab.layout().controller_address(), Self::address(self.lab));
        let (from, to) = if away { (first, second) } else { (second, first) };
        fs::write(&config, fs::read_to_string(&config)?.replace(&from, &to))?;
        self.lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
        self.lab.start(Daemon::Agent(2)).await
    }

    /// Waits until it knows that the hosts obey another, and says so.
    async fn until_replaced(&self, why: &str) -> anyhow::Result<()> {
        let mut site = Value::Null;
        wait_for("the second to notice", REST_LIMIT, async || {
            // What it is asked meanwhile is how it comes to speak to the host at all.
            let _ = self.ask(&["vm", "start", "off", "--no-wait"]).await;
            site = self.site().await.unwrap_or_default();
            !site["replacedBy"].as_str().unwrap_or_default().is_empty()
        })
        .await
        .with_context(|| format!("it still commands: {site}"))?;
        let said = site["replacedBy"].as_str().unwrap_or_default();
        ensure!(said.contains(why), "{said:?} does not say: {why}");
        let events = self.ask(&["events", "-o", "json"]).await?;
        ensure!(events.stdout.contains("ControllerReplaced"), "{events:?}");
        let refused = self.ask(&create("more", LOCAL, &["--host", "h2"])).await?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("OTHER_CONTROLLER"),
            "it still takes requests: {refused:?}"
        );
        Ok(())
    }
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_29_and_43_a_controller_on_a_copy_of_the_store_is_refused_by_the_agents()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, SHARED).await?;
        dalgu(lab, &create("off", LOCAL, &["--host", "h2", "--stopped"])).await?;
        let pids = pids_of(lab, &vm.uid)?;
        // The first goes on after the copy was made, and is started twice: its term is higher by two.
        lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
        let mut second = Second::copy(lab)?;
        for _ in 0..2 {
            if lab.is_running(Daemon::Controller)? {
                lab.signal(Daemon::Controller, Signal::SIGKILL).await?;
            }
            lab.start(Daemon::Controller).await?;
            at_rest(lab, &[], REST_LIMIT).await?;
        }
        // 29: an older term.
        second.start().await?;
        second.lure(true).await?;
        second.until_replaced("is older than").await?;
        // 43: by its next start it has come to the same term.
        second.start().await?;
        second.until_replaced("two controllers are running").await?;
        let log = fs::read_to_string(lab.layout().log("h2-agent"))?;
        ensure!(
            log.contains("this is not the controller that the host obeys"),
            "the agent says nothing of it"
        );
        second.end().await?;
        second.lure(false).await?;

        ensure!(pids_of(lab, &vm.uid)? == pids, "a VM was restarted");
        // This needs h2 to obey the first again, which hears from it soon.
        at_rest(lab, &[], REST_LIMIT).await?;
        dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        let off = words::vm(lab, "off").await?;
        ensure!(off.state == "STOPPED", "a copy was obeyed: {}", off.all);
        let vm = words::vm(lab, "moving").await?;
        ensure!(vm.host == "h2", "{}", vm.all);
        story.more(lab, &vm, 2).await?;
        story.is_whole()
    })
    .await
}
