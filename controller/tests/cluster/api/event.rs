//! EventService: streams that can be taken up again.

use std::collections::BTreeSet;

use dalgu_proto::v1;

use super::list;
use crate::site::{Site, reason, stop};

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
