//! The lab: several real libvirt hosts on one machine, with a controller and an agent on each.
//!
//! A host is a network namespace with a cable to the lab's bridge, and mount and UTS namespaces kept by its
//! *anchor* process, in which the host has its own libvirt and Dalgu directories, host name, machine id and boot id, and
//! an account of its own load.
//! The controller runs in the machine's own namespaces, at the bridge's address. Used by the `lab` program, the
//! end-to-end tests and the benchmarks. It needs root. It must leave nothing behind and touch nothing that is not the lab's.
//!
//! ```text
//!   machine      dalgubr0 10.77.0.1  controller :7443
//!                 |            |            |
//!   namespaces   h1 .11       h2 .12       h3 .13      each: libvirtd (no network), agent :7444, guests
//! ```

pub mod guest;
pub mod layout;

mod dalgu;
mod host;
mod load;
mod network;
mod process;
mod records;
mod run;
mod shell;
mod status;
mod trial;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use futures::future::try_join_all;
use nix::sys::signal::Signal;

use layout::{Host, Layout, MAX_HOSTS, OWN_DIRS};
use records::Record;

pub use host::hold;
pub use load::processor_to_fill;
pub use process::MARK;
pub use run::{run, wait_for};
pub use shell::exports;
pub use status::Status;
pub use trial::with_lab;

/// What to bring up.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many hosts, 1 to 20.
    pub hosts: u8,
    /// Start the controller and the agents too, not only libvirt.
    pub dalgu: bool,
    /// How often agents report, in milliseconds.
    pub report_interval_ms: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: 3,
            dalgu: true,
            report_interval_ms: 1000,
        }
    }
}

/// A daemon of the lab that can be ended and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// The controller.
    Controller,
    /// The agent of a host, counted from 1.
    Agent(u8),
    /// The libvirtd of a host, counted from 1.
    Libvirtd(u8),
}

/// A lab that is up.
#[derive(Debug, Clone)]
pub struct Lab {
    layout: Layout,
    record: Record,
}

impl Lab {
    /// Brings a lab up. What a crashed run left of the same lab is removed first; on failure all is removed again,
    /// the logs excepted: the error says where they are.
    ///
    /// # Errors
    /// If a whole lab with this id is up, this is not root, or anything does not start.
    pub async fn up(layout: Layout, options: &Options) -> anyhow::Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab needs root: it makes network namespaces and starts libvirtd");
        }
        if !(1..=MAX_HOSTS).contains(&options.hosts) {
            bail!("{} hosts: must be 1 to {MAX_HOSTS}", options.hosts);
        }
        match records::read(&layout)? {
            Some(record) if record.complete => {
                bail!("lab {} is up already: `lab down` removes it", layout.id())
            }
            Some(_) => down(layout.clone())
                .await
                .context("remove what an earlier run left")?,
            None if layout.record().exists() => down(layout.clone())
                .await
                .context("remove what an earlier run left")?,
            None => {}
        }
        let record = Record {
            dir: layout.dir().to_path_buf(),
            hosts: options.hosts,
            dalgu: options.dalgu,
            complete: false,
        };
        records::claim(&layout, &record)?;
        let mut lab = Self { layout, record };
        match lab.build(options).await {
            Ok(()) => Ok(lab),
            Err(error) => {
                let logs = keep_logs(&lab.layout);
                let cleaned = down(lab.layout).await;
                let error = match logs {
                    Some(logs) => error.context(format!(
                        "the lab did not come up; its logs are in {}",
                        logs.display()
                    )),
                    None => error.context("the lab did not come up"),
                };
                Err(match cleaned {
                    Ok(()) => error,
                    Err(second) => error.context(format!("and it could not be removed: {second:#}")),
                })
            }
        }
    }

    /// The lab that is up with this layout's id.
    ///
    /// # Errors
    /// If there is none, or it is not whole.
    pub fn current(layout: Layout) -> anyhow::Result<Self> {
        match records::read(&layout)? {
            Some(record) if record.complete => {
                let layout = layout.with_dir(record.dir.clone());
                Ok(Self { layout, record })
            }
            Some(_) => bail!("lab {} is half up: `lab down` removes it", layout.id()),
            None => bail!("lab {} is not up: `lab up` brings it up", layout.id()),
        }
    }

    async fn build(&mut self, options: &Options) -> anyhow::Result<()> {
        let layout = &self.layout;
        let hosts = self.hosts();
        for dir in ["log", "pid"] {
            fs::create_dir_all(layout.dir().join(dir)).with_context(|| format!("make {dir}"))?;
        }
        guest::build(layout).await?;
        for host in &hosts {
            host::prepare(layout, host)?;
            guest::give(layout, host)?;
        }
        if options.dalgu {
            dalgu::prepare(layout, &hosts, options.report_interval_ms).await?;
        }
        shell::write_wrappers(layout, &hosts, options.dalgu)?;
        records::make_mountpoints(&OWN_DIRS)?;
        network::make_bridges(layout).await?;
        for host in &hosts {
            network::connect(layout, host).await?;
        }
        if options.dalgu {
            dalgu::start_controller(layout).await?;
        }
        try_join_all(hosts.iter().map(|host| boot(layout, host, options.dalgu))).await?;
        if options.dalgu {
            dalgu::await_hosts(layout, &hosts).await?;
        }
        self.record.complete = true;
        records::update(&self.layout, &self.record)
    }

    /// Names and paths of this lab.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All hosts, h1 first.
    #[must_use]
    pub fn hosts(&self) -> Vec<Host> {
        (1..=self.record.hosts)
            .map(|number| self.layout.host(number))
            .collect()
    }

    /// Whether the controller and the agents are part of this lab.
    #[must_use]
    pub fn has_dalgu(&self) -> bool {
        self.record.dalgu
    }

    fn host(&self, number: u8) -> anyhow::Result<Host> {
        if !(1..=self.record.hosts).contains(&number) {
            bail!("no host h{number}: this lab has h1 to h{}", self.record.hosts);
        }
        Ok(self.layout.host(number))
    }

    /// Runs a command in a host and returns what it printed.
    ///
    /// # Errors
    /// If the host is not up, or the command fails.
    pub async fn exec(&self, host: u8, command: &[&str]) -> anyhow::Result<String> {
        host::inside(&self.layout, &self.host(host)?, command).await
    }

    /// Runs `virsh` against a host's libvirtd and returns what it printed.
    ///
    /// # Errors
    /// If the host is not up, or virsh fails.
    pub async fn virsh(&self, host: u8, arguments: &[&str]) -> anyhow::Result<String> {
        let words: Vec<_> = ["virsh", "-q", "-c", "qemu:///system"]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        self.exec(host, &words).await
    }

    /// Runs `dalgu` as the lab's operator and returns what it printed.
    ///
    /// # Errors
    /// If it is not built, or fails.
    pub async fn dalgu(&self, arguments: &[&str]) -> anyhow::Result<String> {
        dalgu::cli(&self.layout, arguments).await
    }

    /// Whether a daemon is running.
    ///
    /// # Errors
    /// If there is no such host.
    pub fn is_running(&self, daemon: Daemon) -> anyhow::Result<bool> {
        Ok(process::running(&self.layout, &self.name(daemon)?).is_some())
    }

    /// Sends a signal to a daemon. After SIGKILL it is gone when this returns; its guests run on.
    ///
    /// # Errors
    /// If it is not running.
    pub async fn signal(&self, daemon: Daemon, signal: Signal) -> anyhow::Result<()> {
        process::signal(&self.layout, &self.name(daemon)?, signal).await
    }

    /// Starts a daemon that ended, and waits until it answers.
    ///
    /// # Errors
    /// If it runs already, or does not come up.
    pub async fn start(&self, daemon: Daemon) -> anyhow::Result<()> {
        match daemon {
            Daemon::Controller => dalgu::start_controller(&self.layout).await,
            Daemon::Agent(number) => dalgu::start_agent(&self.layout, &self.host(number)?).await,
            Daemon::Libvirtd(number) => host::start_libvirtd(&self.layout, &self.host(number)?).await,
        }
    }

    fn name(&self, daemon: Daemon) -> anyhow::Result<String> {
        Ok(match daemon {
            Daemon::Controller => dalgu::CONTROLLER.to_owned(),
            Daemon::Agent(number) => self.host(number)?.agent(),
            Daemon::Libvirtd(number) => self.host(number)?.libvirtd(),
        })
    }

    /// Ends everything on a host at once, guests too, as a power cut does. It comes back with a new boot id.
    ///
    /// # Errors
    /// If a process does not end.
    pub async fn power_off(&self, host: u8) -> anyhow::Result<()> {
        host::power_off(&self.layout, &self.host(host)?).await
    }

    /// Boots a host that was powered off: libvirtd and, in a lab with Dalgu, its agent.
    ///
    /// # Errors
    /// If something does not come up.
    pub async fn power_on(&self, host: u8) -> anyhow::Result<()> {
        boot(&self.layout, &self.host(host)?, self.record.dalgu).await
    }

    /// What runs at this moment.
    #[must_use]
    pub fn status(&self) -> Status {
        status::look(&self.layout, &self.hosts(), self.record.dalgu)
    }

    /// Removes every trace of the lab.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub async fn down(self) -> anyhow::Result<()> {
        down(self.layout).await
    }
}

async fn boot(layout: &Layout, host: &Host, dalgu: bool) -> anyhow::Result<()> {
    host::start_anchor(layout, host).await?;
    host::start_libvirtd(layout, host).await?;
    if dalgu {
        dalgu::start_agent(layout, host).await?;
    }
    Ok(())
}

/// Removes every trace of a lab, whether it is whole, half up, or was left by a crash. Without a lab it does nothing.
///
/// # Errors
/// If something cannot be removed.
pub async fn down(layout: Layout) -> anyhow::Result<()> {
    let record = records::read(&layout).unwrap_or_default();
    let layout = match &record {
        Some(record) => layout.with_dir(record.dir.clone()),
        None => layout,
    };
    let hosts: Vec<_> = (1..=MAX_HOSTS)
        .map(|number| layout.host(number))
        .filter(network::is_there)
        .collect();
    process::end_all(&layout, &hosts, true).await?;
    for number in 1..=MAX_HOSTS {
        load::remove(&layout.host(number)).await?;
    }
    network::remove(&layout, &hosts).await?;
    records::forget(&layout).await
}

/// Saves the logs of a lab that is about to go. Answers where.
#[must_use]
pub fn keep_logs(layout: &Layout) -> Option<PathBuf> {
    copy_logs(layout, &layout.tools_dir().with_file_name("lab-logs"))
}

/// Saves the logs of a lab that is about to go, those of its QEMUs too, in a folder that is emptied first. Answers where.
#[must_use]
pub fn copy_logs(layout: &Layout, kept: &Path) -> Option<PathBuf> {
    let _ = fs::remove_dir_all(kept);
    fs::create_dir_all(kept).ok()?;
    for entry in fs::read_dir(layout.dir().join("log")).ok()?.flatten() {
        fs::copy(entry.path(), kept.join(entry.file_name())).ok()?;
    }
    for host in (1..=MAX_HOSTS).map(|number| layout.host(number)) {
        let Ok(entries) = fs::read_dir(host.outside("/var/log/libvirt/qemu")) else {
            continue;
        };
        for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
            let name = format!("{}-qemu-{}", host.name, entry.file_name().to_string_lossy());
            fs::copy(entry.path(), kept.join(name)).ok()?;
        }
    }
    Some(kept.to_path_buf())
}
