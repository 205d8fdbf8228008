//! A migration's source among simulated hypervisors; called by `migrate`. `arrival` is the other end.
//!
//! Up to `finish` any failure leaves the VM with the source, which lets it go on; the destination removes its half
//! as soon as the connection ends. Once `finish` has been sent a VM that goes on where it arrives never goes on at the source again: either it hears
//! that the destination runs it and forgets it, or it stays [`DomainState::HandedOver`] for somebody to look at both. One that
//! arrives paused goes on at the source where the connection ends before the answer, as libvirt does; where the hypervisor itself ends, it stays.

use std::{sync::Arc, time::Duration};

use dalgu_proto::{ids::VmId, vm::PowerReason};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Call, Fault, Inner, Phase,
    state::{Job, key},
    wire::{Answer, Line, Say},
};
use crate::hypervisor::{DomainState, Error, Hardware, Hint, Migrate, Progress};

/// How often data is said to have been sent.
pub(super) const BEAT: Duration = Duration::from_millis(100);

/// Why a transfer did not come to its end.
enum Failure {
    /// The VM belongs to the source still.
    Before(Error),
    /// As before, and it cannot go on: the other side holds the locks of its disks.
    Locked(Error),
    /// Nobody here can say who has it.
    After(Error),
}

fn broken(error: impl ToString) -> Error {
    Error::Failed {
        call: "migrate",
        code: 0,
        detail: format!("the connection to the destination: {}", error.to_string()),
    }
}

fn before(error: impl ToString) -> Failure {
    Failure::Before(broken(error))
}

/// Sends a VM. The transfer goes on when the caller is dropped, as between real hosts.
pub(super) async fn send(inner: &Arc<Inner>, migrate: &Migrate) -> Result<Progress, Error> {
    let (inner, migrate) = (inner.clone(), migrate.clone());
    let runtime = inner.runtime.clone();
    let transfer = runtime.spawn(async move { run(&inner, &migrate).await });
    transfer.await.unwrap_or_else(|error| Err(broken(error)))
}

async fn run(inner: &Arc<Inner>, migrate: &Migrate) -> Result<Progress, Error> {
    let daemon = inner.reachable()?;
    let fault = inner.faults().take(Call::Migrate);
    match &fault {
        Some(Fault::Error(error)) => return Err(error.clone()),
        Some(Fault::Hang | Fault::Late(_)) => {
            daemon.cancelled().await;
            return Err(Error::Unavailable {
                detail: "the simulated hypervisor restarted".into(),
            });
        }
        Some(Fault::TakesEffect(_)) | None => {}
    }
    let id = migrate.definition.id;
    let (previous, mut job) = Source::begin(inner, migrate)?;
    let result = tokio::select! {
        biased;
        () = daemon.cancelled() => None,
        // Dropping the transfer is safe: it closes the connection, and what it leaves is settled below.
        result = job.transfer() => Some(result),
    };
    let result = result.unwrap_or_else(|| {
        let error = Error::Unavailable {
            detail: "the simulated hypervisor restarted".into(),
        };
        Err(if job.finishing {
            Failure::After(error)
        } else {
            Failure::Before(error)
        })
    });
    let result = settle(inner, id, previous, migrate.arrives_paused, result);
    inner.hint(Hint::Domain(id));
    match fault {
        Some(Fault::TakesEffect(error)) => result.and(Err(error)),
        _ => result,
    }
}

/// Leaves the source's domain in the state that the transfer's result calls for.
fn settle(
    inner: &Inner,
    id: VmId,
    previous: (DomainState, PowerReason),
    arrives_paused: bool,
    result: Result<Progress, Failure>,
) -> Result<Progress, Error> {
    let mut state = inner.state();
    let guest = state.domains.get_mut(&id);
    match result {
        Ok(progress) => Ok(progress),
        Err(Failure::Before(error)) => {
            if let Some(guest) = guest {
                guest.job = None;
                if guest.state == DomainState::HandedOver {
                    guest.to(previous.0, previous.1);
                }
            }
            Err(error)
        }
        Err(Failure::Locked(error)) => {
            if let Some(guest) = guest {
                guest.job = None;
                guest.to(DomainState::Paused, PowerReason::Unknown);
            }
            Err(error)
        }
        Err(Failure::After(error)) => {
            if let Some(guest) = guest {
                guest.job = None;
                let unheard = !matches!(error, Error::Unavailable { .. });
                if arrives_paused && unheard && guest.state == DomainState::HandedOver {
                    guest.to(previous.0, previous.1);
                }
            }
            Err(error)
        }
    }
}

/// A transfer under way, at its source.
struct Source<'a> {
    inner: &'a Inner,
    migrate: &'a Migrate,
    abort: CancellationToken,
    started: Instant,
    hardware: Hardware,
    paused: bool,
    finishing: bool,
}

impl<'a> Source<'a> {
    fn begin(
        inner: &'a Arc<Inner>,
        migrate: &'a Migrate,
    ) -> Result<((DomainState, PowerReason), Self), Error> {
        let mut state = inner.state();
        let id = migrate.definition.id;
        let guest = state.ours(id, &inner.config)?;
        if !matches!(guest.state, DomainState::Running | DomainState::Paused) || guest.job.is_some() {
            let detail = format!("it is {:?} or being migrated, and cannot be sent", guest.state);
            return Err(Error::WrongState { id, detail });
        }
        let abort = CancellationToken::new();
        guest.job = Some(Job {
            progress: Progress::default(),
            abort: abort.clone(),
        });
        let source = Self {
            inner,
            migrate,
            abort,
            started: Instant::now(),
            hardware: guest.hardware.clone(),
            paused: guest.state == DomainState::Paused,
            finishing: false,
        };
        Ok(((guest.state, guest.reason), source))
    }

    async fn transfer(&mut self) -> Result<Progress, Failure> {
        let abort = self.abort.clone();
        let mut line = tokio::select! {
            biased;
            () = abort.cancelled() => return Err(Failure::Before(Error::Cancelled)),
            // The transfer so far is dropped: it closes the connection, and the destination removes its half.
            line = self.copy() => line?,
        };
        self.hand_over(&mut line).await
    }

    async fn copy(&self) -> Result<Line, Failure> {
        self.inner.gate().await;
        let lines = &self.inner.config.lines;
        let stream = lines.connect(&self.migrate.control).await.map_err(before)?;
        let mut line = Line::new(stream);
        ask(&mut line, &Say::prepare(&self.migrate.definition, &self.hardware)).await?;
        self.may_break(Phase::Prepare)?;
        self.inner.gate().await;
        let memory = self.hardware.memory_mib << 20;
        let total = memory + self.local_disk_bytes();
        let limit = u64::from(self.migrate.bandwidth_mib_per_second) << 20;
        let configured = self.inner.config.rate_bytes_per_second.max(10);
        let rate = if limit == 0 {
            configured
        } else {
            configured.min(limit)
        };
        let mut sent = 0;
        while sent < total {
            let bytes = (rate / 10).min(total - sent);
            tokio::time::sleep(BEAT).await;
            ask(&mut line, &Say::Data { bytes }).await?;
            sent += bytes;
            self.report(memory, total, sent, rate);
            if sent * 2 >= total {
                self.may_break(Phase::Transfer)?;
            }
        }
        self.inner.gate().await;
        Ok(line)
    }

    async fn hand_over(&mut self, line: &mut Line) -> Result<Progress, Failure> {
        let id = self.migrate.definition.id;
        let finish = {
            let mut state = self.inner.state();
            let config = &self.inner.config;
            let disks = self.migrate.definition.spec.disks.iter();
            let local = disks.filter(|disk| !config.shared_pools.contains(&disk.pool));
            let held = local.filter_map(|disk| {
                let file = state.file(&key(id, disk), config)?;
                Some((disk.name.clone(), file.content))
            });
            let contents = held.collect();
            let chain = state.chains.get(&id).cloned();
            let guest = state
                .domains
                .get_mut(&id)
                .ok_or(Failure::Before(Error::NotFound { id }))?;
            if guest.state == DomainState::Stopped {
                return Err(Failure::Before(Error::WrongState {
                    id,
                    detail: "it ended during the migration".into(),
                }));
            }
            self.paused = guest.state == DomainState::Paused;
            guest.to(DomainState::HandedOver, PowerReason::Unknown);
            Say::Finish {
                paused: self.paused || self.migrate.arrives_paused,
                ticks: guest.ticks,
                contents,
                chain,
            }
        };
        self.inner.hint(Hint::Domain(id));
        let stopped = Instant::now();
        tokio::time::sleep(self.inner.config.delays.downtime).await;
        self.may_break(Phase::Handover)?;
        if self.inner.faults().breaks(Phase::Locked) {
            return Err(Failure::Locked(broken("cut by the test")));
        }
        self.finishing = true;
        line.send(&finish)
            .await
            .map_err(|error| Failure::After(broken(error)))?;
        if self.inner.faults().breaks(Phase::Finish) {
            return Err(Failure::After(broken("cut by the test")));
        }
        match line.receive().await {
            Ok(Answer::Ok) => {}
            Ok(Answer::No { why }) => return Err(before(why)),
            Err(error) => return Err(Failure::After(broken(error))),
        }
        let mut progress = self.forget(id).unwrap_or_default();
        // Set once in a transfer.
        let _ = self.migrate.stopped.set(stopped);
        self.migrate.released.cancel();
        progress.downtime_ms = millis(stopped.elapsed());
        progress.elapsed_ms = millis(self.started.elapsed());
        // The destination needs no confirmation to go on; if it is lost, nothing is.
        let _ = line.send(&Say::Confirm).await;
        if self.inner.faults().breaks(Phase::Confirm) {
            return Err(Failure::After(broken("cut by the test")));
        }
        Ok(progress)
    }

    /// The VM lives at the destination: nothing of it stays here but disks.
    fn forget(&self, id: VmId) -> Option<Progress> {
        self.inner
            .state()
            .domains
            .remove(&id)?
            .job
            .map(|job| job.progress)
    }

    fn may_break(&self, phase: Phase) -> Result<(), Failure> {
        match self.inner.faults().breaks(phase) {
            true => Err(before("cut by the test")),
            false => Ok(()),
        }
    }

    fn local_disk_bytes(&self) -> u64 {
        let shared = &self.inner.config.shared_pools;
        let disks = self.migrate.definition.spec.volumes();
        disks
            .filter(|disk| !shared.contains(&disk.pool))
            .map(|disk| disk.size_mib << 20)
            .sum()
    }

    fn report(&self, memory: u64, total: u64, sent: u64, rate: u64) {
        // Disks first, as libvirt does.
        let disks = total - memory;
        let disk_sent = sent.min(disks);
        let memory_sent = sent - disk_sent;
        let progress = Progress {
            memory_total_bytes: memory,
            memory_processed_bytes: memory_sent,
            memory_remaining_bytes: memory - memory_sent,
            disk_total_bytes: disks,
            disk_processed_bytes: disk_sent,
            disk_remaining_bytes: disks - disk_sent,
            rate_bytes_per_second: rate,
            dirty_rate_bytes_per_second: rate / 50,
            expected_downtime_ms: millis(self.inner.config.delays.downtime),
            downtime_ms: 0,
            iteration: 1,
            elapsed_ms: millis(self.started.elapsed()),
        };
        let mut state = self.inner.state();
        let job = state
            .domains
            .get_mut(&self.migrate.definition.id)
            .and_then(|guest| guest.job.as_mut());
        if let Some(job) = job {
            job.progress = progress;
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn ask(line: &mut Line, say: &Say) -> Result<(), Failure> {
    line.send(say).await.map_err(before)?;
    match line.receive().await.map_err(before)? {
        Answer::Ok => Ok(()),
        Answer::No { why } => Err(Failure::Before(Error::Failed {
            call: "migrate",
            code: 0,
            detail: why,
        })),
    }
}
