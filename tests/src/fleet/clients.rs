//! The clients of a fleet: each request of the plan as somebody would make it who tries again when no answer comes.

use std::{sync::Arc, time::Duration};

use dalgu_controller::{api::Services, model::OperationKind};
use dalgu_proto::{
    ids::OperationId,
    tls::{Peer, Role},
    v1::{
        self, host_service_server::HostService, operation_service_server::OperationService,
        vm_service_server::VmService,
    },
};
use futures::future::BoxFuture;
use tonic::{Code, Response, Status};

use crate::cluster;

use super::{
    life::Life,
    plan::{Node, Request, Verb},
    site::Site,
};

/// Longest wait of a client for an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    /// An operation was accepted.
    Operation {
        id: OperationId,
        uid: String,
        generation: u64,
    },
    /// Something was read.
    Vms(Vec<(String, u64)>),
    /// Something else was done.
    Done,
}

type Call = BoxFuture<'static, Result<Answer, Status>>;

/// A request as an operator makes it.
pub fn with_peer<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.extensions_mut().insert(Peer {
        role: Role::Operator,
        name: "fleet".to_owned(),
    });
    request
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
            Self::Relabel | Self::Cancel | Self::Get | Self::List | Self::Cordon | Self::Uncordon => {
                return None;
            }
        })
    }
}

/// Makes a request, again and again where the plan says so.
pub async fn ask(site: Arc<Site>, request: Request) {
    let id = site.ids().next().to_string();
    if let Some(kind) = request.verb.kind() {
        site.checker().send(&id, kind);
    }
    let mut again = request.again;
    for attempt in 0..=request.retries {
        let before = site.checker().known();
        match once(&site, request, &id).await {
            Ok(answer) => {
                take(&site, request, &id, &answer, &before);
                if !std::mem::take(&mut again) {
                    return;
                }
            }
            Err(status) if is_final(&status) => {
                site.trace().say(format_args!(
                    "{:?} {}: {:?}",
                    request.verb,
                    request.object,
                    status.code()
                ));
                return;
            }
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(200 << attempt.min(4))).await;
    }
}

/// Whether trying again would be pointless.
fn is_final(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Aborted | Code::ResourceExhausted
    )
}

async fn once(site: &Arc<Site>, request: Request, id: &str) -> Result<Answer, Status> {
    let unavailable = || Status::unavailable("nobody answers");
    let operation = site.operation_of(request.object);
    let (life, here) = (Life::default(), site.clone());
    let id = id.to_owned();
    let carry = move || -> BoxFuture<'static, Result<Answer, Status>> {
        let Some((there, services)) = here.services() else {
            return Box::pin(async { Err(Status::unavailable("connection refused")) });
        };
        let work = call(
            services,
            request,
            id.clone(),
            operation,
            here.vm_name(request.object),
            here.host_name(request.destination.unwrap_or(0)).to_string(),
        );
        Box::pin(async move {
            there.pass().await;
            work.await
        })
    };
    let sent = site.message(
        &life,
        Node::Client,
        Node::Controller(0),
        name(request.verb),
        carry,
    );
    match tokio::time::timeout(PATIENCE, sent).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Err(unavailable()),
        Err(_) => Err(Status::deadline_exceeded("no answer")),
    }
}

fn name(verb: Verb) -> &'static str {
    match verb {
        Verb::Create | Verb::CreateStopped => "CreateVm",
        Verb::Start => "StartVm",
        Verb::Stop | Verb::ForceStop => "StopVm",
        Verb::Reboot | Verb::Reset => "RestartVm",
        Verb::Pause => "PauseVm",
        Verb::Resume => "ResumeVm",
        Verb::Migrate => "MigrateVm",
        Verb::Relabel => "UpdateVm",
        Verb::Delete | Verb::ForceDelete => "DeleteVm",
        Verb::Cancel => "CancelOperation",
        Verb::Get => "GetVm",
        Verb::List => "ListVms",
        Verb::Cordon => "CordonHost",
        Verb::Uncordon => "UncordonHost",
    }
}

/// The answer has come.
fn take(site: &Site, request: Request, id: &str, answer: &Answer, before: &super::checker::Known) {
    match answer {
        Answer::Operation {
            id: operation,
            uid,
            generation,
        } => {
            let mut checker = site.checker();
            checker.answered(id, *operation);
            checker.read(uid, *generation, 0);
            if let Ok(uid) = uid.parse() {
                checker.acknowledge(uid);
            }
            drop(checker);
            site.note_operation(request.object, *operation);
            site.trace().say(format_args!(
                "{:?} {}: accepted as {operation}",
                request.verb, request.object
            ));
        }
        Answer::Vms(read) => {
            let mut checker = site.checker();
            for (uid, generation) in read {
                let least = before.get(uid).copied().unwrap_or(0);
                checker.read(uid, *generation, least);
            }
        }
        Answer::Done => {}
    }
}

fn accepted(answer: Response<v1::Operation>) -> Result<Answer, Status> {
    let operation = answer.into_inner();
    Ok(Answer::Operation {
        id: operation
            .id
            .parse()
            .map_err(|_| Status::internal("an operation without an id"))?,
        uid: operation.vm_uid,
        generation: operation.generation,
    })
}

fn call(
    services: Services,
    request: Request,
    request_id: String,
    operation: Option<OperationId>,
    name: String,
    destination: String,
) -> Call {
    let host = format!("h{}", request.object + 1);
    let destination_host = if request.destination.is_some() {
        destination
    } else {
        String::new()
    };
    Box::pin(async move {
        match request.verb {
            Verb::Create | Verb::CreateStopped => {
                let stopped = request.verb == Verb::CreateStopped;
                let vm = Some(cluster::vm(&name));
                let message = v1::CreateVmRequest {
                    vm,
                    stopped,
                    request_id,
                    ..Default::default()
                };
                accepted(services.create_vm(with_peer(message)).await?)
            }
            Verb::Start => {
                let message = v1::StartVmRequest {
                    name,
                    request_id,
                    ..Default::default()
                };
                accepted(services.start_vm(with_peer(message)).await?)
            }
            Verb::Stop | Verb::ForceStop => {
                let force = request.verb == Verb::ForceStop;
                let grace_period_seconds = if force { 0 } else { 20 };
                let message = v1::StopVmRequest {
                    name,
                    request_id,
                    force,
                    grace_period_seconds,
                    ..Default::default()
                };
                accepted(services.stop_vm(with_peer(message)).await?)
            }
            Verb::Reboot | Verb::Reset => {
                let mode = if request.verb == Verb::Reset {
                    v1::RestartMode::Reset
                } else {
                    v1::RestartMode::Reboot
                };
                let message = v1::RestartVmRequest {
                    name,
                    request_id,
                    mode: mode.into(),
                    ..Default::default()
                };
                accepted(services.restart_vm(with_peer(message)).await?)
            }
            Verb::Pause => {
                let message = v1::PauseVmRequest {
                    name,
                    request_id,
                    ..Default::default()
                };
                accepted(services.pause_vm(with_peer(message)).await?)
            }
            Verb::Resume => {
                let message = v1::ResumeVmRequest {
                    name,
                    request_id,
                    ..Default::default()
                };
                accepted(services.resume_vm(with_peer(message)).await?)
            }
            Verb::Migrate => {
                let message = v1::MigrateVmRequest {
                    name,
                    request_id,
                    destination_host,
                    ..Default::default()
                };
                accepted(services.migrate_vm(with_peer(message)).await?)
            }
            Verb::Delete | Verb::ForceDelete => {
                let force = request.verb == Verb::ForceDelete;
                let message = v1::DeleteVmRequest {
                    name,
                    request_id,
                    force,
                    ..Default::default()
                };
                accepted(services.delete_vm(with_peer(message)).await?)
            }
            verb => other(services, verb, name, host, request_id, operation).await,
        }
    })
}

/// Requests that lead to no operation.
async fn other(
    services: Services,
    verb: Verb,
    name: String,
    host: String,
    request_id: String,
    operation: Option<OperationId>,
) -> Result<Answer, Status> {
    match verb {
        Verb::Relabel => {
            let labels = [("touched".to_owned(), request_id.clone())].into();
            let vm = Some(v1::Vm {
                name,
                labels,
                ..Default::default()
            });
            let update_mask = Some(prost_types::FieldMask {
                paths: vec!["labels".to_owned()],
            });
            let vm = services
                .update_vm(with_peer(v1::UpdateVmRequest {
                    vm,
                    update_mask,
                    request_id,
                }))
                .await?;
            Ok(read(vec![vm.into_inner()]))
        }
        Verb::Cancel => {
            let Some(id) = operation else {
                return Ok(Answer::Done);
            };
            let message = v1::CancelOperationRequest { id: id.to_string() };
            services
                .cancel_operation(with_peer(message))
                .await
                .map(|_| Answer::Done)
        }
        Verb::List => {
            let answer = services
                .list_vms(with_peer(v1::ListVmsRequest::default()))
                .await?;
            Ok(read(answer.into_inner().vms))
        }
        Verb::Cordon => {
            let message = v1::CordonHostRequest {
                name: host,
                request_id,
                ..Default::default()
            };
            services
                .cordon_host(with_peer(message))
                .await
                .map(|_| Answer::Done)
        }
        Verb::Uncordon => {
            let message = v1::UncordonHostRequest {
                name: host,
                request_id,
            };
            services
                .uncordon_host(with_peer(message))
                .await
                .map(|_| Answer::Done)
        }
        _ => {
            let vm = services.get_vm(with_peer(v1::GetVmRequest { name })).await?;
            Ok(read(vec![vm.into_inner()]))
        }
    }
}

fn read(vms: Vec<v1::Vm>) -> Answer {
    Answer::Vms(vms.into_iter().map(|vm| (vm.uid, vm.generation)).collect())
}
