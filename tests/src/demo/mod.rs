//! The demonstration: what an operator types on a site of three hosts, with the real output, and a check in code of
//! every claim. Called by the program `demo`.
//!
//! What is checked is asked of the gRPC API, of libvirt and of the guests' own serial lines, never read from the
//! text that is shown. It stops at the first claim that does not hold.

mod checks;
mod hosts;
mod stage;
mod vms;

use anyhow::Context as _;

use crate::lab::{self, Lab, Options, layout::Layout};
use crate::operator::Operator;
use stage::Stage;

/// What a step works with.
struct Scene<'a> {
    lab: &'a Lab,
    operator: Operator,
    stage: Stage,
}

/// Brings a lab up and shows everything on it. The lab is left up: the caller takes it down.
///
/// # Errors
/// If the lab does not come up, a command fails, or a claim does not hold.
pub async fn run(layout: Layout, options: &Options) -> anyhow::Result<()> {
    let mut stage = Stage::new();
    stage.heading(&format!(
        "A site of {} servers, each with its own libvirt, on this machine",
        options.hosts
    ));
    let lab = Lab::up(layout, options).await?;
    stage.enter(lab::exports(&lab));
    let operator = Operator::connect(&lab).await?;
    let mut scene = Scene {
        lab: &lab,
        operator,
        stage,
    };
    hosts::figures(&mut scene)
        .await
        .context("hosts and their figures")?;
    vms::create(&mut scene).await.context("creating VMs")?;
    vms::console(&mut scene).await.context("the console")?;
    vms::stop_and_start(&mut scene)
        .await
        .context("stopping and starting")?;
    vms::migrate(&mut scene).await.context("live migration")?;
    vms::refuse(&mut scene).await.context("a refused request")?;
    hosts::interfaces(&mut scene).await.context("metrics and gRPC")?;
    vms::delete(&mut scene).await.context("deleting VMs")?;
    scene.stage.summary();
    Ok(())
}
