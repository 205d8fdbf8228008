//! Carries out one step: one call to agents, and its result as one change of the state.
//!
//! Called by `runner`. Each change looks at the record again inside its transaction, since others may have changed it
//! while the call was under way.

use std::{sync::Arc, time::Duration};

use dalgu_proto::{
    ids::VmId,
    mutant::{self, Mutant},
    vm::first_boot::Documents,
};
use jiff::Timestamp;

use super::{
    apply::{self, Extent},
    let_go, migrate,
    plan::{self, Ending, Step},
};
use crate::{
    agent_client::{self, Agents},
    hosts, incarnation, migration,
    model::{
        Code, EventKind, Fault, HostState, MigrationRecord, OperationKind, OperationRecord, OperationState,
        Refusal, VmRecord,
    },
    state::{Db, State, Tx},
};

/// Time between two looks at a deletion.
const DELETE_POLL: Duration = Duration::from_millis(500);
/// Time until a VM on a host that does not report tries again, while enough others wait for such hosts.
const CROWDED: Duration = Duration::from_secs(1);

/// When the VM wants the next look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// At once.
    Now,
    /// After a while.
    After(Duration),
    /// When something changes.
    Idle,
}

/// Makes one pass over a VM.
pub async fn pass(db: &Db, agents: &Agents, id: VmId) -> Result<Next, agent_client::Error> {
    let state = db.snapshot();
    // After a restore nobody is commanded before an operator has looked at what hosts have.
    // Nor when agents obey another controller: two would work against each other.
    let replaced = state.replaced_by.is_some() && !mutant::on(Mutant::RefusedGoesOn);
    if state.meta.observing.is_some() || replaced {
        return Ok(Next::Idle);
    }
    let Some(vm) = state.vms.get(&id) else {
        return Box::pin(let_go::let_go(agents, &state, id)).await;
    };
    let migration = state.active_migration(id);
    let operations = state.active_operations(id);
    let input = input(&state, vm, migration.map(AsRef::as_ref), &operations, db.now());
    let step = plan::plan(&input);
    tracing::debug!(vm = %vm.name, ?step, "planned");
    let silent = |host| hosts::state_of(&state, host) == HostState::Unreachable;
    let far = silent(&vm.owner) || migration.is_some_and(|m| silent(&m.source) || silent(&m.destination));
    let calls = !matches!(step, Step::Wait(_) | Step::End(_));
    // Calls to hosts that probably do not answer must not take the places of all others.
    let _place = match agents.place_for_silent_host() {
        _ if !(far && calls) => None,
        Some(place) => Some(place),
        None => return Ok(Next::After(CROWDED)),
    };
    // On the heap: what most passes do needs little, and is not to carry what a migration needs.
    match step {
        Step::Wait(None) => Ok(Next::Idle),
        Step::Wait(Some(time)) => Ok(Next::After(time)),
        Step::End(endings) => {
            db.change(|tx| endings.into_iter().for_each(|ending| end(tx, ending)))
                .await;
            Ok(Next::Now)
        }
        Step::Ensure => Box::pin(ensure(db, agents, &state, vm)).await,
        Step::Delete => Box::pin(delete(db, agents, &state, vm)).await,
        Step::Migrate(step) => match migration {
            Some(record) => Box::pin(migrate::migrate(db, agents, &state, vm, record, step)).await,
            None => Ok(Next::Idle),
        },
    }
}

/// What a plan for a VM is made from.
pub fn input<'a>(
    state: &'a State,
    vm: &'a VmRecord,
    migration: Option<&'a MigrationRecord>,
    operations: &'a [Arc<OperationRecord>],
    now: Timestamp,
) -> plan::Input<'a> {
    plan::Input {
        now,
        vm,
        observation: state.observation(vm).map(AsRef::as_ref),
        refusal: state.refusals.get(&vm.id).map(AsRef::as_ref),
        host: hosts::state_of(state, &vm.owner),
        report_time: state.live.get(&vm.owner).and_then(|live| live.report_time),
        migration,
        migration_live: migration.map(|m| state.migration_live(m.id)).unwrap_or_default(),
        turn: migration.is_some_and(|m| has_turn(state, m)),
        operations,
    }
}

/// Whether both hosts of a migration have a place for one more transfer.
pub fn has_turn(state: &State, migration: &MigrationRecord) -> bool {
    let limit = migration::TRANSFERS_PER_HOST;
    state.transfers(&migration.source).0 < limit && state.transfers(&migration.destination).1 < limit
}

/// Ends an operation, unless it has ended meanwhile.
pub fn end(tx: &mut Tx, ending: Ending) {
    let Some(old) = tx
        .operations
        .get(&ending.operation)
        .filter(|operation| operation.is_active())
        .cloned()
    else {
        return;
    };
    let mut operation = (*old).clone();
    operation.state = ending.state;
    operation.error = ending.error;
    operation.message = ending.message;
    operation.end_time = Some(tx.now());
    let (reason, word) = match ending.state {
        OperationState::Active => return,
        OperationState::Succeeded => ("OperationSucceeded", "succeeded"),
        OperationState::Failed => ("OperationFailed", "failed"),
        OperationState::Cancelled => ("OperationCancelled", "was cancelled"),
    };
    let why = operation
        .error
        .as_ref()
        .map(|error| format!(": {}", error.message))
        .unwrap_or_default();
    let message = format!("{} {word}{why}", operation.kind.as_str());
    tx.event(
        EventKind::Operation,
        reason,
        &operation.vm_name,
        message,
        Some(operation.id),
    );
    if operation.state == OperationState::Succeeded {
        disks_are_made(tx, operation.vm);
    }
    tx.put_operation(operation);
}

/// From now on no host makes the VM's disks anew, and nobody needs what they were made from.
pub(super) fn disks_are_made(tx: &mut Tx, id: VmId) {
    if let Some(vm) = tx.vms.get(&id).filter(|vm| !vm.disks_made).cloned() {
        tx.put_vm(VmRecord {
            disks_made: true,
            documents: Documents::default(),
            ..(*vm).clone()
        });
    }
}

async fn ensure(db: &Db, agents: &Agents, state: &State, vm: &VmRecord) -> Result<Next, agent_client::Error> {
    match agents.ensure(state, vm).await {
        Ok(reported) => {
            db.change(|tx| apply::apply(tx, &vm.owner, vec![reported], Extent::Partial))
                .await;
            // What the agent accepted shows in the state; the change above asks for another look.
            Ok(Next::Idle)
        }
        Err(error) => {
            let Some(fault) = error.refusal() else {
                return Err(error);
            };
            tracing::error!(vm = %vm.name, host = %vm.owner, reason = fault.reason, "the agent refuses the VM");
            db.change(|tx| {
                // It may be gone, or another host's, meanwhile.
                let now = tx.vms.get(&vm.id);
                if now.is_none_or(|now| (&now.owner, now.epoch) != (&vm.owner, vm.epoch)) {
                    return;
                }
                let message = format!("host {} refuses it: {}", vm.owner, fault.message);
                tx.event(EventKind::Vm, "VmFailed", &vm.name, message, None);
                tx.refuse(
                    vm.id,
                    Some(Refusal {
                        generation: vm.intent.generation,
                        fault,
                    }),
                );
                tx.touch(vm.id);
            })
            .await;
            Ok(Next::Idle)
        }
    }
}

async fn delete(db: &Db, agents: &Agents, state: &State, vm: &VmRecord) -> Result<Next, agent_client::Error> {
    if let Some(later) = let_go::before_deletion(agents, state, vm).await? {
        return Ok(later);
    }
    if let Some(reported) = agents.delete(state, vm).await? {
        db.change(|tx| apply::apply(tx, &vm.owner, vec![reported], Extent::Partial))
            .await;
        return Ok(Next::After(DELETE_POLL));
    }
    // Asked for before a restore: a host that has not told what it has may have the VM.
    let before_restore = vm.unconfirmed && vm.backup_generation.is_some();
    if before_restore && !incarnation::is_nowhere(state, vm.id) {
        return Ok(Next::Idle);
    }
    db.change(|tx| remove(tx, vm)).await;
    Ok(Next::Idle)
}

/// The agent has nothing left of the VM: forget it, and end what waited for that.
fn remove(tx: &mut Tx, vm: &VmRecord) {
    for operation in tx.active_operations(vm.id) {
        let (state, error, message) = match operation.kind {
            OperationKind::Delete => (OperationState::Succeeded, None, String::new()),
            _ => {
                let message = if operation.cancel_requested {
                    "cancelled; the VM was deleted"
                } else {
                    "the VM was deleted"
                };
                let fault = Fault::new(Code::Cancelled, "CANCELLED", message);
                (OperationState::Cancelled, Some(fault), message.to_owned())
            }
        };
        end(
            tx,
            Ending {
                operation: operation.id,
                state,
                error,
                message,
            },
        );
    }
    tx.event(
        EventKind::Vm,
        "VmDeleted",
        &vm.name,
        format!("deleted from {}", vm.owner),
        None,
    );
    tx.delete_vm(vm.id);
}
