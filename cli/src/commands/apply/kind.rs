//! The kinds of objects that can be declared: how each is read, made and changed.

use std::time::Duration;

use dalgu_proto::{v1, vm::Invalid};
use prost_types::FieldMask;
use serde_json::Value;
use tonic::Status;

use super::{diff::Difference, normal};
use crate::{
    client::{CALL_TIMEOUT, Client},
    commands::{Session, placement, request_id},
    exit::Error,
    output::json,
};

/// A kind of object; in the order in which they can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A security group.
    SecurityGroup,
    /// A network.
    Network,
    /// A volume.
    Volume,
    /// A schedule of backups.
    BackupSchedule,
    /// A placement group.
    PlacementGroup,
    /// A VM.
    Vm,
}

impl Kind {
    /// All of them, each with the field of a file that lists them.
    pub const LISTS: [(Self, &'static str); 6] = [
        (Self::SecurityGroup, "securityGroups"),
        (Self::Network, "networks"),
        (Self::Volume, "volumes"),
        (Self::BackupSchedule, "backupSchedules"),
        (Self::PlacementGroup, "placementGroups"),
        (Self::Vm, "vms"),
    ];

    /// For people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::SecurityGroup => "security group",
            Self::Network => "network",
            Self::Volume => "volume",
            Self::BackupSchedule => "backup schedule",
            Self::PlacementGroup => "placement group",
            Self::Vm => "VM",
        }
    }

    const fn message(self) -> &'static str {
        match self {
            Self::SecurityGroup => "dalgu.v1.SecurityGroup",
            Self::Network => "dalgu.v1.Network",
            Self::Volume => "dalgu.v1.Volume",
            Self::BackupSchedule => "dalgu.v1.BackupSchedule",
            Self::PlacementGroup => "dalgu.v1.PlacementGroup",
            Self::Vm => "dalgu.v1.Vm",
        }
    }

    /// Fields that can be changed: in the JSON form, and as the call's mask names them.
    const fn mutable(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::SecurityGroup => &[
                ("rules", "rules"),
                ("labels", "labels"),
                ("description", "description"),
            ],
            Self::Network => &[
                ("labels", "labels"),
                ("description", "description"),
                ("domain", "domain"),
                ("dnsServers", "dns_servers"),
            ],
            Self::Volume => &[
                ("labels", "labels"),
                ("description", "description"),
                ("sizeMib", "size_mib"),
            ],
            Self::BackupSchedule => &[
                ("labelSelector", "label_selector"),
                ("pool", "pool"),
                ("every", "every"),
                ("at", "at"),
                ("incrementals", "incrementals"),
                ("keepLast", "keep_last"),
                ("keepDays", "keep_days"),
                ("paused", "paused"),
                ("description", "description"),
            ],
            Self::PlacementGroup => &[],
            Self::Vm => &[
                ("labels", "labels"),
                ("description", "description"),
                ("drainMode", "drain_mode"),
                ("placementGroups", "placement_groups"),
                ("tolerations", "tolerations"),
                ("spec.restartPolicy", "spec.restart_policy"),
                ("spec.vcpus", "spec.vcpus"),
                ("spec.memoryMib", "spec.memory_mib"),
                ("spec.maxVcpus", "spec.max_vcpus"),
                ("spec.maxMemoryMib", "spec.max_memory_mib"),
                ("spec.disks", "spec.disks"),
                ("spec.nics", "spec.nics"),
            ],
        }
    }

    /// Fields that only the controller says.
    const fn output_only(self) -> &'static [&'static str] {
        match self {
            Self::SecurityGroup | Self::Network => &["uid", "interfaces", "etag", "createTime"],
            Self::Volume => &[
                "uid",
                "imageDigest",
                "firmware",
                "status",
                "etag",
                "createTime",
                "deleteTime",
                "purgeTime",
            ],
            Self::BackupSchedule => &["lastTime", "nextTime", "vms", "failures", "etag", "createTime"],
            Self::PlacementGroup => &["vms", "createTime"],
            Self::Vm => &[
                "uid",
                "desiredPowerState",
                "status",
                "generation",
                "etag",
                "createTime",
                "deleteTime",
            ],
        }
    }

    /// Takes out what only the controller says.
    pub fn keep_chosen(self, value: &mut Value) {
        if let Some(fields) = value.as_object_mut() {
            fields.retain(|name, _| !self.output_only().contains(&name.as_str()));
        }
    }

    /// Fields that can be changed, but not be empty.
    pub const fn never_empty(self) -> &'static [&'static str] {
        match self {
            Self::BackupSchedule => &["labelSelector", "pool", "keepLast"],
            _ => &[],
        }
    }

    /// The call's mask for these changes, and the paths that cannot be changed. What may change within a disk or an
    /// interface is the controller's to say.
    pub fn mask(self, differences: &[Difference]) -> (Vec<String>, Vec<String>) {
        let (mut mask, mut fixed) = (Vec::new(), Vec::new());
        for difference in differences {
            let inside = |(json, _): &&(&str, &str)| {
                let rest = difference.path.strip_prefix(json);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
            };
            match self.mutable().iter().find(inside) {
                Some((_, name)) if mask.iter().any(|there| there == name) => {}
                Some((_, name)) => mask.push((*name).to_owned()),
                None => fixed.push(difference.path.clone()),
            }
        }
        (mask, fixed)
    }
}

/// An object as a file says it, or as it is to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Declared {
    /// A security group.
    SecurityGroup(v1::SecurityGroup),
    /// A network.
    Network(Box<v1::Network>),
    /// A volume.
    Volume(Box<v1::Volume>),
    /// A schedule of backups.
    BackupSchedule(Box<v1::BackupSchedule>),
    /// A placement group.
    PlacementGroup(v1::PlacementGroup),
    /// A VM.
    Vm(Box<v1::Vm>),
}

/// A group without the rules that name one of these groups; its own is there once it is made.
pub fn without_rules_for(group: &v1::SecurityGroup, missing: &[String]) -> v1::SecurityGroup {
    use v1::security_rule::Remote;
    let mut group = group.clone();
    let own = group.name.clone();
    group.rules.retain(|rule| match &rule.remote {
        Some(Remote::Group(named)) => *named == own || !missing.contains(named),
        Some(Remote::Cidr(_)) | None => true,
    });
    group
}

impl Declared {
    /// Which kind it is of.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::SecurityGroup(_) => Kind::SecurityGroup,
            Self::Network(_) => Kind::Network,
            Self::Volume(_) => Kind::Volume,
            Self::BackupSchedule(_) => Kind::BackupSchedule,
            Self::PlacementGroup(_) => Kind::PlacementGroup,
            Self::Vm(_) => Kind::Vm,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::SecurityGroup(group) => &group.name,
            Self::Network(network) => &network.name,
            Self::Volume(volume) => &volume.name,
            Self::BackupSchedule(schedule) => &schedule.name,
            Self::PlacementGroup(group) => &group.name,
            Self::Vm(vm) => &vm.name,
        }
    }

    /// Kind and name, for people.
    pub fn title(&self) -> String {
        format!(
            "{} {}",
            self.kind().title(),
            crate::output::human::clean(self.name())
        )
    }

    /// In the JSON form.
    pub fn value(&self) -> Result<Value, Error> {
        let name = self.kind().message();
        let value = match self {
            Self::SecurityGroup(group) => json::value(name, group),
            Self::Network(network) => json::value(name, &**network),
            Self::Volume(volume) => json::value(name, &**volume),
            Self::BackupSchedule(schedule) => json::value(name, &**schedule),
            Self::PlacementGroup(group) => json::value(name, group),
            Self::Vm(vm) => json::value(name, &**vm),
        };
        value.map_err(|why| Error::Format("JSON", why))
    }

    /// From the JSON form.
    pub fn from_value(kind: Kind, value: Value) -> Result<Self, Error> {
        let name = kind.message();
        let object = match kind {
            Kind::SecurityGroup => json::message(name, value).map(Self::SecurityGroup),
            Kind::Network => json::message(name, value).map(|network| Self::Network(Box::new(network))),
            Kind::Volume => json::message(name, value).map(|volume| Self::Volume(Box::new(volume))),
            Kind::BackupSchedule => {
                json::message(name, value).map(|schedule| Self::BackupSchedule(Box::new(schedule)))
            }
            Kind::PlacementGroup => json::message(name, value).map(Self::PlacementGroup),
            Kind::Vm => json::message(name, value).map(|vm| Self::Vm(Box::new(vm))),
        };
        object.map_err(|why| Error::Format("JSON", why))
    }

    /// The same, as the controller would say it.
    pub fn normal(&self) -> Result<Self, Invalid> {
        match self {
            Self::SecurityGroup(group) => normal::group(group).map(Self::SecurityGroup),
            Self::Network(network) => {
                normal::network(network).map(|network| Self::Network(Box::new(network)))
            }
            Self::Volume(volume) => normal::volume(volume).map(|volume| Self::Volume(Box::new(volume))),
            // It has no other form.
            Self::BackupSchedule(schedule) => Ok(Self::BackupSchedule(schedule.clone())),
            Self::PlacementGroup(group) => normal::placement_group(group).map(Self::PlacementGroup),
            Self::Vm(vm) => normal::vm(vm).map(|vm| Self::Vm(Box::new(vm))),
        }
    }

    /// What hinders that it is changed now, and what to do.
    pub fn hindrance(&self) -> Option<String> {
        let gone = match self {
            Self::Vm(vm) if vm.delete_time.is_some() => ("being deleted", "vm"),
            Self::Volume(volume) if state_of(volume) == v1::VolumeState::Purging => {
                ("being removed for good", "volume")
            }
            _ => return None,
        };
        let ((what, word), name) = (gone, crate::output::human::clean(self.name()));
        Some(format!(
            "{} is {what}: wait until `dalgu {word} show {name}` finds none, then apply the file again to have it made anew",
            self.title()
        ))
    }

    /// Since when it is deleted and to be had back.
    pub fn deleted(&self) -> Option<String> {
        match self {
            Self::Volume(volume) => volume.delete_time.as_ref().map(ToString::to_string),
            _ => None,
        }
    }

    /// The object that is there.
    pub async fn current(&self, client: &Client) -> Result<Self, Status> {
        let name = self.name().to_owned();
        match self.kind() {
            Kind::SecurityGroup => {
                let request = v1::GetSecurityGroupRequest { name };
                let group = client
                    .call(async |client| client.networks().get_security_group(request.clone()).await)
                    .await?;
                Ok(Self::SecurityGroup(group))
            }
            Kind::Network => {
                let request = v1::GetNetworkRequest { name };
                let network = client
                    .call(async |client| client.networks().get_network(request.clone()).await)
                    .await?;
                Ok(Self::Network(Box::new(network)))
            }
            Kind::Volume => {
                let request = v1::GetVolumeRequest { name };
                let volume = client
                    .call(async |client| client.volumes().get_volume(request.clone()).await)
                    .await?;
                Ok(Self::Volume(Box::new(volume)))
            }
            Kind::BackupSchedule => {
                let request = v1::GetBackupScheduleRequest { name };
                let schedule = client
                    .call(async |client| client.backups().get_backup_schedule(request.clone()).await)
                    .await?;
                Ok(Self::BackupSchedule(Box::new(schedule)))
            }
            Kind::PlacementGroup => {
                let request = v1::GetPlacementGroupRequest { name };
                let group = client
                    .call(async |client| client.placement().get_placement_group(request.clone()).await)
                    .await?;
                Ok(Self::PlacementGroup(group))
            }
            Kind::Vm => {
                let request = v1::GetVmRequest { name };
                let mut vm = client
                    .call(async |client| client.vms().get_vm(request.clone()).await)
                    .await?;
                // An older controller says BIOS by saying nothing.
                if let Some(spec) = vm.spec.as_mut().filter(|spec| spec.firmware == 0) {
                    spec.set_firmware(v1::Firmware::Bios);
                }
                // And that nothing is asked of its host.
                if let Some(spec) = vm.spec.as_mut().filter(|spec| spec.cpu_policy == 0) {
                    spec.set_cpu_policy(v1::CpuPolicy::Shared);
                    spec.set_numa_policy(v1::NumaPolicy::None);
                }
                Ok(Self::Vm(Box::new(vm)))
            }
        }
    }

    /// Makes it: its name, and for a VM the operation that goes on.
    pub async fn create(
        &self,
        limit: Duration,
        session: &mut Session<'_>,
    ) -> Result<(String, Option<v1::Operation>), Error> {
        let name = self.name().to_owned();
        let request_id = request_id(None);
        match self.clone() {
            Self::SecurityGroup(group) => {
                let request = v1::CreateSecurityGroupRequest {
                    security_group: Some(group),
                    request_id,
                };
                session
                    .change(CALL_TIMEOUT, async |client| {
                        client.networks().create_security_group(request.clone()).await
                    })
                    .await?;
            }
            Self::Network(network) => {
                let request = v1::CreateNetworkRequest {
                    network: Some(*network),
                    request_id,
                };
                session
                    .change(CALL_TIMEOUT, async |client| {
                        client.networks().create_network(request.clone()).await
                    })
                    .await?;
            }
            Self::Volume(volume) => {
                let request = v1::CreateVolumeRequest {
                    volume: Some(*volume),
                    request_id,
                };
                session
                    .change(CALL_TIMEOUT, async |client| {
                        client.volumes().create_volume(request.clone()).await
                    })
                    .await?;
            }
            Self::BackupSchedule(schedule) => {
                let request = v1::CreateBackupScheduleRequest {
                    backup_schedule: Some(*schedule),
                    request_id,
                };
                session
                    .change(CALL_TIMEOUT, async |client| {
                        client.backups().create_backup_schedule(request.clone()).await
                    })
                    .await?;
            }
            Self::PlacementGroup(group) => {
                let request = v1::CreatePlacementGroupRequest {
                    placement_group: Some(group),
                    request_id,
                };
                session
                    .change(CALL_TIMEOUT, async |client| {
                        client.placement().create_placement_group(request.clone()).await
                    })
                    .await?;
            }
            Self::Vm(vm) => {
                placement::are_there(&vm.placement_groups, session).await?;
                let request = v1::CreateVmRequest {
                    vm: Some(*vm),
                    request_id,
                    ..v1::CreateVmRequest::default()
                };
                let operation = session
                    .change(limit, async |client| {
                        client.vms().create_vm(request.clone()).await
                    })
                    .await?;
                return Ok((name, Some(operation)));
            }
        }
        Ok((name, None))
    }

    /// Changes the fields of the mask to what this says, if its etag is the current one. Answers what is there then.
    pub async fn update(self, paths: Vec<String>, session: &mut Session<'_>) -> Result<Self, Error> {
        let (update_mask, request_id) = (Some(FieldMask { paths }), request_id(None));
        match self {
            Self::SecurityGroup(group) => {
                let request = v1::UpdateSecurityGroupRequest {
                    security_group: Some(group),
                    update_mask,
                    request_id,
                };
                let call =
                    async |client: &Client| client.networks().update_security_group(request.clone()).await;
                session.change(CALL_TIMEOUT, call).await.map(Self::SecurityGroup)
            }
            Self::Network(network) => {
                let request = v1::UpdateNetworkRequest {
                    network: Some(*network),
                    update_mask,
                    request_id,
                };
                let call = async |client: &Client| client.networks().update_network(request.clone()).await;
                let network = session.change(CALL_TIMEOUT, call).await?;
                Ok(Self::Network(Box::new(network)))
            }
            Self::Volume(volume) => {
                let request = v1::UpdateVolumeRequest {
                    volume: Some(*volume),
                    update_mask,
                    request_id,
                };
                let call = async |client: &Client| client.volumes().update_volume(request.clone()).await;
                let volume = session.change(CALL_TIMEOUT, call).await?;
                Ok(Self::Volume(Box::new(volume)))
            }
            Self::BackupSchedule(schedule) => {
                let request = v1::UpdateBackupScheduleRequest {
                    backup_schedule: Some(*schedule),
                    update_mask,
                    request_id,
                };
                let call =
                    async |client: &Client| client.backups().update_backup_schedule(request.clone()).await;
                let schedule = session.change(CALL_TIMEOUT, call).await?;
                Ok(Self::BackupSchedule(Box::new(schedule)))
            }
            // Its kind has no field that a mask could name.
            Self::PlacementGroup(_) => Err(Error::Usage(format!("{} cannot be changed", self.title()))),
            Self::Vm(vm) => {
                let request = v1::UpdateVmRequest {
                    vm: Some(*vm),
                    update_mask,
                    request_id,
                    ignore_protection: false,
                };
                let call = async |client: &Client| client.vms().update_vm(request.clone()).await;
                let vm = session.change(CALL_TIMEOUT, call).await?;
                Ok(Self::Vm(Box::new(vm)))
            }
        }
    }

    /// Takes the deletion of a volume back. Answers what is there then.
    pub async fn undelete(self, session: &mut Session<'_>) -> Result<Self, Error> {
        let Self::Volume(volume) = self else {
            return Ok(self);
        };
        let request = v1::UndeleteVolumeRequest {
            name: volume.name,
            etag: volume.etag,
            request_id: request_id(None),
        };
        let call = async |client: &Client| client.volumes().undelete_volume(request.clone()).await;
        let volume = session.change(CALL_TIMEOUT, call).await?;
        Ok(Self::Volume(Box::new(volume)))
    }
}

fn state_of(volume: &v1::Volume) -> v1::VolumeState {
    let status = volume.status.as_ref();
    status.map_or(v1::VolumeState::Unspecified, v1::VolumeStatus::state)
}
