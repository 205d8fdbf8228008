//! An image that is private is there for its owner only; one that is there already is not brought again.

use dalgu_proto::v1::{self, ImageState, ImageVisibility};

use super::*;

const DATA: &[u8] = b"nobody else's business";

#[tokio::test]
async fn a_private_image_does_not_exist_for_anybody_but_its_owner() {
    let mut site = Site::new(1).await;
    let clients = site.start().await;
    let mut request = image("12", DATA);
    request.image.as_mut().unwrap().visibility = ImageVisibility::Private.into();
    clients.images.clone().create_image(request).await.unwrap();
    upload(&clients, "12", DATA).await.unwrap();
    until(&clients, "12", ImageState::Available).await;

    let mut other = second_operator(&site).await;
    assert_eq!(reason(get(&other, "12").await), "IMAGE_NOT_FOUND");
    assert_eq!(reason(get(&other, "").await), "IMAGE_NOT_FOUND");
    assert_eq!(reason(upload(&other, "12", DATA).await), "IMAGE_NOT_FOUND");
    let list = other.images.list_images(v1::ListImagesRequest::default()).await;
    assert!(list.unwrap().get_ref().images.is_empty());
    let refused = other.images.delete_image(remove("12")).await;
    assert_eq!(reason(refused), "IMAGE_NOT_FOUND");
    let update = v1::UpdateImageRequest {
        image: Some(v1::Image {
            name: "debian".into(),
            version: "12".into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["visibility".into()],
        }),
        ..Default::default()
    };
    assert_eq!(
        reason(other.images.update_image(update.clone()).await),
        "IMAGE_NOT_FOUND"
    );
    let vm = other.vms.create_vm(with_image("web", root("debian:12"))).await;
    assert_eq!(reason(vm), "IMAGE_NOT_FOUND");
    let about = async |clients: &Clients| {
        let request = v1::ListEventsRequest {
            subject: "debian:12".into(),
            ..Default::default()
        };
        let list = clients.events.clone().list_events(request).await.unwrap();
        list.into_inner().events.len()
    };
    assert_eq!(about(&other).await, 0, "nothing is told of it either");
    assert!(about(&clients).await > 0);
    // Who knows a checksum does not get the bytes.
    let mut same = image("13", DATA);
    same.image.as_mut().unwrap().name = "mine".into();
    let entered = other.images.create_image(same).await.unwrap().into_inner();
    assert_eq!(entered.status.unwrap().state(), ImageState::AwaitingUpload);

    // It becomes everybody's when its owner says so.
    clients.images.clone().update_image(update).await.unwrap();
    let made = other
        .vms
        .create_vm(with_image("web", root("debian:12")))
        .await
        .unwrap();
    other.succeeded(made.into_inner()).await;
}

#[tokio::test]
async fn the_same_bytes_are_not_brought_again_and_go_with_the_last_image() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    available(&clients, "12", DATA).await;
    let again = clients
        .images
        .create_image(image("12.1", DATA))
        .await
        .unwrap()
        .into_inner();
    let status = again.status.unwrap();
    assert_eq!(
        (status.state(), status.import_host.as_str()),
        (ImageState::Available, "")
    );
    assert_eq!(status.digest, sha256(DATA));
    clients.images.delete_image(remove("12")).await.unwrap();
    eventually("the first is gone", || async {
        get(&clients, "12").await.is_err()
    })
    .await;
    let made = clients
        .vms
        .create_vm(with_image("web", root("debian")))
        .await
        .unwrap();
    clients.succeeded(made.into_inner()).await;
    let deleted = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    clients.images.delete_image(remove("12.1")).await.unwrap();
    eventually("the second is gone", || async {
        get(&clients, "12.1").await.is_err()
    })
    .await;
    assert!(leftovers(&site).is_empty());
}
