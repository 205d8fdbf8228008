//! Operators' requests at a rate, whether they are answered or not: reads of single objects and of pages, and durable
//! changes. Each is counted by how it ended.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dalgu_proto::{reason, tls::Identity, v1};
use tokio::runtime::Builder;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::operator::Operator;

/// Requests are sent in groups, so often.
const TICK: Duration = Duration::from_millis(5);
/// Requests of one connection that may wait for their answers; more are not sent and counted as such.
const OUTSTANDING: usize = 512;
/// Time until a call that was refused is made again.
const AGAIN: Duration = Duration::from_secs(1);
/// A request without an answer after this time counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a load asks about.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Names of VMs.
    pub vms: Arc<Vec<String>>,
    /// Names of hosts.
    pub hosts: Arc<Vec<String>>,
}

/// How requests ended.
#[derive(Debug, Clone, Default)]
pub struct Ended {
    /// Time of each that was answered, in ms.
    pub answered_ms: Vec<f64>,
    /// Time of each that was refused, in ms.
    pub refused_ms: Vec<f64>,
    /// Refused with RESOURCE_EXHAUSTED, but without saying when to come again.
    pub without_delay: u64,
    /// Ended in another way, and how the last of them did.
    pub failed: u64,
    /// How the last that failed did.
    pub failure: Option<String>,
    /// Not sent: too many waited for their answers.
    pub unsent: u64,
    /// Time from the first to the last.
    pub time: Duration,
}

impl Ended {
    fn note(&mut self, began: Instant, outcome: Result<(), Status>) {
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        match outcome {
            Ok(()) => self.answered_ms.push(ms),
            Err(status) if is_overload(&status) => {
                self.refused_ms.push(ms);
                let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
                self.without_delay += u64::from(delay.is_none_or(|delay| delay.is_zero()));
            }
            Err(status) => {
                self.failed += 1;
                self.failure = Some(format!("{:?}: {}", status.code(), status.message()));
            }
        }
    }

    fn add(&mut self, other: Self) {
        self.answered_ms.extend(other.answered_ms);
        self.refused_ms.extend(other.refused_ms);
        self.without_delay += other.without_delay;
        self.failed += other.failed;
        self.failure = other.failure.or_else(|| self.failure.take());
        self.unsent += other.unsent;
    }

    /// Requests that were sent.
    #[must_use]
    pub fn sent(&self) -> usize {
        self.answered_ms.len() + self.refused_ms.len() + usize::try_from(self.failed).unwrap_or(usize::MAX)
    }

    /// So many of them a second.
    #[must_use]
    pub fn per_second(&self, number: usize) -> f64 {
        f64::from(u32::try_from(number).unwrap_or(u32::MAX)) / self.time.as_secs_f64().max(1e-9)
    }
}

/// The time within which that share of some samples was done.
#[must_use]
pub fn percentile(samples: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied()
}

/// Makes a call again and again while the controller says that it is asked too much, as every client does.
pub async fn patiently<T>(mut call: impl AsyncFnMut() -> Result<T, Status>) -> Result<T, Status> {
    loop {
        match call().await {
            Err(status) if is_overload(&status) => sleep(AGAIN).await,
            answer => return answer,
        }
    }
}

fn is_overload(status: &Status) -> bool {
    status.code() == Code::ResourceExhausted && reason::of(status).as_deref() == Some("OVERLOADED")
}

/// Sends `per_second` requests for a while, over a connection for each of the callers in turns, and waits for their ends. On
/// threads of its own: what comes from other machines in truth must not stand in the way of the agents here.
pub async fn drive(
    address: SocketAddr,
    callers: Vec<Identity>,
    targets: Targets,
    per_second: u32,
    time: Duration,
) -> anyhow::Result<Ended> {
    let machine = Builder::new_multi_thread().enable_all().build()?;
    let ended = machine
        .spawn(send(address, callers, targets, per_second, time))
        .await;
    machine.shutdown_background();
    ended?
}

async fn send(
    address: SocketAddr,
    callers: Vec<Identity>,
    targets: Targets,
    per_second: u32,
    time: Duration,
) -> anyhow::Result<Ended> {
    let mut operators = Vec::new();
    for caller in &callers {
        operators.push(Operator::dial(address, caller).await?);
    }
    let began = Instant::now();
    let mut lines = JoinSet::new();
    let count = u32::try_from(operators.len()).context("so many connections")?;
    for (number, operator) in (0..count).zip(operators) {
        // What does not divide is sent by the first ones.
        let share = per_second / count + u32::from(number < per_second % count);
        lines.spawn(line(operator, targets.clone(), share, time, number));
    }
    let mut all = Ended::default();
    while let Some(ended) = lines.join_next().await {
        all.add(ended?);
    }
    all.time = began.elapsed();
    Ok(all)
}

/// The requests of one connection.
async fn line(operator: Operator, targets: Targets, per_second: u32, time: Duration, number: u32) -> Ended {
    let began = Instant::now();
    let places = Arc::new(Semaphore::new(OUTSTANDING));
    let mut calls: JoinSet<(Instant, Result<(), Status>)> = JoinSet::new();
    let mut ended = Ended::default();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sent = 0_u64;
    while began.elapsed() < time {
        tick.tick().await;
        let due = u64::try_from(began.elapsed().min(time).as_micros()).unwrap_or(u64::MAX)
            * u64::from(per_second)
            / 1_000_000;
        while sent < due {
            let index = sent * 7919 + u64::from(number);
            sent += 1;
            let Ok(place) = places.clone().try_acquire_owned() else {
                ended.unsent += 1;
                continue;
            };
            let (operator, targets) = (operator.clone(), targets.clone());
            let asked = Instant::now();
            calls.spawn(async move {
                let outcome = timeout(PATIENCE, one(&operator, &targets, index)).await;
                drop(place);
                let late = |_| Err(Status::deadline_exceeded("no answer"));
                (asked, outcome.unwrap_or_else(late))
            });
        }
        while let Some(call) = calls.try_join_next() {
            call.into_iter()
                .for_each(|(asked, outcome)| ended.note(asked, outcome));
        }
    }
    while let Some(call) = calls.join_next().await {
        call.into_iter()
            .for_each(|(asked, outcome)| ended.note(asked, outcome));
    }
    ended
}

/// One request: of twenty, thirteen read a VM, three a host, two a page of a hundred VMs, and two change a VM.
async fn one(operator: &Operator, targets: &Targets, index: u64) -> Result<(), Status> {
    let pick = |names: &[String]| {
        let at = index / 20 % u64::try_from(names.len().max(1)).unwrap_or(1);
        names
            .get(usize::try_from(at).unwrap_or(0))
            .cloned()
            .unwrap_or_default()
    };
    match index % 20 {
        0..=12 => {
            let name = pick(&targets.vms);
            operator.vms().get_vm(v1::GetVmRequest { name }).await.map(drop)
        }
        13..=15 => {
            let name = pick(&targets.hosts);
            operator
                .hosts()
                .get_host(v1::GetHostRequest { name })
                .await
                .map(drop)
        }
        16 | 17 => {
            let request = v1::ListVmsRequest::default();
            operator.vms().list_vms(request).await.map(drop)
        }
        _ => {
            let vm = v1::Vm {
                name: pick(&targets.vms),
                description: format!("changed {index}"),
                ..v1::Vm::default()
            };
            let request = v1::UpdateVmRequest {
                vm: Some(vm),
                update_mask: Some(prost_types::FieldMask {
                    paths: vec!["description".to_owned()],
                }),
                ..v1::UpdateVmRequest::default()
            };
            operator.vms().update_vm(request).await.map(drop)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_sample_that_so_many_do_not_exceed() {
        let samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 99), Some(198.0));
        assert_eq!(percentile(&samples, 100), Some(200.0));
        assert_eq!(percentile(&[5.0], 50), Some(5.0));
        assert_eq!(percentile(&[], 99), None);
    }
}
