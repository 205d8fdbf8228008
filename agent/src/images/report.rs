//! What is here of images, as the controller is told.

use dalgu_proto::{
    agent::v1::{ImageInventory, ImagePhase, ImageReport},
    ids::ImageId,
    image::Digest,
    time::to_wire,
};

use super::{Fetch, Images, Import, State, Whole, record::Record};
use crate::{vm::status::Failure, wire::failure};

impl Images {
    /// What is here, complete.
    pub fn inventory(&self) -> ImageInventory {
        let state = self.state();
        let imports = state.imports.iter().map(|(id, entry)| import(&state, *id, entry));
        let copies = state
            .copies
            .iter()
            .map(|(digest, entry)| copy(&state, digest, entry));
        let fetches = state
            .fetches
            .iter()
            .filter(|(digest, _)| !state.copies.contains_key(*digest))
            .map(|(digest, entry)| fetch(&state, digest, entry));
        ImageInventory {
            images: imports.chain(copies).chain(fetches).collect(),
            used_bytes: used_bytes(&state),
            available_bytes: state.available_bytes,
        }
    }

    /// What is here of an import.
    pub fn import_report(&self, id: ImageId) -> ImageReport {
        let state = self.state();
        let nothing = || ImageReport {
            image_uid: id.to_string(),
            ..ImageReport::default()
        };
        let entry = state.imports.get(&id);
        entry.map_or_else(nothing, |entry| import(&state, id, entry))
    }

    /// What is here of a copy.
    pub fn copy_report(&self, digest: &Digest) -> ImageReport {
        let state = self.state();
        match (state.copies.get(digest), state.fetches.get(digest)) {
            (Some(entry), _) => copy(&state, digest, entry),
            (None, Some(entry)) => fetch(&state, digest, entry),
            (None, None) => ImageReport {
                digest: digest.to_string(),
                ..ImageReport::default()
            },
        }
    }
}

fn used_bytes(state: &State) -> u64 {
    let copies = state.copies.values().map(|copy| copy.bytes);
    let fetches = state.fetches.values().map(|fetch| fetch.progress.get().0);
    let uploads = state.imports.values().map(|import| match import.record {
        Record::Receiving { received_bytes, .. } => received_bytes,
        _ => 0,
    });
    copies.chain(fetches).chain(uploads).fold(0, u64::saturating_add)
}

fn import(state: &State, id: ImageId, import: &Import) -> ImageReport {
    let mut report = ImageReport {
        image_uid: id.to_string(),
        error: import.trouble.clone().map(failure),
        ..ImageReport::default()
    };
    let phase = match (&import.record, &import.running) {
        (
            Record::Ready {
                digest,
                source_sha256,
                source_bytes,
                bytes,
                virtual_size_bytes,
            },
            _,
        ) => {
            let copy = state.copies.get(digest);
            report.last_use_time = copy.map(|copy| to_wire(copy.last_use));
            report.virtual_size_bytes = *virtual_size_bytes;
            report.digest = digest.to_string();
            report.source_sha256 = source_sha256.to_string();
            report.source_bytes = *source_bytes;
            (report.bytes_done, report.bytes_total) = (*bytes, *bytes);
            report.in_use = state.is_held(digest);
            ImagePhase::Ready
        }
        (
            Record::Refused {
                reason,
                message,
                since,
            },
            _,
        ) => {
            report.error = Some(failure(Failure {
                reason: reason.clone(),
                message: message.clone(),
                retrying: false,
                since: *since,
            }));
            ImagePhase::Failed
        }
        (_, Some(progress)) => {
            (report.bytes_done, report.bytes_total) = progress.get();
            ImagePhase::Importing
        }
        // Where bad luck ended an import, it stands as before it, with an error.
        (Record::Named, None) => ImagePhase::Unspecified,
        (
            Record::Receiving {
                size_bytes,
                received_bytes,
            },
            None,
        ) => {
            (report.bytes_done, report.bytes_total) = (*received_bytes, *size_bytes);
            match received_bytes == size_bytes {
                true => ImagePhase::Received,
                false => ImagePhase::Receiving,
            }
        }
    };
    report.set_phase(phase);
    report
}

fn copy(state: &State, digest: &Digest, copy: &Whole) -> ImageReport {
    ImageReport {
        digest: digest.to_string(),
        phase: ImagePhase::Ready.into(),
        bytes_done: copy.bytes,
        bytes_total: copy.bytes,
        virtual_size_bytes: copy.virtual_size_bytes,
        last_use_time: Some(to_wire(copy.last_use)),
        in_use: state.is_held(digest),
        ..ImageReport::default()
    }
}

fn fetch(state: &State, digest: &Digest, fetch: &Fetch) -> ImageReport {
    let (bytes_done, bytes_total) = fetch.progress.get();
    let phase = match fetch.running {
        true => ImagePhase::Fetching,
        false => ImagePhase::Failed,
    };
    ImageReport {
        digest: digest.to_string(),
        phase: phase.into(),
        bytes_done,
        bytes_total,
        in_use: state.is_held(digest),
        error: fetch.trouble.clone().map(failure),
        ..ImageReport::default()
    }
}
