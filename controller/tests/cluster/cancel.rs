//! What is given up is that one operation, however alike others are.

use dalgu_proto::v1::{self, OperationState, VmState};

use super::site::{Clients, Site, create, eventually, migrate};

const ALIKE: [&str; 3] = ["a", "b", "c"];

/// The same in everything but the name.
async fn ask(clients: &mut Clients) -> Vec<v1::Operation> {
    let mut operations = Vec::new();
    for name in ALIKE {
        let mut request = create(name);
        if let Some(vm) = &mut request.vm {
            vm.labels.insert("role".into(), "front".into());
            vm.description = "one of three".into();
        }
        operations.push(clients.vms.create_vm(request).await.unwrap().into_inner());
    }
    operations
}

async fn cancel(clients: &mut Clients, operation: &v1::Operation) {
    let request = v1::CancelOperationRequest {
        id: operation.id.clone(),
    };
    clients.operations.cancel_operation(request).await.unwrap();
}

async fn states(clients: &mut Clients, operations: &[v1::Operation]) -> Vec<OperationState> {
    let mut states = Vec::new();
    for operation in operations {
        states.push(clients.ended(operation.clone()).await.state());
    }
    states
}

const ONLY_THE_SECOND: [OperationState; 3] = [
    OperationState::Succeeded,
    OperationState::Cancelled,
    OperationState::Succeeded,
];

fn set_cut_off(site: &Site, cut_off: bool) {
    let mut world = site.fabric.lock();
    world.hosts.values_mut().for_each(|host| host.cut_off = cut_off);
}

#[tokio::test]
async fn incident_40_cancelling_one_creation_touches_no_other_that_is_alike() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    // All three are under way at once: their host hears of them together.
    set_cut_off(&site, true);
    let operations = ask(&mut clients).await;
    cancel(&mut clients, &operations[1]).await;
    set_cut_off(&site, false);
    assert_eq!(states(&mut clients, &operations).await, ONLY_THE_SECOND);
    let list = clients.vms.list_vms(v1::ListVmsRequest::default()).await.unwrap();
    let left: Vec<_> = list.into_inner().vms.into_iter().map(|vm| vm.name).collect();
    assert_eq!(left, ["a", "c"]);
}

#[tokio::test]
async fn incident_40_cancelling_one_migration_touches_no_other_that_is_alike() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;
    let operations = ask(&mut clients).await;
    states(&mut clients, &operations).await;
    site.fabric.lock().transfer_steps = u32::MAX;
    let mut moves = Vec::new();
    for name in ALIKE {
        let running = || {
            let mut clients = clients.clone();
            async move { clients.vm(name).await.status.unwrap().state() == VmState::Running }
        };
        eventually("it runs", running).await;
        moves.push(clients.vms.migrate_vm(migrate(name)).await.unwrap().into_inner());
    }
    cancel(&mut clients, &moves[1]).await;
    assert_eq!(
        clients.ended(moves[1].clone()).await.state(),
        OperationState::Cancelled
    );
    let cancelled = clients.vm("b").await.status.unwrap().host;
    site.fabric.lock().transfer_steps = 4;
    assert_eq!(states(&mut clients, &moves).await, ONLY_THE_SECOND);
    let uid = clients.vm("b").await.uid;
    assert_eq!(site.fabric.alive_on(&uid), [cancelled], "where it was");
}
