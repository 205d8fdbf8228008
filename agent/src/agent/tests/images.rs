//! VMs whose disks are made from images: the controller names them, the agents bring them, and what is needed stays.

use dalgu_proto::image::Digest;
use ring::digest::{SHA256, digest};
use tonic::Code;

use super::*;

const IMAGE: &str = "00000000-0000-4000-8000-0000000000aa";

fn content() -> Vec<u8> {
    vec![7; 3 << 20]
}

fn sha256(bytes: &[u8]) -> Digest {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, bytes).as_ref());
    Digest::from_bytes(&sum)
}

fn a_site() -> Site {
    let mut site = Site::new();
    site.images_dir.insert("base.raw".to_owned(), content());
    site
}

fn needed(hosts: &[&str]) -> wire::ImageNeed {
    let source = |host: &&str| wire::ImageSource {
        host: (*host).to_owned(),
        address: format!("{host}:7443"),
    };
    wire::ImageNeed {
        digest: sha256(&content()).to_string(),
        size_bytes: 3 << 20,
        sources: hosts.iter().map(source).collect(),
    }
}

/// The VM, with an overlay on the image.
fn overlay_vm(epoch: u64, hosts: &[&str]) -> Option<wire::VmIntent> {
    let mut vm = vm_intent(epoch)?;
    let disk = &mut vm.spec.as_mut()?.disks[0];
    disk.image = "base:1".to_owned();
    disk.image_digest = sha256(&content()).to_string();
    disk.clone_mode = v1::CloneMode::Overlay.into();
    vm.images = vec![needed(hosts)];
    Some(vm)
}

impl Host {
    async fn ensure_overlay(&mut self, hosts: &[&str]) -> wire::VmReport {
        let request = wire::EnsureVmRequest {
            context: self.context(),
            vm: overlay_vm(1, hosts),
        };
        let answer = self.client.ensure_vm(request).await.unwrap();
        answer.into_inner().vm.unwrap()
    }

    async fn delete(&mut self) {
        let request = wire::DeleteVmRequest {
            context: self.context(),
            uid: VM.to_owned(),
            generation: 2,
            epoch: 1,
        };
        self.client.delete_vm(request).await.unwrap();
    }

    /// The context of a command with a number.
    fn numbered(&self, order: u64) -> Option<wire::CommandContext> {
        let context = self.context()?;
        Some(wire::CommandContext { order, ..context })
    }

    async fn import(&mut self) -> wire::ImageReport {
        self.import_as(0).await
    }

    async fn import_as(&mut self, order: u64) -> wire::ImageReport {
        let request = wire::ImportImageRequest {
            context: self.numbered(order),
            image_uid: IMAGE.to_owned(),
            format: v1::ImageFormat::Raw.into(),
            size_bytes: 3 << 20,
            sha256: sha256(&content()).to_string(),
            file: "base.raw".to_owned(),
        };
        self.image_client
            .import_image(request)
            .await
            .unwrap()
            .into_inner()
    }

    async fn remove_image(&mut self) -> Result<(), tonic::Status> {
        self.remove_image_as(0).await
    }

    async fn remove_image_as(&mut self, order: u64) -> Result<(), tonic::Status> {
        let request = wire::RemoveImageRequest {
            context: self.numbered(order),
            digest: sha256(&content()).to_string(),
            image_uid: IMAGE.to_owned(),
            unless_ready: false,
        };
        self.image_client.remove_image(request).await.map(drop)
    }
}

fn has_copy(host: &str, in_use: bool) -> impl Fn(&wire::ReportRequest) -> bool {
    let digest = sha256(&content()).to_string();
    move |report| {
        let images = report.images.iter().flat_map(|inventory| &inventory.images);
        let copy = |image: &wire::ImageReport| {
            image.image_uid.is_empty()
                && image.digest == digest
                && image.phase() == wire::ImagePhase::Ready
                && image.in_use == in_use
        };
        report.host == host && images.into_iter().any(copy)
    }
}

/// Two hosts, of which the first has the image.
async fn two(site: &Site) -> (Host, Host) {
    let mut first = site.start("h1", site.sim("h1"), Folder::default()).await;
    let second = site.start("h2", site.sim("h2"), Folder::default()).await;
    site.until("two hosts", |report| report.host == "h2").await;
    site.until("two hosts", |report| report.host == "h1").await;
    first.import().await;
    site.until("imported", has_copy("h1", false)).await;
    (first, second)
}

#[tokio::test(start_paused = true)]
async fn a_vm_waits_for_its_image_which_comes_from_another_host_and_stays_as_long_as_the_vm() {
    let site = a_site();
    let (_first, mut second) = two(&site).await;
    second.ensure_overlay(&["h1"]).await;
    site.until("settled", settled("h2")).await;
    site.until("in use", has_copy("h2", true)).await;
    let refused = second.remove_image().await.unwrap_err();
    assert_eq!(
        (refused.code(), dalgu_proto::reason::of(&refused).as_deref()),
        (Code::FailedPrecondition, Some("IMAGE_IN_USE"))
    );
    // So it is after a restart.
    second.stop.cancel();
    lock(&site.registrar.reports).clear();
    let images = second.images.clone();
    let mut second = site
        .start_with(1, "h2", second.sim.clone(), second.files.clone(), images)
        .await;
    site.until("settled again", settled("h2")).await;
    second.remove_image().await.unwrap_err();
    let told = lock(&site.registrar.registered).last().cloned().unwrap();
    assert!(told.images.unwrap().images[0].in_use);
    second.delete().await;
    let gone = |report: &wire::ReportRequest| report.host == "h2" && report.vms.is_empty();
    site.until("gone", gone).await;
    second.remove_image().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_comes_after_a_later_import_leaves_the_copy_that_it_made() {
    let site = a_site();
    let mut host = site.start("h1", site.sim("h1"), Folder::default()).await;
    site.until("a host", |report| report.host == "h1").await;
    host.import_as(2).await;
    site.until("imported", has_copy("h1", false)).await;
    let removed = |host: &Host| {
        let file = crate::images::copy_name(&sha256(&content()));
        !host.images.names().contains(&file)
    };
    for late in [1, 2] {
        let refused = host.remove_image_as(late).await.unwrap_err();
        assert_eq!(
            (refused.code(), dalgu_proto::reason::of(&refused).as_deref()),
            (Code::Aborted, Some("OVERTAKEN")),
            "{late}"
        );
        assert!(!removed(&host), "{late}");
    }
    host.remove_image_as(3).await.unwrap();
    assert!(removed(&host));
}

#[tokio::test(start_paused = true)]
async fn a_vm_whose_image_nobody_has_says_so_and_goes_on_when_it_is_told_who_has_it() {
    let site = a_site();
    let (_first, mut second) = two(&site).await;
    second.ensure_overlay(&[]).await;
    let waits = |report: &wire::ReportRequest| {
        let fetching = |vm: &wire::VmReport| {
            let error = vm.error.as_ref();
            error.is_some_and(|error| error.reason == "IMAGE_FETCHING" && error.retrying)
        };
        report.host == "h2" && report.vms.iter().any(fetching)
    };
    site.until("it waits", waits).await;
    // The same generation: only the hosts are news.
    second.ensure_overlay(&["h1"]).await;
    site.until("settled", settled("h2")).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_waits_for_its_image_is_deleted_when_that_is_asked_for() {
    let site = a_site();
    let (_first, mut second) = two(&site).await;
    second.ensure_overlay(&["h9"]).await;
    second.delete().await;
    lock(&site.registrar.reports).clear();
    let gone = |report: &wire::ReportRequest| report.host == "h2" && report.vms.is_empty();
    site.until("gone", gone).await;
    second.remove_image().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_destination_brings_the_image_behind_an_overlay_before_it_lets_the_vm_come() {
    let site = a_site();
    let (mut first, mut second) = two(&site).await;
    first.ensure_overlay(&[]).await;
    site.until("settled", settled("h1")).await;
    let prepare = |host: &Host| wire::PrepareMigrationRequest {
        context: host.context(),
        migration_id: MIGRATION.to_owned(),
        vm: overlay_vm(2, &["h1"]),
        source_host: "h1".to_owned(),
    };
    let early = second
        .client
        .prepare_migration(prepare(&second))
        .await
        .unwrap_err();
    assert_eq!(
        (early.code(), dalgu_proto::reason::of(&early).as_deref()),
        (Code::Unavailable, Some("IMAGE_FETCHING"))
    );
    site.until("here", has_copy("h2", true)).await;
    second.client.prepare_migration(prepare(&second)).await.unwrap();
    assert_eq!(second.sim.local_volumes(), 1);
    second.remove_image().await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn only_the_controller_commands_and_what_it_uploads_is_imported() {
    let site = a_site();
    let mut host = site.start("h1", site.sim("h1"), Folder::default()).await;
    site.until("a host", |report| report.host == "h1").await;
    let content = content();
    let pieces: Vec<_> = content
        .chunks(1 << 20)
        .enumerate()
        .map(|(number, piece)| wire::UploadImageRequest {
            context: host.context().filter(|_| number == 0),
            image_uid: if number == 0 {
                IMAGE.to_owned()
            } else {
                String::new()
            },
            size_bytes: if number == 0 { 3 << 20 } else { 0 },
            offset: (number as u64) << 20,
            data: piece.to_vec().into(),
        })
        .collect();
    let mut strangers =
        wire::agent_image_service_client::AgentImageServiceClient::new(lock(&site.hosts)["h1"].clone());
    let refused = strangers
        .upload_image(futures::stream::iter(pieces.clone()))
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    let mut answers = host
        .image_client
        .upload_image(futures::stream::iter(pieces))
        .await
        .unwrap()
        .into_inner();
    let mut received = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        received.push(answer.received_bytes);
    }
    assert_eq!(received, [0, 3 << 20]);
    let request = wire::ImportImageRequest {
        context: host.context(),
        image_uid: IMAGE.to_owned(),
        format: v1::ImageFormat::Raw.into(),
        ..Default::default()
    };
    host.image_client.import_image(request).await.unwrap();
    site.until("imported", has_copy("h1", false)).await;
}
