//! Forgets what need not be kept: request ids, operations that ended long ago, and their migrations, and placements that were refused long ago.
//!
//! A task of the controller. Events are not its business: each change of the state drops the oldest.

use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::state::{Db, State, Tx};

/// For so long the API promises that a request id is known again.
pub const REQUESTS_KEPT: Duration = Duration::from_secs(24 * 3600);
/// For so long at least the API promises to keep operations that have ended.
pub const OPERATIONS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time between two rounds.
const ROUND: Duration = Duration::from_secs(600);
/// Records forgotten in one change, so that none is long.
const AT_ONCE: usize = 500;

/// Runs until `stop`; keeps ended operations for `operations_kept`, and never less than promised.
pub async fn run(db: Db, operations_kept: Duration, stop: CancellationToken) {
    let operations_kept = operations_kept.max(OPERATIONS_KEPT);
    let mut tick = tokio::time::interval(ROUND);
    loop {
        // Cancel safe: a tick that is lost comes again.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        while old(&db.snapshot(), db.now(), operations_kept) > 0 {
            db.change(|tx| forget(tx, operations_kept)).await;
        }
    }
}

fn before(now: Timestamp, kept: Duration) -> Timestamp {
    now.saturating_sub(kept).unwrap_or(Timestamp::MIN)
}

fn old(state: &State, now: Timestamp, operations_kept: Duration) -> usize {
    let (requests, operations) = (before(now, REQUESTS_KEPT), before(now, operations_kept));
    state
        .requests
        .values()
        .filter(|request| request.time < requests)
        .count()
        + state
            .operations
            .values()
            .filter(|operation| operation.end_time.is_some_and(|end| end < operations))
            .count()
        + state
            .refused_placements
            .values()
            .filter(|refused| refused.time < operations)
            .count()
}

fn forget(tx: &mut Tx, operations_kept: Duration) {
    let (requests, operations) = (before(tx.now(), REQUESTS_KEPT), before(tx.now(), operations_kept));
    let keys: Vec<_> = tx
        .requests
        .values()
        .filter(|r| r.time < requests)
        .take(AT_ONCE)
        .map(|r| r.key.clone())
        .collect();
    for key in keys {
        tx.forget_request(&key);
    }
    let refused = tx
        .refused_placements
        .values()
        .filter(|refused| refused.time < operations);
    let refused: Vec<_> = refused.take(AT_ONCE).map(|refused| refused.vm.clone()).collect();
    for vm in refused {
        tx.forget_refused_placement(&vm);
    }
    let ended = tx
        .operations
        .values()
        .filter(|o| o.end_time.is_some_and(|end| end < operations));
    let ended: Vec<_> = ended.take(AT_ONCE).map(|o| (o.id, o.migration)).collect();
    for (id, migration) in ended {
        tx.forget_operation(id);
        if let Some(migration) = migration {
            tx.forget_migration(migration);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixtures,
        model::{OperationKind, OperationRecord, OperationState, Outcome, RequestRecord},
        state::Hooks,
        store::memory::Disk,
    };

    #[tokio::test]
    async fn only_what_is_old_and_has_ended_is_forgotten() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let vm = fixtures::vm("web", "h1");
        let now = Timestamp::now();
        let operation = |age: u64, ended: bool| OperationRecord {
            state: if ended {
                OperationState::Succeeded
            } else {
                OperationState::Active
            },
            end_time: ended.then(|| before(now, Duration::from_secs(age * 86_400))),
            ..fixtures::operation(&vm, OperationKind::Start, None)
        };
        let (fresh, stale, active) = (operation(6, true), operation(8, true), operation(0, false));
        let kept = [fresh.id, active.id];
        let request = |hours: u64| RequestRecord {
            key: format!("operator/x/{hours}"),
            body: String::new(),
            outcome: Outcome::HostDeleted,
            time: before(now, Duration::from_secs(hours * 3600)),
        };
        db.change(|tx| {
            [fresh, stale, active]
                .into_iter()
                .for_each(|operation| tx.put_operation(operation));
            [request(23), request(25)]
                .into_iter()
                .for_each(|request| tx.put_request(request));
        })
        .await;
        assert_eq!(old(&db.snapshot(), now, OPERATIONS_KEPT), 2);
        db.change(|tx| forget(tx, OPERATIONS_KEPT)).await;
        let state = db.snapshot();
        assert_eq!(
            state
                .operations
                .keys()
                .copied()
                .collect::<std::collections::BTreeSet<_>>(),
            kept.into()
        );
        assert_eq!(state.requests.keys().collect::<Vec<_>>(), ["operator/x/23"]);
    }
}
