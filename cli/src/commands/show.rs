//! One object: read, shown, and followed while it changes. Called by the commands of each noun that has a `show`.

use dalgu_proto::v1;
use tonic::{Code, Response, Status};

use super::Session;
use crate::{
    client::Client,
    exit::Error,
    output,
    watch::{Snapshot, Watch, Watched},
};

/// An object that can be asked for by its name or id.
pub trait Single: Watched {
    /// Asks for it.
    fn ask(client: &Client, key: &str) -> impl Future<Output = Result<Response<Self>, Status>>;
    /// Asks for a page of one, which tells the present version.
    fn version(client: &Client) -> impl Future<Output = Result<Response<u64>, Status>>;
}

macro_rules! single {
    ($object:ident: $service:ident, $get:ident($key:ident: $get_request:ident), $list:ident($list_request:ident)) => {
        impl Single for v1::$object {
            async fn ask(client: &Client, key: &str) -> Result<Response<Self>, Status> {
                let $key = key.to_owned();
                client.$service().$get(v1::$get_request { $key }).await
            }

            async fn version(client: &Client) -> Result<Response<u64>, Status> {
                let request = v1::$list_request {
                    page_size: 1,
                    ..Default::default()
                };
                let page = client.$service().$list(request).await?;
                Ok(page.map(|page| page.resource_version))
            }
        }
    };
}

single!(Vm: vms, get_vm(name: GetVmRequest), list_vms(ListVmsRequest));
single!(Host: hosts, get_host(name: GetHostRequest), list_hosts(ListHostsRequest));
single!(Network: networks, get_network(name: GetNetworkRequest), list_networks(ListNetworksRequest));
single!(SecurityGroup: networks, get_security_group(name: GetSecurityGroupRequest), list_security_groups(ListSecurityGroupsRequest));
single!(Volume: volumes, get_volume(name: GetVolumeRequest), list_volumes(ListVolumesRequest));
single!(Operation: operations, get_operation(id: GetOperationRequest), list_operations(ListOperationsRequest));

impl Single for v1::Image {
    async fn ask(client: &Client, key: &str) -> Result<Response<Self>, Status> {
        let (name, version) = key.split_once(':').unwrap_or((key, ""));
        let request = v1::GetImageRequest {
            name: name.to_owned(),
            version: version.to_owned(),
        };
        client.images().get_image(request).await
    }

    async fn version(client: &Client) -> Result<Response<u64>, Status> {
        let request = v1::ListImagesRequest {
            page_size: 1,
            ..Default::default()
        };
        let page = client.images().list_images(request).await?;
        Ok(page.map(|page| page.resource_version))
    }
}

/// Reads one.
pub async fn get<R: Single>(client: &Client, key: &str) -> Result<R, Status> {
    client.call(async |client| R::ask(client, key).await).await
}

/// Shows one, and its changes if they are wanted.
pub async fn show<R: Single>(key: &str, watch: bool, session: &mut Session<'_>) -> Result<(), Error> {
    let item: R = get(&session.client, key).await?;
    if !watch {
        return output::one(session.term, session.format, &item);
    }
    let client = &session.client;
    let watch = Watch {
        client,
        format: session.format,
        subject: key,
        single: true,
        wanted: &|item: &R| item.key() == key,
    };
    watch
        .run(session.term, async || snapshot(client, key).await)
        .await
}

/// One, or none when it is gone, and a version that it is not older than.
async fn snapshot<R: Single>(client: &Client, key: &str) -> Result<Snapshot<R>, Status> {
    let version = client.call(async |client| R::version(client).await).await?;
    match get(client, key).await {
        Ok(item) => Ok((vec![item], version)),
        Err(status) if status.code() == Code::NotFound => Ok((Vec::new(), version)),
        Err(status) => Err(status),
    }
}
