//! Numbers that may only rise, and whose word counts: a host that knows more than the store, another controller.

use super::{Finding, Invariant, Look, Severity, View};

/// I6: what hosts report is never ahead of the store.
pub(super) fn store_is_ahead(view: &View<'_>) -> Look {
    let state = view.state;
    let mut look = Look::at(
        "VMs as hosts report them",
        state.observations.len() + state.strays.len(),
    );
    look.unchecked = view.unseen_vms();
    look.limits = "hosts refuse lower terms and sessions by themselves; see I12";
    let mut find = |subject: String, seen: String| {
        look.findings.push(Finding {
            invariant: Invariant::I6,
            severity: Severity::Critical,
            kind: "AHEAD_OF_STORE",
            subject,
            seen,
            next_step: "was an old database file put in place without `dalgu-controller restore`? Stop the controller and \
                        restore a backup: docs/operations/backup.md"
                .to_owned(),
        });
    };
    for ((host, id), stray) in &state.strays {
        let theirs = stray.reported.observation.epoch;
        let Some(vm) = state
            .vms
            .get(id)
            .filter(|vm| theirs > vm.epoch && !vm.unconfirmed)
        else {
            continue;
        };
        find(
            format!("vm {}", vm.name),
            format!("{host} has it under epoch {theirs}, the store under {}", vm.epoch),
        );
    }
    for vm in state.vms.values().filter(|vm| !vm.unconfirmed) {
        let Some(seen) = state.observation(vm) else {
            continue;
        };
        if seen.accepted > vm.intent.generation {
            find(
                format!("vm {}", vm.name),
                format!(
                    "{} has accepted generation {}, the store has {}",
                    vm.owner, seen.accepted, vm.intent.generation
                ),
            );
        }
    }
    look
}

/// I12: no other controller has taken the hosts over.
pub(super) fn in_charge(view: &View<'_>) -> Look {
    let mut look = Look::at("hosts", view.state.hosts.len());
    look.unchecked = view
        .state
        .hosts
        .keys()
        .filter(|host| view.unseen(host).is_some())
        .count();
    look.limits = "another controller is noticed when a host refuses this one's command";
    look.findings
        .extend(view.state.replaced_by.iter().map(|by| Finding {
            invariant: Invariant::I12,
            severity: Severity::Critical,
            kind: "OTHER_CONTROLLER",
            subject: "store".to_owned(),
            seen: format!("hosts obey another controller with this site's credentials: {by}"),
            next_step: "stop one of the two, then restart the other: docs/operations/backup.md".to_owned(),
        }));
    look
}
