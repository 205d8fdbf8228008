//! What operators do with placement groups, and what keeps their rules where something else is changed.

use std::collections::BTreeSet;

use dalgu_proto::{
    ids::PlacementGroupName,
    placement::{Group, Toleration},
};

use super::{Error, room};
use crate::{
    hosts,
    model::{HostRecord, Outcome, PlacementGroupRecord, VmRecord},
    placement::{self, Request},
    placement_groups::{MAX_PLACEMENT_GROUPS, broken, of_group, of_vm},
    state::{State, Tx},
};

/// The group of that name.
pub fn find(state: &State, name: &PlacementGroupName) -> Result<PlacementGroupRecord, Error> {
    let group = state.placement_groups.get(name);
    let group = group.ok_or_else(|| Error::PlacementGroupNotFound(name.clone()))?;
    Ok((**group).clone())
}

/// Refuses groups that are not there.
pub fn are_there(state: &State, names: &BTreeSet<PlacementGroupName>) -> Result<(), Error> {
    match names
        .iter()
        .find(|name| !state.placement_groups.contains_key(*name))
    {
        Some(missing) => Err(Error::PlacementGroupNotFound(missing.clone())),
        None => Ok(()),
    }
}

/// Makes a placement group.
pub fn create(tx: &mut Tx, group: Group, description: String) -> Result<Outcome, Error> {
    room(tx)?;
    if tx.placement_groups.contains_key(&group.name) {
        return Err(Error::PlacementGroupExists(group.name));
    }
    if tx.placement_groups.len() >= MAX_PLACEMENT_GROUPS {
        return Err(Error::TooMany {
            what: "placement groups",
            most: MAX_PLACEMENT_GROUPS,
        });
    }
    can_hold(tx, &group)?;
    let name = group.name.clone();
    let create_time = tx.now();
    tx.put_placement_group(PlacementGroupRecord {
        group,
        description,
        create_time,
        revision: 0,
    });
    Ok(Outcome::PlacementGroup(name))
}

/// Refuses a required rule by a label that no host has: no VM could ever be in the group. A site that has no host yet may say first how it is to be.
fn can_hold(state: &State, group: &Group) -> Result<(), Error> {
    let Some(key) = group.topology_key.as_ref().filter(|_| !group.preferred) else {
        return Ok(());
    };
    let mut hosts = state.hosts.values();
    let Some(first) = state
        .hosts
        .keys()
        .next()
        .filter(|_| hosts.all(|host| !host.labels.contains_key(key)))
    else {
        return Ok(());
    };
    Err(Error::PlacementConflict(format!(
        "no host has a label {key}, by which group {} would go, so that no VM could be in it: give hosts one (`dalgu host label {first} {key}=...`), \
         choose a label that hosts have, or make the rule a preferred one",
        group.name
    )))
}

/// Deletes a placement group that no VM is in.
pub fn delete(tx: &mut Tx, name: &PlacementGroupName) -> Result<Outcome, Error> {
    let record = find(tx, name)?;
    let names: BTreeSet<_> = of_group(tx, &record.group).map(|vm| &vm.name).collect();
    if let Some(first) = names.first() {
        return Err(Error::PlacementGroupInUse {
            group: name.clone(),
            vms: names.len(),
            first: (*first).clone(),
        });
    }
    tx.delete_placement_group(name);
    Ok(Outcome::PlacementGroupDeleted)
}

/// What a VM's groups and tolerations are to be; `None` leaves them as they are.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Groups, all of them.
    pub groups: Option<BTreeSet<PlacementGroupName>>,
    /// Tolerations, all of them.
    pub tolerations: Option<BTreeSet<Toleration>>,
}

/// Changes a VM's groups and tolerations. It stays where it is: refuses a group whose rule does not hold there.
pub(super) fn update(tx: &Tx, vm: &mut VmRecord, update: Update) -> Result<(), Error> {
    vm.tolerations = update.tolerations.unwrap_or_else(|| vm.tolerations.clone());
    let Some(groups) = update.groups else {
        return Ok(());
    };
    are_there(tx, &groups)?;
    let joined: BTreeSet<_> = groups.difference(&vm.placement_groups).cloned().collect();
    vm.placement_groups = groups;
    if joined.is_empty() {
        return Ok(());
    }
    if tx.active_migrations.contains_key(&vm.id) {
        return Err(Error::MigrationInProgress(vm.name.clone()));
    }
    let rules = of_vm(tx, vm, None);
    let Some(host) = tx.hosts.get(&vm.owner) else {
        return Ok(());
    };
    let view = hosts::view(tx, host);
    let request = Request::new(vm.spec.clone()).with_rules(rules);
    let fault = placement::broken(&request, &view, &joined);
    let Some(fault) = fault else { return Ok(()) };
    // Where no host would do, that is what is wrong; else it is where the VM is.
    let message = placement::conflict(&request, &hosts::views(tx)).unwrap_or_else(|| {
        format!(
            "{} is on host {}, and there {fault}: migrate it first, or make it anew in the group",
            vm.name, vm.owner
        )
    });
    Err(Error::PlacementConflict(message))
}

/// Refuses labels of a host with which a required rule would hold no more.
pub(super) fn keeps_rules(state: &State, old: &HostRecord, new: &HostRecord) -> Result<(), Error> {
    let here = state.host_vms.get(&old.name).into_iter().flatten();
    let groups = here
        .filter_map(|id| state.vms.get(id))
        .flat_map(|vm| &vm.placement_groups);
    let moved = |record: &&PlacementGroupRecord| {
        let key = record.group.topology_key.as_ref();
        !record.group.preferred && key.is_some_and(|key| old.labels.get(key) != new.labels.get(key))
    };
    let names: BTreeSet<_> = groups.collect();
    let records = names
        .into_iter()
        .filter_map(|name| state.placement_groups.get(name));
    let records: Vec<_> = records.map(AsRef::as_ref).filter(moved).collect();
    if records.is_empty() {
        return Ok(());
    }
    let mut after = state.clone();
    after.hosts.insert(new.name.clone(), new.clone().into());
    for record in records {
        let fault = broken(&after, record).filter(|_| broken(state, record).is_none());
        if let Some(fault) = fault {
            let message = format!(
                "with these labels of {} the rule of group {} holds no more: {fault}",
                new.name, record.group.name
            );
            return Err(Error::PlacementConflict(message));
        }
    }
    Ok(())
}
