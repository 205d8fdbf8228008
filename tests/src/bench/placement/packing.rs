//! How many hosts a policy needs for the VMs of a trace, beside the fewest that any could do with, and for how long it keeps them on.
//!
//! A trace is replayed against a number of hosts, as the simulator does: VMs come and go, and every one must find a host. The fewest
//! hosts on which that goes well are what the policy needs. The bound is that of the linear program at the fullest moment
//! ([`Worth::hosts`]); that of host-hours is the greater of the processors and the memory that are reserved, over time. None moves, but where the planner makes
//! room for a VM that finds none: then others may move, so many of them a day at most. The peers' rules are the simulator's; all else is the controller's engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use dalgu_controller::placement::Worth;
use dalgu_controller::simulator::command;
use dalgu_controller::simulator::field::{Field, Shape, fewest, holds};
use dalgu_controller::simulator::trace::{Event, Size, Trace};
use dalgu_controller::simulator::{Contender, Settings, replay};

use super::one;
use crate::bench::report::{Measure, Report};

/// Time between two rounds of learning, in seconds of the trace.
const LEARN_EVERY: u64 = 6 * 3600;
/// Share of a day's VMs that may move in a day to make room.
const MOVING: f64 = 0.02;
const DAY_S: u64 = 24 * 3600;

/// Measures a trace that the simulator can read: on hosts of so many processors and so much memory in GiB.
///
/// # Errors
/// If the trace cannot be read, or a VM fits on no host.
pub fn run(trace: &Path, hosts: &[(u32, u64)], report: &mut Report) -> anyhow::Result<()> {
    let trace = command::read(trace)?;
    for (vcpus, gib) in hosts {
        measure(&trace, (*vcpus, gib << 10), report)
            .with_context(|| format!("hosts of {vcpus} processors and {gib} GiB"))?;
    }
    Ok(())
}

/// What is to be had from a trace whatever places it.
struct Course {
    events: Vec<Event>,
    /// Prices, from so many seconds on.
    learnt: Vec<(u64, Arc<Worth>)>,
    /// Fewest hosts at the fullest moment, by the linear program.
    bound: f64,
    /// Fewest host-hours, by the resource of which more is reserved at each moment.
    hours: f64,
    /// VMs that come in a day.
    vms_a_day: f64,
}

#[expect(clippy::cast_precision_loss, reason = "sums far below 2^53")]
fn course(trace: &Trace, host: (u32, u64)) -> anyhow::Result<Course> {
    let (vms, events) = (&trace.vms, trace.events());
    let mut live = BTreeMap::<Size, u64>::new();
    let (mut used, mut fullest, mut at_peak) = ((0_u64, 0_u64), 0_u64, BTreeMap::new());
    let mut learnt: Vec<(u64, Arc<Worth>)> = Vec::new();
    let mut next = LEARN_EVERY + trace.start_s;
    let (mut now_s, mut hours) = (trace.start_s, 0.0);
    let share = |(vcpus, mib): (u64, u64)| {
        let (vcpus, mib) = (vcpus as f64, mib as f64);
        (vcpus / f64::from(host.0)).max(mib / host.1 as f64)
    };
    for event in &events {
        let next_s = event.at_s.clamp(now_s, trace.end_s);
        hours += share(used) * (next_s - now_s) as f64 / 3600.0;
        now_s = next_s;
        if event.at_s >= next {
            learnt.extend(learn(&live, host).map(|worth| (event.at_s, Arc::new(worth))));
            next = event.at_s + LEARN_EVERY;
        }
        let size = vms[event.vm].size;
        let count = live.entry(size).or_default();
        match event.comes {
            true => {
                *count += 1;
                used = (used.0 + u64::from(size.vcpus), used.1 + size.memory_mib);
            }
            false => {
                *count -= 1;
                used = (used.0 - u64::from(size.vcpus), used.1 - size.memory_mib);
            }
        }
        let full = (used.0 * host.1).max(used.1 * u64::from(host.0));
        if full > fullest {
            (fullest, at_peak) = (full, live.clone());
        }
    }
    let bound = learn(&at_peak, host).context("the trace has no VM")?.hosts();
    Ok(Course {
        events,
        learnt,
        bound,
        hours,
        vms_a_day: vms.len() as f64 * DAY_S as f64 / (trace.end_s - trace.start_s).max(1) as f64,
    })
}

fn learn(live: &BTreeMap<Size, u64>, host: (u32, u64)) -> Option<Worth> {
    let vms = live
        .iter()
        .map(|(size, count)| ((size.vcpus, size.memory_mib), *count));
    Worth::learn(vms, [(host, 1)])
}

/// What places a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    By(Contender),
    Priced,
    MakingRoom,
}

const WAYS: [(&str, Way); 10] = [
    ("first fit", Way::By(Contender::FirstFit)),
    ("best fit", Way::By(Contender::BestFit)),
    ("spread", Way::By(Contender::Spread)),
    ("balanced", Way::By(Contender::Balanced)),
    ("pack", Way::By(Contender::Pack)),
    ("pack by prices learnt every six hours", Way::Priced),
    ("pack, making room", Way::MakingRoom),
    ("Nova's weighers", Way::By(Contender::Nova)),
    ("Proxmox VE's static scheduler", Way::By(Contender::Proxmox)),
    ("Incus, fewest instances", Way::By(Contender::Incus)),
];

/// What a way came to on some hosts.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    /// Hours of hosts with VMs.
    hours: f64,
    /// Moves in all, and on the day with the most.
    moves: u64,
    moves_a_day: u64,
}

#[expect(clippy::cast_precision_loss, reason = "counts")]
fn measure(trace: &Trace, host: (u32, u64), report: &mut Report) -> anyhow::Result<()> {
    let misfit = trace
        .vms
        .iter()
        .find(|vm| vm.size.vcpus > host.0 || vm.size.memory_mib > host.1);
    if let Some(vm) = misfit {
        bail!(
            "a VM of {} processors and {} MiB fits on none",
            vm.size.vcpus,
            vm.size.memory_mib
        );
    }
    println!(
        "{} VMs on hosts of {} processors and {} MiB",
        trace.vms.len(),
        host.0,
        host.1
    );
    let course = course(trace, host)?;
    let title = |what: &str| format!("packing, {} processors, {} GiB: {what}", host.0, host.1 >> 10);
    let bound = course.bound.ceil();
    report.add(one(title("fewest hosts by the linear program"), "hosts", bound));
    for (what, way) in WAYS {
        let (needed, outcome) = needed(trace, host, &course, way);
        println!("  {what}: {needed} hosts, {:.0} host-hours", outcome.hours);
        report.add(Measure::of(title(what), "hosts", &[needed]).map(|measure| measure.over(&[bound])));
        let hours = Measure::of(title(&format!("{what}: host-hours")), "h", &[outcome.hours]);
        report.add(hours.map(|measure| measure.over(&[course.hours])));
        if way == Way::MakingRoom {
            let moves = Measure::of(title(&format!("{what}: moves")), "", &[outcome.moves as f64]);
            report.add(moves.map(|measure| measure.over(&[trace.vms.len() as f64])));
            let name = title(&format!("{what}: moves on the fullest day"));
            let fullest = Measure::of(name, "", &[outcome.moves_a_day as f64]);
            report.add(fullest.map(|measure| measure.over(&[course.vms_a_day])));
        }
    }
    Ok(())
}

/// The fewest hosts on which every VM finds its place, and what came of it there.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a count of hosts"
)]
fn needed(trace: &Trace, host: (u32, u64), course: &Course, way: Way) -> (f64, Outcome) {
    let mut outcomes = BTreeMap::new();
    let needed = fewest(course.bound.ceil() as usize, |count| {
        let outcome = place(trace, host, course, way, count);
        outcomes.extend(outcome.map(|outcome| (count, outcome)));
        outcome.is_some()
    });
    (needed as f64, outcomes[&needed])
}

/// What comes of it on so many hosts, if every VM finds a place.
#[expect(clippy::cast_precision_loss, reason = "a time far below 2^53 s")]
fn place(trace: &Trace, host: (u32, u64), course: &Course, way: Way, count: usize) -> Option<Outcome> {
    let shape = Shape {
        cpus: host.0,
        memory_mib: host.1,
        cpu_overcommit: 1.0,
    };
    let (contender, prices) = match way {
        Way::By(contender) => (contender, &[][..]),
        Way::Priced => (Contender::Pack, &course.learnt[..]),
        Way::MakingRoom => return make_room(trace, &shape, course, count),
    };
    let mut field = Field::new(count, &shape, contender.chooser());
    let hosts_s = holds(&trace.vms, &course.events, trace.end_s, &mut field, prices)?;
    Some(Outcome {
        hours: hosts_s as f64 / 3600.0,
        moves: 0,
        moves_a_day: 0,
    })
}

/// The planner makes room for a VM that finds none, with the day's moves.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count of moves"
)]
fn make_room(trace: &Trace, shape: &Shape, course: &Course, count: usize) -> Option<Outcome> {
    let settings = Settings {
        hosts: count,
        shape: *shape,
        contended_from: 0.9,
        round_s: DAY_S,
        moves: (course.vms_a_day * MOVING) as usize,
    };
    let outcome = replay(trace, &settings, Contender::MakeRoom);
    let mut days = BTreeMap::<u64, u64>::new();
    for point in &outcome.series {
        days.insert((point.at_h / 24.0).ceil() as u64, point.moves);
    }
    let before = std::iter::once(0).chain(days.values().copied());
    let moves_a_day = days
        .values()
        .zip(before)
        .map(|(moves, before)| moves - before)
        .max();
    (outcome.refused == 0).then_some(Outcome {
        hours: outcome.host_hours,
        moves: outcome.moves,
        moves_a_day: moves_a_day.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "vm_id,arrive_s,vcpu,mem_gb,dur_lo_s,dur_hi_s,censored\n\
        a,0,32,20,100,300,0\nb,0,32,140,0,0,1\nc,0,32,20,0,0,1\nd,300,32,140,0,0,1\n";

    #[test]
    fn slim_and_fat_vms_need_two_hosts_and_no_policy_does_with_fewer() {
        let trace = Trace::read(TRACE.as_bytes()).unwrap();
        let host = (64, 160 << 10);
        let course = course(&trace, host).unwrap();
        assert_eq!(course.bound.ceil(), 2.0);
        for (what, way) in WAYS {
            let (needed, _) = needed(&trace, host, &course, way);
            assert!((2.0..=3.0).contains(&needed), "{what}: {needed}");
            assert!(place(&trace, host, &course, way, 1).is_none());
        }
    }
}
