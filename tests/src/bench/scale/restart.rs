//! The controller is killed and started again: how soon it answers, answers right, and places VMs.

use anyhow::{Context as _, ensure};
use dalgu_proto::v1;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::{LOOK, Site, look, seconds, vm};
use crate::bench::report::{Measure, Report};
use crate::operator::Operator;

/// Times of all restarts in seconds, each from the start of the program.
#[derive(Debug, Default)]
struct Times {
    serving: Vec<f64>,
    right: Vec<f64>,
    known: Vec<f64>,
    placed: Vec<f64>,
    done: Vec<f64>,
    ready: Vec<f64>,
    run: Vec<f64>,
    memory: Vec<f64>,
}

/// Kills and starts the controller so many times.
pub(super) async fn measure(site: &mut Site<'_>, report: &mut Report) -> anyhow::Result<()> {
    let mut times = Times::default();
    for round in 0..site.settings.restarts {
        println!("kill {}", round + 1);
        one_restart(site, round, &mut times).await?;
    }
    let mut add = |name: &str, unit, samples: &[f64]| report.add(Measure::of(name, unit, samples));
    add("restart: it says that it serves after", "s", &times.serving);
    add(
        "restart: all VMs listed with their owners after",
        "s",
        &times.right,
    );
    add("restart: VMs of known state in that list", "", &times.known);
    add("restart: a new VM placed after", "s", &times.placed);
    add(
        "restart: the new VM's operation succeeded after",
        "s",
        &times.done,
    );
    add("restart: all hosts ready after", "s", &times.ready);
    add("restart: state of every VM known after", "s", &times.run);
    add("restart: controller's memory then", "MiB", &times.memory);
    Ok(())
}

async fn one_restart(site: &mut Site<'_>, round: usize, times: &mut Times) -> anyhow::Result<()> {
    let before = site.agents.beats.tally();
    site.controller.kill().await?;
    let (began, start) = (Instant::now(), Timestamp::now());
    site.controller.start()?;
    site.operator = site.controller.serving().await?;
    times.serving.push(seconds(began));

    let placing = tokio::spawn(place(site.operator.clone(), format!("again-{round}"), began));
    let vms = look::all_vms(&site.operator).await?;
    let right = seconds(began);
    let hosts = look::all_hosts(&site.operator).await?;
    let mut old = vms.clone();
    old.retain(|uid, _| site.vms.contains_key(uid));
    look::same(&site.vms, &old).context("after the restart")?;
    let known = look::fresh(&old, &hosts, start).context("after the restart")?;
    times.right.push(right);
    times.known.push(super::count(u64::try_from(known)?));

    site.until_all_ready().await?;
    times.ready.push(seconds(began));
    let (placed, done, new) = placing.await??;
    times.placed.push(placed);
    times.done.push(done);
    site.vms = {
        let all = site.until_all_run(site.vms.len() + 1).await?;
        times.run.push(seconds(began));
        let mut old = all.clone();
        ensure!(old.remove(&new).is_some(), "the new VM is not listed");
        look::same(&site.vms, &old).context("with all states known")?;
        all
    };
    times.memory.push(site.controller.memory_mib()?);
    let tally = site.agents.beats.tally().since(before);
    println!(
        "  {} registrations; calls refused {}, not answered {}",
        tally.registered, tally.refused, tally.broken
    );
    ensure!(
        tally.refused == 0,
        "{} calls of agents were refused after the restart",
        tally.refused
    );
    ensure!(
        site.agents.domains() == site.vms.len(),
        "hypervisors have {} domains, {} VMs were made",
        site.agents.domains(),
        site.vms.len()
    );
    Ok(())
}

/// Has a VM made as soon as the controller takes it: when that was, when it ran, and its id.
async fn place(operator: Operator, name: String, began: Instant) -> anyhow::Result<(f64, f64, String)> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let operation = loop {
        let request = v1::CreateVmRequest {
            vm: Some(vm(&name)),
            request_id: request_id.clone(),
            ..v1::CreateVmRequest::default()
        };
        match operator.vms().create_vm(request).await {
            Ok(operation) => break operation.into_inner(),
            // No host has reported yet.
            Err(status) if status.code() == tonic::Code::Unavailable => sleep(LOOK).await,
            Err(status) => return Err(status).context("create a VM after the restart"),
        }
    };
    let placed = seconds(began);
    let ended = operator.finish(operation).await?;
    Ok((placed, seconds(began), ended.vm_uid))
}
