//! What clients say and hear: the message of each request, and what its answer means to the checker. The same on every
//! level; how messages are carried is the level's own.

use std::collections::HashMap;

use dalgu_controller::model::OperationKind;
use dalgu_proto::{ids::OperationId, v1};
use tonic::{Code, Response, Status};

use crate::cluster;

use super::{
    checker::{Checker, Known, Meaning, Told},
    objects,
    plan::{Request, Verb},
};

/// The label that says which request has changed labels last.
const TOUCHED: &str = "touched";

/// What is sent.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each is the API's message")]
pub enum Message {
    Create(v1::CreateVmRequest),
    Start(v1::StartVmRequest),
    Stop(v1::StopVmRequest),
    Restart(v1::RestartVmRequest),
    Pause(v1::PauseVmRequest),
    Resume(v1::ResumeVmRequest),
    Migrate(v1::MigrateVmRequest),
    Update(v1::UpdateVmRequest),
    Delete(v1::DeleteVmRequest),
    Cancel(v1::CancelOperationRequest),
    Get(v1::GetVmRequest),
    List(v1::ListVmsRequest),
    Cordon(v1::CordonHostRequest),
    Uncordon(v1::UncordonHostRequest),
    RelabelHost(Box<v1::UpdateHostRequest>),
    ForgetHost(v1::DeleteHostRequest),
    Thing(objects::Message),
}

/// A VM as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    uid: String,
    told: Told,
    meaning: Meaning,
    name: String,
    host: String,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// An operation was accepted.
    Operation {
        /// Which.
        id: OperationId,
        /// The VM's UUID.
        uid: String,
        /// The generation of its intent.
        generation: u64,
    },
    /// VMs were read.
    Vms(Vec<Read>),
    /// A volume was made, changed or taken back.
    Volume {
        /// Its UUID.
        uid: String,
    },
    /// Something else was done.
    Done,
}

impl Verb {
    /// The kind of operation it leads to.
    pub fn kind(self) -> Option<OperationKind> {
        Some(match self {
            Self::Create | Self::CreateStopped => OperationKind::Create,
            Self::Start => OperationKind::Start,
            Self::Stop | Self::ForceStop => OperationKind::Stop,
            Self::Reboot | Self::Reset => OperationKind::Restart,
            Self::Pause => OperationKind::Pause,
            Self::Resume => OperationKind::Resume,
            Self::Migrate => OperationKind::Migrate,
            Self::Delete | Self::ForceDelete => OperationKind::Delete,
            Self::Relabel
            | Self::Cancel
            | Self::Get
            | Self::List
            | Self::Cordon
            | Self::Uncordon
            | Self::RelabelHost
            | Self::ForgetHost => {
                return None;
            }
            Self::Thing(thing) => return thing.kind(),
        })
    }

    /// The API's method.
    pub fn method(self) -> &'static str {
        match self {
            Self::Create | Self::CreateStopped => "CreateVm",
            Self::Start => "StartVm",
            Self::Stop | Self::ForceStop => "StopVm",
            Self::Reboot | Self::Reset => "RestartVm",
            Self::Pause => "PauseVm",
            Self::Resume => "ResumeVm",
            Self::Migrate => "MigrateVm",
            Self::Relabel => "UpdateVm",
            Self::Delete | Self::ForceDelete => "DeleteVm",
            Self::Cancel => "CancelOperation",
            Self::Get => "GetVm",
            Self::List => "ListVms",
            Self::Cordon => "CordonHost",
            Self::Uncordon => "UncordonHost",
            Self::RelabelHost => "UpdateHost",
            Self::ForgetHost => "DeleteHost",
            Self::Thing(thing) => thing.method(),
        }
    }
}

impl Request {
    /// What is sent for it about the VM of this name, under this id; `operation` is the one that a cancellation means, and without one there is
    /// nothing to send.
    pub fn message(
        self,
        name: String,
        request_id: String,
        operation: Option<OperationId>,
        backup: Option<String>,
    ) -> Option<Message> {
        let destination_host = self
            .other
            .map(|host| format!("h{}", host + 1))
            .unwrap_or_default();
        Some(match self.verb {
            Verb::Create | Verb::CreateStopped => Message::Create(v1::CreateVmRequest {
                vm: Some(vm_of(&name)),
                stopped: self.verb == Verb::CreateStopped,
                request_id,
                ..Default::default()
            }),
            Verb::Start => Message::Start(v1::StartVmRequest {
                name,
                request_id,
                ..Default::default()
            }),
            Verb::Stop | Verb::ForceStop => {
                Message::Stop(stop(name, request_id, self.verb == Verb::ForceStop))
            }
            Verb::Reboot | Verb::Reset => {
                let mode = if self.verb == Verb::Reset {
                    v1::RestartMode::Reset
                } else {
                    v1::RestartMode::Reboot
                };
                Message::Restart(v1::RestartVmRequest {
                    name,
                    request_id,
                    mode: mode.into(),
                    ..Default::default()
                })
            }
            Verb::Pause => Message::Pause(v1::PauseVmRequest {
                name,
                request_id,
                ..Default::default()
            }),
            Verb::Resume => Message::Resume(v1::ResumeVmRequest {
                name,
                request_id,
                ..Default::default()
            }),
            Verb::Migrate => Message::Migrate(v1::MigrateVmRequest {
                name,
                request_id,
                destination_host,
                ..Default::default()
            }),
            Verb::Delete | Verb::ForceDelete => Message::Delete(v1::DeleteVmRequest {
                name,
                request_id,
                force: self.verb == Verb::ForceDelete,
                ..Default::default()
            }),
            Verb::Relabel => Message::Update(relabel(name, request_id)),
            Verb::Cancel => Message::Cancel(v1::CancelOperationRequest {
                id: operation?.to_string(),
            }),
            Verb::Get => Message::Get(v1::GetVmRequest { name }),
            Verb::List => Message::List(v1::ListVmsRequest::default()),
            Verb::Cordon => Message::Cordon(v1::CordonHostRequest {
                name: format!("h{}", self.object + 1),
                request_id,
                ..Default::default()
            }),
            Verb::Uncordon => Message::Uncordon(v1::UncordonHostRequest {
                name: format!("h{}", self.object + 1),
                request_id,
            }),
            Verb::RelabelHost => {
                let request = relabel_host(format!("h{}", self.object + 1), request_id);
                Message::RelabelHost(Box::new(request))
            }
            Verb::ForgetHost => Message::ForgetHost(v1::DeleteHostRequest {
                name: format!("h{}", self.object + 1),
                request_id,
            }),
            Verb::Thing(thing) => Message::Thing(thing.message(self, name, backup, request_id)),
        })
    }
}

fn stop(name: String, request_id: String, force: bool) -> v1::StopVmRequest {
    v1::StopVmRequest {
        name,
        request_id,
        force,
        grace_period_seconds: if force { 0 } else { 20 },
        ..Default::default()
    }
}

/// Labels that say which request has written them.
fn touched(request_id: &str) -> HashMap<String, String> {
    [(TOUCHED.to_owned(), request_id.to_owned())].into()
}

/// The VM of this name as clients make it.
pub fn vm_of(name: &str) -> v1::Vm {
    let number = name.split('-').nth(1).and_then(|number| number.parse().ok());
    let mut vm = cluster::vm(name);
    if let (Some(spec), Some(number)) = (&mut vm.spec, number) {
        spec.nics = objects::nics(number);
        if let Some(disk) = spec.disks.first_mut() {
            disk.image = objects::image(number);
        }
    }
    vm
}

/// The mask of an update that changes one thing.
pub fn only(path: &str) -> Option<prost_types::FieldMask> {
    let paths = vec![path.to_owned()];
    Some(prost_types::FieldMask { paths })
}

/// Changes labels, and by the number in its id what the VM is made of with them: its size, or a second disk that comes or goes.
fn relabel(name: String, request_id: String) -> v1::UpdateVmRequest {
    let number = request_id.bytes().fold(0_u8, u8::wrapping_add);
    let (what, how) = (number % 4, number / 4 % 2);
    let mut spec = vm_of(&name).spec.unwrap_or_default();
    let mut paths = vec!["labels"];
    match what {
        0 => {
            (spec.vcpus, spec.max_vcpus) = (1 + u32::from(how), 2);
            (spec.memory_mib, spec.max_memory_mib) = (64 << how, 128);
            paths.extend([
                "spec.vcpus",
                "spec.max_vcpus",
                "spec.memory_mib",
                "spec.max_memory_mib",
            ]);
        }
        1 | 2 => {
            let second = v1::Disk {
                name: format!("data{how}"),
                ..spec.disks[0].clone()
            };
            spec.disks.extend((what == 1).then_some(second));
            paths.push("spec.disks");
        }
        _ => {}
    }
    let vm = v1::Vm {
        name,
        labels: touched(&request_id),
        spec: Some(spec),
        ..Default::default()
    };
    let paths = paths.into_iter().map(str::to_owned).collect();
    v1::UpdateVmRequest {
        vm: Some(vm),
        update_mask: Some(prost_types::FieldMask { paths }),
        ignore_protection: false,
        request_id,
    }
}

fn relabel_host(name: String, request_id: String) -> v1::UpdateHostRequest {
    let host = v1::Host {
        name,
        labels: touched(&request_id),
        ..Default::default()
    };
    v1::UpdateHostRequest {
        host: Some(host),
        update_mask: only("labels"),
        request_id,
    }
}

impl Read {
    fn of(vm: v1::Vm) -> Self {
        let revision = vm
            .etag
            .strip_prefix('r')
            .and_then(|revision| revision.parse().ok());
        let touched = vm.labels.get(TOUCHED).and_then(|id| id.parse().ok());
        Self {
            told: Told {
                generation: vm.generation,
                revision: revision.expect("the etag is the revision"),
            },
            meaning: Meaning {
                desired: vm.desired_power_state,
                touched,
            },
            uid: vm.uid,
            name: vm.name,
            host: vm.status.map(|status| status.host).unwrap_or_default(),
        }
    }
}

impl Answer {
    /// An operation was answered.
    pub fn accepted(answer: Response<v1::Operation>) -> Result<Self, Status> {
        let operation = answer.into_inner();
        Ok(Self::Operation {
            id: operation
                .id
                .parse()
                .map_err(|_| Status::internal("an operation without an id"))?,
            uid: operation.vm_uid,
            generation: operation.generation,
        })
    }

    /// VMs were read.
    pub fn read(vms: Vec<v1::Vm>) -> Self {
        Self::Vms(vms.into_iter().map(Read::of).collect())
    }

    /// The numbers of the VMs that it shows on a host.
    pub fn on(&self, host: usize) -> Vec<usize> {
        let Self::Vms(vms) = self else {
            return Vec::new();
        };
        let name = format!("h{}", host + 1);
        let number = |vm: &Read| vm.name.split('-').nth(1)?.parse().ok();
        let there = vms.iter().filter(|vm| vm.host == name);
        there.filter_map(number).collect()
    }

    /// Tells the checker of the answer to the request with this id. `known` is what had been told when the request was made
    /// first, and when it was made last.
    pub fn tell(&self, checker: &mut Checker, request_id: &str, known: [&Known; 2]) {
        let least = |known: &Known, uid| known.get(uid).copied().unwrap_or_default();
        match self {
            Self::Operation { id, uid, generation } => {
                checker.answered(request_id, *id);
                // The same request again is answered with the operation of the first one, which says nothing of the revision.
                let least = least(known[0], uid);
                let told = Told {
                    generation: *generation,
                    ..least
                };
                checker.read(uid, told, least);
                if let Ok(uid) = uid.parse() {
                    checker.acknowledge(uid);
                }
            }
            Self::Vms(read) => {
                for vm in read {
                    checker.read(&vm.uid, vm.told, least(known[1], &vm.uid));
                    checker.means(&vm.uid, vm.told, vm.meaning);
                }
            }
            Self::Volume { uid } => {
                if let Ok(volume) = uid.parse() {
                    checker.acknowledge_volume(volume);
                }
            }
            Self::Done => {}
        }
    }
}

/// Whether trying again would be pointless.
pub fn is_final(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Aborted | Code::ResourceExhausted
    )
}
