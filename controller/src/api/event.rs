//! `dalgu.v1.EventService`.
//!
//! A watcher has a place in the kept events and nothing else: it reads on from there at its own pace, so that a slow one
//! costs the controller nothing, and it is ended when what it would read next is no longer kept.

use std::{ops::Bound, sync::Arc};

use dalgu_proto::{
    reason,
    v1::{self, event_service_server::EventService},
};
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Services, page::Page, wire};
use crate::{
    model::EventRecord,
    state::{Db, State},
};

/// Events on their way to one watcher.
const BUFFER: usize = 64;

/// Which events are wanted.
#[derive(Debug, Clone)]
struct Filter {
    kinds: Vec<i32>,
    subject: String,
}

impl Filter {
    fn takes(&self, event: &EventRecord) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&wire::event_kind(event.kind).into()))
            && (self.subject.is_empty() || self.subject == event.subject)
    }
}

fn expired(after: u64, oldest: u64) -> Status {
    let message = format!(
        "events after version {after} are no longer kept (the oldest is {oldest}): list again and watch from the list's \
         resource_version"
    );
    reason::status(Code::OutOfRange, "RESOURCE_VERSION_EXPIRED", message)
}

#[tonic::async_trait]
impl EventService for Services {
    type WatchEventsStream = BoxStream<'static, Result<v1::Event, Status>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        if let Some(bad) = request
            .kinds
            .iter()
            .find(|kind| v1::EventKind::try_from(**kind).is_err())
        {
            return Err(reason::invalid(
                "kinds",
                format!("{bad} is not a value of EventKind"),
            ));
        }
        let state = self.db.snapshot();
        let current = state.meta.revision;
        let after = match request.after_resource_version {
            0 => current,
            // Of another store, or from before a restored backup.
            ahead if ahead > current => return Err(expired(ahead, state.oldest_event())),
            after => after,
        };
        check_kept(&state, after)?;
        let (sender, events) = mpsc::channel(BUFFER);
        let filter = Filter {
            kinds: request.kinds,
            subject: request.subject,
        };
        let (db, stop) = (self.db.clone(), self.stop.clone());
        tokio::spawn(async move {
            // Cancel safe: the watcher is gone or the controller is, nobody misses the rest.
            tokio::select! {
                () = feed(db, after, filter, &sender) => {}
                () = sender.closed() => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::of(
            request.page_size,
            &request.page_token,
            &format!("events {:?}", request.subject),
        )?;
        let until = match page.after.as_deref().map(str::parse) {
            None => Bound::Unbounded,
            Some(Ok(revision)) => Bound::Excluded(revision),
            Some(Err(_)) => return Err(reason::invalid("page_token", "does not belong to this list")),
        };
        let state = self.db.snapshot();
        let filter = Filter {
            kinds: vec![],
            subject: request.subject,
        };
        let newest_first = state
            .events
            .range((Bound::<u64>::Unbounded, until))
            .rev()
            .map(|(_, event)| event);
        let (events, next_page_token) = page
            .take(newest_first.filter(|event| filter.takes(event)), |event| {
                event.revision.to_string()
            });
        let events = events
            .into_iter()
            .map(|event| wire::event(&state, event))
            .collect();
        Ok(Response::new(v1::ListEventsResponse {
            events,
            next_page_token,
        }))
    }
}

/// Nothing behind `after` may have been forgotten. Revisions without an event are none that could be missed.
#[allow(clippy::result_large_err, reason = "tonic's error is what the stream carries")]
fn check_kept(state: &State, after: u64) -> Result<(), Status> {
    let oldest = state.oldest_event();
    if after < state.meta.forgotten {
        Err(expired(after, oldest))
    } else {
        Ok(())
    }
}

/// Sends what comes behind `after`, until it is no longer kept.
async fn feed(db: Db, mut after: u64, filter: Filter, sender: &mpsc::Sender<Result<v1::Event, Status>>) {
    let mut states = db.watch();
    loop {
        let state: Arc<State> = states.borrow_and_update().clone();
        if let Err(status) = check_kept(&state, after) {
            // Who cannot take even this has gone.
            let _ = sender.send(Err(status)).await;
            return;
        }
        // So many at a time that a slow reader does not hold an old state for long.
        let next: Vec<_> = state
            .events
            .range((Bound::Excluded(after), Bound::Unbounded))
            .take(BUFFER)
            .map(|(_, e)| e.clone())
            .collect();
        if next.is_empty() {
            after = after.max(state.meta.revision);
            drop(state);
            if states.changed().await.is_err() {
                return;
            }
            continue;
        }
        drop(state);
        for event in next {
            after = event.revision;
            if filter.takes(&event) {
                let message = wire::event(&db.snapshot(), &event);
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
            }
        }
    }
}
