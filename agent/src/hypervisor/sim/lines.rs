//! How simulated hypervisors reach each other during a migration: sockets of the host, or pipes in memory.
//!
//! Handed in by [`super::SimConfig`]. A program takes [`UnixLines`]; tests that run a whole site on one clock take
//! [`MemoryLines`], or lines of their own which break where they like. Knows nothing of what is said on a line.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};

/// Bytes that one end of a pipe in memory may be ahead of the other.
const PIPE_BYTES: usize = 64 * 1024;
/// Connections in memory that wait to be accepted; who comes later waits.
const BACKLOG: usize = 16;

/// What a line carries: bytes in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// One end of a connection. Dropping it ends the connection.
pub type Stream = Box<dyn Duplex>;

/// Where connections can be made to, by path.
#[async_trait]
pub trait Lines: fmt::Debug + Send + Sync {
    /// Begins to listen at a path; whoever listened there before is replaced. Called on a tokio runtime.
    ///
    /// # Errors
    /// If nothing can listen there.
    fn listen(&self, path: &Path) -> io::Result<Box<dyn Listener>>;

    /// Connects to whoever listens at a path.
    ///
    /// # Errors
    /// If nobody listens there.
    async fn connect(&self, path: &Path) -> io::Result<Stream>;
}

/// Takes the connections made to one path. Dropping it stops listening.
#[async_trait]
pub trait Listener: Send {
    /// The next connection. Cancel safe: one that is not taken waits.
    ///
    /// # Errors
    /// If a connection was lost before it was taken; others may follow.
    async fn accept(&mut self) -> io::Result<Stream>;
}

/// Unix sockets.
#[derive(Debug, Clone, Copy, Default)]
pub struct UnixLines;

#[async_trait]
impl Lines for UnixLines {
    fn listen(&self, path: &Path) -> io::Result<Box<dyn Listener>> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Box::new(UnixListener::bind(path)?))
    }

    async fn connect(&self, path: &Path) -> io::Result<Stream> {
        Ok(Box::new(UnixStream::connect(path).await?))
    }
}

#[async_trait]
impl Listener for UnixListener {
    async fn accept(&mut self) -> io::Result<Stream> {
        let (stream, _) = UnixListener::accept(self).await?;
        Ok(Box::new(stream))
    }
}

/// Pipes in memory; clones are the same paths. A path is a name here, and no file.
#[derive(Clone, Default)]
pub struct MemoryLines(Arc<Mutex<BTreeMap<PathBuf, mpsc::Sender<DuplexStream>>>>);

impl fmt::Debug for MemoryLines {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("MemoryLines")
    }
}

#[async_trait]
impl Lines for MemoryLines {
    fn listen(&self, path: &Path) -> io::Result<Box<dyn Listener>> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        let mut listening = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listening.retain(|_, listener| !listener.is_closed());
        listening.insert(path.to_owned(), sender);
        Ok(Box::new(receiver))
    }

    async fn connect(&self, path: &Path) -> io::Result<Stream> {
        let listener = {
            let listening = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            listening.get(path).cloned().ok_or(io::ErrorKind::NotFound)?
        };
        let (near, far) = tokio::io::duplex(PIPE_BYTES);
        listener
            .send(far)
            .await
            .map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(near))
    }
}

#[async_trait]
impl Listener for mpsc::Receiver<DuplexStream> {
    async fn accept(&mut self) -> io::Result<Stream> {
        match self.recv().await {
            Some(stream) => Ok(Box::new(stream)),
            // Somebody else listens here now, and nothing will come any more.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pipe_in_memory_leads_to_whoever_listens_now() {
        let lines = MemoryLines::default();
        let path = Path::new("/a/control");
        let refused = |found: io::Result<Stream>| found.err().map(|error| error.kind());
        assert_eq!(refused(lines.connect(path).await), Some(io::ErrorKind::NotFound));
        let _before = lines.listen(path).unwrap();
        let mut now = lines.listen(path).unwrap();
        let mut near = lines.clone().connect(path).await.unwrap();
        near.write_all(b"hello").await.unwrap();
        let mut far = now.accept().await.unwrap();
        let mut heard = [0; 5];
        far.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
        drop(far);
        assert_eq!(near.read(&mut heard).await.unwrap(), 0, "the other end is gone");
        drop(now);
        assert_eq!(
            refused(lines.connect(path).await),
            Some(io::ErrorKind::ConnectionRefused)
        );
    }
}
