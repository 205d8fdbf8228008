//! Notices hosts that no longer report. A task of the controller; it stops placement on them and nothing else.

use std::time::Duration;

use dalgu_proto::ids::HostName;
use tokio_util::sync::CancellationToken;

use super::registry;
use crate::{
    model::HostState,
    state::{Db, State},
};

/// Runs until `stop`. A host is lost when it has been silent for `limit`.
pub async fn run(db: Db, limit: Duration, stop: CancellationToken) {
    let mut tick =
        tokio::time::interval((limit / 6).clamp(Duration::from_millis(50), Duration::from_secs(1)));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // Cancel safe: a tick that is lost comes again.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let silent = silent(&db.snapshot(), limit);
        if !silent.is_empty() {
            // Looked at again inside: a report may have come meanwhile.
            db.change(|tx| registry::mark_silent(tx, &silent, limit)).await;
            tell(&db.snapshot(), &silent);
        }
    }
}

fn silent(state: &State, limit: Duration) -> Vec<HostName> {
    let lost = |state: HostState, heard: tokio::time::Instant| {
        state != HostState::Unreachable && heard.elapsed() >= limit
    };
    state
        .live
        .iter()
        .filter(|(_, live)| lost(live.state, live.heard))
        .map(|(name, _)| name.clone())
        .collect()
}

fn tell(state: &State, lost: &[HostName]) {
    let missed = |host: &HostName| state.hosts.get(host).is_none_or(|host| !host.is_asleep());
    let mut all = state.live.iter().filter(|(host, _)| missed(host));
    if all.clone().count() > 1
        && lost.iter().any(missed)
        && all.all(|(_, live)| live.state == HostState::Unreachable)
    {
        tracing::warn!(
            hosts = state.live.len(),
            "no host reports any more; the controller's own network is the likely cause"
        );
        return;
    }
    for host in lost.iter().filter(|host| missed(host)) {
        tracing::warn!(%host, "the host does not report; it takes no new VMs, its own probably run on");
    }
}
