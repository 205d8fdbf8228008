//! Makes the passes over the plan that runs, and takes the samples of what VMs use.
//!
//! A task of the controller. It looks every second while a plan runs, and every five minutes whether contended hosts are to be relieved.

use std::time::Duration;

use dalgu_proto::ids::PlanId;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    advance::{Pass, advance},
    automatic::{PRINCIPAL, allowance},
    look::measure,
    usage::{SAMPLE, Usage},
};
use crate::{
    blocking::beside,
    hosts::overcommit,
    model::{Outcome, PlanState},
    placement::Policy,
    state::{Db, State},
    verbs::{
        Caller, Error,
        plan::{self, Aim, Create, Draft},
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
    /// So many VMs an hour are moved away from contended hosts without an operator.
    pub moves_an_hour: usize,
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
        let (mut looks, mut contended) = (0_u32, false);
        loop {
            tick.tick().await;
            self.look(looks).await;
            looks = looks.saturating_add(1);
            if self.moves_an_hour > 0 && looks > LEARNT {
                contended = self.relieve(contended).await;
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

    /// Makes and approves a plan that relieves contended hosts, where that could be done at the look before as well. Returns whether it can be
    /// now, and has not been.
    async fn relieve(&self, before: bool) -> bool {
        let (state, usage, now) = (self.db.snapshot(), self.usage.clone(), self.db.now());
        if state.meta.observing.is_some() || state.replaced_by.is_some() {
            return false;
        }
        let moves = match allowance(&state, now, self.moves_an_hour) {
            Ok(moves) => moves,
            Err(held) => {
                tracing::debug!(%held, "contended hosts are not looked for");
                return false;
            }
        };
        let ask = Create {
            aim: Aim::Rebalance,
            moves,
            copied_mib: u64::MAX,
        };
        let of = ask.clone();
        let draft = match beside(move || Draft::of(&state, &usage, now, &of)).await {
            Ok(draft) if !draft.is_empty() => draft,
            _ => return false,
        };
        if !before {
            return true;
        }
        let caller = Caller {
            principal: PRINCIPAL.into(),
            request_id: String::new(),
            body: String::new(),
        };
        let made = self.db.transact(|tx| -> Result<(), Error> {
            if allowance(tx, tx.now(), self.moves_an_hour).is_ok()
                && let Outcome::Plan(id) = plan::create(tx, &caller, &ask, draft)?
            {
                let hash = plan::find(tx, id)?.hash;
                plan::approve(tx, &caller, id, &hash, DEADLINE)?;
            }
            Ok(())
        });
        if let Err(error) = made.await {
            tracing::warn!(%error, "no plan is made for contended hosts");
        }
        false
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
    use crate::{fixtures, state::Hooks, store::memory::Disk};

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
        let runner = Runner {
            db: db.clone(),
            policy: Policy::default(),
            usage: Usage::default(),
            moves_an_hour: 10,
        };
        assert!(runner.relieve(false).await, "it is contended");
        assert!(db.snapshot().plans.is_empty(), "once may be a moment");
        assert!(!runner.relieve(true).await);
        let state = db.snapshot();
        let plan = state.plans.values().next().expect("a plan");
        assert_eq!(
            (plan.state, plan.principal.as_str(), plan.approved_by.as_deref()),
            (PlanState::Running, PRINCIPAL, Some(PRINCIPAL))
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
        assert!(!runner.relieve(true).await);
        assert_eq!(db.snapshot().plans.len(), 1, "one at a time");
    }
}
