//! PlacementService: why a VM is where it is.

use dalgu_proto::v1;

use super::list;
use crate::site::{Site, create, spec};

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
