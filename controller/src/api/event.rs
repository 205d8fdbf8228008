//! `dalgu.v1.EventService`.
//!
//! A watcher has a place in the kept events and a short queue: it reads on from there at its own pace. One that takes
//! nothing for a while is ended with READER_TOO_SLOW and may come again at its place; it is ended too when what it would
//! read next is no longer kept.

use std::{collections::HashMap, ops::Bound, sync::Arc, time::Duration};

use dalgu_proto::{
    reason,
    v1::{self, event_service_server::EventService},
};
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::{
    mpsc::{self, error::SendTimeoutError},
    oneshot,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Services, page::Page, peer, wire};
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
    /// Who is told.
    principal: String,
}

impl Filter {
    fn takes(&self, event: &EventRecord) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&wire::event_kind(event.kind).into()))
            && (self.subject.is_empty() || self.subject == event.subject)
            && event.is_for(&self.principal)
    }
}

fn expired(after: u64, oldest: u64) -> Status {
    let message = format!(
        "events after version {after} are no longer kept (the oldest is {oldest}): list again and watch from the list's \
         resource_version"
    );
    reason::status(Code::OutOfRange, "RESOURCE_VERSION_EXPIRED", message)
}

fn too_slow(patience: Duration, after: u64) -> Status {
    let message = format!(
        "the reader took nothing for {} s: watch again after version {after}",
        patience.as_secs()
    );
    let place = HashMap::from([("after_resource_version".to_owned(), after.to_string())]);
    reason::status_with(Code::Unavailable, "READER_TOO_SLOW", message, place)
}

#[tonic::async_trait]
impl EventService for Services {
    type WatchEventsStream = BoxStream<'static, Result<v1::Event, Status>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let principal = peer(&request)?.to_string();
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
            principal,
        };
        let (db, stop) = (self.db.clone(), self.stop.clone());
        let patience = self.config.limits.slow_reader;
        let (end, ended) = oneshot::channel();
        tokio::spawn(async move {
            // Cancel safe: the watcher is gone or the controller is, nobody misses the rest.
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = sender.closed() => {}
                status = feed(db, after, filter, &sender, patience) => drop(status.map(|status| end.send(status))),
            }
        });
        // Behind what is queued: a full queue has no room for it.
        let end = stream::once(ended).filter_map(async |end| end.ok().map(Err));
        Ok(Response::new(
            ReceiverStream::new(events).map(Ok).chain(end).boxed(),
        ))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let principal = peer(&request)?.to_string();
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
            principal,
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
        let now = self.db.now();
        let events = events
            .into_iter()
            .map(|event| wire::event(&state, event, &filter.principal, now))
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

/// Sends what comes behind `after`, until it is no longer kept or nobody takes it. Gives why, unless the reader has gone.
async fn feed(
    db: Db,
    mut after: u64,
    filter: Filter,
    sender: &mpsc::Sender<v1::Event>,
    patience: Duration,
) -> Option<Status> {
    let mut states = db.watch();
    loop {
        let state: Arc<State> = states.borrow_and_update().clone();
        if let Err(status) = check_kept(&state, after) {
            return Some(status);
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
                return None;
            }
            continue;
        }
        drop(state);
        for event in next {
            if filter.takes(&event) {
                let message = wire::event(&db.snapshot(), &event, &filter.principal, db.now());
                match sender.send_timeout(message, patience).await {
                    Ok(()) => {}
                    Err(SendTimeoutError::Timeout(_)) => return Some(too_slow(patience, after)),
                    Err(SendTimeoutError::Closed(_)) => return None,
                }
            }
            after = event.revision;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixtures, state::Hooks, store::memory::Disk};

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_ended_at_the_place_it_has_come_to() {
        use tonic_types::StatusExt;
        let db = Db::open(Disk::default().open(), fixtures::cluster_id(), Hooks::default()).unwrap();
        let start = db.snapshot().meta.revision;
        db.change(|tx| {
            for number in 0..100 {
                tx.event(
                    crate::model::EventKind::Vm,
                    "VmUpdated",
                    "web",
                    number.to_string(),
                    None,
                );
            }
        })
        .await;
        let all = Filter {
            kinds: vec![],
            subject: String::new(),
            principal: String::new(),
        };
        let patience = Duration::from_secs(30);
        let (sender, mut events) = mpsc::channel(BUFFER);
        let began = tokio::time::Instant::now();
        let status = feed(db.clone(), start, all.clone(), &sender, patience)
            .await
            .unwrap();
        assert_eq!(began.elapsed(), patience);
        assert_eq!(status.code(), Code::Unavailable, "to be tried again");
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "READER_TOO_SLOW");
        drop(sender);
        let mut seen = vec![];
        while let Some(event) = events.recv().await {
            seen.push(event);
        }
        assert_eq!(seen.len(), BUFFER, "no more than the queue was kept for it");
        let place = info.metadata["after_resource_version"].parse().unwrap();
        assert_eq!(seen.last().unwrap().resource_version, place);

        let (sender, mut events) = mpsc::channel(BUFFER);
        let resumed = tokio::spawn(async move { feed(db, place, all, &sender, patience).await });
        for number in BUFFER..100 {
            assert_eq!(
                events.recv().await.unwrap().message,
                number.to_string(),
                "nothing is missing"
            );
        }
        drop(events);
        resumed.abort();
    }
}
