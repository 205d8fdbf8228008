//! Runs short commands for the lab, with their words in every error. Used by every other part of the lab.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

/// No command of the lab should last longer than this.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// If it cannot start, fails (the error holds what it wrote to standard error), or lasts too long.
pub async fn run<I, A>(program: &str, arguments: I) -> anyhow::Result<String>
where
    I: IntoIterator<Item = A>,
    A: AsRef<OsStr>,
{
    let arguments: Vec<_> = arguments
        .into_iter()
        .map(|argument| argument.as_ref().to_owned())
        .collect();
    let words = || {
        let rest: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
        format!("{program} {}", rest.join(" "))
    };
    let mut command = Command::new(program);
    command.args(&arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(COMMAND_LIMIT, command.output())
        .await
        .with_context(|| format!("`{}` did not end in time", words()))?
        .with_context(|| format!("start `{}`", words()))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}",
            words(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks again and again until the answer is yes.
///
/// # Errors
/// If the answer is still no after `limit`; the error names `what`.
pub async fn wait_for<F>(what: &str, limit: Duration, mut probe: F) -> anyhow::Result<()>
where
    F: AsyncFnMut() -> bool,
{
    let deadline = Instant::now() + limit;
    while !probe().await {
        if Instant::now() >= deadline {
            bail!("{what}: not so after {} s", limit.as_secs());
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_command_tells_its_words_and_its_complaint() {
        let error = run("sh", ["-c", "echo went wrong >&2; exit 3"])
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("sh -c") && error.contains("went wrong"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_name_of_what_never_came() {
        let error = wait_for("the moon", Duration::from_secs(5), async || false)
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "the moon: not so after 5 s");
    }
}
