//! What the commands do: one module a noun. Here: which module a command goes to, and what they share.

use std::{collections::HashMap, time::Duration};

use clap_complete::env::Shells;
use dalgu_proto::v1;
use tonic::{Response, Status};

use crate::{
    args::{Cli, Command, Shell, WaitArgs},
    client::Client,
    config::Choice,
    exit::Error,
    output::{self, Format, Term, operation::took},
    progress,
    watch::{Snapshot, Watch, Watched},
};

pub mod apply;
pub mod backup;
pub mod context;
pub mod doctor;
pub mod events;
pub mod explain;
pub mod host;
pub mod image;
pub mod network;
pub mod op;
pub mod placement;
pub mod plan;
pub mod show;
pub mod site;
pub mod snapshot;
pub mod spec;
pub mod vm;
pub mod volume;

/// Objects asked for in one page.
const PAGE: i32 = 500;

/// Does what the arguments say.
pub async fn run(cli: Cli, term: &mut Term) -> Result<(), Error> {
    let format = cli.output;
    // An empty variable of the environment says nothing.
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let config = cli.config.filter(|path| !path.as_os_str().is_empty());
    let choice = Choice {
        config,
        context: given(cli.context),
        endpoint: given(cli.endpoint),
    };
    match cli.command {
        Command::Context(command) => return context::run(command, &choice, format, term),
        Command::Completion(args) => return completion(args.shell, term),
        Command::Version => return version(format, term),
        _ => {}
    }
    let client = Client::connect(&choice.target()?).await?;
    let mut session = Session { client, format, term };
    match cli.command {
        Command::Host(command) => Box::pin(host::run(command, &mut session)).await,
        Command::Vm(command) => Box::pin(vm::run(command, &mut session)).await,
        Command::Snapshot(command) => Box::pin(snapshot::run(command, &mut session)).await,
        Command::Image(command) => Box::pin(image::run(command, &mut session)).await,
        Command::Backup(command) => Box::pin(backup::run(command, &mut session)).await,
        Command::Network(command) => Box::pin(network::run(command, &mut session)).await,
        Command::SecurityGroup(command) => Box::pin(network::group::run(command, &mut session)).await,
        Command::PlacementGroup(command) => Box::pin(placement::run(command, &mut session)).await,
        Command::Capacity(args) => placement::capacity(args, &mut session).await,
        Command::Volume(command) => Box::pin(volume::run(command, &mut session)).await,
        Command::Plan(command) => Box::pin(plan::run(command, &mut session)).await,
        Command::Apply(args) => Box::pin(apply::run(args, &mut session)).await,
        Command::Op(command) => op::run(command, &mut session).await,
        Command::Site(command) => site::run(command, &mut session).await,
        Command::Doctor(args) => doctor::run(&args, &mut session).await,
        Command::Events(args) => events::run("", &args, &mut session).await,
        Command::Explain(args) => explain::run(*args, &mut session).await,
        Command::Context(_) | Command::Completion(_) | Command::Version => Ok(()),
    }
}

fn completion(shell: Shell, term: &mut Term) -> Result<(), Error> {
    let name = match shell {
        Shell::Bash => "bash",
        Shell::Zsh => "zsh",
        Shell::Fish => "fish",
    };
    let shells = Shells::builtins();
    let completer = shells.completer(name).expect("all three shells are built in");
    let mut script = Vec::new();
    completer.write_registration("COMPLETE", "dalgu", "dalgu", "dalgu", &mut script)?;
    Ok(term.print(&String::from_utf8_lossy(&script))?)
}

fn version(format: Format, term: &mut Term) -> Result<(), Error> {
    let version = env!("CARGO_PKG_VERSION");
    let text = match format {
        Format::Json => format!("{}\n", serde_json::json!({ "version": version })),
        Format::Yaml => format!("version: {version}\n"),
        Format::Name => format!("{version}\n"),
        Format::Table | Format::Wide => format!("dalgu {version}\n"),
    };
    Ok(term.print(&text)?)
}

/// A connection, and where to show what comes of it.
pub struct Session<'a> {
    /// The connection.
    pub client: Client,
    /// The form of output.
    pub format: Format,
    /// Where output goes.
    pub term: &'a mut Term,
}

/// The request's id: the one given, or a new one.
pub fn request_id(given: Option<&String>) -> String {
    given.cloned().unwrap_or_else(|| uuid::Uuid::new_v4().to_string())
}

/// Pairs as the map that the API wants.
pub fn map(pairs: Vec<(String, String)>) -> HashMap<String, String> {
    pairs.into_iter().collect()
}

/// Whether labels match a selector.
pub fn matches(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl Session<'_> {
    /// Reads something once.
    pub async fn read<T>(
        &self,
        call: impl AsyncFn(&Client) -> Result<Response<T>, Status>,
    ) -> Result<T, Error> {
        Ok(self.client.call(call).await?)
    }

    /// Shows all objects that `list` reads; with `watch` also what changes of those that are `wanted`, until the user ends it.
    pub async fn show_all<R: Watched>(
        &mut self,
        watch: bool,
        wanted: &dyn Fn(&R) -> bool,
        list: impl AsyncFn(&Client) -> Result<Snapshot<R>, Status>,
    ) -> Result<(), Error> {
        let client = &self.client;
        if !watch {
            let (objects, _) = list(client).await?;
            return output::list(self.term, self.format, &objects);
        }
        let watch = Watch {
            client,
            format: self.format,
            subject: "",
            single: false,
            wanted,
        };
        watch.run(self.term, async || list(client).await).await
    }

    /// Makes a change; repeats it with the same request_id while the controller is away.
    pub async fn change<T>(
        &mut self,
        limit: Duration,
        call: impl AsyncFn(&Client) -> Result<Response<T>, Status>,
    ) -> Result<T, Error> {
        let (mut told, term) = (false, &mut *self.term);
        let lost = |_: &Status| {
            if !std::mem::replace(&mut told, true) {
                // Not worth giving up the request for.
                let _ = term.say("the connection to the controller was lost; repeating the request");
            }
        };
        Ok(self
            .client
            .retry(progress::submit_limit(limit), lost, call)
            .await?)
    }

    /// Makes a change that starts an operation, and waits for its end if that is wanted.
    pub async fn operate(
        &mut self,
        wait: &WaitArgs,
        limit: Duration,
        call: impl AsyncFn(&Client) -> Result<Response<v1::Operation>, Status>,
    ) -> Result<(), Error> {
        let operation = self.change(limit, call).await?;
        if wait.no_wait {
            return self.accepted(&operation);
        }
        let operation = progress::wait(&self.client, operation, limit, self.term).await?;
        self.ended(operation).await
    }

    /// Shows an operation that is not waited for: its id, or all of it.
    pub fn accepted(&mut self, operation: &v1::Operation) -> Result<(), Error> {
        match self.format {
            Format::Table | Format::Wide => {
                self.term.print(&format!("{}\n", operation.id))?;
                Ok(self.term.say(&format!(
                    "accepted; `dalgu op wait {}` waits for its end",
                    operation.id
                ))?)
            }
            format => output::one(self.term, format, operation),
        }
    }

    /// Shows the end of an operation: a sentence on standard error, or the operation itself where a program reads.
    pub async fn ended(&mut self, operation: v1::Operation) -> Result<(), Error> {
        use v1::OperationKind as K;
        if !matches!(self.format, Format::Table | Format::Wide) {
            output::one(self.term, self.format, &operation)?;
            return progress::outcome(operation).map(drop);
        }
        let operation = progress::outcome(operation)?;
        let host = match operation.kind() {
            K::CreateVm | K::StartVm => self.host_of(&operation.vm).await,
            _ => None,
        };
        let took = took(&operation, (self.term.now)());
        Ok(self
            .term
            .say(&progress::done_line(&operation, host.as_deref(), took))?)
    }

    /// Where a VM is; only for a message, so a failure is none.
    async fn host_of(&self, vm: &str) -> Option<String> {
        let request = v1::GetVmRequest { name: vm.to_owned() };
        let vm = self
            .client
            .call(async |client| client.vms().get_vm(request.clone()).await)
            .await
            .ok()?;
        vm.status.map(|status| status.host)
    }
}
