//! Hosts that are taken for others, and hosts that are gone.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{at_rest, domains, pids_of};
use dalgu_tests::e2e::words::{self, LOCAL, create, dalgu, json};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, run, wait_for, with_lab};
use nix::sys::signal::Signal;

use super::counting;

/// What makes a host's agent that host's.
const IDENTITY: [&str; 2] = ["/etc/dalgu", "/var/lib/dalgu/agent"];

/// What one directory holds takes the place of what the other held; the directory itself stays, since hosts see it mounted.
async fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let (from, to) = (from.display(), to.display());
    let steps = format!("mkdir -p '{to}' && rm -rf '{to}'/* && cp -a '{from}/.' '{to}/'");
    run("sh", ["-c", &steps]).await.map(drop)
}

/// How often the controller has told of a second machine.
async fn copies_told(lab: &Lab) -> anyhow::Result<usize> {
    let events = json(lab, &["events"]).await?;
    let events = events.as_array().context("no list of events")?;
    let told = events
        .iter()
        .filter(|event| event["reason"] == "HostIdentityCopied");
    Ok(told.count())
}

fn agent_log(lab: &Lab) -> anyhow::Result<String> {
    Ok(fs::read_to_string(lab.layout().log("h2-agent"))?)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_50_a_second_machine_with_a_hosts_state_and_certificate_is_refused() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, LOCAL).await?;
        let before = (pids_of(lab, &vm.uid)?, domains(lab).await?);
        let (first, second) = (lab.layout().host(1), lab.layout().host(2));
        lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
        for place in IDENTITY {
            let own = second.outside(place);
            copy(&own, &own.with_extension("own")).await?;
            copy(&first.outside(place), &own).await?;
        }
        let config = second.outside("/etc/dalgu/agent.toml");
        let text = fs::read_to_string(&config)?;
        fs::write(
            &config,
            text.replace(&first.agent_address(), &second.agent_address()),
        )?;

        // With the state: it does nothing but say so, and ends. It may have ended before anybody could look.
        let _ = lab.start(Daemon::Agent(2)).await;
        wait_for("the end of the copy", REST_LIMIT, async || {
            lab.is_running(Daemon::Agent(2)).is_ok_and(|running| !running)
        })
        .await?;
        ensure!(
            agent_log(lab)?.contains("was copied from machine"),
            "it does not say why"
        );
        ensure!(copies_told(lab).await? == 1, "the operator was not told once");

        // With the certificate alone: it stays, asks again and again, and is told of once.
        fs::remove_dir_all(second.outside("/var/lib/dalgu/agent"))?;
        fs::create_dir_all(second.outside("/var/lib/dalgu/agent"))?;
        lab.start(Daemon::Agent(2)).await?;
        wait_for("a second refusal", REST_LIMIT, async || {
            agent_log(lab).is_ok_and(|log| log.matches("OTHER_MACHINE").count() > 1)
        })
        .await?;
        ensure!(copies_told(lab).await? <= 2, "it is told of again and again");
        let host = json(lab, &["host", "show", "h1"]).await?;
        ensure!(
            host["state"] == "HOST_STATE_READY" && host["address"] == first.agent_address(),
            "{host}"
        );
        // What is asked of the host is done by the host.
        dalgu(lab, &create("new", LOCAL, &["--host", "h1"])).await?;
        ensure!(words::vm(lab, "new").await?.state == "RUNNING");
        dalgu(lab, &["vm", "delete", "new", "--force"]).await?;
        ensure!(
            (pids_of(lab, &vm.uid)?, domains(lab).await?) == before,
            "a VM was touched"
        );

        // As itself it comes back.
        lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
        for place in IDENTITY {
            let own = second.outside(place);
            copy(&own.with_extension("own"), &own).await?;
            fs::remove_dir_all(own.with_extension("own"))?;
        }
        lab.start(Daemon::Agent(2)).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
        story.more(lab, &words::vm(lab, "moving").await?, 2).await?;
        story.is_whole()
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_33_vms_of_a_host_that_is_gone_are_not_shown_as_running() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (here, mut story) = counting(lab, LOCAL).await?;
        dalgu(lab, &create("there", LOCAL, &["--host", "h2"])).await?;
        let pids = pids_of(lab, &here.uid)?;
        lab.power_off(2).await?;
        wait_for("the host to be missed", REST_LIMIT, async || {
            words::vm(lab, "there")
                .await
                .is_ok_and(|vm| vm.state == "UNREACHABLE")
        })
        .await?;
        // And no other VM is touched by it.
        ensure!(words::vm(lab, "moving").await?.state == "RUNNING" && pids_of(lab, &here.uid)? == pids);
        story.more(lab, &here, 2).await?;
        lab.power_on(2).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        ensure!(
            words::vm(lab, "there").await?.state == "RUNNING",
            "it is back with its host"
        );
        story.is_whole()
    })
    .await
}
