//! Carries out one step of a migration. Called by `step`.
//!
//! What an agent answers is stored before the next step follows from it; each change looks at the record again inside its
//! transaction.

use std::time::Duration;

use dalgu_proto::{
    host::GuestFeature,
    ids::{HostName, MigrationId},
    mutant::{self, Mutant},
    vm::PowerState,
};

use super::{
    plan::Ending,
    step::{Next, end, has_turn},
};
use crate::{
    agent_client::{self, Agents},
    agent_wire::Part,
    hosts, images,
    migration::{self, Side, decide},
    model::{
        Answer, Code, EventKind, Fault, HostState, MigrationLive, MigrationRecord, OperationState, Phase,
        Transfer, VmRecord,
    },
    networks,
    state::{Db, State, Tx},
};

/// Time between two looks at what needs an operator.
const SLOW_POLL: Duration = Duration::from_secs(5);
/// Time between two looks at a destination that fetches images.
const FETCH_POLL: Duration = Duration::from_secs(1);
/// Time between two looks at hosts that do not know the VM's networks yet.
const NETWORK_POLL: Duration = Duration::from_millis(100);
/// Time between two looks at a host that tidies up.
pub const FINISH_POLL: Duration = Duration::from_millis(200);

/// Carries out a step of a VM's migration.
pub async fn migrate(
    db: &Db,
    agents: &Agents,
    state: &State,
    vm: &VmRecord,
    record: &MigrationRecord,
    step: migration::Step,
) -> Result<Next, agent_client::Error> {
    match step {
        migration::Step::Wait(time) => Ok(Next::After(time)),
        migration::Step::Advance(phase, fault) => {
            advance(db, record, phase, fault).await;
            Ok(Next::Now)
        }
        migration::Step::Prepare => {
            let outcome = agents.prepare(state, vm, record).await;
            if outcome.as_ref().is_err_and(|error| error.is("IMAGE_FETCHING")) {
                return Ok(fetching(db, vm, record).await);
            }
            if outcome.as_ref().is_err_and(|error| error.is("NETWORK_NOT_READY")) {
                return Ok(Next::After(NETWORK_POLL));
            }
            carry_on(db, record, outcome, Some(Phase::Transferring)).await
        }
        migration::Step::Start if awaits_networks(db, state, vm, record) => Ok(Next::After(NETWORK_POLL)),
        migration::Step::Start => {
            let outcome = agents.start(state, record).await;
            carry_on(db, record, outcome, None).await
        }
        migration::Step::Poll => poll(db, agents, state, record).await,
        migration::Step::Settle { source, destination } => {
            settle(db, agents, state, record, source, destination).await
        }
        migration::Step::Decide => {
            db.change(|tx| settle_owner(tx, record.id)).await;
            Ok(Next::Now)
        }
        migration::Step::Finish(side) => finish(db, agents, state, vm, record, side).await,
    }
}

/// Whether hosts are still to hear that the VM's networks are on its destination: its guests' answers would go to where it was.
/// One that does not take what it is told holds it up for a while only.
fn awaits_networks(db: &Db, state: &State, vm: &VmRecord, record: &MigrationRecord) -> bool {
    let unaware = networks::plan::unaware(state, vm, record);
    if unaware.is_empty() {
        return false;
    }
    let waited = db.now().duration_since(record.phase_time);
    if Duration::try_from(waited).is_ok_and(|waited| waited < migration::NETWORK_LIMIT) {
        return true;
    }
    tracing::warn!(vm = %vm.name, migration = %record.id, hosts = ?unaware,
        "hosts have not taken up where a VM goes; it is sent all the same");
    false
}

async fn advance(db: &Db, record: &MigrationRecord, phase: Phase, fault: Option<Fault>) {
    let (id, from) = (record.id, record.phase);
    db.change(|tx| {
        let Some(now) = tx.migrations.get(&id).filter(|m| m.phase == from).cloned() else {
            return;
        };
        // Looked at again here, where nobody else can take the place.
        if phase == Phase::PreparingDestination && (!has_turn(tx, &now) || now.abort_requested) {
            return;
        }
        enter(tx, (*now).clone(), phase, fault);
    })
    .await;
}

/// Stores a phase, tells of it, and ends the operation with the migration.
fn enter(tx: &mut Tx, mut record: MigrationRecord, phase: Phase, fault: Option<Fault>) {
    record.phase = phase;
    record.phase_time = tx.now();
    record.source_told |= phase == Phase::Transferring;
    record.error = record.error.or(fault);
    // So that it outlives this run of the controller, and the source's agent.
    record.progress = record.progress.or_else(|| tx.migration_live(record.id).progress);
    let name = tx
        .vms
        .get(&record.vm)
        .map(|vm| vm.name.to_string())
        .unwrap_or_default();
    let (source, destination) = (&record.source, &record.destination);
    let message = format!("{} ({source} to {destination})", phase.as_str());
    tx.event(
        EventKind::Operation,
        "MigrationPhase",
        &name,
        message,
        Some(record.operation),
    );
    tracing::info!(vm = name, migration = %record.id, phase = phase.as_str(), "migration");
    let (operation, state, error, message) = match phase {
        Phase::Done => (
            record.operation,
            OperationState::Succeeded,
            None,
            format!("it runs on {destination}"),
        ),
        Phase::Aborted => {
            let message = format!("cancelled; it stayed on {source}");
            let fault = Fault::new(Code::Cancelled, "CANCELLED", message.clone());
            (record.operation, OperationState::Cancelled, Some(fault), message)
        }
        Phase::Failed => {
            let fault = record.error.clone().unwrap_or_else(|| {
                let message = format!("the transfer did not succeed; it stayed on {source}");
                Fault::new(Code::Aborted, "MIGRATION_FAILED", message)
            });
            (
                record.operation,
                OperationState::Failed,
                Some(fault.clone()),
                fault.message,
            )
        }
        _ => return tx.put_migration(record),
    };
    tx.put_migration(record);
    end(
        tx,
        Ending {
            operation,
            state,
            error,
            message,
        },
    );
}

/// After a command to one side: on, again later, or, when it will never be obeyed, to the settlement.
async fn carry_on(
    db: &Db,
    record: &MigrationRecord,
    outcome: Result<(), agent_client::Error>,
    on: Option<Phase>,
) -> Result<Next, agent_client::Error> {
    match outcome {
        Ok(()) => {
            match on {
                Some(phase) => advance(db, record, phase, None).await,
                None => note(db, record.id, |live| live.started = true).await,
            }
            Ok(Next::Now)
        }
        Err(error) => {
            let Some(fault) = error.refusal() else {
                return Err(error);
            };
            tracing::warn!(migration = %record.id, reason = fault.reason, "a host refuses its part in a migration");
            advance(db, record, Phase::CuttingOver, Some(fault)).await;
            Ok(Next::Now)
        }
    }
}

/// The destination fetches the images that the VM's disks are made from, as its reports show. The wait for it begins anew
/// while it gets on, and is stored then, so that no start of the controller makes it longer or shorter by much.
async fn fetching(db: &Db, vm: &VmRecord, record: &MigrationRecord) -> Next {
    db.change(|tx| {
        let there = images::bytes_there(tx, vm, &record.destination);
        let mut live = tx.migration_live(record.id);
        let gets_on = live.fetched_bytes.is_none_or(|before| there > before);
        let Some(now) = tx.migrations.get(&record.id).cloned() else {
            return;
        };
        if !gets_on || now.phase != Phase::PreparingDestination {
            return;
        }
        live.fetched_bytes = Some(there);
        tx.set_migration_live(record.id, live);
        let age = tx.now().duration_since(now.phase_time);
        if Duration::try_from(age).is_ok_and(|age| age >= migration::ANSWER_LIMIT / 4) {
            tx.put_migration(MigrationRecord {
                phase_time: tx.now(),
                ..(*now).clone()
            });
        }
    })
    .await;
    Next::After(FETCH_POLL)
}

async fn note(db: &Db, id: MigrationId, change: impl FnOnce(&mut MigrationLive)) {
    db.change(|tx| {
        let mut live = tx.migration_live(id);
        change(&mut live);
        if tx.migrations.get(&id).is_some_and(|m| !m.phase.is_terminal()) {
            tx.set_migration_live(id, live);
        }
    })
    .await;
}

async fn poll(
    db: &Db,
    agents: &Agents,
    state: &State,
    record: &MigrationRecord,
) -> Result<Next, agent_client::Error> {
    let part = agents.part(state, &record.source, record.id).await?;
    if part.progress.is_some() {
        note(db, record.id, |live| live.progress = part.progress).await;
    }
    match part.transfer {
        Transfer::Completed => advance(db, record, Phase::CuttingOver, None).await,
        Transfer::Failed => {
            let (reason, message) = match part.fault {
                Some(fault) => (fault.reason, fault.message),
                None => (
                    "TRANSFER_FAILED".to_owned(),
                    "the transfer failed; see the source agent's log".to_owned(),
                ),
            };
            advance(
                db,
                record,
                Phase::CuttingOver,
                Some(Fault::new(Code::Aborted, &reason, message)),
            )
            .await;
        }
        Transfer::Unknown if part.known && !part.settled => return Ok(Next::After(migration::POLL)),
        Transfer::Unknown => {
            let message = format!("host {} no longer knows of the transfer", record.source);
            advance(
                db,
                record,
                Phase::CuttingOver,
                Some(Fault::new(Code::Aborted, "TRANSFER_LOST", message)),
            )
            .await;
        }
    }
    Ok(Next::Now)
}

async fn settle(
    db: &Db,
    agents: &Agents,
    state: &State,
    record: &MigrationRecord,
    source: bool,
    destination: bool,
) -> Result<Next, agent_client::Error> {
    let ask = |host: HostName, wanted: bool| async move {
        if wanted {
            Some(agents.settle(state, &host, record.id, record.vm).await)
        } else {
            None
        }
    };
    let (at_source, at_destination) = futures::join!(
        ask(record.source.clone(), source),
        ask(record.destination.clone(), destination)
    );
    let mut failure = None;
    let mut doubt = None;
    let mut read = |host: &HostName, said: Option<Result<Part, agent_client::Error>>| match said? {
        Ok(part) => {
            let answer = answer(&part);
            if answer.is_none() {
                doubt = Some(format!("host {host} cannot say yet what it has of the VM"));
            }
            answer.map(|answer| (answer, part))
        }
        Err(error) => {
            doubt = Some(format!("host {host} cannot be asked where the VM is: {error}"));
            failure = Some(error);
            None
        }
    };
    let from_source = read(&record.source, at_source);
    let from_destination = read(&record.destination, at_destination);
    let in_doubt = doubt.is_some();
    let conflict = db
        .change(|tx| store_answers(tx, record.id, from_source, from_destination, doubt))
        .await;
    match failure {
        Some(error) => Err(error),
        None if conflict => Ok(Next::After(SLOW_POLL)),
        // Asked again at once, it would not know either.
        None if in_doubt => Ok(Next::After(migration::POLL)),
        None => Ok(Next::Now),
    }
}

/// What a host's part says once it is settled and knows what it has.
fn answer(part: &Part) -> Option<Answer> {
    let presence = part
        .presence
        .filter(|_| part.settled || mutant::on(Mutant::RevocationNotAwaited))?;
    Some(Answer {
        presence,
        transfer: part.transfer,
        owner: part.owner,
    })
}

/// Whether there is no answer to the question of who owns the VM, only a person's.
fn store_answers(
    tx: &mut Tx,
    id: MigrationId,
    source: Option<(Answer, Part)>,
    destination: Option<(Answer, Part)>,
    doubt: Option<String>,
) -> bool {
    let Some(old) = tx
        .migrations
        .get(&id)
        .filter(|m| m.phase == Phase::CuttingOver)
        .cloned()
    else {
        return false;
    };
    let mut record = (*old).clone();
    if let Some((answer, part)) = source {
        record.source_answer = Some(answer);
        record.progress = part
            .progress
            .or(record.progress)
            .or_else(|| tx.migration_live(id).progress);
    }
    if let Some((answer, part)) = destination {
        record.destination_answer = Some(answer);
        record.network_delay_ms = part.network_delay_ms;
        record.network_blackout_ms = part.network_blackout_ms;
    }
    let mut live = tx.migration_live(id);
    let was_in_doubt = live.doubt.is_some();
    live.doubt = doubt;
    let mut conflict = false;
    if let (Some(source), Some(destination)) = migration::answers(&record)
        && let decide::Decision::Conflict { reason } = decide::decide(source, destination)
    {
        conflict = true;
        live.doubt = Some(format!(
            "{reason}: stop it by hand on {} or on {} (virsh destroy), then it goes on",
            record.source, record.destination
        ));
    }
    if conflict && !was_in_doubt {
        let name = tx
            .vms
            .get(&record.vm)
            .map(|vm| vm.name.to_string())
            .unwrap_or_default();
        tracing::error!(vm = name, migration = %id, "a VM runs on two hosts; an operator must stop one");
        let message = live.doubt.clone().unwrap_or_default();
        tx.event(EventKind::Vm, "VmConflict", name, message, Some(record.operation));
    }
    tx.set_migration_live(id, live);
    if *old != record {
        tx.put_migration(record);
    }
    conflict
}

/// Gives the VM to the side that has it: owner, ownership number and phase in one change.
fn settle_owner(tx: &mut Tx, id: MigrationId) {
    let Some(record) = tx
        .migrations
        .get(&id)
        .filter(|m| m.phase == Phase::CuttingOver)
        .cloned()
    else {
        return;
    };
    let (Some(source), Some(destination)) = migration::answers(&record) else {
        return;
    };
    let decide::Decision::Owner { side, lost, reason } = decide::decide(source, destination) else {
        return;
    };
    let Some(mut vm) = tx.vms.get(&record.vm).map(|vm| (**vm).clone()) else {
        return;
    };
    let phase = match side {
        Side::Destination => {
            vm.owner = record.destination.clone();
            vm.epoch = record.destination_epoch;
            vm.decision = record.decision.clone();
            vm.decide_time = tx.now();
            // The destination has made them, or the VM would not be there.
            vm.new_volumes.clear();
            Phase::CleaningSource
        }
        Side::Source => {
            vm.epoch = record.destination_epoch.next();
            Phase::CleaningDestination
        }
    };
    if lost && vm.intent.power != PowerState::Stopped {
        // Nothing of its memory is left anywhere: it is to be started, as after a crash.
        vm.intent.generation = vm.intent.generation.next();
        vm.intent.power_sequence = vm.intent.power_sequence.saturating_add(1);
        tracing::error!(vm = %vm.name, migration = %id, "the VM's memory was lost in a migration; it is started anew");
        tx.event(
            EventKind::Vm,
            "VmLost",
            &vm.name,
            format!("{reason}; it is started anew"),
            Some(record.operation),
        );
    }
    if side == Side::Destination {
        let message = format!("migrated from {} to {}", record.source, record.destination);
        tx.event(
            EventKind::Vm,
            "VmMigrated",
            &vm.name,
            message,
            Some(record.operation),
        );
    }
    tracing::info!(vm = %vm.name, migration = %id, owner = %vm.owner, reason, "the owner is settled");
    tx.observe(vm.id, None);
    tx.put_vm(vm);
    let live = MigrationLive {
        doubt: None,
        ..tx.migration_live(id)
    };
    tx.set_migration_live(id, live);
    enter(tx, (*record).clone(), phase, None);
}

async fn finish(
    db: &Db,
    agents: &Agents,
    state: &State,
    vm: &VmRecord,
    record: &MigrationRecord,
    side: Side,
) -> Result<Next, agent_client::Error> {
    if side == Side::Source && await_delay(db, agents, state, vm, record).await {
        return Ok(Next::After(FINISH_POLL));
    }
    let host = match side {
        Side::Source => &record.source,
        Side::Destination => &record.destination,
    };
    let owner = *host == vm.owner;
    let done = match agents
        .finish(state, host, record.id, vm.id, owner, vm.epoch)
        .await
    {
        // It was told to delete the VM, by another controller beside this one: that is what its owner wants.
        Err(error) if owner && vm.delete_time.is_some() && error.is("MIGRATION_OVER") => true,
        done => done?,
    };
    if !done {
        return Ok(Next::After(FINISH_POLL));
    }
    let (id, from) = (record.id, record.phase);
    db.change(|tx| {
        let Some(old) = tx.migrations.get(&id).filter(|m| m.phase == from).cloned() else {
            return;
        };
        let mut record = (*old).clone();
        match side {
            Side::Source => record.source_finished = true,
            Side::Destination => record.destination_finished = true,
        }
        // The last one to finish ends it, in the same write.
        match migration::next(&record, &MigrationLive::default(), true, tx.now()) {
            migration::Step::Advance(phase, fault) => enter(tx, record, phase, fault),
            _ => tx.put_migration(record),
        }
    })
    .await;
    Ok(Next::Now)
}

/// Whether the destination is still to say when the VM's first packet left it. It measures where it has networks of the site,
/// and is not waited for long: the VM runs, and only the figure is missing.
async fn await_delay(
    db: &Db,
    agents: &Agents,
    state: &State,
    vm: &VmRecord,
    record: &MigrationRecord,
) -> bool {
    let arrived = record.phase == Phase::CleaningSource && record.network_delay_ms.is_none();
    let destination = state.hosts.get(&record.destination);
    let measures =
        destination.is_some_and(|host| host.inventory.guest_features.contains(&GuestFeature::Network));
    let heard = hosts::state_of(state, &record.destination) == HostState::Ready;
    let waited = Duration::try_from(db.now().duration_since(record.phase_time));
    let in_time = waited.is_ok_and(|waited| waited < migration::DELAY_LIMIT);
    if !arrived || !measures || !heard || !in_time || vm.spec.nics.is_empty() {
        return false;
    }
    let part = agents.part(state, &record.destination, record.id).await;
    let Some(part) = part.ok().filter(|part| part.network_delay_ms.is_some()) else {
        return true;
    };
    let id = record.id;
    db.change(|tx| {
        if let Some(record) = tx
            .migrations
            .get(&id)
            .filter(|m| m.phase == Phase::CleaningSource)
            .cloned()
        {
            tx.put_migration(MigrationRecord {
                network_delay_ms: part.network_delay_ms,
                network_blackout_ms: part.network_blackout_ms,
                ..(*record).clone()
            });
        }
    })
    .await;
    false
}

#[cfg(test)]
mod tests;
