//! Taking bytes: by their offset, once, and after a restart from where they are safely kept.

use super::*;

fn store() -> (tempfile::TempDir, Arc<Directory>) {
    let dir = tempfile::tempdir().unwrap();
    let files = Directory::open(&dir.path().join("store"), dir.path(), Vec::new(), true).unwrap();
    (dir, Arc::new(files))
}

#[tokio::test]
async fn bytes_are_taken_in_order_and_what_comes_late_twice_or_too_much_is_refused() {
    let images = open(Arc::new(Memory::new(1 << 40))).await;
    let mut upload = images.upload(id(1), 10).await.unwrap();
    assert_eq!(upload.received(), 0);
    assert!(!upload.take(0, "abcd".into()).await.unwrap());
    let late = upload.take(0, "abcd".into()).await;
    assert!(
        matches!(late, Err(Error::Offset { given: 0, next: 4 })),
        "{late:?}"
    );
    let early = upload.take(5, "x".into()).await;
    assert!(
        matches!(early, Err(Error::Offset { given: 5, next: 4 })),
        "{early:?}"
    );
    let much = upload.take(4, "1234567".into()).await;
    assert!(matches!(much, Err(Error::TooMuch { size: 10 })), "{much:?}");
    let other = images.upload(id(1), 10).await.err();
    assert!(matches!(other, Some(Error::Uploading)), "{other:?}");
    assert!(upload.take(4, "efghij".into()).await.unwrap() && upload.is_whole());
    drop(upload);
    let size = images.upload(id(1), 11).await.err();
    assert!(
        matches!(size, Some(Error::OtherSize { before: 10, now: 11 })),
        "{size:?}"
    );
    let again = images.upload(id(1), 10).await.unwrap();
    assert!(again.is_whole(), "all of it is here");
}

#[tokio::test]
async fn an_upload_goes_on_after_a_restart_at_what_is_safely_kept() {
    let (_dir, files) = store();
    let content = content((8 << 20) + 5, 1);
    let images = open(files.clone()).await;
    let mut upload = images.upload(id(1), content.len() as u64).await.unwrap();
    let mut told = 0;
    for (number, piece) in content.chunks(1 << 20).take(6).enumerate() {
        let more = upload.take((number as u64) << 20, piece.to_vec().into()).await;
        told += u32::from(more.unwrap());
    }
    assert_eq!(
        (told, upload.received()),
        (1, 4 << 20),
        "not every piece is synced"
    );
    // Dies here: nothing of it ends in order.
    std::mem::forget(upload);
    let again = open(files.clone()).await;
    let upload = again.upload(id(1), content.len() as u64).await.unwrap();
    assert_eq!(upload.received(), 4 << 20);
    drop(upload);
    upload_all(&again, id(1), &content).await;
    let kept = files
        .read(&format!("{}.upload", id(1)), 0, 64 << 20)
        .await
        .unwrap();
    assert!(kept == content);
}

#[tokio::test]
async fn what_does_not_fit_with_all_that_is_under_way_is_refused_before_a_byte_of_it() {
    let room = RESERVE_BYTES + 10_000;
    let images = open(Arc::new(Memory::new(room))).await;
    let first = images.upload(id(1), 6000).await.unwrap();
    let second = images.upload(id(2), 6000).await.err();
    assert!(
        matches!(second, Some(Error::NoRoom { needed: 12_000, .. })),
        "{second:?}"
    );
    assert_eq!(
        images.inventory().images.len(),
        1,
        "nothing is left of what was refused"
    );
    drop(first);
    images.upload(id(2), 6000).await.unwrap();
}
