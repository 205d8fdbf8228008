//! The command line of Dalgu: what an operator types to see and change the hosts and VMs of a site.
//!
//! [`args`] says what can be typed, [`commands`] does it through [`client`], [`output`] and [`progress`] show it, and
//! [`exit`] turns what went wrong into a text, a next step and an exit code. The command keeps no state of its own but
//! the configuration file: everything it shows comes from the controller.
#![forbid(unsafe_code)]

use std::process::ExitCode;

pub mod args;
pub mod client;
pub mod commands;
pub mod complete;
pub mod config;
pub mod exit;
pub mod output;
pub mod progress;
pub mod watch;

/// Does what the arguments say.
pub async fn run(cli: args::Cli, term: &mut output::Term) -> Result<(), exit::Error> {
    // On the heap: what can be typed is large.
    match Box::pin(commands::run(cli, term)).await {
        // The reader of a pipe has seen enough (`dalgu vm list | head -1`).
        Err(exit::Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

/// Writes an error with its next step to standard error, and gives its exit code.
pub fn fail(term: &mut output::Term, error: &exit::Error) -> ExitCode {
    // Nobody is left to tell when standard error is closed.
    let _ = exit::report(term, error);
    ExitCode::from(error.code() as u8)
}
