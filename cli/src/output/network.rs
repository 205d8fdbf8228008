//! What networks, security groups and interfaces look like in tables and on their own pages. Pure.

use std::borrow::Cow;

use dalgu_proto::{
    network::IcmpType,
    v1::{self, network::Kind, security_rule::Remote},
};
use jiff::Timestamp;

use super::{Cell, Resource, human};

/// The addresses of an interface, of both families.
pub fn addresses(ipv4: &str, ipv6: &str) -> String {
    let given = [ipv4, ipv6].into_iter().filter(|address| !address.is_empty());
    given.collect::<Vec<_>>().join(", ")
}

fn kind(network: &v1::Network) -> String {
    match &network.kind {
        None => "unknown".to_owned(),
        Some(Kind::Overlay(overlay)) => format!("overlay, VNI {}", overlay.vni),
        Some(Kind::Bridge(bridge)) if bridge.vlan == 0 => format!("bridge {}", bridge.bridge),
        Some(Kind::Bridge(bridge)) => format!("bridge {}, VLAN {}", bridge.bridge, bridge.vlan),
    }
}

fn cidr(subnet: Option<&v1::Subnet>) -> String {
    subnet.map_or_else(|| "-".to_owned(), |subnet| human::or_dash(&subnet.cidr))
}

fn describe_subnet(page: &mut human::Page, family: &str, subnet: Option<&v1::Subnet>) {
    let Some(subnet) = subnet else { return };
    page.section(family)
        .line("Addresses", &subnet.cidr)
        .line_if("Gateway", &subnet.gateway)
        .line("Given", format!("{} to {}", subnet.first, subnet.last));
    if subnet.no_dhcp {
        page.line("DHCP and DNS", "none: guests set their addresses themselves");
    } else {
        page.line("DHCP and DNS", &subnet.service_address);
    }
}

impl Resource for v1::Network {
    const MESSAGE: &'static str = "dalgu.v1.Network";
    const PLURAL: &'static str = "networks";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "NAME",
            "KIND",
            "IPV4",
            "IPV6",
            "INTERFACES",
            "AGE",
            "MTU",
            "DOMAIN",
            "LABELS",
        ];
        if wide { ALL } else { &ALL[..6] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let mut row = vec![
            self.name.clone(),
            kind(self),
            cidr(self.ipv4.as_ref()),
            cidr(self.ipv6.as_ref()),
            self.interfaces.to_string(),
            human::age(self.create_time.as_ref(), now),
        ];
        if wide {
            row.push(self.mtu.to_string());
            row.push(human::or_dash(&self.domain));
            row.push(human::labels(&self.labels));
        }
        row.into_iter().map(Cell::plain).collect()
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("Kind", kind(self))
            .line("MTU", self.mtu.to_string())
            .line("Interfaces", self.interfaces.to_string())
            .line("Domain", human::or_dash(&self.domain))
            .line("DNS servers", human::or_dash(&self.dns_servers.join(", ")))
            .line_if("Description", &self.description)
            .line("Labels", human::labels(&self.labels));
        page.line("Created", human::clock_and_age(self.create_time.as_ref(), now))
            .line("UID", human::or_dash(&self.uid))
            .line("ETag", human::or_dash(&self.etag));
        describe_subnet(&mut page, "IPv4", self.ipv4.as_ref());
        describe_subnet(&mut page, "IPv6", self.ipv6.as_ref());
        page
    }
}

fn ports(rule: &v1::SecurityRule) -> String {
    match (rule.first_port, rule.last_port) {
        (0, _) => "all".to_owned(),
        (first, last) if last == first || last == 0 => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

/// Which type of ICMP a rule is about, if it is about one.
fn icmp_type(protocol: v1::Protocol) -> Option<IcmpType> {
    IcmpType::ALL
        .into_iter()
        .find(|kind| v1::Protocol::from(*kind) == protocol)
}

/// What a rule lets through, in words.
pub fn rule_words(rule: &v1::SecurityRule) -> [String; 4] {
    use v1::Protocol as P;
    let protocol = match P::try_from(rule.protocol) {
        Ok(P::Unspecified) => "any".to_owned(),
        Ok(known) if icmp_type(known).is_some() => "icmp".to_owned(),
        _ => human::value::<P>(rule.protocol).to_ascii_lowercase(),
    };
    let ports = match P::try_from(rule.protocol) {
        Ok(P::Tcp | P::Udp) => ports(rule),
        Ok(known) => icmp_type(known).map_or_else(|| "-".to_owned(), |kind| kind.to_string()),
        Err(_) => "-".to_owned(),
    };
    let with = match &rule.remote {
        None => "everybody".to_owned(),
        Some(Remote::Cidr(cidr)) => cidr.clone(),
        Some(Remote::Group(group)) => format!("group {group}"),
    };
    let direction = human::value::<v1::Direction>(rule.direction).to_ascii_lowercase();
    [direction, protocol, ports, with]
}

fn rule_row(rule: &v1::SecurityRule) -> Vec<Cell> {
    let description = human::or_dash(&rule.description);
    let row = rule_words(rule).into_iter().chain([description]);
    row.map(Cell::plain).collect()
}

impl Resource for v1::SecurityGroup {
    const MESSAGE: &'static str = "dalgu.v1.SecurityGroup";
    const PLURAL: &'static str = "security groups";

    fn key(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn columns(wide: bool) -> &'static [&'static str] {
        const ALL: &[&str] = &["NAME", "RULES", "INTERFACES", "AGE", "DESCRIPTION", "LABELS"];
        if wide { ALL } else { &ALL[..4] }
    }

    fn row(&self, wide: bool, now: Timestamp) -> Vec<Cell> {
        let mut row = vec![
            self.name.clone(),
            self.rules.len().to_string(),
            self.interfaces.to_string(),
            human::age(self.create_time.as_ref(), now),
        ];
        if wide {
            row.push(human::or_dash(&self.description));
            row.push(human::labels(&self.labels));
        }
        row.into_iter().map(Cell::plain).collect()
    }

    fn describe(&self, now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("Name", &self.name)
            .line("Interfaces", self.interfaces.to_string())
            .line_if("Description", &self.description)
            .line("Labels", human::labels(&self.labels));
        page.line("Created", human::clock_and_age(self.create_time.as_ref(), now))
            .line("UID", human::or_dash(&self.uid))
            .line("ETag", human::or_dash(&self.etag));
        let rules = self.rules.iter().map(rule_row).collect();
        page.table(
            "Rules",
            &["DIRECTION", "PROTOCOL", "PORTS OR TYPE", "WITH", "DESCRIPTION"],
            rules,
        );
        page
    }
}

impl Resource for v1::NetworkInterface {
    const MESSAGE: &'static str = "dalgu.v1.NetworkInterface";
    const PLURAL: &'static str = "interfaces";

    fn key(&self) -> Cow<'_, str> {
        Cow::Owned(format!("{}/{}", self.vm, self.nic))
    }

    fn columns(_wide: bool) -> &'static [&'static str] {
        &["VM", "NIC", "IPV4", "IPV6", "MAC", "GROUPS", "HOST"]
    }

    fn row(&self, _wide: bool, _now: Timestamp) -> Vec<Cell> {
        [
            self.vm.clone(),
            self.nic.clone(),
            human::or_dash(&self.ipv4_address),
            human::or_dash(&self.ipv6_address),
            human::or_dash(&self.mac),
            human::or_dash(&self.security_groups.join(",")),
            human::or_dash(&self.host),
        ]
        .map(Cell::plain)
        .to_vec()
    }

    fn describe(&self, _now: Timestamp) -> human::Page {
        let mut page = human::Page::default();
        page.line("VM", &self.vm)
            .line("Name", &self.nic)
            .line(
                "Addresses",
                human::or_dash(&addresses(&self.ipv4_address, &self.ipv6_address)),
            )
            .line("MAC", human::or_dash(&self.mac))
            .line("Groups", human::or_dash(&self.security_groups.join(",")))
            .line("Host", human::or_dash(&self.host));
        page
    }
}
