//! How many hosts a policy needs for the VMs of a trace, beside the fewest that any could do with.
//!
//! A trace is replayed against a number of hosts: VMs come and go, none moves, and every one must find a host. The fewest hosts on
//! which that goes well are what the policy needs. The bound is that of the linear program at the fullest moment, whose
//! prices [`Worth`] learns. First fit is here for comparison; all else is the controller's engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use dalgu_controller::placement::{Engine, HostView, Policy, Request, UsageView, Worth};
use dalgu_proto::ids::HostName;
use dalgu_proto::vm::{RestartPolicy, Spec};

use super::one;
use crate::bench::report::{Measure, Report};

/// Time between two rounds of learning, in seconds of the trace.
const LEARN_EVERY: u64 = 6 * 3600;

/// Virtual processors, and memory in MiB.
type Size = (u32, u64);

/// A VM of a trace.
#[derive(Debug, Clone, PartialEq)]
struct Vm {
    size: Size,
    arrive_s: u64,
    /// `None` where it never leaves.
    leave_s: Option<u64>,
}

/// Something that happens: a VM comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at_s: u64,
    /// Who leaves at the same time makes room first.
    comes: bool,
    vm: usize,
}

/// Measures a trace, a CSV file (or one that `gzip` has made smaller) with the columns `arrive_s`, `vcpu`, `mem_gb`, `dur_lo_s`, `dur_hi_s` and
/// `censored`: on hosts of so many processors and so much memory in GiB.
///
/// # Errors
/// If the trace cannot be read, or a VM fits on no host.
pub fn run(trace: &Path, hosts: &[(u32, u64)], report: &mut Report) -> anyhow::Result<()> {
    let text = read(trace)?;
    let vms = parse(&text).with_context(|| format!("read {}", trace.display()))?;
    for (vcpus, gib) in hosts {
        measure(&vms, (*vcpus, gib << 10), report)
            .with_context(|| format!("hosts of {vcpus} processors and {gib} GiB"))?;
    }
    Ok(())
}

fn read(trace: &Path) -> anyhow::Result<String> {
    if trace.extension().is_some_and(|extension| extension == "gz") {
        let output = Command::new("gzip")
            .arg("-dc")
            .arg(trace)
            .output()
            .context("run gzip")?;
        ensure!(
            output.status.success(),
            "gzip: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        return Ok(String::from_utf8(output.stdout)?);
    }
    std::fs::read_to_string(trace).with_context(|| format!("read {}", trace.display()))
}

/// A lifetime is the middle of its bin; a VM that was still there when the trace was taken never leaves.
fn parse(text: &str) -> anyhow::Result<Vec<Vm>> {
    let mut lines = text.lines();
    let head: Vec<_> = lines.next().context("it is empty")?.split(',').collect();
    let column = |name: &str| {
        let found = head.iter().position(|column| *column == name);
        found.with_context(|| format!("it has no column {name}"))
    };
    let names = ["arrive_s", "vcpu", "mem_gb", "dur_lo_s", "dur_hi_s", "censored"];
    let mut at = [0; 6];
    for (at, name) in at.iter_mut().zip(names) {
        *at = column(name)?;
    }
    let [arrive, vcpu, memory, low, high, censored] = at;
    let mut vms = Vec::new();
    for (line, number) in lines.zip(2..) {
        let fields: Vec<_> = line.split(',').collect();
        let field = |index: usize| -> anyhow::Result<f64> {
            let text = fields.get(index).copied().unwrap_or_default();
            text.parse()
                .with_context(|| format!("line {number}: not a number: {text:?}"))
        };
        let arrive_s = whole(field(arrive)?)?;
        let stays = matches!(fields.get(censored).copied(), Some("1" | "True" | "true"));
        vms.push(Vm {
            size: (
                u32::try_from(whole(field(vcpu)?)?)?,
                whole(field(memory)? * 1024.0)?,
            ),
            arrive_s,
            leave_s: match stays {
                true => None,
                false => Some(arrive_s + whole(f64::midpoint(field(low)?, field(high)?))?),
            },
        });
    }
    Ok(vms)
}

fn whole(value: f64) -> anyhow::Result<u64> {
    ensure!((0.0..1e15).contains(&value), "{value} is out of range");
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "in range by the test above"
    )]
    let whole = value.round() as u64;
    Ok(whole)
}

fn events(vms: &[Vm]) -> Vec<Event> {
    let mut events = Vec::with_capacity(vms.len() * 2);
    for (vm, index) in vms.iter().zip(0..) {
        let event = |at_s, comes| Event {
            at_s,
            comes,
            vm: index,
        };
        events.push(event(vm.arrive_s, true));
        events.extend(vm.leave_s.map(|at_s| event(at_s.max(vm.arrive_s + 1), false)));
    }
    events.sort_unstable();
    events
}

/// What is to be had from a trace whatever places it.
struct Course {
    events: Vec<Event>,
    /// Prices, from so many seconds on.
    learnt: Vec<(u64, Arc<Worth>)>,
    /// Fewest hosts at the fullest moment, by the linear program.
    bound: f64,
}

fn course(vms: &[Vm], host: Size) -> anyhow::Result<Course> {
    let events = events(vms);
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
                used = (used.0 + u64::from(size.0), used.1 + size.1);
            }
            false => {
                *count -= 1;
                used = (used.0 - u64::from(size.0), used.1 - size.1);
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

fn learn(live: &BTreeMap<Size, u64>, host: Size) -> Option<Worth> {
    let vms = live.iter().map(|(size, count)| (*size, *count));
    Worth::learn(vms, [(host, 1)])
}

/// What places a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    FirstFit,
    By(Policy),
    Priced,
}

fn measure(vms: &[Vm], host: Size, report: &mut Report) -> anyhow::Result<()> {
    let misfit = vms.iter().find(|vm| vm.size.0 > host.0 || vm.size.1 > host.1);
    if let Some(vm) = misfit {
        bail!(
            "a VM of {} processors and {} MiB fits on none",
            vm.size.0,
            vm.size.1
        );
    }
    println!(
        "{} VMs on hosts of {} processors and {} MiB",
        vms.len(),
        host.0,
        host.1
    );
    let course = course(vms, host)?;
    let title = |what: &str| format!("packing, {} processors, {} GiB: {what}", host.0, host.1 >> 10);
    let fewest = course.bound.ceil();
    report.add(one(title("fewest hosts by the linear program"), "hosts", fewest));
    let ways = [
        ("first fit", Way::FirstFit),
        ("spread", Way::By(Policy::Spread)),
        ("pack without prices (best fit)", Way::By(Policy::Pack)),
        ("pack by prices learnt every six hours", Way::Priced),
    ];
    for (what, way) in ways {
        let needed = needed(vms, host, &course, way);
        println!("  {what}: {needed}");
        report.add(Measure::of(title(what), "hosts", &[needed]).map(|measure| measure.over(&[fewest])));
    }
    Ok(())
}

/// The fewest hosts on which every VM finds its place.
fn needed(vms: &[Vm], host: Size, course: &Course, way: Way) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count of hosts"
    )]
    let mut enough = course.bound.ceil() as u32;
    let mut few = enough.saturating_sub(1);
    // Doubling the step first: a replay that fails is short.
    let mut step = (enough / 50).max(1);
    while !replay(vms, host, course, way, enough) {
        few = enough;
        enough += step;
        step *= 2;
    }
    while enough - few > 1 {
        let middle = few + (enough - few) / 2;
        match replay(vms, host, course, way, middle) {
            true => enough = middle,
            false => few = middle,
        }
    }
    f64::from(enough)
}

/// Whether every VM finds a place on so many hosts.
fn replay(vms: &[Vm], host: Size, course: &Course, way: Way, count: u32) -> bool {
    let mut site = Site::new(host, way, count);
    let mut placed = vec![None; vms.len()];
    let mut learnt = course.learnt.iter().peekable();
    for event in &course.events {
        if let Some((_, worth)) = learnt.next_if(|(from, _)| *from <= event.at_s) {
            site.learn(worth, way);
        }
        let size = vms[event.vm].size;
        if !event.comes {
            if let Some(number) = placed[event.vm].take() {
                site.change(number, size, false);
            }
            continue;
        }
        let Some(number) = site.choose(size, way) else {
            return false;
        };
        site.change(number, size, true);
        placed[event.vm] = Some(number);
    }
    true
}

struct Site {
    engine: Engine,
    hosts: Vec<HostView<'static>>,
    numbers: BTreeMap<HostName, usize>,
    requests: BTreeMap<Size, Request>,
}

impl Site {
    fn new(size: Size, way: Way, count: u32) -> Self {
        let policy = match way {
            Way::By(policy) => policy,
            Way::FirstFit | Way::Priced => Policy::Pack,
        };
        let hosts: Vec<_> = (0..count).map(|number| host(number, size)).collect();
        let mut engine = Engine::new(policy);
        hosts.iter().for_each(|host| engine.set(host));
        Self {
            engine,
            numbers: hosts
                .iter()
                .zip(0..)
                .map(|(host, number)| (host.name.clone(), number))
                .collect(),
            hosts,
            requests: BTreeMap::new(),
        }
    }

    fn learn(&mut self, worth: &Arc<Worth>, way: Way) {
        if way == Way::Priced {
            self.engine.price(Some(worth));
        }
    }

    fn choose(&mut self, size: Size, way: Way) -> Option<usize> {
        if way == Way::FirstFit {
            let fits = |host: &HostView<'_>| host.vcpus_free() >= size.0 && host.memory_mib_free() >= size.1;
            return self.hosts.iter().position(fits);
        }
        let request = self.requests.entry(size).or_insert_with(|| request(size));
        let name = self.engine.choose(request)?;
        self.numbers.get(name).copied()
    }

    fn change(&mut self, number: usize, (vcpus, memory_mib): Size, add: bool) {
        let host = &mut self.hosts[number];
        if add {
            host.vcpus_reserved += vcpus;
            host.memory_mib_reserved += memory_mib;
        } else {
            host.vcpus_reserved -= vcpus;
            host.memory_mib_reserved -= memory_mib;
        }
        self.engine.set(host);
    }
}

fn host(number: u32, (cpus, memory_mib): Size) -> HostView<'static> {
    HostView {
        name: format!("host-{number:06}").parse().expect("a name"),
        cpus,
        cpu_overcommit_ratio: 1.0,
        memory_mib,
        reserved_memory_mib: 0,
        pools: Vec::new(),
        usage: Some(UsageView::default()),
        ready: true,
        cordoned: false,
        ..super::site::host(0, &mut fastrand::Rng::with_seed(0))
    }
}

/// A request that reserves exactly so much, or up to a MiB less: QEMU's overhead is taken off, which the trace does not have.
fn request((vcpus, reserved_mib): Size) -> Request {
    let spec = |memory_mib| Spec {
        vcpus,
        memory_mib,
        disks: Vec::new(),
        nics: Vec::new(),
        kernel_boot: None,
        restart_policy: RestartPolicy::default(),
        host_selector: BTreeMap::new(),
        first_boot: None,
        firmware: Default::default(),
        tpm: false,
        max_vcpus: None,
        max_memory_mib: None,
    };
    let fits = |memory_mib: &u64| spec(*memory_mib).reserved_memory_mib() <= reserved_mib;
    let memory_mib = (0..=reserved_mib).rev().find(fits).unwrap_or(0);
    Request::new(spec(memory_mib))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "vm_id,arrive_s,vcpu,mem_gb,dur_lo_s,dur_hi_s,censored\n\
        a,0,32,20,100,300,0\nb,0,32,140,0,0,1\nc,0,32,20,0,0,1\nd,300,32,140,0,0,1\n";

    #[test]
    fn a_trace_is_read_with_the_middle_of_each_lifetime() {
        let vms = parse(TRACE).unwrap();
        assert_eq!(vms.len(), 4);
        assert_eq!((vms[0].size, vms[0].leave_s), ((32, 20 << 10), Some(200)));
        assert_eq!((vms[1].arrive_s, vms[1].leave_s), (0, None));
        assert!(parse("vcpu,mem_gb\n").is_err());
        assert!(parse(&format!("{TRACE}e,x,1,1,1,1,0\n")).is_err());
    }

    #[test]
    fn slim_and_fat_vms_need_two_hosts_and_no_policy_does_with_fewer() {
        let vms = parse(TRACE).unwrap();
        let host = (64, 160 << 10);
        let course = course(&vms, host).unwrap();
        assert_eq!(course.bound.ceil(), 2.0);
        for way in [
            Way::FirstFit,
            Way::By(Policy::Pack),
            Way::By(Policy::Spread),
            Way::Priced,
        ] {
            let needed = needed(&vms, host, &course, way);
            assert!((2.0..=3.0).contains(&needed), "{way:?}: {needed}");
            assert!(!replay(&vms, host, &course, way, 1));
        }
    }

    #[test]
    fn a_request_reserves_what_the_trace_says() {
        for size in [(1, 768), (2, 3584), (16, 112 << 10)] {
            let reserved = request(size).spec.reserved_memory_mib();
            assert!((size.1 - 1..=size.1).contains(&reserved), "{size:?}: {reserved}");
        }
    }
}
