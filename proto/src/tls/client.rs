//! Dialling: gRPC channels to a controller or an agent, and plain streams between agents.

use std::{convert::Infallible, io, path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::UnixStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Status,
    codegen::http,
    transport::{Channel, Endpoint},
};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use super::{
    ALPN_H2, Error, Identity, Peer,
    network::{Network, Stream},
};

/// Longest wait for a connection, its TLS handshake included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An idle connection is probed so often, and given up when a probe is not answered in the same time.
pub const KEEPALIVE: Duration = Duration::from_secs(10);

/// Whatever carries gRPC calls to a server: a [`Channel`] in the programs, in tests also a server in the same process
/// or a network that they make up. Each clone may be used at once with the others. What it fails with is what the call
/// answers.
pub type Caller =
    BoxCloneSyncService<http::Request<tonic::body::Body>, http::Response<tonic::body::Body>, Status>;

/// Calls through a channel.
pub fn caller(channel: Channel) -> Caller {
    Caller::new(channel.map_err(|error| Status::from_error(error.into())))
}

/// Calls a server in the same process, without a network but with all of gRPC's encoding.
pub fn caller_in_process<S>(server: S) -> Caller
where
    S: Service<
            http::Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + Sync
        + 'static,
{
    Caller::new(server.map_err(|never| match never {}))
}

/// As [`caller_in_process`], for a server that asks who calls: it finds `peer`, as if a connection had shown it.
pub fn caller_in_process_as<S>(peer: Peer, server: S) -> Caller
where
    S: Service<
            http::Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
            Future: Send,
        > + Clone
        + Send
        + Sync
        + 'static,
{
    caller_in_process(
        server.map_request(move |mut request: http::Request<tonic::body::Body>| {
            request.extensions_mut().insert(peer.clone());
            request
        }),
    )
}

/// Opens a gRPC channel to `https://HOST:PORT` (or `unix:/PATH`) whose server must bear `server_name`. Connects at
/// once, so that an unreachable or wrong server is told here and not at the first call.
pub async fn connect(endpoint: &str, server_name: &str, identity: &Identity) -> Result<Channel, Error> {
    if let Some(path) = endpoint.strip_prefix("unix:") {
        return connect_unix(path.into()).await;
    }
    let (target, connector) = tls_parts(endpoint, server_name, identity)?;
    target
        .connect_with_connector(connector)
        .await
        .map_err(|source| Error::Channel {
            endpoint: endpoint.to_owned(),
            source,
        })
}

/// As [`connect`], but dials at the first call, and again by itself whenever the connection is lost.
pub fn connect_lazy(endpoint: &str, server_name: &str, identity: &Identity) -> Result<Channel, Error> {
    let (target, connector) = tls_parts(endpoint, server_name, identity)?;
    Ok(target.connect_with_connector_lazy(connector))
}

/// Opens a gRPC channel to a Unix socket; the server knows the caller by its uid.
pub async fn connect_unix(path: PathBuf) -> Result<Channel, Error> {
    let name = format!("unix:{}", path.display());
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    tuned(Endpoint::from_static("http://localhost"))
        .connect_with_connector(connector)
        .await
        .map_err(|source| Error::Channel {
            endpoint: name,
            source,
        })
}

/// Opens a plain TLS stream to `HOST:PORT`, speaking `alpn`.
pub async fn open_stream(
    address: &str,
    server_name: &str,
    identity: &Identity,
    alpn: &[u8],
) -> Result<TlsStream<Stream>, Error> {
    let config = identity.client_config(alpn)?;
    let name =
        ServerName::try_from(server_name.to_owned()).map_err(|_| Error::Endpoint(address.to_owned()))?;
    dial(&*identity.network, address, name, config)
        .await
        .map_err(|source| Error::Connect {
            endpoint: address.to_owned(),
            source,
        })
}

type Connector =
    tower::util::BoxCloneService<tonic::codegen::http::Uri, TokioIo<TlsStream<Stream>>, io::Error>;

fn tls_parts(endpoint: &str, server_name: &str, identity: &Identity) -> Result<(Endpoint, Connector), Error> {
    let bad = || Error::Endpoint(endpoint.to_owned());
    let address = endpoint
        .strip_prefix("https://")
        .ok_or_else(bad)?
        .trim_end_matches('/')
        .to_owned();
    let has_port = address
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if !has_port {
        return Err(bad());
    }
    let config = identity.client_config(ALPN_H2)?;
    let name = ServerName::try_from(server_name.to_owned()).map_err(|_| bad())?;
    // tonic is shown a plain address: TLS is ours, below it.
    let target = Endpoint::from_shared(format!("http://{address}")).map_err(|_| bad())?;
    let network = identity.network.clone();
    let connector = tower::service_fn(move |_| {
        let (network, address) = (network.clone(), address.clone());
        let (name, config) = (name.clone(), config.clone());
        async move { dial(&*network, &address, name, config).await.map(TokioIo::new) }
    });
    Ok((tuned(target), tower::util::BoxCloneService::new(connector)))
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
}

async fn dial(
    network: &dyn Network,
    address: &str,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<Stream>> {
    let connect = async {
        let tcp = network.connect(address).await?;
        TlsConnector::from(config).connect(name, tcp).await
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Request, Response};

    use super::*;
    use crate::agent::v1::{
        RegisterRequest, RegisterResponse, ReportRequest, ReportResponse,
        registrar_service_client::RegistrarServiceClient,
        registrar_service_server::{RegistrarService, RegistrarServiceServer},
    };

    struct Registrar;

    #[tonic::async_trait]
    impl RegistrarService for Registrar {
        async fn register(
            &self,
            request: Request<RegisterRequest>,
        ) -> Result<Response<RegisterResponse>, Status> {
            Err(crate::reason::status(
                Code::PermissionDenied,
                "WRONG_HOST",
                request.into_inner().host,
            ))
        }

        async fn report(&self, _: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
            Ok(Response::new(ReportResponse::default()))
        }
    }

    #[tokio::test]
    async fn a_caller_carries_calls_to_a_server_in_the_same_process() {
        let server = RegistrarServiceServer::new(Registrar);
        let mut client = RegistrarServiceClient::new(caller_in_process(server));
        client.report(ReportRequest::default()).await.unwrap();
        let request = RegisterRequest {
            host: "h1".to_owned(),
            ..Default::default()
        };
        let refusal = client.clone().register(request).await.unwrap_err();
        assert_eq!(refusal.code(), Code::PermissionDenied);
        assert_eq!(refusal.message(), "h1");
        assert_eq!(crate::reason::of(&refusal).as_deref(), Some("WRONG_HOST"));
    }

    #[tokio::test]
    async fn a_caller_to_nobody_says_unavailable_as_its_channel_does() {
        // Nothing listens on port 1.
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let mut client = RegistrarServiceClient::new(caller(channel));
        let refusal = client.report(ReportRequest::default()).await.unwrap_err();
        assert_eq!(refusal.code(), Code::Unavailable, "{refusal:?}");
    }
}
