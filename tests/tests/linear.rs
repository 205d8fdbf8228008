//! Every store keeps what it promises when many use it at once and it dies in between; and ones that do not are found out.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use dalgu_controller::store::{
    Batch, Error, Image, Store,
    memory::{Disk, Memory},
    sqlite::Sqlite,
};
use dalgu_tests::store::histories;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_of_sqlite_see_can_have_happened_one_call_at_a_time() {
    let mut calls = 0;
    for seed in 0..24 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dalgu.db");
        // The lock of the last life is let go when its thread has ended.
        let open = || loop {
            match Sqlite::open(&path) {
                Err(Error::InUse { .. }) => std::thread::yield_now(),
                opened => break opened.unwrap(),
            }
        };
        calls += histories::run(seed, open)
            .await
            .unwrap_or_else(|why| panic!("seed {seed}: {why:?}"));
    }
    assert!(calls > 24 * 20, "{calls}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_of_the_store_in_memory_see_can_have_happened_one_call_at_a_time() {
    for seed in 0..200 {
        let disk = Disk::default();
        histories::run(seed, || disk.open())
            .await
            .unwrap_or_else(|why| panic!("seed {seed}: {why:?}"));
    }
}

/// What is wrong with a store.
#[derive(Debug, Clone, Copy)]
enum Flaw {
    /// Says that the last of several batches is kept, and has lost it.
    LosesTheLast,
    /// Keeps a part of a batch.
    Halves,
    /// Writes what came first last.
    Reverses,
    /// Finds at its start what was there one commit earlier.
    FindsTheLastButOne,
    /// Deletes nothing.
    KeepsTheDeleted,
}

/// A store with a flaw.
struct Flawed {
    flaw: Flaw,
    store: Memory,
    earlier: std::sync::Arc<std::sync::Mutex<Vec<Image>>>,
}

impl Store for Flawed {
    fn load(&mut self) -> Result<Image, Error> {
        let earlier = self.earlier.lock().unwrap();
        match (self.flaw, earlier.last()) {
            (Flaw::FindsTheLastButOne, Some(image)) => Ok(image.clone()),
            _ => self.store.load(),
        }
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        let image = self.store.load()?;
        self.earlier.lock().unwrap().push(image);
        let mut batches = batches.to_vec();
        match self.flaw {
            // The term of a start is one batch alone.
            Flaw::LosesTheLast if batches.len() > 1 => drop(batches.pop()),
            Flaw::LosesTheLast | Flaw::FindsTheLastButOne => {}
            Flaw::Reverses => batches.reverse(),
            Flaw::Halves => {
                for batch in batches.iter_mut().filter(|batch| batch.writes.len() > 2) {
                    batch.writes.remove(1);
                }
            }
            Flaw::KeepsTheDeleted => {
                for batch in &mut batches {
                    batch.writes.retain(|write| write.value.is_some());
                }
            }
        }
        self.store.commit(&batches)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_breaks_its_promise_is_found_out() {
    for flaw in [
        Flaw::LosesTheLast,
        Flaw::Halves,
        Flaw::Reverses,
        Flaw::FindsTheLastButOne,
        Flaw::KeepsTheDeleted,
    ] {
        let mut found = false;
        for seed in 0..300 {
            let (disk, earlier) = (Disk::default(), std::sync::Arc::default());
            let open = || Flawed {
                flaw,
                store: disk.open(),
                earlier: std::sync::Arc::clone(&earlier),
            };
            if histories::run(seed, open).await.is_err() {
                found = true;
                break;
            }
        }
        assert!(found, "{flaw:?} goes unnoticed");
    }
}
