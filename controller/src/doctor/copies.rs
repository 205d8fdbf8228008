//! Where VMs are, by all that hosts say: one that runs twice, and what is where it should not be.

use std::{borrow::Cow, collections::BTreeMap};

use dalgu_proto::{
    ids::{HostName, VmId},
    vm::PowerState,
};

use super::{Finding, Invariant, Look, Severity, View, files, volumes};
use crate::{
    model::{Unmanaged, VmPhase},
    state::State,
};

/// The first that is in two places, and these.
pub fn twice<V: Ord + Copy, P: Ord>(places: impl IntoIterator<Item = (V, P)>) -> Option<(V, P, P)> {
    let mut places: Vec<_> = places.into_iter().collect();
    places.sort_unstable();
    let mut places = places.into_iter().peekable();
    while let Some((vm, place)) = places.next() {
        if let Some((_, other)) = places.next_if(|(next, _)| *next == vm) {
            return Some((vm, place, other));
        }
    }
    None
}

/// Hosts that show a VM as running, whether their word counts or not.
fn running(state: &State) -> BTreeMap<VmId, Vec<&HostName>> {
    let alive = |power: Option<PowerState>| power == Some(PowerState::Running);
    let mut places: BTreeMap<VmId, Vec<&HostName>> = BTreeMap::new();
    let mut note = |vm: VmId, host| {
        let hosts = places.entry(vm).or_default();
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    };
    for (vm, seen) in state.observations.iter().filter(|(_, seen)| alive(seen.power)) {
        note(*vm, &seen.host);
    }
    for ((host, vm), stray) in &state.strays {
        if stray.times > 1 && alive(stray.reported.observation.power) {
            note(*vm, host);
        }
    }
    for (vm, hosts) in &state.sightings {
        for (host, _) in hosts.iter().filter(|(_, said)| alive(said.observation.power)) {
            note(*vm, host);
        }
    }
    for (host, domain) in foreign(state).filter(|(_, domain)| domain.running) {
        if let Ok(vm) = domain.uuid.parse() {
            note(vm, host);
        }
    }
    places
}

/// Domains that Dalgu does not touch.
fn foreign(state: &State) -> impl Iterator<Item = (&HostName, &Unmanaged)> {
    let live = state.live.iter();
    live.flat_map(|(host, live)| live.unmanaged.iter().map(move |domain| (host, domain)))
}

fn name(state: &State, vm: VmId) -> Cow<'_, str> {
    match state.vms.get(&vm) {
        Some(vm) => vm.name.as_str().into(),
        None => vm.to_string().into(),
    }
}

/// I1: no VM runs on two hosts.
pub(super) fn one_running(view: &View<'_>) -> Look {
    let running = running(view.state);
    let mut look = Look::at("running VMs", running.len());
    look.unchecked = view.unseen_vms();
    look.limits = "what hosts report: a copy on a machine without an agent is not seen";
    for (vm, hosts) in running.into_iter().filter(|(_, hosts)| hosts.len() > 1) {
        let names: Vec<_> = hosts.iter().map(|host| host.as_str()).collect();
        let owner = view
            .state
            .vms
            .get(&vm)
            .map(|vm| format!("; {} owns it", vm.owner));
        look.findings.push(Finding {
            invariant: Invariant::I1,
            severity: Severity::Critical,
            kind: "TWO_COPIES",
            subject: format!("vm {}", name(view.state, vm)),
            seen: format!(
                "runs on {} ({vm}){}",
                names.join(" and on "),
                owner.unwrap_or_default()
            ),
            next_step: "stop the copy that has not the newest data with `virsh destroy` on its host, and mend the file \
                        systems of the guest from a backup if both wrote to the same disk"
                .to_owned(),
        });
    }
    look
}

/// I4: no VM and no domain of Dalgu's on a host that should not have it.
pub(super) fn all_owned(view: &View<'_>) -> Look {
    let state = view.state;
    let shown = state.observations.len() + state.strays.len() + foreign(state).count();
    let mut look = Look::at("VMs, domains and files on hosts", shown);
    look.unchecked = view.unseen_vms();
    look.limits = match view.files.is_empty() {
        true => "no host was asked for its files: a disk that was left behind is not seen",
        false => "of files only what is where Dalgu keeps disks, volumes and backups",
    };
    for ((host, vm), stray) in state.strays.iter().filter(|(_, stray)| stray.times > 1) {
        if state.vms.get(vm).is_some_and(|record| record.owner == *host) {
            continue;
        }
        let said = &stray.reported;
        let known = match state.vms.get(vm) {
            Some(record) => format!("it belongs to {}", record.owner),
            None => "the store does not know it".to_owned(),
        };
        let word = power(said.observation.power);
        look.findings.push(Finding {
            invariant: Invariant::I4,
            severity: Severity::Warning,
            kind: "STRAY_VM",
            subject: format!("vm {}", said.name),
            seen: format!("{host} has it ({vm}, {word}); {known}"),
            next_step: format!(
                "if nobody needs that copy: `virsh destroy` and `virsh undefine {}` on {host}",
                said.name
            ),
        });
    }
    look.findings.extend(unknown(state));
    look.findings
        .extend(foreign(state).filter_map(|(host, domain)| leftover(state, host, domain)));
    volumes::have_one_vm(view, &mut look);
    files::have_owners(view, &mut look);
    look
}

/// VMs that a restored store does not know, while it observes: later they are strays.
fn unknown(state: &State) -> Vec<Finding> {
    let observing = state.meta.observing.is_some();
    let unknown = state
        .sightings
        .iter()
        .filter(|(vm, _)| observing && !state.vms.contains_key(*vm));
    let each = unknown.flat_map(|(vm, hosts)| hosts.iter().map(move |(host, said)| (vm, host, said)));
    let there = each.filter(|(.., said)| said.observation.phase != VmPhase::Deleting);
    there
        .map(|(vm, host, said)| Finding {
            invariant: Invariant::I4,
            severity: Severity::Warning,
            kind: "STRAY_VM",
            subject: format!("vm {}", said.name),
            seen: format!(
                "{host} has it ({vm}, {}); the restored store does not know it",
                power(said.observation.power)
            ),
            next_step: "`dalgu site show`; it is left alone when the site is resumed".to_owned(),
        })
        .collect()
}

/// A domain that bears Dalgu's mark, or the id of one of its VMs, where nobody told its host of it.
fn leftover(state: &State, host: &HostName, domain: &Unmanaged) -> Option<Finding> {
    let vm = domain.uuid.parse().ok().and_then(|id: VmId| state.vms.get(&id));
    let what = match (domain.marked, vm) {
        (true, Some(vm)) => format!(
            "with Dalgu's mark and the id of VM {}, which belongs to {}",
            vm.name, vm.owner
        ),
        (true, None) => "with Dalgu's mark, which the store does not know".to_owned(),
        (false, Some(vm)) => format!(
            "with the id of VM {}, which belongs to {}, and without Dalgu's mark",
            vm.name, vm.owner
        ),
        (false, None) => return None,
    };
    let word = if domain.running { "running" } else { "stopped" };
    Some(Finding {
        invariant: Invariant::I4,
        severity: Severity::Warning,
        kind: "LEFTOVER_DOMAIN",
        subject: format!("domain {}", domain.uuid),
        seen: format!(
            "{host} has a domain {} ({word}) {what}; its agent was not told of it and leaves it alone",
            domain.name
        ),
        next_step: format!(
            "somebody defined it by hand, or restored a backup of libvirt: `virsh undefine {}` on {host} if nobody needs it",
            domain.name
        ),
    })
}

const fn power(power: Option<PowerState>) -> &'static str {
    match power {
        None => "no domain",
        Some(PowerState::Running) => "running",
        Some(PowerState::Paused) => "paused",
        Some(PowerState::Stopped) => "stopped",
    }
}
