//! Placement groups, taints and capacity, through the API and with real migrations and drains.

use dalgu_proto::v1::{self, DrainState, PlacementRule, VmState};
use prost_types::FieldMask;

use super::site::{Clients, Site, create, delete, eventually, migrate, reason, request_id};

/// Changes one field of a host.
async fn change(clients: &Clients, path: &str, host: v1::Host) -> Result<v1::Host, tonic::Status> {
    let request = v1::UpdateHostRequest {
        host: Some(host),
        update_mask: Some(FieldMask {
            paths: vec![path.to_owned()],
        }),
        request_id: request_id(),
    };
    Ok(clients.clone().hosts.update_host(request).await?.into_inner())
}

async fn rack(clients: &Clients, host: &str, rack: &str) -> Result<v1::Host, tonic::Status> {
    let host = v1::Host {
        name: host.into(),
        labels: [("rack".to_owned(), rack.to_owned())].into(),
        ..Default::default()
    };
    change(clients, "labels", host).await
}

async fn group(clients: &Clients, name: &str, rule: PlacementRule, key: &str, preferred: bool) {
    let request = v1::CreatePlacementGroupRequest {
        placement_group: Some(v1::PlacementGroup {
            name: name.into(),
            rule: rule.into(),
            topology_key: key.into(),
            preferred,
            ..Default::default()
        }),
        request_id: request_id(),
    };
    let made = clients.clone().placement.create_placement_group(request).await;
    assert_eq!(made.unwrap().into_inner().name, name);
}

fn named(name: &str, groups: &[&str]) -> v1::CreateVmRequest {
    let mut request = create(name);
    if let Some(vm) = &mut request.vm {
        vm.placement_groups = groups.iter().map(|group| (*group).to_owned()).collect();
    }
    request
}

/// Makes a running VM and tells its host.
async fn made(clients: &mut Clients, request: v1::CreateVmRequest) -> String {
    let name = request.vm.as_ref().unwrap().name.clone();
    let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let running = || async { clients.clone().vm(&name).await.status.unwrap().state() == VmState::Running };
    eventually("it runs", running).await;
    place(clients, &name).await
}

async fn place(clients: &Clients, vm: &str) -> String {
    clients.clone().vm(vm).await.status.unwrap().host
}

async fn join(clients: &Clients, vm: &str, groups: &[&str]) -> Result<v1::Vm, tonic::Status> {
    let request = v1::UpdateVmRequest {
        vm: Some(v1::Vm {
            name: vm.into(),
            placement_groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["placement_groups".into()],
        }),
        ignore_protection: false,
        request_id: request_id(),
    };
    Ok(clients.clone().vms.update_vm(request).await?.into_inner())
}

/// Three hosts, h1 and h2 in rack a, h3 in rack b.
async fn racks(clients: &Clients) {
    for (host, of) in [("h1", "a"), ("h2", "a"), ("h3", "b")] {
        rack(clients, host, of).await.unwrap();
    }
}

#[tokio::test]
async fn creations_at_the_same_time_are_kept_apart_and_one_too_many_is_refused_by_name() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    racks(&clients).await;
    group(&clients, "apart", PlacementRule::AntiAffinity, "rack", false).await;
    let all = ["w1", "w2", "w3"].map(|name| {
        let mut vms = clients.vms.clone();
        async move { vms.create_vm(named(name, &["apart"])).await }
    });
    let outcomes = futures::future::join_all(all).await;
    let (good, bad): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((good.len(), bad.len()), (2, 1));
    for status in bad.into_iter().filter_map(Result::err) {
        let text = status.message().to_owned();
        assert_eq!(reason(Err::<(), _>(status)), "PLACEMENT_CONFLICT");
        assert!(
            text.starts_with("group apart has more members than there are domains"),
            "{text}"
        );
    }
    for operation in good.into_iter().filter_map(Result::ok) {
        clients.succeeded(operation.into_inner()).await;
    }
    let list = clients.vms.list_vms(v1::ListVmsRequest::default()).await.unwrap();
    let vms = list.into_inner().vms;
    let on_b = |vm: &&v1::Vm| vm.status.as_ref().unwrap().host == "h3";
    assert_eq!((vms.len(), vms.iter().filter(on_b).count()), (2, 1));
    let get = v1::GetPlacementGroupRequest { name: "apart".into() };
    let group = clients
        .placement
        .get_placement_group(get)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(group.vms.len(), 2);
}

#[tokio::test]
async fn a_rule_by_a_label_that_no_host_has_is_refused_when_it_is_written() {
    let mut site = Site::new(2).await;
    let clients = site.start().await;
    group(&clients, "early", PlacementRule::AntiAffinity, "", false).await;
    let ask = |name: &str, preferred| v1::CreatePlacementGroupRequest {
        placement_group: Some(v1::PlacementGroup {
            name: name.into(),
            rule: PlacementRule::Affinity.into(),
            topology_key: "rack".into(),
            preferred,
            ..Default::default()
        }),
        request_id: request_id(),
    };
    let mut placement = clients.clone().placement;
    let refused = placement
        .create_placement_group(ask("g", false))
        .await
        .unwrap_err();
    assert!(
        refused
            .message()
            .starts_with("no host has a label rack, by which group g would go"),
        "{}",
        refused.message()
    );
    assert_eq!(reason(Err::<(), _>(refused)), "PLACEMENT_CONFLICT");
    placement.create_placement_group(ask("soft", true)).await.unwrap();
    // What it says to do helps.
    rack(&clients, "h1", "a").await.unwrap();
    placement.create_placement_group(ask("g", false)).await.unwrap();
}

#[tokio::test]
async fn migrations_updates_and_labels_keep_the_rules_and_a_group_in_use_stays() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    racks(&clients).await;
    group(&clients, "apart", PlacementRule::AntiAffinity, "rack", false).await;
    let mut request = named("w1", &["apart"]);
    request.host = "h1".into();
    made(&mut clients, request).await;
    assert_eq!(made(&mut clients, named("w2", &["apart"])).await, "h3");
    // Within its own rack only.
    let mut moving = migrate("w1");
    moving.destination_host = "h3".into();
    let refused = clients.vms.migrate_vm(moving).await.unwrap_err();
    assert!(
        refused.message().contains("VM w2 of group apart is on rack b"),
        "{}",
        refused.message()
    );
    let operation = clients.vms.migrate_vm(migrate("w1")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    assert_eq!(place(&clients, "w1").await, "h2");
    // A VM that is beside one of them cannot join.
    let mut beside = create("w3");
    beside.host = "h3".into();
    made(&mut clients, beside).await;
    let refused = join(&clients, "w3", &["apart"]).await.unwrap_err();
    let text = refused.message().to_owned();
    assert_eq!(reason(Err::<(), _>(refused)), "PLACEMENT_CONFLICT");
    assert!(text.contains("more members than there are domains"), "{text}");
    assert_eq!(
        reason(join(&clients, "w3", &["none"]).await),
        "PLACEMENT_GROUP_NOT_FOUND"
    );
    // Nor may its rack be called otherwise.
    let refused = rack(&clients, "h3", "a").await.unwrap_err();
    assert!(
        refused.message().contains("VMs w1 and w2 are both on rack a"),
        "{}",
        refused.message()
    );
    rack(&clients, "h1", "c").await.unwrap();
    let refused = join(&clients, "w3", &["apart"]).await.unwrap_err();
    assert_eq!(
        refused.message(),
        "w3 is on host h3, and there VM w2 of group apart is on rack b: migrate it first, or make it anew in the group"
    );
    let gone = |name: &str| v1::DeletePlacementGroupRequest {
        name: name.into(),
        request_id: request_id(),
    };
    let refused = clients.placement.delete_placement_group(gone("apart")).await;
    assert_eq!(reason(refused), "PLACEMENT_GROUP_IN_USE");
    assert!(
        join(&clients, "w1", &[])
            .await
            .unwrap()
            .placement_groups
            .is_empty()
    );
    let operation = clients.vms.delete_vm(delete("w2")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    clients
        .placement
        .delete_placement_group(gone("apart"))
        .await
        .unwrap();
    let list = v1::ListPlacementGroupsRequest::default();
    let list = clients.placement.list_placement_groups(list).await.unwrap();
    assert!(list.into_inner().placement_groups.is_empty());
}

#[tokio::test]
async fn what_is_together_is_moved_together_by_a_drain_and_brought_back() {
    let mut site = Site::new(3).await;
    let mut clients = site.start().await;
    group(&clients, "near", PlacementRule::Affinity, "", false).await;
    let mut request = named("a", &["near"]);
    request.host = "h1".into();
    made(&mut clients, request).await;
    assert_eq!(made(&mut clients, named("b", &["near"])).await, "h1");
    assert_eq!(made(&mut clients, named("c", &["near"])).await, "h1");
    let refused = clients.vms.migrate_vm(migrate("b")).await.unwrap_err();
    let text = refused.message().to_owned();
    assert_eq!(reason(Err::<(), _>(refused)), "PLACEMENT_CONFLICT");
    assert!(text.contains("group near keeps it together with VM a"), "{text}");
    let drain = v1::DrainHostRequest {
        name: "h1".into(),
        deadline_seconds: 60,
        ..Default::default()
    };
    clients.hosts.drain_host(drain).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    let new = place(&clients, "a").await;
    assert_ne!(new, "h1");
    for vm in ["b", "c"] {
        assert_eq!(place(&clients, vm).await, new);
    }
    let restore = v1::RestoreHostRequest {
        name: "h1".into(),
        ..Default::default()
    };
    clients.hosts.restore_host(restore).await.unwrap();
    let restored = over(&clients, "h1").await;
    assert_eq!(restored.state(), DrainState::Done, "{restored:?}");
    for vm in ["a", "b", "c"] {
        assert_eq!(place(&clients, vm).await, "h1");
    }
}

async fn over(clients: &Clients, name: &str) -> v1::HostDrain {
    let drain = || async {
        let request = v1::GetHostRequest { name: name.into() };
        let host = clients.clone().hosts.get_host(request).await.unwrap();
        host.into_inner().drain.unwrap()
    };
    eventually("the drain ends", || async { drain().await.end_time.is_some() }).await;
    drain().await
}

#[tokio::test]
async fn a_tainted_host_takes_who_tolerates_it_and_capacity_counts_as_creations_do() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let taint = |soft| v1::Host {
        name: "h1".into(),
        taints: vec![v1::Taint {
            key: "use".into(),
            value: "db".into(),
            soft,
        }],
        ..Default::default()
    };
    assert_eq!(
        change(&clients, "taints", taint(false))
            .await
            .unwrap()
            .taints
            .len(),
        1
    );
    let tolerations = || {
        vec![v1::Toleration {
            key: "use".into(),
            value: String::new(),
        }]
    };
    let ask = |tolerations| v1::EstimateCapacityRequest {
        vcpus: 1,
        memory_mib: 1024,
        tolerations,
        keep_domains: 1,
        ..Default::default()
    };
    let one = clients
        .placement
        .estimate_capacity(ask(Vec::new()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((one.domains.len(), one.vms_keeping), (1, 0));
    let both = clients
        .placement
        .estimate_capacity(ask(tolerations()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((both.domains.len(), both.vms), (2, 2 * one.vms));
    assert_eq!(both.vms_keeping, one.vms);
    let sized = |number: u64, tolerations: Vec<v1::Toleration>| {
        let mut request = create(&format!("vm{number}"));
        request.stopped = true;
        let vm = request.vm.as_mut().unwrap();
        vm.tolerations = tolerations;
        let spec = vm.spec.as_mut().unwrap();
        (spec.vcpus, spec.memory_mib) = (1, 1024);
        request
    };
    for number in 0..one.vms {
        let operation = clients
            .vms
            .create_vm(sized(number, Vec::new()))
            .await
            .unwrap()
            .into_inner();
        clients.succeeded(operation).await;
        assert_eq!(place(&clients, &format!("vm{number}")).await, "h2");
    }
    let refused = clients
        .vms
        .create_vm(sized(one.vms, Vec::new()))
        .await
        .unwrap_err();
    assert!(refused.message().contains("TAINT 1"), "{}", refused.message());
    let operation = clients
        .vms
        .create_vm(sized(one.vms, tolerations()))
        .await
        .unwrap()
        .into_inner();
    clients.succeeded(operation).await;
    assert_eq!(place(&clients, &format!("vm{}", one.vms)).await, "h1");
    // One that only makes it worse keeps nobody away.
    change(&clients, "taints", taint(true)).await.unwrap();
    let operation = clients
        .vms
        .create_vm(sized(99, Vec::new()))
        .await
        .unwrap()
        .into_inner();
    clients.succeeded(operation).await;
    assert_eq!(place(&clients, "vm99").await, "h1");
}
