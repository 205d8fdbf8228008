//! Who may call what, and what the port says of itself.

use dalgu_proto::{
    agent::v1::{RegisterRequest, registrar_service_client::RegistrarServiceClient},
    tls::{self, Identity},
    v1::{self, vm_service_client::VmServiceClient},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::site::{Site, reason};

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
        let mut names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
        names.sort_unstable();
        let served = [
            "dalgu.agent.v1.RegistrarService",
            "dalgu.v1.BackupService",
            "dalgu.v1.EventService",
            "dalgu.v1.HostService",
            "dalgu.v1.ImageService",
            "dalgu.v1.NetworkService",
            "dalgu.v1.OperationService",
            "dalgu.v1.PlacementService",
            "dalgu.v1.PlanService",
            "dalgu.v1.SiteService",
            "dalgu.v1.SnapshotService",
            "dalgu.v1.VmService",
            "dalgu.v1.VolumeService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ];
        assert_eq!(names, served, "what is served, and nothing that is not");
    }

    let other = Site::new(0).await;
    let stranger = other.channel(&endpoint, "admin").await;
    assert!(stranger.is_err(), "another site's operator");
}
