//! What has come to be of images, and what is to be done next with them. Pure.
//!
//! Called by `runner` with a durable state; [`changes`] again inside the transaction that stores them. Copies are counted by
//! digest: two images of the catalogue that hosts keep as one are made once and removed with the last of them.

use std::collections::{BTreeMap, BTreeSet};

use dalgu_proto::{
    ids::{HostName, ImageId},
    image::Digest,
};
use jiff::{SignedDuration, Timestamp};

use super::{holders, needed};
use crate::{
    hosts,
    model::{
        Code, Content, Fault, Held, HostLive, HostState, ImagePhase, ImageRecord, ImageState, ImageStock,
        Replicas,
    },
    state::State,
};

/// Fetches under way at once on the site: beyond that they only take each other's bandwidth, and that of VMs.
pub const FETCHES: usize = 16;
/// Fetches of one image under way at once for each host that it can be read from.
pub const READERS: usize = 2;
/// A host is short of room for images below one part in so many of what they could take,
const SHORT_PART: u64 = 10;
/// or below this, whichever is less: 10 GiB.
const SHORT_MOST: u64 = 10 << 30;
/// A copy that no image of the catalogue leads to goes when it has not been used for so long. Not where the store was ever restored:
/// an older one knows less of images than hosts have.
const FORGOTTEN: SignedDuration = SignedDuration::from_hours(24);

/// An upload that nobody has gone on with for so long is given up: its host keeps room for it.
const ABANDONED: SignedDuration = SignedDuration::from_hours(7 * 24);

/// What hosts have done, to be stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// All bytes of an upload have come.
    Received(ImageId),
    /// It is verified and converted.
    Imported {
        /// The image.
        image: ImageId,
        /// What hosts keep of it.
        content: Content,
        /// SHA-256 of what was imported, if the host says.
        sha256: Option<Digest>,
        /// Size of what was imported.
        bytes: u64,
    },
    /// It cannot be had.
    Failed(ImageId, Fault),
    /// No host has anything of it any more.
    Gone(ImageId),
}

/// One command to a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Verify and convert it.
    Import {
        /// The image.
        image: ImageId,
        /// Its host.
        host: HostName,
    },
    /// Fetch a copy.
    Fetch {
        /// Of what.
        digest: Digest,
        /// To where.
        host: HostName,
    },
    /// Remove what is there.
    Remove {
        /// Where.
        host: HostName,
        /// The copy.
        digest: Option<Digest>,
        /// The import.
        image: Option<ImageId>,
    },
}

impl Step {
    /// Who is to do it.
    pub const fn host(&self) -> &HostName {
        match self {
            Self::Import { host, .. } | Self::Fetch { host, .. } | Self::Remove { host, .. } => host,
        }
    }
}

fn live<'a>(state: &'a State, host: &HostName) -> Option<&'a HostLive> {
    state.live.get(host).map(AsRef::as_ref)
}

fn stock<'a>(state: &'a State, host: &HostName) -> Option<&'a ImageStock> {
    live(state, host)?.images.as_deref()
}

fn is_ready(state: &State, host: &HostName) -> bool {
    hosts::state_of(state, host) == HostState::Ready
}

/// What an image's import host says of it.
fn import<'a>(state: &'a State, image: &ImageRecord) -> Option<&'a Held> {
    let stock = stock(state, image.import_host.as_ref()?)?;
    stock.imports.get(&image.id).map(AsRef::as_ref)
}

/// What hosts have done since, of all images.
pub fn changes(state: &State, now: Timestamp) -> Vec<Change> {
    let images = state.images.values();
    images.filter_map(|image| change(state, image, now)).collect()
}

fn change(state: &State, image: &ImageRecord, now: Timestamp) -> Option<Change> {
    let host = image.import_host.as_ref();
    let lost = host.filter(|host| !state.hosts.contains_key(*host));
    match (image.state, lost) {
        (ImageState::AwaitingUpload | ImageState::Importing, Some(host)) => {
            let message = format!(
                "host {host}, which was to import it, was deleted: delete the image and import it again"
            );
            let fault = Fault::new(Code::FailedPrecondition, "IMPORT_HOST_GONE", message);
            Some(Change::Failed(image.id, fault))
        }
        (ImageState::AwaitingUpload, None) => match import(state, image).map(|held| held.phase) {
            None | Some(ImagePhase::Unknown | ImagePhase::Receiving | ImagePhase::Fetching) => {
                abandoned(state, image, now)
            }
            Some(ImagePhase::Received | ImagePhase::Importing | ImagePhase::Ready | ImagePhase::Failed) => {
                Some(Change::Received(image.id))
            }
        },
        (ImageState::Importing, None) => imported(image, import(state, image)?),
        (ImageState::Deleting, _) => {
            let gone = state.image_gone.get(&image.id);
            let left = removed_from(state, image).any(|host| gone.is_none_or(|gone| !gone.contains(host)));
            (!left).then_some(Change::Gone(image.id))
        }
        (ImageState::Available | ImageState::Failed, _) => None,
    }
}

/// Gives an upload up that nobody has gone on with. One call brings bytes for half an hour at most, so its beginning tells. Of a host
/// that is silent it is not known whether it has them all.
fn abandoned(state: &State, image: &ImageRecord, now: Timestamp) -> Option<Change> {
    let heard = image
        .import_host
        .as_ref()
        .is_some_and(|host| is_ready(state, host));
    let last = image.upload_time.unwrap_or(image.create_time);
    if !heard || now.duration_since(last) <= ABANDONED {
        return None;
    }
    let message = "nobody has brought its bytes for 7 days: delete the image and import it again";
    let fault = Fault::new(Code::FailedPrecondition, "UPLOAD_ABANDONED", message);
    Some(Change::Failed(image.id, fault))
}

fn imported(image: &ImageRecord, held: &Held) -> Option<Change> {
    match (held.phase, &held.content) {
        (ImagePhase::Ready, Some(content)) => Some(Change::Imported {
            image: image.id,
            content: content.clone(),
            sha256: held.source_sha256.clone(),
            bytes: held.source_bytes,
        }),
        (ImagePhase::Failed, _) => {
            let unsaid = || {
                Fault::new(
                    Code::FailedPrecondition,
                    "IMPORT_FAILED",
                    "see the import host's log",
                )
            };
            let fault = held.fault.clone().unwrap_or_else(unsaid);
            Some(Change::Failed(image.id, fault))
        }
        _ => None,
    }
}

/// The digest whose copies go with an image; `None` while something else needs them.
fn last_of(state: &State, image: &ImageRecord) -> Option<Digest> {
    let digest = image.digest()?;
    let others = state.image_digests.get(digest).into_iter().flatten();
    let mut others = others.filter_map(|id| state.images.get(id));
    let shared = others.any(|other| other.id != image.id && other.state != ImageState::Deleting);
    let used = state.image_vms.contains_key(digest) || state.image_volumes.contains_key(digest);
    (!shared && !used).then(|| digest.clone())
}

/// Hosts that must say that they have nothing of an image, before it is gone: all that may have a copy, and the one that
/// was to import it.
fn removed_from<'a>(state: &'a State, image: &'a ImageRecord) -> impl Iterator<Item = &'a HostName> {
    let copies = last_of(state, image).is_some();
    let import_host = image.import_host.as_ref();
    let hosts = state.hosts.keys();
    hosts.filter(move |host| copies || import_host == Some(*host))
}

/// What is to be done now, of all images.
pub fn steps(state: &State, now: Timestamp) -> Vec<Step> {
    let mut steps: Vec<_> = state
        .images
        .values()
        .flat_map(|image| own_steps(state, image))
        .collect();
    // Soon it is known who has what: silent hosts report, or count as unreachable.
    let waits = |live: &HostLive| live.state == HostState::Initializing;
    if !state.live.values().any(|live| waits(live)) {
        fetch(state, &mut steps);
        evict(state, &mut steps);
        leave(state, now, &mut steps);
    }
    steps
}

/// Steps that concern no other image.
fn own_steps(state: &State, image: &ImageRecord) -> Vec<Step> {
    let ready = |host: &&HostName| is_ready(state, host);
    let import_host = image.import_host.as_ref().filter(ready);
    match image.state {
        ImageState::AwaitingUpload => Vec::new(),
        ImageState::Importing => {
            let begun = import(state, image).is_some_and(|held| held.phase == ImagePhase::Importing);
            let host = import_host.filter(|_| !begun).cloned();
            let step = |host| Step::Import {
                image: image.id,
                host,
            };
            host.map(step).into_iter().collect()
        }
        ImageState::Available | ImageState::Failed => {
            // What the import was made from is of no use any more; nor is what a host brings back that was taken for lost.
            let host = import_host.filter(|_| import(state, image).is_some());
            let step = |host: &HostName| Step::Remove {
                host: host.clone(),
                digest: None,
                image: Some(image.id),
            };
            host.map(step).into_iter().collect()
        }
        ImageState::Deleting => {
            let digest = last_of(state, image);
            let gone = state.image_gone.get(&image.id);
            let left = removed_from(state, image)
                .filter(|host| is_ready(state, host) && gone.is_none_or(|gone| !gone.contains(*host)));
            left.map(|host| Step::Remove {
                host: host.clone(),
                digest: digest.clone(),
                image: Some(image.id),
            })
            .collect()
        }
    }
}

/// Hosts that are to have each image that is available, by what they keep.
fn wanted(state: &State) -> BTreeMap<&Digest, (usize, u64)> {
    let mut wanted = BTreeMap::<&Digest, (usize, u64)>::new();
    let available = state
        .images
        .values()
        .filter(|image| image.state == ImageState::Available);
    for image in available {
        let Some(content) = &image.content else { continue };
        let copies = match image.replicas {
            Replicas::Count(copies) => usize::try_from(copies).unwrap_or(usize::MAX),
            Replicas::All => usize::MAX,
        };
        let entry = wanted.entry(&content.digest).or_default();
        *entry = (entry.0.max(copies), content.stored_bytes);
    }
    wanted
}

/// Below so many free bytes a host is short of room for images.
pub fn short_below(stock: &ImageStock) -> u64 {
    (stock.used_bytes.saturating_add(stock.available_bytes) / SHORT_PART).min(SHORT_MOST)
}

fn phase(state: &State, host: &HostName, digest: &Digest) -> Option<ImagePhase> {
    Some(stock(state, host)?.copies.get(digest)?.phase)
}

fn fetch(state: &State, steps: &mut Vec<Step>) {
    let fetches = |host: &HostName| {
        let copies = stock(state, host).map(|stock| stock.copies.values());
        copies
            .into_iter()
            .flatten()
            .any(|held| held.phase == ImagePhase::Fetching)
    };
    // A host fetches one image after the other.
    let ready = || state.hosts.keys().filter(|host| is_ready(state, host));
    let mut busy: BTreeSet<&HostName> = ready().filter(|host| fetches(host)).collect();
    for (host, digest) in missed(state) {
        if busy.insert(host) {
            steps.push(Step::Fetch {
                digest: digest.clone(),
                host: host.clone(),
            });
        }
    }
    for (digest, (copies, bytes)) in wanted(state) {
        let count = holders(state, digest).count();
        let sources = holders(state, digest)
            .filter(|host| is_ready(state, host))
            .count();
        if sources == 0 || count >= copies {
            continue;
        }
        let under_way = ready()
            .filter(|host| phase(state, host, digest) == Some(ImagePhase::Fetching))
            .count();
        let may = (copies - count)
            .min(sources.saturating_mul(READERS))
            .saturating_sub(under_way)
            .min(FETCHES.saturating_sub(busy.len()));
        let mut places: Vec<_> = ready()
            .filter(|host| !busy.contains(host))
            .filter_map(|host| place(state, host, digest, bytes, copies == usize::MAX))
            .collect();
        places.sort();
        for (.., host) in places.into_iter().take(may) {
            busy.insert(host);
            steps.push(Step::Fetch {
                digest: digest.clone(),
                host: host.clone(),
            });
        }
    }
}

/// Images that a host needs for a VM that it is making, and could not fetch: it may know of sources no more.
fn missed(state: &State) -> impl Iterator<Item = (&HostName, &Digest)> {
    state.image_vms.iter().flat_map(move |(digest, vms)| {
        let waiting = vms.iter().filter_map(|vm| state.vms.get(vm));
        let waiting = waiting.filter(|vm| vm.unmade().next().is_some() && vm.delete_time.is_none());
        let failed = waiting.filter(|vm| {
            is_ready(state, &vm.owner) && phase(state, &vm.owner, digest) == Some(ImagePhase::Failed)
        });
        failed.map(move |vm| (&vm.owner, digest))
    })
}

/// Whether a host takes copies of an image: a cordoned one only of those that are to be `everywhere`.
fn takes(state: &State, host: &HostName, everywhere: bool) -> bool {
    let known = state.hosts.get(host);
    known.is_some_and(|host| everywhere || host.cordon.is_none())
}

/// How well a host could take a copy, the best first: one that has not failed to, with the most room.
fn place<'a>(
    state: &'a State,
    host: &'a HostName,
    digest: &Digest,
    bytes: u64,
    everywhere: bool,
) -> Option<(bool, std::cmp::Reverse<u64>, &'a HostName)> {
    let stock = stock(state, host)?;
    let phase = phase(state, host, digest);
    let room = stock.available_bytes.saturating_sub(bytes) >= short_below(stock).max(1);
    let free = takes(state, host, everywhere) && room && phase != Some(ImagePhase::Ready);
    free.then_some((
        phase == Some(ImagePhase::Failed),
        std::cmp::Reverse(stock.available_bytes),
        host,
    ))
}

/// From each host that is short of room, the copy that was used least lately, if enough others have it and nothing here
/// needs it.
fn evict(state: &State, steps: &mut Vec<Step>) {
    let wanted = wanted(state);
    let mut leaving = BTreeMap::<&Digest, usize>::new();
    for host in state.hosts.keys().filter(|host| is_ready(state, host)) {
        let Some(stock) = stock(state, host).filter(|stock| stock.available_bytes < short_below(stock))
        else {
            continue;
        };
        let spare = |digest: &Digest, leaving: usize| {
            let there = holders(state, digest)
                .filter(|host| is_ready(state, host))
                .count();
            wanted
                .get(digest)
                .is_some_and(|(copies, _)| there.saturating_sub(leaving) > (*copies).max(1))
        };
        let mut unused: Vec<_> = stock
            .copies
            .iter()
            .filter(|(_, held)| held.phase == ImagePhase::Ready && !held.in_use)
            .filter(|(digest, _)| spare(digest, leaving.get(digest).copied().unwrap_or(0)))
            .filter(|(digest, _)| !needs(state, host, digest))
            .map(|(digest, held)| (held.last_use, digest))
            .collect();
        unused.sort_unstable();
        if let Some((_, digest)) = unused.first() {
            *leaving.entry(digest).or_default() += 1;
            steps.push(Step::Remove {
                host: host.clone(),
                digest: Some((*digest).clone()),
                image: None,
            });
        }
    }
}

/// From each host, what is of no use there: what is left of a fetch that failed, when enough others have the image; a copy
/// that nothing leads to; and an import of no image. They are left where an image is deleted while its import ends, or before a
/// command comes to fetch or to import it.
fn leave(state: &State, now: Timestamp, steps: &mut Vec<Step>) {
    let wanted = wanted(state);
    let known = |digest: &Digest| {
        state.image_digests.contains_key(digest)
            || state.image_vms.contains_key(digest)
            || state.image_volumes.contains_key(digest)
    };
    let restored = state.meta.restores() > 0;
    let old = |held: &Held| {
        held.last_use
            .is_some_and(|used| !restored && now.duration_since(used) > FORGOTTEN)
    };
    // What an import leads to is not known before it has ended.
    let imports = |host: &HostName| {
        let mut images = state.images.values();
        images.any(|image| {
            let open = matches!(image.state, ImageState::AwaitingUpload | ImageState::Importing);
            open && image.import_host.as_ref() == Some(host)
        })
    };
    let enough = |digest: &Digest| {
        wanted
            .get(digest)
            .is_none_or(|(copies, _)| holders(state, digest).count() >= *copies)
    };
    let goes_on = |host: &HostName, digest: &Digest| {
        let copies = wanted.get(digest).map(|(copies, _)| *copies);
        takes(state, host, copies == Some(usize::MAX))
    };
    for host in state.hosts.keys().filter(|host| is_ready(state, host)) {
        // A host is told to import only what is stored.
        let imports_of = stock(state, host).map(|stock| stock.imports.keys());
        let imports_of = imports_of.into_iter().flatten().filter(|_| !restored);
        let strays = imports_of.filter(|id| !state.images.contains_key(*id));
        steps.extend(strays.map(|id| Step::Remove {
            host: host.clone(),
            digest: None,
            image: Some(*id),
        }));
        let copies = stock(state, host).map(|stock| &stock.copies);
        let useless = |digest: &Digest, held: &Held| match held.phase {
            ImagePhase::Failed if known(digest) => {
                (enough(digest) || !goes_on(host, digest)) && !waits_for(state, host, digest)
            }
            ImagePhase::Failed => true,
            ImagePhase::Ready => !known(digest) && !held.in_use && old(held) && !imports(host),
            _ => false,
        };
        let useless = copies
            .into_iter()
            .flatten()
            .find(|(digest, held)| useless(digest, held));
        steps.extend(useless.map(|(digest, _)| Step::Remove {
            host: host.clone(),
            digest: Some(digest.clone()),
            image: None,
        }));
    }
}

/// Whether a VM that is on a host, or comes to it, can do nothing there without an image, so that it is fetched.
fn waits_for(state: &State, host: &HostName, digest: &Digest) -> bool {
    let there = state.host_vms.get(host).into_iter().flatten();
    let mut vms = there.filter_map(|vm| state.vms.get(vm));
    vms.any(|vm| needed(vm).contains(&digest))
}

/// Whether a VM that is on a host, or comes to it, has a disk that is made from an image; or a volume is there that starts from it.
fn needs(state: &State, host: &HostName, digest: &Digest) -> bool {
    let volumes = state.image_volumes.get(digest).into_iter().flatten();
    let mut volumes = volumes.filter_map(|name| state.volumes.get(name));
    if volumes.any(|volume| volume.host.as_ref() == Some(host)) {
        return true;
    }
    let there = state.host_vms.get(host);
    let vms = state.image_vms.get(digest).into_iter().flatten();
    there.is_some_and(|there| vms.clone().any(|vm| there.contains(vm)))
}
