//! A store in memory, for tests: what was committed outlives the controller that wrote it, and a chosen commit can fail
//! before or after it took effect, as at a power cut.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{Batch, Error, Image, Store, Table};

/// When a commit fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// Before anything was written by commit number N, counted from 0.
    Before(u64),
    /// After everything was written by commit number N.
    After(u64),
}

#[derive(Debug, Default)]
struct Inner {
    records: BTreeMap<(Table, String), String>,
    events: BTreeMap<u64, String>,
    commits: u64,
    crash: Option<Crash>,
}

/// The disk of a [`Memory`] store: keeps its content when the store is dropped.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<Inner>>);

impl Disk {
    /// A disk that holds this.
    pub fn of(image: Image) -> Self {
        let records = image.records.into_iter();
        let inner = Inner {
            records: records.map(|(table, key, value)| ((table, key), value)).collect(),
            events: image.events.into_iter().collect(),
            ..Inner::default()
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits so far.
    pub fn commits(&self) -> u64 {
        self.lock().commits
    }

    /// Plans a failure.
    pub fn crash_at(&self, crash: Option<Crash>) {
        self.lock().crash = crash;
    }

    /// A store on this disk.
    pub fn open(&self) -> Memory {
        Memory(self.clone())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Memory(Disk);

impl Store for Memory {
    fn load(&mut self) -> Result<Image, Error> {
        let inner = self.0.lock();
        Ok(Image {
            records: inner
                .records
                .iter()
                .map(|((t, k), v)| (*t, k.clone(), v.clone()))
                .collect(),
            events: inner.events.iter().map(|(r, v)| (*r, v.clone())).collect(),
        })
    }

    fn commit(&mut self, batches: &[Batch]) -> Result<(), Error> {
        let mut inner = self.0.lock();
        let number = inner.commits;
        if inner.crash == Some(Crash::Before(number)) {
            return Err(Error::Injected("before the commit"));
        }
        for batch in batches {
            for write in &batch.writes {
                let key = (write.table, write.key.clone());
                match &write.value {
                    Some(value) => inner.records.insert(key, value.clone()),
                    None => inner.records.remove(&key),
                };
            }
            inner.events.extend(batch.events.iter().cloned());
            if batch.forget_events_to > 0 {
                inner.events = inner.events.split_off(&(batch.forget_events_to + 1));
            }
        }
        inner.commits += 1;
        if inner.crash == Some(Crash::After(number)) {
            return Err(Error::Injected("after the commit"));
        }
        Ok(())
    }
}
