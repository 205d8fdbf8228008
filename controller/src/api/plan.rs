//! `dalgu.v1.PlanService`.

use dalgu_proto::{
    ids::{HostName, PlanId},
    reason,
    v1::{self, plan_service_server::PlanService},
};
use tonic::{Request, Response, Status};

use super::{Services, host::deadline, peer, placement::NewVm, request, wire};
use crate::{
    blocking::beside,
    model::Outcome,
    placement::Request as Question,
    planner::{self, Consolidation},
    plans::{look::measure, maintenance},
    state::{State, Tx},
    verbs::{
        self, Caller, Error,
        plan::{self, Aim, Create, Draft},
    },
};

/// Moves of one plan at most.
const MAX_MOVES: u32 = 1000;
/// Hosts that can be asked about at once.
const MAX_HOSTS: u32 = 1000;

type Answer = Result<Response<v1::Plan>, Status>;

fn plan_id(value: &str) -> Result<PlanId, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid("id", error.to_string()))
}

/// Checks what is asked for.
fn create(state: &State, principal: &str, m: &v1::CreatePlanRequest) -> Result<Create, Status> {
    use v1::PlanKind as Kind;
    let kind =
        Kind::try_from(m.kind).map_err(|_| reason::invalid("kind", "is not one that this version knows"))?;
    if kind != Kind::Evacuate && !m.hosts.is_empty() {
        return Err(reason::invalid(
            "hosts",
            "can be given only with PLAN_KIND_EVACUATE",
        ));
    }
    if kind != Kind::MakeRoom && m.room_for.is_some() {
        return Err(reason::invalid(
            "room_for",
            "can be given only with PLAN_KIND_MAKE_ROOM",
        ));
    }
    let aim = match kind {
        Kind::Unspecified => return Err(reason::invalid("kind", "must be given")),
        Kind::Rebalance => Aim::Rebalance,
        Kind::Consolidate => Aim::Consolidate(Consolidation::default()),
        Kind::Evacuate if m.hosts.is_empty() => {
            return Err(reason::invalid("hosts", "must name the hosts to be emptied"));
        }
        Kind::Evacuate => Aim::Evacuate(hosts(&m.hosts)?),
        Kind::MakeRoom => Aim::MakeRoom(Box::new(room_for(state, principal, m.room_for.as_ref())?)),
    };
    Ok(Create {
        aim,
        moves: count("max_moves", m.max_moves, MAX_MOVES)?,
        copied_mib: match m.max_copied_bytes {
            0 => u64::MAX,
            bytes => bytes >> 20,
        },
    })
}

fn hosts(names: &[String]) -> Result<Vec<HostName>, Status> {
    let hosts: Result<_, _> = names.iter().map(|name| name.parse::<HostName>()).collect();
    hosts.map_err(|error| reason::invalid("hosts", error.to_string()))
}

/// The VM that room is made for.
fn room_for(state: &State, principal: &str, m: Option<&v1::RoomFor>) -> Result<Question, Status> {
    let m = m.ok_or_else(|| reason::invalid("room_for", "must be given with PLAN_KIND_MAKE_ROOM"))?;
    let spec = m.spec.clone();
    let new = NewVm {
        spec: spec.ok_or_else(|| reason::invalid("room_for.spec", "must be given"))?,
        host: &m.host,
        groups: &m.placement_groups,
        tolerations: &m.tolerations,
    };
    let question = new.question(state, principal)?;
    if !question.spec.fitting.is_none() {
        return Err(reason::invalid(
            "room_for.spec",
            "has processors, memory or NUMA nodes of its own, and where these are is not in the account of plans",
        ));
    }
    Ok(question.ignoring_protection(m.ignore_protection))
}

/// A count of which 0 means the most.
fn count(field: &str, value: u32, most: u32) -> Result<usize, Status> {
    let value = match value {
        0 => most,
        value if value <= most => value,
        _ => {
            return Err(reason::invalid(
                field,
                format!("must be 1 to {most}, or 0 for {most}"),
            ));
        }
    };
    Ok(usize::try_from(value).unwrap_or(usize::MAX))
}

impl Services {
    /// Does a verb once, and answers with its plan.
    async fn plan(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Answer {
        let record = self
            .db
            .transact(|tx| {
                let Outcome::Plan(id) = verbs::once(tx, &caller, |tx| change(tx, &caller))? else {
                    return Err(Error::RequestReused(caller.request_id.clone()));
                };
                plan::find(tx, id)
            })
            .await?;
        Ok(Response::new(wire::plan(&self.db.snapshot(), &record)))
    }
}

#[tonic::async_trait]
impl PlanService for Services {
    async fn create_plan(&self, request: Request<v1::CreatePlanRequest>) -> Answer {
        let m = request.get_ref();
        let (state, usage, now) = (self.db.snapshot(), self.plan_usage.clone(), self.db.now());
        let ask = create(&state, &peer(&request)?.to_string(), m)?;
        let caller = request::caller(&request, &m.request_id, &format!("CreatePlan {ask:?}"))?;
        let of = ask.clone();
        let draft = beside(move || Draft::of(&state, &usage, now, &of)).await;
        self.plan(caller, |tx, caller| plan::create(tx, caller, &ask, draft?))
            .await
    }

    async fn get_plan(&self, request: Request<v1::GetPlanRequest>) -> Answer {
        let id = plan_id(&request.get_ref().id)?;
        let state = self.db.snapshot();
        let record = plan::find(&state, id)?;
        Ok(Response::new(wire::plan(&state, &record)))
    }

    async fn plan_maintenance(
        &self,
        request: Request<v1::PlanMaintenanceRequest>,
    ) -> Result<Response<v1::MaintenancePlan>, Status> {
        let m = request.into_inner();
        if !(1..=MAX_HOSTS as usize).contains(&m.hosts.len()) {
            return Err(reason::invalid(
                "hosts",
                format!("must name 1 to {MAX_HOSTS} hosts"),
            ));
        }
        let ask = maintenance::Ask {
            hosts: hosts(&m.hosts)?,
            settings: planner::Maintenance {
                at_once: count("max_hosts", m.max_hosts, MAX_HOSTS)?,
                groups: count("max_groups", m.max_groups, MAX_HOSTS)?,
                spare: !m.without_spare_host,
            },
        };
        let (state, usage, now) = (self.db.snapshot(), self.plan_usage.clone(), self.db.now());
        let (groups, held) = beside(move || maintenance::group(&state, &usage, now, &ask)).await?;
        Ok(Response::new(wire::maintenance(&groups, &held)))
    }

    async fn list_plans(
        &self,
        _request: Request<v1::ListPlansRequest>,
    ) -> Result<Response<v1::ListPlansResponse>, Status> {
        let state = self.db.snapshot();
        let mut plans: Vec<_> = state.plans.values().collect();
        plans.sort_by_key(|plan| std::cmp::Reverse(plan.create_time));
        Ok(Response::new(v1::ListPlansResponse {
            plans: plans.into_iter().map(|plan| wire::plan(&state, plan)).collect(),
        }))
    }

    async fn approve_plan(&self, request: Request<v1::ApprovePlanRequest>) -> Answer {
        let m = request.get_ref();
        let (id, within) = (plan_id(&m.id)?, deadline(m.deadline_seconds)?);
        let content = format!("ApprovePlan {id} {} {within:?}", m.hash);
        let caller = request::caller(&request, &m.request_id, &content)?;
        self.plan(caller, |tx, caller| {
            plan::approve(tx, caller, id, &m.hash, within)
        })
        .await
    }

    async fn cancel_plan(&self, request: Request<v1::CancelPlanRequest>) -> Answer {
        let m = request.get_ref();
        let id = plan_id(&m.id)?;
        let caller = request::caller(&request, &m.request_id, &format!("CancelPlan {id}"))?;
        let site = measure(&self.db, &self.plan_usage).await;
        self.plan(caller, |tx, caller| plan::cancel(tx, caller, id, site))
            .await
    }
}
