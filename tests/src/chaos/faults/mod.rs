//! What is broken in a chaos run, and healed after a random time: daemons and guests are killed or frozen, hosts lose
//! power, cables drop packets in one or both directions, disks are full. Run beside the clients and the eye by
//! [`super::run`]; each fault is told to the books before it happens.

mod choice;
mod inject;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

pub use self::choice::Fault;
use super::books::{Books, count};
use super::random::Random;
use crate::lab::{Daemon, Lab};

/// At most so many things are broken at a time.
const AT_ONCE: usize = 3;
/// Between two faults, in ms.
const PAUSE: (u64, u64) = (1200, 6500);
/// Between two looks whether a daemon has ended by itself.
const LOOK: Duration = Duration::from_secs(1);
/// A daemon that does not start is started again so often: its host may still be in trouble.
const STARTS: u32 = 6;
/// A full disk may end a daemon for so long after it: it will not go on with what it could not write.
const AFTERMATH: Duration = Duration::from_secs(20);

/// Breaks and heals.
#[derive(Clone)]
pub struct Breaker {
    lab: Lab,
    books: Rc<RefCell<Books>>,
    /// What is being broken or healed.
    held: Rc<RefCell<BTreeSet<String>>>,
}

impl Breaker {
    /// A breaker of a lab.
    #[must_use]
    pub fn new(lab: &Lab, books: Rc<RefCell<Books>>) -> Self {
        Self {
            lab: lab.clone(),
            books,
            held: Rc::default(),
        }
    }

    /// Breaks and heals until the time is over; returns when all is healed.
    ///
    /// # Errors
    /// If something cannot be broken or healed as meant: then the run says nothing.
    pub async fn run(&self, mut random: Random, until: Instant) -> anyhow::Result<()> {
        let mut going = JoinSet::new();
        while Instant::now() < until {
            sleep(random.millis(PAUSE.0, PAUSE.1)).await;
            while let Some(ended) = going.try_join_next() {
                ended.context("a fault's task")??;
            }
            if going.len() >= AT_ONCE {
                continue;
            }
            let Some(fault) = choice::choose(&self.lab, &self.books.borrow(), &mut random) else {
                continue;
            };
            if !self.hold(&fault) {
                continue;
            }
            let (low, high) = fault.lasts();
            let lasts = random.millis(low, high);
            let breaker = self.clone();
            going.spawn_local(async move { breaker.one(fault, lasts).await });
        }
        while let Some(ended) = going.join_next().await {
            ended.context("a fault's task")??;
        }
        Ok(())
    }

    fn hold(&self, fault: &Fault) -> bool {
        let mut held = self.held.borrow_mut();
        let keys = fault.keys();
        let free = keys.iter().all(|key| !held.contains(key));
        if free {
            held.extend(keys);
        }
        free
    }

    async fn one(&self, fault: Fault, lasts: Duration) -> anyhow::Result<()> {
        {
            let mut books = self.books.borrow_mut();
            books.tell(&format!("fault: {fault:?} for {} ms", lasts.as_millis()));
            count(&mut books.faults, fault.class());
        }
        let outcome = inject::carry_out(&self.lab, &self.books, &fault, lasts).await;
        self.books.borrow_mut().tell(&format!("healed: {fault:?}"));
        let mut held = self.held.borrow_mut();
        for key in fault.keys() {
            held.remove(&key);
        }
        outcome.with_context(|| format!("{fault:?}"))
    }

    /// Starts a daemon that ended by itself, as systemd would, and notes that it did. Runs until it is dropped.
    pub async fn supervise(&self) {
        let mut daemons = vec![(Daemon::Controller, "controller".to_owned())];
        for host in self.lab.hosts() {
            daemons.push((Daemon::Agent(host.number), format!("{}/agent", host.name)));
            daemons.push((Daemon::Libvirtd(host.number), format!("{}/libvirtd", host.name)));
        }
        loop {
            sleep(LOOK).await;
            for (daemon, name) in &daemons {
                let alone = !self.held.borrow().contains(name);
                if alone && !self.lab.is_running(*daemon).unwrap_or(false) {
                    self.raise(*daemon, name).await;
                }
            }
        }
    }

    async fn raise(&self, daemon: Daemon, name: &str) {
        self.held.borrow_mut().insert(name.to_owned());
        {
            let mut books = self.books.borrow_mut();
            let after_full = books.full.is_some_and(|since| since.elapsed() < AFTERMATH);
            if after_full {
                books.tell(&format!("{name} ended after a disk was full"));
                count(&mut books.checks, "daemons that ended after a full disk");
            } else {
                books.violation("no daemon ends by itself", name.to_owned());
            }
        }
        let started = start(&self.lab, daemon).await;
        if let Err(error) = started {
            let evidence = format!("{name}: {error:#}");
            self.books.borrow_mut().violation("a daemon comes back", evidence);
        }
        self.held.borrow_mut().remove(name);
    }
}

/// Starts a daemon, again where it does not come up: a disk may be full, or libvirt frozen.
///
/// # Errors
/// If it does not come up at all.
async fn start(lab: &Lab, daemon: Daemon) -> anyhow::Result<()> {
    let mut last = Ok(());
    for _ in 0..STARTS {
        if lab.is_running(daemon)? {
            return Ok(());
        }
        last = lab.start(daemon).await;
        if last.is_ok() {
            return last;
        }
        sleep(LOOK).await;
    }
    last
}
