//! Several creations in one request.

use dalgu_proto::v1;

use crate::site::{Clients, Site, create, reason, request_id};

fn batch(names: &[&str], all_or_nothing: bool) -> v1::BatchCreateVmsRequest {
    let one = |name: &&str| v1::CreateVmRequest {
        stopped: true,
        ..create(name)
    };
    v1::BatchCreateVmsRequest {
        requests: names.iter().map(one).collect(),
        all_or_nothing,
        request_id: request_id(),
    }
}

async fn names(clients: &mut Clients) -> Vec<String> {
    let list = clients.vms.list_vms(v1::ListVmsRequest::default()).await.unwrap();
    list.into_inner().vms.into_iter().map(|vm| vm.name).collect()
}

#[tokio::test]
async fn a_list_is_accepted_as_a_whole_or_not_at_all_and_a_retry_finds_what_was_accepted() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    clients.create("b").await;

    let taken = clients.vms.batch_create_vms(batch(&["a", "b", "c"], true)).await;
    assert!(
        taken
            .as_ref()
            .unwrap_err()
            .message()
            .starts_with("requests[1], VM \"b\": ")
    );
    assert_eq!(reason(taken), "VM_ALREADY_EXISTS");
    let twice = clients.vms.batch_create_vms(batch(&["a", "c", "a"], true)).await;
    assert!(
        twice
            .as_ref()
            .unwrap_err()
            .message()
            .starts_with("requests[2], VM \"a\": ")
    );
    assert_eq!(reason(twice), "VM_ALREADY_EXISTS");
    let mut large = batch(&["a", "c"], true);
    let spec = large.requests[1].vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.memory_mib = 1 << 20;
    assert_eq!(reason(clients.vms.batch_create_vms(large).await), "NO_CAPACITY");
    assert_eq!(names(&mut clients).await, ["b"]);

    let request = batch(&["a", "c", "d"], true);
    let first = clients
        .vms
        .batch_create_vms(request.clone())
        .await
        .unwrap()
        .into_inner();
    let again = clients
        .vms
        .batch_create_vms(request.clone())
        .await
        .unwrap()
        .into_inner();
    let ids = |answer: &v1::BatchCreateVmsResponse| {
        let operations = answer
            .results
            .iter()
            .map(|result| result.operation.clone().unwrap());
        operations
            .map(|operation| (operation.vm, operation.id))
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&first), ids(&again));
    let longer = v1::BatchCreateVmsRequest {
        request_id: request.request_id.clone(),
        ..batch(&["a", "c", "d", "e"], true)
    };
    assert_eq!(
        reason(clients.vms.batch_create_vms(longer).await),
        "REQUEST_ID_REUSED"
    );
    let made: Vec<_> = ids(&first).into_iter().map(|(vm, _)| vm).collect();
    assert_eq!(made, ["a", "c", "d"]);
    assert_eq!(names(&mut clients).await, ["a", "b", "c", "d"]);
    for result in first.results {
        clients.succeeded(result.operation.unwrap()).await;
    }
}

#[tokio::test]
async fn of_a_list_that_need_not_be_whole_each_is_accepted_or_refused_for_itself() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    clients.create("b").await;
    let answer = clients.vms.batch_create_vms(batch(&["a", "b", "c"], false)).await;
    let results = answer.unwrap().into_inner().results;
    let said: Vec<_> = results
        .iter()
        .map(|result| {
            (
                result.operation.is_some(),
                result.error.as_ref().map(|error| &*error.reason),
            )
        })
        .collect();
    assert_eq!(
        said,
        [(true, None), (false, Some("VM_ALREADY_EXISTS")), (true, None)]
    );
    assert_eq!(names(&mut clients).await, ["a", "b", "c"]);
}

#[tokio::test]
async fn a_list_that_makes_no_sense_is_refused_with_the_place_and_nothing_is_stored() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let mut nameless = batch(&["a", "b"], false);
    nameless.requests[1].vm = None;
    let mut other = batch(&["a", "b"], false);
    other.requests[0].request_id = request_id();
    let mut checked = batch(&["a", "b"], true);
    checked.requests[1].validate_only = true;
    let many: Vec<_> = (0..2001).map(|number| format!("vm-{number}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    for (request, place) in [
        (batch(&[], false), "requests"),
        (batch(&many, true), "requests"),
        (nameless, "requests[1]"),
        (other, "requests[0].request_id"),
        (checked, "requests[1].validate_only"),
    ] {
        let refused = clients.vms.batch_create_vms(request).await;
        let message = refused.as_ref().unwrap_err().message().to_owned();
        assert!(message.contains(place), "{message}");
        assert_eq!(reason(refused), "INVALID_FIELD", "{message}");
    }
    assert!(names(&mut clients).await.is_empty());
}
