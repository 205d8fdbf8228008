//! `lab`: brings several real libvirt hosts up on this machine, with Dalgu on them, and takes them down.
//! Called by the Makefile and by hand; all work is in `dalgu_tests::lab`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use dalgu_tests::lab::layout::Layout;
use dalgu_tests::lab::{self, Daemon, Lab, Options};
use nix::sys::signal::Signal;

/// Several real libvirt hosts on one machine.
#[derive(Parser)]
struct Arguments {
    /// Number of the lab, 0 to 9: labs with different numbers run side by side.
    #[arg(long, env = "DALGU_LAB_ID", default_value_t = 0, global = true)]
    id: u8,
    /// Where the lab keeps its state (default: lab-run in the build directory).
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring the lab up.
    Up {
        /// How many hosts.
        #[arg(long, default_value_t = 3)]
        hosts: u8,
        /// Only libvirt: no controller, no agents.
        #[arg(long)]
        no_dalgu: bool,
        /// How often agents report, in milliseconds.
        #[arg(long, default_value_t = 1000)]
        report_interval_ms: u32,
    },
    /// Remove every trace of the lab, also of one that crashed.
    Down {
        /// Save the logs first, in lab-logs in the build directory.
        #[arg(long)]
        keep_logs: bool,
    },
    /// Print the shell exports for the lab, for eval.
    Env,
    /// Show what runs.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// End a daemon with SIGKILL: controller, h1/agent, h1/libvirtd, ...
    Kill {
        /// Which one.
        daemon: String,
    },
    /// Start a daemon that ended: controller, h1/agent, h1/libvirtd, ...
    Start {
        /// Which one.
        daemon: String,
    },
    /// Cut a host's power: everything on it ends at once.
    PowerOff {
        /// The host's number.
        host: u8,
    },
    /// Boot a host after power-off; it has a new boot id.
    PowerOn {
        /// The host's number.
        host: u8,
    },
    /// Succeed where each host of a lab can be under a load of its own on this machine (internal).
    #[command(hide = true)]
    CanLoad,
    /// Be a host: keeps its namespaces (internal).
    #[command(hide = true)]
    Anchor {
        /// The host's number.
        host: u8,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut layout = Layout::new(arguments.id)?;
    if let Some(dir) = arguments.dir {
        layout = layout.with_dir(std::path::absolute(dir).context("make --dir absolute")?);
    }
    match arguments.command {
        Command::Up {
            hosts,
            no_dalgu,
            report_interval_ms,
        } => {
            let options = Options {
                hosts,
                dalgu: !no_dalgu,
                report_interval_ms,
            };
            let lab = Lab::up(layout, &options).await?;
            print!("{}", lab.status());
        }
        Command::Down { keep_logs } => {
            if keep_logs && let Some(logs) = lab::keep_logs(&layout) {
                println!("logs: {}", logs.display());
            }
            lab::down(layout).await?;
        }
        Command::Env => print!("{}", lab::exports(&Lab::current(layout)?)),
        Command::Status { json } => {
            let status = Lab::current(layout)?.status();
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{status}");
            }
        }
        Command::Kill { daemon } => {
            Lab::current(layout)?
                .signal(parse(&daemon)?, Signal::SIGKILL)
                .await?
        }
        Command::Start { daemon } => Lab::current(layout)?.start(parse(&daemon)?).await?,
        Command::PowerOff { host } => Lab::current(layout)?.power_off(host).await?,
        Command::PowerOn { host } => Lab::current(layout)?.power_on(host).await?,
        Command::Anchor { host } => lab::hold(&layout, &layout.host(host)).await?,
        Command::CanLoad => drop(lab::processor_to_fill()?),
    }
    Ok(())
}

fn parse(daemon: &str) -> anyhow::Result<Daemon> {
    if daemon == "controller" {
        return Ok(Daemon::Controller);
    }
    let parts = daemon
        .split_once('/')
        .and_then(|(host, kind)| Some((host.strip_prefix('h')?.parse().ok()?, kind)));
    Ok(match parts {
        Some((host, "agent")) => Daemon::Agent(host),
        Some((host, "libvirtd")) => Daemon::Libvirtd(host),
        _ => bail!("{daemon}: must be controller, hN/agent or hN/libvirtd"),
    })
}
