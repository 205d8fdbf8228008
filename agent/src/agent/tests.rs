//! Whole agents in one process on one stopped clock, with everything outside handed in.

mod images;
mod site;

use std::sync::Mutex;

use dalgu_proto::{agent::v1 as wire, ids::VmId, v1};
use tokio::time::sleep;
use tonic::Code;
use uuid::Uuid;

use self::site::*;
use super::*;
use crate::hypervisor::{
    Connection, Definition, DomainState,
    sim::{Call, Fault},
};

/// A VM is made on one host and moves to another; returns what happened.
async fn a_move() -> Vec<String> {
    let site = Site::new();
    let mut source = site.start("h1", site.sim("h1"), Folder::default()).await;
    let mut destination = site.start("h2", site.sim("h2"), Folder::default()).await;
    site.until("two hosts", |report| report.host == "h2").await;
    source.ensure().await.unwrap();
    site.until("running on h1", settled("h1")).await;
    let prepare = wire::PrepareMigrationRequest {
        context: destination.context(),
        migration_id: MIGRATION.to_owned(),
        vm: vm_intent(2),
        source_host: "h1".to_owned(),
    };
    destination.client.prepare_migration(prepare).await.unwrap();
    let send = wire::StartMigrationRequest {
        context: source.context(),
        migration_id: MIGRATION.to_owned(),
        vm_uid: VM.to_owned(),
        epoch: 1,
        destination_host: "h2".to_owned(),
        destination_address: "h2:7443".to_owned(),
        max_downtime_ms: 100,
        bandwidth_mib_per_second: 0,
        numa: Vec::new(),
    };
    source.client.start_migration(send).await.unwrap();
    let sent = |report: &wire::ReportRequest| {
        let over = |m: &wire::MigrationReport| m.transfer() == wire::TransferState::Completed;
        report
            .vms
            .iter()
            .any(|vm| vm.migration.as_ref().is_some_and(over))
    };
    site.until("sent", sent).await;
    assert!(source.settle().await.settled && destination.settle().await.settled);
    source.finish(false).await;
    destination.finish(true).await;
    site.until("running on h2", settled("h2")).await;
    assert_eq!(source.state().await, None);
    assert_eq!(destination.state().await, Some(DomainState::Running));
    lock(&site.history.lines).clone()
}

#[test]
fn a_vm_moves_between_agents_in_memory_and_the_same_again_is_the_same_to_the_byte() {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(a_move())
    };
    let first = run();
    assert!(first.len() > 20, "{first:#?}");
    for _ in 0..5 {
        let again = run();
        for (first, again) in first.iter().zip(&again) {
            assert_eq!(first, again);
        }
        assert_eq!(first.len(), again.len());
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_whose_hypervisor_does_not_answer_registers_and_says_nothing_of_its_vms() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    let sim = before.sim.clone();

    sim.disconnect("libvirt is not there");
    assert!(matches!(*sim.connection().borrow(), Connection::Down(_)));
    lock(&site.registrar.registered).clear();
    lock(&site.registrar.reports).clear();
    before.stop.cancel();
    let mut agent = site.start("h1", sim.clone(), before.files.clone()).await;
    let registered = async {
        while lock(&site.registrar.registered).is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HYPERVISOR_WAIT * 2, registered)
        .await
        .expect("it registers all the same");
    let told = lock(&site.registrar.registered)[0].clone();
    assert!(!told.inventory_complete && told.vms.is_empty());
    assert!(told.hypervisor_error.contains("libvirt is not there"), "{told:?}");
    let refused = agent.ensure().await.unwrap_err();
    assert_eq!(
        refused.code(),
        Code::Unavailable,
        "it does not know yet what is here: {refused:?}"
    );

    let run = told.agent_run_id;
    sleep(Duration::from_secs(10)).await;
    let of_this_run: Vec<_> = lock(&site.registrar.reports)
        .iter()
        .filter(|report| report.agent_run_id == run)
        .cloned()
        .collect();
    assert!(!of_this_run.is_empty(), "the heartbeat goes on");
    assert!(
        of_this_run
            .iter()
            .all(|report| !report.inventory_complete && !report.hypervisor_error.is_empty())
    );
    sim.reconnect();
    site.until("everything is told", |report| {
        report.agent_run_id == run
            && report.inventory_complete
            && report.hypervisor_error.is_empty()
            && report.vms.len() == 1
    })
    .await;
    let early = lock(&site.registrar.reports)
        .iter()
        .any(|report| report.agent_run_id == run && report.inventory_complete && report.vms.is_empty());
    assert!(!early, "a list from before recovery was called complete");
}

#[tokio::test(start_paused = true)]
async fn a_restarted_agent_tells_which_controller_it_obeys() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    let obeys = |told: wire::RegisterRequest| (told.controller_term, told.controller_run_id);
    let first = lock(&site.registrar.registered)[0].clone();
    assert_eq!(obeys(first), (0, String::new()));
    lock(&site.registrar.reports).clear();
    before.stop.cancel();
    let _after = site.start("h1", before.sim.clone(), before.files.clone()).await;
    site.until("settled again", settled("h1")).await;
    let again = lock(&site.registrar.registered).last().cloned().unwrap();
    assert_eq!(obeys(again), (1, RUN.to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_told_as_it_was_left_until_a_restarted_agent_has_looked_at_it() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    let sim = before.sim.clone();
    lock(&site.registrar.registered).clear();
    lock(&site.registrar.reports).clear();
    before.stop.cancel();
    let _after = site.start("h1", sim, before.files.clone()).await;
    site.until("settled again", settled("h1")).await;
    let registered = lock(&site.registrar.registered)[0].clone();
    assert!(
        registered.vms[0].observe_time.is_none(),
        "it has looked: the test shows nothing"
    );
    let reports = lock(&site.registrar.reports).clone();
    let told = registered
        .vms
        .iter()
        .chain(reports.iter().flat_map(|report| &report.vms));
    for vm in told {
        assert_eq!(vm.power_state(), v1::PowerState::Running, "{vm:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn incident_11_a_destination_whose_pool_cannot_take_the_disks_refuses_and_need_not_be_asked_again() {
    let site = Site::new();
    let mut host = site.start("h2", site.sim("h2"), Folder::default()).await;
    site.until("a host", |report| report.host == "h2").await;
    host.sim.fail_next(
        Call::CreateVolumes,
        Fault::Error(crate::hypervisor::Error::Storage {
            pool: "local".to_owned(),
            detail: "a file is in the way".to_owned(),
        }),
    );
    let prepare = wire::PrepareMigrationRequest {
        context: host.context(),
        migration_id: MIGRATION.to_owned(),
        vm: vm_intent(2),
        source_host: "h1".to_owned(),
    };
    let refused = host.client.prepare_migration(prepare).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert_eq!(dalgu_proto::reason::of(&refused).as_deref(), Some("STORAGE"));
}

#[tokio::test(start_paused = true)]
async fn a_domain_with_dalgus_mark_that_comes_behind_its_back_is_reported_and_never_touched() {
    let site = Site::new();
    let mut host = site.start("h1", site.sim("h1"), Folder::default()).await;
    site.until("a host", |report| report.host == "h1").await;
    host.ensure().await.unwrap();
    site.until("running", settled("h1")).await;
    let own: VmId = VM.parse().unwrap();
    let definition = host.sim.definition(own).unwrap();
    let by_hand = async |definition: &Definition| {
        host.sim.create_volumes(definition, false).await.unwrap();
        host.sim.define(definition).await.unwrap();
        host.sim.start(definition.id).await.unwrap();
    };
    let shown = |id: VmId| {
        move |report: &wire::ReportRequest| {
            let is_it = |domain: &v1::UnmanagedDomain| {
                domain.uuid == id.to_string() && domain.marked && domain.running && domain.memory_mib == 64
            };
            report.inventory_complete && report.unmanaged_domains.iter().any(is_it)
        }
    };

    let mut theirs = definition.clone();
    theirs.id = VmId::from_uuid(Uuid::from_u128(99));
    theirs.name = "theirs".parse().unwrap();
    by_hand(&theirs).await;
    site.until("one that nobody told it of", shown(theirs.id)).await;
    let sized =
        |report: &wire::ReportRequest| report.vms.iter().any(|vm| vm.memory_mib == 64 && vm.vcpus == 1);
    site.until("the size of its own", sized).await;

    let mistaken = || lock(&site.registrar.reports).iter().any(shown(own));
    assert!(!mistaken(), "its own was taken for one that it was not told of");
    lock(&site.registrar.reports).clear();
    let delete = wire::DeleteVmRequest {
        context: host.context(),
        uid: VM.to_owned(),
        generation: 2,
        epoch: 1,
    };
    host.client.clone().delete_vm(delete).await.unwrap();
    site.until("its own is gone", |report| {
        report.inventory_complete && report.vms.is_empty()
    })
    .await;
    assert!(
        !mistaken(),
        "while it was deleted it was taken for one that it was not told of"
    );
    by_hand(&definition).await;
    site.until("the deleted one that is back", shown(own)).await;

    sleep(Duration::from_mins(5)).await;
    let domains = host.sim.list().await.unwrap();
    assert_eq!(domains.len(), 2);
    assert!(
        domains.iter().all(|domain| domain.state == DomainState::Running),
        "{domains:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn incident_50_a_copied_ledger_is_not_acted_upon_on_another_machine() {
    let site = Site::new();
    let mut first = site.start("h1", site.sim("h1"), Folder::default()).await;
    site.until("a host", |report| report.host == "h1").await;
    first.ensure().await.unwrap();
    site.until("running", settled("h1")).await;
    let state = lock(&first.files).clone();
    assert!(state.len() > 1, "host and VM: {state:?}");

    // The second machine has booted since, so that its agent would start what ran before.
    let sim = site.sim("elsewhere");
    let mut second = site
        .start_on(2, "h1", sim.clone(), Arc::new(Mutex::new(state.clone())))
        .await;
    let refused = second.ensure().await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let ended = second.ended.await.unwrap();
    assert!(matches!(ended, Err(reporter::Error::Copied { .. })), "{ended:?}");
    assert!(sim.domains().is_empty() && sim.local_volumes() == 0);
    assert_eq!(*lock(&second.files), state, "nor is it changed");
    let told = lock(&site.registrar.registered).last().cloned().unwrap();
    assert_ne!(told.machine_id, told.state_machine_id);
    assert!(told.vms.is_empty() && !told.inventory_complete);
    // On its own machine it goes on.
    first.stop.cancel();
    first.ended.await.unwrap().unwrap();
    lock(&site.registrar.reports).clear();
    let _again = site.start("h1", first.sim.clone(), first.files.clone()).await;
    site.until("running again", settled("h1")).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_ends_when_the_controller_is_another_sites_and_touches_nothing() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    let sim = before.sim.clone();
    before.stop.cancel();
    before.ended.await.unwrap().unwrap();
    let state = lock(&before.files).clone();

    *lock(&site.registrar.cluster) = Uuid::from_u128(2).to_string();
    let again = site.start("h1", sim.clone(), before.files.clone()).await;
    let ended = tokio::time::timeout(HYPERVISOR_WAIT * 2, again.ended)
        .await
        .expect("it ends")
        .unwrap();
    assert!(matches!(ended, Err(reporter::Error::Foreign(_))), "{ended:?}");
    let domains = sim.domains();
    assert!(
        matches!(domains[..], [(_, DomainState::Running, _)]),
        "{domains:?}"
    );
    assert_eq!(*lock(&before.files), state);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_own_entry_is_damaged_does_not_start() {
    let site = Site::new();
    let before = site.with_a_vm().await;
    before.stop.cancel();
    before.ended.await.unwrap().unwrap();
    lock(&before.files).insert("host.json".to_owned(), b"{\"session\": ".to_vec());
    let state = lock(&before.files).clone();

    let stop = CancellationToken::new();
    let parts = site.parts(1, "h1", (&before.sim, &before.files, &before.images), &stop);
    let refused = Agent::start(parts, stop).await.map(drop).unwrap_err();
    assert!(refused.to_string().contains("host.json"), "{refused}");
    assert_eq!(before.sim.domains().len(), 1);
    assert_eq!(*lock(&before.files), state);
}
