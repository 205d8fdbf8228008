//! `dalgu-agent`: arguments, logs and signals; everything else is in the library.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use dalgu_agent::{STOP_TIMEOUT, config::Config};
use dalgu_proto::tls::Identity;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Runs virtual machines on this host as the site's controller says.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; see agent.toml for what can be set.
    #[arg(long, default_value = "/etc/dalgu/agent.toml")]
    config: PathBuf,
    /// Logs as JSON lines.
    #[arg(long)]
    log_json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    init_logs(arguments.log_json);
    let outcome = runtime().and_then(|runtime| {
        let outcome = runtime.block_on(run(arguments));
        // A thread that hangs in the hypervisor must not keep the process from ending.
        runtime.shutdown_timeout(STOP_TIMEOUT);
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn init_logs(json: bool) {
    let filter = EnvFilter::try_from_env("DALGU_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if json { logs.json().init() } else { logs.init() }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    // Two threads are enough: what blocks has threads of its own.
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?)
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = Config::read(&arguments.config)?;
    let identity = Identity::load_dir(&config.tls_dir, "agent").context("the agent's identity")?;
    let hypervisor = dalgu_agent::hypervisor(&config, identity.site()?).await?;
    let stop = CancellationToken::new();
    tokio::spawn(stop_on_signal(stop.clone()));
    tokio::spawn(watchdog());
    tracing::info!(host = %config.host, listen = %config.listen, version = env!("CARGO_PKG_VERSION"), "starting");
    // Outside systemd there is nobody to tell.
    let ready = || drop(sd_notify::notify(&[sd_notify::NotifyState::Ready]));
    let outcome = dalgu_agent::run(config, hypervisor, stop, ready).await;
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    outcome
}

async fn stop_on_signal(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    // Cancel safe: either signal ends the wait.
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; the VMs run on");
    stop.cancel();
}

/// Tells systemd's watchdog that the runtime is alive.
async fn watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut tick = tokio::time::interval(period / 2);
    loop {
        tick.tick().await;
        drop(sd_notify::notify(&[sd_notify::NotifyState::Watchdog]));
    }
}
