//! The runner: what is switched when, with a management controller that is made up, and stepped time.

use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;
use dalgu_proto::time::Clock;
use futures::FutureExt;
use tokio::time::timeout;

use super::*;
use crate::{
    doctor, fixtures,
    model::{HostLive, Redfish},
    state::{BeforeCommit, Hooks},
    store::memory::Disk,
    verbs::{self, Caller},
};

/// What a pretended machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Fault {
    #[default]
    None,
    /// Answers nothing, ever.
    Hangs,
    /// Answers an error.
    Fails,
    /// Takes orders and does nothing.
    Ignores,
    /// Goes on and off, and its agent never reports.
    Mute,
}

#[derive(Debug, Default)]
struct Machine {
    on: bool,
    fault: Fault,
    resets: Vec<Reset>,
    reads: usize,
}

/// Pretended machines, by the URL `https://NAME`.
#[derive(Debug, Default)]
struct Machines(Mutex<BTreeMap<String, Machine>>);

impl Machines {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Machine>> {
        self.0.lock().unwrap()
    }

    fn set(&self, name: &str, fault: Fault) {
        self.lock().get_mut(name).unwrap().fault = fault;
    }

    fn resets(&self, name: &str) -> Vec<Reset> {
        self.lock()[name].resets.clone()
    }
}

fn name(machine: &Redfish) -> String {
    machine.url.trim_start_matches("https://").to_owned()
}

fn failed(machine: &Redfish) -> Error {
    Error::Status {
        url: machine.url.clone(),
        what: "GET /redfish/v1/Systems".into(),
        status: 500,
        message: String::new(),
    }
}

#[async_trait]
impl Power for Machines {
    async fn read(&self, machine: &Redfish) -> Result<Reading, Error> {
        let (fault, on) = {
            let mut all = self.lock();
            let known = all.get_mut(&name(machine)).unwrap();
            known.reads += 1;
            (known.fault, known.on)
        };
        match fault {
            Fault::Hangs => std::future::pending().await,
            Fault::Fails => Err(failed(machine)),
            _ => Ok(Reading {
                power_state: if on { "On" } else { "Off" }.into(),
                resets: Vec::new(),
            }),
        }
    }

    async fn reset(&self, machine: &Redfish, reset: Reset) -> Result<(), Error> {
        let mut all = self.lock();
        let known = all.get_mut(&name(machine)).unwrap();
        known.resets.push(reset);
        if known.fault != Fault::Ignores {
            known.on = reset == Reset::On;
        }
        Ok(())
    }
}

struct Bench {
    db: Db,
    machines: Arc<Machines>,
    runner: Runner,
    stop: CancellationToken,
}

fn rules() -> Rules {
    let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
    Rules {
        settle: minutes(15),
        min_on: minutes(30),
        min_off: minutes(10),
        per_hour: 10,
        reserve_hosts: 0,
    }
}

/// A site with these hosts, which report while their machines are on; nothing is run yet.
async fn bench(names: &[&str]) -> Bench {
    let start = Instant::now();
    let base = Timestamp::from_second(1_000_000).unwrap();
    let hooks = Hooks {
        clock: Clock::from_fn(move || base + SignedDuration::try_from(start.elapsed()).unwrap()),
        ..Hooks::default()
    };
    let at_once: BeforeCommit = Box::new(|| std::future::ready(()).boxed());
    let opened = Db::open_as_task(Disk::default().open(), fixtures::cluster_id(), hooks, at_once).await;
    let (db, writing) = opened.unwrap();
    tokio::spawn(writing);
    let machines = Arc::new(Machines::default());
    for name in names {
        let machine = Machine {
            on: true,
            ..Machine::default()
        };
        machines.lock().insert((*name).to_owned(), machine);
        db.change(|tx| {
            let mut host = fixtures::host(name);
            let redfish = Redfish {
                url: format!("https://{name}"),
                system: String::new(),
                fingerprint: String::new(),
                credentials: "bmc".into(),
            };
            host.power = Some(HostPower::new(redfish, "operator/admin".into(), tx.now()));
            tx.put_host(host);
        })
        .await;
    }
    tokio::spawn(report(db.clone(), machines.clone()));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let runner = Runner {
        db: db.clone(),
        power: machines.clone(),
        usage: Usage::default(),
        rules: None,
        off_limit: SignedDuration::from_mins(10),
        on_limit: SignedDuration::from_mins(15),
    };
    Bench {
        db,
        machines,
        runner,
        stop: CancellationToken::new(),
    }
}

/// What agents and the heartbeat do.
async fn report(db: Db, machines: Arc<Machines>) {
    loop {
        let states: Vec<_> = machines
            .lock()
            .iter()
            .map(|(name, machine)| {
                (
                    fixtures::host_name(name),
                    machine.on && machine.fault != Fault::Mute,
                )
            })
            .collect();
        db.change(|tx| {
            for (host, heard) in states {
                let live = fixtures::live(tx.now());
                let silent = HostLive {
                    state: HostState::Unreachable,
                    ..HostLive::silent(Instant::now())
                };
                tx.set_live(host, if heard { live } else { silent });
            }
        })
        .await;
        sleep(Duration::from_secs(1)).await;
    }
}

impl Bench {
    fn run(&self) {
        tokio::spawn(self.runner.clone().run(self.stop.clone()));
    }

    async fn off(&self, host: &str, how: Off) -> Result<(), verbs::Error> {
        let order = |tx: &mut Tx| host_power::off(tx, "operator/admin", host, how, None, "a test");
        self.db.transact(order).await.map(|_| ())
    }

    async fn on(&self, host: &str) -> Result<(), verbs::Error> {
        let order = |tx: &mut Tx| host_power::on(tx, "operator/admin", host, "a test");
        self.db.transact(order).await.map(|_| ())
    }

    fn power(&self, host: &str) -> HostPower {
        let state = self.db.snapshot();
        state.hosts[&fixtures::host_name(host)].power.clone().unwrap()
    }

    /// Waits until a host's power is there, at most so long.
    async fn becomes(&self, host: &str, phase: PowerPhase, within: Duration) {
        let wait = async {
            while self.power(host).phase != phase {
                sleep(Duration::from_millis(100)).await;
            }
        };
        let outcome = timeout(within, wait).await;
        outcome.unwrap_or_else(|_| panic!("{host} is not {phase:?} but {:?}", self.power(host)));
    }

    fn told(&self, host: &str) -> Vec<String> {
        let state = self.db.snapshot();
        let events = state.events.values().filter(|event| event.subject == host);
        events.map(|event| event.reason.clone()).collect()
    }

    fn findings(&self) -> Vec<&'static str> {
        let state = self.db.snapshot();
        let view = doctor::View {
            state: &state,
            now: self.db.now(),
            silence: crate::hosts::silence(&state),
            damage: None,
            files: doctor::Files::default(),
        };
        let found = doctor::examine(&view).findings;
        found.into_iter().map(|finding| finding.kind).collect()
    }
}

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn a_host_goes_off_and_comes_back_and_is_not_missed() {
    let bench = bench(&["h1", "h2", "h3"]).await;
    bench.run();
    bench.off("h3", Off::default()).await.unwrap();
    bench.becomes("h3", PowerPhase::Off, SOON).await;
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(bench.power("h3").phase, PowerPhase::Off);
    assert!(
        !bench.findings().contains(&"HOST_SILENT"),
        "{:?}",
        bench.findings()
    );
    bench.on("h3").await.unwrap();
    bench.becomes("h3", PowerPhase::On, SOON).await;
    assert_eq!(bench.machines.resets("h3"), [Reset::GracefulShutdown, Reset::On]);
    assert_eq!(
        bench.told("h3"),
        ["HostPoweringOff", "HostOff", "HostPoweringOn", "HostOn"]
    );
    bench
        .off(
            "h3",
            Off {
                force: true,
                ..Off::default()
            },
        )
        .await
        .unwrap();
    bench.becomes("h3", PowerPhase::Off, SOON).await;
    assert_eq!(bench.machines.resets("h3").last(), Some(&Reset::ForceOff));
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_holds_up_no_other_and_its_time_ends() {
    let bench = bench(&["h1", "h2", "h3", "h4"]).await;
    bench.machines.set("h1", Fault::Fails);
    bench.machines.set("h2", Fault::Ignores);
    bench.run();
    for host in ["h1", "h2", "h3"] {
        bench.off(host, Off::default()).await.unwrap();
    }
    bench.becomes("h3", PowerPhase::Off, SOON).await;
    assert!(
        bench.power("h1").fault.contains("status 500"),
        "{:?}",
        bench.power("h1")
    );
    sleep(Duration::from_secs(9 * 60)).await;
    assert_eq!(bench.power("h1").phase, PowerPhase::PoweringOff);
    for host in ["h1", "h2"] {
        bench
            .becomes(host, PowerPhase::On, Duration::from_secs(4 * 60))
            .await;
        assert_eq!(bench.told(host), ["HostPoweringOff", "HostPowerOffFailed"]);
        assert!(
            bench.power(host).fault.contains("--force"),
            "{:?}",
            bench.power(host)
        );
    }
    // It was asked less and less often, and ordered again now and then.
    let reads = bench.machines.lock()["h1"].reads;
    assert!((6..=15).contains(&reads), "{reads}");
    let resets = bench.machines.resets("h2").len();
    assert!((4..=6).contains(&resets), "{resets}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_never_ends_is_its_hosts_own() {
    let bench = bench(&["h1", "h2", "h3"]).await;
    bench.machines.set("h1", Fault::Hangs);
    bench.run();
    for host in ["h1", "h2"] {
        bench.off(host, Off::default()).await.unwrap();
    }
    bench.becomes("h2", PowerPhase::Off, SOON).await;
    bench.on("h2").await.unwrap();
    bench.becomes("h2", PowerPhase::On, SOON).await;
    assert_eq!(bench.machines.lock()["h1"].reads, 1, "it has one call under way");
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_come_back_is_told_once_and_comes_late_all_the_same() {
    let bench = bench(&["h1", "h2", "h3"]).await;
    bench.run();
    bench.off("h3", Off::default()).await.unwrap();
    bench.becomes("h3", PowerPhase::Off, SOON).await;
    bench.machines.set("h3", Fault::Mute);
    bench.on("h3").await.unwrap();
    sleep(Duration::from_secs(14 * 60)).await;
    assert!(!bench.power("h3").overdue && !bench.findings().contains(&"HOST_NOT_BACK"));
    sleep(Duration::from_secs(60 * 60)).await;
    assert!(bench.power("h3").overdue);
    assert!(bench.findings().contains(&"HOST_NOT_BACK"));
    let told = bench.told("h3");
    assert_eq!(
        told.iter().filter(|reason| *reason == "HostNotBack").count(),
        1,
        "{told:?}"
    );
    bench.machines.set("h3", Fault::None);
    bench.becomes("h3", PowerPhase::On, SOON).await;
    assert!(!bench.power("h3").overdue && !bench.findings().contains(&"HOST_NOT_BACK"));
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_started_meanwhile_keeps_its_host_on() {
    let bench = bench(&["h1", "h2", "h3"]).await;
    bench.off("h3", Off::default()).await.unwrap();
    bench.db.change(|tx| tx.put_vm(fixtures::vm("late", "h3"))).await;
    bench.run();
    bench.becomes("h3", PowerPhase::On, SOON).await;
    assert!(bench.machines.resets("h3").is_empty());
    assert!(
        bench.power("h3").fault.contains("VM late runs there"),
        "{:?}",
        bench.power("h3")
    );
    let refused = bench
        .off(
            "h3",
            Off {
                force: true,
                even_if_needed: true,
            },
        )
        .await
        .unwrap_err();
    assert_eq!(refused.reason().1, "HOST_NOT_EMPTY");
}

#[tokio::test(start_paused = true)]
async fn what_had_begun_goes_on_after_a_restart_and_on_is_remembered_while_it_goes_off() {
    let bench = bench(&["h1", "h2", "h3"]).await;
    bench.off("h3", Off::default()).await.unwrap();
    bench.on("h3").await.unwrap();
    assert_eq!(bench.power("h3").phase, PowerPhase::PoweringOff);
    // Nobody has run since it was ordered.
    bench.run();
    bench.becomes("h3", PowerPhase::On, SOON * 2).await;
    assert_eq!(bench.machines.resets("h3"), [Reset::GracefulShutdown, Reset::On]);
    bench.off("h2", Off::default()).await.unwrap();
    bench.stop.cancel();
    sleep(Duration::from_secs(120)).await;
    let again = Bench {
        stop: CancellationToken::new(),
        ..bench
    };
    again.run();
    again.becomes("h2", PowerPhase::Off, SOON).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_somebody_has_switched_on_by_hand_is_on() {
    let bench = bench(&["h1", "h2", "h3"]).await;
    bench.run();
    bench.off("h3", Off::default()).await.unwrap();
    bench.becomes("h3", PowerPhase::Off, SOON).await;
    sleep(Duration::from_secs(60)).await;
    bench.machines.lock().get_mut("h3").unwrap().on = true;
    bench.becomes("h3", PowerPhase::On, SOON).await;
}

#[tokio::test(start_paused = true)]
async fn idle_hosts_sleep_and_wake_when_a_host_is_lost_but_only_those_that_were_put_to_sleep_here() {
    let mut bench = bench(&["h1", "h2", "h3", "h4", "h5"]).await;
    bench
        .off(
            "h5",
            Off {
                even_if_needed: true,
                ..Off::default()
            },
        )
        .await
        .unwrap();
    bench
        .db
        .change(|tx| {
            for (vm, host) in [("a", "h1"), ("b", "h2")] {
                let vm = fixtures::vm(vm, host);
                tx.observe(vm.id, Some(fixtures::observation(&vm)));
                tx.put_vm(vm);
            }
        })
        .await;
    bench.runner.rules = Some(rules());
    bench.run();
    sleep(Duration::from_secs(25 * 60)).await;
    assert_eq!(
        bench.power("h3").phase,
        PowerPhase::On,
        "not yet on for long enough"
    );
    bench
        .becomes("h3", PowerPhase::Off, Duration::from_secs(10 * 60))
        .await;
    bench.becomes("h4", PowerPhase::Off, SOON).await;
    sleep(Duration::from_secs(6 * 3600)).await;
    assert_eq!(
        bench.told("h3"),
        ["HostPoweringOff", "HostOff"],
        "for hours nothing else happens"
    );
    bench.machines.lock().get_mut("h2").unwrap().on = false;
    bench.becomes("h3", PowerPhase::On, SOON * 2).await;
    assert_eq!(
        bench.power("h5").phase,
        PowerPhase::Off,
        "somebody may have opened it"
    );
    assert_eq!(bench.power("h3").principal, PRINCIPAL);
}

#[tokio::test(start_paused = true)]
async fn a_site_that_only_observes_switches_nothing() {
    let mut bench = bench(&["h1", "h2", "h3"]).await;
    bench.runner.rules = Some(rules());
    let observing = crate::state::Observing {
        since: bench.db.now(),
        waived: BTreeSet::new(),
    };
    bench.off("h3", Off::default()).await.unwrap();
    bench.db.change(|tx| tx.set_observing(Some(observing))).await;
    bench.run();
    sleep(Duration::from_secs(2 * 3600)).await;
    assert!(
        bench
            .machines
            .lock()
            .values()
            .all(|machine| machine.on && machine.reads == 0)
    );
    bench.db.change(|tx| tx.set_observing(None)).await;
    bench.becomes("h3", PowerPhase::Off, SOON).await;
}

#[test]
fn a_password_is_no_part_of_what_is_stored() {
    let machine = Redfish {
        url: "https://10.0.0.1".into(),
        system: String::new(),
        fingerprint: String::new(),
        credentials: "bmc".into(),
    };
    let caller = Caller {
        principal: "operator/admin".into(),
        request_id: String::new(),
        body: String::new(),
    };
    let stored =
        serde_json::to_string(&HostPower::new(machine, caller.principal, Timestamp::UNIX_EPOCH)).unwrap();
    assert_eq!(
        stored,
        r#"{"redfish":{"url":"https://10.0.0.1","credentials":"bmc"},"phase":"on","since":"1970-01-01T00:00:00Z","principal":"operator/admin"}"#
    );
}
