//! Images come by an upload or from a file, are copied to hosts, serve VMs, and go.

mod hostile;
mod imports;
mod private;
mod uploads;

use dalgu_controller::pki;
use dalgu_proto::{
    tls::{self, Identity},
    v1::{self, CloneMode, ImageState},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    images::{VIRTUAL_BYTES, sha256},
    site::{Clients, Site, create, delete, eventually, migrate, reason},
};

/// An image with these bytes, to be uploaded.
fn image(version: &str, data: &[u8]) -> v1::CreateImageRequest {
    let image = v1::Image {
        name: "debian".into(),
        version: version.into(),
        format: v1::ImageFormat::Qcow2.into(),
        size_bytes: data.len() as u64,
        sha256: sha256(data),
        ..Default::default()
    };
    v1::CreateImageRequest {
        image: Some(image),
        ..Default::default()
    }
}

async fn get(clients: &Clients, version: &str) -> Result<v1::Image, Status> {
    let request = v1::GetImageRequest {
        name: "debian".into(),
        version: version.into(),
    };
    Ok(clients.images.clone().get_image(request).await?.into_inner())
}

async fn until(clients: &Clients, version: &str, state: ImageState) -> v1::Image {
    let there = || async {
        let image = get(clients, version).await.unwrap();
        image.status.unwrap().state() == state
    };
    eventually(state.as_str_name(), there).await;
    get(clients, version).await.unwrap()
}

fn ready_copies(image: &v1::Image) -> usize {
    let copies = &image.status.as_ref().unwrap().copies;
    copies.iter().filter(|copy| copy.ready).count()
}

/// Brings bytes from where the controller says; what it said last, or why it ended.
async fn upload(clients: &Clients, version: &str, data: &[u8]) -> Result<u64, Status> {
    let (sender, requests) = mpsc::channel(4);
    let first = v1::UploadImageRequest {
        name: "debian".into(),
        version: version.into(),
        ..Default::default()
    };
    sender.send(first).await.unwrap();
    let mut answers = clients
        .images
        .clone()
        .upload_image(ReceiverStream::new(requests))
        .await?
        .into_inner();
    let begin = answers
        .message()
        .await?
        .expect("says where to go on")
        .received_bytes;
    let rest = data[usize::try_from(begin).unwrap()..].to_vec();
    let sending = tokio::spawn(async move {
        let mut offset = begin;
        for piece in rest.chunks(4) {
            let request = v1::UploadImageRequest {
                offset,
                data: piece.to_vec().into(),
                ..Default::default()
            };
            offset += piece.len() as u64;
            if sender.send(request).await.is_err() {
                break;
            }
        }
    });
    let mut last = begin;
    while let Some(answer) = answers.message().await? {
        last = answer.received_bytes;
    }
    sending.await.unwrap();
    Ok(last)
}

/// An image that VMs can be made from.
async fn available(clients: &Clients, version: &str, data: &[u8]) -> v1::Image {
    made(clients, image(version, data), data).await
}

/// One that starts from UEFI.
async fn available_for_uefi(clients: &Clients) -> v1::Image {
    let data = b"bytes";
    let mut new = image("12", data);
    new.image.as_mut().unwrap().firmware = v1::Firmware::Uefi.into();
    made(clients, new, data).await
}

async fn made(clients: &Clients, new: v1::CreateImageRequest, data: &[u8]) -> v1::Image {
    let version = new.image.as_ref().unwrap().version.clone();
    clients.images.clone().create_image(new).await.unwrap();
    upload(clients, &version, data).await.unwrap();
    until(clients, &version, ImageState::Available).await
}

fn with_image(vm: &str, disk: v1::Disk) -> v1::CreateVmRequest {
    let mut request = create(vm);
    request.vm.as_mut().unwrap().spec.as_mut().unwrap().disks = vec![disk];
    request
}

fn root(image: &str) -> v1::Disk {
    v1::Disk {
        name: "root".into(),
        image: image.into(),
        ..Default::default()
    }
}

fn remove(version: &str) -> v1::DeleteImageRequest {
    v1::DeleteImageRequest {
        name: "debian".into(),
        version: version.into(),
        ..Default::default()
    }
}

/// Hosts with anything of any image.
fn leftovers(site: &Site) -> Vec<String> {
    let world = site.fabric.lock();
    let hosts = world.hosts.iter();
    let left = hosts.filter(|(_, host)| !host.images.copies.is_empty() || !host.images.imports.is_empty());
    left.map(|(name, _)| name.clone()).collect()
}

async fn second_operator(site: &Site) -> Clients {
    let dir = site.dir.path().join("second");
    pki::issue_operator(site.dir.path(), "second", &dir).unwrap();
    let identity = Identity::load_dir(&dir, "second").unwrap();
    let channel = tls::client::connect(&site.endpoint(), tls::CONTROLLER_NAME, &identity).await;
    Clients::new(&channel.unwrap())
}

#[tokio::test]
async fn an_image_is_uploaded_and_copied_and_stays_as_long_as_a_vm_has_a_disk_of_it() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    let data = b"the bytes of an image";
    let there = available(&clients, "12", data).await;
    let status = there.status.unwrap();
    assert_eq!(
        (status.digest.as_str(), status.virtual_size_bytes),
        (sha256(data).as_str(), VIRTUAL_BYTES)
    );
    let copied = || async { ready_copies(&get(&clients, "12").await.unwrap()) == 2 };
    eventually("a second host has it", copied).await;

    let made = clients
        .vms
        .create_vm(with_image("web", root("debian")))
        .await
        .unwrap();
    clients.succeeded(made.into_inner()).await;
    let disk = clients.vm("web").await.spec.unwrap().disks[0].clone();
    assert_eq!(
        (disk.image.as_str(), disk.size_mib),
        ("debian:12", 6),
        "rounded up"
    );
    assert_eq!(disk.image_digest, sha256(data));
    assert_eq!(disk.clone_mode(), CloneMode::Overlay);
    assert_eq!(get(&clients, "").await.unwrap().status.unwrap().vms, 1);

    let refused = clients.images.delete_image(remove("12")).await;
    assert_eq!(reason(refused), "IMAGE_IN_USE");
    let deleted = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    clients.images.delete_image(remove("12")).await.unwrap();
    let gone = || async { get(&clients, "12").await.is_err() };
    eventually("it is gone", gone).await;
    assert_eq!(reason(get(&clients, "12").await), "IMAGE_NOT_FOUND");
    assert!(leftovers(&site).is_empty(), "{:?}", leftovers(&site));
}

#[tokio::test]
async fn a_vm_starts_from_what_its_image_says_unless_it_says_otherwise_itself() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let shown = available_for_uefi(&clients).await;
    assert_eq!(shown.firmware(), v1::Firmware::Uefi);
    // The only host has none for its guests.
    let asked = with_image("web", root("debian:12"));
    let refused = clients.vms.create_vm(asked.clone()).await.unwrap_err();
    assert!(refused.message().contains("UEFI"), "{refused}");
    let subject = v1::explain_placement_request::Subject::Spec(asked.vm.clone().unwrap().spec.unwrap());
    let explained = v1::ExplainPlacementRequest {
        subject: Some(subject),
        ..Default::default()
    };
    let explained = clients
        .placement
        .explain_placement(explained)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(explained.host, "", "{explained:?}");
    let mut bios = asked;
    bios.vm.as_mut().unwrap().spec.as_mut().unwrap().firmware = v1::Firmware::Bios.into();
    let made = clients.vms.create_vm(bios).await.unwrap();
    clients.succeeded(made.into_inner()).await;
    // Said in words, so that who sends it again does not ask for what the image says.
    let mut shown = clients.vm("web").await;
    assert_eq!(shown.spec.as_ref().unwrap().firmware(), v1::Firmware::Bios);
    let mut again = create("web-2");
    shown.spec.as_mut().unwrap().nics[0].mac.clear();
    again.vm.as_mut().unwrap().spec = shown.spec;
    let made = clients.vms.create_vm(again).await.unwrap();
    clients.succeeded(made.into_inner()).await;
}

#[tokio::test]
async fn a_volume_of_an_image_keeps_its_firmware_for_the_vm_that_boots_from_it() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    available_for_uefi(&clients).await;
    let volume = |name: &str, image: &str| v1::CreateVolumeRequest {
        volume: Some(v1::Volume {
            name: name.into(),
            image: image.into(),
            size_mib: 8,
            ..Default::default()
        }),
        ..Default::default()
    };
    let boot = clients
        .volumes
        .create_volume(volume("boot", "debian:12"))
        .await
        .unwrap();
    assert_eq!(boot.into_inner().firmware(), v1::Firmware::Uefi);
    let blank = clients.volumes.create_volume(volume("blank", "")).await.unwrap();
    assert_eq!(blank.into_inner().firmware(), v1::Firmware::Bios);
    let from = |vm: &str, volume: &str| {
        with_image(
            vm,
            v1::Disk {
                name: "root".into(),
                volume: volume.into(),
                ..Default::default()
            },
        )
    };
    // The only host offers neither volumes nor UEFI to its guests: what it lacks is what the VM would have had.
    let mut bios = from("web", "boot");
    bios.vm.as_mut().unwrap().spec.as_mut().unwrap().firmware = v1::Firmware::Bios.into();
    for (asked, uefi) in [
        (from("web", "boot"), true),
        (bios, false),
        (from("web", "blank"), false),
    ] {
        let spec = asked.vm.as_ref().and_then(|vm| vm.spec.clone()).unwrap();
        let explained = v1::ExplainPlacementRequest {
            subject: Some(v1::explain_placement_request::Subject::Spec(spec)),
            ..Default::default()
        };
        let explained = clients.placement.explain_placement(explained).await.unwrap();
        let explained = format!("{explained:?}");
        let refused = clients.vms.create_vm(asked).await.unwrap_err();
        assert_eq!(refused.message().contains("UEFI"), uefi, "{refused}");
        assert_eq!(explained.contains("UEFI"), uefi, "{explained}");
    }
}

#[tokio::test]
async fn a_disk_that_does_not_fit_its_image_is_refused_with_both_numbers() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    available(&clients, "12", b"bytes").await;
    clients.images.create_image(image("13", b"more")).await.unwrap();
    let small = v1::Disk {
        size_mib: 5,
        ..root("debian:12")
    };
    let status = clients.vms.create_vm(with_image("web", small)).await.unwrap_err();
    assert!(
        status.message().contains("disks[0].size_mib")
            && status.message().contains("6 MiB")
            && status.message().contains("got 5"),
        "{status}"
    );
    let raw = v1::Disk {
        format: v1::DiskFormat::Raw.into(),
        clone_mode: CloneMode::Overlay.into(),
        ..root("debian:12")
    };
    for (disk, wanted) in [
        (raw, "INVALID_FIELD"),
        (root("debian:13"), "IMAGE_NOT_AVAILABLE"),
        (root("debian:14"), "IMAGE_NOT_FOUND"),
        (root("fedora"), "IMAGE_NOT_FOUND"),
    ] {
        let text = format!("{disk:?}");
        let refused = clients.vms.create_vm(with_image("web", disk)).await;
        assert_eq!(reason(refused), wanted, "{text}");
    }
    // The newest that can be used, not the newest.
    let made = clients
        .vms
        .create_vm(with_image("web", root("debian")))
        .await
        .unwrap();
    clients.succeeded(made.into_inner()).await;
    assert_eq!(clients.vm("web").await.spec.unwrap().disks[0].image, "debian:12");
}

#[tokio::test]
async fn a_migration_waits_until_its_destination_has_fetched_the_image() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let mut request = image("12", b"bytes");
    request.image.as_mut().unwrap().replicas = 1;
    clients.images.create_image(request).await.unwrap();
    upload(&clients, "12", b"bytes").await.unwrap();
    let there = until(&clients, "12", ImageState::Available).await;
    let host = there.status.unwrap().import_host;
    let made = clients
        .vms
        .create_vm(v1::CreateVmRequest {
            host: host.clone(),
            ..with_image("web", root("debian"))
        })
        .await;
    clients.succeeded(made.unwrap().into_inner()).await;
    let other = if host == "h1" { "h2" } else { "h1" };
    site.fabric.lock().hosts.get_mut(other).unwrap().images.frozen = true;
    let moving = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let asked = || async {
        let world = site.fabric.lock();
        let told = world.hosts[other].commands.get("PrepareMigration");
        told.is_some_and(|told| *told > 1)
    };
    eventually("the destination is asked again", asked).await;
    site.fabric.lock().hosts.get_mut(other).unwrap().images.frozen = false;
    clients.succeeded(moving).await;
    assert_eq!(clients.vm("web").await.status.unwrap().host, other);
}
