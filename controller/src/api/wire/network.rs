//! From networks, security groups and interfaces to the messages of the operator API.

use dalgu_proto::{network::Interface, time, v1};

use crate::{
    model::{GroupRecord, NetworkRecord},
    state::State,
    verbs::etag,
};

/// A network.
pub fn network(state: &State, record: &NetworkRecord) -> v1::Network {
    let members = state.members.get(&record.network.name);
    let interfaces = members.map_or(0, |members| members.interfaces.len());
    v1::Network {
        uid: record.id.to_string(),
        labels: record.labels.clone().into_iter().collect(),
        description: record.description.clone(),
        interfaces: u32::try_from(interfaces).unwrap_or(u32::MAX),
        etag: etag(record.revision),
        create_time: Some(time::to_wire(record.create_time)),
        ..record.network.clone().into()
    }
}

/// A security group.
pub fn security_group(state: &State, record: &GroupRecord) -> v1::SecurityGroup {
    let uses = state.group_uses.get(&record.group.name);
    v1::SecurityGroup {
        uid: record.id.to_string(),
        labels: record.labels.clone().into_iter().collect(),
        description: record.description.clone(),
        interfaces: uses.map_or(0, |uses| uses.count()),
        etag: etag(record.revision),
        create_time: Some(time::to_wire(record.create_time)),
        ..record.group.clone().into()
    }
}

/// An interface in a network.
pub fn interface(state: &State, interface: &Interface) -> v1::NetworkInterface {
    let vm = state.vm_by_name(&interface.vm);
    v1::NetworkInterface {
        host: vm.map(|vm| vm.owner.to_string()).unwrap_or_default(),
        ..interface.clone().into()
    }
}
