//! The messages of requests about objects, and the calls of the API that they are sent with.

use dalgu_controller::api::Services;
use dalgu_proto::v1::{
    self, backup_service_server::BackupService, host_service_server::HostService,
    image_service_server::ImageService, network_service_server::NetworkService,
    plan_service_server::PlanService, security_rule::Remote, snapshot_service_server::SnapshotService,
    vm_service_server::VmService, volume_service_server::VolumeService,
};
use tonic::Status;
use uuid::Uuid;

use super::{
    FAST, HOSTS_WITH_IMAGES, Thing, group_name, image_name, network_name, snapshot_name, volume_name,
};
use crate::fleet::{
    clients::with_peer,
    plan::Request,
    request::{Answer, only, vm_of},
};

/// What is sent for one.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each is the API's message")]
pub enum Message {
    CreateVolume(v1::CreateVolumeRequest),
    UpdateVolume(v1::UpdateVolumeRequest),
    DeleteVolume(v1::DeleteVolumeRequest),
    UndeleteVolume(v1::UndeleteVolumeRequest),
    CreateVm(Box<v1::CreateVmRequest>),
    UpdateVm(Box<v1::UpdateVmRequest>),
    CreateNetwork(Box<v1::CreateNetworkRequest>),
    DeleteNetwork(v1::DeleteNetworkRequest),
    CreateGroup(v1::CreateSecurityGroupRequest),
    UpdateGroup(v1::UpdateSecurityGroupRequest),
    DeleteGroup(v1::DeleteSecurityGroupRequest),
    CreateImage(Box<v1::CreateImageRequest>),
    DeleteImage(v1::DeleteImageRequest),
    CreateSnapshot(v1::CreateSnapshotRequest),
    DeleteSnapshot(v1::DeleteSnapshotRequest),
    RevertSnapshot(v1::RevertSnapshotRequest),
    CreateBackup(v1::CreateBackupRequest),
    DeleteBackup(v1::DeleteBackupRequest),
    RestoreBackup(v1::RestoreBackupRequest),
    DrainHost(v1::DrainHostRequest),
    CancelDrain(v1::CancelHostDrainRequest),
    RestoreHost(v1::RestoreHostRequest),
    Plan(Box<v1::CreatePlanRequest>),
    CancelPlan { newest: usize, request_id: String },
}

impl Thing {
    /// What is sent; `vm` is the name of the VM that it is about, `backup` the backup that was chosen.
    #[allow(clippy::too_many_lines, reason = "a table")]
    pub fn message(
        self,
        request: Request,
        vm: String,
        backup: Option<String>,
        request_id: String,
    ) -> Message {
        let name = volume_name(request.object);
        let other = request.other.unwrap_or(0);
        match self {
            Self::CreateVolume | Self::CreateFromImage => Message::CreateVolume(v1::CreateVolumeRequest {
                volume: Some(v1::Volume {
                    name,
                    size_mib: 8,
                    image: match self {
                        Self::CreateFromImage => image_name(other),
                        _ => String::new(),
                    },
                    ..Default::default()
                }),
                request_id,
            }),
            Self::GrowVolume => Message::UpdateVolume(v1::UpdateVolumeRequest {
                volume: Some(v1::Volume {
                    name,
                    size_mib: 16,
                    ..Default::default()
                }),
                update_mask: only("size_mib"),
                request_id,
            }),
            Self::DeleteVolume => Message::DeleteVolume(v1::DeleteVolumeRequest {
                name,
                request_id,
                ..Default::default()
            }),
            Self::UndeleteVolume => Message::UndeleteVolume(v1::UndeleteVolumeRequest {
                name,
                request_id,
                ..Default::default()
            }),
            Self::CreateWithVolume => Message::CreateVm(Box::new(v1::CreateVmRequest {
                vm: Some(with_volume(&vm, Some(other))),
                request_id,
                ..Default::default()
            })),
            Self::Attach | Self::Detach => {
                let volume = (self == Self::Attach).then_some(other);
                Message::UpdateVm(Box::new(v1::UpdateVmRequest {
                    vm: Some(with_volume(&vm, volume)),
                    update_mask: only("spec.disks"),
                    ignore_protection: false,
                    request_id,
                }))
            }
            Self::MoveVolume | Self::ReturnVolume => {
                let mut vm = with_volume(&vm, Some(other));
                let pool = if self == Self::MoveVolume { FAST } else { "local" };
                let disks = vm.spec.iter_mut().flat_map(|spec| &mut spec.disks);
                let volumes = disks.filter(|disk| !disk.volume.is_empty());
                volumes.for_each(|disk| disk.pool = pool.to_owned());
                Message::UpdateVm(Box::new(v1::UpdateVmRequest {
                    vm: Some(vm),
                    update_mask: only("spec.disks"),
                    ignore_protection: false,
                    request_id,
                }))
            }
            Self::CreateNetwork => Message::CreateNetwork(Box::new(v1::CreateNetworkRequest {
                network: Some(network(request.object)),
                request_id,
            })),
            Self::DeleteNetwork => Message::DeleteNetwork(v1::DeleteNetworkRequest {
                name: network_name(request.object),
                request_id,
                ..Default::default()
            }),
            Self::CreateGroup => Message::CreateGroup(v1::CreateSecurityGroupRequest {
                security_group: Some(group(request.object, FIRST_PORT)),
                request_id,
            }),
            Self::UpdateGroup => Message::UpdateGroup(v1::UpdateSecurityGroupRequest {
                security_group: Some(group(request.object, FIRST_PORT + sum(&request_id))),
                update_mask: only("rules"),
                request_id,
            }),
            Self::DeleteGroup => Message::DeleteGroup(v1::DeleteSecurityGroupRequest {
                name: group_name(request.object),
                request_id,
                ..Default::default()
            }),
            Self::CreateImage => Message::CreateImage(Box::new(v1::CreateImageRequest {
                image: Some(v1::Image {
                    name: image_name(request.object),
                    version: "1".to_owned(),
                    format: v1::ImageFormat::Raw.into(),
                    replicas: 2,
                    ..Default::default()
                }),
                source: Some(v1::ImageFile {
                    host: format!("h{}", other % HOSTS_WITH_IMAGES + 1),
                    file: image_name(request.object),
                }),
                request_id,
            })),
            Self::DeleteImage => Message::DeleteImage(v1::DeleteImageRequest {
                name: image_name(request.object),
                version: "1".to_owned(),
                request_id,
                ..Default::default()
            }),
            Self::CreateSnapshot => Message::CreateSnapshot(v1::CreateSnapshotRequest {
                snapshot: Some(v1::Snapshot {
                    name: snapshot_name(other),
                    vm,
                    ..Default::default()
                }),
                request_id,
            }),
            Self::DeleteSnapshot => Message::DeleteSnapshot(v1::DeleteSnapshotRequest {
                vm,
                name: snapshot_name(other),
                request_id,
                ..Default::default()
            }),
            Self::RevertSnapshot => Message::RevertSnapshot(v1::RevertSnapshotRequest {
                vm,
                name: snapshot_name(other),
                discard_later: true,
                request_id,
                ..Default::default()
            }),
            Self::CreateBackup => Message::CreateBackup(v1::CreateBackupRequest {
                vm,
                pool: "local".to_owned(),
                request_id,
                ..Default::default()
            }),
            Self::DeleteBackup => Message::DeleteBackup(v1::DeleteBackupRequest {
                uid: backup.unwrap_or_default(),
                with_children: true,
                request_id,
                ..Default::default()
            }),
            Self::RestoreBackup => Message::RestoreBackup(v1::RestoreBackupRequest {
                uid: backup.unwrap_or_default(),
                name: vm,
                request_id,
                ..Default::default()
            }),
            Self::DrainHost => Message::DrainHost(v1::DrainHostRequest {
                name: host_name(request.object),
                deadline_seconds: DRAIN_SECONDS,
                mode: match sum(&request_id) % 4 {
                    0 => v1::DrainMode::Stop,
                    1 => v1::DrainMode::Ask,
                    _ => v1::DrainMode::Unspecified,
                }
                .into(),
                request_id,
                ..Default::default()
            }),
            Self::CancelDrain => Message::CancelDrain(v1::CancelHostDrainRequest {
                name: host_name(request.object),
                request_id,
            }),
            Self::RestoreHost => Message::RestoreHost(v1::RestoreHostRequest {
                name: host_name(request.object),
                deadline_seconds: DRAIN_SECONDS,
                request_id,
            }),
            Self::CarryOutPlan => Message::Plan(Box::new(plan(request.object, request_id))),
            Self::CancelPlan => Message::CancelPlan {
                newest: request.object,
                request_id,
            },
        }
    }
}

/// A plan of any kind but for the one that needs a host under pressure.
fn plan(object: usize, request_id: String) -> v1::CreatePlanRequest {
    let kind = match sum(&request_id) % 3 {
        0 => v1::PlanKind::Consolidate,
        1 => v1::PlanKind::Evacuate,
        _ => v1::PlanKind::MakeRoom,
    };
    v1::CreatePlanRequest {
        kind: kind.into(),
        hosts: match kind {
            v1::PlanKind::Evacuate => vec![host_name(object)],
            _ => Vec::new(),
        },
        room_for: (kind == v1::PlanKind::MakeRoom).then(|| v1::RoomFor {
            spec: vm_of("great").spec.map(|spec| v1::VmSpec {
                vcpus: GREAT_VCPUS,
                ..spec
            }),
            ..Default::default()
        }),
        request_id,
        ..Default::default()
    }
}

/// Time that drains have: less than a run has to come to rest.
const DRAIN_SECONDS: u32 = 60;

fn host_name(number: usize) -> String {
    format!("h{}", number + 1)
}

/// A VM for which hosts have not always room.
const GREAT_VCPUS: u32 = 4;

/// Lowest port that a security group opens.
const FIRST_PORT: u32 = 20_000;

/// A small number that is a request's own, or nearly.
fn sum(request_id: &str) -> u32 {
    request_id
        .bytes()
        .fold(0, |sum: u32, byte| (sum * 31 + u32::from(byte)) % 10_000)
}

/// A network with few addresses, so that they are given again soon.
fn network(number: usize) -> v1::Network {
    let subnet = v1::Subnet {
        cidr: format!("10.{number}.0.0/29"),
        ..Default::default()
    };
    v1::Network {
        name: network_name(number),
        kind: Some(v1::network::Kind::Overlay(v1::OverlayNetwork::default())),
        ipv4: Some(subnet),
        ..Default::default()
    }
}

/// A security group that opens one port.
fn group(number: usize, port: u32) -> v1::SecurityGroup {
    let rule = v1::SecurityRule {
        direction: v1::Direction::Ingress.into(),
        protocol: v1::Protocol::Tcp.into(),
        first_port: port,
        last_port: port,
        remote: Some(Remote::Cidr("0.0.0.0/0".to_owned())),
        ..Default::default()
    };
    v1::SecurityGroup {
        name: group_name(number),
        rules: vec![rule],
        ..Default::default()
    }
}

/// A VM with its first disk, and a volume.
fn with_volume(name: &str, volume: Option<usize>) -> v1::Vm {
    let mut vm = vm_of(name);
    let disks = vm
        .spec
        .iter_mut()
        .flat_map(|spec| volume.map(|volume| (spec, volume)));
    for (spec, volume) in disks {
        let name = volume_name(volume);
        spec.disks.push(v1::Disk {
            volume: name.clone(),
            name,
            ..Default::default()
        });
    }
    vm
}

impl Message {
    /// Calls the API.
    pub async fn call(self, services: Services) -> Result<Answer, Status> {
        let volume = match self {
            Self::CreateVolume(message) => services.create_volume(with_peer(message)).await?,
            Self::UpdateVolume(message) => services.update_volume(with_peer(message)).await?,
            Self::DeleteVolume(message) => {
                // What is read back is a volume that is to go.
                return done(services.delete_volume(with_peer(message)).await);
            }
            Self::UndeleteVolume(message) => services.undelete_volume(with_peer(message)).await?,
            Self::CreateVm(message) => {
                return Answer::accepted(services.create_vm(with_peer(*message)).await?);
            }
            Self::UpdateVm(message) => {
                let vm = services.update_vm(with_peer(*message)).await?.into_inner();
                return Ok(Answer::read(vec![vm]));
            }
            Self::CreateNetwork(message) => {
                return done(services.create_network(with_peer(*message)).await);
            }
            Self::DeleteNetwork(message) => return done(services.delete_network(with_peer(message)).await),
            Self::CreateGroup(message) => {
                return done(services.create_security_group(with_peer(message)).await);
            }
            Self::UpdateGroup(message) => {
                return done(services.update_security_group(with_peer(message)).await);
            }
            Self::DeleteGroup(message) => {
                return done(services.delete_security_group(with_peer(message)).await);
            }
            Self::CreateImage(message) => return done(services.create_image(with_peer(*message)).await),
            Self::DeleteImage(message) => return done(services.delete_image(with_peer(message)).await),
            Self::CreateSnapshot(message) => {
                return Answer::accepted(services.create_snapshot(with_peer(message)).await?);
            }
            Self::DeleteSnapshot(message) => {
                return Answer::accepted(services.delete_snapshot(with_peer(message)).await?);
            }
            Self::RevertSnapshot(message) => {
                return Answer::accepted(services.revert_snapshot(with_peer(message)).await?);
            }
            Self::CreateBackup(message) => return done(services.create_backup(with_peer(message)).await),
            Self::DeleteBackup(message) => return done(services.delete_backup(with_peer(message)).await),
            Self::DrainHost(message) => return done(services.drain_host(with_peer(message)).await),
            Self::CancelDrain(message) => return done(services.cancel_host_drain(with_peer(message)).await),
            Self::RestoreHost(message) => return done(services.restore_host(with_peer(message)).await),
            Self::Plan(message) => return carry_out(&services, *message).await,
            Self::CancelPlan { newest, request_id } => {
                let plans = services
                    .list_plans(with_peer(v1::ListPlansRequest::default()))
                    .await?
                    .into_inner()
                    .plans;
                let Some(plan) = plans.into_iter().nth(newest) else {
                    return Ok(Answer::Done);
                };
                let message = v1::CancelPlanRequest {
                    id: plan.id,
                    request_id,
                };
                return done(services.cancel_plan(with_peer(message)).await);
            }
            Self::RestoreBackup(message) => {
                return Answer::accepted(services.restore_backup(with_peer(message)).await?);
            }
        };
        Ok(Answer::Volume {
            uid: volume.into_inner().uid,
        })
    }
}

/// A plan is made, and approved as it is.
async fn carry_out(services: &Services, message: v1::CreatePlanRequest) -> Result<Answer, Status> {
    // The same for the same plan, and nobody else's.
    let asked = Uuid::parse_str(&message.request_id).unwrap_or_default();
    let request_id = Uuid::from_u128(!asked.as_u128()).to_string();
    let plan = services.create_plan(with_peer(message)).await?.into_inner();
    let approve = v1::ApprovePlanRequest {
        id: plan.id,
        hash: plan.hash,
        deadline_seconds: DRAIN_SECONDS,
        request_id,
    };
    done(services.approve_plan(with_peer(approve)).await)
}

fn done<T>(answer: Result<tonic::Response<T>, Status>) -> Result<Answer, Status> {
    answer.map(|_| Answer::Done)
}
