//! Chaos on real libvirt hosts: random operations through the API, faults of every kind, and an independent eye that
//! judges. Used by the `chaos` program (`make chaos`) and, shorter, by an end-to-end test.
//!
//! ```text
//!   clients ──requests──> Dalgu <──breaks, heals── faults
//!      │                    │                        │
//!      │ asked, answered    │ processes, logs        │ broken
//!      └──────> books <─────eye (judges)<────────────┘
//! ```
//!
//! The seed decides what is chosen; when it meets what, the machine decides. So a seed does not repeat a run to the
//! letter; the timeline in the report tells what happened when.

pub mod books;
pub mod cable;
mod clients;
pub mod eye;
mod faults;
pub mod ground;
mod random;
mod report;
mod rest;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::{try_join, try_join_all};
use tokio::task::LocalSet;
use tokio::time::Instant;

use self::books::Books;
use self::clients::Client;
use self::eye::Eye;
use self::faults::Breaker;
use self::random::Random;
pub use self::report::Report;
use self::rest::Rest;
use crate::lab::Lab;
use crate::operator::Operator;

/// How to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Decides every choice.
    pub seed: u64,
    /// How long things are asked for and broken.
    pub lasts: Duration,
    /// How many VMs.
    pub vms: u8,
}

/// Between two requests of one operator, in ms.
const PAUSE: (u64, u64) = (800, 9000);

/// Runs chaos on a fresh lab with Dalgu. Answers the report and the timeline; violations are in the report.
///
/// # Errors
/// If the lab cannot be prepared.
pub async fn run(lab: &Lab, settings: &Settings) -> anyhow::Result<(Report, String)> {
    ground::lay(lab).await.context("prepare the hosts")?;
    let operator = Operator::connect(lab).await?;
    ground::make_room(&operator).await?;
    let books = Rc::new(RefCell::new(Books::default()));
    let began = Instant::now();
    let local = LocalSet::new();
    let outcome = local.run_until(all(lab, &operator, settings, &books)).await;
    let books = books.borrow();
    let seconds = settings.lasts.min(began.elapsed()).as_secs_f64();
    let mut report = Report::of(&books, settings.seed, seconds);
    match outcome {
        Ok(rest) => report.rest = Some(rest),
        Err(error) => report.broken_off = Some(format!("{error:#}")),
    }
    Ok((report, books.timeline().to_owned()))
}

async fn all(
    lab: &Lab,
    operator: &Operator,
    settings: &Settings,
    books: &Rc<RefCell<Books>>,
) -> anyhow::Result<Rest> {
    let eye = tokio::task::spawn_local(Eye::new(lab, books.clone()).watch());
    let breaker = Breaker::new(lab, books.clone());
    let supervisor = breaker.clone();
    let supervising = tokio::task::spawn_local(async move { supervisor.supervise().await });
    let until = Instant::now() + settings.lasts;
    let hosts: Vec<_> = lab.hosts().into_iter().map(|host| host.name).collect();
    let clients = (1..=settings.vms).map(|number| {
        let random = Random::new(settings.seed, u64::from(number));
        let name = format!("c{number:02}");
        Client::new(operator, books.clone(), random, name, hosts.clone(), PAUSE).run(until)
    });
    let cordons = Box::pin(clients::cordon(
        operator.clone(),
        books.clone(),
        Random::new(settings.seed, 1001),
        hosts.clone(),
        until,
    ));
    let breaking = breaker.run(Random::new(settings.seed, 1000), until);
    let asking = try_join(try_join_all(clients), cordons);
    try_join(asking, breaking).await?;
    let rest = rest::come_to_rest(lab, operator, books).await;
    eye.abort();
    supervising.abort();
    for task in [eye, supervising] {
        // One that has ended before it was asked to has failed.
        if let Err(error) = task.await
            && error.is_panic()
        {
            anyhow::bail!("a task of the run failed: {error}");
        }
    }
    rest
}
