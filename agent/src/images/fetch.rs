//! Bringing a copy from other hosts: one fetch for everybody who needs the image. It goes on where it was broken off, with the
//! next host, and becomes a copy when its content is what its digest says.
//!
//! A host that fails, refuses, falls silent or gives too much is followed by the next; after a round without a byte all are
//! asked again, a few times, and then it has failed until somebody asks for the image once more.

use std::{collections::BTreeSet, fmt, time::Duration};

use dalgu_proto::{ids::HostName, image::Digest, reason};
use futures::StreamExt as _;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    Fetch, Images, Need, Source, State,
    files::{Progress, fetch_name},
    peers,
};
use crate::vm::status::Failure;

/// Longest wait for a host's answer, and for each piece of an image.
const SILENCE: Duration = Duration::from_secs(10);
/// Rounds without a byte before a fetch has failed.
const IDLE_ROUNDS: u32 = 4;
/// First wait after a round; doubles with each that brings nothing.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Wrong contents before a fetch has failed.
const WRONG_CONTENTS: u32 = 4;

/// An image that is needed and not here yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awaited {
    /// Its digest.
    pub digest: Digest,
    /// Bytes that are here.
    pub bytes_done: u64,
    /// All the bytes.
    pub bytes_total: u64,
    /// Whether somebody is at work on it.
    pub on_its_way: bool,
    /// What went wrong last, if anything did.
    pub trouble: Option<Failure>,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            digest,
            bytes_done,
            bytes_total,
            trouble,
            ..
        } = self;
        write!(
            f,
            "image {digest} is fetched from other hosts: {bytes_done} of {bytes_total} bytes are here"
        )?;
        match trouble {
            Some(trouble) => write!(f, "; {}", trouble.message),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Awaited {}

/// Why a host did not bring all of an image.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{host}: {}", .status.message())]
    Host {
        host: HostName,
        status: Box<tonic::Status>,
    },
    #[error("{host} is silent")]
    Silent { host: HostName },
    #[error("{host} stops at byte {at}")]
    Short { host: HostName, at: u64 },
    #[error("{host} gives more bytes than the image has")]
    Long { host: HostName },
    #[error("the content that came is not the image's; the last of it came from {host}")]
    Wrong { host: HostName },
    #[error(transparent)]
    Here(#[from] super::Error),
    #[error("{0}")]
    Refused(#[from] crate::image::Refusal),
}

impl Trouble {
    fn reason(&self) -> String {
        match self {
            Self::Host { status, .. } => reason::of(status).unwrap_or_else(|| "HOST_UNREACHABLE".to_owned()),
            Self::Silent { .. } | Self::Short { .. } => "HOST_UNREACHABLE".to_owned(),
            Self::Long { .. } | Self::Wrong { .. } => "CHECKSUM_MISMATCH".to_owned(),
            Self::Here(_) => "STORAGE".to_owned(),
            Self::Refused(_) => "IMAGE_REFUSED".to_owned(),
        }
    }
}

/// What a fetch has learnt of its hosts.
#[derive(Default)]
struct Tried {
    /// Contents that were wrong.
    wrong: u32,
    /// Hosts that gave one from its beginning.
    liars: BTreeSet<HostName>,
    /// Some host of several gives wrong bytes: what one has begun no other goes on with.
    one_alone: bool,
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Self::Here(error.into())
    }
}

impl Images {
    /// Whether an image is here; begins to fetch it where it is not.
    ///
    /// # Errors
    /// [`Awaited`] while it is not.
    pub fn need(&self, need: &Need) -> Result<(), Awaited> {
        let digest = &need.digest;
        let mut state = self.state();
        if state.removing.contains(digest) {
            let trouble = self.trouble("BUSY", "it is being removed".to_owned(), true);
            return Err(awaited(&state, digest, Some(trouble)));
        }
        if state.copies.contains_key(digest) {
            return Ok(());
        }
        let fresh = || Fetch {
            need: need.clone(),
            progress: Progress::default(),
            running: false,
            trouble: None,
            cut: CancellationToken::new(),
        };
        let fetch = state.fetches.entry(digest.clone()).or_insert_with(fresh);
        if !need.sources.is_empty() {
            fetch.need = need.clone();
            fetch.progress.set_total(need.size_bytes);
        }
        if !fetch.running {
            let known = fetch.need.size_bytes > 0
                && fetch.need.sources.iter().any(|source| source.host != self.0.own);
            if known {
                fetch.running = true;
                fetch.cut = CancellationToken::new();
                self.begin(digest.clone(), fetch.progress.clone(), fetch.cut.clone());
            } else {
                let message = "no other host is known that has it".to_owned();
                fetch.trouble = Some(self.trouble("NO_SOURCE", message, true));
            }
        }
        Err(awaited(&state, digest, None))
    }

    /// As [`Self::need`], with some patience.
    ///
    /// # Errors
    /// [`Awaited`] when it is not here by then.
    pub async fn wait(&self, need: &Need, patience: Duration) -> Result<(), Awaited> {
        let mut changes = self.changes();
        let ended = async {
            while self.state().is_on_its_way(&need.digest) {
                // It fails only when the store is gone, and this holds it.
                let _ = changes.changed().await;
            }
        };
        if self.need(need).is_ok() {
            return Ok(());
        }
        // Whether it ended or not shows in what is here.
        let _ = timeout(patience, ended).await;
        let state = self.state();
        match state.copies.contains_key(&need.digest) && !state.removing.contains(&need.digest) {
            true => Ok(()),
            false => Err(awaited(&state, &need.digest, None)),
        }
    }

    fn begin(&self, digest: Digest, progress: Progress, cut: CancellationToken) {
        let images = self.clone();
        tracing::info!(%digest, "fetching an image");
        self.spawn(async move {
            let fetched = cut.run_until_cancelled(images.fetch(&digest, &progress)).await;
            {
                let mut state = images.state();
                match (fetched, state.fetches.get_mut(&digest)) {
                    (Some(Ok(())), _) => drop(state.fetches.remove(&digest)),
                    (Some(Err(trouble)), Some(fetch)) => {
                        tracing::warn!(%digest, %trouble, "an image could not be fetched");
                        fetch.running = false;
                        fetch.trouble = Some(images.trouble(&trouble.reason(), trouble.to_string(), true));
                    }
                    (None, Some(fetch)) => fetch.running = false,
                    (_, None) => {}
                }
            }
            images.changed();
        });
        self.changed();
    }

    async fn fetch(&self, digest: &Digest, progress: &Progress) -> Result<(), Trouble> {
        self.check_room().await?;
        let mut tried = Tried::default();
        let mut idle = 0;
        loop {
            let before = progress.get().0;
            let mut last = None;
            for source in self.sources(digest, &tried.liars) {
                match self.fetch_trying(&source, digest, progress, &mut tried).await {
                    Ok(()) => return Ok(()),
                    // Nobody else brings it either.
                    Err(trouble @ (Trouble::Here(_) | Trouble::Refused(_))) => return Err(trouble),
                    Err(trouble) => {
                        self.note_trouble(digest, &trouble);
                        last = Some(trouble);
                    }
                }
            }
            idle = if progress.get().0 > before { 0 } else { idle + 1 };
            match last {
                Some(trouble) if idle >= IDLE_ROUNDS || tried.wrong >= WRONG_CONTENTS => return Err(trouble),
                Some(_) => sleep(FIRST_WAIT * 2_u32.pow(idle)).await,
                None => return Err(Trouble::Here(super::Error::NotHere(digest.clone()))),
            }
        }
    }

    /// Brings an image from one host, and learns of it. When content from several was wrong, one must give all of it.
    async fn fetch_trying(
        &self,
        source: &Source,
        digest: &Digest,
        progress: &Progress,
        tried: &mut Tried,
    ) -> Result<(), Trouble> {
        if tried.one_alone && progress.get().0 > 0 {
            self.start_anew(&fetch_name(digest), progress).await?;
        }
        loop {
            let before = progress.get().0;
            let Err(trouble) = self.fetch_from(source, digest, progress).await else {
                return Ok(());
            };
            tracing::info!(%digest, %trouble, "a host did not bring an image");
            if let Trouble::Wrong { host } | Trouble::Long { host } = &trouble {
                tried.wrong += 1;
                if tried.one_alone || before == 0 {
                    tried.liars.insert(host.clone());
                }
                tried.one_alone = true;
            }
            if !tried.one_alone || progress.get().0 <= before {
                return Err(trouble);
            }
        }
    }

    /// Other hosts that have the image, as it was told last.
    fn sources(&self, digest: &Digest, liars: &BTreeSet<HostName>) -> Vec<Source> {
        let state = self.state();
        let sources = state.fetches.get(digest).map(|fetch| fetch.need.sources.clone());
        let mut sources = sources.unwrap_or_default();
        sources.retain(|source| source.host != self.0.own && !liars.contains(&source.host));
        sources
    }

    /// What comes is worth more than why it did not come before.
    fn forget_trouble(&self, digest: &Digest) {
        if let Some(fetch) = self.state().fetches.get_mut(digest) {
            fetch.trouble = None;
        }
    }

    fn note_trouble(&self, digest: &Digest, trouble: &Trouble) {
        let failure = self.trouble(&trouble.reason(), trouble.to_string(), true);
        if let Some(fetch) = self.state().fetches.get_mut(digest) {
            fetch.trouble = Some(failure);
        }
        self.changed();
    }

    /// Brings the rest of an image from one host.
    async fn fetch_from(&self, source: &Source, digest: &Digest, progress: &Progress) -> Result<(), Trouble> {
        let host = || source.host.clone();
        let broke = |status: tonic::Status| Trouble::Host {
            host: host(),
            status: Box::new(status),
        };
        let name = fetch_name(digest);
        let (mut have, size) = progress.get();
        if have == 0 {
            // What an earlier one left may be longer.
            self.0.files.remove(&name).await?;
        }
        if have < size {
            let silent = |_| Trouble::Silent { host: host() };
            let asked = peers::read(&*self.0.peers, source, digest, have);
            let mut pieces = timeout(SILENCE, asked).await.map_err(silent)?.map_err(broke)?;
            while let Some(piece) = timeout(SILENCE, pieces.next()).await.map_err(silent)? {
                let piece = piece.map_err(broke)?;
                let length = piece.len() as u64;
                if length > size - have {
                    self.start_anew(&name, progress).await?;
                    return Err(Trouble::Long { host: host() });
                }
                self.0.files.write(&name, have, piece).await?;
                have += length;
                progress.set(have);
                self.forget_trouble(digest);
            }
            if have < size {
                return Err(Trouble::Short {
                    host: host(),
                    at: have,
                });
            }
        }
        let whole = self.whole(&name, digest, size, source, progress).await;
        if let Err(Trouble::Here(_)) = &whole {
            // What has come may have its name already, or be lost: nothing is known of it any more.
            progress.set(0);
        }
        whole
    }

    /// Looks at all that has come, and keeps it.
    async fn whole(
        &self,
        name: &str,
        digest: &Digest,
        size: u64,
        source: &Source,
        progress: &Progress,
    ) -> Result<(), Trouble> {
        let host = || source.host.clone();
        self.0.files.sync(name).await?;
        if self.0.files.digest(name).await? != (digest.clone(), size) {
            self.start_anew(name, progress).await?;
            return Err(Trouble::Wrong { host: host() });
        }
        let inspected = self.0.files.inspect(name).await?;
        self.publish(name, digest, size, inspected.virtual_size_bytes)
            .await?;
        Ok(())
    }

    async fn start_anew(&self, name: &str, progress: &Progress) -> Result<(), Trouble> {
        progress.set(0);
        self.0.files.remove(name).await?;
        Ok(())
    }
}

impl State {
    fn is_on_its_way(&self, digest: &Digest) -> bool {
        let fetching = self.fetches.get(digest).is_some_and(|fetch| fetch.running);
        fetching || self.removing.contains(digest)
    }
}

fn awaited(state: &State, digest: &Digest, trouble: Option<Failure>) -> Awaited {
    let fetch = state.fetches.get(digest);
    let (bytes_done, bytes_total) = fetch.map_or((0, 0), |fetch| fetch.progress.get());
    Awaited {
        digest: digest.clone(),
        bytes_done,
        bytes_total,
        on_its_way: state.is_on_its_way(digest),
        trouble: trouble.or_else(|| fetch.and_then(|fetch| fetch.trouble.clone())),
    }
}
