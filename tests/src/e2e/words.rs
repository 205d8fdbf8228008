//! The operator's words, typed into the real `dalgu`, and the parts of its JSON answers that tests look at.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::process::Command;
use tokio::time::timeout;

use crate::lab::{Lab, guest, wait_for};

/// No single command of a test should last longer.
const COMMAND_LIMIT: Duration = Duration::from_mins(5);

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// Runs any command and tells how it ended, whatever that was.
///
/// # Errors
/// If it cannot be started, or does not end.
pub async fn attempt(command: &mut Command) -> anyhow::Result<Ended> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(COMMAND_LIMIT, command.output())
        .await
        .with_context(|| format!("{command:?} did not end"))?
        .with_context(|| format!("start {command:?}"))?;
    Ok(Ended {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs `dalgu` and tells how it ended.
///
/// # Errors
/// If it cannot be started, or does not end.
pub async fn try_dalgu(lab: &Lab, words: &[&str]) -> anyhow::Result<Ended> {
    let mut command = Command::new(lab.layout().bin_dir().join("dalgu"));
    command.env("DALGU_CONFIG", lab.layout().cli_config()).args(words);
    attempt(&mut command).await
}

/// Runs `dalgu` and returns what it printed.
///
/// # Errors
/// If it fails; the error holds what it said.
pub async fn dalgu(lab: &Lab, words: &[&str]) -> anyhow::Result<String> {
    let ended = try_dalgu(lab, words).await?;
    ensure!(
        ended.code == 0,
        "`dalgu {}` ended with {}: {}",
        words.join(" "),
        ended.code,
        ended.stderr
    );
    Ok(ended.stdout)
}

/// Runs `dalgu ... -o json` and reads its answer.
///
/// # Errors
/// If it fails, or its answer is not JSON.
pub async fn json(lab: &Lab, words: &[&str]) -> anyhow::Result<Value> {
    let words: Vec<_> = words.iter().chain(&["-o", "json"]).copied().collect();
    let text = dalgu(lab, &words).await?;
    serde_json::from_str(&text)
        .with_context(|| format!("`dalgu {}` printed no JSON: {text}", words.join(" ")))
}

/// Begins something that takes its time, without waiting. Answers the operation's id.
///
/// # Errors
/// If it is refused.
pub async fn begin(lab: &Lab, words: &[&str]) -> anyhow::Result<String> {
    let words: Vec<_> = words.iter().chain(&["--no-wait"]).copied().collect();
    let id = dalgu(lab, &words).await?.trim().to_owned();
    ensure!(
        !id.is_empty() && !id.contains(char::is_whitespace),
        "not an operation's id: {id:?}"
    );
    Ok(id)
}

/// As [`begin`], and where the controller cannot be reached, again with the same request id, as an operator would.
///
/// # Errors
/// If it is refused, or the controller does not come back.
pub async fn begin_again(lab: &Lab, words: &[&str]) -> anyhow::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("make a request id")?;
    let words: Vec<_> = words
        .iter()
        .chain(&["--no-wait", "--request-id", id.trim()])
        .copied()
        .collect();
    let mut last = None;
    wait_for("an answer of the controller", COMMAND_LIMIT, async || {
        last = try_dalgu(lab, &words).await.ok();
        last.as_ref().is_some_and(|ended| ended.code != UNREACHABLE)
    })
    .await
    .with_context(|| format!("{last:?}"))?;
    let ended = last.context("no answer")?;
    ensure!(
        ended.code == 0,
        "`dalgu {}`: {} {}",
        words.join(" "),
        ended.code,
        ended.stderr
    );
    Ok(ended.stdout.trim().to_owned())
}

/// Exit code of `dalgu` where there is no such thing.
pub const NOT_FOUND: i32 = 3;
/// Exit code of `dalgu` where the controller cannot be reached.
pub const UNREACHABLE: i32 = 6;

/// An operation as it is now.
///
/// # Errors
/// If there is none of that id.
pub async fn operation(lab: &Lab, id: &str) -> anyhow::Result<Value> {
    json(lab, &["op", "show", id]).await
}

/// The state of an operation without its prefix: `SUCCEEDED`, `FAILED`, ...
#[must_use]
pub fn state_of(operation: &Value) -> &str {
    let state = operation["state"].as_str().unwrap_or("UNSPECIFIED");
    state.strip_prefix("OPERATION_STATE_").unwrap_or(state)
}

/// Waits until an operation has ended, by asking again and again: also while the controller comes back.
///
/// # Errors
/// If it does not end within the limit.
pub async fn end_of(lab: &Lab, id: &str, limit: Duration) -> anyhow::Result<Value> {
    let mut last = Value::Null;
    let ended = wait_for(&format!("end of operation {id}"), limit, async || {
        if let Ok(now) = operation(lab, id).await {
            last = now;
        }
        matches!(state_of(&last), "SUCCEEDED" | "FAILED" | "CANCELLED")
    })
    .await;
    ended.with_context(|| format!("it was last {last}"))?;
    Ok(last)
}

/// A VM as Dalgu tells of it.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Name.
    pub name: String,
    /// UUID.
    pub uid: String,
    /// Host that owns it.
    pub host: String,
    /// State without its prefix: `RUNNING`, `STOPPED`, ...
    pub state: String,
    /// Virtual processors.
    pub vcpus: u64,
    /// Memory of the guest, in MiB.
    pub memory_mib: u64,
    /// Its disks that are no volumes: pool and file name.
    pub disks: Vec<(String, String)>,
    /// All of it.
    pub all: Value,
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .or_else(|| value.as_str()?.parse().ok())
        .unwrap_or(0)
}

/// A number of the API's JSON form: 64-bit ones are strings, and zero is left out.
#[must_use]
pub fn number_at(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).map_or(0, number)
}

impl Vm {
    fn read(vm: &Value) -> Self {
        let text = |pointer: &str| {
            vm.pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let disk = |disk: &Value| {
            let part = |key: &str| disk[key].as_str().unwrap_or_default().to_owned();
            let suffix = if part("format") == "DISK_FORMAT_RAW" {
                "raw"
            } else {
                "qcow2"
            };
            (part("pool"), format!("{}.{suffix}", part("name")))
        };
        Self {
            name: text("/name"),
            uid: text("/uid"),
            host: text("/status/host"),
            state: text("/status/state").replace("VM_STATE_", ""),
            vcpus: number_at(vm, "/spec/vcpus"),
            memory_mib: number_at(vm, "/spec/memoryMib"),
            disks: vm["spec"]["disks"]
                .as_array()
                .map(|all| {
                    let own = all
                        .iter()
                        .filter(|disk| disk["volume"].as_str().is_none_or(str::is_empty));
                    own.map(disk).collect()
                })
                .unwrap_or_default(),
            all: vm.clone(),
        }
    }

    /// Number of its host: h1 is 1.
    ///
    /// # Errors
    /// If it has none.
    pub fn host_number(&self) -> anyhow::Result<u8> {
        self.host
            .strip_prefix('h')
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("{} is on no host of the lab: {:?}", self.name, self.host))
    }
}

/// One VM.
///
/// # Errors
/// If there is none of that name.
pub async fn vm(lab: &Lab, name: &str) -> anyhow::Result<Vm> {
    Ok(Vm::read(&json(lab, &["vm", "show", name]).await?))
}

/// All VMs by their names.
///
/// # Errors
/// If the controller does not answer.
pub async fn vms(lab: &Lab) -> anyhow::Result<BTreeMap<String, Vm>> {
    let list = json(lab, &["vm", "list"]).await?;
    let list = list.as_array().context("the list of VMs is no list")?;
    Ok(list
        .iter()
        .map(Vm::read)
        .map(|vm| (vm.name.clone(), vm))
        .collect())
}

/// The words that create a VM of the lab's guest, with one blank disk of 8 MiB in a pool, and more words.
#[must_use]
pub fn create<'a>(name: &'a str, disk: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    create_with(name, disk, guest::CMDLINE, more)
}

/// As [`create`], with another kernel command line.
#[must_use]
pub fn create_with<'a>(name: &'a str, disk: &'a str, cmdline: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec![
        "vm",
        "create",
        name,
        "--kernel",
        guest::KERNEL,
        "--initrd",
        guest::INITRD,
    ];
    words.extend(["--cmdline", cmdline, "--nic", "eth0=br0", "--disk", disk]);
    if !more.contains(&"--memory") {
        words.extend(["--memory", "96MiB"]);
    }
    words.extend_from_slice(more);
    words
}

/// A blank disk on the host itself.
pub const LOCAL: &str = "root=8MiB";
/// A blank disk that all hosts see.
pub const SHARED: &str = "root=8MiB,pool=shared";
