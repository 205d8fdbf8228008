//! Makes the agent known to the controller and tells it on a timer what is true here. The reports are the heartbeat.
//!
//! ```text
//!   ┌──> Register ──ok──> Report, Report, Report, … ──"register again"──┐
//!   └──────────────── wait, doubling up to the interval <───failure─────┘
//!                     (each agent a little less than others)
//! ```
//!
//! A VM's change is told at once, not at the next tick. Losing the controller stops nothing on the host; losing the
//! hypervisor is told, and nothing is said of what is not there then.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use dalgu_proto::{
    agent::v1::{
        ImageInventory, RegisterRequest, ReportRequest, registrar_service_client::RegistrarServiceClient,
    },
    host::{Inventory, VmUsage},
    ids::{Session, Term, VmId},
    reason,
    time::duration_from_wire,
    tls::client::Caller,
    v1,
};
use futures::future::BoxFuture;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic_prost::prost::Message as _;
use uuid::Uuid;

use crate::{
    gate::Gate,
    hypervisor::{self, Connection, Domain},
    images::Images,
    metrics::Snapshot,
    vm::Vms,
    wire,
};

/// Longest wait for an answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest wait of a report for the hypervisor's list of domains.
const LIST_WAIT: Duration = Duration::from_secs(1);
/// A hypervisor that has not listed its domains for so long is told of as out of order. Before that it is only busy: on a
/// host where many VMs start at once, listing waits for them.
const SILENT: Duration = Duration::from_secs(10);
/// First wait after a failure.
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// A registration waits so long for the hypervisor to say what it is; later it is told with a report.
const DESCRIPTION_WAIT: Duration = Duration::from_secs(3);
/// Interval until the controller has said another.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(3);
/// Least time between two reports, so that a burst of changes is one or two.
const GATHER: Duration = Duration::from_millis(50);

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host belongs to another site.
    #[error("the controller is not this host's; if the host is to change sites, empty its data directory")]
    Foreign(#[source] crate::gate::Error),
    /// The ledger was copied from another machine.
    #[error(
        "the data directory was copied from machine {of}, this is machine {own}: nothing of it is acted upon. Empty it, and give \
         this machine a name and a certificate of its own; a machine that was set up anew gets its old /etc/machine-id back"
    )]
    Copied {
        /// The machine it is of.
        of: Uuid,
        /// This machine.
        own: Uuid,
    },
}

enum Failed {
    Call(tonic::Status),
    Foreign(crate::gate::Error),
}

/// What a registration brought.
struct Registered {
    session: Session,
    interval: Duration,
    told: Told,
}

/// What the controller was told, and is told again only when it has changed.
struct Told {
    inventory: std::sync::Arc<Inventory>,
    images: ImageInventory,
}

/// See the module's documentation.
pub struct Reporter {
    /// Client of the controller.
    pub client: RegistrarServiceClient<Caller>,
    /// Where controller and peers reach this agent.
    pub address: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// UUID of this run.
    pub run_id: String,
    /// Remembers what the controller said.
    pub gate: std::sync::Arc<Gate>,
    /// The VMs.
    pub vms: Vms,
    /// The store of images.
    pub images: Images,
    /// The samples.
    pub samples: watch::Receiver<std::sync::Arc<Snapshot>>,
    /// Size of the last report on the wire, for the metrics page.
    pub report_bytes: Gauge,
    /// Number of the last registration or report of this run.
    pub sequence: u64,
}

impl Reporter {
    /// Registers and reports until the agent stops.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), Error> {
        let mut wait = FIRST_RETRY;
        for attempt in 0_u64.. {
            let outcome = tokio::select! {
                biased;
                // Dropping a call half-way is what a lost connection does too; the controller bears it.
                () = stop.cancelled() => return Ok(()),
                outcome = self.work(&mut wait) => outcome,
            };
            match outcome {
                Failed::Foreign(error) => return Err(Error::Foreign(error)),
                Failed::Call(status) => {
                    let code = status.code();
                    let reason = reason::of(&status);
                    if reason.as_deref() == Some("OTHER_MACHINE") {
                        tracing::error!(
                            message = status.message(),
                            "the controller knows another machine by this host's identity"
                        );
                    }
                    tracing::warn!(
                        ?code,
                        reason,
                        message = status.message(),
                        "the controller cannot be told"
                    );
                }
            }
            // Cancel safe: a timer.
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(spread(wait, &self.run_id, attempt)) => {}
            }
            wait = (wait * 2).min(DEFAULT_INTERVAL);
        }
        Ok(())
    }

    /// Tells the controller that this machine has another one's ledger, so that an operator hears of it, and gives up.
    pub async fn disown(mut self, stop: CancellationToken) -> Result<(), Error> {
        let (Some(of), Some(own)) = (self.gate.copied_from().await, self.gate.machine()) else {
            return Ok(());
        };
        tokio::select! {
            biased;
            // As in `run`.
            () = stop.cancelled() => {}
            // It is refused; where it cannot be told, the next start tries again.
            _ = self.register() => {}
        }
        Err(Error::Copied { of, own })
    }

    /// Registers, then reports until something fails or the controller wants a new registration.
    async fn work(&mut self, wait: &mut Duration) -> Failed {
        loop {
            let registered = match self.register().await {
                Ok(registered) => registered,
                Err(failed) => return failed,
            };
            *wait = FIRST_RETRY;
            let Registered {
                session, interval, ..
            } = registered;
            tracing::info!(%session, ?interval, "registered with the controller");
            if let Err(status) = self.report_until_refused(registered).await {
                return Failed::Call(status);
            }
        }
    }

    /// The first sample comes soon after the start; the hypervisor's description with it, if it answers.
    async fn first_sample(&mut self) -> Result<std::sync::Arc<Snapshot>, Failed> {
        let stopping = |_| Failed::Call(tonic::Status::unavailable("no samples: the agent is stopping"));
        let sampled = self.samples.wait_for(|snapshot| snapshot.usage.is_some()).await;
        let sampled = sampled.map_err(stopping)?.clone();
        let described = self
            .samples
            .wait_for(|snapshot| snapshot.usage.is_some() && !snapshot.inventory.hypervisor.is_empty());
        match timeout(DESCRIPTION_WAIT, described).await {
            Ok(described) => Ok(described.map_err(stopping)?.clone()),
            Err(_) => Ok(sampled),
        }
    }

    async fn register(&mut self) -> Result<Registered, Failed> {
        let snapshot = self.first_sample().await?;
        // What is known here is complete only if it was so before it was looked at.
        let recovered = self.gate.is_open();
        let mut known = self.vms.present();
        let (domains, error) = match self.vms.hypervisor().list().await {
            Ok(domains) => (Some(domains).filter(|_| recovered), String::new()),
            Err(error) => (None, error.to_string()),
        };
        if domains.is_none() {
            tracing::warn!(error, "registering without a list of what is here");
        }
        let host = self.gate.host().await;
        known.extend(self.vms.present());
        let images = self.images().await;
        let request = RegisterRequest {
            host: self.gate.own().to_string(),
            address: self.address.clone(),
            boot_id: self.boot_id.clone(),
            agent_run_id: self.run_id.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            inventory: Some((*snapshot.inventory).clone().into()),
            usage: snapshot.usage.as_ref().map(|(_, usage)| (**usage).clone().into()),
            vms: wire::reports(self.vms.statuses(), &usages(&snapshot)),
            inventory_complete: domains.is_some(),
            unmanaged_domains: unmanaged(domains.as_deref(), &known),
            hypervisor_error: error,
            session: host.session.0,
            cluster_id: host
                .cluster
                .map(|cluster| cluster.to_string())
                .unwrap_or_default(),
            machine_id: text(self.gate.machine()),
            state_machine_id: text(host.machine),
            controller_term: host.term.0,
            controller_run_id: text(host.run),
            sequence: Some(self.next_sequence()),
            images: Some(images.clone()),
        };
        // Boxed: the compiler does not see through this future in a task.
        let call: BoxFuture<'_, _> = Box::pin(self.client.register(request));
        let answer = timeout(DEADLINE, call).await.map_err(|_| Failed::Call(late()))?;
        let answer = answer.map_err(Failed::Call)?.into_inner();
        let cluster = answer.cluster_id.parse().map_err(|_| {
            Failed::Call(tonic::Status::internal(
                "the controller's cluster_id is not a UUID",
            ))
        })?;
        self.gate
            .registered(
                cluster,
                Session(answer.session),
                Term(answer.term),
                answer.controller_run_id.parse().ok(),
            )
            .await
            .map_err(|error| match error {
                // It is not this controller's turn; the right one may answer the next time. Ending would cut migrations
                // and change nothing.
                error @ (crate::gate::Error::OtherController { .. }
                | crate::gate::Error::StaleTerm { .. }
                | crate::gate::Error::WrongSession { .. }) => {
                    tracing::error!(
                        %error,
                        "this is not the controller that the host obeys: a second one with this site's credentials must be \
                         stopped, one that was set back must be restored from a backup"
                    );
                    Failed::Call(tonic::Status::failed_precondition(error.to_string()))
                }
                crate::gate::Error::Ledger(error) => {
                    Failed::Call(tonic::Status::unavailable(error.to_string()))
                }
                error => Failed::Foreign(error),
            })?;
        let interval = answer
            .report_interval
            .as_ref()
            .and_then(duration_from_wire)
            .unwrap_or(DEFAULT_INTERVAL);
        Ok(Registered {
            session: Session(answer.session),
            interval: interval.clamp(Duration::from_millis(100), Duration::from_mins(1)),
            told: Told {
                inventory: snapshot.inventory.clone(),
                images,
            },
        })
    }

    /// Returns `Ok` when the controller wants a new registration.
    async fn report_until_refused(&mut self, registered: Registered) -> Result<(), tonic::Status> {
        let Registered {
            session,
            interval,
            mut told,
        } = registered;
        let mut changes = self.vms.changes();
        let mut image_changes = self.images.changes();
        let mut last = Instant::now();
        let mut listed = last;
        loop {
            // Cancel safe: a receiver loses nothing when dropped, and the timer is made anew.
            tokio::select! {
                biased;
                () = sleep_until(last + interval) => {}
                // A single change is told at once: whoever waits for it should not wait longer.
                _ = changes.changed() => sleep_until(last + GATHER).await,
                _ = image_changes.changed() => sleep_until(last + GATHER).await,
            }
            last = Instant::now();
            changes.mark_unchanged();
            image_changes.mark_unchanged();
            let sequence = self.next_sequence();
            let request = self.report(session, sequence, &mut told, &mut listed).await;
            self.report_bytes
                .set(i64::try_from(request.encoded_len()).unwrap_or(i64::MAX));
            let call: BoxFuture<'_, _> = Box::pin(self.client.report(request));
            let answer = timeout(DEADLINE, call).await.map_err(|_| late())??.into_inner();
            if answer.register_again {
                return Ok(());
            }
        }
    }

    /// What is here of images. The heartbeat does not wait for a slow file system.
    async fn images(&self) -> ImageInventory {
        // Without an answer the last figure stands.
        let _ = timeout(LIST_WAIT, self.images.look_at_room()).await;
        self.images.inventory()
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    async fn report(
        &self,
        session: Session,
        sequence: u64,
        told: &mut Told,
        listed: &mut Instant,
    ) -> ReportRequest {
        let snapshot = self.samples.borrow().clone();
        let changed = !told.inventory.is_same_as(&snapshot.inventory);
        if changed {
            told.inventory = snapshot.inventory.clone();
        }
        let images = self.images().await;
        let other_images = worth_telling(&told.images, &images);
        if other_images {
            told.images.clone_from(&images);
        }
        // What is known here is complete only if it was so before it was looked at.
        let recovered = self.gate.is_open();
        let mut known = self.vms.present();
        let down = match &*self.vms.hypervisor().connection().borrow() {
            Connection::Up => None,
            Connection::Down(why) => Some(why.clone()),
        };
        let (domains, error) = match down {
            Some(why) => (None, why),
            // The heartbeat does not wait for a slow hypervisor.
            None => {
                let answer = timeout(LIST_WAIT, self.vms.hypervisor().list()).await.ok();
                if matches!(answer, Some(Ok(_))) {
                    *listed = Instant::now();
                }
                inventory_of(answer, listed.elapsed())
            }
        };
        let domains = domains.filter(|_| recovered);
        known.extend(self.vms.present());
        ReportRequest {
            host: self.gate.own().to_string(),
            session: session.0,
            boot_id: self.boot_id.clone(),
            agent_run_id: self.run_id.clone(),
            sequence,
            usage: snapshot.usage.as_ref().map(|(_, usage)| (**usage).clone().into()),
            vms: wire::reports(self.vms.statuses(), &usages(&snapshot)),
            inventory_complete: domains.is_some(),
            unmanaged_domains: unmanaged(domains.as_deref(), &known),
            hypervisor_error: error,
            inventory: changed.then(|| (*snapshot.inventory).clone().into()),
            images: other_images.then_some(images),
        }
    }
}

/// Whether the controller is to be told of images. Free room changes all the time, and is told with the rest or when it has
/// changed by much.
fn worth_telling(told: &ImageInventory, now: &ImageInventory) -> bool {
    let room = told.available_bytes.abs_diff(now.available_bytes);
    room > told.available_bytes / 16 || (&told.images, told.used_bytes) != (&now.images, now.used_bytes)
}

/// The domains, if they could be listed, and what is wrong with the hypervisor, if anything is. `None` is no answer in
/// time; `silent` is the time since the last list.
fn inventory_of(
    answer: Option<Result<Vec<Domain>, hypervisor::Error>>,
    silent: Duration,
) -> (Option<Vec<Domain>>, String) {
    match answer {
        Some(Ok(domains)) => (Some(domains), String::new()),
        Some(Err(error)) => (None, error.to_string()),
        None if silent < SILENT => (None, String::new()),
        None => (
            None,
            format!("the hypervisor has not answered for {} s", silent.as_secs()),
        ),
    }
}

fn unmanaged(domains: Option<&[Domain]>, known: &BTreeSet<VmId>) -> Vec<v1::UnmanagedDomain> {
    domains
        .map(|domains| wire::unmanaged(domains, known))
        .unwrap_or_default()
}

/// A wait, shorter by up to half: thousands of agents that have lost the controller at one moment do not come back at one.
/// By how much follows from the run's id, so that the same run waits the same.
fn spread(wait: Duration, run: &str, attempt: u64) -> Duration {
    let mut hasher = DefaultHasher::new();
    (run, attempt).hash(&mut hasher);
    let part = u32::from(u8::try_from(hasher.finish() & 0xff).unwrap_or(0));
    wait - wait / 2 * part / 0xff
}

fn text(machine: Option<Uuid>) -> String {
    machine.map(|id| id.to_string()).unwrap_or_default()
}

fn late() -> tonic::Status {
    tonic::Status::deadline_exceeded("the controller did not answer in time")
}

fn usages(snapshot: &Snapshot) -> BTreeMap<VmId, VmUsage> {
    snapshot
        .vms
        .iter()
        .filter_map(|vm| Some((vm.id, vm.usage.clone()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hypervisor_that_is_slow_for_a_moment_is_busy_and_not_out_of_order() {
        let (domains, error) = inventory_of(None, Duration::from_secs(2));
        assert_eq!(
            (domains, error.as_str()),
            (None, ""),
            "the list is not complete, nothing else"
        );
        let (domains, error) = inventory_of(None, SILENT);
        assert_eq!((domains, error.is_empty()), (None, false));
    }

    #[test]
    fn agents_that_lost_the_controller_at_one_moment_come_back_at_many() {
        let wait = Duration::from_secs(3);
        let waits: std::collections::BTreeSet<_> =
            (0..1000).map(|run| spread(wait, &run.to_string(), 1)).collect();
        assert!(waits.len() > 200, "{}", waits.len());
        assert!(waits.iter().all(|spread| *spread >= wait / 2 && *spread <= wait));
        assert_eq!(spread(wait, "x", 3), spread(wait, "x", 3));
        assert_ne!(spread(wait, "x", 3), spread(wait, "x", 4));
    }

    #[test]
    fn a_list_that_came_is_complete() {
        let (domains, error) = inventory_of(Some(Ok(Vec::new())), Duration::ZERO);
        assert_eq!((domains, error.as_str()), (Some(Vec::new()), ""));
    }
}
