//! The corpus of hostile images, each a file that somebody imports: refused for its own reason, within a limit, with nothing left of
//! it, and without a look at the file that it leads to.

use std::path::PathBuf;

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use super::{
    importing::{Place, place, qemu_img},
    *,
};
use crate::image::{Format, tests::hostile::corpus};

/// No image is looked at for longer.
const LIMIT: Duration = Duration::from_secs(20);

/// A file beside the images, and who opens it: this process or another.
struct Canary {
    path: PathBuf,
    watch: Inotify,
}

impl Canary {
    fn new(place: &Place) -> Self {
        let path = place.dir.path().join("canary");
        std::fs::write(&path, content(1 << 20, 11)).unwrap();
        let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).unwrap();
        let looks = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ACCESS;
        watch.add_watch(&path, looks).unwrap();
        Self { path, watch }
    }

    /// Whether anybody has looked into it since this was asked last.
    fn was_opened(&self) -> bool {
        match self.watch.read_events() {
            Ok(events) => !events.is_empty(),
            Err(errno) => {
                assert_eq!(errno, Errno::EAGAIN);
                false
            }
        }
    }
}

/// Imports it, and forgets it when it has been refused for good, for a reason that says so much.
async fn is_refused(images: &Images, order: Order, why: &str, name: &str) {
    let id = order.id;
    images.import(order).unwrap();
    let Ok(report) = timeout(LIMIT, ended(images, id)).await else {
        panic!("{name}: not refused after {LIMIT:?}");
    };
    assert_eq!(report.phase(), ImagePhase::Failed, "{name}: {report:?}");
    assert_eq!(report.digest, "", "{name}");
    let error = report.error.unwrap();
    assert_eq!(
        (error.reason.as_str(), error.retrying),
        ("IMAGE_REFUSED", false),
        "{name}: {error:?}"
    );
    assert!(error.message.contains(why), "{name}: {error:?}");
}

#[tokio::test]
async fn every_hostile_image_that_is_imported_is_refused_and_nothing_is_left_of_it_and_no_other_file_opened()
{
    let place = place(true);
    let canary = Canary::new(&place);
    let images = open(place.files.clone()).await;
    let corpus = corpus(canary.path.to_str().unwrap());
    assert!(corpus.len() >= 40, "{} images", corpus.len());
    for case in corpus {
        let (bytes, why) = (&case.image.0, case.refusal.to_string());
        let file = format!("hostile.{}", case.format);
        std::fs::write(place.image(&file), bytes).unwrap();
        let named = order(id(1), Origin::File(file.clone()), case.format);
        is_refused(&images, named, &why, case.name).await;
        // An upload of no bytes is refused before it comes to a host.
        if !bytes.is_empty() {
            upload_all(&images, id(2), bytes).await;
            let uploaded = order(id(2), Origin::Upload, case.format);
            is_refused(&images, uploaded, &why, case.name).await;
        }
        let left = place.names();
        assert!(
            left.iter().all(|name| name.ends_with(".json")),
            "{}: {left:?}",
            case.name
        );
        for id in [id(1), id(2)] {
            images.forget(id, false).await.unwrap();
        }
        assert_eq!(place.names(), [""; 0], "{}", case.name);
        assert!(!canary.was_opened(), "{}", case.name);
        std::fs::remove_file(place.image(&file)).unwrap();
    }
}

#[test]
fn who_believes_a_header_opens_the_file_that_it_names() {
    let place = place(true);
    let canary = Canary::new(&place);
    let corpus = corpus(canary.path.to_str().unwrap());
    let case = corpus.iter().find(|case| case.name == "a backing file").unwrap();
    let image = place.image("believed.qcow2");
    std::fs::write(&image, &case.image.0).unwrap();
    assert!(!canary.was_opened());
    let out = place.image("out.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &image, &out]);
    assert!(canary.was_opened());
}

#[tokio::test]
async fn an_image_that_only_seems_sound_is_refused_by_qemu_img_and_nothing_half_made_is_left() {
    let place = place(true);
    let plain = place.image("plain.raw");
    std::fs::write(&plain, content(1 << 20, 13)).unwrap();
    let torn = place.image("torn.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &plain, &torn]);
    // A cluster that is no multiple of one.
    let mut bytes = std::fs::read(&torn).unwrap();
    let number = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let l1 = usize::try_from(number(40)).unwrap();
    let l2 = usize::try_from(number(l1) << 8 >> 8).unwrap();
    bytes[l2..l2 + 8].copy_from_slice(&(1_u64 << 63 | 0x1200).to_be_bytes());
    std::fs::write(&torn, bytes).unwrap();
    let images = open(place.files.clone()).await;
    let wanted = order(id(1), Origin::File("torn.qcow2".into()), Format::Qcow2);
    is_refused(&images, wanted, "qemu-img convert", "a torn image").await;
    assert_eq!(place.names(), [format!("{}.json", id(1))]);
}
