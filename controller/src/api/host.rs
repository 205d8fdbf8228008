//! `dalgu.v1.HostService`.

pub(super) mod power;

use std::{collections::BTreeSet, ops::Bound, time::Duration};

use dalgu_proto::{
    ids::HostName,
    placement, reason,
    v1::{self, host_service_server::HostService},
};
use tonic::{Request, Response, Status};

use super::{Services, page::Page, request, wire};
use crate::{
    drains::advance::{self, Limits},
    model::Outcome,
    state::Tx,
    verbs::{
        self, Caller, Error, drain,
        host::{self, Update},
    },
};

const MUTABLE: [&str; 5] = [
    "labels",
    "cpu_overcommit_ratio",
    "reserved_memory_mib",
    "taints",
    "max_vms",
];
const MUTABLE_TEXT: &str = "labels, cpu_overcommit_ratio, reserved_memory_mib, taints, max_vms";
const RATIO: std::ops::RangeInclusive<f64> = 0.1..=64.0;
const MAX_REASON: usize = 256;
const DEFAULT_DEADLINE: Duration = Duration::from_secs(3600);
const MAX_DEADLINE_SECONDS: u32 = 7 * 24 * 3600;
/// What is shown of a drain before it is begun: everything, unless nearly every VM is refused.
const PREVIEW: Limits = Limits {
    under_way: usize::MAX,
    refusals: 64,
};

fn parse(field: &str, value: &str) -> Result<HostName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

impl Services {
    fn host(&self, name: &HostName) -> Result<Response<v1::Host>, Status> {
        let state = self.db.snapshot();
        let host = state
            .hosts
            .get(name)
            .ok_or_else(|| Error::HostNotFound(name.to_string()))?;
        Ok(Response::new(wire::host(&state, host)))
    }

    async fn change_host(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut Tx) -> Result<Outcome, Error>,
    ) -> Result<Outcome, Status> {
        Ok(self.db.transact(|tx| verbs::once(tx, &caller, change)).await?)
    }

    /// A host as it would be after a drain has begun all that it can. Nothing of it is kept.
    async fn preview(
        &self,
        name: &HostName,
        begin: impl FnOnce(&mut Tx) -> Result<Outcome, Error>,
    ) -> Result<Response<v1::Host>, Status> {
        let policy = self.config.placement.policy();
        let seen = self.db.transact(|tx| {
            if let Err(error) = begin(tx) {
                return Err(Preview::Refused(error));
            }
            advance::advance(tx, name, policy, PREVIEW, &BTreeSet::new());
            let host = tx.hosts.get(name).cloned();
            let host = host.ok_or_else(|| Preview::Refused(Error::HostNotFound(name.to_string())))?;
            Err::<(), _>(Preview::Seen(Box::new(wire::host(tx, &host))))
        });
        match seen.await {
            Err(Preview::Seen(host)) => Ok(Response::new(*host)),
            Err(Preview::Refused(error)) => Err(error.into()),
            Ok(()) => unreachable!("it always returns an error"),
        }
    }
}

/// Time that a drain has.
pub(super) fn deadline(seconds: u32) -> Result<Duration, Status> {
    match seconds {
        0 => Ok(DEFAULT_DEADLINE),
        1..=MAX_DEADLINE_SECONDS => Ok(Duration::from_secs(seconds.into())),
        _ => {
            let message = format!(
                "must be 1 to {MAX_DEADLINE_SECONDS}, or 0 for {}",
                DEFAULT_DEADLINE.as_secs()
            );
            Err(reason::invalid("deadline_seconds", message))
        }
    }
}

/// Why a change that was only to be seen is not kept.
enum Preview {
    Refused(Error),
    Seen(Box<v1::Host>),
}

#[tonic::async_trait]
impl HostService for Services {
    async fn get_host(&self, request: Request<v1::GetHostRequest>) -> Result<Response<v1::Host>, Status> {
        self.host(&parse("name", &request.get_ref().name)?)
    }

    async fn list_hosts(
        &self,
        request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        let request = request.into_inner();
        let selector = request::labels("label_selector", &request.label_selector)?;
        let page = Page::of(
            request.page_size,
            &request.page_token,
            &format!("hosts {selector:?}"),
        )?;
        let from = match &page.after {
            Some(name) => Bound::Excluded(parse("page_token", name)?),
            None => Bound::Unbounded,
        };
        let state = self.db.snapshot();
        let all = state.hosts.range((from, Bound::Unbounded)).map(|(_, host)| host);
        let found = all.filter(|host| crate::model::matches(&host.labels, &selector));
        let (hosts, next_page_token) = page.take(found, |host| host.name.to_string());
        let hosts = hosts.into_iter().map(|host| wire::host(&state, host)).collect();
        Ok(Response::new(v1::ListHostsResponse {
            hosts,
            next_page_token,
            resource_version: state.meta.revision,
        }))
    }

    async fn update_host(
        &self,
        request: Request<v1::UpdateHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let host = message
            .host
            .as_ref()
            .ok_or_else(|| reason::invalid("host", "must be given"))?;
        let name = parse("host.name", &host.name)?;
        let mut change = Update::default();
        for path in request::mask(message.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)? {
            match path.as_str() {
                "labels" => change.labels = Some(request::labels("host.labels", &host.labels)?),
                "taints" => {
                    let taints = placement::taints("host.taints", &host.taints);
                    change.taints = Some(taints.map_err(super::vm::bad)?);
                }
                "cpu_overcommit_ratio" if !RATIO.contains(&host.cpu_overcommit_ratio) => {
                    let message = format!(
                        "must be {} to {}, got {}",
                        RATIO.start(),
                        RATIO.end(),
                        host.cpu_overcommit_ratio
                    );
                    return Err(reason::invalid("host.cpu_overcommit_ratio", message));
                }
                "cpu_overcommit_ratio" => change.cpu_overcommit_ratio = Some(host.cpu_overcommit_ratio),
                "max_vms" => change.vms_most = Some(Some(host.max_vms).filter(|most| *most > 0)),
                _ => change.reserved_memory_mib = Some(host.reserved_memory_mib),
            }
        }
        let content = format!("UpdateHost {name} {:?} {change:?}", host.etag);
        let caller = request::caller(&request, &message.request_id, &content)?;
        let etag = host.etag.clone();
        self.change_host(caller, |tx| host::update(tx, name.as_str(), &etag, change))
            .await?;
        self.host(&name)
    }

    async fn cordon_host(
        &self,
        request: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let reason = request::text("reason", message.reason.clone(), MAX_REASON)?;
        let caller = request::caller(
            &request,
            &message.request_id,
            &format!("CordonHost {name} {reason:?}"),
        )?;
        self.change_host(caller, |tx| host::cordon(tx, name.as_str(), Some(reason)))
            .await?;
        self.host(&name)
    }

    async fn uncordon_host(
        &self,
        request: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let caller = request::caller(&request, &message.request_id, &format!("UncordonHost {name}"))?;
        self.change_host(caller, |tx| host::cordon(tx, name.as_str(), None))
            .await?;
        self.host(&name)
    }

    async fn drain_host(&self, request: Request<v1::DrainHostRequest>) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let within = deadline(message.deadline_seconds)?;
        let mode = wire::drain_mode("mode", message.mode)?;
        let content = format!("DrainHost {name} {within:?} {mode:?}");
        let caller = request::caller(&request, &message.request_id, &content)?;
        let begin = |tx: &mut Tx| drain::drain(tx, &caller, name.as_str(), within, mode);
        if message.validate_only {
            return self.preview(&name, begin).await;
        }
        self.change_host(caller.clone(), begin).await?;
        self.host(&name)
    }

    async fn cancel_host_drain(
        &self,
        request: Request<v1::CancelHostDrainRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let caller = request::caller(&request, &message.request_id, &format!("CancelHostDrain {name}"))?;
        self.change_host(caller, |tx| drain::cancel(tx, name.as_str()))
            .await?;
        self.host(&name)
    }

    async fn restore_host(
        &self,
        request: Request<v1::RestoreHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let within = deadline(message.deadline_seconds)?;
        let content = format!("RestoreHost {name} {within:?}");
        let caller = request::caller(&request, &message.request_id, &content)?;
        self.change_host(caller.clone(), |tx| {
            drain::restore(tx, &caller, name.as_str(), within)
        })
        .await?;
        self.host(&name)
    }

    async fn set_host_power(
        &self,
        request: Request<v1::SetHostPowerRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.set_power(request).await
    }

    async fn read_host_power(
        &self,
        request: Request<v1::ReadHostPowerRequest>,
    ) -> Result<Response<v1::ReadHostPowerResponse>, Status> {
        self.read_power(request).await
    }

    async fn power_on_host(
        &self,
        request: Request<v1::PowerOnHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.power_on(request).await
    }

    async fn power_off_host(
        &self,
        request: Request<v1::PowerOffHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.power_off(request).await
    }

    async fn delete_host(
        &self,
        request: Request<v1::DeleteHostRequest>,
    ) -> Result<Response<v1::DeleteHostResponse>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let caller = request::caller(&request, &message.request_id, &format!("DeleteHost {name}"))?;
        self.change_host(caller, |tx| host::delete(tx, name.as_str()))
            .await?;
        self.agents.forget(&name);
        Ok(Response::new(v1::DeleteHostResponse {}))
    }
}
