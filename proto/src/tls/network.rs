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
/// A connection on which nothing moves is probed so often. Who waits for an answer has nothing unheard of its own: without probes it would never be
/// told that the way is cut.
const PROBES: Duration = Duration::from_secs(5);

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
        prepare(&stream)?;
        Ok(Box::new(stream))
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
        prepare(&stream)?;
        Ok((Box::new(stream), from))
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

/// What is written goes out at once, however little it is; and whoever has gone, or is out of reach, is found out.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let limit = u32::try_from(UNHEARD.as_millis()).unwrap_or(u32::MAX);
    let seconds = u32::try_from(PROBES.as_secs()).unwrap_or(u32::MAX);
    setsockopt(stream, sockopt::TcpUserTimeout, &limit)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &seconds)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &seconds)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::*;

    #[tokio::test]
    async fn a_silent_connection_is_probed_and_given_up_before_libvirt_does() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = TcpListener::local_addr(&listener).unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(address), TcpListener::accept(&listener));
        for stream in [one.unwrap(), other.unwrap().0] {
            prepare(&stream).unwrap();
            assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
            let idle = getsockopt(&stream, sockopt::TcpKeepIdle).unwrap();
            let unheard = getsockopt(&stream, sockopt::TcpUserTimeout).unwrap();
            assert!(idle + unheard / 1000 < 30, "{idle} s, {unheard} ms");
        }
    }
}
