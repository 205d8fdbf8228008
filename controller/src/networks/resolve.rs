//! Finds the networks and security groups that a VM's interfaces ask for, gives addresses, and says what that asks of a
//! host. Pure.
//!
//! Called by `verbs` in the transaction that creates or changes the VM, so that what was free is still free.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use dalgu_proto::{
    host::GuestFeature,
    ids::{GroupName, HostName, NetworkName, VmName},
    network::{Kind, Network, Port, Subnet},
    vm::{Nic, Plug, Spec},
};
use imbl::OrdMap;

use super::MAX_INTERFACES;
use crate::{model::VmRecord, placement::Needs, state::State};

/// Why a VM cannot have an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such network.
    #[error("there is no network {0}; see `dalgu network list`")]
    NetworkNotFound(NetworkName),
    /// No such group.
    #[error("there is no security group {0}; see `dalgu security-group list`")]
    GroupNotFound(GroupName),
    /// Another interface has the address.
    #[error(
        "{address} in network {network} is in use by {holder}: choose another, or leave the address out to get one that is free"
    )]
    AddressInUse {
        /// The address.
        address: IpAddr,
        /// The network.
        network: NetworkName,
        /// Who has it: VM and interface, "web/eth0".
        holder: String,
    },
    /// All addresses are given.
    #[error(
        "network {network} has no free address from {first} to {last}: delete VMs in it, or make a network with a larger subnet"
    )]
    NoAddress {
        /// The network.
        network: NetworkName,
        /// First of them.
        first: IpAddr,
        /// Last.
        last: IpAddr,
    },
    /// It has as many interfaces as a network may have.
    #[error("network {0} has {MAX_INTERFACES} interfaces, the most that a network may have: use another")]
    Full(NetworkName),
    /// A field of an interface does not fit the network.
    #[error("nics[{index}].{field}: {message}")]
    Port {
        /// Which interface.
        index: usize,
        /// Which field.
        field: &'static str,
        /// What is wrong.
        message: String,
    },
}

/// Addresses that other interfaces of the same specification take, by network.
type Taken = BTreeMap<NetworkName, OrdMap<IpAddr, String>>;

/// Looks up networks and groups, and fills in the addresses. `old` is the VM where it is there and `spec` is what it becomes: an
/// interface that stays, which is one of the same name in the same network, keeps its addresses.
pub fn ports(state: &State, spec: &mut Spec, old: Option<&VmRecord>) -> Result<(), Error> {
    let mut taken = Taken::new();
    // Before any address is chosen, so that none is chosen that another interface asks for or has.
    for (index, nic) in spec.nics.iter_mut().enumerate() {
        let Plug::Network(port) = &mut nic.plug else {
            continue;
        };
        keep(index, port, old.and_then(|old| port_of(old, &nic.name)))?;
        for address in port.addresses() {
            let others = taken.entry(port.network.clone()).or_default();
            if let Some(other) = others.insert(address, nic.name.clone()) {
                return Err(Error::AddressInUse {
                    address,
                    network: port.network.clone(),
                    holder: format!("interface {other} of the same VM"),
                });
            }
        }
    }
    for (index, nic) in spec.nics.iter_mut().enumerate() {
        let Plug::Network(port) = &mut nic.plug else {
            continue;
        };
        let network = state.networks.get(&port.network);
        let network = network.ok_or_else(|| Error::NetworkNotFound(port.network.clone()))?;
        if let Some(group) = port
            .groups
            .iter()
            .find(|group| !state.groups.contains_key(*group))
        {
            return Err(Error::GroupNotFound(group.clone()));
        }
        let seeker = Seeker {
            state,
            vm: old.map(|old| &old.name),
            nic: &nic.name,
            index,
            network: &network.network,
        };
        port.ipv4 = seeker.ipv4(port.ipv4, &mut taken)?;
        port.ipv6 = seeker.ipv6(port.ipv6, &mut taken)?;
    }
    room(state, spec, old)
}

fn port_of<'a>(vm: &'a VmRecord, nic: &str) -> Option<&'a Port> {
    vm.spec.nics.iter().find(|there| there.name == nic)?.port()
}

/// An interface that stays keeps what it has.
fn keep(index: usize, port: &mut Port, old: Option<&Port>) -> Result<(), Error> {
    let Some(old) = old.filter(|old| old.network == port.network) else {
        return Ok(());
    };
    port.ipv4 = port.ipv4.or(old.ipv4);
    port.ipv6 = port.ipv6.or(old.ipv6);
    let changed = |field, had: Option<String>| Error::Port {
        index,
        field,
        message: format!(
            "cannot be changed, it is {}: take the interface out, and put in one of another name",
            had.as_deref().unwrap_or("none")
        ),
    };
    if port.ipv4 != old.ipv4 {
        return Err(changed("ipv4_address", old.ipv4.map(|had| had.to_string())));
    }
    if port.ipv6 != old.ipv6 {
        return Err(changed("ipv6_address", old.ipv6.map(|had| had.to_string())));
    }
    Ok(())
}

/// One interface that needs addresses.
struct Seeker<'a> {
    state: &'a State,
    vm: Option<&'a VmName>,
    nic: &'a str,
    index: usize,
    network: &'a Network,
}

impl Seeker<'_> {
    fn ipv4(&self, asked: Option<Ipv4Addr>, taken: &mut Taken) -> Result<Option<Ipv4Addr>, Error> {
        let subnet = self.network.ipv4.as_ref();
        let found = self.address("ipv4_address", "IPv4", subnet, asked.map(IpAddr::V4), taken)?;
        Ok(found.and_then(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }))
    }

    fn ipv6(&self, asked: Option<Ipv6Addr>, taken: &mut Taken) -> Result<Option<Ipv6Addr>, Error> {
        let subnet = self.network.ipv6.as_ref();
        let found = self.address("ipv6_address", "IPv6", subnet, asked.map(IpAddr::V6), taken)?;
        Ok(found.and_then(|address| match address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        }))
    }

    fn address(
        &self,
        field: &'static str,
        family: &str,
        subnet: Option<&Subnet>,
        asked: Option<IpAddr>,
        taken: &mut Taken,
    ) -> Result<Option<IpAddr>, Error> {
        let name = &self.network.name;
        let wrong = |message| Error::Port {
            index: self.index,
            field,
            message,
        };
        match (subnet, asked) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(wrong(format!(
                "network {name} has no {family} addresses of Dalgu's: leave it out"
            ))),
            (Some(subnet), Some(address)) if !subnet.offers(address) => {
                Err(wrong(not_offered(name, subnet, address)))
            }
            (Some(_), Some(address)) => match self.holder(address) {
                Some(holder) => Err(Error::AddressInUse {
                    address,
                    network: name.clone(),
                    holder,
                }),
                None => Ok(Some(address)),
            },
            (Some(subnet), None) => {
                let others = taken.entry(name.clone()).or_default();
                let address = self.lowest(subnet, others).ok_or_else(|| Error::NoAddress {
                    network: name.clone(),
                    first: subnet.first,
                    last: subnet.last,
                })?;
                others.insert(address, self.nic.to_owned());
                Ok(Some(address))
            }
        }
    }

    /// Who has an address, but for this interface itself.
    fn holder(&self, address: IpAddr) -> Option<String> {
        let members = self.state.members.get(&self.network.name)?;
        let (vm, nic) = members.addresses.get(&address)?;
        let own = Some(vm) == self.vm && nic == self.nic;
        (!own).then(|| format!("{vm}/{nic}"))
    }

    /// The first address that nobody has. No more are in use than a network may have interfaces, so one that is not found soon is
    /// not there, whatever a damaged store says of the subnet.
    fn lowest(&self, subnet: &Subnet, others: &OrdMap<IpAddr, String>) -> Option<IpAddr> {
        let given = self.state.members.get(&self.network.name);
        let free = |address: &IpAddr| {
            subnet.offers(*address)
                && !others.contains_key(address)
                && given.is_none_or(|given| !given.addresses.contains_key(address))
        };
        from_to(subnet.first, subnet.last)
            .take(2 * MAX_INTERFACES)
            .find(free)
    }
}

fn not_offered(network: &NetworkName, subnet: &Subnet, address: IpAddr) -> String {
    let why = if !subnet.cidr.contains(&address) {
        format!("is outside of {}", subnet.cidr)
    } else if Some(address) == subnet.gateway {
        "is the gateway's".to_owned()
    } else if address == subnet.service {
        "is that of the hosts' DHCP and DNS".to_owned()
    } else {
        "is the subnet's own or its broadcast address".to_owned()
    };
    format!("{address} {why} in network {network}: choose another, or leave it out")
}

/// All addresses from one to another, of the same family.
fn from_to(first: IpAddr, last: IpAddr) -> impl Iterator<Item = IpAddr> {
    let number = |address| match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    };
    let is_v4 = first.is_ipv4();
    (number(first)..=number(last)).map(move |number| match u32::try_from(number) {
        Ok(number) if is_v4 => IpAddr::V4(number.into()),
        _ => IpAddr::V6(number.into()),
    })
}

/// Refuses more interfaces than a network may have. Those that the VM has there already count once.
fn room(state: &State, spec: &Spec, old: Option<&VmRecord>) -> Result<(), Error> {
    let networks: BTreeSet<_> = spec
        .nics
        .iter()
        .filter_map(|nic| Some(&nic.port()?.network))
        .collect();
    for network in networks {
        let wanted = spec
            .nics
            .iter()
            .filter(|nic| nic.port().is_some_and(|port| port.network == *network));
        let Some(members) = state.members.get(network) else {
            continue;
        };
        let own = old.into_iter().flat_map(|old| &old.spec.nics);
        let own = own.filter(|nic| nic.port().is_some_and(|port| port.network == *network));
        let (own, wanted) = (own.count(), wanted.count());
        // A full network may be left as it is.
        if wanted > own && members.interfaces.len() - own + wanted > MAX_INTERFACES {
            return Err(Error::Full(network.clone()));
        }
    }
    Ok(())
}

/// What the networks of a VM's interfaces ask of its host, beyond [`Spec::features`].
pub fn needs(state: &State, spec: &Spec) -> Needs {
    let ports = spec.nics.iter().filter_map(|nic| nic.port());
    let networks = ports.filter_map(|port| state.networks.get(&port.network));
    let mut needs = Needs::default();
    if spec
        .nics
        .iter()
        .any(|nic| told_apart(state, nic).next().is_some())
    {
        needs.features.insert(GuestFeature::IcmpType);
    }
    for network in networks {
        match &network.network.kind {
            Kind::Overlay { .. } => drop(needs.features.insert(GuestFeature::Overlay)),
            Kind::Bridge { bridge, vlan } => {
                needs.bridges.insert(bridge.clone());
                if vlan.is_some() {
                    needs.features.insert(GuestFeature::Vlan);
                }
            }
        }
    }
    needs
}

/// The groups of an interface whose rules tell types of ICMP apart.
pub fn told_apart<'a>(state: &'a State, nic: &'a Nic) -> impl Iterator<Item = &'a GroupName> {
    let groups = nic.port().into_iter().flat_map(|port| &port.groups);
    groups.filter(|group| {
        let known = state.groups.get(*group);
        known.is_some_and(|known| known.group.has_icmp_types())
    })
}

/// Whether a host's agent knows types of ICMP. One that does not would refuse all that it is told.
pub fn knows_icmp_types(state: &State, host: &HostName) -> bool {
    let host = state.hosts.get(host);
    host.is_some_and(|host| host.inventory.guest_features.contains(&GuestFeature::IcmpType))
}
