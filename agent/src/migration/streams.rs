//! The streams of a migration, through the agents' one port: the [`Transport`] of the program.
//!
//! libvirtd and QEMU never speak on the network. On the source, three Unix sockets stand for the other host: libvirt's
//! own connection, the memory, and the disks. Whatever connects to one of them is joined to a TLS stream to the peer
//! agent, and joined there to the real socket:
//!
//! ```text
//!  source                                             destination
//!  libvirtd ─ control.sock ┐                      ┌─ libvirt's socket ─ libvirtd
//!  QEMU ───── memory.sock ─┼─ agent ══ TLS ══ agent ┼─ memory.sock ────── QEMU
//!  QEMU ───── disks.sock ──┘                      └─ disks.sock ─────── QEMU
//! ```
//!
//! A destination lets in only the agent of the host that the controller named, only for a migration it has prepared
//! ([`Grants`]), and only until that migration is settled: then every stream of it is cut.
//!
//! That the source's hypervisor has let go of the VM is told by one more stream, which carries nothing else.

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use dalgu_proto::{
    ids::{HostName, MigrationId},
    tls::{self, ALPN_STREAM, Identity, Role, server::MigrationStream},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    time::Instant,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use super::transport::{Peer, Relay, Transport, Word};

/// Bytes moved at a time in each direction of a stream.
const BUFFER_BYTES: usize = 256 * 1024;
/// Longest wait for the few bytes that open a stream.
const OPENING_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream whose relay is closed is cut after this time.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// What a destination answers to an opening it accepts.
const ACCEPTED: u8 = 1;

/// Which of a migration's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// libvirt's connection.
    Control,
    /// The memory.
    Memory,
    /// The disks.
    Disks,
    /// The source's word that it has let go of the VM.
    HandOver,
}

impl Channel {
    const ALL: [Self; 4] = [Self::Control, Self::Memory, Self::Disks, Self::HandOver];

    const fn code(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Memory => 2,
            Self::Disks => 3,
            Self::HandOver => 4,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|channel| channel.code() == code)
    }
}

/// Where a migration's sockets are; the same on both hosts, because libvirt gives QEMU one path for both ends.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sockets {
    dir: PathBuf,
    /// libvirt's connection; on the source only.
    control: PathBuf,
    memory: PathBuf,
    disks: PathBuf,
}

impl Sockets {
    /// The sockets of a migration below the agent's run directory.
    fn of(run_dir: &Path, migration: MigrationId) -> Self {
        let dir = run_dir.join("migration").join(migration.to_string());
        Self {
            control: dir.join("control.sock"),
            memory: dir.join("memory.sock"),
            disks: dir.join("disks.sock"),
            dir,
        }
    }

    /// Makes the directory, for `owner` (uid, gid: QEMU's) where given.
    fn create(&self, owner: Option<(u32, u32)>) -> io::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        std::fs::set_permissions(&self.dir, std::fs::Permissions::from_mode(0o700))?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::chown(&self.dir, Some(uid), Some(gid))?;
        }
        Ok(())
    }

    /// Removes the directory with what is in it.
    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

struct Grant {
    source: HostName,
    sockets: Sockets,
    word: Word,
    revoked: CancellationToken,
    streams: TaskTracker,
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub struct Streams {
    run_dir: PathBuf,
    /// QEMU's uid and gid, where it does not run as the agent's user.
    owner: Option<(u32, u32)>,
    identity: Identity,
    grants: Grants,
}

impl Streams {
    /// Streams with their sockets below `run_dir`, for `owner` (uid, gid) where QEMU does not run as the agent's user,
    /// opened under `identity`.
    pub fn new(run_dir: PathBuf, owner: Option<(u32, u32)>, identity: Identity) -> Self {
        Self {
            run_dir,
            owner,
            identity,
            grants: Grants::default(),
        }
    }

    /// Serves the streams that the acceptor hands on, joining control streams to `control_socket`.
    pub async fn serve(self, mut streams: mpsc::Receiver<MigrationStream>, control_socket: PathBuf) {
        while let Some(stream) = streams.recv().await {
            let (grants, control_socket) = (self.grants.clone(), control_socket.clone());
            tokio::spawn(async move {
                let peer = stream.peer.to_string();
                if let Err(error) = grants.join(stream, &control_socket).await {
                    tracing::warn!(peer, %error, "a migration stream was refused or broke");
                }
            });
        }
    }

    fn dialled(&self, peer: &Peer) -> Dialled {
        Dialled {
            peer: peer.clone(),
            identity: self.identity.clone(),
        }
    }
}

#[async_trait]
impl Transport for Streams {
    async fn allow(&self, migration: MigrationId, source: HostName) -> io::Result<Word> {
        let sockets = Sockets::of(&self.run_dir, migration);
        sockets.create(self.owner)?;
        Ok(self.grants.allow(migration, source, sockets))
    }

    async fn revoke(&self, migration: MigrationId) {
        self.grants.revoke(migration).await;
    }

    async fn open(&self, migration: MigrationId, peer: &Peer) -> io::Result<Relay> {
        let sockets = Sockets::of(&self.run_dir, migration);
        let open = OpenSockets::open(sockets.clone(), self.owner, migration, &self.dialled(peer))?;
        Ok(Relay::new(sockets.control, sockets.memory, sockets.disks, open))
    }

    async fn tell_released(
        &self,
        migration: MigrationId,
        peer: &Peer,
        stopped: Option<Instant>,
    ) -> io::Result<()> {
        let mut io = open(Channel::HandOver, migration, &self.dialled(peer)).await?;
        if let Some(stopped) = stopped {
            let micros = u32::try_from(stopped.elapsed().as_micros()).unwrap_or(u32::MAX);
            // The word has been heard. An older agent awaits no more than that.
            let tell = async {
                io.write_all(&micros.to_be_bytes()).await?;
                io.shutdown().await
            };
            let _ = tokio::time::timeout(OPENING_TIMEOUT, tell).await;
        }
        Ok(())
    }

    async fn remove(&self, migration: MigrationId) -> io::Result<()> {
        Sockets::of(&self.run_dir, migration).remove()
    }
}

/// Destination: who may open streams. Cheap to clone.
#[derive(Clone, Default)]
struct Grants {
    open: Arc<Mutex<BTreeMap<MigrationId, Arc<Grant>>>>,
}

impl Grants {
    fn map(&self) -> std::sync::MutexGuard<'_, BTreeMap<MigrationId, Arc<Grant>>> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allow(&self, migration: MigrationId, source: HostName, sockets: Sockets) -> Word {
        let make = || {
            Arc::new(Grant {
                source,
                sockets,
                word: Word::default(),
                revoked: CancellationToken::new(),
                streams: TaskTracker::new(),
            })
        };
        self.map().entry(migration).or_insert_with(make).word.clone()
    }

    async fn revoke(&self, migration: MigrationId) {
        let grant = self.map().remove(&migration);
        if let Some(grant) = grant {
            grant.revoked.cancel();
            grant.streams.close();
            grant.streams.wait().await;
        }
    }

    /// The grant, and what [`Grants::revoke`] waits for: whoever has found a grant before it was revoked counts as one of
    /// its streams from then on.
    fn find(&self, migration: MigrationId, role: &Role) -> Option<(Arc<Grant>, TaskTrackerToken)> {
        let map = self.map();
        let grant = map.get(&migration)?;
        (*role == Role::Agent(grant.source.clone())).then(|| (grant.clone(), grant.streams.token()))
    }

    async fn join(&self, stream: MigrationStream, control_socket: &Path) -> io::Result<()> {
        let MigrationStream { peer, mut io } = stream;
        let opening = tokio::time::timeout(OPENING_TIMEOUT, read_opening(&mut io)).await??;
        let (migration, channel) = opening;
        let refused = || {
            io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("no grant for {migration}"),
            )
        };
        let (grant, _counted) = self.find(migration, &peer.role).ok_or_else(refused)?;
        let local = match channel {
            Channel::Control => control_socket,
            Channel::Memory => &grant.sockets.memory,
            Channel::Disks => &grant.sockets.disks,
            Channel::HandOver => {
                grant.word.say();
                return tokio::time::timeout(OPENING_TIMEOUT, hear_out(io, &grant.word)).await?;
            }
        };
        let joined = async {
            let local = UnixStream::connect(local).await?;
            io.write_all(&[ACCEPTED]).await?;
            io.flush().await?;
            splice(io, local, grant.revoked.clone()).await
        };
        // Neither arm is polled again after the other has won: a stream that is cut is dropped as a whole.
        tokio::select! {
            biased;
            () = grant.revoked.cancelled() => Ok(()),
            outcome = joined => outcome,
        }
    }
}

/// Confirms the source's word, and hears for how long the VM had stood still. An older agent does not say.
async fn hear_out(mut io: impl AsyncRead + AsyncWrite + Unpin, word: &Word) -> io::Result<()> {
    io.write_all(&[ACCEPTED]).await?;
    io.flush().await?;
    let mut micros = [0; 4];
    if io.read_exact(&mut micros).await.is_ok() {
        word.note(Duration::from_micros(u32::from_be_bytes(micros).into()));
    }
    io.shutdown().await
}

/// The bytes that open a stream.
pub fn opening(migration: MigrationId, channel: Channel) -> [u8; 17] {
    let mut opening = [channel.code(); 17];
    opening[..16].copy_from_slice(migration.uuid().as_bytes());
    opening
}

/// Reads what opens a stream; the inverse of [`opening`].
pub async fn read_opening(io: &mut (impl AsyncRead + Unpin)) -> io::Result<(MigrationId, Channel)> {
    let mut opening = [0; 17];
    io.read_exact(&mut opening).await?;
    let [id @ .., code] = opening;
    let channel = Channel::from_code(code).ok_or(io::ErrorKind::InvalidData)?;
    Ok((MigrationId::from_uuid(uuid::Uuid::from_bytes(id)), channel))
}

async fn splice(
    mut a: impl AsyncRead + AsyncWrite + Unpin,
    mut b: impl AsyncRead + AsyncWrite + Unpin,
    cut: CancellationToken,
) -> io::Result<()> {
    // Neither arm is polled again after the other has won: a cut stream is dropped as a whole.
    tokio::select! {
        // Nothing moves after the cut, not even what is there already.
        biased;
        () = cut.cancelled() => Ok(()),
        moved = tokio::io::copy_bidirectional_with_sizes(&mut a, &mut b, BUFFER_BYTES, BUFFER_BYTES) => moved.map(drop),
    }
}

/// Where a relay's streams lead, and as whom they are opened.
#[derive(Clone)]
struct Dialled {
    peer: Peer,
    identity: Identity,
}

/// Source: the three sockets that stand for the destination. Dropping it removes the sockets; streams that are open carry
/// what was given to them, and are cut after [`DRAIN_TIMEOUT`].
struct OpenSockets {
    sockets: Sockets,
    closed: CancellationToken,
    cut: CancellationToken,
}

impl OpenSockets {
    /// Opens the sockets and joins whatever connects to them to the peer.
    fn open(
        sockets: Sockets,
        owner: Option<(u32, u32)>,
        migration: MigrationId,
        peer: &Dialled,
    ) -> io::Result<Self> {
        sockets.remove()?;
        sockets.create(owner)?;
        let (closed, cut) = (CancellationToken::new(), CancellationToken::new());
        for (channel, path) in [
            (Channel::Control, &sockets.control),
            (Channel::Memory, &sockets.memory),
            (Channel::Disks, &sockets.disks),
        ] {
            let listener = UnixListener::bind(path)?;
            if let Some((uid, gid)) = owner {
                std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
            }
            tokio::spawn(relay(
                listener,
                channel,
                migration,
                peer.clone(),
                closed.clone(),
                cut.clone(),
            ));
        }
        Ok(Self { sockets, closed, cut })
    }
}

impl Drop for OpenSockets {
    fn drop(&mut self) {
        self.closed.cancel();
        // A word of the hypervisors that is on its way can decide where the VM is: it must arrive. Their own ends are
        // closed by now, so the streams end by themselves unless the network holds them up.
        let cut = self.cut.clone();
        tokio::spawn(async move {
            tokio::time::sleep(DRAIN_TIMEOUT).await;
            cut.cancel();
        });
        if let Err(error) = self.sockets.remove() {
            tracing::warn!(%error, dir = %self.sockets.dir.display(), "a migration's sockets could not be removed");
        }
    }
}

async fn relay(
    listener: UnixListener,
    channel: Channel,
    migration: MigrationId,
    peer: Dialled,
    closed: CancellationToken,
    cut: CancellationToken,
) {
    loop {
        // Cancel safe: a connection that was not accepted stays in the backlog.
        let accepted = tokio::select! {
            biased;
            () = closed.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((local, _)) = accepted else { return };
        let (peer, cut) = (peer.clone(), cut.clone());
        tokio::spawn(async move {
            if let Err(error) = carry(local, channel, migration, &peer, cut).await {
                tracing::warn!(%migration, host = %peer.peer.host, ?channel, %error, "a migration stream broke");
            }
        });
    }
}

async fn carry(
    local: UnixStream,
    channel: Channel,
    migration: MigrationId,
    peer: &Dialled,
    cut: CancellationToken,
) -> io::Result<()> {
    splice(local, open(channel, migration, peer).await?, cut).await
}

/// Opens a stream to the peer and waits until it is let in.
async fn open(
    channel: Channel,
    migration: MigrationId,
    peer: &Dialled,
) -> io::Result<impl AsyncRead + AsyncWrite + Unpin + use<>> {
    let name = tls::agent_name(&peer.peer.host);
    let open = async {
        let mut io = tls::client::open_stream(&peer.peer.address, &name, &peer.identity, ALPN_STREAM)
            .await
            .map_err(|error| io::Error::other(error.to_string()))?;
        io.write_all(&opening(migration, channel)).await?;
        io.flush().await?;
        let mut answer = [0];
        io.read_exact(&mut answer).await?;
        if answer == [ACCEPTED] {
            Ok(io)
        } else {
            Err(io::Error::from(io::ErrorKind::PermissionDenied))
        }
    };
    tokio::time::timeout(OPENING_TIMEOUT * 2, open).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_that_is_just_being_joined_counts_when_its_migration_is_settled() {
        let grants = Grants::default();
        let migration = MigrationId::from_uuid(uuid::Uuid::from_u128(1));
        let source: HostName = "h1".parse().unwrap();
        grants.allow(
            migration,
            source.clone(),
            Sockets::of(Path::new("/run/x"), migration),
        );
        let found = grants.find(migration, &Role::Agent(source.clone())).unwrap();
        let mut revoked = std::pin::pin!(grants.revoke(migration));
        let early = tokio::time::timeout(Duration::from_millis(20), &mut revoked).await;
        assert!(
            early.is_err(),
            "nothing moves any more, it said, and a stream was still being joined"
        );
        assert!(grants.find(migration, &Role::Agent(source)).is_none());
        drop(found);
        revoked.await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_word_of_the_source_may_say_how_long_the_vm_has_stood_still() {
        for (said, heard) in [
            (Some([0, 3, 0xd0, 0x90]), Some(Duration::from_millis(250))),
            (None, None),
        ] {
            let (here, mut there) = tokio::io::duplex(64);
            let word = Word::default();
            let hearing = hear_out(here, &word);
            let saying = async {
                assert_eq!(there.read_u8().await.unwrap(), ACCEPTED);
                if let Some(micros) = said {
                    there.write_all(&micros).await.unwrap();
                }
                there.shutdown().await.unwrap();
            };
            let (ended, ()) = futures::future::join(hearing, saying).await;
            ended.unwrap();
            let stopped = tokio::time::timeout(Duration::from_secs(1), word.stopped_at()).await;
            let told = heard.map(|stood| Instant::now() - stood);
            assert_eq!(stopped.ok(), told);
        }
    }

    #[tokio::test]
    async fn nothing_is_moved_through_a_stream_that_is_cut() {
        let ((mut near, a), (b, mut far)) = (tokio::io::duplex(64), tokio::io::duplex(64));
        near.write_all(b"late").await.unwrap();
        let cut = CancellationToken::new();
        cut.cancel();
        splice(a, b, cut).await.unwrap();
        let mut moved = Vec::new();
        far.read_to_end(&mut moved).await.unwrap();
        assert_eq!(moved, b"");
    }
}
