//! Incidents of other systems, replayed on real libvirt hosts: each test is named for one of docs/incidents.md, where
//! the others are said to be tested elsewhere, or why they cannot be yet. Run by `make test`; needs root and the set-up step.
//!
//! Here are those of agents, libvirt and single migrations; the modules have the others, by what is broken.

mod churn;
mod controllers;
mod identity;
mod storage;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::chaos::cable::{self, Way};
use dalgu_tests::chaos::ground;
use dalgu_tests::e2e::census::{at_rest, domains, pids_of};
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{
    self, LOCAL, SHARED, Vm, begin, create, dalgu, end_of, number_at, state_of, try_dalgu,
};
use dalgu_tests::e2e::{self, BOOT_LIMIT, REST_LIMIT, grpcurl};
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use dalgu_tests::operator::Operator;
use futures::future::try_join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::time::{Instant, sleep};

/// A VM on h1 that counts.
async fn counting(lab: &Lab, disk: &str) -> anyhow::Result<(Vm, Story)> {
    dalgu(lab, &create("moving", disk, &["--host", "h1"])).await?;
    let vm = words::vm(lab, "moving").await?;
    let mut story = Story::default();
    story.more(lab, &vm, 3).await?;
    Ok((vm, story))
}

/// Begins to move it at so many MiB a second, and waits until so many bytes of memory have gone.
async fn move_slowly(lab: &Lab, rate: &str, bytes: u64) -> anyhow::Result<String> {
    let words = ["vm", "migrate", "moving", "--host", "h2", "--bandwidth", rate];
    let id = begin(lab, &words).await?;
    wait_for("the transfer", REST_LIMIT, async || {
        words::operation(lab, &id)
            .await
            .is_ok_and(|operation| number_at(&operation, "/migration/memoryProcessedBytes") >= bytes)
    })
    .await?;
    Ok(id)
}

/// Waits until its processors run on h2, by libvirt's word there: the switch-over.
async fn switched_over(lab: &Lab, vm: &Vm) -> anyhow::Result<()> {
    wait_for("the switch-over", REST_LIMIT, async || {
        lab.virsh(2, &["domstate", &vm.uid])
            .await
            .is_ok_and(|state| state.trim() == "running")
    })
    .await
}

/// The operation has ended, all views agree, there is one copy, and it has said every count once and in order.
async fn one_whole_copy(lab: &Lab, id: &str, story: &mut Story) -> anyhow::Result<(Value, Vm)> {
    let ended = end_of(lab, id, REST_LIMIT).await?;
    at_rest(lab, &[], REST_LIMIT)
        .await
        .with_context(|| ended.to_string())?;
    let vm = words::vm(lab, "moving").await?;
    ensure!(
        vm.state == "RUNNING" && pids_of(lab, &vm.uid)?.len() == 1,
        "{}",
        vm.all
    );
    story.more(lab, &vm, 3).await?;
    story.is_whole().with_context(|| ended.to_string())?;
    Ok((ended, vm))
}

async fn kill_all(lab: &Lab, daemons: &[Daemon]) -> anyhow::Result<()> {
    for daemon in daemons {
        lab.signal(*daemon, Signal::SIGKILL).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_01_and_02_the_call_fails_after_the_switch_over_and_the_owner_is_the_destination()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, SHARED).await?;
        let id = move_slowly(lab, "24MiB", 8 << 20).await?;
        switched_over(lab, &vm).await?;
        // The source can tell nobody any more, and its libvirtd cannot tell it.
        cable::cut(lab, 1, None, Way::Both).await?;
        lab.signal(Daemon::Libvirtd(1), Signal::SIGKILL).await?;
        // Whatever is asked for meanwhile is not done to the source's copy.
        try_dalgu(lab, &["vm", "reboot", "moving", "--no-wait"]).await?;
        sleep(Duration::from_secs(2)).await;
        ensure!(pids_of(lab, &vm.uid)?.len() <= 2);
        cable::mend(lab, 1, None).await?;
        lab.start(Daemon::Libvirtd(1)).await?;
        let ended = end_of(lab, &id, REST_LIMIT).await?;
        at_rest(lab, &[], REST_LIMIT)
            .await
            .with_context(|| ended.to_string())?;
        let vm = words::vm(lab, "moving").await?;
        ensure!(vm.host == "h2" && pids_of(lab, &vm.uid)?.len() == 1, "{}", vm.all);
        story.more(lab, &vm, 2).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_03_the_sources_agent_dies_in_mid_transfer_and_its_successor_knows_where_the_vm_is()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (_, mut story) = counting(lab, SHARED).await?;
        let id = move_slowly(lab, "16MiB", 8 << 20).await?;
        // libvirt goes on without it, as far as its streams let it.
        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        lab.start(Daemon::Agent(1)).await?;
        let (ended, vm) = one_whole_copy(lab, &id, &mut story).await?;
        let there = if state_of(&ended) == "SUCCEEDED" {
            "h2"
        } else {
            "h1"
        };
        ensure!(vm.host == there, "{ended}: {}", vm.all);
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_06_source_agent_and_libvirtd_die_after_success_and_the_target_survives()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, LOCAL).await?;
        let id = move_slowly(lab, "24MiB", 8 << 20).await?;
        switched_over(lab, &vm).await?;
        kill_all(lab, &[Daemon::Agent(1), Daemon::Libvirtd(1)]).await?;
        sleep(Duration::from_secs(1)).await;
        lab.start(Daemon::Libvirtd(1)).await?;
        lab.start(Daemon::Agent(1)).await?;
        let (ended, vm) = one_whole_copy(lab, &id, &mut story).await?;
        ensure!(vm.host == "h2" && state_of(&ended) == "SUCCEEDED", "{ended}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_07_a_destination_agent_restarted_with_libvirtd_hung_stops_and_undefines_nothing()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (_, mut story) = counting(lab, SHARED).await?;
        dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
        let vm = words::vm(lab, "moving").await?;
        let pids = pids_of(lab, &vm.uid)?;
        lab.signal(Daemon::Libvirtd(2), Signal::SIGSTOP).await?;
        lab.signal(Daemon::Agent(2), Signal::SIGKILL).await?;
        let started = lab.start(Daemon::Agent(2)).await;
        sleep(Duration::from_secs(3)).await;
        lab.signal(Daemon::Libvirtd(2), Signal::SIGCONT).await?;
        started?;
        at_rest(lab, &[], REST_LIMIT).await?;
        ensure!(pids_of(lab, &vm.uid)? == pids && words::vm(lab, "moving").await?.host == "h2");
        story.more(lab, &vm, 3).await?;
        story.is_whole()
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_08_cancelled_in_each_phase_it_can_be_moved_again_at_once() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (_, mut story) = counting(lab, LOCAL).await?;
        // At once, while it is prepared, in the middle, near the end.
        for bytes in [0, 1, 12 << 20, 28 << 20] {
            let id = if bytes == 0 {
                begin(
                    lab,
                    &["vm", "migrate", "moving", "--host", "h2", "--bandwidth", "16MiB"],
                )
                .await?
            } else {
                move_slowly(lab, "16MiB", bytes).await?
            };
            try_dalgu(lab, &["op", "cancel", &id]).await?;
            let ended = end_of(lab, &id, REST_LIMIT).await?;
            let left = Instant::now();
            at_rest(lab, &[], Duration::from_secs(10))
                .await
                .with_context(|| format!("leftovers after a cancel at {bytes} bytes: {ended}"))?;
            ensure!(left.elapsed() < Duration::from_secs(10));
            // In case it was too late to cancel.
            if words::vm(lab, "moving").await?.host == "h2" {
                ensure!(state_of(&ended) == "SUCCEEDED", "{ended}");
            } else {
                dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
            }
            let there = words::vm(lab, "moving").await?;
            story.more(lab, &there, 2).await?;
            dalgu(lab, &["vm", "migrate", "moving", "--host", "h1"]).await?;
            story.more(lab, &words::vm(lab, "moving").await?, 2).await?;
            story
                .is_whole()
                .with_context(|| format!("cancelled at {bytes} bytes: {ended}"))?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_09_a_stale_source_domain_does_not_block_the_way_back() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, SHARED).await?;
        let stale = lab.virsh(1, &["dumpxml", "--inactive", &vm.uid]).await?;
        fs::write(lab.layout().host(1).outside("/etc/dalgu/stale.xml"), stale)?;
        for agent_runs in [true, false] {
            dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
            story.read_on(lab, &words::vm(lab, "moving").await?)?;
            if !agent_runs {
                lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
            }
            // As a libvirtd that died in the last moment, or a restored /etc, would leave it.
            lab.virsh(1, &["define", "/etc/dalgu/stale.xml"]).await?;
            if agent_runs {
                wait_for("the stale domain to be told of", REST_LIMIT, async || {
                    let host = words::json(lab, &["host", "show", "h1"]).await;
                    host.is_ok_and(|host| host["unmanagedDomains"].to_string().contains(&vm.uid))
                })
                .await?;
            } else {
                lab.start(Daemon::Agent(1)).await?;
            }
            story.more(lab, &words::vm(lab, "moving").await?, 3).await?;
            dalgu(lab, &["vm", "migrate", "moving", "--host", "h1"])
                .await
                .with_context(|| format!("the stale domain is in the way, agent_runs {agent_runs}"))?;
            let vm = words::vm(lab, "moving").await?;
            ensure!(vm.host == "h1" && pids_of(lab, &vm.uid)?.len() == 1, "{}", vm.all);
            at_rest(lab, &[], REST_LIMIT).await?;
            story.more(lab, &vm, 3).await?;
        }
        story.is_whole()
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_10_and_28_what_cannot_be_right_is_refused_at_once_and_changes_nothing() -> anyhow::Result<()>
{
    with_lab(&e2e::hosts(1), async |lab| {
        let (vm, mut story) = counting(lab, LOCAL).await?;
        let before = words::vm(lab, "moving").await?;
        // 10: to where it is.
        let asked = Instant::now();
        let refused = try_dalgu(lab, &["vm", "migrate", "moving", "--host", "h1"]).await?;
        ensure!(
            refused.code == 5 && asked.elapsed() < Duration::from_secs(5),
            "{refused:?}"
        );
        // 28, as far as a host can be declared gone today: a healthy one with VMs cannot be removed.
        let removed = grpcurl::try_call(lab, "HostService/DeleteHost", r#"{"name":"h1"}"#).await?;
        ensure!(
            removed.code != 0,
            "a host with a running VM was removed: {removed:?}"
        );
        let after = words::vm(lab, "moving").await?;
        ensure!(
            (
                &before.host,
                &before.all["generation"],
                &before.all["status"]["epoch"]
            ) == (
                &after.host,
                &after.all["generation"],
                &after.all["status"]["epoch"]
            ),
            "{}",
            after.all
        );
        at_rest(lab, &[], REST_LIMIT).await?;
        story.more(lab, &vm, 2).await?;
        story.is_whole()
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_34_and_51_agent_and_libvirtd_killed_with_twenty_vms_and_all_are_adopted_with_their_processes()
-> anyhow::Result<()> {
    Box::pin(with_lab(&e2e::hosts(1), async |lab| {
        ground::make_room(&Operator::connect(lab).await?).await?;
        let names: Vec<_> = (1..=20).map(|number| format!("vm{number:02}")).collect();
        try_join_all(
            names
                .iter()
                .map(async |name| dalgu(lab, &create(name, LOCAL, &[])).await),
        )
        .await?;
        let all = async || -> anyhow::Result<Vec<Vec<u32>>> {
            let vms = words::vms(lab).await?;
            vms.values().map(|vm| pids_of(lab, &vm.uid)).collect()
        };
        let before = all().await?;
        ensure!(
            before.len() == 20 && before.iter().all(|pids| pids.len() == 1),
            "{before:?}"
        );
        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        lab.start(Daemon::Agent(1)).await?;
        at_rest(lab, &[], REST_LIMIT)
            .await
            .context("34: after the agent")?;
        ensure!(all().await? == before, "34: other processes than before");
        lab.signal(Daemon::Libvirtd(1), Signal::SIGKILL).await?;
        lab.start(Daemon::Libvirtd(1)).await?;
        at_rest(lab, &[], REST_LIMIT)
            .await
            .context("51: after libvirtd")?;
        ensure!(all().await? == before, "51: other processes than before");
        // Transient domains would be forgotten with a libvirtd.
        let persistent = lab.virsh(1, &["list", "--all", "--persistent", "--name"]).await?;
        ensure!(persistent.split_whitespace().count() == 20, "{persistent}");
        Ok(())
    }))
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_35_one_hung_guest_delays_no_other_and_can_be_powered_off() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let (hung, _) = counting(lab, LOCAL).await?;
        dalgu(lab, &create("other", LOCAL, &[])).await?;
        let pid = pids_of(lab, &hung.uid)?[0];
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGSTOP)?;
        // Something is stuck in it already.
        begin(lab, &["vm", "pause", "moving"]).await?;
        let began = Instant::now();
        dalgu(lab, &["vm", "pause", "other"]).await?;
        dalgu(lab, &["vm", "resume", "other"]).await?;
        dalgu(lab, &create("new", LOCAL, &[])).await?;
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "others took {:?}",
            began.elapsed()
        );
        let began = Instant::now();
        let id = begin(lab, &["vm", "stop", "moving", "--force"]).await?;
        wait_for("end of the hung QEMU", BOOT_LIMIT, async || {
            pids_of(lab, &hung.uid).is_ok_and(|pids| pids.is_empty())
        })
        .await?;
        println!("the hung guest was off after {:?}", began.elapsed());
        ensure!(state_of(&end_of(lab, &id, REST_LIMIT).await?) == "SUCCEEDED");
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_38_a_guest_that_powered_itself_off_stays_off_when_its_start_is_told_again()
-> anyhow::Result<()> {
    with_lab(&e2e::hosts(1), async |lab| {
        let (vm, mut story) = counting(lab, LOCAL).await?;
        // The guest itself shuts down: nobody asks Dalgu for it.
        story.more(lab, &vm, 5).await?;
        lab.virsh(1, &["shutdown", &vm.uid]).await?;
        wait_for("the guest's own end", BOOT_LIMIT, async || {
            words::vm(lab, "moving")
                .await
                .is_ok_and(|vm| vm.state == "STOPPED")
        })
        .await?;
        // Both tell each other anew what should be.
        for daemon in [Daemon::Agent(1), Daemon::Controller] {
            lab.signal(daemon, Signal::SIGKILL).await?;
            lab.start(daemon).await?;
            at_rest(lab, &[], REST_LIMIT).await?;
        }
        sleep(Duration::from_secs(2)).await;
        let after = words::vm(lab, "moving").await?;
        ensure!(
            after.state == "STOPPED" && pids_of(lab, &vm.uid)?.is_empty(),
            "{}",
            after.all
        );
        dalgu(lab, &["vm", "start", "moving"]).await?;
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_41_an_agent_whose_state_was_wiped_adopts_its_vms_from_their_domains() -> anyhow::Result<()>
{
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, LOCAL).await?;
        dalgu(lab, &create("off", LOCAL, &["--host", "h1", "--stopped"])).await?;
        let pids = pids_of(lab, &vm.uid)?;
        let before = domains(lab).await?;
        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        fs::remove_dir_all(lab.layout().host(1).outside("/var/lib/dalgu/agent"))?;
        fs::create_dir_all(lab.layout().host(1).outside("/var/lib/dalgu/agent"))?;
        lab.start(Daemon::Agent(1)).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        ensure!(pids_of(lab, &vm.uid)? == pids && domains(lab).await? == before);
        story.more(lab, &vm, 2).await?;
        story.is_whole()?;
        let log = fs::read_to_string(lab.layout().log("h1-agent"))?;
        ensure!(log.contains("adopt"), "the agent says nothing of it: {log}");
        // And it is theirs again in full, when it has been told of it anew.
        wait_for("the agent to be told of its VM", REST_LIMIT, async || {
            let log = fs::read_to_string(lab.layout().log("h1-agent")).unwrap_or_default();
            let since = log.rsplit_once("recovered owned=0 adopted=2");
            since.is_some_and(|(_, since)| {
                since
                    .lines()
                    .any(|line| line.contains(&vm.uid) && line.contains("intent accepted"))
            })
        })
        .await?;
        dalgu(lab, &["vm", "migrate", "moving", "--host", "h2"]).await?;
        dalgu(lab, &["vm", "start", "off"]).await?;
        at_rest(lab, &[], REST_LIMIT).await?;
        story.more(lab, &words::vm(lab, "moving").await?, 2).await?;
        story.is_whole()
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn incident_32_all_hosts_lose_the_controller_for_a_while_and_no_vm_notices() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let (vm, mut story) = counting(lab, SHARED).await?;
        for host in 1..=2 {
            cable::cut(lab, host, None, Way::Both).await?;
        }
        wait_for("the hosts to be missed", REST_LIMIT, async || {
            words::vm(lab, "moving")
                .await
                .is_ok_and(|vm| vm.state == "UNREACHABLE")
        })
        .await?;
        for host in 1..=2 {
            cable::mend(lab, host, None).await?;
        }
        at_rest(lab, &[], REST_LIMIT).await?;
        story.more(lab, &vm, 2).await?;
        story.is_whole()
    })
    .await
}
