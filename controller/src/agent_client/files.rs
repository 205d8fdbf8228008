//! What hosts' pools hold. Called by the API for the doctor.

use dalgu_proto::{
    agent::v1::{self as agent, agent_service_client::AgentServiceClient},
    ids::HostName,
};

use super::{Agents, Error, call};
use crate::{agent_wire, model::PoolFile, state::State};

impl Agents {
    /// What a pool of a host holds.
    pub async fn files(&self, state: &State, host: &HostName, pool: &str) -> Result<Vec<PoolFile>, Error> {
        let (caller, _) = self.reach(state, host)?;
        let request = agent::ListFilesRequest {
            pool: pool.to_owned(),
        };
        let mut client = AgentServiceClient::new(caller);
        let answer = call(host, "ListFiles", client.list_files(request)).await?;
        Ok(answer
            .files
            .into_iter()
            .filter_map(agent_wire::file::read)
            .collect())
    }
}
