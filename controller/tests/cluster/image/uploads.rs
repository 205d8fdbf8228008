//! Uploads that break, are repeated, or meet another.

use dalgu_proto::v1::{self, ImageState};
use tonic::Code;

use super::*;
use crate::{images::CAPACITY, site::request_id};

const DATA: &[u8] = b"many bytes that come in pieces of four";

#[tokio::test]
async fn an_upload_that_breaks_is_taken_up_where_it_broke() {
    let mut site = Site::new(1).await;
    let clients = site.start().await;
    clients
        .images
        .clone()
        .create_image(image("12", DATA))
        .await
        .unwrap();
    site.fabric
        .lock()
        .hosts
        .get_mut("h1")
        .unwrap()
        .images
        .breaks_after = Some(16);
    let broken = upload(&clients, "12", DATA).await.unwrap_err();
    assert_eq!(broken.code(), Code::Unavailable, "{broken}");
    let half = get(&clients, "12").await.unwrap();
    assert_eq!(half.status.unwrap().state(), ImageState::AwaitingUpload);

    // Neither the controller nor the caller need be the same.
    site.kill();
    let clients = site.start().await;
    assert_eq!(upload(&clients, "12", DATA).await.unwrap(), DATA.len() as u64);
    let there = until(&clients, "12", ImageState::Available).await;
    assert_eq!(there.status.unwrap().digest, sha256(DATA));
    assert_eq!(site.fabric.lock().hosts["h1"].images.uploads, 2);
    let again = upload(&clients, "12", DATA).await;
    assert_eq!(reason(again), "IMAGE_NOT_AWAITING_UPLOAD");
}

#[tokio::test]
async fn an_upload_that_nobody_goes_on_with_gives_its_room_back_after_a_week() {
    let mut site = Site::new(1).await;
    let clients = site.start().await;
    let whole = v1::CreateImageRequest {
        image: Some(v1::Image {
            size_bytes: CAPACITY / 2,
            ..image("12", DATA).image.unwrap()
        }),
        ..Default::default()
    };
    clients.images.clone().create_image(whole.clone()).await.unwrap();
    let days = |days: u64| std::time::Duration::from_hours(24 * days);
    site.pass(days(5));
    // It has room for what it is promised, and no more.
    site.fabric
        .lock()
        .hosts
        .get_mut("h1")
        .unwrap()
        .images
        .breaks_after = Some(16);
    upload(&clients, "12", DATA).await.unwrap_err();
    site.pass(days(5));
    assert_eq!(
        reason(clients.images.clone().create_image(image("13", DATA)).await),
        "NO_CAPACITY"
    );
    site.kill();
    let clients = site.start().await;
    until(&clients, "12", ImageState::AwaitingUpload).await;
    site.kill();
    site.pass(days(3));
    let clients = site.start().await;
    let failed = until(&clients, "12", ImageState::Failed).await;
    assert_eq!(failed.status.unwrap().error.unwrap().reason, "UPLOAD_ABANDONED");
    eventually("what had come of it is gone", || async {
        leftovers(&site).is_empty()
    })
    .await;
    available(&clients, "13", DATA).await;
    assert_eq!(
        reason(upload(&clients, "12", DATA).await),
        "IMAGE_NOT_AWAITING_UPLOAD"
    );
}

#[tokio::test]
async fn a_second_call_that_brings_the_same_image_is_told_so() {
    let mut site = Site::new(1).await;
    let clients = site.start().await;
    clients
        .images
        .clone()
        .create_image(image("12", DATA))
        .await
        .unwrap();
    let (sender, requests) = mpsc::channel(1);
    let first = v1::UploadImageRequest {
        name: "debian".into(),
        version: "12".into(),
        ..Default::default()
    };
    sender.send(first).await.unwrap();
    let mut open = clients
        .images
        .clone()
        .upload_image(ReceiverStream::new(requests))
        .await
        .unwrap()
        .into_inner();
    open.message().await.unwrap();
    assert_eq!(reason(upload(&clients, "12", DATA).await), "UPLOAD_IN_PROGRESS");
    drop((open, sender));
    // The host notices that the first has gone.
    let taken = || async { upload(&clients, "12", DATA).await.is_ok() };
    eventually("it is taken up", taken).await;
}

#[tokio::test]
async fn bytes_that_do_not_fit_are_refused_and_change_nothing() {
    let mut site = Site::new(1).await;
    let clients = site.start().await;
    clients
        .images
        .clone()
        .create_image(image("12", DATA))
        .await
        .unwrap();
    let piece = |offset, data: &[u8]| v1::UploadImageRequest {
        offset,
        data: data.to_vec().into(),
        ..Default::default()
    };
    let renamed = v1::UploadImageRequest {
        name: "debian".into(),
        ..Default::default()
    };
    let large = vec![0; (1 << 20) + 1];
    let long = vec![0; DATA.len() + 1];
    for (bad, why) in [
        (piece(4, b"gap"), "offset"),
        (piece(0, &long), "offset"),
        (piece(0, &large), "data"),
        (renamed, "name"),
    ] {
        let first = v1::UploadImageRequest {
            name: "debian".into(),
            version: "12".into(),
            ..Default::default()
        };
        let requests = tokio_stream::iter([first, bad]);
        let open = clients.images.clone().upload_image(requests).await;
        let mut answers = open.unwrap().into_inner();
        let status = loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it was taken: {why}"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(why), "{status}");
        // The host lets go of the call that was refused before the next one.
        let idle = || async {
            let world = site.fabric.lock();
            !world.hosts["h1"].images.is_uploading()
        };
        eventually("the call has ended", idle).await;
        let image = get(&clients, "12").await.unwrap();
        assert_eq!(image.status.unwrap().state(), ImageState::AwaitingUpload);
    }
    assert_eq!(upload(&clients, "12", DATA).await.unwrap(), DATA.len() as u64);
}

#[tokio::test]
async fn a_repeated_request_makes_one_image() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let request = v1::CreateImageRequest {
        request_id: request_id(),
        ..image("12", DATA)
    };
    let first = clients
        .images
        .create_image(request.clone())
        .await
        .unwrap()
        .into_inner();
    site.kill();
    let mut clients = site.start().await;
    let again = clients
        .images
        .create_image(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.uid, again.uid);
    let other = v1::CreateImageRequest {
        request_id: request.request_id,
        ..image("13", DATA)
    };
    assert_eq!(
        reason(clients.images.create_image(other).await),
        "REQUEST_ID_REUSED"
    );
    let taken = clients.images.create_image(image("12", DATA)).await;
    assert_eq!(reason(taken), "IMAGE_ALREADY_EXISTS");
    let list = clients.images.list_images(v1::ListImagesRequest::default()).await;
    assert_eq!(list.unwrap().get_ref().images.len(), 1);
}

#[tokio::test]
async fn an_upload_on_a_connection_of_age_is_ended_to_be_taken_up_on_another() {
    let mut site = Site::new(1).await;
    // Long enough for the rest to come on one connection, also on a busy machine.
    site.limits.connection_age = std::time::Duration::from_secs(2);
    let clients = site.start().await;
    clients
        .images
        .clone()
        .create_image(image("12", DATA))
        .await
        .unwrap();
    let (sender, requests) = mpsc::channel(1);
    let first = v1::UploadImageRequest {
        name: "debian".into(),
        version: "12".into(),
        ..Default::default()
    };
    sender.send(first).await.unwrap();
    let open = clients
        .images
        .clone()
        .upload_image(ReceiverStream::new(requests))
        .await;
    let mut answers = open.unwrap().into_inner();
    let ended = loop {
        match answers.message().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert_eq!(reason(ended), "STREAM_ENDED");
    drop(sender);
    let taken = || async { upload(&clients, "12", DATA).await.is_ok() };
    eventually("another call brings the rest", taken).await;
    until(&clients, "12", ImageState::Available).await;
}
