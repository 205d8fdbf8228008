//! What both daemons share around their run loop: logs, the signals that end it, and what systemd wants to hear.
//!
//! Called by the `main` of the agent and of the controller, and by nobody else; what a daemon does is none of its
//! business. Outside systemd there is nobody to tell, and telling does nothing.

use std::io::IsTerminal;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Sends logs to standard error, as text or as JSON lines; `DALGU_LOG` says which, "info" where it says nothing.
///
/// # Panics
/// If logs were set up before.
pub fn init_logs(json: bool) {
    let filter = EnvFilter::try_from_env("DALGU_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Neither the journal nor a file wants colours.
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if json { logs.json().init() } else { logs.init() }
}

/// Cancels the token at the first SIGTERM or SIGINT; for ever without effect where signals cannot be had.
pub async fn stop_on_signal(stop: CancellationToken) {
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

/// Tells systemd's watchdog that the runtime is alive, twice in the time after which it would be taken for dead.
/// Ends at once where no watchdog is set.
pub async fn watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut tick = tokio::time::interval(period / 2);
    loop {
        tick.tick().await;
        notify(NotifyState::Watchdog);
    }
}

/// Tells systemd that the daemon serves.
pub fn ready() {
    notify(NotifyState::Ready);
}

/// Tells systemd that the daemon is going down.
pub fn stopping() {
    notify(NotifyState::Stopping);
}

fn notify(state: NotifyState<'_>) {
    // Nobody to tell, or nobody who listens: the daemon's work does not depend on it.
    drop(sd_notify::notify(&[state]));
}
