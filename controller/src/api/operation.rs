//! `dalgu.v1.OperationService`.

use std::{ops::Bound, time::Duration};

use dalgu_proto::{
    ids::OperationId,
    reason, time,
    v1::{self, operation_service_server::OperationService},
};
use tonic::{Request, Response, Status};

use super::{Services, page::Page, request, wire};
use crate::verbs::{Error, cancel};

const DEFAULT_WAIT: Duration = Duration::from_secs(30);
const MAX_WAIT: Duration = Duration::from_secs(300);

fn parse(value: &str) -> Result<OperationId, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid("id", error.to_string()))
}

impl Services {
    fn read_operation(&self, id: OperationId) -> Result<Response<v1::Operation>, Status> {
        let found = wire::operation_by_id(&self.db.snapshot(), id, self.db.now());
        Ok(Response::new(
            found.ok_or_else(|| Error::OperationNotFound(id.to_string()))?,
        ))
    }
}

#[tonic::async_trait]
impl OperationService for Services {
    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        self.read_operation(parse(&request.get_ref().id)?)
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let list = format!("operations {:?} {}", request.vm, request.active_only);
        let page = Page::of(request.page_size, &request.page_token, &list)?;
        let until = match &page.after {
            Some(id) => Bound::Excluded(parse(id)?),
            None => Bound::Unbounded,
        };
        let state = self.db.snapshot();
        let newest_first = state
            .operations
            .range((Bound::Unbounded, until))
            .rev()
            .map(|(_, operation)| operation);
        let found = newest_first.filter(|operation| {
            (request.vm.is_empty() || operation.vm_name.as_str() == request.vm)
                && (!request.active_only || operation.is_active())
        });
        let (operations, next_page_token) = page.take(found, |operation| operation.id.to_string());
        let now = self.db.now();
        let operations = operations
            .into_iter()
            .map(|operation| wire::operation(&state, operation, now))
            .collect();
        let resource_version = state.meta.revision;
        Ok(Response::new(v1::ListOperationsResponse {
            operations,
            next_page_token,
            resource_version,
        }))
    }

    async fn wait_operation(
        &self,
        request: Request<v1::WaitOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let request = request.into_inner();
        let id = parse(&request.id)?;
        let limit = match &request.timeout {
            None => DEFAULT_WAIT,
            Some(limit) => match time::duration_from_wire(limit) {
                Some(Duration::ZERO) => DEFAULT_WAIT,
                Some(limit) => limit.min(MAX_WAIT),
                None => return Err(reason::invalid("timeout", "must not be negative")),
            },
        };
        let mut states = self.db.watch();
        // An operation that has been forgotten ends the wait too.
        let ended = states.wait_for(|state| {
            state
                .operations
                .get(&id)
                .is_none_or(|operation| !operation.is_active())
        });
        // Cancel safe: nothing is taken from a watch; the operation is read again below.
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            _ = tokio::time::timeout(limit, ended) => {}
        }
        self.read_operation(id)
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let id = parse(&request.get_ref().id)?;
        let caller = request::caller(&request, "", "CancelOperation")?;
        self.db.transact(|tx| cancel::cancel(tx, &caller, id)).await?;
        self.read_operation(id)
    }
}
