//! What operators do with networks and security groups. Hosts are told by `networks::runner`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dalgu_proto::{
    ids::{GroupId, GroupName, HostName, NetworkId, NetworkName},
    network::{Group, Kind, MAX_VNI, Network, Rule},
};

use super::{Caller, Error, check_etag, room};
use crate::{
    model::{GroupRecord, NetworkRecord, Outcome},
    networks::{MAX_GROUPS, MAX_NETWORKS, resolve},
    state::{State, Tx},
};

/// What networks and groups have in common.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Description.
    pub description: String,
}

/// New values of a network's mutable fields; `None` leaves one as it is.
#[derive(Debug, Clone, Default)]
pub struct UpdateNetwork {
    /// Labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Description.
    pub description: Option<String>,
    /// DNS domain.
    pub domain: Option<String>,
    /// Servers that other names are asked of.
    pub dns_servers: Option<Vec<IpAddr>>,
}

/// New values of a group's mutable fields.
#[derive(Debug, Clone, Default)]
pub struct UpdateGroup {
    /// Labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Description.
    pub description: Option<String>,
    /// Rules, all of them.
    pub rules: Option<Vec<Rule>>,
}

/// The network of that name.
pub fn find(state: &State, name: &NetworkName) -> Result<NetworkRecord, Error> {
    let network = state.networks.get(name);
    let network = network.ok_or_else(|| resolve::Error::NetworkNotFound(name.clone()))?;
    Ok((**network).clone())
}

/// The group of that name.
pub fn find_group(state: &State, name: &GroupName) -> Result<GroupRecord, Error> {
    let group = state.groups.get(name);
    let group = group.ok_or_else(|| resolve::Error::GroupNotFound(name.clone()))?;
    Ok((**group).clone())
}

/// Makes a network.
pub fn create(tx: &mut Tx, caller: &Caller, mut network: Network, notes: Notes) -> Result<Outcome, Error> {
    room(tx)?;
    if tx.networks.contains_key(&network.name) {
        return Err(Error::NetworkExists(network.name));
    }
    if tx.networks.len() >= MAX_NETWORKS {
        return Err(Error::TooMany {
            what: "networks",
            most: MAX_NETWORKS,
        });
    }
    if let Kind::Overlay { vni } = &mut network.kind {
        *vni = choose_vni(tx, *vni)?;
    }
    let name = network.name.clone();
    tx.network_event(&name, "NetworkCreated", format!("made by {}", caller.principal));
    tx.put_network(NetworkRecord {
        id: NetworkId::from_uuid(tx.new_id()),
        network,
        labels: notes.labels,
        description: notes.description,
        create_time: tx.now(),
        revision: 0,
    });
    Ok(Outcome::Network(name))
}

/// The VNI that is asked for, if nobody has it; for 0 the lowest that is free.
fn choose_vni(state: &State, wanted: u32) -> Result<u32, Error> {
    let vnis = state
        .networks
        .values()
        .filter_map(|network| match network.network.kind {
            Kind::Overlay { vni } => Some((vni, &network.network.name)),
            Kind::Bridge { .. } => None,
        });
    let given: BTreeMap<u32, &NetworkName> = vnis.collect();
    match given.get(&wanted) {
        Some(holder) => Err(Error::VniInUse {
            vni: wanted,
            holder: (*holder).clone(),
        }),
        None if wanted != 0 => Ok(wanted),
        // Fewer networks than VNIs may be made.
        None => Ok((1..=MAX_VNI)
            .find(|vni| !given.contains_key(vni))
            .unwrap_or(MAX_VNI)),
    }
}

/// Changes a network.
pub fn update(tx: &mut Tx, name: &NetworkName, etag: &str, update: UpdateNetwork) -> Result<Outcome, Error> {
    room(tx)?;
    let old = find(tx, name)?;
    check_etag(etag, old.revision, name.as_str())?;
    let mut new = old.clone();
    new.labels = update.labels.unwrap_or(new.labels);
    new.description = update.description.unwrap_or(new.description);
    new.network.domain = update.domain.unwrap_or(new.network.domain);
    new.network.dns_servers = update.dns_servers.unwrap_or(new.network.dns_servers);
    if new != old {
        tx.network_event(name, "NetworkUpdated", "changed");
        tx.put_network(new);
    }
    Ok(Outcome::Network(name.clone()))
}

/// Deletes a network.
pub fn delete(tx: &mut Tx, caller: &Caller, name: &NetworkName, etag: &str) -> Result<Outcome, Error> {
    let network = find(tx, name)?;
    check_etag(etag, network.revision, name.as_str())?;
    if let Some(members) = tx.members.get(name)
        && let Some(((vm, nic), _)) = members.interfaces.get_min()
    {
        return Err(Error::NetworkInUse {
            network: name.clone(),
            interfaces: members.interfaces.len(),
            first: format!("{vm}/{nic}"),
        });
    }
    tx.network_event(
        name,
        "NetworkDeleted",
        format!("asked for by {}", caller.principal),
    );
    tx.delete_network(name);
    Ok(Outcome::NetworkDeleted)
}

/// Makes a security group.
pub fn create_group(tx: &mut Tx, caller: &Caller, group: Group, notes: Notes) -> Result<Outcome, Error> {
    room(tx)?;
    if tx.groups.contains_key(&group.name) {
        return Err(Error::GroupExists(group.name));
    }
    if tx.groups.len() >= MAX_GROUPS {
        return Err(Error::TooMany {
            what: "security groups",
            most: MAX_GROUPS,
        });
    }
    named_are_there(tx, &group)?;
    let name = group.name.clone();
    tx.group_event(
        &name,
        "SecurityGroupCreated",
        format!("made by {}", caller.principal),
    );
    tx.put_group(GroupRecord {
        id: GroupId::from_uuid(tx.new_id()),
        group,
        labels: notes.labels,
        description: notes.description,
        create_time: tx.now(),
        revision: 0,
    });
    Ok(Outcome::Group(name))
}

/// Refuses rules that name a group which is not there; one may name its own.
fn named_are_there(state: &State, group: &Group) -> Result<(), Error> {
    let missing = group
        .named()
        .find(|named| **named != group.name && !state.groups.contains_key(*named));
    match missing {
        Some(missing) => Err(resolve::Error::GroupNotFound(missing.clone()).into()),
        None => Ok(()),
    }
}

/// Refuses rules about types of ICMP where a host has an interface with the group, and an agent that does not know them: all that the group
/// lets through would end there.
fn known_where_used(state: &State, group: &Group) -> Result<(), Error> {
    if !group.has_icmp_types() {
        return Ok(());
    }
    let uses = state.group_uses.get(&group.name).into_iter();
    let networks = uses.flat_map(|uses| uses.interfaces.keys());
    let hosts = networks
        .filter_map(|network| state.members.get(network))
        .flat_map(|members| members.hosts.keys());
    let has = |host: &&HostName| {
        let vms = state.host_vms.get(*host).into_iter().flatten();
        let mut ports = vms
            .filter_map(|vm| state.vms.get(vm))
            .flat_map(|vm| vm.spec.nics.iter().filter_map(|nic| nic.port()));
        ports.any(|port| port.groups.contains(&group.name))
    };
    let older = hosts.filter(|host| !resolve::knows_icmp_types(state, host));
    match older.filter(has).min() {
        Some(host) => Err(Error::NoIcmpTypes {
            group: group.name.clone(),
            host: host.clone(),
        }),
        None => Ok(()),
    }
}

/// Changes a security group.
pub fn update_group(
    tx: &mut Tx,
    name: &GroupName,
    etag: &str,
    update: UpdateGroup,
) -> Result<Outcome, Error> {
    room(tx)?;
    let old = find_group(tx, name)?;
    check_etag(etag, old.revision, name.as_str())?;
    let mut new = old.clone();
    new.labels = update.labels.unwrap_or(new.labels);
    new.description = update.description.unwrap_or(new.description);
    new.group.rules = update.rules.unwrap_or(new.group.rules);
    named_are_there(tx, &new.group)?;
    if new.group != old.group {
        known_where_used(tx, &new.group)?;
    }
    if new != old {
        tx.group_event(name, "SecurityGroupUpdated", "changed");
        tx.put_group(new);
    }
    Ok(Outcome::Group(name.clone()))
}

/// Deletes a security group.
pub fn delete_group(tx: &mut Tx, caller: &Caller, name: &GroupName, etag: &str) -> Result<Outcome, Error> {
    let group = find_group(tx, name)?;
    check_etag(etag, group.revision, name.as_str())?;
    if let Some(user) = user(tx, name) {
        return Err(Error::GroupInUse {
            group: name.clone(),
            user,
        });
    }
    tx.group_event(
        name,
        "SecurityGroupDeleted",
        format!("asked for by {}", caller.principal),
    );
    tx.delete_group(name);
    Ok(Outcome::GroupDeleted)
}

/// Who uses a group, in words: interfaces, else other groups.
fn user(state: &State, name: &GroupName) -> Option<String> {
    let uses = state.group_uses.get(name)?;
    if let Some((network, _)) = uses.interfaces.get_min() {
        let interfaces = &state.members.get(network)?.interfaces;
        let mut having = interfaces.iter().filter(|(_, one)| one.groups.contains(name));
        let ((vm, nic), _) = having.next()?;
        return Some(format!(
            "{} interfaces have it, {vm}/{nic} among them",
            uses.count()
        ));
    }
    let others: BTreeSet<_> = uses.named_by.iter().filter(|by| *by != name).collect();
    let first = others.first()?;
    Some(format!(
        "rules of {} groups name it, {first} among them",
        others.len()
    ))
}
