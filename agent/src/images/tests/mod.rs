//! The store in a real directory with the real `qemu-img`, in memory with every point at which it can die, and between hosts.

mod dying;
mod fetching;
mod hostile;
mod importing;
mod lying;
mod removing;
mod uploading;

use std::{sync::Arc, time::Duration};

use dalgu_proto::agent::v1::{ImagePhase, ImageReport};
use tokio::time::timeout;
use tonic::Status;

use super::{files::Hasher, *};

pub(super) fn id(number: u128) -> ImageId {
    ImageId::from_uuid(uuid::Uuid::from_u128(number))
}

pub(super) fn vm(number: u128) -> VmId {
    VmId::from_uuid(uuid::Uuid::from_u128(number))
}

pub(super) fn digest_of(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

/// Bytes that no format takes for its own, and that do not repeat.
pub(super) fn content(bytes: usize, seed: u32) -> Vec<u8> {
    let words = u32::try_from(bytes.div_ceil(4)).unwrap();
    let mut content: Vec<u8> = (0..words)
        .flat_map(|n| (n ^ seed).wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    content.truncate(bytes);
    content
}

/// Nobody is there.
pub(super) fn alone(_: &Source) -> Result<dalgu_proto::tls::client::Caller, Status> {
    Err(Status::unavailable("nobody is there"))
}

pub(super) async fn open(files: Arc<dyn Files>) -> Images {
    open_with(files, Arc::new(alone)).await
}

pub(super) async fn open_with(files: Arc<dyn Files>, peers: Arc<dyn Peers>) -> Images {
    let own = "h1".parse().unwrap();
    Images::open(own, files, peers, Clock::system(), CancellationToken::new())
        .await
        .unwrap()
}

pub(super) fn order(id: ImageId, origin: Origin, format: crate::image::Format) -> Order {
    Order {
        id,
        origin,
        format,
        size_bytes: None,
        sha256: None,
    }
}

/// Brings all that is missing of an upload, in pieces.
pub(super) async fn upload_all(images: &Images, id: ImageId, content: &[u8]) {
    let mut upload = images.upload(id, content.len() as u64).await.unwrap();
    let mut at = usize::try_from(upload.received()).unwrap();
    for piece in content[at..].to_vec().chunks(1 << 20) {
        upload.take(at as u64, piece.to_vec().into()).await.unwrap();
        at += piece.len();
    }
    assert!(upload.is_whole());
}

/// Waits until something is so of what is here.
pub(super) async fn until(
    images: &Images,
    what: &str,
    is: impl Fn(&[ImageReport]) -> bool,
) -> Vec<ImageReport> {
    let mut changes = images.changes();
    let found = async {
        loop {
            let reports = images.inventory().images;
            if is(&reports) {
                return reports;
            }
            changes.changed().await.unwrap();
        }
    };
    match timeout(Duration::from_secs(60), found).await {
        Ok(reports) => reports,
        Err(_) => panic!("never {what}: {:#?}", images.inventory()),
    }
}

/// The end of an import.
pub(super) async fn ended(images: &Images, id: ImageId) -> ImageReport {
    let over = |report: &ImageReport| {
        report.image_uid == id.to_string()
            && (matches!(report.phase(), ImagePhase::Ready | ImagePhase::Failed) || report.error.is_some())
    };
    let reports = until(images, "ended", |reports| reports.iter().any(over)).await;
    reports.into_iter().find(over).unwrap()
}

/// What is whole in a store, each with its content.
pub(super) async fn whole(files: &dyn Files) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in files.list().await.unwrap() {
        if let Some(stem) = entry.name.strip_suffix(".qcow2") {
            let bytes = files.read(&entry.name, 0, 64 << 20).await.unwrap();
            found.push((stem.to_owned(), bytes.to_vec()));
        }
    }
    found
}
