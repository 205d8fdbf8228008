//! Lets the over-commit ratio of a host follow its load, see [`crate::model::Overcommit`]. Called by the task that looks at what hosts use.

use dalgu_proto::ids::HostName;

use super::view;
use crate::{
    model::{EventKind, HostLive, HostRecord, Overcommit, Seen},
    placement,
    state::{State, Tx},
};

/// The ratio that counts for a host now.
pub fn ratio(state: &State, host: &HostRecord, live: Option<&HostLive>) -> f64 {
    let own = host.cpu_overcommit_ratio;
    live.map_or(own, |live| live.overcommit.ratio(own, state.cpu_bounds))
}

/// Takes one more look at a host; the operator is told where it takes fewer VMs from now on.
pub fn adapt(tx: &mut Tx, name: &HostName) {
    let (Some(host), Some(live)) = (tx.hosts.get(name).cloned(), tx.live.get(name).cloned()) else {
        return;
    };
    let own = host.cpu_overcommit_ratio;
    if !tx.cpu_bounds.adapt(own) {
        // Nothing is looked at for a host that does not adapt; one that did has its own ratio again.
        tx.set_overcommit(name, Overcommit::default());
        return;
    }
    let seen = seen(tx, &host);
    let before = ratio(tx, &host, Some(&live));
    let overcommit = live.overcommit.after(own, tx.cpu_bounds, seen);
    tx.set_overcommit(name, overcommit);
    let now = overcommit.ratio(own, tx.cpu_bounds);
    if now < before {
        let message = format!(
            "its processors are over-committed {now} times from now on instead of {before}, by its load; its VMs stay"
        );
        tx.event(EventKind::Host, "HostOvercommitLowered", name, message, None);
    }
}

fn seen(state: &State, host: &HostRecord) -> Seen {
    let view = view(state, host);
    let held = state.reserved.get(&host.name);
    let shared = held.map_or(0, |held| held.vcpus);
    let own = held.map_or(0, |held| held.taken.dedicated());
    let cpus = host.inventory.cpus.saturating_sub(own).max(1);
    let shared = u32::try_from(shared)
        .unwrap_or(u32::MAX)
        .saturating_add(view.unmanaged_vcpus);
    Seen {
        lent: f64::from(shared) / f64::from(cpus),
        load: view
            .usage
            .as_ref()
            .and_then(|usage| placement::processors(usage, view.cpus)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixtures, hosts,
        model::Bounds,
        placement::{Constraint, Lately, Policy, Request, decide},
        state::{Db, Hooks},
        store::memory::Disk,
    };

    #[tokio::test]
    async fn a_host_that_is_short_of_processors_refuses_new_vms_and_keeps_those_it_has() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let name = fixtures::host_name("h1");
        // Fourteen VMs of one virtual processor each, on four logical ones.
        db.change(|tx| {
            tx.set_cpu_bounds(Bounds {
                least: 1.0,
                most: 8.0,
            });
            let mut host = fixtures::host("h1");
            host.inventory.memory_bytes = 64 << 30;
            tx.put_host(host);
            tx.set_live(name.clone(), fixtures::live(tx.now()));
            (0..14).for_each(|number| tx.put_vm(fixtures::vm(&format!("vm{number}"), "h1")));
        })
        .await;
        let looked = async |cpus_busy: f64| {
            let lately = Lately {
                cpus_busy,
                cpus_stolen: 0.0,
            };
            db.change(|tx| {
                tx.set_expected(&name, None, Some(lately));
                adapt(tx, &name);
                // What decides creations knows of it.
                let one = tx.decide(&Request::new(fixtures::spec()), Policy::SPREAD, 8);
                let state = tx.clone();
                assert_eq!(
                    one,
                    decide(
                        &Request::new(fixtures::spec()),
                        &hosts::views(&state),
                        &Policy::SPREAD
                    )
                );
                one
            })
            .await
        };
        assert!(looked(2.9).await.host.is_some());
        let refused = looked(3.0).await;
        assert_eq!(refused.host, None);
        let lacks = &refused.verdicts[0].shortfalls;
        assert_eq!(
            (lacks[0].constraint, lacks[0].message.as_str()),
            (
                Constraint::Cpu,
                "needs 1 vCPUs, has 0 free of 12, over-committed 3 times as its load allows"
            )
        );
        let state = db.snapshot();
        let view = hosts::view(&state, &state.hosts[&name]);
        assert_eq!((view.vms, view.vcpus_reserved), (14, 14), "nothing was evicted");
        let told = state
            .events
            .values()
            .filter(|event| event.reason == "HostOvercommitLowered");
        assert_eq!(told.count(), 1);
        // An hour of little load, and another: what is there fits again.
        for _ in 0..24 {
            looked(1.0).await;
        }
        let ratio = |state: &State| {
            ratio(
                state,
                &state.hosts[&name],
                state.live.get(&name).map(AsRef::as_ref),
            )
        };
        assert_eq!(ratio(&db.snapshot()), 3.5);
        for _ in 0..24 {
            looked(1.0).await;
        }
        assert_eq!(ratio(&db.snapshot()), 4.0);
        assert!(looked(1.0).await.host.is_some());
        for _ in 0..12 {
            looked(1.0).await;
        }
        assert_eq!(ratio(&db.snapshot()), 4.25, "more than its own");
        let bounds = db.snapshot().cpu_bounds;
        db.change(|tx| tx.set_cpu_bounds(Bounds::default())).await;
        assert_eq!(ratio(&db.snapshot()), 4.0);
        looked(3.0).await;
        db.change(|tx| tx.set_cpu_bounds(bounds)).await;
        assert_eq!(ratio(&db.snapshot()), 4.0, "what it had learnt is forgotten");
    }
}
