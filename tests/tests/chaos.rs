//! Sudden death in the middle of work: the controller, an agent or libvirtd is killed while VMs are created, stopped
//! and moved, and started again. Then every operation ends by itself, each VM has one QEMU or none as wanted,
//! nothing is lost and nothing is left. Run by `make test`; needs root and the set-up step.
//!
//! `DALGU_CHAOS_ROUNDS=N` does it all N times, each time with the deaths a little later.

use std::env;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{at_rest, pids_of};
use dalgu_tests::e2e::story::Story;
use dalgu_tests::e2e::words::{self, LOCAL, SHARED, begin, begin_again, create, dalgu, end_of, state_of};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use futures::future::try_join_all;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::time::sleep;

/// Time between the requests of one batch: when the death comes, each is at another point of its way.
const STAGGER: Duration = Duration::from_millis(150);
/// At this rate the guest's memory takes some seconds.
const SLOW: &str = "12MiB";
/// The victim stays dead for so long.
const DEATH: Duration = Duration::from_secs(1);

fn rounds() -> anyhow::Result<u32> {
    let rounds = env::var("DALGU_CHAOS_ROUNDS")
        .ok()
        .map_or(Ok(1), |text| text.parse());
    rounds.context("DALGU_CHAOS_ROUNDS")
}

/// How much later the deaths come in a round.
fn delay(round: u32) -> Duration {
    Duration::from_millis(u64::from(round) * 70)
}

async fn kill_and_start(lab: &Lab, victim: Daemon) -> anyhow::Result<()> {
    lab.signal(victim, Signal::SIGKILL).await?;
    sleep(DEATH).await;
    lab.start(victim).await
}

/// Ends the victim while the batch is at work, starts it again, and tells how each operation ended.
async fn amid(lab: &Lab, victim: Daemon, wait: Duration, batch: &[Vec<&str>]) -> anyhow::Result<Vec<Value>> {
    let requests = try_join_all(batch.iter().zip(0_u32..).map(async |(words, place)| {
        sleep(STAGGER * place).await;
        begin_again(lab, words).await
    }));
    let ids = if victim == Daemon::Controller {
        // It dies while the last request is on its way.
        let killing = async {
            sleep(STAGGER * 3 + wait).await;
            kill_and_start(lab, victim).await
        };
        let (ids, killed) = tokio::join!(requests, killing);
        killed?;
        ids?
    } else {
        // A host without its daemon would rightly be refused as a place for more.
        let ids = requests.await?;
        sleep(wait).await;
        kill_and_start(lab, victim).await?;
        ids
    };
    let ended = try_join_all(ids.iter().map(async |id| end_of(lab, id, REST_LIMIT).await)).await?;
    every_host_reports(lab).await?;
    Ok(ended)
}

/// A host counts as ready for some seconds after its agent's death; the next batch needs it to be so.
async fn every_host_reports(lab: &Lab) -> anyhow::Result<()> {
    for host in lab.hosts() {
        let seen = async || {
            words::json(lab, &["host", "show", &host.name])
                .await
                .map(|host| host["reportTime"].clone())
        };
        let before = seen().await?;
        wait_for(&format!("a report of {}", host.name), REST_LIMIT, async || {
            seen().await.is_ok_and(|now| now != before)
        })
        .await?;
    }
    Ok(())
}

const NAMES: [&str; 4] = ["c1", "c2", "c3", "c4"];

/// Four VMs are created and then stopped, and the victim dies amid each; then one QEMU or none, and nothing left.
async fn create_and_stop(lab: &Lab, victim: Daemon, round: u32) -> anyhow::Result<()> {
    let disks = [LOCAL, SHARED, LOCAL, SHARED];
    let batch: Vec<_> = NAMES
        .iter()
        .zip(disks)
        .map(|(name, disk)| create(name, disk, &["--host", "h1"]))
        .collect();
    for operation in amid(lab, victim, delay(round), &batch).await.context("create")? {
        ensure!(state_of(&operation) == "SUCCEEDED", "create: {operation}");
    }
    at_rest(lab, &[], REST_LIMIT).await.context("after create")?;
    for name in NAMES {
        let vm = words::vm(lab, name).await?;
        ensure!(
            vm.state == "RUNNING" && pids_of(lab, &vm.uid)?.len() == 1,
            "{}",
            vm.all
        );
        let mut story = Story::default();
        story.more(lab, &vm, 2).await?;
        story
            .is_whole()
            .with_context(|| format!("{name} was started once only"))?;
    }
    let batch: Vec<_> = NAMES.iter().map(|name| vec!["vm", "stop", name]).collect();
    for operation in amid(lab, victim, delay(round), &batch).await.context("stop")? {
        ensure!(state_of(&operation) == "SUCCEEDED", "stop: {operation}");
    }
    at_rest(lab, &[], REST_LIMIT).await.context("after stop")?;
    for name in NAMES {
        let vm = words::vm(lab, name).await?;
        ensure!(
            vm.state == "STOPPED" && pids_of(lab, &vm.uid)?.is_empty(),
            "{}",
            vm.all
        );
    }
    let batch: Vec<_> = NAMES.iter().map(|name| vec!["vm", "delete", name]).collect();
    for operation in amid(lab, victim, delay(round), &batch).await.context("delete")? {
        ensure!(state_of(&operation) == "SUCCEEDED", "delete: {operation}");
    }
    at_rest(lab, &[], REST_LIMIT).await.context("after delete")
}

/// A phase of a migration, and how many bytes must have gone, for the victim to die.
#[derive(Clone, Copy)]
struct Moment {
    phase: &'static str,
    bytes: u64,
}

const MIDDLE: Moment = Moment {
    phase: "TRANSFERRING",
    bytes: 8 << 20,
};
const BEGINNING: Moment = Moment {
    phase: "PREPARING_DESTINATION",
    bytes: 0,
};
const END: Moment = Moment {
    phase: "CUTTING_OVER",
    bytes: 0,
};

/// Whether a migration has come to the moment, or past it.
fn reached(operation: &Value, moment: Moment) -> bool {
    const ORDER: [&str; 9] = [
        "RESERVING",
        "PREPARING_DESTINATION",
        "TRANSFERRING",
        "CUTTING_OVER",
        "CLEANING_SOURCE",
        "CLEANING_DESTINATION",
        "DONE",
        "FAILED",
        "ABORTED",
    ];
    let place = |phase: &str| ORDER.iter().position(|known| *known == phase);
    let phase = operation["migration"]["phase"]
        .as_str()
        .unwrap_or_default()
        .replace("MIGRATION_PHASE_", "");
    let (now, wanted) = (place(&phase), place(moment.phase));
    now > wanted
        || (now == wanted && words::number_at(operation, "/migration/memoryProcessedBytes") >= moment.bytes)
}

/// A counting guest is moved, and the victim dies at the moment. Wherever the guest then is, it is there once, it
/// never stopped counting, and nothing is left elsewhere.
async fn migrate(lab: &Lab, victim: Daemon, moment: Moment, disk: &str) -> anyhow::Result<&'static str> {
    dalgu(
        lab,
        &create("moving", disk, &["--host", "h1", "--memory", "128MiB"]),
    )
    .await?;
    let vm = words::vm(lab, "moving").await?;
    let mut story = Story::default();
    story.more(lab, &vm, 3).await?;
    let id = begin(
        lab,
        &["vm", "migrate", "moving", "--host", "h2", "--bandwidth", SLOW],
    )
    .await?;
    wait_for(moment.phase, REST_LIMIT, async || {
        words::operation(lab, &id)
            .await
            .is_ok_and(|operation| reached(&operation, moment))
    })
    .await?;
    kill_and_start(lab, victim).await?;
    let ended = end_of(lab, &id, REST_LIMIT).await?;
    at_rest(lab, &[], REST_LIMIT)
        .await
        .with_context(|| format!("{ended}"))?;
    let vm = words::vm(lab, "moving").await?;
    ensure!(
        vm.state == "RUNNING" && pids_of(lab, &vm.uid)?.len() == 1,
        "{}",
        vm.all
    );
    let outcome = match (state_of(&ended), vm.host.as_str()) {
        ("SUCCEEDED", "h2") => "moved",
        ("FAILED", "h1") => "stayed",
        _ => anyhow::bail!("the VM is on {}, and the operation is {ended}", vm.host),
    };
    story.more(lab, &vm, 3).await?;
    story.is_whole().with_context(|| format!("{ended}"))?;
    // It can be moved at once, whichever way the first attempt ended.
    let to = if vm.host == "h1" { "h2" } else { "h1" };
    dalgu(lab, &["vm", "migrate", "moving", "--host", to]).await?;
    let vm = words::vm(lab, "moving").await?;
    story.more(lab, &vm, 2).await?;
    story.is_whole()?;
    dalgu(lab, &["vm", "delete", "moving", "--force"]).await?;
    at_rest(lab, &[], REST_LIMIT).await?;
    Ok(outcome)
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_amid_create_stop_and_delete_nothing_is_lost_or_left() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        for round in 0..rounds()? {
            for victim in [Daemon::Controller, Daemon::Agent(1), Daemon::Libvirtd(1)] {
                create_and_stop(lab, victim, round)
                    .await
                    .with_context(|| format!("{victim:?}, round {round}"))?;
            }
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn whoever_dies_amid_a_migration_one_copy_runs_and_counts_on() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let victims = [
            Daemon::Controller,
            Daemon::Agent(1),
            Daemon::Agent(2),
            Daemon::Libvirtd(1),
            Daemon::Libvirtd(2),
        ];
        let middle = victims.map(|victim| (victim, MIDDLE));
        let edges = [
            (Daemon::Controller, BEGINNING),
            (Daemon::Agent(2), BEGINNING),
            (Daemon::Controller, END),
            (Daemon::Agent(1), END),
            (Daemon::Agent(2), END),
        ];
        for round in 0..rounds()? {
            let disks = if round % 2 == 0 {
                [LOCAL, SHARED]
            } else {
                [SHARED, LOCAL]
            };
            for ((victim, moment), disk) in middle.into_iter().chain(edges).zip(disks.into_iter().cycle()) {
                let what = || format!("{victim:?} at {}, disk {disk}, round {round}", moment.phase);
                let outcome = migrate(lab, victim, moment, disk).await.with_context(what)?;
                println!("{}: the VM {outcome}", what());
            }
        }
        Ok(())
    })
    .await
}
