//! Runs one daemon of the lab as its child, and reaps every orphan below it at once.
//!
//! libvirt leaves QEMU as an orphan and later waits until it is gone; where process 1 reaps slowly, each
//! destroy and each migration would last seconds longer. Called by `dalgu_tests::lab` only. It must outlive its daemon
//! while orphans remain (a libvirtd killed with -9 leaves its guests running), and must never kill them itself.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use anyhow::Context as _;
use clap::Parser;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

#[derive(Parser)]
struct Arguments {
    /// Where to write the daemon's process id.
    #[arg(long)]
    pid_file: PathBuf,
    /// Where the daemon's standard output and error go (appended).
    #[arg(long)]
    log: PathBuf,
    /// The daemon and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    // Fails only when this process leads a group already, which serves as well.
    let _ = setsid();
    prctl::set_child_subreaper(true).context("become a child subreaper")?;
    let signals = watched_signals()?;
    let daemon = spawn(&arguments)?;
    let status = supervise(&signals, daemon)?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Blocks the signals handled here, before the first child exists, and opens them as a file.
fn watched_signals() -> anyhow::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().context("block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("open a signalfd")
}

fn spawn(arguments: &Arguments) -> anyhow::Result<Pid> {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(&arguments.log)
        .with_context(|| format!("open {}", arguments.log.display()))?;
    let (program, rest) = arguments.command.split_first().context("no command given")?;
    let child = Command::new(program)
        .args(rest)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("duplicate the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let pid = i32::try_from(child.id()).context("process id out of range")?;
    // Written whole or not at all: the lab reads this file while it waits.
    let partial = arguments.pid_file.with_extension("part");
    fs::write(&partial, format!("{pid}\n")).context("write the pid file")?;
    fs::rename(&partial, &arguments.pid_file).context("write the pid file")?;
    Ok(Pid::from_raw(pid))
}

/// Reaps until no child is left; passes signals on to the daemon while it lives.
fn supervise(signals: &SignalFd, daemon: Pid) -> anyhow::Result<ExitStatus> {
    let mut ended: Option<ExitStatus> = None;
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(WaitStatus::Exited(pid, code)) if pid == daemon => {
                    ended = Some(ExitStatus::from_raw(code << 8));
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == daemon => {
                    ended = Some(ExitStatus::from_raw(signal as i32));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return ended.context("the daemon was never reaped"),
                Err(error) => return Err(error).context("wait for a child"),
            }
        }
        let Some(info) = signals.read_signal().context("read a signal")? else {
            continue;
        };
        let signal = i32::try_from(info.ssi_signo)
            .ok()
            .and_then(|number| Signal::try_from(number).ok());
        if let (Some(signal), None) = (signal, ended)
            && signal != Signal::SIGCHLD
        {
            // It may have ended this instant; then there is nothing to pass on.
            let _ = kill(daemon, signal);
        }
    }
}
