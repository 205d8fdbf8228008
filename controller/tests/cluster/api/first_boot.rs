//! What a guest is told at its first boot: who sees it, and for how long.

use dalgu_proto::v1;
use tonic::Code;

use crate::site::{Site, create, delete, eventually, reason, request_id, spec};

fn told(user_data: &str) -> v1::CreateVmRequest {
    let mut request = create("web");
    request.vm.as_mut().unwrap().spec.as_mut().unwrap().first_boot = Some(v1::FirstBoot {
        user_data: user_data.into(),
        ..Default::default()
    });
    request.request_id = request_id();
    request
}

fn stored(site: &Site) -> String {
    format!(
        "{:?}",
        dalgu_controller::store::Store::load(&mut site.disk.open()).unwrap()
    )
}

#[tokio::test]
async fn documents_are_stored_until_the_host_has_made_the_disks_and_shown_to_nobody() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let request = told("#!/bin/sh\necho marker\n");
    let id = request.request_id.clone();
    let operation = clients.vms.create_vm(request.clone()).await.unwrap().into_inner();
    assert!(
        stored(&site).contains("marker"),
        "a controller that dies now can still make it"
    );
    let again = clients.vms.create_vm(request).await.unwrap().into_inner();
    assert_eq!(again.id, operation.id, "the same request");
    let other = v1::CreateVmRequest {
        request_id: id,
        ..told("#!/bin/sh\necho another\n")
    };
    let refused = clients.vms.create_vm(other).await;
    assert_eq!(reason(refused), "REQUEST_ID_REUSED");

    let shown = clients.vm("web").await;
    let first_boot = shown.spec.clone().unwrap().first_boot.unwrap();
    assert_eq!(
        (first_boot.user_data.as_str(), first_boot.pool.as_str()),
        ("", "local")
    );
    assert_eq!(first_boot.user_data_digest.unwrap().size_bytes, 22);

    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    clients.succeeded(operation).await;
    let sent = site.fabric.lock().hosts["h1"].vms[&shown.uid].intent.clone();
    assert_eq!(sent.first_boot.unwrap().user_data, "#!/bin/sh\necho marker\n");
    assert!(sent.spec.unwrap().first_boot.unwrap().user_data.is_empty());
    eventually("forgotten", || async { !stored(&site).contains("marker") }).await;
}

#[tokio::test]
async fn what_a_guest_must_not_be_told_is_refused_and_a_copy_of_a_vm_needs_its_documents_again() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    for (field, change) in [
        (
            "user_data",
            v1::FirstBoot {
                user_data: "password: x".into(),
                ..Default::default()
            },
        ),
        (
            "hostname",
            v1::FirstBoot {
                hostname: "a\nb".into(),
                ..Default::default()
            },
        ),
        (
            "network_config",
            v1::FirstBoot {
                network_config_digest: Some(v1::DocumentDigest {
                    sha256: "ab".repeat(32),
                    size_bytes: 3,
                }),
                ..Default::default()
            },
        ),
    ] {
        let mut request = create("web");
        request.vm.as_mut().unwrap().spec.as_mut().unwrap().first_boot = Some(change);
        let refused = clients.vms.create_vm(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        let place = format!("vm.spec.first_boot.{field}");
        assert!(refused.message().starts_with(&place), "{}", refused.message());
    }
}

#[tokio::test]
async fn a_vm_that_is_deleted_before_its_disks_are_made_takes_its_documents_with_it() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    clients
        .vms
        .create_vm(told("#!/bin/sh\necho marker\n"))
        .await
        .unwrap();
    assert!(stored(&site).contains("marker"));
    clients.vms.delete_vm(delete("web")).await.unwrap();
    assert!(!stored(&site).contains("marker"));
}

#[tokio::test]
async fn a_host_without_the_parts_is_not_chosen_and_the_refusal_says_what_to_install() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let ask = v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Spec(v1::VmSpec {
            firmware: v1::Firmware::UefiSecureBoot.into(),
            ..spec()
        })),
        ..Default::default()
    };
    let answer = clients
        .placement
        .explain_placement(ask)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.verdicts[0].shortfalls[0].constraint, "FEATURE");
    assert!(
        answer.hint.contains("install the package ovmf"),
        "{}",
        answer.hint
    );
}
