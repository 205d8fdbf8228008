//! Rolling maintenance of a whole site: hosts in groups that can be emptied at once.

use dalgu_controller::planner::{Host, Maintenance, Rule, Site, Vm, groups};
use tokio::time::Instant;

use super::one;
use crate::bench::report::{Measure, Report};

/// VMs of a host.
const VMS: usize = 20;
/// Sizes that VMs take in turn: processors and MiB of memory. A host of 64 processors and 256 GiB is some half full with them.
const SIZES: [(u32, u64); 5] = [(1, 2048), (1, 4096), (2, 8192), (2, 8192), (2, 16_384)];

/// A site of equal hosts.
#[must_use]
pub fn site(hosts: usize) -> Site {
    let host = Host {
        vcpus: 64,
        memory_mib: 262_144,
        cpus: 64.0,
        core: 1.0,
        cost: 1.0,
        open: true,
        ..Host::default()
    };
    let vm = |slot: usize| {
        // Neighbours differ, so that hosts do too.
        let (vcpus, memory_mib) = SIZES[(slot * 7 + slot / VMS * 3 + slot / 11) % SIZES.len()];
        Vm {
            host: slot / VMS,
            vcpus,
            memory_mib,
            transfer_mib: memory_mib,
            ..Vm::default()
        }
    };
    let vms = (0..hosts * VMS).map(vm).collect();
    Site::new(vec![host; hosts], vms, vec![Rule::new(hosts, |_| true)])
}

/// Sorts all hosts into groups; the time is the median of so many runs.
pub fn run(hosts: usize, runs: usize, report: &mut Report) {
    let site = site(hosts);
    let asked: Vec<_> = (0..hosts).collect();
    for (what, at_once, most) in [
        ("all groups", hosts, hosts),
        ("the first group", hosts, 1),
        ("groups of 10", 10, hosts),
    ] {
        let settings = Maintenance {
            at_once,
            groups: most,
            spare: true,
        };
        let mut times = Vec::with_capacity(runs);
        let mut found = 0;
        for _ in 0..runs.max(1) {
            let begin = Instant::now();
            found = groups(&site, &asked, |_| true, settings).0.len();
            times.push(begin.elapsed().as_secs_f64() * 1000.0);
        }
        let name = |figure: &str| format!("maintain {hosts} hosts, {what}: {figure}");
        #[expect(clippy::cast_precision_loss, reason = "a count")]
        let count = found as f64;
        report.add(one(name("groups"), "", count));
        report.add(Measure::of(name("time"), "ms", &times));
    }
}
