//! Which VMs want a look, and when.
//!
//! The rules of kube-runtime's scheduler: a key is there once; the earliest time wins; a key that is being worked on is
//! not given out again, and being added meanwhile means one more run after it. Filled by the state's writer, by
//! timers and by the runner; emptied by the runner. Bounded by the number of VMs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// First wait after a failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
/// Longest wait after a failure.
const BACKOFF_LAST: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Entry {
    running: bool,
    due: Option<(Instant, u64)>,
    failures: u32,
}

#[derive(Debug)]
struct Inner<K> {
    entries: BTreeMap<K, Entry>,
    order: BTreeSet<(Instant, u64, K)>,
    added: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Queue<K> {
    inner: Mutex<Inner<K>>,
    changed: Notify,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        let inner = Inner {
            entries: BTreeMap::new(),
            order: BTreeSet::new(),
            added: 0,
        };
        Self {
            inner: Mutex::new(inner),
            changed: Notify::new(),
        }
    }
}

impl<K: Copy + Ord> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, Inner<K>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a look at once.
    pub fn add(&self, key: K) {
        self.add_at(key, Instant::now());
    }

    /// Asks for a look after a while; an earlier one that was asked for stays.
    pub fn add_after(&self, key: K, delay: Duration) {
        // Far enough to be never, near enough not to overflow.
        self.add_at(key, Instant::now() + delay.min(Duration::from_secs(86_400)));
    }

    fn add_at(&self, key: K, due: Instant) {
        self.lock().add(key, due);
        self.changed.notify_one();
    }

    /// The next key whose time has come. Cancel safe: a key is taken only when it is returned.
    pub async fn next(&self) -> K {
        loop {
            let wait = {
                let mut inner = self.lock();
                match inner.order.first().copied() {
                    Some((due, _, key)) if due <= Instant::now() => {
                        inner.take(key);
                        return key;
                    }
                    first => first.map(|(due, ..)| due),
                }
            };
            match wait {
                // Cancel safe: a permit of `notified` that is lost is made up for by the look above.
                Some(due) => tokio::select! {
                    biased;
                    () = tokio::time::sleep_until(due) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    /// The work on a key that was given out.
    pub fn work(&self, key: K) -> Work<'_, K> {
        Work {
            queue: self,
            key,
            over: false,
        }
    }

    /// Says that the work on a key has ended well, and when it wants the next look.
    pub fn done(&self, key: K, again: Option<Duration>) {
        self.finish(key, again, false);
    }

    /// Says that the work on a key has failed; it comes again, later each time. Returns when.
    pub fn failed(&self, key: K) -> Duration {
        let failures = self.lock().entries.get(&key).map_or(0, |entry| entry.failures);
        let delay = backoff(failures);
        self.finish(key, Some(delay), true);
        delay
    }

    fn finish(&self, key: K, again: Option<Duration>, failed: bool) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(&key) else {
            return;
        };
        entry.running = false;
        entry.failures = if failed {
            entry.failures.saturating_add(1)
        } else {
            0
        };
        let added = entry.due.take();
        if let Some(delay) = again {
            inner.add(key, Instant::now() + delay.min(Duration::from_secs(86_400)));
        }
        if let Some((due, _)) = added {
            inner.add(key, due);
        }
        if inner
            .entries
            .get(&key)
            .is_some_and(|entry| entry.due.is_none() && entry.failures == 0)
        {
            inner.entries.remove(&key);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Keys that wait or are being worked on.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The work on a key that was given out. If it ends without a word, by a panic, the key comes again as after a failure:
/// else it would count as being worked on for ever.
#[derive(Debug)]
pub struct Work<'a, K: Copy + Ord> {
    queue: &'a Queue<K>,
    key: K,
    over: bool,
}

impl<K: Copy + Ord> Work<'_, K> {
    /// See [`Queue::done`].
    pub fn done(mut self, again: Option<Duration>) {
        self.over = true;
        self.queue.done(self.key, again);
    }

    /// See [`Queue::failed`].
    pub fn failed(mut self) -> Duration {
        self.over = true;
        self.queue.failed(self.key)
    }
}

impl<K: Copy + Ord> Drop for Work<'_, K> {
    fn drop(&mut self) {
        if !self.over {
            self.queue.failed(self.key);
        }
    }
}

impl<K: Copy + Ord> Inner<K> {
    fn add(&mut self, key: K, due: Instant) {
        self.added += 1;
        let number = self.added;
        let entry = self.entries.entry(key).or_default();
        if entry.due.is_some_and(|(earlier, _)| earlier <= due) {
            return;
        }
        let old = entry.due.replace((due, number));
        if !entry.running {
            if let Some((due, number)) = old {
                self.order.remove(&(due, number, key));
            }
            self.order.insert((due, number, key));
        }
    }

    fn take(&mut self, key: K) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.running = true;
            if let Some((due, number)) = entry.due.take() {
                self.order.remove(&(due, number, key));
            }
        }
    }
}

fn backoff(failures: u32) -> Duration {
    BACKOFF_FIRST
        .saturating_mul(1 << failures.min(16))
        .min(BACKOFF_LAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn at_once(queue: &Queue<u32>) -> Option<u32> {
        tokio::time::timeout(Duration::ZERO, queue.next()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_added_twice_is_given_out_once() {
        let queue = Queue::default();
        queue.add(1);
        queue.add(1);
        assert_eq!(queue.next().await, 1);
        queue.done(1, None);
        assert_eq!(at_once(&queue).await, None);
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_added_during_its_run_runs_once_more_and_never_twice_at_once() {
        let queue = Queue::default();
        queue.add(1);
        assert_eq!(queue.next().await, 1);
        queue.add(1);
        queue.add(1);
        assert_eq!(at_once(&queue).await, None, "it is still being worked on");
        queue.done(1, None);
        assert_eq!(at_once(&queue).await, Some(1));
        queue.done(1, None);
        assert_eq!(at_once(&queue).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_time_wins() {
        let queue = Queue::default();
        let begin = Instant::now();
        queue.add_after(1, Duration::from_secs(60));
        queue.add_after(1, Duration::from_secs(5));
        queue.add_after(1, Duration::from_secs(30));
        queue.add_after(2, Duration::from_secs(10));
        assert_eq!(queue.next().await, 1);
        assert_eq!(begin.elapsed().as_secs(), 5);
        queue.done(1, None);
        assert_eq!(queue.next().await, 2);
        queue.done(2, None);
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_trigger_during_a_run_beats_the_later_look_the_run_asked_for() {
        let queue = Queue::default();
        queue.add(1);
        queue.next().await;
        queue.add(1);
        queue.done(1, Some(Duration::from_secs(60)));
        assert_eq!(at_once(&queue).await, Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_come_later_each_time_until_a_success() {
        let queue = Queue::default();
        let mut waits = vec![];
        for _ in 0..10 {
            queue.add(1);
            queue.next().await;
            waits.push(queue.failed(1).as_millis());
        }
        assert_eq!(
            waits,
            [200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]
        );
        queue.next().await;
        queue.done(1, None);
        queue.add(1);
        queue.next().await;
        assert_eq!(queue.failed(1).as_millis(), 200);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_whose_work_panics_comes_again_and_later_each_time() {
        let queue = std::sync::Arc::new(Queue::default());
        queue.add(1);
        let begin = Instant::now();
        for _ in 0..2 {
            let key = tokio::time::timeout(Duration::from_secs(9), queue.next()).await;
            let (queue, key) = (queue.clone(), key.expect("it is lost"));
            let run = tokio::spawn(async move {
                let _work = queue.work(key);
                panic!("expected in this test");
            });
            assert!(run.await.unwrap_err().is_panic());
        }
        queue.next().await;
        assert_eq!(begin.elapsed().as_millis(), 200 + 400);
        queue.work(1).done(None);
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_by_a_new_key() {
        let queue = std::sync::Arc::new(Queue::default());
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { queue.next().await }
        });
        tokio::task::yield_now().await;
        queue.add(7);
        assert_eq!(waiting.await.unwrap(), 7);
    }
}
