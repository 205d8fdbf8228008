//! Emptying a host, giving that up, and bringing its VMs back.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::ids::{HostName, VmName};

use super::{Caller, Error, host::find, room};
use crate::{
    drains::advance,
    model::{Direction, Drain, DrainMode, DrainState, DrainedVm, EventKind, HostRecord, Outcome, Stage},
    state::{State, Tx},
};

/// Why a host is cordoned that is drained, where it was not before.
const REASON: &str = "drained";

fn active(host: &HostRecord) -> Option<&Drain> {
    host.drain.as_ref().filter(|drain| drain.is_active())
}

/// Refuses what would work against a drain.
pub(super) fn none_under_way(host: &HostRecord) -> Result<(), Error> {
    match active(host) {
        Some(drain) => Err(Error::DrainInProgress {
            host: host.name.clone(),
            back: drain.direction == Direction::Back,
        }),
        None => Ok(()),
    }
}

fn new(tx: &Tx, caller: &Caller, direction: Direction, within: Duration) -> Drain {
    let now = tx.now();
    Drain {
        direction,
        state: DrainState::Active,
        principal: caller.principal.clone(),
        mode: None,
        begin_time: now,
        deadline: now.saturating_add(within).unwrap_or(now),
        end_time: None,
        vms: BTreeMap::new(),
    }
}

/// What earlier drains of a host moved or stopped and nothing has brought back, as it is in a drain; `None` where there was no drain.
fn away(state: &State, host: &HostRecord) -> Option<BTreeMap<VmName, DrainedVm>> {
    let last = advance::seen(state, host)?;
    let moved_on = |vm: &DrainedVm| {
        let owner = state.vms.get(&vm.vm).map(|record| &record.owner);
        vm.host.is_some() && owner.is_some() && owner != vm.host.as_ref()
    };
    let vms = last.vms.into_iter().filter_map(|(name, mut vm)| {
        match (last.direction, vm.stage) {
            // Whoever moved it on wants it there.
            (Direction::Out, Stage::Moved) if moved_on(&vm) => return None,
            // What is under way comes back when it is there.
            (Direction::Out, Stage::Moved | Stage::Moving | Stage::Stopped | Stage::Stopping)
            | (Direction::Back, Stage::Moving | Stage::Starting) => {}
            // What the last attempt did not bring back.
            (Direction::Back, Stage::Waiting | Stage::Blocked) => {
                vm.stage = match vm.mode {
                    DrainMode::Stop => Stage::Stopped,
                    _ => Stage::Moved,
                };
                vm.fault = None;
                vm.passes = false;
            }
            _ => return None,
        }
        vm.failures = 0;
        Some((name, vm))
    });
    Some(vms.collect())
}

/// Begins to empty a host. It is cordoned from now on.
pub fn drain(
    tx: &mut Tx,
    caller: &Caller,
    name: &str,
    within: Duration,
    mode: Option<DrainMode>,
) -> Result<Outcome, Error> {
    room(tx)?;
    let mut host = find(tx, name)?;
    none_under_way(&host)?;
    let mut drain = Drain {
        mode,
        ..new(tx, caller, Direction::Out, within)
    };
    // What an earlier one moved or stopped is brought back too. Of those that are here again the first pass takes note.
    drain.vms = away(tx, &host).unwrap_or_default();
    host.cordon.get_or_insert_with(|| REASON.to_owned());
    let message = format!("asked for by {}", caller.principal);
    tx.event(EventKind::Host, "HostDraining", &host.name, message, None);
    let name = host.name.clone();
    host.drain = Some(drain);
    tx.put_host(host);
    Ok(Outcome::Host(name))
}

/// Ends a drain where it is. What it began goes on; the host stays cordoned.
pub fn cancel(tx: &mut Tx, name: &str) -> Result<Outcome, Error> {
    let mut host = find(tx, name)?;
    let name = host.name.clone();
    let now = tx.now();
    match host.drain.as_mut().filter(|drain| drain.is_active()) {
        Some(drain) => {
            drain.state = DrainState::Cancelled;
            drain.end_time = Some(now);
        }
        None => return Err(not_drained(name, "is not being drained")),
    }
    let message = "given up; what was begun goes on";
    tx.event(EventKind::Host, "HostDrainCancelled", &name, message, None);
    tx.put_host(host);
    Ok(Outcome::Host(name))
}

fn not_drained(host: HostName, is: &'static str) -> Error {
    Error::NotDrained { host, is }
}

/// Opens a host that was drained, and brings back what that moved or stopped.
pub fn restore(tx: &mut Tx, caller: &Caller, name: &str, within: Duration) -> Result<Outcome, Error> {
    room(tx)?;
    let mut host = find(tx, name)?;
    none_under_way(&host)?;
    let Some(away) = away(tx, &host) else {
        return Err(not_drained(host.name, "was not drained"));
    };
    let mut drain = new(tx, caller, Direction::Back, within);
    drain.vms = away
        .into_iter()
        .map(|(name, mut vm)| {
            vm.mode = match vm.stage {
                Stage::Stopped | Stage::Stopping => DrainMode::Stop,
                Stage::Moved | Stage::Moving => DrainMode::LiveMigrate,
                _ => vm.mode,
            };
            vm.stage = Stage::Waiting;
            (name, vm)
        })
        .collect();
    host.cordon = None;
    let message = format!("open for VMs again, asked for by {}", caller.principal);
    tx.event(EventKind::Host, "HostRestoring", &host.name, message, None);
    let name = host.name.clone();
    host.drain = Some(drain);
    tx.put_host(host);
    Ok(Outcome::Host(name))
}
