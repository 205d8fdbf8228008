//! Room for the VMs of a host that fails: kept when VMs are made, there when it fails, and told wherever somebody looks.

use dalgu_controller::placement::Protect;
use dalgu_proto::v1::{self, DrainState, HostState, VmState, explain_placement_request::Subject};

use super::{
    drain::{drain, over, restore},
    site::{Clients, Site, create, delete, eventually, reason},
};

/// Of this size four fit on a host.
const MIB: u64 = 1600;

fn sized(name: &str) -> v1::CreateVmRequest {
    let mut request = create(name);
    if let Some(spec) = request.vm.as_mut().and_then(|vm| vm.spec.as_mut()) {
        spec.memory_mib = MIB;
    }
    request
}

async fn make(clients: &mut Clients, request: v1::CreateVmRequest) -> String {
    let name = request.vm.as_ref().unwrap().name.clone();
    let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let runs = || async { clients.clone().vm(&name).await.status.unwrap().state() == VmState::Running };
    eventually("it runs", runs).await;
    clients.vm(&name).await.status.unwrap().host
}

async fn capacity(clients: &Clients) -> v1::Capacity {
    let ask = v1::EstimateCapacityRequest {
        vcpus: 1,
        memory_mib: MIB,
        keep_domains: 1,
        ..Default::default()
    };
    let answer = clients.clone().placement.estimate_capacity(ask).await;
    answer.unwrap().into_inner()
}

/// A site of three hosts of which any one may fail, as full as it gets: eight VMs where twelve would fit.
async fn full() -> (Site, Clients) {
    let mut site = Site::new(3).await;
    site.protect = Protect::hosts();
    let mut clients = site.start().await;
    let empty = capacity(&clients).await;
    assert_eq!((empty.vms, empty.vms_keeping, empty.vms_protected), (12, 8, 8));
    assert_eq!(empty.protects, "each host");
    for number in 0..8 {
        make(&mut clients, sized(&format!("vm{number}"))).await;
    }
    let now = capacity(&clients).await;
    assert_eq!((now.vms, now.vms_protected, now.short_domains), (4, 0, vec![]));
    (site, clients)
}

#[tokio::test]
async fn a_protected_site_fills_until_a_host_could_not_fail_any_more_and_says_so() {
    let (_site, mut clients) = full().await;
    let refused = clients.vms.create_vm(sized("ninth")).await.unwrap_err();
    let text = refused.message().to_owned();
    assert_eq!(reason(Err::<(), _>(refused)), "NO_CAPACITY");
    for part in [
        "PROTECTION 3",
        "were host h",
        "vCPUs and ",
        "would find no room elsewhere",
        "--ignore-protection",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let spec = sized("any").vm.unwrap().spec.unwrap();
    let mut ask = v1::ExplainPlacementRequest {
        subject: Some(Subject::Spec(spec)),
        ..Default::default()
    };
    let explained = clients
        .placement
        .explain_placement(ask.clone())
        .await
        .unwrap()
        .into_inner();
    let lacks: Vec<_> = explained
        .verdicts
        .iter()
        .flat_map(|verdict| &verdict.shortfalls)
        .collect();
    assert_eq!(lacks.len(), 3, "{lacks:?}");
    assert!(
        lacks
            .iter()
            .all(|lack| lack.constraint == "PROTECTION" && lack.needed > MIB),
        "{lacks:?}"
    );
    ask.ignore_protection = true;
    let explained = clients
        .placement
        .explain_placement(ask)
        .await
        .unwrap()
        .into_inner();
    assert!(explained.ignored_protection && !explained.host.is_empty());
    // Whoever is told so may have the room, and that is kept with the decision.
    let mut told = sized("ninth");
    told.ignore_protection = true;
    make(&mut clients, told).await;
    let decision = clients
        .placement
        .get_placement(v1::GetPlacementRequest { vm: "ninth".into() })
        .await;
    assert!(decision.unwrap().into_inner().ignored_protection);
    let now = capacity(&clients).await;
    assert!(
        now.short_domains.iter().any(|short| short.memory_mib > MIB),
        "{now:?}"
    );
    let deleted = clients.vms.delete_vm(delete("ninth")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    let kept = || async { capacity(&clients).await.short_domains.is_empty() };
    eventually("room is there again", kept).await;
}

#[tokio::test]
async fn a_host_fails_and_its_vms_can_all_be_placed_elsewhere() {
    let (site, mut clients) = full().await;
    let mut lost = Vec::new();
    for number in 0..8 {
        let name = format!("vm{number}");
        if clients.vm(&name).await.status.unwrap().host == "h1" {
            lost.push(name);
        }
    }
    assert!(lost.len() >= 2, "{lost:?}");
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let gone = || async {
        let host = clients
            .clone()
            .hosts
            .get_host(v1::GetHostRequest { name: "h1".into() })
            .await;
        host.unwrap().into_inner().state() == HostState::Unreachable
    };
    eventually("the host is lost", gone).await;
    // What is kept for them is not given to others.
    let other = clients.vms.create_vm(sized("other")).await.unwrap_err();
    assert!(other.message().contains("to fail then"), "{}", other.message());
    for name in &lost {
        let mut again = sized(&format!("{name}-again"));
        again.ignore_protection = true;
        assert_ne!(make(&mut clients, again).await, "h1");
    }
}

#[tokio::test]
async fn a_host_of_a_full_protected_site_is_drained_and_gets_its_vms_back() {
    let (_site, mut clients) = full().await;
    clients.hosts.drain_host(drain("h1")).await.unwrap();
    let drained = over(&clients, "h1").await;
    assert_eq!(drained.state(), DrainState::Done, "{drained:?}");
    let moved = drained.vms.len();
    assert!(moved >= 2, "{drained:?}");
    clients.hosts.restore_host(restore("h1")).await.unwrap();
    let restored = over(&clients, "h1").await;
    assert_eq!(
        (restored.state(), restored.vms.len()),
        (DrainState::Done, moved),
        "{restored:?}"
    );
    assert_eq!(capacity(&clients).await.short_domains, vec![]);
}
