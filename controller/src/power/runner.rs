//! Switches hosts on and off as their records say, and decides where the site is set to.
//!
//! A task of the controller. Each host that is on its way is asked by a call of its own, again and again and less often with each failure; so a
//! management controller that hangs holds up nothing else. What was ordered is in the store; only the pauses are this task's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use dalgu_proto::ids::HostName;
use jiff::{SignedDuration, Timestamp};
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    Error, PRINCIPAL, Power, Reading, Reset, look,
    policy::{self, Rules, Switch},
};
use crate::{
    blocking::beside,
    config,
    model::{EventKind, HostPower, HostRecord, HostState, PowerPhase, Redfish},
    plans::usage::Usage,
    state::{Db, State, Tx},
    verbs::host_power::{self, Off},
};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two decisions.
const DECIDE: Duration = Duration::from_secs(5);
/// First pause between two calls for a host; each is twice as long,
const PAUSE: Duration = Duration::from_secs(2);
/// up to this while it answers,
const LONGEST: Duration = Duration::from_secs(16);
/// and up to this while it does not.
const LONGEST_FAILED: Duration = Duration::from_secs(120);
/// An order that shows no effect is given again after this.
const AGAIN: Duration = Duration::from_secs(120);
/// Calls under way at once.
const AT_ONCE: usize = 64;
/// A report of a host that is off is of its new start when it comes so long after it was read off: none is under way for longer.
const LATE: SignedDuration = SignedDuration::from_secs(15);

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// What switches.
    pub power: Arc<dyn Power>,
    /// What VMs have used.
    pub usage: Usage,
    /// Whether it decides by itself, and how; `None` where only operators do.
    pub rules: Option<Rules>,
    /// Time a host has to be off.
    pub off_limit: SignedDuration,
    /// Time a host has to report after it was switched on.
    pub on_limit: SignedDuration,
}

/// What is remembered of a host on its way.
struct Track {
    /// Of which way.
    way: (PowerPhase, Timestamp),
    /// Since when it is cared for: of the time in which no controller did, nothing is held against a host.
    begun: Timestamp,
    next: Instant,
    pause: Duration,
    /// When the order was given last.
    ordered: Option<Instant>,
}

/// What a call came to.
struct Called {
    host: HostName,
    phase: PowerPhase,
    since: Timestamp,
    ordered: bool,
    outcome: Result<Reading, Error>,
}

impl Runner {
    /// As the configuration has it.
    pub fn new(db: Db, power: Arc<dyn Power>, usage: Usage, config: &config::Power) -> Self {
        let limit = |minutes: u32| SignedDuration::from_mins(minutes.into());
        Self {
            db,
            power,
            usage,
            rules: config.rules(),
            off_limit: limit(config.off_limit_minutes),
            on_limit: limit(config.on_limit_minutes),
        }
    }

    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        // Cancel safe: what was stored is stored, and a call that is broken off is made again.
        stop.run_until_cancelled(futures::future::join(self.switch(), self.decide()))
            .await;
    }

    async fn switch(&self) {
        let mut changes = self.db.watch();
        let mut tracks = BTreeMap::<HostName, Track>::new();
        let mut calls = JoinSet::new();
        let mut under_way = BTreeSet::new();
        loop {
            let state = changes.borrow_and_update().clone();
            let asleep: Vec<_> = state
                .hosts
                .values()
                .filter(|host| host.is_asleep())
                .cloned()
                .collect();
            if asleep.is_empty() && calls.is_empty() {
                tracks.clear();
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_none() && state.replaced_by.is_none() {
                tracks.retain(|name, _| state.hosts.get(name).is_some_and(|host| host.is_asleep()));
                for host in &asleep {
                    self.awake(&state, host).await;
                    let free = calls.len() < AT_ONCE && !under_way.contains(&host.name);
                    if free && let Some(call) = self.next(&state, host, &mut tracks).await {
                        under_way.insert(host.name.clone());
                        calls.spawn(call);
                    }
                }
            }
            drop(state);
            // Cancel safe: a call that has ended is there at the next look.
            tokio::select! {
                biased;
                Some(Ok(called)) = calls.join_next() => {
                    under_way.remove(&called.host);
                    self.take(called, &mut tracks).await;
                }
                () = sleep(LOOK) => {}
            }
        }
    }

    /// A host that reports is on, whoever has switched it.
    async fn awake(&self, state: &State, host: &HostRecord) {
        let Some(power) = &host.power else { return };
        let after = match power.phase {
            PowerPhase::PoweringOn => power.since,
            PowerPhase::Off => power.since.saturating_add(LATE).unwrap_or(power.since),
            _ => return,
        };
        let heard = |state: &State| {
            let live = state.live.get(&host.name);
            live.is_some_and(|live| {
                live.state == HostState::Ready && live.report_time.is_some_and(|time| time >= after)
            })
        };
        if heard(state) {
            let (phase, since) = (power.phase, power.since);
            self.change(&host.name, phase, since, |tx, host, power| {
                let message = match phase {
                    PowerPhase::Off => "reports, although nobody here has switched it on",
                    _ => "on, and reports",
                };
                tx.event(EventKind::Host, "HostOn", &host.name, message, None);
                let now = tx.now();
                let principal = power.principal.clone();
                power.at(PowerPhase::On, principal, now)
            })
            .await;
        }
    }

    /// The call that is due for a host.
    async fn next(
        &self,
        state: &State,
        host: &HostRecord,
        tracks: &mut BTreeMap<HostName, Track>,
    ) -> Option<impl Future<Output = Called> + Send + use<>> {
        let power = host.power.as_ref()?;
        let reset = match power.phase {
            PowerPhase::PoweringOff if power.forced => Reset::ForceOff,
            PowerPhase::PoweringOff => Reset::GracefulShutdown,
            PowerPhase::PoweringOn => Reset::On,
            PowerPhase::On | PowerPhase::Off => return None,
        };
        let now = Instant::now();
        let way = (power.phase, power.since);
        let new = || Track {
            way,
            begun: self.db.now(),
            next: now,
            pause: PAUSE,
            ordered: None,
        };
        let track = tracks.entry(host.name.clone()).or_insert_with(new);
        if track.way != way {
            *track = new();
        }
        if track.next > now {
            return None;
        }
        // Somebody may have started a VM there since.
        if power.phase == PowerPhase::PoweringOff
            && let Some(vm) = look::running(state, &host.name).next()
        {
            let message = format!("not switched off: VM {} runs there", vm.name);
            self.give_up(host, power, message).await;
            return None;
        }
        let again = |at: Instant| now.saturating_duration_since(at) >= AGAIN;
        let order = track.ordered.is_none_or(again).then_some(reset);
        let (client, machine) = (self.power.clone(), power.redfish.clone());
        let (host, phase, since) = (host.name.clone(), power.phase, power.since);
        Some(async move {
            let (ordered, outcome) = call(&*client, &machine, phase, order).await;
            Called {
                host,
                phase,
                since,
                ordered,
                outcome,
            }
        })
    }

    /// Takes over what a call came to.
    async fn take(&self, called: Called, tracks: &mut BTreeMap<HostName, Track>) {
        let now = Instant::now();
        let way = (called.phase, called.since);
        let mut begun = called.since;
        if let Some(track) = tracks.get_mut(&called.host).filter(|track| track.way == way) {
            let longest = if called.outcome.is_ok() {
                LONGEST
            } else {
                LONGEST_FAILED
            };
            begun = track.begun;
            track.next = now + track.pause;
            track.pause = (track.pause * 2).min(longest);
            track.ordered = called.ordered.then_some(now).or(track.ordered);
        }
        let fault = called
            .outcome
            .as_ref()
            .err()
            .map(ToString::to_string)
            .unwrap_or_default();
        if !fault.is_empty() {
            tracing::warn!(host = %called.host, fault, "a management controller does not do what it is asked; it is asked again");
        }
        let is_off = called.outcome.as_ref().is_ok_and(Reading::is_off);
        let (off_limit, on_limit) = (self.off_limit, self.on_limit);
        self.change(&called.host, called.phase, called.since, |tx, host, power| {
            let now = tx.now();
            let since = now.duration_since(begun);
            match power.phase {
                PowerPhase::PoweringOff if is_off => gone(tx, host, power),
                PowerPhase::PoweringOff if since >= off_limit => {
                    let why = if fault.is_empty() {
                        "it did not shut down in time"
                    } else {
                        &fault
                    };
                    let message = format!(
                        "not switched off: {why}. `dalgu host power off {} --force` cuts it off",
                        host.name
                    );
                    still_on(tx, host, power, message)
                }
                PowerPhase::PoweringOn if since >= on_limit && !power.overdue => {
                    let why = if fault.is_empty() {
                        "its agent has not reported"
                    } else {
                        &fault
                    };
                    let message = format!("not back {} s after it was switched on: {why}", since.as_secs());
                    tracing::error!(host = %host.name, why, "a host that was switched on is not back");
                    tx.event(EventKind::Host, "HostNotBack", &host.name, message, None);
                    HostPower {
                        overdue: true,
                        fault,
                        ..power
                    }
                }
                _ => HostPower { fault, ..power },
            }
        })
        .await;
    }

    async fn give_up(&self, host: &HostRecord, power: &HostPower, message: String) {
        self.change(&host.name, power.phase, power.since, |tx, host, power| {
            still_on(tx, host, power, message)
        })
        .await;
    }

    /// Changes the power of a host, if it is still where it was seen.
    async fn change(
        &self,
        name: &HostName,
        phase: PowerPhase,
        since: Timestamp,
        change: impl FnOnce(&mut Tx, &HostRecord, HostPower) -> HostPower,
    ) {
        self.db
            .change(|tx| {
                let Some(host) = tx.hosts.get(name).cloned() else {
                    return;
                };
                let seen = host
                    .power
                    .clone()
                    .filter(|power| (power.phase, power.since) == (phase, since));
                let Some(power) = seen else { return };
                let new = change(tx, &host, power.clone());
                if new != power {
                    tx.put_host(HostRecord {
                        power: Some(new),
                        ..(*host).clone()
                    });
                    tx.touch_host(name);
                }
            })
            .await;
    }

    async fn decide(&self) {
        let Some(rules) = self.rules else { return };
        let mut tick = interval(DECIDE);
        let mut idle = BTreeMap::<HostName, Timestamp>::new();
        loop {
            tick.tick().await;
            let (state, now) = (self.db.snapshot(), self.db.now());
            let may = state.meta.observing.is_none() && state.replaced_by.is_none();
            let waits = state
                .live
                .values()
                .any(|live| live.state == HostState::Initializing);
            if !may || waits || state.hosts.values().all(|host| host.power.is_none()) {
                continue;
            }
            let (usage, before) = (self.usage.clone(), std::mem::take(&mut idle));
            let (after, switches) = beside(move || {
                let hosts = look::idle(&state).cloned();
                let idle: BTreeMap<_, _> = hosts
                    .map(|host| {
                        let since = before.get(&host).copied().unwrap_or(now);
                        (host, since)
                    })
                    .collect();
                let (fleet, rows) = look::fleet(&state, &usage, &idle, now);
                let switches = policy::decide(fleet, &rules);
                let named = switches.into_iter().map(|switch| match switch {
                    Switch::On(slot, why) => (rows.host(slot).clone(), Some(why)),
                    Switch::Off(slot) => (rows.host(slot).clone(), None),
                });
                (idle, named.collect::<Vec<_>>())
            })
            .await;
            idle = after;
            for (host, why) in switches {
                self.order(&host, why).await;
            }
        }
    }

    /// Orders what was decided. What stands against it by now is no fault: it is decided anew in a moment.
    async fn order(&self, host: &HostName, why: Option<policy::Why>) {
        let name = host.as_str();
        let done = self.db.transact(|tx| match why {
            Some(why) => host_power::on(tx, PRINCIPAL, name, why.as_str()),
            None => host_power::off(tx, PRINCIPAL, name, Off::default(), None, "nobody needs it"),
        });
        match done.await {
            Ok(_) => tracing::info!(%host, why = why.map(policy::Why::as_str), "a host is switched"),
            Err(error) => tracing::info!(%host, %error, "a host is not switched"),
        }
    }
}

/// It is off.
fn gone(tx: &mut Tx, host: &HostRecord, power: HostPower) -> HostPower {
    let now = tx.now();
    tx.event(EventKind::Host, "HostOff", &host.name, "off", None);
    let (principal, then_on) = (power.principal.clone(), power.then_on.clone());
    match then_on {
        Some(who) => {
            let message = "on again, as was asked for meanwhile";
            tx.event(EventKind::Host, "HostPoweringOn", &host.name, message, None);
            power.at(PowerPhase::PoweringOn, who, now)
        }
        None => power.at(PowerPhase::Off, principal, now),
    }
}

/// It stays on. Whether it is heard from says how it is.
fn still_on(tx: &mut Tx, host: &HostRecord, power: HostPower, message: String) -> HostPower {
    let now = tx.now();
    tx.event(
        EventKind::Host,
        "HostPowerOffFailed",
        &host.name,
        message.clone(),
        None,
    );
    tracing::warn!(host = %host.name, message, "a host is not switched off");
    if tx
        .live
        .get(&host.name)
        .is_some_and(|live| live.state == HostState::Unreachable)
    {
        let message = "no report since it was to be switched off";
        tx.event(EventKind::Host, "HostUnreachable", &host.name, message, None);
    }
    let principal = power.principal.clone();
    HostPower {
        fault: message,
        ..power.at(PowerPhase::On, principal, now)
    }
}

/// One call: how the machine is, and the order where it is not yet as it should be.
async fn call(
    client: &dyn Power,
    machine: &Redfish,
    phase: PowerPhase,
    order: Option<Reset>,
) -> (bool, Result<Reading, Error>) {
    let reading = match client.read(machine).await {
        Ok(reading) => reading,
        Err(error) => return (false, Err(error)),
    };
    let there = match phase {
        PowerPhase::PoweringOff => reading.is_off(),
        _ => !reading.is_off(),
    };
    match order.filter(|_| !there) {
        None => (false, Ok(reading)),
        Some(reset) => match client.reset(machine, reset).await {
            Ok(()) => (true, Ok(reading)),
            Err(error) => (false, Err(error)),
        },
    }
}

#[cfg(test)]
mod tests;
