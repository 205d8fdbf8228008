//! A machine beside the hosts: a network namespace with a cable into the bridge that one of them has for a network of the site.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use dalgu_agent::network::names;

use crate::lab::{Lab, run};

static MACHINES: AtomicUsize = AtomicUsize::new(0);

/// See the module. It goes when it is dropped.
pub struct Machine {
    namespace: String,
    /// The host's end of its cable.
    cable: String,
}

impl Machine {
    /// One that has no cable yet.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let id = lab.layout().id();
        let machine = Self {
            namespace: format!("dalgu-beside-{id}-{number}"),
            cable: format!("beside{id}-{number}"),
        };
        // One that was killed may have left its own.
        machine.remove();
        machine
    }

    /// Name of its network namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Plugs it into the bridge of a network on a host that has a VM in it, with these addresses, each with its prefix.
    ///
    /// # Errors
    /// If the host has no such bridge.
    pub async fn join(
        &self,
        lab: &Lab,
        network: &str,
        host: u8,
        mac: &str,
        addresses: &[&str],
    ) -> anyhow::Result<()> {
        let bridge = names::bridge(&network.parse()?);
        let place = format!("-n {} ", lab.layout().host(host).namespace);
        self.plug(&place, &bridge, mac, addresses).await
    }

    /// Plugs it into what the hosts' own bridges `br0` lead to.
    ///
    /// # Errors
    /// If the lab is not up.
    pub async fn join_site(&self, lab: &Lab, mac: &str, addresses: &[&str]) -> anyhow::Result<()> {
        self.plug("", &lab.layout().guest_bridge(), mac, addresses).await
    }

    async fn plug(&self, place: &str, bridge: &str, mac: &str, addresses: &[&str]) -> anyhow::Result<()> {
        let (namespace, cable) = (&self.namespace, &self.cable);
        let mut lines = vec![
            format!("ip netns add {namespace}"),
            format!("ip -n {namespace} link set lo up"),
            format!("ip {place}link add {cable} type veth peer name eth0 netns {namespace}"),
            format!("ip {place}link set {cable} master {bridge} up"),
            format!("ip -n {namespace} link set eth0 address {mac} mtu 1450"),
        ];
        // An IPv6 address serves at once, without being looked for first.
        let flags = |address: &str| if address.contains(':') { " nodad" } else { "" };
        lines.extend(addresses.iter().map(|address| {
            format!(
                "ip -n {namespace} address add {address} dev eth0{}",
                flags(address)
            )
        }));
        lines.push(format!("ip -n {namespace} link set eth0 up"));
        for line in lines {
            let (program, words) = line.split_once(' ').context("a line")?;
            run(program, words.split(' ')).await?;
        }
        // So that it may ask by ICMP without privileges, as a datagram.
        let groups = "net.ipv4.ping_group_range=0 0";
        run("ip", ["netns", "exec", namespace, "sysctl", "-q", "-w", groups]).await?;
        Ok(())
    }

    /// Runs a command there and returns what it printed.
    ///
    /// # Errors
    /// If it fails.
    pub async fn run(&self, command: &[&str]) -> anyhow::Result<String> {
        let words = ["netns", "exec", self.namespace.as_str()];
        run("ip", words.iter().chain(command)).await
    }

    /// The cable goes with either of its ends.
    fn remove(&self) {
        // It may not be there.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.namespace])
            .stderr(Stdio::null())
            .status();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.remove();
    }
}
