//! The `dalgu` command: parses the arguments, sets the terminal up, and turns the outcome into an exit code.
//! Everything else is in the library, where tests reach it.

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use dalgu::{args::Cli, output::Term};

fn main() -> ExitCode {
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    let cli = Cli::parse();
    let mut term = Term::standard(cli.color);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return dalgu::fail(&mut term, &error.into()),
    };
    match runtime.block_on(dalgu::run(cli, &mut term)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => dalgu::fail(&mut term, &error),
    }
}
