//! One run of a program: it goes on, it stands still, or it is over.
//!
//! Everything that is handed to a program goes through its [`Life`]: while it stands still its calls wait, and once it is
//! over they wait for ever. So a program that was killed has no effect any more, wherever it was, although its tasks
//! still exist.

use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::lock;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Runs,
    Frozen,
    Over,
}

/// See the module. Clones are the same life.
#[derive(Debug, Clone)]
pub struct Life {
    state: Arc<Mutex<State>>,
    /// Wakes in the order in which they came, which a `watch` does not.
    changed: Arc<Notify>,
    /// Cancelled when it is over.
    pub end: CancellationToken,
}

impl Default for Life {
    fn default() -> Self {
        Self {
            state: Arc::new(Mutex::new(State::Runs)),
            changed: Arc::default(),
            end: CancellationToken::new(),
        }
    }
}

impl Life {
    fn state(&self) -> State {
        *lock(&self.state)
    }

    /// Returns when the program moves; never when it is over.
    pub async fn pass(&self) {
        loop {
            // Registered before the look, so that no change is missed.
            let changed = self.changed.notified();
            match self.state() {
                State::Runs => return,
                State::Frozen => changed.await,
                State::Over => std::future::pending().await,
            }
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.state() == State::Over
    }

    /// It stands still until it is thawed.
    pub fn freeze(&self) {
        self.set(State::Runs, State::Frozen);
    }

    /// It moves again.
    pub fn thaw(&self) {
        self.set(State::Frozen, State::Runs);
    }

    fn set(&self, from: State, to: State) {
        {
            let mut state = lock(&self.state);
            if *state != from {
                return;
            }
            *state = to;
        }
        self.changed.notify_waiters();
    }

    /// It is over.
    pub fn kill(&self) {
        *lock(&self.state) = State::Over;
        self.changed.notify_waiters();
        self.end.cancel();
    }

    /// Goes no further: for whoever has just been killed.
    pub async fn stop_here<T>(&self) -> T {
        std::future::pending().await
    }
}
