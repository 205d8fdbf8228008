//! Networks of the site on real hosts: an overlay between them, its filters, addresses and names, and VMs that move in it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod probe;
mod site;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::words::{self, dalgu, json};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Daemon, wait_for, with_lab};
use nix::sys::signal::Signal;

use site::Site;

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn vms_on_two_hosts_talk_by_name_and_one_moves_with_its_connections() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let site = Site::new(lab).await?;
        site.tell(1, &site.document(1)).await?;
        site.tell(2, &site.document(1)).await?;
        site.create("desk", 10, "h1", &[], "dalgu.ping=web.app.internal")
            .await?;
        site.create("web", 11, "h2", &["web"], "").await?;
        for (vm, address) in [("desk", "10.20.0.10"), ("web", "10.20.0.11")] {
            site.says(
                vm,
                &format!(
                    "address is {address} mtu 1450 router 10.20.0.1 dns 10.20.0.254 domain app.internal"
                ),
            )
            .await?;
        }
        site.says("desk", "heard web.app.internal").await?;

        let mut probe = site.probe().await?;
        probe.hears("10.20.0.11:0").await?;
        let mut conversation = probe.converse("10.20.0.11:7").await?;
        conversation.says("before").await?;
        let watch = probe.watch("10.20.0.11:0", "10.20.0.11:9").await?;
        dalgu(lab, &["vm", "migrate", "web", "--host", "h1"]).await?;
        let seen = watch.end(Duration::from_secs(1)).await?;
        eprintln!(
            "blackout of questions every 5 ms: {:?}; refused packets that got through: {}",
            seen.blackout, seen.got_through
        );
        ensure!(
            seen.got_through == 0,
            "a refused packet reached the guest {} times",
            seen.got_through
        );
        ensure!(
            seen.answers_after > 20,
            "it does not answer after it moved: {seen:?}"
        );
        conversation.says("after").await?;
        let operation = json(lab, &["op", "list"]).await?;
        eprintln!("reported: {}", operation);
        ensure!(
            site.heard_again("desk", "heard web.app.internal").await?,
            "the other VM does not hear it"
        );

        dalgu(lab, &["vm", "delete", "desk", "--force"]).await?;
        dalgu(lab, &["vm", "delete", "web", "--force"]).await?;
        for host in 1..=2 {
            site.tell(host, &site.empty(2)).await?;
            wait_for("networks to be gone", REST_LIMIT, async || {
                lab.exec(host, &["ip", "-o", "link"]).await.is_ok_and(|links| {
                    !links.contains(" dgn") && !links.contains(" dgx") && !links.contains(" dgs")
                })
            })
            .await?;
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn what_a_guest_pretends_to_be_never_leaves_its_port() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        site.tell(1, &site.document(1)).await?;
        let heard = site.listen().await?;
        site.create("desk", 10, "h1", &[], "dalgu.spoof=10.20.0.99")
            .await?;
        site.says("desk", "spoofing").await?;
        // What it may send comes, round after round, and with it would come what it may not.
        wait_for("pings of its own address", BOOT_LIMIT, async || {
            heard.from(site::mac(10)) > 20
        })
        .await?;
        ensure!(
            heard.from("02:00:00:00:be:ef".to_owned()) == 0,
            "a frame with another MAC address left"
        );
        ensure!(
            heard.holding([10, 20, 0, 99]) == 0,
            "a packet or ARP of another address left"
        );
        ensure!(
            heard.holding([10, 20, 0, 254]) == 0,
            "what is about the hosts' own address crossed"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn changed_rules_end_what_they_refuse_and_a_dead_agent_ends_nothing() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let site = Site::new(lab).await?;
        // Without its network the VM does not start, and says why.
        site.begin("web", 11, "h1", &["web"], "").await?;
        wait_for("the reason", REST_LIMIT, async || {
            let vm = words::vm(lab, "web").await;
            vm.is_ok_and(|vm| vm.all.to_string().contains("NETWORK_NOT_READY"))
        })
        .await?;
        site.tell(1, &site.document(1)).await?;
        site.says("web", "address is 10.20.0.11").await?;
        let mut probe = site.probe().await?;
        probe.hears("10.20.0.11:0").await?;
        let mut conversation = probe.converse("10.20.0.11:7").await?;
        conversation.says("allowed").await?;

        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        conversation.says("without an agent").await?;
        lab.start(Daemon::Agent(1)).await?;
        conversation.says("with the next").await?;

        let mut closed = site.document(2);
        closed["securityGroups"][0]["rules"] = serde_json::json!([]);
        site.tell(1, &closed).await?;
        ensure!(
            conversation.says("refused").await.is_err(),
            "a connection goes on that is refused now"
        );
        site.tell(1, &site.document(3)).await?;
        conversation.hears("refused").await.context("allowed again")?;
        let stale = site.tell(1, &site.document(2)).await;
        ensure!(
            format!("{:#}", stale.unwrap_err()).contains("older than 3"),
            "an old document is taken"
        );
        Ok(())
    })
    .await
}
