//! Conversions between [`crate::network`] and the generated messages. From the wire they check and fill in defaults, and
//! name the field that does not hold; to the wire they are total, and leave out what is the controller's own.

use std::str::FromStr;

use super::*;
use crate::{
    ids,
    v1::{self, network, security_rule},
    vm::Invalid,
};

fn invalid(field: impl Into<String>, message: impl ToString) -> Invalid {
    Invalid {
        field: field.into(),
        message: message.to_string(),
    }
}

/// An empty text is `None`.
fn parse<T: FromStr>(field: &str, value: &str, what: &str) -> Result<Option<T>, Invalid> {
    if value.is_empty() {
        return Ok(None);
    }
    let parsed = value.parse().map(Some);
    parsed.map_err(|_| invalid(field, format!("{:?} is not {what}", ids::shorten(value))))
}

fn address(field: &str, value: &str) -> Result<Option<IpAddr>, Invalid> {
    parse(field, value, "an IP address")
}

impl TryFrom<v1::Network> for Network {
    type Error = Invalid;

    fn try_from(wire: v1::Network) -> Result<Self, Invalid> {
        let name: NetworkName = wire.name.parse().map_err(|error| invalid("name", error))?;
        let kind = wire
            .kind
            .ok_or_else(|| invalid("kind", "bridge or overlay must be given"))?;
        let kind = check_kind(kind)?;
        let usual = match kind {
            Kind::Bridge { .. } => 1500,
            Kind::Overlay { .. } => 1500 - OVERLAY_OVERHEAD,
        };
        let mtu = if wire.mtu == 0 { usual } else { wire.mtu };
        if !MTU.contains(&mtu) {
            let message = format!("must be {} to {}, got {mtu}", MTU.start(), MTU.end());
            return Err(invalid("mtu", message));
        }
        let ipv4 = wire
            .ipv4
            .map(|subnet| check_subnet("ipv4", &subnet, 8..=30))
            .transpose()?;
        let ipv6 = wire
            .ipv6
            .map(|subnet| check_subnet("ipv6", &subnet, 48..=126))
            .transpose()?;
        for (field, subnet, is_v4) in [("ipv4", &ipv4, true), ("ipv6", &ipv6, false)] {
            if subnet
                .as_ref()
                .is_some_and(|subnet| subnet.cidr.addr().is_ipv4() != is_v4)
            {
                return Err(invalid(format!("{field}.cidr"), "is of the other family"));
            }
        }
        let domain = if wire.domain.is_empty() {
            format!("{name}.internal")
        } else {
            check_domain(&wire.domain)?
        };
        if wire.dns_servers.len() > MAX_DNS_SERVERS {
            let message = format!(
                "at most {MAX_DNS_SERVERS} are allowed, got {}",
                wire.dns_servers.len()
            );
            return Err(invalid("dns_servers", message));
        }
        let servers = wire.dns_servers.iter().enumerate().map(|(index, server)| {
            let field = format!("dns_servers[{index}]");
            let server = address(&field, server)?;
            server
                .filter(|server| !server.is_unspecified() && !server.is_multicast())
                .ok_or_else(|| invalid(&field, "must be the address of a server"))
        });
        let dns_servers = servers.collect::<Result<_, _>>()?;
        Ok(Self {
            name,
            kind,
            mtu,
            ipv4,
            ipv6,
            domain,
            dns_servers,
        })
    }
}

fn check_kind(wire: network::Kind) -> Result<Kind, Invalid> {
    match wire {
        network::Kind::Bridge(wire) => {
            check_bridge(&wire.bridge).map_err(|message| invalid("bridge.bridge", message))?;
            let vlan = u16::try_from(wire.vlan)
                .ok()
                .filter(|vlan| *vlan <= MAX_VLAN)
                .ok_or_else(|| {
                    invalid(
                        "bridge.vlan",
                        format!("must be 0 to {MAX_VLAN}, got {}", wire.vlan),
                    )
                })?;
            Ok(Kind::Bridge {
                bridge: wire.bridge,
                vlan: Some(vlan).filter(|vlan| *vlan != 0),
            })
        }
        network::Kind::Overlay(wire) if wire.vni <= MAX_VNI => Ok(Kind::Overlay { vni: wire.vni }),
        network::Kind::Overlay(wire) => {
            let message = format!(
                "must be 1 to {MAX_VNI}, or 0 to have one chosen, got {}",
                wire.vni
            );
            Err(invalid("overlay.vni", message))
        }
    }
}

/// A Linux interface name: 1 to 15 bytes; the stricter file-name rule keeps out what the kernel would allow.
pub(crate) fn check_bridge(bridge: &str) -> Result<(), String> {
    if bridge.len() > 15 {
        return Err("must be at most 15 characters".to_owned());
    }
    ids::check_file_name(bridge).map_err(|error| error.to_string())
}

fn check_domain(value: &str) -> Result<String, Invalid> {
    const RULE: &str =
        "must be labels of 1 to 63 characters a-z, 0-9 and '-' with dots between, at most 190 characters";
    let label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if value.len() <= 190 && value.split('.').all(label) {
        return Ok(value.to_owned());
    }
    Err(invalid("domain", RULE))
}

fn check_subnet(
    field: &str,
    wire: &v1::Subnet,
    prefixes: std::ops::RangeInclusive<u8>,
) -> Result<Subnet, Invalid> {
    let at = |name: &str| format!("{field}.{name}");
    let cidr: IpNet = parse(
        &at("cidr"),
        &wire.cidr,
        "a subnet such as 10.20.0.0/16 or fd00:20::/64",
    )?
    .ok_or_else(|| invalid(at("cidr"), "must be given"))?;
    if !prefixes.contains(&cidr.prefix_len()) {
        let (least, most) = (prefixes.start(), prefixes.end());
        return Err(invalid(at("cidr"), format!("must be /{least} to /{most}")));
    }
    if cidr.trunc() != cidr {
        return Err(invalid(
            at("cidr"),
            format!("has bits beside the prefix: {} is meant?", cidr.trunc()),
        ));
    }
    let first = cidr.network();
    let link_local = match first {
        IpAddr::V4(first) => first.is_link_local(),
        IpAddr::V6(first) => first.is_unicast_link_local(),
    };
    if first.is_multicast() || first.is_loopback() || first.is_unspecified() || link_local {
        return Err(invalid(
            at("cidr"),
            "must not be multicast, loopback or link-local",
        ));
    }
    let inside = |name: &str, value: &str| {
        let address = address(&at(name), value)?;
        let outside = |address: &IpAddr| {
            !cidr.contains(address)
                || *address == cidr.network()
                || (cidr.addr().is_ipv4() && *address == cidr.broadcast())
        };
        if address.as_ref().is_some_and(outside) {
            return Err(invalid(
                at(name),
                format!("is no address for a machine in {cidr}"),
            ));
        }
        Ok(address)
    };
    let gateway = inside("gateway", &wire.gateway)?;
    let top = match cidr.broadcast() {
        IpAddr::V4(broadcast) => IpAddr::V4((u32::from(broadcast) - 1).into()),
        IpAddr::V6(last) => IpAddr::V6(last),
    };
    let bottom = match first {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network) + 1).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network) + 1).into()),
    };
    let service = inside("service_address", &wire.service_address)?.unwrap_or(top);
    if Some(service) == gateway {
        return Err(invalid(
            at("service_address"),
            "is the gateway's: name another of the subnet",
        ));
    }
    let first = inside("first", &wire.first)?.unwrap_or(bottom);
    let last = inside("last", &wire.last)?.unwrap_or(top);
    if first > last {
        return Err(invalid(at("last"), format!("comes before the first, {first}")));
    }
    Ok(Subnet {
        cidr,
        gateway,
        first,
        last,
        service,
        dhcp: !wire.no_dhcp,
    })
}

impl From<Network> for v1::Network {
    fn from(network: Network) -> Self {
        let kind = match network.kind {
            Kind::Bridge { bridge, vlan } => network::Kind::Bridge(v1::BridgeNetwork {
                bridge,
                vlan: vlan.unwrap_or_default().into(),
            }),
            Kind::Overlay { vni } => network::Kind::Overlay(v1::OverlayNetwork { vni }),
        };
        let subnet = |subnet: Subnet| v1::Subnet {
            cidr: subnet.cidr.to_string(),
            gateway: text(subnet.gateway),
            first: subnet.first.to_string(),
            last: subnet.last.to_string(),
            service_address: subnet.service.to_string(),
            no_dhcp: !subnet.dhcp,
        };
        Self {
            name: network.name.into(),
            kind: Some(kind),
            mtu: network.mtu,
            ipv4: network.ipv4.map(subnet),
            ipv6: network.ipv6.map(subnet),
            domain: network.domain,
            dns_servers: network.dns_servers.iter().map(IpAddr::to_string).collect(),
            ..Self::default()
        }
    }
}

fn text(value: Option<impl ToString>) -> String {
    value.as_ref().map(ToString::to_string).unwrap_or_default()
}

/// Checks the part of a `dalgu.v1.Nic` that is for networks of the site; `None` where there is none.
pub(crate) fn check_port(at: &dyn Fn(&str) -> String, wire: &v1::Nic) -> Result<Option<Port>, Invalid> {
    let limit = |name: &str, value: u32| match value {
        0 => Ok(None),
        1..=1_000_000 => Ok(Some(value)),
        _ => Err(invalid(at(name), format!("must be 0 to 1000000, got {value}"))),
    };
    if wire.network.is_empty() {
        let given = [
            ("ipv4_address", !wire.ipv4_address.is_empty()),
            ("ipv6_address", !wire.ipv6_address.is_empty()),
            ("security_groups", !wire.security_groups.is_empty()),
            (
                "receive_limit_mbit_per_second",
                wire.receive_limit_mbit_per_second != 0,
            ),
            ("send_limit_mbit_per_second", wire.send_limit_mbit_per_second != 0),
        ];
        return match given.into_iter().find(|(_, given)| *given) {
            Some((name, _)) => Err(invalid(
                at(name),
                "is for an interface in a network of the site: give `network`",
            )),
            None => Ok(None),
        };
    }
    if wire.security_groups.len() > MAX_GROUPS {
        let message = format!(
            "at most {MAX_GROUPS} are allowed, got {}",
            wire.security_groups.len()
        );
        return Err(invalid(at("security_groups"), message));
    }
    let groups = groups(&at("security_groups"), &wire.security_groups)?;
    Ok(Some(Port {
        network: wire
            .network
            .parse()
            .map_err(|error| invalid(at("network"), error))?,
        ipv4: parse(&at("ipv4_address"), &wire.ipv4_address, "an IPv4 address")?,
        ipv6: parse(&at("ipv6_address"), &wire.ipv6_address, "an IPv6 address")?,
        groups,
        receive_limit_mbit: limit(
            "receive_limit_mbit_per_second",
            wire.receive_limit_mbit_per_second,
        )?,
        send_limit_mbit: limit("send_limit_mbit_per_second", wire.send_limit_mbit_per_second)?,
    }))
}

fn groups(field: &str, wire: &[String]) -> Result<BTreeSet<GroupName>, Invalid> {
    let names = wire.iter().map(|name| name.parse());
    names
        .collect::<Result<_, ids::Error>>()
        .map_err(|error| invalid(field, error))
}

/// Writes a port into its message.
pub(crate) fn port_to_wire(port: Port, wire: &mut v1::Nic) {
    wire.network = port.network.into();
    wire.ipv4_address = text(port.ipv4);
    wire.ipv6_address = text(port.ipv6);
    wire.security_groups = port.groups.into_iter().map(Into::into).collect();
    wire.receive_limit_mbit_per_second = port.receive_limit_mbit.unwrap_or_default();
    wire.send_limit_mbit_per_second = port.send_limit_mbit.unwrap_or_default();
}

impl TryFrom<v1::NetworkInterface> for Interface {
    type Error = Invalid;

    fn try_from(wire: v1::NetworkInterface) -> Result<Self, Invalid> {
        ids::check_device_name(&wire.nic).map_err(|error| invalid("nic", error))?;
        Ok(Self {
            vm: wire.vm.parse().map_err(|error| invalid("vm", error))?,
            nic: wire.nic,
            mac: crate::vm::check_mac(&wire.mac).map_err(|rule| invalid("mac", rule))?,
            ipv4: parse("ipv4_address", &wire.ipv4_address, "an IPv4 address")?,
            ipv6: parse("ipv6_address", &wire.ipv6_address, "an IPv6 address")?,
            groups: groups("security_groups", &wire.security_groups)?,
        })
    }
}

impl From<Interface> for v1::NetworkInterface {
    fn from(interface: Interface) -> Self {
        Self {
            vm: interface.vm.into(),
            nic: interface.nic,
            mac: interface.mac,
            ipv4_address: text(interface.ipv4),
            ipv6_address: text(interface.ipv6),
            security_groups: interface.groups.into_iter().map(Into::into).collect(),
            host: String::new(),
        }
    }
}

impl TryFrom<v1::SecurityGroup> for Group {
    type Error = Invalid;

    fn try_from(wire: v1::SecurityGroup) -> Result<Self, Invalid> {
        if wire.rules.len() > MAX_RULES {
            let message = format!("at most {MAX_RULES} are allowed, got {}", wire.rules.len());
            return Err(invalid("rules", message));
        }
        let rules = wire.rules.into_iter().enumerate();
        Ok(Self {
            name: wire.name.parse().map_err(|error| invalid("name", error))?,
            rules: rules
                .map(|(index, rule)| check_rule(index, rule))
                .collect::<Result<_, _>>()?,
        })
    }
}

fn check_rule(index: usize, wire: v1::SecurityRule) -> Result<Rule, Invalid> {
    let at = |name: &str| format!("rules[{index}].{name}");
    let direction = match v1::Direction::try_from(wire.direction) {
        Ok(v1::Direction::Ingress) => Direction::Ingress,
        Ok(v1::Direction::Egress) => Direction::Egress,
        Ok(v1::Direction::Unspecified) | Err(_) => {
            return Err(invalid(at("direction"), "must be INGRESS or EGRESS"));
        }
    };
    let ports = check_ports(&at, wire.first_port, wire.last_port)?;
    let protocol = match v1::Protocol::try_from(wire.protocol) {
        Ok(v1::Protocol::Tcp) => Protocol::Tcp(ports),
        Ok(v1::Protocol::Udp) => Protocol::Udp(ports),
        Ok(_) if ports.is_some() => {
            return Err(invalid(at("first_port"), "is for TCP and UDP only"));
        }
        Ok(v1::Protocol::Icmp) => Protocol::Icmp,
        Ok(v1::Protocol::IcmpEchoRequest) => Protocol::IcmpType(IcmpType::EchoRequest),
        Ok(v1::Protocol::IcmpTimestampRequest) => Protocol::IcmpType(IcmpType::TimestampRequest),
        Ok(v1::Protocol::IcmpInformationRequest) => Protocol::IcmpType(IcmpType::InformationRequest),
        Ok(v1::Protocol::IcmpAddressMaskRequest) => Protocol::IcmpType(IcmpType::AddressMaskRequest),
        Ok(v1::Protocol::IcmpNodeInformationQuery) => Protocol::IcmpType(IcmpType::NodeInformationQuery),
        Ok(v1::Protocol::Unspecified) => Protocol::Any,
        Err(_) => return Err(invalid(at("protocol"), "is not a value of Protocol")),
    };
    let remote = match wire.remote {
        None => Remote::Any,
        Some(security_rule::Remote::Cidr(cidr)) => Remote::Cidr(check_cidr(&at("cidr"), &cidr)?),
        Some(security_rule::Remote::Group(group)) => {
            Remote::Group(group.parse().map_err(|error| invalid(at("group"), error))?)
        }
    };
    if let (Protocol::IcmpType(kind), Remote::Cidr(cidr)) = (&protocol, &remote)
        && !kind.is_of(cidr.addr())
    {
        return Err(invalid(
            at("cidr"),
            format!("is of a family that does not have {kind}"),
        ));
    }
    if wire.description.chars().count() > 255 || wire.description.chars().any(char::is_control) {
        return Err(invalid(
            at("description"),
            "must be at most 255 characters on one line",
        ));
    }
    Ok(Rule {
        direction,
        protocol,
        remote,
        description: wire.description,
    })
}

fn check_ports(at: &dyn Fn(&str) -> String, first: u32, last: u32) -> Result<Option<(u16, u16)>, Invalid> {
    let last = if last == 0 { first } else { last };
    if first == 0 && last == 0 {
        return Ok(None);
    }
    match (u16::try_from(first), u16::try_from(last)) {
        (Ok(first), Ok(last)) if first >= 1 && first <= last => Ok(Some((first, last))),
        _ => Err(invalid(
            at("first_port"),
            format!("ports must be 1 to 65535, the first not above the last, got {first} to {last}"),
        )),
    }
}

/// A subnet, or one address.
fn check_cidr(field: &str, value: &str) -> Result<IpNet, Invalid> {
    const WHAT: &str = "an address or a subnet, such as 192.0.2.7 or 10.1.0.0/16";
    let cidr = match value.parse::<IpAddr>() {
        Ok(address) => Some(IpNet::from(address)),
        Err(_) => parse(field, value, WHAT)?,
    };
    let cidr = cidr.ok_or_else(|| invalid(field, format!("must be {WHAT}")))?;
    if cidr.trunc() != cidr {
        return Err(invalid(
            field,
            format!("has bits beside the prefix: {} is meant?", cidr.trunc()),
        ));
    }
    Ok(cidr)
}

impl From<IcmpType> for v1::Protocol {
    fn from(kind: IcmpType) -> Self {
        match kind {
            IcmpType::EchoRequest => Self::IcmpEchoRequest,
            IcmpType::TimestampRequest => Self::IcmpTimestampRequest,
            IcmpType::InformationRequest => Self::IcmpInformationRequest,
            IcmpType::AddressMaskRequest => Self::IcmpAddressMaskRequest,
            IcmpType::NodeInformationQuery => Self::IcmpNodeInformationQuery,
        }
    }
}

impl From<Group> for v1::SecurityGroup {
    fn from(group: Group) -> Self {
        Self {
            name: group.name.into(),
            rules: group.rules.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }
}

impl From<Rule> for v1::SecurityRule {
    fn from(rule: Rule) -> Self {
        let (protocol, ports) = match rule.protocol {
            Protocol::Any => (v1::Protocol::Unspecified, None),
            Protocol::Tcp(ports) => (v1::Protocol::Tcp, ports),
            Protocol::Udp(ports) => (v1::Protocol::Udp, ports),
            Protocol::Icmp => (v1::Protocol::Icmp, None),
            Protocol::IcmpType(kind) => (kind.into(), None),
        };
        let (first, last) = ports.unwrap_or_default();
        Self {
            direction: match rule.direction {
                Direction::Ingress => v1::Direction::Ingress,
                Direction::Egress => v1::Direction::Egress,
            }
            .into(),
            protocol: protocol.into(),
            first_port: first.into(),
            last_port: last.into(),
            remote: match rule.remote {
                Remote::Any => None,
                Remote::Cidr(cidr) => Some(security_rule::Remote::Cidr(cidr.to_string())),
                Remote::Group(group) => Some(security_rule::Remote::Group(group.into())),
            },
            description: rule.description,
        }
    }
}

#[cfg(test)]
mod tests;
