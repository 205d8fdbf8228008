//! Several creations in one request.

use dalgu_proto::{reason, v1};
use futures::{StreamExt as _, stream};
use tonic::{Request, Response, Status};

use super::{Services, content, request, wire};
use crate::{
    model::{OperationKind, Outcome},
    state::Tx,
    verbs::{
        self, Caller, Error,
        create::{self, Create},
        refused,
    },
};

/// VMs of one request. All of them are decided on in one transaction, beside which no other goes on.
const MOST: usize = 2000;
/// Those that are accepted one by one wait for the store together.
const AT_ONCE: usize = 64;

type Answer = Result<Response<v1::BatchCreateVmsResponse>, Status>;

/// Creates all of them, or each for itself.
pub(super) async fn create(services: &Services, asked: &Request<v1::BatchCreateVmsRequest>) -> Answer {
    let message = asked.get_ref();
    if message.requests.is_empty() || message.requests.len() > MOST {
        let count = message.requests.len();
        return Err(reason::invalid(
            "requests",
            format!("must be 1 to {MOST}, got {count}"),
        ));
    }
    let all = message.requests.iter().enumerate();
    let all = all.map(|(index, one)| {
        let bad = |field, why: &str| Err(reason::invalid(&format!("requests[{index}].{field}"), why));
        if one.validate_only {
            return bad(
                "validate_only",
                "must be false: ask PlacementService/GetCapacity how many fit",
            );
        }
        if !one.request_id.is_empty() {
            return bad("request_id", "must be empty: the list has one for all");
        }
        super::create(services, one).map_err(|status| named(index, one, &status))
    });
    let all: Vec<_> = all.collect::<Result<_, _>>()?;
    let content: String = all.iter().map(content).collect();
    let caller = request::caller(asked, &message.request_id, &content)?;
    let all = all.into_iter().enumerate();
    let all: Vec<_> = all.map(|(index, new)| (new, of_one(&caller, index))).collect();
    let results = if message.all_or_nothing {
        together(services, message, all).await?
    } else {
        let each = stream::iter(all).map(|(new, caller)| alone(services, new, caller));
        each.buffered(AT_ONCE).collect().await
    };
    Ok(Response::new(v1::BatchCreateVmsResponse { results }))
}

/// Who asks for one of the list.
fn of_one(caller: &Caller, index: usize) -> Caller {
    let mut one = caller.clone();
    if !one.request_id.is_empty() {
        one.request_id += &format!("/{index}");
    }
    one
}

/// A refusal that says which of the requests it is about.
fn named(index: usize, one: &v1::CreateVmRequest, status: &Status) -> Status {
    let name = one.vm.as_ref().map_or("", |vm| &vm.name);
    let message = format!("requests[{index}], VM {name:?}: {}", status.message());
    Status::with_details(status.code(), message, status.details().to_vec().into())
}

fn made(tx: &mut Tx, new: Create, caller: &Caller) -> Result<Outcome, Error> {
    verbs::once(tx, caller, |tx| create::create(tx, caller, new))
}

async fn together(
    services: &Services,
    message: &v1::BatchCreateVmsRequest,
    asked: Vec<(Create, Caller)>,
) -> Result<Vec<v1::CreateVmResult>, Status> {
    let names: Vec<_> = asked.iter().map(|(new, _)| new.name.clone()).collect();
    let change = |tx: &mut Tx| {
        let all = asked.into_iter().enumerate();
        let all = all.map(|(index, (new, caller))| made(tx, new, &caller).map_err(|error| (index, error)));
        all.collect::<Result<Vec<_>, _>>()
    };
    let outcomes = match services.db.transact(change).await {
        Ok(outcomes) => outcomes,
        Err((index, error)) => {
            services.wake(&error).await;
            if let Some(name) = names.get(index) {
                refused::keep_of_batch(&services.db, name, index, &error).await;
            }
            return Err(named(index, &message.requests[index], &Status::from(error)));
        }
    };
    let results = outcomes.iter();
    Ok(results
        .map(|outcome| result(services, outcome, &message.request_id))
        .collect())
}

async fn alone(services: &Services, new: Create, caller: Caller) -> v1::CreateVmResult {
    let name = new.name.clone();
    let outcome = services.db.transact(|tx| made(tx, new, &caller)).await;
    match outcome {
        Ok(outcome) => result(services, &outcome, &caller.request_id),
        Err(error) => {
            services.wake(&error).await;
            refused::keep(&services.db, &name, OperationKind::Create, &error).await;
            refused(&error)
        }
    }
}

fn refused(error: &Error) -> v1::CreateVmResult {
    v1::CreateVmResult {
        operation: None,
        error: Some(wire::operation_error(&error.fault())),
    }
}

fn result(services: &Services, outcome: &Outcome, request_id: &str) -> v1::CreateVmResult {
    let Outcome::Operation(id) = outcome else {
        return refused(&Error::RequestReused(request_id.to_owned()));
    };
    let operation = wire::operation_by_id(&services.db.snapshot(), *id, services.db.now());
    match operation {
        Some(operation) => v1::CreateVmResult {
            operation: Some(operation),
            error: None,
        },
        None => refused(&Error::OperationNotFound(id.to_string())),
    }
}
