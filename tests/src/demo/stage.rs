//! Where the demonstration happens: prints headings, runs each command as an operator types it, in a shell with
//! the lab's environment, and keeps the list of what was proved. Used by the demonstration's steps only.

use std::io::{IsTerminal as _, Write as _, stdout};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tokio::process::Command;
use tokio::time::{Instant, timeout};

/// No command of the demonstration should last longer.
const COMMAND_LIMIT: Duration = Duration::from_mins(3);

/// What a person looks at, and what has been proved so far.
#[derive(Debug)]
pub struct Stage {
    exports: String,
    colour: bool,
    began: Instant,
    proved: Vec<String>,
}

impl Stage {
    /// An empty stage.
    #[must_use]
    pub fn new() -> Self {
        let colour =
            stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self {
            exports: String::new(),
            colour,
            began: Instant::now(),
            proved: Vec::new(),
        }
    }

    /// Commands shown from here on see these exports.
    pub fn enter(&mut self, exports: String) {
        self.exports = exports;
    }

    /// Begins a part.
    pub fn heading(&self, text: &str) {
        println!("\n{}", self.painted("1;36", &format!("── {text}")));
    }

    /// Says something between commands.
    pub fn say(&self, text: &str) {
        println!("{}", self.painted("2", text));
    }

    /// Something that was checked, and holds. Call it after the check.
    pub fn proved(&mut self, claim: impl Into<String>) {
        let claim = claim.into();
        println!("{} {claim}", self.painted("1;32", "ok:"));
        self.proved.push(claim);
    }

    /// Shows a command and its output as it comes. Answers the exit code.
    ///
    /// # Errors
    /// If it cannot start, lasts too long, or is ended by a signal.
    pub async fn show(&self, command: &str) -> anyhow::Result<i32> {
        println!("\n{} {}", self.painted("1;33", "$"), self.painted("1", command));
        stdout().flush().context("print")?;
        let mut child = self.shell(command).spawn().context("start a shell")?;
        let status = timeout(COMMAND_LIMIT, child.wait())
            .await
            .with_context(|| format!("`{command}` does not end"))?
            .context("wait for a command")?;
        status
            .code()
            .with_context(|| format!("`{command}` was ended by a signal"))
    }

    /// Shows a command that has to succeed.
    ///
    /// # Errors
    /// As [`Stage::show`], and if it fails.
    pub async fn show_ok(&self, command: &str) -> anyhow::Result<()> {
        let code = self.show(command).await?;
        ensure!(code == 0, "`{command}` ended with exit code {code}");
        Ok(())
    }

    /// What a command prints, without showing it: for checks.
    ///
    /// # Errors
    /// If it fails.
    pub async fn output(&self, command: &str) -> anyhow::Result<String> {
        let output = timeout(COMMAND_LIMIT, self.shell(command).stdout(Stdio::piped()).output())
            .await
            .with_context(|| format!("`{command}` does not end"))?
            .context("run a command")?;
        if !output.status.success() {
            bail!("`{command}` failed ({})", output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Ends with everything that was proved.
    pub fn summary(&self) {
        self.heading("What was shown and checked");
        for claim in &self.proved {
            println!("  {} {claim}", self.painted("1;32", "ok"));
        }
        println!(
            "\n{} claims checked in {:.0} s",
            self.proved.len(),
            self.began.elapsed().as_secs_f64()
        );
    }

    fn shell(&self, command: &str) -> Command {
        let mut shell = Command::new("bash");
        let script = format!("set -o pipefail\n{}\n{command}", self.exports);
        shell
            .args(["-c", &script])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        shell
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_in_the_middle_of_a_pipe_is_noticed() {
        let stage = Stage::new();
        assert_eq!(stage.show("(exit 5) | cat").await.unwrap(), 5);
        assert!(stage.show_ok("false | true").await.is_err());
        assert!(stage.output("false | true").await.is_err());
    }

    #[tokio::test]
    async fn commands_see_the_exports_of_the_lab() {
        let mut stage = Stage::new();
        stage.enter("export FIELD=wide".to_owned());
        assert_eq!(stage.output("echo $FIELD").await.unwrap(), "wide\n");
    }
}
