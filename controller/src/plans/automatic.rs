//! Whether VMs may be moved now without an operator, and how many: away from contended hosts, or off hosts that the others can take over. Pure;
//! [`runner`](super::runner) asks before it makes a plan, and once more inside the transaction that approves it.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use crate::{
    model::{PlanFigures, PlanKind, PlanRecord, PlanState, StepState},
    planner::{Consolidation, Fill},
    state::State,
    verbs::plan::{Aim, Draft},
};

/// What a budget of moves is for.
const HOUR: SignedDuration = SignedDuration::from_hours(1);
/// After one such plan has ended the site is left to show what came of it.
const COOL_DOWN: SignedDuration = SignedDuration::from_mins(15);
/// So many such plans are looked back at, and with so many of them wrong
const JUDGED: usize = 3;
const MOST_WRONG: usize = 2;
/// none is approved for so long.
const BRAKE: SignedDuration = SignedDuration::from_hours(24);

/// What is done without an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Contended hosts are relieved.
    Rebalance,
    /// Hosts are emptied.
    Consolidate,
}

impl Kind {
    /// Both, what is urgent first.
    pub const ALL: [Self; 2] = [Self::Rebalance, Self::Consolidate];

    /// Who plans and approves, in the record of who did what.
    pub const fn principal(self) -> &'static str {
        match self {
            Self::Rebalance => "controller/rebalance",
            Self::Consolidate => "controller/consolidate",
        }
    }

    /// So many looks in a row must find it possible: what is so for a moment is not acted on.
    pub const fn looks(self) -> u32 {
        match self {
            Self::Rebalance => 2,
            Self::Consolidate => 6,
        }
    }

    /// What a plan is for.
    pub fn aim(self) -> Aim {
        match self {
            Self::Rebalance => Aim::Rebalance,
            // Well below what counts as contended: what is filled by emptying others is not to be relieved next.
            Self::Consolidate => Aim::Consolidate(Consolidation {
                empty: Fill {
                    deviations: 1.1,
                    share: 0.7,
                },
                ..Consolidation::default()
            }),
        }
    }

    /// Whether a plan is worth it. Where VMs wait, no host is emptied.
    pub fn wants(self, draft: &Draft) -> bool {
        let (before, after) = draft.figures();
        match self {
            Self::Rebalance => !draft.is_empty(),
            Self::Consolidate => {
                let waits = before.hosts_contended > 0 || after.hosts_contended > 0;
                after.hosts_on < before.hosts_on && !waits
            }
        }
    }

    /// For how long nothing is done after a plan of that kind has ended.
    const fn cool_down(self, after: Self) -> SignedDuration {
        match (self, after) {
            // Load that has just been spread comes back.
            (Self::Consolidate, Self::Rebalance) => HOUR,
            (Self::Rebalance, Self::Consolidate) => SignedDuration::ZERO,
            _ => COOL_DOWN,
        }
    }

    fn made(self, plan: &PlanRecord) -> bool {
        plan.principal == self.principal()
    }
}

/// Whether nobody has asked for it.
pub fn is_automatic(plan: &PlanRecord) -> bool {
    Kind::ALL.into_iter().any(|kind| kind.made(plan))
}

/// Whether an ended plan still counts for what may be moved now: it must not be forgotten, however many others are made.
pub fn counts(plan: &PlanRecord, now: Timestamp) -> bool {
    let ended = plan.end_time;
    is_automatic(plan) && ended.is_none_or(|end| now.duration_since(end) < BRAKE)
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
            Self::CoolingDown => "the last one has just ended",
            Self::Spent => "what may be moved in an hour has been",
            Self::Wrong => "two of the last three did not bring what they promised: none for 24 h",
        })
    }
}

/// How many VMs may be moved now for that, of so many in an hour.
///
/// # Errors
/// With the reason, when none may be.
pub fn allowance(state: &State, now: Timestamp, kind: Kind, an_hour: usize) -> Result<usize, Held> {
    let since = |time: Timestamp| now.duration_since(time);
    for plan in state.plans.values() {
        match plan.state {
            PlanState::Running => return Err(Held::Running),
            PlanState::Proposed if since(plan.create_time) < HOUR => return Err(Held::Proposed),
            _ => {}
        }
    }
    let ended = |kind: Kind| {
        let own = state.plans.values().filter(move |plan| kind.made(plan));
        let mut ended: Vec<_> = own.filter_map(|plan| Some((plan.end_time?, plan))).collect();
        ended.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
        ended
    };
    for other in Kind::ALL {
        let last = ended(other).first().map(|(time, _)| *time);
        if last.is_some_and(|last| since(last) < kind.cool_down(other)) {
            return Err(Held::CoolingDown);
        }
    }
    let before = ended(kind);
    let judged = before.iter().take(JUDGED).filter(|(_, plan)| is_wrong(plan));
    let lately = before.first().is_some_and(|(last, _)| since(*last) < BRAKE);
    if lately && judged.count() >= MOST_WRONG {
        return Err(Held::Wrong);
    }
    let own = state.plans.values().filter(|plan| kind.made(plan));
    let recent = own.filter(|plan| plan.approve_time.is_some_and(|time| since(time) < HOUR));
    let moved: usize = recent
        .map(|plan| plan.steps.len() - plan.count(StepState::Waiting))
        .sum();
    match an_hour.saturating_sub(moved) {
        0 => Err(Held::Spent),
        left => Ok(left),
    }
}

/// Whether a plan that has ended did not bring what it promised: fewer contended hosts; or fewer hosts with VMs, and none more that is contended.
pub fn is_wrong(plan: &PlanRecord) -> bool {
    let before = plan.before;
    let brings = |after: PlanFigures| match plan.kind {
        PlanKind::Consolidate => {
            after.hosts_on < before.hosts_on && after.hosts_contended <= before.hosts_contended
        }
        _ => after.hosts_contended < before.hosts_contended,
    };
    let brought = plan.realised.is_some_and(brings);
    plan.state != PlanState::Done || (brings(plan.predicted) && !brought)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dalgu_proto::ids::PlanId;
    use uuid::Uuid;

    use super::*;
    use crate::{
        fixtures,
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
        plan.principal = Kind::Rebalance.principal().into();
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
        assert_eq!(allowance(&state, at(40), Kind::Rebalance, 10), Ok(1));
        assert_eq!(allowance(&state, at(40), Kind::Rebalance, 9), Err(Held::Spent));
        assert_eq!(allowance(&state, at(61), Kind::Rebalance, 10), Ok(5));
        assert_eq!(allowance(&*of(vec![]).await, at(0), Kind::Rebalance, 10), Ok(10));
    }

    #[tokio::test]
    async fn it_waits_after_its_own_plan_and_for_an_operators() {
        let state = of(vec![ended(0, 1, 0)]).await;
        assert_eq!(
            allowance(&state, at(14), Kind::Rebalance, 10),
            Err(Held::CoolingDown)
        );
        assert_eq!(allowance(&state, at(15), Kind::Rebalance, 10), Ok(9));
        for (state, held) in [
            (PlanState::Running, Held::Running),
            (PlanState::Proposed, Held::Proposed),
        ] {
            let mut plan = ended(0, 1, 0);
            plan.principal = "operator/kim".into();
            (plan.state, plan.create_time, plan.end_time) = (state, at(0), None);
            assert_eq!(
                allowance(&*of(vec![plan]).await, at(30), Kind::Rebalance, 10),
                Err(held)
            );
        }
    }

    #[tokio::test]
    async fn two_of_three_that_were_wrong_hold_it_for_a_day() {
        let day = 24 * 60;
        let twice = of(vec![ended(0, 1, 2), ended(100, 1, 0), ended(200, 1, 3)]).await;
        assert_eq!(allowance(&twice, at(300), Kind::Rebalance, 10), Err(Held::Wrong));
        assert_eq!(allowance(&twice, at(200 + day), Kind::Rebalance, 10), Ok(10));
        let once = of(vec![ended(0, 1, 2), ended(100, 1, 0), ended(200, 1, 1)]).await;
        assert_eq!(allowance(&once, at(300), Kind::Rebalance, 10), Ok(10));
        let long_ago = of(vec![
            ended(0, 1, 2),
            ended(50, 1, 2),
            ended(100, 1, 0),
            ended(200, 1, 0),
            ended(210, 1, 0),
        ])
        .await;
        assert_eq!(allowance(&long_ago, at(300), Kind::Rebalance, 10), Ok(10));
        let mut stopped = ended(0, 1, 0);
        stopped.state = PlanState::Stopped;
        assert!(is_wrong(&stopped), "it stopped");
    }

    #[tokio::test]
    async fn hosts_are_not_emptied_in_the_hour_after_some_were_relieved_but_are_relieved_after_some_were_emptied()
     {
        let may = |state: &State, minute, kind| allowance(state, at(minute), kind, 10);
        let relieved = of(vec![ended(0, 4, 0)]).await;
        assert_eq!(may(&relieved, 59, Kind::Consolidate), Err(Held::CoolingDown));
        assert_eq!(
            may(&relieved, 60, Kind::Consolidate),
            Ok(10),
            "a budget of its own"
        );
        let emptied = |minute, on, contended| {
            let figures = |hosts_on, hosts_contended| PlanFigures {
                hosts_on,
                hosts_contended,
                ..PlanFigures::default()
            };
            let mut plan = ended(minute, 4, 0);
            plan.kind = PlanKind::Consolidate;
            plan.principal = Kind::Consolidate.principal().into();
            (plan.before, plan.predicted) = (figures(3, 0), figures(2, 0));
            plan.realised = Some(figures(on, contended));
            plan
        };
        let once = of(vec![emptied(0, 2, 0)]).await;
        assert_eq!(may(&once, 1, Kind::Rebalance), Ok(10));
        assert_eq!(may(&once, 14, Kind::Consolidate), Err(Held::CoolingDown));
        assert_eq!(may(&once, 15, Kind::Consolidate), Ok(6));
        // It emptied none, or made VMs wait.
        for (on, contended, wrong) in [(2, 0, false), (3, 0, true), (2, 1, true)] {
            assert_eq!(is_wrong(&emptied(0, on, contended)), wrong, "{on} {contended}");
            let twice = of(vec![emptied(0, on, contended), emptied(20, on, contended)]).await;
            let held = may(&twice, 100, Kind::Consolidate) == Err(Held::Wrong);
            assert_eq!(held, wrong, "{on} {contended}");
            assert_eq!(may(&twice, 100, Kind::Rebalance), Ok(10));
        }
    }
}
