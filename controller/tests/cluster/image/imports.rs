//! Imports that go well, are refused, are interrupted, or lose their host.

use dalgu_controller::{
    incarnation::{self, Past},
    store::{Store as _, memory::Disk},
};
use dalgu_proto::{
    agent::v1::ImagePhase,
    v1::{self, ImageState, site_service_client::SiteServiceClient},
};
use jiff::Timestamp;

use super::*;
use crate::site::{LIMIT, request_id};

const DATA: &[u8] = b"what is in the file";

fn from_file(version: &str, host: &str, file: &str) -> v1::CreateImageRequest {
    let mut request = image(version, DATA);
    let image = request.image.as_mut().unwrap();
    (image.size_bytes, image.sha256) = (0, String::new());
    request.source = Some(v1::ImageFile {
        host: host.into(),
        file: file.into(),
    });
    request
}

#[tokio::test]
async fn what_an_image_starts_from_can_be_corrected() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    available(&clients, "12", DATA).await;
    let update = |firmware: v1::Firmware, os: &str| v1::UpdateImageRequest {
        image: Some(v1::Image {
            name: "debian".into(),
            version: "12".into(),
            os: os.into(),
            firmware: firmware.into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["firmware".into(), "os".into()],
        }),
        ..Default::default()
    };
    let bad = clients
        .images
        .update_image(update(v1::Firmware::Uefi, "two\nlines"))
        .await;
    assert_eq!(reason(bad), "INVALID_FIELD");
    let updated = clients
        .images
        .update_image(update(v1::Firmware::Uefi, "debian-12"))
        .await;
    let updated = updated.unwrap().into_inner();
    assert_eq!(
        (updated.firmware(), updated.os.as_str()),
        (v1::Firmware::Uefi, "debian-12")
    );
    // The only host has none for its guests.
    let asked = with_image("web", root("debian:12"));
    let refused = clients.vms.create_vm(asked.clone()).await.unwrap_err();
    assert!(refused.message().contains("UEFI"), "{refused}");
    clients
        .images
        .update_image(update(v1::Firmware::Bios, ""))
        .await
        .unwrap();
    let made = clients.vms.create_vm(asked).await.unwrap();
    clients.succeeded(made.into_inner()).await;
}

fn freeze(site: &Site, frozen: bool) {
    let mut world = site.fabric.lock();
    for host in world.hosts.values_mut() {
        host.images.frozen = frozen;
    }
}

#[tokio::test]
async fn a_file_on_a_host_is_imported_and_what_it_was_is_told() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let files = |site: &Site| {
        let mut world = site.fabric.lock();
        let host = world.hosts.get_mut("h2").unwrap();
        host.images.files.insert("debian.qcow2".into(), DATA.to_vec());
    };
    files(&site);
    let made = clients
        .images
        .create_image(from_file("12", "h2", "debian.qcow2"))
        .await
        .unwrap();
    let status = made.into_inner().status.unwrap();
    assert_eq!(
        (status.state(), status.import_host.as_str()),
        (ImageState::Importing, "h2")
    );
    let there = until(&clients, "12", ImageState::Available).await;
    assert_eq!(
        there.source,
        from_file("12", "h2", "debian.qcow2").source,
        "by which a repeated import knows it"
    );
    assert_eq!(
        (there.size_bytes, there.sha256),
        (DATA.len() as u64, sha256(DATA))
    );

    clients
        .images
        .create_image(from_file("13", "h2", "none.qcow2"))
        .await
        .unwrap();
    let failed = until(&clients, "13", ImageState::Failed).await;
    assert_eq!(failed.status.unwrap().error.unwrap().reason, "IMAGE_NOT_FOUND");
    let unknown = clients
        .images
        .create_image(from_file("14", "h9", "debian.qcow2"))
        .await;
    assert_eq!(reason(unknown), "HOST_NOT_FOUND");
}

#[tokio::test]
async fn bytes_with_another_checksum_are_refused_and_the_image_can_be_deleted() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let mut request = image("12", DATA);
    request.image.as_mut().unwrap().sha256 = sha256(b"something else");
    clients.images.create_image(request).await.unwrap();
    upload(&clients, "12", DATA).await.unwrap();
    let failed = until(&clients, "12", ImageState::Failed).await;
    assert_eq!(failed.status.unwrap().error.unwrap().reason, "IMAGE_CHECKSUM");
    let refused = clients.vms.create_vm(with_image("web", root("debian:12"))).await;
    assert_eq!(reason(refused), "IMAGE_NOT_AVAILABLE");
    clients.images.delete_image(remove("12")).await.unwrap();
    eventually("it is gone", || async { get(&clients, "12").await.is_err() }).await;
    assert!(leftovers(&site).is_empty(), "its upload went with it");
}

#[tokio::test]
async fn an_import_that_ends_while_its_image_is_deleted_leaves_no_copy() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    freeze(&site, true);
    clients.images.create_image(image("12", DATA)).await.unwrap();
    upload(&clients, "12", DATA).await.unwrap();
    until(&clients, "12", ImageState::Importing).await;
    let importing = || {
        let world = site.fabric.lock();
        let mut imports = world.hosts.values().flat_map(|host| host.images.imports.values());
        imports.any(|import| import.phase == ImagePhase::Importing)
    };
    eventually("a host imports it", || async { importing() }).await;
    for host in site.fabric.lock().hosts.values_mut() {
        host.images.ends_late = true;
    }
    clients.images.delete_image(remove("12")).await.unwrap();
    eventually("it is gone", || async { get(&clients, "12").await.is_err() }).await;
    assert!(leftovers(&site).is_empty(), "{:?}", leftovers(&site));
}

#[tokio::test]
async fn an_image_whose_host_is_gone_for_good_says_what_to_do() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    clients.images.create_image(image("12", DATA)).await.unwrap();
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let request = v1::DeleteHostRequest {
        name: "h1".into(),
        ..Default::default()
    };
    clients.hosts.delete_host(request).await.unwrap();
    let failed = until(&clients, "12", ImageState::Failed).await;
    let error = failed.status.unwrap().error.unwrap();
    assert_eq!(error.reason, "IMPORT_HOST_GONE");
    assert!(error.message.contains("import it again"), "{}", error.message);
    let none = clients.images.create_image(image("13", DATA)).await;
    assert_eq!(reason(none), "NO_CAPACITY");
    clients.images.delete_image(remove("12")).await.unwrap();
    eventually("it is gone", || async { get(&clients, "12").await.is_err() }).await;
}

#[tokio::test]
async fn a_controller_that_is_killed_in_any_state_of_an_image_goes_on_with_it() {
    let mut site = Site::new(2).await;
    let clients = site.start().await;
    clients
        .images
        .clone()
        .create_image(image("12", DATA))
        .await
        .unwrap();
    freeze(&site, true);

    site.kill();
    let clients = site.start().await;
    until(&clients, "12", ImageState::AwaitingUpload).await;
    upload(&clients, "12", DATA).await.unwrap();
    until(&clients, "12", ImageState::Importing).await;

    site.kill();
    let clients = site.start().await;
    until(&clients, "12", ImageState::Importing).await;
    freeze(&site, false);
    until(&clients, "12", ImageState::Available).await;

    site.kill();
    let clients = site.start().await;
    eventually("both hosts have it", || async {
        ready_copies(&get(&clients, "12").await.unwrap()) == 2
    })
    .await;
    site.fabric.lock().hosts.get_mut("h2").unwrap().cut_off = true;
    clients.images.clone().delete_image(remove("12")).await.unwrap();

    site.kill();
    let clients = site.start().await;
    until(&clients, "12", ImageState::Deleting).await;
    assert!(
        leftovers(&site).contains(&"h2".to_owned()),
        "it cannot be reached"
    );
    site.fabric.lock().hosts.get_mut("h2").unwrap().cut_off = false;
    eventually("it is gone", || async { get(&clients, "12").await.is_err() }).await;
    assert!(
        leftovers(&site).is_empty(),
        "{:?} within {LIMIT:?}",
        leftovers(&site)
    );
}

/// Commands about images that hosts were given, but for what was cleared away.
fn told(site: &Site) -> Vec<&'static str> {
    let world = site.fabric.lock();
    let commands = world
        .hosts
        .values()
        .flat_map(|host| host.commands.keys().copied());
    commands.filter(|command| command.ends_with("Image")).collect()
}

/// Waits until a host has told again what it has, several times.
async fn heard_again(clients: &Clients) {
    let mut times = std::collections::BTreeSet::new();
    while times.len() < 5 {
        let request = v1::GetHostRequest { name: "h1".into() };
        let host = clients
            .hosts
            .clone()
            .get_host(request)
            .await
            .unwrap()
            .into_inner();
        times.insert(host.report_time.map(|time| (time.seconds, time.nanos)));
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn after_a_restore_nobody_is_told_anything_until_the_site_is_resumed_and_unknown_copies_stay() {
    let mut site = Site::new(2).await;
    let clients = site.start().await;
    available(&clients, "12", DATA).await;
    site.fabric.lock().hosts.get_mut("h2").unwrap().cut_off = true;
    clients.images.clone().delete_image(remove("12")).await.unwrap();
    let backup = site.disk.open().load().unwrap();
    let forgotten = b"not in the backup";
    {
        let mut world = site.fabric.lock();
        let files = &mut world.hosts.get_mut("h1").unwrap().images.files;
        files.insert("debian.qcow2".into(), forgotten.to_vec());
    }
    let request = from_file("13", "h1", "debian.qcow2");
    clients.images.clone().create_image(request).await.unwrap();
    until(&clients, "13", ImageState::Available).await;

    site.kill();
    site.fabric.lock().hosts.get_mut("h2").unwrap().cut_off = false;
    let (restored, _) = incarnation::renew(backup, Past::default(), Timestamp::UNIX_EPOCH).unwrap();
    site.disk = Disk::of(restored);
    for host in site.fabric.lock().hosts.values_mut() {
        host.commands.clear();
    }
    let mut clients = site.start().await;
    let refused = clients.images.create_image(image("14", DATA)).await;
    assert_eq!(reason(refused), "SITE_OBSERVING");
    assert_eq!(reason(upload(&clients, "12", DATA).await), "SITE_OBSERVING");
    heard_again(&clients).await;
    assert!(told(&site).is_empty(), "{:?}", told(&site));
    until(&clients, "12", ImageState::Deleting).await;

    let operator = SiteServiceClient::new(site.channel(&site.endpoint(), "admin").await.unwrap());
    let resumed = || async {
        let resume = v1::ResumeSiteRequest {
            request_id: request_id(),
            ..Default::default()
        };
        operator.clone().resume_site(resume).await.is_ok()
    };
    eventually("the site is resumed", resumed).await;
    eventually("it is gone", || async { get(&clients, "12").await.is_err() }).await;
    let world = site.fabric.lock();
    let mut hosts = world.hosts.values();
    assert!(
        hosts.any(|host| host.images.has(&sha256(forgotten))),
        "the backup does not know it"
    );
}
