//! Clients that work on one store at once, through several lives of its controller, and whether what they saw can have
//! happened one call at a time: what was acknowledged is there, what was not is there or not, nothing is there by half, and
//! nobody sees what is not on disk.
//!
//! Runs on any store: `open` opens the same one again. A life ends when a chosen commit fails, before or after it took
//! effect, as at a power cut. The state is under it as in the program: its group commit and its snapshots are part of what
//! is judged.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use dalgu_controller::{
    model::{Outcome, RequestRecord},
    state::{Db, Hooks},
    store::{Batch, Error, Image, Store},
};
use dalgu_proto::ids::ClusterId;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Random;
use crate::linear::{self, Call, Unexplained};

const SITE: ClusterId = ClusterId::from_uuid(uuid::Uuid::from_u128(9));
/// Lives of a controller in a history.
const LIVES: u64 = 4;
/// Clients at once, and calls of each in a life, at most.
const CLIENTS: u64 = 4;
const CALLS: u64 = 6;
/// Keys that they work on: few, so that they meet.
const KEYS: u64 = 3;

type Key = u64;
/// What a client reads under a key.
type Seen = Option<u64>;

/// What a client asks, and what it was answered if it was.
#[derive(Debug, Clone)]
pub enum Op {
    /// All keys at one moment.
    Read(Option<Vec<Seen>>),
    /// Several keys in one transaction; `None` deletes.
    Write(Vec<(Key, Seen)>),
    /// A key, if it still is as expected; answered with what it was instead.
    Swap {
        /// Which.
        key: Key,
        /// As it should be.
        expected: Seen,
        /// What it becomes.
        new: u64,
        /// Done, or what it was.
        answer: Option<Result<(), Seen>>,
    },
}

/// The state of the model.
type Values = BTreeMap<Key, u64>;

fn step(state: &Values, op: &Op) -> Option<Values> {
    let seen = |key: Key| state.get(&key).copied();
    match op {
        Op::Read(None) => Some(state.clone()),
        Op::Read(Some(answer)) => {
            let all: Vec<_> = (0..KEYS).map(seen).collect();
            (*answer == all).then(|| state.clone())
        }
        Op::Write(writes) => {
            let mut next = state.clone();
            for (key, value) in writes {
                match value {
                    Some(value) => next.insert(*key, *value),
                    None => next.remove(key),
                };
            }
            Some(next)
        }
        Op::Swap {
            key,
            expected,
            new,
            answer,
        } => {
            let is = seen(*key);
            let right = if is == *expected { Ok(()) } else { Err(is) };
            if answer.as_ref().is_some_and(|answer| *answer != right) {
                return None;
            }
            let mut next = state.clone();
            if right.is_ok() {
                next.insert(*key, *new);
            }
            Some(next)
        }
    }
}

/// A store whose controller dies at a commit.
struct Mortal<S> {
    store: S,
    commits_left: u64,
    takes_effect: bool,
}

impl<S: Store> Store for Mortal<S> {
    fn load(&mut self) -> Result<Image, Error> {
        self.store.load()
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        if self.commits_left > 0 {
            self.commits_left -= 1;
            return self.store.commit(batches);
        }
        if self.takes_effect {
            self.store.commit(batches)?;
        }
        Err(Error::Injected("the controller dies"))
    }
}

/// What the clients saw, so far.
#[derive(Default)]
struct History {
    clock: AtomicU64,
    calls: Mutex<Vec<Call<Op>>>,
}

impl History {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn calls(&self) -> std::sync::MutexGuard<'_, Vec<Call<Op>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call is made; it stays without an answer until it has one.
    fn begin(&self, op: Op) -> usize {
        let mut calls = self.calls();
        calls.push(Call {
            op,
            begin: self.now(),
            end: u64::MAX,
            answered: false,
        });
        calls.len() - 1
    }

    fn answer(&self, number: usize, op: Op) {
        let mut calls = self.calls();
        calls[number].op = op;
        calls[number].end = self.now();
        calls[number].answered = true;
    }

    /// What has no answer by now gets none, and can take effect no more.
    fn die(&self) {
        let now = self.now();
        for call in self.calls().iter_mut().filter(|call| call.end == u64::MAX) {
            call.end = now;
        }
    }
}

fn name(key: Key) -> String {
    format!("key/{key}")
}

fn record(key: Key, value: u64) -> RequestRecord {
    RequestRecord {
        key: name(key),
        body: value.to_string(),
        outcome: Outcome::HostDeleted,
        time: jiff::Timestamp::UNIX_EPOCH,
    }
}

fn read(state: &dalgu_controller::state::State, key: Key) -> Seen {
    state
        .requests
        .get(&name(key))
        .and_then(|record| record.body.parse().ok())
}

/// Asks for `op` and gives it back with its answer.
async fn ask(db: &Db, op: Op) -> Op {
    match op {
        Op::Read(_) => {
            let state = db.snapshot();
            Op::Read(Some((0..KEYS).map(|key| read(&state, key)).collect()))
        }
        Op::Write(writes) => {
            db.change(|tx| {
                for (key, value) in &writes {
                    match value {
                        Some(value) => tx.put_request(record(*key, *value)),
                        None => tx.forget_request(&name(*key)),
                    }
                }
            })
            .await;
            Op::Write(writes)
        }
        Op::Swap {
            key, expected, new, ..
        } => {
            let answer = db.transact(|tx| match read(tx, key) {
                seen if seen == expected => {
                    tx.put_request(record(key, new));
                    Ok(())
                }
                seen => Err(seen),
            });
            let answer = Some(answer.await);
            Op::Swap {
                key,
                expected,
                new,
                answer,
            }
        }
    }
}

fn choose(random: &mut Random, db: &Db, value: u64) -> Op {
    let key = random.below(KEYS);
    match random.below(4) {
        0 => Op::Read(None),
        1 => {
            let other = (key + 1) % KEYS;
            let gone = random.coin().then_some(value);
            Op::Write(vec![(key, Some(value)), (other, gone)])
        }
        2 => Op::Write(vec![(key, random.coin().then_some(value))]),
        _ => Op::Swap {
            key,
            expected: read(&db.snapshot(), key),
            new: value,
            answer: None,
        },
    }
}

/// Lets clients work on a store through several lives, and judges what they saw.
///
/// # Errors
/// If it cannot have happened.
///
/// # Panics
/// If the store cannot be opened.
pub async fn run<S: Store>(seed: u64, mut open: impl FnMut() -> S) -> Result<usize, Unexplained> {
    let (mut random, history) = (Random::new(seed), Arc::new(History::default()));
    for life in 0..LIVES {
        let last = life + 1 == LIVES;
        let store = Mortal {
            store: open(),
            // The first commit is that of the term. The last life is not cut short.
            commits_left: if last { u64::MAX } else { 1 + random.below(12) },
            takes_effect: random.coin(),
        };
        let died = CancellationToken::new();
        let hooks = Hooks {
            failed: Box::new({
                let died = died.clone();
                move |_| died.cancel()
            }),
            ..Hooks::default()
        };
        let db = Db::open(store, SITE, hooks).expect("a store that was cut can be opened");
        let number = history.begin(Op::Read(None));
        history.answer(number, ask(&db, Op::Read(None)).await);
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (db, history) = (db.clone(), history.clone());
            let mut random = Random::new(seed ^ (life << 32) ^ (client << 40));
            let calls = if last { 1 } else { CALLS };
            clients.spawn(async move {
                for call in 0..calls {
                    let value = life * 10_000 + client * 100 + call + 1;
                    let op = choose(&mut random, &db, value);
                    let number = history.begin(op.clone());
                    let answered = ask(&db, op).await;
                    history.answer(number, answered);
                    tokio::task::yield_now().await;
                }
            });
        }
        // Cancel safe: whoever waits when the controller dies is never answered.
        tokio::select! {
            () = died.cancelled() => clients.shutdown().await,
            () = async { while clients.join_next().await.is_some() {} } => {}
        }
        history.die();
    }
    let calls = history.calls().clone();
    linear::check(Values::new(), &calls, step).map(|()| calls.len())
}
