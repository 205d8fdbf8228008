//! `dalgu.agent.v1.RegistrarService`: what agents tell.

use dalgu_proto::{
    agent::v1::{self as agent, registrar_service_server::RegistrarService},
    ids::{HostName, Session, Term},
    mutant::{self, Mutant},
    reason, time,
    tls::Role,
};
use tonic::{Code, Request, Response, Status};

use super::{Services, peer};
use crate::{
    agent_wire,
    hosts::registry::{self, Receipt, Registration, Report},
};

/// The host that is spoken for, which must be the one in the certificate.
fn own_host<T>(request: &Request<T>, named: &str) -> Result<HostName, Status> {
    let peer = peer(request)?;
    match &peer.role {
        Role::Agent(host) if host.as_str() == named => Ok(host.clone()),
        _ => {
            let named: String = named.chars().take(80).collect();
            let message = format!("{peer} may not speak for host {named:?}: use that host's certificate");
            Err(reason::status(Code::PermissionDenied, "WRONG_HOST", message))
        }
    }
}

fn check_address(address: &str) -> Result<(), Status> {
    let ok = address.len() <= 255
        && address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && port.parse::<u16>().is_ok_and(|port| port != 0)
                && host
                    .bytes()
                    .all(|b| b.is_ascii_graphic() && b != b'/' && b != b'@')
        });
    if ok {
        Ok(())
    } else {
        Err(reason::invalid(
            "address",
            "must be ADDRESS:PORT, as other hosts reach the agent",
        ))
    }
}

#[tonic::async_trait]
impl RegistrarService for Services {
    async fn register(
        &self,
        request: Request<agent::RegisterRequest>,
    ) -> Result<Response<agent::RegisterResponse>, Status> {
        let host = own_host(&request, &request.get_ref().host)?;
        let m = request.into_inner();
        check_address(&m.address)?;
        let cluster_id = match m.cluster_id.as_str() {
            "" => None,
            id => Some(
                id.parse()
                    .map_err(|e: dalgu_proto::ids::Error| reason::invalid("cluster_id", e.to_string()))?,
            ),
        };
        let inventory = m
            .inventory
            .ok_or_else(|| reason::invalid("inventory", "must be given"))?;
        let registration = Registration {
            address: m.address,
            boot_id: m.boot_id,
            run_id: m.agent_run_id,
            agent_version: m.agent_version,
            inventory: inventory.into(),
            usage: m.usage.map(Into::into),
            vms: m
                .vms
                .into_iter()
                .filter_map(|report| agent_wire::reported(&host, report))
                .collect(),
            unmanaged: m
                .unmanaged_domains
                .into_iter()
                .map(agent_wire::unmanaged)
                .collect(),
            complete: m.inventory_complete || mutant::on(Mutant::IncompleteInventoryAccepted),
            hypervisor_error: Some(m.hypervisor_error).filter(|error| !error.is_empty()),
            session: Session(m.session),
            cluster_id,
            machine_id: m.machine_id,
            state_machine_id: m.state_machine_id,
            controller: (Term(m.controller_term), m.controller_run_id.parse().ok()),
            sequence: m.sequence,
            images: m.images.map(agent_wire::image::stock),
            host: host.clone(),
        };
        // A change also where it is refused: the operator is told of who was.
        let session = self
            .db
            .change(|tx| registry::register(tx, registration))
            .await
            .map_err(|error| reason::status(Code::FailedPrecondition, error.reason(), error.to_string()))?;
        let state = self.db.snapshot();
        let meta = &state.meta;
        tracing::info!(%host, %session, "the host registered");
        Ok(Response::new(agent::RegisterResponse {
            session: session.0,
            term: meta.term.0,
            cluster_id: meta.cluster_id.to_string(),
            report_interval: Some(time::duration_to_wire(self.config.report_interval())),
            controller_run_id: state.run_id.to_string(),
        }))
    }

    async fn report(
        &self,
        request: Request<agent::ReportRequest>,
    ) -> Result<Response<agent::ReportResponse>, Status> {
        let host = own_host(&request, &request.get_ref().host)?;
        let m = request.into_inner();
        let report = Report {
            session: Session(m.session),
            boot_id: m.boot_id,
            run_id: m.agent_run_id,
            sequence: m.sequence,
            usage: m.usage.map(Into::into),
            vms: m
                .vms
                .into_iter()
                .filter_map(|report| agent_wire::reported(&host, report))
                .collect(),
            complete: m.inventory_complete || mutant::on(Mutant::IncompleteInventoryAccepted),
            unmanaged: m
                .unmanaged_domains
                .into_iter()
                .map(agent_wire::unmanaged)
                .collect(),
            hypervisor_error: Some(m.hypervisor_error).filter(|error| !error.is_empty()),
            inventory: m.inventory.map(Into::into),
            images: m.images.map(agent_wire::image::stock),
            host,
        };
        let receipt = self.db.change(|tx| registry::report(tx, report)).await;
        Ok(Response::new(agent::ReportResponse {
            register_again: receipt == Receipt::Unknown,
        }))
    }
}
