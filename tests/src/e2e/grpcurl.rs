//! The real `grpcurl` against the lab's controller, knowing the API by reflection only.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::process::Command;

use super::words::{Ended, attempt};
use crate::lab::Lab;

/// Whose certificate the caller shows.
#[derive(Debug, Clone, Copy)]
pub enum Caller<'a> {
    /// The lab's operator.
    Operator,
    /// Nobody: no certificate at all.
    Nobody,
    /// The identity in a directory: ca.pem checks the controller, NAME.pem and NAME.key are shown.
    Identity(&'a Path, &'a str),
}

/// Runs `grpcurl` with these words before the address and these behind it, and tells how it ended.
///
/// # Errors
/// If it cannot be started, or does not end.
pub async fn run(lab: &Lab, caller: Caller<'_>, before: &[&str], behind: &[&str]) -> anyhow::Result<Ended> {
    let operator = lab.layout().operator();
    let mut command = Command::new(lab.layout().tools_dir().join("bin/grpcurl"));
    command.arg("-cacert").arg(operator.join("ca.pem"));
    let identity = match caller {
        Caller::Operator => Some((operator.as_path(), "admin")),
        Caller::Identity(dir, name) => Some((dir, name)),
        Caller::Nobody => None,
    };
    if let Some((dir, name)) = identity {
        command.arg("-cert").arg(dir.join(format!("{name}.pem")));
        command.arg("-key").arg(dir.join(format!("{name}.key")));
    }
    command
        .args(before)
        .arg(lab.layout().controller_address())
        .args(behind);
    attempt(&mut command).await
}

/// Makes a call of `dalgu.v1` as the operator, and tells how it ended.
///
/// # Errors
/// If it cannot be started, or does not end.
pub async fn try_call(lab: &Lab, method: &str, body: &str) -> anyhow::Result<Ended> {
    run(
        lab,
        Caller::Operator,
        &["-format-error", "-d", body],
        &[&format!("dalgu.v1.{method}")],
    )
    .await
}

/// Makes a call of `dalgu.v1` as the operator.
///
/// # Errors
/// If it is refused.
pub async fn call(lab: &Lab, method: &str, body: &str) -> anyhow::Result<Value> {
    let ended = try_call(lab, method, body).await?;
    ensure!(
        ended.code == 0,
        "{method} {body}: {} {}",
        ended.code,
        ended.stderr
    );
    serde_json::from_str(&ended.stdout).with_context(|| format!("{method} answered {}", ended.stdout))
}

/// Code and reason of a refusal, as `grpcurl -format-error` prints it: `3 INVALID_FIELD`.
#[must_use]
pub fn refusal(ended: &Ended) -> Option<String> {
    let error: Value = serde_json::from_str(ended.stderr.get(ended.stderr.find('{')?..)?).ok()?;
    let reason = error["details"]
        .as_array()
        .into_iter()
        .flatten()
        .find_map(|detail| detail["reason"].as_str())
        .unwrap_or("-");
    Some(format!("{} {reason}", error["code"]))
}
