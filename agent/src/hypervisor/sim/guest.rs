//! What simulated guests do: obey or not, crash, use their host, count on their consoles.

use std::{
    fs::OpenOptions,
    io::Write as _,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use dalgu_proto::{
    host::{VmBlock, VmNic, VmUsage},
    ids::VmId,
    vm::PowerReason,
};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{Inner, SimConfig, state::Guest};
use crate::hypervisor::{DomainState, Hint};

/// What a guest does with its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Shuts down, or reboots, so long after it was asked.
    Obeys(Duration),
    /// Does neither, however often it is asked.
    Ignores,
    /// Crashes so long after each start.
    Crashes(Duration),
    /// Powers itself off so long after each start.
    PowersOff(Duration),
}

impl Default for Behaviour {
    fn default() -> Self {
        Self::Obeys(Duration::from_millis(500))
    }
}

/// Number of the guest's present run.
pub(super) fn run(inner: &Inner, id: VmId) -> Option<u64> {
    inner.state().domains.get(&id).map(|guest| guest.run)
}

/// Starts what the guest does after its start.
pub(super) fn booted(inner: &Arc<Inner>, id: VmId) {
    match behaviour(inner, id) {
        Some((Behaviour::Crashes(after), run)) => end_later(inner, id, run, after, PowerReason::Crashed),
        Some((Behaviour::PowersOff(after), run)) => {
            end_later(inner, id, run, after, PowerReason::GuestShutdown)
        }
        _ => {}
    }
}

/// Starts what the guest does when it is asked to shut down.
pub(super) fn asked_to_shut_down(inner: &Arc<Inner>, id: VmId) {
    match behaviour(inner, id) {
        Some((Behaviour::Ignores, _)) | None => {}
        Some((Behaviour::Obeys(after), run)) => end_later(inner, id, run, after, PowerReason::GuestShutdown),
        Some((_, run)) => end_later(inner, id, run, Duration::ZERO, PowerReason::GuestShutdown),
    }
}

/// Starts what the guest does when it is asked to reboot.
pub(super) fn asked_to_reboot(inner: &Arc<Inner>, id: VmId) {
    let (after, run) = match behaviour(inner, id) {
        Some((Behaviour::Ignores, _)) | None => return,
        Some((Behaviour::Obeys(after), run)) => (after, run),
        Some((_, run)) => (Duration::ZERO, run),
    };
    later(inner, id, after, move |inner| {
        inner.state().begin_anew(id, Some(run))
    });
}

fn behaviour(inner: &Inner, id: VmId) -> Option<(Behaviour, u64)> {
    inner
        .state()
        .domains
        .get(&id)
        .map(|guest| (guest.behaviour, guest.run))
}

fn end_later(inner: &Arc<Inner>, id: VmId, run: u64, after: Duration, reason: PowerReason) {
    later(inner, id, after, move |inner| {
        inner.state().end(id, Some(run), reason)
    });
}

/// Lets something happen to a guest after a while, unless the hypervisor is gone by then.
pub(super) fn later(
    inner: &Arc<Inner>,
    id: VmId,
    after: Duration,
    what: impl FnOnce(&Inner) + Send + 'static,
) {
    let runtime = inner.runtime.clone();
    let inner = Arc::downgrade(inner);
    runtime.spawn(async move {
        tokio::time::sleep(after).await;
        if let Some(inner) = inner.upgrade() {
            what(&inner);
            inner.hint(Hint::Domain(id));
        }
    });
}

/// Where a guest's counter is written.
pub(super) fn console_log(config: &SimConfig, id: VmId) -> Option<PathBuf> {
    let dir = config.console_dir.as_ref()?;
    Some(dir.join(format!("{id}.log")))
}

/// Lets every running guest count, until the hypervisor ends.
pub(super) async fn count(inner: Weak<Inner>, end: CancellationToken) {
    let Some(interval) = inner.upgrade().map(|inner| inner.config.console_interval) else {
        return;
    };
    let mut timer = tokio::time::interval(interval);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = end.cancelled() => return,
            // A lost tick is made up for by the next.
            _ = timer.tick() => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        let lines = next_lines(&inner);
        // Small files, but files: not on a thread of the runtime.
        let _ = tokio::task::spawn_blocking(move || write_lines(&lines)).await;
    }
}

fn next_lines(inner: &Inner) -> Vec<(PathBuf, String)> {
    let mut state = inner.state();
    let running = state
        .domains
        .values_mut()
        .filter(|guest| guest.state == DomainState::Running);
    running
        .filter_map(|guest| {
            guest.ticks += 1;
            let greeting = if guest.ticks == 1 {
                "dalgu-guest ready\n"
            } else {
                ""
            };
            let line = format!("{greeting}tick {}\n", guest.ticks);
            Some((console_log(&inner.config, guest.id)?, line))
        })
        .collect()
}

fn write_lines(lines: &[(PathBuf, String)]) {
    for (path, line) in lines {
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "a simulated console cannot be written");
        }
    }
}

/// What the guest has used since its start: a base load with a slow wave on it, different for each guest. Rates are
/// integrals over the time it ran, so counters never go back.
pub(super) fn usage(guest: &Guest, now: Timestamp) -> VmUsage {
    let seconds = guest.ran().as_secs_f64();
    let [a, b, ..] = guest.id.uuid().into_bytes();
    let base = 0.05 + 0.4 * f64::from(a) / 255.0;
    let period = 120.0 + f64::from(b);
    let angular = std::f64::consts::TAU / period;
    // The integral of base * (1 + sin(angular * t) / 2), times the processors.
    let busy = base
        * f64::from(guest.hardware.vcpus)
        * (seconds + (1.0 - (angular * seconds).cos()) / (2.0 * angular));
    let memory_bytes = guest.hardware.memory_mib << 20;
    let warm = (seconds / 60.0).min(1.0);
    let resident = scaled(memory_bytes, 0.2 + 0.6 * warm);
    let spec = guest.definition.as_ref().map(|definition| &definition.spec);
    let block = |name: &str, size_mib: u64| VmBlock {
        name: name.to_owned(),
        read_bytes_total: whole(busy * 65_536.0),
        write_bytes_total: whole(busy * 131_072.0),
        read_requests_total: whole(busy * 8.0),
        write_requests_total: whole(busy * 16.0),
        allocation_bytes: (size_mib << 20).min((1 << 20) + whole(busy * 4096.0)),
        capacity_bytes: size_mib << 20,
    };
    let nic = |name: &str| VmNic {
        name: name.to_owned(),
        receive_bytes_total: whole(busy * 20_000.0),
        transmit_bytes_total: whole(busy * 50_000.0),
        receive_packets_total: whole(busy * 100.0),
        transmit_packets_total: whole(busy * 120.0),
        errors_total: 0,
        drops_total: 0,
    };
    VmUsage {
        sample_time: now,
        cpu_seconds_total: busy,
        cpu_wait_seconds_total: busy * 0.01,
        cpus_busy: 0.0,
        rates_valid: false,
        memory_resident_bytes: resident,
        memory_balloon_bytes: memory_bytes,
        memory_unused_bytes: memory_bytes - resident,
        blocks: spec
            .map(|spec| {
                spec.volumes()
                    .map(|disk| block(&disk.name, disk.size_mib))
                    .collect()
            })
            .unwrap_or_default(),
        nics: spec
            .map(|spec| spec.nics.iter().map(|own| nic(&own.name)).collect())
            .unwrap_or_default(),
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, and is not negative"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

#[allow(clippy::cast_precision_loss, reason = "a simulated figure")]
fn scaled(value: u64, by: f64) -> u64 {
    whole(value as f64 * by)
}
