//! Processors and NUMA nodes of real hosts: what is a VM's own is nobody else's, by what the kernel says of QEMU's threads, also after the
//! agent has died and where the VM has moved to. Run by `make test`; needs root and the set-up step.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::census::{at_rest, pids_of};
use dalgu_tests::e2e::words::{self, LOCAL, SHARED, create, dalgu, number_at, try_dalgu};
use dalgu_tests::e2e::{self, REST_LIMIT};
use dalgu_tests::lab::{Daemon, Lab, wait_for, with_lab};
use nix::sys::signal::Signal;

/// Domains that run are told within so long that a processor is no longer theirs.
const LIMIT: Duration = Duration::from_secs(60);

/// The kernel's list, like `0-1,4`.
fn list(text: &str) -> BTreeSet<u32> {
    let numbers = text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    numbers.flatten().collect()
}

/// The logical processors that the guest's processors and QEMU's main thread may run on, by the threads' names. There are no cgroups in the lab: without
/// them libvirt leaves the threads alone that QEMU made beside these.
fn threads(lab: &Lab, uid: &str) -> anyhow::Result<Vec<(String, BTreeSet<u32>)>> {
    let pids = pids_of(lab, uid)?;
    let [pid] = pids.as_slice() else {
        anyhow::bail!("{} processes of {uid}", pids.len())
    };
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        // A thread may have ended since.
        let Ok(status) = fs::read_to_string(task.join("status")) else {
            continue;
        };
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        if name.starts_with("CPU ")
            || task
                .file_name()
                .is_some_and(|id| id.to_str() == Some(&*pid.to_string()))
        {
            found.push((
                name.trim().to_owned(),
                list(allowed.context("no list of processors")?),
            ));
        }
    }
    Ok(found)
}

/// Those of the guest's processors.
fn vcpus(lab: &Lab, uid: &str) -> anyhow::Result<Vec<BTreeSet<u32>>> {
    let threads = threads(lab, uid)?;
    let guest = threads.into_iter().filter(|(name, _)| name.starts_with("CPU "));
    Ok(guest.map(|(_, cpus)| cpus).collect())
}

/// The only processor of a VM with one of its own, as its host was told.
async fn own(lab: &Lab, name: &str) -> anyhow::Result<u32> {
    let shown = words::json(lab, &["vm", "show", name]).await?;
    let cpus = shown
        .pointer("/status/numa/0/cpus")
        .and_then(|cpus| cpus.as_array());
    let [cpu] = cpus.map_or(&[][..], Vec::as_slice) else {
        anyhow::bail!("not one processor: {shown}")
    };
    Ok(u32::try_from(cpu.as_u64().context("a number")?)?)
}

/// The VM's guest runs on its own processor, and nothing else of the host's VMs may.
async fn alone(lab: &Lab, name: &str, others: &[&str]) -> anyhow::Result<()> {
    let cpu = own(lab, name).await?;
    let vm = words::vm(lab, name).await?;
    ensure!(
        vcpus(lab, &vm.uid)? == [BTreeSet::from([cpu])],
        "{:?}",
        threads(lab, &vm.uid)?
    );
    let told = lab.virsh(vm.host_number()?, &["vcpupin", name]).await?;
    ensure!(
        told.split_whitespace().last() == Some(&*cpu.to_string()),
        "{told}"
    );
    let emulator = lab.virsh(vm.host_number()?, &["emulatorpin", name]).await?;
    let emulator = list(emulator.split_whitespace().last().unwrap_or_default());
    ensure!(!emulator.is_empty() && !emulator.contains(&cpu), "{emulator:?}");
    for other in others {
        let vm = words::vm(lab, other).await?;
        let mut seen = Vec::new();
        wait_for("others to keep off", LIMIT, async || {
            seen = threads(lab, &vm.uid).unwrap_or_default();
            !seen.is_empty() && seen.iter().all(|(_, cpus)| !cpus.contains(&cpu))
        })
        .await
        .with_context(|| format!("{other} may run on {cpu}: {seen:?}"))?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs root and the lab's packages: make test"]
async fn a_processor_of_a_vms_own_is_nobody_elses_whoever_dies_and_wherever_it_goes() -> anyhow::Result<()> {
    with_lab(&e2e::hosts(2), async |lab| {
        let on = ["--host", "h1"];
        let dedicated = ["--host", "h1", "--cpu-policy", "dedicated"];
        dalgu(lab, &create("before", SHARED, &on)).await?;
        dalgu(lab, &create("own", SHARED, &dedicated)).await?;
        dalgu(lab, &create("after", LOCAL, &on)).await?;
        alone(lab, "own", &["before", "after"]).await?;
        let tune = lab.virsh(1, &["numatune", "own"]).await?;
        ensure!(tune.contains("preferred") && tune.contains("nodeset"), "{tune}");

        // Each host has two processors here, or more: the last stays with the host.
        let host = words::json(lab, &["host", "show", "h1"]).await?;
        let left = number_at(&host, "/inventory/cpus") - 1;
        let many = left.to_string();
        let much = ["--host", "h1", "--cpu-policy", "dedicated", "--vcpus", &many];
        let refused = try_dalgu(lab, &create("more", LOCAL, &much)).await?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("processors of its own"),
            "{}",
            refused.stderr
        );
        let explained = dalgu(
            lab,
            &[
                "explain",
                "--memory",
                "96MiB",
                "--disk",
                LOCAL,
                "--cpu-policy",
                "dedicated",
                "--vcpus",
                &many,
                "--host",
                "h1",
            ],
        )
        .await;
        let explained = explained.unwrap_or_else(|error| error.to_string());
        ensure!(explained.contains("CPU"), "{explained}");
        let huge = ["--host", "h1", "--huge-pages", "1GiB", "--memory", "1GiB"];
        let refused = try_dalgu(lab, &create("huge", LOCAL, &huge)).await?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("huge pages of 1 GiB"),
            "{}",
            refused.stderr
        );

        // The agent knows from its ledger whose processors are whose.
        lab.signal(Daemon::Agent(1), Signal::SIGKILL).await?;
        lab.start(Daemon::Agent(1)).await?;
        dalgu(lab, &create("later", LOCAL, &on)).await?;
        alone(lab, "own", &["before", "after", "later"]).await?;

        // Where it comes to, those that were there make room; where it was, they get the processor back. What moves the other way is bound to
        // nothing of where it was.
        dalgu(lab, &create("there", LOCAL, &["--host", "h2"])).await?;
        dalgu(lab, &["vm", "migrate", "own", "--host", "h2"]).await?;
        alone(lab, "own", &["there"]).await?;
        let all = list(&fs::read_to_string("/sys/devices/system/cpu/online")?);
        for name in ["before", "later"] {
            let vm = words::vm(lab, name).await?;
            wait_for("the processor to be everybody's again", LIMIT, async || {
                vcpus(lab, &vm.uid).is_ok_and(|vcpus| vcpus.iter().all(|cpus| *cpus == all))
            })
            .await
            .with_context(|| name.to_owned())?;
        }
        dalgu(lab, &["vm", "migrate", "before", "--host", "h2"]).await?;
        alone(lab, "own", &["there", "before"]).await?;
        dalgu(lab, &["vm", "migrate", "before", "--host", "h1"]).await?;
        let vm = words::vm(lab, "before").await?;
        ensure!(
            vcpus(lab, &vm.uid)? == [all.clone()],
            "{:?}",
            threads(lab, &vm.uid)?
        );

        dalgu(lab, &["vm", "delete", "own", "--force"]).await?;
        let host = words::json(lab, &["host", "show", "h2"]).await?;
        ensure!(
            host.pointer("/allocation/dedicatedCpus")
                .is_none_or(|cpus| cpus == &serde_json::json!([])),
            "{host}"
        );
        for name in ["before", "after", "later", "there"] {
            dalgu(lab, &["vm", "delete", name, "--force"]).await?;
        }
        at_rest(lab, &[], REST_LIMIT).await
    })
    .await
}
