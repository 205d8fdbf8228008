//! Rolling maintenance: hosts in groups that can be emptied at the same time, by name.

use std::collections::BTreeSet;

use dalgu_proto::ids::{HostName, VmName};
use jiff::Timestamp;

use super::{look::Look, usage::Usage};
use crate::{
    drains::advance::{asks, is_off, passes},
    hosts,
    model::{Code, Direction, DrainMode, Fault, HostState, VmRecord},
    planner::{self, HeldBy, Slot},
    state::State,
    verbs::{Error, migrate},
};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Hosts to be maintained.
    pub hosts: Vec<HostName>,
    /// What each group keeps to.
    pub settings: planner::Maintenance,
}

/// Hosts that can be empty at the same time.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The hosts.
    pub hosts: Vec<HostName>,
    /// VMs that move.
    pub moves: usize,
    /// What that copies, in MiB.
    pub copied_mib: u64,
    /// How long that is likely to take.
    pub predicted_seconds: f64,
}

/// A host that cannot be emptied.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// The host.
    pub host: HostName,
    /// The VM that holds it.
    pub vm: Option<VmName>,
    /// Why.
    pub fault: Fault,
}

/// Sorts hosts into groups. It takes long on a large site: not inside a transaction.
pub fn group(
    state: &State,
    usage: &Usage,
    now: Timestamp,
    ask: &Ask,
) -> Result<(Vec<Group>, Vec<Held>), Error> {
    let look = Look::of(state, usage, now);
    let mut seen = BTreeSet::new();
    let asked: Vec<_> = ask
        .hosts
        .iter()
        .filter(|host| seen.insert(*host))
        .cloned()
        .collect();
    let slots = look
        .slots(&asked)
        .map_err(|name| Error::HostNotFound(name.to_string()))?;
    let record = |vm: Slot| state.vms.get(&look.vm(vm));
    let mut held = Vec::new();
    let mut open = Vec::new();
    for (host, slot) in asked.into_iter().zip(slots) {
        let vms = look.site.here(slot).iter().filter_map(|vm| Some(&**record(*vm)?));
        match holds(state, &host, vms) {
            Some((vm, fault)) => held.push(Held { host, vm, fault }),
            None => open.push(slot),
        }
    }
    let leaves = |vm: Slot| record(vm).is_some_and(|vm| leaves(state, vm));
    let (found, without) = planner::groups(&look.site, &open, leaves, ask.settings);
    held.extend(without.into_iter().map(|(host, why)| {
        let (vm, fault) = match why {
            HeldBy::Vm(vm) => {
                let vm = record(vm).map(|vm| vm.name.clone());
                let name = vm.as_ref().map_or("a VM", VmName::as_str);
                let message = format!("no other host has room for {name}, or may have it");
                (vm, Fault::new(Code::ResourceExhausted, "NO_CAPACITY", message))
            }
            HeldBy::SpareRoom => {
                let message = "the VMs of a host that fails meanwhile might find no room: ask for it without a spare host, or make room";
                (None, Fault::new(Code::ResourceExhausted, "NO_SPARE_HOST", message))
            }
        };
        let host = look.host(host).clone();
        Held { host, vm, fault }
    }));
    let groups = found.into_iter().map(|group| Group {
        hosts: group.hosts.iter().map(|slot| look.host(*slot).clone()).collect(),
        moves: group.moves.len(),
        copied_mib: look.site.transfer_mib(&group.moves),
        predicted_seconds: look.steps(state, &group.moves).1,
    });
    Ok((groups.collect(), held))
}

/// Whether a drain moves a VM away.
fn leaves(state: &State, vm: &VmRecord) -> bool {
    vm.drain_mode == DrainMode::LiveMigrate && !is_off(state, vm)
}

/// What only people can help with: a host that is away, a VM that a drain could not move.
fn holds<'a>(
    state: &State,
    host: &HostName,
    mut vms: impl Iterator<Item = &'a VmRecord>,
) -> Option<(Option<VmName>, Fault)> {
    if hosts::state_of(state, host) != HostState::Ready {
        return Some((None, Error::HostUnreachable(host.clone()).fault()));
    }
    let record = state.hosts.get(host)?;
    if let Some(drain) = record.drain.as_ref().filter(|drain| drain.is_active()) {
        let (host, back) = (host.clone(), drain.direction == Direction::Back);
        return Some((None, Error::DrainInProgress { host, back }.fault()));
    }
    if let Some(reason) = &record.cordon {
        let message =
            format!("{host} is cordoned ({reason}), and would be opened: uncordon or restore it first");
        return Some((
            None,
            Fault::new(Code::FailedPrecondition, "HOST_CORDONED", message),
        ));
    }
    vms.find_map(|vm| {
        let fault = match vm.drain_mode {
            DrainMode::Ask => asks(&vm.name),
            DrainMode::LiveMigrate if leaves(state, vm) => {
                let error = migrate::possible(state, vm).err()?;
                (!passes(&error)).then(|| error.fault())?
            }
            _ => return None,
        };
        Some((Some(vm.name.clone()), fault))
    })
}
