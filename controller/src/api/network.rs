//! `dalgu.v1.NetworkService`. What is peculiar to security groups is in [`group`].

mod group;

use std::ops::Bound;

use dalgu_proto::{
    ids::{NetworkName, VmName},
    network::Network,
    reason,
    v1::{self, network_service_server::NetworkService},
    vm::Invalid,
};
use tonic::{Request, Response, Status};

use super::{Services, page::Page, request, wire};
use crate::{
    model::{NetworkRecord, Outcome},
    verbs::{
        self, Caller, Error,
        network::{self, Notes, UpdateNetwork},
    },
};

const MAX_DESCRIPTION: usize = 1024;
const MUTABLE: [&str; 4] = ["labels", "description", "domain", "dns_servers"];
const MUTABLE_TEXT: &str = "labels, description, domain, dns_servers";

fn network_name(field: &str, value: &str) -> Result<NetworkName, Status> {
    value
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| reason::invalid(field, error.to_string()))
}

/// Refuses fields that only the controller fills in.
fn output_only(fields: &[(&str, bool)]) -> Result<(), Status> {
    match fields.iter().find(|(_, set)| *set) {
        Some((field, _)) => Err(reason::invalid(field, "is set by the controller: leave it empty")),
        None => Ok(()),
    }
}

fn invalid(object: &str) -> impl Fn(Invalid) -> Status {
    move |invalid| reason::invalid(&format!("{object}.{}", invalid.field), invalid.message)
}

/// Checks a network to be made.
fn create(network: v1::Network) -> Result<(Network, Notes), Status> {
    output_only(&[
        ("network.uid", !network.uid.is_empty()),
        ("network.interfaces", network.interfaces != 0),
        ("network.etag", !network.etag.is_empty()),
        ("network.create_time", network.create_time.is_some()),
    ])?;
    let notes = Notes {
        labels: request::labels("network.labels", &network.labels)?,
        description: request::text(
            "network.description",
            network.description.clone(),
            MAX_DESCRIPTION,
        )?,
    };
    let network = Network::try_from(network).map_err(invalid("network"))?;
    Ok((network, notes))
}

/// Checks a change of a network: its new values are checked in the place of the old ones.
fn update(old: &NetworkRecord, new: &v1::Network, paths: &[String]) -> Result<UpdateNetwork, Status> {
    let named = |path: &str| paths.iter().any(|named| named == path);
    let mut whole: v1::Network = old.network.clone().into();
    if named("domain") {
        whole.domain.clone_from(&new.domain);
    }
    if named("dns_servers") {
        whole.dns_servers.clone_from(&new.dns_servers);
    }
    let checked = Network::try_from(whole).map_err(invalid("network"))?;
    let mut update = UpdateNetwork::default();
    for path in paths {
        match path.as_str() {
            "labels" => update.labels = Some(request::labels("network.labels", &new.labels)?),
            "description" => {
                let text = new.description.clone();
                update.description = Some(request::text("network.description", text, MAX_DESCRIPTION)?);
            }
            "domain" => update.domain = Some(checked.domain.clone()),
            _ => update.dns_servers = Some(checked.dns_servers.clone()),
        }
    }
    Ok(update)
}

impl Services {
    /// Does a verb once, and answers with its network.
    async fn network(
        &self,
        caller: Caller,
        change: impl FnOnce(&mut crate::state::Tx, &Caller) -> Result<Outcome, Error>,
    ) -> Result<Response<v1::Network>, Status> {
        let outcome = self
            .db
            .transact(|tx| verbs::once(tx, &caller, |tx| change(tx, &caller)))
            .await?;
        let Outcome::Network(name) = outcome else {
            return Err(Error::RequestReused(caller.request_id).into());
        };
        let state = self.db.snapshot();
        // A repeated request may find it gone.
        let network = network::find(&state, &name)?;
        Ok(Response::new(wire::network(&state, &network)))
    }
}

#[tonic::async_trait]
impl NetworkService for Services {
    async fn get_network(
        &self,
        request: Request<v1::GetNetworkRequest>,
    ) -> Result<Response<v1::Network>, Status> {
        let name = network_name("name", &request.get_ref().name)?;
        let state = self.db.snapshot();
        let network = network::find(&state, &name)?;
        Ok(Response::new(wire::network(&state, &network)))
    }

    async fn list_networks(
        &self,
        request: Request<v1::ListNetworksRequest>,
    ) -> Result<Response<v1::ListNetworksResponse>, Status> {
        let m = request.into_inner();
        let selector = request::labels("label_selector", &m.label_selector)?;
        let page = Page::of(m.page_size, &m.page_token, &format!("networks {selector:?}"))?;
        let from = match &page.after {
            Some(name) => Bound::Excluded(network_name("page_token", name)?),
            None => Bound::Unbounded,
        };
        let state = self.db.snapshot();
        let found = state.networks.range((from, Bound::Unbounded)).map(|(_, one)| one);
        let found = found.filter(|one| crate::model::matches(&one.labels, &selector));
        let (networks, next_page_token) = page.take(found, |one| one.network.name.to_string());
        let networks = networks.into_iter().map(|one| wire::network(&state, one));
        Ok(Response::new(v1::ListNetworksResponse {
            networks: networks.collect(),
            next_page_token,
            resource_version: state.meta.revision,
        }))
    }

    async fn create_network(
        &self,
        request: Request<v1::CreateNetworkRequest>,
    ) -> Result<Response<v1::Network>, Status> {
        let m = request.get_ref();
        let network = m.network.clone();
        let (new, notes) = create(network.ok_or_else(|| reason::invalid("network", "must be given"))?)?;
        let content = format!("CreateNetwork {new:?} {notes:?}");
        let caller = request::caller(&request, &m.request_id, &content)?;
        self.network(caller, |tx, caller| network::create(tx, caller, new, notes))
            .await
    }

    async fn update_network(
        &self,
        request: Request<v1::UpdateNetworkRequest>,
    ) -> Result<Response<v1::Network>, Status> {
        let m = request.get_ref();
        let new = m.network.as_ref();
        let new = new.ok_or_else(|| reason::invalid("network", "must be given"))?;
        let paths = request::mask(m.update_mask.clone(), &MUTABLE, MUTABLE_TEXT)?;
        let name = network_name("network.name", &new.name)?;
        // What is checked against is immutable, or replaced.
        let change = update(&network::find(&self.db.snapshot(), &name)?, new, &paths)?;
        let content = format!("UpdateNetwork {name} {:?} {change:?}", new.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        let etag = new.etag.clone();
        self.network(caller, |tx, _| network::update(tx, &name, &etag, change))
            .await
    }

    async fn delete_network(
        &self,
        request: Request<v1::DeleteNetworkRequest>,
    ) -> Result<Response<v1::DeleteNetworkResponse>, Status> {
        let m = request.get_ref();
        let name = network_name("name", &m.name)?;
        let content = format!("DeleteNetwork {name} {:?}", m.etag);
        let caller = request::caller(&request, &m.request_id, &content)?;
        self.db
            .transact(|tx| verbs::once(tx, &caller, |tx| network::delete(tx, &caller, &name, &m.etag)))
            .await?;
        Ok(Response::new(v1::DeleteNetworkResponse {}))
    }

    async fn list_network_interfaces(
        &self,
        request: Request<v1::ListNetworkInterfacesRequest>,
    ) -> Result<Response<v1::ListNetworkInterfacesResponse>, Status> {
        let m = request.into_inner();
        let name = network_name("network", &m.network)?;
        let page = Page::of(m.page_size, &m.page_token, &format!("interfaces {name}"))?;
        let from = match &page.after {
            None => Bound::Unbounded,
            Some(key) => {
                let (vm, nic) = key.split_once('/').unwrap_or((key, ""));
                let vm: VmName = vm.parse().map_err(|error: dalgu_proto::ids::Error| {
                    reason::invalid("page_token", error.to_string())
                })?;
                Bound::Excluded((vm, nic.to_owned()))
            }
        };
        let state = self.db.snapshot();
        network::find(&state, &name)?;
        let members = state.members.get(&name).into_iter();
        let found = members.flat_map(|members| members.interfaces.range((from.clone(), Bound::Unbounded)));
        let (found, next_page_token) = page.take(found, |((vm, nic), _)| format!("{vm}/{nic}"));
        let interfaces = found.into_iter().map(|(_, one)| wire::interface(&state, one));
        Ok(Response::new(v1::ListNetworkInterfacesResponse {
            interfaces: interfaces.collect(),
            next_page_token,
        }))
    }

    async fn get_security_group(
        &self,
        request: Request<v1::GetSecurityGroupRequest>,
    ) -> Result<Response<v1::SecurityGroup>, Status> {
        group::get(self, &request.get_ref().name)
    }

    async fn list_security_groups(
        &self,
        request: Request<v1::ListSecurityGroupsRequest>,
    ) -> Result<Response<v1::ListSecurityGroupsResponse>, Status> {
        group::list(self, &request.into_inner())
    }

    async fn create_security_group(
        &self,
        request: Request<v1::CreateSecurityGroupRequest>,
    ) -> Result<Response<v1::SecurityGroup>, Status> {
        group::create(self, &request).await
    }

    async fn update_security_group(
        &self,
        request: Request<v1::UpdateSecurityGroupRequest>,
    ) -> Result<Response<v1::SecurityGroup>, Status> {
        group::update(self, &request).await
    }

    async fn delete_security_group(
        &self,
        request: Request<v1::DeleteSecurityGroupRequest>,
    ) -> Result<Response<v1::DeleteSecurityGroupResponse>, Status> {
        group::delete(self, &request).await
    }
}
