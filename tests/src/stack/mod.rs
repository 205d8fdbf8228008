//! The stack: a whole site under turmoil, one simulated machine a program, with everything real that the core fleet
//! leaves out: tonic and HTTP/2, TLS with the site's own certificates, SQLite, ledgers in directories, Unix sockets.
//!
//! ```text
//!   operator ══ TLS over turmoil's TCP ══> controller ── SQLite in a directory
//!                                           ║      ║
//!                                  agent h1 ╝      ╚ agent h2 … ── ledger in a directory
//!                                     ║               ║
//!                  Unix sockets ──────╨─ hypervisors ─╨────── (a machine of their own: they outlive their agents)
//! ```
//!
//! Time is turmoil's: it stands still while a disk works, so no deadline depends on the real one. The same seed gives the
//! same plan of requests and faults, and not the same history: keys of TLS and the order of files' threads are chance.
//! For a history to the byte there is the core level, [`crate::fleet`], whose checker judges here too.

pub mod campaign;
mod network;
mod operator;
pub mod plan;
mod site;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Result;
use turmoil::Sim;

use self::{
    plan::{Fault, Plan, SIZE},
    site::{Blow, Death, MACHINES, Site},
};
use crate::fleet::{
    checker::{Checks, Violation},
    plan::Node,
};

/// Simulated time of one step, and so the least that a message takes from one program to another.
const TICK: Duration = Duration::from_millis(10);
/// Longest way of a message when nothing is wrong.
const LATENCY: Duration = Duration::from_millis(20);
/// When faults are over, everything must have come to rest after this time: a call that hangs is given up after up to 120 s.
const REST: Duration = Duration::from_secs(180);
/// And it must still be so after this time: longer than every deadline on the way.
const LATE: Duration = Duration::from_secs(30);
/// How long a controller is down that died at a commit.
const DOWN: Duration = Duration::from_secs(1);

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What was violated, in order.
    pub violations: Vec<Violation>,
    /// Faults that were felt, by class.
    pub faults: BTreeMap<&'static str, u64>,
    /// How often what was checked.
    pub checks: Checks,
    /// Requests of the plan, each under an id of its own.
    pub requests: u64,
    /// Calls that were made for them, retries too.
    pub calls: u64,
    /// Watches that were taken up again.
    pub resumed: u64,
    /// Operations that ended, by kind and state.
    pub operations: BTreeMap<String, u64>,
    /// The history.
    pub lines: Vec<String>,
    /// Simulated time.
    pub time: Duration,
}

/// What is to happen at a time.
#[derive(Debug, Clone, Copy)]
enum Act {
    Begin(Fault),
    /// What was partitioned, held up, lossy or slow between two programs is well again.
    Mend(Node, Node),
    /// As `Mend`, and connections of that time are given up.
    Break(Node, Node),
    Start(Node),
    /// A host's hypervisor is there again.
    Return(usize),
}

struct Run<'a> {
    sim: Sim<'a>,
    site: Arc<Site>,
    /// What comes, by time and in the order in which it was planned.
    due: BTreeMap<(Duration, u64), Act>,
    planned: u64,
    faults: BTreeMap<&'static str, u64>,
    /// Connections of the next migration are to be reset, so long after they are seen.
    knife: Option<Duration>,
}

/// Makes one run. Blocks the thread; must not be called on a runtime.
///
/// # Errors
/// If the site's directory or identities cannot be made.
pub fn run(seed: u64) -> Result<Outcome> {
    let Plan { requests, faults } = plan::plan(seed);
    let site = Site::new(SIZE.hosts)?;
    let count = requests.len() as u64;
    let mut run = Run {
        sim: network(seed),
        site: site.clone(),
        due: BTreeMap::new(),
        planned: 0,
        faults: BTreeMap::new(),
        knife: None,
    };
    run.plug_in(requests);
    for (time, fault) in faults {
        run.plan(time, Act::Begin(fault));
    }
    run.go_until(plan::END);
    run.site.say(format_args!("nothing goes wrong any more"));
    run.heal();
    run.come_to_rest();
    run.go_until(run.sim.elapsed() + LATE);
    run.come_to_rest();
    Ok(run.outcome(seed, count))
}

fn network(seed: u64) -> Sim<'static> {
    turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(Duration::MAX)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(LATENCY)
        .tcp_capacity(1024)
        // For the Unix sockets between agents and hypervisors, which are the machine's own.
        .enable_tokio_io()
        .build()
}

/// Runs a program as a task of its own, so that all of it is dropped on its runtime where it dies.
async fn program(work: impl Future<Output = Result<()>> + Send + 'static) -> turmoil::Result {
    Ok(tokio::spawn(work).await??)
}

impl Run<'_> {
    fn plug_in(&mut self, requests: Vec<(Duration, crate::fleet::plan::Request)>) {
        let site = self.site.clone();
        self.sim
            .host(MACHINES, move || program(site::machines(site.clone())));
        let site = self.site.clone();
        self.sim.host(Node::Controller(0).to_string(), move || {
            program(site::controller(site.clone()))
        });
        for host in 0..SIZE.hosts {
            let site = self.site.clone();
            self.sim.host(Node::Host(host).to_string(), move || {
                program(site::agent(site.clone(), host))
            });
        }
        let site = self.site.clone();
        self.sim.host(Node::Client.to_string(), move || {
            program(operator::operator(site.clone(), requests.clone()))
        });
    }

    fn plan(&mut self, time: Duration, act: Act) {
        self.planned += 1;
        self.due.insert((time, self.planned), act);
    }

    fn plan_in(&mut self, wait: Duration, act: Act) {
        self.plan(self.sim.elapsed() + wait, act);
    }

    fn is_violated(&self) -> bool {
        !self.site.checker().violations.is_empty()
    }

    fn go_until(&mut self, end: Duration) {
        while self.sim.elapsed() < end && !self.is_violated() {
            self.step();
        }
    }

    /// One step of time for everybody, and a look at what came of it.
    fn step(&mut self) {
        let now = self.sim.elapsed();
        self.site.set_time(now);
        while let Some(next) = self.due.first_entry().filter(|next| next.key().0 <= now) {
            let act = next.remove();
            self.happen(act);
        }
        if let Err(error) = self.sim.step() {
            let what = format!("a program ended: {error}");
            self.violate("I14 it comes to rest", what);
        }
        for (node, death) in self.site.dying() {
            let fault = Fault::CrashAtCommit {
                after: death == Death::After,
            };
            self.count(fault);
            self.kill(node, DOWN);
        }
        if let Some(after) = self.knife
            && let Some((a, b)) = self.site.wires.migrating()
        {
            self.knife = None;
            self.count(Fault::CutMigration { after });
            self.plan_in(after, Act::Begin(Fault::Cut { a, b }));
        }
        self.site.look();
    }

    fn violate(&self, invariant: &'static str, what: String) {
        self.site.checker().violations.push(Violation { invariant, what });
    }

    fn count(&mut self, fault: Fault) {
        self.site.say(format_args!("{}: {fault:?}", fault.class()));
        *self.faults.entry(fault.class()).or_default() += 1;
    }

    fn happen(&mut self, act: Act) {
        match act {
            Act::Begin(fault) => self.begin(fault),
            Act::Mend(a, b) => self.mend(a, b),
            Act::Break(a, b) => {
                self.mend(a, b);
                self.site.wires.cut(a, b);
            }
            Act::Start(node) => {
                self.site.say(format_args!("{node} starts"));
                self.sim.bounce(node.to_string());
            }
            Act::Return(host) => self.site.strike(Blow::Back(host)),
        }
    }

    fn begin(&mut self, fault: Fault) {
        match fault {
            Fault::Partition { from, to, both, time } => {
                let (a, b) = (from.to_string(), to.to_string());
                if both {
                    self.sim.partition(a, b);
                } else {
                    self.sim.partition_oneway(a, b);
                }
                self.plan_in(time, Act::Break(from, to));
            }
            Fault::Held { a, b, time } => {
                self.sim.hold(a.to_string(), b.to_string());
                self.plan_in(time, Act::Mend(a, b));
            }
            Fault::Lossy { a, b, time } => {
                self.sim.set_link_fail_rate(a.to_string(), b.to_string(), 0.05);
                self.plan_in(time, Act::Break(a, b));
            }
            Fault::Slow { a, b, time } => {
                let most = Duration::from_secs(3);
                self.sim
                    .set_link_max_message_latency(a.to_string(), b.to_string(), most);
                self.plan_in(time, Act::Mend(a, b));
            }
            Fault::Cut { a, b } if !self.site.wires.cut(a, b) => return,
            Fault::Cut { .. } => {}
            Fault::CutMigration { after } => {
                self.knife = Some(after);
                return;
            }
            Fault::Crash { node, time } if !self.kill(node, time) => return,
            Fault::Crash { .. } => {}
            Fault::CrashAtCommit { after } => {
                let death = if after { Death::After } else { Death::Before };
                self.site.die_at_commit(death);
                return;
            }
            Fault::Guest { vm, crash } if !self.site.end_guest(vm, crash) => return,
            Fault::Guest { .. } => {}
            Fault::Daemon { host, time } => {
                self.site.strike(Blow::Away(host));
                self.plan_in(time, Act::Return(host));
            }
            Fault::Call { host, call, fault } => self.site.strike(Blow::Call(host, call, fault)),
        }
        self.count(fault);
    }

    /// Kills a program that runs; returns whether it did.
    fn kill(&mut self, node: Node, time: Duration) -> bool {
        if !self.sim.is_host_running(node.to_string()) {
            return false;
        }
        self.sim.crash(node.to_string());
        self.site.killed(node);
        self.plan_in(time, Act::Start(node));
        true
    }

    /// The link between two programs is as it was at first, whatever else was wrong with it. What was held up arrives now.
    fn mend(&mut self, a: Node, b: Node) {
        let (a, b) = (a.to_string(), b.to_string());
        self.sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.0);
        self.sim
            .set_link_max_message_latency(a.as_str(), b.as_str(), LATENCY);
        self.sim.release(a, b);
    }

    /// Nothing goes wrong any more: what is broken is mended, and who is down starts.
    fn heal(&mut self) {
        self.knife = None;
        self.site.spare();
        for fault in self.site.call_off() {
            // Counted when it was ordered.
            if let Some(count) = self.faults.get_mut(fault.class()) {
                *count -= 1;
            }
        }
        let (now, planned) = (self.sim.elapsed(), std::mem::take(&mut self.due));
        for ((_, number), act) in planned {
            if !matches!(act, Act::Begin(_)) {
                self.due.insert((now, number), act);
            }
        }
    }

    /// Waits until everything is as it should be; that it is not after all is a violation.
    fn come_to_rest(&mut self) {
        let end = self.sim.elapsed() + REST;
        while !self.is_violated() {
            let Err(violation) = self.site.is_at_rest() else {
                return;
            };
            if self.sim.elapsed() > end {
                self.violate(violation.invariant, violation.what);
                return;
            }
            self.go_until(self.sim.elapsed() + Duration::from_secs(1));
        }
    }

    fn outcome(self, seed: u64, requests: u64) -> Outcome {
        let mut operations: BTreeMap<String, u64> = BTreeMap::new();
        if let Some(db) = self.site.db() {
            for operation in db.snapshot().operations.values() {
                let name = format!("{} {}", operation.kind.as_str(), operation.state.as_str());
                *operations.entry(name).or_default() += 1;
            }
        }
        let checker = self.site.checker();
        Outcome {
            seed,
            violations: checker.violations.clone(),
            faults: self.faults.clone(),
            checks: checker.checks.clone(),
            requests,
            calls: self.site.sent.load(Ordering::Relaxed),
            resumed: self.site.resumed.load(Ordering::Relaxed),
            operations,
            lines: self.site.lines(),
            time: self.sim.elapsed(),
        }
    }
}
