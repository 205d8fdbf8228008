//! A small controller of networks for a lab: it tells agents what the real one would, and makes VMs with interfaces in an overlay.

use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, ensure};
use dalgu_tests::e2e::words::{self, end_of};
use dalgu_tests::e2e::{BOOT_LIMIT, grpcurl, story};
use dalgu_tests::lab::{Lab, guest, run, wait_for};
use serde_json::{Value, json};
use tokio::process::Command;

use super::probe::{Heard, Probe};

/// The overlay's identifier.
pub const VNI: u32 = 42;
/// Last part of the probe's addresses.
pub const PROBE: u8 = 200;

static LISTENERS: AtomicUsize = AtomicUsize::new(0);

/// The MAC address of the interface whose IPv4 address ends so.
pub fn mac(last: u8) -> String {
    format!("52:54:00:00:20:{last:02x}")
}

/// See the module's documentation.
pub struct Site<'a> {
    lab: &'a Lab,
    /// The namespace of the probe: a machine on the hosts' network, which has a part in the overlay.
    namespace: String,
}

impl<'a> Site<'a> {
    pub async fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        let number = LISTENERS.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("dalgu-probe-{}-{number}", lab.layout().id());
        let site = Self { lab, namespace };
        site.remove();
        site.join().await?;
        Ok(site)
    }

    fn hosts(&self) -> Vec<String> {
        self.lab.hosts().iter().map(|host| host.ip.clone()).collect()
    }

    fn probe_ip(&self) -> String {
        format!("{}.{PROBE}", self.lab.layout().network())
    }

    /// Puts the probe on the hosts' network, and into the overlay.
    async fn join(&self) -> anyhow::Result<()> {
        let (namespace, own, bridge) = (&self.namespace, self.probe_ip(), self.lab.layout().bridge());
        let outer = format!("dgprobe{}", self.lab.layout().id());
        let mac = mac(PROBE);
        let mut lines = vec![
            format!("ip netns add {namespace}"),
            format!("ip link add {outer} type veth peer name eth0 netns {namespace}"),
            format!("ip link set {outer} master {bridge} up"),
            format!("ip -n {namespace} link set lo up"),
            format!("ip -n {namespace} address add {own}/24 dev eth0"),
            format!("ip -n {namespace} link set eth0 up"),
            format!(
                "ip -n {namespace} link add vx address {mac} mtu 1450 type vxlan id {VNI} local {own} dstport 4789"
            ),
            format!("ip -n {namespace} address add 10.20.0.{PROBE}/24 dev vx"),
            format!("ip -n {namespace} link set vx up"),
        ];
        for host in self.hosts() {
            lines.push(format!(
                "bridge -n {namespace} fdb append 00:00:00:00:00:00 dev vx dst {host}"
            ));
        }
        // So that it may ask by ICMP without privileges, as a datagram.
        let groups = "net.ipv4.ping_group_range=0 0";
        let allowed = ["netns", "exec", namespace, "sysctl", "-q", "-w", groups];
        for line in lines {
            let (program, words) = line.split_once(' ').context("a line")?;
            run(program, words.split(' ')).await?;
        }
        run("ip", allowed).await?;
        Ok(())
    }

    fn remove(&self) {
        let outer = format!("dgprobe{}", self.lab.layout().id());
        for words in [
            vec!["link", "del", outer.as_str()],
            vec!["netns", "del", self.namespace.as_str()],
        ] {
            // It may not be there.
            let _ = std::process::Command::new("ip")
                .args(words)
                .stderr(Stdio::null())
                .status();
        }
    }

    /// What a host is told: everything.
    pub fn document(&self, version: u64) -> Value {
        let interface = |vm: &str, last: u8, groups: &[&str]| {
            json!({
                "vm": vm, "nic": "eth0", "mac": mac(last), "ipv4Address": format!("10.20.0.{last}"),
                "securityGroups": groups,
            })
        };
        let open = |protocol: &str| json!({ "direction": "DIRECTION_INGRESS", "protocol": protocol, "firstPort": 7 });
        let mut peers = self.hosts();
        peers.push(self.probe_ip());
        let network = json!({
            "name": "app", "overlay": { "vni": VNI },
            "ipv4": { "cidr": "10.20.0.0/24", "gateway": "10.20.0.1" },
        });
        json!({
            "version": version,
            "networks": [{
                "network": network,
                "peers": peers,
                "interfaces": [interface("desk", 10, &[]), interface("probe", PROBE, &[]), interface("web", 11, &["web"])],
            }],
            "securityGroups": [{
                "name": "web",
                "rules": [open("PROTOCOL_TCP"), open("PROTOCOL_UDP"), {
                    "direction": "DIRECTION_INGRESS", "protocol": "PROTOCOL_ICMP",
                }],
            }],
        })
    }

    /// What a host is told that has no VMs in networks.
    #[expect(clippy::unused_self, reason = "beside the other document")]
    pub fn empty(&self, version: u64) -> Value {
        json!({ "version": version })
    }

    /// Tells a host, as its controller.
    pub async fn tell(&self, host: u8, networks: &Value) -> anyhow::Result<()> {
        let host = self.lab.layout().host(host);
        let ledger = host.outside("/var/lib/dalgu/agent/ledger/host.json");
        let ledger: Value = serde_json::from_str(&std::fs::read_to_string(&ledger)?)?;
        let context = json!({
            "clusterId": ledger["cluster"], "term": ledger["term"], "session": ledger["session"],
            "host": host.name, "controllerRunId": ledger["run"],
        });
        let body = json!({ "context": context, "networks": networks }).to_string();
        let (layout, identity) = (self.lab.layout(), self.lab.layout().controller_data());
        let output = Command::new(layout.tools_dir().join("bin/grpcurl"))
            .arg("-cacert")
            .arg(identity.join("ca.pem"))
            .arg("-cert")
            .arg(identity.join("controller.pem"))
            .arg("-key")
            .arg(identity.join("controller.key"))
            .args(["-format-error", "-d", &body, &host.agent_address()])
            .arg("dalgu.agent.v1.AgentNetworkService/ApplyNetworks")
            .output()
            .await?;
        ensure!(
            output.status.success(),
            "{} is told: {}",
            host.name,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Begins to make a VM with an interface in the overlay; answers the operation.
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
                "name": "eth0", "network": "app", "mac": mac(last), "ipv4Address": format!("10.20.0.{last}"),
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

    async fn said(&self, name: &str) -> anyhow::Result<String> {
        let vm = words::vm(self.lab, name).await?;
        Ok(std::fs::read_to_string(story::file(self.lab, vm.host_number()?, &vm.uid)).unwrap_or_default())
    }

    /// Waits until a guest has said something.
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
    pub async fn probe(&self) -> anyhow::Result<Probe> {
        Probe::new(&self.namespace).await
    }

    /// Everything that reaches the machine beside the hosts from now on.
    pub async fn listen(&self) -> anyhow::Result<Heard> {
        Heard::new(&self.namespace).await
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}
