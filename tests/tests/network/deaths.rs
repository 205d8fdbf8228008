//! Daemons that die while a VM migrates that has an interface in an overlay: it is in one place, with its rules, its lease and the ways to
//! it, and nothing of it is anywhere else; and what is refused is refused all the time.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::at_rest;
use dalgu_tests::e2e::moments::{Moments, death};
use dalgu_tests::e2e::network::site::Site;
use dalgu_tests::e2e::words::{self, begin, dalgu, end_of, state_of};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT};
use dalgu_tests::lab::{Daemon, wait_for, with_lab};

use super::guest;

/// It has moved within this time.
const MOVED: Duration = Duration::from_millis(1500);

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_while_a_vm_moves_it_is_in_one_place_with_its_rules_and_nowhere_else()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let site = Site::new(lab).await?;
        site.create("web", 11, "h1", &["web"], "").await?;
        site.keep_on("h1").await?;
        site.says("web", "address is 10.20.0.11").await?;
        site.join(1).await?;
        let probe = site.probe();
        probe.hears("10.20.0.11:0").await?;
        let mut conversation = probe.converse("10.20.0.11:7").await?;
        let watch = probe.watch(guest(11)).await?;
        let dying: [fn(u8, u8) -> Daemon; 5] = [
            |from, _| Daemon::Agent(from),
            |_, to| Daemon::Agent(to),
            |from, _| Daemon::Libvirtd(from),
            |_, to| Daemon::Libvirtd(to),
            |_, _| Daemon::Controller,
        ];
        let mut moments = Moments::new()?;
        for daemon in dying.repeat(2) {
            let from = words::vm(lab, "web").await?.host_number()?;
            let to = 3 - from;
            let daemon = daemon(from, to);
            let begun = tokio::time::Instant::now();
            let operation = begin(lab, &["vm", "migrate", "web", "--host", &format!("h{to}")]).await?;
            death(lab, daemon, moments.next(MOVED)).await?;
            let ended = end_of(lab, &operation, BOOT_LIMIT).await?;
            let mut last = String::new();
            wait_for("the VM to run", REST_LIMIT, async || {
                let vm = words::vm(lab, "web").await;
                last = format!("{vm:?}");
                vm.is_ok_and(|vm| vm.state == "RUNNING")
            })
            .await
            .with_context(|| format!("{daemon:?} died as it left h{from}: {last}"))?;
            at_rest(lab, &[], REST_LIMIT)
                .await
                .with_context(|| format!("{daemon:?} died as it left h{from}"))?;
            probe.hears("10.20.0.11:0").await?;
            conversation
                .says("once more")
                .await
                .with_context(|| format!("{daemon:?} died as it left h{from}"))?;
            println!(
                "{daemon:?} died as it left h{from}: {}, after {:?}",
                state_of(&ended),
                begun.elapsed()
            );
        }
        let seen = watch.end(0).await?;
        ensure!(
            seen.got_through == 0,
            "a refused packet reached the guest {} times",
            seen.got_through
        );
        for vm in ["desk", "web"] {
            dalgu(lab, &["vm", "delete", vm, "--force"]).await?;
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
