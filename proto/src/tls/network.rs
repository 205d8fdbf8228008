//! What TLS runs on: the machine's TCP, or a network that a test makes up.
//!
//! An [`super::Identity`] dials and listens through the [`Network`] it was given; in the programs that is [`Machine`].
//! Nothing here knows of certificates or of what is said.

use std::{fmt, io, net::SocketAddr, time::Duration};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};

/// What the other side does not take for so long it never will: the connection has failed. The kernel alone would try for a
/// quarter of an hour, and QEMU, which waits for the disks that it sends, would not be told anything meanwhile. Less than the
/// 30 s after which libvirt gives up a peer that is silent, so that QEMU listens when libvirt tidies up.
const UNHEARD: Duration = Duration::from_secs(20);

/// What a connection carries: bytes in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// One end of a connection. Dropping it ends the connection.
pub type Stream = Box<dyn Duplex>;

/// Where connections can be made to, by address.
#[tonic::async_trait]
pub trait Network: fmt::Debug + Send + Sync {
    /// Connects to `HOST:PORT`. Has no deadline of its own; cancel safe.
    ///
    /// # Errors
    /// If nobody takes the connection there.
    async fn connect(&self, address: &str) -> io::Result<Stream>;

    /// Begins to listen at an address.
    ///
    /// # Errors
    /// If it is taken or not this machine's.
    async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>>;
}

/// Takes the connections made to one address. Dropping it stops listening.
#[tonic::async_trait]
pub trait Listener: Send + Sync {
    /// Where it listens: the port that was given, where any was asked for.
    ///
    /// # Errors
    /// If the operating system does not say.
    fn address(&self) -> io::Result<SocketAddr>;

    /// The next connection and where it comes from. Cancel safe: one that is not taken waits.
    ///
    /// # Errors
    /// If none can be taken now; others may follow.
    async fn accept(&self) -> io::Result<(Stream, SocketAddr)>;
}

/// The machine's TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine;

#[tonic::async_trait]
impl Network for Machine {
    async fn connect(&self, address: &str) -> io::Result<Stream> {
        let stream = TcpStream::connect(address).await?;
        let limit = u32::try_from(UNHEARD.as_millis()).unwrap_or(u32::MAX);
        setsockopt(&stream, sockopt::TcpUserTimeout, &limit)?;
        at_once(stream)
    }

    async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>> {
        Ok(Box::new(TcpListener::bind(address).await?))
    }
}

#[tonic::async_trait]
impl Listener for TcpListener {
    fn address(&self) -> io::Result<SocketAddr> {
        self.local_addr()
    }

    async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        let (stream, from) = TcpListener::accept(self).await?;
        Ok((at_once(stream)?, from))
    }
}

#[tonic::async_trait]
impl Listener for Box<dyn Listener> {
    fn address(&self) -> io::Result<SocketAddr> {
        (**self).address()
    }

    async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        (**self).accept().await
    }
}

/// What is written goes out at once, however little it is.
fn at_once(stream: TcpStream) -> io::Result<Stream> {
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}
