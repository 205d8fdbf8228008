//! A day of the PlanetLab traces under the planner, beside what CloudSim's policies were measured to do there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use dalgu_controller::planner::{Consolidation, Host, Rule, Samples, Site, Vm, consolidate};
use tokio::time::Instant;

use super::setting::{HOSTS, Move, Outcome, Setting, TICKS, kind};
use super::threshold;
use crate::bench::placement::one;
use crate::bench::report::{Measure, Report};

/// Measures the day in an archive, or in a directory, with one file of 288 lines for each VM.
///
/// # Errors
/// If the traces cannot be read.
pub fn run(day: &Path, report: &mut Report) -> anyhow::Result<()> {
    let traces = read(day).with_context(|| format!("read {}", day.display()))?;
    let days: [(&str, bool); 2] = [("no VM is lost", false), ("idle VMs are lost", true)];
    for (name, removes_idle) in days {
        let mut planner = Planner::new(&traces);
        let outcome = Setting::new(&traces, removes_idle).day(|setting| planner.decide(setting));
        rows(report, &format!("consolidate, {name}"), outcome);
        let slowest = planner.slowest_ms;
        report.add(one(
            format!("consolidate, {name}: slowest decision"),
            "ms",
            slowest,
        ));
        let outcome = Setting::new(&traces, removes_idle).day(threshold::decide);
        rows(report, &format!("THR-MMT here, {name}"), outcome);
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts")]
fn rows(report: &mut Report, name: &str, outcome: Outcome) {
    let mut add = |what: &str, unit, value| report.add(one(format!("{name}: {what}"), unit, value));
    add("energy", "kWh", outcome.kwh);
    add("migrations", "", outcome.migrations as f64);
    add("SLAV", "millionths", outcome.violation() * 1e6);
    add("hosts' time short (SLATAH)", "%", outcome.short * 100.0);
    add(
        "demand lost to migrations (PDM)",
        "millionths",
        outcome.degraded * 1e6,
    );
    add("VMs at the end", "", outcome.alive as f64);
}

/// The planner, with what it has seen so far.
struct Planner {
    samples: Vec<Samples>,
    hosts: Vec<Host>,
    slowest_ms: f64,
}

impl Planner {
    fn new(traces: &[Vec<f64>]) -> Self {
        let host = |host| Host {
            // Nothing is reserved in that setting.
            vcpus: 1_000_000,
            memory_mib: 1 << 40,
            cpus: kind(host).mips(),
            core: kind(host).core,
            cost: kind(host).power(1.0) / kind(host).mips(),
            open: true,
            ..Host::default()
        };
        Self {
            samples: vec![Samples::default(); traces.len()],
            hosts: (0..HOSTS).map(host).collect(),
            slowest_ms: 0.0,
        }
    }

    fn decide(&mut self, setting: &Setting) -> Vec<Move> {
        let alive: Vec<_> = (0..setting.vms().len())
            .filter(|vm| !setting.vms()[*vm].lost)
            .collect();
        let mut vms = Vec::with_capacity(alive.len());
        for slot in &alive {
            let vm = &setting.vms()[*slot];
            #[expect(clippy::cast_possible_truncation, reason = "a speed")]
            self.samples[*slot].push(setting.demand(*slot) as f32);
            vms.push(Vm {
                host: vm.host,
                vcpus: 1,
                load: self.samples[*slot].load(vm.mips),
                transfer_mib: vm.mib.into(),
                ..Vm::default()
            });
        }
        let site = Site::new(self.hosts.clone(), vms, vec![Rule::new(HOSTS, |_| true)]);
        let begin = Instant::now();
        let plan = consolidate(&site, &Consolidation::default());
        self.slowest_ms = self.slowest_ms.max(begin.elapsed().as_secs_f64() * 1000.0);
        plan.moves()
            .iter()
            .map(|step| (alive[step.vm], step.to))
            .collect()
    }
}

fn read(day: &Path) -> anyhow::Result<Vec<Vec<f64>>> {
    if day.is_dir() {
        return read_files(day);
    }
    let unpacked = tempfile::tempdir()?;
    let status = Command::new("tar")
        .arg("-xf")
        .arg(day)
        .arg("-C")
        .arg(unpacked.path())
        .status();
    ensure!(status.context("run tar")?.success(), "tar could not unpack it");
    read_files(unpacked.path())
}

/// In the order of the files' names, which decides what size each VM has.
fn read_files(dir: &Path) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut files = Vec::new();
    find(dir, &mut files)?;
    files.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    ensure!(!files.is_empty(), "there is no file in it");
    files.iter().map(|file| trace(file)).collect()
}

fn find(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => find(&path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// Percent of a VM's speed, line by line.
fn trace(file: &Path) -> anyhow::Result<Vec<f64>> {
    let text = std::fs::read_to_string(file)?;
    let shares: Result<Vec<f64>, _> = text
        .lines()
        .map(|line| line.trim().parse::<f64>().map(|percent| percent / 100.0))
        .collect();
    let shares = shares.with_context(|| format!("{} has a line that is no number", file.display()))?;
    ensure!(
        shares.len() == TICKS,
        "{} has {} lines, not {TICKS}",
        file.display(),
        shares.len()
    );
    Ok(shares)
}

/// What was recorded of CloudSim 3.0.3 on 20110303 with no VM lost, for the table's baseline: energy in kWh, migrations, SLAV in millionths.
pub const RECORDED: [(&str, [f64; 3]); 3] = [
    ("LR-MMT 1.2", [221.4, 44_405.0, 49.5]),
    ("THR-MMT 0.8", [253.8, 41_634.0, 33.8]),
    ("Gaussian-percentile best fit", [141.55, 4518.0, 3.8]),
];

/// Energy of every instruction on the better kind of host at full use, with moves for nothing: 20110303, in kWh.
const FLOOR_KWH: f64 = 114.9;

/// The recorded figures as rows, each beside ours.
pub fn recorded(report: &mut Report) {
    let ours = ["energy", "migrations", "SLAV"].map(|what| {
        let name = format!("consolidate, no VM is lost: {what}");
        report
            .0
            .iter()
            .find(|row| row.name == name)
            .map(|row| (row.unit, row.value))
    });
    if let Some((unit, kwh)) = ours[0] {
        let row = Measure::of("ours beside the floor: energy", unit, &[kwh]);
        report.add(row.map(|row| row.over(&[FLOOR_KWH])));
    }
    for (policy, figures) in RECORDED {
        for ((what, ours), figure) in ["energy", "migrations", "SLAV"].iter().zip(ours).zip(figures) {
            let Some((unit, ours)) = ours else { continue };
            let row = Measure::of(format!("ours beside recorded {policy}: {what}"), unit, &[ours]);
            report.add(row.map(|row| row.over(&[figure])));
        }
    }
}
