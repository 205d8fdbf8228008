//! Keeps why a placement was refused: beside the change that was given up, in one of its own.

use dalgu_proto::ids::VmName;
use jiff::{SignedDuration, Timestamp};

use super::Error;
use crate::{
    model::{OperationKind, RefusedPlacement},
    placement::Decision,
    state::{Db, State, Tx},
};

/// Verdicts that are kept of each, in the order of the hosts' names: 0.4 kB each.
const VERDICTS: usize = 32;
/// For so long the same refusal is not written again: who tries again and again is told the same.
const SAME: SignedDuration = SignedDuration::from_mins(4);

/// Keeps a refusal, if it is one for want of a host.
pub async fn keep(db: &Db, vm: &VmName, kind: OperationKind, error: &Error) {
    if let Some(decision) = decision(error) {
        offer(db, vm, kind, decision).await;
    }
}

/// The same for a creation out of a batch, of which those before it were given up with it: it says that they were counted.
pub async fn keep_of_batch(db: &Db, vm: &VmName, before: usize, error: &Error) {
    if let Some(mut decision) = decision(error) {
        if before > 0 {
            decision.summary = format!("with the {before} before it in the batch: {}", decision.summary);
        }
        offer(db, vm, OperationKind::Create, decision).await;
    }
}

/// Whoever tries again and again does not wait for the writer.
async fn offer(db: &Db, vm: &VmName, kind: OperationKind, decision: Decision) {
    if is_new(&db.snapshot(), db.now(), vm, kind, &decision) {
        db.change(|tx| note(tx, vm, kind, decision)).await;
    }
}

/// What is kept of it.
fn decision(error: &Error) -> Option<Decision> {
    match error {
        Error::NoCapacity { decision, .. } => {
            let verdicts: Vec<_> = decision.verdicts.iter().take(VERDICTS).cloned().collect();
            let left_out = decision.verdicts.len() - verdicts.len();
            let omitted = u32::try_from(left_out).unwrap_or(u32::MAX);
            Some(Decision {
                host: None,
                verdicts,
                hint: decision.hint.clone(),
                summary: decision.summary.clone(),
                omitted: decision.omitted.saturating_add(omitted),
                ignored_protection: decision.ignored_protection,
            })
        }
        // It names the rules, which are the same for every host.
        Error::PlacementConflict(summary) => Some(Decision {
            host: None,
            verdicts: Vec::new(),
            hint: None,
            summary: summary.clone(),
            omitted: 0,
            ignored_protection: false,
        }),
        _ => None,
    }
}

/// Whether that is worth a write.
fn is_new(state: &State, now: Timestamp, vm: &VmName, kind: OperationKind, decision: &Decision) -> bool {
    // Also where the clock has gone back since.
    let lately = |time| now.duration_since(time).abs() < SAME;
    let same =
        |known: &RefusedPlacement| known.kind == kind && known.decision == *decision && lately(known.time);
    // Of a creation that has succeeded meanwhile, or a VM that has gone, there is nothing to say.
    let stands = state.vm_names.contains_key(vm) == (kind == OperationKind::Migrate);
    stands && !state.refused_placements.get(vm).is_some_and(|known| same(known))
}

fn note(tx: &mut Tx, vm: &VmName, kind: OperationKind, decision: Decision) {
    let now = tx.now();
    if !is_new(tx, now, vm, kind, &decision) {
        return;
    }
    tx.put_refused_placement(RefusedPlacement {
        vm: vm.clone(),
        kind,
        decision,
        time: now,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixtures,
        state::{Hooks, REFUSED_KEPT},
        store::memory::Disk,
    };

    fn conflict(why: &str) -> Error {
        Error::PlacementConflict(why.to_owned())
    }

    #[tokio::test]
    async fn the_last_refusal_of_each_name_is_kept_until_one_succeeds() {
        let disk = Disk::default();
        let open = || Db::open(disk.open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let db = open();
        let web: VmName = "web".parse().unwrap();
        let kept = |db: &Db| {
            let state = db.snapshot();
            let known = state.refused_placements.get(&web)?;
            Some((known.kind, known.decision.summary.clone(), known.time))
        };
        keep(&db, &web, OperationKind::Create, &Error::Initializing).await;
        assert_eq!(kept(&db), None, "that says nothing of a host");
        keep(&db, &web, OperationKind::Create, &conflict("full")).await;
        let first = kept(&db).unwrap();
        assert_eq!((first.0, first.1.as_str()), (OperationKind::Create, "full"));
        let revision = db.snapshot().meta.revision;
        keep(&db, &web, OperationKind::Create, &conflict("full")).await;
        assert_eq!(
            db.snapshot().meta.revision,
            revision,
            "nothing is written for one that tries again"
        );
        keep_of_batch(&db, &web, 2, &conflict("full")).await;
        assert_eq!(kept(&db).unwrap().1, "with the 2 before it in the batch: full");
        keep_of_batch(&db, &web, 0, &conflict("other")).await;
        assert_eq!(kept(&db).unwrap().1, "other");
        drop(db);
        let db = open();
        assert_eq!(kept(&db).unwrap().1, "other", "it is stored");
        let vm = fixtures::vm("web", "h1");
        db.change(|tx| tx.put_vm(vm.clone())).await;
        assert_eq!(kept(&db), None, "a creation has succeeded");
        keep(&db, &web, OperationKind::Create, &conflict("late")).await;
        assert_eq!(kept(&db), None, "it was overtaken");
        keep(&db, &web, OperationKind::Migrate, &conflict("full")).await;
        assert_eq!(kept(&db).unwrap().0, OperationKind::Migrate);
        db.change(|tx| tx.put_vm(vm.clone())).await;
        assert_eq!(kept(&db).unwrap().0, OperationKind::Migrate, "it is where it was");
        let mut moved = vm.clone();
        moved.owner = fixtures::host_name("h2");
        db.change(|tx| tx.put_vm(moved)).await;
        assert_eq!(kept(&db), None, "it has come to another host");
        keep(&db, &web, OperationKind::Migrate, &conflict("full")).await;
        assert!(kept(&db).is_some());
        db.change(|tx| tx.delete_vm(vm.id)).await;
        assert_eq!(kept(&db), None);
    }

    #[tokio::test]
    async fn a_refusal_with_the_same_summary_and_other_verdicts_is_kept_anew() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let web: VmName = "web".parse().unwrap();
        let refusal = fixtures::refused("web").decision;
        let mut other = refusal.clone();
        other.omitted = 5;
        for decision in [&refusal, &other, &refusal] {
            db.change(|tx| note(tx, &web, OperationKind::Create, decision.clone()))
                .await;
            assert_eq!(db.snapshot().refused_placements[&web].decision, *decision);
        }
        // What was kept before the clock went back by a day is not taken for new all day long.
        let day = SignedDuration::from_hours(24);
        let (state, now) = (db.snapshot(), db.now());
        let known = |now| !is_new(&state, now, &web, OperationKind::Create, &refusal);
        assert_eq!(
            [known(now), known(now - day), known(now + day)],
            [true, false, false]
        );
    }

    #[tokio::test]
    async fn no_more_are_kept_than_the_latest_thousand() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let name = |number: usize| format!("vm{number}").parse::<VmName>().unwrap();
        for number in 0..=REFUSED_KEPT {
            keep(&db, &name(number), OperationKind::Create, &conflict("full")).await;
        }
        assert_eq!(db.snapshot().refused_placements.len(), REFUSED_KEPT);
    }
}
