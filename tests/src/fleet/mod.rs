//! A fleet in one thread: the real controller core and real agents on simulated hypervisors, on one clock, driven by one
//! seed, with everything going wrong that can go wrong between them. The same seed gives the same history, to the byte.
//!
//! ```text
//!            plan (requests, faults with a duration)     fates (faults at single points)
//!                       │                                          │
//!   clients ──messages──┴──> controller core <──messages──> agents ┴──> hypervisors (sim)
//!                                 │ store                     │ ledgers        │ streams
//!                                 └───────────── checker looks at all of them ─┘
//! ```
//!
//! [`run`] makes one run; `bin/fleet` makes thousands and writes a report; [`minimise`] cuts a failing one down. Nothing
//! here decides for the programs: it hands them a network, disks, clocks and hypervisors, and watches.

pub mod campaign;
pub mod checker;
mod clients;
mod disk;
pub mod explain;
pub mod fate;
mod life;
mod machine;
pub mod matrix;
pub mod minimise;
pub mod nature;
mod net;
pub mod objects;
pub mod plan;
mod platter;
pub mod request;
mod restore;
mod second;
mod site;
mod streams;
mod trace;
mod wire;

pub(crate) use self::site::counting;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dalgu_controller::status::{self, VmState};
use fastrand::Rng;
use tokio::{runtime::RngSeed, time::Instant};

use self::{
    checker::{Checks, Violation},
    fate::{Fates, Point, Source},
    nature::Nature,
    plan::{Event, Node, Plan, Size},
    site::Site,
};

/// When faults are over and the last message that was late has arrived, everything must have come to rest after this time.
const REST: Duration = Duration::from_secs(60);
/// Messages that were on their way when faults ended have arrived after this time.
const LATE: Duration = Duration::from_secs(100);

/// Most parts of a run.
const MOST_PARTS: u32 = 100;

/// A lock on something that is whole after every statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a run is made from.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The seed.
    pub seed: u64,
    /// How much there is of everything.
    pub size: Size,
    /// It goes on until there have been so many faults.
    pub least_faults: u64,
    /// Which of the seed's single faults there are.
    pub faults: Source,
    /// What happens; `None` is the seed's plan.
    pub plan: Option<Plan>,
    /// Keep every line of the history, and every point.
    pub explain: bool,
}

impl Settings {
    /// A seed as it is.
    pub fn seed(seed: u64, least_faults: u64) -> Self {
        Self {
            seed,
            size: Size::default(),
            least_faults,
            faults: Source::Seed { without: Vec::new() },
            plan: None,
            explain: false,
        }
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What was planned.
    pub plan: Plan,
    /// What was violated, in order.
    pub violations: Vec<Violation>,
    /// Faults by class.
    pub faults: BTreeMap<&'static str, u64>,
    /// Numbers of the points that something happened to.
    pub hit: Vec<u64>,
    /// How often what was checked.
    pub checks: Checks,
    /// Requests that were sent.
    pub requests: u64,
    /// Operations that ended, by kind and state.
    pub operations: BTreeMap<String, u64>,
    /// The VMs at the end, as the API shows them.
    pub vms: BTreeMap<String, VmState>,
    /// Digest of the history.
    pub digest: u64,
    /// The history's lines: all when they were asked for, else the last ones.
    pub lines: Vec<String>,
    /// Points that came.
    pub points: u64,
    /// The points themselves, when they were asked for.
    pub seen: Vec<Point>,
    /// Time that passed in the run.
    pub time: Duration,
}

impl Outcome {
    /// How many faults there were.
    pub fn fault_count(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// Makes one run. Blocks the thread; must not be called on a runtime.
pub fn run(settings: &Settings) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(RngSeed::from_bytes(&settings.seed.to_le_bytes()))
        .build()
        .expect("a runtime without threads and sockets");
    let outcome = runtime.block_on(live(settings));
    let beside = runtime.metrics().num_blocking_threads();
    assert_eq!(beside, 0, "work on another thread makes each run another one");
    outcome
}

async fn live(settings: &Settings) -> Outcome {
    let mut rng = Rng::with_seed(settings.seed);
    let fate_rng = Rng::with_seed(settings.seed ^ 0x5eed);
    let mut fates = Fates::new(fate_rng, plan::is_dense(settings.seed), settings.faults.clone());
    if settings.explain {
        fates.seen = Some(Vec::new());
    }
    let harsh = plan::is_harsh(settings.seed);
    let mut harsh_rng = Rng::with_seed(settings.seed ^ 0x4a46);
    let nature = Nature::of(settings.seed);
    let mut own_rng = Rng::with_seed(settings.seed ^ 0x4e41);
    if nature.power {
        fates.cut_power(own_rng.fork());
    }
    let rates = nature.rates(&mut own_rng, settings.size.hosts);
    let site = Site::new(settings.size.hosts, harsh, nature, fates, settings.explain);
    site.set_rates(&rates);
    site.start(Node::Controller(0));
    (0..settings.size.hosts).for_each(|host| site.start(Node::Host(host)));

    let begun = Instant::now();
    let mut done = Plan::new();
    for part in 0..MOST_PARTS {
        let begin = settings.size.time * part;
        let plan = match &settings.plan {
            Some(plan) => plan.clone(),
            None => {
                let mut plan = plan::plan(&mut rng, settings.size, begin);
                if harsh {
                    plan::add_harsh(&mut plan, &mut harsh_rng, settings.size, begin);
                }
                nature.add(&mut plan, &mut own_rng, settings.size, begin);
                plan
            }
        };
        // Of a plan that was given everything happens.
        let enough = settings.plan.is_none().then_some(settings.least_faults);
        let happened = carry_out(&site, &plan, begun, enough).await;
        let is_whole = happened == plan.len();
        done.extend(plan.into_iter().take(happened));
        if settings.plan.is_some() || !is_whole {
            tokio::time::sleep_until(begun + settings.size.time).await;
            break;
        }
    }
    site.trace().say(format_args!("nothing goes wrong any more"));
    site.heal();
    site.age().await;
    come_to_rest(&site, LATE + REST).await;
    if site.checker().violations.is_empty() {
        tokio::time::sleep(LATE).await;
        come_to_rest(&site, REST).await;
    }
    let outcome = outcome(settings, &site, done);
    site.end();
    outcome
}

/// Returns how much of the plan has happened when it is over, when there have been `enough` faults, or one violation.
async fn carry_out(site: &Arc<Site>, plan: &Plan, begun: Instant, enough: Option<u64>) -> usize {
    for (number, (time, event)) in plan.iter().enumerate() {
        tokio::time::sleep_until(begun + *time).await;
        happen(site, *event);
        let is_enough = enough.is_some_and(|enough| site.fates().faults() >= enough);
        if is_enough || !site.checker().violations.is_empty() {
            return number + 1;
        }
    }
    plan.len()
}

/// Waits until everything is as it should be; that it is not after all is a violation.
async fn come_to_rest(site: &Site, limit: Duration) {
    let begun = Instant::now();
    loop {
        if !site.checker().violations.is_empty() {
            return;
        }
        match site.is_at_rest() {
            Ok(()) => return,
            Err(violation) if begun.elapsed() > limit => {
                site.trace().say(format_args!(
                    "not at rest: {}: {}",
                    violation.invariant, violation.what
                ));
                let there = site.describe();
                there
                    .iter()
                    .for_each(|line| site.trace().say(format_args!("{line}")));
                site.checker().violations.push(violation);
                return;
            }
            Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
}

fn happen(site: &Arc<Site>, event: Event) {
    if let Some(class) = event.class() {
        site.fates().count(class);
        site.trace().say(format_args!("{class}: {event:?}"));
    }
    match event {
        Event::Request(request) => {
            tokio::spawn(clients::ask(site.clone(), request));
        }
        Event::Drain { host, time } => {
            tokio::spawn(clients::drain(site.clone(), host, time));
        }
        Event::Partition { from, to, both, time } => {
            site.block(from, to, time);
            if both {
                site.block(to, from, time);
            }
        }
        Event::Crash { node, time } => site.kill_for(node, time),
        Event::Freeze { node, time } => site.freeze(node, time),
        Event::Daemon { host, time } => site.daemon(host, time),
        Event::PowerLoss { host, time } => site.power_loss(host, time),
        Event::Fenced { host, time } => site.fence(host, time),
        Event::GuestOff { vm } => site.end_guest_of(vm, false),
        Event::GuestCrash { vm } => site.end_guest_of(vm, true),
        Event::ClockJump { node, seconds } => site.jump(node, seconds),
        Event::Backup => site.back_up(),
        Event::Restore { time, patience, lost } => site.restore(time, patience, lost),
        Event::Second { time } => site.start_second(time),
        Event::Turns { host } => site.turn(host),
    }
}

fn outcome(settings: &Settings, site: &Site, plan: Plan) -> Outcome {
    let requests = plan
        .iter()
        .filter(|(_, event)| matches!(event, Event::Request(_)))
        .count() as u64;
    let mut operations: BTreeMap<String, u64> = BTreeMap::new();
    operations.insert(
        "migrate accepted, to empty a host by hand".to_owned(),
        site.emptying(),
    );
    let mut vms = BTreeMap::new();
    if let Some((_, services)) = site.services() {
        let state = services.db.snapshot();
        for operation in state.operations.values() {
            let name = format!("{} {}", operation.kind.as_str(), operation.state.as_str());
            *operations.entry(name).or_default() += 1;
        }
        for vm in state.vms.values() {
            vms.insert(vm.name.to_string(), status::of(&state, vm));
        }
    }
    let (checker, mut fates, trace) = (site.checker(), site.fates(), site.trace());
    Outcome {
        seed: settings.seed,
        plan,
        violations: checker.violations.clone(),
        faults: fates.counts.clone(),
        hit: fates.hit.clone(),
        checks: checker.checks.clone(),
        requests,
        operations,
        vms,
        digest: trace.digest(),
        lines: trace.lines().to_vec(),
        points: fates.points(),
        seen: fates.seen.take().unwrap_or_default(),
        time: trace.time(),
    }
}
