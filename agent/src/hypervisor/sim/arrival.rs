//! A migration's destination among simulated hypervisors; called by whoever connects to the control socket.
//!
//! The incoming domain lives no longer than its connection, until it is told to go on: then it is here, whether or
//! not the source hears of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use dalgu_proto::{ids::VmId, vm::PowerReason};
use tokio_util::sync::CancellationToken;

use super::{
    Call, Fault, Inner, Listener,
    layers::Chain,
    migration::BEAT,
    state::{Guest, key},
    wire::{Answer, Line, Say},
};
use crate::hypervisor::{Definition, DomainState, Error, Hardware, Hint};

/// Takes in VMs until the hypervisor ends.
pub(super) async fn serve(inner: Weak<Inner>, mut listener: Box<dyn Listener>, end: CancellationToken) {
    loop {
        let stream = tokio::select! {
            biased;
            () = end.cancelled() => return,
            // A connection that is not yet accepted waits.
            accepted = listener.accept() => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a migration's connection was lost");
                    tokio::time::sleep(BEAT).await;
                    continue;
                }
            },
        };
        let Some(inner) = inner.upgrade() else { return };
        tokio::spawn(receive(inner, Line::new(stream), end.clone()));
    }
}

async fn receive(inner: Arc<Inner>, mut line: Line, end: CancellationToken) {
    let Ok(daemon) = inner.reachable() else { return };
    let Ok(prepare) = line.receive::<Say>().await else {
        return;
    };
    let Some((definition, hardware)) = prepare.into_definition() else {
        return;
    };
    let id = definition.id;
    if let Err(error) = make_room(&inner, &definition, hardware) {
        let _ = line
            .send(&Answer::No {
                why: error.to_string(),
            })
            .await;
        return;
    }
    inner.hint(Hint::Domain(id));
    let arrived = tokio::select! {
        biased;
        () = daemon.cancelled() => false,
        () = end.cancelled() => false,
        // What is dropped is a connection; the domain is settled below.
        arrived = take_in(&inner, id, &mut line) => arrived,
    };
    if !arrived {
        let mut state = inner.state();
        if state
            .domains
            .get(&id)
            .is_some_and(|guest| guest.state == DomainState::Incoming)
        {
            state.domains.remove(&id);
        }
    }
    inner.hint(Hint::Domain(id));
}

fn make_room(inner: &Inner, definition: &Definition, hardware: Hardware) -> Result<(), Error> {
    if let Some(Fault::Error(error) | Fault::TakesEffect(error)) = inner.faults().take(Call::Receive) {
        return Err(error);
    }
    let mut state = inner.state();
    if let Some(guest) = state.domains.get(&definition.id) {
        let detail = format!("it is here already, {:?}", guest.state);
        return Err(Error::WrongState {
            id: definition.id,
            detail,
        });
    }
    state.name_is_free(definition.id, definition.name.as_str())?;
    let mut guest = Guest::new(definition, inner.config.behaviour, DomainState::Incoming);
    guest.hardware = hardware;
    state.domains.insert(definition.id, guest);
    Ok(())
}

/// Whether the VM arrived.
async fn take_in(inner: &Inner, id: VmId, line: &mut Line) -> bool {
    if line.send(&Answer::Ok).await.is_err() {
        return false;
    }
    loop {
        let said = match line.receive().await {
            Ok(said) => said,
            Err(_) => return false,
        };
        let answer = match said {
            Say::Data { .. } if expected(inner, id) => Answer::Ok,
            Say::Finish {
                paused,
                ticks,
                contents,
                chain,
            } if go_on(inner, id, (paused, ticks), &contents, chain.as_ref()) => {
                // Whether or not the source hears of it, the VM is here now.
                let _ = line.send(&Answer::Ok).await;
                return true;
            }
            _ => Answer::No {
                why: "the destination does not expect this VM any more".into(),
            },
        };
        if line.send(&answer).await.is_err() || matches!(answer, Answer::No { .. }) {
            return false;
        }
    }
}

fn expected(inner: &Inner, id: VmId) -> bool {
    inner
        .state()
        .domains
        .get(&id)
        .is_some_and(|guest| guest.state == DomainState::Incoming)
}

fn go_on(
    inner: &Inner,
    id: VmId,
    (paused, ticks): (bool, u64),
    contents: &BTreeMap<String, u64>,
    chain: Option<&Chain>,
) -> bool {
    let mut here = inner.state();
    let guest = here
        .domains
        .get_mut(&id)
        .filter(|guest| guest.state == DomainState::Incoming);
    let Some(guest) = guest else { return false };
    let disks = guest.definition.iter().flat_map(|it| it.spec.disks.clone());
    let held = disks.filter_map(|disk| Some((key(id, &disk), *contents.get(&disk.name)?)));
    let held: Vec<_> = held.collect();
    guest.persistent = true;
    guest.run += 1;
    guest.ticks = ticks;
    let goes_on = if paused {
        DomainState::Paused
    } else {
        DomainState::Running
    };
    guest.to(goes_on, PowerReason::Migrated);
    if let Some(chain) = chain {
        here.chains.insert(id, chain.clone());
    }
    for (file, content) in held {
        here.write_file(&file, content, &inner.config);
    }
    true
}
