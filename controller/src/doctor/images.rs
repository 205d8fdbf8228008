//! Whether images can be had, and go when they should.

use std::time::Duration;

use super::{Finding, Invariant, Look, Severity, View, some};
use crate::{
    images,
    model::{HostState, ImageRecord, ImageState, Visibility},
};

/// A deletion that has not ended after so long waits for a host.
const DELETION: Duration = Duration::from_mins(10);

/// Adds what is wrong with images to a look at what is there.
pub(super) fn have_copies(view: &View<'_>, look: &mut Look) {
    look.checked += view.state.images.len();
    // What is not known yet is no finding.
    let mut live = view.state.live.values();
    if live.any(|live| live.state == HostState::Initializing) {
        return;
    }
    let images = view.state.images.values();
    look.findings
        .extend(images.filter_map(|image| without_copy(view, image)));
}

/// One that is there for its owner only is not named to others.
fn subject(image: &ImageRecord) -> String {
    match image.visibility {
        Visibility::Public => format!("image {}", image.reference()),
        Visibility::Private => format!("image {}", image.id),
    }
}

fn without_copy(view: &View<'_>, image: &ImageRecord) -> Option<Finding> {
    let digest = image.digest().filter(|_| image.state == ImageState::Available)?;
    let holders: Vec<_> = images::holders(view.state, digest).collect();
    let heard = |host: &&&dalgu_proto::ids::HostName| view.unseen(host).is_none();
    if holders.iter().any(|host| heard(&host)) {
        return None;
    }
    let names: Vec<_> = holders.iter().map(|host| host.as_str()).collect();
    let (seen, next_step) = if names.is_empty() {
        (
            "no host says that it has a copy".to_owned(),
            "bring back a host that has one, or delete the image and import it again".to_owned(),
        )
    } else {
        let names = some(&names);
        (
            format!("no host that has a copy is heard from: {names}"),
            format!("bring back one of {names}: no VM can be made from it elsewhere meanwhile"),
        )
    };
    Some(Finding {
        invariant: Invariant::I2,
        severity: Severity::Warning,
        kind: "IMAGE_WITHOUT_COPY",
        subject: subject(image),
        seen,
        next_step,
    })
}

/// Adds deletions that do not end.
pub(super) fn deletions_end(view: &View<'_>, look: &mut Look) {
    let deleting = view.state.images.values().filter_map(|image| {
        let since = view.since(image.delete_time?);
        (since > DELETION).then_some((image, since))
    });
    for (image, since) in deleting {
        let gone = view.state.image_gone.get(&image.id);
        let silent = view
            .state
            .hosts
            .keys()
            .filter(|host| view.unseen(host).is_some() && gone.is_none_or(|gone| !gone.contains(*host)));
        let silent: Vec<_> = silent.map(|host| host.as_str()).collect();
        let next_step = if silent.is_empty() {
            "see the logs of the agents that still have it".to_owned()
        } else {
            format!("bring back {}, or delete those hosts", some(&silent))
        };
        look.findings.push(Finding {
            invariant: Invariant::I14,
            severity: Severity::Warning,
            kind: "IMAGE_DELETION_PENDING",
            subject: subject(image),
            seen: format!(
                "its deletion was asked for {} s ago and has not ended",
                since.as_secs()
            ),
            next_step,
        });
    }
}
