//! What a migration needs between its two hosts, as the VMs' tasks see it.
//!
//! Implemented by [`super::streams`] over the agents' TLS port; tests that run a whole site in one process hand in their
//! own. A destination lets in only the agent of the host that the controller named, only for a migration it has prepared,
//! and only until that migration is settled: then every stream of it is cut.
//!
//! The VM arrives frozen. Once the source's hypervisor has let go of it for good, the source's agent says so
//! ([`Transport::tell_released`]), and the destination lets the VM go on. Where that word is lost, the controller's
//! settling of the migration decides.

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use dalgu_proto::ids::{HostName, MigrationId};
use tokio::{sync::SetOnce, time::Instant};
use tokio_util::sync::CancellationToken;

/// The other host of a migration, as its source sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The destination host.
    pub host: HostName,
    /// Where its agent listens, "address:port".
    pub address: String,
}

/// The source's word that it has let go of the VM for good, as its destination awaits it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Word {
    came: CancellationToken,
    stopped_at: Arc<SetOnce<Instant>>,
}

impl Word {
    /// It has come.
    pub fn say(&self) {
        self.came.cancel();
    }

    /// For how long the VM has stood still by now.
    pub fn note(&self, stopped_for: Duration) {
        if let Some(at) = Instant::now().checked_sub(stopped_for) {
            // Said twice, it is the same word.
            let _ = self.stopped_at.set(at);
        }
    }

    /// Returns when it has come. Cancel safe.
    pub async fn heard(&self) {
        self.came.cancelled().await;
    }

    /// Returns when the VM had stopped, by this host's clock, once that was told: a moment later than the word, or never. Cancel
    /// safe.
    pub async fn stopped_at(&self) -> Instant {
        *self.stopped_at.wait().await
    }
}

/// See the module's documentation.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Destination: makes the place for this migration's sockets and lets the agent of `source` in; done when it is let in
    /// already. What is returned is the word of that agent that the source has let go of the VM for good.
    ///
    /// # Errors
    /// If the place cannot be made; then nobody is let in.
    async fn allow(&self, migration: MigrationId, source: HostName) -> io::Result<Word>;

    /// Destination: lets nobody in any more, and returns when every stream of this migration is cut: nothing moves
    /// afterwards, and no word of the source arrives.
    async fn revoke(&self, migration: MigrationId);

    /// Source: opens what stands for the destination on this host.
    ///
    /// # Errors
    /// If it cannot be opened. That the peer does not answer shows only when the streams are used.
    async fn open(&self, migration: MigrationId, peer: &Peer) -> io::Result<Relay>;

    /// Source: tells the destination that the VM is gone from here for good, so that it may go on there, and for how long it
    /// has stood still since `stopped`, if that is known.
    ///
    /// # Errors
    /// If the destination has not confirmed it; it may have heard it all the same.
    async fn tell_released(
        &self,
        migration: MigrationId,
        peer: &Peer,
        stopped: Option<Instant>,
    ) -> io::Result<()>;

    /// Either side: the migration is over, and nothing of it is needed here any more; done when there is nothing.
    ///
    /// # Errors
    /// If something of it was left.
    async fn remove(&self, migration: MigrationId) -> io::Result<()>;
}

/// Source: paths that stand for the destination for as long as this lives.
pub struct Relay {
    /// Leads to the destination's [`crate::hypervisor::Hypervisor::control_socket`].
    pub control: PathBuf,
    /// For the memory.
    pub memory: PathBuf,
    /// For the disks that are copied.
    pub disks: PathBuf,
    _open: Box<dyn Send + Sync>,
}

impl Relay {
    /// Paths that are open until `open` is dropped, which happens with this.
    pub fn new(control: PathBuf, memory: PathBuf, disks: PathBuf, open: impl Send + Sync + 'static) -> Self {
        Self {
            control,
            memory,
            disks,
            _open: Box::new(open),
        }
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Relay")
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}
