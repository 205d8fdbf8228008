//! The plan of images, and the sources of copies, case by case.

use std::{collections::BTreeMap, sync::Arc};

use dalgu_proto::vm::{CloneMode, DiskFormat};
use jiff::{SignedDuration, Timestamp};

use super::{plan::*, *};
use crate::{
    fixtures,
    model::{Code, Fault, Held, HeldImage, HostLive, ImageRecord, ImageState, ImageStock, Replicas},
    state::{Db, Hooks, Tx},
    store::memory::Disk,
};

const GIB: u64 = 1 << 30;

pub(super) fn db() -> Db {
    Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap()
}

/// A host that reports so many free bytes and these copies.
pub(super) fn host(tx: &mut Tx, name: &str, state: HostState, free: u64, held: &[(u8, ImagePhase)]) {
    let name = fixtures::host_name(name);
    if !tx.hosts.contains_key(&name) {
        tx.put_host(fixtures::host(name.as_str()));
    }
    let mut stock = ImageStock {
        used_bytes: held.len() as u64 * GIB,
        available_bytes: free,
        ..ImageStock::default()
    };
    for (number, phase) in held {
        stock.put(HeldImage::Copy(fixtures::digest(*number), fixtures::held(*phase)));
    }
    let live = HostLive {
        state,
        images: Some(Arc::new(stock)),
        ..HostLive::silent(tokio::time::Instant::now())
    };
    tx.set_live(name, live);
}

fn ready(tx: &mut Tx, name: &str, held: &[u8]) {
    let held: Vec<_> = held.iter().map(|number| (*number, ImagePhase::Ready)).collect();
    host(tx, name, HostState::Ready, 100 * GIB, &held);
}

async fn planned(change: impl FnOnce(&mut Tx)) -> (Vec<Change>, Vec<Step>) {
    let db = db();
    db.change(change).await;
    let state = db.snapshot();
    (changes(&state, Timestamp::UNIX_EPOCH), steps(&state, db.now()))
}

fn fetch(number: u8, host: &str) -> Step {
    Step::Fetch {
        digest: fixtures::digest(number),
        host: fixtures::host_name(host),
    }
}

fn remove(host: &str, number: Option<u8>, image: Option<&ImageRecord>) -> Step {
    Step::Remove {
        host: fixtures::host_name(host),
        digest: number.map(fixtures::digest),
        image: image.map(|image| image.id),
    }
}

#[tokio::test]
async fn an_image_is_fetched_by_as_many_hosts_as_are_wanted_those_with_the_most_room_first() {
    for (replicas, expected) in [
        (Replicas::Count(1), vec![]),
        (Replicas::Count(2), vec![fetch(1, "h3")]),
        // Two for each host that it can be read from.
        (Replicas::Count(9), vec![fetch(1, "h3"), fetch(1, "h2")]),
        (Replicas::All, vec![fetch(1, "h3"), fetch(1, "h2")]),
    ] {
        let (_, steps) = planned(|tx| {
            let mut image = fixtures::image("12", 1);
            image.replicas = replicas;
            tx.put_image(image);
            ready(tx, "h1", &[1]);
            host(tx, "h2", HostState::Ready, 50 * GIB, &[]);
            host(tx, "h3", HostState::Ready, 80 * GIB, &[]);
            host(tx, "h4", HostState::Ready, 40 * GIB, &[]);
        })
        .await;
        assert_eq!(steps, expected, "{replicas:?}");
    }
}

#[tokio::test]
async fn an_upload_that_nobody_goes_on_with_is_given_up_after_a_week() {
    let hours = |hours: i64| Timestamp::from_second(hours * 3600).unwrap();
    for (begun, phase, now, expected) in [
        (None, None, 7 * 24, false),
        (None, None, 7 * 24 + 1, true),
        (None, Some(ImagePhase::Receiving), 7 * 24 + 1, true),
        // Its bytes are all there, and nobody has said so yet.
        (None, Some(ImagePhase::Received), 7 * 24 + 1, false),
        (Some(24), Some(ImagePhase::Receiving), 8 * 24, false),
        (Some(24), Some(ImagePhase::Receiving), 8 * 24 + 1, true),
    ] {
        let db = db();
        let image = ImageRecord {
            state: ImageState::AwaitingUpload,
            import_host: Some(fixtures::host_name("h1")),
            upload_time: begun.map(hours),
            ..fixtures::image("12", 1)
        };
        db.change(|tx| {
            ready(tx, "h1", &[]);
            if let Some(phase) = phase {
                tx.note_held(
                    &fixtures::host_name("h1"),
                    HeldImage::Import(image.id, fixtures::held(phase)),
                );
            }
            tx.put_image(image);
        })
        .await;
        let found = changes(&db.snapshot(), hours(now));
        let given_up = |change: &Change| matches!(change, Change::Failed(_, fault) if fault.reason == "UPLOAD_ABANDONED");
        assert_eq!(
            found.iter().any(given_up),
            expected,
            "{begun:?} {phase:?} {now}: {found:?}"
        );
    }
}

#[tokio::test]
async fn no_host_fetches_that_is_silent_closed_without_room_or_busy() {
    let (_, steps) = planned(|tx| {
        tx.put_image(fixtures::image("12", 1));
        ready(tx, "h1", &[1]);
        host(tx, "h2", HostState::Unreachable, 100 * GIB, &[]);
        host(tx, "h3", HostState::Ready, GIB, &[]);
        host(
            tx,
            "h4",
            HostState::Ready,
            100 * GIB,
            &[(2, ImagePhase::Fetching)],
        );
        ready(tx, "h5", &[]);
        let mut closed = fixtures::host("h5");
        closed.cordon = Some(String::new());
        tx.put_host(closed);
    })
    .await;
    assert_eq!(steps, []);
    let (_, steps) = planned(|tx| {
        tx.put_image(fixtures::image("12", 1));
        ready(tx, "h1", &[1]);
        ready(tx, "h2", &[]);
        host(tx, "h3", HostState::Initializing, 100 * GIB, &[]);
    })
    .await;
    assert_eq!(steps, [], "who has what is not known yet");
}

#[tokio::test]
async fn an_import_is_begun_and_its_end_is_stored_as_its_host_says() {
    let content = fixtures::image("12", 1).content;
    let fault = Fault::new(Code::FailedPrecondition, "IMAGE_REFUSED", "it has a backing file");
    for (state, phase, begins, change) in [
        (ImageState::AwaitingUpload, ImagePhase::Receiving, false, None),
        (
            ImageState::AwaitingUpload,
            ImagePhase::Received,
            false,
            Some("received"),
        ),
        (ImageState::Importing, ImagePhase::Received, true, None),
        (ImageState::Importing, ImagePhase::Importing, false, None),
        (ImageState::Importing, ImagePhase::Unknown, true, None),
        (ImageState::Importing, ImagePhase::Ready, true, Some("imported")),
        (ImageState::Importing, ImagePhase::Failed, true, Some("failed")),
        (ImageState::Failed, ImagePhase::Failed, false, None),
    ] {
        let (changes, steps) = planned(|tx| {
            ready(tx, "h1", &[]);
            let mut image = fixtures::image("12", 1);
            (image.state, image.content) = (state, None);
            image.import_host = Some(fixtures::host_name("h1"));
            let mut held = fixtures::held(phase);
            held.content = content.clone().filter(|_| phase == ImagePhase::Ready);
            held.fault = Some(fault.clone());
            tx.note_held(&fixtures::host_name("h1"), HeldImage::Import(image.id, held));
            tx.put_image(image);
        })
        .await;
        let imports = steps.iter().any(|step| matches!(step, Step::Import { .. }));
        assert_eq!(imports, begins, "{state:?} {phase:?}");
        let told = changes.first().map(|change| match change {
            Change::Received(_) => "received",
            Change::Imported { .. } => "imported",
            Change::Failed(_, why) => {
                assert_eq!(why, &fault);
                "failed"
            }
            Change::Gone(_) => "gone",
        });
        assert_eq!(told, change, "{state:?} {phase:?}");
    }
}

#[tokio::test]
async fn a_host_short_of_room_lets_go_of_the_spare_copy_that_was_used_least_lately() {
    let wanted = |tx: &mut Tx, copies| {
        for (version, number) in [("1", 1), ("2", 2)] {
            let mut image = fixtures::image(version, number);
            image.replicas = Replicas::Count(copies);
            tx.put_image(image);
        }
        let both = [(1, ImagePhase::Ready), (2, ImagePhase::Ready)];
        host(tx, "h1", HostState::Ready, 0, &both);
        let mut used = fixtures::held(ImagePhase::Ready);
        used.last_use = Some(jiff::Timestamp::UNIX_EPOCH);
        tx.note_held(
            &fixtures::host_name("h1"),
            HeldImage::Copy(fixtures::digest(1), used),
        );
        for other in ["h2", "h3"] {
            ready(tx, other, &[1, 2]);
        }
    };
    let (_, steps) = planned(|tx| wanted(tx, 2)).await;
    assert_eq!(steps, [remove("h1", Some(2), None)], "2 was never used");
    let (_, steps) = planned(|tx| {
        wanted(tx, 2);
        let image = fixtures::image("2", 2);
        tx.put_vm(fixtures::vm_of(&image, "web", "h1"));
    })
    .await;
    assert_eq!(steps, [remove("h1", Some(1), None)], "a VM there needs 2");
    let (_, steps) = planned(|tx| wanted(tx, 3)).await;
    assert_eq!(steps, [], "no copy is too many");
    let (_, steps) = planned(|tx| {
        wanted(tx, 2);
        host(
            tx,
            "h3",
            HostState::Unreachable,
            100 * GIB,
            &[(1, ImagePhase::Ready), (2, ImagePhase::Ready)],
        );
    })
    .await;
    assert_eq!(steps, [], "a silent host's copy is none that could be read");
}

#[tokio::test]
async fn a_deletion_asks_every_host_and_leaves_what_another_image_or_a_vm_needs() {
    let deleting = || {
        let mut image = fixtures::image("12", 1);
        image.state = ImageState::Deleting;
        image.import_host = Some(fixtures::host_name("h1"));
        image
    };
    let image = deleting();
    let (changes, steps) = planned(|tx| {
        ready(tx, "h1", &[1]);
        ready(tx, "h2", &[]);
        host(tx, "h3", HostState::Unreachable, 0, &[]);
        tx.put_image(image.clone());
    })
    .await;
    assert_eq!(changes, []);
    let all = ["h1", "h2"].map(|host| remove(host, Some(1), Some(&image)));
    assert_eq!(
        steps, all,
        "a fetch whose answer was lost may be under way anywhere"
    );

    let image = deleting();
    let (_, steps) = planned(|tx| {
        ready(tx, "h1", &[1]);
        ready(tx, "h2", &[1]);
        tx.put_image(image.clone());
        tx.put_image(fixtures::image("13", 1));
    })
    .await;
    assert_eq!(steps, [remove("h1", None, Some(&image))]);

    let image = deleting();
    let (changes, steps) = planned(|tx| {
        ready(tx, "h1", &[1]);
        tx.put_image(image.clone());
        let mut other = fixtures::vm_of(&image, "web", "h1");
        other.spec.disks[0].image = Some("debian:forgotten".to_owned());
        tx.put_vm(other);
        tx.note_removed(&fixtures::host_name("h1"), None, Some(image.id));
    })
    .await;
    assert_eq!((changes, steps), (vec![Change::Gone(image.id)], vec![]));
}

#[tokio::test]
async fn a_host_that_could_not_fetch_for_its_vm_is_told_anew_where_to_fetch() {
    let failed = [(1, ImagePhase::Failed)];
    let (_, steps) = planned(|tx| {
        let mut image = fixtures::image("12", 1);
        image.replicas = Replicas::Count(1);
        tx.put_vm(fixtures::vm_of(&image, "web", "h2"));
        tx.put_image(image);
        ready(tx, "h1", &[1]);
        host(tx, "h2", HostState::Ready, 100 * GIB, &failed);
    })
    .await;
    assert_eq!(steps, [fetch(1, "h2")]);
}

#[tokio::test]
async fn sources_are_those_that_can_be_reached_first_another_for_each_destination() {
    let db = db();
    db.change(|tx| {
        for number in 1..=12 {
            ready(tx, &format!("h{number:02}"), &[1]);
        }
        host(tx, "h00", HostState::Unreachable, 0, &[(1, ImagePhase::Ready)]);
        host(tx, "h13", HostState::Ready, 0, &[(1, ImagePhase::Fetching)]);
    })
    .await;
    let state = db.snapshot();
    let mut first = BTreeMap::<HostName, usize>::new();
    for number in 0..100 {
        let destination = fixtures::host_name(&format!("d{number}"));
        let sources = sources(&state, &fixtures::digest(1), &destination);
        assert_eq!(sources.len(), 8);
        assert!(
            sources.iter().all(|(host, _)| host.as_str() != "h00"),
            "{sources:?}"
        );
        *first.entry(sources[0].0.clone()).or_default() += 1;
    }
    assert!(first.len() > 6, "{first:?}");
    let own = sources(&state, &fixtures::digest(1), &fixtures::host_name("h01"));
    assert!(own.iter().all(|(host, _)| host.as_str() != "h01"));
    assert_eq!(stored_bytes(&state, &fixtures::digest(1)), GIB, "as hosts say");
}

#[tokio::test]
async fn an_overlay_is_made_where_it_can_be() {
    let image = fixtures::image("12", 1);
    for (asked, format, shared, settled) in [
        (CloneMode::Any, DiskFormat::Qcow2, false, Ok(CloneMode::Overlay)),
        (CloneMode::Any, DiskFormat::Qcow2, true, Ok(CloneMode::Full)),
        (CloneMode::Any, DiskFormat::Raw, false, Ok(CloneMode::Full)),
        (CloneMode::Full, DiskFormat::Qcow2, false, Ok(CloneMode::Full)),
        (
            CloneMode::Overlay,
            DiskFormat::Qcow2,
            false,
            Ok(CloneMode::Overlay),
        ),
        (CloneMode::Overlay, DiskFormat::Qcow2, true, Err("clone_mode")),
    ] {
        let mut spec = fixtures::vm_of(&image, "web", "h1").spec;
        (spec.disks[0].clone_mode, spec.disks[0].format) = (asked, format);
        let mut host = fixtures::host("h1");
        host.inventory.pools[0].shared = shared;
        let outcome = resolve::clone_modes(&mut spec, &host).map_err(|error| match error {
            resolve::Error::Disk { field, .. } => field,
            other => panic!("{other}"),
        });
        let found = outcome.map(|()| spec.disks[0].clone_mode);
        assert_eq!(found, settled, "{asked:?} {format:?} shared: {shared}");
    }
}

#[tokio::test]
async fn a_copy_that_no_image_leads_to_goes_a_day_after_its_last_use() {
    let db = db();
    let now = db.now();
    let left = |hours: i64, in_use: bool| Held {
        last_use: Some(now - SignedDuration::from_hours(hours)),
        in_use,
        ..fixtures::held(ImagePhase::Ready)
    };
    for (held, expected) in [
        (left(25, false), vec![remove("h1", Some(7), None)]),
        (left(25, true), vec![]),
        (left(23, false), vec![]),
        (fixtures::held(ImagePhase::Fetching), vec![]),
        (
            fixtures::held(ImagePhase::Failed),
            vec![remove("h1", Some(7), None)],
        ),
    ] {
        let (_, steps) = planned(|tx| {
            ready(tx, "h1", &[]);
            let copy = HeldImage::Copy(fixtures::digest(7), held.clone());
            tx.note_held(&fixtures::host_name("h1"), copy);
        })
        .await;
        assert_eq!(steps, expected, "{held:?}");
    }
}

#[tokio::test]
async fn what_a_failed_fetch_has_left_goes_when_enough_others_have_the_image() {
    let failed = [(1, ImagePhase::Failed)];
    for (replicas, needed, expected) in [
        (1, false, vec![remove("h2", Some(1), None)]),
        (1, true, vec![fetch(1, "h2")]),
        (2, false, vec![fetch(1, "h2")]),
    ] {
        let (_, steps) = planned(|tx| {
            let mut image = fixtures::image("12", 1);
            image.replicas = Replicas::Count(replicas);
            if needed {
                tx.put_vm(fixtures::vm_of(&image, "web", "h2"));
            }
            tx.put_image(image);
            ready(tx, "h1", &[1]);
            host(tx, "h2", HostState::Ready, 100 * GIB, &failed);
        })
        .await;
        assert_eq!(steps, expected, "{replicas} copies, needed: {needed}");
    }
}

#[tokio::test]
async fn what_a_failed_fetch_has_left_goes_from_a_cordoned_host_which_fetches_no_more() {
    let failed = [(1, ImagePhase::Failed)];
    for (replicas, expected) in [
        (Replicas::Count(2), vec![remove("h2", Some(1), None)]),
        (Replicas::All, vec![fetch(1, "h2")]),
    ] {
        let (_, steps) = planned(|tx| {
            let mut image = fixtures::image("12", 1);
            image.replicas = replicas;
            tx.put_image(image);
            ready(tx, "h1", &[1]);
            host(tx, "h2", HostState::Ready, 100 * GIB, &failed);
            let mut closed = (*tx.hosts[&fixtures::host_name("h2")]).clone();
            closed.cordon = Some("memory".into());
            tx.put_host(closed);
        })
        .await;
        assert_eq!(steps, expected, "{replicas:?}");
    }
}

#[tokio::test]
async fn what_a_failed_fetch_has_left_goes_also_where_a_vm_elsewhere_is_all_that_knows_the_image() {
    let failed = [(1, ImagePhase::Failed)];
    let (_, steps) = planned(|tx| {
        // Its image was deleted from the catalogue.
        let image = fixtures::image("12", 1);
        let mut vm = fixtures::vm_of(&image, "web", "h1");
        vm.disks_made = true;
        tx.put_vm(vm);
        ready(tx, "h1", &[1]);
        host(tx, "h2", HostState::Ready, 100 * GIB, &failed);
    })
    .await;
    assert_eq!(steps, [remove("h2", Some(1), None)]);
}

#[tokio::test]
async fn what_a_failed_fetch_has_left_goes_although_a_volume_starts_from_the_image_that_no_vm_has() {
    let failed = [(1, ImagePhase::Failed)];
    let (_, steps) = planned(|tx| {
        let mut image = fixtures::image("12", 1);
        image.replicas = Replicas::Count(1);
        let mut volume = fixtures::volume("data", Some("h2"));
        volume.digest = image.digest().cloned();
        tx.put_volume(volume);
        tx.put_image(image);
        ready(tx, "h1", &[1]);
        host(tx, "h2", HostState::Ready, 100 * GIB, &failed);
    })
    .await;
    assert_eq!(steps, [remove("h2", Some(1), None)]);
}

#[tokio::test]
async fn an_import_that_was_told_before_the_deletion_and_comes_after_it_is_forgotten() {
    let stray = fixtures::image("12", 1);
    let import = || HeldImage::Import(stray.id, fixtures::held(ImagePhase::Ready));
    for (known, restored, expected) in [
        (None, false, vec![remove("h1", None, Some(&stray))]),
        // An older store knows less of images than hosts have.
        (None, true, vec![]),
        (Some(ImageState::AwaitingUpload), false, vec![]),
        // The host was taken for lost, and brings back what it has imported.
        (
            Some(ImageState::Failed),
            false,
            vec![remove("h1", None, Some(&stray))],
        ),
    ] {
        let db = db();
        db.change(|tx| {
            ready(tx, "h1", &[]);
            tx.note_held(&fixtures::host_name("h1"), import());
            if let Some(state) = known {
                let mut image = stray.clone();
                (image.state, image.content) = (state, None);
                image.import_host = Some(fixtures::host_name("h1"));
                tx.put_image(image);
            }
        })
        .await;
        let mut state = (*db.snapshot()).clone();
        state.meta.incarnation += u64::from(restored);
        assert_eq!(
            steps(&state, db.now()),
            expected,
            "{known:?} restored: {restored}"
        );
    }
}
