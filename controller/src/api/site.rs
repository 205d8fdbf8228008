//! `dalgu.v1.SiteService`.

use std::{sync::Arc, time::Duration};

use dalgu_proto::{
    ids::HostName,
    reason, time,
    v1::{self, site_service_server::SiteService},
};
use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Request, Response, Status};

use super::{Services, request};
use crate::{
    blocking::beside,
    doctor::{self, Diagnosis, Files, Severity, View},
    hosts,
    incarnation::{self, Difference, Error, Kind},
    model::Outcome,
    state::{State, Tx},
    verbs,
};

/// A second look of the doctor comes after this time at the latest: a call has half a minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Hosts have so long for what their pools hold, all of them together, at each look.
const LONGEST_LISTING: Duration = Duration::from_secs(8);
/// Pools that are asked at once.
const LISTINGS_AT_ONCE: usize = 32;

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
    /// A change that a repeated request with the same id does not make again.
    async fn change_site<T>(
        &self,
        request: &Request<T>,
        (request_id, content): (&str, &str),
        change: impl FnOnce(&mut Tx, &str) -> Result<(), Error>,
    ) -> Result<Response<v1::Site>, Status> {
        let caller = request::caller(request, request_id, content)?;
        let once = |tx: &mut Tx| {
            verbs::once_also_observing(tx, &caller, |tx| {
                change(tx, &caller.principal)?;
                Ok::<_, Refused>(Outcome::Site)
            })
        };
        self.db.transact(once).await?;
        Ok(Response::new(site(&self.db.snapshot())))
    }

    /// What pools hold. Those that take too long are not waited for.
    async fn files(&self) -> Files {
        let state = self.db.snapshot();
        let deadline = Instant::now() + LONGEST_LISTING;
        let asked = doctor::to_ask(&state).into_iter().map(|(host, pool)| {
            let state = &state;
            async move {
                let files = self.agents.files(state, &host, &pool);
                let files = match timeout_at(deadline, files).await {
                    Ok(files) => files.map_err(|error| error.to_string()),
                    Err(_) => Err(format!("no answer within {} s", LONGEST_LISTING.as_secs())),
                };
                ((host, pool), files)
            }
        });
        stream::iter(asked)
            .buffer_unordered(LISTINGS_AT_ONCE)
            .collect()
            .await
    }

    /// What the doctor finds now.
    async fn examine(&self, damage: Option<Vec<String>>) -> (Arc<State>, Timestamp, Diagnosis) {
        let files = self.files().await;
        let (state, now) = (self.db.snapshot(), self.db.now());
        beside(move || {
            let diagnosis = doctor::examine(&View {
                now,
                silence: hosts::silence(&state),
                damage,
                files,
                state: &state,
            });
            (state, now, diagnosis)
        })
        .await
    }
}

/// Why a change of the site is refused.
enum Refused {
    Verb(verbs::Error),
    Site(Error),
}

impl From<verbs::Error> for Refused {
    fn from(error: verbs::Error) -> Self {
        Self::Verb(error)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Site(error)
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Verb(error) => error.into(),
            Refused::Site(error) => error.into(),
        }
    }
}

fn diagnosis(state: &State, now: Timestamp, found: Diagnosis) -> v1::Diagnosis {
    let finding = |finding: doctor::Finding| v1::Finding {
        invariant: finding.invariant.as_str().to_owned(),
        severity: match finding.severity {
            Severity::Notice => v1::FindingSeverity::Notice,
            Severity::Warning => v1::FindingSeverity::Warning,
            Severity::Critical => v1::FindingSeverity::Critical,
        }
        .into(),
        kind: finding.kind.to_owned(),
        subject: finding.subject,
        seen: finding.seen,
        next_step: finding.next_step,
    };
    let check = |check: doctor::Check| v1::DiagnosisCheck {
        invariant: check.invariant.as_str().to_owned(),
        title: check.title.to_owned(),
        checked: check.checked as u64,
        subjects: check.subjects.to_owned(),
        unchecked: check.unchecked as u64,
        limits: check.limits.to_owned(),
    };
    let gap = |gap: doctor::Gap| v1::DiagnosisGap {
        host: gap.host.to_string(),
        reason: gap.reason,
        vms: gap.vms as u64,
    };
    v1::Diagnosis {
        time: Some(time::to_wire(now)),
        resource_version: state.meta.revision,
        findings: found.findings.into_iter().map(finding).collect(),
        checks: found.checks.into_iter().map(check).collect(),
        gaps: found.gaps.into_iter().map(gap).collect(),
    }
}

#[tonic::async_trait]
impl SiteService for Services {
    async fn get_site(&self, _request: Request<v1::GetSiteRequest>) -> Result<Response<v1::Site>, Status> {
        Ok(Response::new(site(&self.db.snapshot())))
    }

    async fn get_diagnosis(
        &self,
        request: Request<v1::GetDiagnosisRequest>,
    ) -> Result<Response<v1::Diagnosis>, Status> {
        let damage = match request.get_ref().deep {
            true => Some(self.db.damage().await),
            false => None,
        };
        let (mut state, mut now, mut found) = self.examine(damage.clone()).await;
        if !found.findings.is_empty() {
            // What passes by itself is no finding: every host has reported anew by then.
            tokio::time::sleep(self.config.report_interval().min(LONGEST_PAUSE)).await;
            let before = found;
            (state, now, found) = self.examine(damage).await;
            found = found.lasting(&before);
        }
        Ok(Response::new(diagnosis(&state, now, found)))
    }

    async fn waive_host(&self, request: Request<v1::WaiveHostRequest>) -> Result<Response<v1::Site>, Status> {
        let message = request.get_ref();
        let host: HostName = message
            .host
            .parse()
            .map_err(|error: dalgu_proto::ids::Error| reason::invalid("host", error.to_string()))?;
        let content = format!("WaiveHost {host}");
        self.change_site(&request, (&message.request_id, &content), |tx, principal| {
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
        let content = format!("ResumeSite {accept} {etag:?}");
        self.change_site(&request, (&message.request_id, &content), |tx, principal| {
            incarnation::resume(tx, accept, &etag, principal)
        })
        .await
    }
}
