//! The process that serves a network on this host: `dnsmasq` in a network namespace that lives and dies with it.
//!
//! Called by [`super::system`]. What is changed while it runs is read anew on SIGHUP; a change of its configuration, or its death,
//! means a new one. One that an earlier run of the agent left is found by the file that names it, and ended before a new one
//! begins: a moment without DNS, and leases that are as they were.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::Notify,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};

use super::{
    compile::Segment,
    names, relay,
    service::{DEVICE, Holders, Service, taken_over, without},
    system::{Failed, run},
};

/// Longest wait for a process to enter its namespace, or to end.
const LIMIT: Duration = Duration::from_secs(5);
/// It is looked so often whether it has.
const LOOK: Duration = Duration::from_millis(10);
/// The file that names the process.
const PROCESS: &str = "process";
/// The file in which it keeps the leases that it gave.
const GIVEN: &str = "given";
/// The file that says which interfaces they may be of.
const HELD: &str = "held";

/// The service of one network, running.
pub(super) struct Running {
    pid: Pid,
    service: Service,
    held: Holders,
    waiting: JoinHandle<()>,
    _relay: JoinSet<()>,
}

/// Where a network's service keeps its files.
pub(super) fn directory(base: &Path, bridge: &str) -> PathBuf {
    base.join(bridge)
}

impl Running {
    /// Whether it runs, with this configuration, and can give all these addresses.
    pub(super) fn is_right(&self, service: &Service) -> bool {
        let Service {
            mac,
            addresses,
            config,
            servers,
            ..
        } = service;
        !self.waiting.is_finished()
            && taken_over(&self.held, &service.holders).is_empty()
            && (mac, addresses, config, servers)
                == (
                    &self.service.mac,
                    &self.service.addresses,
                    &self.service.config,
                    &self.service.servers,
                )
    }

    /// Starts it for a network whose bridge is there.
    pub(super) async fn start(
        base: &Path,
        segment: &Segment,
        service: &Service,
        ended: Arc<Notify>,
    ) -> Result<Self, Failed> {
        let dir = directory(base, &segment.bridge);
        end_former(&dir).await?;
        let mut held = read_held(&dir);
        take_over(&dir, &held, service)?;
        hold(&dir, &mut held, service)?;
        write_files(&dir, service)?;
        let config = service.config.replace("{dir}", &dir.to_string_lossy());
        replace(&dir.join("dnsmasq.conf"), &config)?;
        let mut child = spawn(&dir)?;
        let number = child
            .id()
            .ok_or_else(|| Failed("dnsmasq ended at once".to_owned()))?;
        let pid = Pid::from_raw(i32::try_from(number).map_err(io::Error::other)?);
        replace(&dir.join(PROCESS), &format!("{pid}\n"))?;
        let plugged = plug_in(&mut child, pid, segment, service).await;
        let relay = match plugged {
            Ok(relay) => relay,
            Err(failed) => {
                // It waits for the word to begin, and has done nothing.
                let _ = child.kill().await;
                return Err(failed);
            }
        };
        let waiting = tokio::spawn(async move {
            let status = child.wait().await;
            tracing::debug!(?status, "a network's service has ended");
            ended.notify_one();
        });
        tracing::info!(network = %segment.network, %pid, "a network's DHCP and DNS have started");
        Ok(Self {
            pid,
            service: service.clone(),
            held,
            waiting,
            _relay: relay,
        })
    }

    /// Tells it of names and addresses that have changed.
    pub(super) fn update(&mut self, base: &Path, bridge: &str, service: &Service) -> Result<(), Failed> {
        if self.service == *service {
            return Ok(());
        }
        let dir = directory(base, bridge);
        hold(&dir, &mut self.held, service)?;
        write_files(&dir, service)?;
        if !self.waiting.is_finished() {
            kill(self.pid, Signal::SIGHUP).map_err(io::Error::from)?;
        }
        self.service = service.clone();
        Ok(())
    }

    /// Ends it.
    pub(super) async fn stop(mut self) {
        if !self.waiting.is_finished() {
            // It may end by itself at this moment; it is waited for either way.
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = tokio::time::timeout(LIMIT, &mut self.waiting).await;
        }
    }
}

/// Empty without a file, or with one that is none.
fn read_held(dir: &Path) -> Holders {
    let text = fs::read(dir.join(HELD)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// Makes addresses free that other interfaces have had. It must not run meanwhile.
fn take_over(dir: &Path, held: &Holders, service: &Service) -> io::Result<()> {
    let taken = taken_over(held, &service.holders);
    let given = dir.join(GIVEN);
    if taken.is_empty() || !given.exists() {
        return Ok(());
    }
    replace(&given, &without(&fs::read_to_string(&given)?, &taken))
}

/// Writes down who has which address, before it can be given.
fn hold(dir: &Path, held: &mut Holders, service: &Service) -> io::Result<()> {
    held.extend(service.holders.clone());
    fs::create_dir_all(dir)?;
    replace(&dir.join(HELD), &serde_json::to_string(held)?)
}

fn write_files(dir: &Path, service: &Service) -> io::Result<()> {
    // It is read as a user of its own, whatever the agent's mask.
    for dir in dir.ancestors().take(2) {
        fs::set_permissions(dir, Permissions::from_mode(0o711))?;
    }
    for (name, text) in [("hosts", &service.hosts), ("leases", &service.leases)] {
        replace(&dir.join(name), text)?;
    }
    Ok(())
}

/// Writes a file as a whole: it is read at any moment. It need not outlive the host's power.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let passing = path.with_extension("new");
    File::create(&passing)?.write_all(text.as_bytes())?;
    fs::set_permissions(&passing, Permissions::from_mode(0o644))?;
    fs::rename(&passing, path)
}

/// It waits in its new namespace for a line, until its interface is there.
fn spawn(dir: &Path) -> io::Result<Child> {
    Command::new("unshare")
        .args([
            "--net",
            "--",
            "sh",
            "-c",
            "read -r _ && exec \"$@\"",
            "sh",
            "dnsmasq",
        ])
        .arg("--keep-in-foreground")
        .arg(format!("--conf-file={}", dir.join("dnsmasq.conf").display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .kill_on_drop(false)
        .spawn()
}

fn namespace(pid: impl std::fmt::Display) -> PathBuf {
    format!("/proc/{pid}/ns/net").into()
}

async fn plug_in(
    child: &mut Child,
    pid: Pid,
    segment: &Segment,
    service: &Service,
) -> Result<JoinSet<()>, Failed> {
    let (own, its) = (fs::read_link(namespace("self"))?, namespace(pid));
    let until = Instant::now() + LIMIT;
    while fs::read_link(&its)? == own {
        if Instant::now() > until {
            return Err(Failed("dnsmasq got no network namespace of its own".to_owned()));
        }
        sleep(LOOK).await;
    }
    let port = names::device(names::SERVICE, &segment.network);
    // What a former one has left; its other end goes with it.
    let _ = run("ip", &["link", "del", "dev", &port], None).await;
    let (bridge, mtu, mac) = (&segment.bridge, segment.mtu, &service.mac);
    let outside = format!(
        "link add dev {port} mtu {mtu} type veth peer name {DEVICE} mtu {mtu} address {mac} netns {pid}\n\
         link set dev {port} addrgenmode none master {bridge} up\n"
    );
    run("ip", &["-batch", "-"], Some(&outside)).await?;
    let mut inside = format!("link set dev lo up\nlink set dev {DEVICE} up\n");
    for address in &service.addresses {
        // The same on every host: nobody is asked whether it is in use.
        let nodad = if address.contains(':') { " nodad" } else { "" };
        inside += &format!("address add {address} dev {DEVICE}{nodad}\n");
    }
    let enter = format!("--net={}", its.display());
    run("nsenter", &[&enter, "ip", "-batch", "-"], Some(&inside)).await?;
    let servers: &[IpAddr] = &service.servers;
    let relay = relay::start(File::open(&its)?, servers).await?;
    use tokio::io::AsyncWriteExt as _;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(b"\n").await?;
    }
    Ok(relay)
}

/// Ends the process that an earlier run of the agent left for this directory.
pub(super) async fn end_former(dir: &Path) -> Result<(), Failed> {
    let Ok(text) = fs::read_to_string(dir.join(PROCESS)) else {
        return Ok(());
    };
    let Some(pid) = text.trim().parse().ok().filter(|pid| *pid > 1) else {
        return Ok(());
    };
    let until = Instant::now() + LIMIT;
    // The number may be another process's by now.
    while is_of(pid, dir) {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        if Instant::now() > until {
            return Err(Failed(format!("process {pid}, the former dnsmasq, does not end")));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

fn is_of(pid: i32, dir: &Path) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let config = format!("--conf-file={}", dir.join("dnsmasq.conf").display());
    command
        .split(|byte| *byte == 0)
        .any(|word| word == config.as_bytes())
}
