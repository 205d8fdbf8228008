//! What agents say of images, and which they are told that a VM needs.

use dalgu_proto::{agent::v1 as agent, ids::HostName, image::Digest, time};

use crate::{
    images,
    model::{Code, Content, Fault, Held, HeldImage, ImagePhase, ImageStock, VmRecord},
    state::State,
};

/// The images that a host needs for a VM, and where it can fetch them.
pub fn needs(state: &State, vm: &VmRecord, host: &HostName) -> Vec<agent::ImageNeed> {
    let digests = images::needed(vm).into_iter();
    digests.map(|digest| need(state, digest, host)).collect()
}

/// One image, and where a host can fetch it.
pub fn need(state: &State, digest: &Digest, host: &HostName) -> agent::ImageNeed {
    let sources = images::sources(state, digest, host).into_iter();
    agent::ImageNeed {
        digest: digest.to_string(),
        size_bytes: images::stored_bytes(state, digest),
        sources: sources
            .map(|(host, address)| agent::ImageSource {
                host: host.to_string(),
                address,
            })
            .collect(),
    }
}

/// What a host says that it has.
pub fn stock(wire: agent::ImageInventory) -> ImageStock {
    let mut stock = ImageStock {
        used_bytes: wire.used_bytes,
        available_bytes: wire.available_bytes,
        ..ImageStock::default()
    };
    for image in wire.images.into_iter().filter_map(held) {
        stock.put(image);
    }
    stock
}

/// What a host says of one; `None` when it cannot be told which.
pub fn held(wire: agent::ImageReport) -> Option<HeldImage> {
    let phase = match wire.phase() {
        agent::ImagePhase::Unspecified => ImagePhase::Unknown,
        agent::ImagePhase::Receiving => ImagePhase::Receiving,
        agent::ImagePhase::Received => ImagePhase::Received,
        agent::ImagePhase::Importing => ImagePhase::Importing,
        agent::ImagePhase::Fetching => ImagePhase::Fetching,
        agent::ImagePhase::Ready => ImagePhase::Ready,
        agent::ImagePhase::Failed => ImagePhase::Failed,
    };
    let digest: Option<Digest> = wire.digest.parse().ok();
    let content = digest.clone().map(|digest| Content {
        digest,
        stored_bytes: wire.bytes_total,
        virtual_size_bytes: wire.virtual_size_bytes,
    });
    let held = Held {
        phase,
        bytes_done: wire.bytes_done,
        bytes_total: wire.bytes_total,
        content: content.filter(|_| phase == ImagePhase::Ready),
        source_sha256: wire.source_sha256.parse().ok(),
        source_bytes: wire.source_bytes,
        last_use: wire.last_use_time.as_ref().and_then(time::from_wire),
        in_use: wire.in_use,
        fault: wire
            .error
            .map(|error| Fault::new(Code::FailedPrecondition, &error.reason, error.message)),
    };
    match wire.image_uid.as_str() {
        "" => digest.map(|digest| HeldImage::Copy(digest, held)),
        uid => Some(HeldImage::Import(uid.parse().ok()?, held)),
    }
}
