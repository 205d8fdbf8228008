//! Whether contended hosts may be relieved now without an operator, and by how many moves. Pure; [`runner`](super::runner) asks before it makes a
//! plan, and once more inside the transaction that approves it.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use crate::{
    model::{PlanRecord, PlanState, StepState},
    state::State,
};

/// Who plans and approves here, in the record of who did what.
pub const PRINCIPAL: &str = "controller/rebalance";

/// What a budget of moves is for.
const HOUR: SignedDuration = SignedDuration::from_hours(1);
/// After one such plan has ended the site is left to show what came of it.
const COOL_DOWN: SignedDuration = SignedDuration::from_mins(15);
/// So many such plans are looked back at, and with so many of them wrong
const JUDGED: usize = 3;
const MOST_WRONG: usize = 2;
/// none is approved for so long.
const BRAKE: SignedDuration = SignedDuration::from_hours(24);

/// Whether an ended plan still counts for what may be moved now: it must not be forgotten, however many others are made.
pub fn counts(plan: &PlanRecord, now: Timestamp) -> bool {
    let ended = plan.end_time;
    plan.principal == PRINCIPAL && ended.is_none_or(|end| now.duration_since(end) < BRAKE)
}

/// Why nothing may be moved now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// A plan is carried out.
    Running,
    /// An operator has one that waits for approval; another would take its place.
    Proposed,
    /// The last one has ended a moment ago.
    CoolingDown,
    /// What may be moved in an hour has been.
    Spent,
    /// Predictions were wrong.
    Wrong,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "a plan is carried out",
            Self::Proposed => "an operator's plan waits for approval",
            Self::CoolingDown => "the last one ended less than 15 min ago",
            Self::Spent => "what may be moved in an hour has been",
            Self::Wrong => "two of the last three did not bring what they promised: none for 24 h",
        })
    }
}

/// How many VMs may be moved now, of so many in an hour.
///
/// # Errors
/// With the reason, when none may be.
pub fn allowance(state: &State, now: Timestamp, an_hour: usize) -> Result<usize, Held> {
    let since = |time: Timestamp| now.duration_since(time);
    for plan in state.plans.values() {
        match plan.state {
            PlanState::Running => return Err(Held::Running),
            PlanState::Proposed if since(plan.create_time) < HOUR => return Err(Held::Proposed),
            _ => {}
        }
    }
    let own = || state.plans.values().filter(|plan| plan.principal == PRINCIPAL);
    let mut ended: Vec<_> = own().filter_map(|plan| Some((plan.end_time?, plan))).collect();
    ended.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    if let Some((last, _)) = ended.first() {
        if since(*last) < COOL_DOWN {
            return Err(Held::CoolingDown);
        }
        let judged = ended.iter().take(JUDGED).filter(|(_, plan)| is_wrong(plan));
        if since(*last) < BRAKE && judged.count() >= MOST_WRONG {
            return Err(Held::Wrong);
        }
    }
    let recent = own().filter(|plan| plan.approve_time.is_some_and(|time| since(time) < HOUR));
    let moved: usize = recent
        .map(|plan| plan.steps.len() - plan.count(StepState::Waiting))
        .sum();
    match an_hour.saturating_sub(moved) {
        0 => Err(Held::Spent),
        left => Ok(left),
    }
}

/// Whether a plan that has ended did not bring what it promised: fewer contended hosts.
pub fn is_wrong(plan: &PlanRecord) -> bool {
    let promised = plan.predicted.hosts_contended < plan.before.hosts_contended;
    let brought = plan
        .realised
        .is_some_and(|realised| realised.hosts_contended < plan.before.hosts_contended);
    plan.state != PlanState::Done || (promised && !brought)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dalgu_proto::ids::PlanId;
    use uuid::Uuid;

    use super::*;
    use crate::{
        fixtures,
        model::PlanFigures,
        state::{Db, Hooks},
        store::memory::Disk,
    };

    const MINUTE: i64 = 60;

    fn at(minutes: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + minutes * MINUTE).unwrap()
    }

    /// A plan of this module's own with that many moves, which ended at that minute and left so many of two hosts contended.
    fn ended(minute: i64, moves: usize, left: u32) -> PlanRecord {
        let mut plan = fixtures::plan(&fixtures::vm("web", "h1"), "h2");
        let contended = |hosts_contended| PlanFigures {
            hosts_contended,
            ..PlanFigures::default()
        };
        plan.id = PlanId::from_uuid(Uuid::now_v7());
        plan.principal = PRINCIPAL.into();
        plan.state = PlanState::Done;
        plan.steps[0].state = StepState::Moved;
        plan.steps = vec![plan.steps[0].clone(); moves];
        (plan.before, plan.predicted) = (contended(2), contended(0));
        plan.realised = Some(contended(left));
        plan.approve_time = Some(at(minute));
        plan.end_time = Some(at(minute));
        plan
    }

    async fn of(plans: Vec<PlanRecord>) -> Arc<State> {
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        db.change(|tx| plans.into_iter().for_each(|plan| tx.put_plan(plan)))
            .await;
        db.snapshot()
    }

    #[tokio::test]
    async fn a_budget_is_of_the_last_hour_and_of_its_own_moves_only() {
        let mut operators = ended(0, 30, 0);
        operators.principal = "operator/kim".into();
        let state = of(vec![ended(0, 4, 0), ended(20, 5, 1), operators]).await;
        assert_eq!(allowance(&state, at(40), 10), Ok(1));
        assert_eq!(allowance(&state, at(40), 9), Err(Held::Spent));
        assert_eq!(allowance(&state, at(61), 10), Ok(5));
        assert_eq!(allowance(&*of(vec![]).await, at(0), 10), Ok(10));
    }

    #[tokio::test]
    async fn it_waits_after_its_own_plan_and_for_an_operators() {
        let state = of(vec![ended(0, 1, 0)]).await;
        assert_eq!(allowance(&state, at(14), 10), Err(Held::CoolingDown));
        assert_eq!(allowance(&state, at(15), 10), Ok(9));
        for (state, held) in [
            (PlanState::Running, Held::Running),
            (PlanState::Proposed, Held::Proposed),
        ] {
            let mut plan = ended(0, 1, 0);
            plan.principal = "operator/kim".into();
            (plan.state, plan.create_time, plan.end_time) = (state, at(0), None);
            assert_eq!(allowance(&*of(vec![plan]).await, at(30), 10), Err(held));
        }
    }

    #[tokio::test]
    async fn two_of_three_that_were_wrong_hold_it_for_a_day() {
        let day = 24 * 60;
        let twice = of(vec![ended(0, 1, 2), ended(100, 1, 0), ended(200, 1, 3)]).await;
        assert_eq!(allowance(&twice, at(300), 10), Err(Held::Wrong));
        assert_eq!(allowance(&twice, at(200 + day), 10), Ok(10));
        let once = of(vec![ended(0, 1, 2), ended(100, 1, 0), ended(200, 1, 1)]).await;
        assert_eq!(allowance(&once, at(300), 10), Ok(10));
        let long_ago = of(vec![
            ended(0, 1, 2),
            ended(50, 1, 2),
            ended(100, 1, 0),
            ended(200, 1, 0),
            ended(210, 1, 0),
        ])
        .await;
        assert_eq!(allowance(&long_ago, at(300), 10), Ok(10));
        let mut stopped = ended(0, 1, 0);
        stopped.state = PlanState::Stopped;
        assert!(is_wrong(&stopped), "it stopped");
    }
}
