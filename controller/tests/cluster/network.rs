//! Networks and security groups are made, told to hosts, followed by VMs that move, and go.

mod hostile;

use dalgu_proto::v1::{self, Network, SecurityGroup};
use prost_types::FieldMask;

use super::{
    networks::DELAY_MS,
    site::{Clients, Site, create, delete, eventually, migrate, reason, request_id},
};

pub fn field() -> Network {
    let subnet = |cidr: &str| v1::Subnet {
        cidr: cidr.into(),
        ..Default::default()
    };
    Network {
        name: "field".into(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork::default())),
        ipv4: Some(subnet("10.20.0.0/24")),
        ipv6: Some(subnet("fd00:20::/64")),
        ..Default::default()
    }
}

fn office(bridge: &str) -> Network {
    let kind = v1::BridgeNetwork {
        bridge: bridge.into(),
        vlan: 0,
    };
    Network {
        name: "office".into(),
        kind: Some(v1::network::Kind::Bridge(kind)),
        ..field()
    }
}

fn group(name: &str) -> SecurityGroup {
    SecurityGroup {
        name: name.into(),
        rules: vec![ssh()],
        ..Default::default()
    }
}

fn ssh() -> v1::SecurityRule {
    v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::Tcp.into(),
        first_port: 22,
        ..Default::default()
    }
}

fn from_group(group: &str) -> v1::SecurityRule {
    v1::SecurityRule {
        remote: Some(v1::security_rule::Remote::Group(group.into())),
        ..ssh()
    }
}

pub fn new(network: Network) -> v1::CreateNetworkRequest {
    v1::CreateNetworkRequest {
        network: Some(network),
        ..Default::default()
    }
}

fn new_group(group: SecurityGroup) -> v1::CreateSecurityGroupRequest {
    v1::CreateSecurityGroupRequest {
        security_group: Some(group),
        ..Default::default()
    }
}

fn mask(paths: &[&str]) -> Option<FieldMask> {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    Some(FieldMask { paths })
}

pub fn plug(network: &str, groups: &[&str]) -> v1::Nic {
    v1::Nic {
        name: "eth0".into(),
        network: network.into(),
        security_groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        ..Default::default()
    }
}

pub fn with(vm: &str, host: &str, nic: v1::Nic) -> v1::CreateVmRequest {
    let mut request = create(vm);
    request.vm.as_mut().unwrap().spec.as_mut().unwrap().nics = vec![nic];
    request.host = host.into();
    request
}

/// A site whose hosts offer networks, with the network field and the group ssh.
async fn site(hosts: usize) -> (Site, Clients) {
    let mut site = Site::new(hosts).await;
    for host in site.fabric.lock().hosts.values_mut() {
        host.networks.offered = true;
    }
    let mut clients = site.start().await;
    clients.networks.create_network(new(field())).await.unwrap();
    clients
        .networks
        .create_security_group(new_group(group("ssh")))
        .await
        .unwrap();
    (site, clients)
}

async fn made(clients: &mut Clients, request: v1::CreateVmRequest) -> v1::Nic {
    let name = request.vm.as_ref().unwrap().name.clone();
    let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    clients.vm(&name).await.spec.unwrap().nics[0].clone()
}

/// Peers, interfaces and groups that a host was told of the network field; `None` where it was told nothing of it.
fn told(site: &Site, host: &str) -> Option<(Vec<String>, Vec<String>, Vec<String>)> {
    let world = site.fabric.lock();
    let networks = &world.hosts[host].networks;
    let part = networks.part("field")?;
    let interfaces = part
        .interfaces
        .iter()
        .map(|one| format!("{} {}", one.vm, one.ipv4_address));
    let groups = &networks.told.as_ref()?.security_groups;
    let groups = groups
        .iter()
        .map(|group| format!("{} {}", group.name, group.rules.len()));
    Some((part.peers.clone(), interfaces.collect(), groups.collect()))
}

async fn until_told(site: &Site, host: &str, peers: &[&str], interfaces: &[&str], groups: &[&str]) {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let wanted = Some((texts(peers), texts(interfaces), texts(groups)));
    let so = || async { told(site, host) == wanted };
    eventually(&format!("{host} knows {wanted:?}"), so).await;
}

async fn get(clients: &Clients, name: &str) -> Network {
    let request = v1::GetNetworkRequest { name: name.into() };
    clients
        .networks
        .clone()
        .get_network(request)
        .await
        .unwrap()
        .into_inner()
}

#[tokio::test]
async fn hosts_are_told_what_their_vms_networks_are_and_of_each_change() {
    let (site, mut clients) = site(3).await;
    let first = made(&mut clients, with("web", "h1", plug("field", &["ssh"]))).await;
    assert_eq!(
        (first.ipv4_address.as_str(), first.ipv6_address.as_str()),
        ("10.20.0.1", "fd00:20::1")
    );
    until_told(&site, "h1", &[], &["web 10.20.0.1"], &["ssh 1"]).await;
    made(&mut clients, with("db", "h2", plug("field", &[]))).await;
    let both = ["db 10.20.0.2", "web 10.20.0.1"];
    until_told(&site, "h1", &["192.0.2.2"], &both, &["ssh 1"]).await;
    until_told(&site, "h2", &["192.0.2.1"], &both, &["ssh 1"]).await;
    assert_eq!(told(&site, "h3"), None, "it has no VM there");

    let more = v1::UpdateSecurityGroupRequest {
        security_group: Some(SecurityGroup {
            rules: vec![ssh(), from_group("ssh")],
            ..group("ssh")
        }),
        update_mask: mask(&["rules"]),
        ..Default::default()
    };
    clients.networks.update_security_group(more).await.unwrap();
    until_told(&site, "h2", &["192.0.2.1"], &both, &["ssh 2"]).await;

    let operation = clients.vms.delete_vm(delete("db")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    until_told(&site, "h1", &[], &["web 10.20.0.1"], &["ssh 2"]).await;
    eventually("the host lets it go", || async { told(&site, "h2").is_none() }).await;
    let again = made(&mut clients, with("db", "h2", plug("field", &[]))).await;
    assert_eq!(again.ipv4_address, "10.20.0.2", "it was free again");
    let world = site.fabric.lock();
    for (name, host) in &world.hosts {
        let versions = &host.networks.versions;
        assert!(versions.is_sorted_by(|a, b| a < b), "{name}: {versions:?}");
    }
    let third = &world.hosts["h3"].networks.versions;
    assert_eq!(third.len(), 1, "nothing concerned it after its start: {third:?}");
}

#[tokio::test]
async fn a_host_that_could_not_do_it_is_told_again_and_a_new_run_of_its_agent_or_of_the_controller_too() {
    let (mut site, mut clients) = site(2).await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().networks.broken = true;
    let operation = clients.vms.create_vm(with("web", "h1", plug("field", &[]))).await;
    let tried = || async {
        let told = site.fabric.lock().hosts["h1"]
            .commands
            .get("ApplyNetworks")
            .copied();
        told.is_some_and(|times| times > 2)
    };
    eventually("it is told again", tried).await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().networks.broken = false;
    clients.succeeded(operation.unwrap().into_inner()).await;

    site.kill();
    let before = site.fabric.lock().hosts["h1"].networks.versions.clone();
    site.start().await;
    let told_anew = || async {
        let world = site.fabric.lock();
        let versions = &world.hosts["h1"].networks.versions;
        versions.len() > before.len() && versions.last() > before.last()
    };
    eventually("it is told by the new controller", told_anew).await;
    until_told(&site, "h1", &[], &["web 10.20.0.1"], &[]).await;
}

#[tokio::test]
async fn a_vm_takes_its_addresses_along_and_all_hosts_know_before_it_is_sent() {
    let (site, mut clients) = site(3).await;
    let nic = made(&mut clients, with("web", "h1", plug("field", &["ssh"]))).await;
    made(&mut clients, with("db", "h2", plug("field", &[]))).await;
    until_told(
        &site,
        "h2",
        &["192.0.2.1"],
        &["db 10.20.0.2", "web 10.20.0.1"],
        &["ssh 1"],
    )
    .await;
    for host in ["h2", "h3"] {
        site.fabric.lock().hosts.get_mut(host).unwrap().networks.broken = true;
    }
    let to = v1::MigrateVmRequest {
        destination_host: "h3".into(),
        ..migrate("web")
    };
    let moving = clients.vms.migrate_vm(to).await.unwrap().into_inner();
    let refused = || async { site.fabric.lock().hosts["h3"].networks.refused > 1 };
    eventually("the destination does not know the network", refused).await;
    site.fabric.lock().hosts.get_mut("h3").unwrap().networks.broken = false;
    let prepared = || async {
        site.fabric.lock().hosts["h3"]
            .transfers
            .values()
            .any(|t| t.incoming.is_some())
    };
    eventually("the destination is ready", prepared).await;
    // The other host of the network has not been told: its answers would go where the VM was.
    let tried = |site: &Site| site.fabric.lock().hosts["h2"].commands["ApplyNetworks"];
    let before = tried(&site);
    eventually("the other host is told again", || async { tried(&site) > before }).await;
    assert_eq!(
        site.fabric.lock().hosts["h1"].commands.get("StartMigration"),
        None
    );
    site.fabric.lock().hosts.get_mut("h2").unwrap().networks.broken = false;
    let ended = clients.succeeded(moving).await;
    let blackout = ended.migration.unwrap().network_blackout.unwrap();
    let expected = (DELAY_MS + 7) * 1_000_000;
    assert_eq!(
        (blackout.seconds, blackout.nanos),
        (0, i32::try_from(expected).unwrap())
    );
    let moved = clients.vm("web").await;
    assert_eq!(
        (moved.status.unwrap().host.as_str(), &moved.spec.unwrap().nics[0]),
        ("h3", &nic)
    );
    until_told(
        &site,
        "h2",
        &["192.0.2.3"],
        &["db 10.20.0.2", "web 10.20.0.1"],
        &["ssh 1"],
    )
    .await;
    let interfaces = v1::ListNetworkInterfacesRequest {
        network: "field".into(),
        ..Default::default()
    };
    let listed = clients
        .networks
        .list_network_interfaces(interfaces)
        .await
        .unwrap()
        .into_inner();
    let hosts: Vec<_> = listed
        .interfaces
        .iter()
        .map(|one| (one.vm.as_str(), one.host.as_str()))
        .collect();
    assert_eq!(hosts, [("db", "h2"), ("web", "h3")]);
}

#[tokio::test]
async fn the_first_packet_is_waited_for_after_the_vm_has_moved_and_a_silent_host_holds_nothing_up() {
    let (site, mut clients) = site(3).await;
    made(&mut clients, with("web", "h1", plug("field", &[]))).await;
    made(&mut clients, with("db", "h3", plug("field", &[]))).await;
    {
        let mut world = site.fabric.lock();
        world.hosts.get_mut("h2").unwrap().networks.slow = true;
        world.hosts.get_mut("h3").unwrap().cut_off = true;
    }
    let lost = || async {
        let request = v1::GetHostRequest { name: "h3".into() };
        let host = clients
            .hosts
            .clone()
            .get_host(request)
            .await
            .unwrap()
            .into_inner();
        host.state() == v1::HostState::Unreachable
    };
    eventually("the third host is lost", lost).await;
    let to = v1::MigrateVmRequest {
        destination_host: "h2".into(),
        ..migrate("web")
    };
    let moving = clients.vms.migrate_vm(to).await.unwrap().into_inner();
    let ended = clients.succeeded(moving).await;
    assert!(ended.migration.unwrap().network_blackout.is_some());
}

#[tokio::test]
async fn types_of_icmp_are_only_where_agents_know_them() {
    let mut site = Site::new(2).await;
    for (name, host) in &mut site.fabric.lock().hosts {
        host.networks.offered = true;
        host.networks.old = name == "h2";
    }
    let mut clients = site.start().await;
    clients.networks.create_network(new(field())).await.unwrap();
    let ping = v1::SecurityRule {
        protocol: v1::Protocol::IcmpEchoRequest.into(),
        first_port: 0,
        ..ssh()
    };
    let pinged = |name: &str| SecurityGroup {
        rules: vec![ping.clone()],
        ..group(name)
    };
    for group in [group("ssh"), pinged("ping")] {
        clients
            .networks
            .create_security_group(new_group(group))
            .await
            .unwrap();
    }
    made(&mut clients, with("old", "h2", plug("field", &["ssh"]))).await;
    made(&mut clients, with("web", "", plug("field", &["ping"]))).await;
    assert_eq!(clients.vm("web").await.status.unwrap().host, "h1");
    // The old host goes on: it is told of the interface, and not of the group.
    until_told(
        &site,
        "h2",
        &["192.0.2.1"],
        &["old 10.20.0.1", "web 10.20.0.2"],
        &["ssh 1"],
    )
    .await;
    let refused = clients
        .vms
        .create_vm(with("other", "h2", plug("field", &["ping"])))
        .await;
    assert_eq!(reason(refused), "NO_CAPACITY");
    let to_old = v1::MigrateVmRequest {
        destination_host: "h2".into(),
        ..migrate("web")
    };
    assert_eq!(reason(clients.vms.migrate_vm(to_old).await), "NO_CAPACITY");
    let change = |name: &str| v1::UpdateSecurityGroupRequest {
        security_group: Some(pinged(name)),
        update_mask: mask(&["rules"]),
        ..Default::default()
    };
    let refused = clients.networks.update_security_group(change("ssh")).await;
    let message = refused.as_ref().unwrap_err().message().to_owned();
    assert!(message.contains("the agent of host h2"), "{message}");
    assert_eq!(reason(refused), "HOST_TOO_OLD");
    // What nobody has there may have them.
    let operation = clients.vms.delete_vm(delete("old")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    clients
        .networks
        .update_security_group(change("ssh"))
        .await
        .unwrap();
}

#[tokio::test]
async fn what_is_used_is_not_deleted_and_says_by_whom() {
    let (_site, mut clients) = site(1).await;
    clients
        .networks
        .create_security_group(new_group(SecurityGroup {
            name: "web".into(),
            rules: vec![from_group("ssh"), from_group("web")],
            ..Default::default()
        }))
        .await
        .unwrap();
    made(&mut clients, with("web", "h1", plug("field", &["web"]))).await;
    let network = v1::DeleteNetworkRequest {
        name: "field".into(),
        ..Default::default()
    };
    let group = |name: &str| v1::DeleteSecurityGroupRequest {
        name: name.into(),
        ..Default::default()
    };
    for (outcome, why, by) in [
        (
            clients.networks.delete_network(network.clone()).await.map(drop),
            "NETWORK_IN_USE",
            "web/eth0",
        ),
        (
            clients
                .networks
                .delete_security_group(group("web"))
                .await
                .map(drop),
            "SECURITY_GROUP_IN_USE",
            "web/eth0",
        ),
        (
            clients
                .networks
                .delete_security_group(group("ssh"))
                .await
                .map(drop),
            "SECURITY_GROUP_IN_USE",
            "rules of 1 groups name it, web",
        ),
    ] {
        let message = outcome.as_ref().unwrap_err().message().to_owned();
        assert!(message.contains(by), "{message}");
        assert_eq!(reason(outcome), why);
    }
    assert_eq!(get(&clients, "field").await.interfaces, 1);
    let operation = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    clients.networks.delete_network(network.clone()).await.unwrap();
    // Its own rule does not hold it.
    for name in ["web", "ssh"] {
        clients.networks.delete_security_group(group(name)).await.unwrap();
    }
    assert_eq!(
        reason(clients.networks.delete_network(network).await),
        "NETWORK_NOT_FOUND"
    );
}

#[tokio::test]
async fn a_request_is_done_once_and_a_change_by_somebody_else_is_not_overwritten() {
    let (_site, mut clients) = site(1).await;
    let id = request_id();
    let request = |name: &str| v1::CreateNetworkRequest {
        request_id: id.clone(),
        ..new(Network {
            name: name.into(),
            ..field()
        })
    };
    let first = clients
        .networks
        .create_network(request("other"))
        .await
        .unwrap()
        .into_inner();
    let again = clients
        .networks
        .create_network(request("other"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first, again);
    let Some(v1::network::Kind::Overlay(overlay)) = first.kind else {
        panic!("{first:?}")
    };
    assert_eq!(overlay.vni, 2, "the first free one");
    assert_eq!(
        reason(clients.networks.create_network(request("third")).await),
        "REQUEST_ID_REUSED"
    );
    let taken = clients.networks.create_network(new(field())).await;
    assert_eq!(reason(taken), "NETWORK_ALREADY_EXISTS");
    let vni = Network {
        name: "third".into(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork { vni: 2 })),
        ..field()
    };
    assert_eq!(
        reason(clients.networks.create_network(new(vni)).await),
        "VNI_IN_USE"
    );

    let change = |etag: &str, domain: &str| v1::UpdateNetworkRequest {
        network: Some(Network {
            name: "other".into(),
            etag: etag.into(),
            domain: domain.into(),
            ..Default::default()
        }),
        update_mask: mask(&["domain"]),
        ..Default::default()
    };
    let changed = clients
        .networks
        .update_network(change(&first.etag, "lan"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((changed.domain.as_str(), changed.mtu), ("lan", 1450));
    assert_ne!(changed.etag, first.etag);
    let late = clients.networks.update_network(change(&first.etag, "wan")).await;
    assert_eq!(reason(late), "ETAG_MISMATCH");
    let immutable = v1::UpdateNetworkRequest {
        update_mask: mask(&["mtu"]),
        ..change("", "lan")
    };
    assert_eq!(
        reason(clients.networks.update_network(immutable).await),
        "FIELD_NOT_MUTABLE"
    );

    let unknown = SecurityGroup {
        name: "web".into(),
        rules: vec![from_group("gone")],
        ..Default::default()
    };
    let unknown = clients.networks.create_security_group(new_group(unknown)).await;
    assert_eq!(reason(unknown), "SECURITY_GROUP_NOT_FOUND");
    let taken = clients
        .networks
        .create_security_group(new_group(group("ssh")))
        .await;
    assert_eq!(reason(taken), "SECURITY_GROUP_ALREADY_EXISTS");
}

#[tokio::test]
async fn a_vm_that_cannot_have_its_interface_is_refused_and_placement_explains_it() {
    let (_site, mut clients) = site(1).await;
    clients.networks.create_network(new(office("br9"))).await.unwrap();
    let tagged = Network {
        name: "guests".into(),
        kind: Some(v1::network::Kind::Bridge(v1::BridgeNetwork {
            bridge: "br0".into(),
            vlan: 12,
        })),
        ..field()
    };
    clients.networks.create_network(new(tagged)).await.unwrap();
    let asked = v1::Nic {
        ipv4_address: "10.20.0.7".into(),
        ..plug("field", &[])
    };
    made(&mut clients, with("web", "", asked.clone())).await;
    for (nic, why) in [
        (plug("gone", &[]), "NETWORK_NOT_FOUND"),
        (plug("field", &["gone"]), "SECURITY_GROUP_NOT_FOUND"),
        (asked, "ADDRESS_IN_USE"),
        (plug("office", &[]), "NO_CAPACITY"),
        (plug("guests", &[]), "NO_CAPACITY"),
    ] {
        for validate_only in [true, false] {
            let request = v1::CreateVmRequest {
                validate_only,
                ..with("new", "", nic.clone())
            };
            assert_eq!(reason(clients.vms.create_vm(request).await), why);
        }
    }
    for (network, constraint, text) in [
        ("office", "BRIDGE", "has no bridge br9"),
        ("guests", "FEATURE", "does not offer VLANs"),
    ] {
        let mut spec = super::site::spec();
        spec.nics = vec![plug(network, &[])];
        let request = v1::ExplainPlacementRequest {
            subject: Some(v1::explain_placement_request::Subject::Spec(spec)),
            ..Default::default()
        };
        let answer = clients
            .placement
            .explain_placement(request)
            .await
            .unwrap()
            .into_inner();
        let told = format!("{answer:?}");
        assert!(told.contains(constraint) && told.contains(text), "{told}");
    }
}

#[tokio::test]
async fn events_tell_of_networks_and_groups() {
    let (_site, mut clients) = site(1).await;
    let request = v1::ListEventsRequest {
        subject: "field".into(),
        ..Default::default()
    };
    let events = clients
        .events
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    assert_eq!(events.len(), 1);
    assert_eq!(
        (events[0].reason.as_str(), events[0].kind()),
        ("NetworkCreated", v1::EventKind::Network)
    );
    let Some(v1::event::Object::Network(network)) = &events[0].object else {
        panic!("{events:?}")
    };
    assert_eq!(network.name, "field");
    let request = v1::ListEventsRequest {
        subject: "ssh".into(),
        ..Default::default()
    };
    let events = clients
        .events
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    assert!(
        matches!(events[0].object, Some(v1::event::Object::SecurityGroup(_))),
        "{events:?}"
    );
}
