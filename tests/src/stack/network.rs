//! The network of a stack run: turmoil's TCP under the programs' TLS, and a knife for connections that are open.
//!
//! Each program gets its own [`Port`]. What turmoil does to messages on their way, connections feel as a network that is
//! slow, silent or gone; what [`Wires::cut`] does, as a peer that has reset them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use dalgu_proto::tls::network::{Listener, Network, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use turmoil::net::{TcpListener, TcpStream};

use crate::fleet::{lock, plan::Node};

/// One end of a connection that is open.
#[derive(Debug)]
struct End {
    here: Node,
    there: Node,
    cut: CancellationToken,
    /// Cancelled when the program has let go of it.
    closed: CancellationToken,
}

/// All connections of a site.
#[derive(Debug, Default)]
pub struct Wires(Mutex<Vec<End>>);

impl Wires {
    fn add(&self, here: Node, there: Node, stream: TcpStream) -> Stream {
        let (cut, closed) = (CancellationToken::new(), CancellationToken::new());
        let wire = Wire {
            stream,
            cut: Box::pin(cut.clone().cancelled_owned()),
            _closed: closed.clone().drop_guard(),
        };
        let mut ends = lock(&self.0);
        ends.retain(|end| !end.closed.is_cancelled());
        ends.push(End {
            here,
            there,
            cut,
            closed,
        });
        Box::new(wire)
    }

    /// Resets what is open between two programs; returns whether anything was.
    pub fn cut(&self, a: Node, b: Node) -> bool {
        let ends = lock(&self.0);
        let between = ends
            .iter()
            .filter(|end| (end.here, end.there) == (a, b) || (end.here, end.there) == (b, a))
            .filter(|end| !end.closed.is_cancelled() && !end.cut.is_cancelled());
        between.fold(false, |_, end| {
            end.cut.cancel();
            true
        })
    }

    /// Two hosts with a connection between them: hosts speak to each other during a migration only.
    pub fn migrating(&self) -> Option<(Node, Node)> {
        let ends = lock(&self.0);
        let open = ends
            .iter()
            .filter(|end| !end.closed.is_cancelled() && !end.cut.is_cancelled());
        open.map(|end| (end.here, end.there))
            .find(|pair| matches!(pair, (Node::Host(_), Node::Host(_))))
    }
}

/// Where a program is plugged in.
#[derive(Debug, Clone)]
pub struct Port {
    /// The site's connections.
    pub wires: Arc<Wires>,
    /// Whose.
    pub node: Node,
}

/// The program that has an address; the reverse of [`Node`]'s name.
fn node_at(address: IpAddr) -> Node {
    match turmoil::reverse_lookup(address).as_deref() {
        Some("controller") => Node::Controller(0),
        Some(name) => match name
            .strip_prefix('h')
            .and_then(|number| number.parse::<usize>().ok())
        {
            Some(number) => Node::Host(number - 1),
            None => Node::Client,
        },
        None => Node::Client,
    }
}

#[async_trait::async_trait]
impl Network for Port {
    async fn connect(&self, address: &str) -> io::Result<Stream> {
        let stream = TcpStream::connect(address).await?;
        let there = node_at(stream.peer_addr()?.ip());
        Ok(self.wires.add(self.node, there, stream))
    }

    async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>> {
        let listener = TcpListener::bind(address).await?;
        Ok(Box::new(Open {
            listener,
            port: self.clone(),
        }))
    }
}

/// A port that is listened at.
struct Open {
    listener: TcpListener,
    port: Port,
}

#[async_trait::async_trait]
impl Listener for Open {
    fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        let (stream, from) = self.listener.accept().await?;
        Ok((
            self.port.wires.add(self.port.node, node_at(from.ip()), stream),
            from,
        ))
    }
}

/// One end of a connection, as its program has it.
struct Wire {
    stream: TcpStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _closed: DropGuard,
}

impl Wire {
    /// An error once it has been cut; until then whoever asks is woken when it is.
    fn whole(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.whole(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.whole(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.whole(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.whole(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
