//! The operator API: what it refuses, what it remembers, and how its lists and streams are read.

use std::collections::BTreeSet;

use dalgu_proto::{
    agent::v1::{RegisterRequest, registrar_service_client::RegistrarServiceClient},
    tls::{self, Identity},
    v1::{self, vm_service_client::VmServiceClient},
};
use futures::future::join_all;
use prost_types::FieldMask;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::site::{Clients, Site, create, delete, eventually, reason, request_id, spec, start, stop};

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
    let huge = v1::Vm {
        description: "x".repeat(10 << 20),
        ..create("web").vm.unwrap()
    };
    let status = clients
        .vms
        .create_vm(v1::CreateVmRequest {
            vm: Some(huge),
            ..Default::default()
        })
        .await;
    assert_eq!(status.expect_err("10 MB").code(), Code::OutOfRange);
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

async fn list(clients: &mut Clients) -> v1::ListVmsResponse {
    clients
        .vms
        .list_vms(v1::ListVmsRequest::default())
        .await
        .unwrap()
        .into_inner()
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
        &["spec.vcpus"][..],
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
async fn lists_come_in_pages_that_cover_all_once() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    for number in 0..7 {
        let mut request = create(&format!("vm{number}"));
        request
            .vm
            .as_mut()
            .unwrap()
            .labels
            .insert("even".into(), (number % 2 == 0).to_string());
        clients.vms.create_vm(request).await.unwrap();
    }
    let (mut token, mut seen) = (String::new(), vec![]);
    loop {
        let request = v1::ListVmsRequest {
            page_size: 3,
            page_token: token,
            ..Default::default()
        };
        let page = clients.vms.list_vms(request).await.unwrap().into_inner();
        assert!(page.vms.len() <= 3);
        seen.extend(page.vms.into_iter().map(|vm| vm.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
        let other = v1::ListVmsRequest {
            host: "h1".into(),
            page_token: token.clone(),
            ..Default::default()
        };
        assert_eq!(reason(clients.vms.list_vms(other).await), "INVALID_FIELD");
    }
    assert_eq!(seen, (0..7).map(|n| format!("vm{n}")).collect::<Vec<_>>());
    let label_selector = [("even".to_owned(), "true".to_owned())].into();
    let even = clients
        .vms
        .list_vms(v1::ListVmsRequest {
            label_selector,
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(even.get_ref().vms.len(), 4);
    assert_eq!(
        reason(
            clients
                .vms
                .list_vms(v1::ListVmsRequest {
                    page_size: -1,
                    ..Default::default()
                })
                .await
        ),
        "INVALID_FIELD"
    );

    let mut names = vec![];
    let mut token = String::new();
    loop {
        let request = v1::ListOperationsRequest {
            page_size: 2,
            page_token: token,
            ..Default::default()
        };
        let page = clients
            .operations
            .list_operations(request)
            .await
            .unwrap()
            .into_inner();
        names.extend(page.operations.into_iter().map(|operation| operation.vm));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(
        names,
        (0..7).rev().map(|n| format!("vm{n}")).collect::<Vec<_>>(),
        "newest first"
    );
    let page = clients
        .events
        .list_events(v1::ListEventsRequest {
            page_size: 5,
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    let versions: Vec<_> = page.events.iter().map(|event| event.resource_version).collect();
    assert!(versions.windows(2).all(|pair| pair[0] > pair[1]), "{versions:?}");
}

#[tokio::test]
async fn a_watch_can_be_taken_up_again_without_missing_anything() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let from = list(&mut clients).await.resource_version;
    let watch = |after: u64| v1::WatchEventsRequest {
        after_resource_version: after,
        subject: "web".into(),
        ..Default::default()
    };
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let mut first = clients
        .events
        .watch_events(watch(from))
        .await
        .unwrap()
        .into_inner();
    let mut seen = vec![];
    while seen
        .last()
        .is_none_or(|(_, reason)| reason != "OperationSucceeded")
    {
        let event = first.message().await.unwrap().unwrap();
        assert!(event.object.is_some(), "{event:?}");
        seen.push((event.resource_version, event.reason));
    }
    drop(first);
    let reasons: BTreeSet<_> = seen.iter().map(|(_, reason)| reason.as_str()).collect();
    assert_eq!(
        reasons,
        ["VmCreated", "OperationStarted", "VmRunning", "OperationSucceeded"].into()
    );
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0));

    site.kill();
    let mut clients = site.start().await;
    let mut again = clients
        .events
        .watch_events(watch(seen[0].0))
        .await
        .unwrap()
        .into_inner();
    for expected in &seen[1..] {
        let event = again.message().await.unwrap().unwrap();
        assert_eq!(
            (event.resource_version, event.reason),
            *expected,
            "the same after a restart"
        );
    }
    let stopping = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    assert_eq!(
        again.message().await.unwrap().unwrap().reason,
        "VmStopping",
        "and on to what is new"
    );
    clients.succeeded(stopping).await;
    let ahead = clients.events.watch_events(watch(1 << 40)).await.map(|_| ());
    assert_eq!(reason(ahead), "RESOURCE_VERSION_EXPIRED");
}

#[tokio::test]
async fn placement_explains_itself_before_and_after() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let ask = |memory_mib: u64| v1::ExplainPlacementRequest {
        subject: Some(v1::explain_placement_request::Subject::Spec(v1::VmSpec {
            memory_mib,
            ..spec()
        })),
        host: String::new(),
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
        host: String::new(),
    };
    let moving = clients
        .placement
        .explain_placement(moving)
        .await
        .unwrap()
        .into_inner();
    assert_ne!(moving.host, kept.host);
}

#[tokio::test]
async fn each_service_is_for_those_it_is_meant_for() {
    let mut site = Site::new(1).await;
    site.start().await;
    let endpoint = site.endpoint();
    let operator = site.channel(&endpoint, "admin").await.unwrap();
    let own = Identity::load_dir(&site.dir.path().join("h1"), "agent").unwrap();
    let agent = tls::client::connect(&endpoint, tls::CONTROLLER_NAME, &own)
        .await
        .unwrap();

    let refused = VmServiceClient::new(agent.clone())
        .get_vm(v1::GetVmRequest { name: "web".into() })
        .await;
    assert_eq!(reason(refused), "NOT_OPERATOR");
    let register = |host: &str| RegisterRequest {
        host: host.into(),
        address: "h:1".into(),
        ..Default::default()
    };
    let refused = RegistrarServiceClient::new(operator.clone())
        .register(register("h1"))
        .await;
    assert_eq!(reason(refused), "NOT_AGENT");
    let refused = RegistrarServiceClient::new(agent.clone())
        .register(register("h2"))
        .await;
    assert_eq!(reason(refused), "WRONG_HOST");

    for channel in [&operator, &agent] {
        let health = HealthClient::new(channel.clone())
            .check(HealthCheckRequest::default())
            .await
            .unwrap();
        assert_eq!(health.get_ref().status, 1);
        let ask = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let stream = futures::stream::iter([ask]);
        let mut answers = ServerReflectionClient::new(channel.clone())
            .server_reflection_info(stream)
            .await
            .unwrap()
            .into_inner();
        let answer = answers
            .message()
            .await
            .unwrap()
            .unwrap()
            .message_response
            .unwrap();
        let MessageResponse::ListServicesResponse(list) = answer else {
            panic!("{answer:?}")
        };
        let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
        for name in [
            "dalgu.v1.VmService",
            "dalgu.v1.HostService",
            "dalgu.agent.v1.RegistrarService",
            "grpc.health.v1.Health",
        ] {
            assert!(names.contains(&name), "{names:?}");
        }
    }

    let other = Site::new(0).await;
    let stranger = other.channel(&endpoint, "admin").await;
    assert!(stranger.is_err(), "another site's operator");
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

#[tokio::test]
async fn the_metrics_page_shows_what_is_there() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let identity = Identity::load_dir(site.dir.path(), "admin").unwrap();
    let address = site.endpoint().trim_start_matches("https://").to_owned();
    let read = || async {
        let alpn = tls::ALPN_HTTP1;
        let mut io = tls::client::open_stream(&address, tls::CONTROLLER_NAME, &identity, alpn)
            .await
            .unwrap();
        io.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut page = String::new();
        io.read_to_string(&mut page).await.unwrap();
        page
    };
    let page = read().await;
    for line in [
        "dalgu_controller_vms{state=\"running\"} 1",
        "dalgu_controller_hosts{state=\"ready\"} 1",
        "dalgu_controller_operations{kind=\"create\",state=\"succeeded\"} 1",
        "dalgu_controller_host_vms_reserved{host=\"h1\"} 1",
        "dalgu_controller_host_memory_reserved_bytes{host=\"h1\"}",
        "dalgu_controller_store_commit_duration_seconds_count",
        "dalgu_controller_reconcile_passes_total",
    ] {
        assert!(page.contains(line), "{line} is not in\n{page}");
    }
    let deleted = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    let empty = || async { read().await.contains("dalgu_controller_vms{state=\"running\"} 0") };
    eventually("it is gone from the page", empty).await;
}
