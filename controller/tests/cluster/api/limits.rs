//! What the port bears: sizes, numbers and times, and what is told to those who come up against them.

use dalgu_proto::{
    agent::v1::{ReportRequest, registrar_service_client::RegistrarServiceClient},
    tls::{self, Identity},
    v1,
};
use tonic::{Code, Status};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};

use crate::site::{Site, create};

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
