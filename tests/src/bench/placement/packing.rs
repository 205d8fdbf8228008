//! How many hosts a policy needs for the VMs of a trace, beside the fewest that any could do with.
//!
//! A trace is replayed against a number of hosts, as the simulator does: VMs come and go, none moves, and every one must find a host. The fewest
//! hosts on which that goes well are what the policy needs. The bound is that of the linear program at the fullest moment, whose
//! prices [`Worth`] learns. The peers' rules are the simulator's; all else is the controller's engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use dalgu_controller::placement::Worth;
use dalgu_controller::simulator::Contender;
use dalgu_controller::simulator::command;
use dalgu_controller::simulator::field::{Field, Shape, fewest, holds};
use dalgu_controller::simulator::trace::{Event, Size, Vm};

use super::one;
use crate::bench::report::{Measure, Report};

/// Time between two rounds of learning, in seconds of the trace.
const LEARN_EVERY: u64 = 6 * 3600;

/// Measures a trace that the simulator can read: on hosts of so many processors and so much memory in GiB.
///
/// # Errors
/// If the trace cannot be read, or a VM fits on no host.
pub fn run(trace: &Path, hosts: &[(u32, u64)], report: &mut Report) -> anyhow::Result<()> {
    let trace = command::read(trace)?;
    for (vcpus, gib) in hosts {
        measure(&trace.vms, trace.events(), (*vcpus, gib << 10), report)
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
}

fn course(vms: &[Vm], events: Vec<Event>, host: (u32, u64)) -> anyhow::Result<Course> {
    let mut live = BTreeMap::<Size, u64>::new();
    let (mut used, mut fullest, mut at_peak) = ((0_u64, 0_u64), 0_u64, BTreeMap::new());
    let mut learnt: Vec<(u64, Arc<Worth>)> = Vec::new();
    let mut next = LEARN_EVERY + events.first().map_or(0, |event| event.at_s);
    for event in &events {
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
}

const WAYS: [(&str, Way); 8] = [
    ("first fit", Way::By(Contender::FirstFit)),
    ("spread", Way::By(Contender::Spread)),
    ("pack without prices (best fit)", Way::By(Contender::Pack)),
    ("pack by prices learnt every six hours", Way::Priced),
    ("Nova's weighers", Way::By(Contender::Nova)),
    ("Proxmox VE's static scheduler", Way::By(Contender::Proxmox)),
    ("Incus, fewest instances", Way::By(Contender::Incus)),
    ("Ganeti's hail", Way::By(Contender::Hail)),
];

fn measure(vms: &[Vm], events: Vec<Event>, host: (u32, u64), report: &mut Report) -> anyhow::Result<()> {
    let misfit = vms
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
        vms.len(),
        host.0,
        host.1
    );
    let course = course(vms, events, host)?;
    let title = |what: &str| format!("packing, {} processors, {} GiB: {what}", host.0, host.1 >> 10);
    let bound = course.bound.ceil();
    report.add(one(title("fewest hosts by the linear program"), "hosts", bound));
    for (what, way) in WAYS {
        let needed = needed(vms, host, &course, way);
        println!("  {what}: {needed}");
        report.add(Measure::of(title(what), "hosts", &[needed]).map(|measure| measure.over(&[bound])));
    }
    Ok(())
}

/// The fewest hosts on which every VM finds its place.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a count of hosts"
)]
fn needed(vms: &[Vm], host: (u32, u64), course: &Course, way: Way) -> f64 {
    fewest(course.bound.ceil() as usize, |count| {
        replay(vms, host, course, way, count)
    }) as f64
}

/// Whether every VM finds a place on so many hosts.
fn replay(vms: &[Vm], host: (u32, u64), course: &Course, way: Way, count: usize) -> bool {
    let shape = Shape {
        cpus: host.0,
        memory_mib: host.1,
        cpu_overcommit: 1.0,
    };
    let (contender, learnt) = match way {
        Way::By(contender) => (contender, &[][..]),
        Way::Priced => (Contender::Pack, &course.learnt[..]),
    };
    let mut field = Field::new(count, &shape, contender.chooser());
    holds(vms, &course.events, &mut field, learnt)
}

#[cfg(test)]
mod tests {
    use dalgu_controller::simulator::trace::Trace;

    use super::*;

    const TRACE: &str = "vm_id,arrive_s,vcpu,mem_gb,dur_lo_s,dur_hi_s,censored\n\
        a,0,32,20,100,300,0\nb,0,32,140,0,0,1\nc,0,32,20,0,0,1\nd,300,32,140,0,0,1\n";

    #[test]
    fn slim_and_fat_vms_need_two_hosts_and_no_policy_does_with_fewer() {
        let trace = Trace::read(TRACE.as_bytes()).unwrap();
        let host = (64, 160 << 10);
        let course = course(&trace.vms, trace.events(), host).unwrap();
        assert_eq!(course.bound.ceil(), 2.0);
        for (what, way) in WAYS {
            let needed = needed(&trace.vms, host, &course, way);
            assert!((2.0..=3.0).contains(&needed), "{what}: {needed}");
            assert!(!replay(&trace.vms, host, &course, way, 1));
        }
    }
}
