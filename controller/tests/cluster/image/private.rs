//! An image that is private is there for its owner and the administrator only; one that is there already is not brought again.

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

fn change(image: v1::Image, path: &str) -> v1::UpdateImageRequest {
    v1::UpdateImageRequest {
        image: Some(v1::Image {
            name: "debian".into(),
            version: "12".into(),
            ..image
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec![path.into()],
        }),
        ..Default::default()
    }
}

fn given_to(owner: &str) -> v1::UpdateImageRequest {
    let image = v1::Image {
        owner: owner.into(),
        ..Default::default()
    };
    change(image, "owner")
}

#[tokio::test]
async fn the_administrator_gives_the_private_image_of_one_who_left_to_another_or_removes_it() {
    let mut site = Site::new(1).await;
    let mut admin = site.start().await;
    let mut left = second_operator(&site).await;
    let mut request = image("12", DATA);
    request.image.as_mut().unwrap().visibility = ImageVisibility::Private.into();
    left.images.create_image(request).await.unwrap();
    upload(&left, "12", DATA).await.unwrap();
    until(&left, "12", ImageState::Available).await;

    // He sees it, and is told of it; a name without a version does not mean it to him where he makes a VM.
    assert_eq!(get(&admin, "12").await.unwrap().owner, "operator/second");
    let list = admin.images.list_images(v1::ListImagesRequest::default()).await;
    assert_eq!(list.unwrap().get_ref().images.len(), 1);
    let events = v1::ListEventsRequest {
        subject: "debian:12".into(),
        ..Default::default()
    };
    let events = admin.events.list_events(events).await.unwrap().into_inner();
    assert!(!events.events.is_empty());
    for image in ["debian", "debian:12"] {
        let vm = admin.vms.create_vm(with_image("web", root(image))).await;
        assert_eq!(reason(vm), "IMAGE_NOT_FOUND");
    }
    let same = admin
        .images
        .create_image(image("13", DATA))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(same.status.unwrap().state(), ImageState::AwaitingUpload);
    admin.images.delete_image(remove("13")).await.unwrap();

    for bad in [
        "",
        "kim",
        "operator/",
        "operator/a/b",
        "agent/h1",
        "controller/main",
        "operator/a b",
    ] {
        let refused = admin.images.update_image(given_to(bad)).await;
        assert_eq!(reason(refused), "INVALID_FIELD", "{bad:?}");
    }
    let given = admin
        .images
        .update_image(given_to("operator/admin"))
        .await
        .unwrap();
    assert_eq!(given.get_ref().owner, "operator/admin");
    assert_eq!(reason(get(&left, "12").await), "IMAGE_NOT_FOUND");
    let made = admin
        .vms
        .create_vm(with_image("web", root("debian")))
        .await
        .unwrap();
    admin.succeeded(made.into_inner()).await;

    admin
        .images
        .update_image(given_to("operator/second"))
        .await
        .unwrap();
    let deleted = admin.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    admin.succeeded(deleted).await;
    admin.images.delete_image(remove("12")).await.unwrap();
    let gone = || async { get(&admin, "12").await.is_err() && get(&admin, "13").await.is_err() };
    eventually("both are gone", gone).await;
    assert!(leftovers(&site).is_empty());
}

/// Whether an event about the image that somebody is told of bears it, with the event's reason; the newest first.
async fn told(clients: &Clients) -> Vec<(String, bool)> {
    let request = v1::ListEventsRequest {
        subject: "debian:12".into(),
        ..Default::default()
    };
    let list = clients.events.clone().list_events(request).await.unwrap();
    let events = list.into_inner().events.into_iter();
    events
        .map(|event| (event.reason, event.object.is_some()))
        .collect()
}

#[tokio::test]
async fn who_does_not_see_an_image_any_more_is_told_that_it_is_gone_and_nothing_of_what_it_becomes() {
    let mut site = Site::new(1).await;
    let mut admin = site.start().await;
    let mut owner = second_operator(&site).await;
    owner.images.create_image(image("12", DATA)).await.unwrap();
    upload(&owner, "12", DATA).await.unwrap();
    until(&owner, "12", ImageState::Available).await;
    let watch = async |clients: &Clients| {
        let request = v1::WatchEventsRequest {
            subject: "debian:12".into(),
            ..Default::default()
        };
        let events = clients.events.clone().watch_events(request).await;
        events.unwrap().into_inner()
    };
    let (mut seen, mut seen_by_admin) = (watch(&owner).await, watch(&admin).await);
    let private = v1::Image {
        visibility: ImageVisibility::Private.into(),
        ..Default::default()
    };
    // Given away while it is public, he sees it still.
    for (update, reason, there) in [
        (given_to("operator/admin"), "ImageUpdated", true),
        (change(private, "visibility"), "ImageWithdrawn", false),
        (given_to("operator/second"), "ImageUpdated", true),
    ] {
        admin.images.update_image(update).await.unwrap();
        let event = seen.message().await.unwrap().unwrap();
        assert_eq!((event.reason.as_str(), event.object.is_some()), (reason, there));
    }
    // What was his own, and is not.
    owner.images.update_image(given_to("operator/kim")).await.unwrap();
    let event = seen.message().await.unwrap().unwrap();
    assert_eq!((event.reason.as_str(), event.object), ("ImageWithdrawn", None));
    assert_eq!(event.message, "given to another by operator/second");
    assert_eq!(reason(get(&owner, "12").await), "IMAGE_NOT_FOUND");
    let newest = told(&owner).await.remove(0);
    assert_eq!(newest, ("ImageWithdrawn".to_owned(), false), "more is told");
    // The administrator sees it throughout.
    let mut reasons = Vec::new();
    while reasons.len() < 6 {
        let event = seen_by_admin.message().await.unwrap().unwrap();
        assert!(event.object.is_some(), "{}", event.reason);
        reasons.push(event.reason);
    }
    let [update, withdrawal] = ["ImageUpdated", "ImageWithdrawn"];
    assert_eq!(reasons, [update, withdrawal, update, update, withdrawal, update]);
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
