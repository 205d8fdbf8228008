//! What a newer agent may tell: of a word that this version does not know nothing follows. The VM is neither lost, nor
//! stopped, started, moved or deleted for it.

use std::{sync::Arc, time::Duration};

use dalgu_agent::hypervisor::DomainState;
use dalgu_controller::{
    agent_wire,
    model::{HeldImage, ImagePhase, Transfer, VmPhase},
};
use dalgu_proto::{agent::v1 as agent, host::Inventory, v1, vm::PowerReason};
use dalgu_tests::versions::{
    full::{self, POOL},
    future::{MoreFields, MoreValues, UNKNOWN},
    site::Site,
    story::{self, Operator},
    wire::Tap,
};
use prost::Message;
use tokio::time::sleep;

use crate::nobody;

fn host() -> dalgu_proto::ids::HostName {
    "h1".parse().unwrap()
}

/// A report of a VM that runs, with one of its enums unknown.
fn changed<T: Message + Default>(name: &str, path: &[prost_reflect::FieldDescriptor]) -> T {
    let mut message = full::message(&full::descriptor(name));
    full::set_enum(&mut message, path, UNKNOWN);
    T::decode(message.encode_to_vec().as_slice()).unwrap()
}

/// What the controller makes of a VM's report with one enum unknown.
fn check_vm(path: &[prost_reflect::FieldDescriptor]) {
    let mut wire: agent::VmReport = changed("dalgu.agent.v1.VmReport", path);
    wire.uid = uuid::Uuid::from_u128(1).to_string();
    if let Some(migration) = &mut wire.migration {
        migration.migration_id = uuid::Uuid::from_u128(2).to_string();
    }
    let own = agent_wire::reported(&host(), wire).expect("a VM that is told of is not left out");
    let seen = &own.observation;
    match full::name(path).as_str() {
        "power_state" => {
            assert_eq!((seen.power, seen.phase), (None, VmPhase::Unknown));
            assert!(!seen.is_absent() && !seen.is_off(), "taken for gone or off");
        }
        "phase" => assert!(seen.phase == VmPhase::Unknown && !seen.is_off()),
        "power_reason" => assert_eq!(seen.power_reason, PowerReason::Unknown),
        "migration.transfer" => assert_eq!(own.transfer_over, None, "taken for ended"),
        // Only its id and its end are read here.
        "migration.role" | "migration.presence" | "migration.progress.phase" => {
            assert!(own.migration.is_some());
        }
        // A will that is not understood as a whole is none.
        "told.power_state" | "told.restart_mode" | "told.restart_policy" => assert_eq!(own.told, None),
        part if part.starts_with("told.spec.") => assert_eq!(own.told, None, "{part}"),
        other => panic!("VmReport.{other}: say here what comes of it"),
    }
}

/// What the controller makes of what a host says of an image with one enum unknown.
fn check_image(path: &[prost_reflect::FieldDescriptor]) {
    let mut wire: agent::ImageReport = changed("dalgu.agent.v1.ImageReport", path);
    wire.image_uid = String::new();
    wire.digest = "ab".repeat(32);
    match (full::name(path).as_str(), agent_wire::image::held(wire)) {
        ("phase", Some(HeldImage::Copy(_, held))) => assert_eq!(held.phase, ImagePhase::Unknown),
        (other, held) => panic!("ImageReport.{other}: say here what comes of it: {held:?}"),
    }
}

/// What the controller makes of a host's part in a migration with one enum unknown.
fn check_part(path: &[prost_reflect::FieldDescriptor]) {
    let own = agent_wire::part(changed("dalgu.agent.v1.MigrationReport", path));
    match full::name(path).as_str() {
        "role" => assert!(own.known, "taken for a host that knows nothing of it"),
        "transfer" => assert_eq!(own.transfer, Transfer::Unknown),
        "presence" => assert_eq!(own.presence, None, "something is concluded"),
        // The controller has the phase itself.
        "progress.phase" => {}
        other => panic!("MigrationReport.{other}: say here what comes of it"),
    }
}

#[test]
fn nothing_follows_from_a_value_that_only_a_newer_agent_knows() {
    let mut checked = 0;
    for service in ["RegistrarService", "AgentService"] {
        let service = POOL
            .get_service_by_name(&format!("dalgu.agent.v1.{service}"))
            .unwrap();
        for method in service.methods() {
            let told = if service.name() == "AgentService" {
                method.output()
            } else {
                method.input()
            };
            for path in full::enums(&told) {
                if full::name(&path).ends_with("inventory.guest_features") {
                    let wire: v1::HostInventory = changed("dalgu.v1.HostInventory", &path[path.len() - 1..]);
                    let own = Inventory::from(wire);
                    assert!(own.guest_features.is_empty(), "something is concluded");
                    checked += 1;
                    continue;
                }
                // The message of agents in which it is.
                let inner = path.iter().position(|field| {
                    let name = field.parent_message().full_name().to_owned();
                    ["VmReport", "MigrationReport", "ImageReport"]
                        .iter()
                        .any(|told| name == format!("dalgu.agent.v1.{told}"))
                });
                let inner = inner.unwrap_or_else(|| panic!("{}: {}", told.name(), full::name(&path)));
                match path[inner].parent_message().name() {
                    "VmReport" => check_vm(&path[inner..]),
                    "ImageReport" => check_image(&path[inner..]),
                    _ => check_part(&path[inner..]),
                }
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "{checked} enums of reports");
}

async fn site(tap: Arc<dyn Tap>) -> (Site, Operator) {
    let mut site = Site::new(&["h1", "h2"], None).unwrap();
    put(&mut site, tap).await;
    let operator = Operator::new(&site, nobody()).unwrap();
    operator.until_ready(2).await.unwrap();
    story::label_hosts(&operator, &["h1", "h2"]).await.unwrap();
    (site, operator)
}

/// Starts all programs anew, with somebody else on the wires.
async fn put(site: &mut Site, tap: Arc<dyn Tap>) {
    site.start_controller(tap.clone()).await.unwrap();
    for host in ["h1", "h2"] {
        site.start_agent(&story::host(host).unwrap(), tap.clone())
            .await
            .unwrap();
    }
}

async fn vm(operator: &Operator) -> v1::Vm {
    let request = v1::GetVmRequest { name: "web".into() };
    operator.vms().get_vm(request).await.unwrap().into_inner()
}

fn domains(site: &Site) -> Vec<DomainState> {
    let all = site.servers.values().flat_map(|server| server.sim.domains());
    all.map(|(_, state, _)| state).collect()
}

/// Every way on which a VM is told of.
const TOLD: [&str; 4] = ["Register", "Report", "EnsureVm", "DeleteVm"];

#[tokio::test(start_paused = true)]
async fn an_unknown_power_state_stops_starts_moves_and_deletes_nothing() {
    let (mut site, operator) = site(nobody()).await;
    operator.create("web", "h1", false).await.unwrap();
    put(&mut site, Arc::new(MoreValues::new(&TOLD, &["power_state"]))).await;
    let operator = Operator::new(&site, nobody()).unwrap();
    operator.until_ready(2).await.unwrap();
    sleep(Duration::from_secs(120)).await;
    assert_eq!(domains(&site), [DomainState::Running]);
    let seen = vm(&operator).await.status.unwrap();
    assert_eq!(seen.state(), v1::VmState::Resolving, "{seen:?}");
    let delete = v1::DeleteVmRequest {
        name: "web".into(),
        ..Default::default()
    };
    let refused = operator.vms().delete_vm(delete).await.unwrap_err();
    assert_eq!(dalgu_proto::reason::of(&refused).as_deref(), Some("VM_RUNNING"));
    let refused = operator.migrate("web", "h2").await.unwrap_err();
    assert!(refused.to_string().contains("not running"), "{refused}");
    // What is asked for is told to the agent all the same, and ends when that says so in a known word.
    let stop = v1::StopVmRequest {
        name: "web".into(),
        force: true,
        ..Default::default()
    };
    let stop = operator.vms().stop_vm(stop).await.unwrap().into_inner();
    sleep(Duration::from_secs(60)).await;
    assert_eq!(domains(&site), [DomainState::Stopped]);
    let request = v1::GetOperationRequest { id: stop.id.clone() };
    let open = operator
        .operations()
        .get_operation(request)
        .await
        .unwrap()
        .into_inner();
    assert!(open.end_time.is_none(), "{open:?}");
    assert_eq!(
        vm(&operator).await.status.unwrap().state(),
        v1::VmState::Resolving
    );
    put(&mut site, nobody()).await;
    let operator = Operator::new(&site, nobody()).unwrap();
    operator.done(stop).await.unwrap();
    assert_eq!(domains(&site), [DomainState::Stopped]);
}

#[tokio::test(start_paused = true)]
async fn a_vm_in_an_unknown_phase_is_not_gone() {
    let (site, operator) = site(Arc::new(MoreValues::new(&TOLD, &["phase"]))).await;
    operator.create("web", "h1", false).await.unwrap();
    sleep(Duration::from_secs(120)).await;
    assert_eq!(domains(&site), [DomainState::Running]);
    let epoch = vm(&operator).await.status.unwrap().epoch;
    let delete = v1::DeleteVmRequest {
        name: "web".into(),
        force: true,
        ..Default::default()
    };
    let delete = operator.vms().delete_vm(delete).await.unwrap().into_inner();
    operator.done(delete).await.unwrap();
    assert_eq!((domains(&site).len(), epoch), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_migration_whose_hosts_answer_in_unknown_words_is_not_concluded() {
    let words = ["role", "transfer", "presence"];
    let calls = ["GetMigration", "SettleMigration", "Report", "Register"];
    let (mut site, operator) = site(Arc::new(MoreValues::new(&calls, &words))).await;
    operator.create("web", "h1", false).await.unwrap();
    let moving = operator.migrate("web", "h2").await.unwrap();
    operator.copying(&moving).await.unwrap();
    let cancel = v1::CancelOperationRequest {
        id: moving.id.clone(),
    };
    operator.operations().cancel_operation(cancel).await.unwrap();
    sleep(Duration::from_secs(120)).await;
    let seen = vm(&operator).await.status.unwrap();
    assert_eq!(
        (seen.state(), seen.epoch),
        (v1::VmState::Resolving, 1),
        "{seen:?}"
    );
    let running = domains(&site)
        .into_iter()
        .filter(|state| *state == DomainState::Running);
    assert!(running.count() <= 1, "it runs twice");
    put(&mut site, nobody()).await;
    let operator = Operator::new(&site, nobody()).unwrap();
    operator.ended(moving).await.unwrap();
    operator.until_ready(2).await.unwrap();
    assert_eq!(domains(&site), [DomainState::Running]);
    assert_eq!(vm(&operator).await.status.unwrap().state(), v1::VmState::Running);
}

#[tokio::test(start_paused = true)]
async fn fields_that_nobody_knows_in_every_message_change_nothing() {
    let consoles = tempfile::tempdir().unwrap();
    let mut site = Site::new(&story::HOSTS, Some(consoles.path().to_owned())).unwrap();
    let tap: Arc<dyn Tap> = Arc::new(MoreFields::new());
    story::tell(&mut site, tap.clone()).await.unwrap();
    story::resume(&mut site, tap).await.unwrap();
}
