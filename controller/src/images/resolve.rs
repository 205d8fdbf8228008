//! Finds the images of the catalogue that a new VM's disks ask for, and what follows for the disks. Pure.
//!
//! Called by `verbs::create`, in the transaction that creates the VM: [`images`] before a host is chosen, which needs the
//! sizes, [`clone_modes`] after it, since only then it is known whether a pool is shared.

use dalgu_proto::{
    image::Reference,
    vm::{CloneMode, DISK_MIB, Disk, DiskFormat, Firmware, Spec},
};

use crate::{
    model::{HostRecord, ImageRecord, ImageState},
    state::State,
    volumes,
};

const MIB: u64 = 1 << 20;

/// Why a disk cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such image, or not for this caller.
    #[error("there is no image {0}; see `dalgu image list`")]
    NotFound(String),
    /// It is not ready, or was refused.
    #[error("image {image} is {is}: {next}")]
    NotAvailable {
        /// The image.
        image: String,
        /// How far it is.
        is: &'static str,
        /// What to do.
        next: &'static str,
    },
    /// A field of a disk does not fit the image.
    #[error("disks[{index}].{field}: {message}")]
    Disk {
        /// Which disk.
        index: usize,
        /// Which field.
        field: &'static str,
        /// What is wrong.
        message: String,
    },
}

/// The image that a reference means to somebody, if VMs can be made from it.
pub fn find<'a>(state: &'a State, reference: &Reference, principal: &str) -> Result<&'a ImageRecord, Error> {
    let image = newest(state, reference, |image| image.is_usable_by(principal))?;
    let (is, next) = match image.state {
        ImageState::Available => return Ok(image),
        ImageState::AwaitingUpload => (
            "waiting for its bytes",
            "finish its upload with `dalgu image import`",
        ),
        ImageState::Importing => ("being imported", "repeat when it is AVAILABLE"),
        ImageState::Failed => ("refused", "see `dalgu image get`, delete it and import it again"),
        ImageState::Deleting => ("being deleted", "choose another"),
    };
    Err(Error::NotAvailable {
        image: image.reference(),
        is,
        next,
    })
}

/// The image of the version that is named; else the newest that is available, or the newest of all. Of those that `counts`.
pub fn newest<'a>(
    state: &'a State,
    reference: &Reference,
    counts: impl Fn(&ImageRecord) -> bool,
) -> Result<&'a ImageRecord, Error> {
    let all = versions(state, reference, counts);
    let mut available = all.iter().filter(|image| image.state == ImageState::Available);
    let image = available.next_back().or_else(|| all.last());
    image
        .copied()
        .ok_or_else(|| Error::NotFound(reference.to_string()))
}

/// The versions that count, oldest first; one where one is named.
fn versions<'a>(
    state: &'a State,
    reference: &Reference,
    counts: impl Fn(&ImageRecord) -> bool,
) -> Vec<&'a ImageRecord> {
    let from = (reference.name.clone(), String::new());
    let of_name = state.image_names.range(from..);
    let of_name = of_name.take_while(|((name, _), _)| *name == reference.name);
    let wanted = of_name.filter(|((_, version), _)| {
        let asked = reference.version.as_ref();
        asked.is_none_or(|asked| asked == version)
    });
    let records = wanted.filter_map(|(_, id)| state.images.get(id).map(AsRef::as_ref));
    let mut records: Vec<_> = records.filter(|image: &&ImageRecord| counts(image)).collect();
    records.sort_by_key(|image| image.id);
    records
}

/// Fills in which images a VM's disks are made from, and their sizes. Gives what there is to fetch at most, in bytes. What a volume
/// starts from is known already.
pub fn images(state: &State, spec: &mut Spec, principal: &str) -> Result<u64, Error> {
    let mut bytes = 0_u64;
    let disks = spec.disks.iter_mut().enumerate();
    for (index, disk) in disks.filter(|(_, disk)| disk.volume.is_none()) {
        bytes = bytes.saturating_add(image(state, index, disk, principal)?);
    }
    Ok(bytes)
}

/// What starts the operating system of the image that a VM's first disk, or the volume that it is, is made from, if it boots from one.
pub fn firmware(state: &State, spec: &Spec, principal: &str) -> Option<Firmware> {
    let first = spec.disks.first().filter(|_| spec.kernel_boot.is_none())?;
    if first.volume.is_some() {
        return volumes::resolve::of_disk(state, first).map(|volume| volume.firmware);
    }
    firmware_of_disk(state, first, principal)
}

/// What starts the operating system of the image that a disk is made from, if it is from one.
pub fn firmware_of_disk(state: &State, disk: &Disk, principal: &str) -> Option<Firmware> {
    let text = disk.image.as_ref().filter(|text| Reference::is_meant(text))?;
    let image = find(state, &text.parse().ok()?, principal).ok()?;
    Some(image.firmware)
}

/// As [`images`], for one disk.
pub fn image(state: &State, index: usize, disk: &mut Disk, principal: &str) -> Result<u64, Error> {
    // What a caller says of a digest is not asked for, and not believed.
    disk.digest = None;
    let Some(text) = disk.image.clone().filter(|text| Reference::is_meant(text)) else {
        return Ok(0);
    };
    let reference: Reference = text
        .parse()
        .map_err(|error: dalgu_proto::ids::Error| invalid(index, "image", error.to_string()))?;
    let image = find(state, &reference, principal)?;
    let Some(content) = &image.content else {
        return Err(Error::NotFound(text));
    };
    disk.image = Some(image.reference());
    disk.digest = Some(content.digest.clone());
    size(index, disk, content.virtual_size_bytes, image)?;
    if disk.clone_mode == CloneMode::Overlay && disk.format == DiskFormat::Raw {
        let message = "an overlay has the format qcow2: choose that, or a full copy";
        return Err(invalid(index, "clone_mode", message.to_owned()));
    }
    Ok(content.stored_bytes)
}

fn invalid(index: usize, field: &'static str, message: String) -> Error {
    Error::Disk {
        index,
        field,
        message,
    }
}

fn size(index: usize, disk: &mut Disk, virtual_bytes: u64, image: &ImageRecord) -> Result<(), Error> {
    let least = virtual_bytes.div_ceil(MIB).max(*DISK_MIB.start());
    if disk.size_mib == 0 {
        disk.size_mib = least;
    }
    let message = if disk.size_mib < least {
        format!(
            "must be at least the {least} MiB of image {}, got {}",
            image.reference(),
            disk.size_mib
        )
    } else if disk.size_mib > *DISK_MIB.end() {
        format!(
            "image {} has {least} MiB, more than a disk may have",
            image.reference()
        )
    } else {
        return Ok(());
    };
    Err(invalid(index, "size_mib", message))
}

/// Settles how each disk is made from its image on a host. An overlay is of use on the host alone that has the image beside
/// it: on a pool that other hosts see too, a disk is a copy.
pub fn clone_modes(spec: &mut Spec, host: &HostRecord) -> Result<(), Error> {
    for (index, disk) in spec
        .disks
        .iter_mut()
        .enumerate()
        .filter(|(_, disk)| disk.digest.is_some())
    {
        let shared = host
            .inventory
            .pools
            .iter()
            .any(|pool| pool.name == disk.pool && pool.shared);
        let possible = disk.format == DiskFormat::Qcow2 && !shared;
        disk.clone_mode = match (disk.clone_mode, possible) {
            (CloneMode::Full, _) | (CloneMode::Any, false) => CloneMode::Full,
            (_, true) => CloneMode::Overlay,
            (CloneMode::Overlay, false) => {
                let message = format!(
                    "pool {} is shared between hosts, where no overlay can be: choose a full copy, or another pool",
                    disk.pool
                );
                return Err(invalid(index, "clone_mode", message));
            }
        };
    }
    Ok(())
}
