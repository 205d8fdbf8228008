//! The controller's gRPC services: who may call, what the wire means, and nothing else.
//!
//! One file a service. Each call is checked, becomes a value of the domain, and goes to `verbs`, `hosts` or a durable
//! snapshot. Generated types stop here.

pub mod backup;
pub mod event;
pub mod host;
pub mod image;
pub mod network;
pub mod operation;
pub mod page;
pub mod placement;
pub mod plan;
pub mod registrar;
pub mod request;
pub mod site;
pub mod snapshot;
pub mod vm;
pub mod volume;
pub mod wire;

use std::{collections::HashMap, sync::Arc};

use dalgu_proto::{
    reason,
    tls::{Peer, Role},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};

use crate::{
    agent_client::Agents,
    config::Config,
    metrics::Metrics,
    plans::usage::Usage,
    power::Power,
    state::Db,
    verbs::{self, MacHolder},
};

/// What the services work with.
#[derive(Clone)]
pub struct Services {
    /// The state.
    pub db: Db,
    /// The agents.
    pub agents: Arc<Agents>,
    /// How the controller runs.
    pub config: Arc<Config>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What asks hosts' management controllers.
    pub power: Arc<dyn Power>,
    /// What VMs have used of the processors, for plans.
    pub plan_usage: Usage,
    /// The controller is going down: streams and waits end.
    pub stop: CancellationToken,
}

fn peer<T>(request: &Request<T>) -> Result<&Peer, Status> {
    let missing = || {
        reason::status(
            Code::Unauthenticated,
            "NO_IDENTITY",
            "the connection has no identity",
        )
    };
    request.extensions().get::<Peer>().ok_or_else(missing)
}

/// Lets operators in.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn only_operators(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = peer(&request)?;
    if peer.role == Role::Operator {
        return Ok(request);
    }
    let message = format!("{peer} may not use the operator API; use an operator's certificate");
    Err(reason::status(Code::PermissionDenied, "NOT_OPERATOR", message))
}

/// Lets agents in.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn only_agents(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = peer(&request)?;
    if matches!(peer.role, Role::Agent(_)) {
        return Ok(request);
    }
    let message = format!("{peer} may not report for a host; use an agent's certificate");
    Err(reason::status(Code::PermissionDenied, "NOT_AGENT", message))
}

/// Lets everybody in who has an identity, which the connection has checked.
#[allow(
    clippy::result_large_err,
    reason = "tonic's error is what an interceptor returns"
)]
pub fn anybody(request: Request<()>) -> Result<Request<()>, Status> {
    peer(&request)?;
    Ok(request)
}

/// Refusals of verbs on the wire: code, reason, and what programs can use.
impl From<verbs::Error> for Status {
    fn from(error: verbs::Error) -> Self {
        if let verbs::Error::Invalid { field, message } = &error {
            return reason::invalid(field, message);
        }
        let (code, why) = error.reason();
        reason::status_with(code, why, error.to_string(), metadata(&error))
    }
}

/// At most so many bytes of verdicts travel in an error: it is carried in a header.
const VERDICTS_BYTES: usize = 4096;

fn metadata(error: &verbs::Error) -> HashMap<String, String> {
    let decision = match error {
        verbs::Error::NoCapacity { decision, .. } => decision,
        verbs::Error::MacInUse { mac, holder } => {
            let holder = match holder {
                MacHolder::Vm(name) => ("vm".to_owned(), name.to_string()),
                MacHolder::Nic(name) => ("nic".to_owned(), name.clone()),
            };
            return HashMap::from([("mac".to_owned(), mac.clone()), holder]);
        }
        _ => return HashMap::new(),
    };
    let mut facts = HashMap::new();
    let mut room = VERDICTS_BYTES;
    for verdict in &decision.verdicts {
        let texts: Vec<_> = verdict.shortfalls.iter().map(|s| s.message.as_str()).collect();
        let text = texts.join("; ");
        let size = verdict.host.as_str().len() + text.len();
        if size > room {
            facts.insert(
                "omitted".to_owned(),
                (decision.verdicts.len() - facts.len()).to_string(),
            );
            break;
        }
        room -= size;
        facts.insert(verdict.host.to_string(), text);
    }
    if let Some(hint) = &decision.hint {
        facts.insert("hint".to_owned(), hint.text.clone());
    }
    facts
}
