//! Keeps a VM's task alive: one that fails by a defect of its own begins anew from what is true.
//!
//! Started by [`Vms::start`] around each task. Knows nothing of what the task does.

use std::{panic::AssertUnwindSafe, time::Duration};

use dalgu_proto::ids::VmId;
use futures::FutureExt;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

use super::{Error, Known, Reply, Request, Vms, driver, status};

/// Shortest and longest wait before a VM's task that failed begins anew.
pub(super) const BEGIN_ANEW: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));

impl Vms {
    /// Runs a VM's task until it ends. One that fails by a defect of its own begins anew from what is true, as after a
    /// restart of the agent: a VM without a task would be taken for one that is unknown here.
    pub(super) async fn tend(
        self,
        mut driver: driver::Driver,
        mut queue: mpsc::Receiver<(Request, Reply)>,
        id: VmId,
        status: watch::Sender<status::Status>,
    ) {
        let mut wait = BEGIN_ANEW.0;
        loop {
            let begun = Instant::now();
            // On the heap: it is large, and would be moved at each of its steps.
            let run = AssertUnwindSafe(Box::pin(driver.run(&mut queue, self.stop.clone())));
            if run.catch_unwind().await.is_ok() {
                break;
            }
            if begun.elapsed() > BEGIN_ANEW.1 * 2 {
                wait = BEGIN_ANEW.0;
            }
            tracing::error!(vm = %id, ?wait, "the VM's task failed, which is a defect of the agent; it begins anew");
            let known = async {
                loop {
                    sleep(wait).await;
                    wait = (wait * 2).min(BEGIN_ANEW.1);
                    match self.known(id).await {
                        Ok(known) => return known,
                        Err(error) => tracing::warn!(vm = %id, %error, "it cannot begin anew yet"),
                    }
                }
            };
            // Cancel safe: it only reads.
            let known = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                known = known => known,
            };
            driver = driver::Driver::new(self.shared.clone(), id, known, status.clone());
        }
        drop(queue);
        let mut map = self.map();
        if map.get(&id).is_some_and(|handle| handle.requests.is_closed()) && !self.stop.is_cancelled() {
            map.remove(&id);
        }
    }

    /// What is true of a VM, by the ledger and the hypervisor.
    async fn known(&self, id: VmId) -> Result<Known, Error> {
        let contents = self.shared.ledger.load().await?;
        if let Some(damaged) = contents
            .damaged
            .into_iter()
            .find(|damaged| damaged.vm == Some(id))
        {
            return Err(damaged.error.into());
        }
        let mut known = Known {
            vm: contents.vms.into_iter().find(|vm| vm.id == id),
            migrations: contents.migrations.into_iter().filter(|m| m.vm == id).collect(),
            adopted: None,
        };
        if known.vm.is_none() {
            let domain = self.shared.hypervisor.get(id).await?;
            known.adopted = domain.filter(|domain| domain.mark.is_some());
        }
        Ok(known)
    }
}
