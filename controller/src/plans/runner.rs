//! Makes the passes over the plan that runs, and takes the samples of what VMs use.
//!
//! A task of the controller. It looks every second while a plan runs, and every five minutes whether contended hosts are to be relieved, and
//! whether hosts are to be emptied.

use std::time::Duration;

use dalgu_proto::ids::PlanId;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    advance::{Pass, advance},
    automatic::{Kind, allowance},
    look::measure,
    usage::{SAMPLE, Usage, look_at},
};
use crate::{
    blocking::beside,
    hosts::overcommit,
    model::{Outcome, PlanState},
    placement::Policy,
    state::{Db, State},
    verbs::{
        Caller, Error,
        plan::{self, Create, Draft},
    },
};

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// So many looks after the start the use of VMs is known well enough to move some without an operator: half an hour.
const LEARNT: u32 = 6;
/// Within this such a plan ends.
const DEADLINE: Duration = Duration::from_secs(3600);

/// What the runner works with.
#[derive(Clone)]
pub struct Runner {
    /// The state.
    pub db: Db,
    /// Which host is best.
    pub policy: Policy,
    /// What VMs have used.
    pub usage: Usage,
    /// So many VMs an hour are moved without an operator: away from contended hosts, and off hosts that are emptied.
    pub moves_an_hour: [(Kind, usize); 2],
}

impl Runner {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        // Cancel safe: what was stored is stored.
        stop.run_until_cancelled(futures::future::join(self.watch(), self.work()))
            .await;
    }

    async fn watch(&self) {
        let mut tick = interval(SAMPLE);
        // From the clock, so that turns do not begin anew with each start: else some VMs would never have theirs where starts are frequent.
        let first = look_at(self.db.now());
        let (mut looks, mut seen) = (0_u32, [0_u32; 2]);
        loop {
            tick.tick().await;
            self.look(first.wrapping_add(looks)).await;
            looks = looks.saturating_add(1);
            if looks > LEARNT {
                for ((kind, an_hour), seen) in self.moves_an_hour.into_iter().zip(&mut seen) {
                    *seen = self.act(kind, an_hour, *seen).await;
                }
            }
        }
    }

    /// Takes the samples, stores those of the VMs whose turn it is, and tells placement what to expect of each host and how busy it has been.
    async fn look(&self, number: u32) {
        let (state, usage) = (self.db.snapshot(), self.usage.clone());
        let expected = beside(move || {
            usage.sample(&state);
            (usage.expected(&state), usage.lately(&state), usage.due(number))
        });
        let (expected, lately, due) = expected.await;
        self.db
            .change(|tx| {
                // After a restore nothing is written before an operator has looked at what hosts have.
                if tx.meta.observing.is_none() {
                    due.into_iter().for_each(|record| tx.put_usage(record));
                }
                let hosts: Vec<_> = tx.live.keys().cloned().collect();
                for host in hosts {
                    let cpus_expected = expected.get(&host).copied();
                    tx.set_expected(&host, cpus_expected, lately.get(&host).copied());
                    overcommit::adapt(tx, &host);
                }
            })
            .await;
    }

    /// Makes and approves a plan, where that could be done at enough looks before as well. Returns at how many in a row it could, and has not
    /// been.
    async fn act(&self, kind: Kind, an_hour: usize, before: u32) -> u32 {
        let (state, usage, now) = (self.db.snapshot(), self.usage.clone(), self.db.now());
        if an_hour == 0 || state.meta.observing.is_some() || state.replaced_by.is_some() {
            return 0;
        }
        let moves = match allowance(&state, now, kind, an_hour) {
            Ok(moves) => moves,
            Err(held) => {
                tracing::debug!(?kind, %held, "no plan is looked for");
                return 0;
            }
        };
        let ask = Create {
            aim: kind.aim(),
            moves,
            copied_mib: u64::MAX,
        };
        let of = ask.clone();
        let draft = match beside(move || Draft::of(&state, &usage, now, &of)).await {
            Ok(draft) if kind.wants(&draft) => draft,
            _ => return 0,
        };
        let seen = before.saturating_add(1);
        if seen < kind.looks() {
            return seen;
        }
        let caller = Caller {
            principal: kind.principal().into(),
            request_id: String::new(),
            body: String::new(),
        };
        let made = self.db.transact(|tx| -> Result<(), Error> {
            if allowance(tx, tx.now(), kind, an_hour).is_ok()
                && let Outcome::Plan(id) = plan::create(tx, &caller, &ask, draft)?
            {
                let hash = plan::find(tx, id)?.hash;
                plan::approve(tx, &caller, id, &hash, DEADLINE)?;
            }
            Ok(())
        });
        if let Err(error) = made.await {
            tracing::warn!(?kind, %error, "no plan is made without an operator");
        }
        0
    }

    async fn work(&self) {
        let mut changes = self.db.watch();
        loop {
            let state = changes.borrow_and_update().clone();
            let Some(plan) = running(&state) else {
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            };
            // After a restore nobody is commanded before an operator has looked at what hosts have; nor when agents obey
            // another controller.
            if state.meta.observing.is_none() && state.replaced_by.is_none() {
                let pass = self.db.change(|tx| advance(tx, plan, self.policy, None)).await;
                if pass == Pass::Last {
                    let site = measure(&self.db, &self.usage).await;
                    self.db
                        .change(|tx| advance(tx, plan, self.policy, Some(site)))
                        .await;
                }
            }
            drop(state);
            sleep(LOOK).await;
        }
    }
}

fn running(state: &State) -> Option<PlanId> {
    let plans = state.plans.values().rev();
    let mut running = plans.filter(|plan| plan.state == PlanState::Running);
    running.next().map(|plan| plan.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixtures, model::PlanKind, state::Hooks, store::memory::Disk};

    #[tokio::test]
    async fn a_host_that_is_contended_at_two_looks_is_relieved_without_an_operator_by_one_plan() {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        // Four VMs of whose use nothing is known, on four processors.
        db.change(|tx| {
            for host in ["h1", "h2"] {
                tx.put_host(fixtures::host(host));
                tx.set_live(fixtures::host_name(host), fixtures::live(tx.now()));
            }
            for name in ["a", "b", "c", "d"] {
                let vm = fixtures::vm(name, "h1");
                tx.observe(vm.id, Some(fixtures::observation(&vm)));
                tx.put_vm(vm);
            }
        })
        .await;
        let runner = runner(&db);
        let relieve = async |before| runner.act(Kind::Rebalance, 10, before).await;
        assert_eq!(relieve(0).await, 1, "it is contended");
        assert!(db.snapshot().plans.is_empty(), "once may be a moment");
        assert_eq!(relieve(1).await, 0);
        let state = db.snapshot();
        let plan = state.plans.values().next().expect("a plan");
        let principal = Kind::Rebalance.principal();
        assert_eq!(
            (plan.state, plan.principal.as_str(), plan.approved_by.as_deref()),
            (PlanState::Running, principal, Some(principal))
        );
        assert!(
            plan.steps
                .iter()
                .all(|step| step.destination == fixtures::host_name("h2")),
            "{plan:?}"
        );
        assert!(
            plan.predicted.hosts_contended < plan.before.hosts_contended,
            "{plan:?}"
        );
        assert_eq!(relieve(1).await, 0);
        assert_eq!(db.snapshot().plans.len(), 1, "one at a time");
    }

    fn runner(db: &Db) -> Runner {
        Runner {
            db: db.clone(),
            policy: Policy::default(),
            usage: Usage::default(),
            moves_an_hour: [(Kind::Rebalance, 10), (Kind::Consolidate, 0)],
        }
    }

    #[tokio::test]
    async fn a_host_that_others_can_take_over_for_half_an_hour_is_emptied_without_an_operator_within_its_budget()
     {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        db.change(|tx| {
            for name in ["h1", "h2", "h3"] {
                let mut host = fixtures::host(name);
                host.inventory.cpus = 32;
                tx.put_host(host);
                tx.set_live(fixtures::host_name(name), fixtures::live(tx.now()));
            }
            for (name, host) in [("a", "h1"), ("b", "h2"), ("c", "h2")] {
                let vm = fixtures::vm(name, host);
                tx.observe(vm.id, Some(fixtures::observation(&vm)));
                tx.put_vm(vm);
            }
        })
        .await;
        let runner = runner(&db);
        assert_eq!(runner.act(Kind::Consolidate, 0, 5).await, 0, "it is off");
        let mut seen = 0;
        for look in 1..=5 {
            seen = runner.act(Kind::Consolidate, 1, seen).await;
            assert_eq!((seen, db.snapshot().plans.len()), (look, 0));
        }
        assert_eq!(runner.act(Kind::Consolidate, 1, seen).await, 0);
        let state = db.snapshot();
        let plan = state.plans.values().next().expect("a plan");
        assert_eq!(
            (plan.state, plan.kind, plan.principal.as_str()),
            (
                PlanState::Running,
                PlanKind::Consolidate,
                "controller/consolidate"
            )
        );
        let moved: Vec<_> = plan.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(moved, ["a"], "one move empties h1 alone");
        assert_eq!(plan.predicted.hosts_on, 1);
    }
}
