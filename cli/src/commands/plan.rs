//! `dalgu plan`: proposed, looked at, approved, followed to its end.

use std::{collections::BTreeMap, time::Duration};

use dalgu_proto::v1;
use tokio::time::sleep;

use super::{
    Session,
    host::{drain::seconds, id as request_id},
    spec,
};
use crate::{
    args::{
        host::DrainTime,
        plan::{BudgetArgs, PlanCommand},
    },
    client::{CALL_TIMEOUT, Client},
    exit::Error,
    output::{self, Format, human, plan::line},
};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// Does a command.
pub async fn run(command: PlanCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        PlanCommand::Rebalance(budget) => {
            let request = v1::CreatePlanRequest::default();
            propose(v1::PlanKind::Rebalance, request, &budget, session).await
        }
        PlanCommand::Consolidate(budget) => {
            let request = v1::CreatePlanRequest::default();
            propose(v1::PlanKind::Consolidate, request, &budget, session).await
        }
        PlanCommand::Evacuate { hosts, budget } => {
            let request = v1::CreatePlanRequest {
                hosts,
                ..Default::default()
            };
            propose(v1::PlanKind::Evacuate, request, &budget, session).await
        }
        PlanCommand::MakeRoom(args) => {
            let room_for = v1::RoomFor {
                spec: Some(spec::of(&args.spec)?),
                host: args.host.unwrap_or_default(),
                placement_groups: args.placement.groups,
                tolerations: args.placement.tolerations,
                ignore_protection: args.ignore_protection,
            };
            let request = v1::CreatePlanRequest {
                room_for: Some(room_for),
                ..Default::default()
            };
            propose(v1::PlanKind::MakeRoom, request, &args.budget, session).await
        }
        PlanCommand::List => {
            let request = v1::ListPlansRequest {};
            let answer = session
                .read(async |client| client.plans().list_plans(request).await)
                .await?;
            output::list(session.term, session.format, &answer.plans)
        }
        PlanCommand::Show { id } => {
            let plan = get(session, &id).await?;
            output::one(session.term, session.format, &plan)
        }
        PlanCommand::Approve {
            id,
            hash,
            time,
            request,
        } => {
            let request = v1::ApprovePlanRequest {
                id,
                hash,
                deadline_seconds: seconds(time.deadline)?,
                request_id: request_id(&request),
            };
            let approve = async |client: &Client| client.plans().approve_plan(request.clone()).await;
            let plan = session.change(CALL_TIMEOUT, approve).await?;
            follow(plan, &time, session).await
        }
        PlanCommand::Cancel { id, request } => {
            let request = v1::CancelPlanRequest {
                id,
                request_id: request_id(&request),
            };
            let cancel = async |client: &Client| client.plans().cancel_plan(request.clone()).await;
            let plan = session.change(CALL_TIMEOUT, cancel).await?;
            if !people(session) {
                return output::one(session.term, session.format, &plan);
            }
            Ok(session
                .term
                .say(&human::clean(&format!("cancelled: {}", plan.message)))?)
        }
    }
}

fn people(session: &Session<'_>) -> bool {
    matches!(session.format, Format::Table | Format::Wide)
}

async fn get(session: &Session<'_>, id: &str) -> Result<v1::Plan, Error> {
    let request = v1::GetPlanRequest { id: id.to_owned() };
    session
        .read(async |client| client.plans().get_plan(request.clone()).await)
        .await
}

async fn propose(
    kind: v1::PlanKind,
    request: v1::CreatePlanRequest,
    budget: &BudgetArgs,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    let request = v1::CreatePlanRequest {
        kind: kind.into(),
        max_moves: budget.max_moves,
        max_copied_bytes: budget.max_copied.unwrap_or_default() << 20,
        request_id: request_id(&budget.request),
        ..request
    };
    let create = async |client: &Client| client.plans().create_plan(request.clone()).await;
    let plan = session.change(CALL_TIMEOUT, create).await?;
    output::one(session.term, session.format, &plan)?;
    if people(session) && plan.state() == v1::PlanState::Proposed {
        let (id, hash) = (human::clean(&plan.id), human::clean(&plan.hash));
        session.term.say(&format!(
            "nothing has moved; `dalgu plan approve {id} --hash {hash}` carries it out"
        ))?;
    }
    Ok(())
}

/// Tells what becomes of each move until the plan has ended.
async fn follow(mut plan: v1::Plan, time: &DrainTime, session: &mut Session<'_>) -> Result<(), Error> {
    let mut told = BTreeMap::new();
    loop {
        if people(session) {
            let steps = plan
                .steps
                .iter()
                .filter(|step| step.state() != v1::PlanStepState::Waiting);
            for step in steps {
                let text = line(step);
                if told.get(&step.vm) != Some(&text) {
                    session.term.say(&text)?;
                    told.insert(step.vm.clone(), text);
                }
            }
        }
        if plan.state() != v1::PlanState::Running || time.no_wait {
            if !people(session) {
                output::one(session.term, session.format, &plan)?;
            }
            return ended(&plan, session);
        }
        // Cancel safe: the plan is the controller's.
        tokio::select! {
            () = sleep(LOOK) => {}
            () = (session.term.interrupt)() => return Err(Error::PlanInterrupted(human::clean(&plan.id))),
        }
        plan = get(session, &plan.id).await?;
    }
}

fn ended(plan: &v1::Plan, session: &mut Session<'_>) -> Result<(), Error> {
    let (id, message) = (human::clean(&plan.id), human::clean(&plan.message));
    match plan.state() {
        v1::PlanState::Running => Ok(session.term.say(&format!(
            "it is carried out; `dalgu plan show {id}` shows how far it is"
        ))?),
        v1::PlanState::Done => Ok(session.term.say(&format!("done; {message}"))?),
        state => {
            let state = human::value::<v1::PlanState>(state.into()).to_lowercase();
            Err(Error::PlanEnded(format!("plan {id} is {state}; {message}")))
        }
    }
}
