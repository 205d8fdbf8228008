//! `dalgu.v1.SiteService`.

use dalgu_proto::{
    ids::HostName,
    reason, time,
    v1::{self, site_service_server::SiteService},
};
use tonic::{Code, Request, Response, Status};

use super::{Services, peer, request};
use crate::{
    incarnation::{self, Difference, Error, Kind},
    state::{State, Tx},
};

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, why) = match &error {
            Error::UnknownHost(_) => (Code::NotFound, "HOST_NOT_FOUND"),
            Error::NotObserving => (Code::FailedPrecondition, "SITE_NOT_OBSERVING"),
            Error::Waiting(_) => (Code::FailedPrecondition, "HOSTS_NOT_HEARD"),
            Error::Differences(_) => (Code::FailedPrecondition, "DIFFERENCES"),
            Error::Changed => (Code::Aborted, "ETAG_MISMATCH"),
        };
        reason::status(code, why, error.to_string())
    }
}

fn site(state: &State) -> v1::Site {
    let found = incarnation::differences(state);
    let observing = state.meta.observing.as_ref();
    let names = |hosts: Vec<HostName>| hosts.iter().map(ToString::to_string).collect();
    v1::Site {
        cluster_id: state.meta.cluster_id.to_string(),
        incarnation: state.meta.incarnation,
        term: state.meta.term.0,
        observing: observing.is_some(),
        observe_since: observing.map(|observing| time::to_wire(observing.since)),
        waiting_hosts: names(incarnation::waiting(state)),
        waived_hosts: observing.map_or_else(Vec::new, |o| names(o.waived.iter().cloned().collect())),
        etag: incarnation::etag(&found),
        differences: found.into_iter().map(difference).collect(),
        replaced_by: state.replaced_by.clone().unwrap_or_default(),
    }
}

fn difference(found: Difference) -> v1::SiteDifference {
    let kind = match found.kind {
        Kind::UnknownVm => v1::SiteDifferenceKind::UnknownVm,
        Kind::MissingVm => v1::SiteDifferenceKind::MissingVm,
        Kind::OtherOwner => v1::SiteDifferenceKind::OtherOwner,
        Kind::PowerState => v1::SiteDifferenceKind::PowerState,
        Kind::Migrating => v1::SiteDifferenceKind::Migrating,
        Kind::SeveralHosts => v1::SiteDifferenceKind::SeveralHosts,
        Kind::Deleting => v1::SiteDifferenceKind::Deleting,
    };
    v1::SiteDifference {
        kind: kind.into(),
        vm: found.name,
        vm_uid: found.id.to_string(),
        hosts: found.hosts.iter().map(ToString::to_string).collect(),
        in_store: found.in_store,
        on_hosts: found.on_hosts,
        consequence: found.kind.consequence().to_owned(),
    }
}

impl Services {
    /// A change that is harmless when it is repeated: its request id need not be remembered.
    async fn change_site<T>(
        &self,
        request: &Request<T>,
        request_id: &str,
        change: impl FnOnce(&mut Tx, &str) -> Result<(), Error>,
    ) -> Result<Response<v1::Site>, Status> {
        request::caller(request, request_id, "")?;
        let principal = peer(request)?.to_string();
        self.db.transact(|tx| change(tx, &principal)).await?;
        Ok(Response::new(site(&self.db.snapshot())))
    }
}

#[tonic::async_trait]
impl SiteService for Services {
    async fn get_site(&self, _request: Request<v1::GetSiteRequest>) -> Result<Response<v1::Site>, Status> {
        Ok(Response::new(site(&self.db.snapshot())))
    }

    async fn waive_host(&self, request: Request<v1::WaiveHostRequest>) -> Result<Response<v1::Site>, Status> {
        let message = request.get_ref();
        let host: HostName = message
            .host
            .parse()
            .map_err(|error: dalgu_proto::ids::Error| reason::invalid("host", error.to_string()))?;
        self.change_site(&request, &message.request_id, |tx, principal| {
            incarnation::waive(tx, &host, principal)
        })
        .await
    }

    async fn resume_site(
        &self,
        request: Request<v1::ResumeSiteRequest>,
    ) -> Result<Response<v1::Site>, Status> {
        let message = request.get_ref();
        let (accept, etag) = (message.accept_differences, message.etag.clone());
        self.change_site(&request, &message.request_id, |tx, principal| {
            incarnation::resume(tx, accept, &etag, principal)
        })
        .await
    }
}
