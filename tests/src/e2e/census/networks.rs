//! What hosts have of networks of the site: every device, filter, way to another host, process and file of theirs, and whether a VM is
//! behind it; and the ports that are open there. Read from the kernel and the file systems; what should be there follows from the VMs alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Context as _;
use dalgu_agent::network::names;
use dalgu_proto::ids::NetworkName;
use serde_json::Value;

use super::{Vm, difference, filters, listed, number_at, text};
use crate::lab::Lab;
use crate::lab::layout::Host;

/// Everybody, in a forwarding table.
const ALL: &str = "00:00:00:00:00:00";

/// What a host shows, part after part. A network's `dnsmasq` is in a network namespace of its own and in the host's others.
const LOOK: &str = r#"
nft -jn list ruleset
echo @@; ip -json link show
echo @@; bridge -json fdb show
echo @@; for process in $(grep -slx dnsmasq /proc/[0-9]*/comm); do
    process=${process%/comm}
    [ "$(readlink $process/ns/uts)" = "$(readlink /proc/self/ns/uts)" ] &&
        tr '\0' '\n' <$process/cmdline | sed -n 's|^--conf-file=.*/\(.*\)/dnsmasq.conf$|\1|p'
done
echo @@; ss -Hlntu; ss -Hlx
echo @@; cd /run/dalgu/network 2>/dev/null && for network in *; do
    [ -d "$network" ] && { echo "$network"; sed "s|^|$network |" "$network/leases"; }
done
true"#;

/// An interface of a VM in a network.
pub(super) struct Port<'a> {
    vm: &'a Vm,
    pub(super) nic: &'a Value,
    pub(super) network: NetworkName,
}

impl Port<'_> {
    pub(super) fn tap(&self) -> anyhow::Result<String> {
        Ok(names::tap(self.vm.uid.parse()?, &text(self.nic, "/name")))
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let addresses = ["/ipv4Address", "/ipv6Address"].map(|field| text(self.nic, field));
        addresses.into_iter().filter_map(|address| address.parse().ok())
    }

    pub(super) fn has(&self, group: &str) -> bool {
        let groups = self.nic["securityGroups"].as_array().into_iter().flatten();
        groups.into_iter().any(|one| one == group)
    }

    /// As the host's DHCP has it.
    fn lease(&self) -> String {
        let addresses = self.addresses().map(|address| match address {
            IpAddr::V4(address) => format!(",{address}"),
            IpAddr::V6(address) => format!(",[{address}]"),
        });
        let addresses: String = addresses.collect();
        format!("{}{addresses},{}", text(self.nic, "/mac"), self.vm.name)
    }
}

/// What Dalgu tells of networks and security groups, by their names.
struct Told<'a> {
    networks: BTreeMap<String, &'a Value>,
    groups: BTreeMap<String, &'a Value>,
}

fn by_name(all: &[Value]) -> BTreeMap<String, &Value> {
    all.iter().map(|one| (text(one, "/name"), one)).collect()
}

/// What is wrong with the networks of all hosts. Without `plain`, interfaces in the hosts' own bridges are not counted: some are of
/// domains that are not Dalgu's.
pub(super) async fn wrong(lab: &Lab, vms: &[Vm], plain: bool) -> anyhow::Result<Vec<String>> {
    let mut ports = Vec::new();
    for vm in vms {
        for nic in vm.all["spec"]["nics"].as_array().into_iter().flatten() {
            if let Ok(network) = text(nic, "/network").parse() {
                ports.push(Port { vm, nic, network });
            }
        }
    }
    let (mut networks, mut groups) = (Vec::new(), Vec::new());
    if !ports.is_empty() {
        networks = listed(lab, &["network", "list"]).await?;
        groups = listed(lab, &["security-group", "list"]).await?;
    }
    let told = Told {
        networks: by_name(&networks),
        groups: by_name(&groups),
    };
    let mut found = Vec::new();
    for host in lab.hosts() {
        let mut wanted = wanted(lab, &host, &ports, &told)?;
        let seen = lab.exec(host.number, &["sh", "-c", LOOK]).await?;
        let mut seen = Seen::read(&seen, &host, &ports).with_context(|| format!("look at {}", host.name))?;
        if plain {
            let of_host = vms
                .iter()
                .filter(|vm| vm.host == host.name && vm.state != "STOPPED");
            let nics = of_host.flat_map(|vm| vm.all["spec"]["nics"].as_array().into_iter().flatten());
            let here = nics.filter(|nic| text(nic, "/network").is_empty()).count();
            wanted.insert(format!("{here} interfaces in its own bridges"));
            let there = seen.plain;
            seen.all.insert(format!("{there} interfaces in its own bridges"));
        }
        found.extend(difference(
            &format!("networks of {}", host.name),
            &seen.all,
            &wanted,
        ));
    }
    Ok(found)
}

/// What should be on a host.
fn wanted(lab: &Lab, host: &Host, ports: &[Port<'_>], told: &Told<'_>) -> anyhow::Result<BTreeSet<String>> {
    // The agent's port is the only one; what migrations and copies of disks need goes through it.
    let mut wanted = BTreeSet::from([format!("open: tcp {}", host.agent_address())]);
    let here: Vec<_> = ports.iter().filter(|port| port.vm.host == host.name).collect();
    for port in &here {
        let tap = port.tap()?;
        wanted.insert(format!("filters of {tap}"));
        wanted.extend(filters::wanted(port, &told.groups)?);
        if port.vm.state != "STOPPED" {
            wanted.insert(format!("device {tap}"));
        }
        for (field, way) in [("receive", "to"), ("send", "sent")] {
            if number_at(port.nic, &format!("/{field}LimitMbitPerSecond")) > 0 {
                wanted.insert(format!("limit in {way}-{tap}"));
            }
        }
    }
    let used: BTreeSet<_> = here.iter().map(|port| &port.network).collect();
    for name in used {
        let network = told
            .networks
            .get(name.as_str())
            .context("a VM's network is not there")?;
        let device = |prefix| names::device(prefix, name);
        let bridge = names::bridge(name);
        wanted.extend([format!("device {bridge}"), format!("zone of {bridge}")]);
        let uplink = match (network["overlay"].is_object(), number_at(network, "/bridge/vlan")) {
            (true, _) => device(names::VXLAN),
            (false, 0) => {
                wanted.insert(format!("device {}", device(names::HOST_SIDE)));
                device(names::UPLINK)
            }
            _ => device(names::VLAN),
        };
        wanted.extend([format!("device {uplink}"), format!("filters of {uplink}")]);
        if network["overlay"].is_object() {
            let vni = number_at(network, "/overlay/vni");
            wanted.insert(format!("senders of VNI {vni}"));
            wanted.insert("open: udp 0.0.0.0:4789".to_owned());
            let others = ports.iter().filter(|port| port.network == *name);
            let others = others
                .map(|port| &port.vm.host)
                .filter(|other| **other != host.name);
            for other in others.collect::<BTreeSet<_>>() {
                let other = lab.hosts().into_iter().find(|one| one.name == *other);
                let address = other.context("no such host")?.ip;
                wanted.insert(format!("{uplink} floods to {address}"));
                wanted.insert(format!("VNI {vni} from {address}"));
            }
        }
        let served = |family: &str| network[family].is_object() && network[family]["noDhcp"] != true;
        if served("ipv4") || served("ipv6") {
            wanted.insert(format!("device {}", device(names::SERVICE)));
            wanted.extend([format!("dnsmasq of {bridge}"), format!("files of {bridge}")]);
            let leases = here.iter().filter(|port| port.network == *name);
            wanted.extend(leases.map(|port| format!("lease {bridge} {}", port.lease())));
        }
    }
    Ok(wanted)
}

/// What is on a host, in the same words.
struct Seen {
    all: BTreeSet<String>,
    /// Interfaces of VMs in bridges of the host's own.
    plain: usize,
}

impl Seen {
    fn read(shown: &str, host: &Host, ports: &[Port<'_>]) -> anyhow::Result<Self> {
        let parts: Vec<_> = shown.split("@@\n").collect();
        let [rules, links, entries, services, sockets, files] = parts[..] else {
            anyhow::bail!("it shows {shown:?}");
        };
        let mut seen = Self {
            all: BTreeSet::new(),
            plain: 0,
        };
        seen.devices(&of(links)?);
        seen.entries(&of(entries)?);
        let rules = &of(rules)?["nftables"];
        seen.rules(rules, host, ports);
        seen.all.extend(filters::seen(rules));
        seen.sockets(sockets)?;
        for bridge in services.lines() {
            if !seen.all.insert(format!("dnsmasq of {bridge}")) {
                seen.all.insert(format!("dnsmasq of {bridge}, twice"));
            }
        }
        seen.all
            .extend(files.lines().map(|line| match line.contains(' ') {
                true => format!("lease {line}"),
                false => format!("files of {line}"),
            }));
        Ok(seen)
    }

    fn devices(&mut self, links: &Value) {
        let links = links.as_array().into_iter().flatten();
        for name in links.map(|link| text(link, "/ifname")) {
            if is_ours(&name) {
                self.all.insert(format!("device {name}"));
            } else if name.starts_with("dg") || name.starts_with("vnet") {
                // By Dalgu's name or by libvirt's.
                self.plain += 1;
            }
        }
    }

    fn entries(&mut self, entries: &Value) {
        let shown = || {
            let entries = entries.as_array().into_iter().flatten();
            let places = entries.map(|entry| ["/ifname", "/mac", "/dst"].map(|field| text(entry, field)));
            places.filter(|[device, _, to]| device.starts_with(names::VXLAN) && !to.is_empty())
        };
        for [device, mac, to] in shown() {
            let floods = format!("{device} floods to {to}");
            if mac == ALL {
                self.all.insert(floods);
            } else if !shown().any(|other| other == [device.clone(), ALL.to_owned(), to.clone()]) {
                self.all.insert(format!("{device} has learnt {mac} at {to}"));
            }
        }
    }

    /// Of sockets in the file system, those that are not libvirt's own.
    fn sockets(&mut self, sockets: &str) -> anyhow::Result<()> {
        for line in sockets.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let (kind, at) = (words.first(), words.get(4));
            let (kind, at) = kind.zip(at).with_context(|| format!("no socket: {line}"))?;
            let libvirts = ["/run/libvirt/", "/var/run/libvirt/", "/var/lib/libvirt/"];
            if !libvirts.iter().any(|place| at.starts_with(place)) {
                self.all.insert(format!("open: {kind} {at}"));
            }
        }
        Ok(())
    }

    fn rules(&mut self, rules: &Value, host: &Host, ports: &[Port<'_>]) {
        for item in rules.as_array().into_iter().flatten() {
            let (chain, set, rule) = (&item["chain"], &item["set"], &item["rule"]);
            if let Some((_, device)) = text(chain, "/name").split_once("-dg") {
                self.all.insert(format!("filters of dg{device}"));
            }
            if set["table"] == "dalgu" {
                self.group(set, ports);
            }
            if rule["table"] != "dalgu" {
                continue;
            }
            let mut words = Vec::new();
            strings(&rule["expr"], &mut words);
            let chain = text(rule, "/chain");
            match (text(rule, "/family").as_str(), chain.as_str()) {
                ("inet", "prerouting") => {
                    let bridges = words.iter().filter(|word| is_ours(word));
                    self.all.extend(bridges.map(|bridge| format!("zone of {bridge}")));
                }
                ("inet", "input") => {
                    let vni = vni(&rule["expr"]);
                    self.all.insert(format!("senders of VNI {vni}"));
                    let peers = words.iter().filter(|word| word.parse::<IpAddr>().is_ok());
                    let peers = peers.filter(|peer| **peer != host.ip);
                    self.all
                        .extend(peers.map(|peer| format!("VNI {vni} from {peer}")));
                }
                ("bridge", _) if holds(&rule["expr"], "limit") => {
                    self.all.insert(format!("limit in {chain}"));
                }
                _ => {}
            }
        }
    }

    /// The addresses of a group must be those of its members.
    fn group(&mut self, set: &Value, ports: &[Port<'_>]) {
        let name = text(set, "/name");
        let mut parts = name.trim_start_matches('g').split('/');
        let (family, network, group) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
        let members = ports.iter().filter(|port| Some(port.network.as_str()) == network);
        let members = members.filter(|port| port.has(group)).flat_map(Port::addresses);
        let members = members.filter(|address| address.is_ipv4() == (family == Some("4")));
        let members: BTreeSet<_> = members.map(|address| address.to_string()).collect();
        let mut there = Vec::new();
        strings(&set["elem"], &mut there);
        let there: BTreeSet<_> = there.into_iter().collect();
        if there != members {
            self.all
                .insert(format!("set {name} holds {there:?} and should hold {members:?}"));
        }
    }
}

fn of(shown: &str) -> anyhow::Result<Value> {
    match shown.trim() {
        "" => Ok(Value::Null),
        shown => serde_json::from_str(shown).with_context(|| format!("no JSON: {shown}")),
    }
}

/// Which overlay a rule is about: the 24 bits that it compares with where VXLAN has them. 0 where it compares none.
fn vni(rule: &Value) -> u64 {
    let mut matches = rule.as_array().into_iter().flatten().map(|part| &part["match"]);
    let vni = matches.find(|one| one["left"]["payload"]["len"] == 24);
    vni.map_or(0, |vni| number_at(vni, "/right"))
}

/// Whether a device bears a name of a network's or of an interface in one.
fn is_ours(name: &str) -> bool {
    let prefixes = [
        names::BRIDGE,
        names::VXLAN,
        names::UPLINK,
        names::HOST_SIDE,
        names::VLAN,
        names::SERVICE,
        names::TAP,
    ];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Every text in a value.
fn strings(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Array(all) => all.iter().for_each(|one| strings(one, found)),
        Value::Object(all) => all.values().for_each(|one| strings(one, found)),
        _ => {}
    }
}

/// Whether a value has a field of this name anywhere.
fn holds(value: &Value, field: &str) -> bool {
    match value {
        Value::Array(all) => all.iter().any(|one| holds(one, field)),
        Value::Object(all) => all.contains_key(field) || all.values().any(|one| holds(one, field)),
        _ => false,
    }
}
