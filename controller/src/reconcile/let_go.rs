//! A host that was made ready for a VM which is no more lets go of what it prepared.
//!
//! It comes about by a restore: the backup knows neither of the migration nor, once the VM was deleted, of the VM. Called by
//! `step` for a VM that has no record, asked for by `apply`.

use dalgu_proto::ids::{HostName, MigrationId, VmId};

use super::{migrate::FINISH_POLL, step::Next};
use crate::{
    agent_client::{self, Agents},
    agent_wire::Reported,
    migration,
    model::{Presence, VmPhase},
    state::State,
};

/// The migration that a host has room for, where there is nothing of the VM but that room. A domain may hold the VM's only
/// memory: that is for a person. A store that was never restored forgets no migration; only an old copy of it would.
pub fn prepared(state: &State, reported: &Reported) -> Option<MigrationId> {
    let seen = &reported.observation;
    let room = seen.phase == VmPhase::Incoming && seen.power.is_none();
    let forgotten = state.meta.restores() > 0 && !state.vms.contains_key(&reported.id);
    reported.migration.filter(|_| room && forgotten)
}

/// Tells the hosts that were made ready for a VM without a record that it does not come.
pub async fn let_go(agents: &Agents, state: &State, vm: VmId) -> Result<Next, agent_client::Error> {
    let strays = state.strays.iter();
    let strays = strays.filter(|((_, id), stray)| *id == vm && stray.times > 1);
    let found: Vec<_> = strays
        .filter_map(|((host, _), stray)| Some((host, prepared(state, &stray.reported)?, stray)))
        .collect();
    let mut next = Next::Idle;
    for (host, id, stray) in found {
        // What has come meanwhile stays.
        let part = agents.settle(state, host, id, vm).await?;
        if !part.settled || part.presence != Some(Presence::Absent) {
            next = Next::After(migration::POLL);
            continue;
        }
        let epoch = stray.reported.observation.epoch;
        if !agents.finish(state, host, id, vm, false, epoch).await? {
            next = Next::After(FINISH_POLL);
            continue;
        }
        told(host, vm, id);
    }
    Ok(next)
}

fn told(host: &HostName, vm: VmId, migration: MigrationId) {
    tracing::info!(%host, %vm, %migration, "the host was ready for a VM that is no more, and has let go of it");
}
