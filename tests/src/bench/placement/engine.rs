//! How fast the engine decides.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use dalgu_controller::placement::{Engine, HostView, Policy, Protect, Request, Rule, decide, fit};
use dalgu_proto::{ids::HostName, vm::NumaPlace};
use fastrand::Rng;
use nix::time::{ClockId, clock_gettime};

use super::one;
use super::site::{self, Kind};
use crate::bench::process;
use crate::bench::report::{Measure, Report};

/// How much to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Sites of so many hosts, one after the other.
    pub hosts: Vec<usize>,
    /// Decisions of which each is timed.
    pub decisions: usize,
    /// Decisions of the plain scan of which each is timed; fewer on large sites, see [`SCANNED`].
    pub scans: usize,
    /// What the random numbers begin with.
    pub seed: u64,
    /// Only these of the ways to place, as the rows of the report begin; none for all.
    pub only: Vec<String>,
}

/// Hosts that the plain scan looks at in all, on one site.
const SCANNED: usize = 5_000_000;
/// How full sites are, in percent of their virtual processors or memory.
const FULL: u32 = 75;

/// Measures all sites, by both policies.
///
/// # Errors
/// If the engine does not answer as the plain scan does.
pub fn run(settings: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let nothing = Arc::new(Protect::default());
    let racks = Protect::try_from(vec!["host".to_owned(), "rack".to_owned()]).map_err(anyhow::Error::msg)?;
    let racks = Arc::new(racks);
    for (kind, policy, protect) in [
        (Kind::Plain, Policy::PACK, &nothing),
        (Kind::Plain, Policy::BALANCED, &nothing),
        (Kind::Plain, Policy::SPREAD, &nothing),
        (Kind::Fitted, Policy::PACK, &nothing),
        (Kind::Fitted, Policy::SPREAD, &nothing),
        (Kind::Plain, Policy::PACK, &racks),
        (Kind::Plain, Policy::SPREAD, &racks),
    ] {
        let way = Way {
            kind,
            policy,
            protect,
        };
        let word = way.word();
        if !settings.only.is_empty() && !settings.only.iter().any(|only| only == word) {
            continue;
        }
        let mut medians = Vec::new();
        for hosts in &settings.hosts {
            medians.push(measure(settings, &way, *hosts, report)?);
        }
        if let [first, .., last] = medians.as_slice() {
            let (from, to) = (settings.hosts[0], settings.hosts[settings.hosts.len() - 1]);
            let name = format!("{word}, growth of the median from {from} to {to} hosts");
            report.add(one(name, "times", last / first));
        }
    }
    Ok(())
}

/// What is placed, and how.
struct Way<'a> {
    kind: Kind,
    policy: Policy,
    protect: &'a Arc<Protect>,
}

impl Way<'_> {
    /// How its rows begin.
    fn word(&self) -> &'static str {
        match (self.policy, self.kind, self.protect.is_empty()) {
            (Policy::PACK, Kind::Plain, true) => "pack",
            (Policy::PACK, Kind::Fitted, _) => "pack, a third fitted",
            (Policy::PACK, Kind::Plain, false) => "pack, racks protected",
            (Policy::BALANCED, ..) => "balanced",
            (_, Kind::Plain, true) => "spread",
            (_, Kind::Fitted, _) => "spread, a third fitted",
            (_, Kind::Plain, false) => "spread, racks protected",
        }
    }
}

/// What bounds where a request may go.
fn bound(request: &Request) -> &'static str {
    if !request.spec.fitting.is_none() {
        return "fitted";
    }
    let label = request.spec.host_selector.keys().next().map(String::as_str);
    match (label, request.rules.groups.is_empty()) {
        (Some("rack"), _) => "for one rack",
        (Some(_), _) => "for one room",
        (None, false) => "in a group",
        (None, true) => "for any host",
    }
}

/// A site with VMs on it.
struct Site {
    engine: Engine,
    protect: Arc<Protect>,
    hosts: Vec<HostView<'static>>,
    numbers: HashMap<HostName, usize>,
    kind: Kind,
    /// Each VM with the number of its host, and where on it it is.
    vms: Vec<(Request, usize, Vec<NumaPlace>)>,
    rng: Rng,
}

impl Site {
    fn new(count: usize, way: &Way<'_>, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let hosts: Vec<_> = (0..count).map(|number| site::host(number, &mut rng)).collect();
        let numbers = hosts
            .iter()
            .zip(0..)
            .map(|(host, number)| (host.name.clone(), number));
        Self {
            engine: Engine::protecting(way.policy, way.protect),
            protect: way.protect.clone(),
            kind: way.kind,
            numbers: numbers.collect(),
            hosts,
            vms: Vec::new(),
            rng,
        }
    }

    /// Fills it until so much of a resource is reserved.
    fn fill(&mut self) {
        self.hosts.iter().for_each(|host| self.engine.set(host));
        let all: (u64, u64) = self.hosts.iter().fold((0, 0), |(vcpus, memory), host| {
            (
                vcpus + u64::from(host.vcpus_capacity()),
                memory + host.memory_mib_capacity(),
            )
        });
        let full = |used: u64, all: u64| used * 100 >= all * u64::from(FULL);
        let mut used = (0, 0);
        while !full(used.0, all.0) && !full(used.1, all.1) {
            let request = self.request();
            used.0 += u64::from(request.spec.vcpus);
            used.1 += request.spec.reserved_memory_mib();
            self.place(request);
        }
    }

    fn rule(&self, policy: &Policy) -> Rule<'_> {
        Rule {
            protect: Some(&self.protect),
            ..Rule::from(policy)
        }
    }

    fn request(&mut self) -> Request {
        site::request(self.hosts.len(), self.kind, &mut self.rng)
    }

    /// As the controller asks: what the index does not know it reads from the host.
    fn choose(&self, request: &Request) -> Option<&HostName> {
        let view = |name: &HostName| Some(site::seen(&self.hosts[*self.numbers.get(name)?]));
        self.engine.choose(request, view)
    }

    fn place(&mut self, request: Request) {
        if let Some(name) = self.choose(&request) {
            let number = self.numbers[name];
            self.take(request, number);
        }
    }

    fn take(&mut self, request: Request, number: usize) {
        let host = &mut self.hosts[number];
        let places = fit(&request.spec, host);
        site::reserve(host, &request, &places, true);
        self.engine.set(host);
        self.vms.push((request, number, places));
    }

    /// One VM goes, whichever.
    fn release(&mut self) {
        if !self.vms.is_empty() {
            let (request, number, places) = self.vms.swap_remove(self.rng.usize(0..self.vms.len()));
            let host = &mut self.hosts[number];
            site::reserve(host, &request, &places, false);
            self.engine.set(host);
        }
    }
}

/// Measures a site; gives the median of a decision.
fn measure(settings: &Settings, way: &Way<'_>, count: usize, report: &mut Report) -> anyhow::Result<f64> {
    let word = way.word();
    println!("{word}, {count} hosts");
    let title = |what: &str| format!("{word}, {count} hosts: {what}");
    let mut site = Site::new(count, way, settings.seed);
    let before = process::mib(std::process::id(), "VmRSS:")?;
    site.hosts.iter().for_each(|host| site.engine.set(host));
    let engine_mib = process::mib(std::process::id(), "VmRSS:")? - before;
    site.fill();
    anyhow::ensure!(!site.vms.is_empty(), "nothing could be placed on {count} hosts");

    let scans = scan(settings, &mut site)?;
    let mut timed = Vec::with_capacity(settings.decisions);
    let mut kinds = BTreeMap::<_, Vec<f64>>::new();
    let mut turned_over = Duration::ZERO;
    for _ in 0..settings.decisions {
        let request = site.request();
        let begin = processor()?;
        site.release();
        turned_over += since(begin)?;
        let begin = Begin::now()?;
        let host = std::hint::black_box(site.choose(&request)).cloned();
        let taken = begin.nanoseconds()?;
        timed.push(taken);
        kinds.entry(bound(&request)).or_default().push(taken);
        let begin = processor()?;
        if let Some(host) = host {
            let number = site.numbers[&host];
            site.take(request, number);
            turned_over += since(begin)?;
        }
    }
    let requests: Vec<_> = (0..settings.decisions).map(|_| site.request()).collect();
    let begin = processor()?;
    for request in &requests {
        std::hint::black_box(site.choose(request));
    }
    let taken = since(begin)?;
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    let (decisions, vms) = (settings.decisions as f64, site.vms.len() as f64);
    let scanned = scans.iter().sum::<f64>() / 1e9;
    let a_second = decisions / taken.as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    let scans_a_second = scans.len() as f64 / scanned;

    timed.sort_by(f64::total_cmp);
    let empty: Result<Vec<_>, _> = (0..1001).map(|_| Begin::now()?.nanoseconds()).collect();
    report.add(Measure::of(
        title("reading the clock, part of each time below"),
        "ns",
        &empty?,
    ));
    report.add(one(title("decisions a second"), "1/s", a_second).map(|m| m.over(&[scans_a_second])));
    report.add(Measure::of(title("p50"), "ns", &[rank(&timed, 0.5)]).map(|m| m.over(&[rank(&scans, 0.5)])));
    for (what, at) in [("p99", 0.99), ("p99.9", 0.999)] {
        report.add(one(title(what), "ns", rank(&timed, at)));
    }
    for (kind, timed) in &mut kinds {
        timed.sort_by(f64::total_cmp);
        report.add(one(title(&format!("{kind}: p99")), "ns", rank(timed, 0.99)));
    }
    let change = nanoseconds(turned_over) / decisions / 2.0;
    report.add(one(title("a host taken over after a change"), "ns", change));
    report.add(one(
        title("engine's memory a VM"),
        "bytes",
        engine_mib * 1_048_576.0 / vms,
    ));
    if word == "spread" {
        refusal(
            &site,
            &title("a refusal with its whole explanation")["spread, ".len()..],
            report,
        )?;
    }
    Ok(rank(&timed, 0.5))
}

/// Times of the plain scan, in order; each of its answers is compared with the engine's.
fn scan(settings: &Settings, site: &mut Site) -> anyhow::Result<Vec<f64>> {
    let policy = site.engine.policy();
    let scans = settings.scans.min(SCANNED / site.hosts.len()).max(3);
    let mut timed = Vec::with_capacity(scans);
    for _ in 0..scans {
        let request = site.request();
        let begin = processor()?;
        let decision =
            dalgu_controller::placement::decide_keeping(&request, &site.hosts, site.rule(&policy), 2);
        timed.push(nanoseconds(since(begin)?));
        anyhow::ensure!(
            decision.host.as_ref() == site.choose(&request),
            "the engine chooses {:?} and the scan {:?} for {request:?}",
            site.choose(&request),
            decision.host
        );
    }
    timed.sort_by(f64::total_cmp);
    Ok(timed)
}

/// What no host can take, explained for each of them.
fn refusal(site: &Site, name: &str, report: &mut Report) -> anyhow::Result<()> {
    let mut request = site::request(site.hosts.len(), site.kind, &mut Rng::with_seed(1));
    request.spec.memory_mib = 1 << 30;
    let mut timed = Vec::new();
    for _ in 0..5 {
        let begin = processor()?;
        let decision = site.engine.decide(
            &request,
            8,
            || site.hosts.iter().map(site::seen),
            |name| Some(site::seen(&site.hosts[*site.numbers.get(name)?])),
        );
        timed.push(nanoseconds(since(begin)?) / 1e6);
        anyhow::ensure!(
            decision.host.is_none() && decision.verdicts.len() == site.hosts.len() && decision.hint.is_some(),
            "a refusal without its explanation"
        );
    }
    let again = decide(&request, &site.hosts, &site.engine.policy());
    anyhow::ensure!(again.host.is_none(), "the scan places what the engine refuses");
    report.add(Measure::of(name, "ms", &timed));
    Ok(())
}

/// The value at a rank, 0 to 1, of sorted samples.
fn rank(sorted: &[f64], at: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts far below 2^53, and a rank from 0 to 1"
    )]
    let index = (sorted.len() as f64 * at) as usize;
    sorted
        .get(index.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

/// When something short began.
struct Begin {
    processor: Duration,
    wall: Duration,
}

impl Begin {
    fn now() -> anyhow::Result<Self> {
        Ok(Self {
            processor: processor()?,
            wall: wall()?,
        })
    }

    /// How long it took. The wall clock is quick to read but runs on while this thread waits for a processor; the thread's own clock stands
    /// still then, but half a microsecond passes while it is read. Each is at least the time taken, so it is the lesser one.
    fn nanoseconds(&self) -> anyhow::Result<f64> {
        let wall = wall()?.saturating_sub(self.wall);
        Ok(nanoseconds(wall.min(since(self.processor)?)))
    }
}

fn wall() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC_RAW)?.into())
}

/// Time that this thread has had a processor: what else runs on the machine is not measured. Reading it is part of every time.
fn processor() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

fn since(begin: Duration) -> anyhow::Result<Duration> {
    Ok(processor()?.saturating_sub(begin))
}

#[expect(clippy::cast_precision_loss, reason = "durations far below 2^53 ns")]
fn nanoseconds(time: Duration) -> f64 {
    time.as_nanos() as f64
}
