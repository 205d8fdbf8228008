//! The API over the wire, by service: what it refuses, what it remembers, and how its lists and streams are read.

mod access;
mod batch;
mod event;
mod first_boot;
mod limits;
mod list;
mod metrics;
mod placement;
mod space;
mod vm;

use dalgu_proto::v1;

use crate::site::Clients;

async fn list(clients: &mut Clients) -> v1::ListVmsResponse {
    clients
        .vms
        .list_vms(v1::ListVmsRequest::default())
        .await
        .unwrap()
        .into_inner()
}
