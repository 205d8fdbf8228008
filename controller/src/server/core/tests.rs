//! A core with nothing of the machine in it: its time stands still unless it is let go on, and the same run can be had
//! again.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use dalgu_proto::{
    agent::v1::{self as agent, registrar_service_client::RegistrarServiceClient},
    ids::HostName,
    tls::{self, Role},
    v1::{
        event_service_client::EventServiceClient, operation_service_client::OperationServiceClient,
        vm_service_client::VmServiceClient,
    },
};
use jiff::Timestamp;
use tonic::Code;
use uuid::Uuid;

use super::*;
use crate::{fixtures, store::memory::Disk};

#[tokio::test]
async fn a_part_that_fails_is_told_and_one_that_ends_is_not() {
    let (fail, mut failed) = mpsc::channel(1);
    vital("good", fail.clone(), async {}).await;
    vital("bad", fail, async { panic!("expected in this test") }).await;
    assert_eq!(failed.recv().await, Some("bad"));
    assert_eq!(failed.recv().await, None);
}

/// Nobody answers; who was dialled is written down.
#[derive(Default)]
struct Silence(Mutex<Vec<String>>);

impl Dial for Silence {
    fn dial(&self, host: &HostName, address: &str) -> Result<Caller, tls::Error> {
        self.0.lock().unwrap().push(format!("{host} at {address}"));
        Ok(caller_in_process_as(peer(Role::Controller), Routes::default()))
    }
}

fn peer(role: Role) -> Peer {
    Peer {
        role,
        name: "test".to_owned(),
    }
}

fn parts(disk: &Disk, slowness: Duration) -> Parts {
    let begin = tokio::time::Instant::now();
    let given = AtomicU64::new(1);
    Parts {
        writer: Writer::Task(Box::new(move || Box::pin(tokio::time::sleep(slowness)))),
        clock: Clock::from_fn(move || Timestamp::UNIX_EPOCH + begin.elapsed()),
        new_ids: NewIds::from_fn(move || Uuid::from_u64_pair(0, given.fetch_add(1, Ordering::Relaxed))),
        ..Parts::new(disk.open(), |error| panic!("the store failed: {error}"))
    }
}

async fn start(disk: &Disk, dial: Arc<Silence>, slowness: Duration) -> Core {
    let stop = CancellationToken::new();
    let parts = parts(disk, slowness);
    Core::start(Arc::default(), fixtures::cluster_id(), dial, parts, stop)
        .await
        .unwrap()
}

async fn register(core: &Core, host: &str) {
    let mut client = RegistrarServiceClient::new(core.caller(peer(Role::Agent(fixtures::host_name(host)))));
    let request = agent::RegisterRequest {
        host: host.to_owned(),
        address: format!("{host}:7444"),
        boot_id: "b".to_owned(),
        agent_run_id: "r".to_owned(),
        inventory: Some(fixtures::inventory().into()),
        inventory_complete: true,
        ..Default::default()
    };
    client.register(request).await.unwrap();
}

fn create(name: &str) -> v1::CreateVmRequest {
    let vm = v1::Vm {
        name: name.to_owned(),
        spec: Some(fixtures::spec().into()),
        ..Default::default()
    };
    v1::CreateVmRequest {
        vm: Some(vm),
        request_id: Uuid::from_u128(99).to_string(),
        ..Default::default()
    }
}

/// What one run leaves: its events and operations as the API tells them, who was dialled, and when it ended.
async fn history() -> String {
    let dial = Arc::new(Silence::default());
    let core = start(&Disk::default(), dial.clone(), Duration::from_millis(3)).await;
    for host in ["h1", "h2", "h3"] {
        register(&core, host).await;
    }
    let operator = core.caller(peer(Role::Operator));
    let mut vms = VmServiceClient::new(operator.clone());
    for name in ["a", "b", "c", "d"] {
        let request = v1::CreateVmRequest {
            request_id: String::new(),
            ..create(name)
        };
        vms.create_vm(request).await.unwrap();
    }
    // Long enough for hosts to fall silent and for passes to fail and come again.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let events = EventServiceClient::new(operator.clone())
        .list_events(v1::ListEventsRequest::default())
        .await;
    let operations = OperationServiceClient::new(operator)
        .list_operations(v1::ListOperationsRequest::default())
        .await;
    format!(
        "{:?}\n{:?}\n{:?}\n{:?}",
        events.unwrap().into_inner(),
        operations.unwrap().into_inner(),
        dial.0.lock().unwrap(),
        core.db().now()
    )
}

#[test]
fn the_same_inputs_give_the_same_history_to_the_byte() {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(history())
    };
    let first = run();
    assert!(first.contains("HostUnreachable"), "{first}");
    for _ in 0..3 {
        assert_eq!(first, run());
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_creates_a_vm_in_the_same_process_and_the_same_request_finds_it_again() {
    let core = start(&Disk::default(), Arc::default(), Duration::ZERO).await;
    register(&core, "h1").await;
    let mut vms = VmServiceClient::new(core.caller(peer(Role::Operator)));
    let operation = vms.create_vm(create("web")).await.unwrap().into_inner();
    // The first id is that of the controller's run.
    assert_eq!(operation.vm_uid, Uuid::from_u64_pair(0, 2).to_string());
    let again = vms.create_vm(create("web")).await.unwrap().into_inner();
    assert_eq!(again.id, operation.id);
    let stranger = VmServiceClient::new(core.caller(peer(Role::Agent(fixtures::host_name("h1")))))
        .create_vm(create("other"))
        .await;
    assert_eq!(stranger.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_answered_before_a_slow_disk_has_it() {
    let begin = tokio::time::Instant::now();
    let disk = Disk::default();
    let core = start(&disk, Arc::default(), Duration::from_secs(2)).await;
    assert_eq!((begin.elapsed().as_secs(), disk.commits()), (2, 1), "the term");
    register(&core, "h1").await;
    assert_eq!((begin.elapsed().as_secs(), disk.commits()), (4, 2));
}

#[tokio::test(start_paused = true)]
async fn a_core_ends_when_it_is_told_to() {
    let stop = CancellationToken::new();
    let parts = parts(&Disk::default(), Duration::ZERO);
    let dial = Arc::new(Silence::default());
    let mut core = Core::start(Arc::default(), fixtures::cluster_id(), dial, parts, stop.clone())
        .await
        .unwrap();
    let second = Duration::from_secs(1);
    tokio::time::timeout(second, core.stopped()).await.unwrap_err();
    stop.cancel();
    tokio::time::timeout(second, core.stopped()).await.unwrap();
    tokio::time::timeout(second, core.failed()).await.unwrap_err();
}
