//! What a newer operator or controller may send: a value of an enum that is not known is refused by its name, unless nothing
//! comes of the field anyhow. The descriptors are walked, so that no request is left out.

use dalgu_agent::wire as agent_side;
use dalgu_proto::{agent::v1 as agent, v1};
use dalgu_tests::versions::{
    full::{self, POOL},
    future::UNKNOWN,
    site::{CLUSTER, Site},
    story::{self, Operator},
};
use prost::Message;
use prost_reflect::DynamicMessage;
use prost_types::FieldMask;
use tonic::Code;

use crate::{call, nobody};

/// A request that this version's programs take, to the host `h1` where it goes to an agent.
#[allow(
    clippy::too_many_lines,
    reason = "one arm a method, each with its whole message"
)]
fn request(path: &str, site: &Site, web: &agent::VmIntent) -> Vec<u8> {
    let state = site.core().unwrap().db().snapshot();
    let context = || {
        Some(agent::CommandContext {
            cluster_id: CLUSTER.to_string(),
            term: state.meta.term.0,
            session: state.hosts[&story::host("h1").unwrap()].session.0,
            host: "h1".into(),
            controller_run_id: state.run_id.to_string(),
            order: 0,
        })
    };
    let mask = |path: &str| {
        Some(FieldMask {
            paths: vec![path.to_owned()],
        })
    };
    match path.rsplit_once('.').unwrap().1 {
        "VmService/CreateVm" => v1::CreateVmRequest {
            vm: Some(story::vm("new")),
            validate_only: true,
            ..Default::default()
        }
        .encode_to_vec(),
        "VmService/BatchCreateVms" => v1::BatchCreateVmsRequest::default().encode_to_vec(),
        "VmService/UpdateVm" => v1::UpdateVmRequest {
            vm: Some(story::vm("web")),
            update_mask: mask("spec.restart_policy"),
            ..Default::default()
        }
        .encode_to_vec(),
        "VmService/RestartVm" => v1::RestartVmRequest {
            name: "web".into(),
            ..Default::default()
        }
        .encode_to_vec(),
        "PlacementService/ExplainPlacement" => v1::ExplainPlacementRequest {
            subject: Some(v1::explain_placement_request::Subject::Spec(
                story::vm("new").spec.unwrap(),
            )),
            ..Default::default()
        }
        .encode_to_vec(),
        "PlacementService/EstimateCapacity" => v1::EstimateCapacityRequest {
            vcpus: 1,
            memory_mib: 64,
            ..Default::default()
        }
        .encode_to_vec(),
        "PlacementService/CreatePlacementGroup" => v1::CreatePlacementGroupRequest {
            placement_group: Some(v1::PlacementGroup {
                name: "apart".into(),
                rule: v1::PlacementRule::AntiAffinity.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
        .encode_to_vec(),
        "EventService/WatchEvents" => v1::WatchEventsRequest::default().encode_to_vec(),
        "HostService/UpdateHost" => v1::UpdateHostRequest {
            host: Some(v1::Host {
                name: "h1".into(),
                ..Default::default()
            }),
            update_mask: mask("labels"),
            ..Default::default()
        }
        .encode_to_vec(),
        "HostService/DrainHost" => v1::DrainHostRequest {
            name: "h1".into(),
            validate_only: true,
            ..Default::default()
        }
        .encode_to_vec(),
        "PlanService/CreatePlan" => v1::CreatePlanRequest {
            kind: v1::PlanKind::Consolidate.into(),
            ..Default::default()
        }
        .encode_to_vec(),
        "PlanService/PlanMaintenance" => v1::PlanMaintenanceRequest {
            hosts: vec!["h1".into()],
            ..Default::default()
        }
        .encode_to_vec(),
        "SnapshotService/CreateSnapshot" => v1::CreateSnapshotRequest {
            snapshot: Some(v1::Snapshot {
                vm: "web".into(),
                name: "s".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
        .encode_to_vec(),
        "ImageService/CreateImage" => v1::CreateImageRequest {
            image: Some(v1::Image {
                size_bytes: 1,
                ..image()
            }),
            ..Default::default()
        }
        .encode_to_vec(),
        "ImageService/UpdateImage" => v1::UpdateImageRequest {
            image: Some(image()),
            update_mask: mask("visibility"),
            ..Default::default()
        }
        .encode_to_vec(),
        "NetworkService/CreateSecurityGroup" => v1::CreateSecurityGroupRequest {
            security_group: Some(security_group()),
            ..Default::default()
        }
        .encode_to_vec(),
        "NetworkService/UpdateSecurityGroup" => v1::UpdateSecurityGroupRequest {
            security_group: Some(security_group()),
            update_mask: mask("rules"),
            ..Default::default()
        }
        .encode_to_vec(),
        "VolumeService/CreateVolume" => v1::CreateVolumeRequest {
            volume: Some(v1::Volume {
                size_mib: 1,
                ..volume("new")
            }),
            ..Default::default()
        }
        .encode_to_vec(),
        "VolumeService/UpdateVolume" => v1::UpdateVolumeRequest {
            volume: Some(volume("ledger")),
            update_mask: mask("labels"),
            ..Default::default()
        }
        .encode_to_vec(),
        "BackupService/CreateBackup" => v1::CreateBackupRequest {
            vm: "web".into(),
            pool: "local".into(),
            kind: v1::BackupKind::Full.into(),
            ..Default::default()
        }
        .encode_to_vec(),
        "AgentBackupService/StartBackup" => agent::StartBackupRequest {
            context: context(),
            backup_uid: uuid::Uuid::new_v4().to_string(),
            vm_uid: web.uid.clone(),
            vm_name: web.name.clone(),
            spec: web.spec.clone(),
            pool: "local".into(),
            kind: v1::BackupKind::Full.into(),
            parent_uid: String::new(),
        }
        .encode_to_vec(),
        "AgentImageService/ImportImage" => agent::ImportImageRequest {
            context: context(),
            image_uid: uuid::Uuid::new_v4().to_string(),
            format: v1::ImageFormat::Raw.into(),
            file: "debian.img".into(),
            ..Default::default()
        }
        .encode_to_vec(),
        "AgentNetworkService/ApplyNetworks" => agent::ApplyNetworksRequest {
            context: context(),
            networks: Some(agent::HostNetworks {
                version: 1,
                security_groups: vec![security_group()],
                ..Default::default()
            }),
        }
        .encode_to_vec(),
        "AgentService/EnsureVm" => agent::EnsureVmRequest {
            context: context(),
            vm: Some(web.clone()),
        }
        .encode_to_vec(),
        "AgentService/PrepareMigration" => agent::PrepareMigrationRequest {
            context: context(),
            migration_id: uuid::Uuid::new_v4().to_string(),
            vm: Some(web.clone()),
            source_host: "h2".into(),
        }
        .encode_to_vec(),
        _ => {
            panic!("{path} has an enum: say here what a newer caller would send, and below what comes of it")
        }
    }
}

fn image() -> v1::Image {
    v1::Image {
        name: "debian".into(),
        version: "12".into(),
        format: v1::ImageFormat::Raw.into(),
        ..Default::default()
    }
}

fn volume(name: &str) -> v1::Volume {
    v1::Volume {
        name: name.into(),
        ..Default::default()
    }
}

/// A volume that no VM has.
async fn enter_volume(site: &Site) {
    let record = serde_json::json!({
        "id": uuid::Uuid::new_v4(),
        "name": "ledger",
        "size_mib": 1,
        "pool": "local",
        "create_time": "2026-11-28T00:00:00Z",
    });
    let record = serde_json::from_value(record).unwrap();
    let db = site.core().unwrap().db();
    db.change(|tx| tx.put_volume(record)).await;
}

fn security_group() -> v1::SecurityGroup {
    let rule = v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::Tcp.into(),
        ..Default::default()
    };
    v1::SecurityGroup {
        name: "ssh".into(),
        rules: vec![rule],
        ..Default::default()
    }
}

/// An image that no host need have.
async fn enter_image(site: &Site) {
    let record = serde_json::json!({
        "id": uuid::Uuid::new_v4(),
        "name": "debian",
        "version": "12",
        "format": "raw",
        "size_bytes": 1,
        "owner": "operator/admin",
        "visibility": "public",
        "replicas": { "count": 1 },
        "state": "failed",
        "create_time": "2026-11-28T00:00:00Z",
    });
    let record = serde_json::from_value(record).unwrap();
    let db = site.core().unwrap().db();
    db.change(|tx| tx.put_image(record)).await;
}

/// Enums from which nothing follows in these requests: their masks do not name them.
fn without_effect(path: &str, field: &str) -> bool {
    match path.rsplit_once('/').unwrap().1 {
        "UpdateVm" => field != "vm.spec.restart_policy",
        "UpdateHost" | "UpdateVolume" => true,
        "UpdateImage" => field != "image.visibility",
        _ => false,
    }
}

/// As the controller would tell it of the VM.
fn told(site: &Site, name: &str) -> agent::VmIntent {
    let state = site.core().unwrap().db().snapshot();
    let vm = state.vm_by_name(&name.parse().unwrap()).unwrap();
    let intent = dalgu_controller::agent_wire::intent(vm, &vm.intent, vm.epoch, &vm.owner);
    assert!(agent_side::intent(intent.clone()).is_ok());
    intent
}

#[tokio::test(start_paused = true)]
async fn a_value_that_only_a_newer_caller_knows_is_refused_by_the_name_of_its_field() {
    let mut site = Site::new(&["h1"], None).unwrap();
    site.start_controller(nobody()).await.unwrap();
    let host = story::host("h1").unwrap();
    site.start_agent(&host, nobody()).await.unwrap();
    let operator = Operator::new(&site, nobody()).unwrap();
    operator.until_ready(1).await.unwrap();
    story::label_hosts(&operator, &["h1"]).await.unwrap();
    operator.create("web", "h1", false).await.unwrap();
    enter_image(&site).await;
    enter_volume(&site).await;
    let web = told(&site, "web");
    let before = (
        site.servers[&host].sim.domains(),
        site.servers[&host].ledger.files(),
    );
    let mut tried = 0;
    for method in POOL
        .services()
        .flat_map(|service| service.methods().collect::<Vec<_>>())
    {
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        // What agents tell is no request: see `reports`.
        if path.contains("RegistrarService") {
            continue;
        }
        let server = || match path.contains("dalgu.agent.v1") {
            true => site.agent(&host, nobody()).unwrap(),
            false => site.operator(nobody()).unwrap(),
        };
        for field in full::enums(&method.input()) {
            let name = full::name(&field);
            let good = request(&path, &site, &web);
            let mut bad = DynamicMessage::decode(method.input(), good.as_slice()).unwrap();
            full::set_enum(&mut bad, &field, UNKNOWN);
            let (code, said) = call(server(), &path, &bad.encode_to_vec()).await;
            if without_effect(&path, &name) {
                assert_eq!(code, Code::Ok, "{path} {name}: {said}");
            } else {
                assert_eq!(code, Code::InvalidArgument, "{path} {name}: {said}");
                let top = name.split('.').next().unwrap();
                assert!(
                    said.contains("INVALID") || said.contains(top),
                    "{path} {name}: {said}"
                );
            }
            tried += 1;
        }
    }
    assert!(tried > 20, "{tried} enums of requests");
    let after = (
        site.servers[&host].sim.domains(),
        site.servers[&host].ledger.files(),
    );
    assert_eq!(after, before, "something was done all the same");
}
