//! The clients of a fleet: each request of the plan as somebody would make it who tries again when no answer comes.

use std::{sync::Arc, time::Duration};

use dalgu_controller::{api::Services, model::OperationKind};
use dalgu_proto::{
    tls::{Peer, Role},
    v1::{
        host_service_server::HostService, operation_service_server::OperationService,
        vm_service_server::VmService,
    },
};
use futures::future::BoxFuture;
use tonic::Status;

use super::{
    life::Life,
    objects::{self, Thing},
    plan::{Node, Request, Verb},
    request::{Answer, Message, is_final},
    site::Site,
};

/// Longest wait of a client for an answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A request as an operator makes it.
pub fn with_peer<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.extensions_mut().insert(Peer {
        role: Role::Operator,
        name: "fleet".to_owned(),
    });
    request
}

/// Empties a host by hand: closes it, moves away what the API says is there, and opens it again some time later.
pub async fn drain(site: Arc<Site>, host: usize, time: Duration) {
    let of = |verb, object| Request {
        verb,
        object,
        other: None,
        retries: 3,
        again: false,
    };
    ask(site.clone(), of(Verb::Cordon, host)).await;
    let listed = ask(site.clone(), of(Verb::List, host)).await;
    for vm in listed.iter().flat_map(|answer| answer.on(host)) {
        if ask(site.clone(), of(Verb::Migrate, vm)).await.is_some() {
            site.note_emptying();
        }
    }
    tokio::time::sleep(time).await;
    ask(site, of(Verb::Uncordon, host)).await;
}

/// Makes a request, again and again where the plan says so; the answer that came last.
pub async fn ask(site: Arc<Site>, request: Request) -> Option<Answer> {
    let id = site.ids().next().to_string();
    if let Some(kind) = request.verb.kind() {
        site.checker().send(&id, kind);
    }
    let (mut again, mut last) = (request.again, None);
    let first = site.checker().known();
    let backup = site.some_backup(request.object);
    for attempt in 0..=request.retries {
        let before = site.checker().known();
        let term = site.term();
        match once(&site, request, &id, backup.clone()).await {
            Ok(answer) => {
                answer.tell(&mut site.checker(), &id, [&first, &before]);
                note(&site, request, &answer);
                last = Some(answer);
                if !std::mem::take(&mut again) {
                    break;
                }
            }
            Err(status) if is_final(&status) => {
                // Of whom it came is known where there was one controller all the time.
                if let Some(term) = term.filter(|term| site.term() == Some(*term)) {
                    site.checker().turned_away(&id, term);
                }
                site.trace().say(format_args!(
                    "{:?} {}: {:?} to request {id}",
                    request.verb,
                    request.object,
                    status.code()
                ));
                break;
            }
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(200 << attempt.min(4))).await;
    }
    last
}

async fn once(
    site: &Arc<Site>,
    request: Request,
    id: &str,
    backup: Option<String>,
) -> Result<Answer, Status> {
    let unavailable = || Status::unavailable("nobody answers");
    let (life, here, id) = (Life::default(), site.clone(), id.to_owned());
    let operation = site.operation_of(request.object);
    let carry = move || -> BoxFuture<'static, Result<Answer, Status>> {
        let Some((there, services)) = here.services() else {
            return Box::pin(async { Err(Status::unavailable("connection refused")) });
        };
        let name = here.vm_name(request.object);
        if request.verb.kind() == Some(OperationKind::Delete) && here.is_missed(&name) {
            // The operator's own word, not the controller's: a copy of the request may still be carried out.
            return Box::pin(async { Err(Status::unavailable("it is on a host that is waited for")) });
        }
        let message = request.message(name, id.clone(), operation, backup.clone());
        if let Verb::Thing(Thing::DeleteVolume) = request.verb {
            here.checker()
                .deletes_volume(objects::volume_name(request.object));
        }
        Box::pin(async move {
            there.pass().await;
            match message {
                Some(message) => call(services, message).await,
                None => Ok(Answer::Done),
            }
        })
    };
    let sent = site.message(
        &life,
        Node::Client,
        Node::Controller(0),
        request.verb.method(),
        carry,
    );
    match tokio::time::timeout(PATIENCE, sent).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Err(unavailable()),
        Err(_) => Err(Status::deadline_exceeded("no answer")),
    }
}

/// An accepted operation is one that a later request may cancel.
fn note(site: &Site, request: Request, answer: &Answer) {
    if let Answer::Operation { id, .. } = answer {
        site.note_operation(request.object, *id);
        site.trace().say(format_args!(
            "{:?} {}: accepted as {id}",
            request.verb, request.object
        ));
    }
}

async fn call(services: Services, message: Message) -> Result<Answer, Status> {
    match message {
        Message::Create(message) => Answer::accepted(services.create_vm(with_peer(message)).await?),
        Message::Start(message) => Answer::accepted(services.start_vm(with_peer(message)).await?),
        Message::Stop(message) => Answer::accepted(services.stop_vm(with_peer(message)).await?),
        Message::Restart(message) => Answer::accepted(services.restart_vm(with_peer(message)).await?),
        Message::Pause(message) => Answer::accepted(services.pause_vm(with_peer(message)).await?),
        Message::Resume(message) => Answer::accepted(services.resume_vm(with_peer(message)).await?),
        Message::Migrate(message) => Answer::accepted(services.migrate_vm(with_peer(message)).await?),
        Message::Delete(message) => Answer::accepted(services.delete_vm(with_peer(message)).await?),
        Message::Update(message) => {
            let vm = services.update_vm(with_peer(message)).await?.into_inner();
            Ok(Answer::read(vec![vm]))
        }
        Message::Get(message) => {
            let vm = services.get_vm(with_peer(message)).await?.into_inner();
            Ok(Answer::read(vec![vm]))
        }
        Message::List(message) => {
            let list = services.list_vms(with_peer(message)).await?.into_inner();
            Ok(Answer::read(list.vms))
        }
        Message::Cancel(message) => services
            .cancel_operation(with_peer(message))
            .await
            .map(|_| Answer::Done),
        Message::Cordon(message) => services
            .cordon_host(with_peer(message))
            .await
            .map(|_| Answer::Done),
        Message::Uncordon(message) => services
            .uncordon_host(with_peer(message))
            .await
            .map(|_| Answer::Done),
        Message::RelabelHost(message) => services
            .update_host(with_peer(*message))
            .await
            .map(|_| Answer::Done),
        Message::ForgetHost(message) => services
            .delete_host(with_peer(message))
            .await
            .map(|_| Answer::Done),
        Message::Thing(message) => message.call(services).await,
    }
}
