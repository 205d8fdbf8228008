//! Writes to a store, or to an agent's ledger, until it is killed, and tells each thing that was acknowledged on a line of its own.
//!
//! A program of its own, so that `tests/store.rs` and `tests/ledger.rs` can kill it, record its system calls, and let them fail.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Parser;
use dalgu_controller::{
    config::Config,
    server,
    store::{Store, sqlite::Sqlite},
};
use dalgu_proto::{
    agent::v1::{RegisterRequest, registrar_service_client::RegistrarServiceClient},
    tls::{self, Identity},
    v1,
};
use dalgu_tests::store::{ledger, model};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// What the controller exits with when its store has failed; see `server::run`.
const EXIT_STORE: u8 = 70;

#[derive(Parser)]
enum Arguments {
    /// Commits numbered batches to a database.
    Batches {
        /// The database.
        database: PathBuf,
        /// First batch.
        #[arg(long)]
        from: u64,
        /// Last batch at least.
        #[arg(long)]
        to: u64,
        /// The log is carried over after so many bytes.
        #[arg(long, default_value_t = 20_000)]
        checkpoint: usize,
    },
    /// Writes numbered steps into an agent's ledger.
    Ledger {
        /// The ledger.
        dir: PathBuf,
        /// Steps.
        #[arg(long)]
        to: u64,
    },
    /// Reads an agent's ledger, and tells that it has been read.
    ReadLedger {
        /// The ledger.
        dir: PathBuf,
        /// What is told.
        #[arg(long)]
        tell: u64,
    },
    /// Runs a controller, and registers a host with one address after the other.
    Controller {
        /// Directory of the site, which `prepare` made.
        dir: PathBuf,
        /// Registrations.
        #[arg(long)]
        count: u16,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse() {
        Arguments::Batches {
            database,
            from,
            to,
            checkpoint,
        } => batches(&database, from, to, checkpoint),
        Arguments::Ledger { dir, to } => ledger(&dir, to).map(|()| ExitCode::SUCCESS),
        Arguments::ReadLedger { dir, tell } => read_ledger(&dir, tell).map(|()| ExitCode::SUCCESS),
        Arguments::Controller { dir, count } => controller(&dir, count).map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn acknowledge(number: impl std::fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    // In one call, so that a kill cannot cut it.
    out.write_all(format!("{number}\n").as_bytes())?;
    out.flush()
}

fn batches(database: &Path, from: u64, to: u64, checkpoint: usize) -> Result<ExitCode> {
    let mut store = Sqlite::open(database)?;
    store.checkpoint_every(checkpoint);
    let mut next = from;
    while next <= to {
        let group = model::group(next);
        let written: Vec<_> = group.clone().map(model::batch).collect();
        if let Err(error) = store.commit(&written) {
            eprintln!("{error}");
            std::process::exit(EXIT_STORE.into());
        }
        acknowledge(group.end())?;
        next = group.end() + 1;
    }
    Ok(ExitCode::SUCCESS)
}

fn ledger(dir: &Path, to: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(ledger::write(dir, to, |number| Ok(acknowledge(number)?)))
}

fn read_ledger(dir: &Path, tell: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(ledger::read(dir))?;
    Ok(acknowledge(tell)?)
}

fn controller(dir: &Path, count: u16) -> Result<()> {
    let config = Config {
        data_dir: dir.join("controller"),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        ..Config::default()
    };
    let stop = CancellationToken::new();
    let (told, address) = oneshot::channel();
    let identity = Identity::load_dir(&dir.join("agent"), "agent")?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(async {
            let ready = |address| {
                let _ = told.send(address);
            };
            let serving = tokio::spawn(server::run_with(config, stop.clone(), ready));
            // No address: it could not start, and says why.
            if let Ok(address) = address.await {
                register(address, &identity, count).await?;
                stop.cancel();
            }
            serving.await??;
            Ok(())
        })
}

async fn register(address: SocketAddr, identity: &Identity, count: u16) -> Result<()> {
    let channel = tls::client::connect(&format!("https://{address}"), tls::CONTROLLER_NAME, identity).await?;
    let mut client = RegistrarServiceClient::new(channel);
    for number in 1..=count {
        let request = RegisterRequest {
            host: "h1".to_owned(),
            address: format!("127.0.0.1:{number}"),
            boot_id: "b".to_owned(),
            agent_run_id: "r".to_owned(),
            inventory: Some(v1::HostInventory::default()),
            ..Default::default()
        };
        // When its store has failed the controller ends without an answer, and this process with it.
        let answer = tokio::time::timeout(Duration::from_secs(20), client.register(request)).await;
        answer.context("no answer")??;
        acknowledge(number)?;
    }
    Ok(())
}
