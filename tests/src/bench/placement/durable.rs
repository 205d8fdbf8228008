//! How many creations a second a controller accepts on a large site: through gRPC and mutual TLS over loopback, the decision, the
//! reservation, and the store on disk. The hosts have registered and reported once, and no agent listens there: what becomes of a VM that was
//! accepted is not of this.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_controller::config::Config;
use dalgu_controller::hosts::registry::{self, Registration};
use dalgu_controller::server::limits::Limits;
use dalgu_controller::store::sqlite::Sqlite;
use dalgu_controller::{Controller, Parts, backup, pki};
use dalgu_proto::ids::Session;
use dalgu_proto::tls::Identity;
use dalgu_proto::v1;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::one;
use crate::bench::process;
use crate::bench::report::{Measure, Report};
use crate::bench::scale::load::percentile;
use crate::bench::scale::{self, sample};
use crate::operator::Operator;

/// How much to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Hosts of the site.
    pub hosts: u16,
    /// VMs that it has before anything is measured.
    pub vms: usize,
    /// Creations that are measured, as fast as they go, and again at a given rate.
    pub creations: usize,
}

/// Creations under way at the same time.
const AT_ONCE: usize = 8;
/// Those of the VMs that are there before.
const FILLING: usize = 64;
/// Creations a second that come by themselves.
const RATE: f64 = 1000.0;
/// Connections that callers have.
const CONNECTIONS: usize = 4;
/// Hosts that register in one transaction.
const TOGETHER: u16 = 500;
/// VMs that are asked for at once, all of them or none: as many as the largest batch of one tenant in the Azure trace.
const BATCH: usize = 1404;
/// So often.
const BATCHES: usize = 3;
/// Hosts of a rack.
const RACK: u16 = 40;

/// Measures one site, its store in a directory of its own below `place`.
///
/// # Errors
/// If a creation is refused, or a host has more than it has room for.
pub async fn run(settings: &Settings, place: &Path, report: &mut Report) -> anyhow::Result<()> {
    std::fs::create_dir_all(place).context("make a directory for reports")?;
    let dir = tempfile::tempdir_in(place).context("make a directory for the store")?;
    let data = dir.path().join("c");
    pki::init(&data, "bench", &["127.0.0.1".to_owned()])?;
    let config = Config {
        data_dir: data.clone(),
        listen: ([127, 0, 0, 1], 0).into(),
        // Nobody reports again.
        report_interval_ms: 60_000,
        unreachable_after_intervals: 100,
        limits: Limits {
            calls_per_second: u32::MAX,
            ..Limits::default()
        },
        ..Config::default()
    };
    let store = Sqlite::open(&data.join(backup::DATABASE))?;
    let failed = |error: &dalgu_controller::store::Error| panic!("the store failed: {error}");
    let stop = CancellationToken::new();
    let controller = Controller::start(config, Parts::new(store, failed), stop.clone()).await?;
    for first in (0..settings.hosts).step_by(usize::from(TOGETHER)) {
        register(&controller, first..settings.hosts.min(first + TOGETHER)).await;
    }
    let identity = Identity::load_dir(&data, "admin")?;
    let operators = stream::iter(0..CONNECTIONS).then(|_| Operator::dial(controller.address(), &identity));
    let operators: Vec<_> = operators.try_collect().await?;

    let outcome = async {
        measure(settings, &operators, report).await?;
        paced(settings, &operators, report).await?;
        together(settings, &operators[0], report).await?;
        over_committed(&controller)
    }
    .await;
    stop.cancel();
    controller.finished().await?;
    outcome
}

async fn register(controller: &Controller, hosts: std::ops::Range<u16>) {
    let change = |tx: &mut dalgu_controller::state::Tx| {
        for number in hosts {
            let name: dalgu_proto::ids::HostName = format!("host-{number:05}").parse().expect("a name");
            let sample = sample::host(number);
            let new = Registration {
                host: name.clone(),
                // Nobody listens there.
                address: "127.0.0.1:1".to_owned(),
                boot_id: "boot".to_owned(),
                run_id: format!("run-{number}"),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
                inventory: (*sample.inventory).clone(),
                usage: sample.usage.map(|(_, usage)| (*usage).clone()),
                vms: Vec::new(),
                complete: true,
                unmanaged: Vec::new(),
                hypervisor_error: None,
                session: Session(0),
                cluster_id: None,
                machine_id: format!("{number:032x}"),
                state_machine_id: String::new(),
                controller: (tx.meta.term, None),
                sequence: Some(1),
                images: None,
            };
            registry::register(tx, new).expect("a new host");
            let mut record = (**tx.hosts.get(&name).expect("it has registered")).clone();
            record
                .labels
                .insert("rack".to_owned(), format!("r{}", number / RACK));
            tx.put_host(record);
        }
    };
    controller.db().change(change).await;
}

async fn measure(settings: &Settings, operators: &[Operator], report: &mut Report) -> anyhow::Result<()> {
    let site = format!("{} hosts, durable", settings.hosts);
    let all = |numbers: std::ops::Range<usize>, at_once| {
        stream::iter(numbers)
            .map(|number| create(&operators[number % operators.len()], number))
            .buffer_unordered(at_once)
            .try_collect::<Vec<f64>>()
    };
    println!("{site}: {} VMs", settings.vms);
    all(0..settings.vms, FILLING).await?;
    let (began, busy) = (Instant::now(), process::cpu_seconds(std::process::id())?);
    let times = all(settings.vms..settings.vms + settings.creations, AT_ONCE).await?;
    let passed = began.elapsed();
    let busy = process::cpu_seconds(std::process::id())? - busy;
    report.add(one(
        format!("{site}: creations a second, {AT_ONCE} at once"),
        "per s",
        per_second(settings.creations, passed),
    ));
    report.add(one(
        format!("{site}: processor time of a creation, with its caller's"),
        "ms",
        busy * 1000.0 / count(settings.creations),
    ));
    report.add(Measure::of(format!("{site}: a creation"), "ms", &times));
    Ok(())
}

/// Creations that come one after the other, so many a second, whether those before have been accepted or not. Each is timed from the moment at
/// which it was due.
async fn paced(settings: &Settings, operators: &[Operator], report: &mut Report) -> anyhow::Result<()> {
    let first = settings.vms + settings.creations;
    let began = Instant::now();
    let times: Vec<f64> = stream::iter(0..settings.creations)
        .map(|number| async move {
            let due = began + Duration::from_secs_f64(count(number) / RATE);
            sleep_until(due).await;
            create(&operators[number % operators.len()], first + number).await?;
            anyhow::Ok(due.elapsed().as_secs_f64() * 1000.0)
        })
        .buffer_unordered(FILLING)
        .try_collect()
        .await?;
    let late = percentile(&times, 99).context("nothing was created")?;
    let name = format!("{} hosts, durable: a creation, {RATE} a second", settings.hosts);
    report.add(one(format!("{name}: p99"), "ms", late));
    report.add(Measure::of(name, "ms", &times));
    Ok(())
}

/// Whole lists, accepted in one step.
async fn together(settings: &Settings, operator: &Operator, report: &mut Report) -> anyhow::Result<()> {
    let mut times = Vec::new();
    for list in 0..BATCHES {
        let first = settings.vms + 2 * settings.creations + list * BATCH;
        let request = v1::BatchCreateVmsRequest {
            requests: (first..first + BATCH).map(request).collect(),
            all_or_nothing: true,
            request_id: uuid::Uuid::new_v4().to_string(),
        };
        let began = Instant::now();
        let answer = operator.vms().batch_create_vms(request).await;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        let answer = answer.context("create a list of VMs")?.into_inner();
        let accepted = answer
            .results
            .iter()
            .filter(|one| one.operation.is_some())
            .count();
        ensure!(accepted == BATCH, "{accepted} of a list of {BATCH} were accepted");
    }
    let name = format!(
        "{} hosts, durable: a list of {BATCH}, all or nothing",
        settings.hosts
    );
    report.add(Measure::of(name, "ms", &times));
    Ok(())
}

/// An error if a host has promised more than it has.
fn over_committed(controller: &Controller) -> anyhow::Result<()> {
    let state = controller.db().snapshot();
    for (name, reserved) in &state.reserved {
        let host = state.hosts.get(name).context("a host that is not there")?;
        let memory_mib = host.inventory.memory_bytes >> 20;
        let vcpus = f64::from(host.inventory.cpus) * host.cpu_overcommit_ratio;
        ensure!(
            reserved.memory_mib + host.reserved_memory_mib <= memory_mib
                && scale::count(reserved.vcpus) <= vcpus,
            "{name} has promised too much: {reserved:?}"
        );
    }
    Ok(())
}

fn count(number: usize) -> f64 {
    scale::count(number as u64)
}

fn per_second(number: usize, passed: Duration) -> f64 {
    count(number) / passed.as_secs_f64()
}

async fn create(operator: &Operator, number: usize) -> anyhow::Result<f64> {
    let began = Instant::now();
    let request = v1::CreateVmRequest {
        request_id: uuid::Uuid::new_v4().to_string(),
        ..request(number)
    };
    let created = operator.vms().create_vm(request).await;
    let operation = created
        .with_context(|| format!("create VM {number}"))?
        .into_inner();
    ensure!(!operation.id.is_empty(), "no operation of VM {number}");
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// A VM as departments have it; a fifth are bound to a rack.
fn request(number: usize) -> v1::CreateVmRequest {
    let sizes = [(1, 2), (2, 4), (2, 8), (4, 8), (4, 16)];
    let (vcpus, gib) = sizes[number % sizes.len()];
    let rack = (number % 5 == 3).then(|| ("rack".to_owned(), format!("r{}", number % 25)));
    let mut vm = scale::vm(&format!("vm-{number:06}"));
    if let Some(spec) = &mut vm.spec {
        (spec.vcpus, spec.memory_mib) = (vcpus, gib << 10);
        spec.host_selector = rack.into_iter().collect();
    }
    v1::CreateVmRequest {
        vm: Some(vm),
        ..v1::CreateVmRequest::default()
    }
}
