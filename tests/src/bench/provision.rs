//! Times how soon a VM made from an image of the catalogue speaks: Dalgu beside the same done by hand with `qemu-img`, `nc`
//! and `virsh`, in turns on the same hosts; how much of that is the host's own work, by its agent's log; and many of them at once.
//! Called by the program `bench-provision`, which compares figures with [`AIMS`].

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1::{self, image_service_client::ImageServiceClient};
use futures::future::try_join_all;
use jiff::Timestamp;
use tokio::time::Instant;

use super::agents::open_host;
use super::baseline::Template;
use super::report::{Aim, Bound, Measure, Report};
use super::{HOST, HOST_NAME, milliseconds, process};
use crate::e2e::words::dalgu;
use crate::lab::{Lab, Options, layout::Layout, wait_for};
use crate::operator::{Operator, small_vm};
use crate::serial::{greetings, wait_until_ready};

/// The host that fetches the image from the other.
const OTHER: u8 = 2;
/// Its name in Dalgu.
const OTHER_NAME: &str = "h2";
/// Where hosts keep copies of images.
const STORE: &str = "/var/lib/dalgu/image-store";
/// Size of the image's disk.
const DISK_BYTES: usize = 256 << 20;
/// So much of it is data, which does not compress.
const DATA_BYTES: usize = 64 << 20;
/// The port through which the image goes by hand.
const PORT: u16 = 9_999;
/// Longest time that many guests take together to boot.
const TOGETHER_LIMIT: Duration = Duration::from_mins(10);

/// What is to be reached on two processors that nothing else takes: the second VM of an image that its host has.
pub const AIMS: [Aim; 1] = [("overlay: host work from order to running", Bound::Most, 1000.0)];

/// How much to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Samples of each time.
    pub rounds: usize,
    /// VMs at once.
    pub vms: usize,
}

/// How the disk comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// An overlay, beside the image.
    Overlay,
    /// A copy, beside the image.
    Full,
    /// An overlay on a host that must fetch the image first.
    Fetched,
}

impl Way {
    const ALL: [Self; 3] = [Self::Overlay, Self::Full, Self::Fetched];

    const fn name(self) -> &'static str {
        match self {
            Self::Overlay => "overlay",
            Self::Full => "full clone",
            Self::Fetched => "fetched from a peer, then overlay",
        }
    }

    const fn host(self) -> (u8, &'static str) {
        match self {
            Self::Overlay | Self::Full => (HOST, HOST_NAME),
            Self::Fetched => (OTHER, OTHER_NAME),
        }
    }
}

/// Brings a lab of two hosts up and measures. The lab is left up: the caller takes it down.
///
/// # Errors
/// If anything that is measured fails.
pub async fn run(layout: Layout, settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    println!("bringing up two hosts");
    let options = Options {
        hosts: 2,
        ..Options::default()
    };
    let lab = Lab::up(layout, &options).await?;
    let operator = Operator::connect(&lab).await?;
    // Both are to come to the first host.
    dalgu(&lab, &["host", "cordon", OTHER_NAME]).await?;
    println!("one image and {} others are imported", settings.rounds);
    let mut imports = Vec::new();
    let mut digests = Vec::new();
    // Each that is fetched is another, since no host forgets one while it has room.
    for number in 0..=settings.rounds {
        let began = Instant::now();
        digests.push(import(&lab, &operator, number).await?);
        imports.push(milliseconds(began));
    }
    dalgu(&lab, &["host", "uncordon", OTHER_NAME]).await?;
    let name = format!(
        "import of {} MiB, {} MiB of it data: upload, verify, convert",
        DISK_BYTES >> 20,
        DATA_BYTES >> 20
    );
    report.add(Measure::of(name, "ms", &imports));

    let template = template(&lab, &operator).await?;
    for way in Way::ALL {
        println!("{} VMs: {}", settings.rounds, way.name());
        measure(&lab, &operator, &template, &digests, way, report)
            .await
            .with_context(|| way.name())?;
    }
    println!("{} VMs at once", settings.vms);
    many(&lab, &operator, settings.vms, report).await
}

fn version(number: usize) -> String {
    format!("standard:{number}")
}

/// Imports an image that is like no other; answers its digest.
async fn import(lab: &Lab, operator: &Operator, number: usize) -> anyhow::Result<String> {
    let file = lab.layout().dir().join("standard.raw");
    write_image(&file, u64::try_from(number)?)?;
    let (path, version) = (file.to_string_lossy(), number.to_string());
    let words = ["image", "import", &path, "--version", &version, "--replicas", "1"];
    dalgu(lab, &words).await?;
    fs::remove_file(&file)?;
    let request = v1::GetImageRequest {
        name: "standard".to_owned(),
        version,
    };
    let mut images = ImageServiceClient::new(operator.channel());
    let status = images.get_image(request).await?.into_inner().status;
    let status = status.context("an image has a status")?;
    ensure!(
        status.import_host == HOST_NAME,
        "it came to {}",
        status.import_host
    );
    Ok(status.digest)
}

fn write_image(file: &Path, seed: u64) -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; DISK_BYTES];
    random.fill(&mut bytes[DATA_BYTES..2 * DATA_BYTES]);
    fs::write(file, bytes).with_context(|| format!("write {}", file.display()))
}

fn vm(name: &str, image: &str, clone_mode: v1::CloneMode) -> v1::Vm {
    let mut vm = small_vm(name, "local");
    for disk in vm.spec.iter_mut().flat_map(|spec| &mut spec.disks) {
        disk.size_mib = 0;
        image.clone_into(&mut disk.image);
        disk.clone_mode = clone_mode.into();
    }
    vm
}

/// A VM of Dalgu's that never runs, for its domain's XML.
async fn template(lab: &Lab, operator: &Operator) -> anyhow::Result<Template> {
    let request = v1::CreateVmRequest {
        vm: Some(vm("template", &version(0), v1::CloneMode::Full)),
        stopped: true,
        host: HOST_NAME.to_owned(),
        ..v1::CreateVmRequest::default()
    };
    let made = operator
        .finish(operator.vms().create_vm(request).await?.into_inner())
        .await?;
    let template = Template::of(lab, &made.vm_uid).await?;
    delete(operator, "template").await?;
    Ok(template)
}

async fn delete(operator: &Operator, name: &str) -> anyhow::Result<()> {
    let request = v1::DeleteVmRequest {
        name: name.to_owned(),
        force: true,
        ..v1::DeleteVmRequest::default()
    };
    let deleting = operator.vms().delete_vm(request).await?.into_inner();
    operator.finish(deleting).await.map(drop)
}

/// Samples in milliseconds.
#[derive(Debug, Default)]
struct Times {
    running: Vec<f64>,
    first_line: Vec<f64>,
    /// Of Dalgu's alone.
    host_work: Vec<f64>,
}

async fn measure(
    lab: &Lab,
    operator: &Operator,
    template: &Template,
    digests: &[String],
    way: Way,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (Times::default(), Times::default());
    for round in 1..digests.len() {
        let image = match way {
            Way::Overlay | Way::Full => 0,
            Way::Fetched => round,
        };
        let digest = digests.get(image).context("an image for each round")?;
        // Neither always goes first.
        if round % 2 == 0 {
            through_dalgu(lab, operator, template, image, way, &mut ours).await?;
            by_hand(lab, template, digest, way, round, &mut theirs).await?;
        } else {
            by_hand(lab, template, digest, way, round, &mut theirs).await?;
            through_dalgu(lab, operator, template, image, way, &mut ours).await?;
        }
    }
    for (what, ours, theirs) in [
        ("call to running", &ours.running, &theirs.running),
        (
            "call to the guest's first line",
            &ours.first_line,
            &theirs.first_line,
        ),
    ] {
        let name = format!("{}: {what}", way.name());
        report.add(Measure::of(name, "ms", ours).map(|measure| measure.over(theirs)));
    }
    let name = format!("{}: host work from order to running", way.name());
    report.add(Measure::of(name, "ms", &ours.host_work));
    Ok(())
}

async fn through_dalgu(
    lab: &Lab,
    operator: &Operator,
    template: &Template,
    image: usize,
    way: Way,
    times: &mut Times,
) -> anyhow::Result<()> {
    let (number, host) = way.host();
    let mode = match way {
        Way::Full => v1::CloneMode::Full,
        Way::Overlay | Way::Fetched => v1::CloneMode::Overlay,
    };
    let request = v1::CreateVmRequest {
        vm: Some(vm("timed", &version(image), mode)),
        host: host.to_owned(),
        ..v1::CreateVmRequest::default()
    };
    let began = Instant::now();
    let made = operator
        .finish(operator.vms().create_vm(request).await?.into_inner())
        .await?;
    times.running.push(milliseconds(began));
    wait_until_ready(&template.log_of(lab, number, &made.vm_uid)?, 0).await?;
    times.first_line.push(milliseconds(began));
    times.host_work.push(host_work(lab, number, &made.vm_uid)?);
    delete(operator, "timed").await
}

/// What a host took from the order to make a VM until its domain had started, in milliseconds.
fn host_work(lab: &Lab, host: u8, vm: &str) -> anyhow::Result<f64> {
    let log = lab.layout().log(&lab.layout().host(host).agent());
    let log = fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
    from_order_to_running(&log, vm).with_context(|| format!("h{host} does not tell how {vm} was started"))
}

/// The same by the words of an agent's log.
fn from_order_to_running(log: &str, vm: &str) -> Option<f64> {
    let time = |words: &str| {
        let line = log
            .lines()
            .find(|line| line.contains(vm) && line.contains(words))?;
        line.split_whitespace().next()?.parse::<Timestamp>().ok()
    };
    let took = time("step done step=Start")?.duration_since(time("intent accepted")?);
    Some(took.as_secs_f64() * 1000.0)
}

/// The same by hand.
async fn by_hand(
    lab: &Lab,
    template: &Template,
    digest: &str,
    way: Way,
    round: usize,
    times: &mut Times,
) -> anyhow::Result<()> {
    let (number, _) = way.host();
    let domain = template.domain(lab, number, &format!("by-hand-{round}"))?;
    let (copy, disk) = (format!("{STORE}/{digest}.qcow2"), &domain.disk);
    let make = match way {
        Way::Overlay => format!("qemu-img create -q -f qcow2 -F qcow2 -b '{copy}' '{disk}'"),
        Way::Full => format!("qemu-img convert -O qcow2 '{copy}' '{disk}'"),
        Way::Fetched => {
            // Neither encrypted nor verified. Who gives it is there before the time begins.
            let serve = format!("setsid busybox nc -l -p {PORT} <'{copy}' >/dev/null 2>&1 &");
            lab.exec(HOST, &["sh", "-c", &serve]).await?;
            let from = lab.layout().host(HOST).ip;
            format!(
                "until busybox nc {from} {PORT} </dev/null >'{disk}.base' && [ -s '{disk}.base' ]; do sleep 0.01; done; \
                 qemu-img create -q -f qcow2 -F qcow2 -b '{disk}.base' '{disk}'"
            )
        }
    };
    let began = Instant::now();
    domain.create(lab, &make).await?;
    times.running.push(milliseconds(began));
    wait_until_ready(&domain.log, 0).await?;
    times.first_line.push(milliseconds(began));
    domain.remove(lab).await
}

/// Many VMs on one host, all asked for at once.
async fn many(lab: &Lab, operator: &Operator, vms: usize, report: &mut Report) -> anyhow::Result<()> {
    let template = template(lab, operator).await?;
    open_host(operator).await?;
    let before = process::available_kib()?;
    let began = Instant::now();
    let create = async |number: usize| {
        let request = v1::CreateVmRequest {
            vm: Some(vm(&format!("many-{number}"), &version(0), v1::CloneMode::Overlay)),
            host: HOST_NAME.to_owned(),
            ..v1::CreateVmRequest::default()
        };
        let made = operator.vms().create_vm(request).await?.into_inner();
        operator.finish(made).await.map(|made| made.vm_uid)
    };
    let uids = try_join_all((0..vms).map(create)).await?;
    let running = began.elapsed().as_secs_f64();
    let ready = uids.iter().map(async |uid| {
        let log = template.log_of(lab, HOST, uid)?;
        wait_for("the guest's greeting", TOGETHER_LIMIT, async || {
            greetings(&log) > 0
        })
        .await
    });
    try_join_all(ready).await?;
    let spoken = began.elapsed().as_secs_f64();
    let taken = before.saturating_sub(process::available_kib()?);
    let count = f64::from(u32::try_from(vms)?);
    let mib = f64::from(u32::try_from(taken)?) / 1024.0 / count;
    let mut add = |what: &str, unit, value| {
        report.add(Measure::of(format!("{vms} VMs at once: {what}"), unit, &[value]));
    };
    add("running", "per s", count / running);
    add("first line", "per s", count / spoken);
    add("memory that the machine lost for each", "MiB", mib);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_of_a_host_is_between_the_order_and_the_start_of_that_vm() {
        let log = "\
2026-11-30T05:00:00.000000Z  INFO vm{vm=b}: dalgu_agent::vm::requests: intent accepted generation=1 epoch=1 power=Running
2026-11-30T05:00:01.250000Z  INFO vm{vm=a}: dalgu_agent::vm::requests: intent accepted generation=1 epoch=1 power=Running
2026-11-30T05:00:01.300000Z  INFO vm{vm=a}: dalgu_agent::vm::steps: step done step=Define
2026-11-30T05:00:01.400000Z  INFO vm{vm=b}: dalgu_agent::vm::steps: step done step=Start
2026-11-30T05:00:01.500500Z  INFO vm{vm=a}: dalgu_agent::vm::steps: step done step=Start
2026-11-30T05:00:09.000000Z  INFO vm{vm=a}: dalgu_agent::vm::steps: step done step=Start
";
        assert_eq!(from_order_to_running(log, "vm=a"), Some(250.5));
        assert_eq!(from_order_to_running(log, "vm=c"), None);
    }
}
