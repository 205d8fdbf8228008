//! Networks and security groups as they are stored, and the indices over who is in them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use dalgu_proto::{
    ids::{GroupId, GroupName, HostName, NetworkId, NetworkName, VmName},
    network::{Group, Interface, Network},
};
use imbl::{OrdMap, OrdSet};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Its id.
    pub id: NetworkId,
    /// What it is; of an overlay with its identifier.
    pub network: Network,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// When it was created.
    pub create_time: Timestamp,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

/// A security group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// Its id.
    pub id: GroupId,
    /// What it lets through.
    pub group: Group,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// When it was created.
    pub create_time: Timestamp,
    /// Store revision of the last change; the etag.
    #[serde(default)]
    pub revision: u64,
}

/// What is in a network. Follows from the VMs and their migrations. Revisions are those of the change that is meant, or of the
/// controller's start where that was later.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Members {
    /// Interfaces by VM and their own name.
    pub interfaces: OrdMap<(VmName, String), Arc<Interface>>,
    /// Who has which address.
    pub addresses: OrdMap<IpAddr, (VmName, String)>,
    /// Hosts that have one of the VMs, or to which one comes.
    pub hosts: OrdMap<HostName, Place>,
    /// Revision of the last change that all these hosts must know.
    pub changed: u64,
}

/// A network on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Interfaces there, coming ones too.
    pub interfaces: u32,
    /// Revision at which the network came there.
    pub since: u64,
}

/// What a host has of networks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostPlace {
    /// The networks.
    pub networks: OrdSet<NetworkName>,
    /// Revision at which one came or went.
    pub changed: u64,
}

/// Who needs a security group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupUse {
    /// Interfaces that have it, by network.
    pub interfaces: OrdMap<NetworkName, u32>,
    /// Groups whose rules name it.
    pub named_by: OrdSet<GroupName>,
}

impl GroupUse {
    /// Interfaces that have it.
    pub fn count(&self) -> u32 {
        self.interfaces.values().sum()
    }
}
