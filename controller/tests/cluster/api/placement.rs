//! PlacementService: why a VM is where it is.

use dalgu_proto::v1;

use super::list;
use crate::site::{Clients, Site, create, delete, eventually, migrate, reason, spec};

#[tokio::test]
async fn placement_explains_itself_before_and_after() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let ask = |memory_mib: u64| v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Spec(v1::VmSpec {
            memory_mib,
            ..spec()
        })),
        ..Default::default()
    };
    let fits = clients
        .placement
        .explain_placement(ask(128))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((fits.verdicts.len(), fits.host.is_empty()), (2, false));
    let too_big = clients
        .placement
        .explain_placement(ask(100_000))
        .await
        .unwrap()
        .into_inner();
    assert!(too_big.host.is_empty() && !too_big.hint.is_empty(), "{too_big:?}");
    let checked = v1::CreateVmRequest {
        validate_only: true,
        ..create("web")
    };
    let answer = clients.vms.create_vm(checked).await.unwrap().into_inner();
    assert_eq!(answer.state(), v1::OperationState::Succeeded);
    assert!(list(&mut clients).await.vms.is_empty(), "nothing was stored");
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let kept = clients
        .placement
        .get_placement(v1::GetPlacementRequest { vm: "web".into() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(kept.host, clients.vm("web").await.status.unwrap().host);
    let moving = v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Vm("web".into())),
        ..Default::default()
    };
    let moving = clients
        .placement
        .explain_placement(moving)
        .await
        .unwrap()
        .into_inner();
    assert_ne!(moving.host, kept.host);
}

async fn kept(clients: &Clients, vm: &str) -> Result<v1::Placement, tonic::Status> {
    let ask = v1::GetPlacementRequest { vm: vm.into() };
    let answer = clients.placement.clone().get_placement(ask).await;
    answer.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn the_last_refusal_is_explained_as_it_was_until_one_succeeds_also_after_a_restart() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let mut large = create("web");
    large.vm.as_mut().unwrap().spec.as_mut().unwrap().memory_mib = 100_000;
    let refused = clients.vms.create_vm(large).await.unwrap_err();
    site.kill();
    let mut clients = site.start_controller().await;
    let answer = kept(&clients, "web").await.unwrap();
    assert_eq!((answer.host.as_str(), answer.verdicts.len()), ("", 0));
    let told = answer.refused.unwrap();
    assert_eq!(told.kind(), v1::OperationKind::CreateVm);
    assert!(refused.message().starts_with(&told.summary), "{told:?}");
    assert!(refused.message().contains(&told.hint), "{told:?}");
    assert_eq!(told.verdicts.len(), 2);
    assert!(
        told.verdicts
            .iter()
            .all(|host| host.shortfalls[0].constraint == "MEMORY")
    );
    assert!(told.refuse_time.is_some());
    assert_eq!(reason(kept(&clients, "other").await), "VM_NOT_FOUND");
    // Its creation succeeds; then it cannot move.
    eventually("both hosts report", || async {
        let hosts = clients
            .hosts
            .clone()
            .list_hosts(v1::ListHostsRequest::default())
            .await;
        let hosts = hosts.unwrap().into_inner().hosts;
        hosts.iter().all(|host| host.state() == v1::HostState::Ready)
    })
    .await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    assert_eq!(kept(&clients, "web").await.unwrap().refused, None);
    let on = clients.vm("web").await.status.unwrap().host;
    let other = ["h1", "h2"].into_iter().find(|host| *host != on).unwrap();
    let cordon = v1::CordonHostRequest {
        name: other.into(),
        reason: "disk".into(),
        ..Default::default()
    };
    clients.hosts.cordon_host(cordon).await.unwrap();
    eventually("it runs", || async {
        clients.clone().vm("web").await.status.unwrap().state() == v1::VmState::Running
    })
    .await;
    assert_eq!(
        reason(clients.vms.migrate_vm(migrate("web")).await),
        "NO_CAPACITY"
    );
    let answer = kept(&clients, "web").await.unwrap();
    assert_eq!(answer.host, on, "why it is where it is");
    let told = answer.refused.unwrap();
    assert_eq!(told.kind(), v1::OperationKind::MigrateVm);
    assert_eq!(told.hint, format!("uncordon {other}"));
    let open = v1::UncordonHostRequest {
        name: other.into(),
        ..Default::default()
    };
    clients.hosts.uncordon_host(open).await.unwrap();
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    assert_eq!(kept(&clients, "web").await.unwrap().refused, None);
}

/// Where a VM with this disk would go.
async fn with_disk(clients: &Clients, disk: v1::Disk) -> Result<v1::Placement, tonic::Status> {
    let spec = v1::VmSpec {
        disks: vec![disk],
        ..spec()
    };
    let ask = v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Spec(spec)),
        ..Default::default()
    };
    let answer = clients.placement.clone().explain_placement(ask).await;
    answer.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_vm_that_would_have_a_volume_is_explained_where_the_volume_is() {
    let mut site = Site::new(2).await;
    for host in site.fabric.lock().hosts.values_mut() {
        host.offers_volumes = true;
    }
    let mut clients = site.start().await;
    let ledger = v1::Volume {
        name: "ledger".into(),
        size_mib: 60 << 10,
        ..Default::default()
    };
    let request = v1::CreateVolumeRequest {
        volume: Some(ledger),
        ..Default::default()
    };
    clients.volumes.create_volume(request).await.unwrap();
    let data = || v1::Disk {
        name: "data".into(),
        volume: "ledger".into(),
        ..Default::default()
    };
    // It is nowhere yet, and its size counts.
    let anywhere = with_disk(&clients, data()).await.unwrap();
    assert_eq!(anywhere.verdicts.iter().filter(|verdict| verdict.fits).count(), 2);
    let mut first = create("web");
    first.host = "h2".into();
    first.vm.as_mut().unwrap().spec.as_mut().unwrap().disks = vec![data()];
    let made = clients.vms.create_vm(first).await.unwrap().into_inner();
    clients.succeeded(made).await;
    assert_eq!(reason(with_disk(&clients, data()).await), "VOLUME_IN_USE");
    let gone = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(gone).await;
    eventually("the volume is no VM's", || async {
        with_disk(&clients, data()).await.is_ok()
    })
    .await;
    // Its room there is reserved already, and not asked for again.
    let bound = with_disk(&clients, data()).await.unwrap();
    assert_eq!(bound.host, "h2", "{bound:?}");
    let other = bound
        .verdicts
        .iter()
        .find(|verdict| verdict.host == "h1")
        .unwrap();
    assert_eq!(other.shortfalls[0].constraint, "VOLUME", "{bound:?}");
    for (disk, wanted, field) in [
        (
            v1::Disk {
                volume: "gone".into(),
                ..data()
            },
            "VOLUME_NOT_FOUND",
            "gone",
        ),
        (
            v1::Disk {
                size_mib: 5,
                ..data()
            },
            "INVALID_FIELD",
            "spec.disks[0].size_mib",
        ),
    ] {
        let refused = with_disk(&clients, disk).await;
        let text = format!("{refused:?}");
        assert!(text.contains(field) && !text.contains("vm.spec"), "{text}");
        assert_eq!(reason(refused), wanted);
    }
}
