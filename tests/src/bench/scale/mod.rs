//! The controller with thousands of hosts: how soon it is back after a kill, and what ten times its rated load does to it.
//!
//! Called by the program `bench-scale` with 2,000 hosts and 20,000 VMs, and with fewer by a test. The controller is
//! a process of its own on a store on disk; the [`agents`] are real ones in this process; all of it speaks mutual TLS over
//! loopback addresses. What must hold at any size is checked here and is an error; times are figures, which the
//! program compares with [`AIMS`] after a run at full size.

pub mod agents;
pub mod beats;
mod controller;
pub mod load;
mod look;
mod overload;
mod restart;
pub mod sample;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use dalgu_proto::v1;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::{Instant, sleep};

use self::agents::Agents;
pub use self::controller::{Controller, beside};
use self::load::Targets;
use super::process;
use super::report::{Aim, Bound, Measure, Report};
use crate::operator::Operator;

/// Creations under way at the same time.
const AT_ONCE: usize = 48;
/// Nothing that is waited for takes longer.
const LIMIT: Duration = Duration::from_secs(900);
/// Time between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// What a controller with 2,000 hosts and 20,000 VMs is to reach on two processors that nothing else takes.
pub const AIMS: [Aim; 3] = [
    (
        "restart: all VMs listed with their owners after",
        Bound::Most,
        5.0,
    ),
    ("restart: a new VM placed after", Bound::Most, 5.0),
    ("10 x rated load: heartbeats missed", Bound::Most, 0.0),
];

/// How much to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Hosts.
    pub hosts: usize,
    /// VMs.
    pub vms: usize,
    /// How often agents report.
    pub report_interval: Duration,
    /// Times that the controller is killed.
    pub restarts: usize,
    /// How long the site is watched at rest.
    pub window: Duration,
    /// Requests a second that the controller is said to bear.
    pub rated: u32,
    /// How long each load lasts.
    pub load: Duration,
    /// Connections that the load comes over.
    pub connections: usize,
    /// The controller's program, and what stands between it and its configuration file.
    pub program: PathBuf,
    /// See above.
    pub arguments: Vec<String>,
    /// Where its data is; must be empty.
    pub dir: PathBuf,
}

/// A site that runs.
struct Site<'a> {
    settings: &'a Settings,
    controller: Controller,
    agents: Agents,
    operator: Operator,
    /// Every VM, with its owner.
    vms: BTreeMap<String, v1::Vm>,
}

/// Measures; what was measured before a failure is in the report too.
///
/// # Errors
/// If something fails, or does not hold that must.
pub async fn run(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let mut controller = Controller::new(settings, agents::address(1))?;
    controller.start()?;
    let operator = controller.serving().await?;
    println!("{} agents, all at once", settings.hosts);
    let began = Instant::now();
    let agents = Agents::start(settings, &controller).await?;
    report.add(one("agents made, with their certificates", "s", seconds(began)));
    let mut site = Site {
        settings,
        controller,
        agents,
        operator,
        vms: BTreeMap::new(),
    };
    site.until_all_ready().await?;
    report.add(one(
        "all hosts ready for the first time after",
        "s",
        seconds(began),
    ));
    site.fill(report).await?;
    site.rest(report).await?;
    restart::measure(&mut site, report).await.context("restarts")?;
    overload::measure(&mut site, report).await.context("load")?;
    ensure!(site.agents.all_run(), "an agent has given up");
    Ok(())
}

impl Site<'_> {
    /// What load asks about.
    fn targets(&self) -> Targets {
        let names = self.vms.values().map(|vm| vm.name.clone()).collect();
        let hosts = (1..=self.settings.hosts)
            .map(|number| format!("h{number:05}"))
            .collect();
        Targets {
            vms: Arc::new(names),
            hosts: Arc::new(hosts),
        }
    }

    async fn until_all_ready(&self) -> anyhow::Result<()> {
        let ready = async || {
            let hosts = look::all_hosts(&self.operator).await?;
            let ready = hosts
                .values()
                .filter(|host| host.state() == v1::HostState::Ready)
                .count();
            ensure!(
                ready == self.settings.hosts,
                "{ready} of {} hosts are ready",
                self.settings.hosts
            );
            Ok(())
        };
        until("every host ready", ready).await
    }

    /// Waits until every VM runs as its agent says, each on its owner; gives them.
    async fn until_all_run(&self, count: usize) -> anyhow::Result<BTreeMap<String, v1::Vm>> {
        let found = std::sync::Mutex::new(BTreeMap::new());
        let run = async || {
            let vms = look::all_vms(&self.operator).await?;
            let running = vms
                .values()
                .filter(|vm| {
                    vm.status
                        .as_ref()
                        .is_some_and(|status| status.state() == v1::VmState::Running)
                })
                .count();
            ensure!(
                running == count && vms.len() == count,
                "{running} of {} VMs run, {count} were made",
                vms.len()
            );
            *found.lock().expect("nobody panics while it is held") = vms;
            Ok(())
        };
        until("every VM runs", run).await?;
        Ok(found.into_inner()?)
    }

    /// Creates all VMs by the API, and waits until all run.
    async fn fill(&mut self, report: &mut Report) -> anyhow::Result<()> {
        println!("{} VMs", self.settings.vms);
        let began = Instant::now();
        let times: Vec<f64> = stream::iter(0..self.settings.vms)
            .map(|number| create(&self.operator, number))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        report.add(Measure::of("a creation while all are made", "ms", &times));
        report.add(one("VMs made, accepted", "s", seconds(began)));
        self.vms = self.until_all_run(self.settings.vms).await?;
        report.add(one("VMs made, all run", "s", seconds(began)));
        Ok(())
    }

    /// What the site takes when nothing is asked of it.
    async fn rest(&self, report: &mut Report) -> anyhow::Result<()> {
        println!("at rest");
        // The passes that the creations led to end.
        sleep(self.settings.report_interval * 2).await;
        self.agents.beats.begin();
        let before = self.agents.beats.tally();
        let (began, cpu, others) = (Instant::now(), self.controller.cpu_seconds()?, self.others()?);
        let own = process::cpu_seconds(std::process::id())?;
        sleep(self.settings.window).await;
        let passed = seconds(began);
        let share = |used: f64| used / passed * 100.0;
        let tally = self.agents.beats.tally().since(before);
        report.add(one(
            "at rest: controller's CPU",
            "% of one core",
            share(self.controller.cpu_seconds()? - cpu),
        ));
        report.add(one(
            "at rest: CPU of all agents together",
            "% of one core",
            share(process::cpu_seconds(std::process::id())? - own),
        ));
        report.add(one(
            "at rest: CPU of other programs on the machine",
            "% of one core",
            share(self.others()? - others),
        ));
        report.add(one(
            "at rest: controller's memory",
            "MiB",
            self.controller.memory_mib()?,
        ));
        report.add(one("store on disk", "MiB", self.controller.store_mib()?));
        let bytes: Vec<_> = self.agents.report_bytes().collect();
        report.add(Measure::of("a report of a host", "bytes", &bytes));
        report.add(one("reports taken", "per s", count(tally.taken) / passed));
        let (missed, longest) = self.agents.beats.missed();
        report.add(one(
            "at rest: longest time between two reports of a host",
            "s",
            longest.as_secs_f64(),
        ));
        report.add(one("at rest: heartbeats missed", "", count(missed)));
        report.add(one(
            "at rest: reports refused or not answered",
            "",
            count(tally.refused + tally.broken),
        ));
        Ok(())
    }

    /// Processor time of all programs but the controller and this one.
    fn others(&self) -> anyhow::Result<f64> {
        let ours = self.controller.cpu_seconds()? + process::cpu_seconds(std::process::id())?;
        Ok(process::busy_seconds()? - ours)
    }
}

/// Gives the time of the call that was not refused.
async fn create(operator: &Operator, number: usize) -> anyhow::Result<f64> {
    let request = v1::CreateVmRequest {
        vm: Some(vm(&format!("vm-{number:05}"))),
        ..v1::CreateVmRequest::default()
    };
    let mut began = Instant::now();
    let call = async || {
        began = Instant::now();
        operator.vms().create_vm(request.clone()).await
    };
    load::patiently(call)
        .await
        .with_context(|| format!("create VM {number}"))?;
    Ok(seconds(began) * 1000.0)
}

/// A VM as departments have it.
#[must_use]
pub fn vm(name: &str) -> v1::Vm {
    let spec = v1::VmSpec {
        vcpus: 2,
        memory_mib: 4096,
        disks: vec![v1::Disk {
            name: "root".to_owned(),
            size_mib: 40 << 10,
            pool: "local".to_owned(),
            ..v1::Disk::default()
        }],
        nics: vec![v1::Nic {
            name: "eth0".to_owned(),
            bridge: "br0".to_owned(),
            ..v1::Nic::default()
        }],
        ..v1::VmSpec::default()
    };
    v1::Vm {
        name: name.to_owned(),
        spec: Some(spec),
        ..v1::Vm::default()
    }
}

/// Waits until `check` succeeds; its last complaint is the error.
async fn until(what: &str, check: impl AsyncFn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match check().await {
            Ok(()) => return Ok(()),
            Err(error) if began.elapsed() > LIMIT => {
                return Err(error.context(format!("{what}: not after {LIMIT:?}")));
            }
            Err(_) => sleep(LOOK).await,
        }
    }
}

fn one(name: impl Into<String>, unit: &'static str, value: f64) -> Option<Measure> {
    Measure::of(name, unit, &[value])
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

/// A number as figures are reckoned with.
#[must_use]
pub fn count(number: u64) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
