//! Where hosts and a restored store differ. Pure: read from a state, for the operator and for [`super::resume`].

use dalgu_proto::{
    ids::{HostName, VmId},
    vm::PowerState,
};

use super::{Place, place, wanted};
use crate::{
    model::{VmPhase, VmRecord},
    state::State,
};

/// How a host and the store differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The store does not know the VM.
    UnknownVm,
    /// No host has it.
    MissingVm,
    /// Another host than the owner has it.
    OtherOwner,
    /// It is in another power state.
    PowerState,
    /// It was migrating.
    Migrating,
    /// Several hosts have it.
    SeveralHosts,
    /// It was to be deleted, and is there.
    Deleting,
}

impl Kind {
    /// What [`super::resume`] does about it, for people.
    pub const fn consequence(self) -> &'static str {
        match self {
            Self::UnknownVm => "left alone; remove it on its host if nobody needs it",
            Self::MissingVm => {
                "not made again; delete it here, or leave it until the host that has it comes back"
            }
            Self::OtherOwner => "the host that has it becomes its owner",
            Self::PowerState => "it becomes as its host was asked last",
            Self::Migrating => "both hosts are asked where it is, and the one that has it becomes its owner",
            Self::SeveralHosts => "left alone; leave it on one host only, then resume again",
            Self::Deleting => "it is deleted with its disks, as was asked before the backup",
        }
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Difference {
    /// What kind.
    pub kind: Kind,
    /// Name of the VM.
    pub name: String,
    /// The VM.
    pub id: VmId,
    /// Hosts that have it.
    pub hosts: Vec<HostName>,
    /// What the store says.
    pub in_store: String,
    /// What hosts say.
    pub on_hosts: String,
}

/// Hosts that have not told all they have, and are not waived.
pub fn waiting(state: &State) -> Vec<HostName> {
    let Some(observing) = &state.meta.observing else {
        return Vec::new();
    };
    let missing = |host: &&HostName| !state.listed.contains(*host) && !observing.waived.contains(*host);
    state.hosts.keys().filter(missing).cloned().collect()
}

/// Everything in which hosts and the store differ, VM by VM.
pub fn differences(state: &State) -> Vec<Difference> {
    let mut found: Vec<_> = state
        .vms
        .values()
        .filter(|vm| vm.unconfirmed)
        .flat_map(|vm| differences_of(state, vm))
        .collect();
    let unknown = state
        .sightings
        .iter()
        .filter(|(id, _)| !state.vms.contains_key(*id));
    found.extend(unknown.filter_map(|(id, hosts)| {
        let there = hosts
            .iter()
            .filter(|(_, said)| said.observation.phase != VmPhase::Deleting);
        let there: Vec<_> = there.collect();
        let (_, first) = there.first()?;
        Some(Difference {
            kind: Kind::UnknownVm,
            name: first.name.clone(),
            id: *id,
            hosts: there.iter().map(|(host, _)| (*host).clone()).collect(),
            in_store: "not known".to_owned(),
            on_hosts: power(first.observation.power).to_owned(),
        })
    }));
    found
}

/// The same for the same differences.
pub fn etag(found: &[Difference]) -> String {
    crate::api::request::hash(format!("{found:?}").as_bytes())
}

const fn power(power: Option<PowerState>) -> &'static str {
    match power {
        None => "power state not known",
        Some(PowerState::Running) => "running",
        Some(PowerState::Paused) => "paused",
        Some(PowerState::Stopped) => "stopped",
    }
}

/// In what hosts and the store differ about an unconfirmed VM.
pub fn differences_of(state: &State, vm: &VmRecord) -> Vec<Difference> {
    let difference = |kind, hosts: Vec<HostName>, in_store: String, on_hosts: &str| Difference {
        kind,
        name: vm.name.to_string(),
        id: vm.id,
        hosts,
        in_store,
        on_hosts: on_hosts.to_owned(),
    };
    let on_owner = || format!("on {}", vm.owner);
    let mut found = Vec::new();
    match place(state, vm.id) {
        // The owner may have it; nothing can be said.
        Place::Nowhere if !state.listed.contains(&vm.owner) => {}
        Place::Nowhere => found.push(difference(Kind::MissingVm, vec![], on_owner(), "no host has it")),
        Place::Unclear(hosts) => {
            let text = "it cannot be said which host has it";
            found.push(difference(Kind::SeveralHosts, hosts, on_owner(), text));
        }
        Place::Migrating {
            source, destination, ..
        } => {
            let text = format!("on its way from {} to {}", source.0, destination.0);
            found.push(difference(
                Kind::Migrating,
                vec![source.0, destination.0],
                on_owner(),
                &text,
            ));
        }
        Place::On((host, reported)) => {
            let hosts = vec![host.clone()];
            if host != vm.owner {
                let text = format!("on {host}");
                found.push(difference(Kind::OtherOwner, hosts.clone(), on_owner(), &text));
            }
            let wanted = wanted(vm, &reported).0.power;
            if vm.delete_time.is_some() {
                let text = "to be deleted".to_owned();
                let seen = power(reported.observation.power);
                found.push(difference(Kind::Deleting, hosts, text, seen));
            } else if wanted != vm.intent.power {
                let text = power(Some(vm.intent.power)).to_owned();
                found.push(difference(Kind::PowerState, hosts, text, power(Some(wanted))));
            }
        }
    }
    found
}
