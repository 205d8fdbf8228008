//! What was uploaded, and files of the images directory, become copies or are refused, with the real `qemu-img`.

use std::{path::Path, process::Command};

use super::*;
use crate::image::Format;

pub(super) struct Place {
    pub(super) dir: tempfile::TempDir,
    pub(super) files: Arc<Directory>,
}

pub(super) fn place(converts: bool) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let files = Directory::open(&dir.path().join("store"), &images, Vec::new(), converts).unwrap();
    Place {
        dir,
        files: Arc::new(files),
    }
}

impl Place {
    pub(super) fn image(&self, name: &str) -> String {
        self.dir.path().join("images").join(name).display().to_string()
    }

    /// What lies in the store.
    pub(super) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path().join("store")).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

pub(super) fn qemu_img(words: &[&str]) {
    assert!(Command::new("qemu-img").args(words).status().unwrap().success());
}

fn raw_of(copy: &Path, to: &Path) -> Vec<u8> {
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        copy.to_str().unwrap(),
        to.to_str().unwrap(),
    ]);
    std::fs::read(to).unwrap()
}

#[tokio::test]
async fn what_was_uploaded_becomes_a_copy_whose_name_is_its_digest_and_stays_known_after_a_restart() {
    let place = place(true);
    let content = content(3 << 20, 7);
    let images = open(place.files.clone()).await;
    upload_all(&images, id(1), &content).await;
    let wanted = Order {
        size_bytes: Some(3 << 20),
        sha256: Some(digest_of(&content)),
        ..order(id(1), Origin::Upload, Format::Raw)
    };
    images.import(wanted.clone()).unwrap();
    let report = ended(&images, id(1)).await;
    assert_eq!(report.phase(), ImagePhase::Ready, "{report:?}");
    assert_eq!(report.source_sha256, digest_of(&content).to_string());
    assert_eq!(
        (report.source_bytes, report.virtual_size_bytes),
        (3 << 20, 3 << 20)
    );
    let digest: Digest = report.digest.parse().unwrap();
    let copy = place.dir.path().join("store").join(copy_name(&digest));
    let bytes = std::fs::read(&copy).unwrap();
    assert_eq!(digest_of(&bytes), digest);
    assert_eq!(
        report.bytes_total,
        bytes.len() as u64,
        "it is told how large the copy is"
    );
    assert!(raw_of(&copy, &place.dir.path().join("raw")) == content);
    let expected = [format!("{}.json", id(1)), copy_name(&digest)];
    let mut expected = expected.to_vec();
    expected.sort();
    assert_eq!(place.names(), expected, "the upload is gone");
    let again = open(place.files.clone()).await;
    again.import(wanted).unwrap();
    assert_eq!(again.import_report(id(1)), report);
    assert_eq!(again.inventory().images.len(), 2);
    // The same content once more is the same copy.
    upload_all(&again, id(2), &content).await;
    again.import(order(id(2), Origin::Upload, Format::Raw)).unwrap();
    assert_eq!(ended(&again, id(2)).await.digest, report.digest);
    assert_eq!(whole(&*place.files).await.len(), 1);
}

#[tokio::test]
async fn files_of_every_format_are_imported_in_place() {
    let place = place(true);
    let content = content(2 << 20, 3);
    let plain = place.image("plain.raw");
    std::fs::write(&plain, &content).unwrap();
    let images = open(place.files.clone()).await;
    for (number, format) in Format::ALL.into_iter().enumerate() {
        let file = format!("image.{format}");
        if format == Format::Raw {
            std::fs::copy(&plain, place.image(&file)).unwrap();
        } else {
            qemu_img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                format.as_str(),
                &plain,
                &place.image(&file),
            ]);
        }
        let id = id(number as u128 + 1);
        images
            .import(order(id, Origin::File(file.clone()), format))
            .unwrap();
        let report = ended(&images, id).await;
        assert_eq!(report.phase(), ImagePhase::Ready, "{report:?}");
        let copy = place
            .dir
            .path()
            .join("store")
            .join(format!("{}.qcow2", report.digest));
        let bytes = raw_of(&copy, &place.dir.path().join("raw"));
        assert!(bytes.starts_with(&content), "{format}");
        assert!(Path::new(&place.image(&file)).exists(), "the file stays");
    }
}

#[tokio::test]
async fn what_is_not_what_was_said_or_is_hostile_is_refused_for_good_and_nothing_is_left_of_it() {
    let place = place(true);
    let content = content(1 << 20, 5);
    let raw = place.image("plain.raw");
    std::fs::write(&raw, &content).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &place.image("base.qcow2"), "1M"]);
    let base = place.image("base.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        &base,
        &place.image("overlay.qcow2"),
    ]);
    std::os::unix::fs::symlink("/etc/passwd", place.image("link.raw")).unwrap();
    let file = |name: &str, format| order(id(0), Origin::File(name.to_owned()), format);
    let said = digest_of(b"something else");
    let cases = [
        (
            Order {
                sha256: Some(said),
                ..file("plain.raw", Format::Raw)
            },
            "CHECKSUM_MISMATCH",
        ),
        (
            Order {
                size_bytes: Some(5),
                ..file("plain.raw", Format::Raw)
            },
            "SIZE_MISMATCH",
        ),
        (file("overlay.qcow2", Format::Qcow2), "IMAGE_REFUSED"),
        (file("base.qcow2", Format::Raw), "IMAGE_REFUSED"),
        (file("plain.raw", Format::Vmdk), "IMAGE_REFUSED"),
        (file("link.raw", Format::Raw), "IMAGE_REFUSED"),
    ];
    let mut images = open(place.files.clone()).await;
    for (number, (case, reason)) in cases.into_iter().enumerate() {
        let id = id(number as u128 + 1);
        let case = Order { id, ..case };
        images.import(case.clone()).unwrap();
        let report = ended(&images, id).await;
        let error = report.error.clone().unwrap();
        assert_eq!(
            (error.reason.as_str(), error.retrying),
            (reason, false),
            "{error:?}"
        );
        // It stays so, also after a restart.
        images = open(place.files.clone()).await;
        images.import(case).unwrap();
        assert_eq!(images.import_report(id), report);
    }
    assert!(
        place.names().iter().all(|name| name.ends_with(".json")),
        "{:?}",
        place.names()
    );
}

#[tokio::test]
async fn what_is_only_bad_luck_is_tried_again_when_it_is_asked_for_again() {
    let place = place(true);
    let images = open(place.files.clone()).await;
    let wanted = order(id(1), Origin::File("later.raw".to_owned()), Format::Raw);
    images.import(wanted.clone()).unwrap();
    let report = ended(&images, id(1)).await;
    assert_eq!(report.phase(), ImagePhase::Unspecified, "it has not been refused");
    let error = report.error.unwrap();
    assert_eq!((error.reason.as_str(), error.retrying), ("FILE_NOT_FOUND", true));
    std::fs::write(place.image("later.raw"), content(1 << 20, 1)).unwrap();
    images.import(wanted).unwrap();
    let begun = images.import_report(id(1));
    assert_eq!(begun.phase(), ImagePhase::Importing, "{begun:?}");
    assert_eq!(ended(&images, id(1)).await.phase(), ImagePhase::Ready);
    let nothing = images.import(order(id(2), Origin::Upload, Format::Raw));
    assert!(matches!(nothing, Err(Error::Incomplete)), "{nothing:?}");
}

#[tokio::test]
async fn a_host_without_qemu_img_takes_qcow2_and_raw_as_they_are() {
    let place = place(false);
    let content = content(1 << 20, 9);
    std::fs::write(place.image("plain.raw"), &content).unwrap();
    let images = open(place.files.clone()).await;
    images
        .import(order(id(1), Origin::File("plain.raw".into()), Format::Raw))
        .unwrap();
    let report = ended(&images, id(1)).await;
    assert_eq!(report.digest, digest_of(&content).to_string());
    let again = open(place.files.clone()).await;
    let known = again.copy_report(&digest_of(&content));
    assert_eq!(known.virtual_size_bytes, 1 << 20, "{known:?}");
    let plain = place.image("plain.raw");
    qemu_img(&["convert", "-f", "raw", "-O", "vdi", &plain, &place.image("a.vdi")]);
    again
        .import(order(id(2), Origin::File("a.vdi".into()), Format::Vdi))
        .unwrap();
    assert!(
        ended(&again, id(2))
            .await
            .error
            .unwrap()
            .message
            .contains("qemu-img")
    );
}
