//! `dalgu op`.

use std::time::Duration;

use dalgu_proto::v1;
use tonic::Status;

use super::{
    PAGE, Session,
    show::{get, show},
};
use crate::{
    args::{OpCommand, WaitArgs},
    client::Client,
    exit::Error,
    output::{self, Format, operation::has_ended},
    progress,
    watch::{Page, Snapshot, Watch, pages},
};

/// Does a command.
pub async fn run(command: OpCommand, session: &mut Session<'_>) -> Result<(), Error> {
    match command {
        OpCommand::List {
            vm,
            active,
            limit,
            watch,
        } => {
            let request = v1::ListOperationsRequest {
                page_size: PAGE.min(i32::try_from(limit).unwrap_or(PAGE)),
                page_token: String::new(),
                vm: vm.unwrap_or_default(),
                active_only: active,
            };
            show_all(request, limit, watch, session).await
        }
        OpCommand::Show { id, watch } => show::<v1::Operation>(&id, watch, session).await,
        OpCommand::Wait { id, timeout } => {
            let operation = get(&session.client, &id).await?;
            let limit = timeout.unwrap_or(WaitArgs::DEFAULT);
            let operation = progress::wait(&session.client, operation, limit, session.term).await?;
            session.ended(operation).await
        }
        OpCommand::Cancel { id, no_wait, timeout } => {
            cancel(id, no_wait, timeout.unwrap_or(WaitArgs::DEFAULT), session).await
        }
    }
}

async fn list(
    client: &Client,
    request: v1::ListOperationsRequest,
    limit: usize,
) -> Result<Snapshot<v1::Operation>, Status> {
    let read = async |page_token| {
        let request = v1::ListOperationsRequest {
            page_token,
            ..request.clone()
        };
        let page = client
            .call(async |client| client.operations().list_operations(request.clone()).await)
            .await?;
        Ok(Page {
            items: page.operations,
            next: page.next_page_token,
            version: page.resource_version,
        })
    };
    pages(limit, read).await
}

async fn show_all(
    request: v1::ListOperationsRequest,
    limit: usize,
    watch: bool,
    session: &mut Session<'_>,
) -> Result<(), Error> {
    if !watch {
        let (operations, _) = list(&session.client, request, limit).await?;
        return output::list(session.term, session.format, &operations);
    }
    // With --active an operation that ends leaves the table on a screen; elsewhere its end is the news.
    let drop_ended = request.active_only && session.term.out_screen;
    let wanted = |operation: &v1::Operation| {
        (request.vm.is_empty() || operation.vm == request.vm) && !(drop_ended && has_ended(operation))
    };
    let client = &session.client;
    let watch = Watch {
        client,
        format: session.format,
        subject: "",
        single: false,
        wanted: &wanted,
    };
    watch
        .run(session.term, async || list(client, request.clone(), limit).await)
        .await
}

async fn cancel(id: String, no_wait: bool, limit: Duration, session: &mut Session<'_>) -> Result<(), Error> {
    let request = v1::CancelOperationRequest { id };
    let answer = session
        .change(limit, async |client| {
            client.operations().cancel_operation(request.clone()).await
        })
        .await;
    let (operation, sentence) = match answer {
        Ok(operation) if no_wait => return session.accepted(&operation),
        Ok(operation) => {
            let operation = progress::wait(&session.client, operation, limit, session.term).await?;
            (operation, format!("cancelled {}", request.id))
        }
        Err(error) => {
            let operation = cancelled_before(&request.id, error, session).await?;
            (operation, format!("{} was already cancelled", request.id))
        }
    };
    if !matches!(session.format, Format::Table | Format::Wide) {
        output::one(session.term, session.format, &operation)?;
    }
    match operation.state() {
        v1::OperationState::Cancelled => Ok(session.term.say(&sentence)?),
        v1::OperationState::Succeeded => Err(Error::TooLate(Box::new(operation))),
        _ => progress::outcome(operation).map(drop),
    }
}

/// The operation, when it is not cancelled because it has been already: nothing is wrong with asking twice.
async fn cancelled_before(id: &str, error: Error, session: &Session<'_>) -> Result<v1::Operation, Error> {
    if !error.has_reason("NOT_CANCELLABLE") {
        return Err(error);
    }
    match get::<v1::Operation>(&session.client, id).await {
        Ok(operation) if operation.state() == v1::OperationState::Cancelled => Ok(operation),
        Ok(operation) if has_ended(&operation) => Err(Error::TooLate(Box::new(operation))),
        // It goes on, or cannot be read: the refusal says what there is to say.
        _ => Err(error),
    }
}
