//! Giving an operation up.

use dalgu_proto::ids::OperationId;

use super::{Caller, Error, abort_migration, power};
use crate::{
    model::{OperationKind, OperationRecord},
    state::Tx,
};

/// Asks that an operation be given up: a migration until it cuts over, a creation until it has ended.
pub fn cancel(tx: &mut Tx, caller: &Caller, id: OperationId) -> Result<(), Error> {
    let operation = tx
        .operations
        .get(&id)
        .cloned()
        .ok_or_else(|| Error::OperationNotFound(id.to_string()))?;
    if !operation.is_active() {
        let message = format!("operation {id} has ended already ({})", operation.state.as_str());
        return Err(Error::NotCancellable(message));
    }
    if operation.cancel_requested {
        return Ok(());
    }
    let vm = tx.vms.get(&operation.vm).map(|vm| (**vm).clone());
    match (operation.kind, vm) {
        (OperationKind::Create, Some(vm)) => {
            if vm.delete_time.is_none() {
                power::condemn(tx, vm, caller);
            }
        }
        (OperationKind::Migrate, Some(vm)) => {
            if !abort_migration(tx, &vm) {
                let message =
                    "the migration has cut over and cannot be cancelled: migrate back when it has ended";
                return Err(Error::NotCancellable(message.to_owned()));
            }
        }
        (kind, _) => {
            let message = format!("a {} cannot be cancelled: ask for the opposite", kind.as_str());
            return Err(Error::NotCancellable(message));
        }
    }
    tx.put_operation(OperationRecord {
        cancel_requested: true,
        ..(*operation).clone()
    });
    Ok(())
}
