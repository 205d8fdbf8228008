//! What networks and security groups are: the validated form of `dalgu.v1.Network` and `dalgu.v1.SecurityGroup`.
//!
//! Made from the wire by `try_from`, which fills in defaults and refuses what the .proto forbids; after that nobody checks
//! again. It is also the form in which the controller's store and the agents keep them, so fields may be added with a serde
//! default but never change their meaning. Labels, descriptions and times are the controller's own.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::{GroupName, NetworkName, VmName};

mod icmp;
pub(crate) mod wire;

pub use icmp::{IcmpType, UnknownIcmpType};

/// Largest VXLAN network identifier.
pub const MAX_VNI: u32 = (1 << 24) - 1;
/// Largest VLAN tag.
pub const MAX_VLAN: u16 = 4094;
/// Packet sizes.
pub const MTU: std::ops::RangeInclusive<u32> = 1280..=9000;
/// Bytes that VXLAN takes of a packet between hosts over IPv4.
pub const OVERLAY_OVERHEAD: u32 = 50;
/// Most DNS servers of a network.
pub const MAX_DNS_SERVERS: usize = 4;
/// Most rules of a security group.
pub const MAX_RULES: usize = 256;
/// Most security groups of an interface.
pub const MAX_GROUPS: usize = 16;

/// How a network is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A bridge that hosts have.
    Bridge {
        /// Its name.
        bridge: String,
        /// Tag of the VLAN on it; `None` for untagged.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vlan: Option<u16>,
    },
    /// VXLAN between hosts.
    Overlay {
        /// Its identifier; 0 only before the network is created: the controller chooses.
        vni: u32,
    },
}

/// Addresses of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// All of them, with the host part zero.
    pub cidr: IpNet,
    /// Router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// First address that is given without being asked for.
    pub first: IpAddr,
    /// Last of them.
    pub last: IpAddr,
    /// Address of each host's DHCP and DNS.
    pub service: IpAddr,
    /// Hosts serve the addresses by DHCP.
    pub dhcp: bool,
}

impl Subnet {
    /// Whether an interface may have this address.
    pub fn offers(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address)
            && !self.is_edge(address)
            && address != self.service
            && Some(address) != self.gateway
    }

    /// Whether hosts serve its addresses by DHCP: what serves them does not take IPv6 subnets wider than /64.
    pub fn is_served(&self) -> bool {
        self.dhcp && (self.cidr.addr().is_ipv4() || self.cidr.prefix_len() >= 64)
    }

    /// Whether it is the subnet's own address or its broadcast address.
    fn is_edge(&self, address: IpAddr) -> bool {
        address == self.cidr.network() || (self.cidr.addr().is_ipv4() && address == self.cidr.broadcast())
    }
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: NetworkName,
    /// How it is made.
    pub kind: Kind,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// IPv4 addresses, where Dalgu manages them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Subnet>,
    /// IPv6 addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Subnet>,
    /// DNS domain.
    pub domain: String,
    /// Servers that other names are asked of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_servers: Vec<IpAddr>,
}

impl Network {
    /// Its subnets.
    pub fn subnets(&self) -> impl Iterator<Item = &Subnet> {
        self.ipv4.iter().chain(&self.ipv6)
    }
}

/// How an interface of a VM plugs into a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The network.
    pub network: NetworkName,
    /// IPv4 address; filled in when the VM is created, where the network manages them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// Security groups.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub groups: BTreeSet<GroupName>,
    /// Limit of what it receives, in Mbit per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_limit_mbit: Option<u32>,
    /// Limit of what it sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_limit_mbit: Option<u32>,
}

impl Port {
    /// One whose addresses are given by the network, in no security group and without limits.
    pub const fn new(network: NetworkName) -> Self {
        Self {
            network,
            ipv4: None,
            ipv6: None,
            groups: BTreeSet::new(),
            receive_limit_mbit: None,
            send_limit_mbit: None,
        }
    }

    /// Its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let (ipv4, ipv6) = (self.ipv4.map(IpAddr::V4), self.ipv6.map(IpAddr::V6));
        ipv4.into_iter().chain(ipv6)
    }
}

/// An interface in a network, as others there know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its VM.
    pub vm: VmName,
    /// Its name within the VM.
    pub nic: String,
    /// MAC address.
    pub mac: String,
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Security groups.
    pub groups: BTreeSet<GroupName>,
}

/// Which way a connection is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Towards the VM.
    Ingress,
    /// By the VM.
    Egress,
}

/// What a rule lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// Everything.
    Any,
    /// TCP: these ports, first and last, or all.
    Tcp(Option<(u16, u16)>),
    /// UDP.
    Udp(Option<(u16, u16)>),
    /// ICMP, over IPv6 `ICMPv6`, of every type.
    Icmp,
    /// ICMP that begins with this type.
    IcmpType(IcmpType),
}

/// With whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    /// Everybody.
    Any,
    /// These addresses.
    Cidr(IpNet),
    /// Interfaces of that group in the same network.
    Group(GroupName),
}

/// Lets connections through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Which way.
    pub direction: Direction,
    /// What.
    pub protocol: Protocol,
    /// With whom.
    pub remote: Remote,
    /// Free text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
}

/// Rules for interfaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: GroupName,
    /// What it lets through.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

impl Group {
    /// Groups that its rules name.
    pub fn named(&self) -> impl Iterator<Item = &GroupName> {
        self.rules.iter().filter_map(|rule| match &rule.remote {
            Remote::Group(group) => Some(group),
            Remote::Any | Remote::Cidr(_) => None,
        })
    }

    /// Whether its rules tell types of ICMP apart, which agents did not always know.
    pub fn has_icmp_types(&self) -> bool {
        let mut rules = self.rules.iter();
        rules.any(|rule| matches!(rule.protocol, Protocol::IcmpType(_)))
    }
}
