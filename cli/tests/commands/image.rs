//! `dalgu image`: what brings, shows, changes and deletes images.

use dalgu_proto::{reason, v1};
use tonic::Code;
use v1::ImageState;

use super::common::{Controller, ago};

const REQUEST: &str = "6f2c3c5e-0000-4000-8000-00000000000a";
/// SHA-256 of "abc", by FIPS 180-4.
const SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn image(state: ImageState) -> v1::Image {
    let status = v1::ImageStatus {
        state: state.into(),
        bytes_total: 3,
        ..Default::default()
    };
    v1::Image {
        name: "debian".into(),
        version: "12".into(),
        format: v1::ImageFormat::Qcow2.into(),
        size_bytes: 3,
        sha256: SHA256.into(),
        status: Some(status),
        etag: "r1".into(),
        replicas: 2,
        create_time: ago(10),
        ..Default::default()
    }
}

fn refused() -> v1::Image {
    let mut image = image(ImageState::Failed);
    image.status.as_mut().unwrap().error = Some(v1::VmError {
        reason: "IMAGE_REFUSED".into(),
        message: "it refers to a backing file".into(),
        ..Default::default()
    });
    image
}

/// A file that holds "abc".
fn file(dir: &tempfile::TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    std::fs::write(&path, "abc").unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_import_reads_sends_and_waits_until_the_image_is_available() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.images = [
            Ok(image(ImageState::AwaitingUpload)),
            Ok(image(ImageState::Importing)),
            Ok(image(ImageState::Available)),
        ]
        .into();
        script.uploads = [(0, None)].into();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "debian.qcow2");
    let outcome = controller
        .run(&["image", "import", &path, "--version", "12"])
        .await;
    assert_eq!((outcome.code, outcome.out.as_str()), (0, ""), "{}", outcome.err);
    let told = outcome.err.replace(&path, "FILE");
    let wanted = "reading FILE\nuploading debian:12\nimporting debian:12\ndebian:12 is available\n";
    assert_eq!(told, wanted);
    let script = controller.fake.script();
    assert_eq!(script.uploaded, b"abc");
    let entered = format!("create_image debian:12 IMAGE_FORMAT_QCOW2 3 {SHA256} :");
    assert_eq!(script.seen[..2], [entered, "upload_image debian:12".to_owned()]);
}

#[tokio::test]
async fn an_upload_that_breaks_goes_on_where_it_stands_in_the_same_call_and_in_another() {
    let controller = Controller::start();
    let taken = || reason::status(Code::AlreadyExists, "IMAGE_ALREADY_EXISTS", "it exists");
    {
        let mut script = controller.fake.script();
        // It was entered before.
        script.images = [
            Err(taken()),
            Ok(image(ImageState::AwaitingUpload)),
            Ok(image(ImageState::Available)),
        ]
        .into();
        script.uploads = [(0, Some(0)), (1, None)].into();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "debian.qcow2");
    let args = ["image", "import", &path, "--version", "12", "-o", "name"];
    let outcome = controller.run(&args).await;
    assert_eq!(
        (outcome.code, outcome.out.as_str()),
        (0, "debian:12\n"),
        "{}",
        outcome.err
    );
    assert!(
        outcome.err.contains("it goes on where it stands"),
        "{}",
        outcome.err
    );
    assert_eq!(controller.fake.script().uploaded, b"bc", "the rest");

    let mut other = image(ImageState::AwaitingUpload);
    other.sha256 = "0".repeat(64);
    controller.fake.script().images = [Err(taken()), Ok(other)].into();
    let outcome = controller.run(&args).await;
    assert_eq!(outcome.code, 4, "another file has that name: {}", outcome.err);
    assert!(
        outcome.err.contains("hint: choose another version"),
        "{}",
        outcome.err
    );
}

#[tokio::test]
async fn a_file_on_a_host_is_imported_without_an_upload_and_a_refusal_is_told() {
    let controller = Controller::start();
    controller.fake.script().images = [Ok(image(ImageState::Importing)), Ok(refused())].into();
    let args = [
        "image",
        "import",
        "--from-host",
        "h1:debian-12.vmdk",
        "--name",
        "debian",
        "--version",
        "12",
    ];
    let outcome = controller.run(&args).await;
    assert_eq!(outcome.code, 8, "{}", outcome.err);
    insta::assert_snapshot!(outcome.err, @r"
    importing debian:12
    error: image debian:12 was refused: it refers to a backing file (IMAGE_REFUSED)
    hint: delete it with `dalgu image delete debian:12`, then import a file that is sound
    ");
    let seen = controller.fake.script().seen[0].clone();
    assert_eq!(
        seen,
        "create_image debian:12 IMAGE_FORMAT_VMDK 0  h1:debian-12.vmdk"
    );
}

#[tokio::test]
async fn an_import_from_a_host_that_was_interrupted_is_taken_up_by_the_same_command() {
    let args = [
        "image",
        "import",
        "--from-host",
        "h1:debian.raw",
        "--version",
        "12",
    ];
    let file = |host: &str, file: &str| v1::ImageFile {
        host: host.into(),
        file: file.into(),
    };
    let raw = |state, source| v1::Image {
        format: v1::ImageFormat::Raw.into(),
        source,
        ..image(state)
    };
    for (there, code) in [
        (raw(ImageState::Importing, Some(file("h1", "debian.raw"))), 0),
        (raw(ImageState::Available, Some(file("h1", "debian.raw"))), 0),
        (raw(ImageState::Deleting, Some(file("h1", "debian.raw"))), 4),
        (raw(ImageState::Importing, Some(file("h2", "debian.raw"))), 4),
        (raw(ImageState::Importing, Some(file("h1", "other.raw"))), 4),
        // It was uploaded, or the controller is older.
        (raw(ImageState::Importing, None), 4),
        (
            v1::Image {
                format: v1::ImageFormat::Qcow2.into(),
                ..raw(ImageState::Importing, Some(file("h1", "debian.raw")))
            },
            4,
        ),
    ] {
        let controller = Controller::start();
        let taken = reason::status(Code::AlreadyExists, "IMAGE_ALREADY_EXISTS", "it exists");
        controller.fake.script().images = [
            Err(taken),
            Ok(there.clone()),
            Ok(raw(ImageState::Available, None)),
        ]
        .into();
        let outcome = controller.run(&args).await;
        assert_eq!(outcome.code, code, "{there:?}: {}", outcome.err);
    }
}

#[tokio::test]
async fn an_import_that_is_not_waited_for_ends_when_all_bytes_are_there() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.images = [
            Ok(image(ImageState::AwaitingUpload)),
            Ok(image(ImageState::Importing)),
        ]
        .into();
        script.uploads = [(0, None)].into();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "debian.qcow2");
    let outcome = controller
        .run(&["image", "import", &path, "--version", "12", "--no-wait"])
        .await;
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(outcome.err.contains("has all its bytes"), "{}", outcome.err);
}

#[tokio::test]
async fn an_image_that_does_not_get_on_is_given_up_after_the_time_that_was_said() {
    let controller = Controller::start();
    controller.fake.script().images = [Ok(image(ImageState::Importing))].into();
    controller
        .fake
        .script()
        .images
        .push_back(Ok(image(ImageState::Importing)));
    let args = [
        "image",
        "import",
        "--from-host",
        "h1:debian.raw",
        "--timeout",
        "10ms",
    ];
    let outcome = controller.run(&args).await;
    assert_eq!(outcome.code, 7, "{}", outcome.err);
    assert!(outcome.err.contains("goes on where it stands"), "{}", outcome.err);
}

#[tokio::test]
async fn what_cannot_be_an_image_is_a_usage_error_before_anything_is_asked() {
    let controller = Controller::start();
    let dir = tempfile::tempdir().unwrap();
    let (odd, fine) = (file(&dir, "12.iso"), file(&dir, "debian.raw"));
    let wrong = "0".repeat(64);
    for (args, why) in [
        (vec!["image", "import"], "FILE"),
        (vec!["image", "import", &odd], "--name"),
        (vec!["image", "import", &odd, "--name", "x"], "--format"),
        (vec!["image", "import", &fine, "--sha256", &wrong], SHA256),
        (vec!["image", "import", &fine, "--sha256", "x"], "--sha256"),
        (vec!["image", "import", "/nonexistent.raw"], "cannot read"),
        (
            vec!["image", "import", &fine, "--from-host", "h1:x.raw"],
            "--from-host",
        ),
        (vec!["image", "delete", "debian"], "VERSION"),
        (vec!["image", "update", "debian:12"], "--replicas"),
        (vec!["image", "get", "../x"], "NAME"),
    ] {
        let outcome = controller.run(&args).await;
        assert_eq!(outcome.code, 2, "{args:?}: {}", outcome.err);
        assert!(outcome.err.contains(why), "{args:?}: {}", outcome.err);
    }
    assert!(controller.fake.script().seen.is_empty());
}

#[tokio::test]
async fn images_are_listed_shown_changed_and_deleted() {
    let controller = Controller::start();
    {
        let mut script = controller.fake.script();
        script.image_lists = [Ok(v1::ListImagesResponse {
            images: vec![image(ImageState::Available)],
            ..Default::default()
        })]
        .into();
        script.images = [
            Ok(image(ImageState::Available)),
            Ok(image(ImageState::Available)),
            Ok(image(ImageState::Available)),
        ]
        .into();
    }
    let list = controller.run(&["image", "list", "debian", "-o", "name"]).await;
    assert_eq!((list.code, list.out.as_str()), (0, "debian:12\n"));
    let shown = controller.run(&["image", "get", "debian:12", "-o", "json"]).await;
    assert!(shown.out.contains("\"IMAGE_STATE_AVAILABLE\""), "{}", shown.out);
    let changed = controller
        .run(&[
            "image",
            "update",
            "debian:12",
            "--replicas",
            "all",
            "--visibility",
            "private",
            "--owner",
            "kim",
        ])
        .await;
    assert_eq!(changed.err, "changed debian:12\n");
    let deleted = controller
        .run(&["image", "delete", "debian:12", "--request-id", REQUEST])
        .await;
    assert_eq!(deleted.code, 0, "{}", deleted.err);
    let wanted = [
        r#"list_images "debian""#.to_owned(),
        "get_image debian:12".to_owned(),
        "get_image debian:12".to_owned(),
        r#"update_image debian:12 r1 ["visibility", "owner", "replicas"] -1 IMAGE_VISIBILITY_PRIVATE operator/kim"#.to_owned(),
        format!("delete_image debian:12 {REQUEST}"),
    ];
    assert_eq!(controller.fake.script().seen, wanted);
}
