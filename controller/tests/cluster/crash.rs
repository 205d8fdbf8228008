//! The controller dies at every write of a VM's life, before it or after it, and is started again: each operation ends,
//! nothing runs twice (the pretended world watches), and nothing is left; of its interface in a network neither.

use dalgu_controller::store::memory::Crash;
use dalgu_proto::v1::{self, OperationState};
use futures::{StreamExt, stream};

use super::{
    network,
    site::{Clients, Site, create, delete, eventually, migrate, request_id, start, stop},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    CreateInNetwork,
    Stop,
    Start,
    Migrate,
    Delete,
}

const LIFE: &[Verb] = &[Verb::Create, Verb::Stop, Verb::Start, Verb::Migrate, Verb::Delete];
const IN_NETWORK: &[Verb] = &[Verb::CreateInNetwork, Verb::Migrate, Verb::Delete];

async fn ask(clients: &mut Clients, verb: Verb, id: &str) -> Result<v1::Operation, tonic::Status> {
    let request_id = id.to_owned();
    let answer = match verb {
        Verb::Create => {
            clients
                .vms
                .create_vm(v1::CreateVmRequest {
                    request_id,
                    ..create("web")
                })
                .await
        }
        Verb::CreateInNetwork => {
            clients
                .vms
                .create_vm(v1::CreateVmRequest {
                    request_id,
                    ..network::with("web", "", network::plug("field", &[]))
                })
                .await
        }
        Verb::Stop => {
            clients
                .vms
                .stop_vm(v1::StopVmRequest {
                    request_id,
                    ..stop("web")
                })
                .await
        }
        Verb::Start => {
            clients
                .vms
                .start_vm(v1::StartVmRequest {
                    request_id,
                    ..start("web")
                })
                .await
        }
        Verb::Migrate => {
            clients
                .vms
                .migrate_vm(v1::MigrateVmRequest {
                    request_id,
                    ..migrate("web")
                })
                .await
        }
        Verb::Delete => {
            clients
                .vms
                .delete_vm(v1::DeleteVmRequest {
                    request_id,
                    ..delete("web")
                })
                .await
        }
    };
    answer.map(tonic::Response::into_inner)
}

/// The hosts have not reported to the new controller yet, or a busy machine keeps them from it: there is room for all.
fn may_pass(status: &tonic::Status) -> bool {
    let reason = dalgu_proto::reason::of(status).unwrap_or_default();
    [
        "HOSTS_INITIALIZING",
        "VM_NOT_RUNNING",
        "NO_CAPACITY",
        "HOST_UNREACHABLE",
    ]
    .contains(&reason.as_str())
}

/// Asks, and asks again with the same id after a crash, until the operation has ended.
async fn carry_through(site: &mut Site, clients: &mut Clients, verb: Verb) -> v1::Operation {
    let id = request_id();
    loop {
        let crashed = site.crashed.clone();
        let attempt = async {
            let operation = ask(clients, verb, &id).await?;
            let timeout = Some(prost_types::Duration {
                seconds: 30,
                nanos: 0,
            });
            let wait = v1::WaitOperationRequest {
                id: operation.id,
                timeout,
            };
            clients
                .operations
                .wait_operation(wait)
                .await
                .map(tonic::Response::into_inner)
        };
        let outcome = tokio::select! {
            outcome = attempt => Some(outcome),
            () = crashed.cancelled() => None,
        };
        match outcome {
            Some(Ok(operation)) if operation.end_time.is_some() => return operation,
            Some(Ok(operation)) => panic!("{verb:?} does not end: {operation:?}"),
            Some(Err(status)) if !crashed.is_cancelled() && may_pass(&status) => {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Some(Err(status)) if !crashed.is_cancelled() => panic!("{verb:?}: {status:?}"),
            Some(Err(_)) | None => {
                site.kill();
                site.disk.crash_at(None);
                *clients = site.start().await;
            }
        }
    }
}

/// Whether the life was long enough for the crash to happen.
async fn live(crash: Crash, life: &[Verb]) -> bool {
    let mut site = Site::new(2).await;
    for host in site.fabric.lock().hosts.values_mut() {
        host.networks.offered = life == IN_NETWORK;
    }
    let mut clients = site.start().await;
    let field = network::new(network::field());
    clients.networks.create_network(field).await.unwrap();
    // The number is counted from here: what comes before is the same for all.
    let base = site.disk.commits();
    site.disk.crash_at(Some(match crash {
        Crash::Before(number) => Crash::Before(base + number),
        Crash::After(number) => Crash::After(base + number),
    }));
    let mut happened = false;
    for verb in life {
        let operation = carry_through(&mut site, &mut clients, *verb).await;
        assert_eq!(
            operation.state(),
            OperationState::Succeeded,
            "{crash:?} {verb:?}: {operation:?}"
        );
        happened |= site.disk.commits() > base + number(crash);
    }
    let state = clients
        .vms
        .list_vms(v1::ListVmsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(state.vms.is_empty(), "{crash:?}");
    let field = v1::GetNetworkRequest { name: "field".into() };
    let field = clients.networks.get_network(field).await.unwrap().into_inner();
    assert_eq!(field.interfaces, 0, "{crash:?}");
    let told = |site: &Site| {
        let world = site.fabric.lock();
        world
            .hosts
            .values()
            .any(|host| host.networks.part("field").is_some())
    };
    eventually("hosts let the network go", || async { !told(&site) }).await;
    assert!(
        site.fabric.leftovers().is_empty(),
        "{crash:?}: {:?}",
        site.fabric.leftovers()
    );
    let active = v1::ListOperationsRequest {
        active_only: true,
        ..Default::default()
    };
    let active = clients
        .operations
        .list_operations(active)
        .await
        .unwrap()
        .into_inner()
        .operations;
    assert!(active.is_empty(), "{crash:?}: {active:?}");
    let hosts = clients
        .hosts
        .list_hosts(v1::ListHostsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .hosts;
    assert!(
        hosts
            .iter()
            .all(|host| host.allocation.as_ref().unwrap().vms == 0),
        "{crash:?}"
    );
    happened
}

const fn number(crash: Crash) -> u64 {
    match crash {
        Crash::Before(number) | Crash::After(number) => number,
    }
}

/// Lives that are crashed at every write, the `writes` first ones; more than a life has, which shows that it was covered to
/// the end.
async fn crash_everywhere(life: &'static [Verb], writes: u64, at_least: usize) {
    let crashes = (0..writes).flat_map(|number| [Crash::Before(number), Crash::After(number)]);
    let outcomes: Vec<(u64, bool)> = stream::iter(crashes)
        .map(|crash| async move { (number(crash), tokio::spawn(live(crash, life)).await.unwrap()) })
        .buffer_unordered(16)
        .collect()
        .await;
    let covered = outcomes.iter().filter(|(_, happened)| *happened).count();
    assert!(
        covered > at_least,
        "a life has more writes than {covered} crashes"
    );
    assert!(
        outcomes.iter().any(|(_, happened)| !happened),
        "no life ended before its crash: raise the number of writes"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_write_of_a_life_changes_nothing_about_its_end() {
    crash_everywhere(LIFE, 60, 30).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_write_of_a_life_in_a_network_changes_nothing_about_its_end() {
    crash_everywhere(IN_NETWORK, 20, 24).await;
}
