//! What runs in a lab at this moment, for `lab status`. It only looks.

use std::fmt;

use serde::Serialize;

use super::dalgu::CONTROLLER;
use super::layout::{Host, Layout};
use super::process;

/// What runs in a lab.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Where the lab keeps its state and its logs.
    pub dir: String,
    /// The controller's address, if it runs.
    pub controller: Option<String>,
    /// One entry a host.
    pub hosts: Vec<HostStatus>,
    /// The lab has a controller and agents.
    pub has_dalgu: bool,
}

/// What runs on one host.
#[derive(Debug, Clone, Serialize)]
pub struct HostStatus {
    /// The host's name.
    pub name: String,
    /// Its address on the lab's network.
    pub ip: String,
    /// Its namespaces are there.
    pub up: bool,
    /// libvirtd runs.
    pub libvirtd: bool,
    /// The agent runs.
    pub agent: bool,
    /// How many QEMU processes run.
    pub guests: usize,
}

pub(super) fn look(layout: &Layout, hosts: &[Host], has_dalgu: bool) -> Status {
    let runs = |name: &str| process::running(layout, name).is_some();
    Status {
        dir: layout.dir().display().to_string(),
        controller: runs(CONTROLLER).then(|| layout.controller_address()),
        hosts: hosts
            .iter()
            .map(|host| HostStatus {
                name: host.name.clone(),
                ip: host.ip.clone(),
                up: runs(&host.anchor()),
                libvirtd: runs(&host.libvirtd()),
                agent: runs(&host.agent()),
                guests: process::guests(host),
            })
            .collect(),
        has_dalgu,
    }
}

impl fmt::Display for Status {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |runs: bool| if runs { "runs" } else { "-" };
        writeln!(out, "lab in {} (logs in {0}/log)", self.dir)?;
        if self.has_dalgu {
            writeln!(out, "controller: {}", self.controller.as_deref().unwrap_or("-"))?;
        }
        writeln!(
            out,
            "{:<6}{:<14}{:<6}{:<10}{:<8}GUESTS",
            "HOST", "ADDRESS", "UP", "LIBVIRTD", "AGENT"
        )?;
        for host in &self.hosts {
            let up = if host.up { "yes" } else { "no" };
            let (libvirtd, agent) = (word(host.libvirtd), word(host.agent));
            writeln!(
                out,
                "{:<6}{:<14}{up:<6}{libvirtd:<10}{agent:<8}{}",
                host.name, host.ip, host.guests
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_daemon_shows_as_a_dash() {
        let host = HostStatus {
            name: "h1".to_owned(),
            ip: "10.77.0.11".to_owned(),
            up: true,
            libvirtd: true,
            agent: false,
            guests: 2,
        };
        let status = Status {
            dir: "/lab".to_owned(),
            controller: None,
            hosts: vec![host],
            has_dalgu: true,
        };
        let text = status.to_string();
        assert!(text.contains("controller: -\n"), "{text}");
        assert!(
            text.ends_with("h1    10.77.0.11    yes   runs      -       2\n"),
            "{text}"
        );
    }
}
