//! Rated load, ten times as much, and rest: what is refused and how, what the controller takes meanwhile, whether agents'
//! heartbeats are taken and another operator is answered, and that nothing is lost.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::load::{Ended, drive, patiently, percentile};
use super::{Site, count, look, one};
use crate::bench::report::Report;
use crate::operator::Operator;

/// Most memory that ten times the rated load may add to what the rated load takes, in MiB: calls under way with the largest
/// answers, and the buffers of their connections.
const MEMORY_MIB: f64 = 256.0;
/// Time between two reads of the other operator, and between two looks at the controller's memory.
const OFTEN: Duration = Duration::from_millis(200);
/// Longest time in which the other operator must be answered; what it takes is a figure.
const PATIENCE: Duration = Duration::from_secs(30);

/// What happened beside a load.
#[derive(Debug, Default)]
struct Beside {
    read_ms: Vec<f64>,
    refused: u64,
    unanswered: u64,
    /// How the last of them ended.
    failure: Option<String>,
    peak_mib: f64,
}

/// Loads the site.
pub(super) async fn measure(site: &mut Site<'_>, report: &mut Report) -> anyhow::Result<()> {
    calm(site).await?;
    let rated = site.settings.rated;
    println!("rated load: {rated} requests a second");
    let normal = under(site, rated, "rated load", report).await?;
    println!("ten times as much");
    let high = under(site, rated * 10, "10 x rated load", report).await?;
    let grown = high.1.peak_mib - normal.1.peak_mib;
    report.add(one(
        "10 x rated load: memory above that of the rated load",
        "MiB",
        grown,
    ));
    ensure!(!high.0.refused_ms.is_empty(), "nothing was refused");
    ensure!(
        grown <= MEMORY_MIB,
        "the controller took {grown:.0} MiB more than under the rated load"
    );
    ensure!(
        normal.0.refused_ms.is_empty(),
        "{} requests of the rated load were refused",
        normal.0.refused_ms.len()
    );
    for (ended, beside) in [&normal, &high] {
        ensure!(
            ended.failed == 0,
            "{} requests failed: {:?}",
            ended.failed,
            ended.failure
        );
        ensure!(
            ended.without_delay == 0,
            "{} refusals bore no delay",
            ended.without_delay
        );
        ensure!(
            beside.unanswered == 0,
            "another operator was not answered {} times: {:?}",
            beside.unanswered,
            beside.failure
        );
    }
    rest(site).await
}

/// Waits until reports come in time again: what a restart leaves to be done is not the load's doing.
async fn calm(site: &Site<'_>) -> anyhow::Result<()> {
    let beats = &site.agents.beats;
    super::until("every host reports in time", async || {
        beats.begin();
        sleep(site.settings.report_interval * 3).await;
        let (missed, longest) = beats.missed();
        ensure!(
            missed == 0,
            "{missed} heartbeats missed, one host silent for {longest:?}"
        );
        Ok(())
    })
    .await
}

async fn under(
    site: &Site<'_>,
    per_second: u32,
    name: &str,
    report: &mut Report,
) -> anyhow::Result<(Ended, Beside)> {
    let callers = (0..site.settings.connections)
        .map(|number| site.controller.identity(&format!("load-{}", number % 4)))
        .collect::<anyhow::Result<_>>()?;
    let other = site.controller.operator_named("other").await?;
    let targets = site.targets();
    let beats = &site.agents.beats;
    let before = beats.tally();
    beats.begin();
    let (began, cpu, others) = (Instant::now(), site.controller.cpu_seconds()?, site.others()?);
    let over = CancellationToken::new();
    let (ended, beside) = tokio::join!(
        async {
            let (address, time) = (site.controller.address, site.settings.load);
            let ended = drive(address, callers, targets.clone(), per_second, time).await;
            over.cancel();
            ended
        },
        beside(site, &other, &targets.vms, &over)
    );
    let (ended, beside) = (ended?, beside?);
    let passed = began.elapsed().as_secs_f64();
    let (missed, longest) = beats.missed();
    let tally = beats.tally().since(before);
    tell(name, per_second, &ended, &beside, report);
    let cpu = (site.controller.cpu_seconds()? - cpu) / passed * 100.0;
    let others = (site.others()? - others) / passed * 100.0;
    let mut add = |what: &str, unit, value| report.add(one(format!("{name}: {what}"), unit, value));
    add("controller's CPU", "% of one core", cpu);
    add("CPU of other programs on the machine", "% of one core", others);
    add(
        "longest time between two reports of a host",
        "s",
        longest.as_secs_f64(),
    );
    add("heartbeats missed", "", count(missed));
    add(
        "reports refused or not answered",
        "",
        count(tally.refused + tally.broken),
    );
    add("hosts that had to register again", "", count(tally.registered));
    // Late reports are figures: how late they are is the machine's doing too.
    ensure!(tally.refused == 0, "agents were refused {} times", tally.refused);
    Ok((ended, beside))
}

fn tell(name: &str, per_second: u32, ended: &Ended, beside: &Beside, report: &mut Report) {
    let mut add = |what: &str, unit, value: Option<f64>| {
        report.add(value.and_then(|value| one(format!("{name}: {what}"), unit, value)));
    };
    let rate = |number: usize| Some(ended.per_second(number));
    add("asked for", "per s", Some(f64::from(per_second)));
    add("sent", "per s", rate(ended.sent()));
    add("not sent, too many waited", "", Some(count(ended.unsent)));
    add("answered", "per s", rate(ended.answered_ms.len()));
    add("answered, median", "ms", percentile(&ended.answered_ms, 50));
    add("answered, p99", "ms", percentile(&ended.answered_ms, 99));
    add("refused with a delay", "per s", rate(ended.refused_ms.len()));
    add("refused, p99", "ms", percentile(&ended.refused_ms, 99));
    add(
        "another operator's read, p99",
        "ms",
        percentile(&beside.read_ms, 99),
    );
    add(
        "another operator's reads, refused before",
        "",
        Some(count(beside.refused)),
    );
    add("controller's memory, highest", "MiB", Some(beside.peak_mib));
}

/// Another operator reads, and the controller's memory is watched, until the load is over.
async fn beside(
    site: &Site<'_>,
    other: &Operator,
    vms: &Arc<Vec<String>>,
    over: &CancellationToken,
) -> anyhow::Result<Beside> {
    let mut found = Beside::default();
    for name in vms.iter().cycle() {
        let request = v1::GetVmRequest { name: name.clone() };
        let began = Instant::now();
        let mut calls = 0;
        // Where all places are taken it comes again.
        let read = patiently(async || {
            calls += 1;
            other.vms().get_vm(request.clone()).await
        });
        match timeout(PATIENCE, read).await {
            Ok(Ok(_)) => found.read_ms.push(began.elapsed().as_secs_f64() * 1000.0),
            Ok(Err(status)) => {
                found.unanswered += 1;
                found.failure = Some(format!("{:?}: {}", status.code(), status.message()));
            }
            Err(_) => {
                found.unanswered += 1;
                found.failure = Some(format!("no answer in {PATIENCE:?}"));
            }
        }
        found.refused += calls - 1;
        found.peak_mib = found.peak_mib.max(site.controller.memory_mib()?);
        if over.is_cancelled() {
            break;
        }
        sleep(OFTEN).await;
    }
    Ok(found)
}

/// Afterwards all comes to rest, and nothing is lost.
async fn rest(site: &mut Site<'_>) -> anyhow::Result<()> {
    site.until_all_ready().await?;
    let now = site.until_all_run(site.vms.len()).await?;
    look::same(&site.vms, &now).context("after the load")?;
    let request = v1::ListOperationsRequest {
        active_only: true,
        ..v1::ListOperationsRequest::default()
    };
    super::until("no operation under way", async || {
        let page = site
            .operator
            .operations()
            .list_operations(request.clone())
            .await?;
        let open = page.into_inner().operations.len();
        ensure!(open == 0, "{open} operations have not ended");
        Ok(())
    })
    .await?;
    Ok(())
}
