//! Accepting: one port for gRPC, scrapers and migration streams, told apart by the protocol agreed in the handshake.
//!
//! [`Acceptor::run`] owns the listener; each handshake has its own task and deadline, so that a slow caller keeps
//! nobody waiting. What it hands on is authenticated.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use super::{
    ALPN_STREAM, Error, Peer, Role,
    handshakes::{HANDSHAKE_TIMEOUT, Handshakes},
    identity_of,
    network::{Listener, Stream},
};
use crate::ids::ClusterId;

/// An authenticated connection.
pub struct Connection {
    io: Io,
    peer: Peer,
}

enum Io {
    Tls(Box<TlsStream<Stream>>),
    Unix(UnixStream),
}

/// An authenticated migration stream from another agent.
pub struct MigrationStream {
    /// Who opened it.
    pub peer: Peer,
    /// The stream.
    pub io: TlsStream<Stream>,
}

/// Accepts connections on a TCP port and, where given, a Unix socket.
pub struct Acceptor {
    site: ClusterId,
    connections: mpsc::Sender<io::Result<Connection>>,
    migrations: Option<mpsc::Sender<MigrationStream>>,
    handshakes: Handshakes,
}

impl Acceptor {
    /// Makes an acceptor for callers of this site, and the stream of its gRPC and HTTP connections. Migration streams go to
    /// `migrations`; without it they are refused. That a certificate is good says nothing of its site: two sites may have
    /// one authority.
    pub fn new(
        site: ClusterId,
        migrations: Option<mpsc::Sender<MigrationStream>>,
    ) -> (Self, mpsc::Receiver<io::Result<Connection>>) {
        // One waiting connection is enough: the server takes them at once, the backlog is the listener's.
        let (connections, incoming) = mpsc::channel(1);
        (
            Self {
                site,
                connections,
                migrations,
                handshakes: Handshakes::new(),
            },
            incoming,
        )
    }

    /// Accepts TLS connections until the server has gone. `refused` is told of each caller that was turned away.
    pub async fn run(
        &self,
        listener: impl Listener,
        config: Arc<ServerConfig>,
        refused: impl Fn(&dyn std::error::Error) + Clone + Send + 'static,
    ) {
        let acceptor = TlsAcceptor::from(config);
        while !self.connections.is_closed() {
            // Cancel safe: a connection that was not accepted stays in the backlog.
            let (tcp, from) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    // Out of file descriptors or the like: give it time to pass.
                    Err(_) => { tokio::time::sleep(Duration::from_millis(50)).await; continue }
                },
                () = self.connections.closed() => return,
            };
            let guest = match self.handshakes.arrive(from.ip()) {
                Ok(guest) => guest,
                Err(error) => {
                    refused(&error);
                    continue;
                }
            };
            let (site, acceptor, connections, migrations, refused) = (
                self.site,
                acceptor.clone(),
                self.connections.clone(),
                self.migrations.clone(),
                refused.clone(),
            );
            tokio::spawn(async move {
                let Ok(places) = tokio::time::timeout(HANDSHAKE_TIMEOUT, guest.place()).await else {
                    return refused(&io::Error::from(io::ErrorKind::TimedOut));
                };
                let outcome = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(site, acceptor, tcp)).await;
                drop((places, guest));
                match outcome {
                    Ok(Ok((peer, io))) => hand_on(peer, io, connections, migrations).await,
                    Ok(Err(error)) => refused(&error),
                    Err(_) => refused(&io::Error::from(io::ErrorKind::TimedOut)),
                }
            });
        }
    }

    /// Accepts connections on a Unix socket from processes of root or of this process's own user.
    pub async fn run_unix(&self, listener: UnixListener, own_uid: u32) {
        loop {
            // Cancel safe, as above.
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.connections.closed() => return,
            };
            let Ok((io, _)) = accepted else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Ok(uid) = io.peer_cred().map(|credentials| credentials.uid()) else {
                continue;
            };
            if uid != 0 && uid != own_uid {
                continue;
            }
            let peer = Peer {
                role: Role::Operator,
                name: format!("uid-{uid}"),
            };
            if self
                .connections
                .send(Ok(Connection {
                    io: Io::Unix(io),
                    peer,
                }))
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

async fn handshake(
    ours: ClusterId,
    acceptor: TlsAcceptor,
    tcp: Stream,
) -> Result<(Peer, TlsStream<Stream>), Error> {
    let failed = |source| Error::Connect {
        endpoint: "incoming".to_owned(),
        source,
    };
    let io = acceptor.accept(tcp).await.map_err(failed)?;
    let certificate = io
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first)
        .ok_or(Error::NoIdentity)?;
    match identity_of(certificate)? {
        (theirs, peer) if theirs == ours => Ok((peer, io)),
        (theirs, _) => Err(Error::OtherSite { theirs, ours }),
    }
}

async fn hand_on(
    peer: Peer,
    io: TlsStream<Stream>,
    connections: mpsc::Sender<io::Result<Connection>>,
    migrations: Option<mpsc::Sender<MigrationStream>>,
) {
    // A send fails only when the server is going down; the connection is closed then by being dropped.
    if io.get_ref().1.alpn_protocol() == Some(ALPN_STREAM) {
        if let Some(migrations) = migrations {
            let _ = migrations.send(MigrationStream { peer, io }).await;
        }
    } else {
        let _ = connections
            .send(Ok(Connection {
                io: Io::Tls(Box::new(io)),
                peer,
            }))
            .await;
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_read(cx, buf),
            Io::Unix(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_write(cx, buf),
            Io::Unix(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
            Io::Unix(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
            Io::Unix(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
