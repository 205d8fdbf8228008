//! The lists of every service: pages, filters and their order.

use dalgu_proto::v1;

use crate::site::{Site, create, reason};

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
