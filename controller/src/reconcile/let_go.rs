//! A host lets go of what a migration left on it of a VM that is no more.
//!
//! It comes about by a restore: the backup knows neither of the migration nor, once the VM was deleted, of the VM. Called by
//! `step` for a VM that has no record, asked for by `apply`.

use dalgu_proto::ids::{HostName, MigrationId, VmId};

use super::{migrate::FINISH_POLL, step::Next};
use crate::{
    agent_client::{self, Agents},
    agent_wire::Reported,
    incarnation, migration,
    model::{Presence, VmPhase, VmRecord},
    state::State,
};

/// The migration that a host still takes part in, where it has no domain of the VM, and nobody will end it: it was made ready
/// for a VM without a record, or has sent one that was deleted since, as its operations tell. A domain may hold the VM's only
/// memory, and the disks of a VM that this store never knew may be its only ones: those are for a person. A store that was
/// never restored forgets no migration; only an old copy of it would.
pub fn remnant(state: &State, reported: &Reported) -> Option<MigrationId> {
    let seen = &reported.observation;
    let forgotten = state.meta.restores() > 0 && !state.vms.contains_key(&reported.id);
    if !forgotten || seen.power.is_some() {
        return None;
    }
    let deleted = || state.operations.values().any(|done| done.vm == reported.id);
    let over = match seen.phase {
        VmPhase::Incoming => true,
        VmPhase::Outgoing => deleted(),
        _ => false,
    };
    reported.migration.filter(|_| over)
}

/// Tells the hosts that have a [`remnant`] of a VM without a record that it is not theirs.
pub async fn let_go(agents: &Agents, state: &State, vm: VmId) -> Result<Next, agent_client::Error> {
    let strays = state.strays.iter();
    let strays = strays.filter(|((_, id), stray)| *id == vm && stray.times > 1);
    let mut next = Next::Idle;
    for ((host, _), stray) in strays {
        if let Some(id) = remnant(state, &stray.reported)
            && let Some(later) = tell(agents, state, host, &stray.reported, id).await?
        {
            next = later;
        }
    }
    Ok(next)
}

/// The same before a VM is deleted of which its owner has nothing but that; `None` when there is nothing in the way, or
/// another host has the VM, or may have it.
pub async fn before_deletion(
    agents: &Agents,
    state: &State,
    vm: &VmRecord,
) -> Result<Option<Next>, agent_client::Error> {
    let shown = state.sightings.get(&vm.id).and_then(|shown| shown.get(&vm.owner));
    let Some(reported) = shown.filter(|_| vm.unconfirmed && incarnation::is_nowhere(state, vm.id)) else {
        return Ok(None);
    };
    let seen = &reported.observation;
    let part = seen.phase.is_migrating() && seen.power.is_none();
    match reported.migration.filter(|_| part) {
        Some(id) => tell(agents, state, &vm.owner, reported, id).await,
        None => Ok(None),
    }
}

/// When to ask again; `None` once the host has let go.
async fn tell(
    agents: &Agents,
    state: &State,
    host: &HostName,
    reported: &Reported,
    id: MigrationId,
) -> Result<Option<Next>, agent_client::Error> {
    // What has come meanwhile stays. A memory that was handed over is none.
    let part = agents.settle(state, host, id, reported.id).await?;
    if !part.settled || !matches!(part.presence, Some(Presence::Absent | Presence::HandedOver)) {
        return Ok(Some(Next::After(migration::POLL)));
    }
    let epoch = reported.observation.epoch;
    if !agents.finish(state, host, id, reported.id, false, epoch).await? {
        return Ok(Some(Next::After(FINISH_POLL)));
    }
    let (vm, migration) = (reported.id, id);
    tracing::info!(%host, %vm, %migration, "the host has let go of what a migration left of a VM");
    Ok(None)
}
