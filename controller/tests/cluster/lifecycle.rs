//! VMs come, run, stop and go.

use dalgu_proto::v1::{self, OperationState, PowerState, VmState};

use super::site::{Clients, Site, create, delete, eventually, reason, start, stop};

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one life, told in its order")]
async fn a_vm_lives_from_its_creation_to_its_deletion() {
    let mut site = Site::new(2).await;
    let mut clients = site.start().await;

    let operation = clients.create("web").await;
    assert_eq!(operation.kind(), v1::OperationKind::CreateVm);
    clients.succeeded(operation).await;
    let vm = clients.vm("web").await;
    let status = vm.status.clone().unwrap();
    assert_eq!(
        (status.state(), status.power_state()),
        (VmState::Running, PowerState::Running)
    );
    assert!(vm.spec.unwrap().nics[0].mac.starts_with("52:54:00:"));
    assert_eq!(site.fabric.alive_on(&vm.uid), std::slice::from_ref(&status.host));
    let disks_made = || {
        site.fabric.lock().hosts[&status.host].vms[&vm.uid]
            .intent
            .disks_made
    };
    assert!(!disks_made(), "nothing was there yet");

    let stopped = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    clients.succeeded(stopped).await;
    assert_eq!(clients.vm("web").await.status.unwrap().state(), VmState::Stopped);
    assert!(site.fabric.alive_on(&vm.uid).is_empty());
    assert!(disks_made(), "a host that lost everything would make them blank");

    let again = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    clients.succeeded(again).await;

    for ask in ["pause", "resume", "restart", "migrate"] {
        let name = "web".to_owned();
        let refused = match ask {
            "pause" => {
                clients
                    .vms
                    .pause_vm(v1::PauseVmRequest {
                        name,
                        ..Default::default()
                    })
                    .await
            }
            "resume" => {
                clients
                    .vms
                    .resume_vm(v1::ResumeVmRequest {
                        name,
                        ..Default::default()
                    })
                    .await
            }
            "restart" => {
                clients
                    .vms
                    .restart_vm(v1::RestartVmRequest {
                        name,
                        ..Default::default()
                    })
                    .await
            }
            _ => {
                clients
                    .vms
                    .migrate_vm(v1::MigrateVmRequest {
                        name,
                        ..Default::default()
                    })
                    .await
            }
        };
        assert_eq!(reason(refused), "VM_NOT_RUNNING", "{ask}");
    }

    let started = clients.vms.start_vm(start("web")).await.unwrap().into_inner();
    clients.succeeded(started).await;
    let paused = clients
        .vms
        .pause_vm(v1::PauseVmRequest {
            name: "web".into(),
            ..Default::default()
        })
        .await;
    clients.succeeded(paused.unwrap().into_inner()).await;
    assert_eq!(clients.vm("web").await.status.unwrap().state(), VmState::Paused);
    let resumed = clients
        .vms
        .resume_vm(v1::ResumeVmRequest {
            name: "web".into(),
            ..Default::default()
        })
        .await;
    clients.succeeded(resumed.unwrap().into_inner()).await;
    let restart = clients
        .vms
        .restart_vm(v1::RestartVmRequest {
            name: "web".into(),
            ..Default::default()
        })
        .await;
    clients.succeeded(restart.unwrap().into_inner()).await;

    let gentle = v1::DeleteVmRequest {
        force: false,
        ..delete("web")
    };
    assert_eq!(reason(clients.vms.delete_vm(gentle).await), "VM_RUNNING");
    let deleted = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
    assert_eq!(
        reason(clients.vms.get_vm(v1::GetVmRequest { name: "web".into() }).await),
        "VM_NOT_FOUND"
    );
    assert!(site.fabric.leftovers().is_empty());
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
            .all(|host| host.allocation.as_ref().unwrap().memory_mib_reserved == 0),
        "room is given back"
    );
}

#[tokio::test]
async fn a_vm_can_be_made_without_starting_it() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let request = v1::CreateVmRequest {
        stopped: true,
        ..create("cold")
    };
    let operation = clients.vms.create_vm(request).await.unwrap().into_inner();
    clients.succeeded(operation).await;
    let vm = clients.vm("cold").await;
    assert_eq!(vm.status.unwrap().state(), VmState::Stopped);
    let gentle = v1::DeleteVmRequest {
        force: false,
        ..delete("cold")
    };
    let deleted = clients.vms.delete_vm(gentle).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
}

#[tokio::test]
async fn a_newer_request_replaces_an_older_one_that_has_not_ended() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    // The host hears nothing for a while, so that both are open.
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let stopping = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    let starting = clients.vms.start_vm(start("web")).await.unwrap().into_inner();
    let replaced = clients.ended(stopping).await;
    assert_eq!(replaced.state(), OperationState::Cancelled);
    assert_eq!(replaced.error.unwrap().reason, "SUPERSEDED");
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    clients.succeeded(starting).await;
}

#[tokio::test]
async fn a_start_of_a_vm_that_was_seen_running_ends_when_its_host_has_looked() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let uid = clients.vm("web").await.uid;
    {
        let mut world = site.fabric.lock();
        let host = world.hosts.get_mut("h1").unwrap();
        host.cut_off = true;
        // It has shut itself down, and nobody has heard of it yet.
        host.vms.get_mut(&uid).unwrap().power = PowerState::Stopped;
    }
    let started = clients.vms.start_vm(start("web")).await.unwrap().into_inner();
    assert_ne!(started.state(), OperationState::Succeeded, "it does not run");
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    clients.succeeded(started).await;
    assert_eq!(site.fabric.alive_on(&uid), ["h1"]);
}

#[tokio::test]
async fn a_host_that_cannot_do_it_makes_the_operation_fail_and_the_vm_can_be_deleted() {
    let mut site = Site::new(1).await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().broken = true;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    let ended = clients.ended(operation).await;
    assert_eq!(ended.state(), OperationState::Failed);
    assert_eq!(ended.error.unwrap().reason, "START_FAILED");
    let status = clients.vm("web").await.status.unwrap();
    assert_eq!(status.state(), VmState::Failed);
    assert_eq!(status.error.unwrap().reason, "START_FAILED");
    let gentle = v1::DeleteVmRequest {
        force: false,
        ..delete("web")
    };
    let deleted = clients.vms.delete_vm(gentle).await.unwrap().into_inner();
    clients.succeeded(deleted).await;
}

#[tokio::test]
async fn a_creation_that_is_cancelled_leaves_nothing() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let operation = clients.create("web").await;
    let request = v1::CancelOperationRequest {
        id: operation.id.clone(),
    };
    let cancelled = clients
        .operations
        .cancel_operation(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert!(cancelled.cancel_requested);
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    let ended = clients.ended(operation).await;
    assert_eq!(ended.state(), OperationState::Cancelled);
    assert_eq!(
        reason(clients.vms.get_vm(v1::GetVmRequest { name: "web".into() }).await),
        "VM_NOT_FOUND"
    );
    assert_eq!(
        reason(clients.operations.cancel_operation(request).await),
        "NOT_CANCELLABLE"
    );
}

#[tokio::test]
async fn a_silent_host_loses_no_vm_and_gets_no_new_one() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let uid = clients.vm("web").await.uid;
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let unreachable = || {
        let mut clients = clients.clone();
        async move { clients.vm("web").await.status.unwrap().state() == VmState::Unreachable }
    };
    eventually("the VM is unreachable", unreachable).await;
    let status = clients.vm("web").await.status.unwrap();
    assert_eq!(
        status.power_state(),
        PowerState::Running,
        "the last that was seen"
    );
    assert_eq!(site.fabric.alive_on(&uid), ["h1"]);
    assert_eq!(
        reason(clients.vms.create_vm(create("second")).await),
        "NO_CAPACITY"
    );
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    let back = || {
        let mut clients = clients.clone();
        async move { clients.vm("web").await.status.unwrap().state() == VmState::Running }
    };
    eventually("the VM is back", back).await;
}

#[tokio::test]
async fn what_is_asked_of_a_host_whose_port_cannot_be_reached_waits_until_it_can() {
    let mut site = Site::new(1).await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let wrong = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let fabric = site.fabric.clone();
    let tell = |address: String| {
        let mut world = fabric.lock();
        std::mem::replace(&mut world.hosts.get_mut("h1").unwrap().address, address)
    };
    let right = tell(wrong);
    let mut clients = site.start().await;

    let operation = clients.create("web").await;
    let told = || {
        let (mut clients, id) = (clients.clone(), operation.id.clone());
        async move {
            let asked = clients
                .operations
                .get_operation(v1::GetOperationRequest { id })
                .await;
            let operation = asked.unwrap().into_inner();
            assert!(operation.end_time.is_none(), "{operation:?}");
            operation.status_message == "host h1 has not answered yet"
        }
    };
    eventually("the operation says what it waits for", told).await;
    assert_eq!(host_state(&clients).await, v1::HostState::Ready, "it reports");
    assert_eq!(clients.vm("web").await.status.unwrap().state(), VmState::Pending);

    // As by a restart of its agent with the right address.
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    eventually("its agent is away", || async {
        host_state(&clients).await == v1::HostState::Unreachable
    })
    .await;
    tell(right);
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = false;
    clients.succeeded(operation).await;
}

async fn host_state(clients: &Clients) -> v1::HostState {
    let request = v1::GetHostRequest { name: "h1".into() };
    let host = clients.clone().hosts.get_host(request).await.unwrap();
    host.get_ref().state()
}

#[tokio::test]
async fn a_vm_that_its_host_forgot_is_asked_for_again() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let uid = clients.vm("web").await.uid;
    site.fabric.lock().hosts.get_mut("h1").unwrap().vms.clear();
    eventually("it is made again", || async {
        site.fabric.alive_on(&uid) == ["h1"]
    })
    .await;
}

#[tokio::test]
async fn right_after_a_start_a_request_that_needs_a_host_is_asked_to_come_again() {
    let mut site = Site::new(1).await;
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    site.kill();
    site.fabric.lock().hosts.get_mut("h1").unwrap().cut_off = true;
    let mut clients = site.start_controller().await;
    for refused in [
        clients.vms.create_vm(create("second")).await,
        clients.vms.migrate_vm(super::site::migrate("web")).await,
    ] {
        assert_eq!(refused.as_ref().unwrap_err().code(), tonic::Code::Unavailable);
        assert_eq!(reason(refused), "HOSTS_INITIALIZING");
    }
    let status = clients.vm("web").await.status.unwrap();
    assert_eq!(status.state(), VmState::Unreachable, "nothing has been heard");
    assert_eq!(
        site.fabric.lock().hosts["h1"].commands["EnsureVm"],
        1,
        "nobody is told anything before it is heard"
    );
}
