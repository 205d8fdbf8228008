//! VMs move, or do not.

use dalgu_proto::v1::{self, MigrationPhase, OperationState, VmState};

use super::site::{Clients, Site, delete, eventually, migrate, reason, stop};

async fn running(site: &mut Site) -> (Clients, v1::Vm) {
    let mut clients = site.start().await;
    let operation = clients.create("web").await;
    clients.succeeded(operation).await;
    let vm = clients.vm("web").await;
    (clients, vm)
}

fn other(host: &str) -> String {
    if host == "h1" { "h2".into() } else { "h1".into() }
}

async fn reserved(clients: &mut Clients) -> Vec<u32> {
    let hosts = clients
        .hosts
        .list_hosts(v1::ListHostsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .hosts;
    hosts
        .iter()
        .map(|host| host.allocation.as_ref().unwrap().vms)
        .collect()
}

#[tokio::test]
async fn a_running_vm_moves_and_moves_back() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    let mut host = vm.status.unwrap().host;
    for turn in 1..=3_u64 {
        let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
        assert_eq!(reserved(&mut clients).await, [1, 1], "room on both hosts");
        let operation = clients.succeeded(operation).await;
        let progress = operation.migration.unwrap();
        assert_eq!(
            (progress.source_host.as_str(), progress.phase()),
            (host.as_str(), MigrationPhase::Done)
        );
        assert_eq!(progress.downtime_ms, 7, "the figures stay readable");
        host = other(&host);
        assert_eq!(site.fabric.alive_on(&vm.uid), [host.clone()]);
        let status = clients.vm("web").await.status.unwrap();
        assert_eq!(
            (status.host, status.epoch, status.migration_id.as_str()),
            (host.clone(), turn + 1, "")
        );
        let seen = || {
            let mut clients = clients.clone();
            async move { clients.vm("web").await.status.unwrap().state() == VmState::Running }
        };
        eventually("the new owner reports", seen).await;
    }
    assert_eq!(
        reserved(&mut clients).await.iter().sum::<u32>(),
        1,
        "room on one host"
    );
}

#[tokio::test]
async fn a_migration_is_refused_where_it_makes_no_sense() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    let host = vm.status.unwrap().host;
    let to = |host: &str| v1::MigrateVmRequest {
        destination_host: host.into(),
        ..migrate("web")
    };
    assert_eq!(reason(clients.vms.migrate_vm(to(&host)).await), "SAME_HOST");
    assert_eq!(reason(clients.vms.migrate_vm(to("h9")).await), "HOST_NOT_FOUND");
    let cordon = v1::CordonHostRequest {
        name: other(&host),
        ..Default::default()
    };
    clients.hosts.cordon_host(cordon).await.unwrap();
    assert_eq!(reason(clients.vms.migrate_vm(to("")).await), "NO_CAPACITY");
    clients
        .hosts
        .uncordon_host(v1::UncordonHostRequest {
            name: other(&host),
            ..Default::default()
        })
        .await
        .unwrap();
    site.fabric.lock().transfer_steps = 40;
    let operation = clients.vms.migrate_vm(to("")).await.unwrap().into_inner();
    assert_eq!(
        reason(clients.vms.migrate_vm(to("")).await),
        "MIGRATION_IN_PROGRESS"
    );
    clients.succeeded(operation).await;
}

#[tokio::test]
async fn a_transfer_that_fails_leaves_the_vm_where_it_was() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    site.fabric.lock().transfers_fail = true;
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let ended = clients.ended(operation).await;
    assert_eq!(ended.state(), OperationState::Failed);
    assert_eq!(ended.error.unwrap().reason, "TRANSFER_FAILED");
    assert_eq!(ended.migration.unwrap().phase(), MigrationPhase::Failed);
    let status = clients.vm("web").await.status.unwrap();
    assert_eq!(status.host, vm.status.unwrap().host);
    assert_eq!(status.epoch, 3, "the number of the failed attempt is spent");
    assert_eq!(site.fabric.alive_on(&vm.uid), [status.host]);
    assert_eq!(reserved(&mut clients).await.iter().sum::<u32>(), 1);
}

#[tokio::test]
async fn a_vm_whose_memory_is_gone_on_both_hosts_is_started_anew_and_told_of() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    site.fabric.lock().arrivals_die = true;
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    clients.ended(operation).await;
    let alive = || async { site.fabric.alive_on(&vm.uid).len() == 1 };
    eventually("it runs again", alive).await;
    let shown = || {
        let mut clients = clients.clone();
        async move { clients.vm("web").await.status.unwrap().state() == VmState::Running }
    };
    eventually("it is shown to run", shown).await;
    let request = v1::ListEventsRequest::default();
    let events = clients
        .events
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    let lost = events.iter().filter(|event| event.reason == "VmLost");
    assert_eq!(lost.count(), 1, "{events:#?}");
    assert_eq!(reserved(&mut clients).await.iter().sum::<u32>(), 1);
}

#[tokio::test]
async fn a_destination_that_refuses_ends_the_attempt() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    let host = vm.status.unwrap().host;
    site.fabric.lock().hosts.get_mut(&other(&host)).unwrap().broken = true;
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let ended = clients.ended(operation).await;
    assert_eq!(
        (ended.state(), ended.error.unwrap().reason.as_str()),
        (OperationState::Failed, "NO_ROOM")
    );
    assert_eq!(site.fabric.alive_on(&vm.uid), [host]);
}

#[tokio::test]
async fn a_migration_can_be_cancelled_until_it_cuts_over() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    site.fabric.lock().transfer_steps = u32::MAX;
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let transferring = || {
        let mut clients = clients.clone();
        let id = operation.id.clone();
        async move {
            let operation = clients
                .operations
                .get_operation(v1::GetOperationRequest { id })
                .await
                .unwrap()
                .into_inner();
            operation.migration.unwrap().memory_processed_bytes > 0
        }
    };
    eventually("the transfer goes on", transferring).await;
    assert_eq!(
        clients.vm("web").await.status.unwrap().state(),
        VmState::Migrating
    );
    let request = v1::CancelOperationRequest {
        id: operation.id.clone(),
    };
    clients.operations.cancel_operation(request).await.unwrap();
    let ended = clients.ended(operation).await;
    assert_eq!(ended.state(), OperationState::Cancelled, "{ended:?}");
    assert_eq!(ended.migration.unwrap().phase(), MigrationPhase::Aborted);
    let events = clients
        .events
        .list_events(v1::ListEventsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .events;
    let mut told: Vec<_> = events
        .into_iter()
        .filter(|event| event.reason == "MigrationPhase")
        .map(|event| event.message)
        .collect();
    told.reverse();
    let (from, to) = (
        vm.status.clone().unwrap().host,
        other(&vm.status.clone().unwrap().host),
    );
    let phases = [
        "preparing destination",
        "transferring",
        "cutting over",
        "cleaning destination",
        "aborted",
    ];
    assert_eq!(told, phases.map(|phase| format!("{phase} ({from} to {to})")));
    assert_eq!(site.fabric.alive_on(&vm.uid), [vm.status.unwrap().host]);
}

#[tokio::test]
async fn what_is_asked_during_a_migration_is_done_after_it_and_force_ends_it() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    site.fabric.lock().transfer_steps = 60;
    let moving = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let stopping = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    clients.succeeded(moving).await;
    clients.succeeded(stopping).await;
    assert!(site.fabric.alive_on(&vm.uid).is_empty());

    let started = clients
        .vms
        .start_vm(super::site::start("web"))
        .await
        .unwrap()
        .into_inner();
    clients.succeeded(started).await;
    site.fabric.lock().transfer_steps = u32::MAX;
    let moving = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let deleting = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    assert_eq!(clients.ended(moving).await.state(), OperationState::Cancelled);
    clients.succeeded(deleting).await;
    assert!(site.fabric.leftovers().is_empty());
}

#[tokio::test]
async fn while_a_host_cannot_be_asked_nothing_is_concluded() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    let source = vm.status.unwrap().host;
    site.fabric.lock().transfer_steps = u32::MAX;
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let begun = || async { !site.fabric.lock().hosts[&source].transfers.is_empty() };
    eventually("the transfer begins", begun).await;
    site.fabric.lock().hosts.get_mut(&other(&source)).unwrap().cut_off = true;
    let request = v1::CancelOperationRequest {
        id: operation.id.clone(),
    };
    clients.operations.cancel_operation(request).await.unwrap();
    let resolving = || {
        let mut clients = clients.clone();
        async move { clients.vm("web").await.status.unwrap().state() == VmState::Resolving }
    };
    eventually("it is said that it is not known", resolving).await;
    assert_eq!(clients.vm("web").await.status.unwrap().epoch, 1);
    site.fabric.lock().hosts.get_mut(&other(&source)).unwrap().cut_off = false;
    let ended = clients.ended(operation).await;
    assert_eq!(ended.state(), OperationState::Cancelled);
    assert_eq!(site.fabric.alive_on(&vm.uid), [source]);
}

#[tokio::test]
async fn a_destination_that_falls_silent_before_the_transfer_does_not_hold_the_vm() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    let source = vm.status.unwrap().host;
    site.fabric.lock().hosts.get_mut(&other(&source)).unwrap().cut_off = true;
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let request = v1::CancelOperationRequest {
        id: operation.id.clone(),
    };
    clients.operations.cancel_operation(request).await.unwrap();
    let stopping = clients.vms.stop_vm(stop("web")).await.unwrap().into_inner();
    clients.succeeded(stopping).await;
    assert_eq!(clients.vm("web").await.status.unwrap().state(), VmState::Stopped);
    site.fabric.lock().hosts.get_mut(&other(&source)).unwrap().cut_off = false;
    assert_eq!(clients.ended(operation).await.state(), OperationState::Cancelled);
}

#[tokio::test]
async fn how_far_a_migration_came_stays_readable_when_its_source_has_forgotten_it() {
    let mut site = Site::new(2).await;
    let (mut clients, _) = running(&mut site).await;
    {
        let mut world = site.fabric.lock();
        // Long enough to be asked once while it goes on.
        world.transfer_steps = 150;
        world.transfers_fail = true;
        world
            .hosts
            .values_mut()
            .for_each(|host| host.progress_lost = true);
    }
    let operation = clients.vms.migrate_vm(migrate("web")).await.unwrap().into_inner();
    let ended = clients.ended(operation).await;
    assert_eq!(ended.state(), OperationState::Failed);
    let progress = ended.migration.unwrap();
    assert!(progress.memory_processed_bytes > 0, "{progress:?}");
    assert_eq!(progress.memory_total_bytes, 100);
    site.kill();
    let mut clients = site.start().await;
    let request = v1::GetOperationRequest { id: ended.id };
    let again = clients
        .operations
        .get_operation(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        again.migration.unwrap(),
        progress,
        "also after a restart of the controller"
    );
}

#[tokio::test]
async fn a_vm_that_another_controller_has_had_deleted_amid_its_migration_is_deleted_here_too() {
    let mut site = Site::new(2).await;
    let (mut clients, vm) = running(&mut site).await;
    let source = vm.status.unwrap().host;
    site.fabric.lock().transfer_steps = u32::MAX;
    clients.vms.migrate_vm(migrate("web")).await.unwrap();
    let begun = || async { !site.fabric.lock().hosts[&source].transfers.is_empty() };
    eventually("the transfer begins", begun).await;
    for host in site.fabric.lock().hosts.values_mut() {
        host.vms.clear();
        host.gave_up = true;
    }
    let deletion = clients.vms.delete_vm(delete("web")).await.unwrap().into_inner();
    clients.succeeded(deletion).await;
}
