//! What operators do with images. The bytes come by another way: see `api::image`.
//!
//! An image that is private is there for its owner and the administrator only; to all others each verb answers as if there were none.

use std::collections::BTreeMap;

use dalgu_proto::{
    ids::{HostName, ImageId, ImageName},
    image::{Digest, Format},
    vm::Firmware,
};

use super::{Caller, Error, check_etag, room};
use crate::{
    hosts,
    model::{HostState, ImageRecord, ImageState, Outcome, Replicas, Visibility},
    state::{State, Tx},
};

/// Room that an import takes of its host for each byte of the file: the file itself, and what it is converted to.
const ROOM_FACTOR: u64 = 2;

/// A new image.
#[derive(Debug, Clone)]
pub struct Create {
    /// Name.
    pub name: ImageName,
    /// Version.
    pub version: String,
    /// Format of the file.
    pub format: Format,
    /// Size of the file; 0 where the host knows it.
    pub size_bytes: u64,
    /// SHA-256 of the file.
    pub sha256: Option<Digest>,
    /// Kind of operating system.
    pub os: String,
    /// What starts it.
    pub firmware: Firmware,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Description.
    pub description: String,
    /// Who may use it.
    pub visibility: Visibility,
    /// Hosts that are to have it.
    pub replicas: Replicas,
    /// The host and its file, where it is not uploaded.
    pub source: Option<(HostName, String)>,
}

/// New values of mutable fields; `None` leaves one as it is.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Kind of operating system.
    pub os: Option<String>,
    /// What starts it.
    pub firmware: Option<Firmware>,
    /// Labels, all of them.
    pub labels: Option<BTreeMap<String, String>>,
    /// Description.
    pub description: Option<String>,
    /// Who may use it.
    pub visibility: Option<Visibility>,
    /// Hosts that are to have it.
    pub replicas: Option<Replicas>,
    /// Whose it is.
    pub owner: Option<String>,
}

/// The image of that name and version, for who asks.
pub fn find(state: &State, principal: &str, name: &ImageName, version: &str) -> Result<ImageRecord, Error> {
    let image = state.image_by_name(name, version);
    let image = image.filter(|image| image.is_visible_to(principal));
    image
        .map(|image| (**image).clone())
        .ok_or_else(|| Error::ImageNotFound(format!("{name}:{version}")))
}

/// Enters an image.
pub fn create(tx: &mut Tx, caller: &Caller, new: Create) -> Result<Outcome, Error> {
    room(tx)?;
    if tx.image_by_name(&new.name, &new.version).is_some() {
        return Err(Error::ImageExists(format!("{}:{}", new.name, new.version)));
    }
    let same = same(tx, &caller.principal, &new);
    let import_host = match (&same, &new.source) {
        (Some(_), _) => None,
        (None, Some((host, _))) => Some(reachable(tx, host)?),
        (None, None) => Some(import_host(tx, new.size_bytes)?),
    };
    let state = match (&same, &new.source) {
        (Some(_), _) => ImageState::Available,
        (None, Some(_)) => ImageState::Importing,
        (None, None) => ImageState::AwaitingUpload,
    };
    let size_bytes = same.as_ref().map_or(new.size_bytes, |same| same.size_bytes);
    let image = ImageRecord {
        id: ImageId::from_uuid(tx.new_id()),
        name: new.name,
        version: new.version,
        format: new.format,
        size_bytes,
        sha256: new.sha256,
        os: new.os,
        firmware: new.firmware,
        labels: new.labels,
        description: new.description,
        owner: caller.principal.clone(),
        visibility: new.visibility,
        replicas: new.replicas,
        state,
        import_host,
        file: new.source.map(|(_, file)| file),
        upload_time: None,
        content: same.and_then(|same| same.content),
        error: None,
        create_time: tx.now(),
        delete_time: None,
        revision: 0,
    };
    let message = match &image.import_host {
        Some(host) => format!("entered by {}; {host} imports it", caller.principal),
        None => format!("entered by {}; its content is there already", caller.principal),
    };
    tx.image_event(&image, "ImageCreated", message);
    let id = image.id;
    tx.put_image(image);
    Ok(Outcome::Image(id))
}

/// An image whose bytes are those that are wanted. One that the caller may not use is none: whoever knows a checksum would
/// get the bytes.
fn same(tx: &Tx, principal: &str, new: &Create) -> Option<ImageRecord> {
    let wanted = new.sha256.as_ref()?;
    let same = tx.images.values().find(|image| {
        image.state == ImageState::Available
            && image.sha256.as_ref() == Some(wanted)
            && image.format == new.format
            && (new.size_bytes == 0 || image.size_bytes == new.size_bytes)
            && image.is_usable_by(principal)
    });
    same.map(|image| (**image).clone())
}

fn reachable(tx: &Tx, host: &HostName) -> Result<HostName, Error> {
    if !tx.hosts.contains_key(host) {
        return Err(Error::HostNotFound(host.to_string()));
    }
    match hosts::state_of(tx, host) {
        HostState::Ready => Ok(host.clone()),
        HostState::Initializing => Err(Error::Initializing),
        HostState::Unreachable => Err(Error::HostUnreachable(host.clone())),
    }
}

/// The host with the most room for images that takes new ones, if it has enough.
fn import_host(tx: &Tx, size_bytes: u64) -> Result<HostName, Error> {
    let takes = |host: &&HostName| {
        let open = tx.hosts.get(*host).is_some_and(|host| host.cordon.is_none());
        open && hosts::state_of(tx, host) == HostState::Ready
    };
    let room = |host: &HostName| {
        let available = tx.live.get(host)?.images.as_ref()?.available_bytes;
        Some(available.saturating_sub(promised(tx, host)))
    };
    let rooms = tx
        .hosts
        .keys()
        .filter(takes)
        .filter_map(|host| Some((room(host)?, host)));
    // Of hosts with the same room the first by name.
    let best = rooms.max_by_key(|(room, host)| (*room, std::cmp::Reverse(*host)));
    let wanted = size_bytes.saturating_mul(ROOM_FACTOR);
    match best {
        Some((room, host)) if room >= wanted => Ok(host.clone()),
        _ if tx.live.values().any(|live| live.state == HostState::Initializing) => Err(Error::Initializing),
        best => Err(Error::NoImageRoom {
            wanted,
            best: best.map(|(room, host)| (host.clone(), room)),
        }),
    }
}

/// Room that a host has promised to imports which have not taken it yet.
fn promised(tx: &Tx, host: &HostName) -> u64 {
    let stock = tx.live.get(host).and_then(|live| live.images.clone());
    let open = tx.images.values().filter(|image| {
        let under_way = matches!(image.state, ImageState::AwaitingUpload | ImageState::Importing);
        under_way && image.import_host.as_ref() == Some(host)
    });
    open.map(|image| {
        let there = stock.as_ref().and_then(|stock| stock.imports.get(&image.id));
        let came = there.map_or(0, |held| held.bytes_done.min(image.size_bytes));
        image.size_bytes.saturating_mul(ROOM_FACTOR).saturating_sub(came)
    })
    .fold(0, u64::saturating_add)
}

/// Changes an image.
pub fn update(
    tx: &mut Tx,
    caller: &Caller,
    name: &ImageName,
    version: &str,
    etag: &str,
    update: Update,
) -> Result<Outcome, Error> {
    room(tx)?;
    let old = find(tx, &caller.principal, name, version)?;
    check_etag(etag, old.revision, &old.reference())?;
    if old.state == ImageState::Deleting {
        return Err(Error::ImageDeleting(old.reference()));
    }
    let mut image = old.clone();
    image.os = update.os.unwrap_or(image.os);
    image.firmware = update.firmware.unwrap_or(image.firmware);
    image.labels = update.labels.unwrap_or(image.labels);
    image.description = update.description.unwrap_or(image.description);
    image.visibility = update.visibility.unwrap_or(image.visibility);
    image.replicas = update.replicas.unwrap_or(image.replicas);
    image.owner = update.owner.unwrap_or(image.owner);
    if image != old {
        let message = match image.owner == old.owner {
            true => "changed".to_owned(),
            false => format!("given to {} by {}", image.owner, caller.principal),
        };
        withdrawn(tx, caller, &old, &image);
        tx.image_event(&image, "ImageUpdated", message);
        tx.put_image(image);
    }
    Ok(Outcome::Image(old.id))
}

/// Tells those who saw an image and do not any more: what it has become is told without them.
fn withdrawn(tx: &mut Tx, caller: &Caller, old: &ImageRecord, new: &ImageRecord) {
    let why = match (old.visibility, new.visibility) {
        (_, Visibility::Public) => return,
        (Visibility::Public, Visibility::Private) => "made private",
        (Visibility::Private, Visibility::Private) if new.is_visible_to(&old.owner) => return,
        (Visibility::Private, Visibility::Private) => "given to another",
    };
    tx.image_event(old, "ImageWithdrawn", format!("{why} by {}", caller.principal));
}

/// Asks for an image to be deleted.
pub fn delete(
    tx: &mut Tx,
    caller: &Caller,
    name: &ImageName,
    version: &str,
    etag: &str,
) -> Result<Outcome, Error> {
    let mut image = find(tx, &caller.principal, name, version)?;
    check_etag(etag, image.revision, &image.reference())?;
    not_in_use(tx, &image)?;
    if image.state != ImageState::Deleting {
        image.state = ImageState::Deleting;
        image.delete_time = Some(tx.now());
        let message = format!("asked for by {}", caller.principal);
        tx.image_event(&image, "ImageDeleting", message);
        tx.put_image(image);
    }
    Ok(Outcome::ImageDeleted)
}

/// Refuses an image that VMs have disks of, or that volumes start from.
fn not_in_use(state: &State, image: &ImageRecord) -> Result<(), Error> {
    let vms: Vec<_> = state.vms_of_image(image).map(|vm| vm.name.to_string()).collect();
    let volumes = state
        .volumes_of_image(image)
        .map(|volume| volume.name.to_string());
    let volumes: Vec<_> = volumes.collect();
    for (what, users) in [("VMs", vms), ("volumes", volumes)] {
        if let Some(first) = users.first() {
            return Err(Error::ImageInUse {
                image: image.reference(),
                users: users.len(),
                what,
                first: first.clone(),
            });
        }
    }
    Ok(())
}

/// Notes that somebody begins to bring the bytes of an image.
pub fn uploading(tx: &mut Tx, id: ImageId) {
    let image = tx
        .images
        .get(&id)
        .filter(|image| image.state == ImageState::AwaitingUpload);
    if let Some(image) = image.map(|image| (**image).clone()) {
        tx.put_image(ImageRecord {
            upload_time: Some(tx.now()),
            ..image
        });
    }
}

/// The image whose bytes somebody brings, and the host that takes them.
pub fn uploadable(
    state: &State,
    principal: &str,
    name: &ImageName,
    version: &str,
) -> Result<(ImageRecord, HostName), Error> {
    super::in_charge(state)?;
    let image = find(state, principal, name, version)?;
    let host = match (image.state, &image.import_host) {
        (ImageState::AwaitingUpload, Some(host)) => host.clone(),
        _ => {
            return Err(Error::NotAwaitingUpload {
                image: image.reference(),
                is: image.state.as_str(),
            });
        }
    };
    match hosts::state_of(state, &host) {
        HostState::Ready => Ok((image, host)),
        HostState::Initializing => Err(Error::Initializing),
        HostState::Unreachable => Err(Error::HostUnreachable(host)),
    }
}
