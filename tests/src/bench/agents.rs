//! What an agent and the controller take of their machines, with one VM and with many.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::report::{Measure, Report};
use super::{HOST, HOST_NAME, Settings, milliseconds, process};
use crate::lab::{Lab, run};
use crate::operator::{Operator, small_vm};

/// Resident memory of one guest under emulation, with room to spare, in KiB.
const GUEST_KIB: u64 = 230 * 1024;
/// Left to everything else on the machine, in KiB.
const SPARE_KIB: u64 = 2 * 1024 * 1024;
/// Creations under way at the same time: more guests that boot under emulation keep even libvirt from answering.
const AT_ONCE: usize = 3;
/// How long a host that is too busy to take a VM is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time after the last start until figures are taken.
const SETTLE: Duration = Duration::from_secs(10);

/// Measures agent and controller with one VM and with as many as fit, at most `settings.vms`.
///
/// # Errors
/// If a VM cannot be created, or a daemon does not run.
pub async fn measure(
    lab: &Lab,
    operator: &Operator,
    settings: &Settings,
    report: &mut Report,
) -> anyhow::Result<()> {
    open_host(operator).await?;
    take(lab, settings, 0, report).await?;
    create(operator, 0..1).await?;
    take(lab, settings, 1, report).await?;
    let many = settings.vms.min(usize::try_from(
        process::available_kib()?.saturating_sub(SPARE_KIB) / GUEST_KIB,
    )?);
    if many < settings.vms {
        println!("(memory for {many} VMs only)");
    }
    if many < 2 {
        return Ok(());
    }
    let began = Instant::now();
    create(operator, 1..many).await?;
    report.add(Measure::of(
        format!("{} VMs at once: first call to all running", many - 1),
        "ms",
        &[milliseconds(began)],
    ));
    take(lab, settings, many, report).await
}

/// Lets a host promise more processors than it has: the guests here are idle.
pub(super) async fn open_host(operator: &Operator) -> anyhow::Result<()> {
    let host = operator
        .all_hosts()
        .await?
        .remove(HOST_NAME)
        .context("the host is known")?;
    let request = v1::UpdateHostRequest {
        host: Some(v1::Host {
            name: host.name,
            etag: host.etag,
            cpu_overcommit_ratio: 64.0,
            ..v1::Host::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["cpu_overcommit_ratio".to_owned()],
        }),
        ..v1::UpdateHostRequest::default()
    };
    operator
        .hosts()
        .update_host(request)
        .await
        .context("raise the over-commit ratio")
        .map(drop)
}

async fn create(operator: &Operator, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
    let one = async |number: usize| {
        let request = v1::CreateVmRequest {
            vm: Some(small_vm(&format!("idle-{number}"), "local")),
            host: HOST_NAME.to_owned(),
            ..v1::CreateVmRequest::default()
        };
        let begun = Instant::now();
        let accepted = loop {
            match operator.vms().create_vm(request.clone()).await {
                Err(refused) if refused.code() == Code::ResourceExhausted && begun.elapsed() < PATIENCE => {
                    sleep(Duration::from_secs(1)).await;
                }
                answer => break answer?.into_inner(),
            }
        };
        operator.finish(accepted).await.map(drop)
    };
    stream::iter(numbers)
        .map(one)
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

async fn take(lab: &Lab, settings: &Settings, vms: usize, report: &mut Report) -> anyhow::Result<()> {
    sleep(SETTLE).await;
    let layout = lab.layout();
    let agent = layout.host(HOST).agent();
    let daemons = [("agent", agent.as_str()), ("controller", "controller")];
    let busy = |process: &str| process::cpu_seconds(pid(lab, process)?);
    let before = daemons.map(|(_, process)| busy(process));
    let began = Instant::now();
    sleep(settings.window).await;
    let seconds = began.elapsed().as_secs_f64();
    for ((who, process), before) in daemons.into_iter().zip(before) {
        let busy = (busy(process)? - before?) / seconds * 100.0;
        report.add(Measure::of(
            format!("{who} with {vms} VMs: CPU"),
            "% of one core",
            &[busy],
        ));
        for (what, label) in [
            ("resident memory", "VmRSS:"),
            ("of it not from files", "RssAnon:"),
        ] {
            let mib = process::mib(pid(lab, process)?, label)?;
            report.add(Measure::of(
                format!("{who} with {vms} VMs: {what}"),
                "MiB",
                &[mib],
            ));
        }
    }
    let bytes = report_bytes(lab).await?;
    report.add(Measure::of(
        format!("report of an agent with {vms} VMs"),
        "bytes",
        &[bytes],
    ));
    Ok(())
}

/// The process of a daemon.
fn pid(lab: &Lab, process: &str) -> anyhow::Result<u32> {
    let pid = fs::read_to_string(lab.layout().pid_file(process));
    Ok(pid
        .with_context(|| format!("{process} does not run"))?
        .trim()
        .parse()?)
}

/// Size of the last report on the wire, by the agent's own metric.
async fn report_bytes(lab: &Lab) -> anyhow::Result<f64> {
    let operator = lab.layout().operator();
    let file = |name: &str| operator.join(name).to_string_lossy().into_owned();
    let url = format!("https://{}/metrics", lab.layout().host(HOST).agent_address());
    let words = [
        "-sS",
        "--fail",
        "--cacert",
        &file("ca.pem"),
        "--cert",
        &file("admin.pem"),
        "--key",
        &file("admin.key"),
        &url,
    ]
    .map(str::to_owned);
    let page = run("curl", words).await?;
    let value = page.lines().find_map(|line| {
        line.strip_prefix("dalgu_agent_report_bytes ")?
            .trim()
            .parse()
            .ok()
    });
    let value: f64 = value.context("the agent's page has no dalgu_agent_report_bytes")?;
    ensure!(value > 0.0, "a report of {value} bytes");
    Ok(value)
}
