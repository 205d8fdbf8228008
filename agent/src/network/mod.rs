//! The networks of the site on this host: bridges, tunnels, filters, addresses and names, for the VMs that are here.
//!
//! ```text
//!   controller ── ApplyNetworks ──> server ──> Kept (in the ledger) ─┐
//!   VM tasks ──── hold ────> interfaces that are here ───────────────┴─> compile ──> System: makes the difference
//!   VM tasks <─── ready ──── what has been made, or why it has not
//! ```
//!
//! [`Networks`] is how the rest of the agent speaks to it. One owner ([`Networks::run`]) makes what is wanted whenever that has
//! changed, again after a failure, and now and then in case somebody else changed something. It does not begin before all
//! VMs of the ledger are known: what is in the kernel serves them meanwhile. Without a document it touches nothing.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use dalgu_proto::{
    host::GuestFeature,
    ids::{NetworkName, VmId},
    network::Network,
};
use futures::{
    FutureExt as _,
    future::{BoxFuture, join_all, select_all},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::ledger::{self, Ledger};

pub mod compile;
mod counts;
pub mod document;
mod ear;
pub mod links;
pub mod names;
mod process;
mod relay;
pub mod rules;
pub mod server;
pub mod service;
mod simulated;
mod system;

pub use compile::Wanted;
pub use document::{Document, HostNetwork, Kept, Plugged, plugged};
pub use simulated::Simulated;
pub use system::Linux;

/// Whoever waits for something to be made asks again after this time.
const PATIENCE: Duration = Duration::from_secs(2);
/// As [`PATIENCE`], for the controller: its call lasts longer.
const TOLD_PATIENCE: Duration = Duration::from_secs(5);
/// First wait before what failed is tried again; doubles up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Longest wait before what failed is tried again.
const MAX_RETRY: Duration = Duration::from_secs(30);
/// So long after a VM has come it is guessed who began the connections that it brought.
const GUESSING: Duration = Duration::from_mins(5);
/// What has been made is compared with what is there so often.
const RESYNC: Duration = Duration::from_secs(30);

/// Why what the controller tells is not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is old.
    #[error("version {given} of the networks is older than {known}, which this host was told before")]
    Stale {
        /// In the request.
        given: u64,
        /// Known here.
        known: u64,
    },
    /// The same version, with other content.
    #[error("version {0} of the networks is known here with other content")]
    Conflict(u64),
    /// It could not be written down.
    #[error("the networks could not be written down")]
    Ledger(#[from] ledger::Error),
    /// It cannot be made.
    #[error("{0}")]
    NotMade(String),
}

/// Why an interface of a VM may not be used yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The controller has not told all of it.
    #[error("waits to be told of {0}")]
    Unknown(String),
    /// It is being made.
    #[error("its networks are being made on this host")]
    Making,
    /// It cannot be made; it is tried again.
    #[error("its networks cannot be made on this host: {0}")]
    Failed(String),
}

impl NotReady {
    /// Stable reason.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Unknown(_) | Self::Making => "NETWORK_NOT_READY",
            Self::Failed(_) => "NETWORK",
        }
    }
}

/// What could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems {
    /// Of everything: the filters.
    pub all: Option<String>,
    /// Of one network.
    pub networks: BTreeMap<NetworkName, String>,
}

impl Problems {
    fn is_empty(&self) -> bool {
        self.all.is_none() && self.networks.is_empty()
    }

    fn of(&self, network: &NetworkName) -> Option<&String> {
        self.all.as_ref().or_else(|| self.networks.get(network))
    }

    fn say(&self) -> String {
        let networks = self.networks.iter();
        let lines = networks.map(|(network, problem)| format!("network {network}: {problem}"));
        self.all
            .iter()
            .cloned()
            .chain(lines)
            .collect::<Vec<_>>()
            .join("; ")
    }
}

/// What acts on the host.
#[async_trait]
pub trait System: Send + Sync {
    /// What the host can do, found out by trying.
    async fn features(&self) -> Vec<GuestFeature>;

    /// Where other hosts' overlays reach it.
    fn overlay_address(&self) -> Option<IpAddr>;

    /// Makes what is not as it is wanted; the filters before anything else, and nothing else where they cannot be loaded.
    async fn make(&self, wanted: &Wanted) -> Problems;

    /// Returns when something that was made has gone by itself. Cancel safe.
    async fn broken(&self);

    /// An interface has arrived with its VM: what comes for it goes to its tap from now on.
    async fn arrived(&self, plugged: &Plugged);

    /// When the guest behind a tap first speaks from now on; `None` where that cannot be heard.
    async fn first_word(&self, tap: &str) -> Option<BoxFuture<'static, Instant>>;

    /// Ends what it started.
    async fn stop(&self);
}

/// What has been made.
#[derive(Debug, Clone, Default)]
struct Made {
    /// Of this count of changes.
    count: u64,
    problems: Problems,
}

#[derive(Default)]
struct State {
    kept: Kept,
    held: BTreeMap<VmId, Vec<Plugged>>,
    numbers: BTreeMap<String, u16>,
    /// Taps of VMs that come, or have come: until when it is guessed what they bring.
    arrived: BTreeMap<String, Instant>,
}

impl State {
    fn here(&self) -> Vec<Plugged> {
        self.held.values().flatten().cloned().collect()
    }

    fn wanted(&mut self, overlay_address: Option<IpAddr>) -> Wanted {
        let here = self.here();
        if self.kept.left_out != Document::default() {
            // What an interface needed may be needed no more.
            self.kept = self.kept.told(self.kept.told.clone(), &here);
        }
        let ports = compile::number(&self.numbers, here);
        let numbers = ports
            .iter()
            .map(|(plugged, number)| (plugged.tap.clone(), *number));
        self.numbers = numbers.collect();
        let now = Instant::now();
        let numbers = &self.numbers;
        self.arrived
            .retain(|tap, until| *until > now && numbers.contains_key(tap));
        let arrived = self.arrived.keys().cloned().collect();
        compile::compile(&self.kept, &ports, &arrived, overlay_address)
    }
}

struct Shared {
    system: Arc<dyn System>,
    ledger: Ledger,
    state: Mutex<State>,
    /// Held while a document is judged and written.
    telling: tokio::sync::Mutex<()>,
    /// Counts changes of what is wanted.
    wanted: watch::Sender<u64>,
    made: watch::Sender<Made>,
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Networks(Arc<Shared>);

impl Networks {
    /// What was kept, over what acts.
    pub fn new(system: Arc<dyn System>, ledger: Ledger, kept: Option<Kept>) -> Self {
        let state = State {
            kept: kept.unwrap_or_default(),
            ..State::default()
        };
        Self(Arc::new(Shared {
            system,
            ledger,
            state: Mutex::new(state),
            telling: tokio::sync::Mutex::default(),
            wanted: watch::Sender::new(1),
            made: watch::Sender::default(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is changed under the lock is whole after each statement, so a panic elsewhere does not spoil it.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the host can do.
    pub async fn features(&self) -> Vec<GuestFeature> {
        self.0.system.features().await
    }

    /// Where other hosts' overlays reach it.
    pub fn overlay_address(&self) -> Option<IpAddr> {
        self.0.system.overlay_address()
    }

    /// A VM has these interfaces here, or will have. With `full` it has no others.
    pub fn hold(&self, vm: VmId, ports: impl IntoIterator<Item = Plugged>, full: bool) {
        let mut ports: Vec<_> = ports.into_iter().collect();
        let mut state = self.state();
        let before = state.held.remove(&vm).unwrap_or_default();
        if !full {
            let taps: Vec<_> = ports.iter().map(|plugged| plugged.tap.clone()).collect();
            ports.extend(before.iter().filter(|old| !taps.contains(&old.tap)).cloned());
        }
        ports.sort_by(|a, b| a.tap.cmp(&b.tap));
        let changed = before != ports;
        if !ports.is_empty() {
            state.held.insert(vm, ports);
        }
        drop(state);
        if changed {
            self.0.wanted.send_modify(|count| *count += 1);
        }
    }

    /// Takes over what the controller says; returns when it holds.
    ///
    /// # Errors
    /// If it is old, or cannot be kept or made.
    pub async fn tell(&self, told: Document) -> Result<(), Error> {
        let telling = self.0.telling.lock().await;
        let (before, here) = {
            let state = self.state();
            (state.kept.clone(), state.here())
        };
        let (given, known) = (told.version, before.told.version);
        if given < known {
            return Err(Error::Stale { given, known });
        }
        if given == known && told != before.told {
            return Err(Error::Conflict(given));
        }
        let kept = before.told(told, &here);
        if kept != before {
            self.0.ledger.save_networks(&kept).await?;
            self.state().kept = kept;
            self.0.wanted.send_modify(|count| *count += 1);
            tracing::info!(version = given, "the networks of this host have changed");
        }
        drop(telling);
        match self.made(TOLD_PATIENCE).await {
            None => Err(Error::NotMade("it is being made; ask again".to_owned())),
            Some(problems) if problems.is_empty() => Ok(()),
            Some(problems) => Err(Error::NotMade(problems.say())),
        }
    }

    /// What could not be made of what is wanted now; `None` when that is not known in time.
    async fn made(&self, patience: Duration) -> Option<Problems> {
        let wanted = *self.0.wanted.borrow();
        let mut made = self.0.made.subscribe();
        let made = timeout(patience, made.wait_for(|made| made.count >= wanted)).await;
        Some(made.ok()?.ok()?.problems.clone())
    }

    /// What was told of the networks of a VM's interfaces.
    ///
    /// # Errors
    /// If not all of it was.
    pub fn known(&self, ports: &[Plugged]) -> Result<Vec<Network>, NotReady> {
        let state = self.state();
        if let Some(missing) = ports.iter().find_map(|plugged| state.kept.missing(plugged)) {
            return Err(NotReady::Unknown(missing));
        }
        let networks = state.kept.networks().map(|known| &known.network);
        let plugs = |network: &&Network| ports.iter().any(|plugged| plugged.port.network == network.name);
        Ok(networks.filter(plugs).cloned().collect())
    }

    /// Whether a VM's interfaces may be used: their rules are loaded, and their networks are here.
    ///
    /// # Errors
    /// Says why not.
    pub async fn ready(&self, ports: &[Plugged]) -> Result<(), NotReady> {
        if ports.is_empty() {
            return Ok(());
        }
        self.known(ports)?;
        let problems = self.made(PATIENCE).await.ok_or(NotReady::Making)?;
        let problem = ports
            .iter()
            .find_map(|plugged| problems.of(&plugged.port.network));
        problem.map_or(Ok(()), |problem| Err(NotReady::Failed(problem.clone())))
    }

    /// A VM with these interfaces may come here by a migration; before [`Networks::ready`] is asked.
    pub fn expect(&self, ports: &[Plugged]) {
        let until = Instant::now() + GUESSING;
        let mut changed = false;
        for plugged in ports {
            changed |= self.state().arrived.insert(plugged.tap.clone(), until).is_none();
        }
        if changed {
            self.0.wanted.send_modify(|count| *count += 1);
        }
    }

    /// What is to be known at once when a VM goes on here after a migration.
    pub async fn arrived(&self, ports: &[Plugged]) {
        self.expect(ports);
        for plugged in ports {
            self.0.system.arrived(plugged).await;
        }
    }

    /// When a VM first speaks here from now on, by any of its interfaces; `None` where that cannot be heard, or it has none.
    pub async fn first_word(&self, ports: &[Plugged]) -> Option<BoxFuture<'static, Instant>> {
        let taps = ports.iter().map(|plugged| self.0.system.first_word(&plugged.tap));
        let words: Vec<_> = join_all(taps).await.into_iter().flatten().collect();
        (!words.is_empty()).then(|| select_all(words).map(|(first, ..)| first).boxed())
    }

    /// Makes what is wanted, until `stop` is cancelled.
    pub async fn run(&self, stop: CancellationToken) {
        let mut wanted = self.0.wanted.subscribe();
        let mut wait = FIRST_RETRY;
        loop {
            let count = *wanted.borrow_and_update();
            let problems = self.make().await;
            let next = match problems.is_empty() {
                true => RESYNC,
                false => wait,
            };
            wait = match problems.is_empty() {
                true => FIRST_RETRY,
                false => (wait * 2).min(MAX_RETRY),
            };
            if !problems.is_empty() {
                tracing::warn!(
                    problems = problems.say(),
                    "networks cannot be made as they should be"
                );
            }
            self.0.made.send_replace(Made { count, problems });
            let again = Instant::now() + next;
            // Every arm is cancel safe: a token, a counter that is looked at again, and timers.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = wanted.changed() => wait = FIRST_RETRY,
                () = self.0.system.broken() => {}
                () = sleep_until(again), if self.acts() => {}
            }
        }
        self.0.system.stop().await;
    }

    /// Whether there is anything to keep right.
    fn acts(&self) -> bool {
        self.state().kept != Kept::default()
    }

    async fn make(&self) -> Problems {
        if !self.acts() {
            return Problems::default();
        }
        let wanted = self.state().wanted(self.overlay_address());
        let mut problems = self.0.system.make(&wanted).await;
        problems.networks.extend(wanted.impossible);
        problems
    }
}

#[cfg(test)]
mod tests;
