//! Target `rpc`: a sequence of requests to the controller's API, operators' and agents', on a site of two hosts.
//!
//! Promises: no request makes a panic or a nameless error; whatever is accepted can be read back from the store, adds up to
//! the same reservations, goes to an agent and is taken by it unchanged; lists by page are the list.

use dalgu_controller::store::memory::Disk;
use dalgu_proto::{
    agent::v1::{self as agent, registrar_service_server::RegistrarService},
    ids::HostName,
    v1::{
        self, event_service_server::EventService, host_service_server::HostService,
        network_service_server::NetworkService, operation_service_server::OperationService,
        placement_service_server::PlacementService, snapshot_service_server::SnapshotService,
        vm_service_server::VmService, volume_service_server::VolumeService,
    },
};
use prost_types::FieldMask;

use crate::{
    input::Input,
    site::{self, Site, answer, operator, wait},
};

/// Most requests of one input.
const REQUESTS: usize = 24;
/// Hosts that have registered.
pub const HOSTS: [&str; 2] = ["h1", "h2"];

const VMS: [&str; 4] = ["a", "b", "c", ""];
const NETWORKS: [&str; 2] = ["field", "office"];
const GROUPS: [&str; 2] = ["ssh", "web"];
const VOLUMES: [&str; 2] = ["ledger", "scratch"];
const SNAPSHOTS: [&str; 2] = ["before", "after"];
/// From this method number on: volumes.
const VOLUME_METHODS: u8 = 224;
/// From this method number on: snapshots.
const SNAPSHOT_METHODS: u8 = 240;
const REQUEST_IDS: [&str; 4] = [
    "",
    "00000000-0000-4000-8000-000000000001",
    "00000000-0000-4000-8000-000000000002",
    "x",
];

/// Takes one input.
pub fn run(data: &[u8]) {
    wait(async {
        let site = site().await;
        let mut input = Input::new(data);
        for sequence in 1..=REQUESTS as u64 {
            if input.is_empty() {
                break;
            }
            // A block that is no such message goes no further than the decoder.
            let _ = request(&site, &mut input, sequence).await;
        }
        pages(&site).await;
        site.check();
        // Watchers of events are still there; they go with this.
        site.services.stop.cancel();
        tokio::task::yield_now().await;
    });
}

/// A new site with its hosts.
pub async fn site() -> Site {
    let site = Site::open(Disk::default()).expect("an empty store can be read");
    for host in HOSTS {
        let call = site.services.register(site::agent(registration(host), host));
        assert!(answer(call).await.is_some(), "{host} was not taken in");
    }
    let made = site.services.create_network(operator(v1::CreateNetworkRequest {
        network: Some(network("field")),
        ..Default::default()
    }));
    assert!(answer(made).await.is_some(), "the network was not made");
    site
}

fn registration(host: &str) -> agent::RegisterRequest {
    const GIB: u64 = 1 << 30;
    let pool = |name: &str, shared| v1::StoragePool {
        name: name.into(),
        path: format!("/{name}"),
        shared,
        capacity_bytes: 100 * GIB,
        available_bytes: 100 * GIB,
        ..Default::default()
    };
    agent::RegisterRequest {
        host: host.into(),
        address: format!("{host}:7444"),
        boot_id: "boot".into(),
        agent_run_id: "run".into(),
        inventory: Some(v1::HostInventory {
            cpus: 8,
            memory_bytes: 16 * GIB,
            pools: vec![pool("local", false), pool("shared", true)],
            bridges: vec!["br0".into()],
            accelerator: "tcg".into(),
            guest_features: [
                v1::GuestFeature::Network,
                v1::GuestFeature::Overlay,
                v1::GuestFeature::Volume,
                v1::GuestFeature::Snapshot,
            ]
            .map(Into::into)
            .into(),
            overlay_address: "192.0.2.1".into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A network that is accepted.
pub fn network(name: &str) -> v1::Network {
    let subnet = |cidr: &str| v1::Subnet {
        cidr: cidr.into(),
        ..Default::default()
    };
    v1::Network {
        name: name.into(),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork::default())),
        ipv4: Some(subnet("10.20.0.0/29")),
        ipv6: Some(subnet("fd00:20::/64")),
        ..Default::default()
    }
}

/// A security group that is accepted.
fn group(name: &str) -> v1::SecurityGroup {
    let rule = v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::Tcp.into(),
        first_port: 22,
        remote: Some(v1::security_rule::Remote::Group(name.into())),
        ..Default::default()
    };
    v1::SecurityGroup {
        name: name.into(),
        rules: vec![rule],
        ..Default::default()
    }
}

/// A VM that is accepted.
pub fn vm(name: &str) -> v1::Vm {
    v1::Vm {
        name: name.into(),
        spec: Some(v1::VmSpec {
            vcpus: 1,
            memory_mib: 128,
            disks: vec![v1::Disk {
                name: "root".into(),
                size_mib: 16,
                pool: "shared".into(),
                ..Default::default()
            }],
            nics: vec![
                v1::Nic {
                    name: "eth0".into(),
                    bridge: "br0".into(),
                    ..Default::default()
                },
                v1::Nic {
                    name: "eth1".into(),
                    network: "field".into(),
                    ..Default::default()
                },
            ],
            kernel_boot: Some(v1::KernelBoot {
                kernel: "vmlinuz".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What a host says of a VM that does as it was told.
fn vm_report(site: &Site, name: &str) -> Option<agent::VmReport> {
    let state = site.state();
    let vm = state.vm_by_name(&name.parse().ok()?)?;
    Some(agent::VmReport {
        uid: vm.id.to_string(),
        name: name.into(),
        accepted_generation: vm.intent.generation.0,
        observed_generation: vm.intent.generation.0,
        epoch: vm.epoch.0,
        phase: agent::VmPhase::Settled.into(),
        power_state: v1::PowerState::from(vm.intent.power).into(),
        snapshots: vm
            .snapshots
            .wanted()
            .map(|snapshot| agent::SnapshotReport {
                number: snapshot.layer,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    })
}

/// Sends the next request: a method, a byte that chooses the names, and changes of the message. `None` when the changes are
/// no message.
#[allow(
    clippy::too_many_lines,
    reason = "one arm a method, each with its whole message"
)]
async fn request(site: &Site, input: &mut Input<'_>, sequence: u64) -> Option<()> {
    let (method, names) = (input.byte(), usize::from(input.byte()));
    let name = VMS[names & 3].to_owned();
    let host = HOSTS[names >> 2 & 1];
    let other = if names >> 3 & 1 == 1 {
        HOSTS[1 - (names >> 2 & 1)]
    } else {
        ""
    };
    let request_id = REQUEST_IDS[names >> 4 & 3].to_owned();
    let flag = names >> 6 & 1 == 1;
    let services = &site.services;
    let newest = || {
        site.state()
            .operations
            .keys()
            .next_back()
            .map(ToString::to_string)
            .unwrap_or_default()
    };
    macro_rules! call {
        ($method:ident, $base:expr) => {
            drop(answer(services.$method(operator(input.over($base)?))).await)
        };
    }
    let (net, security) = (
        NETWORKS[names >> 2 & 1].to_owned(),
        GROUPS[names >> 3 & 1].to_owned(),
    );
    if method >= SNAPSHOT_METHODS {
        return snapshots(site, input, method, names, request_id).await;
    }
    if method >= VOLUME_METHODS {
        return volumes(site, input, method, names, request_id).await;
    }
    match method % 32 {
        0..=2 => call!(
            create_vm,
            v1::CreateVmRequest {
                vm: Some(vm(&name)),
                host: other.into(),
                stopped: flag,
                request_id,
                ..Default::default()
            }
        ),
        3 => call!(
            update_vm,
            v1::UpdateVmRequest {
                vm: Some(vm(&name)),
                update_mask: mask(&["labels", "description"]),
                ignore_protection: false,
                request_id
            }
        ),
        4 => call!(
            delete_vm,
            v1::DeleteVmRequest {
                name,
                force: flag,
                request_id,
                ..Default::default()
            }
        ),
        5 => call!(
            start_vm,
            v1::StartVmRequest {
                name,
                request_id,
                ..Default::default()
            }
        ),
        6 => call!(
            stop_vm,
            v1::StopVmRequest {
                name,
                request_id,
                force: flag,
                ..Default::default()
            }
        ),
        7 => call!(
            restart_vm,
            v1::RestartVmRequest {
                name,
                request_id,
                ..Default::default()
            }
        ),
        8 => call!(
            pause_vm,
            v1::PauseVmRequest {
                name,
                request_id,
                ..Default::default()
            }
        ),
        9 => call!(
            resume_vm,
            v1::ResumeVmRequest {
                name,
                request_id,
                ..Default::default()
            }
        ),
        10 | 11 => call!(
            migrate_vm,
            v1::MigrateVmRequest {
                name,
                destination_host: other.into(),
                request_id,
                ..Default::default()
            }
        ),
        12 => call!(get_vm, v1::GetVmRequest { name }),
        13 => call!(
            list_vms,
            v1::ListVmsRequest {
                page_size: 2,
                host: other.into(),
                ..Default::default()
            }
        ),
        14 => call!(get_host, v1::GetHostRequest { name: host.into() }),
        15 => call!(
            list_hosts,
            v1::ListHostsRequest {
                page_size: 1,
                ..Default::default()
            }
        ),
        16 => call!(
            update_host,
            v1::UpdateHostRequest {
                host: Some(v1::Host {
                    name: host.into(),
                    cpu_overcommit_ratio: 2.0,
                    reserved_memory_mib: 1,
                    ..Default::default()
                }),
                update_mask: mask(&["labels", "cpu_overcommit_ratio", "reserved_memory_mib"]),
                request_id,
            }
        ),
        17 if flag => call!(
            cordon_host,
            v1::CordonHostRequest {
                name: host.into(),
                reason: "fuzz".into(),
                request_id
            }
        ),
        17 => call!(
            uncordon_host,
            v1::UncordonHostRequest {
                name: host.into(),
                request_id
            }
        ),
        18 => call!(
            delete_host,
            v1::DeleteHostRequest {
                name: host.into(),
                request_id
            }
        ),
        19 => call!(
            list_operations,
            v1::ListOperationsRequest {
                page_size: 2,
                active_only: flag,
                ..Default::default()
            }
        ),
        20 if flag => call!(
            wait_operation,
            v1::WaitOperationRequest {
                id: newest(),
                ..Default::default()
            }
        ),
        20 => call!(get_operation, v1::GetOperationRequest { id: newest() }),
        21 => call!(cancel_operation, v1::CancelOperationRequest { id: newest() }),
        22 if flag => call!(watch_events, v1::WatchEventsRequest::default()),
        22 => call!(
            list_events,
            v1::ListEventsRequest {
                page_size: 2,
                ..Default::default()
            }
        ),
        23 if flag => call!(get_placement, v1::GetPlacementRequest { vm: name }),
        23 => call!(
            explain_placement,
            v1::ExplainPlacementRequest {
                host: other.into(),
                subject: Some(v1::explain_placement_request::Subject::Spec(vm(&name).spec?)),
                ..Default::default()
            }
        ),
        25 if flag => call!(get_network, v1::GetNetworkRequest { name: net }),
        25 => call!(
            list_network_interfaces,
            v1::ListNetworkInterfacesRequest {
                network: net,
                page_size: 2,
                ..Default::default()
            }
        ),
        26 => call!(
            create_network,
            v1::CreateNetworkRequest {
                network: Some(network(&net)),
                request_id
            }
        ),
        27 if flag => call!(
            update_network,
            v1::UpdateNetworkRequest {
                network: Some(network(&net)),
                update_mask: mask(&["labels", "domain", "dns_servers"]),
                request_id
            }
        ),
        27 => call!(
            delete_network,
            v1::DeleteNetworkRequest {
                name: net,
                request_id,
                ..Default::default()
            }
        ),
        28 if flag => call!(list_networks, v1::ListNetworksRequest::default()),
        28 => call!(get_security_group, v1::GetSecurityGroupRequest { name: security }),
        29 => call!(
            create_security_group,
            v1::CreateSecurityGroupRequest {
                security_group: Some(group(&security)),
                request_id
            }
        ),
        30 if flag => call!(
            update_security_group,
            v1::UpdateSecurityGroupRequest {
                security_group: Some(group(&security)),
                update_mask: mask(&["rules", "labels"]),
                request_id
            }
        ),
        30 => call!(
            delete_security_group,
            v1::DeleteSecurityGroupRequest {
                name: security,
                request_id,
                ..Default::default()
            }
        ),
        24 => {
            let message = input.over(registration(host))?;
            let _ = answer(services.register(site::agent(message, host))).await;
        }
        _ => {
            let whole = agent::ReportRequest {
                host: host.into(),
                session: session(site, host),
                boot_id: "boot".into(),
                agent_run_id: "run".into(),
                sequence,
                inventory_complete: flag,
                ..Default::default()
            };
            let mut message = input.over(whole)?;
            if let Some(report) = vm_report(site, &name) {
                message.vms.push(input.over(report)?);
            }
            let _ = answer(services.report(site::agent(message, host))).await;
        }
    }
    Some(())
}

/// As [`request`], for volumes; some are attached to VMs.
async fn volumes(
    site: &Site,
    input: &mut Input<'_>,
    method: u8,
    names: usize,
    request_id: String,
) -> Option<()> {
    let services = &site.services;
    macro_rules! call {
        ($method:ident, $base:expr) => {
            drop(answer(services.$method(operator(input.over($base)?))).await)
        };
    }
    let name = VOLUMES[names >> 2 & 1].to_owned();
    let volume = v1::Volume {
        name: name.clone(),
        size_mib: 64,
        ..Default::default()
    };
    let etag = String::new();
    match method % 7 {
        0 | 1 => call!(
            create_volume,
            v1::CreateVolumeRequest {
                volume: Some(volume),
                request_id
            }
        ),
        2 => call!(
            update_volume,
            v1::UpdateVolumeRequest {
                volume: Some(v1::Volume {
                    size_mib: 128,
                    ..volume
                }),
                update_mask: mask(&["size_mib", "labels"]),
                request_id
            }
        ),
        3 => call!(
            delete_volume,
            v1::DeleteVolumeRequest {
                name,
                etag,
                request_id
            }
        ),
        4 => call!(
            undelete_volume,
            v1::UndeleteVolumeRequest {
                name,
                etag,
                request_id
            }
        ),
        5 => call!(get_volume, v1::GetVolumeRequest { name }),
        _ => {
            let mut vm = vm(VMS[names & 3]);
            vm.spec.get_or_insert_default().disks.push(v1::Disk {
                name: "data".into(),
                volume: name,
                ..Default::default()
            });
            call!(
                create_vm,
                v1::CreateVmRequest {
                    vm: Some(vm),
                    request_id,
                    ..Default::default()
                }
            );
        }
    }
    Some(())
}

/// As [`request`], for snapshots.
async fn snapshots(
    site: &Site,
    input: &mut Input<'_>,
    method: u8,
    names: usize,
    request_id: String,
) -> Option<()> {
    let services = &site.services;
    macro_rules! call {
        ($method:ident, $base:expr) => {
            drop(answer(services.$method(operator(input.over($base)?))).await)
        };
    }
    let vm = VMS[names & 3].to_owned();
    let name = SNAPSHOTS[names >> 2 & 1].to_owned();
    let etag = String::new();
    match method % 5 {
        0 => call!(
            create_snapshot,
            v1::CreateSnapshotRequest {
                snapshot: Some(v1::Snapshot {
                    name,
                    vm,
                    ..Default::default()
                }),
                request_id
            }
        ),
        1 => call!(
            delete_snapshot,
            v1::DeleteSnapshotRequest {
                vm,
                name,
                etag,
                request_id
            }
        ),
        2 => call!(
            revert_snapshot,
            v1::RevertSnapshotRequest {
                vm,
                name,
                discard_later: names >> 3 & 1 == 1,
                etag,
                request_id
            }
        ),
        3 => call!(get_snapshot, v1::GetSnapshotRequest { vm, name }),
        _ => call!(list_snapshots, v1::ListSnapshotsRequest { vm }),
    }
    Some(())
}

/// The session that an agent of this host would work in.
fn session(site: &Site, host: &str) -> u64 {
    let name: HostName = host.parse().expect("the hosts of the target have names");
    site.state().hosts.get(&name).map_or(1, |host| host.session.0)
}

fn mask(paths: &[&str]) -> Option<FieldMask> {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    Some(FieldMask { paths })
}

/// Every list, page by page, has what the list has as a whole.
pub async fn pages(site: &Site) {
    macro_rules! same {
        ($method:ident, $request:ident, $items:ident, $key:ident) => {
            let whole = answer(site.services.$method(operator(v1::$request {
                page_size: 1000,
                ..Default::default()
            })))
            .await;
            let whole: Vec<_> = whole
                .expect("a list is answered")
                .$items
                .into_iter()
                .map(|item| item.$key)
                .collect();
            let (mut page_token, mut paged) = (String::new(), Vec::new());
            loop {
                let ask = v1::$request {
                    page_size: 3,
                    page_token,
                    ..Default::default()
                };
                let page = answer(site.services.$method(operator(ask)))
                    .await
                    .expect("a page is answered");
                paged.extend(page.$items.into_iter().map(|item| item.$key));
                page_token = page.next_page_token;
                if page_token.is_empty() || paged.len() > whole.len() {
                    break;
                }
            }
            assert_eq!(paged, whole, "{}", stringify!($method));
        };
    }
    same!(list_vms, ListVmsRequest, vms, name);
    same!(list_hosts, ListHostsRequest, hosts, name);
    same!(list_operations, ListOperationsRequest, operations, id);
    same!(list_events, ListEventsRequest, events, resource_version);
    same!(list_networks, ListNetworksRequest, networks, name);
    same!(list_volumes, ListVolumesRequest, volumes, name);
    same!(
        list_security_groups,
        ListSecurityGroupsRequest,
        security_groups,
        name
    );
}
