//! Times one VM after another through its life, Dalgu and `virsh` in turns on the same host.

use std::time::Duration;

use anyhow::Context as _;
use dalgu_proto::v1;
use tokio::time::Instant;

use super::baseline::Template;
use super::report::{Aim, Bound, Measure, Report};
use super::{HOST, HOST_NAME, Settings, milliseconds};
use crate::e2e::network::site::Site;
use crate::lab::Lab;
use crate::operator::{Operator, small_vm};
use crate::serial::{Log, greetings, wait_until_ready};

/// What is to be reached on a machine that does nothing else.
pub const AIMS: [Aim; 1] = [(
    "live migration in an overlay: difference of the two",
    Bound::Most,
    20.0,
)];

/// Samples in milliseconds, one list a step.
#[derive(Debug, Default)]
struct Times {
    create: Vec<f64>,
    first_line: Vec<f64>,
    shutdown: Vec<f64>,
    start: Vec<f64>,
    kill: Vec<f64>,
    delete: Vec<f64>,
}

/// Measures the life of single VMs.
///
/// # Errors
/// If any step fails.
pub async fn measure(
    lab: &Lab,
    operator: &Operator,
    settings: &Settings,
    report: &mut Report,
) -> anyhow::Result<()> {
    let template = template(lab, operator).await?;
    let (mut dalgu, mut virsh) = (Times::default(), Times::default());
    for round in 0..settings.rounds {
        // Neither always goes first.
        if round % 2 == 0 {
            through_dalgu(lab, operator, &template, round, &mut dalgu).await?;
            through_virsh(lab, &template, round, &mut virsh).await?;
        } else {
            through_virsh(lab, &template, round, &mut virsh).await?;
            through_dalgu(lab, operator, &template, round, &mut dalgu).await?;
        }
    }
    let beside = |name: &str, ours: &[f64], theirs: &[f64]| {
        Measure::of(name, "ms", ours).map(|measure| measure.over(theirs))
    };
    report.add(beside(
        "disk, define and start: call to running",
        &dalgu.create,
        &virsh.create,
    ));
    report.add(beside(
        "call to the guest's first line",
        &dalgu.first_line,
        &virsh.first_line,
    ));
    report.add(beside("start of a stopped VM", &dalgu.start, &virsh.start));
    report.add(beside("power off", &dalgu.kill, &virsh.kill));
    report.add(Measure::of("shutdown by the guest", "ms", &dalgu.shutdown));
    report.add(beside(
        "delete of a running VM, with its disk",
        &dalgu.delete,
        &virsh.delete,
    ));
    Ok(())
}

/// A VM of Dalgu's that never runs, for its domain's XML.
async fn template(lab: &Lab, operator: &Operator) -> anyhow::Result<Template> {
    let request = v1::CreateVmRequest {
        vm: Some(small_vm("template", "local")),
        stopped: true,
        host: HOST_NAME.to_owned(),
        ..v1::CreateVmRequest::default()
    };
    let created = operator
        .vms()
        .create_vm(request)
        .await
        .context("create the template")?;
    let vm = operator.finish(created.into_inner()).await?;
    let template = Template::of(lab, &vm.vm_uid).await?;
    let request = v1::DeleteVmRequest {
        name: "template".to_owned(),
        ..v1::DeleteVmRequest::default()
    };
    operator
        .finish(operator.vms().delete_vm(request).await?.into_inner())
        .await?;
    Ok(template)
}

async fn through_dalgu(
    lab: &Lab,
    operator: &Operator,
    template: &Template,
    round: usize,
    times: &mut Times,
) -> anyhow::Result<()> {
    let name = format!("bench-{round}");
    let began = Instant::now();
    let request = v1::CreateVmRequest {
        vm: Some(small_vm(&name, "local")),
        host: HOST_NAME.to_owned(),
        ..v1::CreateVmRequest::default()
    };
    let created = operator
        .finish(operator.vms().create_vm(request).await?.into_inner())
        .await?;
    times.create.push(milliseconds(began));
    let log = template.log_of(lab, HOST, &created.vm_uid)?;
    wait_until_ready(&log, 0).await?;
    times.first_line.push(milliseconds(began));
    // The guest's listener for the power button may need a moment more.
    Log::open(&log)?.wait_for_ticks(10).await?;

    let began = Instant::now();
    let stop = v1::StopVmRequest {
        name: name.clone(),
        ..v1::StopVmRequest::default()
    };
    operator
        .finish(operator.vms().stop_vm(stop.clone()).await?.into_inner())
        .await?;
    times.shutdown.push(milliseconds(began));

    let began = Instant::now();
    let start = v1::StartVmRequest {
        name: name.clone(),
        ..v1::StartVmRequest::default()
    };
    operator
        .finish(operator.vms().start_vm(start.clone()).await?.into_inner())
        .await?;
    times.start.push(milliseconds(began));
    wait_until_ready(&log, 1).await?;

    let began = Instant::now();
    let kill = v1::StopVmRequest { force: true, ..stop };
    operator
        .finish(operator.vms().stop_vm(kill).await?.into_inner())
        .await?;
    times.kill.push(milliseconds(began));
    operator
        .finish(operator.vms().start_vm(start).await?.into_inner())
        .await?;
    wait_until_ready(&log, 2).await?;

    let began = Instant::now();
    let delete = v1::DeleteVmRequest {
        name,
        force: true,
        ..v1::DeleteVmRequest::default()
    };
    operator
        .finish(operator.vms().delete_vm(delete).await?.into_inner())
        .await?;
    times.delete.push(milliseconds(began));
    Ok(())
}

async fn through_virsh(
    lab: &Lab,
    template: &Template,
    round: usize,
    times: &mut Times,
) -> anyhow::Result<()> {
    let domain = template.domain(lab, HOST, &format!("bench-virsh-{round}"))?;
    let log = &domain.log;
    let began = Instant::now();
    let disk = format!("qemu-img create -q -f qcow2 '{}' 8M", domain.disk);
    domain.create(lab, &disk).await?;
    times.create.push(milliseconds(began));
    wait_until_ready(log, 0).await?;
    times.first_line.push(milliseconds(began));

    let began = Instant::now();
    domain.destroy(lab).await?;
    times.kill.push(milliseconds(began));

    let before = greetings(log);
    let began = Instant::now();
    domain.start(lab).await?;
    times.start.push(milliseconds(began));
    wait_until_ready(log, before).await?;

    let began = Instant::now();
    domain.remove(lab).await?;
    times.delete.push(milliseconds(began));
    Ok(())
}

/// Moves a VM between the first two hosts and back.
///
/// # Errors
/// If a migration fails.
pub async fn migrations(
    lab: &Lab,
    operator: &Operator,
    settings: &Settings,
    pool: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    let name = format!("mover-{pool}");
    let request = v1::CreateVmRequest {
        vm: Some(small_vm(&name, pool)),
        host: HOST_NAME.to_owned(),
        ..v1::CreateVmRequest::default()
    };
    operator
        .finish(operator.vms().create_vm(request).await?.into_inner())
        .await?;
    let uuid = operator.vm(&name).await?.uid;
    Log::of(lab, HOST, &uuid).await?.wait_for_ticks(10).await?;
    let (mut wall, mut downtime) = (Vec::new(), Vec::new());
    for round in 0..settings.rounds {
        let to = if round % 2 == 0 { HOST + 1 } else { HOST };
        let began = Instant::now();
        let request = v1::MigrateVmRequest {
            name: name.clone(),
            destination_host: format!("h{to}"),
            ..v1::MigrateVmRequest::default()
        };
        let ended = operator
            .finish(operator.vms().migrate_vm(request).await?.into_inner())
            .await?;
        wall.push(milliseconds(began));
        let stopped = ended.migration.context("a migration has figures")?.downtime_ms;
        downtime.push(f64::from(u32::try_from(stopped).unwrap_or(u32::MAX)));
    }
    let request = v1::DeleteVmRequest {
        name,
        force: true,
        ..v1::DeleteVmRequest::default()
    };
    operator
        .finish(operator.vms().delete_vm(request).await?.into_inner())
        .await?;
    let disks = if pool == "shared" {
        "shared disk"
    } else {
        "disk copied along"
    };
    report.add(Measure::of(
        format!("live migration, {disks}: call to done"),
        "ms",
        &wall,
    ));
    report.add(Measure::of(
        format!("live migration, {disks}: guest stopped (QEMU's figure)"),
        "ms",
        &downtime,
    ));
    Ok(())
}

/// Moves a VM of an overlay between the first two hosts and back while a machine beside them asks it by UDP every 5 ms: for how long it
/// could not be reached, and what its operation says of that.
///
/// # Errors
/// If a migration fails, or says nothing of it.
pub async fn blackouts(
    lab: &Lab,
    operator: &Operator,
    settings: &Settings,
    report: &mut Report,
) -> anyhow::Result<()> {
    let site = Site::new(lab).await?;
    site.keep_on(HOST_NAME).await?;
    site.create("web", 11, HOST_NAME, &["web"], "").await?;
    site.says("web", "address is 10.20.0.11").await?;
    site.join(HOST).await?;
    let probe = site.probe();
    probe.hears("10.20.0.11:0").await?;
    let (mut seen, mut reported, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..settings.rounds {
        let to = if round % 2 == 0 { HOST + 1 } else { HOST };
        let watch = probe.watch([10, 20, 0, 11].into()).await?;
        let request = v1::MigrateVmRequest {
            name: "web".to_owned(),
            destination_host: format!("h{to}"),
            ..v1::MigrateVmRequest::default()
        };
        let moved = operator.vms().migrate_vm(request).await?.into_inner();
        let ended = operator.finish(moved).await?;
        let told = ended.migration.and_then(|migration| migration.network_blackout);
        let told = Duration::try_from(told.context("no blackout is reported")?)?;
        let blackout = watch.end(200).await?.blackout;
        let [blackout, told] = [blackout, told].map(|time| time.as_secs_f64() * 1000.0);
        println!("seen {blackout:.0} ms, reported {told:.0} ms");
        seen.push(blackout);
        reported.push(told);
        differences.push((blackout - told).abs());
    }
    for (what, samples) in [
        ("longest time without an answer to UDP every 5 ms", &seen),
        ("unreachable, as reported", &reported),
        ("difference of the two", &differences),
    ] {
        let name = format!("live migration in an overlay: {what}");
        report.add(Measure::of(name, "ms", samples));
    }
    for name in ["desk", "web"] {
        let request = v1::DeleteVmRequest {
            name: name.to_owned(),
            force: true,
            ..v1::DeleteVmRequest::default()
        };
        operator
            .finish(operator.vms().delete_vm(request).await?.into_inner())
            .await?;
    }
    Ok(())
}
