//! Pools that fill up: told once when a pool crosses a mark, and again when it has room. Called with each sample of a host, inside
//! transactions.
//!
//! A pool has room again some way below the mark, so that one that stands at it is not told of with each write. What was told is in the
//! events: a controller that starts anew does not tell it again.

use dalgu_proto::{host::Pool, ids::HostName};

use crate::{
    model::EventKind,
    placement::{PoolPolicy, used_percent},
    state::{State, Tx},
};

/// So many percent below a mark a pool is below it again.
const HYSTERESIS_PERCENT: u64 = 5;

/// How full a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// It has room.
    Room,
    /// It is to be looked after.
    NearlyFull,
    /// It takes no new disks.
    Full,
}

impl Level {
    /// The level of a pool with so much in use, which was at another before.
    pub fn of(before: Self, used_percent: u64, policy: &PoolPolicy) -> Self {
        let reached = |level: Self, mark: u64| {
            let mark = if before >= level {
                mark.saturating_sub(HYSTERESIS_PERCENT)
            } else {
                mark
            };
            used_percent >= mark
        };
        if reached(Self::Full, policy.full_percent) {
            Self::Full
        } else if reached(Self::NearlyFull, policy.warn_percent) {
            Self::NearlyFull
        } else {
            Self::Room
        }
    }

    /// Stable word of the event.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Room => "PoolHasRoom",
            Self::NearlyFull => "PoolNearlyFull",
            Self::Full => "PoolFull",
        }
    }

    fn of_reason(reason: &str) -> Option<Self> {
        let all = [Self::Room, Self::NearlyFull, Self::Full];
        all.into_iter().find(|level| level.reason() == reason)
    }
}

/// How the messages of a pool begin: what they are known by.
fn about(pool: &Pool) -> String {
    let kind = if pool.shared { "shared pool" } else { "pool" };
    format!("{kind} {} is", pool.name)
}

/// What was told last of a pool.
fn told(state: &State, host: &HostName, pool: &Pool) -> Level {
    let about = about(pool);
    let mut events = state.events.values().rev();
    let last = events.find_map(|event| {
        let same = event.kind == EventKind::Host && event.message.starts_with(&about);
        let here = pool.shared || event.subject == host.as_str();
        Level::of_reason(&event.reason).filter(|_| same && here)
    });
    last.unwrap_or(Level::Room)
}

/// Notes how full the pools of a host are.
pub fn note(tx: &mut Tx, host: &HostName, pools: &[Pool]) {
    for pool in pools
        .iter()
        .filter(|pool| pool.error.is_none() && pool.capacity_bytes > 0)
    {
        let key = (Some(host.clone()).filter(|_| !pool.shared), pool.name.clone());
        let used = used_percent(pool.capacity_bytes, pool.available_bytes, pool.used_bytes);
        let policy = tx.pool_policy;
        let known = tx.pool_levels.get(&key).copied();
        // One that has room, and of which nothing is known, is not worth a search.
        let before = match known {
            Some(level) => level,
            None if used < policy.warn_percent.saturating_sub(HYSTERESIS_PERCENT) => continue,
            None => told(tx, host, pool),
        };
        let level = Level::of(before, used, &policy);
        if known != Some(level) {
            tx.set_pool_level(key, level);
        }
        if level != before {
            tell(tx, host, pool, level, used);
        }
    }
}

fn tell(tx: &mut Tx, host: &HostName, pool: &Pool, level: Level, used: u64) {
    let what = match level {
        Level::Room => "there is room again",
        Level::NearlyFull => "free or add room before guests fill their disks",
        Level::Full => "no new disk is placed there; guests that write more may stop",
    };
    let message = format!("{} {used} % full: {what}", about(pool));
    tracing::info!(%host, pool = pool.name, used, level = level.reason(), "a pool has crossed a mark");
    tx.event(EventKind::Host, level.reason(), host, message, None);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixtures::{self, host_name},
        state::{Db, Hooks},
        store::memory::Disk,
    };

    #[test]
    fn a_pool_crosses_a_mark_upwards_at_it_and_downwards_some_way_below() {
        use Level::{Full, NearlyFull, Room};
        let policy = PoolPolicy::default();
        for (before, used, after) in [
            (Room, 79, Room),
            (Room, 80, NearlyFull),
            (NearlyFull, 76, NearlyFull),
            (NearlyFull, 74, Room),
            (NearlyFull, 95, Full),
            (Room, 97, Full),
            (Full, 91, Full),
            (Full, 89, NearlyFull),
            (Full, 76, NearlyFull),
            (Full, 10, Room),
        ] {
            assert_eq!(Level::of(before, used, &policy), after, "{before:?} {used}");
        }
    }

    fn pool(name: &str, shared: bool, used: u64) -> Pool {
        Pool {
            name: name.into(),
            path: format!("/{name}"),
            shared,
            capacity_bytes: 1000 << 20,
            // A part of it is kept for root.
            available_bytes: (900 - used * 9) << 20,
            used_bytes: (used * 9) << 20,
            error: None,
        }
    }

    async fn sample(db: &Db, host: &str, pools: Vec<Pool>) -> Vec<String> {
        let before = db.snapshot().events.len();
        db.change(move |tx| note(tx, &host_name(host), &pools)).await;
        let state = db.snapshot();
        let new = state.events.values().skip(before);
        new.map(|event| format!("{} {}", event.subject, event.reason))
            .collect()
    }

    #[tokio::test]
    async fn each_crossing_is_told_once_and_a_shared_pool_once_for_all_hosts() {
        let disk = Disk::default();
        let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let local = |used| vec![pool("local", false, used)];
        let none: [&str; 0] = [];
        assert_eq!(sample(&db, "h1", local(50)).await, none);
        assert_eq!(sample(&db, "h1", local(81)).await, ["h1 PoolNearlyFull"]);
        for used in [82, 79, 81] {
            assert_eq!(sample(&db, "h1", local(used)).await, none, "{used}");
        }
        assert_eq!(sample(&db, "h2", local(81)).await, ["h2 PoolNearlyFull"]);
        assert_eq!(sample(&db, "h1", local(96)).await, ["h1 PoolFull"]);
        let shared = |used| vec![pool("san", true, used)];
        assert_eq!(sample(&db, "h1", shared(85)).await, ["h1 PoolNearlyFull"]);
        assert_eq!(sample(&db, "h2", shared(86)).await, none);
        // A controller that starts anew knows what was told.
        drop(db);
        let db = Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        assert_eq!(sample(&db, "h2", shared(87)).await, none);
        assert_eq!(sample(&db, "h1", local(96)).await, none);
        assert_eq!(sample(&db, "h1", local(20)).await, ["h1 PoolHasRoom"]);
        assert_eq!(sample(&db, "h1", local(20)).await, none);
        let broken = vec![Pool {
            error: Some("gone".into()),
            ..pool("san", true, 99)
        }];
        assert_eq!(sample(&db, "h2", broken).await, none);
    }
}
