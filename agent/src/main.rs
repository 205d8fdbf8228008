//! `dalgu-agent`: arguments, logs and signals; everything else is in the library.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use dalgu_agent::{STOP_TIMEOUT, config::Config};
use dalgu_proto::{daemon, tls::Identity};
use nix::sys::signal::SigSet;
use tokio_util::sync::CancellationToken;

/// Runs virtual machines on this host as the site's controller says.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; see agent.toml for what can be set.
    #[arg(long, default_value = "/etc/dalgu/agent.toml")]
    config: PathBuf,
    /// Logs as JSON lines.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What else this program does. Without a command it is the agent.
#[derive(Subcommand)]
enum Command {
    /// Before libvirtd comes up: clear the starts, arrivals and backups of VMs that it was killed in, which it may never end by itself.
    ClearCutJobs,
    /// Prints what libvirt would be told of a pool of type lvm-thin or rbd, for `virsh pool-define`. The agent itself uses no such pool
    /// yet.
    PoolDefinition {
        /// Name of the pool in the configuration.
        name: String,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    daemon::init_logs(arguments.log_json);
    // What whoever started it has blocked would be blocked in every program that it starts, and dnsmasq is told by signals.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        tracing::warn!(%error, "signals may be blocked in what is started from here");
    }
    let outcome = match &arguments.command {
        Some(Command::ClearCutJobs) => clear_cut_jobs(),
        Some(Command::PoolDefinition { name }) => pool_definition(&arguments.config, name),
        None => serve(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(feature = "libvirt")]
fn clear_cut_jobs() -> anyhow::Result<()> {
    dalgu_agent::hypervisor::libvirt::clear_cut_jobs().context("libvirt's notes of running domains")
}

#[cfg(not(feature = "libvirt"))]
fn clear_cut_jobs() -> anyhow::Result<()> {
    anyhow::bail!("this agent was built without libvirt")
}

#[cfg(feature = "libvirt")]
fn pool_definition(config: &std::path::Path, name: &str) -> anyhow::Result<()> {
    let config = Config::read(config)?;
    let pool = config.pools.iter().find(|pool| pool.name == name);
    let pool = pool.with_context(|| format!("the configuration has no pool {name}"))?;
    let xml = dalgu_agent::hypervisor::libvirt::pool::definition(pool)?;
    let xml = xml.with_context(|| format!("pool {name} is a directory, of which libvirt need not know"))?;
    std::io::Write::write_all(&mut std::io::stdout(), format!("{xml}\n").as_bytes())?;
    Ok(())
}

#[cfg(not(feature = "libvirt"))]
fn pool_definition(_: &std::path::Path, _: &str) -> anyhow::Result<()> {
    anyhow::bail!("this agent was built without libvirt")
}

fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(run(arguments));
    // A thread that hangs in the hypervisor must not keep the process from ending.
    runtime.shutdown_timeout(STOP_TIMEOUT);
    outcome
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    // Two threads are enough: what blocks has threads of its own.
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?)
}

async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::read(&arguments.config)?;
    let identity = Identity::load_dir(&config.tls_dir, "agent").context("the agent's identity")?;
    let hypervisor = dalgu_agent::hypervisor(&config, identity.site()?).await?;
    let stop = CancellationToken::new();
    tokio::spawn(daemon::stop_on_signal(stop.clone()));
    tokio::spawn(daemon::watchdog());
    tracing::info!(host = %config.host, listen = %config.listen, version = env!("CARGO_PKG_VERSION"), "starting");
    let outcome = dalgu_agent::run(config, hypervisor, stop, daemon::ready).await;
    daemon::stopping();
    outcome
}
