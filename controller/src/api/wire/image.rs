//! From an image, and what hosts say of it, to the message of the operator API.

use dalgu_proto::{ids::HostName, time, v1};

use crate::{
    model::{Held, ImagePhase, ImageRecord, ImageState, Replicas, Visibility},
    state::State,
    verbs::etag,
};

/// An image.
pub fn image(state: &State, image: &ImageRecord) -> v1::Image {
    v1::Image {
        name: image.name.to_string(),
        version: image.version.clone(),
        uid: image.id.to_string(),
        format: v1::ImageFormat::from(image.format).into(),
        size_bytes: image.size_bytes,
        sha256: image.sha256.clone().map(String::from).unwrap_or_default(),
        os: image.os.clone(),
        firmware: v1::Firmware::from(image.firmware).into(),
        labels: image.labels.clone().into_iter().collect(),
        description: image.description.clone(),
        owner: image.owner.clone(),
        visibility: match image.visibility {
            Visibility::Public => v1::ImageVisibility::Public,
            Visibility::Private => v1::ImageVisibility::Private,
        }
        .into(),
        replicas: match image.replicas {
            Replicas::Count(copies) => i32::try_from(copies).unwrap_or(i32::MAX),
            Replicas::All => -1,
        },
        status: Some(image_status(state, image)),
        etag: etag(image.revision),
        create_time: Some(time::to_wire(image.create_time)),
        delete_time: image.delete_time.map(time::to_wire),
        source: image.import_host.as_ref().zip(image.file.as_ref()).map(source),
    }
}

fn source((host, file): (&HostName, &String)) -> v1::ImageFile {
    v1::ImageFile {
        host: host.to_string(),
        file: file.clone(),
    }
}

fn image_status(state: &State, image: &ImageRecord) -> v1::ImageStatus {
    let said = |host: &HostName| state.live.get(host).and_then(|live| live.images.clone());
    let holders = image.digest().and_then(|digest| state.image_hosts.get(digest));
    let held = holders.into_iter().flatten().filter_map(|host| {
        let copy = said(host)?.copies.get(image.digest()?)?.clone();
        Some((host, copy))
    });
    let held: Vec<_> = held.collect();
    let copies = held.iter().map(|(host, copy)| v1::ImageCopy {
        host: host.to_string(),
        ready: copy.phase == ImagePhase::Ready,
        bytes_done: copy.bytes_done,
        last_use_time: copy.last_use.map(time::to_wire),
    });
    let import = image.import_host.as_ref().and_then(said);
    let import = import.and_then(|stock| stock.imports.get(&image.id).cloned());
    let (bytes_done, bytes_total) = image_progress(image, import.as_deref());
    let fault = image.error.as_ref().or_else(|| {
        let copies = held.iter().find_map(|(_, copy)| copy.fault.as_ref());
        copies.or(import.as_ref()?.fault.as_ref())
    });
    v1::ImageStatus {
        state: match image.state {
            ImageState::AwaitingUpload => v1::ImageState::AwaitingUpload,
            ImageState::Importing => v1::ImageState::Importing,
            ImageState::Available => v1::ImageState::Available,
            ImageState::Failed => v1::ImageState::Failed,
            ImageState::Deleting => v1::ImageState::Deleting,
        }
        .into(),
        bytes_done,
        bytes_total,
        import_host: image
            .import_host
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        digest: image.digest().map(ToString::to_string).unwrap_or_default(),
        stored_bytes: image.content.as_ref().map_or(0, |content| content.stored_bytes),
        virtual_size_bytes: image
            .content
            .as_ref()
            .map_or(0, |content| content.virtual_size_bytes),
        copies: copies.collect(),
        vms: u32::try_from(state.vms_of_image(image).count()).unwrap_or(u32::MAX),
        error: fault.map(|fault| v1::VmError {
            reason: fault.reason.clone(),
            message: fault.message.clone(),
            retrying: image.error.is_none(),
            time: None,
        }),
    }
}

fn image_progress(image: &ImageRecord, import: Option<&Held>) -> (u64, u64) {
    match (image.state, import) {
        (ImageState::Available, _) => (image.size_bytes, image.size_bytes),
        // Of another part of the way than the state tells.
        (ImageState::Importing, Some(held)) if held.phase != ImagePhase::Importing => (0, image.size_bytes),
        (ImageState::Importing, Some(held)) => (held.bytes_done, held.bytes_total),
        (ImageState::AwaitingUpload, Some(held)) => (held.bytes_done, image.size_bytes),
        _ => (0, image.size_bytes),
    }
}
