//! The benchmark of VMs' lives: Dalgu against `virsh` on the same host in the same run, and what the daemons themselves
//! take. Called by the program `bench-lifecycle`; times are taken at the gRPC API, so that no program's start counts.
//! [`provision`] is the benchmark of VMs made from images, [`scale`] that of the controller with thousands of hosts,
//! [`placement`] that of placement by itself, [`planner`] that of plans.

mod agents;
mod baseline;
pub mod lifecycle;
pub mod placement;
pub mod planner;
pub mod process;
pub mod provision;
pub mod report;
pub mod scale;

use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::Instant;

use crate::lab::{self, Lab, Options, layout::Layout};
use crate::operator::Operator;
use crate::signals;
use report::Report;

/// The host that everything is measured on.
const HOST: u8 = 1;
/// Its name in Dalgu.
const HOST_NAME: &str = "h1";

/// How much to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Samples of each time.
    pub rounds: usize,
    /// VMs on one host for the daemons' own figures; fewer where memory is short.
    pub vms: usize,
    /// How long the daemons' processor time is watched.
    pub window: Duration,
}

/// Measures on a lab of its own: whatever comes of it, also after Ctrl-C, the lab is taken down, and what was measured is
/// shown. A whole run is written to `target/bench/<name>.json`, and returned.
///
/// # Errors
/// If the lab is up already, or what is measured fails.
pub async fn on_own_lab(
    id: u8,
    name: &str,
    work: impl AsyncFnOnce(Layout, &mut Report) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let layout = Layout::new(id)?;
    if Lab::current(layout.clone()).is_ok() {
        bail!("lab {id} is up already: `lab --id {id} down` removes it");
    }
    let mut report = Report::default();
    // Cancel safe: whatever was begun, the lab is taken down below.
    let outcome = tokio::select! {
        outcome = work(layout.clone(), &mut report) => outcome,
        error = signals::stop() => Err(error),
    };
    if outcome.is_err()
        && let Some(logs) = lab::keep_logs(&layout)
    {
        eprintln!("the lab's logs are in {}", logs.display());
    }
    let file = layout
        .tools_dir()
        .with_file_name("bench")
        .join(format!("{name}.json"));
    lab::down(layout).await.context("take the lab down")?;
    println!("\n{report}");
    // A file says that the run was whole.
    outcome?;
    report.write(&file)?;
    println!("written to {}", file.display());
    Ok(report)
}

/// Brings a lab of two hosts up and measures; what was measured before a failure is in the report too. The lab is left
/// up: the caller takes it down.
///
/// # Errors
/// If anything that is measured fails.
pub async fn run(layout: Layout, settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let options = Options {
        hosts: 2,
        ..Options::default()
    };
    println!("bringing up two hosts");
    let lab = Lab::up(layout, &options).await?;
    let operator = Operator::connect(&lab).await?;
    println!(
        "{} lives through Dalgu, as many through virsh, in turns",
        settings.rounds
    );
    lifecycle::measure(&lab, &operator, settings, report)
        .await
        .context("lives of single VMs")?;
    for pool in ["shared", "local"] {
        println!("{} live migrations, pool {pool}", settings.rounds);
        lifecycle::migrations(&lab, &operator, settings, pool, report)
            .await
            .context("live migrations")?;
    }
    println!("{} live migrations in an overlay, watched", settings.rounds);
    lifecycle::blackouts(&lab, &operator, settings, report)
        .await
        .context("live migrations in an overlay")?;
    println!("the daemons with 0, 1 and up to {} VMs", settings.vms);
    agents::measure(&lab, &operator, settings, report)
        .await
        .context("the daemons' own figures")?;
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
