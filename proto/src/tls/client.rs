//! Dialling: gRPC channels to a controller or an agent, and plain streams between agents.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

use super::{ALPN_H2, Error, Identity};

/// Longest wait for a connection, its TLS handshake included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An idle connection is probed so often, and given up when a probe is not answered in the same time.
pub const KEEPALIVE: Duration = Duration::from_secs(10);

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
) -> Result<TlsStream<TcpStream>, Error> {
    let config = identity.client_config(alpn)?;
    let name =
        ServerName::try_from(server_name.to_owned()).map_err(|_| Error::Endpoint(address.to_owned()))?;
    dial(address, name, config)
        .await
        .map_err(|source| Error::Connect {
            endpoint: address.to_owned(),
            source,
        })
}

type Connector =
    tower::util::BoxCloneService<tonic::codegen::http::Uri, TokioIo<TlsStream<TcpStream>>, io::Error>;

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
    let connector = tower::service_fn(move |_| {
        let (address, name, config) = (address.clone(), name.clone(), config.clone());
        async move { dial(&address, name, config).await.map(TokioIo::new) }
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
    address: &str,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let connect = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, tcp).await
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
