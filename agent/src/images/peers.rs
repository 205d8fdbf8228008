//! How other hosts are reached: by the agents' port, under this host's identity.

use async_trait::async_trait;
use dalgu_proto::{
    agent::v1::{ReadImageRequest, peer_service_client::PeerServiceClient},
    image::Digest,
    tls::{self, Identity, client::Caller},
};
use futures::{StreamExt as _, future::BoxFuture, stream::BoxStream};
use tonic::codegen::Bytes;

use super::Source;

/// Leads to other hosts' stores of images.
#[async_trait]
pub trait Peers: Send + Sync {
    /// What carries calls to a host's agent. Its connection is made within the time that its first call has.
    ///
    /// # Errors
    /// If its address makes no sense.
    async fn reach(&self, source: &Source) -> Result<Caller, tonic::Status>;
}

/// Peers by mutual TLS, as the program reaches them.
#[derive(Clone)]
pub struct TlsPeers(Identity);

impl TlsPeers {
    /// As whom they are called.
    pub const fn new(identity: Identity) -> Self {
        Self(identity)
    }
}

#[async_trait]
impl Peers for TlsPeers {
    async fn reach(&self, source: &Source) -> Result<Caller, tonic::Status> {
        let endpoint = format!("https://{}", source.address);
        let channel = tls::client::connect_lazy(&endpoint, &tls::agent_name(&source.host), &self.0);
        match channel {
            Ok(channel) => Ok(tls::client::caller(channel)),
            Err(error) => Err(tonic::Status::unavailable(error.to_string())),
        }
    }
}

/// Peers that a test makes up.
#[async_trait]
impl<F: Fn(&Source) -> Result<Caller, tonic::Status> + Send + Sync> Peers for F {
    async fn reach(&self, source: &Source) -> Result<Caller, tonic::Status> {
        self(source)
    }
}

/// Reads an image from a host, from a byte on.
pub(super) async fn read(
    peers: &dyn Peers,
    source: &Source,
    digest: &Digest,
    offset: u64,
) -> Result<BoxStream<'static, Result<Bytes, tonic::Status>>, tonic::Status> {
    let mut client = PeerServiceClient::new(peers.reach(source).await?);
    let request = ReadImageRequest {
        digest: digest.to_string(),
        offset,
    };
    // Boxed: the compiler does not see through this future in a task.
    let asked: BoxFuture<'_, _> = Box::pin(client.read_image(request));
    let pieces = asked.await?.into_inner();
    Ok(pieces.map(|piece| Ok(piece?.data)).boxed())
}
