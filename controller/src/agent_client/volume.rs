//! Commands about volumes. Called by `volumes::runner`.

use dalgu_proto::{
    agent::v1::{self as agent, agent_volume_service_client::AgentVolumeServiceClient},
    ids::{HostName, VolumeId},
};

use super::{Agents, Error, call};
use crate::state::State;

impl Agents {
    /// Tells a host to remove a volume's file; nothing of it is left there when this returns.
    pub async fn delete_volume(
        &self,
        state: &State,
        host: &HostName,
        volume: VolumeId,
        pool: &str,
    ) -> Result<(), Error> {
        let (caller, context) = self.reach(state, host)?;
        let request = agent::DeleteVolumeRequest {
            context,
            volume_uid: volume.to_string(),
            pool: pool.to_owned(),
        };
        let mut client = AgentVolumeServiceClient::new(caller);
        call(host, "DeleteVolume", client.delete_volume(request)).await?;
        Ok(())
    }
}
