//! What agents are told of networks.

use std::sync::Arc;

use dalgu_proto::{agent::v1 as agent, v1};

use crate::networks::plan::{Document, Part};

/// A host's document.
pub fn document(document: Document) -> agent::HostNetworks {
    let groups = document.groups.into_iter().map(|group| v1::SecurityGroup {
        uid: group.id.to_string(),
        ..Arc::unwrap_or_clone(group).group.into()
    });
    agent::HostNetworks {
        version: document.version,
        networks: document.networks.into_iter().map(part).collect(),
        security_groups: groups.collect(),
    }
}

fn part(part: Part) -> agent::HostNetwork {
    let network = v1::Network {
        uid: part.network.id.to_string(),
        ..Arc::unwrap_or_clone(part.network).network.into()
    };
    let interfaces = part.interfaces.into_iter();
    agent::HostNetwork {
        network: Some(network),
        peers: part.peers.iter().map(ToString::to_string).collect(),
        interfaces: interfaces.map(|one| Arc::unwrap_or_clone(one).into()).collect(),
    }
}
