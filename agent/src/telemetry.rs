//! Samples the host and its VMs on a timer, for the reports and for the metrics page.
//!
//! The samples are published in a `watch`; whoever reads them makes no call of its own. A hypervisor that does not answer
//! delays the VMs' samples only: the host's go on, and each says when it was taken.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use dalgu_proto::{
    host::{Inventory, VmUsage},
    ids::VmId,
};
use tokio::{
    sync::{Mutex, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    host::{process::clock, rates::VmRates, usage::Sampler},
    hypervisor::Connection,
    metrics::{self, Snapshot},
    vm::Vms,
};

/// The inventory is read anew after so many samples of usage.
const INVENTORY_EVERY: u32 = 30;
/// The VMs' usage is asked for after so many samples of the host's; it costs the hypervisor some ms for each VM.
const VMS_EVERY: u32 = 2;

/// A sample waits so long for the hypervisor to say what it is.
const ABOUT_WAIT: Duration = Duration::from_secs(2);
/// The first sample waits so long for the hypervisor.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// See the module's documentation.
pub struct Telemetry {
    sampler: Arc<Mutex<Sampler>>,
    vms: Vms,
    out: watch::Sender<Arc<Snapshot>>,
}

impl Telemetry {
    /// A telemetry that has taken no sample yet, and will publish them in `out`.
    pub fn new(sampler: Sampler, vms: Vms, out: watch::Sender<Arc<Snapshot>>) -> Self {
        Self {
            sampler: Arc::new(Mutex::new(sampler)),
            vms,
            out,
        }
    }

    /// Samples until the agent stops.
    pub async fn run(self, period: Duration, stop: CancellationToken) {
        // The agent registers once the hypervisor has said what it is: a first sample that comes a moment too early would
        // cost a whole period. Either end of the wait is as good; cancel safe, it only looks.
        let mut connection = self.vms.hypervisor().connection();
        let _ = timeout(
            FIRST_WAIT,
            connection.wait_for(|connection| *connection == Connection::Up),
        )
        .await;
        let mut tick = interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (usage, mut usages) = watch::channel(Vec::new());
        let sampling_vms = tokio::spawn(sample_vms(
            self.vms.clone(),
            period * VMS_EVERY,
            usage,
            stop.clone(),
        ));
        let mut count = 0;
        let mut rates = VmRates::default();
        loop {
            // Cancel safe: a tick that was not taken comes again.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = tick.tick() => {}
            }
            let mut next = Snapshot::clone(&self.out.borrow());
            // Until the hypervisor has said what it is, it is asked each time.
            let due = count % INVENTORY_EVERY == 0 || next.inventory.hypervisor.is_empty();
            if due && let Some(inventory) = self.inventory(&next.inventory).await {
                next.inventory = Arc::new(inventory);
            }
            count += 1;
            self.sample_host(&mut next).await;
            let fresh = usages.has_changed().unwrap_or(false);
            self.describe_vms(
                &mut next,
                &mut rates,
                fresh.then(|| usages.borrow_and_update().clone()),
            );
            self.out.send_replace(Arc::new(next));
        }
        // It ends by the same token; a panic in it has been logged.
        let _ = sampling_vms.await;
    }

    async fn sample_host(&self, next: &mut Snapshot) {
        let sampler = self.sampler.clone().lock_owned().await;
        let sampled = tokio::task::spawn_blocking(move || {
            let mut sampler = sampler;
            sampler.sample()
        });
        match (sampled.await, clock()) {
            (Ok(Ok(usage)), Ok(now)) => next.usage = Some((now, Arc::new(usage))),
            (Ok(Err(error)), _) | (_, Err(error)) => tracing::error!(%error, "the host cannot be sampled"),
            (Err(error), _) => tracing::error!(%error, "the host cannot be sampled"),
        }
    }

    /// What the host is made of, with what the hypervisor says of itself.
    async fn inventory(&self, before: &Inventory) -> Option<Inventory> {
        let sampler = self.sampler.clone().lock_owned().await;
        let read = tokio::task::spawn_blocking(move || {
            let mut sampler = sampler;
            sampler.inventory()
        });
        let mut inventory = match read.await {
            Ok(Ok(inventory)) => inventory,
            Ok(Err(error)) => {
                tracing::error!(%error, "the host's inventory cannot be read");
                return None;
            }
            Err(error) => {
                tracing::error!(%error, "the host's inventory cannot be read");
                return None;
            }
        };
        match timeout(ABOUT_WAIT, self.vms.hypervisor().about()).await {
            Ok(Ok(about)) => {
                inventory.hypervisor = about.version;
                inventory.accelerator = about.accelerator;
                inventory.accelerator_reason = about.accelerator_reason;
                inventory.guest_features = about.guest_features;
                let networks = self.vms.networks();
                inventory.guest_features.extend(networks.features().await);
                inventory.guest_features.sort_unstable();
                inventory.overlay_address = networks.overlay_address();
            }
            silent => {
                let error = match silent {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("no answer for {} s", ABOUT_WAIT.as_secs()),
                };
                tracing::warn!(error, "the hypervisor does not say what it is");
                // What it once said of itself is not forgotten because it is silent now.
                inventory.hypervisor.clone_from(&before.hypervisor);
                inventory.accelerator.clone_from(&before.accelerator);
                inventory
                    .accelerator_reason
                    .clone_from(&before.accelerator_reason);
                inventory.guest_features.clone_from(&before.guest_features);
                inventory.overlay_address = before.overlay_address;
            }
        }
        Some(inventory)
    }

    /// Puts the VMs with their latest usage into the snapshot.
    fn describe_vms(&self, next: &mut Snapshot, rates: &mut VmRates, usages: Option<Vec<(VmId, VmUsage)>>) {
        let now = clock().unwrap_or_default();
        let mut latest: BTreeMap<VmId, VmUsage> = match usages {
            Some(mut fresh) => {
                rates.fill(now, fresh.iter_mut().map(|(id, usage)| (*id, usage)));
                next.vms_at = Some(now);
                fresh.into_iter().collect()
            }
            None => next
                .vms
                .drain(..)
                .filter_map(|vm| Some((vm.id, vm.usage?)))
                .collect(),
        };
        let vm = |status: crate::vm::status::Status| {
            let running = status
                .power
                .is_some_and(|power| power != dalgu_proto::vm::PowerState::Stopped);
            Some(metrics::Vm {
                id: status.id,
                name: status.name.parse().ok()?,
                power: status.power,
                usage: latest.remove(&status.id).filter(|_| running),
            })
        };
        next.vms = self.vms.statuses().into_iter().filter_map(vm).collect();
    }
}

async fn sample_vms(
    vms: Vms,
    period: Duration,
    out: watch::Sender<Vec<(VmId, VmUsage)>>,
    stop: CancellationToken,
) {
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Cancel safe: a tick that was not taken comes again.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        match vms.hypervisor().usage().await {
            Ok(usages) => {
                out.send_replace(usages);
            }
            Err(error) => tracing::debug!(%error, "the VMs' usage cannot be sampled"),
        }
    }
}
