//! A network with a group, VMs in it, and a machine beside them: it has a cable into the network's bridge on one of the hosts.

use std::iter::zip;
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use dalgu_agent::network::names;
use serde_json::json;

use super::beside::Machine;
use super::heard::Heard;
use super::probe::Probe;
use crate::e2e::words::{self, dalgu, end_of};
use crate::e2e::{BOOT_LIMIT, REST_LIMIT, grpcurl, story};
use crate::lab::{Lab, guest, wait_for};

/// The network.
pub const NETWORK: &str = "app";
/// Last part of the probe's address.
const PROBE: u8 = 200;

/// The MAC address of the interface whose IPv4 address ends so.
#[must_use]
pub fn mac(last: u8) -> String {
    format!("52:54:00:00:20:{last:02x}")
}

/// See the module's documentation.
pub struct Site<'a> {
    lab: &'a Lab,
    machine: Machine,
}

impl<'a> Site<'a> {
    /// Makes the network, and a group that lets in what guests answer: ICMP, and TCP and UDP to port 7.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        let site = Self {
            lab,
            machine: Machine::new(lab),
        };
        let network = ["network", "create", NETWORK, "--overlay"];
        let subnets = ["--ipv4", "10.20.0.0/24,gateway=10.20.0.1", "--ipv6", "fd20::/64"];
        dalgu(lab, &[&network[..], &subnets].concat()).await?;
        let rules = ["ingress,tcp,7", "ingress,udp,7", "ingress,icmp"];
        let rules = rules.iter().flat_map(|rule| ["--rule", rule]);
        let group: Vec<_> = ["security-group", "create", "web"]
            .into_iter()
            .chain(rules)
            .collect();
        dalgu(lab, &group).await?;
        Ok(site)
    }

    /// Plugs the probe into the network's bridge on a host that has a VM in it.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn join(&self, host: u8) -> anyhow::Result<()> {
        let (ipv4, ipv6) = (format!("10.20.0.{PROBE}/24"), format!("fd20::{PROBE:x}/64"));
        self.machine
            .join(self.lab, NETWORK, host, &mac(PROBE), &[&ipv4, &ipv6])
            .await
    }

    /// Waits until a host's filters let TCP to port 7 in, or do not.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn tcp_is_let_in(&self, host: u8, wanted: bool) -> anyhow::Result<()> {
        self.connections_know(host, "meta l4proto tcp ct original proto-dst 7 ", wanted)
            .await
    }

    /// Waits until a host's rules about connections hold a text, or do not.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn connections_know(&self, host: u8, text: &str, wanted: bool) -> anyhow::Result<()> {
        let mut last = String::new();
        let waited = wait_for("the filters to follow the rules", REST_LIMIT, async || {
            let table = ["nft", "list", "table", "inet", "dalgu"];
            last = self.lab.exec(host, &table).await.unwrap_or_default();
            !last.is_empty() && last.contains(text) == wanted
        });
        waited
            .await
            .with_context(|| format!("{text:?} in h{host}'s {last}"))
    }

    /// Waits until a host's filters have limits in the chains that begin with these, and in no others.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn limits(&self, host: u8, wanted: &[&str]) -> anyhow::Result<()> {
        wait_for("the filters to follow the limits", REST_LIMIT, async || {
            let table = ["nft", "list", "table", "bridge", "dalgu"];
            let Ok(table) = self.lab.exec(host, &table).await else {
                return false;
            };
            let chains = table.split("chain ").skip(1);
            let limited = Vec::from_iter(chains.filter(|chain| chain.contains("limit rate over")));
            limited.len() == wanted.len()
                && zip(limited, wanted).all(|(chain, wanted)| chain.starts_with(wanted))
        })
        .await
    }

    /// Waits until hosts have nothing of the network any more.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn is_gone_from(&self, hosts: std::ops::RangeInclusive<u8>) -> anyhow::Result<()> {
        for host in hosts {
            wait_for("networks to be gone", REST_LIMIT, async || {
                let links = self.lab.exec(host, &["ip", "-o", "link"]).await;
                let ours = [names::BRIDGE, names::VXLAN, names::SERVICE, names::TAP];
                links.is_ok_and(|links| !ours.iter().any(|prefix| links.contains(&format!(" {prefix}"))))
            })
            .await?;
        }
        Ok(())
    }

    /// Waits until a host has the links of this network and of one VM in it, its DHCP and DNS, and none of another.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn has_only(&self, host: u8) -> anyhow::Result<()> {
        // It is in a network namespace of its own, and in the host's others.
        let services = "for p in $(grep -slx dnsmasq /proc/[0-9]*/comm); do p=${p%/comm}; \
                        [ \"$(readlink $p/ns/uts)\" = \"$(readlink /proc/self/ns/uts)\" ] && echo $p; done; true";
        let mut last = String::new();
        let waited = wait_for("other networks to be gone", REST_LIMIT, async || {
            let links = self
                .lab
                .exec(host, &["ip", "-o", "link"])
                .await
                .unwrap_or_default();
            let name = |line: &str| line.split_whitespace().nth(1).unwrap_or_default().to_owned();
            let count = |prefix: &str| {
                links
                    .lines()
                    .filter(|line| name(line).starts_with(prefix))
                    .count()
            };
            let services = self.lab.exec(host, &["sh", "-c", services]).await;
            let services = services.unwrap_or_default().lines().count();
            let table = ["nft", "list", "table", "inet", "dalgu"];
            let table = self.lab.exec(host, &table).await.unwrap_or_default();
            last = format!(
                "{services} dnsmasq, 10.30.0.: {}, {links}",
                table.contains("10.30.0.")
            );
            [names::BRIDGE, names::VXLAN, names::TAP, names::SERVICE].map(count) == [1, 1, 1, 1]
                && services == 1
                && !table.contains("10.30.0.")
        });
        waited.await.with_context(|| last.clone())
    }

    /// Begins to make a VM with an interface in the overlay; answers the operation.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn begin(
        &self,
        name: &str,
        last: u8,
        host: &str,
        groups: &[&str],
        more: &str,
    ) -> anyhow::Result<String> {
        let spec = json!({
            "vcpus": 1, "memoryMib": 96,
            "disks": [{ "name": "root", "sizeMib": 8 }],
            "nics": [{
                "name": "eth0", "network": NETWORK, "mac": mac(last), "ipv4Address": format!("10.20.0.{last}"),
                "ipv6Address": format!("fd20::{last:x}"),
                "securityGroups": groups,
            }],
            "kernelBoot": {
                "kernel": guest::KERNEL, "initrd": guest::INITRD,
                "cmdline": format!("{} dalgu.net {more}", guest::CMDLINE),
            },
        });
        let body = json!({ "vm": { "name": name, "spec": spec }, "host": host }).to_string();
        let operation = grpcurl::call(self.lab, "VmService/CreateVm", &body).await?;
        let operation = operation.get("operation").unwrap_or(&operation);
        let id = operation["id"].as_str().or_else(|| operation["name"].as_str());
        Ok(id.context("no operation")?.to_owned())
    }

    /// Makes a VM with an interface in the overlay.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn create(
        &self,
        name: &str,
        last: u8,
        host: &str,
        groups: &[&str],
        more: &str,
    ) -> anyhow::Result<()> {
        let id = self.begin(name, last, host, groups, more).await?;
        let ended = end_of(self.lab, &id, BOOT_LIMIT).await?;
        ensure!(words::state_of(&ended) == "SUCCEEDED", "{ended}");
        Ok(())
    }

    /// The tap of a VM's interface, on the host that it is on.
    ///
    /// # Errors
    /// If there is no such VM.
    pub async fn tap(&self, name: &str) -> anyhow::Result<String> {
        Ok(names::tap(words::vm(self.lab, name).await?.uid.parse()?, "eth0"))
    }

    /// Makes a VM that is off: its host keeps the network, and a probe there its way into it.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn keep_on(&self, host: &str) -> anyhow::Result<()> {
        let nic = format!("eth1,network={NETWORK},ip=10.20.0.10");
        let words = words::create(
            "desk",
            words::LOCAL,
            &["--host", host, "--stopped", "--nic", &nic],
        );
        dalgu(self.lab, &words).await.map(drop)
    }

    /// What a guest has said on the host that it is on.
    ///
    /// # Errors
    /// If there is no such VM.
    pub async fn said(&self, name: &str) -> anyhow::Result<String> {
        let vm = words::vm(self.lab, name).await?;
        Ok(std::fs::read_to_string(story::file(self.lab, vm.host_number()?, &vm.uid)).unwrap_or_default())
    }

    /// Waits until a guest has said something.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn says(&self, name: &str, what: &str) -> anyhow::Result<()> {
        let waited = wait_for(what, BOOT_LIMIT, async || {
            self.said(name).await.is_ok_and(|said| said.contains(what))
        });
        match waited.await {
            Ok(()) => Ok(()),
            Err(error) => {
                let said = self.said(name).await.unwrap_or_default();
                let lines: Vec<_> = said.lines().filter(|line| !line.contains("tick ")).collect();
                Err(error.context(format!("{name} said {lines:?}")))
            }
        }
    }

    /// Whether a guest says something once more.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn heard_again(&self, name: &str, what: &str) -> anyhow::Result<bool> {
        let before = self.said(name).await?.matches(what).count();
        let more = wait_for(what, BOOT_LIMIT, async || {
            self.said(name)
                .await
                .is_ok_and(|said| said.matches(what).count() > before)
        });
        Ok(more.await.is_ok())
    }

    /// The machine beside the hosts.
    #[must_use]
    pub fn probe(&self) -> Probe {
        Probe::new(self.machine.namespace())
    }

    /// Waits until a guest answers the machine beside the hosts over IPv6.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn hears_over_ipv6(&self, last: u8) -> anyhow::Result<()> {
        let guest = format!("fd20::{last:x}");
        let ping = ["busybox", "ping6", "-c", "1", "-W", "1", &guest];
        wait_for("an answer over IPv6", BOOT_LIMIT, async || {
            self.machine.run(&ping).await.is_ok()
        })
        .await
    }

    /// Has the machine beside the hosts ask for an IPv6 address of the network, until what is returned is dropped.
    ///
    /// # Errors
    /// If it does not come to that.
    pub fn ask_over_ipv6(&self, last: u8) -> anyhow::Result<tokio::process::Child> {
        let guest = format!("fd20::{last:x}");
        let words = [
            "netns",
            "exec",
            self.machine.namespace(),
            "busybox",
            "ping6",
            &guest,
        ];
        let mut command = tokio::process::Command::new("ip");
        command.args(words).stdout(Stdio::null()).kill_on_drop(true);
        Ok(command.spawn()?)
    }

    /// Everything that reaches the machine beside the hosts from now on.
    ///
    /// # Errors
    /// If it does not come to that.
    pub async fn listen(&self) -> anyhow::Result<Heard> {
        Heard::new(self.machine.namespace()).await
    }
}
