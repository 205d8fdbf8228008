//! The controller's own store: room, soundness, and whether its life is a new one that nobody has looked through.

use super::{Finding, Invariant, Look, Severity, View, networks};
use crate::incarnation;

/// The store has room, is sound, and is in charge.
pub(super) fn sound(view: &View<'_>) -> Look {
    let state = view.state;
    let records = state.vms.len()
        + state.hosts.len()
        + state.operations.len()
        + state.migrations.len()
        + state.requests.len()
        + state.images.len()
        + state.networks.len()
        + state.groups.len();
    let mut look = Look::at("records", records);
    if view.damage.is_none() {
        look.unchecked = records;
        look.limits = "the file itself was not looked through: `dalgu doctor --deep`";
    }
    let mut find = |severity, kind, seen: String, next: &str| {
        look.findings.push(Finding {
            invariant: Invariant::Store,
            severity,
            kind,
            subject: "store".to_owned(),
            seen,
            next_step: next.to_owned(),
        });
    };
    for damage in view.damage.iter().flatten() {
        let next = "make a backup now, keep the old files, and restore the newest sound one: docs/operations/backup.md";
        find(Severity::Critical, "STORE_DAMAGED", damage.clone(), next);
    }
    if let Some(space) = state.space.filter(|space| space.low) {
        let (free, reserve) = (space.free_bytes >> 20, space.reserve_bytes >> 20);
        let seen = format!(
            "{free} MiB are free on its disk, {reserve} MiB are kept in reserve: nothing new is made"
        );
        let next = "free room on the file system of the controller's data_dir; it recovers by itself";
        find(Severity::Warning, "STORE_LOW_SPACE", seen, next);
    }
    if let Some(observing) = &state.meta.observing {
        let waiting = incarnation::waiting(state).len();
        let seen = format!(
            "restored from a backup {} s ago: it only observes, waits for {waiting} hosts, and sees {} differences",
            view.since(observing.since).as_secs(),
            incarnation::differences(state).len()
        );
        find(
            Severity::Warning,
            "SITE_OBSERVING",
            seen,
            "`dalgu site show`, then `dalgu site resume`",
        );
    }
    networks::are_sound(view, &mut look);
    look
}
