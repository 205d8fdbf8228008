//! The streams of migrations between the hosts of a fleet: in memory, and cut when an agent dies, when the network is
//! cut, or when the destination revokes them.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use dalgu_agent::{
    hypervisor::sim::{Lines, Listener, MemoryLines, Stream},
    migration::transport::{Peer, Relay, Transport, Word},
};
use dalgu_proto::ids::{HostName, MigrationId};
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{life::Life, plan::Node, site::Site};

/// A closed relay's streams are cut after this time, as in the program.
const DRAIN: Duration = Duration::from_secs(10);
/// Bytes that one end of a stream may be ahead of the other.
const AHEAD: usize = 16 * 1024;

/// At a destination: who may come.
#[derive(Debug, Clone)]
struct Grant {
    source: HostName,
    word: Word,
    revoked: CancellationToken,
    streams: TaskTracker,
    life: Life,
}

/// At a source: a path that leads to another host.
#[derive(Debug, Clone)]
struct Way {
    from: usize,
    to: usize,
    migration: MigrationId,
    life: Life,
    cut: CancellationToken,
}

/// All that is open between the hosts.
#[derive(Debug, Default)]
pub struct Ways {
    grants: BTreeMap<(usize, MigrationId), Grant>,
    ways: BTreeMap<PathBuf, Way>,
    open: Vec<(usize, usize, CancellationToken)>,
}

impl Ways {
    /// The network between two hosts is cut.
    pub fn cut(&mut self, a: usize, b: usize) {
        self.open.retain(|(_, _, cut)| !cut.is_cancelled());
        for (from, to, cut) in &self.open {
            if (*from, *to) == (a, b) || (*from, *to) == (b, a) {
                cut.cancel();
            }
        }
    }

    fn grant(&self, host: usize, migration: MigrationId, source: &HostName) -> Option<Grant> {
        let grant = self.grants.get(&(host, migration))?;
        (grant.source == *source && !grant.life.is_over()).then(|| grant.clone())
    }
}

/// The transport of one life of an agent.
pub struct Streams {
    /// The site.
    pub site: Arc<Site>,
    /// Which host's agent.
    pub host: usize,
    /// The agent.
    pub life: Life,
}

#[async_trait]
impl Transport for Streams {
    async fn allow(&self, migration: MigrationId, source: HostName) -> io::Result<Word> {
        self.life.pass().await;
        let make = || Grant {
            source,
            word: Word::default(),
            revoked: CancellationToken::new(),
            streams: TaskTracker::new(),
            life: self.life.clone(),
        };
        let mut ways = self.site.ways();
        let stale = ways
            .grants
            .get(&(self.host, migration))
            .is_some_and(|grant| grant.life.is_over());
        if stale {
            ways.grants.remove(&(self.host, migration));
        }
        Ok(ways
            .grants
            .entry((self.host, migration))
            .or_insert_with(make)
            .word
            .clone())
    }

    async fn revoke(&self, migration: MigrationId) {
        self.life.pass().await;
        let grant = self.site.ways().grants.remove(&(self.host, migration));
        if let Some(grant) = grant {
            grant.revoked.cancel();
            grant.streams.close();
            grant.streams.wait().await;
        }
    }

    async fn open(&self, migration: MigrationId, peer: &Peer) -> io::Result<Relay> {
        self.life.pass().await;
        let path = |what: &str| PathBuf::from(format!("/fleet/h{}/{migration}/{what}", self.host + 1));
        let control = path("control");
        let to = self.site.host_number(&peer.host).ok_or(io::ErrorKind::NotFound)?;
        let way = Way {
            from: self.host,
            to,
            migration,
            life: self.life.clone(),
            cut: CancellationToken::new(),
        };
        let guard = Guard {
            site: Arc::downgrade(&self.site),
            path: control.clone(),
            cut: way.cut.clone(),
        };
        self.site.ways().ways.insert(control.clone(), way);
        Ok(Relay::new(control, path("memory"), path("disks"), guard))
    }

    async fn tell_released(&self, migration: MigrationId, peer: &Peer, _: Option<Instant>) -> io::Result<()> {
        self.life.pass().await;
        let to = self.site.host_number(&peer.host).ok_or(io::ErrorKind::NotFound)?;
        self.site.hand_over(self.host, to, migration, &self.life).await
    }

    async fn remove(&self, _migration: MigrationId) -> io::Result<()> {
        self.life.pass().await;
        Ok(())
    }
}

/// A relay that is open.
struct Guard {
    site: Weak<Site>,
    path: PathBuf,
    cut: CancellationToken,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(site) = self.site.upgrade() {
            site.ways().ways.remove(&self.path);
        }
        let cut = self.cut.clone();
        // At the end of a run there is nobody left to cut it for.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                tokio::time::sleep(DRAIN).await;
                cut.cancel();
            });
        }
    }
}

/// How the simulated hypervisors of a fleet reach each other.
#[derive(Debug, Clone)]
pub struct Cables {
    /// Who listens.
    pub memory: MemoryLines,
    /// The site.
    pub site: Weak<Site>,
}

#[async_trait]
impl Lines for Cables {
    fn listen(&self, path: &Path) -> io::Result<Box<dyn Listener>> {
        self.memory.listen(path)
    }

    async fn connect(&self, path: &Path) -> io::Result<Stream> {
        let site = self.site.upgrade().ok_or(io::ErrorKind::BrokenPipe)?;
        let (way, grant) = {
            let mut ways = site.ways();
            let way = ways.ways.get(path).cloned().ok_or(io::ErrorKind::NotFound)?;
            let connected = site.is_connected(Node::Host(way.from), Node::Host(way.to))
                && site.is_connected(Node::Host(way.to), Node::Host(way.from));
            if way.life.is_over() || !connected {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let grant = ways.grant(way.to, way.migration, &site.host_name(way.from));
            let grant = grant.ok_or(io::ErrorKind::PermissionDenied)?;
            ways.open.push((way.from, way.to, way.cut.clone()));
            (way, grant)
        };
        let counted = grant.streams.token();
        let far = self.memory.connect(&control(way.to)).await?;
        let (near, middle) = tokio::io::duplex(AHEAD);
        tokio::spawn(async move {
            let _counted = counted;
            let (mut middle, mut far) = (middle, far);
            // What is cut is dropped as a whole.
            tokio::select! {
                biased;
                () = way.cut.cancelled() => {}
                () = way.life.end.cancelled() => {}
                () = grant.life.end.cancelled() => {}
                () = grant.revoked.cancelled() => {}
                _ = tokio::io::copy_bidirectional_with_sizes(&mut middle, &mut far, AHEAD, AHEAD) => {}
            }
        });
        Ok(Box::new(near))
    }
}

/// Where a host's hypervisor listens.
pub fn control(host: usize) -> PathBuf {
    PathBuf::from(format!("/fleet/h{}/hypervisor", host + 1))
}

/// The word that a source's VM is gone for good reaches the destination, if somebody waits for it there.
pub fn word(ways: &Ways, to: usize, migration: MigrationId, source: &HostName) -> io::Result<()> {
    let grant = ways
        .grant(to, migration, source)
        .ok_or(io::ErrorKind::PermissionDenied)?;
    grant.word.say();
    Ok(())
}
