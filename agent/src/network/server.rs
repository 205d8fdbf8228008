//! The gRPC service about networks: who may call, what the wire means, and nothing else.

use std::sync::Arc;

use dalgu_proto::{
    agent::v1::{self as wire, agent_network_service_server::AgentNetworkService},
    reason,
    vm::Invalid,
};
use tonic::{Code, Request, Response, Status};

use super::{Document, Error, HostNetwork, Networks};
use crate::{gate::Gate, server::pass};

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// Judges commands.
    pub gate: Arc<Gate>,
    /// The networks.
    pub networks: Networks,
}

fn status(error: &Error) -> Status {
    let (code, why) = match error {
        Error::Stale { .. } => (Code::FailedPrecondition, "STALE_GENERATION"),
        Error::Conflict(_) => (Code::FailedPrecondition, "GENERATION_CONFLICT"),
        Error::Ledger(_) => (Code::Unavailable, "LEDGER_FAILED"),
        Error::NotMade(_) => (Code::Unavailable, "NETWORK"),
    };
    reason::status(code, why, error.to_string())
}

/// Reads what a host is told.
///
/// # Errors
/// Names the field that does not hold.
pub fn document(wire: wire::HostNetworks) -> Result<Document, Invalid> {
    let below = |field: String| {
        move |error: Invalid| Invalid {
            field: format!("{field}.{}", error.field),
            ..error
        }
    };
    let networks = wire.networks.into_iter().enumerate().map(|(index, wire)| {
        let at = format!("networks[{index}]");
        let network = wire.network.ok_or_else(|| Invalid {
            field: format!("{at}.network"),
            message: "must be given".to_owned(),
        })?;
        let network = network.try_into().map_err(below(format!("{at}.network")))?;
        let peers = wire.peers.iter().map(|peer| {
            peer.parse().map_err(|_| Invalid {
                field: format!("{at}.peers"),
                message: format!("{peer:?} is not an IP address"),
            })
        });
        let interfaces = wire.interfaces.into_iter();
        let interfaces =
            interfaces.map(|interface| interface.try_into().map_err(below(format!("{at}.interfaces"))));
        Ok(HostNetwork {
            network,
            peers: peers.collect::<Result<_, _>>()?,
            interfaces: interfaces.collect::<Result<_, _>>()?,
        })
    });
    let groups = wire.security_groups.into_iter();
    let groups = groups.map(|group| group.try_into().map_err(below("security_groups".to_owned())));
    Ok(Document {
        version: wire.version,
        networks: networks.collect::<Result<_, _>>()?,
        groups: groups.collect::<Result<_, _>>()?,
    })
}

#[tonic::async_trait]
impl AgentNetworkService for Service {
    async fn apply_networks(
        &self,
        request: Request<wire::ApplyNetworksRequest>,
    ) -> Result<Response<wire::ApplyNetworksResponse>, Status> {
        let request = request.into_inner();
        pass(&self.gate, request.context).await?;
        let told = request
            .networks
            .ok_or_else(|| reason::invalid("networks", "must be given"))?;
        let told = document(told)
            .map_err(|error| reason::invalid(&format!("networks.{}", error.field), error.message))?;
        self.networks.tell(told).await.map_err(|error| status(&error))?;
        Ok(Response::new(wire::ApplyNetworksResponse {}))
    }
}
