//! Commands about networks. Called by `networks::runner`.

use dalgu_proto::{
    agent::v1::{self as agent, agent_network_service_client::AgentNetworkServiceClient},
    ids::HostName,
};

use super::{Agents, Error, call};
use crate::{agent_wire, networks::plan::Document, state::State};

impl Agents {
    /// Tells a host all that it must know of networks; it has it in place when this returns.
    pub async fn apply_networks(
        &self,
        state: &State,
        host: &HostName,
        document: Document,
    ) -> Result<(), Error> {
        let (caller, context) = self.reach(state, host)?;
        let request = agent::ApplyNetworksRequest {
            context,
            networks: Some(agent_wire::network::document(document)),
        };
        let mut client = AgentNetworkServiceClient::new(caller);
        call(host, "ApplyNetworks", client.apply_networks(request)).await?;
        Ok(())
    }
}
