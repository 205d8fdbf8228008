//! What the pretended hosts do with networks: take what they are told, by the contract, and say when a VM's first packet left.

use std::collections::BTreeSet;

use dalgu_proto::{
    agent::v1::{self as agent, agent_network_service_server::AgentNetworkService},
    reason,
    v1::{GuestFeature, HostInventory},
};
use tonic::{Code, Request, Response, Status};

use super::agent::{Agent, refuse};

/// Time that a pretended guest needs for its first packet.
pub const DELAY_MS: u32 = 30;

#[derive(Debug, Clone, Default)]
pub struct Networks {
    /// The host offers networks of the site.
    pub offered: bool,
    /// Its agent is of before there were rules about types of ICMP.
    pub old: bool,
    /// What it was told last.
    pub told: Option<agent::HostNetworks>,
    /// Versions in the order in which they came.
    pub versions: Vec<u64>,
    /// It cannot do as it is told.
    pub broken: bool,
    /// Migrations that it turned away because it did not know their networks.
    pub refused: u32,
    /// Migrations that have come to it and ended.
    pub arrived: BTreeSet<String>,
    /// It says when the first packet left only once the migration has ended.
    pub slow: bool,
}

impl Networks {
    /// Whether it knows the networks of a VM.
    pub fn has_all(&self, vm: &agent::VmIntent) -> bool {
        let nics = vm.spec.iter().flat_map(|spec| &spec.nics);
        let mut wanted = nics.map(|nic| &nic.network).filter(|network| !network.is_empty());
        wanted.all(|network| self.part(network).is_some())
    }

    /// What it was told of a network.
    pub fn part(&self, network: &str) -> Option<&agent::HostNetwork> {
        let mut parts = self.told.iter().flat_map(|told| &told.networks);
        parts.find(|part| part.network.as_ref().is_some_and(|there| there.name == network))
    }

    pub fn delay(&self, migration: &str, running: bool) -> Option<prost_types::Duration> {
        let known = (running && !self.slow) || self.arrived.contains(migration);
        let nanos = i32::try_from(DELAY_MS).unwrap() * 1_000_000;
        (known && self.offered).then_some(prost_types::Duration { seconds: 0, nanos })
    }
}

impl Agent {
    pub fn networked(&self, inventory: HostInventory) -> HostInventory {
        if !self.fabric.lock().hosts[&self.name].networks.offered {
            return inventory;
        }
        let mut guest_features = inventory.guest_features;
        let offered = [GuestFeature::Network, GuestFeature::Overlay];
        guest_features.extend(offered.map(i32::from));
        if !self.fabric.lock().hosts[&self.name].networks.old {
            guest_features.push(GuestFeature::IcmpType.into());
        }
        let number = self.name.trim_start_matches('h');
        HostInventory {
            guest_features,
            overlay_address: format!("192.0.2.{number}"),
            ..inventory
        }
    }
}

#[tonic::async_trait]
impl AgentNetworkService for Agent {
    async fn apply_networks(
        &self,
        request: Request<agent::ApplyNetworksRequest>,
    ) -> Result<Response<agent::ApplyNetworksResponse>, Status> {
        let request = request.into_inner();
        self.command("ApplyNetworks", request.context, |host| {
            let networks = &mut host.networks;
            let told = request.networks.unwrap();
            if networks
                .told
                .as_ref()
                .is_some_and(|last| told.version < last.version)
            {
                return Err(refuse("STALE_GENERATION"));
            }
            if networks.broken {
                let message = "the bridge cannot be made";
                return Err(reason::status(Code::Unavailable, "NETWORK", message));
            }
            networks.versions.push(told.version);
            networks.told = Some(told);
            Ok(agent::ApplyNetworksResponse {})
        })
    }
}
