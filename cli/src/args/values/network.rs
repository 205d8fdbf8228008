//! Interfaces, subnets and rules as people write them. Pure.

use std::net::IpAddr;

use dalgu_proto::{
    network::IcmpType,
    v1::{self, security_rule::Remote},
};

use super::{Error, set_once};

/// Reads NAME=BRIDGE[,mac=ADDRESS], or
/// NAME,network=NETWORK[,ip=ADDRESS][,group=GROUP]…[,receive=RATE][,send=RATE][,mac=ADDRESS].
pub fn nic(text: &str) -> Result<v1::Nic, Error> {
    const BRIDGE: &str = "on a bridge it takes reserve=RATE and mac=ADDRESS, each once";
    const NETWORK: &str = "in a network it takes ip=ADDRESS (one of each family), group=GROUP, receive=RATE, send=RATE and \
                           mac=ADDRESS; but for group, each once";
    let bad = || Error::Nic(text.to_owned());
    let (name, bridge, options) = super::parts(text, bad())?;
    let mut nic = v1::Nic {
        name: name.to_owned(),
        bridge: bridge.unwrap_or_default().to_owned(),
        ..Default::default()
    };
    let allowed = if bridge.is_some() { BRIDGE } else { NETWORK };
    for (option, value) in options {
        let unknown = || Error::Option {
            option: format!("{option}={value}"),
            allowed,
        };
        match option {
            "mac" => set_once(&mut nic.mac, option, value, allowed)?,
            "reserve" if bridge.is_some() && nic.reserved_mbit_per_second == 0 => {
                nic.reserved_mbit_per_second = rate_mbit(value)?;
            }
            _ if bridge.is_some() => return Err(unknown()),
            "network" => set_once(&mut nic.network, option, value, allowed)?,
            "ip" => match value.parse() {
                Ok(IpAddr::V4(_)) => set_once(&mut nic.ipv4_address, option, value, allowed)?,
                Ok(IpAddr::V6(_)) => set_once(&mut nic.ipv6_address, option, value, allowed)?,
                Err(_) => return Err(Error::Address(value.to_owned())),
            },
            "group" if !value.is_empty() => nic.security_groups.push(value.to_owned()),
            "receive" if nic.receive_limit_mbit_per_second == 0 => {
                nic.receive_limit_mbit_per_second = rate_mbit(value)?;
            }
            "send" if nic.send_limit_mbit_per_second == 0 => {
                nic.send_limit_mbit_per_second = rate_mbit(value)?;
            }
            _ => return Err(unknown()),
        }
    }
    if nic.bridge.is_empty() && nic.network.is_empty() {
        return Err(bad());
    }
    Ok(nic)
}

/// A change of an interface's limits in Mbit per second: what is `None` stays, and 0 lifts a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NicLimits {
    receive: Option<u32>,
    send: Option<u32>,
}

impl NicLimits {
    /// Makes this change.
    pub fn apply(self, nic: &mut v1::Nic) {
        for (limit, change) in [
            (&mut nic.receive_limit_mbit_per_second, self.receive),
            (&mut nic.send_limit_mbit_per_second, self.send),
        ] {
            *limit = change.unwrap_or(*limit);
        }
    }
}

/// Reads NAME,receive=RATE[,send=RATE] or NAME,none.
pub fn nic_limits(text: &str) -> Result<(String, NicLimits), Error> {
    let bad = || Error::NicLimits(text.to_owned());
    let (name, options) = text
        .split_once(',')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(bad)?;
    if options == "none" {
        let (receive, send) = (Some(0), Some(0));
        return Ok((name.to_owned(), NicLimits { receive, send }));
    }
    let mut limits = NicLimits::default();
    for option in options.split(',') {
        let (option, value) = option.split_once('=').ok_or_else(bad)?;
        let limit = match option {
            "receive" => &mut limits.receive,
            "send" => &mut limits.send,
            _ => return Err(bad()),
        };
        let rate = if value == "none" { 0 } else { rate_mbit(value)? };
        if limit.replace(rate).is_some() {
            return Err(bad());
        }
    }
    Ok((name.to_owned(), limits))
}

/// Reads NAME=GROUP.
pub fn nic_group(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((name, group)) if !name.is_empty() && !group.is_empty() => {
            Ok((name.to_owned(), group.to_owned()))
        }
        _ => Err(Error::NicGroup(text.to_owned())),
    }
}

/// Reads NAME=NETWORK, or NAME=none: empty then.
pub fn nic_network(text: &str) -> Result<(String, String), Error> {
    match text.split_once('=') {
        Some((name, "none")) if !name.is_empty() => Ok((name.to_owned(), String::new())),
        Some((name, network)) if !name.is_empty() && !network.is_empty() => {
            Ok((name.to_owned(), network.to_owned()))
        }
        _ => Err(Error::NicNetwork(text.to_owned())),
    }
}

/// Reads a rate such as 100Mbit or 1Gbit, in Mbit per second.
fn rate_mbit(text: &str) -> Result<u32, Error> {
    let bad = || Error::Rate(text.to_owned());
    let lower = text.to_ascii_lowercase();
    let (number, factor) = if let Some(number) = lower.strip_suffix("mbit") {
        (number, 1)
    } else {
        (lower.strip_suffix("gbit").ok_or_else(bad)?, 1000)
    };
    let number: u32 = number.trim().parse().map_err(|_| bad())?;
    let rate = number.checked_mul(factor).filter(|rate| *rate > 0);
    rate.ok_or_else(bad)
}

/// Reads CIDR[,gateway=ADDRESS][,first=ADDRESS][,last=ADDRESS][,service=ADDRESS][,no-dhcp].
pub fn subnet(text: &str) -> Result<v1::Subnet, Error> {
    const ALLOWED: &str = "a subnet takes gateway, first, last and service=ADDRESS, each once, and no-dhcp";
    let mut pieces = text.split(',');
    let mut subnet = v1::Subnet {
        cidr: pieces.next().unwrap_or_default().to_owned(),
        ..Default::default()
    };
    if !subnet.cidr.contains('/') {
        return Err(Error::Subnet(text.to_owned()));
    }
    for piece in pieces {
        let (option, value) = piece.split_once('=').unwrap_or((piece, ""));
        match option {
            "gateway" => set_once(&mut subnet.gateway, option, value, ALLOWED)?,
            "first" => set_once(&mut subnet.first, option, value, ALLOWED)?,
            "last" => set_once(&mut subnet.last, option, value, ALLOWED)?,
            "service" => set_once(&mut subnet.service_address, option, value, ALLOWED)?,
            "no-dhcp" if piece == option => subnet.no_dhcp = true,
            _ => {
                return Err(Error::Option {
                    option: piece.to_owned(),
                    allowed: ALLOWED,
                });
            }
        }
    }
    Ok(subnet)
}

/// Reads DIRECTION,PROTOCOL[,PORTS][,WITH][,description=TEXT]; of icmp a type is where others have ports.
pub fn rule(text: &str) -> Result<v1::SecurityRule, Error> {
    let bad = |why: &'static str| Error::Rule(text.to_owned(), why);
    // All that follows, so that it may have commas.
    let (parts, description) = match text.split_once(",description=") {
        Some((_, "")) => return Err(bad("a part after the protocol lacks its value")),
        Some((parts, description)) => (parts, description),
        None => (text, ""),
    };
    let mut pieces = parts.split(',').peekable();
    let direction = match pieces.next() {
        Some("ingress") => v1::Direction::Ingress,
        Some("egress") => v1::Direction::Egress,
        _ => return Err(bad("the first word is ingress or egress")),
    };
    let mut protocol = match pieces.next() {
        Some("any") => v1::Protocol::Unspecified,
        Some("tcp") => v1::Protocol::Tcp,
        Some("udp") => v1::Protocol::Udp,
        Some("icmp") => v1::Protocol::Icmp,
        _ => return Err(bad("the second word is any, tcp, udp or icmp")),
    };
    let (mut first_port, mut last_port) = (0, 0);
    let is_icmp = protocol == v1::Protocol::Icmp;
    let is_number = |piece: &&str| !is_icmp && piece.starts_with(|c: char| c.is_ascii_digit());
    if let Some(piece) = pieces.next_if(is_number) {
        if !matches!(protocol, v1::Protocol::Tcp | v1::Protocol::Udp) {
            return Err(bad("only tcp and udp have ports"));
        }
        (first_port, last_port) =
            ports(piece).ok_or_else(|| bad("ports are 1 to 65535, as 22 or 5000-5010"))?;
    }
    if is_icmp
        && let Some(kind) = pieces.next_if(|piece| !piece.contains('='))
        && kind != "any"
    {
        let kind = kind
            .parse::<IcmpType>()
            .map_err(|error| Error::IcmpRule(text.to_owned(), error))?;
        protocol = kind.into();
    }
    let (with, with_group) = match direction {
        v1::Direction::Egress => ("to", "to-group"),
        _ => ("from", "from-group"),
    };
    let remote = match pieces
        .next()
        .map(|piece| piece.split_once('=').unwrap_or((piece, "")))
    {
        None => None,
        Some((_, "")) => return Err(bad("a part after the protocol lacks its value")),
        Some((option, value)) if option == with => Some(Remote::Cidr(value.to_owned())),
        Some((option, value)) if option == with_group => Some(Remote::Group(value.to_owned())),
        Some(_) => {
            return Err(bad(
                "ingress is from=ADDRESSES or from-group=GROUP, egress to=ADDRESSES or to-group=GROUP",
            ));
        }
    };
    if pieces.next().is_some() {
        return Err(bad("only description=TEXT follows after with whom"));
    }
    Ok(v1::SecurityRule {
        direction: direction.into(),
        protocol: protocol.into(),
        first_port,
        last_port,
        remote,
        description: description.to_owned(),
    })
}

fn ports(text: &str) -> Option<(u32, u32)> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).map(u32::from);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_goes_into_a_network_or_is_left_out() {
        let pair = |name: &str, network: &str| (name.to_owned(), network.to_owned());
        assert_eq!(nic_network("eth0=lab").unwrap(), pair("eth0", "lab"));
        assert_eq!(nic_network("eth0=none").unwrap(), pair("eth0", ""));
        for bad in ["eth0", "eth0=", "=lab", "=none", ""] {
            assert!(matches!(nic_network(bad), Err(Error::NicNetwork(_))), "{bad}");
        }
    }

    #[test]
    fn an_interface_on_a_bridge_is_read_with_its_address() {
        let read = nic("eth0=br0,mac=52:54:00:00:00:01").unwrap();
        assert_eq!(
            read,
            v1::Nic {
                name: "eth0".into(),
                bridge: "br0".into(),
                mac: "52:54:00:00:00:01".into(),
                ..Default::default()
            }
        );
        for bad in [
            "",
            "eth0",
            "eth0=",
            "eth0=br0,mac=",
            "eth0=br0,vlan=3",
            "eth0=br0,network=field",
            "eth0=br0,ip=10.0.0.1",
        ] {
            assert!(nic(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn an_interface_in_a_network_is_read_with_addresses_groups_and_limits() {
        let text =
            "eth0,network=field,ip=10.20.0.7,group=ssh,group=web,receive=100Mbit,send=1Gbit,ip=fd00::7";
        let wanted = v1::Nic {
            name: "eth0".into(),
            network: "field".into(),
            ipv4_address: "10.20.0.7".into(),
            ipv6_address: "fd00::7".into(),
            security_groups: vec!["ssh".into(), "web".into()],
            receive_limit_mbit_per_second: 100,
            send_limit_mbit_per_second: 1000,
            ..Default::default()
        };
        assert_eq!(nic(text).unwrap(), wanted);
        for bad in [
            "eth0,ip=10.0.0.1",
            "eth0,network=",
            "eth0,network=field,network=other",
            "eth0,network=field,ip=10.0.0",
            "eth0,network=field,ip=10.0.0.1,ip=10.0.0.2",
            "eth0,network=field,group=",
            "eth0,network=field,receive=100",
            "eth0,network=field,receive=0Mbit",
            "eth0,network=field,receive=5Mbit,receive=5Mbit",
            "eth0,network=field,send=9999999Gbit",
            "eth0,network=field,vlan=3",
        ] {
            assert!(nic(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn subnets_are_read_with_their_options() {
        let wanted = v1::Subnet {
            cidr: "192.0.2.0/24".into(),
            gateway: "192.0.2.1".into(),
            first: "192.0.2.100".into(),
            last: "192.0.2.199".into(),
            service_address: "192.0.2.2".into(),
            no_dhcp: true,
        };
        let text =
            "192.0.2.0/24,gateway=192.0.2.1,first=192.0.2.100,last=192.0.2.199,service=192.0.2.2,no-dhcp";
        assert_eq!(subnet(text), Ok(wanted));
        assert_eq!(subnet("fd00::/64").unwrap().cidr, "fd00::/64");
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/8,gateway",
            "10.0.0.0/8,gateway=",
            "10.0.0.0/8,first=a,first=b",
            "10.0.0.0/8,no-dhcp=yes",
            "10.0.0.0/8,mtu=9000",
        ] {
            assert!(subnet(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn rules_are_read() {
        let read = rule("ingress,tcp,22,from=10.0.0.0/8").unwrap();
        let wanted = v1::SecurityRule {
            direction: v1::Direction::Ingress.into(),
            protocol: v1::Protocol::Tcp.into(),
            first_port: 22,
            last_port: 22,
            remote: Some(Remote::Cidr("10.0.0.0/8".into())),
            description: String::new(),
        };
        assert_eq!(read, wanted);
        let read = rule("ingress,any,from-group=web").unwrap();
        assert_eq!(read.remote, Some(Remote::Group("web".into())));
        assert_eq!((read.protocol, read.first_port), (0, 0));
        let read = rule("egress,udp,5000-5010,to=192.0.2.7").unwrap();
        assert_eq!((read.first_port, read.last_port), (5000, 5010));
        assert_eq!(rule("ingress,icmp").unwrap().remote, None);
        let protocol = |text: &str| v1::Protocol::try_from(rule(text).unwrap().protocol).unwrap();
        for all in [
            "ingress,icmp",
            "ingress,icmp,any",
            "ingress,icmp,from-group=web",
            "ingress,icmp,any,from=::/0",
        ] {
            assert_eq!(protocol(all), v1::Protocol::Icmp, "{all}");
        }
        for ping in ["ingress,icmp,echo-request", "ingress,icmp,8", "ingress,icmp,128"] {
            assert_eq!(protocol(ping), v1::Protocol::IcmpEchoRequest, "{ping}");
        }
        let read = rule("egress,icmp,13,to=192.0.2.7,description=clocks").unwrap();
        assert_eq!(read.protocol, i32::from(v1::Protocol::IcmpTimestampRequest));
        assert_eq!(read.remote, Some(Remote::Cidr("192.0.2.7".into())));
        let read = rule("ingress,tcp,22,from=10.0.0.0/8,description=the office, and home").unwrap();
        assert_eq!(read.remote, Some(Remote::Cidr("10.0.0.0/8".into())));
        assert_eq!(read.description, "the office, and home");
        assert_eq!(rule("egress,tcp").unwrap().last_port, 0);
    }

    #[test]
    fn rules_that_are_none_are_refused_and_say_why() {
        for (bad, why) in [
            ("", "ingress or egress"),
            ("in,tcp", "ingress or egress"),
            ("ingress", "any, tcp, udp or icmp"),
            ("ingress,sctp", "any, tcp, udp or icmp"),
            ("ingress,any,22", "only tcp and udp"),
            ("ingress,icmp,3", "types of ICMP are echo-request (8, 128), "),
            ("ingress,icmp,echo-reply", "answers and errors pass"),
            ("ingress,icmp,8,13", "lacks its value"),
            ("ingress,udp,echo-request", "lacks its value"),
            ("ingress,tcp,0", "1 to 65535"),
            ("ingress,tcp,65536", "1 to 65535"),
            ("ingress,tcp,20-10", "1 to 65535"),
            ("ingress,tcp,22,to=10.0.0.0/8", "egress to="),
            ("egress,tcp,22,from=10.0.0.0/8", "egress to="),
            ("ingress,tcp,22,from=", "lacks its value"),
            ("ingress,tcp,22,from", "lacks its value"),
            ("ingress,tcp,22,from=10.0.0.0/8,from-group=a", "only description="),
            ("ingress,tcp,22,description=", "lacks its value"),
        ] {
            let error = rule(bad).unwrap_err().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
