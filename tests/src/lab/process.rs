//! The lab's processes: starts daemons under a reaper, finds and ends what belongs to a lab.
//!
//! A process belongs to a lab if its environment bears the lab's mark, or if it lives in one of the lab's
//! network namespaces (QEMU does not keep its environment). Nothing else is ever signalled, so that
//! a stale process id cannot hit a stranger.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;

use super::layout::{Host, Layout};
use super::load;
use super::run::wait_for;

/// Environment variable that marks the processes of a lab; its value is the lab's directory.
pub const MARK: &str = "DALGU_LAB_MEMBER";

/// Where a daemon of the lab runs.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// In the machine's own namespaces, as the controller does.
    Machine,
    /// In the network namespace of a host, with new mount and UTS namespaces: the first process of a host.
    NewHost(&'a Host),
    /// In all namespaces of a running host.
    Host(&'a Host),
}

/// Starts a daemon under a reaper and returns its process id. It outlives the caller.
///
/// # Errors
/// If it is running already, or could not be started.
pub async fn start(layout: &Layout, place: Place<'_>, name: &str, command: &[String]) -> anyhow::Result<Pid> {
    if let Some(pid) = running(layout, name) {
        bail!("{name} is running already (process {pid})");
    }
    let pid_file = layout.pid_file(name);
    let _ = fs::remove_file(&pid_file);
    let log = layout.log(name);
    let words = words_for(layout, place, &pid_file, &log, command)?;
    let stderr = fs::File::options()
        .create(true)
        .append(true)
        .open(&log)
        .context("open a log")?;
    let (program, rest) = words.split_first().context("no command")?;
    let mut reaper = Command::new(program)
        .args(rest)
        .env(MARK, layout.dir())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("start {name}"))?;
    wait_for(name, Duration::from_secs(10), async || {
        pid_file.exists() || matches!(reaper.try_wait(), Ok(Some(_)))
    })
    .await?;
    read_pid(&pid_file).with_context(|| format!("{name} did not start: see {}", log.display()))
}

/// The daemon's command line with its reaper and the way into its namespaces.
fn words_for(
    layout: &Layout,
    place: Place<'_>,
    pid_file: &Path,
    log: &Path,
    command: &[String],
) -> anyhow::Result<Vec<String>> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut words = match place {
        Place::Machine => Vec::new(),
        Place::NewHost(host) => load::enter(host),
        Place::Host(host) => [load::enter(host), enter(layout, host)?].concat(),
    };
    words.push(text(&layout.bin_dir().join("lab-reaper")));
    words.extend([
        "--pid-file".to_owned(),
        text(pid_file),
        "--log".to_owned(),
        text(log),
        "--".to_owned(),
    ]);
    if let Place::NewHost(host) = place {
        let into = [
            "ip",
            "netns",
            "exec",
            &host.namespace,
            "unshare",
            "--mount",
            "--uts",
            "--propagation",
            "private",
            "--",
        ];
        words.extend(into.map(str::to_owned));
    }
    words.extend_from_slice(command);
    Ok(words)
}

/// The words before a command that make it run in the host.
///
/// # Errors
/// If the host is not up.
pub fn enter(layout: &Layout, host: &Host) -> anyhow::Result<Vec<String>> {
    let anchor = running(layout, &host.anchor()).with_context(|| format!("host {} is not up", host.name))?;
    let target = anchor.to_string();
    Ok(
        ["nsenter", "--target", &target, "--mount", "--uts", "--net", "--"]
            .map(str::to_owned)
            .to_vec(),
    )
}

/// The daemon's process id, if it is alive and belongs to this lab.
#[must_use]
pub fn running(layout: &Layout, name: &str) -> Option<Pid> {
    let pid = read_pid(&layout.pid_file(name))?;
    (is_marked(pid, layout.dir()) && !is_zombie(pid)).then_some(pid)
}

/// Sends a signal to a daemon and, if it is deadly at once (SIGKILL), waits until the daemon is gone.
///
/// # Errors
/// If the daemon is not running, or does not go.
pub async fn signal(layout: &Layout, name: &str, signal: Signal) -> anyhow::Result<()> {
    let pid = running(layout, name).with_context(|| format!("{name} is not running"))?;
    kill(pid, signal).with_context(|| format!("send {signal} to {name}"))?;
    if signal == Signal::SIGKILL {
        wait_for(&format!("end of {name}"), Duration::from_secs(10), async || {
            is_gone(pid)
        })
        .await?;
    }
    Ok(())
}

/// Whether nothing of a process is left but its entry: its memory, and with it the lab's mark, goes before its ports and
/// locks do, and those of a process with threads stay until the last of them has ended.
fn is_gone(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads == 0 || (threads == 1 && is_zombie(pid))
}

/// Ends every process of the given network namespaces and, if asked, every process that bears the lab's mark.
/// Answers how many there were.
///
/// # Errors
/// If some are still there after 20 s.
pub async fn end_all(layout: &Layout, hosts: &[Host], marked_too: bool) -> anyhow::Result<usize> {
    let namespaces: Vec<_> = hosts.iter().filter_map(namespace_identity).collect();
    let mark = marked_too.then_some(layout.dir());
    let found = members(&namespaces, mark).len();
    wait_for(
        "end of the lab's processes",
        Duration::from_secs(20),
        async || {
            let left = members(&namespaces, mark);
            for pid in &left {
                // Gone meanwhile is as good.
                let _ = kill(*pid, Signal::SIGKILL);
            }
            left.is_empty()
        },
    )
    .await?;
    Ok(found)
}

/// Guests running on a host: its QEMU processes.
#[must_use]
pub fn guests(host: &Host) -> usize {
    let namespaces: Vec<_> = namespace_identity(host).into_iter().collect();
    let is_qemu = |pid: &Pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
    };
    members(&namespaces, None)
        .iter()
        .filter(|pid| is_qemu(pid))
        .count()
}

fn members(namespaces: &[(u64, u64)], mark: Option<&Path>) -> Vec<Pid> {
    let own = Pid::this();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw))
        .filter(|pid| *pid != own && !is_zombie(*pid))
        .filter(|pid| {
            let inside =
                identity(&format!("/proc/{pid}/ns/net")).is_some_and(|net| namespaces.contains(&net));
            inside || mark.is_some_and(|mark| is_marked(*pid, mark))
        })
        .collect()
}

fn namespace_identity(host: &Host) -> Option<(u64, u64)> {
    let own = identity("/proc/self/ns/net");
    // Never the machine's own namespace, whatever the file says.
    identity(&format!("/run/netns/{}", host.namespace)).filter(|found| Some(*found) != own)
}

fn identity(path: &str) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Whether a process belongs to the lab in `dir`. While a process turns into another program its environment is empty;
/// then its parent counts, which for a daemon is its reaper.
fn is_marked(pid: Pid, dir: &Path) -> bool {
    match bears_mark(pid, dir) {
        Some(marked) => marked,
        None => parent(pid).is_some_and(|parent| bears_mark(parent, dir) == Some(true)),
    }
}

/// Whether the mark is in a process's environment; `None` where that is empty.
fn bears_mark(pid: Pid, dir: &Path) -> Option<bool> {
    let wanted = format!("{MARK}={}", dir.display());
    let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else {
        return Some(false);
    };
    let mut entries = environment.split(|byte| *byte == 0);
    (!environment.is_empty()).then(|| entries.any(|entry| entry == wanted.as_bytes()))
}

fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok().map(Pid::from_raw)
}

/// Also true of a process that is no more.
fn is_zombie(pid: Pid) -> bool {
    if kill(pid, None) == Err(Errno::ESRCH) {
        return true;
    }
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| matches!(rest.trim_start().chars().next(), Some('Z' | 'X')))
}

fn read_pid(file: &Path) -> Option<Pid> {
    fs::read_to_string(file)
        .ok()?
        .trim()
        .parse()
        .ok()
        .map(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_the_mark_is_never_a_member() {
        assert!(!is_marked(Pid::this(), Path::new("/no/such/lab")));
        assert!(members(&[], Some(Path::new("/no/such/lab"))).is_empty());
    }

    #[tokio::test]
    async fn a_marked_process_is_found_and_an_ended_one_is_not() {
        let mark = format!("/no/such/lab/{}", std::process::id());
        let mut child = Command::new("sleep").arg("60").env(MARK, &mark).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
        wait_for("the mark", Duration::from_secs(5), async || {
            members(&[], Some(Path::new(&mark))) == [pid]
        })
        .await
        .unwrap();
        child.kill().await.unwrap();
        assert!(members(&[], Some(Path::new(&mark))).is_empty());
    }

    #[tokio::test]
    async fn a_process_without_any_environment_belongs_where_its_parent_does() {
        let mark = format!("/no/such/lab/bare/{}", std::process::id());
        let mut parent = Command::new("sh")
            .args(["-c", "env -i sleep 60 & wait"])
            .env(MARK, &mark)
            .spawn()
            .unwrap();
        wait_for("parent and child", Duration::from_secs(5), async || {
            let found = members(&[], Some(Path::new(&mark)));
            let bare = |pid: &&Pid| bears_mark(**pid, Path::new(&mark)).is_none();
            found.len() == 2 && found.iter().filter(bare).count() == 1
        })
        .await
        .unwrap();
        for pid in members(&[], Some(Path::new(&mark))) {
            let _ = kill(pid, Signal::SIGKILL);
        }
        parent.wait().await.unwrap();
    }

    #[test]
    fn the_machines_own_network_namespace_is_never_taken_for_a_host() {
        let mut host = Layout::new(0).unwrap().host(1);
        host.namespace = "../../proc/self/ns/net".to_owned();
        assert_eq!(namespace_identity(&host), None);
    }
}
