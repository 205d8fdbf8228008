//! What nobody should be able to enter: each input is refused by the name of its field, and no host hears of it.

use dalgu_proto::v1::{self, Image, ImageFile};
use tonic::Code;

use super::*;

type Change = fn(&mut Image);

/// Inputs to CreateImage, with the field that is at fault.
const BAD: &[(&str, Change)] = &[
    ("image.name", |image| image.name = String::new()),
    ("image.name", |image| image.name = "../../etc/passwd".into()),
    ("image.name", |image| image.name = "/etc/shadow".into()),
    ("image.name", |image| image.name = "-rf".into()),
    ("image.name", |image| image.name = "Debian".into()),
    ("image.name", |image| image.name = "debian\n".into()),
    ("image.name", |image| image.name = "debian:12".into()),
    ("image.name", |image| image.name = "a\0b".into()),
    ("image.name", |image| image.name = "dëbian".into()),
    ("image.name", |image| {
        image.name = "json:{\"driver\":\"nbd\"}".into()
    }),
    ("image.name", |image| image.name = "a".repeat(1 << 16)),
    ("image.version", |image| image.version = "..".into()),
    ("image.version", |image| image.version = "../1".into()),
    ("image.version", |image| image.version = "-1".into()),
    ("image.version", |image| image.version = "1 2".into()),
    ("image.version", |image| image.version = "1:2".into()),
    ("image.version", |image| image.version = "12\u{202e}".into()),
    ("image.version", |image| image.version = "1".repeat(64)),
    ("image.size_bytes", |image| image.size_bytes = 0),
    ("image.size_bytes", |image| image.size_bytes = u64::MAX),
    ("image.size_bytes", |image| image.size_bytes = (16 << 40) + 1),
    ("image.sha256", |image| image.sha256 = "0".repeat(63)),
    ("image.sha256", |image| image.sha256 = "../".repeat(21) + "x"),
    ("image.format", |image| image.format = 0),
    ("image.format", |image| image.format = 99),
    ("image.visibility", |image| image.visibility = -1),
    ("image.replicas", |image| image.replicas = -2),
    ("image.replicas", |image| image.replicas = i32::MAX),
    ("image.os", |image| image.os = "x".repeat(64)),
    ("image.os", |image| image.os = "\u{1b}[2J".into()),
    ("image.firmware", |image| image.firmware = 77),
    ("image.description", |image| image.description = "x".repeat(1025)),
    ("image.labels", |image| {
        drop(image.labels.insert(String::new(), "x".into()))
    }),
    ("image.uid", |image| image.uid = "x".into()),
    ("image.status", |image| {
        image.status = Some(v1::ImageStatus::default())
    }),
    ("image.owner", |image| image.owner = "operator/admin".into()),
];

/// Files on a host that are none.
const BAD_FILES: [&str; 7] = ["", "..", ".hidden", "-o", "a/b", "/dev/sda", "a b"];

#[tokio::test]
async fn what_is_not_allowed_is_refused_by_its_field_and_reaches_no_host() {
    let inputs = BAD.len() + BAD_FILES.len();
    assert!(inputs >= 40, "{inputs} inputs");
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    for (field, change) in BAD {
        let mut request = image("12", b"bytes");
        change(request.image.as_mut().unwrap());
        let status = clients.images.create_image(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
        assert!(status.message().starts_with(field), "{field}: {status}");
        assert!(
            status.message().len() < 400,
            "{field}: it repeats what it was given"
        );
    }
    for file in BAD_FILES {
        let request = v1::CreateImageRequest {
            source: Some(ImageFile {
                host: "h1".into(),
                file: file.into(),
            }),
            ..image("12", b"bytes")
        };
        let status = clients.images.create_image(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{file:?}: {status}");
        assert!(status.message().starts_with("source.file"), "{status}");
    }
    for name in ["", "../x", "x:y"] {
        let request = v1::UploadImageRequest {
            name: name.into(),
            ..Default::default()
        };
        let open = clients.images.upload_image(tokio_stream::iter([request])).await;
        assert_eq!(open.unwrap_err().code(), Code::InvalidArgument, "{name:?}");
    }
    let list = clients.images.list_images(v1::ListImagesRequest::default()).await;
    assert!(list.unwrap().get_ref().images.is_empty());
    let commands = site.fabric.lock().hosts["h1"].commands.clone();
    assert!(commands.is_empty(), "{commands:?}");
}
