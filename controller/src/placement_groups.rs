//! Placement groups: what they say of one VM on the state as it is, and whether they hold where their members are. Pure.
//!
//! Called inside the transaction that decides, so that members whose place is only reserved count: concurrent creations cannot break a rule.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    ids::{HostName, PlacementGroupName, VmName},
    placement::{Group, Rule, Toleration},
    vm::PowerState,
};

use crate::{
    model::{Direction, Drain, DrainMode, PlacementGroupRecord, VmRecord},
    placement::{Held, Members, Rules, domain},
    state::State,
};

/// Most placement groups of a site.
pub const MAX_PLACEMENT_GROUPS: usize = 4096;

/// What groups and tolerations say of a VM that is to be made.
pub fn of_new(
    state: &State,
    groups: &BTreeSet<PlacementGroupName>,
    tolerations: &BTreeSet<Toleration>,
) -> Rules {
    rules(state, groups, tolerations, |_, _| Some(Vec::new()))
}

/// What they say of a VM that is there, wherever it goes, or to one host.
pub fn of_vm(state: &State, vm: &VmRecord, destination: Option<&HostName>) -> Rules {
    rules(state, &vm.placement_groups, &vm.tolerations, |group, member| {
        if member.id == vm.id {
            return None;
        }
        let along = group.rule == Rule::Affinity && goes_along(state, vm, destination, member);
        Some(if along { vec![&member.owner] } else { Vec::new() })
    })
}

/// `left` says which hosts a member is on that it is about to leave; `None` for one that does not count.
fn rules<'a>(
    state: &'a State,
    groups: &BTreeSet<PlacementGroupName>,
    tolerations: &BTreeSet<Toleration>,
    left: impl Fn(&Group, &'a VmRecord) -> Option<Vec<&'a HostName>>,
) -> Rules {
    let groups = groups.iter().filter_map(|name| state.placement_groups.get(name));
    Rules {
        groups: groups
            .map(|record| members(state, &record.group, &left))
            .collect(),
        tolerations: tolerations.clone(),
    }
}

fn members<'a>(
    state: &'a State,
    group: &Group,
    left: impl Fn(&Group, &'a VmRecord) -> Option<Vec<&'a HostName>>,
) -> Members {
    let mut domains = BTreeMap::<String, Held>::new();
    let mut first: Option<&VmName> = None;
    let mut others = 0_u32;
    for member in of_group(state, group) {
        let Some(left) = left(group, member) else { continue };
        let mut places = places(state, member);
        places.retain(|host| !left.contains(host));
        if places.is_empty() {
            continue;
        }
        others = others.saturating_add(1);
        first = Some(first.map_or(&member.name, |first| first.min(&member.name)));
        let there: BTreeSet<_> = places
            .iter()
            .filter_map(|host| domain_of(state, group, host))
            .collect();
        // Nobody can stay with one that moves from domain to domain before it has arrived.
        if group.rule == Rule::Affinity && there.len() > 1 {
            continue;
        }
        for domain in there {
            let held = domains.entry(domain.to_owned()).or_insert_with(|| Held {
                vms: 0,
                first: member.name.clone(),
            });
            held.vms = held.vms.saturating_add(1);
            if member.name < held.first {
                held.first = member.name.clone();
            }
        }
    }
    Members {
        group: group.clone(),
        domains,
        others,
        first: first.cloned(),
    }
}

/// The VMs of a group.
pub fn of_group<'a>(state: &'a State, group: &Group) -> impl Iterator<Item = &'a VmRecord> {
    let members = state.placement_members.get(&group.name).into_iter().flatten();
    members.filter_map(|id| state.vms.get(id)).map(AsRef::as_ref)
}

/// Hosts that have a VM, or may have it soon.
fn places<'a>(state: &'a State, vm: &'a VmRecord) -> BTreeSet<&'a HostName> {
    let migration = state.active_migration(vm.id);
    let sides = migration
        .into_iter()
        .flat_map(|migration| [&migration.source, &migration.destination]);
    sides.chain([&vm.owner]).collect()
}

fn domain_of<'a>(state: &'a State, group: &Group, host: &'a HostName) -> Option<&'a str> {
    domain(group, host, &state.hosts.get(host)?.labels)
}

/// Whether a member leaves its host for the same reason as the VM, so that both are together again afterwards: their host is being drained,
/// or the one that both come from is being restored.
fn goes_along(state: &State, vm: &VmRecord, destination: Option<&HostName>, member: &VmRecord) -> bool {
    let drain = |host: &HostName, direction| {
        let drain = state.hosts.get(host)?.drain.as_ref()?;
        (drain.is_active() && drain.direction == direction).then_some(drain)
    };
    let moves = |drain: &Drain| {
        let known = drain.vms.get(&member.name).filter(|known| known.vm == member.id);
        let own = drain.mode.unwrap_or(member.drain_mode);
        let mode = known.map_or(own, |known| known.mode);
        let open = known.is_none_or(|known| !known.stage.is_over());
        open && mode == DrainMode::LiveMigrate && member.intent.power == PowerState::Running
    };
    let out = drain(&vm.owner, Direction::Out).filter(|_| member.owner == vm.owner);
    let back = destination
        .and_then(|host| drain(host, Direction::Back))
        .filter(|drain| drain.vms.contains_key(&member.name));
    out.is_some_and(moves) || back.is_some_and(moves)
}

/// Why a group's rule does not hold where its members are; `None` where it does.
pub fn broken(state: &State, record: &PlacementGroupRecord) -> Option<String> {
    let group = &record.group;
    let kind = group.topology_key.as_deref().unwrap_or("host");
    let mut seen = BTreeMap::<&str, &VmName>::new();
    for member in of_group(state, group) {
        let hosts = match group.rule {
            Rule::Affinity => BTreeSet::from([&member.owner]),
            Rule::AntiAffinity => places(state, member),
        };
        let mut own = BTreeSet::new();
        for host in hosts {
            match domain_of(state, group, host) {
                None => {
                    return Some(format!(
                        "host {host}, where VM {} is, has no label {kind}",
                        member.name
                    ));
                }
                Some(domain) => drop(own.insert(domain)),
            }
        }
        for domain in own {
            let other = match group.rule {
                Rule::AntiAffinity => seen.get(domain).map(|other| (domain, *other)),
                Rule::Affinity => seen
                    .iter()
                    .map(|(there, other)| (*there, *other))
                    .find(|(there, _)| *there != domain),
            };
            match (other, group.rule) {
                (None, _) => drop(seen.insert(domain, &member.name)),
                (Some((_, other)), Rule::AntiAffinity) => {
                    return Some(format!(
                        "VMs {other} and {} are both on {kind} {domain}",
                        member.name
                    ));
                }
                (Some((there, other)), Rule::Affinity) => {
                    return Some(format!(
                        "VM {other} is on {kind} {there}, and VM {} on {kind} {domain}",
                        member.name
                    ));
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests;
