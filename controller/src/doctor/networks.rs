//! Whether hosts know of the networks that their VMs are in, and whether what is given in a network is given once.

use std::collections::BTreeMap;

use super::{Finding, Invariant, Look, Severity, View};
use crate::{model::HostState, networks::plan};

/// Adds hosts that are heard from, have VMs in networks, and do not take what they are told of these. Only what lasts is shown:
/// see [`super::Diagnosis::lasting`].
pub(super) fn are_told(view: &View<'_>, look: &mut Look) {
    let state = view.state;
    let places = state
        .places
        .iter()
        .filter(|(_, place)| !place.networks.is_empty());
    for (host, _) in places {
        look.checked += 1;
        let Some(live) = state.live.get(host).filter(|live| live.state == HostState::Ready) else {
            continue;
        };
        let version = plan::version(state, host);
        let told = state.meta.observing.is_none() && state.replaced_by.is_none();
        if told && live.networks < version {
            look.findings.push(Finding {
                invariant: Invariant::I3,
                severity: Severity::Warning,
                kind: "NETWORKS_NOT_TAKEN",
                subject: format!("host {host}"),
                seen: "it has not taken up the last change of its networks: new VMs wait there, and old rules hold".to_owned(),
                next_step: "see the logs of the controller and of its agent for what is wrong with its networks".to_owned(),
            });
        }
    }
}

/// Adds interfaces whose network or group is not there, and addresses that several have: the store is not as Dalgu writes it.
pub(super) fn are_sound(view: &View<'_>, look: &mut Look) {
    let state = view.state;
    let mut find = |kind, subject: String, seen: String| {
        look.findings.push(Finding {
            invariant: Invariant::Store,
            severity: Severity::Critical,
            kind,
            subject,
            seen,
            next_step: "delete the VMs that are named, or restore a sound backup: docs/operations/backup.md"
                .to_owned(),
        });
    };
    for (name, members) in &state.members {
        if !state.networks.contains_key(name) {
            let seen = format!(
                "{} interfaces are in it, and there is no such network",
                members.interfaces.len()
            );
            find("NETWORK_MISSING", format!("network {name}"), seen);
        }
        let mut holders = BTreeMap::new();
        for ((vm, nic), interface) in &members.interfaces {
            let addresses = [interface.ipv4.map(Into::into), interface.ipv6.map(Into::into)];
            for address in addresses.into_iter().flatten() {
                let address: core::net::IpAddr = address;
                if let Some(other) = holders.insert(address, format!("{vm}/{nic}")) {
                    let seen = format!("{other} and {vm}/{nic} both have {address}");
                    find("ADDRESS_GIVEN_TWICE", format!("network {name}"), seen);
                }
            }
        }
    }
    for (group, uses) in state
        .group_uses
        .iter()
        .filter(|(name, _)| !state.groups.contains_key(*name))
    {
        let seen = format!("{} interfaces have it, and there is no such group", uses.count());
        find("SECURITY_GROUP_MISSING", format!("security group {group}"), seen);
    }
}
