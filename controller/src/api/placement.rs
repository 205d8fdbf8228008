//! `dalgu.v1.PlacementService`.

use dalgu_proto::{
    ids::{HostName, VmName},
    reason,
    v1::{self, explain_placement_request::Subject, placement_service_server::PlacementService},
    vm::Spec,
};
use tonic::{Request, Response, Status};

use super::{Services, peer};
use crate::{
    hosts, images, networks,
    placement::{self, Request as Question},
    verbs::{Error, migrate},
};

fn vm_name(value: &str) -> Result<VmName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid("vm", error.to_string()))
}

#[tonic::async_trait]
impl PlacementService for Services {
    async fn get_placement(
        &self,
        request: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        let name = vm_name(&request.get_ref().vm)?;
        let state = self.db.snapshot();
        let vm = state
            .vm_by_name(&name)
            .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
        Ok(Response::new(placement::to_wire(
            &vm.decision,
            Some(vm.decide_time),
        )))
    }

    async fn explain_placement(
        &self,
        request: Request<v1::ExplainPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        let principal = peer(&request)?.to_string();
        let request = request.into_inner();
        let host: Option<HostName> = match request.host.as_str() {
            "" => None,
            name => Some(
                name.parse()
                    .map_err(|e: dalgu_proto::ids::Error| reason::invalid("host", e.to_string()))?,
            ),
        };
        let state = self.db.snapshot();
        if let Some(host) = host.as_ref().filter(|host| !state.hosts.contains_key(*host)) {
            return Err(Error::HostNotFound(host.to_string()).into());
        }
        let question = match request.subject {
            None => return Err(reason::invalid("subject", "give a spec, or the name of a VM")),
            Some(Subject::Spec(spec)) => {
                let mut spec = Spec::try_from(spec).map_err(|invalid| {
                    reason::invalid(&format!("spec.{}", invalid.field), invalid.message)
                })?;
                images::resolve::images(&state, &mut spec, &principal).map_err(|error| match error {
                    images::resolve::Error::Disk {
                        index,
                        field,
                        message,
                    } => reason::invalid(&format!("spec.disks[{index}].{field}"), message),
                    other => Error::from(other).into(),
                })?;
                networks::resolve::ports(&state, &mut spec, None).map_err(|error| match error {
                    networks::resolve::Error::Port {
                        index,
                        field,
                        message,
                    } => reason::invalid(&format!("spec.nics[{index}].{field}"), message),
                    other => Error::from(other).into(),
                })?;
                let needs = networks::resolve::needs(&state, &spec);
                Question::new(spec).with_needs(needs).on(host)
            }
            Some(Subject::Vm(name)) => {
                let name = vm_name(&name)?;
                let vm = state
                    .vm_by_name(&name)
                    .ok_or_else(|| Error::VmNotFound(name.to_string()))?;
                migrate::request(&state, vm, host)
            }
        };
        let rule = &self.config.placement.policy;
        let decision = placement::decide(&question, &hosts::views(&state), rule);
        Ok(Response::new(placement::to_wire(&decision, Some(self.db.now()))))
    }
}
