//! Waiting for operations: moving bars on a screen, plain lines elsewhere, and the loop that asks the controller how
//! far it is. Used by every command that starts an operation, and by `dalgu op wait`.

use std::time::Duration;

use dalgu_proto::v1;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{Instant, sleep_until};

use crate::{
    client::{Backoff, CALL_TIMEOUT, Client, is_lost},
    exit::Error,
    output::{
        Term, human,
        operation::{detail, has_ended, migration_figures, migration_percent, migration_phase},
    },
};

/// How long the controller may hold a question back on a screen: between two pictures of a bar.
const ASK_SCREEN: Duration = Duration::from_millis(300);
/// The same where only phases are written.
const ASK_PLAIN: Duration = Duration::from_secs(1);

const SPINNER: &str = "{spinner} {elapsed} {wide_msg}";
// Two lines, so that all of it fits into 80 columns.
const BAR: &str = "{spinner} {elapsed} [{bar:20}] {percent:>3}% {prefix}\n  {wide_msg}";

/// Shows how far an operation is.
pub enum Progress {
    /// On a screen.
    Bar(ProgressBar),
    /// Line by line; bears the last one.
    Plain(String),
}

impl Progress {
    /// Fits the terminal.
    pub fn new(term: &Term) -> Self {
        if !term.err_screen {
            return Self::Plain(String::new());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style(SPINNER));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self::Bar(bar)
    }

    /// Shows where the operation stands.
    pub fn update(&mut self, operation: &v1::Operation, term: &mut Term) -> Result<(), Error> {
        match (self, &operation.migration) {
            (Self::Bar(bar), Some(migration)) => {
                if bar.length().is_none() {
                    bar.set_length(100);
                    bar.set_style(style(BAR));
                }
                let phase = migration_phase(migration);
                bar.set_prefix(human::clean(&format!("migrating {}: {phase}", operation.vm)));
                bar.set_position(migration_percent(migration));
                bar.set_message(human::clean(&migration_figures(migration)));
            }
            (Self::Bar(bar), None) => bar.set_message(plain_line(operation)),
            // What follows says how it ended.
            (Self::Plain(_), _) if has_ended(operation) => {}
            (Self::Plain(last), _) => {
                let line = plain_line(operation);
                if *last != line {
                    term.say(&line)?;
                    *last = line;
                }
            }
        }
        Ok(())
    }

    /// Shows how much of something has been done; `what` changes only with the part of the way.
    pub fn bytes(&mut self, what: &str, done: u64, total: u64, term: &mut Term) -> Result<(), Error> {
        match self {
            Self::Bar(bar) => {
                if bar.length().is_none() {
                    bar.set_style(style(BAR));
                }
                bar.set_length(total.max(1));
                bar.set_prefix(what.to_owned());
                bar.set_position(done.min(total));
                bar.set_message(human::share(done, total));
            }
            Self::Plain(last) => {
                if *last != what {
                    term.say(what)?;
                    what.clone_into(last);
                }
            }
        }
        Ok(())
    }

    /// Says something beside the progress.
    pub fn note(&mut self, text: &str, term: &mut Term) -> Result<(), Error> {
        match self {
            Self::Bar(bar) => bar.println(text),
            Self::Plain(_) => term.say(text)?,
        }
        Ok(())
    }

    /// Takes the bar away, so that messages can follow.
    pub fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    let style =
        ProgressStyle::with_template(template).expect("the template is a constant, and a test reads it");
    style.progress_chars("=> ")
}

/// What an operation is at, in a line that changes only when the phase does.
pub fn plain_line(operation: &v1::Operation) -> String {
    use v1::MigrationPhase as P;
    let mut line = format!(
        "{} {}",
        human::operation_phrase(operation.kind()),
        human::clean(&operation.vm)
    );
    let now = match &operation.migration {
        // Figures move all the time; a log wants the phases.
        Some(migration) if !has_ended(operation) && migration.phase != i32::from(P::Unspecified) => {
            migration_phase(migration)
        }
        _ if operation.state() == v1::OperationState::Pending && operation.status_message.is_empty() => {
            "accepted".to_owned()
        }
        _ if has_ended(operation) => human::value::<v1::OperationState>(operation.state).to_ascii_lowercase(),
        _ => operation.status_message.clone(),
    };
    if operation.cancel_requested && !has_ended(operation) {
        line += " (cancelling)";
    }
    if now.is_empty() {
        line
    } else {
        format!("{line}: {}", human::clean(&now))
    }
}

/// What has been done, in a sentence.
pub fn done_line(operation: &v1::Operation, host: Option<&str>, took: Option<Duration>) -> String {
    use v1::OperationKind as K;
    let vm = human::clean(&operation.vm);
    let on = host
        .filter(|host| !host.is_empty())
        .map(|host| format!(" on {}", human::clean(host)))
        .unwrap_or_default();
    let what = match operation.kind() {
        K::CreateVm => format!("created {vm}{on}"),
        K::StartVm => format!("{vm} runs{on}"),
        K::StopVm => format!("stopped {vm}"),
        K::RestartVm => format!("restarted {vm}"),
        K::PauseVm => format!("paused {vm}"),
        K::ResumeVm => format!("resumed {vm}"),
        K::MigrateVm => format!("migrated {vm}"),
        K::DeleteVm => format!("deleted {vm}"),
        K::CreateSnapshot => format!("made a snapshot of {vm}"),
        K::DeleteSnapshot => format!("deleted a snapshot of {vm}"),
        K::RevertSnapshot => format!("{vm} is as it was at the snapshot"),
        K::Unspecified => format!("done with {vm}"),
    };
    let what = took.map_or_else(
        || what.clone(),
        |took| format!("{what} in {}", human::fine_span(took)),
    );
    match &operation.migration {
        Some(_) => format!("{what}: {}", human::clean(&detail(operation))),
        None => what,
    }
}

/// Waits until an operation has ended, showing how far it is. A lost connection is taken up again until the limit.
pub async fn wait(
    client: &Client,
    operation: v1::Operation,
    limit: Duration,
    term: &mut Term,
) -> Result<v1::Operation, Error> {
    if has_ended(&operation) {
        // A bar would show nothing and vanish.
        return Ok(operation);
    }
    let id = operation.id.clone();
    let (interrupt, deadline) = ((term.interrupt)(), Instant::now() + limit);
    let mut progress = Progress::new(term);
    // Cancel safe: the loop only reads, and what it has shown may stay.
    let outcome = tokio::select! {
        outcome = follow(client, operation, term, &mut progress) => outcome,
        () = sleep_until(deadline) => {
            Err(Error::WaitTimedOut { operation: id, limit: human::fine_span(limit) })
        }
        () = interrupt => Err(Error::Interrupted(id)),
    };
    progress.clear();
    outcome
}

async fn follow(
    client: &Client,
    mut operation: v1::Operation,
    term: &mut Term,
    progress: &mut Progress,
) -> Result<v1::Operation, Error> {
    let hold = if term.err_screen { ASK_SCREEN } else { ASK_PLAIN };
    let (mut backoff, mut lost) = (Backoff::default(), false);
    loop {
        progress.update(&operation, term)?;
        if has_ended(&operation) {
            return Ok(operation);
        }
        let request = v1::WaitOperationRequest {
            id: operation.id.clone(),
            timeout: Some(wire(hold)),
        };
        let asked = Instant::now();
        match client
            .call(async |client| client.operations().wait_operation(request.clone()).await)
            .await
        {
            Ok(answer) => {
                if std::mem::take(&mut lost) {
                    progress.note("connected again", term)?;
                    backoff = Backoff::default();
                }
                operation = answer;
                // A server that does not hold the question back is not asked without a pause.
                if !has_ended(&operation) {
                    sleep_until(asked + hold).await;
                }
            }
            Err(status) if is_lost(&status) || status.code() == tonic::Code::DeadlineExceeded => {
                if !std::mem::replace(&mut lost, true) {
                    progress.note("the connection to the controller was lost; trying again", term)?;
                }
                backoff.pause().await;
            }
            Err(status) => return Err(status.into()),
        }
    }
}

fn wire(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(span.subsec_nanos()).unwrap_or(0),
    }
}

/// An ended operation as a result: anything but success is an error.
pub fn outcome(operation: v1::Operation) -> Result<v1::Operation, Error> {
    match operation.state() {
        v1::OperationState::Succeeded => Ok(operation),
        _ => Err(Error::OperationEnded(Box::new(operation))),
    }
}

/// How long an accepted request may take to be answered at most, within the time the user is ready to wait.
pub fn submit_limit(limit: Duration) -> Duration {
    limit.min(CALL_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_can_be_read() {
        let _ = (style(SPINNER), style(BAR));
    }
}
