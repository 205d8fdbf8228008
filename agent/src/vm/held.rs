//! The task of a VM whose ledger entry this version cannot read: it refuses whatever is asked, and tells what it sees.
//!
//! A newer version wrote the entry, and this one was put in its place; or the disk is bad. Whether this host has the VM, may
//! start it, or has sent it away stands in that entry alone. So it is neither taken for lost nor touched, and the file
//! stays as it is for who can read it. Started by [`Vms::hold`] at the agent's start.

use std::{error::Error as _, sync::Arc, time::Duration};

use dalgu_proto::ids::VmId;
use tokio::{
    sync::{broadcast::error::RecvError, mpsc, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{
    Error, Reply, Request, Shared, UNREADABLE, Vms,
    status::{Failure, Phase, Status},
};
use crate::{hypervisor::Domain, ledger};

/// It is looked at so often.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

impl Vms {
    /// Enters a VM to which nothing is done, because its ledger entry cannot be read.
    pub fn hold(&self, id: VmId, damaged: &ledger::Error) {
        let file = damaged.file().to_owned();
        let why = damaged.source().map(ToString::to_string).unwrap_or_default();
        let refusal = Error::Unreadable { file: file.clone() };
        let failure = Failure {
            reason: UNREADABLE.to_owned(),
            message: format!("{refusal}: {why}"),
            retrying: false,
            since: self.shared.clock.now(),
        };
        self.enter(id, |queue, status| {
            let held = Held {
                shared: self.shared.clone(),
                id,
                file,
                failure,
                status,
            };
            held.publish(Seen::Unknown);
            self.tasks.spawn(held.run(queue, self.stop.clone()));
        });
    }
}

/// What was seen of the domain.
enum Seen {
    /// Nothing yet, or it could not be looked at.
    Unknown,
    /// It, or that there is none.
    Domain(Option<Domain>),
}

struct Held {
    shared: Arc<Shared>,
    id: VmId,
    file: String,
    failure: Failure,
    status: watch::Sender<Status>,
}

impl Held {
    async fn run(self, mut requests: mpsc::Receiver<(Request, Reply)>, stop: CancellationToken) {
        let mut hints = self.shared.hypervisor.hints();
        loop {
            let seen = self.shared.hypervisor.get(self.id).await;
            self.publish(seen.map_or(Seen::Unknown, Seen::Domain));
            // Every arm is cancel safe: receivers and timers lose nothing when dropped.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                request = requests.recv() => {
                    let Some((_, reply)) = request else { return };
                    // The caller may have gone.
                    let _ = reply.send(Err(Error::Unreadable { file: self.file.clone() }));
                }
                // Whichever domain it is about, and also when some were missed.
                hint = hints.recv() => if hint == Err(RecvError::Closed) {
                    sleep(LOOK_INTERVAL).await;
                },
                () = sleep(LOOK_INTERVAL) => {}
            }
        }
    }

    fn publish(&self, seen: Seen) {
        let mut next = Status::unknown(self.id);
        next.phase = Phase::Failed;
        next.failure = Some(self.failure.clone());
        if let Seen::Domain(domain) = seen {
            next.observed_at = Some(self.shared.clock.now());
            if let Some(domain) = domain {
                describe(&mut next, domain);
            }
        }
        let changed = self.status.send_if_modified(|status| {
            let changed = !status.same_content(&next);
            let status_generation = status.status_generation + u64::from(changed);
            *status = Status {
                status_generation,
                ..next
            };
            changed
        });
        if changed {
            self.shared.changes.send_modify(|count| *count += 1);
        }
    }
}

fn describe(status: &mut Status, domain: Domain) {
    status.name = domain.name;
    status.epoch = domain.mark.map(|mark| mark.epoch).unwrap_or_default();
    status.power = domain.state.power();
}
