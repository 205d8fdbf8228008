//! What the port bears: sizes, numbers and times, and what is told to those who come up against them.

use std::time::Duration;

use dalgu_controller::server::limits::Limits;
use dalgu_proto::{
    agent::v1::{ReportRequest, registrar_service_client::RegistrarServiceClient},
    tls::{self, Identity},
    v1,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    time::{Instant, timeout},
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};

use crate::site::{Clients, Site, create, eventually, reason};

fn is_too_large(what: &str, status: &Status) {
    use tonic_types::StatusExt;
    assert_eq!(status.code(), Code::ResourceExhausted, "{what}: {status:?}");
    let info = status.get_details_error_info().expect(what);
    assert_eq!(info.reason, "REQUEST_TOO_LARGE", "{what}");
    assert_eq!(info.metadata["limit_bytes"], (4 << 20).to_string(), "{what}");
    assert!(status.message().contains("4 MiB"), "{what}: {}", status.message());
}

#[tokio::test]
async fn a_request_of_ten_megabytes_is_refused_by_every_service_of_ours_with_the_limit() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let long = "x".repeat(10 << 20);
    let mut request = create("web");
    request.vm.as_mut().unwrap().description.clone_from(&long);
    is_too_large("VmService", &clients.vms.create_vm(request).await.unwrap_err());
    let request = v1::GetHostRequest { name: long.clone() };
    is_too_large("HostService", &clients.hosts.get_host(request).await.unwrap_err());
    let request = v1::GetOperationRequest { id: long.clone() };
    is_too_large(
        "OperationService",
        &clients.operations.get_operation(request).await.unwrap_err(),
    );
    let request = v1::GetPlacementRequest { vm: long.clone() };
    is_too_large(
        "PlacementService",
        &clients.placement.get_placement(request).await.unwrap_err(),
    );
    let request = v1::WatchEventsRequest {
        subject: long.clone(),
        ..Default::default()
    };
    is_too_large(
        "EventService",
        &clients.events.watch_events(request).await.unwrap_err(),
    );

    let own = Identity::load_dir(&site.dir.path().join("h1"), "agent").unwrap();
    let agent = tls::client::connect(&site.endpoint(), tls::CONTROLLER_NAME, &own)
        .await
        .unwrap();
    let request = ReportRequest {
        host: "h1".into(),
        hypervisor_error: long.clone(),
        ..Default::default()
    };
    let refused = RegistrarServiceClient::new(agent.clone()).report(request).await;
    is_too_large("RegistrarService", &refused.unwrap_err());

    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileContainingSymbol(long)),
    };
    // Reflection is a library's: it ends the stream when a request cannot be read.
    let answer = ServerReflectionClient::new(agent)
        .server_reflection_info(futures::stream::iter([ask]))
        .await
        .unwrap()
        .into_inner()
        .message()
        .await;
    assert!(matches!(answer, Ok(None)), "{answer:?}");
    // One just below is read, and judged by what is in it.
    let request = v1::GetOperationRequest {
        id: "x".repeat(4 << 20 >> 1),
    };
    let refused = clients.operations.get_operation(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

async fn connect(site: &Site, dir: &str, name: &str) -> Channel {
    let identity = Identity::load_dir(&site.dir.path().join(dir), name).unwrap();
    tls::client::connect(&site.endpoint(), tls::CONTROLLER_NAME, &identity)
        .await
        .unwrap()
}

/// A call whose request never comes.
async fn unfinished(channel: Channel, path: &'static str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let nothing = futures::stream::pending::<v1::GetVmRequest>();
    let codec = tonic_prost::ProstCodec::<v1::GetVmRequest, v1::Vm>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    client
        .client_streaming(Request::new(nothing), path, codec)
        .await
        .map(drop)
}

const GET_VM: &str = "/dalgu.v1.VmService/GetVm";
const REPORT: &str = "/dalgu.agent.v1.RegistrarService/Report";

#[tokio::test]
async fn too_many_calls_at_once_are_shed_with_a_delay_and_agents_are_not_among_them() {
    use tonic_types::StatusExt;
    let mut site = Site::new(1).await;
    site.limits = Limits {
        calls: 1,
        kept_for_one: 1,
        call_time: Duration::from_secs(3),
        ..Limits::default()
    };
    let mut clients = site.start().await;
    let operator = connect(&site, "", "admin").await;
    let began = Instant::now();
    // An operator on the agents' path uses up an operator's place; it is refused at once and gives it back.
    assert_eq!(reason(unfinished(operator.clone(), REPORT).await), "NOT_AGENT");
    let held: Vec<_> = (0..2)
        .map(|_| tokio::spawn(unfinished(operator.clone(), GET_VM)))
        .collect();
    let get = || v1::GetVmRequest { name: "web".into() };
    let shed = || {
        let mut clients = clients.clone();
        async move { reason(clients.vms.get_vm(get()).await) == "OVERLOADED" }
    };
    eventually("the place of all and its own are taken", shed).await;
    let status = clients.vms.get_vm(get()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let delay = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(
        delay >= Duration::from_secs(1) && delay <= Duration::from_secs(2),
        "{delay:?}"
    );

    let report = ReportRequest {
        host: "h1".into(),
        ..Default::default()
    };
    let mut registrar = RegistrarServiceClient::new(connect(&site, "h1", "agent").await);
    registrar
        .report(report)
        .await
        .expect("agents have places of their own");
    let watch = v1::WatchEventsRequest::default();
    clients.events.watch_events(watch).await.expect("so have streams");

    for call in held {
        assert_eq!(reason(call.await.unwrap()), "CALL_TIMEOUT");
    }
    assert!(began.elapsed() >= Duration::from_secs(3));
    assert_eq!(
        reason(clients.vms.get_vm(get()).await),
        "VM_NOT_FOUND",
        "places come back"
    );
}

#[tokio::test]
async fn a_wait_may_take_longer_than_a_call() {
    let mut site = Site::new(1).await;
    site.limits.call_time = Duration::from_millis(300);
    let mut clients = site.start().await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let operation = clients.create("web").await;
    let wait = |id: &str| v1::WaitOperationRequest {
        id: id.to_owned(),
        timeout: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
    };
    let began = Instant::now();
    let waited = clients
        .operations
        .wait_operation(wait(&operation.id))
        .await
        .unwrap();
    assert!(waited.get_ref().end_time.is_none() && began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_connection_of_age_ends_its_streams_to_be_taken_up_again_and_calls_go_on() {
    let mut site = Site::new(1).await;
    site.limits.connection_age = Duration::from_millis(800);
    let mut clients = site.start().await;
    let mut ended = 0;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        let watch = v1::WatchEventsRequest::default();
        let mut stream = clients.events.watch_events(watch).await.unwrap().into_inner();
        loop {
            match stream.message().await {
                Ok(event) => assert!(event.is_some(), "ended without a reason"),
                Err(status) => {
                    assert_eq!(status.code(), Code::Unavailable);
                    assert_eq!(reason::<()>(Err(status)), "STREAM_ENDED");
                    break;
                }
            }
        }
        ended += 1;
        // The same client goes on without noticing: it has opened another connection.
        let list = clients.vms.list_vms(v1::ListVmsRequest::default()).await;
        assert!(list.is_ok(), "{list:?}");
    }
    assert!(ended >= 2, "{ended}");
}

#[tokio::test]
async fn a_connection_has_so_many_calls_at_once_and_headers_of_such_a_size() {
    let mut site = Site::new(1).await;
    site.limits.streams_per_connection = 2;
    let mut clients = site.start().await;
    let watch = async |clients: &mut Clients| {
        let watch = v1::WatchEventsRequest::default();
        clients.events.watch_events(watch).await.unwrap().into_inner()
    };
    let (first, second) = (watch(&mut clients).await, watch(&mut clients).await);
    let list = || v1::ListVmsRequest::default();
    let mut same = clients.clone();
    let third = timeout(Duration::from_millis(300), same.vms.list_vms(list())).await;
    assert!(third.is_err(), "a third call waits");
    let mut other = Clients::new(&connect(&site, "", "admin").await);
    other
        .vms
        .list_vms(list())
        .await
        .expect("another connection has its own");
    drop(first);
    clients.vms.list_vms(list()).await.expect("a place has come back");
    drop(second);
    for (bytes, taken) in [(12 << 10, true), (20 << 10, false)] {
        let mut request = Request::new(list());
        request
            .metadata_mut()
            .insert("x-long", "x".repeat(bytes).parse().unwrap());
        let answer = clients.vms.list_vms(request).await;
        assert_eq!(answer.is_ok(), taken, "{bytes} bytes: {answer:?}");
    }
}

/// One HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Says these frames after the preface, and reads what comes until the connection ends.
async fn raw(site: &Site, frames: &[u8]) -> Vec<u8> {
    let identity = Identity::load_dir(site.dir.path(), "admin").unwrap();
    let address = site.endpoint().trim_start_matches("https://").to_owned();
    let mut io = tls::client::open_stream(&address, tls::CONTROLLER_NAME, &identity, tls::ALPN_H2)
        .await
        .unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frames);
    io.write_all(&bytes).await.unwrap();
    let mut answer = vec![];
    let limit = Duration::from_secs(10);
    // An end without a farewell of TLS is an end too.
    let _ = timeout(limit, io.read_to_end(&mut answer))
        .await
        .expect("the connection stayed");
    answer
}

/// The error codes of the GOAWAY frames among these.
fn farewells(mut bytes: &[u8]) -> Vec<u32> {
    let mut codes = vec![];
    while bytes.len() >= 9 {
        let length = usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]);
        let Some(payload) = bytes.get(9..9 + length) else {
            break;
        };
        if bytes[3] == 7 {
            codes.push(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
        bytes = &bytes[9 + length..];
    }
    codes
}

#[tokio::test]
async fn a_caller_that_opens_and_resets_streams_in_a_row_is_sent_away() {
    const ENHANCE_YOUR_CALM: u32 = 11;
    let mut site = Site::new(0).await;
    site.start().await;
    let mut storm = vec![];
    for number in 0..200 {
        let stream = number * 2 + 1;
        // POST https / with the authority "x", and the reset of it: CANCEL.
        storm.extend(frame(1, 4, stream, &[0x83, 0x87, 0x84, 0x41, 1, b'x']));
        storm.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    let codes = farewells(&raw(&site, &storm).await);
    assert!(codes.contains(&ENHANCE_YOUR_CALM), "{codes:?}");
}

#[tokio::test]
async fn a_connection_that_answers_no_probe_is_closed() {
    let mut site = Site::new(0).await;
    site.limits.keepalive = Duration::from_millis(300);
    site.start().await;
    let began = Instant::now();
    raw(&site, &[]).await;
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn silent_connections_of_one_address_keep_nobody_out_and_are_closed_after_three_seconds() {
    let mut site = Site::new(0).await;
    site.start().await;
    let address = site.endpoint().trim_start_matches("https://").parse().unwrap();
    let began = Instant::now();
    let mut silent = vec![];
    for _ in 0..200 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(address).await.unwrap());
    }
    connect(&site, "", "admin").await;
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "an operator of another address comes in at once"
    );
    for mut io in silent {
        // Those beyond the address's part have waited for it first.
        let read = timeout(Duration::from_secs(10), io.read(&mut [0; 1])).await;
        assert!(matches!(read, Ok(Ok(0) | Err(_))), "{read:?}");
    }
    assert!(began.elapsed() >= Duration::from_secs(3));
}
