//! What VmService refuses, what it remembers, and the console.

use dalgu_proto::v1;
use futures::future::join_all;
use prost_types::FieldMask;
use tonic::Code;

use super::list;
use crate::site::{Site, create, delete, reason, request_id, start, stop};

fn mask(paths: &[&str]) -> Option<FieldMask> {
    Some(FieldMask {
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
    })
}

#[tokio::test]
async fn bad_input_of_every_kind_is_refused_by_its_name_and_changes_nothing() {
    type Change = fn(&mut v1::CreateVmRequest, &mut v1::Vm);
    let cases: &[(&str, Change)] = &[
        ("vm.name", |_, vm| vm.name = "<&\">".into()),
        ("vm.name", |_, vm| vm.name = "a/b".into()),
        ("vm.name", |_, vm| vm.name = String::new()),
        ("vm.spec", |_, vm| vm.spec = None),
        ("vm.spec.vcpus", |_, vm| vm.spec.as_mut().unwrap().vcpus = 0),
        ("vm.spec.memory_mib", |_, vm| {
            vm.spec.as_mut().unwrap().memory_mib = u64::MAX
        }),
        ("vm.spec.disks[0].image", |_, vm| {
            vm.spec.as_mut().unwrap().disks[0].image = "../x".into()
        }),
        ("vm.spec.nics[0].mac", |_, vm| {
            vm.spec.as_mut().unwrap().nics[0].mac = "x".into()
        }),
        ("vm.labels", |_, vm| {
            drop(vm.labels.insert("a b".into(), String::new()))
        }),
        ("vm.description", |_, vm| vm.description = "x".repeat(1025)),
        ("vm.uid", |_, vm| vm.uid = "x".into()),
        ("vm.status", |_, vm| vm.status = Some(v1::VmStatus::default())),
        ("vm.generation", |_, vm| vm.generation = 1),
        ("host", |request, _| request.host = "H1".into()),
        ("request_id", |request, _| request.request_id = "again".into()),
    ];
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let revision = list(&mut clients).await.resource_version;
    for (field, change) in cases {
        let mut request = create("web");
        let mut vm = request.vm.take().unwrap();
        change(&mut request, &mut vm);
        request.vm = Some(vm);
        let status = clients.vms.create_vm(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert!(
            status.message().starts_with(field),
            "{field}: {}",
            status.message()
        );
    }
    let no_vm = v1::CreateVmRequest::default();
    assert_eq!(reason(clients.vms.create_vm(no_vm).await), "INVALID_FIELD");
    let long = v1::StopVmRequest {
        grace_period_seconds: 3601,
        ..stop("web")
    };
    assert_eq!(reason(clients.vms.stop_vm(long).await), "INVALID_FIELD");
    assert_eq!(reason(clients.vms.start_vm(start("none")).await), "VM_NOT_FOUND");
    assert_eq!(reason(clients.vms.start_vm(start("<x>")).await), "INVALID_FIELD");
    let nowhere = v1::CreateVmRequest {
        host: "h9".into(),
        ..create("web")
    };
    assert_eq!(reason(clients.vms.create_vm(nowhere).await), "HOST_NOT_FOUND");
    let operation = v1::GetOperationRequest { id: "x".into() };
    assert_eq!(
        reason(clients.operations.get_operation(operation).await),
        "INVALID_FIELD"
    );
    let operation = v1::GetOperationRequest { id: request_id() };
    assert_eq!(
        reason(clients.operations.get_operation(operation).await),
        "OPERATION_NOT_FOUND"
    );
    assert_eq!(
        list(&mut clients).await.resource_version,
        revision,
        "nothing was stored"
    );
}

#[tokio::test]
async fn a_repeated_request_has_one_effect_also_after_a_restart() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let mut request = v1::CreateVmRequest {
        request_id: request_id(),
        ..create("web")
    };
    for label in ["a", "b", "c", "d"] {
        request
            .vm
            .as_mut()
            .unwrap()
            .labels
            .insert(label.into(), "1".into());
    }
    let first = clients.vms.create_vm(request.clone()).await.unwrap().into_inner();
    clients.succeeded(first.clone()).await;
    let again = clients.vms.create_vm(request.clone()).await.unwrap().into_inner();
    assert_eq!(again.id, first.id);
    let mut other = request.clone();
    other.vm.as_mut().unwrap().description = "another".into();
    assert_eq!(reason(clients.vms.create_vm(other).await), "REQUEST_ID_REUSED");
    let mut other = request.clone();
    other.vm.as_mut().unwrap().placement_groups = vec!["apart".into()];
    assert_eq!(reason(clients.vms.create_vm(other).await), "REQUEST_ID_REUSED");
    let mut other = request.clone();
    other.vm.as_mut().unwrap().tolerations = vec![v1::Toleration {
        key: "use".into(),
        ..Default::default()
    }];
    assert_eq!(reason(clients.vms.create_vm(other).await), "REQUEST_ID_REUSED");
    let stop_with_it = v1::StopVmRequest {
        request_id: request.request_id.clone(),
        ..stop("web")
    };
    assert_eq!(
        reason(clients.vms.stop_vm(stop_with_it).await),
        "REQUEST_ID_REUSED"
    );
    let cordon = v1::CordonHostRequest {
        name: "h1".into(),
        reason: "disk".into(),
        request_id: request_id(),
    };
    let cordoned = clients
        .hosts
        .cordon_host(cordon.clone())
        .await
        .unwrap()
        .into_inner();

    site.kill();
    let mut clients = site.start().await;
    let again = clients.vms.create_vm(request).await.unwrap().into_inner();
    assert_eq!(
        (again.state(), again.id),
        (v1::OperationState::Succeeded, first.id)
    );
    let same = clients.hosts.cordon_host(cordon).await.unwrap().into_inner();
    assert_eq!(
        (same.cordoned, same.etag),
        (true, cordoned.etag),
        "nothing was done a second time"
    );
}

#[tokio::test]
async fn a_request_that_was_refused_is_not_carried_out_when_an_earlier_copy_of_it_comes_late() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let cordon = |clients: &crate::site::Clients| {
        let mut hosts = clients.hosts.clone();
        async move {
            let request = v1::CordonHostRequest {
                name: "h1".into(),
                reason: "disk".into(),
                ..Default::default()
            };
            hosts.cordon_host(request).await.unwrap();
        }
    };
    cordon(&clients).await;
    let request = v1::CreateVmRequest {
        request_id: request_id(),
        ..create("web")
    };
    assert_eq!(
        reason(clients.vms.create_vm(request.clone()).await),
        "NO_CAPACITY"
    );
    let open = v1::UncordonHostRequest {
        name: "h1".into(),
        ..Default::default()
    };
    clients.hosts.uncordon_host(open).await.unwrap();
    assert_eq!(
        reason(clients.vms.create_vm(request.clone()).await),
        "NO_CAPACITY",
        "who asked was told so, and has gone"
    );
    assert!(list(&mut clients).await.vms.is_empty());
    let mut other = request.clone();
    other.vm.as_mut().unwrap().description = "another content".into();
    clients.vms.create_vm(other).await.unwrap();
}

#[tokio::test]
async fn a_change_over_somebody_elses_is_refused() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let read = clients.vm("web").await;
    let change = |etag: &str, description: &str, paths: &[&str]| v1::UpdateVmRequest {
        vm: Some(v1::Vm {
            name: "web".into(),
            etag: etag.into(),
            description: description.into(),
            ..Default::default()
        }),
        update_mask: mask(paths),
        ..Default::default()
    };
    let changed = clients
        .vms
        .update_vm(change(&read.etag, "mine", &["description"]))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(changed.description, "mine");
    assert_ne!(changed.etag, read.etag);
    assert_eq!(changed.generation, read.generation, "the agent need not know");
    assert_eq!(
        reason(
            clients
                .vms
                .update_vm(change(&read.etag, "x", &["description"]))
                .await
        ),
        "ETAG_MISMATCH"
    );
    let stale = v1::StopVmRequest {
        etag: read.etag.clone(),
        ..stop("web")
    };
    assert_eq!(reason(clients.vms.stop_vm(stale).await), "ETAG_MISMATCH");
    let stale = v1::DeleteVmRequest {
        etag: read.etag,
        ..delete("web")
    };
    assert_eq!(reason(clients.vms.delete_vm(stale).await), "ETAG_MISMATCH");

    for paths in [
        &["spec.tpm"][..],
        &["description", "name"],
        &["*"],
        &["Description"],
    ] {
        assert_eq!(
            reason(clients.vms.update_vm(change("", "x", paths)).await),
            "FIELD_NOT_MUTABLE",
            "{paths:?}"
        );
    }
    assert_eq!(
        reason(clients.vms.update_vm(change("", "x", &[])).await),
        "INVALID_FIELD"
    );
    assert_eq!(clients.vm("web").await.description, "mine");

    let host = |ratio: f64, paths: &[&str]| v1::UpdateHostRequest {
        host: Some(v1::Host {
            name: "h1".into(),
            cpu_overcommit_ratio: ratio,
            ..Default::default()
        }),
        update_mask: mask(paths),
        ..Default::default()
    };
    let ratio = &["cpu_overcommit_ratio"];
    assert_eq!(
        clients
            .hosts
            .update_host(host(2.0, ratio))
            .await
            .unwrap()
            .get_ref()
            .cpu_overcommit_ratio,
        2.0
    );
    for bad in [0.0, -1.0, 65.0, f64::NAN, f64::INFINITY] {
        assert_eq!(
            reason(clients.hosts.update_host(host(bad, ratio)).await),
            "INVALID_FIELD",
            "{bad}"
        );
    }
    assert_eq!(
        reason(clients.hosts.update_host(host(1.0, &["address"])).await),
        "FIELD_NOT_MUTABLE"
    );
    let missing = v1::DeleteHostRequest {
        name: "h1".into(),
        ..Default::default()
    };
    assert_eq!(reason(clients.hosts.delete_host(missing).await), "HOST_NOT_EMPTY");
}

#[tokio::test]
async fn twenty_creations_at_once_never_over_commit_a_host() {
    let mut site = Site::new(2).await;
    let clients = site.start().await;
    let big = |number: u32| {
        let mut request = create(&format!("vm{number}"));
        request.vm.as_mut().unwrap().spec.as_mut().unwrap().memory_mib = 1024;
        request
    };
    let all = join_all((0..20).map(|number| {
        let mut clients = clients.clone();
        async move {
            match clients.vms.create_vm(big(number)).await {
                Ok(operation) => Some(clients.ended(operation.into_inner()).await),
                Err(status) => {
                    assert_eq!(reason::<()>(Err(status.clone())), "NO_CAPACITY");
                    use tonic_types::StatusExt;
                    let info = status.get_details_error_info().unwrap();
                    assert!(info.metadata["h1"].contains("MiB"), "{:?}", info.metadata);
                    assert!(info.metadata.contains_key("hint"));
                    None
                }
            }
        }
    }))
    .await;
    let mut clients = clients;
    let hosts = clients
        .hosts
        .list_hosts(v1::ListHostsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .hosts;
    let mut vms = 0;
    for host in hosts {
        let room = host.allocation.unwrap();
        assert!(room.memory_mib_reserved <= room.memory_mib_capacity, "{room:?}");
        assert!(room.vcpus_reserved <= room.vcpus_capacity, "{room:?}");
        vms += room.vms;
    }
    let made = all.iter().flatten().count();
    assert_eq!(usize::try_from(vms).unwrap(), made);
    // 8 GiB less 819 for the host take six VMs of 1024 + 64 + 1 + 8 MiB.
    assert_eq!(made, 12);
    assert!(
        all.iter()
            .flatten()
            .all(|operation| operation.state() == v1::OperationState::Succeeded)
    );
}

#[tokio::test]
async fn a_console_is_read_through_the_controller() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let request = v1::ReadConsoleRequest {
        name: "web".into(),
        ..Default::default()
    };
    let mut stream = clients.vms.read_console(request).await.unwrap().into_inner();
    let piece = stream.message().await.unwrap().unwrap();
    let uid = clients.vm("web").await.uid;
    assert_eq!(piece.data, format!("console of {uid}\n"));
}

fn with_macs(name: &str, macs: &[&str]) -> v1::CreateVmRequest {
    let mut request = create(name);
    let nics = macs.iter().enumerate().map(|(number, mac)| v1::Nic {
        name: format!("eth{number}"),
        bridge: "br0".into(),
        mac: (*mac).into(),
        ..Default::default()
    });
    request.vm.as_mut().unwrap().spec.as_mut().unwrap().nics = nics.collect();
    request
}

#[tokio::test]
async fn no_two_interfaces_of_a_site_have_one_mac_address() {
    use tonic_types::StatusExt;
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let spec = clients.vm("web").await.spec.unwrap();
    let taken = spec.nics[0].mac.as_str();
    for validate_only in [true, false] {
        let copy = v1::CreateVmRequest {
            validate_only,
            ..with_macs("copy", &["52:54:00:00:00:01", &taken.to_ascii_uppercase()])
        };
        let refused = clients.vms.create_vm(copy).await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists);
        assert!(refused.message().contains("VM web"), "{}", refused.message());
        let info = refused.get_details_error_info().unwrap();
        assert_eq!(info.reason, "MAC_IN_USE");
        assert_eq!(
            (info.metadata["vm"].as_str(), info.metadata["mac"].as_str()),
            ("web", taken)
        );
    }
    let twice = with_macs("twice", &["52:54:00:00:00:01", "52:54:00:00:00:01"]);
    let refused = clients.vms.create_vm(twice).await.unwrap_err();
    assert!(
        refused.message().contains("interface eth0"),
        "{}",
        refused.message()
    );
    assert_eq!(reason::<()>(Err(refused)), "MAC_IN_USE");

    // Who is asked for at the same time is one only.
    let both = join_all(["a", "b"].map(|name| {
        let mut clients = clients.clone();
        async move {
            clients
                .vms
                .create_vm(with_macs(name, &["52:54:00:00:00:02"]))
                .await
                .is_ok()
        }
    }));
    assert_eq!(both.await.iter().filter(|made| **made).count(), 1);
    let deleted = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    let again = clients
        .vms
        .create_vm(with_macs("next", &[taken]))
        .await
        .unwrap()
        .into_inner();
    clients.succeeded(again).await;
}
